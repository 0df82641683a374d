"""In which number format the layers are multiplied while a model is calibrated.

float32, or bfloat16 where the hardware multiplies that faster. Residual streams, norms, routers,
weights that learn and all sums stay in float32 either way.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

REDUCED_FROM = 512
"""Hidden size from which bfloat16 is faster by much: below it, casting costs what it saves."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has instructions for it: a processor with AMX or AVX512-BF16, or a
    GPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities()
    return bool(known.get("amx_bf16", False) or known.get("avx512_bf16", False))


def is_reduced(setting: str, hidden_size: int, device: torch.device) -> bool:
    """Whether `calibration.precision` means bfloat16 for a model of this hidden size."""
    if setting == "auto":
        return hidden_size >= REDUCED_FROM and multiplies_bfloat16(device)
    return setting == "bfloat16"


@contextmanager
def products(setting: str, hidden_size: int, device: torch.device) -> Iterator[None]:
    """Inside the block matrices are multiplied as `calibration.precision` says; sums are float32.

    Reduced, what a layer computes is rounded to bfloat16 between two products, but for its residual
    stream (autocast). Casts are not kept: weights learn while the block is open.
    """
    on = is_reduced(setting, hidden_size, device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if on else before)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_dtype(device: torch.device) -> torch.dtype:
    """What the factors of a product are cast to where this is asked."""
    reduced = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if reduced else torch.float32


@contextmanager
def float32_results(device: torch.device) -> Iterator[None]:
    """Inside a block of `products`: keep results in float32. Only the factors are rounded, to
    bfloat16 (on a GPU: to TF32)."""
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Inside a block of `products`: float32 all through."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
