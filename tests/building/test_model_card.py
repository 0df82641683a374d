"""The card of a checkpoint: the hub can read it, and every line of it can be known at the build."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from symphony_moe.building.model_card import model_card
from symphony_moe.building.plan import make_plan
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.yaml_text import read_yaml
from symphony_moe.sources.opening import open_sources


@pytest.fixture
def project(recipes: Callable[[str], Path], tmp_path: Path) -> Path:
    """A recipe of three sources whose cards can be written."""
    return Path(shutil.copytree(recipes("llama").parent, tmp_path / "project")) / "recipe.yaml"


def edited(recipe: Path, heads: dict[str, str], **data: Any) -> Path:
    """The recipe, with heads of its sources' cards and other text for some of them."""
    content = json.loads(recipe.read_text())
    for name, head in heads.items():
        card = recipe.parent / "models" / name / "README.md"
        card.write_text(f"---\n{head}\n---\n")
    for name, text in data.items():
        content["sources"][name]["data"] = text
    recipe.write_text(json.dumps(content))
    return recipe


def card_of(path: Path, *overrides: str) -> str:
    """What a build writes."""
    recipe = load_recipe(path, ["method=btx", *overrides])
    sources = open_sources(recipe)
    return model_card(make_plan(recipe, sources), recipe, sources, has_chat_template=False)


def head_of(path: Path) -> dict[str, Any]:
    """Its metadata, by the hub's own reader, which gives back what it was given."""
    text = card_of(path)
    head: dict[str, Any] = ModelCard(text).data.to_dict()
    block = text.split("---\n")[1]
    assert head == yaml.safe_load(block) == read_yaml(block)
    return head


def test_the_hub_is_told_ids_licence_and_languages_once_each(project: Path) -> None:
    same = "license: apache-2.0\nlanguage: [no, en]\nbase_model: some/base"
    edited(
        project,
        {"a": same, "b": same, "c": "license: apache-2.0\nbase_model: [a/b, some/base]"},
        b={"hub": "some/text", "column": "content"},
        c={"hub": "some/text", "name": "other"},
    )
    assert head_of(project) == {
        "base_model": ["some/base", "a/b"],
        "base_model_relation": "merge",
        "datasets": ["some/text"],
        "language": ["en", "no"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "merge", "symphony-moe"],
    }
    shown = read_yaml(card_of(project).split("```yaml\n")[1].split("```")[0])
    assert shown["sources"]["b"] == {
        "model": "b",
        "data": {"hub": "some/text", "column": "content"},
    }
    assert shown["sources"]["a"] == {"model": "a"}


def test_what_nobody_knows_is_left_out(project: Path) -> None:
    """A folder's name is no id; a card without a licence is better than one with a wrong one."""
    assert head_of(project) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "merge", "symphony-moe"],
    }
    assert "No file of the sources names a licence." in card_of(project)


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        (["mit", "mit", "apache-2.0"], {"license": "other", "license_name": "several"}),
        (["mit", "mit", None], {"license": "other", "license_name": "several"}),
        (["other"] * 3, {"license": "other", "license_name": "several"}),
        (
            ["other\nlicense_name: mine\nlicense_link: https://a.b/c"] * 3,
            {"license": "other", "license_name": "mine", "license_link": "https://a.b/c"},
        ),
    ],
)
def test_one_licence_is_said_where_all_sources_have_it(
    licences: list[str | None], said: dict[str, str], project: Path
) -> None:
    """Otherwise the card names each source's: the result is bound by all of them."""
    heads = {n: f"license: {one}" for n, one in zip("abc", licences, strict=True) if one}
    edited(project, heads)
    head = head_of(project)
    assert {key: head[key] for key in head if key.startswith("license")} == said
    text = card_of(project)
    if said["license_name"] == "several":
        first, last = licences[0], licences[2] or "none stated"
        assert f"\n- a: {first}\n" in text and f"\n- c: {last}\n" in text
    else:
        assert "All sources are under [other (mine)](https://a.b/c)" in text


def test_a_card_names_no_place_on_the_machine(project: Path) -> None:
    """Not in what is compared either, which a build does not ask for."""
    content = json.loads(project.read_text())
    model = str(project.parent / "models" / "a")
    content["compare"] = {"variants": {"x": {"sources": {"a": {"model": model}}}}}
    project.write_text(json.dumps(content))
    assert str(project.parent) not in card_of(project)


def test_a_card_says_who_reads_the_model(project: Path) -> None:
    text = card_of(project)
    assert "- llama.cpp: the same answers (if its converter knows the tokenizer) [b" in text
    assert "- vLLM: the same answers [0." in text
    assert "with symphony_moe 0." in text and ", transformers 5." in text
