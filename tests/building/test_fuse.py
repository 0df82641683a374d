"""The fusions are what their formulas say, whatever the order, the number and the size."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from symphony_moe.building.fuse import linear_mean, normalized, selective_linear, slerp

SEEDS = st.integers(0, 2**31)


def random_tensors(
    seed: int, count: int, shape: tuple[int, ...] = (6, 5), common: float = 0.5
) -> list[Tensor]:
    """Tensors of different norms, as fine-tuned weights are: something in common, and something
    each."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape, generator=generator)
    return [
        (common * shared + torch.randn(shape, generator=generator)) * (1 + 0.3 * number)
        for number in range(count)
    ]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def textbook_slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """`sin((1-t)w)/sin(w) a + sin(tw)/sin(w) b`, `cos w = <a,b>/(|a||b|)`."""
    w = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    return np.asarray(np.sin((1 - t) * w) / np.sin(w) * a + np.sin(t * w) / np.sin(w) * b)


@pytest.mark.parametrize("common", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("t", [0.1, 0.25, 0.5, 0.8, 0.99])
def test_slerp_of_two_equal_norms_is_the_textbook_formula(t: float, common: float) -> None:
    """Sec. 3.2's formula, with t the second tensor's share."""
    a, b = random_tensors(0, 2, (7, 3), common)
    b = b * a.norm() / b.norm()
    expected = textbook_slerp(a.double().numpy(), b.double().numpy(), t)
    assert distance(slerp([a, b], [1 - t, t]), torch.from_numpy(expected)) < 1e-6


def test_slerp_ends_at_its_arguments() -> None:
    """All the weight on one tensor gives that tensor."""
    tensors = random_tensors(1, 3)
    for place in range(3):
        weights = [float(number == place) for number in range(3)]
        assert distance(slerp(tensors, weights), tensors[place]) < 1e-7


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    scales=st.lists(st.floats(0.01, 100), min_size=2, max_size=5),
    data=st.data(),
)
def test_slerp_of_parallel_tensors_is_their_linear_mean(
    seed: int, scales: list[float], data: st.DataObject
) -> None:
    """Law 2, second half."""
    base = random_tensors(seed, 1)[0]
    weights = data.draw(
        st.lists(st.floats(0.01, 1), min_size=len(scales), max_size=len(scales)), "weights"
    )
    tensors = [base * scale for scale in scales]
    assert distance(slerp(tensors, weights), linear_mean(tensors, weights)) < 1e-6


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_slerp_does_not_depend_on_the_order_of_sources(
    seed: int, weights: list[float], order: random.Random
) -> None:
    """Permuting tensors together with their weights changes rounding only."""
    tensors = random_tensors(seed, len(weights))
    places = list(range(len(weights)))
    order.shuffle(places)
    again = slerp([tensors[p] for p in places], [weights[p] for p in places])
    assert distance(again, slerp(tensors, weights)) < 1e-6


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_identical_tensors_come_back_bit_for_bit(count: int, scale: float) -> None:
    """Fusing copies of one model gives the model, not the model up to rounding."""
    tensor = random_tensors(2, 1, (11, 13))[0] * scale
    weights = [0.7, 0.1, 0.3, 0.9, 0.2, 0.33, 0.01][:count]
    for fuse in (slerp, linear_mean):
        assert torch.equal(fuse([tensor] * count, weights), tensor)


def test_directions_without_a_mean_fall_back_to_the_linear_mean() -> None:
    """A zero tensor has no direction; opposite tensors have no unique mean between them."""
    a, b = random_tensors(3, 2)
    for tensors, weights in (
        ([a, torch.zeros_like(a)], [0.5, 0.5]),
        ([torch.zeros_like(a), a, b], [0.2, 0.3, 0.5]),
        ([torch.zeros_like(a)] * 2, [1.0, 1.0]),
        ([a, -a], [0.5, 0.5]),
        ([a, -2 * a], [0.5, 0.5]),
        ([a, -a], [0.7, 0.3]),
        ([a, b, -a], [0.6, 0.2, 0.2]),
    ):
        fused = slerp(tensors, weights)
        assert torch.isfinite(fused).all()
        torch.testing.assert_close(fused, linear_mean(tensors, weights), rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=6),
    common=st.floats(0.3, 30),
)
def test_slerp_is_where_the_weighted_tangents_cancel(
    seed: int, weights: list[float], common: float
) -> None:
    """The condition that defines the Karcher mean: at the result, the tangents toward the
    directions, weighted, add up to nothing."""
    # float32 results: the direction is known to 1e-7 and the sum of tangents no better.
    tensors = random_tensors(seed, len(weights), (5, 8), common)
    mean = slerp(tensors, weights).double().numpy().ravel()
    mean = mean / np.linalg.norm(mean)
    total = np.zeros_like(mean)
    for tensor, weight in zip(tensors, weights, strict=True):
        direction = tensor.double().numpy().ravel()
        direction = direction / np.linalg.norm(direction)
        across = direction - (direction @ mean) * mean
        length = np.linalg.norm(across)
        if length > 0:
            angle = np.arctan2(length, direction @ mean)
            total += weight / sum(weights) * angle * across / length
    assert np.linalg.norm(total) < 1e-6


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=6))
def test_the_norm_of_a_slerp_is_the_weighted_mean_of_the_norms(
    seed: int, weights: list[float]
) -> None:
    """A mean of directions must not shrink the weights, as a linear mean does."""
    tensors = random_tensors(seed, len(weights))
    expected = sum(w * float(t.double().norm()) for w, t in zip(weights, tensors, strict=True))
    expected /= sum(weights)
    assert math.isclose(float(slerp(tensors, weights).norm()), expected, rel_tol=1e-5)


def test_slerp_keeps_shape_and_takes_any_float_dtype() -> None:
    """Sources may be stored in other dtypes; the result is float32."""
    tensors = [t.view(2, 3, 5) for t in random_tensors(4, 2)]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        fused = slerp([t.to(dtype) for t in tensors], [0.5, 0.5])
        assert fused.dtype == torch.float32 and fused.shape == (2, 3, 5)


def test_linear_mean_is_the_weighted_mean() -> None:
    """Against numpy in float64; weights need not sum to one."""
    tensors = random_tensors(5, 4, (9,))
    weights = [1.0, 2.0, 0.0, 5.0]
    expected = np.average([t.double().numpy() for t in tensors], axis=0, weights=weights)
    assert distance(linear_mean(tensors, weights), torch.from_numpy(expected)) < 1e-7
    for places in itertools.permutations(range(4)):
        again = linear_mean([tensors[p] for p in places], [weights[p] for p in places])
        assert distance(again, torch.from_numpy(expected)) < 1e-7


def test_linear_mean_accumulates_in_float64() -> None:
    """Large weights that cancel leave what is between them."""
    tensors = [torch.tensor([1e8, 3.0]), torch.tensor([1.0, 3.0]), torch.tensor([-1e8, 3.0])]
    torch.testing.assert_close(
        linear_mean(tensors, [1.0, 1.0, 1.0]), torch.tensor([1 / 3, 3.0]), rtol=1e-6, atol=0
    )


def test_normalized_weights_sum_to_one() -> None:
    """Shares, in float64, in the order given."""
    shares = normalized([3.0, 1.0, 4.0])
    assert shares.dtype == torch.float64
    assert shares.tolist() == [3 / 8, 1 / 8, 4 / 8]


def test_selective_linear_means_what_is_shared_and_keeps_what_is_not() -> None:
    """Sec. 3.2, embeddings: the weighted mean over the sources that know a token."""
    tables = random_tensors(6, 3, (5, 4))
    known = torch.tensor(
        [  # tokens: all know, a and c, only b, only c, b and c
            [1.0, 1.0, 0.0, 0.0, 0.0],
            [1.0, 0.0, 1.0, 0.0, 1.0],
            [1.0, 1.0, 0.0, 1.0, 1.0],
        ]
    )
    weights = [0.2, 0.3, 0.5]
    fused = selective_linear(tables, known, weights)
    a, b, c = tables
    assert distance(fused[0], 0.2 * a[0] + 0.3 * b[0] + 0.5 * c[0]) < 1e-6
    assert distance(fused[1], (0.2 * a[1] + 0.5 * c[1]) / 0.7) < 1e-6
    assert torch.equal(fused[2], b[2])
    assert torch.equal(fused[3], c[3])
    assert distance(fused[4], (0.3 * b[4] + 0.5 * c[4]) / 0.8) < 1e-6


def test_selective_linear_of_one_vocabulary_is_the_linear_mean() -> None:
    """Where every source knows every token, selecting changes nothing."""
    tables, weights = random_tensors(7, 3, (10, 4)), [1.0, 2.0, 3.0]
    fused = selective_linear(tables, torch.ones(3, 10), weights)
    assert distance(fused, linear_mean(tables, weights)) < 1e-7


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, weights=st.sampled_from([[1.0, 1.0, 1.0], [1.0, 2.0, 0.0]]))
def test_selective_linear_by_counts_is_the_least_squares_table(
    seed: int, weights: list[float]
) -> None:
    """With the numbers of each token in each source's text: the table that is closest, in the sum
    over that text (a source's tokens weighing its share), to each source's own rows."""
    tables = random_tensors(seed, 3, (6, 4))
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(5, (3, 6), generator=generator).float()
    counts[0] += 1  # a token that nobody has is refused
    inputs, targets = [], []
    for table, row, weight in zip(tables, counts, weights, strict=True):
        for token, count in enumerate(row.int().tolist()):
            one_hot = np.eye(6)[token] * np.sqrt(weight)
            inputs += [one_hot] * count
            targets += [table[token].double().numpy() * np.sqrt(weight)] * count
    expected = np.linalg.lstsq(np.array(inputs), np.array(targets), rcond=None)[0]
    fused = selective_linear(tables, counts, weights)
    assert fused.dtype == torch.float32
    assert distance(fused, torch.from_numpy(expected)) < 1e-6
    # Only a source's part in a token counts, not how often the token is there.
    for factor in (0.1, 1000.0):
        assert distance(selective_linear(tables, counts * factor, weights), fused) < 1e-6


def test_a_token_that_nobody_knows_is_refused() -> None:
    """There is no vector to give it."""
    tables, known = random_tensors(8, 2, (3, 4)), torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="token 1 "):
        selective_linear(tables, known, [1.0, 1.0])


def test_a_token_that_only_a_source_of_weight_0_knows_is_that_sources() -> None:
    tables, known = random_tensors(8, 2, (3, 4)), torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    fused = selective_linear(tables, known, [1.0, 0.0])
    assert torch.equal(fused, torch.stack([tables[0][0], tables[1][1], tables[0][2]]))


# Piece by piece


@pytest.mark.parametrize("shape", [(3, 5), (64, 4), (65, 7), (1, 300), (300, 1), (129,)])
def test_means_of_pieces_are_the_means(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, whatever the size of a piece."""
    tensors = random_tensors(3, 3, shape)
    shares = [0.2, 0.3, 0.5]
    whole = linear_mean(tensors, shares)
    knowledge = (torch.arange(3 * shape[0]).view(3, -1) % 2).float()
    knowledge[0] = 1
    table = selective_linear(tensors, knowledge, shares) if len(shape) == 2 else None
    monkeypatch.setattr("symphony_moe.building.fuse._PIECE", 16)
    assert torch.equal(linear_mean(tensors, shares), whole)
    expected = sum(t.double() * s for t, s in zip(tensors, shares, strict=True))
    assert distance(whole, torch.as_tensor(expected)) < 1e-7
    if table is not None:
        assert torch.equal(selective_linear(tensors, knowledge, shares), table)
