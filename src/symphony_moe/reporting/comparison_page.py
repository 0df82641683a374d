"""`comparison.json` to one self-contained HTML page.

A pure function of what the runs measured, as `run_page.py` is of one run: nothing is measured or
fetched here, and the page loads nothing. `comparison.html.j2` has the markup.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.charts import drawing
from symphony_moe.reporting.comparison_chart import line_chart, method_strips
from symphony_moe.reporting.comparison_losses import domain_table, main_table, task_table_of_methods
from symphony_moe.reporting.numbers import Number, count
from symphony_moe.reporting.over_seeds import (
    IN_DOMAIN,
    PLACES,
    Entries,
    incomplete_text,
    is_measured,
    methods_of,
    seeds_of,
    seeds_text,
)
from symphony_moe.reporting.page import fill


def comparison_facts(recipes: Sequence[Recipe]) -> list[tuple[str, str]]:
    """What all runs of a comparison have in common, as (what, value)."""
    first, *others = [_facts(recipe) for recipe in recipes]
    return [fact for fact in first if all(fact in other for other in others)]


def _facts(recipe: Recipe) -> list[tuple[str, str]]:
    return [
        ("Sources", ", ".join(recipe.sources)),
        ("Anchor", recipe.anchor),
        ("Calibration", f"{count(recipe.calibration.tokens)} tokens"),
        ("Training", f"{count(recipe.train.tokens)} tokens"),
        ("Trained", recipe.train.scope),
        ("Held-out text", f"{count(recipe.evaluation.tokens)} tokens a domain"),
        ("Dtype", recipe.output.dtype),
    ]


def render_comparison(  # noqa: PLR0913 (a page of several parts, each given once)
    title: str,
    entries: Entries,
    limits: Mapping[str, Number | None],
    reference: str,
    facts: Sequence[tuple[str, str]],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    in_domain: Sequence[str] = (),
) -> str:
    """The comparison as HTML.

    `entries` are the rows of `comparison.json` (docs/training.md), `limits` the specialists' mean
    losses ("in domain": each on its own domain, "out of domain": the best of them), `reference` the
    method whose final loss the others are timed to, `facts` what the header says as (what, value),
    `settings` what sets each method apart from the recipe. `in_domain` names the sources' domains,
    so that the table by domain can tell them from the others.

    Losses are nats per token. One that is null, NaN or infinite (a model that diverged) is left out
    of means and lines, which the page says, and its method is not ranked.
    """
    from symphony_moe.recipe.yaml_text import write_yaml

    methods = methods_of(entries)
    known = [where for where in PLACES if where == IN_DOMAIN or is_measured(entries, where)]
    charts = {where: line_chart(entries, where, limits.get(where)) for where in known}
    drawn = {where: chart and drawing(chart) for where, chart in charts.items()}
    return fill(
        "comparison.html.j2",
        title=title,
        facts=facts,
        reference=reference,
        seeds=seeds_text(entries),
        one_seed=any(len(seeds_of(entries, method)) == 1 for method in methods),
        incomplete=incomplete_text(entries, known),
        table=main_table(entries, limits, reference, known),
        strips_of={where: method_strips(entries, where, limits.get(where)) for where in known},
        domains=domain_table(entries, in_domain),
        tasks=task_table_of_methods(entries),
        charts=drawn,
        lacking=[where for where in PLACES if where not in known],
        settings=[
            (method, write_yaml(dict(apart)) if apart else "") for method, apart in settings.items()
        ],
    )
