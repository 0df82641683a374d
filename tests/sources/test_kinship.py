"""Branches of one base and strangers are told apart by a few of their weights, and a recipe that
averages strangers is warned of."""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from checks import edit_weights
from symphony_moe import pipeline
from symphony_moe.bundled import FAMILIES
from symphony_moe.bundled.corpus import DOMAINS
from symphony_moe.errors import SourceError
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.presets import PRESETS
from symphony_moe.recipe.settings import Parent, SourceSpec
from symphony_moe.sources import kinship as module
from symphony_moe.sources.kinship import beyond_averaging, kinship, likeness, likeness_to_anchor
from symphony_moe.sources.opening import open_source, open_sources
from symphony_moe.sources.source import Source

Recipes = Callable[[str], Path]

ROOT = Path(__file__).parents[2]
AVERAGE = {"symphony", "btx", "bam", "drop-upcycling", "dume"}
"""The methods whose backbone is no single source's."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bundled_families_are_what_they_are_called(family: str) -> None:
    """Every pair of them, with room to the thresholds."""
    sources = [
        open_source(domain, SourceSpec(model=f"bundled:{family}/{domain}", data=[]))
        for domain in DOMAINS
    ]
    for source, other in combinations(sources, 2):
        cosine = likeness(source, other)
        assert cosine is not None and kinship(cosine) == family
        assert abs(cosine) < 0.01 if family == "strangers" else cosine > 0.94


def test_a_model_is_a_branch_of_itself_and_what_is_between_is_neither() -> None:
    source = open_source("python", SourceSpec(model="bundled:branches/python", data=[]))
    assert likeness(source, source) == pytest.approx(1, abs=1e-9)
    assert [kinship(cosine) for cosine in (-1.0, 0.0999, 0.1, 0.7999, 0.8, 1.0)] == [
        *("strangers", "strangers", "distant", "distant", "branches", "branches")
    ]


def test_weights_that_are_not_here_or_of_another_shape_are_not_compared(recipes: Recipes) -> None:
    recipe = load_recipe(recipes("llama"))
    a, b, c = open_sources(recipe)
    remote = {name: replace(header, offset=None) for name, header in b.headers.items()}
    wide = {name: replace(header, shape=(1, 7)) for name, header in c.headers.items()}
    assert likeness(a, replace(b, headers=remote)) is None
    assert likeness(replace(b, headers=remote), a) is None
    assert likeness(a, replace(c, headers=wide)) is None
    assert likeness_to_anchor([a, replace(b, headers=remote), c], "a").keys() == {"c"}


def test_rows_of_zeros_say_nothing(project: Path) -> None:
    """A layer that was pruned, or has not begun to learn."""
    for name in "ab":
        edit_weights(
            project / "models" / name,
            lambda tensors: [t.zero_() for n, t in tensors.items() if "layers.1" in n],
        )
    shutil.copytree(project / "models" / "a", project / "models" / "b", dirs_exist_ok=True)
    sources = open_sources(load_recipe(project / "recipe.yaml"))
    assert likeness(sources[0], sources[1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_a_plan_reads_a_few_rows_of_matrices(
    variant: str, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three layers at most, and no more rows than hold so many numbers."""
    monkeypatch.setattr(module, "_NUMBERS", 128)
    read: list[int] = []
    stored = Source._stored

    def count(self: Source, name: str, *rest: object) -> object:
        tensor = stored(self, name, *rest)  # type: ignore[arg-type]
        assert name.endswith("proj.weight") and tensor.ndim == 2
        read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Source, "_stored", count)
    planned = pipeline.plan(load_recipe(recipes(variant)))
    assert planned.likeness.keys() == {"b", "c"}
    assert 0 < len(read) <= 2 * 2 * 3 * 7 and max(read) <= 128


@pytest.mark.parametrize("method", PRESETS)
def test_who_averages_strangers_is_told(method: str, recipes: Recipes) -> None:
    planned = pipeline.plan(load_recipe(recipes("llama"), [f"method={method}"]))
    told = [one for one in planned.warnings if "not fine-tuned from a's base" in one]
    assert bool(told) is (method in AVERAGE)
    if told:
        assert told == planned.warnings[:1] and "Set method: harmonized" in told[0]
        assert re.match(r"b \(-?0\.0", told[0]) and "strangers" in told[0] and len(told[0]) < 480


def test_who_averages_branches_is_not(recipes: Recipes) -> None:
    for name, apart in (("branches", False), ("strangers", True)):
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", ["method=symphony"])
        assert (beyond_averaging(recipe, pipeline.plan(recipe).likeness) is not None) is apart


def test_what_is_set_beside_the_method_counts(recipes: Recipes) -> None:
    """And sources that are no experts do not; many are not all listed."""
    apart = {"b": 0.5, "c": 0.01}

    def said(*settings: str) -> str | None:
        return beyond_averaging(load_recipe(recipes("llama"), settings), apart)

    assert said("align.residual=orthogonal") is None
    unaligned = said("method=harmonized", "align.residual=none", "align.heads=none")
    assert unaligned and "Set align.residual: orthogonal, align.heads: all" in unaligned
    kept = said("backbone.attention=anchor", "backbone.embeddings=anchor")
    assert kept and "a's backbone, whose residual stream is not theirs" in kept
    assert "lose most" not in kept
    distant = said("experts.sources=[a, b]")
    assert distant and "b (0.50)" in distant and "c (" not in distant
    assert "the further apart" in distant and "strangers" not in distant


def test_of_a_change_of_experts_the_newcomer_alone_counts(recipes: Recipes) -> None:
    """The kept backbone has been averaged already, and no method averages it again."""
    old, apart = load_recipe(recipes("llama"), ["method=btx"]), {"b": 0.01, "c": 0.02}
    added, removed = (
        beyond_averaging(old.model_copy(update={"parent": parent}), apart)
        for parent in (
            Parent(model="checkpoint", sha256="0", tied_head=False, added="c"),
            Parent(model="checkpoint", sha256="0", tied_head=False, removed="d"),
        )
    )
    assert added and added.startswith("c (0.02):") and "build anew" in added
    assert removed is None


def test_a_build_warns_once_and_keeps_the_numbers(
    recipes: Recipes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe(recipes("llama"), ["method=btx"])
    with caplog.at_level(logging.WARNING, "symphony_moe"):
        run = pipeline.build(recipe, tmp_path / "run")
    assert [m for m in caplog.messages if "not fine-tuned from" in m] == [
        run.read_json(run.plan)["warnings"][0]
    ]
    assert run.read_json(run.plan)["likeness"] == pipeline.plan(recipe).likeness


def test_rows_that_are_no_numbers_are_refused_by_the_plan(project: Path) -> None:
    edit_weights(
        project / "models" / "b",
        lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][0].fill_(float("nan")),
    )
    with pytest.raises(SourceError, match=r"^b: model\.layers\.0\.mlp\.up_proj\.weight in .* NaN"):
        pipeline.plan(load_recipe(project / "recipe.yaml"))


@pytest.fixture
def project(recipes: Recipes, tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(recipes("llama").parent, tmp_path / "project")
    return tmp_path / "project"
