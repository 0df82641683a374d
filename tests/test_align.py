"""Correlations are numpy's, orders are scipy's, and reordering neurons changes no function."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import silu

from symphony_moe.align import (
    NeuronCorrelation,
    match_neurons,
    matched_correlation,
    reorder_neurons,
)
from symphony_moe.families import DOWN, GATE, UP

SEEDS = st.integers(0, 2**31)


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
    return np.corrcoef(together, rowvar=False)[:ffn, ffn:]


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
    """Law 1 for one FFN, float64, 1e-9; neuron j of the result is neuron order[j] of the FFN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ffn = {GATE: random(12, 8), UP: random(12, 8), DOWN: random(8, 12)}
    order = torch.randperm(12, generator=generator)
    reordered = reorder_neurons(ffn, order)
    for place, neuron in enumerate(order.tolist()):
        assert torch.equal(reordered[GATE][place], ffn[GATE][neuron])
        assert torch.equal(reordered[UP][place], ffn[UP][neuron])
        assert torch.equal(reordered[DOWN][:, place], ffn[DOWN][:, neuron])
    x = random(30, 8)
    expected = ffn_output(ffn, x)
    difference = (ffn_output(reordered, x) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-9
    back = reorder_neurons(reordered, torch.argsort(order))
    assert all(torch.equal(back[name], ffn[name]) for name in ffn)
