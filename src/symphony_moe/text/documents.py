"""Files and datasets -> documents, and which of them are held out."""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from transformers import PreTrainedTokenizerBase

from symphony_moe.errors import TextError, first_line, if_mistyped
from symphony_moe.recipe.settings import BUNDLED, ChatRules, Data, HubData
from symphony_moe.text.file_formats import READERS, hint_for, of_columns
from symphony_moe.text.rows import MESSAGES, Document
from symphony_moe.text.rows import read_row as _text_of

log = logging.getLogger(__name__)

_SHUFFLE_BUFFER = 10_000
"""Documents that a stream is shuffled among: what it holds in memory."""

PATIENCE = 1_000_000
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
            if useless >= PATIENCE:
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
    return int.from_bytes(_sha256(key)[:8], "big") < share * 2**64


def _sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _salted(document: str) -> str:
    """What decides whether a document is for validation. It must never change: a recipe would get
    other text."""
    return f"aside/{_key(document)}"


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
def split_validation(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]: ...


@overload
def split_validation(
    documents: DocumentStream, share: float
) -> tuple[DocumentStream, DocumentStream]: ...


def split_validation(documents: Documents, share: float) -> tuple[Documents, Documents]:
    """(documents to fit on, documents to validate a fit by), each in the order given.

    The documents with the smallest hashes are for validation: `share` of them and at least one, but
    never the only one. They are whole documents with all their copies, as windows of one document
    know one another. A stream is never seen whole. Of it, those whose hash falls below `share` are
    for validation: as many on average.
    """
    if isinstance(documents, DocumentStream):
        return (
            documents.where(lambda document: not _falls_below(_salted(document), share)),
            documents.where(lambda document: _falls_below(_salted(document), share)),
        )

    distinct = sorted({_key(d) for d in documents}, key=lambda key: _sha256(_salted(key)))
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    chosen = set(distinct[: max(0, count)])
    return (
        [d for d in documents if _key(d) not in chosen],
        [d for d in documents if _key(d) in chosen],
    )


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
            who,
            len(documents) - len(found),
            len(documents),
        )
    return found


def refuse_unreadable(
    who: str,
    data: Data,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    rules: ChatRules = MESSAGES,
) -> None:
    """Raise TextError as `read_documents` does for the first row of every local file. No more is
    read, and nothing of the hub."""
    for item in data if isinstance(data, list) else [data]:
        if isinstance(item, str) and not item.startswith(BUNDLED):
            next(_documents(who, item, column, tokenizer, rules), None)


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
        yield from _bundled(data.removeprefix(BUNDLED))
    else:
        yield from _file_documents(who, Path(data), column, tokenizer, rules)


@functools.cache
def _bundled(domain: str) -> tuple[Document, ...]:
    """The documents of a bundled domain. They take seconds to make, and stay."""
    from symphony_moe.bundled import corpus

    return tuple(map(Document, corpus.make_documents(domain)))


def check_data_exists(who: str, data: Data) -> None:
    """Raise TextError for files that are missing or of an unknown kind, without reading any."""
    if isinstance(data, list):
        if not data:
            raise TextError(f"{who}: data is an empty list; expected at least one file")
        for item in data:
            check_data_exists(who, item)
    elif isinstance(data, str) and data.startswith(BUNDLED):
        from symphony_moe.bundled import corpus

        known = (*corpus.DOMAINS, *corpus.OUT_OF_DOMAIN)
        if data.removeprefix(BUNDLED) not in known:
            raise TextError(f"{who}: no bundled text {data!r}; there is: {', '.join(known)}")
    elif isinstance(data, str):
        _check_file_exists(who, Path(data))


def _check_file_exists(who: str, path: Path) -> None:
    if path.is_dir():
        raise TextError(
            f"{who}: {path} is a folder; name its files, or {{hub: {path}}} for a dataset"
        )
    if not path.is_file():
        raise TextError(f"{who}: no such data file: {path}{if_mistyped(path)}")
    if path.suffix.lower() not in READERS:
        raise TextError(f"{who}: {path}: expected one of {', '.join(READERS)}{hint_for(path)}")
    if path.stat().st_size == 0:
        raise TextError(f"{who}: {path} is empty")


def _spelled(data: Data) -> str:
    return f"dataset {data.hub}" if isinstance(data, HubData) else str(data)


def _file_documents(
    who: str, path: Path, column: str, tokenizer: PreTrainedTokenizerBase, rules: ChatRules
) -> Iterator[Document]:
    check_data_exists(who, str(path))
    kind = path.suffix.lower()
    try:
        for where, row in READERS[kind](path):
            if isinstance(row, str) and kind == ".txt":
                yield Document(row)
            else:
                yield _text_of(f"{who}: {path}, {where}", row, column, tokenizer, rules)
    except (OSError, ValueError) as error:
        if isinstance(error, TextError):
            raise
        reason = first_line(error)[:200]
        raise TextError(f"{who}: {path} is not readable as {kind}: {reason}") from None


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
            yield f"{who}: dataset {data.hub}, row {number}", of_columns(row)
    except Exception as error:
        # Not there, no such split, no connection or none any more (after the library's own
        # retries): it raises many kinds, some with many lines.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TextError(f"{who}: dataset {data.hub!r} cannot be loaded: {reason[:300]}") from None
