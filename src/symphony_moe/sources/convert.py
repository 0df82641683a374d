"""Checkpoints in other formats, as safetensors folders in a cache: converted once.

GGUF files go through `transformers`, which undoes their quantization; the whole model is in memory
meanwhile. Pickled `pytorch_model*.bin` files, where the recipe allows them by name, are read with
torch's weights-only loader, file by file. The cache is `$SYMPHONY_CACHE`, or `symphony-moe` in the
user's cache folder; an entry is named after path, size and time of change of the weights and of the
small files beside them.
"""

import hashlib
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from symphony_moe.errors import SourceError, first_line
from symphony_moe.sources.gguf_file import GGUFFile
from symphony_moe.sources.pretrained import LOCAL, load_config, load_tokenizer

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What transformers looks for in a model folder, in this order."""

_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_SMALL = (".json", ".jinja", ".model", ".txt")

_FORMAT = 2
"""What conversion makes of a file: raised where that changes, so that older entries are not
read."""

_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def cache() -> Path:
    """Where converted checkpoints lie."""
    if named := os.environ.get("SYMPHONY_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "symphony-moe"


def weight_map(name: str, index: Path) -> dict[str, str]:
    """Tensor -> file, as an index says. Raises SourceError where it says nothing of the kind."""
    try:
        found = _listed(index)
        if not found:
            raise ValueError("it lists no tensors")
    except _UNUSABLE as error:
        raise SourceError(
            f"{name}: {index} is not a usable index: {repr(error)[:200]}; fetch it again"
        ) from None
    refuse_outside(name, index)
    return found


def refuse_outside(name: str, index: Path) -> None:
    """Raise SourceError where an index names a file that is not in its folder. One that cannot be
    read, or is not there, names none."""
    try:
        files = _listed(index).values() if index.is_file() else ()
    except _UNUSABLE:
        return
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise SourceError(
                f"{name}: {index} names {file[:100]!r}, which is outside of the model's folder; "
                "expected the names of files in it. Fetch the checkpoint again"
            )


_UNUSABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What JSON that is no index raises."""


def _listed(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index says."""
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return {str(tensor): str(Path(file)) for tensor, file in listed.items()}


def pickles_of(name: str, folder: Path) -> list[Path]:
    """The pickled weights of a model folder; none where it has safetensors."""
    if (folder / SAFETENSORS).is_file() or (folder / INDEX).is_file():
        return []
    if (folder / _BIN).is_file():
        return [folder / _BIN]
    index = folder / _BIN_INDEX
    if not index.is_file():
        return []
    return [folder / file for file in sorted(set(weight_map(name, index).values()))]


def from_gguf(name: str, folder: Path, file: GGUFFile, *, weights: bool) -> Path:
    """A model folder of a GGUF file in a folder. `weights=False`: config and tokenizer alone.

    Raises SourceError for a file that transformers cannot read, or not wholly.
    """

    def describe(out: Path) -> PreTrainedConfig:
        config: PreTrainedConfig = load_config(folder, gguf_file=file.path.name)
        if config.model_type != file.architecture:
            raise ValueError(f"transformers takes it for a {config.model_type!r} model")
        _forget_quantization(config)
        file.amend(config).save_pretrained(out)
        tokenizer = load_tokenizer(folder, gguf_file=file.path.name)
        if file.adds_bos:
            _put_bos_first(tokenizer)
        tokenizer.save_pretrained(out)
        return config

    def convert(out: Path) -> None:
        from transformers import AutoModelForCausalLM

        config = describe(out)
        # float32 holds exactly what the quantized weights stand for.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file.path.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            **LOCAL,
        )
        read, info = loaded
        wrong = {what: sorted(map(str, names)) for what, names in info.items() if names}
        if wrong:
            raise ValueError(f"transformers does not find all of it: {wrong}")
        # The model still says how it was quantized, and would not be saved.
        plain = AutoModelForCausalLM.from_config(load_config(out), dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(out)

    if weights:
        return _once(name, "gguf", folder, [file.path], convert)
    return _once(name, "gguf-described", folder, [file.path], describe)


def _put_bos_first(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer put its BOS before every text, as the GGUF file says; what transformers
    makes of such a file does not."""
    bos, backend = tokenizer.bos_token, getattr(tokenizer, "backend_tokenizer", None)
    ids = tokenizer("a")["input_ids"]
    if bos is None or backend is None or ids[:1] == [tokenizer.bos_token_id]:
        return
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )


def from_pickle(name: str, folder: Path, files: Sequence[Path]) -> Path:
    """A model folder with safetensors in the place of pickled weights.

    Raises SourceError for files that are missing, or hold more than tensors.
    """
    for path in files:
        if not path.is_file():
            raise SourceError(f"{name}: {path} is in the index, but is not there")

    def convert(out: Path) -> None:
        for path in _small_files(folder):
            if path.name != _BIN_INDEX:
                copy = out / path.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
        where: dict[str, str] = {}
        for number, path in enumerate(files, start=1):
            tensors = _tensors(path)
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            save_file(tensors, out / file, {"format": "pt"})
            where |= dict.fromkeys(tensors, file)
        index = {"metadata": {}, "weight_map": where}
        (out / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return _once(name, "pickle", folder, files, convert)


def tokenizer_over(
    name: str, model: Path, over: Path, files: Sequence[str], known: Sequence[str]
) -> Path:
    """A folder with the tokenizer of a `model` folder, in which `files` of another folder (a
    template, settings; no vocabulary) take the place of its own. `known`: the files of its own."""

    def lay_over(out: Path) -> None:
        replaced = set(files)
        settings = {}
        if "tokenizer_config.json" in replaced:
            settings = json.loads((over / "tokenizer_config.json").read_text(encoding="utf-8"))
            replaced.add("special_tokens_map.json")  # of older versions; the settings name them
        if settings.get("chat_template") or replaced.intersection(_TEMPLATES):
            replaced.update(_TEMPLATES)  # which would come first
        kept = [file for file in ("config.json", *known) if file not in replaced]
        # Its class goes by the config.
        for folder, names in ((model, kept), (over, files)):
            for file in names:
                (out / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / file, out / file)

    return _once(name, "tokenizer", model, [over / file for file in files], lay_over)


def _small_files(folder: Path) -> list[Path]:
    """Config, tokenizer and what else is in a model folder beside weights, the chat templates that
    have a folder of their own included."""
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")]
    return sorted(path for path in found if path.suffix in _SMALL and path.is_file())


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file."""
    # Files of before torch 1.6 are no archives, which alone can be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        # What torch's reader raises where a file is shorter than it says.
        raise ValueError(f"it is not whole ({error}); fetch it again") from None
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError("it holds something other than named tensors")
    # Copies: tensors may share their memory in there, which safetensors refuses.
    return {str(key): value.contiguous().clone() for key, value in content.items()}


def _forget_quantization(config: Any) -> None:
    config.__dict__.pop("quantization_config", None)


def _once(
    name: str, kind: str, folder: Path, files: Sequence[Path], make: Callable[[Path], object]
) -> Path:
    """The cache's entry for some files of a folder and the small ones in it; made, and put there by
    one rename, where it is missing."""
    digest = hashlib.sha256(f"{kind} {_FORMAT}".encode())
    for path in [*files, *_small_files(folder)]:
        state = path.stat()
        digest.update(f"\0{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}".encode())
    entry = cache() / f"{kind}-{digest.hexdigest()[:24]}"
    if entry.is_dir():
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=entry.parent) as making:
            out = Path(making) / "model"
            out.mkdir()
            make(out)
            if not entry.is_dir():  # another process may have been faster
                out.rename(entry)
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{name}: {files[0]} holds more than tensors, and is not read: {first_line(error)}"
        ) from None
    except OSError:
        raise
    except Exception as error:
        # Readers of foreign formats fail in their own ways; the file is the user's.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise SourceError(f"{name}: {files[0]} cannot be converted: {reason}") from None
    return entry
