"""Calibration text through the sources, one layer at a time, keeping statistics and no activations.

A layer advances the sources' residual streams in place, batch by batch, and hands what passes
inside it to the accumulators of `align.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from symphony_moe.building.align import (
    Comparison,
    HeadActivity,
    HeadCorrelation,
    NeuronCorrelation,
    ResidualCovariance,
)
from symphony_moe.model.families import EMBEDDING, head_dim
from symphony_moe.model.layer import device, load_dense_layer, observe, run_layer
from symphony_moe.model.streams import Streams, windows_at_once
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.source import Source


def embedding_blocks(source: Source) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a source's own token embeddings."""
    yield from source.table(EMBEDDING)


@torch.inference_mode()
def compare_layer(
    recipe: Recipe,
    sources: Sequence[Source],
    layer: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    streams: Streams,
    aside: int,
    *,
    statistics: bool,
) -> dict[str, Comparison]:
    """Run one layer of every source over the whole calibration text: the streams named after the
    sources advance.

    Returns, for every source but the anchor, how it compares with the anchor on the same tokens
    (nothing where `statistics` is false). The residual stream is compared before the layer, between
    attention and FFN, and after the last layer. `weights`: source -> its layer's tensors. `aside`:
    windows at the beginning of the streams that are compared apart, to judge by.
    """
    ordered = sorted(sources, key=lambda source: source.name != recipe.anchor)  # the anchor first
    config = ordered[0].config
    models = {s.name: load_dense_layer(s.config, layer, weights[s.name]) for s in ordered}
    is_last = layer == config.num_hidden_layers - 1
    found = {}
    if statistics:
        found = {source.name: _blank(recipe, source, aside) for source in ordered[1:]}
    sequence = streams[recipe.anchor].shape[1]
    ends = [0, aside, len(streams[recipe.anchor])]
    batches = [
        slice(first, min(first + windows_at_once(sequence), end))
        for begin, end in pairwise(ends)
        for first in range(begin, end, windows_at_once(sequence))
    ]
    for batch in batches:
        reference: dict[str, Tensor] = {}
        for source in ordered:
            hidden = streams[source.name][batch]
            before = hidden.to(device(), copy=True)
            with observe(models[source.name]) as seen:
                after = run_layer(models[source.name], before)
            hidden.copy_(after)
            seen |= {"before": before, "after": after}
            if not reference:
                reference = seen
            elif statistics:
                places = ("before", "middle", "after") if is_last else ("before", "middle")
                comparison = found[source.name]
                if batch.start < aside:
                    comparison = comparison.aside or comparison
                _add(comparison, reference, seen, places, head_dim(config))
    return found


def _blank(recipe: Recipe, source: Source, aside: int) -> Comparison:
    """Statistics of nothing yet. `aside`: windows to judge the maps by, which neurons' order, being
    used in any case, is not."""
    config = source.config

    def blank() -> Comparison:
        comparison = Comparison()
        if recipe.align.residual == "orthogonal":
            comparison.residual = ResidualCovariance(config.hidden_size, device())
        if recipe.align.heads == "all":
            comparison.heads = HeadCorrelation(config, device())
        return comparison

    comparison = blank()
    if recipe.aligns_neurons:
        comparison.neurons = NeuronCorrelation(config.intermediate_size, device())
        comparison.neuron_share = recipe.align.neuron_share
    if aside:
        comparison.aside = blank()
    return comparison


def _add(
    comparison: Comparison,
    anchor: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    places: Sequence[str],
    size: int,
) -> None:
    if comparison.residual is not None:
        for place in places:
            comparison.residual.update(*(seen[place].flatten(0, 1) for seen in (anchor, source)))
    if comparison.heads is not None:
        comparison.heads.update(*(_head_activity(seen, size) for seen in (anchor, source)))
    if comparison.neurons is not None:
        comparison.neurons.update(*(seen["neurons"].flatten(0, 1) for seen in (anchor, source)))


def _head_activity(seen: Mapping[str, Tensor], size: int) -> HeadActivity:
    tokens = seen["heads"].shape[0] * seen["heads"].shape[1]
    parts = (seen[name].reshape(tokens, -1, size) for name in ("queries", "keys", "heads"))
    return HeadActivity(*parts)
