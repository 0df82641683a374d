"""GGUF files and pickled weights: converted once, to what they hold."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import SIZES, make_model, make_recipe
from symphony_moe import convert, pipeline
from symphony_moe.cli import main
from symphony_moe.errors import SourceError
from symphony_moe.recipe import SourceSpec, load_recipe
from symphony_moe.sources import open_source

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SYMPHONY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(model: Path, *, download: bool = True, **settings: Any) -> Any:
    spec = SourceSpec(model=str(model), data="x.txt", **settings)
    return open_source("a", spec, download=download)


# GGUF


def write_gguf(model: Path, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """A Llama as llama.cpp keeps it: its own names, and q and k with RoPE's pairs side by side."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(SIZES["vocab_size"])
    content = json.loads((model / "tokenizer.json").read_text())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    special = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([special[token not in ("<s>", "</s>")] for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for name, tensor in load_file(model / WEIGHTS).items():
        part = next(part for part in names if part in name)
        layer = name.split(".")[2] if ".layers." in name else None
        if part.endswith(("q_proj", "k_proj")):
            tensor = tensor.view(-1, 2, 4, 32).transpose(1, 2).reshape(tensor.shape)
        own = f"blk.{layer}.{names[part]}.weight" if layer else f"{names[part]}.weight"
        # Quantized blocks are of 32 numbers in a row.
        plain = tensor.ndim == 1 or tensor.shape[1] % 32 or kind == gguf.GGMLQuantizationType.F32
        rows = np.ascontiguousarray(tensor.numpy())
        if plain:
            writer.add_tensor(own, rows)
        else:
            writer.add_tensor(own, gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama") / "model", "llama", 0, rms_norm_eps=1e-5)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_is_the_model_that_it_holds(
    kind: str, llama: Path, tmp_path: Path, cache: Path
) -> None:
    """The tensors that transformers makes of it, and its tokenizer. Planning needs no weights; what
    was converted is not converted again."""
    write_gguf(llama, tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])
    planned = opened(tmp_path, gguf_file="m.gguf", download=False)
    assert not list(cache.rglob("*.safetensors"))
    source = opened(tmp_path, gguf_file="m.gguf")
    assert {n: h.shape for n, h in planned.headers.items()} == {
        n: h.shape for n, h in source.headers.items()
    }
    own = load_file(llama / WEIGHTS)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, tensor in read.state_dict().items():
        assert torch.equal(source.read(name), tensor)
        torch.testing.assert_close(tensor, own[name], atol=1e-7 if kind == "F32" else 0.05, rtol=0)
    theirs = AutoTokenizer.from_pretrained(llama)
    assert source.tokenizer.get_vocab() == theirs.get_vocab()
    assert source.tokenizer("alpha 12\n")["input_ids"] == theirs("alpha 12\n")["input_ids"]
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    opened(tmp_path, gguf_file="m.gguf")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert not [path for path in before if ".making-" in str(path)]


def test_a_gguf_source_builds_as_the_model_that_it_was_made_of(
    llama: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(tmp_path, "llama", count=2)
    shutil.copytree(llama, tmp_path / "models" / "b", dirs_exist_ok=True)
    runs = [pipeline.build(load_recipe(path), tmp_path / "plain")]
    write_gguf(llama, tmp_path / "models" / "b.gguf", gguf.GGMLQuantizationType.F32)
    content = json.loads(path.read_text())
    content["sources"]["b"] |= {"model": "./models", "gguf_file": "b.gguf"}
    path.write_text(json.dumps(content))
    assert main(["plan", str(path)]) == 0
    assert "  b: models, b.gguf (" in capsys.readouterr().out
    runs.append(pipeline.build(load_recipe(path), tmp_path / "gguf"))
    assert "| 1 | b | models, b.gguf |" in (runs[1].checkpoint / "README.md").read_text()
    pipeline.verify(runs[1])
    pipeline.evaluate(runs[1])
    hashes = [run.read_json(run.manifest)["tensors"]["checkpoint"] for run in runs]
    assert hashes[0] == hashes[1]
    # What is pinned is what the user has, not what the cache makes of it.
    sha256 = runs[1].read_recipe().sources["b"].sha256
    assert sha256 is not None and list(sha256) == ["b.gguf"]
    shutil.rmtree(cache)
    pipeline.verify(runs[1])
    write_gguf(llama, tmp_path / "models" / "b.gguf", gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(SourceError, match=r"b: .*b.gguf has SHA-256 .* has changed"):
        pipeline.verify(runs[1])


def test_gguf_files_that_are_none_are_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    with pytest.raises(SourceError, match=r"^a: no such GGUF file: .*m.gguf"):
        opened(tmp_path, gguf_file="m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"nothing" * 100)
    with pytest.raises(SourceError, match=r"^a: .*m.gguf cannot be converted: "):
        opened(tmp_path, gguf_file="m.gguf")

    def without(*_: Any, **__: Any) -> Any:
        raise ImportError("no gguf here")

    monkeypatch.setattr(convert, "load_config", without)
    with pytest.raises(SourceError, match="pip install gguf"):
        opened(tmp_path, gguf_file="m.gguf")
    assert not list(cache.glob("*")), "half a conversion"


# Pickled weights


def pickled(model: Path, folder: Path, shards: int = 1) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    where: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_read_where_the_recipe_says_so(
    shards: int, llama: Path, tmp_path: Path
) -> None:
    folder = pickled(llama, tmp_path / "model", shards)
    with pytest.raises(SourceError, match=r"set sources.a.allow_pickle: true"):
        opened(folder)
    for download in (False, True):
        source = opened(folder, allow_pickle=True, download=download)
        for name, tensor in load_file(llama / WEIGHTS).items():
            assert torch.equal(source.read(name), tensor)
    assert len({header.file for header in source.headers.values()}) == shards
    hashed = [file for file in source.hash_files() if file.startswith("pytorch_model")]
    assert len(hashed) == shards and "config.json" in source.hash_files()
    assert source.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(llama).get_vocab()


def test_changed_weights_are_converted_again(llama: Path, tmp_path: Path) -> None:
    folder = pickled(llama, tmp_path / "model")
    before = opened(folder, allow_pickle=True)
    tensors = {k: v * 2 for k, v in load_file(llama / WEIGHTS).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    after = opened(folder, allow_pickle=True)
    name = "model.norm.weight"
    assert torch.equal(after.read(name), 2 * before.read(name))


def test_tensors_that_do_not_fit_are_told_of_the_users_own_folder(
    llama: Path, tmp_path: Path
) -> None:
    """Not of the place where the converted ones are kept."""
    folder = pickled(llama, tmp_path / "model")
    tensors = load_file(llama / WEIGHTS)
    torch.save(tensors | {"model.layers.9.x": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=rf"^a: {folder} has 1 tensors .* first model.layers.9.x"):
        opened(folder, allow_pickle=True)
    del tensors["model.norm.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=rf"^a: 1 tensors are missing from {folder}, first"):
        opened(folder, allow_pickle=True)


def test_a_changed_config_or_tokenizer_is_the_one_that_is_read(llama: Path, tmp_path: Path) -> None:
    """What is beside the weights is part of what was converted."""
    folder = pickled(llama, tmp_path / "model")
    assert opened(folder, allow_pickle=True).config.rms_norm_eps == 1e-5
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("new")
    source = opened(folder, allow_pickle=True)
    assert source.config.rms_norm_eps == 1e-3
    assert source.tokenizer.chat_template == "new"


def test_safetensors_are_preferred_and_a_tied_head_is_dropped(tmp_path: Path) -> None:
    tied = make_model(tmp_path / "tied", "qwen2", 0)
    folder = pickled(tied, tmp_path / "pickled")
    content = torch.load(folder / "pytorch_model.bin", weights_only=True)
    content["lm_head.weight"] = content["model.embed_tokens.weight"]
    torch.save(content, folder / "pytorch_model.bin")
    assert "lm_head.weight" not in opened(folder, allow_pickle=True).headers
    (tied / "pytorch_model.bin").write_bytes(b"not read")
    assert opened(tied, allow_pickle=True).folder == tied


@pytest.mark.parametrize(
    "index", ["", "not json", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
)
@pytest.mark.parametrize("allowed", [True, False])
def test_an_index_of_pickles_that_is_none_is_refused(
    index: str, allowed: bool, llama: Path, tmp_path: Path
) -> None:
    folder = pickled(llama, tmp_path / "model", 2)
    (folder / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(SourceError, match=r"^a: .*bin.index.json is not a usable index: "):
        opened(folder, allow_pickle=allowed)


def test_pickles_of_before_there_were_archives_are_read(llama: Path, tmp_path: Path) -> None:
    folder = pickled(llama, tmp_path / "model")
    tensors = load_file(llama / WEIGHTS)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    source = opened(folder, allow_pickle=True)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_a_pickled_folder_that_is_not_whole_is_a_message(
    llama: Path, tmp_path: Path, cache: Path
) -> None:
    folder = pickled(llama, tmp_path / "model")
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(SourceError, match=r"^a: .*pytorch_model.bin cannot be converted: "):
        opened(folder, allow_pickle=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"^a: .*config.json is not JSON"):
        opened(folder, allow_pickle=True)
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"^a: .* has no config.json"):
        opened(folder, allow_pickle=True)
    assert not list(cache.glob("*"))


class _Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("evil-was-here"),)


def test_pickles_that_hold_more_than_tensors_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pickled(llama, tmp_path / "model")
    torch.save({"x": _Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"holds more than tensors, and is not read"):
        opened(folder, allow_pickle=True)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"x": _Evil()}, file)
    with pytest.raises(SourceError, match=r"pytorch_model.bin"):
        opened(folder, allow_pickle=True)
    assert not (tmp_path / "evil-was-here").exists()
    for content in ([1, 2], {"x": 3}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(SourceError, match=r"other than named tensors"):
            opened(folder, allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"^a: .*pytorch_model.bin"):
        opened(folder, allow_pickle=True)
    assert not list(cache.glob("*"))


def test_a_shard_that_is_missing_is_named(llama: Path, tmp_path: Path) -> None:
    folder = pickled(llama, tmp_path / "model", 2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(SourceError, match=r"pytorch_model-00002-of-00002.bin is in the index"):
        opened(folder, allow_pickle=True)


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert convert.cache() == tmp_path / "cache"
    monkeypatch.delenv("SYMPHONY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert convert.cache() == tmp_path / "xdg" / "symphony-moe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert convert.cache() == Path.home() / ".cache" / "symphony-moe"
