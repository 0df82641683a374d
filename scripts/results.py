"""Tables and plots of docs/results.md, from the folder of a finished `symphony compare`.

    python scripts/results.py compare-strangers --plot docs/results/strangers
    python scripts/results.py compare-strangers --only '+teachers' --reference symphony+teachers

Prints Markdown: a row per method, mean over seeds and range, with the tokens to reach the reference
method's final in-domain loss (of the same seed, calibration counted, per cent of its tokens); with
`--specialization`, how alike the experts are and how the routers use them. With `--plot`, two SVG
files beside it: held-out loss against tokens, in domain and out of domain.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from symphony_moe.recipe.load import load_recipe
from symphony_moe.reporting.charts import draw
from symphony_moe.reporting.comparison_chart import line_chart
from symphony_moe.reporting.comparison_table import (
    Entry,
    limits_of,
    mark_reached,
    mean_of,
    spread_text,
)
from symphony_moe.reporting.numbers import mean
from symphony_moe.reporting.over_seeds import PLACES
from symphony_moe.runs.comparison_folder import CompareFolder
from symphony_moe.runs.metrics import Metrics, read_metrics

COLUMNS = [(stage, where) for stage in ("built", "trained") for where in PLACES]


def table(entries: Sequence[Entry], limits: Mapping[str, float | None]) -> str:
    lines = [
        "| | built, in domain | out of domain | trained, in domain | out of domain | reaches |",
        "|---" * 6 + "|",
    ]
    for method in dict.fromkeys(entry["method"] for entry in entries):
        own = [entry for entry in entries if entry["method"] == method]
        cells = [
            spread_text([mean_of(e, where) for e in own if e["stage"] == stage])
            for stage, where in COLUMNS
        ]
        shares = [e["reaches"]["share"] for e in own if e["stage"] == "trained"]
        percent = [None if share is None else 100 * share for share in shares]
        lines.append(f"| {method} | {' | '.join(cells)} | {spread_text(percent, 1)} |")
    inside, outside = (spread_text([limits[where]]) for where in PLACES)
    lines.append(f"| specialists | | | {inside} | {outside} | |")
    return "\n".join(lines)


def specialization(metrics: Mapping[tuple[str, int], Metrics]) -> str:
    """CKA of every two experts, mean over pairs and layers, of the dense sources, the built and the
    trained model; and of the trained model's routers on the text of all sources alike, mean over
    layers: entropy in nats, the load's balance (1: even), the share of the busiest expert."""
    lines = ["| | CKA, built | trained | entropy | balance | busiest |", "|---" * 6 + "|"]
    sources = [of.cka["sources"].mean for of in metrics.values()]
    lines.append(f"| the dense sources | {spread_text(sources)} | | | | |")
    for method in dict.fromkeys(method for method, _ in metrics):
        own = [of for (name, _), of in metrics.items() if name == method]
        cells = [spread_text([of.cka[stage].mean for of in own]) for stage in ("built", "trained")]
        routing = [mixed for of in own if (mixed := of.routing["trained"].mixed)]
        for measure in ("entropy", "balance", "max_share"):
            cells.append(spread_text([mean(getattr(of, measure)) for of in routing]))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(entries: Sequence[Entry], where: str, limit: float | None) -> str:
    """A standalone SVG."""
    chart = line_chart(entries, where, limit)
    if chart is None:
        raise SystemExit(f"no loss {where} to plot")
    return draw(chart, on_paper=True) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="methods whose name has this in it")
    parser.add_argument("--without", help="methods whose name has not")
    parser.add_argument("--reference", default="symphony")
    parser.add_argument("--specialization", action="store_true", help="that table instead")
    parser.add_argument("--plot", type=Path, help="where the plots go: PATH-in.svg, PATH-out.svg")
    options = parser.parse_args()
    folder = CompareFolder(options.folder)
    entries = json.loads(folder.comparison.read_text(encoding="utf-8"))
    runs = {(e["method"], e["seed"]): folder.run(e["method"], e["seed"]) for e in entries}
    recipe = load_recipe(next(iter(runs.values())).recipe)
    metrics = {name: read_metrics(run) for name, run in runs.items()}
    limits = limits_of(metrics, list(recipe.sources))
    mark_reached(entries, options.reference)
    chosen = [
        entry
        for entry in entries
        if (not options.only or options.only in entry["method"])
        and (not options.without or options.without not in entry["method"])
    ]
    if options.specialization:
        names = {(entry["method"], entry["seed"]) for entry in chosen}
        print(specialization({name: of for name, of in metrics.items() if name in names}))
        return
    print(table(chosen, limits))
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        for where, ending in (("in domain", "in"), ("out of domain", "out")):
            path = options.plot.with_name(f"{options.plot.name}-{ending}.svg")
            path.write_text(plot(chosen, where, limits[where]), encoding="utf-8")


if __name__ == "__main__":
    main()
