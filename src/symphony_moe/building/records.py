"""What an interrupted build has left in `work/`: a record for each layer, and when to trust it."""

from collections.abc import Callable
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from symphony_moe.errors import RunFolderError
from symphony_moe.files import write_bytes

_TEXT, _TENSORS, _NOTE = "text", "tensors", "note"


def write_comparison(path: Path, tensors: dict[str, Tensor], text: str) -> None:
    """Record how a layer of the sources compares with the anchor's. `text`: digest of the
    calibration text."""
    write_bytes(path, save(tensors, {_TEXT: text}))


def is_compared(path: Path, text: str) -> bool:
    """Whether an interrupted build has compared this layer, on this text."""
    return (_notes(path) or {}).get(_TEXT) == text


def write_layer(path: Path, router: Tensor | None, text: str, digest: str, note: str) -> None:
    """Record a finished layer. `router`: the plain mean's, if there is one. `digest`: of the
    layer's tensors as they are written. `note`: what was measured (JSON)."""
    tensors = {} if router is None else {"plain_router": router}
    write_bytes(path, save(tensors, {_TEXT: text, _TENSORS: digest, _NOTE: note}))


def is_finished(path: Path, text: str, digest: Callable[[], str]) -> bool:
    """Whether an interrupted build has finished a layer: its record is whole, and what it says of
    the layer's tensors is on disk. `digest`: of those that are.

    Raises RunFolderError where that build had other calibration text.
    """
    found = _notes(path)
    if found is None:
        return False
    if found.get(_TEXT) != text:
        raise RunFolderError(
            f"{path.parent.parent}: the calibration text has changed since this build was begun; "
            "--overwrite it"
        )
    return found.get(_TENSORS) == digest()


def read_note(path: Path) -> str:
    """What was measured while a layer was fitted (JSON)."""
    return (_notes(path) or {})[_NOTE]


def read_plain_router(path: Path) -> Tensor:
    """The plain mean's router (experts, by name, x hidden) in a finished layer's record."""
    return load_file(path)["plain_router"]


class Findings:
    """The tensors of all layers' comparisons, read one at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self._where: dict[str, Path] = {}
        for path in paths:
            with safetensors.safe_open(path, framework="pt") as file:
                self._where |= dict.fromkeys(file.keys(), path)

    @property
    def names(self) -> list[str]:
        """All of them."""
        return list(self._where)

    def read(self, name: str) -> Tensor:
        """One of them, in memory of its own."""
        with safetensors.safe_open(self._where[name], framework="pt") as file:
            # A copy: while one tensor of a file is in use, all of it stays mapped.
            found: Tensor = file.get_tensor(name)
            return found.clone()


def _notes(path: Path) -> dict[str, str] | None:
    """What a record says of itself; None where there is no whole record."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError:
        return None
