"""Sources of unequal shapes, brought to one while they are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checks import logits_of, models_of, mostly_slow, random_text
from conftest import VARIANTS, make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.building.place_layers import cka_of_streams, stream_similarities
from symphony_moe.errors import RecipeError, SourceMismatch
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.shapes import match_layers

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
WIDEST = {"shapes": "widest"}


def unequal(root: Path, variant: str = "llama", **sections: Any) -> Path:
    """A recipe of `a`, which is wide and deep, `b`, which is narrow, and `c`, which is shallow."""
    sections = {"backbone": WIDEST} | sections
    path = make_recipe(root, variant, count=3, **sections)
    for name, changes in (("a", WIDE), ("b", SMALL), ("c", WIDE)):
        shutil.rmtree(root / "models" / name)
        layers = {"num_hidden_layers": 2 if name == "c" else 3}
        head = {"head_dim": VARIANTS[variant].get("head_dim", 8)}
        make_model(root / "models" / name, variant, ord(name), **head | changes | layers)
    return path


@pytest.mark.parametrize("method", ["btx", "harmonized"])
def test_a_build_is_loaded_verified_and_built_again(method: str, tmp_path: Path) -> None:
    recipe = load_recipe(unequal(tmp_path, method=method))
    planned = pipeline.plan(recipe)
    assert any("hidden size 32 to 48, query heads 4 to 6" in note for note in planned.notes)
    assert any("c is padded" in note and "layers 2 to 3" in note for note in planned.notes)
    assert planned.config["hidden_size"] == 48 and planned.config["num_hidden_layers"] == 3
    run = pipeline.build(recipe, tmp_path / "run")
    layers = run.read_recipe().sources["c"].layers
    assert (
        layers is not None and len(layers) == 3 and [n for n in layers if n is not None] == [0, 1]
    )
    checks = pipeline.verify(run, deep=True)
    assert "computes what it does as it is read" in checks["b in stock transformers"]
    pipeline.train(run)
    pipeline.evaluate(run)
