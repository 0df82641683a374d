"""Asks a model through whatever transformers this Python has: REQUESTS.json ANSWERS.json.

Run by the tests in environments of their own, so it imports nothing of the project.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer_to(asked: dict[str, Any]) -> dict[str, Any]:
    dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        asked["folder"], output_loading_info=True, **{dtype: torch.float32}
    )
    model, info = loaded
    unclean = {what: sorted(map(str, names)) for what, names in info.items() if names}
    model.eval()
    found = []
    for prompt in asked["prompts"]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            scores = model(ids).logits[0, -1].float().log_softmax(dim=-1)
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=asked["tokens"],
                do_sample=False,
                eos_token_id=asked["ends"] or None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = made.sequences[0, len(prompt) :].tolist()
        steps = [one[0].float().log_softmax(dim=-1) for one in made.logits]
        best = scores.topk(asked["best"])
        found.append(
            {
                "best": dict(
                    zip(map(str, best.indices.tolist()), best.values.tolist(), strict=True)
                ),
                "tokens": tokens,
                "steps": [float(step[token]) for step, token in zip(steps, tokens, strict=True)],
            }
        )
    tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
    texts = {
        str(special): [
            tokenizer(t, add_special_tokens=special)["input_ids"] for t in asked["texts"]
        ]
        for special in (False, True)
    }
    spoken = tokenizer.decode(
        found[0]["tokens"][: asked["spoken_tokens"]], skip_special_tokens=True
    )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {
        "prompts": found,
        "texts": texts,
        "spoken": spoken,
        "versions": versions,
        "unclean": unclean,
    }


def main(request: Path, answer: Path) -> None:
    answer.write_text(json.dumps([answer_to(asked) for asked in json.loads(request.read_text())]))


main(*map(Path, sys.argv[1:]))
