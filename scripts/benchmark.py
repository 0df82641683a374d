"""The first table of docs/results.md and more of docs/lab-log.md: every method on some sources.

    python scripts/benchmark.py strangers --seeds 1 2 3 --out benchmark

From `recipes/strangers.yaml` or `recipes/branches.yaml`, or another recipe file, for every seed (of
windows, held-out text, router and training): the plain mean (BTX) under its three routings, DUME,
the paper's preset, `harmonized` and sparse upcycling, built; then some of them trained on equal
tokens, all weights and the router alone. One process of `symphony` a step; what is there already is
kept, so a run that was stopped goes on. Prints Markdown: losses, seconds, peak memory, and the
share of the gap from BTX's best routing to the specialists that is closed. For the times, measure
on an idle machine.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.recipe.load import load_recipe
from symphony_moe.reporting.comparison_table import spread_text
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_stock
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Pieces

ROOT = Path(__file__).parent.parent
PLAIN = ("method=symphony", "backbone.attention=linear", "align.neurons=none")
METHODS = {
    "BTX, random routing": PLAIN,
    "BTX, regression routing": (*PLAIN, "router.init=regression"),
    # Rows near zero: all experts, each with the same weight.
    "BTX, uniform routing": (
        *PLAIN,
        "router.init=regression",
        "router.temperature=1e9",
        "router.top_k=4",
    ),
    "dume": ("method=dume",),
    "symphony": ("method=symphony",),
    "harmonized, aligned only": ("method=harmonized", "fit.method=none"),
    "harmonized, closed form": ("method=harmonized", "fit.epochs=0"),
    "harmonized": ("method=harmonized",),
    "harmonized, heads side by side": ("method=harmonized", "backbone.attention=concatenated"),
    "sparse upcycling": ("method=sparse-upcycling",),
}
TRAINED = ("symphony", "harmonized", "harmonized, heads side by side", "sparse upcycling")
LIMIT = "specialists (out of domain: the best of them)"


def symphony(command: str, *arguments: str) -> None:
    """Run one command; stop where it fails."""
    done = subprocess.run([sys.executable, "-m", "symphony_moe", command, *arguments])
    if done.returncode != 0:
        raise SystemExit(f"symphony {command} {' '.join(arguments)} failed")


def make(recipe: Path, run: Path, settings: Sequence[str]) -> None:
    """Build into `run`, where that is not done yet."""
    if not (run / "checkpoint").is_dir():
        sets = [word for setting in settings for word in ("--set", setting)]
        symphony("build", str(recipe), "--out", str(run), "--overwrite", *sets)


def train(built: Path, scope: str) -> Path:
    """A copy of a build, trained."""
    run = built.with_name(f"{built.name}-{scope}")
    if not (run / "trained").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(built, run)
        symphony("train", str(run), "--set", f"train.scope={scope}")
    return run


def losses_of(model: Path, windows: Mapping[str, Pieces], notes: Path) -> dict[str, float]:
    """Domain -> nats per token; remembered in a file."""
    if not notes.is_file():
        found, _ = losses_and_routing(load_stock(model), windows)
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(json.dumps(found), encoding="utf-8")
    losses: dict[str, float] = json.loads(notes.read_text(encoding="utf-8"))
    return losses


def table(rows: Mapping[str, list[dict[str, float]]], domains: Sequence[str]) -> None:
    """Mean and range over seeds: in domain, then each domain."""
    columns = list(next(iter(rows.values()))[0])
    print("\n| nats per token | in domain | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for row, found in rows.items():
        cells = [spread_text([in_domain(losses, domains) for losses in found])]
        cells += [spread_text([losses[column] for losses in found]) for column in columns]
        print(f"| {row} | " + " | ".join(cells) + " |")


def in_domain(losses: Mapping[str, float], domains: Sequence[str]) -> float:
    return sum(losses[domain] for domain in domains) / len(domains)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", help="strangers, branches, or a recipe file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("benchmark"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--scopes", nargs="*", choices=("all", "router"), default=["all", "router"])
    parser.add_argument("--set", action="append", default=[], help="another setting of the recipe")
    options = parser.parse_args()
    is_bundled = options.family in ("strangers", "branches")
    path = ROOT / "recipes" / f"{options.family}.yaml" if is_bundled else Path(options.family)

    rows: dict[str, list[dict[str, float]]] = {}
    costs: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        seeds = [f"seed={seed}", f"calibration.seed={seed}", *options.set]
        recipe = load_recipe(path, seeds)
        sources = open_sources(recipe)
        windows = Texts(recipe, sources).held_out_text()
        home = options.out / (options.family if is_bundled else path.stem) / f"seed{seed}"
        own = {s.name: losses_of(s.folder, windows, home / f"{s.name}.json") for s in sources}
        # The specialists have no loss out of domain as one: each row below does.
        limit = {name: losses[name] for name, losses in own.items()}
        extra = [domain for domain in windows if domain not in own]
        limit |= {domain: min(losses[domain] for losses in own.values()) for domain in extra}
        rows.setdefault(LIMIT, []).append(limit)
        for method in options.methods:
            run = home / method.replace(", ", "-").replace(" ", "-")
            make(path, run, [*METHODS[method], *seeds])
            timing = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["timing"]
            costs.setdefault(method, []).append(timing)
            losses = losses_of(run / "checkpoint", windows, run / "built.json")
            rows.setdefault(method, []).append(losses)
            for scope in options.scopes if method in TRAINED else ():
                trained = train(run, scope)
                losses = losses_of(trained / "trained", windows, trained / "trained.json")
                rows.setdefault(f"{method}, trained: {scope}", []).append(losses)

    domains = list(recipe.sources)
    print(f"\n{options.family}, seeds {options.seeds}")
    table(rows, domains)
    print("\n| build | seconds | peak MB |\n|---|---|---|")
    for method, timings in costs.items():
        seconds = spread_text([timing["build_seconds"] for timing in timings])
        peak = max(timing["build_peak_rss_bytes"] for timing in timings) / 1e6
        print(f"| {method} | {seconds} | {peak:,.0f} |")
    plain = [row for row in rows if row.startswith("BTX")]
    if plain:
        means = {row: [in_domain(one, domains) for one in found] for row, found in rows.items()}
        best = [min(values) for values in zip(*(means[row] for row in plain), strict=True)]
        print(
            f"\nBTX, its best routing on each seed: {spread_text(best)}. "
            "Share of the gap closed, in %:"
        )
        for row in rows:
            if row not in plain and row != LIMIT:
                each = zip(means[row], best, means[LIMIT], strict=True)
                shares = [100 * (b - ours) / (b - limit) for ours, b, limit in each]
                print(f"- {row}: {spread_text(shares)}")


if __name__ == "__main__":
    main()
