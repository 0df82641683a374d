"""Which weights of an MoE a training changes (`train.scope`)."""

import re

from symphony_moe.model.families import Family

_ROUTER = re.compile(r"\.(gate|router|router\.layer)\.weight$")
_EXPERT = re.compile(r"\.experts\.|\.(input|output)_linear\.weight$")


def learns(name: str, scope: str, family: Family) -> bool:
    """Whether the weights of this name are trained. The names of a checkpoint and those of stock
    transformers' models both do.

    `router`: the routers' matrices. `experts`: those and the experts' (of FFN and attention).
    `all`: everything that the sources have. What the target has beyond that stays as it is,
    whatever the scope (`Family.constant`): vLLM and llama.cpp leave some of it out.
    """
    of_router = _ROUTER.search(name) is not None
    chosen = {
        "router": of_router,
        "experts": of_router or _EXPERT.search(name) is not None,
        "all": True,
    }[scope]
    return chosen and family.constant(name) is None
