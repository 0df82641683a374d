"""What people see in a terminal: tables, log lines and a progress bar.

Whatever is not a terminal gets plain text: no colours, and no line is broken. `rich` is imported
when something is drawn, so that `symphony --help` answers at once.
"""

import io
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from symphony_moe.errors import shown
from symphony_moe.progress import UNITS, Listener, Pace, Progress, rough_time

if TYPE_CHECKING:
    from rich.console import Console

    from symphony_moe.building.plan import Plan
    from symphony_moe.doctor import Examination


def is_terminal(stream: Any) -> bool:
    """Whether a stream shows colours to a person. `NO_COLOR` and `TERM=dumb` ask for none."""
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not unwanted


# Log lines and the progress bar


STEP_SECONDS = 30.0
"""Where there is no bar, seconds between two log lines that only say how far a stage is."""


class _Formatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(levelname).1s %(message)s")
        self._pace = Pace()

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        step = getattr(record, "progress", None)
        pace = "" if step is None else self._pace.after(step)
        return shown(f"{line}; {pace}" if pace else line)  # a traceback that follows it stays whole


class StepLines(logging.Filter):
    """Lets only some of the lines through that say that a step is done (`progress.of_step`): the
    last of a stage, and before it one in `STEP_SECONDS`."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.monotonic()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is shown."""
        step = getattr(record, "progress", None)
        if step is None:
            return True
        now = time.monotonic()
        if step.done < step.total and now - self._last < STEP_SECONDS:
            return False
        self._last = now
        return True


def log_handler(*, every_step: bool) -> logging.StreamHandler[TextIO]:
    """A handler that writes log lines to stderr. `every_step`: a line for each step of a stage,
    however many there are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    if not every_step:
        handler.addFilter(StepLines())
    return handler


class _AboveTheBar(io.TextIOBase):
    """Prints each log line above a progress bar."""

    def __init__(self, console: "Console") -> None:
        self.console = console

    def write(self, text: str) -> int:
        # The terminal breaks a long line itself, so that a path can be copied whole.
        line = text.removesuffix("\n")
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        return len(text)


@contextmanager
def progress_bar(handler: logging.StreamHandler[Any]) -> Iterator[Listener]:
    """A listener that draws a bar on stderr inside the block. `handler` writes above it."""
    from rich import progress
    from rich.console import Console

    class Terminal(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Never hide it: a command that is killed would leave it hidden."""
            return False

    console = Terminal(stderr=True)
    bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[words]}", markup=False),
        console=console,
        auto_refresh=False,  # no thread, which processes that the command starts would inherit
        transient=True,
        redirect_stdout=False,
    )
    stages: dict[str, progress.TaskID] = {}
    pace = Pace()

    def draw(step: Progress) -> None:
        if step.stage not in stages:
            for earlier in stages.values():
                bar.remove_task(earlier)
            stages.clear()
            stages[step.stage] = bar.add_task(step.stage, words="")
        count = f"{step.done} of {step.total} {UNITS.get(step.stage, 'steps')}"
        words = ", ".join(filter(None, (count, pace.after(step), step.note)))
        bar.update(
            stages[step.stage], completed=step.done, total=step.total, words=words, refresh=True
        )

    def is_news(record: logging.LogRecord) -> bool:
        """Whether a log line says what the bar does not."""
        return getattr(record, "progress", None) is None

    plain = handler.stream
    handler.setStream(_AboveTheBar(console))
    handler.addFilter(is_news)
    try:
        with bar:
            yield draw
    finally:
        handler.removeFilter(is_news)
        handler.setStream(plain)


# Tables and lists


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 1) -> str:
    """A table as text. Columns from `numbers_from` on are aligned to the right.

    No cell is broken or cut, however narrow the terminal. The head is bold in a terminal.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(head):
        side = "right" if number >= numbers_from else "left"
        made.add_column(Text(name), justify="right" if side == "right" else "left", no_wrap=True)
    for row in rows:
        made.add_row(*map(Text, row))
    bold = is_terminal(sys.stdout)
    text = io.StringIO()
    width = sum(2 + max(map(len, column)) for column in zip(head, *rows, strict=True))
    console = Console(
        file=text,
        width=2 * width,  # twice: a Chinese character takes two places
        force_terminal=bold,
        color_system="standard" if bold else None,
    )
    console.print(made)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def losses_as_table(
    metrics: Mapping[str, Any], others: Mapping[str, dict[str, float | None]] | None = None
) -> str:
    """Held-out losses: a row per model, a column per domain. `others`: further models' rows."""
    names = list(metrics["sources"])
    models = dict(metrics["sources"])
    models |= {stage: metrics[stage] for stage in ("built", "trained") if stage in metrics}
    models |= others or {}
    domains = list(next(iter(models.values())))
    out = [domain for domain in domains if domain not in names]
    groups = [*([domain] for domain in domains), names, *([out] if out else [])]
    head = ["nats per token", *domains, "mean", *(["mean out"] if out else [])]
    rows = [[name, *(_mean(losses, group) for group in groups)] for name, losses in models.items()]
    text = table(head, rows)
    return f"{text}\nout of domain: {', '.join(out)}" if out else text


def _mean(losses: Mapping[str, float | None], domains: Sequence[str]) -> str:
    return f"{_mean_of(losses, domains):.3f}"


def _mean_of(losses: Mapping[str, float | None], domains: Sequence[str]) -> float:
    values = (losses[domain] for domain in domains)
    return sum(math.nan if value is None else value for value in values) / len(domains)


def standing_as_table(metrics: Mapping[str, Any]) -> str:
    """How the new model stands against its sources, on the sources' text: beside each source on its
    own text, which is the limit, and beside the best source for all of it. And the same on text out
    of domain, where no source has text of its own."""
    of_sources, names = metrics["sources"], list(metrics["sources"])
    made = {stage: metrics[stage] for stage in ("built", "trained") if stage in metrics}
    own = {name: losses[name] for name, losses in of_sources.items()}
    limit = _mean_of(own, names)
    best = min(names, key=lambda name: _or_infinite(_mean_of(of_sources[name], names)))
    means = {stage: _mean_of(losses, names) for stage, losses in made.items()}
    means[f"the best source alone, {best}"] = _mean_of(of_sources[best], names)
    rows = [["each source on its own text", f"{limit:.3f}", ""]]
    rows += [[who, f"{mean:.3f}", f"{mean - limit:+.3f}"] for who, mean in means.items()]
    text = table(["mean of the sources' domains", "nats per token", "difference"], rows)
    out = [domain for domain in next(iter(made.values())) if domain not in names]
    if not out:
        return text
    alone = min(names, key=lambda name: _or_infinite(_mean_of(of_sources[name], out)))
    words = [f"{stage} {_mean_of(losses, out):.3f}" for stage, losses in made.items()]
    words.append(f"the best source alone, {alone}, {_mean_of(of_sources[alone], out):.3f}")
    return f"{text}\nout of domain: {'; '.join(words)}"


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def next_command(*words: object) -> str:
    """What to type next, as a shell takes it."""
    return f"next: {shlex.join(['symphony', *map(str, words)])}"


def describe_tasks(tasks: Mapping[str, Any]) -> str:
    """Results of benchmarks: a row per task and metric, a column per model."""
    from symphony_moe.reporting.run_page import task_table

    results = task_table(tasks, list(tasks))
    assert results is not None
    head = ["task", "metric", "examples", "documents", *results.models]
    rows = [[r.task, r.metric, r.examples, r.documents, *r.values] for r in results.rows]
    return table(head, rows, numbers_from=2)


def describe_plan(plan: "Plan") -> str:
    """A plan as lines of text."""
    from symphony_moe.building.plan import source_in_words
    from symphony_moe.sources.kinship import two_digits

    total, active = plan.total_parameters, plan.active_parameters
    seconds = plan.training_seconds
    training = "" if seconds is None else f", {rough_time(seconds)} for training"
    lines = [
        f"{len(plan.sources)} x {plan.family} -> {plan.architecture}",
        f"  parameters  {total:,} in total, {active:,} active per token",
        f"  on disk     {plan.disk_bytes / 1e9:.3f} GB in {plan.dtype}, {plan.shards} file(s); "
        f"{plan.work_bytes / 1e9:.3f} GB more until stage 1 ends",
        f"  memory      about {plan.peak_memory_bytes / 1e9:.1f} GB at the peak of stage 1, "
        f"{plan.training_peak_memory_bytes / 1e9:.1f} GB in training",
        f"  time        about {rough_time(plan.seconds)} for stage 1 on this machine{training}",
        "sources",
    ]
    for source in plan.sources:
        anchor = ", anchor" if source["anchor"] else ""
        lines.append(
            f"  {source['name']}: {source_in_words(source)} ({source['parameters']:,} parameters, "
            f"{source['dtype']}{anchor})"
        )
    if plan.likeness:
        cosines = ", ".join(
            f"{name} {two_digits(cosine)}" for name, cosine in plan.likeness.items()
        )
        lines.append(f"  mean cosine of the anchor's weights and theirs: {cosines}")
    if plan.warnings:
        lines += ["warnings", *(f"  {warning}" for warning in plan.warnings)]
    lines += ["read by", *(f"  {reading}" for reading in plan.readers)]
    lines.append("differences" if plan.differences else "no differences between the sources")
    lines += [f"  {d.verdict}: {d}" for d in plan.differences]
    if plan.notes:
        lines += ["notes", *(f"  {note}" for note in plan.notes)]
    # What they repeat of a source's files may be as long as its author liked.
    return "\n".join(shown(line, 2000) for line in lines)


def describe_examination(found: "Examination") -> str:
    """What a machine has, section by section, and the problems at the end."""
    lines = []
    for section, findings in found.sections.items():
        width = max((len(one.name) for one in findings), default=0)
        lines.append(section)
        for one in findings:
            mark = "!" if one.problem else " "
            lines.append(f"{mark} {one.name:<{width}}  {one.words}")
    if found.problems:
        lines += ["problems", *(f"  {problem}" for problem in found.problems)]
    else:
        lines.append("no problems")
    return "\n".join(shown(line, 2000) for line in lines)


def describe_build(metrics: Mapping[str, Any]) -> str:
    """How well a build has aligned its sources, and what its fit has come to."""
    lines = []
    for kind, by_source in metrics["alignment"].items():
        what = {
            "residual": "cosine of residual streams",
            "heads": "correlation of heads",
            "neurons": "correlation of matched neurons",
        }[kind]
        for source, values in by_source.items():
            before, after = (sum(values[key]) / len(values[key]) for key in ("before", "after"))
            unused = "" if values["used"] else "; too little to use"
            lines.append(f"{source}: {what} {before:.3f} before, {after:.3f} after{unused}")
    if "loss" in metrics.get("fit", {}):
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in metrics["fit"]["loss"].items())
        chosen = metrics["fit"]["chosen"]
        lines.append(f"{losses} nats per token on validation text; wrote the {chosen} model")
    return "\n".join(lines)
