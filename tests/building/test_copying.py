"""A build that computes nothing but means moves the rest as it is, and does nothing twice."""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checks import edit_weights, expert_names, mostly_slow, read_tensors
from symphony_moe import pipeline
from symphony_moe.building import build as building
from symphony_moe.building.build import Build
from symphony_moe.errors import RunFolderError, SourceError
from symphony_moe.files import FileHasher, hash_folder, sha256_of
from symphony_moe.model import checkpoint
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources import opening, source

Recipes = Callable[[str], Path]
COPIES = ["method=btx", "output.dtype=bfloat16"]


@pytest.fixture
def recipe(recipes: Recipes, tmp_path: Path) -> Recipe:
    """Of sources in bfloat16, as models are published."""
    folder = shutil.copytree(recipes("llama").parent, tmp_path / "sources")
    found = load_recipe(folder / recipes("llama").name, COPIES)

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    for spec in found.sources.values():
        edit_weights(Path(spec.model), shorten)
    return found


def test_experts_are_the_bytes_of_their_sources(recipe: Recipe, tmp_path: Path) -> None:
    run = pipeline.build(recipe, tmp_path / "run")
    written = read_tensors(run.checkpoint)
    for number, name in enumerate(recipe.sources):
        own = read_tensors(Path(recipe.sources[name].model))
        parts = ("gate", "up", "down")
        for layer in range(2):
            experts = expert_names("llama", layer, number)
            for part, expert in zip(parts, experts, strict=True):
                stored = own[f"model.layers.{layer}.mlp.{part}_proj.weight"]
                assert torch.equal(written[expert], stored)


@pytest.mark.parametrize("changes", [{}, {"router": "regression"}, {"neurons": "activations"}])
def test_only_what_is_copied_is_read_as_it_is_stored(
    changes: dict[str, str], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed with is float32."""
    read_layers, dtypes = source.read_layers, set[torch.dtype]()

    def noted(sources: Any, layer: int, **how: Any) -> Any:
        found = read_layers(sources, layer, **how)
        dtypes.update(tensor.dtype for one in found.values() for tensor in one.values())
        return found

    monkeypatch.setattr(building, "read_layers", noted)
    router = recipe.router.model_copy(update={"init": changes.get("router", "random")})
    align = recipe.align.model_copy(update={"neurons": changes.get("neurons", "none")})
    recipe = recipe.model_copy(update={"router": router, "align": align})
    pipeline.build(recipe, tmp_path / "run")
    assert dtypes == {torch.float32 if changes else torch.bfloat16}


def test_each_source_is_opened_and_each_tokenizer_loaded_once(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer whose files are another source's too, once for both."""
    counts: Counter[str] = Counter()

    def counting(module: Any, name: str, key: Callable[..., str]) -> None:
        function = getattr(module, name)

        def counted(*arguments: Any, **more: Any) -> Any:
            counts[key(*arguments)] += 1
            return function(*arguments, **more)

        monkeypatch.setattr(module, name, counted)

    counting(opening, "open_source", lambda name, *_: f"source {name}")
    counting(source, "load_tokenizer", lambda folder, *_: f"tokenizer {folder.name}")
    recipe = load_recipe(recipes("llama"), COPIES)
    pipeline.build(recipe, tmp_path / "run")
    first = Path(next(iter(recipe.sources.values())).model).name
    expected = [*(f"source {name}" for name in recipe.sources), f"tokenizer {first}"]
    assert counts == Counter(expected)


def test_no_byte_of_the_output_is_read_back(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashes of the manifest are taken while the bytes are written; they are the files'."""
    finish = checkpoint.RunningDigest.finish

    def passing(digest: Any, path: Path, offset: int, size: int) -> str:
        assert digest._position == size, f"{path} is read back"
        return finish(digest, path, offset, size)

    monkeypatch.setattr(checkpoint.RunningDigest, "finish", passing)
    run = pipeline.build(load_recipe(recipes("llama"), COPIES), tmp_path / "run")
    files = run.read_json(run.manifest)["files"]
    for path in run.checkpoint.glob("*.safetensors"):
        assert files[f"checkpoint/{path.name}"] == sha256_of(path)


UNUSED = [
    "transformers.modeling_utils",
    "transformers.trainer",
    "symphony_moe.training.run",
    "symphony_moe.evaluation.losses",
    "symphony_moe.building.verify",
    "matplotlib",
    "scipy.optimize",
]


@pytest.mark.slow
def test_nothing_is_imported_that_a_copy_does_not_use(recipes: Recipes, tmp_path: Path) -> None:
    """Models and the Trainer take longer to import than a small model takes to copy."""
    words = ["build", str(recipes("llama")), "--out", str(tmp_path / "run"), "--set", COPIES[0]]
    program = (
        "import json, sys; from symphony_moe.cli import main; "
        f"code = main({words!r}); "
        f"print(json.dumps([code, [name for name in {UNUSED!r} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []], done.stderr


def test_a_source_that_is_not_the_pinned_one_is_refused_before_anything_is_made(
    recipes: Recipes, tmp_path: Path
) -> None:
    """Its hash is known only after everything else has been looked at."""
    recipe = load_recipe(recipes("llama"), COPIES)
    name, spec = next(iter(recipe.sources.items()))
    wrong = spec.model_copy(update={"sha256": {"model.safetensors": "0" * 64}})
    pinned = recipe.model_copy(update={"sources": {**recipe.sources, name: wrong}})
    with pytest.raises(SourceError, match="the source has changed"):
        pipeline.build(pinned, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_source_that_changes_before_a_build_goes_on_is_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("symphony_moe.building.build.write_companions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.build(recipe, tmp_path / "run")
    model = Path(next(iter(recipe.sources.values())).model)
    edit_weights(model, lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(RunFolderError, match=r"changed since \(the files of "):
        pipeline.build(recipe, tmp_path / "run", resume=True)


@pytest.mark.parametrize("how", ["replaced", "written to", "removed"])
def test_a_source_that_changes_while_it_is_read_is_noticed(
    how: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was copied of it is not what was hashed."""
    weights = Path(recipe.sources["b"].model) / "model.safetensors"
    write_layer = Build._write_layer

    def change_first(build: Build, layer: int, moe: Any) -> None:
        if layer == 1:
            content = weights.read_bytes()
            if how == "written to":
                with weights.open("r+b") as file:
                    file.seek(len(content) - 8)
                    file.write(bytes(8))
            else:
                weights.rename(tmp_path / "old")
            if how == "replaced":
                weights.write_bytes(content[:-8] + bytes(8))
        write_layer(build, layer, moe)

    monkeypatch.setattr(Build, "_write_layer", change_first)
    with pytest.raises(SourceError, match=r"b: .*model\.safetensors"):
        pipeline.build(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint").exists()
    # Put back as it was, and gone on with: nothing of the other state is kept.
    monkeypatch.undo()
    if how == "written to":
        return
    (tmp_path / "old").replace(weights)
    run = pipeline.build(recipe, tmp_path / "run", resume=True)
    pipeline.verify(run, deep=True)


def test_the_same_bytes_with_another_date_are_no_change(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path(recipe.sources["b"].model) / "model.safetensors"
    write_layer = Build._write_layer

    def touch(build: Build, layer: int, moe: Any) -> None:
        shutil.copyfile(weights, tmp_path / "copy")
        (tmp_path / "copy").replace(weights)
        write_layer(build, layer, moe)

    monkeypatch.setattr(Build, "_write_layer", touch)
    run = pipeline.build(recipe, tmp_path / "run")
    assert pipeline.verify(run)["sources"] == "hashes equal the recipe's"


def test_files_are_hashed_in_threads(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(range(256)) * (4096 * number))
    with FileHasher() as hasher:
        found = [hasher.submit(path) for path in paths]
        assert [digest.result() for digest in found] == [sha256_of(path) for path in paths]


def test_hashing_stops_where_nobody_waits_for_it(tmp_path: Path) -> None:
    """A recipe that is refused is refused at once, however large its sources."""
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(2**40)
    with FileHasher() as hasher:
        digest = hasher.submit(tmp_path / "hole")
    assert digest.done()


@pytest.mark.parametrize(
    ("function", "call"),
    mostly_slow([("write_at", 3), ("sync_file", 1), ("sync_file", 2)], ("sync_file", 2)),
)
def test_a_copy_that_is_killed_goes_on_to_the_same_bytes(
    function: str, call: int, recipes: Recipes, tmp_path: Path
) -> None:
    """While a thread writes a tensor, or makes a layer durable: the next layer is on its way."""
    whole = pipeline.build(load_recipe(recipes("llama"), COPIES), tmp_path / "whole")
    words = ["build", str(recipes("llama")), "--out", str(tmp_path / "run")]
    words += [word for setting in COPIES for word in ("--set", setting)]
    program = (
        "import os, signal; from symphony_moe.cli import main; "
        "from symphony_moe.model import checkpoint as module; "
        f"real, left = module.{function}, iter(range({call - 1}, -1, -1)); "
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL); "
        f"module.{function} = lambda *given: real(*given) if next(left) else kill(); "
        f"main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = pipeline.build(load_recipe(recipes("llama"), COPIES), tmp_path / "run", resume=True)
    assert hash_folder(run.checkpoint) == hash_folder(whole.checkpoint)
    assert run.read_json(run.manifest)["files"] == whole.read_json(whole.manifest)["files"]
