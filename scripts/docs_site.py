"""What the pages of the site have that is made from the code: MkDocs calls the functions below.

    make site        # build/site

Some pages in docs/reference/ have a mark in place of a text, such as `<!-- settings -->`. The text
is made when the site is built: settings from the type `Recipe`, commands from the command line,
names from `symphony_moe.__all__` (mkdocstrings shows their docstrings), files from `RunFolder`. So
it is never older than the code. Links that lead out of docs/ become the names of files, as the site
has no such pages.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from griffe import Extension, Object

from symphony_moe import __all__ as public_names
from symphony_moe import cli
from symphony_moe.recipe.presets import PRESETS
from symphony_moe.recipe.settings import Recipe
from symphony_moe.runs.folder import RunFolder

Schema = Mapping[str, Any]
"""A part of the JSON schema of a recipe."""


def on_page_markdown(markdown: str, /, page: Any, **_: Any) -> str:
    """A page's text, with what its marks stand for. MkDocs calls it for each page."""
    for mark, made in MARKS.items():
        if f"<!-- {mark} -->" in markdown:
            markdown = markdown.replace(f"<!-- {mark} -->", made())
    return without_links_out(markdown, page.file.src_uri.count("/"))


def without_links_out(markdown: str, depth: int) -> str:
    """The text of a page that lies `depth` folders deep in docs/, with the plain names of links to
    files outside of docs/."""
    return re.sub(rf"\[([^\]]*)\]\((?:\.\./){{{depth + 1},}}[^)]*\)", r"\1", markdown)


# Settings


def settings() -> str:
    """Every setting of a recipe, section by section."""
    schema = Recipe.model_json_schema()
    sections = schema["$defs"]
    whole = [name for name, of in schema["properties"].items() if _section(of) is None]
    parts = ["## The recipe itself", *_all_settings(schema, "", whole, sections)]
    parts += _of_section("sources.NAME", sections["SourceSpec"], sections)
    parts += _of_section("data", sections["HubData"], sections)
    for name, of in schema["properties"].items():
        section = _section(of)
        if section is not None and name not in whole:
            parts += _of_section(name, sections[section], sections)
    return "\n\n".join(parts)


def _section(schema: Schema) -> str | None:
    """The section that a setting of the recipe is, if it is one."""
    return str(schema["$ref"]).rpartition("/")[2] if "$ref" in schema else None


def _of_section(name: str, schema: Schema, sections: Schema) -> Iterator[str]:
    yield f"## {name}"
    yield _text(schema["description"])
    yield from _all_settings(schema, f"{name}.", schema["properties"], sections)


def _all_settings(schema: Schema, prefix: str, names: Any, sections: Schema) -> Iterator[str]:
    for name in names:
        of = schema["properties"][name]
        yield f"### `{prefix}{name}`"
        facts = [_kind(of, sections), _default(prefix, name, of, schema.get("required", ()))]
        yield " · ".join(filter(None, facts))
        yield _text(of.get("description", ""))
        yield _by_method(prefix.rstrip("."), name, of.get("default"))


def _text(description: str) -> str:
    return " ".join(description.split())


_NAMES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
}


_SECTIONS_ELSEWHERE = {
    "HubData": "a [dataset](#data)",
    "SourceSpec": "a [source](#sourcesname)",
    "Parent": "what a command writes",
}
"""Section that is a part of other settings -> what the page calls it."""


def _kind(of: Schema, sections: Schema) -> str:
    """What a setting takes, and from where to where."""
    if "$ref" in of:
        section = str(of["$ref"]).rpartition("/")[2]
        return _SECTIONS_ELSEWHERE[section]
    if "anyOf" in of:
        kinds = [_kind(one, sections) for one in of["anyOf"] if one.get("type") != "null"]
        return " or ".join(kinds)
    if "enum" in of or "const" in of:
        return "one of " + ", ".join(f"`{value}`" for value in of.get("enum", [of.get("const")]))
    if of["type"] == "array":
        return f"list of: {_kind(of['items'], sections)}"
    if of["type"] == "object":
        inside = of.get("additionalProperties")
        values = _kind(inside, sections) if isinstance(inside, dict) and inside else "settings"
        least, most = of.get("minProperties"), of.get("maxProperties")
        count = f", {least} to {most} of them" if least and most else ""
        return f"names, each with: {values}{count}"
    kind = "date" if of.get("format") == "date" else _NAMES[of["type"]]
    return f"{kind} {_range(of)}".rstrip()


def _range(of: Schema) -> str:
    """The numbers that a setting takes, in words."""
    found = {
        words: of[key]
        for words, keys in {
            "from": ("minimum", "ge"),
            "above": ("exclusiveMinimum", "gt"),
            "to": ("maximum", "le"),
            "below": ("exclusiveMaximum", "lt"),
        }.items()
        for key in keys
        if key in of
    }
    return " ".join(f"{words} {_number(value)}" for words, value in found.items())


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:g}"


def _shown(value: Any) -> str:
    """A default as a recipe would say it."""
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _default(prefix: str, name: str, of: Schema, required: Any) -> str:
    if prefix == "" and name == "anchor":
        return ""  # the schema is that of a loaded recipe, which has it; the text says the default
    if name in required:
        return "**required**"
    if "default" not in of or of["default"] is None:
        return ""
    return f"default {_shown(of['default'])}"


def _by_method(section: str, name: str, default: Any) -> str:
    """The defaults of a setting that methods choose, method by method."""
    chosen = {
        method: sections.get(section, {}).get(name, default) for method, sections in PRESETS.items()
    }
    by_value: dict[str, list[str]] = {}
    for method, value in chosen.items():
        by_value.setdefault(_shown(value), []).append(f"`{method}`")
    if len(by_value) < 2:
        return ""
    rows = [f"| {value} | {', '.join(methods)} |" for value, methods in by_value.items()]
    return "\n".join(["| default | of the methods |", "|---|---|", *rows])


# Commands


def commands() -> str:
    """Every command with its arguments and options, in the order of the help."""
    group = cli.command_line()
    parts = []
    for name in cli.command_names():
        command: Any = group.commands[name]
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        options = [one for one in command.params if one.param_type_name == "option"]
        words = [_many(one, one.metavar) for one in arguments]
        words += [_many(one, _spelled(one)) for one in options if one.required]
        parts += [
            f"## symphony {name}",
            f"```text\n{' '.join(['symphony', name, *words, '[OPTIONS]'])}\n```",
            _text(command.help or ""),
            _table("argument", [(one.metavar, one.help) for one in arguments]),
            _table("option", [(_spelled(one), _help(one)) for one in options]),
        ]
    return "\n\n".join(filter(None, parts))


def _many(parameter: Any, word: str) -> str:
    return f"{word}..." if parameter.nargs == -1 or parameter.multiple else word


def _spelled(option: Any) -> str:
    value = "" if option.is_flag else f" {option.metavar}"
    return ", ".join(sorted(option.opts, key=len)) + value


def _help(option: Any) -> str:
    return f"{option.help} Required." if option.required else str(option.help)


def _table(head: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| `{name}` | {_text(text)} |" for name, text in rows]
    return "\n".join([f"| {head} | what it is |", "|---|---|", *lines])


# Names and files


def api() -> str:
    """The public names, as mkdocstrings wants to be told of them."""
    named = [name for name in public_names if not name.startswith("__")]
    functions = [name for name in named if name.islower()]
    parts = ["## Functions", *(f"::: symphony_moe.{name}" for name in functions)]
    types = [name for name in named if name not in functions]
    return "\n\n".join([*parts, "## Types", *(f"::: symphony_moe.{name}" for name in types)])


class Doctests(Extension):
    """Shows the doctests in docstrings as code: they stand there without a title of their own."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = with_code(obj.docstring.value)


def with_code(docstring: str) -> str:
    """A docstring with its doctests, each up to the next empty line, in a block of code."""
    return re.sub(
        r"^>>> .*(?:\n.+)*",
        lambda found: f"```pycon\n{found[0]}\n```",
        docstring,
        flags=re.MULTILINE,
    )


def run_folder() -> str:
    """What a run folder holds, from the names that the code gives it."""
    rows = []
    for name, member in vars(RunFolder).items():
        if isinstance(member, property) and name in _KEPT:
            rows.append((_KEPT[name], inspect.getdoc(member) or ""))
    return _table("name", rows)


_KEPT = {
    "recipe": "recipe.yaml",
    "plan": "plan.json",
    "checkpoint": "checkpoint/",
    "trained": "trained/",
    "alignment": "alignment.safetensors",
    "manifest": "manifest.json",
    "metrics": "metrics.json",
    "samples": "samples.json",
    "report": "report.html",
    "log": "run.log",
    "logs": "logs/",
    "work": "work/",
}
"""Property of `RunFolder` -> how the page spells the file."""


MARKS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "commands": commands,
    "api": api,
    "run folder": run_folder,
}
"""Mark of a page -> what stands there on the site."""
