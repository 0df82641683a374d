"""How alike the sources are to the anchor, before and after their maps, as tables."""

from collections.abc import Mapping
from dataclasses import dataclass

from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.numbers import loss_text, mean_of_all
from symphony_moe.reporting.strips import Scale, Strip, Strips, Value
from symphony_moe.reporting.tables import in_order
from symphony_moe.runs.metrics import Agreement

KINDS = {
    "residual": (
        "Residual stream",
        "Mean cosine of a source's residual stream with the anchor's on the same tokens: in its "
        "own coordinates (before), and under the one rotation, the same for all layers, that "
        "brings it closest (after). The shared backbone mixes these coordinates.",
    ),
    "heads": (
        "Attention heads",
        "Correlation of a source's head outputs with the anchor's on the same tokens: heads paired "
        "by position (before), and matched, each with its best value rotation (after). The shared "
        "backbone mixes these too.",
    ),
    "neurons": (
        "FFN neurons",
        "Mean correlation of a source's FFN neurons with the anchor's on the same tokens: paired "
        "by position (before), and by the best matching (after). The permutation by itself does "
        "not change an MoE with separate experts; this is a measurement, not a gain, but where "
        "FFNs of several sources are merged (layers without experts, a shared expert).",
    ),
}
"""Kind of alignment -> what is compared, how to read the numbers."""


@dataclass(frozen=True)
class AlignmentTable:
    """How alike the sources are to the anchor in one respect."""

    title: str
    explanation: str
    sources: list[tuple[str, bool]]
    """(name, whether its maps are used)"""
    rows: list[tuple[str, list[tuple[str, str]]]]
    """(layer or "mean", before and after for every source)"""

    @property
    def unused(self) -> list[str]:
        """Sources that keep their own coordinates."""
        return [name for name, used in self.sources if not used]


def alignment_tables(
    alignment: Mapping[str, Mapping[str, Agreement]], recipe: Recipe
) -> list[AlignmentTable]:
    """One table for every kind that was measured, the sources in the recipe's order."""
    tables = []
    for kind, (what, explanation) in KINDS.items():
        found = alignment.get(kind) or {}
        names = in_order(recipe.sources, found)
        columns: list[list[float | None]] = [
            [*values] for name in names for values in (found[name].before, found[name].after)
        ]
        layers = max(map(len, columns), default=0)
        if not layers:
            continue
        labels = found[names[0]].layers or range(layers)
        # A layer that one source lacks leaves its cells empty, and the mean with them.
        padded = [column + [None] * (layers - len(column)) for column in columns]
        by_layer = zip(labels, zip(*padded, strict=True), strict=True)
        rows = [(str(layer), list(row)) for layer, row in by_layer]
        rows.append(("mean", [mean_of_all(column) for column in padded]))
        texts = [(label, [loss_text(value) for value in row]) for label, row in rows]
        tables.append(
            AlignmentTable(
                what,
                explanation,
                [(name, found[name].used) for name in names],
                [(label, list(zip(row[::2], row[1::2], strict=True))) for label, row in texts],
            )
        )
    return tables


def alignment_strips(
    alignment: Mapping[str, Mapping[str, Agreement]], recipe: Recipe
) -> Strips | None:
    """A strip for every kind and source: the mean over layers before the maps and after them. None
    where nothing was measured."""
    scale, rows = Scale.of(0.0, 1.0), []
    for kind, (what, _) in KINDS.items():
        found = alignment.get(kind) or {}
        for name in in_order(recipe.sources, found):
            ends = mean_of_all(found[name].before), mean_of_all(found[name].after)
            if ends[0] is None or ends[1] is None:
                continue
            before, after = (loss_text(end) for end in ends)
            values = [
                Value("before", ends[0], f"{name}, before: {before}"),
                Value("after", ends[1], f"{name}, after: {after}"),
            ]
            note = what if found[name].used else f"{what}, map refused"
            rows.append(
                Strip(name, [f"before {before}", f"after {after}"], scale.marks_of(values), note)
            )
    if not rows:
        return None
    return Strips(
        f"Agreement with {recipe.anchor}, mean over layers",
        "1 is the same, 0 is unrelated",
        rows,
        scale.axis,
        [("before", "before"), ("after", "after")],
    )
