"""Activations on the same tokens -> the maps that bring a source into the anchor's coordinates.

- Neurons: the paper's functional alignment (Sec. 3.2, Eq. 2-4). A permutation of an expert's hidden
  neurons does not change what the expert computes, so an MoE with separate experts computes the
  same with or without it (docs/paper-map.md). It measures how alike the sources' neurons are.
- Residual basis and attention heads: what the shared backbone does mix (docs/harmonized.md).

Everything here follows from the accumulators of `statistics.py`; `symmetry.py` applies the maps.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symphony_moe.building.alignment import (
    COSINE,
    COVARIANCE,
    HEADS_CORRELATION,
    VALIDATION_COVARIANCE,
    Alignment,
    heads_findings,
    layer_key,
    neurons_findings,
)
from symphony_moe.building.assignment import best_columns
from symphony_moe.building.statistics import HeadCorrelation, LayerStatistics
from symphony_moe.errors import SourceError
from symphony_moe.model.families import Family
from symphony_moe.model.symmetry import HeadMap

MIN_GAIN = 0.1
"""A map is used where it raises the mean cosine with the anchor by this much. Below that the source
shares the anchor's coordinates already (branches of one base), and a map found from finite text
would only add its own error: docs/lab-log.md, "Alignment alone"."""


def match_neurons(correlation: Float[Tensor, "ffn ffn"], share: float = 1.0) -> Int[Tensor, " ffn"]:
    """The order of the source's neurons that maximises the sum of matched correlations.

    Eq. 2: `min over P of ||A_1 - A_i P||_F^2` for activations normalised per neuron, a linear
    assignment problem. Entry j is the source's neuron that takes the place of the anchor's neuron
    j. Below 1, the `share` of the neurons that correlate most with their match are moved (Table 3);
    the others fill the places that are left in their own order.
    """
    order = best_columns(correlation)
    strength = correlation.cpu()[torch.arange(len(order)), order]
    weakest = strength.argsort(stable=True)[: len(order) - round(share * len(order))]
    order[weakest.sort().values] = order[weakest].sort().values
    return order


def matched_correlation(correlation: Float[Tensor, "ffn ffn"], order: Int[Tensor, " ffn"]) -> float:
    """Mean correlation of each anchor neuron with the source's neuron in its place."""
    return float(correlation[torch.arange(len(order)), order].mean())


def residual_basis(covariance: Float[Tensor, "hidden hidden"]) -> Float[Tensor, "hidden hidden"]:
    """The rotation Q that brings the source's stream closest to the anchor's: `x -> x Q` maximises
    the sum of `trace(Q^T C)` (orthogonal Procrustes: Schoenemann 1966). float64."""
    left, _, right = torch.linalg.svd(covariance.double())
    result: Tensor = left @ right
    return result


def residual_order(covariance: Float[Tensor, "hidden hidden"]) -> Float[Tensor, "hidden hidden"]:
    """The signed permutation Q that brings the source's stream closest to the anchor's: the same
    maximum over fewer maps, a linear assignment of the covariances' magnitudes. float64."""
    covariance = covariance.double()
    order = assign(covariance.abs())  # entry j: the source's channel at the anchor's place j
    places = torch.arange(len(order))
    found = torch.zeros_like(covariance)
    found[order, places] = torch.where(covariance[order, places] < 0, -1.0, 1.0).double()
    return found


def basis_of(family: Family) -> Callable[[Tensor], Tensor]:
    """Covariance of the residual stream -> the best basis among those that a family allows."""
    permutes = family.symmetries.residual == "signed-permutation"
    return residual_order if permutes else residual_basis


def mean_cosine(
    covariance: Float[Tensor, "hidden hidden"], residual: Float[Tensor, "hidden hidden"] | None
) -> float:
    """Mean cosine of the source's stream, in the basis `residual`, with the anchor's."""
    covariance = covariance.double()
    return float(covariance.trace() if residual is None else (residual * covariance).sum())


def match_heads(
    statistics: HeadCorrelation,
    phases: Literal["any", "half-turns"],
    validation: HeadCorrelation | None = None,
) -> tuple[HeadMap, float, float]:
    """(map, correlation before, correlation after) of a source's heads with the anchor's.

    Two assignments: KV groups to KV groups, where what a pair of groups is worth is the best
    assignment of their query heads. Then value rotations by Procrustes on the outputs, and phases
    from the complex products of q and k. The correlation is that of all head outputs, measured on
    `validation` (statistics of other text) where that is given.
    """
    scores, group_scores = statistics.scores(phases)
    groups = len(group_scores)
    per_group = len(scores) // groups
    worth = group_scores.clone()
    inside: dict[tuple[int, int], Tensor] = {}
    for source in range(groups):
        for anchor in range(groups):
            block = scores[
                source * per_group : (source + 1) * per_group,
                anchor * per_group : (anchor + 1) * per_group,
            ]
            inside[source, anchor] = assign(block)
            worth[source, anchor] += matched_correlation(block.T, inside[source, anchor])
    group_order = assign(worth)
    order, values, turned = [], [], []
    outputs = statistics.output_blocks()
    for anchor, source in enumerate(group_order.tolist()):
        heads = source * per_group + inside[source, anchor]
        places = anchor * per_group + torch.arange(per_group)
        order.append(heads)
        values.append(residual_basis(outputs[heads, places].sum(dim=0)))
        queries, keys = statistics.queries.cpu(), statistics.keys.cpu()
        product = keys[:, source, anchor] + queries[:, heads, places].sum(dim=1)
        turned.append(
            product.angle() if phases == "any" else torch.where(product.real < 0, math.pi, 0.0)
        )
    found = HeadMap(torch.cat(order), torch.stack(turned).double(), torch.stack(values))
    judge = validation or statistics
    return found, judge.correlation(None), judge.correlation(found)


def assign(scores: Float[Tensor, "source anchor"]) -> Int[Tensor, " anchor"]:
    """Entry j: the source's member that takes the place of the anchor's member j, so that the sum
    of scores is largest (linear assignment)."""
    return best_columns(scores.T)


def match(comparison: LayerStatistics, family: Family, who: str) -> dict[str, Tensor]:
    """What one layer's statistics say, kind -> tensor (the kinds of `alignment.py`): covariances of
    the residual stream; maps of heads and neurons, and the agreement before and after them.

    Raises SourceError for activations that are not finite; `who` names the source in it.
    """
    found: dict[str, Tensor] = {}
    validation = comparison.validation or LayerStatistics()
    residuals = {COVARIANCE: comparison.residual, VALIDATION_COVARIANCE: validation.residual}
    for kind, residual in residuals.items():
        if residual is not None:
            found[kind] = residual.result().cpu()
            _check_finite(found[kind], who)
    if comparison.heads is not None:
        for statistics in (comparison.heads, validation.heads or comparison.heads):
            for products in (statistics.outputs, statistics.queries, statistics.keys):
                _check_finite(products, who)
        phases = family.symmetries.phases
        heads, before, after = match_heads(comparison.heads, phases, validation.heads)
        found |= heads_findings(heads, torch.tensor([before, after]))
    if comparison.neurons is not None:
        correlation = comparison.neurons.result()
        _check_finite(correlation, who)
        order = match_neurons(correlation, comparison.neuron_share)
        correlation = correlation.cpu()
        own = matched_correlation(correlation, torch.arange(len(order)))
        matched = matched_correlation(correlation, order)
        found |= neurons_findings(order, torch.tensor([own, matched]))
    return found


def _check_finite(statistics: Tensor, who: str) -> None:
    values = torch.view_as_real(statistics) if statistics.is_complex() else statistics
    # Smallest and largest are NaN where any value is; to ask each would take as much memory again.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        raise SourceError(
            f"{who} puts out values that are NaN or infinite on the calibration text; the weights "
            "are damaged or overflow float32"
        )


def choose_maps(
    names: Collection[str],
    read: Callable[[str], Tensor],
    sources: Sequence[str],
    num_layers: int,
    basis: Callable[[Tensor], Tensor] = residual_basis,
) -> Alignment:
    """What is used of all layers' findings: one residual basis for all layers, and maps only of
    sources that gain MIN_GAIN by them, on the validation text where there is some.

    `names`: of the findings (`alignment.layer_key`). `sources`: all but the anchor. `read`: name of
    a finding -> tensor. `basis`: covariance -> basis of the residual stream. Covariances (hidden x
    hidden) are read one after another, for the sum over the layers and for the cosines in the basis
    that follows, and not kept: memory does not grow with depth.
    """
    covariances = (f".{COVARIANCE}", f".{VALIDATION_COVARIANCE}")
    found = Alignment({name: read(name) for name in names if not name.endswith(covariances)})
    for source in sources:
        if layer_key(source, 0, COVARIANCE) in names:
            records = _Records(set(names), read, num_layers)
            found = _choose_residual(found, records, source, basis)
        if found.heads(source, 0) is not None:
            found = _choose_heads(found, source, num_layers)
    return found


class _Records(NamedTuple):
    """What was found of all layers."""

    names: Collection[str]
    read: Callable[[str], Tensor]
    num_layers: int


def _choose_residual(
    found: Alignment, records: _Records, source: str, basis: Callable[[Tensor], Tensor]
) -> Alignment:
    """The cosines of a source's stream, and its basis where that is worth it."""
    names, read, num_layers = records
    layers = range(num_layers)
    covariances = [layer_key(source, layer, COVARIANCE) for layer in layers]
    residual = basis(sum(map(read, covariances), torch.tensor(0.0)))
    judges = [layer_key(source, layer, VALIDATION_COVARIANCE) for layer in layers]
    judges = judges if judges[0] in names else covariances
    cosines = [(mean_cosine(one, None), mean_cosine(one, residual)) for one in map(read, judges)]
    measured = {
        layer_key(source, layer, COSINE): torch.tensor(pair) for layer, pair in enumerate(cosines)
    }
    return found.with_residual(
        source, residual.float() if _gain(torch.tensor(cosines)) >= MIN_GAIN else None, measured
    )


def _choose_heads(found: Alignment, source: str, num_layers: int) -> Alignment:
    """A source's maps of heads, or none of them where they are not worth it."""
    measured = [layer_key(source, layer, HEADS_CORRELATION) for layer in range(num_layers)]
    pairs = torch.stack([found.tensors[key] for key in measured])
    return found if _gain(pairs) >= MIN_GAIN else found.without_heads(source, num_layers)


def _gain(before_and_after: Float[Tensor, "layers 2"]) -> float:
    before, after = before_and_after.double().mean(dim=0).tolist()
    return float(after - before)
