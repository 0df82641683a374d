"""Asks a model without a tokenizer for its logits, through MLX or transformers, whichever this
Python has: REQUEST.json ANSWER.json. Imports nothing of the project."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def by_mlx(folder: str, tokens: list[int]) -> Any:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    return model(mx.array(tokens)[None])[0].astype(mx.float32).tolist()


def by_transformers(folder: str, tokens: list[int]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].tolist()


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text())
    ask = by_mlx if importlib.util.find_spec("mlx") else by_transformers
    answer.write_text(json.dumps(ask(asked["folder"], asked["tokens"])))


main(*map(Path, sys.argv[1:]))
