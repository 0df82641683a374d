"""GGUF files and pickled weights: converted once, to what they hold."""

import json
import pickle
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from checks import mostly_slow, opened
from conftest import make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.cli import main
from symphony_moe.errors import SourceError
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.yaml_text import read_yaml
from symphony_moe.sources import convert
from symphony_moe.sources.gguf_file import llama3_parameters, open_gguf
from symphony_moe.sources.proposal import propose_recipe

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SYMPHONY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# GGUF


GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    model: Path,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    settings: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    pre: str = "llama-bpe",
) -> None:
    """A model as llama.cpp keeps it: its own names, and a Llama's q and k with RoPE's pairs side by
    side. `settings`: metadata of the architecture that are changed, or left out where None.
    `tensors`: the same for tensors, by llama.cpp's names."""
    config = AutoConfig.from_pretrained(model)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    said = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": size,
        "vocab_size": config.vocab_size,
    }
    for key, value in (said | dict(settings or {})).items():
        add: dict[type, Any] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        if value is not None:
            add[type(value)](
                key if key.startswith(("general.", "split.", "tokenizer.")) else f"{arch}.{key}",
                value,
            )
    content = json.loads((model / "tokenizer.json").read_text())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    special = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([special[token not in ("<s>", "</s>")] for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    held: dict[str, Any] = {}
    for name, tensor in load_file(model / WEIGHTS).items():
        part = next(part for part in GGUF_NAMES if part in name)
        layer = name.split(".")[2] if ".layers." in name else None
        if part.endswith(("q_proj", "k_proj")) and arch == "llama":
            tensor = tensor.view(-1, 2, size // 2, 32).transpose(1, 2).reshape(tensor.shape)
        own = f"{GGUF_NAMES[part]}.{name.split('.')[-1]}"
        held[f"blk.{layer}.{own}" if layer else own] = np.ascontiguousarray(tensor.numpy())
    for own, rows in (held | dict(tensors or {})).items():
        # Quantized blocks are of 32 numbers in a row.
        if rows is None:
            continue
        if rows.ndim == 1 or rows.shape[1] % 32 or kind == gguf.GGMLQuantizationType.F32:
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


@pytest.mark.parametrize(
    ("said", "pre", "adds"), [(None, "llama-bpe", 1), (False, "llama-bpe", 0), (True, "qwen2", 1)]
)
def test_a_gguf_file_says_whether_bos_comes_first(
    said: bool | None, pre: str, adds: int, llama: Path, tmp_path: Path, cache: Path
) -> None:
    """transformers drops that; llama.cpp and the text here go by it."""
    settings = {"tokenizer.ggml.add_bos_token": said}
    write_gguf(llama, tmp_path / "m.gguf", settings=settings, pre=pre)
    encoded = opened(tmp_path, gguf_file="m.gguf").encoder.encode("alpha")
    assert encoded.count(256) == adds and encoded[:adds] == [256] * adds


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
    assert source.encoder.encode("alpha") == [256, *theirs("alpha")["input_ids"][1:], 257]
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
    said = {
        "general.source.huggingface.repository": "some/model",
        "general.base_model.0.repo_url": "https://huggingface.co/some/base",
        "general.license": "apache-2.0",
    }
    write_gguf(llama, tmp_path / "models" / "b.gguf", settings=said)
    content = json.loads(path.read_text())
    content["sources"]["b"] |= {"model": "./models", "gguf_file": "b.gguf"}
    path.write_text(json.dumps(content))
    assert main(["plan", str(path)]) == 0
    assert "  b: models, b.gguf (" in capsys.readouterr().out
    runs.append(pipeline.build(load_recipe(path), tmp_path / "gguf"))
    card = (runs[1].checkpoint / "README.md").read_text()
    assert "| 1 | b | models, b.gguf | apache-2.0 |" in card
    assert card.startswith("---\nbase_model:\n- some/model\nlibrary_name:")
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


def test_a_first_recipe_names_a_gguf_file_in_its_folder(
    llama: Path, tmp_path: Path, cache: Path
) -> None:
    """A plan has its header alone, so it is not known whose branch it is."""
    write_gguf(llama, tmp_path / "coder.gguf", gguf.GGMLQuantizationType.F32)
    made = propose_recipe([str(llama), str(tmp_path / "coder.gguf")], {}, tmp_path)
    spec = read_yaml(made.recipe)["sources"]["coder"]
    assert (spec["model"], spec["gguf_file"]) == (str(tmp_path), "coder.gguf")
    assert made.likeness == {} and made.method == "harmonized"


def test_gguf_files_that_are_none_are_messages(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    with pytest.raises(SourceError, match=r"^a: no such GGUF file: .*m.gguf"):
        opened(tmp_path, gguf_file="m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"nothing" * 100)
    with pytest.raises(SourceError, match=r"^a: .*m.gguf cannot be read as GGUF: "):
        opened(tmp_path, gguf_file="m.gguf")
    write_gguf(llama, tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) * 2 // 3])
    for download in (False, True):
        with pytest.raises(SourceError, match=r"^a: .*cut.gguf cannot be read .*Is it whole"):
            opened(tmp_path, gguf_file="cut.gguf", download=download)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SourceError, match="pip install gguf"):
        opened(tmp_path, gguf_file="m.gguf")
    assert not list(cache.glob("*")), "half a conversion"


def test_a_damaged_gguf_header_is_a_message(llama: Path, tmp_path: Path) -> None:
    """Wherever it ends, and whatever is in a byte of it."""
    path = tmp_path / "m.gguf"
    write_gguf(llama, path)
    whole = path.read_bytes()
    end = len(whole) - sum(t.numel() * 4 for t in load_file(llama / WEIGHTS).values())
    draw = random.Random(0)
    places = [*range(0, 700, 7), *(draw.randrange(end) for _ in range(100))]
    for place in places:
        changed = bytearray(whole)
        changed[place] = draw.choice([0, 1, 8, 9, 127, 255])
        for content in (whole[:place], bytes(changed)):
            path.write_bytes(content)
            try:
                open_gguf("a", path)
            except SourceError as error:
                assert str(error).startswith("a: ") and len(str(error)) < 600
            else:
                assert content != whole[:place]


def logits(folder: Path) -> Any:
    """What stock transformers computes for some tokens, in float32."""
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def logits_of(model: Any) -> Any:
    tokens = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def require_the_same(source: Any, model: Path) -> None:
    torch.testing.assert_close(logits(source.folder), logits(model), atol=2e-4, rtol=0)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rope_factors(parameters: Mapping[str, Any], size: int) -> Any:
    """What llama.cpp's converter writes into rope_freqs.weight."""
    plain = parameters["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    config = LlamaConfig(head_dim=size, rope_parameters=dict(parameters))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    return (plain / scaled.double()).float().numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"original_max_position_embeddings": 64, "factor": 32.0},
        {"low_freq_factor": 2.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 100},
    ],
)
def test_scaled_rope_that_a_gguf_file_keeps_as_a_tensor_is_rebuilt(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """Llama 3.1 and later. transformers drops the tensor: its reading is another model."""
    parameters = LLAMA3 | changes
    model = make_model(
        tmp_path / "model", "llama", 0, rms_norm_eps=1e-5, rope_parameters=parameters
    )
    write_gguf(model, tmp_path / "m.gguf", tensors={ROPE: rope_factors(parameters, 8)})
    source = opened(tmp_path, gguf_file="m.gguf")
    require_the_same(source, model)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert (logits_of(read) - logits(model)).abs().max() > 0.1
    (note,) = opened(tmp_path, gguf_file="m.gguf", download=False).notes
    assert note.startswith(f"a: the tensor {ROPE} of m.gguf is read as RoPE with rope_type llama3")


ROPE = "rope_freqs.weight"


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("theta", "factor", "low", "high", "context"),
    [
        (500000.0, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (500000.0, 32.0, 1.0, 4.0, 8192),  # Llama 3.2
        (500000.0, 16.0, 1.0, 4.0, 8192),
        (1e6, 4.0, 1.0, 2.0, 5000),
        (500000.0, 8.0, 2.0, 8.0, 16384),
        (1e6, 8.0, 1.0, 8.0, 8192),
    ],
)
def test_parameters_that_give_llama3s_frequencies_are_found(
    size: int, theta: float, factor: float, low: float, high: float, context: int
) -> None:
    """Those that a config has, up to a factor that changes nothing."""
    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    found = llama3_parameters(theta, rope_factors(parameters, size).tolist())
    assert found is not None
    assert found["factor"] == pytest.approx(factor, rel=1e-6)
    assert found["low_freq_factor"] == 1.0
    assert found["high_freq_factor"] == pytest.approx(high / low, rel=1e-3)
    assert found["original_max_position_embeddings"] == pytest.approx(context / low, rel=1e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pairs=st.integers(2, 64),
    theta=st.floats(1e3, 1e7),
    factor=st.floats(1.5, 128.0),
    low=st.floats(1.0, 4.0),
    ratio=st.floats(1.2, 32.0),
    context=st.integers(16, 65536),
)
def test_what_is_found_gives_the_factors_or_nothing_is_found(
    pairs: int, theta: float, factor: float, low: float, ratio: float, context: int
) -> None:
    """Whatever they were made of. Nothing is found where they say too little, or are rounded."""
    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low * ratio,
        "original_max_position_embeddings": context,
    }
    factors = rope_factors(parameters, 2 * pairs)
    found = llama3_parameters(theta, factors.tolist())
    if found is not None:
        again = rope_factors({**found, "rope_theta": theta}, 2 * pairs)
        np.testing.assert_allclose(again, factors, rtol=1e-5)


def test_factors_that_no_llama3_parameters_give_are_refused(llama: Path, tmp_path: Path) -> None:
    nan = float("nan")
    for number, factors in enumerate(
        (
            [1, 2, 4, 4.1],
            [8, 8, 1, 1],
            [0.5] * 4,
            [nan] * 4,
            [1, 1, 1, nan],
            [1, 2, 2, 8],
            [1, 8, 8, 8, 8],
            [1, 8],
            [0, 1, 1, 8],
            [-1, 1, 1, 8],
            [1, 1, 1, float("inf")],
        )
    ):
        tensors = {ROPE: np.array(factors, np.float32)}
        write_gguf(llama, tmp_path / f"{number}.gguf", tensors=tensors)
        for download in (False, True):
            with pytest.raises(SourceError, match=rf"^a: .*{ROPE}, which transformers drops"):
                opened(tmp_path, gguf_file=f"{number}.gguf", download=download)
    write_gguf(llama, tmp_path / "m.gguf", tensors={ROPE: np.ones(4, np.float32)})
    source = opened(tmp_path, gguf_file="m.gguf")
    assert source.config.rope_parameters["rope_type"] == "default" and not source.notes
    require_the_same(source, llama)


@pytest.mark.parametrize("model_type", mostly_slow(["llama", "qwen2", "qwen3"], "qwen2"))
@pytest.mark.parametrize(
    ("parameters", "settings"),
    [
        ({}, {}),
        (
            {"rope_type": "linear", "factor": 4.0},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        ),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.finetuned": True,
            },
        ),
    ],
)
def test_a_gguf_file_computes_what_its_model_does(
    model_type: str, parameters: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Every family that is read, with the RoPE that its metadata say, the size of its heads and
    its tied head."""
    own: dict[str, Any] = {"head_dim": 16} if model_type == "qwen3" else {}
    own |= {"tie_word_embeddings": True} if model_type == "qwen2" else {}
    rope = {"rope_type": "default", "rope_theta": 10000.0} | parameters
    model = make_model(
        tmp_path / "model", model_type, 0, rms_norm_eps=1e-6, rope_parameters=rope, **own
    )
    lengths = (
        {"attention.key_length": 16, "attention.value_length": 16} if own.get("head_dim") else {}
    )
    write_gguf(model, tmp_path / "m.gguf", settings={**settings, **lengths})
    source = opened(tmp_path, gguf_file="m.gguf")
    require_the_same(source, model)
    planned = opened(tmp_path, gguf_file="m.gguf", download=False)
    assert planned.headers.keys() == source.headers.keys()
    assert planned.notes == source.notes and len(source.notes) == bool(parameters)


def test_special_tokens_are_those_of_a_gguf_file(llama: Path, tmp_path: Path) -> None:
    """transformers leaves its class's own numbers in the config: of another vocabulary."""
    write_gguf(llama, tmp_path / "m.gguf")
    source = opened(tmp_path, gguf_file="m.gguf")
    config = source.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, None)
    said = json.loads((source.folder / "generation_config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"]) == (256, 257)
    # Where llama.cpp has another end for turns of a chat, both are ends.
    for turn, ends in ((257, 257), (258, [257, 258])):
        told = {"tokenizer.ggml.eot_token_id": turn, "tokenizer.ggml.padding_token_id": 259}
        write_gguf(llama, tmp_path / "m.gguf", settings=told)
        config = opened(tmp_path, gguf_file="m.gguf", download=False).config
        assert (config.eos_token_id, config.pad_token_id) == (ends, 259)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0},
            "scales RoPE by 'longrope'",
        ),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "scales RoPE by 'yarn'"),
        ({"rope.scaling.attn_factor": 1.5}, "sets llama.rope.scaling.attn_factor to 1.5"),
        ({"attention.sliding_window": 64}, "sets llama.attention.sliding_window to 64"),
        ({"expert_count": 8}, "sets llama.expert_count to 8"),
        ({"logit_scale": 0.25}, "sets llama.logit_scale to 0.25"),
        ({"attention.scale": 0.5}, "sets llama.attention.scale to 0.5"),
        ({"something.new": "x"}, "sets llama.something.new to x"),
        ({"feed_forward_length": [48, 40]}, "sets llama.feed_forward_length to"),
        ({"attention.key_length": 8, "rope.dimension_count": 4}, "heads of several sizes"),
        ({"attention.layer_norm_rms_epsilon": None}, "does not say its attention.layer_norm_rms"),
        ({"context_length": None}, "does not say its context_length"),
        ({"split.count": 3}, "is one of 3 parts"),
        ({"split.count": "x"}, "is one of x parts"),
        ({"block_count": 0}, "does not say its block_count"),
        ({"block_count": "2"}, "sets llama.block_count to 2"),
    ],
)
def test_what_transformers_would_not_read_of_a_gguf_file_is_refused(
    settings: dict[str, Any], expected: str, llama: Path, tmp_path: Path
) -> None:
    write_gguf(llama, tmp_path / "m.gguf", settings=settings)
    for download in (False, True):
        with pytest.raises(SourceError, match=rf"^a: .*{expected}"):
            opened(tmp_path, gguf_file="m.gguf", download=download)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"blk.1.ffn_up.weight": None}, "1 tensors are missing .* model.layers.1.mlp.up_proj"),
        ({f"blk.1.{n}.weight": None for n in ("attn_q", "attn_k")}, "2 tensors are missing"),
        ({"token_embd.weight": None}, "1 tensors are missing .* model.embed_tokens"),
        ({"blk.0.attn_q.bias": np.ones(32, np.float32)}, "has 1 tensors that a llama model does"),
        ({"blk.0.ffn_gate_inp.weight": np.ones((2, 32), np.float32)}, "would drop.*ffn_gate_inp"),
        ({"rope_factors_long.weight": np.ones(4, np.float32)}, "would drop.*rope_factors_long"),
        ({"blk.0.attn_q.scale": np.ones(1, np.float32)}, "would drop.*blk.0.attn_q.scale"),
        ({"blk.2.attn_norm.weight": np.ones(32, np.float32)}, "has 1 tensors that a llama model"),
        ({"blk.0.ffn_up.weight": np.ones((40, 32), np.float32)}, r"is \[40, 32\] in m.gguf"),
    ],
)
def test_a_gguf_file_with_other_tensors_than_the_models_is_refused(
    tensors: dict[str, Any], expected: str, llama: Path, tmp_path: Path, cache: Path
) -> None:
    """Before its weights are converted. transformers draws what is missing at random."""
    write_gguf(llama, tmp_path / "m.gguf", tensors=tensors)
    for download in (False, True):
        with pytest.raises(SourceError, match=rf"^a: .*{expected}"):
            opened(tmp_path, gguf_file="m.gguf", download=download)
    assert not list(cache.rglob("*.safetensors"))


def test_parts_of_a_gguf_file_are_refused_by_their_names(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(SourceError, match=r"^a: .*is one of 2 parts .*llama-gguf-split --merge"):
        opened(tmp_path, gguf_file="m-00001-of-00002.gguf", download=False)
    write_gguf(llama, tmp_path / "m-00001-of-00001.gguf")
    require_the_same(opened(tmp_path, gguf_file="m-00001-of-00001.gguf"), llama)


def test_nothing_that_transformers_filled_in_is_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """What it says of its loading must be empty, whatever the header promised."""
    write_gguf(llama, tmp_path / "m.gguf")
    load: Any = AutoModelForCausalLM.from_pretrained

    def filling_in(*args: Any, **settings: Any) -> Any:
        model, info = load(*args, **settings)
        return model, info | {"missing_keys": {"lm_head.weight"}}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", filling_in)
    with pytest.raises(SourceError, match=r"does not find all of it: .*lm_head.weight"):
        opened(tmp_path, gguf_file="m.gguf")
    assert not list(cache.rglob("*.safetensors"))


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
