"""Pairs that do not match, more than forty: each mismatch is named, with what it means; a pair that
is built all the same makes a model that verifies, and one that is not leaves nothing."""

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


BROKEN = {
    *("no config", "no weights", "no tokenizer", "missing", "surplus", "misshapen", "integers"),
    *("config lies", "quantized", "unknown family", "too many tokens", "generation config"),
}
"""Pairs of which the second can be read by nobody."""

OTHERS: list[tuple[str, dict[str, Any], int, str]] = [
    ("mistral", {"sliding_window": 32}, BUILT, "warning: sliding_window (a: 16; b: 32)"),
    (
        "qwen2-windows",
        {"max_window_layers": 0},
        BUILT,
        "warning: layer_types (a: windows in layers 1; b: all)",
    ),
    ("qwen2", {"tie_word_embeddings": False}, BUILT, "tie_word_embeddings (a: True; b: False)"),
    ("qwen3", {"head_dim": 8}, ERROR, "head_dim (a: 16; b: 8)"),
    ("qwen3", {"rms_norm_eps": 1e-3}, BUILT, "warning: rms_norm_eps (a: 1e-06; b: 0.001)"),
    ("granite", {"residual_multiplier": 0.5}, ERROR, "residual_multiplier (a: 0.4; b: 0.5)"),
    ("granite", {"embedding_multiplier": 2.0}, ERROR, "embedding_multiplier (a: 3; b: 2)"),
    ("granite", {"attention_multiplier": 0.3}, ERROR, "attention_multiplier (a: 0.2; b: 0.3)"),
    ("granite", {"logits_scaling": 1.0}, ERROR, "logits_scaling (a: 2; b: 1)"),
    ("olmo2", {"rms_norm_eps": 1e-3}, BUILT, "warning: rms_norm_eps (a: 1e-05; b: 0.001)"),
    ("olmo2", {"num_key_value_heads": 4}, ERROR, "num_key_value_heads (a: 2; b: 4)"),
    ("smollm3", {"no_rope_layers": [0, 1]}, BUILT, "warning: no_rope_layers (a: 1, 0; b: 0, 1)"),
    ("llama-biases", {"attention_bias": False}, ERROR, "biases of attention (a: True; b: False)"),
]
"""Pairs of other families: (variant, what the second has otherwise, how it ends, what is said)."""


def test_many_numbers_are_not_told_one_by_one(tmp_path: Path) -> None:
    """But whether they are the same."""
    head = {"head_dim": 32, "max_position_embeddings": 256, "original_max_position_embeddings": 64}
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0} | {
        f"{name}_factor": [1.0 + pair / 7 for pair in range(16)] for name in ("short", "long")
    }
    path = make_recipe(tmp_path, "llama", count=2)
    for seed, name in enumerate("ab"):
        own = rope | {"long_factor": [number + seed / 100 for number in rope["long_factor"]]}
        make_model(tmp_path / "models" / name, "llama", seed, rope_parameters=own, **head)
    found = pipeline.plan(load_recipe(path, ["output.architecture=mixtral"])).differences
    (rope_words,) = [str(one) for one in found if one.what == "rope_parameters"]
    assert "long_factor 16 numbers from 1 to 3.143, sha256 " in rope_words
    assert "long_factor 16 numbers from 1.01 to 3.153, sha256 " in rope_words


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("good"), "llama", count=2).parent


def test_there_are_forty() -> None:
    """Pairs that do not match, without those of which one is no model at all."""
    assert len({name for name, *_ in PAIRS}) == len(PAIRS)
    broken = [name for name, *_ in PAIRS if name in BROKEN]
    assert len(PAIRS) - len(broken) + len(OTHERS) > 40 and len(broken) == len(BROKEN)


@pytest.mark.parametrize(
    ("variant", "settings", "code", "said"), OTHERS, ids=lambda value: str(value)[:40]
)
def test_mismatches_of_other_families_are_named(
    variant: str,
    settings: dict[str, Any],
    code: int,
    said: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By `plan`, and by a build as well, where it warns."""
    path, out = make_recipe(tmp_path, variant, count=2, method="btx"), tmp_path / "out"
    make_model(tmp_path / "models" / "b", variant, 1, **settings)
    assert main(["plan", str(path)]) == code
    shown = capsys.readouterr()
    assert said in (shown.err if code else shown.out), shown
    assert main(["build", str(path), "--out", str(out)]) == code
    logged = capsys.readouterr().err
    assert said.removeprefix("warning: ") in logged
    assert out.exists() == (code == BUILT)


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
