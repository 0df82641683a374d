"""What the machine has and has not: memory, room on the disk, versions of software. Importing it
imports no torch: the command line asks it before it knows whether torch is needed."""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from symphony_moe import __version__
from symphony_moe.errors import RecipeError

_FULL = {errno.ENOSPC, errno.EDQUOT}

_REFUSED = {
    *_FULL,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
}
"""Errors of the system that tell of the machine's state, or of a path that cannot be."""

_VISIBLE = "CUDA_VISIBLE_DEVICES"
"""What torch sees of the GPUs: the variable of CUDA."""

_NO_ROOM = (
    os.strerror(errno.ENOSPC),
    # torch.save and safetensors, which do not pass the system's own words on.
    "PytorchStreamWriter failed writing",
    "unexpected pos",
    "iostream error",
    "Error while serializing: I/O error",
)


def versions() -> dict[str, str]:
    """Of the software that what is built and trained depends on, which this imports."""
    import lap
    import safetensors
    import torch
    import transformers

    return {
        "symphony_moe": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "lapx": lap.__version__,
    }


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings of malloc."""


def process_number() -> int:
    """The number of this process among those that a launcher has started."""
    return int(os.environ.get("RANK", "0"))


def is_launched() -> bool:
    """Whether a launcher has started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def use_device(name: str) -> None:
    """Compute on `cpu`, `cuda` or `cuda:N` alone: this process sees no other device. To be asked
    before anything runs on one. Raises RecipeError where there is no such device."""
    import torch

    kind, _, number = name.partition(":")
    if kind == "cpu":
        os.environ[_VISIBLE] = ""
        return
    if number:
        # Not asked of torch, which would then have counted all of them.
        seen = os.environ[_VISIBLE].split(",") if _VISIBLE in os.environ else None
        place = int(number)
        os.environ[_VISIBLE] = number if seen is None else "".join(seen[place : place + 1])
    if not torch.cuda.is_available():
        raise RecipeError(
            f"--device {name}: torch finds no such GPU here. Leave --device out to compute on "
            "what there is"
        )


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: that begins at the size of whatever process started this one.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def copying() -> Iterator[None]:
    """Inside the block freed memory is kept for what is needed next: fresh memory costs the system
    as much time as reading a tensor into it."""
    _keep_freed_memory(beyond=2**30, below=2**30)
    try:
        yield
    finally:
        _keep_freed_memory(beyond=2**26, below=2**25)  # about what glibc comes to by itself
        release_freed_memory()


def _keep_freed_memory(*, beyond: int, below: int) -> None:
    """Keep blocks `below` so many bytes once they are freed, and give back what is `beyond` so many
    in all."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, below)
        library.mallopt(_M_TRIM_THRESHOLD, beyond)


def release_freed_memory() -> None:
    """Give freed memory back to the system. glibc keeps blocks of up to 32 MB for itself, and what
    is left of one layer's tensors would pile up, in fragments, from layer to layer."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for something, on the CPU or on a device."""
    words = "can't allocate memory"  # torch on the CPU has no class for it
    kinds = ("OutOfMemoryError", "MemoryError")  # the first is torch's
    return any(kind.__name__ in kinds for kind in type(error).__mro__) or words in str(error)


def is_out_of_room(error: BaseException) -> bool:
    """Whether a file could not be written for want of room: the libraries' own writers raise errors
    of their own kinds."""
    full = isinstance(error, OSError) and error.errno in _FULL
    return full or any(words in str(error) for words in _NO_ROOM)


def is_refusal(error: BaseException) -> bool:
    """Whether the machine has refused something, which is nobody's bug: a full disk, a folder
    without permission."""
    refused = isinstance(error, OSError) and error.errno in _REFUSED
    return refused or is_out_of_room(error)
