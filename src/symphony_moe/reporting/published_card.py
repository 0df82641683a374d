"""The model card as it goes to the hub: the checkpoint's own, with what was measured since.

Losses are in a table. Those on a dataset of the hub are in the metadata too (`model-index`), as
perplexities, which the hub has a name for: it asks each result for the dataset's id, and text in
local files has none.
"""

import math
from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from symphony_moe.model.loading import with_model_named
from symphony_moe.recipe.settings import Data, HubData, Recipe
from symphony_moe.runs.metrics import STAGES, Metrics

_LARGEST = 100.0
"""Losses beyond have no perplexity that says anything; nor has NaN."""


def published_card(card: str, repo_id: str, stage: str, recipe: Recipe, metrics: Metrics) -> str:
    """The card of a model under its name on the hub. `card`: README.md of the folder; `stage`: the
    model in it, one of `STAGES`.

    Raises ValueError for a card whose metadata cannot be read.
    """
    published = ModelCard(with_model_named(card, repo_id))
    published.text = published.text.rstrip() + "\n" + _measured(stage, recipe, metrics)
    results = _results(recipe, metrics.models.get(stage, {}))
    if results:
        name = repo_id.partition("/")[2]
        published.data["model-index"] = eval_results_to_model_index(name, results)
    return str(published)


def _measured(stage: str, recipe: Recipe, metrics: Metrics) -> str:
    """What is known of a model and of those before it, as a part of the card."""
    stages = STAGES[: STAGES.index(stage) + 1]
    losses = dict(metrics.sources)
    losses |= {name: of for name, of in metrics.models.items() if name in stages}
    if stage not in losses:
        return "\n## Evaluation\n\nNot evaluated.\n"
    domains = list(losses[stage])
    rows = [[name, *(_number(of.get(domain)) for domain in domains)] for name, of in losses.items()]
    outside = [f"`{domain}`" for domain in domains if domain not in recipe.sources]
    notes = f" Text of {', '.join(outside)} is evaluated only." if outside else ""
    return (
        "\n## Evaluation\n\nLosses on held-out documents, in nats per token, by the text's "
        f"domain. Lower is better.{notes}\n\n{_table(['model', *domains], rows)}"
        f"{_benchmarks(stages, metrics)}"
    )


def _benchmarks(stages: tuple[str, ...], metrics: Metrics) -> str:
    rows = [
        [stage, task, metric, _with_error(*score)]
        for stage in stages
        for task, result in metrics.tasks.get(stage, {}).items()
        for metric, score in result.scores.items()
    ]
    if not rows:
        return ""
    table = _table(["model", "task", "metric", "value"], rows)
    return f"\nBenchmarks of lm-evaluation-harness:\n\n{table}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _with_error(value: float | None, error: float | None) -> str:
    known = error is not None and math.isfinite(error)
    return f"{_number(value)} ± {_number(error)}" if known else _number(value)


def _results(recipe: Recipe, losses: Mapping[str, float]) -> list[EvalResult]:
    """What the hub's format holds: perplexities on its own datasets."""
    texts: dict[str, Data] = {name: spec.data for name, spec in recipe.sources.items()}
    texts |= recipe.evaluation.extra
    found = []
    for domain, loss in losses.items():
        data = texts.get(domain)
        if isinstance(data, HubData) and data.is_on_hub and loss < _LARGEST:
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=data.hub,
                    dataset_name=domain,
                    dataset_config=data.name,
                    dataset_split=data.split,
                    dataset_revision=data.revision,
                    metric_type="perplexity",
                    metric_name="perplexity per token, held-out documents",
                    metric_value=round(math.exp(loss), 3),
                )
            )
    return found
