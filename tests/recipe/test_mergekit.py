"""A recipe of mergekit-moe becomes one that loads and builds the same; what has no counterpart is
named, and what mergekit-moe would read past in silence is refused."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from symphony_moe import pipeline
from symphony_moe.errors import RecipeError
from symphony_moe.recipe.load import load_recipe, resolve_recipe
from symphony_moe.recipe.mergekit import _OF_MERGES, Imported, _Expert, _Theirs, import_mergekit
from symphony_moe.recipe.settings import FILL_IN, Recipe
from symphony_moe.recipe.yaml_text import read_yaml

Recipes = Callable[[str], Path]

BASE: dict[str, Any] = {
    "base_model": "someone/base",
    "gate_mode": "hidden",
    "dtype": "float16",
    "experts_per_token": 1,
    "experts": [
        {"source_model": "someone/base", "positive_prompts": ["Hello, who are you?"]},
        {
            "source_model": "others/Coder-7B@v1.0",
            "positive_prompts": ["def main():", "Write a test."],
            "negative_prompts": ["Once upon a time"],
        },
    ],
}


def imported(folder: Path, content: Any = None, /, **changes: Any) -> Imported:
    """BASE with some settings replaced, or other text, imported."""
    path = folder / "moe.yml"
    path.write_text(
        content if isinstance(content, str) else json.dumps(copy.deepcopy(BASE) | changes)
    )
    return import_mergekit(path, folder)


def loaded(made: Imported, folder: Path) -> Recipe:
    """The recipe with its places filled in."""
    return resolve_recipe(read_yaml(made.recipe.replace(FILL_IN, "x.jsonl")), folder, "made.yaml")


def refusal(folder: Path, content: Any = None, /, **changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        imported(folder, content, **changes)
    assert len(str(caught.value)) < 480 and str(caught.value).startswith(str(folder / "moe.yml"))
    return str(caught.value).removeprefix(str(folder / "moe.yml") + ": ")


def test_what_has_a_counterpart_is_taken_over(tmp_path: Path) -> None:
    made = imported(tmp_path)
    recipe = loaded(made, tmp_path)
    assert {name: (spec.model, spec.revision) for name, spec in recipe.sources.items()} == {
        "base": ("someone/base", None),
        "Coder-7B": ("others/Coder-7B", "v1.0"),
    }
    assert recipe.anchor == "base" and recipe.method == "btx"
    backbone = recipe.backbone
    assert {backbone.attention, backbone.embeddings, backbone.norms} == {"anchor"}
    assert (recipe.router.init, recipe.router.top_k) == ("hidden", 1)
    assert recipe.output.dtype == "float16" and not recipe.aligns and not recipe.fits_layers


@pytest.mark.parametrize("model", ["a+b+c", "x@", "x@1@2", "a+", "+b", "a@1+b@"])
def test_what_is_no_reference_is_refused(model: str, tmp_path: Path) -> None:
    assert "base_model: expected a folder or hub id" in refusal(tmp_path, base_model=model)


def test_qwen_moe_has_a_counterpart(tmp_path: Path) -> None:
    assert loaded(imported(tmp_path, architecture="qwen moe"), tmp_path).output.architecture == (
        "qwen2_moe"
    )


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "from-mergekit.md"


def test_the_page_shows_what_comes_of_its_recipe_and_names_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    theirs, ours = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name in ("chat", "coder"):
        (tmp_path / "models" / name).mkdir(parents=True)
    made = imported(tmp_path, theirs).recipe
    assert made[made.index("sources:\n") :] == ours
    table = page.partition("## What becomes of each setting")[2]
    for setting in (*_Theirs.model_fields, *_Expert.model_fields, *_OF_MERGES):
        where = page if setting in _OF_MERGES else table
        assert re.search(rf"`{setting}\b", where), setting


def test_what_must_be_filled_in_is_named_by_the_recipe_and_by_who_loads_it(tmp_path: Path) -> None:
    made = imported(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(made.recipe)
    assert made.fill_in == ["sources.base.data", "sources.Coder-7B.data"]
    with pytest.raises(RecipeError, match=r"sources\.base\.data, sources\.Coder-7B\.data: exp"):
        load_recipe(path)
    sets = ["sources.base.data=a.txt", f"sources.Coder-7B.data=[b.txt, {FILL_IN}]"]
    with pytest.raises(RecipeError, match=r"yaml: sources\.Coder-7B\.data: expected text of the"):
        load_recipe(path, sets)
    assert load_recipe(path, [sets[0], "sources.Coder-7B.data=b.txt"]).sources
    for prompt in ("Hello, who are you?", "def main():", "Once upon a time"):
        assert f"'{prompt}'" in made.recipe


def test_an_import_builds_what_mergekit_moe_builds(recipes: Recipes, tmp_path: Path) -> None:
    """The base's shared tensors and each model's FFN, to the bit."""
    models = recipes("llama").parent / "models"
    content = {
        "base_model": str(models / "b"),
        "gate_mode": "random",
        "dtype": "float32",
        "experts": [{"source_model": str(models / name)} for name in "ab"],
    }
    text = imported(tmp_path, json.dumps(content)).recipe
    for name in "ab":
        file = recipes("llama").parent / f"{name}.jsonl"
        text = text.replace(f"data: {FILL_IN}", f"data: {file}", 1)
    (tmp_path / "recipe.yaml").write_text(text)
    run = pipeline.build(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")
    built = load_file(run.checkpoint / "model.safetensors")
    sources = {name: load_file(models / name / "model.safetensors") for name in "ab"}
    shared = [name for name in sources["b"] if ".mlp." not in name]
    assert len(shared) == 2 * 6 + 3
    assert all(torch.equal(built[name], sources["b"][name]) for name in shared)
    for number, source in enumerate(sources.values()):
        for theirs, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            expert = f"model.layers.1.block_sparse_moe.experts.{number}.{ours}.weight"
            assert torch.equal(built[expert], source[f"model.layers.1.mlp.{theirs}.weight"])


OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "prompts": ({}, "positive_prompts, negative_prompts: no counterpart"),
    "cheap_embed": ({"gate_mode": "cheap_embed"}, "gate_mode cheap_embed: router.init hidden"),
    "random": ({"gate_mode": "random"}, "gate_mode random: router.init random"),
    "uniform": ({"gate_mode": "uniform_random"}, "gate_mode uniform_random: router.init random"),
    "no dtype": ({"dtype": None}, "dtype: not given; there it is the base's, here bfloat16"),
    "float64": ({"dtype": "float64"}, "dtype float64: no counterpart; float32 is written"),
    "architecture": ({"architecture": "qwen"}, "architecture qwen: no counterpart"),
    "deepseek": ({"architecture": "DeepSeek"}, "architecture DeepSeek: no counterpart"),
    "tokenizer_source": ({"tokenizer_source": "union"}, "tokenizer_source: mergekit-moe does not"),
    "tokenizer": ({"tokenizer": {"source": "base"}}, "tokenizer: mergekit-moe does not read it"),
    "chat_template": ({"chat_template": "auto"}, "chat_template: mergekit-moe does not read it"),
    "out_dtype": ({"out_dtype": "float32"}, "out_dtype: mergekit-moe does not read it"),
    "parameters": ({"parameters": {"t": 0.5}}, "parameters: mergekit-moe does not read it"),
    "shared": (
        {"shared_experts": [{"source_model": "a/shared", "residual_scale": 0.1}]},
        "shared_experts[0] a/shared: no counterpart; no source can be the expert",
    ),
    "base": ({"base_model": "a/donor"}, "base_model a/donor is no expert there"),
    "noise": (
        {"experts": [{"source_model": "a/a", "noise_scale": 0.25}, {"source_model": "b/b"}]},
        "noise_scale (experts[0] 0.25): no counterpart",
    ),
    "residual": (
        {"experts": [{"source_model": "a/a"}, {"source_model": "b/b", "residual_scale": 2}]},
        "residual_scale (experts[1] 2): no counterpart; its output is not scaled",
    ),
    "override": (
        {
            "experts": [
                {"source_model": {"model": "a/a", "override_architecture": "LlamaForCausalLM"}},
                {"source_model": "b/b"},
            ]
        },
        "override_architecture: no counterpart",
    ),
}
"""Settings that are not the same here -> the beginning of what is said of them."""


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_has_no_counterpart_is_named(case: str, tmp_path: Path) -> None:
    """By the command and in the recipe, which loads. What is not there is not spoken of."""
    changes, begins = OTHERWISE[case]
    made = imported(tmp_path, **changes)
    assert sum(note.startswith(begins) for note in made.notes) == 1
    words = " ".join(made.recipe.replace("#", " ").split())
    assert all(" ".join(note.split()) in words for note in made.notes)
    assert loaded(made, tmp_path).sources
    if case != "prompts":
        assert not any(note.startswith(begins) for note in imported(tmp_path).notes)


def test_settings_that_are_the_same_are_not_spoken_of(tmp_path: Path) -> None:
    made = imported(tmp_path, gate_mode="hidden_last", dtype="torch.bfloat16")
    assert len(made.notes) == 1 and loaded(made, tmp_path).output.dtype == "bfloat16"
    made = imported(tmp_path, architecture="mixtral")
    assert len(made.notes) == 1 and loaded(made, tmp_path).output.architecture == "mixtral"
    made = imported(tmp_path, architecture="Qwen3")
    assert loaded(made, tmp_path).output.architecture == "qwen3_moe"


def _in_expert(**settings: Any) -> dict[str, Any]:
    return {"experts": [BASE["experts"][0], BASE["experts"][1] | settings]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gatemode": "random"}, "unknown setting gatemode; did you mean gate_mode?"),
        ({"experts_per_tok": 2}, "unknown setting experts_per_tok; did you mean experts_per_token"),
        (
            _in_expert(positve_prompts=["x"]),
            "experts[1].positve_prompts; did you mean experts[1].p",
        ),
        (
            {"shared_experts": [{"source_model": "a/b", "residual": 1}]},
            "unknown setting shared_experts[0].residual; did you mean shared_experts[0].residual_s",
        ),
        ({"zzz": 1}, "unknown setting zzz; known: base_model, experts, gate_mode"),
        ({"gate_mode": "hiden"}, "random or uniform_random (got 'hiden'); did you mean hidden?"),
        ({"dtype": "int8"}, "dtype: expected one of bfloat16, float16, float32, got 'int8'"),
        (
            {"architecture": "mixtrall"},
            "architecture: 'mixtrall' is none of mergekit-moe's (mixtral",
        ),
        ({"experts_per_token": 3}, "router.top_k: 3 experts per token, but there are only 2"),
        ({"experts_per_token": 0}, "experts_per_token: "),
        ({"experts": []}, "experts: "),
        ({"experts": {"a": 1}}, "experts: "),
        ({"experts": ["someone/base"]}, "experts.0: "),
        ({"base_model": None}, "base_model is missing"),
        ({"base_model": True}, "base_model: expected a folder or hub id"),
        ({"base_model": ["a/b"]}, "base_model: expected a folder or hub id"),
        ({"base_model": {"model": {"pth": "a/b"}}}, "base_model: expected a folder or hub id"),
        (_in_expert(source_model=""), "experts[1].source_model: expected a folder or hub id"),
        (_in_expert(positive_prompts="one"), "experts.1.positive_prompts: "),
        (_in_expert(noise_scale="much"), "experts.1.noise_scale: "),
        ({"merge_method": "ties"}, "no mergekit-moe recipe: it has `merge_method: ties`"),
        ({"slices": []}, "no mergekit-moe recipe: it has `slices`"),
        ({"models": []}, "no mergekit-moe recipe: it has `models`"),
        ({"sources": {}}, "is a recipe of symphony already"),
    ],
    ids=str,
)
def test_what_mergekit_moe_would_not_do_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert said in refusal(tmp_path, **changes)


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    assert "expected settings such as `experts:`, got a list" in refusal(tmp_path, "[1]")
    assert "not readable as YAML" in refusal(tmp_path, "a: [")
    assert "experts is missing" in refusal(tmp_path, "base_model: a/b")
    assert "expected two sources or more" in refusal(
        tmp_path, base_model="a/b", experts=[{"source_model": "a/b"}]
    )
    with pytest.raises(RecipeError, match="no such recipe file"):
        import_mergekit(tmp_path / "none.yml", tmp_path)


@pytest.mark.parametrize(
    ("reference", "settings"),
    [
        ("a/b", ("a/b", None, None, None)),
        ("a/b@main", ("a/b", "main", None, None)),
        ("a/b+c/lora", ("a/b", None, "c/lora", None)),
        ("a/b@v1+c/lora@v2", ("a/b", "v1", "c/lora", "v2")),
        ({"model": "a/b@v1", "lora": "c/lora"}, ("a/b", "v1", "c/lora", None)),
        (
            {"model": {"path": "a/b", "revision": "x"}, "lora": {"path": "c/lora"}},
            ("a/b", "x", "c/lora", None),
        ),
    ],
    ids=str,
)
def test_models_are_named_as_mergekit_names_them(
    reference: Any, settings: tuple[str | None, ...], tmp_path: Path
) -> None:
    experts = [{"source_model": reference}, {"source_model": "z/z"}]
    spec = loaded(imported(tmp_path, experts=experts), tmp_path).sources
    found = spec[list(spec)[1]]  # after the base
    assert (found.model, found.revision, found.adapter, found.adapter_revision) == settings


def test_a_base_that_is_no_expert_becomes_the_first(tmp_path: Path) -> None:
    recipe = loaded(imported(tmp_path, base_model="a/donor", experts_per_token=3), tmp_path)
    assert list(recipe.sources) == ["donor", "base", "Coder-7B"] and recipe.anchor == "donor"


def test_copies_of_the_base_are_upcycled(tmp_path: Path) -> None:
    experts = [{"source_model": "someone/base", "noise_scale": 0.1}] * 3
    made = imported(tmp_path, experts=experts, gate_mode="random")
    recipe = loaded(made, tmp_path)
    assert recipe.copies_anchor and recipe.backbone.attention == "anchor"
    assert list(recipe.sources) == ["someone-base", "someone-base-2", "someone-base-3"]
    assert any("drop-upcycling draws a share" in note for note in made.notes)


def test_folders_are_named_from_where_the_recipe_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit names them from the current folder."""
    for folder in ("models/base", "recipes", "models/coder"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    experts = [{"source_model": "models/base"}, {"source_model": "./models/coder"}]
    Path("moe.yml").write_text(json.dumps({"base_model": "models/base", "experts": experts}))
    for out in (".", "recipes"):
        made = import_mergekit(Path("moe.yml"), Path(out))
        recipe = loaded(made, Path(out).resolve())
        assert [spec.model for spec in recipe.sources.values()] == [
            str(tmp_path / "models" / name) for name in ("base", "coder")
        ]


@pytest.mark.parametrize(
    "odd",
    ["\nanchor: x", "\u2028anchor: x", "\x1b[2J", "'\"#{}[]", "x" * 5000, " ", "\r\nmethod: x"],
)
def test_what_is_repeated_stays_in_its_comment(odd: str, tmp_path: Path) -> None:
    """Prompts, and names of models."""
    experts = [
        {"source_model": "someone/base", "positive_prompts": [odd] * 9},
        {"source_model": "b/b", "negative_prompts": [odd]},
    ]
    shared = [{"source_model": f"a/b{odd}c"}]
    made = imported(tmp_path, experts=experts, shared_experts=shared)
    recipe = loaded(made, tmp_path)
    assert recipe.anchor == "base" and recipe.method == "btx" and len(recipe.sources) == 2
    assert "\u2028" not in made.recipe
    assert "\x1b" not in made.recipe and " and 5 more" in made.recipe and len(made.recipe) < 8000
