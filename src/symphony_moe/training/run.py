"""Stage 2: train the router, router and experts, or everything, with the stock model's load-balance
loss.

Sec. 3.3: language-model loss plus 0.01 times the Switch load-balancing loss, AdamW, cosine decay,
gradient norm 1.0. The loop is `transformers.Trainer`; the text is the sources' own, in equal
shares, held-out documents left out.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from symphony_moe.errors import RunFolderError, first_line
from symphony_moe.machine import is_out_of_memory, is_out_of_room
from symphony_moe.model.families import FINAL_NORM
from symphony_moe.progress import Listener, ignore
from symphony_moe.recipe.settings import Recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.source import Source, anchor_of
from symphony_moe.text.memory_maps import TrainingText
from symphony_moe.text.texts import Texts
from symphony_moe.training.averaging import average_weights
from symphony_moe.training.job import Measure, TrainingJob
from symphony_moe.training.publishing import describe_training, publish_trained, refuse_lost
from symphony_moe.training.refusals import refuse_untrainable
from symphony_moe.training.resuming import (
    begin,
    is_trained_already,
    note,
    refuse_incomplete,
    seconds_until,
    state_to_resume,
)
from symphony_moe.training.temperature_scaling import scale_temperature
from symphony_moe.training.trained_model import load_model, set_balance_weight
from symphony_moe.training.trainer import (
    MoETrainer,
    make_trainer,
    refuse_not_finite,
)
from symphony_moe.training.validation import restore_best

log = logging.getLogger(__name__)


def train_run(  # noqa: PLR0913 (all but three are keywords)
    run: RunFolder,
    recipe: Recipe,
    sources: Sequence[Source],
    *,
    resume: bool,
    overwrite: bool,
    measure: Measure | None = None,
    texts: Texts | None = None,
    progress: Listener = ignore,
) -> None:
    """Train `checkpoint/` into `trained/`, which appears when it is whole. Under `accelerate
    launch` or `torchrun`, every process calls this, and the first writes; the others return before
    it has.

    `measure`: model -> losses on held-out text, for `train.evaluations`. `texts`: what the command
    has read already. `progress`: hears of every optimizer step, in the first process.

    Raises RunFolderError where there is no checkpoint, where `trained/` exists (unless `overwrite`,
    or `resume` and it is what would be made) or a training was cut short (unless `resume` or
    `overwrite`), where memory does not suffice, and where the loss becomes NaN or infinite.
    """
    # 1. What cannot be trained is refused, before anything is written.
    run.require_checkpoint()
    refuse_lost(run)
    refuse_untrainable(recipe, anchor_of(recipe, sources).family.moe)
    # 2. A finished training is left as it is. One that was cut short has a state to go on from.
    if is_trained_already(run, recipe.train, resume=resume, overwrite=overwrite):
        return
    saved = state_to_resume(run, resume=resume, overwrite=overwrite)
    # 3. The training's folder is made, or compared with what is asked for now.
    processes = PartialState(cpu=not torch.cuda.is_available())
    begin(run, recipe, processes, resume=resume)
    # 4. The text is drawn. The clock goes on from where the interrupted training was saved.
    texts = Texts.of(recipe, sources, texts)
    validation = texts.training_validation() if recipe.train.is_validated else None
    text = texts.training_text(run.work / "text")
    began = time.monotonic() - seconds_until(saved)
    # 5. The model is loaded, with the weights to go on from, and put into a Trainer.
    job = TrainingJob(run, recipe, sources, measure, progress)
    with _explained(run):
        model = load_model(job, saved)
        trainer = make_trainer(job, model, text, began, validation)
    with _explained(run, trainer):
        batches = recipe.train.gradient_accumulation * trainer.args.world_size
        set_balance_weight(model, recipe.train.balance_weight, batches)
        # 6. The text is noted, or compared with what the interrupted training was begun with.
        digest = _note_text(run, text, trainer) if processes.is_main_process else ""
        if saved is not None:
            refuse_incomplete(saved, processes)
        # 7. Training.
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
        averages = recipe.train.average
        # The model before training is part of an average anyway.
        if recipe.train.keep_best and (trainer.state.best_global_step or not averages):
            restore_best(run, model, trainer.state)
        averaging = _averaged(run, model, trainer) if averages else None
        # 8. The trained model is gathered and published.
        _finish(job, model, trainer, {"text": digest, "averaging": averaging})


def _averaged(run: RunFolder, model: PreTrainedModel, trainer: MoETrainer) -> dict[str, Any]:
    try:
        return average_weights(run, model, trainer)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunFolderError(
            "train.average: no memory for two copies of the weights after the last step. All steps "
            "are saved: with more memory, or fewer processes on a machine, --resume goes on from "
            "there. The checkpoint is as it was"
        ) from None


def _finish(
    job: TrainingJob, model: PreTrainedModel, trainer: MoETrainer, found: Mapping[str, Any]
) -> None:
    """Gather the weights and measure the temperature, which takes all processes; the first then
    writes `trained/`. The others do not wait for it: where the weights are large, writing them
    takes longer than a collective operation may. `found`: see `describe_training`."""
    is_first = trainer.is_world_process_zero()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_first:
        refuse_not_finite(weights, trainer.state.global_step)
    scaling = scale_temperature(trainer)
    if is_first:
        if scaling:
            weights[FINAL_NORM] = weights[FINAL_NORM] / scaling["temperature"]
        training = describe_training(trainer, {**found, "temperature_scaling": scaling})
        publish_trained(job.run, job.recipe, model, weights, training)


def _note_text(run: RunFolder, text: TrainingText, trainer: MoETrainer) -> str:
    """The text's digest, noted with what else a training must not change on its way. Raises
    RunFolderError where the training that is resumed was begun with something else."""
    facts = {
        "text": text.digest(),
        "tokens per step": trainer.tokens_per_step,
        # What one kind of launch has saved, another does not find.
        "launch": trainer.accelerator.distributed_type.value,
    }
    note(run.training / "text.json", facts, {"launch": facts["launch"]})
    return str(facts["text"])


@contextmanager
def _explained(run: RunFolder, trainer: MoETrainer | None = None) -> Iterator[None]:
    """RunFolderError where the machine runs out of something inside the block."""
    try:
        yield
    except Exception as error:
        step = None if trainer is None else trainer.state.global_step
        if is_out_of_memory(error):
            raise _out_of_memory(step) from None
        if is_out_of_room(error):
            raise _out_of_room(run, step, error) from None
        raise


def _out_of_memory(step: int | None) -> RunFolderError:
    next_step = "before the first step" if step is None else f"at step {step + 1}"
    return RunFolderError(
        f"training ran out of memory {next_step}: lower train.batch_size (and raise "
        "train.gradient_accumulation), or set train.gradient_checkpointing: true. If there are "
        "teachers, train.teacher_loading: in-turn needs less. The checkpoint is as it was; "
        "--overwrite begins the training again"
    )


def _out_of_room(run: RunFolder, step: int | None, error: Exception) -> RunFolderError:
    free = shutil.disk_usage(run.root).free / 1e6
    return RunFolderError(
        f"{run.root}: no room for what the training writes at step {step or 0} ({free:,.1f} MB "
        f"are free; {first_line(error)}). Make room and --resume: it "
        "goes on from what was saved last. The checkpoint is untouched"
    )
