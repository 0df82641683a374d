"""`comparison.json` to one self-contained HTML page.

A pure function of what the runs measured, as `run_page.py` is of one run: nothing is measured or
fetched here, and the page loads nothing. `comparison.html.j2` has the markup.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from symphony_moe.reporting.charts import Chart, Line, Point, drawing, worth_drawing
from symphony_moe.reporting.numbers import (
    MISSING,
    Number,
    count,
    duration,
    is_number,
    loss_text,
    mean,
    perplexity_text,
    size,
)
from symphony_moe.reporting.run_page import (
    Score,
    TaskRow,
    fill,
    score_text,
    task_rows,
    task_versions,
)

_IN, _OUT = "in domain", "out of domain"


_MEANS = {_IN: "mean_in_domain", _OUT: "mean_out_of_domain"}
"""Where a loss is measured -> its key in an entry and in a point of a curve."""


_STAGES = ("built", "trained")


Entry = Mapping[str, Any]


Entries = Sequence[Entry]


Column = Mapping[str, Mapping[int, Number | None]]
"""Method -> seed -> what was measured, None where it is not a number."""


@dataclass(frozen=True)
class Spread:
    """One number over seeds."""

    mean: float
    low: float
    high: float
    num: int
    """Seeds that have it."""


@dataclass(frozen=True)
class Cell:
    """One number of a table, as it is shown."""

    text: str
    note: str = ""
    """Its range, and the seeds that lack it."""
    title: str = ""
    best: bool = False
    """The lowest of its column."""


@dataclass(frozen=True)
class MainTable:
    """Every method's losses, and what they cost."""

    where: list[str]
    """In domain and, where any was measured, out of domain."""
    rows: list[tuple[str, list[Cell], Cell, list[Cell]]]
    """(method; losses built and trained; tokens to reach the reference; time and memory)"""
    limits: list[str]
    """The specialists' losses, of the same columns as the methods' losses."""
    verdicts: list[str]
    """Whether seeds tell the best from the second best, in words."""


@dataclass(frozen=True)
class TaskTable:
    """Benchmarks of every method."""

    columns: list[tuple[str, list[str]]]
    """(method, its stages that have any)"""
    rows: list[TaskRow[Cell]]
    """A value for each stage of each method."""
    versions: list[str]
    """Of the harness."""

    @property
    def starts(self) -> list[int]:
        """Where each method's values begin in a row."""
        return [
            sum(len(stages) for _, stages in self.columns[:n]) for n in range(len(self.columns))
        ]


def comparison_facts(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What all runs of a comparison have in common, as (what, value). `recipes` are
    `Recipe.model_dump(mode="json")`."""
    first, *others = [_facts(recipe) for recipe in recipes]
    return [fact for fact in first if all(fact in other for other in others)]


def _facts(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    train, text = recipe["train"], recipe["evaluation"]
    return [
        ("Sources", ", ".join(recipe["sources"])),
        ("Anchor", recipe["anchor"]),
        ("Calibration", f"{count(recipe['calibration']['tokens'])} tokens"),
        ("Training", f"{count(train['tokens'])} tokens"),
        ("Trained", train["scope"]),
        ("Held-out text", f"{count(text['tokens'])} tokens a domain"),
        ("Dtype", recipe["output"]["dtype"]),
    ]


def render_comparison(
    title: str,
    entries: Entries,
    limits: Mapping[str, Number | None],
    reference: str,
    facts: Sequence[tuple[str, str]],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    in_domain: Sequence[str] = (),
) -> str:
    """The comparison as HTML.

    `entries` are the rows of `comparison.json` (docs/training.md), `limits` the specialists' mean
    losses ("in domain": each on its own domain, "out of domain": the best of them), `reference` the
    method whose final loss the others are timed to, `facts` what the header says as (what, value),
    `settings` what sets each method apart from the recipe. `in_domain` names the sources' domains,
    so that the table by domain can tell them from the others.

    Losses are nats per token. One that is null, NaN or infinite (a model that diverged) is left out
    of means and lines, which the page says, and its method is not ranked.
    """
    from symphony_moe.recipe.yaml_text import write_yaml

    methods = _methods(entries)
    known = [where for where in _MEANS if where == _IN or _is_measured(entries, where)]
    charts = {where: line_chart(entries, where, limits.get(where)) for where in known}
    drawn = {where: chart and drawing(chart) for where, chart in charts.items()}
    return fill(
        "comparison.html.j2",
        title=title,
        facts=facts,
        reference=reference,
        seeds=seeds_text(entries),
        one_seed=any(len(_seeds(entries, method)) == 1 for method in methods),
        incomplete=incomplete_text(entries, known),
        table=main_table(entries, limits, reference, known),
        domains=domain_table(entries, in_domain),
        tasks=task_table(entries),
        charts=drawn,
        lacking=[where for where in _MEANS if where not in known],
        settings=[
            (method, write_yaml(dict(apart)) if apart else "") for method, apart in settings.items()
        ],
    )


# Entries


def _methods(entries: Entries) -> list[str]:
    return list(dict.fromkeys(entry["method"] for entry in entries))


def _seeds(entries: Entries, method: str) -> list[int]:
    return list(dict.fromkeys(entry["seed"] for entry in entries if entry["method"] == method))


def _of(entries: Entries, method: str, stage: str) -> dict[int, Entry]:
    """The entries of one method and stage by seed."""
    return {e["seed"]: e for e in entries if (e["method"], e["stage"]) == (method, stage)}


def _column(entries: Entries, stage: str, key: str) -> Column:
    return {
        method: {seed: entry[key] for seed, entry in _of(entries, method, stage).items()}
        for method in _methods(entries)
    }


def _is_measured(entries: Entries, where: str) -> bool:
    """Whether any model has a mean there: none has where there is no such domain."""
    return any(is_number(entry[_MEANS[where]]) for entry in entries)


def spread(values: Sequence[Number | None]) -> Spread | None:
    """Over the values that are numbers; None where none is."""
    numbers = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not numbers:
        return None
    mean = math.fsum(numbers) / len(numbers)
    return Spread(mean, min(numbers), max(numbers), len(numbers))


def seeds_text(entries: Entries) -> str:
    """What a number of the tables is, by the seeds that there are."""
    nums = {len(_seeds(entries, method)) for method in _methods(entries)}
    if nums == {1}:
        return "one seed"
    if len(nums) == 1:
        return f"mean over {nums.pop()} seeds (lowest to highest)"
    return "mean over each method's seeds (lowest to highest)"


def incomplete_text(entries: Entries, known: Sequence[str]) -> str:
    """Which mean losses are not a number, in words."""
    lacking: dict[str, list[str]] = {}
    for entry in entries:
        for where in known:
            if not is_number(entry[_MEANS[where]]):
                name = f"{entry['method']}, {entry['stage']}, {where}"
                lacking.setdefault(name, []).append(str(entry["seed"]))
    return "; ".join(f"{name} (seed {', '.join(seeds)})" for name, seeds in lacking.items())


# Tables


def main_table(
    entries: Entries, limits: Mapping[str, Number | None], reference: str, known: Sequence[str]
) -> MainTable:
    """Losses of every method as built and as trained, and what they cost."""
    columns = {
        (stage, where): _column(entries, stage, _MEANS[where])
        for stage in _STAGES
        for where in known
    }
    losses = [loss_cells(column) for column in columns.values()]
    reaches = reach_cells(entries, reference)
    costs = cost_cells(entries)
    return MainTable(
        where=list(known),
        rows=[
            (method, [column[method] for column in losses], reaches[method], costs[method])
            for method in _methods(entries)
        ],
        limits=[loss_text(limits.get(where)) for _ in _STAGES for where in known],
        verdicts=verdicts({f"{stage}, {where}": c for (stage, where), c in columns.items()}),
    )


def loss_cells(column: Column, *, ranges: bool = True) -> dict[str, Cell]:
    """Mean and range of every method; the lowest mean is the best."""
    ranking = ranked(column)
    lowest = loss_text(ranking[0][1].mean) if ranking else None
    cells = {}
    for method, values in column.items():
        found = spread(list(values.values()))
        if found is None:
            cells[method] = Cell("NaN" if values else MISSING)
            continue
        # What looks equal is marked alike.
        best = found.num == len(values) and loss_text(found.mean) == lowest
        each = ", ".join(f"seed {seed}: {_text(loss)}" for seed, loss in values.items())
        cells[method] = Cell(
            loss_text(found.mean),
            _note(found, len(values), ranges=ranges),
            f"{each}; {perplexity_text(found.mean)}",
            best,
        )
    return cells


def ranked(column: Column) -> list[tuple[str, Spread]]:
    """Methods from the lowest mean to the highest. One that lacks a seed's number is not ranked: a
    mean over the seeds that did not diverge would flatter it."""
    found = [
        (method, spread(list(values.values())), len(values)) for method, values in column.items()
    ]
    complete = [(method, over) for method, over, num in found if over and over.num == num]
    return sorted(complete, key=lambda pair: pair[1].mean)


def verdicts(columns: Mapping[str, Column]) -> list[str]:
    """Whether the ranges of the best and of the second best overlap, in words."""
    apart, sentences = [], []
    for name, column in columns.items():
        ranking = ranked(column)
        # A single value has no range.
        if len(ranking) < 2 or max(found.num for _, found in ranking[:2]) == 1:
            continue
        (best, lowest), (second, next_lowest) = ranking[:2]
        if lowest.high < next_lowest.low:
            apart.append(f"{name} ({best} before {second})")
            continue
        sentences.append(
            f"{name.capitalize()}: the ranges of the best and the second best overlap: {best} "
            f"({_range_text(lowest)}) and {second} ({_range_text(next_lowest)}). These seeds do "
            "not tell the two apart."
        )
    if apart:
        sentences.append(
            f"The ranges of the best and the second best do not overlap: {'; '.join(apart)}."
        )
    return sentences


def _range_text(found: Spread) -> str:
    low, high = loss_text(found.low), loss_text(found.high)
    return low if found.num == 1 else f"{low} to {high}"


def _note(found: Spread, num_seeds: int, *, ranges: bool) -> str:
    """The range where there is one, and how many seeds it is of where some lack the number."""
    parts = [_range_text(found)] if ranges and found.num > 1 else []
    if found.num < num_seeds:
        parts.append(f"{found.num} of {num_seeds} seeds")
    return "; ".join(parts)


def reach_cells(entries: Entries, reference: str) -> dict[str, Cell]:
    """The share of the reference's tokens at which a method is down to its final loss in domain."""
    goals = _of(entries, reference, "trained")
    cells = {}
    for method in _methods(entries):
        reached = {
            seed: entry["reaches"]
            for seed, entry in _of(entries, method, "trained").items()
            # Nobody can reach a loss that is not a number, and nobody knows where nothing was
            # measured on the way.
            if entry.get("reaches")
            and (entry["reaches"]["tokens"] is not None or entry.get("curve"))
            and not (seed in goals and not is_number(goals[seed][_MEANS[_IN]]))
        }
        if method == reference:
            cells[method] = Cell("reference")
            continue
        found = spread([reach["share"] for reach in reached.values()])
        if found is None:
            cells[method] = Cell("not reached" if reached else MISSING)
            continue
        note = f"{_percent(found.low)[:-2]} to {_percent(found.high)}" if found.num > 1 else ""
        if found.num < len(reached):
            never = f"not reached by {len(reached) - found.num} of {len(reached)} seeds"
            note = f"{note}; {never}" if note else never
        each = (
            f"seed {seed}: {'not reached' if reach['tokens'] is None else count(reach['tokens'])}"
            for seed, reach in reached.items()
        )
        cells[method] = Cell(_percent(found.mean), note, f"tokens: {', '.join(each)}")
    return cells


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def cost_cells(entries: Entries) -> dict[str, list[Cell]]:
    """Mean time and peak memory of every method: in the end, and of its build."""
    kinds: list[tuple[str, Callable[[Number], str]]] = [
        ("seconds", duration),
        ("peak_rss_bytes", size),
    ]

    def mean_text(method: str, stage: str, key: str, write: Callable[[Number], str]) -> str:
        found = spread([entry[key] for entry in _of(entries, method, stage).values()])
        return write(found.mean) if found else MISSING

    return {
        method: [
            Cell(mean_text(method, "trained", *kind), f"build {mean_text(method, 'built', *kind)}")
            for kind in kinds
        ]
        for method in _methods(entries)
    }


def domain_table(
    entries: Entries, in_domain: Sequence[str]
) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[Cell]]]]:
    """(groups of domains as (where, domains), rows of every method's trained losses). One group
    without a name where `in_domain` names none."""
    trained = [entry for entry in entries if entry["stage"] == "trained"]
    domains = list(dict.fromkeys(domain for entry in trained for domain in entry["losses"]))
    groups = [
        (_IN, [domain for domain in domains if domain in in_domain]),
        (_OUT, [domain for domain in domains if domain not in in_domain]),
    ]
    if not groups[0][1]:
        groups = [("", domains)]
    groups = [(where, names) for where, names in groups if names]
    columns = [
        loss_cells(
            {
                method: {
                    seed: entry["losses"][domain]
                    for seed, entry in _of(trained, method, "trained").items()
                    if domain in entry["losses"]
                }
                for method in _methods(trained)
            },
            ranges=False,
        )
        for _, names in groups
        for domain in names
    ]
    return groups, [(method, [cells[method] for cells in columns]) for method in _methods(trained)]


def task_table(entries: Entries) -> TaskTable | None:
    """Every method's benchmarks, as built and as trained. What was measured in different ways is
    never in one row. None where there are none."""
    measured = {
        (entry["method"], entry["stage"], entry["seed"]): entry["tasks"]
        for entry in entries
        if entry.get("tasks")
    }
    columns = [
        (method, stages)
        for method in _methods(entries)
        if (stages := [stage for stage in _STAGES if (method, stage) in {m[:2] for m in measured}])
    ]

    def cells(scores: Mapping[tuple[str, str, int], Score]) -> list[Cell]:
        return [
            score_cell(
                {seed: scores.get((method, stage, seed)) for seed in _of(entries, method, stage)}
            )
            for method, stages in columns
            for stage in stages
        ]

    rows = task_rows(measured, cells)
    return TaskTable(columns, rows, task_versions(measured)) if rows else None


def score_cell(scores: Mapping[int, Score | None]) -> Cell:
    """Mean and range of a metric over seeds. None of a seed: not measured."""
    found = spread([score[0] for score in scores.values() if score])
    each = ", ".join(
        f"seed {seed}: {score_text(*score) if score else 'not measured'}"
        for seed, score in scores.items()
    )
    if found is None:
        return Cell("NaN", title=each) if any(scores.values()) else Cell(MISSING)
    return Cell(loss_text(found.mean), _note(found, len(scores), ranges=True), each)


def _text(loss: Number | None) -> str:
    return loss_text(math.nan if loss is None else float(loss))


# Charts


def mean_curve(
    entries: Entries, method: str, where: str
) -> tuple[list[tuple[float, Spread | None]], int]:
    """(points of a method as (tokens, loss over its seeds), positions that only some seeds have).

    From the built model over the positions that all seeds have in common to the trained one. A
    loss is None where a seed's is not a number: the mean over the others would jump there.
    """
    key, seeds = _MEANS[where], _seeds(entries, method)

    def over_all(losses: Sequence[Number | None]) -> Spread | None:
        found = spread(losses)
        return found if found and found.num == len(seeds) else None

    built, trained = (_of(entries, method, stage) for stage in _STAGES)

    def end(of_stage: Mapping[int, Entry]) -> list[tuple[float, Spread | None]]:
        models = list(of_stage.values())
        if not models:
            return []
        tokens = mean([entry["tokens"] for entry in models])
        return [(tokens, over_all([entry[key] for entry in models]))]

    start = max((entry["tokens"] for entry in built.values()), default=-math.inf)
    stop = min((entry["tokens"] for entry in trained.values()), default=math.inf)
    curves = [
        {
            point["tokens"]: point[key]
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
    A point that is not a number breaks its line. None where no point can be drawn."""
    curves = {method: mean_curve(entries, method, where) for method in _methods(entries)}
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
        notes=tuple(left_out(curves)),
        level=None if limit is None or not math.isfinite(limit) else ("limit", float(limit)),
    )
    ends = ", ".join(text for text, _, _ in chart.labels)
    return worth_drawing(replace(chart, summary=f"At the end: {ends}"))


def _point(tokens: float, found: Spread, title: str) -> Point:
    if found.num == 1:
        return Point(tokens, found.mean, title=title)
    return Point(tokens, found.mean, found.low, found.high, title)


def _point_title(method: str, tokens: float, found: Spread) -> str:
    over = f" ({_range_text(found)}, {found.num} seeds)" if found.num > 1 else ""
    return f"{method}, {count(tokens)} tokens: {loss_text(found.mean)}{over}"


def left_out(curves: Mapping[str, tuple[Sequence[tuple[float, Spread | None]], int]]) -> list[str]:
    """What a chart does not draw, in words."""
    sentences = []
    for method, (points, num_apart) in curves.items():
        gaps = sum(found is None for _, found in points)
        if gaps:
            sentences.append(
                f"{method}: {gaps} of {len(points)} point(s) not drawn, where the loss of at least "
                "one seed is not a number."
            )
        if num_apart:
            sentences.append(
                f"{method}: {num_apart} point(s) not drawn, which were not measured for every seed."
            )
    return sentences
