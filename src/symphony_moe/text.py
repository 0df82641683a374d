"""Text: which documents are held out, and how documents become windows of tokens.

One rule each, shared by calibration, training, evaluation and the training of the bundled models:

- a document is *held out* when the hash of its text falls below the `holdout` share, so that the
  split depends neither on the order of the documents nor on what else there is;
- every document is preceded by the tokenizer's BOS (where it has one), documents are packed end to
  end, and the stream is cut into windows of `sequence_length`. The last, incomplete window is
  dropped. `Packed` windows say where each token stands in its document, so that attention need not
  cross from one document into the next.
"""

import hashlib
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

from symphony_moe.errors import TextError
from symphony_moe.recipe import BUNDLED, Data, HubData

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
    keep: tuple[Callable[[str], bool], ...] = ()
    """What a document must be to be given out."""
    seed: int | None = None
    """Of the order; None: the data set's own."""

    def where(self, condition: Callable[[str], bool]) -> "DocumentStream":
        """The documents that this is true of."""
        return replace(self, keep=(*self.keep, condition))

    def shuffled(self, seed: int) -> "DocumentStream":
        """The documents in an order drawn from `seed`: files in any order, several at a time, and
        their documents among the 10,000 that are read around them."""
        return replace(self, seed=seed)

    def __iter__(self) -> Iterator[str]:
        has_text, useless = False, 0
        for row in _hub_rows(self.who, self.data, self.seed):
            document = _text_of(self.who, row, self.data.column, self.tokenizer)
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

    `share` is a fraction of 1. The first 64 bits of the SHA-256 of the text, read as a fraction of
    2**64, decide, so the same document falls on the same side everywhere.
    """
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


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
            documents.where(lambda document: not is_held_out(f"aside/{document}", share)),
            documents.where(lambda document: is_held_out(f"aside/{document}", share)),
        )

    def place(document: str) -> bytes:
        return hashlib.sha256(f"aside/{document}".encode("utf-8", "surrogatepass")).digest()

    distinct = sorted(set(documents), key=place)
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    chosen = set(distinct[: max(0, count)])
    return [d for d in documents if d not in chosen], [d for d in documents if d in chosen]


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


def pack_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> Int[Tensor, "windows sequence"]:
    """Tokenize documents in the order given and cut the packed stream into windows (int64)."""
    stream = array("i")
    for document in documents:
        stream.extend(_tokenize(document, tokenizer))
    return cut(torch.from_numpy(numpy.asarray(stream)), sequence_length).long()


def cut(stream: Int[Tensor, " stream"], sequence_length: int) -> Int[Tensor, "windows sequence"]:
    """The whole windows of a stream, as a view; what is left over is dropped."""
    whole = len(stream) // sequence_length * sequence_length
    return stream[:whole].view(-1, sequence_length)


def _tokenize(document: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one document, beginning with BOS where the tokenizer has one."""
    # JSON may hold half of a surrogate pair, which is no character; tokenizers refuse it.
    document = document.encode("utf-8", "replace").decode()
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id
    # A chat template may have written BOS into the text already.
    return ids if start is None or ids[:1] == [start] else [start, *ids]


def digest_of(windows: Iterable[Int[Tensor, "_ _"]]) -> str:
    """SHA-256 of windows, one tensor (windows x sequence, of any sizes) after the other."""
    digest = hashlib.sha256()
    for some in windows:
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def draw_windows(
    who: str,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    sequence_length: int,
    seed: int,
) -> Int[Tensor, "windows sequence"]:
    """The windows of `draw_packed` alone (int64)."""
    return draw_packed(
        who, documents, tokenizer, tokens=tokens, sequence_length=sequence_length, seed=seed
    ).windows


def draw_packed(
    who: str,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
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
    stream, places, num_documents = array("i"), array("i"), 0
    for ids in pooled(documents, tokenizer, tokens=wanted * sequence_length, seed=seed):
        stream.extend(ids)
        places.extend(range(len(ids)))
        num_documents += 1
    pool = [
        cut(torch.from_numpy(numpy.asarray(values)), sequence_length) for values in (stream, places)
    ]
    chosen = choose_windows(who, num_documents, len(pool[0]), wanted, sequence_length, seed)
    drawn = packed(pool[0][chosen], pool[1][chosen])
    return Packed(drawn.windows.long(), drawn.positions.long())


def pooled(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int
) -> Iterator[list[int]]:
    """Token ids of one document after the other, in an order drawn from `seed`, until there are
    enough to draw `tokens` of them at random."""
    enough = _POOL * tokens
    ordered: Iterable[str]
    if isinstance(documents, DocumentStream):
        enough = min(enough, tokens + _STREAM_SPARE)
        ordered = documents.shuffled(seed)
    else:
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        ordered = (documents[index] for index in order)
    count = 0
    for document in ordered:
        ids = _tokenize(document, tokenizer)
        yield ids
        count += len(ids)
        if count >= enough:
            return


def choose_windows(
    who: str, num_documents: int, num_windows: int, wanted: int, sequence_length: int, seed: int
) -> Int[Tensor, " chosen"]:
    """Which of a pool's windows are used: `wanted` of them in an order drawn from `seed`, or all
    that there are, with a warning. Raises TextError where there is none."""
    if num_documents == 0:
        raise TextError(
            f"{who}: no document falls on this side of the hold-out (it is decided by the hash of "
            "a document's text); give text in more documents"
        )
    if num_windows == 0:
        raise TextError(
            f"{who}: {num_documents} documents do not fill one window of {sequence_length} "
            "tokens; give more text or set a smaller sequence_length"
        )
    if num_windows < wanted:
        log.warning(
            "%s: %s tokens asked for, the text has %s; using those",
            who, f"{wanted * sequence_length:,}", f"{num_windows * sequence_length:,}",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_windows, generator=generator)[:wanted]


def packed(
    windows: Int[Tensor, "windows sequence"], places: Int[Tensor, "windows sequence"]
) -> Packed:
    """Windows with their positions. `places`: each token's place in its whole document."""
    # A document that began before the window has gone on for longer than the window has.
    return Packed(windows, places.minimum(torch.arange(places.shape[1], dtype=places.dtype)))


def read_documents(
    who: str, data: Data, column: str, tokenizer: PreTrainedTokenizerBase
) -> list[str] | DocumentStream:
    """All documents of a `data` setting, or where it says `streaming`, a stream of them. `who`
    names it in errors.

    Raises TextError for a file that is missing, unreadable, of an unknown kind or without text (a
    stream does when it is read).
    """
    if isinstance(data, HubData) and data.streaming:
        return DocumentStream(who, data, tokenizer)
    if isinstance(data, HubData):
        rows = _hub_rows(who, data)
        documents = [_text_of(who, row, data.column, tokenizer) for row in rows]
    elif isinstance(data, list):
        documents = [d for item in data for d in read_documents(who, item, column, tokenizer)]
    elif data.startswith(BUNDLED):
        from symphony_moe.bundled import corpus

        documents = corpus.documents(data.removeprefix(BUNDLED))
    else:
        documents = list(_file_documents(who, Path(data), column, tokenizer))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise TextError(f"{who}: no text in {_spelled(data)}")
    return documents


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
        if path.suffix not in _READERS:
            raise TextError(f"{who}: {path}: expected one of {', '.join(_READERS)}")
        if path.stat().st_size == 0:
            raise TextError(f"{who}: {path} is empty")


def _spelled(data: Data) -> str:
    return f"dataset {data.hub}" if isinstance(data, HubData) else str(data)


def _file_documents(
    who: str, path: Path, column: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    check_data_exists(who, str(path))
    try:
        for row in _READERS[path.suffix](path):
            yield (
                row if isinstance(row, str) else _text_of(f"{who}: {path}", row, column, tokenizer)
            )
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, TextError):
            raise
        raise TextError(f"{who}: {path} is not readable as {path.suffix}: {error}") from None


def _read_txt(path: Path) -> Iterator[str]:
    """Documents separated by blank lines."""
    lines: list[str] = []
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines = []
    if lines:
        yield "".join(lines)


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}: {error}") from None


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


_READERS = {".jsonl": _read_jsonl, ".txt": _read_txt, ".parquet": _read_parquet}


def _text_of(who: str, row: Any, column: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a row: a named column, or a chat in `messages` through the chat template."""
    if isinstance(row, dict) and column not in row and "messages" in row:
        column = "messages"
    if not isinstance(row, dict) or column not in row:
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise TextError(f"{who}: expected a column {column!r} in every row; a row has: {has}")
    value = row[column]
    if isinstance(value, list):
        if not getattr(tokenizer, "chat_template", None):
            raise TextError(
                f"{who}: {column!r} holds chats, but the tokenizer has no chat template"
            )
        try:
            return str(tokenizer.apply_chat_template(value, tokenize=False))
        except Exception as error:
            # Templates are programs of the model's authors and refuse chats in their own ways.
            raise TextError(f"{who}: the chat template refuses a chat: {error}") from None
    if not isinstance(value, str):
        raise TextError(f"{who}: {column!r} holds {type(value).__name__}; expected text")
    return value


def _hub_rows(who: str, data: HubData, seed: int | None = None) -> Iterator[Any]:
    """Rows of a data set; of a streamed one, in an order drawn from `seed` where there is one."""
    import datasets

    try:
        rows = datasets.load_dataset(
            data.hub, data.name, split=data.split, revision=data.revision, streaming=data.streaming
        )
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        yield from rows
    except Exception as error:
        # Not there, no such split, no connection or none any more (after the library's own
        # retries): it raises many kinds, some with many lines.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TextError(f"{who}: dataset {data.hub!r} cannot be loaded: {reason}") from None
