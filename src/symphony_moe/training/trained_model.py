"""The stock model that is trained: its weights, what of it learns, its load-balance loss."""

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel

from symphony_moe.model.families import Family
from symphony_moe.model.scopes import learns
from symphony_moe.sources.stock import balance_weight_name, load_stock
from symphony_moe.training.job import TrainingJob
from symphony_moe.training.refusals import is_fsdp
from symphony_moe.training.resuming import is_sharded, reading

log = logging.getLogger(__name__)


def load_model(job: TrainingJob, saved: Path | None) -> PreTrainedModel:
    """The run's `checkpoint/` in stock transformers, with what `train.scope` leaves out frozen.

    `saved`: the state that the training goes on from, whose weights are loaded instead (but for
    shards, which FSDP reads itself). Raises RunFolderError where they cannot be read,
    VerificationError where the checkpoint cannot be.
    """
    checkpoint = job.run.checkpoint
    folder = checkpoint if saved is None or is_sharded(saved) else saved
    with nullcontext() if folder == checkpoint else reading(folder):
        model = load_stock(folder, on=_first_device())
    num_trained = choose_parameters(model, job.settings.scope, job.family)
    log.info("training %s: %s parameters", job.settings.scope, f"{num_trained:,}")
    # For the load-balance loss, and to report the load balance.
    model.config.output_router_logits = True
    return model


def _first_device() -> torch.device | None:
    """Where the weights are loaded to; None: to the GPU, where there is one. FSDP takes them from
    the CPU, layer by layer: whole, they may not fit on a GPU."""
    return torch.device("cpu") if is_fsdp() else None


def choose_parameters(model: PreTrainedModel, scope: str, family: Family) -> int:
    """Freeze what the scope leaves out (`scopes.learns`); the number of parameters that learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name, scope, family))
    return count_trained(model)


def count_trained(model: PreTrainedModel) -> int:
    """The number of parameters that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def set_balance_weight(model: PreTrainedModel, weight: float, batches: int) -> None:
    """Give the stock model the weight of its load-balance loss, for steps of `batches` batches.

    The Trainer divides the language-model loss by the tokens of all of a step's batches and adds
    the batches up; the load-balance loss comes with each batch, and is divided here.
    """
    setattr(model, balance_weight_name(model), weight / batches)
