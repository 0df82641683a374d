"""`symphony build` in several processes: the numbers of one, one message where it fails, and
`--resume` wherever it was cut short."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from checks import read_tensors
from conftest import SIZES, make_recipe
from launched import Fault, Kill, Other, launch
from symphony_moe import pipeline
from symphony_moe.building import fitting
from symphony_moe.building.fitting import Batch, Descent, FitState, descend
from symphony_moe.building.least_squares import LeastSquares, Solution
from symphony_moe.building.statistics import (
    HeadActivity,
    HeadCorrelation,
    LayerStatistics,
    NeuronCorrelation,
    ResidualCovariance,
)
from symphony_moe.cli import main
from symphony_moe.errors import RecipeError, SourceError, VerificationError
from symphony_moe.files import hash_folder
from symphony_moe.model.families import FAMILIES
from symphony_moe.model.moe_layer import MoELayer, shared_layer
from symphony_moe.model.streams import Streams
from symphony_moe.processes import ALONE, Processes
from symphony_moe.recipe.settings import Recipe, SourceSpec
from symphony_moe.runs.folder import RunFolder

# What the processes tell each other


@dataclass(frozen=True)
class Table:
    """What threads that stand for processes have put down for each other."""

    meeting: threading.Barrier
    sums: dict[int, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Thread(Processes):
    """One of several threads that stand for processes."""

    table: Table = field(default_factory=lambda: Table(threading.Barrier(1)))

    def add(self, *sums: Tensor, owner: int | None = None) -> None:
        for tensor in sums:
            self.table.sums[self.number] = tensor.clone()
            self.table.meeting.wait(timeout=60)
            total = torch.stack([self.table.sums[n] for n in range(self.count)]).sum(dim=0)
            self.table.meeting.wait(timeout=60)
            tensor.copy_(
                total if owner in (None, self.number) else torch.full_like(total, torch.nan)
            )

    def _tell(self, content: dict[str, Any] | None, owner: int) -> dict[str, Any]:
        found = (
            {} if content is None else {"said": torch.tensor(list(json.dumps(content).encode()))}
        )
        said: dict[str, Any] = json.loads(bytes(self.share(found, owner)["said"].tolist()))
        return said

    def share(self, tensors: Mapping[str, Tensor] | None, owner: int = 0) -> dict[str, Tensor]:
        if self.number == owner:
            assert tensors is not None
            self.table.shared.clear()
            self.table.shared.update(tensors)
        self.table.meeting.wait(timeout=60)
        found = dict(self.table.shared)
        self.table.meeting.wait(timeout=60)
        return found


def side_by_side(count: int, act: Callable[[Processes], Any]) -> list[Any]:
    """What each of so many threads, as processes that work together, comes to."""
    table = Table(threading.Barrier(count))
    found: dict[int, Any] = {}

    def one(number: int) -> None:
        try:
            found[number] = act(Thread(number, count, number, table))
        except BaseException as error:
            found[number] = error
            table.meeting.abort()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found.values():
        if isinstance(result, BaseException):
            raise result
    return [found[number] for number in range(count)]


def test_every_window_is_one_processs_and_shares_are_even() -> None:
    for count in (1, 2, 3, 7):
        for total in range(20):
            owned = [Processes(number, count).own(total) for number in range(count)]
            assert sorted(torch.cat(owned).tolist()) == list(range(total))
            # Of any beginning of the text, too: the validation text is one.
            for begin in range(total):
                sizes = [int((numbers < begin).sum()) for numbers in owned]
                assert max(sizes) - min(sizes) <= 1


def test_alone_nothing_is_asked() -> None:
    tensor = torch.tensor([1.0, 2.0])
    ALONE.add(tensor)
    assert tensor.tolist() == [1.0, 2.0]
    assert ALONE.total(3) == 3 and ALONE.agree(True) and not ALONE.agree(False)
    assert ALONE.share({"x": tensor})["x"] is tensor
    assert ALONE.gather(tensor, torch.tensor([0, 1]), 2) is tensor
    ALONE.wait()


def test_rows_are_gathered_at_their_places() -> None:
    whole = torch.arange(10.0).view(5, 2)

    def act(processes: Processes) -> Tensor:
        places = processes.own(5)
        return processes.gather(whole[places], places, 5)

    for found in side_by_side(3, act):
        assert torch.equal(found, whole)


@pytest.mark.parametrize("count", [2, 3])
def test_statistics_of_parts_are_those_of_the_whole(count: int) -> None:
    """A mean far from zero is merged, not added; one process has next to nothing of the text."""
    config = AutoConfig.for_model(**SIZES | {"model_type": "llama"})
    heads, groups, size = 4, 2, config.hidden_size // 4
    generator = torch.Generator().manual_seed(0)
    shapes = {"stream": (90, 32), "neurons": (90, 24), "queries": (90, heads, size)}
    shapes |= {"keys": (90, groups, size), "outputs": (90, heads, size)}
    drawn = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(2)
    ]
    for text in drawn:
        text["neurons"] += 1000
    parts = [torch.arange(1), torch.arange(1, 40), torch.arange(40, 90)]
    parts = [torch.cat(parts[:2]), parts[2]] if count == 2 else parts

    def statistics(rows: Tensor) -> LayerStatistics:
        found = LayerStatistics(
            ResidualCovariance(32), HeadCorrelation(config), NeuronCorrelation(24)
        )
        assert found.residual is not None and found.heads is not None
        assert found.neurons is not None
        anchor, source = ({k: v[rows] for k, v in text.items()} for text in drawn)
        found.residual.update(anchor["stream"], source["stream"])
        found.neurons.update(anchor["neurons"], source["neurons"])
        activities = (HeadActivity(t["queries"], t["keys"], t["outputs"]) for t in (anchor, source))
        found.heads.update(*activities)
        return found

    def values(found: LayerStatistics) -> list[Tensor]:
        assert found.residual is not None and found.heads is not None
        assert found.neurons is not None
        scores = found.heads.scores()
        return [found.residual.result(), found.neurons.result(), *scores]

    def act(processes: Processes) -> list[Tensor]:
        found = statistics(parts[processes.number])
        found.validation = statistics(parts[processes.number][:1])
        found.combine(processes)
        assert found.validation.residual is not None
        assert found.validation.residual.count == count
        return values(found)

    expected = values(statistics(torch.arange(90)))
    results = side_by_side(count, act)
    for found in results:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        for one, other in zip(found, results[0], strict=True):
            assert torch.equal(one, other)


def test_sums_of_a_regression_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(50, n, generator=generator) for n in (6, 3))

    def act(processes: Processes) -> tuple[Solution, int]:
        sums = LeastSquares(6, 3)
        rows = processes.own(50)
        sums.update(x[rows], y[rows])
        sums.combine(processes, owner=1)
        return sums.solve(torch.zeros(3, 6), 1e-3), sums.count

    whole = LeastSquares(6, 3)
    whole.update(x, y)
    expected = whole.solve(torch.zeros(3, 6), 1e-3)
    (_, other), (found, count) = side_by_side(2, act)
    assert count == other == 50
    torch.testing.assert_close(found.weight, expected.weight)


@pytest.mark.parametrize("intercept", [None, torch.ones(3)])
def test_a_solution_is_told_whole(intercept: Tensor | None) -> None:
    solution = Solution(torch.rand(3, 4), intercept, float("inf"), 1e-4)
    found = Solution.from_tensors(solution.to_tensors())
    assert torch.equal(found.weight, solution.weight)
    assert (found.condition, found.ridge) == (float("inf"), 1e-4)
    assert (found.intercept is None) == (intercept is None)
    assert intercept is None or torch.equal(found.intercept, intercept)  # type: ignore[arg-type]
    assert found.has_inputs and not replace(solution, has_inputs=False).has_inputs


@pytest.mark.parametrize("attention", [None, {"a/b": torch.ones(2), "c.d": torch.zeros(2)}])
def test_a_layer_is_told_whole(attention: dict[str, Tensor] | None) -> None:
    rows = {"a/b": torch.rand(2), "c.d": torch.rand(2)}
    experts = {name: {"mlp.up_proj.weight": torch.rand(3, 2)} for name in rows}
    layer = MoELayer({"input_layernorm.weight": torch.rand(2)}, experts, rows, attention)
    own, told = side_by_side(2, lambda p: shared_layer(p, layer if p.is_first else None))
    for found in (own, told):
        assert found.shared.keys() == layer.shared.keys() and found.experts.keys() == rows.keys()
        assert torch.equal(found.router["c.d"], rows["c.d"])
        up = found.experts["a/b"]["mlp.up_proj.weight"]
        assert torch.equal(up, experts["a/b"]["mlp.up_proj.weight"])
        assert (found.attention_router is None) == (attention is None)


def test_a_step_has_one_gradient_however_it_is_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three windows are two for one process and one for the other. A parameter without a gradient
    (an expert that no token was sent to) has none."""
    monkeypatch.setattr(fitting, "WINDOWS_TOKENS", 3 * 4)
    spec = SourceSpec(model="nowhere", data="nowhere.jsonl")
    content = {
        "sources": dict.fromkeys("abc", spec),
        "anchor": "a",
        "fit": {"method": "least-squares", "epochs": 4},
    }
    config = AutoConfig.for_model(**SIZES | {"model_type": "llama", "hidden_size": 8})
    generator = torch.Generator().manual_seed(0)
    text = {name: torch.randn(6, 4, 8, generator=generator) for name in "abc"}
    seen: dict[int, list[Tensor]] = {}

    class Recorder(torch.optim.SGD):
        def __init__(self, groups: Any, **_: Any) -> None:
            super().__init__(groups, lr=0.0)

        def step(self) -> None:  # type: ignore[override]
            first, unused = (group["params"][0] for group in self.param_groups)
            assert unused.grad is None
            seen[threading.get_ident()].append(first.grad.clone())

    monkeypatch.setattr(torch.optim, "Adam", Recorder)

    def act(processes: Processes) -> list[Tensor]:
        seen[threading.get_ident()] = []
        state = FitState(
            Recipe.model_validate(content),
            FAMILIES["llama"],
            dict.fromkeys("abc", config),
            config,
            {name: torch.zeros(6, 4, dtype=torch.int64) for name in "abc"},
            dict.fromkeys("abc", 1),
            Streams(),
            processes=processes,
        )
        for name, rows in text.items():
            own = rows[state.numbers(name)]
            for part in ("new", "source"):
                state.streams.new(f"{part}/{name}", *own.shape).copy_(own)
        parameters = [torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True)]

        def loss(batch: Batch) -> Tensor | None:
            rows = [read for _, _, read, _ in batch]
            return (torch.cat(rows) @ parameters[0]).square().mean() if rows else None

        descend(state, Descent(parameters, [None, None], ("new", "source"), loss, seed=0))
        return seen[threading.get_ident()]

    alone = act(ALONE)
    assert len(alone) == 20
    for found in side_by_side(2, act) + side_by_side(4, act):
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other)


# Whole builds


QUICK = ["--set", "fit.epochs=1", "--set", "calibration.windows=random"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three strangers."""
    return make_recipe(tmp_path_factory.mktemp("sources"), method="harmonized")


@pytest.fixture(scope="module")
def pair(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The build of two processes. Nobody changes what is in there."""
    folder = tmp_path_factory.mktemp("pair")
    ended = launch(folder, ["build", str(recipe), "--out", str(folder / "run"), *QUICK])
    assert ended.codes == [0, 0], ended.output
    return RunFolder(folder / "run")


def differs(run: RunFolder, other: RunFolder) -> float:
    """The largest distance of two builds' tensors, relative to their length."""
    tensors, others = (read_tensors(each.checkpoint) for each in (run, other))
    assert tensors.keys() == others.keys()
    distances = [
        float(
            (tensors[name].double() - others[name].double()).norm() / others[name].double().norm()
        )
        for name in tensors
    ]
    return max(distances)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("harmonized", id="all is fitted"),
        pytest.param(
            "symphony",
            id="neurons are matched and the router is fitted",
            marks=pytest.mark.slow,
        ),
        pytest.param("btx", id="nothing is calibrated", marks=pytest.mark.slow),
    ],
)
def test_two_processes_build_what_one_builds(
    method: str, recipe: Path, pair: RunFolder, tmp_path: Path
) -> None:
    words = ["build", str(recipe), *QUICK, "--set", f"method={method}"]
    if method == "symphony":
        words += ["--set", "router.init=regression"]
    run, alone = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "alone")
    if method == "harmonized":
        run = pair
    else:
        ended = launch(tmp_path, [*words, "--out", str(run.root)])
        assert ended.codes == [0, 0], ended.output
        assert ended.output.count("I layer 2 of 2") == 1
    assert main([*words, "--out", str(alone.root)]) == 0
    # The gradient steps, and L-BFGS, make more of a rounding than what is solved (see below).
    assert differs(run, alone) <= (0 if method == "btx" else 5e-3)
    mine, its = (json.loads(each.metrics.read_text()) for each in (run, alone))
    if method == "harmonized":
        assert mine["fit"]["loss"] == pytest.approx(its["fit"]["loss"], abs=3e-4)
    assert mine["timing"]["calibration_tokens"] == its["timing"]["calibration_tokens"]
    manifest = json.loads(run.manifest.read_text())
    assert manifest.get("processes") == (None if method == "btx" else "2")
    assert not run.work.exists()
    pipeline.verify(run)


@pytest.mark.slow
def test_as_many_processes_give_the_same_bytes(
    recipe: Path, pair: RunFolder, tmp_path: Path
) -> None:
    """Also where the streams wait in files, each process's in its own."""
    words = ["build", str(recipe), "--out", str(tmp_path / "run"), *QUICK, "--memory", "1MB"]
    ended = launch(tmp_path, words)
    assert ended.codes == [0, 0], ended.output
    assert hash_folder(tmp_path / "run" / "checkpoint") == hash_folder(pair.checkpoint)


@pytest.mark.slow
def test_what_is_solved_is_that_of_one_process_to_rounding(recipe: Path, tmp_path: Path) -> None:
    """All but the gradient steps."""
    sets = ["fit.epochs=0", "router.init=hidden", "calibration.tokens=6144"]
    sets.append("calibration.windows=random")
    words = ["build", str(recipe), *(word for each in sets for word in ("--set", each)), "--out"]
    ended = launch(tmp_path, [*words, str(tmp_path / "run")], count=3)
    assert ended.codes == [0, 0, 0], ended.output
    assert main([*words, str(tmp_path / "alone")]) == 0
    run, alone = (RunFolder(tmp_path / name) for name in ("run", "alone"))
    assert differs(run, alone) < 3e-4
    mine, its = (json.loads(each.metrics.read_text())["fit"] for each in (run, alone))
    for one, other in zip(mine["layers"], its["layers"], strict=True):
        for step in ("attention", "experts"):
            assert one[step]["kept"] and other[step]["kept"], "the text is too short to tell"
            assert one[step]["error"] == pytest.approx(other[step]["error"], abs=1e-5)
        assert one["routing"]["share"] == pytest.approx(other["routing"]["share"], abs=0.01)


@pytest.mark.slow
def test_more_processes_than_windows(recipe: Path, tmp_path: Path) -> None:
    """Some have no part of a step, and nothing to fit on."""
    words = ["build", str(recipe), "--set", "calibration.tokens=384", *QUICK, "--out"]
    ended = launch(tmp_path, [*words, str(tmp_path / "run")], count=4)
    assert ended.codes == [0] * 4, ended.output
    assert main([*words, str(tmp_path / "alone")]) == 0
    run, alone = (RunFolder(tmp_path / name) for name in ("run", "alone"))
    mine, its = (json.loads(each.metrics.read_text()) for each in (run, alone))
    assert mine["fit"]["loss"] == pytest.approx(its["fit"]["loss"], abs=0.01)
    assert differs(run, alone) < 0.05
    pipeline.verify(run)


@pytest.mark.parametrize(
    ("variant", "method", "sets"),
    [
        pytest.param("llama-tied-rope3", "harmonized", [], marks=pytest.mark.slow),
        ("qwen2", "symphony", ["router.init=hidden", "output.dtype=bfloat16"]),
        pytest.param("qwen2-granitemoe", "harmonized", [], marks=pytest.mark.slow),
        pytest.param("llama", "bam", [], marks=pytest.mark.slow),
        pytest.param("llama", "drop-upcycling", [], marks=pytest.mark.slow),
        pytest.param("llama", "dume", [], marks=pytest.mark.slow),
    ],
    ids=[
        "tied heads",
        "biases, in bfloat16",
        "stacked experts",
        "attention experts",
        "drawn",
        "dume",
    ],
)
def test_every_kind_of_model_is_built_by_two(
    variant: str, method: str, sets: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path / "sources", variant, method=method)
    words = ["build", str(recipe)]
    if method == "harmonized":
        sets = ["fit.epochs=0", "router.init=hidden"]
    words += [word for each in sets for word in ("--set", each)]
    ended = launch(tmp_path, [*words, "--out", str(tmp_path / "run")])
    assert ended.codes == [0, 0], ended.output
    assert main([*words, "--out", str(tmp_path / "alone")]) == 0
    run, alone = (RunFolder(tmp_path / name) for name in ("run", "alone"))
    assert differs(run, alone) < (1e-12 if method in ("bam", "drop-upcycling") else 1e-3)
    pipeline.verify(run)


@pytest.mark.parametrize(
    ("process", "function", "calls"),
    [
        pytest.param(1, "fit_layer", 1, id="the second, in a layer"),
        pytest.param(0, "fit_head", 0, id="the first, at the head", marks=pytest.mark.slow),
        pytest.param(1, "match", 1, id="the second, while it aligns", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_killed_ends_all_and_the_build_goes_on(
    process: int, function: str, calls: int, recipe: Path, pair: RunFolder, tmp_path: Path
) -> None:
    words = ["build", str(recipe), "--out", str(tmp_path / "run"), *QUICK]
    kill = Kill(process, "symphony_moe.building.build", function, calls)
    ended = launch(tmp_path, words, failing=kill)
    assert sorted(code or 0 for code in ended.codes) == [-9, 2], ended.output
    (message,) = ended.errors
    assert "another process has ended" in message and "--resume" in message
    assert len(message) < 500 and "Traceback" not in ended.output
    # What was done before is not done again: the first layer's fit or comparison.
    again = Fault(0, "symphony_moe.building.build", "fit_layer", LookupError("layer 0 again"))
    if function == "fit_layer":
        again_from = launch(tmp_path, [*words, "--resume", "--verbose"], failing=again)
        assert again_from.codes == [1, 2] and "I layer 1 of 2" in again_from.output
    ended = launch(tmp_path, [*words, "--resume"])
    assert ended.codes == [0, 0], ended.output
    assert hash_folder(tmp_path / "run" / "checkpoint") == hash_folder(pair.checkpoint)


@pytest.mark.slow
def test_a_build_of_several_processes_goes_on_in_one(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", str(recipe), "--out", str(tmp_path / "run"), *QUICK]
    kill = Kill(1, "symphony_moe.building.build", "fit_layer", 1)
    assert launch(tmp_path, words, failing=kill).codes != [0, 0]
    assert main([*words, "--resume"]) == 0
    assert "was begun with processes 2" in capsys.readouterr().err
    run = RunFolder(tmp_path / "run")
    pipeline.verify(run)
    with pytest.raises(VerificationError, match="built by 2 processes"):
        pipeline.verify(run, deep=True)


@pytest.mark.parametrize("process", [0, 1])
def test_what_one_process_cannot_is_said_once(process: int, recipe: Path, tmp_path: Path) -> None:
    words = ["build", str(recipe), "--out", str(tmp_path / "run"), *QUICK]
    error = SourceError("its disk is gone")
    fault = Fault(process, "symphony_moe.building.build", "fit_layer", error)
    ended = launch(tmp_path, words, failing=fault)
    assert ended.codes == [2, 2]
    assert ended.errors == ["symphony: error: its disk is gone"]


def test_a_bug_in_all_processes_is_shown_once(recipe: Path, tmp_path: Path) -> None:
    words = ["build", str(recipe), "--out", str(tmp_path / "run"), "--set", "fit.epochs=x"]
    ended = launch(tmp_path, [*words[:4], "--resume", "--overwrite"])
    assert ended.codes == [2, 2] and len(ended.errors) == 1
    fault = Fault(0, "symphony_moe.recipe.load", "load_recipe", LookupError("not foreseen"))
    ended = launch(tmp_path, words, failing=fault)
    assert ended.codes in ([1, 2], [2, 2]) and len(ended.errors) == 1
    assert ended.output.count("Traceback") <= 1


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (Other(1, "symphony_moe.building.build", "digest_of", "0" * 64), "calibration text"),
        (Other(1, "symphony_moe.pipeline", "versions", {"torch": "1.0"}), "software"),
    ],
)
def test_processes_that_would_build_something_else_are_named(
    other: Other, what: str, recipe: Path, tmp_path: Path
) -> None:
    words = ["build", str(recipe), "--out", str(tmp_path / "run"), *QUICK]
    ended = launch(tmp_path, words, failing=other)
    assert ended.codes == [2, 2]
    (error,) = ended.errors
    assert f"process 2 of 2 has another {what}" in error and len(error) < 500
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_sources_that_differ_between_machines_are_named() -> None:
    def act(processes: Processes) -> None:
        processes.refuse_different({"source a": str(processes.number)})

    with pytest.raises(RecipeError, match="process 2 of 2 has another source a"):
        side_by_side(2, act)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "calibration.token=5"], "calibration.token"),
        (["--device", "cuda:1"], "each of several processes takes a GPU of its own"),
    ],
    ids=["misspelled", "one GPU for all"],
)
def test_a_mistake_is_said_once(
    words: list[str], message: str, recipe: Path, tmp_path: Path
) -> None:
    ended = launch(tmp_path, ["build", str(recipe), "--out", str(tmp_path / "run"), *words])
    assert ended.codes == [2, 2]
    (error,) = ended.errors
    assert message in error
    assert not (tmp_path / "run").exists()


def test_other_commands_are_refused_once(pair: RunFolder, tmp_path: Path) -> None:
    ended = launch(tmp_path, ["evaluate", str(pair.root)])
    assert ended.codes == [2, 2] and len(ended.errors) == 1
    assert "only `symphony build` and `symphony train` run in several" in ended.errors[0]


def test_a_folder_that_is_there_is_refused_once(
    recipe: Path, pair: RunFolder, tmp_path: Path
) -> None:
    ended = launch(tmp_path, ["build", str(recipe), "--out", str(pair.root), *QUICK])
    assert ended.codes == [2, 2] and len(ended.errors) == 1
    assert "--resume" in ended.errors[0]
    ended = launch(tmp_path, ["build", str(recipe), "--out", str(pair.root), *QUICK, "--resume"])
    assert ended.codes == [0, 0] and "is finished already" in ended.output


def test_one_process_does_not_check_byte_for_byte_what_two_have_built(pair: RunFolder) -> None:
    with pytest.raises(VerificationError, match="built by 2 processes"):
        pipeline.verify(pair, deep=True)


@pytest.mark.slow
def test_by_the_command_that_the_documentation_names(
    recipe: Path, pair: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(recipe.parent, tmp_path / "sources")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = ["-m", "symphony_moe", "build", str(recipe), "--out", "run", *QUICK]
    done = subprocess.run([*launcher, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hash_folder(tmp_path / "run" / "checkpoint") == hash_folder(pair.checkpoint)


@pytest.mark.slow
def test_a_mistake_is_said_once_under_torchrun(recipe: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = ["-m", "symphony_moe", "build", str(recipe), "--out", "run", "--set", "fit.epoch=1"]
    done = subprocess.run([*launcher, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("symphony: error: ") == 1
    assert "fit.epoch" in done.stderr
