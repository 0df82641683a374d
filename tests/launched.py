"""A command in several processes, as a launcher starts them, without the seconds that each of them
would take to import."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

PRELOADED = ["launched", "symphony_moe.pipeline", "symphony_moe.building.build", "transformers"]
"""What the process that all others are copies of has imported. It has computed nothing."""


@dataclass(frozen=True)
class Ended:
    """How the processes of a command have ended."""

    codes: Sequence[int | None]
    output: str

    @property
    def errors(self) -> list[str]:
        """The messages to the user."""
        return [line for line in self.output.splitlines() if line.startswith("symphony: error:")]


@dataclass(frozen=True)
class Kill:
    """End a process by SIGKILL when it calls a function once more."""

    process: int
    module: str
    function: str
    calls: int


def launch(
    folder: Path, words: Sequence[str], *, count: int = 2, failing: "Sabotage | None" = None
) -> Ended:
    """Run `symphony` with these words in so many processes, and wait for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # As torchrun does, the launcher keeps the table that the processes find each other by.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    outputs = [folder / f"output-{number}" for number in range(count)]
    started = []
    for number, output in enumerate(outputs):
        own = environment | {"RANK": str(number), "LOCAL_RANK": str(number)}
        arguments = (list(words), own, str(output), failing)
        started.append(context.Process(target=_run, args=arguments))
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(timeout=120)
            assert process.exitcode is not None, "a process hangs"
    finally:
        for process in started:
            process.kill()
    text = "".join(output.read_text(encoding="utf-8") for output in outputs)
    return Ended([process.exitcode for process in started], text)


@dataclass(frozen=True)
class Fault:
    """Raise an error in one process when it calls a function."""

    process: int
    module: str
    function: str
    error: Exception


@dataclass(frozen=True)
class Other:
    """Have a function come to something else in one process."""

    process: int
    module: str
    function: str
    value: object


Sabotage = Kill | Fault | Other


def _run(
    words: list[str], environment: Mapping[str, str], output: str, failing: Sabotage | None
) -> None:
    os.environ.update(environment)
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf-8") for n in (1, 2))
    from symphony_moe.cli import main

    with _sabotaged(failing, int(environment["RANK"])):
        code = main(words)
    sys.stdout.flush()
    os._exit(code)  # what the parent's tests have open is not this process's to close


@contextlib.contextmanager
def _sabotaged(failing: Sabotage | None, number: int) -> Iterator[None]:
    if failing is None or failing.process != number:
        yield
        return
    import importlib

    module = importlib.import_module(failing.module)
    call, calls = getattr(module, failing.function), 0

    def once_more(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if isinstance(failing, Fault):
            raise failing.error
        if isinstance(failing, Other):
            return failing.value
        if calls > failing.calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    setattr(module, failing.function, once_more)
    yield
