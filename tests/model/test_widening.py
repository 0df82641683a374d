"""A model in a larger shape computes what it computed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from checks import difference, load_clean, logits_of, mostly_slow, random_text, save_widened
from conftest import VARIANTS, make_model
from symphony_moe.model.families import FAMILIES, head_dim
from symphony_moe.model.widening import Shape, Widening, widened_config, widest

LARGER = {
    "wider": (Shape(48, 2, 6, 3), (0, 1)),
    "more queries": (Shape(32, 2, 8, 2), (0, 1)),
    "repeated KV heads": (Shape(40, 2, 5, 5), (0, 1)),
    "deeper": (Shape(32, 5, 4, 2), (None, 0, None, 1, None)),
    "all": (Shape(60, 3, 12, 4), (0, None, 1)),
}
"""Shapes that hold the pico models, and where the layers are."""


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "llama-tied-rope3", "olmo2"))
def test_a_larger_shape_computes_the_same(variant: str, tmp_path: Path) -> None:
    """Law 1 of shapes, in stock transformers."""
    model = make_model(tmp_path / "model", variant, seed=3)
    text = random_text(0, 2, 40)
    expected = logits_of(load_clean(model), text)
    for what, (shape, layers) in LARGER.items():
        if variant == "llama-biases" and shape.hidden != 8 * shape.heads:
            continue  # no target holds it: GraniteMoe's heads have no size of their own
        larger = load_clean(save_widened(model, shape, layers, tmp_path / what))
        assert larger.config.hidden_size == shape.hidden
        assert len(larger.model.layers) == shape.layers
        assert difference(logits_of(larger, text), expected) < 1e-5, what


def test_the_widest_shape_holds_all() -> None:
    """Every source's KV heads, repeated where a KV head may not have as many query heads."""
    one = Shape(32, 2, 4, 2)
    assert widest([one, one]) == one
    assert widest([one, Shape(48, 1, 6, 3)]) == Shape(48, 2, 6, 3)
    # 4 query heads for a KV head, and 1: two for each of 4 is smallest, 8 of them.
    assert widest([Shape(64, 2, 8, 2), Shape(64, 2, 4, 4)]) == Shape(64, 2, 8, 4)
    # 9 / 3 and 8 / 2: neither holds the other.
    assert widest([Shape(9, 1, 9, 3), Shape(9, 1, 8, 2)]) == Shape(9, 1, 12, 3)


def test_an_added_layer_can_learn() -> None:
    """Its o and down are zeros, and what they read is not: they have a gradient."""
    own = AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    layers = (0, None, 1)
    config = widened_config(own, Shape(32, 3, 4, 4), layers, own)
    added = Widening(own, config, layers)
    assert [added.own_layer(n) for n in range(3)] == [0, 0, 1]
    matrix = torch.randn(32, 32)
    assert torch.equal(added.tensor(1, "mlp.up_proj.weight", matrix), matrix)
    assert not added.tensor(1, "mlp.down_proj.weight", matrix).any()
    assert torch.equal(added.tensor(2, "mlp.down_proj.weight", matrix), matrix)
    assert head_dim(config) == 8 and FAMILIES["llama"].refusal(config) is None
