"""What to build: one frozen object, read from YAML, with every check that needs no file but its
own.

Unknown keys are refused with the nearest known name. A `method` is a preset for the sections below
it; any value that the recipe sets there wins. Loading makes every path absolute (they are relative
to the recipe's folder), so a resolved recipe means the same everywhere on the machine.
"""

import re
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from symphony_moe.recipe.yaml_text import SpelledFloat, SpelledInt, spelled, write_yaml


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


class Fit(Section):
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
    temperature_scaling: Real = Field(0.05, ge=0, le=1)
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
    temperature_scaling: Real = Field(0.0, ge=0, le=1)
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
    fit: Fit = Fit()
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
                "calibration.domains: a fit (fit.method, or a calibrated router.init) needs text "
                "of every source; leave calibration.domains out, or fit nothing"
            )
        if self.experts.init == "drop" and self.fits_layers:
            raise ValueError(
                "fit.method: fits each expert to its source, but experts.init drop draws a share "
                "of its neurons anew; set it to none, or experts.init to source"
            )
        if self.experts.attention == "source":
            fits = "a fit knows only attention that all experts share"
            refused = (
                (
                    "experts.init",
                    self.experts.init == "copy",
                    "source",
                    "copies of one expert have no attention of their sources",
                ),
                ("fit.method", self.fits_layers, "none", fits),
                ("router.init", self.fits_router, "random", fits),
                (
                    "train.gradient_checkpointing",
                    self.train.gradient_checkpointing,
                    "false",
                    "the stock class of attention experts does not have it",
                ),
            )
            for setting, is_set, instead, reason in refused:
                if is_set:
                    raise ValueError(
                        f"{setting}: {reason}; set it to {instead}, or experts.attention to shared"
                    )
        if self.experts.init == "copy":
            of_sources = {
                "align.residual": self.align.residual == "orthogonal",
                "align.heads": self.align.heads == "all",
                "fit.method": self.fits_layers,
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
    def fits_layers(self) -> bool:
        """Whether the new model's layers and head are fitted to what the sources compute."""
        return self.fit.method != "none"

    @property
    def fits_router(self) -> bool:
        """Whether the router is initialised from the new model's own router inputs."""
        return self.router.init != "random"

    @property
    def folds(self) -> bool:
        """Whether norm gains are folded into what reads them (and a tied head untied): a rotation
        of the residual stream, and a fit of what reads it, know no gains."""
        return self.align.residual != "none" or self.fits_layers

    @property
    def aligns(self) -> bool:
        """Whether the sources are compared with the anchor on the calibration text."""
        aligned = (self.align.residual, self.align.heads)
        return self.aligns_neurons or any(setting != "none" for setting in aligned)

    @property
    def fits(self) -> bool:
        """Whether the new model itself is run on the calibration text, layer by layer."""
        return self.fits_layers or self.fits_router

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
        """Windows of calibration text of every source that gives some, with those that validate."""
        settings = self.calibration
        domains = len(self.calibration_domains)
        return max(1, settings.tokens // domains // settings.sequence_length)

    @property
    def validation_windows(self) -> int:
        """Windows of every source's calibration text that a fit is validated by: one in 16; four
        where that is fewer, but no more than one in four, and at least one."""
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
