"""Stage 2: train the router, router and experts, or everything, with the stock model's balance
loss.

Sec. 3.3: language-model loss plus 0.01 times the Switch load-balancing loss, AdamW, cosine decay,
gradient norm 1.0. The loop is `transformers.Trainer`; the text is the sources' own, in equal
shares, held-out documents left out.
"""

import json
import logging
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from symphony_moe.errors import RunFolderError
from symphony_moe.families import HEAD_BIAS
from symphony_moe.recipe import Recipe, Train
from symphony_moe.run_folder import RunFolder, publish, retire, write_text
from symphony_moe.shards import CheckpointWriter, hash_folder
from symphony_moe.sources import Source
from symphony_moe.stock import load_stock
from symphony_moe.text import draw_windows, is_held_out, read_documents

log = logging.getLogger(__name__)

_ROUTER = re.compile(r"\.(gate|router)\.weight$")
_EXPERT = re.compile(r"\.experts\.")


def train_run(
    run: RunFolder, recipe: Recipe, sources: Sequence[Source], *, resume: bool, overwrite: bool
) -> None:
    """Train `checkpoint/` into `trained/`, which appears when it is whole.

    Raises RunFolderError where there is no checkpoint, where `trained/` exists (unless
    `overwrite`), and where the loss stops being a number.
    """
    run.require_checkpoint()
    if run.trained.is_dir() and not overwrite:
        raise RunFolderError(f"{run.trained}: exists; --overwrite trains the checkpoint again")
    settings = recipe.train
    windows = training_windows(recipe, sources)
    if not resume:
        shutil.rmtree(run.work, ignore_errors=True)
    run.training.mkdir(parents=True, exist_ok=True)
    _note_settings(run.training / "settings.json", recipe)
    started = time.monotonic()

    saved = _last_saved(run.training) if resume else None
    model = load_stock(saved or run.checkpoint)
    num_trained = choose_parameters(model, settings.scope)
    log.info("training %s: %s parameters", settings.scope, f"{num_trained:,}")
    model.config.output_router_logits = settings.balance_weight > 0
    trainer = _make_trainer(model, windows, settings, recipe.seed, run.training)
    # The Trainer divides the language-model loss by the tokens of all of a step's batches and adds
    # the batches up; the balance loss comes with each batch, and is divided here.
    batches = settings.gradient_accumulation * trainer.args.world_size * max(1, trainer.args.n_gpu)
    # The coefficient is read from the config when a model is made, so the model has its own copy.
    setattr(model, "router_aux_loss_coef", settings.balance_weight / batches)  # noqa: B010
    trainer.train(resume_from_checkpoint=None if saved is None else str(saved))

    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise RunFolderError(
            f"training diverged: {broken[0]} holds values that are no numbers. Lower "
            "train.learning_rate; the checkpoint is untouched"
        )
    model.config.output_router_logits = False
    hashes = _write_trained(run, recipe, model)
    if run.trained.is_dir():
        retire(run, run.trained)
    # Everything is said of it before it appears: a kill must not leave it without its hashes.
    manifest = run.read_json(run.manifest)
    run.update_json(
        run.manifest,
        {
            "files": {k: v for k, v in manifest["files"].items() if not k.startswith("trained/")}
            | hash_folder(run.staged_trained),
            "tensors": manifest["tensors"] | {"trained": hashes},
        },
    )
    old = run.read_json(run.metrics)
    training = {
        "scope": settings.scope,
        "tokens": trainer.state.global_step * _tokens_per_step(trainer, settings),
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - started, 2),
        "learning_rate": settings.learning_rate,
        "trained_parameters": num_trained,
        "curve": _curve(trainer, settings),
    }
    # What was measured of an earlier training is not true of this one.
    routing = {
        stage: share for stage, share in old.get("routing", {}).items() if stage != "trained"
    }
    run.update_json(run.metrics, {"training": training, "routing": routing}, forget=["trained"])
    publish(run.staged_trained, run.trained)
    shutil.rmtree(run.work)


def _note_settings(path: Path, recipe: Recipe) -> None:
    """Write down what is trained with; RunFolderError where a training that is resumed was begun
    with other settings."""
    settings = recipe.train.model_dump() | {"seed": recipe.seed}
    if not path.is_file():
        write_text(path, json.dumps(settings, indent=2))
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in settings if settings[name] != begun.get(name)]
    if changed:
        raise RunFolderError(
            f"--resume: this training was begun with {changed[0]} = {begun.get(changed[0])}, not "
            f"{settings[changed[0]]}; give the same settings, or begin again without --resume"
        )


def training_windows(recipe: Recipe, sources: Sequence[Source]) -> Int[Tensor, "windows sequence"]:
    """Windows in the order of training: equal shares of every source's text, shuffled together.
    Text that is shorter than its share is repeated, each time in a new order."""
    settings = recipe.train
    share = max(1, settings.tokens // settings.sequence_length // len(sources))
    generator = torch.Generator().manual_seed(recipe.seed)
    parts = []
    for source in sources:
        spec = recipe.sources[source.name]
        who = f"training text of {source.name}"
        documents = read_documents(who, spec.data, spec.column, source.own_tokenizer)
        windows = draw_windows(
            who,
            [d for d in documents if not is_held_out(d, recipe.evaluation.holdout)],
            source.tokenizer,
            tokens=share * settings.sequence_length,
            sequence_length=settings.sequence_length,
            seed=recipe.seed,
        )
        repeats = math.ceil(share / len(windows))
        if repeats > 1:
            log.warning("%s: repeated %.1f times", who, share / len(windows))
        orders = [torch.randperm(len(windows), generator=generator) for _ in range(repeats)]
        parts.append(windows[torch.cat(orders)[:share]])
    together = torch.cat(parts)
    return together[torch.randperm(len(together), generator=generator)]


def choose_parameters(model: PreTrainedModel, scope: str) -> int:
    """Freeze what the scope leaves out; the number of parameters that learn.

    `router`: the routers' matrices. `experts`: those and the experts. `all`: everything that the
    checkpoint stores: the target's extra biases (Ernie's score correction and head bias) stay zero.
    """
    for name, parameter in model.named_parameters():
        extra = name.endswith(("e_score_correction_bias", HEAD_BIAS))
        learns = {
            "router": bool(_ROUTER.search(name)),
            "experts": bool(_ROUTER.search(name) or _EXPERT.search(name)),
            "all": True,
        }[scope]
        parameter.requires_grad_(learns and not extra)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _last_saved(folder: Path) -> Path | None:
    """The newest whole state of an interrupted training. The Trainer writes trainer_state.json
    last: a kill while it saves leaves a folder without."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


class _Trainer(Trainer):
    """The stock Trainer, given a model that holds the weights to go on from."""

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Nothing: `load_stock` has loaded them. The stock method looks for fused experts in a file
        of single ones, and only warns that it has found none."""


class _Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed windows as the Trainer wants them; labels are the tokens (the model shifts them)."""

    def __init__(self, windows: Int[Tensor, "windows sequence"]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


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
    model: PreTrainedModel, windows: Tensor, settings: Train, seed: int, folder: Path
) -> Trainer:
    cuda = torch.cuda.is_available()
    world = int(torch.distributed.get_world_size()) if torch.distributed.is_initialized() else 1
    per_step = settings.batch_size * settings.gradient_accumulation * world
    steps = max(1, len(windows) // per_step)
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
        bf16=cuda and torch.cuda.is_bf16_supported(),
        use_cpu=not cuda,
        # The windows are in the order of training already.
        train_sampling_strategy="sequential",
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=max(1, math.ceil(steps / settings.checkpoints)),
        save_total_limit=2,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=_Windows(windows),
        data_collator=default_data_collator,
        callbacks=[_Progress(per_step * settings.sequence_length)],
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokens_per_step(trainer: Trainer, settings: Train) -> int:
    windows = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    return windows * trainer.args.world_size * settings.sequence_length


def _curve(trainer: Trainer, settings: Train) -> list[dict[str, int | float]]:
    per_step = _tokens_per_step(trainer, settings)
    return [
        {
            "step": entry["step"],
            "tokens": entry["step"] * per_step,
            "loss": entry["loss"],
            "learning_rate": entry["learning_rate"],
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _write_trained(run: RunFolder, recipe: Recipe, model: PreTrainedModel) -> dict[str, str]:
    """The trained weights under the names, shapes and dtype of `checkpoint/`; tensor hashes.

    `save_pretrained` restores the per-expert names, but adds tensors of its own (Ernie's zero head
    bias, which other readers refuse), so its output is streamed through our writer.
    """
    raw = run.work / "saved"
    model.save_pretrained(raw)
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
    for path in run.checkpoint.iterdir():
        if ".safetensors" not in path.name:
            shutil.copyfile(path, run.staged_trained / path.name)
    card = (run.staged_trained / "README.md").read_text(encoding="utf-8")
    settings = json.dumps(recipe.train.model_dump(), indent=2)
    card += f"\n## Training\n\nTrained after building, with\n\n```json\n{settings}\n```\n"
    write_text(run.staged_trained / "README.md", card)
    return hashes
