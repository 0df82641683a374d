"""A layer of the new model while its weights learn: all of them but its norms."""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from symphony_moe.building.fitting import FitState
from symphony_moe.model.layer import (
    MixtureOfExperts,
    activation_of,
    after_ffn,
    decoder_layer,
    ffn_input,
    load_attention,
    run_layer,
)
from symphony_moe.model.moe_layer import DENSE, MoELayer, router_matrix, router_rows


def mixture_of(state: FitState, moe: MoELayer, names: Sequence[str]) -> MixtureOfExperts:
    """The experts of some sources, or the one FFN of a dense layer."""
    if moe.is_dense:
        names = [DENSE]
    top_k, activation = min(state.recipe.router.top_k, len(names)), activation_of(state.config)
    experts = [moe.experts[name] for name in names]
    router = router_matrix(moe.router, names)
    return MixtureOfExperts(experts, router, top_k, activation, moe.always)


class LearnedLayer:
    """A layer of the new model, under its real routing. Of a change of experts the newcomer's
    alone learn."""

    def __init__(self, state: FitState, layer: int, start: MoELayer) -> None:
        """`start`: where the weights begin; it is left as it is."""
        self._config, self._start, self._names = state.config, start, sorted(start.experts)
        is_whole, family = state.newcomer is None, state.family
        # Copies: on the CPU the modules would learn on the weights that they were given.
        shared = {name: tensor.clone() for name, tensor in start.shared.items()}
        experts = {n: {k: v.clone() for k, v in e.items()} for n, e in start.experts.items()}
        router = {name: row.clone() for name, row in start.router.items()}
        self._attention = load_attention(state.config, layer, shared)
        self._shared: dict[str, Tensor] = {
            name: parameter
            for name, parameter in decoder_layer(self._attention).named_parameters()
            if is_whole and name in family.attention + family.vectors
        }
        moe = replace(start, experts=experts, router=router)
        self._mixture = mixture_of(state, moe, self._names)
        self._routes = is_whole and not start.is_dense
        self._experts = {
            name: expert
            for name, expert in zip(self._names, self._mixture.experts, strict=True)
            if name in state.names or start.is_dense
        }

    @property
    def parameters(self) -> list[Tensor]:
        """What learns."""
        router = [self._mixture.router] if self._routes else []
        experts = [tensor for expert in self._experts.values() for tensor in expert.values()]
        return [*self._shared.values(), *router, *experts]

    def of(self, aligned: MoELayer) -> list[Tensor | None]:
        """What another layer has for each of `parameters`; None for the router: none is aligned."""
        router: list[Tensor | None] = [None] if self._routes else []
        experts = [aligned.experts[name][key] for name, e in self._experts.items() for key in e]
        return [*(aligned.shared[name] for name in self._shared), *router, *experts]

    def run(
        self, before: Float[Tensor, "windows sequence hidden"]
    ) -> Float[Tensor, "windows sequence hidden"]:
        """The residual stream after the layer."""
        shared = self._start.shared
        middle = run_layer(self._attention, before)
        put_out = self._mixture(ffn_input(self._config, shared, middle))
        return after_ffn(self._config, shared, middle, put_out)

    def result(self) -> MoELayer:
        """The layer as its weights are now."""
        experts = zip(self._names, self._mixture.experts, strict=True)
        return replace(
            self._start,
            shared={**self._start.shared, **{k: v.detach().cpu() for k, v in self._shared.items()}},
            experts={n: {k: v.detach().cpu() for k, v in e.items()} for n, e in experts},
            router=router_rows(self._mixture.router.detach().cpu(), self._names),
        )
