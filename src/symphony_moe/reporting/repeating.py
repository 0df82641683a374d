"""How to make the same model again: commands, versions."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from symphony_moe.recipe.settings import Recipe
from symphony_moe.runs.metrics import Metrics


@dataclass(frozen=True)
class Repeating:
    """What it takes to make a model again."""

    commands: str
    explanation: list[str]
    versions: list[tuple[str, str]]


def how_to_repeat(recipe: Recipe, metrics: Metrics, manifest: Mapping[str, Any]) -> Repeating:
    """Commands and versions. `manifest`: of the run; empty where it is not there."""
    versions = [(str(name), str(one)) for name, one in manifest.get("versions", {}).items()]
    explanation = []
    processes = manifest.get("processes")
    if processes:
        explanation.append(f"The build ran in {processes} processes.")
    begun = manifest.get("begun_with")
    if isinstance(begun, Mapping):
        before = ", ".join(f"{name} {version}" for name, version in begun.items())
        explanation.append(f"The build was begun with other versions: {before}.")
    return Repeating(_commands(recipe, metrics), explanation, versions)


def _commands(recipe: Recipe, metrics: Metrics) -> str:
    parent = recipe.parent
    if parent is not None:
        first = _change(parent.added, parent.removed)
        later = ["train", "evaluate", "report"] if metrics.training else ["evaluate", "report"]
        return "\n".join([first, *(f"symphony {command} DIR" for command in later)])
    if metrics.training:
        return "symphony run recipe.yaml --out DIR\nsymphony verify DIR --deep"
    return "\n".join(
        ["symphony build recipe.yaml --out DIR"]
        + [f"symphony {command} DIR" for command in ("verify", "evaluate", "report")]
    )


def _change(added: str | None, removed: str | None) -> str:
    """Of a run's experts, as a shell takes it: names may have spaces."""
    if added is None:
        return f"symphony remove OLD {shlex.quote(str(removed))} --out DIR"
    command = "add" if removed is None else "replace"
    return f"symphony {command} OLD {shlex.quote(added)} --model MODEL --data FILE --out DIR"
