"""LoRAs of one base as the experts of one model, against the same LoRAs kept apart.

    python scripts/lora_experts.py --seeds 1 2 3 --out lora-experts

The base is the bundled branch for English. For each of the four bundled domains a LoRA of it is
trained with peft: once on all linear layers, once on the FFN's alone. Each set of four becomes one
model by every method, built and then with its router trained. Losses are held-out nats per token;
`headers` is text that no LoRA and no base saw. What is there already is kept, so a run that was
stopped goes on. Prints Markdown. The LoRAs have one seed each; `--seeds` are those of windows,
held-out text, router and its training.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark import LIMIT, in_domain, losses_of, make, table, train
from symphony_moe.bundled import source_folder
from symphony_moe.bundled.corpus import DOMAINS
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.recipe.load import load_recipe
from symphony_moe.reporting.comparison_table import spread_text
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.source import Source
from symphony_moe.sources.stock import load_source
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Encoder, Pieces, pack_windows
from train_bundled import shuffled_forever, training_documents

BASE = "branches/english"
TARGETS: dict[str, str | list[str]] = {
    "attention and FFN": "all-linear",
    "FFN alone": ["gate_proj", "up_proj", "down_proj"],
}
"""Kind of LoRA -> what it changes."""

METHODS = ("btx", "symphony", "dume")

TOKENS, BATCH, SEQUENCE, RANK, LEARNING_RATE = 614_400, 16, 256, 16, 3e-3
"""Of a LoRA's training: tokens, windows per step, tokens per window, rank, peak of the cosine."""


def tune(folder: Path, domain: str, targets: str | list[str]) -> None:
    """Train a LoRA of the base on one domain, and save it as peft does it."""
    if folder.is_dir():
        return
    print(f"training {folder}", flush=True)
    base = source_folder(BASE)
    torch.manual_seed(0)
    dense: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(dense, settings)
    model.peft_config["default"].base_model_name_or_path = BASE  # no path of this machine
    encoder = Encoder.of(AutoTokenizer.from_pretrained(base))
    text = pack_windows(training_documents(domain), encoder, SEQUENCE)
    batches = shuffled_forever(text, BATCH, torch.Generator().manual_seed(0))
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=0.0, weight_decay=0.0)
    steps = TOKENS // (BATCH * SEQUENCE)
    warm_up = steps // 20
    for step in range(steps):
        progress = max(0, step - warm_up) / (steps - warm_up)
        share = min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * share
        windows, labels = next(batches)
        model(input_ids=windows, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    staged = folder.with_suffix(".new")
    model.save_pretrained(staged)
    staged.rename(folder)


def write_recipe(adapters: Path, path: Path) -> None:
    """One line for each LoRA, and what the runs have in common."""
    recipe = {
        "sources": {
            domain: {
                "model": f"bundled:{BASE}",
                "adapter": str((adapters / domain).resolve()),
                "data": f"bundled:{domain}",
            }
            for domain in DOMAINS
        },
        "calibration": {"tokens": 65_536, "sequence_length": SEQUENCE},
        "train": {
            "scope": "router",
            "tokens": 131_072,
            "learning_rate": 1e-3,
            "sequence_length": SEQUENCE,
            "batch_size": 8,
        },
        "evaluation": {
            "tokens": 16_384,
            "sequence_length": SEQUENCE,
            "extra": {"headers": "bundled:headers"},
        },
    }
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")


def apart(
    sources: Sequence[Source], windows: Mapping[str, Pieces], home: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """(losses of the base, losses of the LoRAs: each on its own domain, the best of them out of
    domain); remembered in files."""
    base = losses_of(sources[0].folder, windows, home / "base.json")
    own = {}
    for source in sources:
        notes = home / f"{source.name}.json"
        if not notes.is_file():
            found, _ = losses_and_routing(load_source(source), windows)
            notes.write_text(json.dumps(found), encoding="utf-8")
        own[source.name] = json.loads(notes.read_text(encoding="utf-8"))
    limit = {name: losses[name] for name, losses in own.items()}
    extra = [domain for domain in windows if domain not in own]
    return base, limit | {d: min(losses[d] for losses in own.values()) for d in extra}


def measure(kind: str, home: Path, seeds: Sequence[int]) -> None:
    """Everything of one kind of LoRA, as a table."""
    adapters = home / "adapters"
    adapters.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        tune(adapters / domain, domain, TARGETS[kind])
    path = home / "recipe.yaml"
    write_recipe(adapters, path)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        of_seed = [f"seed={seed}", f"calibration.seed={seed}"]
        recipe = load_recipe(path, of_seed)
        sources = open_sources(recipe)
        windows = Texts(recipe, sources).held_out_text()
        runs = home / f"seed{seed}"
        base, limit = apart(sources, windows, runs)
        rows.setdefault("the base", []).append(base)
        rows.setdefault(LIMIT.replace("specialists", "the LoRAs apart"), []).append(limit)
        for method in METHODS:
            run = runs / method
            make(path, run, [f"method={method}", *of_seed])
            losses = losses_of(run / "checkpoint", windows, run / "built.json")
            rows.setdefault(f"{method}, built", []).append(losses)
            trained = train(run, "router")
            losses = losses_of(trained / "trained", windows, trained / "trained.json")
            rows.setdefault(f"{method}, router trained", []).append(losses)
    print(f"\nLoRAs of {kind}, seeds {list(seeds)}")
    table(rows, DOMAINS)
    means = {row: [in_domain(losses, DOMAINS) for losses in found] for row, found in rows.items()}
    whole, limits = list(means.values())[:2]
    print("\nOf what the LoRAs gain over the base, in %, in domain:")
    for row, found in list(means.items())[2:]:
        each = zip(whole, limits, found, strict=True)
        print(f"- {row}: {spread_text([100 * (b - ours) / (b - best) for b, best, ours in each])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("lora-experts"))
    parser.add_argument("--kinds", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    for kind in options.kinds:
        measure(kind, options.out / kind.replace(" ", "-"), options.seeds)


if __name__ == "__main__":
    main()
