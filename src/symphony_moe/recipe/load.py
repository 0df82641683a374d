"""A recipe file (YAML) and overrides -> a `Recipe`; what is wrong with one, in words."""

import difflib
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ValidationError,
)

from symphony_moe.errors import RecipeError, if_mistyped, is_text, shortened
from symphony_moe.recipe.mistakes import describe_mistakes, nearest, whose_mistake
from symphony_moe.recipe.presets import PRESETS
from symphony_moe.recipe.renamed import with_current_names, with_what_was_done
from symphony_moe.recipe.settings import BUNDLED, FILL_IN, Recipe
from symphony_moe.recipe.yaml_text import read_yaml, spelled


def load_recipe(path: str | Path, overrides: Iterable[str] = (), *, of_run: bool = False) -> Recipe:
    """Read a recipe file, apply `a.b=c` overrides, resolve presets and paths.

    A setting of an earlier version is read under its new name, and a note says so. `of_run`: the
    file is a run's own. Then nobody is told, and a setting that it lacks stands for what its
    version did.

    Raises RecipeError for a file that is not there or not YAML, an unknown key or preset, a value
    of the wrong kind, and settings that contradict each other.

    >>> from symphony_moe import load_recipe
    >>> load_recipe("recipe.yaml", ["train.tokens=1024"]).train.tokens
    1024
    """
    path = Path(path)
    overrides = list(overrides)
    content = read_content(path, overrides, tell=not of_run)
    if of_run:
        content = with_what_was_done(content)
    return resolve_recipe(content, path.resolve().parent, str(path), overrides=overrides)


def read_content(path: Path, overrides: Iterable[str], *, tell: bool = True) -> dict[Any, Any]:
    """What a recipe file says, in today's names, with `a.b=c` overrides."""
    content = with_current_names(read_settings(path, "sources"), str(path), tell=tell)
    for one in overrides:
        apply_override(content, one, tell=tell)
    return content


def read_settings(path: Path, setting: str) -> dict[Any, Any]:
    """The settings in a YAML file. Raises RecipeError where it is not one; `setting` is an example
    of what was expected."""
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder, not a recipe file")
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file{if_mistyped(path)}")
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = read_yaml(text)
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is not UTF-8"
        raise RecipeError(f"{path}: not readable as YAML: {where}; save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        another = "" if f"{setting}:" in text else f"; expected settings such as `{setting}:`"
        raise RecipeError(f"{path}: not readable as YAML: {error}{another}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected settings such as `{setting}:`, got {_kind(content)}")
    return content


def resolve_recipe(
    content: Mapping[Any, Any],
    folder: Path,
    who: str,
    *,
    relative: Collection[str] | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """Check settings and fill in presets and absolute paths. `who` names the recipe in errors;
    where a setting comes of one of the `overrides`, that is named.
    `relative`: the sources whose paths are relative to the folder, where the others are resolved
    already; None: all are, and those of `evaluation.extra`."""
    refuse_unknown_keys(content, Recipe, who, "")
    settings = _without_nulls(content)
    method = spelled(settings.get("method", "symphony"))
    if not isinstance(method, str) or method not in PRESETS:
        asked = [one for one in overrides if one.partition("=")[0].strip() == "method"]
        raise RecipeError(
            f"{f'--set {shortened(asked[-1], 100)}' if asked else who}: method: "
            f"{shortened(repr(method), 60)} is not available; available: "
            f"{', '.join(PRESETS)}{nearest(str(method), list(PRESETS))}"
        )
    for section in settings.keys() - {"sources", "compare"}:
        if isinstance(own := settings[section], Mapping):
            settings[section] = _without_nulls(own)
    for section, preset in PRESETS[method].items():
        own = settings.get(section, {})
        settings[section] = preset | own if isinstance(own, dict) else own
    sources = settings.get("sources")
    evaluation = settings.get("evaluation")
    try:
        if isinstance(sources, dict) and sources:
            _refuse_unfilled(sources, who)
            settings["anchor"] = settings.get("anchor", str(next(iter(sources))))
            settings["sources"] = {
                str(name): _absolute_source(spec, folder, f"{who}: sources.{name}")
                if relative is None or name in relative
                else spec
                for name, spec in sources.items()
            }
        extra = evaluation.get("extra") if isinstance(evaluation, dict) else None
        if isinstance(evaluation, dict) and isinstance(extra, dict) and relative is None:
            absolute = {
                str(name): _absolute_data(data, folder, f"{who}: evaluation.extra.{name}")
                for name, data in extra.items()
            }
            settings["evaluation"] = evaluation | {"extra": absolute}
        return Recipe.model_validate(settings)
    except ValidationError as error:
        whose = whose_mistake(error, who, overrides)
        raise RecipeError(f"{whose}: {describe_mistakes(error)}") from None
    except RecursionError:
        raise RecipeError(f"{who}: a YAML alias stands inside itself") from None


def _kind(content: Any) -> str:
    """What a YAML text holds instead of settings, in words."""
    if content is None:
        return "nothing"
    return {list: "a list", str: "text", bool: "true or false"}.get(type(content), "a number")


def _without_nulls(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """A setting without a value is left at its default."""
    return {key: value for key, value in settings.items() if value is not None}


def apply_override(content: dict[str, Any], spelled_out: str, *, tell: bool = True) -> None:
    """Set one `a.b=c` in a recipe's content; the value is read as YAML. Raises RecipeError where it
    is not."""
    path, _, value = spelled_out.partition("=")
    names = path.strip().split(".")
    who = f"--set {shortened(spelled_out, 100)}"
    if not value.strip() or not all(names):
        raise RecipeError(f"{who}: expected KEY=VALUE, such as train.tokens=1000000")
    try:
        setting: Any = read_yaml(value)
    except ValueError as error:
        raise RecipeError(f"{who}: the value is not YAML: {error}") from None
    for name in reversed(names):
        setting = {name: setting}
    setting = with_current_names(setting, who, tell=tell)
    refuse_unknown_keys(setting, Recipe, who, "")
    (*parents, last), setting = _unnested(setting, len(names))
    section = content
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise RecipeError(f"{who}: {shortened(parent, 40)} is a value, not a section")
    section[last] = setting


def _refuse_unfilled(sources: Mapping[Any, Any], who: str) -> None:
    """RecipeError for sources whose text is left for the user to name."""
    data = {name: spec.get("data") for name, spec in sources.items() if isinstance(spec, Mapping)}
    unfilled = [
        name for name, of in data.items() if FILL_IN in (of if isinstance(of, list) else [of])
    ]
    if unfilled:
        listed = ", ".join(f"sources.{shortened(str(name), 40)}.data" for name in unfilled[:3])
        more = f" and {len(unfilled) - 3} more" if len(unfilled) > 3 else ""
        raise RecipeError(
            f"{who}: {listed}{more}: expected text of the source's domain in place of {FILL_IN}: "
            "a file (.jsonl, .txt, .parquet), a list of files, or {hub: ..., column: ...}"
        )


def _unnested(nested: Any, depth: int) -> tuple[list[str], Any]:
    """(the names that lead into a setting, one inside the other; the setting)"""
    path: list[str] = []
    for _ in range(depth):
        ((name, nested),) = nested.items()
        path.append(name)
    return path, nested


def _absolute_source(spec: Any, folder: Path, where: str) -> Any:
    if not isinstance(spec, dict):
        return spec
    spec = dict(spec)
    for key in ("model", "adapter"):
        value = spelled(spec.get(key))
        if isinstance(value, str) and not value.startswith(BUNDLED):
            local = _absolute(value, folder, f"{where}.{key}")
            looks_local = value.startswith((".", "/", "~")) or local.exists()
            spec[key] = str(local) if looks_local else value
    if "data" in spec:
        spec["data"] = _absolute_data(spec["data"], folder, f"{where}.data")
    return spec


def _absolute_data(data: Any, folder: Path, where: str) -> Any:
    if isinstance(data, list):
        return [_absolute_data(item, folder, where) for item in data]
    if isinstance(data, dict):
        hub = spelled(data.get("hub"))
        if isinstance(hub, str) and (local := _absolute(hub, folder, where)).exists():
            return data | {"hub": str(local)}
        return data
    if isinstance(data, str) and not data.startswith(BUNDLED):
        return str(_absolute(data, folder, where))
    return data


def _absolute(path: str, folder: Path, where: str) -> Path:
    """Raises RecipeError for text that cannot be a path: too long, of an unknown user, ..."""
    try:
        absolute = (folder / Path(path).expanduser()).resolve()
        if absolute.exists() and not is_text(str(absolute)):
            raise ValueError(
                f"{str(absolute)!a} is not UTF-8 text, as files of weights and outputs need it; "
                "rename it"
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = shortened(str(error), 200)
        where = shortened(where, 200)
        raise RecipeError(
            f"{where}: {shortened(path, 80)!r} cannot be used as a path: {reason}"
        ) from None
    return absolute


def refuse_unknown_keys(content: Any, model: type[BaseModel], who: str, path: str) -> None:
    """RecipeError for the first key that the section does not have, with the nearest that it
    has."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        where = f"{path}{shortened(str(key), 60)}"
        field = model.model_fields.get(str(key))
        if field is None:
            near = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.5)
            hint = (
                f"did you mean {path}{near[0]}?"
                if near
                else f"known: {', '.join(model.model_fields)}"
            )
            raise RecipeError(f"{who}: unknown setting {where}; {hint}")
        for section, is_table in _sections(field.annotation):
            items = value.items() if is_table and isinstance(value, Mapping) else [(None, value)]
            for name, item in items:
                refuse_unknown_keys(item, section, who, f"{where}.{name}." if name else f"{where}.")


def _sections(annotation: Any) -> list[tuple[type[BaseModel], bool]]:
    """(section, whether it stands in a table of names) for every section that a field can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, False)]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict:
        return [(section, True) for section, _ in _sections(arguments[1])]
    if origin in (typing.Union, types.UnionType):
        return [found for argument in arguments for found in _sections(argument)]
    return []
