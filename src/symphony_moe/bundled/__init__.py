"""The bundled tiny source models: two families of four specialists, and the text they know.

`strangers` were trained apart, each from its own seed; `branches` were tuned from one base. Both
have a source for every domain in `corpus.DOMAINS`. They are ordinary Hugging Face folders, made by
`scripts/train_bundled.py`.
"""

from pathlib import Path

from symphony_moe.errors import SourceError

FAMILIES = ("strangers", "branches")


def source_folder(name: str) -> Path:
    """Folder of a bundled source, named `family/domain`, as in `strangers/python`."""
    here = Path(__file__).parent
    known = sorted(
        f"{family}/{config.parent.name}"
        for family in FAMILIES
        for config in (here / family).glob("*/config.json")
    )
    if name not in known:
        raise SourceError(
            f"no bundled source is named {name!r}; the bundled ones are {', '.join(known)}"
        )
    return here / name


def demo_recipe() -> Path:
    """The recipe of `symphony demo`: four strangers, the paper's method."""
    return Path(__file__).parent / "demo.yaml"
