"""What this machine has of what the commands need: software, devices, memory, disk, the hub.

Nothing is changed, and nothing is sent but one request to the hub, where it is not switched off.
What cannot be examined is a finding like others, so that a broken installation is named too.
"""

import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from symphony_moe import __version__
from symphony_moe.errors import first_line, shortened

EXTRAS = {
    "adapters": "LoRAs (`adapter:` of a source)",
    "gguf": "GGUF files (`gguf_file:` of a source)",
    "lm-eval": "benchmarks (`symphony evaluate --tasks`)",
    "sentencepiece": "tokenizers that have a tokenizer.model and no tokenizer.json",
}
"""Optional dependencies of pyproject.toml that users want -> what each is for."""

LEAST_FREE = 10**9
"""Bytes free on a disk below which that is a problem: less than most models take."""

_PATIENCE = 5.0
"""Seconds that the hub may take to answer."""

_PACKAGE = "symphony-moe"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: Any
    """For programs: text, a number, a switch, or None where there is none."""
    words: str
    """For people."""
    problem: str | None = None
    """What is wrong with it, and what to do."""


@dataclass(frozen=True)
class Examination:
    """All findings, by what they are of."""

    sections: dict[str, list[Finding]]

    @property
    def problems(self) -> list[str]:
        """What is wrong, and what to do, in the order of the sections."""
        return [one.problem for found in self.sections.values() for one in found if one.problem]

    def to_json(self) -> dict[str, Any]:
        """Section -> name -> value, and `problems`."""
        tables = {
            section: {one.name: one.value for one in found}
            for section, found in self.sections.items()
        }
        return tables | {"problems": self.problems}


def examine() -> Examination:
    """Look at everything. Raises nothing for what is broken: that is a finding."""
    parts: dict[str, Callable[[], Iterable[Finding]]] = {
        "software": _software,
        "extras": _extras,
        "devices": _devices,
        "memory": _memory,
        "disk": _disk,
        "hub": _hub,
    }
    return Examination({section: _tried(section, look) for section, look in parts.items()})


def _tried(section: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(look())
    except Exception as error:
        # A broken library raises what it likes; the other sections are still of use.
        reason = shortened(f"{type(error).__name__}: {first_line(error)}", 200)
        problem = f"{section}: cannot be examined ({reason}); mend what the message names"
        found.append(Finding("error", reason, "cannot be examined", problem))
    return found


# Software


def _software() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    try:
        ours = metadata.metadata(_PACKAGE)
    except metadata.PackageNotFoundError:
        unknown = (
            f"{_PACKAGE} is not installed as a package, so the versions that it needs are not "
            "known: pip install -e . in its folder"
        )
        yield Finding(_PACKAGE, __version__, __version__, unknown)
        return
    yield Finding(_PACKAGE, __version__, __version__)
    python, needed = platform.python_version(), SpecifierSet(ours["Requires-Python"] or "")
    problem = None
    if not needed.contains(python, prereleases=True):
        problem = f"Python {python} is in use, and {needed} is needed: make an environment of it"
    yield Finding("Python", python, f"{python} ({needed})", problem)
    for requirement in _requirements():
        yield _installed(requirement, is_needed=True)


def _requirements(extra: str | None = None) -> list[Any]:
    """What the package needs, or one of its extras besides."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in metadata.requires(_PACKAGE) or ()]
    always = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    if extra is None:
        return always
    return [
        one
        for one in found
        if one.marker and one not in always and one.marker.evaluate({"extra": extra})
    ]


def _installed(requirement: Any, *, is_needed: bool) -> Finding:
    """A package that is installed or not, in a version that will do or not."""
    name, needed = requirement.name, requirement.specifier
    install = f"pip install '{name}{needed}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        problem = f"{name} is not installed, and is needed: {install}" if is_needed else None
        return Finding(name, None, f"not installed ({install})", problem)
    problem = None
    if not needed.contains(version, prereleases=True):
        problem = f"{name} {version} is installed, and {needed} is needed: {install}"
    return Finding(name, version, f"{version} ({needed or 'any'})", problem)


def _extras() -> Iterator[Finding]:
    """Optional packages. One that is not there is no problem."""
    for extra, purpose in EXTRAS.items():
        packages = [_installed(one, is_needed=False) for one in _requirements(extra)]
        found = {one.name: one.value for one in packages}
        here = bool(found) and all(found.values())
        words = ", ".join(f"{one.name} {one.words}" for one in packages)
        problem = "; ".join(one.problem for one in packages if one.problem) or None
        yield Finding(
            extra,
            {"installed": here, "for": purpose, "packages": found},
            f"{'here' if here else 'not here'}, for {purpose}: {words}",
            problem,
        )


# Devices


def _devices() -> Iterator[Finding]:
    import psutil
    import torch

    from symphony_moe.model.precision import REDUCED_FROM, multiplies_bfloat16

    reduced = multiplies_bfloat16(torch.device("cpu"))
    formats = ["float32", *(["bfloat16"] if reduced else [])]
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "CPU"
    hint = f" (precision auto: bfloat16 from a hidden size of {REDUCED_FROM} on)" if reduced else ""
    yield Finding(
        "CPU",
        {"name": name, "multiplies": formats},
        f"{name}, multiplies {' and '.join(formats)}{hint}",
    )
    usable = _usable_cpus()
    threads, cores = torch.get_num_threads(), psutil.cpu_count(logical=False)
    problem = None
    if threads > usable:
        problem = (
            f"torch computes in {threads} threads, and this process may use {usable} CPUs: "
            f"set OMP_NUM_THREADS={usable}"
        )
    asked = os.environ.get("OMP_NUM_THREADS")
    yield Finding(
        "threads",
        {"torch": threads, "usable_cpus": usable, "physical_cores": cores},
        f"{threads} of torch's, {usable} usable CPUs, {cores} physical cores"
        + (f", OMP_NUM_THREADS={shortened(asked, 20)}" if asked else ""),
        problem,
    )
    yield from _gpus()


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        words = f"none that torch sees (torch is built for {'CUDA ' + built if built else 'CPUs'})"
        yield Finding("GPU", None, words, _why_no_gpu(built))
        return
    for number in range(torch.cuda.device_count()):
        with torch.cuda.device(number):
            free, total = torch.cuda.mem_get_info()
            reduced = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(number)
        formats = ["float32", *(["bfloat16"] if reduced else [])]
        value = {
            "name": name,
            "total_bytes": total,
            "free_bytes": free,
            "multiplies": formats,
        }
        words = f"{name}, {_gb(free)} of {_gb(total)} free, multiplies {' and '.join(formats)}"
        yield Finding(f"cuda:{number}", value, words)


def _why_no_gpu(built_for: str | None) -> str | None:
    """What keeps torch from a GPU that this machine has; None where it has none, or hides it."""
    there = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    if not there or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    if built_for is None:
        return (
            "this machine has NVIDIA's driver, but this torch is built for CPUs: install one for "
            "CUDA (https://pytorch.org/get-started)"
        )
    return (
        f"this machine has NVIDIA's driver, but torch (for CUDA {built_for}) finds no GPU: see "
        "whether nvidia-smi lists one, and whether its driver is new enough for that CUDA"
    )


# Memory, disk


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    limit = _memory_limit()
    total = min(memory.total, limit or memory.total)
    available = min(memory.available, total)
    within = " (limit of this container)" if total < memory.total else ""
    yield Finding(
        "memory",
        {"total_bytes": total, "available_bytes": available},
        f"{_gb(available)} of {_gb(total)}{within} available; `symphony plan` says what a build "
        "takes, and --memory bounds it",
    )


def _memory_limit() -> int | None:
    """What a container allows (cgroup v2), where it is fewer bytes than the machine has."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _disk() -> Iterator[Finding]:
    from huggingface_hub import constants

    from symphony_moe.sources.convert import cache

    yield _place("current folder", Path.cwd(), "change to a folder on another disk")
    yield _place(
        "hub's cache", Path(constants.HF_HUB_CACHE), "set HF_HUB_CACHE to a folder on another disk"
    )
    yield _place("converted models", cache(), "set SYMPHONY_CACHE to a folder on another disk")


def _place(name: str, path: Path, otherwise: str) -> Finding:
    """Room where something will be written; of a folder that is not there yet, in the one that it
    would be made in."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK)
    problem = None
    if not writable:
        problem = f"{path}: cannot be written; {otherwise}"
    elif free < LEAST_FREE:
        problem = f"{path}: only {_gb(free)} free; make room, or {otherwise}"
    words = f"{_gb(free)} free in {path}{'' if writable else ', which cannot be written'}"
    return Finding(
        name, {"path": str(path), "free_bytes": free, "writable": writable}, words, problem
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


# The hub


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    offline = bool(constants.HF_HUB_OFFLINE)
    has_token = get_token() is not None
    yield Finding(
        "token",
        has_token,
        "there"
        if has_token
        else "none, which public models need not (`hf auth login`, or HF_TOKEN)",
    )
    where = _without_secrets(constants.ENDPOINT)
    if offline:
        words = "HF_HUB_OFFLINE is set: hub ids are read from the cache alone"
        yield Finding("access", {"endpoint": where, "offline": True, "reachable": None}, words)
        return
    reason = _unreachable(constants.ENDPOINT)
    value = {"endpoint": where, "offline": False, "reachable": reason is None}
    if reason is None:
        yield Finding("access", value, f"{where} answers")
        return
    problem = (
        f"{where} does not answer ({reason}): hub ids cannot be fetched. Models and data in "
        "folders need no hub. HF_HUB_OFFLINE=1 reads the cache alone; a proxy is named in "
        "HTTPS_PROXY"
    )
    yield Finding("access", value, f"{where} does not answer ({reason})", problem)


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}"


def _unreachable(url: str) -> str | None:
    """Why the hub does not answer, in short; None where it does.

    Asked in a thread of its own: a look-up of a name can wait longer than any timeout.
    """
    answer = [f"no answer within {_PATIENCE:g} s"]

    def ask() -> None:
        from huggingface_hub.utils import get_session

        try:
            status = get_session().head(url, timeout=_PATIENCE).status_code
            answer[0] = "" if status < 500 and status != 407 else f"status {status}"
        except Exception as error:
            # The client's own kinds, which differ between its versions.
            answer[0] = shortened(first_line(error), 100)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answer[0] or None
