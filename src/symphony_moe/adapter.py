"""LoRA adapters, merged into a source's tensors as they are read: one tensor at a time.

`peft` says what an adapter adds to a tensor (rank patterns, rsLoRA and DoRA included); here is only
what makes it look at one tensor instead of a whole model.
"""

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from symphony_moe.errors import SourceError
from symphony_moe.families import EMBEDDING, HEAD

FILES = ("adapter_config.json", "adapter_model.safetensors")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of one source. Nothing of its weights is in memory."""

    owner: str
    """The source's name."""
    folder: Path
    stored: Mapping[str, str]
    """Tensor, named as in the model it was trained on -> its name in the file."""

    @cached_property
    def config(self) -> Any:
        from peft import PeftConfig

        return PeftConfig.from_pretrained(str(self.folder))

    def touches(self, tensor: str) -> bool:
        """Whether it changes a tensor of the model."""
        return tensor in self.stored or bool(self._parts(tensor))

    def _parts(self, tensor: str) -> list[str]:
        prefix = tensor.removesuffix(".weight") + ".lora_"
        return [name for name in self.stored if name.startswith(prefix)]

    def _read(self, name: str, rows: slice) -> Tensor:
        path = self.folder / FILES[1]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_slice(self.stored[name])[rows].float()
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{self.owner}: {name} in {path} is not readable: {error}") from None
        if not bool(torch.isfinite(tensor).all()):
            raise SourceError(
                f"{self.owner}: {name} in {path} has values that are NaN or infinite; fetch the "
                "adapter again"
            )
        return tensor

    def merge(self, tensor: str, weight: Tensor, rows: slice) -> Tensor:
        """Rows of a tensor of the model with the adapter in them. `weight`: these `rows`, in
        float32; what a LoRA adds to a row needs no other."""
        if tensor in self.stored:
            weight = self._read(tensor, rows)  # trained as a whole (modules_to_save, bias)
        parts = self._parts(tensor)
        if not parts:
            return weight
        path = tensor.removesuffix(".weight")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        # A is the same for all rows; B and DoRA's magnitudes have one entry for each.
        state = {n: self._read(n, slice(None) if ".lora_A." in n else rows) for n in parts}
        merged = self.adapted(path, linear, state)
        with torch.no_grad():
            merged.merge()
        return torch.as_tensor(merged.base_layer.weight.detach())

    def adapted(self, path: str, linear: nn.Linear, state: Mapping[str, Tensor]) -> Any:
        """peft's layer in the place of a `linear` of the model, with the adapter's tensors in it.

        Raises SourceError where it wants others than these, and whatever peft does where settings
        and shapes do not fit each other."""
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        config = copy.deepcopy(self.config)
        # Which layers it is for is settled: this one. Rank patterns go by the path.
        config.target_modules, config.layers_to_transform = [path], None
        config.modules_to_save, config.bias, config.inference_mode = None, "none", True
        if linear.weight.is_meta:
            config.init_lora_weights = False  # some begin with a decomposition of the weight
        model = nn.Module()
        place = model
        *parents, last = path.split(".")
        for name in parents:
            child = nn.Module()
            place.add_module(name, child)
            place = child
        place.add_module(last, linear)
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


def open_adapter(owner: str, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Open an adapter from its headers and prove that it fits a model of these `shapes`.

    Raises SourceError for a folder that is none, another method than LoRA, pickled weights, tensors
    that the model has no place for or that do not fit the settings, and tensors that are missing.
    """
    for file in FILES:
        if not (folder / file).is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else ""
            raise SourceError(
                f"{owner}: adapter {folder} has no {file} (found: {found or 'nothing'}); expected "
                "a LoRA adapter saved by peft, as safetensors"
            )
    try:
        config = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise SourceError(f"{owner}: {folder / FILES[0]} is not usable: {error}") from None
    if kind != "LORA":
        raise SourceError(
            f"{owner}: adapter {folder} is of type {kind!r}; expected 'LORA'. Merge it into its "
            "model with peft and save that"
        )
    try:
        import peft  # noqa: F401
    except ImportError:
        raise SourceError(f"{owner}: reading adapters needs peft: pip install peft") from None
    try:
        with safe_open(folder / FILES[1], framework="pt") as file:
            tensors = {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118 (a handle, not a dict)
            }
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{owner}: {folder / FILES[1]} is not readable: {error}") from None
    # A layer that is adapted keeps what it was beside it, and peft saves some of that too.
    if not tensors:
        raise SourceError(f"{owner}: {folder / FILES[1]} holds no tensors; fetch it again")
    stored = {n.removeprefix(_PREFIX).replace(".base_layer.", "."): n for n in tensors}
    adapter = Adapter(owner, folder, stored)
    for name, written in stored.items():
        _check_fits(adapter, name, tensors[written], shapes)
    try:
        _ = adapter.config
    except Exception as error:
        # Settings that this peft does not know, or refuses, in its own way.
        raise SourceError(f"{owner}: {folder / FILES[0]} is not usable: {error}") from None
    for path in sorted({n.partition(".lora_")[0] for n in stored if ".lora_" in n}):
        parts = {
            n: torch.empty(tensors[w], device="meta")
            for n, w in stored.items()
            if n.startswith(f"{path}.lora_")
        }
        _check_merges(adapter, path, shapes[f"{path}.weight"], parts)
    return adapter


def _check_merges(
    adapter: Adapter, path: str, shape: tuple[int, ...], parts: Mapping[str, Tensor]
) -> None:
    """Let peft try, without memory."""
    beginning = adapter.config.init_lora_weights
    if path == HEAD.removesuffix(".weight") and beginning not in (True, False, "gaussian"):
        raise SourceError(
            f"{adapter.owner}: the adapter in {adapter.folder} began with a decomposition of the "
            f"head ({beginning}), which is read in blocks here; merge it into its model with peft "
            "and save that"
        )
    try:
        adapter.adapted(path, nn.Linear(shape[1], shape[0], bias=False, device="meta"), parts)
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
    tensor = f"{path}.weight" if lora else name
    if tensor in (EMBEDDING, HEAD) and HEAD not in shapes:
        raise SourceError(
            f"{adapter.owner}: the adapter in {adapter.folder} changes {name}, and the model's "
            "head is its embeddings: peft would change the one alone. Merge it into its "
            "model with peft, with tie_word_embeddings: false, and save that"
        )
    expected = shapes.get(tensor)
    if expected is None:
        raise SourceError(
            f"{adapter.owner}: the adapter in {adapter.folder} changes {name}, which the model has "
            "not; is it another model's adapter?"
        )
    if not lora:
        fits = shape == expected
    elif part == "A.weight":
        fits = len(shape) == 2 and shape[1] == expected[1]
    elif part == "B.weight":
        fits = len(shape) == 2 and shape[0] == expected[0]
    elif part.startswith("magnitude_vector"):
        fits = expected[0] in shape
    else:
        raise SourceError(
            f"{adapter.owner}: {name} of the adapter in {adapter.folder} is of a kind that cannot "
            "be merged tensor by tensor; merge it into its model with peft and save that"
        )
    if not fits:
        raise SourceError(
            f"{adapter.owner}: {name} of the adapter in {adapter.folder} is {list(shape)}, for a "
            f"tensor of {list(expected)}; is it another model's adapter?"
        )
