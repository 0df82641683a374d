"""The card that goes to the hub says what was measured, in the hub's own form where that holds
it."""

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from symphony_moe.model.loading import loading_code
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.published_card import published_card
from symphony_moe.runs.metrics import Metrics

OWN = f"""---
library_name: transformers
license: apache-2.0
---

# A model

```python
{loading_code(".", has_chat_template=False)}```
"""
MEASURED: dict[str, Any] = {
    "sources": {"a": {"a": 2.0, "b": None, "far": 4.0}, "b": {"a": 3.0, "b": 2.5, "far": 4.5}},
    "built": {"a": 2.25, "b": 2.75, "far": 4.25},
    "trained": {"a": 2.125, "b": 800.0, "far": 1.0},
    "tasks": {
        "trained": {"arc": {"samples": 10, "acc,none": 0.5, "acc,none_stderr": 0.125}},
        "built": {"arc": {"samples": 10, "acc,none": 0.25, "acc,none_stderr": None}},
    },
}


def recipe(tmp_path: Path) -> Recipe:
    """Text of `a` in a file, of `b` and `far` on the hub."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "sources:\n"
        "  a: {model: /models/a, data: a.txt}\n"
        "  b: {model: /models/b, data: {hub: some/text, split: test, name: small}}\n"
        "evaluation: {extra: {far: {hub: another/text, revision: v1}}}\n"
    )
    return load_recipe(path)


def published(stage: str, tmp_path: Path, measured: Any = MEASURED) -> ModelCard:
    metrics = Metrics.model_validate(measured)
    return ModelCard(published_card(OWN, "some/moe", stage, recipe(tmp_path), metrics))


def test_a_card_has_the_losses_of_its_model_and_of_those_before_it(tmp_path: Path) -> None:
    text = published("trained", tmp_path).text
    assert "| model | a | b | far |\n| --- | --- | --- | --- |\n| a | 2.000 | - | 4.000 |\n" in text
    assert "| built | 2.250 | 2.750 | 4.250 |\n| trained | 2.125 | 800.000 | 1.000 |\n" in text
    assert "| trained | arc | acc,none | 0.500 ± 0.125 |" in text
    assert "Text of `far` is evaluated only." in text
    text = published("built", tmp_path).text
    assert "| built | 2.250 |" in text and "| trained |" not in text
    assert "| built | arc | acc,none | 0.250 |" in text


def test_losses_on_datasets_of_the_hub_are_metadata_too(tmp_path: Path) -> None:
    """As perplexities; text in files has no id that the hub would take, and a loss of 800 no
    perplexity."""
    results = {one.dataset_name: one for one in published("built", tmp_path).data["eval_results"]}
    assert results.keys() == {"b", "far"}
    assert results["b"] == EvalResult(
        task_type="text-generation",
        dataset_type="some/text",
        dataset_name="b",
        dataset_config="small",
        dataset_split="test",
        metric_type="perplexity",
        metric_name="perplexity per token, held-out documents",
        metric_value=round(math.exp(2.75), 3),
    )
    assert results["far"].dataset_revision == "v1"
    (only,) = published("trained", tmp_path).data["eval_results"]
    assert (only.dataset_name, only.metric_value) == ("far", round(math.e, 3))


def test_a_card_says_where_nothing_was_measured(tmp_path: Path) -> None:
    card = published("built", tmp_path, {})
    assert card.text.endswith("## Evaluation\n\nNot evaluated.\n")
    assert "eval_results" not in card.data or card.data["eval_results"] is None


def test_a_published_card_loads_the_model_by_its_name_and_keeps_the_rest(tmp_path: Path) -> None:
    text = str(published("built", tmp_path, {}))
    expected = OWN.replace('name = "."', 'name = "some/moe"')
    assert text.startswith(expected.removesuffix("\n")) and 'name = "."' not in text
