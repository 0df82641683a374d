"""README.md of a built checkpoint: the hub's model card.

Everything in it follows from the recipe, the sources' files and the versions of the software, so
that the same recipe gives the same bytes. Losses are measured later, and are not in it:
`reporting/published_card.py` adds them on the way to the hub.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from symphony_moe.building.plan import Plan, source_in_words
from symphony_moe.machine import versions
from symphony_moe.model.engines import TRIED
from symphony_moe.model.loading import loading_code
from symphony_moe.recipe.settings import HubData, Recipe
from symphony_moe.recipe.yaml_text import write_yaml
from symphony_moe.sources.provenance import (
    OTHER,
    Licence,
    Provenance,
    provenance,
    provenance_of,
)
from symphony_moe.sources.source import Source, public_name

TAGS = ("moe", "merge", "symphony-moe")

SEVERAL = "several"
"""`license_name`, where the sources have not one licence; the card lists them."""


def model_card(
    plan: Plan, recipe: Recipe, sources: Sequence[Source], *, has_chat_template: bool
) -> str:
    """The card of what is built of `sources`, the experts: metadata as the hub reads them, and
    text. `has_chat_template`: of the tokenizer that is written."""
    found = {source.name: provenance(source, recipe.sources[source.name]) for source in sources}
    for one in () if recipe.parent is None else recipe.parent.former:
        found[f"{one.name} (in the backbone; its expert was taken out)"] = provenance_of(one)
    total, active = plan.total_parameters, plan.active_parameters
    each = recipe.experts.per_source
    top_k = recipe.router.top_k * each
    return f"""---
{write_yaml(_metadata(recipe, found))}---

# Mixture of {len(sources) * each} experts

A `{plan.architecture}` model with {total:,} parameters, {active:,} of them active per token (top \
{top_k}), built from {len(sources)} `{plan.family}` models with symphony-moe, method \
`{recipe.method}`{_after_paper(recipe)}.

| expert | source | model | licence |
|---|---|---|---|
{_rows(plan, found, each)}
{_layout(recipe)}{_history(recipe)}
## Use

```python
{loading_code(".", has_chat_template=has_chat_template)}```

What other programs make of it, by the version that was asked:

{_readers(plan)}

## Licence

{_licences_in_words(found)}

## How it was made

By method `{recipe.method}`, with {_versions()}.

```yaml
{write_yaml(_shown(recipe))}```
"""


def _after_paper(recipe: Recipe) -> str:
    """The paper whose method it is; nothing where it is another method's."""
    if recipe.method != "symphony":
        return ""
    return ", of the paper [Symphony-MoE](https://arxiv.org/abs/2509.18542)"


def _layout(recipe: Recipe) -> str:
    """Which layers have no experts, and the weight of a shared one; nothing where there are
    none."""
    layers = ", ".join(map(str, recipe.experts.dense_layers))
    said = f"\nLayers without experts, counted from 0: {layers}.\n" if layers else ""
    if recipe.has_shared_expert:
        weight = recipe.experts.shared_weight
        said += f"\nEvery token goes through a shared expert as well, of weight {weight:g}.\n"
    return said


def _history(recipe: Recipe) -> str:
    """What a changed run is, beside its experts; nothing of a run that was built."""
    if recipe.parent is None:
        return ""
    said = "Its backbone and all experts but the newest were kept from an earlier run"
    if recipe.parent.added is None:
        said = "Its backbone and experts were kept from an earlier run"
    said += ", whose weights had been trained" if recipe.parent.trained else ""
    if recipe.parent.former:
        names = ", ".join(one.name for one in recipe.parent.former)
        said += f". The backbone was made with {names} too, whose experts were taken out"
    return f"\n{said}.\n"


def _metadata(recipe: Recipe, found: Mapping[str, Provenance]) -> dict[str, Any]:
    """What the hub reads. Ids, each once, in the order of the experts."""
    from huggingface_hub import ModelCardData

    ids = [name for one in found.values() for name in one.hub_ids]
    languages = [language for one in found.values() for language in one.languages]
    datasets = [data.hub for data in _hub_data(recipe).values()]
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": [*dict.fromkeys(ids)] or None,
        "base_model_relation": "merge" if ids else None,
        "datasets": [*dict.fromkeys(datasets)] or None,
        "language": sorted(set(languages)) or None,
        "tags": [*TAGS],
    }
    card: Any = ModelCardData(**values | _licence(found))
    metadata: dict[str, Any] = card.to_dict()
    return metadata


def _licence(found: Mapping[str, Provenance]) -> dict[str, str]:
    """The licence that all sources have; `OTHER` where they have not one, and nothing where none of
    them names any."""
    licences = {licence for one in found.values() for licence in one.licences}
    if licences == {None}:
        return {}
    shared = next(iter(licences)) if len(licences) == 1 else None
    if shared is None or (shared.identifier == OTHER and shared.name is None):
        return {"license": OTHER, "license_name": SEVERAL}
    parts = {
        "license": shared.identifier,
        "license_name": shared.name,
        "license_link": shared.link,
    }
    return {key: value for key, value in parts.items() if value}


def _licences_in_words(found: Mapping[str, Provenance]) -> str:
    known = _licence(found)
    if not known:
        return (
            "No file of the sources names a licence. Whoever passes the model on must find out "
            "what they allow."
        )
    if known.get("license_name") != SEVERAL:
        shared = Licence(known["license"], known.get("license_name"), known.get("license_link"))
        return f"All sources are under {shared}, as their own files say."
    listed = "\n".join(f"- {name}: {_of_source(one)}" for name, one in found.items())
    return (
        "The sources have not one licence in common, as far as their own files say. What is built "
        f"of them is bound by all of these:\n\n{listed}"
    )


def _of_source(one: Provenance) -> str:
    words = ["none stated" if licence is None else str(licence) for licence in one.licences]
    return " and, for its adapter, ".join(words)


def _rows(plan: Plan, found: Mapping[str, Provenance], each: int) -> str:
    """A row for each source. `each`: how many experts it gives."""
    numbers = [
        f"{first}" if each == 1 else f"{first} to {first + each - 1}"
        for first in range(0, each * len(plan.sources), each)
    ]
    return "\n".join(
        f"| {number} | {source['name']}{' (anchor)' if source['anchor'] else ''} | "
        f"{source_in_words(source)} | {_of_source(found[source['name']])} |"
        for number, source in zip(numbers, plan.sources, strict=True)
    )


def _readers(plan: Plan) -> str:
    return "\n".join(f"- {reading} [{TRIED[reading.program]}]" for reading in plan.readers)


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def _hub_data(recipe: Recipe) -> dict[str, HubData]:
    """Source -> its text, where that is a dataset on the hub."""
    return {
        name: spec.data
        for name, spec in recipe.sources.items()
        if isinstance(spec.data, HubData) and spec.data.is_on_hub
    }


def _shown(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the machine's paths, hashes and what a build does not ask for."""
    shown = recipe.to_content(without=("train", "evaluation", "compare"))
    if not recipe.experts.dense_layers:
        del shown["experts"]["dense_layers"]
    if not recipe.has_shared_expert:
        del shown["experts"]["shared_weight"]
    if not (recipe.experts.dense_layers or recipe.has_shared_expert):
        del shown["backbone"]["ffn"]
    if recipe.backbone.missing_tokens == "skip":
        del shown["backbone"]["missing_tokens"]
    if not recipe.widens:
        del shown["backbone"]["shapes"]
    if recipe.experts.per_source == 1:
        del shown["experts"]["per_source"]
    on_hub = _hub_data(recipe)
    for name, spec in shown["sources"].items():
        named = {key: public_name(spec[key]) for key in ("model", "adapter") if spec[key]}
        others = ("revision", "gguf_file", "adapter_revision")
        shown["sources"][name] = named | {key: spec[key] for key in others if spec[key]}
        if spec["layers"] is not None:
            shown["sources"][name]["layers"] = spec["layers"]
        if name in on_hub:
            shown["sources"][name]["data"] = on_hub[name].model_dump(exclude_defaults=True)
    return shown
