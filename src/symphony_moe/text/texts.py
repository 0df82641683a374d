"""The text of one command: what it calibrates, validates, trains and evaluates on.

Every domain's documents are read, split and tokenised once (`Domain`). Which of them are for what:

    documents -> held out                                            held_out_text
              -> to train on (training_text) -> of a fit: fitted on  calibration_windows
                                             -> validated by         validation_windows

With `train.keep_best` or `train.average`, documents that validate a fit validate the training too
(training_validation), and are not trained on.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from symphony_moe.errors import TextError
from symphony_moe.recipe.settings import Recipe
from symphony_moe.text.documents import Documents
from symphony_moe.text.domain import Domain, DomainReading, Room
from symphony_moe.text.memory_maps import TrainingText
from symphony_moe.text.windows import Encoder, Packed, Pieces, WindowDraw, draw_packed, draw_pieces

log = logging.getLogger(__name__)

_VALIDATION_TOKENS = 65_536
"""Tokens that a training is validated by each time, at most."""

KEPT_BYTES = 2**25
"""Bytes of documents and their tokens that are kept for the next use, all domains together. What
does not fit is read and tokenised again."""


@runtime_checkable
class Tokenizes(Protocol):
    """What is asked of a source."""

    @property
    def name(self) -> str:
        """The domain whose text it reads."""
        ...

    @property
    def own_tokenizer(self) -> PreTrainedTokenizerBase:
        """Spells the chats of its own text."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Makes tokens of text for all sources."""

    @property
    def encoder(self) -> Encoder:
        """Makes tokens of its documents."""


class Texts:
    """The text of one command, by domain. Nothing is read before it is asked for.

    Up to KEPT_BYTES of documents and tokens stay in memory between two uses. Windows do not: they
    are drawn anew, always the same.
    """

    def __init__(self, recipe: Recipe, sources: Sequence[Tokenizes]) -> None:
        """`sources`: opened from the recipe. Their tokenizers are used, and none of their
        weights."""
        self.recipe = recipe
        self._sources = {source.name: source for source in sources}
        self._domains: dict[str, Domain] = {}
        self._room = Room(KEPT_BYTES)

    @classmethod
    def of(
        cls, recipe: Recipe, sources: Sequence[Tokenizes], texts: "Texts | None" = None
    ) -> "Texts":
        """`texts`, where they were opened for this recipe (whatever hashes it pins its sources to);
        otherwise new ones."""
        if texts is not None and texts.recipe.builds_the_same(recipe):
            return texts
        return cls(recipe, sources)

    def refuse_unreadable(self) -> None:
        """Raise TextError for a file of any domain whose first row cannot be read. No more of it is
        read, and nothing of the hub."""
        for name in (*self._sources, *self.recipe.evaluation.extra):
            self._domain(name).refuse_unreadable(f"text of {name}")

    def held_out_text(self) -> dict[str, Pieces]:
        """Domain -> held-out text: the sources' domains, then the extra ones. All of an extra
        domain's documents are evaluated on, as none is trained on.

        Raises TextError for a domain without held-out text.
        """
        settings = self.recipe.evaluation
        seed = self.recipe.seed if settings.seed is None else settings.seed
        drawing = WindowDraw(settings.tokens, settings.sequence_length, seed)
        pieces = {}
        for name in (*self._sources, *settings.extra):
            who, domain = f"held-out text of {name}", self._domain(name)
            pieces[name] = draw_pieces(who, domain.sides(who).held_out, domain, drawing)
        return pieces

    def calibration_windows(self) -> dict[str, Packed]:
        """Source -> calibration text of its domain (Sec. 3.2), for those that give some: the same
        number of tokens each. Held-out documents are left out, and where something is fitted, those
        of `validation_windows`.

        Raises TextError for a source whose text does not fill a window.
        """
        recipe = self.recipe
        drawing = self._of_a_fit(
            max(1, recipe.windows_each - recipe.validation_windows),
            covers=recipe.calibration.windows == "coverage",
        )
        windows = {}
        for name in self._sources:
            if name in recipe.calibration_domains:
                who, domain = f"calibration text of {name}", self._domain(name)
                sides = domain.sides(who)
                documents = sides.of_fit[0] if recipe.fits else sides.training
                windows[name] = draw_packed(who, documents, domain, drawing)
        return windows

    def validation_windows(self) -> dict[str, Packed]:
        """Expert's source -> text of its domain that a fit is validated by, of documents of their
        own; nothing where nothing is fitted.

        Raises TextError where a source has a single document.
        """
        windows: dict[str, Packed] = {}
        if not self.recipe.fits:
            return windows
        for name in self._sources:
            if name not in self.recipe.expert_names:
                continue
            who, domain = f"calibration text of {name}", self._domain(name)
            documents = _validating(
                who,
                domain,
                "a fit is validated by documents that it has not seen, so give text in several "
                "(or fit.method: none and router.init: random)",
            )
            drawing = self._of_a_fit(self.recipe.validation_windows)
            windows[name] = draw_packed(_validates(name), documents, domain, drawing)
        return windows

    def training_validation(self) -> dict[str, Pieces]:
        """Source -> documents that a training is validated by (`train.keep_best`, `train.average`),
        and that are not trained on: equal shares. They are read as held-out documents are, each on
        its own: packed windows are what a training gets better at even where documents by
        themselves lose.

        Raises TextError for a source that has a single document, or too little for a window.
        """
        recipe, length = self.recipe, self.recipe.train.sequence_length
        share = validation_windows_per_source(recipe, len(self._sources))
        drawing = WindowDraw(share * length, length, recipe.seed)
        pieces = {}
        for name in self._sources:
            who, domain = f"training text of {name}", self._domain(name)
            documents = _validating(
                who,
                domain,
                f"{_asks(recipe, ', ')}: models are compared on documents that are not trained on, "
                f"so give text in several, or set {_asks(recipe, ': false, ')}: false",
            )
            pieces[name] = draw_pieces(_validates(name), documents, domain, drawing)
        return pieces

    def training_text(self, folder: Path) -> TrainingText:
        """Equal shares of every source's text, shuffled together. Text that is shorter than its
        share is repeated, each time in a new order. `folder`: where large text is kept.

        Raises TextError for a source whose text does not fill a window.
        """
        recipe, length = self.recipe, self.recipe.train.sequence_length
        share = windows_per_source(recipe, len(self._sources))
        drawing = WindowDraw(share * length, length, recipe.seed)
        generator = torch.Generator().manual_seed(recipe.seed)
        parts, rows = [], []
        for name in self._sources:
            who = f"training text of {name}"
            part = self._domain(name).training_windows(
                who, drawing, folder, is_validated=recipe.train.is_validated
            )
            repeats = math.ceil(share / len(part))
            if repeats > 1:
                log.warning("%s: repeated %.1f times", who, share / len(part))
            orders = [torch.randperm(len(part), generator=generator) for _ in range(repeats)]
            parts.append(part)
            rows.append(torch.cat(orders)[:share])
        order = torch.randperm(share * len(parts), generator=generator)
        owners = torch.arange(len(parts)).repeat_interleave(share)
        return TrainingText(parts, owners[order], torch.cat(rows)[order])

    def refuse_short_training_text(self) -> None:
        """TextError where a source's text does not fill one window of `train.sequence_length`, or
        where a training is validated, that of `training_validation` does not."""
        length, is_validated = self.recipe.train.sequence_length, self.recipe.train.is_validated
        if is_validated:
            self.training_validation()
        for name in self._sources:
            who, domain = f"training text of {name}", self._domain(name)
            drawing = WindowDraw(length, length, self.recipe.seed)
            documents = domain.sides(who).trained_on(is_validated=is_validated)
            draw_packed(who, documents, domain, drawing)

    def _of_a_fit(self, windows: int, *, covers: bool = False) -> WindowDraw:
        settings = self.recipe.calibration
        length = settings.sequence_length
        return WindowDraw(windows * length, length, settings.seed, covers)

    def _domain(self, name: str) -> Domain:
        if name not in self._domains:
            self._domains[name] = self._opened(name)
        return self._domains[name]

    def _opened(self, name: str) -> Domain:
        recipe = self.recipe
        rules = recipe.chat_rules(name)
        if name in self._sources:
            spec, source = recipe.sources[name], self._sources[name]
            reading = DomainReading(spec.data, spec.column, source.own_tokenizer, rules)
            return Domain(reading, source.encoder, recipe.evaluation.holdout, self._room)
        # Text of no source is spelled and begun as the anchor does it.
        anchor = self._sources[recipe.anchor]
        reading = DomainReading(recipe.evaluation.extra[name], "text", anchor.tokenizer, rules)
        return Domain(reading, anchor.encoder, 1.0, self._room)


def _validating(who: str, domain: Domain, why: str) -> Documents:
    """A domain's documents that a fit or a training is validated by. TextError, with why it needs
    them, where there is none."""
    _, documents = domain.sides(who).of_fit
    if not documents:
        raise TextError(f"{who}: a single document; {why}")
    return documents


def _asks(recipe: Recipe, between: str) -> str:
    """The settings that ask for validation text."""
    names = (name for name in ("keep_best", "average") if getattr(recipe.train, name))
    return between.join(f"train.{name}" for name in names)


def _validates(name: str) -> str:
    """Names a source's validation text in errors and warnings."""
    return f"validation text (an eighth of the documents) of {name}"


def windows_per_source(recipe: Recipe, num_sources: int) -> int:
    """Each source's share of the text to train on, in windows."""
    return max(1, recipe.train.tokens // recipe.train.sequence_length // num_sources)


def validation_windows_per_source(recipe: Recipe, num_sources: int) -> int:
    """Each source's share of the text that a training is validated by, in windows: one at least.
    All measurements together read an eighth as many tokens as are trained on, or fewer."""
    settings = recipe.train
    measurements = settings.checkpoints + 1  # the first is before training
    tokens = min(settings.tokens // (8 * measurements), _VALIDATION_TOKENS)
    return max(1, tokens // settings.sequence_length // num_sources)
