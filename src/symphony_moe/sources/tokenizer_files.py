"""The files of the output's tokenizer, from which every reader makes the same tokenizer.

They are a source's own, byte for byte, wherever these say it all.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from symphony_moe.errors import SourceError
from symphony_moe.files import from_json
from symphony_moe.sources.same_tokenizer import SETTINGS
from symphony_moe.sources.source_tokenizer import (
    CHAT_TEMPLATES,
    EXTRA,
    GENERIC,
    ReducedTokenizer,
    SourceTokenizer,
    flags,
    json_files,
    ordinary_tokens,
    stored_files,
    tokens_of,
)

_CHAT_TEMPLATE = "chat_template.jinja"
"""The file with the default chat template."""

_NEWEST, _ANY = GENERIC
"""Names of one class: what transformers 5 writes, and what every version and llama.cpp's converter
know."""

_NO_MODEL = {"type": "BPE", "vocab": {}, "merges": []}
"""What tokenizer.json says of a model without a token."""

_STAGES = ("normalizer", "pre_tokenizer", "decoder")
"""What tokenizer.json says of text on its way to tokens and back, and some classes build anew."""


def tokenizer_files(source: SourceTokenizer) -> dict[str, bytes]:
    """The source's tokenizer files, by name, with the same tokenizer in them for every reader.

    Transformers chooses the class of a tokenizer by the model's family, and the result is of
    another family. So what the source's class does by itself is written into the files; where it
    does nothing that they do not say, they stay as they are.
    """
    files = stored_files(source)
    return _with(files, _explicit(source, files))


def merged_files(
    anchor: SourceTokenizer, new: Sequence[Mapping[str, Any]], chat: SourceTokenizer
) -> dict[str, bytes]:
    """The anchor's tokenizer files with the new tokens, and with the chat source's conventions."""
    files = stored_files(anchor)
    if "tokenizer.json" not in files and (new or not anchor.content):
        raise SourceError(
            f"{anchor.name}: {anchor.folder} has no tokenizer.json, which merging vocabularies "
            "needs; load the tokenizer with transformers' AutoTokenizer and save_pretrained it "
            "there"
        )
    contents = _explicit(anchor, files)
    config = contents.setdefault("tokenizer_config.json", {})
    _add(contents, new)
    if chat is not anchor:
        contents |= _chat_conventions(files, config, chat)
    return _with(files, contents)


def _with(files: Mapping[str, bytes], contents: dict[str, Any]) -> dict[str, bytes]:
    """The files with other contents; byte for byte as they were, where those are the same."""
    if "tokenizer.model" in files and "tokenizer.json" in contents:
        _list_beside_sentencepiece(contents)
    changed = {
        name: _dump(content)
        for name, content in contents.items()
        if name not in files or content != from_json(files[name])
    }
    return dict(files) | changed


def _dump(content: Any) -> bytes:
    # Indented, a large vocabulary is six times as much work: the library's quick encoder knows no
    # indents.
    indent = None if "model" in content else 2
    return json.dumps(content, indent=indent, ensure_ascii=False).encode() + b"\n"


def _explicit(source: SourceTokenizer, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What the JSON files with rules and tokens say, and what the source's class does beside that:
    the stages and settings of its own, tokens that it adds, special tokens that it presumes."""
    contents = json_files(files)
    config = contents.setdefault("tokenizer_config.json", {})
    # Code and files that are not there, and are not asked for: what they would do is what these
    # files say.
    for key in ("auto_map", "name_or_path", "tokenizer_file", "vocab_file"):
        config.pop(key, None)
    named = type(source.tokenizer).__name__
    if named in GENERIC and "tokenizer.json" in files:
        if _names_a_class(source, config):
            config["tokenizer_class"] = _ANY
    elif source.content:
        rules = contents.setdefault("tokenizer.json", source.content)
        _write_rules(source, contents, rules)
        if isinstance(source.tokenizer, ReducedTokenizer):
            _leave_out(source.tokenizer, contents, rules)
        elif named not in GENERIC and config.get("tokenizer_class") != named + "Fast":
            config["tokenizer_class"] = named
        _write_settings(source.tokenizer, config)
    _name_for_every_reader(config)
    return {name: content for name, content in contents.items() if content or name in files}


def _name_for_every_reader(config: dict[str, Any]) -> None:
    """Put names that only transformers 5 knows into those that all versions know: a list of
    `extra_special_tokens` ends the loading of a tokenizer in 4.57, where it is a table."""
    if config.get("tokenizer_class") == _NEWEST:
        config["tokenizer_class"] = _ANY
    old, new = EXTRA
    if isinstance(config.get(new), list):
        named = config.get(old) or []
        listed = named if isinstance(named, list) else [named]
        known = tokens_of(listed)
        more = [token for token in config.pop(new) if not tokens_of(token) <= known]
        if listed or more:
            config[old] = [*listed, *more]


def _list_beside_sentencepiece(contents: dict[str, Any]) -> None:
    """List added tokens where readers of tokenizer.model look for them: llama.cpp's converter does
    not open tokenizer.json beside it, and would lose what only that file lists."""
    config = contents.setdefault("tokenizer_config.json", {})
    added = contents["tokenizer.json"].get("added_tokens") or []
    decoder = config["added_tokens_decoder"] = config.get("added_tokens_decoder") or {}
    for token in added:
        decoder.setdefault(str(token["id"]), {"content": token["content"]} | flags(token))
    ordinary = ordinary_tokens(contents["tokenizer.json"])
    beyond = {token["content"]: token["id"] for token in added if token["content"] not in ordinary}
    if beyond:
        contents["added_tokens.json"] = contents.get("added_tokens.json", {}) | beyond


def _names_a_class(source: SourceTokenizer, config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer of no class of its own might get one elsewhere: by a name that only its
    family's loader passes over, or for want of the name that is in its config.json."""
    named = config.get("tokenizer_class")
    if named is not None:
        return named not in GENERIC
    path = source.folder / "config.json"
    return path.is_file() and bool(json.loads(path.read_bytes()).get("tokenizer_class"))


def _write_rules(source: SourceTokenizer, contents: dict[str, Any], rules: dict[str, Any]) -> None:
    """What the source's class does with text and tokens, where tokenizer.json says otherwise."""
    read = _as_read(rules, source.content["model"])
    for stage in _STAGES:
        if read[stage] != source.content[stage]:
            rules[stage] = source.content[stage]
    if not (_adds_nothing(read) and _adds_nothing(source.content)):
        rules["post_processor"] = source.content["post_processor"]
    if read["model"]["type"] != source.content["model"]["type"]:
        rules["model"] = source.content["model"]
    for option, value in source.content["model"].items():
        if read["model"].get(option) != value:
            rules["model"][option] = value
    listed = rules.get("added_tokens", [])
    decoder = contents["tokenizer_config.json"].get("added_tokens_decoder", {})
    for entry in [*listed, *decoder.values()]:
        own = source.added.get(entry["content"])
        if own is not None and flags(own) != flags(entry):
            entry |= flags(own)
    known = {entry["content"] for entry in listed}
    _add(contents, [entry for token, entry in source.added.items() if token not in known])


def _as_read(rules: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer.json says as the library reads it: an older file spells the same otherwise.
    Where the tokenizer's `model` stands in it word for word, that part is not read: a large
    vocabulary takes a second."""
    if rules["model"] != model:
        return dict(from_json(Tokenizer.from_str(json.dumps(rules)).to_str()))
    small = {**rules, "model": _NO_MODEL, "added_tokens": []}
    return dict(from_json(Tokenizer.from_str(json.dumps(small)).to_str())) | {"model": model}


def _adds_nothing(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer puts no token around a text."""
    post = content["post_processor"]
    return post is None or (
        post["type"] == "TemplateProcessing"
        and post["single"] == [{"Sequence": {"id": "A", "type_id": 0}}]
    )


def _leave_out(
    reduced: ReducedTokenizer, contents: Mapping[str, Any], rules: dict[str, Any]
) -> None:
    """Make files give a tokenizer without what its class has added."""
    contents["tokenizer_config.json"]["tokenizer_class"] = _ANY
    for role in reduced.gone:
        contents["tokenizer_config.json"].pop(role, None)
        contents.get("special_tokens_map.json", {}).pop(role, None)
    if (rules.get("padding") or {}).get("pad_token") in reduced.left_out:
        rules["padding"] = None  # which would add it again


def _write_settings(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> None:
    """Name special tokens and settings that are the class's."""
    for role, token in tokenizer.special_tokens_map.items():
        config.setdefault(role, token)
    extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", [])]
    if set(extra) - {token for key in EXTRA for token in tokens_of(config.get(key))}:
        config["extra_special_tokens"] = extra
    for name, unset in SETTINGS.items():
        value = getattr(tokenizer, name, unset)
        if value != unset and config.get(name, unset) != value:
            config[name] = value


def _add(contents: dict[str, Any], new: Sequence[Mapping[str, Any]]) -> None:
    """List new tokens wherever the files list added tokens."""
    config = contents.get("tokenizer_config.json", {})
    for token in new:
        entry = flags(token)
        contents["tokenizer.json"].setdefault("added_tokens", []).append(
            {"id": token["id"], "content": token["content"]} | entry
        )
        if "added_tokens_decoder" in config:
            listed = {"content": token["content"]} | entry
            config["added_tokens_decoder"][str(token["id"])] = listed
        if "added_tokens.json" in contents:
            contents["added_tokens.json"][token["content"]] = token["id"]


def _chat_conventions(
    files: dict[str, bytes], config: dict[str, Any], chat: SourceTokenizer
) -> Any:
    """Put the chat source's template, end and padding tokens in the place of the anchor's; returns
    further JSON files that change."""
    template = getattr(chat.tokenizer, "chat_template", None)
    config.pop("chat_template", None)
    for name in [name for name in files if name.startswith(("chat_template.", CHAT_TEMPLATES))]:
        del files[name]
    if isinstance(template, str) and "\r" not in template:
        files[_CHAT_TEMPLATE] = template.encode()
    elif isinstance(template, str):
        config["chat_template"] = template  # a file is read with other line ends
    elif template:
        # In the config any name will do; as files, those that a file can have.
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in template.items()
        ]
    changed = {}
    named = {"eos_token": chat.tokenizer.eos_token, "pad_token": chat.tokenizer.pad_token}
    config |= named
    if "special_tokens_map.json" in files:
        listed = json.loads(files["special_tokens_map.json"]) | named
        changed["special_tokens_map.json"] = {k: v for k, v in listed.items() if v is not None}
    return changed
