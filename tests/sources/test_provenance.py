"""Where a source comes from is what the recipe or its own files say, and only what can be so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from symphony_moe.recipe.settings import SourceSpec
from symphony_moe.sources.opening import open_source
from symphony_moe.sources.provenance import Licence, Provenance, provenance

APACHE = "                                 Apache License\n           Version 2.0, January 2004\n"
MIT = (
    "MIT License\n\nCopyright (c) 2020\n\n"
    "Permission is hereby granted, free of charge, to any person obtaining a copy\n"
)
LLAMA = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: ..."


@pytest.fixture
def model(recipes: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(recipes("llama").parent / "models" / "a", tmp_path / "model"))


def of(model: Path, **changes: Any) -> Provenance:
    spec = SourceSpec(model=str(model), data="x.txt", **changes)
    return provenance(open_source("a", spec), spec)


def card(model: Path, head: str) -> None:
    (model / "README.md").write_text(f"---\n{head}\n---\n\n# A model\n")


def note_in_config(model: Path, name: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))


def test_files_that_say_nothing_name_nothing(model: Path) -> None:
    assert of(model) == Provenance()


@pytest.mark.parametrize(
    ("head", "ids"),
    [
        ("base_model: some/model-7b", ("some/model-7b",)),
        ("base_model: [some/a, some/b, some/a]", ("some/a", "some/b")),
        ("base_model:\n- ./models/a\n- some/b", ("some/b",)),
        ("base_model: models/a", ()),
        ("base_model: /home/me/models/a", ()),
        ("base_model: a/b/c", ()),
        ("base_model: outputs/run", ()),
        ("base_model: me/checkpoint-500", ()),
        ("base_model: a b/c", ()),
        ("base_model: ../c", ()),
        ("base_model: {a: b}", ()),
        ("base_model: 12", ()),
        ("base_model: [", ()),
        ("- a list", ()),
        ("a: &a [*a]", ()),
    ],
)
def test_a_folders_card_names_what_it_was_made_of(
    head: str, ids: tuple[str, ...], model: Path
) -> None:
    """Ids alone: a path is none, and a card that cannot be read says nothing."""
    card(model, head)
    assert of(model).hub_ids == ids


def test_a_config_names_where_its_model_was_loaded_from_unless_the_card_knows_better(
    model: Path,
) -> None:
    note_in_config(model, "some/model-7b")
    assert of(model).hub_ids == ("some/model-7b",)
    card(model, "base_model: another/model")
    assert of(model).hub_ids == ("another/model",)
    (model / "README.md").write_bytes(b"---\nbase_model: \xff\n---\n")  # no text
    assert of(model).hub_ids == ("some/model-7b",)
    note_in_config(model, "/mnt/models/mine")
    assert of(model).hub_ids == ()


@pytest.mark.parametrize(
    ("head", "files", "licence"),
    [
        ("license: apache-2.0", {"LICENSE": MIT}, Licence("apache-2.0")),
        ("license: MIT", {}, Licence("mit")),
        ("language: en", {"LICENSE": APACHE}, Licence("apache-2.0")),
        ("language: en", {"LICENSE.txt": MIT}, Licence("mit")),
        ("language: en", {"LICENCE.md": LLAMA}, Licence("llama3.2")),
        ("language: en", {"COPYING": "Mine."}, Licence("other")),
        (
            "license: other\nlicense_name: qwen-research\nlicense_link: https://a.b/LICENSE",
            {},
            Licence("other", "qwen-research", "https://a.b/LICENSE"),
        ),
        ("license: other\nlicense_link: LICENSE", {}, Licence("other")),
        ("license: '<script>'", {}, None),
        ("license: [mit, apache-2.0]", {}, None),
    ],
)
def test_a_licence_is_what_the_card_says_or_else_the_licence_file(
    head: str, files: dict[str, str], licence: Licence | None, model: Path
) -> None:
    card(model, head)
    for name, text in files.items():
        (model / name).write_text(text)
    assert of(model).licences == (licence,)


def test_languages_are_codes(model: Path) -> None:
    """`no` is Norwegian."""
    card(model, "language:\n- en\n- no\n- English\n- 7\n- en")
    assert of(model).languages == ("en", "no")


def test_a_hub_model_is_named_by_the_recipe_and_its_licence_is_fetched(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(model, "license: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: some/base")

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        for path in (path for pattern in allow_patterns for path in model.glob(pattern)):
            shutil.copyfile(path, tmp_path / "snapshot" / path.name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    spec = SourceSpec(model="someone/model", data="x.txt")
    link = "https://huggingface.co/someone/model/blob/main/LICENSE"
    assert provenance(open_source("a", spec), spec) == Provenance(
        ("someone/model",), (Licence("other", "mine", link),)
    )


def test_a_bundled_model_is_the_packages_own() -> None:
    spec = SourceSpec(model="bundled:strangers/english", data="bundled:english")
    expected = Provenance(licences=(Licence("apache-2.0"),))
    assert provenance(open_source("a", spec), spec) == expected
