"""(g) A training step of `symphony train` against one of the stock model in plain torch."""

from functools import partial
from typing import Any

from bench_parts.calibration import use
from bench_parts.measuring import in_turn, markdown, median, shown, spread
from bench_parts.setting import Setting, ask, build

SIZES: dict[str, dict[str, Any]] = {
    "quick": {"shape": "135M", "sources": 3, "layers": 2, "batch": 2, "sequence": 64},
    "cpu": {"shape": "135M", "sources": 3, "layers": 6, "batch": 2, "sequence": 512},
    "gpu": {"shape": "1.1B", "sources": 2, "layers": 6, "batch": 8, "sequence": 2048},
}
STEPS, TOP_K = 10, 2


def measure(setting: Setting) -> dict[str, Any]:
    """Seconds of a step of both."""
    size = SIZES[setting.scale]
    sources = setting.sources(size["shape"], size["sources"], size["layers"])
    recipe = setting.recipe("training", sources, method="btx", router={"top_k": TOP_K})
    out = setting.home / "runs" / "training"
    if not (out / "checkpoint").is_dir():
        build(recipe, out)
    steps = {"batch": size["batch"], "sequence": size["sequence"], "steps": STEPS}
    commands = {
        "symphony": partial(ask, "trainer_steps", run=str(out), **steps),
        "stock": partial(
            ask, "stock_steps", checkpoint=str(out / "checkpoint"), top_k=TOP_K, **steps
        ),
    }
    runs = in_turn(setting.state("training"), "steps", setting.pairs, commands)
    return {"size": size, **runs}


def describe(found: dict[str, Any]) -> str:
    """The table."""
    stock, ours, size = found["stock"], found["symphony"], found["size"]
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
        f"{size['sources']} of {size['shape']}, {size['layers']} layers, {size['batch']} windows "
        f"of {size['sequence']}",
        "seconds of a step",
        "mean, with the log",
        "use of the device",
    ]
    return markdown(head, rows)
