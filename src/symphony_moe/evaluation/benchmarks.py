"""Benchmarks: the run's models on tasks of lm-evaluation-harness (the extra `lm-eval`).

The harness brings the tasks, their prompts and their scores; here is only what it is given, and how
its results are kept. Whatever can be wrong with a task is found before any model is loaded: each is
rehearsed on two documents, by the harness's own model that answers at random.
"""

import contextlib
import difflib
import importlib.metadata
import io
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from symphony_moe.errors import RecipeError, RunFolderError, SymphonyError, TextError
from symphony_moe.recipe.settings import Recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.pretrained import load_config, load_tokenizer
from symphony_moe.sources.source import Source
from symphony_moe.sources.stock import load_source, load_stock

log = logging.getLogger(__name__)

PAPER_SHOTS = {
    "mmlu": 0,
    "medmcqa": 0,
    "gsm8k": 8,
    "humaneval": 0,
    "truthfulqa_mc1": 0,
}
"""Examples in the prompt, as in the paper. It has 8 for BBH too, but the harness's BBH comes with
three, so that one stays at the task's own number."""

_SEED = 1234
"""The harness's own, for the choice of examples: results compare with everyone's."""

_CPU_BATCH = 4

_NO_DATA = (ConnectionError, FileNotFoundError)
"""What `datasets` raises where it cannot find a dataset."""


@dataclass(frozen=True)
class TaskSet:
    """One name that was asked for: a task, a group or a tag of the harness."""

    name: str
    content: Mapping[str, Any]
    """What the harness's `TaskManager.load` gives for it."""

    @property
    def parts(self) -> dict[str, Any]:
        """Name -> the harness's task, for each that is run."""
        return dict(self.content["tasks"])


# What is asked for


def choose_models(run: RunFolder, recipe: Recipe, asked: Sequence[str]) -> list[str]:
    """`built`, `trained` and sources' names, in the order in which they are evaluated.

    `asked`: such names, or `sources` for all of those; empty for the run's own models. Raises
    RecipeError for another name, RunFolderError for a model that the run does not have.
    """
    if not asked:
        return ["built", *(["trained"] if run.trained.is_dir() else [])]
    known = ["built", "trained", *recipe.sources]
    chosen: set[str] = set()
    for name in asked:
        if name == "sources":
            chosen |= set(recipe.sources)
        elif name not in known:
            raise RecipeError(
                f"--models {name}: no such model; {_nearest(name, ['sources', *known])}"
            )
        else:
            chosen.add(name)
    if "trained" in chosen and not run.trained.is_dir():
        raise RunFolderError(f"{run.root}: no trained/ to evaluate; run `symphony train` first")
    return [name for name in (*recipe.sources, "built", "trained") if name in chosen]


def read_shots(asked: Sequence[str]) -> dict[str, int | None]:
    """Task name -> examples in its prompt, of `name` and `name:N`; None for the task's own number,
    where the paper says nothing of it. Raises RecipeError for anything else."""
    shots: dict[str, int | None] = {}
    for item in asked:
        name, colon, number = item.partition(":")
        if not name or (colon and not (number.isascii() and number.isdecimal())):
            raise RecipeError(
                f"--tasks {item!r}: expected NAME or NAME:N with N examples in the prompt, such as "
                "gsm8k:5"
            )
        if name in shots:
            raise RecipeError(f"--tasks {item}: {name} is named twice; name it once")
        shots[name] = int(number) if colon else PAPER_SHOTS.get(name)
    if not shots:
        raise RecipeError("--tasks: names no task")
    return shots


# Tasks, before any model


def load_tasks(
    asked: Sequence[str], include: Path | None = None, *, unsafe_code: bool = False
) -> list[TaskSet]:
    """Load tasks with their data, and rehearse them.

    `asked`: as of `read_shots`. `include`: a folder with tasks of one's own, in the harness's YAML.
    `unsafe_code`: whether tasks may run the code that a model writes. Raises RecipeError where the
    harness is not installed, for a name it does not know and a task that does not work, TextError
    for data that cannot be read.
    """
    shots = read_shots(asked)
    _require_harness()
    if include is not None:
        _check_yaml(include)
    with _blaming("--tasks"):
        index = _find(list(shots), include)
    for name in shots:
        with _blaming(f"--tasks {name}"):
            unsafe = [c for c in _configs(index.task_index, name) if c.get("unsafe_code")]
        if unsafe and not unsafe_code:
            raise RecipeError(
                f"--tasks {name}: {_named(unsafe[0])} runs the code that the model writes, on this "
                "machine, with your rights; in a sandbox, allow it by --confirm-run-unsafe-code"
            )
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric itself asks for
    return [_load(index, name, number, unsafe_code) for name, number in shots.items()]


def _require_harness() -> None:
    try:
        with _quiet():
            import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            "--tasks: benchmarks need lm-evaluation-harness: pip install 'lm_eval>=0.4.13,<0.5' "
            f"({error})"
        ) from None


def _read_task(path: Path) -> Any:
    """What a task's file says, read as the harness reads it. Its `!function module.name` is not
    looked up. Raises RecipeError."""
    import yaml

    class TaskLoader(yaml.SafeLoader):
        pass

    TaskLoader.add_constructor("!function", lambda loader, node: str(node.value))
    try:
        return yaml.load(path.read_text(encoding="utf-8"), TaskLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"--include {path}: not readable as YAML: {_one_line(error)}") from None


def _check_yaml(folder: Path) -> None:
    """RecipeError for a folder without tasks, and for what the harness would pass over in silence:
    a file that is not YAML, or that includes one that is not there."""
    if not folder.is_dir():
        raise RecipeError(f"--include {folder}: no such folder")
    paths = sorted(folder.rglob("*.yaml"))
    if not paths:
        raise RecipeError(f"--include {folder}: holds no .yaml file")
    for path in paths:
        content = _read_task(path)
        if not isinstance(content, dict):
            raise RecipeError(
                f"--include {path}: expected a task's settings, got {type(content).__name__}"
            )
        included = content.get("include", [])
        for other in included if isinstance(included, list) else [included]:
            if not (path.parent / str(other)).is_file():
                raise RecipeError(f"--include {path}: includes {other}, which is not there")


def _find(names: Sequence[str], include: Path | None) -> Any:
    """A TaskManager that knows all names. The harness's own thousands of tasks take it a quarter of
    a minute to look through, so that is done only where `include` is not enough."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if all(_is_complete(own.task_index, name) for name in names):
            return own
    index = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if name not in index.task_index:
            where = "" if include is None else f" and {include}"
            raise RecipeError(
                f"--tasks {name}: no task of that name in lm-evaluation-harness {_version()}"
                f"{where}; {_nearest(name, index.all_tasks)}"
            )
    return index


def _members(index: Mapping[str, Any], name: str) -> list[Any] | None:
    """What a group or tag is made of: names, or settings around one. None for a task."""
    entry = index[name]
    if entry.cfg is None:
        return sorted(entry.tags)
    listed = entry.cfg.get("task")
    return listed if isinstance(listed, list) else None


def _named(member: Any) -> str:
    """The task or group that a member of a group is, or is made of."""
    return str(member.get("task") or member.get("group") if isinstance(member, dict) else member)


def _is_complete(index: Mapping[str, Any], name: str) -> bool:
    """Whether a name is there, with everything that it refers to."""
    if name not in index:
        return False
    return all(_is_complete(index, _named(member)) for member in _members(index, name) or [])


def _configs(index: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """Settings of each task behind a name, `!function`s not looked up."""
    members = _members(index, name)
    if members is None:
        yield index[name].cfg
    for member in members or []:
        if isinstance(member, dict):
            yield member
        if _named(member) in index:
            yield from _configs(index, _named(member))


def _load(index: Any, name: str, shots: int | None, unsafe_code: bool) -> TaskSet:
    """One name's tasks with their data, rehearsed."""
    from lm_eval.api.registry import get_model

    who = f"--tasks {name}" if shots is None else f"--tasks {name}:{shots}"
    with _blaming(who):
        tasks = TaskSet(name, index.load([name]))
        for part, task in tasks.parts.items():
            own = task.get_config("num_fewshot")
            if shots and own == 0:
                raise RecipeError(f"{who}: {part} takes no examples; ask for {name} alone")
            task.set_config("num_fewshot", (own or 0) if shots is None else shots)
        rehearsal = TaskOptions(limit=2, unsafe_code=unsafe_code)
        found = _evaluate(get_model("dummy")(), tasks, rehearsal, bootstrap=0)
        if not all(_metrics(found["results"][part]) for part in tasks.parts):
            raise RecipeError(f"{who}: measures nothing")
    return tasks


@contextlib.contextmanager
def _blaming(who: str) -> Iterator[None]:
    """Tasks are data and code of other people, and may raise anything: one sentence with its first
    words."""
    try:
        with _quiet():
            yield
    except SymphonyError:
        raise
    except _NO_DATA as error:
        raise TextError(
            f"{who}: its data is not there: {_one_line(error)}; expected on disk, on the hub, or "
            "in the hub's cache"
        ) from None
    except Exception as error:
        log.debug("%s", who, exc_info=True)
        raise RecipeError(
            f"{who}: does not work in lm-evaluation-harness {_version()}: "
            f"{type(error).__name__}: {_one_line(error)}"
        ) from None


# Models


@dataclass(frozen=True)
class TaskOptions:
    """How all tasks are asked."""

    limit: int | None = None
    """Documents of each task; None for all."""
    chat_template: bool = False
    """Prompts are chats, in each model's own template."""
    unsafe_code: bool = False
    """Tasks may run the code that a model writes."""


@dataclass(frozen=True)
class _Candidate:
    """A model that is evaluated."""

    name: str
    folder: Path
    source: Source | None
    """Where it is one."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own: a source's is not that of the vocabulary which the sources share."""
        return load_tokenizer(self.folder) if self.source is None else self.source.own_tokenizer

    @property
    def context(self) -> int:
        """The longest text that it takes, in tokens."""
        return int(load_config(self.folder).max_position_embeddings)

    def load(self) -> PreTrainedModel:
        """The model, in its own vocabulary."""
        if self.source is None:
            return load_stock(self.folder)
        return load_source(replace(self.source, vocabulary=None))


def run_tasks(
    run: RunFolder,
    sources: Sequence[Source],
    models: Sequence[str],
    tasks: Sequence[TaskSet],
    options: TaskOptions = TaskOptions(),
) -> dict[str, Any]:
    """Evaluate models on tasks, into `tasks` of `metrics.json`, after each task; what was measured
    of other tasks and models stays. Returns all of it: model -> task -> metric -> value.

    A source is evaluated as everyone else would: in its own vocabulary and with its own chat
    template. Raises RecipeError for a model without a chat template where the options ask for one,
    and for a task that wants longer texts than a model can make.
    """
    candidates = _candidates(run, sources, models)
    for model in candidates:
        if options.chat_template and not model.tokenizer.chat_template:
            raise RecipeError(
                f"--chat-template: {model.name} has no chat template; leave the option away"
            )
        _check_lengths(model.name, model.context, tasks)
    for model in candidates:
        lm = _wrap(model.load(), model.tokenizer)
        for task in tasks:
            with _quiet(bars=True):
                found = _evaluate(lm, task, options)
            _warn_of_cuts(model, task)
            results = _results(task, found, chat_template=options.chat_template)
            for part, values in results.items():
                log.info("evaluated %s on %s: %s", model.name, part, _scores_as_text(values))
            _keep(run, model.name, results)
    return dict(run.read_json(run.metrics)["tasks"])


def _candidates(
    run: RunFolder, sources: Sequence[Source], models: Sequence[str]
) -> list[_Candidate]:
    """The models of these names, with their tokenizers: a broken one is found before any model is
    loaded."""
    opened = {source.name: source for source in sources}
    own = {"built": run.checkpoint, "trained": run.trained}
    folders = {**own, **{name: source.folder for name, source in opened.items()}}
    found = [_Candidate(name, folders[name], opened.get(name)) for name in models]
    for model in found:
        _ = model.tokenizer
    return found


def _keep(run: RunFolder, model: str, results: Mapping[str, Any]) -> None:
    """Merge one model's results into what is known."""
    known = run.read_json(run.metrics).get("tasks", {}) if run.metrics.is_file() else {}
    if not run.trained.is_dir():
        known.pop("trained", None)
    run.update_json(run.metrics, {"tasks": {**known, model: {**known.get(model, {}), **results}}})


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model as the harness wants it. On a GPU it finds the largest batch that fits."""
    from lm_eval.models.huggingface import HFLM

    batch_size = _CPU_BATCH if model.device.type == "cpu" else "auto"
    with _quiet():
        return HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)


def _evaluate(
    lm: Any, tasks: TaskSet, options: TaskOptions, *, bootstrap: int = 100_000
) -> Mapping[str, Any]:
    """The harness's results. Every draw is made anew, so that all models see the same prompts.
    `bootstrap`: samples for the standard errors of metrics that need them."""
    import lm_eval

    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    for task in tasks.parts.values():
        task.set_fewshot_seed(_SEED)
    found: Mapping[str, Any] = lm_eval.evaluate(
        lm=lm,
        task_dict=tasks.content,
        limit=options.limit,
        log_samples=False,
        bootstrap_iters=bootstrap,
        apply_chat_template=options.chat_template,
        fewshot_as_multiturn=options.chat_template,
        confirm_run_unsafe_code=options.unsafe_code,
    )
    return found


# Results


def _results(
    tasks: TaskSet, found: Mapping[str, Any], *, chat_template: bool
) -> dict[str, dict[str, Any]]:
    """Task -> metrics and the settings that they are measured with. A group with a mean of its own
    is one task; of others, and of tags, each part is one."""
    values = {name: _metrics(result) for name, result in found["results"].items()}
    named = {tasks.name: list(tasks.parts)} if values.get(tasks.name) else None
    results = {}
    for name, parts in (named or {part: [part] for part in tasks.parts}).items():
        shots = {found["n-shot"][part] for part in parts}
        counts = [found["n-samples"][part] for part in parts]
        results[name] = values[name] | {
            "fewshot": shots.pop() if len(shots) == 1 else None,
            "samples": sum(count["effective"] for count in counts),
            "documents": sum(count["original"] for count in counts),
            "chat_template": chat_template,
            "lm_eval": _version(),
        }
    return results


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`, and `acc_stderr,none` -> `acc_stderr`; a filter that is one stays:
    `exact_match,strict-match` and `exact_match,strict-match_stderr`."""
    metrics = {}
    for key, value in result.items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, int | float | np.number):
            name = metric.removesuffix("_stderr") + ("" if filtered == "none" else f",{filtered}")
            name += "_stderr" if metric.endswith("_stderr") else ""
            metrics[name] = float(value)
    return metrics


def _check_lengths(model: str, context: int, tasks: Sequence[TaskSet]) -> None:
    """RecipeError for a task whose answers alone fill a model's context."""
    for name, wanted in ((n, w) for task in tasks for n, w in _answer_lengths(task).items()):
        if wanted >= context:
            raise RecipeError(
                f"--tasks {name}: answers may be {wanted} tokens long, but {model} takes {context} "
                "in all; lower the task's generation_kwargs.max_gen_toks, or leave it out"
            )


def _answer_lengths(tasks: TaskSet) -> dict[str, int]:
    """Task -> the most tokens that it lets a model write, of those that do."""
    from lm_eval.models.utils import normalize_gen_kwargs

    with _quiet():
        return {
            name: int(normalize_gen_kwargs(task.get_config("generation_kwargs"))["max_gen_toks"])
            for name, task in tasks.parts.items()
            if task.get_config("output_type") == "generate_until"
        }


def _warn_of_cuts(model: _Candidate, tasks: TaskSet) -> None:
    """The harness cuts what is too long from the left, examples first, and says nothing."""
    context = model.context
    answers = _answer_lengths(tasks)
    for name, task in tasks.parts.items():
        texts = [
            request.args[0] if name in answers else "".join(request.args)
            for request in task.instances
            if request.request_type != "loglikelihood_rolling"
        ]
        if not texts:
            continue
        room = context - answers[name] if name in answers else context + 1
        cut = sum(len(tokens) > room for tokens in model.tokenizer(texts)["input_ids"])
        if cut:
            log.warning(
                "%s: %d of %d prompts are longer than the %d tokens that %s takes, and were cut "
                "from the left",
                name,
                cut,
                len(texts),
                room,
                model.name,
            )


def _scores_as_text(values: Mapping[str, Any]) -> str:
    """For the log."""
    metrics = ", ".join(f"{name} {v:.4g}" for name, v in values.items() if isinstance(v, float))
    return f"{metrics} ({values['samples']} documents)"


# Words


@contextlib.contextmanager
def _quiet(bars: bool = False) -> Iterator[None]:
    """Keep what the harness prints off stdout, which is for results; and its progress bars, which
    cannot be switched off, where nobody watches. Our log is not concerned."""
    watched = log.isEnabledFor(logging.DEBUG) or (bars and sys.stderr.isatty())
    errors = sys.stderr if watched else io.StringIO()
    with contextlib.redirect_stdout(errors), contextlib.redirect_stderr(errors):
        yield


def _version() -> str:
    return importlib.metadata.version("lm_eval")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"known: {', '.join(known)}" if len(known) < 100 else "`lm-eval ls tasks` lists them"


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{error} {'' if error.__cause__ is None else error.__cause__}".split())
    return text if len(text) < 300 else f"{text[:300]} ..."
