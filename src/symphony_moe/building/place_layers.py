"""Where the layers of a shallower source belong: beside those of the deepest source whose residual
streams are most alike on calibration text.

What makes streams alike is linear CKA (Kornblith et al. 2019, Eq. 3), which knows neither basis nor
width; the order is kept by dynamic programming (`sources.shapes.match_layers`).
"""

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from symphony_moe.building.statistics import unit_vectors
from symphony_moe.errors import SourceError
from symphony_moe.model.families import EMBEDDING
from symphony_moe.model.layer import load_dense_layer, run_layer
from symphony_moe.model.streams import Streams, Windows
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.shapes import deepest, match_layers, shallow
from symphony_moe.sources.source import Source

log = logging.getLogger(__name__)

TOKENS = 1024
"""Tokens whose streams are compared, of all domains together: similarities of all pairs of them are
in memory, for every layer of two sources."""

WINDOWS_PER_DOMAIN = 4
"""Windows of each domain that the sources are run on."""


def place_layers(
    recipe: Recipe, sources: Sequence[Source], text: Sequence[Windows]
) -> dict[str, list[int | None]]:
    """Source -> its `layers`, of those that have fewer than the deepest and no place in the recipe.
    `text`: of each domain; where there is none, the layers are placed evenly. Raises SourceError
    for streams that are not finite."""
    missing = {s.name: s for s in shallow(recipe, sources)}
    if not text:
        return {n: list(s.widening.layers) for n, s in missing.items() if s.widening is not None}
    reference = deepest(recipe, sources)
    some = torch.cat([windows[:WINDOWS_PER_DOMAIN] for windows in text])
    similarities = stream_similarities(reference, some)
    found = {}
    for source in (each.as_stored for each in missing.values()):
        alike = cka_of_streams(stream_similarities(source, some), similarities)
        layers = match_layers(source.config, reference.config, alike)
        assert layers is not None  # there is an even order: the source was opened with it
        found[source.name] = list(layers)
        places = " ".join("-" if at is None else str(at) for at in layers)
        log.info("%s: layers among %s's: %s", source.name, reference.name, places)
    return found


@torch.inference_mode()
def stream_similarities(source: Source, text: Windows) -> list[Float[Tensor, "tokens tokens"]]:
    """After each number of a source's layers, 0 included: how alike every two of TOKENS tokens are,
    spread evenly over the text. Products of their streams, each stream of length one, about the
    mean of all; the matrix divided by its Frobenius norm."""
    streams = Streams()
    streams.embed({source.name: text}, source.config, source.table(EMBEDDING))
    count = min(TOKENS, text.numel())
    tokens = torch.linspace(0, text.numel() - 1, count).round().long()

    def gram() -> Tensor:
        stream = streams[source.name].flatten(0, 1)
        rows = unit_vectors(stream[tokens.to(stream.device)].cpu().double())
        rows = rows - rows.mean(dim=0)
        product = rows @ rows.T
        if not bool(torch.isfinite(product).all()):
            raise SourceError(
                f"{source.name} puts out values that are NaN or infinite on the calibration text; "
                "the weights are damaged or overflow float32"
            )
        result: Tensor = product / torch.linalg.norm(product).clamp_min(1e-300)
        return result.float()

    found = [gram()]
    for layer in range(source.config.num_hidden_layers):
        model = load_dense_layer(source.config, layer, source.read_layer(layer))
        for stream in streams.batches(source.name):
            stream.copy_(run_layer(model, stream))
        found.append(gram())
    return found


def cka_of_streams(
    one: Sequence[Float[Tensor, "tokens tokens"]], other: Sequence[Float[Tensor, "tokens tokens"]]
) -> Float[Tensor, "places other_places"]:
    """Linear CKA of every two streams of two sources (see `stream_similarities`)."""
    first, second = (torch.stack(list(each)).flatten(1) for each in (one, other))
    return first @ second.T
