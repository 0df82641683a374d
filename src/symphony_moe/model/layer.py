"""One decoder layer at a time, run by the family's own `transformers` module.

`one_layer_model` is the dense family's model cut down to one layer: masks, positions and attention
are the family's own code, embeddings and the final norm are bypassed. `MixtureOfExperts` stands in
for the FFN where the new model is run before it is written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from symphony_moe.model.families import BY_LAYER, DOWN, FAMILIES, GATE, SHARED_GATE, UP, factor
from symphony_moe.model.moe_layer import MoELayer, router_matrix
from symphony_moe.model.precision import exact, product_dtype

# Models of transformers take seconds to import: a build that runs no layer does without them.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "self_attn."

WINDOWS_TOKENS = 4096
"""Tokens run through a layer at once (whole windows, at least one)."""

_LEAST_GAIN = 1e-3
"""A gain below this puts out next to nothing, and says nothing of what should come in."""

LOGITS_AT_ONCE = 2**25
"""Logits of one model that are in memory at once."""


def device() -> torch.device:
    """Where layers are run: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def one_layer_model(config: PreTrainedConfig, layer: int) -> PreTrainedModel:
    """The dense model with layer `layer` alone, on the meta device: input is the residual stream
    (`inputs_embeds`), output the residual stream after the layer (`last_hidden_state`)."""
    from transformers import AutoModel

    alone = copy.deepcopy(config)
    alone.num_hidden_layers = 1
    for name in BY_LAYER:
        if getattr(alone, name, None):
            setattr(alone, name, [getattr(alone, name)[layer]])
    # The embeddings are bypassed: do not even describe them at their size.
    alone.vocab_size, alone.pad_token_id = 1, None
    bypassed = FAMILIES[config.model_type].factors.embeddings
    if bypassed is not None:
        setattr(alone, bypassed, 1.0)
    alone.use_cache = False
    with torch.device("meta"):
        model = AutoModel.from_config(alone, dtype=torch.float32)
    model.norm = nn.Identity()
    result: PreTrainedModel = model.eval()
    return result


@torch.no_grad()
def rotations(
    config: PreTrainedConfig, lengths: Iterable[int]
) -> list[tuple[Float[Tensor, " frequencies"], float]]:
    """(radians per position, factor of the rotated) of the dense model's RoPE, in texts of each of
    the lengths: some kinds of RoPE depend on them."""
    rotary: Any = type(one_layer_model(config, 0).rotary_emb)(copy.deepcopy(config))
    found = []
    for length in sorted(lengths):
        rotary(torch.zeros(1), torch.tensor([[length - 1]]))
        found.append((rotary.inv_freq.clone(), float(rotary.attention_scaling)))
    return found


def activation_of(config: PreTrainedConfig) -> nn.Module:
    """What the neurons of an FFN put their gate through."""
    from transformers.activations import ACT2FN

    found: nn.Module = ACT2FN[config.hidden_act]
    return found


def decoder_layer(model: PreTrainedModel) -> Any:
    """The one layer of a one-layer model."""
    layers: Any = model.layers
    return layers[0]


def load_dense_layer(
    config: PreTrainedConfig, layer: int, tensors: Mapping[str, Tensor]
) -> PreTrainedModel:
    """The dense model's layer with its weights (name within the layer -> tensor), ready to run."""
    return _with_weights(one_layer_model(config, layer), tensors)


def load_moe_layer(
    config: PreTrainedConfig, layer: int, tensors: MoELayer, top_k: int
) -> PreTrainedModel:
    """The new model's layer, ready to run: the dense family's attention and norms around a
    mixture; or its norms around two, where experts have attention."""
    model = one_layer_model(config, layer)
    block = decoder_layer(model)
    experts = list(tensors.experts.values())
    router = router_matrix(tensors.router, tensors.experts)
    places = min(top_k, len(experts))  # of a dense layer, the one FFN
    block.mlp = MixtureOfExperts(experts, router, places, activation_of(config), tensors.always)
    shared = dict(tensors.shared)
    if tensors.attention_router is not None:
        common = {name: shared.pop(name) for name in tensors.shared if name.startswith(_ATTENTION)}
        own = [
            {name: tensor for name, tensor in expert.items() if name.startswith(_ATTENTION)}
            for expert in experts
        ]
        chooser = router_matrix(tensors.attention_router, tensors.experts)
        block.self_attn = MixtureOfAttention(
            block.self_attn, [common | expert for expert in own], chooser, top_k
        )
    return _with_weights(model, shared)


def _with_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    where = device()
    # Rotary frequencies are computed, not stored: make them anew off the meta device.
    model.rotary_emb = type(model.rotary_emb)(model.config).to(where)
    decoder_layer(model).load_state_dict(
        {name: tensor.float().to(where) for name, tensor in tensors.items()}, assign=True
    )
    return model


class _Nothing(nn.Module):
    """An FFN that adds nothing to the residual stream."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(())


def load_attention(
    config: PreTrainedConfig, layer: int, shared: Mapping[str, Tensor]
) -> PreTrainedModel:
    """The first half of a layer, ready to run: what it puts out is the residual stream between
    attention and FFN. `shared`: `Family.shared` name -> tensor."""
    model = one_layer_model(config, layer)
    decoder_layer(model).mlp = _Nothing()
    model = _with_weights(model, shared)
    family = FAMILIES[config.model_type]
    for norms in (family.norms_before, family.norms_after):
        if norms is not None:
            # Nothing reads what the FFN's norms put out.
            setattr(decoder_layer(model), norms[1].removesuffix(".weight"), nn.Identity())
    return model


def first_of_ffn(model: PreTrainedModel) -> Any:
    """What reads the residual stream after attention: the FFN's norm, or the FFN itself."""
    before = FAMILIES[model.config.model_type].norms_before
    name = "mlp" if before is None else before[1].removesuffix(".weight")
    return getattr(decoder_layer(model), name)


def ffn_input(
    config: PreTrainedConfig,
    shared: Mapping[str, Tensor],
    middle: Float[Tensor, "... hidden"],
) -> Float[Tensor, "... hidden"]:
    """What the FFN, its experts and their router read of the stream after attention."""
    before = FAMILIES[config.model_type].norms_before
    return middle if before is None else normed(config, shared, before[1], middle)


def attention_input(
    config: PreTrainedConfig,
    shared: Mapping[str, Tensor],
    stream: Float[Tensor, "... hidden"],
) -> Float[Tensor, "... hidden"]:
    """What q, k and v read of the stream before the layer."""
    before = FAMILIES[config.model_type].norms_before
    return stream if before is None else normed(config, shared, before[0], stream)


def after_ffn(
    config: PreTrainedConfig,
    shared: Mapping[str, Tensor],
    middle: Float[Tensor, "... hidden"],
    put_out: Float[Tensor, "... hidden"],
) -> Float[Tensor, "... hidden"]:
    """The residual stream after the layer. `put_out`: by the FFN, or by the experts together."""
    after = FAMILIES[config.model_type].norms_after
    if after is not None:
        put_out = normed(config, shared, after[1], put_out)
    times = factor(config, "residual")
    return middle + (put_out if times == 1 else put_out * times)


def wanted_of(
    config: PreTrainedConfig,
    gain: Tensor | None,
    missing: Float[Tensor, "tokens hidden"],
    put_out: Float[Tensor, "tokens hidden"] | None,
) -> Float[Tensor, "tokens hidden"]:
    """What o_proj or down_proj should put out, so that the stream gains what it is `missing`.

    Where it goes through a norm afterwards (with this `gain`), the direction alone counts: it is
    asked for at the length of what is `put_out` now (of no interest otherwise), so that weights
    that are right already are what is asked for. Where a gain is next to nothing, so is what is put
    out there.
    """
    times = factor(config, "residual")
    missing = missing if times == 1 else missing / times
    if gain is None or put_out is None:
        return missing
    gain = gain.to(missing)
    length = (put_out.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt()
    reached = gain.abs() > _LEAST_GAIN
    return torch.where(reached, missing / torch.where(reached, gain, 1.0) * length, put_out)


def normed(
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    norm: str,
    hidden: Float[Tensor, "... hidden"],
) -> Float[Tensor, "... hidden"]:
    """A layer's norm, by the name of its gain."""
    return rms_norm(hidden, tensors[norm].to(hidden), config.rms_norm_eps)


@contextmanager
def observe(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """What passes inside a one-layer model in its last run inside the block, by name:

    `queries` and `keys` (before RoPE, after their norms where there are any; ... x heads x head_dim
    or flat), `heads` (the input of o_proj), `middle` (the residual stream between attention and
    FFN), `neurons` (the input of down_proj, of a dense layer)."""
    layer = decoder_layer(model)
    attention = layer.self_attn
    seen: dict[str, Tensor] = {}

    def keep_input(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    def keep_output(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = output

        return hook

    handles = [
        getattr(attention, "q_norm", attention.q_proj).register_forward_hook(
            keep_output("queries")
        ),
        getattr(attention, "k_norm", attention.k_proj).register_forward_hook(keep_output("keys")),
        attention.o_proj.register_forward_pre_hook(keep_input("heads")),
        first_of_ffn(model).register_forward_pre_hook(keep_input("middle")),
    ]
    if hasattr(layer.mlp, "down_proj"):
        down = layer.mlp.down_proj
        handles.append(down.register_forward_pre_hook(keep_input("neurons")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_layer(
    model: PreTrainedModel, hidden: Float[Tensor, "windows sequence hidden"]
) -> Float[Tensor, "windows sequence hidden"]:
    """The residual stream after the layer."""
    result: Tensor = model(inputs_embeds=hidden.to(device()), use_cache=False).last_hidden_state
    return result


class MixtureOfExperts(nn.Module):
    """What every target architecture computes in place of the FFN: softmax over all experts' router
    logits, the top_k of them, renormalised to sum to one, mix the experts' outputs."""

    def __init__(
        self,
        experts: Sequence[Mapping[str, Tensor]],
        router: Tensor,
        top_k: int,
        activation: nn.Module,
        always: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`always`: see `MoELayer`."""
        super().__init__()
        where = device()
        self.always = None
        if always is not None:
            self.always = {name: tensor.float().to(where) for name, tensor in always.items()}
        self.experts = [{k: v.float().to(where) for k, v in expert.items()} for expert in experts]
        self.router = router.float().to(where)
        self.top_k = top_k
        self.activation = activation

    def forward(
        self, hidden: Float[Tensor, "windows sequence hidden"]
    ) -> Float[Tensor, "windows sequence hidden"]:
        """What the chosen experts put out, weighted by their gates."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        with exact(flat.device):
            gates, chosen = route(flat, self.router, self.top_k)
        # Expert by expert, and within each in the text's order.
        order = chosen.flatten().argsort(stable=True)
        dispatch: Any = _Dispatched.apply
        rows = dispatch(flat, order, self.top_k, product_dtype(flat.device))
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        outputs = [
            gated_neurons(expert, x, self.activation) @ expert[DOWN].T
            for expert, x in zip(self.experts, rows.split(counts), strict=True)
        ]
        combine: Any = _Combined.apply
        result: Tensor = combine(torch.cat(outputs), gates, order)
        if self.always is not None:
            own = gated_neurons(self.always, flat, self.activation) @ self.always[DOWN].T
            result = result + 2 * torch.sigmoid(flat @ self.always[SHARED_GATE].T) * own
        return result.view_as(hidden)


class _Dispatched(torch.autograd.Function):
    """Tokens, once for each of their experts. `order`: which of (token, place) each row is. torch's
    own gradient adds up row by row; here a token knows its rows."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, order: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return flat.to(dtype).index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        places = _inverse(order).view(-1, ctx.top_k).unbind(dim=1)
        total = gradient.index_select(0, places[0]).float()
        for place in places[1:]:
            total += gradient.index_select(0, place)
        return total, None, None, None


class _Combined(torch.autograd.Function):
    """What a token's experts put out, weighted by its gates: the way back of `_Dispatched`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gates: Float[Tensor, "tokens top_k"], order: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, gates, order)
        places = _inverse(order).view_as(gates)
        total = rows.index_select(0, places[:, 0]) * gates[:, :1]
        for place in range(1, gates.shape[1]):
            total += rows.index_select(0, places[:, place]) * gates[:, place, None]
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, gates, order = ctx.saved_tensors
        of_rows = gradient.to(rows.dtype).index_select(0, order // gates.shape[1])
        of_gates = (of_rows * rows).sum(dim=-1, dtype=gates.dtype)[_inverse(order)].view_as(gates)
        of_rows *= gates.flatten()[order, None].to(rows.dtype)
        return of_rows, of_gates, None


def _inverse(order: Tensor) -> Tensor:
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return back


def route(
    hidden: Float[Tensor, "tokens hidden"], router: Float[Tensor, "experts hidden"], top_k: int
) -> tuple[Float[Tensor, "tokens top_k"], Int[Tensor, "tokens top_k"]]:
    """(gates, experts) of every token: softmax over all, the top_k of them, summing to one."""
    gates, chosen = torch.topk(torch.softmax(hidden @ router.T, dim=-1), top_k, dim=-1)
    return gates / gates.sum(dim=-1, keepdim=True), chosen


class MixtureOfAttention(nn.Module):
    """What JetMoE computes in place of attention: each expert's q and o around the k and v that all
    share; the top_k of the experts' outputs are mixed as in `MixtureOfExperts`.

    Here every expert is the dense family's own module and attends for every token, chosen or not.
    """

    def __init__(
        self,
        dense: nn.Module,
        experts: Sequence[Mapping[str, Tensor]],
        router: Tensor,
        top_k: int,
    ) -> None:
        """`dense`: the family's module; `experts`: its weights for each, by name within the
        layer."""
        super().__init__()
        where = device()
        # A plain list: their weights are not the layer's, which are loaded by name.
        self.experts = [copy.deepcopy(dense) for _ in experts]
        for module, expert in zip(self.experts, experts, strict=True):
            weights = {k.removeprefix(_ATTENTION): v.float().to(where) for k, v in expert.items()}
            module.load_state_dict(weights, assign=True)
        self.router = router.float().to(where)
        self.top_k = top_k

    def forward(
        self, hidden_states: Float[Tensor, "windows sequence hidden"], **arguments: Any
    ) -> tuple[Float[Tensor, "windows sequence hidden"], None]:
        """What the chosen attention experts put out, weighted by their gates; no attention weights.
        `arguments`: what the decoder layer gives to its attention."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        gates, chosen = route(flat, self.router, self.top_k)
        by_expert = gates.new_zeros(len(flat), len(self.experts)).scatter(1, chosen, gates)
        mixed = torch.zeros_like(hidden_states)
        for number, attention in enumerate(self.experts):
            gate = by_expert[:, number].view(*hidden_states.shape[:-1], 1)
            mixed += gate * attention(hidden_states=hidden_states, **arguments)[0]
        return mixed, None


def gated_neurons(
    expert: Mapping[str, Tensor], x: Float[Tensor, "tokens hidden"], activation: nn.Module
) -> Float[Tensor, "tokens ffn"]:
    """What the neurons of a gated FFN put out: the input of down_proj."""
    result: Tensor = activation(x @ expert[GATE].T) * (x @ expert[UP].T)
    return result


def rms_norm(
    hidden: Float[Tensor, "... hidden"], gain: Float[Tensor, " hidden"], eps: float
) -> Float[Tensor, "... hidden"]:
    """RMSNorm as every family of the table has it."""
    return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + eps) * gain


def head_input(
    config: PreTrainedConfig, gain: Float[Tensor, " hidden"], hidden: Float[Tensor, "... hidden"]
) -> Float[Tensor, "... hidden"]:
    """What the output head makes logits of: the last stream, normed; where a family divides its
    logits, that is done here."""
    normal, divisor = rms_norm(hidden, gain, config.rms_norm_eps), factor(config, "logits")
    return normal if divisor == 1 else normal / divisor


def logits_from_stream(
    config: PreTrainedConfig,
    hidden: Float[Tensor, "windows sequence hidden"],
    norm: Float[Tensor, " hidden"],
    head: Float[Tensor, "vocabulary hidden"],
) -> Float[Tensor, "windows sequence vocabulary"]:
    """Final RMS norm and output head, in float32."""
    return head_input(config, norm, hidden) @ head.T
