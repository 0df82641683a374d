"""Where a source comes from: its id on the hub, its licence, its languages.

The recipe says it, or the source's own files: the head of its README.md, its licence file, its
config, what a GGUF file or an adapter says of itself. Nothing is looked up: what no file says is
not known.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_moe.recipe.settings import BUNDLED, FormerSource, SourceSpec
from symphony_moe.recipe.yaml_text import read_yaml
from symphony_moe.sources.gguf_file import open_gguf
from symphony_moe.sources.source import Source

CARD = "README.md"

FILES = (CARD, "LICENSE*", "LICENCE*", "COPYING*")
"""Patterns of the files that tell of a model on the hub."""

OTHER = "other"
"""What the hub calls a licence that is not in its list."""

HUB = "https://huggingface.co/"

_TEXTS = (
    ("apache-2.0", r"Apache License\s+Version 2\.0"),
    ("mit", r"Permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("llama2", r"LLAMA 2 COMMUNITY LICENSE AGREEMENT"),
    ("llama3", r"META LLAMA 3 COMMUNITY LICENSE AGREEMENT"),
    ("llama3.1", r"LLAMA 3\.1 COMMUNITY LICENSE AGREEMENT"),
    ("llama3.2", r"LLAMA 3\.2 COMMUNITY LICENSE AGREEMENT"),
    ("llama3.3", r"LLAMA 3\.3 COMMUNITY LICENSE AGREEMENT"),
)
"""The hub's name of a licence -> what its text begins with."""

_CARD, _LICENCE = 2**20, 2**12
"""Characters of a README.md and of a licence file that are looked at: either may be of any size."""

_OWN_FOLDERS = re.compile(
    r"(?:\.|models?|checkpoints?|outputs?|results?|runs?|data|tmp|workspace|content)/|.*/checkpoint-\d+$",
    re.IGNORECASE,
)
"""Paths in two parts, as trainers note them in a config: they are spelled as ids are."""


@dataclass(frozen=True)
class Licence:
    """What one model is licensed under."""

    identifier: str
    """The hub's, or `OTHER`."""
    name: str | None = None
    """Of a licence that is not in the hub's list."""
    link: str | None = None
    """Where its text is."""

    def __str__(self) -> str:
        named = f"{self.identifier} ({self.name})" if self.name else self.identifier
        return f"[{named}]({self.link})" if self.link else named


@dataclass(frozen=True)
class Provenance:
    """Where a source comes from, as far as it is known."""

    hub_ids: tuple[str, ...] = ()
    """Of the model and of its adapter."""
    licences: tuple[Licence | None, ...] = (None,)
    """The model's, and its adapter's where it has one; None where no file names one."""
    languages: tuple[str, ...] = ()
    """As ISO 639 abbreviates them."""


def provenance(source: Source, spec: SourceSpec) -> Provenance:
    """Where a source comes from. `spec`: what the recipe says of it.

    Of a model on the hub that is the recipe's id; of a folder, what its files name: the model that
    it was made of. A file that cannot be read says nothing, and no build fails for it.
    """
    if spec.model.startswith(BUNDLED):
        return Provenance(licences=(Licence("apache-2.0"),))  # the package's own
    model = _Part(source.origin or source.folder, _hub_id(spec.model), _gguf_settings(source, spec))
    parts = [model]
    if source.adapter is not None:
        parts.append(_Part(source.adapter.folder, _hub_id(spec.adapter or "")))
    ids = [*model.ids()]
    for adapter in parts[1:]:
        base = source.adapter.config.base_model_name_or_path if source.adapter else None
        ids = ids or [*_ids([base])]
        ids += [adapter.hub_id] if adapter.hub_id else []
    return Provenance(
        tuple(dict.fromkeys(ids)),
        tuple(part.licence() for part in parts),
        tuple(dict.fromkeys(language for part in parts for language in part.languages())),
    )


def provenance_of(former: FormerSource) -> Provenance:
    """Where a former source comes from."""
    licences = tuple(
        None if one is None else Licence(str(one["identifier"]), one.get("name"), one.get("link"))
        for one in former.licences
    )
    return Provenance(tuple(former.hub_ids), licences, tuple(former.languages))


class _Part:
    """A model, or an adapter: its folder and what the head of its README.md says."""

    def __init__(
        self, folder: Path, hub_id: str | None, settings: Mapping[str, Any] | None = None
    ) -> None:
        """`settings`: of its GGUF file."""
        self.folder, self.hub_id, self.settings = folder, hub_id, settings or {}
        self.card = _card_head(folder)

    def ids(self) -> Iterator[str]:
        """Its own id, or those of what it was made of: the first that any of its files names."""
        if self.hub_id:
            yield self.hub_id
            return
        loaded_from = [] if self.settings else [_config_name(self.folder)]
        for named in (*_of_gguf(self.settings), _listed(self.card.get("base_model")), loaded_from):
            if found := [*_ids(named)]:
                yield from found
                return

    def licence(self) -> Licence | None:
        """By its README.md, its GGUF file, or its licence file."""
        for said in (self.card.get("license"), self.settings.get("general.license")):
            if isinstance(said, str) and re.fullmatch(r"[a-z0-9][a-z0-9.+-]{1,40}", said.lower()):
                return self._stated(said.lower())
        return next((found for path in _licence_files(self.folder) if (found := _read(path))), None)

    def _stated(self, identifier: str) -> Licence:
        if identifier != OTHER:
            return Licence(identifier)
        name, link = self.card.get("license_name"), self.card.get("license_link")
        link = link if isinstance(link, str) else ""
        if self.hub_id and re.fullmatch(r"[\w.-]+", link):  # a file of the repository
            link = f"{HUB}{self.hub_id}/blob/main/{link}"
        named = isinstance(name, str) and re.fullmatch(r"[\w.+ -]{1,60}", name)
        linked = re.fullmatch(r"https://[^\s()|]{1,200}", link)
        return Licence(OTHER, str(name) if named else None, link if linked else None)

    def languages(self) -> Iterator[str]:
        """By its README.md."""
        for language in _listed(self.card.get("language")):
            if re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
                yield language


def _hub_id(model: str) -> str | None:
    """What the recipe names a model or adapter, where it is on the hub."""
    return None if not model or Path(model).is_absolute() else model


def _ids(names: Iterable[Any]) -> Iterator[str]:
    """Those of some names that can be ids on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for name in names:
        if not isinstance(name, str) or name.count("/") != 1 or _OWN_FOLDERS.match(name):
            continue
        try:
            validate_repo_id(name)
        except HFValidationError:
            continue
        yield name


def _listed(value: Any) -> list[str]:
    """A name or several, as cards have them."""
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, str)]


def _card_head(folder: Path) -> Mapping[str, Any]:
    """The metadata in the head of a README.md, found and read as the hub does it."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    path = folder / CARD
    try:
        text = _beginning(path, _CARD) if path.is_file() else ""
        block = REGEX_YAML_BLOCK.search(text)
        head = read_yaml(block[2]) if block else {}
    except (OSError, ValueError):
        return {}
    return head if isinstance(head, Mapping) else {}


def _config_name(folder: Path) -> Any:
    """The name that older transformers note in a config: where the model was loaded from."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content.get("_name_or_path") if isinstance(content, dict) else None


def _gguf_settings(source: Source, spec: SourceSpec) -> Mapping[str, Any] | None:
    """What the GGUF file of a source says of itself; None where it has none."""
    if spec.gguf_file is None:
        return None
    folder = source.origin or source.folder
    return open_gguf(source.name, folder / spec.gguf_file).settings


def _of_gguf(settings: Mapping[str, Any]) -> Iterator[list[str]]:
    """The ids that a GGUF file names: of the model that was converted, or else of those that it
    was made of."""
    based = sorted(
        key for key in settings if re.fullmatch(r"general\.base_model\.\d+\.repo_url", key)
    )
    source = ["general.source.huggingface.repository"], ["general.source.repo_url"]
    for keys in (*source, based):
        named = (settings.get(key) for key in keys)
        yield [one.removeprefix(HUB).rstrip("/") for one in named if isinstance(one, str)]


def _beginning(path: Path, characters: int, errors: str = "strict") -> str:
    with path.open(encoding="utf-8-sig", errors=errors) as file:
        return file.read(characters)


def _licence_files(folder: Path) -> list[Path]:
    found = {path for pattern in FILES[1:] for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _read(path: Path) -> Licence:
    """The licence that a file holds the text of; `OTHER`, by the file's name, where that is not
    known here."""
    try:
        text = _beginning(path, _LICENCE, errors="replace")
    except OSError:
        text = ""
    for identifier, begins in _TEXTS:
        if re.search(begins, text, re.IGNORECASE):
            return Licence(identifier)
    return Licence(OTHER)
