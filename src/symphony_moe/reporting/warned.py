"""What somebody who uses a model should know first: warnings, and steps that were not used."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.alignment import KINDS
from symphony_moe.reporting.fit import FitTable
from symphony_moe.runs.metrics import PLAIN_MEAN, Metrics


def warnings_of(
    plan: Mapping[str, Any], recipe: Recipe, metrics: Metrics, fit: FitTable | None
) -> list[tuple[str, str]]:
    """(of what, sentence), the gravest first. What the commands have logged is not among them."""
    return [
        *_of_losses(metrics),
        *_of_choice(metrics),
        *_of_maps(metrics, recipe),
        *_of_fit(fit, metrics),
        *(
            ("Sources", f"{one['what']}: {one['consequence']}.")
            for one in plan["differences"]
            if one["verdict"] == "warning"
        ),
    ]


def _of_losses(metrics: Metrics) -> list[tuple[str, str]]:
    diverged = [
        stage
        for stage, losses in metrics.models.items()
        if not all(math.isfinite(loss) for loss in losses.values())
    ]
    return [
        ("Losses", f"The {stage} model has a loss that is NaN or infinite: it diverged.")
        for stage in diverged
    ]


def _of_choice(metrics: Metrics) -> list[tuple[str, str]]:
    if metrics.fit is None or metrics.fit.chosen != PLAIN_MEAN:
        return []
    return [("Fit", "The fitted model was refused: on validation text the plain mean is better.")]


def _of_maps(metrics: Metrics, recipe: Recipe) -> list[tuple[str, str]]:
    """Maps that were found and refused, where the plain mean is not the reason."""
    if metrics.fit is not None and metrics.fit.chosen == PLAIN_MEAN:
        return []
    found = []
    for kind, (what, _) in KINDS.items():
        by_source = metrics.alignment.get(kind) or {}
        refused = [name for name, agreement in by_source.items() if not agreement.used]
        if refused:
            found.append(("Alignment", f"{what}: refused for {_listed(refused, recipe)}."))
    return found


def _listed(names: Sequence[str], recipe: Recipe) -> str:
    order = list(recipe.sources)
    known = [name for name in order if name in names]
    return ", ".join([*known, *(name for name in names if name not in order)])


def _of_fit(fit: FitTable | None, metrics: Metrics) -> list[tuple[str, str]]:
    if fit is None:
        return []
    found = [("Fit", f"Step refused, it did not lower its error: {one}.") for one in fit.dropped]
    if fit.conditions and fit.conditions.num_raised:
        raised, of = fit.conditions.num_raised, fit.conditions.num_ridges
        found.append(
            ("Fit", f"The ridge was raised in {raised} of {of} regressions (see Regressions).")
        )
    return found
