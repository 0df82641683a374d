"""How sources differ: in config, tokenizer and vocabulary, and what becomes of each difference."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from symphony_moe.errors import SourceMismatch
from symphony_moe.files import from_json
from symphony_moe.model.families import FACTORS, attention_window, head_dim
from symphony_moe.model.layer import activation_of, rotations
from symphony_moe.sources.same_tokenizer import other_settings
from symphony_moe.sources.source import CODE, SPECIAL, Source, read_generation, some
from symphony_moe.sources.source_tokenizer import are_comparable
from symphony_moe.sources.tokenizer_checks import flags_of, found_otherwise
from symphony_moe.sources.vocabulary import Vocabulary

Verdict = Literal["error", "warning", "fine"]
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Difference:
    """One way in which sources differ, who has what, and what it means for the build."""

    what: str
    values: Mapping[str, str]
    """Source name -> its value, in words."""
    verdict: Verdict
    consequence: str

    def __str__(self) -> str:
        by_value: dict[str, list[str]] = defaultdict(list)
        for name, value in self.values.items():
            by_value[value].append(name)
        who = "; ".join(f"{', '.join(names)}: {value}" for value, names in by_value.items())
        return f"{self.what} ({who}): {self.consequence}"


_EXPERTS_ALIKE = "experts of one model must have the same shapes; use checkpoints of one size"
_WIDENED = (
    "experts of one model must have the same shapes; backbone.shapes: widest pads the smaller ones "
    "to the largest, where head_dim is one"
)
_ONE_HEAD_SIZE = (
    "RoPE turns each pair of a head at a frequency that depends on the head's size, so no padding "
    "computes the same; use checkpoints with one head_dim"
)
_ONE_FACTOR = "the result has one for all experts; use checkpoints that share it"
_ANCHOR_WINS = "the anchor's is used for the whole model"

_CONFIG_RULES: tuple[tuple[str, Verdict, str], ...] = (
    ("model_type", "error", "sources must be of one family"),
    ("hidden_size", "error", _WIDENED),
    (
        "num_hidden_layers",
        "error",
        "a layer of the result has an FFN of every source's layer of that number, and the deeper "
        "model's last layers have no partner. backbone.shapes: widest adds layers that change "
        "nothing (where head_dim is one); or leave a source out",
    ),
    ("intermediate_size", "error", _EXPERTS_ALIKE),
    ("num_attention_heads", "error", _WIDENED),
    ("num_key_value_heads", "error", _WIDENED),
    ("head_dim", "error", _ONE_HEAD_SIZE),
    ("hidden_act", "error", "the MoE has one activation function for all experts"),
    ("rms_norm_eps", "warning", _ANCHOR_WINS),
    (
        "rope_parameters",
        "warning",
        _ANCHOR_WINS + "; the others' attention was trained under other positions and will suffer",
    ),
    (
        "no_rope_layers",
        "warning",
        _ANCHOR_WINS + "; the others' attention was trained with RoPE in other layers",
    ),
    ("sliding_window", "warning", _ANCHOR_WINS),
    (
        "layer_types",
        "warning",
        _ANCHOR_WINS + "; the others' attention was trained with windows in other layers",
    ),
    ("max_position_embeddings", "warning", _ANCHOR_WINS),
    *((name, "error", _ONE_FACTOR) for name in FACTORS),
)
"""(config field, verdict where sources differ, consequence)."""


_HEADS = ("num_attention_heads", "num_key_value_heads")

_PADDED = {
    "intermediate_size": "narrower FFNs are padded with neurons of zeros, which computes the same",
    "hidden_size": "narrower residual streams are padded with zeros, which computes the same",
    "num_hidden_layers": "layers that change nothing are added where a source has fewer",
    "num_attention_heads": "heads that put out nothing are added where a source has fewer",
    "num_key_value_heads": "KV heads are repeated, or added, where a source has fewer",
}
"""Config field -> what becomes of a source that has less of it."""


def _config_values(field: str, sources: Sequence[Source], anchor: str) -> dict[str, Any]:
    """Source name -> what its config says of a field; the anchor's words where they mean the
    same."""
    of_anchor = next(source.config for source in sources if source.name == anchor)
    read: Callable[[Any], Any] = _READ.get(field, lambda config: getattr(config, field, None))
    mean_the_same: Callable[[Any, Any], bool] = _SAME.get(field, lambda one, other: False)
    return {
        source.name: read(of_anchor if mean_the_same(source.config, of_anchor) else source.config)
        for source in sources
    }


def _rope_settings(config: PreTrainedConfig) -> Any:
    """Its parameters, and what else its frequencies depend on."""
    rope = config.rope_parameters
    depends = isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope", "yarn")
    return rope | {"context": config.max_position_embeddings} if depends else rope


def _is_one_activation(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether two names of activation functions are one function: silu and swish, gelu_new and
    gelu_pytorch_tanh, ..."""
    if one.hidden_act == other.hidden_act:
        return True
    inputs = torch.cat((torch.linspace(-10, 10, 2001), torch.linspace(-1e4, 1e4, 2001))).double()
    with torch.no_grad():
        first, second = (activation_of(c).double()(inputs) for c in (one, other))
    return torch.allclose(first, second, rtol=1e-9, atol=1e-9)


def _is_one_rope(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether two configs rotate alike (but for float32's rounding), at every length of text,
    however they spell it."""
    if _rope_settings(one) == _rope_settings(other) and head_dim(one) == head_dim(other):
        return True
    contexts = {config.max_position_embeddings for config in (one, other)}
    lengths = {2, *contexts, *(times * context for context in contexts for times in (2, 8))}
    return all(
        first.shape == second.shape
        and torch.allclose(first, second, rtol=3e-7, atol=0)
        and math.isclose(factor, other_factor, rel_tol=1e-6)
        for (first, factor), (second, other_factor) in zip(
            rotations(one, lengths), rotations(other, lengths), strict=True
        )
    )


def _layers_with_window(config: PreTrainedConfig) -> Any:
    """Which layers have a window: "all", or their numbers."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    layers = [number for number, kind in enumerate(kinds) if kind == "sliding_attention"]
    return "all" if len(layers) == len(kinds) else {"windows in layers": layers}


def _slide_alike(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether two configs have windows in the same layers; and where one has none at all, which
    `sliding_window` tells."""
    if attention_window(one) is None or attention_window(other) is None:
        return True
    return bool(_layers_with_window(one) == _layers_with_window(other))


_READ: dict[str, Callable[[PreTrainedConfig], Any]] = {
    "head_dim": head_dim,
    "layer_types": _layers_with_window,
    "rope_parameters": _rope_settings,
    "sliding_window": attention_window,
}
"""Config field -> what it amounts to, where that is not what it says."""

_SAME: dict[str, Callable[[PreTrainedConfig, PreTrainedConfig], bool]] = {
    "hidden_act": _is_one_activation,
    "layer_types": _slide_alike,
    "rope_parameters": _is_one_rope,
}
"""Config field -> whether two configs mean the same by it."""


def find_differences(
    sources: Sequence[Source], anchor: str, chat: str | None = None
) -> list[Difference]:
    """Every difference between the sources, from configs, headers and tokenizers. `chat`: the
    source whose chat conventions the result has, where that is not the anchor."""
    found: list[Difference] = []
    chat = chat or anchor

    def differ(what: str, values: Mapping[str, Any], verdict: Verdict, consequence: str) -> None:
        spelled = {name: _in_words(value) for name, value in values.items()}
        if len(set(spelled.values())) > 1:
            found.append(Difference(what, spelled, verdict, consequence))

    one_family = len({source.config.model_type for source in sources}) == 1
    for field, verdict, consequence in _CONFIG_RULES:
        if field in FACTORS and not one_family:
            continue  # that they are of several families is said
        differ(field, _config_values(field, sources, anchor), verdict, consequence)
    for field, (values, consequence) in _padded(sources).items():
        differ(field, values, "fine", consequence)
    if one_family:
        biases = {s.name: any(".bias" in name for name in s.family.vectors) for s in sources}
        differ("biases of attention", biases, "error", _EXPERTS_ALIKE)
        if len(set(biases.values())) == 1:
            differ(
                "architecture that holds it",
                {s.name: s.family.moe for s in sources},
                "error",
                "one must hold all sources; name it as output.architecture",
            )
    differ(
        "tie_word_embeddings",
        {s.name: s.config.tie_word_embeddings for s in sources},
        "warning",
        "the output's head is untied; a tied source lends its embeddings as its head",
    )
    for field in SPECIAL:
        theirs = _ANCHOR_WINS if field == "bos_token_id" else _of_chat(chat, anchor)
        differ(field, {s.name: _special_ids(s, field) for s in sources}, "warning", theirs)
    differ(
        "generation config",
        {s.name: _generation_settings(s) for s in sources},
        "warning",
        _of_chat(chat, anchor),
    )
    rows = max((s.vocabulary.size for s in sources if s.vocabulary), default=sources[0].own_rows)
    differ(
        "vocab_size",
        {s.name: s.own_rows for s in sources},
        "fine",
        f"rows are matched by their tokens; the output has {rows:,}",
    )
    differ(
        "dtype",
        {s.name: sorted({h.dtype for h in s.headers.values()}) for s in sources},
        "fine",
        "everything is computed in float32",
    )
    if any(d.what == "model_type" for d in found):
        return found  # tokenizers of different families differ in every way; one message is enough
    found += _compare_tokenizers(sources, anchor, chat)
    return found


def _padded(sources: Sequence[Source]) -> dict[str, tuple[dict[str, int], str]]:
    """Config field -> what each source has of it as it is stored, and what becomes of the less; of
    those in which all are read alike."""
    found = {}
    if len({source.config.intermediate_size for source in sources}) == 1:
        found["intermediate_size"] = {source.name: source.own_ffn for source in sources}
    if any(source.widening for source in sources):
        for field in ("hidden_size", "num_hidden_layers", *_HEADS):
            found[field] = {s.name: getattr(s.as_stored.config, field) for s in sources}
    return {field: (values, _PADDED[field]) for field, values in found.items()}


def _generation_settings(source: Source) -> dict[str, Any]:
    """What the source's generation_config.json sets."""
    ignored = ("transformers_version", "_from_model_config", *CODE)
    return {key: value for key, value in read_generation(source)[0].items() if key not in ignored}


def _special_ids(source: Source, field: str) -> Any:
    """A setting of special tokens, in the tokens' words: numbers of different vocabularies say
    nothing."""
    numbers = getattr(source.config, field, None)
    if numbers is None:
        return None
    listed = sorted(set(numbers)) if isinstance(numbers, list) else [numbers]
    if source.vocabulary is None:
        return listed
    spelled = {number: token for token, number in source.own_tokenizer.get_vocab().items()}
    return [spelled.get(number, f"{number}, which is no token") for number in listed]


def _compare_tokenizers(sources: Sequence[Source], anchor: str, chat: str) -> list[Difference]:
    found = _compare_vocabularies(sources, anchor)
    if all(difference.verdict != "error" for difference in found):
        found += _compare_added(sources, anchor)
    tokens = _of_tokenizers(sources, lambda tokenizer: frozenset(tokenizer.get_vocab()))
    common = frozenset.intersection(*tokens.values())
    digests = dict.fromkeys(tokens, "the same files")
    if len({id(source.own_tokenizer) for source in sources}) > 1:
        digests = _of_tokenizers(sources, lambda own: _segmentation_digest(own, common))
    rules: dict[str, dict[str, str]] = {
        "tokenizer merges and normalization": {},
        "special tokens": {},
        "chat template": {},
        "tokenizer settings": {},
    }
    for source in sources:
        tokenizer = source.own_tokenizer
        rules["tokenizer merges and normalization"][source.name] = digests[source.name]
        rules["special tokens"][source.name] = _in_words(
            {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())}
        )
        template = getattr(tokenizer, "chat_template", None)
        rules["chat template"][source.name] = (
            "none" if not template else "sha256 " + _digest(str(template))
        )
        rules["tokenizer settings"][source.name] = _in_words(other_settings(tokenizer))
    consequences = {"chat template": _of_chat(chat, anchor)}
    if chat != anchor:
        consequences["special tokens"] = (
            f"the anchor's, but for the end and padding tokens, which are {chat}'s (output.chat)"
        )
    found += [
        Difference(what, values, "warning", consequences.get(what, _ANCHOR_WINS))
        for what, values in rules.items()
        if len(set(values.values())) > 1
    ]
    return found


def _compare_added(sources: Sequence[Source], anchor: str) -> list[Difference]:
    """Added tokens that the result finds at other places of a text than the source they are of."""
    result = next(source.tokenizer for source in sources if source.name == anchor)
    found = []
    for source in sources:
        is_one = source.name == anchor or source.own_tokenizer is result
        tokens = [] if is_one else found_otherwise(source.source_tokenizer, result)
        if tokens:
            flags = {
                name: flags_of(tokenizer, tokens[0])
                for name, tokenizer in ((source.name, source.own_tokenizer), ("the result", result))
            }
            why = (
                f"text around {len(tokens)} of {source.name}'s is cut otherwise than by "
                f"{source.name}: {some(tokens)}"
            )
            found.append(Difference(f"added token {tokens[0]!r}", flags, "warning", why))
    return found


def _of_chat(chat: str, anchor: str) -> str:
    return _ANCHOR_WINS if chat == anchor else f"{chat}'s is used for the whole model (output.chat)"


def _compare_vocabularies(sources: Sequence[Source], anchor: str) -> list[Difference]:
    """How each source's tokens differ from the anchor's, and what becomes of them."""
    by_name = {source.name: source for source in sources}
    vocabularies = _of_tokenizers(sources, lambda tokenizer: tokenizer.get_vocab())
    kinds = {s.name: s.source_tokenizer.kind for s in sources}
    found = []
    if not are_comparable(kinds.values()):
        why = "no tokenizer can be both; use sources whose tokenizers are of one kind"
        return [Difference("kind of tokenizer", kinds, "error", why)]
    if len(set(kinds.values())) > 1:
        why = f"text is cut as by {anchor}; tokens are matched by what they say"
        found.append(Difference("kind of tokenizer", kinds, "warning", why))
    for name, vocabulary in vocabularies.items():
        of_anchor = vocabularies[anchor]
        if vocabulary is of_anchor or vocabulary == of_anchor:
            continue
        sizes = {n: f"{len(vocabularies[n])} tokens" for n in (anchor, name)}
        merged = by_name[name].vocabulary
        assert merged is not None  # of one kind and different: share_vocabulary has merged them
        found.append(
            Difference(
                "tokenizer vocabulary", sizes, "warning", _fate(merged, by_name[name], anchor)
            )
        )
    return found


def _fate(merged: Vocabulary, source: Source, anchor: str) -> str:
    """What becomes of a source's tokens in the union."""
    parts, name, own = [], source.name, source.own_tokenizer.get_vocab()
    lost, unused = merged.lost[name], merged.unused[name]
    lacking = len(merged.tables[name].pieces)
    # Whoever brought them, if several sources have them.
    numbers = merged.tokenizer.get_vocab()
    new = {token for tokens in merged.added.values() for token in tokens}
    added = sorted(new.intersection(own), key=numbers.__getitem__)
    if added:
        first, last = numbers[added[0]], numbers[added[-1]]
        parts.append(
            f"{len(added)} of {name}'s come after the anchor's, as {first} to {last}: "
            + some(added)
        )
    if lost:
        parts.append(
            f"{len(lost)} of {name}'s are lost, as text is cut as by {anchor}: {some(lost)}"
        )
    if unused:
        parts.append(
            f"{len(unused)} of {name}'s are left out, as no text becomes them: {some(unused)}"
        )
    if lacking:
        parts.append(f"{name} lacks {lacking} of the others' and reads their pieces instead")
    if source.transplant is not None:
        parts.append(
            f"of {len(source.places.missing)} of them it gets a row of its own "
            f"(backbone.missing_tokens: {source.transplant.method})"
        )
    return "; ".join(parts) or "the same tokens under other numbers; matched by what they say"


def _of_tokenizers(
    sources: Sequence[Source], find: Callable[[PreTrainedTokenizerBase], _Found]
) -> dict[str, _Found]:
    """Source -> what is found of its own tokenizer: once, where several have it."""
    found: dict[int, _Found] = {}
    for source in sources:
        tokenizer = source.own_tokenizer
        if id(tokenizer) not in found:
            found[id(tokenizer)] = find(tokenizer)
    return {source.name: found[id(source.own_tokenizer)] for source in sources}


def _segmentation_digest(tokenizer: PreTrainedTokenizerBase, common: Collection[str]) -> str:
    """Digest of what turns text into tokens, apart from the vocabulary itself. `common`: tokens
    that all sources have."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__
    content = from_json(backend.to_str())
    model = {k: v for k, v in content.get("model", {}).items() if k != "vocab"}
    stages = ("normalizer", "pre_tokenizer")
    added = [
        {key: value for key, value in token.items() if key != "id"}
        for token in content.get("added_tokens", [])
        if token["content"] in common
    ]
    parts = [model, *(content.get(stage) for stage in stages), added]
    return "sha256 " + _digest(json.dumps(parts, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_LISTED = 8
"""More numbers than this are not told one by one."""


def _in_words(value: Any) -> str:
    """In words that are the same for the same value: 10000 and 10000.0 are one number."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(value[key])}" for key in sorted(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, list):
        return str(value)
    spelled = [_in_words(one) for one in value]
    if len(value) > _LISTED and all(isinstance(one, int | float) for one in value):
        # Such as RoPE's factor for each pair of a head.
        digest = _digest(", ".join(spelled))
        return f"{len(value)} numbers from {value[0]:.4g} to {value[-1]:.4g}, sha256 {digest}"
    return ", ".join(spelled)


def refuse_mismatch(differences: Sequence[Difference]) -> None:
    """Raise SourceMismatch that names every difference with the verdict `error`."""
    errors = [str(difference) for difference in differences if difference.verdict == "error"]
    if errors:
        raise SourceMismatch("the sources do not match: " + " | ".join(errors))
