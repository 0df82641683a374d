"""What takes minutes: memory against depth, and an older transformers in an environment of its
own."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from conftest import make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.recipe import load_recipe
from symphony_moe.stock import load_stock

pytestmark = pytest.mark.slow

FAT = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}
"""A layer of 12 MB in float32, so that keeping layers would show: four sources of 10 layers are
more than 400 MB."""


def _peak_of_build(recipe: Path, out: Path, *overrides: str) -> int:
    """Peak memory of `symphony build` in a process of its own, in bytes."""
    command = [sys.executable, "-m", "symphony_moe", "build", str(recipe), "--out", str(out)]
    for override in overrides:
        command += ["--set", override]
    # Within a layer glibc keeps freed blocks of up to 32 MB for itself, more or fewer from run to
    # run. With one thread and a low threshold, what the program holds is what is measured.
    pinned = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    subprocess.run(command, env=os.environ | pinned, check=True)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return metrics["timing"]["build_peak_rss_bytes"]


@pytest.mark.parametrize("method", ["symphony", "harmonized"])
def test_peak_memory_does_not_grow_with_depth(method: str, tmp_path: Path) -> None:
    """The same recipe at 10 and at 20 layers peaks within 3 %, be it fitted or not. (What a
    harmonized build records of a layer before it begins to fit is 6 MB here: half a layer.)"""
    peaks = {}
    for layers in (10, 20):
        root = tmp_path / str(layers)
        recipe = make_recipe(root, "llama", count=4, output={"dtype": "bfloat16"})
        for name in "abcd":
            make_model(
                root / "models" / name, "llama", seed=ord(name), num_hidden_layers=layers, **FAT
            )
        overrides = (f"method={method}", "refit.epochs=0.5")
        peaks[layers] = _peak_of_build(recipe, root / "run", *overrides)
    sizes = ", ".join(f"{peak / 1e6:.0f} MB" for peak in peaks.values())
    print(f"\npeak memory of {method} at 10 and 20 layers: {sizes}")
    assert abs(peaks[20] / peaks[10] - 1) < 0.03


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 60_000, "hidden_size": 256},
        {"hidden_size": 256, "intermediate_size": 4096},
        FAT,
    ],
    ids=["tables", "experts", "layers"],
)
@pytest.mark.parametrize("method", ["symphony", "harmonized"])
def test_peak_memory_is_as_planned(method: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """Never more than planned by a tenth, and no plan that frightens for nothing."""
    recipe = make_recipe(tmp_path, "llama", count=4, output={"dtype": "bfloat16"})
    for name in "abcd":
        make_model(tmp_path / "models" / name, "llama", seed=ord(name), **sizes)
    measured = _peak_of_build(recipe, tmp_path / "run", f"method={method}", "refit.epochs=0.5")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    planned = plan["peak_memory_bytes"]
    print(f"\n{method}: {measured / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB")
    assert 0.5 < measured / planned < 1.1


OLD_READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, torch_dtype=torch.float32, output_loading_info=True
)
assert not any(info.values()), info
with torch.no_grad():
    logits = model(torch.tensor(json.loads(ids))).logits
torch.save(logits, out)
"""


@pytest.mark.parametrize("variant", ["llama", "llama-tied-rope3"])
def test_loads_in_transformers_4_57_with_equal_logits(
    tmp_path_factory: pytest.TempPathFactory, variant: str
) -> None:
    """Fused expert tensors load there as random weights without an error; ours must not."""
    home = tmp_path_factory.getbasetemp() / "transformers-4.57"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "transformers==4.57.*",
             f"torch=={torch.__version__.split('+')[0]}"],
            check=True,
        )  # fmt: skip
    root = tmp_path_factory.mktemp(f"old-{variant}")
    run = pipeline.build(load_recipe(make_recipe(root, variant)), root / "run")
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_stock(run.checkpoint)(ids).logits
    arguments = [str(run.checkpoint), json.dumps(ids.tolist()), str(root / "logits.pt")]
    # Nothing of this environment may be seen from that one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run([str(python), "-c", OLD_READER, *arguments], check=True, env=environment)
    theirs = torch.load(root / "logits.pt", weights_only=True)
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5
