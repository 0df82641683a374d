"""The state of an interrupted training: found, read, checked against what is asked for now.

The Trainer saves its state under `work/training/checkpoint-<step>/`. Beside it lie the settings and
the text that the training was begun with. Nothing that does not fit is gone on from.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from symphony_moe.errors import RunFolderError, shortened
from symphony_moe.files import write_text
from symphony_moe.machine import is_out_of_memory, process_number, versions
from symphony_moe.recipe.settings import Recipe, Train
from symphony_moe.runs.folder import RunFolder, note_versions, read_table, retire
from symphony_moe.runs.metrics import read_metrics

log = logging.getLogger(__name__)


# What is there already


def is_trained_already(run: RunFolder, settings: Train, *, resume: bool, overwrite: bool) -> bool:
    """Whether nothing is left to do: `resume` is asked for, and `trained/` was made with these
    settings. Removes what a kill has left of that training's work.

    Raises RunFolderError where `trained/` exists and is something else, unless `overwrite`, or
    `resume` and another training was begun after it.
    """
    begun_again = resume and run.training_begun.is_file()
    if not run.trained.is_dir() or overwrite or begun_again:
        return False
    if not (resume and _is_trained_with(run, settings)):
        raise RunFolderError(f"{run.trained}: exists; --overwrite trains the checkpoint again")
    log.info("%s is finished already", run.trained)
    if process_number() == 0:
        shutil.rmtree(run.work, ignore_errors=True)
    return True


def _is_trained_with(run: RunFolder, settings: Train) -> bool:
    """Whether the `trained/` that is there was made with these settings. (`metrics.json` tells of
    it: a new one's settings are written when the old folder is gone.)"""
    training = read_metrics(run).training
    if training is None:
        return False
    # An older version's has not all of today's settings: it did what their defaults do.
    trained_with = Train().model_dump() | training.settings
    return bool(trained_with == json.loads(json.dumps(settings.model_dump())))


def state_to_resume(run: RunFolder, *, resume: bool, overwrite: bool) -> Path | None:
    """The folder of the state that this training goes on from; None for one that begins.

    Raises RunFolderError for the state of an interrupted training, unless `resume` or `overwrite`
    says what is to become of it.
    """
    saved = _last_saved(run.training)
    if saved is not None and not (resume or overwrite):
        raise RunFolderError(
            f"{run.root}: a training was cut short there after step {_step_of(saved)}; --resume "
            "goes on from it, --overwrite begins again"
        )
    return saved if resume else None


def _last_saved(folder: Path) -> Path | None:
    """The newest whole state of an interrupted training. The Trainer writes trainer_state.json
    last: a kill while it saves leaves a folder without, or with half of it."""
    states = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json") if _is_json(p)]
    whole = [state for state in states if state.name.removeprefix("checkpoint-").isdecimal()]
    return max(whole, key=_step_of, default=None)


def state_of_step(folder: Path, step: int) -> Path:
    """The folder of the state that was saved after a step."""
    return folder / f"checkpoint-{step}"


def _step_of(saved: Path) -> int:
    return int(saved.name.removeprefix("checkpoint-"))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def is_sharded(saved: Path) -> bool:
    """Whether a state holds the model in FSDP's shards."""
    return any(saved.glob("pytorch_model_fsdp*"))


# What a training was begun with


def begin(run: RunFolder, recipe: Recipe, processes: PartialState, *, resume: bool) -> None:
    """Make the folder of a training, or take up one that was cut short. The first process writes;
    the others come after it and compare.

    Raises RunFolderError where the training that is resumed was begun with other settings.
    """
    with processes.main_process_first():
        if processes.is_main_process:
            if not resume:
                if run.training.is_dir():
                    retire(run, run.training)  # half of a state is not to be gone on from
                shutil.rmtree(run.work, ignore_errors=True)
            run.training.mkdir(parents=True, exist_ok=True)
        _note_settings(run.training_begun, recipe)
        if processes.is_main_process:
            note_versions(run.training_begun_with, versions(), "this training")


def _note_settings(path: Path, recipe: Recipe) -> None:
    """`note` of the settings of a training."""
    settings = recipe.train.model_dump() | {"seed": recipe.seed}
    del settings["temperature_scaling"]  # no step knows of it
    # An older version's has not all of today's settings: it did what their defaults do.
    note(path, settings, Train().model_dump())


def note(path: Path, facts: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Write down what a training is made of, as JSON. `defaults`: of facts that an older version
    did not write down.

    Raises RunFolderError where the file is there and says something else.
    """
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


# Reading a state


def seconds_until(saved: Path | None) -> float:
    """What a training had taken when it was saved, in seconds; 0 for one that begins. Raises
    RunFolderError for a state that does not say."""
    if saved is None:
        return 0.0
    with reading(saved):
        state = TrainerState.load_from_json(str(saved / TRAINER_STATE_NAME))
        if state.global_step != _step_of(saved):
            raise ValueError(f"it says that it is of step {state.global_step!r:.20}")
        return max((float(entry.get("seconds", 0)) for entry in state.log_history), default=0.0)


def refuse_incomplete(saved: Path, processes: PartialState) -> None:
    """RunFolderError for a state without a file that the Trainer would begin anew without a word:
    the result would be another."""
    several = processes.num_processes > 1
    drawn = f"rng_state_{processes.process_index}.pth" if several else "rng_state.pth"
    for name in [SCHEDULER_NAME, drawn, *([] if is_sharded(saved) else [OPTIMIZER_NAME])]:
        if not (saved / name).is_file():
            raise _damaged(saved / name, saved, "it is not there")
    # With train.keep_best: weights that may be the result.
    best = TrainerState.load_from_json(str(saved / TRAINER_STATE_NAME)).best_global_step
    if best and not state_of_step(saved.parent, best).is_dir():
        raise _damaged(saved, saved, f"it needs {state_of_step(saved.parent, best).name}/")


@contextmanager
def reading(saved: Path) -> Iterator[None]:
    """RunFolderError for whatever goes wrong where a state of a training is read: readers of its
    files fail in many ways, and none of them says which file it is."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        told = error.__cause__ or error  # ours name the folder again
        raise _damaged(_unreadable(saved), saved, str(told)) from error


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
            _read(path)
        except Exception:  # as many as there are readers
            return path
    return saved


def _read(path: Path) -> None:
    """Whatever a file of a state raises when it is opened."""
    if path.suffix == ".json":
        read_table(path)
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif path.suffix in (".pt", ".pth"):
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
