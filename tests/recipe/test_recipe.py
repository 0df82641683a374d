"""A recipe is checked whole before anything else happens: every mistake is a RecipeError that names
the setting, never another exception, and what passes means the same when it is read again."""

import copy
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from symphony_moe.errors import RecipeError
from symphony_moe.recipe.load import load_recipe, resolve_recipe
from symphony_moe.recipe.presets import PRESETS
from symphony_moe.recipe.settings import Fit, HubData, Recipe, SourceSpec, parse_size
from symphony_moe.recipe.variants import load_variants

BASE: dict[str, Any] = {
    "sources": {
        "a": {"model": "models/a", "data": "a.jsonl"},
        "b": {"model": "some/hub-id", "data": ["b.jsonl", "c.txt"]},
        "c": {"model": "bundled:strangers/english", "data": {"hub": "some/dataset"}},
    },
    "evaluation": {"extra": {"other": {"hub": "other/dataset", "column": "content"}}},
}


def resolve(folder: Path, **changes: Any) -> Recipe:
    """BASE with some top-level settings replaced."""
    return resolve_recipe(copy.deepcopy(BASE) | changes, folder, "recipe.yaml")


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(folder, **changes)
    return str(caught.value)


# Unknown keys


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    yield "", Recipe
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield f"{name}.", field.annotation
    yield "sources.a.", SourceSpec
    yield "sources.c.data.", HubData
    yield "evaluation.extra.other.", HubData


@pytest.mark.parametrize(
    ("section", "field"), [(path, name) for path, kind in _sections() for name in kind.model_fields]
)
def test_a_misspelled_key_is_refused_with_the_nearest_known_one(
    section: str, field: str, tmp_path: Path
) -> None:
    content = copy.deepcopy(BASE)
    target = content
    for part in section.split(".")[:-1]:
        target = target.setdefault(part, {})
    target[field[:-1]] = 1
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(content, tmp_path, "recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml: unknown setting ")
    assert f"unknown setting {section}{field[:-1]};" in str(caught.value)
    assert f"did you mean {section}{field}?" in str(caught.value)


def test_transposed_letters_are_recognised(tmp_path: Path) -> None:
    assert "did you mean align.neurons?" in refusal(tmp_path, align={"neurns": "none"})
    sources = BASE["sources"] | {"a": {"modle": "x", "data": "a.txt"}}
    message = refusal(tmp_path, sources=sources)
    assert "unknown setting sources.a.modle; did you mean sources.a.model?" in message


def test_a_key_like_no_other_is_refused_with_all_that_are_known(tmp_path: Path) -> None:
    message = refusal(tmp_path, zzzzqqqq=1)
    assert "unknown setting zzzzqqqq; known: sources, anchor, method" in message


# Values


def test_an_unknown_method_is_refused_with_those_there_are(tmp_path: Path) -> None:
    message = refusal(tmp_path, method="simphony")
    assert "'simphony'" in message
    assert all(method in message for method in PRESETS)


@pytest.mark.parametrize("top_k", [0, -1, 4, "two", 1.5, None, [2], True])
def test_top_k_is_a_number_of_experts_that_there_are(top_k: Any, tmp_path: Path) -> None:
    if top_k is None:  # null says nothing
        assert resolve(tmp_path, router={"top_k": top_k}).router.top_k == 2
    else:
        assert "router.top_k" in refusal(tmp_path, router={"top_k": top_k})


def test_top_k_may_be_every_expert(tmp_path: Path) -> None:
    assert resolve(tmp_path, router={"top_k": 3}).router.top_k == 3
    message = refusal(tmp_path, router={"top_k": 4})
    assert "there are only 3 sources" in message and "choose 1 to 3" in message


@pytest.mark.parametrize("names", [[], ["a"]])
def test_one_source_is_not_enough(names: list[str], tmp_path: Path) -> None:
    sources = {name: BASE["sources"][name] for name in names}
    assert "sources" in refusal(tmp_path, sources=sources)


def test_sixty_four_sources_are_the_most(tmp_path: Path) -> None:
    many = {f"s{number}": BASE["sources"]["a"] for number in range(65)}
    assert "64" in refusal(tmp_path, sources=many)
    del many["s64"]
    assert len(resolve(tmp_path, sources=many).sources) == 64


@pytest.mark.parametrize("sources", [None, [], ["a", "b"], "a", 3, {"a": None, "b": None}])
def test_sources_of_another_shape_are_refused(sources: Any, tmp_path: Path) -> None:
    assert "sources" in refusal(tmp_path, sources=sources)


@pytest.mark.parametrize("name", ["a b", "a/b", "", "-a", ".a", "ä", "a\n"])
def test_names_that_cannot_be_file_names_are_refused(name: str, tmp_path: Path) -> None:
    sources = BASE["sources"] | {name: BASE["sources"]["a"]}
    assert repr(name) in refusal(tmp_path, sources=sources)


@pytest.mark.parametrize("name", ["built", "trained"])
def test_names_of_results_are_no_names_of_sources(name: str, tmp_path: Path) -> None:
    sources = BASE["sources"] | {name: BASE["sources"]["a"]}
    assert "what the result is called" in refusal(tmp_path, sources=sources)


NAMES = ["1", "01", "1.0", "1e6", "no", "Yes", "off", "true", "null", "0x10", "2020-01-01", "n"]


def test_a_name_stays_the_name_that_is_written(tmp_path: Path) -> None:
    """Whatever else it might be in YAML: as a key, and where a setting names the source."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "sources:\n"
        + "".join(f"  {name}: {{model: m/a, data: [{name}.txt]}}\n" for name in NAMES)
        + "calibration: {domains: [1, 01, 1e6, no, off]}\n"
        + "experts: {sources: [01, 1, 1e6, 1.0, no, off, 0x10]}\n"
        + "output: {chat: 01}\n"
        + f"backbone: {{weights: {{{', '.join(f'{name}: 1' for name in NAMES)}}}}}\n"
    )
    recipe = load_recipe(
        path,
        [
            "anchor=1e6",
            "sources.01.revision=1e-3",
            "sources.no.column=007",
        ],
    )
    assert list(recipe.sources) == NAMES == list(recipe.backbone.weights or {})
    assert recipe.anchor == "1e6" and recipe.output.chat == "01"
    assert recipe.calibration.domains == ["1", "01", "1e6", "no", "off"]
    assert recipe.expert_names == ["1", "01", "1.0", "1e6", "no", "off", "0x10"]
    assert recipe.sources["01"].revision == "1e-3" and recipe.sources["no"].column == "007"


@pytest.mark.parametrize("anchor", ["no", "1", "01"])
def test_an_anchor_is_named_as_its_source_is(anchor: str, tmp_path: Path) -> None:
    source = "{model: m, data: d}"
    text = f"anchor: {anchor}\nsources:\n  b: {source}\n  {anchor}: {source}\n"
    assert load_recipe(write(tmp_path, text)).anchor == anchor


def test_text_is_wanted_in_quotes_where_yaml_has_no_text(tmp_path: Path) -> None:
    message = refusal(tmp_path, anchor=True)
    assert "anchor: expected text; write it in quotes (got True)" in message


NUMBERS_READ: list[tuple[str, Any]] = [
    ("1e6", 10**6),
    ("1E+6", 10**6),
    ("1.0e6", 10**6),
    ("1_000_000", 10**6),
    ("0100", 100),
    ("0x10", 16),
    ("0o17", 15),
    ("'100'", 100),
    ("+5", 5),
    ("5.0", 5),
    ("yes", None),
    ("true", None),
    ("1:30", None),
    ("1:30:00", None),
    ("2020-01-01", None),
    ("1.5", None),
    ("1e-4", None),
    ("0b11", None),
    ("1_", None),
    (".inf", None),
    ("!!int ''", None),
    ("!!int 0100", 100),
    ("!!float 5", 5),
    ("!!bool x", None),
    ("!!binary eA==", None),
    ("9" * 5000, None),
    ("many", None),
    ("[5]", None),
    ("{a: 5}", None),
    ("&a [*a]", None),
    ("[" * 5000, None),
    ("!!timestamp 2020-01-01", None),
    ("!own 5", None),
    ("5\n---\n6", None),
    ("!!python/object/apply:os.system ['exit']", None),
    ("x" * 5000, None),
]


@pytest.mark.parametrize(("spelled", "number"), NUMBERS_READ, ids=lambda value: str(value)[:20])
def test_a_number_is_the_same_in_a_file_and_in_an_override(
    spelled: str, number: int | None, tmp_path: Path
) -> None:
    """And what is none is refused in one short message."""
    base = yaml.safe_dump(BASE)
    in_file = write(tmp_path, f"{base}train:\n  tokens: {spelled}\n")
    plain = tmp_path / "plain.yaml"
    plain.write_text(base)
    for path, overrides in ((in_file, []), (plain, [f"train.tokens={spelled}"])):
        if number is not None:
            tokens = load_recipe(path, overrides).train.tokens
            assert tokens == number and type(tokens) is int
            continue
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        message = str(caught.value).removeprefix(str(path))
        assert len(message) < 400 and "\n" not in message.removeprefix(
            f"--set train.tokens={spelled}"
        )


@pytest.mark.parametrize(
    ("spelled", "checkpointing"),
    [
        ("yes", True),
        ("on", True),
        ("'on'", True),
        ("true", True),
        ("no", False),
        ("FALSE", False),
        ("off", False),
    ],
)
def test_switches_are_switched_by_any_of_their_words(
    spelled: str, checkpointing: bool, tmp_path: Path
) -> None:
    text = yaml.safe_dump(BASE) + f"train: {{gradient_checkpointing: {spelled}}}\n"
    assert load_recipe(write(tmp_path, text)).train.gradient_checkpointing is checkpointing


def test_sources_that_are_alike_are_merged_from_one_another(tmp_path: Path) -> None:
    """What a source says itself wins, on whichever side of the merge key it stands."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "sources:\n  a: &a {model: m/a, data: a.txt, column: words}\n"
        "  b: {<<: *a, model: m/b}\n  c: {model: m/c, <<: [*a, {revision: x, column: y}]}\n"
    )
    recipe = load_recipe(path)
    assert [spec.model for spec in recipe.sources.values()] == ["m/a", "m/b", "m/c"]
    assert {spec.column for spec in recipe.sources.values()} == {"words"}
    assert [spec.revision for spec in recipe.sources.values()] == [None, None, "x"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_line_ends_change_nothing(
    encoding: str, end: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(yaml.safe_dump(BASE).replace("\n", end).encode(encoding))
    assert load_recipe(path) == resolve(tmp_path)
    path.write_bytes(yaml.safe_dump(BASE).encode("utf-16"))
    with pytest.raises(RecipeError, match="save it as UTF-8"):
        load_recipe(path)


def test_messages_are_short_however_much_is_wrong(tmp_path: Path) -> None:
    long = "x" * 4000
    many = {f"s{number}{long}": {"model": 3.5, "data": 3} for number in range(60)}
    for changes in (
        {"sources": many},
        {"anchor": long},
        {"method": long},
        {long: 1},
        {"train": {long: 1}},
        {"train": {"tokens": long, "scope": long, "learning_rate": long, "batch_size": 0}},
        {"sources": {"a": {"model": long, "data": long}, "b": {"model": "m/b", "data": [3, long]}}},
        {"evaluation": {"extra": {long: "x", "y": long}}},
    ):
        assert len(refusal(tmp_path, **changes)) < 500


def test_the_anchor_is_the_first_source_unless_named(tmp_path: Path) -> None:
    assert resolve(tmp_path).anchor == "a"
    assert resolve(tmp_path, anchor=None).anchor == "a"
    assert resolve(tmp_path, anchor="b").anchor == "b"
    message = refusal(tmp_path, anchor="d")
    assert "anchor" in message and "'d'" in message and "there is: a, b, c" in message


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"a": 1, "b": 1}, "'c'"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, "'d'"),
        ({"a": 1, "b": 1, "c": -1}, "backbone.weights.c"),
        ({"a": 0, "b": 0, "c": 0}, "add up to nothing"),
        ({"a": 1, "b": 1, "c": float("inf")}, "backbone.weights.c"),
        ({"a": 1, "b": 1, "c": float("nan")}, "backbone.weights.c"),
        ({"a": 1, "b": 1, "c": "half"}, "backbone.weights.c"),
        ([1, 1, 1], "backbone.weights"),
        (0.5, "backbone.weights"),
    ],
)
def test_bad_weights_are_refused(weights: Any, named: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, backbone={"weights": weights})
    assert "backbone.weights" in message and named in message


def test_shares_sum_to_one_in_the_order_of_the_sources(tmp_path: Path) -> None:
    assert resolve(tmp_path).shares == pytest.approx([1 / 3] * 3)
    recipe = resolve(tmp_path, backbone={"weights": {"c": 3, "b": 0, "a": 1}})
    assert recipe.shares == [0.25, 0.0, 0.75]


def test_extra_domains_and_sources_have_different_names(tmp_path: Path) -> None:
    message = refusal(tmp_path, evaluation={"extra": {"a": "x.txt"}})
    assert "evaluation.extra" in message and "'a'" in message


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("calibration", {"tokens": 0}),
        ("calibration", {"sequence_length": 1}),
        ("train", {"learning_rate": 0}),
        ("train", {"learning_rate": float("inf")}),
        ("train", {"learning_rate": 1.5}),
        ("train", {"teacher_temperature": 1e-9}),
        ("train", {"warmup": 1}),
        ("train", {"scope": "head"}),
        ("evaluation", {"holdout": 0}),
        ("evaluation", {"holdout": 1}),
        ("output", {"dtype": "int8"}),
        ("output", {"max_shard_size": "5 apples"}),
        ("backbone", {"attention": "mean"}),
        ("align", {"neurons": "weights"}),
        ("align", {"residual": "permutation"}),
        ("align", {"heads": "some"}),
        ("experts", {"init": "drop-in"}),
        ("fit", {"method": "ridge"}),
        ("fit", {"ridge": 0}),
        ("fit", {"ridge": float("inf")}),
        ("fit", {"epochs": -0.5}),
        ("fit", {"epochs": float("nan")}),
        ("fit", {"learning_rate": 0}),
        ("router", {"init": "learned"}),
        ("router", {"temperature": 0}),
        ("router", {"temperature": -1}),
        # The generators that these seed take no more than 32 bits; found only after the build.
        ("calibration", {"seed": -1}),
        ("calibration", {"seed": 2**32}),
    ],
)
def test_values_out_of_range_are_refused_by_name(
    section: str, values: dict[str, Any], tmp_path: Path
) -> None:
    assert f"{section}.{next(iter(values))}" in refusal(tmp_path, **{section: values})


def _numbers(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a recipe holds a number."""
    for name, field in model.model_fields.items():
        kinds = set(_kinds(field.annotation))
        if kinds & {int, float}:
            yield (*path, name)
        for kind in kinds:
            if issubclass(kind, BaseModel) and model is Recipe and name != "sources":
                yield from _numbers(kind, (name,))


def _kinds(annotation: Any) -> Iterator[type]:
    arguments = [one for one in typing.get_args(annotation) if not isinstance(one, str)]
    if isinstance(annotation, type) and not arguments:
        yield annotation
    for argument in arguments:
        yield from _kinds(argument)


def _within(kind: Any, value: Any) -> Any:
    """A value of a setting that may be a list or a table of numbers."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = typing.get_args(kind)[0]
    origin = typing.get_origin(kind)
    return {list: [value], dict: {"a": value, "b": 1, "c": 1}}.get(origin, value)


NUMBERS = list(_numbers(Recipe))


def test_the_numbers_of_a_recipe_are_found() -> None:
    assert {
        ("seed",),
        ("train", "learning_rate"),
        ("backbone", "weights"),
        ("compare", "seeds"),
    } <= {*NUMBERS}
    assert len(NUMBERS) > 30


@pytest.mark.parametrize("place", NUMBERS, ids=".".join)
@pytest.mark.parametrize(
    "value",
    [
        1e40,
        10**40,
        10**400,
        -1,
        -1e-9,
        -1e40,
        *map(float, ("nan", "inf", "-inf")),
        True,
        "yes",
        "1:30",
    ],
)
def test_no_number_is_absurd(place: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    """Every number has an upper bound, none is negative, and neither text nor a boolean is one."""
    *section, name = place
    model = Recipe if not section else Recipe.model_fields[section[0]].annotation
    assert model is not None
    given = {name: _within(model.model_fields[name].annotation, value)}
    message = refusal(tmp_path, **({section[0]: given} if section else given))
    assert message.startswith(f"recipe.yaml: {'.'.join(place)}") and len(message) < 500


@pytest.mark.parametrize("seed", [-1, 2**32, 2**80, "x"])
def test_seeds_out_of_range_are_refused(seed: Any, tmp_path: Path) -> None:
    assert "seed" in refusal(tmp_path, seed=seed)


@pytest.mark.parametrize("section", [name for name in Recipe.model_fields if name != "sources"])
@pytest.mark.parametrize("value", ["text", 3, 2.5, [], [1], ["a"], {"": 1}, [["tokens", 1]]])
def test_a_section_of_another_kind_is_refused(section: str, value: Any, tmp_path: Path) -> None:
    if section == "seed" and value == 3:
        return
    assert section in refusal(tmp_path, **{section: value})


# Presets


@pytest.mark.parametrize("method", PRESETS)
def test_a_preset_sets_its_sections(method: str, tmp_path: Path) -> None:
    recipe = resolve(tmp_path, method=method)
    for section, preset in PRESETS[method].items():
        for setting, value in preset.items():
            assert getattr(getattr(recipe, section), setting) == value


def test_the_papers_method_is_the_default(tmp_path: Path) -> None:
    recipe = resolve(tmp_path)
    assert recipe == resolve(tmp_path, method="symphony")
    assert (recipe.backbone.attention, recipe.backbone.embeddings) == ("slerp", "selective-linear")
    assert (recipe.align.neurons, recipe.experts.init) == ("activations", "source")


def test_the_methods_there_are() -> None:
    assert list(PRESETS) == [
        "symphony",
        "harmonized",
        "btx",
        "bam",
        "drop-upcycling",
        "sparse-upcycling",
        "dume",
    ]


def test_harmonized_aligns_fits_and_calibrates(tmp_path: Path) -> None:
    """The table of docs/design.md, spelled out."""
    recipe = resolve(tmp_path, method="harmonized")
    backbone, align = recipe.backbone, recipe.align
    assert (backbone.attention, backbone.embeddings, backbone.norms) == (
        "linear",
        "selective-linear",
        "linear",
    )
    assert (align.residual, align.heads, align.neurons) == ("orthogonal", "all", "auto")
    assert (recipe.experts.init, recipe.fit.method) == ("source", "least-squares")
    assert (recipe.router.init, recipe.router.top_k) == ("regression", 2)
    assert recipe.aligns and recipe.folds and recipe.fits
    assert not recipe.aligns_neurons, "no expert here meets another's neurons"


def test_dume_is_the_plain_mean_with_its_own_router(tmp_path: Path) -> None:
    recipe, mean = resolve(tmp_path, method="dume"), resolve(tmp_path, method="btx")
    router = recipe.router
    assert (router.init, router.top_k, router.temperature) == ("ridge", 1, 0.1)
    assert recipe.routes_by_source and not recipe.fits_layers and not recipe.aligns
    assert recipe.model_copy(update={"method": "btx", "router": mean.router}) == mean
    fitted = resolve(tmp_path, method="harmonized", router={"init": "ridge"})
    assert not fitted.routes_by_source


@pytest.mark.parametrize(
    ("changes", "aligns", "folds", "fits"),
    [
        ({}, True, False, False),
        ({"align": {"neurons": "none"}}, False, False, False),
        ({"align": {"neurons": "auto"}}, False, False, False),
        ({"align": {"neurons": "none", "residual": "orthogonal"}}, True, True, False),
        ({"align": {"neurons": "none", "heads": "all"}}, True, False, False),
        ({"align": {"neurons": "none"}, "fit": {"method": "least-squares"}}, False, True, True),
        ({"align": {"neurons": "none"}, "router": {"init": "regression"}}, False, False, True),
        ({"align": {"neurons": "none"}, "router": {"init": "hidden"}}, False, False, True),
        ({"align": {"neurons": "none"}, "router": {"init": "ridge"}}, False, False, True),
        ({"experts": {"init": "copy"}}, False, False, False),
    ],
)
def test_each_setting_asks_for_its_own_stage(
    changes: dict[str, Any], aligns: bool, folds: bool, fits: bool, tmp_path: Path
) -> None:
    """Nothing is compared, folded or run that no setting asks for."""
    recipe = resolve(tmp_path, **changes)
    assert (recipe.aligns, recipe.folds, recipe.fits) == (aligns, folds, fits)


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("align", "residual", "orthogonal"),
        ("align", "heads", "all"),
        ("fit", "method", "least-squares"),
    ],
)
def test_copies_of_one_expert_are_fitted_to_nobody(
    section: str, setting: str, value: str, tmp_path: Path
) -> None:
    message = refusal(tmp_path, experts={"init": "copy"}, **{section: {setting: value}})
    assert f"{section}.{setting}" in message and "experts.init copy" in message
    assert "set it to none" in message
    assert f"{section}.{setting}" in refusal(
        tmp_path,
        method="harmonized",
        experts={"init": "copy"},
        **{
            s: {k: "none" for s2, k in OF_SOURCES if s2 == s and (s, k) != (section, setting)}
            for s in ("align", "fit")
        },
    )
    quiet = {"align": {"residual": "none", "heads": "none"}, "fit": {"method": "none"}}
    assert resolve(tmp_path, method="harmonized", experts={"init": "copy"}, **quiet).fits


OF_SOURCES = (("align", "residual"), ("align", "heads"), ("fit", "method"))


@pytest.mark.parametrize("method", PRESETS)
def test_a_recipes_own_values_win_over_the_preset(method: str, tmp_path: Path) -> None:
    own = {"attention": "anchor"}
    recipe = resolve(tmp_path, method=method, backbone=own, align={"neurons": "none"})
    assert recipe.backbone.attention == "anchor"
    assert recipe.align.neurons == "none"
    # The rest of the section is still the preset's.
    assert recipe.backbone.norms == PRESETS[method]["backbone"]["norms"]


# Paths


def test_paths_are_relative_to_the_recipe_not_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "models" / "a").mkdir(parents=True)
    (elsewhere / "models" / "a").mkdir(parents=True)
    path = home / "recipe.yaml"
    sources = {
        "a": {"model": "models/a", "data": "a.jsonl"},
        "b": {"model": "./nowhere", "data": ["x/b.jsonl", "../c.txt"]},
        "c": {"model": "some/hub-id", "data": {"hub": "some/dataset"}},
        "d": {"model": "bundled:strangers/english", "data": "bundled:english"},
    }
    path.write_text(json.dumps({"sources": sources, "evaluation": {"extra": {"o": "o.txt"}}}))
    monkeypatch.chdir(elsewhere)
    for name in (path, Path("../home/recipe.yaml")):
        recipe = load_recipe(name)
        assert recipe.sources["a"].model == str(home / "models" / "a")
        assert recipe.sources["a"].data == str(home / "a.jsonl")
        assert recipe.sources["b"].model == str(home / "nowhere")
        assert recipe.sources["b"].data == [str(home / "x" / "b.jsonl"), str(tmp_path / "c.txt")]
        assert recipe.sources["c"].model == "some/hub-id"
        assert recipe.sources["d"].model == "bundled:strangers/english"
        assert recipe.sources["d"].data == "bundled:english"
        assert recipe.evaluation.extra["o"] == str(home / "o.txt")


def test_data_are_streamed_where_the_recipe_says_so(tmp_path: Path) -> None:
    """Not otherwise; and it is written down in the resolved recipe."""
    content = copy.deepcopy(BASE)
    content["sources"]["c"]["data"]["streaming"] = True
    recipe = resolve_recipe(content, tmp_path, "recipe.yaml")
    again = resolve_recipe(yaml.safe_load(recipe.to_yaml()), tmp_path, "recipe.yaml")
    for found in (recipe, again):
        data, other = found.sources["c"].data, found.evaluation.extra["other"]
        assert isinstance(data, HubData) and data.streaming
        assert isinstance(other, HubData) and not other.streaming
    content["sources"]["c"]["data"]["streaming"] = "sometimes"
    with pytest.raises(RecipeError, match=r"sources\.c\.data\.HubData\.streaming: .*'sometimes'"):
        resolve_recipe(content, tmp_path, "recipe.yaml")


@pytest.mark.parametrize("bad", ["a\0b", "~nobody-of-that-name/x", "x" * 5000])
def test_paths_that_no_file_can_have_are_refused_or_left_for_the_lookup(
    bad: str, tmp_path: Path
) -> None:
    for spec in ({"model": bad, "data": "a.txt"}, {"model": "m/a", "data": bad}):
        try:
            resolve(tmp_path, sources=BASE["sources"] | {"a": spec})
        except RecipeError as error:
            assert "sources.a" in str(error)


# --set


def write(folder: Path, content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return path


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    overrides = [
        "train.learning_rate=1e-3",
        "train.tokens=1_000",
        "backbone.attention=linear",
        "backbone.weights={a: 1, b: 2, c: 1}",
        "sources.a.data=[x.txt, y.txt]",
        "sources.b.revision=v1.0",
        "output.head_bias=false",
        "fit.method=least-squares",
        "fit.ridge=1e-3",
        "fit.epochs=0.5",
        "router.temperature=2",
        "seed=7",
        "anchor=b",
        "evaluation.extra.more=m.txt",
    ]
    recipe = load_recipe(write(tmp_path, BASE), overrides)
    assert recipe.train.learning_rate == 1e-3
    assert recipe.train.tokens == 1000
    assert recipe.backbone.attention == "linear"
    assert recipe.shares == [0.25, 0.5, 0.25]
    assert recipe.sources["a"].data == [str(tmp_path / "x.txt"), str(tmp_path / "y.txt")]
    assert recipe.sources["b"].revision == "v1.0"
    assert recipe.output.head_bias is False
    assert (recipe.fit.method, recipe.fit.ridge) == ("least-squares", 1e-3)
    assert (recipe.fit.epochs, recipe.router.temperature) == (0.5, 2)
    assert (recipe.seed, recipe.anchor) == (7, "b")
    assert list(recipe.evaluation.extra) == ["other", "more"]


@pytest.mark.parametrize("spelled", ["1e-3", "1E-3", "1.e-3", "1.0e-3", "+1e-3", "0.001", " 1e-3"])
def test_numbers_are_numbers_however_they_are_spelled(spelled: str, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, BASE), [f"train.learning_rate={spelled}"])
    assert recipe.train.learning_rate == 1e-3
    text = yaml.safe_dump(BASE) + f"train: {{learning_rate: {spelled}}}\n"
    assert load_recipe(write(tmp_path, text)).train.learning_rate == 1e-3


def test_the_last_override_wins(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, BASE), ["seed=1", "seed=2"])
    assert recipe.seed == 2


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("nonsense", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        (" =3", "--set"),
        ("", "expected KEY=VALUE"),
        (".=3", "--set"),
        ("train..tokens=3", "train."),
        ("train.=3", "train."),
        ("trian.tokens=3", "did you mean train?"),
        ("train.token=3", "did you mean train.tokens?"),
        ("sources.a.modle=x", "did you mean sources.a.model?"),
        ("seed.value=3", "seed"),
        ("sources.a.model.x=3", "model is a value, not a section"),
        ("train.tokens=", "train.tokens"),
        ("train.tokens=many", "train.tokens"),
        ("train.tokens=[", "not YAML"),
        ("train.tokens=2020-13-45", "train.tokens"),
        ("train=3", "train"),
        ("sources=[]", "sources"),
    ],
)
def test_bad_overrides_are_refused(override: str, named: str, tmp_path: Path) -> None:
    path = write(tmp_path, BASE | {"seed": 1})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    assert named in str(caught.value)


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 500 * 10**6),
        ("20KB", 20_000),
        ("1.5 gb", 1_500_000_000),
        (" 2 Mb ", 2_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "5", "GB", "0GB", "-1GB", "5GiB", "5 TB", "1e3MB", "5GB5", "9" * 400 + "GB", "٣GB"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(text)


# Files


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"# nothing but a comment\n",
        b"- a\n- b\n",
        b"just text",
        b"42",
        b"sources: [unclosed",
        b"sources:\n\t- tab",
        b"a: b: c",
        b"\xff\xfe\x00\x01",
        b"\x00\x01\x02",
        b"seed: 2020-13-45",
        b"seed: !!int x",
        b"seed: !!python/object/apply:os.system [echo]",
        b"? [a, b]\n: c",
        b"a: &a [*a]\n",
        b"sources: {a: {model: m/a, data: &d [*d]}, b: {model: m/b, data: b.txt}}\n",
        b"[" * 3000,
        b"? {a: 1}\n: 2",
        b"null: 3",
        b"a: 1\n---\nb: 2\n",
        b"*unknown",
        b"sources: {a: {model: !!binary eA==, data: x}, b: {model: x, data: x}}",
    ],
)
def test_files_that_are_no_recipe_are_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    # YAML keeps the last one silently; one of the two is a mistake.
    text = yaml.safe_dump(BASE) + "train: {tokens: 5, tokens: 6}\n"
    with pytest.raises(RecipeError, match="tokens"):
        load_recipe(write(tmp_path, text))


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a folder, not a recipe file"):
        load_recipe(tmp_path)


def test_a_setting_without_a_value_is_left_at_its_default(tmp_path: Path) -> None:
    """Also inside a section, where that is the method's."""
    text = yaml.safe_dump(BASE) + "anchor:\nalign: {neurons: }\ntrain: {tokens: , warmup: 0.5}\n"
    recipe = load_recipe(write(tmp_path, text))
    default = load_recipe(write(tmp_path, yaml.safe_dump(BASE)))
    assert recipe.align == default.align and recipe.anchor == default.anchor
    assert recipe.train == default.train.model_copy(update={"warmup": 0.5})


# The whole


EXAMPLE = """
sources:                       # 2..64, one expert each, in this order
  general: {model: path/or-hub-id, revision: null, data: data/general.jsonl}
  math:    {model: other/hub-id, data: [a.jsonl, b.txt]}
  code:    {model: third/hub-id, data: {hub: some/dataset, split: train, column: content}}
anchor: general                # default: the first
method: symphony               # a preset for the sections below; any value set there wins
calibration: {tokens: 262144, sequence_length: 2048, seed: 114514}
backbone: {attention: slerp, embeddings: selective-linear, norms: linear, weights: null}
align: {neurons: activations, residual: none, heads: none}
experts: {init: source}
fit: {method: none}
router: {init: random, top_k: 2}
output: {architecture: auto, dtype: bfloat16, max_shard_size: 5GB}
train: {scope: all, tokens: 10_000_000, learning_rate: 5.0e-5, balance_weight: 0.01,
        sequence_length: 2048, batch_size: 2}
evaluation: {tokens: 65536, holdout: 0.05, sequence_length: 2048,
             extra: {medicine: data/medqa.jsonl}}
seed: 114514
"""


def test_the_documented_example_spells_out_the_defaults(tmp_path: Path) -> None:
    content = yaml.safe_load(EXAMPLE)
    spelled = load_recipe(write(tmp_path, EXAMPLE))
    short = {key: content[key] for key in ("sources",)} | {
        "evaluation": {"extra": content["evaluation"]["extra"]}
    }
    assert spelled == load_recipe(write(tmp_path, short))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone": {"weights": {"a": 0.1, "b": 1e-7, "c": 3}}},
        {"train": {"learning_rate": 1e-5, "warmup": 0}, "output": {"head_bias": False}},
        {
            "sources": {
                "x": {"model": "/models/ä ö", "data": "/data/日本.txt"},
                "yes": {"model": "m/a", "data": "no", "sha256": {"f": "0" * 64}},
            }
        },
        {
            "sources": {
                name: {"model": f"m/{name}", "data": name, "revision": name}
                for name in ("no", "1e6", "0100", "0o17", "1.0", "true", "08")
            }
        },
        {"seed": 0, "anchor": "c", "align": {"neurons": "none"}, "experts": {"init": "copy"}},
    ],
)
def test_a_resolved_recipe_reads_as_itself(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = resolve(tmp_path, **changes)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = elsewhere / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe and list(again.sources) == list(recipe.sources)
    assert again.to_yaml() == recipe.to_yaml()
    # Others read it with a reader of YAML 1.1.
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_content(without=("compare",))


# Junk

_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.sampled_from(["a", "symphony", "bundled:x", "x.txt", "~", "~x", "/", "1e-3", "."])
)
_keys = st.sampled_from(
    [*Recipe.model_fields, *SourceSpec.model_fields, *HubData.model_fields, "a", "extra", "weights"]
) | st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5))
junk = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=12,
)
_FULL = yaml.safe_load(EXAMPLE)


def _places(content: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _places(value, (*here, key))


def gives_a_recipe_or_an_error(content: Any) -> bool:
    try:
        recipe = resolve_recipe(content, Path("/nowhere"), "junk")
    except RecipeError as error:
        return str(error).startswith("junk: ")
    return resolve_recipe(yaml.safe_load(recipe.to_yaml()), Path("/else"), "x") == recipe


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(_keys, junk, max_size=6))
def test_junk_is_refused_as_a_mistake(content: Any) -> None:
    assert gives_a_recipe_or_an_error(content)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.sampled_from(list(_places(_FULL))[1:]), value=junk)
def test_junk_in_one_place_is_refused_as_a_mistake(place: tuple[Any, ...], value: Any) -> None:
    content = copy.deepcopy(_FULL)
    *parents, last = place
    target = content
    for key in parents:
        target = target[key]
    target[last] = value
    assert gives_a_recipe_or_an_error(content)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=st.text(max_size=60), override=st.text(max_size=20))
def test_text_junk_is_refused_as_a_mistake(text: str, override: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    path.write_text(EXAMPLE)
    try:
        load_recipe(path, [override])
    except RecipeError as error:
        assert str(error).startswith((f"{path}: ", f"--set {override}: "))


def test_the_defaults_of_the_fit_are_those_that_were_measured() -> None:
    """docs/lab-log.md; another one changes every published number."""
    fit = Fit()
    measured = (fit.ridge, fit.epochs, fit.learning_rate, fit.pull, fit.temperature_scaling)
    assert measured == (1e-2, 8.0, 0.06, 0.1, 0.05)
    assert (fit.embeddings, fit.layers_with_head) == (True, 1)


# Settings of an earlier version

OLD = """
sources: {a: {model: x/a, data: a.txt}, b: {model: x/b, data: b.txt}}
method: harmonized
refit: {epochs: 3, soften: 0.125}
train: {soften: 0.25}
compare: {variants: {short: {method: harmonized, refit: {epochs: 1}}}, methods: [short]}
"""


def test_settings_are_taken_by_their_old_names_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe(write(tmp_path, OLD), ["refit.ridge=0.5"])
    assert (recipe.fit.epochs, recipe.fit.ridge) == (3, 0.5)
    assert (recipe.fit.temperature_scaling, recipe.train.temperature_scaling) == (0.125, 0.25)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "refit is called fit now; it is read as that",
        "fit.soften is called fit.temperature_scaling now; it is read as that",
        "train.soften is called train.temperature_scaling now; it is read as that",
        "refit is called fit now; it is read as that",  # of --set
    ]


def test_variants_are_taken_by_old_names_too(tmp_path: Path) -> None:
    _, found = load_variants(write(tmp_path, OLD))
    (recipe,) = found["short"].values()
    assert recipe.fit.epochs == 1


@pytest.mark.parametrize(
    ("both", "said"),
    [
        ("refit: {epochs: 1}\nfit: {epochs: 2}", "fit is there twice, once by its old name refit"),
        ("train: {soften: 0, temperature_scaling: 0}", "once by its old name train.soften"),
    ],
)
def test_an_old_name_beside_the_new_one_is_refused(both: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(write(tmp_path, yaml.safe_dump(BASE) + both))


@pytest.mark.parametrize(
    ("override", "noted"),
    [
        ("refit.epochs=1", "refit is called fit now"),
        ("refit={epochs: 1}", "refit is called fit now"),
        ("refit={epochs: 1, soften: 0.1}", "fit.soften is called fit.temperature_scaling now"),
        ("compare.variants.short.refit.epochs=1", "refit is called fit now"),
    ],
)
def test_old_names_in_overrides_are_noted_too(
    override: str, noted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, OLD.replace("refit", "fit").replace("soften", "temperature_scaling"))
    recipe, found = load_variants(path, [override])
    assert noted in caplog.text
    (short,) = found["short"].values()
    assert 1 in (recipe.fit.epochs, short.fit.epochs)
