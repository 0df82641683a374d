"""(e) How seconds and memory of a build grow with layers, tokens and sources.

Each is doubled twice. Where time grows in a straight line, the second doubling costs twice what the
first did, whatever a command begins with.
"""

from functools import partial
from typing import Any

from bench_parts.measuring import gigabytes, in_turn, markdown, median, shown
from bench_parts.setting import Setting, build

METHODS = ("btx", "symphony", "harmonized")
BASE = {"layers": 4, "tokens": 8192, "sources": 2}
AXES = {"layers": (4, 8, 16), "tokens": (8192, 16384, 32768), "sources": (2, 4, 8)}
QUICK_BASE = {"layers": 2, "tokens": 1024, "sources": 2}
QUICK_AXES = {"tokens": (1024, 2048, 4096)}
SEQUENCE, EPOCHS = 256, 1


def measure(setting: Setting) -> dict[str, Any]:
    """What builds take, by method, by what grows and by how much of it there is."""
    base, axes = (QUICK_BASE, QUICK_AXES) if setting.quick else (BASE, AXES)
    state, found = setting.state("growth"), {}
    for method in METHODS[-1:] if setting.quick else METHODS:
        for axis, values in axes.items():
            if method == "btx" and axis == "tokens":
                continue  # it reads none
            commands = {}
            for value in values:
                size = {**base, axis: value}
                recipe = _recipe(setting, method, size)
                out = setting.run_folder(recipe.stem)
                commands[str(value)] = partial(build, recipe, out)
            found[f"{method}, {axis}"] = in_turn(state, f"{method} {axis}", setting.pairs, commands)
    return found


def _recipe(setting: Setting, method: str, size: dict[str, int]) -> Any:
    sources = setting.sources("wide", size["sources"], size["layers"])
    name = "-".join(["growth", method, *map(str, size.values())])
    sequence = 64 if setting.quick else SEQUENCE
    return setting.recipe(
        name,
        sources,
        method=method,
        calibration={"tokens": size["tokens"], "sequence_length": sequence},
        fit={"epochs": EPOCHS} if method == "harmonized" else {},
    )


def slopes(values: list[float], seconds: list[float]) -> tuple[float, float]:
    """Seconds for each more, from the first to the second value and from there to the third."""
    first, second = ((seconds[i + 1] - seconds[i]) / (values[i + 1] - values[i]) for i in (0, 1))
    return first, second


def describe(found: dict[str, Any]) -> str:
    """The table; the last column is 1 where time grows in a straight line."""
    rows = []
    for case, runs in found.items():
        method, _, axis = case.partition(", ")
        values = [float(value) for value in runs]
        seconds = [median(taken, "seconds") for taken in runs.values()]
        first, second = slopes(values, seconds)
        rows.append(
            [
                f"`{method}`",
                f"{axis} {', '.join(f'{value:,.0f}' for value in values)}",
                ", ".join(map(shown, seconds)),
                ", ".join(gigabytes(median(taken, "peak_bytes")) for taken in runs.values()),
                f"{first:.2g}, {second:.2g}",
                f"**{second / first:.2f}**",
            ]
        )
    count = max(len(taken) for runs in found.values() for taken in runs.values())
    head = [
        "method",
        "what grows",
        f"seconds (runs: {count})",
        "peak memory",
        "seconds for one more",
        "ratio",
    ]
    return markdown(head, rows)
