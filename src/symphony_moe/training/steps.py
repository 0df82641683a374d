"""Tells a listener how far a training has come."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_moe.progress import Listener, Progress


class TellSteps(TrainerCallback):
    """Calls a listener after every training step."""

    def __init__(self, progress: Listener) -> None:
        self.progress = progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress(Progress("train", state.global_step, state.max_steps))
