"""Model families as tables: what each tensor of a dense model is, and which stock
Mixture-of-Experts architecture of `transformers` holds the family exactly.

A new family is a new row in `FAMILIES` (and a test run over all rows picks it up); `TARGETS` has
the rows for every kind of attention. Tensor names are relative to `model.layers.{layer}.`. What
each row must get right was measured: docs/design.md, "Output formats".
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from symphony_moe.errors import RecipeError, shortened

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

HEAD_BIAS = "lm_head.bias"
"""A tensor of zeros. Without it transformers reports a missing tensor (and fills in zeros); with it
llama.cpp's converter and MLX refuse the checkpoint. `output.head_bias` decides."""

GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"

NEURON_AXIS = {GATE: 0, UP: 0, DOWN: 1}
"""The axis of each FFN matrix (stored out x in) that counts hidden neurons."""

SHARED_GATE = "shared_expert_gate.weight"
"""The row that says how much of a shared expert a token gets."""

_DENSE_FFN = {name: name for name in NEURON_AXIS}
"""How Qwen's MoEs call the FFN of a layer without experts: as dense models do."""

_ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")
Q_PROJ, K_PROJ, V_PROJ, O_PROJ = _ATTENTION
HEAD_AXIS = {f"self_attn.{part}_proj.{kind}": 0 for part in "qkv" for kind in ("weight", "bias")}
HEAD_AXIS[O_PROJ] = 1
"""The axis of each tensor of attention that counts heads."""

READERS = (Q_PROJ, K_PROJ, V_PROJ, GATE, UP)
"""The matrices of a layer that read the residual stream."""
WRITERS = (O_PROJ, DOWN)
"""Those that write it."""

ROTARY = ("self_attn.q_proj", "self_attn.k_proj")
_BIASES = tuple(f"self_attn.{part}_proj.bias" for part in "qkvo")
_QKV_BIASES = dict(zip(_BIASES, ("queries", "keys", "keys"), strict=False))
"""Name -> its axis, as in `Family.zeros`."""
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
BY_LAYER = ("layer_types", "no_rope_layers")
"""Config fields that say something of each layer."""

_JETMOE_EPS = 1e-6
_NEVER = -3e4
"""A logit whose share in a softmax is 0 in float32, beside any other. Every output dtype holds
it."""

BY_TOKEN = ("logits", "weights", "experts")
"""What most stock router modules put out: logits (tokens x experts), then the weights and the
numbers of the experts that each token goes to (both tokens x places)."""

BY_EXPERT = ("order", "tokens", "weights", "sizes", "logits")
"""What JetMoE's puts out, where `weights` are sorted by expert: for each of them, its place in
tokens x places and its token; how many each expert has; and the logits."""

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
    """Rotations of a RoPE pair, the same for a group's q and k. `half-turns`: q and k are normed,
    so 0 and pi alone, unless the pair has equal gains, in q_norm and in k_norm."""


_Test = Callable[[PreTrainedConfig], Any]
"""A question about a dense config; what is true of the answer counts."""


def refusal(refusals: Iterable[tuple[str, _Test]], config: PreTrainedConfig) -> str | None:
    """The reason of the first test that a dense config fails; None where it fails none."""
    return next((reason for reason, refuses in refusals if refuses(config)), None)


@dataclass(frozen=True)
class Factors:
    """Numbers that a family multiplies by beside its weights, as fields of its config: the same in
    the target. None: nothing is multiplied."""

    embeddings: str | None = None
    """Token embeddings are multiplied by it."""
    residual: str | None = None
    """What attention and FFN add to the residual stream is multiplied by it."""
    attention: str | None = None
    """Attention scores are multiplied by it, in place of 1 / sqrt(head size)."""
    logits: str | None = None
    """The logits are divided by it."""

    @property
    def fields(self) -> tuple[str, ...]:
        """All of them."""
        named = (self.embeddings, self.residual, self.attention, self.logits)
        return tuple(name for name in named if name is not None)


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
    """Matrix of a source's that its expert keeps -> name in the output, with `{expert}` for the
    expert's number. A name without it holds all experts' matrices, stacked; matrices of one name
    lie below one another."""
    target_settings: Callable[[PreTrainedConfig, int, int], dict[str, Any]]
    """(dense config, number of experts, top_k) -> what the target's config needs besides the shared
    fields."""
    symmetries: Symmetries
    """What leaves a dense model's function as it is."""
    refusals: tuple[tuple[str, _Test], ...] = ()
    """(reason, test on the dense config): variants that the target cannot hold."""
    attention: tuple[str, ...] = _ATTENTION
    """Matrices fused by `backbone.attention`."""
    vectors: tuple[str, ...] = ()
    """One-dimensional tensors of attention (biases, QK-norm gains): always averaged linearly."""
    norms_before: tuple[str, str] | None = _NORMS
    """Gains of the norms that attention and FFN read the residual stream through; None where they
    read it as it is."""
    norms_after: tuple[str, str] | None = None
    """Gains of the norms that what attention and FFN put out goes through; None where it is added
    as it is."""
    head_norms: Literal["none", "per head", "whole"] = "none"
    """Norms of q and k: none, of each head alone, or of all heads together."""
    factors: Factors = field(default_factory=Factors)
    """What the family multiplies by beside its weights."""
    interleaved_rotary: bool = False
    """The target rotates neighbouring rows of q and k, where the dense family rotates row j with
    row j + head_dim / 2."""
    zeros: Mapping[str, str] = field(default_factory=dict)
    """Tensors that the target has and the family lacks, written as zeros: name -> axes, as words of
    `hidden`, `heads`, `queries` and `keys` (heads times their size) and `experts`, or numbers.
    Engines leave them out, so they stay zeros: nothing trains them."""
    constants: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """The same of tensors that hold another number than zero: name -> (axes, number)."""
    has_head_bias: bool = False
    """The target has a bias in its output head, which the family lacks: zeros, see HEAD_BIAS."""
    attention_router: str | None = None
    """Name of the matrix (experts x hidden) that chooses attention experts, where q and o are in
    `expert`."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Shared tensor -> name in the output, where that is another. Tensors of one name lie below one
    another."""
    repeats_kv: bool = False
    """The target has a KV head for every query head: those of the family are repeated."""
    router_outputs: tuple[tuple[str, ...], ...] = (BY_TOKEN,)
    """What the target's router module puts out, part by part, in each of the versions of
    transformers since 5.0."""
    norm_eps: float | None = None
    """The only epsilon that the target's norms have; None where it is a setting. See
    `stream_scale`."""
    expert_width: str = "intermediate_size"
    """The target's setting for the number of neurons of an expert."""
    dense_ffn: Mapping[str, str] | None = None
    """Matrix of an FFN -> name in a layer of the output that has one FFN and no experts
    (`mlp_only_layers` in its config); None where the target has no such layers."""
    dense_layers: tuple[int, ...] = ()
    """The layers that are so: what a recipe asks for, and no property of the family."""
    slices: int = 1
    """Experts that each source's FFN is dealt into (`slice_experts`): the same."""
    shared_expert: Mapping[str, str] | None = None
    """Matrix of an FFN, and SHARED_GATE -> name in the output of an expert that every token goes
    to, whatever the router says; None where the target has none. Its output is multiplied by the
    sigmoid of its gate."""
    has_shared_expert: bool = False
    """Whether there is one that puts out anything: what a recipe asks for."""

    @property
    def norms(self) -> tuple[str, ...]:
        """Norm gains of the residual stream, fused by `backbone.norms`."""
        return (*(self.norms_before or ()), *(self.norms_after or ()))

    @property
    def shared(self) -> tuple[str, ...]:
        """Every tensor of a layer that all experts share."""
        return self.norms + self.attention + self.vectors

    def constant(self, tensor: str) -> float | None:
        """What a tensor of the target is filled with that the family lacks; None of all others. By
        its name in the output or in the loaded model: transformers puts some of them elsewhere in a
        model than in its file, and the end of the name stays."""
        filled = dict.fromkeys((*self.zeros, *([HEAD_BIAS] if self.has_head_bias else ())), 0.0)
        filled |= {name: number for name, (_, number) in self.constants.items()}
        return next((n for name, n in filled.items() if _end(name) == _end(tensor)), None)

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """Why the target does not hold a dense model; None where it does."""
        if self.moe not in CONFIG_MAPPING:
            return f"transformers {transformers.__version__} has no {self.moe}; install a newer one"
        return refusal(self.refusals, config)

    @property
    def stacks_experts(self) -> bool:
        """Whether one tensor of the output holds a matrix of all experts."""
        return not any("{expert}" in name for name in self.expert.values())


def _end(tensor: str) -> list[str]:
    """What tells a tensor of a layer from the others, wherever in a model it is. A shared expert's
    matrices are called as the other experts'."""
    words = tensor.split(".")
    return words[-3:] if words[-3:-2] == ["shared_expert"] else words[-2:]


def _per_expert(prefix: str, gate: str, up: str, down: str) -> dict[str, str]:
    return {
        dense: f"{prefix}.{{expert}}.{name}.weight"
        for dense, name in ((GATE, gate), (UP, up), (DOWN, down))
    }


def _mixtral(config: PreTrainedConfig, num_experts: int, top_k: int) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "head_dim": head_dim(config),
        # Llama reads none, whatever its config says.
        "sliding_window": config.sliding_window if config.model_type == "mistral" else None,
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


def _qwen2_moe(config: PreTrainedConfig, num_experts: int, top_k: int) -> dict[str, Any]:
    window = attention_window(config)
    return _qwen3_moe(config, num_experts, top_k) | {
        # vLLM has these biases whatever this says, and MLX wants them in the file.
        "qkv_bias": True,
        # Zeros, of the least size that there is.
        "shared_expert_intermediate_size": 1,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": getattr(config, "max_window_layers", config.num_hidden_layers),
        "layer_types": None if window is None else list(config.layer_types),
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


def _granitemoe(config: PreTrainedConfig, num_experts: int, top_k: int) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "head_dim": head_dim(config),
        "attention_bias": config.model_type == "qwen2" or has_attention_biases(config),
        "attention_dropout": config.attention_dropout,
        # Granite's own four factors, at what they are in every other family.
        "attention_multiplier": head_dim(config) ** -0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
    }


def _jetmoe(config: PreTrainedConfig, num_experts: int, top_k: int) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "activation_function": config.hidden_act,
        "attention_dropout": config.attention_dropout,
        "kv_channels": head_dim(config),
        "num_key_value_heads": config.num_attention_heads,
        # Every chosen expert has all of a source's query heads.
        "num_attention_heads": config.num_attention_heads * top_k,
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        # The final norm reads it; the others have this one, whatever the config says.
        "rms_norm_eps": _JETMOE_EPS,
    }


def attention_window(config: PreTrainedConfig) -> int | None:
    """How far back (in tokens) a dense model's attention sees in some of its layers, where that is
    less than its context; None where all layers see all of it."""
    size = getattr(config, "sliding_window", None)
    some_slide = config.model_type == "mistral" or (
        config.model_type != "llama"
        and "sliding_attention" in (getattr(config, "layer_types", None) or ())
    )
    if size is None or not some_slide or size >= config.max_position_embeddings:
        return None
    return int(size)


def _has_window(config: PreTrainedConfig) -> bool:
    return attention_window(config) is not None


def _has_own_head_size(config: PreTrainedConfig) -> bool:
    return bool(head_dim(config) * config.num_attention_heads != config.hidden_size)


def _granitemoe_swa(config: PreTrainedConfig, num_experts: int, top_k: int) -> dict[str, Any]:
    layers, rope = config.num_hidden_layers, config.rope_parameters
    rotated = [bool(uses) for uses in config.no_rope_layers[:layers]]
    return _granitemoe(config, num_experts, top_k) | {
        # The class must have a window in a layer: one that is as long as the context.
        "layer_types": ["full_attention"] * (layers - 1) + ["sliding_attention"],
        "sliding_window": config.max_position_embeddings,
        # 0: no RoPE. Other programs read the second.
        "layer_rope_theta": [rope["rope_theta"] if uses else 0 for uses in rotated],
        "no_rope_layers": [int(uses) for uses in rotated],
        "shared_intermediate_size": 0,
    }


def _flex_olmo(config: PreTrainedConfig, num_experts: int, top_k: int) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "head_dim": head_dim(config),
        "attention_bias": False,
        "attention_dropout": config.attention_dropout,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        # As in Qwen3-MoE.
        "norm_topk_prob": True,
    }


def has_attention_biases(config: PreTrainedConfig) -> bool:
    """Whether a config asks for biases in all four matrices of attention. Qwen2, which has three of
    them, and Mistral, which has none, do not read the setting."""
    asks = getattr(config, "attention_bias", False)
    return bool(asks) and config.model_type not in ("mistral", "qwen2")


_NO_FFN_BIASES = ("no stock MoE has FFN biases", lambda config: config.mlp_bias)
_SLIDING = "the target has no layers with a sliding window beside layers without one"

_PRE_NORM = Symmetries(
    gains={_NORMS[0]: _ATTENTION[:3], _NORMS[1]: (GATE, UP)},
    gain_offset=0.0,
    residual="orthogonal",
    phases="any",
)

_NORMS_AFTER = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

_NO_BIASES = ("attention biases are not in this table", has_attention_biases)
_OWN_HEADS = (
    "the heads of a GraniteMoe are of hidden_size / num_attention_heads, as most programs read it",
    _has_own_head_size,
)

_GRANITE_FACTORS = Factors(
    embeddings="embedding_multiplier",
    residual="residual_multiplier",
    attention="attention_multiplier",
    logits="logits_scaling",
)

_GRANITEMOE: dict[str, Any] = {
    "moe": "granitemoe",
    "moe_class": "GraniteMoeForCausalLM",
    "router": "block_sparse_moe.router.layer.weight",
    "expert": {
        GATE: "block_sparse_moe.input_linear.weight",
        UP: "block_sparse_moe.input_linear.weight",
        DOWN: "block_sparse_moe.output_linear.weight",
    },
    "router_outputs": (BY_TOKEN, ("experts", "weights", "logits"), BY_EXPERT),
    "target_settings": _granitemoe,
    "expert_width": "intermediate_size",
}
"""What GraniteMoe is, whichever family is in it."""

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
                ("Mixtral has no attention biases", has_attention_biases),
                _NO_FFN_BIASES,
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
            refusals=((_SLIDING, _has_window),),
            vectors=_BIASES[:3],
            interleaved_rotary=True,
            has_head_bias=True,
            expert_width="moe_intermediate_size",
            router_outputs=(BY_TOKEN, ("logits", "experts", "weights")),
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
                (_SLIDING, _has_window),
                ("attention biases are not in this family's table", has_attention_biases),
            ),
            vectors=_HEAD_NORMS,
            head_norms="per head",
            expert_width="moe_intermediate_size",
            dense_ffn=_DENSE_FFN,
        ),
        Family(
            dense="granite",
            symmetries=_PRE_NORM,
            refusals=(_NO_BIASES, _NO_FFN_BIASES, _OWN_HEADS),
            factors=_GRANITE_FACTORS,
            **_GRANITEMOE,
        ),
        Family(
            dense="smollm3",
            moe="granitemoe_swa",
            moe_class="GraniteMoeSWAForCausalLM",
            router="block_sparse_moe.router.weight",
            expert={
                GATE: "block_sparse_moe.experts.gate_up_proj",
                UP: "block_sparse_moe.experts.gate_up_proj",
                DOWN: "block_sparse_moe.experts.down_proj",
            },
            target_settings=_granitemoe_swa,
            symmetries=_PRE_NORM,
            refusals=(
                (_SLIDING, _has_window),
                _NO_BIASES,
                _NO_FFN_BIASES,
            ),
            # One more place that attention may look at, which it never does.
            constants={"self_attn.sinks": ("heads", _NEVER)},
        ),
        Family(
            dense="olmo2",
            moe="flex_olmo",
            moe_class="FlexOlmoForCausalLM",
            router="mlp.gate.weight",
            expert=_QWEN_EXPERTS,
            target_settings=_flex_olmo,
            # Gains after a sublayer fold into nothing.
            symmetries=Symmetries({}, 0.0, "signed-permutation", "half-turns"),
            refusals=(_NO_BIASES,),
            vectors=_HEAD_NORMS,
            norms_before=None,
            norms_after=_NORMS_AFTER,
            head_norms="whole",
        ),
    )
}


@dataclass(frozen=True)
class TurnedPart:
    """Heads of which RoPE turns the first numbers alone, where the class that holds them turns all
    of each: by an angle of zero, what is not to be turned."""

    head: int
    """Numbers in a head."""
    turned: int
    """Those of them that are turned: pair j is (j, j + turned / 2)."""
    factor: float
    """What the class multiplies all of a head by, and the family what is turned alone (longrope's
    factor of attention)."""


@dataclass(frozen=True)
class Alias:
    """A family that is another one of the table under other names, with some matrices fused. Its
    checkpoints are read as that one's, and from there on they are that one's."""

    dense: str
    """Its `model_type`."""
    read_as: str
    """That of the family in the table."""
    fused: Mapping[str, tuple[str, ...]]
    """Matrix in its files -> those of the other family that lie below one another in it."""
    settings: Callable[[PreTrainedConfig], dict[str, Any]]
    """What the other family's config says."""
    refusals: tuple[tuple[str, _Test], ...] = ()
    """As of a `Family`."""
    turned: Callable[[PreTrainedConfig], TurnedPart | None] | None = None
    """What RoPE turns of its heads, by its own config (None: all of each), where that may be a
    part."""


_STANDS_STILL = 1e30
"""What divides the frequency of a pair that is not turned: an angle of 0 in float32, at every
position."""


def _turned_numbers(config: PreTrainedConfig) -> int:
    """Numbers of a head that RoPE turns."""
    return int(head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _longrope(config: PreTrainedConfig) -> dict[str, Any]:
    """RoPE of a Phi-3 as transformers' longrope (arXiv 2402.13753): `short_factor` divides the
    frequencies up to `original_max_position_embeddings`, `long_factor` beyond. Plain RoPE has
    factors of 1."""
    rope = {k: v for k, v in config.rope_parameters.items() if k != "partial_rotary_factor"}
    if rope["rope_type"] == "longrope":
        return rope | {"original_max_position_embeddings": config.original_max_position_embeddings}
    ones = [1.0] * (_turned_numbers(config) // 2)
    return rope | {
        "rope_type": "longrope",
        "short_factor": ones,
        "long_factor": ones,
        "factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def _longrope_attention(config: PreTrainedConfig) -> float:
    """What longrope multiplies what it turns by, as transformers computes it."""
    rope = _longrope(config)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    stretched = rope.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0


def _over_whole_heads(config: PreTrainedConfig) -> dict[str, Any]:
    """Longrope that turns the first pairs of whole heads as `_longrope` turns those of their first
    part, and the others not at all.

    The class divides 1 by factor * base^(2 j / head), and the family by factor * base^(2 j /
    turned). With a base of 1 the factor is all of it: the one product, in float32 as the family has
    it, so that every angle is the same number.
    """
    rope, turned = _longrope(config), _turned_numbers(config)
    periods = rope["rope_theta"] ** (torch.arange(0, turned, 2).float() / turned)
    still = [_STANDS_STILL] * ((head_dim(config) - turned) // 2)
    whole = {
        name: [*(torch.tensor(rope[name]) * periods).tolist(), *still]
        for name in ("short_factor", "long_factor")
    }
    return {**rope, **whole, "rope_theta": 1.0, "attention_factor": _longrope_attention(config)}


def _phi3_turned(config: PreTrainedConfig) -> TurnedPart | None:
    size, turned = head_dim(config), _turned_numbers(config)
    return None if turned == size else TurnedPart(size, turned, _longrope_attention(config))


def _phi3(config: PreTrainedConfig) -> dict[str, Any]:
    if _phi3_turned(config) is not None:
        rope = _over_whole_heads(config)
    elif config.rope_parameters["rope_type"] == "longrope":
        rope = _longrope(config)
    else:
        rope = {k: v for k, v in config.rope_parameters.items() if k != "partial_rotary_factor"}
    same = (*_SAME_IN_EVERY_TARGET, "intermediate_size", "attention_dropout", "sliding_window")
    settings = {name: getattr(config, name) for name in same}
    return settings | {"head_dim": head_dim(config), "rope_parameters": rope}


ALIASES = {
    alias.dense: alias
    for alias in (
        Alias(
            dense="phi3",
            read_as="mistral",
            fused={
                "self_attn.qkv_proj.weight": (Q_PROJ, K_PROJ, V_PROJ),
                "mlp.gate_up_proj.weight": (GATE, UP),
            },
            settings=_phi3,
            refusals=(
                (
                    "RoPE should turn an even count of the numbers in a head, at most all of them "
                    "(partial_rotary_factor)",
                    lambda config: _turned_numbers(config) not in range(2, head_dim(config) + 1, 2),
                ),
            ),
            turned=_phi3_turned,
        ),
    )
}
"""`model_type` -> how it is read."""

_SIDE_BY_SIDE = (
    "its attention and FFN read the stream side by side, as cohere2_moe's do; every method here "
    "takes them one after the other"
)

HELD_BY_NONE = {
    "cohere": _SIDE_BY_SIDE,
    "cohere2": _SIDE_BY_SIDE,
    "gemma2": "no MoE class of transformers caps the logits of attention, as Gemma 2 does",
    "gemma3_text": "Beam, the one MoE class of transformers with its four norms and windows, "
    "scales the residual stream by depth and gates attention; neither vLLM nor llama.cpp loads it",
    "gemma3": "it reads images, and no MoE class of transformers holds Gemma 3 exactly",
    "stablelm": "PhiMoE, the one MoE class of transformers with LayerNorms as it has, turns all of "
    "each head, and its gates do not add up to one",
}
"""`model_type` -> why no row holds it, of families that are asked for."""

FACTORS = tuple(dict.fromkeys(name for row in FAMILIES.values() for name in row.factors.fields))
"""Every config field that a family multiplies by."""


def _with_attention_experts(family: Family, lacks: str, refuses: _Test) -> Family:
    """The family in JetMoE, the stock class with attention experts. `lacks`: what that class cannot
    hold; `refuses`: whether a config has it."""
    reason = f"experts.attention source: JetMoE has no {lacks}; set it to shared"
    return replace(
        family,
        moe="jetmoe",
        moe_class="JetMoeForCausalLM",
        router="mlp.router.layer.weight",
        attention_router="self_attention.experts.router.layer.weight",
        expert={
            GATE: "mlp.input_linear.weight",
            UP: "mlp.input_linear.weight",
            DOWN: "mlp.output_linear.weight",
            Q_PROJ: "self_attention.experts.input_linear.weight",
            O_PROJ: "self_attention.experts.output_linear.weight",
        },
        attention=(K_PROJ, V_PROJ),
        renamed=dict.fromkeys((K_PROJ, V_PROJ), "self_attention.kv_proj.weight"),
        repeats_kv=True,
        zeros={"mlp.bias": "hidden", "self_attention.experts.bias": "hidden"},
        constants={},
        norm_eps=_JETMOE_EPS,
        router_outputs=(BY_EXPERT,),
        has_head_bias=False,
        target_settings=_jetmoe,
        refusals=(*family.refusals, (reason, refuses)),
    )


def _in_granite(
    family: Family,
    refusals: tuple[tuple[str, _Test], ...],
    zeros: Mapping[str, str] | None = None,
) -> Family:
    """The family in GraniteMoe. `refusals`: variants of the family that it cannot hold. Heads of
    another size than usual are refused in every family."""
    return replace(
        family,
        interleaved_rotary=False,
        has_head_bias=False,
        refusals=(*refusals, _OWN_HEADS),
        zeros=zeros or {},
        **_GRANITEMOE,
    )


def _with_biases(family: Family) -> Family:
    """A row of GraniteMoe for models with biases in all four matrices of attention."""
    refusals = tuple(refusal for refusal in family.refusals if refusal != _NO_BIASES)
    return replace(family, vectors=_BIASES, refusals=refusals)


def _in_qwen2_moe(family: Family, refusals: tuple[tuple[str, _Test], ...] = ()) -> Family:
    """The family in Qwen2-MoE. `refusals`: variants of the family that it cannot hold."""
    lacking = {name: axis for name, axis in _QKV_BIASES.items() if name not in family.vectors}
    return replace(
        family,
        moe="qwen2_moe",
        moe_class="Qwen2MoeForCausalLM",
        router="mlp.gate.weight",
        expert=_QWEN_EXPERTS,
        target_settings=_qwen2_moe,
        refusals=refusals,
        interleaved_rotary=False,
        has_head_bias=False,
        router_outputs=(BY_TOKEN,),
        # An expert that every token goes to, and that puts out nothing.
        zeros=lacking
        | {
            "mlp.shared_expert.gate_proj.weight": "1 hidden",
            "mlp.shared_expert.up_proj.weight": "1 hidden",
            "mlp.shared_expert.down_proj.weight": "hidden 1",
            "mlp.shared_expert_gate.weight": "1 hidden",
        },
        shared_expert={
            GATE: "mlp.shared_expert.gate_proj.weight",
            UP: "mlp.shared_expert.up_proj.weight",
            DOWN: "mlp.shared_expert.down_proj.weight",
            SHARED_GATE: "mlp.shared_expert_gate.weight",
        },
        expert_width="moe_intermediate_size",
        dense_ffn=_DENSE_FFN,
    )


def _always(config: PreTrainedConfig) -> bool:
    """A test for what every model of a family has."""
    return True


_LLAMA_IN_GRANITE = _in_granite(FAMILIES["llama"], (_NO_BIASES, _NO_FFN_BIASES))
_NO_WINDOW = ("GraniteMoe has no sliding window; use mixtral", _has_window)

TARGETS: dict[str, dict[str, tuple[Family, ...]]] = {
    "shared": {
        "llama": (
            FAMILIES["llama"],
            _LLAMA_IN_GRANITE,
            _with_biases(_LLAMA_IN_GRANITE),
            _in_qwen2_moe(FAMILIES["llama"], (_NO_BIASES, _NO_FFN_BIASES)),
        ),
        "mistral": (FAMILIES["mistral"], _in_granite(FAMILIES["mistral"], (_NO_WINDOW,))),
        "qwen2": (
            FAMILIES["qwen2"],
            _in_granite(
                FAMILIES["qwen2"],
                FAMILIES["qwen2"].refusals,
                zeros={"self_attn.o_proj.bias": "hidden"},
            ),
            _in_qwen2_moe(FAMILIES["qwen2"]),
        ),
        "qwen3": (FAMILIES["qwen3"],),
        "olmo2": (FAMILIES["olmo2"],),
        "smollm3": (FAMILIES["smollm3"],),
        "granite": (FAMILIES["granite"], _with_biases(FAMILIES["granite"])),
    },
    "source": {
        dense: (_with_attention_experts(FAMILIES[dense], lacks, refuses),)
        for dense, lacks, refuses in (
            ("llama", "attention biases", has_attention_biases),
            ("mistral", "sliding window", _has_window),
            ("qwen2", "attention biases", _always),
            ("qwen3", "norms of queries and keys", _always),
            ("granite", "factors of Granite's", _always),
            ("olmo2", "norms after attention and FFN", _always),
            ("smollm3", "layers without RoPE", _always),
        )
    },
}
"""`experts.attention` -> `model_type` of the sources -> the architectures that hold them, of which
`output.architecture: auto` takes the first that holds the variant at hand. BAM's attention experts
have a stock class for some variants of some families."""


def router_outputs_of(moe: str) -> tuple[tuple[str, ...], ...]:
    """`Family.router_outputs` of the targets of a `model_type`."""
    rows = (family for held in TARGETS.values() for row in held.values() for family in row)
    return next(family.router_outputs for family in rows if family.moe == moe)


def _able(rows: list[Family], dense: str, part: str, setting: str, what: str) -> list[Family]:
    """Those of some rows for a `model_type` that have a part. Raises RecipeError where there is
    none, with the `setting` that asks for it."""
    found = [row for row in rows if getattr(row, part) is not None]
    if found:
        return found
    able = [row.moe for row in TARGETS["shared"][dense] if getattr(row, part) is not None]
    asked = " and ".join(dict.fromkeys(row.moe for row in rows))
    instead = f"set output.architecture to {able[0]}, or leave" if able else "leave"
    has = "has" if " and " not in asked else "have"
    raise RecipeError(
        f"{setting}: {asked} would hold {dense}, and {has} no {what}; {instead} this setting out"
    )


class Target(NamedTuple):
    """What a recipe says of the architecture of its output."""

    attention: str = "shared"
    """`experts.attention`."""
    architecture: str = "auto"
    """`output.architecture`."""
    dense_layers: tuple[int, ...] = ()
    """`experts.dense_layers`."""
    slices: int = 1
    """`experts.per_source`."""
    shared_expert: bool = False
    """Whether `experts.shared_weight` is more than 0."""

    def rows(self, dense: str) -> list[Family]:
        """The rows for sources of a `model_type`, the preferred one first. Raises RecipeError where
        there is none."""
        held = TARGETS[self.attention][dense]
        found = [f for f in held if self.architecture in ("auto", f.moe)]
        if not found:
            others = " and ".join(dict.fromkeys(family.moe for family in held))
            raise RecipeError(
                f"output.architecture: {shortened(repr(self.architecture), 60)} does not hold "
                f"{dense} with experts.attention {self.attention} exactly; expected {others} (or "
                "auto, the first of them)"
            )
        if self.dense_layers:
            found = _able(
                found, dense, "dense_ffn", "experts.dense_layers", "layers without experts"
            )
        if self.shared_expert:
            found = _able(found, dense, "shared_expert", "experts.shared_weight", "shared expert")
        return [self._laid_out(row) for row in found]

    def _laid_out(self, row: Family) -> Family:
        """A row with what a recipe says of its layers."""
        zeros = row.zeros
        if self.shared_expert and row.shared_expert is not None:
            real = row.shared_expert.values()
            zeros = {name: axes for name, axes in zeros.items() if name not in real}
        return replace(
            row,
            zeros=zeros,
            dense_layers=self.dense_layers,
            slices=self.slices,
            has_shared_expert=self.shared_expert,
        )

    def family(self, config: PreTrainedConfig) -> Family:
        """The row for a source: the first that holds it. Where none does, the first of all, which
        says why. Raises RecipeError where there is none for its `model_type`."""
        rows = self.rows(config.model_type)
        return next((row for row in rows if row.refusal(config) is None), rows[0])


AUTO = Target()


def head_dim(config: PreTrainedConfig) -> int:
    """Size of an attention head, spelled out in the config or implied by it."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def usual_shapes(family: Family, config: PreTrainedConfig) -> dict[str, tuple[int, ...]] | None:
    """Name within a layer -> shape, where nothing about the config is out of the ordinary; None
    where the family's own module has to be asked, which takes seconds to import."""
    sizes = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.num_hidden_layers,
        getattr(config, "head_dim", None) or 2,
    )
    rope = config.rope_parameters
    kinds = getattr(config, "layer_types", None)
    if (
        not all(type(size) is int and size > 0 for size in sizes)
        or config.num_attention_heads % config.num_key_value_heads
        or head_dim(config) % 2
        or config.hidden_act != "silu"
        or getattr(config, "attention_bias", None)
        or getattr(config, "mlp_bias", None)
        or not (isinstance(rope, dict) and rope.get("rope_type") == "default")
        or not isinstance(rope.get("rope_theta"), int | float)
        or (kinds and len(kinds) != config.num_hidden_layers)
    ):
        return None
    hidden, ffn, size = config.hidden_size, config.intermediate_size, head_dim(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(family.norms, (hidden,))
    shapes |= {Q_PROJ: (queries, hidden), K_PROJ: (keys, hidden), V_PROJ: (keys, hidden)}
    shapes |= {O_PROJ: (hidden, queries), GATE: (ffn, hidden), UP: (ffn, hidden)}
    shapes |= {DOWN: (hidden, ffn)}
    for name in family.vectors:  # biases are as long as their matrix, norms of q and k as a head
        matrix = name.replace("bias", "weight").replace("_norm", "_proj")
        whole = name.endswith("bias") or family.head_norms == "whole"
        shapes[name] = shapes[matrix][:1] if whole else (size,)
    return shapes


def factor(config: PreTrainedConfig, part: Literal["embeddings", "residual", "logits"]) -> float:
    """A dense model's factor (see `Factors`); 1 where its family has none."""
    name = getattr(FAMILIES[config.model_type].factors, part)
    return 1.0 if name is None else float(getattr(config, name))


def with_more_heads(config: PreTrainedConfig, times: int) -> PreTrainedConfig:
    """A dense config with so many times as many attention heads, of the same size."""
    changed = copy.deepcopy(config)
    changed.head_dim = head_dim(config)
    changed.num_attention_heads = times * config.num_attention_heads
    changed.num_key_value_heads = times * config.num_key_value_heads
    return changed


def queries_per_kv(config: PreTrainedConfig) -> int:
    """Query heads that share a KV head."""
    return int(config.num_attention_heads // config.num_key_value_heads)


def target_config(
    family: Family, dense: PreTrainedConfig, num_experts: int, top_k: int, *, tied: bool, dtype: str
) -> dict[str, Any]:
    """The output's config.json, without its transformers version.

    Both `rope_parameters` and the older `rope_theta` / `rope_scaling` are written: transformers 4
    and other readers know only the older ones.
    """
    settings = {name: getattr(dense, name, None) for name in _SAME_IN_EVERY_TARGET}
    sliced = family.slices
    settings |= family.target_settings(dense, num_experts * sliced, top_k * sliced)
    if sliced > 1:
        settings[family.expert_width] = dense.intermediate_size // sliced
    if family.has_shared_expert:
        settings["shared_expert_intermediate_size"] = dense.intermediate_size
    if family.dense_layers:
        settings["mlp_only_layers"] = list(family.dense_layers)
    settings |= {name: getattr(dense, name) for name in family.factors.fields}
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
    if rope.get("rope_type") == "longrope":
        # transformers 4 looks for it here alone, and else never leaves the short factors.
        settings["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return settings


def stream_scale(family: Family, config: PreTrainedConfig) -> float:
    """What everything that writes the residual stream is multiplied by in the output, 1 for most
    targets.

    A norm with epsilon e gives the same as one with epsilon c^2 e whose input is c times as large:
    so a target whose epsilon is fixed holds models with another one exactly.
    """
    return 1.0 if family.norm_eps is None else math.sqrt(family.norm_eps / config.rms_norm_eps)


def moe_config(family: Family, config: PreTrainedConfig) -> PreTrainedConfig:
    """The dense config by which a `MoELayer` of the output runs."""
    if family.norm_eps is None:
        return config
    changed = copy.deepcopy(config)
    changed.rms_norm_eps = family.norm_eps
    return changed
