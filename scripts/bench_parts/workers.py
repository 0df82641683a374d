"""What is timed inside a process that has torch, each in a process of its own:

python -m bench_parts.workers NAME REQUEST.json ANSWER.json
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from bench_parts.speed import layer_operations, peaks, step_operations, wait
from symphony_moe import pipeline
from symphony_moe.model.layer import device
from symphony_moe.progress import Progress
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import balance_weight_name, load_source, load_stock
from symphony_moe.text.texts import Texts

AT_ONCE = 4096
"""Tokens in a batch of a forward."""
WARM_UP = 2
"""Steps that are not counted."""


class _Enough(Exception):
    """What was to be seen has been seen."""


def sweep(request: dict[str, Any]) -> dict[str, Any]:
    """The first pass of a build over its calibration text: all sources, layer by layer, compared
    with the anchor. The build is ended after it. The first layer is not in the clock, and all are
    taken to last as long as the others."""
    times: list[float] = []

    def listen(progress: Progress) -> None:
        if progress.stage == "align":
            times.append(time.perf_counter())
            if progress.done == progress.total:
                raise _Enough

    recipe = load_recipe(Path(request["recipe"]))
    try:
        pipeline.build(recipe, request["out"], overwrite=True, progress=listen)
    except _Enough:
        layers = len(times)
        return {"seconds": (times[-1] - times[0]) * layers / (layers - 1)}
    raise SystemExit(f"{request['recipe']}: a build that compares no layers has no first pass")


@torch.inference_mode()
def forward(request: dict[str, Any]) -> dict[str, Any]:
    """The same sources on the same text in stock transformers, without the output head."""
    recipe = load_recipe(Path(request["recipe"]))
    sources = open_sources(recipe)
    texts = Texts(recipe, sources)
    parts = [*texts.validation_windows().values(), *texts.calibration_windows().values()]
    windows = torch.cat([part.windows for part in parts])
    dtype, on = getattr(torch, request["dtype"]), device()
    seconds = operations = 0.0
    for source in sources:
        model: Any = load_source(source, dtype).base_model
        batches = windows.split(max(1, AT_ONCE // windows.shape[1]))
        model(input_ids=batches[0].to(on), use_cache=False)
        wait(on)
        began = time.perf_counter()
        for batch in batches:
            model(input_ids=batch.to(on), use_cache=False)
        wait(on)
        seconds += time.perf_counter() - began
        operations += layer_operations(source.config, windows.numel(), windows.shape[1])
        del model
    return {
        "seconds": seconds,
        "operations": operations,
        "tokens": windows.numel(),
        "peak": peaks(on, dtype),
    }


def stock_steps(request: dict[str, Any]) -> dict[str, Any]:
    """Training steps of a built model in stock transformers and torch: the loss with its
    load-balance loss, clipped gradients, AdamW."""
    on, batch, length = device(), request["batch"], request["sequence"]
    model: Any = load_stock(Path(request["checkpoint"])).train()
    model.config.output_router_logits = True
    setattr(model, balance_weight_name(model), 0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    in_bfloat16 = on.type == "cuda"
    ends = [time.perf_counter()]
    torch.manual_seed(0)
    for _ in range(request["steps"]):
        tokens = torch.randint(2, model.config.vocab_size, (batch, length)).to(on)
        with torch.autocast(on.type, torch.bfloat16, enabled=in_bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(time.perf_counter())
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    config = AutoConfig.from_pretrained(request["checkpoint"])
    operations = step_operations(config, batch * length, length, request["top_k"])
    return _steps(ends) | {"operations": operations, "peak": peaks(on, dtype)}


def trainer_steps(request: dict[str, Any]) -> dict[str, Any]:
    """Training steps of the same model by `symphony train`, with all that it notes."""
    ends: list[float] = []

    def listen(progress: Progress) -> None:
        ends.append(time.perf_counter())

    batch, length, steps = request["batch"], request["sequence"], request["steps"]
    overrides = [
        f"train.tokens={batch * length * steps}",
        f"train.batch_size={batch}",
        f"train.sequence_length={length}",
        "train.checkpoints=1",
        "train.learning_rate=1e-5",
    ]
    run = RunFolder(Path(request["run"]))
    pipeline.train(run, overrides, overwrite=True, progress=listen)
    return _steps(ends)


def _steps(ends: list[float]) -> dict[str, Any]:
    """Seconds of a step, the median; and the mean, in which the Trainer's log is."""
    each = [after - before for before, after in pairwise(ends)][WARM_UP:]
    return {"seconds": statistics.median(each), "mean_seconds": statistics.mean(each)}


def matching(request: dict[str, Any]) -> dict[str, Any]:
    """One assignment of neurons, by this package or by scipy: seconds, and the sum of what is
    matched."""
    scores = _correlation(request["neurons"], request["kind"])
    from scipy.optimize import linear_sum_assignment

    from symphony_moe.building.assignment import best_columns

    began = time.perf_counter()
    if request["by"] == "scipy":
        rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    else:
        rows, columns = torch.arange(len(scores)), best_columns(scores)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "sum": float(scores[rows, columns].double().sum())}


def _correlation(neurons: int, kind: str) -> torch.Tensor:
    """The correlation of two sources' neurons on 4,096 tokens (float32, the second's neurons x the
    first's). `strangers`: they have a few causes in common, and each its own mixture of them.
    `branches`: the second's are the first's, disturbed and in another order."""
    generator = torch.Generator().manual_seed(neurons)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = 4096
    if kind == "branches":
        first = draw(tokens, neurons)
        second = first[:, torch.randperm(neurons, generator=generator)] + 0.5 * draw(
            tokens, neurons
        )
    else:
        causes = draw(tokens, 64)
        first, second = (
            causes @ draw(64, neurons) * 0.06 + draw(tokens, neurons) for _ in range(2)
        )
    columns = [(one - one.mean(dim=0)) / one.std(dim=0) for one in (second, first)]
    return columns[0].T @ columns[1] / (tokens - 1)


_WORKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "sweep": sweep,
    "forward": forward,
    "stock_steps": stock_steps,
    "trainer_steps": trainer_steps,
    "matching": matching,
}


def _main(words: Iterator[str]) -> None:
    name, request, answer = words
    found = _WORKERS[name](json.loads(Path(request).read_text(encoding="utf-8")))
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main(iter(sys.argv[1:]))
