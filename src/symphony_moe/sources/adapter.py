"""LoRA adapters, merged into a source's tensors as they are read: one tensor at a time.

`peft` says what an adapter adds to a tensor (rank patterns, rsLoRA and DoRA included); here is only
what makes it look at one tensor instead of a whole model. What cannot be read so, or not twice the
same, is refused by name before anything is built.
"""

import copy
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from symphony_moe.errors import SourceError, first_line, shortened
from symphony_moe.model.families import EMBEDDING, HEAD

FILES = ("adapter_config.json", "adapter_model.safetensors")
_PREFIX = "base_model.model."
_TABLES = (EMBEDDING, HEAD)

_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
"""What peft calls the rows of a table that were trained as `trainable_token_indices`."""

_BLOCK = 8192
"""Rows of a table that are compared at once."""


def _merging(*between: str) -> str:
    """Python that merges an adapter into its model, which the lines `between` change before."""
    lines = (
        "from transformers import AutoModelForCausalLM; from peft import PeftModel",
        "m = AutoModelForCausalLM.from_pretrained(MODEL)",
        *between,
        "PeftModel.from_pretrained(m, ADAPTER).merge_and_unload().save_pretrained(FOLDER)",
    )
    return "".join(f"\n  {line}" for line in lines)


_MERGE_IT = f"; merge it into its model and use that:{_merging()}"

_CONVERT = (
    "; save it where it was trained as a plain LoRA: save_pretrained(FOLDER, "
    "path_initial_model_for_weight_conversion=...), or merge it there"
)

_PLAIN = (False, True, "gaussian", "eva", "orthogonal", "lora_ga", "mica")
"""Beginnings that leave the model's weights as they are when an adapter is loaded."""

_DECOMPOSED = ("pissa", "olora")
"""Beginnings that take a part out of the model's weights, the same one whenever peft does it."""

_REFUSED_BEGINNINGS = {
    "corda": "began with a decomposition (CorDA) that peft cannot repeat without the data that it "
    "was made from" + _CONVERT,
    "loftq": "was trained on a model that LoftQ had quantized, which only peft can do again"
    + _MERGE_IT,
    "pissa_niter": "began with a decomposition (a fast SVD) that peft draws at random whenever it "
    "loads it, so that what it was trained on is in none of its files" + _CONVERT,
}

_REFUSED_SETTINGS = {
    "alora_invocation_tokens": "is an activated LoRA: it works only behind its invocation tokens, "
    "and no weights can hold that (peft cannot merge it either); leave the adapter out, or train a "
    "plain LoRA",
    "arrow_config": "routes between adapters (Arrow), and no weights can hold that (peft cannot "
    "merge it either); name one of those adapters instead",
    "use_qalora": "is of a GPTQ model (QA-LoRA), which peft cannot merge; train a plain LoRA",
    "megatron_config": "is of Megatron's parallel layers; convert it to a LoRA of the "
    "transformers model",
    "layer_replication": "repeats layers of its model" + _MERGE_IT,
    "lora_bias": "adds biases beside its matrices" + _MERGE_IT,
    "target_parameters": "names parameters, not modules" + _MERGE_IT,
    "use_bdlora": "has block-diagonal matrices (BD-LoRA)" + _MERGE_IT,
    "velora_config": "is a VeLoRA" + _MERGE_IT,
    "kasa_config": "takes a part out of its model's weights (KaSA)" + _MERGE_IT,
    "monteclora_config": "samples its matrices (MonteCLoRA)" + _MERGE_IT,
}
"""Setting that is on -> what the adapter does, and what to do."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of one source. Nothing of its weights is in memory."""

    owner: str
    """The source's name."""
    folder: Path
    stored: Mapping[str, str]
    """Tensor, named as in the model it was trained on -> its name in the file."""
    rows: int | None = None
    """Rows of the tables of embeddings and head, where it has other than the model."""
    unties: bool = False
    """Embeddings and head, one table in the model, were trained as two."""
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Table -> numbers of the rows that it replaces."""
    unfilled: Sequence[str] = ()
    """Matrices that its settings name and its file has nothing for."""

    @cached_property
    def config(self) -> Any:
        """Its settings, as peft reads them."""
        from peft import PeftConfig

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that it does not know: see `unknown`
            return PeftConfig.from_pretrained(str(self.folder))

    @property
    def has_patterns(self) -> bool:
        """Whether rank or alpha depend on the path of what it changes."""
        return bool(self.config.rank_pattern or self.config.alpha_pattern)

    @cached_property
    def unknown(self) -> list[str]:
        """Settings in its file that are on and that this peft does not know, and ignores."""
        known = {known.name for known in fields(self.config)}
        settings = _settings(self.owner, self.folder)
        return sorted(name for name, value in settings.items() if value and name not in known)

    @cached_property
    def changes_nothing(self) -> bool:
        """Whether the merged model is the model: all that it adds is zero."""
        config = self.config
        if not all(".lora_" in name for name in self.stored) or config.use_dora:
            return False
        if _beginning(config.init_lora_weights) in _DECOMPOSED:
            return False
        if not config.lora_alpha and not any(config.alpha_pattern.values()):
            return True
        return not all(
            any(bool(self._read(n, (slice(None),)).any()) for n in self.stored if factor in n)
            for factor in (".lora_A.", ".lora_B.")
        ) and not any(".lora_embedding_" in name for name in self.stored)

    def notes(self) -> Iterator[str]:
        """What a plan says of it: what it changes beside matrices, and what is left out."""
        if self.changes_nothing:
            yield (
                "its adapter changes nothing: all that it adds is zero (lora_B, or lora_alpha). "
                "The source is the model alone"
            )
        if self.unknown:
            yield (
                "its adapter has settings that this peft does not know and leaves out: "
                f"{_cut(', '.join(self.unknown))}"
            )
        if self.unfilled:
            yield (
                f"its adapter names {len(self.unfilled)} matrices that it has nothing for, first "
                f"{self.unfilled[0]}; they stay the model's"
            )
        if self.config.init_lora_weights == "lora_ga":
            yield (
                "its adapter began with LoRA-GA, which takes a part out of the model's weights; "
                "peft leaves it in when it loads the adapter, and so it is here"
            )
        if self.rows is not None:
            yield (
                f"its adapter has embeddings and a head of {self.rows} rows, which take the place "
                "of the model's"
            )
        if self.unties:
            yield (
                "its adapter has embeddings and a head of its own, which are one table in the "
                "model; the source has two"
            )

    def touches(self, tensor: str) -> bool:
        """Whether it changes a tensor of the model."""
        return tensor in self.stored or tensor in self.tokens or bool(self._parts(tensor))

    def holds(self, tensor: str) -> bool:
        """Whether it has the whole tensor, so that nothing of the model's is left."""
        return tensor in self.stored

    def needs_all_rows(self, tensor: str) -> bool:
        """Whether some rows of the merged tensor depend on the others."""
        beginning = _beginning(self.config.init_lora_weights)
        return beginning in _DECOMPOSED and bool(self._parts(tensor))

    def _parts(self, tensor: str) -> list[str]:
        prefix = tensor.removesuffix(".weight") + ".lora_"
        return [name for name in self.stored if name.startswith(prefix)]

    def _read(self, name: str, where: tuple[slice, ...]) -> Tensor:
        path = self.folder / FILES[1]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_slice(self.stored[name])[where].float()
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{self.owner}: {name} in {path} is not readable: {error}") from None
        if not bool(torch.isfinite(tensor).all()):
            raise SourceError(
                f"{self.owner}: {name} in {path} has values that are NaN or infinite; fetch the "
                "adapter again"
            )
        return tensor

    def merge(self, tensor: str, weight: Tensor | None, rows: slice) -> Tensor:
        """Rows of a tensor of the model with the adapter in them. `weight`: these `rows`, in
        float32 (what a LoRA adds to a row needs no other); None where the adapter `holds` it."""
        if weight is None:
            weight = self._read(tensor, (rows,))  # trained as a whole (modules_to_save, bias)
        weight = self._with_token_rows(tensor, weight, rows)
        parts = self._parts(tensor)
        if not parts:
            return weight
        layer = _empty_layer(tensor, weight.shape)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        state = {name: self._read(name, _of_rows(name, rows)) for name in parts}
        merged = self.adapted(tensor.removesuffix(".weight"), layer, state)
        with torch.no_grad():
            merged.merge()
        return torch.as_tensor(merged.base_layer.weight.detach())

    def _with_token_rows(self, tensor: str, weight: Tensor, rows: slice) -> Tensor:
        """The rows with those that were trained one by one; the model may have fewer of them."""
        if tensor not in self.tokens:
            return weight
        first = rows.start or 0
        size = len(weight) if self.rows is None else len(range(self.rows)[rows])
        block = torch.zeros(size, weight.shape[1])
        block[: len(weight)] = weight
        trained = self._read(_delta(tensor), (slice(None),))
        for number, row in zip(self.tokens[tensor], trained, strict=True):
            if first <= number < first + size:
                block[number - first] = row
        return block

    def adapted(self, path: str, layer: nn.Module, state: Mapping[str, Tensor]) -> Any:
        """peft's layer in the place of a `layer` of the model, with the adapter's tensors in it.

        Raises SourceError where it wants others than these, and whatever peft does where settings
        and shapes do not fit each other."""
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        config = copy.deepcopy(self.config)
        # Which layers it is for is settled: this one. Rank patterns go by the path.
        config.target_modules, config.layers_to_transform = [path], None
        config.modules_to_save, config.bias, config.inference_mode = None, "none", True
        config.trainable_token_indices, config.ensure_weight_tying = None, False
        if layer.weight.is_meta or _beginning(config.init_lora_weights) in _PLAIN:
            # What it begins with is replaced; only a decomposition of the weight leaves a trace.
            config.init_lora_weights = False
        model = nn.Module()
        place = model
        *parents, last = path.split(".")
        for name in parents:
            child = nn.Module()
            place.add_module(name, child)
            place = child
        place.add_module(last, layer)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # patterns that match no part of this piece
            inject_adapter_in_model(config, model)
            problem: Any = set_peft_model_state_dict(model, dict(state))
        if problem.unexpected_keys:
            raise SourceError(
                f"{self.owner}: peft does not know {problem.unexpected_keys[0]} of the adapter in "
                f"{self.folder}"
            )
        missing = [key for key in problem.missing_keys if ".base_layer." not in key]
        if missing:
            raise SourceError(
                f"{self.owner}: the adapter in {self.folder} has no "
                f"{missing[0].replace('.default', '')}; expected all parts of what it changes. "
                "Fetch it again"
            )
        return model.get_submodule(path)


def _empty_layer(tensor: str, shape: Sequence[int]) -> nn.Module:
    """The layer that has a tensor of this shape as its weight, without memory."""
    if tensor == EMBEDDING:
        return nn.Embedding(shape[0], shape[1], device="meta")
    return nn.Linear(shape[1], shape[0], bias=False, device="meta")


def _of_rows(part: str, rows: slice) -> tuple[slice, ...]:
    """Where a part of a LoRA has what belongs to some rows of the weight."""
    if part.endswith(".lora_embedding_A"):
        return (slice(None), rows)
    # One factor is the same for all rows; the other, and DoRA's magnitudes, have an entry for each.
    of_all = ".lora_A." in part or part.endswith(".lora_embedding_B")
    return (slice(None) if of_all else rows,)


def open_adapter(owner: str, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Open an adapter from its headers and prove that it fits a model of these `shapes`.

    Raises SourceError for a folder that is none, another method than LoRA, a kind of LoRA that is
    not read, another task, pickled weights, tensors that the model has no place for or that do not
    fit the settings, and tensors that are missing.
    """
    for file in FILES:
        if not (folder / file).is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else ""
            raise SourceError(
                f"{owner}: adapter {_cut(str(folder))} has no {file} (found: "
                f"{shortened(found, 200) or 'nothing'}); expected a LoRA adapter saved by peft, as "
                "safetensors"
            )
    _refuse_settings(owner, folder, _settings(owner, folder))
    try:
        import peft  # noqa: F401
    except ImportError:
        raise SourceError(f"{owner}: reading adapters needs peft: pip install peft") from None
    tensors = _tensors(owner, folder)
    adapter = Adapter(owner, folder, _model_names(tensors))
    try:
        _ = adapter.config
    except Exception as error:
        # Settings that this peft does not know, or refuses, in its own way.
        reason = shortened(first_line(error), 200)
        raise SourceError(f"{owner}: {folder / FILES[0]} is not usable: {reason}") from None
    adapter, shapes = _with_tables(adapter, tensors, shapes)
    for name, written in adapter.stored.items():
        _check_fits(adapter, name, tensors[written], shapes)
    by_path: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, written in sorted(adapter.stored.items()):
        path, lora, part = name.partition(".lora_")
        if lora:
            by_path[path][f"{lora}{part}"] = tensors[written]
    tried: set[Any] = set()
    for path, parts in by_path.items():
        shape = shapes[f"{path}.weight"]
        # Of a layer like one before it peft would say the same, unless settings go by the path.
        alike = path if adapter.has_patterns else (path in HEAD, path in EMBEDDING)
        facts = alike, shape, tuple(parts.items())
        if facts not in tried:
            tried.add(facts)
            blank = {f"{path}{part}": torch.empty(s, device="meta") for part, s in parts.items()}
            _check_merges(adapter, path, shape, blank)
    return replace(adapter, unfilled=_unfilled(adapter, shapes))


def _unfilled(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Matrices that the settings name and the file has nothing for.

    Raises SourceError for one that the file has and they do not name: peft leaves it out."""
    unfilled = []
    for tensor, shape in shapes.items():
        path = tensor.removesuffix(".weight")
        has = any(name.startswith(f"{path}.lora_") for name in adapter.stored)
        named = _is_named(adapter, path)
        if has and named is False:
            raise SourceError(
                f"{adapter.owner}: the adapter in {_cut(str(adapter.folder))} has a LoRA for "
                f"{path}, which target_modules (or what goes with them) in its {FILES[0]} do not "
                "name: peft leaves it out. Are both files of one adapter?"
            )
        if named and not has and len(shape) == 2 and tensor not in adapter.stored:
            unfilled.append(path)
    return unfilled


def _is_named(adapter: Adapter, path: str) -> bool | None:
    """Whether the settings name a module, by peft's own rule; None where they leave it open."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not adapter.config.target_modules or adapter.config.target_modules == "all-linear":
        return None
    try:
        return bool(check_target_module_exists(adapter.config, path))
    except (TypeError, ValueError, re.error) as error:
        raise SourceError(
            f"{adapter.owner}: target_modules (or what goes with them) in "
            f"{adapter.folder / FILES[0]} is not usable: {error}"
        ) from None


def _settings(owner: str, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected a table of settings")
    except (ValueError, RecursionError) as error:
        reason = shortened(first_line(error), 200)
        raise SourceError(f"{owner}: {folder / FILES[0]} is not usable: {reason}") from None
    return content


def _refuse_settings(owner: str, folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise SourceError for another method than LoRA, another task than text, and kinds of LoRA
    that are not read."""
    who = f"{owner}: adapter {_cut(str(folder))}"
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind != "LORA":
        raise SourceError(f"{who} is of type {_cut(repr(kind))}; expected 'LORA'{_MERGE_IT}")
    if task not in (None, "CAUSAL_LM"):
        raise SourceError(
            f"{who} was trained for the task {_cut(repr(task))}; expected 'CAUSAL_LM': a model "
            "that writes text has no place for what another task's was trained with (a "
            "classifier's head). If it is a language model's after all, say so: task_type in its "
            f"{FILES[0]}"
        )
    for name, reason in _REFUSED_SETTINGS.items():
        if settings.get(name):
            raise SourceError(f"{who} ({name}) {reason}")
    beginning = settings.get("init_lora_weights")
    known = (None, *_PLAIN, *_DECOMPOSED)
    if _beginning(beginning) in known:
        return
    for name, reason in _REFUSED_BEGINNINGS.items():
        if isinstance(beginning, str) and re.fullmatch(rf"{name}(_\d+)?", beginning):
            raise SourceError(f"{who} (init_lora_weights {beginning}) {reason}")
    raise SourceError(
        f"{who} has init_lora_weights {_cut(repr(beginning))}, which is not known here; expected "
        f"one of {', '.join(map(str, known[1:]))}; update symphony-moe, or merge it into its model "
        "with peft and save that"
    )


def _beginning(value: Any) -> Any:
    """A beginning as peft compares it: some in any case."""
    lowered = value.lower() if isinstance(value, str) else value
    return lowered if lowered in ("olora", "gaussian") else value


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"...{text[-57:]}"


def _tensors(owner: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor as the file names it -> shape."""
    try:
        with safe_open(folder / FILES[1], framework="pt") as file:
            tensors = {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118 (a handle, not a dict)
            }
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{owner}: {folder / FILES[1]} is not readable: {error}") from None
    if not tensors:
        raise SourceError(f"{owner}: {folder / FILES[1]} holds no tensors; fetch it again")
    return tensors


_COPIES = re.compile(r"\.(?:modules_to_save|original_module)\.")


def _model_names(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Tensor as the model names it -> as the file does."""
    stored = {}
    for written in tensors:
        # A layer that is adapted keeps what it was beside it, and peft saves some of that too.
        name = written.removeprefix(_PREFIX).replace(".token_adapter.base_layer.", ".")
        stored[name.replace(".base_layer.", ".")] = written
    # Of a table that had grown and was trained whole, peft saves three copies and reads one.
    copies = {n for n in stored if _COPIES.search(n) and _COPIES.sub(".", n) in stored}
    return {name: written for name, written in stored.items() if name not in copies}


def _with_tables(
    adapter: Adapter, tensors: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Adapter, dict[str, tuple[int, ...]]]:
    """(the adapter, the shapes of the model with it): the tables of embeddings and head may have
    other rows than the model's, and be two where the model has one.

    Raises SourceError where it has not all rows of all tables then."""
    stored, unties = dict(adapter.stored), False
    if HEAD not in shapes:
        stored, unties = _one_table(adapter, tensors)
    tables = [name for name in _TABLES if name in shapes or unties]
    old, hidden = shapes[EMBEDDING]
    whole = {n: tensors[stored[n]][0] for n in tables if n in stored and tensors[stored[n]]}
    rows = old
    if len(whole) == len(tables) and len(set(whole.values())) == 1:
        rows = whole[EMBEDDING]
    elif others := set(whole.values()) - {old}:
        raise _other_rows(adapter, max(others), old)
    tokens = {n: _token_rows(adapter, n, tensors) for n in tables if _delta(n) in stored}
    needed = max((max(numbers) + 1 for numbers in tokens.values()), default=rows)
    if needed > rows:
        # Nobody knows what is in a row that was added and that the file has not.
        if not all({*range(rows, needed)} <= {*tokens.get(name, ())} for name in tables):
            raise _other_rows(adapter, needed, old)
        rows = needed
    changed = replace(
        adapter, stored=stored, rows=None if rows == old else rows, unties=unties, tokens=tokens
    )
    return changed, {**shapes, **dict.fromkeys(tables, (rows, hidden))}


def _other_rows(adapter: Adapter, found: int, expected: int) -> SourceError:
    lines = _merging(f"m.resize_token_embeddings({found})")
    return SourceError(
        f"{adapter.owner}: the adapter in {_cut(str(adapter.folder))} was trained on tables of "
        f"{found} rows, the model has {expected}, and the file has not all of embeddings and head; "
        f"save it with save_embedding_layers=True, or merge it and use that:{lines}"
    )


def _delta(table: str) -> str:
    return table.removesuffix(".weight") + _TOKEN_ROWS


def _one_table(
    adapter: Adapter, tensors: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], bool]:
    """(what is stored, whether the model's one table becomes two), for a model whose head is its
    embeddings. peft makes two of it where both were trained whole and came out different."""
    stored = adapter.stored
    head, embedding = HEAD.removesuffix("weight"), EMBEDDING.removesuffix("weight")
    twins = {n: embedding + n.removeprefix(head) for n in stored if n.startswith(head)}
    again = {n for n, twin in twins.items() if twin in stored and _same(adapter, tensors, n, twin)}
    unties = HEAD in stored and EMBEDDING in stored and HEAD not in again
    fine = {_delta(EMBEDDING)}  # peft replaces the rows of both
    if unties:
        fine = set(_TABLES)
    elif HEAD in again:
        fine.add(EMBEDDING)
    left = [n for n in stored if n.startswith((head, embedding)) and n not in fine | again]
    if left:
        lines = _merging(
            "m.config.tie_word_embeddings = False",
            "import copy; m.lm_head = copy.deepcopy(m.lm_head)",
        )
        raise SourceError(
            f"{adapter.owner}: the adapter in {_cut(str(adapter.folder))} changes {left[0]}, and "
            "the model's head is its embeddings. Make two of them, merge it and use "
            f"that:{lines}"
        )
    return {name: written for name, written in stored.items() if name not in again}, unties


def _same(adapter: Adapter, tensors: Mapping[str, tuple[int, ...]], one: str, other: str) -> bool:
    """Whether two stored tensors have the same values; read in blocks."""
    shape = tensors[adapter.stored[one]]
    if shape != tensors[adapter.stored[other]] or not shape:
        return False
    blocks = (slice(first, first + _BLOCK) for first in range(0, shape[0], _BLOCK))
    return all(
        torch.equal(adapter._read(one, (rows,)), adapter._read(other, (rows,))) for rows in blocks
    )


def _token_rows(adapter: Adapter, table: str, tensors: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Numbers of the rows of a table that the adapter replaces, in the order of its tensor.

    Raises SourceError where the settings do not name as many."""
    named = adapter.config.trainable_token_indices
    path = table.removesuffix(".weight")
    if isinstance(named, dict):
        fitting = [
            numbers for module, numbers in named.items() if f".{path}".endswith(f".{module}")
        ]
        named = fitting[0] if len(fitting) == 1 else None
    elif table != EMBEDDING:
        named = None
    shape = tensors[adapter.stored[_delta(table)]]
    numbers = list(named) if isinstance(named, list | tuple) else []
    counted = [n for n in numbers if type(n) is int and n >= 0]
    if not numbers or len(set(counted)) != len(numbers) or shape[:1] != (len(numbers),):
        raise SourceError(
            f"{adapter.owner}: the adapter in {_cut(str(adapter.folder))} has {list(shape)} values "
            f"for rows of {table}, and trainable_token_indices in its {FILES[0]} is "
            f"{_cut(repr(adapter.config.trainable_token_indices))}; expected one number for each "
            "row. Are both files of one adapter?"
        )
    if any(n.startswith(f"{path}.lora_") for n in adapter.stored):
        raise SourceError(
            f"{adapter.owner}: the adapter in {_cut(str(adapter.folder))} changes rows of {table} "
            f"one by one and as a LoRA{_MERGE_IT}"
        )
    return numbers


def _check_merges(
    adapter: Adapter, path: str, shape: tuple[int, ...], parts: Mapping[str, Tensor]
) -> None:
    """Let peft try, without memory."""
    beginning = _beginning(adapter.config.init_lora_weights)
    if f"{path}.weight" in _TABLES and beginning in _DECOMPOSED:
        raise SourceError(
            f"{adapter.owner}: the adapter in {adapter.folder} began with a decomposition of the "
            f"{'head' if path in HEAD else 'embeddings'} ({beginning}), which is read in blocks "
            f"here{_MERGE_IT}"
        )
    try:
        adapter.adapted(path, _empty_layer(f"{path}.weight", shape), parts)
    except SourceError:
        raise
    except Exception as error:
        # Ranks that are not the settings', settings that are no numbers: peft checks, or stumbles,
        # in its own way.
        reason = " ".join(str(error).split())[:300]
        raise SourceError(
            f"{adapter.owner}: the settings of the adapter in {adapter.folder} do not fit its "
            f"tensors for {path} ({reason}); are both files of one adapter?"
        ) from None


def _check_fits(
    adapter: Adapter, name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    path, lora, part = name.partition(".lora_")
    is_rows = name.endswith(_TOKEN_ROWS)
    tensor = f"{path}.weight" if lora else name
    if is_rows:
        tensor = name.removesuffix(_TOKEN_ROWS) + ".weight"
    expected = shapes.get(tensor)
    if expected is None:
        raise SourceError(
            f"{adapter.owner}: the adapter in {adapter.folder} changes {name}, which the model has "
            "not; is it another model's adapter?"
        )
    fits = _fitting(part, shape, expected) if lora else shape == expected
    if is_rows:
        fits = tensor in adapter.tokens and shape[1:] == expected[1:]
    if fits is None or (tensor == EMBEDDING and part.startswith("magnitude_vector")):
        raise SourceError(
            f"{adapter.owner}: {name} of the adapter in {_cut(str(adapter.folder))} is of a kind "
            f"that cannot be merged tensor by tensor{_MERGE_IT}"
        )
    if not fits and tensor in _TABLES and part in ("embedding_A", "B.weight") and len(shape) == 2:
        raise _other_rows(adapter, shape[part == "embedding_A"], expected[0])
    if not fits:
        raise SourceError(
            f"{adapter.owner}: {name} of the adapter in {adapter.folder} is {list(shape)}, for a "
            f"tensor of {list(expected)}; is it another model's adapter?"
        )


_AXES = {"A.weight": (1, 1), "B.weight": (0, 0), "embedding_A": (1, 0), "embedding_B": (0, 1)}
"""Part of a LoRA -> (its axis, the axis of the tensor that is as long)."""


def _fitting(part: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool | None:
    """Whether a part of a LoRA has the shape for a tensor; None for a part that is not known."""
    if part.startswith("magnitude_vector"):
        return expected[0] in shape
    if part not in _AXES:
        return None
    own, of_tensor = _AXES[part]
    return len(shape) == 2 and shape[own] == expected[of_tensor]
