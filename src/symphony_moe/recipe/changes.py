"""The recipe of a run with one expert more, one fewer, or another in its place."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from symphony_moe.errors import RecipeError, shortened
from symphony_moe.recipe.load import apply_override, resolve_recipe
from symphony_moe.recipe.settings import Parent, Recipe


def refuse_not_new(recipe: Recipe, name: str) -> None:
    """RecipeError where a name that is to be added is taken."""
    if name in recipe.sources:
        is_expert = name in recipe.expert_names
        raise RecipeError(
            f"add {name}: the run has a source of that name already; choose another name"
            + (f", or `symphony replace` {name}" if is_expert else "")
        )


def refuse_not_removable(recipe: Recipe, name: str, what: str) -> None:
    """RecipeError for a name that is no expert's, and for the source that the run stands on.
    `what`: the command."""
    experts = recipe.expert_names
    if name not in experts:
        near = difflib.get_close_matches(name, experts, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"its experts are {', '.join(experts)}"
        raise RecipeError(f"{what} {name}: no expert of the run is called so; {hint}")
    if name == recipe.anchor:
        raise RecipeError(
            f"{what} {name}: it is the anchor, whose tokenizer and coordinates the run has; build "
            "anew with another anchor"
        )
    if name == recipe.output.chat:
        raise RecipeError(
            f"{what} {name}: the run has its chat template and end of text (output.chat); build "
            "anew with another output.chat"
        )


def refuse_concatenated(recipe: Recipe, name: str) -> None:
    """RecipeError where the heads of attention belong to the experts' sources, as the experts do: a
    change of experts keeps attention as it is."""
    if recipe.concatenates_heads:
        raise RecipeError(
            f"{name}: the run's attention has the heads of each source (backbone.attention: "
            "concatenated), which a change of experts would leave as they are; build anew"
        )


def refuse_sliced(recipe: Recipe, name: str) -> None:
    """RecipeError where each source has several experts: they part in training, and no row of a
    router stands for a whole source any more."""
    if recipe.experts.per_source > 1:
        raise RecipeError(
            f"{name}: the run has {recipe.experts.per_source} experts of each source "
            "(experts.per_source), and a change of experts knows one of each; build anew"
        )


def refuse_too_few(recipe: Recipe, name: str) -> None:
    """RecipeError where no mixture is left without an expert."""
    if len(recipe.expert_names) <= 2:
        rest = next(one for one in recipe.expert_names if one != name)
        raise RecipeError(
            f"remove {name}: {rest} would be the only expert left, and a mixture has two at least; "
            f"take the model of {rest} as it is"
        )


def with_source(
    recipe: Recipe, name: str, spec: Mapping[str, Any], overrides: Sequence[str], parent: Parent
) -> Recipe:
    """The recipe with a source that is new, or new under its name. `spec`: of the source, its paths
    relative to the working directory. `overrides`: `sources.NAME.key=value` and
    `router.top_k=number`.

    Raises RecipeError for other overrides, and for what makes no recipe.
    """
    content = _content(recipe, parent)
    content["sources"][name] = dict(spec)
    chosen = recipe.experts.sources
    if chosen is not None and name not in chosen:
        content["experts"]["sources"] = [*chosen, name]
    shares = recipe.backbone.weights
    if shares is not None and name not in shares:
        # The kept backbone does not read it: it is for whoever builds anew.
        content["backbone"]["weights"] = {**shares, name: sum(shares.values()) / len(shares)}
    return _resolved(content, overrides, name)


def without_source(recipe: Recipe, name: str, overrides: Sequence[str], parent: Parent) -> Recipe:
    """The recipe without a source. `overrides`: `router.top_k=number`, where fewer experts are left
    than a token has.

    Raises RecipeError for other overrides, and for what makes no recipe.
    """
    content = _content(recipe, parent)
    del content["sources"][name]
    for section, key in (("experts", "sources"), ("calibration", "domains")):
        chosen = content[section][key]
        if chosen is not None:
            content[section][key] = [one for one in chosen if one != name] or None
    if recipe.backbone.weights is not None:
        left = {one: share for one, share in recipe.backbone.weights.items() if one != name}
        content["backbone"]["weights"] = left if sum(left.values()) > 0 else None
    return _resolved(content, overrides, None)


def _content(recipe: Recipe, parent: Parent) -> dict[str, Any]:
    return recipe.to_content(without=("compare",)) | {"parent": parent.model_dump(mode="json")}


def _resolved(content: dict[str, Any], overrides: Sequence[str], newcomer: str | None) -> Recipe:
    """The changed recipe. Paths of the newcomer are relative to the working directory; all others
    have been resolved before."""
    allowed = ["router.top_k"] if newcomer is None else ["router.top_k", f"sources.{newcomer}."]
    for override in overrides:
        setting = override.partition("=")[0].strip()
        if not any(
            setting == one or (one[-1] == "." and setting.startswith(one)) for one in allowed
        ):
            can = ", ".join(one + "KEY" if one[-1] == "." else one for one in allowed)
            raise RecipeError(
                f"--set {shortened(override, 100)}: the other experts and the backbone are kept as "
                f"they are; what can change is: {can}"
            )
        apply_override(content, override)
    relative = [] if newcomer is None else [newcomer]
    return resolve_recipe(content, Path.cwd(), "the changed recipe", relative=relative)
