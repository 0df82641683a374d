"""Operations that a model takes, and how many a device does in a second."""

import time
from typing import Any

import torch
from transformers import PreTrainedConfig

from symphony_moe.model.families import head_dim

NAMED_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Part of a GPU's name -> dense bfloat16 operations per second, as its maker says."""


def layer_operations(
    config: PreTrainedConfig, tokens: int, sequence: int, experts: int = 1
) -> float:
    """Of all layers, forward. `experts`: how many FFNs a token goes through. Products of matrices
    alone; attention looks back at half of a window, in the mean."""
    hidden, size = config.hidden_size, head_dim(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    weights = hidden * (2 * queries + 2 * keys) + experts * 3 * hidden * config.intermediate_size
    each = 2 * weights + 2 * 2 * queries * sequence / 2
    return float(config.num_hidden_layers * tokens * each)


def step_operations(config: PreTrainedConfig, tokens: int, sequence: int, experts: int) -> float:
    """Of one training step of all weights: forward, and twice that backward."""
    head = 2 * tokens * config.hidden_size * config.vocab_size
    return 3.0 * (layer_operations(config, tokens, sequence, experts) + float(head))


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second in the best of some products of large matrices."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    seconds = []
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        left @ right
        wait(device)
        seconds.append(time.perf_counter() - began)
    return float(2 * size**3 / min(seconds))


def peaks(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a speed is measured by: the device's measured peak; its maker's, where that is known."""
    found: dict[str, Any] = {"measured": measured_peak(device, dtype)}
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name()
        named = [peak for part, peak in NAMED_PEAKS.items() if part in name]
        found |= {"named": named[0]} if named else {}
    return found
