"""The metrics, the plan and the recipe of a run to one self-contained HTML page.

A pure function of what the other stages measured: nothing is measured or fetched here, and the page
loads nothing. Python makes the numbers and their words (a module for each section, `losses.py` and
so on), `report.html.j2` the markup, `page.css` the style.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.alignment import KINDS, alignment_strips, alignment_tables
from symphony_moe.reporting.charts import Chart, Drawing, drawing
from symphony_moe.reporting.fit import FitTable, fit_tables
from symphony_moe.reporting.lineage import lineage
from symphony_moe.reporting.losses import loss_strips, loss_table
from symphony_moe.reporting.numbers import in_words, size
from symphony_moe.reporting.page import fill, script, title
from symphony_moe.reporting.repeating import how_to_repeat
from symphony_moe.reporting.routing import (
    dynamic_curve,
    likeness_tables,
    routing_grids,
    routing_table,
)
from symphony_moe.reporting.samples import coloured_text
from symphony_moe.reporting.stages import stage_table
from symphony_moe.reporting.tables import ceiling_share
from symphony_moe.reporting.tasks import task_table
from symphony_moe.reporting.training import (
    held_out_chart,
    loss_chart,
    share_chart,
    training_facts,
)
from symphony_moe.reporting.warned import warnings_of
from symphony_moe.runs.metrics import PLAIN_MEAN, STAGES, Metrics
from symphony_moe.runs.samples import Samples


@dataclass(frozen=True)
class Beside:
    """What a run folder has beside metrics, plan and recipe. Any of it may be absent."""

    samples: Samples | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    logged: Sequence[str] = ()
    """What the commands have warned of."""


NOTHING = Beside()
"""A run folder that has nothing else."""


def render(
    metrics: Metrics, plan: Mapping[str, Any], recipe: Recipe, beside: Beside = NOTHING
) -> str:
    """The report as HTML. Any part of `metrics` may be absent: its section then makes way for a
    sentence that names the command that measures it.

    `plan` is `Plan.to_json()`. Losses are nats per token; NaN and infinite ones (a model that
    diverged) are shown as such, but for sources: theirs is NaN where the text has none of their
    tokens.
    """
    curve = metrics.training.curve if metrics.training else []
    measured = {stage: metrics.routing[stage] for stage in STAGES if stage in metrics.routing}
    curves = {
        stage: dynamic_curve(metrics.dynamic[stage], recipe)
        for stage in STAGES
        if stage in metrics.dynamic
    }
    fit, likeness = fit_tables(metrics.fit, recipe), likeness_tables(metrics.cka)
    warnings = _warnings(metrics, plan, recipe, fit, beside)
    training = metrics.training
    return fill(
        "report.html.j2",
        recipe=recipe,
        plan=plan,
        title=title(recipe.sources),
        ceiling=ceiling_share(len(recipe.expert_names), recipe.router.top_k),
        facts=header_facts(plan, recipe),
        lineage=lineage(plan, recipe, metrics),
        warnings=warnings,
        missing=missing_sections(metrics, recipe, beside),
        losses=loss_table(metrics, recipe),
        loss_strips=loss_strips(metrics, recipe),
        tasks=task_table(metrics.tasks, list(recipe.sources)),
        training=training_facts(training),
        held_out_in_training=_drawn(
            held_out_chart(training.held_out, recipe) if training else None
        ),
        losses_in_training=_drawn(loss_chart(curve)),
        shares_in_training=_drawn(share_chart(curve, recipe)),
        routing=[
            (stage, routing.experts, routing_grids(routing, recipe.router.top_k))
            for stage, routing in measured.items()
        ],
        measures={stage: routing_table(routing) for stage, routing in measured.items()},
        dynamic=[(stage, curve, _drawn(curve.chart)) for stage, curve in curves.items()],
        likeness=likeness,
        likeness_chart=_drawn(likeness.chart) if likeness else None,
        samples=coloured_text(beside.samples),
        script=script(),
        alignment=alignment_tables(metrics.alignment, recipe),
        alignment_strips=alignment_strips(metrics.alignment, recipe),
        fit=fit,
        plain_written=metrics.fit is not None and metrics.fit.chosen == PLAIN_MEAN,
        differences=by_value(plan["differences"]),
        notes=[note for note in other_notes(plan) if ("Log", note) not in warnings],
        timing=stage_table(metrics, plan),
        repeating=how_to_repeat(recipe, metrics, beside.manifest),
        recipe_yaml=recipe.to_yaml(),
    )


def _drawn(chart: Chart | None) -> Drawing | None:
    return None if chart is None else drawing(chart)


def _warnings(
    metrics: Metrics,
    plan: Mapping[str, Any],
    recipe: Recipe,
    fit: FitTable | None,
    beside: Beside,
) -> list[tuple[str, str]]:
    """What was measured first, then what the commands have said."""
    found = warnings_of(plan, recipe, metrics, fit)
    return [*found, *(("Log", line) for line in beside.logged)]


def by_value(differences: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Differences with the sources that have the same value together."""
    found = []
    for difference in differences:
        values: dict[str, list[str]] = {}
        for name, value in difference["values"].items():
            values.setdefault(str(value), []).append(name)
        found.append({**difference, "values": [(", ".join(n), v) for v, n in values.items()]})
    return found


def header_facts(plan: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, str]]:
    """What was built, as (what, value)."""
    each, dense = recipe.experts.per_source, ", ".join(map(str, recipe.experts.dense_layers))
    experts = f"{len(recipe.expert_names) * each}, {recipe.router.top_k * each} per token"
    if recipe.has_shared_expert:
        experts += ", and a shared one"
    if dense:
        experts += f", none in layer(s) {dense}"
    return [
        ("Architecture", plan["architecture"]),
        ("Experts", experts),
        ("Parameters", in_words(plan["total_parameters"])),
        ("Active per token", in_words(plan["active_parameters"])),
        ("Dtype", plan["dtype"]),
        ("Weights", size(plan["disk_bytes"])),
        ("Method", recipe.method),
        ("Anchor", recipe.anchor),
    ]


def missing_sections(
    metrics: Metrics, recipe: Recipe, beside: Beside = NOTHING
) -> list[tuple[str, str]]:
    """(what the report lacks, the command that makes up for it). What the recipe does not ask for
    is not missing."""
    evaluate, build = "symphony evaluate DIR", "symphony build RECIPE --out DIR"
    missing = [(what, evaluate) for what in _not_evaluated(metrics, recipe)]
    missing += [] if beside.samples else [("No text by expert", evaluate)]
    missing += [(what, build) for what in _not_built(metrics, recipe)]
    return [("No training", "symphony train DIR"), *missing] if not metrics.training else missing


def _not_evaluated(metrics: Metrics, recipe: Recipe) -> list[str]:
    """What `symphony evaluate` would measure."""
    missing = []
    expected = {"sources": metrics.sources, "built": metrics.built}
    if metrics.training is not None:
        expected["trained"] = metrics.trained
    lacking = [name for name, losses in expected.items() if not losses]
    if lacking:
        missing.append(f"No losses of: {', '.join(lacking)}")
    if not metrics.routing:
        missing.append("No routing")
    if not metrics.cka:
        missing.append("No likeness of the experts (CKA)")
    if recipe.evaluation.thresholds and not metrics.dynamic:
        missing.append("No dynamic routing")
    return missing


def _not_built(metrics: Metrics, recipe: Recipe) -> list[str]:
    """What a build notes and this one has not."""
    missing = []
    asked = {
        "residual": recipe.aligns_residual,
        "heads": recipe.aligns_heads,
        "neurons": recipe.aligns_neurons,
    }
    unaligned = [KINDS[kind][0] for kind in asked if asked[kind] and kind not in metrics.alignment]
    if unaligned:
        missing.append(f"No alignment of: {', '.join(unaligned)}")
    if metrics.fit is None:
        if recipe.fits_layers:
            missing.append("No errors of the fit")
        elif recipe.fits_router:
            missing.append("No balance of the fitted router")
    if metrics.timing is None:
        missing.append("No time and memory")
    return missing


def other_notes(plan: Mapping[str, Any]) -> list[str]:
    """Notes of the plan that are not a difference in words: those have a table of their own."""
    return [
        note
        for note in plan["notes"]
        if not any(
            note.startswith(f"{difference['what']} (") and note.endswith(difference["consequence"])
            for difference in plan["differences"]
        )
    ]
