"""Several checkpoints of one model family -> one Mixture-of-Experts checkpoint.

    from symphony_moe import build, load_recipe, verify

    run = build(load_recipe("recipe.yaml"), "run")
    verify(run)

These functions do what the commands do: `build` is `symphony build`. A mistake raises a
`SymphonyError`. Nothing is printed: log lines go to the logger `symphony_moe`, and `progress` is
called after each step. `import symphony_moe` imports no torch: each name is imported when it is
first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from symphony_moe.building.plan import Plan
    from symphony_moe.comparison import Comparison, compare
    from symphony_moe.errors import SymphonyError
    from symphony_moe.pipeline import (
        add,
        build,
        evaluate,
        plan,
        push,
        remove,
        replace,
        report,
        run,
        train,
        verify,
    )
    from symphony_moe.progress import Listener, Progress
    from symphony_moe.recipe.load import load_recipe
    from symphony_moe.recipe.settings import Recipe
    from symphony_moe.recipe.variants import load_variants
    from symphony_moe.runs.folder import RunFolder
    from symphony_moe.runs.metrics import Metrics
    from symphony_moe.uploading import Upload

__version__ = "0.2.0"

__all__ = [
    "Comparison",
    "Listener",
    "Metrics",
    "Plan",
    "Progress",
    "Recipe",
    "RunFolder",
    "SymphonyError",
    "Upload",
    "__version__",
    "add",
    "build",
    "compare",
    "evaluate",
    "load_recipe",
    "load_variants",
    "plan",
    "push",
    "remove",
    "replace",
    "report",
    "run",
    "train",
    "verify",
]

_MODULES = {
    "building.plan": ["Plan"],
    "comparison": ["Comparison", "compare"],
    "errors": ["SymphonyError"],
    "pipeline": [
        *("add", "build", "evaluate", "plan", "push", "remove", "replace"),
        *("report", "run", "train", "verify"),
    ],
    "progress": ["Listener", "Progress"],
    "recipe.load": ["load_recipe"],
    "recipe.settings": ["Recipe"],
    "recipe.variants": ["load_variants"],
    "runs.folder": ["RunFolder"],
    "runs.metrics": ["Metrics"],
    "uploading": ["Upload"],
}
"""Where each public name is."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # which would find every name then, misspelled ones too

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
