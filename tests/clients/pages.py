"""The how-to pages: what a reader copies from them is what the tests run."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environments import python, run

HERE = Path(__file__).parent
HOW_TO = HERE.parent.parent / "docs" / "how-to"


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
    question, answer = folder / "request.json", folder / "answer.json"
    question.write_text(json.dumps(request))
    run(python(environment), HERE / script, question, answer)
    said: dict[str, Any] = json.loads(answer.read_text())
    return said


def follow(environment: str, folder: Path, parts: Sequence[str]) -> list[dict[str, float]]:
    """Do in a folder what blocks of a page say; what the last training logged."""
    request = {"folder": str(folder), "blocks": list(parts)}
    history: list[dict[str, float]] = ask(environment, "ask_page.py", folder, request)["history"]
    return history
