"""One layer of the new model, fitted to what the aligned sources compute (docs/harmonized.md).

Layer by layer, from the first: the new model's own residual stream comes in, the sources' streams
say what should come out, and each step is kept only where it lowers the error on the validation
text. In the order of the layer:

1. q, k and v by ridge regression from the new model's normed stream to the sources' q, k and v;
2. o from the new heads' outputs to what is missing to the sources' stream after attention;
3. the router, from the new model's own router inputs to the source of the text;
4. each expert on its own text: an input map for gate and up, then down from its neurons to what is
   missing to its source's stream after the layer;
5. local refinement: gradient steps on all of the layer's weights, under its real routing, toward
   the same streams. No gradient leaves the layer: its target is a constant, and so is its input,
   but for that of the first layer. The token embeddings learn with that one.

After the last layer the output head is fitted in the same two ways; the last layers learn with it
(`fit_head.py`). Nothing here depends on the order of the sources: they are gone through by name.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig

from symphony_moe.building.fitting import (
    AFTER,
    MIDDLE,
    NEW,
    NEW_BEFORE_END,
    NEW_MIDDLE,
    PLAIN,
    SOURCE,
    Batch,
    Descent,
    FitState,
    Regression,
    Step,
    descend,
    solve,
    solve_all,
)
from symphony_moe.building.learned_layer import LearnedLayer, mixture_of
from symphony_moe.building.least_squares import LeastSquares, Solution
from symphony_moe.building.router_init import hidden_router, regression_router, ridge_router
from symphony_moe.errors import SourceError
from symphony_moe.model.checkpoint import as_written
from symphony_moe.model.families import DOWN, EMBEDDING, FAMILIES, GATE, UP, head_dim
from symphony_moe.model.layer import (
    activation_of,
    after_ffn,
    attention_input,
    device,
    ffn_input,
    gated_neurons,
    load_attention,
    load_dense_layer,
    observe,
    rms_norm,
    run_layer,
    wanted_of,
)
from symphony_moe.model.moe_layer import DENSE, MoELayer, dense_layer, router_matrix, router_rows
from symphony_moe.model.precision import exact, float32_results
from symphony_moe.model.streams import in_batches

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTPUT, _OUTPUT_BIAS = "self_attn.o_proj.weight", "self_attn.o_proj.bias"

Rows = Mapping[str, Float[Tensor, " hidden"]]
"""A router: source -> its row."""
Aligned = Mapping[str, Mapping[str, Tensor]]
"""Source -> its layer's tensors in the anchor's coordinates."""


@dataclass(frozen=True)
class ValidationRouting:
    """Where a layer's router sends the validation text, all sources' together."""

    share: Mapping[str, float]
    """Each expert's share of the tokens' choices."""
    first_choice_is_source: float
    """Share of the tokens whose first choice is the source of their text."""

    def to_json(self) -> dict[str, Any]:
        """For `metrics.json`."""
        return {
            "share": {name: round(share, 6) for name, share in self.share.items()},
            "first_choice_is_source": round(self.first_choice_is_source, 6),
        }


@dataclass(frozen=True)
class LayerFit:
    """What was measured while a layer was fitted. A step that was not taken is None."""

    routing: ValidationRouting | None = None
    """None where a layer has no experts."""
    attention: Step | None = None
    experts: Step | None = None
    refinement: Step | None = None

    def to_json(self) -> dict[str, Any]:
        """For `metrics.json`."""
        steps = {
            "attention": self.attention,
            "experts": self.experts,
            "refinement": self.refinement,
        }
        found = {name: step.to_json() for name, step in steps.items() if step is not None}
        if self.routing is None:
            return found
        return found | {"routing": self.routing.to_json()}


def fit_layer(
    state: FitState, layer: int, start: MoELayer, aligned: Aligned
) -> tuple[MoELayer, LayerFit]:
    """A layer of the new model, and what was measured on the way.

    `start`: the fused layer. The sources' streams are advanced past the layer; the new model's is
    not (see `advance`). Raises SourceError for a source that puts out NaN or infinite values.
    """
    with state.products():
        return _fit(state, layer, start, aligned)


def _fit(
    state: FitState, layer: int, start: MoELayer, aligned: Aligned
) -> tuple[MoELayer, LayerFit]:
    recipe, part = state.recipe, state.fitted_part
    shared, attention, experts, refinement = dict(start.shared), None, None, None
    if recipe.fits_layers:
        _run_sources(part, layer, aligned)
        if state.newcomer is None:
            shared, attention = _fit_attention(state, layer, shared, aligned)
    _run_attention(state, layer, shared)
    router = start.router
    if recipe.fits_router and not start.is_dense:
        router = _fit_router(state, _router_inputs(state, shared))
    moe = replace(start, shared=shared, router=router)
    if recipe.fits_layers and not (start.is_dense and state.newcomer):
        moe, experts = (_fit_dense if start.is_dense else _fit_experts)(part, layer, moe)
        if recipe.fit.epochs > 0:
            moe, refinement = _refine(part, layer, moe, start, experts.error)
    if recipe.fits_layers:
        for name in part.names:
            state.streams.swap(f"{SOURCE}/{name}", f"{AFTER}/{name}")
    routing = None if moe.is_dense else validation_routing(state, layer, moe)
    return moe, LayerFit(routing, attention, experts, refinement)


@torch.no_grad()
def validation_routing(state: FitState, layer: int, moe: MoELayer) -> ValidationRouting:
    """Where the router of a layer sends the validation text, which has come to it."""
    attention = load_attention(state.config, layer, moe.shared)
    router, top_k = router_matrix(moe.router, state.names), state.recipe.router.top_k
    chosen, right = torch.zeros(len(state.names)), 0.0
    for number, name in enumerate(state.names):
        new = state.stream(NEW, name)[state.validation(name)]
        counts, own = torch.zeros(len(state.names), dtype=torch.int64), 0
        for window in in_batches(new, 1):
            middle = run_layer(attention, window)
            x = ffn_input(state.config, moe.shared, middle).flatten(0, 1)
            with exact(device()):
                choices = (x @ router.to(x).T).topk(top_k, dim=-1).indices.cpu()
            counts += torch.bincount(choices.flatten(), minlength=len(chosen))
            own += int((choices[:, 0] == number).sum())
        state.processes.add(counts)
        tokens = state.num_validation[name] * new.shape[1]
        chosen += counts / counts.sum() / len(chosen)
        right += state.processes.total(own) / tokens / len(chosen)
    return ValidationRouting(dict(zip(state.names, chosen.tolist(), strict=True)), right)


def begin_streams(state: FitState) -> None:
    """Make room for the streams that live within a layer."""
    fitted = state.fitted_part.names if state.recipe.fits_layers else []
    for name in state.names:
        windows, sequence = len(state.numbers(name)), state.windows[name].shape[1]
        parts = [NEW_MIDDLE, MIDDLE, AFTER] if name in fitted else [NEW_MIDDLE]
        if state.recipe.layers_with_head:
            parts.append(NEW_BEFORE_END)
        for part in parts:
            hidden = state.config.hidden_size
            state.streams.new(f"{part}/{name}", windows, sequence, hidden)


@torch.no_grad()
def keep_before_end(state: FitState) -> None:
    """Keep the new model's streams, which have come to the last layers."""
    for name in state.names:
        for before, kept in state.batches(name, NEW, NEW_BEFORE_END, reads=1):
            kept.copy_(before)


def go_back_before_end(state: FitState) -> None:
    """Bring the new model's streams back to where they were before the last layers."""
    for name in state.names:
        state.streams.swap(f"{NEW}/{name}", f"{NEW_BEFORE_END}/{name}")


@torch.no_grad()
def advance_sources(state: FitState, layer: int, aligned: Aligned) -> None:
    """Bring the sources' streams past a layer that is finished."""
    with state.products():
        for name in state.fitted_part.names:
            model = load_dense_layer(state.configs[name], layer, aligned[name])
            for (hidden,) in state.batches(name, SOURCE):
                hidden.copy_(run_layer(model, hidden))


@torch.no_grad()
def advance_on_validation(state: FitState, layer: int, moe: MoELayer) -> None:
    """Bring the new model's streams past a layer, as far as they are of validation text."""
    attention = load_attention(state.config, layer, moe.shared)
    run = _runner(state, attention, moe, state.names)
    with state.products():
        for name in state.names:
            for (hidden,) in state.streams.visit(f"{NEW}/{name}", rows=state.validation(name)):
                hidden.copy_(run(hidden))


@torch.no_grad()
def advance(state: FitState, layer: int, moe: MoELayer, part: str) -> None:
    """Bring the streams of a model, NEW or PLAIN, past one of its layers: attention, then the
    experts under their real routing. Where the recipe routes by source, the text that a router is
    fitted on goes through its source's expert instead."""
    attention = load_attention(state.config, layer, moe.shared)
    routed = _runner(state, attention, moe, state.names)
    with state.products():
        for name in state.names:
            parts = [(slice(None), routed)]
            if state.recipe.routes_by_source and not moe.is_dense:
                own = _runner(state, attention, moe, [name])
                parts = [(state.validation(name), routed), (state.fitted(name), own)]
            for rows, run in parts:
                for (hidden,) in state.streams.visit(f"{part}/{name}", rows=rows):
                    hidden.copy_(run(hidden))


@torch.no_grad()
def calibrate_plain(state: FitState, layer: int, plain: MoELayer) -> Rows:
    """The router of the plain mean, calibrated on its own router inputs where the recipe asks for
    that."""
    if plain.is_dense or not state.recipe.fits_router:
        return plain.router
    attention = load_attention(state.config, layer, plain.shared)
    inputs = {}
    for name in state.names:
        first, stop = state.num_validation[name], state.plain_windows(name)
        stream = state.stream(PLAIN, name)
        rows = torch.empty_like(stream[state.validation(name).stop :], device=device())
        for row, hidden in enumerate(in_batches(stream[state.validation(name).stop :], 1)):
            middle = run_layer(attention, hidden)
            rows[row : row + 1] = ffn_input(state.config, plain.shared, middle)
        places = state.numbers(name)[state.fitted(name)][: len(rows)] - first
        inputs[name] = state.processes.gather(rows, places, stop - first).flatten(0, 1)
    return _fit_router(state, inputs)


def _run_sources(state: FitState, layer: int, aligned: Aligned) -> None:
    """MIDDLE and AFTER of every source: the targets."""
    with torch.no_grad():
        for name in state.names:
            model = load_dense_layer(state.configs[name], layer, aligned[name])
            finite = torch.ones((), dtype=torch.bool, device=device())
            for before, middle, after in state.batches(name, SOURCE, MIDDLE, AFTER, reads=1):
                with observe(model) as seen:
                    after.copy_(run_layer(model, before))
                middle.copy_(seen["middle"])
                finite &= torch.isfinite(after).all()
            if not bool(finite):
                raise SourceError(
                    f"{name}: layer {layer} puts out values that are NaN or infinite "
                    "on the calibration text; the weights are damaged or overflow float32"
                )


def _run_attention(state: FitState, layer: int, shared: Mapping[str, Tensor]) -> None:
    """NEW_MIDDLE: the new model's stream between attention and experts."""
    model = load_attention(state.config, layer, shared)
    with torch.no_grad():
        for name in state.names:
            for before, middle in state.batches(name, NEW, NEW_MIDDLE, reads=1):
                middle.copy_(run_layer(model, before))


@torch.no_grad()
def _fit_attention(
    state: FitState,
    layer: int,
    start: Mapping[str, Tensor],
    aligned: Aligned,
) -> tuple[dict[str, Tensor], Step]:
    """q, k, v, then o, on all sources' text together."""
    config = state.config
    projections, solutions = _fit_projections(state, start, aligned)
    fitted = {**start, **projections}

    model = load_attention(config, layer, fitted)
    second = _fit_output(state, model, start)
    fitted[_OUTPUT] = second.weight.cpu()
    if second.intercept is not None:
        fitted[_OUTPUT_BIAS] = second.intercept.cpu()

    before, after = (
        _error(state, MIDDLE, partial(run_layer, load_attention(config, layer, candidate)))
        for candidate in (start, fitted)
    )
    step = Step(before, after, {**solutions, "o": second})
    return (fitted if step.kept else dict(start)), step


def _fit_projections(
    state: FitState, start: Mapping[str, Tensor], aligned: Aligned
) -> tuple[dict[str, Tensor], dict[str, Solution]]:
    """q, k and v with their biases, and the regressions that gave them: of heads that all sources
    share one on the text of all, of concatenated heads one for each source's, on its own text."""
    matrices = [f"{part}.weight" for part in _PARTS]
    biases = [bias for part in _PARTS if (bias := f"{part}.bias") in start]
    groups, whose = [state.names], [""]
    if state.recipe.concatenates_heads:
        groups, whose = [[name] for name in state.names], [f" of {name}" for name in state.names]
    blocks = [
        {name: start[name].chunk(len(groups))[place] for name in (*matrices, *biases)}
        for place in range(len(groups))
    ]

    def regressions() -> Iterator[Regression]:
        for group, of, block in zip(groups, whose, blocks, strict=True):
            start_at = torch.cat([block[name] for name in matrices])
            size = state.config.hidden_size, len(start_at)
            sums = LeastSquares(*size, intercept=bool(biases), device=device())
            _add_projections(state, start, aligned, group, sums)
            intercept = torch.cat([block[name] for name in biases]) if biases else None
            yield Regression(sums, start_at, f"q, k and v{of}", intercept)

    solved = solve_all(state, regressions())
    for block, solution in zip(blocks, solved, strict=True):
        sizes = [len(block[name]) for name in matrices]
        block |= zip(matrices, solution.weight.cpu().split(sizes), strict=True)
        if solution.intercept is not None:
            block |= zip(biases, solution.intercept.cpu().split(sizes), strict=True)
    fitted = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return fitted, {f"q, k and v{of}": each for of, each in zip(whose, solved, strict=True)}


def _add_projections(
    state: FitState,
    start: Mapping[str, Tensor],
    aligned: Aligned,
    names: Sequence[str],
    sums: LeastSquares,
) -> None:
    """Add what q, k and v of some sources are on their text."""
    for name in names:
        for _, (new, source) in state.to_fit(NEW, SOURCE, only=name):
            wanted = _attention_targets(state.configs[name], aligned[name], start, source)
            sums.update(attention_input(state.config, start, new).flatten(0, 1), wanted)


def _fit_output(state: FitState, model: "PreTrainedModel", start: Mapping[str, Tensor]) -> Solution:
    """o, from the heads of the fitted q, k and v (`model`) to what is missing to the sources'
    streams."""
    config, norms = state.config, state.family.norms_after
    gain = None if norms is None else start[norms[0]]
    weight, bias = start[_OUTPUT], start.get(_OUTPUT_BIAS)
    size = weight.shape[1], config.hidden_size
    outputs = LeastSquares(*size, intercept=bias is not None, device=device())
    own, added = weight.to(device()), None if bias is None else bias.to(device())
    for _, (new, middle) in state.to_fit(NEW, MIDDLE):
        with observe(model) as seen:
            run_layer(model, new)
        heads = seen["heads"].flatten(0, 1)
        now = None if gain is None else torch.nn.functional.linear(heads, own, added)
        outputs.update(heads, wanted_of(config, gain, (middle - new).flatten(0, 1), now))
    return solve(state, outputs, weight, "o", bias)


def _attention_targets(
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    hidden: Tensor,
) -> Float[Tensor, "tokens outputs"]:
    """A source's q, k and v before RoPE, side by side. Where a family norms q and k per head, the
    norm takes any scale: the target is the source's normed q in terms of the new model's gain."""
    normal = attention_input(config, tensors, hidden).flatten(0, 1)
    whole = FAMILIES[config.model_type].head_norms == "whole"
    targets = []
    for part in _PARTS:
        bias = tensors.get(f"{part}.bias")
        with float32_results(device()):
            rows = torch.nn.functional.linear(
                normal,
                tensors[f"{part}.weight"].to(normal),
                None if bias is None else bias.to(normal),
            )
        norm = part.replace("_proj", "_norm") + ".weight"
        if norm in tensors:
            heads = rows.unflatten(1, (1, -1) if whole else (-1, head_dim(config)))
            gain = start[norm].to(rows)
            own = tensors[norm].to(rows)
            ratio = torch.where(gain.abs() > 1e-3, own / gain, torch.ones_like(gain))
            rows = rms_norm(heads, ratio, config.rms_norm_eps).flatten(1)
        targets.append(rows)
    return torch.cat(targets, dim=1)


def _router_inputs(
    state: FitState, shared: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "_ hidden"]]:
    """Source -> the new model's router inputs on windows spread over its text."""
    inputs = {}
    for name in state.names:
        chosen, numbers = state.spread_windows(name), state.numbers(name)
        here = [row for row, number in enumerate(numbers.tolist()) if number in chosen]
        middle = state.stream(NEW_MIDDLE, name)[here]
        places = (numbers[here] - chosen.start) // chosen.step
        rows = ffn_input(state.config, shared, middle.to(device()))
        inputs[name] = state.processes.gather(rows, places, len(chosen)).flatten(0, 1)
    return inputs


def _fit_router(state: FitState, inputs: Mapping[str, Float[Tensor, "_ hidden"]]) -> Rows:
    settings = state.recipe.router
    methods = {"regression": regression_router, "ridge": ridge_router, "hidden": hidden_router}
    method = methods[settings.init]
    found = {}
    if state.processes.is_first:
        with exact(device()):
            rows = method([inputs[name].clone() for name in state.names], settings.temperature)
        found = {"router": rows.cpu()}
    return router_rows(state.processes.share(found)["router"], state.names)


@torch.no_grad()
def _fit_experts(state: FitState, layer: int, start: MoELayer) -> tuple[MoELayer, Step]:
    """Each expert on its own source's text."""
    experts: dict[str, dict[str, Tensor]] = {}
    solutions: dict[str, Solution] = {}
    for names in _grouped(state.names, state.processes.count):  # as many as are solved side by side
        fitted = {
            name: {key: tensor.to(device()) for key, tensor in start.experts[name].items()}
            for name in names
        }
        bends = solve_all(state, _input_maps(state, start, names))
        for name, bend in zip(names, bends, strict=True):
            with exact(device()):
                fitted[name] |= {key: fitted[name][key] @ bend.weight for key in (GATE, UP)}
            solutions[f"input map of {name}"] = bend
        downs = solve_all(state, _expert_outputs(state, start, fitted))
        for name, down in zip(names, downs, strict=True):
            fitted[name][DOWN] = down.weight
            solutions[f"down_proj of {name}"] = down
            experts[name] = {key: tensor.cpu() for key, tensor in fitted[name].items()}
    whole = MoELayer(start.shared, {**start.experts, **experts}, start.router)
    errors = [_layer_error(state, layer, moe) for moe in (start, whole)]
    step = Step(errors[0], errors[1], solutions)
    return (whole if step.kept else start), step


@torch.no_grad()
def _fit_dense(state: FitState, layer: int, start: MoELayer) -> tuple[MoELayer, Step]:
    """The FFN that all sources share, on the text of all: down from its neurons to what is missing
    to the sources' streams after the layer."""
    ffn = {key: tensor.to(device()) for key, tensor in start.experts[DENSE].items()}
    (down,) = solve_all(state, iter([_output(state, start, ffn, "the FFN", None)]))
    fitted = {key: tensor.cpu() for key, tensor in {**ffn, DOWN: down.weight}.items()}
    whole = dense_layer(start.shared, fitted)
    errors = [_layer_error(state, layer, moe) for moe in (start, whole)]
    step = Step(errors[0], errors[1], {"down_proj of the FFN": down})
    return (whole if step.kept else start), step


def _input_maps(state: FitState, start: MoELayer, names: Sequence[str]) -> Iterator[Regression]:
    """From the new model's FFN input to each source's, on that source's text. The sources' gains
    are folded; the new model's are not where it has been trained."""
    hidden = state.config.hidden_size
    neutral = dict.fromkeys(state.family.norms, torch.ones(hidden))
    identity = torch.eye(hidden, device=device())
    for name in names:
        inputs = LeastSquares(hidden, hidden, device=device())
        for _, pair in state.to_fit(NEW_MIDDLE, MIDDLE, only=name):
            whose = ((state.config, start.shared), (state.configs[name], neutral))
            rows = (ffn_input(*each, stream) for each, stream in zip(whose, pair, strict=True))
            inputs.update(*(x.flatten(0, 1) for x in rows))
        yield Regression(inputs, identity, f"input map of {name}")


def _expert_outputs(
    state: FitState, start: MoELayer, experts: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[Regression]:
    """From each expert's neurons to what is missing to its source's stream after the layer."""
    for name, expert in experts.items():
        yield _output(state, start, expert, name, name)


def _output(
    state: FitState, start: MoELayer, ffn: Mapping[str, Tensor], what: str, only: str | None
) -> Regression:
    """From an FFN's neurons to what is missing to the sources' streams after the layer. `only`: on
    the text of one source; None: of all."""
    config, activation = state.config, activation_of(state.config)
    norms = state.family.norms_after
    gain = None if norms is None else start.shared[norms[1]]
    outputs = LeastSquares(config.intermediate_size, config.hidden_size, device=device())
    for _, (new, after) in state.to_fit(NEW_MIDDLE, AFTER, only=only):
        x = ffn_input(config, start.shared, new).flatten(0, 1)
        neurons = gated_neurons(ffn, x, activation)
        now = None if gain is None else neurons @ ffn[DOWN].T
        outputs.update(neurons, wanted_of(config, gain, (after - new).flatten(0, 1), now))
    return Regression(outputs, ffn[DOWN], f"down_proj of {what}")


def _refine(
    state: FitState, layer: int, start: MoELayer, aligned: MoELayer, error: float
) -> tuple[MoELayer, Step]:
    """Gradient steps on one layer's weights, toward the sources' streams after it; pulled toward
    the `aligned` ones, where the fit began. The token embeddings learn with the first layer.
    `error`: that of `start`."""
    learned, config = LearnedLayer(state, layer, start), state.config
    parameters, home = learned.parameters, learned.of(aligned)
    table, rows = state.embeddings if layer == 0 else None, None
    if table is not None:
        rows = table.rows.to(device(), copy=True)
        parameters, home = [*parameters, rows], [*home, table.rows]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def loss(batch: Batch) -> Tensor:
        if table is None or rows is None:
            before = torch.cat([x for _, _, x, _ in batch])
        else:
            text = torch.cat([state.windows[name][numbers] for name, numbers, _, _ in batch])
            before = table.embedded(config, text, rows)
        wanted = torch.cat([y for _, _, _, y in batch])
        return _relative_error(learned.run(before), wanted)

    def error_so_far() -> float:
        if rows is not None:
            begin_at_embeddings(state, rows.detach(), on_validation=True)
        return _layer_error(state, layer, learned.result())

    how = Descent(parameters, home, (NEW, AFTER), loss, layer, error_so_far, error, in_parts=True)
    descents = descend(state, how)
    step = Step(error, error_so_far(), descents=descents)
    if table is not None and rows is not None:
        if step.kept:
            written = as_written(EMBEDDING, rows.detach(), state.recipe.output.dtype)
            table.rows = written.float().cpu()
        begin_at_embeddings(state)
    return (learned.result() if step.kept else start), step


@torch.no_grad()
def begin_at_embeddings(
    state: FitState, rows: Tensor | None = None, *, on_validation: bool = False
) -> None:
    """Begin the new model's streams at the embeddings that learn: at some `rows`, or at those that
    are written. `on_validation`: of the validation text alone."""
    assert state.embeddings is not None
    rows = state.embeddings.rows.to(device()) if rows is None else rows
    for name in state.names:
        place = state.validation(name) if on_validation else slice(None)
        windows = state.windows[name][state.numbers(name)[place]]
        targets = in_batches(state.stream(NEW, name)[place])
        for text, target in zip(in_batches(windows), targets, strict=True):
            target.copy_(state.embeddings.embedded(state.config, text, rows))


def _grouped(names: Sequence[str], size: int) -> Iterator[list[str]]:
    rest = iter(names)
    while group := list(islice(rest, size)):
        yield group


def _runner(
    state: FitState, attention: "PreTrainedModel", moe: MoELayer, names: Sequence[str]
) -> Callable[[Tensor], Tensor]:
    """The new model's layer, routed among the experts of some sources: residual stream -> residual
    stream."""
    mixture = mixture_of(state, moe, names)

    def run(hidden: Tensor) -> Tensor:
        middle = run_layer(attention, hidden)
        put_out = mixture(ffn_input(state.config, moe.shared, middle))
        return after_ffn(state.config, moe.shared, middle, put_out)

    return run


@torch.no_grad()
def _layer_error(state: FitState, layer: int, moe: MoELayer) -> float:
    """The error of a layer, under its real routing."""
    attention = load_attention(state.config, layer, moe.shared)
    return _error(state, AFTER, _runner(state, attention, moe, sorted(moe.experts)))


def _error(state: FitState, target: str, run: Callable[[Tensor], Tensor]) -> float:
    """Mean over the sources of the relative error on the validation text: of what `run` makes of
    the new model's stream, against the source's stream `target`."""
    totals = torch.zeros(len(state.names), dtype=torch.float64, device=device())
    overflows = torch.zeros(len(state.names), dtype=torch.int64)
    for number, name in enumerate(state.names):
        rows = state.validation(name)
        streams = (in_batches(state.stream(part, name)[rows], 1) for part in (NEW, target))
        for new, wanted in zip(*streams, strict=True):
            totals[number] += _relative_error(run(new), wanted.to(device()))
        overflows[number] = _overflows(state.stream(target, name)[rows])
    state.processes.add(totals, overflows)
    _name_overflows(state, overflows.bool().tolist())
    counts = [state.num_validation[name] for name in state.names]
    errors = totals.cpu() / torch.tensor(counts)
    return float(sum(errors) / len(errors))


def _overflows(stream: Tensor) -> bool:
    """Whether a stream has no length in float32: no error is a number then."""
    return not bool(torch.isfinite(stream.square().sum(dim=-1)).all())


def _name_overflows(state: FitState, overflows: Sequence[bool]) -> None:
    """Warn, once, of each source whose stream overflows."""
    for name, too_large in zip(state.names, overflows, strict=True):
        if too_large and (name, "overflow") not in state.warned:
            state.warned.add((name, "overflow"))
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
