"""What a training is said to take, before it is begun."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from symphony_moe import pipeline
from symphony_moe.building.plan import make_plan
from symphony_moe.cli import main
from symphony_moe.recipe.load import load_recipe
from symphony_moe.sources.opening import open_sources
from symphony_moe.training_cost import TrainingCost

Recipes = Callable[[str], Path]
BATCH = ["train.batch_size=2", "train.sequence_length=32", "train.gradient_accumulation=1"]


@pytest.fixture
def cost_of(recipes: Recipes) -> Callable[..., TrainingCost]:
    def cost(*settings: str, variant: str = "llama", **tensors: tuple[int, ...]) -> TrainingCost:
        recipe = load_recipe(recipes(variant), [*BATCH, *settings])
        sources = open_sources(recipe)
        planned = make_plan(recipe, sources)
        found = TrainingCost.of(planned, recipe, sources)
        return TrainingCost(recipe, sources, {**found.tensors, **tensors}, found.active)

    return cost


def seconds_of(cost: TrainingCost) -> float:
    assert cost.seconds is not None
    return cost.seconds


EXPERT, ROUTER, NORM = (
    f"model.layers.9.{name}.weight"
    for name in (
        "block_sparse_moe.experts.0.w1",
        "block_sparse_moe.gate",
        "input_layernorm",
    )
)
LARGE = (1000, 1_000_000)


@pytest.mark.parametrize(
    ("scope", "tensor", "bytes_each"),
    [
        *(("all", tensor, 16) for tensor in (EXPERT, ROUTER, NORM)),
        *(("experts", tensor, 16) for tensor in (EXPERT, ROUTER)),
        ("experts", NORM, 4),
        ("router", ROUTER, 16),
        *(("router", tensor, 4) for tensor in (EXPERT, NORM)),
    ],
)
def test_what_learns_has_a_gradient_and_two_moments(
    scope: str, tensor: str, bytes_each: int, cost_of: Callable[..., TrainingCost]
) -> None:
    """Beside the weights, in float32."""
    without = cost_of(f"train.scope={scope}")
    found = cost_of(f"train.scope={scope}", **{tensor: LARGE})
    # What is gone when the gradients come, such as logits, is little here.
    grown = found.peak_bytes - without.peak_bytes
    assert grown == pytest.approx(bytes_each * 10**9, rel=1e-3)


def test_averaging_holds_the_model_thrice(cost_of: Callable[..., TrainingCost]) -> None:
    """Which is less than a step of all weights holds, and more than one of the router."""
    large = {EXPERT: LARGE}
    router, averaged = (
        cost_of("train.scope=router", f"train.average={asked}", **large) for asked in (False, True)
    )
    assert averaged.peak_bytes - router.peak_bytes > 1.99 * 4 * 10**9
    for asked in (False, True):
        of_all = cost_of("train.scope=all", f"train.average={asked}", **large)
        assert of_all.peak_bytes - averaged.peak_bytes > 0.99 * 4 * 10**9


def test_a_larger_batch_takes_more_and_checkpointing_less(
    cost_of: Callable[..., TrainingCost],
) -> None:
    many = "train.sequence_length=100000"
    whole = cost_of(many)
    assert cost_of(many, "train.batch_size=4").peak_bytes > 1.5 * whole.peak_bytes
    checkpointed = cost_of(many, "train.gradient_checkpointing=true")
    assert checkpointed.peak_bytes < whole.peak_bytes
    assert seconds_of(checkpointed) > seconds_of(whole)


def test_teachers_take_memory_and_time(cost_of: Callable[..., TrainingCost]) -> None:
    """In turn less than together."""
    alone, together, in_turn = (
        cost_of(*settings)
        for settings in (
            [],
            ["train.teacher=sources", "train.teacher_loading=together"],
            ["train.teacher=sources", "train.teacher_loading=in-turn"],
        )
    )
    assert alone.peak_bytes < in_turn.peak_bytes < together.peak_bytes
    assert seconds_of(alone) < seconds_of(together)


def test_time_grows_with_the_tokens(cost_of: Callable[..., TrainingCost]) -> None:
    def seconds(tokens: int, *more: str) -> float:
        return seconds_of(cost_of(f"train.tokens={tokens}", *more))

    first, second, third = (seconds(10**8 * n) for n in (1, 2, 3))
    assert third - second == pytest.approx(second - first)
    assert seconds(10**8, "train.scope=router") < first


def test_what_a_gpu_takes_is_not_known(
    cost_of: Callable[..., TrainingCost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (10, 20))
    cost = cost_of()
    assert cost.seconds is None
    assert "the GPU has 0 MB" in cost.beyond_memory()


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    memory = SimpleNamespace(total=0, available=0)
    monkeypatch.setattr("symphony_moe.training_cost.psutil.virtual_memory", lambda: memory)
    yield memory


def test_what_needs_less_memory_is_named(
    cost_of: Callable[..., TrainingCost], small_machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the first that fits; nothing where all fits, and nothing of a sharded model."""
    cost = cost_of("train.sequence_length=100000", "train.average=true", **{EXPERT: LARGE})
    said = cost.beyond_memory()
    named = [part.partition(" it takes")[0] for part in said.split("With ")[1:]]
    assert named == [
        "train.gradient_checkpointing: true",
        "train.gradient_checkpointing: true and train.batch_size: 1",
        "train.scope: router and train.gradient_checkpointing: true and train.batch_size: 1",
        "train.scope: router and train.gradient_checkpointing: true and train.batch_size: 1 and "
        "train.average: false",
    ]
    assert len(said) < 500 + 200 and "this machine has 0 MB" in said
    small_machine.total = cost.peak_bytes - 1
    assert cost.beyond_memory().count("With ") == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not cost.beyond_memory()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    small_machine.total += 1
    assert not cost.beyond_memory()


def test_plan_says_it_and_run_says_it_before_it_builds(
    recipes: Recipes,
    small_machine: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = recipes("llama")

    def build(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "build", build)
    for memory in (10**12, 10**6):
        small_machine.total = memory
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(load_recipe(path), tmp_path / "run")
        warned = any(m.startswith("training takes about") for m in caplog.messages)
        assert warned == (memory == 10**6)
        assert main(["plan", str(path)]) == 0
        shown = capsys.readouterr().out
        assert "GB in training" in shown and "for training" in shown
        assert ("training takes about" in shown) == warned
        logging.getLogger("symphony_moe").propagate = True  # the command has set it


def test_a_training_says_it_of_its_own_settings(
    recipes: Recipes,
    small_machine: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = pipeline.build(load_recipe(recipes("llama"), ["method=btx"]), tmp_path / "run")
    recipe = run.read_recipe()
    sources = open_sources(recipe)
    whole = TrainingCost.of(make_plan(recipe, sources), recipe, sources).peak_bytes
    small_machine.total = small_machine.available = whole + 10**6
    tokens = "train.tokens=4096"
    pipeline.train(run, [tokens, "train.sequence_length=1024", "train.batch_size=2"])
    assert any(m.startswith("training takes about") for m in caplog.messages)
    caplog.clear()
    pipeline.train(run, [tokens, "train.scope=router"], overwrite=True)
    assert not any(m.startswith("training takes about") for m in caplog.messages)
