"""Sources of real shapes with random weights, their tokenizers and their text: made once, the same
from the same seed.

A part runs in a small process, so they are made by this module as a program of its own:

    python -m bench_parts.models SHAPE FOLDER COUNT [LAYERS]
"""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    # SmolLM2-135M
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    # Qwen2.5-0.5B
    "0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    # TinyLlama
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    # Llama 2 7B
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    # For how time grows: layers that weigh more than what surrounds them.
    "wide": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    },
    # For trying the bench itself.
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
"""Name -> what its config has beside transformers' defaults. All are Llama but where they say."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_scaling": 8.0,
    },
    "olmo2": {"model_type": "olmo2"},
    "smollm3": {"model_type": "smollm3", "pad_token_id": None},
    "phi3": {"model_type": "phi3", "sliding_window": None, "pad_token_id": None},
}
"""Family -> what its config has beside a shape's."""
SHAPES |= {
    f"{shape} {family}": {**SHAPES[shape], **settings}
    for shape in ("wide", "tiny")
    for family, settings in FAMILIES.items()
}

DOCUMENTS = 4000
"""Of each text."""

NAMES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def sources(home: Path, shape: str, count: int, layers: int | None = None) -> dict[str, Any]:
    """The `sources` of a recipe: `count` models of a shape and their text, made where they are not
    there yet. `layers`: how many, where not all."""
    folder = home / "models" / (shape if layers is None else f"{shape}-{layers}")
    made = folder / NAMES[count - 1] / "config.json"
    if not made.is_file():
        extra = [] if layers is None else [str(layers)]
        command = [sys.executable, "-m", "bench_parts.models", shape, str(folder), str(count)]
        here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        subprocess.run([*command, *extra], check=True, env=here, capture_output=True)
    text = home / "text"
    for name in NAMES[:count]:
        if not (text / f"{name}.jsonl").is_file():
            write_text(text / f"{name}.jsonl", NAMES.index(name))
    return {
        name: {"model": str(folder / name), "data": str(text / f"{name}.jsonl")}
        for name in NAMES[:count]
    }


def write_text(path: Path, seed: int) -> None:
    """Documents of made-up words; each seed prefers some of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = random.Random(f"text {seed}")
    words = _words(8000)
    favoured = generator.sample(words, 2000)
    staged = path.with_suffix(".new")
    with staged.open("w", encoding="utf-8") as file:
        for _ in range(DOCUMENTS):
            drawn = generator.choices(favoured, k=80) + generator.choices(words, k=40)
            file.write(json.dumps({"text": " ".join(drawn)}) + "\n")
    staged.replace(path)


def _words(count: int) -> list[str]:
    generator = random.Random("words")
    consonants, vowels = "bcdfghjklmnpqrstvwz", "aeiou"
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = generator.randint(1, 5)
        word = "".join(
            generator.choice(consonants) + generator.choice(vowels) for _ in range(syllables)
        )
        found[word] = None
    return list(found)


def _texts_for_tokenizer(count: int) -> Iterator[str]:
    """Text with enough words for a vocabulary of that size, the earlier words more often."""
    words = _words(count)
    generator = random.Random("tokenizer")
    weights = list(itertools.accumulate(1 / (number + 10) for number in range(len(words))))
    for first in range(0, len(words), 50):
        often = generator.choices(words, cum_weights=weights, k=50)
        yield " ".join([*words[first : first + 50], *often])


def make_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE tokenizer of exactly `size` tokens; unused ones fill it up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        # The last is a token of Qwen2's class: what the files lack of it would be taken out.
        special_tokens=["<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts_for_tokenizer(max(2000, size)), trainer)
    # Among the model's own: added tokens would take seconds to load.
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<unused {number}>": number for number in range(len(vocabulary), size)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)


def make_models(shape: str, folder: Path, count: int, layers: int | None = None) -> None:
    """Folders with a random model each, in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {"model_type": "llama", **SHAPES[shape]}
    if layers is not None:
        settings["num_hidden_layers"] = layers
    settings |= {"max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(**settings)
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        make_tokenizer(tokenizer, settings["vocab_size"])
    for seed, name in enumerate(NAMES[:count]):
        model_folder = folder / name
        if (model_folder / "config.json").is_file():
            continue
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        staged = folder / f"{name}.new"
        shutil.rmtree(staged, ignore_errors=True)
        model.save_pretrained(staged)
        for file in tokenizer.iterdir():
            shutil.copy(file, staged)
        staged.rename(model_folder)


if __name__ == "__main__":
    shape, folder, count, *layers = sys.argv[1:]
    make_models(shape, Path(folder), int(count), int(layers[0]) if layers else None)
