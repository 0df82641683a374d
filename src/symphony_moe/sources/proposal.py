"""Models and text -> a first recipe for them, with the reasons for it as comments."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_moe.errors import RecipeError, SourceMismatch, shortened
from symphony_moe.recipe.draft import (
    FILL_IN_TEXT,
    comment,
    is_local,
    path_from,
    scalar,
    source_lines,
    source_names,
)
from symphony_moe.recipe.load import resolve_recipe
from symphony_moe.recipe.mistakes import nearest
from symphony_moe.recipe.settings import BUNDLED, FILL_IN, Recipe
from symphony_moe.recipe.yaml_text import read_yaml
from symphony_moe.sources.kinship import (
    BRANCHES_FROM,
    kinship,
    likeness_to_anchor,
    two_digits,
)
from symphony_moe.sources.matching import Difference, find_differences, refuse_mismatch
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.shapes import of_one_shape, padded_shapes
from symphony_moe.sources.source import Source
from symphony_moe.text.documents import check_data_exists
from symphony_moe.text.shape import shape_of_rows

_WHO = "symphony init"


@dataclass(frozen=True)
class Proposal:
    """A recipe for some models, and what it was chosen by."""

    recipe: str
    """Its text, with comments."""
    method: str
    likeness: dict[str, float]
    """Source -> mean cosine of its weights and the anchor's, where both are here."""
    notes: list[str]
    """How the sources and their text differ from what one would expect, in words."""
    fill_in: list[str]
    """The settings that its user must fill in before it loads."""


def propose_recipe(
    models: Sequence[str], data: Mapping[str, Sequence[str]], folder: Path
) -> Proposal:
    """A recipe for models (folders, GGUF files, hub ids, bundled sources), the first of which is
    the anchor. `data`: source -> files of its text; names of sources are those of their folders.
    Paths are from the current folder; `folder` is where the recipe will lie. Reads headers,
    tokenizers, a few rows of the weights that are here, and the first row of each file.

    Raises RecipeError for fewer than two models and for text of no source, SourceError for a model
    that cannot be read, SourceMismatch for models that cannot become one, and TextError for files
    that are not there.
    """
    if len(models) < 2:
        raise RecipeError(f"{_WHO}: expected two models or more, got {len(models)}")
    names = source_names([model.removesuffix(".gguf") for model in models])
    _refuse_text_of_nobody(data, names)
    specs: dict[str, dict[str, Any]] = {
        name: _model_settings(model) | {"data": list(data.get(name, ()))}
        for name, model in zip(names, models, strict=True)
    }
    recipe = resolve_recipe({"sources": specs}, Path.cwd(), _WHO)
    for name, spec in recipe.sources.items():
        if spec.data:
            check_data_exists(name, spec.data)
    opened = open_sources(recipe, download=False)
    recipe, sources, differences = _padded_where_it_helps(recipe, opened)
    refuse_mismatch(differences)
    cosines = likeness_to_anchor(sources, recipe.anchor)
    notes = [str(one) for one in differences if one.verdict == "warning"]
    shapes = {}
    for source in sources:
        spec = recipe.sources[source.name]
        shapes[source.name], problems = _shape_of_text(source, spec.data)
        notes += [*source.remarks, *problems]
    method, why = _method(recipe, cosines)
    if recipe.widens:
        method, why = "harmonized", list(_padding(sources))
    fill_in = [f"sources.{name}.data" for name, spec in specs.items() if not spec["data"]]
    if fill_in:
        why.append(FILL_IN_TEXT)
    lines = [*_head(why, notes), "sources:"]
    for source in opened:
        settings = _placed(specs[source.name], folder) | shapes[source.name]
        lines += source_lines(source.name, settings, [_in_short(source)])
    lines += _settings(recipe, method, sources)
    text = "\n".join(lines) + "\n"
    _refuse_what_would_not_load(text, folder)
    return Proposal(text, method, cosines, notes, fill_in)


def _padded_where_it_helps(
    recipe: Recipe, sources: list[Source]
) -> tuple[Recipe, list[Source], list[Difference]]:
    """Recipe, sources and how they differ; padded to one shape where they cannot become one model
    as they are, and can so."""
    differences = find_differences(sources, recipe.anchor)
    if any(one.verdict == "error" for one in differences):
        backbone = recipe.backbone.model_copy(update={"shapes": "widest"})
        padding = recipe.model_copy(update={"backbone": backbone})
        try:
            padded = of_one_shape(padding, sources)
        except SourceMismatch:
            return recipe, sources, differences
        remaining = find_differences(padded, recipe.anchor)
        if not any(one.verdict == "error" for one in remaining):
            return padding, padded, remaining
    return recipe, sources, differences


def _padding(sources: Sequence[Source]) -> Iterator[str]:
    """What is padded."""
    found = padded_shapes({source.name: source for source in sources})
    told = "; ".join(f"{name}: {changes}" for name, changes in found.items())
    yield (
        f"The sources have different shapes. backbone.shapes: widest pads the smaller ones, which "
        f"computes the same: {told}. docs/how-to/shapes.md says what it is worth; leaving a source "
        "out may be better."
    )
    yield (
        "Weights of different shapes are not compared. harmonized aligns and fits them, whether "
        "they are strangers or branches. It needs two documents of every source at least."
    )


def _refuse_text_of_nobody(data: Mapping[str, Sequence[str]], names: Sequence[str]) -> None:
    for name in data:
        if name not in names:
            hint = nearest(name, names) or f"; sources are {', '.join(names)}"
            raise RecipeError(f"--data {shortened(name, 60)}=...: is no source's name{hint}")


def _model_settings(model: str) -> dict[str, Any]:
    path = Path(model)
    if path.suffix == ".gguf" and is_local(model):
        return {"model": str(path.parent), "gguf_file": path.name}
    return {"model": model}


def _placed(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of a source with its paths as the recipe spells them: files first as they were
    given, and FILL_IN where there are none."""
    files = [
        path if path.startswith(BUNDLED) else path_from(path, folder) for path in settings["data"]
    ]
    model = settings["model"]
    return dict(settings) | {
        "model": path_from(model, folder) if is_local(model) else model,
        "data": FILL_IN if not files else files[0] if len(files) == 1 else files,
    }


def _in_short(source: Source) -> str:
    dtypes = ", ".join(sorted({header.dtype for header in source.headers.values()}))
    config = source.config
    return (
        f"{config.model_type}, {source.num_parameters:,} parameters in {dtypes}, "
        f"{config.num_hidden_layers} layers, context {config.max_position_embeddings}"
    )


# The method


def _method(recipe: Recipe, cosines: Mapping[str, float]) -> tuple[str, list[str]]:
    """(the method for sources that are so alike, why)."""
    others = [name for name in recipe.sources if name != recipe.anchor]
    told = ", ".join(f"{name} {two_digits(cosine)}" for name, cosine in cosines.items())
    measured = (
        f"Mean cosine of weights with {recipe.anchor}'s, of the first rows of matrices in three "
        f"layers: {told}. Branches of one base have {BRANCHES_FROM} or more, strangers about 0."
    )
    kinds = {kinship(cosine) for cosine in cosines.values()}
    unknown = [name for name in others if name not in cosines]
    if unknown:
        return "harmonized", [
            *([measured] if told else []),
            f"The weights of {', '.join(unknown)} or of {recipe.anchor} are not here, so it is not "
            "known whether they are branches of one base. harmonized is for strangers and for "
            "branches; `symphony plan` tells them apart once the weights are here.",
        ]
    if kinds == {"branches"}:
        return "harmonized", [
            measured,
            "So all are branches of one base, and their weights can be averaged. harmonized fits "
            "the result to the sources as well. It lost the least wherever it was measured "
            "(docs/how-to/which-method.md), and takes the longest. symphony is the paper's method, "
            "and btx the plain mean: both are much faster. dume fits the router alone.",
        ]
    apart = "strangers" if "strangers" in kinds else "far from one another"
    return "harmonized", [
        measured,
        f"So some are {apart}, and the mean of their weights keeps little of what they know. "
        "harmonized aligns and fits them. It needs two documents of every source at least.",
    ]


# Text


def _shape_of_text(source: Source, data: Any) -> tuple[dict[str, str], list[str]]:
    """(the settings that say how the rows of a source's files are read, what keeps them from being
    read)."""
    listed = [data] if isinstance(data, str) else data
    found = [
        shape_of_rows(source.name, Path(path), source.own_tokenizer)
        for path in listed
        if not path.startswith(BUNDLED)
    ]
    problems = [problem for _, problem in found if problem is not None]
    shapes = [shape for shape, problem in found if problem is None]
    if any(shape != shapes[0] for shape in shapes):
        problems.append(
            f"{source.name}: its files have rows of different shapes, and `column` and "
            "`chat_format` are those of all; make them alike"
        )
    return shapes[0] if shapes else {}, problems


# The text of the recipe


def _head(why: Sequence[str], notes: Sequence[str]) -> Iterator[str]:
    yield "# Written by `symphony init`; what is not set here has a default (docs/reference)."
    for paragraph in why:
        yield "#"
        yield from comment(paragraph)
    if notes:
        yield "#"
        yield "# To know, or to mend:"
    for note in notes:
        yield from comment(f"- {note}")


def _settings(recipe: Recipe, method: str, sources: Sequence[Source]) -> Iterator[str]:
    """The settings below the sources."""
    yield from comment("The anchor's tokenizer and context length are the result's.")
    yield f"anchor: {scalar(recipe.anchor)}"
    yield f"method: {method}"
    yield from comment(f"How many experts a token goes through, of {len(sources)}.")
    if recipe.router.top_k == len(sources):
        yield from comment(
            f"{recipe.router.top_k} is all of them: the router weighs them, and leaves none out. 1 "
            "is less work for each token."
        )
    yield f"router: {scalar({'top_k': recipe.router.top_k})}"
    if recipe.widens:
        yield from comment("The experts of one model have one shape.")
        yield f"backbone: {scalar({'shapes': recipe.backbone.shapes})}"
    context = min(source.config.max_position_embeddings for source in sources)
    length = min(context, recipe.calibration.sequence_length)
    yield from comment(
        "Text to calibrate and to train on, in tokens: for models of real size. To try it on a "
        "CPU, set less."
    )
    if length < recipe.calibration.sequence_length:
        yield from comment("sequence_length: the shortest context of the sources.")
    tokens = recipe.calibration.tokens
    yield f"calibration: {scalar({'tokens': tokens, 'sequence_length': length})}"
    training: dict[str, Any] = {"tokens": recipe.train.tokens, "sequence_length": length}
    if method == "harmonized":
        yield from comment(
            "average: the result is a mean of the model before training and after it, with the "
            "share that loses least on validation text."
        )
        training["average"] = True
    yield f"train: {scalar(training)}"
    yield from comment("Text of no source's domain: extra: {name: file} under evaluation.")
    yield f"evaluation: {scalar({'sequence_length': length})}"


def _refuse_what_would_not_load(text: str, folder: Path) -> None:
    """RecipeError where the recipe would be refused with its data there."""
    content = read_yaml(text)
    for settings in content["sources"].values():
        settings["data"] = []
    resolve_recipe(content, folder, _WHO)
