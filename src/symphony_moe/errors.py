"""The kinds of mistake a user can make. Only `cli.py` turns them into messages and exit codes.

Raise one of these where the check fails, and say in one sentence each: who (the source, file or
setting), what was expected, what came, and what to do. A failed `assert` means a bug of ours.
"""

import re
from difflib import get_close_matches
from pathlib import Path


class SymphonyError(ValueError):
    """A mistake of the user's, or of the machine they run on: shown without a traceback, exit code
    2."""


class RecipeError(SymphonyError):
    """The recipe, or a command's argument, asks for something that cannot be."""


class SourceError(SymphonyError):
    """A source cannot be read: a missing folder, a truncated file, a tensor that is not there."""


class SourceMismatch(SymphonyError):
    """The sources are each readable, but cannot become experts of one model."""


class TextError(SymphonyError):
    """Calibration, training or evaluation text is missing, unreadable or empty."""


class RunFolderError(SymphonyError):
    """The run folder is not in the state that the command needs."""


class VerificationError(SymphonyError):
    """A finished checkpoint does not hold what its sources and its manifest say it must."""


class UploadError(SymphonyError):
    """A model could not be put on the hub: no token, no permission, no connection."""


class LostProcess(SymphonyError):
    """Another process of the same command, on this machine or another one, has ended."""


def is_text(name: str) -> bool:
    """Whether the bytes of a path or argument are UTF-8: no output could name it otherwise."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


LONGEST = 480
"""Characters of a message that a person is shown."""

_UNSEEN = r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200b-\u200f\u2028-\u202e\u2066-\u2069]"
"""Characters that steer a terminal, and halves of some, which cannot be written."""


def shown(message: str, limit: int = LONGEST) -> str:
    """A message as it is shown: what it repeats of a user's (a name, a path, 50 KB of a template)
    is cut in the middle, so that who and what to do stay, and cannot steer the terminal."""
    message = re.sub(_UNSEEN, lambda found: ascii(found[0])[1:-1], message)
    if len(message) > limit:
        message = re.sub(r"\S{120,}", lambda word: _without_middle(word[0], 100), message)
    return _without_middle(message, limit)


def _without_middle(text: str, limit: int) -> str:
    end = limit // 3
    return text if len(text) <= limit else f"{text[: limit - end - 5]} ... {text[-end:]}"


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shortened(text: str, limit: int) -> str:
    """Text that is cut to `limit` characters, where it is longer."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def if_mistyped(path: Path) -> str:
    """What to add to a message that a path is not there: the name in its folder that is nearly the
    same, if there is one."""
    try:
        names = [beside.name for beside in path.parent.iterdir()]
    except OSError:
        return ""
    near = get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
