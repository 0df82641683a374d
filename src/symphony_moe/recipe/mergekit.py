"""Recipes of mergekit-moe -> ours, with all that has no counterpart and what becomes of it.

mergekit-moe takes attention, embeddings and norms of one model and the FFNs of others. Its settings
are those of mergekit 0.1.5 (docs/moe.md there). It reads past settings that it does not know; here
they are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from symphony_moe.errors import RecipeError, shortened
from symphony_moe.recipe.draft import (
    FILL_IN_TEXT,
    comment,
    is_local,
    path_from,
    scalar,
    source_lines,
    source_names,
)
from symphony_moe.recipe.load import read_settings, refuse_unknown_keys, resolve_recipe
from symphony_moe.recipe.mistakes import describe_mistakes
from symphony_moe.recipe.settings import FILL_IN, Name, Real, Section, Whole
from symphony_moe.recipe.yaml_text import read_yaml, spelled


@dataclass(frozen=True)
class Imported:
    """A recipe that was made of another tool's."""

    recipe: str
    """Its text, with comments."""
    notes: list[str]
    """A sentence or two on each setting that has no counterpart, or not the same one."""
    fill_in: list[str]
    """The settings that its user must fill in before it loads."""


def import_mergekit(path: Path, folder: Path) -> Imported:
    """The recipe that does what a recipe of mergekit-moe does. `folder`: where it will lie; paths
    of models, which are from the current folder in the other, are from there in it.

    Raises RecipeError for a file that cannot be read, a recipe of another kind, a setting that
    mergekit-moe does not have, with the nearest that it has, and what no recipe of ours can be.
    """
    content = read_settings(path, "experts")
    _refuse_other_kinds(content, str(path))
    refuse_unknown_keys(content, _Theirs, str(path), "")
    for section in ("experts", "shared_experts"):
        experts = content.get(section)
        for number, expert in enumerate(experts if isinstance(experts, list) else ()):
            refuse_unknown_keys(expert, _Expert, str(path), f"{section}[{number}].")
    try:
        theirs = _Theirs.model_validate({k: v for k, v in content.items() if v is not None})
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe_mistakes(error)}") from None
    imported = _converted(theirs, path, folder)
    _refuse_what_would_not_load(imported.recipe, path, folder)
    return imported


# What mergekit-moe's recipes say


class _Expert(Section):
    source_model: Any
    positive_prompts: list[Name] | None = None
    negative_prompts: list[Name] | None = None
    noise_scale: Real | None = None
    residual_scale: Real | None = None


class _Theirs(Section):
    base_model: Any
    experts: list[_Expert] = Field(min_length=1, max_length=64)
    gate_mode: Literal[
        "hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"
    ] = "hidden"
    dtype: Name | None = None
    experts_per_token: Whole = Field(2, ge=1)
    shared_experts: list[_Expert] | None = None
    architecture: Name | None = None
    # Settings of mergekit's other recipes, which stand in many of mergekit-moe's.
    tokenizer_source: Any = None
    tokenizer: Any = None
    chat_template: Any = None
    out_dtype: Any = None
    parameters: Any = None


_OF_MERGES = ("merge_method", "slices", "models", "modules", "genome")
"""What only a recipe of another of mergekit's programs has."""

_READ_PAST = {
    "tokenizer_source": "here the anchor's tokenizer is used, and tokens that only others have are "
    "joined to it",
    "tokenizer": "here the anchor's tokenizer is used, and tokens that only others have are joined "
    "to it",
    "chat_template": "here output.chat names the source whose chat template the result has",
    "out_dtype": "here output.dtype says it",
    "parameters": "nothing here does what it might have meant",
}
"""Settings that mergekit-moe takes without reading them -> what there is here."""

_DTYPES = ("bfloat16", "float16", "float32")

_GATES = {
    "hidden": ("hidden", ""),
    "hidden_last": ("hidden", ""),
    "hidden_avg": ("hidden", ""),
    "cheap_embed": (
        "hidden",
        "There every layer has the same router, made of the prompts' token embeddings; here each "
        "layer has one of its own, made of its inputs.",
    ),
    "random": (
        "random",
        "There rows are drawn with a standard deviation of 1, here of 0.02: tokens begin spread "
        "over the experts more evenly.",
    ),
    "uniform_random": (
        "random",
        "There rows are drawn as for a linear layer (uniform, up to hidden size ** -0.5), here "
        "normal with a standard deviation of 0.02.",
    ),
}
"""gate_mode -> (router.init, what is otherwise)."""

_PROMPTS = (
    "positive_prompts, negative_prompts: no counterpart. There a router's row is made of an "
    "expert's prompts; here it is the mean router input of the text that `data` names. Prompts are "
    "too little text for that: name text like that which the expert is for. Nothing is subtracted "
    "for negative prompts: the other sources' text takes their place."
)

_ARCHITECTURES = {
    "mixtral": "mixtral",
    "qwen3 moe": "qwen3_moe",
    "qwen moe": "qwen2_moe",
    "deepseek moe": None,
}
"""mergekit-moe's name of an output, in small letters -> ours."""


def _refuse_other_kinds(content: Mapping[Any, Any], who: str) -> None:
    """RecipeError for a recipe that makes no MoE."""
    found = [key for key in _OF_MERGES if key in content]
    if found:
        value = spelled(content[found[0]])
        says = f": {shortened(value, 40)}" if isinstance(value, str) else ""
        raise RecipeError(
            f"{who}: is no mergekit-moe recipe: it has `{found[0]}{says}`, which makes one dense "
            "model of several. Expected base_model and experts. Make that model with mergekit, and "
            "name its folder as a source of a recipe here"
        )
    if "sources" in content:
        raise RecipeError(f"{who}: is a recipe of symphony already; it has `sources`")


# Model references


@dataclass(frozen=True)
class _Model:
    """What a recipe of mergekit's calls a model: `path@revision+lora@revision`, or a table."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def settings(self, folder: Path) -> dict[str, str | None]:
        """The source's settings in a recipe that lies in `folder`."""
        return {
            "model": _from(self.path, folder),
            "revision": self.revision,
            "adapter": None if self.adapter is None else _from(self.adapter, folder),
            "adapter_revision": self.adapter_revision,
        }

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


def _from(path: str, folder: Path) -> str:
    return path_from(path, folder) if is_local(path) else path


def _model(value: Any, where: str) -> _Model:
    """Raises RecipeError for what is no reference to a model; `where` names the setting."""
    table = value if isinstance(value, dict) else None
    if table is not None and table.keys() <= {"model", "lora", "override_architecture"}:
        model, lora = table.get("model"), table.get("lora")
    else:
        text = spelled(value)
        parts = text.split("+") if isinstance(text, str) else []
        model, lora = parts if len(parts) == 2 else (parts[0] if len(parts) == 1 else "", None)
        if lora == "":
            model = ""
    path, revision = _path(model)
    adapter, adapter_revision = _path(lora)
    if path is None or (lora and adapter is None):
        raise RecipeError(
            f"{where}: expected a folder or hub id, such as someone/model, someone/model@revision "
            f"or someone/model+someone/lora, got {shortened(repr(value), 80)}"
        )
    return _Model(path, revision, adapter, adapter_revision)


def _path(value: Any) -> tuple[str | None, str | None]:
    """(path or hub id, revision) of one part of a reference; None where there is none."""
    if isinstance(value, dict) and value.keys() <= {"path", "revision"}:
        path, revision = spelled(value.get("path")), spelled(value.get("revision"))
        return path or None, revision or None
    text = spelled(value)
    if not isinstance(text, str):
        return None, None
    path, at, revision = text.strip().partition("@")
    if "@" in revision or (at and not revision):
        return None, None
    return path or None, revision or None


# The conversion


def _converted(theirs: _Theirs, path: Path, folder: Path) -> Imported:
    base = _model(theirs.base_model, f"{path}: base_model")
    experts = [
        _model(expert.source_model, f"{path}: experts[{number}].source_model")
        for number, expert in enumerate(theirs.experts)
    ]
    is_expert = base in experts
    models = experts if is_expert else [base, *experts]
    names = source_names([str(model) for model in models])
    anchor = names[models.index(base)]
    described = theirs.experts if is_expert else [None, *theirs.experts]
    upcycled = set(models) == {base}
    notes = [
        *_notes_of_base(base, anchor, is_expert=is_expert),
        *_notes_of_experts(theirs, path, upcycled=upcycled),
        *_notes_of_router(theirs),
        *_notes_of_output(theirs, path),
    ]
    fill_in = [f"sources.{name}.data" for name in names]
    lines = [*_head(path, notes), "sources:"]
    for name, model, expert in zip(names, models, described, strict=True):
        settings = model.settings(folder) | {"data": FILL_IN}
        lines += source_lines(name, settings, _prompts(expert))
    lines += _settings(theirs, anchor, upcycled=upcycled)
    return Imported("\n".join(lines) + "\n", notes, fill_in)


def _head(path: Path, notes: Sequence[str]) -> Iterator[str]:
    yield from comment(f"Made of mergekit-moe's recipe {path.name} by `symphony import`.")
    yield "#"
    yield from comment(FILL_IN_TEXT)
    yield "#"
    yield from comment(
        "`symphony plan` says whether the sources are branches of one base. Where they are not, "
        "the base's attention is of no use to the others' experts: set method: harmonized then, "
        "and leave out `backbone` and router.init."
    )
    yield "#"
    yield from comment(
        "`symphony build` makes the counterpart of what mergekit-moe makes; `symphony run` trains "
        "it too."
    )
    if notes:
        yield "#"
        yield "# Without a counterpart, or with another one:"
    for note in notes:
        yield from comment(f"- {note}")


def _settings(theirs: _Theirs, anchor: str, *, upcycled: bool) -> Iterator[str]:
    """The settings below the sources."""
    yield f"anchor: {scalar(anchor)}"
    if upcycled:
        yield from comment(
            "Every expert is a copy of the anchor's FFN, and all else is the anchor's."
        )
        yield "method: sparse-upcycling"
    else:
        yield from comment(
            "The anchor's attention, embeddings and norms, and each source's FFN as it is."
        )
        yield "method: btx"
        yield "backbone: {attention: anchor, embeddings: anchor, norms: anchor}"
    router = {"init": _GATES[theirs.gate_mode][0], "top_k": theirs.experts_per_token}
    yield f"router: {scalar(router)}"
    output = {"dtype": _dtype(theirs) or "bfloat16"}
    ours = _architecture(theirs)
    yield f"output: {scalar(output | ({'architecture': ours} if ours else {}))}"


def _dtype(theirs: _Theirs) -> str | None:
    name = (theirs.dtype or "").removeprefix("torch.")
    return "float32" if name == "float64" else name or None


def _architecture(theirs: _Theirs) -> str | None:
    """Ours of the same name."""
    wanted = (theirs.architecture or "").lower()
    found = [name for name in _ARCHITECTURES if name.startswith(wanted)]
    return _ARCHITECTURES[found[0]] if wanted and len(found) == 1 else None


def _prompts(expert: _Expert | None) -> Iterator[str]:
    """An expert's prompts, for whoever looks for text that is like them."""
    if expert is None:
        yield "base_model"
        return
    for kind, prompts in (("for", expert.positive_prompts), ("not for", expert.negative_prompts)):
        if prompts:
            shown = ", ".join(repr(shortened(prompt, 60)) for prompt in prompts[:4])
            more = f" and {len(prompts) - 4} more" if len(prompts) > 4 else ""
            yield f"{kind}: {shown}{more}"


def _notes_of_base(base: _Model, anchor: str, *, is_expert: bool) -> Iterator[str]:
    if not is_expert:
        yield (
            f"base_model {base} is no expert there. Here the anchor is one: {anchor} is the first, "
            "and the result has one expert more. To leave it out, remove it from sources and name "
            "another anchor, whose attention the result has then."
        )


def _notes_of_experts(theirs: _Theirs, path: Path, *, upcycled: bool) -> Iterator[str]:
    for setting, what in (
        ("noise_scale", "no noise is added to its weights"),
        ("residual_scale", "its output is not scaled"),
    ):
        having = [
            f"experts[{number}] {getattr(expert, setting):g}"
            for number, expert in enumerate(theirs.experts)
            if getattr(expert, setting) is not None
        ]
        if having:
            hint = ""
            if upcycled and setting == "noise_scale":
                hint = " method: drop-upcycling draws a share of each expert's neurons anew."
            yield f"{setting} ({', '.join(having)}): no counterpart; {what}.{hint}"
    for number, expert in enumerate(theirs.shared_experts or ()):
        model = _model(expert.source_model, f"{path}: shared_experts[{number}].source_model")
        yield (
            f"shared_experts[{number}] {model}: no counterpart; no source can be the expert that "
            "serves every token (experts.shared_weight merges one from all). It is left out, with "
            "its prompts and scale. To keep what it knows, name it under sources, as one more "
            "expert that tokens are routed to."
        )
    references = [theirs.base_model, *(expert.source_model for expert in theirs.experts)]
    if any(isinstance(one, dict) and one.get("override_architecture") for one in references):
        yield "override_architecture: no counterpart; a model is what its config.json says."


def _notes_of_router(theirs: _Theirs) -> Iterator[str]:
    init, otherwise = _GATES[theirs.gate_mode]
    if otherwise:
        yield f"gate_mode {theirs.gate_mode}: router.init {init}. {otherwise}"
    if init == "hidden":
        yield _PROMPTS
    elif any(expert.positive_prompts or expert.negative_prompts for expert in theirs.experts):
        yield f"positive_prompts, negative_prompts: without effect there, with {theirs.gate_mode}."


def _notes_of_output(theirs: _Theirs, path: Path) -> Iterator[str]:
    dtype = _dtype(theirs)
    if dtype is None:
        yield "dtype: not given; there it is the base's, here bfloat16. Set output.dtype."
    elif dtype not in _DTYPES:
        raise RecipeError(
            f"{path}: dtype: expected one of {', '.join(_DTYPES)}, got {shortened(dtype, 40)!r}"
        )
    elif theirs.dtype and theirs.dtype.endswith("float64"):
        yield "dtype float64: no counterpart; float32 is written."
    yield from _notes_of_architecture(theirs, path)
    for setting, here in _READ_PAST.items():
        if getattr(theirs, setting) is not None:
            yield f"{setting}: mergekit-moe does not read it; {here}."


def _notes_of_architecture(theirs: _Theirs, path: Path) -> Iterator[str]:
    wanted = theirs.architecture
    if not wanted:
        return
    if not any(name.startswith(wanted.lower()) for name in _ARCHITECTURES):
        raise RecipeError(
            f"{path}: architecture: {shortened(wanted, 40)!r} is none of mergekit-moe's "
            f"({', '.join(_ARCHITECTURES)})"
        )
    if _architecture(theirs) is None:
        yield (
            f"architecture {wanted}: no counterpart. Written is what holds the sources' family "
            "exactly: mixtral for Llama and Mistral, ernie4_5_moe for Qwen2, qwen3_moe for Qwen3 "
            "(output.architecture auto)."
        )


def _refuse_what_would_not_load(recipe: str, path: Path, folder: Path) -> None:
    """RecipeError where the recipe would be refused with its data there."""
    content = read_yaml(recipe)
    for settings in content["sources"].values():
        settings["data"] = []
    resolve_recipe(content, folder, str(path))
