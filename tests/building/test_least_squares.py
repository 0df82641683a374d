"""Fits from Gram matrices are the ridge regressions that they stand for, whatever the batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from symphony_moe.building.least_squares import MAX_CONDITION, LeastSquares, Solution
from symphony_moe.model.precision import products

SEEDS = st.integers(0, 2**31)


def random_problem(
    seed: int, tokens: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of different sizes and with a mean, outputs that no linear map gives exactly, weights
    to start from, and an intercept."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (random(tokens, inputs) + 0.3) * (0.3 + random(inputs).abs())
    y = x @ random(inputs, outputs) + random(outputs) + random(tokens, outputs)
    return x.to(dtype), y.to(dtype), random(outputs, inputs).float(), random(outputs).float()


def sums_of(
    x: Tensor, y: Tensor, *, intercept: bool = False, sizes: list[int] | None = None
) -> LeastSquares:
    sums = LeastSquares(x.shape[1], y.shape[1], intercept=intercept)
    for inputs, outputs in zip(*(t.split(sizes or [len(x)]) for t in (x, y)), strict=True):
        sums.update(inputs, outputs)
    return sums


def explicit_ridge(
    x: Tensor,
    y: Tensor,
    start: Tensor,
    ridge: float,
    start_intercept: Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """(weight, intercept) by numpy's lstsq: the pull is rows of data, each input on its own with
    the square of its ridge, and the intercept an input of one like others."""
    inputs, outputs, begin = x.double().numpy(), y.double().numpy(), start.double().numpy().T
    pull = np.full(x.shape[1], ridge * np.mean(np.sum(inputs**2, axis=0)))
    if start_intercept is not None:
        inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
        begin = np.concatenate([begin, start_intercept.double().numpy()[None]])
        pull = np.append(pull, ridge * len(inputs))
    rows = np.diag(np.sqrt(pull))
    a, b = np.concatenate([inputs, rows]), np.concatenate([outputs, rows @ begin])
    solution = np.linalg.lstsq(a, b, rcond=None)[0].T
    return (solution, None) if start_intercept is None else (solution[:, :-1], solution[:, -1])


def assert_is(fit: Solution, weight: np.ndarray, intercept: np.ndarray | None = None) -> None:
    """To float32's rounding."""
    assert fit.weight.dtype == torch.float32
    np.testing.assert_allclose(fit.weight.numpy(), weight, rtol=1e-5, atol=1e-5)
    assert (fit.intercept is None) == (intercept is None)
    if fit.intercept is not None and intercept is not None:
        assert fit.intercept.dtype == torch.float32
        np.testing.assert_allclose(fit.intercept.numpy(), intercept, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, inputs=st.integers(1, 12), outputs=st.integers(1, 6))
def test_without_a_pull_it_is_lstsq(seed: int, inputs: int, outputs: int) -> None:
    """A tiny ridge, whatever the start; with an intercept too."""
    x, y, start, bias = random_problem(seed, 200, inputs, outputs)
    fit = sums_of(x, y).solve(start, 1e-12)
    assert_is(fit, np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0].T)
    assert fit.ridge == 1e-12

    ones = np.concatenate([x.numpy(), np.ones((200, 1))], axis=1)
    both = np.linalg.lstsq(ones, y.numpy(), rcond=None)[0].T
    assert_is(sums_of(x, y, intercept=True).solve(start, 1e-12, bias), both[:, :-1], both[:, -1])


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    inputs=st.integers(1, 12),
    tokens=st.integers(1, 60),
    ridge=st.sampled_from([1e-4, 1e-2, 0.3, 10.0]),
    intercept=st.booleans(),
)
def test_with_a_pull_it_is_the_ridge_regression_toward_the_start(
    seed: int, inputs: int, tokens: int, ridge: float, intercept: bool
) -> None:
    """Also with fewer tokens than unknowns; the intercept is pulled to its own start."""
    x, y, start, bias = random_problem(seed, tokens, inputs, 3)
    begin = bias if intercept else None
    fit = sums_of(x, y, intercept=intercept).solve(start, ridge, begin)
    assert_is(fit, *explicit_ridge(x, y, start, ridge, begin))
    assert fit.ridge == ridge and 1 <= fit.condition < MAX_CONDITION


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, sizes=st.lists(st.integers(1, 30), min_size=2, max_size=7), bias=st.booleans())
def test_the_split_into_batches_changes_nothing(seed: int, sizes: list[int], bias: bool) -> None:
    """Sums of float64 add up to rounding; nothing of a batch is normalised on its own."""
    x, y, start, intercept = random_problem(seed, sum(sizes), 5, 4)
    x[: sizes[0]] *= 30
    once = sums_of(x, y, intercept=bias)
    often = sums_of(x, y, intercept=bias, sizes=sizes)
    assert once.count == often.count == sum(sizes)
    torch.testing.assert_close(often.gram, once.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(often.moments, once.moments, rtol=1e-12, atol=1e-10)
    begin = intercept if bias else None
    weights = [sums.solve(start, 1e-2, begin).weight for sums in (once, often)]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


def test_float32_batches_are_summed_in_float64() -> None:
    """A thousand small batches after a large one are not lost in its rounding."""
    x, y, start, _ = random_problem(0, 4000, 3, 2, torch.float32)
    x[:4] *= 30000
    sums, first = sums_of(x, y, sizes=[4] * 1000), sums_of(x[:4], y[:4])
    rest = x[4:].double().T @ x[4:].double()
    torch.testing.assert_close(sums.gram - first.gram, rest, rtol=1e-6, atol=1e-6)
    assert sums.gram.dtype == sums.moments.dtype == torch.float64
    assert_is(sums.solve(start, 1e-3), *explicit_ridge(x, y, start, 1e-3))


def test_targets_of_the_start_itself_change_nothing() -> None:
    """Where the start fits already it stays, under any pull."""
    x, _, start, bias = random_problem(1, 50, 6, 4)
    y = x @ start.double().T + bias.double()
    for ridge in (1e-6, 1e-2, 1.0, 100.0):
        fit = sums_of(x, y, intercept=True).solve(start, ridge, bias)
        torch.testing.assert_close(fit.weight, start, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(fit.intercept, bias, rtol=1e-6, atol=1e-6)


def test_a_strong_pull_stays_at_the_start_and_a_weak_one_goes_to_the_fit() -> None:
    """The error falls with every tenth of the ridge, and the way from the start grows."""
    x, y, start, bias = random_problem(2, 50, 6, 4)
    sums = sums_of(x, y, intercept=True)
    errors, ways = [], []
    for ridge in (1e6, 10.0, 1.0, 0.1, 0.01, 1e-3):
        fit = sums.solve(start, ridge, bias)
        assert fit.intercept is not None
        made = x @ fit.weight.double().T + fit.intercept.double()
        errors.append(float((made - y).square().sum()))
        ways.append(float((fit.weight - start).norm() + (fit.intercept - bias).norm()))
    assert errors == sorted(errors, reverse=True) and ways == sorted(ways)
    assert ways[0] < 1e-4 < 1 < ways[-1]


def test_the_pull_does_not_depend_on_the_scale_or_the_number_of_tokens() -> None:
    """A share of the mean squared input: text twice over, and streams of another length with
    weights to match, are the same regression. The intercept's share is that of an input of one."""
    x, y, start, bias = random_problem(3, 40, 5, 3)
    fit = sums_of(x, y, intercept=True).solve(start, 0.05, bias)
    twice = torch.cat((x, x)), torch.cat((y, y))
    assert_is(
        sums_of(*twice, intercept=True).solve(start, 0.05, bias),
        fit.weight.numpy(),
        None if fit.intercept is None else fit.intercept.numpy(),
    )
    longer = sums_of(100 * x, y).solve(start / 100, 0.05)
    assert_is(longer, sums_of(x, y).solve(start, 0.05).weight.numpy() / 100)
    # Inputs that say nothing: the intercept is the mean target, a share of the way.
    says_nothing = torch.cat((x, -x)), torch.cat((y, y))
    fit = sums_of(*says_nothing, intercept=True).solve(torch.zeros_like(start), 0.25, bias)
    expected = (y.mean(dim=0) + 0.25 * bias.double()) / 1.25
    assert_is(fit, np.zeros((3, 5)), expected.numpy())


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, tokens=st.integers(1, 7))
def test_what_few_tokens_leave_open_stays_as_it_was(seed: int, tokens: int) -> None:
    """Fewer tokens than inputs: the change from the start is zero on every input that is at right
    angles to what was seen, and what was seen is fitted."""
    x, y, start, _ = random_problem(seed, tokens, 8, 3)
    sums = sums_of(x, y)
    assert sums.count < len(sums.gram)
    fit = sums.solve(start, 1e-6)
    change = (fit.weight - start).double()
    unseen = torch.linalg.svd(x)[2][tokens:]
    size = float(change.abs().max())
    assert float((change @ unseen.T).abs().max()) < 1e-5 * max(1.0, size)
    assert float((change @ x.T).abs().max()) > 1e-3
    torch.testing.assert_close(x @ fit.weight.double().T, y, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(("tokens", "intercept"), [(7, False), (8, False), (8, True), (9, True)])
def test_fewer_tokens_than_unknowns_is_said(tokens: int, intercept: bool) -> None:
    """The intercept is one unknown more."""
    x, y, _, _ = random_problem(0, tokens, 8, 2)
    sums = sums_of(x, y, intercept=intercept, sizes=[3, tokens - 3])
    assert (sums.count < len(sums.gram)) == (tokens < 8 + intercept)


@pytest.mark.parametrize("case", ["copies", "scales", "constant"])
def test_ill_conditioned_inputs_raise_the_ridge(case: str) -> None:
    """Inputs that are copies of one another, differ by nine orders of magnitude, or leave the
    intercept open: the ridge rises by tens until the matrix is safe, and the fit is finite, with
    the start where nothing is known."""
    x, y, start, bias = random_problem(4, 60, 6, 3)
    if case == "copies":
        x[:, 3:] = x[:, :3]
    elif case == "scales":
        x[:, 0] *= 1e9
    else:
        x[:, 2] = 5.0
    sums = sums_of(x, y, intercept=case == "constant")
    begin = bias if case == "constant" else None
    fit = sums.solve(start, 1e-16, begin)
    steps = math.log10(fit.ridge / 1e-16)
    assert steps == pytest.approx(round(steps), abs=1e-9) and steps >= 1
    assert 1e3 < fit.condition <= MAX_CONDITION
    assert torch.isfinite(fit.weight).all()
    if case == "copies":
        # Twice the same input: the fit decides the sum of their weights, the start the difference.
        difference = fit.weight[:, :3] - fit.weight[:, 3:]
        torch.testing.assert_close(difference, start[:, :3] - start[:, 3:], rtol=1e-3, atol=1e-3)
    weaker = sums.solve(start, fit.ridge, begin)
    assert weaker.ridge == fit.ridge and torch.equal(weaker.weight, fit.weight)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("case", ["zeros", "no tokens", "nan"])
def test_where_nothing_is_known_nothing_changes(case: str, intercept: bool) -> None:
    """Inputs that are all zero (or no numbers at all) give the start back, and say so."""
    _, y, start, bias = random_problem(5, 20, 4, 3)
    sums = LeastSquares(4, 3, intercept=intercept)
    if case != "no tokens":
        sums.update(torch.full((20, 4), math.nan if case == "nan" else 0.0), y.float())
    fit = sums.solve(start, 1e-2, bias if intercept else None)
    assert torch.equal(fit.weight, start)
    if intercept:
        assert fit.intercept is not None and torch.equal(fit.intercept, bias)
    assert fit.condition == fit.ridge == math.inf


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, ridge=st.sampled_from([1e-10, 1e-6, 1e-2]))
def test_the_condition_is_a_lower_bound_of_the_true_one(seed: int, ridge: float) -> None:
    """Of the matrix that was solved."""
    x, y, start, _ = random_problem(seed, 30, 7, 2)
    sums = sums_of(x, y)
    matrix = sums.gram + ridge * sums.gram.diagonal().mean() * torch.eye(7)
    condition = sums.solve(start, ridge).condition
    assert 1 <= condition <= float(torch.linalg.cond(matrix)) * (1 + 1e-9)


@pytest.mark.parametrize("start", [1e-16, 1e-15])
def test_the_ridge_rises_no_further_than_it_must(start: float) -> None:
    """By tens: a tenth of what was used would have left the matrix ill-conditioned."""
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x[:, 3:] = x[:, :3]
    sums = LeastSquares(6, 3)
    sums.update(x, x[:, :3])
    fit = sums.solve(torch.zeros(3, 6), start)
    less = 0.1 * fit.ridge * sums.gram.diagonal().mean() * torch.eye(6)
    edge = torch.linalg.cholesky(sums.gram + less).diagonal()
    assert float((edge.max() / edge.min()) ** 2) > MAX_CONDITION


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, inputs=st.integers(2, 40), intercept=st.booleans())
def test_reduced_sums_are_those_of_rounded_text(seed: int, inputs: int, intercept: bool) -> None:
    """In bfloat16 no entry of the Gram matrix is further off than 2^-8 of what its inputs weigh,
    the matrix has no negative eigenvalue, and the weights are those of the rounded batch: the error
    is one of the text, whatever the condition."""
    x, y, start, bias = random_problem(seed, 300, inputs, 3, torch.float32)
    with products("bfloat16", inputs, torch.device("cpu")):
        reduced = sums_of(x, y, intercept=intercept, sizes=[100, 200])
    plain = sums_of(x.double(), y.double(), intercept=intercept)
    sizes = plain.gram.diagonal().sqrt()
    error = (reduced.gram - plain.gram).abs() / torch.outer(sizes, sizes)
    assert float(error.max()) <= 2**-8 + 2**-18 + 1e-5
    assert float(torch.linalg.eigvalsh(reduced.gram)[0]) >= -1e-5 * float(reduced.gram.trace())

    begin = bias if intercept else None
    found = reduced.solve(start, 1e-2, begin).weight
    expected = plain.solve(start, 1e-2, begin).weight
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
