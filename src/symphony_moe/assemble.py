"""Sources and neuron orders -> the new model's tensors, part by part.

Everything here is a function of the recipe, the sources' weights and the recorded neuron orders, so
`build` writes it and `verify` computes it again.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from symphony_moe.align import reorder_neurons
from symphony_moe.families import EMBEDDING, FINAL_NORM, HEAD, MoELayer
from symphony_moe.fuse import linear_mean, selective_linear, slerp
from symphony_moe.recipe import Recipe
from symphony_moe.route import random_router
from symphony_moe.sources import TABLE_ROWS, Source


def fused_tables(
    recipe: Recipe, sources: Sequence[Source], names: Sequence[str]
) -> Iterator[tuple[str, int, Tensor]]:
    """(name, first row, rows) of the token embeddings and the output head, block by block. `names`:
    which of them the output has (a tied head is not written)."""
    shares = _anchor_only(recipe) if recipe.backbone.embeddings == "anchor" else recipe.shares
    for name in names:
        for first in range(0, sources[0].config.vocab_size, TABLE_ROWS):
            rows = slice(first, first + TABLE_ROWS)
            blocks = [s.read(s.head_name if name == HEAD else EMBEDDING, rows) for s in sources]
            if recipe.backbone.embeddings == "selective-linear":
                # The plan refuses sources whose vocabularies differ: every source knows every
                # token.
                known = torch.ones(len(blocks), len(blocks[0]), dtype=torch.bool)
                yield name, first, selective_linear(blocks, known, shares)
            else:
                yield name, first, linear_mean(blocks, shares)


def fused_final_norm(recipe: Recipe, sources: Sequence[Source]) -> Tensor:
    """The gains of the norm before the head."""
    shares = _anchor_only(recipe) if recipe.backbone.norms == "anchor" else recipe.shares
    return linear_mean([source.read(FINAL_NORM) for source in sources], shares)


def assemble_layer(
    recipe: Recipe,
    sources: Sequence[Source],
    layer: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    orders: Mapping[str, Tensor],
) -> MoELayer:
    """One layer of the new model: the fused backbone, the experts, the router.

    `weights`: source -> its layer's tensors. `orders`: source -> neuron order, for the sources
    whose neurons are reordered.
    """
    family = sources[0].family
    backbone = recipe.backbone
    shared: dict[str, Tensor] = {}
    for name in family.shared:
        tensors = [weights[source.name][name] for source in sources]
        method = backbone.norms if name in family.norms else backbone.attention
        if method == "anchor":
            shared[name] = linear_mean(tensors, _anchor_only(recipe))
        elif method == "slerp" and name in family.attention:
            shared[name] = slerp(tensors, recipe.shares)
        else:
            shared[name] = linear_mean(tensors, recipe.shares)
    experts = []
    for source in sources:
        origin = recipe.anchor if recipe.experts.init == "copy" else source.name
        ffn = {name: weights[origin][name] for name in family.expert}
        experts.append(reorder_neurons(ffn, orders[origin]) if origin in orders else ffn)
    names = [source.name for source in sources]
    router = random_router(names, sources[0].config.hidden_size, layer, recipe.seed)
    return MoELayer(shared, experts, router)


def _anchor_only(recipe: Recipe) -> list[float]:
    return [float(name == recipe.anchor) for name in recipe.sources]
