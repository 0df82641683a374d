"""Calibration text through the sources, one layer at a time, keeping statistics and no activations.

A layer advances the sources' residual streams in place, batch by batch, and hands what passes
inside it to the accumulators of `align.py`.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from symphony_moe.align import (
    Comparison,
    HeadActivity,
    HeadCorrelation,
    NeuronCorrelation,
    ResidualCovariance,
)
from symphony_moe.errors import TextError
from symphony_moe.families import EMBEDDING, head_dim
from symphony_moe.forward import device, load_dense_layer, observe, run_layer
from symphony_moe.recipe import Recipe
from symphony_moe.sources import TABLE_ROWS, Source
from symphony_moe.streams import Streams, Windows
from symphony_moe.text import draw_windows, is_held_out, read_documents, split_aside

_ASIDE_DOCUMENTS = 1 / 8
"""Share of a source's documents that a fit is judged by."""


def calibration_windows(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Windows]:
    """Source -> calibration text of its domain (Sec. 3.2): the same number of tokens each, held-out
    documents left out, and where something is fitted, those of `aside_windows`."""
    windows = {}
    for source in sources:
        wanted = max(1, _windows_each(recipe) - (_aside_each(recipe) if recipe.fits else 0))
        fitted, _ = _documents(recipe, source)
        windows[source.name] = _draw(recipe, source, "calibration text", fitted, wanted)
    return windows


def aside_windows(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Windows]:
    """Source -> text of its domain that a fit is judged by: of documents of their own.

    One window in 16 of what `calibration.tokens` asks for; four where that is fewer, but no more
    than one in four. Raises TextError where a source has a single document.
    """
    windows = {}
    for source in sources:
        _, aside = _documents(recipe, source)
        if not aside:
            raise TextError(
                f"calibration text of {source.name}: a single document; a fit is judged by "
                "documents that it has not seen, so give text in several (or refit.method: none "
                "and router.init: random)"
            )
        what = "calibration text kept aside"
        windows[source.name] = _draw(recipe, source, what, aside, _aside_each(recipe))
    return windows


def _windows_each(recipe: Recipe) -> int:
    settings = recipe.calibration
    return max(1, settings.tokens // len(recipe.sources) // settings.sequence_length)


def _aside_each(recipe: Recipe) -> int:
    windows = _windows_each(recipe)
    return max(windows // 16, min(4, windows // 4), 1)


def _documents(recipe: Recipe, source: Source) -> tuple[list[str], list[str]]:
    """(to fit on, to judge a fit by); where nothing is fitted, the former are all."""
    spec = recipe.sources[source.name]
    who = f"calibration text of {source.name}"
    documents = read_documents(who, spec.data, spec.column, source.tokenizer)
    documents = [d for d in documents if not is_held_out(d, recipe.evaluation.holdout)]
    return split_aside(documents, _ASIDE_DOCUMENTS) if recipe.fits else (documents, [])


def _draw(
    recipe: Recipe, source: Source, what: str, documents: Sequence[str], windows: int
) -> Windows:
    length = recipe.calibration.sequence_length
    return draw_windows(
        f"{what} of {source.name}",
        documents,
        source.tokenizer,
        tokens=windows * length,
        sequence_length=length,
        seed=recipe.calibration.seed,
    )


def embedding_blocks(source: Source) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a source's own token embeddings."""
    for first in range(0, source.headers[EMBEDDING].shape[0], TABLE_ROWS):
        yield first, source.read(EMBEDDING, slice(first, first + TABLE_ROWS))


@torch.inference_mode()
def compare_layer(
    recipe: Recipe,
    sources: Sequence[Source],
    layer: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    streams: Streams,
    *,
    statistics: bool,
) -> dict[str, Comparison]:
    """Run one layer of every source over the whole calibration text: the streams named after the
    sources advance.

    Returns, for every source but the anchor, how it compares with the anchor on the same tokens
    (nothing where `statistics` is false). The residual stream is compared before the layer, between
    attention and FFN, and after the last layer. `weights`: source -> its layer's tensors.
    """
    ordered = sorted(sources, key=lambda source: source.name != recipe.anchor)  # the anchor first
    config = ordered[0].config
    models = {s.name: load_dense_layer(s.config, layer, weights[s.name]) for s in ordered}
    is_last = layer == config.num_hidden_layers - 1
    found = {}
    if statistics:
        found = {source.name: _blank(recipe, source) for source in ordered[1:]}
    for number in range(len(streams.batches(recipe.anchor))):
        reference: dict[str, Tensor] = {}
        for source in ordered:
            hidden = streams.batches(source.name)[number]
            before = hidden.to(device(), copy=True)
            with observe(models[source.name]) as seen:
                after = run_layer(models[source.name], before)
            hidden.copy_(after)
            seen |= {"before": before, "after": after}
            if not reference:
                reference = seen
            elif statistics:
                places = ("before", "middle", "after") if is_last else ("before", "middle")
                _add(found[source.name], reference, seen, places, head_dim(config))
    return found


def _blank(recipe: Recipe, source: Source) -> Comparison:
    config = source.config
    comparison = Comparison()
    if recipe.align.residual == "orthogonal":
        comparison.residual = ResidualCovariance(config.hidden_size, device())
    if recipe.align.heads == "all":
        comparison.heads = HeadCorrelation(config, device())
    if recipe.aligns_neurons:
        comparison.neurons = NeuronCorrelation(config.intermediate_size, device())
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
