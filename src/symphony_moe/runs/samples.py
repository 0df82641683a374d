"""`samples.json`: short held-out texts, token by token, with each layer's first choice of expert.

It stands beside `metrics.json`, because it holds text: whoever passes numbers on need not pass text
on.
"""

from pydantic import ValidationError, model_validator

from symphony_moe.runs.folder import RunFolder, damaged
from symphony_moe.runs.metrics import Part, Real


class Choices(Part):
    """What a model's routers say of each token of a text."""

    experts: list[list[int]]
    """Layer -> token -> the expert with the highest probability, by its number."""
    probabilities: list[list[Real]]
    """Layer -> token -> that expert's probability."""
    mean_experts: list[int]
    """Token -> the expert whose mean probability over the layers is highest."""
    mean_probabilities: list[Real]
    """Token -> that mean."""

    @property
    def rows(self) -> list[tuple[list[int], list[float]]]:
        """The means, then the layers: (token -> expert, token -> probability)."""
        return [
            (self.mean_experts, self.mean_probabilities),
            *zip(self.experts, self.probabilities, strict=True),
        ]


class Sample(Part):
    """The beginning of a held-out document."""

    tokens: list[str]
    """As text. The bytes of a character that is several tokens stand at its last one."""
    choices: dict[str, Choices]
    """Stage -> what that model's routers say."""

    @model_validator(mode="after")
    def _one_choice_a_token(self) -> "Sample":
        for stage, choices in self.choices.items():
            if len(choices.experts) != len(choices.probabilities):
                raise ValueError(f"{stage}: experts and probabilities are not of the same layers")
            for experts, probabilities in choices.rows:
                if not len(experts) == len(probabilities) == len(self.tokens):
                    raise ValueError(f"{stage}: not one expert for each of {len(self.tokens)}")
        return self


class Samples(Part):
    """All of a run's samples."""

    experts: list[str]
    """Names of the experts, by their numbers."""
    layers: list[int] | None = None
    """The numbers of the layers that have experts. None: all have."""
    domains: dict[str, list[Sample]]
    """Domain -> its samples."""

    @model_validator(mode="after")
    def _one_shape(self) -> "Samples":
        shapes = {
            tuple((stage, len(choices.experts)) for stage, choices in sample.choices.items())
            for samples in self.domains.values()
            for sample in samples
        }
        if len(shapes) > 1:
            raise ValueError("samples are of different stages or numbers of layers")
        return self

    @model_validator(mode="after")
    def _known_experts(self) -> "Samples":
        known = range(len(self.experts))
        for domain, samples in self.domains.items():
            found = {
                expert
                for sample in samples
                for choices in sample.choices.values()
                for experts, _ in choices.rows
                for expert in experts
            }
            if not all(expert in known for expert in found):
                raise ValueError(f"{domain}: an expert's number is beyond {len(self.experts)}")
        return self


def read_samples(run: RunFolder) -> Samples | None:
    """A run's samples; None where it has none. Raises RunFolderError where the file is damaged."""
    if not run.samples.is_file():
        return None
    try:
        return Samples.model_validate(run.read_json(run.samples))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(run.samples, f"{where}: {first['msg']}") from None
