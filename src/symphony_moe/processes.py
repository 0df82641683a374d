"""Several processes of one command: which part of the text is whose, and what they tell each other.

`torchrun` or `accelerate launch` starts them, on one machine or on several. All of them go through
the same steps. Each runs its own part of the text; sums are added over all of them, what one has
solved is shared with the others, and the first alone writes what is made. Alone, a process does the
same and asks nobody.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from symphony_moe.errors import LostProcess, RecipeError, first_line, shortened
from symphony_moe.machine import is_launched

_PATIENCE = timedelta(hours=12)
"""How long one process waits for another: the first may have terabytes to write. On a CPU one that
ends is noticed at once."""

_START = timedelta(minutes=10)
"""How long processes wait for each other at the beginning."""

_KEYS = "symphony-moe"
"""What the names begin with that processes leave for each other at the launcher's."""


@dataclass(frozen=True)
class Processes:
    """This process among those that work together."""

    number: int = 0
    count: int = 1
    place: int = 0
    """Its number among those of its machine."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.number == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.place == 0

    def own(self, total: int) -> Tensor:
        """The numbers of this process's part of so many windows, ascending. Every process has one
        in `count`, so that each has the same share of any beginning of them."""
        return torch.arange(self.number, max(self.number, total), self.count)

    def add(self, *sums: Tensor, owner: int | None = None) -> None:
        """Add up tensors over all processes, in place: each has the total then, to the bit the same
        one. `owner`: the one process that needs it; what the others have then is not to be used.

        Raises LostProcess, as all of these do, where a process has ended.
        """
        if self.count == 1:
            return
        if any(tensor.is_cuda for tensor in sums):
            # A GPU waits without end for a process that has ended. This notices it before.
            self.wait()
        for tensor in sums:
            # Neither backend adds complex numbers.
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            whole = real.contiguous()
            with self._explained():
                if owner is None:
                    dist.all_reduce(whole)
                else:
                    dist.reduce(whole, owner)
            if whole is not real:
                real.copy_(whole)

    def total(self, number: int) -> int:
        """The sum of a number over all processes."""
        found = torch.tensor(number)
        self.add(found)
        return int(found)

    def gather(self, rows: Tensor, places: Tensor, total: int) -> Tensor:
        """The rows of all processes, each at its place among so many. `places`: of this process's
        rows. No two processes have a row for one place."""
        if self.count == 1:
            return rows
        whole = rows.new_zeros(total, *rows.shape[1:])
        whole[places.to(rows.device)] = rows
        self.add(whole)
        return whole

    def share(self, tensors: Mapping[str, Tensor] | None, owner: int = 0) -> dict[str, Tensor]:
        """What one process has, for all: name -> tensor, in memory. `tensors`: the owner's; what
        the others pass is not looked at."""
        if self.count == 1 or self.number == owner:
            assert tensors is not None
            mine = dict(tensors)
            if self.count == 1:
                return mine
            kinds = {
                name: str(tensor.dtype).removeprefix("torch.") for name, tensor in mine.items()
            }
            self._tell({name: [kinds[name], *mine[name].shape] for name in mine}, owner)
            for tensor in mine.values():
                if tensor.numel():
                    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    self._send(raw, owner)
            return mine
        found = {}
        for name, (dtype, *shape) in self._tell(None, owner).items():
            found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            if found[name].numel():
                self._send(found[name].view(-1).view(torch.uint8), owner)
        return found

    def agree(self, answer: bool) -> bool:
        """The answer of the first process."""
        return bool(self.share({"answer": torch.tensor(answer)})["answer"])

    def refuse_different(self, facts: Mapping[str, str]) -> None:
        """Raise RecipeError in a process for which a fact (what it is -> what this process has) is
        not what it is for the first one."""
        if self.count == 1:
            return
        first = self._tell(dict(facts) if self.is_first else None, 0)
        for fact, value in facts.items():
            if first.get(fact) != value:
                mine, its = (shortened(str(each), 60) for each in (value, first.get(fact)))
                raise RecipeError(
                    f"process {self.number + 1} of {self.count} has another {fact} ({mine}) than "
                    f"the first ({its}); all of them must read the same recipe and files, by the "
                    "same software"
                )

    def wait(self) -> None:
        """Until every process is here."""
        self.total(0)

    def _tell(self, content: dict[str, Any] | None, owner: int) -> dict[str, Any]:
        """What can be said in JSON: the owner's, for all."""
        raw = json.dumps(content).encode() if content is not None else b""
        size = torch.tensor([len(raw)])
        self._send(size, owner)
        text = torch.zeros(int(size), dtype=torch.uint8)
        if content is not None:
            text = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        self._send(text, owner)
        found: dict[str, Any] = json.loads(bytes(text.tolist()))
        return found

    def _send(self, tensor: Tensor, owner: int) -> None:
        with self._explained():
            dist.broadcast(tensor, owner)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """LostProcess where another process does not answer."""
        try:
            yield
        except RuntimeError as error:
            raise LostProcess(
                f"process {self.number + 1} of {self.count}: another process has ended or does not "
                f"answer ({shortened(first_line(error), 100)}), so all of them end. Its own "
                "message is above, or on its machine. If it left none, the system may have been "
                "short of memory. Finished layers are kept: start again with --resume"
            ) from error


ALONE = Processes()


@contextmanager
def together() -> Iterator[Processes]:
    """Inside the block: this process, among those that a launcher has started with it.

    Raises LostProcess where they do not all come, and RecipeError where a machine has fewer GPUs
    than processes.
    """
    if not is_launched():
        yield ALONE
        return
    from torch.distributed.rendezvous import rendezvous

    local = [os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK")]
    if None in local:
        raise RecipeError(
            "started as one of several processes, but LOCAL_RANK or LOCAL_WORLD_SIZE is not set; "
            "start them by `torchrun` or `accelerate launch`"
        )
    here, place = (int(value or 0) for value in local)
    backend = "gloo"
    if torch.cuda.is_available():
        if torch.cuda.device_count() < here:
            raise RecipeError(
                f"{here} processes on a machine with {torch.cuda.device_count()} GPU(s); each "
                "needs one of its own. Start fewer, or say --device cpu"
            )
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(place)
    try:
        store, number, count = next(rendezvous("env://", timeout=_START))
        store.set(_key(f"here/{number}"), "")
        store.wait([_key(f"here/{n}") for n in range(count)], _START)
        dist.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=_PATIENCE
        )
    except RuntimeError as error:
        raise LostProcess(
            f"the processes of this command have not all begun within {_START.seconds // 60} "
            f"minutes ({shortened(first_line(error), 100)}). What one of them said is above, or on "
            "its machine; all must see the recipe and its files"
        ) from error
    yield Processes(number, count, place)
    # Not where an error has come: a process that ends tells the others by that.
    dist.destroy_process_group()


def leave() -> None:
    """End what a training's processes talk through. Its threads must not outlive the command: the
    process may be aborted for them at its very end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_to_fail() -> bool:
    """Whether no other process that the launcher has started has failed before this one: one
    message is enough."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, number, _ = next(rendezvous("env://", timeout=timedelta(seconds=10)))
        found = store.compare_set(_key("failed"), "", str(number))
        return bool(found == str(number).encode())
    except (RuntimeError, ValueError):  # nobody is left to ask
        return True


def _key(name: str) -> str:
    """A name of this start: a launcher may start all processes once more."""
    return f"{_KEYS}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
