"""Many runs of one recipe: by several methods and seeds, into one table."""

import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from symphony_moe.errors import RunFolderError, SymphonyError, shortened
from symphony_moe.files import to_json, write_text
from symphony_moe.machine import (
    versions,
)
from symphony_moe.pipeline import plan
from symphony_moe.progress import Listener, Progress, ignore
from symphony_moe.recipe.settings import Recipe, Train
from symphony_moe.reporting.comparison_page import comparison_facts, render_comparison
from symphony_moe.reporting.comparison_table import (
    Entry,
    entries_of,
    limits_of,
    mark_reached,
    refuse_different,
)
from symphony_moe.reporting.page import title
from symphony_moe.runs.comparison_folder import CompareFolder, start_comparison
from symphony_moe.runs.folder import RunFolder, adopt_build, what_differs
from symphony_moe.runs.metrics import Metrics, read_metrics
from symphony_moe.sources.opening import open_sources
from symphony_moe.text.texts import Texts
from symphony_moe.training.refusals import refuse_untrainable

log = logging.getLogger(__name__)


class Comparison(NamedTuple):
    """A finished comparison."""

    folder: CompareFolder
    entries: list[Entry]
    """The rows of `comparison.json`."""
    limits: dict[str, float | None]
    """The specialists' losses in and out of domain, as the reference's runs read them."""


def compare(
    recipe: Recipe,
    variants: Mapping[str, Mapping[int, Recipe]],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Listener = ignore,
) -> Comparison:
    """The same sources and text by several methods and seeds, each the whole way in a process of
    its own, into one table. `variants`: method -> seed -> recipe, see `load_variants`.

    What is finished is kept with `resume`, and what was cut short goes on. `progress` is called
    after each run. Refuses (SymphonyError) what any of the methods cannot build before the first
    begins, and to tabulate runs that differ in sources, text, order of batches or number of trained
    tokens. RunFolderError where a run fails; its log says why.

    >>> from symphony_moe import compare, load_variants
    >>> recipe, variants = load_variants("recipe.yaml", methods=["symphony", "btx"], seeds=[1])
    >>> comparison = compare(recipe, variants, "table")
    >>> [(row["method"], row["stage"]) for row in comparison.entries]
    [('symphony', 'built'), ('symphony', 'trained'), ('btx', 'built'), ('btx', 'trained')]
    """
    out = Path(out)
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
        progress(Progress("compare", number, len(names)))
    runs = {name: folder.run(*name) for name in names}
    metrics = {name: read_metrics(run) for name, run in runs.items()}
    manifests = {name: run.read_json(run.manifest) for name, run in runs.items()}
    for name, of_run in metrics.items():
        _refuse_other_training(runs[name], of_run, recipes[name].train)
    refuse_different(metrics, manifests)
    entries = entries_of(metrics, list(recipe.sources))
    reference = recipe.compare.reference
    reference = reference if reference in variants else next(iter(variants))
    mark_reached(entries, reference)
    limits = limits_of(read_as(reference, metrics, recipes), list(recipe.sources))
    write_text(folder.comparison, to_json(entries, indent=2) + "\n")
    settings = {
        method: recipe.compare.variants.get(method, {"method": method}) for method in variants
    }
    page = render_comparison(
        title(recipe.sources),
        entries,
        limits,
        reference,
        comparison_facts(list(recipes.values())),
        settings,
        in_domain=list(recipe.sources),
    )
    write_text(folder.page, page)
    return Comparison(folder, entries, limits)


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
    Texts(recipe, open_sources(recipe, download=False)).held_out_text()
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


def read_as(
    reference: str,
    metrics: Mapping[tuple[str, int], Metrics],
    recipes: Mapping[tuple[str, int], Recipe],
) -> dict[tuple[str, int], Metrics]:
    """The runs that give the sources' missing tokens the rows that the `reference` method's do. A
    source has other losses with other rows, so that those of all runs would have no mean."""
    method = {run: one.backbone.missing_tokens for run, one in recipes.items()}
    wanted = next(method[run] for run in metrics if run[0] == reference)
    return {run: found for run, found in metrics.items() if method[run] == wanted}


@contextmanager
def _naming(method: str) -> Iterator[None]:
    """What a method is refused for, with its name."""
    try:
        yield
    except SymphonyError as error:
        raise type(error)(f"{method}: {error} (--methods chooses what is compared)") from None


def _refuse_another_recipe(run: RunFolder, recipe: Recipe) -> None:
    """RunFolderError for a run that was begun by another recipe."""
    if run.recipe.is_file() and not run.read_recipe().builds_the_same(recipe):
        raise RunFolderError(
            f"{run.root}: was begun by another recipe{what_differs(run, recipe)}; --overwrite "
            "begins again"
        )


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
        others = manifest.keys() & {"begun_with", "processes"}
        by_this = manifest["versions"] == versions() and not others
        if as_theirs.builds_the_same(recipe) and by_this:
            # Pinned to the sources that it was built of.
            adopt_build(run, other, as_theirs, plan(recipe).to_json())
            log.info("%s: built as %s", run.root.name, other.root.name)
            return


def _run_apart(run: RunFolder, recipe: Path, like: RunFolder) -> None:
    """The whole way in a process of its own, so that its peak of memory is its own and what kills
    it kills nothing else. `like`: the comparison's first run."""
    if run.report.is_file() and read_metrics(run).trained:
        return  # the report comes last; what is trained again has no losses yet
    same = [] if like == run else ["--sources-from", str(like.root)]
    command = [sys.executable, "-m", "symphony_moe", "run", str(recipe), "--out", str(run.root)]
    # Where nobody listens to this process's log, nobody wants to hear that one's: what it says last
    # is quoted.
    heard = None if log.hasHandlers() else subprocess.PIPE
    done = subprocess.run(
        [*command, "--resume", *same],
        stdout=subprocess.DEVNULL,
        stderr=heard,
        check=False,
        text=True,
        errors="replace",
    )
    if done.returncode:
        code = done.returncode
        how = f"was killed (signal {-code}; out of memory?)" if code < 0 else f"ended with {code}"
        last = (done.stderr or "").strip().rpartition("\n")[2]
        where = f"it said: {shortened(last, 200)}" if last else "what it said is above"
        raise RunFolderError(
            f"{run.root}: {how}; {where}, and in {run.log.name}. Finished runs stay: --resume goes "
            "on from there"
        )


_OF_A_MACHINE = {
    "batch_size",
    "gradient_accumulation",
    "gradient_checkpointing",
    "checkpoints",
    "teacher_loading",
    "report_to",
}


def _refuse_other_training(run: RunFolder, metrics: Metrics, settings: Train) -> None:
    """RunFolderError for a run that was trained with other settings than its recipe's, but for
    those that say how to compute and not what (a machine of several GPUs has its own)."""
    wanted = settings.model_dump(exclude=_OF_A_MACHINE)
    found = metrics.training.settings if metrics.training else {}
    for name in wanted.keys() & found.keys():
        if (value := found[name]) != wanted[name]:
            raise RunFolderError(
                f"{run.root}: was trained with {name} = {value}, not {wanted[name]} as its "
                "recipe here says; train it with that, or remove the folder and --resume"
            )
