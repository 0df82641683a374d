"""`metrics.json`: what every stage measured, as types.

Each stage writes its own part, so any part may be absent. A file of version 0.1 is read as well:
its keys have today's names here, and what it does not say is absent. Keys that nobody here knows
are kept. A number that is NaN or infinite is null in the file, and NaN here.

Losses are nats per token.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from symphony_moe.runs.folder import RunFolder, damaged

STAGES = ("built", "trained")
"""The two models of a run: before the training and after it."""

HARMONIZED, PLAIN_MEAN = "harmonized", "plain mean"
"""What `FitMetrics.chosen` says of the model that is written: the fitted one, or the sources' mean,
where the fit does not pay."""

TEMPERATURE_SCALING = "temperature_scaling"
"""The last step of the head's fit. It is the one that may raise the error."""


def _or_nan(value: Any) -> Any:
    return math.nan if value is None else value


def _or_empty(value: Any) -> Any:
    """Nothing in the place of null, and without the parts that say nothing."""
    if not isinstance(value, Mapping):
        return value or {}
    return {key: part for key, part in value.items() if part or isinstance(part, int | float)}


Real = Annotated[float, BeforeValidator(_or_nan)]
"""A number; NaN where the file has null."""

Losses = Annotated[dict[str, Real], BeforeValidator(lambda value: value or {})]
"""Domain -> loss."""


class Part(BaseModel):
    """A part of `metrics.json`. What it is not told, it does not write."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file, but for NaN and infinite numbers, which are null there."""
        return self.model_dump(exclude_unset=True)


class Agreement(Part):
    """How alike a source is to the anchor, by layer."""

    before: list[Real] = []
    after: list[Real] = []
    used: bool = True
    """Whether the maps that were found are used."""
    layers: list[int] | None = None
    """Their numbers, where not all were compared: neurons that nothing mixes are not."""


class FitStep(Part):
    """One step of the fit of a layer or of the head."""

    error: tuple[Real, Real] | None = None
    """Before the step and after it."""
    kept: bool | None = None
    condition: dict[str, Real] = {}
    """What was solved for -> condition number of the regression."""
    ridge: dict[str, Real] | None = None
    """What was solved for -> the ridge in the end. None where an older build did not note it."""
    steps: int | None = None
    """Of the refinement."""
    temperature: Real | None = None
    """What the head's logits are divided by."""


class LayerRouting(Part):
    """Where a layer's router sends text of all sources alike."""

    share: Losses = {}
    """Expert -> share of all places."""
    first_choice_is_source: Real = math.nan
    """Share of the tokens whose first choice is their own text's source."""


class LayerFitMetrics(Part):
    """The fit of one layer."""

    attention: FitStep | None = None
    experts: FitStep | None = None
    refinement: FitStep | None = None
    routing: LayerRouting | None = None

    @model_validator(mode="before")
    @classmethod
    def _conditions_by_name(cls, content: Any) -> Any:
        return _conditions_by_name(content)

    @property
    def steps(self) -> dict[str, FitStep]:
        """Name of a step that was taken -> what it measured."""
        found = {
            "attention": self.attention,
            "experts": self.experts,
            "refinement": self.refinement,
        }
        return {name: step for name, step in found.items() if step is not None}


def _conditions_by_name(steps: Any) -> Any:
    """Builds of version 0.1 could note one condition for a whole step."""
    if not isinstance(steps, Mapping):
        return steps
    return {
        name: {**step, "condition": {name: step["condition"]}}
        if isinstance(step, Mapping) and isinstance(step.get("condition"), int | float)
        else step
        for name, step in steps.items()
    }


def _head(steps: Any) -> Any:
    """Steps by today's names."""
    named = _conditions_by_name(steps) or {}
    if not isinstance(named, Mapping):
        return named
    return {TEMPERATURE_SCALING if name == "softened" else name: s for name, s in named.items()}


class FitMetrics(Part):
    """How the new model was fitted to its sources."""

    layers: Annotated[list[LayerFitMetrics], BeforeValidator(lambda value: value or [])] = []
    head: Annotated[dict[str, FitStep], BeforeValidator(_head)] = {}
    """Name of a step -> what it measured, in the order of the steps."""
    loss: Losses = {}
    """Model (the fitted one, the plain mean) -> loss on the validation text."""
    loss_by_source: Annotated[dict[str, Losses], BeforeValidator(_or_empty)] = {}
    """The same of each source's validation text. An older build has none."""
    chosen: str | None = None
    """The model that was written, of those in `loss`."""


class TemperatureScaling(Part):
    """What the logits were divided by after the training, and what it cost."""

    temperature: Real = 1.0
    loss: tuple[Real, Real] = (math.nan, math.nan)
    """On the text that was trained on last: before and after."""


class CurvePoint(Part):
    """What the trainer logged at one step."""

    tokens: float
    loss: Real = math.nan
    balance: Real | None = None
    """Of the experts' load: 1 where it is even."""

    @property
    def shares(self) -> dict[str, float]:
        """Expert -> share of the routers' choices. An older run has none."""
        return {
            name.removeprefix("share/"): math.nan if value is None else float(value)
            for name, value in (self.model_extra or {}).items()
            if name.startswith("share/")
        }


class HeldOutPoint(Part):
    """Held-out losses on the way."""

    tokens: int
    losses: Losses


class ValidationLoss(Part):
    """Losses on validation text after a step of a training; step 0 is before the first."""

    step: int
    loss: Real = math.nan
    """The mean over the sources."""
    losses: Losses = {}


class Validation(Part):
    """How `train.keep_best` chose the weights."""

    tokens: int
    """Of the validation text."""
    planned_steps: int
    """More than the training's `steps` where it stopped early."""
    chosen_step: int
    """Whose weights are the trained model's; 0 for those before training."""
    curve: list[ValidationLoss] = []


class AverageLoss(Part):
    """Losses on validation text of a mean of the weights before training and after it."""

    share: Real = math.nan
    """Of the trained weights."""
    loss: Real = math.nan
    """The mean over the sources."""
    losses: Losses = {}


class Averaging(Part):
    """How `train.average` chose the share of the trained weights."""

    tokens: int
    """Of the validation text."""
    share: Real = math.nan
    curve: list[AverageLoss] = []


class Training(Part):
    """What the training was, and how it went."""

    scope: str | None = None
    tokens: int | None = None
    steps: int | None = None
    seconds: float | None = None
    learning_rate: float | None = None
    """At its peak."""
    text: str | None = None
    """SHA-256 of the training text in its order."""
    settings: dict[str, Any] = {}
    """The recipe's `train`, as it was trained with."""
    curve: Annotated[list[CurvePoint], BeforeValidator(lambda value: value or [])] = []
    held_out: Annotated[list[HeldOutPoint], BeforeValidator(lambda value: value or [])] = []
    validation: Validation | None = None
    averaging: Averaging | None = None
    temperature_scaling: TemperatureScaling | None = Field(
        None, validation_alias=AliasChoices("temperature_scaling", "softened")
    )

    @property
    def planned(self) -> tuple[int | None, int | None]:
        """(tokens, steps) as they would be without stopping early."""
        if self.validation is None or not self.steps or self.tokens is None:
            return self.tokens, self.steps
        steps = self.validation.planned_steps
        return self.tokens // self.steps * steps, steps

    @model_validator(mode="before")
    @classmethod
    def _current_settings(cls, content: Any) -> Any:
        """`soften` is what version 0.1 called a setting."""
        settings = content.get("settings") if isinstance(content, Mapping) else None
        if not isinstance(settings, Mapping) or "soften" not in settings:
            return content
        rest = {name: value for name, value in settings.items() if name != "soften"}
        return {**content, "settings": {"temperature_scaling": settings["soften"]} | rest}


ByDomain = dict[str, list[Real]]
"""Domain -> layer -> value."""


class MixedRouting(Part):
    """A model's routing of all sources' domains alike, by layer."""

    share: list[list[Real]] = []
    entropy: list[Real] = []
    entropy_of_mean: list[Real] = []
    balance: list[Real] = []
    max_share: list[Real] = []


class StageRouting(Part):
    """Where a model's routers send held-out text, docs/design.md."""

    experts: list[str]
    """Of several experts of a source (`experts.per_source`) the sum."""
    layers: list[int] | None = None
    """The layers that have experts, where not all have; what is said by layer is said of these."""
    routers: str | None = None
    tokens: dict[str, int] = {}
    """Domain -> tokens."""
    share: dict[str, list[list[Real]]] = {}
    """Domain -> layer -> expert -> share of all places."""
    entropy: ByDomain = {}
    """In nats. An older evaluation has none of these."""
    entropy_of_mean: ByDomain = {}
    balance: ByDomain = {}
    max_share: ByDomain = {}
    mixed: MixedRouting | None = None


class Cka(Part):
    """How alike a model's experts are."""

    experts: list[str]
    tokens: int
    layers: list[list[list[Real]]]
    """Layer -> expert -> expert -> linear CKA of their outputs. Layers without experts are left
    out."""
    numbers: list[int] | None = None
    """Of the layers, where some are left out."""
    mean: Real = math.nan
    """Over layers and pairs of different experts."""


class FixedExperts(Part):
    """A model with the same number of experts for every token."""

    experts: int
    losses: Losses


class ByThreshold(Part):
    """A model with as many experts for a token as reach a probability."""

    threshold: float
    mean_experts: Real
    """Per token and layer, all domains alike."""
    experts_by_layer: list[Real]
    experts_by_domain: Losses
    losses: Losses


class DynamicRouting(Part):
    """Losses with other numbers of experts per token."""

    fixed: list[FixedExperts]
    threshold: list[ByThreshold]


class TaskResult(Part):
    """One task of lm-evaluation-harness: how it was measured, and (by the harness's names) the
    metrics and their standard errors."""

    fewshot: int | None = None
    """Solved examples in the prompt; None where a group's tasks differ."""
    samples: int = 0
    """Documents that were evaluated."""
    documents: int = 0
    """Documents that there are."""
    chat_template: bool = False
    lm_eval: str = ""
    """Version of the harness."""

    @property
    def way(self) -> tuple[int | None, int, int, bool, str]:
        """How it was measured: only what was measured in one way is compared."""
        return self.fewshot, self.samples, self.documents, self.chat_template, self.lm_eval

    @property
    def scores(self) -> dict[str, tuple[float | None, float | None]]:
        """Metric -> (value, standard error); None where it is not a number or not known."""
        values = self.model_extra or {}
        return {
            metric: (value, values.get(f"{metric}_stderr"))
            for metric, value in values.items()
            if not metric.endswith("_stderr")
        }


Tasks = Annotated[dict[str, dict[str, TaskResult]], BeforeValidator(_or_empty)]
"""Model -> task -> result."""


class HeldOut(Part):
    """What was evaluated on."""

    text: str
    """SHA-256 of the held-out text of all domains."""


class Timing(Part):
    """How long the stages took, and what they needed. A key's last word is its unit."""

    build_seconds: float | None = None
    build_peak_rss_bytes: int | None = None
    calibration_tokens: int | None = None
    train_peak_rss_bytes: int | None = None
    evaluate_seconds: float | None = None
    evaluate_peak_rss_bytes: int | None = None


def _or_none(value: Any) -> Any:
    return value or None


class Metrics(Part):
    """All that was measured of a run."""

    alignment: Annotated[dict[str, dict[str, Agreement]], BeforeValidator(_or_empty)] = {}
    """Kind (`residual`, `heads`, `neurons`) -> source -> how alike it is to the anchor."""
    fit: Annotated[FitMetrics | None, BeforeValidator(_or_none)] = Field(
        None, validation_alias=AliasChoices("fit", "refit")
    )
    timing: Annotated[Timing | None, BeforeValidator(_or_none)] = None
    training: Annotated[Training | None, BeforeValidator(_or_none)] = None
    sources: Annotated[dict[str, Losses], BeforeValidator(_or_empty)] = {}
    """Source -> domain -> loss; NaN where the text has none of the source's tokens."""
    built: Losses = {}
    trained: Losses = {}
    routing: Annotated[dict[str, StageRouting], BeforeValidator(_or_empty)] = {}
    """Stage -> routing."""
    cka: Annotated[dict[str, Cka], BeforeValidator(_or_empty)] = {}
    """Stage, or `sources`: the originals before they share a model."""
    dynamic: Annotated[dict[str, DynamicRouting], BeforeValidator(_or_empty)] = {}
    """Stage -> losses with other numbers of experts."""
    tasks: Tasks = {}
    held_out: Annotated[HeldOut | None, BeforeValidator(_or_none)] = None

    @property
    def models(self) -> dict[str, dict[str, float]]:
        """Stage -> domain -> loss, of the models that were evaluated."""
        found = {"built": self.built, "trained": self.trained}
        return {stage: losses for stage, losses in found.items() if losses}


def read_metrics(run: RunFolder) -> Metrics:
    """A run's metrics. Raises RunFolderError where the file is not there or damaged."""
    content = run.read_json(run.metrics)
    try:
        return Metrics.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(run.metrics, f"{where}: {first['msg']}") from None


_TASKS: TypeAdapter[dict[str, dict[str, TaskResult]]] = TypeAdapter(Tasks)


def tasks_of(content: Any) -> dict[str, dict[str, TaskResult]]:
    """Benchmarks as they stand in a JSON file: model -> task -> result."""
    return _TASKS.validate_python(content)
