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
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax
from transformers import PreTrainedModel

from symphony_moe.model.families import router_outputs_of

Rule = Callable[[Float[Tensor, "tokens experts"]], Bool[Tensor, "tokens experts"]]
"""Router probabilities -> which experts a token uses, at least one."""


# Routing


@dataclass(frozen=True)
class Routing:
    """How a model's routers treat some text, as means over its tokens (float64). Of a source that
    gives several experts, all of them count as one."""

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
        result: Tensor = torch.special.entr(self.probability).sum(dim=1)
        return result

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
        name: {domain: rounded(getattr(routing, name)) for domain, routing in found.items()}
        for name in measures
    } | {"mixed": {name: rounded(getattr(together, name)) for name in measures}}


def routers(model: PreTrainedModel) -> list[Any]:
    """The routers of a stock model's FFNs, layer by layer; none in a dense model, or layer."""
    layers: Any = model.base_model.layers
    blocks = [getattr(layer, "mlp", None) or layer.block_sparse_moe for layer in layers]
    return [
        getattr(block, name)
        for block in blocks
        for name in ("gate", "router")
        if hasattr(block, name)
    ]


def router_weight(router: Any) -> Float[Tensor, "experts hidden"]:
    """A stock router's weights."""
    weights: Tensor = getattr(router, "layer", router).weight
    return weights


def router_logits(
    router: Any, hidden: Float[Tensor, "... hidden"]
) -> Float[Tensor, "tokens experts"]:
    """What a router thinks of its input (float32), from its matrix: what stock classes give out as
    `router_logits` are probabilities in some versions (transformers 5.0, Mixtral and Qwen3-MoE)
    and logits in others."""
    return linear(hidden.reshape(-1, hidden.shape[-1]).float(), router_weight(router).float())


class _Sums:
    """Sums over tokens, behind a `Routing`."""

    def __init__(self, num_layers: int, num_experts: int, slices: int) -> None:
        """`num_experts`: those that count, each of which is `slices` of the model's."""
        self.slices = slices
        self.used = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.probability = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.entropy = torch.zeros(num_layers, dtype=torch.float64)
        self.tokens = 0

    def add(self, layer: int, logits: Tensor, gates: Tensor, chosen: Tensor) -> None:
        log_probability = log_softmax(logits, dim=-1)
        if self.slices > 1:
            log_probability = log_probability.unflatten(1, (-1, self.slices)).logsumexp(dim=-1)
        probability = log_probability.exp()
        chosen, num_experts = chosen[gates > 0] // self.slices, probability.shape[1]
        self.used[layer] += torch.bincount(chosen, minlength=num_experts).cpu() / self.slices
        self.probability[layer] += probability.sum(dim=0, dtype=torch.float64).cpu()
        self.entropy[layer] -= (probability * log_probability).sum(dtype=torch.float64).cpu()
        self.tokens += len(logits) if layer == 0 else 0

    def routing(self) -> Routing:
        return Routing(
            self.used / self.tokens, self.probability / self.tokens, self.entropy / self.tokens
        )


@contextmanager
def _hooked(gates: Sequence[nn.Module], hook_of: Callable[[int], Any]) -> Iterator[None]:
    """Inside the block, every run of a router calls its hook. `hook_of`: by the router's place."""
    handles = [gate.register_forward_hook(hook_of(place)) for place, gate in enumerate(gates)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observe_routing(model: PreTrainedModel, slices: int = 1) -> Iterator[Callable[[], Routing]]:
    """Inside the block, every run of a stock MoE adds to what the function that is given returns:
    the routing of all tokens so far. `slices`: how many of its experts, one after another, are one
    source's."""
    gates, forms = routers(model), router_outputs_of(model.config.model_type)
    sums = _Sums(len(gates), len(router_weight(gates[0])) // slices, slices)

    def observe(layer: int) -> Any:
        def hook(router: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            gates_and_choices = _gates_and_choices(_by_name(output, forms))
            sums.add(layer, router_logits(router, inputs[0]), *gates_and_choices)

        return hook

    with _hooked(gates, observe):
        yield sums.routing


@contextmanager
def router_probabilities(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """Inside the block, every run of a stock MoE adds to the list that is given, for each layer,
    what its router says: the softmax over all experts (tokens x experts, float32)."""
    gates = routers(model)
    found: list[list[Tensor]] = [[] for _ in gates]

    def observe(layer: int) -> Any:
        def hook(router: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            found[layer].append(torch.softmax(router_logits(router, inputs[0]), dim=-1).cpu())

        return hook

    with _hooked(gates, observe):
        yield found


def _by_name(output: Sequence[Any], forms: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The parts of a stock router's output, in their order. `forms`: those that it may have
    (`Family.router_outputs`), of which it has the first that fits: versions of transformers differ
    in the order of numbers and integers."""
    numbers = ("logits", "weights")
    for form in forms:
        if len(form) == len(output) and all(
            part.is_floating_point() == (name in numbers)
            for name, part in zip(form, output, strict=True)
            if isinstance(part, Tensor)
        ):
            return dict(zip(form, output, strict=True))
    raise AssertionError(f"a router put out {len(output)} parts, in none of the forms {forms}")


def _gates_and_choices(
    parts: Mapping[str, Any],
) -> tuple[Float[Tensor, "tokens places"], Int[Tensor, "tokens places"]]:
    """Weights and experts in a stock router's output."""
    if "sizes" not in parts:
        return parts["weights"], parts["experts"]
    order, by_expert, sizes = parts["order"], parts["weights"], parts["sizes"]
    experts = torch.arange(len(sizes), device=order.device)
    chosen = experts.repeat_interleave(torch.tensor(sizes, device=order.device))
    gates, places = torch.empty_like(by_expert), torch.empty_like(order)
    gates[order], places[order] = by_expert, chosen
    tokens = len(parts["logits"])
    return gates.view(tokens, -1), places.view(tokens, -1)


def _with_choices(
    parts: Mapping[str, Any],
    gates: Float[Tensor, "tokens places"],
    chosen: Int[Tensor, "tokens places"],
) -> tuple[Any, ...]:
    """A stock router's output with other weights and experts in it."""
    changed: dict[str, Any] = {"weights": gates, "experts": chosen}
    if "sizes" in parts:
        order = chosen.flatten().argsort()
        counts = torch.bincount(chosen.flatten(), minlength=len(parts["sizes"]))
        changed = {
            "order": order,
            "tokens": order // chosen.shape[1],
            "weights": gates.flatten()[order],
            "sizes": counts.tolist(),
        }
    return tuple(changed.get(name, part) for name, part in parts.items())


# Dynamic routing


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
    forms = router_outputs_of(model.config.model_type)

    def hook(router: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> tuple[Any, ...]:
        probability = torch.softmax(router_logits(router, inputs[0]), dim=-1)
        used = rule(probability)
        # A token's own come first, the most probable of them before the others, as in top-k.
        gates, order = probability.masked_fill(~used, 0).sort(dim=1, descending=True, stable=True)
        places = int(used.sum(dim=1).max())
        gates = gates[:, :places] / gates[:, :places].sum(dim=1, keepdim=True)
        parts = _by_name(output, forms)
        return _with_choices(parts, gates.to(inputs[0].dtype), order[:, :places])

    with _hooked(routers(model), lambda _: hook):
        yield


def rounded(values: Tensor, decimals: int = 6) -> Any:
    """Nested lists, to six decimals or another number of them."""
    scale = 10**decimals
    return values.double().mul(scale).round().div(scale).tolist()
