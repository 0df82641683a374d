"""The linear assignment problem, exactly: the column that each row takes, each another one, so that
the sum of scores is largest.

A large problem is solved on few candidates: the best entries of every row and of every column.
Prices of the columns (the dual variables) then show that no other entry would help, or which ones
may. Those become candidates too, and it is solved again. What is returned has been shown to be the
best.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lap
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

_DENSE = 768
"""Up to this many rows, all entries are candidates."""

_PARTS, _BEST = 128, 32
"""A row is cut into _PARTS parts. What is as large as the largest entry of each of the _BEST best
parts is a candidate; of a column likewise."""

_MOST = 1 / 8
"""Share of the entries. Where more are candidates, most are equal, and all are made candidates."""

_ROUNDS = 50
"""Times that candidates are added. It takes two or three."""

_ROUNDING = 1e-14
"""Share of the largest price or score. Gains below it are rounding in float64."""

_AT_ONCE = 2**19
"""Entries that are looked at together. They fit in a processor's cache."""

Scores = NDArray[np.floating[Any]]
Numbers = NDArray[np.int64]
Prices = NDArray[np.float64]


def best_columns(scores: Float[Tensor, "rows columns"]) -> Int[Tensor, " rows"]:
    """The column of each row in the assignment with the largest sum of scores, of a square matrix.

    Exact: sums are float64. Beyond the matrix itself it takes little memory, unless most of a row's
    entries are equal in many rows: then 8 bytes for each entry.
    """
    matrix = scores.detach().cpu().numpy()
    columns = _on_candidates(matrix) if len(matrix) > _DENSE else None
    if columns is None:
        costs = matrix.astype(np.float64)
        costs /= -_unit(costs)
        _, columns, _ = lap.lapjv(costs)
    return torch.from_numpy(columns.astype(np.int64))


def optimality_gap(scores: Scores, columns: Numbers, prices: Prices) -> tuple[float, Numbers]:
    """How far the sum of an assignment is from the largest one at most, and the entries (row * size
    + column) that may raise it. Any prices of the columns give a true bound; the best ones, 0.

    A row is worth its score less the price of its column. No assignment's sum is larger than all
    prices and, for every row, what it would be worth in its best column.
    """
    size = len(scores)
    worth = scores[np.arange(size), columns].astype(np.float64) - prices[columns]
    largest = float(max(np.abs(prices).max(), np.abs(worth).max()))
    # In the precision of the scores first, to see which entries to look at in float64.
    slack = 8 * float(np.finfo(scores.dtype).eps) * largest
    rough, least = prices.astype(scores.dtype), (worth - slack).astype(scores.dtype)[:, None]
    places = _places(size, lambda rows: scores[rows] - rough >= least[rows], size * size)
    assert places is not None
    rows, others = np.divmod(places, size)
    gains = scores[rows, others].astype(np.float64) - prices[others] - worth[rows]
    best = np.zeros(size)
    np.maximum.at(best, rows, gains)
    return float(best.sum()), places[gains > _ROUNDING * largest]


@dataclass(frozen=True)
class _Candidates:
    """Some entries of the scores, row by row, by the columns in each."""

    places: Numbers
    """row * size + column."""
    rows: Numbers
    columns: Numbers
    scores: Prices
    begins: Numbers
    """Where each row begins, and where the last one ends."""

    @classmethod
    def at(cls, places: Numbers, scores: Scores) -> "_Candidates":
        """The entries at some ascending places."""
        size = len(scores)
        rows, columns = np.divmod(places, size)
        begins = np.searchsorted(places, np.arange(size + 1) * size)
        return cls(places, rows, columns, scores[rows, columns].astype(np.float64), begins)


def _on_candidates(scores: Scores) -> Numbers | None:
    """The best assignment; None where too many entries are equal for this to be of use."""
    favourites: Numbers = scores.argmax(axis=1)
    size = len(scores)
    if np.bincount(favourites).max() == 1:
        return favourites
    most = int(_MOST * size * size)
    places, prices = _best_places(scores, most), np.zeros(size)
    for _ in range(_ROUNDS):
        if places is None or len(places) > most:
            return None
        candidates = _Candidates.at(places, scores)
        columns = _solve(candidates, prices)
        raised = _raise(candidates, columns, prices)
        if raised is None:
            return None
        prices = raised
        _, missing = optimality_gap(scores, columns, prices)
        if not len(missing):
            return columns
        # Two ascending runs are merged; entries that are there already stay there once.
        places = np.sort(np.concatenate((places, missing)), kind="stable")
        places = places[np.diff(places, prepend=-1) > 0]
    return None


def _best_places(scores: Scores, most: int) -> Numbers | None:
    """The largest entries of every row and column, and the diagonal, so that there is an assignment
    in any case; None where they are more than `most`."""
    size = len(scores)
    width = size // _PARTS
    parts = [scores[begin : begin + width] for begin in range(0, size, width)]
    of_columns = np.stack([part.max(axis=0) for part in parts])
    # The entries of a part of a row stand _PARTS apart: that is a loop over rows for the processor.
    of_rows = np.concatenate(
        [p[:, : width * _PARTS].reshape(len(p), width, _PARTS).max(axis=1) for p in parts]
    )
    row_least = np.partition(of_rows, -_BEST, axis=1)[:, [-_BEST]]
    column_least = np.partition(of_columns, -_BEST, axis=0)[-_BEST]

    def chosen(rows: slice) -> NDArray[np.bool_]:
        block = scores[rows]
        marked: NDArray[np.bool_] = (block >= row_least[rows]) | (block >= column_least)
        marked.reshape(-1)[rows.start :: size + 1] = True
        return marked

    return _places(size, chosen, most)


def _places(size: int, chosen: Callable[[slice], NDArray[np.bool_]], most: int) -> Numbers | None:
    """Where a square matrix is true, ascending; None where that is in more than `most` places.
    `chosen`: some rows -> their entries."""
    found, count, step = [], 0, max(1, _AT_ONCE // size)
    for begin in range(0, size, step):
        found.append(np.flatnonzero(chosen(slice(begin, begin + step))) + begin * size)
        count += len(found[-1])
        if count > most:
            return None
    return np.concatenate(found)


def _solve(candidates: _Candidates, prices: Prices) -> Numbers:
    """The best assignment of the candidates. `prices`: where it is thought to be; good ones save
    time."""
    worth = candidates.scores - prices[candidates.columns]
    best = np.maximum.reduceat(worth, candidates.begins[:-1])
    size = len(prices)
    costs = best[candidates.rows] - worth
    begins, places = (x.astype(np.int32) for x in (candidates.begins, candidates.columns))
    columns, _ = lap.lapmod(size, costs / _unit(costs), begins, places, return_cost=False)
    return np.asarray(columns, dtype=np.int64)


def _unit(costs: Prices) -> float:
    """A power of two, by which division is exact: lap takes costs of a million for infinite."""
    return float(2.0 ** np.frexp(max(costs.max(), -costs.min()))[1])


def _raise(candidates: _Candidates, columns: Numbers, prices: Prices) -> Prices | None:
    """Prices at which no row would rather have another candidate than its column: the given ones,
    raised as little as that takes. None where there are none: the assignment is not the best.

    Bellman and Ford: a row that would rather have another column raises its price, and then only
    the row of that column is asked again.
    """
    size = len(prices)
    own = candidates.columns == columns[candidates.rows]
    more = candidates.scores - candidates.scores[own][candidates.rows]
    owners = np.empty(size, dtype=np.int64)
    owners[columns] = np.arange(size)
    lengths = np.diff(candidates.begins)
    prices = prices.copy()
    asked = np.arange(size)
    for _ in range(size):
        counts = lengths[asked]
        ends = counts.cumsum()
        entries = np.arange(ends[-1]) + np.repeat(candidates.begins[asked] - ends + counts, counts)
        wanted = candidates.columns[entries]
        offers = more[entries] + np.repeat(prices[columns[asked]], counts)
        least = 0.1 * _ROUNDING * float(np.abs(offers).max())
        higher = offers > prices[wanted] + least
        if not higher.any():
            return prices
        np.maximum.at(prices, wanted[higher], offers[higher])
        moved = np.zeros(size, dtype=bool)
        moved[owners[wanted[higher]]] = True
        asked = np.flatnonzero(moved)
    return None
