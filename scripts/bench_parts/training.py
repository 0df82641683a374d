"""(g) A training step of `symphony train` against one of the stock model in plain torch."""

from functools import partial
from typing import Any

from bench_parts.calibration import use
from bench_parts.measuring import in_turn, markdown, median, shown, spread
from bench_parts.setting import Setting, ask, build

LAYERS, BATCH, SEQUENCE, STEPS, TOP_K = 6, 2, 512, 10, 2


def measure(setting: Setting) -> dict[str, Any]:
    """Seconds of a step of both."""
    sources = setting.sources("135M", 3, LAYERS)
    sequence = 64 if setting.quick else SEQUENCE
    recipe = setting.recipe("training", sources, method="btx", router={"top_k": TOP_K})
    out = setting.home / "runs" / "training"
    if not (out / "checkpoint").is_dir():
        build(recipe, out)
    shape = {"batch": BATCH, "sequence": sequence, "steps": STEPS}
    commands = {
        "symphony": partial(ask, "trainer_steps", run=str(out), **shape),
        "stock": partial(
            ask, "stock_steps", checkpoint=str(out / "checkpoint"), top_k=TOP_K, **shape
        ),
    }
    runs = in_turn(setting.state("training"), "steps", setting.pairs, commands)
    return {"shape": shape | {"layers": LAYERS}, **runs}


def describe(found: dict[str, Any]) -> str:
    """The table."""
    stock, ours, shape = found["stock"], found["symphony"], found["shape"]
    rows = [
        [
            name,
            spread(runs),
            shown(median(runs, "mean_seconds")),
            use(stock[0], median(runs, "seconds")),
        ]
        for name, runs in (("stock model, torch", stock), ("`symphony train`", ours))
    ]
    ratios = [shown(median(stock, of) / median(ours, of)) for of in ("seconds", "mean_seconds")]
    rows.append(["**stock / symphony**", *(f"**{ratio}**" for ratio in ratios), ""])
    head = [
        f"three of 135M, {shape['layers']} layers, {shape['batch']} windows of {shape['sequence']}",
        "seconds of a step",
        "mean, with the log",
        "use of the device",
    ]
    return markdown(head, rows)
