"""What is gathered while the same tokens run through a source and through the anchor.

Accumulators, batch by batch: no activations are kept. `align.py` makes maps of them.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from transformers import PreTrainedConfig

from symphony_moe.model.families import head_dim
from symphony_moe.model.symmetry import HeadMap
from symphony_moe.processes import Processes


class NeuronCorrelation:
    """Correlation of every anchor neuron with every neuron of a source, from one pass over batches.

    Each batch is centred by its own mean and merged exactly (the update of Chan, Golub and
    LeVeque), so that no activations are kept and a mean far from zero costs no precision. Memory:
    one float32 matrix of ffn x ffn, whatever the number of tokens.
    """

    def __init__(self, num_neurons: int, device: torch.device | str = "cpu") -> None:
        vector = torch.zeros(num_neurons, dtype=torch.float64, device=device)
        self.count = 0
        self.means = [vector.clone(), vector.clone()]  # of the anchor, of the source
        self.squares = [vector.clone(), vector.clone()]  # sums of squared deviations
        self.products = torch.zeros(num_neurons, num_neurons, device=device)

    def update(
        self, anchor: Float[Tensor, "tokens ffn"], source: Float[Tensor, "tokens ffn"]
    ) -> None:
        """Add a batch: the inputs of down_proj on the same tokens."""
        tokens = anchor.shape[0]
        merged = self.count + tokens
        shifts, centred = [], []
        for index, batch in enumerate((anchor, source)):
            mean = batch.mean(dim=0, dtype=torch.float64)
            deviations = batch - mean.to(batch.dtype)
            shift = mean - self.means[index]
            self.squares[index] += deviations.double().square().sum(dim=0) + shift.square() * (
                self.count * tokens / merged
            )
            self.means[index] += shift * (tokens / merged)
            shifts.append(shift.float())
            centred.append(deviations)
        self.products.addmm_(centred[0].T, centred[1])
        self.products.addr_(shifts[0], shifts[1], alpha=self.count * tokens / merged)
        self.count = merged

    def combine(self, processes: Processes) -> None:
        """Merge what every process has seen of the text."""
        if processes.count == 1:
            return
        merged = processes.total(self.count)
        means = [mean * (self.count / merged) for mean in self.means]
        processes.add(*means)
        shifts = [mean - whole for mean, whole in zip(self.means, means, strict=True)]
        for squares, shift in zip(self.squares, shifts, strict=True):
            squares += shift.square() * self.count
        self.products.addr_(shifts[0].float(), shifts[1].float(), alpha=self.count)
        processes.add(*self.squares, self.products)
        self.means, self.count = means, merged

    def result(self) -> Float[Tensor, "ffn ffn"]:
        """Pearson correlations, anchor's neurons x source's (float32). A neuron that never moves
        has correlation 0 with everything."""
        scale = [
            torch.where(squares > 0, squares, torch.inf).rsqrt().float() for squares in self.squares
        ]
        return self.products * scale[0][:, None] * scale[1][None, :]


class ResidualCovariance:
    """Cross-covariance of a source's residual stream with the anchor's, every token a unit vector.
    Memory: one hidden x hidden matrix (float64), whatever the number of tokens."""

    def __init__(self, hidden: int, device: torch.device | str = "cpu") -> None:
        self.products = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        self.count = 0

    def update(
        self, anchor: Float[Tensor, "tokens hidden"], source: Float[Tensor, "tokens hidden"]
    ) -> None:
        """Add a batch: the streams at one place, on the same tokens."""
        self.update_units(*(unit_vectors(stream) for stream in (anchor, source)))

    def update_units(
        self, anchor: Float[Tensor, "tokens hidden"], source: Float[Tensor, "tokens hidden"]
    ) -> None:
        """The same of unit vectors: the anchor's are made once for all sources."""
        self.products += source.T @ anchor
        self.count += len(anchor)

    def combine(self, processes: Processes) -> None:
        """Add up what every process has seen of the text."""
        processes.add(self.products)
        self.count = processes.total(self.count)

    def result(self) -> Float[Tensor, "hidden hidden"]:
        """Mean of source^T anchor; its trace is the mean cosine of the two streams."""
        return self.products / self.count


@dataclass(frozen=True)
class HeadActivity:
    """What one layer's attention heads do on some tokens."""

    queries: Float[Tensor, "tokens heads head_dim"]
    """Before RoPE (after the norm of q, where the family has one)."""
    keys: Float[Tensor, "tokens groups head_dim"]
    outputs: Float[Tensor, "tokens heads head_dim"]
    """The input of o_proj."""

    @cached_property
    def complex_queries(self) -> Complex[Tensor, "half tokens heads"]:
        """Per RoPE frequency, as complex numbers. The anchor's are made once for all sources."""
        return _complex(self.queries)

    @cached_property
    def complex_keys(self) -> Complex[Tensor, "half tokens groups"]:
        """Likewise."""
        return _complex(self.keys)

    @cached_property
    def energies(self) -> dict[str, Float[Tensor, " heads_or_groups"]]:
        """Part -> the sum of squares of each head."""
        parts = {"outputs": self.outputs, "queries": self.queries, "keys": self.keys}
        return {part: rows.square().sum(dim=(0, 2)) for part, rows in parts.items()}


class HeadCorrelation:
    """Products of every anchor head with every head of a source, from one pass over batches.

    Outputs are compared as a whole (which value rotation fits is not known yet), queries and keys
    per RoPE frequency as complex numbers (which phase fits is not known yet).
    """

    def __init__(self, config: PreTrainedConfig, device: torch.device | str = "cpu") -> None:
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        size = head_dim(config)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.size = size
        self.outputs = zeros(heads * size, heads * size)  # source x anchor
        self.queries = zeros(size // 2, heads, heads, dtype=torch.complex128)
        self.keys = zeros(size // 2, groups, groups, dtype=torch.complex128)
        self.energies = {
            part: [zeros(count), zeros(count)]  # of the anchor, of the source
            for part, count in (("outputs", heads), ("queries", heads), ("keys", groups))
        }

    def update(self, anchor: HeadActivity, source: HeadActivity) -> None:
        """Add a batch: the same tokens through both."""
        self.outputs += source.outputs.flatten(1).T @ anchor.outputs.flatten(1)
        self.queries += source.complex_queries.mH @ anchor.complex_queries
        self.keys += source.complex_keys.mH @ anchor.complex_keys
        for part, energies in self.energies.items():
            for energy, activity in zip(energies, (anchor, source), strict=True):
                energy += activity.energies[part]

    def combine(self, processes: Processes) -> None:
        """Add up what every process has seen of the text."""
        energies = [energy for pair in self.energies.values() for energy in pair]
        processes.add(self.outputs, self.queries, self.keys, *energies)

    def _scale(self, part: str) -> Float[Tensor, "source anchor"]:
        anchor, source = self.energies[part]
        return torch.outer(source, anchor).sqrt().clamp_min(1e-300)

    def scores(
        self, phases: Literal["any", "half-turns"] = "any"
    ) -> tuple[Float[Tensor, "heads heads"], Float[Tensor, "groups groups"]]:
        """(query heads, KV heads), source x anchor: how alike two heads can be made, each term from
        0 to 1. A query head counts its outputs under the best rotation (nuclear norm) and its
        queries under the best of the `phases` that the family allows; a KV head its keys."""
        nuclear = torch.linalg.svdvals(self.output_blocks()).sum(dim=-1)
        queries, keys = (
            (products if phases == "any" else products.real).abs().sum(dim=0) / self._scale(part)
            for part, products in (("queries", self.queries), ("keys", self.keys))
        )
        return nuclear / self._scale("outputs").cpu() + queries.cpu(), keys.cpu()

    def output_blocks(self) -> Float[Tensor, "heads heads head_dim head_dim"]:
        """Products of the heads' outputs, source x anchor, block by block."""
        heads = len(self.energies["queries"][0])
        blocks = self.outputs.cpu().unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
        result: Tensor = blocks.transpose(1, 2)
        return result

    def correlation(self, found: HeadMap | None) -> float:
        """Of all head outputs, the source's under a map (None: as they are), with the anchor's."""
        total = math.sqrt(math.prod(float(energy.sum()) for energy in self.energies["outputs"]))
        if found is None:
            return float(self.outputs.trace()) / max(total, 1e-300)
        blocks = self.output_blocks()[found.order, torch.arange(len(found.order))]
        rotations = found.values.repeat_interleave(len(blocks) // len(found.values), dim=0)
        return float((blocks * rotations).sum()) / max(total, 1e-300)


def unit_vectors(stream: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
    """Every token as a vector of length one."""
    return torch.nn.functional.normalize(stream, dim=-1)


def _complex(rows: Float[Tensor, "tokens heads head_dim"]) -> Complex[Tensor, "half tokens heads"]:
    first, second = rows.chunk(2, dim=-1)
    return torch.complex(first, second).permute(2, 0, 1)


@dataclass
class LayerStatistics:
    """Statistics of one layer of a source against the anchor's; what the recipe does not ask for is
    None."""

    residual: ResidualCovariance | None = None
    heads: HeadCorrelation | None = None
    neurons: NeuronCorrelation | None = None
    neuron_share: float = 1.0
    """Share of the neurons that are matched."""
    validation: "LayerStatistics | None" = None
    """The same on validation text, which no map is found on: a map of residual stream or heads is
    judged there. None where there is no validation text."""

    def combine(self, processes: Processes) -> None:
        """Make them statistics of the whole text: each process has seen a part of it."""
        for part in (self.residual, self.heads, self.neurons, self.validation):
            if part is not None:
                part.combine(processes)
