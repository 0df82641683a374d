"""Routers at their start: what each kind is, and that the order of sources is a matter of rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from symphony_moe.building.router_init import (
    STANDARD_DEVIATION,
    hidden_router,
    random_router,
    regression_router,
    ridge_router,
)

SEEDS = st.integers(0, 2**31)


def router_inputs(
    seed: int, counts: list[int], hidden: int = 8, apart: float = 1.0
) -> list[Tensor]:
    """For each source, tokens around a centre of its own; all of RMS near one, as after a norm."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for count in counts:
        centre = apart * torch.randn(hidden, generator=generator)
        rows = centre + torch.randn(count, hidden, generator=generator)
        inputs.append(torch.nn.functional.normalize(rows, dim=-1) * hidden**0.5)
    return inputs


def hits(router: Tensor, inputs: list[Tensor]) -> list[float]:
    """For each source, the share of its tokens whose largest logit is its own."""
    return [
        float(((rows @ router.T).argmax(dim=-1) == number).float().mean())
        for number, rows in enumerate(inputs)
    ]


def objective(flat: np.ndarray, inputs: list[Tensor]) -> tuple[float, np.ndarray]:
    """(value, gradient) of what the docstring says: the mean over sources of the mean cross-entropy
    of a source's tokens, plus 1e-4 times the squared weights. float64."""
    router = flat.reshape(len(inputs), -1)
    value, gradient = 1e-4 * np.sum(router**2), 2e-4 * router
    for number, rows in enumerate(inputs):
        x = rows.double().numpy()
        logits = x @ router.T
        norm = logsumexp(logits, axis=1, keepdims=True)
        value += np.mean(norm[:, 0] - logits[:, number]) / len(inputs)
        surplus = np.exp(logits - norm)
        surplus[:, number] -= 1
        gradient = gradient + surplus.T @ x / len(x) / len(inputs)
    return value, gradient.ravel()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_regression_separates_what_can_be_separated(count: int) -> None:
    """Sources far apart: every token finds its source, with high probability."""
    inputs = router_inputs(count, [60] * count, hidden=16, apart=4)
    router = regression_router(inputs, 1.0)
    assert router.shape == (count, 16) and router.dtype == torch.float32
    assert hits(router, inputs) == [1.0] * count
    for number, rows in enumerate(inputs):
        assert torch.softmax(rows @ router.T, dim=-1)[:, number].mean() > 0.9


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, counts=st.lists(st.integers(1, 60), min_size=2, max_size=4))
def test_regression_is_the_optimum_of_its_objective(seed: int, counts: list[int]) -> None:
    """The gradient there is zero, and scipy finds no better. Sources of few tokens and of many:
    each counts as one."""
    inputs = router_inputs(seed, counts)
    found = regression_router(inputs, 1.0).double().numpy().ravel()
    value, gradient = objective(found, inputs)
    best = minimize(objective, np.zeros_like(found), args=(inputs,), jac=True, method="L-BFGS-B")
    start, at_start = objective(np.zeros_like(found), inputs)
    assert value <= best.fun + 1e-3 * (start - best.fun)
    assert np.abs(gradient).max() < 5e-3 * max(np.abs(at_start).max(), 0.1)


def test_text_twice_over_is_the_same_text() -> None:
    """A source with more tokens than the others is not chosen more often for it."""
    inputs = router_inputs(1, [80, 50, 30])
    router = regression_router(inputs, 1.0)
    again = regression_router([inputs[0].repeat(9, 1), *inputs[1:]], 1.0)
    torch.testing.assert_close(again, router, rtol=0, atol=2e-2)


@pytest.mark.parametrize("method", [regression_router, hidden_router, ridge_router])
def test_another_order_of_sources_is_another_order_of_rows(method: type) -> None:
    """Law 4: to rounding, and to where L-BFGS stops."""
    inputs = router_inputs(2, [50, 70, 40, 60])
    router, order = method(inputs, 1.0), [2, 0, 3, 1]
    again = method([inputs[number] for number in order], 1.0)
    torch.testing.assert_close(again, router[order], rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", [regression_router, hidden_router, ridge_router])
def test_the_temperature_divides_the_logits(method: type) -> None:
    inputs = router_inputs(3, [40, 40, 40])
    for temperature in (0.25, 3.0):
        torch.testing.assert_close(method(inputs, temperature), method(inputs, 1.0) / temperature)


@pytest.mark.parametrize("method", [regression_router, hidden_router, ridge_router])
def test_routers_come_without_a_graph_and_without_leave(method: type) -> None:
    """Inside `no_grad` as outside: the same rows; no gradient reaches the inputs, which stay as
    they were."""
    inputs = router_inputs(4, [30, 30])
    before = [rows.clone() for rows in inputs]
    outside = method(inputs, 1.0)
    with torch.no_grad():
        inside = method(inputs, 1.0)
    assert torch.equal(inside, outside)
    assert not inside.requires_grad and not outside.requires_grad
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))
    assert all(rows.grad is None for rows in inputs)


def test_equal_sources_get_equal_rows() -> None:
    """Nothing tells them apart: the regression does not either, and nothing is divided by zero."""
    rows = router_inputs(5, [50])[0]
    assert float(regression_router([rows, rows], 1.0).abs().max()) < 1e-6
    assert torch.equal(hidden_router([rows, rows], 1.0), torch.zeros(2, 8))


def test_the_hidden_router_is_each_sources_centred_mean() -> None:
    """Of length one; a source with more tokens does not move the centre."""
    inputs = router_inputs(6, [90, 20, 40])
    router = hidden_router(inputs, 1.0)
    means = np.stack([rows.double().numpy().mean(axis=0) for rows in inputs])
    centred = means - means.mean(axis=0)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(router.numpy(), expected, atol=1e-6)
    apart = router_inputs(7, [50] * 3, hidden=16, apart=4)
    assert min(hits(hidden_router(apart, 1.0), apart)) > 0.9


def test_random_rows_are_keyed_by_seed_layer_and_name() -> None:
    """Law 4: another order of sources is another order of rows, bit for bit."""
    router = random_router(["a", "b", "c"], 4096, 3, 7)
    again = random_router(["c", "a", "d"], 4096, 3, 7)
    assert torch.equal(again[:2], router[[2, 0]])
    others = [router[1], again[2]]
    others += [random_router(["a"], 4096, *key)[0] for key in ((3, 8), (4, 7))]
    assert not any(torch.equal(router[0], other) for other in others)
    assert float(router.std()) == pytest.approx(STANDARD_DEVIATION, rel=0.02)
    assert abs(float(router.mean())) < 1e-3


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, counts=st.lists(st.integers(1, 60), min_size=2, max_size=4))
def test_the_ridge_router_is_the_regression_of_its_paper(seed: int, counts: list[int]) -> None:
    """(XᵀX + 0.01 I)⁻¹ XᵀY, each row of length one: by a least-squares solver on rows that stand
    for the ridge. A source of few tokens too, where there are fewer tokens than unknowns."""
    inputs = router_inputs(seed, counts)
    rows = np.concatenate([rows.double().numpy() for rows in inputs])
    wanted = np.repeat(np.eye(len(counts)), counts, axis=0)
    rows = np.concatenate([rows, 0.1 * np.eye(8)])
    wanted = np.concatenate([wanted, np.zeros((8, len(counts)))])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    router = ridge_router(inputs, 1.0)
    assert router.dtype == torch.float32
    np.testing.assert_allclose(router.numpy(), expected, atol=1e-5)


def test_the_ridge_router_finds_sources_that_are_apart() -> None:
    inputs = router_inputs(8, [50] * 3, hidden=16, apart=4)
    assert min(hits(ridge_router(inputs, 1.0), inputs)) > 0.9
