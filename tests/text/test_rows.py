"""One place decides what text a row stands for: what stock `apply_chat_template` makes of it."""

import json
import random
import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import make_tokenizer
from symphony_moe.errors import TextError
from symphony_moe.recipe.settings import ChatRules
from symphony_moe.text import rows as rows_module
from symphony_moe.text.documents import (
    is_held_out,
    read_documents,
    split_held_out,
    split_validation,
)
from symphony_moe.text.rows import MESSAGES, Document, read_row
from symphony_moe.text.windows import Encoder

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CONCATENATING = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
TOOLS = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% if documents %}"
    "{% for d in documents %}({{ d.title }}){% endfor %}{% endif %}"
    "{% if enable_thinking is defined %}!{{ enable_thinking }}{% endif %}" + PLAIN
)
OF_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }};{% endfor %}{% endif %}{% endfor %}"
)
DATED = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}" + PLAIN
CHAT = [{"role": "user", "content": "alpha?"}, {"role": "assistant", "content": "beta."}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("alpha", "beta")]}]
SHAREGPT = [{"from": "human", "value": "alpha?"}, {"from": "gpt", "value": "beta."}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def spelled_by(base: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    base.chat_template = template
    return base


def read(base: PreTrainedTokenizerBase, template: str | None, row: Any, **how: Any) -> Document:
    column = how.pop("column", "text")
    return read_row("here", row, column, spelled_by(base, template), ChatRules(**how))


def stock(base: PreTrainedTokenizerBase, template: str, messages: Any, **more: Any) -> str:
    return str(spelled_by(base, template).apply_chat_template(messages, tokenize=False, **more))


# ------------------------------------------------------------------------- what is in the text


_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
_ROWS = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["system", "user", "assistant"]), "content": _TEXT},
                optional={"name": _TEXT, "tool_calls": st.just([{"name": "f"}])},
            ),
            min_size=1,
            max_size=4,
        )
    },
    optional={
        "tools": st.lists(st.just(TOOL), max_size=2),
        "documents": st.lists(st.fixed_dictionaries({"title": _TEXT, "text": _TEXT}), max_size=2),
        "chat_template_kwargs": st.fixed_dictionaries({"enable_thinking": st.booleans()}),
        "id": st.integers(),
    },
)


@settings(max_examples=80, deadline=None)
@given(row=_ROWS, template=st.sampled_from([PLAIN, CONCATENATING, TOOLS, OF_PARTS]))
def test_a_chat_is_what_stock_makes_of_the_rows_own_columns(
    base: PreTrainedTokenizerBase, row: dict[str, Any], template: str
) -> None:
    """Text and tokens, whatever the row and the template: messages, tools, documents, arguments;
    nothing before it, and EOS behind."""
    more = {key: row[key] for key in ("tools", "documents") if key in row}
    more |= row.get("chat_template_kwargs", {})
    document = read(base, template, row)
    assert document == stock(base, template, row["messages"], **more)
    ids = base.apply_chat_template(row["messages"], return_dict=False, **more)
    encoded = Encoder.of(base).encode(document)
    assert encoded in ([*ids, base.eos_token_id], ids)
    assert encoded[-1:] == [base.eos_token_id] or document.rstrip().endswith("</s>")


def test_tools_stored_as_json_are_parsed(base: PreTrainedTokenizerBase) -> None:
    """As TRL reads them."""
    row = {"messages": CHAT, "tools": json.dumps([TOOL])}
    assert read(base, TOOLS, row) == stock(base, TOOLS, CHAT, tools=[TOOL])


def test_content_in_parts_is_one_text_or_goes_to_a_template_for_parts(
    base: PreTrainedTokenizerBase,
) -> None:
    """Never how Python spells a list, and no template stumbles over it."""
    for template in (PLAIN, CONCATENATING):
        assert read(base, template, {"messages": PARTS}) == "<user>alpha\nbeta"
    assert read(base, OF_PARTS, {"messages": PARTS}) == stock(base, OF_PARTS, PARTS)


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        # Made for parts, but not of every role.
        (
            "{% set first = messages[0].content | trim %}<{{ first }}>{% for m in messages[1:] %}"
            "{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
            [{"role": "system", "content": [{"type": "text", "text": "kind"}]}, *PARTS],
            "<kind>alphabeta",
        ),
        # Made for parts, of chats that begin with a system message alone.
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{% for m in messages %}{% for part in m.content %}{{ part.text }};{% endfor %}"
            "{% endfor %}",
            [{"role": "system", "content": [{"type": "text", "text": "kind"}]}, *PARTS],
            "kind;alpha;beta;",
        ),
        # Asks for the type, which a part of text may leave out.
        (
            "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}"
            "{{ part.text }}{% endif %}{% endfor %}{% endfor %}",
            [{"role": "user", "content": [{"text": "alpha"}]}],
            "alpha",
        ),
        # Beside tools, whose JSON has types too.
        (
            "{{ [{'type': 'function'}] | tojson }}"
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            PARTS,
            '[{"type": "function"}]alpha\nbeta',
        ),
        # As JSON.
        ("{{ messages | tojson }}", PARTS, '[{"role": "user", "content": "alpha\\nbeta"}]'),
    ],
)
def test_no_part_is_lost_or_spelled_as_python_does(
    template: str, messages: Any, text: str, base: PreTrainedTokenizerBase
) -> None:
    """Whatever a template makes of parts: it is judged by the chat itself."""
    assert read(base, template, {"messages": messages}) == text


def test_columnar_files_add_no_keys(base: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Parquet gives every message the keys of all others, empty; templates ask which are there."""
    template = (
        "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls[0].name }}"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    chat = [
        {"role": "user", "content": "alpha"},
        {"role": "assistant", "tool_calls": [{"name": "f"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [chat]}), tmp_path / "a.parquet")
    found = read_documents("w", str(tmp_path / "a.parquet"), "text", spelled_by(base, template))
    assert found == ["alpha;f;"]


def test_sharegpt_is_read_where_the_recipe_says_so(base: PreTrainedTokenizerBase) -> None:
    """`human` is a user, `gpt` an assistant; rows of the other shape may stand among them."""
    for chat in (SHAREGPT, CHAT):
        found = read(base, PLAIN, {"conversations": chat}, format="sharegpt")
        assert found == "<user>alpha?<assistant>beta."
    nulls = [{"role": None, "content": None, **message} for message in SHAREGPT]
    assert (
        read(base, PLAIN, {"messages": nulls}, format="sharegpt") == "<user>alpha?<assistant>beta."
    )
    odd = [{"from": "nobody", "value": "x"}]
    with pytest.raises(TextError, match="is from 'nobody'"):
        read(base, PLAIN, {"conversations": odd}, format="sharegpt")


def test_a_missing_text_is_looked_for_among_chats(base: PreTrainedTokenizerBase) -> None:
    """`text: null` beside `messages` is no text."""
    for row in ({"text": None, "messages": CHAT}, {"messages": CHAT}, {"conversation": CHAT}):
        assert read(base, PLAIN, row) == "<user>alpha?<assistant>beta."
    assert read(base, PLAIN, {"text": " ", "messages": CHAT}) == "<user>alpha?<assistant>beta."
    assert read(base, PLAIN, {"text": "alpha", "messages": CHAT}) == "alpha"
    assert read(base, PLAIN, {"body": None, "messages": CHAT}, column="body").is_chat
    with pytest.raises(TextError, match="expected a column 'bdoy'"):
        read(base, PLAIN, {"body": "alpha", "messages": CHAT}, column="bdoy")


def test_a_conversation_that_is_text_is_text(base: PreTrainedTokenizerBase) -> None:
    """Where the recipe names the column."""
    assert read(base, None, {"conversation": "alpha: beta"}, column="conversation") == "alpha: beta"


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": SHAREGPT}, PLAIN, "has the keys from, value.*chat_format: sharegpt"),
        (
            {"messages": [{"speaker": "a"}]},
            PLAIN,
            "has the keys speaker; expected role and content",
        ),
        ({"messages": [{"role": "user", "value": "a"}]}, PLAIN, "no content .its keys: role, val"),
        ({"messages": [{"role": "user", "content": None}]}, PLAIN, "has no content"),
        ({"messages": [{"role": None, **SHAREGPT[0]}]}, PLAIN, "chat_format: sharegpt"),
        ({"messages": json.dumps({"messages": CHAT})}, PLAIN, "holds a chat as text"),
        ({"text": str(CHAT)}, PLAIN, "holds a chat as text"),
        ({"text": json.dumps([{"role": "assistant", "tool_calls": [1]}])}, PLAIN, "a chat as text"),
        ({"messages": CHAT}, "{{ ['a', 'b'] | random }}", r"draws at random \(\| random\)"),
        ({"messages": CHAT}, "{{ lipsum() }}", "draws at random"),
        ({"messages": ["alpha"]}, PLAIN, "is a list of text; expected messages"),
        ({"text": ["alpha"]}, PLAIN, "is a list of text; expected messages"),
        ({"messages": json.dumps(CHAT)}, PLAIN, "holds a chat as text.*json.loads"),
        ({"text": json.dumps(SHAREGPT)}, PLAIN, "holds a chat as text"),
        ({"messages": CHAT}, None, "no chat template"),
        ({"messages": CHAT}, "{{ raise_exception('no') }}", "refuses the chat: no"),
        ({"messages": CHAT}, "{{ tools | length }}", "refuses the chat: .*None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            PLAIN,
            "'image'.*Images",
        ),
        ({"messages": [{"role": "user", "content": ["alpha"]}]}, PLAIN, "part of type 'text'|text"),
        ({"messages": [{"role": "user", "content": 5}]}, PLAIN, "content .* is a number"),
        ({"messages": CHAT, "tools": "look"}, PLAIN, "'tools' holds 'look'; expected a list"),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, PLAIN, "'tokenize'"),
        ({"text": None}, PLAIN, "'text' holds null; expected text"),
        ({"text": True}, PLAIN, "'text' holds true or false"),
        ({"body": "x"}, PLAIN, "expected a column 'text'.*has: body.*`column`"),
        (5, PLAIN, "expected a table of columns.*got a number"),
    ],
)
def test_what_is_neither_text_nor_a_chat_is_refused_with_its_place(
    base: PreTrainedTokenizerBase, row: Any, template: str | None, message: str
) -> None:
    """What was found, and what to do; short, whatever the row holds."""
    with pytest.raises(TextError, match=f"^here: .*{message}") as refused:
        read(base, template, row)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "row",
    [
        {"text": 5, "x" * 5000: 1},
        {"messages": [{"y" * 5000: 1}]},
        {"messages": CHAT, "tools": "z" * 5000},
        {"messages": "[" * 3 + '"role"' * 2000},
        {"messages": [{"role": "user", "content": [{"type": "w" * 5000}]}]},
    ],
)
def test_messages_stay_short(base: PreTrainedTokenizerBase, row: Any) -> None:
    with pytest.raises(TextError) as refused:
        read(base, PLAIN, row)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": null}', "line 3: 'text' holds null"),
        (b'{"text": 5}', "line 3: 'text' holds a number"),
        (b'{"body": "x"}', "line 3: expected a column 'text'"),
        (b"{oops", "line 3: "),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 3: "),
        (b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 3 is nested too deeply"),
        ('{"text": "é"}'.encode("latin1"), "line 3 is not UTF-8"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(
    base: PreTrainedTokenizerBase, line: bytes, message: str, tmp_path: Path
) -> None:
    """One in a million rows is found by its number."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "alpha"}\n\n' + line + b'\n{"text": "beta"}\n')
    with pytest.raises(TextError, match=rf"w: .*a\.jsonl.*{message}"):
        read_documents("w", str(path), "text", base)


def test_a_row_of_a_table_is_named(base: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["alpha", None]}), path)
    with pytest.raises(TextError, match=r"a\.parquet, row 2: 'text' holds null"):
        read_documents("w", str(path), "text", base)
    far = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["alpha", "beta"], "when": far}), path)
    with pytest.raises(TextError, match=r"a\.parquet is not readable"):
        read_documents("w", str(path), "text", base)


def test_empty_documents_are_counted(
    base: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A template that passes over every message gives no text, and that is said."""
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    lines = [{"messages": CHAT}] + [{"messages": CHAT[1:]}] * 3
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert read_documents("w", str(path), "text", spelled_by(base, template)) == ["alpha?"]
    assert "w: 3 of 4 documents are empty and left out" in caplog.text


def test_columns_that_are_not_read_are_said_once(
    base: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """Tools that a template does not ask for; a chat beside the text."""
    rows_module._say.cache_clear()
    for _ in range(3):
        read(base, PLAIN, {"messages": CHAT, "tools": [TOOL]})
        read(base, TOOLS, {"messages": CHAT, "tools": [TOOL]})
        read(base, PLAIN, {"text": "alpha", "messages": CHAT})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("'tools' of the rows is not read: the chat template")
    assert said[1] == "rows have 'text' and 'messages': 'text' is read, 'messages' is not"


# ------------------------------------------------------------------------------------ hold-out


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{n} alpha"}, CHAT[1]]} for n in range(count)
    ]


def test_a_chat_is_on_one_side_whoever_spells_it(
    base: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Two templates, two dates, files of lines and of columns: one hold-out, and one text to
    validate by."""
    drawn = chats(300)
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in drawn))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(drawn), table)
    ways = [
        (lines, PLAIN, MESSAGES),
        (lines, CONCATENATING + "!", MESSAGES),
        (lines, DATED, ChatRules(today=date(2030, 5, 1))),
        (table, PLAIN, MESSAGES),
    ]
    sides = []
    for path, template, rules in ways:
        documents = read_documents("w", str(path), "text", spelled_by(base, template), rules)
        held_out = {number for number, d in enumerate(documents) if is_held_out(d, 0.1)}
        assert isinstance(documents, list)
        training, _ = split_held_out(documents, 0.1)
        validation = split_validation(list(training), 1 / 8)[1]
        sides.append((held_out, {n for n, d in enumerate(documents) if d in validation}))
    assert 10 < len(sides[0][0]) < 60 and len(sides[0][1]) > 20
    assert all(side == sides[0] for side in sides)


def test_the_hold_out_of_plain_text_is_the_hash_of_the_text(
    base: PreTrainedTokenizerBase,
) -> None:
    """As it has always been: what is held out in a run is held out in the next version too."""
    for number in range(50):
        text = f"document {number}"
        assert is_held_out(read(base, None, {"text": text}), 0.3) == is_held_out(text, 0.3)


def test_templates_are_told_the_recipes_date(base: PreTrainedTokenizerBase) -> None:
    """The same text on any day; and outside nobody's clock is touched."""
    found = read(base, DATED, {"messages": CHAT}, today=date(2024, 7, 26))
    assert found.startswith("<s>26 Jul 2024<user>")
    assert datetime.now().strftime("%d %b %Y") in stock(base, DATED, CHAT)


@pytest.mark.parametrize("opening", ["{{ bos_token }}", "\n{{ bos_token }}", ""])
def test_a_chat_has_the_bos_that_its_template_writes(
    opening: str, base: PreTrainedTokenizerBase
) -> None:
    """One, wherever it stands; none where there is none, though the tokenizer adds it to text."""
    ids = Encoder.of(base).encode(read(base, opening + PLAIN, {"messages": CHAT}))
    assert ids.count(base.bos_token_id) == (1 if opening else 0)


@pytest.mark.parametrize("ending", ["", "</s>", "</s>\n", "</s> \n\n"])
def test_a_chat_ends_once(ending: str, base: PreTrainedTokenizerBase) -> None:
    """With the EOS of its template, or one behind it."""
    ids = Encoder.of(base).encode(read(base, PLAIN + ending, {"messages": CHAT}))
    assert ids.count(base.eos_token_id) == 1


def test_drawing_rows_at_random_finds_nothing_unforeseen(base: PreTrainedTokenizerBase) -> None:
    """A thousand odd rows: each is a document or a TextError."""
    generator = random.Random(0)
    values: list[Any] = [
        None,
        5,
        1.5,
        True,
        "",
        "text",
        [],
        {},
        [None],
        [[]],
        [{}],
        [{"role": None}],
        CHAT,
        PARTS,
        SHAREGPT,
        [{"role": "user"}],
        [{"role": 3, "content": "x"}],
        [{"role": "user", "content": [{}]}],
        {"enable_thinking": True},
        [TOOL],
        "[",
        json.dumps(CHAT),
        b"bytes",
    ]
    names = ["text", "messages", "conversations", "tools", "documents", "chat_template_kwargs"]
    for _ in range(1000):
        row = {n: generator.choice(values) for n in generator.sample(names, 3)}
        template = generator.choice([PLAIN, CONCATENATING, TOOLS, OF_PARTS, DATED])
        try:
            found = read(base, template, row)
            assert isinstance(found, Document)
            if not found.is_chat:
                assert found == row["text"]
            elif found:
                assert re.search("alpha|beta|x", found), row
        except TextError as error:
            assert len(str(error)) < 500
