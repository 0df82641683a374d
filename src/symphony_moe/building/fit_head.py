"""The output head, fitted to the sources' logits; and what the whole model loses then.

Closed form first: ridge regression from the new model's last stream to the logits of the text's own
source. Logits are never formed: what a source's head makes of its stream is linear, so it is enough
to regress onto the streams. Then gradient steps on the head, and on the last layers with it
(`fit.layers_with_head`), on the KL divergence from the source's distribution. A squared distance
between streams or logits misses that (docs/lab-log.md). Last, temperature scaling: on text that
nobody fitted it to, a fitted model is surer of itself than it has reason to be.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from symphony_moe.building.fitting import (
    NEW,
    NEW_BEFORE_END,
    SOURCE,
    Batch,
    Descent,
    FitState,
    Step,
    descend,
    solve,
)
from symphony_moe.building.learned_layer import LearnedLayer
from symphony_moe.building.least_squares import LeastSquares, Solution
from symphony_moe.model.layer import LOGITS_AT_ONCE, device, head_input
from symphony_moe.model.moe_layer import MoELayer
from symphony_moe.model.precision import exact, float32_results, product_dtype
from symphony_moe.model.streams import in_batches
from symphony_moe.model.temperature import TEMPERATURES, largest_temperature

Head = Float[Tensor, "vocabulary hidden"]


@dataclass(frozen=True)
class HeadFit:
    """What was measured while the head was fitted: KL divergences on the validation text."""

    closed_form: Step
    with_last_layers: Step | None
    """The refinement of the head together with the last layers; None where none are."""
    refinement: Step | None
    """That of the head alone; None where the one before was kept, or `fit.epochs` is 0."""
    temperature: float
    divergence: float
    """At that temperature."""

    @property
    def at_one(self) -> float:
        """The divergence at temperature 1."""
        return (self.refinement or self.with_last_layers or self.closed_form).error

    def to_json(self) -> dict[str, Any]:
        """For `metrics.json`."""
        found = {"closed form": self.closed_form.to_json()}
        if self.with_last_layers is not None:
            found["with_last_layers"] = self.with_last_layers.to_json()
        if self.refinement is not None:
            found["refinement"] = self.refinement.to_json()
        found["temperature_scaling"] = {
            "error": [round(self.at_one, 6), round(self.divergence, 6)],
            "kept": self.temperature > 1,
            "temperature": round(self.temperature, 6),
        }
        return found


def fit_head(
    state: FitState, start: Head, heads: Mapping[str, Head], layers: Mapping[int, MoELayer]
) -> tuple[Head, Mapping[int, MoELayer], HeadFit]:
    """The head, the last layers, and what was measured. `start`: the fused head. `heads`: source ->
    its own, in the anchor's coordinates. All with the final norm's gain folded in. `layers`: number
    -> the last layers, as they are written, where those are refined with the head. The new model's
    stream before them is NEW_BEFORE_END; behind them it is of no use after this."""
    with state.products():
        return _fit(state, start, heads, layers)


def _fit(
    state: FitState, start: Head, heads: Mapping[str, Head], layers: Mapping[int, MoELayer]
) -> tuple[Head, Mapping[int, MoELayer], HeadFit]:
    start = start.to(device())
    heads = {name: head.to(device()) for name, head in heads.items()}
    # 1. Closed form.
    solved, solution = _closed_form(state, start, heads)
    before, after = (_divergence(state, head, heads) for head in (start, solved))
    closed_form = Step(before, after, {"output head": solution})
    head = solved if closed_form.kept else start
    # 2. Gradient steps: with the last layers, or, where that only does harm, on the head alone.
    together = alone = None
    begun = head, closed_form.error
    if layers:
        learned = {number: LearnedLayer(state, number, layer) for number, layer in layers.items()}
        refined, together = _refine(state, begun, start, heads, list(learned.values()))
        if together.kept:
            head, layers = refined, {number: each.result() for number, each in learned.items()}
        del refined, learned  # before there are others
        if not together.kept:  # the validation text has gone through what was tried
            _advance(state, [LearnedLayer(state, *each) for each in layers.items()])
    if state.recipe.refines and not (together and together.kept):
        refined, alone = _refine(state, begun, start, heads, [])
        head = refined if alone.kept else head
    # 3. Temperature scaling.
    temperature, divergence = _scale_temperature(state, head, heads)
    found = HeadFit(closed_form, together, alone, temperature, divergence)
    return (head / temperature).cpu(), layers, found


@torch.no_grad()
def _advance(state: FitState, layers: Iterable[LearnedLayer]) -> None:
    """Bring the validation text past the last layers, as they are now."""
    for name in state.names:
        rows = state.validation(name)
        streams = (in_batches(state.stream(part, name)[rows]) for part in (NEW_BEFORE_END, NEW))
        for before, after in zip(*streams, strict=True):
            after.copy_(_through(layers, before))


def _through(layers: Iterable[LearnedLayer], hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer.run(hidden)
    return hidden


@torch.no_grad()
def next_token_losses(state: FitState, part: str, head: Head) -> dict[str, float]:
    """Source -> nats per token on its validation text, of the model whose last streams are `part`
    (NEW or PLAIN)."""
    head = head.to(device())
    losses = {}
    for name in state.names:
        total, predicted = 0.0, 0.0
        numbers = state.numbers(name)[state.validation(name)].tolist()
        for row, number in enumerate(numbers):
            rows = _normed(state, state.stream(part, name)[row])
            tokens = state.windows[name][number].to(device())
            asked = state.predicts(name, number).to(device())
            asked[-1] = False  # what follows is in another window
            follow = tokens.roll(-1)[asked]
            for x, wanted in zip(*(_chunks(r, head) for r in (rows[asked], follow)), strict=True):
                loss = torch.nn.functional.cross_entropy(x @ head.T, wanted, reduction="sum")
                total, predicted = total + float(loss), predicted + len(wanted)
        sums = torch.tensor([total, predicted], dtype=torch.float64)
        state.processes.add(sums)
        total, predicted = sums.tolist()
        losses[name] = total / predicted if predicted else math.nan
    return losses


def _normed(state: FitState, hidden: Tensor) -> Tensor:
    hidden = hidden.to(device())
    gain = hidden.new_ones(hidden.shape[-1])
    return head_input(state.config, gain, hidden)


def _chunks(rows: Tensor, head: Tensor) -> Sequence[Tensor]:
    """Tokens in pieces whose logits fit in memory."""
    result: Sequence[Tensor] = rows.split(_rows_at_once(head))
    return result


def _rows_at_once(head: Tensor) -> int:
    return max(1, LOGITS_AT_ONCE // len(head))


@torch.no_grad()
def _closed_form(state: FitState, start: Head, heads: Mapping[str, Head]) -> tuple[Head, Solution]:
    """Ridge regression of the logits, from hidden x hidden matrices alone: with `B_i` the
    regression of source i's stream (zero on other sources' text) and `B` that of the input itself,
    the solution is `sum H_i B_i + H_0 (I - B)`."""
    names, hidden = state.names, start.shape[1]
    sums = LeastSquares(hidden, hidden * (len(names) + 1), device=device())
    for name, x, wanted in _to_fit(state):
        targets = x.new_zeros(len(x), len(names) + 1, hidden)
        targets[:, names.index(name)] = wanted
        targets[:, -1] = x
        sums.update(x, targets.flatten(1))
    nothing = start.new_zeros(hidden * (len(names) + 1), hidden)
    fit = solve(state, sums, nothing, "output head")
    *maps, same = fit.weight.to(start).split(hidden)
    with exact(device()):
        head = start - start @ same
        for name, regression in zip(names, maps, strict=True):
            head += heads[name] @ regression
    return head, fit


def _to_fit(state: FitState) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(source, rows of the new model's last stream, rows of the source's) over the text that is
    fitted on, where a next token is asked for."""
    for name in state.names:
        masks = in_batches(state.predicts(name, state.numbers(name)[state.fitted(name)]))
        batches = state.to_fit(NEW, SOURCE, only=name)
        for mask, (_, streams) in zip(masks, batches, strict=True):
            new, source = (_normed(state, x)[mask.to(x.device)] for x in streams)
            yield name, new, source


def _refine(
    state: FitState,
    begun: tuple[Head, float],
    aligned: Head,
    heads: Mapping[str, Head],
    last: Sequence[LearnedLayer],
) -> tuple[Head, Step]:
    """Gradient steps on the KL divergence, of the head and of the last layers. `begun`: the head so
    far, and its divergence."""
    head, before = begun[0].clone(), begun[1]
    parameters = [parameter for layer in last for parameter in layer.parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def divergence() -> float:
        if last:
            _advance(state, last)
        return _divergence(state, head, heads)

    with torch.no_grad():
        how = Descent(
            [head, *parameters],
            [aligned, *(None for _ in parameters)],
            (NEW_BEFORE_END if last else NEW, SOURCE),
            _Gradient(state, head, heads, last),
            state.config.num_hidden_layers,
            divergence,
            before,
        )
        steps = descend(state, how)
        return head, Step(before, divergence(), descents=steps)


class _Gradient:
    """Sets the gradient of the KL divergence from the sources' distributions on a batch.

    That of softmax is written out, so that memory holds no more than one piece of two models'
    logits. What it is for the stream then goes back through the last layers.
    """

    def __init__(
        self,
        state: FitState,
        head: Head,
        heads: Mapping[str, Head],
        layers: Sequence[LearnedLayer],
    ) -> None:
        self._state, self._head, self._heads, self._layers = state, head, heads, layers
        self._dtype = product_dtype(head.device)
        # Made once: memory that is new each time costs as much as what is computed in it.
        self._at_once = _rows_at_once(head) * head.element_size() // self._dtype.itemsize
        self._pieces = [
            head.new_empty(self._at_once, len(head), dtype=self._dtype) for _ in range(3)
        ]

    def __call__(self, batch: Batch) -> None:
        state, head = self._state, self._head
        masks = [state.predicts(name, numbers).to(device()) for name, numbers, _, _ in batch]
        tokens = max(1, state.processes.total(sum(int(mask.sum()) for mask in masks)))
        head.grad = torch.zeros_like(head)
        ours = head.to(self._dtype)
        for mask, (name, _, read, source) in zip(masks, batch, strict=True):
            with torch.set_grad_enabled(bool(self._layers)):
                stream = _normed(state, _through(self._layers, read))[mask]
            back = torch.empty_like(stream) if self._layers else None
            both = ours, self._heads[name].to(self._dtype)
            new, wanted = stream.detach().to(self._dtype), _normed(state, source)[mask]
            for at in range(0, len(new), self._at_once):
                rows = slice(at, at + self._at_once)
                surplus = self._surplus(name, both, new[rows], wanted[rows].to(self._dtype))
                _add_product(head.grad, surplus.T, new[rows], 1 / tokens)
                if back is not None:
                    back[rows] = surplus @ ours
            if back is not None:
                stream.backward(back / tokens)

    def _surplus(self, name: str, heads: tuple[Head, Head], x: Tensor, wanted: Tensor) -> Tensor:
        """How much more likely each token is to the new model than to a source (tokens x
        vocabulary). `heads`: of both. `x` and `wanted`: rows of their last streams."""
        ours, own = heads
        logits, surplus, theirs = (piece[: len(x)] for piece in self._pieces)
        torch.softmax(torch.mm(x, ours.T, out=logits), dim=-1, out=surplus)
        torch.mm(wanted, own.T, out=logits)
        torch.softmax(_of_known(self._state, name, logits), dim=-1, out=theirs)
        surplus -= theirs
        return surplus


def _add_product(total: Tensor, left: Tensor, right: Tensor, times: float) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=times)
    else:
        total.add_(left @ right, alpha=times)


def _of_known(
    state: FitState, name: str, logits: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, "tokens vocabulary"]:
    """A source's logits, which are changed. It never says a token that it does not have."""
    known = state.known.get(name)
    return logits if known is None else logits.masked_fill_(~known.to(logits.device), -torch.inf)


def _scale_temperature(
    state: FitState, head: Head, heads: Mapping[str, Head]
) -> tuple[float, float]:
    """The largest temperature at which the divergence from the sources is no more than
    `fit.temperature_scaling` of itself above that of temperature 1; and the divergence there."""
    allowed = state.recipe.fit.temperature_scaling
    temperatures = TEMPERATURES if allowed > 0 else TEMPERATURES[:1]
    return largest_temperature(_divergences(state, head, heads, temperatures), allowed)


def _divergence(state: FitState, head: Head, heads: Mapping[str, Head]) -> float:
    return _divergences(state, head, heads, [1.0])[0]


@torch.no_grad()
def _divergences(
    state: FitState,
    head: Head,
    heads: Mapping[str, Head],
    temperatures: Sequence[float],
) -> list[float]:
    """KL divergence of the logits, divided by each temperature, from each source's distribution on
    the validation text, mean over sources."""
    found = []
    for name in state.names:
        where, total, tokens = state.validation(name), [0.0] * len(temperatures), 0
        asked = state.predicts(name, state.numbers(name)[where]).to(device())
        parts = (state.stream(part, name)[where] for part in (NEW, SOURCE))
        rows = (_normed(state, part)[asked] for part in parts)
        for x, wanted in zip(*(_chunks(r, head) for r in rows), strict=True):
            with float32_results(device()):
                logits, theirs = x @ head.T, wanted @ heads[name].T
            # In place: a piece of logits is as large as the head may be.
            torch.log_softmax(_of_known(state, name, theirs), dim=-1, out=theirs)
            share = theirs.exp()
            theirs.masked_fill_(share == 0, 0.0)  # not 0 times minus infinity
            # At another temperature only the sum of exponents is another.
            logits -= logits.amax(dim=-1, keepdim=True)
            entropy, mean = ((share * some).sum(dim=-1) for some in (theirs, logits))
            for place, temperature in enumerate(temperatures):
                exponents = torch.div(logits, temperature, out=share).exp_().sum(dim=-1)
                ours = mean / temperature - exponents.log()
                total[place] += float((entropy - ours).sum())
            tokens += len(x)
        sums = torch.tensor([*total, tokens], dtype=torch.float64)
        state.processes.add(sums)
        *total, predicted = sums.tolist()
        found.append([value / max(1, predicted) for value in total])
    return [sum(of) / len(found) for of in zip(*found, strict=True)]
