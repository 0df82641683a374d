"""A source's tokenizer and its files: what it makes of text, and what the files list.

`without_rowless` takes out the tokens that only a tokenizer's class adds.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from symphony_moe.files import from_json
from symphony_moe.sources.same_tokenizer import SETTINGS, cut
from symphony_moe.sources.spelling import SPELLINGS, is_byte, said_by, spelled_as

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Those that hold a vocabulary: without one of them there is no tokenizer."""

CHAT_TEMPLATES = "additional_chat_templates"
"""A folder with the chat templates that have other names than the default."""

_WITH_TOKENS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""The JSON files with rules and tokens."""

GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes that do what tokenizer.json says."""

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""What tokenizer.json says of an added token."""

_ROLES = {f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
"""Special tokens that a tokenizer of any class may have."""

EXTRA = ("additional_special_tokens", "extra_special_tokens")
"""Where files list special tokens without a role."""


@dataclass(frozen=True)
class SourceTokenizer:
    """A source's tokenizer, and what its model says of tokens."""

    name: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    rows: int
    """Rows of the model's embedding table (more than tokens, where it is padded)."""
    special: Mapping[str, Any] = field(default_factory=dict)
    """What the model's config says of special tokens."""
    generation: Mapping[str, Any] | None = None
    """The model's generation config; None where it has none."""

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Token -> its number, added tokens included."""
        return dict(self.tokenizer.get_vocab())

    @property
    def backend(self) -> Tokenizer | None:
        """The tokenizer of the library `tokenizers` within; None for a tokenizer in Python."""
        found: Tokenizer | None = getattr(self.tokenizer, "backend_tokenizer", None)
        return found

    @cached_property
    def content(self) -> dict[str, Any]:
        """The tokenizer as its library writes it; empty for a tokenizer in Python."""
        # Calls switch padding and truncation on and off: that is no part of what it is.
        off = {"padding": None, "truncation": None}
        return {} if self.backend is None else dict(from_json(self.backend.to_str())) | off

    @cached_property
    def added(self) -> dict[str, dict[str, Any]]:
        """Added token -> its entry, as tokenizer.json has it."""
        if self.backend is None:
            return {}
        # Not of `content`: writing a large vocabulary as JSON and reading it takes a second.
        found = sorted(self.backend.get_added_tokens_decoder().items())
        return {
            token.content: {"id": number, "content": token.content}
            | {flag: getattr(token, flag) for flag in FLAGS}
            for number, token in found
        }

    @cached_property
    def made(self) -> frozenset[str]:
        """Its ordinary tokens that some text becomes: of BPE those that its merges lead to, single
        characters and bytes; elsewhere all."""
        model = self.content.get("model", {})
        if model.get("type") != "BPE" or model.get("ignore_merges"):
            return frozenset(self.tokens)
        made = {"".join(merge) for merge in model["merges"]}
        if model.get("byte_fallback"):
            made |= {f"<0x{byte:02X}>" for byte in range(256)}
        return frozenset(token for token in self.tokens if token in made or len(token) == 1)

    @property
    def kind(self) -> str:
        """How it makes tokens of text. Tokens of two kinds can be compared where both are among
        `SPELLINGS`."""
        if self.backend is None:
            return type(self.tokenizer).__name__
        # Not of `content`, for the same reason.
        stages = [s for s in (self.backend.pre_tokenizer, self.backend.decoder) if s is not None]
        spelled = " ".join(stage.__getstate__().decode() for stage in stages)
        return _kind(type(self.backend.model).__name__, spelled)

    @property
    def filed_kind(self) -> str:
        """The same, as its tokenizer.json says it, whatever its class does; its own where there is
        none."""
        file = self.folder / "tokenizer.json"
        content = from_json(file.read_bytes()) if file.is_file() else {}
        stages = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
        return _kind(str(content.get("model", {}).get("type", "")), stages) or self.kind

    def said(self, kind: str) -> dict[str, str | bytes]:
        """Each token -> what it is compared by with the tokens of a kind: itself, or what it says
        where that is another kind, and it is no added token. Bytes come before characters that say
        the same."""
        if kind == self.kind:
            return {token: token for token in self.tokens}
        found: dict[str, str | bytes] = {}
        for token in sorted(self.tokens, key=lambda token: (not is_byte(token), token)):
            says = None if token in self.added else said_by(token, self.kind)
            found[token] = token if says is None else says
        return found

    def pieces(self, token: str, *, added: bool, kind: str | None = None) -> list[int]:
        """What this tokenizer makes of a token that it does not have. `added`: the token is text as
        a user writes it; others are spelled as the ordinary tokens of a `kind`, its own where that
        is None."""
        if added:
            return cut(self.tokenizer, token)
        spelled = [token]
        if kind not in (None, self.kind):
            says = said_by(token, str(kind))
            spelled = [] if says is None else spelled_as(says, self.kind)
        model = self.tokenizer.backend_tokenizer.model
        if len(spelled) != 1:  # bytes; those that it has no token for are left out
            return [self.tokens[byte] for byte in spelled if byte in self.tokens]
        return [piece.id for piece in model.tokenize(spelled[0])]


def are_comparable(kinds: Collection[str]) -> bool:
    """Whether tokens of all these kinds can be compared by what they say."""
    return len(set(kinds)) < 2 or set(kinds) <= set(SPELLINGS)


def _kind(model: str, stages: str) -> str:
    """How a tokenizer makes tokens of text, by the type of its model and its pre-tokenizer and
    decoder, as its library writes them."""
    if model != "BPE":
        return model
    return "byte-level BPE" if '"ByteLevel"' in stages else "SentencePiece BPE"


def tokenizer_paths(folder: Path) -> list[str]:
    """The files of a folder's tokenizer, named from the folder: those that are there."""
    templates = sorted(path.name for path in (folder / CHAT_TEMPLATES).glob("*.jinja"))
    named = [*TOKENIZER_FILES, *(f"{CHAT_TEMPLATES}/{name}" for name in templates)]
    return [name for name in named if (folder / name).is_file()]


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of everything that a folder's tokenizer is made of: its files, and the config, by
    which transformers chooses its class."""
    versioned = sorted(path.name for path in folder.glob("tokenizer*") if path.is_file())
    found = hashlib.sha256()
    for name in sorted({*versioned, *tokenizer_paths(folder), "config.json"}):
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        found.update(f"{name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


def stored_files(source: SourceTokenizer) -> dict[str, bytes]:
    """Name -> content of a tokenizer's files."""
    return {name: (source.folder / name).read_bytes() for name in tokenizer_paths(source.folder)}


def json_files(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The JSON files with rules and tokens."""
    return {name: from_json(files[name]) for name in _WITH_TOKENS if name in files}


def ordinary_tokens(content: Mapping[str, Any]) -> set[str]:
    """The vocabulary of a tokenizer's model, which is a table, or a list with scores."""
    return {entry if isinstance(entry, str) else entry[0] for entry in content["model"]["vocab"]}


def tokens_of(entries: Any) -> set[str]:
    """The tokens of an entry for a special token, or of several in a list or table."""
    if isinstance(entries, str):
        return {entries}
    if isinstance(entries, dict) and "content" in entries:
        return {str(entries["content"])}
    within = list(entries.values()) if isinstance(entries, dict) else entries
    if not isinstance(within, list):
        return set()
    return {token for entry in within for token in tokens_of(entry)}


def flags(token: Mapping[str, Any]) -> dict[str, bool]:
    """How an added token is found in a text, by its entry: flag -> whether it is set."""
    return {flag: bool(token.get(flag)) for flag in FLAGS}


class ReducedTokenizer(PreTrainedTokenizerFast):
    """A tokenizer without tokens that only its class added."""

    gone: tuple[str, ...] = ()
    """Roles that they had."""
    left_out: tuple[str, ...] = ()
    """The tokens, in the order of their numbers."""


def without_rowless(
    tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """(the tokenizer without them, its tokens from number `rows` on), if no file lists one of them,
    so that only its class presumes them; the tokenizer as it is and none, if a file does, or the
    class makes a tokenizer of another kind of the files, which nobody can have meant.

    Code Llama's adds its tokens for filling in the middle to models that have no rows for them;
    Qwen2's takes `<|endoftext|>` for whatever role the files leave open, also with the tokens of
    another family.
    """
    numbers = tokenizer.get_vocab()
    surplus = sorted((t for t in numbers if numbers[t] >= rows), key=numbers.__getitem__)
    source = SourceTokenizer("", folder, tokenizer, rows)
    if not surplus or not source.content or source.filed_kind != source.kind:
        return tokenizer, []
    if _listed(source).intersection(surplus):
        return tokenizer, []
    content = source.content
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in surplus]
    roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", [])]
    make: Any = ReducedTokenizer  # not annotated in transformers
    reduced: ReducedTokenizer = make(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        chat_template=tokenizer.chat_template,
        extra_special_tokens=[token for token in extra if token not in surplus],
        **{name: getattr(tokenizer, name, unset) for name, unset in SETTINGS.items()},
        **{role: token for role, token in roles.items() if token not in surplus},
    )
    reduced.gone = tuple(role for role, token in roles.items() if token in surplus)
    reduced.left_out = tuple(surplus)
    return reduced, surplus


def left_out(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens that `without_rowless` has taken from a tokenizer."""
    return tokenizer.left_out if isinstance(tokenizer, ReducedTokenizer) else ()


def _listed(source: SourceTokenizer) -> set[str]:
    """Tokens that a tokenizer's files list, those that they name for a role included."""
    files = json_files(stored_files(source))
    named: set[str] = ordinary_tokens(source.content) | set(files.get("added_tokens.json", {}))
    config, roles = (files.get(f"{n}.json", {}) for n in ("tokenizer_config", "special_tokens_map"))
    for entries in (
        files.get("tokenizer.json", {}).get("added_tokens"),
        config.get("added_tokens_decoder"),
        *(part.get(key) for part in (config, roles) for key in _ROLES | set(EXTRA)),
    ):
        named |= tokens_of(entries)
    return named
