"""The parts that tables are made of."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from symphony_moe.reporting.numbers import Number


@dataclass(frozen=True)
class Cell:
    """One number of a table, as it is shown."""

    text: str
    title: str = ""
    """Shown where somebody points at it."""
    note: str = ""
    """Shown below it: its range, and the seeds that lack it."""
    best: bool = False
    """The lowest of its column."""
    own: bool = False
    """A source on the domain that it knows."""
    dropped: bool = False
    """After a step of the fit that was not kept."""


@dataclass(frozen=True)
class Shade:
    """One number of a table with colours."""

    text: str
    side: str
    """`less` or `more` than the middle; empty where the number is NaN."""
    strength: int
    """Of the colour, from 0 to 100."""


def ceiling_share(num_experts: int, top_k: int) -> float:
    """The share at which the colour is full: twice the uniform one, or the largest that there can
    be (an expert that is among the `top_k` of every token)."""
    return min(2 / num_experts, 1 / top_k)


def shade(share: Number, uniform: Number, ceiling: Number) -> Shade:
    """A share in per cent. The colour is full at no tokens and at the ceiling."""
    if not math.isfinite(share):
        return Shade("NaN", "", 0)
    if share < uniform:
        side, strength = "less", (uniform - share) / uniform
    else:
        side, strength = "more", (share - uniform) / max(ceiling - uniform, 1e-9)
    return Shade(f"{100 * share:.1f}", side, round(100 * min(strength, 1.0)))


def in_order(known: Iterable[str], *found: Iterable[str]) -> list[str]:
    """The names that were found: the known ones in their order, then the others."""
    names = {name: None for row in found for name in row}
    return list({name: None for name in known if name in names} | names)
