"""The command `symphony`: one command per stage, and the only place that makes exit codes.

0 done, 1 our bug, 2 the user's mistake (a message without a traceback). Results go to stdout, logs
to stderr. torch and transformers are imported when a command runs, so that `--help` answers at
once.
"""

import argparse
import io
import logging
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from symphony_moe import __version__
from symphony_moe.errors import (
    RecipeError,
    SymphonyError,
    first_line,
    is_text,
    shortened,
    shown,
)
from symphony_moe.machine import is_out_of_memory, is_refusal, process_number

if TYPE_CHECKING:
    from symphony_moe.building.plan import Plan
    from symphony_moe.runs.folder import RunFolder

DEMO_OUT = "symphony-demo"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    options = _parser().parse_args(arguments)
    _log(options.verbose)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that is no text is shown as its escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _refuse_bytes(sys.argv[1:] if arguments is None else arguments)
        _refuse_processes(options)
        result, text = options.command(options)
        if process_number() == 0:
            print(_json(result) if options.json else text)
        return 0
    except SymphonyError as error:
        return _fail(options, str(error), 2)
    except KeyboardInterrupt:
        return _fail(options, "interrupted", 130)
    except BrokenPipeError:
        # The reader of our output (such as `head`) has gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(options, f"out of memory: {first_line(error)}{_less_memory(options)}", 2)
        if is_refusal(error):
            return _fail(options, first_line(error), 2)
        traceback.print_exc()
        return _fail(options, f"a bug in symphony-moe: {type(error).__name__}: {error}", 1)


def _json(result: Any) -> str:
    from symphony_moe.files import to_json

    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return to_json(result, ascii_only=encoding.lower().replace("-", "") != "utf8")


def _less_memory(options: argparse.Namespace) -> str:
    """What would need less memory."""
    setting = {
        _build: "calibration.tokens",
        _train: "train.batch_size",
        _evaluate: "evaluation.sequence_length",
    }.get(options.command)
    return f". A smaller {setting} needs less" if setting else ""


def _refuse_bytes(arguments: list[str]) -> None:
    """The weights' file format knows no paths that are not text, and no output could name them."""
    for argument in map(str, arguments):
        if not is_text(argument):
            raise RecipeError(
                f"the argument {shortened(ascii(argument), 200)} is not UTF-8 text; "
                "rename what it names"
            )


def _refuse_processes(options: argparse.Namespace) -> None:
    """Two processes of anything but a training would write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and options.command is not _train:
        raise RecipeError(
            "only `symphony train` runs in several processes; start this command without "
            "`torchrun` or `accelerate launch`"
        )


def _fail(options: argparse.Namespace, message: str, code: int) -> int:
    message = shown(message)
    if options.json:
        print(_json({"error": message}))
    print(f"symphony: error: {message}", file=sys.stderr)
    return code


def _log(verbose: bool) -> None:
    package = logging.getLogger("symphony_moe")
    package.setLevel(logging.DEBUG if verbose else logging.INFO)
    if process_number() > 0:
        package.setLevel(logging.WARNING)  # the first process speaks for all
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Shown("%(levelname).1s %(message)s"))
    package.handlers = [handler]
    package.propagate = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        # Their notices are about their own calls; ours are checked where they matter.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|datasets)\.")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)


class _Shown(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))  # a traceback that follows it stays whole


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(shown(message, 200))  # the usage stands before it


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="symphony",
        description="Several checkpoints of one model family -> one Mixture-of-Experts checkpoint.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, function: Any, help: str, *takes: str) -> None:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command=function)
        if "recipe" in takes:
            command.add_argument("recipe", type=Path, metavar="RECIPE", help="recipe file (YAML)")
        if "dir" in takes:
            command.add_argument("dir", type=Path, metavar="DIR", help="run folder")
        if "out" in takes:
            command.add_argument(
                "--out", type=Path, required=True, metavar="DIR", help="run folder to make"
            )
        if "methods" in takes:
            command.add_argument(
                "--methods",
                type=_words,
                metavar="A,B,...",
                help="presets or compare.variants (default: compare.methods, or all presets)",
            )
            command.add_argument(
                "--seeds", type=_seeds, metavar="1,2,...", help="default: compare.seeds"
            )
            command.add_argument(
                "--prepare",
                action="store_true",
                help="write every run's recipe and say the commands, to be run anywhere and in any "
                "order; without it and with --resume, the table is made of them",
            )
        if "demo-out" in takes:
            command.add_argument(
                "--out",
                type=Path,
                default=Path(DEMO_OUT),
                metavar="DIR",
                help=f"run folder to make (default: {DEMO_OUT})",
            )
        if "deep" in takes:
            command.add_argument(
                "--deep", action="store_true", help="build again and compare every tensor"
            )
        if "again" in takes:
            again = command.add_mutually_exclusive_group()
            again.add_argument(
                "--resume", action="store_true", help="go on where a run was cut short"
            )
            again.add_argument("--overwrite", action="store_true", help="replace what is there")
        if "sources-from" in takes:
            command.add_argument(
                "--sources-from",
                type=Path,
                metavar="DIR",
                help="a run of the same sources: their own losses and CKA are taken from there, "
                "not measured again, where the held-out text is the same too",
            )
        if "tasks" in takes:
            _add_task_options(command)
        if function not in (_verify, _report):
            command.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="A.B=C",
                dest="overrides",
                help="override a recipe value (repeatable)",
            )
        command.add_argument(
            "--json", action="store_true", help="machine-readable result on stdout"
        )
        command.add_argument("-v", "--verbose", action="store_true", help="say more, on stderr")

    add("demo", _demo, "the whole way on the bundled tiny sources", "demo-out", "again")
    add("plan", _plan, "what a build will do, from headers alone; writes nothing", "recipe")
    add(
        "build",
        _build,
        "stage 1: sources to checkpoint/, without training",
        "recipe",
        "out",
        "again",
    )
    add("train", _train, "stage 2: checkpoint/ to trained/", "dir", "again")
    add(
        "evaluate",
        _evaluate,
        "held-out losses and routing into metrics.json, or benchmarks",
        "dir",
        "tasks",
        "sources-from",
    )
    add("report", _report, "metrics.json to report.html", "dir")
    add(
        "run",
        _run,
        "build, verify, train, evaluate and report",
        "recipe",
        "out",
        "again",
        "sources-from",
    )
    add(
        "compare",
        _compare,
        "the same sources by several methods, into one table",
        "recipe",
        "methods",
        "out",
        "again",
    )
    add(
        "verify",
        _verify,
        "check a finished run against its sources and stock transformers",
        "dir",
        "deep",
    )
    return parser


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError("expected names with commas between them")
    return list(dict.fromkeys(words))


def _seeds(text: str) -> list[int]:
    words = _words(text)
    if not all(word.isdecimal() and int(word) < 2**32 for word in words):
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2,3, got {text!r}")
    return [int(word) for word in words]


def _add_task_options(command: argparse.ArgumentParser) -> None:
    """Options of `evaluate --tasks`. All but that one default to None or False: `_evaluate` refuses
    them where there are no tasks."""
    command.add_argument(
        "--tasks",
        type=_words,
        metavar="A,B:N",
        help="instead, benchmarks of lm-evaluation-harness (:N for N examples in the prompt)",
    )
    command.add_argument(
        "--include", type=Path, metavar="DIR", help="folder with tasks of your own (YAML)"
    )
    command.add_argument(
        "--models",
        type=_words,
        metavar="A,B",
        help="which of built, trained and the sources (by name, or `sources`); default: the first "
        "two",
    )
    command.add_argument(
        "--limit", type=_count, metavar="N", help="documents per task; default: all"
    )
    command.add_argument(
        "--chat-template", action="store_true", help="put prompts through the chat template"
    )
    command.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="let tasks such as humaneval run the code that the model writes",
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a number above zero, got {text!r}")
    return int(text)


Result = tuple[Any, str]
"""(for --json, for people)."""


def _plan(options: argparse.Namespace) -> Result:
    from symphony_moe.recipe.load import load_recipe
    from symphony_moe.recipe.variants import load_variants

    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.compare.variants or recipe.compare.methods:
        load_variants(options.recipe, options.overrides)  # what `compare` would refuse of them
    from symphony_moe import pipeline

    plan = pipeline.plan(recipe)
    return plan.to_json(), describe_plan(plan)


def _build(options: argparse.Namespace) -> Result:
    from symphony_moe.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from symphony_moe import pipeline

    folder = pipeline.build(recipe, options.out, resume=options.resume, overwrite=options.overwrite)
    metrics = folder.read_json(folder.metrics)
    text = f"built {folder.checkpoint}"
    for kind, by_source in metrics["alignment"].items():
        what = {
            "residual": "cosine of residual streams",
            "heads": "correlation of heads",
            "neurons": "correlation of matched neurons",
        }[kind]
        for source, values in by_source.items():
            before, after = (sum(values[key]) / len(values[key]) for key in ("before", "after"))
            unused = "" if values["used"] else "; too little to use"
            text += f"\n{source}: {what} {before:.3f} before, {after:.3f} after{unused}"
    if "loss" in metrics.get("fit", {}):
        text += (
            "\n"
            + ", ".join(f"{name} {loss:.3f}" for name, loss in metrics["fit"]["loss"].items())
            + f" nats per token on text kept aside; wrote the {metrics['fit']['chosen']} model"
        )
    return metrics | {"paths": {"checkpoint": str(folder.checkpoint)}}, text


def _train(options: argparse.Namespace) -> Result:
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    folder = RunFolder(options.dir)
    pipeline.train(folder, options.overrides, resume=options.resume, overwrite=options.overwrite)
    if process_number() > 0:
        return {}, ""  # the first process may still be writing
    training = folder.read_json(folder.metrics)["training"]
    text = f"trained {folder.trained}: {training['steps']} steps, {training['seconds']:.0f} s"
    return {"training": training, "paths": {"trained": str(folder.trained)}}, text


def _evaluate(options: argparse.Namespace) -> Result:
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    folder = RunFolder(options.dir)
    if options.tasks and options.sources_from:
        raise RecipeError("--sources-from: has no effect with --tasks")
    task_options = ("include", "models", "limit", "chat_template", "confirm_run_unsafe_code")
    if options.tasks is None:
        given = next((name for name in task_options if getattr(options, name)), None)
        if given:
            raise RecipeError(f"--{given.replace('_', '-')}: has no effect without --tasks")
        metrics = pipeline.evaluate(folder, options.overrides, like=_like(options))
        return metrics, loss_table(metrics)
    if options.overrides:
        raise RecipeError(f"--set {options.overrides[0]}: has no effect with --tasks")
    tasks = pipeline.evaluate_tasks(
        folder,
        options.tasks,
        include=options.include,
        models=options.models or (),
        limit=options.limit,
        chat_template=options.chat_template,
        unsafe_code=options.confirm_run_unsafe_code,
    )
    return {"tasks": tasks}, describe_tasks(tasks)


def _report(options: argparse.Namespace) -> Result:
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    path = pipeline.report(RunFolder(options.dir))
    return {"paths": {"report": str(path)}}, f"wrote {path}"


def _verify(options: argparse.Namespace) -> Result:
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    checks = pipeline.verify(RunFolder(options.dir), deep=options.deep)
    lines = [f"{name}: {found}" for name, found in checks.items()]
    return {"verified": True, "checks": checks}, "\n".join([*lines, "verified"])


def _run(options: argparse.Namespace) -> Result:
    from symphony_moe.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from symphony_moe import pipeline

    folder = pipeline.run(
        recipe,
        options.out,
        resume=options.resume,
        overwrite=options.overwrite,
        like=_like(options),
    )
    metrics = folder.read_json(folder.metrics)
    return (
        metrics | {"paths": _paths(folder)},
        f"{loss_table(metrics)}\n\nmodel:  {folder.trained}\nreport: {folder.report}",
    )


def _like(options: argparse.Namespace) -> "RunFolder | None":
    from symphony_moe.runs.folder import RunFolder

    if not options.sources_from:
        return None
    like = RunFolder(options.sources_from)
    like.require_checkpoint()
    like.read_recipe()  # before anything is built that it is wanted for
    for path in (like.manifest, like.metrics):
        like.read_json(path)
    return like


def _compare(options: argparse.Namespace) -> Result:
    from symphony_moe.recipe.variants import load_variants

    recipe, variants = load_variants(
        options.recipe, options.overrides, options.methods, options.seeds
    )
    from symphony_moe import comparison as comparison_module
    from symphony_moe.reporting.comparison_table import describe

    again = {"resume": options.resume, "overwrite": options.overwrite}
    if options.prepare:
        folder = comparison_module.prepare_comparison(recipe, variants, options.out, **again)
        runs = [
            {"recipe": str(folder.recipe(method, seed)), "out": str(folder.run(method, seed).root)}
            for method, of_seeds in variants.items()
            for seed in of_seeds
        ]
        return {"runs": runs}, "\n".join(
            f"symphony run {run['recipe']} --out {run['out']}" for run in runs
        )
    # A SIGTERM ends this process as Ctrl-C does, and with it the run that it waits for.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        folder, entries, limits = comparison_module.compare(recipe, variants, options.out, **again)
    finally:
        signal.signal(signal.SIGTERM, before)
    paths = {"comparison": str(folder.comparison), "page": str(folder.page)}
    return {"comparison": entries, "paths": paths}, (
        f"{describe(entries, limits)}\n\ntable: {folder.comparison}\npage:  {folder.page}"
    )


def _demo(options: argparse.Namespace) -> Result:
    from symphony_moe import pipeline
    from symphony_moe.bundled import demo_recipe
    from symphony_moe.recipe.load import load_recipe
    from symphony_moe.runs.folder import refuse_existing

    recipe = load_recipe(demo_recipe(), options.overrides)
    # The paper's method beside ours: the same sources, text and training.
    paper_recipe = load_recipe(demo_recipe(), [*options.overrides, "method=symphony"])
    paper_out = options.out.with_name(f"{options.out.name}-paper")
    again = {"resume": options.resume, "overwrite": options.overwrite}
    refuse_existing(paper_out, resume=options.resume, overwrite=options.overwrite)
    folder = pipeline.run(recipe, options.out, **again)
    paper = pipeline.run(paper_recipe, paper_out, **again)
    metrics, paper_metrics = (run.read_json(run.metrics) for run in (folder, paper))
    losses = {stage: paper_metrics[stage] for stage in ("built", "trained")}
    texts = pipeline.generate(folder)
    shown = "\n".join(f"\n[{domain}] {prompt!r}\n    -> {text!r}" for domain, prompt, text in texts)
    table = loss_table(metrics, {f"paper's, {stage}": of for stage, of in losses.items()})
    return (
        metrics
        | {"paths": _paths(folder), "continuations": texts}
        | {"paper": losses | {"paths": _paths(paper)}},
        f"{table}\n\nHeld-out prompts, continued by the trained model:\n{shown}\n\n"
        f"model:  {folder.trained}\nreport: {folder.report}\ntry:    {_one_liner(folder)}",
    )


def _one_liner(folder: "RunFolder") -> str:
    """A command that prompts the model through transformers alone."""
    code = (
        "from transformers import pipeline; "
        f"print(pipeline('text-generation', '{folder.trained}')('def main(')[0]['generated_text'])"
    )
    return f'{sys.executable} -c "{code}"'


def _paths(folder: "RunFolder") -> dict[str, str]:
    parts = ("checkpoint", "trained", "report")
    return {part: str(getattr(folder, part)) for part in parts}


def describe_plan(plan: "Plan") -> str:
    """A plan for people."""
    from symphony_moe.building.plan import in_words

    total, active = plan.total_parameters, plan.active_parameters
    lines = [
        f"{len(plan.sources)} x {plan.family} -> {plan.architecture}",
        f"  parameters  {total:,} in total, {active:,} active per token",
        f"  on disk     {plan.disk_bytes / 1e9:.3f} GB in {plan.dtype}, {plan.shards} file(s); "
        f"{plan.work_bytes / 1e9:.3f} GB more until stage 1 ends",
        f"  memory      about {plan.peak_memory_bytes / 1e9:.1f} GB at the peak of stage 1",
        f"  time        about {_duration(plan.seconds)} for stage 1 on this machine",
        "sources",
    ]
    for source in plan.sources:
        anchor = ", anchor" if source["anchor"] else ""
        lines.append(
            f"  {source['name']}: {in_words(source)} ({source['parameters']:,} parameters, "
            f"{source['dtype']}{anchor})"
        )
    lines += ["read by", *(f"  {reading}" for reading in plan.readers)]
    lines.append("differences" if plan.differences else "no differences between the sources")
    lines += [f"  {d.verdict}: {d}" for d in plan.differences]
    if plan.notes:
        lines += ["notes", *(f"  {note}" for note in plan.notes)]
    # What they repeat of a source's files may be as long as its author liked.
    return "\n".join(shown(line, 2000) for line in lines)


def describe_tasks(tasks: Mapping[str, Any]) -> str:
    """Results of benchmarks: a row per task and metric, a column per model."""
    from symphony_moe.reporting.run_page import task_table

    table = task_table(tasks, list(tasks))
    assert table is not None
    rows = [["task", "metric", "examples", "documents", *table.models]]
    rows += [[r.task, r.metric, r.examples, r.documents, *r.values] for r in table.rows]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip()
        for row in rows
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def loss_table(
    metrics: dict[str, Any], others: Mapping[str, dict[str, float | None]] | None = None
) -> str:
    """Held-out losses: a row per model, a column per domain. `others`: further models' rows."""
    names = list(metrics["sources"])
    models = dict(metrics["sources"])
    models |= {stage: metrics[stage] for stage in ("built", "trained") if stage in metrics}
    models |= others or {}
    domains = list(next(iter(models.values())))
    out = [domain for domain in domains if domain not in names]

    def mean(losses: dict[str, float | None], of: list[str]) -> float:
        values = (losses[domain] for domain in of)
        return sum(math.nan if value is None else value for value in values) / len(of)

    width = max(len(word) for word in [*models, "nats per token"]) + 2
    columns = [*domains, "mean", *(["mean out"] if out else [])]
    sizes = [max(len(column), 8) + 2 for column in columns]
    head = "nats per token".ljust(width)
    lines = [head + "".join(c.rjust(s) for c, s in zip(columns, sizes, strict=True))]
    for model, losses in models.items():
        values = [mean(losses, [domain]) for domain in domains]
        values += [mean(losses, group) for group in (names, out) if group]
        cells = (f"{value:.3f}".rjust(size) for value, size in zip(values, sizes, strict=True))
        lines.append(model.ljust(width) + "".join(cells))
    if out:
        lines.append(f"out of domain: {', '.join(out)}")
    return "\n".join(lines)
