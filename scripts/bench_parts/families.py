"""What builds of every family take, against those of Llama: the same sizes, the same text."""

from functools import partial
from typing import Any

from bench_parts.measuring import gigabytes, in_turn, markdown, median, shown
from bench_parts.models import FAMILIES
from bench_parts.setting import Setting, build, weights_of

METHODS = ("btx", "harmonized")
SOURCES, LAYERS, TOKENS, SEQUENCE, EPOCHS = 2, 4, 4096, 256, 1


def measure(setting: Setting) -> dict[str, Any]:
    """Runs by method and family, and how many bytes of weights the result of each has."""
    families = list(FAMILIES)[:2] if setting.quick else list(FAMILIES)
    state, found = setting.state("families"), {}
    for method in METHODS[:1] if setting.quick else METHODS:
        commands = {}
        for family in families:
            recipe = setting.recipe(
                f"families-{family}-{method}",
                setting.sources(f"wide {family}", SOURCES, LAYERS),
                method=method,
                calibration=setting.text(TOKENS, SEQUENCE),
                fit={"epochs": EPOCHS} if method == "harmonized" else {},
            )
            out = setting.run_folder(recipe.stem)
            commands[family] = partial(_run, recipe, out)
        found[method] = in_turn(state, method, setting.pairs, commands)
    return found


def _run(recipe: Any, out: Any) -> dict[str, Any]:
    taken = build(recipe, out)
    return taken | {"weights": weights_of(out / "checkpoint")}


def describe(found: dict[str, Any]) -> str:
    """The table; the last two columns are what a byte of weights takes, over what it takes of
    Llama."""
    rows = []
    for method, by_family in found.items():
        of_llama = by_family["llama"]
        for family, runs in by_family.items():
            size = runs[0]["weights"] / of_llama[0]["weights"]
            ratios = [
                median(runs, of) / median(of_llama, of) / size for of in ("seconds", "peak_bytes")
            ]
            rows.append(
                [
                    f"`{method}`",
                    family,
                    gigabytes(runs[0]["weights"]),
                    shown(median(runs, "seconds")),
                    gigabytes(median(runs, "peak_bytes")),
                    *(f"**{ratio:.2f}**" for ratio in ratios),
                ]
            )
    head = ["method", "family", "weights of the result", "seconds", "peak memory"]
    return markdown([*head, "seconds for a byte / Llama's", "memory for a byte / Llama's"], rows)
