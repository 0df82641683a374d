"""Residual streams of calibration text (tokens x hidden each), waiting between layers: in memory,
or in memory-mapped files."""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symphony_moe.files import reserve
from symphony_moe.model.layer import WINDOWS_TOKENS

Windows = Int[Tensor, "windows sequence"]


class Streams:
    """Residual streams (float32) by name, each over windows of its own."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: keep the streams in memory-mapped files there."""
        self._folder = folder
        self._streams: dict[str, Tensor] = {}

    def new(
        self, name: str, windows: int, sequence: int, hidden: int
    ) -> Float[Tensor, "windows sequence hidden"]:
        """Make room for a stream. Raises RunFolderError where the disk has none."""
        shape = (windows, sequence, hidden)
        if self._folder is None:
            stream = torch.empty(shape)
        else:
            # A slash in a name is a folder: any other character may be in a source's name.
            path = self._folder / f"stream-{name}.bin"
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                # Writing to a map without space behind it would end the process (SIGBUS).
                reserve(file, math.prod(shape) * 4)
            stream = torch.from_file(str(path), shared=True, size=math.prod(shape)).view(shape)
        self._streams[name] = stream
        return stream

    def embed(
        self, texts: Mapping[str, Windows], hidden: int, table: Iterable[tuple[int, Tensor]]
    ) -> None:
        """Begin streams at the token embeddings: name -> its text. `table`: (first row, rows),
        block by block, so that no table is ever whole in memory."""
        targets = {
            name: self.new(name, text.shape[0], text.shape[1], hidden)
            for name, text in texts.items()
        }
        for first, rows in table:
            for name, text in texts.items():
                flat = text.reshape(-1)
                places = torch.where((flat >= first) & (flat < first + len(rows)))[0]
                targets[name].view(-1, hidden)[places] = rows[flat[places] - first].float()

    def __getitem__(self, name: str) -> Float[Tensor, "windows sequence hidden"]:
        """A whole stream: a view, to read and to overwrite."""
        return self._streams[name]

    def batches(self, name: str) -> Sequence[Float[Tensor, "windows sequence hidden"]]:
        """A stream in batches: views, to read and to overwrite."""
        stream = self._streams[name]
        result: Sequence[Tensor] = stream.split(windows_at_once(stream.shape[1]))
        return result

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
