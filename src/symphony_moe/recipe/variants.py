"""A recipe and a list of methods and seeds -> one recipe for each run of a comparison."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from operator import attrgetter
from pathlib import Path
from typing import Any

from symphony_moe.errors import RecipeError
from symphony_moe.recipe.load import read_content, resolve_recipe
from symphony_moe.recipe.mistakes import nearest
from symphony_moe.recipe.presets import PRESETS
from symphony_moe.recipe.settings import Recipe


def load_variants(
    path: str | Path,
    overrides: Iterable[str] = (),
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> tuple[Recipe, dict[str, dict[int, Recipe]]]:
    """(the recipe, method -> seed -> its recipe): what `symphony compare` compares.

    `methods` and `seeds` take the place of the recipe's own. A method is a preset or one of
    `compare.variants`; a variant's settings are put over the recipe's, section by section. What a
    recipe says that its own method's preset says too, as a run's `recipe.yaml` does of everything,
    is that preset's and not put on the others. Raises RecipeError as `load_recipe` does, naming the
    method, for a method that is neither, and for two that are the same but for their names.

    >>> from symphony_moe import load_variants
    >>> recipe, variants = load_variants("recipe.yaml", methods=["symphony", "btx"], seeds=[1, 2])
    >>> list(variants), list(variants["btx"])
    (['symphony', 'btx'], [1, 2])
    """
    path = Path(path)
    content = read_content(path, overrides)
    folder = path.resolve().parent
    recipe = resolve_recipe(content, folder, str(path))
    content.pop("compare", None)
    shared = _without_presets(content, folder, str(path))
    settings = recipe.compare
    chosen = list(methods or settings.methods or PRESETS)
    known = [*PRESETS, *settings.variants]
    found: dict[str, dict[int, Recipe]] = {}
    # Variants that are not compared now may have mistakes too.
    for name in [*chosen, *(name for name in settings.variants if name not in chosen)]:
        if name not in known:
            hint = nearest(name, known) or f"; there is: {', '.join(known)}"
            raise RecipeError(f"{path}: {name!r} is no method and no compare.variants{hint}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise RecipeError(
                f"{path}: compare.variants: the name {name!r} may hold letters, digits, '.', '_', "
                "'+' and '-' only"
            )
        variant = settings.variants.get(name, {"method": name})
        for seed in seeds or settings.seeds:
            # All are measured on the same held-out text, whatever they are trained with.
            held_out = recipe.seed if recipe.evaluation.seed is None else recipe.evaluation.seed
            seeded = {
                "seed": seed,
                "calibration": {"seed": seed},
                "evaluation": {"seed": held_out},
            }
            common = _over(shared, seeded)
            one = resolve_recipe(_over(common, variant), folder, f"{path}: {name}")
            _refuse_another_budget(path, name, one, resolve_recipe(common, folder, str(path)))
            if name in chosen:
                found.setdefault(name, {})[seed] = one
    _refuse_the_same(path, found)
    if settings.reference not in found and "reference" in settings.model_fields_set:
        raise RecipeError(
            f"{path}: compare.reference: {settings.reference!r} is not compared; compared are "
            f"{', '.join(found)}"
        )
    return recipe, found


def _without_presets(content: Mapping[Any, Any], folder: Path, who: str) -> dict[Any, Any]:
    """A recipe's settings without those that its method would give it anyway."""
    governed = {
        (section, key)
        for preset in PRESETS.values()
        for section, values in preset.items()
        for key in values
    }
    bare = {
        section: {k: v for k, v in own.items() if (section, k) not in governed}
        if isinstance(own, Mapping)
        else own
        for section, own in content.items()
    }
    try:
        given = resolve_recipe(bare, folder, who).model_dump(mode="json")
    except RecipeError:
        return dict(content)  # what it sets belongs together
    for section, key in governed:
        own = content.get(section)
        if isinstance(own, Mapping) and key in own and own[key] != given[section][key]:
            bare[section][key] = own[key]
    return bare


_COMMON = (
    "sources",
    "evaluation",
    "seed",
    "calibration.seed",
    "train.tokens",
    "train.sequence_length",
    "train.batch_size",
    "train.gradient_accumulation",
    "train.keep_best",
    "train.average",
    "compare",
)
"""What all runs of a comparison that have one seed have in common."""


def _refuse_another_budget(path: Path, name: str, recipe: Recipe, common: Recipe) -> None:
    """RecipeError for a variant that could not stand in one table with the others."""
    for key in _COMMON:
        own, theirs = (attrgetter(key)(one) for one in (recipe, common))
        if own != theirs:
            raise RecipeError(
                f"{path}: compare.variants.{name} changes {key}: runs that differ in it cannot "
                "stand in one table; set it for all of them"
            )


def _refuse_the_same(path: Path, variants: Mapping[str, Mapping[int, Recipe]]) -> None:
    """RecipeError for two methods that are one recipe but for their names."""
    recipes = {name: next(iter(of.values())) for name, of in variants.items()}
    for (one, first), (other, second) in combinations(recipes.items(), 2):
        if first.model_copy(update={"method": second.method}) == second:
            raise RecipeError(
                f"{path}: {one} and {other} are the same in everything; what the recipe sets "
                f"of {', '.join(PRESETS[first.method])} wins over a preset. Leave it out there, or "
                "set it in compare.variants, or leave one of the two out"
            )


def _over(settings: Mapping[Any, Any], others: Mapping[Any, Any]) -> dict[Any, Any]:
    """Settings with others in their place, section by section."""
    merged = dict(settings)
    for key, value in others.items():
        old = merged.get(key)
        if value is None and isinstance(old, Mapping):
            continue  # a section that is named and left empty
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _over(old or {}, value) if both else value
    return merged
