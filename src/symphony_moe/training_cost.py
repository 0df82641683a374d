"""Memory and time that a training will take, from the shapes alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from symphony_moe.building.estimate import (
    in_mb,
    numbers_for_gradient,
    process_bytes,
    say_lighter,
    seconds_of_products,
)
from symphony_moe.building.plan import Plan
from symphony_moe.model.families import EMBEDDING, HEAD
from symphony_moe.model.scopes import learns
from symphony_moe.recipe.settings import Recipe, Train
from symphony_moe.sources.opening import target_of
from symphony_moe.sources.source import Source, anchor_of, new_config
from symphony_moe.training.distillation import are_loaded_together
from symphony_moe.training.refusals import is_fsdp

# Of trainings at 1 M, 135 M, 0.5 B and 1.1 B parameters (docs/bench.md). Machines differ.
_TRAINER = 130_000_000
"""Bytes of the libraries that a training loads beside those of this process."""
_START = 1.0
"""Seconds until the first step, beside reading the text."""
_PRODUCTS = 1.5
"""How many times the time of its products a step takes."""
_A_LAYER = 5e-5
"""Seconds of a token in a layer, beside products: what tiny models take."""
_A_WEIGHT = 4e-9
"""Seconds in which the optimizer changes a weight."""
_LOGITS = 3
"""Copies of a batch's logits in float32: themselves, and what the loss and its gradient need."""

_LIGHTER: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "batch_size": 1},
    {"scope": "router", "gradient_checkpointing": True, "batch_size": 1},
    {"scope": "router", "gradient_checkpointing": True, "batch_size": 1, "average": False},
)
"""Settings of a training that need less memory, those that change least first."""


@dataclass(frozen=True)
class TrainingCost:
    """What stage 2 takes, in one process on the processor or on one GPU."""

    recipe: Recipe
    sources: Sequence[Source]
    tensors: Mapping[str, tuple[int, ...]]
    """Of the model that is trained (`Plan.tensors`)."""
    active: int
    """Parameters that a token passes through."""

    @classmethod
    def of(cls, plan: Plan, recipe: Recipe, sources: Sequence[Source]) -> "TrainingCost":
        """Of a planned model."""
        return cls(recipe, sources, plan.tensors, plan.active_parameters)

    @property
    def _train(self) -> Train:
        return self.recipe.train

    @cached_property
    def _config(self) -> PreTrainedConfig:
        return new_config(self.recipe, self.sources)

    @cached_property
    def _parameters(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.tensors.items()}

    @cached_property
    def _learned(self) -> int:
        """Parameters that are trained."""
        anchor, scope = anchor_of(self.recipe, self.sources), self._train.scope
        family = target_of(self.recipe).family(anchor.config)
        return sum(n for name, n in self._parameters.items() if learns(name, scope, family))

    @property
    def peak_bytes(self) -> int:
        """At the larger of two moments. At a step: weights, AdamW's two moments of those that
        learn, what the gradient needs and teachers; beside them logits, and later the gradients,
        all in float32. While weights are averaged: the model thrice."""
        weights = 4 * sum(self._parameters.values())
        after_loss = max(_LOGITS * self._logits, 4 * self._learned)
        step = weights + 8 * self._learned + self._for_gradient + self._of_teachers + after_loss
        averaging = 3 * weights + self._logits if self._train.average else 0
        return process_bytes() + _TRAINER + max(step, averaging)

    @property
    def seconds(self) -> float | None:
        """From the processor's speed at one product of matrices. None where a GPU trains."""
        if torch.cuda.is_available():
            return None
        settings = self._train
        passed = settings.tokens * self._config.num_hidden_layers
        steps = settings.tokens / (settings.batch_size * settings.sequence_length)
        steps /= settings.gradient_accumulation
        reduced = settings.precision == "bfloat16"
        products = seconds_of_products(self._operations * settings.tokens, 0.2, reduced=reduced)
        changed = steps * self._learned * _A_WEIGHT
        return float(_START + _PRODUCTS * products + _A_LAYER * passed + changed)

    @property
    def _operations(self) -> float:
        """Of a token: two for each weight on the way forward, and two on the way back to the first
        layer; for each weight that learns two more, which count as three, as their products are
        smaller; and those that teachers and checkpointing take."""
        tied = HEAD not in self.tensors
        multiplied = self.active - (0 if tied else self._parameters[EMBEDDING])
        share = self._learned / sum(self._parameters.values())
        times = 4 + 3 * share + (2 if self._train.gradient_checkpointing else 0)
        teacher = 0.0
        if self.recipe.distills:
            teacher = 2 * sum(source.num_parameters for source in self.sources) / len(self.sources)
        return times * multiplied + teacher

    @property
    def _for_gradient(self) -> int:
        """Bytes of what the gradient of a batch needs in all layers; with checkpointing in one, and
        every layer's input."""
        layers = self._config.num_hidden_layers
        numbers = numbers_for_gradient(self._config, self.recipe.router.top_k)
        if self._train.gradient_checkpointing:
            return int(4 * self._batch * (numbers + layers * self._config.hidden_size))
        return int(4 * self._batch * layers * numbers)

    @property
    def _batch(self) -> int:
        """Tokens in a batch."""
        return self._train.batch_size * self._train.sequence_length

    @property
    def _logits(self) -> int:
        return 4 * self._batch * int(self._config.vocab_size)

    @property
    def _of_teachers(self) -> int:
        """Their weights, where they are all in memory, and what is compared with their logits."""
        if not self.recipe.distills:
            return 0
        loading = self._train.teacher_loading
        together = are_loaded_together(loading, self.sources, self._learned)
        weights = [4 * source.num_parameters for source in self.sources]
        return (sum(weights) if together else max(weights)) + 5 * self._logits

    def beyond_memory(self) -> str:
        """That a training needs more memory than the machine has (the GPU, where there is one), and
        what needs less; empty where it does not, and where a launcher shards the model."""
        limit, whose = _memory()
        if is_fsdp() or self.peak_bytes <= limit:
            return ""

        def measure(settings: Mapping[str, Any]) -> int:
            train = self._train.model_copy(update=settings)
            return replace(self, recipe=self.recipe.model_copy(update={"train": train})).peak_bytes

        return (
            f"training takes about {in_mb(self.peak_bytes)} at its peak; {whose} {in_mb(limit)}. "
            f"{say_lighter('train', _LIGHTER, (self.peak_bytes, limit), measure)}"
            "Several GPUs can share a model (docs/how-to/gpus.md)"
        )


def _memory() -> tuple[int, str]:
    """Bytes, and whose they are."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1], "the GPU has"
    return psutil.virtual_memory().total, "this machine has"
