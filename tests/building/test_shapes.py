"""Sources of unequal shapes, brought to one while they are read."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from checks import (
    difference,
    load_clean,
    logits_of,
    mostly_slow,
    opened,
    random_text,
    read_tensors,
    save_widened,
)
from conftest import VARIANTS, make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.building import build as building
from symphony_moe.building.place_layers import cka_of_streams, stream_similarities
from symphony_moe.errors import RecipeError, SourceMismatch, SymphonyError
from symphony_moe.model.widening import Shape
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.metrics import read_metrics
from symphony_moe.sources.shapes import match_layers

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


def unequal(root: Path, variant: str = "llama", **sections: Any) -> Path:
    """A recipe of `a`, which is wide and deep, `b`, which is narrow, and `c`, which is shallow."""
    sections = {"backbone": {"shapes": "widest"}} | sections
    path = make_recipe(root, variant, count=3, **sections)
    for name, changes in (("a", WIDE), ("b", SMALL), ("c", WIDE)):
        shutil.rmtree(root / "models" / name)
        layers = {"num_hidden_layers": 2 if name == "c" else 3}
        head = {"head_dim": VARIANTS[variant].get("head_dim", 8)}
        make_model(root / "models" / name, variant, ord(name), **head | changes | layers)
    return path


@pytest.mark.parametrize("method", mostly_slow(["btx", "harmonized"], "btx"))
def test_a_build_is_verified_and_built_again(method: str, tmp_path: Path) -> None:
    """Loaded in stock transformers; every tensor computed again from the sources and the recipe."""
    recipe = load_recipe(unequal(tmp_path, method=method), ["fit.epochs=1"])
    planned = pipeline.plan(recipe)
    assert any("hidden size 32 to 48, query heads 4 to 6" in note for note in planned.notes)
    assert any("c is padded" in note and "layers 2 to 3" in note for note in planned.notes)
    assert (planned.config["hidden_size"], planned.config["num_hidden_layers"]) == (48, 3)
    run = pipeline.build(recipe, tmp_path / "run")
    layers = run.read_recipe().sources["c"].layers
    assert layers is not None and [n for n in layers if n is not None] == [0, 1]
    checks = pipeline.verify(run, deep=method == "harmonized")
    assert "computes what it does as it is read" in checks["b in stock transformers"]


@pytest.mark.slow
def test_a_build_is_trained_with_its_sources_as_teachers(tmp_path: Path) -> None:
    """Teachers of several hidden sizes, together and one after the other."""
    recipe = load_recipe(unequal(tmp_path, method="btx"), ["train.teacher=sources"])
    first = pipeline.build(recipe, tmp_path / "run")
    losses = []
    for loading in ("together", "in-turn"):
        run = shutil.copytree(first.root, tmp_path / loading)
        trained = type(first)(run)
        pipeline.train(trained, [f"train.teacher_loading={loading}"])
        pipeline.evaluate(trained)
        losses.append(read_metrics(trained).trained)
    assert losses[0] and losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    ("variant", "method"),
    mostly_slow(
        [*((v, "btx") for v in VARIANTS), ("llama", "harmonized"), ("llama", "bam")],
        ("smollm3", "btx"),
        ("olmo2", "btx"),
    ),
)
def test_a_source_and_its_larger_copy_are_the_dense_model(
    variant: str, method: str, tmp_path: Path
) -> None:
    """Law 2 of shapes: what is read of the smaller one is what the larger one is."""
    path = make_recipe(tmp_path, variant, count=2, backbone={"shapes": "widest"}, method=method)
    models = tmp_path / "models"
    shutil.rmtree(models / "a")
    shape, layers = Shape(48, 3, 6, 3), [0, None, 1]
    save_widened(models / "b", shape, tuple(layers), models / "a")
    recipe = load_recipe(path, [f"sources.b.layers={layers}".replace("None", "null")])
    run = pipeline.build(recipe, tmp_path / "run")
    text = random_text(0, 2, 40)
    expected = logits_of(load_clean(models / "b"), text)
    assert difference(logits_of(load_clean(run.checkpoint), text), expected) < 2e-4


@pytest.mark.slow
def test_a_newcomer_has_the_shape_of_the_experts(tmp_path: Path) -> None:
    """A smaller one is padded; a larger one is refused."""
    run = pipeline.build(load_recipe(unequal(tmp_path, method="btx")), tmp_path / "run")
    data, models = str(tmp_path / "b.jsonl"), tmp_path / "models"
    small = make_model(models / "small", "llama", 7, **SMALL)
    more = pipeline.add(run, "small", tmp_path / "more", model=str(small), data=data)
    pipeline.verify(more, deep=True)
    assert more.read_recipe().sources["small"].layers is not None
    for changes, what in (
        ({"num_hidden_layers": 4}, "its number of layers: build anew"),
        ({"hidden_size": 64, "num_attention_heads": 8}, "its experts have 48 channels"),
    ):
        large = make_model(
            models / f"large-{len(changes)}", "llama", 8, **WIDE | {"head_dim": 8} | changes
        )
        with pytest.raises(SourceMismatch, match=what):
            pipeline.add(run, "large", tmp_path / "larger", model=str(large), data=data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("anchor", "what"),
    [("b", "its experts have 48 channels"), ("c", "its number of layers: build anew")],
)
def test_the_largest_source_cannot_leave(anchor: str, what: str, tmp_path: Path) -> None:
    path, models = unequal(tmp_path, method="btx"), tmp_path / "models"
    other = "c" if anchor == "b" else "b"
    shutil.rmtree(models / other)
    shutil.copytree(models / anchor, models / other)  # `a` alone is larger
    recipe = load_recipe(path, [f"anchor={anchor}"])
    run = pipeline.build(recipe, tmp_path / "run")
    with pytest.raises(SourceMismatch, match=what):
        pipeline.remove(run, "a", tmp_path / "less")


@pytest.mark.slow
def test_a_killed_build_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(unequal(tmp_path, method="harmonized"), ["fit.epochs=1"])
    whole = pipeline.build(recipe, tmp_path / "whole")
    new_layer = building.Build._new_layer

    def killed(self: Any, layer: int) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return new_layer(self, layer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building.Build, "_new_layer", killed)
        pipeline.build(recipe, tmp_path / "cut")

    def not_again(*arguments: Any) -> Any:
        raise AssertionError("the places are in the run's recipe")

    monkeypatch.setattr("symphony_moe.building.place_layers.stream_similarities", not_again)
    resumed = pipeline.build(recipe, tmp_path / "cut", resume=True)
    first, second = (read_tensors(run.checkpoint) for run in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.recipe.read_text() == resumed.recipe.read_text()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["backbone.shapes=equal"], "backbone.shapes: widest"),
        (["sources.c.layers=[0, 1]"], "sources.c.layers: expected 3 entries"),
        (["sources.c.layers=[1, null, 0]"], r"expected 3 entries.*got \[1, null, 0\]"),
        (["experts.sources=[a, b]", "sources.c.layers=[0, null, 1]"], "c has .*becomes no expert"),
        (["backbone.shapes=equal", "sources.c.layers=[0, null, 1]"], "set backbone.shapes"),
        (["method=drop-upcycling"], "padded with zeros"),
    ],
)
def test_what_cannot_be_is_refused(
    settings: list[str], expected: str, recipe_of_unequal: Path
) -> None:
    with pytest.raises(SymphonyError, match=expected) as refused:
        pipeline.plan(load_recipe(recipe_of_unequal, settings))
    assert isinstance(refused.value, RecipeError | SourceMismatch)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["method=btx"], ["b, c: of another shape than a"]),
        (["method=btx", "anchor=b"], ["a, c: of another shape than b"]),
        (["method=sparse-upcycling"], []),  # all weights are the anchor's
        (["method=harmonized"], []),
    ],
)
def test_plan_says_whose_weights_are_averaged_across_shapes(
    settings: list[str], expected: list[str], recipe_of_unequal: Path
) -> None:
    notes = pipeline.plan(load_recipe(recipe_of_unequal, settings)).notes
    said = [note for note in notes if "channel by channel" in note]
    assert len(said) == len(expected)
    assert all(note.startswith(start) for note, start in zip(said, expected, strict=True))


def test_heads_of_another_size_are_refused(tmp_path: Path) -> None:
    path = unequal(tmp_path)
    shutil.rmtree(tmp_path / "models" / "b")
    make_model(tmp_path / "models" / "b", "llama", 1, **SMALL | {"head_dim": 16})
    with pytest.raises(SourceMismatch, match=r"head_dim .*depends on the head's size"):
        pipeline.plan(load_recipe(path))


def test_a_shape_that_the_target_does_not_hold_is_refused(tmp_path: Path) -> None:
    """GraniteMoe's heads are of hidden_size / num_attention_heads."""
    path = unequal(tmp_path, "granite")
    for name, hidden, groups in (("a", 48, 1), ("b", 32, 4)):
        shutil.rmtree(tmp_path / "models" / name)
        heads = {"num_attention_heads": hidden // 8, "num_key_value_heads": groups}
        make_model(tmp_path / "models" / name, "granite", 1, hidden_size=hidden, **heads)
    with pytest.raises(SourceMismatch, match=r"query heads 6 to 8.*the heads of a GraniteMoe"):
        pipeline.plan(load_recipe(path))


@pytest.fixture(scope="module")
def recipe_of_unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unequal(tmp_path_factory.mktemp("unequal"))


def test_layers_go_where_the_streams_are_alike() -> None:
    """A model without its second and third layer is matched to itself; without streams, evenly."""
    own, deep = (AutoConfig.for_model("llama", num_hidden_layers=n) for n in (2, 4))
    places = [0, 3, 4]  # of four layers that are behind, where the other has 0, 1 and 2
    alike = torch.full((3, 5), 0.1)
    for n, at in enumerate(places):
        alike[n, at] = 1.0
    alike[0, 1:3] = 0.5
    assert match_layers(own, deep, alike) == (None, None, 0, 1)
    even = match_layers(own, deep)
    assert even is not None and [n for n in even if n is not None] == [0, 1]
    assert even in ((0, None, 1, None), (None, 0, None, 1), (0, None, None, 1), (None, 0, 1, None))


def test_layers_stand_beside_layers_of_their_kind() -> None:
    """Of four layers one has no RoPE; the one of two that has none goes there."""
    own, deep = (
        AutoConfig.for_model("smollm3", num_hidden_layers=len(rope), no_rope_layers=rope)
        for rope in ([1, 0], [1, 1, 1, 0])
    )
    found = match_layers(own, deep)
    assert found is not None and found[3] == 1
    backwards = AutoConfig.for_model("smollm3", num_hidden_layers=2, no_rope_layers=[0, 0])
    assert match_layers(backwards, deep) is None


def test_streams_of_one_model_are_found_in_its_deeper_copy(tmp_path: Path) -> None:
    """CKA knows neither width nor scale: every stream of the copy is as that of the model."""
    model = make_model(tmp_path / "model", "llama", seed=3)
    layers = (0, None, None, 1)
    deep = save_widened(model, Shape(48, 4, 6, 3), layers, tmp_path / "deep")
    text = random_text(0, 8, 40)
    one, other = (stream_similarities(opened(folder), text) for folder in (model, deep))
    alike = cka_of_streams(one, other)
    assert torch.allclose(alike[[0, 1, 1, 1, 2], range(5)], torch.ones(5), atol=1e-5)
    assert float(alike[0, 4]) < 0.9
    found = match_layers(opened(model).config, opened(deep).config, alike)
    assert found is not None and found[0] == 0 and found[3] == 1
