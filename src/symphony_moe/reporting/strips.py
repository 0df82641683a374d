"""Strips: for each row a line of values on one common scale, drawn by the page itself.

Python says where a mark stands, `parts.html.j2` and `page.css` draw it. So a strip is as wide as
the page, on a phone too, and its letters stay as large as the text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from symphony_moe.reporting.charts import ticks
from symphony_moe.reporting.numbers import Number


@dataclass(frozen=True)
class Value:
    """One value of a row."""

    kind: str
    """How it looks, a class of `page.css`: `before`, `after`, `goal` or `other`."""
    value: Number
    title: str
    """What is shown where somebody points at it."""


@dataclass(frozen=True)
class PlacedMark:
    """A value in its place."""

    kind: str
    left: float
    """In per cent of the width."""
    title: str
    beyond: bool
    """Whether the value is beyond the scale, and its mark stands at the end."""


@dataclass(frozen=True)
class Strip:
    """One row."""

    label: str
    words: list[str]
    """Its numbers in words."""
    marks: list[PlacedMark]
    note: str = ""
    """What is to be said of the label."""


@dataclass(frozen=True)
class Strips:
    """Rows on one scale."""

    title: str
    upward: str
    """What the scale measures."""
    rows: list[Strip]
    axis: list[tuple[float, str]]
    """(place in per cent, number)"""
    kinds: list[tuple[str, str]]
    """(kind, what it is), for the legend"""

    @property
    def any_beyond(self) -> bool:
        """Whether a mark stands at the end because its value is beyond the scale."""
        return any(mark.beyond for row in self.rows for mark in row.marks)


@dataclass(frozen=True)
class Scale:
    """From its first round number to its last."""

    marks: list[float]

    @classmethod
    def of(cls, low: Number, high: Number) -> "Scale":
        """A scale of round numbers that spans both."""
        return cls(ticks(low, high))

    @property
    def axis(self) -> list[tuple[float, str]]:
        """The round numbers in their places."""
        step = self.marks[1] - self.marks[0]
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(self._place(mark), f"{mark:.{decimals}f}") for mark in self.marks]

    def marks_of(self, values: Sequence[Value]) -> list[PlacedMark]:
        """The values that are numbers, in their places."""
        low, high = self.marks[0], self.marks[-1]
        return [
            PlacedMark(
                one.kind,
                round(self._place(min(max(one.value, low), high)), 2),
                one.title,
                beyond=one.value > high,
            )
            for one in values
            if math.isfinite(one.value)
        ]

    def _place(self, value: Number) -> float:
        low, high = self.marks[0], self.marks[-1]
        return 100 * (value - low) / (high - low)


def expert_colour(number: int) -> str:
    """The classes of an expert's colour in `page.css`: eight colours, then the same eight with
    other lines."""
    return f"e{number % 8} s{number // 8 % 3}"
