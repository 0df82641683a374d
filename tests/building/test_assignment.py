"""The assignment is scipy's optimum, also where it is solved on few candidates, and the bound that
shows it is true."""

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from checks import mostly_slow
from symphony_moe.building import assignment
from symphony_moe.building.assignment import best_columns, optimality_gap

SEEDS = st.integers(0, 2**31)
Matrix = NDArray[Any]
SIZE = 800
"""More than what is solved on all entries at once."""


def normal(seed: int, size: int = SIZE) -> Matrix:
    return np.random.default_rng(seed).standard_normal((size, size)).astype(np.float32)


def correlated(seed: int, size: int = SIZE) -> Matrix:
    """As of neurons of strangers on text: of low rank, so that many rows want the same columns."""
    generator = np.random.default_rng(seed)
    rows, columns = (
        generator.standard_normal((size, 24)) * np.logspace(0, -1, 24) for _ in range(2)
    )
    scores = rows @ columns.T
    return np.asarray(scores / np.abs(scores).max(), dtype=np.float32)


def related(seed: int, size: int = SIZE) -> Matrix:
    """A permutation under noise that hides some of it."""
    order = np.random.default_rng(seed).permutation(size)
    return np.eye(size, dtype=np.float32)[order] * 3 + normal(seed + 1, size)


def silent(seed: int, rows: int, columns: int) -> Matrix:
    """Some neurons never move: zero rows and columns."""
    generator = np.random.default_rng(seed)
    scores = correlated(seed)
    scores[generator.choice(SIZE, rows, replace=False)] = 0
    scores[:, generator.choice(SIZE, columns, replace=False)] = 0
    return scores


def product(seed: int) -> Matrix:
    """Every row ranks the columns alike: the worst for few candidates."""
    rows, columns = np.random.default_rng(seed).random((2, SIZE))
    return np.outer(rows, columns).astype(np.float32)


KINDS: dict[str, Callable[[int], Matrix]] = {
    "normal": normal,
    "double": lambda seed: normal(seed).astype(np.float64),
    "correlated": correlated,
    "related": related,
    "a permutation": lambda seed: related(seed) * 0 + np.eye(SIZE, dtype=np.float32)[::-1],
    "a silent neuron": lambda seed: silent(seed, 1, 1),
    "silent rows": lambda seed: silent(seed, 20, 0),
    "silent columns": lambda seed: silent(seed, 0, 20),
    "many silent neurons": lambda seed: silent(seed, 250, 400),
    "twins": lambda seed: correlated(seed)[np.arange(SIZE) // 2],
    "rounded": lambda seed: correlated(seed).round(2),
    "few values": lambda seed: correlated(seed).round(1),
    "all negative": lambda seed: correlated(seed) - 5,
    "large numbers": lambda seed: correlated(seed) * np.float32(1e20),
    "small numbers": lambda seed: correlated(seed) * np.float32(1e-20),
    "one large row": lambda seed: (
        correlated(seed) * np.where(np.arange(SIZE) == 7, 1e6, 1)[:, None]
    ),
    "constant": lambda seed: np.full((SIZE, SIZE), 0.25, dtype=np.float32),
    "zero": lambda seed: np.zeros((SIZE, SIZE), dtype=np.float32),
    "product": product,
}


def total(scores: Matrix, columns: Matrix) -> float:
    return math.fsum(scores[np.arange(len(scores)), columns].astype(np.float64))


def check_optimum(scores: Matrix) -> None:
    """A permutation whose sum is scipy's, within rounding."""
    columns = best_columns(torch.from_numpy(scores)).numpy()
    assert np.array_equal(np.sort(columns), np.arange(len(scores)))
    _, best = linear_sum_assignment(scores.astype(np.float64), maximize=True)
    assert abs(total(scores, columns) - total(scores, best)) <= 1e-10 * np.abs(scores).max()


@pytest.mark.parametrize("seed", mostly_slow([0, 1], 0))
@pytest.mark.parametrize("kind", KINDS)
def test_large_problems_have_scipys_optimum(kind: str, seed: int) -> None:
    check_optimum(KINDS[kind](seed))


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 40), decimals=st.integers(0, 8))
def test_small_problems_have_scipys_optimum(seed: int, size: int, decimals: int) -> None:
    check_optimum(normal(seed, size).round(decimals))


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, size=st.integers(129, 400), decimals=st.sampled_from([1, 2, 8]))
def test_few_candidates_are_enough_at_any_size(seed: int, size: int, decimals: int) -> None:
    """Few: so that entries which no row or column would have named must be found by the prices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "_DENSE", 0)
        patch.setattr(assignment, "_BEST", 2)
        patch.setattr(assignment, "_MOST", 1.0)
        check_optimum(correlated(seed, size).round(decimals))


@pytest.mark.parametrize("kind", ["normal", "correlated", "related", "twins", "a silent neuron"])
def test_neurons_are_matched_on_few_candidates(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver that takes all entries is not asked."""
    monkeypatch.setattr(assignment.lap, "lapjv", None)
    check_optimum(KINDS[kind](2))


def test_entries_that_the_first_candidates_lack_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight candidates a row and column are too few for an optimum; the prices name the others."""
    monkeypatch.setattr(assignment, "_BEST", 8)
    monkeypatch.setattr(assignment.lap, "lapjv", None)
    solved = []
    solve = assignment._solve

    def counted(candidates: Any, prices: Any) -> Any:
        columns = solve(candidates, prices)
        solved.append(total(scores, columns))
        return columns

    monkeypatch.setattr(assignment, "_solve", counted)
    scores = correlated(3)
    check_optimum(scores)
    assert len(solved) > 1 and solved == sorted(solved) and solved[-1] > solved[0] + 0.01


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, size=st.integers(2, 30), double=st.booleans())
def test_no_assignment_is_beyond_the_bound(seed: int, size: int, double: bool) -> None:
    """Whatever the assignment and the prices: the optimum is within the gap, and entries that can
    raise the sum are named."""
    scores = normal(seed, size).astype(np.float64) if double else normal(seed, size)
    generator = np.random.default_rng(seed + 1)
    columns = generator.permutation(size)
    prices = generator.standard_normal(size)
    gap, raising = optimality_gap(scores, columns, prices)
    _, best = linear_sum_assignment(scores, maximize=True)
    missing = total(scores, best) - total(scores, columns)
    assert gap >= missing - 1e-9
    if missing > 1e-9:
        assert len(raising)
    rows, others = np.divmod(raising, size)
    worth = scores.astype(np.float64) - prices
    assert (worth[rows, others] > worth[rows, columns[rows]]).all()
    # To the number: what each row would be worth in its best column.
    assert gap == pytest.approx((worth.max(axis=1) - worth[np.arange(size), columns]).sum())


def test_an_assignment_that_is_not_the_best_has_no_prices_without_a_gap() -> None:
    """Two rows exchanged: no prices hide it."""
    scores = correlated(5, 200)
    _, best = linear_sum_assignment(scores, maximize=True)
    columns = best.copy()
    columns[[3, 9]] = columns[[9, 3]]
    places = np.arange(200 * 200)
    candidates = assignment._Candidates.at(places, scores)
    assert assignment._raise(candidates, columns, np.zeros(200)) is None
    prices = assignment._raise(candidates, best, np.zeros(200))
    assert prices is not None
    assert optimality_gap(scores, best, prices)[0] < 1e-10
    lost = total(scores, best) - total(scores, columns)
    assert optimality_gap(scores, columns, prices)[0] == pytest.approx(lost)


def test_it_takes_little_memory_beside_the_matrix() -> None:
    """All of its entries in float64 would take twice as much as it has itself."""
    scores = torch.from_numpy(correlated(0, 3000))
    best_columns(scores[:800, :800])
    tracemalloc.start()
    try:
        best_columns(scores)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.6 * scores.numel() * 4
