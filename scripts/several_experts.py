"""What several experts of a source compute before training: docs/how-to/experts.md.

    python scripts/several_experts.py

Four bundled branches by method `btx` with routers by regression, and 1, 4 or 16 experts of each
(`experts.per_source`), written and run in float32, and the same in bfloat16, where logits of two
sources may be the same number. Held-out nats per token, the mean of the four domains, and the share
of tokens and layers whose experts are not all those of whole sources.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from symphony_moe import build, load_recipe
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.evaluation.routing import routers
from symphony_moe.sources.opening import open_sources
from symphony_moe.text.texts import Texts

RECIPE = Path(__file__).parent.parent / "recipes" / "branches.yaml"
SETTINGS = (
    "method=btx",
    "router.init=regression",
    "calibration.tokens=16384",
    "evaluation.tokens=4096",
)


class Split:
    """How often a token has some of a source's experts, and not all of them."""

    def __init__(self, model: PreTrainedModel, count: int) -> None:
        self.count, self.split, self.all = count, 0, 0
        for router in routers(model):
            router.register_forward_hook(self._look)

    def _look(self, router: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        chosen = next(part for part in output if not part.is_floating_point()) // self.count
        times = torch.nn.functional.one_hot(chosen).sum(dim=1)
        self.split += int((times % self.count > 0).any(dim=1).sum())
        self.all += len(times)


def main() -> None:
    """See the module."""
    print("| experts of a source | float32 | bfloat16 | split, float32 | split, bfloat16 |")
    print("|---|---|---|---|---|")
    for count in (1, 4, 16):
        losses, shares = [], []
        for dtype in ("float32", "bfloat16"):
            asked = (*SETTINGS, f"experts.per_source={count}", f"output.dtype={dtype}")
            recipe = load_recipe(RECIPE, asked)
            with tempfile.TemporaryDirectory() as home:
                run = build(recipe, Path(home) / "run")
                loaded: Any = AutoModelForCausalLM.from_pretrained(run.checkpoint, dtype=dtype)
                model = loaded.eval()
                split = Split(model, count)
                pieces = Texts(recipe, open_sources(recipe, download=False)).held_out_text()
                inside = {name: pieces[name] for name in recipe.sources}
                found, _ = losses_and_routing(model, inside, slices=count)
            losses.append(f"{sum(found.values()) / len(found):.4f}")
            shares.append(f"{split.split / split.all:.5f}")
        print(f"| {count} | {' | '.join([*losses, *shares])} |", flush=True)


if __name__ == "__main__":
    main()
