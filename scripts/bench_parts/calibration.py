"""(c) The first pass of a build over its calibration text, against a plain forward of the same.

What a build does there beside running the sources: reading their layers, comparing each with the
anchor's, matching, and writing down what it found.
"""

from functools import partial
from typing import Any

from bench_parts.measuring import in_turn, markdown, median, shown, spread
from bench_parts.setting import Setting, ask

SIZES: dict[str, dict[str, Any]] = {
    "quick": {"shape": "135M", "sources": 3, "layers": 4, "tokens": 1536, "sequence": 64},
    "cpu": {"shape": "135M", "sources": 3, "layers": 10, "tokens": 24576, "sequence": 512},
    "gpu": {"shape": "1.1B", "sources": 2, "layers": 6, "tokens": 131072, "sequence": 2048},
}
METHODS = {"harmonized": "residual stream and heads", "symphony": "neurons"}
"""Method -> what it compares."""
DTYPES = ("float32", "bfloat16")


def measure(setting: Setting) -> dict[str, Any]:
    """Seconds of the pass by each method, and of the forward in each number format."""
    size = SIZES[setting.scale]
    sources = setting.sources(size["shape"], size["sources"], size["layers"])
    state, commands = setting.state("calibration"), {}
    for method in METHODS:
        recipe = setting.recipe(
            f"calibration-{method}",
            sources,
            method=method,
            calibration={"tokens": size["tokens"], "sequence_length": size["sequence"]},
        )
        out = setting.run_folder(recipe.stem)
        commands[method] = partial(ask, "sweep", recipe=str(recipe), out=str(out))
    for dtype in DTYPES:
        commands[dtype] = partial(ask, "forward", recipe=str(recipe), dtype=dtype)
    return {"size": size, **in_turn(state, "pass", setting.pairs, commands)}


def describe(found: dict[str, Any]) -> str:
    """The table, with what a pass is to each forward."""
    size = found["size"]
    rows = []
    for dtype in DTYPES:
        runs = found[dtype]
        rows.append(
            [f"forward in {dtype}", spread(runs), "", "", use(runs[0], median(runs, "seconds"))]
        )
    for method, what in METHODS.items():
        seconds = median(found[method], "seconds")
        ratios = [shown(median(found[dtype], "seconds") / seconds) for dtype in DTYPES]
        of = found["float32"][0]
        rows.append([f"`{method}`: {what}", spread(found[method]), *ratios, use(of, seconds)])
    head = [
        f"{size['sources']} of {size['shape']}, {size['layers']} layers, {size['tokens']:,} tokens "
        f"in windows of {size['sequence']}",
        "seconds",
        "forward in float32 / pass",
        "forward in bfloat16 / pass",
        "use of the device",
    ]
    return markdown(head, rows)


def use(run: dict[str, Any], seconds: float) -> str:
    """The share of the device's speed that a model's products of matrices take (MFU)."""
    speed = run["operations"] / seconds
    shares = [
        f"{100 * speed / peak:.0f} % of the {kind} peak" for kind, peak in run["peak"].items()
    ]
    return ", ".join(shares)
