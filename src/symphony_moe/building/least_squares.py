"""Ridge regression from Gram matrices: fits a linear map to its targets and keeps neither.

Minimises `sum ||x W^T - y||^2 + lambda ||W - W0||^2` over W (outputs x inputs), where W0 is where
the fit starts from and lambda is a share of the mean squared input. Only `X^T X` and `X^T Y` are
kept; they add up over batches, and their size does not depend on the number of tokens. The idea of
fitting merged models so is RegMean's (Jin et al. 2023, arXiv 2212.09849); here the inputs are those
of the new model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from symphony_moe.model.precision import float32_results
from symphony_moe.processes import Processes

MAX_CONDITION = 1e12
"""Above this the ridge is raised: float64 has 16 digits, and the result shall have four."""

_ESCALATIONS = 12


@dataclass(frozen=True)
class Solution:
    """A solved regression."""

    weight: Float[Tensor, "outputs inputs"]
    intercept: Float[Tensor, " outputs"] | None
    condition: float
    """Of the matrix that was solved, estimated from its Cholesky factor (a lower bound)."""
    ridge: float
    """The share that was used in the end; infinite where none was enough."""
    has_inputs: bool = True
    """Whether any input is not zero."""

    def to_tensors(self) -> dict[str, Tensor]:
        """For another process."""
        facts = [self.condition, self.ridge, float(self.has_inputs)]
        intercept = {} if self.intercept is None else {"intercept": self.intercept}
        numbers = torch.tensor(facts, dtype=torch.float64)
        return {"weight": self.weight, "facts": numbers, **intercept}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Solution":
        """The inverse of `to_tensors`."""
        condition, ridge, has_inputs = tensors["facts"].tolist()
        weight, intercept = tensors["weight"], tensors.get("intercept")
        return cls(weight, intercept, condition, ridge, bool(has_inputs))


class LeastSquares:
    """Sums of one regression, in float64. A batch is multiplied in its own number format, float32
    at least."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        intercept: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        size = num_inputs + intercept
        self.intercept = intercept
        self.count = 0
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.moments = torch.zeros(size, num_outputs, dtype=torch.float64, device=device)

    def update(
        self, inputs: Float[Tensor, "tokens inputs"], outputs: Float[Tensor, "tokens outputs"]
    ) -> None:
        """Add a batch. Where products are reduced, its numbers are rounded to bfloat16 first: the
        sums are then those of the rounded batch, so that the Gram matrix is one still."""
        inputs, outputs = (rows.to(_at_least_float32(rows)) for rows in (inputs, outputs))
        if self.intercept:
            inputs = torch.cat((inputs, inputs.new_ones(len(inputs), 1)), dim=1)
        with float32_results(inputs.device):
            self.gram += inputs.T @ inputs
            self.moments += inputs.T @ outputs
        self.count += len(inputs)

    def combine(self, processes: Processes, owner: int) -> None:
        """Add up what every process has seen of the text, for the one that solves it."""
        processes.add(self.gram, self.moments, owner=owner)
        self.count = processes.total(self.count)

    def solve(
        self,
        start: Float[Tensor, "outputs inputs"],
        ridge: float,
        start_intercept: Float[Tensor, " outputs"] | None = None,
    ) -> Solution:
        """The weights (float32) that fit, pulled toward `start`.

        Cholesky; where the matrix is not positive definite in float64, or its condition is beyond
        MAX_CONDITION, the ridge is multiplied by ten until it is.
        """
        begin = start.T.to(self.gram)
        if self.intercept:
            assert start_intercept is not None
            begin = torch.cat((begin, start_intercept.to(self.gram)[None]))
        residual = self.moments - self.gram @ begin
        diagonal = self.gram.diagonal()
        strength = float(diagonal[: start.shape[1]].mean())
        for _ in range(_ESCALATIONS):
            # The intercept is pulled as well, by what a constant input of one weighs.
            pull = torch.full_like(diagonal, ridge * strength)
            if self.intercept:
                pull[-1] = ridge * self.count
            factor, failed = torch.linalg.cholesky_ex(self.gram + torch.diag(pull))
            edge = factor.diagonal()
            condition = float((edge.max() / edge.min()) ** 2) if not bool(failed) else torch.inf
            if condition <= MAX_CONDITION:
                break
            ridge *= 10
        else:
            # Inputs that are all zero, or not to be told apart: nothing changes.
            has_inputs = bool(diagonal.any())
            return Solution(start.float(), start_intercept, torch.inf, torch.inf, has_inputs)
        solution = (begin + torch.cholesky_solve(residual, factor)).T.float()
        if not self.intercept:
            return Solution(solution.contiguous(), None, condition, ridge)
        return Solution(
            solution[:, :-1].contiguous(), solution[:, -1].contiguous(), condition, ridge
        )


def _at_least_float32(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)
