"""What every step of a training is told: which run, by which recipe, and who watches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from symphony_moe.model.families import Family
from symphony_moe.progress import Listener, ignore
from symphony_moe.recipe.settings import Recipe, Train
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.source import Source, anchor_of

Measure = Callable[[PreTrainedModel], dict[str, float]]
"""Model -> domain -> loss on its held-out text, in nats per token."""


@dataclass(frozen=True)
class TrainingJob:
    """One training of one run."""

    run: RunFolder
    recipe: Recipe
    sources: Sequence[Source]
    measure: Measure | None = None
    """For `train.evaluations`."""
    progress: Listener = ignore
    """Hears of every optimizer step."""

    @property
    def settings(self) -> Train:
        """The recipe's `train`."""
        return self.recipe.train

    @property
    def family(self) -> Family:
        """The row of the table that the run was built by."""
        return anchor_of(self.recipe, self.sources).family
