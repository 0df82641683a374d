"""The documents of one domain: read, split and tokenised once, as far as there is room for them."""

import hashlib
import json
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from sys import getsizeof

from transformers import PreTrainedTokenizerBase

from symphony_moe import __version__
from symphony_moe.recipe.settings import ChatRules, Data
from symphony_moe.text.documents import (
    Documents,
    DocumentStream,
    read_documents,
    refuse_unreadable,
    split_held_out,
    split_validation,
)
from symphony_moe.text.memory_maps import draw_to_files, rules_of, stamp, stays_in_memory
from symphony_moe.text.rows import MESSAGES, Document
from symphony_moe.text.windows import Encoder, Packed, WindowDraw, draw_packed

log = logging.getLogger(__name__)

VALIDATION_SHARE = 1 / 8
"""Share of a source's documents that a fit is validated by."""

_PER_DOCUMENT = 256
"""Bytes that Python takes for a document's places in lists and tables, about."""


@dataclass
class Room:
    """How much may still be kept in memory."""

    free: int
    """Bytes."""

    def take(self, size: int) -> bool:
        """Whether there was room for so many bytes. It is taken then."""
        if size > self.free:
            return False
        self.free -= size
        return True


@dataclass(frozen=True)
class DomainReading:
    """Where the documents of a domain are, and how they are read."""

    data: Data
    column: str
    tokenizer: PreTrainedTokenizerBase
    """Whose chat template spells chats."""
    rules: ChatRules = MESSAGES


@dataclass(frozen=True)
class Sides:
    """The documents of a domain by what they are for."""

    training: Documents
    """To calibrate and train on."""
    held_out: Documents
    """To evaluate on."""

    @cached_property
    def of_fit(self) -> tuple[Documents, Documents]:
        """Those to train on: (documents to fit on, documents to validate a fit by)."""
        return split_validation(self.training, VALIDATION_SHARE)

    def trained_on(self, *, is_validated: bool) -> Documents:
        """Those that a training sees. `is_validated`: by the documents that validate a fit."""
        return self.of_fit[0] if is_validated else self.training


class Domain:
    """The documents of one domain and the tokens that they become.

    What was read and tokenised is kept for the next one who asks, where `room` has the bytes for
    it. Documents that do not fit are read again each time, and so are those of a stream.
    """

    def __init__(
        self, reading: DomainReading, encoder: Encoder, holdout: float, room: Room
    ) -> None:
        """`holdout`: the share of the documents that is held out, a fraction of 1."""
        self._reading, self._encoder = reading, encoder
        self._holdout, self._room = holdout, room
        self._kept: Sides | None = None
        self._tokens: dict[tuple[str, bool], array[int]] = {}

    def sides(self, who: str) -> Sides:
        """The documents. `who` names the text in errors and warnings. Raises TextError as
        `read_documents` does."""
        if self._kept is not None:
            return self._kept
        of = self._reading
        documents = read_documents(who, of.data, of.column, of.tokenizer, of.rules)
        sides = Sides(*split_held_out(documents, self._holdout))
        if not isinstance(documents, DocumentStream):
            size = sum(document.memory + _PER_DOCUMENT for document in documents)
            if self._room.take(size):
                self._kept = sides
            else:
                log.debug("%s: %d bytes of documents are not kept", who, size)
        return sides

    def refuse_unreadable(self, who: str) -> None:
        """Raise TextError for a file whose first row cannot be read."""
        of = self._reading
        refuse_unreadable(who, of.data, of.column, of.tokenizer, of.rules)

    def encode(self, document: str) -> Sequence[int]:
        """Token ids of one document (see `Encoder.encode`)."""
        # A chat and a plain text of the same letters begin otherwise.
        key = (document, isinstance(document, Document) and document.is_chat)
        tokens = self._tokens.get(key)
        if tokens is None:
            tokens = array("i", self._encoder.encode(document))
            if self._kept is not None and self._room.take(getsizeof(tokens) + _PER_DOCUMENT):
                self._tokens[key] = tokens
        return tokens

    def training_windows(
        self, who: str, drawing: WindowDraw, folder: Path, *, is_validated: bool = False
    ) -> Packed:
        """The windows that `draw_packed` draws from the documents to train on (see
        `Sides.trained_on`).

        Up to 256 MiB of them are int64 in memory. More are int32 in files under `folder`, which may
        hold several texts (see `draw_to_files`). They are taken as they are where they were made of
        the same.
        """

        def documents() -> Documents:
            return self.sides(who).trained_on(is_validated=is_validated)

        if stays_in_memory(drawing):
            return draw_packed(who, documents(), self, drawing)
        final = folder / self._digest(drawing, is_validated=is_validated)[:16]
        return draw_to_files(who, documents, self, drawing, final)

    def _digest(self, drawing: WindowDraw, *, is_validated: bool) -> str:
        """SHA-256 of all that decides which text to train on is drawn."""
        reading, encoder = self._reading, self._encoder
        own = reading.tokenizer
        numbers = [self._holdout, drawing.tokens, drawing.sequence_length, drawing.seed]
        made_from = {
            "version": __version__,
            "data": stamp(reading.data),
            "column": reading.column,
            "chats": [own.chat_template, own.special_tokens_map, str(reading.rules)],
            "tokenizer": [*rules_of(encoder.tokenizer), encoder.begin, encoder.end],
            "numbers": numbers,
            **({"validated by": VALIDATION_SHARE} if is_validated else {}),
        }
        content = json.dumps(made_from, sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()
