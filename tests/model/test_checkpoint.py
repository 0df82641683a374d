"""Files written tensor by tensor are what safetensors writes whole: the same tensors, the same
bytes every time, and nothing that looks finished before it is."""

import errno
import hashlib
import json
import math
import os
import shutil
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from symphony_moe.errors import RecipeError, RunFolderError
from symphony_moe.files import hash_folder, sha256_of, write_at
from symphony_moe.model.checkpoint import BYTES, CheckpointWriter, assign_shards, is_finite

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (50, 8),
    "model.layers.0.a.weight": (8, 8),
    "model.layers.0.b.bias": (7,),
    "model.layers.1.a.weight": (8, 8),
    "model.layers.1.statics": (1, 3),
    "model.norm.weight": (8,),
}


def tensors(dtype: str = "float32") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        for name, shape in SHAPES.items()
    }


def write_all(
    folder: Path, dtype: str = "float32", max_bytes: int = 10**9
) -> tuple[CheckpointWriter, dict[str, str]]:
    writer = CheckpointWriter(folder, SHAPES, dtype, max_bytes)
    for name, tensor in tensors().items():
        writer.write(name, tensor)
    return writer, writer.finish()


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("max_bytes", [10**9, 600, 1])
def test_safetensors_reads_back_what_was_written(
    dtype: str, max_bytes: int, tmp_path: Path
) -> None:
    write_all(tmp_path, dtype, max_bytes)
    found = read_all(tmp_path)
    assert found.keys() == SHAPES.keys()
    for name, tensor in tensors(dtype).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_one_file_has_the_usual_name_and_no_index(tmp_path: Path) -> None:
    write_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        # transformers refuses files that do not say this.
        assert file.metadata() == {"format": "pt"}


def test_several_files_have_an_index_that_says_where_everything_is(tmp_path: Path) -> None:
    writer, _ = write_all(tmp_path, max_bytes=600)
    assert len(writer.files) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == list(SHAPES)
    assert index["metadata"]["total_size"] == 4 * sum(math.prod(s) for s in SHAPES.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 (a handle, not a dict)
    count = len(writer.files)
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    assert sorted({*index["weight_map"].values()}) == names


def test_the_index_comes_last(tmp_path: Path) -> None:
    """Without it a loader finds no model, whatever a kill leaves behind."""
    writer = CheckpointWriter(tmp_path, SHAPES, "float32", 600)
    for name, tensor in tensors().items():
        writer.write(name, tensor)
        assert not list(tmp_path.glob("*.json*"))
    writer.finish()
    assert (tmp_path / "model.safetensors.index.json").is_file()


def test_rows_may_come_one_block_at_a_time_and_in_any_order(tmp_path: Path) -> None:
    _, whole = write_all(tmp_path / "whole", "bfloat16", 600)
    writer = CheckpointWriter(tmp_path / "rows", SHAPES, "bfloat16", 600)
    for name, tensor in reversed(tensors().items()):
        for first in reversed(range(0, len(tensor), 3)):
            writer.write(name, tensor[first : first + 3], first)
    assert writer.finish() == whole
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "rows" / path.name).read_bytes()


def test_tensors_that_are_views_are_written_as_they_read(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {"a": (3, 5), "b": (4,)}, "float32", 10**9)
    a, b = torch.arange(15.0).view(5, 3).T, torch.arange(8.0)[::2]
    writer.write("a", a)
    writer.write("b", b)
    writer.finish()
    found = read_all(tmp_path)
    assert torch.equal(found["a"], a) and torch.equal(found["b"], b)


@pytest.mark.parametrize("dtype", BYTES)
def test_the_same_tensors_give_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    write_all(tmp_path / "one", dtype, 600)
    write_all(tmp_path / "two", dtype, 600)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("dtype", BYTES)
def test_hashes_are_those_of_the_tensors_own_bytes(dtype: str, tmp_path: Path) -> None:
    _, hashes = write_all(tmp_path, dtype, 600)
    assert list(hashes) == list(SHAPES)
    for name, tensor in tensors(dtype).items():
        own = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert hashes[name] == hashlib.sha256(own).hexdigest()


@pytest.mark.parametrize("max_bytes", [10**9, 600])
def test_files_are_hashed_while_they_are_written(
    max_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte that was written in order is read again."""
    writer = CheckpointWriter(tmp_path, SHAPES, "bfloat16", max_bytes)
    for name, tensor in tensors().items():
        writer.write(name, tensor)
    with monkeypatch.context() as patch:
        writer.digest("model.")  # all is written
        patch.setattr(Path, "open", lambda *_: pytest.fail("read back"))
        found = writer.file_hashes()
    writer.finish()
    assert found == {path.name: sha256_of(path) for path in tmp_path.glob("*.safetensors")}


@pytest.mark.parametrize("again", SHAPES)
def test_what_is_written_twice_is_hashed_as_it_is_at_the_end(again: str, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, SHAPES, "float32", 600)
    for name, tensor in tensors().items():
        writer.write(name, tensor)
    changed = tensors()[again] + 1
    for first in range(0, len(changed), 3):
        writer.write(again, changed[first : first + 3], first)
    hashes, files = writer.finish(), writer.file_hashes()
    assert hashes[again] == hashlib.sha256(changed.numpy().tobytes()).hexdigest()
    assert files == {path.name: sha256_of(path) for path in tmp_path.glob("*.safetensors")}
    assert torch.equal(read_all(tmp_path)[again], changed)


def test_a_layer_is_recorded_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are synced first; the digest is that of what is there."""
    said: list[str] = []
    sync = os.fsync

    def synced(handle: int) -> None:
        said.append("synced")
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    with CheckpointWriter(tmp_path, SHAPES, "float32", 10**9) as writer:
        for name, tensor in tensors().items():
            writer.write(name, tensor)
            if name == "model.layers.0.b.bias":
                writer.when_durable("model.layers.0.", said.append)
        writer.settle()
        digest = said.pop()
        assert said and set(said) == {"synced"}
        assert digest == writer.digest("model.layers.0.")
        writer.finish()
    resumed = CheckpointWriter(tmp_path, SHAPES, "float32", 10**9)
    assert digest == resumed.digest("model.layers.0.")  # read from the disk


@pytest.mark.parametrize("call", ["write", "digest", "when_durable", "finish", "file_hashes"])
def test_a_disk_that_fails_is_told_by_what_waits_for_it(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    values = tensors()
    *names, last = SHAPES
    recorded: list[str] = []
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):  # noqa: SIM117
        with CheckpointWriter(tmp_path, SHAPES, "float32", 10**9) as writer:
            for name in names:
                writer.write(name, values[name])
            monkeypatch.setattr("symphony_moe.model.checkpoint.write_at", full)
            monkeypatch.setattr("symphony_moe.model.checkpoint.WAITING_BYTES", 0)
            if call == "write":
                writer.write(last, values[last])
            monkeypatch.setattr("symphony_moe.model.checkpoint.WAITING_BYTES", 10**9)
            writer.write(last, values[last])
            if call == "when_durable":
                writer.when_durable("model.norm.", recorded.append)
                writer.settle()
            elif call == "digest":
                writer.digest("model.norm.")
            else:
                getattr(writer, call)()
    assert not recorded


def test_no_more_waits_than_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with what is written, however slow the disk."""
    monkeypatch.setattr("symphony_moe.model.checkpoint.WAITING_BYTES", 3000)
    released = threading.Event()
    done: list[int] = []

    def slow(path: Path, content: memoryview, offset: int) -> None:
        released.wait(10)
        write_at(path, content, offset)
        done.append(len(content))

    monkeypatch.setattr("symphony_moe.model.checkpoint.write_at", slow)
    shapes = {f"t{number}": (256,) for number in range(8)}  # of 1 KiB each
    with CheckpointWriter(tmp_path, shapes, "float32", 10**9) as writer:
        threading.Timer(0.2, released.set).start()
        for number, name in enumerate(shapes, start=1):
            writer.write(name, torch.zeros(256))
            assert 1024 * number - sum(done) <= 3000 + 1024
        writer.finish()


def test_files_and_folders_are_hashed_whole(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_all(folder)
    (folder / "config.json").write_text("{}")
    path = folder / "model.safetensors"
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert hash_folder(folder) == {
        "checkpoint/config.json": sha256_of(folder / "config.json"),
        "checkpoint/model.safetensors": sha256_of(path),
    }


# What must not be written


@pytest.mark.parametrize(
    ("name", "shape", "first_row"),
    [
        ("model.layers.0.a.weight", (8, 9), 0),
        ("model.layers.0.a.weight", (9, 8), 0),
        ("model.layers.0.a.weight", (8, 8), 1),
        ("model.layers.0.a.weight", (8, 8, 1), 0),
        ("model.layers.0.b.bias", (8,), 0),
    ],
)
def test_a_shape_that_was_not_planned_is_our_bug(
    name: str, shape: tuple[int, ...], first_row: int, tmp_path: Path
) -> None:
    writer = CheckpointWriter(tmp_path, SHAPES, "float32", 10**9)
    with pytest.raises(AssertionError, match=r"0\.[ab]\.(weight|bias)"):
        writer.write(name, torch.zeros(shape), first_row)


def test_a_tensor_that_was_not_planned_is_our_bug(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, SHAPES, "float32", 10**9)
    with pytest.raises(KeyError):
        writer.write("model.layers.9.a.weight", torch.zeros(8, 8))


@pytest.mark.parametrize("missing", SHAPES)
def test_a_planned_tensor_that_was_not_written_is_our_bug(missing: str, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, SHAPES, "float32", 600)
    for name, tensor in tensors().items():
        if name != missing:
            writer.write(name, tensor)
        elif len(tensor) > 1:
            writer.write(name, tensor[1:], 1)
    with pytest.raises(AssertionError, match=missing):
        writer.finish()
    assert not (tmp_path / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("value", [65520.0, -1e5, float("inf"), float("nan")])
def test_values_that_float16_cannot_hold_are_refused_by_name(value: float, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, SHAPES, "float16", 10**9)
    tensor = torch.zeros(8, 8)
    writer.write("model.layers.0.a.weight", tensor.clone().fill_diagonal_(65504.0))
    tensor[3, 4] = value
    with pytest.raises(RecipeError, match=r"output\.dtype: model\.layers\.1\.a\.weight.*float16"):
        writer.write("model.layers.1.a.weight", tensor)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_value_that_is_not_finite_is_found_among_all_that_are(
    value: float, dtype: torch.dtype
) -> None:
    # Every number of 16 bits once; of 32 bits, those of bfloat16.
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    every = bits.view(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype)
    finite = every[torch.isfinite(every)].view(-1, 2)
    assert is_finite(finite) and is_finite(finite.T) and is_finite(finite[:0])
    for sign in (1, -1):
        broken = finite.clone()
        broken[3, 1] = math.copysign(value, sign)
        assert not is_finite(broken) and not is_finite(broken.T)


# Resuming


def test_an_interrupted_build_is_taken_up_with_what_it_had_written(tmp_path: Path) -> None:
    _, whole = write_all(tmp_path / "whole", max_bytes=600)
    values = tensors()
    first = CheckpointWriter(tmp_path / "cut", SHAPES, "float32", 600)
    for name in list(SHAPES)[:3]:
        first.write(name, values[name])
    second = CheckpointWriter(tmp_path / "cut", SHAPES, "float32", 600)
    second.keep("model.layers.0.")
    for name in SHAPES:
        if not name.startswith("model.layers.0."):
            second.write(name, values[name])
    assert second.finish() == whole


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_file_cut_short_in_the_laying_out_is_laid_out_again(kept: int, tmp_path: Path) -> None:
    _, whole = write_all(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes((tmp_path / "whole" / "model.safetensors").read_bytes()[:kept])
    _, again = write_all(tmp_path / "cut")
    assert again == whole
    assert path.read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


# Full disks


def test_too_small_a_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = 4 * sum(math.prod(shape) for shape in SHAPES.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(RunFolderError, match="make room"):
        CheckpointWriter(tmp_path, SHAPES, "float32", 600)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    write_all(tmp_path, max_bytes=600)
    # What an interrupted build has taken already is not needed a second time.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    write_all(tmp_path, max_bytes=600)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, os.strerror(errno.ENOSPC)),
        (errno.EDQUOT, os.strerror(errno.EDQUOT)),
        (errno.EFBIG, "the file system takes no file of"),
    ],
)
def test_a_disk_that_cannot_reserve_the_space_is_noticed_while_laying_out(
    code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(RunFolderError, match=said):
        CheckpointWriter(tmp_path, SHAPES, "float32", 600)


def test_a_file_system_that_cannot_reserve_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    _, whole = write_all(tmp_path / "one")
    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    assert write_all(tmp_path / "two")[1] == whole
    monkeypatch.delattr(os, "posix_fallocate", raising=False)  # macOS
    assert write_all(tmp_path / "three")[1] == whole


# Which tensor goes into which file


@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=6),
        st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
        min_size=1,
        max_size=20,
    ),
    dtype=st.sampled_from(sorted(BYTES)),
    limit=st.integers(1, 3000),
)
def test_files_keep_the_order_and_the_limit(
    shapes: dict[str, tuple[int, ...]], dtype: str, limit: int
) -> None:
    shards = assign_shards(shapes, dtype, limit)
    assert [item for shard in shards for item in shard.items()] == list(shapes.items())
    sizes = [[math.prod(shape) * BYTES[dtype] for shape in shard.values()] for shard in shards]
    assert all(sizes)
    # Only a single tensor may be larger than the limit.
    assert all(sum(shard) <= limit or len(shard) == 1 for shard in sizes)
    # And no file is begun before the one before it is full.
    for shard, following in pairwise(sizes):
        assert sum(shard) + following[0] > limit
