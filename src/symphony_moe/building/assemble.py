"""Sources and maps -> the new model's tensors, part by part.

Everything here is a function of the recipe, the sources' weights and what `alignment.safetensors`
says, so `build` writes it (or fits it further: `fit_layer.py`) and `verify` computes it again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from symphony_moe.building.alignment import Alignment
from symphony_moe.building.fuse import drop_neurons, linear_mean, selective_linear, slerp
from symphony_moe.building.router_init import random_router
from symphony_moe.model.families import (
    DOWN,
    EMBEDDING,
    HEAD,
    HEAD_AXIS,
    NEURON_AXIS,
    O_PROJ,
    stream_scale,
)
from symphony_moe.model.moe_layer import MoELayer, always_on, dense_layer, router_rows
from symphony_moe.model.symmetry import (
    fold_gains,
    gain_of,
    neutral_gain,
    reorder_heads,
    reorder_neurons,
    rotate_residual,
    scale_residual,
    transform_embedding,
    transform_head,
)
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.source import SharedReads, Source, anchor_of, is_tied


def aligned_layer(
    recipe: Recipe, source: Source, layer: int, weights: Mapping[str, Tensor], alignment: Alignment
) -> dict[str, Tensor]:
    """A source's layer in the anchor's coordinates: the same function in other weights. `weights`:
    the layer as it is (name within the layer -> tensor).

    Raises ValueError for a map that is no symmetry of the family.
    """
    aligned = fold_gains(source.family, weights) if recipe.folds else dict(weights)
    residual = alignment.residual(source.name)
    if residual is not None:
        aligned = rotate_residual(source.family, aligned, residual)
    heads = alignment.heads(source.name, layer)
    if heads is not None:
        aligned = reorder_heads(source.family, source.config, aligned, heads)
    neurons = alignment.neurons(source.name, layer)
    if neurons is not None:
        aligned = reorder_neurons(aligned, neurons)
    return aligned


def aligned_table(
    recipe: Recipe,
    source: Source,
    name: str,
    alignment: Alignment,
    reads: SharedReads | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a source's token embeddings or output head in the anchor's coordinates,
    block by block. `reads`: the pass over several sources that this is a part of."""
    residual = alignment.residual(source.name)
    gain = gain_of(source.family, source.final_norm())
    stored = EMBEDDING if name == EMBEDDING else source.head_name
    for first, rows in source.table(stored, reads, as_head=name == HEAD):
        if name == HEAD and recipe.folds:
            yield first, transform_head(rows, gain, residual)
        else:
            yield first, transform_embedding(rows, residual)


def fused_tables(
    recipe: Recipe, sources: Sequence[Source], names: Sequence[str], alignment: Alignment
) -> Iterator[tuple[str, int, Tensor]]:
    """(name, first row, rows) of the token embeddings and the output head, block by block.

    `names`: which of them the output has (a tied head is not written). Where the alignment has the
    number of each token in each source's text, token embeddings are weighted by it.
    """
    method = recipe.backbone.embeddings
    scale = stream_scale_of(recipe, sources)
    sources = _by_name(sources)
    shares = _shares(recipe, sources, method)
    for name in names:
        reads = SharedReads(sources)
        tables = (aligned_table(recipe, source, name, alignment, reads) for source in sources)
        for parts in zip(*tables, strict=True):
            first, blocks = parts[0][0], [rows for _, rows in parts]
            if method == "selective-linear":
                rows = slice(first, first + len(blocks[0]))
                knowledge = torch.stack([_knows(source, rows) for source in sources])
                counts = [alignment.token_counts(source.name) for source in sources]
                if name == EMBEDDING and None not in counts:
                    # One more of each: a token in nobody's text gets the plain mean.
                    knowledge *= torch.stack([c[rows] + 1.0 for c in counts if c is not None])
                fused = selective_linear(blocks, knowledge, shares)
            else:
                fused = linear_mean(blocks, shares)
            yield name, first, fused * scale if name == EMBEDDING and scale != 1 else fused


def _knows(source: Source, rows: slice) -> Float[Tensor, " rows"]:
    """1 for the tokens that a source has, 0 for the others."""
    if source.known is None:
        return torch.ones(rows.stop - rows.start)
    return source.known[rows].float()


def fused_final_norm(recipe: Recipe, sources: Sequence[Source]) -> Tensor:
    """The gains of the norm before the head."""
    if recipe.folds:
        anchor = anchor_of(recipe, sources)
        return neutral_gain(anchor.family, anchor.final_norm())
    ordered = _by_name(sources)
    shares = _shares(recipe, ordered, recipe.backbone.norms)
    fused = linear_mean([source.final_norm() for source in ordered], shares)
    # A tied head is as much too large as the token embeddings.
    return fused / stream_scale_of(recipe, sources) if is_tied(recipe, sources) else fused


def assemble_layer(
    recipe: Recipe,
    sources: Sequence[Source],
    layer: int,
    aligned: Mapping[str, Mapping[str, Tensor]],
) -> MoELayer:
    """One layer of the new model before any fitting: the fused backbone, the experts, random
    routers. `aligned`: source -> its layer, see `aligned_layer`."""
    family = sources[0].family
    backbone = recipe.backbone
    scale = stream_scale_of(recipe, sources)
    aligned = {name: scale_residual(tensors, scale) for name, tensors in aligned.items()}
    shared: dict[str, Tensor] = {}
    ordered = _by_name(sources)
    for name in family.shared:
        tensors = [aligned[source.name][name] for source in ordered]
        if recipe.concatenates_heads and name in HEAD_AXIS:
            shares = _shares(recipe, ordered, backbone.attention)
            shared[name] = concatenated(name, tensors, shares)
            continue
        method = backbone.norms if name in family.norms else backbone.attention
        # Vectors are always averaged linearly.
        angles = method == "slerp" and name in family.attention
        shared[name] = _fused(recipe, ordered, tensors, method if angles else _plain(method))
    if layer in recipe.experts.dense_layers:
        return dense_layer(shared, _fused_ffn(recipe, ordered, aligned))
    found = assemble_experts(recipe, sources, layer, aligned, shared)
    if not recipe.has_shared_expert:
        return found
    ffn = _fused_ffn(recipe, ordered, aligned)
    return replace(found, always=always_on({**ffn, DOWN: ffn[DOWN] * recipe.experts.shared_weight}))


def _fused_ffn(
    recipe: Recipe, ordered: Sequence[Source], aligned: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """One FFN of all sources'. The anchor's alone may have another width than theirs."""
    if recipe.backbone.ffn == "anchor":
        return {name: aligned[recipe.anchor][name].float() for name in NEURON_AXIS}
    return {
        name: _fused(recipe, ordered, [aligned[s.name][name] for s in ordered], recipe.backbone.ffn)
        for name in NEURON_AXIS
    }


def _fused(
    recipe: Recipe, sources: Sequence[Source], tensors: Sequence[Tensor], method: str
) -> Tensor:
    """One tensor of several sources'. `method`: linear, slerp or anchor."""
    mean = slerp if method == "slerp" else linear_mean
    return mean(tensors, _shares(recipe, sources, method))


def _plain(method: str) -> str:
    return "linear" if method == "slerp" else method


def concatenated(name: str, tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The heads of several sources side by side. Each source's o counts by its share, so that the
    heads of equal sources put out together what those of one do."""
    if name == O_PROJ:
        tensors = [tensor.float() * share for tensor, share in zip(tensors, shares, strict=True)]
    return torch.cat(list(tensors), dim=HEAD_AXIS[name])


def assemble_experts(
    recipe: Recipe,
    sources: Sequence[Source],
    layer: int,
    scaled: Mapping[str, Mapping[str, Tensor]],
    shared: Mapping[str, Tensor],
) -> MoELayer:
    """The experts of some sources around a backbone, `shared`, and random routers for them.
    `scaled`: the layers that the experts are taken from (`origin_of`), aligned, at the scale of the
    new model's stream."""
    family = sources[0].family
    experts: dict[str, Mapping[str, Tensor]] = {}
    for source in sources:
        origin = scaled[origin_of(recipe, source.name)]
        expert: Mapping[str, Tensor] = {name: origin[name] for name in family.expert}
        if recipe.redraws_neurons:
            key = f"{recipe.seed}/{layer}/{source.name}"
            expert = drop_neurons(expert, NEURON_AXIS, recipe.experts.drop_share, key)
        if recipe.has_shared_expert:
            expert = {**expert, DOWN: expert[DOWN] * (1 - recipe.experts.shared_weight)}
        experts[source.name] = expert
    hidden = sources[0].config.hidden_size

    def router(part: str) -> dict[str, Tensor]:
        matrix = random_router(list(experts), hidden, layer, recipe.seed, part)
        return router_rows(matrix, experts)

    has_attention = family.attention_router is not None
    attention_router = router("attention-router") if has_attention else None
    return MoELayer(shared, experts, router("router"), attention_router)


def origin_of(recipe: Recipe, expert: str) -> str:
    """The source whose matrices an expert begins with."""
    return recipe.anchor if recipe.copies_anchor else expert


def stream_scale_of(recipe: Recipe, sources: Sequence[Source]) -> float:
    """How many times as large as the sources' the residual stream of the new model is."""
    anchor = anchor_of(recipe, sources)
    return stream_scale(anchor.family, anchor.config)


def _by_name(sources: Sequence[Source]) -> list[Source]:
    """Sums go through the sources by name, so that the order of the recipe does not change so much
    as their rounding, which a fit would make more of."""
    return sorted(sources, key=lambda source: source.name)


def _shares(recipe: Recipe, sources: Sequence[Source], method: str) -> list[float]:
    """What each source counts in a mean."""
    if method == "anchor":
        return [float(source.name == recipe.anchor) for source in sources]
    shares = dict(zip(recipe.expert_names, recipe.shares, strict=True))
    return [shares[source.name] for source in sources]
