"""Phi-3, whose fused matrices are read in parts, as Mistral's."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checks import EXACT, difference, load_clean, logits_of, mostly_slow, opened, random_text
from conftest import VARIANTS, make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.errors import SourceError
from symphony_moe.model.families import ALIASES, HELD_BY_NONE
from symphony_moe.recipe.load import load_recipe

LONG: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "partial_rotary_factor": 1.0,
    },
    "original_max_position_embeddings": 64,
}
PART: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
}
LONG_PART: dict[str, Any] = LONG | {
    "rope_parameters": LONG["rope_parameters"]
    | {
        "short_factor": [1.0, 1.1, 1.2],
        "long_factor": [1.5, 2.0, 3.0],
        "partial_rotary_factor": 0.75,
    }
}
"""As Phi-4-mini has it: longrope, and a factor of attention that only what is turned has."""


@pytest.fixture
def phi3(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Any]:
    settings = {"model_type": "phi3"} | getattr(request, "param", {})
    monkeypatch.setitem(VARIANTS, "phi3", settings)
    return settings


@pytest.mark.parametrize(
    "phi3",
    mostly_slow([{"sliding_window": 16}, LONG, PART, LONG_PART], LONG_PART),
    ids=["window", "long", "part", "long part"],
    indirect=True,
)
def test_copies_of_a_phi3_give_the_dense_model(phi3: dict[str, Any], tmp_path: Path) -> None:
    """Law 2, on windows and on both sides of longrope's change; `verify` compares what is read with
    stock Phi-3."""
    recipe = make_recipe(tmp_path, "phi3", count=2, method="harmonized")
    for name in ("a", "b"):
        make_model(tmp_path / "models" / name, "phi3", 0)
    run = pipeline.build(load_recipe(recipe), tmp_path / "run")
    pipeline.verify(run)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "a").eval()
    moe = load_clean(run.checkpoint)
    assert moe.config.model_type == "mixtral"
    for length in (40, 120):
        text = random_text(0, 2, length)
        assert difference(logits_of(moe, text), logits_of(dense, text)) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize(
    "phi3", [{"sliding_window": 16}, PART], ids=["window", "part"], indirect=True
)
def test_a_phi3_goes_the_whole_way(phi3: dict[str, Any], tmp_path: Path) -> None:
    """Fitted, trained, evaluated; with an expert more, and one replaced."""
    recipe = make_recipe(tmp_path, "phi3", method="harmonized", fit={"epochs": 1})
    run = pipeline.run(load_recipe(recipe), tmp_path / "run")
    pipeline.verify(run)
    metrics = run.read_json(run.metrics)
    assert metrics["training"]["curve"][-1]["loss"] < metrics["training"]["curve"][0]["loss"]
    model, data = str(make_model(tmp_path / "new", "phi3", 9)), str(tmp_path / "a.jsonl")
    more = pipeline.add(run, "new", tmp_path / "more", model=model, data=data)
    pipeline.verify(more, deep=True)
    other = pipeline.replace(run, "b", tmp_path / "other", model=model, data=data)
    pipeline.verify(other, deep=True)


def test_a_part_is_its_rows_of_the_fused_matrix(phi3: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "phi3", 0)
    source, stored = opened(folder), load_file(folder / "model.safetensors")
    assert source.config.model_type == ALIASES["phi3"].read_as
    assert source.notes == ("a: a phi3 model, read as mistral",)
    for fused, parts in ALIASES["phi3"].fused.items():
        name = "model.layers.1."
        whole = stored[name + fused]
        assert torch.equal(torch.cat([source.read(name + part) for part in parts]), whole)
        last = source.read(name + parts[-1], slice(3, 5))
        assert torch.equal(last, whole[-len(source.read(name + parts[-1])) :][3:5])
    assert source.num_parameters == sum(tensor.numel() for tensor in stored.values())


def test_a_fused_matrix_of_another_size_is_refused(phi3: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "phi3", 0)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=rf"^a: {name} is \[63, 32\] .* says \[64, 32\]"):
        opened(folder)


def test_a_fused_matrix_that_is_missing_is_named_by_its_parts(
    phi3: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", "phi3", 0)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate_up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"2 tensors are missing .*1\.mlp\.gate_proj"):
        opened(folder)


@pytest.mark.parametrize("phi3", [PART, LONG_PART], ids=["part", "long part"], indirect=True)
def test_rows_that_are_not_turned_are_read_after_each_half_of_those_that_are(
    phi3: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", "phi3", 0)
    source, whole = opened(folder), load_file(folder / "model.safetensors")
    rope, name = phi3["rope_parameters"], "model.layers.1.self_attn."
    plain = rope["rope_type"] == "default"
    order = [0, 1, 4, 5, 2, 3, 6, 7] if plain else [0, 1, 2, 6, 3, 4, 5, 7]
    stays = [order.index(row) for row in ([4, 5, 6, 7] if plain else [6, 7])]
    stored = whole[name + "qkv_proj.weight"].unflatten(0, (-1, 8))[0][order]
    if not plain:
        # As transformers computes longrope's factor of attention.
        longer = source.config.max_position_embeddings / 64
        stored[stays] /= math.sqrt(1 + math.log(longer) / math.log(64))
    assert torch.equal(source.read(name + "q_proj.weight")[:8], stored)
    assert torch.equal(source.read(name + "q_proj.weight", slice(2, 7)), stored[2:7])
    v = source.read(name + "v_proj.weight")
    assert torch.equal(v, whole[name + "qkv_proj.weight"][-len(v) :])


@pytest.mark.parametrize("part", [0.4, 0.1, 1.5])
def test_a_phi3_with_a_number_that_has_no_pair_is_refused(
    part: float, phi3: dict[str, Any], tmp_path: Path
) -> None:
    rope = PART["rope_parameters"] | {"partial_rotary_factor": part}
    folder = make_model(tmp_path / "refused", "phi3", 0, rope_parameters=rope)
    with pytest.raises(
        SourceError, match=r"^a: .*refused cannot become an expert: .*an even count"
    ):
        opened(folder)


def test_an_adapter_of_a_phi3_is_refused(phi3: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "phi3", 0)
    with pytest.raises(SourceError, match=r"fused matrices.*qkv_proj.*leave sources\.a\.adapter"):
        opened(folder, adapter=str(tmp_path / "lora"))


@pytest.mark.parametrize("model_type", [*HELD_BY_NONE, "gpt2"])
def test_a_family_that_no_class_holds_is_refused_with_the_reason(
    model_type: str, tmp_path: Path
) -> None:
    """From its config alone, which may be of a version that this one of transformers lacks."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(SourceError) as raised:
        opened(tmp_path)
    message = str(raised.value)
    assert HELD_BY_NONE.get(model_type, "") in message
    assert f"is a {model_type!r} model" in message and "llama" in message and "phi3" in message
    assert len(message) < 500 + len(str(tmp_path))
