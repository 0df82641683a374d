"""Losses and routing are what one would work out by hand, on text that nobody trained on."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from checks import mostly_slow, random_windows
from conftest import VARIANTS, make_model, make_recipe, make_tokenizer, router_of
from symphony_moe import pipeline
from symphony_moe.cli import main
from symphony_moe.errors import RunFolderError, TextError
from symphony_moe.evaluation import losses as losses_module
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.settings import Recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.source import Source
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Encoder, Pieces, WindowDraw, draw_pieces, joined


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pieces_of(text: Pieces) -> list[Tensor]:
    """Every document, or piece of a long one, by itself."""
    begins = torch.where(text.positions == 0)[0].tolist()
    return list(text.tokens.tensor_split(begins[1:]))


@torch.inference_mode()
def loss_by_hand(model: Any, windows: Tensor | Pieces) -> float:
    """Piece by piece, token by token, in float64."""
    losses = []
    for window in windows if isinstance(windows, Tensor) else pieces_of(windows):
        logits = model(input_ids=window[None]).logits[0].double()
        for place in range(len(window) - 1):
            losses.append(float(cross_entropy(logits[place], window[place + 1])))
    return sum(losses) / len(losses)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows of 24 tokens at once, so that 5 windows are three uneven batches."""
    monkeypatch.setattr("symphony_moe.sources.stock._AT_ONCE", 48)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_losses_are_the_mean_over_predicted_tokens(
    variant: str, built: Callable[[str], RunFolder], small_batches: None
) -> None:
    """Every token of every window but its first, whatever the batches and whatever the domain's
    size; to 1e-5."""
    model = load(built(variant).checkpoint)
    windows = {"x": random_windows(0, 5, 24), "y": random_windows(1, 2, 17)}
    losses, _ = losses_and_routing(model, windows)
    assert set(losses) == {"x", "y"}
    for domain, text in windows.items():
        assert losses[domain] == pytest.approx(loss_by_hand(model, text), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_routing_shares_are_the_hand_count(
    variant: str, built: Callable[[str], RunFolder], small_batches: None
) -> None:
    """Every layer's shares sum to one and are the count of the top_k of the router's own input
    times its matrix."""
    model = load(built(variant).checkpoint)
    windows = random_windows(2, 5, 24)
    inputs: list[Tensor] = []
    hooks = [
        router_of(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    _, routing = losses_and_routing(model, {"x": windows})
    shares = routing["x"].share.tolist()
    assert len(shares) == len(inputs) == 2
    for layer, hidden in enumerate(inputs):
        counts = [0, 0, 0]
        scores = hidden @ router_of(model.model.layers[layer]).weight.T
        for token in scores.reshape(-1, 3).tolist():
            for expert in sorted(range(3), key=lambda e: token[e])[-2:]:
                counts[expert] += 1
        found = shares[layer]
        assert sum(counts) == 2 * 5 * 24
        assert sum(found) == pytest.approx(1, abs=5e-6)
        assert found == pytest.approx([count / sum(counts) for count in counts], abs=1e-6)
    assert shares[0] != shares[1]


def test_a_dense_model_has_losses_and_no_routing(recipes: Callable[[str], Path]) -> None:
    """The sources are evaluated by the same function."""
    model = load(recipes("qwen3").parent / "models" / "b")
    windows = random_windows(3, 2, 20)
    losses, shares = losses_and_routing(model, {"x": windows})
    assert shares == {}
    assert losses["x"] == pytest.approx(loss_by_hand(model, windows), rel=1e-5)


# ------------------------------------------------------------------------------- held-out text


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[Source], set[int]]:
    """A recipe whose every document has a byte of its own, so that tokens tell where they are from;
    its sources; the tokens of the documents that are held out."""
    path = make_recipe(
        tmp_path_factory.mktemp("telling"),
        "llama",
        2,
        calibration={"tokens": 4000, "sequence_length": 16},
        train={"tokens": 4000, "sequence_length": 16},
        evaluation={"tokens": 600, "sequence_length": 16, "holdout": 0.3, "extra": {}},
    )
    texts = [chr(number) * 50 for number in range(33, 127)]
    for source, part in (("a", texts[::2]), ("b", texts[1::2])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (path.parent / f"{source}.jsonl").write_text(rows)
    recipe = load_recipe(path)
    sources = open_sources(recipe)
    held_out = {
        sources[0].tokenizer(text, add_special_tokens=False)["input_ids"][0]
        for text in texts
        if is_held_out(text, 0.3)
    }
    assert 10 < len(held_out) < 50
    return recipe, sources, held_out


def letters_of(windows: Tensor) -> set[int]:
    """The tokens, but BOS and EOS."""
    return set(windows.flatten().tolist()) - {256, 257}


def test_held_out_text_is_for_evaluation_only(
    telling: tuple[Recipe, list[Source], set[int]], tmp_path: Path
) -> None:
    """No token of a held-out document is calibrated or trained on, and evaluation sees no other."""
    recipe, sources, held_out = telling
    texts = Texts(recipe, sources)
    evaluated = {name: letters_of(text.tokens) for name, text in texts.held_out_text().items()}
    assert set().union(*evaluated.values()) <= held_out
    assert not evaluated["a"] & evaluated["b"]
    assert all(len(tokens) > 5 for tokens in evaluated.values())
    calibrated = joined(list(texts.calibration_windows().values())).windows
    text = texts.training_text(tmp_path)
    for windows in (calibrated, text.tokens(range(len(text)))):
        seen = letters_of(windows)
        assert not seen & held_out
        assert len(seen) > 40


def test_every_extra_document_is_evaluated(
    telling: tuple[Recipe, list[Source], set[int]], tmp_path: Path
) -> None:
    """Extra domains are never trained on, so none of their text is set aside."""
    recipe, sources, _ = telling
    path = tmp_path / "extra.txt"
    path.write_text("\n\n".join(chr(number) * 50 for number in range(33, 83)))
    settings = recipe.evaluation.model_copy(update={"extra": {"x": str(path)}, "tokens": 10_000})
    windows = Texts(recipe.model_copy(update={"evaluation": settings}), sources).held_out_text()
    assert list(windows) == ["a", "b", "x"]
    letters = [chr(token) for token in letters_of(windows["x"].tokens) if token < 100]
    assert len(letters_of(windows["x"].tokens)) >= 50 and letters


def test_a_domain_without_held_out_text_is_refused(
    telling: tuple[Recipe, list[Source], set[int]],
) -> None:
    """By the name of the domain."""
    recipe, sources, _ = telling
    settings = recipe.evaluation.model_copy(update={"holdout": 1e-9})
    with pytest.raises(TextError, match="held-out text of a"):
        Texts(recipe.model_copy(update={"evaluation": settings}), sources).held_out_text()


# ------------------------------------------------------------------------------------- the run


def test_metrics_hold_every_model_on_every_domain(
    recipes: Callable[[str], Path], built: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    """`metrics.json` as docs/design.md lays it out; each number is that model's on that text; what
    was there before stays."""
    shutil.copytree(built("llama").root, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    recipe = load_recipe(recipes("llama"))
    windows = Texts(recipe, open_sources(recipe)).held_out_text()
    pipeline.evaluate(run)
    metrics = run.read_json(run.metrics)
    assert set(metrics["sources"]) == {"a", "b", "c"}
    assert "trained" not in metrics
    assert "alignment" in metrics and "build_seconds" in metrics["timing"]
    models = {name: recipes("llama").parent / "models" / name for name in "abc"}
    found = [(metrics["sources"][name], folder) for name, folder in models.items()]
    for losses, folder in [*found, (metrics["built"], run.checkpoint)]:
        model = load(folder)
        assert list(losses) == ["a", "b", "c", "other"]
        for domain, loss in losses.items():
            assert loss == pytest.approx(loss_by_hand(model, windows[domain]), rel=1e-5)
    routing = metrics["routing"]["built"]
    assert routing["experts"] == ["a", "b", "c"]
    assert routing["tokens"] == {domain: len(text.tokens) for domain, text in windows.items()}
    _, found_routing = losses_and_routing(load(run.checkpoint), windows)
    for domain, found_here in found_routing.items():
        assert torch.tensor(routing["share"][domain]) == pytest.approx(found_here.share, abs=1e-6)


@pytest.mark.parametrize("variant", mostly_slow(["llama", "mistral", "qwen2", "qwen3"], "qwen2"))
def test_losses_are_those_of_stock_document_by_document(
    variant: str, recipes: Callable[[str], Path], copied: Callable[[str], RunFolder]
) -> None:
    """Every held-out document read by itself, as its own tokenizer spells it, EOS at its end, its
    first token not asked for: the mean over all tokens, within rounding. Nothing of this project
    is in the reference."""
    run = copied(variant)
    pipeline.evaluate(run, ["evaluation.tokens=100000", "evaluation.sequence_length=256"])
    metrics = run.read_json(run.metrics)
    home = recipes(variant).parent
    rows = [json.loads(line)["text"] for line in (home / "b.jsonl").read_text().splitlines()]
    digests = {text: hashlib.sha256(text.encode()).digest() for text in rows}
    held_out = [t for t, d in digests.items() if int.from_bytes(d[:8], "big") < 0.1 * 2**64]
    assert len(held_out) > 10
    tokenizer = AutoTokenizer.from_pretrained(home / "models" / "b")
    for folder, found in (
        (home / "models" / "b", metrics["sources"]["b"]["b"]),
        (run.checkpoint, metrics["built"]["b"]),
    ):
        model, total, count = load(folder), 0.0, 0
        for text in held_out:
            ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            assert len(ids) <= 256
            x = torch.tensor([ids])
            with torch.inference_mode():
                total += float(model(input_ids=x, labels=x).loss) * (len(ids) - 1)
            count += len(ids) - 1
        assert found == pytest.approx(total / count, rel=1e-5)


def test_models_whose_positions_depend_on_the_length_read_one_document_at_a_time(
    tmp_path: Path,
) -> None:
    """Dynamic RoPE: a document's loss is what it is alone, also beside longer ones."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = make_model(tmp_path, "llama", 0, rope_parameters=rope, max_position_embeddings=16)
    encoder = Encoder.of(AutoTokenizer.from_pretrained(folder))
    documents = ["alpha beta", "gamma delta " * 12, "x" * 30]
    text = draw_pieces("w", documents, encoder, WindowDraw(64, 32, seed=0))
    model = load(folder)
    losses, _ = losses_and_routing(model, {"x": text})
    assert losses["x"] == pytest.approx(loss_by_hand(load(folder), text), rel=1e-5)


def test_a_long_document_is_read_in_pieces(tmp_path: Path) -> None:
    """Each no longer than `sequence_length`, and none goes on in another document's."""
    make_tokenizer(tmp_path)
    encoder = Encoder.of(AutoTokenizer.from_pretrained(tmp_path))
    documents = ["0" * 20, "1" * 5, "2" * 30, "3"]
    text = draw_pieces("w", documents, encoder, WindowDraw(64, 8, seed=0))
    assert len(text.tokens) == 64  # 22 + 7 + 32 + 3
    found = [piece.tolist() for piece in pieces_of(text)]
    assert max(map(len, found)) == 8
    assert [tokens for piece in found for tokens in piece] == text.tokens.tolist()
    assert all(256 not in piece[1:] for piece in found)
    assert sum(piece[0] == 256 for piece in found) == 4
    for at_once in (1, 8, 20, 1000):
        batches = list(text.batches(at_once))
        assert torch.equal(torch.cat([tokens[0] for tokens, _ in batches]), text.tokens)
        assert all(positions[0, 0] == 0 for _, positions in batches)
        assert all(tokens.shape[1] <= max(at_once, 8) for tokens, _ in batches)


def test_evaluation_may_change_after_the_build(
    built: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    """Another amount of text, or another length; nothing else."""
    shutil.copytree(built("llama").root, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    pipeline.evaluate(run, ["evaluation.tokens=128", "evaluation.sequence_length=32"])
    assert run.read_json(run.metrics)["routing"]["built"]["tokens"]["a"] == 128


def test_there_must_be_a_checkpoint_to_evaluate(
    built: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    """A build that was cut short is no model."""
    shutil.copytree(built("llama").root, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.checkpoint.rename(run.root / "elsewhere")
    with pytest.raises(RunFolderError, match="no finished checkpoint"):
        pipeline.evaluate(run)


def test_continuations_begin_where_held_out_text_does(
    recipes: Callable[[str], Path], built: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    """One per domain: the beginning of a held-out document, and what the model makes of it; the
    same every time, and the trained model's where there is one."""
    recipe = load_recipe(recipes("llama"))
    sources = open_sources(recipe)
    windows = Texts(recipe, sources).held_out_text()
    found = pipeline.generate(built("llama"))
    assert [domain for domain, _, _ in found] == ["a", "b", "c"]
    for domain, before, after in found:
        expected = sources[0].tokenizer.decode(
            windows[domain].tokens[:48], skip_special_tokens=True
        )
        assert before == expected and after
    assert pipeline.generate(built("llama")) == found
    shutil.copytree(built("llama").root, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    shutil.copytree(recipes("llama").parent / "models" / "b", run.trained)
    trained = pipeline.generate(run)
    assert [before for _, before, _ in trained] == [before for _, before, _ in found]
    assert trained != found


@pytest.mark.slow
def test_what_another_run_says_of_the_sources(
    built: Callable[[str], RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken over where sources, text and software are the same, and only there."""
    shutil.copytree(built("llama").root, tmp_path / "first")
    shutil.copytree(built("llama").root, tmp_path / "second")
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    own = pipeline.evaluate(first).to_json()
    measured: list[str] = []
    real = losses_module._evaluate_sources

    def counted(*arguments: Any) -> Any:
        measured.append("again")
        return real(*arguments)

    monkeypatch.setattr(losses_module, "_evaluate_sources", counted)
    found = pipeline.evaluate(second, like=first).to_json()
    assert measured == []
    assert (found["sources"], found["cka"]) == (own["sources"], own["cka"])
    # Other text.
    pipeline.evaluate(second, ["evaluation.tokens=128"], like=first)
    assert measured == ["again"]
    # The same text under another name, or under the other's.
    data = str(first.root.parent / "other.txt")
    Path(data).write_text("\n\n".join(f"document {n} " * 20 for n in range(20)))
    other = first.read_recipe().evaluation.extra["other"]
    for extra in ({"renamed": other}, {"x": other, "y": data}, {"y": other, "x": data}):
        changed = [f"evaluation.extra={json.dumps(extra)}"]
        found = pipeline.evaluate(second, changed, like=first).to_json()
        assert set(found["sources"]["a"]) == set(found["built"]) == {"a", "b", "c", *extra}
        shutil.copyfile(second.metrics, first.metrics)
    assert measured == ["again"] * 4
    pipeline.evaluate(first)
    measured[:] = ["again"]
    # Other weights, other software.
    manifest = first.read_json(first.manifest)
    changes: list[dict[str, Any]] = [
        {"sources": manifest["sources"] | {"a": {}}},
        {"versions": {}},
    ]
    for change in changes:
        first.update_json(first.manifest, change)
        pipeline.evaluate(second, like=first)
        first.update_json(first.manifest, manifest)
    assert measured == ["again"] * 3
    # Another vocabulary: another anchor's.
    recipe = first.recipe.read_text()
    first.recipe.write_text(recipe.replace("anchor: a", "anchor: b"))
    assert first.recipe.read_text() != recipe
    pipeline.evaluate(second, like=first)
    assert measured == ["again"] * 4


def test_a_run_to_take_over_from_must_be_one(
    built: Callable[[str], RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(built("llama").root)
    assert main(["evaluate", run, "--sources-from", str(tmp_path)]) == 2
    assert "no finished checkpoint" in capsys.readouterr().err
    assert main(["evaluate", run, "--tasks", "x", "--sources-from", run]) == 2
    assert "--sources-from: has no effect with --tasks" in capsys.readouterr().err
