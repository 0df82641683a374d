"""What no training could do on this machine, known before anything else is done.

No Trainer is imported here: a build asks, and trains nothing.
"""

import os

import transformers
from packaging.version import Version

from symphony_moe.errors import RecipeError, TextError
from symphony_moe.recipe.settings import Recipe, Train
from symphony_moe.text.texts import windows_per_source

STACKED_TRAIN = Version("5.18")
"""The first version whose stock JetMoE and GraniteMoe have a load-balance loss in training."""


def refuse_untrainable(recipe: Recipe, architecture: str | None = None) -> None:
    """SymphonyError for what `train_run` could not do on this machine, before anything else is
    done: text that fills no step of one process, loggers that are not there, and an architecture
    that this version of transformers does not train. `architecture`: the result's, once it is
    known; without it, as far as the recipe says it."""
    settings, sources = recipe.train, len(recipe.sources)
    windows = windows_per_source(recipe, sources) * sources
    refuse_short(windows, settings.batch_size * settings.gradient_accumulation, settings)
    _refuse_loggers(settings)
    _refuse_shards(settings)
    named = "jetmoe" if recipe.has_attention_experts else recipe.output.architecture
    _refuse_architecture(architecture or named)


def is_fsdp() -> bool:
    """Whether the launcher's configuration has FSDP shard the model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _refuse_shards(settings: Train) -> None:
    """RecipeError for settings that put weights back into a model, where no process has the whole
    one."""
    for setting in ("keep_best", "average"):
        if getattr(settings, setting) and is_fsdp():
            raise RecipeError(
                f"train.{setting}: the launcher's configuration shards the model (FSDP), and "
                f"weights can only be put back into a whole one. Set train.{setting}: false, or "
                "train without FSDP"
            )


def _refuse_loggers(settings: Train) -> None:
    """RecipeError for a logger that is unknown, or whose package is not installed."""
    if settings.report_to == "none":
        return
    # The names of the Trainer's loggers come with all that they need.
    from transformers.integrations import integration_utils as integrations

    asked = settings.report_to if isinstance(settings.report_to, list) else [settings.report_to]
    for name in asked:
        if name in ("none", "all") or name in integrations.get_available_reporting_integrations():
            continue
        if name in integrations.INTEGRATION_TO_CALLBACK:
            raise RecipeError(f"train.report_to: the package of {name!r} is not installed")
        known = ", ".join(sorted(integrations.INTEGRATION_TO_CALLBACK))
        raise RecipeError(f"train.report_to: {name!r} is none of {known}")


def _refuse_architecture(target: str) -> None:
    """RecipeError for an architecture that this version of transformers does not train."""
    too_old = Version(transformers.__version__) < STACKED_TRAIN
    if target in ("jetmoe", "granitemoe") and too_old:
        raise RecipeError(
            f"output.architecture: the {target} of transformers {transformers.__version__} "
            f"has no load-balance loss in training; {STACKED_TRAIN} has: "
            "pip install -U transformers"
        )


def refuse_short(windows: int, per_step: int, settings: Train) -> None:
    """TextError for text (in windows) that does not fill one step of `per_step` windows."""
    if windows < per_step:
        raise TextError(
            f"training text: {windows} windows of {settings.sequence_length} tokens do not fill "
            f"one step of {per_step} (train.batch_size x train.gradient_accumulation x processes); "
            "raise train.tokens, or lower one of those"
        )
