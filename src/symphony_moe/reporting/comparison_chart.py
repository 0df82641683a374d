"""Held-out loss against tokens, a line for every method of a comparison."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from symphony_moe.reporting.charts import Chart, Line, Point, worth_drawing
from symphony_moe.reporting.comparison_table import Entry, mean_of
from symphony_moe.reporting.numbers import Number, count, loss_text, mean
from symphony_moe.reporting.over_seeds import (
    Entries,
    Spread,
    column_of,
    methods_of,
    of_stage,
    range_text,
    seeds_of,
    spread,
)
from symphony_moe.reporting.strips import Scale, Strip, Strips, Value
from symphony_moe.runs.metrics import STAGES


def mean_curve(
    entries: Entries, method: str, where: str
) -> tuple[list[tuple[float, Spread | None]], int]:
    """(points of a method as (tokens, loss over its seeds), positions that only some seeds have).

    From the built model over the positions that all seeds have in common to the trained one. A
    loss is None where a seed's is NaN or infinite: the mean over the others would jump there.
    """
    seeds = seeds_of(entries, method)

    def over_all(losses: Sequence[Number | None]) -> Spread | None:
        found = spread(losses)
        return found if found and found.num == len(seeds) else None

    built, trained = (of_stage(entries, method, stage) for stage in STAGES)

    def end(of_stage: Mapping[int, Entry]) -> list[tuple[float, Spread | None]]:
        models = list(of_stage.values())
        if not models:
            return []
        tokens = mean([entry["tokens"] for entry in models])
        return [(tokens, over_all([mean_of(entry, where) for entry in models]))]

    start = max((entry["tokens"] for entry in built.values()), default=-math.inf)
    stop = min((entry["tokens"] for entry in trained.values()), default=math.inf)
    curves = [
        {
            point["tokens"]: mean_of(point, where)
            for point in entry.get("curve") or []
            if start < point["tokens"] < stop
        }
        for entry in trained.values()
    ]
    positions = [set(curve) for curve in curves]
    common = set.intersection(*positions) if positions else set()
    on_the_way = [
        (float(tokens), over_all([curve[tokens] for curve in curves])) for tokens in sorted(common)
    ]
    return [*end(built), *on_the_way, *end(trained)], len(set().union(*positions) - common)


def line_chart(entries: Entries, where: str, limit: Number | None) -> Chart | None:
    """Held-out loss (nats per token) against tokens, calibration included, a line for every method.
    A point that is NaN or infinite breaks its line. None where no point can be drawn."""
    curves = {method: mean_curve(entries, method, where) for method in methods_of(entries)}
    lines = [
        Line(
            number,
            method,
            tuple(
                Point(tokens, math.nan)
                if found is None
                else _point(tokens, found, _point_title(method, tokens, found))
                for tokens, found in points
            ),
        )
        for number, (method, (points, _)) in enumerate(curves.items())
    ]
    chart = Chart(
        title=f"Held-out loss {where} against tokens",
        across="tokens, calibration included",
        upward="loss, nats per token",
        lines=tuple(line for line in lines if line.drawn),
        write=loss_text,
        notes=tuple(lines_left_out(curves)),
        level=None if limit is None or not math.isfinite(limit) else ("limit", float(limit)),
    )
    ends = ", ".join(text for text, _, _ in chart.labels)
    return worth_drawing(replace(chart, summary=f"At the end: {ends}"))


def method_strips(entries: Entries, where: str, limit: Number | None) -> Strips | None:
    """A strip for every method: its loss built and trained (nats per token, mean over seeds), and
    the limit. None where no method has one."""
    columns = {stage: column_of(entries, stage, where) for stage in STAGES}
    found = {
        method: {stage: spread(list(columns[stage][method].values())) for stage in STAGES}
        for method in methods_of(entries)
    }
    means = [one.mean for of_method in found.values() for one in of_method.values() if one]
    if not means:
        return None
    known = limit is not None and math.isfinite(limit)
    ends = [*means, float(limit)] if known and limit is not None else means
    scale, rows = Scale.of(min(ends), max(ends)), []
    for method, of_method in found.items():
        values, words = [], []
        if known and limit is not None:
            values.append(Value("goal", limit, f"limit: {loss_text(limit)}"))
        for kind, (stage, one) in zip(("before", "after"), of_method.items(), strict=True):
            if one is not None:
                text = f"{stage} {loss_text(one.mean)}"
                over = f" ({range_text(one)})" if one.num > 1 else ""
                values.append(Value(kind, one.mean, f"{method}, {text}{over}"))
                words.append(text)
        rows.append(Strip(method, words, scale.marks_of(values)))
    kinds = [("before", "built"), ("after", "trained")]
    return Strips(
        f"Held-out loss {where}",
        "nats per token",
        rows,
        scale.axis,
        [("goal", "limit"), *kinds] if known else kinds,
    )


def _point(tokens: float, found: Spread, title: str) -> Point:
    if found.num == 1:
        return Point(tokens, found.mean, title=title)
    return Point(tokens, found.mean, found.low, found.high, title)


def _point_title(method: str, tokens: float, found: Spread) -> str:
    over = f" ({range_text(found)}, {found.num} seeds)" if found.num > 1 else ""
    return f"{method}, {count(tokens)} tokens: {loss_text(found.mean)}{over}"


def lines_left_out(
    curves: Mapping[str, tuple[Sequence[tuple[float, Spread | None]], int]],
) -> list[str]:
    """What a chart does not draw, in words."""
    sentences = []
    for method, (points, num_apart) in curves.items():
        gaps = sum(found is None for _, found in points)
        if gaps:
            sentences.append(
                f"{method}: {gaps} of {len(points)} point(s) not drawn, where the loss of at least "
                "one seed is NaN or infinite."
            )
        if num_apart:
            sentences.append(
                f"{method}: {num_apart} point(s) not drawn, which were not measured for every seed."
            )
    return sentences
