"""Sources: dense checkpoints opened lazily, described from headers alone, proved to match.

`open_source` reads config, tokenizer files and safetensors headers; `Source.read` reads one tensor.
`compare_sources` names every difference between the sources and says what it means for the build.
"""

import copy
import hashlib
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from symphony_moe.adapter import FILES as ADAPTER_FILES
from symphony_moe.adapter import Adapter, open_adapter
from symphony_moe.bundled import source_folder
from symphony_moe.convert import (
    INDEX,
    SAFETENSORS,
    from_gguf,
    from_pickle,
    pickles_of,
    refuse_outside,
    tokenizer_over,
    weight_map,
)
from symphony_moe.errors import SourceError, SourceMismatch, first_line, shortened
from symphony_moe.families import (
    AUTO,
    EMBEDDING,
    FAMILIES,
    FINAL_NORM,
    HEAD,
    Family,
    Target,
    attention_window,
    head_dim,
)
from symphony_moe.forward import decoder_layer, one_layer_model, rotations
from symphony_moe.gguf_file import GGUFFile, open_gguf
from symphony_moe.pretrained import code_of, load_config, load_tokenizer
from symphony_moe.recipe import BUNDLED, Recipe, SourceSpec
from symphony_moe.same_tokenizer import other_settings
from symphony_moe.shards import sha256_of
from symphony_moe.text import Encoder
from symphony_moe.vocabulary import (
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    Owner,
    Vocabulary,
    cut_otherwise,
    flags_of,
    found_otherwise,
    is_needed,
    left_out,
    merge,
    tokenizer_paths,
    without_rowless,
)

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_CONFIG = "tokenizer_config.json"
_CODE = ("auto_map", "custom_generate")
"""What a generation config says of code: it is neither run nor carried on."""
TABLE_ROWS = 8192
"""Rows of an embedding table that are read at once."""
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_FLOAT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_BUFFERS = r"rotary_emb\.inv_freq"
"""What old checkpoints carry and the architecture computes itself: transformers reads past it."""


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
    target: Target = AUTO
    """What the recipe says of the output's architecture."""
    notes: tuple[str, ...] = ()
    """What its files hold that is ignored, or that its config does not say, in words."""
    dropped: tuple[str, ...] = ()
    """What its config says and `config` does not, in words."""

    @property
    def family(self) -> Family:
        return self.target.family(self.config.model_type)

    @property
    def head_name(self) -> str:
        """The tensor that holds the output head: the embeddings, where the head is tied to them."""
        return EMBEDDING if self.config.tie_word_embeddings else HEAD

    @property
    def own_rows(self) -> int:
        """Rows of its embedding table."""
        return self.headers[EMBEDDING].shape[0]

    @property
    def known(self) -> Bool[Tensor, " vocabulary"] | None:
        """Which tokens of the shared vocabulary it has; None where it has all."""
        return None if self.vocabulary is None else self.vocabulary.tables[self.name].known

    @property
    def num_parameters(self) -> int:
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
        folder = self.tokenizer_folder or self.folder
        try:
            loaded = load_tokenizer(folder)
            tokenizer, _ = without_rowless(loaded, folder, self.own_rows)
            num_tokens = max(tokenizer.get_vocab().values()) + 1
        except Exception as error:
            # The loaders behind AutoTokenizer raise whatever their parser raised.
            raise SourceError(
                f"{self.name}: {_why_unusable(folder, error)}{self._or_the_models}"
            ) from None
        if num_tokens > self.own_rows:
            raise SourceError(
                f"{self.name}: the tokenizer in {folder} has {num_tokens} tokens, the model "
                f"embeddings for {self.own_rows}; is it another model's tokenizer? "
                "Otherwise remove the tokens that have no embedding"
                + _kinds_hint(Owner(self.name, folder, loaded, self.own_rows))
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
        for key in _SPECIAL:
            number, old = getattr(self.own_tokenizer, key, None), settings.get(key)
            listed = old if isinstance(old, list) else [old]
            if number is None or number in listed:
                continue
            several = key == "eos_token_id" and old is not None
            changed[key] = [number, *listed] if several else number
        return changed

    @property
    def owner(self) -> Owner:
        """Its own tokenizer, the size of its tables, and its config's special tokens."""
        special = {key: getattr(self.config, key, None) for key in ("eos_token_id", "pad_token_id")}
        folder = self.tokenizer_folder or self.folder
        generation = None if self.generation is None else _generation(self)[0]
        return Owner(self.name, folder, self.own_tokenizer, self.own_rows, special, generation)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor (or some of its first axis) as float32, with the adapter in it.

        Raises SourceError for a file that cannot be read and for values that are not finite.
        """
        if self.adapter is None or not self.adapter.touches(name):
            return self._read(name, rows)
        if rows is not None and self.adapter.needs_all_rows(name):
            return self.read(name)[rows]
        weight = None if self.adapter.holds(name) else self._read(name, rows)
        return self.adapter.merge(name, weight, slice(None) if rows is None else rows)

    def _read(self, name: str, rows: slice | None) -> Tensor:
        """One tensor of the model's own files.

        The file is mapped only while this runs, so that what was read does not stay in memory.
        """
        path = self.folder / self.headers[name].file
        own = self.headers[name].stored or name
        try:
            with safe_open(path, framework="pt") as file:
                stored = file.get_tensor(own) if rows is None else file.get_slice(own)[rows]
                tensor = torch.empty(stored.shape, dtype=torch.float32).copy_(stored)
                if not bool(torch.isfinite(tensor).all()):
                    reason = _why_not_finite(stored)
                    raise SourceError(f"{self.name}: {own} in {path} has {reason}")
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{self.name}: {own} in {path} is not readable: {error}") from None
        return tensor

    def table(self, name: str) -> Iterator[tuple[int, Float[Tensor, "rows hidden"]]]:
        """(first row, rows) of its token embeddings or output head in the shared vocabulary, block
        by block. A token that it lacks is the mean of the pieces that it makes of the token's text;
        a padding row that it lacks is zero."""
        if self.vocabulary is None:
            for first in range(0, self.headers[name].shape[0], TABLE_ROWS):
                yield first, self.read(name, slice(first, first + TABLE_ROWS))
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
            rows = self._rows(name, torch.cat((wanted, parts)))
            block, means = rows[: len(wanted)], rows[len(wanted) :]
            for number, these in pieces.items():
                block[number - first] = means[: len(these)].mean(dim=0)
                means = means[len(these) :]
            yield first, block

    def _rows(self, name: str, wanted: Int[Tensor, " rows"]) -> Float[Tensor, "rows hidden"]:
        """Rows of a table by number, zeros for -1; read in blocks, so that no table is ever whole
        in memory."""
        rows = torch.zeros(len(wanted), self.headers[name].shape[1])
        for block in (wanted[wanted >= 0] // TABLE_ROWS).unique().tolist():
            begin = block * TABLE_ROWS
            inside = (wanted >= begin) & (wanted < begin + TABLE_ROWS)
            part = self.read(name, slice(begin, begin + TABLE_ROWS))
            rows[inside] = part[wanted[inside] - begin]
        return rows

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Every tensor of a decoder layer, by its name within the layer."""
        prefix = f"model.layers.{layer}."
        family = self.family
        names = [*family.shared, *family.expert]
        return {name: self.read(prefix + name) for name in names}

    @property
    def _weights(self) -> list[str]:
        """The files that hold its weights, as the user has them."""
        return sorted(self.converted or {header.file for header in self.headers.values()})

    def hash_files(self) -> dict[str, str]:
        """File name -> SHA-256, for every file that a build reads: weights, config, tokenizer."""
        folder = self.origin or self.folder
        others = ("config.json", GENERATION, *tokenizer_paths(folder))
        files = self._weights + [file for file in others if (folder / file).is_file()]
        found = {file: sha256_of(folder / file) for file in files}
        if self.adapter is not None:
            adapted = self.adapter.folder
            beside = tokenizer_paths(adapted)
            found |= {f"adapter/{f}": sha256_of(adapted / f) for f in (*ADAPTER_FILES, *beside)}
        return found


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


def target_of(recipe: Recipe) -> Target:
    """What a recipe says of its output's architecture."""
    return Target(recipe.experts.attention, recipe.output.architecture)


def open_sources(recipe: Recipe, *, download: bool = True) -> list[Source]:
    """Open every source of a recipe, in its order, in one vocabulary. See `open_source`."""
    target = target_of(recipe)
    sources = [
        open_source(name, spec, download=download, target=target)
        for name, spec in recipe.sources.items()
    ]
    return share_vocabulary(sources, recipe.anchor, recipe.output.chat or recipe.anchor)


def share_vocabulary(sources: Sequence[Source], anchor: str, chat: str) -> list[Source]:
    """The sources in the union of their vocabularies; as they are where they have one already, and
    where none can be found (`compare_sources` says why)."""
    if len({source.config.model_type for source in sources}) > 1:
        return list(sources)
    owners = [source.owner for source in sources]
    if not is_needed(owners, anchor, chat) or len({owner.kind for owner in owners}) > 1:
        return list(sources)
    vocabulary = merge(owners, anchor, chat)
    shared = []
    for source in sources:
        config = copy.deepcopy(source.config)
        config.vocab_size = vocabulary.size
        changed = replace(source, config=config, vocabulary=vocabulary)
        # Loaded once: a copy of a frozen dataclass would begin without.
        changed.__dict__["own_tokenizer"] = source.own_tokenizer
        shared.append(changed)
    return shared


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


def is_tied(recipe: Recipe, sources: Sequence[Source]) -> bool:
    """Whether the output's head is its token embeddings."""
    return all(source.config.tie_word_embeddings for source in sources) and not recipe.folds


def open_source(
    name: str, spec: SourceSpec, *, download: bool = True, target: Target = AUTO
) -> Source:
    """Open a checkpoint from its headers and prove that it is complete.

    `download=False` fetches configuration, tokenizer and headers from the hub, but no weights, and
    does not read weights to compare their hashes. `target`: what the recipe says of
    the output's architecture.
    Raises SourceError for a folder or hub id that is not there, an architecture without a family
    table, a variant that the target cannot hold, and missing, surplus or misshapen tensors;
    RecipeError for a target that does not hold the family.
    """
    from_hub = not spec.model.startswith(BUNDLED) and not Path(spec.model).is_absolute()
    if spec.model.startswith(BUNDLED):
        folder = source_folder(spec.model.removeprefix(BUNDLED))
    else:
        patterns = [*_SMALL_FILES, "*.safetensors"] if download else list(_SMALL_FILES)
        if spec.gguf_file is not None:
            patterns.append(spec.gguf_file)  # everything is in it
        elif spec.allow_pickle and not (
            from_hub and any(_is_on_hub(spec, file) for file in (SAFETENSORS, INDEX))
        ):
            patterns.append("*.bin")
        folder = Path(spec.model)
        if from_hub:
            folder = _fetch(name, spec.model, spec.revision, patterns)
    if not folder.is_dir():
        hint = ", which is a file; name the folder of the model that it is in"
        hint = _gguf_hint(name, folder) or (hint if folder.is_file() else "")
        raise SourceError(f"{name}: no such model folder: {folder}{hint}")
    if (folder / ADAPTER_FILES[0]).is_file():
        raise SourceError(
            f"{name}: {folder} has an {ADAPTER_FILES[0]}: it holds a LoRA, which transformers "
            f"loads into the model by itself. Name its folder as sources.{name}.adapter, and as "
            "model the one that it was trained on, in a folder without it"
        )
    origin = folder
    converted: tuple[str, ...] = ()
    gguf: GGUFFile | None = None
    if spec.gguf_file is not None:
        gguf = open_gguf(name, folder / spec.gguf_file)
        folder = _convert_gguf(name, folder, gguf, target, weights=download)
        converted = (spec.gguf_file,)
    elif not any(folder.glob("*.safetensors")) and not from_hub and _gguf_hint(name, folder):
        found = f"{name}: {folder} has no .safetensors weights"
        raise SourceError(found + _gguf_hint(name, folder))
    config = _read_config(name, folder, target)
    pickles = [] if converted else pickles_of(name, folder)
    if pickles and from_hub and not download and _is_on_hub(spec, SAFETENSORS):
        pickles = []  # not fetched, but preferred
    if pickles:
        if not spec.allow_pickle:
            raise SourceError(
                f"{name}: {folder} has no .safetensors weights, only {pickles[0].name}, which is "
                f"pickled; set sources.{name}.allow_pickle: true to have it read (tensors alone) "
                "and converted"
            )
        folder = from_pickle(name, folder, pickles)
        converted = tuple(path.name for path in pickles)
    remote = from_hub and not download and not _has_weights(name, folder)
    if gguf is not None and not download:
        headers, notes = _headers_of_gguf(gguf), list[str]()
    else:
        headers, notes = _hub_headers(name, spec) if remote else _read_headers(name, folder)
    notes += [] if gguf is None else gguf.notes
    source = Source(name, spec.model, folder, config, headers, target=target)
    source = replace(source, notes=tuple(notes))
    if converted:
        source = replace(source, origin=origin, converted=converted)
    source = _with_its_head(_without_buffers(source), here=not remote)
    _check_tensors(source)
    _check_generation_config(source)
    if spec.adapter is not None:
        adapter = _open_adapter(name, spec, spec.adapter, source.config)
        _refuse_tied_rows(adapter, declared=config, config=source.config)
        source = _adapted(source, adapter)
    source = replace(source, dropped=tuple(_drop_numbers(name, folder, source.config)))
    if spec.sha256 is not None and download:
        _check_hashes(source, spec.sha256)
    return source


def _gguf_hint(name: str, path: Path) -> str:
    """How a recipe names the GGUF file that a path is, or that a folder has."""
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not found or found[0].suffix != ".gguf":
        return ""
    return (
        f". To read a GGUF file, write its folder as sources.{name}.model and "
        f"sources.{name}.gguf_file: {found[0].name}"
    )


def _why_unusable(folder: Path, error: Exception) -> str:
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


def _kinds_hint(owner: Owner) -> str:
    """That the class makes another tokenizer of tokenizer.json than it holds, where it does."""
    if owner.filed_kind == owner.kind:
        return ""
    return (
        f". Its tokenizer.json is {owner.filed_kind}, of which transformers makes a "
        f"{type(owner.tokenizer).__name__}, which is {owner.kind}"
    )


def _needs_sentencepiece(folder: Path) -> bool:
    """Whether a tokenizer is in SentencePiece's format alone, and what reads that is missing."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return False
    return find_spec("sentencepiece") is None


def _convert_gguf(
    name: str, folder: Path, file: GGUFFile, target: Target, *, weights: bool
) -> Path:
    """The model folder of a GGUF file, which is proved to hold the whole model before its weights
    are converted."""
    described = from_gguf(name, folder, file, weights=False)
    config = _read_config(name, described, target)
    source = Source(name, str(folder), folder, config, _headers_of_gguf(file))
    _check_tensors(replace(source, origin=file.path))
    return from_gguf(name, folder, file, weights=True) if weights else described


def _headers_of_gguf(file: GGUFFile) -> dict[str, Header]:
    """Headers of the tensors that it becomes."""
    return {name: Header(file.path.name, shape, "F32") for name, shape in file.tensors.items()}


def _open_adapter(name: str, spec: SourceSpec, adapter: str, config: PreTrainedConfig) -> Adapter:
    """The recipe's adapter. It is small: from the hub it is fetched whole, for a plan too."""
    folder = Path(adapter)
    if not folder.is_absolute():
        patterns = [*ADAPTER_FILES, *TOKENIZER_FILES, "additional_chat_templates/*.jinja"]
        folder = _fetch(f"{name}: adapter", adapter, spec.adapter_revision, patterns)
    if not folder.is_dir():
        raise SourceError(f"{name}: no such adapter folder: {folder}")
    return open_adapter(name, folder, expected_shapes(config))


def _refuse_tied_rows(
    adapter: Adapter, *, declared: PreTrainedConfig, config: PreTrainedConfig
) -> None:
    """Raise SourceError for rows of single tokens on a model whose config ties the head and whose
    files hold another one: peft goes by the config and writes them into both tables."""
    unties = declared.tie_word_embeddings and not config.tie_word_embeddings
    if unties and EMBEDDING in adapter.tokens and HEAD not in adapter.tokens:
        raise SourceError(
            f"{adapter.owner}: its adapter trained rows of the embeddings "
            "(trainable_token_indices). "
            "The model's config ties the head to them, and its files hold another one: peft would "
            "write the rows into that head too. Set tie_word_embeddings: false in the model's "
            "config.json, or merge the adapter with peft and save the result"
        )


def _adapted(source: Source, adapter: Adapter) -> Source:
    """The source with an adapter: the adapter's tables, where they have other rows or are two, and
    its tokenizer, where it has one."""
    config = copy.deepcopy(source.config)
    headers = dict(source.headers)
    if adapter.unties:
        config.tie_word_embeddings = False
        headers[HEAD] = headers[EMBEDDING]
    if adapter.rows is not None:
        config.vocab_size = adapter.rows
        for name in (EMBEDDING, HEAD):
            if name in headers:
                shape = (adapter.rows, headers[name].shape[1])
                headers[name] = replace(headers[name], shape=shape)
    changed = replace(source, adapter=adapter, config=config, headers=headers)
    beside = tokenizer_paths(adapter.folder)
    if not beside:
        return changed
    folder = adapter.folder
    if not set(beside).intersection(VOCABULARY_FILES):
        known = tokenizer_paths(source.folder)
        folder = tokenizer_over(source.name, source.folder, folder, beside, known)
    changed = replace(changed, tokenizer_folder=folder)
    special = {key: getattr(config, key, None) for key in _SPECIAL}
    for key, value in changed._with_its_tokens(special).items():
        setattr(config, key, value)
    return changed


def _fetch(name: str, hub_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The local snapshot of a hub id (taken from the cache where it is there). A token comes from
    the client's own login or HF_TOKEN; HF_HUB_OFFLINE=1 asks the cache alone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns))
        return Path(found)
    except HFValidationError:
        raise SourceError(f"{name}: {hub_id!r} is neither a folder nor a hub id") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"{name}: {hub_id!r} is no folder here, and as a hub id it cannot be fetched: "
            f"{first_line(error)}"
        ) from None


def _is_on_hub(spec: SourceSpec, file: str) -> bool:
    """Whether a hub checkpoint has a file that was not fetched."""
    from huggingface_hub import file_exists

    try:
        return file_exists(spec.model, file, revision=spec.revision)
    except Exception:
        # Offline, or whatever else the client raises: what was fetched is all there is.
        return False


def _has_weights(name: str, folder: Path) -> bool:
    """Whether every weights file is there (a hub snapshot may hold some, or none)."""
    if (folder / SAFETENSORS).is_file():
        return True
    index = folder / INDEX
    return index.is_file() and all(
        (folder / file).is_file() for file in weight_map(name, index).values()
    )


def _hub_headers(name: str, spec: SourceSpec) -> tuple[dict[str, Header], list[str]]:
    """(headers of a hub checkpoint by range requests, without its weights; notes)."""
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(spec.model, revision=spec.revision)
    except Exception as error:
        # Connection, permission and format errors of the client alike: none is a bug of ours.
        raise SourceError(
            f"{name}: no safetensors headers for hub id {spec.model!r}: {first_line(error)}"
        ) from None
    return _by_tensor(
        name,
        {
            file: {
                tensor: Header(file, tuple(info.shape), info.dtype)
                for tensor, info in content.tensors.items()
            }
            for file, content in sorted(metadata.files_metadata.items())
        },
    )


def _read_config(name: str, folder: Path, target: Target) -> PreTrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{name}: {folder} has no config.json; is it a model folder?")
    try:
        declared = json.loads(path.read_text(encoding="utf-8"))
        model_type = declared.get("model_type") if isinstance(declared, dict) else None
        if model_type is None:
            raise SourceError(f"{name}: {path} names no model_type; is it a model's?")
        if model_type not in FAMILIES:
            raise SourceError(
                f"{name}: {folder} is a {model_type!r} model; "
                f"families with an exact MoE target: {', '.join(FAMILIES)}"
            )
        config = load_config(folder)
        # The family's own module refuses sizes and settings that make no model.
        expected_shapes(config)
    except SourceError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{name}: {path} is not JSON: {error}") from None
    except Exception as error:
        # Every config class and module checks, or stumbles, in its own way.
        reason = shortened(f"{type(error).__name__}: {' '.join(str(error).split())}", 250)
        raise SourceError(f"{name}: {path} is not usable: {reason}") from None
    if declared.get("quantization_config"):
        raise SourceError(
            f"{name}: {folder} is quantized; expected plain floating-point weights. "
            "Use the checkpoint that it was quantized from"
        )
    for reason, refuses in target.family(model_type).refusals:
        if refuses(config):
            raise SourceError(f"{name}: {folder} cannot become an expert: {reason}")
    return config


def _drop_numbers(name: str, folder: Path, config: PreTrainedConfig) -> list[str]:
    """Take numbers of special tokens out of a config that no row of the table has, as nothing that
    stock transformers computes depends on them; what was taken, in words.

    Raises SourceError for a padding token without a row, with which no model can be made.
    """
    rows, pad = config.vocab_size, config.pad_token_id
    if isinstance(pad, int) and not -rows <= pad < rows:
        raise SourceError(
            f"{name}: pad_token_id in {folder / 'config.json'} is {pad}, and the embeddings have "
            f"{rows} rows; transformers loads no such model. Set it to null, or to a token's number"
        )
    found = []
    for key in ("bos_token_id", "eos_token_id"):
        numbers, gone = _within(getattr(config, key, None), rows)
        if gone:
            setattr(config, key, numbers)
            found.append(_no_row(key, "config.json", gone, rows))
    return found


def _within(numbers: Any, rows: int, least: int | None = None) -> tuple[Any, list[int]]:
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


def _no_row(key: str, file: str, gone: Sequence[int], rows: int) -> str:
    numbers = ", ".join(map(str, gone[:5]))
    return f"{key} in {file} names {numbers}, and the embeddings have {rows} rows: left out"


def _generation(source: Source) -> tuple[dict[str, Any], list[str]]:
    """(the settings of a source's generation config without numbers of tokens that no row has, what
    was taken out, in words); nothing where there is no such file."""
    settings = dict(source.generation or {})
    found = []
    for key in _SPECIAL:
        least = 0 if key == "pad_token_id" else None  # transformers will not save such a one
        kept, gone = _within(settings.get(key), source.own_rows, least)
        if gone:
            settings[key] = kept
            found.append(_no_row(key, GENERATION, gone, source.own_rows))
    return settings, found


def generation_settings(source: Source) -> dict[str, Any]:
    """What a source's generation config says, without code and numbers that are of no use: what
    its config says of special tokens, where it has none."""
    settings, _ = _generation(source)
    if source.generation is None:
        settings = {key: getattr(source.config, key, None) for key in _SPECIAL}
        settings["pad_token_id"], _ = _within(settings["pad_token_id"], source.own_rows, 0)
    return {k: value for k, value in settings.items() if k not in _CODE}


def remarks(source: Source) -> list[str]:
    """What a source's files say and the result does not take over, or not as it stands."""
    found = [*source.dropped, *_generation(source)[1]]
    folder = source.tokenizer_folder or source.folder
    for where, file in ((source.folder, "config.json"), (folder, TOKENIZER_CONFIG)):
        if code := code_of(where, file):
            found.append(
                f"{file} names code ({', '.join(code)[:80]}), which is never run: the classes of "
                "transformers are used, and the result names none"
            )
    tokenizer = source.own_tokenizer
    if gone := left_out(tokenizer):
        found.append(
            f"the model has no rows for {_some(gone)}, which only the tokenizer's class adds: left "
            "out"
        )
    elif fill := getattr(tokenizer, "fill_token", None):
        found.append(
            f"its tokenizer's class makes two texts of one with {fill}; to the result, whose class "
            "is another, it is a token like others"
        )
    text = cut_otherwise(source.owner)
    if text is not None:
        found.append(
            f"tokenizer.json says to cut text otherwise than the class does that transformers "
            f"takes for it, as in {text[:60]!r}; text is cut as by the class, here and by the "
            "result where it is the anchor"
        )
    return [*source.notes, *(f"{source.name}: {remark}" for remark in found)]


def _read_headers(name: str, folder: Path) -> tuple[dict[str, Header], list[str]]:
    """(headers of the files that transformers would load, whatever else is beside them; notes)."""
    listed: dict[str, str] = {}
    index = folder / INDEX
    refuse_outside(name, index)
    if (folder / SAFETENSORS).is_file():
        files = [SAFETENSORS]
    elif index.is_file():
        listed = weight_map(name, index)
        files = sorted(set(listed.values()))
    else:
        raise SourceError(
            f"{name}: {folder} has no .safetensors weights that transformers would load, neither "
            f"{SAFETENSORS} nor {INDEX} (found: "
            f"{shortened(', '.join(sorted(p.name for p in folder.iterdir())), 150) or 'nothing'}). "
            "Other formats: load the model with transformers and save_pretrained it"
        )
    for file in files:
        if not (folder / file).is_file():
            raise SourceError(f"{name}: {file} is in the index of {folder}, but is not there")
    headers, notes = _by_tensor(name, {file: _headers_of(name, folder, file) for file in files})
    absent = sorted(set(listed) - set(headers))
    if absent:
        # transformers opens the files and takes what is in them: what a model needs is looked for
        # there, and not here.
        notes.append(
            f"{name}: its index lists {len(absent)} tensors that no file holds, first {absent[0]}; "
            "ignored, as transformers does"
        )
    return headers, notes


def _headers_of(name: str, folder: Path, file: str) -> dict[str, Header]:
    """Headers of one file."""
    found: dict[str, Header] = {}
    try:
        with safe_open(folder / file, framework="pt") as opened:
            for tensor in opened.keys():  # noqa: SIM118 (a handle, not a dict)
                view = opened.get_slice(tensor)
                found[tensor] = Header(file, tuple(view.get_shape()), view.get_dtype())
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{name}: {folder / file} is not a whole safetensors file ({error}); fetch it again"
        ) from None
    return found


def _by_tensor(
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


def _without_buffers(source: Source) -> Source:
    """The source without the tensors that transformers reads past in silence."""
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)]
    patterns = [_BUFFERS, *(getattr(stock, "_keys_to_ignore_on_load_unexpected", None) or ())]
    ignored = sorted(n for n in source.headers if any(re.search(p, n) for p in patterns))
    if not ignored:
        return source
    note = (
        f"{source.name}: {len(ignored)} tensors are ignored, as by transformers, which computes "
        f"them itself, first {ignored[0]}"
    )
    headers = {n: h for n, h in source.headers.items() if n not in ignored}
    return replace(source, headers=headers, notes=(*source.notes, note))


def _with_its_head(source: Source, *, here: bool) -> Source:
    """The source with the head that transformers gives it. Where a config ties the head to the
    embeddings, and the files hold only one of both, it is both; where they hold both and they are
    equal, they are tied; where they differ, they are not, whatever the config says. `here`: whether
    the weights can be compared."""
    headers = dict(source.headers)
    if not source.config.tie_word_embeddings or HEAD not in headers:
        return source
    if EMBEDDING not in headers:
        headers[EMBEDDING] = replace(headers.pop(HEAD), stored=HEAD)
        return replace(source, headers=headers)
    if headers[EMBEDDING].shape == headers[HEAD].shape:
        if not here:
            note = (
                f"{source.name}: its config ties the head to the embeddings, and its files hold "
                "both; whether they are equal shows once the weights are here. Where they are not, "
                "the files' head is used, as transformers does, and the output's head is untied"
            )
            del headers[HEAD]
            return replace(source, headers=headers, notes=(*source.notes, note))
        if _has_equal_tables(source):
            del headers[HEAD]
            return replace(source, headers=headers)
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = False
    note = (
        f"{source.name}: its config ties the head to the embeddings, but its files hold another "
        "head; that is used, as transformers does"
    )
    return replace(source, config=config, notes=(*source.notes, note))


def _has_equal_tables(source: Source) -> bool:
    """Whether the stored head is the embeddings. Block by block, up to the first that differs."""
    return all(
        torch.equal(
            *(source._read(table, slice(first, first + TABLE_ROWS)) for table in (EMBEDDING, HEAD))
        )
        for first in range(0, source.own_rows, TABLE_ROWS)
    )


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a dense model, from the family's own module (no memory is taken)."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    shapes = {EMBEDDING: (vocabulary, hidden), FINAL_NORM: (hidden,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (vocabulary, hidden)
    layer = decoder_layer(one_layer_model(config, 0))
    for number in range(config.num_hidden_layers):
        for name, tensor in layer.state_dict().items():
            shapes[f"model.layers.{number}.{name}"] = tuple(tensor.shape)
    return shapes


_NO_HEAD = (
    ". transformers would draw a head at random; where the embeddings are the head, write "
    "tie_word_embeddings: true in config.json"
)


def _check_tensors(source: Source) -> None:
    expected = expected_shapes(source.config)
    folder = source.origin or source.folder
    missing = [name for name in expected if name not in source.headers]
    if missing:
        raise SourceError(
            f"{source.name}: {len(missing)} tensors are missing from {folder}, "
            f"first {missing[0]}; expected all that config.json describes"
            + (_NO_HEAD if missing == [HEAD] else "")
        )
    surplus = sorted(set(source.headers) - set(expected))
    if surplus:
        raise SourceError(
            f"{source.name}: {folder} has {len(surplus)} tensors that a "
            f"{source.config.model_type} model does not have, first {surplus[0]}"
        )
    for name, shape in expected.items():
        header = source.headers[name]
        if header.shape != shape:
            raise SourceError(
                f"{source.name}: {name} is {list(header.shape)} in {header.file}, "
                f"its config.json says {list(shape)}"
            )
        if header.dtype not in _FLOAT_BYTES:
            raise SourceError(
                f"{source.name}: {name} is stored as {header.dtype}; expected a float type "
                f"({', '.join(_FLOAT_BYTES)})"
            )


def _check_generation_config(source: Source) -> None:
    """The anchor's is copied into the output, where a bad one keeps the model from loading."""
    path = source.folder / GENERATION
    if not path.is_file():
        return
    try:
        if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise ValueError("expected a table of settings")
        GenerationConfig.from_pretrained(source.folder, local_files_only=True).validate()
    except Exception as error:
        # Whatever the library's own checks raise: the file is the user's.
        raise SourceError(
            f"{source.name}: {path} is not usable: {first_line(error)}; mend or remove it"
        ) from None


def _check_hashes(source: Source, expected: Mapping[str, str]) -> None:
    found = source.hash_files()
    # A recipe may pin the weights alone.
    for file in [*expected, *(file for file in source._weights if file not in expected)]:
        if expected.get(file) != found.get(file):
            path = (source.origin or source.folder) / file
            raise SourceError(
                f"{source.name}: {path} has SHA-256 {str(found.get(file))[:16]}, "
                f"the recipe says {str(expected.get(file))[:16]}: the source has changed"
            )


Verdict = Literal["error", "warning", "fine"]


@dataclass(frozen=True)
class Difference:
    """One way in which sources differ, who has what, and what it means for the build."""

    what: str
    values: Mapping[str, str]
    """Source name -> its value, in words."""
    verdict: Verdict
    consequence: str

    def __str__(self) -> str:
        by_value: dict[str, list[str]] = defaultdict(list)
        for name, value in self.values.items():
            by_value[value].append(name)
        who = "; ".join(f"{', '.join(names)}: {value}" for value, names in by_value.items())
        return f"{self.what} ({who}): {self.consequence}"


_EXPERTS_ALIKE = "experts of one model must have the same shapes; use checkpoints of one size"
_ANCHOR_WINS = "the anchor's is used for the whole model"

_CONFIG_RULES: tuple[tuple[str, Verdict, str], ...] = (
    ("model_type", "error", "sources must be of one family"),
    ("hidden_size", "error", _EXPERTS_ALIKE),
    ("num_hidden_layers", "error", _EXPERTS_ALIKE),
    ("intermediate_size", "error", _EXPERTS_ALIKE),
    ("num_attention_heads", "error", _EXPERTS_ALIKE),
    ("num_key_value_heads", "error", _EXPERTS_ALIKE),
    ("head_dim", "error", _EXPERTS_ALIKE),
    ("hidden_act", "error", "the MoE has one activation function for all experts"),
    ("rms_norm_eps", "warning", _ANCHOR_WINS),
    (
        "rope_parameters",
        "warning",
        _ANCHOR_WINS + "; the others' attention was trained under other positions and will suffer",
    ),
    ("sliding_window", "warning", _ANCHOR_WINS),
    ("max_position_embeddings", "warning", _ANCHOR_WINS),
)
"""(config field, verdict where sources differ, consequence)."""


def _config_values(field: str, sources: Sequence[Source], anchor: str) -> dict[str, Any]:
    """Source name -> what its config says of a field; the anchor's words where they mean the
    same."""
    of_anchor = next(source.config for source in sources if source.name == anchor)
    read = _READ.get(field, lambda config: getattr(config, field, None))
    mean_the_same = _SAME.get(field, lambda one, other: False)
    return {
        source.name: read(of_anchor if mean_the_same(source.config, of_anchor) else source.config)
        for source in sources
    }


def _rope_settings(config: PreTrainedConfig) -> Any:
    """Its parameters, and what else its frequencies depend on."""
    rope = config.rope_parameters
    depends = isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope", "yarn")
    return rope | {"context": config.max_position_embeddings} if depends else rope


def _is_one_activation(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether two names of activation functions are one function: silu and swish, gelu_new and
    gelu_pytorch_tanh, ..."""
    inputs = torch.cat((torch.linspace(-10, 10, 2001), torch.linspace(-1e4, 1e4, 2001))).double()
    with torch.no_grad():
        first, second = (ACT2FN[c.hidden_act].double()(inputs) for c in (one, other))
    return torch.allclose(first, second, rtol=1e-9, atol=1e-9)


def _is_one_rope(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether two configs rotate alike (but for float32's rounding), at every length of text,
    however they spell it."""
    contexts = {config.max_position_embeddings for config in (one, other)}
    lengths = {2, *contexts, *(times * context for context in contexts for times in (2, 8))}
    return all(
        first.shape == second.shape
        and torch.allclose(first, second, rtol=3e-7, atol=0)
        and math.isclose(factor, other_factor, rel_tol=1e-6)
        for (first, factor), (second, other_factor) in zip(
            rotations(one, lengths), rotations(other, lengths), strict=True
        )
    )


_READ: dict[str, Callable[[PreTrainedConfig], Any]] = {
    "head_dim": head_dim,
    "rope_parameters": _rope_settings,
    "sliding_window": attention_window,
}
"""Config field -> what it amounts to, where that is not what it says."""

_SAME: dict[str, Callable[[PreTrainedConfig, PreTrainedConfig], bool]] = {
    "hidden_act": _is_one_activation,
    "rope_parameters": _is_one_rope,
}
"""Config field -> whether two configs mean the same by it."""


def compare_sources(
    sources: Sequence[Source], anchor: str, chat: str | None = None
) -> list[Difference]:
    """Every difference between the sources, from configs, headers and tokenizers. `chat`: the
    source whose chat conventions the result has, where that is not the anchor."""
    found: list[Difference] = []
    chat = chat or anchor

    def differ(what: str, values: Mapping[str, Any], verdict: Verdict, consequence: str) -> None:
        spelled = {name: _spell(value) for name, value in values.items()}
        if len(set(spelled.values())) > 1:
            found.append(Difference(what, spelled, verdict, consequence))

    for field, verdict, consequence in _CONFIG_RULES:
        differ(field, _config_values(field, sources, anchor), verdict, consequence)
    differ(
        "tie_word_embeddings",
        {s.name: s.config.tie_word_embeddings for s in sources},
        "warning",
        "the output's head is untied; a tied source lends its embeddings as its head",
    )
    for field in _SPECIAL:
        theirs = _ANCHOR_WINS if field == "bos_token_id" else _of_chat(chat, anchor)
        differ(field, {s.name: _special_ids(s, field) for s in sources}, "warning", theirs)
    differ(
        "generation config",
        {s.name: _generation_settings(s) for s in sources},
        "warning",
        _of_chat(chat, anchor),
    )
    rows = max((s.vocabulary.size for s in sources if s.vocabulary), default=sources[0].own_rows)
    differ(
        "vocab_size",
        {s.name: s.own_rows for s in sources},
        "fine",
        f"rows are matched by their tokens; the output has {rows:,}",
    )
    differ(
        "dtype",
        {s.name: sorted({h.dtype for h in s.headers.values()}) for s in sources},
        "fine",
        "everything is computed in float32",
    )
    if any(d.what == "model_type" for d in found):
        return found  # tokenizers of different families differ in every way; one message is enough
    found += _compare_tokenizers(sources, anchor, chat)
    return found


def _generation_settings(source: Source) -> dict[str, Any]:
    """What the source's generation_config.json sets."""
    ignored = ("transformers_version", "_from_model_config", *_CODE)
    return {key: value for key, value in _generation(source)[0].items() if key not in ignored}


def _special_ids(source: Source, field: str) -> Any:
    """A setting of special tokens, in the tokens' words: numbers of different vocabularies say
    nothing."""
    numbers = getattr(source.config, field, None)
    if numbers is None:
        return None
    listed = sorted(set(numbers)) if isinstance(numbers, list) else [numbers]
    if source.vocabulary is None:
        return listed
    spelled = {number: token for token, number in source.own_tokenizer.get_vocab().items()}
    return [spelled.get(number, f"{number}, which is no token") for number in listed]


def _compare_tokenizers(sources: Sequence[Source], anchor: str, chat: str) -> list[Difference]:
    found = _compare_vocabularies(sources, anchor)
    if all(difference.verdict != "error" for difference in found):
        found += _compare_added(sources, anchor)
    common = set.intersection(*(set(s.own_tokenizer.get_vocab()) for s in sources))
    rules: dict[str, dict[str, str]] = {
        "tokenizer merges and normalization": {},
        "special tokens": {},
        "chat template": {},
        "tokenizer settings": {},
    }
    for source in sources:
        tokenizer = source.own_tokenizer
        digest = _segmentation_digest(tokenizer, common)
        rules["tokenizer merges and normalization"][source.name] = digest
        rules["special tokens"][source.name] = _spell(
            {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())}
        )
        template = getattr(tokenizer, "chat_template", None)
        rules["chat template"][source.name] = (
            "none" if not template else "sha256 " + _digest(str(template))
        )
        rules["tokenizer settings"][source.name] = _spell(other_settings(tokenizer))
    consequences = {"chat template": _of_chat(chat, anchor)}
    if chat != anchor:
        consequences["special tokens"] = (
            f"the anchor's, but for the end and padding tokens, which are {chat}'s (output.chat)"
        )
    found += [
        Difference(what, values, "warning", consequences.get(what, _ANCHOR_WINS))
        for what, values in rules.items()
        if len(set(values.values())) > 1
    ]
    return found


def _compare_added(sources: Sequence[Source], anchor: str) -> list[Difference]:
    """Added tokens that the result finds at other places of a text than the source they are of."""
    result = next(source.tokenizer for source in sources if source.name == anchor)
    found = []
    for source in sources:
        tokens = [] if source.name == anchor else found_otherwise(source.owner, result)
        if tokens:
            flags = {
                name: flags_of(tokenizer, tokens[0])
                for name, tokenizer in ((source.name, source.own_tokenizer), ("the result", result))
            }
            why = (
                f"text around {len(tokens)} of {source.name}'s is cut otherwise than by "
                f"{source.name}: {_some(tokens)}"
            )
            found.append(Difference(f"added token {tokens[0]!r}", flags, "warning", why))
    return found


def _of_chat(chat: str, anchor: str) -> str:
    return _ANCHOR_WINS if chat == anchor else f"{chat}'s is used for the whole model (output.chat)"


def _compare_vocabularies(sources: Sequence[Source], anchor: str) -> list[Difference]:
    """How each source's tokens differ from the anchor's, and what becomes of them."""
    by_name = {source.name: source for source in sources}
    vocabularies = {s.name: s.own_tokenizer.get_vocab() for s in sources}
    kinds = {s.name: s.owner.kind for s in sources}
    found = []
    if len(set(kinds.values())) > 1:
        why = "no tokenizer can be both; use sources whose tokenizers are of one kind"
        return [Difference("kind of tokenizer", kinds, "error", why)]
    for name, vocabulary in vocabularies.items():
        if vocabulary == vocabularies[anchor]:
            continue
        sizes = {n: f"{len(vocabularies[n])} tokens" for n in (anchor, name)}
        merged = by_name[name].vocabulary
        assert merged is not None  # of one kind and different: share_vocabulary has merged them
        found.append(
            Difference(
                "tokenizer vocabulary", sizes, "warning", _fate(merged, name, anchor, vocabulary)
            )
        )
    return found


def _fate(merged: Vocabulary, name: str, anchor: str, own: Collection[str]) -> str:
    """What becomes of a source's tokens in the union."""
    parts = []
    lost, unused = merged.lost[name], merged.unused[name]
    lacking = len(merged.tables[name].pieces)
    # Whoever brought them, if several sources have them.
    numbers = merged.tokenizer.get_vocab()
    new = {token for tokens in merged.added.values() for token in tokens}
    added = sorted(new.intersection(own), key=numbers.__getitem__)
    if added:
        first, last = numbers[added[0]], numbers[added[-1]]
        parts.append(
            f"{len(added)} of {name}'s come after the anchor's, as {first} to {last}: "
            + _some(added)
        )
    if lost:
        parts.append(
            f"{len(lost)} of {name}'s are lost, as text is cut as by {anchor}: {_some(lost)}"
        )
    if unused:
        parts.append(
            f"{len(unused)} of {name}'s are left out, as no text becomes them: {_some(unused)}"
        )
    if lacking:
        parts.append(f"{name} lacks {lacking} of the others' and reads their pieces instead")
    return "; ".join(parts) or "the same tokens under other numbers; matched by what they say"


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:4]))
    return shown if len(tokens) <= 4 else shown + ", ..."


def _segmentation_digest(tokenizer: PreTrainedTokenizerBase, common: set[str]) -> str:
    """Digest of what turns text into tokens, apart from the vocabulary itself. `common`: tokens
    that all sources have."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__
    content = json.loads(backend.to_str())
    model = {k: v for k, v in content.get("model", {}).items() if k != "vocab"}
    stages = ("normalizer", "pre_tokenizer")
    added = [
        {key: value for key, value in token.items() if key != "id"}
        for token in content.get("added_tokens", [])
        if token["content"] in common
    ]
    parts = [model, *(content.get(stage) for stage in stages), added]
    return "sha256 " + _digest(json.dumps(parts, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _spell(value: Any) -> str:
    """In words that are the same for the same value: 10000 and 10000.0 are one number."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_spell(value[key])}" for key in sorted(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return ", ".join(map(_spell, value)) if isinstance(value, list) else str(value)


def refuse_mismatch(differences: Sequence[Difference]) -> None:
    """Raise SourceMismatch that names every difference with the verdict `error`."""
    errors = [str(difference) for difference in differences if difference.verdict == "error"]
    if errors:
        raise SourceMismatch("the sources do not match: " + " | ".join(errors))
