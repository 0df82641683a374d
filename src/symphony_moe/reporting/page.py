"""What all pages share: the style, the templates, the words of a title."""

import textwrap
from collections.abc import Iterable
from importlib import resources
from typing import Any


def fill(template: str, **values: Any) -> str:
    """A page out of one of this package's templates, in the style that all pages share."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = textwrap.indent(_read("page.css"), "  ")
    return environment.get_template(template).render(style=style, **values)


def script() -> str:
    """What chooses the layer of a coloured text. It reads the page alone, and loads nothing."""
    return textwrap.indent(_read("samples.js"), "  ")


def _read(name: str) -> str:
    return resources.files("symphony_moe.reporting").joinpath(name).read_text("utf-8")


def title(sources: Iterable[str]) -> str:
    """What a page of a model made of these sources is called."""
    names = list(sources)
    if len(names) > 6:
        return f"One model out of {len(names)} sources"
    return f"One model out of {', '.join(names[:-1])} and {names[-1]}"
