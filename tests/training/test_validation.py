"""`train.keep_best`: the weights of the lowest validation loss are the result, those before
training among them."""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from checks import Killed, load_clean, mostly_slow, tensors_of
from conftest import make_recipe
from symphony_moe import pipeline
from symphony_moe.errors import RecipeError, TextError
from symphony_moe.files import hash_folder
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.text.texts import Texts, validation_windows_per_source
from symphony_moe.training import run as run_module
from symphony_moe.training import trainer
from symphony_moe.training.callbacks import TrainingProgress
from symphony_moe.training.refusals import refuse_untrainable

KEEP = "train.keep_best=true"


def validation_of(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = run.read_json(run.metrics)["training"]["validation"]
    return found


def loses(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """Measured are these, one after the other."""
    left = iter(losses)
    monkeypatch.setattr(trainer, "losses_by_source", lambda *_: {"a": next(left)})


@pytest.mark.parametrize(
    "settings",
    mostly_slow(
        [
            "train.scope=router train.balance_weight=1000",
            "train.scope=experts train.gradient_checkpointing=true",
            "train.scope=all train.teacher=sources train.packing=documents",
        ],
        "train.scope=all train.teacher=sources train.packing=documents",
    ),
)
def test_a_training_that_gains_nothing_leaves_the_model_as_it_was(
    settings: str,
    copied: Callable[[str], RunFolder],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Bit for bit; it stops early and says why."""
    run = copied("qwen2")
    loses(monkeypatch, [1.0, 2.0, 1.5])
    pipeline.train(run, [KEEP, *settings.split()])
    before, after = tensors_of(run.checkpoint), tensors_of(run.trained)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    found, steps = validation_of(run), run.read_json(run.metrics)["training"]["steps"]
    assert (found["chosen_step"], found["planned_steps"], steps) == (0, 7, 4)
    points = [(point["step"], point["loss"]) for point in found["curve"]]
    assert points == [(0, 1.0), (2, 2.0), (4, 1.5)]
    said = [message for message in caplog.messages if "gained nothing" in message]
    assert len(said) == 1
    assert "1.000 before, 1.500 at best after (4 of 7 steps)" in said[0]
    assert "Lower train.learning_rate" in said[0]
    pipeline.verify(run)


def test_the_best_weights_are_put_back_after_a_kill_too(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of seven saved states is the second, and two are kept. A run that was killed and
    moved to another folder ends in the same bytes. Temperature scaling is of the weights kept."""
    settings = [KEEP, "train.checkpoints=7", "train.temperature_scaling=0.05"]
    losses = [3.0, 2.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    run, cut = copied("llama"), copied("llama")
    seen: list[dict[str, Tensor]] = []
    restore = run_module.restore_best

    def restored(run: RunFolder, model: Any, state: Any) -> None:
        saved = {path.name for path in run.training.glob("checkpoint-*")}
        assert saved == {"checkpoint-2", "checkpoint-7"}
        restore(run, model, state)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        seen.append(load_clean(run.training / "checkpoint-2").state_dict())

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "restore_best", restored)
        loses(patch, losses)
        pipeline.train(run, settings)
    given, best = seen
    assert all(torch.equal(given[name], best[name]) for name in best)
    assert validation_of(run)["chosen_step"] == 2
    begin = TrainingProgress.on_step_begin

    def killed(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 5:
            raise Killed
        begin(self, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "on_step_begin", killed)
        loses(patch, losses)
        with pytest.raises(Killed):
            pipeline.train(cut, settings)
    moved = RunFolder(cut.root.rename(cut.root.with_name("moved")))
    loses(monkeypatch, losses[6:])
    pipeline.train(moved, settings, resume=True)
    assert hash_folder(moved.trained) == hash_folder(run.trained)
    assert validation_of(moved) == validation_of(run)
    pipeline.verify(moved)


def test_a_training_whose_last_step_is_best_is_not_touched(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring changes no step: bit for bit what the same text gives without it."""
    run, plain = copied("llama"), copied("llama")
    pipeline.train(run, [KEEP])
    assert validation_of(run)["chosen_step"] == 7
    monkeypatch.setattr(trainer, "_validation", lambda *_: {})
    monkeypatch.setattr(run_module, "restore_best", lambda *_: None)
    pipeline.train(plain, [KEEP])
    assert validation_of(plain)["curve"] == []
    assert hash_folder(run.trained) == hash_folder(plain.trained)
    one, other = (r.read_json(r.metrics)["training"] for r in (run, plain))
    assert one["curve"] == other["curve"]


def test_validation_losses_are_of_text_that_nobody_else_sees(
    copied: Callable[[str], RunFolder],
) -> None:
    """The first point is the built model's loss by source, by hand. No document is trained on or
    held out: each begins with a number of its own."""
    run = copied("llama")
    settings = [KEEP, "train.tokens=8192", "train.checkpoints=1"]
    pipeline.train(run, settings)
    recipe = load_recipe(run.recipe, settings)
    sources = open_sources(recipe)
    texts, tokenizer = Texts(recipe, sources), sources[0].tokenizer
    text = texts.training_validation()
    share = validation_windows_per_source(recipe, 3)
    assert share == 8192 // 16 // 64 // 3 > 1
    first, model = validation_of(run)["curve"][0], load_clean(run.checkpoint)
    assert validation_of(run)["tokens"] == 3 * 64 * share
    for name, pieces in text.items():
        nats = []
        for tokens, _ in pieces.batches(1):  # one document
            with torch.inference_mode():
                logits = model(input_ids=tokens).logits
            nats.append(cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none"))
        assert first["losses"][name] == pytest.approx(float(torch.cat(nats).mean()), abs=1e-5)
    assert first["loss"] == pytest.approx(sum(first["losses"].values()) / 3)
    held_out, trained_on = texts.held_out_text(), texts.training_text(run.work)
    for number, name in enumerate("abc"):
        own = [n for n in range(len(trained_on)) if int(trained_on.owners[n]) == number]
        alone = [texts_of[name].tokens[None] for texts_of in (text, held_out)]
        sides = *alone, trained_on.tokens(own)
        numbers = [
            {
                found
                for ids in side
                for found in re.findall(r"<s>(\d+) ", str(tokenizer.decode(ids)))
            }
            for side in sides
        ]
        assert all(numbers)
        assert not any(one & other for one, other in itertools.combinations(numbers, 2))


def test_what_it_cannot_do_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_recipe(tmp_path, count=2)
    rows = (tmp_path / "b.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text(f"{rows[0]}\n")
    recipe = load_recipe(path, [KEEP])
    with pytest.raises(TextError, match=r"training text of b: a single document; train.keep_best"):
        Texts(recipe, open_sources(recipe)).refuse_short_training_text()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refuse_untrainable(load_recipe(path))
    with pytest.raises(RecipeError, match=r"train.keep_best: .*FSDP.*keep_best: false"):
        refuse_untrainable(recipe)
