"""Memory, disk and time that a build will take, from the shapes alone."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from symphony_moe.building.router_init import windows_for_router
from symphony_moe.model.checkpoint import BYTES, WAITING_BYTES
from symphony_moe.model.families import (
    EMBEDDING,
    head_dim,
    stream_scale,
)
from symphony_moe.model.layer import LOGITS_AT_ONCE, WINDOWS_TOKENS, device
from symphony_moe.model.precision import is_reduced
from symphony_moe.model.temperature import TEMPERATURES
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.opening import expected_shapes, target_of
from symphony_moe.sources.source import TABLE_ROWS, Source
from symphony_moe.sources.transplant import SCORES_AT_ONCE, TOKENS_AT_ONCE, terms_for

STREAMS_IN_MEMORY = 2 * 1024**3
"""Residual streams of the calibration text larger than this (bytes) wait in memory-mapped files."""

_KEPT = 64 * 1024**2
"""Freed memory that the C library keeps for what is asked of it next, in bytes."""


def streams_bytes(recipe: Recipe, config: PreTrainedConfig, num_sources: int) -> int:
    """Size of the residual streams that wait between layers, at the larger of two moments: all
    sources on the whole text while they are aligned; and, while the new model is fitted, on each
    source's own text, the source's stream at three places of a layer, the new model's at two (and
    before the last layers, where those learn with the head) and the plain mean's on some."""
    windows = recipe.windows_each
    to_fit = max(1, windows - recipe.validation_windows)
    whole = to_fit + recipe.validation_windows
    aligning = len(recipe.calibration_domains) * whole if recipe.aligns else 0
    fitting = 2 * whole if recipe.fits else 0
    if recipe.fits_layers:
        router = len(windows_for_router(num_sources, recipe.calibration.sequence_length, to_fit))
        places = 6 if recipe.layers_with_head else 5
        fitting = places * whole + recipe.validation_windows + router
    tokens = num_sources * max(aligning, fitting) * recipe.calibration.sequence_length
    return int(tokens * config.hidden_size * 4)


def streams_in_memory(
    recipe: Recipe, config: PreTrainedConfig, num_sources: int, memory: int | None = None
) -> bool:
    """Whether the residual streams wait in memory between layers, or in memory-mapped files.
    `memory`: the bytes that the build may take in all; None: STREAMS_IN_MEMORY for the streams."""
    streams = streams_bytes(recipe, config, num_sources)
    if memory is None:
        return streams <= STREAMS_IN_MEMORY
    return streams == 0 or _without_streams(recipe, config, num_sources) + streams <= memory


def work_bytes(
    recipe: Recipe, config: PreTrainedConfig, num_sources: int, memory: int | None = None
) -> int:
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
    in_memory = streams_in_memory(recipe, config, num_sources, memory)
    return int(records + (0 if in_memory else streams_bytes(recipe, config, num_sources)))


def peak_memory(
    recipe: Recipe, config: PreTrainedConfig, num_sources: int, memory: int | None = None
) -> int:
    """Bytes at the largest of a build's moments. `memory`: see `streams_in_memory`."""
    peak = _without_streams(recipe, config, num_sources)
    if streams_in_memory(recipe, config, num_sources, memory):
        peak += streams_bytes(recipe, config, num_sources)
    return peak


_LIGHTER: tuple[dict[str, Any], ...] = (
    {"layers_with_head": 0},
    {"embeddings": False},
    {"layers_with_head": 0, "embeddings": False},
    {"epochs": 0},
)
"""Settings of a fit that need less memory, those that cost least first."""


def beyond_memory(
    recipe: Recipe, config: PreTrainedConfig, num_sources: int, memory: int | None = None
) -> str:
    """That a build needs more memory than it may take, and what needs less; empty where it does
    not. `memory`: see `streams_in_memory`; None: what the machine has."""
    shape = (config, num_sources, memory)
    limit = psutil.virtual_memory().total if memory is None else memory
    peak = peak_memory(recipe, *shape)
    if peak <= limit:
        return ""
    whose = "this machine has" if memory is None else "--memory allows"
    said = f"stage 1 takes about {in_mb(peak)} at its peak; {whose} {in_mb(limit)}. "

    def measure(settings: Mapping[str, Any]) -> int:
        fit = recipe.fit.model_copy(update=settings)
        return peak_memory(recipe.model_copy(update={"fit": fit}), *shape)

    if recipe.refines:
        said += say_lighter("fit", _LIGHTER, (peak, limit), measure)
    return f"{said}Fewer sources need less (experts.sources)"


def say_lighter(
    section: str,
    ways: Sequence[Mapping[str, Any]],
    sizes: tuple[int, int],
    measure: Callable[[Mapping[str, Any]], int],
) -> str:
    """A sentence for each way that needs less memory than those before it, up to the first that
    fits. `ways`: settings of a recipe's `section`. `sizes`: (what is needed without them, what
    there is), in bytes. `measure`: the bytes that settings need."""
    (peak, limit), sentences = sizes, []
    for settings in ways:
        less = measure(settings)
        if less < peak:
            peak = less
            values = (f"{section}.{name}: {_as_yaml(value)}" for name, value in settings.items())
            sentences.append(f"With {' and '.join(values)} it takes {in_mb(less)}. ")
        if less <= limit:
            break
    return "".join(sentences)


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def in_mb(size: int) -> str:
    """Bytes as a message says them."""
    return f"{size / 1e6:,.0f} MB"


def _without_streams(recipe: Recipe, config: PreTrainedConfig, num_sources: int) -> int:
    moments = _Moments(recipe, config, num_sources)
    return int(process_bytes() + _KEPT + max(moments.all().values()))


@cache
def process_bytes() -> int:
    """What this process holds before a build: the interpreter, the libraries, the tokenizers."""
    return psutil.Process().memory_info().rss


def numbers_for_gradient(config: PreTrainedConfig, top_k: int, times: int = 1) -> int:
    """How many numbers the gradient of one MoE layer needs for one token. `times`: how many
    sources' heads its attention has."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, keys = _widths(config)
    # Of each expert that a token goes to: its input, what its neurons are made of, its output.
    of_experts = top_k * (4 * ffn + 3 * hidden) + 2 * ffn
    of_attention = 12 * hidden + times * (6 * queries + 4 * keys)
    return int(of_experts + of_attention)


def _widths(config: PreTrainedConfig) -> tuple[int, int]:
    """Numbers of a token's queries, and of its keys."""
    size = head_dim(config)
    return int(config.num_attention_heads) * size, int(config.num_key_value_heads) * size


@dataclass(frozen=True)
class _Moments:
    """Bytes that are held at once in the moments of a build that may be its largest, beside the
    process itself and the streams. Numbers are float32 (4 bytes) where they wait and where layers
    are run, float64 (8) where they are fused, compared or solved."""

    recipe: Recipe
    config: PreTrainedConfig
    num_sources: int

    @cached_property
    def _hidden(self) -> int:
        return int(self.config.hidden_size)

    @cached_property
    def _ffn(self) -> int:
        return int(self.config.intermediate_size)

    def all(self) -> dict[str, int]:
        """Moment -> bytes."""
        recipe = self.recipe
        found = {"a block of the tables": self.tables(), "a layer made": self.made()}
        if recipe.backbone.missing_tokens in ("pursuit", "regression"):
            found["missing tokens"] = self.missing_tokens()
        if recipe.aligns:
            found |= {
                "a layer compared": self.compared(),
                "a layer matched": self.matched(),
            }
        if recipe.aligns_residual:
            # The sum of the covariances and its singular vectors.
            found["a basis found"] = 10 * self._hidden**2 * 8
        if recipe.fits_router:
            found["a router fitted"] = self.routed()
        if recipe.fits_layers:
            found |= {"experts solved": self.solved(), "the head fitted": self.head()}
        if recipe.refines:
            found["a layer refined"] = self.refined()
        return found

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer of a source."""
        prefix = "model.layers.0."
        shapes = expected_shapes(self.config)
        return {name: shape for name, shape in shapes.items() if name.startswith(prefix)}

    @cached_property
    def _layer(self) -> int:
        """Bytes of one layer of one source."""
        return 4 * sum(math.prod(shape) for shape in self._shapes.values())

    @cached_property
    def _experts(self) -> int:
        """Bytes of one layer's FFNs of all sources."""
        return 4 * self.num_sources * 3 * self._hidden * self._ffn

    @cached_property
    def _shared(self) -> int:
        """Bytes of one layer of the new model beside the FFN."""
        return self._times * (self._layer - self._experts // self.num_sources)

    @property
    def _times(self) -> int:
        """How many sources' heads the new model's attention has."""
        return self.num_sources if self.recipe.concatenates_heads else 1

    @cached_property
    def _largest(self) -> int:
        """Numbers in the largest matrix of attention, of the new model."""
        largest = max(math.prod(s) for name, s in self._shapes.items() if ".self_attn." in name)
        return self._times * largest

    @cached_property
    def _widths(self) -> tuple[int, int, int]:
        """(queries, keys, all that passes inside attention) of a token."""
        queries, keys = _widths(self.config)
        return queries, keys, 2 * queries + keys

    def tables(self) -> int:
        """Blocks of every source's table and the one before, one in float64, a fused one."""
        rows = min(TABLE_ROWS, int(self.config.vocab_size))
        return rows * self._hidden * (8 * self.num_sources + 24)

    def missing_tokens(self) -> int:
        """At most all rows of a table twice in float32, and what is compared at once; of a
        regression two tables in float64, as they are and centred, beside those in float32."""
        table = int(self.config.vocab_size) * self._hidden
        if self.recipe.backbone.missing_tokens == "pursuit":
            terms = TOKENS_AT_ONCE * terms_for(self._hidden) * self._hidden
            return 8 * table + 4 * (3 * SCORES_AT_ONCE + 2 * terms)
        return 40 * table

    def compared(self) -> int:
        """All sources' layers and statistics; what passes inside the anchor, the source before and
        the one at hand; neurons' deviations from their means and those in float64."""
        hidden, ffn = self._hidden, self._ffn
        inside = 3 * hidden + self._widths[2]
        neurons = 32 if self.recipe.aligns_neurons else 16
        activations = self._batch * (ffn * neurons + 4 * (3 * inside + 6 * hidden))
        return self.num_sources * self._layer + self._statistics + activations

    def matched(self) -> int:
        """All statistics, and what is made of one source's: correlations, products of heads."""
        correlations = 8 * self._ffn**2 if self.recipe.aligns_neurons else 0
        heads = 3 * 8 * self._widths[0] ** 2 if self.recipe.aligns_heads else 0
        return self._statistics + max(correlations, heads)

    def made(self) -> int:
        """All sources' layers, as they are and aligned; the fused attention, one matrix of it of
        all sources in float64; what waits to be written."""
        recipe, family = self.recipe, target_of(self.recipe).family(self.config)
        held = self.num_sources * self._layer
        if recipe.folds:
            held *= 2
        elif recipe.aligns_neurons:
            held += self._experts
        writing = 2 * self._hidden * self._ffn * 4
        if family.stacks_experts:
            # Two FFN matrices of all experts in one tensor, and that rounded.
            size = self.num_sources * 2 * self._hidden * self._ffn
            writing = size * (4 + BYTES[recipe.output.dtype])
        if recipe.has_shared_expert:
            held += self._experts // self.num_sources
        if stream_scale(family, self.config) != 1:
            held += self._experts // 3 + self.num_sources * self._largest * 4
        fusing = (self.num_sources + 1) * self._largest * 8
        return held + self._shared + max(fusing, writing) + WAITING_BYTES

    def routed(self) -> int:
        """The router's inputs, thrice, beside the layers; for a ridge router those of one source in
        float64, and the Gram matrix, with the ridge, and factored."""
        sequence, windows = self.recipe.calibration.sequence_length, self.recipe.windows_each
        chosen = windows_for_router(self.num_sources, sequence, windows)
        tokens = self.num_sources * len(chosen) * sequence
        inputs = 3 * tokens * self._hidden * 4
        if self.recipe.router.init == "ridge":
            inputs += (tokens // self.num_sources + 3 * self._hidden) * self._hidden * 8
        return self._while_fitted + inputs

    def solved(self) -> int:
        """The Gram matrix of an FFN's neurons, with the ridge, and factored; what it is solved
        for. The experts that are solved already."""
        hidden, ffn = self._hidden, self._ffn
        inputs = max(ffn, self._times * self._widths[0])  # of the neurons' regression, and of o's
        solving = 3 * 8 * (inputs + 1) ** 2 + 4 * 8 * inputs * hidden
        return self._while_fitted + self._experts + solving

    def refined(self) -> int:
        """The layer that is learned, its gradient and Adam's two moments, beside the layer that was
        solved; what the gradient of one step needs. With the first layer, token embeddings."""
        learned = 4 * (self._experts + self._shared)
        activations = self._activations(max(WINDOWS_TOKENS, self._sequence))
        return self._while_fitted + self._experts + learned + self._rows + activations

    @property
    def _rows(self) -> int:
        """Of the text's token embeddings those that are learned, their gradient and Adam's two
        moments, and where they began."""
        if not self.recipe.refines_embeddings:
            return 0
        return 5 * 4 * min(int(self.config.vocab_size), self._tokens) * self._hidden

    def _activations(self, tokens: int) -> int:
        """What the gradient of one step of a layer needs, of so many tokens at once."""
        numbers = numbers_for_gradient(self.config, self.recipe.router.top_k, self._times)
        return 4 * min(tokens, self._tokens) * numbers

    def head(self) -> int:
        """All sources' heads, the fused one, the solved one; a product of one source's, or a cast
        head and pieces of logits."""
        vocabulary = int(self.config.vocab_size)
        table = vocabulary * self._hidden * 4
        piece = min(LOGITS_AT_ONCE, self._tokens * vocabulary) * 4
        held = (self.num_sources + 2) * table
        if self.recipe.refines:
            held += self._head_learned(table, piece)
            return held + max(self._casts * table, table // 2 + 4 * piece)
        return held + max(table, table // 2 + 4 * piece)

    def _head_learned(self, table: int, piece: int) -> int:
        """While the head learns: itself, Adam's two moments, and pieces of logits. Of each layer
        that learns with it, as it was read, as it is learned, its gradient, Adam's two moments, and
        what a step's gradient needs of one source's text."""
        layers = min(self.recipe.layers_with_head, int(self.config.num_hidden_layers))
        windows = max(1, WINDOWS_TOKENS // (self._sequence * self.num_sources))
        activations = self._activations(windows * self._sequence)
        return 3 * (table + piece) + layers * (5 * (self._experts + self._shared) + activations)

    @property
    def _casts(self) -> int:
        """Tables at a step of the head: its gradient, and what two heads are cast to."""
        return 2 if _reduced(self.recipe, self.config) else 1

    @property
    def _sequence(self) -> int:
        return self.recipe.calibration.sequence_length

    @property
    def _batch(self) -> int:
        """Tokens that are run through a layer at once."""
        sequence = self._sequence
        return min(max(1, WINDOWS_TOKENS // sequence) * sequence, self._tokens)

    @property
    def _tokens(self) -> int:
        """Calibration text, of all sources."""
        recipe = self.recipe
        windows = recipe.windows_each * len(recipe.calibration_domains)
        return windows * recipe.calibration.sequence_length

    @cached_property
    def _statistics(self) -> int:
        """Of one layer of all sources against the anchor's, on both texts where there are two."""
        recipe, texts = self.recipe, 2 if self.recipe.fits else 1
        one = 0
        if recipe.aligns_neurons:
            one += 4 * self._ffn**2
        if recipe.aligns_residual:
            one += texts * 8 * self._hidden**2
        if recipe.aligns_heads:
            one += texts * 8 * self._widths[0] ** 2
        return (self.num_sources - 1) * one

    @property
    def _while_fitted(self) -> int:
        """All sources' layers, aligned, and the fused one."""
        return self.num_sources * self._layer + self._shared


# Of builds at 135 M, 0.5 B and 1.1 B parameters (docs/lab-log.md). Machines differ.
_START = 3.0
"""Seconds until the libraries and tokenizers are loaded."""
_A_LAYER = 0.15
"""Seconds to bring one layer to the disk."""
_A_WEIGHT = 4e-9
"""Seconds to hash, read, convert and write what is made of one weight of a source."""
_ALIGNING, _FITTING = 1.5, 2.5
"""How many times the time of its products a stage takes."""
_A_LOGIT = 0.7e-9
"""Seconds to pass over one logit in memory."""
_PASSES = 10 * 6 + len(TEMPERATURES)
"""Passes over the logits of the validation text: six for each of the ten looks at the head, and one
for each temperature."""


def build_seconds(recipe: Recipe, sources: Sequence[Source], config: PreTrainedConfig) -> float:
    """How long stage 1 takes on this machine, from the speed of one product of matrices. A
    refinement may end early, and is counted whole."""
    count, sequence = len(sources), recipe.calibration.sequence_length
    layers = config.num_hidden_layers
    num_weights = sum(source.num_parameters for source in sources)
    # Tables of embeddings and heads are not multiplied with until the head is fitted.
    tables = sum(1 if source.config.tie_word_embeddings else 2 for source in sources)
    table = config.vocab_size * config.hidden_size
    one_source = (num_weights - tables * table) / count
    every = len(recipe.calibration_domains) * recipe.windows_each * sequence
    judged = count * recipe.validation_windows * sequence
    fitted = count * max(1, recipe.windows_each - recipe.validation_windows) * sequence
    aligning = fitting = elsewhere = 0.0
    if recipe.aligns:
        aligning += 2.0 * every * one_source * count
    if recipe.aligns_neurons:
        pairs = (count - 1) * sum(recipe.aligns_neurons_in(layer) for layer in range(layers))
        aligning += 2.0 * every * config.intermediate_size**2 * pairs
        # The assignment: between 1 and 3 times what is measured (docs/bench.md).
        elsewhere += 1.1 * (config.intermediate_size / 10_000) ** 2 * pairs
    active = one_source * recipe.router.top_k  # an upper bound: attention counts once
    if recipe.concatenates_heads:
        experts = 3 * layers * config.hidden_size * config.intermediate_size
        active += (count - 1) * (one_source - experts)
    if recipe.fits:  # beside a fit of layers, the plain mean runs too
        fitting += 2.0 * every * (2 if recipe.fits_layers else 1) * active
    if recipe.fits_layers:
        # Each source on its own text, the Gram matrices, and forward and backward per epoch.
        fitting += 2.0 * every * 2 * one_source
        fitting += 2.0 * every * config.intermediate_size**2 * layers
        of_head = 8.0 if recipe.layers_with_head else 6.0
        again = 1 + min(recipe.layers_with_head, layers) / layers  # the last layers, with the head
        fitting += recipe.fit.epochs * fitted * (6.0 * active * again + of_head * table)
        elsewhere += judged * config.vocab_size * _PASSES * _A_LOGIT
    elsewhere += seconds_of_products(_of_pursuit(sources), 1.0, reduced=False)
    reduced = _reduced(recipe, config)
    copying = _START + _A_LAYER * layers + _A_WEIGHT * num_weights
    # The comparisons with the anchor are mostly no products; what is refined is mostly products.
    aligning = _ALIGNING * seconds_of_products(aligning, 0.7, reduced=reduced)
    fitting = _FITTING * seconds_of_products(fitting, 0.2, reduced=reduced)
    return float(copying + elsewhere + aligning + fitting)


def _of_pursuit(sources: Sequence[Source]) -> float:
    """Operations of the search for what missing tokens are made of: once for each tokenizer, and
    for embeddings and head where these are two tables of the anchor's."""
    searches = {
        (len(source.places.missing), len(source.places.shared), source.transplant.anchor.head_name)
        for source in sources
        if source.transplant is not None and source.transplant.method == "pursuit"
    }
    hidden = sources[0].config.hidden_size
    tables = ((missing * shared, 1 + (head != EMBEDDING)) for missing, shared, head in searches)
    operations = 2 * hidden * terms_for(hidden) * sum(pairs * count for pairs, count in tables)
    return float(operations)


def measure_speed(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Measure what `build_seconds` asks of this machine, once: while nothing else runs."""
    if recipe.aligns or recipe.fits or recipe.backbone.missing_tokens == "pursuit":
        matmul_speed(torch.float32)
        if _reduced(recipe, config):
            matmul_speed(torch.bfloat16)


def _reduced(recipe: Recipe, config: PreTrainedConfig) -> bool:
    # What is measured is the processor: it may be slow in a format that a GPU is fast in.
    is_processor = device().type == "cpu"
    return is_processor and is_reduced(recipe.calibration.precision, config.hidden_size, device())


def seconds_of_products(operations: float, rest: float, *, reduced: bool) -> float:
    """How long that many operations take; of the time in float32 the share `rest` goes into what is
    no faster in bfloat16 (both shares measured at 135 M parameters: docs/lab-log.md)."""
    if not operations:
        return 0.0
    in_float32 = operations / matmul_speed(torch.float32)
    if not reduced:
        return in_float32
    return rest * in_float32 + (1 - rest) * operations / matmul_speed(torch.bfloat16)


def matching_seconds(recipe: Recipe, sources: Sequence[Source], config: PreTrainedConfig) -> float:
    """How much of stage 1 it takes to match neurons: what it would be shorter by without."""
    align = recipe.align.model_copy(update={"neurons": "none"})
    without = recipe.model_copy(update={"align": align})
    return build_seconds(recipe, sources, config) - build_seconds(without, sources, config)


@cache
def matmul_speed(dtype: torch.dtype) -> float:
    """Floating-point operations per second of this machine's processor: the best of some products,
    so that what else runs for a moment does not count."""
    size = 1024
    matrix = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
