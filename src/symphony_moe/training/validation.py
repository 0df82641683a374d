"""Which of a training's weights are the result: those with the lowest loss on validation text
(`train.keep_best`).

The stock Trainer compares the losses and keeps the best state on disk (`metric_for_best_model`).
Here they are measured, a training that gains nothing is ended, and the best weights are put back.
The weights before training are among them: a fitted model can be better than what a high learning
rate leaves of it.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.stock import load_stock, negative_log_likelihood, tokens_at_once
from symphony_moe.text.windows import Pieces
from symphony_moe.training.resuming import reading, state_of_step

log = logging.getLogger(__name__)

VALIDATION_LOSS = "eval_loss"
"""What the mean over sources is called in the Trainer's history."""

_OF_SOURCE = "eval_loss/"


# The losses


@dataclass(frozen=True)
class ValidationPoint:
    """Losses on the validation text after a step (0: before the first), in nats per token."""

    step: int
    losses: Mapping[str, float]
    """By source."""

    @property
    def mean(self) -> float:
        """Over the sources."""
        return sum(self.losses.values()) / len(self.losses)

    def as_logged(self) -> dict[str, float]:
        """As it stands in the Trainer's history."""
        by_source = {f"{_OF_SOURCE}{name}": loss for name, loss in self.losses.items()}
        return {VALIDATION_LOSS: self.mean, **by_source}


def validation_curve(history: Iterable[Mapping[str, Any]]) -> list[ValidationPoint]:
    """What was measured so far, from the Trainer's history."""
    return [
        ValidationPoint(
            entry["step"],
            {
                key.removeprefix(_OF_SOURCE): loss
                for key, loss in entry.items()
                if key.startswith(_OF_SOURCE)
            },
        )
        for entry in history
        if VALIDATION_LOSS in entry
    ]


@torch.no_grad()
def losses_by_source(
    model: PreTrainedModel, text: Mapping[str, Pieces], processes: Accelerator
) -> dict[str, float]:
    """Source -> nats per token of its documents, each read on its own. Every process measures its
    share. The model is in evaluation mode afterwards."""
    model.eval()
    found = torch.zeros(len(text), 2, dtype=torch.float64)  # nats, predicted tokens
    for row, pieces in zip(found, text.values(), strict=True):
        batches = pieces.batches(tokens_at_once(model, pieces.sequence_length))
        own = islice(batches, processes.process_index, None, processes.num_processes)
        for tokens, positions in (tuple(part.to(model.device) for part in pair) for pair in own):
            output = model(input_ids=tokens, position_ids=positions, use_cache=False)
            each = negative_log_likelihood(output.logits, tokens, positions=positions)
            row += torch.tensor([float(each.double().sum()), len(each)], dtype=row.dtype)
    sums = processes.reduce(found.to(model.device), "sum").tolist()
    return {name: nats / tokens for name, (nats, tokens) in zip(text, sums, strict=True)}


# The end of a training that gains nothing


class StopsWithoutGain(TrainerCallback):
    """Ends a training at half of its steps, where no loss on the validation text has been below
    that before the first step. No state is saved then: a training that is resumed comes here
    again."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """End it, or let it go on."""
        assert metrics is not None and state.best_metric is not None  # of step 0
        gains = bool(state.best_global_step) or metrics[VALIDATION_LOSS] < state.best_metric
        if not gains and state.max_steps <= 2 * state.global_step < 2 * state.max_steps:
            control.should_training_stop, control.should_save = True, False


# The best weights


def restore_best(run: RunFolder, model: PreTrainedModel, state: TrainerState) -> None:
    """Give the model the weights with the lowest loss on the validation text, and say which they
    are. The last step's stay untouched where they are the best."""
    best = state.best_global_step or 0
    if best == state.global_step:
        return
    points = {point.step: point.mean for point in validation_curve(state.log_history)}
    before, after = points[0], [loss for step, loss in points.items() if step > 0]
    if best:
        log.info(
            "the weights of step %d are kept: loss on validation text %.3f, %.3f after the last "
            "step",
            best,
            points[best],
            after[-1],
        )
    else:
        log.warning(
            "training gained nothing: loss on validation text %.3f before, %.3f at best after "
            "(%d of %d steps). The weights before training are kept. Lower train.learning_rate, "
            "or set train.scope: router",
            before,
            min(after),
            state.global_step,
            state.max_steps,
        )
    folder = state_of_step(run.training, best) if best else run.checkpoint
    with reading(folder) if best else nullcontext():
        kept = load_stock(folder, on=torch.device("cpu"))
    model.load_state_dict(kept.state_dict())


def describe_validation(
    tokens: int, state: TrainerState, *, averages: bool = False
) -> dict[str, Any]:
    """For `metrics.json`: the losses on validation text of so many `tokens`, and the step whose
    weights are the result; with `averages`, are averaged with those before training: the last
    step's, where no step was better than those."""
    return {
        "tokens": tokens,
        "planned_steps": state.max_steps,
        "chosen_step": state.best_global_step or (state.global_step if averages else 0),
        "curve": [
            {"step": point.step, "loss": point.mean, "losses": dict(point.losses)}
            for point in validation_curve(state.log_history)
        ],
    }
