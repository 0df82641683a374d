"""Stage 2: train the router, router and experts, or everything, with the stock model's balance
loss.

Sec. 3.3: language-model loss plus 0.01 times the Switch load-balancing loss, AdamW, cosine decay,
gradient norm 1.0. The loop is `transformers.Trainer`; the text is the sources' own, in equal
shares, held-out documents left out.
"""

import json
import logging
import math
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from packaging.version import Version
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from symphony_moe.errors import (
    RecipeError,
    RunFolderError,
    TextError,
    first_line,
    shortened,
)
from symphony_moe.files import hash_folder, publish, write_bytes, write_text
from symphony_moe.machine import (
    is_out_of_memory,
    is_out_of_room,
    peak_rss_bytes,
    process_number,
    versions,
)
from symphony_moe.model.checkpoint import CheckpointWriter
from symphony_moe.model.families import FINAL_NORM, Family
from symphony_moe.model.temperature import (
    TRAINED_TOKENS,
    largest_temperature,
    losses_by_temperature,
)
from symphony_moe.progress import Listener, ignore
from symphony_moe.recipe.settings import Recipe, Train
from symphony_moe.runs.folder import RunFolder, manifest_of_build, note_versions, read_table, retire
from symphony_moe.sources.source import Source, anchor_of
from symphony_moe.sources.stock import balance_weight_name, ffn_routers, load_stock
from symphony_moe.text import files as files_module
from symphony_moe.text.files import TrainingText
from symphony_moe.text.windows import Packed
from symphony_moe.training.distillation import Teachers, divergence, fit_in_memory
from symphony_moe.training.steps import TellSteps

log = logging.getLogger(__name__)

STACKED_TRAIN = Version("5.18")
"""The first version whose stock JetMoE and GraniteMoe have a balance loss in training."""


_ROUTER = re.compile(r"\.(gate|router|router\.layer)\.weight$")


_EXPERT = re.compile(r"\.experts\.|\.(input|output)_linear\.weight$")


def train_run(
    run: RunFolder,
    recipe: Recipe,
    sources: Sequence[Source],
    *,
    resume: bool,
    overwrite: bool,
    measure: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    progress: Listener = ignore,
) -> None:
    """Train `checkpoint/` into `trained/`, which appears when it is whole. Under `accelerate
    launch` or `torchrun`, every process calls this, and the first writes; the others return before
    it has.

    `measure`: model -> held-out losses, for `train.evaluations`. Raises RunFolderError where there
    is no checkpoint, where `trained/` exists (unless `overwrite`, or `resume` and it is what would
    be made) or a training was cut short (unless `resume` or `overwrite`), where memory does not
    suffice, and where the loss stops being a number.
    """
    run.require_checkpoint()
    _refuse_lost(run)
    refuse_untrainable(recipe)
    saved = _last_saved(run.training)
    if run.trained.is_dir() and not overwrite and not (resume and run.training_begun.is_file()):
        if resume and _is_trained_with(run, recipe.train):
            log.info("%s is finished already", run.trained)
            if process_number() == 0:
                shutil.rmtree(run.work, ignore_errors=True)
            return
        raise RunFolderError(f"{run.trained}: exists; --overwrite trains the checkpoint again")
    if saved is not None and not (resume or overwrite):
        raise RunFolderError(
            f"{run.root}: a training was cut short there after step {_step_of(saved)}; --resume "
            "goes on from it, --overwrite begins again"
        )
    saved = saved if resume else None
    processes = PartialState(cpu=not torch.cuda.is_available())
    settings = recipe.train
    with processes.main_process_first():
        if processes.is_main_process:
            if not resume:
                if run.training.is_dir():
                    retire(run, run.training)  # half of a state is not to be gone on from
                shutil.rmtree(run.work, ignore_errors=True)
            run.training.mkdir(parents=True, exist_ok=True)
        _note_settings(run.training_begun, recipe)  # the first process comes first
        if processes.is_main_process:
            note_versions(run.training_begun_with, versions(), "this training")
    text = training_text(recipe, sources, run.work / "text")
    began = time.monotonic() - (0 if saved is None else _seconds_until(saved))

    sharded = saved is not None and any(saved.glob("pytorch_model_fsdp*"))
    trainer = None
    try:
        # FSDP takes the weights from the CPU, layer by layer: whole, they may not fit on a GPU.
        shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        folder = run.checkpoint if saved is None or sharded else saved
        with nullcontext() if folder == run.checkpoint else _reading(folder):
            model = load_stock(folder, on=torch.device("cpu") if shards else None)
        num_trained = choose_parameters(model, settings.scope, anchor_of(recipe, sources).family)
        log.info("training %s: %s parameters", settings.scope, f"{num_trained:,}")
        model.config.output_router_logits = True  # for the balance loss, and to report the balance
        trainer = _make_trainer(
            model, text, recipe, sources, run.training, num_trained, measure, began
        )
        if processes.is_main_process:
            trainer.add_callback(TellSteps(progress))
        # The Trainer divides the language-model loss by the tokens of all of a step's batches and
        # adds the batches up; the balance loss comes with each batch, and is divided here.
        batches = settings.gradient_accumulation * trainer.args.world_size
        setattr(model, balance_weight_name(model), settings.balance_weight / batches)
        digest = ""
        if processes.is_main_process:
            digest = text.digest()
            facts = {
                "text": digest,
                "tokens per step": _tokens_per_step(trainer, settings),
                # What one kind of launch has saved, another does not find.
                "launch": trainer.accelerator.distributed_type.value,
            }
            _note(run.training / "text.json", facts, {"launch": facts["launch"]})
        if saved is not None:
            _refuse_incomplete(saved, processes, sharded=sharded)
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if processes.is_main_process:
            _refuse_broken(weights, trainer.state.global_step)
        softened = _soften(trainer, settings)
        if processes.is_main_process:
            if softened:
                weights[FINAL_NORM] = weights[FINAL_NORM] / softened["temperature"]
            training: dict[str, Any] = {
                "scope": settings.scope,
                "tokens": trainer.state.global_step * _tokens_per_step(trainer, settings),
                "steps": trainer.state.global_step,
                "seconds": round(time.monotonic() - began, 2),
                "learning_rate": settings.learning_rate,
                "trained_parameters": num_trained,
                "text": digest,
                "settings": settings.model_dump(),
                "curve": _curve(trainer, settings),
                "held_out": _held_out_curve(trainer, settings),
            }
            if softened:
                training["temperature_scaling"] = softened
            _publish(run, recipe, model, weights, training)
    except Exception as error:
        _explain(error, run, None if trainer is None else trainer.state.global_step)
        raise

    # The other processes do not wait here: where the weights are large, writing them takes longer
    # than a collective operation may.


def refuse_untrainable(recipe: Recipe) -> None:
    """SymphonyError for what `train_run` could not do on this machine, before anything else is
    done: text that fills no step of one process, loggers that are not there, and an architecture
    that this version of transformers does not train."""
    settings, sources = recipe.train, len(recipe.sources)
    windows = _windows_per_source(settings, sources) * sources
    _refuse_short(windows, settings.batch_size * settings.gradient_accumulation, settings)
    asked = settings.report_to if isinstance(settings.report_to, list) else [settings.report_to]
    for name in asked:
        if name in ("none", "all") or name in get_available_reporting_integrations():
            continue
        if name in INTEGRATION_TO_CALLBACK:
            raise RecipeError(f"train.report_to: the package of {name!r} is not installed")
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise RecipeError(f"train.report_to: {name!r} is none of {known}")
    target = "jetmoe" if recipe.experts.attention == "source" else recipe.output.architecture
    too_old = Version(transformers.__version__) < STACKED_TRAIN
    if target in ("jetmoe", "granitemoe") and too_old:
        raise RecipeError(
            f"output.architecture: the {target} of transformers {transformers.__version__} "
            f"has no balance loss in training; {STACKED_TRAIN} has: pip install -U transformers"
        )


def refuse_no_text(recipe: Recipe, sources: Sequence[Source]) -> None:
    """TextError where a source's text does not fill one window of `train.sequence_length`."""
    one = recipe.train.model_copy(update={"tokens": recipe.train.sequence_length})
    training_text(recipe.model_copy(update={"train": one}), sources, Path())  # small: in memory


def _refuse_short(windows: int, per_step: int, settings: Train) -> None:
    """TextError for text that fills no step."""
    if windows < per_step:
        raise TextError(
            f"training text: {windows} windows of {settings.sequence_length} tokens do not fill "
            f"one step of {per_step} (train.batch_size x train.gradient_accumulation x processes); "
            "raise train.tokens, or lower one of those"
        )


def _explain(error: Exception, run: RunFolder, step: int | None) -> None:
    """RunFolderError where the machine has run out of something."""
    next_step = "before the first step" if step is None else f"at step {step + 1}"
    if is_out_of_memory(error):
        raise RunFolderError(
            f"training ran out of memory {next_step}: lower train.batch_size (and raise "
            "train.gradient_accumulation), or set train.gradient_checkpointing: true; the teachers "
            "need less with train.teacher_loading: in-turn. The checkpoint is untouched; "
            "--overwrite begins the training again, with other settings"
        ) from None
    if is_out_of_room(error):
        free = shutil.disk_usage(run.root).free / 1e6
        raise RunFolderError(
            f"{run.root}: no room for what the training writes at step {step or 0} ({free:,.1f} MB "
            f"are free; {first_line(error)}). Make room and --resume: it "
            "goes on from what was saved last. The checkpoint is untouched"
        ) from None


def _refuse_broken(weights: Mapping[str, Tensor], step: int) -> None:
    """RunFolderError for weights that are no numbers."""
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise RunFolderError(
            f"training diverged by step {step}: {broken[0]} holds values that are no numbers. "
            "Lower train.learning_rate; the checkpoint is untouched"
        )


def _publish(
    run: RunFolder,
    recipe: Recipe,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Any],
) -> None:
    """Write `trained/`, and everything that is said of it before it appears: a kill must not leave
    it without its hashes."""
    model.config.output_router_logits = False
    manifest = manifest_of_build(run.read_json(run.manifest))
    old = run.read_json(run.metrics)
    hashes = _write_trained(run, recipe, model, weights)
    if run.trained.is_dir():
        retire(run, run.trained)
    run.update_json(
        run.manifest,
        {
            "files": manifest["files"] | hash_folder(run.staged_trained),
            "tensors": manifest["tensors"] | {"trained": hashes},
        },
    )
    timing = old.get("timing", {}) | {"train_peak_rss_bytes": peak_rss_bytes()}
    # What was measured of an earlier training is not true of this one.
    true: dict[str, Any] = {
        key: {stage: found for stage, found in old[key].items() if stage != "trained"}
        for key in ("routing", "cka", "dynamic", "tasks")
        if key in old
    }
    run.update_json(
        run.metrics, {"training": training, "timing": timing, **true}, forget=["trained"]
    )
    if (logs := run.training / "runs").is_dir():  # TensorBoard's
        shutil.copytree(logs, run.logs, dirs_exist_ok=True)
    publish(run.staged_trained, run.trained)
    run.training_begun.unlink(missing_ok=True)  # nothing that is left can be gone on from
    shutil.rmtree(run.work)


def _soften(trainer: Trainer, settings: Train) -> dict[str, Any] | None:
    """What the final norm is to be divided by (`temperature`), and the language-model loss without
    and with it on the text that was trained on last; None where the recipe does not ask for it.
    Every process measures its share of that text."""
    if not settings.temperature_scaling:
        return None
    world, rank = trainer.args.world_size, trainer.args.process_index
    windows: Any = trainer.train_dataset
    end = len(windows)
    last = max(world, min(end, TRAINED_TOKENS // settings.sequence_length) // world * world)
    own = [windows[n] for n in range(end - last + rank, end, world)]
    size = trainer.args.train_batch_size
    batches = [default_data_collator(own[n : n + size]) for n in range(0, len(own), size)]
    for batch in batches:
        del batch["window"]
    losses = losses_by_temperature(
        trainer.model_wrapped, batches, lambda x: trainer.accelerator.reduce(x, "sum")
    )
    temperature, softened = largest_temperature(losses, settings.temperature_scaling)
    log.info("softened: temperature %.2f, loss %.3f to %.3f", temperature, losses[0], softened)
    return {
        "temperature": round(temperature, 6),
        "loss": [round(losses[0], 6), round(softened, 6)],
        "tokens": last * settings.sequence_length,
    }


def _refuse_lost(run: RunFolder) -> None:
    """RunFolderError where `trained/` could not be written: that would be found at the end."""
    for path in (run.plan, run.metrics):
        run.read_json(path)
    for name in run.read_json(run.manifest)["files"]:
        if name.startswith(f"{run.checkpoint.name}/") and not (run.root / name).is_file():
            raise RunFolderError(
                f"{run.root / name}: lost; put it back, or build the run again with --overwrite"
            )


def _is_trained_with(run: RunFolder, settings: Train) -> bool:
    """Whether the `trained/` that is there was made with these settings. (`metrics.json` tells of
    it: a new one's settings are written when the old folder is gone.)"""
    training = run.read_json(run.metrics).get("training")
    return isinstance(training, dict) and bool(
        training.get("settings") == json.loads(json.dumps(settings.model_dump()))
    )


def _note_settings(path: Path, recipe: Recipe) -> None:
    """`_note` of the settings of a training."""
    settings = recipe.train.model_dump() | {"seed": recipe.seed}
    del settings["temperature_scaling"]  # no step knows of it
    # An older version's has not all of today's settings: it did what their defaults do.
    _note(path, settings, Train().model_dump())


def _note(path: Path, facts: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Write down what a training is made of; RunFolderError where one that is resumed was begun
    with something else. `defaults`: of facts that it did not write down."""
    if not path.is_file():
        write_text(path, json.dumps(facts, indent=2))
        return
    begun = dict(defaults or {}) | read_table(path)
    for name, value in facts.items():
        if begun.get(name) != value:
            raise RunFolderError(
                f"--resume: this training was begun with {name} = {begun.get(name)}, not {value}; "
                "give it the same settings, text and number of processes, or begin again with "
                "--overwrite"
            )


def _windows_per_source(settings: Train, num_sources: int) -> int:
    """Each source's share of the text."""
    return max(1, settings.tokens // settings.sequence_length // num_sources)


def training_text(recipe: Recipe, sources: Sequence[Source], folder: Path) -> TrainingText:
    """Equal shares of every source's text, shuffled together. Text that is shorter than its share
    is repeated, each time in a new order. `folder`: where large text is kept."""
    settings = recipe.train
    share = _windows_per_source(settings, len(sources))
    generator = torch.Generator().manual_seed(recipe.seed)
    parts, rows = [], []
    for source in sources:
        spec = recipe.sources[source.name]
        who = f"training text of {source.name}"
        part = files_module.source_text(
            who,
            spec.data,
            spec.column,
            source.own_tokenizer,
            source.encoder,
            rules=recipe.chat_rules(source.name),
            holdout=recipe.evaluation.holdout,
            tokens=share * settings.sequence_length,
            sequence_length=settings.sequence_length,
            seed=recipe.seed,
            folder=folder,
        )
        available = len(part.windows)
        repeats = math.ceil(share / available)
        if repeats > 1:
            log.warning("%s: repeated %.1f times", who, share / available)
        orders = [torch.randperm(available, generator=generator) for _ in range(repeats)]
        parts.append(part)
        rows.append(torch.cat(orders)[:share])
    order = torch.randperm(share * len(sources), generator=generator)
    owners = torch.arange(len(sources)).repeat_interleave(share)
    return TrainingText(parts, owners[order], torch.cat(rows)[order])


def choose_parameters(model: PreTrainedModel, scope: str, family: Family) -> int:
    """Freeze what the scope leaves out; the number of parameters that learn.

    `router`: the routers' matrices. `experts`: those and the experts' (of FFN and attention).
    `all`: everything that the sources have. What the target has beyond that stays zero, whatever
    the scope (`Family.zeros`): vLLM and llama.cpp leave it out.
    """
    for name, parameter in model.named_parameters():
        learns = {
            "router": bool(_ROUTER.search(name)),
            "experts": bool(_ROUTER.search(name) or _EXPERT.search(name)),
            "all": True,
        }[scope]
        parameter.requires_grad_(learns and not family.is_zero(name))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _last_saved(folder: Path) -> Path | None:
    """The newest whole state of an interrupted training. The Trainer writes trainer_state.json
    last: a kill while it saves leaves a folder without, or with half of it."""
    states = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json") if _is_json(p)]
    whole = [state for state in states if state.name.removeprefix("checkpoint-").isdecimal()]
    return max(whole, key=_step_of, default=None)


def _step_of(saved: Path) -> int:
    return int(saved.name.removeprefix("checkpoint-"))


def _seconds_until(saved: Path) -> float:
    """What a training had taken when it was saved."""
    with _reading(saved):
        state = TrainerState.load_from_json(str(saved / TRAINER_STATE_NAME))
        if state.global_step != _step_of(saved):
            raise ValueError(f"it says that it is of step {state.global_step!r:.20}")
        return max((float(entry.get("seconds", 0)) for entry in state.log_history), default=0.0)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


@contextmanager
def _reading(saved: Path) -> Iterator[None]:
    """RunFolderError for whatever goes wrong where a state of a training is read: readers of its
    files fail in many ways, and none of them says which file it is."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        told = error.__cause__ or error  # ours name the folder again
        raise _damaged(_unreadable(saved), saved, str(told)) from error


def _refuse_incomplete(saved: Path, processes: PartialState, *, sharded: bool) -> None:
    """RunFolderError for a state without a file that the Trainer would begin anew without a word:
    the result would be another."""
    several = processes.num_processes > 1
    drawn = f"rng_state_{processes.process_index}.pth" if several else "rng_state.pth"
    for name in [SCHEDULER_NAME, drawn, *([] if sharded else [OPTIMIZER_NAME])]:
        if not (saved / name).is_file():
            raise _damaged(saved / name, saved, "it is not there")


def _damaged(what: Path, saved: Path, why: str) -> RunFolderError:
    why = shortened(" ".join(why.split()), 150)
    return RunFolderError(
        f"{what}: damaged, --resume cannot go on from it ({why}). Remove "
        f"{saved.name}/ to go on from the state before it, or begin again with --overwrite"
    )


def _unreadable(saved: Path) -> Path:
    """The first file of a state that cannot be read; the folder, where each can."""
    for path in sorted(saved.iterdir()):
        try:
            if path.suffix == ".json":
                read_table(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                with safe_globals():
                    torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # as many as there are readers
            return path
    return saved


class _Trainer(Trainer):
    """The stock Trainer, given a model that holds the weights to go on from, and teachers."""

    def __init__(
        self, *, recipe: Recipe, teachers: Teachers | None, began: float, **stock: Any
    ) -> None:
        """`began`: when, by the monotonic clock, it would have begun in one go."""
        super().__init__(**stock)
        self.began = began
        self.settings, self.teachers = recipe.train, teachers
        self.names, self.top_k = recipe.expert_names, recipe.router.top_k
        self.seen: dict[str, list[Tensor]] = defaultdict(list)  # since the last log

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
        if self.is_fsdp_enabled and any(saved.glob("pytorch_model_fsdp*")):
            with _reading(saved):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The stock method, which reads no pickle but of tensors."""
        with nullcontext() if checkpoint is None else _reading(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else _reading(Path(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A state that cannot be gone on from does not take the place of one that can."""
        _refuse_broken(dict(model.named_parameters()), self.state.global_step)
        super()._save_checkpoint(model, trial)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The stock loss; with teachers, (1 - w) x language model + w x divergence + balance."""
        numbers = inputs.pop("window").tolist()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._note(balance=outputs.aux_loss.detach() / self.top_k)
        stock: Any = self.accelerator.unwrap_model(model)
        routers = ffn_routers(outputs.router_logits, stock.config.num_hidden_layers)
        chosen = torch.stack([rows.detach() for rows in routers]).topk(self.top_k)
        counts = torch.bincount(chosen.indices.flatten(), minlength=len(self.names))
        shares = counts / counts.sum()
        self._note(**{f"share/{n}": s for n, s in zip(self.names, shares, strict=True)})
        if self.teachers is not None:
            assert num_items_in_batch is not None  # every model here takes it
            weight, total = self.settings.teacher_weight, loss.new_zeros(())
            for owner, (rows, theirs) in self.teachers.logits(numbers).items():
                ours, labels = outputs.logits[rows], inputs["labels"][rows]
                total = total + self._divergence(owner, ours, theirs, labels)
            coefficient = getattr(stock, balance_weight_name(stock))
            # As the stock method does for its loss: over the tokens of all of a step's batches, and
            # times the processes, as gradients are averaged over those.
            processes = self.accelerator.num_processes
            total = total / num_items_in_batch * processes
            balance = coefficient * outputs.aux_loss * processes
            loss = (1 - weight) * loss + weight * (total + balance)
            self._note(divergence=total.detach() * self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def _divergence(self, owner: int, ours: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
        """Sum over the tokens that are predicted; not where the next one is none of the
        teacher's."""
        assert self.teachers is not None
        known, wanted = self.teachers.known[owner], labels[:, 1:].flatten()
        asked = wanted != -100
        if known is not None:
            asked &= known[wanted.clamp(min=0)]
        student, teacher = (x[:, :-1].flatten(0, 1)[asked] for x in (ours, theirs))
        return divergence(student, teacher, known, self.settings.teacher_temperature).sum()

    def _note(self, **values: Tensor) -> None:
        """Remember values of this step for the next log."""
        for name, value in values.items():
            self.seen[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock log, with the means of what was noted since the last."""
        if "loss" in logs:
            logs["seconds"] = round(time.monotonic() - self.began, 2)
            logs |= {name: float(torch.stack(values).mean()) for name, values in self.seen.items()}
        self.seen.clear()
        super().log(logs, start_time)


class _Windows(torch.utils.data.Dataset[dict[str, Any]]):
    """Packed windows as the Trainer wants them; labels are the tokens (the model shifts them), but
    for the first of a document, which nothing before it foretells.

    `by_documents`: with the place of each token in its document, from which the stock models see
    where one ends: attention stays within a document.
    """

    def __init__(self, text: TrainingText, count: int, *, by_documents: bool) -> None:
        self.text, self.count, self.by_documents = text, count, by_documents

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = Packed(self.text.tokens([index]), self.text.positions([index]))
        item = {"input_ids": text.windows[0], "labels": text.labels[0], "window": index}
        return item | {"position_ids": text.positions[0]} if self.by_documents else item


class _Measure(TrainerCallback):
    """Held-out losses at some steps, into the Trainer's history. `at_end`: at the last one too (it
    is the trained model's otherwise, which is evaluated)."""

    def __init__(
        self, measure: Callable[[PreTrainedModel], dict[str, float]], steps: int, *, at_end: bool
    ) -> None:
        self.measure, self.steps, self.at_end = measure, steps, at_end

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        count = self.steps
        done = [n * count // state.max_steps for n in (state.global_step - 1, state.global_step)]
        ended = state.global_step == state.max_steps
        if done[0] == done[1] or (ended and not self.at_end):
            return
        model.eval()
        losses = self.measure(model)
        model.train()
        history: list[Any] = state.log_history
        history.append({"step": state.global_step, "held_out": losses})


class _Progress(TrainerCallback):
    """Says where the training is and when it will end; stops it where the loss is no number."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.begun: tuple[int, float] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.begun is None:
            self.begun = state.global_step, time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs or self.begun is None:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise RunFolderError(
                f"training diverged at step {state.global_step}: the loss is {loss}. Lower "
                "train.learning_rate; the checkpoint is untouched"
            )
        first_step, began = self.begun
        speed = (state.global_step - first_step) / (time.monotonic() - began)
        log.info(
            "step %d of %d, loss %.3f, %s tokens/s, %.0f s to go",
            state.global_step,
            state.max_steps,
            loss,
            f"{speed * self.tokens_per_step:,.0f}",
            (state.max_steps - state.global_step) / speed,
        )


def _make_trainer(
    model: PreTrainedModel,
    text: TrainingText,
    recipe: Recipe,
    sources: Sequence[Source],
    folder: Path,
    num_trained: int,
    measure: Callable[[PreTrainedModel], dict[str, float]] | None,
    began: float,
) -> _Trainer:
    settings = recipe.train
    cuda = torch.cuda.is_available()
    processes = PartialState()
    world = processes.num_processes
    per_step = settings.batch_size * settings.gradient_accumulation * world
    steps = len(text) // per_step
    _refuse_short(len(text), per_step, settings)
    logging_steps = max(1, steps // 50)
    save_steps = math.ceil(steps / settings.checkpoints)
    by_documents = settings.packing == "documents"
    has_bfloat16 = cuda and torch.cuda.is_bf16_supported()
    in_bfloat16 = {"auto": has_bfloat16, "float32": False, "bfloat16": True}[settings.precision]
    name = "activation_checkpointing"  # older versions of transformers know the other name alone
    name = name if hasattr(TrainingArguments, name) else "gradient_checkpointing"
    checkpointing: dict[str, Any] = {name: settings.gradient_checkpointing}
    # A launcher's own setting would win over the recipe's.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if in_bfloat16 else "no"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        bf16=in_bfloat16,
        ddp_find_unused_parameters=False,
        use_cpu=not cuda,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        # Between two logs the means that the next one tells are not saved.
        save_steps=math.ceil(save_steps / logging_steps) * logging_steps,
        save_total_limit=2,
        seed=recipe.seed,
        report_to=settings.report_to,
        remove_unused_columns=False,
        disable_tqdm=True,
        **checkpointing,
    )
    if arguments.n_gpu > 1:
        log.info(
            "training on one of %d GPUs; for all: torchrun --nproc-per-node %d -m symphony_moe "
            "train RUN",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        arguments._n_gpu = 1  # the Trainer would split batches over all of them (DataParallel)
    teachers = None
    if settings.teacher == "sources":
        together = settings.teacher_loading == "together" or (
            settings.teacher_loading == "auto" and fit_in_memory(sources, num_trained)
        )
        log.info("teachers: %s", "all in memory" if together else "one after the other")
        share = (settings.batch_size, processes.process_index, world)
        teachers = Teachers(
            sources, text, folder, by_documents=by_documents, together=together, share=share
        )
    trainer = _Trainer(
        recipe=recipe,
        teachers=teachers,
        began=began,
        model=model,
        args=arguments,
        # Whole steps only: of windows that are left over the Trainer would make one step more when
        # it resumes at the end.
        train_dataset=_Windows(text, steps * per_step, by_documents=by_documents),
        data_collator=default_data_collator,
        callbacks=[_Progress(per_step * settings.sequence_length)],
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    if measure is not None and settings.evaluations:
        trainer.add_callback(
            _Measure(measure, settings.evaluations, at_end=settings.temperature_scaling > 0)
        )
    return trainer


def _tokens_per_step(trainer: Trainer, settings: Train) -> int:
    windows = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    return windows * trainer.args.world_size * settings.sequence_length


def _curve(trainer: Trainer, settings: Train) -> list[dict[str, int | float]]:
    """What the Trainer has logged: the loss, with teachers the `divergence` from them, the load
    `balance` (1 where every expert is chosen as often as any) and each expert's `share/<source>` of
    the FFN routers' choices."""
    per_step = _tokens_per_step(trainer, settings)
    kept = ("loss", "learning_rate", "divergence", "balance")
    return [
        {"step": entry["step"], "tokens": entry["step"] * per_step}
        | {key: entry[key] for key in entry if key in kept or key.startswith("share/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _held_out_curve(trainer: Trainer, settings: Train) -> list[dict[str, Any]]:
    """What was measured on the way (`train.evaluations`)."""
    per_step = _tokens_per_step(trainer, settings)
    return [
        {"tokens": entry["step"] * per_step, "losses": entry["held_out"]}
        for entry in trainer.state.log_history
        if "held_out" in entry
    ]


def _write_trained(
    run: RunFolder, recipe: Recipe, model: PreTrainedModel, weights: Mapping[str, Tensor]
) -> dict[str, str]:
    """The trained weights under the names, shapes and dtype of `checkpoint/`; tensor hashes.

    `save_pretrained` restores the per-expert names, but adds tensors of its own (Ernie's zero head
    bias, which other readers refuse), so its output is streamed through our writer.
    """
    raw = run.work / "saved"
    for left in (raw, run.staged_trained):  # of a training that was killed here
        shutil.rmtree(left, ignore_errors=True)
    model.save_pretrained(raw, state_dict=dict(weights))
    stored = {k: tuple(v) for k, v in run.read_json(run.plan)["tensors"].items()}
    writer = CheckpointWriter(
        run.staged_trained, stored, recipe.output.dtype, recipe.output.max_shard_bytes
    )
    for path in sorted(raw.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, not a dict)
                if name in stored:
                    writer.write(name, file.get_tensor(name))
    hashes = writer.finish()
    for name in run.read_json(run.manifest)["files"]:  # and nothing that was put beside them
        folder, _, file = name.partition("/")
        if folder == run.checkpoint.name and ".safetensors" not in file:
            (run.staged_trained / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(run.root / name, run.staged_trained / file)
    card = run.staged_trained / "README.md"
    settings = json.dumps(recipe.train.model_dump(), indent=2)
    more = f"\n## Training\n\nTrained after building, with\n\n```json\n{settings}\n```\n"
    write_bytes(card, card.read_bytes() + more.encode())
    return hashes
