"""Calibration text through the sources, one layer at a time, keeping statistics and no activations.

A layer advances the sources' residual streams in place, batch by batch, and hands what passes
inside it to the accumulators of `align.py`.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from symphony_moe.errors import TextError
from symphony_moe.model.families import EMBEDDING
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.source import Source
from symphony_moe.text.documents import Documents, read_documents, split_aside, split_held_out
from symphony_moe.text.windows import Packed, draw_packed

_ASIDE_DOCUMENTS = 1 / 8
"""Share of a source's documents that a fit is judged by."""


def calibration_windows(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Packed]:
    """Source -> calibration text of its domain (Sec. 3.2), for those that give some: the same
    number of tokens each, held-out documents left out, and where something is fitted, those of
    `aside_windows`."""
    windows = {}
    for source in [source for source in sources if source.name in recipe.calibration_domains]:
        wanted = max(1, recipe.windows_each - recipe.windows_aside)
        fitted, _ = _documents(recipe, source)
        windows[source.name] = _draw(recipe, source, "calibration text", fitted, wanted)
    return windows


def aside_windows(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Packed]:
    """Source -> text of its domain that a fit is judged by: of documents of their own.

    Raises TextError where a source has a single document.
    """
    windows = {}
    for source in sources:
        _, aside = _documents(recipe, source)
        if not aside:
            raise TextError(
                f"calibration text of {source.name}: a single document; a fit is judged by "
                "documents that it has not seen, so give text in several (or fit.method: none "
                "and router.init: random)"
            )
        what = "calibration text kept aside (an eighth of the documents)"
        windows[source.name] = _draw(recipe, source, what, aside, recipe.windows_aside)
    return windows


def _documents(recipe: Recipe, source: Source) -> tuple[Documents, Documents]:
    """(to fit on, to judge a fit by); where nothing is fitted, the former are all."""
    spec = recipe.sources[source.name]
    who = f"calibration text of {source.name}"
    documents: Documents = read_documents(
        who, spec.data, spec.column, source.own_tokenizer, recipe.chat_rules(source.name)
    )
    documents, _ = split_held_out(documents, recipe.evaluation.holdout)
    return split_aside(documents, _ASIDE_DOCUMENTS) if recipe.fits else (documents, [])


def _draw(recipe: Recipe, source: Source, what: str, documents: Documents, windows: int) -> Packed:
    length = recipe.calibration.sequence_length
    return draw_packed(
        f"{what} of {source.name}",
        documents,
        source.encoder,
        tokens=windows * length,
        sequence_length=length,
        seed=recipe.calibration.seed,
    )


def embedding_blocks(source: Source) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a source's own token embeddings."""
    yield from source.table(EMBEDDING)
