"""Text to train on: in memory, or where it is large, in memory-mapped files that are written once.

The files hold int32 tokens and int32 positions, eight bytes for every token, in a folder named
after the digest of all that they were made from. The folder appears by one rename when it is whole,
so a killed writing begins again, and a finished one is used again.
"""

import json
import logging
import os
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from symphony_moe.files import publish
from symphony_moe.recipe.settings import BUNDLED, Data, HubData
from symphony_moe.text.documents import Documents
from symphony_moe.text.windows import (
    Encodes,
    Packed,
    WindowDraw,
    choose_windows,
    digest_of,
    into_windows,
    packed,
    pooled,
)

log = logging.getLogger(__name__)

_IN_MEMORY = 2**28
"""Bytes of tokens and positions up to which text stays in memory."""

_BYTES_PER_TOKEN = 8

_BLOCK = 2**22
"""Tokens that are copied at once."""

_POOL = ("pool-tokens.bin", "pool-places.bin")
_DRAWN = ("tokens.bin", "positions.bin")


@dataclass(frozen=True)
class TrainingText:
    """Windows of several sources' text, in the order of training."""

    parts: Sequence[Packed]
    """By source."""
    owners: Int[Tensor, " windows"]
    """The number of the source whose text each window is."""
    rows: Int[Tensor, " windows"]
    """Which of its source's windows it is."""

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def sequence_length(self) -> int:
        """Tokens in a window."""
        return self.parts[0].windows.shape[1]

    def tokens(self, numbers: Sequence[int]) -> Int[Tensor, "windows sequence"]:
        """The windows with these numbers (int64)."""
        return self._taken("windows", numbers)

    def positions(self, numbers: Sequence[int]) -> Int[Tensor, "windows sequence"]:
        """The place of each of their tokens in its document (int64), see `Packed`."""
        return self._taken("positions", numbers)

    def _taken(self, what: str, numbers: Sequence[int]) -> Int[Tensor, "windows sequence"]:
        chosen = list(numbers)
        pairs = zip(self.owners[chosen].tolist(), self.rows[chosen].tolist(), strict=True)
        return torch.stack([getattr(self.parts[o], what)[row].long() for o, row in pairs])

    def digest(self) -> str:
        """SHA-256 of the windows (int64), in their order."""
        blocks = (range(n, min(n + 1024, len(self))) for n in range(0, len(self), 1024))
        return digest_of(self.tokens(block) for block in blocks)


def stays_in_memory(drawing: WindowDraw) -> bool:
    """Whether drawn text is small enough for memory: up to 256 MiB of tokens and positions."""
    return drawing.tokens * _BYTES_PER_TOKEN <= _IN_MEMORY


def draw_to_files(
    who: str,
    documents: Callable[[], Documents],
    encoder: Encodes,
    drawing: WindowDraw,
    final: Path,
) -> Packed:
    """The windows that `draw_packed` draws from `documents`, as int32 in files in `final`.

    They are written in bounded memory, with up to five times their size on the disk meanwhile.
    Where the folder is there they are taken as they are, and no document is asked for. Other
    processes that want the same folder wait until it is there.

    Raises TextError as `draw_packed` does, and OSError where the disk has no room.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    # The lock waits for another process that writes the same text, and ends with a killed one.
    with FileLock(final.with_name(f"{final.name}.lock")):
        if final.is_dir():
            log.info("%s: taken from %s", who, final)
        else:
            log.info("%s: written to %s", who, final)
            write_packed(final, who, documents(), encoder, drawing)
    return read_packed(final, drawing.sequence_length)


def write_packed(
    final: Path, who: str, documents: Documents, encoder: Encodes, drawing: WindowDraw
) -> None:
    """Write what `draw_packed` would return into the folder `final`, which appears when it is
    whole. Raises TextError as `draw_packed` does."""
    partial = final.with_name(final.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sequence_length, num_documents = drawing.sequence_length, 0
    pool_files, drawn_files = ([partial / name for name in names] for names in (_POOL, _DRAWN))
    try:
        with pool_files[0].open("wb") as stream, pool_files[1].open("wb") as places:
            for ids in pooled(documents, encoder, drawing):
                array("i", ids).tofile(stream)
                array("i", range(len(ids))).tofile(places)
                num_documents += 1
        pool = [into_windows(_mapped(path), sequence_length) for path in pool_files]
        chosen = choose_windows(who, num_documents, len(pool[0]), drawing)
        with drawn_files[0].open("wb") as windows, drawn_files[1].open("wb") as positions:
            for rows in chosen.split(max(1, _BLOCK // sequence_length)):
                drawn = packed(pool[0][rows], pool[1][rows])
                windows.write(drawn.windows.numpy().tobytes())
                positions.write(drawn.positions.numpy().tobytes())
            for file in (windows, positions):
                file.flush()
                os.fsync(file.fileno())
        for path in pool_files:
            path.unlink()
        publish(partial, final)
    finally:
        # A disk that was full has its room back.
        shutil.rmtree(partial, ignore_errors=True)


def read_packed(folder: Path, sequence_length: int) -> Packed:
    """What `write_packed` has written: int32, read from the disk when it is used. Changing the
    tensors does not change the files."""
    return Packed(*(into_windows(_mapped(folder / name), sequence_length) for name in _DRAWN))


def _mapped(path: Path) -> Int[Tensor, " stream"]:
    size = path.stat().st_size // 4
    if size == 0:  # no map is empty
        return torch.empty(0, dtype=torch.int32)
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.int32)


def stamp(data: Data) -> Any:
    """What tells data from others: the setting, and size and time of change of local files. A data
    set on the hub is told by its `revision`."""
    if isinstance(data, list):
        return [stamp(item) for item in data]
    if isinstance(data, HubData):
        return [data.model_dump(), _stamps(Path(data.hub))]
    return data if data.startswith(BUNDLED) else [data, _stamps(Path(data))]


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [(str(file), file.stat()) for file in files if file.is_file()]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def rules_of(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        # Calls switch padding and truncation on and off.
        rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return [type(tokenizer).__name__, rules]
