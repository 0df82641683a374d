"""(f) What `plan` says of memory and time, against what a build, and a training, then take.

Peak memory does not grow with depth (`make test-slow`), so that few layers at full width are
enough.
"""

import json
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
    state, found = setting.state("planned_training"), {}
    for shape in ["135M"] if setting.quick else [s for s in SHAPES if s != "7B"]:
        count, layers = SHAPES[shape]
        for scope in TRAINED:
            case = f"{shape}, {scope}"

            def run(case: str = case, count: int = count, layers: int = layers) -> dict[str, Any]:
                return _train(setting, case, count, layers)

            found[case] = state.get(case, run)
    return found


def _train(setting: Setting, case: str, count: int, layers: int) -> dict[str, Any]:
    shape, _, scope = case.partition(", ")
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
    state, found = setting.state("planned"), {}
    shapes, methods = (list(SHAPES), METHODS) if not setting.quick else (["135M"], METHODS[-1:])
    for shape in shapes:
        count, layers = SHAPES[shape]
        for method in methods:
            if method == "bam" and shape == "0.5B":
                continue  # no stock model holds Qwen2 with attention experts
            case = f"{shape}, {method}"

            def run(case: str = case, count: int = count, layers: int = layers) -> dict[str, Any]:
                return _run(setting, case, count, layers)

            found[case] = state.get(case, run)
    return found


def _run(setting: Setting, case: str, count: int, layers: int) -> dict[str, Any]:
    shape, _, method = case.partition(", ")
    recipe = setting.recipe(
        f"planned-{shape}-{method}",
        setting.sources(shape, count, layers),
        method=method,
        calibration={
            "tokens": 1024 if setting.quick else TOKENS,
            "sequence_length": 64 if setting.quick else SEQUENCE,
        },
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
