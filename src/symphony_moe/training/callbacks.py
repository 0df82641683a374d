"""What happens between two steps of a training: its progress is told, a loss of NaN ends it, and
held-out text is measured."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_moe.errors import RunFolderError
from symphony_moe.progress import Listener, Progress, of_step
from symphony_moe.training.job import Measure

log = logging.getLogger(__name__)


class TrainingProgress(TrainerCallback):
    """Says where the training is and when it will end. Raises RunFolderError where the loss is NaN
    or infinite."""

    def __init__(self, tokens_per_step: int, listener: Listener) -> None:
        """`listener`: hears of every optimizer step, in the first process."""
        self.tokens_per_step, self.listener = tokens_per_step, listener
        self.loss = ""

    def _step(self, state: TrainerState) -> Progress:
        return Progress(
            "train", state.global_step, state.max_steps, self.tokens_per_step, self.loss
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the listener."""
        if args.process_index == 0:
            self.listener(self._step(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Log the loss (nats per token)."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise RunFolderError(
                f"training diverged at step {state.global_step}: the loss is {loss}. Lower "
                "train.learning_rate; the checkpoint is untouched"
            )
        self.loss = f"loss {loss:.3f}"
        step = self._step(state)
        log.info("step %d of %d, %s", step.done, step.total, self.loss, extra=of_step(step))


class HeldOutLosses(TrainerCallback):
    """Losses on held-out text at some steps, into the Trainer's history (`held_out`)."""

    def __init__(self, measure: Measure, times: int, *, at_end: bool) -> None:
        """`times`: into how many equal parts they divide the training. `at_end`: after the last
        part too (else that is the trained model's own evaluation)."""
        self.measure, self.times, self.at_end = measure, times, at_end

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Measure, where a part of the training ends with this step."""
        before, now = (
            step * self.times // state.max_steps
            for step in (state.global_step - 1, state.global_step)
        )
        ended = state.global_step == state.max_steps
        if before == now or (ended and not self.at_end):
            return
        model.eval()
        losses = self.measure(model)
        model.train()
        history: list[Any] = state.log_history
        history.append({"step": state.global_step, "held_out": losses})
