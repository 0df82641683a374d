"""Rows of a source's tables for tokens that the anchor has and the source lacks.

They are made of rows that the source has, without training. What a token is among the tokens that
both models have is read off the anchor's table and said again in the source's own rows: by a few of
those tokens (orthogonal matching pursuit: Goddard and Fernandes Neto, "Training-Free Tokenizer
Transplantation via Orthogonal Matching Pursuit", arXiv 2506.06607; the pursuit is Pati, Rezaiifar
and Krishnaprasad 1993), or by one linear map (ridge regression).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symphony_moe.model.layer import device

MOST_TERMS = 64
"""Shared tokens that a missing one is made of, at most."""

_COLUMNS_PER_TERM = 8
"""A table of so many columns allows one term: as many terms as columns make up any row."""

SCORES_AT_ONCE = 2**25
"""Numbers that are compared at once (128 MiB)."""

TOKENS_AT_ONCE = 256
"""Tokens whose terms are looked for at once."""

_RIDGE = 1e-2
"""Of the regression, as a share of the mean squared input."""


@dataclass(frozen=True)
class Combination:
    """Rows as weighted sums of a table's rows."""

    rows: Int[Tensor, "tokens terms"]
    """Numbers of rows in the source's table."""
    weights: Float[Tensor, "tokens terms"]


@dataclass(frozen=True)
class LinearMap:
    """Rows as the image of the anchor's rows: (row - `centre`) @ `matrix` + `image`."""

    centre: Float[Tensor, " hidden"]
    matrix: Float[Tensor, "hidden own"]
    image: Float[Tensor, " own"]

    def apply(self, rows: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens own"]:
        """The images of some of the anchor's rows."""
        return (rows - self.centre) @ self.matrix + self.image


def terms_for(hidden: int) -> int:
    """How many shared tokens a missing one is made of, by the width of the anchor's table."""
    return max(1, min(MOST_TERMS, hidden // _COLUMNS_PER_TERM))


def pursue(
    targets: Float[Tensor, "tokens hidden"], atoms: Float[Tensor, "shared hidden"], terms: int
) -> tuple[Int[Tensor, "tokens terms"], Float[Tensor, "tokens terms"]]:
    """(numbers of atoms, weights) of each target as a weighted sum of `terms` atoms.

    Orthogonal matching pursuit: the atom with the largest cosine to what is left of the target is
    added, and all weights are solved for again, by least squares. `terms` is at most the number of
    atoms.
    """
    lengths = torch.linalg.vector_norm(atoms, dim=1).clamp_min(torch.finfo(atoms.dtype).tiny)
    units, count = atoms / lengths[:, None], len(targets)
    chosen = torch.empty(count, 0, dtype=torch.int64, device=targets.device)
    picked = targets.new_empty(count, terms, targets.shape[1])
    # Of atoms that are nearly the same, the diagonal keeps the weights apart.
    gram = (1 + 1e-6) * torch.eye(terms, dtype=torch.float64, device=targets.device)
    gram = gram.repeat(count, 1, 1)
    wanted = gram.new_empty(count, terms, 1)
    weights, left = targets.new_empty(count, 0), targets
    for place in range(terms):
        now = place + 1
        cosines = (left @ units.T).abs_().scatter_(1, chosen, -1.0)
        chosen = torch.cat((chosen, cosines.argmax(dim=1, keepdim=True)), dim=1)
        unit = picked[:, place] = units[chosen[:, place]]
        products = (picked[:, :place] @ unit[:, :, None])[:, :, 0].double()
        gram[:, place, :place] = gram[:, :place, place] = products
        wanted[:, place, 0] = (unit * targets).sum(dim=1)
        factor = torch.linalg.cholesky(gram[:, :now, :now])
        weights = torch.cholesky_solve(wanted[:, :now], factor)[:, :, 0].to(targets.dtype)
        left = targets - (weights[:, None] @ picked[:, :now])[:, 0]
    return chosen, weights / lengths[chosen]


def regress(theirs: Float[Tensor, "shared hidden"], own: Float[Tensor, "shared own"]) -> LinearMap:
    """The linear map from the anchor's rows of the shared tokens to the source's, by ridge
    regression about their means (float64)."""
    centre, image = theirs.double().mean(dim=0), own.double().mean(dim=0)
    inputs, outputs = theirs.double() - centre, own.double() - image
    gram = inputs.T @ inputs
    gram.diagonal().add_(_RIDGE * float(gram.diagonal().mean()) + 1e-30)
    matrix = torch.linalg.solve(gram, inputs.T @ outputs)
    return LinearMap(centre.float(), matrix.float(), image.float())


@runtime_checkable
class HasTables(Protocol):
    """What rows of tables are read from: a source."""

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        ...

    @property
    def head_name(self) -> str:
        """The tensor that holds its output head."""
        ...

    def rows_of(self, name: str, wanted: Tensor, reads: Any = None) -> Tensor:
        """Rows of a table by their numbers."""
        ...


@dataclass(frozen=True)
class Places:
    """Where the tokens are that matter to a transplant, each in ascending order of its number in
    the shared vocabulary, which is the number of the anchor's row."""

    shared: Int[Tensor, " shared"]
    """Ordinary tokens that both have."""
    own: Int[Tensor, " shared"]
    """The source's rows of them."""
    missing: Int[Tensor, " missing"]
    """Ordinary tokens that the anchor has and the source lacks."""


@dataclass(frozen=True)
class Transplant:
    """How sources get rows for the anchor's tokens that they lack. What is found is kept: both
    sweeps of a build, and what is evaluated, ask again."""

    method: str
    """`pieces`, `pursuit` or `regression` (`backbone.missing_tokens`)."""
    anchor: HasTables
    _found: dict[tuple[str, ...], Combination | LinearMap] = field(default_factory=dict)

    @property
    def makes_of_pieces(self) -> bool:
        """Whether a row is the mean of its token's pieces, which nothing has to be found for."""
        return self.method == "pieces"

    def find(
        self, source: HasTables, tables: tuple[str, str], places: Places
    ) -> Combination | LinearMap:
        """How the rows of a source's missing tokens are made. `tables`: names of the source's
        table and of the anchor's."""
        if self.method == "pursuit":
            # Nothing of the source's weights: one search for all sources of one tokenizer.
            key: tuple[str, ...] = (tables[1], str(places.shared.tolist()))
            if key not in self._found:
                self._found[key] = self._pursue(tables[1], places)
            found = self._found[key]
            assert isinstance(found, Combination)
            return Combination(places.own[found.rows], found.weights)
        key = (source.name, *tables)
        if key not in self._found:
            theirs = self.anchor.rows_of(tables[1], places.shared)
            self._found[key] = regress(theirs, source.rows_of(tables[0], places.own))
        return self._found[key]

    def _pursue(self, table: str, places: Places) -> Combination:
        """The rows being places among the shared tokens."""
        atoms = self.anchor.rows_of(table, places.shared).to(device())
        terms = min(terms_for(atoms.shape[1]), len(atoms))
        found = [
            pursue(targets.to(device()), atoms, terms) for targets in self._targets(table, places)
        ]
        chosen, weights = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        return Combination(chosen, weights)

    def _targets(self, table: str, places: Places) -> Iterator[Tensor]:
        """The anchor's rows of the missing tokens, as many at once as are compared at once."""
        at_once = min(TOKENS_AT_ONCE, max(1, SCORES_AT_ONCE // len(places.shared)))
        for numbers in places.missing.split(at_once):
            yield self.anchor.rows_of(table, numbers)
