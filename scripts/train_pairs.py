"""Pairs that differ as Llama 2 and Code Llama do, and as Qwen2 and Qwen2.5-Coder; trained, joined.

    python scripts/train_pairs.py --out pairs

Each pair grows from one base, as the released ones do: `chat` is tuned on English, `code` on Python
of which some is cut for filling in the middle, with special tokens that only `code` has. Controls
differ in one thing less. The pairs are then built by both methods; prints held-out losses per
domain as Markdown. What is there already is kept.

| pair | chat | code |
|---|---|---|
| llama | 512 tokens, RoPE theta 1e4 | 528 tokens, theta 1e6 |
| qwen2 | 600 tokens in 640 rows, tied, biases | 604 tokens in 672 rows, another end of text |

The tokenizers are of the class that transformers loads for the family: it cuts text in its own way.
"""

import argparse
import copy
import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from symphony_moe.bundled.corpus import documents
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.windows import Encoder, Packed, joined, pack_windows

HOLDOUT = 0.05
SEQUENCE_LENGTH, BATCH_WINDOWS = 256, 16
BASE_TOKENS, TUNING_TOKENS = 1_000_000, 500_000
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
FILL = ("<PRE>", "<SUF>", "<MID>", "<EOT>")


@dataclass(frozen=True)
class Kind:
    """One side of a pair."""

    tokens: tuple[str, ...] = ()
    """Special tokens after the base's."""
    theta: float = 1e4
    rows: int | None = None
    """Rows of the tables, where they are padded."""
    end: str | None = None
    """The token that ends a text, where it is not the base's."""


@dataclass(frozen=True)
class Pair:
    """A family of pairs: what they have in common, the code side, and the controls for it."""

    config: Mapping[str, Any]
    tokens: int
    chat: Kind
    codes: Mapping[str, Kind]


SIXTEEN = (*FILL, *(f"<X{number}>" for number in range(12)))
PAIRS = {
    "llama": Pair(
        {"model_type": "llama", "tie_word_embeddings": False},
        512,
        Kind(),
        {
            "code": Kind(SIXTEEN, 1e6),
            "same theta": Kind(SIXTEEN),
            "same tokens": Kind((), 1e6),
            "control": Kind(),
        },
    ),
    "qwen2": Pair(
        {"model_type": "qwen2", "tie_word_embeddings": True},
        600,
        Kind(rows=640),
        {"code": Kind(FILL, rows=672, end="<EOT>"), "control": Kind(rows=640)},
    ),
}


def train_tokenizer(family: str, size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of English and Python."""
    texts = itertools.chain(*(training_documents(domain) for domain in ("english", "python")))
    if family == "qwen2":
        trained: PreTrainedTokenizerBase = Qwen2Tokenizer().train_new_from_iterator(
            texts, size, show_progress=False
        )
        return trained
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_tokenizer(base: PreTrainedTokenizerBase, kind: Kind, folder: Path) -> None:
    own = copy.deepcopy(base)
    own.add_tokens([AddedToken(t, normalized=False) for t in kind.tokens], special_tokens=True)
    if kind.end is not None:
        own.eos_token = kind.end
    own.save_pretrained(folder)


def training_documents(domain: str) -> list[str]:
    """What no evaluation sees, neither as it is nor cut."""
    if domain == "python":
        return [whole for whole, cut in python_documents() if not is_held_out(cut, HOLDOUT)]
    return [text for text in documents(domain) if not is_held_out(text, HOLDOUT)]


def python_documents() -> list[tuple[str, str]]:
    """(document, half of the time cut for filling in the middle), without those that are held out
    as they are."""
    generator = random.Random(0)
    pairs = []
    for document in documents("python"):
        cut = document
        if len(document) > 2 and generator.random() < 0.5:
            first, second = sorted(generator.sample(range(1, len(document)), 2))
            prefix, middle, suffix = document[:first], document[first:second], document[second:]
            cut = f"<PRE>{prefix}<SUF>{suffix}<MID>{middle}<EOT>"
        if not is_held_out(document, HOLDOUT):
            pairs.append((document, cut))
    return pairs


def texts_of(kind: Kind) -> list[str]:
    """What the code side is tuned on: cut text only where it has the tokens for it."""
    return [
        cut if kind.tokens else whole
        for whole, cut in python_documents()
        if not is_held_out(cut, HOLDOUT)
    ]


def write_text(out: Path) -> None:
    """`fill.jsonl` for calibration and evaluation, `python-held-out.jsonl` for evaluation."""
    held_out = [text for text in documents("python") if is_held_out(text, HOLDOUT)]
    for name, texts in (
        ("fill.jsonl", [cut for _, cut in python_documents()]),
        ("python-held-out.jsonl", held_out),
    ):
        with (out / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def batches(
    texts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Packed]:
    """Endless batches, equal shares of each kind of text."""
    generator = torch.Generator().manual_seed(seed)
    packed = [pack_windows(t, Encoder.of(tokenizer), SEQUENCE_LENGTH) for t in texts]
    each = BATCH_WINDOWS // len(packed)
    while True:
        yield joined([p[torch.randint(len(p), (each,), generator=generator)] for p in packed])


def train(model: Any, stream: Iterator[Packed], tokens: int, rate: float, name: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), fused=True)
    steps = tokens // (BATCH_WINDOWS * SEQUENCE_LENGTH)
    for step in range(steps):
        share = min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * share
        batch = next(stream)
        loss = model(input_ids=batch.windows, labels=batch.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step == steps - 1:
            print(f"{name}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)


def new_model(pair: Pair, kind: Kind, tokenizer: PreTrainedTokenizerBase) -> Any:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    rope = {"rope_type": "default", "rope_theta": kind.theta}
    rows = kind.rows or len(tokenizer)
    settings = {**SHAPE, **pair.config, **ids, "vocab_size": rows, "rope_parameters": rope}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)


def make_sources(out: Path, family: str) -> None:
    """The base and its descendants, as whole model folders in bfloat16."""
    pair = PAIRS[family]
    home = out / family
    base_tokenizer = train_tokenizer(family, pair.tokens)
    save_tokenizer(base_tokenizer, pair.chat, home / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(home / "tokenizer")
    both = [training_documents(domain) for domain in ("english", "python")]
    base = home / "base"
    if not base.is_dir():
        torch.manual_seed(30)
        model = new_model(pair, pair.chat, tokenizer)
        train(model, batches(both, tokenizer, 30), BASE_TOKENS, 3e-3, f"{family} base")
        model.save_pretrained(base)
    sides = {"chat": pair.chat, **pair.codes}
    for seed, (name, kind) in enumerate(sides.items(), start=31):
        folder = home / name.replace(" ", "-")
        if folder.is_dir():
            continue
        save_tokenizer(base_tokenizer, kind, home / f"tokenizer-{seed}")
        tokenizer = AutoTokenizer.from_pretrained(home / f"tokenizer-{seed}")
        torch.manual_seed(seed)
        model = new_model(pair, kind, tokenizer)
        weights = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                tensor[: len(weights[key])] = weights[key][: len(tensor)]
        texts = both[0] if name == "chat" else texts_of(kind)
        train(model, batches([texts], tokenizer, seed), TUNING_TOKENS, 1.5e-3, f"{family} {name}")
        model.bfloat16().save_pretrained(folder)
        save_tokenizer(base_tokenizer, kind, folder)


def write_recipe(out: Path, family: str, code: str) -> Path:
    kind = PAIRS[family].codes[code]
    folder = code.replace(" ", "-")
    data = "../fill.jsonl" if kind.tokens else "bundled:python"
    recipe = {
        "sources": {
            "chat": {"model": "./chat", "data": "bundled:english"},
            "code": {"model": f"./{folder}", "data": data},
        },
        "calibration": {"tokens": 131072, "sequence_length": 256},
        "evaluation": {
            "tokens": 16384,
            "sequence_length": 256,
            "extra": {"python": "../python-held-out.jsonl", "headers": "bundled:headers"},
        },
    }
    path = out / family / f"{folder}.yaml"
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    return path


def symphony(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "symphony_moe", *arguments])
    if done.returncode != 0:
        raise SystemExit(f"symphony {' '.join(arguments)} failed")


METHODS = {
    "plain mean": (
        "method=symphony",
        "backbone.attention=linear",
        "align.neurons=none",
        "router.init=regression",
    ),
    "symphony": ("method=symphony",),
    "harmonized": ("method=harmonized",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pairs"))
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--set", action="append", default=[], help="another setting")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    write_text(out)
    rows = []
    for family in options.only:
        make_sources(out, family)
        for code in PAIRS[family].codes:
            recipe = write_recipe(out, family, code)
            for method, settings in METHODS.items():
                run = out / family / "runs" / f"{recipe.stem}-{method.replace(' ', '-')}"
                sets = [
                    word for setting in (*settings, *options.set) for word in ("--set", setting)
                ]
                if not (run / "checkpoint").is_dir():
                    symphony("build", str(recipe), "--out", str(run), "--overwrite", *sets)
                    symphony("verify", str(run))
                    symphony("evaluate", str(run))
                metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
                if method == "plain mean":
                    for name in ("chat", "code"):
                        rows.append((family, code, name, metrics["sources"][name]))
                rows.append((family, code, method, metrics["built"]))
    columns = list(rows[0][3])
    print("\n| pair | code side | model | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 3) + "|")
    for family, code, name, losses in rows:
        cells = " | ".join(f"{losses[column]:.3f}" for column in columns)
        print(f"| {family} | {code} | {name} | {cells} |")


if __name__ == "__main__":
    main()
