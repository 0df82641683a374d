"""Benchmarks of lm-evaluation-harness as a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from symphony_moe.reporting.numbers import MISSING, count, loss_text, or_nan
from symphony_moe.runs.metrics import STAGES, TaskResult, tasks_of

Score = tuple[float | None, float | None]
"""A metric's value and its standard error, None where it is NaN or not known."""

Model = TypeVar("Model")
Value = TypeVar("Value")


@dataclass(frozen=True)
class TaskRow(Generic[Value]):
    """One metric of a task, measured in one way."""

    task: str
    metric: str
    examples: str
    """Examples in the prompt, and whether it went through the chat template."""
    documents: str
    """How many were evaluated, and of how many."""
    values: list[Value]
    """Of each column."""


@dataclass(frozen=True)
class TaskTable(Generic[Value]):
    """Benchmarks of several models."""

    columns: list[tuple[str, list[str]]]
    """(model or method, its stages: each is a column; without any, the model is one)"""
    rows: list[TaskRow[Value]]
    versions: list[str]
    """Of the harness."""

    @property
    def models(self) -> list[str]:
        """Those that were asked, in the order of the columns."""
        return [model for model, _ in self.columns]

    @property
    def starts(self) -> list[int]:
        """Where each model's columns begin in a row."""
        widths = [max(1, len(stages)) for _, stages in self.columns]
        return [sum(widths[:number]) for number in range(len(widths))]


def task_table(tasks: Mapping[str, Any], sources: Sequence[str]) -> TaskTable[str] | None:
    """`tasks` of `metrics.json`: a row for each task, metric and way of measuring (what was
    measured in different ways is never in one row), a column for each model. None where there are
    none.

    `sources`: their order; the run's own models come last.
    """
    known = tasks_of(tasks)
    order = [*(name for name in sources if name not in STAGES), *STAGES]
    measured = {name: known[name] for name in order if known.get(name)}

    def texts(scores: Mapping[str, Score]) -> list[str]:
        return [score_text(*scores[name]) if name in scores else MISSING for name in measured]

    rows = task_rows(measured, texts)
    if not rows:
        return None
    return TaskTable([(name, []) for name in measured], rows, task_versions(measured))


def task_rows(
    tasks: Mapping[Model, Mapping[str, TaskResult]],
    values: Callable[[Mapping[Model, Score]], list[Value]],
) -> list[TaskRow[Value]]:
    """A row for each task, metric and way of measuring. `values`: of the models that have any,
    the row's values."""
    found: dict[tuple[str, str], dict[Any, dict[Model, Score]]] = {}
    for model, of_model in tasks.items():
        for task, result in of_model.items():
            for metric, score in result.scores.items():
                by_way = found.setdefault((task, metric), {})
                by_way.setdefault(result.way, {})[model] = score
    return [
        TaskRow(task, metric, _examples(way), _documents(way), values(scores))
        for (task, metric), by_way in found.items()
        for way, scores in by_way.items()
    ]


def _examples(way: tuple[int | None, int, int, bool, str]) -> str:
    shots, _, _, chat, _ = way
    examples = "mixed" if shots is None else count(shots)
    return f"{examples}, chat template" if chat else examples


def _documents(way: tuple[int | None, int, int, bool, str]) -> str:
    _, samples, documents, _, _ = way
    return count(samples) + (f" of {count(documents)}" if samples < documents else "")


def task_versions(tasks: Mapping[Model, Mapping[str, TaskResult]]) -> list[str]:
    """Of the harness that measured."""
    return sorted({result.lm_eval for of_model in tasks.values() for result in of_model.values()})


def score_text(value: float | None, error: float | None) -> str:
    """Three decimals, as the harness's own tables have it, with the standard error where known."""
    return loss_text(or_nan(value)) + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.3f}")
