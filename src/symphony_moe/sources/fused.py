"""Checkpoints of families that are another one with fused matrices, read as that one's.

A fused matrix has its parts below one another, so that each of them is some of its rows: nothing is
copied, and a part is read from its place in the file. Rows of q and k whose heads are turned in
part are read in another order.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from transformers import CONFIG_MAPPING, PreTrainedConfig

from symphony_moe.errors import SourceError
from symphony_moe.model.families import K_PROJ, Q_PROJ, Alias, TurnedPart
from symphony_moe.sources.source import DTYPES, Header

Shapes = Mapping[str, tuple[int, ...]]


def config_read_as(alias: Alias, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the family that a source is read as."""
    found: PreTrainedConfig = CONFIG_MAPPING[alias.read_as](**alias.settings(config))
    return found


def with_turned(headers: Mapping[str, Header], turned: TurnedPart | None) -> dict[str, Header]:
    """The headers, those of q and k with what RoPE turns of their heads."""
    moved = (Q_PROJ, K_PROJ) if turned is not None else ()
    return {
        name: replace(header, turned=turned) if name.endswith(moved) else header
        for name, header in headers.items()
    }


def split_headers(
    name: str, alias: Alias, headers: Mapping[str, Header], shapes: Shapes
) -> dict[str, Header]:
    """The headers with each fused matrix in its parts, which keep its name in the file (`stored`).
    `shapes`: those of the family that it is read as.

    Raises SourceError for a fused matrix that is not as large as its parts are together.
    """
    found: dict[str, Header] = {}
    for tensor, header in headers.items():
        end = next((end for end in alias.fused if tensor.endswith("." + end)), None)
        prefix = "" if end is None else tensor.removesuffix(end)
        parts = [] if end is None else [prefix + part for part in alias.fused[end]]
        if not parts or any(part not in shapes for part in parts):
            found[tensor] = header  # one that is not fused, or that the model does not have
            continue
        expected = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
        if header.shape != expected:
            raise SourceError(
                f"{name}: {tensor} is {list(header.shape)} in {header.file}, its config.json says "
                f"{list(expected)}"
            )
        found |= _parts_of(header, tensor, {part: shapes[part] for part in parts})
    return found


def _parts_of(header: Header, tensor: str, shapes: Shapes) -> dict[str, Header]:
    """Each part's header, in the order of its rows."""
    found, first = {}, 0
    # Of a dtype that is not read, no byte is looked for.
    size = DTYPES[header.dtype].itemsize if header.dtype in DTYPES else 0
    for part, shape in shapes.items():
        offset = None if header.offset is None else header.offset + first * size
        found[part] = replace(header, shape=shape, stored=header.stored or tensor, offset=offset)
        first += math.prod(shape)
    return found
