"""`train.average`: the result is the mean of the weights before training and after it that loses
least on validation text."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checks import Killed, load_clean, tensors_of
from conftest import make_recipe
from symphony_moe import pipeline
from symphony_moe.errors import RecipeError, RunFolderError, TextError
from symphony_moe.files import hash_folder
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.text.texts import Texts
from symphony_moe.training import averaging, trainer
from symphony_moe.training.refusals import refuse_untrainable
from symphony_moe.training.validation import losses_by_source

AVERAGE = "train.average=true"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def averaging_of(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = run.read_json(run.metrics)["training"]["averaging"]
    return found


def loses(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> list[dict[str, Tensor]]:
    """Measured are these, one after the other; the weights that were measured."""
    left, seen = iter(losses), list[dict[str, Tensor]]()

    def measured(model: Any, *_: Any) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"a": next(left)}

    monkeypatch.setattr(averaging, "losses_by_source", measured)
    return seen


@pytest.mark.parametrize("scope", ["all", "router"])
def test_the_mean_that_loses_least_is_the_result(
    scope: str,
    copied: Callable[[str], RunFolder],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is measured, from the weights before to those after. What is not trained stays to the
    bit, and the report says what was taken."""
    run = copied("qwen2")
    caplog.set_level("INFO")
    seen = loses(monkeypatch, [2.0, 1.5, 1.25, 1.75, 2.5])
    pipeline.train(run, [AVERAGE, f"train.scope={scope}"])
    before, after = seen[0], seen[-1]
    built = load_clean(run.checkpoint).state_dict()
    assert all(torch.equal(before[name], built[name]) for name in built)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and (scope == "all" or all("gate" in name for name in moved))
    for share, weights in zip(SHARES, seen, strict=True):
        for name, tensor in weights.items():
            expected = (1 - share) * before[name].double() + share * after[name].double()
            torch.testing.assert_close(tensor, expected.to(tensor), rtol=1e-6, atol=1e-7)
            assert name in moved or torch.equal(tensor, before[name])
    written = load_clean(run.trained).state_dict()
    stored = pipeline_dtype(run)
    for name, tensor in written.items():
        assert torch.equal(tensor, seen[2][name].to(stored).to(tensor)), name
    found = averaging_of(run)
    assert found["share"] == 0.5 and found["tokens"] > 0
    points = [(point["share"], point["loss"]) for point in found["curve"]]
    assert points == list(zip(SHARES, [2.0, 1.5, 1.25, 1.75, 2.5], strict=True))
    assert any("weights averaged, 50 % of the trained model" in said for said in caplog.messages)
    pipeline.verify(run)
    pipeline.evaluate(run)
    page = pipeline.report(run).read_text(encoding="utf-8")
    assert "50 % of the trained ones (validation loss 1.250; 2.000 before training, 2.500" in page


def pipeline_dtype(run: RunFolder) -> torch.dtype:
    tensors = tensors_of(run.checkpoint)
    return next(iter(tensors.values())).dtype


def test_a_training_that_gains_nothing_leaves_the_model_as_it_was(
    copied: Callable[[str], RunFolder],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = copied("llama")
    loses(monkeypatch, [1.0, 1.1, 1.2, 1.3, 1.4])
    pipeline.train(run, [AVERAGE])
    before, after = tensors_of(run.checkpoint), tensors_of(run.trained)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert averaging_of(run)["share"] == 0
    said = [message for message in caplog.messages if "gained nothing" in message]
    assert len(said) == 1 and "1.000 before, 1.400 after" in said[0]


def test_a_model_that_is_best_as_it_was_trained_is_not_touched(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what the same text gives without averaging; a mean that is NaN is none."""
    run, plain = copied("llama"), copied("llama")
    with monkeypatch.context() as patch:
        loses(patch, [2.0, math.nan, 1.5, 1.4, 1.3])
        pipeline.train(run, [AVERAGE])
    assert averaging_of(run)["share"] == 1
    monkeypatch.setattr("symphony_moe.training.run.average_weights", lambda *_: None)
    pipeline.train(plain, [AVERAGE])
    assert hash_folder(run.trained) == hash_folder(plain.trained)


def test_the_losses_are_those_of_the_validation_text(copied: Callable[[str], RunFolder]) -> None:
    """Of the documents that are not trained on; and the first mean is the built model."""
    run = copied("llama")
    settings = [AVERAGE, "train.tokens=8192"]
    pipeline.train(run, settings)
    recipe = load_recipe(run.recipe, settings)
    texts = Texts(recipe, open_sources(recipe))
    text = texts.training_validation()
    found = averaging_of(run)
    assert found["tokens"] == sum(len(pieces.tokens) for pieces in text.values())

    class Alone:
        process_index, num_processes = 0, 1

        def reduce(self, sums: Tensor, how: str) -> Tensor:
            return sums

    losses = losses_by_source(load_clean(run.checkpoint), text, Alone())
    assert found["curve"][0]["losses"] == pytest.approx(losses, abs=1e-5)
    best = min(found["curve"], key=lambda point: point["loss"])
    assert best["share"] == found["share"]
    trained = losses_by_source(load_clean(run.trained), text, Alone())
    assert best["losses"] == pytest.approx(trained, abs=2e-3)  # written in bfloat16


@pytest.mark.parametrize(("best", "end"), [(2, "checkpoint-2"), (0, "checkpoint-7")])
def test_the_best_checkpoint_takes_the_place_of_the_last(
    best: int, end: str, copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `train.keep_best`. Where that is the model before training, the last step's stays, and
    no training ends early: a mean may be better than both."""
    run = copied("llama")
    measured = [3.0, *(1.0 if step == best else 4.0 for step in range(1, 8))]
    left = iter(measured)
    monkeypatch.setattr(trainer, "losses_by_source", lambda *_: {"a": next(left)})
    saved: dict[str, dict[str, Tensor]] = {}
    average = averaging.average_weights

    def watched(run: RunFolder, *rest: Any) -> dict[str, Any]:
        saved["end"] = load_clean(run.training / end).state_dict()
        return average(run, *rest)

    monkeypatch.setattr("symphony_moe.training.run.average_weights", watched)
    seen = loses(monkeypatch, [2.0, 1.5, 1.25, 1.75, 2.5])
    pipeline.train(run, [AVERAGE, "train.keep_best=true", "train.checkpoints=7"])
    assert all(torch.equal(seen[-1][name], tensor) for name, tensor in saved["end"].items())
    training = run.read_json(run.metrics)["training"]
    assert training["steps"] == 7 and training["validation"]["chosen_step"] == (best or 7)


def test_a_training_that_was_killed_before_its_average_goes_on(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last state that was saved, to the same bytes."""
    run, cut = copied("llama"), copied("llama")
    pipeline.train(run, [AVERAGE])

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(averaging, "_tell", killed)
        with pytest.raises(Killed):
            pipeline.train(cut, [AVERAGE])
    assert not cut.trained.exists()
    pipeline.train(cut, [AVERAGE], resume=True)
    assert hash_folder(cut.trained) == hash_folder(run.trained)
    assert averaging_of(cut) == averaging_of(run)


def test_what_it_cannot_do_is_refused(
    copied: Callable[[str], RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source of one document, and a model in shards, before the first step; weights that are
    broken, before they are averaged away."""
    run = copied("llama")
    refuse = averaging.refuse_not_finite

    def broken(weights: dict[str, Tensor], step: int) -> None:
        next(iter(weights.values()))[0] = math.nan
        refuse(weights, step)

    with monkeypatch.context() as patch:
        patch.setattr(averaging, "refuse_not_finite", broken)
        with pytest.raises(RunFolderError, match="training diverged by step 7"):
            pipeline.train(run, [AVERAGE])
    assert not run.trained.exists()

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(averaging, "load_stock", full)
        with pytest.raises(RunFolderError, match=r"train.average: no memory .* --resume"):
            pipeline.train(run, [AVERAGE], resume=True)
    assert not run.trained.exists()
    path = make_recipe(tmp_path, count=2)
    rows = (tmp_path / "b.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text(f"{rows[0]}\n")
    recipe = load_recipe(path, [AVERAGE])
    with pytest.raises(
        TextError, match=r"single document; train.average: .* set train.average: false"
    ):
        Texts(recipe, open_sources(recipe)).refuse_short_training_text()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"train.average: .*FSDP.*average: false"):
        refuse_untrainable(recipe)
