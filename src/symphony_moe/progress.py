"""How far a command has come, for whoever wants to show it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A step of a long command that is done."""

    stage: str
    """`align`, `build`, `train`, `evaluate` or `compare`."""
    done: int
    """Steps of the stage that are done: layers, training steps, models or runs."""
    total: int


Listener = Callable[[Progress], None]
"""Called after each step, in the process that computes; what it raises ends the command."""


def ignore(progress: Progress) -> None:
    """The listener of a caller that wants to hear nothing."""
