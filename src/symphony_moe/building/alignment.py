"""What aligning the sources has found, and what is used of it: `alignment.safetensors`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor

from symphony_moe.model.symmetry import HeadMap, NeuronMap

COVARIANCE = "covariance"
VALIDATION_COVARIANCE = "covariance.validation"
"""Cross-covariances of residual streams: found in the sweep, and not kept in the file."""
COSINE, HEADS_CORRELATION, NEURONS_CORRELATION = "cosine", "heads.correlation", "correlation"
"""Agreement with the anchor in one layer, before and after the map."""
_NEURONS = "neurons"
_HEADS = ("heads.order", "heads.phases", "heads.values")
_MEASURED = {"residual": COSINE, "heads": HEADS_CORRELATION, "neurons": NEURONS_CORRELATION}


def layer_key(source: str, layer: int, kind: str) -> str:
    """The name of one layer's finding in the file."""
    return f"{source}.layers.{layer}.{kind}"


def heads_findings(heads: HeadMap, before_and_after: Float[Tensor, " 2"]) -> dict[str, Tensor]:
    """A map of heads and what it changes, as the findings of one layer (kind -> tensor)."""
    values = (heads.order, heads.phases.float(), heads.values.float())
    return dict(zip(_HEADS, values, strict=True)) | {HEADS_CORRELATION: before_and_after}


def neurons_findings(
    order: Int[Tensor, " ffn"], before_and_after: Float[Tensor, " 2"]
) -> dict[str, Tensor]:
    """An order of neurons and what it changes, as the findings of one layer (kind -> tensor)."""
    return {_NEURONS: order, NEURONS_CORRELATION: before_and_after}


@dataclass(frozen=True)
class Alignment:
    """The maps that bring each source into the anchor's coordinates, and how they were judged.

    An empty one leaves every source in its own coordinates. What a source has no map of stays as
    it is; the anchor has none.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Name in the file -> tensor (docs/design.md, "Run folder")."""

    @classmethod
    def load(cls, path: Path) -> "Alignment":
        """Raises OSError or SafetensorError for a file that cannot be read."""
        return cls(load_file(path))

    def to_bytes(self) -> bytes:
        """The file's content."""
        return save(dict(self.tensors))

    def residual(self, source: str) -> Float[Tensor, "hidden hidden"] | None:
        """The rotation of a source's residual stream."""
        return self.tensors.get(f"{source}.residual")

    def heads(self, source: str, layer: int) -> HeadMap | None:
        """The map of one layer's attention heads."""
        order, phases, values = (self.tensors.get(layer_key(source, layer, k)) for k in _HEADS)
        if order is None or phases is None or values is None:
            return None
        return HeadMap(order, phases, values)

    def neurons(self, source: str, layer: int) -> NeuronMap | None:
        """The order of one layer's neurons."""
        order = self.tensors.get(layer_key(source, layer, _NEURONS))
        return None if order is None else NeuronMap(order, torch.ones(len(order)))

    def token_counts(self, source: str) -> Int[Tensor, " vocabulary"] | None:
        """How often each token is in a source's calibration text, where the fit counted them."""
        return self.tensors.get(f"{source}.tokens")

    def with_token_counts(self, counts: Mapping[str, Int[Tensor, " vocabulary"]]) -> "Alignment":
        """The same with the counts of each source's calibration text."""
        named = {f"{source}.tokens": count for source, count in counts.items()}
        return Alignment({**self.tensors, **named})

    def of(self, sources: Collection[str]) -> "Alignment":
        """What is there of some sources."""
        return Alignment({k: v for k, v in self.tensors.items() if _owner(k) in sources})

    def with_residual(
        self,
        source: str,
        residual: Float[Tensor, "hidden hidden"] | None,
        measured: Mapping[str, Float[Tensor, " 2"]],
    ) -> "Alignment":
        """The same with a source's rotation (None: none) and the cosines of its layers."""
        basis = {} if residual is None else {f"{source}.residual": residual}
        return Alignment({**self.tensors, **measured, **basis})

    def without_heads(self, source: str, num_layers: int) -> "Alignment":
        """The same with a source's own heads."""
        gone = _of_layers(source, num_layers, _HEADS)
        return Alignment({k: v for k, v in self.tensors.items() if k not in gone})

    def without_maps(self) -> "Alignment":
        """What was measured alone: none of the maps is used."""
        kept = (COSINE, HEADS_CORRELATION, NEURONS_CORRELATION)
        return Alignment({k: v for k, v in self.tensors.items() if k.endswith(kept)})

    def has_maps(self, source: str) -> bool:
        """Whether anything of a source is mapped."""
        return any(key.startswith(f"{source}.") for key in self._maps())

    def _maps(self) -> set[str]:
        ends = (".residual", f".{_NEURONS}", *(f".{part}" for part in _HEADS))
        return {key for key in self.tensors if key.endswith(ends)}

    def misplaced(
        self,
        num_layers: int,
        *,
        residual: list[str],
        heads: list[str],
        neurons: Mapping[str, Collection[int]],
    ) -> str | None:
        """The first map that is missing or surplus; None where all is well.

        `residual`, `heads`: sources that may have those maps, of every layer or of none.
        `neurons`: sources that must have theirs, of which layers.
        """
        there = self._maps()
        allowed = {f"{source}.residual" for source in residual}
        for source, layers in neurons.items():
            allowed |= (keys := {layer_key(source, layer, _NEURONS) for layer in layers})
            if absent := keys - there:
                return min(absent)
        for source in heads:
            allowed |= (keys := _of_layers(source, num_layers, _HEADS))
            # A source that gains nothing by other heads keeps its own, in all layers.
            if keys & there and (absent := keys - there):
                return min(absent)
        return min(there - allowed, default=None)

    def describe(self) -> dict[str, Any]:
        """For `metrics.json`: kind -> source -> agreement with the anchor by layer, before and
        after, and whether the maps are used; which layers, where it is not all from the first."""
        described: dict[str, Any] = {}
        layers: dict[tuple[str, str], list[int]] = {}
        for kind, measured in _MEASURED.items():
            for key, pair in self.tensors.items():
                source, _, rest = key.rpartition(".layers.")
                if rest.partition(".")[2] != measured:
                    continue
                entry = described.setdefault(kind, {}).setdefault(
                    source, {"before": [], "after": [], "used": self._is_used(kind, source)}
                )
                before, after = (round(float(value), 6) for value in pair)
                entry["before"].append(before)
                entry["after"].append(after)
                layers.setdefault((kind, source), []).append(int(rest.partition(".")[0]))
        for (kind, source), numbers in layers.items():
            if numbers != list(range(len(numbers))):
                described[kind][source]["layers"] = numbers
        return described

    def _is_used(self, kind: str, source: str) -> bool:
        found = {
            "residual": self.residual(source),
            "heads": self.heads(source, 0),
        }
        if kind == "neurons":  # of some layers, or of all
            return any(
                k.startswith(f"{source}.") and k.endswith(f".{_NEURONS}") for k in self.tensors
            )
        return found[kind] is not None


def _owner(key: str) -> str:
    """The source that a tensor of the file is of."""
    of_all_layers = key.endswith((".residual", ".tokens"))
    return key.rpartition("." if of_all_layers else ".layers.")[0]


def _of_layers(source: str, num_layers: int, kinds: tuple[str, ...]) -> set[str]:
    return {layer_key(source, layer, kind) for layer in range(num_layers) for kind in kinds}
