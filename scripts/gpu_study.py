"""Strangers of a real size on one GPU: trained, built by every method, trained further, evaluated.

    python scripts/gpu_study.py --out study --text-only    # the text alone: to carry elsewhere
    python scripts/gpu_study.py --out study                # stops before 6.5 minutes are over
    python scripts/gpu_study.py --out study                # goes on

In this order, each kept in `study/results.json` as soon as it is done:

1. `tests`: what `make test-gpu` runs.
2. `speed`: a build's first pass and a training step against stock transformers (see `bench.py`),
   with their share of the device's speed.
3. Four models of 59 M parameters from four seeds, each on one domain alone (`strangers`).
4. By every method: built, evaluated, trained on as many tokens, evaluated, in and out of domain.

`study/results.json` and `study/study.md` are small; the rest is not wanted again, and models that
a later call needs and does not find are trained anew. A step that fails is noted, the next one
begins, and the next call tries it again. `--toy` goes the whole way in a minute on a CPU.
"""

import argparse
import gc
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from bench_parts import calibration, training
from bench_parts.measuring import machine, markdown, shown
from bench_parts.setting import Setting
from bench_parts.speed import peaks, step_operations, wait
from symphony_moe import pipeline
from symphony_moe.bundled import corpus
from symphony_moe.model.layer import device
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.presets import PRESETS
from symphony_moe.runs.folder import RunFolder
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.windows import Encoder, pack_windows
from train_bundled import shuffled_forever, train_tokenizer

ROOT = Path(__file__).parent.parent
HOLDOUT = 0.05
OUTSIDE = "headers"
"""Of no source's domain."""
DOMAINS = (*corpus.DOMAINS, OUTSIDE)


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    shape: dict[str, int]
    """Of the strangers, as their config has it."""
    tokens: int
    """That each stranger is trained on, repeats counted."""
    batch: int
    sequence: int
    calibration: int
    further: int
    """Tokens that each built model is trained on."""
    evaluation: int
    characters: int
    """Of each domain's text at most."""


REAL = Size(
    {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    tokens=12_000_000,
    batch=32,
    sequence=512,
    calibration=262_144,
    further=3_000_000,
    evaluation=32_768,
    characters=8_000_000,
)
TOY = Size(
    {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    tokens=16_384,
    batch=4,
    sequence=64,
    calibration=2048,
    further=2048,
    evaluation=512,
    characters=500_000,
)
SECONDS = {"tests": 120, "speed": 120, "strangers": 40, "method": 60}
"""Kind of step -> what it may take, before one of its kind has been measured."""


class Study:
    """One folder, and the time that is left."""

    def __init__(self, out: Path, size: Size, limit: float) -> None:
        """`limit`: seconds that this call may take."""
        self.out, self.size, self.limit = out, size, limit
        self.began = time.monotonic()
        self.path = out / "results.json"
        self.results: dict[str, Any] = {}
        if self.path.is_file():
            self.results = json.loads(self.path.read_text(encoding="utf-8"))

    def step(self, name: str, do: Callable[[], dict[str, Any]], *, again: bool = False) -> bool:
        """Do something and keep what it finds, unless that is known already (and not asked for
        `again`). What has failed is done again. False where there is no time for it."""
        if self.is_done(name) and not again:
            return True
        left = self.limit - (time.monotonic() - self.began)
        if left < self._expected(name):
            print(f"no time for {name}: {left:.0f} s are left; call again", flush=True)
            return False
        print(f"{name} ({left:.0f} s are left)", flush=True)
        began = time.monotonic()
        try:
            found = do()
        except Exception:  # the next step may go well
            traceback.print_exc()
            found = {"failed": traceback.format_exc(limit=-3)[-1500:]}
        found["took"] = round(time.monotonic() - began, 1)
        self.results[name] = found
        self.path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        return True

    def is_done(self, name: str) -> bool:
        """Whether it is known what a step finds. What has failed is not done."""
        return name in self.results and "failed" not in self.results[name]

    def _expected(self, name: str) -> float:
        """Seconds: as long as the longest step of its kind so far."""
        kind = name.partition(" ")[0]
        known = [of["took"] for key, of in self.results.items() if key.startswith(f"{kind} ")]
        return 1.2 * max(known) if known else SECONDS[kind]


# The steps


def run_tests() -> dict[str, Any]:
    """The tests that need a CUDA device; where there is none, they skip themselves."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"code": done.returncode, "said": done.stdout[-3000:]}


def measure_speed(study: Study, toy: bool) -> dict[str, Any]:
    """The parts of the bench that a GPU changes."""
    setting = Setting(study.out / "work" / "speed", toy, 1, mergekit=False)
    parts = {"calibration": calibration, "training": training}
    return {name: part.measure(setting) for name, part in parts.items()}


def write_texts(folder: Path, characters: int) -> None:
    """Documents of every domain, as `.jsonl`, where they are not there yet."""
    # More than what the bundled sources were trained on: of all packages, and of each as much.
    corpus.DOMAIN_CHARACTERS = characters
    corpus.PROSE_SOURCE_CHARACTERS = 20 * characters
    for domain in DOMAINS:
        path = folder / f"{domain}.jsonl"
        if path.is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        found = corpus.make_documents(domain)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found)
        path.write_text("".join(lines), encoding="utf-8")


def training_documents(folder: Path, domain: str) -> list[str]:
    """What no evaluation sees."""
    with (folder / f"{domain}.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [text for text in texts if not is_held_out(text, HOLDOUT)]


def make_tokenizer(text: Path, folder: Path, size: int) -> PreTrainedTokenizerBase:
    """One for all, of the equal mixture of the domains."""
    if not folder.is_dir():
        mixture = [training_documents(text, domain)[:1500] for domain in corpus.DOMAINS]
        tokenizer = train_tokenizer(_interleaved(mixture), size)
        missing = size - len(tokenizer)
        tokenizer.add_tokens([f"<unused {number}>" for number in range(missing)])
        tokenizer.save_pretrained(folder)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def _interleaved(texts: Sequence[Sequence[str]]) -> Iterator[str]:
    for some in zip(*texts, strict=False):
        yield from some


def train_stranger(study: Study, domain: str) -> dict[str, Any]:
    """A model of its own seed, on one domain: the loss at its end, tokens per second, and the share
    of the device's speed."""
    size, on = study.size, device()
    tokenizer = make_tokenizer(
        study.out / "text", study.out / "work" / "tokenizer", size.shape["vocab_size"]
    )
    documents = training_documents(study.out / "text", domain)
    text = pack_windows(documents, Encoder.of(tokenizer), size.sequence)
    seed = 100 + corpus.DOMAINS.index(domain)
    torch.manual_seed(seed)
    config: Any = AutoConfig.for_model(
        "llama",
        **size.shape,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(on)
    stream = shuffled_forever(text, size.batch, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    steps = max(4, size.tokens // (size.batch * size.sequence))
    warm_up = max(1, steps // 20)
    losses = []
    wait(on)
    began = time.perf_counter()
    for step in range(steps):
        progress = max(0, step - warm_up) / (steps - warm_up)
        share = min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = 1e-3 * share
        windows, labels = (part.to(on) for part in next(stream))
        with torch.autocast(on.type, torch.bfloat16, enabled=on.type == "cuda"):
            loss = model(input_ids=windows, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    wait(on)
    seconds = time.perf_counter() - began
    folder = study.out / "work" / "strangers" / domain
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokens = steps * size.batch * size.sequence
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    return {
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "different tokens": text.windows.numel(),
        "seconds": seconds,
        "loss": float(torch.stack(losses[-10:]).mean()),
        "operations": step_operations(config, tokens, size.sequence, 1),
        "peak": peaks(on, dtype),
    }


def go_the_whole_way(study: Study, method: str) -> dict[str, Any]:
    """Build by a method, evaluate, train, evaluate: seconds of each, memory, losses."""
    size, text = study.size, study.out / "text"
    recipe = {
        "sources": {
            domain: {
                "model": str(study.out / "work" / "strangers" / domain),
                "data": str(text / f"{domain}.jsonl"),
            }
            for domain in corpus.DOMAINS
        },
        "method": method,
        "calibration": {"tokens": size.calibration, "sequence_length": size.sequence},
        "train": {
            "tokens": size.further,
            "sequence_length": size.sequence,
            "batch_size": size.batch,
            "learning_rate": 3e-4,
            "checkpoints": 1,
        },
        "evaluation": {
            "tokens": size.evaluation,
            "sequence_length": size.sequence,
            "holdout": HOLDOUT,
            "extra": {OUTSIDE: str(text / f"{OUTSIDE}.jsonl")},
        },
    }
    gc.collect()  # what the method before has left on the device
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    path = study.out / "work" / f"{method}.yaml"
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    loaded = load_recipe(path)
    out, seconds = study.out / "work" / "runs" / method, {}
    first = RunFolder(study.out / "work" / "runs" / next(iter(PRESETS)))

    def timed(stage: str, do: Callable[[], Any]) -> Any:
        began = time.monotonic()
        done = do()
        seconds[stage] = round(time.monotonic() - began, 1)
        return done

    run = timed("build", partial(pipeline.build, loaded, out, overwrite=True))
    timed("verify", partial(pipeline.verify, run))
    timed("train", partial(pipeline.train, run))
    like = first if first.root != run.root and first.metrics.is_file() else None
    metrics = timed("evaluate", partial(pipeline.evaluate, run, like=like)).to_json()
    timing = run.read_json(run.metrics)["timing"]
    return {
        "seconds": seconds,
        "peak bytes": timing["build_peak_rss_bytes"],
        "device bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "losses": {stage: metrics[stage] for stage in ("sources", "built", "trained")},
    }


def study_all(study: Study, *, toy: bool) -> None:
    """All steps, as far as the time goes."""
    if not study.step("tests", run_tests):
        return
    if not study.step("speed", partial(measure_speed, study, toy)):
        return
    methods = [method for method in PRESETS if not study.is_done(f"method {method}")]
    for domain in corpus.DOMAINS if methods else ():
        is_there = (study.out / "work" / "strangers" / domain / "config.json").is_file()
        do = partial(train_stranger, study, domain)
        if not study.step(f"strangers {domain}", do, again=not is_there):
            return
    for method in methods:
        if not study.step(f"method {method}", partial(go_the_whole_way, study, method)):
            return


# The page


def page(study: Study) -> str:
    """What was measured, in Markdown."""
    results = study.results
    parts = [f"{machine()}; torch {torch.__version__}", _page_of_steps(results)]
    speed = results.get("speed", {})
    for name, part in {"calibration": calibration, "training": training}.items():
        if name in speed:
            parts.append(part.describe(speed[name]))
    strangers = {k: v for k, v in results.items() if k.startswith("strangers ") and "loss" in v}
    if strangers:
        parts.append(_page_of_strangers(strangers))
    methods = {k: v for k, v in results.items() if k.startswith("method ") and "losses" in v}
    if methods:
        parts += [_page_of_losses(methods), _page_of_seconds(methods)]
    return "\n\n".join(parts) + "\n"


def _page_of_steps(results: dict[str, Any]) -> str:
    rows = []
    for name, of in results.items():
        said = of.get("said", "").strip().splitlines()
        how = of.get("failed", said[-1] if said else "done").strip().splitlines()[-1]
        rows.append([name, shown(of["took"]), how.replace("|", "/")])
    return markdown(["step", "seconds", "how it went"], rows)


def _page_of_strangers(strangers: dict[str, Any]) -> str:
    rows = []
    for name, of in strangers.items():
        speed = shown(of["tokens"] / of["seconds"])
        row = [name, f"{of['parameters']:,}", f"{of['tokens']:,}", f"{of['different tokens']:,}"]
        rows.append([*row, shown(of["loss"]), speed, calibration.use(of, of["seconds"])])
    head = ["model", "parameters", "tokens", "different ones", "loss", "tokens/s", "use"]
    return markdown(head, rows)


def _page_of_losses(methods: dict[str, Any]) -> str:
    first = next(iter(methods.values()))["losses"]
    rows = [_losses(name, of) for name, of in first["sources"].items()]
    own = {name: of[name] for name, of in first["sources"].items()}
    outside = min(of[OUTSIDE] for of in first["sources"].values())
    best = own | {OUTSIDE: outside}
    rows.append(_losses("specialists (out of domain: the best of them)", best))
    for name, of in methods.items():
        for stage in ("built", "trained"):
            label = f"{name.removeprefix('method ')}, {stage}"
            rows.append(_losses(label, of["losses"][stage]))
    return markdown(["nats per token", *DOMAINS, "mean in domain"], rows)


def _losses(name: str, losses: dict[str, float]) -> list[str]:
    mean = sum(losses[domain] for domain in corpus.DOMAINS) / len(corpus.DOMAINS)
    return [name, *(f"{losses[domain]:.3f}" for domain in DOMAINS), f"{mean:.3f}"]


def _page_of_seconds(methods: dict[str, Any]) -> str:
    stages = list(next(iter(methods.values()))["seconds"])
    rows = [
        [
            name.removeprefix("method "),
            *(shown(of["seconds"][stage]) for stage in stages),
            shown(of["peak bytes"] / 1e9),
            shown(of["device bytes"] / 1e9),
        ]
        for name, of in methods.items()
    ]
    head = [f"{stage}, s" for stage in stages]
    return markdown(["method", *head, "build's peak, GB", "on the device, GB"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--minutes", type=float, default=6.5, help="that this call may take (6.5)")
    parser.add_argument("--text-only", action="store_true", help="write study/text, and no more")
    parser.add_argument("--toy", action="store_true", help="try it: tiny models, on the CPU too")
    options = parser.parse_args(arguments)
    size = TOY if options.toy else REAL
    out = options.out.resolve()
    (out / "work").mkdir(parents=True, exist_ok=True)
    study = Study(out, size, 60 * options.minutes)
    write_texts(out / "text", size.characters)
    if options.text_only:
        return
    study_all(study, toy=options.toy)
    written = page(study)
    (out / "study.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
