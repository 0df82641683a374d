"""Sources of unequal shapes, brought to one.

FFNs of unequal width are padded in any case. Hidden sizes, heads and depths are widened where
`backbone.shapes` says so (`model/widening.py`). A source that has fewer layers than another is
matched to the deepest: by the recipe (`sources.NAME.layers`), or evenly.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig

from symphony_moe.errors import SourceMismatch
from symphony_moe.model.families import BY_LAYER, head_dim
from symphony_moe.model.widening import Layers, Shape, Widening, widened_config, widest
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.source import Source


def of_one_shape(recipe: Recipe, sources: Sequence[Source]) -> list[Source]:
    """The sources, those that become experts with one shape: they are padded as they are read.
    Sources that cannot have one are left as they are; `find_differences` says why.

    Raises SourceMismatch for `layers` that do not fit, and where no architecture holds the shape.
    """
    sources = [source.as_stored for source in sources]
    if recipe.widens:
        sources = _widened(recipe, sources)
    return _of_one_width(recipe, sources)


def deepest(recipe: Recipe, sources: Sequence[Source]) -> Source:
    """The source that the layers of the others are matched to: the anchor, where none of the
    experts' sources is deeper."""
    experts = [source.as_stored for source in sources if source.name in recipe.expert_names]
    return max(experts, key=lambda s: (s.config.num_hidden_layers, s.name == recipe.anchor))


def shallow(recipe: Recipe, sources: Sequence[Source]) -> list[Source]:
    """The sources whose layers have to be matched to the deepest one's, and are not."""
    if not recipe.widens:
        return []
    return [
        source
        for source in sources
        if source.widening is not None
        and None in source.widening.layers
        and recipe.sources[source.name].layers is None
    ]


def match_layers(
    own: PreTrainedConfig,
    reference: PreTrainedConfig,
    alike: Float[Tensor, "own_places places"] | None = None,
) -> Layers | None:
    """Where a model's layers are among those of a deeper one: in order, each beside a layer that
    attends as it does (`BY_LAYER`); None where there is no such order.

    `alike`: how alike the residual streams are after each number of layers, 0 included, of the
    model and of the deeper one, each beside the mean of its row: a stream that is little like any
    says as much of its place as one that is like all. Of all orders that one is found in which the
    sum over all places is largest (dynamic programming). Without it the streams are alike that are
    equally far through.
    """
    count, depth = own.num_hidden_layers, reference.num_hidden_layers
    if alike is None:
        through = (torch.arange(size + 1) / size for size in (count, depth))
        alike = -torch.cdist(*(part[:, None] for part in through))
    else:
        alike = alike - alike.mean(dim=1, keepdim=True)
    fits = [[_attend_alike(own, n, reference, at) for at in range(depth)] for n in range(count)]
    # best[n, at]: the largest sum up to place `at`, with n of the model's layers behind.
    best = torch.full((count + 1, depth + 1), -torch.inf, dtype=torch.float64)
    best[0, 0] = 0.0
    goes_on = torch.zeros(count + 1, depth + 1, dtype=torch.bool)
    for at in range(1, depth + 1):
        for n in range(count + 1):
            stays = best[n, at - 1]
            goes = (
                best[n - 1, at - 1] if n and fits[n - 1][at - 1] else stays.new_tensor(-torch.inf)
            )
            goes_on[n, at] = goes > stays
            best[n, at] = torch.maximum(goes, stays) + alike[n, at].double()
    if not bool(best[count, depth].isfinite()):
        return None
    found: list[int | None] = []
    n = count
    for at in range(depth, 0, -1):
        went = bool(goes_on[n, at])
        found.append(n - 1 if went else None)
        n -= went
    return tuple(reversed(found))


def _attend_alike(one: PreTrainedConfig, layer: int, other: PreTrainedConfig, at: int) -> bool:
    """Whether two layers have one kind of attention: a window or none, RoPE or none."""
    pairs = [(getattr(one, name, None), getattr(other, name, None)) for name in BY_LAYER]
    return all(not (mine and theirs) or mine[layer] == theirs[at] for mine, theirs in pairs)


def _widened(recipe: Recipe, sources: Sequence[Source]) -> list[Source]:
    experts = [source for source in sources if source.name in recipe.expert_names]
    configs = {source.name: source.config for source in experts}
    kinds = {(config.model_type, head_dim(config)) for config in configs.values()}
    if len(kinds) > 1:
        return list(sources)
    shape = widest([Shape.of(config) for config in configs.values()])
    reference = deepest(recipe, experts).config
    changed = {}
    for source in experts:
        layers = _layers(recipe, source, reference)
        if Shape.of(source.config) != shape:
            config = widened_config(source.config, shape, layers, reference)
            widening = Widening(source.config, config, layers)
            changed[source.name] = replace(source, config=config, widening=widening)
    for source in changed.values():
        reason = source.family.refusal(source.config)
        if reason is not None:
            padded = padded_shapes(changed)[source.name]
            raise SourceMismatch(
                f"backbone.shapes: {source.name} with {padded}: {reason}. "
                "Use checkpoints of one shape, or leave one out"
            )
    return [changed.get(source.name, source) for source in sources]


def _layers(recipe: Recipe, source: Source, reference: PreTrainedConfig) -> Layers:
    """Where a source's layers are: as the recipe says, or evenly."""
    own, depth = source.config.num_hidden_layers, reference.num_hidden_layers
    listed = recipe.sources[source.name].layers
    if listed is None:
        found = match_layers(source.config, reference)
        if found is None:
            raise SourceMismatch(
                f"backbone.shapes: {source.name} has {own} layers, the deepest source {depth}, and "
                "in no order has each of them a layer beside it that attends as it does "
                f"({' and '.join(BY_LAYER)} of the configs). Use checkpoints of one depth, or "
                "leave one out"
            )
        return found
    if len(listed) != depth or [at for at in listed if at is not None] != list(range(own)):
        hint = "Leave it out to have it found"
        if recipe.parent is not None:
            hint = (
                "The experts of a run all have its number of layers: build anew with these sources"
            )
        raise SourceMismatch(
            f"sources.{source.name}.layers: expected {depth} entries, with 0 to {own - 1} in order "
            f"and {depth - own} null(s), got {json.dumps(listed)[:120]}. {hint}"
        )
    return tuple(listed)


def _of_one_width(recipe: Recipe, sources: Sequence[Source]) -> list[Source]:
    """The sources, those that become experts with the widest one's number of neurons. Copies of the
    anchor's FFN have its width without that, where no FFN is merged."""
    if recipe.copies_anchor and not recipe.merges_ffns:
        return list(sources)
    experts = [source for source in sources if source.name in recipe.expert_names]
    widest_ffn = max((source.config.intermediate_size for source in experts), default=0)
    padded = {}
    for source in experts:
        if source.config.intermediate_size < widest_ffn:
            config = copy.deepcopy(source.config)
            config.intermediate_size = widest_ffn
            padded[source.name] = replace(source, config=config)
    return [padded.get(source.name, source) for source in sources]


_WORDS = {
    "hidden": "hidden size",
    "layers": "layers",
    "heads": "query heads",
    "kv_heads": "KV heads",
}


def padded_shapes(sources: Mapping[str, Source]) -> dict[str, str]:
    """Source -> what is widened, from what to what; of those that are."""
    found = {}
    for name, source in sources.items():
        if source.widening is not None:
            old, new = (Shape.of(config) for config in (source.widening.own, source.config))
            changes = zip(_WORDS.values(), old, new, strict=True)
            found[name] = ", ".join(f"{what} {a} to {b}" for what, a, b in changes if a != b)
    return found
