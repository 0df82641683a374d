"""The temperature that a trained model's logits are divided by (`train.temperature_scaling`)."""

import logging
from typing import Any

from transformers import default_data_collator

from symphony_moe.model.temperature import (
    TRAINED_TOKENS,
    largest_temperature,
    losses_by_temperature,
)
from symphony_moe.training.trainer import MoETrainer

log = logging.getLogger(__name__)


def scale_temperature(trainer: MoETrainer) -> dict[str, Any] | None:
    """What the final norm is to be divided by (`temperature`), and the language-model loss (nats
    per token) without and with it on the text that was trained on last (`loss`, of `tokens`
    tokens); None where the recipe does not ask for it.

    Every process measures its share of that text, so all of them call this.
    """
    settings = trainer.settings
    if not settings.temperature_scaling:
        return None
    windows = _last_windows(trainer)
    size = trainer.args.train_batch_size
    batches = [default_data_collator(windows[n : n + size]) for n in range(0, len(windows), size)]
    for batch in batches:
        del batch["window"]
    losses = losses_by_temperature(
        trainer.model_wrapped, batches, lambda x: trainer.accelerator.reduce(x, "sum")
    )
    temperature, scaled = largest_temperature(losses, settings.temperature_scaling)
    log.info("temperature scaling: %.2f, loss %.3f to %.3f", temperature, losses[0], scaled)
    return {
        "temperature": round(temperature, 6),
        "loss": [round(losses[0], 6), round(scaled, 6)],
        "tokens": len(windows) * trainer.args.world_size * settings.sequence_length,
    }


def _last_windows(trainer: MoETrainer) -> list[Any]:
    """This process's share of the windows that were trained on last; every process has as many."""
    world, rank = trainer.args.world_size, trainer.args.process_index
    windows: Any = trainer.train_dataset
    end = len(windows)
    wanted = TRAINED_TOKENS // trainer.settings.sequence_length
    last = max(world, min(end, wanted) // world * world)
    return [windows[n] for n in range(end - last + rank, end, world)]
