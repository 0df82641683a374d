"""Held-out texts, coloured by the expert that each token prefers."""

import math
from dataclasses import dataclass

from symphony_moe.reporting.numbers import MISSING
from symphony_moe.reporting.strips import expert_colour
from symphony_moe.runs.metrics import STAGES
from symphony_moe.runs.samples import Choices, Sample, Samples

_SHOWN = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n", "\t": "\N{RIGHTWARDS ARROW}\t"}
"""Signs for what is not seen otherwise."""

_NOTHING = "\N{MIDDLE DOT}"
"""A token that is a part of a character."""


@dataclass(frozen=True)
class Token:
    """A token as it is shown at first: by the mean over layers of the last stage."""

    text: str
    colour: str
    by: int
    """Probability in per cent."""
    title: str
    choices: list[tuple[str, str]]
    """(stage, expert:probability of the mean and of each layer), which the page's script reads"""


@dataclass(frozen=True)
class Text:
    """One document's beginning."""

    tokens: list[Token]


@dataclass(frozen=True)
class ColouredText:
    """All of it, and what can be chosen."""

    stages: list[str]
    experts: list[tuple[str, str]]
    """(name, classes of its colour)"""
    layers: list[int]
    """The numbers of those that have experts."""
    domains: list[tuple[str, list[Text]]]

    @property
    def shown(self) -> str:
        """The stage that is shown at first."""
        return self.stages[-1]


def coloured_text(samples: Samples | None) -> ColouredText | None:
    """The samples as a page shows them. None where there are none."""
    if samples is None:
        return None
    every = [sample for of_domain in samples.domains.values() for sample in of_domain]
    stages = [stage for stage in STAGES if any(stage in sample.choices for sample in every)]
    if not stages:
        return None
    count = max(len(sample.choices[stages[-1]].experts) for sample in every)
    return ColouredText(
        stages,
        [(name, expert_colour(number)) for number, name in enumerate(samples.experts)],
        samples.layers or list(range(count)),
        [
            (domain, [_text(sample, stages, samples.experts) for sample in of_domain])
            for domain, of_domain in samples.domains.items()
        ],
    )


def _text(sample: Sample, stages: list[str], experts: list[str]) -> Text:
    shown = sample.choices[stages[-1]]
    packed = {stage: _packed(sample.choices[stage]) for stage in stages}
    means = zip(shown.mean_experts, shown.mean_probabilities, strict=True)
    return Text(
        [
            Token(
                text=shown_text(text),
                colour=expert_colour(expert),
                by=_per_cent(probability),
                title=f"{experts[expert]} {_words(probability)}, mean over layers",
                choices=[(stage, packed[stage][place]) for stage in stages],
            )
            for place, (text, (expert, probability)) in enumerate(
                zip(sample.tokens, means, strict=True)
            )
        ]
    )


def shown_text(token: str) -> str:
    """A token so that all of it is seen."""
    return "".join(_SHOWN.get(letter, letter) for letter in token) or _NOTHING


def _packed(choices: Choices) -> list[str]:
    """For each token `expert:per cent` of the mean and of each layer."""
    rows = [
        [f"{expert}:{_per_cent(p)}" for expert, p in zip(experts, probabilities, strict=True)]
        for experts, probabilities in choices.rows
    ]
    return [" ".join(of_token) for of_token in zip(*rows, strict=True)]


def _per_cent(probability: float) -> int:
    return round(100 * probability) if math.isfinite(probability) else 0


def _words(probability: float) -> str:
    return f"{100 * probability:.0f} %" if math.isfinite(probability) else MISSING
