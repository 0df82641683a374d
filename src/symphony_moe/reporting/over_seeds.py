"""The rows of a comparison by method, stage and seed, and what they are over the seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from symphony_moe.reporting.comparison_table import Entry, mean_of
from symphony_moe.reporting.numbers import Number, is_number, loss_text, mean

IN_DOMAIN, OUT_OF_DOMAIN = "in domain", "out of domain"

PLACES = (IN_DOMAIN, OUT_OF_DOMAIN)
"""Where a loss is measured."""

Entries = Sequence[Entry]

Column = Mapping[str, Mapping[int, Number | None]]
"""Method -> seed -> what was measured, None where it is NaN or infinite."""


@dataclass(frozen=True)
class Spread:
    """One number over seeds."""

    mean: float
    low: float
    high: float
    num: int
    """Seeds that have it."""


def methods_of(entries: Entries) -> list[str]:
    """In the order of the entries."""
    return list(dict.fromkeys(entry["method"] for entry in entries))


def seeds_of(entries: Entries, method: str) -> list[int]:
    """The seeds of a method."""
    return list(dict.fromkeys(entry["seed"] for entry in entries if entry["method"] == method))


def of_stage(entries: Entries, method: str, stage: str) -> dict[int, Entry]:
    """The entries of one method and stage by seed."""
    return {e["seed"]: e for e in entries if (e["method"], e["stage"]) == (method, stage)}


def column_of(entries: Entries, stage: str, where: str) -> Column:
    """Every method's mean losses at a place."""
    return {
        method: {
            seed: mean_of(entry, where) for seed, entry in of_stage(entries, method, stage).items()
        }
        for method in methods_of(entries)
    }


def is_measured(entries: Entries, where: str) -> bool:
    """Whether any model has a mean there: none has where there is no such domain."""
    return any(is_number(mean_of(entry, where)) for entry in entries)


def spread(values: Sequence[Number | None]) -> Spread | None:
    """Over the values that are neither NaN nor infinite; None where none is."""
    numbers = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not numbers:
        return None
    return Spread(mean(numbers), min(numbers), max(numbers), len(numbers))


def seeds_text(entries: Entries) -> str:
    """What a number of the tables is, by the seeds that there are."""
    nums = {len(seeds_of(entries, method)) for method in methods_of(entries)}
    if nums == {1}:
        return "one seed"
    if len(nums) == 1:
        return f"mean over {nums.pop()} seeds (lowest to highest)"
    return "mean over each method's seeds (lowest to highest)"


def incomplete_text(entries: Entries, known: Sequence[str]) -> str:
    """Which mean losses are NaN or infinite, in words."""
    lacking: dict[str, list[str]] = {}
    for entry in entries:
        for where in known:
            if not is_number(mean_of(entry, where)):
                name = f"{entry['method']}, {entry['stage']}, {where}"
                lacking.setdefault(name, []).append(str(entry["seed"]))
    return "; ".join(f"{name} (seed {', '.join(seeds)})" for name, seeds in lacking.items())


def range_text(found: Spread) -> str:
    """The lowest and the highest."""
    low, high = loss_text(found.low), loss_text(found.high)
    return low if found.num == 1 else f"{low} to {high}"


def seeds_note(found: Spread, num_seeds: int, *, ranges: bool) -> str:
    """The range where there is one, and how many seeds it is of where some lack the number."""
    parts = [range_text(found)] if ranges and found.num > 1 else []
    if found.num < num_seeds:
        parts.append(f"{found.num} of {num_seeds} seeds")
    return "; ".join(parts)
