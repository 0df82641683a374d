"""The main path: start reading here.

    recipe -> sources -> plan -> calibrate -> align -> fuse -> refit -> route -> write
           -> train -> evaluate -> report

Stages do not import one another (but for three exceptions that tests/test_layout.py names); only
this module knows their order. Fusing and routing are called from assemble.py and refit.py. The
commands come first, then what a build is made of; `compare`, many runs, is at the end.
"""

import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from symphony_moe.align import describe_alignment, match, measured, settle
from symphony_moe.assemble import (
    Record,
    aligned_layer,
    aligned_table,
    assemble_layer,
    fused_final_norm,
    fused_tables,
)
from symphony_moe.calibrate import (
    aside_windows,
    calibration_windows,
    compare_layer,
    embedding_blocks,
)
from symphony_moe.compare import entries_of, limits_of, mark_reached, refuse_different
from symphony_moe.comparison_page import comparison_facts, render_comparison
from symphony_moe.errors import RecipeError, RunFolderError, SymphonyError
from symphony_moe.evaluate import (
    continuations,
    evaluate_run,
    held_out_text,
    losses_and_routing,
)
from symphony_moe.families import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    HEAD_BIAS,
    layer_outputs,
    read_layer_outputs,
)
from symphony_moe.machine import (
    peak_rss_bytes,
    process_number,
    release_freed_memory,
    versions,
)
from symphony_moe.plan import Plan, beyond_context, make_plan, streams_in_memory
from symphony_moe.recipe import Recipe, Train
from symphony_moe.refit import (
    Calibration,
    advance_new,
    advance_sources,
    begin_streams,
    calibrate_plain,
    fit_layer,
)
from symphony_moe.refit_head import fit_head, next_token_losses
from symphony_moe.report import render, title
from symphony_moe.run_folder import (
    CompareFolder,
    RunFolder,
    adopt_build,
    log_to,
    note_versions,
    publish,
    refuse_existing,
    require_room,
    start_comparison,
    start_run,
    to_json,
    write_bytes,
    write_text,
)
from symphony_moe.shards import CheckpointWriter, beyond, hash_folder, sha256_of
from symphony_moe.sources import Source, anchor_of, experts_of, open_sources, remarks
from symphony_moe.streams import Streams
from symphony_moe.tasks import choose_models, load_tasks, run_tasks
from symphony_moe.text import Packed, check_data_exists, digest_of, joined
from symphony_moe.train import refuse_no_text, refuse_untrainable, train_run
from symphony_moe.verify import compare_builds, verify_run
from symphony_moe.write import write_companions

log = logging.getLogger(__name__)


def plan(recipe: Recipe) -> Plan:
    """What a build of this recipe will do, from headers and tokenizers alone. Writes nothing."""
    _check_text(recipe)
    opened = open_sources(recipe, download=False)
    planned = make_plan(recipe, experts_of(recipe, opened), opened)
    try:
        refuse_untrainable(recipe)
    except SymphonyError as error:  # a build alone does not mind, nor another machine
        planned = replace(planned, notes=[*planned.notes, f"`symphony train` stops here: {error}"])
    return planned


def run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    like: RunFolder | None = None,
) -> RunFolder:
    """The whole way: build, verify, train, evaluate (`like`: see there), report."""
    # What a later stage would refuse is refused before the first begins.
    is_to_train = overwrite or not RunFolder(out).trained.is_dir()
    if is_to_train:
        refuse_untrainable(recipe)
    opened = open_sources(recipe, download=False)
    held_out_text(recipe, opened)
    if is_to_train:
        refuse_no_text(recipe, opened)
    folder = build(recipe, out, resume=resume, overwrite=overwrite)
    verify(folder)
    if not folder.trained.is_dir() or (resume and folder.training_begun.is_file()):
        train(folder, resume=resume)
    evaluate(folder, like=like)
    report(folder)
    return folder


def build(recipe: Recipe, out: Path, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Stage 1: sources to `checkpoint/`, layer by layer, without training.

    Refuses (SymphonyError) what cannot be built before the run folder is made.
    """
    started = time.monotonic()
    refuse_existing(out, resume=resume, overwrite=overwrite)
    plan(recipe)  # before weights are fetched
    opened = open_sources(recipe)
    sources = experts_of(recipe, opened)
    planned = make_plan(recipe, sources, opened)
    _refuse_beyond(recipe, sources)
    windows = calibration_windows(recipe, sources) if recipe.aligns or recipe.fits else {}
    aside = aside_windows(recipe, sources) if recipe.fits else {}
    recipe = _with_hashes(recipe, opened)
    if overwrite or not RunFolder(out).checkpoint.is_dir():
        require_room(out, planned.disk_bytes + planned.work_bytes, planned.work_bytes)

    folder = start_run(out, recipe, resume=resume, overwrite=overwrite)
    if folder.checkpoint.is_dir():
        log.info("%s is finished already", folder.checkpoint)
        if not folder.training_begun.is_file():
            shutil.rmtree(folder.work)  # nothing that a training could go on from
        return folder
    with log_to(folder):
        begun_with = note_versions(folder.begun_with, versions(), "this build")
        _warn_beyond_context(recipe, opened, "calibration")
        folder.update_json(folder.plan, planned.to_json())
        for note in (note for source in opened for note in remarks(source)):
            log.warning("%s", note)
        text = digest_of(some.windows for some in (*windows.values(), *aside.values()))
        record = _align(recipe, sources, windows, aside, folder, text)
        if recipe.refit.method != "none":
            record |= _count_tokens(windows, sources[0].config.vocab_size)
        writer = CheckpointWriter(
            folder.staged_checkpoint, planned.tensors, planned.dtype, recipe.output.max_shard_bytes
        )
        _write_tables(recipe, sources, record, writer, planned.tensors)
        calibration = _begin_fit(recipe, sources, record, windows, aside, folder)
        num_layers = sources[0].config.num_hidden_layers
        for layer in range(num_layers):
            _build_layer(recipe, sources, layer, record, calibration, writer, folder, text)
            release_freed_memory()
            seconds = time.monotonic() - started
            log.info("layer %d of %d, %.0f s", layer + 1, num_layers, seconds)
        fitting: dict[str, Any] = {}
        if calibration is not None:
            fitting["layers"] = [
                json.loads((_noted(folder.layer_done(layer)) or {})["note"])
                for layer in range(num_layers)
            ]
            if recipe.refit.method != "none":
                more, record = _finish_fit(recipe, sources, record, calibration, writer, folder)
                fitting |= more

        tensor_hashes = writer.finish()
        write_companions(folder.staged_checkpoint, planned, recipe, sources)
        write_bytes(folder.alignment, save(record))
        folder.update_json(
            folder.metrics,
            {
                "alignment": describe_alignment(record),
                **({"refit": fitting} if fitting else {}),
                "timing": {
                    "build_seconds": round(time.monotonic() - started, 2),
                    "build_peak_rss_bytes": peak_rss_bytes(),
                    "calibration_tokens": sum(
                        text.windows.numel() for text in (*windows.values(), *aside.values())
                    ),
                },
            },
        )
        _write_manifest(folder, recipe, tensor_hashes, begun_with)
        publish(folder.staged_checkpoint, folder.checkpoint)
        shutil.rmtree(folder.work)
        log.info("built %s", folder.checkpoint)
    return folder


def _refuse_beyond(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raise RecipeError where an expert's matrix that is written as it is has a number that float16
    does not hold: found while it is written, that would be after hours."""
    dtype = recipe.output.dtype
    changed = recipe.folds or recipe.refit.method != "none" or recipe.experts.init == "drop"
    if dtype != "float16" or changed or sources[0].family.norm_eps is not None:
        return
    copied = recipe.experts.init == "copy"
    for source in [anchor_of(recipe, sources)] if copied else sources:
        for layer in range(source.config.num_hidden_layers):
            for name in (f"model.layers.{layer}.{part}" for part in source.family.expert):
                if source.headers[name].dtype == "F16" and source.adapter is None:
                    continue
                largest = source.read(name).abs().max()
                if not bool(largest.to(torch.float16).isfinite()):
                    raise RecipeError(f"{source.name}: " + beyond(name, float(largest), dtype))


def verify(folder: RunFolder, *, deep: bool = False) -> dict[str, Any]:
    """Check a finished run against its manifest, its sources and stock `transformers`; `deep`
    builds it a second time and compares every tensor. Raises VerificationError."""
    recipe = folder.read_recipe()
    folder.require_checkpoint()
    sources = experts_of(recipe, open_sources(recipe))
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
        sources = open_sources(recipe)
        measure = None
        _warn_beyond_context(recipe, sources, "train")
        if recipe.train.evaluations:
            windows = held_out_text(recipe, sources)

            def measure(model: Any) -> dict[str, float]:
                return losses_and_routing(model, windows)[0]

        train_run(folder, recipe, sources, resume=resume, overwrite=overwrite, measure=measure)


def evaluate(
    folder: RunFolder, overrides: Sequence[str] = (), *, like: RunFolder | None = None
) -> dict[str, Any]:
    """Held-out losses and routing of the sources, the built and the trained model, into
    `metrics.json`. `overrides` may change the recipe's `evaluation`. `like`: a run whose losses of
    the sources are taken over where they must be the same."""
    built_with = folder.read_recipe()
    recipe = folder.read_recipe(overrides, sections=("evaluation",))
    if recipe.evaluation.holdout > built_with.evaluation.holdout:
        raise RecipeError(
            f"evaluation.holdout: {recipe.evaluation.holdout} would evaluate on documents that "
            f"this run has calibrated and trained on; at most {built_with.evaluation.holdout}"
        )
    folder.require_checkpoint()
    with log_to(folder):
        sources = open_sources(recipe)
        _warn_beyond_context(recipe, sources, "evaluation")
        return evaluate_run(folder, recipe, sources, like)


def evaluate_tasks(
    folder: RunFolder,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    models: Sequence[str] = (),
    limit: int | None = None,
    chat_template: bool = False,
    unsafe_code: bool = False,
) -> dict[str, Any]:
    """Benchmarks of lm-evaluation-harness, into `tasks` of `metrics.json`: `NAME` or `NAME:N` with
    N examples in the prompt. `models`: `built`, `trained`, sources' names, `sources` for all of
    those; empty for the run's own. See `load_tasks` and `run_tasks`."""
    recipe = folder.read_recipe()
    folder.require_checkpoint()
    chosen = choose_models(folder, recipe, models)
    with log_to(folder):
        loaded = load_tasks(tasks, include, unsafe_code=unsafe_code)
        # A run's own models need none of them.
        sources = open_sources(recipe) if set(chosen) & set(recipe.sources) else []
        return run_tasks(
            folder,
            sources,
            chosen,
            loaded,
            limit=limit,
            chat_template=chat_template,
            unsafe_code=unsafe_code,
        )


def generate(folder: RunFolder) -> list[tuple[str, str, str]]:
    """(domain, prompt, continuation) by the run's model, for prompts from held-out text."""
    recipe = folder.read_recipe()
    return continuations(folder, recipe, open_sources(recipe))


def report(folder: RunFolder) -> Path:
    """`metrics.json` to one self-contained `report.html`."""
    recipe = folder.read_recipe().model_dump(mode="json")
    folder.require_checkpoint()
    metrics = folder.read_json(folder.metrics)
    # A training may have had settings of its own.
    recipe["train"] |= metrics.get("training", {}).get("settings", {})
    html = render(metrics, folder.read_json(folder.plan), recipe)
    write_text(folder.report, html)
    return folder.report


def _warn_beyond_context(recipe: Recipe, sources: Sequence[Source], section: str) -> None:
    if process_number() == 0:
        for sentence in beyond_context(recipe, sources, section):
            log.warning("%s", sentence)


def _check_text(recipe: Recipe) -> None:
    """TextError for data files that are missing, before anything else is done."""
    for name, spec in recipe.sources.items():
        check_data_exists(f"sources.{name}", spec.data)
    for name, data in recipe.evaluation.extra.items():
        check_data_exists(f"evaluation.extra.{name}", data)


def _with_hashes(recipe: Recipe, sources: Sequence[Source]) -> Recipe:
    """The recipe with every source pinned to the weights that it has now."""
    pinned = {
        source.name: recipe.sources[source.name].model_copy(update={"sha256": source.hash_files()})
        for source in sources
    }
    return recipe.model_copy(update={"sources": pinned})


def _align(
    recipe: Recipe,
    sources: Sequence[Source],
    windows: Mapping[str, Packed],
    aside: Mapping[str, Packed],
    folder: RunFolder,
    text: str,
) -> dict[str, Tensor]:
    """One sweep of all sources over the whole calibration text, that of `aside` first; what
    `alignment.safetensors` will hold. Layers that an interrupted build has compared are not
    compared again."""
    if not recipe.aligns:
        return {}
    num_layers = sources[0].config.num_hidden_layers
    compared = [_is_compared(folder.layer_compared(layer), text) for layer in range(num_layers)]
    if not all(compared):
        in_memory = streams_in_memory(recipe, sources[0].config, len(sources))
        streams = Streams(None if in_memory else folder.work)
        parts = [aside[name].windows for name in sorted(aside)]
        num_aside = sum(map(len, parts))
        together = torch.cat([*parts, *(windows[name].windows for name in sorted(windows))])
        for source in sources:
            table = embedding_blocks(source)
            streams.embed({source.name: together}, source.config.hidden_size, table)
        for layer in range(num_layers):
            path = None if compared[layer] else folder.layer_compared(layer)
            _compare_layer(recipe, sources, layer, streams, num_aside, path, text)
            log.info("compared layer %d of %d", layer + 1, num_layers)
            release_freed_memory()
        streams.release()
    where: dict[str, Path] = {}
    for layer in range(num_layers):
        with safetensors.safe_open(folder.layer_compared(layer), framework="pt") as file:
            where |= dict.fromkeys(file.keys(), folder.layer_compared(layer))

    def read(name: str) -> Tensor:
        with safetensors.safe_open(where[name], framework="pt") as file:
            # A copy: while one tensor of a file is in use, all of it stays mapped.
            return file.get_tensor(name).clone()

    others = [source.name for source in sources if source.name != recipe.anchor]
    return settle(where, read, others, num_layers)


def _compare_layer(
    recipe: Recipe,
    sources: Sequence[Source],
    layer: int,
    streams: Streams,
    aside: int,
    path: Path | None,
    text: str,
) -> None:
    """Bring all sources' streams past one layer. `path`: where to record how it compares with the
    anchor's; None where that is known. `aside`: windows of the streams to judge by."""
    weights = {source.name: source.read_layer(layer) for source in sources}
    statistics = path is not None
    found = compare_layer(recipe, sources, layer, weights, streams, aside, statistics=statistics)
    if path is None:
        return
    tensors = {}
    for name, comparison in found.items():
        who = f"{name} (or the anchor, {recipe.anchor}): layer {layer}"
        for kind, tensor in match(comparison, sources[0].family, who).items():
            tensors[f"{name}.layers.{layer}.{kind}"] = tensor
    write_bytes(path, save(tensors, {"text": text}))


def _is_compared(path: Path, text: str) -> bool:
    """Whether an interrupted build has compared this layer, on this text."""
    return (_noted(path) or {}).get("text") == text


def _count_tokens(windows: Mapping[str, Packed], vocabulary: int) -> dict[str, Tensor]:
    """`<source>.tokens`: how often each token is in a source's calibration text (int64)."""
    return {
        f"{name}.tokens": torch.bincount(text.windows.flatten(), minlength=vocabulary)
        for name, text in windows.items()
    }


def _write_tables(
    recipe: Recipe,
    sources: Sequence[Source],
    record: Record,
    writer: CheckpointWriter,
    tensors: Mapping[str, tuple[int, ...]],
) -> None:
    """Token embeddings, output head and final norm, as fused. A head that is fitted is written over
    at the end."""
    tables = [name for name in (EMBEDDING, HEAD) if name in tensors]
    for name, first_row, rows in fused_tables(recipe, sources, tables, record):
        writer.write(name, rows, first_row)
    writer.write(FINAL_NORM, fused_final_norm(recipe, sources))
    if HEAD_BIAS in tensors:
        writer.write(HEAD_BIAS, torch.zeros(tensors[HEAD_BIAS]))


def _begin_fit(
    recipe: Recipe,
    sources: Sequence[Source],
    record: dict[str, Tensor],
    windows: Mapping[str, Packed],
    aside: Mapping[str, Packed],
    folder: RunFolder,
) -> Calibration | None:
    """All streams of the fit at their token embeddings; None where nothing is fitted. `aside`: the
    text that it is judged by."""
    if not recipe.fits:
        return None
    anchor = anchor_of(recipe, sources)
    in_memory = streams_in_memory(recipe, anchor.config, len(sources))
    streams = Streams(None if in_memory else folder.work)
    texts = {name: joined((aside[name], windows[name])) for name in sorted(windows)}
    by_name = {name: text.windows for name, text in texts.items()}
    positions = {name: text.positions for name, text in texts.items()}
    counts = {name: len(text) for name, text in aside.items()}
    configs = {source.name: source.config for source in sources}
    known = {source.name: source.known for source in sources}
    calibration = Calibration(
        recipe, anchor.family, configs, anchor.name, by_name, counts, streams, known, positions
    )
    hidden = anchor.config.hidden_size
    new = {f"new/{name}": text for name, text in by_name.items()}
    streams.embed(new, hidden, _embedding_blocks(recipe, sources, record))
    if recipe.refit.method != "none":
        for source in sources:
            own = {f"source/{source.name}": by_name[source.name]}
            streams.embed(own, hidden, aligned_table(recipe, source, EMBEDDING, record))
        some = {
            f"plain/{name}": text[: calibration.plain_windows(name)]
            for name, text in by_name.items()
        }
        streams.embed(some, hidden, _embedding_blocks(recipe, sources, {}))
    begin_streams(calibration)
    return calibration


def _embedding_blocks(
    recipe: Recipe, sources: Sequence[Source], record: Record
) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of the new model's token embeddings, as they are written."""
    dtype = getattr(torch, recipe.output.dtype)
    for _, first_row, rows in fused_tables(recipe, sources, [EMBEDDING], record):
        yield first_row, rows.to(dtype)


def _build_layer(
    recipe: Recipe,
    sources: Sequence[Source],
    layer: int,
    record: Record,
    calibration: Calibration | None,
    writer: CheckpointWriter,
    folder: RunFolder,
    text: str,
) -> None:
    """Align, fuse, fit and write one layer. A layer that an interrupted build has finished is kept:
    the streams are only brought past it. `text`: digest of the calibration windows."""
    anchor = anchor_of(recipe, sources)
    done, prefix = folder.layer_done(layer), f"model.layers.{layer}."
    finished = _is_finished(done, writer, prefix, text)
    if finished:
        writer.keep(prefix)
        if calibration is None:
            return
    refits = recipe.refit.method != "none"
    weights = {source.name: source.read_layer(layer) for source in sources}
    aligned = {s.name: aligned_layer(recipe, s, layer, weights[s.name], record) for s in sources}
    names = [source.name for source in sources]
    note: dict[str, Any] = {}
    if finished:
        remembered = load_file(done)
        if calibration is not None and refits:
            advance_sources(calibration, layer, aligned)
    else:
        remembered = {}
        moe = assemble_layer(recipe, sources, layer, aligned)
        if calibration is not None:
            by_name = moe.select([names.index(name) for name in calibration.names])
            by_name, note = fit_layer(calibration, layer, by_name, aligned)
            moe = by_name.select([calibration.names.index(name) for name in names])
        for name, tensor in layer_outputs(anchor.family, anchor.config, layer, moe):
            writer.write(name, tensor)
    if calibration is not None:
        # What follows is fitted to the layer as it is written: rounding is an error like others.
        written = read_layer_outputs(
            anchor.family, anchor.config, layer, len(sources), writer.read
        ).select([names.index(name) for name in calibration.names])
        advance_new(calibration, layer, written)
        if refits:
            raw = {s.name: aligned_layer(recipe, s, layer, weights[s.name], {}) for s in sources}
            plain = assemble_layer(recipe, sources, layer, raw).to(getattr(torch, writer.dtype))
            plain = plain.select([names.index(name) for name in calibration.names])
            if not finished:
                router = calibrate_plain(calibration, layer, plain)
                remembered["plain_router"] = router.to(getattr(torch, writer.dtype))
            router = remembered["plain_router"]
            advance_new(calibration, layer, replace(plain, router=router), "plain")
    if not finished:
        writer.sync()
        noted = {"text": text, "tensors": writer.digest(prefix), "note": to_json(note)}
        write_bytes(done, save(remembered, noted))


def _finish_fit(
    recipe: Recipe,
    sources: Sequence[Source],
    record: dict[str, Tensor],
    calibration: Calibration,
    writer: CheckpointWriter,
    folder: RunFolder,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fit and write the output head; then, where the plain mean of the sources loses less on the
    text kept aside, write that instead. What was measured, and the record of what is used."""
    start = _whole_head(recipe, sources, record)
    own = {s.name: torch.cat([rows for _, rows in aligned_table(recipe, s, HEAD, record)])
           for s in sources}  # fmt: skip
    head, head_note = fit_head(calibration, start, own)
    writer.write(HEAD, head)
    plain_head = _whole_head(recipe, sources, {})
    plain = plain_head.to(getattr(torch, writer.dtype)).float()
    by_source = {
        "harmonized": next_token_losses(calibration, "new", writer.read(HEAD)),
        "plain mean": next_token_losses(calibration, "plain", plain),
    }
    losses = {which: sum(of.values()) / len(of) for which, of in by_source.items()}
    # A loss that is no number is not better than anything.
    worth = {which: loss if math.isfinite(loss) else math.inf for which, loss in losses.items()}
    chosen = min(worth, key=lambda which: worth[which])  # the first, where they are equal
    log.info(
        "text kept aside: %.3f nats per token, the plain mean %.3f; writing the %s",
        losses["harmonized"], losses["plain mean"],
        "plain mean" if chosen == "plain mean" else "fitted model",
    )  # fmt: skip
    for name in by_source["harmonized"] if chosen == "harmonized" else ():
        fitted, mean = (of[name] for of in by_source.values())
        if mean < fitted:
            log.warning(
                "on the text of %s kept aside the plain mean of the sources loses less (%.3f nats "
                "per token) than the fitted model (%.3f)", name, mean, fitted,
            )  # fmt: skip
    if chosen == "plain mean":
        record = measured(record)
        _write_plain(recipe, sources, calibration, writer, folder, plain_head)
    fitting = {
        "head": head_note, "loss": losses, "loss_by_source": by_source, "chosen": chosen,
    }  # fmt: skip
    return fitting, record


def _write_plain(
    recipe: Recipe,
    sources: Sequence[Source],
    calibration: Calibration,
    writer: CheckpointWriter,
    folder: RunFolder,
    head: Tensor,
) -> None:
    """Write the plain mean over the fitted model: nothing aligned, only its router fitted."""
    for name, first_row, rows in fused_tables(recipe, sources, [EMBEDDING], {}):
        writer.write(name, rows, first_row)
    writer.write(HEAD, head)
    names = [source.name for source in sources]
    for layer in range(sources[0].config.num_hidden_layers):
        plain = {s.name: aligned_layer(recipe, s, layer, s.read_layer(layer), {}) for s in sources}
        router = load_file(folder.layer_done(layer))["plain_router"]
        rows = router[[calibration.names.index(name) for name in names]]
        moe = replace(assemble_layer(recipe, sources, layer, plain), router=rows)
        for name, tensor in layer_outputs(sources[0].family, sources[0].config, layer, moe):
            writer.write(name, tensor)


def _whole_head(recipe: Recipe, sources: Sequence[Source], record: Record) -> Tensor:
    """The fused output head in one piece."""
    return torch.cat([rows for _, _, rows in fused_tables(recipe, sources, [HEAD], record)])


def _is_finished(done: Path, writer: CheckpointWriter, prefix: str, text: str) -> bool:
    """Whether an interrupted build has finished a layer: its record is whole, and what it says of
    the layer's tensors is on disk. RunFolderError where that build had other calibration text."""
    noted = _noted(done)
    if noted is None:
        return False
    if noted.get("text") != text:
        raise RunFolderError(
            f"{done.parent.parent}: the calibration text has changed since this build was begun; "
            "--overwrite it"
        )
    return noted.get("tensors") == writer.digest(prefix)


def _noted(path: Path) -> dict[str, str] | None:
    """What a record in `work/` says of itself; None where there is no whole record."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError:
        return None


def _write_manifest(
    folder: RunFolder,
    recipe: Recipe,
    tensor_hashes: Mapping[str, str],
    begun_with: Mapping[str, str],
) -> None:
    """Hashes of everything that was made and of what it was made from. `begun_with`: the versions
    of the software that the build was begun with, which it may not have ended with."""
    now = versions()
    folder.update_json(
        folder.manifest,
        {
            "versions": now,
            **({} if begun_with == now else {"begun_with": dict(begun_with)}),
            "sources": {name: spec.sha256 for name, spec in recipe.sources.items()},
            "files": {
                folder.alignment.name: sha256_of(folder.alignment),
                **hash_folder(folder.staged_checkpoint),
            },
            "tensors": {"checkpoint": dict(tensor_hashes)},
        },
    )


def compare(
    recipe: Recipe,
    variants: Mapping[str, Mapping[int, Recipe]],
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> tuple[CompareFolder, list[dict[str, Any]], dict[str, float | None]]:
    """The same sources and text by several methods and seeds, each the whole way in a process of
    its own, into one table: (where, the rows of `comparison.json`, the specialists' losses).
    `variants`: method -> seed -> recipe (`recipe.load_variants`).

    What is finished is kept with `resume`, and what was cut short goes on. Refuses (SymphonyError)
    what any of the methods cannot build before the first begins, and to tabulate runs that differ
    in sources, text, order of batches or number of trained tokens.
    """
    recipes = _by_name(variants)
    for (method, seed), one in recipes.items():
        if overwrite or not CompareFolder(out).run(method, seed).trained.is_dir():
            with _naming(method):
                refuse_untrainable(one)
    folder = prepare_comparison(recipe, variants, out, resume=resume, overwrite=overwrite)
    names = list(recipes)
    for number, name in enumerate(names, start=1):
        log.info("%d of %d: %s, seed %d", number, len(names), *name)
        _adopt_build(folder, names[: number - 1], name, recipes[name])
        _run_apart(folder.run(*name), folder.recipe(*name), folder.run(*names[0]))
    runs = {name: folder.run(*name) for name in names}
    metrics = {name: run.read_json(run.metrics) for name, run in runs.items()}
    manifests = {name: run.read_json(run.manifest) for name, run in runs.items()}
    for name, of_run in metrics.items():
        _refuse_other_training(runs[name], of_run["training"], recipes[name].train)
    refuse_different(metrics, manifests)
    entries = entries_of(metrics, list(recipe.sources))
    reference = recipe.compare.reference
    reference = reference if reference in variants else next(iter(variants))
    mark_reached(entries, reference)
    limits = limits_of(metrics, list(recipe.sources))
    write_text(folder.comparison, to_json(entries, indent=2) + "\n")
    settings = {
        method: recipe.compare.variants.get(method, {"method": method}) for method in variants
    }
    page = render_comparison(
        title(recipe.sources),
        entries,
        limits,
        reference,
        comparison_facts([one.model_dump(mode="json") for one in recipes.values()]),
        settings,
        in_domain=list(recipe.sources),
    )
    write_text(folder.page, page)
    return folder, entries, limits


def prepare_comparison(
    recipe: Recipe,
    variants: Mapping[str, Mapping[int, Recipe]],
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> CompareFolder:
    """The folder of a comparison with the recipe of every run in it, nothing run yet. Refuses
    (SymphonyError) what `compare` refuses before it begins."""
    folder = CompareFolder(out)
    for method, of_seeds in variants.items():
        with _naming(method):
            plan(next(iter(of_seeds.values())))
    held_out_text(recipe, open_sources(recipe, download=False))
    named = _by_name(variants)
    runs = [folder.run(*name) for name in named]
    start_comparison(folder, runs, resume=resume, overwrite=overwrite)
    for name, one in named.items():
        _refuse_another_recipe(folder.run(*name), one)
    folder.recipes.mkdir(exist_ok=True)
    for name, one in named.items():
        write_text(folder.recipe(*name), one.to_yaml())
    return folder


def _by_name(variants: Mapping[str, Mapping[int, Recipe]]) -> dict[tuple[str, int], Recipe]:
    """(method, seed) -> recipe, in the order of the table."""
    return {(method, seed): one for method, of in variants.items() for seed, one in of.items()}


@contextmanager
def _naming(method: str) -> Iterator[None]:
    """What a method is refused for, with its name."""
    try:
        yield
    except SymphonyError as error:
        raise type(error)(f"{method}: {error} (--methods chooses what is compared)") from None


def _refuse_another_recipe(run: RunFolder, recipe: Recipe) -> None:
    """RunFolderError for a run that was begun by another recipe."""
    if run.recipe.is_file() and not _are_equal(run.read_recipe(), recipe):
        raise RunFolderError(f"{run.root}: was begun by another recipe; --overwrite begins again")


def _are_equal(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes are the same, whatever hashes their sources are pinned to."""
    return _without_hashes(one).to_yaml() == _without_hashes(other).to_yaml()


def _without_hashes(recipe: Recipe) -> Recipe:
    specs = {n: s.model_copy(update={"sha256": None}) for n, s in recipe.sources.items()}
    return recipe.model_copy(update={"sources": specs})


def _adopt_build(
    folder: CompareFolder,
    finished: Sequence[tuple[str, int]],
    name: tuple[str, int],
    recipe: Recipe,
) -> None:
    """Begin a run with the checkpoint of a finished one that has the same stage 1, where there is
    one: methods that differ in training only are built once."""
    run = folder.run(*name)
    if run.root.exists():
        return
    for one in finished:
        other = folder.run(*one)
        as_theirs = other.read_recipe().model_copy(update={"train": recipe.train})
        manifest = other.read_json(other.manifest)
        by_this = manifest["versions"] == versions() and "begun_with" not in manifest
        if _are_equal(as_theirs, recipe) and by_this:
            # Pinned to the sources that it was built of.
            adopt_build(run, other, as_theirs, plan(recipe).to_json())
            log.info("%s: built as %s", run.root.name, other.root.name)
            return


def _run_apart(run: RunFolder, recipe: Path, like: RunFolder) -> None:
    """The whole way in a process of its own, so that its peak of memory is its own and what kills
    it kills nothing else. `like`: the comparison's first run."""
    if run.report.is_file() and "trained" in run.read_json(run.metrics):
        return  # the report comes last; what is trained again has no losses yet
    same = [] if like == run else ["--sources-from", str(like.root)]
    command = [sys.executable, "-m", "symphony_moe", "run", str(recipe), "--out", str(run.root)]
    code = subprocess.run(
        [*command, "--resume", *same], stdout=subprocess.DEVNULL, check=False
    ).returncode
    if code:
        killed = f"was killed (signal {-code}; out of memory?)"
        raise RunFolderError(
            f"{run.root}: {killed if code < 0 else f'ended with {code}'}; what it said is above "
            f"and in {run.log.name}. Finished runs stay: --resume goes on from there"
        )


_OF_A_MACHINE = {
    "batch_size", "gradient_accumulation", "gradient_checkpointing", "checkpoints",
    "teacher_loading", "report_to",
}  # fmt: skip


def _refuse_other_training(run: RunFolder, training: Mapping[str, Any], settings: Train) -> None:
    """RunFolderError for a run that was trained with other settings than its recipe's, but for
    those that say how to compute and not what (a machine of several GPUs has its own)."""
    wanted = settings.model_dump(exclude=_OF_A_MACHINE)
    found = training.get("settings", {})
    for name in wanted.keys() & found.keys():
        if (value := found[name]) != wanted[name]:
            raise RunFolderError(
                f"{run.root}: was trained with {name} = {value}, not {wanted[name]} as its "
                "recipe here says; train it with that, or remove the folder and --resume"
            )
