"""What it costs to add or remove an expert, against building anew: docs/lab-log.md.

    python scripts/change_study.py strangers --method harmonized --trained --out change-study

A bundled family, by `recipes/<family>.yaml` with fewer tokens: a run of three sources and the
fourth added to it, the four built anew, one of them removed, the three that are left built anew.
With `--trained` the same after training all weights: the run of three is trained, the fourth added
to that, and routers and experts trained; beside it the four are trained from their start on as many
tokens as both trainings of the other together. Losses are held-out nats per token. What is there
already is kept, so a study that was stopped goes on.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from symphony_moe import Recipe, RunFolder, add, build, load_recipe, remove, train
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_stock
from symphony_moe.text.texts import Texts

ROOT = Path(__file__).parent.parent
ADDED, REMOVED = "records", "python"
BUDGET = (
    "calibration.tokens=32768",
    "train.average=false",
    "fit.epochs=2",
    "evaluation.tokens=8192",
    "train.tokens=65536",
)
MORE_TOKENS = 32_768
"""What routers and experts are trained on after the fourth is added to a trained run."""


class Study:
    """The runs of one family and method, each made once."""

    def __init__(self, out: Path, family: str, method: str, seed: int) -> None:
        self.out = out / f"{family}-{method}-seed{seed}"
        self.seconds: dict[str, float] = {}
        seeds = [f"seed={seed}", f"calibration.seed={seed}", f"evaluation.seed={seed}"]
        recipe = ROOT / "recipes" / f"{family}.yaml"
        self.whole = load_recipe(recipe, [*BUDGET, *seeds, f"method={method}"])

    def recipe(self, without: str | None = None, tokens: int | None = None) -> Recipe:
        """The recipe, perhaps without a source, or with another budget to train on."""
        sources = {name: spec for name, spec in self.whole.sources.items() if name != without}
        settings = self.whole.train
        if tokens is not None:
            settings = settings.model_copy(update={"tokens": tokens})
        return self.whole.model_copy(update={"sources": sources, "train": settings})

    def make(self, name: str, work: Callable[[Path], RunFolder], *trained: str) -> RunFolder:
        """A run, built and perhaps trained."""
        run = RunFolder(self.out / name)
        began = time.monotonic()
        if not run.checkpoint.is_dir():
            work(run.root)
        if trained and not run.trained.is_dir():
            train(run, trained)
        self.seconds[name] = time.monotonic() - began
        return run

    def added_to(self, old: RunFolder) -> Callable[[Path], RunFolder]:
        """What makes a run of an old one and the fourth source."""
        spec = self.whole.sources[ADDED]
        return lambda out: add(old, ADDED, out, model=spec.model, data=str(spec.data))

    def built(self) -> dict[str, Path]:
        """Name for the table -> the model's folder."""
        three = self.make("three", anew(self.recipe(ADDED)))
        more = self.make("three-and-one", self.added_to(three))
        four = self.make("four", anew(self.recipe()))
        fewer = self.make("four-less-one", lambda out: remove(four, REMOVED, out))
        rest = self.make("rest", anew(self.recipe(REMOVED)))
        return {
            f"three, without {ADDED}": three.checkpoint,
            f"three, {ADDED} added": more.checkpoint,
            "four, built anew": four.checkpoint,
            f"four, {REMOVED} removed": fewer.checkpoint,
            f"three, without {REMOVED}, built anew": rest.checkpoint,
        }

    def trained(self) -> dict[str, Path]:
        """The same of models that are trained."""
        three = self.make("three-trained", anew(self.recipe(ADDED)), "train.scope=all")
        settings = ("train.scope=experts", f"train.tokens={MORE_TOKENS}")
        later = self.make("trained-and-one", self.added_to(three), *settings)
        both = self.whole.train.tokens + MORE_TOKENS
        four = self.make("four-trained", anew(self.recipe(tokens=both)), "train.scope=all")
        return {
            "three, trained": three.trained,
            f"three, trained, {ADDED} added": later.checkpoint,
            "... and routers and experts trained": later.trained,
            "four, built anew and trained": four.trained,
        }


def anew(recipe: Recipe) -> Callable[[Path], RunFolder]:
    """What builds a run by a recipe."""
    return lambda out: build(recipe, out)


def table(study: Study, models: Mapping[str, Path]) -> str:
    """Markdown: a row for each model."""
    recipe = study.recipe()
    pieces = Texts(recipe, open_sources(recipe, download=False)).held_out_text()
    domains = [*recipe.sources]
    extra = [name for name in pieces if name not in domains]
    head = ["", *domains, "mean", *extra]
    rows = [head, ["---"] * len(head)]
    for name, folder in models.items():
        losses, _ = losses_and_routing(load_stock(folder), pieces)
        mean = sum(losses[domain] for domain in domains) / len(domains)
        shown = [*(losses[d] for d in domains), mean, *(losses[d] for d in extra)]
        rows.append([name, *(f"{loss:.3f}" for loss in shown)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("family", choices=["strangers", "branches"])
    parser.add_argument("--method", default="harmonized")
    parser.add_argument("--trained", action="store_true", help="train them too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("change-study"))
    asked = parser.parse_args(arguments)
    study = Study(asked.out, asked.family, asked.method, asked.seed)
    models = study.built() | (study.trained() if asked.trained else {})
    print(f"{asked.family}, {asked.method}, seed {asked.seed}\n\n{table(study, models)}\n")
    for name, seconds in study.seconds.items():
        print(f"{name}: {seconds:.0f} s")


if __name__ == "__main__":
    main()
