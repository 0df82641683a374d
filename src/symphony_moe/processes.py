"""Several processes of one command: which part of the text is whose, and what they tell each other.

`torchrun` or `accelerate launch` starts them, on one machine or on several. All of them go through
the same steps. Each runs its own part of the text; sums are added over all of them, what one has
solved is shared with the others, and the first alone writes. Alone, a process does the same and
asks nobody.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from symphony_moe.errors import LostProcess

_PATIENCE = timedelta(hours=12)
"""How long one process waits for another: the first may have terabytes to write. One that ends is
noticed at once."""

_FAILED = "symphony-moe/failed"


@dataclass(frozen=True)
class Processes:
    """This process among those that work together."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.number == 0

    def own(self, total: int) -> Tensor:
        """The numbers of this process's part of so many windows, ascending. Every process has one
        in `count`, so that each has the same share of any beginning of them."""
        return torch.arange(self.number, max(self.number, total), self.count)

    def add(self, *sums: Tensor) -> None:
        """Add up tensors over all processes, in place: each has the total then, to the bit the same
        one. Raises LostProcess, as all of these do, where a process has ended."""
        if self.count == 1:
            return
        for tensor in sums:
            # Neither backend adds complex numbers.
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            whole = real.contiguous()
            with _explained(self):
                dist.all_reduce(whole)
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
            described = {
                n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in mine.items()
            }
            self._broadcast(_bytes_of(json.dumps(described)), owner)
            for tensor in mine.values():
                if tensor.numel():
                    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    self._send(raw, owner)
            return mine
        described = json.loads(bytes(self._broadcast(None, owner).tolist()))
        found = {}
        for name, (dtype, *shape) in described.items():
            found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            if found[name].numel():
                self._send(found[name].view(-1).view(torch.uint8), owner)
        return found

    def agree(self, number: int) -> int:
        """The number that the first process has."""
        if self.count == 1:
            return number
        return int(self.share({"number": torch.tensor(number)})["number"])

    def wait(self) -> None:
        """Until every process is here."""
        self.total(0)

    def _broadcast(self, content: Tensor | None, owner: int) -> Tensor:
        """Bytes, of which only their owner knows how many they are."""
        size = torch.tensor([0 if content is None else len(content)])
        self._send(size, owner)
        content = torch.empty(int(size), dtype=torch.uint8) if content is None else content
        self._send(content, owner)
        return content

    def _send(self, tensor: Tensor, owner: int) -> None:
        with _explained(self):
            dist.broadcast(tensor, owner)


ALONE = Processes()


@contextmanager
def together() -> Iterator[Processes]:
    """Inside the block: this process, among those that a launcher has started with it."""
    if not is_launched():
        yield ALONE
        return
    own_group = not dist.is_initialized()
    if own_group:
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            place = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(place % torch.cuda.device_count())
        dist.init_process_group(backend, timeout=_PATIENCE)
    yield Processes(dist.get_rank(), dist.get_world_size())
    # Not where an error has come: a process that ends tells the others by that.
    if own_group:
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether a launcher has started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_to_fail() -> bool:
    """Whether no process of this command has failed before this one: one message is enough."""
    if not is_launched():
        return True
    try:
        store, number, _ = next(rendezvous("env://", timeout=timedelta(seconds=10)))
        # Of this start: a launcher may start all of them once more.
        key = f"{_FAILED}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return bool(store.compare_set(key, "", str(number)) == str(number).encode())
    except (RuntimeError, ValueError):  # nobody is left to ask
        return True


@contextmanager
def _explained(processes: Processes) -> Iterator[None]:
    """LostProcess where another process does not answer."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            f"process {processes.number} of {processes.count}: another process of this command has "
            "ended, so all of them end. What it said is above, or on its machine; a system that is "
            "short of memory ends processes silently. Start the command again with --resume: "
            "finished layers are kept"
        ) from error


def _bytes_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
