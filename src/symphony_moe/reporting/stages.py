"""Time and memory, stage by stage, beside what was planned."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from symphony_moe.reporting.numbers import MISSING, Number, count, duration, size
from symphony_moe.runs.metrics import Metrics


@dataclass(frozen=True)
class StageRow:
    """What a stage took."""

    stage: str
    time: str
    share: int
    """Of the time of all stages, in per cent."""
    planned_time: str
    memory: str
    planned_memory: str
    tokens: str


@dataclass(frozen=True)
class StageTable:
    """What all stages took."""

    rows: list[StageRow]
    others: list[tuple[str, str]]
    """(what, value) of what else was noted"""


_KNOWN = {
    "build_seconds",
    "build_peak_rss_bytes",
    "calibration_tokens",
    "train_peak_rss_bytes",
    "evaluate_seconds",
    "evaluate_peak_rss_bytes",
}


def stage_table(metrics: Metrics, plan: Mapping[str, Any]) -> StageTable | None:
    """Time, peak memory and text of every stage. None where no times were noted."""
    timing, training = metrics.timing, metrics.training
    if timing is None:
        return None
    measured = [
        ("Build", timing.build_seconds, timing.build_peak_rss_bytes, timing.calibration_tokens),
        (
            "Train",
            None if training is None else training.seconds,
            timing.train_peak_rss_bytes,
            None if training is None else training.tokens,
        ),
        ("Evaluate", timing.evaluate_seconds, timing.evaluate_peak_rss_bytes, None),
    ]
    total = math.fsum(seconds or 0 for _, seconds, _, _ in measured)
    planned = {"Build": (duration(plan["seconds"]), size(plan["peak_memory_bytes"]))}
    rows = [
        StageRow(
            stage,
            _text(seconds, duration),
            round(100 * (seconds or 0) / total) if total else 0,
            planned.get(stage, (MISSING, MISSING))[0],
            _text(peak, size),
            planned.get(stage, (MISSING, MISSING))[1],
            _text(tokens, count),
        )
        for stage, seconds, peak, tokens in measured
        if not (seconds is None and peak is None and tokens is None)
    ]
    if len(rows) > 1:
        rows.append(StageRow("All", duration(total), 100, MISSING, MISSING, MISSING, MISSING))
    return StageTable(rows, _others(timing.to_json()))


def _others(noted: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What another version noted. A key's last word is its unit."""
    writers = {"seconds": duration, "bytes": size, "tokens": count}
    found = []
    for key, value in noted.items():
        if key in _KNOWN:
            continue
        words, _, unit = key.rpartition("_")
        known = unit in writers and isinstance(value, int | float) and math.isfinite(value)
        label = (words if known else key).replace("_", " ").capitalize()
        found.append((label, writers[unit](value) if known else str(value)))
    return found


def _text(value: Number | None, write: Callable[[Number], str]) -> str:
    return MISSING if value is None or not math.isfinite(value) else write(value)
