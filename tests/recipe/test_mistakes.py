"""What a recipe's mistakes are called: who, what was expected, what came, what to do."""

from pathlib import Path

import pytest

from symphony_moe.errors import RecipeError
from symphony_moe.recipe.load import load_recipe

RECIPE = """
sources:
  english: {model: models/a, data: a.jsonl}
  python: {model: models/b, data: b.jsonl}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train=3", "train: expected settings, such as {NAME: VALUE} (got 3)"),
        ("evaluation.extra=x", "evaluation.extra: expected settings, such as {NAME: VALUE} (got"),
        ("calibration.tokens=lots", "calibration.tokens: expected a whole number (got 'lots')"),
        ("train.tokens=1.5", "train.tokens: expected a whole number (got 1.5)"),
        ("train.tokens=-1", "train.tokens: expected a number above 0 (got -1)"),
        ("router.top_k=0", "router.top_k: expected a number of 1 or more (got 0)"),
        ("train.warmup=1", "train.warmup: expected a number below 1.0 (got 1)"),
        ("evaluation.thresholds=[2]", "thresholds.0: expected a number of 1 or less (got 2)"),
        ("train.learning_rate=x", "train.learning_rate: expected a number (got 'x')"),
        ("fit.epochs=.inf", "fit.epochs: expected a finite number (got inf)"),
        ("train.keep_best=maybe", "train.keep_best: expected true or false (got 'maybe')"),
        (
            "output.dtype=bf16",
            "expected bfloat16, float16 or float32 (got 'bf16'); did you mean bfloat16?",
        ),
        ("train.scope=zzz", "train.scope: expected router, experts or all (got 'zzz')"),
        ("experts.dense_layers=0", "experts.dense_layers: expected a list, such as [A, B] (got 0)"),
        ("sources.python.model=[1]", "sources.python.model: expected text (got [1])"),
        ("train.report_to=3", "train.report_to: expected a name, or a list of names (got 3)"),
        ("sources.x={model: a}", "sources.x.data is missing"),
        ("compare.seeds=[a]", "compare.seeds.0: expected a whole number (got 'a')"),
        ("anchor=pyton", "'pyton' is no source; there is: english, python; did you mean python?"),
        ("method=harmonised", "upcycling, dume; did you mean harmonized?"),
        ("train.tokenz=1", "unknown setting train.tokenz; did you mean train.tokens?"),
    ],
)
def test_a_mistake_on_the_command_line_is_said_to_be_there(
    setting: str, said: str, recipe: Path
) -> None:
    """In plain words, none of them pydantic's."""
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe, ["seed=3", setting])
    message = str(raised.value)
    assert message.startswith(f"--set {setting}: ") and said in message
    assert "Input" not in message and "valid" not in message and len(message) < 500
    assert message.endswith("?") == ("did you mean" in said)


def test_a_mistake_in_the_file_is_said_to_be_in_the_file(recipe: Path) -> None:
    """Also where another setting is given on the command line."""
    recipe.write_text(f"{RECIPE}train: {{tokens: many, warmup: 2}}\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe, ["train.scope=router"])
    assert str(raised.value) == (
        f"{recipe}: train.tokens: expected a whole number (got 'many'); train.warmup: expected a "
        "number below 1.0 (got 2)"
    )


def test_the_last_of_two_settings_is_named(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--set train\.tokens=y: "):
        load_recipe(recipe, ["train.tokens=5", "train.tokens=y", "train.scope=all"])
