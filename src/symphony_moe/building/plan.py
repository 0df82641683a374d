"""What a build will do, from headers and tokenizers: refuse early, write nothing.

The list of output tensors comes from the same function that later writes them
(`families.layer_outputs`), run on tensors without memory.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from symphony_moe.building.alike import say_alike
from symphony_moe.building.estimate import (
    beyond_memory,
    build_seconds,
    matching_seconds,
    peak_memory,
    streams_in_memory,
    work_bytes,
)
from symphony_moe.errors import SourceMismatch, shortened
from symphony_moe.model.checkpoint import BYTES, assign_shards
from symphony_moe.model.engines import (
    DENSE_LAYERS,
    SHARED_EXPERT,
    SLICES,
    Reading,
    readings,
)
from symphony_moe.model.families import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    HEAD_BIAS,
    Family,
    queries_per_kv,
    stream_scale,
    target_config,
)
from symphony_moe.model.moe_layer import MoELayer, always_on, dense_layer, layer_outputs
from symphony_moe.model.widening import Shape
from symphony_moe.recipe.presets import PRESETS
from symphony_moe.recipe.rules import of_one_text
from symphony_moe.recipe.settings import BUNDLED, Recipe
from symphony_moe.sources.matching import Difference, find_differences, refuse_mismatch
from symphony_moe.sources.opening import expected_shapes
from symphony_moe.sources.provenance import provenance
from symphony_moe.sources.shapes import padded_shapes
from symphony_moe.sources.source import Source, anchor_of, is_tied, new_config, public_name

NOTE_PERMUTATION = (
    "align.neurons reorders each expert's hidden neurons. By itself this does not change what an "
    "MoE with separate experts computes, before or after training (docs/paper-map.md). It takes "
    "about {seconds:.0f} s of stage 1 on this machine; align.neurons: none leaves it out"
)

EVEN_WIDTH = 8
"""Neurons of an expert come in so many: grouped products of matrices want rows of 16 bytes, which
are 8 numbers of bfloat16."""

NOTE_SOME_PERMUTATIONS = (
    "align.neurons orders the neurons of every layer; what is computed depends on it in layer(s) "
    "{layers} alone, and it takes about {seconds:.0f} s of stage 1 on this machine; align.neurons: "
    "auto matches those layers alone"
)


@dataclass(frozen=True)
class Plan:
    """Everything that is known before weights are read, but for `likeness`."""

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
    streams_in_memory: bool
    """Whether residual streams wait in memory between layers, or in files under `work/`."""
    seconds: float
    """Rough estimate for stage 1, from this machine's speed at multiplying matrices."""
    readers: list[Reading]
    """Which programs read the output, and what each makes of it."""
    notes: list[str]
    warnings: list[str] = field(default_factory=list)
    """What may cost more than it gives: to be mended before a build, not after it."""
    likeness: dict[str, float] = field(default_factory=dict)
    """Source -> mean cosine of its weights and the anchor's (`sources.kinship`), where both are
    here: all that a plan reads of weights."""
    training_peak_memory_bytes: int = 0
    """Estimate for stage 2 (`training_cost`)."""
    training_seconds: float | None = None
    """Rough estimate for stage 2, in one process. None where a GPU trains: it is not known."""

    def to_json(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        content = asdict(self)
        content["tensors"] = {name: list(shape) for name, shape in self.tensors.items()}
        return content


def make_plan(
    recipe: Recipe,
    sources: Sequence[Source],
    opened: Sequence[Source] | None = None,
    memory: int | None = None,
) -> Plan:
    """Plan a build. `opened`: all of the recipe's sources, where some are no experts. `memory`: the
    bytes that the build may take.

    Raises SourceMismatch where it cannot be done.
    """
    differences = find_differences(sources, recipe.anchor, recipe.output.chat)
    if recipe.copies_anchor and not recipe.merges_ffns:
        differences = [_of_copies(difference, recipe.anchor) for difference in differences]
    refuse_mismatch(differences)
    _refuse_redrawn_zeros(recipe, sources)
    anchor = anchor_of(recipe, sources)
    family = anchor.family
    tied, ours = is_tied(recipe, sources), new_config(recipe, sources)
    _refuse_more_heads(recipe, family, ours)
    _refuse_layout(family, ours)
    tensors = output_tensors(family, ours, len(sources), tied=tied)
    if family.has_head_bias and recipe.output.head_bias:
        tensors[HEAD_BIAS] = (anchor.config.vocab_size,)
    total = sum(math.prod(shape) for shape in tensors.values())
    idle = len(sources) - recipe.router.top_k  # sources that a token does not go to
    active = total - _one_expert(family, anchor.config) * idle
    config = target_config(
        family,
        ours,
        len(sources),
        recipe.router.top_k,
        tied=tied,
        dtype=recipe.output.dtype,
    )
    if anchor.vocabulary is not None:
        config |= anchor.vocabulary.settings
    disk = total * BYTES[recipe.output.dtype]
    shape = (recipe, anchor.config, len(sources))
    in_memory = streams_in_memory(*shape, memory)
    short = beyond_memory(*shape, memory)
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
        work_bytes=work_bytes(*shape, memory),
        peak_memory_bytes=peak_memory(*shape, memory),
        streams_in_memory=in_memory,
        seconds=build_seconds(recipe, sources, anchor.config),
        readers=readings(
            config,
            sentencepiece=anchor.source_tokenizer.kind == "SentencePiece BPE",
            dense=family.dense,
            layout=_layout(family),
        ),
        notes=_notes(recipe, sources, differences, opened or sources),
        warnings=[short] if short else [],
    )


def _layout(family: Family) -> str:
    """What a recipe asks of the layers, for `readings`."""
    if family.dense_layers:
        return DENSE_LAYERS
    if family.has_shared_expert:
        return SHARED_EXPERT
    return SLICES if family.slices > 1 else ""


def _of_copies(difference: Difference, anchor: str) -> Difference:
    """What a difference means where there is no FFN but the anchor's."""
    if difference.what != "intermediate_size":
        return difference
    return replace(difference, verdict="fine", consequence=f"every FFN is {anchor}'s")


def _refuse_redrawn_zeros(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raise SourceMismatch where neurons would be drawn anew of an FFN that is padded with zeros:
    the mean and the deviation of its matrices are not the source's."""
    widened = padded_shapes({source.name: source for source in sources})
    if recipe.redraws_neurons and widened:
        name, words = next(iter(widened.items()))
        raise SourceMismatch(
            f"experts.init: drop draws neurons by the mean and deviation of each matrix, and "
            f"{name}'s are padded with zeros ({words}). Set it to source, or use checkpoints of "
            "one shape"
        )
    widths = {source.name: source.own_ffn for source in sources}
    if recipe.redraws_neurons and len(set(widths.values())) > 1:
        spelled = ", ".join(f"{name}: {width}" for name, width in widths.items())
        raise SourceMismatch(
            f"experts.init: drop draws neurons by the mean and deviation of each matrix, and "
            f"narrower FFNs are padded with zeros ({spelled}). Set it to source, or use "
            "checkpoints of one width"
        )


def _of_shapes(recipe: Recipe, sources: Sequence[Source]) -> Iterator[str]:
    """What is widened (`backbone.shapes`), and what that costs."""
    import humanize

    by_name = {source.name: source for source in sources}
    for name, words in padded_shapes(by_name).items():
        source = by_name[name]
        own = _one_expert(source.family, source.as_stored.config)
        more = _one_expert(source.family, source.config) - own
        yield (
            f"{name} is padded to the shape of the others, which computes the same: {words}. Its "
            f"experts have {more:,} parameters more than its own {own:,}, "
            f"{humanize.naturalsize(more * BYTES[recipe.output.dtype])} on disk and in memory"
        )
        open_places = recipe.sources[name].layers is None
        if source.widening is not None and None in source.widening.layers and open_places:
            how = "by calibration text" if recipe.needs_calibration else "evenly"
            yield f"{name}: which of the layers are added is found {how}, and kept in recipe.yaml"
    anchor = anchor_of(recipe, sources).as_stored.config
    others = [
        source.name
        for source in sources
        if source.name in recipe.expert_names
        and Shape.of(source.as_stored.config) != Shape.of(anchor)
    ]
    if recipe.widens and others and recipe.merges_backbone and not recipe.aligns_residual:
        yield (
            f"{shortened(', '.join(others), 100)}: of another shape than {recipe.anchor}, and "
            f"method {recipe.method} here averages their weights channel by channel. That keeps "
            "little of any, unless one was cut out of the other. Set method: harmonized"
        )


def _of_widths(recipe: Recipe, sources: Sequence[Source], width: int) -> Iterator[str]:
    """What it costs that FFNs are padded to one `width`."""
    import humanize

    hidden, layers = sources[0].config.hidden_size, sources[0].config.num_hidden_layers
    narrow = {s.name: s.own_ffn for s in sources if s.own_ffn < s.config.intermediate_size}
    if not narrow:
        return
    zeros = sum(width - own for own in narrow.values()) * 3 * hidden * layers
    spelled = ", ".join(f"{name} ({own:,})" for name, own in narrow.items())
    yield (
        f"FFNs are padded with zeros to {width:,} neurons, which computes the same: {spelled}. "
        f"That is {zeros:,} parameters of zeros, "
        f"{humanize.naturalsize(zeros * BYTES[recipe.output.dtype])} on disk and in memory"
    )
    slices = recipe.experts.per_source
    of_expert = width // slices
    if of_expert % 256:
        kind = "Q8_0 and Q4_0 take it, K-quants" if of_expert % 32 == 0 else "Quantized types"
        who = "the widest source has" if slices == 1 else "an expert has"
        yield (
            f"GGUF: {kind} need a width that is a multiple of {256 if of_expert % 32 == 0 else 32}"
            f", and {who} {of_expert:,} neurons"
        )


def _refuse_more_heads(recipe: Recipe, family: Family, config: PreTrainedConfig) -> None:
    """Raise SourceMismatch where the heads of all sources have no room in one attention. `config`:
    see `new_config`."""
    if not recipe.concatenates_heads:
        return
    reason = family.refusal(config)
    if family.head_norms == "whole":
        reason = "its norms of q and k take all heads together"
    if reason is not None:
        raise SourceMismatch(
            f"backbone.attention: concatenated: {family.dense} as {family.moe} cannot have the "
            f"heads of {len(recipe.expert_names)} sources: {reason}. Set it to linear or slerp"
        )


def _refuse_layout(family: Family, config: PreTrainedConfig) -> None:
    """Raise SourceMismatch where the sources do not have the layers, or the neurons, that a recipe
    gives another form."""
    count, width = config.num_hidden_layers, config.intermediate_size
    beyond = [layer for layer in family.dense_layers if layer >= count]
    if beyond:
        raise SourceMismatch(
            f"experts.dense_layers: {beyond[0]} is no layer of the sources, which have {count}, "
            f"counted from 0; choose from 0 to {count - 1}"
        )
    if len(family.dense_layers) == count:
        raise SourceMismatch(
            f"experts.dense_layers: all {count} layers are named, and none would have experts; "
            "leave one out at least, or merge the models with a tool for dense models"
        )
    if family.slices > 1 and width % (family.slices * EVEN_WIDTH):
        fitting = [n for n in (2, 4, 8) if n < family.slices and width % (n * EVEN_WIDTH) == 0]
        raise SourceMismatch(
            f"experts.per_source: {width} neurons of a source's FFN, dealt into {family.slices} "
            f"experts, are {width / family.slices:g} each; stock transformers multiply experts "
            f"whose width is a multiple of {EVEN_WIDTH}. Set it to {max(fitting, default=1)}"
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
        "licences": [
            None if licence is None else asdict(licence)
            for licence in provenance(source, spec).licences
        ],
        "architecture": source.config.model_type,
        "parameters": source.num_parameters,
        "dtype": ", ".join(sorted({header.dtype for header in source.headers.values()})),
        "files": len({header.file for header in source.headers.values()}),
        "anchor": source.name == recipe.anchor,
    }


def source_in_words(described: Mapping[str, Any]) -> str:
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
    names = [str(number) for number in range(num_experts)]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        blank = {name: torch.empty(shapes[prefix + name], device="meta") for name in family.shared}
        own = {name: torch.empty(shapes[prefix + name], device="meta") for name in family.expert}
        router = dict.fromkeys(names, torch.empty(config.hidden_size, device="meta"))
        attention_router = None if family.attention_router is None else router
        always = always_on(own) if family.has_shared_expert else None
        moe = MoELayer(blank, dict.fromkeys(names, own), router, attention_router, always)
        if layer in family.dense_layers:
            moe = dense_layer(blank, own)
        for name, tensor in layer_outputs(family, config, layer, moe, names):
            tensors[name] = tuple(tensor.shape)
    tensors[FINAL_NORM] = shapes[FINAL_NORM]
    if not tied:
        tensors[HEAD] = shapes[EMBEDDING]
    return tensors


def _one_expert(family: Family, config: PreTrainedConfig) -> int:
    """Parameters of one source's experts, in all layers that have any."""
    shapes = expected_shapes(config)
    one_layer = sum(math.prod(shapes[f"model.layers.0.{name}"]) for name in family.expert)
    return int(one_layer * (config.num_hidden_layers - len(family.dense_layers)))


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
    if section == "train" and not recipe.distills:
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
        notes += source.remarks
        notes += adapter_notes(recipe, source)
        notes += [f"{source.name}: {note}" for note in _of_text(recipe, source)]
    notes += say_alike(recipe, sources)
    notes += _of_ends(recipe, sources)
    notes += _of_layout(recipe, sources)
    notes += _of_fit(recipe)
    if any(source.config.tie_word_embeddings for source in sources) and recipe.folds:
        notes.append("the output's head is untied: the final norm's gain is folded into it")
    anchor = anchor_of(recipe, sources)
    notes += _of_heads(recipe, sources)
    notes += _of_shapes(recipe, sources)
    notes += _of_widths(recipe, sources, anchor.config.intermediate_size)
    scale = stream_scale(anchor.family, anchor.config)
    if scale != 1:
        notes.append(
            f"{anchor.family.moe}'s norms have a fixed epsilon of {anchor.family.norm_eps}, "
            f"{anchor.name}'s {anchor.config.rms_norm_eps}: the residual stream is written "
            f"{scale:.4g} times as large, which computes the same"
        )
    notes += beyond_context(recipe, opened, "calibration", "train", "evaluation")
    each = max(1, recipe.windows_each - recipe.validation_windows) + recipe.validation_windows
    least = each * len(recipe.calibration_domains) * recipe.calibration.sequence_length
    if (recipe.aligns or recipe.fits) and recipe.calibration.tokens < least:
        notes.append(
            f"calibration.tokens {recipe.calibration.tokens:,} is less than what is used at least: "
            f"{least:,}, {each} window(s) of every source"
        )
    if recipe.copies_anchor:
        rest = "" if recipe.aligns_neurons else "; nothing to align"
        notes.append(f"experts.init copy: every expert is {recipe.anchor}'s FFN{rest}")
    if recipe.backbone.attention == "anchor" and recipe.backbone.weights is not None:
        notes.append("backbone.weights has no effect on attention: it is the anchor's")
    lacks = any(source.vocabulary and len(source.places.missing) for source in sources)
    return notes + _without_effect(recipe, has_one_vocabulary=not lacks)


def _of_fit(recipe: Recipe) -> Iterator[str]:
    """How often layers learn from the calibration text."""
    if not recipe.fits_layers:
        return
    if not recipe.refines:
        yield "layers are fitted in closed form alone (fit.epochs: 0)"
        return
    times = f"{recipe.fit.epochs:g} time{'' if recipe.fit.epochs == 1 else 's'}"
    said = (
        f"each layer learns from the calibration text {times} (fit.epochs), less often where that "
        "does harm"
    )
    last = recipe.layers_with_head
    if last:
        which = "layer learns" if last == 1 else f"{last} layers learn"
        said += f". The last {which} once more, together with the head (fit.layers_with_head)"
    yield said


def _of_layout(recipe: Recipe, sources: Sequence[Source]) -> Iterator[str]:
    """What is to be said of experts, layers without any, and the order of their neurons."""
    experts, top_k = recipe.experts, recipe.router.top_k
    dense = ", ".join(map(str, experts.dense_layers))
    twins = of_one_text(recipe)
    if twins and recipe.fits_router:
        yield (
            f"{twins[0]} and {twins[1]} have the same data, so the router (router.init "
            f"{recipe.router.init}) cannot learn which of them a token is for. Is one of the paths "
            "a mistake?"
        )
    if top_k == len(sources):
        yield (
            f"router.top_k is {top_k}, and there are {len(sources)} sources: every token goes "
            "through all experts, and the router weighs them. With router.top_k: 1 a token goes "
            f"through one of them, which is 1/{top_k} of the experts' work"
        )
    if recipe.aligns_neurons:
        cost = matching_seconds(recipe, sources, anchor_of(recipe, sources).config)
        if not dense and not recipe.has_shared_expert:
            yield NOTE_PERMUTATION.format(seconds=cost)
        elif recipe.align.neurons == "activations" and not recipe.has_shared_expert:
            yield NOTE_SOME_PERMUTATIONS.format(layers=dense, seconds=cost)
    if dense:
        yield (
            f"experts.dense_layers: layer(s) {dense} have one FFN, merged from all sources "
            f"({recipe.backbone.ffn}), for every token. What a source alone knows there is lost in "
            "part (docs/how-to/experts.md)"
        )
    if recipe.has_shared_expert:
        yield (
            f"experts.shared_weight: every token goes through a shared expert of weight "
            f"{experts.shared_weight:g}, merged from all sources ({recipe.backbone.ffn}); its own "
            "experts have the rest, so it hears less of its source until training "
            "(docs/how-to/experts.md)"
        )
    if experts.per_source > 1:
        yield (
            f"experts.per_source: each source gives {experts.per_source} experts of 1 / "
            f"{experts.per_source} of its FFN; a token has {top_k * experts.per_source}, all of "
            f"{top_k} source(s) until training parts them"
        )


def _of_heads(recipe: Recipe, sources: Sequence[Source]) -> Iterator[str]:
    """Where the result has more attention heads than a source."""
    anchor, count = anchor_of(recipe, sources), len(sources)
    grown = queries_per_kv(anchor.config)
    if anchor.family.repeats_kv and grown > 1:
        yield (
            f"{anchor.family.moe} has a KV head for every query head: k and v, and the KV cache of "
            f"the result, are {grown} times the sources'"
        )
    if recipe.concatenates_heads:
        yield (
            f"backbone.attention concatenated: the result has the attention heads of {count} "
            f"sources; its KV cache, and the parameters of its attention, are {count} times as "
            "large"
        )


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


def adapter_notes(recipe: Recipe, source: Source) -> list[str]:
    """What is to be said of a source's adapter; nothing of a source without one."""
    said = [*_of_adapter(source), *_of_kept_attention(recipe, source)]
    return [f"{source.name}: {note}" for note in said]


def _of_kept_attention(recipe: Recipe, source: Source) -> Iterator[str]:
    """What of an adapter is not in a run that keeps the backbone of another one."""
    if source.adapter is None or source.name != recipe.newcomer:
        return
    left_out = sorted(
        {
            name.split(".")[-2]
            for name in source.headers
            if ".self_attn." in name and source.adapter.touches(name)
        }
    )
    if left_out:
        yield (
            f"its adapter changes attention too ({', '.join(left_out)}). That part is left out: "
            "the run's attention is kept as it is"
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
    trained = adapter.tokens.get(EMBEDDING, ())
    unnamed = set(trained).difference(tokenizer.get_vocab().values()) if trained else None
    if unnamed:
        yield (
            f"its adapter trained {len(unnamed)} row(s) of no token of its tokenizer, from "
            f"{min(unnamed)}; they stay padding. Put the tokenizer that it was trained with beside "
            "it"
        )


def _is_here(model: str) -> bool:
    """Whether it is bundled or a local folder, and nothing on the hub."""
    return model.startswith(BUNDLED) or Path(model).exists()


def _without_effect(recipe: Recipe, *, has_one_vocabulary: bool) -> list[str]:
    """What a user has set (to another value than the method's) that nothing reads.
    `has_one_vocabulary`: whether no source lacks an ordinary token of the anchor's."""
    of_refinement = ("fit.learning_rate", "fit.pull", "fit.embeddings", "fit.layers_with_head")
    of_fit = ("fit.ridge", "fit.epochs", "fit.temperature_scaling", *of_refinement)
    of_teacher = ("train.teacher_weight", "train.teacher_temperature", "train.teacher_loading")
    mixes_ffns = bool(recipe.experts.dense_layers) or recipe.has_shared_expert
    unread = (
        (not recipe.fits_layers, "fit.method is none", of_fit),
        (recipe.fits_layers and not recipe.refines, "fit.epochs is 0", of_refinement),
        (not recipe.fits_router, "router.init is random", ("router.temperature",)),
        (not recipe.aligns_neurons, "no neurons are matched", ("align.neuron_share",)),
        (not mixes_ffns, "no layer is dense, and no expert shared", ("backbone.ffn",)),
        (not recipe.redraws_neurons, "experts.init is not drop", ("experts.drop_share",)),
        (not recipe.distills, "train.teacher is none", of_teacher),
        (has_one_vocabulary, "no source lacks a token", ("backbone.missing_tokens",)),
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
            default = type(chosen).model_fields[name].default
            default = PRESETS[recipe.method].get(section, {}).get(name, default)
            if getattr(chosen, name) != default:
                notes.append(f"{setting} has no effect: {reason}")
    return notes
