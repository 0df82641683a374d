"""Whenever a command is killed, `--resume` ends where an undisturbed command does.

A kill leaves what is on the disk at that moment. So one undisturbed run is watched, and before each
call that changes the disk all that is there is kept: as many folders as a kill could leave.
(tests/test_run_folder.py ends processes by SIGKILL at some of these places.)
"""

import builtins
import io
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from conftest import make_recipe
from symphony_moe.cli import main

Kept = dict[str, bytes | None]
"""Everything in a folder: path -> content (None for folders)."""

CALLS = [
    (os, name)
    for name in (
        "replace",
        "rename",
        "mkdir",
        "unlink",
        "rmdir",
        "fsync",
        "posix_fallocate",
        "open",
    )
    if hasattr(os, name)
] + [(builtins, "open"), (io, "open")]
"""What changes the disk, as pathlib, shutil and we call it."""
WRITERS = [(torch, "save"), (safetensors.torch, "save_file")]
"""Writers in other languages: a kill may leave the half of what they write."""


def keep(folder: Path) -> Kept:
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def put(kept: Kept, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in kept.items():
        if content is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


@contextmanager
def watching(folder: Path) -> Iterator[list[Kept]]:
    """Inside the block, all different states of a folder are added to the list."""
    watch = _Watch(folder)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, watch.watched(getattr(module, name)))
        for module, name in WRITERS:
            patch.setattr(module, name, watch.halved(getattr(module, name)))
        yield watch.states


class _Watch:
    """Looks at a folder around calls, and keeps its states."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: list[Kept] = []
        self.busy = False
        self.one_at_a_time = threading.RLock()
        """Files are written in threads too: none changes the disk while another one looks."""

    def look(self, half: Path | None = None) -> None:
        """`half`: a file that is kept as if its second half had not been written."""
        if self.busy or not self.folder.is_dir():
            return
        self.busy = True
        try:
            state = keep(self.folder)
            if half is not None and self.folder in half.parents:
                whole = state[str(half.relative_to(self.folder))]
                assert whole is not None
                state[str(half.relative_to(self.folder))] = whole[: len(whole) // 2]
            if not self.states or state != self.states[-1]:
                self.states.append(state)
        finally:
            self.busy = False

    def watched(self, call: Any) -> Any:
        def one(*arguments: Any, **options: Any) -> Any:
            with self.one_at_a_time:
                self.look()
                return call(*arguments, **options)

        return one

    def halved(self, call: Any) -> Any:
        def one(content: Any, path: Any, *arguments: Any, **options: Any) -> Any:
            with self.one_at_a_time:
                self.look()
                result = call(content, path, *arguments, **options)
                self.look(half=Path(path))
                return result

        return one


def result(kept: Kept) -> Kept:
    """What must be the same however often a run was cut short: all but what tells the time."""
    same = dict(kept)
    for name in kept:
        if name.endswith(("run.log", "report.html", "comparison.html")):
            same[name] = b""
        if name.endswith(("metrics.json", "comparison.json")):
            timeless = _timeless(json.loads(kept[name] or b""))
            same[name] = json.dumps(timeless, sort_keys=True).encode()
    return same


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        clocks = ("timing", "seconds", "peak_rss_bytes")
        return {key: _timeless(item) for key, item in value.items() if key not in clocks}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


class Project:
    """A recipe, and commands on it."""

    def __init__(self, root: Path) -> None:
        self.recipe = make_recipe(
            root / "recipe",
            count=2,
            output={"max_shard_size": "100KB"},
            calibration={"tokens": 256},
            train={"tokens": 512, "batch_size": 2, "checkpoints": 2},
            evaluation={"tokens": 128},
            compare={"variants": {"router": {"method": "btx", "train": {"scope": "router"}}}},
        )
        # A tokenizer may have a folder of its own.
        model = root / "recipe" / "models" / "a"
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
        (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
        self.root = root
        self.count = 0

    def fresh(self) -> Path:
        self.count += 1
        return self.root / f"run-{self.count}"

    def __call__(self, command: str, out: Path, *more: str) -> int:
        where = [str(out)] if command == "train" else [str(self.recipe), "--out", str(out)]
        return main([command, *where, *more])

    def states(
        self, command: str, *more: str, before: Kept | None = None
    ) -> tuple[list[Kept], Kept]:
        """Every state of the folder during a command, and how it ends."""
        out = self.fresh()
        if before is not None:
            put(before, out)
        with watching(out) as states:
            assert self(command, out, *more) == 0
        return states, keep(out)

    def resumed(self, command: str, state: Kept, *more: str) -> Kept | None:
        """How the folder ends when a command is given again; None where it is refused."""
        out = self.fresh()
        put(state, out)
        code = self(command, out, *more)
        after = keep(out)
        shutil.rmtree(out)
        assert code in (0, 2)
        return None if code else after


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def built(project: Project) -> Kept:
    return project.states("build")[1]


@pytest.fixture(scope="module")
def trained(project: Project, built: Kept) -> Kept:
    return project.states("train", before=built)[1]


def parts(state: Kept) -> dict[str, Kept]:
    """What a run folder has of `checkpoint/` and `trained/`."""
    found: dict[str, Kept] = {}
    for name, content in state.items():
        top, _, rest = name.partition("/")
        if top in ("checkpoint", "trained"):
            found.setdefault(top, {})[rest] = content
    return found


def check(
    project: Project,
    command: str,
    states: list[Kept],
    whole: Kept,
    *more: str,
    again: str = "--resume",
    old: Kept | None = None,
    begun: Callable[[Kept], bool] = lambda state: True,
) -> None:
    """The law. `old`: what the folder held before; while `begun` does not hold, it still does, and
    `--resume` may say that there is nothing to go on with."""
    finished = [parts(whole), parts(old or {})]
    for number, state in enumerate(states):
        for name, content in parts(state).items():
            assert content in [of.get(name) for of in finished], f"{number}: half of {name}"
        after = project.resumed(command, state, *more, again)
        if after is None:
            assert not begun(state), number
            assert old is not None
            kept = {name: old[name] for name in old if name != "run.log"}
            assert kept.items() <= state.items(), number
            after = project.resumed(command, state, *more, "--overwrite")
        assert after is not None, number
        ours, theirs = result(after), result(whole)
        differ = [n for n in {**ours, **theirs} if ours.get(n, "") != theirs.get(n, "")]
        assert not differ, number


HOW_MANY = pytest.mark.parametrize("kills", ["some", pytest.param("all", marks=pytest.mark.slow)])


def chosen(states: list[Kept], kills: str, count: int) -> list[Kept]:
    """All states, or `count` of them: the second, where a command has hardly begun, and others."""
    if kills == "all":
        return states
    step = len(states) / (count - 1)
    return [states[1], *(states[int(step * (n + 0.5))] for n in range(count - 1))]


@HOW_MANY
def test_a_build(kills: str, project: Project) -> None:
    states, whole = project.states("build")
    assert len(states) > 40
    assert {} in states and {"work": None} in states
    check(project, "build", chosen(states, kills, 6), whole)


@pytest.mark.slow
@HOW_MANY
def test_a_build_over_another(kills: str, project: Project, trained: Kept) -> None:
    more = ["--set", "seed=5"]
    whole = project.states("build", *more)[1]
    states, over = project.states("build", *more, "--overwrite", before=trained)
    assert result(over) == result(whole)
    check(
        project,
        "build",
        chosen(states, kills, 6),
        whole,
        *more,
        old=trained,
        begun=lambda state: "work/overwriting" in state,
    )


@pytest.mark.slow
@HOW_MANY
def test_a_training(kills: str, project: Project, built: Kept, trained: Kept) -> None:
    states = project.states("train", before=built)[0]
    assert any("work/training/checkpoint-4/optimizer.pt" in state for state in states)
    check(project, "train", chosen(states, kills, 6), trained)


@pytest.mark.slow
@HOW_MANY
def test_a_training_over_another(kills: str, project: Project, built: Kept, trained: Kept) -> None:
    more = ["--set", "train.scope=router"]
    whole = project.states("train", *more, before=built)[1]
    states, over = project.states("train", *more, "--overwrite", before=trained)
    assert result(over) == result(whole)
    check(
        project,
        "train",
        chosen(states, kills, 6),
        whole,
        *more,
        old=trained,
        begun=lambda state: "work/training/settings.json" in state,
    )


@pytest.mark.slow
@HOW_MANY
def test_a_training_over_one_that_was_cut_short(kills: str, project: Project, built: Kept) -> None:
    """The old training's states go at once: none is taken for one of the new training."""
    states, _ = project.states("train", "--set", "train.learning_rate=0.5", before=built)
    cut = next(s for s in states if "work/training/checkpoint-4/trainer_state.json" in s)
    whole = project.states("train", before=built)[1]
    states, over = project.states("train", "--overwrite", before=cut)
    assert result(over) == result(whole)
    check(
        project,
        "train",
        chosen(states, kills, 6),
        whole,
        old=cut,
        begun=lambda state: state.keys() < cut.keys(),
    )


@pytest.mark.slow
@HOW_MANY
def test_the_whole_way(kills: str, project: Project) -> None:
    states, whole = project.states("run")
    check(project, "run", chosen(states, kills, 3), whole)


METHODS = ("--methods", "btx,router")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison's runs, so that they can be watched as well, and begin at once."""

    def run(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, main(command[3:]))

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
@HOW_MANY
def test_a_comparison(kills: str, project: Project) -> None:
    states, whole = project.states("compare", *METHODS)
    check(project, "compare", chosen(states, kills, 2), whole, *METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("again", ["--resume", "--overwrite"])
@HOW_MANY
def test_a_comparison_over_another(kills: str, again: str, project: Project, trained: Kept) -> None:
    """All its old runs go, before the first begins anew. (Nothing is run: `--prepare`.)"""
    old: Kept = {"comparison.json": b"[]", "comparison.html": b""}
    for run in ("btx-seed114514", "router-seed114514"):
        old |= {run: None} | {f"{run}/{name}": content for name, content in trained.items()}
    more = [*METHODS, "--prepare"]
    states, whole = project.states("compare", *more, "--overwrite", before=old)
    assert {name.split("/")[0] for name in whole} == {"recipes"}
    check(
        project,
        "compare",
        chosen(states, kills, 6),
        whole,
        *more,
        old=old,
        again=again,
        begun=lambda s: "recipes/overwriting" in s or "comparison.json" not in s,
    )
