"""Several finished runs into one table: who may stand beside whom, and what each row says.

Pure functions of the runs' metrics and manifests; `comparison.compare` makes the runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NotRequired, TypedDict

from symphony_moe.errors import RunFolderError
from symphony_moe.runs.metrics import Metrics, Timing, Training

Name = tuple[str, int]
"""(method, seed)."""


class Entry(TypedDict):
    """A row of `comparison.json` (docs/training.md): a run as it was built, or as it was
    trained."""

    method: str
    seed: int
    stage: str
    tokens: int
    losses: dict[str, float | None]
    mean_in_domain: float | None
    mean_out_of_domain: float | None
    seconds: float
    peak_rss_bytes: int
    calibration_tokens: NotRequired[int]
    temperature: NotRequired[float]
    kept_tokens: NotRequired[int]
    average: NotRequired[float]
    curve: NotRequired[list["Mark"]]
    reaches: NotRequired["Reach"]
    tasks: NotRequired[dict[str, Any]]


class Mark(TypedDict):
    """A point of a run's curve."""

    tokens: int
    mean_in_domain: float | None
    mean_out_of_domain: float | None


class Reach(TypedDict):
    """When a run is down to the reference's final loss."""

    tokens: int | None
    share: float | None


def refuse_different(
    metrics: Mapping[Name, Metrics], manifests: Mapping[Name, Mapping[str, Any]]
) -> None:
    """RunFolderError unless all runs have the same sources and held-out text, and those of one seed
    the same training text in the same order, and the same number of trained tokens and steps."""

    def facts(name: Name) -> dict[str, Any]:
        training = metrics[name].training or Training()
        tokens, steps = training.planned
        return {
            "training text, or its order": training.text,
            "number of trained tokens": tokens,
            "number of steps": steps,
        }

    names = list(metrics)
    for name in names:
        found = [metrics[one].held_out for one in (names[0], name)]
        held_out = [None if text is None else text.text for text in found]
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


def entries_of(metrics: Mapping[Name, Metrics], sources: Sequence[str]) -> list[Entry]:
    """The rows of `comparison.json` (docs/training.md), two per run: built and trained. `tokens` is
    calibration tokens plus trained ones; means are None where a loss is NaN or infinite; `tasks`
    are the benchmarks that `symphony evaluate --tasks` has measured of the run. Raises
    RunFolderError for a run that is not finished."""
    entries = []
    for name, of_run in metrics.items():
        finished = _finished(name, of_run)
        entries += [_built_entry(finished, sources), _trained_entry(finished, sources)]
    return entries


@dataclass(frozen=True)
class _Finished:
    """What a run has measured when it is finished."""

    name: Name
    metrics: Metrics
    training: Training
    calibration_tokens: int
    build_seconds: float
    build_bytes: int
    train_bytes: int

    def tasks(self, stage: str) -> dict[str, Any]:
        found = self.metrics.tasks.get(stage, {})
        return {name: result.to_json() for name, result in found.items()}


def _finished(name: Name, metrics: Metrics) -> _Finished:
    timing = metrics.timing or Timing()
    needed = {
        "training": metrics.training,
        "timing.calibration_tokens": timing.calibration_tokens,
        "timing.build_seconds": timing.build_seconds,
        "timing.build_peak_rss_bytes": timing.build_peak_rss_bytes,
        "timing.train_peak_rss_bytes": timing.train_peak_rss_bytes,
    }
    lacking = [what for what, value in needed.items() if value is None]
    if lacking:
        raise RunFolderError(
            f"{name[0]} (seed {name[1]}): its metrics.json has no {', '.join(lacking)}; the run is "
            "not finished, or the file is damaged. --resume goes on with it"
        )
    assert metrics.training is not None
    return _Finished(
        name,
        metrics,
        metrics.training,
        timing.calibration_tokens or 0,
        timing.build_seconds or 0.0,
        timing.build_peak_rss_bytes or 0,
        timing.train_peak_rss_bytes or 0,
    )


def _built_entry(run: _Finished, sources: Sequence[str]) -> Entry:
    inside, outside = _means(run.metrics.built, sources)
    entry: Entry = {
        "method": run.name[0],
        "seed": run.name[1],
        "stage": "built",
        "tokens": run.calibration_tokens,
        "losses": {**run.metrics.built},
        "mean_in_domain": inside,
        "mean_out_of_domain": outside,
        "seconds": run.build_seconds,
        "peak_rss_bytes": run.build_bytes,
    }
    if tasks := run.tasks("built"):
        entry["tasks"] = tasks
    return entry


def _trained_entry(run: _Finished, sources: Sequence[str]) -> Entry:
    training, calibration = run.training, run.calibration_tokens
    inside, outside = _means(run.metrics.trained, sources)
    scaling = training.temperature_scaling
    entry: Entry = {
        "method": run.name[0],
        "seed": run.name[1],
        "stage": "trained",
        "tokens": calibration + (training.tokens or 0),
        "losses": {**run.metrics.trained},
        "mean_in_domain": inside,
        "mean_out_of_domain": outside,
        "seconds": round(run.build_seconds + (training.seconds or 0.0), 2),
        "peak_rss_bytes": run.train_bytes,
        "calibration_tokens": calibration,
        "temperature": 1.0 if scaling is None else scaling.temperature,
        "curve": [
            _mark(calibration + point.tokens, point.losses, sources) for point in training.held_out
        ],
    }
    if training.validation is not None and training.tokens and training.steps:
        chosen = training.tokens // training.steps * training.validation.chosen_step
        entry["kept_tokens"] = calibration + chosen
    if training.averaging is not None:
        entry["average"] = training.averaging.share
    if tasks := run.tasks("trained"):
        entry["tasks"] = tasks
    return entry


def _mark(tokens: int, losses: Mapping[str, float], sources: Sequence[str]) -> Mark:
    inside, outside = _means(losses, sources)
    return {"tokens": tokens, "mean_in_domain": inside, "mean_out_of_domain": outside}


def mean_of(row: Entry | Mark, where: str) -> float | None:
    """A mean loss of a row, `in domain` or `out of domain`."""
    return row["mean_in_domain"] if where == "in domain" else row["mean_out_of_domain"]


def _means(
    losses: Mapping[str, float | None], sources: Sequence[str]
) -> tuple[float | None, float | None]:
    """In domain, out of domain."""
    inside = [loss for domain, loss in losses.items() if domain in sources]
    outside = [loss for domain, loss in losses.items() if domain not in sources]
    return _mean(inside), _mean(outside)


def _mean(losses: Sequence[float | None]) -> float | None:
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return sum(finite) / len(finite) if losses and len(finite) == len(losses) else None


def mark_reached(entries: Sequence[Entry], reference: str) -> None:
    """Say in every trained row when its in-domain mean is down to the final one of the reference
    method with the same seed: `reaches: {tokens, share of the reference's tokens}`, each None where
    it never is, where nothing was measured on the way there (`train.evaluations: 0`), and for the
    reference itself. What is compared is as it was trained, before `train.temperature_scaling`."""
    final = {e["seed"]: e for e in entries if (e["method"], e["stage"]) == (reference, "trained")}
    for built, trained in zip(entries[::2], entries[1::2], strict=True):
        goal, tokens = final[trained["seed"]], None
        end = _as_trained(goal)
        if trained is not goal and end is not None:
            curve = trained.get("curve", [])
            points = [(built["tokens"], built["mean_in_domain"])]
            points += [(point["tokens"], point["mean_in_domain"]) for point in curve]
            last = _as_trained(trained)
            if curve and last is not None:
                points.append((trained["tokens"], last))
            tokens = tokens_to_reach(points, end)
        share = None if tokens is None else round(tokens / goal["tokens"], 4)
        trained["reaches"] = {"tokens": tokens, "share": share}


def _as_trained(row: Entry) -> float | None:
    """A trained row's mean in domain before temperature scaling; None where nobody measured
    that."""
    if row.get("temperature", 1) == 1:  # older tables do not say
        return row["mean_in_domain"]
    if row.get("average", 1) != 1:  # a mean of weights is measured at the end alone
        return None
    at = row.get("kept_tokens", row["tokens"])  # with train.keep_best maybe not the last step's
    measured = {mark["tokens"]: mark["mean_in_domain"] for mark in row.get("curve", [])}
    return measured.get(at)


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


def limits_of(metrics: Mapping[Name, Metrics], sources: Sequence[str]) -> dict[str, float | None]:
    """What the dense sources lose, mean over the runs: `in domain` each on its own; `out of domain`
    the best of them on every domain."""
    inside, outside = [], []
    for of_run in metrics.values():
        losses = of_run.sources
        inside.append(_mean([losses[name][name] for name in sources]))
        others = [domain for domain in next(iter(losses.values())) if domain not in sources]
        asked = [
            [losses[name][domain] for name in sources if not math.isnan(losses[name][domain])]
            for domain in others
        ]
        outside.append(_mean([min(of, default=None) for of in asked]))
    return {"in domain": _mean(inside), "out of domain": _mean(outside)}


def comparison_as_text(entries: Sequence[Entry], limits: Mapping[str, float | None]) -> str:
    """The table for people: a row per method, mean over seeds and range."""
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    columns = [
        (stage, where) for stage in ("built", "trained") for where in ("in domain", "out of domain")
    ]
    head = ["nats per token", *(f"{stage}, {where}" for stage, where in columns), "reaches"]
    rows = [head]
    for method in methods:
        cells = [method]
        for stage, where in columns:
            values = [
                mean_of(entry, where)
                for entry in entries
                if (entry["method"], entry["stage"]) == (method, stage)
            ]
            cells.append(spread_text(values))
        shares = [
            e["reaches"]["share"] for e in entries if e["method"] == method and "reaches" in e
        ]
        known = [share for share in shares if share is not None]
        reached = len(known) == len(shares)
        cells.append(f"{100 * sum(known) / len(known):.0f} %" if reached else "-")
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
    """The mean over seeds, and where there are several, the range; `-` where one is None: NaN or
    infinite."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values) or not values:
        return "-"
    text = f"{sum(finite) / len(finite):.{digits}f}"
    if len(finite) == 1:
        return text
    return f"{text} ({min(finite):.{digits}f} to {max(finite):.{digits}f})"
