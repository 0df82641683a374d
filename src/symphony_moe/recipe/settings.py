"""What to build: one frozen object, read from YAML, with every check that needs no other file.

Unknown keys are refused with the nearest known name. A `method` is a preset for the sections below
it; any value that the recipe sets there wins. Loading makes every path absolute (they are relative
to the recipe's folder), so a resolved recipe means the same everywhere on the machine.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from symphony_moe.errors import shortened
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
"""Text. A number of YAML is taken as it was written."""

Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
Share = Annotated[Real, Field(ge=0, le=1e6, allow_inf_nan=False)]

Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
"""The range that every random generator takes."""

TEMPLATE_DATE = date(2025, 1, 1)
"""Today's date for chat templates, unless the recipe gives another."""

MOST_TOKENS = 10**15
"""More text than there is."""

LONGEST = 2**24
"""Tokens per window: more than any machine holds."""

MOST_STEPS = 10**6
"""Upper bound of steps, batches, checkpoints and evaluations."""

BUNDLED = "bundled:"
"""Prefix of models and texts that come with the package: `bundled:strangers/python`."""

FILL_IN = "FILL_IN"
"""Stands in a recipe that a command has written for `data` that only its user can name."""


class Section(BaseModel):
    """Settings that belong together. They cannot be changed, and unknown ones are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


@dataclass(frozen=True)
class ChatRules:
    """How the chats of a source are read."""

    format: Literal["messages", "sharegpt"] = "messages"
    """`messages`: lists of {role, content}. `sharegpt`: lists of {from, value} as well."""
    today: date = TEMPLATE_DATE
    """Today's date for templates that write it."""


class HubData(Section):
    """A dataset on the hub, or in a folder that `datasets` can load."""

    hub: Name
    """Dataset id on the hub, or a local folder that `datasets` can load."""
    split: Name = "train"
    """The split of the dataset to read."""
    column: Name = "text"
    """Column with the text, or with chat `messages`."""
    name: Name | None = None
    """Configuration of the dataset, if it has several."""
    revision: Name | None = None
    """Branch, tag or commit on the hub. Default: the newest."""
    streaming: bool = False
    """Read rows one by one, and only as many as the tokens need. Otherwise the whole split is
    fetched first. Works for datasets of any size, on the hub or in a local folder."""

    @property
    def is_on_hub(self) -> bool:
        """Whether `hub` is an id, and no folder: loading made those absolute."""
        return not Path(self.hub).is_absolute()


Data = str | list[str] | HubData
"""Text: files (`.jsonl`, `.txt`, `.parquet`), `bundled:<domain>`, or a dataset on the hub."""


class SourceSpec(Section):
    """One source: a dense checkpoint and text of its domain."""

    model: Name
    """Local folder, hub id, or a bundled model: `bundled:strangers/NAME` or
    `bundled:branches/NAME`, where NAME is `english`, `python`, `arithmetic` or `records`."""
    revision: Name | None = None
    """Branch, tag or commit on the hub. Default: the newest."""
    gguf_file: Name | None = None
    """Name of a GGUF file in `model` (a folder or hub id) to read the model from."""
    allow_pickle: bool = False
    """Read `pytorch_model*.bin` if there are no safetensors. torch's weights-only loader reads
    it."""
    adapter: Name | None = None
    """LoRA adapter to merge into the model: a folder or hub id, as `peft` saves it."""
    adapter_revision: Name | None = None
    """Branch, tag or commit of the adapter on the hub. Default: the newest."""
    data: Data
    """Text of this source's domain: `.jsonl`, `.txt` or `.parquet` files, `bundled:NAME`, or
    `{hub: ...}`. Calibration, training and evaluation read it."""
    column: Name = "text"
    """Column of `.jsonl` and `.parquet` files with the text. `messages` holds a chat, which is
    formatted by the source's chat template."""
    chat_format: Literal["messages", "sharegpt"] = "messages"
    """How the data stores chats. `messages`: each message has `role` and `content`. `sharegpt`:
    each has `from` and `value`; `human` becomes the role `user`, `gpt` the role `assistant`."""
    layers: list[Annotated[Whole, Field(ge=0, lt=10_000)] | None] | None = None
    """Where the layers of a source are that has fewer than another (`backbone.shapes: widest`).
    For each layer of the result: the number of this source's layer, counted from 0, or null for one
    that is added. Default: matched to the deepest source by calibration text, or spread evenly
    where the method reads none. A run writes it into its recipe."""
    sha256: dict[str, Name] | None = None
    """File name -> SHA-256, of every file of the source that is read: weights, config, tokenizer. A
    run writes it into its recipe. If given, it is checked."""

    @model_validator(mode="after")
    def _one_column(self) -> "SourceSpec":
        if isinstance(self.data, HubData) and self.column != "text":
            hub = self.data.hub
            raise ValueError(f"of a dataset the column stands in data: {{hub: {hub}, column: ...}}")
        return self


class Calibration(Section):
    """The text that alignment, fit and router initialisation run on."""

    tokens: Whole = Field(262_144, gt=0, le=MOST_TOKENS)
    """Calibration text in tokens, in total. Every source's data gives an equal share. Each gives at
    least one window, and one more for validation if something is fitted."""
    sequence_length: Whole = Field(2048, ge=2, le=LONGEST)
    """Tokens per window."""
    windows: Literal["random", "coverage"] = "random"
    """Which windows are used. `random`: drawn at random. `coverage`: half are drawn at random. The
    other half are chosen from up to 16 times as much text, for tokens and pairs of tokens that the
    others lack. Validation windows are always random."""
    domains: list[Name] | None = Field(None, min_length=1)
    """Sources whose text the alignment uses. Default: all. A fit needs the text of all of them."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format that matrices are multiplied in. Residual streams and weights stay in float32.
    `auto`: bfloat16 from a hidden size of 512 on, where the hardware multiplies it (a
    processor with AMX or AVX512-BF16, a GPU), otherwise float32."""
    seed: Seed = 114514
    """Seed for drawing windows."""


class Backbone(Section):
    """How the sources' shared parts are merged: attention, embeddings and norms."""

    attention: Literal["linear", "slerp", "anchor", "concatenated"] = "slerp"
    """How q, k, v and o are merged. `linear`: weighted mean. `slerp`: spherical interpolation.
    `anchor`: the anchor's. For biases and QK-norm gains `slerp` takes the weighted mean too.
    `concatenated`: nothing is merged, and the result has the attention heads of all sources. Its KV
    cache is as many times as large."""
    embeddings: Literal["selective-linear", "linear", "anchor"] = "selective-linear"
    """How token embeddings and output head are merged. `selective-linear`: a token's row is the
    weighted mean over the sources that have the token. `linear`: the weighted mean over all
    sources. `anchor`: the anchor's."""
    missing_tokens: Literal["skip", "pieces", "pursuit", "regression"] = "skip"
    """Rows of a source's tables for ordinary tokens that the anchor has and the source lacks.
    `skip`: read as the mean of its pieces, and left out of the merge and of what the head is fitted
    to. The others make a row that counts as the source's own. `pieces`: the head's row is that
    mean. The embedding's row is half of it and half of the last piece's row. `pursuit`: a sum of a
    few shared tokens' rows (orthogonal matching pursuit). `regression`: a linear map of the
    anchor's row."""
    norms: Literal["linear", "anchor"] = "linear"
    """How norm gains are merged. `linear`: weighted mean. `anchor`: the anchor's."""
    ffn: Literal["linear", "slerp", "anchor"] = "linear"
    """How FFNs are merged for `experts.dense_layers` and for the shared expert, as attention is.
    No effect where there are none."""
    shapes: Literal["equal", "widest"] = "equal"
    """Sources whose hidden sizes, head counts or depths differ. `equal`: refused. `widest`: smaller
    ones are padded to the largest in each dimension, which computes the same. Narrower FFNs are
    padded in any case."""
    weights: dict[str, Share] | None = None
    """Source -> weight in the merge. Weights are normalised to sum to one. Default: equal
    weights."""


class Align(Section):
    """Which symmetries of the sources are used to match them to the anchor."""

    residual: Literal["none", "orthogonal"] = "none"
    """Basis of each source's residual stream. `none`: its own. `orthogonal`: rotated onto the
    anchor's."""
    heads: Literal["none", "all"] = "none"
    """Attention heads. `none`: left as they are. `all`: matched to the anchor's, with value
    rotations and RoPE phases."""
    neurons: Literal["none", "activations", "auto"] = "activations"
    """Order of each expert's FFN neurons. `none`: its own. `activations`: matched to the anchor's
    by their activations. `auto`: matched only where neurons of several sources are mixed: in
    `experts.dense_layers`, and for a shared expert in all layers."""
    neuron_share: Real = Field(1.0, ge=0, le=1)
    """Fraction of an expert's neurons to match: those that correlate most with their match. The
    others fill the remaining places in their own order (Table 3)."""


class Experts(Section):
    """What the experts are."""

    init: Literal["source", "drop", "copy"] = "source"
    """Initialisation of the experts. `source`: expert i is source i's FFN. `drop`: the same, with a
    fraction of its neurons drawn anew. `copy`: every expert is a copy of the anchor's FFN."""
    attention: Literal["shared", "source"] = "shared"
    """`shared`: all experts share the merged attention. `source`: expert i keeps source i's q and
    o, and a second router chooses among them; only k and v are merged (BAM)."""
    sources: list[Name] | None = Field(None, min_length=1)
    """Sources that become experts. Default: all. The others give only text, for training and
    evaluation."""
    per_source: Literal[1, 2, 4, 8, 16] = 1
    """Experts that each source gives in each layer. Its FFN's neurons are dealt into so many
    experts of equal width. `router.top_k` counts sources: a token has this many times as many
    experts."""
    dense_layers: list[Annotated[Whole, Field(ge=0, lt=10_000)]] = []
    """Layers, counted from 0, that get no experts: one FFN each, merged from all sources by
    `backbone.ffn`. For sources whose MoE architecture has such layers: Llama, Qwen2 and Qwen3."""
    shared_weight: Real = Field(0.0, ge=0, lt=1)
    """Weight of a shared expert, which every token goes through beside its own experts. It is
    merged from all sources' FFNs by `backbone.ffn`. The others together have the rest of the
    weight. 0: no shared expert. For Llama and Qwen2 sources."""
    drop_share: Real = Field(0.5, ge=0, le=1)
    """Fraction of each expert's neurons that `drop` draws anew. They are drawn from a normal
    distribution with the matrix's mean and standard deviation."""


class Fit(Section):
    """How the new model is fitted to the sources, layer by layer, before any training."""

    method: Literal["none", "least-squares"] = "none"
    """`least-squares`: fit the new model's layers, one by one, to what the sources compute. `none`:
    no fit."""
    ridge: Real = Field(1e-2, gt=0, le=1e6)
    """Ridge penalty toward the aligned weights, as a fraction of the mean squared input."""
    epochs: Real = Field(8.0, ge=0, le=10_000)
    """Passes over the calibration text to refine each layer and the head by gradient steps, after
    the closed form. 0: the closed form alone."""
    learning_rate: Real = Field(0.06, gt=0, le=10)
    """Peak learning rate of the refinement (Adam, cosine schedule), relative to each tensor's root
    mean square."""
    embeddings: bool = True
    """Refine the token embeddings together with the first layer. `false`: they stay as they are
    fused."""
    layers_with_head: Whole = Field(1, ge=0, le=1_000)
    """Number of last layers that are refined a second time, together with the head, toward the
    sources' next-token distributions. Each takes the memory and time of one more layer. Where it
    does harm, and with 0, the head is refined alone."""
    pull: Real = Field(0.1, ge=0, le=1e9)
    """Decay toward the aligned weights during the refinement. Each step moves a tensor back by this
    many times the learning rate. More of it fits the calibration text less, and keeps more of what
    the sources know beyond it."""
    temperature_scaling: Real = Field(0.05, ge=0, le=1)
    """Temperature scaling of the fitted head. The logits are divided by the largest temperature
    that raises the validation KL divergence by at most this fraction. It reduces overconfidence out
    of domain. 0: off."""


class Router(Section):
    """Router initialisation and experts per token."""

    init: Literal["random", "regression", "ridge", "hidden"] = "random"
    """Router initialisation. `random`: normal, standard deviation 0.02. `regression`: logistic
    regression from router inputs to the source of the text. `ridge`: ridge regression to it, as in
    DUME. Where no layer is fitted, each source's text goes through its own expert while these
    inputs are gathered. `hidden`: the mean router input of each source's text."""
    temperature: Real = Field(1.0, ge=1e-6, le=1e9)
    """The rows of a router that is not random are divided by this. Higher: more even routing."""
    top_k: Whole = Field(2, ge=1, le=64)
    """Experts per token."""


class Output(Section):
    """How the new checkpoint is written."""

    architecture: Name = "auto"
    """Architecture of the output. `auto`: the family's first one that holds the source
    (docs/engines.md). `granitemoe`: for Qwen2 in llama.cpp and MLX, and for Llama 3 in MLX. Any
    other name must be an architecture that holds the sources."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the written weights."""
    max_shard_size: Name = "5GB"
    """Largest size of a weights file, such as `5GB`, `500MB` or `20KB`."""
    chat: Name | None = None
    """Source of the output's chat template, end and padding tokens, and generation config. Default:
    the anchor."""
    head_bias: bool = True
    """Write the zero bias of the output head for targets that have one (Qwen2's `ernie4_5_moe`).
    Without it transformers reports a missing tensor. No effect on other targets."""

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)


class Train(Section):
    """Training of the new checkpoint."""

    scope: Literal["router", "experts", "all"] = "all"
    """What is trained. `router`: the router. `experts`: router and experts. `all`: everything."""
    tokens: Whole = Field(10_000_000, gt=0, le=MOST_TOKENS)
    """Training tokens in total. Every source's data gives an equal share. Text that is shorter than
    its share is repeated."""
    learning_rate: Real = Field(5e-5, gt=0, le=1)
    """Peak learning rate of the cosine schedule."""
    warmup: Real = Field(0.03, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises from zero."""
    weight_decay: Real = Field(0.01, ge=0, le=10)
    """Weight decay of AdamW."""
    max_grad_norm: Real = Field(1.0, gt=0, le=1e9)
    """Gradient clipping: larger gradients are scaled down to this norm."""
    balance_weight: Real = Field(0.01, ge=0, le=1000)
    """Weight of the load-balancing loss, which is the stock model's own."""
    sequence_length: Whole = Field(2048, ge=2, le=LONGEST)
    """Tokens per window."""
    packing: Literal["windows", "documents"] = "windows"
    """What a token attends to. `windows`: all earlier tokens of its window. `documents`: those of
    its own document alone."""
    batch_size: Whole = Field(2, ge=1, le=MOST_STEPS)
    """Windows per batch on one device."""
    gradient_accumulation: Whole = Field(1, ge=1, le=MOST_STEPS)
    """Batches per step."""
    checkpoints: Whole = Field(4, ge=1, le=MOST_STEPS)
    """How many checkpoints to save for resuming, at equal intervals."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest loss on validation text. This may be the model before
    training. The validation text is an eighth of every source's documents. It is not trained on,
    and it is not held-out text. The loss is measured before training and at each of `checkpoints`.
    Training stops at half of its steps if the loss has not gone down by then. `false`: the last
    step's model is the result."""
    average: bool = False
    """Average the weights before training and after it. The share of the trained weights is 0, 1/4,
    1/2, 3/4 or 1: the one with the lowest loss on the validation text that `keep_best` describes.
    With `keep_best`, its best checkpoint takes the place of the last step's, if it is better than
    the model before training. `false`: the trained model is the result."""
    evaluations: Whole = Field(0, ge=0, le=MOST_STEPS)
    """How often to measure held-out loss during training, at equal intervals. The last measurement
    is the final evaluation. 0: only the final evaluation."""
    teacher: Literal["none", "sources"] = "none"
    """Distillation. `sources`: each window's own source is its teacher for the next-token
    distribution. `none`: no teacher."""
    teacher_weight: Real = Field(0.7, ge=0, le=1)
    """Weight of the KL divergence from the teacher. The language-model loss has the rest."""
    teacher_temperature: Real = Field(1.0, ge=0.01, le=1000)
    """Distillation temperature: both sides' logits are divided by it."""
    teacher_loading: Literal["auto", "together", "in-turn"] = "auto"
    """`together`: all teachers in memory. `in-turn`: one after the other. `auto`: together if they
    fit."""
    temperature_scaling: Real = Field(0.0, ge=0, le=1)
    """Temperature scaling at the end of training, in any scope. The final norm is divided by the
    largest temperature that raises the loss on the last training text by at most this fraction. It
    reduces overconfidence out of domain. 0: off."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the forward pass. Trained weights stay in float32. `auto`: bfloat16 on a GPU
    that supports it, otherwise float32."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of storing them. Takes less memory and more time."""
    report_to: str | list[str] = "none"
    """Where the Trainer's log goes besides `metrics.json`: `tensorboard`, `wandb`, ... Each is a
    package to install. Default: nowhere else."""

    @property
    def is_validated(self) -> bool:
        """Whether documents are kept from training for validation."""
        return self.keep_best or self.average


class Evaluation(Section):
    """Measurement on held-out text."""

    tokens: Whole = Field(65_536, gt=0, le=MOST_TOKENS)
    """Held-out tokens per domain."""
    holdout: Real = Field(0.05, gt=0, lt=1)
    """Fraction of documents to hold out, chosen by the hash of their text."""
    sequence_length: Whole = Field(2048, ge=2, le=LONGEST)
    """Tokens per window."""
    extra: dict[str, Data] = {}
    """Out-of-domain text: name -> data (in files, the column `text`). It is only evaluated."""
    seed: Seed | None = None
    """Seed for drawing held-out windows. Default: the recipe's seed."""
    thresholds: list[Annotated[Real, Field(ge=0, le=1)]] = []
    """Router probabilities to try dynamic routing at. A token uses every expert at or above the
    threshold, and always the most probable one. 1, 2, .. N experts for every token are measured
    beside them. Each takes one more evaluation. Default: not tried."""


class Compare(Section):
    """What `symphony compare` builds, trains and puts into one table."""

    methods: list[Name] | None = Field(None, min_length=1)
    """Presets, or names of `variants`, in the order of the table. Default: all presets."""
    seeds: list[Seed] = Field([114514], min_length=1)
    """Each method is built and trained once per seed. The seed sets calibration text, router and
    training."""
    reference: Name = "symphony"
    """Method whose final loss is the target: the table says how soon the others reach it. Default:
    `symphony` if it is compared, otherwise the first method."""
    variants: dict[str, dict[str, Any]] = {}
    """Name -> settings that replace the recipe's, such as `{method: symphony, align: {neurons:
    none}}`."""


class FormerSource(Section):
    """A model that is in the backbone of a changed run, and whose expert was taken out."""

    name: Name
    """What the recipe called it."""
    hub_ids: list[Name] = []
    """Its ids on the hub, as far as its files or the recipe say them."""
    licences: list[dict[str, Name | None] | None] = [None]
    """Of the model, and of its adapter (`sources.provenance.Licence`). Null: no file names one."""
    languages: list[Name] = []
    """As ISO 639 abbreviates them."""


class Parent(Section):
    """The run that a change of experts began with. `symphony add`, `remove` and `replace` write it;
    the new run's backbone and other experts are that run's."""

    model: Literal["checkpoint", "trained"]
    """Which of its models."""
    sha256: Name
    """What tells that model from others: of the hashes of its tensors (`KeptModel`)."""
    added: Name | None = None
    """The expert that was made anew."""
    removed: Name | None = None
    """The expert that was left out. `replace` adds and removes one of the same name."""
    tied_head: bool
    """Whether its head is its token embeddings, and so the new run's."""
    trained: bool = False
    """Whether weights that were kept have been trained."""
    former: list[FormerSource] = []
    """The models whose experts this change and earlier ones have taken out."""


class Recipe(Section):
    """Everything that one build needs to know, checked."""

    sources: dict[str, SourceSpec] = Field(min_length=2, max_length=64)
    """Name -> source. One expert each, in this order."""
    anchor: Name
    """The source whose tokenizer, context length and chat template the result has. Methods that
    align bring the others into its coordinates. Default: the first."""
    method: Name = "symphony"
    """Preset, whose values are the defaults of the sections below: `symphony`, `harmonized`, `btx`,
    `bam`, `drop-upcycling`, `sparse-upcycling` or `dume`."""
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
    """What `symphony compare` compares. A single build does not use it."""
    seed: Seed = 114514
    """Seed of router initialisation and training."""
    chat_date: date = TEMPLATE_DATE
    """Today's date for chat templates (those of Llama 3.2 write it). It is fixed, so that the same
    recipe gives the same text on any day."""
    parent: Parent | None = None
    """The run whose experts were changed. Not for recipes that are written by hand: what stands
    here, `symphony add`, `remove` and `replace` have found."""

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        # The rules know this class, so they are imported when there is one.
        from symphony_moe.recipe.rules import refuse_contradictions

        refuse_contradictions(self)
        parse_size(self.output.max_shard_size)
        return self

    @property
    def newcomer(self) -> str | None:
        """The one expert that a change of experts makes; None where all are made, or none."""
        return None if self.parent is None else self.parent.added

    @property
    def only_removes(self) -> bool:
        """Whether nothing is computed, as an expert was left out and none is new."""
        return self.parent is not None and self.parent.added is None

    @property
    def needs_calibration(self) -> bool:
        """Whether stage 1 runs models on calibration text."""
        return (self.aligns or self.fits) and not self.only_removes

    @property
    def copies_anchor(self) -> bool:
        """Whether every expert is a copy of the anchor's FFN."""
        return self.experts.init == "copy"

    @property
    def redraws_neurons(self) -> bool:
        """Whether a share of each expert's neurons is drawn at random."""
        return self.experts.init == "drop"

    @property
    def copies_experts(self) -> bool:
        """Whether every expert's weights are written as they are read, and nothing is computed
        with a layer but means."""
        return not (self.aligns or self.fits or self.folds or self.redraws_neurons)

    @property
    def has_shared_expert(self) -> bool:
        """Whether every token goes through one expert more than its router chooses."""
        return self.experts.shared_weight > 0

    @property
    def merges_ffns(self) -> bool:
        """Whether the FFNs of several sources become one, in any layer."""
        has_merged = bool(self.experts.dense_layers) or self.has_shared_expert
        return has_merged and self.backbone.ffn != "anchor"

    @property
    def merges_backbone(self) -> bool:
        """Whether weights of several sources become one outside the FFNs."""
        settings = self.backbone
        return {settings.attention, settings.embeddings, settings.norms} != {"anchor"}

    @property
    def concatenates_heads(self) -> bool:
        """Whether the new model has the attention heads of all sources."""
        return self.backbone.attention == "concatenated"

    @property
    def has_attention_experts(self) -> bool:
        """Whether experts have queries and outputs of their own, with a router of their own."""
        return self.experts.attention == "source"

    @property
    def aligns_residual(self) -> bool:
        """Whether each source's residual stream is rotated onto the anchor's."""
        return self.align.residual != "none"

    @property
    def aligns_heads(self) -> bool:
        """Whether attention heads are matched to the anchor's."""
        return self.align.heads != "none"

    @property
    def aligns_neurons(self) -> bool:
        """Whether FFN neurons are matched to the anchor's, in any layer."""
        return self.aligns_neurons_in(None)

    def aligns_neurons_in(self, layer: int | None) -> bool:
        """Whether FFN neurons are matched to the anchor's in a layer (None: in any). Copies of one
        FFN need no match."""
        dense = self.experts.dense_layers
        mixes = self.has_shared_expert or (bool(dense) if layer is None else layer in dense)
        mixes &= self.backbone.ffn != "anchor"
        if self.align.neurons == "auto":
            return mixes
        return self.align.neurons == "activations" and (mixes or not self.copies_anchor)

    @property
    def aligns(self) -> bool:
        """Whether the sources are compared with the anchor on the calibration text."""
        return self.aligns_residual or self.aligns_heads or self.aligns_neurons

    @property
    def fits_layers(self) -> bool:
        """Whether the new model's layers and head are fitted to what the sources compute."""
        return self.fit.method != "none"

    @property
    def refines(self) -> bool:
        """Whether what is fitted in closed form is then refined by gradient steps."""
        return self.fits_layers and self.fit.epochs > 0

    @property
    def refines_embeddings(self) -> bool:
        """Whether the token embeddings learn with the first layer."""
        return self.refines and self.fit.embeddings and self.parent is None

    @property
    def layers_with_head(self) -> int:
        """Last layers that learn with the head, as far as there are so many. Of a change of experts
        neither they nor the token embeddings learn."""
        return self.fit.layers_with_head if self.refines and self.parent is None else 0

    @property
    def fits_router(self) -> bool:
        """Whether the router is initialised from the new model's own router inputs."""
        return self.router.init != "random"

    @property
    def routes_by_source(self) -> bool:
        """Whether the text that routers are fitted on goes through its source's expert, and not
        where the router sends it (DUME). A fit of layers wants the model as it will be."""
        return self.router.init == "ridge" and not self.fits_layers

    @property
    def fits(self) -> bool:
        """Whether the new model itself is run on the calibration text, layer by layer."""
        return self.fits_layers or self.fits_router

    @property
    def widens(self) -> bool:
        """Whether sources of unequal shapes are padded to one."""
        return self.backbone.shapes == "widest"

    @property
    def folds(self) -> bool:
        """Whether norm gains are folded into the matrices that read them, and a tied head untied.

        A rotated residual stream has no place for gains, and a fit does not know them.
        """
        return self.aligns_residual or self.fits_layers

    @property
    def distills(self) -> bool:
        """Whether the sources are teachers in training."""
        return self.train.teacher != "none"

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
        """Calibration windows per source, validation windows included."""
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

    def builds_the_same(self, other: "Recipe") -> bool:
        """Whether two recipes say the same of a run, whatever hashes their sources are pinned to,
        and wherever their layers were found to belong."""
        return self._bare(other).to_yaml() == other._bare(self).to_yaml()

    def differences(self, other: "Recipe") -> list[str]:
        """What a recipe that is not the same, that of a folder, has otherwise: `fit.epochs 4 (there
        8)`, `source c (there none)`, `the files of c`; the order of the sources, if nothing
        else."""
        mine, theirs = self.sources, other.sources
        shared = [name for name in mine if name in theirs]
        found = [f"source {name} (there none)" for name in mine if name not in theirs]
        found += [f"no source {name} (there one)" for name in theirs if name not in mine]
        here, there = self._bare(other)._flat(shared), other._bare(self)._flat(shared)
        for key in dict.fromkeys([*here, *there]):
            if here.get(key) != there.get(key):
                now, before = (_shown(flat.get(key)) for flat in (here, there))
                found.append(f"{key} {now} (there {before})")
        for name in shared:
            hashes = mine[name].sha256, theirs[name].sha256
            if all(hashes) and hashes[0] != hashes[1]:
                found.append(f"the files of {name}")
        return found or ["the order of the sources"]

    def _flat(self, sources: Collection[str]) -> dict[str, Any]:
        """Dotted key -> value, of these sources and of all other settings."""
        content = self.to_content(without=("compare",))
        content["sources"] = {name: content["sources"][name] for name in sources}
        return _flattened(content)

    def _bare(self, other: "Recipe") -> "Recipe":
        """Without what a run writes into a recipe: hashes, and places of layers where the other
        recipe leaves them open."""
        bare = {}
        for name, spec in self.sources.items():
            theirs = other.sources.get(name)
            is_open = theirs is None or theirs.layers is None
            update = {"sha256": None} | ({"layers": None} if is_open else {})
            bare[name] = spec.model_copy(update=update)
        return self.model_copy(update={"sources": bare})

    def layers_of(self, other: "Recipe") -> dict[str, list[int | None]]:
        """Source -> places of its layers, where another recipe leaves them open that says the same
        otherwise; nothing where it does not."""
        if not self.builds_the_same(other):
            return {}
        return {
            name: spec.layers
            for name, spec in self.sources.items()
            if spec.layers is not None and other.sources[name].layers is None
        }

    def with_layers(self, layers: Mapping[str, Sequence[int | None]]) -> "Recipe":
        """With the places of some sources' layers."""
        sources = {
            name: spec.model_copy(update={"layers": list(layers[name])}) if name in layers else spec
            for name, spec in self.sources.items()
        }
        return self.model_copy(update={"sources": sources})

    def to_yaml(self) -> str:
        """The resolved recipe of one build: every setting spelled out."""
        return write_yaml(self.to_content(without=("compare",)))

    def to_content(self, without: Collection[str]) -> dict[str, Any]:
        """Every setting, without some sections, as YAML writes it."""
        unspoken = {*without} | ({"parent"} if self.parent is None else set())
        return self.model_dump(mode="json", exclude=unspoken)


def _flattened(content: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {key: content}
    parts = (_flattened(value, f"{key}.{name}".lstrip(".")) for name, value in content.items())
    return {name: value for part in parts for name, value in part.items()}


def _shown(value: Any) -> str:
    """A value in one short line."""
    return shortened(" ".join(str(value).split()), 40)


def parse_size(text: str, setting: str = "output.max_shard_size") -> int:
    """Bytes in a size such as `5GB` (1 GB = 10**9 bytes). Raises ValueError, which names the
    `setting`."""
    pattern = r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(KB|MB|GB)\s*"
    found = re.fullmatch(pattern, text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise ValueError(f"{setting}: expected a size such as 8GB or 500MB, got {text!r}")
    return int(float(found[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2].upper()])
