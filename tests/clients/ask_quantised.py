"""Says what is left of a model's bytes, and of its loss, when it is quantised: REQUEST.json
ANSWER.json.

Run by the tests in environments of their own, so it imports nothing of the project.
"""

import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

KINDS = {"experts": r"\.experts\.", "attention": r"\.self_attn\."}


def size(tensor: Tensor) -> int:
    """In bytes; of a tensor that is made of others, theirs."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None or type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor.numel() * tensor.element_size()
    return sum(size(getattr(tensor, name)) for name in parts()[0])


def sizes(tensors: dict[str, Any]) -> dict[str, int]:
    """By kind."""
    found = dict.fromkeys([*KINDS, "rest"], 0)
    for name, tensor in tensors.items():
        kind = next((k for k, pattern in KINDS.items() if re.search(pattern, name)), "rest")
        if isinstance(tensor, Tensor):
            found[kind] += size(tensor)
    return found


@torch.no_grad()
def loss(model: Any, texts: list[Tensor]) -> float:
    return sum(float(model(ids, labels=ids).loss) for ids in texts) / len(texts)


def config(code: str) -> Any:
    """A quantization_config, as a page writes it."""
    modules = [transformers]
    if "TorchAo" in code:
        modules.append(importlib.import_module("torchao.quantization"))
    names = {
        word: getattr(module, word)
        for word in re.findall(r"\w+Config", code)
        for module in modules
        if hasattr(module, word)
    }
    return eval(code, names)


def main(request: Path, answer: Path) -> None:
    """`configs`: load `run/trained` with each. `blocks`: run them; `model` is then what they have
    made. `stored`: a folder whose files are weighed, and that is loaded."""
    torch.set_num_threads(1)  # pico models lose by more where cores are shared
    asked = json.loads(request.read_text())
    os.chdir(asked["folder"])
    auto: Any = transformers.AutoModelForCausalLM
    tokenizer = transformers.AutoTokenizer.from_pretrained("run/trained")
    rows = Path("text.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    texts = [tokenizer(json.loads(row)["text"], return_tensors="pt").input_ids for row in rows]

    def report(model: Any) -> dict[str, Any]:
        return {"bytes": sizes(model.state_dict()), "loss": loss(model.eval(), texts)}

    said = {"": report(auto.from_pretrained("run/trained", dtype=torch.bfloat16))}
    for code in asked.get("configs", []):
        said[code] = report(
            auto.from_pretrained(
                "run/trained", dtype=torch.bfloat16, quantization_config=config(code)
            )
        )
    names: dict[str, Any] = {}
    for number, block in enumerate(asked.get("blocks", [])):
        exec(compile(block, "<block of the page>", "exec"), names)
        said[str(number)] = report(names["model"])
    if "stored" in asked:
        from safetensors.torch import load_file

        stored: dict[str, Tensor] = {}
        for path in Path(asked["stored"]).glob("*.safetensors"):
            stored |= load_file(path)
        model, info = auto.from_pretrained(
            asked["stored"], output_loading_info=True, **asked.get("settings", {})
        )
        said["stored"] = {
            "bytes": sizes(stored),
            "loss": loss(model.eval(), texts),
            "info": {what: sorted(map(str, found)) for what, found in info.items() if found},
        }
    answer.write_text(json.dumps(said))


main(*(Path(name).resolve() for name in sys.argv[1:]))
