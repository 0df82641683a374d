"""Memory, disk and time that a build will take, from the shapes alone."""

import math
import time
from collections.abc import Sequence
from functools import cache

import torch
from transformers import PreTrainedConfig

from symphony_moe.building.router_init import windows_for_router
from symphony_moe.model.checkpoint import BYTES
from symphony_moe.model.families import (
    head_dim,
    stream_scale,
)
from symphony_moe.model.layer import LOGITS_AT_ONCE, WINDOWS_TOKENS
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.opening import expected_shapes, target_of
from symphony_moe.sources.source import TABLE_ROWS, Source

STREAMS_IN_MEMORY = 2 * 1024**3
"""Residual streams of the calibration text larger than this (bytes) wait in memory-mapped files."""

_PROCESS = 600 * 1024**2
"""Memory of the interpreter and the libraries, in bytes."""


def streams_bytes(recipe: Recipe, config: PreTrainedConfig, num_sources: int) -> int:
    """Size of the residual streams that wait between layers, at the larger of two moments: all
    sources on the whole text while they are aligned; and, while the new model is fitted, on each
    source's own text, the source's stream at three places of a layer, the new model's at two and
    the plain mean's on some."""
    windows = recipe.windows_each
    to_fit = max(1, windows - recipe.validation_windows)
    whole = to_fit + recipe.validation_windows
    aligning = len(recipe.calibration_domains) * whole if recipe.aligns else 0
    fitting = 2 * whole if recipe.fits else 0
    if recipe.fits_layers:
        router = len(windows_for_router(num_sources, recipe.calibration.sequence_length, to_fit))
        fitting = 5 * whole + recipe.validation_windows + router
    tokens = num_sources * max(aligning, fitting) * recipe.calibration.sequence_length
    return int(tokens * config.hidden_size * 4)


def streams_in_memory(recipe: Recipe, config: PreTrainedConfig, num_sources: int) -> bool:
    """Whether the residual streams wait in memory between layers, or in memory-mapped files."""
    return streams_bytes(recipe, config, num_sources) <= STREAMS_IN_MEMORY


def work_bytes(recipe: Recipe, config: PreTrainedConfig, num_sources: int) -> int:
    """What lies under `work/` at once: how every layer compares with the anchor's (float64 for the
    residual stream, float32 for heads, int64 for neurons), and streams that wait in files."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    one_layer = 0
    if recipe.aligns_residual:
        one_layer += hidden**2 * 8 * (2 if recipe.fits else 1)
    if recipe.aligns_heads:
        size, groups = head_dim(config), config.num_key_value_heads
        one_layer += config.num_attention_heads * 8 + groups * (size // 2 + size**2) * 4
    if recipe.aligns_neurons:
        one_layer += ffn * 8
    records = (num_sources - 1) * config.num_hidden_layers * one_layer
    in_memory = streams_in_memory(recipe, config, num_sources)
    return int(records + (0 if in_memory else streams_bytes(recipe, config, num_sources)))


def peak_memory(recipe: Recipe, config: PreTrainedConfig, num_sources: int) -> int:
    """The largest of these moments: a block of every source's embedding table; one layer of every
    source with its statistics, while they are aligned, fused or fitted; the output head while it is
    fitted. float32 where it waits, float64 where it is fused, matched or solved."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    family = target_of(recipe).family(config.model_type)
    shapes = expected_shapes(config)
    layer_shapes = {
        name: shape for name, shape in shapes.items() if name.startswith("model.layers.0.")
    }
    layer = sum(math.prod(shape) for shape in layer_shapes.values())
    largest = max(math.prod(s) for name, s in layer_shapes.items() if ".self_attn." in name)
    streams = 0
    if streams_in_memory(recipe, config, num_sources):
        streams = streams_bytes(recipe, config, num_sources)
    batch = max(WINDOWS_TOKENS, recipe.calibration.sequence_length)
    statistics = matching = 0
    if recipe.aligns_neurons:
        statistics += (num_sources - 1) * ffn * ffn * 4
        matching = ffn * ffn * 24
    texts = 2 if recipe.fits else 1  # maps are judged on text of its own
    if recipe.aligns_residual:
        statistics += texts * (num_sources - 1) * hidden * hidden * 8
    if recipe.aligns_heads:
        width = config.num_attention_heads * head_dim(config)
        statistics += texts * (num_sources - 1) * width**2 * 8
    activations = batch * (ffn * 20 + hidden * 40)
    fusing = (num_sources + 2) * largest * 8
    reordered = num_sources * 3 * hidden * ffn * 4
    if family.stacks_experts:
        # Two FFN matrices of all experts in one tensor, and that rounded.
        reordered += num_sources * 2 * hidden * ffn * (4 + BYTES[recipe.output.dtype])
    if stream_scale(family, config) != 1:
        reordered += num_sources * (hidden * ffn + largest) * 4
    moments = [
        TABLE_ROWS * hidden * (num_sources * 4 + 16),
        num_sources * layer * 4 + statistics + max(activations, matching, fusing + reordered),
    ]
    if recipe.fits:
        # Every source's layer as it is and aligned; the new layer as it was, is, and is tried.
        layers = 5 * num_sources * layer * 4
        windows = max(batch, num_sources * recipe.calibration.sequence_length)
        solving = 3 * (ffn + 1) ** 2 * 8 + 2 * ffn * hidden * 8
        learning = num_sources * layer * 12 + windows * (ffn * 24 + hidden * 120)
        moments.append(layers + max(solving, learning))
    if recipe.fits_layers:
        # All sources' heads, the fused one, the fitted one, its gradient and Adam's two moments.
        table = config.vocab_size * hidden * 4
        moments.append((num_sources + 6) * table + 6 * LOGITS_AT_ONCE * 4)
    return int(_PROCESS + streams + max(moments))


def build_seconds(recipe: Recipe, sources: Sequence[Source], config: PreTrainedConfig) -> float:
    """How long stage 1 takes on this machine, from the speed of one product of matrices."""
    tokens = recipe.calibration.tokens
    num_weights = sum(source.num_parameters for source in sources)
    # Tables of embeddings and heads are not multiplied with until the head is fitted.
    tables = sum(1 if source.config.tie_word_embeddings else 2 for source in sources)
    table = config.vocab_size * config.hidden_size
    one_source = (num_weights - tables * table) / len(sources)
    operations = assignment = 0.0
    if recipe.aligns:
        operations += 2.0 * tokens * one_source * len(sources)
    if recipe.aligns_neurons:
        pairs = (len(sources) - 1) * config.num_hidden_layers
        operations += 2.0 * tokens * config.intermediate_size**2 * pairs
        # Measured: 0.4 s for 4864 neurons that hardly correlate, 1 s for 8960, 2.2 s for 14336.
        assignment = 1.1 * (config.intermediate_size / 10_000) ** 2 * pairs
    if recipe.fits:
        active = one_source * recipe.router.top_k  # an upper bound: attention counts once
        operations += 2.0 * tokens * 2 * active
    if recipe.fits_layers:
        # Each source on its own text, the Gram matrices, and forward and backward per epoch.
        operations += 2.0 * tokens * 2 * one_source
        operations += 2.0 * tokens * config.intermediate_size**2 * config.num_hidden_layers
        operations += recipe.fit.epochs * tokens * (6.0 * active + 6.0 * table)
    reading_and_writing = 12 * num_weights / 500e6
    return 5.0 + operations / _matmul_speed() + assignment + reading_and_writing


def matching_seconds(recipe: Recipe, sources: Sequence[Source], config: PreTrainedConfig) -> float:
    """How much of stage 1 it takes to match neurons: what it would be shorter by without."""
    align = recipe.align.model_copy(update={"neurons": "none"})
    without = recipe.model_copy(update={"align": align})
    return build_seconds(recipe, sources, config) - build_seconds(without, sources, config)


@cache
def _matmul_speed() -> float:
    """Floating-point operations per second of this machine in float32: the best of some products,
    so that what else runs for a moment does not count, halved, as attention, norms and elementwise
    work come on top."""
    size = 1024
    matrix = torch.ones(size, size)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 2
