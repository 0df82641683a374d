"""What a training leaves: `trained/`, its hashes in `manifest.json`, its numbers in
`metrics.json`."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from symphony_moe.errors import RunFolderError
from symphony_moe.files import hash_folder, publish, write_bytes
from symphony_moe.machine import peak_rss_bytes
from symphony_moe.model.checkpoint import CheckpointWriter
from symphony_moe.recipe.settings import Recipe
from symphony_moe.recipe.yaml_text import write_yaml
from symphony_moe.runs.folder import RunFolder, manifest_of_build, retire
from symphony_moe.training.trainer import MoETrainer
from symphony_moe.training.validation import describe_validation


def refuse_lost(run: RunFolder) -> None:
    """RunFolderError where `trained/` could not be written for want of a file of the run: that
    would be found at the end."""
    for path in (run.plan, run.metrics):
        run.read_json(path)
    for name in run.read_json(run.manifest)["files"]:
        if name.startswith(f"{run.checkpoint.name}/") and not (run.root / name).is_file():
            raise RunFolderError(
                f"{run.root / name}: lost; put it back, or build the run again with --overwrite"
            )


# Numbers


def describe_training(trainer: MoETrainer, found: Mapping[str, Any]) -> dict[str, Any]:
    """For `metrics.json`: what was trained on how much text in how many seconds, and how the losses
    went. `found`: the digest of the `text`, and what `averaging` and `temperature_scaling` came to,
    None for what was not asked for."""
    settings, steps = trainer.settings, trainer.state.global_step
    training: dict[str, Any] = {
        "scope": settings.scope,
        "tokens": steps * trainer.tokens_per_step,
        "steps": steps,
        "seconds": round(time.monotonic() - trainer.began, 2),
        "learning_rate": settings.learning_rate,
        "trained_parameters": trainer.num_trained,
        "settings": settings.model_dump(),
        "curve": _loss_curve(trainer),
        "held_out": _held_out_curve(trainer),
    }
    if settings.keep_best:
        validation: Any = trainer.eval_dataset
        tokens = sum(len(pieces.tokens) for pieces in validation.values())
        training["validation"] = describe_validation(
            tokens, trainer.state, averages=settings.average
        )
    return training | {key: value for key, value in found.items() if value is not None}


def _loss_curve(trainer: MoETrainer) -> list[dict[str, int | float]]:
    """What the Trainer has logged: the loss, with teachers the `divergence` from them, the load
    `balance` (1 where every expert is chosen as often as any) and each expert's `share/<source>` of
    the FFN routers' choices."""
    kept = ("loss", "learning_rate", "divergence", "balance")
    return [
        {"step": entry["step"], "tokens": entry["step"] * trainer.tokens_per_step}
        | {key: entry[key] for key in entry if key in kept or key.startswith("share/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _held_out_curve(trainer: MoETrainer) -> list[dict[str, Any]]:
    """The losses on held-out text during the training (`train.evaluations`)."""
    return [
        {"tokens": entry["step"] * trainer.tokens_per_step, "losses": entry["held_out"]}
        for entry in trainer.state.log_history
        if "held_out" in entry
    ]


# Files


def publish_trained(
    run: RunFolder,
    recipe: Recipe,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Any],
) -> None:
    """Write `trained/`, and everything that is said of it before it appears: a kill must not leave
    it without its hashes. `training`: see `describe_training`."""
    model.config.output_router_logits = False
    manifest = manifest_of_build(run.read_json(run.manifest))
    old = run.read_json(run.metrics)
    tensors, files = _write_trained(run, recipe, model, weights)
    if run.trained.is_dir():
        retire(run, run.trained)
    run.update_json(
        run.manifest,
        {
            "files": manifest["files"] | hash_folder(run.staged_trained, files),
            "tensors": manifest["tensors"] | {"trained": tensors},
        },
    )
    timing = old.get("timing", {}) | {"train_peak_rss_bytes": peak_rss_bytes()}
    run.update_json(
        run.metrics,
        {"training": training, "timing": timing, **_without_trained(old)},
        forget=["trained"],
    )
    run.samples.unlink(missing_ok=True)  # of an earlier training's model: evaluating makes them
    if (logs := run.training / "runs").is_dir():  # TensorBoard's
        shutil.copytree(logs, run.logs, dirs_exist_ok=True)
    publish(run.staged_trained, run.trained)
    run.training_begun.unlink(missing_ok=True)  # nothing that is left can be gone on from
    shutil.rmtree(run.work)


def _without_trained(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of several models, without those of an earlier training's: they are not true of the
    model of this one."""
    return {
        key: {stage: found for stage, found in metrics[key].items() if stage != "trained"}
        for key in ("routing", "cka", "dynamic", "tasks")
        if key in metrics
    }


def _write_trained(
    run: RunFolder, recipe: Recipe, model: PreTrainedModel, weights: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, str]]:
    """The trained model in the staged folder, with the files of `checkpoint/`; the hashes of its
    tensors and of its files of weights."""
    raw = run.work / "saved"
    for left in (raw, run.staged_trained):  # of a training that was killed here
        shutil.rmtree(left, ignore_errors=True)
    model.save_pretrained(raw, state_dict=dict(weights))
    hashes = _stream_weights(run, recipe, raw)
    _copy_companions(run)
    card = run.staged_trained / "README.md"
    unsaid = {"report_to"}
    unsaid |= {name for name in ("keep_best", "average") if not getattr(recipe.train, name)}
    settings = write_yaml(recipe.train.model_dump(mode="json", exclude=unsaid))
    more = f"\n## Training\n\nTrained after building, with\n\n```yaml\n{settings}```\n"
    write_bytes(card, card.read_bytes() + more.encode())
    return hashes


def _stream_weights(
    run: RunFolder, recipe: Recipe, raw: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """The weights under the names, shapes and dtype of `checkpoint/`; the hashes of tensors and of
    files.

    `save_pretrained` restores the per-expert names, but adds tensors of its own (Ernie's zero head
    bias, which other readers refuse), so its output (`raw`) is streamed through our writer.
    """
    stored = {k: tuple(v) for k, v in run.read_json(run.plan)["tensors"].items()}
    with CheckpointWriter(
        run.staged_trained, stored, recipe.output.dtype, recipe.output.max_shard_bytes
    ) as writer:
        for path in sorted(raw.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a handle, not a dict)
                    if name in stored:
                        writer.write(name, file.get_tensor(name))
        return writer.finish(), writer.file_hashes()


def _copy_companions(run: RunFolder) -> None:
    """What is in `checkpoint/` besides weights, and nothing that was put beside it."""
    for name in run.read_json(run.manifest)["files"]:
        folder, _, file = name.partition("/")
        if folder == run.checkpoint.name and ".safetensors" not in file:
            (run.staged_trained / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(run.root / name, run.staged_trained / file)
