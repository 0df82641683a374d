"""Several sources' tensors -> one: linear mean, SLERP of any number, selective-linear embeddings.

Section 3.2 of arXiv 2509.18542 ("layer-aware fusion"). Pure functions; computation is float64 where
angles or means of many are taken, the result is float32.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from symphony_moe.building.draws import generator_for

_PIECE = 2**15
"""Numbers whose mean is taken at once: their float64 copies stay in a core's cache, and torch takes
one thread for so few. Beside threads that read, write and hash, more would mostly wait for one
another, at full speed."""

_MAX_ITERATIONS = 100

_TOLERANCE = 1e-14
"""The Karcher iteration stops when its step is shorter than this angle (radians)."""

_SETTLED = 1e-9
"""A step that is still longer than this at the end (radians) has found no mean."""


def normalized(weights: Sequence[float]) -> Float[Tensor, " sources"]:
    """Shares that sum to one (float64)."""
    shares = torch.tensor(weights, dtype=torch.float64)
    return shares / shares.sum()


def linear_mean(
    tensors: Sequence[Float[Tensor, "..."]], weights: Sequence[float]
) -> Float[Tensor, "..."]:
    """The weighted mean. Norm gains, biases and every other one-dimensional tensor go this way."""
    shares = normalized(weights).tolist()
    result = torch.empty(tensors[0].numel())
    pieces = zip(result.split(_PIECE), *(t.reshape(-1).split(_PIECE) for t in tensors), strict=True)
    for place, *parts in pieces:
        total = torch.zeros(len(place), dtype=torch.float64)
        for part, share in zip(parts, shares, strict=True):
            total.add_(part.double(), alpha=share)
        place.copy_(total)
    return result.view(tensors[0].shape)


def slerp(
    tensors: Sequence[Float[Tensor, "..."]], weights: Sequence[float]
) -> Float[Tensor, "..."]:
    """Spherical interpolation of any number of flattened tensors.

    The weighted Karcher mean of the directions on the unit sphere, times the weighted mean of the
    norms. Sec. 3.2 gives SLERP for two tensors, `sin((1-t)w)/sin(w) a + sin(tw)/sin(w) b`, and
    merges four without saying how; the Karcher mean equals that formula for two tensors of equal
    norm (`t` = the second's share), does not depend on the order of sources, and for parallel
    tensors is their linear mean. Directions that have no unique mean (a zero tensor, opposite
    tensors) fall back to the linear mean.

    The mean lies in the span of the directions, so the iteration runs on their N coefficients and
    Gram matrix, and the tensors themselves are read once.
    """
    shares = normalized(weights)
    flat = [tensor.reshape(-1).double() for tensor in tensors]
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in flat])
    if bool((norms == 0).any()):
        return linear_mean(tensors, weights)
    gram = torch.empty(len(flat), len(flat), dtype=torch.float64)
    for row, one in enumerate(flat):
        for column, other in enumerate(flat[: row + 1]):
            gram[row, column] = gram[column, row] = one.dot(other)
    gram = gram / torch.outer(norms, norms)
    coefficients = _karcher_coefficients(gram, shares)
    if coefficients is None:
        return linear_mean(tensors, weights)
    scales = coefficients * (shares @ norms) / norms
    result = torch.zeros_like(flat[0])
    for tensor, scale in zip(flat, scales.tolist(), strict=True):
        result.add_(tensor, alpha=scale)
    return result.float().view(tensors[0].shape)


def _karcher_coefficients(
    gram: Float[Tensor, "sources sources"], shares: Float[Tensor, " sources"]
) -> Float[Tensor, " sources"] | None:
    """Coefficients of the weighted Karcher mean of unit vectors with the given inner products, as a
    unit vector; None where it is not unique. Gradient descent on the sphere with step 1: move from
    the mean `m` along the weighted mean of the tangents that point from `m` to each direction."""
    mean = shares / torch.sqrt(shares @ gram @ shares).clamp_min(1e-300)
    if not bool(torch.isfinite(mean).all()) or float(shares @ gram @ shares) < 1e-12:
        return None
    if float(gram.min()) < -1 + 1e-12:
        return None  # every arc between opposite directions is as short as every other
    length = torch.tensor(torch.inf)
    for _ in range(_MAX_ITERATIONS):
        cosines = (gram @ mean).clamp(-1, 1)
        angles = torch.arccos(cosines)
        stretch = torch.where(angles < 1e-9, 1.0, angles / torch.sin(angles).clamp_min(1e-300))
        step = shares * stretch - (shares * stretch * cosines).sum() * mean
        length = torch.sqrt((step @ gram @ step).clamp_min(0))
        if length < _TOLERANCE:
            break
        mean = torch.cos(length) * mean + torch.sin(length) / length * step
        mean = mean / torch.sqrt(mean @ gram @ mean)
    return mean if float(length) < _SETTLED else None


def selective_linear(
    tables: Sequence[Float[Tensor, "vocabulary hidden"]],
    knowledge: Float[Tensor, "sources vocabulary"],
    weights: Sequence[float],
) -> Float[Tensor, "vocabulary hidden"]:
    """Token embeddings (or output heads): a token that several sources know gets the weighted mean
    of their rows, a token that only one knows keeps that row. Sec. 3.2, "token embeddings".

    `knowledge[i, token]` says how much of the token is source i's: 1 or 0 in the paper. With the
    numbers of the token in each source's text it is the table that is closest, in the mean square
    over that text, to each source's own. A token that only sources of weight 0 know is theirs.
    Raises ValueError for a token that no source knows: there is nothing to give it.
    """
    shares = normalized(weights)[:, None] * knowledge.double()
    shares = torch.where(shares.sum(dim=0) > 0, shares, knowledge.double())
    total = shares.sum(dim=0)
    if bool((total == 0).any()):
        token = int((total == 0).nonzero()[0])
        raise ValueError(f"token {token} is in no source's table")
    shares = shares / total
    result = torch.empty(tables[0].shape)
    rows = max(1, _PIECE // result.shape[1])
    for first in range(0, len(result), rows):
        piece = slice(first, first + rows)
        mean = torch.zeros(result[piece].shape, dtype=torch.float64)
        for table, share in zip(tables, shares, strict=True):
            mean.addcmul_(table[piece].double(), share[piece, None])
        result[piece] = mean
    return result


def drop_neurons(
    expert: Mapping[str, Float[Tensor, "rows columns"]],
    neuron_axis: Mapping[str, int],
    share: float,
    key: str,
) -> dict[str, Tensor]:
    """An expert of which a random share of the neurons is drawn anew
    (Drop-Upcycling; the paper's baseline): the same neurons in every matrix, from a normal
    distribution with the matrix's own mean and standard deviation.

    `neuron_axis`: matrix -> the axis that counts its neurons. `key`: what the draws follow from,
    and nothing else.
    """
    generator = generator_for(f"drop/{key}")
    names = sorted(neuron_axis)
    number = expert[names[0]].shape[neuron_axis[names[0]]]
    drawn = torch.randperm(number, generator=generator)[: round(share * number)]
    dropped = {}
    for name in names:
        matrix = expert[name].clone()
        part = matrix.index_select(neuron_axis[name], drawn)
        noise = torch.randn(part.shape, generator=generator)
        fresh = matrix.double().mean() + noise.double() * matrix.double().std(correction=0)
        dropped[name] = matrix.index_copy_(neuron_axis[name], drawn, fresh.to(matrix.dtype))
    return {**expert, **dropped}
