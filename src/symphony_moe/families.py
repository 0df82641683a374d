"""Model families as tables: what each tensor of a dense model is, and which stock
Mixture-of-Experts architecture of `transformers` holds the family exactly.

A new family is a new row in `FAMILIES` (and a test run over all rows picks it up). Tensor names are
relative to `model.layers.{layer}.`; shapes are not in the table, they come from the family's own
`transformers` module. What each row must get right was measured: docs/design.md, "Output formats".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
"""A tensor of zeros. Without it transformers reports a missing tensor (and fills in zeros); with it
llama.cpp's converter refuses the checkpoint. `output.head_bias` decides."""
GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"

NEURON_AXIS = {GATE: 0, UP: 0, DOWN: 1}
"""The axis of each FFN matrix (stored out x in) that counts hidden neurons."""

_ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")
_ROTARY = ("self_attn.q_proj", "self_attn.k_proj")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

_SAME_IN_EVERY_TARGET = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
]


@dataclass(frozen=True)
class Symmetries:
    """What the weights of a family can be put through without changing the function (applied by
    `symmetry.py`).

    Not spelled out, as every family of the table has it: KV groups and the query heads of a group
    in any order, any rotation of a KV group's values, and neurons of a gated FFN in any order and
    with any sign of `up`.
    """

    gains: Mapping[str, tuple[str, ...]]
    """Norm gain that folds -> the matrices that read what it scales. A norm after a sublayer is not
    in here: nothing linear reads it alone."""
    gain_offset: float
    """The norm multiplies by its weight plus this: 0, or 1 as in Gemma."""
    residual: Literal["orthogonal", "signed-permutation"]
    """Bases that the residual stream can take once gains are folded; `signed-permutation` for
    families with gains that do not fold."""
    phases: Literal["any", "half-turns"]
    """Rotations of a RoPE pair, the same for a group's q and k. `half-turns`: q and k are normed
    per head, so 0 and pi alone, unless the pair has equal gains, in q_norm and in k_norm."""


@dataclass(frozen=True)
class Family:
    """One dense architecture and the stock MoE architecture that computes the same with experts."""

    dense: str
    """`model_type` of the sources."""
    moe: str
    """`model_type` of the output."""
    moe_class: str
    """The output's class, for `architectures` in its config."""
    router: str
    """Name of the router's matrix (experts x hidden)."""
    expert: Mapping[str, str]
    """FFN matrix of a source -> name in the output, with `{expert}` for the expert's number."""
    target_settings: Callable[[PreTrainedConfig, int, int], dict[str, Any]]
    """(dense config, number of experts, top_k) -> what the target's config needs besides the shared
    fields."""
    symmetries: Symmetries
    """What leaves a dense model's function as it is."""
    refusals: tuple[tuple[str, Callable[[PreTrainedConfig], Any]], ...] = ()
    """(reason, test on the dense config): variants that the target cannot hold."""
    attention: tuple[str, ...] = _ATTENTION
    """Matrices fused by `backbone.attention`."""
    vectors: tuple[str, ...] = ()
    """One-dimensional tensors of attention (biases, QK-norm gains): always averaged linearly."""
    norms: tuple[str, ...] = _NORMS
    """Norm gains, fused by `backbone.norms`."""
    interleaved_rotary: bool = False
    """The target rotates neighbouring rows of q and k, where the dense family rotates row j with
    row j + head_dim / 2."""
    zeros: Mapping[str, str] = field(default_factory=dict)
    """Tensors that the target has and the family lacks, written as zeros: name -> axes, as words of
    `hidden` and `experts` (or numbers)."""
    has_head_bias: bool = False
    """The target has a bias in its output head, which the family lacks: zeros, see HEAD_BIAS."""

    @property
    def shared(self) -> tuple[str, ...]:
        """Every tensor of a layer that all experts share."""
        return self.norms + self.attention + self.vectors


def _per_expert(prefix: str, gate: str, up: str, down: str) -> dict[str, str]:
    return {
        dense: f"{prefix}.{{expert}}.{name}.weight"
        for dense, name in ((GATE, gate), (UP, up), (DOWN, down))
    }


def _mixtral(config: PreTrainedConfig, num_experts: int, top_k: int) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "head_dim": head_dim(config),
        "sliding_window": getattr(config, "sliding_window", None),
        "attention_dropout": config.attention_dropout,
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
    }


def _ernie(config: PreTrainedConfig, num_experts: int, top_k: int) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.intermediate_size,
        "head_dim": head_dim(config),
        "use_bias": True,
        "moe_num_experts": num_experts,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": config.num_hidden_layers - 1,
        "moe_layer_interval": 1,
        "moe_k": top_k,
    }


def _qwen3_moe(config: PreTrainedConfig, num_experts: int, top_k: int) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.intermediate_size,
        "head_dim": head_dim(config),
        "attention_dropout": config.attention_dropout,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        # The default is false: gates would not sum to one, and equal experts not to the dense
        # model.
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _has_sliding_layers(config: PreTrainedConfig) -> bool:
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


_SLIDING = "the target has no layers with a sliding window beside layers without one"
_PRE_NORM = Symmetries(
    gains={_NORMS[0]: _ATTENTION[:3], _NORMS[1]: (GATE, UP)},
    gain_offset=0.0,
    residual="orthogonal",
    phases="any",
)
_MIXTRAL_EXPERTS = _per_expert("block_sparse_moe.experts", "w1", "w3", "w2")
_QWEN_EXPERTS = _per_expert("mlp.experts", "gate_proj", "up_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    family.dense: family
    for family in (
        Family(
            dense="llama",
            moe="mixtral",
            moe_class="MixtralForCausalLM",
            router="block_sparse_moe.gate.weight",
            expert=_MIXTRAL_EXPERTS,
            target_settings=_mixtral,
            symmetries=_PRE_NORM,
            refusals=(
                ("Mixtral has no attention biases", lambda config: config.attention_bias),
                ("no stock MoE has FFN biases", lambda config: config.mlp_bias),
            ),
        ),
        Family(
            dense="mistral",
            moe="mixtral",
            moe_class="MixtralForCausalLM",
            router="block_sparse_moe.gate.weight",
            expert=_MIXTRAL_EXPERTS,
            target_settings=_mixtral,
            symmetries=_PRE_NORM,
        ),
        Family(
            dense="qwen2",
            moe="ernie4_5_moe",
            moe_class="Ernie4_5_MoeForCausalLM",
            router="mlp.gate.weight",
            expert=_QWEN_EXPERTS,
            target_settings=_ernie,
            symmetries=_PRE_NORM,
            refusals=((_SLIDING, _has_sliding_layers),),
            vectors=tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
            interleaved_rotary=True,
            has_head_bias=True,
            zeros={
                "self_attn.o_proj.bias": "hidden",
                "mlp.moe_statics.e_score_correction_bias": "1 experts",
            },
        ),
        Family(
            dense="qwen3",
            moe="qwen3_moe",
            moe_class="Qwen3MoeForCausalLM",
            router="mlp.gate.weight",
            expert=_QWEN_EXPERTS,
            target_settings=_qwen3_moe,
            symmetries=replace(_PRE_NORM, phases="half-turns"),
            refusals=(
                (_SLIDING, _has_sliding_layers),
                ("attention biases are not in this family's table", lambda c: c.attention_bias),
            ),
            vectors=("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        ),
    )
}


def head_dim(config: PreTrainedConfig) -> int:
    """Size of an attention head, spelled out in the config or implied by it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def target_config(
    family: Family, dense: PreTrainedConfig, num_experts: int, top_k: int, *, tied: bool, dtype: str
) -> dict[str, Any]:
    """The output's config.json, without its transformers version.

    Both `rope_parameters` and the older `rope_theta` / `rope_scaling` are written: transformers 4
    and other readers know only the older ones.
    """
    settings = {name: getattr(dense, name, None) for name in _SAME_IN_EVERY_TARGET}
    settings |= family.target_settings(dense, num_experts, top_k)
    rope = dict(dense.rope_parameters)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    settings |= {
        "architectures": [family.moe_class],
        "model_type": family.moe,
        "dtype": dtype,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "output_router_logits": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling,
    }
    return settings


@dataclass(frozen=True)
class MoELayer:
    """One finished layer in the dense family's own layout, before it takes the target's names."""

    shared: Mapping[str, Tensor]
    """`Family.shared` name -> tensor."""
    experts: Sequence[Mapping[str, Tensor]]
    """For each expert, FFN matrix name -> tensor."""
    router: Tensor
    """experts x hidden."""

    def select(self, order: Sequence[int]) -> "MoELayer":
        """The same layer with its experts in another order: entry i is the expert that becomes
        expert i."""
        rows = self.router[list(order)]
        return MoELayer(self.shared, [self.experts[number] for number in order], rows)

    def to(self, dtype: torch.dtype) -> "MoELayer":
        """The same layer, rounded to another dtype."""
        return MoELayer(
            {name: tensor.to(dtype) for name, tensor in self.shared.items()},
            [{name: tensor.to(dtype) for name, tensor in e.items()} for e in self.experts],
            self.router.to(dtype),
        )


def interleave_rotary(rows: Float[Tensor, "rows ..."], head_size: int) -> Float[Tensor, "rows ..."]:
    """Reorder the rows of q or k (or its bias), head by head, so that the pair (j, j + head_size /
    2) becomes the neighbours (2j, 2j + 1). Attention scores stay as they are: q and k move
    together."""
    heads = rows.view(-1, 2, head_size // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def undo_interleave_rotary(
    rows: Float[Tensor, "rows ..."], head_size: int
) -> Float[Tensor, "rows ..."]:
    """The inverse of `interleave_rotary`."""
    heads = rows.view(-1, head_size // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def read_layer_outputs(
    family: Family,
    config: PreTrainedConfig,
    layer: int,
    num_experts: int,
    read: Callable[[str], Tensor],
) -> MoELayer:
    """The inverse of `layer_outputs`. `read`: name in the checkpoint -> tensor."""
    prefix = f"model.layers.{layer}."
    shared = {}
    for name in family.shared:
        tensor = read(prefix + name)
        if family.interleaved_rotary and name.startswith(_ROTARY):
            tensor = undo_interleave_rotary(tensor, head_dim(config))
        shared[name] = tensor
    experts = [
        {dense: read(prefix + name.format(expert=number)) for dense, name in family.expert.items()}
        for number in range(num_experts)
    ]
    return MoELayer(shared, experts, read(prefix + family.router))


def layer_outputs(
    family: Family, config: PreTrainedConfig, layer: int, tensors: MoELayer
) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint, tensor) for everything that the target has in one layer."""
    prefix = f"model.layers.{layer}."
    num_experts, hidden = tensors.router.shape
    for name in family.shared:
        tensor = tensors.shared[name]
        if family.interleaved_rotary and name.startswith(_ROTARY):
            tensor = interleave_rotary(tensor, head_dim(config))
        yield prefix + name, tensor
    sizes = {"hidden": hidden, "experts": num_experts}
    for name, axes in family.zeros.items():
        shape = [sizes.get(axis) or int(axis) for axis in axes.split()]
        yield prefix + name, torch.zeros(shape, dtype=tensors.router.dtype)
    yield prefix + family.router, tensors.router
    for number, expert in enumerate(tensors.experts):
        for dense_name, name in family.expert.items():
            yield prefix + name.format(expert=number), expert[dense_name]
