"""What is written as YAML reads back the same by both versions of it, and what cannot be read is
refused in one line."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_moe.recipe.yaml_text import MOST_VALUES, read_yaml, write_yaml

TRAPS = [
    "no",
    "Yes",
    "on",
    "y",
    "null",
    "~",
    "",
    "true",
    "1e6",
    "1e-4",
    "1.0e+6",
    "0o17",
    "08",
    "0100",
    "1_000",
    "0x1F",
    "1:30",
    "1:30:00",
    ".inf",
    "2020-01-01",
    "<<",
    "=",
    "!x",
    "&a",
    "*a",
    "- a",
    "a: b",
    "a #b",
    "'",
    '"',
    " a",
    "a ",
    "a\nb",
    "a\u2028b",
    "a\x85b",
    "\ufeffa",
    "\U0001f600",
    "x " * 100,
    "\t",
    "%a",
    "@",
    "`",
    "---",
    "...",
    "? a",
    "[a]",
    "{a}",
    "a\0b",
    "\udc80",
]


@pytest.mark.parametrize("text", TRAPS, ids=ascii)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    content = {text: text, "list": [text, {text: [text]}]}
    assert read_yaml(write_yaml(content)) == content
    assert yaml.safe_load(write_yaml(content)) == content


_text = st.text(max_size=20) | st.from_regex(r"[-+0-9._:eExXoObBnyatsf<=/ ]{0,8}", fullmatch=True)
_content = st.recursive(
    _text | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(_content)
def test_everything_reads_back_by_both_versions(content: Any) -> None:
    text = write_yaml(content)
    assert read_yaml(text) == content
    assert yaml.safe_load(text) == content
    # Numbers that were read are written as numbers.
    assert read_yaml(write_yaml(read_yaml(text))) == content


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="{}[]:,-?&*!|>'\"%@`# \n\tab1<", max_size=40))
def test_whatever_is_no_yaml_is_refused_in_one_short_line(text: str) -> None:
    try:
        read_yaml(text)
    except ValueError as error:
        assert 0 < len(str(error)) < 300 and "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: 'a' is given twice"),
        ("{<<: {a: 1}, <<: {b: 1}}", "'<<' is given twice"),
        ("01: 1\n01: 2", "'01' is given twice"),
        ("a: 1\n---\nb: 2", "line 2, column 1"),
        ("a: !!binary eA==", "!!binary is not read here"),
        ("!!set {a}", "!!set is not read here"),
        ("!!python/name:os.system x", "!!python/name:os.system is not read here"),
        ("? !own a\n: 1", "!own is not read here"),
        ("!!bool maybe", "'maybe' is no !!bool"),
        ("? [a]\n: 1", "not a list or a table"),
        ("{<<: 3}", "merges tables only"),
        ("a: &a {b: [*a]}", "an alias stands inside itself"),
        ("[" * 5000, "deep"),
        ("a: 1\n\tb: 2", "line 2"),
        ("9" * 5000, "5000 digits"),
    ],
    ids=range(15),
)
def test_what_is_not_read_is_said_with_its_place(text: str, named: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_yaml(text)
    assert named in str(caught.value)


def test_aliases_unfold_to_a_bounded_number_of_values() -> None:
    ten = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 40)]
    with pytest.raises(ValueError, match=f"more than {MOST_VALUES:,} values"):
        read_yaml(ten + "".join(lines))
    deep = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000))
    with pytest.raises(ValueError, match="levels deep"):
        read_yaml(deep)
    assert read_yaml(ten + lines[0])["a1"] == [[1] * 10] * 10


def test_json_is_yaml_with_its_own_escapes() -> None:
    assert read_yaml('{"a": "\\ud83d\\ude00\\u00e4\\/", "b": [1.5e3, -2, null]}') == {
        "a": "\U0001f600ä/",
        "b": [1500.0, -2, None],
    }
