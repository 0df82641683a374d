"""Stage 1, layer by layer."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from symphony_moe.building.align import match, measured, settle
from symphony_moe.building.assemble import (
    Record,
    aligned_layer,
    aligned_table,
    assemble_layer,
    fused_final_norm,
    fused_tables,
)
from symphony_moe.building.calibrate import compare_layer, embedding_blocks
from symphony_moe.building.estimate import streams_in_memory
from symphony_moe.building.fit_head import fit_head, next_token_losses
from symphony_moe.building.fit_layer import (
    Calibration,
    advance_new,
    advance_sources,
    begin_streams,
    calibrate_plain,
    fit_layer,
)
from symphony_moe.errors import RecipeError, RunFolderError
from symphony_moe.files import hash_folder, sha256_of, to_json, write_bytes
from symphony_moe.machine import (
    release_freed_memory,
    versions,
)
from symphony_moe.model.checkpoint import CheckpointWriter, beyond
from symphony_moe.model.families import EMBEDDING, FINAL_NORM, HEAD, HEAD_BIAS
from symphony_moe.model.moe_layer import layer_outputs, read_layer_outputs
from symphony_moe.model.streams import Streams
from symphony_moe.recipe.settings import Recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.source import Source, anchor_of
from symphony_moe.text.windows import Packed, joined

log = logging.getLogger(__name__)


def refuse_beyond(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raise RecipeError where an expert's matrix that is written as it is has a number that float16
    does not hold: found while it is written, that would be after hours."""
    dtype = recipe.output.dtype
    changed = recipe.folds or recipe.fits_layers or recipe.experts.init == "drop"
    if dtype != "float16" or changed or sources[0].family.norm_eps is not None:
        return
    copied = recipe.experts.init == "copy"
    for source in [anchor_of(recipe, sources)] if copied else sources:
        for layer in range(source.config.num_hidden_layers):
            for name in (f"model.layers.{layer}.{part}" for part in source.family.expert):
                if source.headers[name].dtype == "F16" and source.adapter is None:
                    continue
                largest = source.read(name).abs().max()
                if not bool(largest.to(torch.float16).isfinite()):
                    raise RecipeError(f"{source.name}: " + beyond(name, float(largest), dtype))


def align_sources(
    recipe: Recipe,
    sources: Sequence[Source],
    windows: Mapping[str, Packed],
    aside: Mapping[str, Packed],
    folder: RunFolder,
    text: str,
) -> dict[str, Tensor]:
    """One sweep of all sources over the whole calibration text, that of `aside` first; what
    `alignment.safetensors` will hold. Layers that an interrupted build has compared are not
    compared again."""
    if not recipe.aligns:
        return {}
    num_layers = sources[0].config.num_hidden_layers
    compared = [_is_compared(folder.layer_compared(layer), text) for layer in range(num_layers)]
    if not all(compared):
        in_memory = streams_in_memory(recipe, sources[0].config, len(sources))
        streams = Streams(None if in_memory else folder.work)
        parts = [aside[name].windows for name in sorted(aside)]
        num_aside = sum(map(len, parts))
        together = torch.cat([*parts, *(windows[name].windows for name in sorted(windows))])
        for source in sources:
            table = embedding_blocks(source)
            streams.embed({source.name: together}, source.config.hidden_size, table)
        for layer in range(num_layers):
            path = None if compared[layer] else folder.layer_compared(layer)
            _compare_layer(recipe, sources, layer, streams, num_aside, path, text)
            log.info("compared layer %d of %d", layer + 1, num_layers)
            release_freed_memory()
        streams.release()
    where: dict[str, Path] = {}
    for layer in range(num_layers):
        with safetensors.safe_open(folder.layer_compared(layer), framework="pt") as file:
            where |= dict.fromkeys(file.keys(), folder.layer_compared(layer))

    def read(name: str) -> Tensor:
        with safetensors.safe_open(where[name], framework="pt") as file:
            # A copy: while one tensor of a file is in use, all of it stays mapped.
            return file.get_tensor(name).clone()

    others = [source.name for source in sources if source.name != recipe.anchor]
    return settle(where, read, others, num_layers)


def _compare_layer(
    recipe: Recipe,
    sources: Sequence[Source],
    layer: int,
    streams: Streams,
    aside: int,
    path: Path | None,
    text: str,
) -> None:
    """Bring all sources' streams past one layer. `path`: where to record how it compares with the
    anchor's; None where that is known. `aside`: windows of the streams to judge by."""
    weights = {source.name: source.read_layer(layer) for source in sources}
    statistics = path is not None
    found = compare_layer(recipe, sources, layer, weights, streams, aside, statistics=statistics)
    if path is None:
        return
    tensors = {}
    for name, comparison in found.items():
        who = f"{name} (or the anchor, {recipe.anchor}): layer {layer}"
        for kind, tensor in match(comparison, sources[0].family, who).items():
            tensors[f"{name}.layers.{layer}.{kind}"] = tensor
    write_bytes(path, save(tensors, {"text": text}))


def _is_compared(path: Path, text: str) -> bool:
    """Whether an interrupted build has compared this layer, on this text."""
    return (noted(path) or {}).get("text") == text


def count_tokens(windows: Mapping[str, Packed], vocabulary: int) -> dict[str, Tensor]:
    """`<source>.tokens`: how often each token is in a source's calibration text (int64)."""
    return {
        f"{name}.tokens": torch.bincount(text.windows.flatten(), minlength=vocabulary)
        for name, text in windows.items()
    }


def write_tables(
    recipe: Recipe,
    sources: Sequence[Source],
    record: Record,
    writer: CheckpointWriter,
    tensors: Mapping[str, tuple[int, ...]],
) -> None:
    """Token embeddings, output head and final norm, as fused. A head that is fitted is written over
    at the end."""
    tables = [name for name in (EMBEDDING, HEAD) if name in tensors]
    for name, first_row, rows in fused_tables(recipe, sources, tables, record):
        writer.write(name, rows, first_row)
    writer.write(FINAL_NORM, fused_final_norm(recipe, sources))
    if HEAD_BIAS in tensors:
        writer.write(HEAD_BIAS, torch.zeros(tensors[HEAD_BIAS]))


def begin_fit(
    recipe: Recipe,
    sources: Sequence[Source],
    record: dict[str, Tensor],
    windows: Mapping[str, Packed],
    aside: Mapping[str, Packed],
    folder: RunFolder,
) -> Calibration | None:
    """All streams of the fit at their token embeddings; None where nothing is fitted. `aside`: the
    text that it is judged by."""
    if not recipe.fits:
        return None
    anchor = anchor_of(recipe, sources)
    in_memory = streams_in_memory(recipe, anchor.config, len(sources))
    streams = Streams(None if in_memory else folder.work)
    texts = {name: joined((aside[name], windows[name])) for name in sorted(windows)}
    by_name = {name: text.windows for name, text in texts.items()}
    positions = {name: text.positions for name, text in texts.items()}
    counts = {name: len(text) for name, text in aside.items()}
    configs = {source.name: source.config for source in sources}
    known = {source.name: source.known for source in sources}
    calibration = Calibration(
        recipe, anchor.family, configs, anchor.name, by_name, counts, streams, known, positions
    )
    hidden = anchor.config.hidden_size
    new = {f"new/{name}": text for name, text in by_name.items()}
    streams.embed(new, hidden, _embedding_blocks(recipe, sources, record))
    if recipe.fits_layers:
        for source in sources:
            own = {f"source/{source.name}": by_name[source.name]}
            streams.embed(own, hidden, aligned_table(recipe, source, EMBEDDING, record))
        some = {
            f"plain/{name}": text[: calibration.plain_windows(name)]
            for name, text in by_name.items()
        }
        streams.embed(some, hidden, _embedding_blocks(recipe, sources, {}))
    begin_streams(calibration)
    return calibration


def _embedding_blocks(
    recipe: Recipe, sources: Sequence[Source], record: Record
) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of the new model's token embeddings, as they are written."""
    dtype = getattr(torch, recipe.output.dtype)
    for _, first_row, rows in fused_tables(recipe, sources, [EMBEDDING], record):
        yield first_row, rows.to(dtype)


def build_layer(
    recipe: Recipe,
    sources: Sequence[Source],
    layer: int,
    record: Record,
    calibration: Calibration | None,
    writer: CheckpointWriter,
    folder: RunFolder,
    text: str,
) -> None:
    """Align, fuse, fit and write one layer. A layer that an interrupted build has finished is kept:
    the streams are only brought past it. `text`: digest of the calibration windows."""
    anchor = anchor_of(recipe, sources)
    done, prefix = folder.layer_done(layer), f"model.layers.{layer}."
    finished = _is_finished(done, writer, prefix, text)
    if finished:
        writer.keep(prefix)
        if calibration is None:
            return
    refits = recipe.fits_layers
    weights = {source.name: source.read_layer(layer) for source in sources}
    aligned = {s.name: aligned_layer(recipe, s, layer, weights[s.name], record) for s in sources}
    names = [source.name for source in sources]
    note: dict[str, Any] = {}
    if finished:
        remembered = load_file(done)
        if calibration is not None and refits:
            advance_sources(calibration, layer, aligned)
    else:
        remembered = {}
        moe = assemble_layer(recipe, sources, layer, aligned)
        if calibration is not None:
            by_name = moe.select([names.index(name) for name in calibration.names])
            by_name, note = fit_layer(calibration, layer, by_name, aligned)
            moe = by_name.select([calibration.names.index(name) for name in names])
        for name, tensor in layer_outputs(anchor.family, anchor.config, layer, moe):
            writer.write(name, tensor)
    if calibration is not None:
        # What follows is fitted to the layer as it is written: rounding is an error like others.
        written = read_layer_outputs(
            anchor.family, anchor.config, layer, len(sources), writer.read
        ).select([names.index(name) for name in calibration.names])
        advance_new(calibration, layer, written)
        if refits:
            raw = {s.name: aligned_layer(recipe, s, layer, weights[s.name], {}) for s in sources}
            plain = assemble_layer(recipe, sources, layer, raw).to(getattr(torch, writer.dtype))
            plain = plain.select([names.index(name) for name in calibration.names])
            if not finished:
                router = calibrate_plain(calibration, layer, plain)
                remembered["plain_router"] = router.to(getattr(torch, writer.dtype))
            router = remembered["plain_router"]
            advance_new(calibration, layer, replace(plain, router=router), "plain")
    if not finished:
        writer.sync()
        noted = {"text": text, "tensors": writer.digest(prefix), "note": to_json(note)}
        write_bytes(done, save(remembered, noted))


def finish_fit(
    recipe: Recipe,
    sources: Sequence[Source],
    record: dict[str, Tensor],
    calibration: Calibration,
    writer: CheckpointWriter,
    folder: RunFolder,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fit and write the output head; then, where the plain mean of the sources loses less on the
    text kept aside, write that instead. What was measured, and the record of what is used."""
    start = _whole_head(recipe, sources, record)
    own = {
        s.name: torch.cat([rows for _, rows in aligned_table(recipe, s, HEAD, record)])
        for s in sources
    }
    head, head_note = fit_head(calibration, start, own)
    writer.write(HEAD, head)
    plain_head = _whole_head(recipe, sources, {})
    plain = plain_head.to(getattr(torch, writer.dtype)).float()
    by_source = {
        "harmonized": next_token_losses(calibration, "new", writer.read(HEAD)),
        "plain mean": next_token_losses(calibration, "plain", plain),
    }
    losses = {which: sum(of.values()) / len(of) for which, of in by_source.items()}
    # A loss that is no number is not better than anything.
    worth = {which: loss if math.isfinite(loss) else math.inf for which, loss in losses.items()}
    chosen = min(worth, key=lambda which: worth[which])  # the first, where they are equal
    log.info(
        "text kept aside: %.3f nats per token, the plain mean %.3f; writing the %s",
        losses["harmonized"],
        losses["plain mean"],
        "plain mean" if chosen == "plain mean" else "fitted model",
    )
    for name in by_source["harmonized"] if chosen == "harmonized" else ():
        fitted, mean = (of[name] for of in by_source.values())
        if mean < fitted:
            log.warning(
                "on the text of %s kept aside the plain mean of the sources loses less (%.3f nats "
                "per token) than the fitted model (%.3f)",
                name,
                mean,
                fitted,
            )
    if chosen == "plain mean":
        record = measured(record)
        _write_plain(recipe, sources, calibration, writer, folder, plain_head)
    fitting = {
        "head": head_note,
        "loss": losses,
        "loss_by_source": by_source,
        "chosen": chosen,
    }
    return fitting, record


def _write_plain(
    recipe: Recipe,
    sources: Sequence[Source],
    calibration: Calibration,
    writer: CheckpointWriter,
    folder: RunFolder,
    head: Tensor,
) -> None:
    """Write the plain mean over the fitted model: nothing aligned, only its router fitted."""
    for name, first_row, rows in fused_tables(recipe, sources, [EMBEDDING], {}):
        writer.write(name, rows, first_row)
    writer.write(HEAD, head)
    names = [source.name for source in sources]
    for layer in range(sources[0].config.num_hidden_layers):
        plain = {s.name: aligned_layer(recipe, s, layer, s.read_layer(layer), {}) for s in sources}
        router = load_file(folder.layer_done(layer))["plain_router"]
        rows = router[[calibration.names.index(name) for name in names]]
        moe = replace(assemble_layer(recipe, sources, layer, plain), router=rows)
        for name, tensor in layer_outputs(sources[0].family, sources[0].config, layer, moe):
            writer.write(name, tensor)


def _whole_head(recipe: Recipe, sources: Sequence[Source], record: Record) -> Tensor:
    """The fused output head in one piece."""
    return torch.cat([rows for _, _, rows in fused_tables(recipe, sources, [HEAD], record)])


def _is_finished(done: Path, writer: CheckpointWriter, prefix: str, text: str) -> bool:
    """Whether an interrupted build has finished a layer: its record is whole, and what it says of
    the layer's tensors is on disk. RunFolderError where that build had other calibration text."""
    found = noted(done)
    if found is None:
        return False
    if found.get("text") != text:
        raise RunFolderError(
            f"{done.parent.parent}: the calibration text has changed since this build was begun; "
            "--overwrite it"
        )
    return found.get("tensors") == writer.digest(prefix)


def noted(path: Path) -> dict[str, str] | None:
    """What a record in `work/` says of itself; None where there is no whole record."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError:
        return None


def write_manifest(
    folder: RunFolder,
    recipe: Recipe,
    tensor_hashes: Mapping[str, str],
    begun_with: Mapping[str, str],
) -> None:
    """Hashes of everything that was made and of what it was made from. `begun_with`: the versions
    of the software that the build was begun with, which it may not have ended with."""
    now = versions()
    folder.update_json(
        folder.manifest,
        {
            "versions": now,
            **({} if begun_with == now else {"begun_with": dict(begun_with)}),
            "sources": {name: spec.sha256 for name, spec in recipe.sources.items()},
            "files": {
                folder.alignment.name: sha256_of(folder.alignment),
                **hash_folder(folder.staged_checkpoint),
            },
            "tensors": {"checkpoint": dict(tensor_hashes)},
        },
    )
