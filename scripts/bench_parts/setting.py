"""What every part is given: where it works, at which size, and its results so far."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_parts import models
from bench_parts.measuring import State, gpu_name, take


@dataclass(frozen=True)
class Setting:
    """One run of the bench."""

    home: Path
    """Where models and runs are made."""
    quick: bool
    """Tiny models: to try the bench, not to measure."""
    pairs: int
    """How often commands that are compared are run."""
    mergekit: bool
    """Whether mergekit-moe is measured beside this package."""

    @property
    def scale(self) -> str:
        """Which of a part's sizes fits: `quick`, `cpu` or `gpu`."""
        return "quick" if self.quick else "cpu" if gpu_name() is None else "gpu"

    def state(self, part: str) -> State:
        """The results of a part."""
        return State(self.home / "results" / f"{part}.json")

    def sources(self, shape: str, count: int, layers: int | None = None) -> dict[str, Any]:
        """See `models.sources`. In a quick bench all are tiny, of the same family."""
        size, *family = shape.split()
        shape = " ".join(["tiny" if self.quick else size, *family])
        return models.sources(self.home, shape, count, layers)

    def recipe(self, name: str, sources: Mapping[str, Any], **sections: Any) -> Path:
        """A recipe on disk."""
        path = self.home / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"sources": sources, **sections}, indent=1), encoding="utf-8")
        return path

    def text(self, tokens: int, sequence: int) -> dict[str, int]:
        """A recipe's `calibration`: little of it in a quick bench."""
        if self.quick:
            tokens, sequence = 1024, 64
        return {"tokens": tokens, "sequence_length": sequence}

    def run_folder(self, name: str) -> Path:
        """A folder for a run, which is not there yet."""
        folder = self.home / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder


def symphony(*arguments: str | Path) -> dict[str, Any]:
    """What a command of this package takes, in a process of its own."""
    return take([sys.executable, "-m", "symphony_moe", *arguments])


def build(recipe: Path, out: Path, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a build takes."""
    sets = [word for override in overrides for word in ("--set", override)]
    return symphony("build", recipe, "--out", out, "--overwrite", *sets)


def weights_of(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def ask(worker: str, **request: Any) -> dict[str, Any]:
    """What a worker (see `workers.py`) finds, in a process of its own. SystemExit with what it
    said, where it fails."""
    os.sync()
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "bench_parts.workers", worker, asked, answer],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(f"{worker} {request} failed:\n{done.stdout[-2000:]}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found
