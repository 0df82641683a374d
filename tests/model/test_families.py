"""Every family's table agrees with the family's own module and with its target's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from checks import ExactNorm, logits_of
from conftest import ARCHITECTURES, SIZES, VARIANTS, make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.building.plan import output_tensors
from symphony_moe.errors import SourceError, SourceMismatch
from symphony_moe.model.families import (
    FAMILIES,
    NEURON_AXIS,
    TARGETS,
    Family,
    Target,
    head_dim,
    target_config,
    usual_shapes,
)
from symphony_moe.model.layer import decoder_layer, one_layer_model
from symphony_moe.model.moe_layer import (
    MoELayer,
    interleave_rotary,
    layer_outputs,
    read_layer_outputs,
    undo_interleave_rotary,
)
from symphony_moe.model.symmetry import NeuronMap, reorder_neurons
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.settings import SourceSpec
from symphony_moe.sources.opening import open_source


def load_dense(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if dtype == torch.float64:
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(name, ExactNorm(module))
    return model


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_permuting_neurons_leaves_the_logits(
    variant: str, dtype: torch.dtype, tolerance: float, recipes: Callable[[str], Path]
) -> None:
    """Law 1: another order of neurons in every layer is the same model."""
    model = load_dense(recipes(variant).parent / "models" / "a", dtype)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(300, (3, 40), generator=generator)
    before = logits_of(model, text)
    for layer in model.model.layers:
        order = torch.randperm(model.config.intermediate_size, generator=generator)
        ffn = {name: layer.get_parameter(name).data for name in NEURON_AXIS}
        reordered = reorder_neurons(ffn, NeuronMap(order, torch.ones(len(order))))
        for name in NEURON_AXIS:
            assert not torch.equal(reordered[name], ffn[name])
            layer.get_parameter(name).data = reordered[name]
    after = logits_of(model, text)
    assert after.dtype == dtype
    assert float((after - before).abs().max() / before.abs().max()) <= tolerance


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(1, 5), half=st.integers(1, 8), width=st.one_of(st.none(), st.just(3)))
def test_interleaving_moves_row_j_and_its_partner_together(
    heads: int, half: int, width: int | None
) -> None:
    """In every head: row 2j is the old row j, row 2j + 1 the old row j + d/2; weights and biases
    alike. Undone, every row is back."""
    size = 2 * half
    shape = (heads * size,) if width is None else (heads * size, width)
    rows = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    moved = interleave_rotary(rows, size)
    assert moved.shape == rows.shape
    for head in range(heads):
        first = head * size
        for j in range(half):
            assert torch.equal(moved[first + 2 * j], rows[first + j])
            assert torch.equal(moved[first + 2 * j + 1], rows[first + j + half])
    assert torch.equal(undo_interleave_rotary(moved, size), rows)


@pytest.mark.parametrize(
    ("variant", "target"),
    [
        *((variant, Target("shared", ARCHITECTURES.get(variant, "auto"))) for variant in VARIANTS),
        ("llama", Target("shared", "granitemoe")),
        ("llama", Target("source")),
    ],
)
def test_a_written_layer_is_read_back(
    variant: str, target: Target, recipes: Callable[[str], Path]
) -> None:
    """What the target's names and row order hold is the layer in the dense family's own layout, bit
    for bit; and experts in another order take their router rows along."""
    folder = recipes(variant).parent / "models"
    specs = {n: SourceSpec(model=str(folder / n), data="unread.jsonl") for n in "abc"}
    sources = [open_source(name, spec, target=target) for name, spec in specs.items()]
    family, config = sources[0].family, sources[0].config
    layers = [source.read_layer(1) for source in sources]
    generator = torch.Generator().manual_seed(0)
    router, other = (
        dict(zip("abc", rows, strict=True))
        for rows in torch.randn(2, 3, config.hidden_size, generator=generator)
    )
    moe = MoELayer(
        {name: layers[0][name] for name in family.shared},
        {
            source: {name: layer[name] for name in family.expert}
            for source, layer in zip("abc", layers, strict=True)
        },
        router,
        other if target.attention == "source" else None,
    )
    written = dict(layer_outputs(family, config, 1, moe, "abc"))
    assert all(name.startswith("model.layers.1.") for name in written)
    back = read_layer_outputs(family, config, 1, "abc", written.__getitem__)
    assert_same(back, moe)
    if family.interleaved_rotary:
        name = "model.layers.1.self_attn.q_proj.weight"
        assert not torch.equal(written[name], moe.shared["self_attn.q_proj.weight"])

    other_way = dict(layer_outputs(family, config, 1, moe, "cab"))
    assert other_way.keys() == written.keys()
    in_turn = read_layer_outputs(family, config, 1, "abc", other_way.__getitem__)
    for place, source in zip("abc", "cab", strict=True):
        assert torch.equal(in_turn.router[place], router[source])
        if in_turn.attention_router is not None:
            assert torch.equal(in_turn.attention_router[place], other[source])
        for name in family.expert:
            assert torch.equal(in_turn.experts[place][name], moe.experts[source][name])
    assert_same(read_layer_outputs(family, config, 1, "cab", other_way.__getitem__), moe)


def assert_same(found: MoELayer, expected: MoELayer) -> None:
    assert found.experts.keys() == expected.experts.keys()
    pairs = [(found.router, expected.router)]
    if expected.attention_router is None:
        assert found.attention_router is None
    else:
        assert found.attention_router is not None
        pairs.append((found.attention_router, expected.attention_router))
    pairs += [(found.experts[name], expected.experts[name]) for name in expected.experts]
    for ours, theirs in [(found.shared, expected.shared), *pairs]:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_target_accepts_the_planned_config(
    variant: str, recipes: Callable[[str], Path]
) -> None:
    """Stock AutoConfig reads it, and the model it makes has as many parameters as planned, of the
    planned class, with every setting as written."""
    planned = pipeline.plan(load_recipe(recipes(variant)))
    config = AutoConfig.for_model(**planned.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [type(model).__name__] == planned.config["architectures"]
    assert model.num_parameters() == planned.total_parameters
    one_expert = 3 * config.hidden_size * config.intermediate_size
    spared = one_expert * config.num_hidden_layers * (3 - 2)
    assert planned.active_parameters == planned.total_parameters - spared
    dense = AutoConfig.from_pretrained(recipes(variant).parent / "models" / "a")
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "num_key_value_heads",
        "max_position_embeddings",
        "rope_parameters",
        "hidden_act",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(config, name) == getattr(dense, name), name
    assert head_dim(config) == head_dim(dense)
    assert window_of(config) == window_of(dense)
    assert (config.num_experts_per_tok, model.num_experts) == (2, 3)


def window_of(config: Any) -> int | None:
    """How far back attention sees, where that is less than the context. (GraniteMoeSWA has a window
    in any case.)"""
    size = getattr(config, "sliding_window", None)
    return None if size is None or size >= config.max_position_embeddings else int(size)


def test_every_family_is_tested() -> None:
    """A new row of the table needs a variant in conftest."""
    assert {settings["model_type"] for settings in VARIANTS.values()} == set(FAMILIES)
    assert all(targets.keys() == FAMILIES.keys() for targets in TARGETS.values())


@pytest.mark.parametrize(
    ("variant", "changes", "reason"),
    [
        ("llama", {"mlp_bias": True}, "no stock MoE has FFN biases"),
        ("granite", {"mlp_bias": True}, "no stock MoE has FFN biases"),
        ("granite", {"head_dim": 16}, "heads of a GraniteMoe are of hidden_size / num"),
        (
            "llama",
            {"attention_bias": True, "head_dim": 16},
            "Mixtral has no attention biases.*heads of a GraniteMoe are of hidden_size / num",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "no layers with a sliding window beside layers without",
        ),
        ("qwen3", {"attention_bias": True}, "attention biases are not in this family's table"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_variants_that_no_target_holds_are_refused_with_the_reason(
    variant: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Better no model than one that silently drops a bias or a window."""
    folder = make_model(tmp_path / "refused", variant, 0, **changes)
    spec = SourceSpec(model=str(folder), data="unread.jsonl")
    with pytest.raises(SourceError, match=f"^who: .*refused.*{reason}"):
        open_source("who", spec)


@pytest.mark.parametrize(
    ("variant", "changes", "reason"),
    [
        ("mistral", {"head_dim": None}, "GraniteMoe has no sliding window"),
        ("mistral", {"sliding_window": None}, "heads of a GraniteMoe are of hidden_size / num"),
        ("llama", {"head_dim": 16}, "heads of a GraniteMoe are of hidden_size / num"),
        ("qwen2", {"head_dim": 16}, "heads of a GraniteMoe are of hidden_size / num"),
    ],
)
def test_what_granitemoe_does_not_hold_is_refused(
    variant: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Other programs take the size of a head from hidden_size, whatever the config says."""
    folder = make_model(tmp_path / "refused", variant, 0, **changes)
    spec = SourceSpec(model=str(folder), data="unread.jsonl")
    with pytest.raises(SourceError, match=f"^who: .*refused.*{reason}"):
        open_source("who", spec, target=Target("shared", "granitemoe"))


@pytest.mark.parametrize(
    ("attention", "family"),
    [(a, family) for a, rows in TARGETS.items() for row in rows.values() for family in row],
    ids=lambda value: value if isinstance(value, str) else f"{value.dense}-{value.moe}",
)
def test_what_a_target_has_beyond_the_family_is_known_by_its_name(
    attention: str, family: Family
) -> None:
    """Of the parameters of the stock class, which may call them otherwise than its file does."""
    del attention
    shape: dict[str, Any] = {**SIZES, "model_type": family.dense, "tie_word_embeddings": False}
    shape["attention_bias"] = "self_attn.o_proj.bias" in family.vectors
    dense = AutoConfig.for_model(**shape)
    settings = target_config(family, dense, 3, 2, tied=False, dtype="float32")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    found = [n for n, _ in model.named_parameters() if family.constant(n) is not None]
    per_layer, layers = len(family.zeros) + len(family.constants), dense.num_hidden_layers
    assert len(found) == layers * per_layer + family.has_head_bias
    written = output_tensors(family, dense, 3, tied=False)
    assert sum(family.constant(name) is not None for name in written) == layers * per_layer


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        ("granite", {"residual_multiplier": 0.5}, "residual_multiplier .*one for all experts"),
        ("llama", {"attention_bias": True}, "biases of attention .*same shapes"),
        ("granite", {"attention_bias": True}, "biases of attention .*same shapes"),
        (
            "qwen2-windows",
            {"use_sliding_window": False},
            "architecture that holds it .*name it as output.architecture",
        ),
    ],
)
def test_sources_that_no_one_architecture_holds_are_refused(
    variant: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, variant, count=2)
    make_model(tmp_path / "models" / "b", variant, 1, **changes)
    with pytest.raises(SourceMismatch, match=said):
        pipeline.plan(load_recipe(recipe))


def test_windows_in_some_sources_alone_go_where_both_are_held(tmp_path: Path) -> None:
    """What `auto` takes for each is another architecture; a recipe that names one that holds all is
    planned, with a warning of the windows."""
    recipe = make_recipe(tmp_path, "qwen2-windows", count=2)
    make_model(tmp_path / "models" / "b", "qwen2-windows", 1, use_sliding_window=False)
    planned = pipeline.plan(load_recipe(recipe, ["output.architecture=qwen2_moe"]))
    assert planned.architecture == "qwen2_moe"
    assert any(difference.what == "sliding_window" for difference in planned.differences)


def test_settings_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    """A window that is switched off is no window (as in every Qwen2.5 config)."""
    folder = make_model(
        tmp_path / "model",
        "qwen2",
        0,
        use_sliding_window=False,
        sliding_window=16,
        max_window_layers=1,
    )
    assert open_source("who", SourceSpec(model=str(folder), data="unread.jsonl")).headers


# Shapes without the family's module

SHAPES: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 1},
    {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
    {"intermediate_size": 24, "vocab_size": 50},
]
ODD: list[dict[str, Any]] = [
    {"hidden_act": "gelu"},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"num_attention_heads": 6, "num_key_value_heads": 4},
    {"head_dim": 7},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    {"num_key_value_heads": 0},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_usual_shapes_are_those_of_the_familys_module(family: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, **SIZES | changes)
    found = usual_shapes(FAMILIES[family], config)
    assert found is not None
    module = decoder_layer(one_layer_model(config, 0))
    assert found == {name: tuple(t.shape) for name, t in module.state_dict().items()}


@pytest.mark.parametrize("changes", ODD, ids=str)
def test_what_is_out_of_the_ordinary_is_asked_of_the_module(changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    for name, value in changes.items():
        setattr(config, name, value)
    assert usual_shapes(FAMILIES["llama"], config) is None
