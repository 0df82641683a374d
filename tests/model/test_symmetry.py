"""Law 1: every symmetry leaves the logits of every family as they were. The law can fail."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from checks import ExactNorm, logits_of, mostly_slow
from conftest import VARIANTS, make_model
from symphony_moe.model.families import (
    DOWN,
    EMBEDDING,
    FAMILIES,
    FINAL_NORM,
    HEAD,
    UP,
    Family,
    head_dim,
)
from symphony_moe.model.symmetry import (
    HeadMap,
    NeuronMap,
    fold_gains,
    gain_of,
    identity_heads,
    neutral_gain,
    random_heads,
    random_neurons,
    random_residual,
    reorder_heads,
    reorder_neurons,
    rotate_residual,
    scale_residual,
    transform_embedding,
    transform_head,
    transform_layer,
)

State = dict[str, Tensor]
SEEDS = st.integers(0, 2**31)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class Model:
    """A checkpoint whose weights can be swapped: with an untied head, in float64 with exact
    norms."""

    def __init__(self, folder: Path, dtype: torch.dtype, family: Family | None = None) -> None:
        stored: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.config = AutoConfig.from_pretrained(folder)
        self.family = family or FAMILIES[self.config.model_type]
        self.config.tie_word_embeddings = False
        self.state: State = {k: v.clone() for k, v in stored.state_dict().items()}
        self.module: Any = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        for models in (stored, self.module):
            for name, module in list(models.named_modules()):
                if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
                    models.set_submodule(name, ExactNorm(module))
        generator = torch.Generator().manual_seed(0)
        self.text = torch.randint(self.config.vocab_size, (3, 40), generator=generator)
        self.before = logits_of(stored.eval(), self.text)

    def change(self, state: State) -> float:
        """Greatest difference of the logits with these weights, over the greatest logit."""
        self.module.load_state_dict(state, assign=True)
        after = logits_of(self.module, self.text)
        assert after.dtype == self.before.dtype
        return float((after - self.before).abs().max() / self.before.abs().max())

    def map(
        self,
        layer_map: Callable[[State], State],
        residual: Tensor | None = None,
        fold: bool = False,
    ) -> State:
        """The weights with every layer mapped, and with tables to match."""
        state = dict(self.state)
        for number in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{number}."
            layer = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            mapped = layer_map(layer)
            assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in layer.items()}
            state |= {prefix + name: tensor for name, tensor in mapped.items()}
        if residual is not None or fold:
            norm = state[FINAL_NORM]
            state[EMBEDDING] = transform_embedding(state[EMBEDDING], residual)
            state[HEAD] = transform_head(state[HEAD], gain_of(self.family, norm), residual)
            state[FINAL_NORM] = neutral_gain(self.family, norm)
        return state


@pytest.fixture(scope="session")
def models(recipes: Callable[[str], Path]) -> Callable[..., Model]:
    @cache
    def get(variant: str, dtype: torch.dtype = torch.float64) -> Model:
        return Model(recipes(variant).parent / "models" / "a", dtype)

    return get


def draw_all(model: Model, seed: int) -> dict[str, Any]:
    """Random maps for one layer, in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    dtype = model.before.dtype
    return {
        "residual": random_residual(model.family, model.config.hidden_size, generator, dtype),
        "heads": random_heads(model.family, model.config, generator, dtype),
        "neurons": random_neurons(model.config, generator, dtype),
    }


def transformed(model: Model, seed: int) -> State:
    """Everything at once, with maps of its own for each layer."""
    residual = draw_all(model, seed)["residual"]
    seeds = iter(range(seed, seed + 100))

    def layer_map(layer: State) -> State:
        maps = draw_all(model, next(seeds)) | {"residual": residual}
        return transform_layer(model.family, model.config, layer, **maps)

    return model.map(layer_map, residual)


def fold(model: Model, seed: int) -> State:
    return model.map(lambda layer: fold_gains(model.family, layer), fold=True)


def residual(model: Model, seed: int) -> State:
    rotation = draw_all(model, seed)["residual"]
    return model.map(
        lambda layer: rotate_residual(model.family, fold_gains(model.family, layer), rotation),
        rotation,
    )


def some_of_heads(*parts: str) -> Callable[[Model, int], State]:
    def change(model: Model, seed: int) -> State:
        drawn: HeadMap = draw_all(model, seed)["heads"]
        identity = identity_heads(model.config, model.before.dtype)
        heads = replace(identity, **{part: getattr(drawn, part) for part in parts})
        return model.map(lambda layer: reorder_heads(model.family, model.config, layer, heads))

    return change


def neuron_order(model: Model, seed: int) -> State:
    neurons: NeuronMap = draw_all(model, seed)["neurons"]
    neurons = replace(neurons, signs=torch.ones_like(neurons.signs))
    return model.map(lambda layer: reorder_neurons(layer, neurons))


def neuron_signs(model: Model, seed: int) -> State:
    neurons: NeuronMap = draw_all(model, seed)["neurons"]
    neurons = replace(neurons, order=torch.arange(len(neurons.order)))
    return model.map(lambda layer: reorder_neurons(layer, neurons))


SYMMETRIES: dict[str, Callable[[Model, int], State]] = {
    "fold": fold,
    "residual": residual,
    "head-order": some_of_heads("order"),
    "phases": some_of_heads("phases"),
    "values": some_of_heads("values"),
    "neuron-order": neuron_order,
    "neuron-signs": neuron_signs,
    "all": transformed,
}


@pytest.mark.parametrize("dtype", mostly_slow(TOLERANCE, torch.float64), ids=["f64", "f32"])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_symmetry_leaves_the_logits(
    variant: str, symmetry: str, dtype: torch.dtype, models: Callable[..., Model]
) -> None:
    """Law 1, with stock norms in float32 and exact ones in float64."""
    model = models(variant, dtype)
    moved: set[str] = set()

    @settings(max_examples=10 if dtype == torch.float64 else 5, deadline=None, database=None)
    @given(seed=SEEDS)
    def law(seed: int) -> None:
        state = SYMMETRIES[symmetry](model, seed)
        moved.update(name for name in state if not torch.equal(state[name], model.state[name]))
        assert all(state[name].dtype == dtype for name in state)
        assert model.change(state) <= TOLERANCE[dtype]

    law()
    assert moved


@pytest.mark.parametrize("groups", [1, 4])
def test_multi_query_and_multi_head_attention_are_groups_too(groups: int, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen2", 0, num_key_value_heads=groups)
    model = Model(folder, torch.float64)
    for seed in range(3):
        assert model.change(transformed(model, seed)) <= 1e-9


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "olmo2"])
def test_a_stream_of_another_size_is_the_same_function(
    variant: str, models: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 1, where the epsilon of the norms that read the stream goes along by the square; and not
    where it stays. (No norm reads OLMo 2's.)"""
    model = models(variant)
    state = model.map(lambda layer: scale_residual(layer, 0.3))
    state[EMBEDDING] = state[EMBEDDING] * 0.3
    assert model.change(state) > 1e-7
    for name, module in model.module.named_modules():
        if name.endswith(("layernorm", "model.norm")):
            monkeypatch.setattr(module, "eps", module.eps * 0.3**2)
    assert model.change(state) <= 1e-9
    assert model.change(model.map(lambda layer: scale_residual(layer, 1.0))) > 1e-7


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tensor_that_is_left_out_is_noticed(variant: str, models: Callable[..., Model]) -> None:
    """The law can fail: with any one tensor of the model not transformed, it does."""
    model = models(variant)
    state, folded = transformed(model, 1), fold(model, 1)
    changed = [name for name in state if not torch.equal(state[name], folded[name])]
    norms = [name for name in state if name.endswith("norm.weight")]
    assert set(changed) | set(norms) == set(state)
    for name in changed:
        assert model.change(state | {name: folded[name]}) > 1e-3, name
    for name in norms:
        if not torch.equal(state[name], model.state[name]):
            assert model.change(state | {name: model.state[name]}) > 1e-3, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_turning_q_and_k_apart_is_noticed(variant: str, models: Callable[..., Model]) -> None:
    """The law can fail: other phases, or another head's phases, are another model."""
    model = models(variant)
    config, family = model.config, model.family
    maps = draw_all(model, 5)
    heads: HeadMap = maps["heads"]
    others = replace(heads, phases=heads.phases.flip(0))
    assert not torch.equal(others.phases, heads.phases)

    def apart(layer: State) -> State:
        mapped = reorder_heads(family, config, layer, heads)
        wrong = reorder_heads(family, config, layer, others)
        keys = {k: v for k, v in wrong.items() if k.startswith("self_attn.k_proj")}
        return mapped | keys

    assert model.change(model.map(apart)) > 1e-3


def test_the_maps_are_what_their_definitions_say(models: Callable[..., Model]) -> None:
    """Row by row, by hand: orders by new place, pairs as complex numbers, R^T V and O R."""
    model = models("qwen2")
    config, size, per_group = model.config, head_dim(model.config), 2
    prefix = "model.layers.0."
    layer = {k.removeprefix(prefix): v for k, v in model.state.items() if k.startswith(prefix)}
    maps = draw_all(model, 3)
    heads: HeadMap = maps["heads"]
    mapped = reorder_heads(model.family, config, layer, heads)
    for place, head in enumerate(heads.order.tolist()):
        group = place // per_group
        turn = torch.polar(torch.ones_like(heads.phases[group]), heads.phases[group])
        for part, new, old in (("q", place, head), ("k", group, head // per_group)):
            for kind in ("weight", "bias"):
                name = f"self_attn.{part}_proj.{kind}"
                before = layer[name].view(-1, 2, size // 2, layer[name].numel() // len(layer[name]))
                after = mapped[name].view(before.shape)
                pair = torch.complex(before[old, 0], before[old, 1]) * turn[:, None]
                torch.testing.assert_close(after[new], torch.stack((pair.real, pair.imag)))
        rotation = heads.values[group]
        for kind in ("weight", "bias"):
            name = f"self_attn.v_proj.{kind}"
            rows = layer[name][head // per_group * size :][:size]
            torch.testing.assert_close(mapped[name][group * size :][:size], rotation.T @ rows)
        columns = layer["self_attn.o_proj.weight"][:, head * size :][:, :size]
        new_columns = mapped["self_attn.o_proj.weight"][:, place * size :][:, :size]
        torch.testing.assert_close(new_columns, columns @ rotation)
    neurons: NeuronMap = maps["neurons"]
    moved = reorder_neurons(layer, neurons)
    for place, neuron in enumerate(neurons.order.tolist()):
        sign = neurons.signs[place]
        assert torch.equal(moved[UP][place], layer[UP][neuron] * sign)
        assert torch.equal(moved[DOWN][:, place], layer[DOWN][:, neuron] * sign)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_identity_changes_no_bit(variant: str, models: Callable[..., Model]) -> None:
    """Heads, neurons and signed permutations of the residual stream are exact."""
    model = models(variant, torch.float32)
    count = model.config.intermediate_size
    neurons = NeuronMap(torch.arange(count), torch.ones(count))
    heads = identity_heads(model.config)

    def identity(layer: State) -> State:
        layer = rotate_residual(model.family, layer, torch.eye(model.config.hidden_size))
        return reorder_heads(model.family, model.config, reorder_neurons(layer, neurons), heads)

    for name, tensor in model.map(identity).items():
        assert torch.equal(tensor, model.state[name]), name


def test_head_norms_allow_any_phase_where_a_pairs_gains_are_equal(
    models: Callable[..., Model],
) -> None:
    """Qwen3: pairs 0 and 1 get equal gains in q_norm and k_norm and may be turned by anything;
    pair 2 only in q_norm, and is refused."""
    model = models("qwen3")
    half = head_dim(model.config) // 2
    changed = copy.copy(model)
    changed.state = {name: tensor.clone() for name, tensor in model.state.items()}
    for name, tensor in changed.state.items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            equal = 2 + ("q_norm" in name)
            tensor[half : half + equal] = tensor[:equal]
    changed.module.load_state_dict(changed.state, assign=True)
    changed.before = logits_of(changed.module, changed.text)
    heads = identity_heads(model.config, torch.float64)
    phases = heads.phases.clone()
    phases[:, :2] = torch.tensor([[0.3, 2.0], [-1.0, 0.7]])
    turned = replace(heads, phases=phases)
    state = changed.map(lambda layer: reorder_heads(model.family, model.config, layer, turned))
    assert changed.change(state) <= 1e-9
    phases = phases.clone()
    phases[1, 2] = 0.5
    wrong = replace(heads, phases=phases)
    with pytest.raises(ValueError, match=r"phases: qwen3 .* pair 2 differ.* got 0.5 in group 1"):
        changed.map(lambda layer: reorder_heads(model.family, model.config, layer, wrong))


def test_float32_maps_are_as_exact_as_float32_allows(models: Callable[..., Model]) -> None:
    """Half turns spelled in float32 are half turns in float64; the tensors keep their dtype."""
    model = models("qwen3")
    generator = torch.Generator().manual_seed(0)
    heads = random_heads(model.family, model.config, generator, torch.float32)
    heads = replace(heads, values=identity_heads(model.config).values)
    state = model.map(lambda layer: reorder_heads(model.family, model.config, layer, heads))
    assert model.change(state) <= 1e-9


def _layer(model: Model) -> State:
    prefix = "model.layers.0."
    return {k.removeprefix(prefix): v for k, v in model.state.items() if k.startswith(prefix)}


@pytest.mark.parametrize(
    ("variant", "field", "value", "message"),
    [
        ("llama", "order", [0, 1, 2, 2], "heads: expected each of 0 .. 3 once"),
        ("llama", "order", [0, 2, 1, 3], r"one KV group in places 0 .. 1, got .* \[0, 1\]"),
        ("llama", "order", [0, 1, 2], "heads: expected each of 0 .. 3 once, got 3 entries"),
        ("llama", "values", torch.full((2, 8, 8), 0.5), "value rotations: expected orthogonal"),
        ("llama", "values", torch.full((2, 8, 8), torch.nan), "expected orthogonal"),
        ("llama", "phases", torch.zeros(1, 4), "heads: expected phases and values of"),
        ("qwen3", "phases", torch.full((2, 8), 0.1), "phases: qwen3 .* expected 0 or pi, got 0.1"),
    ],
)
def test_head_maps_of_another_model_are_refused(
    variant: str, field: str, value: Any, message: str, models: Callable[..., Model]
) -> None:
    model = models(variant)
    heads = identity_heads(model.config)
    fields = {"order": heads.order, "phases": heads.phases, "values": heads.values}
    wrong = fields | {field: torch.as_tensor(value)}
    if field == "phases" and variant == "llama":
        wrong["values"] = heads.values[:1]
    with pytest.raises(ValueError, match=message):
        reorder_heads(model.family, model.config, _layer(model), HeadMap(**wrong))


@pytest.mark.parametrize(
    ("order", "sign", "message"),
    [(0, 1.0, "neurons: expected each of 0 .. 47 once"), (1, 0.5, r"expected signs of \+1 and -1")],
)
def test_neuron_maps_that_change_the_function_are_refused(
    order: int, sign: float, message: str, models: Callable[..., Model]
) -> None:
    neurons = NeuronMap(torch.arange(48) * order, torch.full((48,), sign))
    with pytest.raises(ValueError, match=message):
        reorder_neurons(_layer(models("llama")), neurons)


def test_residual_maps_that_change_the_function_are_refused(models: Callable[..., Model]) -> None:
    """Not orthogonal; gains not folded; and a rotation where the family has gains that stay."""
    model = models("llama")
    family = FAMILIES["llama"]
    generator = torch.Generator().manual_seed(0)
    rotation = random_residual(family, 32, generator)
    layer = _layer(model)
    with pytest.raises(ValueError, match="residual: expected orthogonal matrices, to 1e-04"):
        rotate_residual(family, fold_gains(family, layer), 1.01 * rotation)
    with pytest.raises(ValueError, match=r"input_layernorm\.weight: expected neutral gains"):
        rotate_residual(family, layer, rotation)
    staying = replace(family, symmetries=replace(family.symmetries, residual="signed-permutation"))
    with pytest.raises(ValueError, match="norm gains that do not fold; expected a signed perm"):
        rotate_residual(staying, fold_gains(family, layer), rotation)


def _gemma(model_type: str) -> Family:
    """Rows that the table may have one day: gains of one plus the weight, and norms after the
    sublayers too."""
    llama = FAMILIES["llama"]
    symmetries = replace(llama.symmetries, gain_offset=1.0)
    if model_type == "gemma":
        return replace(llama, dense=model_type, symmetries=symmetries)
    gains = dict(symmetries.gains)
    gains["pre_feedforward_layernorm.weight"] = gains.pop("post_attention_layernorm.weight")
    return replace(
        llama,
        dense=model_type,
        norms_before=("input_layernorm.weight", "pre_feedforward_layernorm.weight"),
        norms_after=("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
        symmetries=replace(
            symmetries, gains=gains, residual="signed-permutation", phases="half-turns"
        ),
    )


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text"])
def test_the_table_can_say_what_gemma_allows(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offset gains, post-norms and signed permutations, on stock Gemma modules in float32; what the
    row rules out does change the logits."""
    monkeypatch.setitem(VARIANTS, model_type, {"model_type": model_type, "head_dim": 16})
    family = _gemma(model_type)
    model = Model(make_model(tmp_path / "model", model_type, 0), torch.float32, family)
    for seed in range(3):
        assert model.change(transformed(model, seed)) <= 1e-4
    model.family = replace(family, symmetries=replace(family.symmetries, gain_offset=0.0))
    assert model.change(transformed(model, 0)) > 1e-3
    if model_type != "gemma":
        model.family = replace(family, symmetries=replace(family.symmetries, residual="orthogonal"))
        with pytest.raises(ValueError, match=r"post_attention_layernorm\.weight: expected neutral"):
            transformed(model, 0)


def test_random_maps_are_drawn_from_all_of_their_group() -> None:
    """Uniform rotations have entries of mean 0 and deviation 1/sqrt(d), and both determinants."""
    family = FAMILIES["llama"]
    config = AutoConfig.for_model(
        "llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=3
    )
    generator = torch.Generator().manual_seed(0)
    maps = [random_residual(family, 16, generator, torch.float64) for _ in range(400)]
    entries = torch.stack(maps)
    assert float(entries.mean(dim=0).abs().max()) < 5 * 0.25 / math.sqrt(400)
    assert abs(float(entries.std()) - 0.25) < 0.01
    assert {round(float(torch.linalg.det(one))) for one in maps} == {1, -1}
    heads = [random_heads(family, config, generator) for _ in range(50)]
    assert {int(one.order[0]) for one in heads} == set(range(12))
    assert all(one.order.view(3, 4).sort().values.diff().eq(1).all() for one in heads)
    assert float(torch.stack([one.phases for one in heads]).std()) == pytest.approx(
        math.pi / math.sqrt(3), rel=0.05
    )
