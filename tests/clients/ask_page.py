"""Runs the Python blocks of a page one after another, as a reader would: REQUEST.json ANSWER.json.

Run by the tests in environments of their own, so it imports nothing of the project.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text())
    torch.set_num_threads(1)  # pico models lose by more where cores are shared
    os.chdir(asked["folder"])
    names: dict[str, Any] = {}
    for block in asked["blocks"]:
        exec(compile(block, "<block of the page>", "exec"), names)
    history = names["trainer"].state.log_history if "trainer" in names else []
    answer.write_text(json.dumps({"history": history}))


main(*(Path(name).resolve() for name in sys.argv[1:]))
