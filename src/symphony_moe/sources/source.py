"""One dense checkpoint, read tensor by tensor."""

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from symphony_moe.errors import SourceError, first_line
from symphony_moe.files import read_into, sha256_of
from symphony_moe.model.checkpoint import is_finite
from symphony_moe.model.families import (
    AUTO,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    NEURON_AXIS,
    Family,
    Target,
    TurnedPart,
    with_more_heads,
)
from symphony_moe.model.widening import Widening
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.adapter import FILES as ADAPTER_FILES
from symphony_moe.sources.adapter import Adapter
from symphony_moe.sources.pretrained import code_of, load_tokenizer
from symphony_moe.sources.source_tokenizer import (
    SourceTokenizer,
    left_out,
    tokenizer_paths,
    without_rowless,
)
from symphony_moe.sources.tokenizer_checks import cut_otherwise
from symphony_moe.sources.transplant import Combination, LinearMap, Places, Transplant
from symphony_moe.sources.vocabulary import Vocabulary
from symphony_moe.text.windows import Encoder

GENERATION = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_CONFIG = "tokenizer_config.json"

CODE = ("auto_map", "custom_generate")
"""What a generation config says of code: it is neither run nor carried on."""

TABLE_ROWS = 8192
"""Rows of an embedding table that are read at once."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes that are read, as safetensors spells them."""

_COPIED = ("F32", "BF16", "F16")
"""Those that stay as they are where a tensor is only copied."""


@dataclass(frozen=True)
class Header:
    """What a safetensors header says of one tensor."""

    file: str
    """Name of the file in the source's folder."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: `BF16`, `F32`, ..."""
    stored: str | None = None
    """Its name in the file, where that is another."""
    rows: int | None = None
    """Rows that it has in the file, where an adapter has made that more or fewer."""
    offset: int | None = field(default=None, compare=False)
    """Where its bytes begin in the file; None where the file is not here."""
    turned: TurnedPart | None = None
    """Of q and k whose heads are turned in part: its rows are read in the order of heads that are
    turned whole."""


FileState = tuple[int, int, int]
"""Size, time of the last change (nanoseconds), number in the file system."""
FileStates = Mapping[str, FileState]
"""File -> its state. One that is replaced or written to has another."""


def file_state(path: Path) -> FileState:
    """Of a file as it is now."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@dataclass(frozen=True)
class Source:
    """One dense checkpoint. Nothing of its weights is in memory."""

    name: str
    model: str
    """As the recipe spells it: folder, hub id, or bundled name."""
    folder: Path
    config: PreTrainedConfig
    headers: Mapping[str, Header]
    """Tensor name -> header."""
    origin: Path | None = None
    """The folder with the files that `folder` was converted from, where it was."""
    converted: tuple[str, ...] = ()
    """Those of them that hold weights."""
    adapter: Adapter | None = None
    """LoRA that is merged into its tensors as they are read."""
    tokenizer_folder: Path | None = None
    """The folder with its tokenizer, where that is not `folder`: an adapter may have its own."""
    vocabulary: Vocabulary | None = None
    """What it shares with the other sources, where theirs is not its own; `config.vocab_size` is
    the size of that then."""
    transplant: Transplant | None = field(default=None, repr=False, compare=False)
    """What makes rows for the anchor's ordinary tokens that it lacks; None where no such row is
    used, but for reading."""
    target: Target = AUTO
    """What the recipe says of the output's architecture."""
    widening: Widening | None = field(default=None, repr=False)
    """How its tensors are brought to the shape of the others, where theirs is larger
    (`backbone.shapes`); `config` is of that shape then. `read` gives them as they are stored, what
    is named below gives them in that shape."""
    notes: tuple[str, ...] = ()
    """What its files hold that is ignored, or that its config does not say, in words."""
    dropped: tuple[str, ...] = ()
    """What its config says and `config` does not, in words."""
    loaded_tokenizer: PreTrainedTokenizerBase | None = field(
        default=None, repr=False, compare=False
    )
    """Its own tokenizer, where it has been read already: a copy need not read it again."""

    @property
    def family(self) -> Family:
        """The row of its architecture, for the output that the recipe asks for."""
        return self.target.family(self.config)

    @property
    def as_stored(self) -> "Source":
        """The source in the shape that its files have."""
        if self.widening is None:
            return self
        config = copy.deepcopy(self.widening.own)
        return replace(self, config=config, widening=None)

    @property
    def head_name(self) -> str:
        """The tensor that holds the output head: the embeddings, where the head is tied to them."""
        return EMBEDDING if self.config.tie_word_embeddings else HEAD

    @property
    def own_rows(self) -> int:
        """Rows of its embedding table."""
        return self.headers[EMBEDDING].shape[0]

    @property
    def own_ffn(self) -> int:
        """Neurons of its FFN as it is stored; `config.intermediate_size` counts those of zeros too
        that it is padded with, where another source is wider."""
        return self.headers[f"model.layers.0.{GATE}"].shape[0]

    @property
    def known(self) -> Bool[Tensor, " vocabulary"] | None:
        """Which tokens of the shared vocabulary it has, those included whose rows are made; None
        where it has all."""
        if self.vocabulary is None:
            return None
        known = self.vocabulary.tables[self.name].known
        return known if self.transplant is None else known | self.vocabulary.ordinary

    @property
    def num_parameters(self) -> int:
        """Numbers in its tensors, those of a tied head counted once."""
        return sum(math.prod(header.shape) for header in self.headers.values())

    @property
    def public_name(self) -> str:
        """The model without the machine's paths."""
        return public_name(self.model)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What makes tokens of text for all sources of a build."""
        return self.own_tokenizer if self.vocabulary is None else self.vocabulary.tokenizer

    @cached_property
    def own_tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's own (or the adapter's), without what only its class adds beyond the model's
        rows. Raises SourceError where its files cannot be read, and where they list tokens that the
        model has no rows for."""
        if self.loaded_tokenizer is not None:
            return self.loaded_tokenizer
        folder = self.tokenizer_folder or self.folder
        try:
            loaded = load_tokenizer(folder)
            tokenizer, _ = without_rowless(loaded, folder, self.own_rows)
            num_tokens = max(tokenizer.get_vocab().values()) + 1
        except Exception as error:
            # The loaders behind AutoTokenizer raise whatever their parser raised.
            raise SourceError(
                f"{self.name}: {why_unusable(folder, error)}{self._or_the_models}"
            ) from None
        if num_tokens > self.own_rows:
            raise SourceError(
                f"{self.name}: the tokenizer in {folder} has {num_tokens} tokens, the model "
                f"embeddings for {self.own_rows}; is it another model's tokenizer? "
                "Otherwise remove the tokens that have no embedding"
                + kinds_hint(SourceTokenizer(self.name, folder, loaded, self.own_rows))
                + self._or_the_models
            )
        return tokenizer

    @cached_property
    def encoder(self) -> Encoder:
        """What makes tokens of its documents: begun and ended as its own tokenizer does it, in the
        numbers of the shared vocabulary."""
        eos = getattr(self.config, "eos_token_id", None)
        return Encoder.of(self.own_tokenizer, self.tokenizer, eos)

    @property
    def _or_the_models(self) -> str:
        beside = self.tokenizer_folder is not None
        return ". Without tokenizer files beside its adapter the model's are used" if beside else ""

    @property
    def generation(self) -> dict[str, Any] | None:
        """What its generation_config.json says; None where it has none. Special tokens of an
        adapter's own tokenizer are in it, as in its config: any of several ends a text."""
        path = self.folder / GENERATION
        if not path.is_file():
            return None
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
        return settings if self.tokenizer_folder is None else self._with_its_tokens(settings)

    def _with_its_tokens(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings with the special tokens of its tokenizer, put there as transformers' Trainer
        puts them into a model that it trains; an adapter's files do not keep them."""
        changed = dict(settings)
        for key in SPECIAL:
            number, old = getattr(self.own_tokenizer, key, None), settings.get(key)
            listed = old if isinstance(old, list) else [old]
            if number is None or number in listed:
                continue
            several = key == "eos_token_id" and old is not None
            changed[key] = [number, *listed] if several else number
        return changed

    @property
    def source_tokenizer(self) -> SourceTokenizer:
        """Its own tokenizer, the size of its tables, and its config's special tokens."""
        special = {key: getattr(self.config, key, None) for key in ("eos_token_id", "pad_token_id")}
        folder = self.tokenizer_folder or self.folder
        generation = None if self.generation is None else read_generation(self)[0]
        return SourceTokenizer(
            self.name, folder, self.own_tokenizer, self.own_rows, special, generation
        )

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """What a source's files say and the result does not take over, or not as it stands."""
        found = [*self.dropped, *read_generation(self)[1]]
        folder = self.tokenizer_folder or self.folder
        for where, file in ((self.folder, "config.json"), (folder, TOKENIZER_CONFIG)):
            if code := code_of(where, file):
                found.append(
                    f"{file} names code ({', '.join(code)[:80]}), which is never run: the classes "
                    "of transformers are used, and the result names none"
                )
        tokenizer = self.own_tokenizer
        if gone := left_out(tokenizer):
            found.append(
                f"the model has no rows for {some(gone)}, which only the tokenizer's class adds: "
                "left out"
            )
        elif fill := getattr(tokenizer, "fill_token", None):
            found.append(
                f"its tokenizer's class makes two texts of one with {fill}; to the result, whose "
                "class is another, it is a token like others"
            )
        text = cut_otherwise(self.source_tokenizer)
        if text is not None:
            found.append(
                f"tokenizer.json says to cut text otherwise than the class does that transformers "
                f"takes for it, as in {text[:60]!r}; text is cut as by the class, here and by the "
                "result where it is the anchor"
            )
        return (*self.notes, *(f"{self.name}: {remark}" for remark in found))

    def read(
        self,
        name: str,
        rows: slice | None = None,
        *,
        as_stored: bool = False,
        reads: "SharedReads | None" = None,
    ) -> Tensor:
        """One tensor (or some of its first axis) as float32, with the adapter in it; `as_stored`:
        in the dtype of the file, where that is one that models are written in. `reads`: the pass
        over several sources that this is a part of. The tensor may be another source's as well:
        nobody changes it in place.

        Raises SourceError for a file that cannot be read and for values that are not finite.
        """
        reads = reads or SharedReads([self])
        if self.adapter is None or not self.adapter.touches(name):
            return reads.own(self, name, rows, as_stored=as_stored)
        if rows is not None and self.adapter.needs_all_rows(name):
            return self.read(name, reads=reads)[rows]
        weight = None if self.adapter.holds(name) else reads.own(self, name, rows)
        return self.adapter.merge(name, weight, slice(None) if rows is None else rows)

    def _stored(self, name: str, rows: slice | None) -> Tensor:
        """A tensor, or some of its rows, as it is in the file."""
        header = self.headers[name]
        if header.turned is not None:
            whole = self._rows(header, name, slice(None))
            return over_whole_heads(whole, header.turned)[slice(None) if rows is None else rows]
        return self._rows(header, name, rows or slice(None))

    def _rows(self, header: Header, name: str, rows: slice) -> Tensor:
        """Rows as they lie in the file."""
        first, last, _ = rows.indices(header.rows or header.shape[0])
        tensor = torch.empty((max(0, last - first), *header.shape[1:]), dtype=DTYPES[header.dtype])
        per_row = math.prod(header.shape[1:]) * tensor.element_size()
        if not len(tensor):
            return tensor  # rows that only the adapter has
        own, path = header.stored or name, self.folder / header.file
        assert header.offset is not None, f"{path}: no file that is here"
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(header.offset + first * per_row)
                read_into(file, tensor.view(torch.uint8).numpy().data.cast("B"))
        except OSError as error:
            raise SourceError(f"{self.name}: {own} in {path} is not readable: {error}") from None
        # The stored numbers: bfloat16 is half as many bytes to look at.
        if not is_finite(tensor if header.dtype in _COPIED else tensor.float()):
            raise SourceError(f"{self.name}: {own} in {path} has {_why_not_finite(tensor)}")
        return tensor

    def table(
        self, name: str, reads: "SharedReads | None" = None, *, as_head: bool = False
    ) -> Iterator[tuple[int, Float[Tensor, "rows hidden"]]]:
        """(first row, rows) of its token embeddings or output head in the shared vocabulary, block
        by block. A token that it lacks is the mean of the pieces that it makes of the token's text,
        or what the transplant makes of it; a padding row that it lacks is zero. `reads`: see
        `read`. `as_head`: the table is asked for as the head, which may be the embeddings."""
        for first, rows in self._own_table(name, reads, as_head=as_head):
            if self.widening is None:
                yield first, rows
            elif name == EMBEDDING:
                yield first, self.widening.embedding(rows)
            else:
                yield first, self.widening.head(rows)

    def _own_table(
        self, name: str, reads: "SharedReads | None", *, as_head: bool
    ) -> Iterator[tuple[int, Float[Tensor, "rows own_hidden"]]]:
        """`table`, as wide as it is stored."""
        if self.vocabulary is None:
            for first in range(0, self.headers[name].shape[0], TABLE_ROWS):
                yield first, self.read(name, slice(first, first + TABLE_ROWS), reads=reads)
            return
        where = self.vocabulary.tables[self.name]
        for first in range(0, self.vocabulary.size, TABLE_ROWS):
            wanted = where.rows[first : first + TABLE_ROWS]
            pieces = {
                number: where.pieces[number]
                for number in range(first, first + len(wanted))
                if number in where.pieces
            }
            parts = torch.tensor([row for rows in pieces.values() for row in rows]).long()
            rows = self.rows_of(name, torch.cat((wanted, parts)), reads)
            block, means = rows[: len(wanted)], rows[len(wanted) :]
            for number, these in pieces.items():
                block[number - first] = means[: len(these)].mean(dim=0)
                means = means[len(these) :]
            self._put_made_rows(name, first, block, as_head=as_head)
            yield first, block

    def rows_of(
        self, name: str, wanted: Int[Tensor, " rows"], reads: "SharedReads | None" = None
    ) -> Float[Tensor, "rows hidden"]:
        """Rows of a table by number, zeros for -1; read in blocks, so that no table is ever whole
        in memory."""
        rows = torch.zeros(len(wanted), self.headers[name].shape[1])
        for block in (wanted[wanted >= 0] // TABLE_ROWS).unique().tolist():
            begin = block * TABLE_ROWS
            inside = (wanted >= begin) & (wanted < begin + TABLE_ROWS)
            part = self.read(name, slice(begin, begin + TABLE_ROWS), reads=reads)
            rows[inside] = part[wanted[inside] - begin]
        return rows

    @cached_property
    def places(self) -> Places:
        """Where the ordinary tokens are that it and the anchor have, or the anchor alone."""
        assert self.vocabulary is not None
        rows, ordinary = self.vocabulary.tables[self.name].rows, self.vocabulary.ordinary
        shared = torch.where(ordinary & (rows >= 0))[0]
        return Places(shared, rows[shared], torch.where(ordinary & (rows < 0))[0])

    def _put_made_rows(
        self, name: str, first: int, block: Float[Tensor, "rows hidden"], *, as_head: bool
    ) -> None:
        """Put what the transplant makes into a block of a table that begins at row `first`."""
        if self.transplant is None or (self.transplant.makes_of_pieces and as_head):
            return
        missing = self.places.missing
        inside = (missing >= first) & (missing < first + len(block))
        if not bool(inside.any()):
            return
        here = missing[inside] - first
        if self.transplant.makes_of_pieces:
            # What follows a token follows its last piece: measured, docs/how-to/vocabularies.md.
            block[here] = (block[here] + self._last_pieces(name, missing[inside])) / 2
        else:
            block[here] = self._made_rows(self.transplant, name, inside)

    def _last_pieces(
        self, name: str, tokens: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens hidden"]:
        """A table's rows of the last piece of each of some tokens that it lacks."""
        assert self.vocabulary is not None
        pieces = self.vocabulary.tables[self.name].pieces
        return self.rows_of(name, torch.tensor([pieces[token][-1] for token in tokens.tolist()]))

    def _made_rows(
        self, transplant: Transplant, name: str, which: Bool[Tensor, " missing"]
    ) -> Float[Tensor, "tokens hidden"]:
        """What is made of rows of a table for some of the missing tokens."""
        theirs = name if name == EMBEDDING else transplant.anchor.head_name
        how = transplant.find(self, (name, theirs), self.places)
        if isinstance(how, LinearMap):
            return how.apply(transplant.anchor.rows_of(theirs, self.places.missing[which]))
        return self._combined(name, Combination(how.rows[which], how.weights[which]))

    def _combined(self, name: str, how: Combination) -> Float[Tensor, "tokens hidden"]:
        """Weighted sums of a table's rows, which is read in blocks."""
        made = torch.zeros(len(how.rows), self.headers[name].shape[1])
        blocks = how.rows // TABLE_ROWS
        for number in blocks.unique().tolist():
            begin = number * TABLE_ROWS
            part = self.read(name, slice(begin, begin + TABLE_ROWS))
            token, term = torch.where(blocks == number)
            places = torch.stack((token, how.rows[token, term] - begin))
            shape = (len(made), len(part))
            weights = torch.sparse_coo_tensor(
                places, how.weights[token, term], shape, check_invariants=True
            )
            made += torch.sparse.mm(weights, part)
        return made

    def final_norm(self) -> Float[Tensor, " hidden"]:
        """The gains of the norm before the head."""
        gain = self.read(FINAL_NORM)
        return gain if self.widening is None else self.widening.final_norm(gain)

    def layer_tensor(
        self,
        layer: int,
        name: str,
        *,
        as_stored: bool = False,
        reads: "SharedReads | None" = None,
    ) -> Tensor:
        """A tensor of a decoder layer by its name within the layer, its FFN padded with neurons of
        zeros up to `config.intermediate_size`. The others: see `read`."""
        widening = self.widening
        own = layer if widening is None else widening.own_layer(layer)
        tensor = self.read(f"model.layers.{own}.{name}", as_stored=as_stored, reads=reads)
        if name in NEURON_AXIS and self.own_ffn < self.config.intermediate_size:
            tensor = _padded(tensor, NEURON_AXIS[name], self.config.intermediate_size)
        return tensor if widening is None else widening.tensor(layer, name, tensor)

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Every tensor of a decoder layer, by its name within the layer."""
        return read_layers([self], layer)[self.name]

    @cached_property
    def changes_expert(self) -> bool:
        """Whether its adapter changes something of what its expert keeps, in any layer: otherwise
        that is the model's own."""
        adapter = self.adapter
        if adapter is None or adapter.changes_nothing:
            return False
        layers = range(self.config.num_hidden_layers)
        return any(
            adapter.touches(f"model.layers.{layer}.{name}")
            for layer in layers
            for name in self.family.expert
        )

    @property
    def weights(self) -> list[str]:
        """The files that hold its weights, as the user has them."""
        return sorted(self.converted or {header.file for header in self.headers.values()})

    def files(self) -> dict[str, Path]:
        """Name -> path, for every file that a build reads: weights, config, tokenizer."""
        folder = self.origin or self.folder
        others = ("config.json", GENERATION, *tokenizer_paths(folder))
        names = self.weights + [file for file in others if (folder / file).is_file()]
        found = {file: folder / file for file in names}
        if self.adapter is not None:
            adapted = self.adapter.folder
            beside = tokenizer_paths(adapted)
            found |= {f"adapter/{file}": adapted / file for file in (*ADAPTER_FILES, *beside)}
        return found

    def file_states(self) -> FileStates:
        """Of every file that a build reads."""
        return {name: file_state(path) for name, path in self.files().items()}

    def hash_files(self, known: dict[Path, str] | None = None) -> dict[str, str]:
        """Name -> SHA-256, for every file that a build reads. `known`: hashes of files that have
        been hashed already; those that are not in it are added."""
        known = {} if known is None else known
        files = self.files()
        for path in files.values():
            if path not in known:
                known[path] = sha256_of(path)
        return {name: known[path] for name, path in files.items()}


class SharedReads:
    """One pass over the tensors of several sources, side by side. What stands in a file that some
    of them share, as adapters of one model do, is read once for all of them: of each such model it
    keeps the tensor, or the rows, that were read last."""

    def __init__(self, sources: Sequence[Source]) -> None:
        counted = Counter(source.folder for source in sources)
        self._shared = {folder for folder, count in counted.items() if count > 1}
        self._last: dict[Path, _Stored] = {}

    def own(
        self, source: Source, name: str, rows: slice | None, *, as_stored: bool = False
    ) -> Tensor:
        """A tensor of the model's own files, or some of its rows: in float32, or in the dtype of
        the file (see `Source.read`)."""
        wanted = name, source.headers[name], rows
        read = self._last.get(source.folder)
        if read is None or read.wanted != wanted:
            read = None
            self._last.pop(source.folder, None)  # gone before the next is there
            read = _Stored(wanted, source._stored(name, rows))
            if source.folder in self._shared:
                self._last[source.folder] = read
        return read.tensor if as_stored and wanted[1].dtype in _COPIED else read.as_float


@dataclass(frozen=True)
class _Stored:
    """A tensor as it was read."""

    wanted: tuple[str, Header, slice | None]
    tensor: Tensor

    @cached_property
    def as_float(self) -> Tensor:
        """In float32."""
        return self.tensor.float()


def read_layers(
    sources: Sequence[Source], layer: int, *, as_stored: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Source -> every tensor of one of its decoder layers, by its name within the layer, as
    `Source.layer_tensor` gives it. Of a model that several sources are adapters of, each tensor is
    read once; where none of them changes it, they have it together. `as_stored`: see
    `Source.read`."""
    if not sources:
        return {}
    reads, family = SharedReads(sources), sources[0].family
    layers: dict[str, dict[str, Tensor]] = {source.name: {} for source in sources}
    for name in (*family.shared, *family.expert):
        for source in sources:
            layers[source.name][name] = source.layer_tensor(
                layer, name, as_stored=as_stored, reads=reads
            )
    return layers


def _padded(
    matrix: Float[Tensor, "rows columns"], axis: int, size: int
) -> Float[Tensor, "more_rows more_columns"]:
    """A matrix with zeros after its last neuron. A neuron whose gate, up and down are zeros puts
    out zero, whatever the activation function."""
    more = size - matrix.shape[axis]
    return pad(matrix, (0, more) if axis == 1 else (0, 0, 0, more))


def by_table(sources: Sequence[Source], name: str) -> list[list[Source]]:
    """The sources, together where one table of embeddings (or head) is that of all of them."""
    together: dict[Any, list[Source]] = {}
    for source in sources:
        changed = source.adapter is not None and source.adapter.touches(name)
        alone = changed or source.vocabulary is not None
        key = source.name if alone else (source.folder, source.headers[name])
        together.setdefault(key, []).append(source)
    return list(together.values())


def _why_not_finite(stored: Tensor) -> str:
    """What keeps a tensor of a file from being finite in float32."""
    # Of the dtypes that are read, only float64 holds numbers that float32 does not.
    beyond = (
        stored.abs() > torch.finfo(torch.float32).max if stored.dtype == torch.float64 else None
    )
    if beyond is not None and bool((beyond & stored.isfinite()).any()):
        value = float(stored[beyond & stored.isfinite()][0])
        return (
            f"{value:.4g}, which is finite but beyond float32 (at most 3.4e38), in which "
            "everything is computed. Expected the weights of a model; fetch the checkpoint again "
            "or leave this source out"
        )
    bad = int((~torch.isfinite(stored.float())).sum())
    return (
        f"{bad} values that are NaN or infinite; expected finite weights. Fetch the checkpoint "
        "again or leave this source out"
    )


def public_name(model: str) -> str:
    """A model or adapter without the machine's paths: a hub id, or a folder's own name."""
    return Path(model).name if Path(model).is_absolute() else model


def experts_of(recipe: Recipe, sources: Sequence[Source]) -> list[Source]:
    """The sources whose models become experts.

    Raises SourceError where the union of vocabularies has a token that none of these has.
    """
    experts = [source for source in sources if source.name in recipe.expert_names]
    if experts[0].vocabulary is not None:
        known = torch.stack([x.known for x in experts if x.known is not None]).any(dim=0)
        if not bool(known.all()):
            token = experts[0].tokenizer.convert_ids_to_tokens(int((~known).nonzero()[0]))
            raise SourceError(
                f"experts.sources: {', '.join(recipe.expert_names)} have no row for the token "
                f"{token!r}, which is another's; leave that source out of the recipe, or "
                "make it an expert"
            )
    return experts


def anchor_of(recipe: Recipe, sources: Sequence[Source]) -> Source:
    """The source that the others are aligned to, and that settles what they differ in."""
    return next(source for source in sources if source.name == recipe.anchor)


def new_config(recipe: Recipe, sources: Sequence[Source]) -> PreTrainedConfig:
    """The dense config by which the new model's attention runs: the anchor's, with the heads of all
    experts' sources where they are concatenated."""
    config = anchor_of(recipe, sources).config
    times = len(recipe.expert_names)
    return with_more_heads(config, times) if recipe.concatenates_heads else config


def is_tied(recipe: Recipe, sources: Sequence[Source]) -> bool:
    """Whether the output's head is its token embeddings."""
    if recipe.parent is not None:
        return recipe.parent.tied_head
    return all(source.config.tie_word_embeddings for source in sources) and not recipe.folds


def why_unusable(folder: Path, error: Exception) -> str:
    """Why no tokenizer was read from a folder, and what to do."""
    if _needs_sentencepiece(folder):
        return (
            f"{folder} has no tokenizer.json, and reading its tokenizer.model needs sentencepiece "
            "and protobuf: pip install sentencepiece protobuf"
        )
    code = code_of(folder, TOKENIZER_CONFIG)
    if code and "trust_remote_code" in str(error):
        return (
            f"the tokenizer in {folder} needs {', '.join(code)[:80]}, code that comes with it, "
            "which is never run; load it where you trust the code, save_pretrained it, and take "
            f"auto_map out of its {TOKENIZER_CONFIG}"
        )
    return (
        f"no usable tokenizer in {folder} (tokenizer.json and tokenizer_config.json, or what its "
        f"class reads): {first_line(error)}"
    )


def kinds_hint(own: SourceTokenizer) -> str:
    """That the class makes another tokenizer of tokenizer.json than it holds, where it does."""
    if own.filed_kind == own.kind:
        return ""
    return (
        f". Its tokenizer.json is {own.filed_kind}, of which transformers makes a "
        f"{type(own.tokenizer).__name__}, which is {own.kind}"
    )


def _needs_sentencepiece(folder: Path) -> bool:
    """Whether a tokenizer is in SentencePiece's format alone, and what reads that is missing."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return False
    return find_spec("sentencepiece") is None


def within_vocabulary(numbers: Any, rows: int, least: int | None = None) -> tuple[Any, list[int]]:
    """(numbers of tokens that are below `rows`, and `least` or more, as a list or alone; the
    others). None where none is left."""
    listed = numbers if isinstance(numbers, list) else [numbers]

    def stands(number: Any) -> bool:
        return type(number) is not int or (number < rows and (least is None or number >= least))

    gone = [number for number in listed if not stands(number)]
    kept = [number for number in listed if stands(number)]
    if not gone:
        return numbers, gone
    return (kept if isinstance(numbers, list) and kept else None), gone


def no_row(key: str, file: str, gone: Sequence[int], rows: int) -> str:
    """That a setting of special tokens names numbers beyond the embeddings, in words."""
    numbers = ", ".join(map(str, gone[:5]))
    return f"{key} in {file} names {numbers}, and the embeddings have {rows} rows: left out"


def read_generation(source: Source) -> tuple[dict[str, Any], list[str]]:
    """(the settings of a source's generation config without numbers of tokens that no row has, what
    was taken out, in words); nothing where there is no such file."""
    settings = dict(source.generation or {})
    found = []
    for key in SPECIAL:
        least = 0 if key == "pad_token_id" else None  # transformers will not save such a one
        kept, gone = within_vocabulary(settings.get(key), source.own_rows, least)
        if gone:
            settings[key] = kept
            found.append(no_row(key, GENERATION, gone, source.own_rows))
    return settings, found


def generation_settings(source: Source) -> dict[str, Any]:
    """What a source's generation config says, without code and numbers that are of no use: what
    its config says of special tokens, where it has none."""
    settings, _ = read_generation(source)
    if source.generation is None:
        settings = {key: getattr(source.config, key, None) for key in SPECIAL}
        settings["pad_token_id"], _ = within_vocabulary(
            settings["pad_token_id"], source.own_rows, 0
        )
    return {k: value for k, value in settings.items() if k not in CODE}


def by_tensor(
    name: str, files: Mapping[str, Mapping[str, Header]]
) -> tuple[dict[str, Header], list[str]]:
    """(headers by tensor, notes) of files in the order of their names. Of a tensor that several
    hold, the last file's is read, whatever an index says: so does transformers."""
    headers: dict[str, Header] = {}
    twice: set[str] = set()
    for content in files.values():
        twice |= headers.keys() & content.keys()
        headers |= content
    if not twice:
        return headers, []
    first = min(twice)
    return headers, [
        f"{name}: {len(twice)} tensors are in more than one file, first {first}; that of "
        f"{headers[first].file}, the last of them, is read, as by transformers"
    ]


def over_whole_heads(
    rows: Float[Tensor, "rows hidden"], part: TurnedPart
) -> Float[Tensor, "rows hidden"]:
    """q or k of heads that are turned in part, for a class that turns all of each: pair j of a head
    is (j, j + head / 2) there, so that what is not turned comes after each half of what is. It is
    divided by the factor that the class multiplies it by: attention scores stay as they are."""
    heads = rows.unflatten(0, (-1, part.head))
    turned, still = heads[:, : part.turned], heads[:, part.turned :]
    if part.factor != 1:
        still = (still.float() / part.factor).to(still.dtype)
    halves = zip(turned.chunk(2, dim=1), still.chunk(2, dim=1), strict=True)
    return torch.cat([each for half in halves for each in half], dim=1).flatten(0, 1)


def refuse_dtype(source: Source, tensor: str) -> None:
    """Raise SourceError for a tensor of integers, or of another dtype that is not read."""
    dtype = source.headers[tensor].dtype
    if dtype not in DTYPES:
        raise SourceError(
            f"{source.name}: {tensor} is stored as {dtype}; expected a float type "
            f"({', '.join(DTYPES)})"
        )


def has_equal_tables(source: Source) -> bool:
    """Whether the stored head is the embeddings. Block by block, up to the first that differs.
    Raises SourceError for tables whose dtype is not read."""
    for table in (EMBEDDING, HEAD):
        refuse_dtype(source, table)
    return all(
        torch.equal(
            *(source.read(table, slice(first, first + TABLE_ROWS)) for table in (EMBEDDING, HEAD))
        )
        for first in range(0, source.own_rows, TABLE_ROWS)
    )


NO_HEAD = (
    ". transformers would draw a head at random; where the embeddings are the head, write "
    "tie_word_embeddings: true in config.json"
)


def some(tokens: Sequence[str]) -> str:
    """The first few of some tokens, in words."""
    shown = ", ".join(map(repr, tokens[:4]))
    return shown if len(tokens) <= 4 else shown + ", ..."
