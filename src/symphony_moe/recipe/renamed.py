"""Settings that were called otherwise in an earlier version, or were not there."""

import logging
from collections.abc import Mapping
from typing import Any

from symphony_moe.errors import RecipeError

log = logging.getLogger(__name__)

RENAMED = {
    ("refit",): "fit",
    ("fit", "soften"): "temperature_scaling",
    ("train", "soften"): "temperature_scaling",
}
"""Where an old name stood -> the new name, since 0.2.0. Sections on the way have their new names:
what was `refit.soften` is ("fit", "soften") here."""


WHAT_WAS_DONE: dict[str, dict[str, Any]] = {
    "calibration": {"windows": "random"},
    "fit": {"embeddings": False, "layers_with_head": 0},
}
"""Settings since 0.2.0 whose default changes what is built -> what was done before."""


def with_what_was_done(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """The recipe of a run, which spells all settings of its version out: a later setting that it
    lacks stands for what was done before."""
    filled = dict(content)
    for section, settings in WHAT_WAS_DONE.items():
        own = content.get(section)
        if isinstance(own, Mapping):
            filled[section] = {**settings, **own}
    return filled


def with_current_names(content: Mapping[Any, Any], who: str, *, tell: bool) -> dict[Any, Any]:
    """What a recipe file says, in today's names, those of `compare.variants` included.

    `who` names the file in the notes that are logged (where `tell` is set) and in errors. Raises
    RecipeError where a setting is there by its old name and by its new one.
    """
    found: dict[tuple[str, ...], str] = {}
    renamed: dict[Any, Any] = _renamed(content, (), who, found)
    compare = renamed.get("compare")
    if isinstance(compare, Mapping) and isinstance(variants := compare.get("variants"), Mapping):
        current = {
            name: _renamed(settings, (), f"{who}: compare.variants.{name}", found)
            for name, settings in variants.items()
        }
        renamed["compare"] = {**compare, "variants": current}
    if tell:
        for old, new in found.items():
            log.warning("%s: %s is called %s now; it is read as that", who, ".".join(old), new)
    return renamed


def _renamed(
    content: Any, inside: tuple[str, ...], who: str, found: dict[tuple[str, ...], str]
) -> Any:
    if not isinstance(content, Mapping):
        return content
    renamed: dict[Any, Any] = {}
    for key, value in content.items():
        old = (*inside, key)
        new: Any = RENAMED.get(old, key)  # a key of YAML may be anything
        if new in renamed or (new != key and new in content):
            raise RecipeError(
                f"{who}: {'.'.join((*inside, new))} is there twice, once by its old name "
                f"{'.'.join(map(str, old))}; leave one of them out"
            )
        if new != key:
            found[old] = ".".join((*inside, new))
        is_section = any(path[: len(inside) + 1] == (*inside, new) for path in RENAMED)
        renamed[new] = _renamed(value, (*inside, new), who, found) if is_section else value
    return renamed
