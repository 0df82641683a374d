"""The command `symphony`: one function per command, and the only place that makes exit codes.

0 done, 1 our bug, 2 the user's mistake (a message without a traceback). Results go to stdout, logs
to stderr. `typer` makes the command line of the functions' annotations; a function returns what
`--json` prints and what people read. torch and transformers are imported when a command runs, so
that `--help` answers at once.
"""

import inspect
import io
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperCommand, TyperGroup

from symphony_moe import __version__
from symphony_moe.console import (
    describe_build,
    describe_examination,
    describe_plan,
    describe_tasks,
    is_terminal,
    log_handler,
    losses_as_table,
    next_command,
    progress_bar,
    standing_as_table,
)
from symphony_moe.errors import (
    RecipeError,
    SymphonyError,
    UploadError,
    first_line,
    is_text,
    shortened,
    shown,
)
from symphony_moe.machine import (
    is_launched,
    is_out_of_memory,
    is_out_of_room,
    is_refusal,
    process_number,
    use_device,
)
from symphony_moe.progress import Listener, ignore

if TYPE_CHECKING:
    from symphony_moe.recipe.mergekit import Imported
    from symphony_moe.runs.folder import RunFolder
    from symphony_moe.sources.proposal import Proposal

DEMO_OUT = "symphony-demo"

_COMPLETING = "_SYMPHONY_COMPLETE"
"""The variable by which a shell asks what a command line may go on with."""

Result = tuple[Any, str]
"""(for --json, for people)."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the process's exit code. SystemExit for a mistyped command line. Without a
    command it shows the help."""
    words = [str(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that is no text is shown as its escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _refuse_bytes(words)
    except RecipeError as error:
        return _fail(str(error), 2, as_json="--json" in words)
    if not words and _COMPLETING not in os.environ:
        _parse(["--help"])
        return 2  # a script that has lost its command is to notice
    parsed = _parse(words)
    return parsed if isinstance(parsed, int) else _perform(parsed)


def command_names() -> list[str]:
    """The commands that there are, in the order of the help."""
    return [command.name for command in _app.registered_commands if command.name]


def command_line() -> TyperGroup:
    """The whole command line, with the help of all commands."""
    return cast(TyperGroup, typer.main.get_command(_app))


# The command line


@dataclass(frozen=True)
class _Call:
    """A command line that has been understood."""

    command: Callable[..., Result]
    arguments: dict[str, Any]
    as_json: bool
    verbose: bool
    device: str | None = None


def _parse(words: list[str]) -> _Call | int:
    """What is to be done, or the exit code where that is done (`--help`, `--version`)."""
    try:
        parsed: _Call | int = command_line().main(
            words, prog_name="symphony", standalone_mode=False
        )
        return 2 if parsed == 1 else parsed  # 1: a shell that typer has no completion for
    except typer.TyperException as error:
        _refuse_usage(error, as_json="--json" in words)
    except SystemExit as ended:
        if _COMPLETING in os.environ:
            return int(ended.code or 0)  # fish is told by it whether to complete names of files
        return 0  # the reader of the help has gone: typer ends with 1
    except OSError as error:  # the help is written to a disk that is full
        return _fail(first_line(error), 2, as_json=False)


def _refuse_usage(error: typer.TyperException, *, as_json: bool) -> NoReturn:
    """Say what is wrong with a command line and where its help is; SystemExit."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "symphony"
    pieces = context.command.collect_usage_pieces(context) if context else ["COMMAND"]
    if process_number() == 0:  # all that a launcher has started have the same command line
        print(f"usage: {' '.join([path, *pieces])}", file=sys.stderr)
        message = shown(error.format_message(), 300).removesuffix(".")
        message = f"{message}; `{path} --help` says more"
        if as_json:
            print(_json({"error": message}))
        print(f"symphony: error: {message}", file=sys.stderr)
    sys.exit(2)


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an option in the place of another's value: its value was forgotten."""
        valued = {name for option in self.params for name in option.opts} - {
            name
            for option in self.params
            if getattr(option, "is_flag", True)
            for name in option.opts
        }
        for option, value in pairwise(takewhile(lambda word: word != "--", args)):
            if option in valued and value.startswith("-") and value != "-":
                ctx.fail(f"Option {option!r} expects a value, got {value!r}.")
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`RECIPE`, where typer writes `{RECIPE}`."""
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def get_help_option(self, ctx: Any) -> Any:
        return _with_default(super().get_help_option(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _choose_help(self)
        super().format_help(ctx, formatter)


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        for option in self.params:  # those that typer has added, for completion, have none
            _with_default(option)
        return super().get_params(ctx)

    def get_help_option(self, ctx: Any) -> Any:
        return _with_default(super().get_help_option(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _choose_help(self)
        super().format_help(ctx, formatter)


def _with_default(option: Any) -> Any:
    """An option that is False where it is not given: for None, typer imports pydantic."""
    if option is not None:
        option.default = False
    return option


def _choose_help(command: TyperCommand | TyperGroup) -> None:
    """Panels and colours for a terminal, plain text for everything else. Panels in a narrow one
    would break the names of options."""
    drawn = is_terminal(sys.stdout) and shutil.get_terminal_size().columns >= 80
    command.rich_markup_mode = "rich" if drawn else None


_app = typer.Typer(
    cls=_Group,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="COMMAND",
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit
    return wanted


@_app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Turn several checkpoints of one model family into one Mixture-of-Experts checkpoint."""


def _device(text: str | None) -> str | None:
    if text is None or re.fullmatch(r"cpu|cuda(:\d{1,3})?", text):
        return text
    raise typer.BadParameter(f"expected cpu, cuda or cuda:N, got {text!r}")


def _model(text: str | None) -> str | None:
    if text in (None, "checkpoint", "trained"):
        return text
    raise typer.BadParameter(f"expected checkpoint or trained, got {text!r}")


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more, to stderr.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        callback=_device,
        help="Where to compute: cpu, cuda or cuda:N. Default: the GPU if there is one.",
    ),
]


_RUNS_MODELS = {
    *("demo", "run", "build", "verify", "train", "evaluate", "compare"),
    *("add", "replace"),
}
"""The commands that can be told where to compute."""


def _command(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add a function to the commands, with the options that every command has, and with `--device`
    where it runs models. Its arguments are the user's, but for `progress`, which the command line
    gives it."""

    def parsed(as_json: bool, verbose: bool, device: str | None = None, **arguments: Any) -> _Call:
        return _Call(function, arguments, as_json, verbose, device)

    own = inspect.signature(function).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    common = [
        inspect.Parameter("as_json", keyword, default=False, annotation=Json),
        inspect.Parameter("verbose", keyword, default=False, annotation=Verbose),
    ]
    if function.__name__ in _RUNS_MODELS:
        common.insert(0, inspect.Parameter("device", keyword, default=None, annotation=Device))
    parameters = [*(one for one in own if one.name != "progress"), *common]
    # Typer reads the signature; mypy knows no such attribute of a function.
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {one.name: one.annotation for one in parameters}
    parsed.__doc__ = function.__doc__
    _app.command(function.__name__.removesuffix("_"), cls=_Command)(parsed)
    return function


class Names(tuple[str, ...]):
    """Words that were given with commas between them, each once."""


class Seeds(tuple[int, ...]):
    """Numbers that were given with commas between them, each once."""


def _names(text: str) -> Names:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise typer.BadParameter("expected names with commas between them")
    return Names(dict.fromkeys(words))


def _seeds(text: str) -> Seeds:
    words = _names(text)
    if not all(word.isdecimal() and int(word) < 2**32 for word in words):
        raise typer.BadParameter(f"expected numbers such as 1,2,3, got {text!r}")
    return Seeds(map(int, words))


class Size(int):
    """Bytes, with the words that they were given in."""

    words: str


def _size(text: str) -> Size:
    from symphony_moe.recipe.settings import parse_size

    try:
        size = Size(parse_size(text, "--memory"))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    size.words = text.strip()
    return size


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"expected a number above zero, got {text!r}")
    return int(text)


def _one_of_two(ctx: Any, param: Any, value: bool) -> bool:
    other = {"resume": "overwrite", "overwrite": "resume"}[param.name]
    if value and ctx.params.get(other):
        raise typer.BadParameter(f"not allowed with --{other}")
    return value


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")]
NewFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder to make.")]
ExpertName = Annotated[str, typer.Argument(metavar="NAME", help="The expert's name.")]
Model = Annotated[
    str, typer.Option(metavar="MODEL", help="The expert's model: a folder, hub id or bundled:NAME.")
]
TextFiles = Annotated[
    list[str],
    typer.Option(metavar="FILE", help="Text of its domain. May be given repeatedly."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="A.B=C", help="Override a setting of the recipe. May be given repeatedly."
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", callback=_one_of_two, help="Go on where a run was cut short."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", callback=_one_of_two, help="Replace what is there.")
]
NewRecipe = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE", help="Recipe file to write. Default: it is printed on stdout."
    ),
]
Memory = Annotated[
    Size | None,
    typer.Option(
        parser=_size,
        metavar="SIZE",
        help="Memory that stage 1 may take, such as 8GB. Where it needs more, hidden states wait "
        "on the disk. Default: 2 GiB of them wait in memory.",
    ),
]
SourcesFrom = Annotated[
    Path | None,
    typer.Option(
        "--sources-from",
        metavar="DIR",
        help="A run of the same sources. Take the sources' losses and CKA from it instead of "
        "measuring them again, if the held-out text is the same.",
    ),
]


# Running a command


def _perform(call: _Call) -> int:
    """Run a command; the process's exit code."""
    is_sent = call.command is push and not call.as_json and is_terminal(sys.stderr)
    handler = _log(call.verbose, bars=call.verbose or is_sent)
    try:
        _refuse_processes(call)
        if call.device is not None:
            use_device(call.device)
        with _listening(call, handler) as more:
            result, text = call.command(**call.arguments, **more)
        if process_number() == 0:
            print(_json(result) if call.as_json else text, flush=True)
        return 0
    except SymphonyError as error:
        return _fail(str(error), 2, as_json=call.as_json)
    except KeyboardInterrupt:
        again = "; the same command with --resume goes on" if "resume" in call.arguments else ""
        return _fail(f"interrupted{again}", 130, as_json=call.as_json)
    except BrokenPipeError:
        # The reader of our output (such as `head`) has gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _fail_unforeseen(error, call)


def _fail_unforeseen(error: Exception, call: _Call) -> int:
    """The exit code for an error that no check of ours has raised."""
    if is_out_of_memory(error):
        message = f"out of memory: {first_line(error)}{_less_memory(call)}"
        return _fail(message, 2, as_json=call.as_json)
    if is_out_of_room(error):
        return _fail(_no_room(error, call), 2, as_json=call.as_json)
    if is_refusal(error):
        message = first_line(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        return _fail(message, 2, as_json=call.as_json)
    if not _speaks():
        return 1
    traceback.print_exception(error)
    message = f"a bug in symphony-moe: {type(error).__name__}: {error}"
    return _fail(message, 1, as_json=call.as_json)


def _no_room(error: Exception, call: _Call) -> str:
    """Where nothing more could be written, and what to do. What a library writes names no file."""
    named = getattr(error, "filename", None)
    place = named or call.arguments.get("out") or call.arguments.get("folder")
    again = " and go on with --resume" if "resume" in call.arguments else ""
    where = f"{place}: " if place else ""
    return f"{where}nothing more can be written: {first_line(error)}. Make room on the disk{again}"


@contextmanager
def _listening(call: _Call, handler: logging.StreamHandler[Any]) -> Iterator[dict[str, Listener]]:
    """The `progress` of a command that has one: a bar, where a person looks at stderr."""
    if "progress" not in inspect.signature(call.command).parameters:
        yield {}
    elif call.as_json or call.verbose or process_number() > 0 or not is_terminal(sys.stderr):
        yield {"progress": ignore}
    else:
        with progress_bar(handler) as draw:
            yield {"progress": draw}


def _json(result: Any) -> str:
    from symphony_moe.files import to_json

    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return to_json(result, ascii_only=encoding.lower().replace("-", "") != "utf8")


def _less_memory(call: _Call) -> str:
    """What would need less memory."""
    setting = {
        build: "calibration.tokens",
        train: "train.batch_size",
        evaluate: "evaluation.sequence_length",
    }.get(call.command)
    return f". A smaller {setting} needs less" if setting else ""


def _refuse_bytes(words: list[str]) -> None:
    """The weights' file format knows no paths that are not text, and no output could name them."""
    for word in words:
        if not is_text(word):
            raise RecipeError(
                f"the argument {shortened(ascii(word), 200)} is not UTF-8 text; "
                "rename what it names"
            )


def _refuse_processes(call: _Call) -> None:
    """Two processes of anything but a build or a training would write the same files."""
    if not is_launched():
        return
    if call.command not in (build, train):
        raise RecipeError(
            "only `symphony build` and `symphony train` run in several processes; start this "
            "command without `torchrun` or `accelerate launch`"
        )
    if call.device is not None and ":" in call.device:
        raise RecipeError(
            f"--device {call.device}: each of several processes takes a GPU of its own; say "
            "--device cuda, or name the GPUs in CUDA_VISIBLE_DEVICES"
        )


def _speaks() -> bool:
    """Whether this process says what has failed: of several the one that failed first."""
    if not is_launched():
        return True
    from symphony_moe.processes import is_first_to_fail

    return is_first_to_fail()


def _fail(message: str, code: int, *, as_json: bool) -> int:
    if not _speaks():
        return code
    message = shown(message)
    with suppress(OSError):  # the disk that is full may be the one that this is written to
        if as_json:
            print(_json({"error": message}))
        print(f"symphony: error: {message}", file=sys.stderr)
    return code


def _log(verbose: bool, *, bars: bool) -> logging.StreamHandler[Any]:
    """Set up this process's logging; the handler that writes to stderr. `bars`: the libraries may
    draw theirs."""
    package = logging.getLogger("symphony_moe")
    package.setLevel(logging.DEBUG if verbose else logging.INFO)
    if process_number() > 0:
        package.setLevel(logging.ERROR)  # the first process speaks for all
    handler = log_handler(every_step=verbose)
    package.handlers = [handler]
    package.propagate = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        # Their notices are about their own calls; ours are checked where they matter.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|datasets)\.")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    return handler


# The commands


@_command
def demo(
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Run folder to make.", show_default=True)
    ] = Path(DEMO_OUT),
    resume: Resume = False,
    overwrite: Overwrite = False,
    overrides: Overrides = None,
    progress: Listener = ignore,
) -> Result:
    """Do everything once, on the bundled tiny sources."""
    from symphony_moe import pipeline
    from symphony_moe.bundled import demo_recipe
    from symphony_moe.recipe.load import load_recipe
    from symphony_moe.runs.folder import refuse_existing

    sets = overrides or []
    recipe = load_recipe(demo_recipe(), sets)
    # The paper's method beside ours: the same sources, text and training.
    paper_recipe = load_recipe(demo_recipe(), [*sets, "method=symphony"])
    paper_out = out.with_name(f"{out.name}-paper")
    refuse_existing(paper_out, resume=resume, overwrite=overwrite)
    folder, paper = (
        pipeline.run(one, where, resume=resume, overwrite=overwrite, progress=progress)
        for one, where in ((recipe, out), (paper_recipe, paper_out))
    )
    metrics, paper_metrics = (run.read_json(run.metrics) for run in (folder, paper))
    losses = {stage: paper_metrics[stage] for stage in ("built", "trained")}
    texts = pipeline.generate(folder)
    lines = "\n".join(f"\n[{domain}] {prompt!r}\n    -> {text!r}" for domain, prompt, text in texts)
    table = _losses_as_text(metrics, {f"paper's, {stage}": of for stage, of in losses.items()})
    return (
        metrics
        | {"paths": _paths(folder), "continuations": texts}
        | {"paper": losses | {"paths": _paths(paper)}},
        f"{table}\n\nHeld-out prompts, continued by the trained model:\n{lines}\n\n"
        f"model:  {folder.trained}\nreport: {folder.report}\ntry:    {_one_liner(folder)}\n"
        f"{next_command('init', 'MODEL', 'MODEL', '--out', 'recipe.yaml')}",
    )


@_command
def doctor() -> Result:
    """Say what this machine has, and what to mend: versions, devices, memory, disk, hub."""
    from symphony_moe.doctor import examine

    found = examine()
    return found.to_json(), describe_examination(found)


@_command
def init(
    *,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Folders, GGUF files or hub ids, two or more."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME=FILE",
            help="Text of a source, which is named after its folder. May be given repeatedly.",
        ),
    ] = None,
    out: NewRecipe = None,
    overwrite: Overwrite = False,
) -> Result:
    """Look at models and text, and write a recipe for them."""
    _refuse_existing_file(out, overwrite=overwrite)
    from symphony_moe.sources.kinship import kinship
    from symphony_moe.sources.proposal import propose_recipe

    made = propose_recipe(models, _text_of_sources(data or ()), out.parent if out else Path())
    facts = {
        "method": made.method,
        "likeness": made.likeness,
        "kinship": {name: kinship(cosine) for name, cosine in made.likeness.items()},
    }
    return _with_recipe(made, out, facts)


@_command
def import_(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe of mergekit-moe (YAML).")],
    out: NewRecipe = None,
    overwrite: Overwrite = False,
) -> Result:
    """Write a recipe that does what one of mergekit-moe does."""
    _refuse_existing_file(out, overwrite=overwrite)
    from symphony_moe.recipe.mergekit import import_mergekit

    return _with_recipe(import_mergekit(file, out.parent if out else Path()), out, {})


@_command
def plan(
    *,
    recipe: RecipeFile,
    memory: Memory = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the plan as a page too."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page.")] = False,
    overrides: Overrides = None,
) -> Result:
    """Say what a build will do. Reads headers and a few rows of weights. Writes a page at most."""
    if overwrite and html is None:
        raise RecipeError("--overwrite: has no effect without --html")
    _refuse_existing_file(html, overwrite=overwrite, option="--html", what="a page")
    from symphony_moe.recipe.load import load_recipe
    from symphony_moe.recipe.variants import load_variants

    loaded = load_recipe(recipe, overrides or ())
    if loaded.compare.variants or loaded.compare.methods:
        load_variants(recipe, overrides or ())  # what `compare` would refuse of them
    from symphony_moe import pipeline

    planned = pipeline.plan(loaded, memory=memory)
    content, text = planned.to_json(), describe_plan(planned)
    if html is not None:
        from symphony_moe.files import write_text
        from symphony_moe.reporting.plan_page import render_plan

        write_text(html, render_plan(content, loaded))
        content, text = content | {"paths": {"page": str(html)}}, f"{text}\nwrote {html}"
    same = [word for override in overrides or () for word in ("--set", override)]
    if memory is not None:
        same += ["--memory", memory.words]
    return content, f"{text}\n{next_command('build', recipe, '--out', 'run', *same)}"


@_command
def build(
    *,
    recipe: RecipeFile,
    out: NewFolder,
    resume: Resume = False,
    overwrite: Overwrite = False,
    memory: Memory = None,
    overrides: Overrides = None,
    progress: Listener = ignore,
) -> Result:
    """Stage 1: merge the sources into checkpoint/, without training."""
    from symphony_moe.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from symphony_moe import pipeline
    from symphony_moe.processes import together

    with together() as processes:
        folder = pipeline.build(
            loaded,
            out,
            resume=resume,
            overwrite=overwrite,
            memory=memory,
            progress=progress,
            processes=processes,
        )
    if process_number() > 0:
        return {}, ""  # the first process says what there is
    metrics = folder.read_json(folder.metrics)
    said = describe_build(metrics), f"built {folder.checkpoint}", next_command("verify", out)
    text = "\n".join(filter(None, said))
    return metrics | {"paths": {"checkpoint": str(folder.checkpoint)}}, text


@_command
def add(
    *,
    folder: Folder,
    name: ExpertName,
    model: Model,
    data: TextFiles,
    out: NewFolder,
    resume: Resume = False,
    overwrite: Overwrite = False,
    overrides: Overrides = None,
    progress: Listener = ignore,
) -> Result:
    """Add an expert to a finished run, in a new run folder. Everything else is kept."""
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    run = pipeline.add(
        RunFolder(folder),
        name,
        out,
        model=model,
        data=_data(data),
        overrides=overrides or (),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    return _changed(run)


@_command
def remove(
    *,
    folder: Folder,
    name: ExpertName,
    out: NewFolder,
    resume: Resume = False,
    overwrite: Overwrite = False,
    overrides: Overrides = None,
    progress: Listener = ignore,
) -> Result:
    """Leave an expert of a finished run out, in a new run folder. Everything else is kept."""
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    run = pipeline.remove(
        RunFolder(folder),
        name,
        out,
        overrides=overrides or (),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    return _changed(run)


@_command
def replace(
    *,
    folder: Folder,
    name: ExpertName,
    model: Model,
    data: TextFiles,
    out: NewFolder,
    resume: Resume = False,
    overwrite: Overwrite = False,
    overrides: Overrides = None,
    progress: Listener = ignore,
) -> Result:
    """Put another model in an expert's place, in a new run folder. Everything else is kept."""
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    run = pipeline.replace(
        RunFolder(folder),
        name,
        out,
        model=model,
        data=_data(data),
        overrides=overrides or (),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    return _changed(run)


@_command
def train(
    *,
    folder: Folder,
    resume: Resume = False,
    overwrite: Overwrite = False,
    overrides: Overrides = None,
    progress: Listener = ignore,
) -> Result:
    """Stage 2: train checkpoint/ and write trained/."""
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    run = RunFolder(folder)
    pipeline.train(run, overrides or (), resume=resume, overwrite=overwrite, progress=progress)
    if is_launched():
        from symphony_moe.processes import leave

        leave()
    if process_number() > 0:
        return {}, ""  # the first process may still be writing
    training = run.read_json(run.metrics)["training"]
    made = f"trained {run.trained}: {training['steps']} steps, {training['seconds']:.0f} s"
    text = f"{made}{_losses_of_training(training)}\n{next_command('evaluate', folder)}"
    return {"training": training, "paths": {"trained": str(run.trained)}}, text


@_command
def evaluate(
    *,
    folder: Folder,
    tasks: Annotated[
        Names | None,
        typer.Option(
            parser=_names,
            metavar="A,B:N",
            help="Run benchmarks of lm-evaluation-harness instead. `:N` puts N examples into the "
            "prompt.",
        ),
    ] = None,
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with tasks of your own (YAML).")
    ] = None,
    models: Annotated[
        Names | None,
        typer.Option(
            parser=_names,
            metavar="A,B",
            help="Models to ask: built, trained, a source's name, or `sources` for all of those. "
            "Default: built,trained.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(parser=_count, metavar="N", help="Documents per task. Default: all."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Apply the chat template to the prompts.")
    ] = False,
    unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code",
            help="Let tasks such as humaneval run the code that the model writes.",
        ),
    ] = False,
    sources_from: SourcesFrom = None,
    overrides: Overrides = None,
    progress: Listener = ignore,
) -> Result:
    """Measure held-out losses and routing, or run benchmarks."""
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    run = RunFolder(folder)
    if tasks is None:
        for_tasks = {
            "include": include,
            "models": models,
            "limit": limit,
            "chat-template": chat_template,
            "confirm-run-unsafe-code": unsafe_code,
        }
        for name, value in for_tasks.items():
            if value:
                raise RecipeError(f"--{name}: has no effect without --tasks")
        like = _like(sources_from)
        found = pipeline.evaluate(run, overrides or (), like=like, progress=progress)
        metrics = found.to_json()
        return metrics, f"{_losses_as_text(metrics)}\n\n{next_command('report', folder)}"
    if sources_from:
        raise RecipeError("--sources-from: has no effect with --tasks")
    if overrides:
        raise RecipeError(f"--set {overrides[0]}: has no effect with --tasks")
    results = pipeline.evaluate_tasks(
        run,
        tasks,
        include=include,
        models=models or (),
        limit=limit,
        chat_template=chat_template,
        unsafe_code=unsafe_code,
    )
    return {"tasks": results}, f"{describe_tasks(results)}\n\n{next_command('report', folder)}"


@_command
def report(*, folder: Folder) -> Result:
    """Write report.html from metrics.json."""
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    run = RunFolder(folder)
    path = pipeline.report(run)
    return {"paths": {"report": str(path)}}, f"wrote {path}\n{_next_step(run)}"


@_command
def run(
    *,
    recipe: RecipeFile,
    out: NewFolder,
    resume: Resume = False,
    overwrite: Overwrite = False,
    memory: Memory = None,
    sources_from: SourcesFrom = None,
    overrides: Overrides = None,
    progress: Listener = ignore,
) -> Result:
    """Build, verify, train, evaluate and report."""
    from symphony_moe.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from symphony_moe import pipeline

    folder = pipeline.run(
        loaded,
        out,
        resume=resume,
        overwrite=overwrite,
        memory=memory,
        like=_like(sources_from),
        progress=progress,
    )
    metrics = folder.read_json(folder.metrics)
    return (
        metrics | {"paths": _paths(folder)},
        f"{_losses_as_text(metrics)}\n\nmodel:  {folder.trained}\nreport: {folder.report}\n"
        f"try:    {_one_liner(folder)}\n{_next_step(folder)}",
    )


@_command
def compare(
    *,
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make.")],
    methods: Annotated[
        Names | None,
        typer.Option(
            parser=_names,
            metavar="A,B,...",
            help="Presets, or names under compare.variants. Default: compare.methods, or all "
            "presets.",
        ),
    ] = None,
    seeds: Annotated[
        Seeds | None,
        typer.Option(parser=_seeds, metavar="1,2,...", help="Default: compare.seeds."),
    ] = None,
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare",
            help="Write the recipe of every run and print the commands, but run nothing. They may "
            "run anywhere and in any order. Afterwards --resume without --prepare makes the table.",
        ),
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    overrides: Overrides = None,
) -> Result:
    """Run several methods on the same sources and make one table."""
    from symphony_moe.recipe.variants import load_variants

    loaded, variants = load_variants(recipe, overrides or (), methods, seeds)
    from symphony_moe import comparison
    from symphony_moe.reporting.comparison_table import comparison_as_text

    if prepare:
        folder = comparison.prepare_comparison(
            loaded, variants, out, resume=resume, overwrite=overwrite
        )
        runs = [
            {"recipe": str(folder.recipe(method, seed)), "out": str(folder.run(method, seed).root)}
            for method, of_seeds in variants.items()
            for seed in of_seeds
        ]
        return {"runs": runs}, "\n".join(
            shlex.join(["symphony", "run", one["recipe"], "--out", one["out"]]) for one in runs
        )
    # A SIGTERM ends this process as Ctrl-C does, and with it the run that it waits for.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Each run is a command of its own, which draws its own bar.
        folder, entries, limits = comparison.compare(
            loaded, variants, out, resume=resume, overwrite=overwrite
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    paths = {"comparison": str(folder.comparison), "page": str(folder.page)}
    return {"comparison": entries, "paths": paths}, (
        f"{comparison_as_text(entries, limits)}\n\ntable: {folder.comparison}\npage:  {folder.page}"
    )


@_command
def verify(
    *,
    folder: Folder,
    deep: Annotated[
        bool, typer.Option("--deep", help="Build again and compare every tensor.")
    ] = False,
    parent: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run that this one was made of by add, remove or replace. Default: the folder "
            "of its name beside DIR.",
        ),
    ] = None,
) -> Result:
    """Check a finished run against its sources and stock transformers."""
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder

    old = None if parent is None else RunFolder(parent)
    checks = pipeline.verify(RunFolder(folder), deep=deep, parent=old)
    lines = [f"{name}: {found}" for name, found in checks.items()]
    unseen = checks.get("old run", "found").startswith("what was kept")
    end = "verified, but not against the old run (--parent DIR)" if unseen else "verified"
    text = "\n".join([*lines, end, _next_step(RunFolder(folder))])
    return {"verified": True, "checks": checks}, text


@_command
def push(
    *,
    folder: Folder,
    repo_id: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub to make or update.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Default: main.")
    ] = None,
    what: Annotated[
        str | None,
        typer.Option(
            "--what",
            metavar="MODEL",
            callback=_model,
            help="checkpoint or trained. Default: trained, if the run is trained.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")
    ] = False,
) -> Result:
    """Send a finished model to the Hugging Face Hub, with a model card."""
    from symphony_moe import pipeline
    from symphony_moe.runs.folder import RunFolder
    from symphony_moe.uploading import MAIN

    try:
        sent = pipeline.push(
            RunFolder(folder),
            repo_id,
            private=private,
            revision=revision or MAIN,
            what=what,
            dry_run=dry_run,
        )
    except UploadError:
        if is_terminal(sys.stderr):
            print(file=sys.stderr)  # the client may have left a bar there
        raise
    return sent.to_json(), sent.url or f"nothing is sent; its README.md would be\n\n{sent.card}"


def _refuse_existing_file(
    out: Path | None, *, overwrite: bool, option: str = "--out", what: str = "a recipe file"
) -> None:
    """RecipeError for a file that cannot be written, before anything is read. `option`: names it;
    `what`: it is to be."""
    if out is None:
        return
    if out.is_dir() or not out.parent.is_dir():
        why = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise RecipeError(f"{option} {out}: {why}; expected the name of {what} to write")
    if out.exists() and not overwrite:
        raise RecipeError(f"{option} {out}: exists; choose another, or --overwrite it")
    if not os.access(out.parent, os.W_OK):
        raise RecipeError(f"{option} {out}: nothing can be written there; choose another folder")


def _text_of_sources(data: Iterable[str]) -> dict[str, list[str]]:
    """Source -> files, of `--data NAME=FILE`."""
    found: dict[str, list[str]] = {}
    for one in data:
        name, _, file = one.partition("=")
        if not name or not file:
            raise RecipeError(
                f"--data {shortened(one, 100)}: expected NAME=FILE, such as code=data/code.jsonl"
            )
        found.setdefault(name, []).append(file)
    return found


def _with_recipe(made: "Imported | Proposal", out: Path | None, facts: dict[str, Any]) -> Result:
    """What a command says that has made a recipe, which is written to `out`."""
    result = {"recipe": made.recipe, "notes": made.notes, "fill_in": made.fill_in} | facts
    if out is None:
        return result, made.recipe.rstrip("\n")
    from symphony_moe.files import write_text

    write_text(out, made.recipe)
    lines = [f"wrote {out}"]
    if "method" in facts:
        from symphony_moe.sources.kinship import two_digits

        likeness = facts["likeness"].items()
        said = ", ".join(f"{name} {two_digits(cosine)}" for name, cosine in likeness)
        lines.append(
            f"  method {facts['method']}; mean cosine of the anchor's weights and theirs: "
            f"{said or 'not known, as weights are not here'}"
        )
    lines += [shown(f"  {note}", 2000) for note in made.notes]
    if made.fill_in:
        lines.append(f"fill in {', '.join(made.fill_in)}; then: symphony plan {out}")
    else:
        lines.append(next_command("plan", out))
    return result | {"paths": {"recipe": str(out)}}, "\n".join(lines)


def _data(files: list[str]) -> str | list[str]:
    """Text as a recipe has it: one file, or a list of them."""
    return files[0] if len(files) == 1 else files


def _losses_of_training(training: Mapping[str, Any]) -> str:
    """The losses between which a training went, where there are two."""
    losses = [point["loss"] for point in training["curve"]]
    if len(losses) < 2:
        return ""
    return f"; training loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last"


def _changed(folder: "RunFolder") -> Result:
    """What is said of a run whose experts were changed."""
    about = folder.read_json(folder.manifest)["parent"]
    kept, made = (", ".join(about[part]["experts"]) or "none" for part in ("kept", "made"))
    return (
        {"parent": about, "paths": {"checkpoint": str(folder.checkpoint)}},
        f"built {folder.checkpoint}\nkept of {about['folder']}/{about['model']}: backbone, experts "
        f"{kept}\nmade: {made}\n{next_command('verify', folder.root)}",
    )


def _losses_as_text(
    metrics: Mapping[str, Any], others: Mapping[str, dict[str, float | None]] | None = None
) -> str:
    """All losses, and what they come to."""
    return f"{losses_as_table(metrics, others)}\n\n{standing_as_table(metrics)}"


def _like(sources_from: Path | None) -> "RunFolder | None":
    """The run of `--sources-from`, checked before anything is built that it is wanted for."""
    from symphony_moe.runs.folder import RunFolder

    if sources_from is None:
        return None
    like = RunFolder(sources_from)
    like.require_checkpoint()
    like.read_recipe()
    for path in (like.manifest, like.metrics):
        like.read_json(path)
    return like


def _next_step(run: "RunFolder") -> str:
    """What to do with a run as it is."""
    if not run.trained.is_dir():
        return next_command("train", run.root)
    if "trained" not in run.read_json(run.metrics):
        return next_command("evaluate", run.root)
    if not run.report.is_file():
        return next_command("report", run.root)
    return next_command("push", run.root, "OWNER/NAME")


def _one_liner(folder: "RunFolder") -> str:
    """A command that prompts the model through transformers alone."""
    code = (
        "from transformers import pipeline; "
        f"print(pipeline('text-generation', '{folder.trained}')('The ')[0]['generated_text'])"
    )
    return f'{sys.executable} -c "{code}"'


def _paths(folder: "RunFolder") -> dict[str, str]:
    parts = ("checkpoint", "trained", "report")
    return {part: str(getattr(folder, part)) for part in parts}
