"""`make bench`: what it measures is what it says, and what was measured is kept."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import bench
from bench_parts import calibration, copies, growth, matching, models, planned, training
from bench_parts.measuring import State, in_turn, take
from bench_parts.speed import layer_operations, step_operations


def test_a_command_takes_its_own_memory_and_not_its_starters() -> None:
    """`ru_maxrss` begins at the size of the process that started a command: here several times what
    a small one needs."""
    ballast = bytearray(400_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    small = take([sys.executable, "-c", "pass"])
    assert small["peak_bytes"] < 100_000_000
    large = take([sys.executable, "-c", "bytearray(200_000_000)[::4096] = b'x' * 48829"])
    assert 200_000_000 < large["peak_bytes"] < 300_000_000


def test_a_command_takes_the_bytes_that_it_writes(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'written')!r}, 'wb').write(bytes(3_000_000))"
    taken = take([sys.executable, "-c", code])
    assert 3_000_000 <= taken["written_bytes"] < 3_100_000


def test_a_command_that_fails_ends_the_bench() -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        take([sys.executable, "-c", "raise ValueError('no such thing')"])


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "part.json"
    assert State(path).get("one", lambda: 1) == 1
    assert State(path).get("one", lambda: 2) == 1
    assert State(path).get("two", lambda: 2) == 2


def test_commands_take_turns_in_both_orders(tmp_path: Path) -> None:
    order: list[str] = []

    def run(name: str) -> dict[str, Any]:
        order.append(name)
        return {"seconds": float(len(order))}

    commands = {name: lambda name=name: run(name) for name in "ab"}
    found = in_turn(State(tmp_path / "part.json"), "case", 3, commands)
    assert "".join(order) == "abbaab"
    assert [run["seconds"] for run in found["a"]] == [1, 4, 5]


def test_a_straight_line_has_one_slope() -> None:
    values = [6.0, 12.0, 24.0]
    first, second = growth.slopes(values, [5 + 0.25 * value for value in values])
    assert first == pytest.approx(0.25) and second == pytest.approx(0.25)
    first, second = growth.slopes(values, [5 + value**2 for value in values])
    assert second == pytest.approx(2 * first)


def test_a_tokenizer_has_every_token_of_its_size(tmp_path: Path) -> None:
    models.make_tokenizer(tmp_path, 700)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 700
    assert tokenizer.decode(tokenizer("baxi, doku!")["input_ids"]) == "baxi, doku!"


def test_operations_are_twice_the_weights_of_a_token() -> None:
    """And what attention takes, which is little where a window is short."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    model = LlamaForCausalLM(config)
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert layer_operations(config, 10, 2) == 2 * 10 * weights + 3 * 10 * 2 * 2 * 64
    more = layer_operations(config, 10, 2, experts=2) - layer_operations(config, 10, 2)
    assert more == 2 * 10 * 3 * (3 * 64 * 160)
    head = 2 * 10 * 100 * 64
    assert step_operations(config, 10, 2, 1) == 3 * (layer_operations(config, 10, 2) + head)


def _runs(seconds: float, peak: float = 1e9) -> list[dict[str, Any]]:
    one = {"seconds": seconds, "processor_seconds": 2 * seconds, "peak_bytes": peak}
    return [one | {"read_bytes": 1, "written_bytes": 1, "mean_seconds": seconds, "sum": 5.0}]


def test_the_tables_have_the_ratios() -> None:
    both = {copies.OURS: _runs(30, 1e9), copies.THEIRS: _runs(20, 4e9)}
    assert "| **1.50** | **1.50** | **0.250** |" in copies.describe({"two": both})
    layers = {label: _runs(s) for label, s in (("build", 20), ("cp", 5), ("cp and sync", 10))}
    few = {label: _runs(s) for label, s in (("build", 10), ("cp", 1), ("cp and sync", 2))}
    found = {"all layers": layers, "few layers": few}
    written = copies.describe_writing(
        found | {"bytes, all layers": 4_000_000_000, "bytes, few layers": 2_000_000_000}
    )
    assert "| **cp / build** | **0.250** |  | **0.400** |" in written
    peak = [{"seconds": 8.0, "operations": 4e9, "peak": {"measured": 1e9}}]
    passes = {"harmonized": _runs(10), "symphony": _runs(16), "float32": peak, "bfloat16": peak}
    size = calibration.SIZES["cpu"]
    assert "| 0.800 | 0.800 | 40 % of the measured peak |" in calibration.describe(
        passes | {"size": size}
    )
    assert "**4.00** | 1.000000000" in matching.describe(
        {"96, strangers": {matching.OURS: _runs(2), matching.THEIRS: _runs(8)}}
    )
    assert "**1.00**" in growth.describe(
        {"btx, layers": {str(value): _runs(value) for value in (2, 4, 8)}}
    )
    planning = {"sources": 2, "layers": 2, "bytes": [12e8, 10e8], "seconds": [5, 10]}
    assert "**1.20** | 5.00 | 10.0 | **0.50**" in planned.describe({"135M, btx": planning})
    steps = {"stock": [_runs(9)[0] | peak[0] | {"seconds": 9.0}], "symphony": _runs(10)}
    assert "| **0.900** | **0.900** |" in training.describe(steps | {"size": training.SIZES["cpu"]})


@pytest.mark.slow
def test_the_whole_bench_on_tiny_models(tmp_path: Path) -> None:
    """Every part, but mergekit-moe, which has an environment of its own; then nothing is left to
    measure, and the page is the same."""
    options = ["--quick", "--pairs", "1", "--without-mergekit", "--out", str(tmp_path)]
    bench.main(options)
    written = (tmp_path / "quick" / "bench.md").read_text(encoding="utf-8")
    assert all(f"## {part.title}" in written for part in bench.PARTS.values())
    results = sorted((tmp_path / "quick" / "results").glob("*.json"))
    before = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in results}
    bench.main(options)
    after = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in results}
    assert after == before
