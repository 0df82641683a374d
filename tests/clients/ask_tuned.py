"""Says what a fine-tuned model is beside the model that it was made of: REQUEST.json ANSWER.json.

Run by the tests in environments of their own, so it imports nothing of the project.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: str) -> tuple[Any, dict[str, list[str]]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    return model.eval(), {what: sorted(map(str, names)) for what, names in info.items() if names}


@torch.no_grad()
def loss(model: Any, texts: list[Tensor]) -> float:
    return sum(float(model(ids, labels=ids).loss) for ids in texts) / len(texts)


@torch.no_grad()
def logits(model: Any, texts: list[Tensor]) -> list[Tensor]:
    return [model(ids).logits[0] for ids in texts]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> dict[str, float]:
    """Of logits."""
    apart = torch.cat([(a - b).abs() for a, b in zip(ours, theirs, strict=True)])
    return {"largest": float(apart.max()), "mean": float(apart.mean())}


def main(request: Path, answer: Path) -> None:
    """`zero`: ends of the names of tensors that may be zeros. `adapter`: a LoRA's folder."""
    torch.set_num_threads(1)  # pico models lose by more where cores are shared
    asked = json.loads(request.read_text())
    tokenizer = AutoTokenizer.from_pretrained(asked["before"])
    rows = Path(asked["text"]).read_text(encoding="utf-8").splitlines()[:32]
    texts = [tokenizer(json.loads(row)["text"], return_tensors="pt").input_ids for row in rows]
    before, _ = load(asked["before"])
    after, info = load(asked["after"])
    said: dict[str, Any] = {
        "info": info,
        "loss": {"before": loss(before, texts), "after": loss(after, texts)},
        "zero": {
            name: not bool(t.any())
            for name, t in after.state_dict().items()
            if name.endswith(tuple(asked["zero"]))
        },
    }
    if "adapter" in asked:
        said["moved"] = difference(logits(before, texts), logits(after, texts))
        adapted = PeftModel.from_pretrained(before, asked["adapter"]).eval()
        said["difference"] = difference(logits(adapted, texts), logits(after, texts))
        said["learned"] = {
            name: float(parameter.detach().abs().max())
            for name, parameter in adapted.named_parameters()
            if ".lora_B." in name
        }
    answer.write_text(json.dumps(said))


main(*map(Path, sys.argv[1:]))
