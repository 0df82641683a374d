"""Which programs read a finished model, and which of them compute something else.

`make test-clients` asks each program about a model of every row of docs/engines.md, and fails where
it does something else than is said here. What no such model had is "not tried".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TRIED = {
    "transformers 5": "5.0.0, 5.23.0 and 5.24.0",
    "transformers 4.57": "4.57.6",
    "vLLM": "0.32.0",
    "llama.cpp": "b11434",
    "MLX": "0.32.4 with mlx-lm 0.32.2",
}
"""Program -> the versions that were asked."""

DENSE_LAYERS = "with layers without experts"
SHARED_EXPERT = "with a shared expert"
SLICES = "with several experts of a source"
"""What a recipe may ask of the layers (`experts.*`)."""

Verdict = Literal["exact", "other", "refused", "untried"]
"""`exact`: the same tokens. `other`: it loads the model, says nothing, and answers otherwise.
`refused`: it does not load the model. `untried`: nobody has asked it."""


@dataclass(frozen=True)
class Reading:
    """What one program makes of a model."""

    program: str
    verdict: Verdict
    why: str = ""
    """In a few words; empty where there is nothing to say."""

    def __str__(self) -> str:
        words = {
            "exact": "the same answers",
            "other": "loads it, but gives WRONG ANSWERS",
            "refused": "does not load it",
            "untried": "not tried",
        }[self.verdict]
        return f"{self.program}: {words}" + (f" ({self.why})" if self.why else "")


def readings(
    config: Mapping[str, Any], *, sentencepiece: bool = False, dense: str = "", layout: str = ""
) -> list[Reading]:
    """What every program of `TRIED` makes of a model with this config, which is one of
    `families.target_config`. `sentencepiece`: its tokenizer is of that kind. `dense`: `model_type`
    of its sources. `layout`: DENSE_LAYERS, SHARED_EXPERT or SLICES; empty for none of them."""
    is_newer = config["model_type"] == "granitemoe_swa"
    found = [Reading("transformers 5", "exact", "from 5.15 on" if is_newer else "")]
    untried = _untried(config)
    unknown = untried or _unrecorded(config, dense, layout)
    for program in list(TRIED)[1:]:
        # Without what nobody tried: a program that does not even read that is said to be so.
        verdict, why = _judge(program, {**config, "rope_scaling": None} if untried else config)
        if unknown and verdict == "exact":
            verdict, why = "untried", unknown
        if program == "llama.cpp" and verdict == "exact":
            more = "if its converter knows the tokenizer"
            if sentencepiece:
                more = "it splits spaces that begin a text, or follow a special token, otherwise"
            why = f"{why}; {more}" if why else more
        found.append(Reading(program, verdict, why))
    return found


_LAYOUTS = {
    ("llama", "qwen2_moe", DENSE_LAYERS),
    ("llama", "qwen2_moe", SHARED_EXPERT),
    ("llama", "mixtral", SLICES),
}
"""Sources, architecture and layout of the models that were asked about."""


def _unrecorded(config: Mapping[str, Any], dense: str, layout: str) -> str:
    """The kind of model that no measurement is recorded of (`docs/engines.json`); empty where there
    is one. That a program refuses such a model, or answers otherwise, is known all the same."""
    kind = config["model_type"]
    if layout:
        return "" if (dense, kind, layout) in _LAYOUTS else layout
    if kind == "qwen2_moe" and not (dense == "qwen2" and config.get("use_sliding_window")):
        return f"as {kind} of {dense or 'such'} sources"
    if _rope_type(config) == "longrope" and _has_one_length(config):
        return "with plain RoPE on a part of each head"
    if kind == "ernie4_5_moe":
        size, heads = config["head_dim"], config["num_attention_heads"]
        if size * heads != config["hidden_size"]:
            return "with heads of another size than hidden_size / num_attention_heads"
    return ""


_TRIED_ROPE = {
    *(
        (architecture, "default")
        for architecture in (
            "mixtral",
            "granitemoe",
            "granitemoe_swa",
            "ernie4_5_moe",
            "qwen3_moe",
            "jetmoe",
            "flex_olmo",
            "qwen2_moe",
        )
    ),
    ("mixtral", "llama3"),
    ("mixtral", "longrope"),
    ("granitemoe", "llama3"),
}
"""Architecture and type of RoPE of the models that were asked about."""

_EXACT: tuple[Verdict, str] = ("exact", "")


def _untried(config: Mapping[str, Any]) -> str:
    """What the config has that no measured model had; empty for nothing."""
    kind = _rope_type(config)
    if (config["model_type"], kind) not in _TRIED_ROPE:
        return f"with RoPE of the type {kind}"
    activation = config.get("hidden_act") or config.get("activation_function") or "silu"
    return "" if activation == "silu" else f"with the activation {activation}"


def _has_one_length(config: Mapping[str, Any]) -> bool:
    """Whether a longrope turns short and long texts alike: it stands for plain RoPE on a part of
    each head."""
    rope = config.get("rope_scaling") or {}
    return bool(rope.get("short_factor") == rope.get("long_factor"))


def _rope_type(config: Mapping[str, Any]) -> str:
    return str((config.get("rope_scaling") or {}).get("rope_type", "default"))


_BY_ARCHITECTURE: dict[tuple[str, str], tuple[Verdict, str]] = {
    ("transformers 4.57", "ernie4_5_moe"): (
        "exact",
        "it warns of missing biases in the experts, and takes zeros",
    ),
    ("vLLM", "flex_olmo"): ("exact", "by its Transformers backend"),
    ("llama.cpp", "flex_olmo"): ("refused", "it has no FlexOlmo"),
    ("vLLM", "jetmoe"): ("other", "its JetMoE is another model"),
    ("llama.cpp", "jetmoe"): ("refused", "it has no JetMoE"),
    ("llama.cpp", "ernie4_5_moe"): (
        "refused",
        "its converter wants a tokenizer.model; use output.architecture: granitemoe",
    ),
    ("transformers 4.57", "granitemoe_swa"): ("refused", "it has no GraniteMoeSWA"),
    ("MLX", "jetmoe"): ("refused", "it has no JetMoE"),
    ("MLX", "flex_olmo"): ("refused", "it has no FlexOlmo"),
    ("MLX", "granitemoe_swa"): ("refused", "it has no GraniteMoeSWA"),
    ("MLX", "ernie4_5_moe"): (
        "refused",
        "its Ernie has other biases; use output.architecture: granitemoe",
    ),
}
"""What the settings of a model do not change."""


def _transformers_4(config: Mapping[str, Any]) -> tuple[Verdict, str]:
    if config["model_type"] == "qwen2_moe" and config.get("use_sliding_window"):
        return "other", "its Qwen2-MoE has the window in all layers"
    return _EXACT


def _vllm(config: Mapping[str, Any]) -> tuple[Verdict, str]:
    if config["model_type"] == "qwen2_moe" and config.get("use_sliding_window"):
        return "other", "its Qwen2-MoE has no windows"
    if config["model_type"] == "granitemoe" and config["attention_bias"]:
        return "other", "its GraniteMoe leaves the biases out; --model-impl transformers has them"
    if _rope_type(config) == "longrope" and not _has_one_length(config):
        return "other", "it reads short texts with the factors of RoPE for long ones"
    return _EXACT


def _llama_cpp(config: Mapping[str, Any]) -> tuple[Verdict, str]:
    if config["model_type"] == "qwen2_moe":
        if config.get("mlp_only_layers"):
            return "refused", "its converter wants experts in every layer of a Qwen2-MoE"
        why = "the gates of its Qwen2-MoE do not add up to one, and its server may stop"
        return "other", why
    if _rope_type(config) == "longrope":
        return "other", "its Mixtral does not know this RoPE (longrope)"
    if config["model_type"] == "granitemoe" and config.get("rope_scaling"):
        return "refused", "its GraniteMoe does not scale RoPE; use output.architecture: auto"
    return _beyond_window(config)


def _mlx(config: Mapping[str, Any]) -> tuple[Verdict, str]:
    if config["model_type"] == "qwen2_moe":
        if config.get("mlp_only_layers"):
            return "refused", "its Qwen2-MoE has experts in every layer"
        if config.get("tie_word_embeddings"):
            return "refused", "its Qwen2-MoE wants a head of its own"
        return "other", "the gates of its Qwen2-MoE do not add up to one"
    if config["model_type"] != "mixtral":
        return _EXACT
    implied = config["hidden_size"] // config["num_attention_heads"]
    if config["head_dim"] != implied:
        return "refused", (
            f"it takes heads of {implied}, hidden_size / num_attention_heads; this model has "
            f"heads of {config['head_dim']}"
        )
    if _rope_type(config) == "longrope":
        return "other", "its Mixtral does not know this RoPE (longrope)"
    if config.get("rope_scaling"):
        return "other", "its Mixtral does not scale RoPE; use output.architecture: granitemoe"
    return _beyond_window(config)


_BY_SETTINGS = {
    "transformers 4.57": _transformers_4,
    "vLLM": _vllm,
    "llama.cpp": _llama_cpp,
    "MLX": _mlx,
}


def _judge(program: str, config: Mapping[str, Any]) -> tuple[Verdict, str]:
    """Of a model like those that were asked about."""
    found = _BY_ARCHITECTURE.get((program, config["model_type"]))
    if found is not None or program not in _BY_SETTINGS:
        return found or _EXACT
    return _BY_SETTINGS[program](config)


def _beyond_window(config: Mapping[str, Any]) -> tuple[Verdict, str]:
    """Of a program whose Mixtral has no window."""
    window = config.get("sliding_window")
    if window is None or window >= config["max_position_embeddings"]:
        return _EXACT
    return "other", f"its Mixtral sees beyond the window of {window} tokens"
