"""How far a command has come, for whoever wants to show it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

UNITS = {
    "align": "layers",
    "build": "layers",
    "train": "steps",
    "evaluate": "models",
    "compare": "runs",
}
"""Stage -> what its steps are."""


@dataclass(frozen=True)
class Progress:
    """A step of a long command that is done."""

    stage: str
    """`align`, `build`, `verify`, `train`, `evaluate` or `compare`."""
    done: int
    """Steps of the stage that are done: layers, training steps, models or runs."""
    total: int
    tokens: int = 0
    """Tokens of text in one step. 0: they are not counted."""
    note: str = field(default="", repr=False, compare=False)
    """What else is known by now, as the loss, in few words."""


Listener = Callable[[Progress], None]
"""Called after each step, in the process that computes; what it raises ends the command."""


def ignore(progress: Progress) -> None:
    """The listener of a caller that wants to hear nothing."""


def of_step(step: Progress) -> dict[str, Progress]:
    """The `extra` of a log line that says no more than that a step is done: a terminal shows a bar
    in its place, and other outputs need not show each."""
    return {"progress": step}


class Pace:
    """How long the steps of a stage take, and how long the rest will. It is measured from the
    first step that it hears of, so what a run of before has done does not count. A stage that
    begins again, as in the second run of one command, is measured anew."""

    def __init__(self) -> None:
        self._first: Progress | None = None
        self._began = 0.0
        self._last = 0

    def after(self, step: Progress) -> str:
        """`4.1 s each, 53 s left`, from the second step of a stage on; before it nothing."""
        now = time.monotonic()
        first, before = self._first, self._last
        self._last = step.done
        if first is None or first.stage != step.stage or step.done < before:
            self._first, self._began = step, now
            return ""
        if step.done <= first.done or now <= self._began:
            return ""
        each = (now - self._began) / (step.done - first.done)
        words = [f"{each:.1f} s each" if each >= 1 else f"{1 / each:.1f} a second"]
        if step.tokens:
            words.append(f"{step.tokens / each:,.0f} tokens a second")
        if step.done < step.total:
            words.append(f"{rough_time(each * (step.total - step.done))} left")
        return ", ".join(words)


def rough_time(seconds: float) -> str:
    """About how long, in the unit that people would take."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
