"""Maps of a dense model's weights that leave its function as it is.

Gains and residual basis: the computational invariance of SliceGPT (arXiv 2401.15024), here without
the slicing. Heads: per-head maps that cancel inside attention scores and between values and output.

Weights are stored out x in, and x is a row vector of the residual stream. What a family allows is
its row in `families.py`. A layer is a mapping from names within the layer to tensors, as
`Source.read_layer` gives it. Maps are used in the dtype of the tensors that they meet, and a wrong
map is a ValueError: applied, it would make another model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from symphony_moe.model.families import (
    DOWN,
    NEURON_AXIS,
    READERS,
    UP,
    WRITERS,
    Family,
    head_dim,
)

_Q, _K, _V, _O = (f"self_attn.{part}_proj" for part in "qkvo")
_HEAD_GAINS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


@dataclass(frozen=True)
class HeadMap:
    """Another order and another basis of one layer's attention heads."""

    order: Int[Tensor, " heads"]
    """Entry p: the source's query head that takes place p. The heads of a KV group stay together,
    and take the KV head along."""
    phases: Float[Tensor, "groups half_head"]
    """Radians, by group at its new place and RoPE frequency: of q and of k, the pair (j, j +
    head_dim / 2), read as the complex number of its values, is multiplied by exp(i phase)."""
    values: Float[Tensor, "groups head_dim head_dim"]
    """Orthogonal R, by group at its new place: V <- R^T V, value bias b <- R^T b, and O <- O R for
    each query head of the group."""


@dataclass(frozen=True)
class NeuronMap:
    """Another order of one layer's hidden neurons, and their signs."""

    order: Int[Tensor, " ffn"]
    """Entry p: the source's neuron that takes place p."""
    signs: Float[Tensor, " ffn"]
    """+1 or -1, by new place: what `up` rows and `down` columns are multiplied by."""


def fold_gains(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer with its norm gains in the matrices that read them (`W <- W diag(g)`), and neutral
    gains in their place."""
    folded = dict(tensors)
    for norm, readers in family.symmetries.gains.items():
        gain = gain_of(family, tensors[norm])
        for name in readers:
            folded[name] = tensors[name] * gain
        folded[norm] = neutral_gain(family, tensors[norm])
    return folded


def gain_of(family: Family, weight: Float[Tensor, " hidden"]) -> Float[Tensor, " hidden"]:
    """What a norm with this weight multiplies by."""
    return weight + family.symmetries.gain_offset


def neutral_gain(family: Family, weight: Float[Tensor, " hidden"]) -> Float[Tensor, " hidden"]:
    """The weight of a norm that multiplies by one, in the shape and dtype of `weight`."""
    return torch.full_like(weight, 1 - family.symmetries.gain_offset)


def rotate_residual(
    family: Family, tensors: Mapping[str, Tensor], residual: Float[Tensor, "hidden hidden"]
) -> dict[str, Tensor]:
    """A layer in another basis of the residual stream, `x -> x Q`: what reads the stream becomes
    `W Q`, what writes it `Q^T W` (and its bias `b Q`).

    A norm's gains commute with permutations and signs only. So a signed permutation takes them
    along; any other Q is a ValueError unless the family allows it and the gains are neutral (see
    `fold_gains`).
    """
    _check_orthogonal("residual", residual)
    norms = {name: tensors[name] for name in family.norms}
    if _is_signed_permutation(residual):
        norms = {name: _convert(residual.abs(), gain).T @ gain for name, gain in norms.items()}
    else:
        if family.symmetries.residual == "signed-permutation":
            raise ValueError(
                f"residual: {family.dense} has norm gains that do not fold; expected a signed "
                "permutation, got another matrix"
            )
        for name, gain in norms.items():
            if not torch.equal(gain, neutral_gain(family, gain)):
                raise ValueError(
                    f"{name}: expected neutral gains before a rotation of the residual stream, got "
                    f"{float(gain.min()):.4g} .. {float(gain.max()):.4g}; fold_gains comes first"
                )
    rotated = {**tensors, **norms}
    for name in READERS:
        rotated[name] = tensors[name] @ _convert(residual, tensors[name])
    for name in WRITERS:
        rotated[name] = _convert(residual, tensors[name]).T @ tensors[name]
        bias = name.replace("weight", "bias")
        if bias in tensors:
            rotated[bias] = tensors[bias] @ _convert(residual, tensors[bias])
    return rotated


def scale_residual(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A layer that writes `scale` times as much to the residual stream: the same function where
    what it reads is `scale` times as large, and the norms' epsilon `scale` squared times."""
    if scale == 1:
        return dict(tensors)
    writers = {*WRITERS, *(name.replace("weight", "bias") for name in WRITERS)}
    return {n: tensor * scale if n in writers else tensor for n, tensor in tensors.items()}


def reorder_heads(
    family: Family, config: PreTrainedConfig, tensors: Mapping[str, Tensor], heads: HeadMap
) -> dict[str, Tensor]:
    """A layer with its attention heads in another order and basis, biases included."""
    num_heads, groups, size = _head_sizes(config)
    per_group = num_heads // groups
    group_order = _check_heads(heads, num_heads, groups, size)
    moved = dict(tensors)
    parts = ((_Q, heads.order, per_group), (_K, group_order, 1))
    if family.head_norms == "whole":  # each head has gains of its own, which go along
        for name, (_, order, _) in zip(_HEAD_GAINS, parts, strict=True):
            moved[name] = tensors[name].unflatten(0, (len(order), size))[order].flatten()
    turns = _turns(family, moved, heads.phases)
    for part, order, share in parts:
        for name in (f"{part}.weight", f"{part}.bias"):
            if name in tensors:
                rows = tensors[name].unflatten(0, (len(order), size))[order]
                by_head = [_convert(t, rows).repeat_interleave(share, dim=0) for t in turns]
                moved[name] = _turn(rows, *by_head).flatten(0, 1)
    for name in (f"{_V}.weight", f"{_V}.bias"):
        if name in tensors:
            rows = tensors[name].unflatten(0, (groups, size))[group_order]
            rotation = _convert(heads.values, rows)
            moved[name] = torch.einsum("gij,gi...->gj...", rotation, rows).flatten(0, 1)
    name = f"{_O}.weight"
    columns = tensors[name].unflatten(1, (num_heads, size))[:, heads.order]
    columns = columns.unflatten(1, (groups, per_group))
    rotation = _convert(heads.values, columns)
    moved[name] = torch.einsum("dgpi,gij->dgpj", columns, rotation).flatten(1)
    return moved


def _turns(
    family: Family, tensors: Mapping[str, Tensor], phases: Float[Tensor, "groups half_head"]
) -> tuple[Float[Tensor, "groups half_head"], Float[Tensor, "groups half_head"]]:
    """Cosine and sine of the phases (float64). Raises ValueError for a phase that does not commute
    with the gains of the family's norms of q and k, which are at their new places in `tensors`."""
    cosine, sine = phases.double().cos(), phases.double().sin()
    if family.symmetries.phases == "any":
        return cosine, sine
    groups, half = phases.shape
    free = torch.ones_like(phases, dtype=torch.bool)
    for name in _HEAD_GAINS:  # gains of one head, for all of them, or of each head
        first, second = tensors[name].to(phases.device).view(-1, 2, half).unbind(dim=1)
        equal = first == second
        free &= equal.view(groups, -1, half).all(dim=1) if len(equal) > 1 else equal
    wrong = ~free & (sine.abs() > 1e-6)
    if bool(wrong.any()):
        group, pair = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"phases: {family.dense} norms q and k, and the gains of pair {pair} differ; "
            f"expected 0 or pi, got {float(phases[group, pair]):.6g} in group {group} (and "
            f"{int(wrong.sum()) - 1} more)"
        )
    # Not quite pi, as in float32, would be not quite a symmetry.
    return cosine, torch.where(free, sine, 0.0)


def _turn(
    rows: Float[Tensor, "heads head_dim ..."],
    cosine: Float[Tensor, "heads half_head"],
    sine: Float[Tensor, "heads half_head"],
) -> Float[Tensor, "heads head_dim ..."]:
    """Each head's rows (j, j + head_dim / 2) turned by one angle."""
    first, second = rows.chunk(2, dim=1)
    shape = cosine.shape + (1,) * (rows.ndim - 2)
    cosine, sine = cosine.reshape(shape), sine.reshape(shape)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=1)


def reorder_neurons(tensors: Mapping[str, Tensor], neurons: NeuronMap) -> dict[str, Tensor]:
    """A layer with its hidden neurons in another order and with other signs: rows of `gate` and
    `up` and columns of `down` move, and the signs of `up` and `down` cancel in their product."""
    _check_permutation("neurons", neurons.order, tensors[UP].shape[0])
    if not bool((neurons.signs.abs() == 1).all()):
        raise ValueError(
            f"neurons: expected signs of +1 and -1, got {neurons.signs.unique()[:4].tolist()}"
        )
    moved = dict(tensors)
    for name, axis in NEURON_AXIS.items():
        moved[name] = tensors[name].index_select(axis, neurons.order.to(tensors[name].device))
    signs = _convert(neurons.signs, tensors[UP])
    moved[UP] = moved[UP] * signs[:, None]
    moved[DOWN] = moved[DOWN] * signs
    return moved


def transform_layer(
    family: Family,
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    *,
    residual: Float[Tensor, "hidden hidden"] | None = None,
    heads: HeadMap | None = None,
    neurons: NeuronMap | None = None,
) -> dict[str, Tensor]:
    """A layer with its gains folded, and put through every map that is given. Raises ValueError for
    a map that would change the function."""
    transformed = fold_gains(family, tensors)
    if residual is not None:
        transformed = rotate_residual(family, transformed, residual)
    if heads is not None:
        transformed = reorder_heads(family, config, transformed, heads)
    if neurons is not None:
        transformed = reorder_neurons(transformed, neurons)
    return transformed


def transform_embedding(
    rows: Float[Tensor, "tokens hidden"], residual: Float[Tensor, "hidden hidden"] | None
) -> Float[Tensor, "tokens hidden"]:
    """Token embeddings (or some rows of them) in another basis of the residual stream: `E Q`."""
    return rows if residual is None else rows @ _convert(residual, rows)


def transform_head(
    rows: Float[Tensor, "tokens hidden"],
    gain: Float[Tensor, " hidden"],
    residual: Float[Tensor, "hidden hidden"] | None,
) -> Float[Tensor, "tokens hidden"]:
    """The output head (or some rows of it) with the final norm's gain folded, and in another basis:
    `H diag(g) Q`. The final norm becomes neutral, and a tied head is no longer the embeddings.

    `gain`: what the norm multiplies by, `gain_of(family, weight)`.
    """
    return transform_embedding(rows * _convert(gain, rows), residual)


def identity_heads(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> HeadMap:
    """The map that leaves every head as it is."""
    heads, groups, size = _head_sizes(config)
    return HeadMap(
        order=torch.arange(heads),
        phases=torch.zeros(groups, size // 2, dtype=dtype),
        values=torch.eye(size, dtype=dtype).repeat(groups, 1, 1),
    )


def random_residual(
    family: Family, hidden: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "hidden hidden"]:
    """A random basis of the residual stream, of the kind that the family allows."""
    if family.symmetries.residual == "signed-permutation":
        order = torch.randperm(hidden, generator=generator)
        return torch.eye(hidden, dtype=dtype)[order] * _random_signs(hidden, generator, dtype)
    return _random_rotations(1, hidden, generator)[0].to(dtype)


def random_heads(
    family: Family,
    config: PreTrainedConfig,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> HeadMap:
    """A random order of KV groups and of the query heads in each, random phases (0 and pi where the
    family norms q and k) and value rotations."""
    heads, groups, size = _head_sizes(config)
    per_group = heads // groups
    order = torch.cat(
        [
            group * per_group + torch.randperm(per_group, generator=generator)
            for group in torch.randperm(groups, generator=generator)
        ]
    )
    drawn = torch.rand(groups, size // 2, generator=generator, dtype=torch.float64)
    if family.symmetries.phases == "half-turns":
        phases = (drawn < 0.5) * math.pi
    else:
        phases = (2 * drawn - 1) * math.pi
    values = _random_rotations(groups, size, generator)
    return HeadMap(order, phases.to(dtype), values.to(dtype))


def random_neurons(
    config: PreTrainedConfig, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> NeuronMap:
    """A random order of the hidden neurons, and random signs."""
    ffn = config.intermediate_size
    order = torch.randperm(ffn, generator=generator)
    return NeuronMap(order, _random_signs(ffn, generator, dtype))


def _random_rotations(
    count: int, size: int, generator: torch.Generator
) -> Float[Tensor, "count size size"]:
    """Orthogonal matrices (float64), uniformly: Mezzadri, "How to generate random matrices from the
    classical compact groups", 2007."""
    normal = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(normal)
    signs = torch.where(triangular.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    result: Tensor = orthogonal * signs[:, None, :].to(orthogonal.dtype)
    return result


def _random_signs(
    count: int, generator: torch.Generator, dtype: torch.dtype
) -> Float[Tensor, " count"]:
    return (2 * torch.randint(2, (count,), generator=generator) - 1).to(dtype)


def _head_sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """(query heads, KV groups, size of a head)."""
    return config.num_attention_heads, config.num_key_value_heads, head_dim(config)


def _convert(map_: Tensor, tensor: Tensor) -> Tensor:
    """A map in the dtype, and on the device, of a tensor."""
    return map_.to(tensor)


def _check_heads(heads: HeadMap, num_heads: int, groups: int, size: int) -> Int[Tensor, " groups"]:
    """Entry p: the source's KV head that takes place p. Raises ValueError for a map that splits a
    group, or is of another model's shape."""
    expected = (groups, size // 2), (groups, size, size)
    shapes = tuple(heads.phases.shape), tuple(heads.values.shape)
    if shapes != expected:
        raise ValueError(f"heads: expected phases and values of {expected}, got {shapes}")
    _check_permutation("heads", heads.order, num_heads)
    _check_orthogonal("value rotations", heads.values)
    by_place = (heads.order // (num_heads // groups)).view(groups, -1)
    split = (by_place != by_place[:, :1]).any(dim=1)
    if bool(split.any()):
        place = int(split.nonzero()[0])
        raise ValueError(
            f"heads: expected the query heads of one KV group in places {place * by_place.shape[1]}"
            f" .. {(place + 1) * by_place.shape[1] - 1}, got heads of groups "
            f"{by_place[place].unique().tolist()}"
        )
    return by_place[:, 0]


def _check_permutation(who: str, order: Tensor, count: int) -> None:
    if not torch.equal(order.long().sort().values.cpu(), torch.arange(count)):
        raise ValueError(
            f"{who}: expected each of 0 .. {count - 1} once, got {len(order)} entries, "
            f"{len(order.unique())} of them different, {order.tolist()[:8]} ..."
        )


def _check_orthogonal(who: str, matrices: Float[Tensor, "... size size"]) -> None:
    """Each `R^T R` is the identity, to 1e-4 (float64: 1e-9)."""
    tolerance = 1e-9 if matrices.dtype == torch.float64 else 1e-4
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    error = float((matrices.mT @ matrices - identity).abs().max())
    if not error <= tolerance:
        raise ValueError(
            f"{who}: expected orthogonal matrices, to {tolerance:.0e}; got ones whose R^T R is "
            f"{error:.2g} away from the identity"
        )


def _is_signed_permutation(matrix: Float[Tensor, "size size"]) -> bool:
    """Of an orthogonal matrix: whether each entry is 0, 1 or -1."""
    return bool(((matrix == 0) | (matrix.abs() == 1)).all())
