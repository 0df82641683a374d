"""Streams are read and overwritten in batches, wherever they wait."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from symphony_moe.model import streams as streams_module
from symphony_moe.model.streams import Streams


@pytest.fixture(params=["memory", "files", "carried"])
def streams(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any) -> Streams:
    """Two streams of five windows, in batches of two: in memory, in files, and as if they had to
    be carried to a GPU and back."""
    monkeypatch.setattr(streams_module, "WINDOWS_TOKENS", 2 * 3)
    made = Streams(tmp_path if request.param == "files" else None)
    for number, name in enumerate("ab"):
        made.new(name, 5, 3, 4).copy_(torch.arange(60.0).view(5, 3, 4) + 100 * number)
    if request.param == "carried":
        monkeypatch.setattr(Streams, "visit", carried)
    return made


class Copy(torch.Tensor):
    """What has been brought to the GPU."""

    def record_stream(self, stream: Any) -> None:
        pass


def carried(self: Streams, *names: str, rows: slice = slice(None), reads: int = 0) -> Any:
    """`visit` where there is a GPU, which here is the CPU: what is brought is a copy."""
    waits: list[str] = []
    stream = SimpleNamespace(
        wait_event=lambda event: waits.append("batch"),
        record_event=lambda: None,
        synchronize=lambda: waits.append("end"),
    )
    parts = zip(*(self._split(name, rows) for name in names), strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda device: stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: stream)
        patch.setattr(torch.cuda, "stream", lambda way: pytest.MonkeyPatch.context())
        patch.setattr(
            torch.Tensor, "to", lambda part, *_, **__: part.detach().clone().as_subclass(Copy)
        )
        yield from streams_module._carried(parts, reads)
    assert waits == ["batch"] * (len(waits) - 1) + ["end"]


def test_every_window_is_visited_once_and_in_order(streams: Streams) -> None:
    visited = [(a.clone(), b.clone()) for a, b in streams.visit("a", "b")]
    assert [len(a) for a, _ in visited] == [2, 2, 1]
    assert torch.equal(torch.cat([a for a, _ in visited]).as_subclass(torch.Tensor), streams["a"])
    assert torch.equal(torch.cat([b for _, b in visited]).as_subclass(torch.Tensor), streams["b"])
    some = [a.clone() for (a,) in streams.visit("a", rows=slice(1, 4))]
    assert [len(a) for a in some] == [2, 1]
    assert torch.equal(torch.cat(some).as_subclass(torch.Tensor), streams["a"][1:4])


def test_what_is_done_to_a_batch_is_done_to_the_stream(streams: Streams) -> None:
    """To both of two; and to the visited rows alone."""
    before = {name: streams[name].clone() for name in "ab"}
    for a, b in streams.visit("a", "b"):
        a *= 2
        b += a
    assert torch.equal(streams["a"], 2 * before["a"])
    assert torch.equal(streams["b"], before["b"] + 2 * before["a"])
    for (a,) in streams.visit("a", rows=slice(3, None)):
        a.zero_()
    assert torch.equal(streams["a"][:3], 2 * before["a"][:3]) and not streams["a"][3:].any()


def test_what_is_only_read_is_not_written_back(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Streams, "visit", carried)
    before = streams["a"].clone()
    for a, b in streams.visit("a", "b", reads=1):
        b.copy_(a)
        a.zero_()  # of what was brought to the GPU
    assert torch.equal(streams["a"], before) and torch.equal(streams["b"], before)
