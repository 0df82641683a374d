"""Pico checkpoints of every family, saved as real model folders."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import stated_shapes  # noqa: F401 (before the package)

# Pico models gain nothing by more threads, and lose much where cores are shared: here, and in the
# commands that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A test is no worse on a machine that is busy.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

if TYPE_CHECKING:
    # Not while running: the shape checker must see the package before anything imports it.
    from symphony_moe.runs.folder import RunFolder

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama-tied-rope3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 16, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2-granitemoe": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2-windows": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "olmo2": {"model_type": "olmo2"},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True},
}
"""Every family, with the variations that its target must hold."""
COMMON = [
    "llama",
    "llama-tied-rope3",
    "mistral",
    "qwen2",
    "qwen2-untied",
    "qwen2-granitemoe",
    "qwen3",
]
"""Those for tests of what no family does otherwise."""
ARCHITECTURES = {"qwen2-granitemoe": "granitemoe"}
"""Variant -> `output.architecture`, where that is not `auto`."""


def target_of_variant(variant: str) -> str:
    """`model_type` of the output of a variant's sources."""
    auto = {
        "qwen2": "ernie4_5_moe",
        "qwen3": "qwen3_moe",
        "granite": "granitemoe",
        "olmo2": "flex_olmo",
        "smollm3": "granitemoe_swa",
    }
    settings = VARIANTS[variant]
    if settings.get("attention_bias"):
        return "granitemoe"
    if settings.get("use_sliding_window"):
        return "qwen2_moe"
    return ARCHITECTURES.get(variant) or auto.get(settings["model_type"], "mixtral")


def ffn_of(layer: Any) -> Any:
    """The mixture in a stock MoE's layer."""
    return getattr(layer, "mlp", None) or layer.block_sparse_moe


def router_of(layer: Any) -> Any:
    """The module in it that holds the router's matrix."""
    return getattr(ffn_of(layer), "gate", None) or ffn_of(layer).router


WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
]


def make_tokenizer(folder: Path, bos: bool = True, adds_bos: bool | None = None) -> None:
    """A byte-level tokenizer of 300 tokens: the 256 bytes, `<s>`, `</s>`, `<|endoftext|>` (which
    Qwen's tokenizer would otherwise add), and words. `bos`: it has a BOS, and `adds_bos` (default:
    the same): it puts it before every text, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    vocabulary |= {"<s>": 256, "</s>": 257, "<|endoftext|>": 258}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary and len(vocabulary) < 300:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    while len(vocabulary) < 300:
        vocabulary[f"<unused{len(vocabulary)}>"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos if adds_bos is None else adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 256)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def save_random(config: Any, folder: Path, seed: int) -> None:
    """A random model of a config, whose layers, gains and biases all matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)


def make_model(folder: Path, variant: str, seed: int, **changes: Any) -> Path:
    """A folder with a random model (see `save_random`) and its tokenizer."""
    settings = SIZES | {"tie_word_embeddings": False} | VARIANTS[variant] | changes
    config = AutoConfig.for_model(**settings)
    save_random(config, folder, seed)
    make_tokenizer(folder, bos=not variant.startswith("qwen"))
    return folder


def make_text(path: Path, seed: int, documents: int = 200) -> Path:
    """A .jsonl file of random word sequences; each seed prefers other words."""
    generator = torch.Generator().manual_seed(seed)
    preference = torch.rand(len(WORDS), generator=generator) ** 3 + 0.01
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            drawn = torch.multinomial(preference, 40, replacement=True, generator=generator)
            text = f"{number} " + " ".join(WORDS[index] for index in drawn)
            file.write(json.dumps({"text": text}) + "\n")
    return path


def make_recipe(root: Path, variant: str = "llama", count: int = 3, **sections: Any) -> Path:
    """A folder with `count` sources `a`, `b`, ..., their text, and a recipe for them."""
    root.mkdir(parents=True, exist_ok=True)
    sources = {}
    for number in range(count):
        name = "abcdefgh"[number]
        make_model(root / "models" / name, variant, seed=number)
        make_text(root / f"{name}.jsonl", seed=number)
        sources[name] = {"model": f"models/{name}", "data": f"{name}.jsonl"}
    make_text(root / "other.jsonl", seed=99, documents=40)
    recipe = {
        "sources": sources,
        "calibration": {"tokens": 1536, "sequence_length": 64},
        "output": {"dtype": "float32", "architecture": ARCHITECTURES.get(variant, "auto")},
        "train": {"tokens": 2048, "sequence_length": 64, "batch_size": 4, "learning_rate": 1e-3},
        "evaluation": {
            "tokens": 256,
            "holdout": 0.1,
            "sequence_length": 64,
            "extra": {"other": "other.jsonl"},
        },
    }
    for section, values in sections.items():
        old = recipe.get(section)
        recipe[section] = (
            {**old, **values} if isinstance(old, dict) and section != "sources" else values
        )
    path = root / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command sets up the package's logging for a process of its own."""
    package = logging.getLogger("symphony_moe")
    before = package.handlers, package.propagate, package.level
    yield
    package.handlers, package.propagate, package.level = before


@pytest.fixture(scope="session", autouse=True)
def _no_stopwatch() -> Iterator[None]:
    """A plan measures this machine's speed, which takes longer than a pico build."""
    from symphony_moe.building import estimate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "matmul_speed", lambda dtype: 1e10)
        yield


@pytest.fixture(scope="session")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """variant -> recipe of three random sources, made once. Nobody changes what is in there."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = make_recipe(tmp_path_factory.mktemp(variant), variant)
        return made[variant]

    return get


@pytest.fixture(scope="session")
def built(
    recipes: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> "Callable[[str], RunFolder]":
    """variant -> finished build of its recipe, made once. Nobody changes what is in there: copy
    it."""
    from symphony_moe import pipeline
    from symphony_moe.recipe.load import load_recipe

    made: dict[str, RunFolder] = {}

    def get(variant: str) -> "RunFolder":
        if variant not in made:
            out = tmp_path_factory.mktemp(f"built-{variant}") / "run"
            made[variant] = pipeline.build(load_recipe(recipes(variant)), out)
        return made[variant]

    return get


@pytest.fixture
def run(built: "Callable[[str], RunFolder]", tmp_path: Path) -> "RunFolder":
    """A copy of Llama's finished build, to break and to go on with."""
    from symphony_moe.runs.folder import RunFolder

    shutil.copytree(built("llama").root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def copied(built: "Callable[[str], RunFolder]", tmp_path: Path) -> "Callable[[str], RunFolder]":
    """variant -> a fresh copy of its finished build."""
    from symphony_moe.runs.folder import RunFolder

    def get(variant: str) -> "RunFolder":
        root = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(built(variant).root, root)
        return RunFolder(root)

    return get
