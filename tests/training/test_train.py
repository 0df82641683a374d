"""Stage 2 changes what its scope says, lowers the loss, and can be killed."""

import errno
import itertools
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import integration_utils

from checks import Killed, load_clean, mostly_slow, tensors_of
from conftest import VARIANTS, WORDS, make_recipe
from symphony_moe import pipeline
from symphony_moe.cli import main
from symphony_moe.errors import (
    RecipeError,
    RunFolderError,
    SymphonyError,
    TextError,
    VerificationError,
)
from symphony_moe.files import hash_folder
from symphony_moe.progress import Progress
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Encoder, Packed, pack_windows
from symphony_moe.training import (
    publishing,
    refusals,
    resuming,
    temperature_scaling,
    trained_model,
    trainer,
)
from symphony_moe.training import run as run_module
from symphony_moe.training.callbacks import TrainingProgress
from symphony_moe.training.job import TrainingJob
from symphony_moe.training.refusals import refuse_untrainable
from symphony_moe.training.trainer import MoETrainer

ROUTER = re.compile(r"\.(gate|router\.layer)\.weight$")
EXPERT = re.compile(r"\.experts\.\d+\.|\.(input|output)_linear\.")


def first_loss(run: RunFolder, overrides: Sequence[str]) -> float:
    """The loss of the first step, before any weight has changed."""
    pipeline.train(run, overrides, overwrite=True)
    return float(run.read_json(run.metrics)["training"]["curve"][0]["loss"])


def packed_text(run: RunFolder, overrides: Sequence[str] = ()) -> Packed:
    """All windows that are trained on, in their order."""
    recipe = load_recipe(run.recipe, overrides)
    text = Texts(recipe, open_sources(recipe)).training_text(run.work)
    numbers = range(len(text))
    return Packed(text.tokens(numbers), text.positions(numbers))


def training_text(run: RunFolder, overrides: Sequence[str] = ()) -> Tensor:
    return packed_text(run, overrides).windows


def loss_by_hand(logits: Tensor, text: Packed) -> Tensor:
    """Nats of every token but the first of a document (or window)."""
    asked = text.positions[:, 1:] > 0
    return cross_entropy(logits[:, :-1][asked], text.windows[:, 1:][asked], reduction="none")


def zeros(tensors: dict[str, Tensor]) -> list[str]:
    """Those that hold nothing else."""
    return [name for name, tensor in tensors.items() if not tensor.any()]


@pytest.mark.parametrize(
    ("variant", "scope"),
    mostly_slow(
        [
            *((variant, "all") for variant in VARIANTS),
            *itertools.product(
                ("llama", "qwen2", "qwen2-granitemoe", "qwen3"), ("router", "experts")
            ),
        ],
        # What the targets have beyond the sources differs; the scopes themselves do not.
        *((variant, "all") for variant in ("qwen2-granitemoe", "olmo2")),
        ("llama", "router"),
        ("qwen2", "experts"),
    ),
)
def test_a_scope_changes_its_tensors_and_no_others(
    variant: str, scope: str, copied: Callable[[str], RunFolder]
) -> None:
    """Bit for bit; and names, shapes and dtypes are those of `checkpoint/`, so that stock loads
    it, and `verify` accepts it. What the target has beyond the sources was zero and is, whatever it
    is called: no pico source has a tensor of zeros."""
    run = copied(variant)
    before_files = hash_folder(run.checkpoint)
    pipeline.train(run, [f"train.scope={scope}", "train.tokens=512"])
    assert hash_folder(run.checkpoint) == before_files
    before, after = tensors_of(run.checkpoint), tensors_of(run.trained)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    learns: Callable[[str], Any] = {
        "router": lambda name: ROUTER.search(name),
        "experts": lambda name: ROUTER.search(name) or EXPERT.search(name),
        "all": lambda name: before[name].any() and not name.endswith(".sinks"),
    }[scope]
    expected = {name for name in before if learns(name)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected
    assert len(expected) >= 2
    load_clean(run.trained)
    config = run.read_json(run.trained / "config.json")
    # transformers' save_pretrained would leave the second out, and older readers take 10,000.
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"]
    assert config == run.read_json(run.checkpoint / "config.json")
    checks = pipeline.verify(run)
    lacked = [name for name in before if name not in expected] if scope == "all" else zeros(before)
    what = "zero" if len(zeros(before)) == len(lacked) else "as they were written"
    said = f"all {len(lacked)} tensors that the sources lack are {what}"
    assert checks.get("trained zeros") == (said if lacked else None)
    count = run.read_json(run.metrics)["training"]["trained_parameters"]
    assert count == sum(before[name].numel() for name in expected)
    assert not run.work.exists()


@pytest.mark.parametrize("variant", ["qwen2", "qwen2-granitemoe"])
def test_verify_finds_what_has_learned_and_must_not(
    variant: str, copied: Callable[[str], RunFolder]
) -> None:
    """Somebody trained it otherwise, and said so in the manifest."""
    run = copied(variant)
    pipeline.train(run, ["train.tokens=512"])
    path = next(run.trained.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.o_proj.bias"][3] = 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    manifest = run.read_json(run.manifest)
    files = manifest["files"] | hash_folder(run.trained)
    run.update_json(run.manifest, {"files": files})
    with pytest.raises(
        VerificationError, match=r"trained zeros: 1 tensors .*layers\.1\.self_attn\.o_proj\.bias"
    ):
        pipeline.verify(run)


def test_training_lowers_the_loss(copied: Callable[[str], RunFolder]) -> None:
    """On the text it saw and on text it did not see."""
    run = copied("llama")
    pipeline.train(run, ["train.tokens=16384"])
    curve = run.read_json(run.metrics)["training"]["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5
    metrics = pipeline.evaluate(run).to_json()
    for domain in "abc":
        assert metrics["trained"][domain] < metrics["built"][domain] - 0.3


def test_the_trained_dtype_is_the_outputs(recipes: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights learn in float32 and are rounded once, at the end; shards and index as in
    `checkpoint/`."""
    overrides = ["output.dtype=bfloat16", "output.max_shard_size=20KB"]
    run = pipeline.build(load_recipe(recipes("qwen2"), overrides), tmp_path / "run")
    pipeline.train(run, ["train.tokens=512"])
    assert {t.dtype for t in tensors_of(run.trained).values()} == {torch.bfloat16}
    files = {p.name for p in run.checkpoint.iterdir()}
    assert {p.name for p in run.trained.iterdir()} == files
    assert "model.safetensors.index.json" in files
    for name in files - {"README.md"}:
        if ".safetensors" not in name or name.endswith(".json"):
            assert (run.trained / name).read_bytes() == (run.checkpoint / name).read_bytes()
    load_clean(run.trained)
    pipeline.verify(run)


def test_training_can_be_repeated_to_the_bit(copied: Callable[[str], RunFolder]) -> None:
    """Same recipe, same machine: same bytes, and no path or time in them."""
    first, second = copied("qwen3"), copied("qwen3")
    for run in (first, second):
        pipeline.train(run, ["train.tokens=512"])
    assert hash_folder(first.trained) == hash_folder(second.trained)
    card = (first.trained / "README.md").read_text()
    assert "\ntokens: 512\n" in card and str(first.root) not in card


@pytest.mark.parametrize("variant", mostly_slow(["llama", "qwen2", "qwen3"], "qwen2"))
def test_the_load_balance_loss_reaches_the_model(
    variant: str, copied: Callable[[str], RunFolder]
) -> None:
    """The first step's loss is the language-model loss plus the weight times the stock balance
    loss of the same windows."""
    run = copied(variant)
    text = packed_text(run, ["train.tokens=512"])[:4]
    assert (text.positions[:, 1:] == 0).any()  # a document begins within a window
    model = load_clean(run.checkpoint)
    with torch.inference_mode():
        output = model(input_ids=text.windows, output_router_logits=True)
    plain = float(loss_by_hand(output.logits, text).mean())
    assert float(output.aux_loss) > 1
    for weight in (0.0, 1.0, 3.0):
        loss = first_loss(run, ["train.tokens=512", f"train.balance_weight={weight}"])
        assert loss == pytest.approx(plain + weight * float(output.aux_loss), abs=1e-3)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_accumulated_batches_count_once(weight: float, copied: Callable[[str], RunFolder]) -> None:
    """Four windows in two batches of two: the language-model loss is the mean over the tokens of
    both, the balance loss the mean of the two."""
    run = copied("llama")
    overrides = [
        "train.tokens=512",
        "train.batch_size=2",
        "train.gradient_accumulation=2",
        f"train.balance_weight={weight}",
    ]
    text = packed_text(run, overrides)[:4]
    model = load_clean(run.checkpoint)
    nats, balance = [], 0.0
    for batch in (text[:2], text[2:]):
        with torch.inference_mode():
            output = model(input_ids=batch.windows, output_router_logits=True)
        nats.append(loss_by_hand(output.logits, batch))
        balance += float(output.aux_loss) / 2
    expected = float(torch.cat(nats).mean()) + weight * balance
    assert first_loss(run, overrides) == pytest.approx(expected, abs=1e-3)


def taught_to_end(folder: Path, documents: Sequence[str]) -> None:
    """Train a source on documents that end, as released models were."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = pack_windows(documents, Encoder.of(AutoTokenizer.from_pretrained(folder)), 64)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        batch = text[torch.randint(len(text), (8,))]
        optimizer.zero_grad()
        model(input_ids=batch.windows, labels=batch.labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


@pytest.mark.parametrize("packing", mostly_slow(["windows", "documents"], "documents"))
def test_a_trained_model_still_stops(
    packing: str, ending: Callable[[], tuple[RunFolder, list[str]]], tmp_path: Path
) -> None:
    """Sources that end their documents make a model that ends them, before training and after:
    greedy generation comes to EOS, and BOS follows nothing."""
    built, documents = ending()
    run = RunFolder(tmp_path / "run")
    shutil.copytree(built.root, run.root)
    pipeline.train(run, [f"train.packing={packing}"])
    tokenizer = AutoTokenizer.from_pretrained(run.trained)
    for folder in (run.checkpoint, run.trained):
        model = load_clean(folder)
        after = []
        for document in documents[:10]:
            ids = torch.tensor([tokenizer(document)["input_ids"]])
            with torch.inference_mode():
                after.append(model(ids).logits[0, -1].softmax(-1))
            generated = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
            )
            assert generated[0, ids.shape[1] :].tolist() == [tokenizer.eos_token_id]
        chances = torch.stack(after).mean(dim=0)
        assert chances[tokenizer.eos_token_id] > 0.9
        assert chances[tokenizer.bos_token_id] < 0.01


@pytest.fixture(scope="module")
def ending(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], tuple[RunFolder, list[str]]]:
    """A build of two sources whose documents are six words and a full stop; some of these."""
    made: list[tuple[RunFolder, list[str]]] = []

    def get() -> tuple[RunFolder, list[str]]:
        if not made:
            path = make_recipe(
                tmp_path_factory.mktemp("ending"),
                count=2,
                method="harmonized",
                calibration={"tokens": 8192},
                fit={"epochs": 1},
                train={"tokens": 16384, "batch_size": 8, "learning_rate": 3e-3},
            )
            torch.manual_seed(0)
            generator, texts = random.Random(0), []
            for name, words in (("a", WORDS[:6]), ("b", WORDS[6:])):
                texts = [" ".join(generator.choices(words, k=6)) + "." for _ in range(400)]
                rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
                (path.parent / f"{name}.jsonl").write_text(rows)
                taught_to_end(path.parent / "models" / name, texts)
            made.append((pipeline.build(load_recipe(path), path.parent / "run"), texts))
        return made[0]

    return get


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Training ends where the given step would begin."""
    begin = TrainingProgress.on_step_begin

    def killed(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == step:
            raise Killed
        begin(self, args, state, control, **rest)

    monkeypatch.setattr(TrainingProgress, "on_step_begin", killed)


@pytest.mark.parametrize(
    ("variant", "step"),
    mostly_slow(itertools.product(["llama", "qwen2"], [1, 5, 6]), ("qwen2", 1)),
)
def test_resumed_training_equals_training_in_one_go(
    variant: str,
    step: int,
    copied: Callable[[str], RunFolder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed before the first saved state (saved every 2 of 7 steps), between two, and right after
    one: the same weights to the bit, the same curve."""
    whole, run = copied(variant), copied(variant)
    pipeline.train(whole)
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            pipeline.train(run)
    assert not run.trained.exists()
    saved = {path.name for path in run.training.glob("checkpoint-*")}
    assert bool(saved) == (step > 2)
    pipeline.train(run, resume=True)
    assert hash_folder(run.trained) == hash_folder(whole.trained)
    curves = [r.read_json(r.metrics)["training"]["curve"] for r in (run, whole)]
    assert curves[0] == curves[1] and len(curves[0]) == 7
    pipeline.verify(run)


def test_every_optimizer_step_is_told(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each, batches that are accumulated not by themselves. A resumed training goes on from
    the step that was saved; what the listener raises ends it."""
    run = copied("llama")
    settings = ["train.batch_size=2", "train.gradient_accumulation=2"]
    recipe = run.read_recipe(settings, sections=("train",))
    sources = open_sources(recipe)
    told: list[Progress] = []

    def listen(progress: Progress) -> None:
        told.append(progress)
        if len(told) == 5:
            raise Killed

    def train(*, resume: bool) -> None:
        run_module.train_run(run, recipe, sources, resume=resume, overwrite=False, progress=listen)

    with pytest.raises(Killed):
        train(resume=False)
    train_as = recipe.train
    tokens = train_as.sequence_length * train_as.batch_size * train_as.gradient_accumulation
    assert told == [Progress("train", step, 7, tokens) for step in range(1, 6)]
    train(resume=True)
    assert told[5:] == [Progress("train", step, 7, tokens) for step in range(5, 8)]
    assert run.trained.is_dir()


def test_a_training_resumed_by_other_software_says_so(
    copied: Callable[[str], RunFolder],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, now = copied("llama"), resuming.versions()
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        patch.setattr(resuming, "versions", lambda: now | {"torch": "1.0"})
        with pytest.raises(Killed):
            pipeline.train(run)
    assert not [m for m in caplog.messages if "was begun with" in m]
    pipeline.train(run, resume=True)
    warned = [m for m in caplog.messages if "was begun with" in m]
    assert len(warned) == 1 and warned[0].startswith(
        f"this training was begun with torch 1.0 and goes on with torch {now['torch']}: "
    )
    assert run.trained.is_dir()


def test_a_kill_in_the_middle_of_saving_loses_no_more_than_that(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-written training state is passed over for the one before it."""
    whole, run = copied("llama"), copied("llama")
    pipeline.train(whole)
    save = trainer.Trainer._save_optimizer_and_scheduler

    def killed(self: Any, folder: str) -> None:
        if folder.endswith("checkpoint-4"):
            raise Killed
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save_optimizer_and_scheduler", killed)
        with pytest.raises(Killed):
            pipeline.train(run)
    pipeline.train(run, resume=True)
    assert hash_folder(run.trained) == hash_folder(whole.trained)


@pytest.mark.slow
def test_a_kill_at_the_very_end_leaves_a_run_that_verifies(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever `trained/` is, the manifest knows it; where it is not, training is resumed."""
    run = copied("llama")

    def killed(*_: Any) -> None:
        raise Killed

    for place in ("publish", "_loss_curve"):
        with monkeypatch.context() as patch:
            patch.setattr(publishing, place, killed)
            with pytest.raises(Killed):
                pipeline.train(run, ["train.tokens=512"], overwrite=True)
        if run.trained.exists():
            pipeline.verify(run)
            assert "train_peak_rss_bytes" in run.read_json(run.metrics)["timing"]
        else:
            pipeline.train(run, ["train.tokens=512"], resume=True)
            pipeline.verify(run)


@pytest.mark.parametrize(
    "at", mostly_slow(["scale_temperature", "publish_trained"], "publish_trained")
)
def test_a_kill_after_the_last_step_of_text_that_is_no_whole_number_of_steps(
    at: str, copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows that are left over make no further step."""
    whole, cut = copied("llama"), copied("llama")
    settings = ["train.tokens=1728", "train.temperature_scaling=0.02"]
    pipeline.train(whole, settings)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, at, killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.train(cut, settings)
    pipeline.train(cut, settings, resume=True)
    one, other = (run.read_json(run.metrics)["training"] for run in (whole, cut))
    assert one["steps"] * 4 < 1728 // 64 == 27 and one["tokens"] < 1728
    for key in ("steps", "tokens", "curve", "temperature_scaling", "text"):
        assert one[key] == other[key], key
    assert hash_folder(whole.trained) == hash_folder(cut.trained)


def test_half_a_state_is_passed_over(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer writes its own state last, and in place."""
    whole, run = copied("llama"), copied("llama")
    pipeline.train(whole)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            pipeline.train(run)
    newest = max(run.training.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    (newest / "trainer_state.json").write_text("")
    pipeline.train(run, resume=True)
    assert hash_folder(run.trained) == hash_folder(whole.trained)


@pytest.mark.slow
def test_a_curve_of_means_over_steps_is_that_of_one_go(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more than fifty steps several are in each of its points."""
    settings = ["train.tokens=14848", "train.batch_size=2", "train.checkpoints=5"]
    whole, run = copied("llama"), copied("llama")
    pipeline.train(whole, settings)
    with monkeypatch.context() as patch:
        kill_at(patch, 53)
        with pytest.raises(Killed):
            pipeline.train(run, settings)
    pipeline.train(run, settings, resume=True)
    curves = [r.read_json(r.metrics)["training"]["curve"] for r in (run, whole)]
    assert curves[0] == curves[1]
    assert [point["step"] for point in curves[0][:3]] == [2, 4, 6]


@pytest.mark.slow
def test_training_anew_that_is_cut_short_goes_on(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old model stays until the new one is there."""
    run = copied("llama")
    pipeline.train(run, ["train.scope=router"])
    first = hash_folder(run.trained)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            pipeline.train(run, overwrite=True)
    assert hash_folder(run.trained) == first
    pipeline.train(run, resume=True)
    assert hash_folder(run.trained) != first
    pipeline.verify(run)
    with pytest.raises(RunFolderError, match="--overwrite"):
        pipeline.train(run, ["train.scope=router"], resume=True)
    # What was asked for is there: a kill may have cut off the cleaning up.
    run.work.mkdir()
    pipeline.train(run, resume=True)
    assert not run.work.exists()


class Bomb:
    """Pickled, it makes a file where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
OTHERS = ["model.safetensors", "config.json"]
HARMS = ("gone", "cut", "other", "empty", "garbage", "pickle", "archive")
NOTES = ["settings.json", "versions.json", "text.json"]


@pytest.fixture(scope="module")
def cut_short(
    built: Callable[[str], RunFolder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], RunFolder]:
    """A copy of a run whose training was cut short."""
    run = RunFolder(tmp_path_factory.mktemp("cut-short") / "run")
    shutil.copytree(built("llama").root, run.root)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            pipeline.train(run)

    def get(root: Path) -> RunFolder:
        shutil.copytree(run.root, root)
        return RunFolder(root)

    return get


@pytest.mark.parametrize(
    ("name", "harm"),
    mostly_slow(
        [
            *((name, harm) for name in [*STATE, *OTHERS, *NOTES] for harm in HARMS[:3]),
            *((name, harm) for name in STATE for harm in HARMS[3:]),
        ],
        *((name, "other") for name in [*STATE, *OTHERS, *NOTES]),
        ("rng_state.pth", "pickle"),
        ("settings.json", "gone"),
    ),
)
def test_a_damaged_state_is_named_and_runs_no_code(
    name: str,
    harm: str,
    cut_short: Callable[[Path], RunFolder],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pickles in the place of a state are read, but make no object of any other kind."""
    run = cut_short(tmp_path / "run")
    path = run.training / ("" if name in NOTES else "checkpoint-4") / name
    bomb = Bomb(tmp_path / "marker")
    whole = path.read_bytes()
    path.unlink()
    if harm == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif harm == "archive":
        torch.save({"state": bomb}, path)
    elif harm == "other":
        torch.save([1], path) if path.suffix in (".pt", ".pth") else path.write_text("[1]")
    elif harm != "gone":
        path.write_bytes({"empty": b"", "cut": whole[:-20], "garbage": b"\xff" * 999}[harm])
    code = main(["train", str(run.root), "--resume"])
    error = capsys.readouterr().err
    assert not bomb.marker.exists()
    assert "Traceback" not in error
    if name in NOTES and harm == "gone":
        assert code == 0  # what was noted there cannot be compared any more
        return
    assert code == 2
    message = error[error.index("symphony: error: ") :]
    assert "damaged" in message and "--overwrite" in message and len(message) < 500
    named = harm != "other" and (name, harm) != ("config.json", "gone")  # else the folder is
    assert str(path if named and harm != "gone" else path.parent) in message
    assert name in message or not named
    assert not run.trained.exists()
    if harm == "cut" and name in STATE:  # what the message says helps
        shutil.rmtree(path.parent)
        assert main(["train", str(run.root), "--resume"]) == 0


@pytest.mark.parametrize(
    "content",
    [
        '{"global_step": 3}',
        "{}",
        "[]",
        '{"a": 1}',
        '{"global_step": 4, "log_history": 1}',
        '{"global_step": 4, "log_history": [1]}',
        "[" * 100_000,
    ],
)
def test_a_state_that_says_nothing_of_its_step_is_damaged_or_passed_over(
    content: str,
    cut_short: Callable[[Path], RunFolder],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = cut_short(tmp_path / "run")
    (run.training / "checkpoint-4" / "trainer_state.json").write_text(content)
    (run.training / "checkpoint-old").mkdir()
    (run.training / "checkpoint-old" / "trainer_state.json").write_text("{}")
    code = main(["train", str(run.root), "--resume"])
    error = capsys.readouterr().err
    assert code == (0 if content[:2] == "[[" else 2)
    assert "Traceback" not in error
    assert code == 0 or ("checkpoint-4: damaged" in error or "trainer_state.json: dam" in error)


def test_text_that_does_not_fill_a_step_is_refused(copied: Callable[[str], RunFolder]) -> None:
    run = copied("llama")
    words = "6 windows of 64 tokens do not fill one step of 32 "
    with pytest.raises(TextError, match=words):
        pipeline.train(run, ["train.tokens=384", "train.gradient_accumulation=8"])
    assert not run.trained.exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.report_to=fooboard", "'fooboard' is none of azure_ml, "),
        ("train.report_to=wandb", "the package of 'wandb' is not installed"),
        ("train.tokens=192", "3 windows of 64 tokens do not fill one step of 4 "),
        ("train.sequence_length=400000", "training text of a: .* tokens"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_built(
    setting: str,
    words: str,
    recipes: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        integration_utils, "get_available_reporting_integrations", lambda: ["mlflow"]
    )
    with pytest.raises(SymphonyError, match=words):
        more = ["train.tokens=4000000"] if "length" in setting else []
        pipeline.run(load_recipe(recipes("llama"), [setting, *more]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    refuse_untrainable(load_recipe(recipes("llama"), ["train.report_to=mlflow"]))


@pytest.mark.parametrize("setting", ["method=bam", "output.architecture=granitemoe"])
def test_stacked_experts_are_trained_where_transformers_can(
    setting: str, recipes: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions' JetMoe and GraniteMoe have no load-balance loss in training, or cannot
    compute it."""
    recipe = load_recipe(recipes("llama"), [setting])
    refuse_untrainable(recipe)
    monkeypatch.setattr(refusals.transformers, "__version__", "5.9.0")
    name = "jetmoe" if "bam" in setting else "granitemoe"
    with pytest.raises(
        RecipeError, match=rf"the {name} of transformers 5\.9\.0 has no load-balance loss"
    ):
        refuse_untrainable(recipe)
    unnamed = load_recipe(recipes("llama"), ["method=btx"])
    refuse_untrainable(unnamed)
    with pytest.raises(RecipeError, match=rf"the {name} of transformers 5\.9\.0"):
        refuse_untrainable(unnamed, name)  # what `auto` has become


def test_what_auto_becomes_is_refused_before_it_is_built(
    recipes: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Granite has one class, which old versions do not train; a build alone does not mind."""
    monkeypatch.setattr(refusals.transformers, "__version__", "5.9.0")
    recipe = load_recipe(recipes("granite"))
    assert any("granitemoe of transformers 5.9.0" in one for one in pipeline.plan(recipe).warnings)
    with pytest.raises(RecipeError, match=r"granitemoe of transformers 5\.9\.0"):
        pipeline.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_process_trains_on_one_gpu(
    copied: Callable[[str], RunFolder],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where it sees several, the stock Trainer would make every step several times as large."""
    whole, run = copied("llama"), copied("llama")
    pipeline.train(whole)
    prepare: Callable[[Any], None] = trainer.TrainingArguments.__post_init__

    def of_three(self: Any) -> None:
        prepare(self)
        self._n_gpu = 3

    monkeypatch.setattr(trainer.TrainingArguments, "__post_init__", of_three)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with caplog.at_level("INFO"):
        pipeline.train(run)
    assert "training on one of 3 GPUs; for all: torchrun --nproc-per-node 3 " in caplog.text
    assert hash_folder(run.trained) == hash_folder(whole.trained)


def test_what_was_cut_short_is_not_begun_again_unasked(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days of training may lie there. `build --resume` leaves them alone too, beside an older
    `trained/` as without one."""
    run = copied("llama")
    for old in (False, True):
        with monkeypatch.context() as patch:
            kill_at(patch, 5)
            with pytest.raises(Killed):
                pipeline.train(run, overwrite=old)
        saved = {path.name for path in run.training.glob("checkpoint-*")}
        assert saved == {"checkpoint-2", "checkpoint-4"} and run.trained.exists() == old
        with pytest.raises(
            RunFolderError, match="--overwrite" if old else "after step 4; --resume"
        ):
            pipeline.train(run)
        pipeline.build(run.read_recipe(), run.root, resume=True)
        assert {path.name for path in run.training.glob("checkpoint-*")} == saved
        pipeline.train(run, resume=True)
        assert run.trained.exists() and not run.work.exists()


def test_the_time_of_a_training_is_that_of_all_its_parts(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied("llama")
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            pipeline.train(run)
    path = run.training / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert [0 < entry["seconds"] < 60 for entry in state["log_history"]] == [True] * 4
    state["log_history"][-1]["seconds"] = 1000.0
    path.write_text(json.dumps(state))
    pipeline.train(run, resume=True)
    assert 1000 < run.read_json(run.metrics)["training"]["seconds"] < 1060


def test_what_a_logger_has_written_stays(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard writes into the Trainer's own folder, which goes when a training ends."""
    run = copied("llama")
    stock = trainer.Trainer.train

    def logged(self: Any, **settings: Any) -> Any:
        folder = Path(self.args.output_dir) / "runs" / "today"
        folder.mkdir(parents=True)
        (folder / "events").write_text("loss")
        return stock(self, **settings)

    monkeypatch.setattr(trainer.Trainer, "train", logged)
    pipeline.train(run)
    assert (run.logs / "today" / "events").read_text() == "loss"
    pipeline.train(run, overwrite=True)
    assert not run.work.exists()
    recipe = run.read_recipe()
    pipeline.build(recipe, run.root, overwrite=True)  # the folder is a run's still
    assert not run.logs.exists()


@pytest.mark.parametrize(("shards", "place"), [("true", torch.device("cpu")), ("false", None)])
def test_sharded_weights_are_not_put_on_one_gpu_first(
    shards: str, place: Any, copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = copied("llama"), []

    def load(folder: Path, on: Any) -> Any:
        asked.append((folder, on))
        raise Killed

    monkeypatch.setattr(trained_model, "load_stock", load)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", shards)
    with pytest.raises(Killed):
        pipeline.train(run)
    assert asked == [(run.checkpoint, place)]


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_the_recipe_says_how_precisely_it_computes(
    precision: str, copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what a launcher has in its own configuration."""
    run, seen = copied("llama"), []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    stock = trainer.Trainer.train

    def look(self: Any, **settings: Any) -> Any:
        seen.append(self.accelerator.mixed_precision)
        return stock(self, **settings)

    monkeypatch.setattr(trainer.Trainer, "train", look)
    AcceleratorState._reset_state()
    pipeline.train(run, [f"train.precision={precision}", "train.tokens=512"])
    AcceleratorState._reset_state()
    assert seen == ["bf16" if precision == "bfloat16" else "no"]
    weights = tensors_of(run.trained)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_what_is_trained_may_have_been_trained_elsewhere(
    recipes: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a logger that this one lacks: it is evaluated here."""
    recipe = load_recipe(recipes("llama"), ["train.report_to=wandb"])
    with monkeypatch.context() as patch:
        patch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["wandb"])
        patch.setattr(run_module, "make_trainer", without_loggers(run_module.make_trainer))
        run = pipeline.run(recipe, tmp_path / "run")
    hashes = hash_folder(run.trained)
    pipeline.run(run.read_recipe(), run.root, resume=True)
    assert hash_folder(run.trained) == hashes
    with pytest.raises(RecipeError, match="'wandb' is not installed"):
        pipeline.run(run.read_recipe(), run.root, overwrite=True)
    assert hash_folder(run.trained) == hashes


def without_loggers(make: Callable[..., Any]) -> Callable[..., Any]:
    """The Trainer as it would be made for `train.report_to: none`."""

    def made(job: TrainingJob, *rest: Any) -> Any:
        settings = job.settings.model_copy(update={"report_to": "none"})
        recipe = job.recipe.model_copy(update={"train": settings})
        return make(replace(job, recipe=recipe), *rest)

    return made


def test_trained_models_are_not_replaced_unasked(copied: Callable[[str], RunFolder]) -> None:
    """`--overwrite` is the word; the manifest then holds the new files."""
    run = copied("llama")
    pipeline.train(run, ["train.tokens=512", "train.scope=router"])
    first = hash_folder(run.trained)
    with pytest.raises(RunFolderError, match="--overwrite"):
        pipeline.train(run, ["train.tokens=512"])
    assert hash_folder(run.trained) == first
    pipeline.train(run, ["train.tokens=512"], overwrite=True)
    assert hash_folder(run.trained) != first
    pipeline.verify(run)


def test_resuming_with_other_settings_is_refused(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule that changes half way is neither the one nor the other."""
    folder = copied("llama")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(MoETrainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.train(folder)
    with pytest.raises(RunFolderError, match=r"begun with learning_rate = 0\.001, not 0\.5"):
        pipeline.train(folder, ["train.learning_rate=0.5"], resume=True)
    # Other text, another number of processes, or shards.
    path = folder.training / "text.json"
    begun = json.loads(path.read_text())
    for name, other in (("text", "0"), ("tokens per step", 7), ("launch", "FSDP")):
        path.write_text(json.dumps(begun | {name: other}))
        with pytest.raises(RunFolderError, match=f"begun with {name} = {other}, not "):
            pipeline.train(folder, resume=True)
    path.write_text(json.dumps(begun))
    # An older version's, which did not have one of the settings yet.
    path = folder.training / "settings.json"
    begun = json.loads(path.read_text())
    path.write_text(json.dumps({key: begun[key] for key in begun if key != "packing"}))
    with pytest.raises(RunFolderError, match=r"begun with packing = windows, not documents"):
        pipeline.train(folder, ["train.packing=documents"], resume=True)
    pipeline.train(folder, resume=True)
    assert folder.trained.is_dir()


@pytest.mark.slow
def test_training_again_forgets_what_was_measured_of_the_old_model(
    copied: Callable[[str], RunFolder],
) -> None:
    folder = copied("llama")
    pipeline.train(folder)
    pipeline.evaluate(folder, ["evaluation.thresholds=[0.4]"])
    for key in ("routing", "cka", "dynamic"):
        assert "trained" in folder.read_json(folder.metrics)[key]
    pipeline.train(folder, ["train.scope=router"], overwrite=True)
    metrics = folder.read_json(folder.metrics)
    assert metrics["training"]["scope"] == "router"
    assert "trained" not in metrics and list(metrics["routing"]) == ["built"]
    assert list(metrics["cka"]) == ["sources", "built"] and list(metrics["dynamic"]) == ["built"]


def test_only_the_training_may_change_after_the_build(copied: Callable[[str], RunFolder]) -> None:
    """`--set` on what is built already would be a lie."""
    with pytest.raises(RecipeError, match=r"router\.top_k.*what can change now is: train"):
        pipeline.train(copied("llama"), ["router.top_k=1"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_no_number_stops_the_training(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the step and what to do; nothing half-trained appears, the checkpoint stays."""
    run = copied("llama")
    before = hash_folder(run.checkpoint)
    recipe = run.read_recipe(["train.warmup=0"], sections=("train",))
    # A recipe file cannot say so.
    absurd = recipe.train.model_copy(update={"learning_rate": 1e30})
    absurd_recipe = recipe.model_copy(update={"train": absurd})
    monkeypatch.setattr(RunFolder, "read_recipe", lambda *_args, **_options: absurd_recipe)
    with pytest.raises(
        RunFolderError, match=r"diverged (at step [23]: the loss is (nan|inf)|by step 2)"
    ):
        pipeline.train(run)
    assert not run.trained.exists()
    assert hash_folder(run.checkpoint) == before


def test_training_text_is_equal_shares_of_every_source(
    copied: Callable[[str], RunFolder], caplog: pytest.LogCaptureFixture
) -> None:
    """The same number of windows from each, shuffled together; a text that is too short is
    repeated, and that is said."""
    run = copied("llama")
    recipe = load_recipe(run.recipe, ["train.tokens=3840"])
    sources = open_sources(recipe)
    text = Texts(recipe, sources).training_text(run.work)
    windows = text.tokens(range(len(text)))
    assert windows.shape == (60, 64)
    shorter = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens": 1280})})
    alone = []
    for source in sources:
        own = Texts(shorter, [source]).training_text(run.work)
        alone.append({tuple(window) for window in own.tokens(range(len(own))).tolist()})
    owners = [
        next(n for n, own in enumerate(alone) if tuple(window) in own)
        for window in windows.tolist()
    ]
    assert [owners.count(n) for n in range(3)] == [20, 20, 20]
    assert owners != sorted(owners)
    assert owners == text.owners.tolist()
    assert "repeated" not in caplog.text
    many = training_text(run, ["train.tokens=600000"])
    assert many.shape[0] == 600_000 // 64 // 3 * 3
    assert "repeated" in caplog.text


def test_a_full_disk_is_said_in_words_and_training_goes_on_later(
    copied: Callable[[str], RunFolder],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No traceback; what was saved before stays, and is gone on from."""
    whole, run = copied("llama"), copied("llama")
    pipeline.train(whole)
    save = trainer.Trainer._save_optimizer_and_scheduler

    def full(self: Any, folder: str) -> None:
        if folder.endswith("checkpoint-4"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save_optimizer_and_scheduler", full)
        assert main(["train", str(run.root)]) == 2
    message = capsys.readouterr().err
    assert os.strerror(errno.ENOSPC) in message and "Traceback" not in message
    assert not run.trained.exists()
    assert main(["train", str(run.root), "--resume"]) == 0
    assert hash_folder(run.trained) == hash_folder(whole.trained)


def nats(folder: Path, text: Packed, temperature: float = 1.0) -> float:
    """Stock's logits, divided by hand."""
    with torch.no_grad():
        logits = load_clean(folder)(text.windows).logits / temperature
    return float(loss_by_hand(logits, text).mean())


@pytest.mark.parametrize(
    "variant", mostly_slow(["llama-tied-rope3", "qwen2", "qwen3"], "llama-tied-rope3")
)
def test_temperature_scaling_costs_what_it_may_and_changes_the_final_norm_alone(
    variant: str, copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By brute force on the text that was trained on last: at the temperature that is chosen the
    loss is below the limit, at the next it is not."""
    sharp, soft = copied(variant), copied(variant)
    settings = ["train.tokens=12288"]
    monkeypatch.setattr(temperature_scaling, "TRAINED_TOKENS", 2048)
    pipeline.train(sharp, settings)
    pipeline.train(soft, [*settings, "train.temperature_scaling=0.02"])
    before, after = tensors_of(sharp.trained), tensors_of(soft.trained)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"model.norm.weight"}
    assert "temperature_scaling" not in sharp.read_json(sharp.metrics)["training"]
    found = soft.read_json(soft.metrics)["training"]["temperature_scaling"]
    temperature = found["temperature"]
    torch.testing.assert_close(
        after["model.norm.weight"] * temperature, before["model.norm.weight"]
    )
    text = packed_text(soft, settings)
    windows = text[-(2048 // text.windows.shape[1]) :]
    assert found["tokens"] == windows.windows.numel() == 2048
    losses = [nats(folder, windows) for folder in (sharp.trained, soft.trained)]
    assert found["loss"] == pytest.approx(losses, abs=2e-5)
    assert 1 < temperature < 1.9
    assert losses[1] < losses[0] * 1.02 <= nats(sharp.trained, windows, temperature * 1.02)
    pipeline.verify(soft)
