"""What the fits of a layer and of the head share: text and streams, regressions, descent."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedConfig

from symphony_moe.building.fit_embeddings import LearnedEmbeddings
from symphony_moe.building.least_squares import LeastSquares, Solution
from symphony_moe.building.router_init import windows_for_router
from symphony_moe.model.families import Family
from symphony_moe.model.layer import WINDOWS_TOKENS, device
from symphony_moe.model.precision import product_dtype, products
from symphony_moe.model.streams import Streams, Windows
from symphony_moe.processes import ALONE, Processes
from symphony_moe.recipe.settings import Recipe

log = logging.getLogger(__name__)

SOURCE = "source"
"""The streams of the aligned sources, each on its own text."""
NEW = "new"
"""The streams of the new model."""
PLAIN = "plain"
"""The streams of the plain mean, on some of the text."""
MIDDLE, AFTER = "middle", "after"
"""The sources' streams within the layer at hand: between attention and FFN, and after it."""
NEW_MIDDLE = "new-middle"
"""The new model's stream between attention and experts."""
NEW_BEFORE_END = "new-before-end"
"""The new model's stream before the last layers, which are refined with the head."""

_WARMUP, _WARMUP_SHARE = 20, 5
"""Steps in which the refinement's learning rate rises, and at most one in so many of all."""

_PIECE = 2**22
"""Numbers of a tensor that Adam moves at once: it makes copies of them."""

_HOPELESS = 4.0
"""A descent that was kept in the end has not been seen above 1.12 times its first error on the way
(the bundled models). Of sources that are nearly the same most begin at five to two hundred times
it (docs/lab-log.md)."""


@dataclass(frozen=True)
class FitState:
    """What stays the same from layer to layer of a fit."""

    recipe: Recipe
    family: Family
    configs: Mapping[str, PreTrainedConfig]
    """Each source's own."""
    config: PreTrainedConfig
    """The new model's dense counterpart, see `new_config`."""
    windows: Mapping[str, Windows]
    """Source -> calibration text of its domain: first the validation text, to judge by, then what
    is fitted on. All of it; the streams are those of this process's part."""
    num_validation: Mapping[str, int]
    """Source -> number of windows that are validation text."""
    streams: Streams
    known: Mapping[str, Tensor | None] = field(default_factory=dict)
    """Source -> which tokens of the shared vocabulary it has; None (or no entry): all."""
    positions: Mapping[str, Windows] = field(default_factory=dict)
    """Source -> the place of each token of its text in its document, 0 where one begins."""
    warned: set[tuple[str, str]] = field(default_factory=set)
    """What has been said, and need not be said of every layer."""
    processes: Processes = ALONE
    """Those that share the text."""
    embeddings: LearnedEmbeddings | None = None
    """The token embeddings, where they learn with the first layer."""
    newcomer: str | None = None
    """The one source whose expert is fitted, where backbone and other experts are kept; None: all
    is fitted."""

    @property
    def fitted_part(self) -> "FitState":
        """The same on the text of the sources whose experts are fitted."""
        if self.newcomer is None:
            return self
        return replace(self, windows={self.newcomer: self.windows[self.newcomer]})

    @property
    def names(self) -> list[str]:
        """The sources in the order in which every fit goes through them: by name, so that the
        order of the recipe changes nothing."""
        return sorted(self.windows)

    def products(self) -> AbstractContextManager[None]:
        """Inside the block matrices are multiplied as `calibration.precision` says."""
        setting = self.recipe.calibration.precision
        return products(setting, self.config.hidden_size, device())

    def stream(self, part: str, name: str) -> Tensor:
        """A whole stream (windows x sequence x hidden): `part` is one of SOURCE, NEW, ..."""
        return self.streams[f"{part}/{name}"]

    def batches(self, name: str, *parts: str, reads: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """A source's text in batches of some streams, on the device: the first `reads` of them to
        read, the others to overwrite."""
        return self.streams.visit(*(f"{part}/{name}" for part in parts), reads=reads)

    def numbers(self, name: str) -> Int[Tensor, " windows"]:
        """Which of a source's windows the rows of its streams are: this process's part."""
        return self.processes.own(len(self.windows[name]))

    def validation(self, name: str) -> slice:
        """The rows of a source's streams that judge a fit."""
        return slice(0, len(self.processes.own(self.num_validation[name])))

    def fitted(self, name: str) -> slice:
        """The rows of a source's streams that are fitted on."""
        return slice(self.validation(name).stop, len(self.numbers(name)))

    def predicts(self, name: str, rows: Tensor | int) -> Bool[Tensor, "*windows sequence"]:
        """Which tokens of some windows predict a next one: those that the same document goes on
        after, within the window. All, where the positions are not known. `rows`: the windows'
        numbers."""
        places = self.positions.get(name)
        if places is None:  # no document ends anywhere
            return torch.ones_like(self.windows[name][rows], dtype=torch.bool)
        return torch.nn.functional.pad(places[rows][..., 1:] > 0, (0, 1))

    def plain_windows(self, name: str) -> int:
        """Windows that the plain mean runs on: the validation text, and what its router is
        calibrated on."""
        return min(len(self.windows[name]), self.num_validation[name] + self.router_windows(name))

    def router_windows(self, name: str) -> int:
        """Windows of a source's text that a router is calibrated on."""
        return len(self.spread_windows(name))

    def spread_windows(self, name: str) -> range:
        """Numbers of the windows that the new model's router is calibrated on."""
        windows, sequence = self.windows[name].shape
        first = self.num_validation[name]
        spread = windows_for_router(len(self.windows), sequence, windows - first)
        return range(first + spread.start, first + spread.stop, spread.step)

    def to_fit(
        self, *parts: str, only: str | None = None
    ) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """(source, a batch of each of some streams) over the text that is fitted on: all sources',
        or that of `only` one."""
        for name in self.names if only is None else [only]:
            keys, rows = [f"{part}/{name}" for part in parts], self.fitted(name)
            for batch in self.streams.visit(*keys, rows=rows, reads=len(keys)):
                yield name, batch


@dataclass(frozen=True)
class Step:
    """What a step of a fit did to the error on the validation text."""

    before: float
    after: float
    solutions: Mapping[str, Solution] = field(default_factory=dict)
    """The regressions that the step solved, by what they fit."""
    descents: int | None = None
    """Gradient steps, where the step took any."""

    @property
    def kept(self) -> bool:
        """Whether the step is worth keeping. NaN is worth nothing."""
        return bool(self.before - self.after > 1e-6)

    @property
    def error(self) -> float:
        """The error of what is kept."""
        return self.after if self.kept else self.before

    def to_json(self) -> dict[str, Any]:
        """For `metrics.json`."""
        found: dict[str, Any] = {
            "error": [round(self.before, 6), round(self.after, 6)],
            "kept": self.kept,
        }
        if self.solutions:
            found["condition"] = {what: each.condition for what, each in self.solutions.items()}
            found["ridge"] = {what: each.ridge for what, each in self.solutions.items()}
        if self.descents is not None:
            found["steps"] = self.descents
        return found


@dataclass(frozen=True)
class Regression:
    """A regression that is to be solved."""

    sums: LeastSquares
    start: Tensor
    """What it is drawn back to (outputs x inputs)."""
    what: str
    """For messages."""
    intercept: Tensor | None = None


def solve_all(state: FitState, regressions: Iterable[Regression]) -> list[Solution]:
    """Regressions on the text of all processes, solved side by side: each by one of them. With a
    warning (once for each `what`) where the text does not determine one. They are taken one after
    the other: a process keeps the sums of those alone that it solves."""
    processes, ridge = state.processes, state.recipe.fit.ridge
    own: dict[int, Regression] = {}
    about: list[tuple[str, int, int]] = []
    where = device()
    for place, each in enumerate(regressions):
        owner = place % processes.count
        each.sums.combine(processes, owner)
        about.append((each.what, each.sums.count, len(each.sums.gram)))
        where = each.start.device
        if owner == processes.number:
            own[place] = each
    solved = {
        place: each.sums.solve(each.start, ridge, each.intercept) for place, each in own.items()
    }
    found = []
    for place, facts in enumerate(about):
        solution = _shared(processes, solved.get(place), place % processes.count, where)
        _warn(state, facts, solution)
        found.append(solution)
    return found


def solve(
    state: FitState,
    sums: LeastSquares,
    start: Tensor,
    what: str,
    intercept: Tensor | None = None,
) -> Solution:
    """One regression."""
    return solve_all(state, [Regression(sums, start, what, intercept)])[0]


def _shared(
    processes: Processes, solution: Solution | None, owner: int, where: torch.device
) -> Solution:
    """The owner's solution, for all."""
    if processes.count == 1:
        assert solution is not None
        return solution
    tensors = None if solution is None else solution.to_tensors()
    found = {name: tensor.to(where) for name, tensor in processes.share(tensors, owner).items()}
    return Solution.from_tensors(found) if solution is None else solution


def _warn(state: FitState, facts: tuple[str, int, int], solution: Solution) -> None:
    """`facts`: what is fitted, the tokens it is fitted on, its unknowns per output."""
    (what, tokens, unknowns), ridge = facts, state.recipe.fit.ridge
    problems = {}
    if tokens < unknowns:  # the pull toward the start decides the rest
        problems["text"] = (
            f"{tokens:,} calibration tokens for {unknowns:,} unknowns per output; what "
            "they leave open stays as it was. Raise calibration.tokens"
        )
    if solution.ridge == math.inf:
        problems["ridge"] = (
            "ill-conditioned, whatever the ridge; it stays as it was"
            if solution.has_inputs
            else "its inputs are all zero, so there is nothing to fit"
        )
    elif solution.ridge != ridge:
        problems["ridge"] = (
            f"ill-conditioned; the ridge was raised to {solution.ridge:.0e} "
            "(other layers: metrics.json)"
        )
    for kind, problem in problems.items():
        if (what, kind) not in state.warned:
            state.warned.add((what, kind))
            log.warning("fit of %s: %s", what, problem)


Batch = Sequence[tuple[str, Tensor, Tensor, Tensor]]
"""A step's text: (source, windows' numbers, input, target) for every source; a process's part of
it, where several share it."""


@dataclass(frozen=True)
class Descent:
    """What gradient steps are taken on."""

    parameters: Sequence[Tensor]
    start: Sequence[Tensor | None]
    """For each parameter, what it is drawn back to; None: nothing."""
    parts: tuple[str, str]
    """The streams that are read and aimed at."""
    loss: Callable[[Batch], Tensor | None]
    """The loss of a batch: the mean over its windows. None where it has set the gradients itself
    (of several processes: its part of the whole step's), or where the batch is empty. All processes
    call it, so it may add over them."""
    seed: int
    error: Callable[[], float] | None = None
    """The error on the validation text, as the weights are; None: it is not looked at on the
    way."""
    before: float = math.inf
    """What it was at the start."""
    in_parts: bool = False
    """Whether the loss may be asked for of a part of a step at a time: what the gradient of one
    part needs is freed before the next. It may not add over processes then."""


def descend(state: FitState, descent: Descent) -> int:
    """Adam with a cosine learning rate over `fit.epochs` passes of the text; the number of steps.

    A step takes the same number of windows from every source, and each tensor `fit.pull` times the
    learning rate of the way back to its start (decoupled from the gradient, as AdamW's decay is).
    Adam moves an entry that hardly matters on this text as far as any other; the pull takes those
    back, and keeps what the aligned weights know of other text.

    The error is looked at after each eighth of the way. Where it has grown to _HOPELESS times what
    it was, it is not expected to come below that again, and the descent ends there.
    """
    settings, parameters = state.recipe.fit, descent.parameters
    names, first = state.names, state.num_validation
    rows = {name: len(state.windows[name]) - first[name] for name in names}
    sequence = state.windows[names[0]].shape[1]
    # Of a newcomer's text no more in a step than where all experts are fitted: as many steps.
    each = max(1, WINDOWS_TOKENS // (sequence * len(state.recipe.expert_names)))
    num_steps = math.ceil(settings.epochs * sum(rows.values()) / (each * len(names)))
    generator = torch.Generator().manual_seed(state.recipe.calibration.seed + descent.seed)
    draws = {name: _draw(rows[name], each, generator) for name in names}
    # A step is a share of what a tensor's entries are worth, whatever the scale of the model.
    sizes = [float(tensor.detach().square().mean().sqrt()) for tensor in parameters]
    pieces = [tensor.detach().split(_rows_of_a_piece(tensor)) for tensor in parameters]
    groups = [{"params": list(each)} for each in pieces]
    start = [None if tensor is None else tensor.to(device()) for tensor in descent.start]
    warmup = min(_WARMUP, math.ceil(num_steps / _WARMUP_SHARE))
    # Fused, a step is three times as fast, and rounds in another order: not where all is float32.
    fused = product_dtype(device()) != torch.float32
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=fused or None)
    # Not after the last step: whoever asks for the descent looks then.
    looks = {math.ceil(num_steps * eighth / 8) for eighth in range(1, 8)} - {num_steps}
    for number in range(num_steps):
        rate = 0.5 * (1 + math.cos(math.pi * number / num_steps))
        rate *= settings.learning_rate * min(1.0, (number + 1) / warmup)
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = rate * size
        chosen = {name: next(draws[name]) + first[name] for name in names}
        batch = _part_of_step(state, chosen, descent.parts)
        for part in _in_parts(batch) if descent.in_parts else [batch]:
            loss = descent.loss(part)
            if loss is not None:
                windows = sum(len(numbers) for _, numbers, _, _ in part)
                (loss * (windows / (each * len(names)))).backward()
        _add_gradients(state.processes, parameters)
        _hand_gradients(parameters, pieces)
        optimizer.step()
        with torch.no_grad():
            for tensor, home in zip(parameters, start, strict=True):
                if home is not None:
                    tensor.lerp_(home, min(1.0, settings.pull * rate))
                tensor.grad = None  # a look takes memory of its own
        optimizer.zero_grad()
        if number + 1 in looks and descent.error is not None:
            error = descent.error()
            if not error <= _HOPELESS * descent.before:  # nor where it is NaN
                return number + 1
    return num_steps


def _rows_of_a_piece(tensor: Tensor) -> int:
    return max(1, _PIECE // tensor[0].numel())


def _hand_gradients(parameters: Sequence[Tensor], pieces: Sequence[Sequence[Tensor]]) -> None:
    """Give each piece of a tensor its part of the tensor's gradient."""
    for tensor, parts in zip(parameters, pieces, strict=True):
        if tensor.grad is not None:
            gradients = tensor.grad.split([len(part) for part in parts])
            for part, gradient in zip(parts, gradients, strict=True):
                part.grad = gradient


def _in_parts(batch: Batch) -> Iterator[Batch]:
    """A step's text in parts of no more than WINDOWS_TOKENS tokens, or of one source."""
    part: list[tuple[str, Tensor, Tensor, Tensor]] = []
    tokens = 0
    for each in batch:
        more = each[2].shape[:2].numel()
        if part and tokens + more > WINDOWS_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(each)
        tokens += more
    if part:
        yield part


def _part_of_step(state: FitState, chosen: Mapping[str, Tensor], parts: tuple[str, str]) -> Batch:
    """This process's part of a step's text. `chosen`: source -> numbers of windows. Whoever has a
    drawn window sends it round: to run it takes much longer, and so all have equally much to do."""
    processes = state.processes
    batch: list[tuple[str, Tensor, Tensor, Tensor]] = []
    for place, (name, numbers) in enumerate(chosen.items()):
        # The step's windows are dealt out one by one, over all sources.
        dealt = torch.arange(len(numbers)) + place * len(numbers)
        mine = dealt % processes.count == processes.number
        read, wanted = (_windows(state, state.stream(part, name), numbers) for part in parts)
        if bool(mine.all()):
            batch.append((name, numbers, read, wanted))
        elif bool(mine.any()):
            batch.append((name, numbers[mine], read[mine], wanted[mine]))
    return batch


def _windows(state: FitState, stream: Tensor, numbers: Tensor) -> Tensor:
    """Some windows of a stream, whichever processes have them."""
    processes = state.processes
    here = torch.where(numbers % processes.count == processes.number)[0]
    rows = stream[numbers[here] // processes.count].to(device())
    return processes.gather(rows, here, len(numbers))


def _add_gradients(processes: Processes, parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of all processes. A parameter that no process has one for (an expert
    that no token was sent to) is left without."""
    if processes.count == 1:
        return
    known = torch.tensor([parameter.grad is not None for parameter in parameters]).long()
    processes.add(known)
    for parameter, count in zip(parameters, known.tolist(), strict=True):
        if count:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            processes.add(gradient)
            parameter.grad = gradient


def _draw(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of row numbers: every row once, in a new order each time."""
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            waiting = torch.cat((waiting, torch.randperm(count, generator=generator)))
        yield waiting[:size]
        waiting = waiting[size:]
