"""`symphony doctor` finds what is broken, says what to do, and never breaks itself."""

import json
import os
import shutil
import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from symphony_moe import doctor
from symphony_moe.cli import main
from symphony_moe.doctor import EXTRAS, Examination, examine

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))[
    "project"
]


@pytest.fixture(autouse=True)
def _hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, without being asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(doctor, "_unreachable", lambda url: None)


def found(name: str, section: str, examination: Examination | None = None) -> doctor.Finding:
    (one,) = (f for f in (examination or examine()).sections[section] if f.name == name)
    return one


def test_everything_is_said_to_people_and_to_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 0 whatever was found."""
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {*examine().sections, "problems"}
    # A CUDA build's own version says which CUDA it is of; its package's does not.
    assert facts["software"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["devices"]["threads"]["torch"] == torch.get_num_threads()
    assert facts["memory"]["memory"]["available_bytes"] <= facts["memory"]["memory"]["total_bytes"]
    assert facts["disk"]["current folder"]["path"] == str(Path.cwd())
    assert facts["hub"]["access"] == {
        "endpoint": "https://huggingface.co",
        "offline": False,
        "reachable": True,
    }
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{section}\n" in f"\n{said}" for section in examine().sections)
    assert said.endswith("no problems\n") is (facts["problems"] == [])
    for extra, purpose in EXTRAS.items():
        assert f"for {purpose}" in said and extra in said


def test_what_pyproject_needs_is_looked_at() -> None:
    """Every dependency with its range, and every extra that is not for developers."""
    from packaging.requirements import Requirement

    listed = {one.name: one.words for one in examine().sections["software"]}
    for text in PROJECT["dependencies"]:
        one = Requirement(text)
        (words,) = (w for n, w in listed.items() if _same(n, one.name))
        assert words.endswith(f"({one.specifier})")
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"]) - {"dev", "pages", "real", "slow"}
    for extra in EXTRAS:
        packages = found(extra, "extras").value["packages"]
        assert len(packages) == len(PROJECT["optional-dependencies"][extra])


def _same(one: str, other: str) -> bool:
    return one.replace("_", "-").replace(".", "-") == other.replace("_", "-").replace(".", "-")


def _versions(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None]) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name not in changed:
            return real(name)
        if (there := changed[name]) is None:
            raise metadata.PackageNotFoundError(name)
        return there

    monkeypatch.setattr(metadata, "version", version)


def test_packages_that_will_not_do_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that mends them. Extras may be missing, but not of another version."""
    _versions(
        monkeypatch, {"torch": "2.0.1", "transformers": "5.24.0rc1", "rich": None, "peft": None}
    )
    problems = examine().problems
    assert "torch 2.0.1 is installed, and >=2.9 is needed: pip install 'torch>=2.9'" in problems
    assert "rich is not installed, and is needed: pip install 'rich>=14'" in problems
    assert not any("peft" in one or "transformers" in one for one in problems)
    adapters = found("adapters", "extras")
    assert adapters.value["installed"] is False and "pip install 'peft>=0.17'" in adapters.words
    _versions(monkeypatch, {"peft": "0.1"})
    assert "peft 0.1 is installed, and >=0.17 is needed" in " ".join(examine().problems)


def test_another_python_and_no_installation_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    assert any(one.startswith("Python 3.9.1 is in use") for one in examine().problems)

    def none(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", none)
    assert any("is not installed as a package" in one for one in examine().problems)


def test_a_token_is_never_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(variable, "hf_very_secret")
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", "https://me:secret@hub.example:8080/x"
    )
    monkeypatch.setattr(doctor, "_unreachable", lambda url: "status 503")
    for words in (["doctor"], ["doctor", "--json"], ["doctor", "-v"]):
        assert main(words) == 0
        out, err = capsys.readouterr()
        assert "secret" not in out + err
    assert found("token", "hub").value is True
    assert found("access", "hub").value["endpoint"] == "https://hub.example:8080"


def test_the_hub_is_not_asked_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(url: str) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(doctor, "_unreachable", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    access = found("access", "hub")
    assert access.value["offline"] is True and access.value["reachable"] is None
    assert access.problem is None and "from the cache alone" in access.words


def test_a_hub_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_unreachable", lambda url: "status 503")
    access = found("access", "hub")
    assert access.value["reachable"] is False
    assert access.problem and "does not answer (status 503)" in access.problem


@contextmanager
def server(status: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{made.server_address[1]}"
        finally:
            made.shutdown()
            thread.join()


@pytest.fixture
def unreachable() -> Any:
    """The function itself, which other tests replace."""
    return _UNREACHABLE


_UNREACHABLE = doctor._unreachable


def test_whether_a_hub_answers_is_known_soon(
    unreachable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that takes the call and says nothing."""
    monkeypatch.setattr(doctor, "_PATIENCE", 0.3)
    for status, reason in ((200, None), (403, None), (503, "status 503"), (407, "status 407")):
        with server(status) as url:
            assert unreachable(url) == reason
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert unreachable(nobody)  # refused
        silent.listen()
        started = time.monotonic()
        assert unreachable(nobody)
        assert time.monotonic() - started < 3


def test_a_full_or_closed_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a folder that is not there yet, by the one that it would be made in."""
    monkeypatch.setenv("SYMPHONY_CACHE", str(tmp_path / "none" / "yet"))
    usage = shutil.disk_usage(tmp_path)
    real = shutil.disk_usage
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: usage._replace(free=5) if path == tmp_path else real(path),
    )
    place = found("converted models", "disk")
    assert place.value["free_bytes"] == 5 and not (tmp_path / "none").exists()
    assert place.problem and "make room, or set SYMPHONY_CACHE" in place.problem
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    place = found("converted models", "disk")
    assert place.value["writable"] is False
    assert place.problem and "cannot be written; set SYMPHONY_CACHE" in place.problem


def test_more_threads_than_cpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(doctor, "_usable_cpus", lambda: 2)
    assert any("set OMP_NUM_THREADS=2" in one for one in examine().problems)
    monkeypatch.setattr(doctor, "_usable_cpus", lambda: 8)
    assert not any("OMP_NUM_THREADS" in one for one in examine().problems)


@pytest.mark.parametrize(
    ("driver", "built_for", "hidden", "said"),
    [
        (None, None, None, None),
        ("/usr/bin/nvidia-smi", None, None, "this torch is built for CPUs"),
        ("/usr/bin/nvidia-smi", "12.8", None, "(for CUDA 12.8) finds no GPU"),
        ("/usr/bin/nvidia-smi", "12.8", "", None),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_named(
    driver: str | None,
    built_for: str | None,
    hidden: str | None,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(shutil, "which", lambda name: driver)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (gpu,) = doctor._gpus()
    assert gpu.value is None and (gpu.problem is None) is (said is None)
    assert said is None or said in str(gpu.problem)


def test_each_gpu_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """(`make test-gpu` asks a real one.)"""
    chosen: list[int] = []

    @contextmanager
    def device(number: int) -> Iterator[None]:
        chosen.append(number)
        yield

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "device": device,
        "mem_get_info": lambda: (10**10 * (chosen[-1] + 1), 80 * 10**9),
        "is_bf16_supported": lambda including_emulation: chosen[-1] == 1,
        "get_device_name": lambda number: f"card {number}",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    first, second = doctor._gpus()
    assert (first.name, first.value["multiplies"]) == ("cuda:0", ["float32"])
    assert second.words == "card 1, 20.0 GB of 80.0 GB free, multiplies float32 and bfloat16"


@pytest.mark.parametrize("broken", ["torch.get_num_threads", "psutil.virtual_memory"])
def test_what_is_broken_is_a_finding(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other sections are still examined."""

    def fail() -> None:
        raise OSError("libfoo.so: cannot open\nmore")

    monkeypatch.setattr(broken, fail)
    examination = examine()
    section = "devices" if "torch" in broken else "memory"
    assert examination.problems == [
        f"{section}: cannot be examined (OSError: libfoo.so: cannot open); mend what the message "
        "names"
    ]
    assert found("access", "hub", examination).value["reachable"]
