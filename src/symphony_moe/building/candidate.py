"""A model that a build may write: its tensors, and its streams on the calibration text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symphony_moe.building.alignment import Alignment
from symphony_moe.building.assemble import (
    aligned_layer,
    aligned_table,
    assemble_layer,
    fused_final_norm,
    fused_tables,
)
from symphony_moe.building.fit_head import next_token_losses
from symphony_moe.building.fit_layer import advance
from symphony_moe.building.fitting import FitState
from symphony_moe.model.checkpoint import as_written
from symphony_moe.model.families import EMBEDDING, HEAD
from symphony_moe.model.moe_layer import MoELayer
from symphony_moe.model.streams import Windows
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.source import Source


@dataclass(frozen=True)
class Candidate:
    """One way to make a model of the sources.

    A build has one, the new model. Where layers are fitted it has a second one, the plain mean:
    nothing aligned, nothing fitted but the router. Whichever loses less on the validation text is
    written.
    """

    recipe: Recipe
    sources: Sequence[Source]
    alignment: Alignment
    """What the sources are put through first."""
    part: str
    """Its streams: `fitting.NEW` or `fitting.PLAIN`."""

    @property
    def made_of(self) -> Sequence[Source]:
        """The sources whose layers are read."""
        return self.sources

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are rounded to when they are written."""
        found: torch.dtype = getattr(torch, self.recipe.output.dtype)
        return found

    def tables(self, names: Sequence[str]) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first row, rows) of token embeddings and head, block by block."""
        return fused_tables(self.recipe, self.sources, names, self.alignment)

    def whole_head(self) -> Tensor:
        """The fused output head in one piece (vocabulary x hidden)."""
        return torch.cat([rows for _, _, rows in self.tables([HEAD])])

    def aligned_head(self, source: Source) -> Tensor:
        """A source's own output head, aligned, in one piece (vocabulary x hidden)."""
        blocks = aligned_table(self.recipe, source, HEAD, self.alignment)
        return torch.cat([rows for _, rows in blocks])

    def aligned(
        self, layer: int, weights: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Source -> its layer, aligned. `weights`: source -> its layer as it is."""
        return {
            source.name: aligned_layer(
                self.recipe, source, layer, weights[source.name], self.alignment
            )
            for source in self.made_of
        }

    def final_norm(self) -> Tensor:
        """The gains of the norm before the head."""
        return fused_final_norm(self.recipe, self.sources)

    def assemble(self, layer: int, aligned: Mapping[str, Mapping[str, Tensor]]) -> MoELayer:
        """A layer before any fit."""
        return assemble_layer(self.recipe, self.sources, layer, aligned)

    def begin(self, state: FitState, texts: Mapping[str, Windows]) -> None:
        """Put the model's streams at its token embeddings, as they are written. `texts`: source ->
        the text of its stream."""
        named = {f"{self.part}/{name}": text for name, text in texts.items()}
        state.streams.embed(named, state.config, self.embeddings())

    def embeddings(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the fused token embeddings, as they are written, block by block.
        Raises RecipeError where the output's dtype does not hold them."""
        for _, first_row, rows in self.tables([EMBEDDING]):
            yield first_row, as_written(EMBEDDING, rows, self.recipe.output.dtype)

    def advance(self, state: FitState, layer: int, moe: MoELayer) -> None:
        """Bring the streams past one of the model's layers, as it is written."""
        advance(state, layer, moe, self.part)

    def losses(self, state: FitState, head: Tensor) -> dict[str, float]:
        """Source -> nats per token on its validation text, once all layers are behind."""
        return next_token_losses(state, self.part, head)
