"""What a source of another shape is worth, and what else can be done with it:
docs/how-to/shapes.md.

    python scripts/unequal_shapes.py --out unequal

Four strangers, one for each domain. `english` (the anchor) and `python` are bundled: 128 channels,
4 layers. `arithmetic`, which is narrower (64 channels, 2 heads of 4), and `records`, which is
shallower (2 layers), are trained first. Then, by `harmonized`, stage 1 alone:

- `widened`: all four (`backbone.shapes: widest`), the layers of `records` matched by its streams;
- `widened, evenly`: the same, with its layers spread evenly;
- `one shape`: the bundled `arithmetic` and `records` in their place, which are as large as the
  anchor and were trained five times as long: what four strangers cost whose shapes are equal;
- `left out`: `english` and `python` alone;
- `distilled`: all four, in place of each small source the anchor, trained to give the small
  source's logits on the same calibration text, as often as a fit goes through it (`fit.epochs`).

Held-out nats per token on each domain; mean and range of the seeds, which draw calibration text,
router and held-out text. Numbers that are there already are kept, so a study that was stopped goes
on.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from symphony_moe import Recipe, build, load_recipe
from symphony_moe.bundled import source_folder
from symphony_moe.bundled.corpus import documents
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.reporting.comparison_table import spread_text
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.pretrained import load_tokenizer
from symphony_moe.sources.stock import load_stock
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Encoder, Packed, pack_windows

ROOT = Path(__file__).parent.parent
ANCHOR = source_folder("strangers/english")
SEQUENCE = 256
SMALL: Mapping[str, Mapping[str, int]] = {
    "arithmetic": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "records": {"num_hidden_layers": 2},
}
"""Source -> where its shape is not the anchor's."""
TRAIN_TOKENS, BATCH, LEARNING_RATE = 600_000, 16, 3e-3
DISTILL_BATCH, DISTILL_RATE = 4, 1e-3

BUDGET = (
    "calibration.tokens=16384",
    "fit.epochs=4",
    "evaluation.tokens=8192",
    "evaluation.extra={}",
    "backbone.shapes=widest",
)
EVENLY = "sources.records.layers=[0, null, 1, null]"
CASES = ("widened", "widened, evenly", "one shape", "left out", "distilled")
ROWS = ("each source alone", *CASES, "each distilled source alone")
"""Those of the table."""


def batches(text: Packed, size: int, seed: int) -> Iterator[Packed]:
    """Batches without end; every window once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(text), generator=generator).split(size):
            yield text[chosen]


def train(model: Any, steps: Iterator[tuple[Packed, Any]], count: int, rate: float) -> None:
    """AdamW on a cosine; of each step the batch and its loss of (logits, batch)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, count // 20)
    for step, (batch, loss_of) in zip(range(count), steps, strict=False):
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / (count - warm_up))
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / warm_up, cosine)
        loss_of(model(input_ids=batch.windows, use_cache=False).logits, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def next_token_loss(logits: Tensor, batch: Packed) -> Tensor:
    """Cross-entropy."""
    labels = batch.labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)


def trained(domain: str, out: Path) -> Path:
    """A small stranger of a domain, in a folder beside the anchor's tokenizer."""
    if (out / "config.json").is_file():
        return out
    text = [each for each in documents(domain) if not is_held_out(each, 0.05)]
    windows = pack_windows(text, Encoder.of(load_tokenizer(ANCHOR)), SEQUENCE)
    seed = 100 + list(SMALL).index(domain)
    torch.manual_seed(seed)
    settings = LlamaConfig.from_pretrained(ANCHOR).to_dict() | dict(SMALL[domain])
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.float32)
    steps = ((batch, next_token_loss) for batch in batches(windows, BATCH, seed))
    train(model, steps, TRAIN_TOKENS // (BATCH * SEQUENCE), LEARNING_RATE)
    return save(model, out)


def save(model: Any, out: Path) -> Path:
    """A model folder with the anchor's tokenizer."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(ANCHOR, partial)
    model.bfloat16().save_pretrained(partial)
    return partial.rename(out)


def distilled(domain: str, recipe: Recipe, out: Path) -> Path:
    """The anchor, trained to give a small source's logits on its calibration text."""
    if (out / "config.json").is_file():
        return out
    teacher = load_stock(Path(recipe.sources[domain].model))
    text = Texts(recipe, open_sources(recipe, download=False)).calibration_windows()[domain]

    def loss_of(logits: Tensor, batch: Packed) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=batch.windows, use_cache=False).logits
        parts = (each.log_softmax(dim=-1).flatten(0, 1) for each in (logits, wanted))
        mine, theirs = parts
        return torch.nn.functional.kl_div(mine, theirs, log_target=True, reduction="batchmean")

    model = load_stock(ANCHOR)
    count = math.ceil(recipe.fit.epochs * len(text) / DISTILL_BATCH)
    steps = ((batch, loss_of) for batch in batches(text, DISTILL_BATCH, recipe.seed))
    train(model.train(), steps, count, DISTILL_RATE)
    return save(model, out)


def recipe_of(case: str, seed: int, out: Path) -> Recipe:
    """The recipe of a case."""
    seeds = [f"seed={seed}", f"calibration.seed={seed}", f"evaluation.seed={seed}"]
    models = {name: trained(name, out / name) for name in SMALL}
    settings = [*BUDGET, *seeds]
    if case == "one shape":
        return load_recipe(ROOT / "recipes" / "strangers.yaml", settings)
    settings += [f"sources.{name}.model={path.resolve()}" for name, path in models.items()]
    if case == "left out":
        settings.append("experts.sources=[english, python]")
    if case == "widened, evenly":
        settings.append(EVENLY)
    recipe = load_recipe(ROOT / "recipes" / "strangers.yaml", settings)
    if case != "distilled":
        return recipe
    made = {name: distilled(name, recipe, out / f"{name}-distilled-{seed}") for name in SMALL}
    new = [f"sources.{name}.model={path.resolve()}" for name, path in made.items()]
    return load_recipe(ROOT / "recipes" / "strangers.yaml", [*settings, *new])


def measure(recipe: Recipe) -> dict[str, Any]:
    """Of the model that a recipe builds: nats per token on each domain, and where the layers of
    sources with fewer layers were put."""
    with tempfile.TemporaryDirectory() as home:
        run = build(recipe, Path(home) / "run")
        losses, _ = losses_and_routing(load_stock(run.checkpoint), held_out(recipe))
        layers = run.read_recipe().sources["records"].layers
    return {"losses": losses, "layers": layers}


def held_out(recipe: Recipe) -> dict[str, Any]:
    """Domain -> its held-out text."""
    pieces = Texts(recipe, open_sources(recipe, download=False)).held_out_text()
    return {name: pieces[name] for name in recipe.sources}


def sources_alone(recipe: Recipe) -> dict[str, Any]:
    """Each source on the text of its own domain."""
    text = held_out(recipe)
    losses: dict[str, float] = {}
    for name, source in zip(recipe.sources, open_sources(recipe), strict=True):
        losses |= losses_and_routing(load_stock(source.folder), {name: text[name]})[0]
    return {"losses": losses}


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown: a row for each case, a column for each domain and for their mean. `found`: case ->
    seed -> what `measure` gives."""
    domains = list(next(iter(next(iter(found.values())).values()))["losses"])
    rows = [["", *domains, "mean"], ["---"] * (len(domains) + 2)]
    for case, by_seed in sorted(found.items(), key=lambda item: ROWS.index(item[0])):
        losses = [entry["losses"] for entry in by_seed.values()]
        columns = [[each[name] for each in losses] for name in domains]
        means = [sum(each.values()) / len(each) for each in losses]
        rows.append([case, *map(spread_text, columns), spread_text(means)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("unequal"))
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "losses.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    alone, new = ROWS[0], ROWS[-1]
    for seed in asked.seeds:
        for case in ROWS:
            if str(seed) in found.setdefault(case, {}):
                continue
            if case in (alone, new):
                like = "widened" if case == alone else "distilled"
                entry = sources_alone(recipe_of(like, seed, asked.out))
            else:
                entry = measure(recipe_of(case, seed, asked.out))
            found[case][str(seed)] = entry
            path.write_text(json.dumps(found, indent=1))
    print(table(found))
    for seed, entry in found["widened"].items():
        print(f"seed {seed}: layers of records {entry['layers']}")


if __name__ == "__main__":
    main()
