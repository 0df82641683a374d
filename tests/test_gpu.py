"""The whole way on a CUDA device, in bfloat16 where it has that."""

from pathlib import Path

import pytest
import torch

from conftest import make_recipe
from symphony_moe import pipeline
from symphony_moe.recipe import load_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_the_whole_way_on_cuda(variant: str, tmp_path: Path) -> None:
    """Built, verified against the sources and stock transformers, trained, evaluated."""
    recipe = load_recipe(make_recipe(tmp_path / "sources", variant), ["train.tokens=8192"])
    folder = pipeline.run(recipe, tmp_path / "run")
    pipeline.verify(folder)
    metrics = folder.read_json(folder.metrics)
    assert all(metrics["trained"][name] < metrics["built"][name] for name in recipe.sources)
