"""`backbone.attention: concatenated`: the attention heads of all sources side by side."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from checks import difference, load_clean, mostly_slow, read_tensors
from conftest import make_recipe
from symphony_moe import pipeline
from symphony_moe.errors import RecipeError, SourceMismatch
from symphony_moe.model.families import HEAD_AXIS, O_PROJ
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_source

CONCATENATED = ["backbone.attention=concatenated", "output.dtype=float32"]
FIT = ["method=harmonized", "fit.epochs=0"]
VARIANTS = mostly_slow(
    ["llama-tied-rope3", "mistral", "qwen2", "qwen3", "smollm3"], "qwen2", "qwen3"
)
"""Half-split and interleaved rotary, windows, biases, QK-norm, a constant for each head."""


@pytest.mark.parametrize(
    "settings", mostly_slow([["method=btx"], FIT], FIT), ids=["merged", "fitted"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_sources_make_the_dense_model(
    variant: str, settings: list[str], tmp_path: Path
) -> None:
    """N copies of each head, of which each puts out an Nth."""
    path = make_recipe(tmp_path / "sources", variant)
    for name in "bc":
        models = path.parent / "models"
        shutil.rmtree(models / name)
        shutil.copytree(models / "a", models / name)
    recipe = load_recipe(path, [*settings, *CONCATENATED])
    run = pipeline.build(recipe, tmp_path / "run")
    model, source = load_clean(run.checkpoint), open_sources(recipe)[0]
    count, heads = len(recipe.sources), source.config.num_attention_heads
    assert model.config.num_attention_heads == count * heads
    assert model.num_parameters() == run.read_json(run.plan)["total_parameters"]
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m(input_ids=tokens).logits for m in (model, load_source(source)))
    assert difference(ours, theirs) < 1e-5
    pipeline.verify(run)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    """Builds of three strangers by some settings, made once each."""
    home, made = tmp_path_factory.mktemp("strangers"), dict[tuple[str, ...], RunFolder]()
    path = make_recipe(home / "sources", "qwen2")

    def get(*settings: str) -> RunFolder:
        if settings not in made:
            out = home / f"run{len(made)}"
            made[settings] = pipeline.build(load_recipe(path, settings), out)
        return made[settings]

    return get


def test_each_source_keeps_its_heads(strangers: Callable[..., RunFolder]) -> None:
    """Queries, keys and values are the sources' own, to the bit; o counts by shares."""
    shares = {"a": 0.5, "b": 0.25, "c": 0.25}
    run = strangers("method=btx", *CONCATENATED, f"backbone.weights={shares}".replace("'", ""))
    written = read_tensors(run.checkpoint)
    names = {"a": 0, "b": 1, "c": 2}
    for source in open_sources(run.read_recipe()):
        for name, axis in HEAD_AXIS.items():
            own = source.read(f"model.layers.1.{name}")
            stored = written[f"model.layers.1.{name}"].chunk(3, dim=axis)[names[source.name]]
            if name == O_PROJ:
                assert torch.equal(stored, own * shares[source.name])
            elif "v_proj" in name:  # q and k are in another order: the target's rotary
                assert torch.equal(stored, own)
            else:
                assert torch.equal(stored.flatten().sort().values, own.flatten().sort().values)


def test_a_fit_has_less_to_give_up(strangers: Callable[..., RunFolder]) -> None:
    """Where every source has its own heads, the stream after attention is closer to the
    sources'."""
    errors = {}
    for how in ("linear", "concatenated"):
        run = strangers(*FIT, "output.dtype=float32", f"backbone.attention={how}")
        layers = run.read_json(run.metrics)["fit"]["layers"]
        errors[how] = layers[0]["attention"]["error"][1]
        wanted = (
            {"q, k and v", "o"}
            if how == "linear"
            else {
                *(f"q, k and v of {name}" for name in "abc"),
                "o",
            }
        )
        assert layers[0]["attention"]["condition"].keys() == wanted
        pipeline.verify(run)
    assert errors["concatenated"] < 0.9 * errors["linear"]


@pytest.mark.slow
def test_the_order_of_sources_permutes_experts_alone(tmp_path: Path) -> None:
    path = make_recipe(tmp_path / "sources", "qwen2")
    runs = []
    for number, names in enumerate(("abc", "cab")):
        recipe = load_recipe(path, [*FIT, *CONCATENATED, "anchor=a"])
        ordered = {name: recipe.sources[name] for name in names}
        recipe = recipe.model_copy(update={"sources": ordered})
        runs.append(pipeline.build(recipe, tmp_path / f"run{number}"))
    first, second = (read_tensors(run.checkpoint) for run in runs)
    for name, tensor in first.items():
        if ".self_attn." in name:
            assert torch.equal(tensor, second[name]), name


def test_a_model_of_many_heads_trains_and_is_evaluated(strangers: Callable[..., RunFolder]) -> None:
    run = strangers("method=btx", *CONCATENATED)
    pipeline.train(run, ["train.tokens=512"])
    metrics = pipeline.evaluate(run, ["evaluation.tokens=128"])
    assert set(metrics.trained or {}) == set(metrics.built or {}) != set()
    pipeline.verify(run)


@pytest.mark.parametrize(
    ("variant", "settings", "said"),
    [
        ("olmo2", [], "norms of q and k take all heads together"),
        ("granite", [], "cannot have the heads of 3 sources"),
        ("qwen2", ["output.architecture=granitemoe"], "cannot have the heads of 3 sources"),
        ("llama", ["method=bam"], "each expert has the heads of its source already"),
    ],
)
def test_what_has_no_room_for_more_heads_is_refused(
    variant: str, settings: list[str], said: str, tmp_path: Path
) -> None:
    path = make_recipe(tmp_path, variant)
    with pytest.raises((RecipeError, SourceMismatch), match=said):
        pipeline.plan(load_recipe(path, ["backbone.attention=concatenated", *settings]))


def test_experts_of_such_a_run_do_not_come_and_go(strangers: Callable[..., RunFolder]) -> None:
    run = strangers("method=btx", *CONCATENATED)
    out = run.root.with_name("changed")
    with pytest.raises(RecipeError, match=r"concatenated.*build anew"):
        pipeline.remove(run, "c", out)
    assert not out.exists()


def test_the_plan_says_what_it_costs(strangers: Callable[..., RunFolder]) -> None:
    few, many = (
        strangers("method=btx", *more) for more in (["output.dtype=float32"], CONCATENATED)
    )
    plans: list[Any] = [run.read_json(run.plan) for run in (few, many)]
    assert any("KV cache" in note and "3 times" in note for note in plans[1]["notes"])
    assert not any("KV cache" in note for note in plans[0]["notes"])
    grown = plans[1]["total_parameters"] - plans[0]["total_parameters"]
    config = AutoConfig.from_pretrained(many.checkpoint)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    matrices = 2 * heads * config.head_dim + 2 * groups * config.head_dim
    biases = heads * config.head_dim + 2 * groups * config.head_dim
    of_layer = (matrices * config.hidden_size + biases) * 2 // 3
    assert grown == config.num_hidden_layers * of_layer
