"""Asks a model through MLX: REQUESTS.json ANSWERS.json. Imports nothing of the project."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step


def answer_to(asked: dict[str, Any]) -> dict[str, Any]:
    model, tokenizer = load(asked["folder"])
    found = []
    for prompt in asked["prompts"]:
        ids = mx.array(prompt)
        scores = model(ids[None])[0, -1].astype(mx.float32)
        scores = scores - mx.logsumexp(scores)
        best = mx.argsort(-scores)[: asked["best"]].tolist()
        tokens, steps = [], []
        for token, logprobs in generate_step(ids, model, max_tokens=asked["tokens"]):
            tokens.append(int(token))
            steps.append(float(logprobs[tokens[-1]]))
            if tokens[-1] in asked["ends"]:
                break
        best = {str(number): float(scores[number]) for number in best}
        found.append({"best": best, "tokens": tokens, "steps": steps})
    texts = {
        str(special): [tokenizer.encode(t, add_special_tokens=special) for t in asked["texts"]]
        for special in (False, True)
    }
    versions = {name: version(name) for name in ("mlx", "mlx-lm")}
    return {"prompts": found, "texts": texts, "versions": versions}


def main(request: Path, answer: Path) -> None:
    answer.write_text(json.dumps([answer_to(asked) for asked in json.loads(request.read_text())]))


main(*map(Path, sys.argv[1:]))
