"""Correlations are numpy's, orders are scipy's, and maps found from activations undo the symmetry
that a layer was put through."""

import itertools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu
from transformers import AutoConfig, PreTrainedConfig

from conftest import SIZES, VARIANTS
from symphony_moe.building import build as build_module
from symphony_moe.building.align import (
    MIN_GAIN,
    basis_of,
    choose_maps,
    match,
    match_heads,
    match_neurons,
    matched_correlation,
    mean_cosine,
    residual_basis,
    residual_order,
)
from symphony_moe.building.alignment import Alignment
from symphony_moe.building.plan import make_plan
from symphony_moe.building.statistics import (
    HeadActivity,
    HeadCorrelation,
    LayerStatistics,
    NeuronCorrelation,
    ResidualCovariance,
)
from symphony_moe.building.sweep import Sweep
from symphony_moe.errors import SourceError
from symphony_moe.model.families import DOWN, FAMILIES, GATE, UP, Family, head_dim
from symphony_moe.model.layer import (
    decoder_layer,
    load_dense_layer,
    observe,
    one_layer_model,
    run_layer,
)
from symphony_moe.model.streams import Streams
from symphony_moe.model.symmetry import (
    HeadMap,
    NeuronMap,
    fold_gains,
    random_heads,
    random_residual,
    reorder_heads,
    reorder_neurons,
    transform_layer,
)
from symphony_moe.progress import ignore
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.text.windows import Packed

SEEDS = st.integers(0, 2**31)
Layer = dict[str, Tensor]


def activations(seed: int, tokens: int, ffn: int, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Anchor's and source's neurons on the same tokens: correlated, and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, ffn, generator=generator)
    pair = []
    for _ in range(2):
        own = torch.randn(tokens, ffn, generator=generator)
        scale = torch.rand(ffn, generator=generator) + 0.5
        pair.append((common + own) * scale + mean)
    return pair[0], pair[1]


def correlate(anchor: Tensor, source: Tensor, sizes: list[int]) -> Tensor:
    """One pass over batches of these sizes."""
    statistics = NeuronCorrelation(anchor.shape[1])
    for ours, theirs in zip(anchor.split(sizes), source.split(sizes), strict=True):
        statistics.update(ours, theirs)
    return statistics.result()


def numpy_correlation(anchor: Tensor, source: Tensor) -> np.ndarray:
    """Everything at once, in float64: the block of anchor against source."""
    ffn = anchor.shape[1]
    together = np.concatenate([anchor.double().numpy(), source.double().numpy()], axis=1)
    return np.asarray(np.corrcoef(together, rowvar=False)[:ffn, ffn:])


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, sizes=st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_one_pass_over_uneven_batches_is_corrcoef_of_everything(
    seed: int, sizes: list[int]
) -> None:
    """To 1e-5: products are summed in float32."""
    sizes = [*sizes, 3]  # correlations of one or two tokens say nothing
    anchor, source = activations(seed, sum(sizes), 7)
    found = correlate(anchor, source, sizes)
    np.testing.assert_allclose(found.numpy(), numpy_correlation(anchor, source), atol=1e-5)


@pytest.mark.parametrize("mean", [1000.0, -30000.0])
def test_means_far_from_zero_cost_no_precision(mean: float) -> None:
    """To 1e-5, where sums of squares in float32 would be wrong by more than 1."""
    anchor, source = activations(0, 900, 12, mean)
    found = correlate(anchor, source, [100, 1, 399, 400])
    np.testing.assert_allclose(found.numpy(), numpy_correlation(anchor, source), atol=1e-5)


def test_a_mean_that_moves_between_batches_is_merged_exactly() -> None:
    """Domains come one after another, so the first batches' means are not the text's."""
    anchor, source = activations(1, 600, 9)
    anchor[200:] += 50 * torch.arange(9)
    source[400:] -= 80
    found = correlate(anchor, source, [200, 200, 200])
    np.testing.assert_allclose(found.numpy(), numpy_correlation(anchor, source), atol=1e-5)


def test_a_neuron_that_never_moves_has_correlation_zero() -> None:
    """Dead neurons (and constant ones) must not spoil the assignment with NaN."""
    anchor, source = activations(2, 200, 6)
    anchor[:, 1] = 0
    source[:, 4] = 3.25
    found = correlate(anchor, source, [64, 136])
    assert torch.isfinite(found).all()
    assert not found[1].any() and not found[:, 4].any()
    assert found[0, 0] > 0.1
    assert sorted(match_neurons(found).tolist()) == list(range(6))


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, ffn=st.integers(2, 40))
def test_matching_brings_noisy_copies_back(seed: int, ffn: int) -> None:
    """Neurons that were shuffled, scaled, shifted and blurred are found again, one by one."""
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.randn(1500, ffn, generator=generator)
    shuffle = torch.randperm(ffn, generator=generator)
    noise = 0.5 * torch.randn(1500, ffn, generator=generator)
    source = (anchor[:, shuffle] + noise) * (1 + torch.rand(ffn, generator=generator)) + 4
    correlation = correlate(anchor, source, [700, 800])
    order = match_neurons(correlation)
    assert torch.equal(shuffle[order], torch.arange(ffn))
    assert matched_correlation(correlation, order) > 0.8


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, ffn=st.integers(1, 40))
def test_matching_is_the_optimum_of_the_assignment_problem(seed: int, ffn: int) -> None:
    """As scipy finds it (Eq. 2: the largest sum of matched correlations)."""
    correlation = torch.rand(ffn, ffn, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    order = match_neurons(correlation)
    assert sorted(order.tolist()) == list(range(ffn))
    rows, columns = linear_sum_assignment(correlation.numpy(), maximize=True)
    best = correlation.double().numpy()[rows, columns].sum()
    found = correlation.double()[torch.arange(ffn), order].sum()
    assert abs(float(found) - best) < 1e-9


def test_matched_correlation_is_the_mean_over_matched_pairs() -> None:
    """Row j with column order[j]."""
    correlation = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.2, 0.0], [0.3, 0.0, -0.4]])
    order = torch.tensor([1, 0, 2])
    assert matched_correlation(correlation, order) == pytest.approx((0.9 + 0.5 - 0.4) / 3)


def ffn_output(ffn: dict[str, Tensor], x: Tensor) -> Tensor:
    return (silu(x @ ffn[GATE].T) * (x @ ffn[UP].T)) @ ffn[DOWN].T


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_reordering_neurons_leaves_the_ffn_and_is_undone_by_the_inverse(seed: int) -> None:
    """Law 1 for one FFN, float64, 1e-9; neuron j of the result is neuron order[j] of the FFN, with
    sign j."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ffn = {GATE: random(12, 8), UP: random(12, 8), DOWN: random(8, 12)}
    order = torch.randperm(12, generator=generator)
    signs = torch.randint(2, (12,), generator=generator) * 2.0 - 1
    reordered = reorder_neurons(ffn, NeuronMap(order, signs))
    for place, neuron in enumerate(order.tolist()):
        assert torch.equal(reordered[GATE][place], ffn[GATE][neuron])
        assert torch.equal(reordered[UP][place], ffn[UP][neuron] * signs[place])
        assert torch.equal(reordered[DOWN][:, place], ffn[DOWN][:, neuron] * signs[place])
    x = random(30, 8)
    expected = ffn_output(ffn, x)
    difference = (ffn_output(reordered, x) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-9
    inverse = torch.argsort(order)
    back = reorder_neurons(reordered, NeuronMap(inverse, signs[inverse]))
    assert all(torch.equal(back[name], ffn[name]) for name in ffn)


def streams(
    seed: int, tokens: int, hidden: int, rotation: Tensor, noise: float
) -> tuple[Tensor, Tensor]:
    """Anchor's and source's residual streams: the source's is the anchor's in another basis,
    `x Q^T`, with another length for each token, and noise."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(hidden, generator=generator) * 3 + 0.1
    anchor = torch.randn(tokens, hidden, generator=generator) * scales
    lengths = torch.rand(tokens, 1, generator=generator) * 50 + 0.01
    source = anchor @ rotation.T.float() * lengths
    blur = torch.randn(tokens, hidden, generator=generator)
    return anchor, source + noise * source.norm(dim=-1, keepdim=True) / hidden**0.5 * blur


def covariance(anchor: Tensor, source: Tensor, sizes: list[int]) -> Tensor:
    statistics = ResidualCovariance(anchor.shape[1])
    for ours, theirs in zip(anchor.split(sizes), source.split(sizes), strict=True):
        statistics.update(ours, theirs)
    return statistics.result()


def a_rotation(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return random_residual(FAMILIES["llama"], size, generator, torch.float64)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_the_residual_covariance_is_the_same_over_any_batches(seed: int, sizes: list[int]) -> None:
    """As numpy finds it in float64 from everything at once: the mean of outer products of unit
    vectors, source x anchor."""
    anchor, source = streams(seed, sum(sizes), 9, a_rotation(seed, 9), 0.5)
    units = [rows.double().numpy() for rows in (source, anchor)]
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in units]
    expected = units[0].T @ units[1] / sum(sizes)
    np.testing.assert_allclose(covariance(anchor, source, sizes).numpy(), expected, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, hidden=st.integers(2, 24))
def test_the_residual_basis_is_found_again(seed: int, hidden: int) -> None:
    """Without noise exactly, with as much noise as signal nearly; always orthogonal."""
    rotation = a_rotation(seed, hidden)
    for noise, tolerance in ((0.0, 1e-4), (1.0, 0.25)):
        anchor, source = streams(seed, 3000, hidden, rotation, noise)
        found = residual_basis(covariance(anchor, source, [1000, 2000]))
        torch.testing.assert_close(found.T @ found, torch.eye(hidden).double(), atol=1e-12, rtol=0)
        assert float((found - rotation).square().mean().sqrt()) < tolerance
        if noise == 0:
            assert cosine_similarity(source.double() @ found, anchor.double()).min() > 0.999999


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_no_other_basis_has_a_larger_cosine(seed: int) -> None:
    """Procrustes is the optimum, also for two streams that have little in common."""
    generator = torch.Generator().manual_seed(seed)
    anchor, source = torch.randn(2, 40, 6, generator=generator)
    products = covariance(anchor, source, [40])
    found = residual_basis(products)
    best = mean_cosine(products, found)
    assert best >= mean_cosine(products, None) - 1e-12
    for other in range(10):
        skew = 0.1 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
        near = torch.linalg.matrix_exp(skew - skew.T)
        assert best >= mean_cosine(products, a_rotation(seed + other, 6)) - 1e-12
        assert best >= mean_cosine(products, found @ near) - 1e-12


def test_the_trace_is_the_mean_cosine() -> None:
    """Of the streams as they are, and of the source's in a basis."""
    rotation = a_rotation(3, 12)
    anchor, source = streams(3, 500, 12, rotation, 0.7)
    products = covariance(anchor, source, [123, 377])
    plain = float(cosine_similarity(source, anchor).mean())
    turned = float(cosine_similarity(source.double() @ rotation, anchor.double()).mean())
    assert float(products.trace()) == pytest.approx(plain, abs=1e-6)
    assert mean_cosine(products, None) == pytest.approx(plain, abs=1e-6)
    assert mean_cosine(products, rotation) == pytest.approx(turned, abs=1e-6)
    assert turned > plain + 0.3
    assert mean_cosine(covariance(anchor, 7 * anchor, [500]), None) == pytest.approx(1, abs=1e-6)


def test_tokens_without_a_stream_count_as_cosine_zero() -> None:
    """A token whose embedding is all zeros has no direction: no NaN, and no agreement."""
    anchor, source = streams(4, 100, 6, torch.eye(6), 0.0)
    source[10:60] = 0
    anchor[90:] = 0
    products = covariance(anchor, source, [50, 50])
    assert torch.isfinite(products).all()
    assert mean_cosine(products, None) == pytest.approx(0.4, abs=1e-6)
    nothing = covariance(torch.zeros(5, 6), source[:5], [5])
    found = residual_basis(nothing)
    assert not nothing.any()
    torch.testing.assert_close(found.T @ found, torch.eye(6).double())


def test_a_signed_permutation_is_found_again_and_is_the_best() -> None:
    """`residual_order` undoes any, and no other signed permutation agrees more."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(200, 6, generator=generator)
    for seed in range(5):
        hidden = random_residual(FAMILIES["olmo2"], 6, torch.Generator().manual_seed(seed))
        found = residual_order(covariance(stream, stream @ hidden.T, [200]))
        torch.testing.assert_close(found, hidden.double())
    product = torch.randn(4, 4, generator=generator).double()
    best = mean_cosine(product, residual_order(product))
    for order in itertools.permutations(range(4)):
        for signs in itertools.product((-1.0, 1.0), repeat=4):
            other = torch.eye(4).double()[list(order)] * torch.tensor(signs)
            assert mean_cosine(product, other) <= best + 1e-12
    assert basis_of(FAMILIES["olmo2"]) is residual_order
    assert basis_of(FAMILIES["llama"]) is residual_basis


def config_of(variant: str, **changes: Any) -> tuple[Family, PreTrainedConfig]:
    config = AutoConfig.for_model(**(SIZES | VARIANTS[variant] | changes))
    return FAMILIES[config.model_type], config


def random_layer(config: PreTrainedConfig, seed: int) -> Layer:
    """A layer as `conftest.make_model` draws it, with gains that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    layer = {}
    for name, parameter in decoder_layer(one_layer_model(config, 0)).named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            layer[name] = 1 + 0.3 * drawn
        else:
            layer[name] = 0.3 * drawn if drawn.ndim == 1 else drawn / drawn.shape[1] ** 0.5
    return layer


def random_stream(config: PreTrainedConfig, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 50, config.hidden_size, generator=generator)


@torch.inference_mode()
def activity(config: PreTrainedConfig, layer: Mapping[str, Tensor], hidden: Tensor) -> HeadActivity:
    model = load_dense_layer(config, 0, layer)
    with observe(model) as seen:
        run_layer(model, hidden)
    tokens, size = hidden.shape[0] * hidden.shape[1], head_dim(config)
    parts = (seen[name].reshape(tokens, -1, size) for name in ("queries", "keys", "heads"))
    return HeadActivity(*parts)


def compare_heads(
    config: PreTrainedConfig, anchor: HeadActivity, source: HeadActivity, batches: int = 1
) -> HeadCorrelation:
    statistics = HeadCorrelation(config)
    fields = ("queries", "keys", "outputs")
    for number in range(batches):
        statistics.update(
            *(
                HeadActivity(
                    *(getattr(one, field).tensor_split(batches)[number] for field in fields)
                )
                for one in (anchor, source)
            )
        )
    return statistics


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{variant: (variant, {}) for variant in VARIANTS},
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "qwen2-mqa": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2-6-of-2": (
        "qwen2",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
    ),
    "qwen3-mqa": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3-mha": ("qwen3", {"num_key_value_heads": 4}),
    "qwen3-12-of-3": ("qwen3", {"num_attention_heads": 12, "num_key_value_heads": 3}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_map_found_from_activations_undoes_the_random_one(shape: str) -> None:
    """A layer put through random head orders, phases and value rotations, and what was found from
    activations applied to it: the layer's own q, k, v, o, biases included."""
    variant, changes = SHAPES[shape]
    family, config = config_of(variant, **changes)
    layer, hidden = random_layer(config, 1), random_stream(config)
    folded = fold_gains(family, layer)
    anchor = activity(config, layer, hidden)
    for seed in range(3):
        drawn = random_heads(family, config, torch.Generator().manual_seed(seed))
        scrambled = transform_layer(family, config, layer, heads=drawn)
        statistics = compare_heads(config, anchor, activity(config, scrambled, hidden), 3)
        found, before, after = match_heads(statistics, family.symmetries.phases)
        assert before < 0.3 and after == pytest.approx(1, abs=1e-6)
        back = reorder_heads(family, config, scrambled, rounded(found))
        for name in [*family.attention, *family.vectors]:
            torch.testing.assert_close(back[name], folded[name], atol=1e-5, rtol=0, msg=name)
        # Each head is known by its outputs (1), its queries (1) and its group by its keys.
        scores, group_scores = statistics.scores()
        per_group = len(scores) // len(group_scores)
        places = torch.arange(len(scores))
        torch.testing.assert_close(
            scores[found.order, places], torch.full((len(scores),), 2.0).double(), atol=1e-5, rtol=0
        )
        groups = found.order[::per_group] // per_group
        own = group_scores[groups, torch.arange(len(groups))]
        torch.testing.assert_close(own, torch.ones(len(groups)).double(), atol=1e-5, rtol=0)


def rounded(heads: HeadMap) -> HeadMap:
    """As a record has it."""
    return replace(heads, phases=heads.phases.float(), values=heads.values.float())


def test_half_turns_are_all_that_a_family_with_normed_heads_gets() -> None:
    """Of strangers, whose best phases are others: 0 and pi, as `reorder_heads` demands; a family
    that allows any phase gets others."""
    for variant, any_phase in (("qwen3", False), ("llama", True)):
        family, config = config_of(variant)
        hidden = random_stream(config)
        anchor, source = (activity(config, random_layer(config, seed), hidden) for seed in (1, 2))
        statistics = compare_heads(config, anchor, source)
        found, before, after = match_heads(statistics, family.symmetries.phases)
        turns = (found.phases / math.pi).abs()
        assert bool(((turns - turns.round()).abs() > 1e-3).any()) == any_phase
        assert {0, 1} <= set(turns.round().int().flatten().tolist())
        assert before < after
        reorder_heads(family, config, random_layer(config, 2), rounded(found))


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, batches=st.integers(2, 7))
def test_head_products_are_the_same_over_any_batches(seed: int, batches: int) -> None:
    """And the products are what their definition says, in numpy at once."""
    _, config = config_of("llama", num_attention_heads=4, num_key_value_heads=2)
    generator = torch.Generator().manual_seed(seed)
    anchor, source = (
        HeadActivity(*(torch.randn(60, heads, 8, generator=generator) for heads in (4, 2, 4)))
        for _ in range(2)
    )
    once, often = (compare_heads(config, anchor, source, count) for count in (1, batches))
    for part in ("outputs", "queries", "keys"):
        torch.testing.assert_close(getattr(once, part), getattr(often, part), atol=1e-4, rtol=0)
        for ours, theirs in zip(once.energies[part], often.energies[part], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    scores, group_scores = often.scores()
    for s, a in itertools.product(range(4), range(4)):
        found = float(scores[s, a]) - turned(source.queries[:, s], anchor.queries[:, a])
        pair = source.outputs[:, s].double().numpy(), anchor.outputs[:, a].double().numpy()
        nuclear = np.linalg.norm(pair[0].T @ pair[1], "nuc")
        assert found == pytest.approx(
            nuclear / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1]), abs=1e-5
        )
    for s, a in itertools.product(range(2), range(2)):
        expected = turned(source.keys[:, s], anchor.keys[:, a])
        assert float(group_scores[s, a]) == pytest.approx(expected, abs=1e-5)


def turned(source: Tensor, anchor: Tensor) -> float:
    """Cosine of two heads' rows when each pair (j, j + 4) of the source's is turned to fit best."""
    ours, theirs = (rows.double().numpy() for rows in (source, anchor))
    ours, theirs = (rows[:, :4] + 1j * rows[:, 4:] for rows in (ours, theirs))
    products = np.abs((ours.conj() * theirs).sum(axis=0)).sum()
    return float(products / np.linalg.norm(ours) / np.linalg.norm(theirs))


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_no_other_order_of_heads_is_worth_more(seed: int) -> None:
    """Three groups of two heads: the best of all 48 orders that keep groups together, by the keys
    of a group and the mean over its query heads."""
    _, config = config_of("llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=48)
    generator = torch.Generator().manual_seed(seed)
    anchor, source = (
        HeadActivity(*(torch.randn(9, heads, 8, generator=generator) for heads in (6, 3, 6)))
        for _ in range(2)
    )
    statistics = compare_heads(config, anchor, source)
    scores, group_scores = statistics.scores()

    def worth(order: tuple[int, ...]) -> float:
        keys = sum(float(group_scores[order[2 * g] // 2, g]) for g in range(3))
        return keys + sum(float(scores[head, place]) for place, head in enumerate(order)) / 2

    orders = [
        tuple(
            2 * group + (inner ^ flip)
            for group, flip in zip(groups, flips, strict=True)
            for inner in (0, 1)
        )
        for groups in itertools.permutations(range(3))
        for flips in itertools.product((0, 1), repeat=3)
    ]
    found, _, _ = match_heads(statistics, "any")
    order = tuple(found.order.tolist())
    assert len(orders) == 48 and order in orders
    assert worth(order) == pytest.approx(max(map(worth, orders)), abs=1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_a_group_is_turned_as_suits_all_of_its_heads(seed: int) -> None:
    """Of strangers: the value rotation is the best for the group's outputs together, the phases for
    its keys and all its queries, and the correlation is what these reach."""
    _, config = config_of("llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    generator = torch.Generator().manual_seed(seed)
    anchor, source = (
        HeadActivity(
            *(torch.randn(9, heads, 8, generator=generator).double() for heads in (6, 2, 6))
        )
        for _ in range(2)
    )
    found, before, after = match_heads(compare_heads(config, anchor, source), "any")
    lengths = math.prod(float(one.outputs.norm()) for one in (anchor, source))
    reached = 0.0
    for group in range(2):
        places = slice(3 * group, 3 * group + 3)
        heads = found.order[places]
        ours, theirs = (
            source.outputs[:, heads].flatten(0, 1),
            anchor.outputs[:, places].flatten(0, 1),
        )
        turned = ours @ found.values[group]
        best = float(torch.linalg.svdvals(ours.T @ theirs).sum())
        assert float((turned * theirs).sum()) == pytest.approx(best, rel=1e-9)
        reached += best
        group_keys = source.keys[:, heads[0] // 3], anchor.keys[:, group]
        pairs = [
            group_keys,
            *zip(
                source.queries[:, heads].unbind(1), anchor.queries[:, places].unbind(1), strict=True
            ),
        ]
        product = sum(
            (torch.complex(*a.chunk(2, dim=1)).conj() * torch.complex(*b.chunk(2, dim=1))).sum(0)
            for a, b in pairs
        )
        assert isinstance(product, Tensor)
        torch.testing.assert_close(
            torch.polar(product.abs(), found.phases[group]), product, rtol=1e-9, atol=1e-9
        )
    assert after == pytest.approx(reached / lengths, rel=1e-9)
    own = float((source.outputs * anchor.outputs).sum()) / lengths
    assert before == pytest.approx(own, rel=1e-9, abs=1e-12)


def test_heads_that_put_out_nothing_are_matched_all_the_same() -> None:
    """A dead head has no direction and no phase; the map is whole and legal, and 0 is 0."""
    family, config = config_of("llama")
    layer = random_layer(config, 1)
    for part in "qkvo":
        layer[f"self_attn.{part}_proj.weight"][:8] = 0
    hidden = random_stream(config)
    dead = activity(config, layer, hidden)
    nothing = HeadActivity(*(torch.zeros_like(x) for x in (dead.queries, dead.keys, dead.outputs)))
    for source in (dead, nothing):
        statistics = compare_heads(config, dead, source)
        found, before, after = match_heads(statistics, "any")
        reorder_heads(family, config, layer, rounded(found))
        assert before == pytest.approx(float(source is dead), abs=1e-6)
        assert after == pytest.approx(float(source is dead), abs=1e-6)


@cache
def a_comparison(*parts: str) -> tuple[LayerStatistics, Family]:
    """Two strangers' layers on the same tokens."""
    family, config = config_of("llama")
    comparison = LayerStatistics()
    hidden = random_stream(config)
    if "residual" in parts:
        comparison.residual = ResidualCovariance(config.hidden_size)
        comparison.residual.update(*streams(0, 90, config.hidden_size, torch.eye(32), 0.5))
    if "heads" in parts:
        anchor, source = (activity(config, random_layer(config, seed), hidden) for seed in (1, 2))
        comparison.heads = compare_heads(config, anchor, source)
    if "neurons" in parts:
        comparison.neurons = NeuronCorrelation(24)
        ours, theirs = activations(0, 200, 24)
        comparison.neurons.update(ours, theirs.flip(1))
    return comparison, family


KEYS = {
    "residual": {"covariance"},
    "heads": {"heads.order", "heads.phases", "heads.values", "heads.correlation"},
    "neurons": {"neurons", "correlation"},
}


@pytest.mark.parametrize("parts", [(), *((kind,) for kind in KEYS), tuple(KEYS)], ids="-".join)
def test_a_comparison_says_what_was_asked_for(parts: tuple[str, ...]) -> None:
    """The keys of the docstring; correlations before and after; maps that the record can hold."""
    comparison, family = a_comparison(*parts)
    found = match(comparison, family, "who")
    assert set(found) == set().union(*(KEYS[kind] for kind in parts))
    for key in ("heads.correlation", "correlation"):
        if key in found:
            before, after = found[key].tolist()
            assert before < after <= 1
    assert all(
        t.dtype in (torch.float32, torch.int64) or k == "covariance" for k, t in found.items()
    )


def noise(config: PreTrainedConfig, seed: int, tokens: int) -> LayerStatistics:
    """Two models that have nothing to do with each other, on few tokens."""
    generator = torch.Generator().manual_seed(seed)
    comparison = LayerStatistics(
        residual=ResidualCovariance(config.hidden_size), heads=HeadCorrelation(config)
    )
    assert comparison.residual is not None and comparison.heads is not None
    size = head_dim(config)
    counts = config.num_attention_heads, config.num_key_value_heads, config.num_attention_heads
    comparison.residual.update(*torch.randn(2, tokens, config.hidden_size, generator=generator))
    comparison.heads.update(
        *(
            HeadActivity(*(torch.randn(tokens, n, size, generator=generator) for n in counts))
            for _ in range(2)
        )
    )
    return comparison


def test_maps_are_judged_on_text_that_they_were_not_found_on() -> None:
    """What noise gains by the best maps it gains on its own tokens alone: with others to judge by,
    nothing is used. The maps are those of the one text, the measurements those of the other."""
    family, config = config_of("llama")
    own: dict[str, Tensor] = {}
    judged: dict[str, Tensor] = {}
    for layer in range(2):
        comparison = noise(config, layer, 40)
        found = match(comparison, family, "who")
        own |= {f"b.layers.{layer}.{key}": tensor for key, tensor in found.items()}
        comparison.validation = noise(config, 100 + layer, 40)
        apart = match(comparison, family, "who")
        judged |= {f"b.layers.{layer}.{key}": tensor for key, tensor in apart.items()}
        assert set(apart) == set(found) | {"covariance.validation"}
        for key in ("covariance", "heads.order", "heads.phases", "heads.values"):
            assert torch.equal(apart[key], found[key])
        assert (
            comparison.validation.residual is not None and comparison.validation.heads is not None
        )
        assert torch.equal(apart["covariance.validation"], comparison.validation.residual.result())
        again, before, after = match_heads(comparison.validation.heads, "any")
        assert after > 0.2 > float(apart["heads.correlation"][1])
        assert float(apart["heads.correlation"][0]) == pytest.approx(before, abs=1e-7)
        assert not torch.equal(again.values.float(), apart["heads.values"])
    records = [choose_maps(found, found.__getitem__, ["b"], 2) for found in (own, judged)]
    basis = residual_basis(own["b.layers.0.covariance"] + own["b.layers.1.covariance"])
    for layer in range(2):
        pair = [
            mean_cosine(judged[f"b.layers.{layer}.covariance.validation"], q) for q in (None, basis)
        ]
        assert records[1].tensors[f"b.layers.{layer}.cosine"].tolist() == pytest.approx(
            pair, abs=1e-7
        )
    used = [
        [record.describe()[kind]["b"]["used"] for kind in ("residual", "heads")]
        for record in records
    ]
    assert used == [[True, True], [False, False]]
    assert not any("covariance" in key for key in records[1].tensors)


def test_a_map_that_holds_on_other_text_is_used() -> None:
    """Two models that are the same but for their coordinates, on either text."""
    family, config = config_of("llama")
    layer = random_layer(config, 1)
    drawn = random_heads(family, config, torch.Generator().manual_seed(3))
    other = transform_layer(family, config, layer, heads=drawn)
    comparison = LayerStatistics(validation=LayerStatistics())
    assert comparison.validation is not None
    for seed, part in enumerate((comparison, comparison.validation)):
        hidden = random_stream(config, seed)
        part.heads = compare_heads(
            config, activity(config, layer, hidden), activity(config, other, hidden)
        )
    found = match(comparison, family, "who")
    before, after = found["heads.correlation"].tolist()
    assert before < 0.3 and after > 0.999


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["residual", "outputs", "queries", "keys", "neurons"])
def test_activations_that_are_not_finite_are_refused_by_name(kind: str, value: float) -> None:
    """Whatever statistics they reach first: the message says whose layer it is."""
    family, config = config_of("llama")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 20, 32, generator=generator)
    heads = [
        HeadActivity(*(torch.randn(20, count, 8, generator=generator) for count in (4, 2, 4)))
        for _ in range(2)
    ]
    rows[1, 3, 5] = value
    comparison = LayerStatistics()
    if kind == "residual":
        comparison.residual = ResidualCovariance(32)
        comparison.residual.update(*rows)
    elif kind == "neurons":
        comparison.neurons = NeuronCorrelation(32)
        comparison.neurons.update(*rows)
    else:
        getattr(heads[1], kind)[3, 1, 5] = value
        comparison.heads = HeadCorrelation(config)
        comparison.heads.update(*heads)
    with pytest.raises(SourceError, match=r"^b: layer 7 puts out values that are NaN or infinite"):
        match(comparison, family, "b: layer 7")


@pytest.mark.parametrize("kind", ["residual", "heads"])
def test_activations_kept_aside_that_are_not_finite_are_refused(kind: str) -> None:
    family, config = config_of("llama")
    comparison = noise(config, 0, 20)
    validation = comparison.validation = noise(config, 1, 20)
    assert validation.residual is not None and validation.heads is not None
    statistics = validation.residual.products if kind == "residual" else validation.heads.outputs
    statistics[2, 3] = math.nan
    with pytest.raises(SourceError, match=r"^b: layer 7 puts out values that are NaN or infinite"):
        match(comparison, family, "b: layer 7")


def findings(gains: Mapping[str, list[tuple[float, float]]]) -> dict[str, Tensor]:
    """What `match` would say: source -> for each layer (gain of the residual stream's cosine by the
    rotation, gain of the heads' correlation)."""
    found = {}
    for source, layers in gains.items():
        for number, (residual, heads) in enumerate(layers):
            prefix = f"{source}.layers.{number}."
            # Of 1 and `residual` in a plane: cosine 1 - residual before, 1 after the half turn.
            found[f"{prefix}covariance"] = torch.diag(
                torch.tensor([1 - residual / 2, -residual / 2], dtype=torch.float64)
            )
            found[f"{prefix}heads.order"] = torch.arange(4)
            found[f"{prefix}heads.phases"] = torch.zeros(2, 4)
            found[f"{prefix}heads.values"] = torch.eye(8).repeat(2, 1, 1)
            found[f"{prefix}heads.correlation"] = torch.tensor([0.25, 0.25 + heads])
            found[f"{prefix}neurons"] = torch.arange(6)
            found[f"{prefix}correlation"] = torch.tensor([0.5, 0.5])
    return found


MAPS = ("heads.order", "heads.phases", "heads.values")


def test_maps_that_gain_too_little_are_dropped_and_their_measurements_kept() -> None:
    """For each source and kind on its own, by the mean over its layers; never a neuron order."""
    low, high = MIN_GAIN / 2, MIN_GAIN * 2
    found = findings(
        {
            "both": [(high, high), (high, high)],
            "none": [(low, low), (low, low)],
            "residual": [(high, low), (high, low)],
            "heads": [(low, high), (low, high)],
            # 0 and MIN_GAIN * 3: the layers share one basis, and are judged as one.
            "mean": [(0.0, 0.0), (MIN_GAIN * 3, MIN_GAIN * 3)],
        }
    )
    sources = ["both", "none", "residual", "heads", "mean"]
    record = choose_maps(found, found.__getitem__, sources, 2)
    expected = {
        key for key in found if not key.endswith("covariance") and not key.endswith(MAPS)
    } | {f"{source}.layers.{layer}.cosine" for source in sources for layer in range(2)}
    expected |= {f"{source}.residual" for source in ("both", "residual", "mean")}
    expected |= {
        f"{source}.layers.{layer}.{part}"
        for source in ("both", "heads", "mean")
        for layer in range(2)
        for part in MAPS
    }
    assert set(record.tensors) == expected
    assert record.tensors["both.layers.0.cosine"].tolist() == pytest.approx([1 - high, 1], abs=1e-6)
    assert record.tensors["none.layers.1.cosine"].tolist() == pytest.approx([1 - low, 1], abs=1e-6)
    torch.testing.assert_close(
        record.tensors["both.residual"], torch.diag(torch.tensor([1.0, -1.0]))
    )
    assert all(t.dtype in (torch.float32, torch.int64) for t in record.tensors.values())

    described = record.describe()
    assert set(described) == {"residual", "heads", "neurons"}
    used = {kind: [s for s in sources if described[kind][s]["used"]] for kind in described}
    assert used == {
        "residual": ["both", "residual", "mean"],
        "heads": ["both", "heads", "mean"],
        "neurons": sources,
    }
    assert described["heads"]["mean"]["before"] == [0.25, 0.25]
    assert described["heads"]["mean"]["after"] == [0.25, 0.25 + round(3 * MIN_GAIN, 6)]
    assert described["residual"]["mean"]["before"] == [1, round(1 - 3 * MIN_GAIN, 6)]

    without = record.without_maps()
    assert set(without.tensors) == {
        key for key in record.tensors if key.endswith(("cosine", "correlation"))
    }
    assert not any(e["used"] for k in without.describe().values() for e in k.values())


def test_one_basis_serves_all_layers() -> None:
    """The one that fits the sum of all layers' covariances; each layer's cosine is measured under
    it, not under a better one of its own."""
    generator = torch.Generator().manual_seed(0)
    covariances = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64) / 5
    found = {f"b.c.layers.{layer}.covariance": c for layer, c in enumerate(covariances)}
    record = choose_maps(found, found.__getitem__, ["b.c"], 3)
    basis = residual_basis(covariances.sum(dim=0))
    torch.testing.assert_close(record.tensors["b.c.residual"], basis.float())
    for layer, one in enumerate(covariances):
        pair = record.tensors[f"b.c.layers.{layer}.cosine"].tolist()
        assert pair == pytest.approx([float(one.trace()), float((basis * one).sum())], abs=1e-6)
    assert set(record.describe()) == {"residual"}
    nothing: dict[str, Tensor] = {}
    assert choose_maps(nothing, nothing.__getitem__, ["b.c"], 3).tensors == {}


@pytest.mark.parametrize("num_layers", [2, 9])
def test_settling_holds_two_covariances_at_most_however_many_layers(num_layers: int) -> None:
    """They are hidden x hidden, in float64: together they would be larger than the sources."""
    found = findings(dict.fromkeys("bcd", [(MIN_GAIN * 2, MIN_GAIN * 2)] * num_layers))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal alive, most
        tensor = found[name].clone()
        if name.endswith(".covariance"):
            alive = [one for one in alive if one() is not None] + [weakref.ref(tensor)]
            most = max(most, len(alive))
        return tensor

    record = choose_maps(found, read, ["b", "c", "d"], num_layers)
    assert 1 <= most <= 2
    assert {"b.residual", "c.residual", "d.residual"} <= record.tensors.keys()


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="looks at the process's maps")
def test_what_is_settled_from_is_read_when_asked_for_and_keeps_no_file_mapped(
    recipes: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that was read holds on to its own bytes, and not to the covariances that lie beside
    it in its layer's file."""
    recipe = load_recipe(recipes("llama"), ["method=harmonized"])
    folder = RunFolder(tmp_path)
    folder.work.mkdir()
    settled = []

    def look(names: Mapping[str, Path], read: Callable[[str], Tensor], *others: Any) -> Alignment:
        kept = {name: read(name) for name in names}
        assert sum(name.endswith(".covariance") for name in kept) == 2 * 2
        assert "compared-" not in Path("/proc/self/maps").read_text(encoding="utf-8")
        assert all(read(name).data_ptr() != tensor.data_ptr() for name, tensor in kept.items())
        settled.append(others)
        return choose_maps(names, read, *others)

    monkeypatch.setattr(build_module, "choose_maps", look)
    windows = {
        name: Packed(torch.randint(256, (2, 64)), torch.arange(64).expand(2, 64))
        for name in recipe.sources
    }
    sources = open_sources(recipe)
    planned = make_plan(recipe, sources, sources)
    text = build_module.CalibrationText(windows, {})
    record = build_module.Build(recipe, sources, planned, text, folder)._align(ignore)
    assert settled == [(["b", "c"], 2, residual_basis)]
    assert "b.layers.1.cosine" in record.tensors


@pytest.mark.parametrize("layer", [0, 1])
def test_streams_are_compared_at_every_place(layer: int, recipes: Callable[[str], Path]) -> None:
    """Before the layer, between attention and FFN, and after the last layer; the validation text
    apart from the rest."""
    recipe = load_recipe(recipes("llama"), ["method=harmonized"])
    sources = open_sources(recipe)
    text = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    streams, own = Streams(), {}
    weights = {source.name: source.read_layer(layer) for source in sources}
    sweep = Sweep(recipe, sources, streams, text, 1)
    for source in sources:
        model = load_dense_layer(source.config, layer, weights[source.name])
        before = streams[source.name].clone()
        with observe(model) as seen, torch.no_grad():
            after = run_layer(model, before)
        own[source.name] = [before, seen["middle"]] + ([after] if layer == 1 else [])
    found = sweep.advance(layer, weights, compare=True)["b"]
    for rows, one in ((slice(1, None), found), (slice(0, 1), found.validation)):
        expected = ResidualCovariance(32)
        for a, b in zip(own["a"], own["b"], strict=True):
            expected.update(a[rows].flatten(0, 1), b[rows].flatten(0, 1))
        assert one is not None and one.residual is not None
        assert one.residual.count == expected.count
        torch.testing.assert_close(one.residual.result(), expected.result(), atol=1e-6, rtol=0)


def test_heads_are_scored_by_the_phases_that_the_family_allows() -> None:
    """Where only half turns are, a quarter turn makes two heads strangers."""
    _, config = config_of("qwen3")
    size = head_dim(config)
    counts = config.num_attention_heads, config.num_key_value_heads, config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    ours = HeadActivity(*(torch.randn(50, n, size, generator=generator) for n in counts))
    queries, keys = (
        torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
        for x in (ours.queries, ours.keys)
    )
    statistics = compare_heads(config, ours, HeadActivity(queries, keys, ours.outputs))
    any_phase, half_turns = (statistics.scores(phases) for phases in ("any", "half-turns"))
    torch.testing.assert_close(
        any_phase[0].diagonal(), torch.full((counts[0],), 2.0).double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        any_phase[1].diagonal(), torch.ones(counts[1]).double(), atol=1e-5, rtol=0
    )
    assert float(half_turns[1].diagonal().max()) < 0.6
    for part in (0, 1):
        assert bool((half_turns[part] <= any_phase[part] + 1e-9).all())
