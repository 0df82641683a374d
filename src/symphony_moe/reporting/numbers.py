"""Numbers in words."""

import math
from collections.abc import Sequence

Number = int | float

MISSING = "\N{EN DASH}"
"""Shown where nothing was measured."""


def count(value: Number) -> str:
    """A number of things, such as `262,144`."""
    return f"{value:,.0f}"


def compact(value: Number) -> str:
    """A number of tokens on an axis, such as `2.5M`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def in_words(value: Number) -> str:
    """A number of parameters, such as `1.54 billion`."""
    import humanize

    return count(value) if value < 1e6 else humanize.intword(value, "%.2f")


def size(num_bytes: Number) -> str:
    """Bytes, such as `3.1 GB` (10**9 bytes)."""
    import humanize

    return humanize.naturalsize(num_bytes)


def duration(seconds: Number) -> str:
    """Seconds, such as `4.2 seconds`, `3 minutes and 5 seconds` or `2 hours and 10 minutes`."""
    import humanize

    if seconds < 60:
        return humanize.precisedelta(seconds, format="%.1f")
    unit = "seconds" if seconds < 3600 else "minutes"
    return humanize.precisedelta(seconds, minimum_unit=unit, format="%.0f")


def loss_text(loss: Number | None) -> str:
    """Nats per token (or another value) with three decimals."""
    return MISSING if loss is None else f"{loss:z.3f}".replace("nan", "NaN")


def perplexity_text(loss: Number | None) -> str:
    """What e to the power of a loss is."""
    if loss is None:
        return "not measured"
    # Beyond 700 nats the exponential leaves float64.
    return f"perplexity {math.exp(loss):,.2f}" if loss < 700 else "perplexity is NaN or infinite"


def error_text(error: Number | None) -> str:
    """A relative error or a divergence with four decimals."""
    if error is None:
        return MISSING
    return f"{error:.4f}" if abs(error) < 1000 else f"{error:.2e}".replace("nan", "NaN")


def percent(share: Number) -> str:
    """A share of 1, such as `33.3 %`."""
    return f"{100 * share:.1f} %"


def or_nan(value: Number | None) -> float:
    """JSON has no NaN: null stands there for it."""
    return math.nan if value is None else float(value)


def is_number(value: Number | None) -> bool:
    """Whether a value was measured and is neither NaN nor infinite."""
    return value is not None and math.isfinite(value)


def mean(values: Sequence[Number]) -> float:
    """NaN where there are none."""
    return math.fsum(values) / len(values) if values else math.nan


def mean_of_all(values: Sequence[Number | None]) -> float | None:
    """The mean. None where a value is missing: a mean over fewer would not be comparable with the
    others of its column."""
    present = [value for value in values if value is not None]
    if not present or len(present) < len(values):
        return None
    return sum(present) / len(present)


def lowest_text(losses: Sequence[Number | None]) -> str | None:
    """The lowest finite loss as shown: what looks equal is marked alike."""
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return loss_text(min(finite)) if finite else None
