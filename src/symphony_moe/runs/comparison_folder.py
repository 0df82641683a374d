"""The folder of a comparison: many run folders and one table."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from symphony_moe.errors import RunFolderError
from symphony_moe.files import locked, write_text
from symphony_moe.runs.folder import RunFolder, make_folder, refuse_existing


@dataclass(frozen=True)
class CompareFolder:
    """Names inside the folder of a comparison."""

    root: Path

    @property
    def comparison(self) -> Path:
        """The table, as JSON."""
        return self.root / "comparison.json"

    @property
    def page(self) -> Path:
        """The table and its curves, to look at."""
        return self.root / "comparison.html"

    def name(self, method: str, seed: int) -> str:
        """What the run of one method and seed is called."""
        return f"{method}-seed{seed}"

    def run(self, method: str, seed: int) -> RunFolder:
        """The run folder of one method and seed."""
        return RunFolder(self.root / self.name(method, seed))

    @property
    def recipes(self) -> Path:
        """Where the recipe of each run lies."""
        return self.root / "recipes"

    def recipe(self, method: str, seed: int) -> Path:
        """The recipe that it is made by."""
        return self.recipes / f"{self.name(method, seed)}.yaml"

    @property
    def overwriting(self) -> Path:
        """The names of the old runs that go, a line each, where `--overwrite` is under way."""
        return self.recipes / "overwriting"

    def owns(self, path: Path) -> bool:
        """Whether a comparison makes an entry of that name in the folder."""
        if path.is_dir():
            run = RunFolder(path)
            begun = run.recipe.is_file() or run.work.is_dir() or not any(path.iterdir())
            return path == self.recipes or begun
        return path.with_name(path.name.removesuffix(".tmp")) in (self.comparison, self.page)


def start_comparison(
    folder: CompareFolder, runs: Sequence[RunFolder], *, resume: bool, overwrite: bool
) -> None:
    """Make the folder of a comparison. With `overwrite`, `runs` are removed first, whole: a
    comparison that is cut short then goes on with `resume` and no old run in it.

    Raises RunFolderError for an existing folder, unless `resume`, or `overwrite` and everything in
    it is a comparison's.
    """
    root = folder.root
    if root.exists() and not root.is_dir():
        raise RunFolderError(f"{root}: exists and is not a folder")
    there = sorted(root.iterdir()) if root.is_dir() else []
    if there and not (resume or overwrite):
        raise RunFolderError(
            f"{root}: exists; --resume keeps what is finished there and goes on, --overwrite "
            "begins again; or choose another --out"
        )
    foreign = [path.name for path in there if not folder.owns(path)]
    if foreign and overwrite:
        raise RunFolderError(
            f"{root}: holds {', '.join(foreign[:3])}, which no comparison has made, so --overwrite "
            "leaves the folder alone; choose another --out, or move that elsewhere"
        )
    if overwrite:
        old = [run.root for run in runs if run.root.is_dir()]
        for run in old:
            refuse_existing(run, resume=False, overwrite=True)
        make_folder(folder.recipes)
        write_text(folder.overwriting, "\n".join(run.name for run in old))
    make_folder(root)
    if folder.overwriting.is_file():
        folder.comparison.unlink(missing_ok=True)
        folder.page.unlink(missing_ok=True)
        gone = folder.overwriting.read_text(encoding="utf-8").split("\n")
        retired = folder.recipes / "old"
        shutil.rmtree(retired, ignore_errors=True)
        retired.mkdir()
        for path in root.iterdir():
            if path.name in gone:
                with locked(path):
                    path.rename(retired / path.name)
        shutil.rmtree(retired)
        folder.overwriting.unlink()
