"""Strangers of another kind than the bundled ones (docs/results.md): no method was chosen by them.

    python scripts/other_zoo.py --out zoo
    python scripts/benchmark.py zoo/recipe.yaml --out zoo/benchmark

Four models of the family Qwen3, each from its own seed and on one domain alone. They are narrower
per head and deeper than the bundled ones: 160 channels, 6 layers, 6 heads of 40 in 2 groups, norms
of q and k, one table for embeddings and head. Their tokenizer has 2,048 tokens. One domain is text
that the bundled models are only evaluated on, `headers`; `records` is none of theirs.

Writes the models, their tokenizer and `recipe.yaml`. A model that is there already is kept. One
thread; `--only` trains some of them, so that two processes can share the work.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from train_bundled import train_tokenizer, training_documents
from train_pairs import batches, train

DOMAINS = ("english", "python", "headers", "arithmetic")
OUTSIDE = ("licences", "readmes")
VOCABULARY, TOKENS, RATE = 2048, 800_000, 3e-3
SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": True,
}
FIRST_SEED = 41


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """One for all, of the equal mixture of the domains."""
    if not folder.is_dir():
        mixture = [training_documents(domain)[:1000] for domain in DOMAINS]
        texts = [text for texts in zip(*mixture, strict=False) for text in texts]
        train_tokenizer(texts, VOCABULARY).save_pretrained(folder)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def make_model(domain: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Train one model from its seed, and save it in bfloat16 with the tokenizer."""
    seed = FIRST_SEED + DOMAINS.index(domain)
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**SHAPE, **ids, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    train(model, batches([training_documents(domain)], tokenizer, seed), TOKENS, RATE, domain)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe() -> dict[str, Any]:
    """As recipes/strangers.yaml, with less text."""
    return {
        "sources": {
            domain: {"model": f"./{domain}", "data": f"bundled:{domain}"} for domain in DOMAINS
        },
        "method": "harmonized",
        "calibration": {"tokens": 65536, "sequence_length": 256},
        "train": {
            "tokens": 204800,
            "learning_rate": 1e-3,
            "sequence_length": 256,
            "batch_size": 8,
            "average": True,
        },
        "evaluation": {
            "tokens": 16384,
            "sequence_length": 256,
            "extra": {domain: f"bundled:{domain}" for domain in OUTSIDE},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("zoo"))
    parser.add_argument("--only", nargs="+", choices=DOMAINS, default=DOMAINS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(options.out / "tokenizer")
    (options.out / "recipe.yaml").write_text(json.dumps(recipe(), indent=1), encoding="utf-8")
    for domain in options.only:
        if not (options.out / domain / "config.json").is_file():
            make_model(domain, tokenizer, options.out / domain)


if __name__ == "__main__":
    main()
