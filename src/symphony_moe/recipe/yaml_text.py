"""YAML as recipes are read and written: the core schema of version 1.2, where `no` is text and
`0100` is a hundred, and nothing but text, numbers, booleans, lists and tables of names.

ruamel.yaml parses and prints. It reads more than the schema (dates, `0b11`, `1_`, tags) and forgets
how a number was written, so the values are made here from its nodes. What is written reads back the
same by version 1.1 too (PyYAML, the hub's own reader).
"""

import io
import re
import warnings
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import BaseResolver, implicit_resolvers

from symphony_moe.errors import shortened

MOST_VALUES = 1_000_000
"""Values in a text at most, aliases unfolded: a few lines of them could unfold without end."""

_DEEPEST = 100
_TAG = "tag:yaml.org,2002:"


# Underscores between digits are no part of the schema, but of many recipes.
_DIGITS = "[0-9]+(?:_[0-9]+)*"

_PLAIN: dict[str, tuple[re.Pattern[str], str]] = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)\Z"), "~nN"),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF"),
    "int": (re.compile(rf"(?:[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789"),
    "float": (
        re.compile(
            rf"(?:[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        "-+.0123456789",
    ),
    "merge": (re.compile(r"<<\Z"), "<"),
}
"""Kind of a plain scalar -> (its spellings, what these begin with). The rest is text."""


class SpelledInt(int):
    """A number with the characters that it was written in: as a name, 01 is not 1."""

    spelling: str


class SpelledFloat(float):
    """See SpelledInt: as a name, 1.0 is not 1."""

    spelling: str


def spelled(value: Any) -> Any:
    """A number as it was written, where it was read from YAML; anything else as it is."""
    return value.spelling if isinstance(value, SpelledInt | SpelledFloat) else value


def read_yaml(text: str) -> Any:
    """What a YAML text says. Names (keys) are text, however they are spelled; a merge key (`<<`)
    brings in what a table does not say itself.

    Raises ValueError with one short line for whatever keeps the text from being read: also for a
    key that is given twice, a tag (`!!binary`, `!!python/...`), and a second document.
    """
    node = _composed(text)
    if node is None:
        return None
    _refuse_endless(node)
    return _value(node)


def write_yaml(content: Any) -> str:
    """Tables, lists and scalars as YAML, in their order, for people to read."""
    written = io.StringIO()
    printer = YAML(typ="safe", pure=True)
    printer.Representer, printer.Resolver = _Representer, _WritingResolver
    printer.representer.default_flow_style = False
    printer.representer.sort_base_mapping_type_on_output = False
    printer.width = 2**20  # a line for each value, however long
    printer.dump(content, written)
    return written.getvalue()


class _Resolver(BaseResolver):
    """The kinds of `_PLAIN`, whatever version a text says it is of."""

    def __init__(self, version: Any = None, loader: Any = None, loadumper: Any = None) -> None:
        super().__init__(loader or loadumper)

    @property
    def processing_version(self) -> tuple[int, int]:
        return (1, 2)


class _WritingResolver(_Resolver):
    """Also the kinds of version 1.1: text that either version reads as something else is quoted."""


class _Representer(SafeRepresenter):
    """Every value spelled out, without anchors, as both versions read it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> ScalarNode:
        # What is printed raw in the other styles is a line break in one version only, or none of
        # UTF-8's characters.
        odd = not data.isprintable()
        return self.represent_scalar(f"{_TAG}str", data, style='"' if odd else None)

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        if "." not in node.value:  # 1e-05 is text in version 1.1
            node.value = node.value.replace("e", ".0e")
        return node


for _kind, (_pattern, _first) in _PLAIN.items():
    _starts = ["", *_first] if _kind == "null" else list(_first)
    _Resolver.add_implicit_resolver_base(_TAG + _kind, _pattern, _starts)
for _versions, _tag, _old_pattern, _old_starts in implicit_resolvers:
    if (1, 1) in _versions:
        _WritingResolver.add_implicit_resolver_base(_tag, _old_pattern, _old_starts)
_Representer.add_representer(str, _Representer.represent_str)
for _number in (float, SpelledFloat):
    _Representer.add_representer(_number, _Representer.represent_float)
_Representer.add_representer(SpelledInt, _Representer.represent_int)


def _composed(text: str) -> Any:
    """The text's one document as nodes; None where it is empty. Raises ValueError."""
    parser = YAML(typ="safe", pure=True)
    parser.Resolver = _Resolver
    try:
        with warnings.catch_warnings(action="ignore"):  # of anchors that are used again
            return parser.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = [part for part in (error.context, error.problem) if part]
        if r"'\t'" in said[-1]:
            said = ["a tab; YAML is indented with spaces"]
        raise ValueError(_placed(", ".join(said), mark)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:
        # The parser meets some text that is no YAML with errors of its own making.
        raise ValueError(_placed(str(error) or type(error).__name__, None)) from None


def _placed(problem: str, mark: Any) -> str:
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return where + shortened(" ".join(problem.split()), 200)


def _refusal(problem: str, node: Any) -> ValueError:
    return ValueError(_placed(problem, node.start_mark))


def _children(node: Any) -> list[Any]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _refuse_endless(root: Any) -> None:
    """ValueError for an alias inside itself, and for what unfolds to far too much or too deep."""
    known: dict[int, tuple[int, int]] = {}
    inside: set[int] = set()

    def measure(node: Any) -> tuple[int, int]:
        """(values, levels) in a node."""
        if id(node) in inside:
            raise _refusal("an alias stands inside itself", node)
        if id(node) not in known:
            inside.add(id(node))
            parts = [measure(child) for child in _children(node)]
            inside.remove(id(node))
            size, depth = (sum(s for s, _ in parts), max((d for _, d in parts), default=0))
            if size >= MOST_VALUES:
                raise _refusal(f"more than {MOST_VALUES:,} values, aliases unfolded", node)
            if depth >= _DEEPEST:
                raise _refusal(f"nested more than {_DEEPEST} levels deep", node)
            known[id(node)] = (size + 1, depth + 1)
        return known[id(node)]

    measure(root)


def _value(node: Any) -> Any:
    tag = str(node.tag)
    if isinstance(node, MappingNode) and tag == f"{_TAG}map":
        return _table(node)
    if isinstance(node, SequenceNode) and tag == f"{_TAG}seq":
        return [_value(item) for item in node.value]
    if isinstance(node, ScalarNode) and tag == f"{_TAG}str":
        # JSON writes one character beyond the first 65,536 as two halves.
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    kind = tag.removeprefix(_TAG)
    if not isinstance(node, ScalarNode) or kind not in _PLAIN:
        shown = shortened("!!" + kind if tag.startswith(_TAG) else tag, 60)
        raise _refusal(f"{shown} is not read here; write text, numbers, lists or tables", node)
    if not _PLAIN[kind][0].match(node.value):
        raise _refusal(f"{shortened(node.value, 40)!r} is no !!{kind}", node)
    return _scalar(kind, node)


def _scalar(kind: str, node: Any) -> Any:
    """A scalar that is not text, in a spelling of its kind."""
    text: str = node.value
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        try:
            whole = SpelledInt(text, base)
        except ValueError:
            raise _refusal(f"a number of {len(text)} digits", node) from None
        whole.spelling = text
        return whole
    if kind == "float":
        digits = text.replace("_", "").lower()
        real = SpelledFloat(digits.replace(".inf", "inf").replace(".nan", "nan"))
        real.spelling = text
        return real
    return None if kind == "null" else text


def _table(node: Any) -> dict[str, Any]:
    """What a mapping says itself, over what it merges in."""
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    seen = set()
    for key, value in node.value:
        name = _name(key)
        if name in seen:
            raise _refusal(f"{shortened(name, 60)!r} is given twice", key)
        seen.add(name)
        if str(key.tag) == f"{_TAG}merge":
            merged = _merged(value)
        else:
            own[name] = _value(value)
    return merged | own


def _name(key: Any) -> str:
    """A key as it is spelled."""
    if not isinstance(key, ScalarNode):
        raise _refusal("a name is expected here, not a list or a table", key)
    _value(key)  # refuses tags
    return str(key.value)


def _merged(node: Any) -> dict[str, Any]:
    """The tables that a merge key names; of two that say the same, the first counts."""
    tables = node.value if isinstance(node, SequenceNode) else [node]
    merged: dict[str, Any] = {}
    for table in reversed(tables):
        if not isinstance(table, MappingNode):
            raise _refusal("<< merges tables only", table)
        merged |= _table(table)
    return merged
