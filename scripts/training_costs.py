"""What training a fused model gains or costs, and what `train.keep_best` and `train.average` make
of it: docs/lab-log.md.

    python scripts/training_costs.py strangers branches --out training-costs
    python scripts/training_costs.py branches --methods btx --rates 2e-4,1e-3 --out training-costs

A bundled family, by `recipes/<family>.yaml` with fewer tokens: built once by each method, then
trained with several scopes and learning rates. Each training goes on to its last step, whatever the
validation text says: so it shows what would have been written without `train.keep_best`, and
whether it stops a training that would still have gained. What `train.average` makes of the last
step's weights is in the last column, with their share. Losses are held-out nats per token: the mean
of the sources' domains, and of the others. What is there already is kept, so a study that was
stopped goes on.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from symphony_moe import RunFolder, build, load_recipe
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.files import to_json, write_text
from symphony_moe.runs.metrics import read_metrics
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_stock
from symphony_moe.text.texts import Texts
from symphony_moe.training.run import train_run

ROOT = Path(__file__).parent.parent
BUDGET = ("calibration.tokens=65536", "train.tokens=153600", "evaluation.tokens=4096")
MEASURED = (
    *("train.keep_best=true", "train.average=true"),
    *("train.checkpoints=4", "train.evaluations=4"),
)


@dataclass(frozen=True)
class Point:
    """A model on the way, and its losses."""

    step: int
    validation: float
    in_domain: float
    out_of_domain: float


@dataclass(frozen=True)
class Averaged:
    """What `train.average` writes, and its losses."""

    share: float
    """Of the last step's weights."""
    in_domain: float
    out_of_domain: float


@dataclass(frozen=True)
class Study:
    """One family and method: a build, and its trainings."""

    run: RunFolder
    recipe: Any
    sources: Any
    held_out: Any

    @staticmethod
    def begin(run: RunFolder, family: str, method: str, seed: int) -> "Study":
        """Build it, where it is not there."""
        seeds = [f"seed={seed}", f"calibration.seed={seed}", f"evaluation.seed={seed}"]
        path = ROOT / "recipes" / f"{family}.yaml"
        recipe = load_recipe(path, [*BUDGET, *seeds, f"method={method}"])
        sources = open_sources(recipe)
        if not run.checkpoint.is_dir():
            build(recipe, run.root)
        return Study(run, recipe, sources, Texts(recipe, sources).held_out_text())

    def measure(self, model: Any) -> dict[str, float]:
        """Held-out losses by domain."""
        return losses_and_routing(model, self.held_out)[0]

    def point(self, step: int, validation: float, losses: dict[str, float]) -> Point:
        """The means of a model's held-out losses."""
        inside = [loss for name, loss in losses.items() if name in self.recipe.sources]
        outside = [loss for name, loss in losses.items() if name not in self.recipe.sources]
        return Point(step, validation, sum(inside) / len(inside), sum(outside) / len(outside))

    def curve(self, settings: Sequence[str]) -> tuple[list[Point], Averaged]:
        """The built model and the states of a training with these settings; and the average."""
        name = "-".join(settings).replace("train.", "")
        path = self.run.root / f"curve-{name}.json"
        if not path.is_file():
            recipe = load_recipe(self.run.recipe, [*settings, *MEASURED, BUDGET[1]])
            train_run(
                self.run, recipe, self.sources, resume=False, overwrite=True, measure=self.measure
            )
            training = read_metrics(self.run).training
            assert training is not None and training.validation is not None
            first, *later = training.validation.curve
            points = [self.point(0, first.loss, self.measure(load_stock(self.run.checkpoint)))]
            for at, (point, held_out) in enumerate(zip(later, training.held_out, strict=True)):
                tokens = point.step * (training.tokens or 0) // (training.steps or 1)
                assert held_out.tokens == tokens, f"{path}: point {at} is of another step"
                points.append(self.point(point.step, point.loss, held_out.losses))
            assert training.averaging is not None
            average = self.point(0, 0.0, self.measure(load_stock(self.run.trained)))
            share = training.averaging.share
            found = {
                "points": [asdict(point) for point in points],
                "averaged": asdict(Averaged(share, average.in_domain, average.out_of_domain)),
            }
            write_text(path, to_json(found))
            shutil.rmtree(self.run.trained)
        content = json.loads(path.read_text())
        return [Point(**point) for point in content["points"]], Averaged(**content["averaged"])


def kept(curve: Sequence[Point]) -> Point:
    """The point that `train.keep_best` keeps, by the rule of StopsWithoutGain and the Trainer's."""
    start, *rest = curve
    early = [point for point in rest if 2 * point.step < curve[-1].step]
    half = next(point for point in rest if 2 * point.step >= curve[-1].step)
    gains = any(point.validation < start.validation for point in [*early, half])
    return min(curve, key=lambda point: point.validation) if gains else start


def spell(point: Point | Averaged, start: Point) -> str:
    """A cell of the table."""
    change = point.in_domain - start.in_domain
    return f"{point.in_domain:.3f} ({change:+.3f}; {point.out_of_domain:.3f})"


def main() -> None:
    """Make what is not there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="+", choices=["strangers", "branches"])
    parser.add_argument("--methods", default="harmonized")
    parser.add_argument("--scopes", default="router,all")
    parser.add_argument("--rates", default="5e-5,2e-4,1e-3")
    parser.add_argument("--seed", type=int, default=114514)
    parser.add_argument("--out", type=Path, default=Path("training-costs"))
    given = parser.parse_args()
    # The last step's weights are averaged, whichever are best.
    with patch("symphony_moe.training.run.restore_best"):
        _print_table(given)


def _print_table(given: argparse.Namespace) -> None:
    """Train what is not trained yet, and print a row for each training."""
    print("| | scope | rate | built | the last step | kept | its step | averaged | share |")
    print("|---|---|---|---|---|---|---|---|---|")
    for family, method in product(given.families, given.methods.split(",")):
        run = RunFolder(given.out / f"{family}-{method}-seed{given.seed}")
        study = Study.begin(run, family, method, given.seed)
        for scope, rate in product(given.scopes.split(","), given.rates.split(",")):
            settings = [f"train.scope={scope}", f"train.learning_rate={rate}"]
            curve, averaged = study.curve(settings)
            start, best = curve[0], kept(curve)
            cells = (
                *(f"{family}, {method}", scope, rate),
                f"{start.in_domain:.3f} ({start.out_of_domain:.3f})",
                *(spell(curve[-1], start), spell(best, start)),
                f"{best.step} of {curve[-1].step}",
                spell(averaged, start),
                f"{averaged.share:g}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
