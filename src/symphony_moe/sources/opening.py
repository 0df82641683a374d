"""Sources: dense checkpoints opened lazily, described from headers alone, proved to match.

`open_source` reads config, tokenizer files and safetensors headers; `Source.read` reads one tensor.
`find_differences` names every difference between the sources and says what it means for the build.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from symphony_moe.bundled import source_folder
from symphony_moe.errors import SourceError, first_line, if_mistyped, shortened
from symphony_moe.files import sha256_of
from symphony_moe.model.families import (
    ALIASES,
    AUTO,
    EMBEDDING,
    FAMILIES,
    FINAL_NORM,
    HEAD,
    HELD_BY_NONE,
    Alias,
    Target,
    TurnedPart,
    refusal,
    usual_shapes,
)
from symphony_moe.model.layer import decoder_layer, one_layer_model
from symphony_moe.recipe.settings import BUNDLED, Recipe, SourceSpec
from symphony_moe.sources.adapter import FILES as ADAPTER_FILES
from symphony_moe.sources.adapter import Adapter, open_adapter
from symphony_moe.sources.convert import (
    INDEX,
    SAFETENSORS,
    from_gguf,
    from_pickle,
    pickles_of,
    refuse_outside,
    tokenizer_over,
    weight_map,
)
from symphony_moe.sources.fused import config_read_as, split_headers, with_turned
from symphony_moe.sources.gguf_file import GGUFFile, open_gguf
from symphony_moe.sources.hub import SMALL_FILES, fetch, has_weights, hub_headers, is_on_hub
from symphony_moe.sources.pretrained import load_config
from symphony_moe.sources.provenance import FILES as OF_PROVENANCE
from symphony_moe.sources.shapes import of_one_shape
from symphony_moe.sources.source import (
    GENERATION,
    NO_HEAD,
    SPECIAL,
    FileStates,
    Header,
    Source,
    by_tensor,
    file_state,
    has_equal_tables,
    no_row,
    refuse_dtype,
    within_vocabulary,
)
from symphony_moe.sources.source_tokenizer import (
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    are_comparable,
    tokenizer_digest,
    tokenizer_paths,
)
from symphony_moe.sources.transplant import Transplant
from symphony_moe.sources.vocabulary import is_needed, merge

_BUFFERS = r"rotary_emb\.inv_freq"
"""What old checkpoints carry and the architecture computes itself: transformers reads past it."""


def target_of(recipe: Recipe) -> Target:
    """What a recipe says of its output's architecture."""
    experts = recipe.experts
    return Target(
        experts.attention,
        recipe.output.architecture,
        tuple(experts.dense_layers),
        experts.per_source,
        experts.shared_weight > 0,
    )


def open_sources(recipe: Recipe, *, download: bool = True) -> list[Source]:
    """Open every source of a recipe, in its order, in one vocabulary. See `open_source`."""
    target = target_of(recipe)
    hashed: dict[Path, str] = {}  # adapters of one model have its files in common
    sources = [
        open_source(name, spec, download=download, target=target, hashed=hashed)
        for name, spec in recipe.sources.items()
    ]
    shared = share_vocabulary(sources, recipe.anchor, recipe.output.chat or recipe.anchor)
    made = _with_transplant(shared, recipe.anchor, recipe.backbone.missing_tokens)
    return of_one_shape(recipe, made)


def are_here(recipe: Recipe) -> bool:
    """Whether all models are local folders, and none of them is a GGUF file: what `open_sources`
    opens without `download` is whole then."""
    return all(
        not _is_on_the_hub(spec) and spec.gguf_file is None for spec in recipe.sources.values()
    )


def share_vocabulary(sources: Sequence[Source], anchor: str, chat: str) -> list[Source]:
    """The sources in the union of their vocabularies; as they are where they have one already, and
    where none can be found (`find_differences` says why)."""
    if len({source.config.model_type for source in sources}) > 1:
        return list(sources)
    sources = _with_tokenizers(sources)
    tokenizers = [source.source_tokenizer for source in sources]
    comparable = are_comparable([one.kind for one in tokenizers])
    if not comparable or not is_needed(tokenizers, anchor, chat):
        return list(sources)
    vocabulary = merge(tokenizers, anchor, chat)
    shared = []
    for source in sources:
        config = copy.deepcopy(source.config)
        config.vocab_size = vocabulary.size
        loaded = source.own_tokenizer
        shared.append(
            replace(source, config=config, vocabulary=vocabulary, loaded_tokenizer=loaded)
        )
    return shared


def _with_transplant(sources: Sequence[Source], anchor: str, method: str) -> list[Source]:
    """The sources, those with rows to be made that lack ordinary tokens of the anchor's. `method`:
    `backbone.missing_tokens`. Raises SourceError where there is nothing to make them of."""
    first = next(source for source in sources if source.name == anchor)
    if method == "skip" or first.vocabulary is None:
        return list(sources)
    transplant = Transplant(method, first)
    apart = [s.name for s in sources if not len(s.places.shared)]
    if apart and not transplant.makes_of_pieces:
        raise SourceError(
            f"backbone.missing_tokens: {method}: {apart[0]} and {anchor}, the anchor, have no "
            "ordinary token in common, of which rows could be made. Set it to skip or pieces, or "
            "leave that source out"
        )
    return [
        replace(source, transplant=transplant) if len(source.places.missing) else source
        for source in sources
    ]


def _with_tokenizers(sources: Sequence[Source]) -> list[Source]:
    """The sources, each with its own tokenizer read. Of files that are the same it is read once,
    and is one object for all that have it."""
    read: dict[tuple[str, int], PreTrainedTokenizerBase] = {}
    digests: dict[Path, str] = {}
    loaded = []
    for source in sources:
        folder = source.tokenizer_folder or source.folder
        if folder not in digests:
            digests[folder] = tokenizer_digest(folder)
        key = digests[folder], source.own_rows
        if key not in read:
            read[key] = source.own_tokenizer
        loaded.append(replace(source, loaded_tokenizer=read[key]))
    return loaded


def open_source(
    name: str,
    spec: SourceSpec,
    *,
    download: bool = True,
    target: Target = AUTO,
    hashed: dict[Path, str] | None = None,
) -> Source:
    """Open a checkpoint from its headers and prove that it is complete.

    `download=False` fetches configuration, tokenizer and headers from the hub, but no weights, and
    does not read weights to compare their hashes. `target`: what the recipe says of the output's
    architecture. `hashed`: see `Source.hash_files`.

    Raises SourceError for a folder or hub id that is not there, an architecture without a family
    table, a variant that the target cannot hold, and missing, surplus or misshapen tensors;
    RecipeError for a target that does not hold the family.
    """
    # 1. The folder, fetched where it is on the hub; its files, as safetensors.
    origin = _model_folder(name, spec, download=download)
    files = _readable_files(name, spec, origin, target, download=download)
    # 2. Headers: of the files here, of those on the hub, or as a GGUF's tensors will have them.
    remote = _is_on_the_hub(spec) and not download and not has_weights(name, files.folder)
    if files.gguf is not None and not download:
        headers, notes = _headers_of_gguf(files.gguf), list[str]()
    else:
        headers, notes = hub_headers(name, spec) if remote else _read_headers(name, files.folder)
    notes += [] if files.gguf is None else files.gguf.notes
    if files.alias is not None:
        headers = split_headers(name, files.alias, headers, expected_shapes(files.config))
        headers = with_turned(headers, files.turned)
        notes.append(f"{name}: a {files.alias.dense} model, read as {files.alias.read_as}")
    # 3. The source, with the head that transformers gives it, proved to be complete.
    source = Source(
        name, spec.model, files.folder, files.config, headers, target=target, notes=tuple(notes)
    )
    if files.converted:
        source = replace(source, origin=origin, converted=files.converted)
    source = _with_its_head(_without_buffers(source), here=not remote)
    _check_tensors(source)
    _check_generation_config(source)
    # 4. The adapter.
    if spec.adapter is not None:
        adapter = _open_adapter(name, spec, spec.adapter, source.config)
        _refuse_tied_rows(adapter, declared=files.config, config=source.config)
        source = _adapted(source, adapter)
    # 5. Special tokens without a row go; the weights are those of the recipe.
    source = replace(source, dropped=tuple(_drop_numbers(name, files.folder, source.config)))
    if spec.sha256 is not None and download:
        refuse_changed(source, spec.sha256, source.hash_files(hashed))
    return source


def _is_on_the_hub(spec: SourceSpec) -> bool:
    return not spec.model.startswith(BUNDLED) and not Path(spec.model).is_absolute()


def _model_folder(name: str, spec: SourceSpec, *, download: bool) -> Path:
    """The folder of a source's model, fetched where it is on the hub (with its weights, where
    `download` says so). Raises SourceError where there is none, and for one that is an adapter's
    too."""
    if spec.model.startswith(BUNDLED):
        folder = source_folder(spec.model.removeprefix(BUNDLED))
    elif _is_on_the_hub(spec):
        folder = fetch(name, spec.model, spec.revision, _wanted_files(spec, download=download))
    else:
        folder = Path(spec.model)
    if not folder.is_dir():
        hint = ", which is a file; name the folder of the model that it is in"
        hint = _gguf_hint(name, folder) or (hint if folder.is_file() else "")
        raise SourceError(f"{name}: no such model folder: {folder}{hint or if_mistyped(folder)}")
    if (folder / ADAPTER_FILES[0]).is_file():
        raise SourceError(
            f"{name}: {folder} has an {ADAPTER_FILES[0]}: it holds a LoRA, which transformers "
            f"loads into the model by itself. Name its folder as sources.{name}.adapter, and as "
            "model the one that it was trained on, in a folder without it"
        )
    return folder


def _wanted_files(spec: SourceSpec, *, download: bool) -> list[str]:
    """Patterns of the files to fetch from the hub."""
    patterns = [*SMALL_FILES, "*.safetensors"] if download else list(SMALL_FILES)
    if spec.gguf_file is not None:
        return [*patterns, spec.gguf_file]  # everything is in it
    if spec.allow_pickle and not any(is_on_hub(spec, file) for file in (SAFETENSORS, INDEX)):
        return [*patterns, "*.bin"]
    return patterns


@dataclass(frozen=True)
class _Files:
    """A model's files, in formats that are read here."""

    folder: Path
    config: PreTrainedConfig
    converted: tuple[str, ...] = ()
    """The files that the weights in `folder` were converted from, where they were."""
    gguf: GGUFFile | None = None
    """The GGUF file among them."""
    alias: Alias | None = None
    """How they are read, where their family is read as another one."""

    @property
    def turned(self) -> TurnedPart | None:
        """What RoPE turns of their heads, where that is not all of each."""
        if self.alias is None or self.alias.turned is None:
            return None
        return self.alias.turned(load_config(self.folder))


def _readable_files(
    name: str, spec: SourceSpec, folder: Path, target: Target, *, download: bool
) -> _Files:
    """The files of a model folder, converted where they are a GGUF or pickles. Raises SourceError
    for weights in a format that the recipe does not ask for."""
    if spec.gguf_file is not None:
        gguf = open_gguf(name, folder / spec.gguf_file)
        made = _convert_gguf(name, folder, gguf, target, weights=download)
        return _Files(made, _read_config(name, made, target), (spec.gguf_file,), gguf)
    on_hub = _is_on_the_hub(spec)
    hint = "" if on_hub or any(folder.glob("*.safetensors")) else _gguf_hint(name, folder)
    if hint:
        raise SourceError(f"{name}: {folder} has no .safetensors weights{hint}")
    config = _read_config(name, folder, target)
    alias = ALIASES.get(_declared(name, folder)["model_type"])
    if alias is not None and spec.adapter is not None:
        raise SourceError(
            f"{name}: an adapter of a {alias.dense} model changes fused matrices, which are read "
            f"in parts ({', '.join(alias.fused)}); merge it into the model with peft, save the "
            f"result, and leave sources.{name}.adapter out"
        )
    pickles = pickles_of(name, folder)
    if not pickles or (on_hub and not download and is_on_hub(spec, SAFETENSORS)):
        # Safetensors on the hub are preferred, fetched or not.
        return _Files(folder, config, alias=alias)
    if not spec.allow_pickle:
        raise SourceError(
            f"{name}: {folder} has no .safetensors weights, only {pickles[0].name}, which is "
            f"pickled; set sources.{name}.allow_pickle: true to have it read (tensors alone) "
            "and converted"
        )
    made = from_pickle(name, folder, pickles)
    return _Files(made, config, tuple(path.name for path in pickles), alias=alias)


def _gguf_hint(name: str, path: Path) -> str:
    """How a recipe names the GGUF file that a path is, or that a folder has."""
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not found or found[0].suffix != ".gguf":
        return ""
    return (
        f". To read a GGUF file, write its folder as sources.{name}.model and "
        f"sources.{name}.gguf_file: {found[0].name}"
    )


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
        templates = "additional_chat_templates/*.jinja"
        patterns = [*ADAPTER_FILES, *TOKENIZER_FILES, templates, *OF_PROVENANCE]
        folder = fetch(f"{name}: adapter", adapter, spec.adapter_revision, patterns)
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
            f"{adapter.owner}: its adapter has rows of the embeddings (trainable_token_indices). "
            "peft would write them into the head too, as the model's config ties it; but the "
            "files have a head of their own. Set tie_word_embeddings: false in the model's "
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
                rows, hidden = headers[name].shape
                headers[name] = replace(headers[name], shape=(adapter.rows, hidden), rows=rows)
    changed = replace(source, adapter=adapter, config=config, headers=headers)
    beside = tokenizer_paths(adapter.folder)
    if not beside:
        return changed
    folder = adapter.folder
    if not set(beside).intersection(VOCABULARY_FILES):
        known = tokenizer_paths(source.folder)
        folder = tokenizer_over(source.name, source.folder, folder, beside, known)
    changed = replace(changed, tokenizer_folder=folder)
    special = {key: getattr(config, key, None) for key in SPECIAL}
    for key, value in changed._with_its_tokens(special).items():
        setattr(config, key, value)
    return changed


def _declared(name: str, folder: Path) -> dict[str, Any]:
    """What a model's config.json says. Raises SourceError for a family without a row."""
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{name}: {folder} has no config.json; is it a model folder?")
    try:
        declared = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{name}: {path} is not JSON: {error}") from None
    except (OSError, RecursionError) as error:  # no rights to it; nested without end
        raise SourceError(_not_usable(name, path, error)) from None
    model_type = declared.get("model_type") if isinstance(declared, dict) else None
    if not isinstance(model_type, str):
        raise SourceError(f"{name}: {path} names no model_type; is it a model's?")
    if model_type not in FAMILIES and model_type not in ALIASES:
        known = ", ".join([*FAMILIES, *ALIASES])
        why = f": {HELD_BY_NONE[model_type]}" if model_type in HELD_BY_NONE else ""
        raise SourceError(
            f"{name}: {folder} is a {model_type!r} model{why}. Choose models of a family that a "
            f"stock MoE holds exactly: {known}"
        )
    return dict(declared)


def _not_usable(name: str, path: Path, error: Exception) -> str:
    reason = shortened(f"{type(error).__name__}: {' '.join(str(error).split())}", 250)
    return f"{name}: {path} is not usable: {reason}"


def _read_config(name: str, folder: Path, target: Target) -> PreTrainedConfig:
    path = folder / "config.json"
    declared = _declared(name, folder)
    alias = ALIASES.get(declared["model_type"])
    try:
        config = load_config(folder)
        reason = None if alias is None else refusal(alias.refusals, config)
        if reason is None:
            config = config if alias is None else config_read_as(alias, config)
            expected_shapes(config)  # refuses sizes and settings that make no model
    except Exception as error:
        # Every config class and module checks, or stumbles, in its own way.
        raise SourceError(_not_usable(name, path, error)) from None
    if declared.get("quantization_config"):
        raise SourceError(
            f"{name}: {folder} is quantized; expected plain floating-point weights. "
            "Use the checkpoint that it was quantized from"
        )
    rows = [] if reason else target.rows(config.model_type)
    reasons = [reason] if reason else [row.refusal(config) for row in rows]
    if None not in reasons:
        every = "; ".join(dict.fromkeys(map(str, reasons)))
        raise SourceError(f"{name}: {folder} cannot become an expert: {every}")
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
        numbers, gone = within_vocabulary(getattr(config, key, None), rows)
        if gone:
            setattr(config, key, numbers)
            found.append(no_row(key, "config.json", gone, rows))
    return found


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
    headers, notes = by_tensor(name, {file: _headers_of(name, folder, file) for file in files})
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
    path = folder / file
    try:
        with safe_open(path, framework="pt"):  # proves that the file is whole
            pass
        with path.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            content = json.loads(opened.read(size))
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{name}: {path} is not a whole safetensors file ({error}); fetch it again"
        ) from None
    content.pop("__metadata__", None)
    return {
        tensor: Header(
            file, tuple(of["shape"]), of["dtype"], offset=8 + size + of["data_offsets"][0]
        )
        for tensor, of in content.items()
    }


def _without_buffers(source: Source) -> Source:
    """The source without the tensors that transformers reads past in silence."""
    if source.headers.keys() <= {*expected_shapes(source.config), HEAD}:
        return source
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

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
        if has_equal_tables(source):
            del headers[HEAD]
            return replace(source, headers=headers)
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = False
    note = (
        f"{source.name}: its config ties the head to the embeddings, but its files hold another "
        "head; that is used, as transformers does"
    )
    return replace(source, config=config, notes=(*source.notes, note))


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a dense model, from the table or, where its config is out of the
    ordinary, from the family's own module (no memory is taken), which raises what it raises for
    sizes and settings that make no model."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    shapes = {EMBEDDING: (vocabulary, hidden), FINAL_NORM: (hidden,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (vocabulary, hidden)
    layer = usual_shapes(FAMILIES[config.model_type], config)
    if layer is None:
        module = decoder_layer(one_layer_model(config, 0))
        layer = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for number in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def _check_tensors(source: Source) -> None:
    expected = expected_shapes(source.config)
    folder = source.origin or source.folder
    missing = [name for name in expected if name not in source.headers]
    if missing:
        raise SourceError(
            f"{source.name}: {len(missing)} tensors are missing from {folder}, "
            f"first {missing[0]}; expected all that config.json describes"
            + (NO_HEAD if missing == [HEAD] else "")
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
        refuse_dtype(source, name)


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


def refuse_changed(source: Source, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise SourceError where a file's hash is not the one that the recipe pins. `found`: the
    hashes of all files."""
    # A recipe may pin the weights alone.
    for file in [*expected, *(file for file in source.weights if file not in expected)]:
        if expected.get(file) != found.get(file):
            path = (source.origin or source.folder) / file
            raise SourceError(
                f"{source.name}: {path} has SHA-256 {str(found.get(file))[:16]}, "
                f"the recipe says {str(expected.get(file))[:16]}: the source has changed"
            )


def refuse_touched(source: Source, before: FileStates, hashes: Mapping[str, str]) -> None:
    """Raise SourceError where a file's content is not what was hashed: parts of what was read may
    be of either. `before`: the files' states when they were hashed; one that has another state now
    is hashed again."""
    now = source.files()
    for file in before.keys() | now.keys():
        path = now.get(file, (source.origin or source.folder) / file)
        try:
            same = file_state(path) == before.get(file) or sha256_of(path) == hashes.get(file)
            what = "was changed"
        except OSError as error:
            same, what = False, f"is not readable any more ({first_line(error)})"
        if not same:
            raise SourceError(
                f"{source.name}: {path} {what}; this build has read it, and may hold parts of both "
                "states. Leave the sources as they are until a build is done; --resume begins its "
                "layers again"
            )
