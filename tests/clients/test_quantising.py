"""docs/how-to/quantise.md: what its table says is measured, and its code does what it says."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import make_trained
from pages import HOW_TO, ask, blocks, changed

pytestmark = pytest.mark.client

PAGE = "quantise.md"
TORCHAO = "8 bits in transformers: torchao"
COMPRESSOR = "4 bits in a file: llm-compressor, for Qwen3"
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
"""Not so small that scales weigh as much as what they scale."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("llama", {}),
    "ernie4_5_moe": ("qwen2", {}),
    "qwen3_moe": ("qwen3", {}),
    "granitemoe": ("qwen2", {"architecture": "granitemoe"}),
}
"""name -> variant of the sources, `output` of the recipe."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of MODELS -> a folder with `run/trained` and `text.jsonl`, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            variant, output = MODELS[name]
            root = tmp_path_factory.mktemp("trained")
            output = {"dtype": "bfloat16"} | output
            made[name] = make_trained(root, variant, SIZES, output=output)
        return made[name]

    return get


def shares(said: dict[str, Any], of: str) -> dict[str, float]:
    """What is left of the bytes of each kind."""
    return {kind: size / said[""]["bytes"][kind] for kind, size in said[of]["bytes"].items()}


def table() -> dict[str, dict[str, str]]:
    """The page's table: first column -> what is left of attention and experts."""
    text = (HOW_TO / PAGE).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| (\d+ %) \| (\d+ %) \|$", text, re.MULTILINE)
    return {how: {"attention": first, "experts": second} for how, first, second in rows}


def as_written(left: dict[str, float]) -> dict[str, str]:
    return {kind: f"{left[kind]:.0%}".replace("%", " %") for kind in ("attention", "experts")}


def test_quantisers_of_linear_layers_leave_the_experts(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = {how.strip("`"): left for how, left in table().items() if how.startswith("`")}
    assert len(rows) == 5
    request = {"folder": str(trained("qwen3_moe")), "configs": list(rows)}
    said = ask("tune", "ask_quantised.py", tmp_path, request)
    print(said)
    assert {how: as_written(shares(said, how)) for how in rows} == rows
    assert all(math.isfinite(said[how]["loss"]) for how in rows)


@pytest.mark.parametrize("name", MODELS)
def test_torchao_halves_attention_and_experts(
    name: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained(name), root)
    make, load = blocks(PAGE, TORCHAO)
    request: dict[str, Any] = {"folder": str(root), "blocks": [make, load], "stored": "int8"}
    request["settings"] = {"experts_implementation": "eager"}
    said = ask("tune", "ask_quantised.py", tmp_path, request)
    print(name, said)
    (row,) = (left for how, left in table().items() if how.startswith("torchao"))
    left = shares(said, "0")
    if name == "qwen3_moe":
        assert as_written(left) == row
    assert left["experts"] < 0.55 and left["attention"] < 0.6
    assert left["rest"] == 1
    assert said["stored"]["info"] == {}
    assert said["0"]["loss"] == said["1"]["loss"] == said["stored"]["loss"]
    assert abs(said["0"]["loss"] - said[""]["loss"]) < 0.02


def test_only_eager_experts_compute_in_int8(trained: Callable[[str], Path], tmp_path: Path) -> None:
    (make, _) = blocks(PAGE, TORCHAO)
    make = changed(make, {'    experts_implementation="eager",\n': ""})
    attempt = f"try:\n{_indented(make)}\n    model(torch.tensor([[1, 2, 3]]))\n"
    attempt += "except NotImplementedError:\n    open('refused', 'w').close()\n"
    root = tmp_path / "root"
    shutil.copytree(trained("qwen3_moe"), root)
    ask("tune", "ask_page.py", tmp_path, {"folder": str(root), "blocks": [attempt]})
    assert (root / "refused").is_file()


def _indented(block: str) -> str:
    return "\n".join(f"    {line}" for line in block.splitlines())


def compress(root: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(root, folder / "root")
    (block,) = blocks(PAGE, COMPRESSOR)
    request = {"folder": str(folder / "root"), "blocks": [block], "stored": "int4"}
    return ask("llm-compressor", "ask_quantised.py", folder, request)


def test_llm_compressor_quarters_qwen3(trained: Callable[[str], Path], tmp_path: Path) -> None:
    said = compress(trained("qwen3_moe"), tmp_path)
    print(said)
    (row,) = (left for how, left in table().items() if how.startswith("llm-compressor"))
    assert as_written(shares(said, "stored")) == row
    assert said["stored"]["info"] == {}
    assert abs(said["stored"]["loss"] - said[""]["loss"]) < 0.1


@pytest.mark.parametrize("name", ["mixtral", "ernie4_5_moe", "granitemoe"])
def test_llm_compressor_still_breaks_the_others(
    name: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    said = compress(trained(name), tmp_path)
    print(name, said)
    info = said["stored"]["info"]
    if name == "ernie4_5_moe":
        assert any(key.endswith("_proj.bias") for key in info["unexpected_keys"])
    else:
        assert any(".experts." in key for key in info["missing_keys"])
