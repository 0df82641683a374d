"""What every method of a comparison loses and costs, over its seeds, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from symphony_moe.reporting.numbers import (
    MISSING,
    Number,
    count,
    duration,
    is_number,
    loss_text,
    or_nan,
    percent,
    perplexity_text,
    size,
)
from symphony_moe.reporting.over_seeds import (
    IN_DOMAIN,
    OUT_OF_DOMAIN,
    Column,
    Entries,
    Spread,
    column_of,
    methods_of,
    of_stage,
    range_text,
    seeds_note,
    spread,
)
from symphony_moe.reporting.tables import Cell
from symphony_moe.reporting.tasks import Score, TaskTable, score_text, task_rows, task_versions
from symphony_moe.runs.metrics import STAGES, tasks_of


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


def main_table(
    entries: Entries, limits: Mapping[str, Number | None], reference: str, known: Sequence[str]
) -> MainTable:
    """Losses of every method as built and as trained, and what they cost."""
    columns = {
        (stage, where): column_of(entries, stage, where) for stage in STAGES for where in known
    }
    losses = [loss_cells(column) for column in columns.values()]
    reaches = reach_cells(entries, reference)
    costs = cost_cells(entries)
    return MainTable(
        where=list(known),
        rows=[
            (method, [column[method] for column in losses], reaches[method], costs[method])
            for method in methods_of(entries)
        ],
        limits=[loss_text(limits.get(where)) for _ in STAGES for where in known],
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
        each = ", ".join(f"seed {seed}: {loss_text(or_nan(loss))}" for seed, loss in values.items())
        cells[method] = Cell(
            loss_text(found.mean),
            f"{each}; {perplexity_text(found.mean)}",
            seeds_note(found, len(values), ranges=ranges),
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
            f"({range_text(lowest)}) and {second} ({range_text(next_lowest)}). These seeds do "
            "not tell the two apart."
        )
    if apart:
        sentences.append(
            f"The ranges of the best and the second best do not overlap: {'; '.join(apart)}."
        )
    return sentences


def reach_cells(entries: Entries, reference: str) -> dict[str, Cell]:
    """The share of the reference's tokens at which a method is down to its final loss in domain."""
    goals = of_stage(entries, reference, "trained")
    cells = {}
    for method in methods_of(entries):
        reached = {
            seed: entry["reaches"]
            for seed, entry in of_stage(entries, method, "trained").items()
            # Nobody can reach a loss that is NaN or infinite, nor know of one where nothing was
            # measured on the way.
            if entry.get("reaches")
            and (entry["reaches"]["tokens"] is not None or entry.get("curve"))
            and not (seed in goals and not is_number(goals[seed]["mean_in_domain"]))
        }
        if method == reference:
            cells[method] = Cell("reference")
            continue
        found = spread([reach["share"] for reach in reached.values()])
        if found is None:
            cells[method] = Cell("not reached" if reached else MISSING)
            continue
        note = f"{percent(found.low)[:-2]} to {percent(found.high)}" if found.num > 1 else ""
        if found.num < len(reached):
            never = f"not reached by {len(reached) - found.num} of {len(reached)} seeds"
            note = f"{note}; {never}" if note else never
        each = (
            f"seed {seed}: {'not reached' if reach['tokens'] is None else count(reach['tokens'])}"
            for seed, reach in reached.items()
        )
        cells[method] = Cell(percent(found.mean), f"tokens: {', '.join(each)}", note)
    return cells


def cost_cells(entries: Entries) -> dict[str, list[Cell]]:
    """Mean time and peak memory of every method: in the end, and of its build."""

    def time(method: str, stage: str) -> str:
        rows = of_stage(entries, method, stage).values()
        found = spread([row["seconds"] for row in rows])
        return duration(found.mean) if found else MISSING

    def memory(method: str, stage: str) -> str:
        rows = of_stage(entries, method, stage).values()
        found = spread([row["peak_rss_bytes"] for row in rows])
        return size(found.mean) if found else MISSING

    return {
        method: [
            Cell(write(method, "trained"), note=f"build {write(method, 'built')}")
            for write in (time, memory)
        ]
        for method in methods_of(entries)
    }


def domain_table(
    entries: Entries, in_domain: Sequence[str]
) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[Cell]]]]:
    """(groups of domains as (where, domains), rows of every method's trained losses). One group
    without a name where `in_domain` names none."""
    trained = [entry for entry in entries if entry["stage"] == "trained"]
    domains = list(dict.fromkeys(domain for entry in trained for domain in entry["losses"]))
    groups = [
        (IN_DOMAIN, [domain for domain in domains if domain in in_domain]),
        (OUT_OF_DOMAIN, [domain for domain in domains if domain not in in_domain]),
    ]
    if not groups[0][1]:
        groups = [("", domains)]
    groups = [(where, names) for where, names in groups if names]
    columns = [
        loss_cells(
            {
                method: {
                    seed: entry["losses"][domain]
                    for seed, entry in of_stage(trained, method, "trained").items()
                    if domain in entry["losses"]
                }
                for method in methods_of(trained)
            },
            ranges=False,
        )
        for _, names in groups
        for domain in names
    ]
    return groups, [
        (method, [cells[method] for cells in columns]) for method in methods_of(trained)
    ]


def task_table_of_methods(entries: Entries) -> TaskTable[Cell] | None:
    """Every method's benchmarks, as built and as trained. What was measured in different ways is
    never in one row. None where there are none."""
    measured = {
        (entry["method"], entry["stage"], entry["seed"]): tasks_of({"it": found})["it"]
        for entry in entries
        if (found := entry.get("tasks"))
    }
    columns = [
        (method, stages)
        for method in methods_of(entries)
        if (stages := [stage for stage in STAGES if (method, stage) in {m[:2] for m in measured}])
    ]

    def cells(scores: Mapping[tuple[str, str, int], Score]) -> list[Cell]:
        return [
            score_cell(
                {
                    seed: scores.get((method, stage, seed))
                    for seed in of_stage(entries, method, stage)
                }
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
    return Cell(loss_text(found.mean), each, seeds_note(found, len(scores), ranges=True))
