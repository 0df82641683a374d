"""Which windows of a text add the most to those that are chosen (`calibration.windows: coverage`).

With c the number of times that a token, or a pair of neighbours, is in the chosen windows, the
choice makes the sum of log(1 + c) large. This is submodular: what a window adds only shrinks. So
taking the best window next, again and again, comes to at least 1 - 1/e of the best sum there is
(Nemhauser, Wolsey and Fisher, 1978), and what a window added earlier bounds what it adds now
(Minoux, 1978).
"""

import heapq
from collections.abc import Collection

import numpy
from jaxtyping import Int
from torch import Tensor

_PAIR_BITS = 22
"""Pairs are counted in 2**22 places. Two may share one: memory stays the same for any text."""
_MIX = 0x9E3779B97F4A7C15
"""An odd number with well mixed bits (2**64 divided by the golden ratio): spreads the pairs."""
_UNIT = 2**20
"""Logarithms are counted in this part of one. Sums of whole numbers are the same everywhere."""
_LOOKS = 256
"""So many windows are counted again at each step, at most. Then the one is taken that was worth
most when it was last counted. Where windows are all alike, every one would be counted again."""

_Counted = tuple[numpy.ndarray, numpy.ndarray]


def covering_windows(
    windows: Int[Tensor, "windows sequence"], count: int, chosen: Collection[int] = ()
) -> list[int]:
    """Numbers of `count` windows beside those that are `chosen` already, the most valuable first
    (all others, where there are fewer)."""
    rows = windows.numpy()
    vocabulary = int(rows.max(initial=0)) + 1
    seen = numpy.zeros(vocabulary + 2**_PAIR_BITS, dtype=numpy.int64)
    for row in chosen:
        places, times = _counted(rows[row], vocabulary)
        seen[places] += times
    others = set(range(len(rows))).difference(chosen)
    # Negative, as the heap gives the least; of equals the first window.
    bounds = [(-_added(seen, *_counted(rows[row], vocabulary)), row) for row in others]
    heapq.heapify(bounds)
    found: list[int] = []
    while bounds and len(found) < count:
        for _ in range(_LOOKS):
            _, row = bounds[0]
            value = -_added(seen, *_counted(rows[row], vocabulary))
            heapq.heapreplace(bounds, (value, row))
            if bounds[0] == (value, row):
                break
        _, row = heapq.heappop(bounds)
        places, times = _counted(rows[row], vocabulary)
        seen[places] += times
        found.append(row)
    return found


def _added(seen: numpy.ndarray, places: numpy.ndarray, times: numpy.ndarray) -> int:
    """What a window adds, of tokens and pairs that were seen so often."""
    before = seen[places]
    worth = (numpy.rint(numpy.log1p(counts) * _UNIT) for counts in (before + times, before))
    return int(numpy.subtract(*worth).sum())


def _counted(tokens: numpy.ndarray, vocabulary: int) -> _Counted:
    """Where a window's tokens and pairs are counted, and how often each is there."""
    tokens = tokens.astype(numpy.uint64)
    mixed = (tokens[:-1] * numpy.uint64(vocabulary) + tokens[1:]) * numpy.uint64(_MIX)
    pairs = (mixed >> numpy.uint64(64 - _PAIR_BITS)) + numpy.uint64(vocabulary)
    places, times = numpy.unique(numpy.concatenate((tokens, pairs)), return_counts=True)
    return places.astype(numpy.int64), times
