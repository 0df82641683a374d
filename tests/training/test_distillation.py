"""The sources as teachers; what is measured while training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from checks import mostly_slow
from conftest import make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.errors import RunFolderError
from symphony_moe.files import hash_folder
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_stock
from symphony_moe.text import memory_maps
from symphony_moe.text.texts import Texts
from symphony_moe.training import distillation
from symphony_moe.training.callbacks import TrainingProgress
from symphony_moe.training.distillation import Teachers, divergence
from symphony_moe.training.trainer import MoETrainer

SHORT = ["train.tokens=512"]
TEACHER = [*SHORT, "train.teacher=sources"]


def curve(run: RunFolder) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.read_json(run.metrics)["training"]["curve"]
    return found


def by_hand(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over the vocabulary of p log(p / q), in float64."""
    p = torch.softmax(teacher.double() / temperature, dim=-1)
    q = torch.softmax(student.double() / temperature, dim=-1)
    return (p * (p / q).log()).sum(dim=-1) * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_divergence_is_the_textbooks(temperature: float) -> None:
    student, teacher = torch.randn(2, 50, 30, generator=torch.Generator().manual_seed(0)) * 3
    found = divergence(student, teacher, None, temperature)
    assert torch.allclose(found.double(), by_hand(student, teacher, temperature), atol=1e-5)
    assert float(divergence(student, student, None, temperature).abs().max()) < 1e-6


def test_a_teacher_has_no_opinion_of_tokens_that_it_lacks() -> None:
    student, teacher = torch.randn(2, 50, 30, generator=torch.Generator().manual_seed(0)) * 3
    known = torch.ones(30, dtype=torch.bool)
    known[[3, 7, 29]] = False
    found = divergence(student, teacher, known, 1.0)
    assert torch.allclose(found.double(), by_hand(student[:, known], teacher[:, known]), atol=1e-5)
    changed = teacher.clone()
    changed[:, ~known] = 100.0
    assert torch.equal(divergence(student, changed, known, 1.0), found)


def expected_first_loss(
    run: RunFolder, overrides: list[str], weight: float, temperature: float
) -> tuple[float, float]:
    """(loss, divergence) of the first step's four windows, from stock models alone."""
    recipe = load_recipe(run.recipe, overrides)
    sources = open_sources(recipe)
    text = Texts(recipe, sources).training_text(run.work)
    batch, owners = text.tokens(range(4)), text.owners[:4].tolist()
    dense = [
        AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
        for source in sources
    ]
    model = load_stock(run.checkpoint)
    with torch.inference_mode():
        output: Any = model(input_ids=batch, output_router_logits=True)
        theirs = torch.cat([dense[o](batch[n : n + 1]).logits for n, o in enumerate(owners)])
    # The first token of a document is nobody's target.
    asked = text.positions(range(4))[:, 1:] > 0
    ours = output.logits[:, :-1][asked]
    together = by_hand(ours, theirs[:, :-1][asked], temperature).mean()
    plain = float(cross_entropy(ours, batch[:, 1:][asked]))
    balance = recipe.train.balance_weight * float(output.aux_loss)
    return (1 - weight) * plain + weight * float(together) + balance, float(together)


@pytest.mark.parametrize(
    ("variant", "weight", "temperature"),
    mostly_slow(
        [
            (variant, *how)
            for variant in ("llama", "qwen2", "qwen3")
            for how in ((0.7, 1.0), (1.0, 2.0), (0.0, 1.0))
        ],
        ("llama", 0.7, 1.0),
        ("llama", 0.0, 1.0),
        ("qwen2", 1.0, 2.0),
    ),
)
def test_the_loss_is_a_mixture(
    weight: float, temperature: float, variant: str, copied: Callable[[str], RunFolder]
) -> None:
    run = copied(variant)
    overrides = [
        *TEACHER,
        f"train.teacher_weight={weight}",
        f"train.teacher_temperature={temperature}",
        "train.balance_weight=0.3",
    ]
    loss, divergence = expected_first_loss(run, overrides, weight, temperature)
    pipeline.train(run, overrides)
    assert divergence > 0.1
    assert curve(run)[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert curve(run)[0]["divergence"] == pytest.approx(divergence, abs=1e-4)


def test_accumulated_batches_count_once(copied: Callable[[str], RunFolder]) -> None:
    run = copied("llama")
    overrides = [*TEACHER, "train.balance_weight=0"]
    loss, divergence = expected_first_loss(run, overrides, 0.7, 1.0)
    pipeline.train(run, [*overrides, "train.batch_size=1", "train.gradient_accumulation=4"])
    assert curve(run)[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert curve(run)[0]["divergence"] == pytest.approx(divergence, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", mostly_slow(["llama", "qwen2"], "llama"))
def test_teachers_in_turn_give_what_teachers_together_give(
    variant: str, copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit of the first loss and to rounding after that, with room for ten windows, and
    killed and resumed in between."""
    runs = [copied(variant) for _ in range(3)]
    overrides = ["train.tokens=2048", "train.teacher=sources"]
    pipeline.train(runs[0], [*overrides, "train.teacher_loading=together"])
    in_turn = [*overrides, "train.teacher_loading=in-turn"]
    monkeypatch.setattr(distillation, "_WAITING_BYTES", 10 * 64 * 32 * 4)
    prepared: list[int] = []
    prepare = Teachers._prepare

    def seen(self: Teachers, first: int) -> None:
        prepared.append(first)
        prepare(self, first)

    monkeypatch.setattr(Teachers, "_prepare", seen)
    pipeline.train(runs[1], in_turn)
    assert prepared == [0, 8, 16, 24]  # whole batches of four windows, no more often than that
    losses = [[entry["loss"] for entry in curve(run)] for run in runs[:2]]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    begin = TrainingProgress.on_step_begin

    def killed(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt
        begin(self, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "on_step_begin", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.train(runs[2], in_turn)
    pipeline.train(runs[2], in_turn, resume=True)
    assert hash_folder(runs[2].trained) == hash_folder(runs[1].trained)
    assert not runs[2].work.exists()


def test_what_is_taught_is_learned(copied: Callable[[str], RunFolder]) -> None:
    """The divergence falls; the sources stay what they are."""
    run = copied("llama")
    recipe = load_recipe(run.recipe)
    before = [hash_folder(source.folder) for source in open_sources(recipe)]
    pipeline.train(run, ["train.tokens=16384", "train.teacher=sources", "train.teacher_weight=1"])
    found = curve(run)
    assert found[-1]["divergence"] < found[0]["divergence"] * 0.7
    assert [hash_folder(source.folder) for source in open_sources(recipe)] == before
    pipeline.verify(run)


def test_teachers_of_a_merged_vocabulary(tmp_path: Path) -> None:
    """A source with fewer tokens teaches no token that it lacks; where the text has one, it is not
    asked."""
    path = make_recipe(tmp_path, "llama", count=2)
    make_model(tmp_path / "models" / "b", "llama", seed=1, vocab_size=304)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models" / "b")
    tokenizer.add_tokens(["<|x|>", "<|y|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "models" / "b")
    # Text of the one without the tokens that has one of them all the same.
    text = tmp_path / "a.jsonl"
    text.write_text(text.read_text().replace("eta", "<|x|>"))
    recipe = load_recipe(path, TEACHER)
    sources = open_sources(recipe)
    known = sources[0].known
    assert known is not None and not bool(known[300:302].any())
    run = pipeline.build(recipe, tmp_path / "run")
    words = Texts(recipe, sources).training_text(run.work)
    batch, owners = words.tokens(range(4)), words.owners[:4].tolist()
    assert bool((batch[[n for n, o in enumerate(owners) if o == 0]] >= 300).any())
    teachers = Teachers(sources, words, tmp_path / "wait", by_documents=False, together=True)
    model = load_stock(run.checkpoint)
    with torch.inference_mode():
        logits = model(input_ids=batch).logits
    goes_on = words.positions(range(4))[:, 1:] > 0
    total, predicted = 0.0, int(goes_on.sum())
    for owner, (rows, theirs) in teachers.logits([0, 1, 2, 3]).items():
        has = sources[owner].known
        ours, wanted = logits[rows][:, :-1].flatten(0, 1), batch[rows][:, 1:].flatten()
        asked = goes_on[rows].flatten()
        asked = asked if has is None else asked & has[wanted]
        columns = slice(None) if has is None else has
        teacher = theirs[:, :-1].flatten(0, 1)[asked][:, columns]
        total += float(by_hand(ours[asked][:, columns], teacher).sum())
    pipeline.train(run, TEACHER)
    assert curve(run)[0]["divergence"] == pytest.approx(total / predicted, abs=1e-4)


@pytest.mark.slow
def test_held_out_losses_on_the_way(copied: Callable[[str], RunFolder]) -> None:
    """At even distances, and without a trace in the training."""
    whole, run = copied("llama"), copied("llama")
    pipeline.train(whole)
    pipeline.train(run, ["train.evaluations=3"])
    assert (
        hash_folder(run.trained)["trained/model.safetensors"]
        == hash_folder(whole.trained)["trained/model.safetensors"]
    )
    training = run.read_json(run.metrics)["training"]
    assert whole.read_json(whole.metrics)["training"]["held_out"] == []
    points = training["held_out"]
    # 7 steps of 4 windows of 64 tokens; the third is the trained model's own evaluation.
    assert [point["tokens"] for point in points] == [3 * 256, 5 * 256]
    # Where that is of softer logits, what was trained is measured before.
    soft = copied("llama")
    pipeline.train(soft, ["train.evaluations=3", "train.temperature_scaling=0.5"])
    *before, last = soft.read_json(soft.metrics)["training"]["held_out"]
    assert before == points and last["tokens"] == 7 * 256
    evaluated = pipeline.evaluate(whole).trained
    assert last["losses"] == pytest.approx(evaluated, abs=1e-5)
    metrics = pipeline.evaluate(run).to_json()
    for domain in ("a", "b", "c", "other"):
        values = [metrics["built"][domain], *(p["losses"][domain] for p in points)]
        values.append(metrics["trained"][domain])
        if domain != "other":
            assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_the_curve_tells_of_the_balance(variant: str, copied: Callable[[str], RunFolder]) -> None:
    run = copied(variant)
    recipe = load_recipe(run.recipe, SHORT)
    windows = Texts(recipe, open_sources(recipe)).training_text(run.work).tokens(range(4))
    model = load_stock(run.checkpoint)
    with torch.inference_mode():
        output: Any = model(input_ids=windows, output_router_logits=True)
    chosen = torch.cat([rows.topk(2).indices.flatten() for rows in output.router_logits])
    pipeline.train(run, SHORT)
    first = curve(run)[0]
    assert first["balance"] == pytest.approx(float(output.aux_loss) / 2, abs=1e-4)
    for number, name in enumerate("abc"):
        share = float((chosen == number).double().mean())
        assert first[f"share/{name}"] == pytest.approx(share, abs=1e-6)


def test_the_report_is_of_the_recipe_that_was_trained(copied: Callable[[str], RunFolder]) -> None:
    run = copied("llama")
    pipeline.evaluate(run)
    before = pipeline.report(run).read_text()
    pipeline.train(run, [*SHORT, "train.teacher=sources"])
    pipeline.evaluate(run)
    after = pipeline.report(run).read_text()
    assert "teacher: none" in before and "teacher: sources" not in before
    assert "teacher: sources" in after and "teacher: none" not in after


def test_the_text_of_a_training_is_on_record(copied: Callable[[str], RunFolder]) -> None:
    digests = []
    for overrides in ([], ["train.teacher=sources"], ["train.batch_size=2"], SHORT):
        run = copied("llama")
        pipeline.train(run, overrides)
        digests.append(run.read_json(run.metrics)["training"]["text"])
    assert digests[0] == digests[1] == digests[2] != digests[3]


def test_running_out_of_memory_is_said_in_words(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied("llama")
    before = hash_folder(run.checkpoint)

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't "
            "allocate memory: you tried to allocate 9 bytes."
        )

    begin = TrainingProgress.on_step_begin

    def at_step(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 5:
            full()
        begin(self, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "on_step_begin", at_step)
        with pytest.raises(RunFolderError, match=r"out of memory at step 6: lower train\.batch"):
            pipeline.train(run)
    assert hash_folder(run.checkpoint) == before and not run.trained.exists()
    pipeline.train(run, resume=True)
    assert run.trained.is_dir()


def test_weights_that_are_no_numbers_are_not_saved(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved last can be gone on from."""
    run, whole = copied("llama"), copied("llama")
    pipeline.train(whole)
    save = MoETrainer._save_checkpoint

    def broken(self: Any, model: Any, trial: Any) -> None:
        if self.state.global_step == 4:
            next(model.parameters()).data[0] = torch.nan
        save(self, model, trial)

    with monkeypatch.context() as patch:
        patch.setattr(MoETrainer, "_save_checkpoint", broken)
        with pytest.raises(RunFolderError, match="diverged by step 4"):
            pipeline.train(run)
    assert [path.name for path in run.training.glob("checkpoint-*")] == ["checkpoint-2"]
    pipeline.train(run, resume=True)
    assert hash_folder(run.trained) == hash_folder(whole.trained)


def test_computing_activations_twice_changes_no_number(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are computed twice: once for the loss, and once more for the gradient."""
    losses, passes = [], []
    run_attention = MixtralAttention.forward

    def counted(self: Any, *inputs: Any, **named: Any) -> Any:
        passes.append(self.training)
        return run_attention(self, *inputs, **named)

    monkeypatch.setattr(MixtralAttention, "forward", counted)
    for setting in ([], ["train.gradient_checkpointing=true"]):
        run = copied("llama")
        pipeline.train(run, [*SHORT, *setting])
        losses.append([entry["loss"] for entry in curve(run)] + [sum(passes)])
        passes.clear()
    assert losses[1][:-1] == pytest.approx(losses[0][:-1], abs=1e-6)
    assert losses[1][-1] == 2 * losses[0][-1] > 0


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_attention_within_documents(variant: str, copied: Callable[[str], RunFolder]) -> None:
    """The first loss is the mean over the documents' own tokens, each document read alone; the
    teachers read them so too."""
    run = copied(variant)
    overrides = [*TEACHER, "train.packing=documents", "train.balance_weight=0"]
    recipe = load_recipe(run.recipe, overrides)
    sources = open_sources(recipe)
    text = Texts(recipe, sources).training_text(run.work)
    model = load_stock(run.checkpoint)
    dense = [
        AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
        for source in sources
    ]
    nats, divergences = [], []
    for number in range(4):
        tokens, places = text.tokens([number])[0], text.positions([number])[0]
        starts = [n for n, place in enumerate(places.tolist()) if place == 0]
        for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            document = tokens[begin:end][None]
            with torch.inference_mode():
                ours = model(document).logits[0, :-1]
                theirs = dense[int(text.owners[number])](document).logits[0, :-1]
            nats.append(cross_entropy(ours, document[0, 1:], reduction="none"))
            divergences.append(by_hand(ours, theirs))
    assert len(nats) > 4  # some window has two documents
    loss, together = (float(torch.cat(parts).mean()) for parts in (nats, divergences))
    pipeline.train(run, overrides)
    first = curve(run)[0]
    assert first["divergence"] == pytest.approx(together, abs=1e-4)
    assert first["loss"] == pytest.approx(0.3 * loss + 0.7 * together, abs=1e-4)


def test_large_text_trains_from_files(
    copied: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same windows, so the same weights, and nothing is left."""
    in_memory, on_disk = copied("llama"), copied("llama")
    pipeline.train(in_memory)
    monkeypatch.setattr(memory_maps, "_IN_MEMORY", 0)
    written: list[Path] = []
    publish = memory_maps.publish

    def seen(staged: Path, final: Path) -> None:
        written.append(final)
        publish(staged, final)

    monkeypatch.setattr(memory_maps, "publish", seen)
    pipeline.train(on_disk)
    assert len(written) == 3
    assert hash_folder(on_disk.trained) == hash_folder(in_memory.trained)
    assert not on_disk.work.exists()
