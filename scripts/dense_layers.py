"""What merged FFNs lose, with neurons aligned and not: docs/how-to/experts.md.

    python scripts/dense_layers.py --out dense-layers

Four bundled sources, stage 1 alone, with experts in every layer, and with layers 1 and 2 of four
dense (`experts.dense_layers`), whose FFNs are merged. Families: `branches` of one base; `shuffled`,
the same branches, the neurons of all but the anchor in another order, which changes nothing of what
they compute; `strangers`. Coordinates: `own`, and `aligned` (residual stream and heads, as
`harmonized` has them, nothing fitted), and `fitted` (the closed form after that). Held-out nats per
token, the mean of the four domains; mean and range of the seeds, which draw calibration text,
router and held-out text. Numbers that are there already are kept, so a study that was stopped goes
on.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from symphony_moe import Recipe, build, load_recipe
from symphony_moe.building.draws import generator_for
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.model.families import NEURON_AXIS
from symphony_moe.reporting.comparison_table import spread_text
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_stock
from symphony_moe.text.texts import Texts

ROOT = Path(__file__).parent.parent
BUDGET = ("calibration.tokens=16384", "evaluation.tokens=4096", "router.init=regression")
COORDINATES: Mapping[str, Sequence[str]] = {
    "own": ("method=btx",),
    "aligned": ("method=harmonized", "fit.method=none"),
    "fitted": ("method=harmonized", "fit.epochs=0"),
}
CASES = (
    ("branches", "own"),
    ("shuffled", "own"),
    ("strangers", "own"),
    ("strangers", "aligned"),
    ("strangers", "fitted"),
)
DENSE = "experts.dense_layers=[1, 2]"
LAYERS: Mapping[str, Sequence[str]] = {
    "experts everywhere": ("align.neurons=none",),
    "neurons as they are": (DENSE, "align.neurons=none"),
    "neurons aligned": (DENSE, "align.neurons=auto"),
    "neurons aligned, slerp": (DENSE, "align.neurons=auto", "backbone.ffn=slerp"),
}


def shuffled(folder: Path, out: Path, key: str) -> Path:
    """A copy of a model whose FFNs have their neurons in another order."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    generator, orders = generator_for(key), dict[str, torch.Tensor]()
    for name in sorted(tensors):
        layer, found, matrix = name.partition(".mlp.")
        axis = NEURON_AXIS.get(f"mlp.{matrix}") if found else None
        if axis is None:
            continue
        if layer not in orders:
            orders[layer] = torch.randperm(tensors[name].shape[axis], generator=generator)
        tensors[name] = tensors[name].index_select(axis, orders[layer]).contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def recipe_of(family: str, seed: int, settings: Sequence[str], models: Path) -> Recipe:
    """A family's recipe. `models`: where shuffled ones are."""
    seeds = [f"seed={seed}", f"calibration.seed={seed}", f"evaluation.seed={seed}"]
    bundled = "branches" if family == "shuffled" else family
    recipe = load_recipe(ROOT / "recipes" / f"{bundled}.yaml", [*settings, *BUDGET, *seeds])
    if family != "shuffled":
        return recipe
    specs = dict(recipe.sources)
    for source in open_sources(recipe, download=False):
        out = models / source.name
        if source.name != recipe.anchor:
            if not out.is_dir():
                shuffled(source.folder, out, source.name)
            specs[source.name] = specs[source.name].model_copy(update={"model": str(out)})
    return recipe.model_copy(update={"sources": specs})


def loss_of(recipe: Recipe) -> float:
    """Of the model that a recipe builds: the mean over the sources' domains."""
    with tempfile.TemporaryDirectory() as home:
        run = build(recipe, Path(home) / "run")
        pieces = Texts(recipe, open_sources(recipe, download=False)).held_out_text()
        inside = {name: pieces[name] for name in recipe.sources}
        losses, _ = losses_and_routing(load_stock(run.checkpoint), inside)
    return sum(losses.values()) / len(losses)


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row for each family and its coordinates. `found`: `family, coordinates, layers`
    -> seed -> loss."""
    head = ["sources", "coordinates", *LAYERS]
    rows = [head, ["---"] * len(head)]
    for family, coordinates in CASES:
        cells = [found[f"{family}, {coordinates}, {layers}"] for layers in LAYERS]
        rows.append([family, coordinates, *(spread_text(list(cell.values())) for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("dense-layers"))
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "losses.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    for seed in asked.seeds:
        for family, coordinates in CASES:
            for layers, settings in LAYERS.items():
                losses = found.setdefault(f"{family}, {coordinates}, {layers}", {})
                if str(seed) not in losses:
                    settings = (*COORDINATES[coordinates], *settings)
                    recipe = recipe_of(family, seed, settings, asked.out / "models")
                    losses[str(seed)] = loss_of(recipe)
                    path.write_text(json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
