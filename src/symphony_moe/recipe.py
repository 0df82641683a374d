"""What to build: one frozen object, read from YAML, with every check that needs no file but its
own.

Unknown keys are refused with the nearest known name. A `method` is a preset for the sections below
it; any value that the recipe sets there wins. Loading makes every path absolute (they are relative
to the recipe's folder), so a resolved recipe means the same everywhere on the machine.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from symphony_moe.errors import RecipeError, is_text, shortened
from symphony_moe.yaml_text import SpelledFloat, SpelledInt, read_yaml, spelled, write_yaml


def _number(value: Any) -> Any:
    """A number without its spelling. Raises ValueError for true and false, which are 1 and 0 to
    Python."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    if isinstance(value, SpelledInt):
        return int(value)
    return float(value) if isinstance(value, SpelledFloat) else value


Name = Annotated[str, BeforeValidator(spelled)]
"""Text; what YAML reads as a number is taken as it was written."""
Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
Share = Annotated[Real, Field(ge=0, le=1e6, allow_inf_nan=False)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
"""What every generator that is seeded with it takes."""

TEMPLATE_DATE = date(2025, 1, 1)
"""What chat templates are told is today's date, where the recipe says nothing else."""
MOST_TOKENS = 10**15
"""More text than there is."""
LONGEST = 2**24
"""Tokens in a window that no machine holds."""
MOST_STEPS = 10**6
"""Of what is counted one by one."""

BUNDLED = "bundled:"
"""Prefix of models and texts that come with the package: `bundled:strangers/python`."""

_PLAIN_MEAN: dict[str, dict[str, str]] = {
    "backbone": {"attention": "linear", "embeddings": "selective-linear", "norms": "linear"},
    "align": {"residual": "none", "heads": "none", "neurons": "none"},
    "experts": {"init": "source"},
    "refit": {"method": "none"},
    "router": {"init": "random"},
}

PRESETS: dict[str, dict[str, dict[str, str]]] = {
    "symphony": {
        "backbone": {"attention": "slerp", "embeddings": "selective-linear", "norms": "linear"},
        "align": {"residual": "none", "heads": "none", "neurons": "activations"},
        "experts": {"init": "source"},
        "refit": {"method": "none"},
        "router": {"init": "random"},
    },
    "harmonized": {
        "backbone": {"attention": "linear", "embeddings": "selective-linear", "norms": "linear"},
        "align": {"residual": "orthogonal", "heads": "all", "neurons": "auto"},
        "experts": {"init": "source"},
        "refit": {"method": "least-squares"},
        "router": {"init": "regression"},
    },
    "btx": _PLAIN_MEAN,
    "bam": _PLAIN_MEAN | {"experts": {"init": "source", "attention": "source"}},
    "drop-upcycling": _PLAIN_MEAN | {"experts": {"init": "drop"}},
    "sparse-upcycling": _PLAIN_MEAN
    | {
        "backbone": {"attention": "anchor", "embeddings": "anchor", "norms": "anchor"},
        "experts": {"init": "copy"},
    },
}
"""method -> section -> setting. The paper's method, the project's own, and the paper's baselines
(appendix)."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


@dataclass(frozen=True)
class ChatRules:
    """How the chats of a source are read."""

    format: Literal["messages", "sharegpt"] = "messages"
    """`messages`: lists of {role, content}. `sharegpt`: lists of {from, value} as well."""
    today: date = TEMPLATE_DATE
    """What templates that write the date are told."""


class HubData(Section):
    hub: Name
    """Dataset id on the hub, or a local folder that `datasets` can load."""
    split: Name = "train"
    """Of the dataset's splits, the one that is read."""
    column: Name = "text"
    """Column that holds the text (or chat `messages`)."""
    name: Name | None = None
    """Configuration of the dataset, where it has several."""
    revision: Name | None = None
    """Branch, tag or commit on the hub."""
    streaming: bool = False
    """Read the rows one by one, and only as far as the tokens asked for need, instead of fetching
    and holding all of them: for data sets of any size, on the hub or in a local folder."""


Data = str | list[str] | HubData
"""Text: files (`.jsonl`, `.txt`, `.parquet`), `bundled:<domain>`, or a dataset on the hub."""


class SourceSpec(Section):
    model: Name
    """Local folder, hub id, or `bundled:<family>/<domain>`."""
    revision: Name | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: Name | None = None
    """The GGUF file in `model` (a folder or hub id) that holds it."""
    allow_pickle: bool = False
    """Read `pytorch_model*.bin` where there are no safetensors (by torch's weights-only loader)."""
    adapter: Name | None = None
    """LoRA adapter (folder or hub id, as `peft` saves it) that is merged into the model."""
    adapter_revision: Name | None = None
    """Branch, tag or commit of the adapter on the hub."""
    data: Data
    """Text of the domain that this source knows: for calibration, training and evaluation."""
    column: Name = "text"
    """Column of `.jsonl` and `.parquet` files that holds the text; `messages` (a chat) goes through
    the source's chat template."""
    chat_format: Literal["messages", "sharegpt"] = "messages"
    """How the data stores chats. `messages`: each message has `role` and `content`. `sharegpt`:
    each has `from` and `value`; `human` becomes the role `user`, `gpt` the role `assistant`."""
    sha256: dict[str, Name] | None = None
    """File name -> SHA-256 of the weights. Written into a run's recipe; where given, checked."""

    @model_validator(mode="after")
    def _one_column(self) -> "SourceSpec":
        if isinstance(self.data, HubData) and self.column != "text":
            hub = self.data.hub
            raise ValueError(f"of a dataset the column stands in data: {{hub: {hub}, column: ...}}")
        return self


class Calibration(Section):
    tokens: Whole = Field(262_144, gt=0, le=MOST_TOKENS)
    """Calibration text in tokens, in total; the same number from every source's data, and no less
    than a window of each (and one more to judge by, where something is fitted)."""
    sequence_length: Whole = Field(2048, ge=2, le=LONGEST)
    """Tokens in a window."""
    domains: list[Name] | None = Field(None, min_length=1)
    """The sources whose text the alignment sees. Default: all. Where something is fitted, text of
    every source is needed."""
    seed: Seed = 114514
    """Seed of the windows that are drawn."""


class Backbone(Section):
    attention: Literal["linear", "slerp", "anchor"] = "slerp"
    """How q, k, v and o are fused. Biases and QK-norm gains are always averaged linearly."""
    embeddings: Literal["selective-linear", "linear", "anchor"] = "selective-linear"
    """How token embeddings and the output head are fused."""
    norms: Literal["linear", "anchor"] = "linear"
    """How norm gains are fused."""
    weights: dict[str, Share] | None = None
    """Source -> share in the backbone (normalised to sum to one). Default: equal shares."""


class Align(Section):
    residual: Literal["none", "orthogonal"] = "none"
    """Basis of each source's residual stream: its own, or rotated onto the anchor's."""
    heads: Literal["none", "all"] = "none"
    """Attention heads: as they are, or matched to the anchor's, with value rotations and RoPE
    phases."""
    neurons: Literal["none", "activations", "auto"] = "activations"
    """Order of each expert's hidden neurons: its own, or matched to the anchor's by activations.
    `auto`: matched only where neurons of several experts are mixed, which no method here does."""
    neuron_share: Real = Field(1.0, ge=0, le=1)
    """Share of an expert's neurons that are matched: those that correlate most with their match.
    The others fill the places that are left, in their own order (Table 3)."""


class Experts(Section):
    init: Literal["source", "drop", "copy"] = "source"
    """`source`: expert i is source i's FFN. `drop`: the same, a share of its neurons drawn anew.
    `copy`: every expert is a copy of the anchor's."""
    attention: Literal["shared", "source"] = "shared"
    """`shared`: all of attention is fused. `source`: expert i has source i's q and o too, chosen by
    a router of their own; only k and v are fused (BAM)."""
    sources: list[Name] | None = Field(None, min_length=1)
    """The sources that become experts. Default: all. Of the others only the text is used, for
    training and evaluation."""
    drop_share: Real = Field(0.5, ge=0, le=1)
    """Share of each expert's neurons that `drop` draws anew, from a normal distribution with the
    mean and the standard deviation of the matrix."""


class Refit(Section):
    method: Literal["none", "least-squares"] = "none"
    """Fit the new model's layers, one after the other, to what the sources compute."""
    ridge: Real = Field(1e-2, gt=0, le=1e6)
    """Pull toward the aligned weights, as a share of the mean squared input."""
    epochs: Real = Field(8.0, ge=0, le=10_000)
    """Passes over the calibration text in which each layer (and the head) is refined by local
    gradient steps, after the closed form. 0: the closed form alone."""
    learning_rate: Real = Field(0.06, gt=0, le=10)
    """Peak learning rate of the refinement (Adam, cosine), as a share of each tensor's root mean
    square."""
    pull: Real = Field(0.1, ge=0, le=1e9)
    """Pull of the refinement toward the aligned weights: a step takes a tensor this many times the
    learning rate of the way back. More of it fits the calibration text less, and keeps more of what
    the sources know of other text."""
    soften: Real = Field(0.05, ge=0, le=1)
    """How much farther from the sources' distributions (KL divergence on the text kept aside, as a
    share of itself) the fitted head's logits may be divided down: what a fitted model is too sure
    of on text of no source's domain. 0: not at all."""


class Router(Section):
    init: Literal["random", "regression", "hidden"] = "random"
    """`random`: normal with standard deviation 0.02. `regression`: logistic regression from the new
    model's own router inputs to the source. `hidden`: each source's mean router input."""
    temperature: Real = Field(1.0, ge=1e-6, le=1e9)
    """What a calibrated router's rows are divided by."""
    top_k: Whole = Field(2, ge=1, le=64)
    """Experts per token."""


class Output(Section):
    architecture: Name = "auto"
    """`auto`: the family's first architecture (docs/engines.md). `granitemoe`: for Qwen2 in
    llama.cpp and MLX, and for Llama 3 in MLX. Or the name of an architecture that the sources must
    have."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What the weights are rounded to when they are written."""
    max_shard_size: Name = "5GB"
    """Size of a weights file at most, as `5GB`, `500MB` or `20KB`."""
    chat: Name | None = None
    """The source whose chat template, end and padding tokens and generation config the output has;
    the anchor where it is not given."""
    head_bias: bool = True
    """Write the zero head bias of targets that have one (Qwen2's `ernie4_5_moe`): without it
    transformers reports a missing tensor. No effect elsewhere."""

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard_size)


class Train(Section):
    scope: Literal["router", "experts", "all"] = "all"
    """What learns: the router; router and experts; everything."""
    tokens: Whole = Field(10_000_000, gt=0, le=MOST_TOKENS)
    """Tokens trained on, in total, equal shares from every source's data."""
    learning_rate: Real = Field(5e-5, gt=0, le=1)
    """Peak of the cosine schedule."""
    warmup: Real = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Real = Field(0.01, ge=0, le=10)
    """AdamW's."""
    max_grad_norm: Real = Field(1.0, gt=0, le=1e9)
    """The gradient is scaled down to this norm where it is larger."""
    balance_weight: Real = Field(0.01, ge=0, le=1000)
    """Weight of the load-balancing loss (the stock model's own)."""
    sequence_length: Whole = Field(2048, ge=2, le=LONGEST)
    """Tokens in a window."""
    packing: Literal["windows", "documents"] = "windows"
    """`windows`: attention goes through all of a window; `documents`: it stays within each of the
    documents in it."""
    batch_size: Whole = Field(2, ge=1, le=MOST_STEPS)
    """Windows in a step on one device."""
    gradient_accumulation: Whole = Field(1, ge=1, le=MOST_STEPS)
    """Batches in a step."""
    checkpoints: Whole = Field(4, ge=1, le=MOST_STEPS)
    """How many times to save, evenly over the training, for resuming."""
    evaluations: Whole = Field(0, ge=0, le=MOST_STEPS)
    """Into how many parts of the same length measurements of the held-out losses divide the
    training; after the last part it is the trained model's own evaluation."""
    teacher: Literal["none", "sources"] = "none"
    """`sources`: every window's own source teaches its distribution over the next token."""
    teacher_weight: Real = Field(0.7, ge=0, le=1)
    """Weight of the KL divergence from the teacher; the language-model loss has the rest."""
    teacher_temperature: Real = Field(1.0, ge=0.01, le=1000)
    """What both sides' logits are divided by in the divergence."""
    teacher_loading: Literal["auto", "together", "in-turn"] = "auto"
    """All teachers in memory, or one after the other; `auto`: together where they fit."""
    soften: Real = Field(0.0, ge=0, le=1)
    """How much higher the language-model loss may be for softer logits, as a share of itself, on
    the text that was trained on last: at the end the final norm (of any scope) is divided by the
    largest temperature that keeps to it. A trained model is too sure of itself on text of no
    source's domain. 0: not at all."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the forward pass computes in; weights learn in float32. `auto`: bfloat16 on a GPU that
    has it."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    report_to: str | list[str] = "none"
    """Where the Trainer's log goes besides `metrics.json`: `tensorboard`, `wandb`, ... (each a
    package to install)."""


class Evaluation(Section):
    tokens: Whole = Field(65_536, gt=0, le=MOST_TOKENS)
    """Held-out text per domain, in tokens."""
    holdout: Real = Field(0.05, gt=0, lt=1)
    """Share of documents that are held out, by the hash of their text."""
    sequence_length: Whole = Field(2048, ge=2, le=LONGEST)
    """Tokens in a window."""
    extra: dict[str, Data] = {}
    """Out-of-domain text: name -> data (in files, the column `text`). Evaluated only."""
    seed: Seed | None = None
    """Seed of the held-out windows; the recipe's own where it is not given."""
    thresholds: list[Annotated[Real, Field(ge=0, le=1)]] = []
    """Dynamic routing is tried at these: a token has every expert whose router probability is at
    least the threshold, and its most probable one always. Beside them 1, 2, .. N experts per token
    for all. Each is one more evaluation. Default: not tried."""


class Compare(Section):
    methods: list[Name] | None = Field(None, min_length=1)
    """Presets, or names of `variants`, in the order of the table. Default: all presets."""
    seeds: list[Seed] = Field([114514], min_length=1)
    """Each method is built and trained once per seed (of calibration text, router and training)."""
    reference: Name = "symphony"
    """The method whose final loss the others' way there is measured by; where nobody has named it
    and `symphony` is not compared, the first of them."""
    variants: dict[str, dict[str, Any]] = {}
    """Name -> settings in the place of the recipe's, such as `{method: symphony, align: {neurons:
    none}}`."""


class Recipe(Section):
    sources: dict[str, SourceSpec] = Field(min_length=2, max_length=64)
    """Name -> source. One expert each, in this order."""
    anchor: Name
    """The source that the others are aligned to. Default: the first."""
    method: Name = "symphony"
    """Preset for the sections below: one of PRESETS (`symphony`, `harmonized`, `btx`, `bam`,
    `drop-upcycling`, `sparse-upcycling`), whose values are the defaults of those sections."""
    calibration: Calibration = Calibration()
    backbone: Backbone = Backbone()
    align: Align = Align()
    experts: Experts = Experts()
    refit: Refit = Refit()
    router: Router = Router()
    output: Output = Output()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    compare: Compare = Compare()
    """What `symphony compare` compares. It is no part of any one build."""
    seed: Seed = 114514
    """Seed of the router's and the training's random draws."""
    chat_date: date = TEMPLATE_DATE
    """The date that chat templates are told is today (those of Llama 3.2 write it). It is fixed, so
    that the same recipe gives the same text on any day."""

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = list(self.sources)
        for name in [*names, *self.evaluation.extra]:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(
                    f"the name {name!r} may hold letters, digits, '.', '_' and '-' only"
                )
            if name in ("built", "trained"):
                raise ValueError(f"the name {name!r} is what the result is called; choose another")
        if self.anchor not in names:
            raise ValueError(f"anchor: {self.anchor!r} is no source; sources are {names}")
        if self.output.chat is not None and self.output.chat not in names:
            raise ValueError(f"output.chat: {self.output.chat!r} is no source; sources are {names}")
        for name in self.experts.sources or ():
            if name not in names:
                raise ValueError(f"experts.sources: {name!r} is no source; sources are {names}")
        experts = self.expert_names
        if self.anchor not in experts:
            raise ValueError(
                f"experts.sources: without the anchor, {self.anchor!r}; name it, or another anchor"
            )
        for name in self.backbone.weights or ():
            if name not in names:
                raise ValueError(f"backbone.weights: {name!r} is no source; sources are {names}")
        if self.backbone.weights is not None:
            missing = [name for name in experts if name not in self.backbone.weights]
            if missing:
                raise ValueError(f"backbone.weights: no share for {missing} (0 leaves one out)")
            if sum(self.backbone.weights.values()) <= 0:
                raise ValueError("backbone.weights: the shares add up to nothing")
        if self.router.top_k > len(experts):
            raise ValueError(
                f"router.top_k: {self.router.top_k} experts per token, but there are only "
                f"{len(experts)} sources (one expert each); choose 1 to {len(experts)}"
            )
        both = [name for name in self.evaluation.extra if name in names]
        if both:
            raise ValueError(f"evaluation.extra: {both} are sources' names; choose other names")
        for name in self.calibration.domains or ():
            if name not in experts:
                raise ValueError(
                    f"calibration.domains: {name!r} is no source; sources are {experts}"
                )
        if self.calibration.domains is not None and self.fits:
            raise ValueError(
                "calibration.domains: a fit (refit.method, or a calibrated router.init) needs text "
                "of every source; leave calibration.domains out, or fit nothing"
            )
        if self.experts.init == "drop" and self.refit.method != "none":
            raise ValueError(
                "refit.method: fits each expert to its source, but experts.init drop draws a share "
                "of its neurons anew; set it to none, or experts.init to source"
            )
        if self.experts.attention == "source":
            fits = "a fit knows only attention that all experts share"
            refused = (
                ("experts.init", self.experts.init == "copy", "source",
                 "copies of one expert have no attention of their sources"),
                ("refit.method", self.refit.method != "none", "none", fits),
                ("router.init", self.router.init != "random", "random", fits),
                ("train.gradient_checkpointing", self.train.gradient_checkpointing, "false",
                 "the stock class of attention experts does not have it"),
            )  # fmt: skip
            for setting, is_set, instead, reason in refused:
                if is_set:
                    raise ValueError(
                        f"{setting}: {reason}; set it to {instead}, or experts.attention to shared"
                    )
        if self.experts.init == "copy":
            of_sources = {
                "align.residual": self.align.residual == "orthogonal",
                "align.heads": self.align.heads == "all",
                "refit.method": self.refit.method == "least-squares",
            }
            for setting, is_set in of_sources.items():
                if is_set:
                    raise ValueError(
                        f"{setting}: fits each source's expert to the others', but experts.init "
                        "copy keeps the anchor's alone; set it to none, or experts.init to source"
                    )
        parse_size(self.output.max_shard_size)
        return self

    @property
    def aligns_neurons(self) -> bool:
        """Whether neurons are matched: only where the experts have different ones."""
        return self.align.neurons == "activations" and self.experts.init != "copy"

    @property
    def folds(self) -> bool:
        """Whether norm gains are folded into what reads them (and a tied head untied): a rotation
        of the residual stream, and a fit of what reads it, know no gains."""
        return self.align.residual != "none" or self.refit.method != "none"

    @property
    def aligns(self) -> bool:
        """Whether the sources are compared with the anchor on the calibration text."""
        aligned = (self.align.residual, self.align.heads)
        return self.aligns_neurons or any(setting != "none" for setting in aligned)

    @property
    def fits(self) -> bool:
        """Whether the new model itself is run on the calibration text, layer by layer."""
        return self.refit.method != "none" or self.router.init != "random"

    @property
    def shares(self) -> list[float]:
        """Each expert's share in the backbone, in the recipe's order, summing to one."""
        weights = self.backbone.weights or dict.fromkeys(self.sources, 1.0)
        total = sum(weights[name] for name in self.expert_names)
        return [weights[name] / total for name in self.expert_names]

    @property
    def calibration_domains(self) -> list[str]:
        """The sources whose text calibrates, in the recipe's order."""
        chosen = self.calibration.domains
        return [name for name in self.expert_names if chosen is None or name in chosen]

    @property
    def expert_names(self) -> list[str]:
        """The sources that become experts, in the recipe's order."""
        chosen = self.experts.sources
        return [name for name in self.sources if chosen is None or name in chosen]

    def chat_rules(self, domain: str) -> ChatRules:
        """How the chats of a domain (a source's, or one of `evaluation.extra`) are read."""
        spec = self.sources.get(domain)
        # Text of no source may have either shape.
        return ChatRules("sharegpt" if spec is None else spec.chat_format, self.chat_date)

    @property
    def windows_each(self) -> int:
        """Windows of calibration text of every source that gives some, those kept aside
        included."""
        settings = self.calibration
        domains = len(self.calibration_domains)
        return max(1, settings.tokens // domains // settings.sequence_length)

    @property
    def windows_aside(self) -> int:
        """Windows of every source's calibration text that a fit is judged by: one in 16; four where
        that is fewer, but no more than one in four, and at least one."""
        if not self.fits:
            return 0
        return max(self.windows_each // 16, min(4, self.windows_each // 4), 1)

    def to_yaml(self) -> str:
        """The resolved recipe of one build: every setting spelled out."""
        content = self.model_dump(mode="json", exclude={"compare"})
        return write_yaml(content)


def parse_size(text: str) -> int:
    """Bytes in a size such as `5GB` (1 GB = 10**9 bytes). Raises ValueError."""
    pattern = r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(KB|MB|GB)\s*"
    found = re.fullmatch(pattern, text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise ValueError(
            f"output.max_shard_size: expected a size such as 5GB or 500MB, got {text!r}"
        )
    return int(float(found[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2].upper()])


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, apply `a.b=c` overrides, resolve presets and paths.

    Raises RecipeError for a file that is not there or not YAML, an unknown key or preset, a value
    of the wrong kind, and settings that contradict each other.
    """
    return resolve_recipe(_read_content(path, overrides), path.resolve().parent, str(path))


def load_variants(
    path: Path,
    overrides: Iterable[str] = (),
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> tuple[Recipe, dict[str, dict[int, Recipe]]]:
    """(the recipe, method -> seed -> its recipe): what `symphony compare` compares.

    `methods` and `seeds` take the place of the recipe's own. A method is a preset or one of
    `compare.variants`; a variant's settings are put over the recipe's, section by section. What a
    recipe says that its own method's preset says too, as a run's `recipe.yaml` does of everything,
    is that preset's and not put on the others. Raises RecipeError as `load_recipe` does, naming the
    method, for a method that is neither, and for two that are the same but for their names.
    """
    content = _read_content(path, overrides)
    folder = path.resolve().parent
    recipe = resolve_recipe(content, folder, str(path))
    content.pop("compare", None)
    shared = _without_presets(content, folder, str(path))
    settings = recipe.compare
    chosen = list(methods or settings.methods or PRESETS)
    known = [*PRESETS, *settings.variants]
    found: dict[str, dict[int, Recipe]] = {}
    # Variants that are not compared now may have mistakes too.
    for name in [*chosen, *(name for name in settings.variants if name not in chosen)]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there is: {', '.join(known)}"
            raise RecipeError(f"{path}: {name!r} is no method and no compare.variants; {hint}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise RecipeError(
                f"{path}: compare.variants: the name {name!r} may hold letters, digits, '.', '_', "
                "'+' and '-' only"
            )
        variant = settings.variants.get(name, {"method": name})
        for seed in seeds or settings.seeds:
            # All are measured on the same held-out text, whatever they are trained with.
            held_out = recipe.seed if recipe.evaluation.seed is None else recipe.evaluation.seed
            seeded = {
                "seed": seed, "calibration": {"seed": seed}, "evaluation": {"seed": held_out},
            }  # fmt: skip
            common = _over(shared, seeded)
            one = resolve_recipe(_over(common, variant), folder, f"{path}: {name}")
            _refuse_another_budget(path, name, one, resolve_recipe(common, folder, str(path)))
            if name in chosen:
                found.setdefault(name, {})[seed] = one
    _refuse_the_same(path, found)
    if settings.reference not in found and "reference" in settings.model_fields_set:
        raise RecipeError(
            f"{path}: compare.reference: {settings.reference!r} is not compared; compared are "
            f"{', '.join(found)}"
        )
    return recipe, found


def _without_presets(content: Mapping[Any, Any], folder: Path, who: str) -> dict[Any, Any]:
    """A recipe's settings without those that its method would give it anyway."""
    governed = {
        (section, key)
        for preset in PRESETS.values()
        for section, values in preset.items()
        for key in values
    }
    bare = {
        section: {k: v for k, v in own.items() if (section, k) not in governed}
        if isinstance(own, Mapping)
        else own
        for section, own in content.items()
    }
    try:
        given = resolve_recipe(bare, folder, who).model_dump(mode="json")
    except RecipeError:
        return dict(content)  # what it sets belongs together
    for section, key in governed:
        own = content.get(section)
        if isinstance(own, Mapping) and key in own and own[key] != given[section][key]:
            bare[section][key] = own[key]
    return bare


_COMMON = (
    "sources", "evaluation", "seed", "calibration.seed", "train.tokens", "train.sequence_length",
    "train.batch_size", "train.gradient_accumulation", "compare",
)  # fmt: skip
"""What all runs of a comparison that have one seed have in common."""


def _refuse_another_budget(path: Path, name: str, recipe: Recipe, common: Recipe) -> None:
    """RecipeError for a variant that could not stand in one table with the others."""
    for key in _COMMON:
        own, theirs = (attrgetter(key)(one) for one in (recipe, common))
        if own != theirs:
            raise RecipeError(
                f"{path}: compare.variants.{name} changes {key}: runs that differ in it cannot "
                "stand in one table; set it for all of them"
            )


def _refuse_the_same(path: Path, variants: Mapping[str, Mapping[int, Recipe]]) -> None:
    """RecipeError for two methods that are one recipe but for their names."""
    recipes = {name: next(iter(of.values())) for name, of in variants.items()}
    for (one, first), (other, second) in combinations(recipes.items(), 2):
        if first.model_copy(update={"method": second.method}) == second:
            raise RecipeError(
                f"{path}: {one} and {other} are the same in everything; what the recipe sets "
                f"of {', '.join(PRESETS[first.method])} wins over a preset. Leave it out there, or "
                "set it in compare.variants, or leave one of the two out"
            )


def _over(settings: Mapping[Any, Any], others: Mapping[Any, Any]) -> dict[Any, Any]:
    """Settings with others in their place, section by section."""
    merged = dict(settings)
    for key, value in others.items():
        old = merged.get(key)
        if value is None and isinstance(old, Mapping):
            continue  # a section that is named and left empty
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _over(old or {}, value) if both else value
    return merged


def _read_content(path: Path, overrides: Iterable[str]) -> dict[Any, Any]:
    """What a recipe file says, with `a.b=c` overrides."""
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder, not a recipe file")
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is not UTF-8"
        raise RecipeError(f"{path}: not readable as YAML: {where}; save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected settings such as `sources:`, got {_kind(content)}")
    for override in overrides:
        _override(content, override)
    return content


def resolve_recipe(content: Mapping[Any, Any], folder: Path, who: str) -> Recipe:
    """Check settings and fill in presets and absolute paths. `who` names the recipe in errors."""
    _refuse_unknown_keys(content, Recipe, who, "")
    settings = _without_nulls(content)
    method = spelled(settings.get("method", "symphony"))
    if not isinstance(method, str) or method not in PRESETS:
        raise RecipeError(
            f"{who}: method: {shortened(repr(method), 60)} is not available; "
            f"available: {', '.join(PRESETS)}"
        )
    for section in settings.keys() - {"sources", "compare"}:
        if isinstance(own := settings[section], Mapping):
            settings[section] = _without_nulls(own)
    for section, preset in PRESETS[method].items():
        own = settings.get(section, {})
        settings[section] = preset | own if isinstance(own, dict) else own
    sources = settings.get("sources")
    evaluation = settings.get("evaluation")
    try:
        if isinstance(sources, dict) and sources:
            settings["anchor"] = settings.get("anchor", str(next(iter(sources))))
            settings["sources"] = {
                str(name): _absolute_source(spec, folder, f"{who}: sources.{name}")
                for name, spec in sources.items()
            }
        if isinstance(evaluation, dict) and isinstance(extra := evaluation.get("extra"), dict):
            absolute = {
                str(name): _absolute_data(data, folder, f"{who}: evaluation.extra.{name}")
                for name, data in extra.items()
            }
            settings["evaluation"] = evaluation | {"extra": absolute}
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(f"{who}: {_describe_all(error)}") from None
    except RecursionError:
        raise RecipeError(f"{who}: a YAML alias stands inside itself") from None


def _kind(content: Any) -> str:
    """What a YAML text holds instead of settings, in words."""
    if content is None:
        return "nothing"
    return {list: "a list", str: "text", bool: "true or false"}.get(type(content), "a number")


def _without_nulls(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """A setting without a value is left at its default."""
    return {key: value for key, value in settings.items() if value is not None}


def _override(content: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c`; the value is read as YAML."""
    path, _, value = override.partition("=")
    *parents, last = path.strip().split(".")
    who = f"--set {shortened(override, 100)}"
    if not value.strip() or not all([*parents, last]):
        raise RecipeError(f"{who}: expected KEY=VALUE, such as train.tokens=1000000")
    section = content
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise RecipeError(f"{who}: {shortened(parent, 40)} is a value, not a section")
    try:
        section[last] = read_yaml(value)
    except ValueError as error:
        raise RecipeError(f"{who}: the value is not YAML: {error}") from None


def _absolute_source(spec: Any, folder: Path, where: str) -> Any:
    if not isinstance(spec, dict):
        return spec
    spec = dict(spec)
    for key in ("model", "adapter"):
        value = spelled(spec.get(key))
        if isinstance(value, str) and not value.startswith(BUNDLED):
            local = _absolute(value, folder, f"{where}.{key}")
            looks_local = value.startswith((".", "/", "~")) or local.exists()
            spec[key] = str(local) if looks_local else value
    if "data" in spec:
        spec["data"] = _absolute_data(spec["data"], folder, f"{where}.data")
    return spec


def _absolute_data(data: Any, folder: Path, where: str) -> Any:
    if isinstance(data, list):
        return [_absolute_data(item, folder, where) for item in data]
    if isinstance(data, dict):
        hub = spelled(data.get("hub"))
        if isinstance(hub, str) and (local := _absolute(hub, folder, where)).exists():
            return data | {"hub": str(local)}
        return data
    if isinstance(data, str) and not data.startswith(BUNDLED):
        return str(_absolute(data, folder, where))
    return data


def _absolute(path: str, folder: Path, where: str) -> Path:
    """Raises RecipeError for text that cannot be a path: too long, of an unknown user, ..."""
    try:
        absolute = (folder / Path(path).expanduser()).resolve()
        if absolute.exists() and not is_text(str(absolute)):
            raise ValueError(
                f"{str(absolute)!a} is not UTF-8 text, as files of weights and outputs need it; "
                "rename it"
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = shortened(str(error), 200)
        where = shortened(where, 200)
        raise RecipeError(
            f"{where}: {shortened(path, 80)!r} cannot be used as a path: {reason}"
        ) from None
    return absolute


def _refuse_unknown_keys(content: Any, model: type[BaseModel], who: str, path: str) -> None:
    """RecipeError for the first key that the section does not have, with the nearest that it
    has."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        where = f"{path}{shortened(str(key), 60)}"
        field = model.model_fields.get(str(key))
        if field is None:
            near = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.5)
            hint = (
                f"did you mean {path}{near[0]}?"
                if near
                else f"known: {', '.join(model.model_fields)}"
            )
            raise RecipeError(f"{who}: unknown setting {where}; {hint}")
        for section, is_table in _sections(field.annotation):
            items = value.items() if is_table and isinstance(value, Mapping) else [(None, value)]
            for name, item in items:
                _refuse_unknown_keys(
                    item, section, who, f"{where}.{name}." if name else f"{where}."
                )


def _sections(annotation: Any) -> list[tuple[type[BaseModel], bool]]:
    """(section, whether it stands in a table of names) for every section that a field can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, False)]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict:
        return [(section, True) for section, _ in _sections(arguments[1])]
    if origin in (typing.Union, types.UnionType):
        return [found for argument in arguments for found in _sections(argument)]
    return []


def _describe_all(error: ValidationError) -> str:
    """A sentence for each of the first mistakes, in the recipe's words."""
    found = error.errors()
    if any(one["loc"][:1] == ("sources",) for one in found):
        found = [one for one in found if one["loc"] != ("anchor",)]  # it is the first of them
    sentences = list(dict.fromkeys(_describe(one) for one in found))
    shown = [shortened(sentence, 400 if len(sentences) == 1 else 150) for sentence in sentences[:2]]
    return "; ".join(shown) + (f"; and {more} more" if (more := len(sentences) - 2) > 0 else "")


def _describe(error: Any) -> str:
    place, got = error["loc"], error.get("input")
    shown = ""
    if isinstance(got, str | int | float | bool):
        shown = f" (got {shortened(repr(got), 80)})"
    expected = error["msg"].removeprefix("Value error, ")
    of_source = place[:1] == ("sources",)
    if place == ("sources",) and error["type"] != "too_long":
        expected = "expected two sources or more, each as NAME: {model: ..., data: ...}"
        shown = f" (got {len(got)})" if error["type"] == "too_short" else ""
    elif of_source and len(place) == 2 and error["type"] in ("model_type", "dict_type"):
        expected = "expected {model: ..., data: ...}"
    elif of_source and place[2:3] == ("data",) and place[3:] in _DATA_BRANCHES:
        place = place[:3]
        expected = "expected a file, a list of files, or {hub: ..., column: ...}"
    elif error["type"] == "string_type" and shown:
        expected = "expected text; write it in quotes"
    where = ".".join(shortened(str(part), 60) for part in place)
    return f"{where}: {expected}{shown}" if where else expected


_DATA_BRANCHES = {("str",), ("list[str]",), ("HubData",)}
"""What pydantic says of text that is none of `Data`: one mistake, three times."""
