"""`transformers.Trainer` for an MoE: its windows, its settings, its loss with teachers."""

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from symphony_moe.errors import RunFolderError
from symphony_moe.recipe.settings import Recipe, Train
from symphony_moe.sources.stock import balance_weight_name, ffn_routers
from symphony_moe.text.memory_maps import TrainingText
from symphony_moe.text.windows import Packed, Pieces
from symphony_moe.training.callbacks import HeldOutLosses, TrainingProgress
from symphony_moe.training.distillation import Teachers, are_loaded_together, divergence
from symphony_moe.training.job import TrainingJob
from symphony_moe.training.refusals import refuse_short
from symphony_moe.training.resuming import is_sharded, reading
from symphony_moe.training.trained_model import count_trained
from symphony_moe.training.validation import (
    VALIDATION_LOSS,
    StopsWithoutGain,
    ValidationPoint,
    losses_by_source,
    validation_curve,
)

log = logging.getLogger(__name__)


# From a recipe to a Trainer


def make_trainer(
    job: TrainingJob,
    model: PreTrainedModel,
    text: TrainingText,
    began: float,
    validation: Mapping[str, Pieces] | None = None,
) -> "MoETrainer":
    """The Trainer of a job, with teachers and callbacks. `began`: see `MoETrainer`. `validation`:
    source -> text for `train.keep_best` and `train.average`.

    Raises TextError where the text does not fill one step of all processes.
    """
    schedule = _schedule(job.settings, len(text))
    arguments = _arguments(job, schedule)
    _use_one_gpu(arguments)
    teachers = None
    if job.recipe.distills:
        teachers = _teachers(job, text, count_trained(model))
    trainer = MoETrainer(
        recipe=job.recipe,
        teachers=teachers,
        began=began,
        model=model,
        args=arguments,
        # Whole steps only: of windows that are left over the Trainer would make one step more when
        # it resumes at the end.
        train_dataset=Windows(
            text,
            schedule.steps * schedule.windows_per_step,
            by_documents=_by_documents(job.settings),
        ),
        eval_dataset=validation,
        data_collator=default_data_collator,
        callbacks=[
            TrainingProgress(schedule.windows_per_step * job.settings.sequence_length, job.progress)
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if job.settings.keep_best and not job.settings.average:
        trainer.add_callback(StopsWithoutGain())
    if job.measure is not None and job.settings.evaluations:
        # The last step's model may be the trained one: then `evaluate` does it.
        at_end = job.settings.temperature_scaling > 0 or job.settings.is_validated
        trainer.add_callback(HeldOutLosses(job.measure, job.settings.evaluations, at_end=at_end))
    return trainer


@dataclass(frozen=True)
class _Schedule:
    """How the text is divided into optimizer steps, and when something is done between them."""

    steps: int
    windows_per_step: int
    """Of all processes."""
    logging_steps: int
    saving_steps: int


def _schedule(settings: Train, num_windows: int) -> _Schedule:
    processes = PartialState().num_processes
    per_step = settings.batch_size * settings.gradient_accumulation * processes
    refuse_short(num_windows, per_step, settings)
    steps = num_windows // per_step
    logging_steps = max(1, steps // 50)
    # Between two logs the means that the next one tells are not saved.
    logs_per_save = math.ceil(math.ceil(steps / settings.checkpoints) / logging_steps)
    return _Schedule(steps, per_step, logging_steps, logs_per_save * logging_steps)


def _arguments(job: TrainingJob, schedule: _Schedule) -> TrainingArguments:
    """The Trainer's settings; sets the precision of the whole process."""
    settings = job.settings
    in_bfloat16 = _is_in_bfloat16(settings)
    _overrule_launchers_precision(in_bfloat16=in_bfloat16)
    return TrainingArguments(
        output_dir=str(job.run.training),
        max_steps=schedule.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * schedule.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        bf16=in_bfloat16,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=schedule.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=schedule.saving_steps,
        save_total_limit=2,
        seed=job.recipe.seed,
        report_to=settings.report_to,
        remove_unused_columns=False,
        disable_tqdm=True,
        **_activation_checkpointing(settings),
        **_validation(settings, schedule),
    )


def _validation(settings: Train, schedule: _Schedule) -> dict[str, Any]:
    """The Trainer's settings for `train.keep_best`: validation before the first step and with each
    state that is saved. The Trainer remembers the best, and keeps the last state and that one."""
    if not settings.keep_best:
        return {}
    return {
        "eval_strategy": "steps",
        "eval_steps": schedule.saving_steps,
        "eval_on_start": True,
        "metric_for_best_model": VALIDATION_LOSS,
        "greater_is_better": False,
    }


def _is_in_bfloat16(settings: Train) -> bool:
    """Whether the forward pass computes in bfloat16."""
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return {"auto": has_bfloat16, "float32": False, "bfloat16": True}[settings.precision]


def _overrule_launchers_precision(*, in_bfloat16: bool) -> None:
    """Set the environment variable that `accelerate launch` passes its own configuration in:
    accelerate reads it before the Trainer's settings, and it would win over the recipe."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if in_bfloat16 else "no"


def _activation_checkpointing(settings: Train) -> dict[str, Any]:
    """The Trainer's setting, under the name that this version of transformers has for it: older
    ones know `gradient_checkpointing` alone."""
    name = "activation_checkpointing"
    name = name if hasattr(TrainingArguments, name) else "gradient_checkpointing"
    return {name: settings.gradient_checkpointing}


def _use_one_gpu(arguments: TrainingArguments) -> None:
    """Have one process train on one GPU. Where it sees several, the Trainer would split batches
    over all of them (DataParallel), which makes steps larger than the recipe says. There is no
    setting against that, so the number that it has counted is changed."""
    if arguments.n_gpu > 1:
        log.info(
            "training on one of %d GPUs; for all: torchrun --nproc-per-node %d -m symphony_moe "
            "train RUN",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        arguments._n_gpu = 1


def _by_documents(settings: Train) -> bool:
    return settings.packing == "documents"


def _teachers(job: TrainingJob, text: TrainingText, num_trained: int) -> Teachers:
    """The sources, for distillation into a model of which `num_trained` parameters learn."""
    settings, processes = job.settings, PartialState()
    together = are_loaded_together(settings.teacher_loading, job.sources, num_trained)
    log.info("teachers: %s", "all in memory" if together else "one after the other")
    return Teachers(
        job.sources,
        text,
        job.run.training,
        by_documents=_by_documents(settings),
        together=together,
        share=(settings.batch_size, processes.process_index, processes.num_processes),
    )


class Windows(torch.utils.data.Dataset[dict[str, Any]]):
    """Packed windows as the Trainer wants them; labels are the tokens (the model shifts them), but
    for the first of a document, which nothing before it foretells.

    `by_documents`: with the place of each token in its document, from which the stock models see
    where one ends: attention stays within a document.
    """

    def __init__(self, text: TrainingText, count: int, *, by_documents: bool) -> None:
        """`count`: how many of the text's windows there are, from the first on."""
        self.text, self.count, self.by_documents = text, count, by_documents

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids`, `labels` (-100: not asked for) and `position_ids`, each of a window's
        length, and the window's number (`window`)."""
        text = Packed(self.text.tokens([index]), self.text.positions([index]))
        item = {"input_ids": text.windows[0], "labels": text.labels[0], "window": index}
        return item | {"position_ids": text.positions[0]} if self.by_documents else item


# The Trainer


class MoETrainer(Trainer):
    """The stock Trainer, given a model that holds the weights to go on from, and teachers. It notes
    the load balance, and reads no code from a saved state."""

    def __init__(
        self, *, recipe: Recipe, teachers: Teachers | None, began: float, **stock: Any
    ) -> None:
        """`began`: when, in seconds by the monotonic clock, the training would have begun in one
        go. `stock`: the stock Trainer's own."""
        super().__init__(**stock)
        self.began = began
        self.settings, self.teachers = recipe.train, teachers
        self.names, self.slices = recipe.expert_names, recipe.experts.per_source
        self.top_k = recipe.router.top_k * self.slices
        self.num_trained = count_trained(stock["model"])
        self.seen: dict[str, list[Tensor]] = defaultdict(list)  # since the last log

    @property
    def tokens_per_step(self) -> int:
        """Of all processes, in an optimizer step."""
        windows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return int(windows * self.args.world_size * self.settings.sequence_length)

    # Reading and saving states

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """The windows are in the order of training already."""
        windows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(windows)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Nothing: `load_stock` has loaded them. The stock method looks for fused experts in a file
        of single ones, and only warns that it has found none. (Shards of FSDP are its own.)"""
        saved = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled and is_sharded(saved):
            with reading(saved):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The stock method, which reads no pickle but of tensors."""
        with nullcontext() if checkpoint is None else reading(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else reading(Path(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A state that cannot be gone on from does not take the place of one that can."""
        refuse_not_finite(dict(model.named_parameters()), self.state.global_step)
        super()._save_checkpoint(model, trial)

    # Validation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss on the validation text (nats per token): of each source's, and the mean of those, by
        which the stock Trainer tells the best weights. What is in the history is not measured
        again: a resumed training begins with it."""
        known = validation_curve(self.state.log_history)
        if known and known[-1].step == self.state.global_step:
            return known[-1].as_logged()
        model: Any = self.model
        text: Any = self.eval_dataset
        losses = losses_by_source(model, text, self.accelerator)
        point = ValidationPoint(self.state.global_step, losses)
        metrics = point.as_logged()
        self.log(metrics)
        if self.state.global_step == 0:
            self.state.best_metric = metrics[VALIDATION_LOSS]  # a step must be below it
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The stock loss (nats per token, and the weighted load-balance loss). With teachers, of
        weight w: (1 - w) x language-model loss + w x divergence from them + load-balance loss."""
        numbers = inputs.pop("window").tolist()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        stock: Any = self.accelerator.unwrap_model(model)
        self._note_load_balance(stock, outputs)
        if self.teachers is not None:
            assert num_items_in_batch is not None  # every model here takes it
            weight, processes = self.settings.teacher_weight, self.accelerator.num_processes
            # As the stock method does for its loss: over the tokens of all of a step's batches, and
            # times the processes, as gradients are averaged over those.
            nats = self._divergence(numbers, outputs.logits, inputs["labels"])
            nats = nats / num_items_in_batch * processes
            # The stock loss has a load-balance loss in it; this is the share that (1 - w) takes.
            coefficient = getattr(stock, balance_weight_name(stock))
            balance = coefficient * outputs.aux_loss * processes
            loss = (1 - weight) * loss + weight * (nats + balance)
            self._note(divergence=nats.detach() * self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def _divergence(self, numbers: list[int], logits: Tensor, labels: Tensor) -> Tensor:
        """Divergence from the teachers' distributions, in nats, summed over the predicted tokens of
        a batch (whose windows have these numbers)."""
        assert self.teachers is not None
        total = logits.new_zeros((), dtype=torch.float32)
        for owner, (rows, theirs) in self.teachers.logits(numbers).items():
            student, wanted = logits[rows][:, :-1].flatten(0, 1), labels[rows][:, 1:].flatten()
            teacher, known = theirs[:, :-1].flatten(0, 1), self.teachers.known[owner]
            asked = wanted != -100
            if known is not None:  # nor where the next token is none of the teacher's
                asked &= known[wanted.clamp(min=0)]
            temperature = self.settings.teacher_temperature
            total = total + divergence(student[asked], teacher[asked], known, temperature).sum()
        return total

    # What is noted for the log

    def _note_load_balance(self, stock: Any, outputs: Any) -> None:
        """The load balance of the batch's tokens (1: even), and the share of the FFN routers'
        choices that each source's experts have."""
        self._note(balance=outputs.aux_loss.detach() / self.top_k)
        dense = getattr(stock.config, "mlp_only_layers", None) or ()
        num_layers = stock.config.num_hidden_layers - len(dense)
        routers = ffn_routers(outputs.router_logits, num_layers)
        chosen = torch.stack([rows.detach() for rows in routers]).topk(self.top_k)
        of_sources = chosen.indices.flatten() // self.slices
        counts = torch.bincount(of_sources, minlength=len(self.names))
        shares = counts / counts.sum()
        self._note(**{f"share/{n}": s for n, s in zip(self.names, shares, strict=True)})

    def _note(self, **values: Tensor) -> None:
        """Remember values of this step for the next log."""
        for name, value in values.items():
            self.seen[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock log, with the seconds since the beginning and the means of what was noted since
        the last."""
        if "loss" in logs:
            logs["seconds"] = round(time.monotonic() - self.began, 2)
            logs |= {name: float(torch.stack(values).mean()) for name, values in self.seen.items()}
            self.seen.clear()
        super().log(logs, start_time)


def refuse_not_finite(weights: Mapping[str, Tensor], step: int) -> None:
    """RunFolderError for weights with a value that is NaN or infinite after a step."""
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise RunFolderError(
            f"training diverged by step {step}: {broken[0]} holds NaN or infinite values. "
            "Lower train.learning_rate; the checkpoint is untouched"
        )
