"""Held-out losses of the sources, the built and the trained model, as a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.numbers import loss_text, lowest_text, mean_of_all, perplexity_text
from symphony_moe.reporting.strips import Scale, Strip, Strips, Value
from symphony_moe.reporting.tables import Cell, in_order
from symphony_moe.runs.metrics import Metrics


@dataclass(frozen=True)
class LossTable:
    """Held-out losses in nats per token."""

    in_domain: list[str]
    out_of_domain: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    """(label, kind: source, reference or model; cells of in_domain, out_of_domain and the means)"""
    beyond: list[tuple[str, list[str]]]
    """(model, how far it is above the mark to beat, for the cells of a row)"""
    distances: list[str]
    """How far the models are from the mean of the specialists, in words."""
    diverged: bool
    """Whether a loss is NaN or infinite."""


def loss_table(metrics: Metrics, recipe: Recipe) -> LossTable | None:
    """Every source and model on every domain, with the means. None where there are no losses."""
    # A source that was asked nothing of a domain has no loss there.
    sources = {
        name: {domain: loss for domain, loss in losses.items() if not math.isnan(loss)}
        for name, losses in metrics.sources.items()
    }
    if not sources and not metrics.models:
        return None
    measured = (*metrics.sources.values(), *metrics.models.values())
    domains = in_order([*recipe.sources, *recipe.evaluation.extra], *measured)
    in_domain = [domain for domain in domains if domain in recipe.sources]
    out_of_domain = [domain for domain in domains if domain not in recipe.sources]

    order = [name for name in recipe.sources if name in sources]
    named = [(name, "source", _row(sources[name], in_domain, out_of_domain)) for name in order]
    own = {name: sources[name][name] for name in order if name in sources[name]}
    specialists = _row(own, in_domain, out_of_domain)
    # The own specialists are several models, so they are a reference and never the best.
    reference = [("own specialist", "reference", specialists)] if sources else []
    built = [
        (name, "model", _row(losses, in_domain, out_of_domain))
        for name, losses in metrics.models.items()
    ]
    columns = zip(*(row for _, _, row in named + built), strict=True)
    lowest = [lowest_text(column) for column in columns]
    column_domains = [*in_domain, *out_of_domain, None, *([None] if out_of_domain else [])]
    rows = [
        (
            label,
            kind,
            [
                Cell(
                    text=loss_text(loss),
                    title=perplexity_text(loss),
                    best=kind != "reference" and best is not None and loss_text(loss) == best,
                    own=kind == "source" and label == domain,
                )
                for loss, best, domain in zip(row, lowest, column_domains, strict=True)
            ],
        )
        for label, kind, row in named + reference + built
    ]
    mean = len(domains)
    distances = []
    if sources and specialists[mean] is not None:
        distances = [distance_text(name, row[mean], specialists[mean]) for name, _, row in built]
    values = [value for _, _, row in named + built for value in row if value is not None]
    diverged = not all(math.isfinite(value) for value in values)
    best = {domain: mark for domain, (_, mark) in marks_to_beat(metrics, recipe).items()}
    marks = _row(best, in_domain, out_of_domain)
    beyond = [(name, _beyond(row, marks)) for name, _, row in built] if sources else []
    return LossTable(in_domain, out_of_domain, rows, beyond, distances, diverged)


def _beyond(row: Sequence[float | None], marks: Sequence[float | None]) -> list[str]:
    """A row less the marks to beat; empty where there is no mark."""
    return [
        "" if loss is None or mark is None else _signed(loss - mark)
        for loss, mark in zip(row, marks, strict=True)
    ]


def _signed(difference: float) -> str:
    return f"{difference:+.3f}" if math.isfinite(difference) else "NaN"


def marks_to_beat(metrics: Metrics, recipe: Recipe) -> dict[str, tuple[str, float]]:
    """Domain -> (source, its loss): of a source's domain that source, of another one the best of
    them. Domains without a finite loss are left out."""
    marks = {}
    measured = (*metrics.sources.values(), *metrics.models.values())
    for domain in in_order([*recipe.sources, *recipe.evaluation.extra], *measured):
        known = {
            name: losses[domain]
            for name, losses in metrics.sources.items()
            if math.isfinite(losses.get(domain, math.nan))
        }
        if domain in recipe.sources:
            known = {name: loss for name, loss in known.items() if name == domain}
        if known:
            best = min(known, key=known.__getitem__)
            marks[domain] = best, known[best]
    return marks


def loss_strips(metrics: Metrics, recipe: Recipe) -> Strips | None:
    """A strip for every domain: the mark to beat, the other sources, the built and the trained
    model. None where no model or no source was measured."""
    marks = marks_to_beat(metrics, recipe)
    wanted = [loss for _, loss in marks.values()]
    wanted += [
        loss
        for losses in metrics.models.values()
        for domain, loss in losses.items()
        if domain in marks and math.isfinite(loss)
    ]
    if not marks or not metrics.models:
        return None
    low, high = min(wanted), max(wanted)
    # The strangers of a domain may be far beyond: room for some of them, not for all.
    scale = Scale.of(low, high + 0.3 * (high - low))
    rows = []
    for domain, (best, mark) in marks.items():
        inside = domain in recipe.sources
        goal = f"own specialist, {best}" if inside else f"best source, {best}"
        values = _of_sources(metrics, domain, best)
        values.append(Value("goal", mark, f"{goal}: {loss_text(mark)}"))
        words = [f"mark {loss_text(mark)}"]
        for (stage, losses), kind in zip(metrics.models.items(), _kinds(metrics), strict=True):
            loss = losses.get(domain)
            if loss is None:
                continue
            apart = _signed(loss - mark)
            values.append(Value(kind, loss, f"{stage}: {loss_text(loss)} ({apart})"))
            words.append(f"{stage} {loss_text(loss)} ({apart})")
        note = "" if inside else "out of domain"
        rows.append(Strip(domain, words, scale.marks_of(values), note))
    kinds = [("goal", "mark to beat"), *zip(_kinds(metrics), metrics.models, strict=True)]
    return Strips(
        "Held-out loss by domain, and the mark to beat",
        "nats per token",
        rows,
        scale.axis,
        [*kinds, ("other", "another source")],
    )


def _kinds(metrics: Metrics) -> list[str]:
    """How the models look: the last one is the result."""
    return ["before", "after"] if len(metrics.models) > 1 else ["after"]


def _of_sources(metrics: Metrics, domain: str, best: str) -> list[Value]:
    """The sources that are not the mark."""
    return [
        Value(
            "other",
            losses.get(domain, math.nan),
            f"source {name}: {loss_text(losses.get(domain, math.nan))}",
        )
        for name, losses in metrics.sources.items()
        if name != best
    ]


def distance_text(model: str, loss: float | None, reference: float | None) -> str:
    """How far a model's mean loss is from the specialists', nats per token."""
    if loss is None or reference is None:
        return f"{model}: not measured on every domain"
    if not math.isfinite(loss - reference):
        return f"{model} {loss_text(loss)}, specialists {loss_text(reference)}: no distance"
    side = "above" if loss >= reference else "below"
    return (
        f"{model} {loss_text(loss)}, which is {abs(loss - reference):.3f} {side} "
        f"the specialists' {loss_text(reference)}"
    )


def _row(
    losses: Mapping[str, float], in_domain: Sequence[str], out_of_domain: Sequence[str]
) -> list[float | None]:
    """Losses on every domain, then the mean in domain and (where there is one) out of domain."""
    inside, outside = (
        [losses.get(domain) for domain in domains] for domains in (in_domain, out_of_domain)
    )
    means = [mean_of_all(inside)] + ([mean_of_all(outside)] if out_of_domain else [])
    return [*inside, *outside, *means]
