"""Experts that would be the same: LoRAs of one model that leave its FFN as it is.

A router that chooses between equal experts chooses nothing. All of this is known from headers.
"""

from collections.abc import Sequence

from symphony_moe.errors import SourceMismatch, shortened
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.source import Source


def refuse_alike(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raise SourceMismatch where LoRAs make every expert the same, and nothing of the recipe makes
    them differ."""
    if recipe.experts.init != "source" or recipe.fits_layers:
        return
    if recipe.parent is not None:
        _refuse_empty_newcomer(recipe, sources)
        return
    adapted = [source.name for source in sources if source.adapter is not None]
    folders = {source.folder for source in sources}
    if not adapted or len(folders) > 1 or any(source.changes_expert for source in sources):
        return
    # What has q and o in its experts already cannot be told to do so.
    bam = "" if recipe.has_attention_experts else " Or method: bam (Llama, Mistral): q and o too."
    raise SourceMismatch(
        f"the adapters of {shortened(', '.join(adapted), 100)} leave the expert's weights as they "
        f"are ({_parts(sources[0])}), so all experts would be equal to {sources[0].public_name}'s. "
        f"Expected one adapter at least that changes them: a LoRA on the FFN.{bam} "
        "If equal experts are wanted, set method: sparse-upcycling"
    )


def _refuse_empty_newcomer(recipe: Recipe, sources: Sequence[Source]) -> None:
    """SourceMismatch for an expert that is added by a LoRA that changes nothing of it: what else
    the LoRA changes has no place in a backbone that is kept."""
    new = next((source for source in sources if source.name == recipe.newcomer), None)
    if new is not None and new.adapter is not None and not new.changes_expert:
        raise SourceMismatch(
            f"{new.name}: its adapter leaves the expert's weights as they are ({_parts(new)}). All "
            "other weights are the old run's, so nothing of the adapter would be in the result. "
            f"Expected a LoRA on the FFN; or build anew with {new.name} among the sources"
        )


def say_alike(recipe: Recipe, sources: Sequence[Source]) -> list[str]:
    """A sentence for each source whose adapter leaves its expert as the model has it."""
    if recipe.copies_anchor:
        return []
    sentences = []
    for source in sources if recipe.parent is None else ():
        # What changes nothing at all has a sentence of its own.
        if source.adapter is None or source.changes_expert or source.adapter.changes_nothing:
            continue
        begins = recipe.fits_layers or recipe.redraws_neurons
        alike = [
            other.name
            for other in sources
            if other is not source and other.folder == source.folder and not other.changes_expert
        ]
        also = f", as {shortened(', '.join(alike), 100)}'s" if alike and not begins else ""
        sentences.append(
            f"{source.name}: its adapter changes nothing of what an expert keeps "
            f"({_parts(source)}): its expert {'begins as' if begins else 'is'} "
            f"{source.public_name}'s own{also}. What the adapter changes is averaged with the "
            "other sources' (backbone)"
        )
    return sentences


def _parts(source: Source) -> str:
    """The matrices of an expert, as a LoRA's target_modules name them."""
    return ", ".join(name.split(".")[-2] for name in source.family.expert)
