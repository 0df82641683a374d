"""`experts.per_source`: each source's FFN, dealt into several experts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checks import (
    EXACT,
    difference,
    edit_weights,
    load_clean,
    logits_of,
    models_of,
    mostly_slow,
    random_text,
    with_small_outputs,
)
from conftest import VARIANTS, make_model, make_recipe, target_of_variant
from symphony_moe import pipeline
from symphony_moe.errors import RecipeError, SourceMismatch
from symphony_moe.model.families import DOWN, GATE, UP
from symphony_moe.model.moe_layer import MoELayer, join_slices, slice_experts, slice_names
from symphony_moe.recipe.load import load_recipe

CASES = mostly_slow([*VARIANTS], "qwen2", "qwen2-granitemoe")
"""An expert of its own name each; experts in one tensor, in a family's other target."""


def wide(root: Path, variant: str, *names: str) -> Path:
    """A recipe of sources `names`, whose FFNs have 64 neurons."""
    sources = {
        n: {"model": f"models/{m}", "data": f"{n}.jsonl"} for n, m in zip("abc", names, strict=True)
    }
    path = make_recipe(root, variant, sources=sources)
    for number, name in enumerate(dict.fromkeys(names)):
        make_model(models_of(path) / name, variant, seed=number, intermediate_size=64)
    return path


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """variant -> recipe of one model and its text, thrice, made once."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = wide(tmp_path_factory.mktemp("twins"), variant, *"aaa")
        return made[variant]

    return get


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of three random models."""
    return wide(tmp_path_factory.mktemp("strangers"), "llama", *"abc")


@pytest.mark.parametrize("count", mostly_slow([2, 8], 8))
@pytest.mark.parametrize("variant", CASES)
def test_identical_sources_give_the_dense_model(
    variant: str, count: int, twins: Callable[[str], Path], tmp_path: Path
) -> None:
    """Law 2 in stock transformers, for two sources of three per token and a random router."""
    path = twins(variant)
    asked = ["method=btx", f"experts.per_source={count}", f"seed={count}"]
    run = pipeline.build(load_recipe(path, asked), tmp_path / "run")
    moe, dense = load_clean(run.checkpoint), load_clean(models_of(path) / "a")
    assert moe.config.num_experts_per_tok == 2 * count
    width = "intermediate_size"
    if target_of_variant(variant) in ("ernie4_5_moe", "qwen2_moe", "qwen3_moe"):
        width = "moe_intermediate_size"
    assert getattr(moe.config, width) == 64 // count
    plan = run.read_json(run.plan)
    assert moe.num_parameters() == plan["total_parameters"]
    text = random_text(0, 2, 48)
    assert difference(logits_of(moe, text), logits_of(dense, text)) <= EXACT
    pipeline.verify(run)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["method=symphony"], id="random", marks=pytest.mark.slow),
        pytest.param(["method=btx", "router.init=regression", "router.top_k=1"], id="regression"),
    ],
)
def test_a_source_computes_the_same_however_many_experts_it_gives(
    settings: list[str], strangers: Path, tmp_path: Path
) -> None:
    """For strangers, and whatever the router: it takes all experts of a source, or none."""
    text, found = random_text(0, 4, 64), []
    for count in (1, 4):
        recipe = load_recipe(strangers, [*settings, f"experts.per_source={count}"])
        run = pipeline.build(recipe, tmp_path / f"run{count}")
        found.append(logits_of(load_clean(run.checkpoint), text))
    assert difference(found[1], found[0]) <= EXACT


@pytest.mark.slow
def test_a_fitted_model_is_the_same_however_many_experts_a_source_gives(
    strangers: Path, tmp_path: Path
) -> None:
    text, found = random_text(0, 4, 64), []
    for count in (1, 4):
        asked = ["method=harmonized", "fit.epochs=0", f"experts.per_source={count}"]
        run = pipeline.build(load_recipe(strangers, asked), tmp_path / f"run{count}")
        found.append(logits_of(load_clean(run.checkpoint), text))
        pipeline.verify(run)
    assert difference(found[1], found[0]) <= EXACT


@pytest.mark.parametrize("router", ["random", "hidden"])
def test_small_numbers_are_rounded_once(router: str, tmp_path: Path) -> None:
    """float16 has fewer digits for them: what is multiplied first and rounded then is another
    number than what is rounded first."""
    path = wide(tmp_path / "sources", "llama", *"abc")
    for name in "abc":
        edit_weights(models_of(path) / name, with_small_outputs)
    asked = ["method=btx", "output.dtype=float16", "experts.per_source=2", f"router.init={router}"]
    pipeline.verify(pipeline.build(load_recipe(path, asked), tmp_path / "run"))


@pytest.mark.parametrize("router", ["ridge", "hidden", "regression"])
def test_sources_with_one_text_are_refused(router: str, recipes: Callable[[str], Path]) -> None:
    """Their router rows would be the same, and a token would get slices of both."""
    asked = ["method=btx", f"router.init={router}", 'sources.c.data=["b.jsonl"]']
    with pytest.raises(RecipeError, match=r"per_source: b and c have the same data") as raised:
        load_recipe(recipes("llama"), [*asked, "experts.per_source=2"])
    assert len(str(raised.value)) < 500
    load_recipe(recipes("llama"), asked)
    load_recipe(recipes("llama"), [*asked, "experts.per_source=2", "router.init=random"])
    only = ["experts.per_source=2", 'experts.sources=["a","b"]']
    load_recipe(recipes("llama"), [*asked, *only])


def test_router_rows_that_are_the_same_stop_a_build(tmp_path: Path) -> None:
    """Of text that is the same under two names. With whole experts that is no harm."""
    path = make_recipe(tmp_path / "sources")
    shutil.copyfile(path.parent / "b.jsonl", path.parent / "c.jsonl")
    asked = ["method=btx", "router.init=hidden"]
    pipeline.verify(pipeline.build(load_recipe(path, asked), tmp_path / "whole"))
    with pytest.raises(SourceMismatch, match=r"b and c have the same router row in layer 0") as it:
        pipeline.build(load_recipe(path, [*asked, "experts.per_source=2"]), tmp_path / "run")
    assert len(str(it.value)) < 500


def test_joined_slices_are_the_experts_again() -> None:
    """To the bit: powers of two keep all digits of numbers that are not the smallest."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    experts = {
        name: {GATE: drawn(16, 8), UP: drawn(16, 8), DOWN: drawn(8, 16)} for name in ("a", "b")
    }
    layer = MoELayer({}, experts, {"a": drawn(8), "b": drawn(8)})
    for count in (2, 16):
        dealt = slice_experts(layer, count)
        assert torch.equal(dealt.experts["a.1"][GATE], experts["a"][GATE][1::count])
        assert list(dealt.experts) == slice_names(["a", "b"], count)
        again = join_slices(dealt, ["a", "b"], count)
        for name, expert in experts.items():
            assert torch.equal(again.router[name], layer.router[name])
            for key, tensor in expert.items():
                assert torch.equal(again.experts[name][key], tensor)
                assert again.experts[name][key].dtype == tensor.dtype


def plan_of(path: Path, *settings: str) -> Any:
    return pipeline.plan(load_recipe(path, settings))


def test_a_plan_counts_what_a_token_passes_through(strangers: Path) -> None:
    """Three more rows for each row of the routers, in both layers; the same otherwise, and read by
    the same programs."""
    one, four = (plan_of(strangers, f"experts.per_source={count}") for count in (1, 4))
    rows = 2 * 3 * 3 * 32
    assert four.total_parameters - one.total_parameters == rows
    assert four.active_parameters - one.active_parameters == rows
    assert "a token has 8, all of 2 source(s) until training" in " ".join(four.notes)
    assert [str(reading) for reading in four.readers] == [str(each) for each in one.readers]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (["experts.per_source=3"], RecipeError, "1, 2, 4, 8 or 16"),
        (["experts.per_source=2", "method=bam"], RecipeError, "not dealt into several"),
        (["experts.per_source=2", "evaluation.thresholds=[0.2]"], RecipeError, "thresholds"),
        (["experts.per_source=2", "router.top_k=4"], RecipeError, "only 3 sources"),
    ],
)
def test_several_experts_are_refused_before_work(
    settings: list[str], error: type[Exception], words: str, recipes: Callable[[str], Path]
) -> None:
    with pytest.raises(error, match=words):
        plan_of(recipes("llama"), *settings)


def test_experts_that_stock_classes_cannot_multiply_are_refused(
    recipes: Callable[[str], Path],
) -> None:
    with pytest.raises(SourceMismatch, match=r"48 neurons .* into 4 .* are 12 each.* Set it to 2"):
        plan_of(recipes("llama"), "experts.per_source=4")


def test_experts_of_several_do_not_come_and_go(
    recipes: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = load_recipe(recipes("llama"), ["method=btx", "experts.per_source=2"])
    run = pipeline.build(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"2 experts of each source .* build anew"):
        pipeline.remove(run, "b", tmp_path / "less")
    assert not (tmp_path / "less").exists()
