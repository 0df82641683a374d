"""Forty pairs that do not match: each mismatch is named, with what it means; a pair that is built
all the same makes a model that verifies, and one that is not leaves nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checks import add_tokens, drop_merges, swap_tokens
from conftest import make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.cli import main
from symphony_moe.recipe.load import load_recipe
from symphony_moe.sources.stock import load_stock

Change = Callable[[Path], Any]


def config(**settings: Any) -> Change:
    """Another model altogether, with these settings."""

    def change(model: Path) -> None:
        variant = "qwen2-untied" if settings.get("model_type") == "qwen2" else "llama"
        shutil.rmtree(model)
        make_model(model, variant, 1, **settings)

    return change


def edited(file: str, **settings: Any) -> Change:
    """Settings of a JSON file; None takes one away."""

    def change(model: Path) -> None:
        path = model / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        content = {k: v for k, v in (content | settings).items() if v is not None}
        path.write_text(json.dumps(content))

    return change


def tokenizer(how: Callable[[dict[str, Any]], Any], rows: int = 300) -> Change:
    def change(model: Path) -> None:
        if rows != 300:
            config(vocab_size=rows)(model)
        path = model / "tokenizer.json"
        content = json.loads(path.read_text())
        how(content)
        path.write_text(json.dumps(content))

    return change


def tensors(how: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(model: Path) -> None:
        content = load_file(model / "model.safetensors")
        how(content)
        save_file(content, model / "model.safetensors", {"format": "pt"})

    return change


def written(file: str, text: str) -> Change:
    return lambda model: (model / file).write_text(text)


def sentencepiece(content: dict[str, Any]) -> None:
    content["decoder"], content["pre_tokenizer"] = {"type": "ByteFallback"}, None
    add_tokens(content, ["<|x|>"])


def unigram(content: dict[str, Any]) -> None:
    add_tokens(content, ["<|x|>"])
    pieces = [[token, -1.0] for token in content["model"]["vocab"]]
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces}


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
ERROR, BUILT = 2, 0

PAIRS: list[tuple[str, Change, int, str]] = [
    # What no MoE can hold.
    ("family", config(model_type="qwen2"), ERROR, "model_type (a: llama; b: qwen2)"),
    ("width", config(hidden_size=64, head_dim=8), ERROR, "hidden_size (a: 32; b: 64)"),
    ("depth", config(num_hidden_layers=3), ERROR, "num_hidden_layers (a: 2; b: 3)"),
    ("heads", config(num_attention_heads=2, head_dim=8), ERROR, "num_attention_heads (a: 4; b: 2)"),
    ("kv heads", config(num_key_value_heads=4), ERROR, "num_key_value_heads (a: 2; b: 4)"),
    ("head size", config(head_dim=16), ERROR, "head_dim (a: 8; b: 16)"),
    ("activation", config(hidden_act="gelu"), ERROR, "hidden_act (a: silu; b: gelu)"),
    ("attention bias", config(attention_bias=True), ERROR, "biases of attention (a: False; b: T"),
    ("ffn bias", config(mlp_bias=True), ERROR, "cannot become an expert"),
    (
        "tokenizer kind",
        tokenizer(sentencepiece, 301),
        ERROR,
        "b: its tokenizer makes nothing of the token ",
    ),
    # What is wrong with one of them.
    ("no config", lambda m: (m / "config.json").unlink(), ERROR, "has no config.json"),
    ("no weights", lambda m: (m / "model.safetensors").unlink(), ERROR, "no .safetensors weights"),
    ("no tokenizer", lambda m: (m / "tokenizer.json").unlink(), ERROR, "no usable tokenizer"),
    ("missing", tensors(lambda t: t.pop(Q)), ERROR, "1 tensors are missing"),
    ("surplus", tensors(lambda t: t.update(x=torch.ones(1))), ERROR, "has 1 tensors that a llama"),
    ("misshapen", tensors(lambda t: t.update({Q: torch.ones(31, 32)})), ERROR, "[31, 32]"),
    ("integers", tensors(lambda t: t.update({Q: torch.ones(32, 32).int()})), ERROR, "a float type"),
    ("config lies", edited("config.json", num_hidden_layers=3), ERROR, "model.layers.2."),
    (
        "quantized",
        edited("config.json", quantization_config={"quant_method": "awq"}),
        ERROR,
        "is quantized",
    ),
    ("unknown family", edited("config.json", model_type="gpt2"), ERROR, "is a 'gpt2' model"),
    (
        "too many tokens",
        tokenizer(lambda c: add_tokens(c, ["<|x|>"])),
        ERROR,
        "has 301 tokens, the model embeddings for 300",
    ),
    (
        "generation config",
        written("generation_config.json", "{"),
        ERROR,
        "generation_config.json is not usable",
    ),
    # What is built, and said.
    ("unigram", tokenizer(unigram, 301), BUILT, "kind of tokenizer (a: byte-level BPE; b: Unigram"),
    ("ffn", config(intermediate_size=40), BUILT, "fine: intermediate_size (a: 48; b: 40)"),
    (
        "theta",
        config(rope_parameters=ROPE | {"rope_theta": 1e6}),
        BUILT,
        "warning: rope_parameters (a: rope_theta 10000",
    ),
    (
        "scaling",
        config(rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0}),
        BUILT,
        "warning: rope_parameters (a: rope_theta 10000",
    ),
    ("eps", config(rms_norm_eps=1e-3), BUILT, "warning: rms_norm_eps (a: 1e-05; b: 0.001)"),
    ("context", config(max_position_embeddings=512), BUILT, "max_position_embeddings (a: 256"),
    (
        "tied head",
        config(tie_word_embeddings=True),
        BUILT,
        "tie_word_embeddings (a: False; b: True)",
    ),
    (
        "dtype",
        tensors(lambda t: t.update({k: v.half() for k, v in t.items()})),
        BUILT,
        "fine: dtype (a: F32; b: F16)",
    ),
    ("padding", config(vocab_size=320), BUILT, "fine: vocab_size (a: 300; b: 320)"),
    (
        "more tokens",
        tokenizer(lambda c: add_tokens(c, ["<|x|>"]), 301),
        BUILT,
        "1 of b's come after the anchor's, as 300 to 300: '<|x|>'",
    ),
    ("fewer tokens", tokenizer(lambda c: drop_merges(c, 4)), BUILT, "b lacks 4 of the others'"),
    ("numbers", tokenizer(swap_tokens), BUILT, "the same tokens under other numbers"),
    (
        "merges",
        tokenizer(lambda c: c["model"]["merges"].pop()),
        BUILT,
        "warning: tokenizer merges and normalization (a: sha256",
    ),
    (
        "normalization",
        tokenizer(lambda c: c.update(normalizer={"type": "Lowercase"})),
        BUILT,
        "warning: tokenizer merges and normalization (a: sha256",
    ),
    (
        "end of text",
        edited("tokenizer_config.json", eos_token="<s>"),
        BUILT,
        "warning: special tokens "
        "(a: bos_token <s>, eos_token </s>; b: bos_token <s>, eos_token <s>)",
    ),
    (
        "end id",
        edited("config.json", eos_token_id=7),
        BUILT,
        "warning: eos_token_id (a: 257; b: 7)",
    ),
    (
        "chat template",
        written("chat_template.jinja", "{{ messages }}"),
        BUILT,
        "warning: chat template (a: none; b: sha256",
    ),
    (
        "temperature",
        edited("generation_config.json", temperature=0.5, do_sample=True),
        BUILT,
        "warning: generation config (a:",
    ),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("good"), "llama", count=2).parent


def test_there_are_forty() -> None:
    assert len(PAIRS) == 40 and len({name for name, *_ in PAIRS}) == 40


@pytest.mark.parametrize(
    ("change", "code", "said"), [p[1:] for p in PAIRS], ids=[p[0] for p in PAIRS]
)
def test_every_mismatch_is_named(
    change: Change,
    code: int,
    said: str,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(good, tmp_path / "pair")
    path, out = tmp_path / "pair" / "recipe.yaml", tmp_path / "out"
    change(tmp_path / "pair" / "models" / "b")
    assert main(["plan", str(path)]) == code
    shown = capsys.readouterr()
    assert said in (shown.err if code else shown.out), shown
    assert "Traceback" not in shown.err
    if code:
        assert main(["build", str(path), "--out", str(out)]) == code
        assert not out.exists()
        return
    # A consequence follows what differs.
    line = next(line for line in shown.out.splitlines() if said in line)
    assert len(line.partition("): ")[2]) > 20, line


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [p[1] for p in PAIRS if not p[2]], ids=[p[0] for p in PAIRS if not p[2]]
)
def test_what_a_mismatch_allows_is_built_and_right(
    change: Change, good: Path, tmp_path: Path
) -> None:
    shutil.copytree(good, tmp_path / "pair")
    change(tmp_path / "pair" / "models" / "b")
    recipe = load_recipe(tmp_path / "pair" / "recipe.yaml", ["method=harmonized", "fit.epochs=0"])
    run = pipeline.build(recipe, tmp_path / "out")
    pipeline.verify(run)
    assert (
        load_stock(run.checkpoint).num_parameters() == run.read_json(run.plan)["total_parameters"]
    )
