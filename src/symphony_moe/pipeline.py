"""The main path: start reading here.

    recipe -> sources -> plan -> calibrate -> align -> fuse -> fit -> route -> write
           -> train -> evaluate -> report

Stages do not import one another (but for three exceptions that tests/test_layout.py names); only
this module knows their order. Fusing and routing are called from assemble.py and fit_layer.py. The
commands come first, then what a build is made of; `compare`, many runs, is at the end.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from symphony_moe.building.align import describe_alignment
from symphony_moe.building.build import (
    align_sources,
    begin_fit,
    build_layer,
    count_tokens,
    finish_fit,
    noted,
    refuse_beyond,
    write_manifest,
    write_tables,
)
from symphony_moe.building.calibrate import (
    aside_windows,
    calibration_windows,
)
from symphony_moe.building.companions import write_companions
from symphony_moe.building.plan import Plan, beyond_context, make_plan
from symphony_moe.building.verify import compare_builds, verify_run
from symphony_moe.errors import RecipeError, SymphonyError
from symphony_moe.evaluation.benchmarks import choose_models, load_tasks, run_tasks
from symphony_moe.evaluation.losses import (
    continuations,
    evaluate_run,
    held_out_text,
    losses_and_routing,
)
from symphony_moe.files import publish, write_bytes, write_text
from symphony_moe.machine import (
    peak_rss_bytes,
    process_number,
    release_freed_memory,
    versions,
)
from symphony_moe.model.checkpoint import CheckpointWriter
from symphony_moe.recipe.settings import Recipe, Train
from symphony_moe.reporting.run_page import render
from symphony_moe.runs.folder import (
    RunFolder,
    log_to,
    note_versions,
    refuse_existing,
    require_room,
    start_run,
)
from symphony_moe.runs.metrics import Metrics, read_metrics
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.source import Source, experts_of, remarks
from symphony_moe.text.documents import check_data_exists
from symphony_moe.text.windows import digest_of
from symphony_moe.training.run import refuse_no_text, refuse_untrainable, train_run

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
    refuse_beyond(recipe, sources)
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
        record = align_sources(recipe, sources, windows, aside, folder, text)
        if recipe.fits_layers:
            record |= count_tokens(windows, sources[0].config.vocab_size)
        writer = CheckpointWriter(
            folder.staged_checkpoint, planned.tensors, planned.dtype, recipe.output.max_shard_bytes
        )
        write_tables(recipe, sources, record, writer, planned.tensors)
        calibration = begin_fit(recipe, sources, record, windows, aside, folder)
        num_layers = sources[0].config.num_hidden_layers
        for layer in range(num_layers):
            build_layer(recipe, sources, layer, record, calibration, writer, folder, text)
            release_freed_memory()
            seconds = time.monotonic() - started
            log.info("layer %d of %d, %.0f s", layer + 1, num_layers, seconds)
        fitting: dict[str, Any] = {}
        if calibration is not None:
            fitting["layers"] = [
                json.loads((noted(folder.layer_done(layer)) or {})["note"])
                for layer in range(num_layers)
            ]
            if recipe.fits_layers:
                more, record = finish_fit(recipe, sources, record, calibration, writer, folder)
                fitting |= more

        tensor_hashes = writer.finish()
        write_companions(folder.staged_checkpoint, planned, recipe, sources)
        write_bytes(folder.alignment, save(record))
        folder.update_json(
            folder.metrics,
            {
                "alignment": describe_alignment(record),
                **({"fit": fitting} if fitting else {}),
                "timing": {
                    "build_seconds": round(time.monotonic() - started, 2),
                    "build_peak_rss_bytes": peak_rss_bytes(),
                    "calibration_tokens": sum(
                        text.windows.numel() for text in (*windows.values(), *aside.values())
                    ),
                },
            },
        )
        write_manifest(folder, recipe, tensor_hashes, begun_with)
        publish(folder.staged_checkpoint, folder.checkpoint)
        shutil.rmtree(folder.work)
        log.info("built %s", folder.checkpoint)
    return folder


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
        return evaluate_run(folder, recipe, sources, like).to_json()


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
    recipe = folder.read_recipe()
    folder.require_checkpoint()
    metrics = read_metrics(folder)
    html = render(metrics, folder.read_json(folder.plan), _as_trained(recipe, metrics))
    write_text(folder.report, html)
    return folder.report


def _as_trained(recipe: Recipe, metrics: Metrics) -> Recipe:
    """The recipe with the settings that the training had: it may have had some of its own."""
    settings = metrics.training.settings if metrics.training else {}
    known = {name: value for name, value in settings.items() if name in Train.model_fields}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=known)})


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
