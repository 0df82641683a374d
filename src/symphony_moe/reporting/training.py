"""What the training was, and its curves."""

import math
from collections.abc import Iterable, Sequence

from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.charts import Chart, Line, Point, worth_drawing
from symphony_moe.reporting.numbers import Number, count, duration, loss_text
from symphony_moe.reporting.tables import in_order
from symphony_moe.runs.metrics import (
    Averaging,
    CurvePoint,
    HeldOutPoint,
    TemperatureScaling,
    Training,
    Validation,
)


def training_facts(training: Training | None) -> list[tuple[str, str]]:
    """What the training was, as (what, value)."""
    if training is None:
        return []
    rate, scaling = training.learning_rate, training.temperature_scaling
    validation, averaging = training.validation, training.averaging
    facts = [
        ("Scope", training.scope),
        ("Tokens", None if training.tokens is None else count(training.tokens)),
        ("Steps", None if training.steps is None else count(training.steps)),
        ("Time", None if training.seconds is None else duration(training.seconds)),
        ("Learning rate at its peak", None if rate is None else f"{rate:g}"),
        ("Weights kept", None if validation is None else kept_text(validation)),
        ("Weights averaged", None if averaging is None else averaged_text(averaging)),
        ("Temperature scaling", None if scaling is None else trained_scaling_text(scaling)),
    ]
    return [(what, value) for what, value in facts if value is not None]


def kept_text(validation: Validation) -> str:
    """The step whose weights `train.keep_best` kept, and the losses that say why."""
    losses = {point.step: point.loss for point in validation.curve}
    chosen, steps = validation.chosen_step, max(losses, default=0)
    before = loss_text(losses.get(0))
    if chosen == 0:
        best = min((loss for step, loss in losses.items() if step), default=math.nan)
        stopped = f", stopped at step {count(steps)} of {count(validation.planned_steps)}"
        return (
            f"those before training (validation loss {before}, at best {loss_text(best)} after"
            f"{stopped if steps < validation.planned_steps else ''})"
        )
    last = "" if chosen == steps else f", {loss_text(losses.get(steps))} at the end"
    return (
        f"of step {count(chosen)} (validation loss {before} before, "
        f"{loss_text(losses.get(chosen))} there{last})"
    )


def averaged_text(averaging: Averaging) -> str:
    """The share of the trained weights that `train.average` took, and the losses that say why."""
    losses = {point.share: point.loss for point in averaging.curve}
    taken, before, after = (loss_text(losses.get(n)) for n in (averaging.share, 0.0, 1.0))
    return (
        f"{100 * averaging.share:.0f} % of the trained ones (validation loss {taken}; {before} "
        f"before training, {after} after)"
    )


def trained_scaling_text(scaling: TemperatureScaling) -> str:
    """The temperature after the training, and what it cost on the text of it."""
    before, after = (loss_text(loss) for loss in scaling.loss)
    return f"by {scaling.temperature:.2f} (loss on its own text from {before} to {after})"


def loss_chart(curve: Sequence[CurvePoint]) -> Chart | None:
    """Loss (nats per token) against tokens. None where no point can be drawn."""
    losses = tuple(Point(point.tokens, point.loss) for point in curve)
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


def share_chart(curve: Sequence[CurvePoint], recipe: Recipe) -> Chart | None:
    """Every expert's share of the routers' choices, in per cent, against tokens; an even load's.
    None where no point can be drawn: an older run's curve has no shares."""
    shares = [point.shares for point in curve]
    experts = in_order(recipe.sources, *shares)
    if not experts:
        return None
    lines = tuple(
        Line(
            number,
            name,
            tuple(
                Point(point.tokens, 100 * of_point.get(name, float("nan")))
                for point, of_point in zip(curve, shares, strict=True)
            ),
        )
        for number, name in enumerate(experts)
    )
    balance = [Point(point.tokens, point.balance) for point in curve if point.balance is not None]
    return worth_drawing(
        Chart(
            title="Every expert's share of the choices against tokens",
            across="tokens",
            upward="share of the choices, %",
            lines=lines,
            write=_per_cent_text,
            summary=first_and_last("Balance", balance),
            notes=gaps_text(line.points for line in lines),
            level=("even", 100 / len(experts)),
            from_zero=True,
        )
    )


def held_out_chart(points: Sequence[HeldOutPoint], recipe: Recipe) -> Chart | None:
    """Held-out loss of every domain (nats per token) against tokens. None where nothing was
    measured on the way."""
    domains = in_order(
        [*recipe.sources, *recipe.evaluation.extra], *(point.losses for point in points)
    )
    lines = tuple(
        Line(
            number,
            name,
            tuple(
                Point(point.tokens, point.losses.get(name, float("nan")), title=_at(name, point))
                for point in points
            ),
        )
        for number, name in enumerate(domains)
    )
    return worth_drawing(
        Chart(
            title="Held-out loss of every domain against tokens",
            across="tokens",
            upward="loss, nats per token",
            lines=lines,
            write=loss_text,
            notes=gaps_text(line.points for line in lines),
        )
    )


def _at(domain: str, point: HeldOutPoint) -> str:
    return f"{domain}, {count(point.tokens)} tokens: {loss_text(point.losses.get(domain))}"


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
