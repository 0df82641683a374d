"""The newer families and layouts, asked for logits alone: small random models with the configs that
a build writes, no tokenizer and no training. Seconds for each, where `test_engines.py` takes
minutes, and it finds what a program refuses or computes otherwise.

`symphony plan` may say "not tried" of a program that agrees here: `test_engines.py` asks for more.
"""

import json
import re
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any, NamedTuple

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from environments import ask_script, python
from models import CASES, SIZES
from servers import last_error
from symphony_moe.model import engines
from symphony_moe.model.engines import readings
from symphony_moe.model.families import ALIASES, Family, Target, target_config

pytestmark = pytest.mark.client

TOKENS = 120
"""Beyond the windows and longrope's original context of the cases."""
AGREES, DIFFERS = 1e-5, 1e-2
"""max |a - b| over max |logit|, float32."""
AGREES_IN_NATS = 1e-4
"""The same of vLLM, which tells log probabilities."""
PROGRAMS = {"mlx": "MLX", "transformers-4.57": "transformers 4.57", "vllm": "vLLM"}
ALL = dict.fromkeys(PROGRAMS, "exact")
_NONE = "not supported|does not recognize"


class Layout(NamedTuple):
    """A case of `models.CASES`, or a family and what a recipe asks of its layers; and what programs
    make of it: a verdict, or what a refusal says."""

    case: str
    said: dict[str, str]
    target: Target = Target()
    layout: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    """(setting, value), beside the case's."""


PART = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
DENSE = Target(dense_layers=(1,))
SHARED = Target(shared_expert=True)
SLICED = Target(slices=2)
LAYOUTS = {
    "granite": Layout("granite", ALL),
    "llama-biases": Layout("llama-biases", ALL | {"vllm": "other"}),
    "olmo2": Layout("olmo2", ALL | {"mlx": _NONE}),
    "smollm3": Layout("smollm3", dict.fromkeys(ALL, _NONE) | {"vllm": "exact"}),
    "qwen2-windows": Layout("qwen2-windows", dict.fromkeys(ALL, "other")),
    "phi3-part": Layout("phi3-part", ALL | {"mlx": "other"}),
    "phi3-plain-part": Layout(
        "phi3", ALL | {"mlx": "other"}, settings=(("rope_parameters", PART),)
    ),
    "slices": Layout("llama", ALL, SLICED, engines.SLICES),
    "dense-layers": Layout("llama", ALL | {"mlx": "not in model"}, DENSE, engines.DENSE_LAYERS),
    "qwen2-dense-layers": Layout(
        "qwen2", ALL | {"mlx": "not in model"}, DENSE, engines.DENSE_LAYERS
    ),
    "qwen3-dense-layers": Layout("qwen3", ALL, DENSE, engines.DENSE_LAYERS),
    "shared-expert": Layout("llama", ALL | {"mlx": "other"}, SHARED, engines.SHARED_EXPERT),
    "qwen2-shared-expert": Layout("qwen2", ALL | {"mlx": "lm_head"}, SHARED, engines.SHARED_EXPERT),
}


def family_and_config(layout: Layout) -> tuple[Family, dict[str, Any]]:
    """The row of a case, and the config that a build writes."""
    case = CASES[layout.case]
    sizes = SIZES | {"vocab_size": 320, "pad_token_id": None}
    dense = CONFIG_MAPPING[case.model_type](**(sizes | case.settings | dict(layout.settings)))
    alias = ALIASES.get(case.model_type)
    if alias is not None:
        dense = CONFIG_MAPPING[alias.read_as](**alias.settings(dense))
    family = layout.target.family(dense)
    tied = dense.tie_word_embeddings
    return family, target_config(family, dense, 4, 2, tied=tied, dtype="float32")


def write_random(family: Family, config: dict[str, Any], folder: Path) -> list[list[float]]:
    """A random model of a config, and its logits. What must stay zero is."""
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            constant = family.constant(name)
            if constant is not None:
                tensor.fill_(constant)
            elif "norm" in name:
                tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
            else:  # routers that are sure of themselves: no two experts are nearly even
                routes = "gate.weight" in name or "router" in name
                tensor.copy_((0.3 if routes else 0.08) * torch.randn_like(tensor))
        logits: torch.Tensor = model(torch.tensor([tokens()])).logits[0]
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text)  # as a build writes it
    return logits.tolist()


def tokens() -> list[int]:
    return torch.randint(3, 320, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def nats_apart(answer: list[dict[str, float]], expected: torch.Tensor) -> float:
    """The greatest difference of log probabilities. `answer`: after each token but the last."""
    return max(
        abs(found - float(expected[place, int(token)]))
        for place, after in enumerate(answer)
        for token, found in after.items()
    )


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_as_is_said(name: str, program: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    family, config = family_and_config(layout)
    expected = torch.tensor(write_random(family, config, tmp_path))
    said = layout.said[program]
    asked = {"folder": str(tmp_path), "tokens": tokens()}
    plan = readings(config, dense=CASES[layout.case].model_type, layout=layout.layout)
    verdict = next(one.verdict for one in plan if one.program == PROGRAMS[program])
    if said not in ("exact", "other"):
        with pytest.raises(CalledProcessError) as raised:
            ask_script(python(program), "ask_logits.py", asked, tmp_path)
        words = last_error(raised.value.stderr)
        print(f"\n{name}, {program}: {words}")
        assert re.search(said, raised.value.stderr, re.DOTALL) and verdict == "refused"
        return
    answer = ask_script(python(program), "ask_logits.py", asked, tmp_path)
    if program == "vllm":
        far = nats_apart(answer, expected.log_softmax(dim=-1))
    else:
        far = float((torch.tensor(answer) - expected).abs().max() / expected.abs().max())
    print(f"\n{name}, {program}: {far:.1e}")
    if said == "exact":
        agrees = AGREES_IN_NATS if program == "vllm" else AGREES
        assert far <= agrees and verdict in ("exact", "untried")
    else:
        assert far >= DIFFERS and verdict == "other"
