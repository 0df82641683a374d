"""A scrambled twin computes what its original computes, and nothing of it looks alike."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import twin
from checks import logits_of
from conftest import VARIANTS, make_model
from symphony_moe.errors import RecipeError, RunFolderError, SourceError, SymphonyError
from symphony_moe.files import hash_folder
from symphony_moe.model.checkpoint import CheckpointWriter
from symphony_moe.model.families import EMBEDDING, FINAL_NORM, HEAD
from symphony_moe.recipe.settings import SourceSpec
from symphony_moe.sources.opening import open_source
from symphony_moe.sources.stock import load_stock
from twin import scramble


@pytest.fixture(scope="session")
def twins(
    recipes: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """variant -> (original, twin), made once. Nobody changes what is in there."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(variant: str) -> tuple[Path, Path]:
        if variant not in made:
            original = recipes(variant).parent / "models" / "a"
            out = tmp_path_factory.mktemp(f"twin-{variant}") / "twin"
            made[variant] = original, scramble(original, out, seed=1)
        return made[variant]

    return get


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_twin_is_the_same_function(
    variant: str, twins: Callable[[str], tuple[Path, Path]]
) -> None:
    """Stock transformers loads it with nothing missing or left over, and its logits are the
    original's (float32, 1e-4)."""
    original, out = twins(variant)
    text = torch.randint(300, (3, 60), generator=torch.Generator().manual_seed(0))
    before, after = (logits_of(load_stock(folder), text).cpu() for folder in (original, out))
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_twins_parameters_are_strange(
    variant: str, twins: Callable[[str], tuple[Path, Path]]
) -> None:
    """No matrix resembles the original's (cosine below 0.2, pico matrices), gains are neutral
    where they fold, and the head is not the embeddings."""
    original, out = twins(variant)
    before, after = load_file(original / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(after) == set(before) | {HEAD}
    for name, tensor in before.items():
        if tensor.ndim == 2:
            assert abs(cosine(tensor, after[name])) < 0.2, name
        elif variant == "olmo2" and name != FINAL_NORM:  # gains that do not fold go along
            assert torch.equal(after[name].sort().values, tensor.sort().values), name
            # Two KV heads may be drawn in the order that they have.
            assert not torch.equal(after[name], tensor) or "k_norm" in name, name
        elif name.endswith("layernorm.weight") or name == FINAL_NORM:
            assert torch.equal(after[name], torch.ones_like(tensor)), name
        elif name.endswith("_norm.weight"):
            assert torch.equal(after[name], tensor), name
        else:
            assert not torch.allclose(after[name], tensor, rtol=0.1), name
    assert not torch.allclose(after[EMBEDDING], after[HEAD], rtol=0.1)


@pytest.mark.parametrize("variant", ["llama-tied-rope3", "mistral"])
def test_a_twin_keeps_what_is_not_weights(
    variant: str, twins: Callable[[str], tuple[Path, Path]]
) -> None:
    """The original's config but for the untied head, its tokenizer, its generation config."""
    original, out = twins(variant)
    read = [json.loads((f / "config.json").read_text()) for f in (original, out)]
    assert read[1] == read[0] | {"tie_word_embeddings": False, "dtype": "float32"}
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"} | copied
    for name in copied:
        assert (out / name).read_bytes() == (original / name).read_bytes()
    source = open_source("twin", SourceSpec(model=str(out), data=[]))
    assert source.tokenizer.get_vocab() and not source.config.tie_word_embeddings


def test_the_seed_alone_settles_the_bytes(
    twins: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Also where the model lies does not, and the twin of a twin is a twin."""
    original, first = twins("qwen3")
    moved = shutil.copytree(original, tmp_path / "elsewhere" / "moved")
    again = scramble(moved, tmp_path / "twin", seed=1)
    assert hash_folder(again) == hash_folder(first)
    other = scramble(original, tmp_path / "made" / "twin", seed=2)
    differing = {k for k, v in hash_folder(other).items() if hash_folder(first)[k] != v}
    assert differing == {"twin/model.safetensors"}
    second = scramble(first, tmp_path / "second", seed=3)
    text = torch.arange(80).view(2, 40)
    before, after = (logits_of(load_stock(folder), text).cpu() for folder in (original, second))
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-4


def test_a_twin_takes_the_dtype_that_is_asked_for(
    twins: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    original, exact = twins("llama")
    out = scramble(original, tmp_path / "twin", seed=1, dtype="bfloat16")
    stored, whole = load_file(out / "model.safetensors"), load_file(exact / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in whole.items():
        assert torch.equal(stored[name], tensor.bfloat16()), name


def test_large_twins_are_sharded_and_tables_go_block_by_block(
    twins: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In shards, with tables read 64 rows at a time (300 are not a multiple), the same model."""
    original, whole = twins("qwen2")
    monkeypatch.setattr(twin, "_SHARD_BYTES", 50_000)
    monkeypatch.setattr(twin, "TABLE_ROWS", 64)
    out = scramble(original, tmp_path / "twin", seed=1)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    parts: dict[str, Any] = {}
    for path in out.glob("*.safetensors"):
        parts |= load_file(path)
    for name, tensor in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)
    load_stock(out)


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_what_is_there_is_left_alone(
    there: str, twins: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if there == "folder":
        out.mkdir()
    elif there == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=rf"^{re.escape(str(out))}: exists.*[Cc]hoose another"):
        scramble(twins("llama")[0], out, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert out.is_symlink() or out.is_file() or not any(out.iterdir())


def test_models_that_cannot_be_sources_are_refused(tmp_path: Path) -> None:
    """With the source's own message, and nothing written."""
    biased = make_model(tmp_path / "biased", "llama", 0, mlp_bias=True)
    with pytest.raises(SourceError, match=r"biased: .*no stock MoE has FFN biases"):
        scramble(biased, tmp_path / "out", seed=1)
    with pytest.raises(SourceError, match="no such model folder"):
        scramble(tmp_path / "absent", tmp_path / "out", seed=1)
    with pytest.raises(RecipeError, match="dtype 'int8': expected one of bfloat16, float16, float"):
        scramble(biased, tmp_path / "out", seed=1, dtype="int8")
    assert {path.name for path in tmp_path.iterdir()} == {"biased"}
    inside = biased / "config.json" / "out"
    shutil.rmtree(biased)
    make_model(biased, "llama", 0)
    with pytest.raises(RunFolderError, match=r"out: cannot be made: .*choose another folder"):
        scramble(biased, inside, seed=1)


@pytest.mark.parametrize("value", [float("nan"), 1e6], ids=["nan", "too large"])
def test_a_twin_that_fails_on_the_way_leaves_nothing(
    value: float, twins: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """A last layer that is not finite, or does not fit the dtype."""
    broken = shutil.copytree(twins("llama")[0], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = value
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SymphonyError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        scramble(broken, tmp_path / "out", seed=1, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_kill_leaves_nothing_that_looks_like_a_model(
    twins: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any write: no `out`, and weights without a config under a hidden name."""
    seen = []
    write = CheckpointWriter.write

    def spied(self: Any, *arguments: Any) -> None:
        write(self, *arguments)
        seen.append({path.name for path in tmp_path.rglob("*")})
        assert [path.name[0] for path in tmp_path.iterdir()] == ["."]

    monkeypatch.setattr(CheckpointWriter, "write", spied)
    scramble(twins("llama")[0], tmp_path / "out", seed=1)
    assert seen and not any({"out", "config.json"} & names for names in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
