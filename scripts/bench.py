"""How fast, and with how much memory: this package against what does the same, in one table.

    python scripts/bench.py                         # every part; what was measured is kept
    python scripts/bench.py --only copies training  # some of them
    python scripts/bench.py --quick --out /tmp/q    # on tiny models: tries the bench itself

The parts (each a module of `bench_parts`):

- copies: builds without calibration against mergekit-moe, in an environment of its own
- writing: the same builds against `cp` of the result
- calibration: the first pass over the calibration text against a plain forward
- matching: the assignment of neurons against scipy's
- growth: seconds and memory of a build with layers, tokens and sources
- families: builds of other families against Llama's
- planned: what `plan` says against what a build takes
- planned_training: what `plan` says of a training
- training: a step of `symphony train` against the stock model's own

Writes `results/PART.json` and `bench.md` below `--out`, and the page that `--page` names. A part
that was stopped goes on where it was; `--again` measures the chosen parts anew. Measure on an idle
machine: every part says how busy it was.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_parts import calibration, copies, families, growth, matching, planned, training
from bench_parts.measuring import machine
from bench_parts.setting import Setting

HEAD = """# How fast, and with how much memory

`make bench` writes this page. Each part names its machine and its commit. What is compared is
measured there in turn; medians, and the least and the most in brackets. Models have the
shapes of released ones and random weights. Peak memory is what is resident at once, with the pages
of mapped files. Ratios are this package's number over the other's, unless they say otherwise.
"""


@dataclass(frozen=True)
class Part:
    """One thing that is measured."""

    title: str
    says: str
    """What the numbers are, in a few sentences."""
    measure: Callable[[Setting], dict[str, Any]]
    describe: Callable[[dict[str, Any]], str]


PARTS = {
    "copies": Part(
        "Without calibration: against mergekit-moe",
        "`method: btx` and `gate_mode: random`: both tools write a Mixtral in bfloat16. "
        "mergekit-moe takes the base's shared tensors, symphony the mean of all sources'. symphony "
        "also hashes what it reads and writes. It has each layer on the disk before the next "
        "begins.",
        copies.measure,
        copies.describe,
    ),
    "writing": Part(
        "Without calibration: against `cp`",
        "The build of above, and copies of its result. The last column is the difference of two "
        "depths: what every command begins with is not in it.",
        copies.measure_writing,
        copies.describe_writing,
    ),
    "calibration": Part(
        "Calibration: against a forward",
        "All sources go through the whole calibration text, layer by layer, and each is compared "
        "with the anchor: the first pass of a build, with reading, matching and writing down. A "
        "forward is stock transformers', of the same sources on the same text, 4,096 tokens at "
        "once, without the output head.",
        calibration.measure,
        calibration.describe,
    ),
    "matching": Part(
        "Matching neurons: against scipy",
        "`linear_sum_assignment` and this package's on one correlation of neurons. Strangers have "
        "a few causes in common; a branch's neurons are the other's, disturbed and in another "
        "order.",
        matching.measure,
        matching.describe,
    ),
    "growth": Part(
        "How it grows",
        "Whole builds of models with layers of 3 M parameters (hidden 512, FFN 1408). The ratio is "
        "of the seconds that one more costs, in the second doubling and in the first: 1 is a "
        "straight line.",
        growth.measure,
        growth.describe,
    ),
    "families": Part(
        "Other families",
        "Builds of the same sizes: hidden 512, FFN 1408, 4 layers, two sources. The results of "
        "Granite and SmolLM3 have the matrices of all experts in one tensor.",
        families.measure,
        families.describe,
    ),
    "planned": Part(
        "What `plan` says, and what it takes",
        "Few layers at full width: peak memory does not grow with depth.",
        planned.measure,
        planned.describe,
    ),
    "planned_training": Part(
        "What `plan` says of a training, and what it takes",
        "8 steps of 2 windows of 512 tokens, in float32 on the processor.",
        planned.measure_training,
        partial(planned.describe, what="scope"),
    ),
    "training": Part(
        "Training: against the stock model",
        "The same built model in the same batches with AdamW: `symphony train` with all that it "
        "notes, and a loop in plain torch around the stock model.",
        training.measure,
        training.describe,
    ),
}


def run_part(name: str, setting: Setting) -> None:
    """Measure one part, and note where and when."""
    print(name, flush=True)
    before = os.getloadavg()[0]
    found = PARTS[name].measure(setting)
    path = setting.home / "results" / f"{name}.measured.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["found"] == found:
        return  # nothing was left to measure
    notes = {
        "machine": machine(),
        "day": datetime.date.today().isoformat(),
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
        "commit": _commit(),
        "versions": {p: version(p) for p in ("symphony-moe", "torch", "transformers")},
        "found": found,
    }
    path.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    """What was measured, as git names it; nothing outside of a checkout."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def page(setting: Setting) -> str:
    """All parts that were measured, in Markdown."""
    sections = [HEAD]
    for name, part in PARTS.items():
        path = setting.home / "results" / f"{name}.measured.json"
        if not path.is_file():
            continue
        notes = json.loads(path.read_text(encoding="utf-8"))
        versions = ", ".join(f"{package} {of}" for package, of in notes["versions"].items())
        where = (
            f"{notes['day']}, {notes['machine']}; commit {notes['commit']}, {versions}. "
            f"Load of the machine before and after: {notes['load'][0]} and {notes['load'][1]}."
        )
        table = part.describe(notes["found"])
        sections.append(f"## {part.title}\n\n{part.says}\n\n{table}\n\n{where}\n")
    return "\n".join(sections)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "symphony-bench")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--again", action="store_true", help="forget what those parts have found")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each command (3)")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--without-mergekit", action="store_true")
    parser.add_argument("--page", type=Path, help="another place for the tables")
    options = parser.parse_args(arguments)
    home = options.out.resolve() / ("quick" if options.quick else "full")
    setting = Setting(home, options.quick, options.pairs, not options.without_mergekit)
    for name in options.only:
        if options.again:
            (setting.home / "results" / f"{name}.json").unlink(missing_ok=True)
        run_part(name, setting)
    written = page(setting)
    for path in [setting.home / "bench.md", *([options.page] if options.page else [])]:
        path.write_text(written, encoding="utf-8")
    sys.stdout.write(written)


if __name__ == "__main__":
    main()
