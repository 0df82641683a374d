"""How much softer a model's logits may be made: the largest temperature at a price.

A model is surer of itself on text that nobody fitted it to than it has reason to be, and is better
there when its logits are divided by a temperature above 1 (temperature scaling: Guo et al. 2017).
On the text that it was fitted to, it loses by that. `fit.temperature_scaling` and
`train.temperature_scaling` say how much it may lose.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TEMPERATURES = [1.02**power for power in range(36)]
"""What the logits may be divided by: 1 to 2."""

TRAINED_TOKENS = 65_536
"""Tokens that the temperature after a training is found on, at most."""


def largest_temperature(losses: Sequence[float], share: float) -> tuple[float, float]:
    """The largest temperature at which the loss is less than `share` of itself above that of
    temperature 1, and the loss there.

    `losses`: at each of TEMPERATURES, or at the first of them. Relative, so that a model without
    any loss stays as it is.
    """
    within = list(zip(TEMPERATURES, losses, strict=False))
    return max([within[0], *(pair for pair in within if pair[1] < losses[0] * (1 + share))])


@torch.no_grad()
def losses_by_temperature(
    model: nn.Module, batches: Sequence[dict[str, Any]], total: Callable[[Tensor], Tensor]
) -> list[float]:
    """Language-model loss (nats per token) with the logits divided by each of TEMPERATURES.

    `batches`: what a stock model takes, with labels (-100: not predicted). `total`: the sum of a
    tensor over all processes, each of which has as many batches as the others.
    """
    model.eval()
    device = next(model.parameters()).device
    found = torch.zeros(len(TEMPERATURES) + 1, dtype=torch.float64)
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items()}
        labels = inputs.pop("labels")[:, 1:].flatten()
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        for place, temperature in enumerate(TEMPERATURES):
            nats = nn.functional.cross_entropy(logits / temperature, labels, reduction="sum")
            found[place] += float(nats)
        found[-1] += int((labels != -100).sum())
    *sums, tokens = total(found.to(device)).tolist()
    return [value / tokens for value in sums]
