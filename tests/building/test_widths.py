"""Sources whose FFNs have different widths: the narrower ones are padded with neurons of zeros, and
compute what they did."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from checks import (
    EXACT,
    difference,
    edit_weights,
    expert_names,
    load_clean,
    logits_of,
    make_adapter,
    models_of,
    mostly_slow,
    random_text,
    read_tensors,
    source_ffn,
)
from conftest import VARIANTS, make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.errors import SourceMismatch
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder

NARROW, WIDE = 48, 80


def two_widths(root: Path, variant: str, change: Callable[[Path], Any], **sections: Any) -> Path:
    """A recipe of `a`, and of `b` that was a copy of it before the `change`."""
    path = make_recipe(root, variant, count=2, **sections)
    shutil.rmtree(root / "models" / "b")
    shutil.copytree(root / "models" / "a", root / "models" / "b")
    change(root / "models" / "b")
    return path


def set_width(folder: Path, width: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": width}))


def widened(folder: Path) -> None:
    """The same function with neurons of zeros."""

    def change(tensors: dict[str, Tensor]) -> None:
        more = WIDE - NARROW
        for name, tensor in tensors.items():
            if "mlp.down_proj" in name:
                tensors[name] = pad(tensor, (0, more))
            elif "mlp." in name:
                tensors[name] = pad(tensor, (0, 0, 0, more))

    set_width(folder, WIDE)
    edit_weights(folder, change)


def other_ffn(folder: Path) -> None:
    """The same backbone around a wider FFN that computes something else."""

    def change(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(5)
        for name, tensor in tensors.items():
            if "mlp." in name:
                shape = [WIDE if size == NARROW else size for size in tensor.shape]
                tensors[name] = torch.randn(shape, generator=generator) / shape[1] ** 0.5

    set_width(folder, WIDE)
    edit_weights(folder, change)


def built(path: Path, out: Path, *settings: str) -> RunFolder:
    run = pipeline.build(load_recipe(path, settings), out)
    pipeline.verify(run)
    return run


@pytest.mark.parametrize(
    ("variant", "method"),
    mostly_slow(
        [
            *((variant, "symphony") for variant in VARIANTS),
            ("llama", "btx"),
            ("llama", "bam"),
            ("llama", "harmonized"),
            ("qwen3", "harmonized"),
        ],
        ("llama", "symphony"),
        ("qwen2", "symphony"),
        ("llama", "harmonized"),
    ),
)
def test_a_source_and_its_widened_twin_are_the_dense_model(
    variant: str, method: str, tmp_path: Path
) -> None:
    path = two_widths(tmp_path, variant, widened)
    fit = ["fit.epochs=1"] if method == "harmonized" else []
    run = built(path, tmp_path / "run", f"method={method}", *fit)
    text = random_text(3, 2, 24)
    expected = logits_of(load_clean(models_of(path) / "a"), text)
    tolerance = 1e-4 if method == "harmonized" else EXACT
    assert difference(logits_of(load_clean(run.checkpoint), text), expected) < tolerance


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "llama", "qwen2-granitemoe"))
def test_each_expert_alone_is_its_source(variant: str, tmp_path: Path) -> None:
    """The wider source is the other one's backbone with another FFN. With one source's expert in
    every place, the result is that source."""
    path = two_widths(tmp_path, variant, other_ffn)
    run = built(path, tmp_path / "run", "method=btx")
    text = random_text(3, 2, 24)
    alone = {name: logits_of(load_clean(models_of(path) / name), text) for name in "ab"}
    assert difference(alone["a"], alone["b"]) > 0.1
    for place, name in enumerate("ab"):
        folder = tmp_path / name
        shutil.copytree(run.checkpoint, folder)
        edit_weights(folder, partial(only_expert, variant=variant, place=place))
        assert difference(logits_of(load_clean(folder), text), alone[name]) < EXACT


def only_expert(tensors: dict[str, Tensor], variant: str, place: int) -> None:
    """Put one of two experts into both places."""
    stacked = [name for name, tensor in tensors.items() if tensor.ndim == 3]
    for name in stacked:
        tensors[name] = tensors[name][[place, place]].clone()
    for layer in range(0 if stacked else 2):
        here, there = (expert_names(variant, layer, one) for one in (place, 1 - place))
        for ours, theirs in zip(here, there, strict=True):
            tensors[theirs] = tensors[ours].clone()


def test_padding_is_zeros_and_the_rest_the_source(tmp_path: Path) -> None:
    """Bit for bit, for the narrower source in each place of the recipe."""
    path = two_widths(tmp_path, "llama", other_ffn)
    run = built(path, tmp_path / "run", "method=btx")
    found = read_tensors(run.checkpoint)
    for place, name in enumerate("ab"):
        own = load_file(models_of(path) / name / "model.safetensors")
        for layer in range(2):
            for axis, tensor, ours in zip(
                (0, 0, 1), expert_names("llama", layer, place), source_ffn(own, layer), strict=True
            ):
                kept, zeros = found[tensor].split([ours.shape[axis], WIDE - ours.shape[axis]], axis)
                assert torch.equal(kept, ours) and not bool(zeros.any())


def test_every_expert_of_a_narrow_source_has_neurons(tmp_path: Path) -> None:
    """Dealt into several, no expert is zeros alone: nothing would ever train it."""
    path = two_widths(tmp_path, "llama", other_ffn)
    run = built(path, tmp_path / "run", "method=btx", "experts.per_source=2")
    found, text = read_tensors(run.checkpoint), random_text(3, 2, 24)
    for layer in range(2):
        for place in range(4):
            gate, _, down = (found[name] for name in expert_names("llama", layer, place))
            assert int(gate.any(dim=1).sum()) == (NARROW if place < 2 else WIDE) // 2
            assert torch.equal(gate.any(dim=1), down.any(dim=0))
    whole = built(path, tmp_path / "whole", "method=btx")
    logits = [logits_of(load_clean(one.checkpoint), text) for one in (run, whole)]
    assert difference(*logits) < EXACT


def test_neurons_of_different_numbers_are_matched(tmp_path: Path) -> None:
    """The wider source has the anchor's neurons in another order, and others beside them: each
    anchor's neuron finds itself again, and the others take the places of zeros."""
    order = torch.randperm(NARROW, generator=torch.Generator().manual_seed(1))

    def scattered(folder: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            generator = torch.Generator().manual_seed(2)
            for name, tensor in tensors.items():
                if "mlp." not in name:
                    continue
                axis = 1 if "down_proj" in name else 0
                shape = list(tensor.shape)
                shape[axis] = WIDE - NARROW
                new = 0.3 * torch.randn(shape, generator=generator)
                tensors[name] = torch.cat((new, tensor.index_select(axis, order)), axis)

        set_width(folder, WIDE)
        edit_weights(folder, change)

    path = two_widths(tmp_path, "llama", scattered)
    run = built(path, tmp_path / "run", "method=symphony")
    found = read_tensors(run.checkpoint)
    ours, theirs = (found[expert_names("llama", 0, place)[0]] for place in (0, 1))
    assert torch.equal(ours[:NARROW], theirs[:NARROW])
    assert not bool(ours[NARROW:].any()) and bool(theirs[NARROW:].any(dim=1).all())


def test_the_plan_says_what_padding_costs(tmp_path: Path) -> None:
    """2 layers x 3 matrices x 32 columns x 32 neurons of zeros, float32."""
    planned = pipeline.plan(load_recipe(two_widths(tmp_path, "llama", widened)))
    note = next(note for note in planned.notes if note.startswith("FFNs are padded"))
    assert f"to {WIDE} neurons" in note and f"a ({NARROW})" in note and "b (" not in note
    assert note.endswith("That is 6,144 parameters of zeros, 24.6 kB on disk and in memory")
    assert planned.config["intermediate_size"] == WIDE
    found = next(one for one in planned.differences if one.what == "intermediate_size")
    assert (found.verdict, dict(found.values)) == ("fine", {"a": str(NARROW), "b": str(WIDE)})
    assert any(note.startswith("GGUF: ") and str(WIDE) in note for note in planned.notes)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1, None),
        (4, "GGUF: Q8_0 and Q4_0 take it, K-quants need .* 256, and an expert has 64 neurons"),
        (16, "GGUF: Quantized types need .* multiple of 32, and an expert has 16 neurons"),
    ],
)
def test_gguf_quantizes_experts_of_their_own_width(
    count: int, said: str | None, tmp_path: Path
) -> None:
    """A source's FFN has a width that all types take; a part of it has not."""
    path = make_recipe(tmp_path, "llama", count=2)
    shutil.rmtree(tmp_path / "models" / "b")
    make_model(tmp_path / "models" / "b", "llama", 1, intermediate_size=256)
    planned = pipeline.plan(load_recipe(path, [f"experts.per_source={count}"]))
    (note,) = [note for note in planned.notes if note.startswith("GGUF: ")] or [""]
    assert re.search(said, note) if said else not note


def test_kinship_is_told_from_the_rest(tmp_path: Path) -> None:
    """Branches and strangers are told apart by their attention, where their FFNs are no pair."""
    path = two_widths(tmp_path, "llama", other_ffn)
    assert pipeline.plan(load_recipe(path)).likeness == {"b": pytest.approx(1.0)}
    shutil.rmtree(tmp_path / "models" / "b")
    make_model(tmp_path / "models" / "b", "llama", 1, intermediate_size=WIDE)
    planned = pipeline.plan(load_recipe(path))
    assert abs(planned.likeness["b"]) < 0.1
    assert planned.warnings[0].startswith("b (")
    assert "not fine-tuned from a's base" in planned.warnings[0]


def test_copies_have_the_width_of_the_anchor(tmp_path: Path) -> None:
    path = two_widths(tmp_path, "llama", other_ffn)
    run = built(path, tmp_path / "run", "method=sparse-upcycling")
    text = random_text(3, 2, 24)
    expected = logits_of(load_clean(models_of(path) / "a"), text)
    assert difference(logits_of(load_clean(run.checkpoint), text), expected) < EXACT
    found = read_tensors(run.checkpoint)
    assert found[expert_names("llama", 0, 1)[0]].shape[0] == NARROW


@pytest.mark.parametrize("merge", ["anchor", "linear"])
@pytest.mark.parametrize("settings", ["experts.dense_layers=[0]", "experts.shared_weight=0.5"])
def test_copies_beside_a_merged_ffn_have_its_width(
    settings: str, merge: str, tmp_path: Path
) -> None:
    """The anchor's FFN alone needs no padding; one that is merged of both has the wider one's."""
    path = two_widths(tmp_path, "llama", other_ffn)
    asked = ["method=btx", "experts.init=copy", f"backbone.ffn={merge}", settings]
    run = built(path, tmp_path / "run", *asked)
    found, sources = (
        read_tensors(run.checkpoint),
        [read_tensors(models_of(path) / name) for name in "ab"],
    )
    width = NARROW if merge == "anchor" else WIDE
    part = "" if "dense" in settings else "shared_expert."
    name = "model.layers.0.mlp.{}gate_proj.weight"
    merged, own = found[name.format(part)], [source[name.format("")] for source in sources]
    expected = own[0]
    if merge == "linear":
        expected = (pad(own[0], (0, 0, 0, WIDE - NARROW)) + own[1]) / 2
    torch.testing.assert_close(merged, expected)
    assert found["model.layers.1.mlp.experts.1.gate_proj.weight"].shape[0] == width
    (said,) = (
        one.consequence
        for one in pipeline.plan(load_recipe(path, asked)).differences
        if one.what == "intermediate_size"
    )
    assert said.startswith("every FFN is a's" if merge == "anchor" else "narrower FFNs are padded")


def test_zeros_are_not_drawn_anew(tmp_path: Path) -> None:
    path = two_widths(tmp_path, "llama", other_ffn)
    with pytest.raises(SourceMismatch, match=r"drop .* padded with zeros \(a: 48, b: 80\)"):
        pipeline.plan(load_recipe(path, ["method=drop-upcycling"]))


def test_sources_that_are_no_experts_widen_nothing(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, "llama", count=3, experts={"sources": ["a", "b"]})
    shutil.rmtree(tmp_path / "models" / "c")
    make_model(tmp_path / "models" / "c", "llama", 2, intermediate_size=WIDE)
    assert pipeline.plan(load_recipe(path)).config["intermediate_size"] == NARROW


@pytest.mark.slow
def test_a_lora_of_a_narrow_model_is_merged_before_it_is_padded(tmp_path: Path) -> None:
    path = two_widths(tmp_path, "llama", other_ffn)
    make_adapter(models_of(path) / "a", tmp_path / "lora")
    content = json.loads(path.read_text())
    content["sources"]["a"]["adapter"] = "lora"
    path.write_text(json.dumps(content))
    built(path, tmp_path / "run", "method=btx")


@pytest.mark.slow
def test_the_whole_way_with_two_widths(tmp_path: Path) -> None:
    """Teachers and the likeness of experts read sources of their own widths."""
    path = two_widths(tmp_path, "llama", other_ffn, method="symphony")
    run = pipeline.run(load_recipe(path, ["train.teacher=sources"]), tmp_path / "run")
    losses = json.loads(run.metrics.read_text())
    assert set(losses["sources"]) == {"a", "b"} and losses["trained"]


def test_an_expert_that_would_change_the_width_is_refused(tmp_path: Path) -> None:
    """A narrower newcomer is padded; a wider one, and the widest one's leaving, are refused."""
    path = make_recipe(tmp_path, "llama", count=3)
    shutil.rmtree(tmp_path / "models" / "c")
    make_model(tmp_path / "models" / "c", "llama", 2, intermediate_size=WIDE)
    run = built(path, tmp_path / "run", "method=btx")
    for width, name in ((40, "narrower"), (96, "wider")):
        make_model(tmp_path / "models" / name, "llama", 4, intermediate_size=width)
    data = str(tmp_path / "b.jsonl")
    model = str(tmp_path / "models" / "narrower")
    more = pipeline.add(run, "narrower", tmp_path / "more", model=model, data=data)
    pipeline.verify(more, deep=True)
    with pytest.raises(SourceMismatch, match=r"have 80 neurons, and the largest .* has 96"):
        wider = str(tmp_path / "models" / "wider")
        pipeline.add(run, "wider", tmp_path / "wider", model=wider, data=data)
    with pytest.raises(SourceMismatch, match=r"have 80 neurons, and the largest .* has 48"):
        pipeline.remove(run, "c", tmp_path / "fewer")
    assert not (tmp_path / "wider").exists() and not (tmp_path / "fewer").exists()


def test_a_mismatch_of_depth_says_what_to_do(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, "llama", count=2)
    shutil.rmtree(tmp_path / "models" / "b")
    make_model(tmp_path / "models" / "b", "llama", 1, num_hidden_layers=3)
    wanted = (
        r"num_hidden_layers \(a: 2; b: 3\): .* no partner\. backbone.shapes: widest adds layers"
    )
    with pytest.raises(SourceMismatch, match=wanted):
        pipeline.plan(load_recipe(path))
