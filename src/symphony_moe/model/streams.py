"""Residual streams of calibration text (tokens x hidden each), waiting between layers: on the GPU
while they fit there, else in memory, or in memory-mapped files."""

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from symphony_moe.files import reserve
from symphony_moe.model.families import factor
from symphony_moe.model.layer import WINDOWS_TOKENS, device

Windows = Int[Tensor, "windows sequence"]

_SHARE_OF_GPU = 0.5
"""Streams wait on the GPU as long as this share of its memory stays free."""


class Streams:
    """Residual streams (float32) by name, each over windows of its own."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: keep the streams in memory-mapped files there, but for those that the GPU has
        room for."""
        self._folder = folder
        self._streams: dict[str, Tensor] = {}

    def new(
        self, name: str, windows: int, sequence: int, hidden: int
    ) -> Float[Tensor, "windows sequence hidden"]:
        """Make room for a stream. Raises RunFolderError where the disk has none."""
        shape = (windows, sequence, hidden)
        if _has_room(math.prod(shape) * 4):
            stream = torch.empty(shape, device=device())
        elif self._folder is None or not windows:
            # Pinned, a batch is copied while the one before is computed on.
            stream = torch.empty(shape, pin_memory=device().type == "cuda")
        else:
            # A slash in a name is a folder: any other character may be in a source's name.
            path = self._folder / f"stream-{name}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a process that is left over may still map it
            with path.open("wb") as file:
                # Writing to a map without space behind it would end the process (SIGBUS).
                reserve(file, math.prod(shape) * 4)
            stream = torch.from_file(str(path), shared=True, size=math.prod(shape)).view(shape)
        self._streams[name] = stream
        return stream

    def embed(
        self,
        texts: Mapping[str, Windows],
        config: PreTrainedConfig,
        table: Iterable[tuple[int, Tensor]],
    ) -> None:
        """Begin streams at the token embeddings, as a dense model of this config has them: name ->
        its text. `table`: (first row, rows), block by block, so that no table is ever whole in
        memory."""
        hidden, times = config.hidden_size, factor(config, "embeddings")
        targets = {
            name: self.new(name, text.shape[0], text.shape[1], hidden)
            for name, text in texts.items()
        }
        for first, rows in table:
            for name, text in texts.items():
                flat = text.reshape(-1)
                places = torch.where((flat >= first) & (flat < first + len(rows)))[0]
                target = targets[name].view(-1, hidden)
                chosen = rows[flat[places] - first].to(target)
                chosen = chosen if times == 1 else chosen * times
                target.index_copy_(0, places.to(target.device), chosen)

    def __getitem__(self, name: str) -> Float[Tensor, "windows sequence hidden"]:
        """A whole stream: a view, to read and to overwrite."""
        return self._streams[name]

    def batches(self, name: str) -> Sequence[Float[Tensor, "windows sequence hidden"]]:
        """A stream in batches: views, to read and to overwrite."""
        return self._split(name, slice(None))

    def visit(
        self, *names: str, rows: slice = slice(None), reads: int = 0
    ) -> Iterator[tuple[Float[Tensor, "windows sequence hidden"], ...]]:
        """Batches of some streams side by side, on the device. What is done to them there is done
        to the streams, at the latest when the last is behind: not to the first `reads` of them,
        which must be left as they are."""
        batches = zip(*(self._split(name, rows) for name in names), strict=True)
        if device().type == "cuda":
            return _carried(batches, reads)
        return batches

    def _split(self, name: str, rows: slice) -> Sequence[Tensor]:
        return in_batches(self._streams[name][rows])

    def release(self) -> None:
        """Forget all streams, and remove their files."""
        self._streams.clear()
        if self._folder is not None:
            for path in self._folder.glob("stream-*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def swap(self, one: str, other: str) -> None:
        """Exchange the names of two streams."""
        streams = self._streams
        streams[one], streams[other] = streams[other], streams[one]


def windows_at_once(sequence: int) -> int:
    """How many windows make a batch of about WINDOWS_TOKENS tokens."""
    return max(1, WINDOWS_TOKENS // sequence)


def in_batches(rows: Tensor, size: int | None = None) -> Sequence[Tensor]:
    """Windows (or what there is of each) in batches of `size`, or of the usual one; none of none:
    a process may have no part of a short text."""
    result: Sequence[Tensor] = rows.split(size or windows_at_once(rows.shape[1]))
    return result if len(rows) else ()


def _has_room(size: int) -> bool:
    """Whether so many bytes may wait on the GPU."""
    if device().type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device())
    return free - size > _SHARE_OF_GPU * total


def _carried(batches: Iterable[tuple[Tensor, ...]], reads: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches on the GPU: the next one is on its way while one is computed on, and what is in
    memory is written back, but for the first `reads` streams. The only wait is at the end, when the
    streams in memory are whole."""
    way, here = torch.cuda.Stream(device()), torch.cuda.current_stream(device())
    waiting: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...], torch.cuda.Event]] = []
    try:
        for batch in chain(batches, [None]):
            if batch is not None:
                with torch.cuda.stream(way):
                    there = tuple(part.to(device(), non_blocking=True) for part in batch)
                    waiting.append((batch, there, way.record_event()))
            if len(waiting) > (batch is not None):
                parts, there, arrived = waiting.pop(0)
                here.wait_event(arrived)
                for part, copy in zip(parts, there, strict=True):
                    if copy is not part:
                        copy.record_stream(here)
                yield there
                for part, copy in zip(parts[reads:], there[reads:], strict=True):
                    if copy is not part:
                        part.copy_(copy, non_blocking=True)
    finally:
        here.synchronize()
