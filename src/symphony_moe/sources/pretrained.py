"""What `transformers` loads from a folder here: no network, and no code that comes with a model.

Every call of a `from_pretrained` takes `LOCAL`. Without it, `transformers` asks at the terminal
whether it may run the code that a model's `auto_map` names.
"""

import json
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

LOCAL: Final[dict[str, Any]] = {"local_files_only": True, "trust_remote_code": False}


def load_tokenizer(folder: Path, **more: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that `AutoTokenizer` makes of a folder. Raises whatever its parsers raise."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **LOCAL, **more)
    return tokenizer


def load_config(folder: Path, **more: Any) -> PreTrainedConfig:
    """The config that `AutoConfig` makes of a folder. Raises whatever its parsers raise."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **LOCAL, **more)
    return config


def code_of(folder: Path, file: str) -> list[str]:
    """The classes that the `auto_map` of one of a folder's files names; none where there is no
    such file, or it is not JSON."""
    try:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        named = content.get("auto_map") or {}
    except (OSError, ValueError, AttributeError):
        return []
    return sorted(set(_leaves(named)))


def _leaves(value: Any) -> list[str]:
    """The strings in tables and lists within one another."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if isinstance(value, str) else []
