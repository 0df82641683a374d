"""Weight averaging (`train.average`): the result lies between the model before training and the
trained one, where the loss on validation text is lowest.

A fine-tuned model and the one that it was made of can be averaged, and the mean often is better
than both, most of all on text of other kinds (WiSE-FT, Wortsman et al., arXiv 2109.01903).
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.stock import load_stock
from symphony_moe.training.trainer import MoETrainer, refuse_not_finite
from symphony_moe.training.validation import losses_by_source

log = logging.getLogger(__name__)

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the trained weights that are tried; the rest is of those before training."""


@dataclass(frozen=True)
class _Measured:
    """A mean of weights, and its losses on the validation text by source, in nats per token."""

    share: float
    losses: Mapping[str, float]

    @property
    def loss(self) -> float:
        return sum(self.losses.values()) / len(self.losses)

    def to_json(self) -> dict[str, Any]:
        return {"share": self.share, "loss": self.loss, "losses": dict(self.losses)}


@torch.no_grad()
def average_weights(run: RunFolder, model: PreTrainedModel, trainer: MoETrainer) -> dict[str, Any]:
    """Give the model the best mean of its weights and those before training; what was measured, for
    `metrics.json`. The training cannot go on after this. Every process measures its share of the
    text, so all of them call this.

    Raises RunFolderError where a weight is NaN or infinite.
    """
    _free(model, trainer)
    weights = model.state_dict()
    refuse_not_finite(weights, trainer.state.global_step)
    trained = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
    before = load_stock(run.checkpoint, on=torch.device("cpu")).state_dict()
    text: Any = trainer.eval_dataset
    measured = []
    for share in SHARES:
        _put(weights, before, trained, share)
        losses = losses_by_source(model, text, trainer.accelerator)
        measured.append(_Measured(share, losses))
    best = min(measured, key=lambda each: (math.isnan(each.loss), each.loss))
    _put(weights, before, trained, best.share)
    _tell(measured, best, trainer.settings.scope)
    return {
        "tokens": sum(len(pieces.tokens) for pieces in text.values()),
        "share": best.share,
        "curve": [each.to_json() for each in measured],
    }


def _free(model: PreTrainedModel, trainer: MoETrainer) -> None:
    """Give up the gradients and the optimizer's moments: no step comes any more."""
    model.zero_grad(set_to_none=True)
    if trainer.optimizer is not None:
        trainer.optimizer.state.clear()


def _put(
    weights: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    share: float,
) -> None:
    """Write a mean into the model's `weights`. With shares 0 and 1 it is the one or the other to
    the bit."""
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(before[name].to(trained[name]), trained[name], share))


def _tell(measured: Sequence[_Measured], best: _Measured, scope: str) -> None:
    start, end = measured[0].loss, measured[-1].loss
    if best.share == 0:
        log.warning(
            "train.average: training gained nothing: loss on validation text %.3f before, %.3f "
            "after, and no mean of these two models loses less. The weights before training are "
            "kept. Lower train.learning_rate%s",
            start,
            end,
            "" if scope == "router" else ", or set train.scope: router",
        )
    else:
        log.info(
            "weights averaged, %.0f %% of the trained model: loss on validation text %.3f (%.3f "
            "before training, %.3f after)",
            100 * best.share,
            best.loss,
            start,
            end,
        )
