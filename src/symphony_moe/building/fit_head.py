"""The output head, fitted to the sources' logits; and what the whole model loses then.

Closed form first: ridge regression from the new model's last stream to the logits of the text's own
source. Logits are never formed: what a source's head makes of its stream is linear, so it is enough
to regress onto the streams. Then gradient steps on the head alone, on the KL divergence from the
source's distribution, which is what a squared distance between logits misses (docs/lab-log.md).
Last, the logits are softened a little: a fitted model is surer of itself on text that nobody fitted
it to than it has reason to be.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from symphony_moe.building.fit_layer import Calibration, descend, described, judged, solve, to_fit
from symphony_moe.building.least_squares import LeastSquares, Solution
from symphony_moe.model.layer import LOGITS_AT_ONCE, device, rms_norm
from symphony_moe.model.streams import windows_at_once
from symphony_moe.model.temperature import TEMPERATURES, largest_temperature

Head = Float[Tensor, "vocabulary hidden"]


def fit_head(
    calibration: Calibration, start: Head, heads: Mapping[str, Head]
) -> tuple[Head, dict[str, Any]]:
    """The head, and what was measured. `start`: the fused one. `heads`: source -> its own, in the
    anchor's coordinates. All with the final norm's gain folded in."""
    start = start.to(device())
    heads = {name: head.to(device()) for name, head in heads.items()}
    divergences = [_divergence(calibration, start, heads)]
    chosen, notes = start, {}
    for what in ("closed form", "refinement"):
        if what == "closed form":
            head, fit = _closed_form(calibration, chosen, heads)
        elif calibration.recipe.fit.epochs > 0:
            head = _refine(calibration, chosen, start, heads)
        else:
            break
        divergences.append(_divergence(calibration, head, heads))
        notes[what] = judged(divergences[-2:])
        if notes[what]["kept"]:
            chosen = head
        else:
            divergences[-1] = divergences[-2]
    notes["closed form"] |= described({"output head": fit})
    temperature, softened = _soften(calibration, chosen, heads)
    notes["temperature_scaling"] = {
        "error": [round(divergences[-1], 6), round(softened, 6)],
        "kept": temperature > 1,
        "temperature": round(temperature, 6),
    }
    return (chosen / temperature).cpu(), notes


@torch.no_grad()
def next_token_losses(calibration: Calibration, stream: str, head: Head) -> dict[str, float]:
    """Source -> nats per token on its text kept aside, of the model whose last streams are
    `<stream>/<name>`."""
    head = head.to(device())
    losses = {}
    for name in calibration.names:
        total, predicted = 0.0, 0
        for number in range(calibration.kept_aside[name]):
            rows = _normed(calibration, calibration.streams[f"{stream}/{name}"][number])
            tokens = calibration.windows[name][number].to(device())
            asked = calibration.asks(name, number).to(device())
            asked[-1] = False  # what follows is in another window
            follow = tokens.roll(-1)[asked]
            for x, wanted in zip(*(_chunks(r, head) for r in (rows[asked], follow)), strict=True):
                loss = torch.nn.functional.cross_entropy(x @ head.T, wanted, reduction="sum")
                total, predicted = total + float(loss), predicted + len(wanted)
        losses[name] = total / predicted if predicted else math.nan
    return losses


def _normed(calibration: Calibration, hidden: Tensor) -> Tensor:
    hidden = hidden.to(device())
    gain = hidden.new_ones(hidden.shape[-1])
    return rms_norm(hidden, gain, calibration.config.rms_norm_eps)


def _chunks(rows: Tensor, head: Tensor) -> Sequence[Tensor]:
    """Tokens in pieces whose logits fit in memory."""
    return rows.split(max(1, LOGITS_AT_ONCE // len(head)))


@torch.no_grad()
def _closed_form(
    calibration: Calibration, start: Head, heads: Mapping[str, Head]
) -> tuple[Head, Solution]:
    """Ridge regression of the logits, from hidden x hidden matrices alone: with `B_i` the
    regression of source i's stream (zero on other sources' text) and `B` that of the input itself,
    the solution is `sum H_i B_i + H_0 (I - B)`."""
    names, hidden = calibration.names, start.shape[1]
    sums = LeastSquares(hidden, hidden * (len(names) + 1), device=device())
    for name, x, wanted in _to_fit(calibration):
        targets = x.new_zeros(len(x), len(names) + 1, hidden)
        targets[:, names.index(name)] = wanted
        targets[:, -1] = x
        sums.update(x, targets.flatten(1))
    nothing = start.new_zeros(hidden * (len(names) + 1), hidden)
    fit = solve(calibration, sums, nothing, "output head")
    *maps, same = fit.weight.to(start).split(hidden)
    head = start - start @ same
    for name, regression in zip(names, maps, strict=True):
        head += heads[name] @ regression
    return head, fit


def _to_fit(calibration: Calibration) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(source, rows of the new model's last stream, rows of the source's) over the text that is
    fitted on, where a next token is asked for."""
    for name in calibration.names:
        asked = calibration.asks(name, calibration.fitted(name))
        masks = asked.split(windows_at_once(asked.shape[1]))
        batches = to_fit(calibration, "new", "source", only=name)
        for mask, (_, streams) in zip(masks, batches, strict=True):
            new, source = (_normed(calibration, x)[mask.to(x.device)] for x in streams)
            yield name, new, source


def _refine(
    calibration: Calibration, start: Head, aligned: Head, heads: Mapping[str, Head]
) -> Head:
    """Gradient steps on the KL divergence; the gradient of softmax is written out, so that memory
    holds no more than one piece of two models' logits."""
    head = start.clone()

    def gradient(batch: Sequence[tuple[str, Tensor, Tensor, Tensor]]) -> None:
        masks = [calibration.asks(name, numbers).to(device()) for name, numbers, _, _ in batch]
        tokens = max(1, sum(int(mask.sum()) for mask in masks))
        total = torch.zeros_like(head)
        for mask, (name, _, new, source) in zip(masks, batch, strict=True):
            rows = (_normed(calibration, x)[mask] for x in (new, source))
            for x, wanted in zip(*(_chunks(r, head) for r in rows), strict=True):
                surplus = torch.softmax(x @ head.T, dim=-1)
                surplus -= torch.softmax(_wanted(calibration, name, wanted, heads), dim=-1)
                total.addmm_(surplus.T, x, alpha=1 / tokens)
        head.grad = total

    with torch.no_grad():
        layers = calibration.config.num_hidden_layers
        descend(calibration, [head], [aligned], ("new", "source"), gradient, seed=layers)
    return head


def _wanted(
    calibration: Calibration, name: str, rows: Tensor, heads: Mapping[str, Head]
) -> Float[Tensor, "tokens vocabulary"]:
    """A source's logits. It never says a token that it does not have."""
    logits = rows @ heads[name].T
    known = calibration.known.get(name)
    return logits if known is None else logits.masked_fill(~known.to(logits.device), -torch.inf)


def _soften(calibration: Calibration, head: Head, heads: Mapping[str, Head]) -> tuple[float, float]:
    """The largest temperature at which the divergence from the sources is no more than
    `fit.temperature_scaling` of itself above that of temperature 1; and the divergence there."""
    soften = calibration.recipe.fit.temperature_scaling
    temperatures = TEMPERATURES if soften > 0 else TEMPERATURES[:1]
    return largest_temperature(_divergences(calibration, head, heads, temperatures), soften)


def _divergence(calibration: Calibration, head: Head, heads: Mapping[str, Head]) -> float:
    return _divergences(calibration, head, heads, [1.0])[0]


@torch.no_grad()
def _divergences(
    calibration: Calibration,
    head: Head,
    heads: Mapping[str, Head],
    temperatures: Sequence[float],
) -> list[float]:
    """KL divergence of the logits, divided by each temperature, from each source's distribution on
    the text kept aside, mean over sources."""
    found = []
    for name in calibration.names:
        where, total, tokens = calibration.aside(name), [0.0] * len(temperatures), 0
        asked = calibration.asks(name, where).to(device())
        parts = (calibration.streams[f"{part}/{name}"][where] for part in ("new", "source"))
        rows = (_normed(calibration, part)[asked] for part in parts)
        for x, wanted in zip(*(_chunks(r, head) for r in rows), strict=True):
            logits = x @ head.T
            theirs = torch.log_softmax(_wanted(calibration, name, wanted, heads), dim=-1)
            share = theirs.exp()
            theirs = theirs.masked_fill(share == 0, 0.0)  # not 0 times minus infinity
            for place, temperature in enumerate(temperatures):
                ours = torch.log_softmax(logits / temperature, dim=-1)
                total[place] += float((share * (theirs - ours)).sum())
            tokens += len(x)
        found.append([value / max(1, tokens) for value in total])
    return [sum(of) / len(found) for of in zip(*found, strict=True)]
