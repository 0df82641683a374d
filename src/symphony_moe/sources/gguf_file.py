"""What a GGUF file says and holds, from its header, before `transformers` converts it.

`transformers` takes the settings and tensors that it knows, passes over all others, and draws what
it misses at random. Here every setting and every tensor is one that it reads, or one that is read
here (scaled RoPE, the size of a head, the special tokens), or the file is refused by name.
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from transformers import LlamaConfig, PreTrainedConfig

from symphony_moe.errors import SourceError, first_line
from symphony_moe.model.families import EMBEDDING, FINAL_NORM, HEAD, head_dim

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""llama.cpp keeps a Mistral as a `llama`."""

_NAMES = {
    "token_embd": EMBEDDING.removesuffix(".weight"),
    "output_norm": FINAL_NORM.removesuffix(".weight"),
    "output": HEAD.removesuffix(".weight"),
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""llama.cpp's name of a tensor -> transformers', for the architectures of above."""

_ROPE_FACTORS = "rope_freqs.weight"

_PASSED_OVER = r"blk\.\d+\.attn_rot_embd\.weight"
"""RoPE's own frequencies in old files: llama.cpp passes over them too."""

_NEEDED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
"""Settings that transformers would fill in with its own defaults."""

_READ = (
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
)

_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": None,
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "tensor_data_layout": None,
    "use_parallel_residual": (False,),
}
"""Other settings -> the values with which they change nothing; None where none of them does."""

_RATIO = 4.0
"""high_freq_factor over low_freq_factor in every Llama 3."""

_CLOSE = 5e-6
"""Two frequencies are the same where they differ by this, relatively: rounding to float32."""


@dataclass(frozen=True)
class GGUFFile:
    """The header of one GGUF file: nothing of its weights is in memory."""

    owner: str
    """The source's name."""
    path: Path
    architecture: str
    settings: Mapping[str, Any]
    """Metadata: numbers, words, and lists of numbers; of a list of words its length."""
    shapes: Mapping[str, tuple[int, ...]]
    """llama.cpp's tensor name -> shape, as torch has it."""
    rope_factors: tuple[float, ...] = ()
    """What each of RoPE's frequencies is divided by; none where that is said by no tensor."""

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting of its architecture."""
        return self.settings.get(f"{self.architecture}.{key}", default)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """transformers' name -> shape, for every tensor of the model."""
        known = {name: _their_name(name) for name in self.shapes}
        return {theirs: self.shapes[name] for name, theirs in known.items() if theirs}

    @property
    def adds_bos(self) -> bool:
        """Whether BOS is put before every text. llama.cpp's default: for SentencePiece, and for
        Llama 3's tokenizer."""
        said = self.settings.get("tokenizer.ggml.add_bos_token")
        if said is not None:
            return bool(said)
        pre = str(self.settings.get("tokenizer.ggml.pre", ""))
        spm = self.settings.get("tokenizer.ggml.model") == "llama"
        return spm or pre in ("llama3", "llama-v3", "llama-bpe")

    @property
    def head_size(self) -> int:
        """Size of an attention head."""
        heads = int(self.setting("attention.head_count"))
        own = self.setting("attention.key_length")
        if own is None and self.architecture == "llama":
            own = self.setting("rope.dimension_count")
        return int(own or int(self.setting("embedding_length")) // heads)

    @cached_property
    def rope(self) -> dict[str, Any]:
        """RoPE's parameters, as a config has them. Raises SourceError for scaling that no config
        of the architecture describes exactly."""
        theta = float(self.setting("rope.freq_base", 10000.0))
        scaled = not all(abs(factor - 1) <= _CLOSE for factor in self.rope_factors)
        parameters = self._scaling
        if scaled and parameters:
            raise SourceError(
                f"{self.owner}: {self.path.name} scales RoPE twice, by {_ROPE_FACTORS} and by "
                "rope.scaling; no config of transformers describes that. Use the checkpoint that "
                "it was made of"
            )
        if scaled:
            fits = self.architecture == "llama" and 2 * len(self.rope_factors) == self.head_size
            found = llama3_parameters(theta, self.rope_factors) if fits else None
            if found is None:
                raise SourceError(
                    f"{self.owner}: {self.path.name} scales RoPE by the tensor {_ROPE_FACTORS}, "
                    "which transformers drops, and no llama3 parameters give these factors "
                    f"({min(self.rope_factors):.4g} to {max(self.rope_factors):.4g}): it would "
                    "not compute what it does. Use the checkpoint that it was made of"
                )
            parameters = found
        return {"rope_type": "default", **parameters, "rope_theta": theta}

    @property
    def _scaling(self) -> dict[str, Any]:
        """What the metadata say of RoPE's scaling."""
        factor = float(self.setting("rope.scaling.factor", self.setting("rope.scale_linear", 0.0)))
        # As in llama.cpp: linear where only a factor is given.
        kind = self.setting("rope.scaling.type", "linear")
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            return {}
        original = self.setting("rope.scaling.original_context_length")
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn" and factor > 0 and original:
            return {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": int(original),
            }
        raise SourceError(
            f"{self.owner}: {self.path.name} scales RoPE by {kind!r} (factor {factor:g}), which "
            "cannot be rebuilt from a GGUF; use the checkpoint that it was made of"
        )

    @property
    def notes(self) -> list[str]:
        """What is read here and not by transformers, in words."""
        if self.rope["rope_type"] == "default":
            return []
        where = f"the tensor {_ROPE_FACTORS}" if not self._scaling else "rope.scaling"
        spelled = ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.rope.items()
        )
        return [f"{self.owner}: {where} of {self.path.name} is read as RoPE with {spelled}"]

    def amend(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A config that transformers made of the metadata, with what it passes over; changed in
        place."""
        config.rope_parameters = self.rope
        if head_dim(config) != self.head_size:
            config.head_dim = self.head_size
        config.num_key_value_heads = int(
            self.setting("attention.head_count_kv", config.num_attention_heads)
        )
        tokens = {
            word: self.settings.get(f"tokenizer.ggml.{word}_token_id")
            for word in ("bos", "eos", "eot", "padding")
        }
        ends = [token for token in (tokens["eos"], tokens["eot"]) if token is not None]
        config.bos_token_id = tokens["bos"]
        config.eos_token_id = ends[0] if len(set(ends)) == 1 else (ends or None)
        config.pad_token_id = tokens["padding"]
        return config


def open_gguf(owner: str, path: Path) -> GGUFFile:
    """Read a header and prove that nothing in the file would be lost.

    Raises SourceError for a file that cannot be read, is one part of several, is of an architecture
    that is not in `ARCHITECTURES`, or has settings or tensors that the model would lack.
    """
    if not path.is_file():
        raise SourceError(f"{owner}: no such GGUF file: {path}")
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise SourceError(
            f"{owner}: {path}: reading GGUF needs the package gguf: pip install gguf ({error})"
        ) from None
    blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    try:
        settings, shapes, factors = _read_header(path, blocks)
    except (ValueError, OSError, OverflowError, MemoryError) as error:
        # Sizes of a damaged file may be anything.
        raise SourceError(
            f"{owner}: {path} cannot be read as GGUF: {first_line(error)[:200]}. Is it whole? "
            "Fetch it again"
        ) from None
    architecture = str(settings.get("general.architecture"))
    file = GGUFFile(owner, path, architecture, settings, shapes, factors)
    _check(file)
    return file


def _read_header(
    path: Path, blocks: Mapping[int, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], tuple[float, ...]]:
    """(settings, shapes, what RoPE's frequencies are divided by) of a GGUF file. `blocks`: kind of
    number -> (numbers in a block, its bytes).

    Raises ValueError for a file that is none, or that ends before its tensors do.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin as a GGUF file does")
        version, num_tensors, num_settings = _numbers(file, "IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"it is of version {version}, not {' or '.join(map(str, _VERSIONS))}")
        settings: dict[str, Any] = {}
        for _ in range(num_settings):
            key = _word(file)
            settings[key] = _value(file, *_numbers(file, "I"))
        places = _read_places(file, num_tensors)
        alignment = settings.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {str(alignment)[:40]}")
        begin = -(-file.tell() // alignment) * alignment
        for name, place in places.items():
            if place.kind not in blocks:
                raise ValueError(f"{name[:80]} is of the unknown kind {place.kind}")
            numbers, its_bytes = blocks[place.kind]
            if begin + place.offset + place.numbers // numbers * its_bytes > size:
                raise ValueError(f"it ends before {name[:80]} does")
        factors = _read_factors(file, begin, places.get(_ROPE_FACTORS))
    return settings, {name: place.shape for name, place in places.items()}, factors


class _Place(NamedTuple):
    """Where a tensor is in a file."""

    shape: tuple[int, ...]
    kind: int
    """The format of its numbers."""
    offset: int
    """Bytes between the first tensor and this one."""

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def _read_places(file: BinaryIO, num_tensors: int) -> dict[str, _Place]:
    """Tensor -> its place, from the next part of a header."""
    places: dict[str, _Place] = {}
    for _ in range(num_tensors):
        name = _word(file)
        dimensions = _numbers(file, f"{_numbers(file, 'I')[0]}Q")
        if name in places:
            raise ValueError(f"it holds {name[:80]} twice")
        # Sizes are kept from the innermost axis outwards.
        places[name] = _Place(dimensions[::-1], *_numbers(file, "IQ"))
    return places


def _read_factors(file: BinaryIO, begin: int, place: _Place | None) -> tuple[float, ...]:
    """What RoPE's frequencies are divided by; none where no tensor says it. `begin`: the first
    tensor's place."""
    if place is None:
        return ()
    if place.kind != 0:
        raise ValueError(f"{_ROPE_FACTORS} is not in float32")
    file.seek(begin + place.offset)
    return _numbers(file, f"{place.numbers}f")


_VERSIONS = (2, 3)

_KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kind of a setting -> its letter in `struct`; words are of kind 8, lists of 9."""

_LONG = 1024
"""Of lists that are longer than this (vocabularies) the length alone is kept."""


def _numbers(file: BinaryIO, letters: str) -> tuple[Any, ...]:
    """The next numbers of a file."""
    size = struct.calcsize("<" + letters)
    if size > _LONG * 8:
        raise ValueError("it says sizes that cannot be")
    content = file.read(size)
    if len(content) < size:
        raise ValueError("it ends within its header")
    return struct.unpack("<" + letters, content)


def _word(file: BinaryIO) -> str:
    (size,) = _numbers(file, "Q")
    # Less than this is read of a damaged length.
    content = file.read(min(size, 2**24))
    if len(content) < size:
        raise ValueError("it ends within its header")
    return content.decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    """The next setting; of a long list, and of one of words, its length."""
    if kind in _KINDS:
        return _numbers(file, _KINDS[kind])[0]
    if kind == 8:
        return _word(file)
    if kind != 9:
        raise ValueError(f"it has a setting of the unknown kind {kind}")
    inner, length = _numbers(file, "IQ")
    if inner == 9:
        raise ValueError("it has a list of lists")
    if inner in _KINDS and length > _LONG:
        file.seek(length * struct.calcsize("<" + _KINDS[inner]), 1)
        return length
    values = [_value(file, inner) for _ in range(length)]
    return length if inner == 8 else values


def _check(file: GGUFFile) -> None:
    named = re.search(r"-\d{5}-of-(\d{5})\.gguf$", file.path.name)
    parts = [file.settings.get("split.count", 1), int(named[1]) if named else 1]
    several = [part for part in parts if part not in (0, 1)]
    if several:
        raise SourceError(
            f"{file.owner}: {file.path} is one of {str(several[0])[:9]} parts of a model, and "
            "transformers would fill in the others at random; join them with llama.cpp's "
            "llama-gguf-split --merge, and name the whole file"
        )
    if file.architecture not in ARCHITECTURES:
        raise SourceError(
            f"{file.owner}: {file.path} is of the architecture {file.architecture[:50]!r}; of GGUF "
            f"files, {', '.join(ARCHITECTURES)} are read. Use the checkpoint that it was made of"
        )
    missing = [key for key in _NEEDED if not file.setting(key)]
    if missing:
        raise SourceError(f"{file.owner}: {file.path} does not say its {', '.join(missing)}")
    _check_settings(file)
    lost = [
        name
        for name in file.shapes
        if not _their_name(name) and name != _ROPE_FACTORS and not re.fullmatch(_PASSED_OVER, name)
    ]
    if lost:
        raise SourceError(
            f"{file.owner}: {file.path} has {len(lost)} tensors that transformers would drop, "
            f"first {lost[0][:80]}: what is left would not compute what it does. Use the "
            "checkpoint that it was made of"
        )


def _check_settings(file: GGUFFile) -> None:
    """Raise SourceError for a setting that changes what the model computes, and is not read."""
    prefix = file.architecture + "."
    for key, value in file.settings.items():
        own = key.removeprefix(prefix)
        if own == key:
            continue
        if own in _WITHOUT_EFFECT:
            harmless = _WITHOUT_EFFECT[own]
            unread = harmless is not None and value not in harmless
        else:
            kind: type | tuple[type, ...] = str if own == "rope.scaling.type" else (int, float)
            unread = own not in _NEEDED + _READ or not isinstance(value, kind)
        if unread:
            raise SourceError(
                f"{file.owner}: {file.path} sets {key[:60]} to {str(value)[:60]}, which "
                "transformers does not read: what it makes of the file would not compute what it "
                "does. Use the checkpoint that it was made of"
            )
    sizes = {
        key: int(file.setting(key, file.head_size))
        for key in ("rope.dimension_count", "attention.key_length", "attention.value_length")
    }
    if len(set(sizes.values())) > 1:
        raise SourceError(
            f"{file.owner}: {file.path} has heads of several sizes ({sizes}); expected one size "
            "for queries, keys and values, all of it rotated"
        )
    _ = file.rope


def _their_name(name: str) -> str | None:
    """transformers' name of a tensor that llama.cpp calls so; None where it has none."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None or found[2] not in _NAMES:
        return None
    theirs = _NAMES[found[2]]
    in_layer = not theirs.startswith(("model.", "lm_head"))
    if in_layer != (found[1] is not None):
        return None
    return f"{f'model.layers.{found[1]}.' if in_layer else ''}{theirs}.{found[3]}"


def llama3_parameters(theta: float, factors: Sequence[float]) -> dict[str, Any] | None:
    """The `llama3` scaling that divides RoPE's frequencies by these factors, as a config spells it;
    None where none does. Many settings give the same frequencies: the usual ones come first."""
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        return None
    for low, high, original in _candidates(theta, factors):
        if not (high > low and 1 < original < 2**31):
            continue
        parameters = {
            "rope_type": "llama3",
            "factor": float(max(factors)),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if _gives(theta, parameters, factors):
            return parameters
    return None


def _gives(theta: float, parameters: Mapping[str, Any], factors: Sequence[float]) -> bool:
    """Whether transformers computes the frequencies that the factors say."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = 2 * len(factors)
    config = LlamaConfig(
        head_dim=size,
        max_position_embeddings=2 * parameters["original_max_position_embeddings"],
        rope_parameters={**parameters, "rope_theta": theta},
    )
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    expected = _frequencies(theta, size) / torch.tensor(factors, dtype=torch.float64)
    return bool(torch.allclose(found.double(), expected, rtol=_CLOSE, atol=0))


def _frequencies(theta: float, size: int) -> torch.Tensor:
    """RoPE's frequencies, one for each of a head's `size / 2` pairs."""
    return 1.0 / theta ** (torch.arange(0, size, 2).double() / size)


def _candidates(theta: float, factors: Sequence[float]) -> Iterator[tuple[float, float, int]]:
    """(low_freq_factor, high_freq_factor, original context) that may be meant.

    A wavelength beyond original / low is divided by the full factor, one below original / high by
    none, and in between 1 / factor is linear in 1 / wavelength. So low is free: it is 1.
    """
    for context in (8192, *(2**power for power in range(4, 21))):
        yield 1.0, _RATIO, context
    waves = (2 * math.pi / _frequencies(theta, 2 * len(factors))).tolist()
    full = max(factors)
    if full <= 1:
        return
    between = [
        (1 / wave, (1 / factor - 1 / full) / (1 - 1 / full))
        for wave, factor in zip(waves, factors, strict=True)
        if 1 + _CLOSE < factor < full * (1 - _CLOSE)
    ]
    for inverse, share in between:
        yield 1.0, _RATIO, round((1 + share * (_RATIO - 1)) / inverse)
    if len(between) > 1:
        (first, higher), (last, lower) = between[0], between[-1]
        slope = (higher - lower) / (first - last)
        if slope * last != lower:
            spread = 1 / (slope * last - lower)  # high - low
            yield 1.0, round(1 + spread, 4), round(slope * spread)
    below = max((w for w, f in zip(waves, factors, strict=True) if f <= 1 + _CLOSE), default=1.0)
    above = min(w for w, f in zip(waves, factors, strict=True) if f >= full * (1 - _CLOSE))
    if len(between) == 1:
        inverse, share = between[0]
        for part in range(1, 40):
            context = math.floor((above * inverse) ** (part / 40) / inverse)
            yield 1.0, 1 + (context * inverse - 1) / share, context
    if not between:
        context = max(2, math.floor(above * 0.99))
        yield 1.0, max(1.001, context / (below * 1.01)), context
