"""The main path: start reading here.

    recipe -> sources -> plan -> calibrate -> align -> fuse -> write -> train -> evaluate -> report

Stages do not import one another; only this module knows their order.
"""

import contextlib
import ctypes
import hashlib
import logging
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lap
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor

from symphony_moe import __version__
from symphony_moe.align import match_neurons, matched_correlation
from symphony_moe.assemble import assemble_layer, fused_final_norm, fused_tables
from symphony_moe.calibrate import Streams, advance, calibration_windows
from symphony_moe.errors import RecipeError, RunFolderError, SourceError
from symphony_moe.evaluate import continuations, evaluate_run, held_out_windows
from symphony_moe.families import EMBEDDING, FINAL_NORM, HEAD, HEAD_BIAS, layer_outputs
from symphony_moe.plan import Plan, make_plan, streams_in_memory
from symphony_moe.recipe import Recipe
from symphony_moe.report import render
from symphony_moe.run_folder import (
    RunFolder,
    log_to,
    publish,
    refuse_existing,
    start_run,
    write_bytes,
    write_text,
)
from symphony_moe.shards import CheckpointWriter, hash_folder, sha256_of
from symphony_moe.sources import Source, anchor_of, open_sources
from symphony_moe.text import check_data_exists
from symphony_moe.train import train_run
from symphony_moe.verify import compare_builds, verify_run
from symphony_moe.write import write_companions

log = logging.getLogger(__name__)


def plan(recipe: Recipe) -> Plan:
    """What a build of this recipe will do, from headers and tokenizers alone. Writes nothing."""
    _check_text(recipe)
    return make_plan(recipe, open_sources(recipe, download=False))


def run(recipe: Recipe, out: Path, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """The whole way: build, verify, train, evaluate, report."""
    # Text that a later stage would refuse is refused before the first begins.
    held_out_windows(recipe, open_sources(recipe, download=False))
    folder = build(recipe, out, resume=resume, overwrite=overwrite)
    verify(folder)
    if not folder.trained.is_dir():
        train(folder, resume=resume)
    evaluate(folder)
    report(folder)
    return folder


def build(recipe: Recipe, out: Path, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Stage 1: sources to `checkpoint/`, layer by layer, without training.

    Refuses (SymphonyError) what cannot be built before the run folder is made.
    """
    started = time.monotonic()
    refuse_existing(out, resume=resume, overwrite=overwrite)
    plan(recipe)  # before weights are fetched
    sources = open_sources(recipe)
    planned = make_plan(recipe, sources)
    windows = calibration_windows(recipe, sources) if recipe.aligns_neurons else None
    recipe = _with_hashes(recipe, sources)

    folder = start_run(out, recipe, resume=resume, overwrite=overwrite)
    if folder.checkpoint.is_dir():
        log.info("%s is finished already", folder.checkpoint)
        if folder.trained.is_dir() or not folder.training.is_dir():
            shutil.rmtree(folder.work)  # nothing that a training could go on from
        return folder
    with log_to(folder):
        folder.update_json(folder.plan, planned.to_json())
        writer = CheckpointWriter(
            folder.staged_checkpoint, planned.tensors, planned.dtype, recipe.output.max_shard_bytes
        )
        tables = [name for name in (EMBEDDING, HEAD) if name in planned.tensors]
        for name, first_row, rows in fused_tables(recipe, sources, tables):
            writer.write(name, rows, first_row)
        writer.write(FINAL_NORM, fused_final_norm(recipe, sources))
        if HEAD_BIAS in planned.tensors:
            writer.write(HEAD_BIAS, torch.zeros(planned.tensors[HEAD_BIAS]))

        streams = None
        if windows is not None:
            in_memory = streams_in_memory(recipe, sources[0].config, len(sources))
            streams = Streams(sources, windows, None if in_memory else folder.work)
        text = "" if windows is None else hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        num_layers = sources[0].config.num_hidden_layers
        for layer in range(num_layers):
            _build_layer(recipe, sources, layer, streams, writer, folder, text)
            release_freed_memory()
            seconds = time.monotonic() - started
            log.info("layer %d of %d, %.0f s", layer + 1, num_layers, seconds)

        tensor_hashes = writer.finish()
        write_companions(folder.staged_checkpoint, planned, recipe, sources)
        correlations = _gather_alignment(folder, num_layers)
        folder.update_json(
            folder.metrics,
            {
                "alignment": correlations,
                "timing": {
                    "build_seconds": round(time.monotonic() - started, 2),
                    "build_peak_rss_bytes": peak_rss_bytes(),
                    "calibration_tokens": 0 if windows is None else windows.numel(),
                },
            },
        )
        _write_manifest(folder, recipe, tensor_hashes)
        publish(folder.staged_checkpoint, folder.checkpoint)
        shutil.rmtree(folder.work)
        log.info("built %s", folder.checkpoint)
    return folder


def verify(folder: RunFolder, *, deep: bool = False) -> dict[str, Any]:
    """Check a finished run against its manifest, its sources and stock `transformers`; `deep`
    builds it a second time and compares every tensor. Raises VerificationError."""
    recipe = folder.read_recipe()
    folder.require_checkpoint()
    sources = open_sources(recipe)
    checks = verify_run(folder, recipe, sources, make_plan(recipe, sources))
    if deep:
        with tempfile.TemporaryDirectory(prefix="verify-", dir=folder.root) as again:
            rebuilt = build(recipe, Path(again) / "run")
            checks["rebuilt"] = compare_builds(folder, rebuilt)
    return checks


def train(
    folder: RunFolder,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Stage 2: `checkpoint/` to `trained/`. `overrides` may change the recipe's `train`."""
    recipe = folder.read_recipe(overrides, sections=("train",))
    folder.require_checkpoint()
    with log_to(folder):
        train_run(folder, recipe, open_sources(recipe), resume=resume, overwrite=overwrite)


def evaluate(folder: RunFolder, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Held-out losses and routing of the sources, the built and the trained model, into
    `metrics.json`. `overrides` may change the recipe's `evaluation`."""
    built_with = folder.read_recipe()
    recipe = folder.read_recipe(overrides, sections=("evaluation",))
    if recipe.evaluation.holdout > built_with.evaluation.holdout:
        raise RecipeError(
            f"evaluation.holdout: {recipe.evaluation.holdout} would evaluate on documents that "
            f"this run has calibrated and trained on; at most {built_with.evaluation.holdout}"
        )
    folder.require_checkpoint()
    with log_to(folder):
        return evaluate_run(folder, recipe, open_sources(recipe))


def generate(folder: RunFolder) -> list[tuple[str, str, str]]:
    """(domain, prompt, continuation) by the run's model, for prompts from held-out text."""
    recipe = folder.read_recipe()
    return continuations(folder, recipe, open_sources(recipe))


def report(folder: RunFolder) -> Path:
    """`metrics.json` to one self-contained `report.html`."""
    folder.require_checkpoint()
    html = render(
        folder.read_json(folder.metrics),
        folder.read_json(folder.plan),
        folder.read_recipe().model_dump(mode="json"),
    )
    write_text(folder.report, html)
    return folder.report


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: that begins at the size of whatever process started this one.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release_freed_memory() -> None:
    """Give freed memory back to the system. glibc keeps blocks of up to 32 MB for itself, and what
    is left of one layer's tensors would pile up, in fragments, from layer to layer."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _check_text(recipe: Recipe) -> None:
    """TextError for data files that are missing, before anything else is done."""
    for name, spec in recipe.sources.items():
        check_data_exists(f"sources.{name}", spec.data)
    for name, data in recipe.evaluation.extra.items():
        check_data_exists(f"evaluation.extra.{name}", data)


def _with_hashes(recipe: Recipe, sources: Sequence[Source]) -> Recipe:
    """The recipe with every source pinned to the weights that it has now."""
    pinned = {
        source.name: recipe.sources[source.name].model_copy(
            update={"sha256": source.hash_weights()}
        )
        for source in sources
    }
    return recipe.model_copy(update={"sources": pinned})


def _build_layer(
    recipe: Recipe,
    sources: Sequence[Source],
    layer: int,
    streams: Streams | None,
    writer: CheckpointWriter,
    folder: RunFolder,
    text: str,
) -> None:
    """Calibrate, align, fuse and write one layer. A layer that an interrupted build has finished is
    kept: the streams are only brought past it. `text`: digest of the calibration windows."""
    anchor = anchor_of(recipe, sources)
    done, prefix = folder.layer_done(layer), f"model.layers.{layer}."
    finished = _is_finished(done, writer, prefix, text)
    weights: Mapping[str, Mapping[str, Tensor]] = {}
    if streams is not None or not finished:
        weights = {source.name: source.read_layer(layer) for source in sources}
    matches = (
        advance(sources, anchor.name, layer, weights, streams, statistics=not finished)
        if streams is not None
        else {}
    )
    if finished:
        writer.keep(prefix)
        return
    orders: dict[str, Tensor] = {}
    record: dict[str, Tensor] = {}
    for name, neurons in matches.items():
        correlation = neurons.result()
        if not bool(torch.isfinite(correlation).all()):
            raise SourceError(
                f"{name} (or the anchor, {anchor.name}): layer {layer} puts out values that are "
                "not finite on the calibration text; the weights are damaged or overflow float32"
            )
        orders[name] = match_neurons(correlation)
        before = matched_correlation(correlation, torch.arange(len(orders[name])))
        after = matched_correlation(correlation, orders[name])
        record[f"{name}.layers.{layer}.neurons"] = orders[name]
        record[f"{name}.layers.{layer}.correlation"] = torch.tensor([before, after])
    moe = assemble_layer(recipe, sources, layer, weights, orders)
    for name, tensor in layer_outputs(anchor.family, anchor.config, layer, moe):
        writer.write(name, tensor)
    writer.sync()
    write_bytes(done, save(record, {"text": text, "tensors": writer.digest(prefix)}))


def _is_finished(done: Path, writer: CheckpointWriter, prefix: str, text: str) -> bool:
    """Whether an interrupted build has finished a layer: its record is whole, and what it says of
    the layer's tensors is on disk. RunFolderError where that build had other calibration text."""
    if not done.is_file():
        return False
    try:
        with safetensors.safe_open(done, framework="pt") as file:
            noted = file.metadata() or {}
    except safetensors.SafetensorError:
        return False
    if noted.get("text") != text:
        raise RunFolderError(
            f"{done.parent.parent}: the calibration text has changed since this build was begun; "
            "--overwrite it"
        )
    return noted.get("tensors") == writer.digest(prefix)


def _gather_alignment(folder: RunFolder, num_layers: int) -> dict[str, Any]:
    """All layers' neuron orders into `alignment.safetensors`; the correlations for
    `metrics.json`."""
    record: dict[str, Tensor] = {}
    for layer in range(num_layers):
        record |= load_file(folder.layer_done(layer))
    folder.alignment.write_bytes(save(record))
    correlations: dict[str, dict[str, list[float]]] = {}
    for name, values in record.items():
        source, _, rest = name.rpartition(".layers.")
        if rest.endswith(".correlation"):
            of_source = correlations.setdefault(source, {"before": [], "after": []})
            of_source["before"].append(round(float(values[0]), 6))
            of_source["after"].append(round(float(values[1]), 6))
    return {"neurons": correlations}


def _write_manifest(folder: RunFolder, recipe: Recipe, tensor_hashes: Mapping[str, str]) -> None:
    """Hashes of everything that was made and of what it was made from."""
    folder.update_json(
        folder.manifest,
        {
            "versions": {
                "symphony_moe": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
                "lapx": lap.__version__,
            },
            "sources": {name: spec.sha256 for name, spec in recipe.sources.items()},
            "files": {
                folder.alignment.name: sha256_of(folder.alignment),
                **hash_folder(folder.staged_checkpoint),
            },
            "tensors": {"checkpoint": dict(tensor_hashes)},
        },
    )
