"""Rows of a data set as documents: the one place that decides what text a row stands for.

A row is a table of columns. Its text is a column as it is, or a chat that goes through the
tokenizer's own chat template, exactly as stock `apply_chat_template` renders it with the row's own
columns. Whatever else a row holds is refused with its place, what was found and what to do.
"""

import ast
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time
from functools import lru_cache
from inspect import signature
from sys import getsizeof
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from symphony_moe.errors import TextError, first_line
from symphony_moe.recipe.settings import ChatRules

log = logging.getLogger(__name__)

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold chats, in the order in which they are looked for beside a missing text."""

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's roles -> those of chat templates."""

_INSTEAD_OF_CONTENT = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
)
"""What a message may have without content."""

_SHOWN = 60
"""Characters of a value that an error repeats."""

MESSAGES = ChatRules()
"""The rules where nobody says otherwise."""


class Document(str):
    """The text of one row, with what decides its side of the hold-out."""

    __slots__ = ("_row", "is_chat")  # many are in memory at once

    _row: str | None
    is_chat: bool
    """Whether a chat template wrote the text. It has its special tokens then."""

    def __new__(cls, text: str, key: str | None = None, *, is_chat: bool = False) -> "Document":
        """`key`: the row as it is stored, where that is not the text."""
        made = super().__new__(cls, text)
        made._row, made.is_chat = key, is_chat
        return made

    @property
    def key(self) -> str:
        """The row as it is stored: the text itself, or the chat before any template."""
        return self if self._row is None else self._row

    @property
    def memory(self) -> int:
        """Bytes that it takes, with its key."""
        return getsizeof(self) + (0 if self._row is None else getsizeof(self._row))


def read_row(
    where: str,
    row: Any,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    rules: ChatRules = MESSAGES,
) -> Document:
    """The document of a row. `where` names the row in errors.

    The text is in `column`. Where that is null or blank, or is the default `text` and missing, it
    is in the first of CHAT_COLUMNS. Of chats `tools`, `documents` and `chat_template_kwargs` of the
    row reach the template too.

    Raises TextError for a row without such a column, for text that is no text, for chats in
    another shape than `rules.format`, and where the template refuses a chat.
    """
    if not isinstance(row, Mapping):
        raise TextError(
            f"{where}: expected a table of columns such as {{{column!r}: ...}}, got {_kind(row)}"
        )
    asked = column
    value = row.get(asked)
    is_blank = value is None or (isinstance(value, str) and not value.strip())
    if is_blank and (asked in row or asked == "text"):
        column = next((name for name in CHAT_COLUMNS if row.get(name) is not None), asked)
        value = row.get(column)
    if isinstance(value, str) and column == asked and not _is_chat_as_json(value):
        for name in CHAT_COLUMNS:
            if name != column and isinstance(row.get(name), list):
                _say(f"rows have {column!r} and {name!r}: {column!r} is read, {name!r} is not")
        return Document(value)
    if isinstance(value, list):
        try:
            return _chat(where, row, column, tokenizer, rules)
        except RecursionError:
            raise TextError(f"{where}: {column!r} is nested too deeply") from None
    found = ", ".join(map(str, row))[:200] or "nothing"
    if column not in row:
        raise TextError(
            f"{where}: expected a column {column!r} in every row; the row has: {found}. Name the "
            "column that holds the text as `column`"
        )
    if isinstance(value, str):
        raise TextError(
            f"{where}: {column!r} holds a chat as text, {_shown(value)}; expected a list of "
            "messages. Store the parsed list: json.loads of it"
        )
    raise TextError(
        f"{where}: {column!r} holds {_kind(value)}; expected text or a list of messages (columns "
        f"of the row: {found})"
    )


def _chat(
    where: str,
    row: Mapping[str, Any],
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    rules: ChatRules,
) -> Document:
    """The document of a row whose `column` holds a list of messages."""
    value = row[column]
    messages = [_message(where, column, message, rules) for message in value]
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"{where}: {column!r} holds a chat, but the tokenizer has no chat template; give text, "
            "or put the template into the model's folder as chat_template.jinja"
        )
    extra = _template_arguments(where, row)
    if not messages:
        return Document("", _key(value), is_chat=True)
    try:
        with _told_that_today_is(rules.today):
            template: Any = tokenizer.get_chat_template(None, extra.get("tools"))
            _refuse_chance(where, template)
            _say_what_is_not_read(template, extra)
            text = _rendered(messages, tokenizer, extra)
    except TextError:
        raise
    except Exception as error:
        # Templates are programs of the model's authors and refuse chats in their own ways.
        reason = (first_line(error) or type(error).__name__)[:200]
        raise TextError(f"{where}: the chat template refuses the chat: {reason}") from None
    return Document(text, _key(value), is_chat=True)


def _rendered(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    extra: Mapping[str, Any],
) -> str:
    """What the chat template makes of messages. Content in parts is given to it as parts or as one
    text, whichever it reads: some templates read parts of users' messages alone."""

    def stock(these: Any) -> str:
        return str(tokenizer.apply_chat_template(these, tokenize=False, **extra))

    contents = (message.get("content") for message in messages)
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if not parts:
        return stock(messages)
    ways = [
        messages,
        [_joined(message) if message["role"] == "system" else message for message in messages],
        [_joined(message) for message in messages],
    ]
    best, most = "", -1
    for way in ways:
        try:
            text = stock(way)
        except Exception:
            if way is ways[-1] and most < 0:
                raise
            continue  # it takes a list for text
        read = sum(part["text"].strip() in text for part in parts)
        if read > most and not _spells_parts(text, parts):
            best, most = text, read
    if most < 0:
        raise ValueError("it reads content neither as a list of parts nor as one text")
    return best


def _spells_parts(text: str, parts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a text has parts as Python or JSON spell them."""
    key = re.compile(r"""['"]type['"]\s*:\s*['"]text['"]""")
    return bool(key.search(text)) and not any(key.search(part["text"]) for part in parts)


def _refuse_chance(where: str, template: str) -> None:
    """TextError for a template that does not give the same text twice. (Of the clock it is told
    nothing.)"""
    found = re.search(r"\|\s*random\b|\blipsum\b", template)
    if found:
        raise TextError(
            f"{where}: the chat template draws at random ({found[0]}), so the same recipe would "
            "give another text each time; take that out of the template"
        )


def _message(where: str, column: str, message: Any, rules: ChatRules) -> dict[str, Any]:
    """A message as templates read it: role and content."""
    if not isinstance(message, Mapping):
        raise TextError(
            f"{where}: {column!r} is a list of {_kind(message)}; expected messages, each "
            "{role: ..., content: ...}"
        )
    keys = ", ".join(map(str, message))[:100] or "none"
    if message.get("role") is None:
        if "from" not in message or "value" not in message:
            raise TextError(
                f"{where}: a message in {column!r} has the keys {keys}; expected role and content"
            )
        if rules.format != "sharegpt":
            raise TextError(
                f"{where}: a message in {column!r} has the keys {keys}; expected role and content. "
                "For ShareGPT's from and value set chat_format: sharegpt beside the source's data"
            )
        return _from_sharegpt(where, column, message)
    content = message.get("content")
    if content is None and not any(message.get(name) for name in _INSTEAD_OF_CONTENT):
        raise TextError(
            f"{where}: a message in {column!r} has no content (its keys: {keys}); expected role "
            "and content"
        )
    if isinstance(content, list):
        return {**message, "content": [_part(where, column, part) for part in content]}
    if content is not None and not isinstance(content, str):
        raise TextError(
            f"{where}: the content of a message in {column!r} is {_kind(content)}; expected text "
            "or a list of parts"
        )
    return dict(message)


def _from_sharegpt(where: str, column: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = _ROLES.get(str(message["from"]).lower())
    if role is None or not isinstance(message["value"], str):
        raise TextError(
            f"{where}: a message in {column!r} is from {_shown(message['from'])} and its value is "
            f"{_kind(message['value'])}; expected text from one of {', '.join(_ROLES)}"
        )
    read = ("from", "value", "role", "content")
    others = {key: value for key, value in message.items() if key not in read}
    return {"role": role, "content": message["value"], **others}


def _part(where: str, column: str, part: Any) -> dict[str, Any]:
    """A part of a message's content, which must be text. Columnar files give every part the keys
    of all others, empty: those go, as templates ask which keys are there."""
    kept = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
    kind = kept.get("type", "text" if "text" in kept else _kind(part))
    if kind != "text" or not isinstance(kept.get("text"), str):
        raise TextError(
            f"{where}: the content of a message in {column!r} has a part of type {_shown(kind)}; "
            "expected parts {type: text, text: ...}. Images and audio cannot be read: leave those "
            "rows out"
        )
    return {"type": "text", **kept}


def _joined(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose parts are one text, with line breaks between them (as vLLM joins them)."""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    return {**message, "content": content}


def _say_what_is_not_read(template: str, extra: Mapping[str, Any]) -> None:
    digest = hashlib.sha256(template.encode()).hexdigest()[:8]
    for name, value in extra.items():
        if value and name not in template:
            _say(f"{name!r} of the rows is not read: the chat template (sha256 {digest}) has none")


@lru_cache(maxsize=256)
def _say(message: str) -> None:
    """A warning that is true of many rows, once."""
    log.warning("%s", message)


def _template_arguments(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside a chat for the template: tools, documents, arguments of its own."""
    found: dict[str, Any] = {}
    for name in ("tools", "documents"):
        value = row.get(name)
        if isinstance(value, str) and name == "tools":
            value = _parsed(value)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise TextError(
                f"{where}: {name!r} holds {_shown(row[name])}; expected a list of tables, as "
                "apply_chat_template takes them. Otherwise give the column another name"
            )
        found[name] = value
    more = row.get("chat_template_kwargs")
    if isinstance(more, str):
        more = _parsed(more)
    if more is None:
        return found
    taken = signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    wrong = [name for name in more if name in taken] if isinstance(more, Mapping) else [_kind(more)]
    if wrong:
        raise TextError(
            f"{where}: 'chat_template_kwargs' holds {_shown(wrong[0])}; expected a table of the "
            "template's own arguments, such as {enable_thinking: false}"
        )
    return found | dict(more)


@contextmanager
def _told_that_today_is(today: date) -> Iterator[None]:
    """Inside the block, chat templates that ask for the date (`strftime_now`) get this one: the
    same recipe gives the same text on any day."""

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Fixed":
            return cls.combine(today, time(12), tz)

    module: Any = chat_template_utils
    before = module.datetime
    module.datetime = Fixed
    try:
        yield
    finally:
        module.datetime = before


def _key(chat: Any) -> str:
    """A chat as it is stored, in one spelling: keys in order, and without the empty ones that
    columnar files add."""
    return json.dumps(without_empty(chat), sort_keys=True, ensure_ascii=False, default=str)


def without_empty(value: Any) -> Any:
    """A value without the null entries of its tables."""
    if isinstance(value, Mapping):
        return {key: without_empty(item) for key, item in value.items() if item is not None}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


def _parsed(text: str) -> Any:
    """JSON, or the text where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _is_chat_as_json(text: str) -> bool:
    """Whether text is a list of messages (or a table that has one), as JSON or Python spell it."""
    if text.lstrip()[:1] not in ("[", "{") or not re.search(r"""['"](role|from)['"]\s*:""", text):
        return False
    value = _parsed(text)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return False
    if isinstance(value, Mapping):
        value = next((value[name] for name in CHAT_COLUMNS if name in value), None)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and {"role", "from"} & item.keys() for item in value)
    )


def _kind(value: Any) -> str:
    """What something is, in words."""
    if value is None:
        return "null"
    words = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a table",
        bytes: "bytes",
    }
    return words.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
