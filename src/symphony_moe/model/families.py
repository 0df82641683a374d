"""Model families as tables: what each tensor of a dense model is, and which stock
Mixture-of-Experts architecture of `transformers` holds the family exactly.

A new family is a new row in `FAMILIES` (and a test run over all rows picks it up); `TARGETS` has
the rows for every kind of attention. Tensor names are relative to `model.layers.{layer}.`. What
each row must get right was measured: docs/design.md, "Output formats".
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedConfig

from symphony_moe.errors import RecipeError, shortened

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

HEAD_BIAS = "lm_head.bias"
"""A tensor of zeros. Without it transformers reports a missing tensor (and fills in zeros); with it
llama.cpp's converter and MLX refuse the checkpoint. `output.head_bias` decides."""

GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"

NEURON_AXIS = {GATE: 0, UP: 0, DOWN: 1}
"""The axis of each FFN matrix (stored out x in) that counts hidden neurons."""

_ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")
Q_PROJ, K_PROJ, V_PROJ, O_PROJ = _ATTENTION
ROTARY = ("self_attn.q_proj", "self_attn.k_proj")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_JETMOE_EPS = 1e-6

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
    """Rotations of a RoPE pair, the same for a group's q and k. `half-turns`: q and k are normed
    per head, so 0 and pi alone, unless the pair has equal gains, in q_norm and in k_norm."""


_Test = Callable[[PreTrainedConfig], Any]
"""A question about a dense config; what is true of the answer counts."""


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
    norms: tuple[str, ...] = _NORMS
    """Norm gains, fused by `backbone.norms`."""
    interleaved_rotary: bool = False
    """The target rotates neighbouring rows of q and k, where the dense family rotates row j with
    row j + head_dim / 2."""
    zeros: Mapping[str, str] = field(default_factory=dict)
    """Tensors that the target has and the family lacks, written as zeros: name -> axes, as words of
    `hidden` and `experts` (or numbers). Engines leave them out, so they stay zeros: nothing trains
    them."""
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

    @property
    def shared(self) -> tuple[str, ...]:
        """Every tensor of a layer that all experts share."""
        return self.norms + self.attention + self.vectors

    def is_zero(self, tensor: str) -> bool:
        """Whether a tensor of the target, by its name in the output or in the loaded model, is one
        that the family lacks. (Transformers puts some of them elsewhere in a model than in its
        file: the end of the name stays.)"""
        named = {*self.zeros, *([HEAD_BIAS] if self.has_head_bias else [])}
        return tensor.split(".")[-2:] in [name.split(".")[-2:] for name in named]

    @property
    def stacks_experts(self) -> bool:
        """Whether one tensor of the output holds a matrix of all experts."""
        return not any("{expert}" in name for name in self.expert.values())


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
        "attention_bias": config.model_type == "qwen2",
        "attention_dropout": config.attention_dropout,
        # Four factors of Granite's own, at what they are in every other family.
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


_NO_FFN_BIASES = ("no stock MoE has FFN biases", lambda config: config.mlp_bias)
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
            vectors=tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
            interleaved_rotary=True,
            has_head_bias=True,
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
                ("attention biases are not in this family's table", lambda c: c.attention_bias),
            ),
            vectors=("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        ),
    )
}


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
    heads = (
        "the heads of a GraniteMoe are of hidden_size / num_attention_heads, as most programs read "
        "it"
    )
    return replace(
        family,
        moe="granitemoe",
        moe_class="GraniteMoeForCausalLM",
        router="block_sparse_moe.router.layer.weight",
        expert={
            GATE: "block_sparse_moe.input_linear.weight",
            UP: "block_sparse_moe.input_linear.weight",
            DOWN: "block_sparse_moe.output_linear.weight",
        },
        interleaved_rotary=False,
        has_head_bias=False,
        router_outputs=(BY_TOKEN, ("experts", "weights", "logits"), BY_EXPERT),
        target_settings=_granitemoe,
        refusals=(*refusals, (heads, _has_own_head_size)),
        zeros=zeros or {},
    )


def _always(config: PreTrainedConfig) -> bool:
    """A test for what every model of a family has."""
    return True


_ATTENTION_BIASES = ("attention biases are not in this table", lambda c: c.attention_bias)
_NO_WINDOW = ("GraniteMoe has no sliding window; use mixtral", _has_window)

TARGETS: dict[str, dict[str, tuple[Family, ...]]] = {
    "shared": {
        "llama": (
            FAMILIES["llama"],
            _in_granite(FAMILIES["llama"], (_ATTENTION_BIASES, _NO_FFN_BIASES)),
        ),
        "mistral": (FAMILIES["mistral"], _in_granite(FAMILIES["mistral"], (_NO_WINDOW,))),
        "qwen2": (
            FAMILIES["qwen2"],
            _in_granite(
                FAMILIES["qwen2"],
                FAMILIES["qwen2"].refusals,
                zeros={"self_attn.o_proj.bias": "hidden"},
            ),
        ),
        "qwen3": (FAMILIES["qwen3"],),
    },
    "source": {
        dense: (_with_attention_experts(FAMILIES[dense], lacks, refuses),)
        for dense, lacks, refuses in (
            ("llama", "attention biases", lambda config: config.attention_bias),
            ("mistral", "sliding window", _has_window),
            ("qwen2", "attention biases", _always),
            ("qwen3", "norms of queries and keys", _always),
        )
    },
}
"""`experts.attention` -> `model_type` of the sources -> the architectures that hold them, of which
`output.architecture: auto` takes the first. BAM's attention experts have a stock class for some
variants of some families."""


def router_outputs_of(moe: str) -> tuple[tuple[str, ...], ...]:
    """`Family.router_outputs` of the targets of a `model_type`."""
    rows = (family for held in TARGETS.values() for row in held.values() for family in row)
    return next(family.router_outputs for family in rows if family.moe == moe)


class Target(NamedTuple):
    """What a recipe says of the architecture of its output."""

    attention: str = "shared"
    """`experts.attention`."""
    architecture: str = "auto"
    """`output.architecture`."""

    def family(self, dense: str) -> Family:
        """The row for sources of a `model_type`. Raises RecipeError where there is none."""
        held = TARGETS[self.attention][dense]
        found = [f for f in held if self.architecture in ("auto", f.moe)]
        if not found:
            others = " and ".join(family.moe for family in held)
            raise RecipeError(
                f"output.architecture: {shortened(repr(self.architecture), 60)} does not hold "
                f"{dense} with experts.attention {self.attention} exactly; expected {others} (or "
                "auto, the first of them)"
            )
        return found[0]


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
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_NORMS, (hidden,))
    shapes |= {Q_PROJ: (queries, hidden), K_PROJ: (keys, hidden), V_PROJ: (keys, hidden)}
    shapes |= {O_PROJ: (hidden, queries), GATE: (ffn, hidden), UP: (ffn, hidden)}
    shapes |= {DOWN: (hidden, ffn)}
    for name in family.vectors:  # biases are as long as their matrix, norms of q and k as a head
        matrix = name.replace("bias", "weight")
        shapes[name] = shapes[matrix][:1] if matrix in shapes else (size,)
    return shapes


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
