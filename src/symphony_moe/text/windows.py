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
import logging
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from symphony_moe.errors import SourceError, TextError
from symphony_moe.text.coverage import covering_windows
from symphony_moe.text.documents import Documents, DocumentStream
from symphony_moe.text.rows import Document

log = logging.getLogger(__name__)

_POOL, _POOL_TO_COVER = 4, 16
"""Windows are drawn from this many times the tokens asked for, or from all there is: at random, and
where half of them are chosen for coverage."""

_SPARE = 2**24
"""Of a stream no more tokens are read than this, beyond those asked for. Nor are they for coverage,
unless four times the tokens asked for are more."""


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


@runtime_checkable
class Encodes(Protocol):
    """What makes tokens of documents: an `Encoder`, or one that remembers them."""

    def encode(self, document: str, /) -> Sequence[int]:
        """A document's tokens."""
        ...


@dataclass(frozen=True)
class WindowDraw:
    """How much is drawn of a text, in windows of which length, and by which seed."""

    tokens: int
    sequence_length: int
    seed: int
    covers: bool = False
    """Half of the windows are those that add the most different tokens and pairs of tokens."""

    @property
    def windows(self) -> int:
        """Whole windows that `tokens` fill: one at least."""
        return max(1, self.tokens // self.sequence_length)

    @property
    def whole(self) -> int:
        """Tokens of those windows."""
        return self.windows * self.sequence_length


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


def pack_windows(documents: Iterable[str], encoder: Encodes, sequence_length: int) -> Packed:
    """Documents in the order given, packed end to end and cut into windows (int64)."""
    encoded = (encoder.encode(document) for document in documents)
    windows, places, _ = _end_to_end(encoded, sequence_length)
    return packed(windows.long(), places.long())


def _end_to_end(
    encoded: Iterable[Sequence[int]], sequence_length: int
) -> tuple[Int[Tensor, "windows sequence"], Int[Tensor, "windows sequence"], int]:
    """(windows of documents' tokens end to end, each token's place in its document, number of
    documents), int32."""
    stream, places, num_documents = array("i"), array("i"), 0
    for ids in encoded:
        stream.extend(ids)
        places.extend(range(len(ids)))
        num_documents += 1
    windows, of_documents = (
        into_windows(torch.from_numpy(numpy.asarray(values)), sequence_length)
        for values in (stream, places)
    )
    return windows, of_documents, num_documents


def into_windows(
    stream: Int[Tensor, " stream"], sequence_length: int
) -> Int[Tensor, "windows sequence"]:
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


def draw_packed(who: str, documents: Documents, encoder: Encodes, drawing: WindowDraw) -> Packed:
    """Windows drawn over the whole text (int64, in memory): at random, or half of them for what
    they add to the others.

    Documents are packed in an order drawn from the seed. There are up to four times the tokens
    asked for. For coverage there are 16 times as many, but no more than 2**24 beyond those asked
    for, or four times as many. Of a stream there are never more than 2**24 beyond those asked for:
    the rest is not read. The windows are drawn from the pack without repetition, in an order drawn
    from the seed. Less text than asked for is said in a warning and used as it is. Text that
    does not fill one window raises TextError. `who` names the text in both.
    """
    encoded = pooled(documents, encoder, drawing)
    windows, places, num_documents = _end_to_end(encoded, drawing.sequence_length)
    chosen = choose_windows(who, num_documents, len(windows), drawing)
    if drawing.covers and 1 < len(chosen) < len(windows):
        first = chosen[: (len(chosen) + 1) // 2].tolist()
        log.info("%s: choosing windows among %s", who, f"{len(windows):,}")
        both = torch.tensor(first + covering_windows(windows, len(chosen) - len(first), first))
        chosen = both[chosen.argsort().argsort()]  # in an order that says nothing
    drawn = packed(windows[chosen], places[chosen])
    return Packed(drawn.windows.long(), drawn.positions.long())


def pooled(documents: Documents, encoder: Encodes, drawing: WindowDraw) -> Iterator[Sequence[int]]:
    """Token ids of one document after the other, in an order drawn from the seed, until there are
    enough to draw from."""
    enough = _POOL * drawing.whole
    if drawing.covers:
        enough = max(enough, min(_POOL_TO_COVER * drawing.whole, drawing.whole + _SPARE))
    if isinstance(documents, DocumentStream):
        enough = min(enough, drawing.whole + _SPARE)
    count = 0
    for document in _shuffled(documents, drawing.seed):
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
        return into_windows(self.tokens, self.sequence_length)

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


def draw_pieces(who: str, documents: Documents, encoder: Encodes, drawing: WindowDraw) -> Pieces:
    """Whole documents in an order drawn from the seed, until there are the tokens asked for (whole
    windows of them). A document longer than `sequence_length` is several pieces.

    Less text than asked for, and too little, are told as by `draw_packed`.
    """
    wanted, sequence_length = drawing.whole, drawing.sequence_length
    stream, places, num_documents = array("i"), array("i"), 0
    for document in _shuffled(documents, drawing.seed):
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
    who: str, num_documents: int, num_windows: int, drawing: WindowDraw
) -> Int[Tensor, " chosen"]:
    """Which of a pool's windows are used: as many as are asked for, in an order drawn from the
    seed, or all that there are, with a warning. Raises TextError where there is none."""
    found = num_windows * drawing.sequence_length
    _refuse_too_little(who, num_documents, found, drawing.sequence_length)
    if num_windows < drawing.windows:
        _say_less(who, drawing.whole, found)
    generator = torch.Generator().manual_seed(drawing.seed)
    return torch.randperm(num_windows, generator=generator)[: drawing.windows]


def packed(
    windows: Int[Tensor, "windows sequence"], places: Int[Tensor, "windows sequence"]
) -> Packed:
    """Windows with their positions. `places`: each token's place in its whole document."""
    # A document that began before the window has gone on for longer than the window has.
    return Packed(windows, places.minimum(torch.arange(places.shape[1], dtype=places.dtype)))
