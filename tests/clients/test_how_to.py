"""The commands of the how-to pages for other programs, run as they stand there. (Those in Python:
test_fine_tuning.py and test_quantising.py.)"""

import json
import math
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine_table import with_table
from environments import alone, llama_cpp, python, run, to_gguf, tool
from models import make_run
from pages import HOW_TO
from real_model import convert, fetch, tune
from symphony_moe import pipeline
from symphony_moe.bundled import corpus
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder

pytestmark = pytest.mark.client


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A trained Qwen2 build for llama.cpp and MLX."""
    return make_run(tmp_path_factory.mktemp("qwen2"), "qwen2-granitemoe")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("llama"), "llama")


def commands(page: str) -> str:
    """All that a page has in blocks of `sh`, one after the other."""
    text = (HOW_TO / page).read_text(encoding="utf-8")
    found = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert found
    return found


def follow(page: str, folder: Path, *programs: Path) -> str:
    """What a page's commands print, in a folder that has `run`, with programs in the path. What
    they have started is ended."""
    path = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
    script = subprocess.Popen(
        ["bash", "-euc", commands(page)],
        cwd=folder,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=alone() | {"PATH": path, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    try:
        output, errors = script.communicate(timeout=900)
    finally:
        os.killpg(script.pid, signal.SIGKILL)
    assert script.returncode == 0, errors[-2000:]
    return output


def a_text(output: str) -> str:
    """The text in the answer of a server, which is the last line."""
    text = json.loads(output.strip().splitlines()[-1])["choices"][0]["text"]
    assert isinstance(text, str)
    return text


def test_gguf(qwen2: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(qwen2.root)
    (tmp_path / "llama.cpp").symlink_to(llama_cpp())
    converter = python("transformers-4.57").parent
    output = follow("gguf.md", tmp_path, tool("llama-quantize").parent, converter)
    assert a_text(output)
    whole, eight, four = (
        (tmp_path / f"moe-{kind}.gguf").stat().st_size for kind in ("f16", "Q8_0", "Q4_K_M")
    )
    assert four < eight < 0.7 * whole


def test_vllm(llama: RunFolder, tmp_path: Path) -> None:
    """The CPU's package has no command `vllm`: one stands in for it that starts the same server."""
    (tmp_path / "run").symlink_to(llama.root)
    shim = tmp_path / "bin" / "vllm"
    shim.parent.mkdir()
    server = f"{python('vllm')} -m vllm.entrypoints.openai.api_server"
    shim.write_text(
        f'#!/bin/sh\ntest "$1" = serve; m="$2"; shift 2\nexec {server} --model "$m" "$@"\n'
    )
    shim.chmod(0o755)
    assert a_text(follow("vllm.md", tmp_path, shim.parent))


def test_mlx(qwen2: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(qwen2.root)
    output = follow("mlx.md", tmp_path, python("mlx").parent)
    assert "Generation: " in output
    assert a_text(output)


# ------------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A real model and a fine-tune of it, built, its router trained shortly."""
    root = tmp_path_factory.mktemp("smollm")
    general, code = root / "models" / "general", root / "models" / "code"
    convert(fetch(root / "gguf"), general)
    tune(general, code, "python", steps=15)
    recipe: dict[str, Any] = {
        "sources": {
            "general": {"model": str(general), "data": "bundled:english"},
            "code": {"model": str(code), "data": "bundled:python"},
        },
        "calibration": {"tokens": 4096, "sequence_length": 256},
        "train": {
            "scope": "router",
            "tokens": 4096,
            "sequence_length": 256,
            "batch_size": 4,
            "learning_rate": 1e-3,
        },
    }
    path = root / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    built = pipeline.build(load_recipe(path), root / "run")
    pipeline.train(built)
    return built


def loss_of(file: Path, text: Path) -> float:
    """Nats per token of a text, by llama.cpp."""
    output = run(
        tool("llama-perplexity"), "-m", file, "-f", text, "-c", "256", "-t", "2", merge=True
    )
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", output)
    assert found is not None, output[-500:]
    return math.log(float(found.group(1)))


def test_quantised_loss_beside_the_float_one(smollm: RunFolder, tmp_path: Path) -> None:
    """What Q8_0 and Q4_K_M cost on held-out English and Python."""
    text = tmp_path / "text.txt"
    documents = [*corpus.documents("english")[:40], *corpus.documents("python")[:20]]
    text.write_text("\n\n".join(documents)[:16_000], encoding="utf-8")
    whole = tmp_path / "moe-f32.gguf"
    to_gguf(smollm.trained, whole)
    rows, losses = [], {}
    for kind in ("F32", "F16", "Q8_0", "Q4_K_M"):
        file = whole
        if kind != "F32":
            file = tmp_path / f"moe-{kind}.gguf"
            run(tool("llama-quantize"), whole, file, kind, merge=True)
        losses[kind] = loss_of(file, text)
        share = file.stat().st_size / whole.stat().st_size
        rows.append(f"| {kind} | {share:.0%} | {losses[kind]:.3f} |")
        print(rows[-1])
    table = "\n".join(["| type | size | loss, nats per token |", "|---|---|---|", *rows])
    page = HOW_TO / "gguf.md"
    text_of_page = page.read_text(encoding="utf-8")
    page.write_text(with_table(text_of_page, "loss", table), encoding="utf-8")
    assert abs(losses["F16"] - losses["F32"]) < 0.002
    assert abs(losses["Q8_0"] - losses["F32"]) < 0.01
    assert 0 < losses["Q4_K_M"] - losses["F32"] < 0.3
