"""A model in a larger shape computes what it computed."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import VARIANTS, make_model
from symphony_moe.model.families import EMBEDDING, FINAL_NORM, HEAD, head_dim
from symphony_moe.model.widening import Layers, Shape, Widening, widened_config, widest
from symphony_moe.recipe.settings import SourceSpec
from symphony_moe.sources.opening import open_source
from symphony_moe.sources.source import Source

LARGER = {
    "wider": (Shape(48, 2, 6, 3), (0, 1)),
    "more queries": (Shape(32, 2, 12, 3), (0, 1)),
    "repeated KV heads": (Shape(40, 2, 5, 5), (0, 1)),
    "deeper": (Shape(32, 5, 4, 2), (None, 0, None, 1, None)),
    "all": (Shape(56, 3, 9, 3), (0, None, 1)),
}
"""Shapes that hold the pico models of `SIZES`, and where the layers are."""


def widened(source: Source, shape: Shape, layers: Layers) -> Source:
    own = source.config
    reference = copy.deepcopy(own)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(own, name, None):  # added layers may be of any kind
            setattr(reference, name, [getattr(own, name)[n % 2] for n in range(shape.layers)])
    config = widened_config(own, shape, layers, reference)
    return Source(
        **{**vars(source), "config": config, "widening": Widening(own, config, layers)}  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_larger_shape_computes_the_same(variant: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, variant, seed=3)
    source = open_source("a", SourceSpec(model=str(folder), data="none.txt"))
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    for what, (shape, layers) in LARGER.items():
        larger = widened(source, shape, layers)
        if larger.family.refusal(larger.config):
            assert (
                variant == "llama-biases"
                and "heads" in str(larger.family.refusal(larger.config))
                or variant == "granite"
            ), what
            continue
        state = {
            f"model.layers.{layer}.{name}": tensor
            for layer in range(shape.layers)
            for name, tensor in larger.read_layer(layer).items()
        }
        state[FINAL_NORM] = larger.final_norm()
        for name in {EMBEDDING, larger.head_name}:
            state[name] = torch.cat([rows for _, rows in larger.table(name)])
        model = AutoModelForCausalLM.from_config(larger.config, dtype=torch.float32).eval()
        missing, surplus = model.load_state_dict(state, strict=False)
        assert not surplus and set(missing) <= {HEAD}, what
        model.tie_weights()
        with torch.no_grad():
            found = model(tokens).logits
        assert head_dim(larger.config) == head_dim(source.config)
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < 1e-5, f"{what}: {error:.1e}"


def test_the_widest_shape_holds_all() -> None:
    """Every source's KV heads, repeated where a KV head may not have as many query heads."""
    one = Shape(32, 2, 4, 2)
    assert widest([one, one]) == one
    assert widest([one, Shape(48, 1, 6, 3)]) == Shape(48, 2, 6, 3)
    # 4 query heads for a KV head, and 1: two for each of 4 is smallest, 8 of them.
    assert widest([Shape(64, 2, 8, 2), Shape(64, 2, 4, 4)]) == Shape(64, 2, 8, 4)
    # 9 / 3 and 8 / 2: neither holds the other.
    assert widest([Shape(9, 1, 9, 3), Shape(9, 1, 8, 2)]) == Shape(9, 1, 12, 3)
