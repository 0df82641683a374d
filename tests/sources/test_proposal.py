"""A recipe for models that one has: the method is told from their weights, the names from their
folders, the shape of the text from its first rows; what must be filled in is said."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import make_model
from symphony_moe import pipeline
from symphony_moe.errors import RecipeError, SourceError, SourceMismatch, TextError
from symphony_moe.recipe.draft import source_names
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.settings import FILL_IN, Recipe
from symphony_moe.sources import proposal
from symphony_moe.sources.proposal import Proposal, propose_recipe

Recipes = Callable[[str], Path]

BOTH = ["bundled:{}/english", "bundled:{}/python"]


def bundled(family: str) -> list[str]:
    return [model.format(family) for model in BOTH]


@pytest.fixture
def project(recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with models/a, models/b and text."""
    shutil.copytree(recipes("llama").parent, tmp_path / "project")
    (tmp_path / "project" / "recipe.yaml").unlink()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def written(made: Proposal, folder: Path) -> Recipe:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(made.recipe)
    return load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize("family", ["strangers", "branches"])
def test_the_recipe_says_what_the_models_are_to_each_other(family: str, tmp_path: Path) -> None:
    """And how it was told, with the number; of branches it names the faster methods. With its text
    it loads and can be planned without a warning."""
    data = {"english": ["bundled:english"], "python": ["bundled:python"]}
    made = propose_recipe(bundled(family), data, tmp_path)
    assert made.method == "harmonized" and made.fill_in == [] and made.notes == []
    number = {"strangers": "python 0.00.", "branches": "python 0.95."}[family]
    words = " ".join(made.recipe.replace("#", " ").split())
    assert number in words
    assert ("both are much faster" in words) == (family == "branches")
    assert "2 is all of them" in words
    recipe = written(made, tmp_path)
    assert recipe.method == "harmonized" and list(recipe.sources) == ["english", "python"]
    assert recipe.anchor == "english" and FILL_IN not in made.recipe
    assert recipe.train.average and recipe.router.top_k == 2
    assert not pipeline.plan(recipe).warnings


def test_one_stranger_among_branches_is_enough(tmp_path: Path) -> None:
    made = propose_recipe([*bundled("branches"), "bundled:strangers/python"], {}, tmp_path)
    assert made.method == "harmonized"
    assert set(made.likeness) == {"branches-python", "strangers-python"}


def test_weights_that_are_not_here_are_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposal, "likeness_to_anchor", lambda *_: {})
    made = propose_recipe(bundled("branches"), {}, tmp_path)
    assert made.method == "harmonized" and "are not here" in made.recipe


def test_smaller_models_are_padded_where_that_makes_them_fit(project: Path) -> None:
    """As `backbone.shapes: widest`, with a method that aligns; and what is padded is said."""
    make_model(project / "models" / "b", "llama", 1, num_hidden_layers=1)
    make_model(project / "models" / "c", "llama", 2, hidden_size=16, num_attention_heads=2)
    models = [f"models/{name}" for name in "abc"]
    made = propose_recipe(models, {name: [f"{name}.jsonl"] for name in "abc"}, project)
    recipe = written(made, project)
    assert recipe.backbone.shapes == "widest" and recipe.method == made.method == "harmonized"
    words = " ".join(made.recipe.replace("#", " ").split())
    assert "b: layers 1 to 2" in words
    assert "c: hidden size 16 to 32" in words and "docs/how-to/shapes.md" in words
    assert "needs two documents" in words and "not here" not in words
    assert re.search(r"# llama, [\d,]+ parameters in \w+, 1 layers.*\n  b:", made.recipe)
    assert all(one.verdict != "error" for one in pipeline.plan(recipe).differences)


def test_models_that_no_padding_makes_fit_are_refused_as_they_are(project: Path) -> None:
    make_model(project / "models" / "b", "llama", 1, hidden_size=16, head_dim=4)
    with pytest.raises(SourceMismatch, match=r"hidden_size .*head_dim") as refused:
        propose_recipe(["models/a", "models/b"], {}, project)
    assert "a: 32" in str(refused.value)


def test_without_text_the_recipe_has_places_to_fill_in(tmp_path: Path) -> None:
    made = propose_recipe(bundled("branches"), {"python": ["bundled:python"]}, tmp_path)
    assert made.fill_in == ["sources.english.data"]
    assert made.recipe.count(f"data: {FILL_IN}") == 1 and f"in place of {FILL_IN}" in made.recipe
    with pytest.raises(RecipeError, match=r"sources\.english\.data: expected text of the source's"):
        written(made, tmp_path)


def test_paths_are_spelled_from_where_the_recipe_will_lie(project: Path) -> None:
    """And read as what they were in the current folder."""
    data = {"a": ["a.jsonl"], "b": ["b.jsonl", "./other.jsonl"]}
    for folder in (Path(), Path("recipes"), Path("..")):
        models = ["models/a", str(project / "models" / "b")]
        recipe = written(propose_recipe(models, data, folder), folder)
        assert [s.model for s in recipe.sources.values()] == [
            str(project / "models" / name) for name in "ab"
        ]
        assert recipe.sources["a"].data == str(project / "a.jsonl")
        assert recipe.sources["b"].data == [str(project / f) for f in ("b.jsonl", "other.jsonl")]


def test_windows_are_no_longer_than_the_shortest_context(project: Path) -> None:
    recipe = written(
        propose_recipe(["models/a", "models/b"], {"a": ["a.jsonl"], "b": ["b.jsonl"]}, project),
        project,
    )
    sections = (recipe.calibration, recipe.train, recipe.evaluation)
    assert {section.sequence_length for section in sections} == {256}
    assert not any("beyond the context" in note for note in pipeline.plan(recipe).notes)


CHAT = [{"from": "human", "value": "alpha"}, {"from": "gpt", "value": "beta"}]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("row", "column", "chat_format", "problem"),
    [
        ({"text": "alpha"}, "text", "messages", None),
        ({"content": "alpha", "id": 3}, "content", "messages", None),
        ({"conversations": CHAT}, "text", "sharegpt", None),
        ({"prompt": "alpha", "answer": "beta"}, "text", "messages", "the row has: prompt, answer"),
        ({"id": 3}, "text", "messages", "the row has: id"),
        ([1], "text", "messages", "expected a table of columns"),
    ],
    ids=str,
)
def test_the_shape_of_the_text_is_told_from_its_first_row(
    row: Any, column: str, chat_format: str, problem: str | None, project: Path
) -> None:
    (project / "models" / "b" / "chat_template.jinja").write_text(TEMPLATE)
    (project / "b.jsonl").write_text((json.dumps(row) + "\n") * 3)
    made = propose_recipe(["models/a", "models/b"], {"a": ["a.jsonl"], "b": ["b.jsonl"]}, project)
    spec = written(made, project).sources["b"]
    assert (spec.column, spec.chat_format) == (column, chat_format)
    said = [note for note in made.notes if "b.jsonl" in note]
    assert bool(said) is (problem is not None) and (problem is None or problem in said[0])
    assert problem is None or problem in " ".join(made.recipe.replace("#", " ").split())


def test_differences_of_the_models_are_said_as_by_the_plan(project: Path) -> None:
    config = project / "models" / "b" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-6}))
    made = propose_recipe(["models/a", "models/b"], {"a": ["a.jsonl"], "b": ["b.jsonl"]}, project)
    planned = pipeline.plan(written(made, project))
    warned = [str(one) for one in planned.differences if one.verdict == "warning"]
    assert warned and [note for note in made.notes if note in warned] == warned


def test_models_that_cannot_become_one_are_refused(project: Path) -> None:
    make_model(project / "models" / "qwen", "qwen2", 0)
    with pytest.raises(SourceMismatch, match=r"model_type \(a: llama; qwen: qwen2\)"):
        propose_recipe(["models/a", "models/qwen"], {}, project)


@pytest.mark.parametrize(
    ("models", "data", "error", "said"),
    [
        (["models/a"], {}, RecipeError, "expected two models or more, got 1"),
        (["models/a", "./models/none"], {}, SourceError, "none: no such model folder"),
        (["models/a", "models/b"], {"bb": ["a.jsonl"]}, RecipeError, "did you mean b?"),
        (["models/a", "models/b"], {"zz": ["a.jsonl"]}, RecipeError, "sources are a, b"),
        (["models/a", "models/b"], {"a": ["none.jsonl"]}, TextError, "no such data file"),
        (["models/a", "models/b"], {"a": ["models"]}, TextError, "is a folder"),
        (["models/a", "models/b"], {"a": ["blank.jsonl"]}, TextError, "has no rows"),
        (["models/a", "models/b"], {"a": ["bad.jsonl"]}, TextError, "is not readable as .jsonl"),
    ],
    ids=str,
)
def test_mistakes_are_named(
    models: list[str],
    data: dict[str, list[str]],
    error: type[Exception],
    said: str,
    project: Path,
) -> None:
    (project / "blank.jsonl").write_text("\n\n")
    (project / "bad.jsonl").write_text("{not json\n")
    with pytest.raises(error, match=said.replace(".", r"\.").replace("?", r"\?")) as caught:
        propose_recipe(models, data, project)
    assert len(str(caught.value)) < 480


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["models/a", "./models/b/", "../c"], ["a", "b", "c"]),
        (["org/Model-7B", "bundled:strangers/python"], ["Model-7B", "python"]),
        (["x/final", "y/final", "z/other"], ["x-final", "y-final", "other"]),
        (["x/final", "y/Final"], ["x-final", "y-Final"]),
        (["a", "a", "a"], ["a", "a-2", "a-3"]),
        (["a/x", "b/a-x", "a/x"], ["a-x", "a-x-2", "a-x-3"]),
        (["m/my model (1)", "m/.hidden", "m/ü"], ["my-model-1", "hidden", "source"]),
        (["run/built", "run/trained"], ["built-source", "trained-source"]),
        (["..", "/"], ["source", "source-2"]),
    ],
    ids=str,
)
def test_names_are_those_of_the_folders_and_unique(models: list[str], names: list[str]) -> None:
    assert source_names(models) == names
