"""The token embeddings while they learn, together with the first layer.

The embeddings are the first layer's input, so no gradient crosses from one layer to another. Only
the rows of tokens that the calibration text has are held. Nothing is known of others.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from symphony_moe.model.families import factor
from symphony_moe.model.streams import Windows


@dataclass
class LearnedEmbeddings:
    """The rows of the new model's table that the calibration text asks for."""

    tokens: Int[Tensor, " tokens"]
    """The tokens that the text has, in order."""
    rows: Float[Tensor, "tokens hidden"]
    """Their embeddings, as they are written."""

    @classmethod
    def begin(
        cls, texts: Mapping[str, Windows], table: Iterable[tuple[int, Tensor]]
    ) -> "LearnedEmbeddings":
        """`texts`: source -> all of its text. `table`: (first row, rows as they are written), block
        by block."""
        tokens = torch.cat([text.flatten() for text in texts.values()]).unique()
        found = [
            rows[tokens[(tokens >= first) & (tokens < first + len(rows))] - first].float()
            for first, rows in table
        ]
        return cls(tokens, torch.cat(found))

    def embedded(
        self, config: PreTrainedConfig, windows: Windows, rows: Tensor
    ) -> Float[Tensor, "windows sequence hidden"]:
        """Text at some embeddings of its tokens, as a dense model of this config has it."""
        places = torch.searchsorted(self.tokens, windows).to(rows.device)
        found = torch.nn.functional.embedding(places, rows)
        times = factor(config, "embeddings")
        return found if times == 1 else found * times

    def put_into(self, table: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """A table block by block, with these rows in place of its own."""
        for first, rows in table:
            inside = (self.tokens >= first) & (self.tokens < first + len(rows))
            changed = rows.clone()
            changed[self.tokens[inside] - first] = self.rows[inside].to(rows)
            yield first, changed
