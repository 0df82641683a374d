"""Random draws that follow from a name: the same whatever else is drawn, and in whatever order."""

import hashlib

import torch


def generator_for(key: str) -> torch.Generator:
    """A generator on the CPU, seeded by the first 64 bits of the SHA-256 of `key`."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
