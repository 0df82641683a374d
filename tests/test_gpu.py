"""The whole way on a CUDA device, in bfloat16 where it has that."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_recipe
from symphony_moe import pipeline
from symphony_moe.building import candidate
from symphony_moe.doctor import examine
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.files import hash_folder
from symphony_moe.model import streams
from symphony_moe.recipe.load import load_recipe
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_stock
from symphony_moe.text.texts import Texts
from twin import scramble

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_doctor_lists_every_gpu() -> None:
    devices = {one.name: one.value for one in examine().sections["devices"]}
    for number in range(torch.cuda.device_count()):
        found = devices[f"cuda:{number}"]
        assert found["name"] == torch.cuda.get_device_name(number)
        assert 0 < found["free_bytes"] <= found["total_bytes"]
        assert "float32" in found["multiplies"]


@pytest.mark.parametrize("method", ["symphony", "harmonized"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_the_whole_way_on_cuda(variant: str, method: str, tmp_path: Path) -> None:
    """Built, verified against the sources and stock transformers, trained, evaluated."""
    overrides = ["train.tokens=8192", f"method={method}"]
    recipe = load_recipe(make_recipe(tmp_path / "sources", variant), overrides)
    folder = pipeline.run(recipe, tmp_path / "run")
    pipeline.verify(folder)
    metrics = folder.read_json(folder.metrics)
    assert all(metrics["trained"][name] < metrics["built"][name] for name in recipe.sources)


@pytest.fixture
def prefer_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model may lose more on text than a mean of models that are strangers."""
    losses_of = candidate.next_token_losses

    def losses(calibration: Any, stream: str, head: torch.Tensor) -> dict[str, float]:
        more = 100.0 if stream == "plain" else 0.0
        return {name: loss + more for name, loss in losses_of(calibration, stream, head).items()}

    monkeypatch.setattr(candidate, "next_token_losses", losses)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_twins_are_brought_back_on_cuda(variant: str, prefer_the_fit: None, tmp_path: Path) -> None:
    """Law 3: statistics, maps and fit on the device give the model's loss, to 1e-3 nats."""
    path = make_recipe(tmp_path / "sources", variant, count=2)
    models = path.parent / "models"
    shutil.rmtree(models / "b")
    scramble(models / "a", models / "b", seed=1)
    recipe = load_recipe(path, ["method=harmonized", "fit.epochs=2"])
    run = pipeline.build(recipe, tmp_path / "run")
    pipeline.verify(run)
    windows = Texts(recipe, open_sources(recipe)).held_out_text()
    dense, moe = (
        losses_and_routing(load_stock(folder), windows)[0]
        for folder in (models / "a", run.checkpoint)
    )
    assert all(abs(moe[domain] - dense[domain]) <= 1e-3 for domain in dense)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_one_recipe_gives_one_set_of_bytes_on_cuda(
    variant: str, prefer_the_fit: None, tmp_path: Path
) -> None:
    """Law 5, with gradient steps: sums on the device are in one order."""
    path = make_recipe(tmp_path / "sources", variant)
    recipe = load_recipe(path, ["method=harmonized", "fit.epochs=2"])
    runs = [pipeline.build(recipe, tmp_path / name) for name in ("first", "second")]
    assert hash_folder(runs[0].checkpoint) == hash_folder(runs[1].checkpoint)


@pytest.mark.parametrize("in_files", [False, True])
def test_where_streams_wait_is_no_part_of_the_result_on_cuda(
    in_files: bool, prefer_the_fit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the GPU, or carried to it and back from memory or files, batch by batch."""
    path = make_recipe(tmp_path / "sources", "llama")
    recipe = load_recipe(path, ["method=harmonized", "fit.epochs=2"])
    there = pipeline.build(recipe, tmp_path / "there")
    monkeypatch.setattr(streams, "_has_room", lambda size: False)
    if in_files:
        monkeypatch.setattr("symphony_moe.building.estimate.STREAMS_IN_MEMORY", 0)
    carried = pipeline.build(recipe, tmp_path / "carried")
    assert hash_folder(there.checkpoint) == hash_folder(carried.checkpoint)
