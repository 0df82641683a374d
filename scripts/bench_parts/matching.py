"""(d) Matching neurons: this package's exact assignment against scipy's."""

from functools import partial
from typing import Any

from bench_parts.measuring import in_turn, markdown, median, shown, spread
from bench_parts.setting import Setting, ask

SIZES = (1536, 4864, 8960, 14336)
"""Neurons of a layer of SmolLM2-135M, Qwen2.5-0.5B, Qwen2.5-1.5B and Llama-3-8B."""
KINDS = ("strangers", "branches")
OURS, THEIRS = "symphony", "scipy"


def measure(setting: Setting) -> dict[str, Any]:
    """Seconds of both, and the sums of correlations that they reach."""
    state, found = setting.state("matching"), {}
    for size in (96, 192) if setting.quick else SIZES:
        for kind in KINDS:
            commands = {
                by: partial(ask, "matching", by=by, neurons=size, kind=kind)
                for by in (OURS, THEIRS)
            }
            # The large ones take minutes, and vary little.
            pairs = setting.pairs if size < 8000 else 1
            found[f"{size}, {kind}"] = in_turn(state, f"{size} {kind}", pairs, commands)
    return found


def describe(found: dict[str, Any]) -> str:
    """The table; the sums must be the same."""
    rows = []
    for case, runs in found.items():
        size, _, kind = case.partition(", ")
        ours, theirs = runs[OURS], runs[THEIRS]
        ratio = median(theirs, "seconds") / median(ours, "seconds")
        least = min(run["sum"] / theirs[0]["sum"] for run in ours)
        row = [f"{int(size):,}", kind, spread(ours), spread(theirs), f"**{shown(ratio)}**"]
        rows.append([*row, f"{least:.9f}"])
    head = [
        "neurons",
        "sources",
        "symphony, s",
        "scipy, s",
        "scipy / symphony",
        "sum / scipy's sum",
    ]
    return markdown(head, rows)
