"""What pydantic has found wrong with a recipe, in a recipe's words."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from symphony_moe.errors import shortened

_EXPECTED = {
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_parsing_size": "expected a smaller number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "list_type": "expected a list, such as [A, B]",
    "dict_type": "expected settings, such as {{NAME: VALUE}}",
    "model_type": "expected settings, such as {{NAME: VALUE}}",
    "model_attributes_type": "expected settings, such as {{NAME: VALUE}}",
    "greater_than": "expected a number above {gt}",
    "greater_than_equal": "expected a number of {ge} or more",
    "less_than": "expected a number below {lt}",
    "less_than_equal": "expected a number of {le} or less",
    "too_short": "expected {min_length} or more",
    "too_long": "expected {max_length} or fewer",
    "missing": "is missing",
}
"""pydantic's kind of mistake -> what was expected, with its own numbers."""

_DATA_BRANCHES = {("str",), ("list[str]",), ("HubData",)}
"""What pydantic says of text that is none of `Data`: one mistake, three times."""

_TEXT_OR_LIST = {("str",), ("list[str]",)}
"""The same of a setting that is a name or a list of names."""


def describe_mistakes(error: ValidationError) -> str:
    """A sentence for each of the first mistakes."""
    found = _of_recipe(error)
    sentences = list(dict.fromkeys(_describe(one) for one in found))
    shown = [shortened(sentence, 400 if len(sentences) == 1 else 150) for sentence in sentences[:2]]
    return "; ".join(shown) + (f"; and {more} more" if (more := len(sentences) - 2) > 0 else "")


def whose_mistake(error: ValidationError, who: str, overrides: Iterable[str]) -> str:
    """The `--set` that the first mistake is in; `who`, the recipe file, where it is in none."""
    first = _of_recipe(error)[0]
    place = tuple(str(part) for part in first["loc"])
    if not place:  # of settings that contradict each other; the message begins with one
        place = tuple(_own_words(first).partition(":")[0].split("."))
    for one in reversed(list(overrides)):
        path = tuple(one.partition("=")[0].strip().split("."))
        if place and path[: len(place)] == place[: len(path)]:
            return f"--set {shortened(one, 100)}"
    return who


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean ...?`, where something known is nearly the same word."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _of_recipe(error: ValidationError) -> list[Any]:
    found: list[Any] = list(error.errors())
    if any(one["loc"][:1] == ("sources",) for one in found):
        found = [one for one in found if one["loc"] != ("anchor",)]  # it is the first of them
    return found


def _describe(error: Mapping[str, Any]) -> str:
    place, got = error["loc"], _as_given(error.get("input"))
    expected = _expected(error)
    of_source = place[:1] == ("sources",)
    if place == ("sources",) and error["type"] != "too_long":
        expected = "expected two sources or more, each as NAME: {model: ..., data: ...}"
        got = f" (got {len(error['input'])})" if error["type"] == "too_short" else ""
    elif of_source and len(place) == 2 and error["type"] in ("model_type", "dict_type"):
        expected = "expected {model: ..., data: ...}"
    elif of_source and place[2:3] == ("data",) and place[3:] in _DATA_BRANCHES:
        place = place[:3]
        expected = "expected a file, a list of files, or {hub: ..., column: ...}"
    elif len(place) > 2 and place[-1:] in _TEXT_OR_LIST:
        place = place[:-1]
        expected = "expected a name, or a list of names"
    where = ".".join(shortened(str(part), 60) for part in place)
    between = " " if error["type"] == "missing" else ": "
    return f"{where}{between}{expected}{got}{_nearest_choice(error)}" if where else expected


def _nearest_choice(error: Mapping[str, Any]) -> str:
    if error["type"] != "literal_error":
        return ""
    return nearest(str(error.get("input")), _choices(error))


def _choices(error: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])


def _own_words(error: Mapping[str, Any]) -> str:
    """The message of a check of ours."""
    message: str = error["msg"]
    return message.removeprefix("Value error, ")


def _as_given(value: Any) -> str:
    """What came, where that says something: a whole section says it in its settings' mistakes."""
    if value is None or isinstance(value, Mapping):
        return ""
    return f" (got {shortened(repr(value), 80)})"


def _expected(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind == "string_type":
        in_quotes = "; write it in quotes" if isinstance(error.get("input"), int | float) else ""
        return f"expected text{in_quotes}"
    if kind == "literal_error":
        return "expected " + str(context["expected"]).replace("'", "")
    if kind in _EXPECTED:
        return _EXPECTED[kind].format(**context)
    return _own_words(error).replace("Input should be", "expected")
