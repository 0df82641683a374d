"""A recipe as text that a person goes on with: comments, sources' names, places to fill in."""

import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from symphony_moe.errors import shown
from symphony_moe.recipe.settings import BUNDLED, FILL_IN
from symphony_moe.recipe.yaml_text import read_yaml

FILL_IN_TEXT = (
    f"To fill in, in place of {FILL_IN}: `data`, text of the source's domain (.jsonl, .txt, "
    ".parquet, a list of files, or {hub: ..., column: ...})."
)

_WIDTH = 100
_RESERVED = {"built", "trained"}
"""What the result is called, and no source may be."""


def source_names(models: Sequence[str]) -> list[str]:
    """A name for each model, from the last part of its path or id; where that is another's too,
    with the part before it, and where that does not help, with a number."""
    parts = [
        [p for p in re.split(r"[/\\:]", model) if p not in ("", ".", "..", "~")] for model in models
    ]
    names = [_name(of[-1:]) for of in parts]
    common = Counter(name.lower() for name in names)
    names = [
        _name(of[-2:]) if common[name.lower()] > 1 else name
        for name, of in zip(names, parts, strict=True)
    ]
    taken: set[str] = set()
    unique = []
    for name in names:
        numbered = (f"{name}-{number}" for number in range(2, len(names) + 2))
        chosen = next(one for one in (name, *numbered) if one.lower() not in taken)
        taken.add(chosen.lower())
        unique.append(chosen)
    return unique


def _name(parts: Sequence[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("._-") or "source"
    return f"{name}-source" if name in _RESERVED else name


def is_local(model: str) -> bool:
    """Whether a model or file named on the command line, or by another tool, is a path from the
    current folder, and no hub id."""
    if model.startswith(BUNDLED):
        return False
    return model.startswith((".", "/", "~")) or Path(model).expanduser().exists()


def path_from(path: str, folder: Path) -> str:
    """A path from the current folder as a recipe in another `folder` spells it. An absolute one
    stays."""
    if path.startswith(("/", "~")):
        return path
    relative = Path(os.path.relpath(path, folder)).as_posix()
    # One that is not there (yet) would be taken for a hub id.
    return relative if relative.startswith(".") or Path(path).exists() else f"./{relative}"


def scalar(value: Any) -> str:
    """A value in one line of YAML: text, a number, a switch, or a list or table of them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(k)}: {scalar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    plain = re.fullmatch(r"[A-Za-z0-9_./~-][A-Za-z0-9_./ @+-]*", value) is not None
    if plain and value == value.strip() and not value.startswith("-") and _reads_as_text(value):
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())


def _reads_as_text(value: str) -> bool:
    try:
        return bool(read_yaml(value) == value)
    except ValueError:
        return False


def comment(text: str, indent: int = 0) -> Iterator[str]:
    """Text as lines of comment. What it repeats of a user's cannot steer a terminal, nor break out
    of the comment."""
    lead = " " * indent + "# "
    words = " ".join(shown(text, 2000).split())
    yield from textwrap.wrap(
        words,
        _WIDTH,
        initial_indent=lead,
        subsequent_indent=lead,
        break_long_words=False,
        break_on_hyphens=False,
    )


def source_lines(
    name: str, settings: Mapping[str, Any], notes: Iterable[str] = ()
) -> Iterator[str]:
    """A source in the table `sources`, with comments above it."""
    for note in notes:
        yield from comment(note, 2)
    yield f"  {scalar(name)}:"
    for key, value in settings.items():
        if value is not None:
            yield f"    {key}: {scalar(value)}"
