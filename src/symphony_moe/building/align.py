"""Activations on the same tokens -> the maps that bring a source into the anchor's coordinates.

- Neurons: the paper's functional alignment (Sec. 3.2, Eq. 2-4). A permutation of an expert's hidden
  neurons does not change what the expert computes, so an MoE with separate experts computes the
  same with or without it (docs/paper-map.md). It measures how alike the sources' neurons are.
- Residual basis and attention heads: what the shared backbone does mix (docs/harmonized.md).

Everything here is statistics and what follows from them; `symmetry.py` applies the maps.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lap
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from symphony_moe.errors import SourceError
from symphony_moe.model.families import Family, head_dim
from symphony_moe.model.symmetry import HeadMap

MIN_GAIN = 0.1
"""A map is used where it raises the mean cosine with the anchor by this much. Below that the source
shares the anchor's coordinates already (branches of one base), and a map found from finite text
would only add its own error: docs/lab-log.md, "Alignment alone"."""


ASIDE = "covariance.aside"


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


def match_neurons(correlation: Float[Tensor, "ffn ffn"], share: float = 1.0) -> Int[Tensor, " ffn"]:
    """The order of the source's neurons that maximises the sum of matched correlations.

    Eq. 2: `min over P of ||A_1 - A_i P||_F^2` for activations normalised per neuron, a linear
    assignment problem. Entry j is the source's neuron that takes the place of the anchor's neuron
    j. Below 1, the `share` of the neurons that correlate most with their match are moved (Table 3);
    the others fill the places that are left in their own order.
    """
    order = assign(correlation.T)
    strength = correlation.cpu()[torch.arange(len(order)), order]
    weakest = strength.argsort(stable=True)[: len(order) - round(share * len(order))]
    order[weakest.sort().values] = order[weakest].sort().values
    return order


def matched_correlation(correlation: Float[Tensor, "ffn ffn"], order: Int[Tensor, " ffn"]) -> float:
    """Mean correlation of each anchor neuron with the source's neuron in its place."""
    return float(correlation[torch.arange(len(order)), order].mean())


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
        anchor, source = (
            torch.nn.functional.normalize(stream, dim=-1) for stream in (anchor, source)
        )
        self.products += source.T @ anchor
        self.count += len(anchor)

    def result(self) -> Float[Tensor, "hidden hidden"]:
        """Mean of source^T anchor; its trace is the mean cosine of the two streams."""
        return self.products / self.count


def residual_basis(covariance: Float[Tensor, "hidden hidden"]) -> Float[Tensor, "hidden hidden"]:
    """The rotation Q that brings the source's stream closest to the anchor's: `x -> x Q` maximises
    the sum of `trace(Q^T C)` (orthogonal Procrustes: Schoenemann 1966). float64."""
    left, _, right = torch.linalg.svd(covariance.double())
    return left @ right


def mean_cosine(
    covariance: Float[Tensor, "hidden hidden"], residual: Float[Tensor, "hidden hidden"] | None
) -> float:
    """Mean cosine of the source's stream, in the basis `residual`, with the anchor's."""
    covariance = covariance.double()
    return float(covariance.trace() if residual is None else (residual * covariance).sum())


@dataclass(frozen=True)
class HeadActivity:
    """What one layer's attention heads do on some tokens."""

    queries: Float[Tensor, "tokens heads head_dim"]
    """Before RoPE (after the norm of q, where the family has one)."""
    keys: Float[Tensor, "tokens groups head_dim"]
    outputs: Float[Tensor, "tokens heads head_dim"]
    """The input of o_proj."""


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
        self.queries += _complex(source.queries).mH @ _complex(anchor.queries)
        self.keys += _complex(source.keys).mH @ _complex(anchor.keys)
        for part, energies in self.energies.items():
            for energy, activity in zip(energies, (anchor, source), strict=True):
                energy += getattr(activity, part).square().sum(dim=(0, 2))

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
        return blocks.transpose(1, 2)

    def correlation(self, found: HeadMap | None) -> float:
        """Of all head outputs, the source's under a map (None: as they are), with the anchor's."""
        total = math.sqrt(math.prod(float(energy.sum()) for energy in self.energies["outputs"]))
        if found is None:
            return float(self.outputs.trace()) / max(total, 1e-300)
        blocks = self.output_blocks()[found.order, torch.arange(len(found.order))]
        rotations = found.values.repeat_interleave(len(blocks) // len(found.values), dim=0)
        return float((blocks * rotations).sum()) / max(total, 1e-300)


def _complex(rows: Float[Tensor, "tokens heads head_dim"]) -> Complex[Tensor, "half tokens heads"]:
    first, second = rows.chunk(2, dim=-1)
    return torch.complex(first, second).permute(2, 0, 1)


def match_heads(
    statistics: HeadCorrelation,
    phases: Literal["any", "half-turns"],
    aside: HeadCorrelation | None = None,
) -> tuple[HeadMap, float, float]:
    """(map, correlation before, correlation after) of a source's heads with the anchor's.

    Two assignments: KV groups to KV groups, where what a pair of groups is worth is the best
    assignment of their query heads. Then value rotations by Procrustes on the outputs, and phases
    from the complex products of q and k. The correlation is that of all head outputs, measured on
    `aside` (statistics of other text) where that is given.
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
    judge = aside or statistics
    return found, judge.correlation(None), judge.correlation(found)


def assign(scores: Float[Tensor, "source anchor"]) -> Int[Tensor, " anchor"]:
    """Entry j: the source's member that takes the place of the anchor's member j, so that the sum
    of scores is largest (linear assignment)."""
    _, order, _ = lap.lapjv(-scores.T.double().cpu().numpy())
    return torch.from_numpy(order.astype("int64"))


@dataclass
class Comparison:
    """Statistics of one layer of a source against the anchor's; what the recipe does not ask for is
    None."""

    residual: ResidualCovariance | None = None
    heads: HeadCorrelation | None = None
    neurons: NeuronCorrelation | None = None
    neuron_share: float = 1.0
    """Share of the neurons that are matched."""
    aside: "Comparison | None" = None
    """The same on text that no map is found on: a map of residual stream or heads is judged there.
    None where no text is kept aside."""


def match(comparison: Comparison, family: Family, who: str) -> dict[str, Tensor]:
    """What one layer's statistics say: `covariance` of the residual stream (`covariance.aside`: on
    the text kept aside), `heads.*` (order, phases, values, correlation before and after), `neurons`
    (order) and their `correlation`.

    Raises SourceError for activations that are not finite; `who` names the source in it.
    """
    found: dict[str, Tensor] = {}
    aside = comparison.aside or Comparison()
    for kind, residual in (("covariance", comparison.residual), (ASIDE, aside.residual)):
        if residual is not None:
            found[kind] = residual.result().cpu()
            _check_finite(found[kind], who)
    if comparison.heads is not None:
        for statistics in (comparison.heads, aside.heads or comparison.heads):
            for products in (statistics.outputs, statistics.queries, statistics.keys):
                _check_finite(products, who)
        phases = family.symmetries.phases
        heads, before, after = match_heads(comparison.heads, phases, aside.heads)
        found["heads.order"] = heads.order
        found["heads.phases"], found["heads.values"] = heads.phases.float(), heads.values.float()
        found["heads.correlation"] = torch.tensor([before, after])
    if comparison.neurons is not None:
        correlation = comparison.neurons.result()
        _check_finite(correlation, who)
        order = match_neurons(correlation, comparison.neuron_share)
        correlation = correlation.cpu()
        own = matched_correlation(correlation, torch.arange(len(order)))
        found["neurons"] = order
        found["correlation"] = torch.tensor([own, matched_correlation(correlation, order)])
    return found


def _check_finite(statistics: Tensor, who: str) -> None:
    if not bool(torch.isfinite(statistics).all()):
        raise SourceError(
            f"{who} puts out values that are not finite on the calibration text; the weights are "
            "damaged or overflow float32"
        )


def settle(
    names: Collection[str], read: Callable[[str], Tensor], sources: Sequence[str], num_layers: int
) -> dict[str, Tensor]:
    """What `alignment.safetensors` holds, from all layers' findings (`<source>.layers.<l>.<kind>`):
    one residual basis for all layers, and maps only of sources that gain MIN_GAIN by them, on the
    text kept aside where there is some. `sources`: all but the anchor.

    `read`: name of a finding -> tensor. Covariances (hidden x hidden) are read one after another,
    for the sum over the layers and for the cosines in the basis that follows, and not kept: memory
    does not grow with depth.
    """
    covariance_like = (".covariance", f".{ASIDE}")
    record = {name: read(name) for name in names if not name.endswith(covariance_like)}
    for source in sources:
        prefixes = [f"{source}.layers.{layer}." for layer in range(num_layers)]
        if f"{prefixes[0]}covariance" in names:
            covariances = [f"{prefix}covariance" for prefix in prefixes]
            residual = residual_basis(sum(map(read, covariances), torch.tensor(0.0)))
            judges = [f"{prefix}{ASIDE}" for prefix in prefixes]
            judges = judges if judges[0] in names else covariances
            cosines = [
                (mean_cosine(one, None), mean_cosine(one, residual)) for one in map(read, judges)
            ]
            for prefix, pair in zip(prefixes, cosines, strict=True):
                record[f"{prefix}cosine"] = torch.tensor(pair)
            if _gain(torch.tensor(cosines)) >= MIN_GAIN:
                record[f"{source}.residual"] = residual.float()
        if f"{prefixes[0]}heads.order" in names:
            pairs = torch.stack([record[f"{prefix}heads.correlation"] for prefix in prefixes])
            if _gain(pairs) < MIN_GAIN:
                for prefix in prefixes:
                    for part in ("order", "phases", "values"):
                        del record[f"{prefix}heads.{part}"]
    return record


def _gain(before_and_after: Float[Tensor, "layers 2"]) -> float:
    before, after = before_and_after.double().mean(dim=0).tolist()
    return after - before


_MEASURED = {"residual": "cosine", "heads": "heads.correlation", "neurons": "correlation"}


def measured(record: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A record without its maps: what was found, and is not used."""
    return {key: value for key, value in record.items() if key.endswith(("cosine", "correlation"))}


def describe_alignment(record: Mapping[str, Tensor]) -> dict[str, Any]:
    """For `metrics.json`: kind -> source -> agreement with the anchor by layer, before and after,
    and whether the maps are used."""
    described: dict[str, Any] = {}
    for kind, ending in _MEASURED.items():
        for key in record:
            source, _, rest = key.rpartition(".layers.")
            if rest.partition(".")[2] != ending:
                continue
            entry = described.setdefault(kind, {}).setdefault(
                source, {"before": [], "after": [], "used": _is_used(record, kind, source)}
            )
            before, after = (round(float(value), 6) for value in record[key])
            entry["before"].append(before)
            entry["after"].append(after)
    return described


def _is_used(record: Mapping[str, Tensor], kind: str, source: str) -> bool:
    first = {"residual": "residual", "heads": "layers.0.heads.order", "neurons": "layers.0.neurons"}
    return f"{source}.{first[kind]}" in record
