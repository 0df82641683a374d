"""The router's first weights: at random, or calibrated on what the new model's router reads."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from symphony_moe.building.draws import generator_for
from symphony_moe.building.least_squares import LeastSquares

STANDARD_DEVIATION = 0.02

ROUTER_TOKENS = 32768
"""Router inputs that a calibrated router is fitted on, of all sources together."""

_ITERATIONS = 60
_DECAY = 1e-4
_RIDGE = 1e-2


def windows_for_router(num_sources: int, sequence_length: int, available: int) -> range:
    """Which of a source's `available` windows a calibrated router is fitted on: spread evenly,
    ROUTER_TOKENS of all sources' together, and less than twice that, as steps are whole."""
    wanted = max(1, ROUTER_TOKENS // num_sources // sequence_length)
    return range(0, available, max(1, available // wanted))


def random_router(
    names: Sequence[str], hidden_size: int, layer: int, seed: int, part: str = "router"
) -> Float[Tensor, "experts hidden"]:
    """A random linear router (Sec. 3.3): normal, standard deviation 0.02.

    Each row is drawn from the seed, the layer and the *name* of the expert's source, so that
    reordering the sources reorders the rows and changes nothing else. `part`: which of a layer's
    routers it is; each has draws of its own.
    """
    rows = []
    for name in names:
        generator = generator_for(f"{part}/{seed}/{layer}/{name}")
        rows.append(torch.randn(hidden_size, generator=generator) * STANDARD_DEVIATION)
    return torch.stack(rows)


def regression_router(
    inputs: Sequence[Float[Tensor, "_ hidden"]], temperature: float
) -> Float[Tensor, "experts hidden"]:
    """Multinomial logistic regression from router inputs to the source whose text they are of.

    `inputs`: for each expert, what the new model's router reads on that source's text; equal
    numbers of tokens count equally. L-BFGS on the mean cross-entropy plus 1e-4 times the squared
    weights (the problem is convex); rows are divided by `temperature` afterwards.
    """
    features = torch.cat(list(inputs))
    counts = [len(rows) for rows in inputs]
    labels = torch.arange(len(inputs)).repeat_interleave(torch.tensor(counts)).to(features.device)
    weight = torch.cat([torch.full((count,), 1 / count) for count in counts]).to(features)
    router = torch.zeros(len(inputs), features.shape[1], device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([router], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = torch.nn.functional.cross_entropy(features @ router.T, labels, reduction="none")
        value = (entropy * weight).sum() / len(inputs) + _DECAY * router.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return router.detach() / temperature


def hidden_router(
    inputs: Sequence[Float[Tensor, "_ hidden"]], temperature: float
) -> Float[Tensor, "experts hidden"]:
    """Each source's mean router input, centred over the sources and normalised to length one."""
    means = torch.stack([rows.mean(dim=0) for rows in inputs])
    return torch.nn.functional.normalize(means - means.mean(dim=0), dim=-1) / temperature


def ridge_router(
    inputs: Sequence[Float[Tensor, "_ hidden"]], temperature: float
) -> Float[Tensor, "experts hidden"]:
    """Ridge regression from router inputs to the source whose text they are of (DUME, arXiv
    2603.29765).

    `inputs`: for each expert, router inputs on its source's text. With all of them as rows of `X`
    and `Y` one-hot, `(XᵀX + 0.01 I)⁻¹ XᵀY`; each row of the router is then brought to length one
    and divided by `temperature`. Where the matrix is ill-conditioned the ridge is raised. DUME's
    router also has an intercept. The routers of stock architectures have none, so the regression
    has none.
    """
    first = inputs[0]
    sums = LeastSquares(first.shape[1], len(inputs), device=first.device)
    for number, rows in enumerate(inputs):
        wanted = torch.zeros(len(rows), len(inputs), dtype=torch.float64, device=first.device)
        wanted[:, number] = 1
        sums.update(rows.double(), wanted)
    strength = float(sums.gram.diagonal().mean())
    nothing = torch.zeros(len(inputs), first.shape[1], device=first.device)
    router = sums.solve(nothing, _RIDGE / strength if strength > 0 else 1.0).weight
    return torch.nn.functional.normalize(router, dim=-1) / temperature
