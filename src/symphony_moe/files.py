"""Files that a kill or a full disk cannot leave half written; locks, hashes and reserved room."""

import errno
import gc
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

from filelock import lock_descriptor

from symphony_moe.errors import RunFolderError
from symphony_moe.machine import process_number

log = logging.getLogger(__name__)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """RunFolderError where another process is at work in a folder; inside the block others see that
    this one is. The system takes the lock back from a process that is killed. Of the processes that
    train together the first holds it.

    The folder itself is locked, through an open descriptor. A lock file in it would be taken for a
    part of the run, and one beside it may be where the user cannot write."""
    if process_number() > 0:
        yield
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            free = lock_descriptor(handle, blocking=False)
        except OSError:
            log.debug("%s: its file system has no locks", root)
            free = True
        if not free:
            raise RunFolderError(
                f"{root}: another `symphony` is at work there; wait until it is done, or stop it"
            )
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8), see `write_bytes`."""
    write_bytes(path, text.encode())


def to_json(content: Any, indent: int | None = None, *, ascii_only: bool = False) -> str:
    """JSON that every parser reads: numbers that are none (a diverged loss) become null."""
    return json.dumps(_finite(content), indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """What a JSON text says. Of a large one, such as a tokenizer's, a million objects are made, and
    none is garbage: meanwhile the collector, which would look for some again and again, is off."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text)
    finally:
        if was_on:
            gc.enable()


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file by one rename, durably: a reader, or a kill, never sees half of it."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def publish(staged: Path, final: Path) -> None:
    """Make a finished folder appear by one rename, durably."""
    staged.rename(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


CHUNK = 16 * 1024**2

PIECE = 2**19
"""Bytes that are hashed at once: they stay in a core's cache."""

_HASHERS = 2
"""Files that are hashed at once: two threads read as fast as most disks give."""


def reserve(file: BinaryIO, size: int) -> None:
    """Take the disk space of a file. Raises RunFolderError where there is not so much."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        code = getattr(error, "errno", None)
        if code == errno.EFBIG:
            raise RunFolderError(
                f"{file.name}: the file system takes no file of {size} bytes; choose "
                "another --out, or a smaller output.max_shard_size for the weights"
            ) from None
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise RunFolderError(
                f"{file.name}: no room on the disk: {error}. Make room; a build goes on with "
                "--resume"
            ) from None
        file.truncate(size)  # a file system that cannot reserve


def hash_folder(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """`<folder's name>/<file>` -> SHA-256, for every file in a folder. `known`: of files by name
    that need not be read for it."""
    known = known or {}
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {
        path.relative_to(folder.parent).as_posix(): (
            known.get(path.relative_to(folder).as_posix()) or sha256_of(path)
        )
        for path in files
    }


def read_into(file: BinaryIO, content: memoryview) -> None:
    """Fill a piece of memory from a file. (The system may give less at once.) Raises
    OSError where the file ends before."""
    while len(content) > 0:
        read = file.readinto(content)  # type: ignore[attr-defined]  # of every raw file
        if not read:
            raise OSError(errno.EIO, "it ends too early")
        content = content[read:]


def write_at(path: Path, content: memoryview, offset: int) -> None:
    """Write all bytes at a place of a file that is there. (The system may take less at once.)"""
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        while len(content) > 0:
            content = content[file.write(content) :]


def sync_file(path: Path) -> None:
    """Make what was written to a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunningDigest:
    """SHA-256 of a stretch of a file, taken while its bytes are written in order. What came in
    another order, or again, is read back."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._position = 0

    def add(self, position: int, content: bytes | memoryview) -> None:
        """Bytes that are written at a position of the stretch."""
        if position < self._position:  # over what is hashed
            self._hash, self._position = hashlib.sha256(), 0
        if position == self._position:
            self._hash.update(content)
            self._position += len(content)

    def finish(self, path: Path, offset: int, size: int) -> str:
        """Hex digest of the whole stretch, `size` bytes at `offset` of a file."""
        if self._position < size:
            with path.open("rb") as file:
                file.seek(offset + self._position)
                while self._position < size:
                    chunk = file.read(min(CHUNK, size - self._position))
                    if not chunk:
                        raise RunFolderError(f"{path}: ends before its tensors do")
                    self._hash.update(chunk)
                    self._position += len(chunk)
        return self._hash.hexdigest()


class FileHasher:
    """SHA-256 of files, taken by threads while something else is done. Use it in a `with` block,
    whose end stops what is not done."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_HASHERS)
        self._stopped = Event()
        self._begun: dict[Path, Future[str]] = {}

    def __enter__(self) -> "FileHasher":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._threads.shutdown(cancel_futures=True)

    def submit(self, path: Path) -> Future[str]:
        """The hex digest of a file's bytes, once it is known. A file is hashed once, however often
        it is asked for."""
        if path not in self._begun:
            self._begun[path] = self._threads.submit(self._hash, path)
        return self._begun[path]

    def _hash(self, path: Path) -> str:
        found, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
        with path.open("rb", buffering=0) as file:
            while not self._stopped.is_set() and (size := file.readinto(piece)):
                found.update(piece[:size])
        if self._stopped.is_set():
            raise CancelledError
        return found.hexdigest()
