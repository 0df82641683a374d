"""`experts.dense_layers`: layers with one FFN, merged from all sources, and no experts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import symphony_moe.building.build as build_module
from checks import (
    EXACT,
    FFN,
    Killed,
    difference,
    edit_weights,
    load_clean,
    logits_of,
    models_of,
    mostly_slow,
    random_text,
    read_tensors,
    source_ffn,
)
from conftest import make_model, make_recipe, make_text
from symphony_moe import pipeline
from symphony_moe.building.alignment import Alignment
from symphony_moe.errors import RecipeError, SourceMismatch, VerificationError
from symphony_moe.files import hash_folder
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder

DENSE = ["experts.dense_layers=[0]", "output.dtype=float32"]
FIT = ["method=harmonized", "fit.epochs=1"]
VARIANTS = mostly_slow(["llama", "llama-tied-rope3", "qwen2", "qwen2-windows", "qwen3"], "llama")
"""Families whose sources a stock MoE with such layers holds."""


def twins(root: Path, variant: str = "llama") -> Path:
    """A recipe of one model and its text, thrice."""
    sources = {n: {"model": "models/a", "data": f"{n}.jsonl"} for n in "abc"}
    return make_recipe(root, variant, sources=sources)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["method=btx", "backbone.ffn=slerp"], id="merged"),
        pytest.param(["method=harmonized", "fit.epochs=0"], id="fitted", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_identical_sources_give_the_dense_model(
    variant: str, settings: list[str], tmp_path: Path
) -> None:
    """Law 2 in stock transformers, with one layer of each kind."""
    path = twins(tmp_path / "sources", variant)
    run = pipeline.build(load_recipe(path, [*settings, *DENSE]), tmp_path / "run")
    moe, dense = load_clean(run.checkpoint), load_clean(models_of(path) / "a")
    assert moe.config.mlp_only_layers == [0]
    assert moe.num_parameters() == run.read_json(run.plan)["total_parameters"]
    text = random_text(0, 2, 48)
    assert difference(logits_of(moe, text), logits_of(dense, text)) <= EXACT
    stored = read_tensors(run.checkpoint)
    assert "model.layers.0.mlp.gate_proj.weight" in stored
    assert "model.layers.0.mlp.gate.weight" not in stored
    assert "model.layers.1.mlp.experts.2.gate_proj.weight" in stored
    if variant == "llama":  # vLLM and MLX read biases of attention, whatever the config says
        parts = [f"model.layers.{n}.self_attn.{part}_proj.bias" for n in (0, 1) for part in "qkv"]
        assert all(not stored[part].any() for part in parts)
    pipeline.verify(run)


def shuffle(tensors: dict[str, Tensor]) -> None:
    """The neurons of every FFN in another order: the same function."""
    for layer in range(2):
        gate, _, _ = source_ffn(tensors, layer)
        order = torch.randperm(len(gate), generator=torch.Generator().manual_seed(layer))
        for part, axis in zip(FFN, (0, 0, 1), strict=True):
            name = f"model.layers.{layer}.mlp.{part}_proj.weight"
            tensors[name] = tensors[name].index_select(axis, order).contiguous()


def shuffled_twins(root: Path) -> Path:
    path = make_recipe(root, "llama", calibration={"tokens": 6144, "sequence_length": 64})
    for name in "bc":
        shutil.rmtree(models_of(path) / name)
        shutil.copytree(models_of(path) / "a", models_of(path) / name)
        edit_weights(models_of(path) / name, shuffle)
    return path


@pytest.mark.parametrize("ffn", mostly_slow(["linear", "slerp"], "linear"))
def test_aligned_neurons_make_the_dense_model_of_shuffled_twins(ffn: str, tmp_path: Path) -> None:
    """The paper's claim, where it holds: neurons of different sources that are merged must be
    matched. Unmatched, the same FFNs make another one."""
    path = shuffled_twins(tmp_path / "sources")
    text = random_text(0, 2, 48)
    expected = logits_of(load_clean(models_of(path) / "a"), text)
    found = {}
    for neurons in ("activations", "auto", "none"):
        asked = ["method=symphony", f"align.neurons={neurons}", f"backbone.ffn={ffn}", *DENSE]
        run = pipeline.build(load_recipe(path, asked), tmp_path / neurons)
        pipeline.verify(run)
        found[neurons] = difference(logits_of(load_clean(run.checkpoint), text), expected)
        maps = Alignment.load(run.alignment)
        matched = [layer for layer in (0, 1) if maps.neurons("b", layer) is not None]
        assert matched == {"activations": [0, 1], "auto": [0], "none": []}[neurons]
    assert found["activations"] <= EXACT
    assert found["auto"] <= EXACT
    assert found["none"] > 0.05


def branch(seed: int) -> Callable[[dict[str, Tensor]], None]:
    """What makes another model of one base: noise in its FFNs."""
    generator = torch.Generator().manual_seed(seed)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in sorted(tensors):
            if ".mlp." in name:
                noise = torch.randn(tensors[name].shape, generator=generator)
                tensors[name] += 0.1 * noise

    return change


@pytest.mark.slow
def test_a_fit_brings_the_merged_ffn_closer_to_the_sources(tmp_path: Path) -> None:
    """On the text of all, and without a router, which has nothing to choose there."""
    path = make_recipe(tmp_path / "sources")
    for seed, name in enumerate("bc"):
        shutil.rmtree(models_of(path) / name)
        shutil.copytree(models_of(path) / "a", models_of(path) / name)
        edit_weights(models_of(path) / name, branch(seed))
    asked = [*FIT, *DENSE, "calibration.tokens=24576", "fit.learning_rate=1e-3"]
    run = pipeline.build(load_recipe(path, asked), tmp_path / "run")
    first, second = run.read_json(run.metrics)["fit"]["layers"]
    before, solved = first["experts"]["error"]
    assert solved < before
    assert first["experts"]["kept"]
    before, after = first["refinement"]["error"]
    assert before == solved
    assert after < before
    assert first["refinement"]["kept"]
    assert list(first["experts"]["condition"]) == ["down_proj of the FFN"]
    assert "routing" not in first
    assert set(second["routing"]["share"]) == set("abc")
    pipeline.verify(run)
    pipeline.report(run)
    # Steps that are too large are tried, and what is written is what least squares found.
    written = {}
    for words in ("fit.epochs=0", "fit.learning_rate=1"):
        changed = pipeline.build(load_recipe(path, [*asked, words]), tmp_path / words)
        written[words] = read_tensors(changed.checkpoint)["model.layers.0.mlp.down_proj.weight"]
        step = changed.read_json(changed.metrics)["fit"]["layers"][0].get("refinement")
    assert step["error"][1] > step["error"][0] and not step["kept"]
    least_squares = written["fit.epochs=0"]
    assert torch.equal(written["fit.learning_rate=1"], least_squares)
    refined = read_tensors(run.checkpoint)["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(refined, least_squares)


@pytest.mark.parametrize("method", mostly_slow(["symphony", "harmonized"], "symphony"))
def test_a_resumed_build_gives_the_same_bytes(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 5: killed after the dense layer, before the one with experts."""
    path = make_recipe(tmp_path / "sources")
    recipe = load_recipe(path, [f"method={method}", "fit.epochs=0", *DENSE])
    whole = pipeline.build(recipe, tmp_path / "whole")
    build_layer = build_module.Build._build_layer

    def killed(one: Any, layer: int) -> None:
        if layer == 1:
            raise Killed
        build_layer(one, layer)

    with monkeypatch.context() as patch:
        patch.setattr(build_module.Build, "_build_layer", killed)
        with pytest.raises(Killed):
            pipeline.build(recipe, tmp_path / "run")
    run = pipeline.build(recipe, tmp_path / "run", resume=True)
    assert hash_folder(run.checkpoint) == hash_folder(whole.checkpoint)


def test_the_whole_way_with_dense_layers_and_several_experts_of_a_source(tmp_path: Path) -> None:
    """Training, evaluation and report speak of the layers that have experts, and of sources."""
    path = make_recipe(tmp_path / "sources", "qwen3")
    asked = ["method=symphony", "experts.per_source=2", *DENSE]
    run = pipeline.build(load_recipe(path, asked), tmp_path / "run")
    pipeline.train(run)
    metrics = pipeline.evaluate(run)
    assert {"built", "trained"} == set(metrics.routing)
    for stage in metrics.routing.values():
        assert stage.layers == [1]
        assert stage.experts == ["a", "b", "c"]
        for (row,) in stage.share.values():
            assert len(row) == 3
            assert sum(row) == pytest.approx(1, abs=1e-5)
            assert max(row) <= 0.5 + 1e-5
    assert metrics.cka["trained"].numbers == [1]
    assert len(metrics.cka["trained"].layers[0]) == 3
    (curve,) = [run.read_json(run.metrics)["training"]["curve"]]
    shares = {name: value for name, value in curve[0].items() if name.startswith("share/")}
    assert set(shares) == {"share/a", "share/b", "share/c"}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    pipeline.verify(run)
    page = pipeline.report(run).read_text()
    assert "6, 4 per token, none in layer(s) 0" in page
    card = (run.checkpoint / "README.md").read_text()
    assert "Layers without experts, counted from 0: 0." in card
    assert "| 2 to 3 | b |" in card


@pytest.mark.slow
def test_a_change_of_experts_keeps_dense_layers(tmp_path: Path) -> None:
    path = make_recipe(tmp_path / "sources")
    recipe = load_recipe(path, ["method=harmonized", "fit.epochs=0", *DENSE])
    old = pipeline.build(recipe, tmp_path / "run")
    model = make_model(tmp_path / "d", "llama", seed=7)
    text = make_text(tmp_path / "d.jsonl", seed=7)
    more = pipeline.add(old, "d", tmp_path / "more", model=str(model), data=str(text))
    less = pipeline.remove(more, "b", tmp_path / "less")
    kept = [n for n in read_tensors(old.checkpoint) if n.startswith("model.layers.0.")]
    for run in (more, less):
        before, after = read_tensors(old.checkpoint), read_tensors(run.checkpoint)
        assert all(torch.equal(before[name], after[name]) for name in kept)
        pipeline.verify(run)


def plan_of(path: Path, *settings: str) -> Any:
    return pipeline.plan(load_recipe(path, [*settings, "output.dtype=float32"]))


def test_a_plan_counts_one_ffn_in_dense_layers(recipes: Callable[[str], Path]) -> None:
    """Of three experts, two of which a token goes to, two and one are fewer in a layer."""
    path = recipes("qwen3")
    without, with_one = plan_of(path), plan_of(path, "experts.dense_layers=[1]")
    ffn, router = 3 * 32 * 48, 3 * 32
    assert without.total_parameters - with_one.total_parameters == 2 * ffn + router
    assert without.active_parameters - with_one.active_parameters == ffn + router
    notes = " ".join(with_one.notes)
    assert "layer(s) 1 have one FFN" in notes
    assert "what is computed depends on it in layer(s) 1 alone" in notes
    readers = {reading.program: reading for reading in with_one.readers}
    assert readers["llama.cpp"].verdict == "untried"


def test_the_architecture_follows_from_dense_layers(recipes: Callable[[str], Path]) -> None:
    expected = {"llama": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
    for variant, architecture in expected.items():
        assert plan_of(recipes(variant), *DENSE).architecture == architecture
        assert plan_of(recipes(variant)).architecture != "qwen2_moe"


@pytest.mark.parametrize(
    ("variant", "settings", "error", "words"),
    [
        ("llama", ["output.architecture=mixtral", *DENSE], RecipeError, "to qwen2_moe"),
        ("qwen2", ["output.architecture=ernie4_5_moe", *DENSE], RecipeError, "to qwen2_moe"),
        (
            "mistral",
            DENSE,
            RecipeError,
            "mixtral and granitemoe would hold mistral, and have no layers without experts",
        ),
        ("llama", ["experts.dense_layers=[2]"], SourceMismatch, "2 is no layer of the sources"),
        ("llama", ["experts.dense_layers=[0,1]"], SourceMismatch, "all 2 layers are named"),
        ("llama", ["experts.dense_layers=[1,1]"], RecipeError, "layer 1 is named twice"),
        ("llama", ["experts.dense_layers=[1,0]"], RecipeError, r"write \[0, 1\]"),
        ("llama", ["experts.dense_layers=[-1]"], RecipeError, "expected a number of 0 or more"),
        ("llama", ["method=bam", *DENSE], RecipeError, "experts in every layer"),
    ],
)
def test_dense_layers_are_refused_before_work(
    variant: str,
    settings: list[str],
    error: type[Exception],
    words: str,
    recipes: Callable[[str], Path],
) -> None:
    with pytest.raises(error, match=words) as raised:
        plan_of(recipes(variant), *settings)
    assert len(str(raised.value)) < 500


def test_a_setting_of_dense_layers_alone_has_no_effect(recipes: Callable[[str], Path]) -> None:
    notes = plan_of(recipes("llama"), "backbone.ffn=slerp").notes
    assert "backbone.ffn has no effect: no layer is dense, and no expert shared" in notes


def test_verify_finds_another_ffn(tmp_path: Path) -> None:
    path = make_recipe(tmp_path / "sources")
    run = pipeline.build(load_recipe(path, ["method=btx", *DENSE]), tmp_path / "run")
    with_other_ffn(run)
    with pytest.raises(VerificationError, match=r"layers\.0\.mlp\.up_proj"):
        pipeline.verify(run)


def with_other_ffn(run: RunFolder) -> None:
    """Another FFN in the dense layer, and the hashes of it in the manifest."""
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(run.checkpoint, lambda tensors: tensors[name].mul_(1.5))
    manifest = run.read_json(run.manifest)
    manifest["files"] |= hash_folder(run.checkpoint)
    run.manifest.write_text(json.dumps(manifest))
