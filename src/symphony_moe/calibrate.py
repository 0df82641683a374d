"""Calibration text through every source, one layer at a time, keeping statistics and no
activations.

The residual streams of all sources (tokens x hidden each) wait between layers, in memory or in
memory-mapped files; a layer advances them in place, batch by batch, and hands the inputs of
down_proj to the accumulators as they pass.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_moe.align import NeuronCorrelation
from symphony_moe.families import EMBEDDING
from symphony_moe.forward import WINDOWS_TOKENS, decoder_layer, device, load_dense_layer, run_layer
from symphony_moe.recipe import Recipe
from symphony_moe.shards import reserve
from symphony_moe.sources import TABLE_ROWS, Source
from symphony_moe.text import draw_windows, is_held_out, read_documents


def calibration_windows(
    recipe: Recipe, sources: Sequence[Source]
) -> Int[Tensor, "windows sequence"]:
    """The calibration text (Sec. 3.2): the same number of tokens from every source's data, held-out
    documents left out, domain after domain in the sources' order."""
    share = recipe.calibration.tokens // len(sources)
    parts = []
    for source in sources:
        spec = recipe.sources[source.name]
        who = f"calibration text of {source.name}"
        documents = read_documents(who, spec.data, spec.column, source.tokenizer)
        documents = [d for d in documents if not is_held_out(d, recipe.evaluation.holdout)]
        parts.append(
            draw_windows(
                who,
                documents,
                source.tokenizer,
                tokens=share,
                sequence_length=recipe.calibration.sequence_length,
                seed=recipe.calibration.seed,
            )
        )
    return torch.cat(parts)


class Streams:
    """The residual stream of every source on the calibration windows (float32)."""

    def __init__(
        self,
        sources: Sequence[Source],
        windows: Int[Tensor, "windows sequence"],
        folder: Path | None = None,
    ) -> None:
        """Begin at the token embeddings. `folder`: keep the streams in memory-mapped files there.

        Raises RunFolderError where the disk has no room for them.
        """
        self.batches = windows.split(max(1, WINDOWS_TOKENS // windows.shape[1]))
        self._streams: dict[str, Tensor] = {}
        for source in sources:
            shape = (*windows.shape, source.config.hidden_size)
            if folder is None:
                stream = torch.empty(shape)
            else:
                path = folder / f"stream-{source.name}.bin"
                with path.open("wb") as file:
                    # Writing to a map without space behind it would end the process (SIGBUS).
                    reserve(file, math.prod(shape) * 4)
                stream = torch.from_file(str(path), shared=True, size=math.prod(shape)).view(shape)
            _embed(source, windows, stream)
            self._streams[source.name] = stream

    def batch(self, source: str, number: int) -> Float[Tensor, "windows sequence hidden"]:
        """One batch of a source's stream: a view, to read and to overwrite."""
        size = self.batches[0].shape[0]
        return self._streams[source][number * size : (number + 1) * size]


def _embed(source: Source, windows: Tensor, stream: Tensor) -> None:
    """Look up embeddings block by block: no table is ever whole in memory."""
    flat, target = windows.reshape(-1), stream.view(-1, stream.shape[-1])
    present = flat.unique()
    for first in range(0, source.headers[EMBEDDING].shape[0], TABLE_ROWS):
        if not bool(((present >= first) & (present < first + TABLE_ROWS)).any()):
            continue
        block = source.read(EMBEDDING, slice(first, first + TABLE_ROWS))
        places = torch.where((flat >= first) & (flat < first + TABLE_ROWS))[0]
        target[places] = block[flat[places] - first]


@torch.inference_mode()
def advance(
    sources: Sequence[Source],
    anchor: str,
    layer: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    streams: Streams,
    *,
    statistics: bool,
) -> dict[str, NeuronCorrelation]:
    """Run one layer of every source over the calibration text.

    Returns, for every source but the anchor, the correlation of its neurons with the anchor's
    (nothing where `statistics` is false). `weights`: source -> its layer's tensors.
    """
    ordered = sorted(sources, key=lambda source: source.name != anchor)  # the anchor first
    models = {s.name: load_dense_layer(s.config, layer, weights[s.name]) for s in ordered}
    found: dict[str, NeuronCorrelation] = {}
    for number in range(len(streams.batches)):
        reference: Tensor | None = None
        for source in ordered:
            hidden = streams.batch(source.name, number)
            if not statistics:
                hidden.copy_(run_layer(models[source.name], hidden))
                continue
            with neuron_activations(models[source.name]) as seen:
                hidden.copy_(run_layer(models[source.name], hidden))
            neurons = seen[0].reshape(-1, seen[0].shape[-1])
            if reference is None:
                reference = neurons
                continue
            if source.name not in found:
                found[source.name] = NeuronCorrelation(neurons.shape[1], device())
            found[source.name].update(reference, neurons)
    return found


@contextmanager
def neuron_activations(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the inputs of down_proj (what an FFN's neurons put out) of each run inside the
    block."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handle = decoder_layer(model).mlp.down_proj.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
