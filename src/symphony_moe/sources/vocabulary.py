"""One vocabulary for sources that have different ones: the union of their tokens (Sec. 3.2).

The anchor's tokenizer stays what it is, ids and segmentation included. Added tokens of the others
(special tokens, mostly) that it lacks come after its own: text is cut otherwise than by the anchor
only where such a token is in it. What the others can only spell by merges of their own (BPE) is not
taken over, as new merges would cut ordinary text otherwise: it is *lost*, and said to be.

Everything is matched by what a token says, never by its number. `merge` works on the tokenizer's
files, so that what is written is what was used, byte for byte.
"""

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from symphony_moe.errors import SourceError, first_line
from symphony_moe.sources.pretrained import load_tokenizer
from symphony_moe.sources.same_tokenizer import SETTINGS, cut, texts_for, with_tokens

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


_CHAT_TEMPLATE, _CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
"""A file with the default template, and a folder with those that have other names."""


_WITH_TOKENS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)


_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes that do what tokenizer.json says."""


_NEWEST, _ANY = _GENERIC
"""Names of one class: what transformers 5 writes, and what every version and llama.cpp's converter
know."""


_STAGES = ("normalizer", "pre_tokenizer", "decoder")
"""What tokenizer.json says of text on its way to tokens and back, and some classes build anew."""


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


_ROLES = {f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
"""Special tokens that a tokenizer of any class may have."""


_EXTRA = ("additional_special_tokens", "extra_special_tokens")
"""Where files list special tokens without a role."""


_ID_SETTINGS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "force_words_ids",
    "sequence_bias",
)
"""Settings of a generation config that hold numbers of tokens."""


@dataclass(frozen=True)
class Owner:
    """A tokenizer and the tables that go with it."""

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

    @cached_property
    def content(self) -> dict[str, Any]:
        """The tokenizer as its library writes it; empty for a tokenizer in Python."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # Calls switch padding and truncation on and off: that is no part of what it is.
        off = {"padding": None, "truncation": None}
        return {} if backend is None else dict(json.loads(backend.to_str())) | off

    @cached_property
    def added(self) -> dict[str, dict[str, Any]]:
        """Added token -> its entry."""
        return {token["content"]: token for token in self.content.get("added_tokens", [])}

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
        """How it makes tokens of text. Only tokenizers of one kind can be merged."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return type(self.tokenizer).__name__
        # Not of `content`: writing a large vocabulary as JSON takes half a second.
        stages = [s for s in (backend.pre_tokenizer, backend.decoder) if s is not None]
        spelled = " ".join(stage.__getstate__().decode() for stage in stages)
        return _kind(type(backend.model).__name__, spelled)

    @property
    def filed_kind(self) -> str:
        """The same, as its tokenizer.json says it, whatever its class does; its own where there is
        none."""
        file = self.folder / "tokenizer.json"
        content = json.loads(file.read_bytes()) if file.is_file() else {}
        stages = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
        return _kind(str(content.get("model", {}).get("type", "")), stages) or self.kind

    def pieces(self, token: str, *, added: bool) -> list[int]:
        """What this tokenizer makes of a token that it does not have. `added`: the token is text as
        a user writes it; others are spelled in the alphabet of BPE."""
        if added:
            return cut(self.tokenizer, token)
        return [piece.id for piece in self.tokenizer.backend_tokenizer.model.tokenize(token)]


def _kind(model: str, stages: str) -> str:
    """How a tokenizer makes tokens of text, by the type of its model and its pre-tokenizer and
    decoder, as its library writes them."""
    if model != "BPE":
        return model
    return "byte-level BPE" if '"ByteLevel"' in stages else "SentencePiece BPE"


@dataclass(frozen=True)
class Table:
    """Where one source has the merged vocabulary's tokens."""

    rows: Int[Tensor, " vocabulary"]
    """Its row for each; -1 where it has none."""
    pieces: Mapping[int, list[int]] = field(default_factory=dict)
    """Token that it lacks -> its rows of what it makes of the token's text."""

    @property
    def known(self) -> Bool[Tensor, " vocabulary"]:
        """Which tokens of the shared vocabulary the source has."""
        return self.rows >= 0


@dataclass(frozen=True)
class Vocabulary:
    """What sources with different vocabularies have in common."""

    tokenizer: PreTrainedTokenizerBase
    files: Mapping[str, bytes]
    """The tokenizer's files, by name."""
    size: int
    """Rows of the new model's tables: the anchor's, or more where the tokens do not fit."""
    tables: Mapping[str, Table]
    """By source."""
    added: Mapping[str, list[str]]
    """Source -> tokens that the anchor lacked and that come from it, in the order of their ids."""
    lost: Mapping[str, list[str]]
    """Source -> tokens that its tokenizer makes of text and the merged one does not."""
    unused: Mapping[str, list[str]]
    """Source -> tokens that the merged one lacks and that its own makes of no text either."""
    settings: Mapping[str, Any]
    """What the config says of special tokens, where it is not the anchor's."""
    generation: Mapping[str, Any] | None
    """The generation config, where it is not the anchor's."""


def is_needed(owners: Sequence[Owner], anchor: str, chat: str) -> bool:
    """Whether the anchor's own tokenizer and tables would not do."""
    return chat != anchor or any(
        (owner.tokens, owner.rows) != (owners[0].tokens, owners[0].rows) for owner in owners[1:]
    )


def merge(owners: Sequence[Owner], anchor: str, chat: str) -> Vocabulary:
    """The union. `chat`: the source whose chat template, end and padding tokens and generation
    config the result has.

    Raises SourceError for tokenizers of different kinds, an anchor without tokenizer.json, and a
    `chat` source whose special tokens are none of the union's.
    """
    by_name = {owner.name: owner for owner in owners}
    first = by_name[anchor]
    kinds = {owner.name: owner.kind for owner in owners}
    if len(set(kinds.values())) > 1:
        spelled = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise SourceError(f"tokenizers of different kinds cannot be merged ({spelled})")
    tokens = dict(first.tokens)
    number = max(tokens.values()) + 1
    new: list[dict[str, Any]] = []
    added: dict[str, list[str]] = {}
    # By name: ids do not depend on the order of the recipe.
    others = sorted((o for o in owners if o is not first), key=lambda owner: owner.name)
    for owner in others:
        added[owner.name] = []
        for token in sorted(owner.content.get("added_tokens", []), key=lambda t: t["id"]):
            if token["content"] not in tokens:
                tokens[token["content"]] = number
                new.append({"id": number, "content": token["content"]} | _flags(token))
                added[owner.name].append(token["content"])
                number += 1
    files = _files(first, new, by_name[chat])
    tokenizer = _load(files, tokens, anchor)
    size = max(first.rows, number)
    as_text = {token["content"] for token in [*first.content["added_tokens"], *new]}
    lost = {owner.name: _lost(owner, first.made | as_text) for owner in others}
    unused = {o.name: sorted(o.tokens.keys() - tokens.keys() - set(lost[o.name])) for o in others}
    tables = {owner.name: _table(owner, tokens, as_text, size) for owner in owners}
    settings: dict[str, Any] = {}
    generation = None
    if chat != anchor:
        settings = _settings_of(by_name[chat], tokens)
        generation = _generation_of(by_name[chat], tokens)
    return Vocabulary(tokenizer, files, size, tables, added, lost, unused, settings, generation)


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {flag: bool(token.get(flag)) for flag in _FLAGS}


def found_otherwise(owner: Owner, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Added tokens of an owner that another tokenizer has too and finds at other places of a text:
    it has them with other flags, or as something that merges make."""
    entries = Owner("", owner.folder, tokenizer, owner.rows).added
    numbers = tokenizer.get_vocab()
    return sorted(
        token
        for token, entry in owner.added.items()
        if token in numbers
        and (entry["normalized"] or _flags(entry) != _flags(entries.get(token, {})))
        and any(
            _places(owner.tokenizer, token, text) != _places(tokenizer, token, text)
            for text in with_tokens([token])
        )
    )


def flags_of(tokenizer: PreTrainedTokenizerBase, token: str) -> str:
    """How a tokenizer finds an added token in a text, in words."""
    added = {t.content: t for t in tokenizer.added_tokens_decoder.values()}
    if token not in added:
        return "none of the added ones"
    set_ = [flag for flag in _FLAGS if flag != "special" and getattr(added[token], flag)]
    return ", ".join(set_) or "plain"


def _places(tokenizer: PreTrainedTokenizerBase, token: str, text: str) -> list[tuple[int, int]]:
    """Where a token is in a text: (first character, end)."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    number = tokenizer.get_vocab()[token]
    places = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return [tuple(place) for this, place in places if this == number]


def _lost(owner: Owner, made: Collection[str]) -> list[str]:
    """Tokens that the owner makes of text and the union does not. `made`: those that it does."""
    own = owner.made.union(token["content"] for token in owner.content.get("added_tokens", []))
    return sorted(own.difference(made))


def _table(owner: Owner, tokens: Mapping[str, int], as_text: set[str], size: int) -> Table:
    """Where the owner has each token; a row that is no token's, here and in the union, is padding,
    and known as such. `as_text`: the union's added tokens."""
    rows = torch.full((size,), -1, dtype=torch.int64)
    free = torch.ones(size, dtype=torch.bool)
    own = torch.tensor(sorted(owner.tokens.values()))
    for numbers in (own[own < size], torch.tensor(sorted(tokens.values()))):
        free[numbers] = False
    padding = torch.where(free[: owner.rows])[0]
    rows[padding] = padding
    pieces = {}
    for token, number in tokens.items():
        if token in owner.tokens:
            rows[number] = owner.tokens[token]
        else:
            found = owner.pieces(token, added=token in as_text)
            pieces[number] = found or _unknown(owner, token)
    return Table(rows, pieces)


def _unknown(owner: Owner, token: str) -> list[int]:
    """The row that stands for what a tokenizer cannot spell."""
    number = owner.tokenizer.unk_token_id
    if number is None:
        raise SourceError(
            f"{owner.name}: its tokenizer makes nothing of the token {token!r}, which another "
            "source has; there is nothing to read it as"
        )
    return [int(number)]


class _Reduced(PreTrainedTokenizerFast):
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
    owner = Owner("", folder, tokenizer, rows)
    if not surplus or not owner.content or owner.filed_kind != owner.kind:
        return tokenizer, []
    if _listed(owner).intersection(surplus):
        return tokenizer, []
    content = owner.content
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in surplus]
    roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", [])]
    make: Any = _Reduced  # not annotated in transformers
    reduced: _Reduced = make(
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
    return tokenizer.left_out if isinstance(tokenizer, _Reduced) else ()


def _listed(owner: Owner) -> set[str]:
    """Tokens that a tokenizer's files list, those that they name for a role included."""
    files = _contents(_stored(owner))
    named: set[str] = _ordinary(owner.content) | set(files.get("added_tokens.json", {}))
    config, roles = (files.get(f"{n}.json", {}) for n in ("tokenizer_config", "special_tokens_map"))
    for entries in (
        files.get("tokenizer.json", {}).get("added_tokens"),
        config.get("added_tokens_decoder"),
        *(part.get(key) for part in (config, roles) for key in _ROLES | set(_EXTRA)),
    ):
        named |= _spelled(entries)
    return named


def _spelled(entries: Any) -> set[str]:
    """The tokens of an entry for a special token, or of several in a list or table."""
    if isinstance(entries, str):
        return {entries}
    if isinstance(entries, dict) and "content" in entries:
        return {str(entries["content"])}
    within = list(entries.values()) if isinstance(entries, dict) else entries
    if not isinstance(within, list):
        return set()
    return {token for entry in within for token in _spelled(entry)}


def cut_otherwise(owner: Owner) -> str | None:
    """A text that the class that `transformers` takes cuts otherwise than tokenizer.json says; None
    where there is none, or no such file."""
    file = owner.folder / "tokenizer.json"
    if not owner.content or not file.is_file() or type(owner.tokenizer).__name__ in _GENERIC:
        return None
    as_filed = PreTrainedTokenizerFast(tokenizer_file=str(file))
    texts = texts_for(owner.tokenizer)
    return next((t for t in texts if cut(as_filed, t) != cut(owner.tokenizer, t)), None)


def tokenizer_files(owner: Owner) -> dict[str, bytes]:
    """The owner's tokenizer files, by name, with the same tokenizer in them for every reader.

    Transformers chooses the class of a tokenizer by the model's family, and the result is of
    another family. So what the owner's class does by itself is written into the files; where it
    does nothing that they do not say, they stay as they are.
    """
    files = _stored(owner)
    return _with(files, _explicit(owner, files))


def _with(files: Mapping[str, bytes], contents: dict[str, Any]) -> dict[str, bytes]:
    """The files with other contents; byte for byte as they were, where those are the same."""
    if "tokenizer.model" in files and "tokenizer.json" in contents:
        _list_beside_sentencepiece(contents)
    changed = {
        name: _dump(content)
        for name, content in contents.items()
        if name not in files or content != json.loads(files[name])
    }
    return dict(files) | changed


def _ordinary(content: Mapping[str, Any]) -> set[str]:
    """The vocabulary of a tokenizer's model, which is a table, or a list with scores."""
    return {entry if isinstance(entry, str) else entry[0] for entry in content["model"]["vocab"]}


def tokenizer_paths(folder: Path) -> list[str]:
    """The files of a folder's tokenizer, named from the folder: those that are there."""
    templates = sorted(path.name for path in (folder / _CHAT_TEMPLATES).glob("*.jinja"))
    named = [*TOKENIZER_FILES, *(f"{_CHAT_TEMPLATES}/{name}" for name in templates)]
    return [name for name in named if (folder / name).is_file()]


def _stored(owner: Owner) -> dict[str, bytes]:
    return {name: (owner.folder / name).read_bytes() for name in tokenizer_paths(owner.folder)}


def _contents(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The JSON files with rules and tokens."""
    return {name: json.loads(files[name]) for name in _WITH_TOKENS if name in files}


def _dump(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _explicit(owner: Owner, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What the JSON files with rules and tokens say, and what the owner's class does beside that:
    the stages and settings of its own, tokens that it adds, special tokens that it presumes."""
    contents = _contents(files)
    config = contents.setdefault("tokenizer_config.json", {})
    # Code and files that are not there, and are not asked for: what they would do is what these
    # files say.
    for key in ("auto_map", "name_or_path", "tokenizer_file", "vocab_file"):
        config.pop(key, None)
    named = type(owner.tokenizer).__name__
    if named in _GENERIC and "tokenizer.json" in files:
        if _names_a_class(owner, config):
            config["tokenizer_class"] = _ANY
    elif owner.content:
        rules = contents.setdefault("tokenizer.json", owner.content)
        _write_rules(owner, contents, rules)
        if isinstance(owner.tokenizer, _Reduced):
            _leave_out(owner.tokenizer, contents, rules)
        elif named not in _GENERIC and config.get("tokenizer_class") != named + "Fast":
            config["tokenizer_class"] = named
        _write_settings(owner.tokenizer, config)
    _name_for_every_reader(config)
    return {name: content for name, content in contents.items() if content or name in files}


def _name_for_every_reader(config: dict[str, Any]) -> None:
    """Put names that only transformers 5 knows into those that all versions know: a list of
    `extra_special_tokens` ends the loading of a tokenizer in 4.57, where it is a table."""
    if config.get("tokenizer_class") == _NEWEST:
        config["tokenizer_class"] = _ANY
    old, new = _EXTRA
    if isinstance(config.get(new), list):
        named = config.get(old) or []
        listed = named if isinstance(named, list) else [named]
        known = _spelled(listed)
        more = [token for token in config.pop(new) if not _spelled(token) <= known]
        if listed or more:
            config[old] = [*listed, *more]


def _list_beside_sentencepiece(contents: dict[str, Any]) -> None:
    """List added tokens where readers of tokenizer.model look for them: llama.cpp's converter does
    not open tokenizer.json beside it, and would lose what only that file lists."""
    config = contents.setdefault("tokenizer_config.json", {})
    added = contents["tokenizer.json"].get("added_tokens") or []
    decoder = config["added_tokens_decoder"] = config.get("added_tokens_decoder") or {}
    for token in added:
        decoder.setdefault(str(token["id"]), {"content": token["content"]} | _flags(token))
    ordinary = _ordinary(contents["tokenizer.json"])
    beyond = {token["content"]: token["id"] for token in added if token["content"] not in ordinary}
    if beyond:
        contents["added_tokens.json"] = contents.get("added_tokens.json", {}) | beyond


def _names_a_class(owner: Owner, config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer of no class of its own might get one elsewhere: by a name that only its
    family's loader passes over, or for want of the name that is in its config.json."""
    named = config.get("tokenizer_class")
    if named is not None:
        return named not in _GENERIC
    path = owner.folder / "config.json"
    return path.is_file() and bool(json.loads(path.read_bytes()).get("tokenizer_class"))


def _write_rules(owner: Owner, contents: dict[str, Any], rules: dict[str, Any]) -> None:
    """What the owner's class does with text and tokens, where tokenizer.json says otherwise."""
    # As the library reads them: an older file spells the same otherwise.
    read = json.loads(Tokenizer.from_str(json.dumps(rules)).to_str())
    for stage in _STAGES:
        if read[stage] != owner.content[stage]:
            rules[stage] = owner.content[stage]
    if not (_adds_nothing(read) and _adds_nothing(owner.content)):
        rules["post_processor"] = owner.content["post_processor"]
    if read["model"]["type"] != owner.content["model"]["type"]:
        rules["model"] = owner.content["model"]
    for option, value in owner.content["model"].items():
        if read["model"].get(option) != value:
            rules["model"][option] = value
    listed = rules.get("added_tokens", [])
    decoder = contents["tokenizer_config.json"].get("added_tokens_decoder", {})
    for entry in [*listed, *decoder.values()]:
        own = owner.added.get(entry["content"])
        if own is not None and _flags(own) != _flags(entry):
            entry |= _flags(own)
    known = {entry["content"] for entry in listed}
    _add(contents, [entry for token, entry in owner.added.items() if token not in known])


def _adds_nothing(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer puts no token around a text."""
    post = content["post_processor"]
    return post is None or (
        post["type"] == "TemplateProcessing"
        and post["single"] == [{"Sequence": {"id": "A", "type_id": 0}}]
    )


def _leave_out(reduced: _Reduced, contents: Mapping[str, Any], rules: dict[str, Any]) -> None:
    """Make files give a tokenizer without what its class has added."""
    contents["tokenizer_config.json"]["tokenizer_class"] = _ANY
    for role in reduced.gone:
        contents["tokenizer_config.json"].pop(role, None)
        contents.get("special_tokens_map.json", {}).pop(role, None)
    if (rules.get("padding") or {}).get("pad_token") in reduced.left_out:
        rules["padding"] = None  # which would add it again


def _write_settings(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> None:
    """Name special tokens and settings that are the class's."""
    for role, token in tokenizer.special_tokens_map.items():
        config.setdefault(role, token)
    extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", [])]
    if set(extra) - {token for key in _EXTRA for token in _spelled(config.get(key))}:
        config["extra_special_tokens"] = extra
    for name, unset in SETTINGS.items():
        value = getattr(tokenizer, name, unset)
        if value != unset and config.get(name, unset) != value:
            config[name] = value


def _add(contents: dict[str, Any], new: Sequence[Mapping[str, Any]]) -> None:
    """List new tokens wherever the files list added tokens."""
    config = contents.get("tokenizer_config.json", {})
    for token in new:
        entry = _flags(token)
        contents["tokenizer.json"].setdefault("added_tokens", []).append(
            {"id": token["id"], "content": token["content"]} | entry
        )
        if "added_tokens_decoder" in config:
            listed = {"content": token["content"]} | entry
            config["added_tokens_decoder"][str(token["id"])] = listed
        if "added_tokens.json" in contents:
            contents["added_tokens.json"][token["content"]] = token["id"]


def _files(anchor: Owner, new: Sequence[Mapping[str, Any]], chat: Owner) -> dict[str, bytes]:
    """The anchor's tokenizer files with the new tokens, and with the chat owner's conventions."""
    files = _stored(anchor)
    if "tokenizer.json" not in files and (new or not anchor.content):
        raise SourceError(
            f"{anchor.name}: {anchor.folder} has no tokenizer.json, which merging vocabularies "
            "needs; load the tokenizer with transformers' AutoTokenizer and save_pretrained it "
            "there"
        )
    contents = _explicit(anchor, files)
    config = contents.setdefault("tokenizer_config.json", {})
    _add(contents, new)
    if chat is not anchor:
        contents |= _chat_conventions(files, config, chat)
    return _with(files, contents)


def _chat_conventions(files: dict[str, bytes], config: dict[str, Any], chat: Owner) -> Any:
    """Put the chat owner's template, end and padding tokens in the place of the anchor's; returns
    further JSON files that change."""
    template = getattr(chat.tokenizer, "chat_template", None)
    config.pop("chat_template", None)
    for name in [name for name in files if name.startswith(("chat_template.", _CHAT_TEMPLATES))]:
        del files[name]
    if isinstance(template, str) and "\r" not in template:
        files[_CHAT_TEMPLATE] = template.encode()
    elif isinstance(template, str):
        config["chat_template"] = template  # a file is read with other line ends
    elif template:
        # In the config any name will do; as files, those that a file can have.
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in template.items()
        ]
    changed = {}
    named = {"eos_token": chat.tokenizer.eos_token, "pad_token": chat.tokenizer.pad_token}
    config |= named
    if "special_tokens_map.json" in files:
        listed = json.loads(files["special_tokens_map.json"]) | named
        changed["special_tokens_map.json"] = {k: v for k, v in listed.items() if v is not None}
    return changed


def _load(
    files: Mapping[str, bytes], tokens: Mapping[str, int], anchor: str
) -> PreTrainedTokenizerBase:
    """The tokenizer that the files make, proved to have the tokens."""
    with tempfile.TemporaryDirectory(prefix="symphony-tokenizer-") as folder:
        for name, content in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        try:
            tokenizer = load_tokenizer(Path(folder))
        except Exception as error:
            # The loaders behind AutoTokenizer raise whatever their parser raised.
            raise SourceError(
                f"{anchor}: its tokenizer with the others' tokens is not usable: "
                f"{first_line(error)}"
            ) from None
    found = tokenizer.get_vocab()
    if found != tokens:
        wrong = sorted(found.items() ^ tokens.items())[:3]
        raise SourceError(
            f"{anchor}: transformers gives the added tokens other numbers than follow its own "
            f"({', '.join(f'{token!r} = {number}' for token, number in wrong)}, ...)"
        )
    return tokenizer


def _settings_of(chat: Owner, tokens: Mapping[str, int]) -> dict[str, Any]:
    """Config settings of the end and padding tokens: those of the chat owner's config, and where it
    has none, its tokenizer's."""
    own = {"eos_token": chat.tokenizer.eos_token, "pad_token": chat.tokenizer.pad_token}
    return {
        f"{role}_id": _number(chat, token, tokens)
        if (numbers := chat.special.get(f"{role}_id")) is None
        else _renumbered(chat, f"{role}_id of its config.json", numbers, tokens)
        for role, token in own.items()
    }


def _number(chat: Owner, token: str | None, tokens: Mapping[str, int]) -> int | None:
    if token is not None and token not in tokens:
        raise SourceError(
            f"{chat.name}: its special token {token!r} is not in the merged vocabulary; leave "
            "output.chat to another source"
        )
    return None if token is None else tokens[token]


def _renumbered(chat: Owner, what: str, numbers: Any, tokens: Mapping[str, int]) -> Any:
    """Numbers of tokens, in lists or not, as the union's. A float among them is a weight."""
    if isinstance(numbers, list):
        return [_renumbered(chat, what, number, tokens) for number in numbers]
    if numbers is None or isinstance(numbers, float):
        return numbers
    spelled = {number: token for token, number in chat.tokens.items()}
    if type(numbers) is not int or numbers not in spelled:
        raise SourceError(
            f"{chat.name}: {what} has {numbers!r}, which is no token of its tokenizer; mend it, or "
            "leave output.chat to another source"
        )
    return _number(chat, spelled[numbers], tokens)


def _generation_of(chat: Owner, tokens: Mapping[str, int]) -> dict[str, Any] | None:
    """The chat owner's generation config, its token numbers being those of the union."""
    if chat.generation is None:
        return None
    settings = dict(chat.generation)
    for key in filter(settings.__contains__, _ID_SETTINGS):
        what = f"{key} of its generation_config.json"
        settings[key] = _renumbered(chat, what, settings[key], tokens)
    return settings
