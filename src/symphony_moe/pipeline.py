"""The main path: start reading here.

    recipe -> sources -> plan -> calibrate -> align -> fuse -> fit -> route -> write
           -> train -> evaluate -> report

A function for each command. A stage that one command alone runs is imported inside its function,
so that a build does not wait for the Trainer. The steps of a build are numbered in
building/build.py, those of a training in training/run.py; `compare`, many runs, is in
comparison.py. A folder knows only those before it (tests/test_layout.py).
"""

import dataclasses
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from symphony_moe.building.alike import refuse_alike, say_alike
from symphony_moe.building.build import Build, CalibrationText, refuse_beyond
from symphony_moe.building.estimate import beyond_memory, measure_speed
from symphony_moe.building.kept import KeptModel
from symphony_moe.building.place_layers import place_layers
from symphony_moe.building.plan import Plan, adapter_notes, beyond_context, make_plan
from symphony_moe.errors import RecipeError, RunFolderError, SymphonyError
from symphony_moe.files import FileHasher, locked, to_json, write_text
from symphony_moe.machine import (
    process_number,
    versions,
)
from symphony_moe.model.layer import device
from symphony_moe.processes import ALONE, Processes
from symphony_moe.progress import Listener, ignore
from symphony_moe.recipe.changes import (
    refuse_concatenated,
    refuse_not_new,
    refuse_not_removable,
    refuse_sliced,
    refuse_too_few,
    with_source,
    without_source,
)
from symphony_moe.recipe.settings import Data, Recipe, Train
from symphony_moe.runs.folder import (
    RunFolder,
    log_to,
    logged_warnings,
    note_versions,
    refuse_existing,
    require_room,
    start_run,
)
from symphony_moe.runs.metrics import Metrics, read_metrics
from symphony_moe.runs.samples import read_samples
from symphony_moe.sources.kinship import beyond_averaging, likeness_to_anchor
from symphony_moe.sources.opening import (
    are_here,
    open_sources,
    refuse_changed,
    refuse_touched,
)
from symphony_moe.sources.provenance import CARD
from symphony_moe.sources.shapes import of_one_shape, shallow
from symphony_moe.sources.source import FileStates, Source, anchor_of, experts_of
from symphony_moe.text.documents import check_data_exists
from symphony_moe.text.texts import Texts
from symphony_moe.training.refusals import refuse_untrainable
from symphony_moe.training_cost import TrainingCost
from symphony_moe.uploading import (
    MAIN,
    Upload,
    checked_files,
    describe_upload,
    model_folder,
    refuse_name,
    send,
    token_of_user,
)

log = logging.getLogger(__name__)

Hashes = Mapping[str, Mapping[str, Future[str]]]
"""Source -> file -> SHA-256, once it is known."""


def plan(recipe: Recipe, *, memory: int | None = None) -> Plan:
    """What a build of this recipe will do, from headers, tokenizers and a few rows of the weights
    that are here. Writes nothing. `memory`: see `build`.

    Raises SymphonyError for everything that `build` refuses before it reads weights: RecipeError,
    SourceError, SourceMismatch or TextError.

    >>> from symphony_moe import load_recipe, plan
    >>> planned = plan(load_recipe("recipe.yaml"))
    >>> planned.architecture
    'mixtral'
    >>> planned.active_parameters <= planned.total_parameters
    True
    """
    _refuse_changed_run(recipe)
    _check_text(recipe)
    opened = open_sources(recipe, download=False)
    Texts(recipe, opened).refuse_unreadable()
    return _plan(recipe, opened, memory)


def _plan(recipe: Recipe, opened: Sequence[Source], memory: int | None) -> Plan:
    experts = experts_of(recipe, opened)
    planned = make_plan(recipe, experts, opened, memory)
    refuse_alike(recipe, experts)
    cosines = likeness_to_anchor(_read_by(recipe, experts), recipe.anchor)
    cost = TrainingCost.of(planned, recipe, experts)
    warned = [beyond_averaging(recipe, cosines), *planned.warnings, cost.beyond_memory()]
    try:
        refuse_untrainable(recipe, planned.architecture)
    except SymphonyError as error:  # a build alone does not mind, nor another machine
        warned.append(f"`symphony train` stops here: {error}")
    return dataclasses.replace(
        planned,
        likeness=cosines,
        warnings=[sentence for sentence in warned if sentence],
        training_peak_memory_bytes=cost.peak_bytes,
        training_seconds=cost.seconds,
    )


def run(  # noqa: PLR0913 (all but two are keywords)
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    memory: int | None = None,
    like: RunFolder | None = None,
    progress: Listener = ignore,
) -> RunFolder:
    """The whole way: build (`memory`: see there), verify, train, evaluate (`like`: see there),
    report.

    `resume` goes on where a run was cut short, `overwrite` replaces it. `progress` is called after
    each step. What a later stage would refuse is refused before the first begins. Raises
    SymphonyError as the stages do.

    >>> from symphony_moe import load_recipe, run
    >>> finished = run(load_recipe("recipe.yaml"), "whole", progress=print)  # doctest: +ELLIPSIS
    Progress(stage='align', done=1, total=2, tokens=0)
    ...
    Progress(stage='evaluate', done=4, total=4, tokens=0)
    >>> finished.trained.is_dir(), finished.report.is_file()
    (True, True)
    """
    _refuse_changed_run(recipe)
    out = Path(out)
    is_to_train = overwrite or not RunFolder(out).trained.is_dir()
    if is_to_train:
        refuse_untrainable(recipe)  # before models are looked for
    sources = open_sources(recipe, download=False)
    if is_to_train:
        refuse_untrainable(recipe, anchor_of(recipe, sources).family.moe)
    texts = Texts(recipe, sources)
    texts.held_out_text()
    if is_to_train:
        texts.refuse_short_training_text()
        experts = experts_of(recipe, sources)
        _warn_of_memory(TrainingCost.of(make_plan(recipe, experts), recipe, experts))
    folder = build(
        recipe,
        out,
        resume=resume,
        overwrite=overwrite,
        memory=memory,
        texts=texts,
        progress=progress,
    )
    verify(folder)
    if not folder.trained.is_dir() or (resume and folder.training_begun.is_file()):
        train(folder, resume=resume, texts=texts, progress=progress)
    evaluate(folder, like=like, texts=texts, progress=progress)
    report(folder)
    return folder


def build(  # noqa: PLR0913 (all but two are keywords)
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    memory: int | None = None,
    texts: Texts | None = None,
    progress: Listener = ignore,
    processes: Processes = ALONE,
) -> RunFolder:
    """Stage 1: sources to `checkpoint/`, layer by layer, without training.

    `resume` goes on where a build was cut short, `overwrite` replaces a run. `memory`: the bytes
    that it may take. Where the plan is beyond, the residual streams wait in files; the result is
    the same. Without it up to 2 GiB of them wait in memory. `texts`: what the caller has read
    already. `progress` is called after each layer. `processes`: this one among those that share
    the text (`processes.together`); all of them call this. Raises SymphonyError for what
    cannot be built, before the run folder is made: RecipeError, SourceError, SourceMismatch,
    TextError, or RunFolderError where `out` exists.

    >>> from symphony_moe import build, load_recipe
    >>> built = build(load_recipe("recipe.yaml"), "run")
    >>> built.checkpoint.is_dir()
    True
    """
    _refuse_changed_run(recipe)
    asked = _Asked(recipe, Path(out), resume, overwrite, memory, texts, progress, processes)
    return _build(asked)


def add(  # noqa: PLR0913 (all but three are keywords)
    folder: RunFolder,
    name: str,
    out: str | Path,
    *,
    model: str,
    data: Data,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Listener = ignore,
) -> RunFolder:
    """A run with one expert more than a finished one has: a new run folder, `out`, whose
    `checkpoint/` has the backbone and the experts of the old run's model (the trained one, where
    there is one), byte for byte, and one expert made of `model`. The old run is not touched.

    `model`, `data`: as a recipe has them. `overrides`: other settings of the source, as
    `sources.NAME.column=messages`, and `router.top_k`. The others: see `build`. Raises
    SymphonyError for what cannot be added, before the run folder is made, and as `build` does.

    >>> from pathlib import Path
    >>> from symphony_moe import RunFolder, add
    >>> more = add(RunFolder(Path("run")), "again", "more", model="models/b", data="b.jsonl")
    >>> more.read_recipe().expert_names
    ['a', 'b', 'again']
    """
    refuse_not_new(folder.read_finished(), name)
    spec = {"model": model, "data": data}
    asked = _Change(folder, name, Path(out), resume, overwrite, progress)
    return _change(asked, spec, overrides)


def remove(  # noqa: PLR0913 (all but three are keywords)
    folder: RunFolder,
    name: str,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Listener = ignore,
) -> RunFolder:
    """A run without one of the experts of a finished one, in a new run folder. Everything else is
    that run's, byte for byte: see `add`. `overrides`: `router.top_k`, where fewer experts are left
    than a token has. Raises SymphonyError as `add` does.

    >>> from pathlib import Path
    >>> from symphony_moe import RunFolder, remove
    >>> remove(RunFolder(Path("more")), "again", "less").read_recipe().expert_names
    ['a', 'b']
    """
    recipe = folder.read_finished()
    refuse_not_removable(recipe, name, "remove")
    refuse_too_few(recipe, name)
    asked = _Change(folder, name, Path(out), resume, overwrite, progress)
    return _change(asked, None, overrides)


def replace(  # noqa: PLR0913 (all but three are keywords)
    folder: RunFolder,
    name: str,
    out: str | Path,
    *,
    model: str,
    data: Data,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Listener = ignore,
) -> RunFolder:
    """A run with another model in the place of an expert of a finished one, in a new run folder:
    see `add`. Raises SymphonyError as `add` does.

    >>> from pathlib import Path
    >>> from symphony_moe import RunFolder, replace
    >>> other = replace(RunFolder(Path("run")), "b", "other", model="models/b", data="b.jsonl")
    >>> other.read_recipe().expert_names
    ['a', 'b']
    """
    refuse_not_removable(folder.read_finished(), name, "replace")
    spec = {"model": model, "data": data}
    asked = _Change(folder, name, Path(out), resume, overwrite, progress)
    return _change(asked, spec, overrides)


@dataclass(frozen=True)
class _Change:
    """What is asked of a change of experts."""

    old: RunFolder
    name: str
    out: Path
    resume: bool
    overwrite: bool
    progress: Listener


def _change(asked: _Change, spec: Mapping[str, Any] | None, overrides: Sequence[str]) -> RunFolder:
    """A new run with an expert of an old one's changed. `spec`: of its source; None where it is
    left out."""
    old, name = asked.old.read_recipe(), asked.name
    refuse_concatenated(old, name)
    refuse_sliced(old, name)
    _refuse_inside(asked.old.root, asked.out)
    refuse_existing(asked.out, resume=asked.resume, overwrite=asked.overwrite)
    kept = KeptModel.of(asked.old)
    removed = name if name in old.sources else None
    if spec is None:
        recipe = without_source(old, name, overrides, kept.parent(added=None, removed=removed))
    else:
        parent = kept.parent(added=name, removed=removed)
        recipe = with_source(old, name, spec, overrides, parent)
    return _build(
        _Asked(
            recipe,
            asked.out,
            asked.resume,
            asked.overwrite,
            progress=asked.progress,
            kept=kept,
        )
    )


def _refuse_inside(old: Path, out: Path) -> None:
    """RunFolderError where a new run would be written over or into the one that it comes of."""
    old, new = old.resolve(), out.resolve()
    if old == new or old in new.parents or new in old.parents:
        raise RunFolderError(
            f"{out}: is in the old run, or holds it ({old}), which is left as it is; choose an "
            "--out beside it"
        )


def _refuse_changed_run(recipe: Recipe) -> None:
    """RecipeError for the recipe of a run that came of another one: no build makes it again."""
    if recipe.parent is not None:
        raise RecipeError(
            "parent: this recipe is of a run that `symphony add`, `remove` or `replace` made of "
            "another one. To build anew with the same sources, take `parent` out of the recipe"
        )


@dataclass(frozen=True)
class _Asked:
    """What is asked of a build: see there."""

    recipe: Recipe
    out: Path
    resume: bool = False
    overwrite: bool = False
    memory: int | None = None
    texts: Texts | None = None
    progress: Listener = ignore
    processes: Processes = ALONE
    kept: KeptModel | None = None
    """The model whose experts are changed; None: all is made."""


def _build(asked: _Asked) -> RunFolder:
    out, processes, started = asked.out, asked.processes, time.monotonic()
    how = {"resume": asked.resume, "overwrite": asked.overwrite}
    # The first of several processes alone reads and writes what is in the run folder.
    if processes.is_first:
        refuse_existing(out, **how)
    recorded = _recorded(asked) if processes.is_first else None
    ready = _prepare(asked.recipe, asked.memory, asked.texts, processes, recorded)
    if asked.kept is not None:
        asked.kept.refuse_other_shape(ready.planned.config)
    folder = RunFolder(out)
    if processes.is_first:
        folder = _begin(ready, out, **how)
    if processes.agree(processes.is_first and folder.checkpoint.is_dir()):
        log.info("%s is finished already", folder.checkpoint)
        return folder
    parts = (ready.recipe, ready.sources, ready.planned, ready.text, folder, processes)
    whole = Build(*parts, asked.kept)

    def refuse_touched() -> None:
        ready.refuse_touched()
        if asked.kept is not None:
            asked.kept.refuse_touched()

    with log_to(folder) if processes.is_first else nullcontext():
        begun_with = _note(ready, whole, asked.memory) if processes.is_first else {}
        whole.run(begun_with, started, asked.progress, refuse_touched)
    return folder


@dataclass(frozen=True)
class _Ready:
    """What a build needs, read and checked."""

    recipe: Recipe
    """With the hashes of the sources' files."""
    opened: Sequence[Source]
    states: Mapping[str, FileStates]
    """Source -> its files as they were hashed."""
    planned: Plan
    text: CalibrationText

    @property
    def sources(self) -> Sequence[Source]:
        """Those that become experts."""
        return experts_of(self.recipe, self.opened)

    def refuse_touched(self) -> None:
        """Raise SourceError where a file is not as it was hashed."""
        for source in self.opened:
            hashes = self.recipe.sources[source.name].sha256 or {}
            refuse_touched(source, self.states[source.name], hashes)


def _prepare(
    recipe: Recipe,
    memory: int | None,
    texts: Texts | None,
    processes: Processes,
    recorded: Recipe | None = None,
) -> _Ready:
    """Open the sources, plan, and read the text, while the sources are hashed. `recorded`: the
    recipe of the build that is taken up, if any."""
    _check_text(recipe)
    if not processes.is_first_here:
        processes.wait()  # the first of a machine fetches and converts for the others
    opened = open_sources(recipe, download=False)
    with FileHasher() as hasher:
        if not are_here(recipe):
            _plan(recipe, opened, memory)  # before weights are fetched
            opened = open_sources(recipe)
        if processes.is_first_here:
            measure_speed(recipe, opened[0].config)  # the others wait, and nothing is hashed yet
            processes.wait()
        states = {source.name: source.file_states() for source in opened}
        read = _read_by(recipe, opened)
        hashes = _begin_hashing(read if processes.is_first_here else [], hasher)
        planned = _plan(recipe, opened, memory)
        if processes.is_first:
            made = {source.name for source in read}
            refuse_beyond(recipe, [s for s in experts_of(recipe, opened) if s.name in made])
        texts = Texts.of(recipe, opened, texts)
        text = CalibrationText({}, {})
        if recipe.needs_calibration:
            text = CalibrationText(texts.calibration_windows(), texts.validation_windows())
        if shallow(recipe, opened):
            recipe, opened = _with_places(recipe, opened, text, processes, recorded)
            planned = _plan(recipe, opened, memory)
        if processes.is_first_here:
            recipe = _with_hashes(recipe, read, hashes)
    _refuse_different(recipe, text, processes)
    return _Ready(recipe, opened, states, planned, text)


def _recorded(asked: _Asked) -> Recipe | None:
    """The recipe of a build that is taken up, where it may say more than the one that is asked
    for."""
    if not (asked.resume and asked.recipe.widens):
        return None
    try:
        return RunFolder(asked.out).read_recipe()
    except SymphonyError:  # none, or not a recipe any more
        return None


def _with_places(
    recipe: Recipe,
    opened: Sequence[Source],
    text: CalibrationText,
    processes: Processes,
    recorded: Recipe | None,
) -> tuple[Recipe, list[Source]]:
    """The recipe with places for the layers of sources that have fewer than others, and the sources
    with their layers there: as an interrupted build has `recorded` them; by the calibration text;
    or, where there is none, evenly."""
    found: dict[str, list[int | None]] = {}
    if processes.is_first:
        known = {} if recorded is None else recorded.layers_of(recipe)
        found = known or place_layers(
            recipe, opened, [each.windows for each in text.fitted.values()]
        )
    added = -1  # None has no place in a tensor
    numbers = {
        name: torch.tensor([added if at is None else at for at in layers])
        for name, layers in found.items()
    }
    shared = processes.share(numbers)
    recipe = recipe.with_layers(
        {
            name: [None if at == added else at for at in layers.tolist()]
            for name, layers in shared.items()
        }
    )
    return recipe, of_one_shape(recipe, opened)


def _read_by(recipe: Recipe, opened: Sequence[Source]) -> Sequence[Source]:
    """The sources whose weights are read: all, but of a change of experts the anchor and the
    newcomer. The others are as they are pinned, or `verify` says so."""
    if recipe.parent is None:
        return opened
    return [source for source in opened if source.name in (recipe.anchor, recipe.newcomer)]


def _refuse_different(recipe: Recipe, text: CalibrationText, processes: Processes) -> None:
    """Raise RecipeError in a process that would build something else than the first one. Files are
    hashed by one process of each machine."""
    if processes.count == 1:
        return
    bare = {name: spec.model_copy(update={"sha256": None}) for name, spec in recipe.sources.items()}
    facts = {
        "recipe": sha256(
            recipe.model_copy(update={"sources": bare}).to_yaml().encode()
        ).hexdigest(),
        "calibration text": text.digest,
        "software": to_json(versions()),
        "place to compute": device().type,
    }
    for name, spec in recipe.sources.items() if processes.is_first_here else ():
        facts[f"source {name}"] = sha256(to_json(spec.sha256).encode()).hexdigest()
    processes.refuse_different(facts)
    processes.wait()  # nothing is made, and nothing overwritten, before all have agreed


def _begin(ready: _Ready, out: Path, *, resume: bool, overwrite: bool) -> RunFolder:
    """Make the run folder, or take up one that is there."""
    planned = ready.planned
    if overwrite or not RunFolder(out).checkpoint.is_dir():
        require_room(out, planned.disk_bytes + planned.work_bytes, planned.work_bytes)
    folder = start_run(out, ready.recipe, resume=resume, overwrite=overwrite)
    if folder.checkpoint.is_dir() and not folder.training_begun.is_file():
        shutil.rmtree(folder.work)  # nothing that a training could go on from
    return folder


def _note(ready: _Ready, whole: Build, memory: int | None) -> dict[str, str]:
    """Write down the plan, and say what there is to say; the versions of the software that the
    build was begun with."""
    folder, planned = whole.folder, ready.planned
    now = versions() | whole.arithmetic
    begun_with = note_versions(folder.begun_with, now, "this build")
    _warn_beyond_context(ready.recipe, ready.opened, "calibration")
    folder.update_json(folder.plan, planned.to_json())
    notes = [str(found) for found in planned.differences if found.verdict == "warning"]
    for source in ready.opened:
        notes += [*source.remarks, *adapter_notes(ready.recipe, source)]
    for note in (*notes, *say_alike(ready.recipe, ready.sources)):
        log.warning("%s", note)
    if apart := beyond_averaging(ready.recipe, planned.likeness):
        log.warning("%s", apart)
    if short := beyond_memory(ready.recipe, whole.anchor.config, len(ready.sources), memory):
        log.warning("%s", short)
    return begun_with


def verify(
    folder: RunFolder, *, deep: bool = False, parent: RunFolder | None = None
) -> dict[str, str]:
    """Check a finished run against its manifest, its sources and stock `transformers`; `deep`
    builds it a second time and compares every tensor. `parent`: of a run that came by `add`,
    `remove` or `replace` the old run, where that is not beside it any more.

    Returns what each check has found. Raises VerificationError for a check that fails, and
    RunFolderError where there is no finished build.

    >>> from pathlib import Path
    >>> from symphony_moe import RunFolder, verify
    >>> verify(RunFolder(Path("run")))["sources"]
    "hashes equal the recipe's"
    """
    from symphony_moe.building.verify import (
        compare_builds,
        refuse_several_processes,
        verify_run,
    )

    recipe = folder.read_recipe()
    folder.require_checkpoint()
    if deep:
        refuse_several_processes(folder)
    kept, found = _find_kept(folder, recipe, parent, needed=deep)
    sources = experts_of(recipe, open_sources(recipe))
    checks = verify_run(folder, recipe, sources, make_plan(recipe, sources), kept)
    if deep:
        with tempfile.TemporaryDirectory(prefix="verify-", dir=folder.root) as again:
            rebuilt = _build(_Asked(recipe, Path(again) / "run", kept=kept))
            checks["rebuilt"] = compare_builds(folder, rebuilt)
    return {**found, **checks}


def _find_kept(
    folder: RunFolder, recipe: Recipe, parent: RunFolder | None, *, needed: bool
) -> tuple[KeptModel | None, dict[str, str]]:
    """What a run that came by a change of experts has kept, and what is said of it. Raises
    RunFolderError where it is not found and asked for (`needed`, or `parent`)."""
    if recipe.parent is None:
        if parent is not None:
            raise RunFolderError(f"{folder.root}: was built, and did not come of another run")
        return None, {}
    try:
        kept = KeptModel.find(folder, recipe, parent)
    except SymphonyError as error:
        if needed or parent is not None:
            raise
        said = f"what was kept of it is not compared with it ({error}); --parent DIR names it"
        log.warning("old run: %s", said)
        return None, {"old run": said}
    return kept, {"old run": "found, the model that this run came of"}


def train(
    folder: RunFolder,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    texts: Texts | None = None,
    progress: Listener = ignore,
) -> None:
    """Stage 2: `checkpoint/` to `trained/`. `overrides` may change the recipe's `train`.

    `resume` goes on where a training was cut short, `overwrite` trains again. `texts`: what the
    caller has read already. `progress` is called after each step. Raises RecipeError for other
    overrides, RunFolderError where there is no finished build, where `trained/` exists or where the
    loss diverges.

    >>> from pathlib import Path
    >>> from symphony_moe import RunFolder, train
    >>> trained = RunFolder(Path("run"))
    >>> train(trained, ["train.learning_rate=5e-4"])
    >>> trained.trained.is_dir()
    True
    """
    from symphony_moe.evaluation.losses import losses_and_routing
    from symphony_moe.training.run import train_run

    recipe = folder.read_recipe(overrides, sections=("train",))
    folder.require_checkpoint()
    with log_to(folder):
        sources = open_sources(recipe)
        texts = Texts.of(recipe, sources, texts)
        measure = None
        _warn_beyond_context(recipe, sources, "train")
        planned = folder.read_json(folder.plan)
        experts = experts_of(recipe, sources)
        _warn_of_memory(
            TrainingCost(recipe, experts, planned["tensors"], planned["active_parameters"])
        )
        if recipe.train.evaluations:
            windows = texts.held_out_text()

            def measure(model: Any) -> dict[str, float]:
                return losses_and_routing(model, windows)[0]

        train_run(
            folder,
            recipe,
            sources,
            resume=resume,
            overwrite=overwrite,
            measure=measure,
            texts=texts,
            progress=progress,
        )


def evaluate(
    folder: RunFolder,
    overrides: Sequence[str] = (),
    *,
    like: RunFolder | None = None,
    texts: Texts | None = None,
    progress: Listener = ignore,
) -> Metrics:
    """Held-out losses and routing of the sources, the built and the trained model, into
    `metrics.json`. `overrides` may change the recipe's `evaluation`. `like`: a run whose losses of
    the sources are taken over where they must be the same. `texts`: what the caller has read
    already.

    `progress` is called after each model. Returns what is written: losses are in nats per token, by
    model and domain. Raises RecipeError for other overrides, RunFolderError where there is no
    finished build, TextError for a domain without held-out text.

    >>> from pathlib import Path
    >>> from symphony_moe import RunFolder, evaluate
    >>> metrics = evaluate(RunFolder(Path("run")), ["evaluation.tokens=128"])
    >>> sorted(metrics.trained)
    ['a', 'b', 'other']
    """
    from symphony_moe.evaluation.losses import evaluate_run

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
        return evaluate_run(folder, recipe, sources, like, texts, progress)


def evaluate_tasks(  # noqa: PLR0913 (all but two are keywords, as the command has them)
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
    from symphony_moe.evaluation.benchmarks import (
        TaskOptions,
        choose_models,
        load_tasks,
        run_tasks,
    )

    recipe = folder.read_recipe()
    folder.require_checkpoint()
    chosen = choose_models(folder, recipe, models)
    with log_to(folder):
        loaded = load_tasks(tasks, include, unsafe_code=unsafe_code)
        # A run's own models need none of them.
        sources = open_sources(recipe) if set(chosen) & set(recipe.sources) else []
        options = TaskOptions(limit, chat_template, unsafe_code)
        return run_tasks(folder, sources, chosen, loaded, options)


def generate(folder: RunFolder) -> list[tuple[str, str, str]]:
    """(domain, prompt, continuation) by the run's model, for prompts from held-out text."""
    from symphony_moe.evaluation.losses import continuations

    recipe = folder.read_recipe()
    return continuations(folder, recipe, open_sources(recipe))


def report(folder: RunFolder) -> Path:
    """`metrics.json`, and what stands beside it, to one self-contained `report.html`, whose path is
    returned.

    Raises RunFolderError where there is no finished build, or a file of it is damaged.

    >>> from pathlib import Path
    >>> from symphony_moe import RunFolder, report
    >>> report(RunFolder(Path("run"))).name
    'report.html'
    """
    from symphony_moe.reporting.run_page import Beside, render

    recipe = folder.read_recipe()
    folder.require_checkpoint()
    metrics = read_metrics(folder)
    manifest = folder.read_json(folder.manifest)
    beside = Beside(read_samples(folder), manifest, logged_warnings(folder))
    html = render(metrics, folder.read_json(folder.plan), _as_trained(recipe, metrics), beside)
    write_text(folder.report, html)
    return folder.report


def push(
    folder: RunFolder,
    repo_id: str,
    *,
    private: bool = False,
    revision: str = MAIN,
    what: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Send a finished model to the hub, as `owner/name`, with a model card that has its losses.

    `private` makes a new repository private. `revision`: the branch. `what`: `checkpoint` or
    `trained`; without it the trained model, where there is one. `dry_run` sends nothing and says
    what would be sent. The token is the one of HF_TOKEN or of `hf auth login`. Everything goes in
    one commit, and nothing changes in the run folder. Returns what was sent (sizes in bytes), and
    where it is. Raises RecipeError for what is no `owner/name`, RunFolderError where there is no
    finished model or a file of it is not what the manifest says, and UploadError where the hub, or
    the way to it, refuses.

    >>> from pathlib import Path
    >>> from symphony_moe import RunFolder, push
    >>> planned = push(RunFolder(Path("run")), "someone/some-moe", dry_run=True)
    >>> planned.model, planned.url, "model.safetensors" in planned.files
    ('trained', None, True)
    """
    from symphony_moe.reporting.published_card import published_card

    refuse_name(repo_id)
    recipe, chosen = folder.read_recipe(), model_folder(folder, what)
    token = None if dry_run else token_of_user(repo_id)
    metrics = read_metrics(folder)
    with locked(folder.root):  # nobody trains it again meanwhile
        files = checked_files(folder, chosen)
        stage = "built" if chosen == folder.checkpoint else "trained"
        own = files[CARD].read_text(encoding="utf-8")
        card = published_card(own, repo_id, stage, recipe, metrics)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        sizes[CARD] = len(card.encode())
        upload = Upload(repo_id, revision, chosen.name, sizes, card)
        log.info("%s %s", "would send" if dry_run else "sending", describe_upload(upload))
        if not getattr(metrics, stage):
            log.warning("%s was not evaluated, and its card has no losses", chosen)
        return upload if token is None else send(upload, files, token, private=private)


def _as_trained(recipe: Recipe, metrics: Metrics) -> Recipe:
    """The recipe with the settings that the training had: it may have had some of its own."""
    settings = metrics.training.settings if metrics.training else {}
    known = {name: value for name, value in settings.items() if name in Train.model_fields}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=known)})


def _warn_of_memory(cost: TrainingCost) -> None:
    """Log that a training needs more memory than there is, before it, or a build, is begun."""
    if short := cost.beyond_memory():
        log.warning("%s", short)


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


def _begin_hashing(sources: Sequence[Source], hasher: FileHasher) -> Hashes:
    return {
        source.name: {file: hasher.submit(path) for file, path in source.files().items()}
        for source in sources
    }


def _with_hashes(recipe: Recipe, sources: Sequence[Source], hashes: Hashes) -> Recipe:
    """The recipe with every source pinned to the weights that it has now. Raises SourceError where
    it is pinned to others."""
    pinned = {}
    for source in sources:
        spec = recipe.sources[source.name]
        found = {file: digest.result() for file, digest in hashes[source.name].items()}
        if spec.sha256 is not None:
            refuse_changed(source, spec.sha256, found)
        pinned[source.name] = spec.model_copy(update={"sha256": found})
    return recipe.model_copy(update={"sources": {**recipe.sources, **pinned}})
