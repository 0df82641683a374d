"""Samples are what the stock model's routers say of the first tokens of held-out documents."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checks import mostly_slow, random_windows
from conftest import VARIANTS, make_tokenizer, router_of
from symphony_moe import pipeline
from symphony_moe.errors import RunFolderError
from symphony_moe.evaluation.samples import beginnings, choices_of, token_texts
from symphony_moe.files import to_json
from symphony_moe.runs.folder import RunFolder
from symphony_moe.runs.samples import read_samples
from symphony_moe.text.windows import Pieces, as_pieces


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "llama", "granite", "qwen2"))
def test_choices_are_the_argmax_of_the_routers_softmax(
    variant: str, built: Callable[[str], RunFolder]
) -> None:
    """Of every layer, and of the mean over layers; by the router's own input times its matrix."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        built(variant).checkpoint, dtype=torch.float32
    ).eval()
    text = random_windows(4, 1, 24)[0]
    inputs: list[torch.Tensor] = []
    hooks = [
        router_of(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in model.model.layers
    ]
    (found,) = choices_of(model, {"x": [text]})["x"]
    for hook in hooks:
        hook.remove()
    by_layer = []
    with torch.inference_mode():
        for layer, hidden in zip(model.model.layers, inputs, strict=True):
            router = router_of(layer)
            weight = getattr(router, "layer", router).weight
            by_layer.append(torch.softmax(hidden.reshape(24, -1).float() @ weight.T, dim=-1))
    assert len(found.experts) == len(by_layer) == 2
    for layer, probabilities in enumerate(by_layer):
        assert found.experts[layer] == probabilities.argmax(dim=1).tolist()
        expected = [round(p, 3) for p in probabilities.amax(dim=1).tolist()]
        assert found.probabilities[layer] == pytest.approx(expected, abs=1.01e-3)
    mean = torch.stack(by_layer).mean(dim=0)
    assert found.mean_experts == mean.argmax(dim=1).tolist()
    assert found.mean_probabilities == pytest.approx(mean.amax(dim=1).tolist(), abs=1e-3)


def test_the_first_documents_that_are_long_enough_begin() -> None:
    """Two of them, 64 tokens each; fewer where there are many domains."""
    lengths = [3, 128, 40, 5, 70, 30]  # the second and the third are one document
    tokens = torch.arange(sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    text = Pieces(tokens, positions, 128)
    (one, two) = beginnings({"x": text})["x"]
    assert (one.tolist(), two.tolist()) == (list(range(3, 67)), list(range(176, 240)))
    many = beginnings({str(n): text for n in range(32)})
    assert {len(piece) for pieces in many.values() for piece in pieces} == {32}
    short = beginnings({"x": as_pieces(torch.arange(6).view(2, 3))})
    assert [piece.tolist() for piece in short["x"]] == [[0, 1, 2]]


def test_tokens_add_up_to_the_text_and_a_split_character_stands_at_its_end(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    text = "a \N{EURO SIGN} b"  # three bytes, and as many tokens
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == f"<s>{text}"
    place = texts.index("\N{EURO SIGN}")
    assert texts[place - 2 : place] == ["", ""]


def test_evaluating_writes_samples_of_every_stage_and_training_removes_them(
    run: RunFolder,
) -> None:
    pipeline.evaluate(run)
    samples = read_samples(run)
    assert samples is not None and samples.experts == ["a", "b", "c"]
    assert list(samples.domains) == ["a", "b", "c", "other"]
    for of_domain in samples.domains.values():
        assert len(of_domain) == 2
        for sample in of_domain:
            assert list(sample.choices) == ["built"] and 8 <= len(sample.tokens) <= 64
            assert sample.tokens[0] == "<s>"
    first = run.samples.read_bytes()
    pipeline.evaluate(run)
    assert run.samples.read_bytes() == first
    pipeline.train(run, ["train.tokens=1024"])
    assert read_samples(run) is None
    pipeline.report(run)
    pipeline.evaluate(run)
    trained = read_samples(run)
    assert trained is not None
    assert list(trained.domains["a"][0].choices) == ["built", "trained"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sample: sample["tokens"].pop(), "not one expert for each of 1"),
        (lambda sample: sample["choices"]["built"]["experts"].pop(), "not of the same layers"),
        (lambda sample: sample["choices"]["built"].pop("mean_experts"), "mean_experts"),
        (
            lambda sample: sample["choices"]["built"].update(mean_experts=[0, 9]),
            "beyond 2",
        ),
        (lambda sample: sample["choices"].clear(), "of different stages"),
    ],
)
def test_damaged_samples_are_refused(
    change: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    choices = {
        "experts": [[0, 1]],
        "probabilities": [[0.5, 1.0]],
        "mean_experts": [0, 1],
        "mean_probabilities": [0.5, 1.0],
    }
    sample: Any = {"tokens": ["x", "y"], "choices": {"built": choices}}
    run = RunFolder(tmp_path)
    whole = {"experts": ["a", "b"], "domains": {"d": [copy.deepcopy(sample), sample]}}
    run.samples.write_text(to_json(whole))
    assert read_samples(run) is not None
    change(sample)
    run.samples.write_text(to_json(whole))
    with pytest.raises(RunFolderError, match=f"samples.json: damaged.*{said}"):
        read_samples(run)
