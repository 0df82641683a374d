"""`metrics.json`, the plan and the recipe to one self-contained HTML page.

A pure function of what the other stages measured: nothing is measured or fetched here, and the page
loads nothing. Python makes the numbers and their words, `report.html.j2` the markup, `page.css` the
style.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import Any, Generic, TypeVar

from symphony_moe.reporting.charts import Chart, Drawing, Line, Point, drawing, worth_drawing
from symphony_moe.reporting.numbers import (
    MISSING,
    Number,
    count,
    duration,
    error_text,
    in_words,
    loss_text,
    mean,
    mean_of_all,
    perplexity_text,
    size,
)

_MODELS = ("built", "trained")


_KINDS = {
    "residual": (
        "Residual stream",
        "Mean cosine of a source's residual stream with the anchor's on the same tokens: in its "
        "own coordinates (before), and under the one rotation, the same for all layers, that "
        "brings it closest (after). The shared backbone mixes these coordinates.",
    ),
    "heads": (
        "Attention heads",
        "Correlation of a source's head outputs with the anchor's on the same tokens: heads paired "
        "by position (before), and matched, each with its best value rotation (after). The shared "
        "backbone mixes these too.",
    ),
    "neurons": (
        "FFN neurons",
        "Mean correlation of a source's FFN neurons with the anchor's on the same tokens: paired "
        "by position (before), and by the best matching (after). The permutation by itself does "
        "not change an MoE with separate experts; this is a measurement, not a gain.",
    ),
}
"""Kind of alignment -> what is compared, how to read the numbers."""


_ALIKE = ("sources", *_MODELS)
"""Whose experts are compared: the originals, before they share a model; and the models."""


TASK_SETTINGS = ("fewshot", "samples", "documents", "chat_template", "lm_eval")
"""What stands beside the metrics of `tasks.MODEL.TASK` in `metrics.json`: examples in the prompt
(null where a group's tasks differ), documents that were evaluated and that there are, whether the
prompts went through the chat template, version of the harness."""


_PLAIN = "plain mean"
"""What a build writes where its fit does not pay."""


_SHARE = "share/"
"""Before an expert's name, in the points of the training's curve."""


_SOFTENED = "temperature_scaling"
"""The last step of the head. It is the one that may raise the error, so it is never struck out."""


Score = tuple[Number | None, Number | None]
"""A metric's value and its standard error, None where it is not a number or not known."""


Model = TypeVar("Model")


Value = TypeVar("Value")


@dataclass(frozen=True)
class Cell:
    """One number of a table, as it is shown."""

    text: str
    title: str = ""
    best: bool = False
    """The lowest of its column."""
    own: bool = False
    """A source on the domain that it knows."""
    dropped: bool = False
    """After a step of the fit that was not kept."""


@dataclass(frozen=True)
class LossTable:
    """Held-out losses in nats per token."""

    in_domain: list[str]
    out_of_domain: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    """(label, kind: source, reference or model; cells of in_domain, out_of_domain and the means)"""
    distances: list[str]
    """How far the models are from the mean of the specialists, in words."""
    diverged: bool
    """Whether a loss is not finite."""


@dataclass(frozen=True)
class RoutingGrid:
    """Shares of the routed tokens of one domain, in per cent."""

    domain: str
    tokens: int
    rows: list[tuple[str, list[tuple[str, str, int]]]]
    """(layer or "mean", cells: as of `shade`)"""


@dataclass(frozen=True)
class RoutingTable:
    """How sure a model's routers are, in nats, and how even the load is."""

    domains: list[str]
    rows: list[tuple[str, list[str], list[str]]]
    """(layer or "mean"; entropy of each domain; of the mixed text: entropy of the mean, balance,
    largest share in per cent)"""
    uniform: str
    """Entropy of a router that knows nothing."""


@dataclass(frozen=True)
class Likeness:
    """CKA of the outputs of every two experts."""

    layers: list[tuple[str, list[str]]]
    """(layer or "mean", for every model the mean over pairs)"""
    models: list[tuple[str, list[str], list[list[tuple[str, str, int]]]]]
    """(model, experts, mean over layers of every pair: as of `likeness_shade`)"""
    tokens: int


@dataclass(frozen=True)
class Dynamic:
    """Loss against experts per token: the same number for all, and by threshold."""

    rows: list[tuple[str, list[str]]]
    """(fixed number or threshold; experts per token, its range over layers, loss in domain, how
    far that is from the same number for all, loss out of domain)"""
    chart: Chart | None
    out_of_domain: bool


@dataclass(frozen=True)
class AlignmentTable:
    """How alike the sources are to the anchor in one respect."""

    title: str
    explanation: str
    sources: list[tuple[str, bool]]
    """(name, whether its maps are used)"""
    rows: list[tuple[str, list[tuple[str, str]]]]
    """(layer or "mean", before and after for every source)"""

    @property
    def unused(self) -> list[str]:
        return [name for name, used in self.sources if not used]


@dataclass(frozen=True)
class Balance:
    """How a layer's router spreads text of all sources' domains over the experts, in per cent."""

    experts: list[str]
    rows: list[tuple[str, list[tuple[str, str, int]], str]]
    """(layer or "mean", cells: as of `shade`, tokens whose first choice is their text's source)"""


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
    """Whether the text kept aside is of documents of its own."""
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
    softened: str
    """What the last step made of the head, in words."""
    dropped: list[str]
    """Steps that were not kept, in words."""


@dataclass(frozen=True)
class TaskRow(Generic[Value]):
    """One metric of a task, measured in one way."""

    task: str
    metric: str
    examples: str
    """Examples in the prompt, and whether it went through the chat template."""
    documents: str
    """How many were evaluated, and of how many."""
    values: list[Value]
    """Of each column."""


@dataclass(frozen=True)
class TaskTable:
    """Benchmarks of lm-evaluation-harness."""

    models: list[str]
    rows: list[TaskRow[str]]
    """Values with the standard error."""
    versions: list[str]
    """Of the harness."""


def render(metrics: Mapping[str, Any], plan: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The report as HTML. Any top-level key of `metrics` may be absent: its section then makes way
    for a sentence that names the command that measures it.

    `plan` is `Plan.to_json()`, `recipe` is `Recipe.model_dump(mode="json")`. Losses are nats per
    token; NaN, infinite and null ones (a model that diverged) are shown as such, but for sources:
    theirs is null where the text has none of their tokens.
    """
    from symphony_moe.recipe.yaml_text import write_yaml

    training = metrics.get("training") or {}
    routing = metrics.get("routing") or {}
    top_k = recipe["router"]["top_k"]
    return fill(
        "report.html.j2",
        recipe=recipe,
        plan=plan,
        title=title(recipe["sources"]),
        ceiling=ceiling_share(num_experts(recipe), top_k),
        facts=header_facts(plan, recipe),
        parameters=in_words,
        missing=missing_sections(metrics, recipe),
        losses=loss_table(metrics, recipe),
        tasks=task_table(metrics.get("tasks") or {}, list(recipe["sources"])),
        training=training_facts(training),
        losses_in_training=_drawn(loss_chart(training.get("curve") or [])),
        shares_in_training=_drawn(share_chart(training.get("curve") or [], recipe)),
        routing=[
            (model, routing[model]["experts"], routing_grids(routing[model], top_k))
            for model in _MODELS
            if routing.get(model)
        ],
        measures={
            model: routing_table(routing[model], recipe) for model in _MODELS if routing.get(model)
        },
        dynamic=[
            (model, curve, _drawn(curve.chart))
            for model in _MODELS
            if (found := (metrics.get("dynamic") or {}).get(model))
            for curve in [dynamic_curve(found, recipe)]
        ],
        likeness=likeness_tables(metrics.get("cka") or {}),
        alignment=alignment_tables(metrics.get("alignment") or {}, recipe),
        fit=fit_tables(metrics.get("fit") or {}, recipe),
        judged_apart=recipe["fit"]["method"] != "none" or recipe["router"]["init"] != "random",
        plain_written=(metrics.get("fit") or {}).get("chosen") == _PLAIN,
        differences=plan["differences"],
        notes=other_notes(plan),
        timing=timing_rows(metrics.get("timing") or {}, plan),
        recipe_yaml=write_yaml(dict(recipe)),
    )


def _drawn(chart: Chart | None) -> Drawing | None:
    return None if chart is None else drawing(chart)


def fill(template: str, **values: Any) -> str:
    """A page out of one of this package's templates, in the style that all pages share."""
    import jinja2

    def read(name: str) -> str:
        return resources.files("symphony_moe.reporting").joinpath(name).read_text("utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = textwrap.indent(read("page.css"), "  ")
    return environment.get_template(template).render(style=style, **values)


def title(sources: Iterable[str]) -> str:
    names = list(sources)
    if len(names) > 6:
        return f"One model out of {len(names)} sources"
    return f"One model out of {', '.join(names[:-1])} and {names[-1]}"


def num_experts(recipe: Mapping[str, Any]) -> int:
    return len(recipe["experts"].get("sources") or recipe["sources"])


def header_facts(plan: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was built, as (what, value)."""
    return [
        ("Architecture", plan["architecture"]),
        ("Experts", f"{num_experts(recipe)}, {recipe['router']['top_k']} per token"),
        ("Parameters", in_words(plan["total_parameters"])),
        ("Active per token", in_words(plan["active_parameters"])),
        ("Dtype", plan["dtype"]),
        ("Weights", size(plan["disk_bytes"])),
        ("Method", recipe["method"]),
        ("Anchor", recipe["anchor"]),
    ]


def missing_sections(
    metrics: Mapping[str, Any], recipe: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(what the report lacks, the command that makes up for it). What the recipe does not ask for
    is not missing."""
    missing: list[tuple[str, str]] = []
    evaluate, build = "symphony evaluate DIR", "symphony build RECIPE --out DIR"
    if not metrics.get("training"):
        missing.append(("No training", "symphony train DIR"))
    expected = ["sources", "built", *(["trained"] if metrics.get("training") else [])]
    lacking = [name for name in expected if not metrics.get(name)]
    if lacking:
        missing.append((f"No losses of: {', '.join(lacking)}", evaluate))
    if not metrics.get("routing"):
        missing.append(("No routing", evaluate))
    if not metrics.get("cka"):
        missing.append(("No likeness of the experts (CKA)", evaluate))
    if recipe["evaluation"].get("thresholds") and not metrics.get("dynamic"):
        missing.append(("No dynamic routing", evaluate))
    align = recipe["align"]
    asked = {
        "residual": align["residual"] != "none",
        "heads": align["heads"] != "none",
        # "auto" matches none; copies of one expert have nothing to match.
        "neurons": align["neurons"] == "activations" and recipe["experts"]["init"] != "copy",
    }
    measured = metrics.get("alignment") or {}
    unaligned = [_KINDS[kind][0] for kind in asked if asked[kind] and not measured.get(kind)]
    if unaligned:
        missing.append((f"No alignment of: {', '.join(unaligned)}", build))
    if not metrics.get("fit"):
        if recipe["fit"]["method"] != "none":
            missing.append(("No errors of the fit", build))
        elif recipe["router"]["init"] != "random":
            missing.append(("No balance of the fitted router", build))
    if not metrics.get("timing"):
        missing.append(("No time and memory", build))
    return missing


# Losses


def loss_table(metrics: Mapping[str, Any], recipe: Mapping[str, Any]) -> LossTable | None:
    """Every source and model on every domain, with the means. None where there are no losses."""
    sources = {
        name: {domain: loss for domain, loss in losses.items() if loss is not None}
        for name, losses in (metrics.get("sources") or {}).items()
    }
    models = {name: metrics[name] for name in _MODELS if metrics.get(name)}
    if not sources and not models:
        return None
    domains = _domains(metrics, recipe)
    in_domain = [domain for domain in domains if domain in recipe["sources"]]
    out_of_domain = [domain for domain in domains if domain not in recipe["sources"]]

    order = [name for name in recipe["sources"] if name in sources]
    named = [(name, "source", _row(sources[name], in_domain, out_of_domain)) for name in order]
    own = {name: sources[name][name] for name in order if name in sources[name]}
    specialists = _row(own, in_domain, out_of_domain)
    reference = [("own specialist", "reference", specialists)] if sources else []
    built = [(name, "model", _row(models[name], in_domain, out_of_domain)) for name in models]

    # The own specialists are several models, so they are a reference and never the best.
    lowest = [_lowest(column) for column in zip(*(row for _, _, row in named + built), strict=True)]
    column_domains = [*domains, None, None] if out_of_domain else [*domains, None]
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
    return LossTable(in_domain, out_of_domain, rows, distances, diverged)


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


def _domains(metrics: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Domains with a loss: the sources' in the recipe's order, then the others."""
    losses = [
        *(metrics.get("sources") or {}).values(),
        *(metrics[name] for name in _MODELS if metrics.get(name)),
    ]
    measured = {domain: None for row in losses for domain in row}
    known = [*recipe["sources"], *recipe["evaluation"]["extra"]]
    return [name for name in known if name in measured] + [
        name for name in measured if name not in known
    ]


def _row(
    losses: Mapping[str, Any], in_domain: Sequence[str], out_of_domain: Sequence[str]
) -> list[float | None]:
    """Losses on every domain, then the mean in domain and (where there is one) out of domain."""
    inside, outside = (
        [_number(losses[domain]) if domain in losses else None for domain in domains]
        for domains in (in_domain, out_of_domain)
    )
    means = [mean_of_all(inside)] + ([mean_of_all(outside)] if out_of_domain else [])
    return [*inside, *outside, *means]


def _number(value: Any) -> float:
    # Strict JSON has no NaN; its writers put null there.
    return math.nan if value is None else float(value)


def _lowest(losses: Sequence[float | None]) -> str | None:
    """The lowest finite loss as shown: what looks equal is marked alike."""
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return loss_text(min(finite)) if finite else None


# Benchmarks


def task_table(tasks: Mapping[str, Any], sources: Sequence[str]) -> TaskTable | None:
    """`tasks` of `metrics.json`: a row for each task, metric and way of measuring (what was
    measured in different ways is never in one row), a column for each model. None where there are
    none.

    `sources`: their order; the run's own models come last.
    """
    order = [*(name for name in sources if name not in _MODELS), *_MODELS]
    models = [name for name in order if tasks.get(name)]

    def texts(scores: Mapping[str, Score]) -> list[str]:
        return [score_text(*scores[name]) if name in scores else MISSING for name in models]

    measured = {name: tasks[name] for name in models}
    rows = task_rows(measured, texts)
    return TaskTable(models, rows, task_versions(measured)) if rows else None


def task_rows(
    tasks: Mapping[Model, Mapping[str, Mapping[str, Any]]],
    values: Callable[[Mapping[Model, Score]], list[Value]],
) -> list[TaskRow[Value]]:
    """A row for each task, metric and way of measuring. `values`: of the models that have any,
    the row's values."""
    found: dict[tuple[Any, ...], dict[Model, Score]] = {}
    for model, of_model in tasks.items():
        for task, results in of_model.items():
            way = tuple(results[setting] for setting in TASK_SETTINGS)
            for metric, value in results.items():
                if metric not in TASK_SETTINGS and not metric.endswith("_stderr"):
                    score = value, results.get(f"{metric}_stderr")
                    found.setdefault((task, metric, way), {})[model] = score
    rows = []
    for (task, metric, way), scores in found.items():
        shots, samples, documents, chat, _ = way
        examples = "mixed" if shots is None else count(shots)
        rows.append(
            TaskRow(
                task,
                metric,
                f"{examples}, chat template" if chat else examples,
                count(samples) + (f" of {count(documents)}" if samples < documents else ""),
                values(scores),
            )
        )
    return rows


def task_versions(tasks: Mapping[Model, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Of the harness that measured."""
    return sorted(
        {results["lm_eval"] for of_model in tasks.values() for results in of_model.values()}
    )


def score_text(value: Number | None, error: Number | None) -> str:
    """Three decimals, as the harness's own tables have it, with the standard error where known."""
    return loss_text(_number(value)) + (
        "" if error is None else f" \N{PLUS-MINUS SIGN} {error:.3f}"
    )


# Training


def training_facts(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the training was, as (what, value)."""
    words: dict[str, tuple[str, Callable[[Any], str]]] = {
        "scope": ("Scope", str),
        "tokens": ("Tokens", count),
        "steps": ("Steps", count),
        "seconds": ("Time", duration),
        "learning_rate": ("Learning rate at its peak", lambda rate: f"{rate:g}"),
        "temperature_scaling": ("Logits divided by", trained_softening),
    }
    return [
        (label, write(training[key]))
        for key, (label, write) in words.items()
        if training.get(key) is not None
    ]


def trained_softening(note: Mapping[str, Any]) -> str:
    """What the logits were divided by after the training, and what it cost on the text of it."""
    before, after = (loss_text(_number(loss)) for loss in note["loss"])
    return f"{_number(note['temperature']):.2f} (loss on its own text from {before} to {after})"


def loss_chart(curve: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Loss (nats per token) against tokens. None where no point can be drawn."""
    losses = _points(curve, "loss")
    return worth_drawing(
        Chart(
            title="Training loss against tokens",
            across="tokens",
            upward="loss, nats per token",
            lines=(Line(0, "loss", losses),),
            write=loss_text,
            summary=first_and_last("Loss", losses),
            notes=gaps_text([losses]),
        )
    )


def share_chart(curve: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> Chart | None:
    """Every expert's share of the routers' choices, in per cent, against tokens; an even load's.
    None where no point can be drawn: an older run's curve has no shares."""
    keys = [[key for key in point if key.startswith(_SHARE)] for point in curve]
    experts = _in_order(recipe["sources"], *([k.removeprefix(_SHARE) for k in row] for row in keys))
    if not experts:
        return None
    shares = {name: _points(curve, f"{_SHARE}{name}", 100) for name in experts}
    balance = _points([point for point in curve if "balance" in point], "balance")
    return worth_drawing(
        Chart(
            title="Every expert's share of the choices against tokens",
            across="tokens",
            upward="share of the choices, %",
            lines=tuple(Line(n, name, points) for n, (name, points) in enumerate(shares.items())),
            write=_per_cent_text,
            summary=first_and_last("Balance", balance),
            notes=gaps_text(shares.values()),
            level=("even", 100 / len(experts)),
            from_zero=True,
        )
    )


def _points(curve: Sequence[Mapping[str, Any]], key: str, factor: Number = 1) -> tuple[Point, ...]:
    """(tokens, value): NaN where a point has none."""
    return tuple(Point(float(point["tokens"]), factor * _number(point.get(key))) for point in curve)


def _per_cent_text(share: Number) -> str:
    return f"{share:.1f} %"


def first_and_last(what: str, points: Sequence[Point]) -> str:
    """What is finite at the first and at the last of the points, in words."""
    finite = [point for point in points if point.is_drawn]
    if not finite:
        return ""
    start, end = finite[0], finite[-1]
    return (
        f"{what} {loss_text(start.y)} at {count(start.x)} tokens, "
        f"{loss_text(end.y)} at {count(end.x)} tokens"
    )


def gaps_text(lines: Iterable[Sequence[Point]]) -> tuple[str, ...]:
    """How many points are not drawn, in a sentence; nothing where all are."""
    gaps = sum(not point.is_drawn for points in lines for point in points)
    return (f"{gaps} point(s) are NaN or infinite and not drawn.",) if gaps else ()


# Routing


def routing_grids(routing: Mapping[str, Any], top_k: int) -> list[RoutingGrid]:
    """One grid per domain: layers by experts, and the mean over layers."""
    num_experts = len(routing["experts"])
    uniform, ceiling = 1 / num_experts, ceiling_share(num_experts, top_k)
    grids = []
    for domain, layers in routing["share"].items():
        rows = [[_number(share) for share in layer] for layer in layers]
        named = [(str(layer), row) for layer, row in enumerate(rows)]
        if rows:
            named.append(("mean", [sum(column) / len(rows) for column in zip(*rows, strict=True)]))
        grids.append(
            RoutingGrid(
                domain,
                routing["tokens"].get(domain, 0),
                [
                    (label, [shade(share, uniform, ceiling) for share in row])
                    for label, row in named
                ],
            )
        )
    return grids


def ceiling_share(num_experts: int, top_k: int) -> float:
    """The share at which the colour is full: twice the uniform one, or the largest that there can
    be (an expert that is among the `top_k` of every token)."""
    return min(2 / num_experts, 1 / top_k)


def shade(share: float, uniform: float, ceiling: float) -> tuple[str, str, int]:
    """(per cent as text, side of the uniform share, strength of the colour from 0 to 100). It is
    full at no tokens and at the ceiling."""
    if not math.isfinite(share):
        return "NaN", "", 0
    if share < uniform:
        side, strength = "less", (uniform - share) / uniform
    else:
        side, strength = "more", (share - uniform) / max(ceiling - uniform, 1e-9)
    return f"{100 * share:.1f}", side, round(100 * min(strength, 1.0))


def routing_table(routing: Mapping[str, Any], recipe: Mapping[str, Any]) -> RoutingTable | None:
    """Entropies and balance of every layer, and their means. None in an older run's metrics."""
    if not routing.get("entropy"):
        return None
    domains, together = list(routing["entropy"]), routing["mixed"]
    columns = [
        *(routing["entropy"][domain] for domain in domains),
        *(together[name] for name in ("entropy_of_mean", "balance", "max_share")),
    ]
    table = [[_number(value) for value in column] for column in columns]
    named = [(str(layer), list(row)) for layer, row in enumerate(zip(*table, strict=True))]
    named.append(("mean", [mean(column) for column in table]))
    return RoutingTable(
        domains,
        [
            (
                label,
                [loss_text(value) for value in row[: len(domains)]],
                [loss_text(row[-3]), loss_text(row[-2]), f"{100 * row[-1]:.1f}"],
            )
            for label, row in named
        ],
        loss_text(math.log(len(routing["experts"]))),
    )


def dynamic_curve(found: Mapping[str, Any], recipe: Mapping[str, Any]) -> Dynamic:
    """In-domain loss (nats per token, mean of the domains) against experts per token on the same
    text. What a threshold is worth is its distance from the straight line between the two nearest
    fixed numbers of experts."""
    domains = list(found["fixed"][0]["losses"])
    inside = [name for name in domains if name in recipe["sources"]]
    outside = [name for name in domains if name not in inside]

    def losses(row: Mapping[str, Any]) -> tuple[float, float]:
        """In domain, out of domain."""
        means = (
            mean([_number(row["losses"][name]) for name in part]) for part in (inside, outside)
        )
        return next(means), next(means)

    fixed, by_threshold, rows = [], [], []
    for row in found["fixed"]:
        loss, other = losses(row)
        fixed.append((float(row["experts"]), loss))
        texts = [f"{row['experts']:.2f}", "", loss_text(loss), "", loss_text(other)]
        rows.append((str(row["experts"]), texts))
    for row in found["threshold"]:
        loss, other = losses(row)
        experts = mean([_number(row["experts_by_domain"][name]) for name in inside])
        by_threshold.append((experts, loss))
        layers = [_number(count) for count in row["experts_by_layer"]]
        spread = f"{min(layers):.2f} to {max(layers):.2f}"
        beside = f"{loss - _between(fixed, experts):+.3f}".replace("+nan", "NaN")
        texts = [f"{experts:.2f}", spread, loss_text(loss), beside, loss_text(other)]
        rows.append((f"p \N{GREATER-THAN OR EQUAL TO} {row['threshold']:g}", texts))

    kinds = {"same number for all": fixed, "by threshold": sorted(by_threshold)}
    lines = tuple(
        Line(number, kind, tuple(Point(x, y, title=_dynamic_title(kind, x, y)) for x, y in points))
        for number, (kind, points) in enumerate(kinds.items())
    )
    chart = Chart(
        title="Held-out loss in domain against experts per token",
        across="experts per token",
        upward="loss in domain, nats per token",
        lines=lines,
        write=loss_text,
        summary=f"Loss {loss_text(fixed[0][1])} with 1 expert per token, "
        f"{loss_text(fixed[-1][1])} with {len(fixed)}",
        whole=True,
    )
    return Dynamic(rows, worth_drawing(chart), bool(outside))


def _dynamic_title(kind: str, experts: float, loss: float) -> str:
    return f"{kind}, {experts:.2f} experts per token: {loss_text(loss)}"


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Height at x of the line through the points, which are sorted."""
    for (left, low), (right, high) in pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return points[-1][1] if x >= points[-1][0] else math.nan


def likeness_tables(cka: Mapping[str, Any]) -> Likeness | None:
    """How alike the experts are, of the sources and of every model. None where it was not
    measured."""
    models = [name for name in _ALIKE if cka.get(name)]
    if not models:
        return None
    columns, grids = [], []
    for name in models:
        experts, layers = cka[name]["experts"], cka[name]["layers"]
        pairs = [(i, j) for i in range(len(experts)) for j in range(i)]
        columns.append([mean([_number(layer[i][j]) for i, j in pairs]) for layer in layers])
        means = [
            [mean([_number(layer[i][j]) for layer in layers]) for j in range(len(experts))]
            for i in range(len(experts))
        ]
        grids.append((name, experts, [[likeness_shade(value) for value in row] for row in means]))
    rows = [(str(layer), list(row)) for layer, row in enumerate(zip(*columns, strict=True))]
    rows.append(("mean", [mean(column) for column in columns]))
    texts = [(label, [loss_text(value) for value in row]) for label, row in rows]
    return Likeness(texts, grids, cka[models[0]]["tokens"])


def likeness_shade(value: float) -> tuple[str, str, int]:
    """(CKA as text, class, strength of the colour from 0 to 100)."""
    if not math.isfinite(value):
        return MISSING, "", 0
    return f"{value:.3f}", "more", round(100 * min(max(value, 0.0), 1.0))


# Alignment and fit


def alignment_tables(
    alignment: Mapping[str, Any], recipe: Mapping[str, Any]
) -> list[AlignmentTable]:
    """One table for every kind that was measured, the sources in the recipe's order."""
    tables = []
    for kind, (what, explanation) in _KINDS.items():
        found = alignment.get(kind) or {}
        names = [name for name in recipe["sources"] if name in found]
        names += [name for name in found if name not in names]
        columns = [
            [_number(value) for value in found[name].get(key) or []]
            for name in names
            for key in ("before", "after")
        ]
        layers = max(map(len, columns), default=0)
        if not layers:
            continue
        # A layer that one source lacks leaves its cells empty, and the mean with them.
        padded = [column + [None] * (layers - len(column)) for column in columns]
        rows = [(str(layer), list(row)) for layer, row in enumerate(zip(*padded, strict=True))]
        rows.append(("mean", [mean_of_all(column) for column in padded]))
        texts = [(label, [loss_text(value) for value in row]) for label, row in rows]
        tables.append(
            AlignmentTable(
                what,
                explanation,
                [(name, found[name].get("used") is not False) for name in names],
                [(label, list(zip(row[::2], row[1::2], strict=True))) for label, row in texts],
            )
        )
    return tables


def fit_tables(fit: Mapping[str, Any], recipe: Mapping[str, Any]) -> FitTable | None:
    """What was measured of every layer and of the head, step by step; what is not there (the whole
    of it where only a router was fitted, some in an older build's metrics) is left out. None where
    nothing was fitted."""
    if not fit:
        return None
    layers = fit.get("layers") or []
    names = ["attention", "experts"]
    if any("refinement" in layer for layer in layers):
        names.append("refinement")
    table = [[_Step.of(layer.get(name)) for name in names] for layer in layers]
    rows = [
        (str(number), _fit_row([step.before for step in row], [step.cell for step in row]))
        for number, row in enumerate(table)
    ]
    if rows:
        columns = list(zip(*table, strict=True))
        rows.append(
            (
                "mean",
                _fit_row(
                    [mean_of_all([step.before for step in column]) for column in columns],
                    [
                        Cell(error_text(mean_of_all([step.left for step in column])))
                        for column in columns
                    ],
                ),
            )
        )
    notes = fit.get("head") or {}
    head = {name: _Step.of(note, drops=name != _SOFTENED) for name, note in notes.items()}
    dropped = [
        f"{name} in {count} of {len(table)} layers"
        for index, name in enumerate(names)
        if (count := sum(row[index].cell.dropped for row in table))
    ]
    dropped += [f"{name} of the head" for name, step in head.items() if step.cell.dropped]
    return FitTable(
        verdict=fit_verdict(fit),
        # Builds that did not note the loss per source kept windows of the fitted documents aside.
        documents=bool(fit.get("loss_by_source")) or recipe["fit"]["method"] == "none",
        losses=losses_kept_aside(fit, recipe["sources"]),
        groups=[
            ("after attention", ["before", "attention"]),
            ("after the layer", ["before", *names[1:]]),
        ],
        rows=rows if any(name in layer for layer in layers for name in names) else [],
        conditions=fit_conditions(layers, notes, recipe["fit"]["ridge"]),
        balance=fit_balance(layers, recipe),
        head=[
            *(("before", Cell(error_text(step.before))) for step in list(head.values())[:1]),
            *((name, step.cell) for name, step in head.items()),
        ],
        softened=softening_text(
            notes.get(_SOFTENED) or {}, recipe["fit"].get("temperature_scaling")
        ),
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
    def of(cls, note: Mapping[str, Any] | None, *, drops: bool = True) -> "_Step":
        if not note or not note.get("error"):
            return cls(None, Cell(MISSING), None)
        before, after = (_number(value) for value in note["error"])
        if drops and note.get("kept") is False:
            return cls(before, Cell(error_text(after), "not kept", dropped=True), before)
        return cls(before, Cell(error_text(after)), after)


def _fit_row(before: Sequence[float | None], after: Sequence[Cell]) -> list[Cell]:
    """Cells of attention, before and after; then of the layer before its experts are fitted and
    after each further step."""
    return [Cell(error_text(before[0])), after[0], Cell(error_text(before[1])), *after[1:]]


def losses_kept_aside(
    fit: Mapping[str, Any], sources: Iterable[str]
) -> tuple[list[str], list[tuple[str, bool, list[Cell]]]]:
    """(sources, rows: model, whether it was written, its loss on the text of each)"""
    by_model = fit.get("loss_by_source") or {}
    names = _in_order(sources, *by_model.values())
    columns = [
        [_number(loss[name]) if name in loss else None for loss in by_model.values()]
        for name in names
    ]
    best = [_lowest(column) for column in columns]
    rows = [
        (
            model,
            model == fit.get("chosen"),
            [
                Cell(loss_text(loss), perplexity_text(loss), best=loss_text(loss) == lowest)
                for loss, lowest in zip(row, best, strict=True)
            ],
        )
        for model, row in zip(by_model, zip(*columns, strict=True), strict=False)
    ]
    return names, rows


def _in_order(known: Iterable[str], *found: Iterable[str]) -> list[str]:
    """The names that were found: the known ones in their order, then the others."""
    names = {name: None for row in found for name in row}
    return list({name: None for name in known if name in names} | names)


def fit_conditions(
    layers: Sequence[Mapping[str, Any]], head: Mapping[str, Any], ridge: Number
) -> Conditions | None:
    """The worst-conditioned regression of each layer and of the head, and the ridges that are not
    `ridge`, the recipe's. None where no condition was noted."""
    rows, ridges, num_raised = [], 0, 0
    for place, steps in [*((str(n), layer) for n, layer in enumerate(layers)), ("head", head)]:
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


def _regressions(steps: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """(what was solved for, its condition number, the ridge in the end) of all steps in one
    place."""
    found = []
    for step, note in steps.items():
        conditions, ridges = note.get("condition", {}), note.get("ridge") or {}
        if not isinstance(conditions, Mapping):  # an older build's: one number for the whole step
            conditions = {step: conditions}
        found += [
            (what, _or_infinite(value), _or_infinite(ridges[what]) if what in ridges else None)
            for what, value in conditions.items()
        ]
    return found


def _or_infinite(value: Number | None) -> float:
    return math.inf if value is None or math.isnan(value) else float(value)


def condition_text(condition: float) -> str:
    """A condition number to its leading digits."""
    if not math.isfinite(condition):
        return "not finite"
    return count(condition) if condition < 1e6 else f"{condition:.1e}"


def fit_balance(layers: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> Balance | None:
    """Every layer's balance between the experts, and the mean over layers. None where none was
    measured."""
    notes = {
        str(number): layer["routing"] for number, layer in enumerate(layers) if layer.get("routing")
    }
    experts = _in_order(recipe["sources"], *(note["share"] for note in notes.values()))
    if not experts:
        return None
    rows = {
        layer: [
            *(_number(note["share"].get(name)) for name in experts),
            _number(note.get("first_choice_is_source")),
        ]
        for layer, note in notes.items()
    }
    rows["mean"] = [sum(column) / len(rows) for column in zip(*rows.values(), strict=True)]
    uniform = 1 / len(experts)
    ceiling = ceiling_share(len(experts), recipe["router"]["top_k"])
    return Balance(
        experts,
        [
            (
                layer,
                [shade(share, uniform, ceiling) for share in shares],
                shade(first, uniform, ceiling)[0],
            )
            for layer, (*shares, first) in rows.items()
        ],
    )


def softening_text(note: Mapping[str, Any], allowed: float | None) -> str:
    """What dividing the head's logits by a temperature does, for those who have never done it.
    `allowed`: the recipe's `fit.temperature_scaling`."""
    temperature = _number(note.get("temperature"))
    if not math.isfinite(temperature):
        return ""
    if not note.get("kept"):
        return "The head was not softened: its logits are as they were (temperature 1)."
    limit = ""
    if allowed is not None:
        limit = (
            f" The divergence may rise by {100 * allowed:g} per cent for this "
            "(fit.temperature_scaling)."
        )
    return (
        f"The head was softened: its logits are divided by {temperature:.2f}, which is what "
        f"sampling at temperature {temperature:.2f} does. A token that was 100 times as likely as "
        f"another is now {100 ** (1 / temperature):.0f} times as likely. On text that it was not "
        f"fitted to, a fitted model is surer of itself than it has reason to be.{limit}"
    )


def fit_verdict(fit: Mapping[str, Any]) -> list[str]:
    """Sentences: what the whole model loses beside the plain mean, and which was written."""
    losses, chosen = fit.get("loss") or {}, fit.get("chosen")
    verdict = []
    if losses:
        each = ", ".join(f"{name} {loss_text(_number(loss))}" for name, loss in losses.items())
        verdict.append(
            f"The whole model on the text kept aside, in nats per token: {each}. The plain mean is "
            "the same sources averaged as they are, with nothing fitted but a router."
        )
    if chosen == _PLAIN:
        verdict.append(
            "The plain mean was written. The errors, the regressions, the balance between experts "
            "and the head below are those of the fitted model, which is not in the checkpoint."
        )
    elif chosen is not None:
        verdict.append(f"The {chosen} model was written.")
    return verdict


# Plan, time and memory


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


def timing_rows(timing: Mapping[str, Any], plan: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, measured, as planned). A key's last word is its unit."""
    planned = {
        "build_seconds": duration(plan["seconds"]),
        "build_peak_rss_bytes": size(plan["peak_memory_bytes"]),
    }
    labels = {"build_peak_rss_bytes": "Peak memory of the build", "build_seconds": "Build"}
    writers = {"seconds": duration, "bytes": size, "tokens": count}
    rows = []
    for key, value in timing.items():
        words, _, unit = key.rpartition("_")
        known = unit in writers and isinstance(value, int | float) and math.isfinite(value)
        label = labels.get(key, (words if known else key).replace("_", " ").capitalize())
        text = writers[unit](value) if known else str(value)
        if known and unit == "tokens":
            text += " tokens"
        rows.append((label, text, planned.get(key, MISSING)))
    return rows
