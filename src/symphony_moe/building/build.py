"""Stage 1, layer by layer: the sources' layers in, the finished layer out, nothing else in memory.

`Build.run` is the whole of it. A finished layer is durable: a build that was killed goes on with
the next one.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from symphony_moe.building.align import basis_of, choose_maps, match
from symphony_moe.building.alignment import Alignment, layer_key
from symphony_moe.building.assemble import aligned_table, stream_scale_of
from symphony_moe.building.candidate import Candidate
from symphony_moe.building.companions import write_companions
from symphony_moe.building.fit_embeddings import LearnedEmbeddings
from symphony_moe.building.fit_head import HeadFit, fit_head
from symphony_moe.building.fit_layer import (
    advance_on_validation,
    advance_sources,
    begin_at_embeddings,
    begin_streams,
    calibrate_plain,
    fit_layer,
    go_back_before_end,
    keep_before_end,
    validation_routing,
)
from symphony_moe.building.fitting import NEW, PLAIN, SOURCE, FitState
from symphony_moe.building.kept import ChangedCandidate, KeptModel
from symphony_moe.building.plan import Plan
from symphony_moe.building.records import (
    Findings,
    is_compared,
    is_finished,
    read_note,
    read_plain_router,
    write_comparison,
    write_layer,
)
from symphony_moe.building.sweep import Sweep
from symphony_moe.errors import RecipeError, RunFolderError, SourceError, SourceMismatch
from symphony_moe.files import hash_folder, publish, sha256_of, to_json, write_bytes
from symphony_moe.machine import copying, peak_rss_bytes, release_freed_memory, versions
from symphony_moe.model.checkpoint import CheckpointWriter, beyond
from symphony_moe.model.families import DOWN, EMBEDDING, FINAL_NORM, HEAD, HEAD_BIAS
from symphony_moe.model.layer import device
from symphony_moe.model.moe_layer import (
    MoELayer,
    layer_outputs,
    read_layer_outputs,
    router_matrix,
    router_rows,
    same_rows,
    shared_layer,
)
from symphony_moe.model.precision import is_reduced
from symphony_moe.model.streams import Streams, Windows
from symphony_moe.processes import ALONE, Processes
from symphony_moe.progress import Listener, Progress, of_step
from symphony_moe.recipe.settings import Recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.runs.metrics import HARMONIZED, PLAIN_MEAN
from symphony_moe.sources.source import SharedReads, Source, anchor_of, new_config, read_layers
from symphony_moe.text.windows import Packed, digest_of, joined

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationText:
    """The text that a build runs the sources on; empty where it runs none."""

    fitted: Mapping[str, Packed]
    """Source -> what is aligned and fitted on."""
    validation: Mapping[str, Packed]
    """Source -> what a fit is judged by."""

    @property
    def digest(self) -> str:
        """What tells this text from another."""
        return digest_of(
            some.windows for some in (*self.fitted.values(), *self.validation.values())
        )

    @property
    def tokens(self) -> int:
        """All of it."""
        every = (*self.fitted.values(), *self.validation.values())
        return sum(text.windows.numel() for text in every)

    @property
    def num_validation(self) -> int:
        """Windows of validation text, of all sources."""
        return sum(len(text.windows) for text in self.validation.values())

    def together(self) -> Windows:
        """All windows, the validation text first, each by the sources' names."""
        parts = [
            text[name].windows for text in (self.validation, self.fitted) for name in sorted(text)
        ]
        return torch.cat(parts)

    def count_tokens(self, vocabulary: int) -> dict[str, Tensor]:
        """Source -> how often each token is in what it is fitted on (int64)."""
        return {
            name: torch.bincount(text.windows.flatten(), minlength=vocabulary)
            for name, text in self.fitted.items()
        }


def refuse_beyond(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raise RecipeError where an expert's matrix that is written as it is has a number that float16
    does not hold: found while it is written, that would be after hours."""
    dtype = recipe.output.dtype
    changed = recipe.folds or recipe.fits_layers or recipe.redraws_neurons
    dense = recipe.experts.dense_layers
    if dtype != "float16" or changed or sources[0].family.norm_eps is not None:
        return
    copied = [anchor_of(recipe, sources)] if recipe.copies_anchor else sources
    layers = [n for n in range(sources[0].config.num_hidden_layers) if n not in dense]
    reads = SharedReads(copied)
    for layer, part in ((n, part) for n in layers for part in sources[0].family.expert):
        name = f"model.layers.{layer}.{part}"
        times = recipe.experts.per_source if part == DOWN else 1
        for source in copied:
            as_it_is = times == 1 and source.adapter is None and source.widening is None
            if as_it_is and source.headers[name].dtype == "F16":
                continue
            largest = times * source.layer_tensor(layer, part, reads=reads).abs().max()
            if not bool(largest.to(torch.float16).isfinite()):
                raise RecipeError(f"{source.name}: " + beyond(name, float(largest), dtype))


@dataclass(frozen=True)
class ModelFit:
    """What was measured while the new model was fitted, and which model is written."""

    layers: Sequence[Mapping[str, Any]]
    """`LayerFit.to_json` of each layer: an interrupted build has left some of them so."""
    head: HeadFit | None = None
    """None, as what follows, where nothing but routers is fitted."""
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Model (HARMONIZED, PLAIN_MEAN) -> source -> nats per token on its validation text."""
    chosen: str | None = None
    """The model that is written."""

    def to_json(self) -> dict[str, Any]:
        """For `metrics.json`."""
        if self.head is None:
            return {"layers": self.layers}
        return {
            "layers": self.layers,
            "head": self.head.to_json(),
            "loss": {model: _mean(losses) for model, losses in self.losses.items()},
            "loss_by_source": self.losses,
            "chosen": self.chosen,
        }


class Build:
    """One build, into a run folder that has been begun."""

    def __init__(  # noqa: PLR0913 (a class has as many parts as it has)
        self,
        recipe: Recipe,
        sources: Sequence[Source],
        planned: Plan,
        text: CalibrationText,
        folder: RunFolder,
        processes: Processes = ALONE,
        kept: KeptModel | None = None,
    ) -> None:
        """`sources`: those that become experts, in the order of the experts. `processes`: those
        that share the text, each with a build of its own; the first writes. `kept`: the model whose
        experts are changed, and all else is kept; None: all is made."""
        self.recipe = recipe
        self.sources = sources
        self.planned = planned
        self.text = text
        self.digest = text.digest
        self.folder = folder
        self.processes = processes
        self.is_first = processes.is_first
        self.state: FitState | None = None
        self.anchor = anchor_of(recipe, sources)
        self.config = new_config(recipe, sources)
        self.names = [source.name for source in sources]
        self.num_layers: int = self.anchor.config.num_hidden_layers
        self.kept = kept
        self.fits_model = recipe.fits_layers and kept is None
        """Whether backbone and head are fitted, beside the plain mean."""
        self.num_with_head = min(recipe.layers_with_head, self.num_layers)
        """Last layers that learn with the head."""
        scales = stream_scale_of(recipe, sources) != 1 or recipe.experts.per_source > 1
        scales |= recipe.has_shared_expert or any(source.widening for source in sources)
        copies = recipe.copies_experts and not scales
        self.copies = copies or recipe.only_removes
        """Whether experts are written as they are read."""

    @property
    def arithmetic(self) -> dict[str, str]:
        """What the rounding of the result depends on, as it is recorded: the number format of
        products of matrices, and the number of processes where there are several. Nothing where a
        build multiplies nothing."""
        if not self.recipe.needs_calibration:
            return {}
        asked, hidden = self.recipe.calibration.precision, self.anchor.config.hidden_size
        products = "bfloat16" if is_reduced(asked, hidden, device()) else "float32"
        count = self.processes.count
        return {"products": products} | ({"processes": str(count)} if count > 1 else {})

    def run(
        self,
        begun_with: Mapping[str, str],
        started: float,
        listen: Listener,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """From sources to `checkpoint/`. `begun_with`: the versions of the software that the build
        was begun with, which it may not end with. `started`: when (time.monotonic). `check`: called
        before the result is published; raises where it must not be."""
        # 1. Find the maps that bring each source into the anchor's coordinates.
        alignment = self._align(listen)
        if self.recipe.fits_layers:
            counts = self.text.count_tokens(self.anchor.config.vocab_size)
            alignment = alignment.with_token_counts(
                {n: counts[n] for n in counts if self._makes(n)}
            )
        self.new = self._candidate(alignment)
        self.plain = Candidate(self.recipe, self.sources, Alignment(), PLAIN)
        if not self.is_first:  # what all have computed, the first one writes
            if self.recipe.fits:
                self._write_model(started, listen)
            self._release_streams()
            self.processes.wait()
            return
        # 2. Lay the files out, and write the token embeddings.
        with CheckpointWriter(
            self.folder.staged_checkpoint,
            self.planned.tensors,
            self.planned.dtype,
            self.recipe.output.max_shard_bytes,
        ) as self.writer:
            with copying() if self.copies else nullcontext():
                fit = self._write_model(started, listen)
            tensor_hashes, file_hashes = self.writer.finish(), self.writer.file_hashes()
        chosen = None if fit is None else fit.chosen
        if self.kept is not None:
            chosen = self.kept.chosen
        if chosen == PLAIN_MEAN and self.kept is None:
            alignment = alignment.without_maps()
        try:
            check()
        except (SourceError, RunFolderError):
            self._forget_layers()
            raise
        # 6. Write what stands beside the weights, and publish it all by one rename.
        staged = self.folder.staged_checkpoint
        write_companions(staged, self.planned, self.recipe, self.sources)
        write_bytes(self.folder.alignment, alignment.to_bytes())
        timing = {
            "build_seconds": round(time.monotonic() - started, 2),
            "build_peak_rss_bytes": peak_rss_bytes(),
            "calibration_tokens": self.text.tokens,
        }
        self.folder.update_json(
            self.folder.metrics,
            {
                "alignment": alignment.describe(),
                **({} if fit is None else {"fit": fit.to_json()}),
                "timing": timing,
            },
        )
        self._write_manifest(tensor_hashes, file_hashes, begun_with, chosen)
        publish(staged, self.folder.checkpoint)
        self._release_streams()
        self.processes.wait()  # their hidden states may lie in there
        shutil.rmtree(self.folder.work)
        log.info("built %s", self.folder.checkpoint)

    def _write_model(self, started: float, listen: Listener) -> ModelFit | None:
        """All of the weights, in the order of the files, which are hashed while they are written;
        what was measured, None where nothing is fitted."""
        if not self.recipe.refines_embeddings:
            self._write_tables(self.new, EMBEDDING)
        # 3. Put every stream at its token embeddings.
        self.state = self._begin_fit()
        # 4. Layer by layer: align, fuse, fit, write.
        for layer in range(self.num_layers):
            self._build_layer(layer)
            if not self.copies:
                release_freed_memory()
            seconds = time.monotonic() - started
            step = Progress("build", layer + 1, self.num_layers)
            words = "layer %d of %d, %.0f s"
            log.info(words, step.done, step.total, seconds, extra=of_step(step))
            listen(step)
        # 5. The final norm and the head. A head that is fitted comes with the choice of a model:
        # the better of the two.
        tensors = self.planned.tensors
        if self.is_first:
            self.writer.write(FINAL_NORM, self.new.final_norm())
        fit = self._finish_fit()
        if HEAD in tensors and not self.fits_model:
            self._write_tables(self.new, HEAD)
        if HEAD_BIAS in tensors and self.is_first:
            self.writer.write(HEAD_BIAS, torch.zeros(tensors[HEAD_BIAS]))
        return fit

    def _align(self, listen: Listener) -> Alignment:
        """One sweep of all sources over the whole calibration text; of a change of experts, of the
        anchor and the newcomer. Layers that an interrupted build has compared are not compared
        again."""
        known = self._kept_maps()
        others = [name for name in self.names if name != self.recipe.anchor and self._makes(name)]
        if not self.recipe.aligns or not others or (self.kept and self.kept.is_plain_mean):
            return known
        self.compared = [s for s in self.sources if s.name in (self.recipe.anchor, *others)]
        paths = [self.folder.layer_compared(layer) for layer in range(self.num_layers)]
        compared = [
            self.processes.agree(self.is_first and is_compared(path, self.digest)) for path in paths
        ]
        if not all(compared):
            streams = self._streams()
            text, validation = self.text.together(), self.text.num_validation
            sweep = Sweep(self.recipe, self.compared, streams, text, validation, self.processes)
            for layer in range(self.num_layers):
                self._compare_layer(layer, sweep, known=compared[layer])
                step = Progress("align", layer + 1, self.num_layers)
                log.info("compared layer %d of %d", step.done, step.total, extra=of_step(step))
                listen(step)
                release_freed_memory()
            streams.release()
        chosen = {}
        if self.is_first:
            findings = Findings(paths)
            maps = choose_maps(
                findings.names,
                findings.read,
                others,
                self.num_layers,
                basis_of(self.anchor.family),
            )
            chosen = dict(maps.tensors)
        found = Alignment({**known.tensors, **self.processes.share(chosen)})
        name = self.recipe.newcomer
        if name is not None and found.residual(name) is not None:
            log.warning(
                "%s is a stranger to the run: its residual stream has other coordinates. It is "
                "rotated, but the kept backbone knows little of it; a run that is built anew with "
                "it may lose much less (docs/changing-experts.md)",
                name,
            )
        return found

    def _makes(self, name: str) -> bool:
        """Whether a source's expert is made here, and not kept."""
        return self.kept is None or name == self.recipe.newcomer

    def _kept_maps(self) -> Alignment:
        """The maps of the sources whose experts are kept."""
        if self.kept is None:
            return Alignment()
        return self.kept.alignment.of([name for name in self.names if not self._makes(name)])

    def _candidate(self, alignment: Alignment) -> Candidate:
        """The new model."""
        if self.kept is None:
            return Candidate(self.recipe, self.sources, alignment, NEW)
        return ChangedCandidate(self.recipe, self.sources, alignment, NEW, self.kept)

    def _compare_layer(self, layer: int, sweep: Sweep, *, known: bool) -> None:
        """Bring all sources past one layer; record how it compares with the anchor's, unless that
        is `known`. (A function of its own: what it holds is freed before the next layer.)"""
        weights = self._read_layer(layer, self.compared)
        found = sweep.advance(layer, weights, compare=not known)
        if known:
            return
        processes, matched = self.processes, {}
        for place, source in enumerate(found):  # the processes match a source each, side by side
            if place % processes.count == processes.number:
                who = f"{source} (or the anchor, {self.recipe.anchor}): layer {layer}"
                matched[source] = match(found[source], self.anchor.family, who)
        tensors: dict[str, Tensor] = {}
        for place, source in enumerate(found):
            shared = processes.share(matched.get(source), place % processes.count)
            tensors |= {layer_key(source, layer, kind): each for kind, each in shared.items()}
        if self.is_first:
            write_comparison(self.folder.layer_compared(layer), tensors, self.digest)

    def _write_tables(self, model: Candidate, table: str) -> None:
        """Token embeddings or output head, as a model has them."""
        if self.is_first:
            for name, first_row, rows in model.tables([table]):
                self.writer.write(name, rows, first_row)

    def _write_learned_embeddings(self, state: FitState) -> None:
        """Token embeddings that have learned with the first layer."""
        if state.embeddings is not None and self.is_first:
            for first_row, rows in state.embeddings.put_into(self.new.embeddings()):
                self.writer.write(EMBEDDING, rows, first_row)

    def _begin_embeddings(self, windows: Mapping[str, Windows]) -> LearnedEmbeddings | None:
        """Those of the text's tokens, as they are fused; or as an interrupted build has refined
        them with the first layer. None where they do not learn."""
        if not self.recipe.refines_embeddings:
            return None
        begun = LearnedEmbeddings.begin(windows, self.new.embeddings())
        if self._layer_is_finished(0):
            found = {}
            if self.is_first:
                found = {"rows": self.writer.read(EMBEDDING)[begun.tokens]}
            begun.rows = self.processes.share(found)["rows"]
        return begun

    def _begin_fit(self) -> FitState | None:
        """All streams of the fit at their token embeddings; None where nothing is fitted."""
        if not self.recipe.fits or self.recipe.only_removes:
            return None
        text = self.text
        texts = {n: joined((text.validation[n], text.fitted[n])) for n in sorted(text.fitted)}
        windows = {name: each.windows for name, each in texts.items()}
        processes = self.processes
        state = FitState(
            self.recipe,
            self.anchor.family,
            {source.name: source.config for source in self.sources},
            self.config,
            windows,
            {name: len(each) for name, each in text.validation.items()},
            self._streams(),
            {source.name: source.known for source in self.sources},
            {name: each.positions for name, each in texts.items()},
            processes=processes,
            embeddings=self._begin_embeddings(windows),
            newcomer=self.recipe.newcomer,
        )
        own_text = {name: each[state.numbers(name)] for name, each in windows.items()}
        if state.embeddings is None:
            self.new.begin(state, own_text)
        else:  # their rows are at hand: no source's table is read again
            for name, part in own_text.items():
                count, sequence = part.shape
                state.streams.new(f"{NEW}/{name}", count, sequence, self.config.hidden_size)
            begin_at_embeddings(state)
        if self.recipe.fits_layers:
            for source in self.sources:
                name = source.name
                if not self._makes(name):
                    continue
                own = {f"{SOURCE}/{name}": windows[name][state.numbers(name)]}
                table = aligned_table(self.recipe, source, EMBEDDING, self.new.alignment)
                state.streams.embed(own, source.config, table)
        if self.fits_model:
            some = {n: each[processes.own(state.plain_windows(n))] for n, each in windows.items()}
            self.plain.begin(state, some)
        begin_streams(state)
        return state

    def _build_layer(self, layer: int) -> None:
        """Align, fuse, fit and write one layer. A layer that an interrupted build has finished is
        kept: the streams are only brought past it."""
        record, prefixes = self.folder.layer_done(layer), self._prefixes(layer)
        finished = self._layer_is_finished(layer)
        if finished and self.state is None:
            return
        note: dict[str, Any] = {}
        if not finished:
            note = self._new_layer(layer)
        elif self.recipe.fits_layers and self.state is not None:
            advance_sources(self.state, layer, self._aligned(self.new, layer))
        router = None
        if self.state is not None:
            if layer == self.num_layers - self.num_with_head:
                keep_before_end(self.state)
            # What follows is fitted to the layer as it is written: rounding is an error too.
            self.new.advance(self.state, layer, self._read_written(layer))
            if self.fits_model:
                router = self._advance_plain(self.state, layer, finished)
            self.state = replace(self.state, embeddings=None)  # written, and behind all streams
        if self.is_first and not finished:
            text, measured = self.digest, to_json(note)
            self.writer.when_durable(
                prefixes, lambda digest: write_layer(record, router, text, digest, measured)
            )
            if not self.copies:  # a layer that took long to make is not left to chance
                self.writer.settle()

    def _release_streams(self) -> None:
        if self.state is not None:
            self.state.streams.release()

    def _forget_layers(self) -> None:
        """Leave nothing that a resumed build would keep."""
        for layer in range(self.num_layers):
            for record in (self.folder.layer_compared(layer), self.folder.layer_done(layer)):
                record.unlink(missing_ok=True)

    def _prefixes(self, layer: int) -> tuple[str, ...]:
        """How the names of the tensors begin that are finished with a layer."""
        with_it = (EMBEDDING,) if self.recipe.refines_embeddings and layer == 0 else ()
        return (f"model.layers.{layer}.", *with_it)

    def _layer_is_finished(self, layer: int) -> bool:
        """Whether an interrupted build has finished a layer, which is kept then."""
        finished, prefixes = False, self._prefixes(layer)
        if self.is_first:
            record = self.folder.layer_done(layer)
            finished = is_finished(record, self.digest, lambda: self.writer.digest(prefixes))
            if finished:
                self.writer.keep(prefixes)
        # Where nothing is fitted the first process is at this alone.
        return self.processes.agree(finished) if self.recipe.fits else finished

    def _aligned(self, model: Candidate, layer: int) -> dict[str, dict[str, Tensor]]:
        """Source -> its layer as a model has it. What was read is not kept beside: while a layer is
        fitted, that would be a third of the memory, and to read it again takes no time."""
        return model.aligned(layer, self._read_layer(layer, model.made_of))

    def _new_layer(self, layer: int) -> dict[str, Any]:
        """Make a layer and write it; what was measured."""
        aligned = self._aligned(self.new, layer)
        moe, note = self.new.assemble(layer, aligned), {}
        if self.state is not None:
            moe, fit = fit_layer(self.state, layer, moe, aligned)
            note = fit.to_json()
            if layer == 0:
                self._write_learned_embeddings(self.state)
        self._write_layer(layer, moe)
        return note

    def _advance_plain(self, state: FitState, layer: int, finished: bool) -> Tensor:
        """Bring the plain mean's streams past its own layer; its router there (experts, by name, x
        hidden), which is the only thing that is fitted."""
        moe = self.plain.assemble(layer, self._aligned(self.plain, layer)).to(self.plain.dtype)
        experts = sorted(moe.experts)
        if finished:
            router = self._recorded_router(layer)
        else:
            router = router_matrix(calibrate_plain(state, layer, moe), experts)
            router = router.to(self.plain.dtype)
        rows = router_rows(router, experts)
        self.plain.advance(state, layer, replace(moe, router=rows))
        return router

    def _recorded_router(self, layer: int) -> Tensor:
        """The plain mean's router of a finished layer (experts, by name, x hidden)."""
        found = {}
        if self.is_first:
            found = {"router": read_plain_router(self.folder.layer_done(layer))}
        return self.processes.share(found)["router"]

    def _finish_fit(self) -> ModelFit | None:
        """What was measured; None where nothing is fitted. Fits and writes the head; then, where
        the plain mean loses less on the validation text, writes that instead."""
        if self.state is None:
            return None
        layers = []
        if self.is_first:
            self.writer.settle()
            records = [self.folder.layer_done(layer) for layer in range(self.num_layers)]
            layers = [json.loads(read_note(record)) for record in records]
        if not self.fits_model:
            return ModelFit(layers)
        own = {source.name: self.new.aligned_head(source) for source in self.sources}
        last = range(self.num_layers - self.num_with_head, self.num_layers)
        before = {layer: self._read_written(layer) for layer in last}
        head, refined, head_fit = fit_head(self.state, self.new.whole_head(), own, before)
        if refined is not before:
            self._write_last_layers(self.state, refined, layers)
        written = {}
        if self.is_first:
            self.writer.write(HEAD, head)
            written = {HEAD: self.writer.read(HEAD)}
        plain_head = self.plain.whole_head()
        rounded = plain_head.to(self.plain.dtype).float()
        by_source = {
            HARMONIZED: self.new.losses(self.state, self.processes.share(written)[HEAD]),
            PLAIN_MEAN: self.plain.losses(self.state, rounded),
        }
        chosen = _better(by_source)
        if chosen == PLAIN_MEAN and self.is_first:
            self._write_plain(plain_head)
        return ModelFit(layers, head_fit, by_source, chosen)

    def _write_last_layers(
        self, state: FitState, refined: Mapping[int, MoELayer], notes: list[dict[str, Any]]
    ) -> None:
        """Write the layers that were refined with the head over what they were, and bring the
        validation text past them. `notes`: what was measured of all layers, to which it is added
        where these route that text."""
        for layer, moe in refined.items():
            self._write_layer(layer, moe)
        go_back_before_end(state)
        for layer in refined:
            moe = self._read_written(layer)
            routing = None if moe.is_dense else validation_routing(state, layer, moe)
            if self.is_first and routing is not None:
                notes[layer] |= {"routing": routing.to_json()}
            advance_on_validation(state, layer, moe)

    def _write_plain(self, head: Tensor) -> None:
        """Write the plain mean over the fitted model."""
        self._write_tables(self.plain, EMBEDDING)
        self.writer.write(HEAD, head)
        for layer in range(self.num_layers):
            aligned = self._aligned(self.plain, layer)
            matrix = read_plain_router(self.folder.layer_done(layer))
            moe = self.plain.assemble(layer, aligned)
            router = router_rows(matrix, sorted(moe.experts))
            self._write_layer(layer, replace(moe, router=router))

    def _write_manifest(
        self,
        tensor_hashes: Mapping[str, str],
        file_hashes: Mapping[str, str],
        begun_with: Mapping[str, str],
        chosen: str | None,
    ) -> None:
        """Hashes of everything that was made and of what it was made from."""
        now, folder = versions(), self.folder
        sources = self.recipe.sources
        folder.update_json(
            folder.manifest,
            {
                "versions": now,
                **self.arithmetic,
                **({} if begun_with == now | self.arithmetic else {"begun_with": dict(begun_with)}),
                **({} if chosen is None else {"model": chosen}),
                **({} if self.kept is None else {"parent": self._about_parent(self.kept)}),
                "sources": {name: spec.sha256 for name, spec in sources.items()},
                "files": {
                    folder.alignment.name: sha256_of(folder.alignment),
                    **hash_folder(folder.staged_checkpoint, file_hashes),
                },
                "tensors": {"checkpoint": dict(tensor_hashes)},
            },
        )

    def _about_parent(self, kept: KeptModel) -> dict[str, Any]:
        """For `manifest.json`: which run's model was changed, what is kept of it, and what was
        made."""
        assert self.recipe.parent is not None
        made = [name for name in self.names if self._makes(name)]
        others = [name for name in self.names if not self._makes(name)]
        assert isinstance(self.new, ChangedCandidate)
        # A calibrated router knows its experts by one another's text: all of its rows are new.
        calibrates = bool(made) and self.recipe.fits_router
        return {
            "folder": kept.run.root.resolve().name,
            **self.recipe.parent.model_dump(include={"model", "sha256", "added", "removed"}),
            "kept": {
                "backbone": True,
                "experts": others,
                "router_rows": [] if calibrates else others,
            },
            "made": {
                "experts": made,
                "router_rows": self.names if calibrates else made,
                "token_rows": int((self.new.token_rows < 0).sum()),
            },
        }

    def _streams(self) -> Streams:
        """Streams in memory, or in files, as planned."""
        folder = self.folder.work
        if self.planned.streams_in_memory:
            return Streams()
        if not folder.is_dir():
            raise RunFolderError(
                f"process {self.processes.number + 1} of {self.processes.count}: {folder} is not "
                "there; all processes must see the run folder under the same path"
            )
        return Streams(folder if self.is_first else folder / f"process-{self.processes.number}")

    def _read_layer(self, layer: int, sources: Sequence[Source]) -> dict[str, dict[str, Tensor]]:
        """Source -> its layer (name within the layer -> tensor)."""
        return read_layers(sources, layer, as_stored=self.copies)

    def _write_layer(self, layer: int, moe: MoELayer) -> None:
        family, config = self.anchor.family, self.config
        if family.slices > 1:
            self._refuse_same_rows(layer, moe)
        if self.is_first:
            for name, tensor in layer_outputs(family, config, layer, moe, self.names):
                self.writer.write(name, tensor)

    def _refuse_same_rows(self, layer: int, moe: MoELayer) -> None:
        """Raise SourceMismatch where a router does not tell two sources apart, whose slices it
        would mix."""
        dtype = self.recipe.output.dtype
        found = same_rows(moe, getattr(torch, dtype))
        if found is not None:
            raise SourceMismatch(
                f"experts.per_source: {found[0]} and {found[1]} have the same router row in layer "
                f"{layer} ({dtype}), so a token would get a part of each source's FFN. Is their "
                "text the same? Give them different data, or set router.init to random or "
                "experts.per_source to 1, and build with --overwrite"
            )

    def _read_written(self, layer: int) -> MoELayer:
        family, config, moe = self.anchor.family, self.config, None
        if self.is_first:
            moe = read_layer_outputs(family, config, layer, self.names, self.writer.read)
        return shared_layer(self.processes, moe)


def _mean(losses: Mapping[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def _better(by_source: Mapping[str, Mapping[str, float]]) -> str:
    """The model that loses less on the validation text: the fitted one, where they are equal."""
    losses = {model: _mean(of) for model, of in by_source.items()}
    # A loss that is NaN is not better than anything.
    worth = {model: loss if math.isfinite(loss) else math.inf for model, loss in losses.items()}
    chosen = min(worth, key=lambda model: worth[model])
    log.info(
        "validation text: %.3f nats per token, the plain mean %.3f; writing the %s",
        losses[HARMONIZED],
        losses[PLAIN_MEAN],
        "plain mean" if chosen == PLAIN_MEAN else "fitted model",
    )
    for name, fitted in by_source[HARMONIZED].items() if chosen == HARMONIZED else ():
        mean = by_source[PLAIN_MEAN][name]
        if mean < fitted:
            log.warning(
                "on the validation text of %s the plain mean of the sources loses less (%.3f nats "
                "per token) than the fitted model (%.3f)",
                name,
                mean,
                fitted,
            )
    return chosen
