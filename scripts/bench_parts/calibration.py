"""(c) The first pass of a build over its calibration text, against a plain forward of the same.

What a build does there beside running the sources: reading their layers, comparing each with the
anchor's, matching, and writing down what it found.
"""

from functools import partial
from typing import Any

from bench_parts.measuring import in_turn, markdown, median, shown, spread
from bench_parts.setting import Setting, ask

TOKENS, SEQUENCE, LAYERS = 24576, 512, 10
METHODS = {"harmonized": "residual stream and heads", "symphony": "neurons"}
"""Method -> what it compares."""
DTYPES = ("float32", "bfloat16")


def measure(setting: Setting) -> dict[str, Any]:
    """Seconds of the pass by each method, and of the forward in each number format."""
    layers, tokens, sequence = (LAYERS, TOKENS, SEQUENCE)
    if setting.quick:
        layers, tokens, sequence = 4, 1536, 64
    sources = setting.sources("135M", 3, layers)
    state, commands = setting.state("calibration"), {}
    for method in METHODS:
        recipe = setting.recipe(
            f"calibration-{method}",
            sources,
            method=method,
            calibration={"tokens": tokens, "sequence_length": sequence},
        )
        out = setting.run_folder(recipe.stem)
        commands[method] = partial(ask, "sweep", recipe=str(recipe), out=str(out))
    for dtype in DTYPES:
        commands[dtype] = partial(ask, "forward", recipe=str(recipe), dtype=dtype)
    shape = {"layers": layers, "tokens": tokens, "sequence": sequence}
    return {"shape": shape, **in_turn(state, "pass", setting.pairs, commands)}


def describe(found: dict[str, Any]) -> str:
    """The table, with what a pass is to each forward."""
    shape = found["shape"]
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
        f"three of 135M, {shape['layers']} layers, {shape['tokens']:,} tokens in windows of "
        f"{shape['sequence']}",
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
