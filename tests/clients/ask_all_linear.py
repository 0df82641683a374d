"""Says where PEFT's `all-linear` puts LoRAs in models: REQUEST.json ANSWER.json.

Run by the tests in environments of their own, so it imports nothing of the project.
"""

import json
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main(request: Path, answer: Path) -> None:
    said = {}
    for name, folder in json.loads(request.read_text()).items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        said[name] = [n for n, _ in adapted.named_parameters() if ".lora_B." in n]
    answer.write_text(json.dumps(said))


main(*map(Path, sys.argv[1:]))
