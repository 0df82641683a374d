"""Train the bundled tiny source models from their seeds; or print their held-out losses.

Two families of four specialists, one per domain of `symphony_moe.bundled.corpus`:

- `strangers`: each from its own seed, on its own domain only;
- `branches`: one base trained on the equal mixture of the four domains, then tuned per domain. The
  base is not bundled.

    python scripts/train_bundled.py --jobs 2          # both families
    python scripts/train_bundled.py --table           # the loss tables, in markdown

The same machine and versions give the same bytes: one thread per process, seeds from `SEEDS`.
"""

import argparse
import itertools
import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Before the imports below read them: the tokenizer's threads would make two processes four.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from symphony_moe import bundled
from symphony_moe.bundled.corpus import DOMAINS, OUT_OF_DOMAIN, documents
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.windows import Encoder, Packed, Pieces, WindowDraw, draw_pieces, pack_windows

logger = logging.getLogger("train_bundled")

HOLDOUT = 0.05
"""Share of the documents that no bundled model sees: the default of `evaluation.holdout`."""

SEQUENCE_LENGTH = 256
BATCH_WINDOWS = 16
VOCABULARY = 1024
TABLE_TOKENS = 32_768
"""Held-out text per domain in the table."""

BASE = "branches/base"
SEEDS = {
    "strangers/english": 11,
    "strangers/python": 12,
    "strangers/arithmetic": 13,
    "strangers/records": 14,
    BASE: 20,
    "branches/english": 21,
    "branches/python": 22,
    "branches/arithmetic": 23,
    "branches/records": 24,
}


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model is trained."""

    tokens: int
    """Tokens seen, repeats counted."""
    learning_rate: float
    """Peak of the cosine, after a linear warm-up."""


FROM_SCRATCH = Schedule(tokens=3_000_000, learning_rate=3e-3)
FOR_BASE = Schedule(tokens=4_000_000, learning_rate=3e-3)
FOR_BRANCH = Schedule(tokens=1_000_000, learning_rate=1.5e-3)


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `size` tokens, each digit one, BOS put in front as Llama does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> LlamaForCausalLM:
    """About 1.05 million parameters, drawn from torch's current seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def training_documents(domain: str) -> list[str]:
    return [text for text in documents(domain) if not is_held_out(text, HOLDOUT)]


def held_out_text(domain: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Pieces:
    """At most so many tokens of held-out text, documents of at most `SEQUENCE_LENGTH` tokens."""
    held_out = [text for text in documents(domain) if is_held_out(text, HOLDOUT)]
    drawing = WindowDraw(tokens, SEQUENCE_LENGTH, seed=0)
    return draw_pieces(domain, held_out, Encoder.of(tokenizer), drawing)


def shuffled_forever(
    text: Packed, count: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `count` windows, with their labels; every window once before any comes again. The
    first token of a document is no label: nothing before it foretells it."""
    while True:
        for chosen in torch.randperm(len(text), generator=generator).split(count):
            if len(chosen) == count:
                yield text[chosen].windows, text[chosen].labels


def train(name: str, start: Path | None, tokenizer_folder: Path, folder: Path) -> None:
    """Train one model, from scratch or from the folder `start`, and save it as a whole folder."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    torch.manual_seed(SEEDS[name])
    generator = torch.Generator().manual_seed(SEEDS[name])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    domains = DOMAINS if name == BASE else (name.split("/")[1],)
    streams = [
        shuffled_forever(
            pack_windows(training_documents(domain), Encoder.of(tokenizer), SEQUENCE_LENGTH),
            BATCH_WINDOWS // len(domains),
            generator,
        )
        for domain in domains
    ]
    if start is None:
        model, schedule = new_model(), FOR_BASE if name == BASE else FROM_SCRATCH
    else:
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        schedule = FOR_BRANCH
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    steps = schedule.tokens // (BATCH_WINDOWS * SEQUENCE_LENGTH)
    warm_up = steps // 20
    began = time.monotonic()
    for step in range(steps):
        progress = max(0, step - warm_up) / (steps - warm_up)
        share = min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = schedule.learning_rate * share
        drawn = [next(stream) for stream in streams]
        batch, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        loss = model(input_ids=batch, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step == steps - 1:
            seconds = time.monotonic() - began
            logger.info(
                "%s step %d/%d loss %.3f %.0f s", name, step + 1, steps, loss.item(), seconds
            )
    # The base is what the branches start from, so it keeps its precision.
    if name != BASE:
        model.bfloat16()
    model.save_pretrained(folder)
    # Saved for the owner alone otherwise, and a package is installed for others too.
    (folder / "model.safetensors").chmod(0o644)
    # Copied, not saved again, so that every folder of a family has the same bytes.
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)


def _name_a_class_that_all_know(path: Path) -> None:
    """transformers 5 writes a class that older versions, and other readers, do not have."""
    config = json.loads(path.read_text(encoding="utf-8")) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_all(names: Sequence[str], out: Path, base: Path, jobs: int) -> None:
    """Train the named models below `out`, at most `jobs` at once, each in a process of its own."""
    with tempfile.TemporaryDirectory() as tokenizer_name:
        tokenizer = Path(tokenizer_name)
        mixture = [training_documents(domain) for domain in DOMAINS]
        texts = itertools.chain(*zip(*mixture, strict=False))
        train_tokenizer(texts, VOCABULARY).save_pretrained(tokenizer)
        _name_a_class_that_all_know(tokenizer / "tokenizer_config.json")
        # Forking a process that has used torch's threads can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context) as pool:

            def submit(name: str, start: Path | None, folder: Path) -> Future[None]:
                shutil.rmtree(folder, ignore_errors=True)
                return pool.submit(train, name, start, tokenizer, folder)

            branches = [name for name in names if name.startswith("branches/")]
            based = submit(BASE, None, base) if branches and not base.is_dir() else None
            waiting = [submit(n, None, out / n) for n in names if n.startswith("strangers/")]
            if based is not None:
                based.result()
            waiting += [submit(name, base, out / name) for name in branches]
            for future in waiting:
                future.result()


def table(family: str, out: Path) -> str:
    """Held-out loss of every source on every domain, in nats per token, as a markdown table."""
    tokenizer = AutoTokenizer.from_pretrained(out / family / DOMAINS[0])
    columns = (*DOMAINS, *OUT_OF_DOMAIN)
    texts = {name: held_out_text(name, tokenizer, TABLE_TOKENS) for name in columns}
    lines = [f"| {family} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for domain in DOMAINS:
        model = AutoModelForCausalLM.from_pretrained(out / family / domain, dtype=torch.float32)
        losses = [f"{loss:.3f}" for loss in losses_and_routing(model, texts)[0].values()]
        lines.append(f"| {domain} | {' | '.join(losses)} |")
    tokens = ", ".join(f"{name} {len(text.tokens):,}" for name, text in texts.items())
    return "\n".join([*lines, "", f"Held-out tokens: {tokens}."])


def main() -> None:
    names = [name for name in SEEDS if name != BASE]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(bundled.__file__).parent)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument(
        "--base",
        type=Path,
        default=Path("build/bundled-base"),
        help="the branches' base: trained into this folder, or taken from it where it exists",
    )
    parser.add_argument("--table", action="store_true", help="print the loss tables, train nothing")
    arguments = parser.parse_args()
    if arguments.table:
        for family in ("strangers", "branches"):
            print(table(family, arguments.out), end="\n\n")
    else:
        train_all(arguments.only, arguments.out, arguments.base, arguments.jobs)


if __name__ == "__main__":
    main()
