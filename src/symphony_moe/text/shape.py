"""How a file's rows are to be read, told from its first row."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from symphony_moe.errors import TextError, first_line
from symphony_moe.recipe.settings import ChatRules
from symphony_moe.text.file_formats import READERS
from symphony_moe.text.rows import read_row


def shape_of_rows(
    who: str, path: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, str], str | None]:
    """(the settings `column` and `chat_format` of a source by which the first row of its file is
    read, where the defaults do not do; why none do). `who` names the file in errors.

    A column is chosen where it is the only one with text. Raises TextError for a file without rows,
    and for one that cannot be read at all.
    """
    kind = path.suffix.lower()
    try:
        where, row = next(READERS[kind](path))
    except StopIteration:
        raise TextError(f"{who}: {path} has no rows") from None
    except (OSError, ValueError) as error:
        reason = first_line(error)[:200]
        raise TextError(f"{who}: {path} is not readable as {kind}: {reason}") from None
    if kind == ".txt":
        return {}, None
    problem = None
    for way in _ways(row):
        rules = ChatRules("sharegpt" if "chat_format" in way else "messages")
        try:
            read_row(f"{who}: {path}, {where}", row, way.get("column", "text"), tokenizer, rules)
        except TextError as error:
            problem = problem or str(error)
        else:
            return way, None
    return {}, problem


def _ways(row: Any) -> list[dict[str, str]]:
    """The settings to try, in turn."""
    columns = row.items() if isinstance(row, dict) else ()
    texts = [name for name, value in columns if isinstance(value, str) and value.strip()]
    only = [{"column": texts[0]}] if len(texts) == 1 else []
    return [{}, {"chat_format": "sharegpt"}, *only]
