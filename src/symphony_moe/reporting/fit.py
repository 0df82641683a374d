"""How the new model was fitted to its sources: errors, regressions, balance, what was written."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.numbers import (
    MISSING,
    Number,
    count,
    error_text,
    loss_text,
    lowest_text,
    mean_of_all,
    perplexity_text,
)
from symphony_moe.reporting.tables import Cell, Shade, ceiling_share, in_order, shade
from symphony_moe.runs.metrics import (
    PLAIN_MEAN,
    TEMPERATURE_SCALING,
    FitMetrics,
    FitStep,
    LayerFitMetrics,
)


@dataclass(frozen=True)
class Balance:
    """How a layer's router spreads text of all sources' domains over the experts, in per cent."""

    experts: list[str]
    rows: list[tuple[str, list[Shade], str]]
    """(layer or "mean", shares, tokens whose first choice is their text's source)"""


@dataclass(frozen=True)
class Conditions:
    """How well the text determines what was solved for."""

    rows: list[tuple[str, str, str, str]]
    """(layer or "head", largest condition number, of which regression, ridges that were raised)"""
    num_raised: int
    """Ridges that were raised."""
    num_ridges: int
    """Ridges that were noted: an older build's metrics have none."""


@dataclass(frozen=True)
class FitTable:
    """How far the new model is from the sources, step by step."""

    verdict: list[str]
    """What the whole model loses, and which was written."""
    documents: bool
    """Whether the validation text is of documents of its own."""
    losses: tuple[list[str], list[tuple[str, bool, list[Cell]]]]
    """(sources, rows: model, whether it was written, its loss on the text of each)"""
    groups: list[tuple[str, list[str]]]
    """(where the error is measured, columns)"""
    rows: list[tuple[str, list[Cell]]]
    """(layer or "mean", cells of all columns)"""
    conditions: Conditions | None
    balance: Balance | None
    head: list[tuple[str, Cell]]
    """(step, divergence after it), from the head as fused."""
    scaling: str
    """What temperature scaling made of the head, in words."""
    dropped: list[str]
    """Steps that were not kept, in words."""


def fit_tables(fit: FitMetrics | None, recipe: Recipe) -> FitTable | None:
    """What was measured of every layer and of the head, step by step; what is not there (the whole
    of it where only a router was fitted, some in an older build's metrics) is left out. None where
    nothing was fitted."""
    if fit is None:
        return None
    names = ["attention", "experts"]
    if any(layer.refinement for layer in fit.layers):
        names.append("refinement")
    table = [[_Step.of(layer.steps.get(name)) for name in names] for layer in fit.layers]
    head = {
        name: _Step.of(step, drops=name != TEMPERATURE_SCALING) for name, step in fit.head.items()
    }
    dropped = [
        f"{name} in {number} of {len(table)} layers"
        for index, name in enumerate(names)
        if (number := sum(row[index].cell.dropped for row in table))
    ]
    dropped += [
        f"{name.replace('_', ' ')} of the head" for name, step in head.items() if step.cell.dropped
    ]
    return FitTable(
        verdict=fit_verdict(fit),
        # Builds that did not note the loss per source validated on windows of the fitted documents.
        documents=bool(fit.loss_by_source) or not recipe.fits_layers,
        losses=validation_losses(fit, recipe.sources),
        groups=[
            ("after attention", ["before", "attention"]),
            ("after the layer", ["before", *names[1:]]),
        ],
        rows=_error_rows(table) if any(layer.steps for layer in fit.layers) else [],
        conditions=fit_conditions(fit, recipe.fit.ridge),
        balance=fit_balance(fit.layers, recipe),
        head=[
            *(("before", Cell(error_text(step.before))) for step in list(head.values())[:1]),
            *((name.replace("_", " "), step.cell) for name, step in head.items()),
        ],
        scaling=scaling_text(fit.head.get(TEMPERATURE_SCALING), recipe.fit.temperature_scaling),
        dropped=dropped,
    )


@dataclass(frozen=True)
class _Step:
    """One step of the fit: the error before it, after it (as shown), and what it left: the latter
    is the former where the step was not kept (`drops`)."""

    before: float | None
    cell: Cell
    left: float | None

    @classmethod
    def of(cls, step: FitStep | None, *, drops: bool = True) -> "_Step":
        if step is None or step.error is None:
            return cls(None, Cell(MISSING), None)
        before, after = step.error
        if drops and step.kept is False:
            return cls(before, Cell(error_text(after), "not kept", dropped=True), before)
        return cls(before, Cell(error_text(after)), after)


def _error_rows(table: Sequence[Sequence[_Step]]) -> list[tuple[str, list[Cell]]]:
    """Layers by steps, and the mean over layers."""
    rows = [
        (str(number), _error_row([step.before for step in row], [step.cell for step in row]))
        for number, row in enumerate(table)
    ]
    columns = list(zip(*table, strict=True))
    before = [mean_of_all([step.before for step in column]) for column in columns]
    after = [Cell(error_text(mean_of_all([step.left for step in c]))) for c in columns]
    return [*rows, ("mean", _error_row(before, after))]


def _error_row(before: Sequence[float | None], after: Sequence[Cell]) -> list[Cell]:
    """Cells of attention, before and after; then of the layer before its experts are fitted and
    after each further step."""
    return [Cell(error_text(before[0])), after[0], Cell(error_text(before[1])), *after[1:]]


def validation_losses(
    fit: FitMetrics, sources: Iterable[str]
) -> tuple[list[str], list[tuple[str, bool, list[Cell]]]]:
    """(sources, rows: model, whether it was written, its loss on the validation text of each)"""
    names = in_order(sources, *fit.loss_by_source.values())
    columns = [[loss.get(name) for loss in fit.loss_by_source.values()] for name in names]
    best = [lowest_text(column) for column in columns]
    rows = [
        (
            model,
            model == fit.chosen,
            [
                Cell(loss_text(loss), perplexity_text(loss), best=loss_text(loss) == lowest)
                for loss, lowest in zip(row, best, strict=True)
            ],
        )
        for model, row in zip(fit.loss_by_source, zip(*columns, strict=True), strict=False)
    ]
    return names, rows


def fit_conditions(fit: FitMetrics, ridge: Number) -> Conditions | None:
    """The worst-conditioned regression of each layer and of the head, and the ridges that are not
    `ridge`, the recipe's. None where no condition was noted."""
    rows, ridges, num_raised = [], 0, 0
    places = [*((str(n), layer.steps) for n, layer in enumerate(fit.layers)), ("head", fit.head)]
    for place, steps in places:
        regressions = _regressions(steps)
        if not regressions:
            continue
        condition, worst = max((condition, what) for what, condition, _ in regressions)
        raised = [
            f"{what}: {used:g}"
            if math.isfinite(used)
            else f"{what}: none was enough, left as it was"
            for what, _, used in regressions
            if used not in (None, ridge)
        ]
        ridges += sum(used is not None for _, _, used in regressions)
        num_raised += len(raised)
        rows.append((place, condition_text(condition), worst, ", ".join(raised)))
    return Conditions(rows, num_raised, ridges) if rows else None


def _regressions(steps: Mapping[str, FitStep]) -> list[tuple[str, float, float | None]]:
    """(what was solved for, its condition number, the ridge in the end) of all steps in one
    place."""
    found = []
    for step in steps.values():
        ridges = step.ridge or {}
        found += [
            (what, _or_infinite(value), _or_infinite(ridges[what]) if what in ridges else None)
            for what, value in step.condition.items()
        ]
    return found


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def condition_text(condition: Number) -> str:
    """A condition number to its leading digits."""
    if not math.isfinite(condition):
        return "infinite"
    return count(condition) if condition < 1e6 else f"{condition:.1e}"


def fit_balance(layers: Sequence[LayerFitMetrics], recipe: Recipe) -> Balance | None:
    """Every layer's balance between the experts, and the mean over layers. None where none was
    measured."""
    notes = {
        str(number): layer.routing
        for number, layer in enumerate(layers)
        if layer.routing and layer.routing.share
    }
    experts = in_order(recipe.sources, *(note.share for note in notes.values()))
    if not experts:
        return None
    rows = {
        layer: [
            *(note.share.get(name, math.nan) for name in experts),
            note.first_choice_is_source,
        ]
        for layer, note in notes.items()
    }
    rows["mean"] = [sum(column) / len(rows) for column in zip(*rows.values(), strict=True)]
    uniform = 1 / len(experts)
    ceiling = ceiling_share(len(experts), recipe.router.top_k)
    return Balance(
        experts,
        [
            (
                layer,
                [shade(share, uniform, ceiling) for share in shares],
                shade(first, uniform, ceiling).text,
            )
            for layer, (*shares, first) in rows.items()
        ],
    )


def scaling_text(step: FitStep | None, allowed: float) -> str:
    """What dividing the head's logits by a temperature does, for those who have never done it.
    `allowed`: the recipe's `fit.temperature_scaling`."""
    if step is None or step.temperature is None or not math.isfinite(step.temperature):
        return ""
    if not step.kept:
        return "No temperature scaling: the head's logits are as they were (temperature 1)."
    temperature = step.temperature
    return (
        f"Temperature scaling: the head's logits are divided by {temperature:.2f}. This is what "
        f"sampling at temperature {temperature:.2f} does. A token that was 100 times as likely as "
        f"another is now {100 ** (1 / temperature):.0f} times as likely. On text that it was not "
        "fitted to, a fitted model is surer of itself than it has reason to be. The divergence may "
        f"rise by {100 * allowed:g} per cent for this (fit.temperature_scaling)."
    )


def fit_verdict(fit: FitMetrics) -> list[str]:
    """Sentences: what the whole model loses beside the plain mean, and which was written."""
    verdict = []
    if fit.loss:
        each = ", ".join(f"{name} {loss_text(loss)}" for name, loss in fit.loss.items())
        verdict.append(
            f"The whole model on the validation text, in nats per token: {each}. The plain mean is "
            "the same sources averaged as they are, with nothing fitted but a router."
        )
    if fit.chosen == PLAIN_MEAN:
        verdict.append(
            "The plain mean was written. The errors, the regressions, the balance between experts "
            "and the head below are those of the fitted model, which is not in the checkpoint."
        )
    elif fit.chosen is not None:
        verdict.append(f"The {fit.chosen} model was written.")
    return verdict
