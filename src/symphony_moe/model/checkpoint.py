"""Safetensors files: laid out from a plan, filled tensor by tensor, hashed.

Names and shapes are known before the first weight is computed, so each file is laid out and its
disk space taken at once; a tensor is then written to its place and forgotten. A full disk is
noticed at the start, and the same tensors give the same bytes.

Bytes go to the disk and through SHA-256 in threads of their own, while the next tensor is made.
Peak memory is the tensors that wait for that, at most WAITING_BYTES and one tensor.
"""

import hashlib
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch
from safetensors import safe_open
from torch import Tensor

from symphony_moe.errors import RecipeError, RunFolderError
from symphony_moe.files import PIECE, RunningDigest, reserve, sync_file, write_at, write_text

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Output dtype -> bytes of a number."""

WAITING_BYTES = 32 * 1024**2
"""More bytes than this, and one tensor, do not wait to be written and hashed: who writes waits."""

_BITS: dict[torch.dtype, tuple[torch.dtype, type[numpy.unsignedinteger[Any]], int]] = {
    torch.bfloat16: (torch.int16, numpy.uint16, 0x7F80),
    torch.float16: (torch.int16, numpy.uint16, 0x7C00),
    torch.float32: (torch.int32, numpy.uint32, 0x7F800000),
}
"""Dtype -> whole numbers of its size, with a sign and without, and the bits of infinity."""

SPELLED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Output dtype -> its name in safetensors files."""


def assign_shards(
    tensors: Mapping[str, tuple[int, ...]], dtype: str, max_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Split the output into files of at most `max_bytes` of tensors, in the order of writing. A
    tensor larger than that has a file of its own."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * BYTES[dtype]
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


class CheckpointWriter:
    """Writes tensors to their places in the shards of one checkpoint folder.

    A `with` block ends its threads. What goes wrong in them is raised by a later call: by those
    that wait for what was written, and by `finish` at the latest.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str, max_shard_bytes: int
    ) -> None:
        """Lay out the files, or take up files that were laid out for the same tensors before.

        Raises RunFolderError where the disk has no room.
        """
        self.folder = folder
        self.dtype = dtype
        self.files: dict[str, dict[str, tuple[int, int]]] = {}
        """File name -> tensor name -> (offset in the file, size), in bytes."""
        self._shapes = dict(tensors)
        self._written: dict[str, dict[int, int]] = {name: {} for name in tensors}
        """Tensor name -> first row -> number of rows that are written there."""
        self._tensor_digests = {name: RunningDigest() for name in tensors}
        self._file_digests: dict[str, RunningDigest] = {}
        self._unsynced: set[str] = set()
        # One thread each, so that each does its work in the order in which it is given.
        self._disk, self._hasher, self._durable = (ThreadPoolExecutor(1) for _ in range(3))
        self._waiting: deque[tuple[int, list[Future[None]]]] = deque()
        self._records: list[Future[None]] = []
        folder.mkdir(parents=True, exist_ok=True)
        shards = assign_shards(tensors, dtype, max_shard_bytes)
        needed = sum(math.prod(shape) for shape in tensors.values()) * BYTES[dtype]
        present = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        free = shutil.disk_usage(folder).free + present
        if needed > free:
            raise RunFolderError(
                f"{folder}: the checkpoint needs {needed / 1e9:.2f} GB, the disk has "
                f"{free / 1e9:.2f} GB free; make room or choose another --out"
            )
        for number, shard in enumerate(shards, start=1):
            name = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            self._lay_out(name, shard)
        self._where = {
            tensor: (file, *place)
            for file, places in self.files.items()
            for tensor, place in places.items()
        }

    def _lay_out(self, file: str, shard: Mapping[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, position = {}, 0
        for name, shape in shard.items():
            size = math.prod(shape) * BYTES[self.dtype]
            header[name] = {
                "dtype": SPELLED[self.dtype],
                "shape": list(shape),
                "data_offsets": [position, position + size],
            }
            places[name] = (position, size)
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = len(text).to_bytes(8, "little") + text
        self.files[file] = {n: (len(start) + at, size) for n, (at, size) in places.items()}
        self._file_digests[file] = RunningDigest()
        self._file_digests[file].add(0, start)
        path = self.folder / file
        if path.is_file() and path.stat().st_size == len(start) + position:
            with path.open("rb") as existing:
                if existing.read(len(start)) == start:
                    return
        with path.open("wb") as opened:
            opened.write(start)
            opened.flush()
            reserve(opened, len(start) + position)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for thread in (self._disk, self._hasher, self._durable):
            thread.shutdown(cancel_futures=kind is not None)

    def write(self, name: str, tensor: Tensor, first_row: int = 0) -> None:
        """Write a tensor, or some of its rows, rounded to the output's dtype. It must not be
        changed afterwards: it may still wait to be written.

        Raises RecipeError where a value does not fit the dtype (float16 ends at 65504).
        """
        shape = self._shapes[name]
        assert tensor.shape[1:] == shape[1:] and first_row + len(tensor) <= shape[0], (
            f"{name}: planned {shape}, got rows {first_row}.. of {tuple(tensor.shape)}"
        )
        written = as_written(name, tensor, self.dtype).contiguous().cpu()
        file, offset, _ = self._where[name]
        start = first_row * math.prod(shape[1:]) * BYTES[self.dtype]
        content = written.view(torch.uint8).numpy().data.cast("B")
        self._unsynced.add(file)

        def put() -> None:
            write_at(self.folder / file, content, offset + start)

        def digest() -> None:
            # Piece by piece: for the second hash a piece is still in the core's cache.
            for at in range(0, len(content), PIECE):
                piece = content[at : at + PIECE]
                self._tensor_digests[name].add(start + at, piece)
                self._file_digests[file].add(offset + start + at, piece)

        self._wait(WAITING_BYTES)
        jobs = [self._disk.submit(put), self._hasher.submit(digest)]
        self._waiting.append((len(content), jobs))
        # Rows may come in any order, and again.
        last = first_row + len(tensor)
        blocks = {at: n for at, n in self._written[name].items() if not first_row <= at < last}
        self._written[name] = blocks | {first_row: len(tensor)}

    def _wait(self, allowed: int) -> None:
        """Until no more bytes than `allowed` wait to be written. Raises what a thread raised."""
        while self._waiting and sum(size for size, _ in self._waiting) > allowed:
            for job in self._waiting.popleft()[1]:
                job.result()

    def read(self, name: str) -> Tensor:
        """A tensor that is written already (float32)."""
        self._wait(0)
        file, offset, size = self._where[name]
        with (self.folder / file).open("rb") as opened:
            opened.seek(offset)
            content = bytearray(opened.read(size))
        stored = torch.frombuffer(content, dtype=getattr(torch, self.dtype))
        return stored.view(self._shapes[name]).float()

    def keep(self, prefix: str | tuple[str, ...]) -> None:
        """Take the tensors whose names begin so as an earlier, interrupted build has written
        them."""
        for name, shape in self._shapes.items():
            if name.startswith(prefix):
                self._written[name] = {0: shape[0]}

    def digest(self, prefix: str | tuple[str, ...]) -> str:
        """SHA-256 of the tensors whose names begin so: of their bytes as they were written, or, of
        those that were not written here, as they are on disk."""
        self._wait(0)
        return self._digest(prefix)

    def _digest(self, prefix: str | tuple[str, ...]) -> str:
        hashes = {name: self._hash(name) for name in self._shapes if name.startswith(prefix)}
        return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()

    def _hash(self, name: str) -> str:
        file, offset, size = self._where[name]
        return self._tensor_digests[name].finish(self.folder / file, offset, size)

    def when_durable(self, prefix: str | tuple[str, ...], record: Callable[[str], None]) -> None:
        """Call `record` with the digest of the tensors whose names begin so, once everything that
        was written so far is durable: in another thread, while the next tensors are made."""
        written = [job for _, jobs in self._waiting for job in jobs]
        files, self._unsynced = self._unsynced, set()

        def settle() -> None:
            for job in written:
                job.result()
            for file in files:
                sync_file(self.folder / file)
            record(self._digest(prefix))

        self.settle()  # one at a time, so that a slow disk is noticed
        self._records = [self._durable.submit(settle)]

    def settle(self) -> None:
        """Until all has been called that `when_durable` was given."""
        for job in self._records:
            job.result()
        self._records = []

    def finish(self) -> dict[str, str]:
        """Make everything durable and write the index of a sharded checkpoint; tensor name ->
        SHA-256 of its bytes."""
        unfinished = [
            name
            for name, blocks in self._written.items()
            if sum(blocks.values()) != self._shapes[name][0]
        ]
        assert not unfinished, f"planned but not written: {unfinished[:3]}"
        self._wait(0)
        self.settle()
        for file in self._unsynced:
            sync_file(self.folder / file)
        if len(self.files) > 1:
            total = sum(size for places in self.files.values() for _, size in places.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: place[0] for name, place in self._where.items()},
            }
            write_text(
                self.folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n"
            )
        return {name: self._hash(name) for name in self._shapes}

    def file_hashes(self) -> dict[str, str]:
        """File name -> SHA-256 of each file of weights, once all is written."""
        self._wait(0)
        return {
            file: digest.finish(path := self.folder / file, 0, path.stat().st_size)
            for file, digest in self._file_digests.items()
        }


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor (bfloat16, float16 or float32) is NaN or infinite.

    Its bits say so, read as whole numbers. All of the exponent's bits are set in NaN and infinity
    alone, so without a sign they are the largest signed numbers, with one the largest unsigned.
    """
    if not tensor.numel():
        return True
    signed, unsigned, first = _BITS[tensor.dtype]
    bits = tensor.contiguous().view(-1).view(signed).numpy()
    negative = 1 << (8 * bits.itemsize - 1)
    return bool(bits.max() < first and bits.view(unsigned).max() < first + negative)


def as_written(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A tensor in an output's dtype. Raises RecipeError where that does not hold a value of it.
    `name`: for the message."""
    found = tensor.to(getattr(torch, dtype))
    if not is_finite(found.cpu()):
        raise RecipeError(beyond(name, float(tensor.abs().max()), dtype))
    return found


def beyond(name: str, value: float, dtype: str) -> str:
    """What to say of a number that an output's dtype does not hold."""
    largest = torch.finfo(getattr(torch, dtype)).max
    return (
        f"output.dtype: {name} has a value of {value:.5g}, and {dtype} ends at {largest:.5g}; "
        "write bfloat16 or float32"
    )


def tensor_reader(folder: Path) -> Callable[[str], Tensor]:
    """Name -> tensor, as it is on disk, of the safetensors files in a folder."""
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> Tensor:
        with safe_open(where[name], framework="pt") as file:
            # A copy: while one tensor of a file is in use, all of it stays mapped.
            result: Tensor = file.get_tensor(name).clone()
            return result

    return read
