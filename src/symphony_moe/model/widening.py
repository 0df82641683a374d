"""A smaller dense model in a larger shape: the same function in wider, and more, matrices.

- Hidden size d from d_s: the residual stream is padded with zeros and is c = sqrt(d / d_s) times as
  large. The mean of its squares over d channels is then that of the original over d_s, so that
  every RMSNorm divides by the same number, whatever its epsilon, and puts out c times as much.
  What writes the stream is multiplied by c, and what reads it, normed or not, is divided by c.
- Heads: a head that is added has zeros in o, and puts out nothing. A KV head may be repeated, each
  copy with a part of its query heads.
- Depth: a layer that is added has zeros in o and down, and leaves the stream as it is. The rest of
  it is a copy of the layer before, so that it can learn something (block expansion: Wu et al. 2024,
  arXiv 2401.02415).

docs/harmonized.md has the algebra.
tests/model/test_widening.py holds it against stock transformers.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from symphony_moe.model.families import (
    BY_LAYER,
    FAMILIES,
    HEAD_AXIS,
    K_PROJ,
    O_PROJ,
    Q_PROJ,
    READERS,
    WRITERS,
    Family,
    head_dim,
    queries_per_kv,
)

_WRITERS = (*WRITERS, O_PROJ.replace("weight", "bias"))
_Q_NORM, _K_NORM = "self_attn.q_norm.weight", "self_attn.k_norm.weight"
_OF_QUERIES = ("self_attn.q_", "self_attn.o_")

Layers = tuple[int | None, ...]
"""For each layer of the result the number of a source's layer, or None: one that is added."""


class Shape(NamedTuple):
    """What can be made larger without changing the function, but for the width of the FFN."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Shape":
        """Of a dense model."""
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
        )


def widest(shapes: Sequence[Shape]) -> Shape:
    """The smallest shape that holds all of some. With g query heads for each KV head, a source with
    g_s of them needs ceil(g_s / g) copies of its KV heads; of all g that one is taken that gives
    the fewest parameters, and of equal ones the one with the fewest KV heads."""
    hidden, layers = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    groups = [(shape.kv_heads, shape.heads // shape.kv_heads) for shape in shapes]

    def kv_heads(per_group: int) -> int:
        return max(count * math.ceil(own / per_group) for count, own in groups)

    candidates = range(1, max(own for _, own in groups) + 1)
    best = min(candidates, key=lambda g: (kv_heads(g) * (g + 1), kv_heads(g)))
    return Shape(hidden, layers, best * kv_heads(best), kv_heads(best))


def widened_config(
    own: PreTrainedConfig, shape: Shape, layers: Layers, reference: PreTrainedConfig
) -> PreTrainedConfig:
    """The config of a dense model in a larger shape. `layers`: where its layers are. `reference`: a
    config with as many layers, for what kind the added ones are of."""
    changed = copy.deepcopy(own)
    changed.head_dim = head_dim(own)
    changed.hidden_size, changed.num_hidden_layers = shape.hidden, shape.layers
    changed.num_attention_heads, changed.num_key_value_heads = shape.heads, shape.kv_heads
    if None not in layers:
        return changed
    for name in BY_LAYER:
        mine, theirs = (getattr(config, name, None) for config in (own, reference))
        if mine and theirs:
            kinds = [theirs[n] if at is None else mine[at] for n, at in enumerate(layers)]
            setattr(changed, name, kinds)
    if hasattr(reference, "max_window_layers"):
        changed.max_window_layers = reference.max_window_layers
    return changed


@dataclass(frozen=True)
class Widening:
    """How a dense model's tensors are brought to a larger shape."""

    own: PreTrainedConfig
    """The model as it is stored."""
    config: PreTrainedConfig
    """The larger one: `widened_config`."""
    layers: Layers

    @property
    def stream_scale(self) -> float:
        """c: how many times as large the residual stream is."""
        return math.sqrt(self.config.hidden_size / self.own.hidden_size)

    @property
    def _family(self) -> Family:
        return FAMILIES[self.own.model_type]

    def own_layer(self, layer: int) -> int:
        """The number of the stored layer that a layer is made of: of an added one that before it,
        or the first."""
        before = [at for at in self.layers[: layer + 1] if at is not None]
        return before[-1] if before else 0

    def tensor(self, layer: int, name: str, tensor: Tensor) -> Tensor:
        """A layer's tensor in the larger shape. `name`: within the layer. `tensor`: of `own_layer`.
        In its dtype where it is padded alone, in float32 where it is scaled."""
        found = self._with_heads(name, tensor)
        times = self._times(name)
        found = found if times == 1 else found.float() * times
        if name in READERS:
            found = self._padded(found)
        elif name in _WRITERS:
            found = self._padded(found.movedim(0, -1)).movedim(-1, 0).contiguous()
            found = torch.zeros_like(found) if self.layers[layer] is None else found
        elif name in self._family.norms:
            found = self._padded(found, 1.0)
        return found

    def embedding(self, rows: Float[Tensor, "tokens own_hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Rows of the token embeddings."""
        scale = self.stream_scale
        return self._padded(rows if scale == 1 else rows * scale)

    def head(self, rows: Float[Tensor, "tokens own_hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Rows of an output head that is not tied to the embeddings."""
        scale = self.stream_scale
        return self._padded(rows if scale == 1 else rows / scale)

    def final_norm(self, gain: Float[Tensor, " own_hidden"]) -> Float[Tensor, " hidden"]:
        """The gains of the norm before the head. A tied head, and what it reads, are both c times
        as large: the gains are divided by that."""
        tied = self.own.tie_word_embeddings and self.stream_scale != 1
        return self._padded(gain / self.stream_scale**2 if tied else gain, 1.0)

    def _padded(self, tensor: Tensor, value: float = 0.0) -> Tensor:
        """A tensor whose last axis is the residual stream's. Gains of a norm that reads zeros
        there change nothing: they are what they are in a norm that is new."""
        return pad(tensor, (0, self.config.hidden_size - tensor.shape[-1]), value=value)

    def _times(self, name: str) -> float:
        """What a tensor is multiplied by."""
        scale = self.stream_scale
        times = scale if name in _WRITERS else 1 / scale if name in READERS else 1.0
        if self._family.head_norms != "whole":
            return times
        # A norm of all heads together: as with the stream.
        if name in (Q_PROJ, K_PROJ):
            times *= self._heads_scale(name)
        return times / self._heads_scale(name) if name in (_Q_NORM, _K_NORM) else times

    def _heads_scale(self, name: str) -> float:
        """Root of the number of heads over that of heads that are not of zeros, for q or k."""
        places = self._places[name.startswith(_OF_QUERIES)]
        return math.sqrt(len(places) / sum(place >= 0 for place in places))

    @cached_property
    def _places(self) -> tuple[list[int], list[int]]:
        """(KV heads, query heads): for each of the larger model the stored one, or -1."""
        groups, own_groups = self.config.num_key_value_heads, self.own.num_key_value_heads
        per_group, own_per_group = queries_per_kv(self.config), queries_per_kv(self.own)
        copies = math.ceil(own_per_group / per_group)
        keys, queries = [-1] * groups, [-1] * (groups * per_group)
        for group in range(own_groups * copies):
            own, part = divmod(group, copies)
            keys[group] = own
            for place, head in enumerate(range(own_per_group)[part * per_group :][:per_group]):
                queries[group * per_group + place] = own * own_per_group + head
        return keys, queries

    def _with_heads(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor with the larger model's attention heads."""
        whole = self._family.head_norms == "whole" and name in (_Q_NORM, _K_NORM)
        if name not in HEAD_AXIS and not whole:
            return tensor
        places = self._places[name.startswith(_OF_QUERIES)]
        if places == list(range(len(places))):
            return tensor
        axis, where = HEAD_AXIS.get(name, 0), torch.tensor(places)
        heads = tensor.unflatten(axis, (-1, head_dim(self.own))).movedim(axis, 0)
        found = heads[where.clamp(min=0)]
        found[where < 0] = 1.0 if whole else 0.0
        result: Tensor = found.movedim(0, axis).flatten(axis, axis + 1)
        return result
