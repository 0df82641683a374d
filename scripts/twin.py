"""A scrambled twin: the same function in strange parameters.

Every symmetry of `symmetry.py` at once, drawn at random. What such a twin differs in from its
original is what harmonizing takes away, so a model and its twin show whether it does.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from symphony_moe.building.companions import write_json
from symphony_moe.errors import RecipeError, RunFolderError
from symphony_moe.files import publish, sync_folder
from symphony_moe.model.checkpoint import BYTES, CheckpointWriter
from symphony_moe.model.families import EMBEDDING, FINAL_NORM, HEAD
from symphony_moe.model.symmetry import (
    gain_of,
    neutral_gain,
    random_heads,
    random_neurons,
    random_residual,
    transform_embedding,
    transform_head,
    transform_layer,
)
from symphony_moe.recipe.settings import SourceSpec
from symphony_moe.sources.opening import expected_shapes, open_source
from symphony_moe.sources.source import GENERATION, TABLE_ROWS, Source
from symphony_moe.sources.source_tokenizer import tokenizer_paths

_SHARD_BYTES = 5_000_000_000


def scramble(source_folder: Path, out: Path, *, seed: int, dtype: str = "float32") -> Path:
    """Write a scrambled twin of a dense checkpoint to the folder `out`, and return it.

    The twin is of the same architecture with an untied head (the final norm's gain is in it) and
    loads in stock transformers. Residual basis, head orders, phases, value rotations, neuron orders
    and signs are drawn from `seed`; gains are folded. In memory: one layer, and copies of it.
    Raises SourceError for a checkpoint that `open_source` refuses or whose weights are not finite,
    RunFolderError for an `out` that exists or cannot be made and for a full disk, RecipeError for a
    dtype that is not known or cannot hold the values.
    """
    if out.is_symlink() or out.exists():
        raise RunFolderError(f"{out}: exists; expected a new folder. Choose another or remove it")
    if dtype not in BYTES:
        raise RecipeError(f"dtype {dtype!r}: expected one of {', '.join(BYTES)}")
    folder = source_folder.resolve()
    source = open_source(folder.name, SourceSpec(model=str(folder), data=[]))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{out}: cannot be made: {error}; choose another folder") from None
    # Everything is under a name of its own until it is whole, and config.json comes last.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        staged = Path(work) / "model"
        untied = copy.deepcopy(source.config)
        untied.tie_word_embeddings = False
        with CheckpointWriter(staged, expected_shapes(untied), dtype, _SHARD_BYTES) as writer:
            for name, first_row, tensor in _scrambled(source, seed):
                writer.write(name, tensor, first_row)
            writer.finish()
        others = [GENERATION] if (folder / GENERATION).is_file() else []
        for name in [*tokenizer_paths(folder), *others]:
            (staged / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, staged / name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name in ("torch_dtype", "_name_or_path"):
            config.pop(name, None)
        write_json(staged / "config.json", config | {"dtype": dtype, "tie_word_embeddings": False})
        sync_folder(staged)
        publish(staged, out)
    return out


def _scrambled(source: Source, seed: int) -> Iterator[tuple[str, int, Tensor]]:
    """(name, first row, tensor or rows) of the twin."""
    family, config = source.family, source.config
    generator = torch.Generator().manual_seed(seed)
    residual = random_residual(family, config.hidden_size, generator)
    norm = source.read(FINAL_NORM)
    for first in range(0, config.vocab_size, TABLE_ROWS):
        rows = slice(first, first + TABLE_ROWS)
        yield EMBEDDING, first, transform_embedding(source.read(EMBEDDING, rows), residual)
        head = source.read(source.head_name, rows)
        yield HEAD, first, transform_head(head, gain_of(family, norm), residual)
    yield FINAL_NORM, 0, neutral_gain(family, norm)
    for layer in range(config.num_hidden_layers):
        tensors = transform_layer(
            family,
            config,
            source.read_layer(layer),
            residual=residual,
            heads=random_heads(family, config, generator),
            neurons=random_neurons(config, generator),
        )
        for name in list(tensors):
            yield f"model.layers.{layer}.{name}", 0, tensors.pop(name)
