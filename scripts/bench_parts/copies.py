"""(a) Models without calibration against mergekit-moe; (b) the writing against `cp`.

Both tools make a Mixtral of the same sources, with random routers: mergekit-moe takes the base's
shared tensors, this package the mean of all sources' (method `btx`). This package hashes what it
reads and writes, and every layer is on the disk before the next begins; mergekit-moe does neither.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench_parts.measuring import (
    gigabytes,
    in_turn,
    markdown,
    median,
    shown,
    spread,
    take,
)
from bench_parts.setting import Setting, build, symphony, weights_of

Measure = Callable[[], dict[str, Any]]
PINS = Path(__file__).with_name("mergekit.txt")
CASES = {"three of 135M": ("135M", 3), "two of 1.1B": ("1.1B", 2)}
"""As the table says it -> shape and how many sources."""
OURS, THEIRS = "symphony", "mergekit-moe"
BIG = "two of 1.1B"
"""What is compared with `cp`."""
FEW_LAYERS = 2


def environment() -> Path:
    """The folder of programs of mergekit's environment, which is made where it is missing."""
    cache = os.environ.get("SYMPHONY_CACHE") or Path.home() / ".cache" / "symphony-moe"
    home = Path(cache) / "bench" / "mergekit"
    stamp, wanted = home / ".made", hashlib.sha256(PINS.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip: list[str | Path] = [
            home / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
        ]
        subprocess.run([*pip, "-r", PINS], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return home / "bin"


def mergekit(*arguments: str | Path) -> dict[str, Any]:
    """What a run of mergekit-moe takes."""
    # Nothing of this Python may be seen from that one.
    alone = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    programs = environment()
    return take([programs / "python", programs / THEIRS, *arguments], alone)


def measure(setting: Setting) -> dict[str, Any]:
    """Seconds and memory of both tools; of `--help` too."""
    state = setting.state("copies")
    found: dict[str, Any] = {}
    helps: dict[str, Measure] = {OURS: partial(symphony, "--help")}
    if setting.mergekit:
        environment()
        helps[THEIRS] = partial(mergekit, "--help")
    found["`--help`"] = in_turn(state, "help", setting.pairs, helps)
    for case, (shape, count) in CASES.items():
        found[case] = in_turn(state, case, setting.pairs, _commands(setting, case, shape, count))
    return found


def _commands(setting: Setting, case: str, shape: str, count: int) -> dict[str, Measure]:
    sources = setting.sources(shape, count)
    recipe = setting.recipe(case.replace(" ", "-"), sources, method="btx")
    commands: dict[str, Measure] = {OURS: partial(_build_anew, setting, recipe)}
    if setting.mergekit:
        folders = [source["model"] for source in sources.values()]
        config = {
            "base_model": folders[0],
            "gate_mode": "random",
            "dtype": "bfloat16",
            "experts": [{"source_model": f, "positive_prompts": [""]} for f in folders],
        }
        path = recipe.with_suffix(".mergekit.yaml")
        path.write_text(json.dumps(config), encoding="utf-8")
        commands[THEIRS] = partial(_merge_anew, setting, path)
    return commands


def _build_anew(setting: Setting, recipe: Path) -> dict[str, Any]:
    out = setting.run_folder(recipe.stem)
    taken = build(recipe, out)
    shutil.rmtree(out)
    return taken


def _merge_anew(setting: Setting, config: Path) -> dict[str, Any]:
    out = setting.run_folder(config.stem)
    taken = mergekit(config, out)
    shutil.rmtree(out)
    return taken


def measure_writing(setting: Setting) -> dict[str, Any]:
    """A build of all layers and of few, and copies of what they make. What a layer more costs is
    free of what every command begins with."""
    state = setting.state("writing")
    shape, count = CASES[BIG]
    found: dict[str, Any] = {}
    for label, layers in (("all layers", None), ("few layers", FEW_LAYERS)):
        sources = setting.sources(shape, count, layers)
        name = f"writing-{label.replace(' ', '-')}"
        recipe = setting.recipe(name, sources, method="btx")
        out, copy = setting.home / "runs" / name, setting.run_folder(f"{name}-copy")
        commands: dict[str, Measure] = {
            "build": partial(_build_again, recipe, out),
            "cp": partial(_copy, recipe, out, copy, ""),
            "cp and sync": partial(_copy, recipe, out, copy, " && sync"),
        }
        found[label] = in_turn(state, label, setting.pairs, commands)
        found[f"bytes, {label}"] = state.get(f"bytes, {label}", partial(_bytes, recipe, out))
        shutil.rmtree(out, ignore_errors=True)
    return found


def _build_again(recipe: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    return build(recipe, out)


def _built(recipe: Path, out: Path) -> Path:
    """The checkpoint of a build, which is made where it is missing."""
    if not (out / "checkpoint").is_dir():
        build(recipe, out)
    return out / "checkpoint"


def _bytes(recipe: Path, out: Path) -> int:
    return weights_of(_built(recipe, out))


def _copy(recipe: Path, out: Path, copy: Path, after: str) -> dict[str, Any]:
    taken = take(["/bin/sh", "-c", f'cp -r "$0" "$1"{after}', _built(recipe, out), copy])
    shutil.rmtree(copy)
    return taken


def describe(found: dict[str, Any]) -> str:
    """The tables of (a)."""
    rows = []
    for case, runs in found.items():
        for label, taken in runs.items():
            row = [case, label, spread(taken), shown(median(taken, "processor_seconds"))]
            row += [gigabytes(median(taken, "peak_bytes"))]
            row += [gigabytes(median(taken, f"{way}_bytes")) for way in ("read", "written")]
            rows.append(row)
        if THEIRS in runs:
            ratios = [
                shown(median(runs[OURS], of) / median(runs[THEIRS], of))
                for of in ("seconds", "processor_seconds", "peak_bytes")
            ]
            rows.append([case, "**ratio**", *(f"**{ratio}**" for ratio in ratios), "", ""])
    head = ["what", "tool", "seconds", "processor seconds", "peak memory", "read", "written"]
    return markdown(head, rows)


def describe_writing(found: dict[str, Any]) -> str:
    """The table of (b)."""
    rows, each = [], {}
    size = found["bytes, all layers"]
    more = size - found["bytes, few layers"]
    for label in ("build", "cp", "cp and sync"):
        whole, few = (found[layers][label] for layers in ("all layers", "few layers"))
        slope = (median(whole, "seconds") - median(few, "seconds")) / more
        each[label] = (median(whole, "seconds"), slope)
        rows.append([label, spread(whole), shown(median(few, "seconds")), shown(slope * 1e9)])
    for label in ("cp", "cp and sync"):
        ratios = [
            shown(theirs / ours) for theirs, ours in zip(each[label], each["build"], strict=True)
        ]
        rows.append([f"**{label} / build**", f"**{ratios[0]}**", "", f"**{ratios[1]}**"])
    head = [
        f"{BIG} ({gigabytes(size)} of weights)",
        "seconds",
        f"seconds at {FEW_LAYERS} layers",
        "seconds for each further GB",
    ]
    return markdown(head, rows)
