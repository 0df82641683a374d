"""Settings that contradict each other: one rule for each, in the order in which they are tried.

A rule sees the whole recipe. What a setting may hold by itself stands where the setting does, in
`settings.py`.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from symphony_moe.recipe.mistakes import nearest
from symphony_moe.recipe.settings import FILL_IN, Recipe


@dataclass(frozen=True)
class Rule:
    """One condition that a recipe must meet."""

    setting: str
    """The setting that is named as the mistake."""
    problem: Callable[[Recipe], str | None]
    """What is wrong with it, in words; None where nothing is."""


def refuse_contradictions(recipe: Recipe) -> None:
    """Raise ValueError with the setting and the problem of the first rule that is broken."""
    _refuse_bad_names(recipe)
    for rule in RULES:
        problem = rule.problem(recipe)
        if problem is not None:
            raise ValueError(f"{rule.setting}: {problem}")


def _refuse_bad_names(recipe: Recipe) -> None:
    for name in [*recipe.sources, *recipe.evaluation.extra]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"the name {name!r} may hold letters, digits, '.', '_' and '-' only")
        if name in ("built", "trained"):
            raise ValueError(f"the name {name!r} is what the result is called; choose another")


def _no_source(chosen: Iterable[str] | None, sources: Collection[str]) -> str | None:
    """The first of some names that is no source's."""
    for name in chosen or ():
        if name not in sources:
            known = ", ".join(sources)
            return f"{name!r} is no source; there is: {known}{nearest(name, list(sources))}"
    return None


def _when(is_broken: Callable[[Recipe], bool], problem: str) -> Callable[[Recipe], str | None]:
    """A rule's problem in words that are the same for every recipe."""
    return lambda recipe: problem if is_broken(recipe) else None


def _chat_is_no_source(recipe: Recipe) -> str | None:
    chat = recipe.output.chat
    return None if chat is None else _no_source([chat], recipe.sources)


def _experts_lack_the_anchor(recipe: Recipe) -> str | None:
    if recipe.anchor in recipe.expert_names:
        return None
    return f"without the anchor, {recipe.anchor!r}; name it, or another anchor"


def _an_expert_has_no_share(recipe: Recipe) -> str | None:
    weights = recipe.backbone.weights
    if weights is None:
        return None
    missing = [name for name in recipe.expert_names if name not in weights]
    return f"no share for {missing} (0 leaves one out)" if missing else None


def _layers_have_no_use(recipe: Recipe) -> str | None:
    named = [name for name, spec in recipe.sources.items() if spec.layers is not None]
    idle = [name for name in named if name not in recipe.expert_names]
    if named and not recipe.widens:
        return (
            f"{named[0]} has `layers`, which say where its layers are among those of a deeper "
            "source: set backbone.shapes to widest, or leave them out"
        )
    if idle:
        return f"{idle[0]} has `layers`, but becomes no expert (experts.sources): leave them out"
    return None


def _shares_are_zero(recipe: Recipe) -> bool:
    weights = recipe.backbone.weights
    return weights is not None and sum(weights.values()) <= 0


def _too_many_experts_per_token(recipe: Recipe) -> str | None:
    top_k, num_experts = recipe.router.top_k, len(recipe.expert_names)
    if top_k <= num_experts:
        return None
    return (
        f"{top_k} experts per token, but there are only {num_experts} sources (one expert each); "
        f"choose 1 to {num_experts}"
    )


def _repeats_a_layer(recipe: Recipe) -> str | None:
    layers = recipe.experts.dense_layers
    repeated = [layer for place, layer in enumerate(layers) if layer in layers[:place]]
    if repeated:
        return f"layer {repeated[0]} is named twice; name it once"
    if layers != sorted(layers):
        return f"expected the layers in order, got {layers}; write {sorted(layers)}"
    return None


def _extra_domains_are_sources(recipe: Recipe) -> str | None:
    both = [name for name in recipe.evaluation.extra if name in recipe.sources]
    return f"{both} are sources' names; choose other names" if both else None


def _slices_with_one_text(recipe: Recipe) -> str | None:
    """Two sources whose text is the same, so that a calibrated router has one row for both."""
    twins = of_one_text(recipe)
    if recipe.experts.per_source == 1 or not recipe.fits_router or twins is None:
        return None
    return (
        f"{twins[0]} and {twins[1]} have the same data, so router.init {recipe.router.init} gives "
        "them the same router rows, and a token would get a part of each source's FFN. "
        "Give them different data, or set router.init to random or experts.per_source to 1"
    )


def of_one_text(recipe: Recipe) -> tuple[str, str] | None:
    """The first two sources whose text is the same setting."""
    seen: dict[str, tuple[object, ...]] = {}
    for name in recipe.expert_names:
        spec = recipe.sources[name]
        data = [spec.data] if isinstance(spec.data, str) else spec.data
        text = (data, spec.column, spec.chat_format)
        twin = next((other for other, theirs in seen.items() if theirs == text), None)
        if twin is not None and spec.data != FILL_IN:
            return twin, name
        seen[name] = text
    return None


def _not_with_attention_experts(
    setting: str, is_set: Callable[[Recipe], bool], instead: str, reason: str
) -> Rule:
    """A setting that experts with attention of their own do not go with."""
    problem = f"{reason}; set it to {instead}, or experts.attention to shared"
    return Rule(setting, _when(lambda r: r.has_attention_experts and is_set(r), problem))


def _not_with_copies(setting: str, is_set: Callable[[Recipe], bool]) -> Rule:
    """A setting that needs an expert of each source."""
    problem = (
        "fits each source's expert to the others', but experts.init copy keeps the anchor's "
        "alone; set it to none, or experts.init to source"
    )
    return Rule(setting, _when(lambda r: r.copies_anchor and is_set(r), problem))


_SHARED_ATTENTION_ONLY = "a fit knows only attention that all experts share"

RULES = (
    Rule("anchor", lambda r: _no_source([r.anchor], r.sources)),
    Rule("output.chat", _chat_is_no_source),
    Rule("experts.sources", lambda r: _no_source(r.experts.sources, r.sources)),
    Rule("experts.sources", _experts_lack_the_anchor),
    Rule("backbone.weights", lambda r: _no_source(r.backbone.weights, r.sources)),
    Rule("backbone.weights", _an_expert_has_no_share),
    Rule("backbone.weights", _when(_shares_are_zero, "the shares add up to nothing")),
    Rule("sources", _layers_have_no_use),
    Rule("router.top_k", _too_many_experts_per_token),
    Rule("experts.dense_layers", _repeats_a_layer),
    Rule("evaluation.extra", _extra_domains_are_sources),
    Rule("calibration.domains", lambda r: _no_source(r.calibration.domains, r.expert_names)),
    Rule(
        "calibration.domains",
        _when(
            lambda r: r.calibration.domains is not None and r.fits,
            "a fit (fit.method, or a calibrated router.init) needs text of every source; leave "
            "calibration.domains out, or fit nothing",
        ),
    ),
    Rule(
        "fit.method",
        _when(
            lambda r: r.redraws_neurons and r.fits_layers,
            "fits each expert to its source, but experts.init drop draws a share of its neurons "
            "anew; set it to none, or experts.init to source",
        ),
    ),
    _not_with_attention_experts(
        "experts.init",
        lambda r: r.copies_anchor,
        "source",
        "copies of one expert have no attention of their sources",
    ),
    _not_with_attention_experts(
        "backbone.attention",
        lambda r: r.concatenates_heads,
        "linear",
        "each expert has the heads of its source already",
    ),
    _not_with_attention_experts(
        "experts.dense_layers",
        lambda r: bool(r.experts.dense_layers),
        "[]",
        "the stock class of attention experts has experts in every layer",
    ),
    _not_with_attention_experts(
        "experts.shared_weight",
        lambda r: r.has_shared_expert,
        "0",
        "the stock class of attention experts has no shared one",
    ),
    Rule(
        "experts.shared_weight",
        _when(
            lambda r: r.has_shared_expert and r.fits_layers,
            "a fit (fit.method) knows no shared expert: each expert is fitted to the whole of its "
            "source's FFN. Set it to 0, or fit.method to none",
        ),
    ),
    _not_with_attention_experts(
        "experts.per_source",
        lambda r: r.experts.per_source > 1,
        "1",
        "experts with attention are not dealt into several",
    ),
    Rule("experts.per_source", _slices_with_one_text),
    Rule(
        "evaluation.thresholds",
        _when(
            lambda r: r.experts.per_source > 1 and bool(r.evaluation.thresholds),
            "numbers of experts are tried for one expert of each source; leave it out, or set "
            "experts.per_source to 1",
        ),
    ),
    _not_with_attention_experts(
        "fit.method", lambda r: r.fits_layers, "none", _SHARED_ATTENTION_ONLY
    ),
    _not_with_attention_experts(
        "router.init", lambda r: r.fits_router, "random", _SHARED_ATTENTION_ONLY
    ),
    _not_with_attention_experts(
        "train.gradient_checkpointing",
        lambda r: r.train.gradient_checkpointing,
        "false",
        "the stock class of attention experts does not have it",
    ),
    _not_with_copies("align.residual", lambda r: r.aligns_residual),
    _not_with_copies("align.heads", lambda r: r.aligns_heads),
    _not_with_copies("fit.method", lambda r: r.fits_layers),
)
"""In this order: the first that is broken is the one that is said."""
