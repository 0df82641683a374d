"""What a command takes: seconds, processor seconds, peak memory, bytes through read and write.

Imports nothing large: the peak that the system tells of a command begins at the size of the process
that started it, so a small process starts every command (`_WATCH`).
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_WATCH = """
import json, os, sys, time
note, command = sys.argv[1], sys.argv[2:]
began = time.monotonic()
child = os.posix_spawn(command[0], command, os.environ)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
seconds = time.monotonic() - began
with open(f"/proc/{child}/io") as file:
    passed = dict(line.split(": ") for line in file)
_, status, usage = os.wait4(child, 0)
found = {
    "seconds": seconds,
    "processor_seconds": usage.ru_utime + usage.ru_stime,
    "peak_bytes": usage.ru_maxrss * 1024,
    "read_bytes": int(passed["rchar"]),
    "written_bytes": int(passed["wchar"]),
}
with open(note, "w") as file:
    json.dump(found, file)
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""


def take(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a command takes that is run to its end. SystemExit with what it said, where it fails:

    `seconds`; `processor_seconds` of all its threads and of what it started; `peak_bytes` resident
    at once, with the pages of mapped files; `read_bytes` and `written_bytes` that passed through
    the system's `read` and `write`, not what was mapped.

    `environment`: variables beside this process's own.
    """
    os.sync()  # what an earlier command has left to write is not this one's
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "taken.json"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _WATCH, str(note), *words],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}")
        taken: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return taken


class State:
    """Results in a file, each kept as soon as it is there: a part that was stopped goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        if path.is_file():
            self._known = json.loads(path.read_text(encoding="utf-8"))

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """What is known by this name; else what `measure` finds, which is kept (as JSON)."""
        if key not in self._known:
            print(f"  {key}", flush=True)
            found = measure()
            self._known[key] = found
            self._path.parent.mkdir(parents=True, exist_ok=True)
            staged = self._path.with_suffix(".new")
            staged.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")
            staged.replace(self._path)
        return self._known[key]


def in_turn(
    state: State, name: str, pairs: int, commands: Mapping[str, Callable[[], dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """Each command `pairs` times, all of them in turn and every other time in the opposite order: a
    machine that grows slower meanwhile does so for all."""
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in commands}
    for number in range(pairs):
        labels = list(commands)
        for label in labels if number % 2 == 0 else labels[::-1]:
            key = f"{name}, {label}, {number + 1} of {pairs}"
            found[label].append(state.get(key, commands[label]))
    return found


def median(runs: Sequence[Mapping[str, Any]], of: str) -> float:
    """The median of one thing over the runs of a command."""
    return float(statistics.median(run[of] for run in runs))


def spread(runs: Sequence[Mapping[str, Any]], of: str = "seconds") -> str:
    """Median, least and most of one thing, in words."""
    values = [run[of] for run in runs]
    middle = shown(statistics.median(values))
    return (
        middle if len(values) == 1 else f"{middle} ({shown(min(values))} to {shown(max(values))})"
    )


def shown(value: float) -> str:
    """A number with about three digits."""
    for digits, least in ((0, 100), (1, 10), (2, 1)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.3f}"


def gigabytes(count: float) -> str:
    return f"{shown(count / 1e9)} GB"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """What this is measured on, in one line."""
    words = [f"{os.cpu_count()} cores of {_processor()}"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words.append(f"{memory / 1024**3:.0f} GiB")
    if (gpu := gpu_name()) is not None:
        words.append(gpu)
    return f"{', '.join(words)}; Python {platform.python_version()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpu_name() -> str | None:
    """The name of the first GPU; None where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(
            asked, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return names[0].strip() if names else None
