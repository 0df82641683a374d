"""The run folder: the one place that knows its names, and the rules that keep it trustworthy.

A run folder never mixes two builds, and nothing in it looks finished before it is: `checkpoint/`
and `trained/` each appear by one rename, and until then everything is under `work/`.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_moe.errors import RecipeError, RunFolderError, SymphonyError, if_mistyped
from symphony_moe.files import hash_folder, locked, publish, sync_folder, to_json, write_text
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.settings import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Names inside one run folder."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, with the sources' hashes."""
        return self.root / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """What was going to happen, as it was known before the build."""
        return self.root / "plan.json"

    @property
    def checkpoint(self) -> Path:
        """Stage 1's model. Whole where it exists."""
        return self.root / "checkpoint"

    @property
    def trained(self) -> Path:
        """Stage 2's model. Whole where it exists."""
        return self.root / "trained"

    @property
    def alignment(self) -> Path:
        """The maps that bring each source into the anchor's coordinates."""
        return self.root / "alignment.safetensors"

    @property
    def manifest(self) -> Path:
        """Versions of the software, and hashes of every tensor and file that was made."""
        return self.root / "manifest.json"

    @property
    def metrics(self) -> Path:
        """All that was measured."""
        return self.root / "metrics.json"

    @property
    def samples(self) -> Path:
        """Short held-out texts, with the expert that each token prefers."""
        return self.root / "samples.json"

    @property
    def report(self) -> Path:
        """The metrics as a page."""
        return self.root / "report.html"

    @property
    def log(self) -> Path:
        """What the commands said, with their times."""
        return self.root / "run.log"

    @property
    def work(self) -> Path:
        """Progress of a command that is under way."""
        return self.root / "work"

    @property
    def overwriting(self) -> Path:
        """Where it exists, everything else in the folder is of an old run and goes."""
        return self.work / "overwriting"

    @property
    def staged_checkpoint(self) -> Path:
        """`checkpoint/` while it is written."""
        return self.work / "checkpoint"

    @property
    def staged_trained(self) -> Path:
        """`trained/` while it is written."""
        return self.work / "trained"

    @property
    def begun_with(self) -> Path:
        """The versions of the software that a build was begun with."""
        return self.work / "versions.json"

    @property
    def training(self) -> Path:
        """The Trainer's own checkpoints."""
        return self.work / "training"

    @property
    def training_begun(self) -> Path:
        """What is trained with. Where it exists, a training is under way or was cut short."""
        return self.training / "settings.json"

    @property
    def training_begun_with(self) -> Path:
        """The versions of the software that a training was begun with."""
        return self.training / "versions.json"

    @property
    def logs(self) -> Path:
        """What TensorBoard reads, of all trainings."""
        return self.root / "logs"

    def owns(self, path: Path) -> bool:
        """Whether this package makes an entry of that name in the folder."""
        files = {
            self.recipe,
            self.plan,
            self.alignment,
            self.manifest,
            self.metrics,
            self.samples,
            self.report,
            self.log,
        }
        if path.is_symlink():
            return False
        if path.is_dir():
            folders = {self.checkpoint, self.trained, self.work, self.logs}
            return path in folders or path.name.startswith("verify-")
        return path in files or path.with_name(path.name.removesuffix(".tmp")) in files

    def layer_compared(self, layer: int) -> Path:
        """How a layer of every source compares with the anchor's."""
        return self.work / f"compared-{layer:04d}.safetensors"

    def layer_done(self, layer: int) -> Path:
        """What is to be remembered of a finished layer; where it exists, the layer's tensors are on
        disk."""
        return self.work / f"layer-{layer:04d}.safetensors"

    def read_recipe(self, overrides: Sequence[str] = (), sections: Sequence[str] = ()) -> Recipe:
        """The run's resolved recipe, with `a.b=c` overrides in the `sections` that may still
        change.

        Raises RunFolderError where this is no run folder, RecipeError for other overrides.
        """
        if not self.root.is_dir():
            is_file = self.root.exists()
            raise RunFolderError(
                f"{self.root}: {'is a file' if is_file else 'no such folder'}; expected a run "
                "folder, as `symphony build --out` makes one"
                f"{'' if is_file else if_mistyped(self.root)}"
            )
        if not self.recipe.is_file():
            raise RunFolderError(
                f"{self.root}: no recipe.yaml; is it a run folder of `symphony build`?"
            )
        for override in overrides:
            if override.split(".")[0] not in sections:
                raise RecipeError(
                    f"--set {override}: the model is built; what can change now is: "
                    f"{', '.join(sections) or 'nothing'}"
                )
        # Nobody wrote it by hand, so nobody need hear of old names in it.
        return load_recipe(self.recipe, overrides, of_run=True)

    def require_checkpoint(self) -> None:
        """RunFolderError unless stage 1 is finished."""
        if not self.checkpoint.is_dir() or self.overwriting.is_file():
            raise RunFolderError(
                f"{self.root}: no finished checkpoint/; run `symphony build RECIPE --out "
                f"{self.root}` (with --resume where a build was cut short)"
            )

    def read_finished(self) -> Recipe:
        """The recipe of a run whose experts can be changed. RunFolderError unless it is built, and
        trained to the end where a training was begun."""
        if not self.recipe.is_file() and any(self.root.glob("*/recipe.yaml")):
            raise RunFolderError(
                f"{self.root}: holds several runs, as `symphony compare` makes them; name one of "
                "the folders in it"
            )
        recipe = self.read_recipe()
        self.require_checkpoint()
        if self.training_begun.is_file():
            raise RunFolderError(
                f"{self.root}: a training is under way, or was cut short; `symphony train "
                f"{self.root} --resume` finishes it, --overwrite begins it again"
            )
        return recipe

    def read_json(self, path: Path) -> dict[str, Any]:
        """Content of one of the folder's JSON files. Raises RunFolderError where it is not there,
        not JSON, or not what a run writes there."""
        content = read_table(path)
        for key, kind in _HOLDS.get(path.name, {}).items():
            if not isinstance(content.get(key), kind):
                raise damaged(path, f"no {key} in it")
        return content

    def update_json(
        self, path: Path, values: Mapping[str, Any], forget: Sequence[str] = ()
    ) -> None:
        """Set some top-level keys of a JSON file, and remove others, by one rename."""
        content = self.read_json(path) if path.is_file() else {}
        content = {key: value for key, value in content.items() if key not in forget}
        write_text(path, to_json(content | dict(values), indent=2) + "\n")


def read_table(path: Path) -> dict[str, Any]:
    """Content of a JSON file that a run has written, see `RunFolder.read_json`."""
    if not path.is_file():
        raise RunFolderError(f"{path}: not there; the run has not come so far, or the file is lost")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a table, got {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    return content


_HOLDS: dict[str, dict[str, type]] = {
    "plan.json": {"architecture": str, "sources": list, "tensors": dict},
    "manifest.json": {"files": dict, "sources": dict, "tensors": dict, "versions": dict},
    "metrics.json": {"alignment": dict, "timing": dict},
    "samples.json": {"experts": list, "domains": dict},
}
"""What each of the files holds as soon as it is there."""


def damaged(path: Path, why: str) -> RunFolderError:
    """What is raised for a file that does not hold what a run has written there."""
    return RunFolderError(
        f"{path}: damaged, not the JSON of a run ({why}); put it back, or begin again with "
        "--overwrite"
    )


def refuse_existing(root: Path, *, resume: bool, overwrite: bool) -> None:
    """RunFolderError for a folder that is there already, unless `resume` or `overwrite` may use
    it."""
    run = RunFolder(root)
    if root.exists() and not root.is_dir():
        raise RunFolderError(f"{root}: exists and is not a folder")
    if not root.is_dir() or _is_hardly_begun(run):
        return
    if overwrite:
        # A user's own folder may well hold a recipe.yaml, beside models and data.
        begun = run.recipe.is_file() and (run.work.is_dir() or run.plan.is_file())
        foreign = sorted(path.name for path in root.iterdir() if not run.owns(path))
        if not begun:
            raise RunFolderError(f"{root}: not a run folder, so --overwrite leaves it alone")
        if foreign:
            raise RunFolderError(
                f"{root}: holds {', '.join(foreign[:3])}, which no run has made, so --overwrite "
                "leaves the folder alone; move that elsewhere"
            )
    elif not resume:
        raise RunFolderError(
            f"{root}: exists; choose another --out, or --resume a build that was cut short, or "
            "--overwrite it"
        )
    elif not run.recipe.is_file():
        raise RunFolderError(
            f"{root}: holds other things than a run (no recipe.yaml), so there is nothing to "
            "resume; choose another --out"
        )


def _is_hardly_begun(run: RunFolder) -> bool:
    """Whether a folder is empty, or holds no more than what a run makes before its recipe is
    there: nothing that anyone could lose."""
    return all(
        run.owns(path)
        and (not any(path.iterdir()) if path == run.work else path.name == "recipe.yaml.tmp")
        for path in run.root.iterdir()
    )


def require_room(root: Path, needed: int, passing: int) -> None:
    """RunFolderError where the disk under `root` has not `needed` bytes, `passing` of which are
    given back at the end; what an earlier build has taken there counts as room."""
    there = next(path for path in (root, *root.absolute().parents) if path.is_dir())
    taken = 0
    if there == root:
        taken = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    free = shutil.disk_usage(there).free + taken
    if needed > free:
        raise RunFolderError(
            f"{root}: the build needs {needed / 1e6:,.1f} MB ({passing / 1e6:,.1f} MB of it until "
            f"it ends), the disk has {free / 1e6:,.1f} MB free; make room or choose another --out"
        )


def _is_by(run: RunFolder, recipe: str) -> bool:
    """Whether a run was begun by this recipe (YAML), perhaps in the names of an earlier version."""
    if run.recipe.read_bytes() == recipe.encode():
        return True
    try:
        return run.read_recipe().to_yaml() == recipe
    except SymphonyError:  # not a recipe any more
        return False


def what_differs(run: RunFolder, recipe: Recipe) -> str:
    """The first few differences, where the run's recipe can be read."""
    try:
        found = recipe.differences(run.read_recipe())
    except SymphonyError:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" ({', '.join(found[:3])}{more})"


def start_run(root: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> RunFolder:
    """Make the folder of a new build, or take up one that was cut short.

    Raises RunFolderError for an existing folder, unless `resume` (and it holds the same recipe, or
    was cut short while it was overwritten) or `overwrite` (and it is a run folder: nothing else is
    ever deleted).
    """
    refuse_existing(root, resume=resume, overwrite=overwrite)
    run = RunFolder(root)
    text = recipe.to_yaml()
    if run.overwriting.is_file() or (overwrite and run.recipe.is_file()):
        with locked(root):
            _clear(run)
    elif run.recipe.is_file() and not _is_by(run, text):
        raise RunFolderError(
            f"{root}: holds a build of another recipe or of sources that have changed since"
            f"{what_differs(run, recipe)}; --overwrite it or choose another --out"
        )
    make_folder(run.work)
    write_text(run.recipe, text)
    run.overwriting.unlink(missing_ok=True)
    return run


def note_versions(path: Path, now: Mapping[str, str], what: str) -> dict[str, str]:
    """Write down the versions of the software that something is begun with, and return them. Where
    it was begun with others, that is logged, and those are returned."""
    if not path.is_file():
        write_text(path, json.dumps(dict(now), indent=2))
        return dict(now)
    begun: dict[str, str] = read_table(path)
    changed = [n for n in dict.fromkeys([*now, *begun]) if begun.get(n) != now.get(n)]
    if changed:
        then = ", ".join(f"{name} {begun.get(name, '(none)')}" for name in changed)
        today = ", ".join(f"{name} {now.get(name, '(none)')}" for name in changed)
        log.warning(
            "%s was begun with %s and goes on with %s: what the two compute differently is both in "
            "it; --overwrite begins again with one of them",
            what,
            then,
            today,
        )
    return begun


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises RunFolderError where the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be made: {error.strerror}; choose another folder"
        ) from None


def adopt_build(run: RunFolder, other: RunFolder, recipe: Recipe, plan: Mapping[str, Any]) -> None:
    """Make the folder of a build that would be `other`'s finished one once more (`recipe`, pinned
    to its sources, differs in what comes after stage 1 only), by copying. A kill in between leaves
    the folder of a build that was cut short."""
    run.work.mkdir(parents=True)
    write_text(run.recipe, recipe.to_yaml())
    run.update_json(run.plan, plan)
    copied = run.work / "copied"
    shutil.copytree(other.checkpoint, copied)
    manifest, metrics = other.read_json(other.manifest), other.read_json(other.metrics)
    shutil.copyfile(other.alignment, run.alignment)
    of_build: dict[str, Any] = {k: metrics[k] for k in ("alignment", "fit") if k in metrics}
    timing = ("build_seconds", "build_peak_rss_bytes", "calibration_tokens")
    of_build["timing"] = {key: metrics["timing"][key] for key in timing}
    run.update_json(run.metrics, of_build)
    run.update_json(run.manifest, manifest_of_build(manifest))
    publish(copied, run.checkpoint)


def manifest_of_build(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of stage 1, and not of a trained model."""
    files = {k: v for k, v in manifest["files"].items() if not k.startswith("trained/")}
    tensors = {k: v for k, v in manifest["tensors"].items() if k != "trained"}
    return {**manifest, "files": files, "tensors": tensors}


def _clear(run: RunFolder) -> None:
    """Remove an old run but for its recipe, so that a kill in between leaves nothing that looks
    finished, and leaves `overwriting`, by which whoever comes next goes on."""
    run.work.mkdir(exist_ok=True)
    write_text(run.overwriting, "")
    sync_folder(run.work)
    for finished in (run.checkpoint, run.trained):
        if finished.is_dir():
            retire(run, finished)
    for path in [*run.root.iterdir(), *run.work.iterdir()]:
        if path not in (run.work, run.recipe, run.overwriting):
            folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if folder else path.unlink()


def retire(run: RunFolder, finished: Path) -> None:
    """Take a finished folder away by one rename (into `work/`): half of it is never to be seen."""
    retired = run.work / f"old-{finished.name}"
    shutil.rmtree(retired, ignore_errors=True)
    finished.rename(retired)
    shutil.rmtree(retired)


def changed_files(folder: Path, expected: Mapping[str, str]) -> str | None:
    """What in a finished folder is not as the manifest lists it (`<folder's name>/<file>` ->
    SHA-256), in words; None where all is. Reads every file."""
    found = hash_folder(folder)
    listed = {
        name: digest for name, digest in expected.items() if name.startswith(folder.name + "/")
    }
    if found == listed:
        return None
    wrong = sorted(
        name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name)
    )

    def state(name: str) -> str:
        if name not in found:
            return "missing"
        return "changed" if name in listed else "not in the manifest"

    return "not what the manifest says: " + ", ".join(f"{n} ({state(n)})" for n in wrong)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: on a full disk the command says so itself."""


def logged_warnings(run: RunFolder) -> list[str]:
    """What the commands of a run have warned of, each once, in the order of the log. Of a warning
    of several lines the first; nothing where there is no log."""
    if not run.log.is_file():
        return []
    lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = (re.fullmatch(r"[\d-]{10} [\d:,]+ WARNING (.+)", line) for line in lines)
    return list(dict.fromkeys(line[1] for line in found if line))


@contextmanager
def log_to(run: RunFolder) -> Iterator[None]:
    """Append the package's log to `run.log` inside the block, and what ends it. The folder is this
    process's alone meanwhile: see `locked`. Levels and other handlers stay as they are: `run.log`
    has what the logger `symphony_moe` lets through."""
    with locked(run.root):
        handler = _LogFile(run.log, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package = logging.getLogger("symphony_moe")
        package.addHandler(handler)
        try:
            yield
        except Exception as error:
            words = str(error) or type(error).__name__
            handler.handle(package.makeRecord(package.name, logging.ERROR, "", 0, words, (), None))
            raise
        finally:
            package.removeHandler(handler)
            handler.close()
