"""Products in bfloat16 stay where they were asked for, round no more than they say, and compute the
same layer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from symphony_moe.model import precision
from symphony_moe.model.families import DOWN, GATE, UP
from symphony_moe.model.layer import MixtureOfExperts, gated_neurons, route
from symphony_moe.model.precision import exact, float32_results, is_reduced, products

CPU = torch.device("cpu")
HALF_A_STEP = 2.0**-9
"""Largest relative error of rounding to bfloat16."""


@pytest.mark.parametrize("has_units", [False, True])
def test_auto_is_bfloat16_for_wide_models_on_hardware_that_multiplies_it(
    has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: has_units)
    for hidden in (64, 511, 512, 4096):
        assert is_reduced("auto", hidden, CPU) == (has_units and hidden >= 512)
        assert is_reduced("bfloat16", hidden, CPU)
        assert not is_reduced("float32", hidden, CPU)


def test_what_is_set_is_set_back() -> None:
    """Also where the block raises, and inside one another."""

    def state() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")

    before = state()
    assert before == ("highest", False)
    with pytest.raises(ZeroDivisionError), products("bfloat16", 8, CPU):
        assert state() == ("medium", True)
        with float32_results(CPU):
            assert state() == ("medium", False)
        with exact(CPU):
            assert state() == before
        assert state() == ("medium", True)
        raise ZeroDivisionError
    assert state() == before
    with products("float32", 8, CPU):
        assert state() == before


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_float32_results_round_the_factors_alone(seed: int, scale: float) -> None:
    """Entry by entry no further from the exact product than the rounding of its factors."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((64, 96), (96, 32)))
    a *= scale * torch.rand(96, generator=generator).exp()
    with products("bfloat16", 8, CPU), float32_results(CPU):
        found = a @ b
    assert found.dtype == torch.float32
    sizes = a.double().abs() @ b.double().abs()
    bound = (2 * HALF_A_STEP + HALF_A_STEP**2 + 1e-5) * sizes
    assert bool(((found.double() - a.double() @ b.double()).abs() <= bound).all())


def experts_and_router(
    num_experts: int, hidden: int = 16, ffn: int = 24, seed: int = 0
) -> tuple[list[dict[str, Tensor]], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        drawn: Tensor = torch.randn(rows, columns, generator=generator)
        return drawn / math.sqrt(columns)

    experts = [
        {GATE: random(ffn, hidden), UP: random(ffn, hidden), DOWN: random(hidden, ffn)}
        for _ in range(num_experts)
    ]
    return experts, random(num_experts, hidden)


def leaves(mixture: MixtureOfExperts) -> list[Tensor]:
    parts = [mixture.router, *(t for expert in mixture.experts for t in expert.values())]
    return [part.requires_grad_(True) for part in parts]


def token_by_token(mixture: MixtureOfExperts, hidden: Tensor) -> Tensor:
    """The mixture's definition: every expert on every token, by torch's own gradients."""
    flat = hidden.flatten(0, 1)
    gates, chosen = route(flat, mixture.router, mixture.top_k)
    by_expert = torch.zeros(len(flat), len(mixture.experts)).scatter(1, chosen, gates)
    outputs = [gated_neurons(e, flat, mixture.activation) @ e[DOWN].T for e in mixture.experts]
    mixed = sum(by_expert[:, n, None] * output for n, output in enumerate(outputs))
    assert isinstance(mixed, Tensor)
    result: Tensor = mixed.view_as(hidden)
    return result


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 1), (3, 2), (5, 3), (4, 4)])
def test_the_mixtures_own_gradients_are_torchs(num_experts: int, top_k: int) -> None:
    """Of the tokens, the router and every expert; one expert is chosen by nobody."""
    experts, router = experts_and_router(num_experts)
    mixture = MixtureOfExperts(experts, router, top_k, nn.SiLU())
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    if top_k < num_experts:
        hidden += 50 * torch.nn.functional.normalize(router[:top_k].sum(dim=0) - router[-1], dim=0)
    inputs = [hidden.requires_grad_(True), *leaves(mixture)]
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    found, expected = mixture(hidden), token_by_token(mixture, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = (
        torch.autograd.grad((of * weight).sum(), inputs, allow_unused=True)
        for of in (found, expected)
    )
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_weights_that_learn_inside_the_block_are_seen() -> None:
    """A cast that is kept would be that of the weights before the step."""
    experts, router = experts_and_router(3)
    mixture = MixtureOfExperts(experts, router, 2, nn.SiLU())
    parameters = leaves(mixture)
    hidden = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
    with products("bfloat16", 16, CPU):
        before = mixture(hidden)
        before.square().mean().backward()
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.dtype == torch.float32 and parameter.grad is not None
                parameter.mul_(1.5)
        after = mixture(hidden)
    with products("bfloat16", 16, CPU):
        anew = mixture(hidden)
    assert torch.equal(after, anew) and not torch.equal(after, before)


def test_a_mixture_in_bfloat16_is_the_mixture() -> None:
    """What it adds to the residual stream is off by no more than some roundings, also where two
    experts are close: the router is float32 still."""
    experts, router = experts_and_router(4, hidden=64, ffn=96)
    mixture = MixtureOfExperts(experts, router, 2, nn.SiLU())
    hidden = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(1))
    expected = mixture(hidden)
    with products("bfloat16", 64, CPU):
        found = mixture(hidden)
    assert found.dtype == torch.float32
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 1e-5 < float(error.median()) < 8 * HALF_A_STEP
