"""Where the routers send tokens, other numbers of experts, and how alike the experts are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.charts import Chart, Line, Point, worth_drawing
from symphony_moe.reporting.numbers import MISSING, loss_text, mean
from symphony_moe.reporting.tables import Shade, ceiling_share, shade
from symphony_moe.runs.metrics import STAGES, Cka, DynamicRouting, StageRouting

_ALIKE = ("sources", *STAGES)
"""Whose experts are compared: the originals, before they share a model; and the models."""


@dataclass(frozen=True)
class RoutingGrid:
    """Shares of the routed tokens of one domain, in per cent."""

    domain: str
    tokens: int
    rows: list[tuple[str, list[Shade]]]
    """(layer or "mean", cells)"""


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
    models: list[tuple[str, list[str], list[list[Shade]]]]
    """(model, experts, mean over layers of every pair)"""
    tokens: int
    chart: Chart | None
    """The means of pairs, layer by layer."""


@dataclass(frozen=True)
class Dynamic:
    """Loss against experts per token: the same number for all, and by threshold."""

    rows: list[tuple[str, list[str]]]
    """(fixed number or threshold; experts per token, its range over layers, loss in domain, how
    far that is from the same number for all, loss out of domain)"""
    chart: Chart | None
    out_of_domain: bool


def routing_grids(routing: StageRouting, top_k: int) -> list[RoutingGrid]:
    """One grid per domain: layers by experts, and the mean over layers."""
    num_experts = len(routing.experts)
    uniform, ceiling = 1 / num_experts, ceiling_share(num_experts, top_k)
    grids = []
    for domain, layers in routing.share.items():
        rows = [(label, row) for label, row in zip(_labels(routing, layers), layers, strict=True)]
        if layers:
            rows.append(("mean", [mean(column) for column in zip(*layers, strict=True)]))
        shaded = [(label, [shade(x, uniform, ceiling) for x in row]) for label, row in rows]
        grids.append(RoutingGrid(domain, routing.tokens.get(domain, 0), shaded))
    return grids


def _labels(routing: StageRouting, layers: Sequence[object]) -> list[str]:
    """What the layers that have routers are called."""
    return [str(number) for number in routing.layers or range(len(layers))]


def routing_table(routing: StageRouting) -> RoutingTable | None:
    """Entropies and balance of every layer, and their means. None in an older run's metrics."""
    if not routing.entropy or routing.mixed is None:
        return None
    domains, mixed = list(routing.entropy), routing.mixed
    columns = [
        *routing.entropy.values(),
        *(mixed.entropy_of_mean, mixed.balance, mixed.max_share),
    ]
    by_layer = list(zip(*columns, strict=True))
    named = [(n, list(row)) for n, row in zip(_labels(routing, by_layer), by_layer, strict=True)]
    named.append(("mean", [mean(column) for column in columns]))
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
        loss_text(math.log(len(routing.experts))),
    )


def dynamic_curve(found: DynamicRouting, recipe: Recipe) -> Dynamic:
    """In-domain loss (nats per token, mean of the domains) against experts per token on the same
    text. What a threshold is worth is its distance from the straight line between the two nearest
    fixed numbers of experts."""
    domains = list(found.fixed[0].losses)
    inside = [name for name in domains if name in recipe.sources]
    outside = [name for name in domains if name not in inside]

    def losses(of_domains: Mapping[str, float]) -> tuple[float, float]:
        """In domain, out of domain."""
        one, other = (mean([of_domains[name] for name in part]) for part in (inside, outside))
        return one, other

    fixed, by_threshold, rows = [], [], []
    for row in found.fixed:
        loss, other = losses(row.losses)
        fixed.append((float(row.experts), loss))
        texts = [f"{row.experts:.2f}", "", loss_text(loss), "", loss_text(other)]
        rows.append((str(row.experts), texts))
    for tried in found.threshold:
        loss, other = losses(tried.losses)
        experts = mean([tried.experts_by_domain[name] for name in inside])
        by_threshold.append((experts, loss))
        layers = tried.experts_by_layer
        spread = f"{min(layers):.2f} to {max(layers):.2f}"
        beside = f"{loss - _between(fixed, experts):+.3f}".replace("+nan", "NaN")
        texts = [f"{experts:.2f}", spread, loss_text(loss), beside, loss_text(other)]
        rows.append((f"p \N{GREATER-THAN OR EQUAL TO} {tried.threshold:g}", texts))
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


def likeness_tables(cka: Mapping[str, Cka]) -> Likeness | None:
    """How alike the experts are, of the sources and of every model. None where it was not
    measured."""
    models = [name for name in _ALIKE if name in cka]
    if not models:
        return None
    numbers = {name: list(cka[name].numbers or range(len(cka[name].layers))) for name in models}
    # Of the sources every layer is compared, of a model those that have experts.
    compared = [n for n in numbers[models[0]] if all(n in own for own in numbers.values())]
    columns, grids = [], []
    for name in models:
        experts = cka[name].experts
        layers = [cka[name].layers[numbers[name].index(number)] for number in compared]
        pairs = [(i, j) for i in range(len(experts)) for j in range(i)]
        columns.append([mean([layer[i][j] for i, j in pairs]) for layer in layers])
        means = [
            [mean([layer[i][j] for layer in layers]) for j in range(len(experts))]
            for i in range(len(experts))
        ]
        grids.append((name, experts, [[likeness_shade(value) for value in row] for row in means]))
    by_layer = zip(compared, zip(*columns, strict=True), strict=True)
    rows = [(str(layer), list(row)) for layer, row in by_layer]
    rows.append(("mean", [mean(column) for column in columns]))
    texts = [(label, [loss_text(value) for value in row]) for label, row in rows]
    chart = _likeness_chart(dict(zip(models, columns, strict=True)))
    return Likeness(texts, grids, cka[models[0]].tokens, chart)


def _likeness_chart(columns: Mapping[str, Sequence[float]]) -> Chart | None:
    """Model -> layer -> mean CKA over pairs, as lines."""
    lines = tuple(
        Line(
            number,
            model,
            tuple(
                Point(layer, value, title=f"{model}, layer {layer}: {loss_text(value)}")
                for layer, value in enumerate(values)
            ),
        )
        for number, (model, values) in enumerate(columns.items())
    )
    return worth_drawing(
        Chart(
            title="CKA of two experts by layer, mean over pairs",
            across="layer",
            upward="CKA",
            lines=lines,
            write=loss_text,
            from_zero=True,
            whole=True,
        )
    )


def likeness_shade(value: float) -> Shade:
    """A CKA as text, with how dark its cell is."""
    if not math.isfinite(value):
        return Shade(MISSING, "", 0)
    return Shade(f"{value:.3f}", "more", round(100 * min(max(value, 0.0), 1.0)))
