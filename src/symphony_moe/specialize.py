"""How far the experts have parted, how the routers use them, and how many a token needs.

Three measurements, all on held-out text:

- **CKA**: how alike the outputs of a layer's experts are on the same inputs (the paper's Figure 3).
- **Routing**: how sure the routers are, and how evenly they load the experts.
- **Dynamic routing** (the paper's future work): as many experts per token as its router's
  probabilities ask for, tried on the stock model.

CKA goes layer by layer, over sources and checkpoints alike: in memory are one layer of every source
(or of the new model), the residual streams of the text (of every source, float32), one batch of
outputs, and for each pair of experts one hidden x hidden matrix in float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax
from transformers import PreTrainedModel

from symphony_moe.families import DOWN, EMBEDDING, moe_config, read_layer_outputs
from symphony_moe.forward import (
    decoder_layer,
    device,
    gated_neurons,
    load_dense_layer,
    load_moe_layer,
    run_layer,
)
from symphony_moe.shards import tensor_reader
from symphony_moe.sources import Source
from symphony_moe.streams import Streams, Windows

CKA_TOKENS = 4096
"""Text of each domain that outputs are compared on, in tokens (whole windows, at least one)."""

Rule = Callable[[Float[Tensor, "tokens experts"]], Bool[Tensor, "tokens experts"]]
"""Router probabilities -> which experts a token uses, at least one."""


# ------------------------------------------------------------------------------------------- CKA


class OutputCovariance:
    """Cross-covariances of the outputs of a layer's experts, from one pass over batches.

    Each batch is centred by its own mean and merged exactly (Chan, Golub and LeVeque), in float64.
    Memory: N (N + 1) / 2 matrices of hidden x hidden for N experts, whatever the number of tokens.
    """

    def __init__(self, num_experts: int, hidden: int, device: torch.device | str = "cpu") -> None:
        self.num_experts, self.count = num_experts, 0
        self.means = torch.zeros(num_experts, hidden, dtype=torch.float64, device=device)
        self.products = {
            (one, other): torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
            for one in range(num_experts)
            for other in range(one, num_experts)
        }

    def update(self, outputs: Float[Tensor, "experts tokens hidden"]) -> None:
        """Add a batch: what every expert puts out for the same tokens."""
        outputs = outputs.double()
        tokens = outputs.shape[1]
        merged = self.count + tokens
        mean = outputs.mean(dim=1)
        centred, shift = outputs - mean[:, None], mean - self.means
        for (one, other), product in self.products.items():
            product.addmm_(centred[one].T, centred[other])
            product.addr_(shift[one], shift[other], alpha=self.count * tokens / merged)
        self.means += shift * (tokens / merged)
        self.count = merged

    def cka(self) -> Float[Tensor, "experts experts"]:
        """Linear CKA (Kornblith et al. 2019) of every pair: `|X'Y|² / (|X'X| |Y'Y|)` with centred
        outputs X and Y (tokens x hidden) and Frobenius norms. 1: the same up to a rotation and a
        scale; 0: no linear relation. float64; NaN for an expert whose output never varies.

        With few tokens unrelated outputs do not reach 0: about hidden / (tokens + hidden) where
        all directions vary alike.
        """
        norms = {pair: torch.linalg.norm(product) for pair, product in self.products.items()}
        alike = self.means.new_empty(self.num_experts, self.num_experts)
        for (one, other), norm in norms.items():
            value = norm.square() / (norms[one, one] * norms[other, other])
            alike[one, other] = alike[other, one] = value
        return alike.cpu()


def shared_text(
    windows: Mapping[str, Int[Tensor, "windows sequence"]], tokens: int = CKA_TOKENS
) -> Int[Tensor, "shared sequence"]:
    """The same number of windows of every domain: about `tokens` tokens of each, or as many as the
    domain with the shortest text has."""
    sequence = next(iter(windows.values())).shape[1]
    count = min(max(1, tokens // sequence), *(len(text) for text in windows.values()))
    return torch.cat([text[:count] for text in windows.values()])


@torch.inference_mode()
def compare_sources(
    sources: Sequence[Source], text: Windows
) -> list[Float[Tensor, "experts experts"]]:
    """Layer -> CKA of the sources' FFN outputs, each on its own residual stream for the same
    tokens (of the vocabulary that the sources share). The paper's "original models"."""
    streams, hidden = Streams(), sources[0].config.hidden_size
    for source in sources:
        streams.embed({source.name: text}, hidden, source.table(EMBEDDING))
    found = []
    for layer in range(sources[0].config.num_hidden_layers):
        models = [load_dense_layer(s.config, layer, s.read_layer(layer)) for s in sources]
        statistics = OutputCovariance(len(sources), hidden, device())
        for batches in zip(*(streams.batches(source.name) for source in sources), strict=True):
            outputs = []
            for model, stream in zip(models, batches, strict=True):
                with _observe_ffn(model) as seen:
                    stream.copy_(run_layer(model, stream))
                outputs.append(seen["output"].flatten(0, 1))
            statistics.update(torch.stack(outputs))
        found.append(statistics.cka())
    return found


@torch.inference_mode()
def compare_experts(
    checkpoint: Path, anchor: Source, num_experts: int, top_k: int, text: Windows
) -> list[Float[Tensor, "experts experts"]]:
    """Layer -> CKA of the experts' outputs in a checkpoint folder of ours: every expert on every
    token's router input, wherever the router sends the token. The stream between layers is the
    model's own, routed to `top_k` experts."""
    streams, config = Streams(), moe_config(anchor.family, anchor.config)
    read = tensor_reader(checkpoint)
    streams.embed({"new": text}, config.hidden_size, [(0, read(EMBEDDING))])
    found = []
    for layer in range(config.num_hidden_layers):
        tensors = read_layer_outputs(anchor.family, config, layer, num_experts, read)
        model = load_moe_layer(config, layer, tensors, top_k)
        mixture = decoder_layer(model).mlp
        statistics = OutputCovariance(num_experts, config.hidden_size, device())
        for stream in streams.batches("new"):
            with _observe_ffn(model) as seen:
                stream.copy_(run_layer(model, stream))
            x = seen["input"].flatten(0, 1)
            outputs = [gated_neurons(e, x, mixture.activation) @ e[DOWN].T for e in mixture.experts]
            statistics.update(torch.stack(outputs))
        found.append(statistics.cka())
    return found


def describe_cka(
    experts: Sequence[str], layers: Sequence[Float[Tensor, "experts experts"]], tokens: int
) -> dict[str, Any]:
    """For `metrics.json`: every layer's matrix, and the mean over layers and pairs of different
    experts."""
    pairs = ~torch.eye(len(experts), dtype=torch.bool)
    return {
        "experts": list(experts),
        "tokens": tokens,
        "layers": _rounded(torch.stack(list(layers))),
        "mean": round(float(torch.stack([layer[pairs].mean() for layer in layers]).mean()), 6),
    }


@contextmanager
def _observe_ffn(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """`input` and `output` of the FFN, or of what stands in its place, in a one-layer model's last
    run inside the block (windows x sequence x hidden)."""
    seen: dict[str, Tensor] = {}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"], seen["output"] = inputs[0], output

    handle = decoder_layer(model).mlp.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


# --------------------------------------------------------------------------------------- routing


@dataclass(frozen=True)
class Routing:
    """How a model's routers treat some text, as means over its tokens (float64)."""

    used: Float[Tensor, "layers experts"]
    """Share of the tokens that use an expert: give it a weight above zero. Every layer sums to the
    number of experts per token."""
    probability: Float[Tensor, "layers experts"]
    """Mean of the router's softmax over all experts."""
    entropy: Float[Tensor, " layers"]
    """Mean entropy of that softmax, in nats: 0 where the router is sure, log N where it knows
    nothing."""

    @property
    def share(self) -> Float[Tensor, "layers experts"]:
        """Of all places that tokens have, those that an expert takes. Every layer sums to one."""
        return self.used / self.used.sum(dim=1, keepdim=True)

    @property
    def entropy_of_mean(self) -> Float[Tensor, " layers"]:
        """Entropy of the mean softmax, in nats: log N where the experts are wanted alike. What it
        has more than `entropy` is what a token says of its experts (their mutual information)."""
        return torch.special.entr(self.probability).sum(dim=1)

    @property
    def balance(self) -> Float[Tensor, " layers"]:
        """Switch form, `N sum_e f_e P_e` of `share` and `probability`: 1 where the load is even, N
        where one expert has all. (The stock balance loss counts each of the k places as a whole
        token: its even value is k.) Even is not the smallest value that there can be."""
        return self.share.shape[1] * (self.share * self.probability).sum(dim=1)

    @property
    def max_share(self) -> Float[Tensor, " layers"]:
        """Share of the expert with the heaviest load: 1 / N where the load is even, at most one
        over the number of experts per token."""
        return self.share.amax(dim=1)


def mixed(parts: Sequence[Routing]) -> Routing:
    """The routing of several texts taken alike, whatever their lengths."""
    return Routing(
        *(
            torch.stack([getattr(part, name) for part in parts]).mean(dim=0)
            for name in ("used", "probability", "entropy")
        )
    )


def describe_routing(found: Mapping[str, Routing], in_domain: Sequence[str]) -> dict[str, Any]:
    """For `metrics.json`: measure -> domain -> layer; and under `mixed` the same of the text of
    all `in_domain` domains alike, where an even load is wanted."""
    measures = ("share", "entropy", "entropy_of_mean", "balance", "max_share")
    together = mixed([found[domain] for domain in in_domain])
    return {
        name: {domain: _rounded(getattr(routing, name)) for domain, routing in found.items()}
        for name in measures
    } | {"mixed": {name: _rounded(getattr(together, name)) for name in measures}}


def routers(model: PreTrainedModel) -> list[Any]:
    """The routers of a stock model's FFNs, layer by layer; none in a dense model."""
    layers: Any = model.base_model.layers
    blocks = [getattr(layer, "mlp", None) or layer.block_sparse_moe for layer in layers]
    return [
        getattr(block, name)
        for block in blocks
        for name in ("gate", "router")
        if hasattr(block, name)
    ]


def router_matrix(router: Any) -> Float[Tensor, "experts hidden"]:
    """A stock router's weights."""
    weights: Tensor = getattr(router, "layer", router).weight
    return weights


def router_logits(
    router: Any, hidden: Float[Tensor, "... hidden"]
) -> Float[Tensor, "tokens experts"]:
    """What a router thinks of its input (float32), from its matrix: what stock classes give out as
    `router_logits` are probabilities in some versions (transformers 5.0, Mixtral and Qwen3-MoE)
    and logits in others."""
    return linear(hidden.reshape(-1, hidden.shape[-1]).float(), router_matrix(router).float())


class _Sums:
    """Sums over tokens, behind a `Routing`."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.used = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.probability = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.entropy = torch.zeros(num_layers, dtype=torch.float64)
        self.tokens = 0

    def add(self, layer: int, logits: Tensor, gates: Tensor, chosen: Tensor) -> None:
        log_probability = log_softmax(logits, dim=-1)
        probability = log_probability.exp()
        num_experts = logits.shape[1]
        self.used[layer] += torch.bincount(chosen[gates > 0], minlength=num_experts).cpu()
        self.probability[layer] += probability.sum(dim=0, dtype=torch.float64).cpu()
        self.entropy[layer] -= (probability * log_probability).sum(dtype=torch.float64).cpu()
        self.tokens += len(logits) if layer == 0 else 0

    def routing(self) -> Routing:
        return Routing(
            self.used / self.tokens, self.probability / self.tokens, self.entropy / self.tokens
        )


@contextmanager
def observe_routing(model: PreTrainedModel) -> Iterator[Callable[[], Routing]]:
    """Inside the block, every run of a stock MoE adds to what the function that is given returns:
    the routing of all tokens so far."""
    gates = routers(model)
    sums = _Sums(len(gates), len(router_matrix(gates[0])))

    def observe(layer: int) -> Any:
        def hook(router: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            sums.add(layer, router_logits(router, inputs[0]), *_gates_and_choices(output))

        return hook

    handles = [gate.register_forward_hook(observe(layer)) for layer, gate in enumerate(gates)]
    try:
        yield sums.routing
    finally:
        for handle in handles:
            handle.remove()


def _gates_and_choices(
    output: Sequence[Any],
) -> tuple[Float[Tensor, "tokens places"], Int[Tensor, "tokens places"]]:
    """Weights and experts in a stock router's output, which begins with its logits. Ernie 4.5 gives
    experts before weights in transformers 5.0, and after them later. JetMoE's ends with its logits,
    and has the weights sorted by expert."""
    if len(output) == 5:
        order, _, by_expert, sizes, logits = output
        experts = torch.arange(len(sizes), device=order.device)
        chosen = experts.repeat_interleave(torch.tensor(sizes, device=order.device))
        gates, places = torch.empty_like(by_expert), torch.empty_like(order)
        gates[order], places[order] = by_expert, chosen
        return gates.view(len(logits), -1), places.view(len(logits), -1)
    one, other = output[1:]
    return (one, other) if one.is_floating_point() else (other, one)


def _with_choices(
    output: Sequence[Any],
    gates: Float[Tensor, "tokens places"],
    chosen: Int[Tensor, "tokens places"],
) -> tuple[Any, ...]:
    """A stock router's output with other weights and experts in it: see `_gates_and_choices`."""
    if len(output) == 5:
        order = chosen.flatten().argsort()
        sizes = torch.bincount(chosen.flatten(), minlength=len(output[3])).tolist()
        return order, order // chosen.shape[1], gates.flatten()[order], sizes, output[4]
    weights_first = output[1].is_floating_point()
    return output[0], *((gates, chosen) if weights_first else (chosen, gates))


# ------------------------------------------------------------------------------- dynamic routing


def at_least(threshold: float) -> Rule:
    """The experts whose probability is at least `threshold`, and the most probable one always: all
    N at 0, one alone above 1/2."""

    def rule(probability: Float[Tensor, "tokens experts"]) -> Bool[Tensor, "tokens experts"]:
        best = probability.argmax(dim=1, keepdim=True)
        return (probability >= threshold).scatter(1, best, True)

    return rule


@contextmanager
def fixed_experts(model: PreTrainedModel, count: int) -> Iterator[None]:
    """Inside the block, a stock MoE's routers choose `count` experts per token, which is the same
    as `num_experts_per_tok: count` in its config."""
    gates = routers(model)
    before = [gate.top_k for gate in gates]
    try:
        for gate in gates:
            gate.top_k = count
        yield
    finally:
        for gate, top_k in zip(gates, before, strict=True):
            gate.top_k = top_k


@contextmanager
def experts_by_rule(model: PreTrainedModel, rule: Rule) -> Iterator[None]:
    """Inside the block, a stock MoE gives each token the experts that `rule` says, their
    probabilities renormalised to sum to one. Everything but the routers' output is the stock
    model's own code: experts beyond a token's own get a weight of zero, so this measures losses,
    and no time is saved."""

    def hook(router: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> tuple[Any, ...]:
        probability = torch.softmax(router_logits(router, inputs[0]), dim=-1)
        used = rule(probability)
        # A token's own come first, the most probable of them before the others, as in top-k.
        gates, order = probability.masked_fill(~used, 0).sort(dim=1, descending=True, stable=True)
        places = int(used.sum(dim=1).max())
        gates = gates[:, :places] / gates[:, :places].sum(dim=1, keepdim=True)
        return _with_choices(output, gates.to(inputs[0].dtype), order[:, :places])

    handles = [gate.register_forward_hook(hook) for gate in routers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(values: Tensor) -> Any:
    """Nested lists, to six decimals."""
    return values.double().mul(1e6).round().div(1e6).tolist()
