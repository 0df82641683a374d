"""One vocabulary for sources that have different ones: the union of their tokens (Sec. 3.2).

The anchor's tokenizer stays what it is, ids and segmentation included. Added tokens of the others
(special tokens, mostly) that it lacks come after its own: text is cut otherwise than by the anchor
only where such a token is in it. What the others can only spell by merges of their own (BPE) is not
taken over, as new merges would cut ordinary text otherwise: it is *lost*, and said to be.

Everything is matched by what a token says, never by its number: byte-level BPE and SentencePiece
spell the same text otherwise (`spelling.py`). `merge` works on the tokenizer's files, so that what
is written is what was used, byte for byte.
"""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from symphony_moe.errors import SourceError, first_line
from symphony_moe.sources.pretrained import load_tokenizer
from symphony_moe.sources.source_tokenizer import SourceTokenizer, are_comparable, flags
from symphony_moe.sources.tokenizer_files import merged_files

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
class Table:
    """Where one source has the merged vocabulary's tokens."""

    rows: Int[Tensor, " vocabulary"]
    """Its row for each; -1 where it has none."""
    pieces: Mapping[int, list[int]] = field(default_factory=dict)
    """Token that it lacks -> its rows of what it makes of the token's text."""

    @property
    def known(self) -> Bool[Tensor, " vocabulary"]:
        """Which tokens the source has a row for."""
        return self.rows >= 0


@dataclass(frozen=True)
class Vocabulary:
    """What sources with different vocabularies have in common."""

    tokenizer: PreTrainedTokenizerBase
    files: Mapping[str, bytes]
    """The tokenizer's files, by name."""
    size: int
    """Rows of the new model's tables: the anchor's, or more where the tokens do not fit."""
    ordinary: Bool[Tensor, " vocabulary"]
    """The anchor's tokens that are no added ones: text is mostly made of them."""
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


def is_needed(sources: Sequence[SourceTokenizer], anchor: str, chat: str) -> bool:
    """Whether the anchor's own tokenizer and tables would not do."""
    first = sources[0]
    return chat != anchor or any(
        source.rows != first.rows
        or source.kind != first.kind
        or (source.tokenizer is not first.tokenizer and source.tokens != first.tokens)
        for source in sources[1:]
    )


def merge(sources: Sequence[SourceTokenizer], anchor: str, chat: str) -> Vocabulary:
    """The union. `chat`: the source whose chat template, end and padding tokens and generation
    config the result has.

    Raises SourceError for kinds of tokenizers that cannot be compared, an anchor without
    tokenizer.json, and a `chat` source whose special tokens are none of the union's.
    """
    by_name = {source.name: source for source in sources}
    first = by_name[anchor]
    kinds = {source.name: source.kind for source in sources}
    if not are_comparable(kinds.values()):
        spelled = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise SourceError(f"tokenizers of different kinds cannot be merged ({spelled})")
    tokens = dict(first.tokens)
    number = max(tokens.values()) + 1
    new: list[dict[str, Any]] = []
    added: dict[str, list[str]] = {}
    # By name: ids do not depend on the order of the recipe.
    others = sorted((o for o in sources if o is not first), key=lambda source: source.name)
    for source in others:
        added[source.name] = []
        for token in sorted(source.content.get("added_tokens", []), key=lambda t: t["id"]):
            if token["content"] not in tokens:
                tokens[token["content"]] = number
                new.append({"id": number, "content": token["content"]} | flags(token))
                added[source.name].append(token["content"])
                number += 1
    files = merged_files(first, new, by_name[chat])
    tokenizer = _load(files, tokens, anchor)
    size = max(first.rows, number)
    as_text = {token["content"] for token in [*first.content["added_tokens"], *new]}
    union = _Union(first, tokens, as_text, size)
    lost = {source.name: _lost(source, union) for source in others}
    unused = {o.name: _others(o, union, without=set(lost[o.name])) for o in others}
    tables = {source.name: _table(source, union) for source in sources}
    ordinary = torch.zeros(size, dtype=torch.bool)
    ordinary[[number for token, number in first.tokens.items() if token not in as_text]] = True
    settings: dict[str, Any] = {}
    generation = None
    if chat != anchor:
        settings = _settings_of(by_name[chat], tokens)
        generation = _generation_of(by_name[chat], tokens)
    return Vocabulary(
        tokenizer, files, size, ordinary, tables, added, lost, unused, settings, generation
    )


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


@dataclass(frozen=True)
class _Union:
    """The tokens of all."""

    anchor: SourceTokenizer
    tokens: Mapping[str, int]
    as_text: set[str]
    """The added ones among them."""
    size: int
    """Rows, those of padding included."""

    def said(self, kind: str) -> dict[str, str | bytes]:
        """As `SourceTokenizer.said`: each token -> what it is compared by."""
        return {token: token for token in self.tokens} | self.anchor.said(kind)


def _lost(source: SourceTokenizer, union: _Union) -> list[str]:
    """Tokens that the source makes of text and the union does not."""
    own = source.made.union(token["content"] for token in source.content.get("added_tokens", []))
    said, made = source.said(union.anchor.kind), union.anchor.made | union.as_text
    there = {says for token, says in union.said(source.kind).items() if token in made}
    return sorted(token for token in own if said.get(token, token) not in there)


def _others(source: SourceTokenizer, union: _Union, *, without: Collection[str]) -> list[str]:
    """Tokens of a source that the union lacks, without some."""
    there = set(union.said(source.kind).values())
    said = source.said(union.anchor.kind)
    return sorted(t for t, says in said.items() if says not in there and t not in without)


def _table(source: SourceTokenizer, union: _Union) -> Table:
    """Where the source has each token; a row that is no token's, here and in the union, is padding,
    and known as such."""
    rows = torch.full((union.size,), -1, dtype=torch.int64)
    free = torch.ones(union.size, dtype=torch.bool)
    own = torch.tensor(sorted(source.tokens.values()))
    for numbers in (own[own < union.size], torch.tensor(sorted(union.tokens.values()))):
        free[numbers] = False
    padding = torch.where(free[: source.rows])[0]
    rows[padding] = padding
    has = {says: source.tokens[token] for token, says in source.said(union.anchor.kind).items()}
    pieces = {}
    for token, says in union.said(source.kind).items():
        number = union.tokens[token]
        if says in has:
            rows[number] = has[says]
        else:
            found = source.pieces(token, added=token in union.as_text, kind=union.anchor.kind)
            pieces[number] = found or _unknown(source, token)
    return Table(rows, pieces)


def _unknown(source: SourceTokenizer, token: str) -> list[int]:
    """The row that stands for what a tokenizer cannot spell."""
    number = source.tokenizer.unk_token_id
    if number is None:
        raise SourceError(
            f"{source.name}: its tokenizer makes nothing of the token {token!r}, which another "
            "source has; there is nothing to read it as"
        )
    return [int(number)]


def _settings_of(chat: SourceTokenizer, tokens: Mapping[str, int]) -> dict[str, Any]:
    """Config settings of the end and padding tokens: those of the chat source's config, or its
    tokenizer's where the config has none."""
    own = {"eos_token": chat.tokenizer.eos_token, "pad_token": chat.tokenizer.pad_token}
    return {
        f"{role}_id": _number(chat, token, tokens)
        if (numbers := chat.special.get(f"{role}_id")) is None
        else _renumbered(chat, f"{role}_id of its config.json", numbers, tokens)
        for role, token in own.items()
    }


def _number(chat: SourceTokenizer, token: str | None, tokens: Mapping[str, int]) -> int | None:
    if token is not None and token not in tokens:
        raise SourceError(
            f"{chat.name}: its special token {token!r} is not in the merged vocabulary; leave "
            "output.chat to another source"
        )
    return None if token is None else tokens[token]


def _renumbered(chat: SourceTokenizer, what: str, numbers: Any, tokens: Mapping[str, int]) -> Any:
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


def _generation_of(chat: SourceTokenizer, tokens: Mapping[str, int]) -> dict[str, Any] | None:
    """The chat source's generation config, its token numbers being those of the union."""
    if chat.generation is None:
        return None
    settings = dict(chat.generation)
    for key in filter(settings.__contains__, _ID_SETTINGS):
        what = f"{key} of its generation_config.json"
        settings[key] = _renumbered(chat, what, settings[key], tokens)
    return settings
