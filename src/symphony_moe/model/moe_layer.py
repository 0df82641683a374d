"""One layer of a Mixture-of-Experts model, and its tensors under the names of the output."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig

from symphony_moe.model.families import (
    DOWN,
    K_PROJ,
    NEURON_AXIS,
    ROTARY,
    SHARED_GATE,
    V_PROJ,
    Family,
    head_dim,
    queries_per_kv,
)
from symphony_moe.processes import Processes

DENSE = "(dense)"
"""The one expert of a layer without experts, which is a mixture of one: its FFN. No source can have
this name."""


@dataclass(frozen=True)
class MoELayer:
    """One finished layer in the dense family's own layout, before it takes the target's names.

    Experts go by the name of their source. Their numbers are given when the layer is written
    (`layer_outputs`), and nowhere else.
    """

    shared: Mapping[str, Tensor]
    """`Family.shared` name -> tensor."""
    experts: Mapping[str, Mapping[str, Tensor]]
    """Expert -> `Family.expert` name -> tensor."""
    router: Mapping[str, Float[Tensor, " hidden"]]
    """Expert -> its row."""
    attention_router: Mapping[str, Float[Tensor, " hidden"]] | None = None
    """The same, where the experts have attention matrices."""
    always: Mapping[str, Tensor] | None = None
    """The FFN that every token goes through beside its experts (GATE, UP and DOWN), and its
    SHARED_GATE (1 x hidden): what it puts out is multiplied by twice the sigmoid of that, which is
    1 where the row is zero."""

    @property
    def is_dense(self) -> bool:
        """Whether it has one FFN for every token, and no experts to choose from."""
        return DENSE in self.experts

    def to(self, dtype: torch.dtype) -> "MoELayer":
        """The same layer, rounded to another dtype."""

        def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(dtype) for name, tensor in tensors.items()}

        attention = self.attention_router
        return MoELayer(
            rounded(self.shared),
            {name: rounded(expert) for name, expert in self.experts.items()},
            rounded(self.router),
            None if attention is None else rounded(attention),
            None if self.always is None else rounded(self.always),
        )


def dense_layer(shared: Mapping[str, Tensor], ffn: Mapping[str, Tensor]) -> MoELayer:
    """A layer without experts. `ffn`: GATE, UP and DOWN. The row of its router is never written: it
    has nothing to choose."""
    row = torch.zeros(ffn[DOWN].shape[0], dtype=ffn[DOWN].dtype, device=ffn[DOWN].device)
    return MoELayer(shared, {DENSE: ffn}, {DENSE: row})


def always_on(ffn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`MoELayer.always` of an FFN that every token goes through, and gets all of."""
    down = ffn[DOWN]
    row = torch.zeros(1, down.shape[0], dtype=down.dtype, device=down.device)
    return {**ffn, SHARED_GATE: row}


def slice_names(experts: Iterable[str], count: int) -> list[str]:
    """The experts that each of some experts is dealt into, in the order of the output."""
    return [f"{name}.{place}" for name in experts for place in range(count)]


def slice_experts(layer: MoELayer, count: int) -> MoELayer:
    """Each expert as `count` experts of as many neurons less, which add up to it: its neurons are
    dealt one by one, so that each slice has its part of the zeros that pad a narrow FFN.

    All slices of an expert have its router row, so that a token goes to all of them or to none
    where it has `count` times as many experts. Each then has 1 / `count` of the expert's gate;
    `down` is as many times as large. In float32 a power of two keeps every digit of it. (float16
    has fewer digits for small numbers, so a layer is rounded after this.)
    (Fine-grained experts as in DeepSeekMoE, arXiv 2401.06066; rows and scales as in He et al.,
    arXiv 2410.07524.)
    """
    experts, router = {}, {}
    for name, expert in layer.experts.items():
        scaled = {**expert, DOWN: expert[DOWN] * count}
        # Neurons that are next to each other are then in different slices.
        parts = {key: scaled[key].unflatten(axis, (-1, count)) for key, axis in NEURON_AXIS.items()}
        for place, own in enumerate(slice_names([name], count)):
            experts[own] = {
                key: parts[key].select(axis + 1, place) for key, axis in NEURON_AXIS.items()
            }
            router[own] = layer.router[name]
    return replace(layer, experts=experts, router=router)


def join_slices(layer: MoELayer, experts: Sequence[str], count: int) -> MoELayer:
    """The inverse of `slice_experts`, of slices whose router rows are still the same. `experts`:
    the names of the whole ones."""
    whole = {}
    for name in experts:
        parts = [layer.experts[own] for own in slice_names([name], count)]
        whole[name] = {
            key: torch.stack([part[key] for part in parts], axis + 1).flatten(axis, axis + 1)
            for key, axis in NEURON_AXIS.items()
        }
        whole[name][DOWN] = whole[name][DOWN] / count
    router = {name: layer.router[slice_names([name], count)[0]] for name in experts}
    return replace(layer, experts=whole, router=router)


def same_rows(layer: MoELayer, dtype: torch.dtype) -> tuple[str, str] | None:
    """The first two experts whose router rows are the same in a dtype; None where there are none.
    Of such two a token may get some slices of one and some of the other."""
    rows = {name: row.to(dtype) for name, row in layer.router.items()}
    equal = (pair for pair in combinations(rows, 2) if torch.equal(*(rows[name] for name in pair)))
    return next(equal, None)


def shared_layer(processes: Processes, layer: MoELayer | None) -> MoELayer:
    """The first process's layer, for all; what the others pass is not looked at."""
    if processes.count == 1:
        assert layer is not None
        return layer
    return _from_named(processes.share(None if layer is None else named_parts(layer)))


def named_parts(layer: MoELayer) -> dict[str, Tensor]:
    """The layer's tensors, each by the path to it (a name may hold any character but a newline)."""
    parts: dict[str, Mapping[str, Tensor]] = {"shared": layer.shared, "router": layer.router}
    if layer.attention_router is not None:
        parts["attention_router"] = layer.attention_router
    if layer.always is not None:
        parts["always"] = layer.always
    parts |= {f"experts\n{name}": expert for name, expert in layer.experts.items()}
    return {
        f"{part}\n{n}": tensor for part, tensors in parts.items() for n, tensor in tensors.items()
    }


def _from_named(tensors: Mapping[str, Tensor]) -> MoELayer:
    """The inverse of `named_parts`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        part, name = path.rsplit("\n", 1)
        parts.setdefault(part, {})[name] = tensor
    shared, router = parts.pop("shared"), parts.pop("router")
    chooser, always = parts.pop("attention_router", None), parts.pop("always", None)
    experts = {part.partition("\n")[2]: own for part, own in parts.items()}
    return MoELayer(shared, experts, router, chooser, always)


def router_matrix(
    rows: Mapping[str, Float[Tensor, " hidden"]], experts: Iterable[str]
) -> Float[Tensor, "experts hidden"]:
    """A router as a matrix, its rows in the order of `experts`."""
    return torch.stack([rows[name] for name in experts])


def router_rows(
    matrix: Float[Tensor, "experts hidden"], experts: Iterable[str]
) -> dict[str, Float[Tensor, " hidden"]]:
    """The inverse of `router_matrix`."""
    return dict(zip(experts, matrix, strict=True))


def interleave_rotary(rows: Float[Tensor, "rows ..."], head_size: int) -> Float[Tensor, "rows ..."]:
    """Reorder the rows of q or k (or its bias), head by head, so that the pair (j, j + head_size /
    2) becomes the neighbours (2j, 2j + 1). Attention scores stay as they are: q and k move
    together."""
    heads = rows.view(-1, 2, head_size // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def undo_interleave_rotary(
    rows: Float[Tensor, "rows ..."], head_size: int
) -> Float[Tensor, "rows ..."]:
    """The inverse of `interleave_rotary`."""
    heads = rows.view(-1, head_size // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def repeat_heads(
    rows: Float[Tensor, "rows hidden"], head_size: int, times: int
) -> Float[Tensor, "more_rows hidden"]:
    """k or v with a KV head of its own for every query head: each head, `times` times in a row."""
    heads = rows.view(-1, head_size, rows.shape[1])
    return heads.repeat_interleave(times, dim=0).reshape(-1, rows.shape[1])


def undo_repeat_heads(
    rows: Float[Tensor, "rows hidden"], head_size: int, times: int
) -> Float[Tensor, "fewer_rows hidden"]:
    """The inverse of `repeat_heads`: the first of each `times` heads."""
    heads = rows.view(-1, times, head_size, rows.shape[1])
    return heads[:, 0].reshape(-1, rows.shape[1])


def read_layer_outputs(
    family: Family,
    config: PreTrainedConfig,
    layer: int,
    experts: Sequence[str],
    read: Callable[[str], Tensor],
) -> MoELayer:
    """The inverse of `layer_outputs`. `read`: name in the checkpoint -> tensor, in float32 where
    every digit counts. Experts that were dealt into slices are whole, which says nothing of slices
    that have been trained."""
    prefix = f"model.layers.{layer}."
    if family.slices > 1:
        unsliced, names = replace(family, slices=1), slice_names(experts, family.slices)
        found = read_layer_outputs(unsliced, config, layer, names, read)
        return found if found.is_dense else join_slices(found, experts, family.slices)

    def read_parts(names: Iterable[str], outputs: Mapping[str, str]) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for output, inside in _by_output(names, outputs).items():
            whole = read(prefix + output)
            rows = max(0, whole.ndim - 2)
            parts |= zip(inside, whole.chunk(len(inside), dim=rows), strict=True)
        return parts

    shared = {
        name: _from_target(family, config, name, tensor)
        for name, tensor in read_parts(family.shared, family.renamed).items()
    }
    if layer in family.dense_layers:
        assert family.dense_ffn is not None
        return dense_layer(shared, read_parts(family.dense_ffn, family.dense_ffn))
    if family.stacks_experts:
        stacked = read_parts(family.expert, family.expert)
        own = [{name: stacked[name][n] for name in family.expert} for n in range(len(experts))]
    else:
        own = [
            {dense: read(prefix + name.format(expert=n)) for dense, name in family.expert.items()}
            for n in range(len(experts))
        ]

    def read_router(name: str) -> dict[str, Tensor]:
        return router_rows(read(prefix + name), experts)

    chooser, always = family.attention_router, None
    if family.has_shared_expert:
        assert family.shared_expert is not None
        always = read_parts(family.shared_expert, family.shared_expert)
        always[DOWN] = always[DOWN] / 2
    return MoELayer(
        shared,
        dict(zip(experts, own, strict=True)),
        read_router(family.router),
        None if chooser is None else read_router(chooser),
        always,
    )


def layer_outputs(
    family: Family, config: PreTrainedConfig, layer: int, moe: MoELayer, experts: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint, tensor) for everything that the target has in one layer. `experts`:
    their order, which makes their numbers."""
    prefix = f"model.layers.{layer}."
    for output, names in _by_output(family.shared, family.renamed).items():
        parts = [_to_target(family, config, name, moe.shared[name]) for name in names]
        yield prefix + output, parts[0] if len(parts) == 1 else torch.cat(parts)
    yield from ((prefix + name, tensor) for name, tensor in _filled(family, config, moe, experts))
    if moe.is_dense:
        assert family.dense_ffn is not None
        yield from ((prefix + new, moe.experts[DENSE][n]) for n, new in family.dense_ffn.items())
        return
    if family.slices > 1:
        moe = slice_experts(moe, family.slices)
        experts = slice_names(experts, family.slices)
    router = router_matrix(moe.router, experts)
    if moe.always is not None:
        assert family.shared_expert is not None
        # The sigmoid of a gate of zeros is one half.
        always = {**moe.always, DOWN: moe.always[DOWN] * 2}
        yield from ((prefix + new, always[own]) for own, new in family.shared_expert.items())
    yield prefix + family.router, router
    if family.attention_router is not None:
        assert moe.attention_router is not None
        yield prefix + family.attention_router, router_matrix(moe.attention_router, experts)
    for name, tensor in _expert_outputs(family, moe, experts):
        yield prefix + name, tensor


def _filled(
    family: Family, config: PreTrainedConfig, moe: MoELayer, experts: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """(name within the layer, tensor) for what the target has and the sources lack. A layer with
    one FFN has those of attention alone."""
    sizes = {
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "queries": config.num_attention_heads * head_dim(config),
        "keys": config.num_key_value_heads * head_dim(config),
        "experts": len(experts) * family.slices,
    }
    dtype = next(iter(moe.shared.values())).dtype
    filled = {name: (axes, 0.0) for name, axes in family.zeros.items()} | dict(family.constants)
    for name, (axes, number) in filled.items():
        if not moe.is_dense or name.startswith("self_attn."):
            shape = [sizes.get(axis) or int(axis) for axis in axes.split()]
            yield name, torch.full(shape, number, dtype=dtype)


def _expert_outputs(
    family: Family, moe: MoELayer, experts: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """(name within the layer, tensor) for the matrices of the experts."""
    if family.stacks_experts:
        for output, names in _by_output(family.expert, family.expert).items():
            matrices = [moe.experts[expert][name] for expert in experts for name in names]
            yield output, torch.cat(matrices).view(len(experts), -1, matrices[0].shape[1])
        return
    for number, expert in enumerate(experts):
        for dense_name, name in family.expert.items():
            yield name.format(expert=number), moe.experts[expert][dense_name]


def _by_output(names: Iterable[str], outputs: Mapping[str, str]) -> dict[str, list[str]]:
    """Name in the output (a tensor's own, unless `outputs` has another) -> the tensors in it."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(outputs.get(name, name), []).append(name)
    return grouped


def _to_target(family: Family, config: PreTrainedConfig, name: str, tensor: Tensor) -> Tensor:
    """A shared tensor with its rows as the target has them."""
    if family.interleaved_rotary and name.startswith(ROTARY):
        return interleave_rotary(tensor, head_dim(config))
    if family.repeats_kv and name in (K_PROJ, V_PROJ):
        return repeat_heads(tensor, head_dim(config), queries_per_kv(config))
    return tensor


def _from_target(family: Family, config: PreTrainedConfig, name: str, tensor: Tensor) -> Tensor:
    """The inverse of `_to_target`."""
    if family.interleaved_rotary and name.startswith(ROTARY):
        return undo_interleave_rotary(tensor, head_dim(config))
    if family.repeats_kv and name in (K_PROJ, V_PROJ):
        return undo_repeat_heads(tensor, head_dim(config), queries_per_kv(config))
    return tensor
