"""All sources through the same calibration text, layer by layer, compared with the anchor.

A layer advances the sources' residual streams in place, batch by batch, and hands what passes
inside it to the accumulators of `statistics.py`: statistics are kept and no activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from symphony_moe.building.statistics import (
    HeadActivity,
    HeadCorrelation,
    LayerStatistics,
    NeuronCorrelation,
    ResidualCovariance,
    unit_vectors,
)
from symphony_moe.model.families import EMBEDDING, head_dim
from symphony_moe.model.layer import device, load_dense_layer, observe, run_layer
from symphony_moe.model.precision import float32_results, products
from symphony_moe.model.streams import Streams, Windows
from symphony_moe.processes import ALONE, Processes
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.source import Source, by_table

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedConfig, PreTrainedModel


class Sweep:
    """The residual streams of all sources on one text, the anchor's first.

    They begin at the token embeddings; every call of `advance` brings them past one more layer.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[Source],
        streams: Streams,
        text: Windows,
        validation_windows: int,
        processes: Processes = ALONE,
    ) -> None:
        """`text`: the same windows for all sources, and for all processes, which share them. The
        first `validation_windows` of them are compared apart, to judge by."""
        self._recipe = recipe
        # The anchor first: the others are compared with what it did on the same batch.
        self._sources = sorted(sources, key=lambda source: source.name != recipe.anchor)
        self._streams = streams
        self._processes = processes
        self._is_judged = validation_windows > 0
        self._judges = len(processes.own(validation_windows))
        own = text[processes.own(len(text))]
        for alike in by_table(sources, EMBEDDING):
            texts = {source.name: own for source in alike}
            streams.embed(texts, alike[0].config, alike[0].table(EMBEDDING))

    @torch.inference_mode()
    def advance(
        self, layer: int, weights: Mapping[str, Mapping[str, Tensor]], *, compare: bool
    ) -> dict[str, LayerStatistics]:
        """Run one layer of every source over this process's part of the text.

        Returns, for every source but the anchor, how it compares with the anchor on the same
        tokens, those of all processes (nothing where `compare` is false). The residual stream is
        compared before the layer, between attention and FFN, and after the last layer. `weights`:
        source -> its layer's tensors.
        """
        models = {
            source.name: load_dense_layer(source.config, layer, weights[source.name])
            for source in self._sources
        }
        config = self._sources[0].config
        is_last = layer == config.num_hidden_layers - 1
        places = ("before", "middle", "after") if is_last else ("before", "middle")
        found = {s.name: self._blank(s, layer) for s in self._sources[1:]} if compare else {}
        with products(self._recipe.calibration.precision, config.hidden_size, device()):
            for batch, judges in self._batches():
                anchor: _Activity | None = None
                for source, hidden in zip(self._sources, batch, strict=True):
                    activity = _Activity(_run(models[source.name], hidden), places, config)
                    if anchor is None:
                        anchor = activity
                    elif compare:
                        comparison = found[source.name]
                        if judges:
                            comparison = comparison.validation or comparison
                        _add(comparison, anchor, activity)
        for comparison in found.values():
            comparison.combine(self._processes)
        return found

    def _batches(self) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
        """Batches of all streams, the anchor's first, and whether they are of the validation text:
        none is partly."""
        names = [source.name for source in self._sources]
        judging, rest = slice(0, self._judges), slice(self._judges, None)
        for rows in (judging, rest):
            for batch in self._streams.visit(*names, rows=rows):
                yield batch, rows is judging

    def _blank(self, source: Source, layer: int) -> LayerStatistics:
        """Statistics of nothing yet. Neurons' order is used in any case, and not judged."""
        config = source.config

        def blank() -> LayerStatistics:
            comparison = LayerStatistics()
            if self._recipe.aligns_residual:
                comparison.residual = ResidualCovariance(config.hidden_size, device())
            if self._recipe.aligns_heads:
                comparison.heads = HeadCorrelation(config, device())
            return comparison

        comparison = blank()
        if self._recipe.aligns_neurons_in(layer):
            comparison.neurons = NeuronCorrelation(config.intermediate_size, device())
            comparison.neuron_share = self._recipe.align.neuron_share
        if self._is_judged:
            comparison.validation = blank()
        return comparison


def _run(model: PreTrainedModel, hidden: Tensor) -> dict[str, Tensor]:
    """Bring a batch of a source's stream past a layer; what passes inside."""
    before = hidden.clone()
    with observe(model) as seen:
        after = run_layer(model, before)
    hidden.copy_(after)
    return seen | {"before": before, "after": after}


@dataclass(frozen=True)
class _Activity:
    """What passed inside a layer, made ready for the comparisons: for each once, whatever the
    number of sources that the anchor is compared with."""

    seen: Mapping[str, Tensor]
    places: Sequence[str]
    config: PreTrainedConfig

    @cached_property
    def streams(self) -> list[Tensor]:
        """The residual stream at each of the places, every token of length one."""
        return [unit_vectors(self.seen[place].flatten(0, 1)) for place in self.places]

    @cached_property
    def heads(self) -> HeadActivity:
        tokens = self.seen["heads"].shape[0] * self.seen["heads"].shape[1]
        size = head_dim(self.config)
        parts = (
            self.seen[name].reshape(tokens, -1, size).float()
            for name in ("queries", "keys", "heads")
        )
        return HeadActivity(*parts)

    @cached_property
    def neurons(self) -> Tensor:
        return self.seen["neurons"].flatten(0, 1).float()


def _add(comparison: LayerStatistics, anchor: _Activity, source: _Activity) -> None:
    with float32_results(device()):
        if comparison.residual is not None:
            for pair in zip(anchor.streams, source.streams, strict=True):
                comparison.residual.update_units(*pair)
        if comparison.heads is not None:
            comparison.heads.update(anchor.heads, source.heads)
        if comparison.neurons is not None:
            comparison.neurons.update(anchor.neurons, source.neurons)
