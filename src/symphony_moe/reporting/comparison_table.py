"""Several finished runs into one table: who may stand beside whom, and what each row says.

Pure functions of the runs' `metrics.json` and `manifest.json`; `pipeline.compare` makes the runs.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from symphony_moe.errors import RunFolderError

Name = tuple[str, int]
"""(method, seed)."""


def refuse_different(
    metrics: Mapping[Name, Mapping[str, Any]], manifests: Mapping[Name, Mapping[str, Any]]
) -> None:
    """RunFolderError unless all runs have the same sources and held-out text, and those of one seed
    the same training text in the same order, and the same number of trained tokens and steps."""

    def facts(name: Name) -> dict[str, Any]:
        training = metrics[name].get("training", {})
        return {
            "training text, or its order": training.get("text"),
            "number of trained tokens": training.get("tokens"),
            "number of steps": training.get("steps"),
        }

    names = list(metrics)
    for name in names:
        held_out = [metrics[one].get("held_out") for one in (names[0], name)]
        if manifests[name]["sources"] != manifests[names[0]]["sources"]:
            raise RunFolderError(_differ(names[0], name, "sources"))
        if None in held_out or held_out[0] != held_out[1]:
            raise RunFolderError(_differ(names[0], name, "held-out text"))
        other = next(first for first in names if first[1] == name[1])
        for what, value in facts(name).items():
            if value is None or value != facts(other)[what]:
                raise RunFolderError(_differ(other, name, what))


def _differ(first: Name, second: Name, what: str) -> str:
    one, two = (f"{method} (seed {seed})" for method, seed in (first, second))
    return (
        f"{one} and {two} differ in: {what}. They cannot stand in one table; give them the same "
        "sources, data, seed, train.tokens, train.batch_size and evaluation, or compare without one"
    )


def entries_of(
    metrics: Mapping[Name, Mapping[str, Any]], sources: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of `comparison.json` (docs/training.md), two per run: built and trained. `tokens` is
    calibration tokens plus trained ones; means are None where a loss is no number; `tasks` are the
    benchmarks that `symphony evaluate --tasks` has measured of the run."""
    entries = []
    for (method, seed), of_run in metrics.items():
        timing, training = of_run["timing"], of_run["training"]
        calibration = timing["calibration_tokens"]
        name = {"method": method, "seed": seed}
        built = name | {
            "stage": "built",
            "tokens": calibration,
            "losses": of_run["built"],
            **_means(of_run["built"], sources),
            "seconds": timing["build_seconds"],
            "peak_rss_bytes": timing["build_peak_rss_bytes"],
        }
        trained = name | {
            "stage": "trained",
            "tokens": calibration + training["tokens"],
            "losses": of_run["trained"],
            **_means(of_run["trained"], sources),
            "seconds": round(timing["build_seconds"] + training["seconds"], 2),
            "peak_rss_bytes": timing["train_peak_rss_bytes"],
            "calibration_tokens": calibration,
            "temperature": training.get("temperature_scaling", {}).get("temperature", 1.0),
            "curve": [
                {"tokens": calibration + point["tokens"], **_means(point["losses"], sources)}
                for point in training.get("held_out", [])
            ],
        }
        for row in (built, trained):
            if scores := of_run.get("tasks", {}).get(row["stage"]):
                row["tasks"] = scores
        entries += [built, trained]
    return entries


def _means(losses: Mapping[str, float | None], sources: Sequence[str]) -> dict[str, float | None]:
    inside = [loss for domain, loss in losses.items() if domain in sources]
    outside = [loss for domain, loss in losses.items() if domain not in sources]
    return {"mean_in_domain": _mean(inside), "mean_out_of_domain": _mean(outside)}


def _mean(losses: Sequence[float | None]) -> float | None:
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return sum(finite) / len(finite) if losses and len(finite) == len(losses) else None


def mark_reached(entries: Sequence[dict[str, Any]], reference: str) -> None:
    """Say in every trained row when its in-domain mean is down to the final one of the reference
    method with the same seed: `reaches: {tokens, share of the reference's tokens}`, each None where
    it never is, where nothing was measured on the way there (`train.evaluations: 0`), and for the
    reference itself. What is compared is as it was trained, before `train.temperature_scaling`."""
    final = {e["seed"]: e for e in entries if (e["method"], e["stage"]) == (reference, "trained")}
    for built, trained in zip(entries[::2], entries[1::2], strict=True):
        goal, tokens = final[trained["seed"]], None
        end = _as_trained(goal)
        if trained is not goal and end is not None:
            points = [(e["tokens"], e["mean_in_domain"]) for e in (built, *trained["curve"])]
            last = _as_trained(trained)
            if trained["curve"] and last is not None:
                points.append((trained["tokens"], last))
            tokens = tokens_to_reach(points, end)
        share = None if tokens is None else round(tokens / goal["tokens"], 4)
        trained["reaches"] = {"tokens": tokens, "share": share}


def _as_trained(row: Mapping[str, Any]) -> float | None:
    """A trained row's mean in domain before the logits were softened; None where nobody measured
    that."""
    if row.get("temperature", 1) == 1:  # older tables do not say
        return row["mean_in_domain"]
    last = row["curve"][-1:]
    return last[0]["mean_in_domain"] if last and last[0]["tokens"] == row["tokens"] else None


def tokens_to_reach(points: Sequence[tuple[int, float | None]], goal: float) -> int | None:
    """The tokens at which a curve of (tokens, loss) first is down to `goal`, between two points on
    the straight line; None where it never is."""
    known = [(tokens, loss) for tokens, loss in points if loss is not None]
    if known and known[0][1] <= goal:
        return known[0][0]
    for (before, above), (after, below) in pairwise(known):
        if below <= goal:
            return math.ceil(before + (after - before) * (above - goal) / (above - below))
    return None


def limits_of(
    metrics: Mapping[Name, Mapping[str, Any]], sources: Sequence[str]
) -> dict[str, float | None]:
    """What the dense sources lose, mean over the runs: `in domain` each on its own; `out of domain`
    the best of them on every domain."""
    inside, outside = [], []
    for of_run in metrics.values():
        losses = of_run["sources"]
        inside.append(_mean([losses[name][name] for name in sources]))
        others = [domain for domain in next(iter(losses.values())) if domain not in sources]
        asked = [
            [losses[name][domain] for name in sources if losses[name][domain] is not None]
            for domain in others
        ]
        outside.append(_mean([min(of, default=None) for of in asked]))
    return {"in domain": _mean(inside), "out of domain": _mean(outside)}


def describe(entries: Sequence[Mapping[str, Any]], limits: Mapping[str, float | None]) -> str:
    """The table for people: a row per method, mean over seeds and range."""
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    columns = [
        (stage, where) for stage in ("built", "trained") for where in ("in_domain", "out_of_domain")
    ]
    head = ["nats per token", *(f"{s}, {w.replace('_', ' ')}" for s, w in columns), "reaches"]
    rows = [head]
    for method in methods:
        cells = [method]
        for stage, where in columns:
            values = [
                entry[f"mean_{where}"]
                for entry in entries
                if (entry["method"], entry["stage"]) == (method, stage)
            ]
            cells.append(spread_text(values))
        shares = [
            e["reaches"]["share"] for e in entries if e["method"] == method and "reaches" in e
        ]
        reached = None not in shares
        cells.append(f"{100 * sum(shares) / len(shares):.0f} %" if reached else "-")
        rows.append(cells)
    inside, outside = (limits[where] for where in ("in domain", "out of domain"))
    rows.append(["specialists", "", "", spread_text([inside]), spread_text([outside]), ""])
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def spread_text(values: Sequence[float | None], digits: int = 3) -> str:
    """The mean over seeds, and where there are several, the range; `-` where one is no number."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values) or not values:
        return "-"
    text = f"{sum(finite) / len(finite):.{digits}f}"
    if len(finite) == 1:
        return text
    return f"{text} ({min(finite):.{digits}f} to {max(finite):.{digits}f})"
