"""What was built from what: sources, adapters, revisions, licences, text; and the steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_moe.recipe.settings import Data, HubData, Recipe, SourceSpec
from symphony_moe.reporting.alignment import KINDS
from symphony_moe.reporting.numbers import count, in_words, size
from symphony_moe.reporting.strips import expert_colour
from symphony_moe.runs.metrics import PLAIN_MEAN, Metrics

NOT_STATED = "none stated"
"""Of a licence that no file names."""


@dataclass(frozen=True)
class SourceRow:
    """One source of a model."""

    number: int | None
    """Of its expert; None where it gives text alone."""
    name: str
    anchor: bool
    model: str
    revision: str
    adapter: str
    licence: str
    text: str
    architecture: str
    parameters: str
    dtype: str
    weights: list[tuple[str, str]]
    """(file, SHA-256)"""

    @property
    def colour(self) -> str:
        """Classes of its expert's colour."""
        return "" if self.number is None else expert_colour(self.number)


@dataclass(frozen=True)
class LineageStep:
    """One step from the sources to the model."""

    title: str
    words: list[str]


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from."""

    rows: list[SourceRow]
    former: list[tuple[str, str, str]]
    """(name, ids on the hub, licences) of models whose experts were taken out"""
    steps: list[LineageStep]


def lineage(plan: Mapping[str, Any], recipe: Recipe, metrics: Metrics | None = None) -> Lineage:
    """Where the model of a plan comes from. `metrics`: of a run; None for a plan alone."""
    described = {source["name"]: source for source in plan["sources"]}
    rows = [
        _row(number, source, recipe.sources.get(source["name"]))
        for number, source in enumerate(plan["sources"])
    ]
    rows += [
        _row(None, {"name": name, "model": spec.model}, spec)
        for name, spec in recipe.sources.items()
        if name not in described
    ]
    former = [] if recipe.parent is None else recipe.parent.former
    return Lineage(
        rows,
        [(one.name, ", ".join(one.hub_ids), licence_words(one.licences)) for one in former],
        _steps(plan, recipe, metrics),
    )


def _row(number: int | None, source: Mapping[str, Any], spec: SourceSpec | None) -> SourceRow:
    gguf, parameters = source.get("gguf_file"), source.get("parameters")
    return SourceRow(
        number=number,
        name=source["name"],
        anchor=bool(source.get("anchor")),
        model=f"{source['model']}, {gguf}" if gguf else source["model"],
        revision=(spec.revision or "") if spec else "",
        adapter=_adapter(source, spec),
        # A plan of an older version says nothing of licences.
        licence=licence_words(source["licences"]) if "licences" in source else "",
        text=text_words(spec.data) if spec else "",
        architecture=source.get("architecture", ""),
        parameters="" if parameters is None else in_words(parameters),
        dtype=source.get("dtype", ""),
        weights=[*((spec.sha256 or {}) if spec else {}).items()],
    )


def _adapter(source: Mapping[str, Any], spec: SourceSpec | None) -> str:
    if not source.get("adapter"):
        return ""
    words = f"with the LoRA {source['adapter']}"
    if spec is not None and spec.adapter_revision:
        words += f" ({spec.adapter_revision})"
    return words + (f", trained on {source['adapter_base']}" if source.get("adapter_base") else "")


def licence_words(licences: Sequence[Mapping[str, Any] | None]) -> str:
    """The licence of a model and, where it has one, of its adapter."""
    words = []
    for licence in licences:
        if licence is None:
            words.append(NOT_STATED)
        else:
            name = licence.get("name")
            words.append(f"{licence['identifier']} ({name})" if name else licence["identifier"])
    return "; adapter: ".join(words)


def text_words(data: Data) -> str:
    """The text of a source: names of files, or of a dataset."""
    if isinstance(data, HubData):
        named = data.hub if data.is_on_hub else Path(data.hub).name
        return ", ".join(filter(None, (named, data.name, data.split)))
    return ", ".join(Path(one).name for one in ([data] if isinstance(data, str) else data))


def _steps(plan: Mapping[str, Any], recipe: Recipe, metrics: Metrics | None) -> list[LineageStep]:
    steps = [
        LineageStep("Sources", [f"{len(plan['sources'])} {plan.get('family', 'dense')} models"]),
        LineageStep(f"Build, method {recipe.method}", build_words(recipe)),
        LineageStep(
            "The new model",
            [
                plan["architecture"],
                f"{in_words(plan['total_parameters'])} parameters, "
                f"{in_words(plan['active_parameters'])} active per token",
                f"{size(plan['disk_bytes'])} in {plan['dtype']}",
            ],
        ),
    ]
    if metrics is None:
        return steps
    if metrics.fit is not None and metrics.fit.chosen == PLAIN_MEAN:
        steps[1].words.append("the fit did not pay: the plain mean was written")
    else:
        steps[1].words.extend(_maps_left_out(metrics))
    return [*steps, _training_step(metrics)]


def _maps_left_out(metrics: Metrics) -> list[str]:
    """Maps that were found, did not pay, and are not used."""
    words = []
    for kind, (what, _) in KINDS.items():
        by_source = metrics.alignment.get(kind) or {}
        if refused := [name for name, agreement in by_source.items() if not agreement.used]:
            words.append(f"not used: {what} of {', '.join(refused)}")
    return words


def _training_step(metrics: Metrics) -> LineageStep:
    training = metrics.training
    if training is None:
        return LineageStep("Not trained", [])
    scope = {"all": "all weights", "router": "the routers", "experts": "routers and experts"}
    words = [scope.get(training.scope or "", training.scope or "")]
    if training.tokens is not None:
        words.append(f"{count(training.tokens)} tokens")
    if training.settings.get("teacher", "none") != "none":
        words.append("the sources as teachers")
    return LineageStep("Trained", [word for word in words if word])


def build_words(recipe: Recipe) -> list[str]:
    """What a build does, step by step."""
    if recipe.parent is not None:
        return _change_words(recipe)
    maps = {
        "residual stream": recipe.aligns_residual,
        "attention heads": recipe.aligns_heads,
        "FFN neurons": recipe.aligns_neurons,
    }
    aligned = [what for what, asked in maps.items() if asked]
    merged = {
        "linear": "the mean of the sources'",
        "slerp": "interpolated on the sphere between the sources'",
        "anchor": f"{recipe.anchor}'s",
        "concatenated": "the heads of all sources",
    }
    experts = {
        "source": "each source's FFN",
        "drop": "each source's FFN, some neurons drawn anew",
        "copy": f"copies of {recipe.anchor}'s FFN",
    }
    words = [
        f"aligned to {recipe.anchor}: {', '.join(aligned)}" if aligned else "nothing aligned",
        f"attention: {merged.get(recipe.backbone.attention, recipe.backbone.attention)}",
        f"experts: {experts.get(recipe.experts.init, recipe.experts.init)}",
    ]
    if recipe.fits_layers:
        words.append("fitted to the sources, layer by layer")
    router = {"random": "random", "hidden": "from mean router inputs"}
    return [*words, f"router: {router.get(recipe.router.init, f'by {recipe.router.init}')}"]


def _change_words(recipe: Recipe) -> list[str]:
    assert recipe.parent is not None
    words = ["backbone and other experts: kept from an earlier run"]
    if recipe.parent.added is not None:
        words.append(f"expert made anew: {recipe.parent.added}")
    if recipe.parent.removed is not None:
        words.append(f"expert left out: {recipe.parent.removed}")
    return words
