"""Neuron activations -> neuron orders: the paper's functional alignment (Sec. 3.2, Eq. 2-4).

A permutation of an expert's hidden neurons does not change what the expert computes, so an MoE with
separate experts computes the same with or without it (docs/paper-map.md). It brings matching
neurons to matching places, which is what any later mixing of experts needs, and it measures how
alike the sources' neurons are.
"""

from collections.abc import Mapping

import lap
import torch
from jaxtyping import Float, Int
from torch import Tensor

from symphony_moe.families import NEURON_AXIS


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

    def result(self) -> Float[Tensor, "ffn ffn"]:
        """Pearson correlations, anchor's neurons x source's (float32). A neuron that never moves
        has correlation 0 with everything."""
        scale = [
            torch.where(squares > 0, squares, torch.inf).rsqrt().float() for squares in self.squares
        ]
        return self.products * scale[0][:, None] * scale[1][None, :]


def match_neurons(correlation: Float[Tensor, "ffn ffn"]) -> Int[Tensor, " ffn"]:
    """The order of the source's neurons that maximises the sum of matched correlations.

    Eq. 2: `min over P of ||A_1 - A_i P||_F^2` for activations normalised per neuron, a linear
    assignment problem. Entry j is the source's neuron that takes the place of the anchor's neuron
    j.
    """
    _, order, _ = lap.lapjv(-correlation.double().cpu().numpy())
    return torch.from_numpy(order.astype("int64"))


def matched_correlation(correlation: Float[Tensor, "ffn ffn"], order: Int[Tensor, " ffn"]) -> float:
    """Mean correlation of each anchor neuron with the source's neuron in its place."""
    return float(correlation[torch.arange(len(order)), order].mean())


def reorder_neurons(ffn: Mapping[str, Tensor], order: Int[Tensor, " ffn"]) -> dict[str, Tensor]:
    """An FFN with its hidden neurons in another order: the same function (Eq. 3-4; our weights are
    stored out x in, so rows of gate and up, and columns of down)."""
    return {name: tensor.index_select(NEURON_AXIS[name], order) for name, tensor in ffn.items()}
