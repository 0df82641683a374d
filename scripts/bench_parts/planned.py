"""(f) What `plan` says of memory and time, against what a build, and a training, then take.

Peak memory does not grow with depth (`make test-slow`), so that few layers at full width are
enough.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench_parts.measuring import gigabytes, markdown, shown
from bench_parts.setting import Setting, build, symphony

SHAPES = {"135M": (3, 4), "0.5B": (2, 2), "1.1B": (2, 2), "7B": (4, 2)}
"""Shape -> sources, layers."""
METHODS = ("symphony", "harmonized", "dume", "btx", "bam", "drop-upcycling", "sparse-upcycling")
TOKENS, SEQUENCE, EPOCHS = 8192, 512, 1
TRAINED = ("all", "router")
BATCH, STEPS = 2, 8


def measure_training(setting: Setting) -> dict[str, Any]:
    """Bytes and seconds of trainings, planned and measured, by shape and scope."""
    shapes = ["135M"] if setting.quick else [shape for shape in SHAPES if shape != "7B"]
    cases = [f"{shape}, {scope}" for shape in shapes for scope in TRAINED]
    return _each(setting, "planned_training", cases, _train)


def _each(
    setting: Setting, part: str, cases: list[str], run: Callable[[Setting, str], dict[str, Any]]
) -> dict[str, Any]:
    """Case -> what is found of it, by now or before."""
    state = setting.state(part)
    return {case: state.get(case, partial(run, setting, case)) for case in cases}


def _train(setting: Setting, case: str) -> dict[str, Any]:
    shape, _, scope = case.partition(", ")
    count, layers = SHAPES[shape]
    sequence = 64 if setting.quick else SEQUENCE
    recipe = setting.recipe(
        f"training-{shape}-{scope}",
        setting.sources(shape, count, layers),
        method="btx",
        train={
            "scope": scope,
            "tokens": BATCH * sequence * STEPS,
            "sequence_length": sequence,
            "batch_size": BATCH,
        },
    )
    out = setting.run_folder(recipe.stem)
    build(recipe, out)
    symphony("train", out)
    plan, metrics = (_read(out / f"{name}.json") for name in ("plan", "metrics"))
    peak = metrics["timing"]["train_peak_rss_bytes"]
    return {
        "layers": layers,
        "sources": count,
        "bytes": [plan["training_peak_memory_bytes"], peak],
        "seconds": [plan["training_seconds"], metrics["training"]["seconds"]],
    }


def measure(setting: Setting) -> dict[str, Any]:
    """Bytes and seconds, planned and measured, by shape and method."""
    shapes, methods = (list(SHAPES), METHODS) if not setting.quick else (["135M"], METHODS[-1:])
    cases = [
        f"{shape}, {method}"
        for shape in shapes
        for method in methods
        # No stock model holds Qwen2 with attention experts.
        if (shape, method) != ("0.5B", "bam")
    ]
    return _each(setting, "planned", cases, _run)


def _run(setting: Setting, case: str) -> dict[str, Any]:
    shape, _, method = case.partition(", ")
    count, layers = SHAPES[shape]
    recipe = setting.recipe(
        f"planned-{shape}-{method}",
        setting.sources(shape, count, layers),
        method=method,
        calibration=setting.text(TOKENS, SEQUENCE),
        fit={"epochs": EPOCHS} if method == "harmonized" else {},
    )
    out = setting.run_folder(recipe.stem)
    build(recipe, out)
    plan, timing = (_read(out / f"{name}.json") for name in ("plan", "metrics"))
    timing = timing["timing"]
    return {
        "layers": layers,
        "sources": count,
        "bytes": [plan["peak_memory_bytes"], timing["build_peak_rss_bytes"]],
        "seconds": [plan["seconds"], timing["build_seconds"]],
    }


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def describe(found: dict[str, Any], what: str = "method") -> str:
    """The table. `what`: what the cases of a shape differ in."""
    rows = []
    for case, of in found.items():
        shape, _, method = case.partition(", ")  # or the scope of a training
        row = [f"{of['sources']} of {shape}, {of['layers']} layers", f"`{method}`"]
        for kind, show in (("bytes", gigabytes), ("seconds", shown)):
            planned, measured = of[kind]
            row += [show(planned), show(measured), f"**{planned / measured:.2f}**"]
        rows.append(row)
    head = ["sources", what, "planned peak", "measured", "planned / measured"]
    return markdown([*head, "planned seconds", "measured", "planned / measured"], rows)
