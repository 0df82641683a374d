"""Do the numbers stay? Builds, trains and evaluates by every method on the bundled sources.

Writes down the hash of every tensor and every number of `metrics.json`. Run it before and after a
change that must not change what is computed:

    python scripts/same_numbers.py --out before.json
    python scripts/same_numbers.py --out after.json --against before.json

A number may move to another key of `metrics.json`; it may not change. About 6 minutes on 2 cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "calibration": {"tokens": 16384, "sequence_length": 256},
    "train": {"tokens": 16384, "sequence_length": 256, "batch_size": 4, "learning_rate": 1e-3},
    "evaluation": {
        "tokens": 4096,
        "sequence_length": 256,
        "extra": {"headers": "bundled:headers"},
    },
}
DOMAINS = ["english", "python", "arithmetic", "records"]
# Every method, both kinds of sources, and the ways through the code that no preset takes.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "symphony": ("strangers", {"method": "symphony"}),
    "harmonized": ("strangers", {"method": "harmonized"}),
    "btx": ("strangers", {"method": "btx"}),
    "bam": ("strangers", {"method": "bam"}),
    "drop-upcycling": ("strangers", {"method": "drop-upcycling"}),
    "sparse-upcycling": ("strangers", {"method": "sparse-upcycling"}),
    "dume": ("strangers", {"method": "dume"}),
    "branches": ("branches", {"method": "harmonized"}),
    "granite": (
        "strangers",
        {
            "method": "harmonized",
            "output": {"architecture": "granitemoe", "dtype": "float32"},
            "router": {"init": "hidden"},
            "train": {**SMALL["train"], "scope": "router"},
        },
    ),
    "aligned-not-fitted": (
        "strangers",
        {
            "method": "symphony",
            "align": {"neurons": "activations", "residual": "orthogonal", "heads": "all"},
            "router": {"init": "regression"},
        },
    ),
}


def measure(kind: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    sources = {
        name: {"model": f"bundled:{kind}/{name}", "data": f"bundled:{name}"} for name in DOMAINS
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"sources": sources, **SMALL, **settings}))  # JSON is YAML
    out = folder / "run"
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "symphony_moe", "run", str(recipe), "--out", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    metrics = json.loads((out / "metrics.json").read_text())
    timing = metrics.pop("timing")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "build_seconds": timing["build_seconds"],
        "peak_rss_bytes": timing["build_peak_rss_bytes"],
        "tensors": json.loads((out / "manifest.json").read_text())["tensors"],
        "numbers": dict(numbers(metrics)),
    }


def numbers(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers of a tree with their keys, but for times and memory."""
    if isinstance(value, dict):
        for name, below in value.items():
            if "seconds" not in name and "rss" not in name:
                yield from numbers(below, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from numbers(below, f"{key}.{number}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not the same: tensors by name and hash, numbers by value."""
    found = []
    for part in sorted(before["tensors"].keys() | after["tensors"].keys()):
        one, other = (run["tensors"].get(part, {}) for run in (before, after))
        found += [
            f"{part}: {name}"
            for name in sorted(one.keys() | other.keys())
            if one.get(name) != other.get(name)
        ]
    one, other = (Counter(run["numbers"].values()) for run in (before, after))
    gone, come = one - other, other - one
    found += [f"gone: {k} = {v}" for k, v in before["numbers"].items() if v in gone]
    found += [f"new: {k} = {v}" for k, v in after["numbers"].items() if v in come]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--against", type=Path, help="an earlier one to compare with")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    earlier = json.loads(options.against.read_text()) if options.against else {}
    measured: dict[str, Any] = {}
    changed = False
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            measured[name] = measure(*CASES[name], Path(folder))
        options.out.write_text(json.dumps(measured, indent=1))
        print(f"{name}: {measured[name]['seconds']} s", flush=True)
        if name in earlier:
            found = differences(earlier[name], measured[name])
            changed = changed or bool(found)
            print("\n".join(f"  {line}" for line in found[:40]) or "  the same", flush=True)
    sys.exit(1 if changed else 0)


if __name__ == "__main__":
    main()
