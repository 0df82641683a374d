"""One layer of the new model, fitted to what the aligned sources compute (docs/harmonized.md).

Layer by layer, from the first: the new model's own residual stream comes in, the sources' streams
say what should come out, and each step is kept only where it lowers the error on calibration text
that was kept aside. In the order of the layer:

1. q, k and v by ridge regression from the new model's normed stream to the sources' q, k and v;
2. o from the new heads' outputs to what is missing to the sources' stream after attention;
3. the router, from the new model's own router inputs to the source of the text;
4. each expert on its own text: an input map for gate and up, then down from its neurons to what is
   missing to its source's stream after the layer;
5. local refinement: gradient steps on all of the layer's weights, under its real routing, toward
   the same streams. No gradient leaves the layer: its input and its target are constants.

After the last layer the output head is fitted in the same two ways. Nothing here depends on the
order of the sources: they are gone through by name.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from symphony_moe.building.least_squares import LeastSquares, Solution
from symphony_moe.building.router_init import hidden_router, regression_router, windows_for_router
from symphony_moe.errors import SourceError
from symphony_moe.model.families import DOWN, GATE, UP, Family, head_dim
from symphony_moe.model.layer import (
    WINDOWS_TOKENS,
    MixtureOfExperts,
    decoder_layer,
    device,
    gated_neurons,
    load_attention,
    load_dense_layer,
    observe,
    rms_norm,
    run_layer,
)
from symphony_moe.model.moe_layer import MoELayer
from symphony_moe.model.streams import Streams, Windows, windows_at_once
from symphony_moe.recipe.settings import Recipe

log = logging.getLogger(__name__)

_INPUT_NORM, _MIDDLE_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"


_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


_OUTPUT = "self_attn.o_proj.weight"


_WARMUP, _WARMUP_SHARE = 20, 5
"""Steps in which the refinement's learning rate rises, and at most one in so many of all."""


@dataclass(frozen=True)
class Calibration:
    """What stays the same from layer to layer."""

    recipe: Recipe
    family: Family
    configs: Mapping[str, PreTrainedConfig]
    """Each source's own."""
    anchor: str
    windows: Mapping[str, Windows]
    """Source -> calibration text of its domain: first what is kept aside, to judge by, then what
    is fitted on."""
    kept_aside: Mapping[str, int]
    """Source -> number of windows kept aside."""
    streams: Streams
    """`source/<name>`: the aligned source on its own text. `new/<name>`: the new model on it.
    `plain/<name>`: the plain mean on some of it."""
    known: Mapping[str, Tensor | None] = field(default_factory=dict)
    """Source -> which tokens of the shared vocabulary it has; None (or no entry): all."""
    positions: Mapping[str, Windows] = field(default_factory=dict)
    """Source -> the place of each token of its text in its document, 0 where one begins."""
    warned: set[tuple[str, str]] = field(default_factory=set)
    """What has been said, and need not be said of every layer."""

    @property
    def config(self) -> PreTrainedConfig:
        """The new model's dense counterpart: the anchor's config."""
        return self.configs[self.anchor]

    @property
    def names(self) -> list[str]:
        """The sources in the order in which everything here goes through them."""
        return sorted(self.windows)

    def aside(self, name: str) -> slice:
        """The windows of a source's text that are kept aside."""
        return slice(0, self.kept_aside[name])

    def fitted(self, name: str) -> slice:
        """The windows that are fitted on."""
        return slice(self.kept_aside[name], len(self.windows[name]))

    def asks(self, name: str, rows: slice | Tensor | int) -> Bool[Tensor, "*windows sequence"]:
        """Which tokens of some windows are asked what comes next: those that the same document
        goes on after, within the window. All, where the positions are not known."""
        places = self.positions.get(name)
        if places is None:  # no document ends anywhere
            return torch.ones_like(self.windows[name][rows], dtype=torch.bool)
        return torch.nn.functional.pad(places[rows][..., 1:] > 0, (0, 1))

    def plain_windows(self, name: str) -> int:
        """Windows that the plain mean runs on: those kept aside, and what its router is calibrated
        on."""
        return min(len(self.windows[name]), self.kept_aside[name] + self.router_windows(name))

    def router_windows(self, name: str) -> int:
        """Windows of a source's text that a router is calibrated on."""
        windows, sequence = self.windows[name].shape
        fitted = windows - self.kept_aside[name]
        return len(windows_for_router(len(self.windows), sequence, fitted))


def fit_layer(
    calibration: Calibration,
    layer: int,
    start: MoELayer,
    aligned: Mapping[str, Mapping[str, Tensor]],
) -> tuple[MoELayer, dict[str, Any]]:
    """A layer of the new model, and what was chosen and measured on the way.

    `start`: the fused layer, experts and router rows in the order of `calibration.names`.
    `aligned`: source -> its layer's tensors in the anchor's coordinates. The sources' streams are
    advanced past the layer; the new model's is not (see `advance_new`).
    """
    recipe = calibration.recipe
    refits = recipe.fits_layers
    note: dict[str, Any] = {}
    shared = dict(start.shared)
    if refits:
        _run_sources(calibration, layer, aligned)
        shared, note["attention"] = _fit_attention(calibration, layer, shared, aligned)
    _run_attention(calibration, layer, shared)
    router = start.router
    if recipe.fits_router:
        router = _fit_router(recipe, _router_inputs(calibration, shared, "new-middle"))
    moe = MoELayer(shared, start.experts, router)
    if refits:
        moe, note["experts"] = _fit_experts(calibration, layer, moe)
        if recipe.fit.epochs > 0:
            moe, note["refinement"] = _refine(calibration, layer, moe, start)
        for name in calibration.names:
            calibration.streams.swap(f"source/{name}", f"after/{name}")
    note["routing"] = _routing(calibration, layer, moe)
    return moe, note


@torch.no_grad()
def _routing(calibration: Calibration, layer: int, moe: MoELayer) -> dict[str, Any]:
    """Of the text kept aside, all sources' together: each expert's share of the tokens' choices,
    and the share of tokens whose first choice is the source of their text."""
    attention = load_attention(calibration.config, layer, moe.shared)
    top_k = calibration.recipe.router.top_k
    chosen, right = torch.zeros(len(calibration.names)), 0.0
    for number, name in enumerate(calibration.names):
        new = calibration.streams[f"new/{name}"][calibration.aside(name)]
        counts, own = torch.zeros_like(chosen), 0
        for window in new.split(1):
            middle = run_layer(attention, window)
            x = _normed(calibration.config, moe.shared, _MIDDLE_NORM, middle).flatten(0, 1)
            choices = (x @ moe.router.to(x).T).topk(top_k, dim=-1).indices.cpu()
            counts += torch.bincount(choices.flatten(), minlength=len(chosen))
            own += int((choices[:, 0] == number).sum())
        chosen += counts / counts.sum() / len(chosen)
        right += own / (new.shape[0] * new.shape[1]) / len(chosen)
    shares = zip(calibration.names, chosen.tolist(), strict=True)
    return {
        "share": {name: round(share, 6) for name, share in shares},
        "first_choice_is_source": round(right, 6),
    }


def begin_streams(calibration: Calibration) -> None:
    """Make room for the streams that live within a layer."""
    parts = ["new-middle"]
    if calibration.recipe.fits_layers:
        parts += ["middle", "after"]
    for name in calibration.names:
        windows, sequence = calibration.windows[name].shape
        for part in parts:
            hidden = calibration.config.hidden_size
            calibration.streams.new(f"{part}/{name}", windows, sequence, hidden)


@torch.no_grad()
def advance_sources(
    calibration: Calibration, layer: int, aligned: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Bring the sources' streams past a layer that is finished."""
    for name in calibration.names:
        model = load_dense_layer(calibration.configs[name], layer, aligned[name])
        for hidden in calibration.streams.batches(f"source/{name}"):
            hidden.copy_(run_layer(model, hidden))


@torch.no_grad()
def advance_new(calibration: Calibration, layer: int, moe: MoELayer, stream: str = "new") -> None:
    """Bring the new model's streams (or another's) past a finished layer: attention, then the
    experts under their real routing."""
    run = _runner(calibration, layer, moe)
    for name in calibration.names:
        for hidden in calibration.streams.batches(f"{stream}/{name}"):
            hidden.copy_(run(hidden))


@torch.no_grad()
def calibrate_plain(calibration: Calibration, layer: int, plain: MoELayer) -> Tensor:
    """The router of the plain mean, calibrated on its own router inputs where the recipe asks for
    that."""
    if not calibration.recipe.fits_router:
        return plain.router
    attention = load_attention(calibration.config, layer, plain.shared)
    inputs = []
    for name in calibration.names:
        rows = []
        for hidden in calibration.streams[f"plain/{name}"][calibration.kept_aside[name] :].split(1):
            middle = run_layer(attention, hidden)
            rows.append(_normed(calibration.config, plain.shared, _MIDDLE_NORM, middle))
        inputs.append(torch.cat(rows).flatten(0, 1))
    return _fit_router(calibration.recipe, inputs)


def _run_sources(
    calibration: Calibration, layer: int, aligned: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """`middle/` and `after/` of every source: the targets."""
    streams = calibration.streams
    with torch.no_grad():
        for name in calibration.names:
            model = load_dense_layer(calibration.configs[name], layer, aligned[name])
            batches = (streams.batches(f"{part}/{name}") for part in ("source", "middle", "after"))
            for before, middle, after in zip(*batches, strict=True):
                with observe(model) as seen:
                    after.copy_(run_layer(model, before))
                middle.copy_(seen["middle"])
                if not bool(torch.isfinite(after).all()):
                    raise SourceError(
                        f"{name}: layer {layer} puts out values that are not finite on the "
                        "calibration text; the weights are damaged or overflow float32"
                    )


def _run_attention(calibration: Calibration, layer: int, shared: Mapping[str, Tensor]) -> None:
    """`new-middle/`: the new model's stream between attention and experts."""
    streams = calibration.streams
    model = load_attention(calibration.config, layer, shared)
    with torch.no_grad():
        for name in calibration.names:
            batches = (streams.batches(f"{part}/{name}") for part in ("new", "new-middle"))
            for before, middle in zip(*batches, strict=True):
                middle.copy_(run_layer(model, before))


def _normed(
    config: PreTrainedConfig, tensors: Mapping[str, Tensor], norm: str, hidden: Tensor
) -> Tensor:
    hidden = hidden.to(device())
    return rms_norm(hidden, tensors[norm].to(hidden), config.rms_norm_eps)


def to_fit(
    calibration: Calibration, *parts: str, only: str | None = None
) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """(source, a batch of each of some streams) over the text that is fitted on: all sources', or
    that of `only` one."""
    for name in calibration.names if only is None else [only]:
        rows = calibration.fitted(name)
        streams = [calibration.streams[f"{part}/{name}"][rows] for part in parts]
        size = windows_at_once(streams[0].shape[1])
        for batches in zip(*(stream.split(size) for stream in streams), strict=True):
            yield name, tuple(batch.to(device()) for batch in batches)


@torch.no_grad()
def _fit_attention(
    calibration: Calibration,
    layer: int,
    start: Mapping[str, Tensor],
    aligned: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """q, k, v, then o, on all sources' text together."""
    config = calibration.config
    names = [f"{part}.weight" for part in _PARTS]
    biases = [f"{part}.bias" for part in _PARTS]
    has_bias = biases[0] in start
    sizes = [len(start[name]) for name in names]
    sums = LeastSquares(config.hidden_size, sum(sizes), intercept=has_bias, device=device())
    for name, (new, source) in to_fit(calibration, "new", "source"):
        wanted = _attention_targets(calibration.configs[name], aligned[name], start, source)
        sums.update(_normed(config, start, _INPUT_NORM, new).flatten(0, 1), wanted)
    begin = torch.cat([start[name] for name in names])
    intercept = torch.cat([start[name] for name in biases]) if has_bias else None
    fit = solve(calibration, sums, begin, "q, k and v", intercept)
    fitted = dict(start)
    fitted |= dict(zip(names, fit.weight.cpu().split(sizes), strict=True))
    if fit.intercept is not None:
        fitted |= dict(zip(biases, fit.intercept.cpu().split(sizes), strict=True))

    model = load_attention(config, layer, fitted)
    width = start[_OUTPUT].shape[1]
    outputs = LeastSquares(width, config.hidden_size, device=device())
    for _, (new, middle) in to_fit(calibration, "new", "middle"):
        with observe(model) as seen:
            run_layer(model, new)
        outputs.update(seen["heads"].flatten(0, 1), (middle - new).flatten(0, 1))
    second = solve(calibration, outputs, start[_OUTPUT], "o")
    fitted[_OUTPUT] = second.weight.cpu()

    errors = []
    for candidate in (start, fitted):
        run = partial(run_layer, load_attention(config, layer, candidate))
        errors.append(_error(calibration, "middle", run))
    note = judged(errors) | described({"q, k and v": fit, "o": second})
    return (fitted if note["kept"] else dict(start)), note


def _attention_targets(
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    hidden: Tensor,
) -> Float[Tensor, "tokens outputs"]:
    """A source's q, k and v before RoPE, side by side. Where a family norms q and k per head, the
    norm takes any scale: the target is the source's normed q in terms of the new model's gain."""
    normed = _normed(config, tensors, _INPUT_NORM, hidden).flatten(0, 1)
    targets = []
    for part in _PARTS:
        bias = tensors.get(f"{part}.bias")
        rows = torch.nn.functional.linear(
            normed,
            tensors[f"{part}.weight"].to(normed),
            None if bias is None else bias.to(normed),
        )
        norm = part.replace("_proj", "_norm") + ".weight"
        if norm in tensors:
            heads = rows.unflatten(1, (-1, head_dim(config)))
            gain = start[norm].to(rows)
            own = tensors[norm].to(rows)
            ratio = torch.where(gain.abs() > 1e-3, own / gain, torch.ones_like(gain))
            rows = rms_norm(heads, ratio, config.rms_norm_eps).flatten(1)
        targets.append(rows)
    return torch.cat(targets, dim=1)


def _router_inputs(
    calibration: Calibration, shared: Mapping[str, Tensor], stream: str
) -> list[Float[Tensor, "_ hidden"]]:
    """For each source, the new model's router inputs on windows spread over its text."""
    inputs = []
    for name in calibration.names:
        middle = calibration.streams[f"{stream}/{name}"][calibration.fitted(name)]
        chosen = windows_for_router(len(calibration.names), middle.shape[1], len(middle))
        middle = middle[:: chosen.step]
        inputs.append(_normed(calibration.config, shared, _MIDDLE_NORM, middle).flatten(0, 1))
    return inputs


def _fit_router(recipe: Recipe, inputs: Sequence[Tensor]) -> Tensor:
    method = hidden_router if recipe.router.init == "hidden" else regression_router
    return method([rows.clone() for rows in inputs], recipe.router.temperature).cpu()


@torch.no_grad()
def _fit_experts(
    calibration: Calibration, layer: int, start: MoELayer
) -> tuple[MoELayer, dict[str, Any]]:
    """Each expert on its own source's text."""
    config = calibration.config
    hidden, activation = config.hidden_size, ACT2FN[config.hidden_act]
    identity = torch.eye(hidden, device=device())
    experts: list[dict[str, Tensor]] = []
    fits: dict[str, Solution] = {}
    for name, expert in zip(calibration.names, start.experts, strict=True):
        expert = {key: tensor.to(device()) for key, tensor in expert.items()}
        inputs = LeastSquares(hidden, hidden, device=device())
        for _, pair in to_fit(calibration, "new-middle", "middle", only=name):
            whose = (config, calibration.configs[name])
            rows = (
                _normed(each, start.shared, _MIDDLE_NORM, stream)
                for each, stream in zip(whose, pair, strict=True)
            )
            inputs.update(*(x.flatten(0, 1) for x in rows))
        bend = solve(calibration, inputs, identity, f"input map of {name}")
        expert |= {key: expert[key] @ bend.weight for key in (GATE, UP)}
        fits[f"input map of {name}"] = bend

        outputs = LeastSquares(config.intermediate_size, hidden, device=device())
        for _, (new, after) in to_fit(calibration, "new-middle", "after", only=name):
            x = _normed(config, start.shared, _MIDDLE_NORM, new).flatten(0, 1)
            outputs.update(gated_neurons(expert, x, activation), (after - new).flatten(0, 1))
        down = solve(calibration, outputs, expert[DOWN], f"down_proj of {name}")
        expert[DOWN] = down.weight
        fits[f"down_proj of {name}"] = down
        experts.append({key: tensor.cpu() for key, tensor in expert.items()})
    fitted = MoELayer(start.shared, experts, start.router)
    note = judged(_layer_errors(calibration, layer, start, fitted))
    return (fitted if note["kept"] else start), note | described(fits)


def described(fits: Mapping[str, Solution]) -> dict[str, Any]:
    """For `metrics.json`: the condition and the ridge of each regression, by what it fits."""
    return {
        "condition": {what: fit.condition for what, fit in fits.items()},
        "ridge": {what: fit.ridge for what, fit in fits.items()},
    }


def solve(
    calibration: Calibration,
    sums: LeastSquares,
    start: Tensor,
    what: str,
    intercept: Tensor | None = None,
) -> Solution:
    """The fit, with a warning (once for every `what`) where the text does not determine it."""
    ridge = calibration.recipe.fit.ridge
    fit = sums.solve(start, ridge, intercept)
    problems = {}
    if sums.is_underdetermined():
        problems["text"] = (
            f"{sums.count:,} calibration tokens for {len(sums.gram):,} unknowns per output; what "
            "they leave open stays as it was. Raise calibration.tokens"
        )
    if fit.ridge == math.inf:
        nothing = not bool(sums.gram.diagonal().any())
        problems["ridge"] = (
            "its inputs are all zero, so there is nothing to fit"
            if nothing
            else "ill-conditioned, whatever the ridge; it stays as it was"
        )
    elif fit.ridge != ridge:
        problems["ridge"] = (
            f"ill-conditioned; the ridge was raised to {fit.ridge:.0e} (other layers: metrics.json)"
        )
    for kind, problem in problems.items():
        if (what, kind) not in calibration.warned:
            calibration.warned.add((what, kind))
            log.warning("fit of %s: %s", what, problem)
    return fit


def _refine(
    calibration: Calibration, layer: int, start: MoELayer, aligned: MoELayer
) -> tuple[MoELayer, dict[str, Any]]:
    """Gradient steps on one layer's weights, toward the sources' streams after it; pulled toward
    the `aligned` ones, where the fit began."""
    shared = {name: tensor.clone() for name, tensor in start.shared.items()}
    attention = load_attention(calibration.config, layer, shared)
    family = calibration.family
    learned: dict[str, Tensor] = {
        name: parameter
        for name, parameter in decoder_layer(attention).named_parameters()
        if name in family.attention + family.vectors
    }
    mixture = _mixture(
        calibration,
        MoELayer(
            {}, [{k: v.clone() for k, v in e.items()} for e in start.experts], start.router.clone()
        ),
    )
    parameters = [*learned.values(), mixture.router]
    toward = [
        *(aligned.shared[name] for name in learned),
        None,
    ]  # the router has no aligned weights
    for expert, own in zip(mixture.experts, aligned.experts, strict=True):
        parameters += list(expert.values())
        toward += [own[name] for name in expert]
    for parameter in parameters:
        parameter.requires_grad_(True)
    gain = start.shared[_MIDDLE_NORM]

    def step(batch: Sequence[tuple[str, Tensor, Tensor, Tensor]]) -> Tensor:
        before = torch.cat([x for _, _, x, _ in batch])
        wanted = torch.cat([y for _, _, _, y in batch])
        middle = run_layer(attention, before)
        x = rms_norm(middle, gain.to(middle), calibration.config.rms_norm_eps)
        return _relative_error(middle + mixture(x), wanted)

    steps = descend(calibration, parameters, toward, ("new", "after"), step, seed=layer)
    refined = MoELayer(
        {**start.shared, **{name: tensor.detach().cpu() for name, tensor in learned.items()}},
        [{k: v.detach().cpu() for k, v in expert.items()} for expert in mixture.experts],
        mixture.router.detach().cpu(),
    )
    note = judged(_layer_errors(calibration, layer, start, refined))
    return (refined if note["kept"] else start), note | {"steps": steps}


def descend(
    calibration: Calibration,
    parameters: Sequence[Tensor],
    toward: Sequence[Tensor | None],
    parts: tuple[str, str],
    loss_of: Callable[[Sequence[tuple[str, Tensor, Tensor, Tensor]]], Tensor | None],
    *,
    seed: int,
) -> int:
    """Adam with a cosine learning rate over `fit.epochs` passes of the text; the number of steps.

    A step takes the same number of windows from every source, and each tensor `fit.pull` times
    the learning rate of the way to its counterpart in `toward` (decoupled from the gradient, as
    AdamW's decay is). Adam moves an entry that hardly matters on this text as far as any other; the
    pull takes those back, and keeps what the aligned weights know of other text. `loss_of`:
    (source, windows' numbers, input, target) batches -> loss (or None, where it has set the
    gradients itself).
    """
    settings = calibration.recipe.fit
    names = calibration.names
    first = calibration.kept_aside
    rows = {name: len(calibration.windows[name]) - first[name] for name in names}
    sequence = calibration.windows[names[0]].shape[1]
    each = max(1, WINDOWS_TOKENS // (sequence * len(names)))
    num_steps = math.ceil(settings.epochs * sum(rows.values()) / (each * len(names)))
    generator = torch.Generator().manual_seed(calibration.recipe.calibration.seed + seed)
    draws = {name: _draw(rows[name], each, generator) for name in names}
    # A step is a share of what a tensor's entries are worth, whatever the scale of the model.
    sizes = [float(tensor.detach().square().mean().sqrt()) for tensor in parameters]
    groups = [{"params": [tensor]} for tensor in parameters]
    toward = [None if tensor is None else tensor.to(device()) for tensor in toward]
    warmup = min(_WARMUP, math.ceil(num_steps / _WARMUP_SHARE))
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    for number in range(num_steps):
        rate = 0.5 * (1 + math.cos(math.pi * number / num_steps))
        rate *= settings.learning_rate * min(1.0, (number + 1) / warmup)
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = rate * size
        batch = []
        for name in names:
            chosen = next(draws[name]) + first[name]
            new, wanted = (calibration.streams[f"{part}/{name}"][chosen] for part in parts)
            batch.append((name, chosen, new.to(device()), wanted.to(device())))
        optimizer.zero_grad()
        loss = loss_of(batch)
        if loss is not None:
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            for tensor, home in zip(parameters, toward, strict=True):
                if home is not None:
                    tensor.lerp_(home, min(1.0, settings.pull * rate))
    return num_steps


def _draw(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of row numbers: every row once, in a new order each time."""
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            waiting = torch.cat((waiting, torch.randperm(count, generator=generator)))
        yield waiting[:size]
        waiting = waiting[size:]


def _mixture(calibration: Calibration, moe: MoELayer) -> MixtureOfExperts:
    activation = ACT2FN[calibration.config.hidden_act]
    return MixtureOfExperts(moe.experts, moe.router, calibration.recipe.router.top_k, activation)


def _runner(calibration: Calibration, layer: int, moe: MoELayer) -> Callable[[Tensor], Tensor]:
    """The new model's layer, under its real routing: residual stream -> residual stream."""
    attention = load_attention(calibration.config, layer, moe.shared)
    mixture = _mixture(calibration, moe)

    def run(hidden: Tensor) -> Tensor:
        middle = run_layer(attention, hidden)
        return middle + mixture(_normed(calibration.config, moe.shared, _MIDDLE_NORM, middle))

    return run


@torch.no_grad()
def _layer_errors(calibration: Calibration, layer: int, *candidates: MoELayer) -> list[float]:
    return [_error(calibration, "after", _runner(calibration, layer, moe)) for moe in candidates]


def _error(calibration: Calibration, target: str, run: Callable[[Tensor], Tensor]) -> float:
    """Mean over the sources of the relative error on the text kept aside: of what `run` makes of
    the new model's stream, against the source's stream `target`."""
    errors = []
    for name in calibration.names:
        rows, total = calibration.aside(name), 0.0
        streams = (calibration.streams[f"{part}/{name}"][rows] for part in ("new", target))
        for new, wanted in zip(*(stream.split(1) for stream in streams), strict=True):
            total += float(_relative_error(run(new), wanted.to(device())))
        errors.append(total / calibration.kept_aside[name])
        _name_overflow(calibration, name, calibration.streams[f"{target}/{name}"][rows])
    return sum(errors) / len(errors)


def _name_overflow(calibration: Calibration, name: str, stream: Tensor) -> None:
    """Warn, once, of a source whose stream has no length in float32: no error is a number then."""
    lengths = stream.square().sum(dim=-1)
    if not bool(torch.isfinite(lengths).all()) and (name, "overflow") not in calibration.warned:
        calibration.warned.add((name, "overflow"))
        log.warning(
            "%s: its residual stream is too large to be compared with in float32, so no fit is "
            "kept; look at its weights",
            name,
        )


def _relative_error(
    found: Float[Tensor, "windows sequence hidden"],
    wanted: Float[Tensor, "windows sequence hidden"],
) -> Float[Tensor, ""]:
    """Mean over tokens of the squared distance over the squared length of the target."""
    lengths = wanted.square().sum(dim=-1).clamp_min(1e-12)
    return ((found - wanted).square().sum(dim=-1) / lengths).mean()


def judged(errors: Sequence[float]) -> dict[str, Any]:
    """What a step did to the error on the text kept aside, and whether it is kept."""
    before, after = errors
    return {"error": [round(before, 6), round(after, 6)], "kept": bool(before - after > 1e-6)}
