"""Whether sources are branches of one base or strangers, told from a few of their weights.

Training moves a model's weights little against their length, so branches of one base keep a cosine
near 1. Two models from different random seeds have theirs in coordinates of their own, whatever
they know: the cosine of two independent draws of n numbers is 0 with a deviation of n**-0.5.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from symphony_moe.model.families import NEURON_AXIS
from symphony_moe.recipe.presets import PRESETS
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.source import Source

Kinship = Literal["branches", "distant", "strangers"]

STRANGERS_BELOW = 0.1
"""Cosine below which two models have nothing in common. The bundled strangers have -0.002 to 0.002,
and 0.03 at most in a single matrix."""

BRANCHES_FROM = 0.8
"""Cosine from which two models are branches of one base. The bundled branches have 0.949 to 0.960,
and 0.89 at least in a single matrix. What lies between was not measured: models that were trained
on for very long, or that are merges of others."""

_NUMBERS = 2**14
"""Of a matrix, as many of the first rows are read as hold so many numbers: 0.7 MB in all of a model
of any size, in bfloat16."""


def likeness(source: Source, other: Source) -> float | None:
    """The mean cosine of two models' weights: of the first rows of every matrix of their first,
    middle and last layer, without FFNs that have different widths. Of a source with an adapter, its
    model's.

    None where the weights are not here, have other shapes, or are all zero. Raises SourceError for
    weights that cannot be read or are not finite.
    """
    one, two = (replace(each.as_stored, adapter=None) for each in (source, other))
    names = list(_matrices(one))
    if one.own_ffn != two.own_ffn:
        names = [name for name in names if not name.endswith(tuple(NEURON_AXIS))]
    for name in names:
        mine, theirs = (each.headers.get(name) for each in (one, two))
        if mine is None or theirs is None or mine.shape != theirs.shape:
            return None
        if mine.offset is None or theirs.offset is None:
            return None
    cosines = []
    for name in names:
        rows = slice(0, max(1, _NUMBERS // one.headers[name].shape[1]))
        first, second = (each.read(name, rows).flatten().double() for each in (one, two))
        if bool(first.any()) or bool(second.any()):  # rows of zeros in both say nothing
            cosines.append(torch.cosine_similarity(first, second, dim=0))
    return float(torch.stack(cosines).mean()) if cosines else None


def _matrices(source: Source) -> Iterator[str]:
    """The matrices of the first, middle and last layer."""
    last = source.config.num_hidden_layers - 1
    for layer in sorted({0, last // 2, last}):
        for name in (*source.family.shared, *source.family.expert):
            tensor = f"model.layers.{layer}.{name}"
            if tensor in source.headers and len(source.headers[tensor].shape) == 2:
                yield tensor


def likeness_to_anchor(sources: Sequence[Source], anchor: str) -> dict[str, float]:
    """Source -> `likeness` to the anchor, of the others; without those that cannot be compared. A
    model that several of them are adapters of is read once."""
    of_anchor = next(source for source in sources if source.name == anchor)
    of_models: dict[Path, float | None] = {of_anchor.folder: 1.0}
    for source in sources:
        if source.folder not in of_models:
            of_models[source.folder] = likeness(of_anchor, source)
    found = {s.name: of_models[s.folder] for s in sources if s.name != anchor}
    return {name: cosine for name, cosine in found.items() if cosine is not None}


def kinship(cosine: float) -> Kinship:
    """What two models are to each other whose weights are so alike."""
    if cosine < STRANGERS_BELOW:
        return "strangers"
    return "branches" if cosine >= BRANCHES_FROM else "distant"


def beyond_averaging(recipe: Recipe, cosines: Mapping[str, float]) -> str | None:
    """That the recipe puts sources into one backbone that share no coordinates, and what to set
    instead; None where it does not. Of a change of experts the newcomer alone counts. `cosines`:
    see `likeness_to_anchor`."""
    if recipe.aligns_residual or recipe.copies_anchor:
        return None
    apart = {
        name: cosine
        for name, cosine in cosines.items()
        if name in recipe.expert_names
        and kinship(cosine) != "branches"
        and (recipe.parent is None or name == recipe.newcomer)
    }
    if not apart:
        return None
    who = ", ".join(f"{name} ({two_digits(apart[name])})" for name in [*apart][:4])
    who += f" and {len(apart) - 4} more" if len(apart) > 4 else ""
    told = (
        f"{who}: not fine-tuned from {recipe.anchor}'s base (the mean cosine of weights is below "
        f"{BRANCHES_FROM})."
    )
    if recipe.parent is not None:
        return f"{told} The kept backbone knows little of it; build anew, by method: harmonized"
    if recipe.backbone.attention == "anchor":
        return (
            f"{told} Method {recipe.method} here puts their experts on {recipe.anchor}'s backbone, "
            "whose residual stream is not theirs. Set method: harmonized, and take out what is set "
            "of backbone and router.init"
        )
    strangers = any(kinship(cosine) == "strangers" for cosine in apart.values())
    why = (
        "strangers lose most of what they know"
        if strangers
        else "the further apart weights are, the less their mean keeps of them"
    )
    aligns = PRESETS[recipe.method]["align"]["residual"] != "none"
    instead = "align.residual: orthogonal, align.heads: all" if aligns else "method: harmonized"
    return (
        f"{told} Method {recipe.method} here averages their weights as they are: {why}. Set "
        f"{instead}"
    )


def two_digits(cosine: float) -> str:
    """A cosine with two digits."""
    return f"{round(cosine, 2) + 0.0:.2f}"  # without the sign of -0.00
