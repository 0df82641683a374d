"""`experts.shared_weight`: an expert, merged from all sources, that every token goes through."""

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
    random_text,
    read_tensors,
    with_small_outputs,
)
from conftest import make_model, make_recipe, make_text
from symphony_moe import pipeline
from symphony_moe.errors import RecipeError
from symphony_moe.recipe.load import load_recipe

SHARED = ["method=symphony", "output.dtype=float32"]


def test_identical_sources_give_the_dense_model(tmp_path: Path) -> None:
    """Law 2 in stock transformers, whatever the weight, beside a layer without experts."""
    sources = {n: {"model": "models/a", "data": f"{n}.jsonl"} for n in "abc"}
    path = make_recipe(tmp_path / "sources", "llama", sources=sources)
    asked = [*SHARED, "experts.shared_weight=0.3", "router.init=regression"]
    run = pipeline.build(load_recipe(path, asked), tmp_path / "run")
    moe, dense = load_clean(run.checkpoint), load_clean(models_of(path) / "a")
    assert moe.config.model_type == "qwen2_moe"
    assert moe.config.shared_expert_intermediate_size == 48
    assert moe.num_parameters() == run.read_json(run.plan)["total_parameters"]
    text = random_text(0, 2, 48)
    assert difference(logits_of(moe, text), logits_of(dense, text)) <= EXACT
    pipeline.verify(run)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama-tied-rope3", "qwen2", "qwen2-windows"])
@pytest.mark.parametrize("more", [[], ["experts.per_source=2"], ["experts.dense_layers=[1]"]])
def test_the_law_holds_for_every_family_and_beside_the_other_settings(
    variant: str, more: list[str], tmp_path: Path
) -> None:
    sources = {n: {"model": "models/a", "data": f"{n}.jsonl"} for n in "abc"}
    path = make_recipe(tmp_path / "sources", variant, sources=sources)
    asked = [*SHARED, "experts.shared_weight=0.5", *more]
    run = pipeline.build(load_recipe(path, asked), tmp_path / "run")
    moe, dense = load_clean(run.checkpoint), load_clean(models_of(path) / "a")
    text = random_text(0, 2, 48)
    assert difference(logits_of(moe, text), logits_of(dense, text)) <= EXACT
    pipeline.verify(run)


def test_strangers_share_the_weighted_mean_of_their_ffns(
    recipes: Callable[[str], Path], tmp_path: Path
) -> None:
    """What is written is the mean, at twice its weight: the sigmoid of a gate of zeros is half."""
    asked = [*SHARED, "align.neurons=none", "experts.shared_weight=0.25"]
    run = pipeline.build(load_recipe(recipes("llama"), asked), tmp_path / "run")
    written, sources = (
        read_tensors(run.checkpoint),
        [read_tensors(models_of(recipes("llama")) / name) for name in "abc"],
    )
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp."
        assert not written[f"{prefix}shared_expert_gate.weight"].any()
        for part, times in (("gate", 1), ("up", 1), ("down", 0.5)):
            name = f"{part}_proj.weight"
            mean = torch.stack([source[prefix + name] for source in sources]).mean(dim=0)
            torch.testing.assert_close(written[f"{prefix}shared_expert.{name}"], times * mean)
        for number, source in enumerate(sources):
            own = source[f"{prefix}down_proj.weight"] * 0.75
            torch.testing.assert_close(written[f"{prefix}experts.{number}.down_proj.weight"], own)
    pipeline.verify(run)


@pytest.mark.slow
def test_a_shared_expert_learns_and_is_kept(tmp_path: Path) -> None:
    """Training, evaluation and a change of experts, of a trained model whose gate is not zero."""
    path = make_recipe(tmp_path / "sources")
    run = pipeline.build(
        load_recipe(path, [*SHARED, "experts.shared_weight=0.5"]), tmp_path / "run"
    )
    pipeline.train(run)
    trained = read_tensors(run.trained)
    prefix = "model.layers.0.mlp.shared_expert"
    assert trained[f"{prefix}_gate.weight"].any()
    metrics = pipeline.evaluate(run)
    assert len(metrics.cka["trained"].layers) == 2
    assert "and a shared one" in pipeline.report(run).read_text()
    pipeline.verify(run)
    model = make_model(tmp_path / "d", "llama", seed=7)
    text = make_text(tmp_path / "d.jsonl", seed=7)
    more = pipeline.add(run, "d", tmp_path / "more", model=str(model), data=str(text))
    after = read_tensors(more.checkpoint)
    assert all(torch.equal(t, after[n]) for n, t in trained.items() if n.startswith(prefix))
    pipeline.verify(more)


def test_small_numbers_are_rounded_once(tmp_path: Path) -> None:
    """In a build, and as it is read again: float16 has fewer digits for the half of one."""
    path = make_recipe(tmp_path / "sources")
    for name in "abc":
        edit_weights(models_of(path) / name, with_small_outputs)
    asked = ["method=btx", "output.dtype=float16", "experts.shared_weight=0.3"]
    run = pipeline.build(load_recipe(path, asked), tmp_path / "run")
    pipeline.verify(run)
    less = pipeline.remove(run, "c", tmp_path / "less", overrides=["router.top_k=2"])
    before, after = read_tensors(run.checkpoint), read_tensors(less.checkpoint)
    kept = [name for name in before if ".shared_expert" in name]
    assert len(kept) == 8 and all(torch.equal(before[name], after[name]) for name in kept)
    pipeline.verify(less)


def plan_of(path: Path, *settings: str) -> Any:
    return pipeline.plan(load_recipe(path, settings))


def test_a_plan_says_what_a_shared_expert_costs(recipes: Callable[[str], Path]) -> None:
    """One FFN more for every token, in place of the one neuron of a target without."""
    path, target = recipes("llama"), "output.architecture=qwen2_moe"
    without, with_one = plan_of(path, target), plan_of(path, "experts.shared_weight=0.5")
    more = 2 * (48 - 1) * 3 * 32
    assert with_one.total_parameters - without.total_parameters == more
    assert with_one.active_parameters - without.active_parameters == more
    assert "shared expert of weight 0.5" in " ".join(with_one.notes)


@pytest.mark.parametrize(
    ("variant", "settings", "words"),
    [
        ("qwen3", [], "qwen3_moe would hold qwen3, and has no shared expert; leave"),
        ("llama", ["output.architecture=mixtral"], "set output.architecture to qwen2_moe"),
        ("llama", ["method=harmonized"], "a fit .fit.method. knows no shared expert"),
        ("llama", ["method=bam"], "has no shared one"),
    ],
)
def test_a_shared_expert_is_refused_before_work(
    variant: str, settings: list[str], words: str, recipes: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError, match=words) as raised:
        plan_of(recipes(variant), "experts.shared_weight=0.5", *settings)
    assert len(str(raised.value)) < 500
