"""A change of experts: the model of an earlier run, kept as it is, with one expert more or fewer.

Backbone, embeddings, head, the other experts and their router rows are the earlier run's, byte for
byte: `KeptModel` reads them. `ChangedCandidate` is the new model: those, and what the one new
expert brings. BAR and FlexOlmo show what experts that come and go are worth; there too the shared
part stays as it is.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from symphony_moe.building.alignment import Alignment
from symphony_moe.building.assemble import (
    aligned_table,
    assemble_experts,
    origin_of,
    stream_scale_of,
)
from symphony_moe.building.candidate import Candidate
from symphony_moe.errors import RunFolderError, SourceMismatch, SymphonyError
from symphony_moe.files import hash_folder, sha256_of, to_json
from symphony_moe.model.families import EMBEDDING, FINAL_NORM, HEAD
from symphony_moe.model.moe_layer import MoELayer, read_layer_outputs
from symphony_moe.model.symmetry import scale_residual
from symphony_moe.recipe.settings import FormerSource, Parent, Recipe, SourceSpec
from symphony_moe.runs.folder import RunFolder
from symphony_moe.runs.metrics import PLAIN_MEAN
from symphony_moe.sources.opening import open_source
from symphony_moe.sources.pretrained import load_tokenizer
from symphony_moe.sources.provenance import Provenance, provenance
from symphony_moe.sources.source import TABLE_ROWS, FileStates, Source, anchor_of, file_state

_SHAPE = {
    "intermediate_size": "neurons",
    "hidden_size": "channels of the residual stream",
    "num_hidden_layers": "layers",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV heads",
}
"""Config field -> what it counts."""


@dataclass(frozen=True)
class KeptModel:
    """The model of a finished run: the trained one, where there is one."""

    run: RunFolder
    folder: Path
    """`checkpoint/` or `trained/` of the run."""
    experts: Sequence[str]
    """Its experts, in their order."""
    chosen: str | None
    """Which model a fit has written (`manifest.json`, `model`)."""
    sha256: str
    """Of the hashes of its tensors."""
    states: FileStates
    """Its files as they were when their hashes were compared."""

    @classmethod
    def of(cls, run: RunFolder) -> "KeptModel":
        """The model that a change of a run's experts begins with. Raises RunFolderError for a run
        that is not finished, and as `read_from` does."""
        run.read_finished()
        return cls.read_from(run, run.trained if run.trained.is_dir() else run.checkpoint)

    @classmethod
    def read_from(cls, run: RunFolder, folder: Path) -> "KeptModel":
        """One of a run's models. Raises RunFolderError where it is not what the manifest says."""
        experts, manifest = run.read_recipe().expert_names, run.read_json(run.manifest)
        states = {path.name: file_state(path) for path in folder.iterdir()}
        listed = {k: v for k, v in manifest["files"].items() if k.startswith(f"{folder.name}/")}
        digests = manifest["tensors"].get(folder.name)
        if not isinstance(digests, dict) or hash_folder(folder) != listed:
            raise RunFolderError(
                f"{folder}: not what {run.manifest.name} says; `symphony verify {run.root}` says "
                "more. Put it back, or make the run again"
            )
        maps = run.alignment
        if not maps.is_file() or sha256_of(maps) != manifest["files"].get(maps.name):
            raise RunFolderError(f"{maps}: not what {run.manifest.name} says; put it back")
        digest = sha256(to_json(dict(sorted(digests.items()))).encode()).hexdigest()
        return cls(run, folder, experts, manifest.get("model"), digest, states)

    @classmethod
    def find(cls, run: RunFolder, recipe: Recipe, where: RunFolder | None) -> "KeptModel":
        """The model that a run came of, in the old run: `where`, or a folder of the old one's name
        beside the run. Raises RunFolderError where it is not there."""
        assert recipe.parent is not None
        if where is None:
            about = run.read_json(run.manifest).get("parent") or {}
            where = RunFolder(run.root.resolve().parent / str(about.get("folder")))
        folder = where.root / recipe.parent.model
        if not (where.recipe.is_file() and folder.is_dir()):
            raise RunFolderError(
                f"{where.root}: not the old run, which has recipe.yaml and {folder.name}/"
            )
        found = cls.read_from(where, folder)
        if found.sha256 != recipe.parent.sha256:
            raise RunFolderError(f"{folder}: another model than {run.root} came of")
        return found

    def parent(self, *, added: str | None, removed: str | None) -> Parent:
        """What the recipe of a run that comes of this one says of it."""
        old = self.run.read_recipe()
        is_trained = self.folder == self.run.trained
        former = [] if removed is None else [_former(removed, old.sources[removed])]
        return Parent(
            model="trained" if is_trained else "checkpoint",
            trained=is_trained or (old.parent is not None and old.parent.trained),
            former=[*(() if old.parent is None else old.parent.former), *former],
            sha256=self.sha256,
            added=added,
            removed=removed,
            tied_head=HEAD not in self._where,
        )

    def refuse_touched(self) -> None:
        """Raise RunFolderError where a file is not the one whose hash was compared."""
        now = {path.name: file_state(path) for path in self.folder.glob("*")}
        if now != self.states:
            raise RunFolderError(
                f"{self.folder}: was changed while it was read, so that the new run may hold parts "
                "of both states. Leave the old run as it is until the new one is done; --overwrite "
                "begins again"
            )

    def refuse_other_shape(self, planned: Mapping[str, Any]) -> None:
        """Raise SourceMismatch where the changed run's sources have another shape than the experts
        that are kept: the largest of them came or went. `planned`: the changed run's
        config.json."""
        own = json.loads((self.folder / "config.json").read_bytes())
        for field, what in _SHAPE.items():
            if field == "num_attention_heads" and "kv_channels" in own:
                continue  # JetMoE counts those of all chosen experts
            if own.get(field) not in (None, planned[field]):
                raise SourceMismatch(
                    f"{self.run.root}: its experts have {own[field]:,} {what}, and the largest of "
                    f"the changed run's sources has {planned[field]:,}; all experts of one model "
                    "have one shape. Build anew with these sources"
                )

    @property
    def is_plain_mean(self) -> bool:
        """Whether its experts are in coordinates of their own, though the recipe aligns."""
        return self.chosen == PLAIN_MEAN

    @cached_property
    def alignment(self) -> Alignment:
        """The maps of its sources."""
        return Alignment.load(self.run.alignment)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What its tables have a row for."""
        return load_tokenizer(self.folder)

    @cached_property
    def _where(self) -> dict[str, Path]:
        """Tensor -> its file."""
        found: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    found |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise RunFolderError(f"{path}: not readable: {error}") from None
        return found

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or some of its rows, as float32."""
        with safe_open(self._where[name], framework="pt") as file:
            # A copy: while one tensor of a file is in use, all of it stays mapped.
            found: Tensor = file.get_slice(name)[rows]
            return found.float().clone()

    def layer(self, like: Source, layer: int) -> MoELayer:
        """One of its layers. `like`: any of its sources, for what their family and config are."""
        return read_layer_outputs(like.family, like.config, layer, self.experts, self.read)

    def rows_of(self, tokens: Mapping[str, int], size: int) -> Int[Tensor, " vocabulary"]:
        """Where its tables have the rows of another vocabulary of `size` rows; -1 for tokens that
        it lacks. Tokens are matched by what they say. A padding row is the one at its place, where
        that is padding here too."""
        own = self.tokenizer.get_vocab()
        rows = self._rows(own, size)
        rows[torch.tensor(sorted(tokens.values()))] = -1
        for token, number in tokens.items():
            rows[number] = own.get(token, -1)
        return rows

    def _rows(self, own: Mapping[str, int], size: int) -> Int[Tensor, " vocabulary"]:
        """The places that are padding in its tables, each at its own; -1 elsewhere."""
        with safe_open(self._where[EMBEDDING], framework="pt") as file:
            there = file.get_slice(EMBEDDING).get_shape()[0]
        padding = torch.arange(there)
        padding[torch.tensor(sorted(own.values()))] = -1
        rows = torch.full((size,), -1, dtype=torch.int64)
        both = min(size, there)
        rows[:both] = padding[:both]
        return rows

    def table(
        self, name: str, rows: Int[Tensor, " vocabulary"]
    ) -> Iterator[tuple[int, Float[Tensor, "rows hidden"]]]:
        """(first row, rows) of token embeddings or output head, block by block, in the order of
        `rows`: zeros for -1."""
        for first in range(0, len(rows), TABLE_ROWS):
            wanted = rows[first : first + TABLE_ROWS]
            there = wanted >= 0
            if not bool(there.any()):
                yield first, torch.zeros(len(wanted), self.read(name, slice(0, 1)).shape[1])
                continue
            low, high = int(wanted[there].min()), int(wanted.max())
            part = self.read(name, slice(low, high + 1))
            block = part.new_zeros(len(wanted), part.shape[1])
            block[there] = part[wanted[there] - low]
            yield first, block


@dataclass(frozen=True)
class ChangedCandidate(Candidate):
    """The model of an earlier run with other experts."""

    kept: KeptModel

    @property
    def newcomer(self) -> Source | None:
        """The source of the expert that is made; None where an expert is left out, and no more."""
        return next((s for s in self.sources if s.name == self.recipe.newcomer), None)

    @property
    def made_of(self) -> Sequence[Source]:
        """The source whose layers are read, if any is."""
        return made_of(self)

    @cached_property
    def token_rows(self) -> Int[Tensor, " vocabulary"]:
        """Where the kept tables have the rows of this model's tables, -1 where they lack them."""
        anchor = anchor_of(self.recipe, self.sources)
        return self.kept.rows_of(anchor.tokenizer.get_vocab(), anchor.config.vocab_size)

    def tables(self, names: Sequence[str]) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first row, rows) of token embeddings and head, block by block: the kept rows, and
        of tokens that they lack the newcomer's."""
        for name in names:
            lack = bool((self.token_rows < 0).any())
            more = [self._own_rows(name, source) for source in self._fill] if lack else []
            for (first, rows), *others in zip(
                self.kept.table(name, self.token_rows), *more, strict=True
            ):
                missing = self.token_rows[first : first + len(rows)] < 0
                for known, own in others:
                    rows[missing & known] = own[missing & known]
                yield name, first, rows

    @property
    def _fill(self) -> list[Source]:
        """The sources of rows that the kept tables lack, the last one's last: padding is the
        anchor's."""
        anchor = anchor_of(self.recipe, self.sources)
        return [anchor] if self.newcomer is None else [anchor, self.newcomer]

    def _own_rows(self, name: str, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
        """(which of them it knows, rows) of a source's table, block by block."""
        scale = stream_scale_of(self.recipe, self.sources) if name == EMBEDDING else 1.0
        for first, rows in aligned_table(self.recipe, source, name, self.alignment):
            known = torch.ones(len(rows), dtype=torch.bool)
            if source.known is not None:
                known = source.known[first : first + len(rows)]
            yield known, rows * scale

    def final_norm(self) -> Tensor:
        """The kept gains of the norm before the head."""
        return self.kept.read(FINAL_NORM)

    def assemble(self, layer: int, aligned: Mapping[str, Mapping[str, Tensor]]) -> MoELayer:
        """A layer before any fit: the kept one without the expert that is left out, and with the
        one that is new, whose router row is random."""
        kept = self.kept.layer(self.sources[0], layer)
        if kept.is_dense:  # a part of the backbone
            return kept
        gone = None if self.recipe.parent is None else self.recipe.parent.removed
        names = [name for name in self.kept.experts if name != gone]
        parts = [_of_experts(kept, names)]
        if self.newcomer is not None:
            parts.append(new_expert(self, layer, aligned, kept.shared))
        return _together(parts)


def _former(name: str, spec: SourceSpec) -> FormerSource:
    """What is still to be said of a source whose expert is taken out: its weights stay in the
    backbone. Of one that is not there any more nothing is known."""
    try:
        found = provenance(open_source(name, spec, download=False), spec)
    except SymphonyError:
        found = Provenance()
    return FormerSource(
        name=name,
        hub_ids=list(found.hub_ids),
        licences=[None if one is None else asdict(one) for one in found.licences],
        languages=list(found.languages),
    )


def made_of(model: Candidate) -> list[Source]:
    """The source whose layers a change of experts reads, if any is."""
    newcomer = model.recipe.newcomer
    origin = None if newcomer is None else origin_of(model.recipe, newcomer)
    return [source for source in model.sources if source.name == origin]


def new_expert(
    model: Candidate,
    layer: int,
    aligned: Mapping[str, Mapping[str, Tensor]],
    shared: Mapping[str, Tensor],
) -> MoELayer:
    """The newcomer's expert of a layer before any fit, and a random router row for it, around a
    backbone. `aligned`: the layer of its origin."""
    scale = stream_scale_of(model.recipe, model.sources)
    scaled = {name: scale_residual(tensors, scale) for name, tensors in aligned.items()}
    new = [source for source in model.sources if source.name == model.recipe.newcomer]
    return assemble_experts(model.recipe, new, layer, scaled, shared)


def _of_experts(layer: MoELayer, names: Sequence[str]) -> MoELayer:
    """A layer with some of its experts."""
    chooser = layer.attention_router
    return replace(
        layer,
        experts={name: layer.experts[name] for name in names},
        router={name: layer.router[name] for name in names},
        attention_router=None if chooser is None else {name: chooser[name] for name in names},
    )


def _together(parts: Sequence[MoELayer]) -> MoELayer:
    """One layer with the experts of several, which have one backbone."""
    choosers = [part.attention_router for part in parts if part.attention_router is not None]
    return replace(
        parts[0],
        experts={name: expert for part in parts for name, expert in part.experts.items()},
        router={name: row for part in parts for name, row in part.router.items()},
        attention_router=(
            {name: row for rows in choosers for name, row in rows.items()} if choosers else None
        ),
    )
