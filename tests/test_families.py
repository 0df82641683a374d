"""Every family's table agrees with the family's own module and with its target's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import VARIANTS, make_model
from symphony_moe import pipeline
from symphony_moe.align import reorder_neurons
from symphony_moe.errors import SourceError
from symphony_moe.families import FAMILIES, NEURON_AXIS, head_dim, interleave_rotary
from symphony_moe.recipe import SourceSpec, load_recipe
from symphony_moe.sources import open_source


class ExactNorm(nn.Module):
    """RMS norm in the dtype of its input: the stock ones compute in float32 whatever they get."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight = stock.weight
        self.eps = stock.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + self.eps)
        return hidden * scale * self.weight


def load_dense(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if dtype == torch.float64:
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(name, ExactNorm(module))
    return model


@torch.inference_mode()
def logits_of(model: Any, text: Tensor) -> Tensor:
    return model(input_ids=text, use_cache=False).logits


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_permuting_neurons_leaves_the_logits(
    variant: str, dtype: torch.dtype, tolerance: float, recipes: Callable[[str], Path]
) -> None:
    """Law 1: another order of neurons in every layer is the same model."""
    model = load_dense(recipes(variant).parent / "models" / "a", dtype)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(300, (3, 40), generator=generator)
    before = logits_of(model, text)
    for layer in model.model.layers:
        order = torch.randperm(model.config.intermediate_size, generator=generator)
        ffn = {name: layer.get_parameter(name).data for name in NEURON_AXIS}
        reordered = reorder_neurons(ffn, order)
        for name in NEURON_AXIS:
            assert not torch.equal(reordered[name], ffn[name])
            layer.get_parameter(name).data = reordered[name]
    after = logits_of(model, text)
    assert after.dtype == dtype
    assert float((after - before).abs().max() / before.abs().max()) <= tolerance


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(1, 5), half=st.integers(1, 8), width=st.one_of(st.none(), st.just(3)))
def test_interleaving_moves_row_j_and_its_partner_together(
    heads: int, half: int, width: int | None
) -> None:
    """In every head: row 2j is the old row j, row 2j + 1 the old row j + d/2; weights and biases
    alike. Undone, every row is back."""
    size = 2 * half
    shape = (heads * size,) if width is None else (heads * size, width)
    rows = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    moved = interleave_rotary(rows, size)
    assert moved.shape == rows.shape
    for head in range(heads):
        first = head * size
        for j in range(half):
            assert torch.equal(moved[first + 2 * j], rows[first + j])
            assert torch.equal(moved[first + 2 * j + 1], rows[first + j + half])
    back = moved.view(heads, half, 2, -1).transpose(1, 2).reshape(shape)
    assert torch.equal(back, rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_target_accepts_the_planned_config(
    variant: str, recipes: Callable[[str], Path]
) -> None:
    """Stock AutoConfig reads it, and the model it makes has as many parameters as planned, of the
    planned class, with every setting as written."""
    planned = pipeline.plan(load_recipe(recipes(variant)))
    config = AutoConfig.for_model(**planned.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [type(model).__name__] == planned.config["architectures"]
    assert model.num_parameters() == planned.total_parameters
    one_expert = 3 * config.hidden_size * config.intermediate_size
    spared = one_expert * config.num_hidden_layers * (3 - 2)
    assert planned.active_parameters == planned.total_parameters - spared
    dense = AutoConfig.from_pretrained(recipes(variant).parent / "models" / "a")
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
        "num_key_value_heads", "max_position_embeddings", "rope_parameters", "hidden_act",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    ):  # fmt: skip
        assert getattr(config, name) == getattr(dense, name), name
    assert head_dim(config) == head_dim(dense)
    assert getattr(config, "sliding_window", None) == getattr(dense, "sliding_window", None)
    assert (config.num_experts_per_tok, model.num_experts) == (2, 3)


def test_every_family_is_tested() -> None:
    """A new row of the table needs a variant in conftest."""
    assert {settings["model_type"] for settings in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("variant", "changes", "reason"),
    [
        ("llama", {"attention_bias": True}, "Mixtral has no attention biases"),
        ("llama", {"mlp_bias": True}, "no stock MoE has FFN biases"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "no layers with a sliding window beside layers without",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "no layers with a sliding window beside layers without",
        ),
        ("qwen3", {"attention_bias": True}, "attention biases are not in this family's table"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_variants_that_no_target_holds_are_refused_with_the_reason(
    variant: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Better no model than one that silently drops a bias or a window."""
    folder = make_model(tmp_path / "refused", variant, 0, **changes)
    spec = SourceSpec(model=str(folder), data="unread.jsonl")
    with pytest.raises(SourceError, match=f"^who: .*refused.*{reason}"):
        open_source("who", spec)


def test_settings_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    """A window that is switched off is no window (as in every Qwen2.5 config)."""
    folder = make_model(
        tmp_path / "model", "qwen2", 0, use_sliding_window=False, sliding_window=16,
        max_window_layers=1,
    )  # fmt: skip
    assert open_source("who", SourceSpec(model=str(folder), data="unread.jsonl")).headers
