"""Text: which documents are held out, and how documents become windows of tokens.

One rule each, shared by calibration, training, evaluation and the training of the bundled models:

- a document is *held out* when the hash of its row, as it is stored, falls below the `holdout`
  share, so that the split depends neither on the order of the documents nor on what else there is,
  nor on a chat template or the date;
- a document begins with what its own tokenizer puts before a text, and ends with that tokenizer's
  EOS, once. A chat is what the chat template writes, and EOS;
- documents are packed end to end, and the stream is cut into windows of `sequence_length`. The
  last, incomplete window is dropped. `Packed` windows say where each token stands in its document:
  the first token of a document is never a target, and attention need not cross from one document
  into the next;
- held-out text is not cut into such windows: every document is read on its own (`Pieces`).
"""

import hashlib
import itertools
import json
import logging
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from symphony_moe.errors import SourceError, TextError, first_line
from symphony_moe.recipe import BUNDLED, ChatRules, Data, HubData
from symphony_moe.rows import MESSAGES, Document, without_empty
from symphony_moe.rows import read_row as _text_of

log = logging.getLogger(__name__)

_POOL = 4
"""Windows are drawn from this many times the tokens asked for (or from all there is)."""

_STREAM_SPARE = 2**24
"""But from no more tokens of a stream than this, beyond those asked for."""

_SHUFFLE_BUFFER = 10_000
"""Documents that a stream is shuffled among: what it holds in memory."""

_PATIENCE = 1_000_000
"""A stream is given up after so many documents in a row that are of no use."""


@dataclass(frozen=True)
class DocumentStream:
    """Documents of a streamed data set: every iteration reads it anew, and only as far as it goes.

    Iterating raises TextError, which `who` names, for a data set that cannot be read or has no
    text, and where a million documents in a row are of no use (an endless stream would be read
    forever).
    """

    who: str
    data: HubData
    tokenizer: PreTrainedTokenizerBase
    """Whose chat template spells chats."""
    rules: ChatRules = MESSAGES
    keep: tuple[Callable[[Document], bool], ...] = ()
    """What a document must be to be given out."""
    seed: int | None = None
    """Of the order; None: the data set's own."""

    def where(self, condition: Callable[[Document], bool]) -> "DocumentStream":
        """The documents that this is true of."""
        return replace(self, keep=(*self.keep, condition))

    def shuffled(self, seed: int) -> "DocumentStream":
        """The documents in an order drawn from `seed`: files in any order, several at a time, and
        their documents among the 10,000 that are read around them."""
        return replace(self, seed=seed)

    def __iter__(self) -> Iterator[Document]:
        has_text, useless = False, 0
        for where, row in _hub_rows(self.who, self.data, self.seed):
            document = _text_of(where, row, self.data.column, self.tokenizer, self.rules)
            has_text = has_text or bool(document.strip())
            if document.strip() and all(condition(document) for condition in self.keep):
                useless = 0
                yield document
                continue
            useless += 1
            if useless >= _PATIENCE:
                raise TextError(
                    f"{self.who}: {useless:,} documents of {_spelled(self.data)} in a row are "
                    "empty or fall on the other side of the hold-out; give text in more documents"
                )
        if not has_text:
            raise TextError(f"{self.who}: no text in {_spelled(self.data)}")


Documents = Sequence[str] | DocumentStream
"""All documents of a text, or a stream of them."""


def is_held_out(document: str, share: float) -> bool:
    """Whether a document belongs to the held-out text, which is for evaluation only.

    `share` is a fraction of 1. The first 64 bits of the SHA-256 of the row as it is stored (of a
    plain document: its text), read as a fraction of 2**64, decide, so the same document falls on
    the same side everywhere, whoever's template spells it.
    """
    return _falls_below(_key(document), share)


def _falls_below(key: str, share: float) -> bool:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _key(document: str) -> str:
    """What decides a document's side."""
    return document.key if isinstance(document, Document) else document


def split_held_out(documents: Documents, share: float) -> tuple[Documents, Documents]:
    """(documents to train on, held-out documents), each in the order given."""
    if isinstance(documents, DocumentStream):
        return (
            documents.where(lambda document: not is_held_out(document, share)),
            documents.where(lambda document: is_held_out(document, share)),
        )
    held_out = [is_held_out(document, share) for document in documents]
    return (
        [d for d, out in zip(documents, held_out, strict=True) if not out],
        [d for d, out in zip(documents, held_out, strict=True) if out],
    )


@overload
def split_aside(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]: ...
@overload
def split_aside(
    documents: DocumentStream, share: float
) -> tuple[DocumentStream, DocumentStream]: ...
def split_aside(documents: Documents, share: float) -> tuple[Documents, Documents]:
    """(documents to fit on, documents to judge a fit by), each in the order given.

    Those with the smallest hashes are set aside, `share` of them and at least one, but never the
    only one. Whole documents, with all their copies: windows of one document know one another. Of
    a stream, which is never seen whole, those whose hash falls below `share` are set aside: as
    many on average.
    """
    if isinstance(documents, DocumentStream):
        return (
            documents.where(lambda document: not _falls_below(f"aside/{document.key}", share)),
            documents.where(lambda document: _falls_below(f"aside/{document.key}", share)),
        )

    def place(key: str) -> bytes:
        return hashlib.sha256(f"aside/{key}".encode("utf-8", "surrogatepass")).digest()

    distinct = sorted({_key(document) for document in documents}, key=place)
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    chosen = set(distinct[: max(0, count)])
    return (
        [d for d in documents if _key(d) not in chosen],
        [d for d in documents if _key(d) in chosen],
    )


@dataclass(frozen=True)
class Encoder:
    """How the documents of one source become tokens."""

    tokenizer: PreTrainedTokenizerBase
    """What cuts text: the source's own, or that of the vocabulary that all sources share."""
    begin: tuple[int, ...] = ()
    """What the source's own tokenizer puts before a text: BOS, where it adds one."""
    end: int | None = None
    """The source's EOS; None where it has none."""
    end_text: str = ""
    """What EOS says."""

    @staticmethod
    def of(
        own: PreTrainedTokenizerBase,
        shared: PreTrainedTokenizerBase | None = None,
        config_eos: Any = None,
    ) -> "Encoder":
        """As the source's `own` tokenizer begins and ends documents, in the numbers of the
        `shared` one. `config_eos`: `eos_token_id` of the model's config (a number, or a list with
        the main one first), for a tokenizer that names none."""
        shared = own if shared is None else shared
        eos = own.eos_token
        if eos is None and config_eos not in (None, []):
            number = config_eos[0] if isinstance(config_eos, list) else config_eos
            eos = {value: token for token, value in own.get_vocab().items()}.get(number)
        numbers = shared.get_vocab()
        begin = [str(own.convert_ids_to_tokens(number)) for number in _added_before(own)]
        lost = [token for token in begin if token not in numbers]
        if lost:
            raise SourceError(
                f"a source's tokenizer puts {lost[0][:40]!r} before every text, and the shared "
                "vocabulary does not have it; list it among the added tokens of that source's "
                "tokenizer.json, or use sources of one tokenizer"
            )
        return Encoder(
            shared,
            tuple(numbers[token] for token in begin),
            numbers.get(str(eos)) if eos is not None else None,
            "" if eos is None else str(eos),
        )

    def encode(self, document: str) -> list[int]:
        """Token ids of one document. A chat is as its template wrote it; of plain text, what comes
        first is not put there a second time."""
        ids = _tokenize(document, self.tokenizer)
        begin = list(self.begin)
        is_chat = isinstance(document, Document) and document.is_chat
        if not is_chat and ids[: len(begin)] != begin:
            ids = begin + ids
        # A template may write a line break behind it.
        has_ended = ids[-1:] == [self.end] or document.rstrip().endswith(self.end_text)
        return ids if self.end is None or has_ended else [*ids, self.end]


def _added_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before a text by itself."""
    ordinary = (tokenizer.decode([number]) for number in range(min(512, len(tokenizer))))
    for text in itertools.chain(("a", "A", "1"), ordinary):
        alone, whole = (
            list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
            for special in (False, True)
        )
        # From behind: the text may be cut into what stands before it.
        for first in reversed(range(len(whole) - len(alone) + 1)):
            if alone and whole[first : first + len(alone)] == alone:
                return whole[:first]
    return []  # it makes nothing of any text


@dataclass(frozen=True)
class Packed:
    """Windows of documents packed end to end, and where their tokens stand.

    Stock models that are given `positions` as `position_ids`, no attention mask and no cache
    (`use_cache=False`) take every 0 for the beginning of a text of its own, and attend to nothing
    before it.
    """

    windows: Int[Tensor, "windows sequence"]
    positions: Int[Tensor, "windows sequence"]
    """A token's place in its document, counted from 0 at the document's beginning, or at the
    window's where the document began before it."""

    def __len__(self) -> int:
        """Windows."""
        return len(self.windows)

    @property
    def labels(self) -> Int[Tensor, "windows sequence"]:
        """What a stock model is to foretell: the tokens, but -100 for the first of a document."""
        return self.windows.masked_fill(self.positions == 0, -100)

    def __getitem__(self, rows: Any) -> "Packed":
        """Some of the windows."""
        return Packed(self.windows[rows], self.positions[rows])


def joined(parts: Sequence[Packed]) -> Packed:
    """The windows of several texts, one text after the other."""
    return Packed(
        torch.cat([part.windows for part in parts]), torch.cat([part.positions for part in parts])
    )


def pack_windows(documents: Iterable[str], encoder: Encoder, sequence_length: int) -> Packed:
    """Documents in the order given, packed end to end and cut into windows (int64)."""
    encoded = (encoder.encode(document) for document in documents)
    windows, places, _ = _end_to_end(encoded, sequence_length)
    return packed(windows.long(), places.long())


def _end_to_end(
    encoded: Iterable[list[int]], sequence_length: int
) -> tuple[Int[Tensor, "windows sequence"], Int[Tensor, "windows sequence"], int]:
    """(windows of documents' tokens end to end, each token's place in its document, number of
    documents), int32."""
    stream, places, num_documents = array("i"), array("i"), 0
    for ids in encoded:
        stream.extend(ids)
        places.extend(range(len(ids)))
        num_documents += 1
    windows, of_documents = (
        cut(torch.from_numpy(numpy.asarray(values)), sequence_length) for values in (stream, places)
    )
    return windows, of_documents, num_documents


def cut(stream: Int[Tensor, " stream"], sequence_length: int) -> Int[Tensor, "windows sequence"]:
    """The whole windows of a stream, as a view; what is left over is dropped."""
    whole = len(stream) // sequence_length * sequence_length
    return stream[:whole].view(-1, sequence_length)


def _tokenize(document: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text alone."""
    # JSON may hold half of a surrogate pair, which is no character; tokenizers refuse it.
    text = str.encode(document, "utf-8", "replace").decode()
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def digest_of(windows: Iterable[Int[Tensor, "_ _"]]) -> str:
    """SHA-256 of windows, one tensor (windows x sequence, of any sizes) after the other."""
    digest = hashlib.sha256()
    for some in windows:
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def draw_packed(
    who: str,
    documents: Documents,
    encoder: Encoder,
    *,
    tokens: int,
    sequence_length: int,
    seed: int,
) -> Packed:
    """Windows drawn at random over the whole text, `tokens` in total (rounded down to whole
    windows, at least one), int64, in memory.

    Documents are packed in an order drawn from `seed`, up to four times the tokens asked for (of a
    stream, no more than 2**24 tokens beyond them: what is left of it is never read), and the
    windows are drawn from those without repetition. Less text than asked for is said in a warning
    and used as it is; text that does not fill one window raises TextError. `who` names the text in
    both.
    """
    wanted = max(1, tokens // sequence_length)
    encoded = pooled(documents, encoder, tokens=wanted * sequence_length, seed=seed)
    windows, places, num_documents = _end_to_end(encoded, sequence_length)
    chosen = choose_windows(who, num_documents, len(windows), wanted, sequence_length, seed)
    drawn = packed(windows[chosen], places[chosen])
    return Packed(drawn.windows.long(), drawn.positions.long())


def pooled(
    documents: Documents, encoder: Encoder, *, tokens: int, seed: int
) -> Iterator[list[int]]:
    """Token ids of one document after the other, in an order drawn from `seed`, until there are
    enough to draw `tokens` of them at random."""
    enough = _POOL * tokens
    if isinstance(documents, DocumentStream):
        enough = min(enough, tokens + _STREAM_SPARE)
    count = 0
    for document in _shuffled(documents, seed):
        ids = encoder.encode(document)
        yield ids
        count += len(ids)
        if count >= enough:
            return


def _shuffled(documents: Documents, seed: int) -> Iterable[str]:
    if isinstance(documents, DocumentStream):
        return documents.shuffled(seed)
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return (documents[index] for index in order)


@dataclass(frozen=True)
class Pieces:
    """Documents that are read each on its own, in pieces no longer than a model reads at once."""

    tokens: Int[Tensor, " tokens"]
    """One piece after the other (int64)."""
    positions: Int[Tensor, " tokens"]
    """A token's place in its piece (int64). The one at place 0 is never a target."""
    sequence_length: int
    """The longest that a piece can be."""

    @property
    def windows(self) -> Int[Tensor, "windows sequence"]:
        """The same tokens in windows, across the ends of documents: for measurements that compare
        models on the same input, and no losses."""
        return cut(self.tokens, self.sequence_length)

    def batches(self, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, positions), each 1 x some: whole pieces, together no more than `at_once` tokens
        or one piece. Stock models read each piece by itself where they get the positions as
        `position_ids`, no attention mask and no cache."""
        begins = torch.where(self.positions == 0)[0].tolist()
        ends = [*begins[1:], len(self.tokens)]
        first = 0
        for begin, end in zip(begins, ends, strict=True):
            if end - first > at_once and begin > first:
                yield self.tokens[None, first:begin], self.positions[None, first:begin]
                first = begin
        if first < len(self.tokens):
            yield self.tokens[None, first:], self.positions[None, first:]


def as_pieces(windows: Int[Tensor, "windows sequence"]) -> Pieces:
    """Windows that are read each on its own."""
    count, length = windows.shape
    return Pieces(windows.flatten(), torch.arange(length).repeat(count), length)


def draw_pieces(
    who: str,
    documents: Documents,
    encoder: Encoder,
    *,
    tokens: int,
    sequence_length: int,
    seed: int,
) -> Pieces:
    """Whole documents in an order drawn from `seed`, until there are `tokens` tokens (rounded down
    to whole windows, at least one). A document longer than `sequence_length` is several pieces.

    Less text than asked for, and too little, are told as by `draw_packed`.
    """
    wanted = max(1, tokens // sequence_length) * sequence_length
    stream, places, num_documents = array("i"), array("i"), 0
    for document in _shuffled(documents, seed):
        ids = encoder.encode(document)[: wanted - len(stream)]
        stream.extend(ids)
        places.extend(place % sequence_length for place in range(len(ids)))
        num_documents += 1
        if len(stream) == wanted:
            break
    _refuse_too_little(who, num_documents, len(stream), sequence_length)
    if len(stream) < wanted:
        _say_less(who, wanted, len(stream))
    text, positions = (
        torch.from_numpy(numpy.asarray(values)).long() for values in (stream, places)
    )
    return Pieces(text, positions, sequence_length)


def _refuse_too_little(who: str, num_documents: int, tokens: int, sequence_length: int) -> None:
    """TextError for text that does not fill a window."""
    if num_documents == 0:
        raise TextError(
            f"{who}: no document falls on this side of the hold-out (it is decided by the hash of "
            "a document's row); give text in more documents"
        )
    if tokens < sequence_length:
        raise TextError(
            f"{who}: {num_documents} documents do not fill one window of {sequence_length} "
            "tokens; give more text or set a smaller sequence_length"
        )


def _say_less(who: str, wanted: int, found: int) -> None:
    log.warning(
        "%s: %s tokens asked for, the text has %s; using those", who, f"{wanted:,}", f"{found:,}"
    )


def choose_windows(
    who: str, num_documents: int, num_windows: int, wanted: int, sequence_length: int, seed: int
) -> Int[Tensor, " chosen"]:
    """Which of a pool's windows are used: `wanted` of them in an order drawn from `seed`, or all
    that there are, with a warning. Raises TextError where there is none."""
    _refuse_too_little(who, num_documents, num_windows * sequence_length, sequence_length)
    if num_windows < wanted:
        _say_less(who, wanted * sequence_length, num_windows * sequence_length)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_windows, generator=generator)[:wanted]


def packed(
    windows: Int[Tensor, "windows sequence"], places: Int[Tensor, "windows sequence"]
) -> Packed:
    """Windows with their positions. `places`: each token's place in its whole document."""
    # A document that began before the window has gone on for longer than the window has.
    return Packed(windows, places.minimum(torch.arange(places.shape[1], dtype=places.dtype)))


def read_documents(
    who: str,
    data: Data,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    rules: ChatRules = MESSAGES,
) -> list[Document] | DocumentStream:
    """All documents of a `data` setting, or where it says `streaming`, a stream of them. `who`
    names it in errors, `tokenizer` spells chats. How many documents are empty is said.

    Raises TextError for a file that is missing, unreadable, of an unknown kind or without text, and
    for a row that is neither text nor a chat, with its place (a stream does when it is read).
    """
    if isinstance(data, HubData) and data.streaming:
        return DocumentStream(who, data, tokenizer, rules)
    documents = list(_documents(who, data, column, tokenizer, rules))
    found = [document for document in documents if document.strip()]
    if not found:
        raise TextError(
            f"{who}: no text in {_spelled(data)}"
            + (f" (all {len(documents)} documents are empty)" if documents else "")
        )
    if len(found) < len(documents):
        log.warning(
            "%s: %d of %d documents are empty and left out",
            who, len(documents) - len(found), len(documents),
        )  # fmt: skip
    return found


def _documents(
    who: str, data: Data, column: str, tokenizer: PreTrainedTokenizerBase, rules: ChatRules
) -> Iterator[Document]:
    if isinstance(data, HubData):
        for where, row in _hub_rows(who, data):
            yield _text_of(where, row, data.column, tokenizer, rules)
    elif isinstance(data, list):
        for item in data:
            yield from _documents(who, item, column, tokenizer, rules)
    elif data.startswith(BUNDLED):
        from symphony_moe.bundled import corpus

        yield from map(Document, corpus.documents(data.removeprefix(BUNDLED)))
    else:
        yield from _file_documents(who, Path(data), column, tokenizer, rules)


def check_data_exists(who: str, data: Data) -> None:
    """Raise TextError for files that are missing or of an unknown kind, without reading any."""
    if isinstance(data, list):
        if not data:
            raise TextError(f"{who}: data is an empty list; expected at least one file")
        for item in data:
            check_data_exists(who, item)
    elif isinstance(data, str) and data.startswith(BUNDLED):
        from symphony_moe.bundled import corpus

        known = (*corpus.DOMAINS, corpus.OUT_OF_DOMAIN)
        if data.removeprefix(BUNDLED) not in known:
            raise TextError(f"{who}: no bundled text {data!r}; there is: {', '.join(known)}")
    elif isinstance(data, str):
        path = Path(data)
        if path.is_dir():
            raise TextError(
                f"{who}: {path} is a folder; name its files, or {{hub: {path}}} for a dataset"
            )
        if not path.is_file():
            raise TextError(f"{who}: no such data file: {path}")
        if path.suffix.lower() not in _READERS:
            raise TextError(f"{who}: {path}: expected one of {', '.join(_READERS)}{_hint(path)}")
        if path.stat().st_size == 0:
            raise TextError(f"{who}: {path} is empty")


def _hint(path: Path) -> str:
    """What reads a file of another kind."""
    kind = path.suffix.lower()
    if kind in (".gz", ".zst", ".bz2", ".xz", ".csv", ".tsv", ".json", ".arrow"):
        return (
            f"; the datasets library reads {kind} files: put it into a folder of its own and "
            "write data: {hub: FOLDER, column: ...}"
        )
    return ""


def _spelled(data: Data) -> str:
    return f"dataset {data.hub}" if isinstance(data, HubData) else str(data)


def _file_documents(
    who: str, path: Path, column: str, tokenizer: PreTrainedTokenizerBase, rules: ChatRules
) -> Iterator[Document]:
    check_data_exists(who, str(path))
    kind = path.suffix.lower()
    try:
        for where, row in _READERS[kind](path):
            if isinstance(row, str) and kind == ".txt":
                yield Document(row)
            else:
                yield _text_of(f"{who}: {path}, {where}", row, column, tokenizer, rules)
    except (OSError, ValueError) as error:
        if isinstance(error, TextError):
            raise
        reason = first_line(error)[:200]
        raise TextError(f"{who}: {path} is not readable as {kind}: {reason}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of a file's lines. Raises ValueError for one that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line {number} is not UTF-8 (byte {error.object[error.start]:#04x} at its "
                    f"position {error.start}); save the file as UTF-8"
                ) from None


def _read_txt(path: Path) -> Iterator[tuple[str, str]]:
    """Documents separated by blank lines."""
    lines: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            # Line breaks as Python reads them in text.
            lines.append(line.replace("\r\n", "\n"))
        elif lines:
            yield "", "".join(lines)
            lines = []
    if lines:
        yield "", "".join(lines)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:  # no JSON, or a number of thousands of digits
                raise ValueError(f"line {number}: {error}") from None
            except RecursionError:
                raise ValueError(f"line {number} is nested too deeply") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", _of_columns(row)
    except (pyarrow.ArrowException, OverflowError, RecursionError) as error:
        raise ValueError(f"row {number + 1}: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl, ".txt": _read_txt, ".parquet": _read_parquet,
}  # fmt: skip


def _of_columns(row: Any) -> Any:
    """A row of a columnar file as it was before it was stored: such files give every table in a
    list the keys of all others, empty. Of a message only `content` may be meant to be empty."""
    if not isinstance(row, dict):
        return row
    return {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    if not isinstance(value, list):
        return without_empty(value) if isinstance(value, dict) else value
    return [
        without_empty(item) | ({"content": None} if item.get("content", "") is None else {})
        if isinstance(item, dict)
        else item
        for item in value
    ]


def _hub_rows(who: str, data: HubData, seed: int | None = None) -> Iterator[tuple[str, Any]]:
    """(place, row) of a data set; of a streamed one, in an order drawn from `seed` where there is
    one."""
    import datasets

    try:
        rows = datasets.load_dataset(
            data.hub, data.name, split=data.split, revision=data.revision, streaming=data.streaming
        )
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        for number, row in enumerate(rows, start=1):
            yield f"{who}: dataset {data.hub}, row {number}", _of_columns(row)
    except Exception as error:
        # Not there, no such split, no connection or none any more (after the library's own
        # retries): it raises many kinds, some with many lines.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TextError(f"{who}: dataset {data.hub!r} cannot be loaded: {reason[:300]}") from None
