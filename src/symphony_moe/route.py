"""The router's first weights."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

STANDARD_DEVIATION = 0.02


def random_router(
    names: Sequence[str], hidden_size: int, layer: int, seed: int
) -> Float[Tensor, "experts hidden"]:
    """A random linear router (Sec. 3.3): normal, standard deviation 0.02.

    Each row is drawn from the seed, the layer and the *name* of the expert's source, so that
    reordering the sources reorders the rows and changes nothing else.
    """
    rows = []
    for name in names:
        digest = hashlib.sha256(f"router/{seed}/{layer}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
        rows.append(torch.randn(hidden_size, generator=generator) * STANDARD_DEVIATION)
    return torch.stack(rows)
