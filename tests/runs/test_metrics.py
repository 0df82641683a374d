"""What is read of `metrics.json` is what was written; older files are read as well."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from symphony_moe.errors import RunFolderError
from symphony_moe.files import to_json
from symphony_moe.runs.folder import RunFolder
from symphony_moe.runs.metrics import Metrics, Timing, read_metrics, tasks_of

ERROR = {"error": [0.5, 0.4], "kept": True}


def as_file(metrics: Metrics) -> Any:
    return json.loads(to_json(metrics.to_json()))


def test_a_builds_metrics_are_written_as_they_were_read(built: Callable[[str], RunFolder]) -> None:
    run = built("llama")
    content = json.loads(run.metrics.read_text())
    assert as_file(read_metrics(run)) == content
    assert read_metrics(run).alignment["neurons"].keys() <= {"a", "b", "c"}


def test_every_part_is_written_as_it_was_read() -> None:
    task = {"acc": 0.5, "acc_stderr": 0.1, "fewshot": None, "samples": 3, "chat_template": True}
    layer = {"attention": ERROR | {"condition": {"o": 2.0}}, "routing": {"share": {"a": 0.5}}}
    content = {
        "alignment": {"heads": {"b": {"before": [0.5, None], "after": [0.25], "used": False}}},
        "fit": {"layers": [layer], "head": {"closed form": ERROR}, "chosen": "plain mean"},
        "sources": {"a": {"a": 1.0, "b": None}},
        "built": {"a": 2.0},
        "training": {
            "tokens": 10,
            "curve": [{"step": 1, "tokens": 5.0, "loss": None, "share/a": 0.5}],
            "settings": {"tokens": 10, "report_to": "none"},
            "seconds": 2.5,
        },
        "tasks": {"built": {"mmlu": task}},
        "timing": {"build_seconds": 1.5, "calibration_tokens": 3, "other_seconds": 1},
        "held_out": {"text": "abc"},
        "of_a_later_version": {"x": [1]},
    }
    assert as_file(Metrics.model_validate(content)) == content


def test_numbers_that_are_none_are_nan() -> None:
    metrics = Metrics.model_validate(
        {"built": {"a": None, "b": math.inf}, "fit": {"loss": {"harmonized": None}}}
    )
    assert math.isnan(metrics.built["a"]) and metrics.built["b"] == math.inf
    assert metrics.fit is not None and math.isnan(metrics.fit.loss["harmonized"])
    assert as_file(metrics)["built"] == {"a": None, "b": None}


def test_a_file_of_version_0_1_has_todays_names() -> None:
    metrics = Metrics.model_validate(
        {
            "refit": {
                "layers": [{"attention": ERROR | {"condition": 3.0}}],
                "head": {"closed form": ERROR, "softened": ERROR | {"temperature": 1.25}},
            },
            "training": {
                "softened": {"temperature": 1.5, "loss": [2.0, 2.1]},
                "settings": {"soften": 0.1, "tokens": 5},
            },
        }
    )
    assert metrics.fit is not None and metrics.training is not None
    assert list(metrics.fit.head) == ["closed form", "temperature_scaling"]
    assert metrics.fit.head["temperature_scaling"].temperature == 1.25
    assert metrics.fit.layers[0].steps["attention"].condition == {"attention": 3.0}
    assert metrics.fit.layers[0].steps["attention"].ridge is None
    assert metrics.training.temperature_scaling is not None
    assert metrics.training.temperature_scaling.temperature == 1.5
    assert metrics.training.settings == {"temperature_scaling": 0.1, "tokens": 5}


@pytest.mark.parametrize("key", ["fit", "training", "timing", "held_out"])
@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_part_is_an_absent_part(key: str, value: Any) -> None:
    assert getattr(Metrics.model_validate({key: value}), key) is None


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"built": {"a": "low"}}, "built.a"),
        ({"fit": {"layers": [{"attention": {"error": [1.0]}}]}}, "fit.layers.0.attention.error"),
        ({"training": {"curve": [{"loss": 1.0}]}}, "training.curve.0.tokens"),
        ({"routing": {"built": 5}}, "routing.built"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(
    content: dict[str, Any], where: str, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text(json.dumps({"alignment": {}, "timing": {}} | content))
    with pytest.raises(RunFolderError, match=rf"metrics\.json: damaged.*{where}") as caught:
        read_metrics(run)
    assert len(str(caught.value)) < 500


def test_scores_are_told_from_how_they_were_measured() -> None:
    result = tasks_of(
        {"built": {"mmlu": {"acc": 0.5, "acc_stderr": 0.1, "f1": None, "fewshot": 5}}}
    )
    assert result["built"]["mmlu"].scores == {"acc": (0.5, 0.1), "f1": (None, None)}
    assert result["built"]["mmlu"].way[0] == 5


def test_a_time_is_added_to_those_that_are_there() -> None:
    timing = Timing(build_seconds=1.5).model_copy(update={"evaluate_seconds": 2.0})
    assert timing.to_json() == {"build_seconds": 1.5, "evaluate_seconds": 2.0}
