"""What a build will do, from headers and tokenizers alone: refuse early, write nothing.

The list of output tensors comes from the same function that later writes them
(`families.layer_outputs`), run on tensors without memory.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from symphony_moe.engines import Reading, readings
from symphony_moe.families import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    HEAD_BIAS,
    Family,
    MoELayer,
    head_dim,
    layer_outputs,
    queries_per_kv,
    stream_scale,
    target_config,
)
from symphony_moe.forward import LOGITS_AT_ONCE, WINDOWS_TOKENS
from symphony_moe.recipe import BUNDLED, Recipe
from symphony_moe.route import windows_for_router
from symphony_moe.shards import BYTES, assign_shards
from symphony_moe.sources import (
    TABLE_ROWS,
    Difference,
    Source,
    anchor_of,
    compare_sources,
    expected_shapes,
    is_tied,
    public_name,
    refuse_mismatch,
    remarks,
    target_of,
)

STREAMS_IN_MEMORY = 2 * 1024**3
"""Residual streams of the calibration text larger than this (bytes) wait in memory-mapped files."""

_PROCESS = 600 * 1024**2
"""Memory of the interpreter and the libraries, in bytes."""

NOTE_PERMUTATION = (
    "align.neurons reorders each expert's hidden neurons; this by itself does not change what an "
    "MoE with separate experts computes, before or after training (docs/paper-map.md). It is "
    "recorded and reported"
)


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a weight is read."""

    architecture: str
    """`model_type` of the output."""
    family: str
    """`model_type` of the sources."""
    sources: list[dict[str, Any]]
    differences: list[Difference]
    tensors: dict[str, tuple[int, ...]]
    """Every tensor of the output: name -> shape, in the order of writing."""
    config: dict[str, Any]
    """The output's config.json."""
    dtype: str
    total_parameters: int
    active_parameters: int
    """Parameters that a token passes through: everything but the experts it is not routed to."""
    disk_bytes: int
    """Size of the output's weights."""
    shards: int
    work_bytes: int
    """Disk space that stage 1 needs beside the weights and gives back at its end."""
    peak_memory_bytes: int
    """Estimate for stage 1."""
    seconds: float
    """Rough estimate for stage 1, from this machine's speed at multiplying matrices."""
    readers: list[Reading]
    """Which programs read the output, and what each makes of it."""
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["tensors"] = {name: list(shape) for name, shape in self.tensors.items()}
        return content


def make_plan(
    recipe: Recipe, sources: Sequence[Source], opened: Sequence[Source] | None = None
) -> Plan:
    """Plan a build. `opened`: all of the recipe's sources, where some are no experts.

    Raises SourceMismatch where it cannot be done.
    """
    differences = compare_sources(sources, recipe.anchor, recipe.output.chat)
    refuse_mismatch(differences)
    anchor = anchor_of(recipe, sources)
    family = anchor.family
    tied = is_tied(recipe, sources)
    tensors = output_tensors(family, anchor.config, len(sources), tied=tied)
    if family.has_head_bias and recipe.output.head_bias:
        tensors[HEAD_BIAS] = (anchor.config.vocab_size,)
    total = sum(math.prod(shape) for shape in tensors.values())
    active = total - _one_expert(family, anchor.config) * (len(sources) - recipe.router.top_k)
    config = target_config(
        family,
        anchor.config,
        len(sources),
        recipe.router.top_k,
        tied=tied,
        dtype=recipe.output.dtype,
    )
    if anchor.vocabulary is not None:
        config |= anchor.vocabulary.settings
    disk = total * BYTES[recipe.output.dtype]
    return Plan(
        architecture=family.moe,
        family=family.dense,
        sources=[describe(source, recipe) for source in sources],
        differences=differences,
        tensors=tensors,
        config=config,
        dtype=recipe.output.dtype,
        total_parameters=total,
        active_parameters=active,
        disk_bytes=disk,
        shards=len(assign_shards(tensors, recipe.output.dtype, recipe.output.max_shard_bytes)),
        work_bytes=_work(recipe, anchor.config, len(sources)),
        peak_memory_bytes=_peak_memory(recipe, anchor.config, len(sources)),
        seconds=_seconds(recipe, sources, anchor.config),
        readers=readings(config, sentencepiece=anchor.owner.kind == "SentencePiece BPE"),
        notes=_notes(recipe, sources, differences, opened or sources),
    )


def describe(source: Source, recipe: Recipe) -> dict[str, Any]:
    """What the plan and the model card say of one source."""
    spec = recipe.sources[source.name]
    return {
        "name": source.name,
        "model": source.public_name,
        "gguf_file": spec.gguf_file,
        "adapter": None if spec.adapter is None else public_name(spec.adapter),
        "adapter_base": None if (base := _adapter_base(source)) is None else public_name(base),
        "architecture": source.config.model_type,
        "parameters": source.num_parameters,
        "dtype": ", ".join(sorted({header.dtype for header in source.headers.values()})),
        "files": len({header.file for header in source.headers.values()}),
        "anchor": source.name == recipe.anchor,
    }


def in_words(described: Mapping[str, Any]) -> str:
    """The model of a source that is described: which file of it, and the LoRA that is merged."""
    words = str(described["model"])
    if described["gguf_file"]:
        words += f", {described['gguf_file']}"
    if described["adapter"]:
        words += f", with the LoRA {described['adapter']}"
    return words + (f" of {described['adapter_base']}" if described["adapter_base"] else "")


def _adapter_base(source: Source) -> str | None:
    """The model that its adapter says it was trained on."""
    base = None if source.adapter is None else source.adapter.config.base_model_name_or_path
    return str(base) if base else None


def output_tensors(
    family: Family, config: PreTrainedConfig, num_experts: int, *, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the output, name -> shape, in the order of writing."""
    shapes = expected_shapes(config)
    tensors = {EMBEDDING: shapes[EMBEDDING]}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        blank = {name: torch.empty(shapes[prefix + name], device="meta") for name in family.shared}
        own = {name: torch.empty(shapes[prefix + name], device="meta") for name in family.expert}
        router = torch.empty(num_experts, config.hidden_size, device="meta")
        attention_router = None if family.attention_router is None else router
        moe = MoELayer(blank, [own] * num_experts, router, attention_router)
        for name, tensor in layer_outputs(family, config, layer, moe):
            tensors[name] = tuple(tensor.shape)
    tensors[FINAL_NORM] = shapes[FINAL_NORM]
    if not tied:
        tensors[HEAD] = shapes[EMBEDDING]
    return tensors


def _one_expert(family: Family, config: PreTrainedConfig) -> int:
    """Parameters of one expert, in all layers."""
    shapes = expected_shapes(config)
    one_layer = sum(math.prod(shapes[f"model.layers.0.{name}"]) for name in family.expert)
    return one_layer * config.num_hidden_layers


def streams_bytes(recipe: Recipe, config: PreTrainedConfig, num_sources: int) -> int:
    """Size of the residual streams that wait between layers, at the larger of two moments: all
    sources on the whole text while they are aligned; and, while the new model is fitted, on each
    source's own text, the source's stream at three places of a layer, the new model's at two and
    the plain mean's on some."""
    windows = recipe.windows_each
    to_fit = max(1, windows - recipe.windows_aside)
    whole = to_fit + recipe.windows_aside
    aligning = len(recipe.calibration_domains) * whole if recipe.aligns else 0
    fitting = 2 * whole if recipe.fits else 0
    if recipe.refit.method != "none":
        router = len(windows_for_router(num_sources, recipe.calibration.sequence_length, to_fit))
        fitting = 5 * whole + recipe.windows_aside + router
    tokens = num_sources * max(aligning, fitting) * recipe.calibration.sequence_length
    return tokens * config.hidden_size * 4


def streams_in_memory(recipe: Recipe, config: PreTrainedConfig, num_sources: int) -> bool:
    """Whether the residual streams wait in memory between layers, or in memory-mapped files."""
    return streams_bytes(recipe, config, num_sources) <= STREAMS_IN_MEMORY


def _work(recipe: Recipe, config: PreTrainedConfig, num_sources: int) -> int:
    """What lies under `work/` at once: how every layer compares with the anchor's (float64 for the
    residual stream, float32 for heads, int64 for neurons), and streams that wait in files."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    one_layer = 0
    if recipe.align.residual != "none":
        one_layer += hidden**2 * 8 * (2 if recipe.fits else 1)
    if recipe.align.heads != "none":
        size, groups = head_dim(config), config.num_key_value_heads
        one_layer += config.num_attention_heads * 8 + groups * (size // 2 + size**2) * 4
    if recipe.aligns_neurons:
        one_layer += ffn * 8
    records = (num_sources - 1) * config.num_hidden_layers * one_layer
    in_memory = streams_in_memory(recipe, config, num_sources)
    return records + (0 if in_memory else streams_bytes(recipe, config, num_sources))


def _peak_memory(recipe: Recipe, config: PreTrainedConfig, num_sources: int) -> int:
    """The largest of these moments: a block of every source's embedding table; one layer of every
    source with its statistics, while they are aligned, fused or fitted; the output head while it is
    fitted. float32 where it waits, float64 where it is fused, matched or solved."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    family = target_of(recipe).family(config.model_type)
    shapes = expected_shapes(config)
    layer_shapes = {
        name: shape for name, shape in shapes.items() if name.startswith("model.layers.0.")
    }
    layer = sum(math.prod(shape) for shape in layer_shapes.values())
    largest = max(math.prod(s) for name, s in layer_shapes.items() if ".self_attn." in name)
    streams = 0
    if streams_in_memory(recipe, config, num_sources):
        streams = streams_bytes(recipe, config, num_sources)
    batch = max(WINDOWS_TOKENS, recipe.calibration.sequence_length)
    statistics = matching = 0
    if recipe.aligns_neurons:
        statistics += (num_sources - 1) * ffn * ffn * 4
        matching = ffn * ffn * 24
    texts = 2 if recipe.fits else 1  # maps are judged on text of its own
    if recipe.align.residual != "none":
        statistics += texts * (num_sources - 1) * hidden * hidden * 8
    if recipe.align.heads != "none":
        width = config.num_attention_heads * head_dim(config)
        statistics += texts * (num_sources - 1) * width**2 * 8
    activations = batch * (ffn * 20 + hidden * 40)
    fusing = (num_sources + 2) * largest * 8
    reordered = num_sources * 3 * hidden * ffn * 4
    if family.stacks_experts:
        # Two FFN matrices of all experts in one tensor, and that rounded.
        reordered += num_sources * 2 * hidden * ffn * (4 + BYTES[recipe.output.dtype])
    if stream_scale(family, config) != 1:
        reordered += num_sources * (hidden * ffn + largest) * 4
    moments = [
        TABLE_ROWS * hidden * (num_sources * 4 + 16),
        num_sources * layer * 4 + statistics + max(activations, matching, fusing + reordered),
    ]
    if recipe.fits:
        # Every source's layer as it is and aligned; the new layer as it was, is, and is tried.
        layers = 5 * num_sources * layer * 4
        windows = max(batch, num_sources * recipe.calibration.sequence_length)
        solving = 3 * (ffn + 1) ** 2 * 8 + 2 * ffn * hidden * 8
        learning = num_sources * layer * 12 + windows * (ffn * 24 + hidden * 120)
        moments.append(layers + max(solving, learning))
    if recipe.refit.method != "none":
        # All sources' heads, the fused one, the fitted one, its gradient and Adam's two moments.
        table = config.vocab_size * hidden * 4
        moments.append((num_sources + 6) * table + 6 * LOGITS_AT_ONCE * 4)
    return _PROCESS + streams + max(moments)


def _seconds(recipe: Recipe, sources: Sequence[Source], config: PreTrainedConfig) -> float:
    tokens = recipe.calibration.tokens
    num_weights = sum(source.num_parameters for source in sources)
    # Tables of embeddings and heads are not multiplied with until the head is fitted.
    tables = sum(1 if source.config.tie_word_embeddings else 2 for source in sources)
    table = config.vocab_size * config.hidden_size
    one_source = (num_weights - tables * table) / len(sources)
    operations = assignment = 0.0
    if recipe.aligns:
        operations += 2.0 * tokens * one_source * len(sources)
    if recipe.aligns_neurons:
        pairs = (len(sources) - 1) * config.num_hidden_layers
        operations += 2.0 * tokens * config.intermediate_size**2 * pairs
        # Measured: 0.6 s for 2240 neurons that hardly correlate, 2.2 s for 4480.
        assignment = 2.2 * (config.intermediate_size / 4480) ** 2 * pairs
    if recipe.fits:
        active = one_source * recipe.router.top_k  # an upper bound: attention counts once
        operations += 2.0 * tokens * 2 * active
    if recipe.refit.method != "none":
        # Each source on its own text, the Gram matrices, and forward and backward per epoch.
        operations += 2.0 * tokens * 2 * one_source
        operations += 2.0 * tokens * config.intermediate_size**2 * config.num_hidden_layers
        operations += recipe.refit.epochs * tokens * (6.0 * active + 6.0 * table)
    reading_and_writing = 12 * num_weights / 500e6
    return 5.0 + operations / _matmul_speed() + assignment + reading_and_writing


def _matmul_speed() -> float:
    """Floating-point operations per second of this machine in float32: the best of some products,
    so that what else runs for a moment does not count, halved, as attention, norms and elementwise
    work come on top."""
    size = 1024
    matrix = torch.ones(size, size)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 2


def beyond_context(recipe: Recipe, opened: Sequence[Source], *sections: str) -> list[str]:
    """A sentence for each of the sections (`calibration`, `train`, `evaluation`) whose windows are
    longer than the context of a model that reads them: RoPE goes on there, but no training was."""
    sentences = []
    for section in sections:
        length = getattr(recipe, section).sequence_length
        contexts = {
            source.name: source.config.max_position_embeddings
            for source in opened
            if source.name in _readers(recipe, section)
        }
        short = [f"{name} ({context})" for name, context in contexts.items() if context < length]
        if short:
            sentences.append(
                f"{section}.sequence_length {length} is beyond the context of {', '.join(short)}"
            )
    return sentences


def _readers(recipe: Recipe, section: str) -> list[str]:
    """The sources whose models read a section's windows. The result has the anchor's context."""
    if section == "calibration":
        return recipe.expert_names if recipe.aligns or recipe.fits else []
    if section == "train" and recipe.train.teacher == "none":
        return [recipe.anchor]
    return list(recipe.sources)


def _notes(
    recipe: Recipe,
    sources: Sequence[Source],
    differences: Sequence[Difference],
    opened: Sequence[Source],
) -> list[str]:
    notes = [str(d) for d in differences if d.verdict == "warning"]
    for source in opened:
        notes += remarks(source)
        notes += [f"{source.name}: {note}" for note in _of_adapter(source)]
        notes += [f"{source.name}: {note}" for note in _of_text(recipe, source)]
    notes += _of_ends(recipe, sources)
    if recipe.aligns_neurons:
        notes.append(NOTE_PERMUTATION)
    if recipe.refit.method != "none":
        notes.append(
            "refit: stage 1 goes through the calibration text "
            f"{recipe.refit.epochs:g} times per layer (refit.epochs); 0 keeps the closed form alone"
        )
    if any(source.config.tie_word_embeddings for source in sources) and recipe.folds:
        notes.append("the output's head is untied: the final norm's gain is folded into it")
    anchor = anchor_of(recipe, sources)
    grown = queries_per_kv(anchor.config)
    if anchor.family.repeats_kv and grown > 1:
        notes.append(
            f"{anchor.family.moe} has a KV head for every query head: k and v, and the KV cache of "
            f"the result, are {grown} times the sources'"
        )
    scale = stream_scale(anchor.family, anchor.config)
    if scale != 1:
        notes.append(
            f"{anchor.family.moe}'s norms have a fixed epsilon of {anchor.family.norm_eps}, "
            f"{anchor.name}'s {anchor.config.rms_norm_eps}: the residual stream is written "
            f"{scale:.4g} times as large, which computes the same"
        )
    notes += beyond_context(recipe, opened, "calibration", "train", "evaluation")
    each = max(1, recipe.windows_each - recipe.windows_aside) + recipe.windows_aside
    least = each * len(recipe.calibration_domains) * recipe.calibration.sequence_length
    if (recipe.aligns or recipe.fits) and recipe.calibration.tokens < least:
        notes.append(
            f"calibration.tokens {recipe.calibration.tokens:,} is less than what is used at least: "
            f"{least:,}, {each} window(s) of every source"
        )
    if recipe.experts.init == "copy":
        notes.append(f"experts.init copy: every expert is {recipe.anchor}'s FFN; nothing to align")
    if recipe.backbone.attention == "anchor" and recipe.backbone.weights is not None:
        notes.append("backbone.weights has no effect on attention: it is the anchor's")
    return notes + _without_effect(recipe)


def _of_text(recipe: Recipe, source: Source) -> Iterator[str]:
    """What is to be said of how a source's documents are spelled."""
    encoder = source.encoder
    if encoder.end is None:
        why = (
            f"its EOS {encoder.end_text!r} is not in the shared vocabulary"
            if encoder.end_text
            else "neither its tokenizer nor its config names an EOS"
        )
        yield f"{why}: nothing ends its documents, and the result learns no end of them"
    if "strftime_now" in str(getattr(source.own_tokenizer, "chat_template", "")):
        yield f"its chat template writes the date, and is told {recipe.chat_date} (chat_date)"


def _of_ends(recipe: Recipe, sources: Sequence[Source]) -> Iterator[str]:
    """Sources whose documents end otherwise than the anchor's."""
    own = anchor_of(recipe, sources).encoder.end
    for source in sources:
        encoder = source.encoder
        if encoder.end not in (None, own):
            yield (
                f"{source.name}: its documents end with {encoder.end_text!r}, at which generation "
                "stops as well (eos_token_id of the generation config)"
            )


def _of_adapter(source: Source) -> Iterator[str]:
    """What is to be said of a source's adapter, and of the tokenizer beside it."""
    adapter, base = source.adapter, _adapter_base(source)
    if adapter is None:
        return
    if base is not None and Path(base).name != Path(source.model).name:
        yield (
            f"its adapter was trained on {public_name(base)}, and is merged into "
            f"{source.public_name}; are they the same model?"
        )
    yield from adapter.notes()
    tokenizer = source.own_tokenizer
    if source.tokenizer_folder is not None:
        whole = source.tokenizer_folder == adapter.folder
        what = "the one" if whole else "the model's with the files"
        yield (
            f"its tokenizer is {what} beside its adapter: {len(tokenizer)} tokens, "
            f"{'a' if tokenizer.chat_template else 'no'} chat template, text ends with "
            f"{tokenizer.eos_token!r}"
        )
    unnamed = set(adapter.tokens.get(EMBEDDING, ())).difference(tokenizer.get_vocab().values())
    if unnamed:
        yield (
            f"its adapter trained {len(unnamed)} row(s) of no token of its tokenizer, from "
            f"{min(unnamed)}; they stay padding. Put the tokenizer that it was trained with beside "
            "it"
        )


def _is_here(model: str) -> bool:
    """Whether it is bundled or a local folder, and nothing on the hub."""
    return model.startswith(BUNDLED) or Path(model).exists()


def _without_effect(recipe: Recipe) -> list[str]:
    """What a user has set (to another value than the default) that nothing reads."""
    of_refit = ("refit.ridge", "refit.epochs", "refit.learning_rate", "refit.pull", "refit.soften")
    of_teacher = ("train.teacher_weight", "train.teacher_temperature", "train.teacher_loading")
    unread = (
        (recipe.refit.method == "none", "refit.method is none", of_refit),
        (
            recipe.refit.method != "none" and recipe.refit.epochs == 0,
            "refit.epochs is 0",
            ("refit.learning_rate", "refit.pull"),
        ),
        (recipe.router.init == "random", "router.init is random", ("router.temperature",)),
        (not recipe.aligns_neurons, "no neurons are matched", ("align.neuron_share",)),
        (recipe.experts.init != "drop", "experts.init is not drop", ("experts.drop_share",)),
        (recipe.train.teacher == "none", "train.teacher is none", of_teacher),
    )
    notes = []
    for name, spec in recipe.sources.items():
        if spec.revision is not None and _is_here(spec.model):
            notes.append(f"sources.{name}.revision has no effect: the model is not on the hub")
        if spec.adapter_revision is not None and (spec.adapter is None or _is_here(spec.adapter)):
            notes.append(f"sources.{name}.adapter_revision has no effect: no adapter on the hub")
    for is_unread, reason, settings in unread:
        for setting in settings if is_unread else ():
            section, name = setting.split(".")
            chosen = getattr(recipe, section)
            if getattr(chosen, name) != type(chosen).model_fields[name].default:
                notes.append(f"{setting} has no effect: {reason}")
    return notes
