"""A run folder never mixes two builds, never looks finished before it is, survives a kill at any
moment, and nothing in it or of the user's is lost unasked."""

import errno
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checks import edit_weights, lowercase, mostly_slow, prefix_space, swap_tokens
from conftest import make_recipe
from symphony_moe import pipeline
from symphony_moe.building import build as build_module
from symphony_moe.building import candidate, estimate
from symphony_moe.cli import main
from symphony_moe.errors import RecipeError, RunFolderError, SymphonyError, VerificationError
from symphony_moe.files import hash_folder, publish, sha256_of, write_text
from symphony_moe.model.streams import Streams
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.settings import Calibration, Recipe
from symphony_moe.runs.folder import (
    RunFolder,
    log_to,
    logged_warnings,
    refuse_existing,
    start_run,
)
from symphony_moe.sources.opening import open_sources
from symphony_moe.text.texts import Texts

Recipes = Callable[[str], Path]
Built = Callable[[str], RunFolder]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: path -> content (None for folders)."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def llama(recipes: Recipes) -> Recipe:
    return load_recipe(recipes("llama"))


# What is there already


def test_a_new_run_may_have_a_new_or_an_empty_folder(llama: Recipe, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "some" / "new" / "folder"):
        for overwrite in (False, True):
            run = start_run(out, llama, resume=False, overwrite=overwrite)
            assert load_recipe(run.recipe) == llama
            shutil.rmtree(out)
            out.mkdir()


def test_an_existing_folder_is_refused(run: RunFolder, llama: Recipe, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(RunFolderError, match=r"exists.*--resume.*--overwrite"):
        pipeline.build(llama, run.root)
    assert snapshot(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused(llama: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            with pytest.raises((RunFolderError, OSError)):
                pipeline.build(llama, out, resume=resume, overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "precious"


def test_it_is_refused_before_weights_or_text_are_read(
    run: RunFolder, llama: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing and reading the sources of a real build takes many minutes."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("too late")

    for name in ("open_sources", "Texts", "_with_hashes"):
        monkeypatch.setattr(pipeline, name, refuse)
    with pytest.raises(RunFolderError, match="exists"):
        pipeline.build(llama, run.root)


def test_a_finished_run_can_be_overwritten(run: RunFolder, built: Built, llama: Recipe) -> None:
    run.report.write_text("old")
    run.trained.mkdir()
    pipeline.build(llama.model_copy(update={"seed": 5}), run.root, overwrite=True)
    assert run.read_recipe().seed == 5
    assert not run.report.exists() and not run.trained.exists() and not run.work.exists()
    router = "model.layers.0.block_sparse_moe.gate.weight"
    old, new = (load_file(r.checkpoint / "model.safetensors") for r in (built("llama"), run))
    assert not torch.equal(old[router], new[router])
    pipeline.verify(run)


def test_an_unfinished_run_can_be_overwritten(llama: Recipe, tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", llama, resume=False, overwrite=False)
    run.staged_checkpoint.mkdir()
    (run.staged_checkpoint / "left-over.json").write_text("{}")
    pipeline.build(llama, run.root, overwrite=True)
    assert not (run.checkpoint / "left-over.json").exists()


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_a_folder_without_a_recipe_is_left_as_it_is(
    how: str, llama: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    (out / "checkpoint").mkdir(parents=True)
    (out / "checkpoint" / "model.safetensors").write_bytes(b"precious")
    (out / "manifest.json").write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(RunFolderError):
        pipeline.build(llama, out, resume=how == "resume", overwrite=how == "overwrite")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("how", ["overwrite", "resume"])
@pytest.mark.parametrize("more", ["models", "work", "plan.json"])
def test_a_users_own_folder_with_a_recipe_in_it_is_left_as_it_is(
    how: str, more: str, recipes: Recipes, tmp_path: Path
) -> None:
    """`symphony build recipe.yaml --out . --overwrite`, where the recipe, the models and the text
    are."""
    project = tmp_path / "project"
    shutil.copytree(recipes("llama").parent, project)
    if "." in more:
        (project / more).write_text("{}")
    else:
        (project / more).mkdir(exist_ok=True)
    before = snapshot(project)
    with pytest.raises(RunFolderError):
        recipe = load_recipe(project / "recipe.yaml")
        pipeline.build(recipe, project, resume=how == "resume", overwrite=how == "overwrite")
    assert snapshot(project) == before


def test_a_folder_with_nothing_but_a_recipe_is_left_as_it_is(llama: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(llama.to_yaml())
    with pytest.raises(RunFolderError, match="not a run folder"):
        pipeline.build(llama, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("name", ["notes.txt", "eval/scores.json", "checkpoint.old/x"])
def test_overwriting_never_deletes_what_no_run_made(
    name: str, run: RunFolder, llama: Recipe
) -> None:
    (run.root / name).parent.mkdir(exist_ok=True)
    (run.root / name).write_text("precious")
    before = snapshot(run.root)
    with pytest.raises(RunFolderError, match=name.split("/")[0]):
        pipeline.build(llama, run.root, overwrite=True)
    assert snapshot(run.root) == before


def test_overwriting_follows_no_links(run: RunFolder, llama: Recipe, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    run.checkpoint.rename(elsewhere)
    run.checkpoint.symlink_to(elsewhere)
    before = snapshot(elsewhere)
    with pytest.raises(RunFolderError):
        pipeline.build(llama, run.root, overwrite=True)
    assert snapshot(elsewhere) == before


def test_resuming_needs_the_same_recipe(run: RunFolder, llama: Recipe) -> None:
    """What differs is said: the first three things, in short."""
    before = snapshot(run.root)
    other = llama.model_copy(update={"seed": 5})
    with pytest.raises(
        RunFolderError, match=r"another recipe .*\(seed 5 \(there 114514\)\); --over"
    ):
        pipeline.build(other, run.root, resume=True)
    calibration = Calibration(tokens=512, sequence_length=8, seed=1)
    many = llama.model_copy(update={"seed": 5, "calibration": calibration})
    expected = r"\(calibration\.tokens 512 \(there 1536\), .* and 1 more\); "
    with pytest.raises(RunFolderError, match=expected) as refused:
        pipeline.build(many, run.root, resume=True)
    assert len(str(refused.value)) < 500
    assert snapshot(run.root) == before


def test_what_differs_is_said_in_one_line_each(llama: Recipe) -> None:
    """Sources that come and go, files, the order; values that are long or have several lines."""
    a, b, c = (llama.sources[name] for name in "abc")
    one = llama.model_copy(update={"sources": {"a": a, "b": b}})

    def other(**sources: Any) -> Recipe:
        return llama.model_copy(update={"sources": sources})

    assert one.differences(other(a=a, b=b, c=c)) == ["no source c (there one)"]
    assert other(a=a, c=c).differences(one) == ["source c (there none)", "no source b (there one)"]
    assert other(b=b, a=a).differences(one) == ["the order of the sources"]
    data = b.model_copy(update={"data": ["x\ny" * 9, "z" * 500]})
    (found,) = other(a=a, b=data).differences(one)
    assert found.startswith("sources.b.data ['x") and " (there " in found and len(found) < 130
    assert "\n" not in found
    pinned = [b.model_copy(update={"sha256": {"model.safetensors": hash_}}) for hash_ in "12"]
    found_layers = a.model_copy(update={"layers": [0, 1]})
    assert other(a=a, b=pinned[0]).differences(other(a=found_layers, b=pinned[1])) == [
        "the files of b"
    ]


def test_a_run_of_an_earlier_version_did_what_that_version_does(
    run: RunFolder, llama: Recipe, tmp_path: Path
) -> None:
    """Settings that its recipe lacks are not read as today's defaults."""
    text = run.recipe.read_text()
    older = RunFolder(tmp_path / "older")
    older.root.mkdir()
    kept = [
        line
        for line in text.splitlines()
        if not line.startswith(("  windows:", "  embeddings: true", "  layers_with_head:"))
    ]
    assert len(kept) == len(text.splitlines()) - 3
    older.recipe.write_text("\n".join(kept).replace("method: symphony", "method: harmonized"))
    recipe = older.read_recipe()
    assert recipe.calibration.windows == "random"
    assert not recipe.fit.embeddings and recipe.fit.layers_with_head == 0
    assert load_recipe(older.recipe).calibration.windows == "coverage"


def test_resuming_needs_the_same_weights(recipes: Recipes, tmp_path: Path) -> None:
    shutil.copytree(recipes("llama").parent, tmp_path / "recipe")
    recipe = load_recipe(tmp_path / "recipe" / "recipe.yaml")
    run = pipeline.build(recipe, tmp_path / "run")
    path = Path(recipe.sources["b"].model) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RunFolderError, match=r"changed since \(the files of b\);"):
        pipeline.build(recipe, run.root, resume=True)


def test_resuming_a_finished_run_changes_nothing(run: RunFolder, llama: Recipe) -> None:
    before = snapshot(run.root)
    pipeline.build(llama, run.root, resume=True)
    after = snapshot(run.root)
    del before["run.log"], after["run.log"]
    assert after == before


def test_resuming_where_nothing_is_begins(llama: Recipe, tmp_path: Path) -> None:
    assert pipeline.build(llama, tmp_path / "new", resume=True).checkpoint.is_dir()


def test_two_ways_at_once_are_one_too_many(
    run: RunFolder, recipes: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", str(recipes("llama")), "--out", str(run.root), "--resume", "--overwrite"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_only_a_run_folder_is_read_as_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match=r"no recipe\.yaml"):
        run.read_recipe()
    with pytest.raises(RunFolderError, match="no finished checkpoint"):
        run.require_checkpoint()
    with pytest.raises(RunFolderError, match="not there"):
        run.read_json(run.metrics)
    for content in ("", "{", "[]", "\x00"):
        run.metrics.write_text(content)
        with pytest.raises(RunFolderError, match=r"metrics\.json"):
            run.read_json(run.metrics)
        with pytest.raises(RunFolderError, match=r"metrics\.json"):
            run.update_json(run.metrics, {"a": 1})


def test_a_finished_runs_recipe_is_closed(run: RunFolder) -> None:
    with pytest.raises(RecipeError, match="what can change now is: train"):
        run.read_recipe(["router.top_k=1"], sections=("train",))
    assert run.read_recipe(["train.tokens=5"], sections=("train",)).train.tokens == 5


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_publishing_never_replaces_what_is_there(tmp_path: Path) -> None:
    for name in ("staged", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError):
        publish(tmp_path / "staged", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "final"


# Kills

_DRIVER = """
import importlib, json, os, signal, sys
from symphony_moe import cli, pipeline
from symphony_moe.building import estimate
from symphony_moe.training import run

def kill_at(point, call):
    where, _, moment = point.partition("!")
    module, _, path = where.partition(":")
    names = path.split(".")
    owner = importlib.import_module("symphony_moe." + module)
    for name in names[:-1]:
        owner = getattr(owner, name)
    whole, calls = getattr(owner, names[-1]), 0
    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call and moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = whole(*arguments, **options)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, names[-1], counted)

ends = []
for arguments, point, call, mapped in json.loads(sys.argv[1]):
    child = os.fork()  # the imports are paid once; no thread has been started yet
    if child == 0:
        if mapped:
            estimate.STREAMS_IN_MEMORY = 0
        if point:
            kill_at(point, call)
        os._exit(cli.main(arguments))
    ends.append(os.waitpid(child, 0)[1])
print(json.dumps(ends))
"""
"""Run commands, each in a process that SIGKILL ends before (or `!after`) some function's n-th call;
prints each process's status."""

# The two layers of the three sources are 3 tables, 2 x 16 tensors, in several files.
KILLS = [
    ("model.checkpoint:CheckpointWriter._lay_out", 1, False),
    ("model.checkpoint:CheckpointWriter._lay_out", 2, False),
    ("model.checkpoint:CheckpointWriter.write", 2, False),
    ("building.build:layer_outputs", 1, False),
    ("building.build:layer_outputs", 2, False),
    ("model.checkpoint:CheckpointWriter.write", 25, False),
    ("model.checkpoint:CheckpointWriter.write", 25, True),
    ("model.checkpoint:CheckpointWriter.when_durable", 2, False),
    ("building.build:match", 3, True),
    ("building.records:write_bytes", 2, True),
    ("building.records:write_bytes!after", 2, False),
    ("building.build:choose_maps", 1, False),
    ("model.checkpoint:CheckpointWriter.finish", 1, False),
    ("building.build:write_companions!after", 1, False),
    ("building.alignment:Alignment.describe", 1, False),
    ("building.build:Build._write_manifest", 1, False),
    ("building.build:publish", 1, False),
    ("building.build:publish!after", 1, False),
]
"""(function, call, whether the streams are in memory-mapped files)"""


class Kills:
    """Builds that were killed, and one that was not."""

    def __init__(self, root: Path) -> None:
        self.recipe = make_recipe(root / "recipe", output={"max_shard_size": "40KB"})
        self.whole = RunFolder(root / "whole")
        self.cut = {kill: RunFolder(root / f"cut-{number}") for number, kill in enumerate(KILLS)}
        jobs: list[Any] = [(self._arguments(self.whole), "", 0, False)]
        jobs += [(self._arguments(run), *kill) for kill, run in self.cut.items()]
        self.statuses = run_jobs(jobs)

    def _arguments(self, run: RunFolder) -> list[str]:
        return ["build", str(self.recipe), "--out", str(run.root)]


def run_jobs(jobs: list[Any]) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps(jobs)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    codes: list[int] = json.loads(done.stdout.splitlines()[-1])
    return codes


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> Kills:
    return Kills(tmp_path_factory.mktemp("kills"))


def test_every_kill_found_its_moment(kills: Kills) -> None:
    assert kills.statuses == [0] + [signal.SIGKILL] * len(KILLS)
    assert len(list(kills.whole.checkpoint.glob("*.safetensors"))) > 2


@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_a_killed_build_leaves_nothing_that_looks_finished(
    kill: Any, kills: Kills, capsys: pytest.CaptureFixture[str]
) -> None:
    run = kills.cut[kill]
    if kill[0] == "building.build:publish!after":
        # It is finished; only the cleaning up was cut off.
        assert snapshot(run.checkpoint) == snapshot(kills.whole.checkpoint)
        return
    assert not run.checkpoint.exists()
    for command in ("train", "evaluate", "report", "verify"):
        assert main([command, str(run.root)]) == 2
        assert "no finished checkpoint" in capsys.readouterr().err
    assert main(["build", str(kills.recipe), "--out", str(run.root)]) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_killed_and_resumed_equals_never_killed(
    kill: Any, kills: Kills, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(kills.cut[kill].root, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    if kill[2]:
        monkeypatch.setattr(estimate, "STREAMS_IN_MEMORY", 0)
    pipeline.build(load_recipe(kills.recipe), run.root, resume=True)
    assert snapshot(run.checkpoint) == snapshot(kills.whole.checkpoint)
    for name in ("alignment.safetensors", "manifest.json", "recipe.yaml"):
        assert (run.root / name).read_bytes() == (kills.whole.root / name).read_bytes()
    ours, whole = (r.read_json(r.metrics) for r in (run, kills.whole))
    assert ours["alignment"] == whole["alignment"]
    assert sorted(p.name for p in run.root.iterdir()) == sorted(
        p.name for p in kills.whole.root.iterdir()
    ), "something is left behind"


def test_layers_that_were_finished_are_not_computed_again(
    kills: Kills, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor compared again: the records of the sweep are there as well."""
    killed = kills.cut[("building.build:layer_outputs", 2, False)]
    shutil.copytree(killed.root, tmp_path / "run")
    assembled = []
    whole = candidate.assemble_layer

    def counted(*arguments: Any) -> Any:
        assembled.append(arguments[2])
        return whole(*arguments)

    monkeypatch.setattr(candidate, "assemble_layer", counted)
    monkeypatch.setattr(build_module, "Sweep", None)
    pipeline.build(load_recipe(kills.recipe), tmp_path / "run", resume=True)
    assert assembled == [1]


def test_layers_that_were_compared_are_not_compared_again(
    kills: Kills, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their streams are brought past them, and nothing is gathered or matched."""
    killed = kills.cut[("building.records:write_bytes", 2, True)]
    shutil.copytree(killed.root, tmp_path / "run")
    gathered, matched = [], []
    advance, match = build_module.Sweep.advance, build_module.match

    def advanced(sweep: Any, layer: int, weights: Any, *, compare: bool) -> Any:
        gathered.append((layer, compare))
        return advance(sweep, layer, weights, compare=compare)

    def counted(comparison: Any, family: Any, who: str) -> Any:
        matched.append(who)
        return match(comparison, family, who)

    monkeypatch.setattr(build_module.Sweep, "advance", advanced)
    monkeypatch.setattr(build_module, "match", counted)
    pipeline.build(load_recipe(kills.recipe), tmp_path / "run", resume=True)
    assert gathered == [(0, False), (1, True)]
    assert [who.split()[0] for who in matched] == ["b", "c"]
    assert all("layer 1" in who for who in matched)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_a_kill_while_overwriting_leaves_nothing_that_looks_finished(
    call: int, kills: Kills, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(kills.whole.root, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    (run.trained).mkdir()
    before = snapshot(run.checkpoint)
    # In process: an exception in the middle of deleting is a kill that can be watched.
    with pytest.MonkeyPatch.context() as patch:
        calls = 0
        unlink, rmdir = os.unlink, os.rmdir

        def counted(act: Any) -> Any:
            def one(*arguments: Any, **options: Any) -> None:
                nonlocal calls
                calls += 1
                if calls > 2 * call:
                    raise KeyboardInterrupt
                act(*arguments, **options)

            return one

        patch.setattr(os, "unlink", counted(unlink))
        patch.setattr(os, "rmdir", counted(rmdir))
        arguments = ["build", str(kills.recipe), "--out", str(run.root), "--overwrite"]
        assert main(arguments) == 130
    if run.checkpoint.exists():
        assert snapshot(run.checkpoint) == before, "half a checkpoint"
    capsys.readouterr()
    assert main(arguments) == 0
    assert snapshot(run.checkpoint) == snapshot(kills.whole.checkpoint)


# Full and read-only disks


def test_too_small_a_disk_is_a_message(
    recipes: Recipes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    out = tmp_path / "out"
    assert main(["build", str(recipes("llama")), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "make room" in error and "Traceback" not in error
    assert not (out / "checkpoint").exists()
    # With room, the build goes on.
    monkeypatch.undo()
    assert main(["build", str(recipes("llama")), "--out", str(out), "--resume"]) == 0


def test_a_disk_that_refuses_the_space_is_a_message(
    recipes: Recipes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    out = tmp_path / "out"
    assert main(["build", str(recipes("llama")), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "Traceback" not in error
    assert not (out / "checkpoint").exists()


def test_a_writer_that_names_no_file_is_told_of_with_the_run(
    recipes: Recipes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a library writes fails without the name of a file."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "build", full)
    monkeypatch.setattr(pipeline, "train", full)
    out = tmp_path / "out"
    for words in (["build", str(recipes("llama")), "--out", str(out)], ["train", str(out)]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"symphony: error: {out}: nothing more can be written: " in error
        assert "Make room on the disk and go on with --resume" in error
        assert "Traceback" not in error


class Disk:
    """A small file system in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.options("-t", "tmpfs", "tmpfs", "-o", "size=4m")

    def options(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, str(self.path)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a file system of our own needs the right to mount: {done.stderr}")

    def leave(self, free: int) -> None:
        """Fill the disk up to `free` bytes."""
        self.options("-o", "remount,size=4m")
        size = shutil.disk_usage(self.path).free - free
        with (self.path / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if not shutil.which("mount"):
        pytest.skip("no mount command here")
    path = tmp_path / "disk"
    yield Disk(path)
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize(
    ("free", "lies"),
    mostly_slow(
        itertools.product([8192, 100_000, 220_000, 228_000, 236_000], [False, True]),
        (8192, False),
        (100_000, True),
        (228_000, False),
        (236_000, True),
    ),
)
def test_a_really_full_disk_is_a_message(
    free: int,
    lies: bool,
    disk: Disk,
    recipes: Recipes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The weights take 213,376 bytes, the rest some 30,000: the space ends at every stage."""
    disk.leave(free)
    if lies:  # as quotas and other processes make it
        usage = shutil.disk_usage(disk.path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    out = disk.path / "out"
    assert main(["build", str(recipes("llama")), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "symphony: error: " in error and "Traceback" not in error
    assert "space" in error or "room" in error
    assert not (out / "checkpoint").exists()
    monkeypatch.undo()
    (disk.path / "filler").unlink()
    assert main(["build", str(recipes("llama")), "--out", str(out), "--resume"]) == 0
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    "free",
    mostly_slow([40_000, 300_000, 640_000, 800_000, 960_000, 1_450_000], 640_000),
)
def test_training_on_a_really_full_disk_is_a_message(
    free: int, disk: Disk, built: Callable[[str], RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    """The space ends in the model, the optimizer and the result, each written by another library
    with words of its own."""
    run = RunFolder(disk.path / "run")
    shutil.copytree(built("llama").root, run.root)
    disk.leave(free)
    assert main(["train", str(run.root)]) == 2
    error = capsys.readouterr().err
    assert f"{run.root}: no room for what the training writes at step " in error
    assert "Traceback" not in error and "Make room and --resume" in error
    assert "no room for what the training writes" in run.log.read_text()
    assert not run.trained.exists()
    (disk.path / "filler").unlink()
    assert main(["train", str(run.root), "--resume"]) == 0
    assert main(["verify", str(run.root)]) == 0


def test_streams_that_do_not_fit_the_disk_are_a_message(disk: Disk, llama: Recipe) -> None:
    """A memory-mapped file without space behind it would end the process by SIGBUS."""
    disk.leave(50_000)
    sources = open_sources(llama)
    text = Texts(llama, sources).calibration_windows()
    windows = {name: packed.windows for name, packed in text.items()}
    reached = []

    def table() -> Iterator[tuple[int, torch.Tensor]]:
        reached.append(1)
        yield 0, torch.zeros(300, 32)

    with pytest.raises(RunFolderError, match="no room"):
        Streams(disk.path).embed(windows, sources[0].config, table())
    assert not reached


@pytest.mark.parametrize(("free", "fitting"), [(300_000, False), (1_000_000, True)])
def test_streams_of_a_fit_that_do_not_fit_the_disk_are_a_message(
    free: int,
    fitting: bool,
    disk: Disk,
    recipes: Recipes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The sources' streams take 590 KB while they are compared; while the new model is fitted, five
    streams of each source take 985 KB beside the 213 KB of weights."""
    monkeypatch.setattr(estimate, "STREAMS_IN_MEMORY", 0)
    disk.leave(free)
    usage = shutil.disk_usage(disk.path)  # refused before it begins, were it known
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    out = disk.path / "out"
    more = ["--set", "method=harmonized", "--set", "fit.epochs=1"]
    assert main(["build", str(recipes("llama")), "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert "symphony: error: " in error and "no room" in error and "Traceback" not in error
    assert "stream-" in error
    run = RunFolder(out)
    assert run.layer_compared(1).is_file() is fitting and not run.checkpoint.exists()
    assert (run.work / "stream-a.bin").exists() is not fitting, "in the way of the fit's"
    monkeypatch.undo()
    monkeypatch.setattr(estimate, "STREAMS_IN_MEMORY", 0)
    (disk.path / "filler").unlink()
    assert main(["build", str(recipes("llama")), "--out", str(out), "--resume", *more]) == 0
    assert main(["verify", str(out)]) == 0


def test_a_read_only_disk_is_a_message(
    disk: Disk, recipes: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    (disk.path / "empty").mkdir()
    disk.options("-o", "remount,ro")
    for out in (disk.path / "out", disk.path / "empty"):
        assert main(["build", str(recipes("llama")), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert "Read-only file system" in error and "Traceback" not in error


def test_a_folder_without_permission_is_a_message(
    recipes: Recipes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The superuser may write everywhere, so the answer of the system is put in its mouth.
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["build", str(recipes("llama")), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "Permission denied" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


# Verification


def trust(run: RunFolder) -> None:
    """Write the manifest anew, as one who changes a file and covers it up."""
    manifest = json.loads(run.manifest.read_text())
    manifest["files"] = {run.alignment.name: sha256_of(run.alignment)}
    for folder in (run.checkpoint, run.trained):
        if folder.is_dir():
            manifest["files"] |= hash_folder(folder)
    run.manifest.write_text(json.dumps(manifest))


def complaint(run: RunFolder) -> str:
    with pytest.raises(VerificationError) as caught:
        pipeline.verify(run)
    message = str(caught.value)
    assert message.startswith(f"{run.root}: ")
    return message


def test_a_good_run_verifies(run: RunFolder) -> None:
    before = snapshot(run.root)
    checks = pipeline.verify(run, deep=True)
    assert "35 tensors equal" in checks["experts and backbone"]
    assert "same 35 tensors" in checks["rebuilt"]
    assert snapshot(run.root) == before, "verifying changed the run"


@pytest.mark.parametrize("place", [0, 8, 5000, 100_000, -1])
def test_a_flipped_bit_is_found(place: int, run: RunFolder) -> None:
    path = run.checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert "checkpoint/model.safetensors (changed)" in complaint(run)


def test_a_truncated_file_is_found(run: RunFolder) -> None:
    path = run.checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "checkpoint/model.safetensors (changed)" in complaint(run)
    trust(run)
    assert "not readable" in complaint(run)


def test_a_surplus_and_a_missing_file_are_found(run: RunFolder) -> None:
    (run.checkpoint / "extra.json").write_text("{}")
    assert "checkpoint/extra.json (not in the manifest)" in complaint(run)
    (run.checkpoint / "extra.json").unlink()
    (run.checkpoint / "generation_config.json").unlink()
    assert "checkpoint/generation_config.json (missing)" in complaint(run)


def test_a_surplus_folder_is_found(run: RunFolder) -> None:
    (run.checkpoint / "extra").mkdir()
    (run.checkpoint / "extra" / "file").write_text("")
    assert "checkpoint/extra" in complaint(run)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md"])
def test_a_changed_companion_is_found(name: str, run: RunFolder) -> None:
    path = run.checkpoint / name
    path.write_text(path.read_text() + " ")
    assert f"checkpoint/{name} (changed)" in complaint(run)


@pytest.mark.parametrize(
    "changes", [{"num_experts_per_tok": 1}, {"rope_theta": 5e5}, {"rms_norm_eps": 0.1}], ids=str
)
def test_a_config_that_computes_something_else_is_found_by_its_logits(
    changes: dict[str, Any], run: RunFolder
) -> None:
    path = run.checkpoint / "config.json"
    config = json.loads(path.read_text()) | changes
    if "rope_theta" in changes:
        config["rope_parameters"]["rope_theta"] = changes["rope_theta"]
    path.write_text(json.dumps(config))
    trust(run)
    assert "logits differ" in complaint(run)


def _no_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop()


@pytest.mark.parametrize("folder", ["checkpoint", "trained"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lowercase, ", expected ["),
        (prefix_space, ", expected ["),
        (_no_merge, ", expected ["),
        (swap_tokens, "2 tokens have other numbers, first 'A'"),
        (dict.clear, "does not load in transformers"),
    ],
)
def test_a_tokenizer_that_cuts_text_otherwise_is_found(
    change: Callable[[dict[str, Any]], None], said: str, folder: str, run: RunFolder
) -> None:
    """As everyone else loads it, from either model."""
    if folder == "trained":
        shutil.copytree(run.checkpoint, run.trained)
    path = run.root / folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    trust(run)
    message = complaint(run)
    assert f"{folder} tokenizer: " in message and said in message


@pytest.mark.parametrize(
    "changes",
    [
        {"padding_side": "left"},
        {"model_max_length": 16},
        {"pad_token": "<s>"},
        {"chat_template": "x"},
    ],
    ids=str,
)
def test_a_tokenizer_with_another_setting_is_found(changes: dict[str, Any], run: RunFolder) -> None:
    path = run.checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    trust(run)
    assert "checkpoint tokenizer: its " in complaint(run)


def test_a_config_that_does_not_load_the_weights_is_found(run: RunFolder) -> None:
    path = run.checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": 4}))
    trust(run)
    with pytest.raises(SymphonyError):
        pipeline.verify(run)


_EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"


def _swap_experts(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("w1", "w2", "w3"):
        first, second = (_EXPERT.format(number, part) for number in (0, 1))
        tensors[first], tensors[second] = tensors[second], tensors[first]


def _swap_neurons(tensors: dict[str, torch.Tensor]) -> None:
    # The function stays the same: no logits would tell.
    for part, axis in (("w1", 0), ("w3", 0), ("w2", 1)):
        name = _EXPERT.format(2, part)
        tensors[name] = tensors[name].roll(1, axis).contiguous()


@pytest.mark.parametrize(
    "change",
    [
        _swap_experts,
        _swap_neurons,
        *(
            lambda tensors, name=name: tensors[name].view(-1)[7].mul_(1.01)
            for name in (
                "model.embed_tokens.weight",
                "model.layers.0.input_layernorm.weight",
                "model.layers.0.self_attn.k_proj.weight",
                "model.layers.1.block_sparse_moe.gate.weight",
                "model.norm.weight",
                "lm_head.weight",
            )
        ),
    ],
)
def test_weights_that_are_not_the_sources_are_found_whatever_the_manifest_says(
    change: Callable[[dict[str, torch.Tensor]], Any], run: RunFolder
) -> None:
    edit_weights(run.checkpoint, change)
    assert "checkpoint/model.safetensors (changed)" in complaint(run)
    trust(run)
    message = complaint(run)
    assert "not what the sources and the recorded maps give" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update({"model.extra": torch.zeros(2)}),
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(33)}),
        lambda tensors: tensors.update(
            {"model.norm.weight": tensors["model.norm.weight"].bfloat16()}
        ),
    ],
)
def test_tensors_that_were_not_planned_are_found_whatever_the_manifest_says(
    change: Callable[[dict[str, torch.Tensor]], Any], run: RunFolder
) -> None:
    edit_weights(run.checkpoint, change)
    trust(run)
    assert "1 tensors are not as planned" in complaint(run)


def test_a_changed_record_of_the_alignment_is_found(run: RunFolder) -> None:
    record = load_file(run.alignment)
    name = "b.layers.1.neurons"
    record[name] = record[name].roll(1)
    save_file(record, run.alignment)
    assert "alignment: hash differs" in complaint(run)
    trust(run)
    assert "layers.1.block_sparse_moe.experts.1" in complaint(run)


@pytest.mark.parametrize("name", ["alignment.safetensors", "manifest.json", "checkpoint"])
def test_a_missing_part_is_a_message(
    name: str, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["verify", str(run.root)]) == 2
    error = capsys.readouterr().err
    assert name in error and "Traceback" not in error


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": []}', '{"files": {}}'])
def test_a_broken_manifest_is_a_message(
    content: str, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.manifest.write_text(content)
    assert main(["verify", str(run.root)]) == 2
    assert "Traceback" not in capsys.readouterr().err


RECORDS = ["manifest.json", "metrics.json", "plan.json", "recipe.yaml"]
DAMAGED = [None, b"{}", b"[]", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize(
    ("name", "content"),
    mostly_slow(
        itertools.product(RECORDS, DAMAGED),
        *((name, None) for name in RECORDS),
        *(("manifest.json", content) for content in DAMAGED[1:]),
    ),
)
def test_a_damaged_file_of_a_run_is_named_before_it_is_needed(
    name: str,
    content: bytes | None,
    run: RunFolder,
    recipes: Recipes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`train` writes into all of these at its end, which may be days later."""
    path = run.root / name
    path.unlink() if content is None else path.write_bytes(content)
    recipe = str(recipes("llama"))
    unread = {"manifest.json": ["build"], "plan.json": ["build"]}
    for command in (["train"], ["report"], ["build", recipe, "--resume", "--out"]):
        code = main([*command, str(run.root)])
        error = capsys.readouterr().err
        assert code == (0 if command[0] in unread.get(name, []) else 2), command
        assert "Traceback" not in error and (code == 0 or name in error or "recipe" in error)
    assert not run.trained.exists() and not run.training.exists()


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json"])
def test_a_lost_companion_is_named_before_the_training(name: str, run: RunFolder) -> None:
    (run.checkpoint / name).unlink()
    with pytest.raises(RunFolderError, match=f"{name}: lost"):
        pipeline.train(run)


def test_what_was_put_beside_the_model_is_not_trained(run: RunFolder) -> None:
    for odd in ("mine.py", os.fsdecode(b"x\xffy")):
        (run.checkpoint / odd).write_text("mine")
    pipeline.train(run)
    names = [{p.name for p in folder.iterdir()} for folder in (run.checkpoint, run.trained)]
    assert names[0] - names[1] == {"mine.py", os.fsdecode(b"x\xffy")}


def test_what_was_trained_is_verified_too(run: RunFolder) -> None:
    pipeline.train(run)
    assert "loads" in pipeline.verify(run)["trained in stock transformers"]
    path = run.trained / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "trained/model.safetensors (changed)" in complaint(run)


def test_names_of_a_run_are_its_own(tmp_path: Path) -> None:
    """Whatever a run can hold, overwriting takes away; so each name is one of a run's."""
    run = RunFolder(tmp_path)
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [getattr(run, name) for name in names]
    top = [path for path in paths if path.parent == tmp_path]
    assert len(top) >= 10
    run.work.mkdir()
    for path in top:
        if path.suffix:
            path.write_text("{}")
        else:
            path.mkdir(exist_ok=True)
    refuse_existing(tmp_path, resume=False, overwrite=True)


# The log


def test_warnings_of_the_log_are_told_once_each(tmp_path: Path) -> None:
    """As `log_to` writes them, and whatever else is in the file."""
    run = RunFolder(tmp_path)
    assert logged_warnings(run) == []
    package = logging.getLogger("symphony_moe")
    package.setLevel(logging.INFO)
    for _ in range(2):
        with log_to(run):
            package.info("WARNING is a word")
            package.warning("text of %s: too short\nand more", "a")
            package.warning("b")
    with run.log.open("ab") as file:
        file.write(b"WARNING by nobody\n\xff\n")
    assert logged_warnings(run) == ["text of a: too short", "b"]


# One process at a time


def test_a_folder_where_another_is_at_work_is_left_alone(
    built: Callable[[str], RunFolder],
    recipes: Recipes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(built("llama").root, run.root)
    before = hash_folder(run.root)
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from symphony_moe.files import locked\n"
        f"with locked(Path({str(run.root)!r})):\n"
        "    print('at work', flush=True)\n    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "at work\n"
        recipe = str(recipes("llama"))
        for command in (
            ["train", str(run.root)],
            ["evaluate", str(run.root)],
            ["build", recipe, "--out", str(run.root), "--overwrite"],
        ):
            assert main(command) == 2
            assert "another `symphony` is at work there" in capsys.readouterr().err
        assert hash_folder(run.root) == before
    finally:
        other.kill()
        other.communicate()
    assert main(["evaluate", str(run.root)]) == 0
