"""`scripts/gpu_study.py` goes the whole way at toy size on the CPU, and goes on where it was."""

import json
from pathlib import Path
from typing import Any

import pytest

import gpu_study
from gpu_study import Study


def test_a_step_is_done_once_and_only_where_there_is_time(tmp_path: Path) -> None:
    study = Study(tmp_path, gpu_study.TOY, limit=100)
    done: list[str] = []

    def note() -> dict[str, Any]:
        done.append("step")
        return {"value": len(done)}

    assert study.step("method one", note) and study.step("method one", note)
    again = Study(tmp_path, gpu_study.TOY, limit=100)
    assert again.results["method one"]["value"] == 1
    assert again.step("method one", note) and done == ["step"]
    again.results["method one"]["took"] = 90.0  # as long as this, with a fifth more, is too long
    assert not again.step("method two", note)
    assert "method two" not in again.results


def test_a_step_that_fails_is_noted_and_the_next_is_done(tmp_path: Path) -> None:
    study = Study(tmp_path, gpu_study.TOY, limit=1000)

    def fail() -> dict[str, Any]:
        raise ValueError("no such method")

    assert study.step("method one", fail)
    assert study.step("method two", lambda: {})
    noted = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert "no such method" in noted["method one"]["failed"]
    assert "no such method" in gpu_study.page(study) and "failed" not in noted["method two"]
    assert study.step("method one", lambda: {}) and study.is_done("method one")


@pytest.mark.slow
def test_the_study_goes_the_whole_way_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two calls on two machines: the second is given the results of the first alone, and has to
    train the models again. (This process runs tests already, so the tests are left out.)"""
    monkeypatch.setattr(gpu_study, "run_tests", lambda: {"code": 0, "said": "none"})
    monkeypatch.setattr(gpu_study, "SECONDS", dict.fromkeys(gpu_study.SECONDS, 1e-6))
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(gpu_study, "PRESETS", dict.fromkeys(["symphony"]))
    gpu_study.main(["--out", str(first), "--toy"])
    second.mkdir()
    (first / "results.json").rename(second / "results.json")
    monkeypatch.setattr(gpu_study, "PRESETS", dict.fromkeys(["symphony", "harmonized", "bam"]))
    gpu_study.main(["--out", str(second), "--toy"])
    results = json.loads((second / "results.json").read_text(encoding="utf-8"))
    assert not [name for name, of in results.items() if "failed" in of]
    for method in ("symphony", "harmonized", "bam"):
        losses = results[f"method {method}"]["losses"]
        assert set(losses["built"]) == set(losses["trained"]) == set(gpu_study.DOMAINS)
    page = (second / "study.md").read_text(encoding="utf-8")
    assert "| harmonized, trained |" in page and "use of the device" in page
    assert sum(f.stat().st_size for f in second.iterdir() if f.is_file()) < 1_000_000
