"""`symphony train` under a launcher: two processes compute what one does."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checks import tensors_of
from conftest import make_recipe
from symphony_moe import pipeline
from symphony_moe.model.families import FINAL_NORM
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "localhost:0",
]


def sharded(folder: Path, kind: str = "FULL_STATE_DICT") -> list[str]:
    """`accelerate launch` with a configuration of its own for FSDP2."""
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
        "mixed_precision": "no",
        "use_cpu": True,
        "main_process_port": 0,
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_state_dict_type": kind,
            "fsdp_cpu_ram_efficient_loading": False,
        },
    }
    path = folder / "launch.yaml"
    path.write_text(json.dumps(config))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]


SETTINGS = [
    "train.batch_size=2",
    "train.teacher=sources",
    "train.balance_weight=0.5",
    "train.temperature_scaling=0.05",
]

# accelerate shards on accelerators only; FSDP2 itself runs anywhere. The one change is what it is
# told of the machine.
SCRIPT = """
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

begin = PartialState.__init__

def begin_as_accelerator(self, *arguments, **settings):
    begin(self, *arguments, **settings)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU

if "--fsdp" in sys.argv:
    sys.argv.remove("--fsdp")
    PartialState.__init__ = begin_as_accelerator

from symphony_moe.training import run as train
from symphony_moe.training.callbacks import TrainingProgress
from symphony_moe.cli import main

if "--kill" in sys.argv:
    sys.argv.remove("--kill")
    begin_step = TrainingProgress.on_step_begin

    def killed(self, arguments, state, *rest, **more):
        if state.global_step == 5:
            raise SystemExit(9)
        begin_step(self, arguments, state, *rest, **more)

    TrainingProgress.on_step_begin = killed

if "--loses" in sys.argv:
    sys.argv.remove("--loses")
    from symphony_moe.training import trainer

    losses = iter([1.0, 2.0, 3.0])
    trainer.losses_by_source = lambda *_: {"a": next(losses)}

publish, ended = train.publish_trained, Path(__file__).with_name("ended")

def publish_seen(run, recipe, model, *rest):
    print("MODEL", type(model).__name__)
    began = time.monotonic()
    while not ended.exists():  # writing may take long: the other process must not wait for it
        assert time.monotonic() - began < 60, "the other process waits"
        time.sleep(0.1)
    publish(run, recipe, model, *rest)

train.publish_trained = publish_seen
code = main(sys.argv[1:])
print("LEFT", not torch.distributed.is_initialized())
if os.environ["RANK"] != "0":
    ended.touch()
sys.exit(code)
"""


def launch(folder: Path, launcher: list[str], *arguments: str) -> tuple[int, str]:
    """(exit code, everything printed) of a command in two processes."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    (folder / "ended").unlink(missing_ok=True)
    kinds = [] if launcher is TORCHRUN else ["--fsdp"]
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    done = subprocess.run(
        [*launcher, str(script), *kinds, *arguments, *(sets if "train" in arguments else [])],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def single(
    built: Callable[[str], RunFolder], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of one process that takes two batches a step."""
    root = tmp_path_factory.mktemp("single") / "run"
    shutil.copytree(built("llama").root, root)
    pipeline.train(RunFolder(root), [*SETTINGS, "train.gradient_accumulation=2"])
    return losses(RunFolder(root))


def losses(run: RunFolder) -> list[float]:
    """Of every step; and of the model at the end, as it is and with temperature scaling."""
    training = run.read_json(run.metrics)["training"]
    softened: list[float] = training["temperature_scaling"]["loss"]
    return [entry["loss"] for entry in training["curve"]] + softened


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)]
)
def test_two_processes_give_the_losses_of_one(
    launcher: str, single: list[float], built: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(built("llama").root, run.root)
    words = TORCHRUN if launcher == "torchrun" else sharded(tmp_path)
    code, output = launch(tmp_path, words, "train", str(run.root))
    assert code == 0, output
    # Sharded where it is meant to be.
    model = "MixtralForCausalLM" if launcher == "torchrun" else "FSDPMixtralForCausalLM"
    assert f"MODEL {model}\n" in output
    assert output.count("LEFT True\n") == 2
    assert losses(run) == pytest.approx(single, abs=1e-4)
    assert output.count("trained ") == 1 and output.count("step 7 of 7") == 1
    pipeline.verify(run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_killed_training_in_shards_goes_on(
    kind: str, single: list[float], built: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(built("llama").root, run.root)
    words = sharded(tmp_path, kind)
    code, _ = launch(tmp_path, words, "--kill", "train", str(run.root))
    assert code != 0 and not run.trained.exists()
    assert list(run.training.glob("checkpoint-*"))
    code, output = launch(tmp_path, words, "train", str(run.root), "--resume")
    assert code == 0, output
    assert losses(run) == pytest.approx(single, abs=1e-4)
    pipeline.verify(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "found", "alike"),
    [
        ("keep_best", "validation", ("tokens", "chosen_step")),
        ("average", "averaging", ("tokens", "share")),
    ],
)
def test_two_processes_measure_what_one_does(
    setting: str,
    found: str,
    alike: tuple[str, ...],
    built: Callable[[str], RunFolder],
    tmp_path: Path,
) -> None:
    """The losses on validation text, of which each has a share; and all keep the same weights."""
    run, alone = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "alone")
    for folder in (run, alone):
        shutil.copytree(built("llama").root, folder.root)
    asked = f"train.{setting}=true"
    pipeline.train(alone, [*SETTINGS, asked, "train.gradient_accumulation=2"])
    code, output = launch(tmp_path, TORCHRUN, "train", str(run.root), "--set", asked)
    assert code == 0, output
    one, other = (r.read_json(r.metrics)["training"][found] for r in (run, alone))
    assert [one[key] for key in alike] == [other[key] for key in alike]
    assert one.get("chosen_step", 7) == 7
    for ours, theirs in zip(one["curve"], other["curve"], strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    pipeline.verify(run)


@pytest.mark.slow
def test_two_processes_put_back_what_was_there_before(
    built: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    """Where nothing was gained. Both stop, and one says it. The final norm has the temperature."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(built("llama").root, run.root)
    keep = ["--set", "train.keep_best=true"]
    code, output = launch(tmp_path, TORCHRUN, "--loses", "train", str(run.root), *keep)
    assert code == 0, output
    assert output.count("training gained nothing") == 1
    before, after = tensors_of(run.checkpoint), tensors_of(run.trained)
    del before[FINAL_NORM]
    assert all(torch.equal(before[name], after[name]) for name in before)
    pipeline.verify(run)


CLASSES = {
    "qwen2": "Ernie4_5_MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
    "bam": "JetMoeForCausalLM",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("what", CLASSES)
def test_every_architecture_trains_in_two_processes(
    what: str, launcher: str, built: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    run, alone = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "alone")
    if what == "bam":
        recipe = load_recipe(make_recipe(tmp_path / "sources", method="bam"))
        pipeline.build(recipe, run.root)
    else:
        shutil.copytree(built(what).root, run.root)
    shutil.copytree(run.root, alone.root)
    pipeline.train(alone, [*SETTINGS, "train.gradient_accumulation=2"])
    words = TORCHRUN if launcher == "torchrun" else sharded(tmp_path)
    code, output = launch(tmp_path, words, "train", str(run.root))
    assert code == 0, output
    assert f"MODEL {'' if launcher == 'torchrun' else 'FSDP'}{CLASSES[what]}\n" in output
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    pipeline.verify(run)
