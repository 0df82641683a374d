"""A finished run against its manifest, its sources and stock `transformers`.

Everything that the recipe and the recorded maps determine is computed again from the sources and
compared tensor by tensor (what was fitted to calibration text is not: `--deep` fits it again); then
stock `AutoModelForCausalLM` must load the checkpoint with nothing missing or surplus, and give the
logits that the pipeline's own layers give, and stock `AutoTokenizer` have every setting of the
anchor's tokenizer and cut text as the pipeline does. Each source must compute, as it is read here,
what it computes as stock `transformers` (and `peft`) load it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from symphony_moe.building.alignment import Alignment
from symphony_moe.building.assemble import aligned_layer
from symphony_moe.building.candidate import Candidate
from symphony_moe.building.fitting import NEW
from symphony_moe.building.kept import ChangedCandidate, KeptModel, made_of, new_expert
from symphony_moe.building.plan import Plan
from symphony_moe.errors import VerificationError, first_line
from symphony_moe.files import hash_folder, sha256_of
from symphony_moe.model.checkpoint import SPELLED
from symphony_moe.model.families import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    HEAD_BIAS,
    Family,
    factor,
    moe_config,
)
from symphony_moe.model.layer import load_dense_layer, load_moe_layer, logits_from_stream, run_layer
from symphony_moe.model.moe_layer import (
    MoELayer,
    layer_outputs,
    named_parts,
    read_layer_outputs,
)
from symphony_moe.progress import Progress, of_step
from symphony_moe.recipe.settings import Recipe
from symphony_moe.runs.folder import RunFolder, changed_files
from symphony_moe.runs.metrics import PLAIN_MEAN
from symphony_moe.sources.pretrained import load_tokenizer
from symphony_moe.sources.provenance import CARD
from symphony_moe.sources.same_tokenizer import first_difference, settings_of, texts_for
from symphony_moe.sources.source import Source, anchor_of, new_config, read_layers
from symphony_moe.sources.stock import load_alone, load_stock

log = logging.getLogger(__name__)

LOGITS_TOLERANCE = 1e-4
"""max |stock - pipeline| over max |pipeline|, both in float32 from the same rounded weights."""

_PROBE = (2, 48)
"""Windows and tokens per window of the random probe for logits."""

_PROBE_OF_SOURCE = (2, 24)
"""The same for a source against stock loading of it."""


class _Checks:
    """What is checked and found; what is wrong is said at the end, all of it."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self.found: dict[str, str] = {}
        self.failed: list[str] = []

    def add(self, name: str, problem: str | None, passed: str) -> None:
        """Note a check: what is wrong, or what is right where nothing is."""
        self.found[name] = problem or passed
        if problem:
            self.failed.append(f"{name}: {problem}")
        # How many there are is not known before; the command prints all of them at its end.
        step = Progress("verify", len(self.found), len(self.found) + 1)
        log.info("%s: %s", name, self.found[name], extra=of_step(step))

    def raise_failed(self) -> None:
        """VerificationError where anything has failed so far."""
        if self.failed:
            raise VerificationError(f"{self._run.root}: " + " | ".join(self.failed))


def verify_run(
    run: RunFolder,
    recipe: Recipe,
    sources: Sequence[Source],
    plan: Plan,
    kept: KeptModel | None = None,
) -> dict[str, str]:
    """Every check and what it found. Raises VerificationError with all that failed. `kept`: what a
    run that came by a change of experts has kept; without it that is not compared.

    Opening the sources has already compared their hashes with the recipe's.
    """
    run.require_checkpoint()
    listed = run.read_json(run.manifest).get("files")
    if not isinstance(listed, dict):
        raise VerificationError(f"{run.manifest}: lists no files")
    checks = _Checks(run)
    checks.add("sources", None, "hashes equal the recipe's")
    folders = [folder for folder in (run.checkpoint, run.trained) if folder.is_dir()]
    # 1. The files are those of the manifest, and their tensors those of the plan.
    for folder in folders:
        _check_folder(checks, folder, listed, plan, sources[0].family)
    # 2. The maps are symmetries of the sources.
    checks.add("alignment", _compare_alignment(run, listed), "hash equal")
    problem = None if checks.failed else _check_maps(run, recipe, sources)
    checks.add("maps", problem, "symmetries of the sources, for every layer that is aligned")
    checks.raise_failed()  # what follows would read files that are known to be wrong
    # 3. The sources compute what is read of them.
    for source in sources:
        problem, passed = _check_source(source, recipe.seed)
        checks.add(f"{source.name} in stock transformers", problem, passed)
    # 4. The weights are what sources and maps give, and compute that elsewhere.
    probe = torch.randint(
        plan.tensors[EMBEDDING][0], _PROBE, generator=torch.Generator().manual_seed(recipe.seed)
    )
    new = Candidate(recipe, sources, Alignment.load(run.alignment), NEW)
    if recipe.parent is None:
        comparison, expected = _recompute(run, new, plan, probe)
    else:
        comparison, expected = _recompute_change(run, new, plan, probe, kept)
    checks.add("experts and backbone", comparison.problem(), comparison.summary())
    for folder in folders:
        problem, passed = _check_stock(
            folder, plan, expected if folder == run.checkpoint else None, probe
        )
        checks.add(f"{folder.name} in stock transformers", problem, passed)
        problem = _check_tokenizer(folder, recipe, sources)
        checks.add(
            f"{folder.name} tokenizer", problem, "the anchor's settings; the pipeline's cuts"
        )
    checks.raise_failed()
    return checks.found


def _check_folder(
    checks: _Checks, folder: Path, listed: Mapping[str, str], plan: Plan, family: Family
) -> None:
    """The files of a checkpoint, the names of its tensors, and those that must be zero."""
    problem = changed_files(folder, listed)
    checks.add(f"{folder.name} files", problem, "hashes equal the manifest's")
    problem = _compare_names(folder, plan)
    passed = f"all {len(plan.tensors)} names, shapes and dtypes"
    checks.add(f"{folder.name} tensors", problem, passed)
    found = {name: family.constant(name) for name in plan.tensors}
    constants = {name: number for name, number in found.items() if number is not None}
    if problem is None and constants:
        problem = _compare_constants(folder, constants, plan.dtype)
        what = "zero" if not any(constants.values()) else "as they were written"
        passed = f"all {len(constants)} tensors that the sources lack are {what}"
        checks.add(f"{folder.name} zeros", problem, passed)


def _compare_alignment(run: RunFolder, listed: Mapping[str, str]) -> str | None:
    if not run.alignment.is_file():
        return f"{run.alignment.name} is missing"
    if sha256_of(run.alignment) != listed.get(run.alignment.name):
        return "hash differs from the manifest's"
    return None


def refuse_several_processes(run: RunFolder) -> None:
    """Raise VerificationError for a run that one process does not build again to the bit."""
    manifest = run.read_json(run.manifest)
    count = manifest.get("processes") or manifest.get("begun_with", {}).get("processes")
    if count is not None:
        raise VerificationError(
            f"{run.root}: built by {count} processes, whose sums are rounded in another order than "
            "those of one; --deep compares to the bit. Leave --deep out, or build again in one "
            "process"
        )


def compare_builds(run: RunFolder, rebuilt: RunFolder) -> str:
    """Tensor hashes of two builds of one recipe. Raises VerificationError where they differ."""
    first, second = (r.read_json(r.manifest)["tensors"]["checkpoint"] for r in (run, rebuilt))
    different = sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))
    if different:
        raise VerificationError(
            f"{run.root}: a second build differs in {len(different)} tensors, first {different[0]}"
        )
    num_tensors = len(first)
    first, second = hash_folder(run.checkpoint), hash_folder(rebuilt.checkpoint)
    files = sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))
    found = f"a second build has the same {num_tensors} tensors"
    if files == [f"{run.checkpoint.name}/{CARD}"]:
        why = "it tells of the sources' cards and licences, and of versions of software"
        return f"{found}; its model card differs: {why}"
    if files:
        raise VerificationError(f"{run.root}: a second build differs from checkpoint/")
    return found


def _check_maps(run: RunFolder, recipe: Recipe, sources: Sequence[Source]) -> str | None:
    """What is wrong with the recorded maps: there is one for every layer of every source but the
    anchor where the recipe asks for it, and none of them changes a source's function."""
    try:
        alignment = Alignment.load(run.alignment)
    except (SafetensorError, OSError) as error:
        return f"{run.alignment.name} is not readable: {error}"
    num_layers = sources[0].config.num_hidden_layers
    others = [s.name for s in sources if s.name != recipe.anchor]
    matched = [n for n in range(num_layers) if recipe.aligns_neurons_in(n)]
    has_neurons = bool(matched) and not _is_plain_mean(run, recipe)
    wrong = alignment.misplaced(
        num_layers,
        residual=others if recipe.aligns_residual else [],
        heads=others if recipe.aligns_heads else [],
        neurons=dict.fromkeys(others, matched) if has_neurons else {},
    )
    if wrong:
        return f"{wrong} is missing or surplus"
    if recipe.refines_embeddings and not _is_plain_mean(run, recipe):
        uncounted = [s.name for s in sources if alignment.token_counts(s.name) is None]
        if uncounted:  # which embeddings have not learned could not be told
            return f"{uncounted[0]}.tokens is missing"
    for layer in range(num_layers):
        for source in sources:
            if not alignment.has_maps(source.name):
                continue
            try:
                aligned_layer(recipe, source, layer, source.read_layer(layer), alignment)
            except ValueError as error:
                return f"{source.name}, layer {layer}: {error}"
    return None


def _is_plain_mean(run: RunFolder, recipe: Recipe) -> bool:
    """Whether a build that fits has found the plain mean to be better, and written that."""
    if not recipe.fits_layers:
        return False
    chosen = run.read_json(run.manifest).get("model")
    if chosen is None:  # builds of version 0.1 say it elsewhere
        metrics = run.read_json(run.metrics)
        chosen = (metrics.get("fit") or metrics.get("refit") or {}).get("chosen")
    return bool(chosen == PLAIN_MEAN)


class _Comparison:
    """Tensors on disk against tensors computed again."""

    def __init__(self, folder: Path) -> None:
        self.equal: set[str] = set()
        self.rounded: set[str] = set()
        self.different: set[str] = set()
        self._where: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._where |= dict.fromkeys(file.keys(), path)
        self.num_parts = len(self._where)
        """What there is to compare: tensors, or parts of them."""
        self.made_of = "the sources"
        self.others = "were fitted"
        """What those are that are not computed again."""

    def add(self, name: str, expected: Tensor, first_row: int = 0) -> None:
        """Compare a tensor, or some of its rows."""
        with safe_open(self._where[name], framework="pt") as file:
            stored = file.get_slice(name)[first_row : first_row + len(expected)]
            self.compare(name, stored, expected)

    def compare(self, name: str, stored: Tensor, expected: Tensor) -> None:
        """Compare a part of what is stored, or some of its rows."""
        last_bit = torch.finfo(stored.dtype).eps
        if torch.equal(stored, expected):
            self.equal.add(name)
        elif torch.allclose(stored.float(), expected.float(), rtol=last_bit, atol=0):
            # Another machine may add in another order and round the last bit the other way.
            self.rounded.add(name)
        else:
            self.different.add(name)

    def stored(self, name: str) -> Tensor:
        """A tensor as it is on disk."""
        with safe_open(self._where[name], framework="pt") as file:
            result: Tensor = file.get_tensor(name)
            return result

    def read(self, name: str) -> Tensor:
        """A tensor as it is on disk, in float32: what is divided then loses no digit."""
        return self.stored(name).float()

    def problem(self) -> str | None:
        """What is wrong, where anything is."""
        if not self.different:
            return None
        return (
            f"{len(self.different)} tensors are not what the sources and the recorded "
            f"maps give, first {min(self.different)}"
        )

    def summary(self) -> str:
        """What was found, where nothing is wrong."""
        rounded = f", {len(self.rounded)} up to the last bit" if self.rounded else ""
        equal = len(self.equal - self.rounded)
        fitted = self.num_parts - len(self.equal | self.rounded)
        rest = f"; {fitted} {self.others}, and are what the manifest says" if fitted else ""
        return f"computed again from {self.made_of}: {equal} tensors equal{rounded}{rest}"


@torch.inference_mode()
def _recompute(
    run: RunFolder, new: Candidate, plan: Plan, probe: Tensor
) -> tuple[_Comparison, Tensor]:
    """Compare the checkpoint with what its sources give, and run the probe through the recomputed
    layers, or through the checkpoint's where they are fitted: (comparison, the pipeline's
    logits)."""
    recipe, sources = new.recipe, new.sources
    anchor = anchor_of(recipe, sources)
    config = moe_config(anchor.family, new_config(recipe, sources))
    dtype = getattr(torch, plan.dtype)
    comparison = _Comparison(run.checkpoint)
    names = [source.name for source in sources]
    fitted = recipe.fits_layers and not _is_plain_mean(run, recipe)
    _compare_embeddings(comparison, new, learned=fitted and recipe.refines_embeddings)
    stream = comparison.stored(EMBEDDING)[probe].float() * factor(config, "embeddings")
    for layer in range(config.num_hidden_layers):
        read = comparison.read
        if not fitted:
            moe = new.assemble(layer, new.aligned(layer, read_layers(sources, layer)))
            if recipe.fits_router:
                stored = read_layer_outputs(anchor.family, config, layer, names, read)
                moe = replace(moe, router=stored.router)
            outputs = layer_outputs(anchor.family, config, layer, moe, names)
            # As a build does: what is multiplied on the way to the target is rounded after that.
            expected = {name: tensor.to(dtype) for name, tensor in outputs}
            for name, tensor in expected.items():
                comparison.add(name, tensor)
            read = partial(_read_as_float, expected)
        moe = read_layer_outputs(anchor.family, config, layer, names, read)
        model = load_moe_layer(config, layer, moe, recipe.router.top_k)
        stream = run_layer(model, stream)
    norm = new.final_norm().to(dtype)
    comparison.add(FINAL_NORM, norm)
    if HEAD_BIAS in plan.tensors:
        comparison.add(HEAD_BIAS, torch.zeros(plan.tensors[HEAD_BIAS], dtype=dtype))
    head = HEAD if HEAD in plan.tensors else EMBEDDING
    if fitted:
        rows = comparison.stored(HEAD).float()
        return comparison, logits_from_stream(config, stream.cpu(), norm.float(), rows)
    logits = []
    for name, first, rows in new.tables([head]):
        rows = rows.to(dtype)
        if name == HEAD:
            comparison.add(name, rows, first)
        logits.append(logits_from_stream(config, stream.cpu(), norm.float(), rows.float()))
    return comparison, torch.cat(logits, dim=-1)


def _compare_embeddings(comparison: _Comparison, new: Candidate, *, learned: bool) -> None:
    """`learned`: those of tokens that the calibration text has are refined. All others are
    compared."""
    if not learned:
        for first, rows in new.embeddings():
            comparison.add(EMBEDDING, rows, first)
        return
    counts = [new.alignment.token_counts(source.name) for source in new.sources]
    unseen = torch.stack([count for count in counts if count is not None]).sum(dim=0) == 0
    comparison.num_parts += 1
    stored = comparison.stored(EMBEDDING)
    for first, rows in new.embeddings():
        here = slice(first, first + len(rows))
        name = f"{EMBEDDING} (tokens that the calibration text lacks)"
        comparison.compare(name, stored[here][unseen[here]], rows[unseen[here]])


def _read_as_float(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[name].float()


@torch.inference_mode()
def _recompute_change(
    run: RunFolder, new: Candidate, plan: Plan, probe: Tensor, kept: KeptModel | None
) -> tuple[_Comparison, Tensor]:
    """Compare the checkpoint of a changed run with what the old run's model and the newcomer's
    source give, part by part, and run the probe through its layers. Without `kept` the newcomer's
    expert alone is compared."""
    recipe, sources = new.recipe, new.sources
    anchor = anchor_of(recipe, sources)
    config = moe_config(anchor.family, new_config(recipe, sources))
    dtype = getattr(torch, plan.dtype)
    comparison = _Comparison(run.checkpoint)
    names = [source.name for source in sources]
    tables = [name for name in (EMBEDDING, HEAD) if name in plan.tensors]
    changed = None
    comparison.others = "were kept or fitted"
    if kept is not None:
        comparison.made_of, comparison.others = "the old run and the sources", "were fitted"
        changed = ChangedCandidate(recipe, sources, new.alignment, NEW, kept)
        comparison.add(FINAL_NORM, changed.final_norm().to(dtype))
        for name, first, rows in changed.tables(tables):
            comparison.add(name, rows.to(dtype), first)
    comparison.num_parts = 1 + len(tables)
    stream = comparison.stored(EMBEDDING)[probe].float() * factor(config, "embeddings")
    for layer in range(config.num_hidden_layers):
        stored = read_layer_outputs(anchor.family, config, layer, names, comparison.read)
        parts = named_parts(stored.to(dtype))
        comparison.num_parts += len(parts)
        for part, tensor in _expected_parts(changed or new, layer, stored, dtype).items():
            comparison.compare(f"model.layers.{layer}.{part}", parts[part], tensor)
        stream = run_layer(load_moe_layer(config, layer, stored, recipe.router.top_k), stream)
    norm, head = (comparison.stored(name).float() for name in (FINAL_NORM, tables[-1]))
    return comparison, logits_from_stream(config, stream.cpu(), norm, head)


def _expected_parts(
    new: Candidate, layer: int, stored: MoELayer, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The parts of a changed run's layer that can be computed again: without the kept model the
    newcomer's alone, and nothing of what was fitted."""
    recipe, name = new.recipe, new.recipe.newcomer
    sources = made_of(new)
    weights = read_layers(sources, layer)
    aligned = {
        source.name: aligned_layer(recipe, source, layer, weights[source.name], new.alignment)
        for source in sources
    }
    if isinstance(new, ChangedCandidate):
        expected = new.assemble(layer, aligned)
    elif name is not None and not stored.is_dense:
        expected = replace(new_expert(new, layer, aligned, {}), shared={})
    else:
        return {}
    found = named_parts(expected.to(dtype))
    if name is None:
        return found
    unknown = [f"experts\n{name}\n"] if recipe.fits_layers else []
    unknown += ["router\n"] if recipe.fits_router else []
    return {part: t for part, t in found.items() if not part.startswith(tuple(unknown))}


def _compare_names(folder: Path, plan: Plan) -> str | None:
    found: dict[str, Any] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a handle, not a dict)
                    view = file.get_slice(name)
                    found[name] = tuple(view.get_shape()), view.get_dtype()
    except (SafetensorError, OSError) as error:
        return f"a weights file is not readable: {error}"
    expected = {name: (shape, SPELLED[plan.dtype]) for name, shape in plan.tensors.items()}
    wrong = sorted(
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    )
    return f"{len(wrong)} tensors are not as planned, first {wrong[0]}" if wrong else None


def _compare_constants(folder: Path, constants: Mapping[str, float], dtype: str) -> str | None:
    """What is wrong with tensors that are to hold one number: engines leave them out."""
    stored = _Comparison(folder)
    learned = []
    for name, number in constants.items():
        expected = torch.tensor(number, dtype=getattr(torch, dtype))
        if bool((stored.stored(name) != expected).any()):
            learned.append(name)
    if not learned:
        return None
    number = constants[learned[0]]
    return (
        f"{len(learned)} tensors that the sources lack are not {number:g}, first {learned[0]}; "
        "vLLM and llama.cpp leave them out, and answer otherwise. Train it again"
    )


def _check_tokenizer(folder: Path, recipe: Recipe, sources: Sequence[Source]) -> str | None:
    """What is wrong with a checkpoint's tokenizer as everyone else loads it. No documents are read:
    the text of random tokens has all that the vocabulary has."""
    try:
        theirs = load_tokenizer(folder)
    except Exception as error:
        # The loaders behind AutoTokenizer raise whatever their parser raised.
        return f"does not load in transformers: {type(error).__name__}: {error}"
    anchor = anchor_of(recipe, sources)
    ours = anchor.tokenizer
    drawn = torch.randint(len(ours), (64, 32), generator=torch.Generator().manual_seed(recipe.seed))
    texts = [*texts_for(ours), *ours.batch_decode(drawn)]
    chat = next(s for s in sources if s.name == (recipe.output.chat or recipe.anchor))
    expected = _conventions(anchor.own_tokenizer, chat.own_tokenizer)
    return first_difference(ours, theirs, texts, expected)


def _conventions(anchor: PreTrainedTokenizerBase, chat: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The settings that a checkpoint's tokenizer has: the anchor's, and of the chat source's its
    templates, end and padding tokens."""
    expected, other = settings_of(anchor), settings_of(chat)
    roles = dict(expected["special tokens"])
    for role in ("eos_token", "pad_token"):
        roles.pop(role, None)
        if role in other["special tokens"]:
            roles[role] = other["special tokens"][role]
    return expected | {"special tokens": roles, "chat_template": other["chat_template"]}


def _check_source(source: Source, seed: int) -> tuple[str | None, str]:
    """(problem, what passed) of what a source computes as it is read here against stock loading of
    it, in its own vocabulary."""
    unchecked = _too_large(source.num_parameters)
    if unchecked:
        return None, unchecked
    alone = replace(source, vocabulary=None)
    tokens = torch.randint(
        source.own_rows, _PROBE_OF_SOURCE, generator=torch.Generator().manual_seed(seed)
    )
    try:
        theirs = _logits_of_stock(load_alone(alone), tokens)
    except VerificationError as error:
        return str(error), ""
    except Exception as error:
        # A config that does not fit its weights fails anywhere in transformers.
        return f"does not load in transformers: {type(error).__name__}: {first_line(error)}", ""
    ours = _logits_as_read(alone, tokens)
    if ours.shape != theirs.shape:
        return f"has {ours.shape[-1]} tokens as it is read, {theirs.shape[-1]} in transformers", ""
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= LOGITS_TOLERANCE:
        return (
            f"computes something else than as it is read: logits differ by {difference:.1e} (at "
            f"most {LOGITS_TOLERANCE})",
            "",
        )
    return None, f"computes what it does as it is read, logits differ by {difference:.1e}"


@torch.inference_mode()
def _logits_as_read(source: Source, tokens: Tensor) -> Tensor:
    """What a source computes by the pipeline's own reading, layer by layer."""
    config = source.config
    stream = torch.empty(*tokens.shape, config.hidden_size)
    for first, rows in source.table(EMBEDDING):
        inside = (tokens >= first) & (tokens < first + len(rows))
        stream[inside] = rows[tokens[inside] - first] * factor(config, "embeddings")
    for layer in range(config.num_hidden_layers):
        stream = run_layer(load_dense_layer(config, layer, source.read_layer(layer)), stream)
    norm = source.final_norm()
    parts = [
        logits_from_stream(config, stream.cpu(), norm, rows)
        for _, rows in source.table(source.head_name)
    ]
    return torch.cat(parts, dim=-1)


def _too_large(parameters: int) -> str | None:
    """Why a model of so many parameters is not loaded; None where there is room for it."""
    needed = parameters * 4 * 1.2
    available = psutil.virtual_memory().available
    if needed <= available:
        return None
    return f"not checked: loading takes {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are free"


@torch.inference_mode()
def _logits_of_stock(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def _check_stock(
    folder: Path, plan: Plan, expected: Tensor | None, probe: Tensor
) -> tuple[str | None, str]:
    """(problem, what passed) of loading a checkpoint and, where logits are expected, comparing."""
    unchecked = _too_large(plan.total_parameters)
    if unchecked:
        return None, unchecked
    try:
        model = load_stock(folder)
    except VerificationError as error:
        return str(error), ""
    except Exception as error:
        # A config that does not fit its weights fails anywhere in transformers.
        return f"does not load in transformers: {type(error).__name__}: {error}", ""
    logits = _logits_of_stock(model, probe)
    if not bool(torch.isfinite(logits).all()):
        return "logits are not finite", ""
    if expected is None:
        return None, "loads with nothing missing or surplus"
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if difference > LOGITS_TOLERANCE:
        return (
            f"logits differ from the pipeline's by {difference:.1e} (at most {LOGITS_TOLERANCE})",
            "",
        )
    return None, f"loads with nothing missing or surplus, logits differ by {difference:.1e}"
