"""The how-to pages: what a reader copies from them is what the tests run."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environments import ask_script, python

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"


def blocks(page: str, title: str) -> list[str]:
    """The Python below one title of a page."""
    text = (HOW_TO / page).read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section, f"{page} has no title {title!r}"
    found = re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S)
    assert found, f"{page}: no Python below {title!r}"
    return found


def changed(block: str, changes: dict[str, str]) -> str:
    """A block with other words, each of which is in it."""
    for old, new in changes.items():
        assert old in block, f"the page no longer says {old}"
        block = block.replace(old, new)
    return block


def ask(environment: str, script: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What a script says in an environment."""
    try:
        said: dict[str, Any] = ask_script(python(environment), script, request, folder)
    except subprocess.CalledProcessError as error:
        raise AssertionError(error.stderr[-2000:]) from None
    return said


def follow(environment: str, folder: Path, parts: Sequence[str]) -> list[dict[str, float]]:
    """Do in a folder what blocks of a page say; what the last training logged."""
    request = {"folder": str(folder), "blocks": list(parts)}
    history: list[dict[str, float]] = ask(environment, "ask_page.py", folder, request)["history"]
    return history
