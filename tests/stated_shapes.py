"""Shapes that a signature states are checked at every call, in all tests.

`--jaxtyping-packages` (pyproject.toml) puts jaxtyping's decorator on every function of the package.
Imported before the package, this module keeps it to those that state a shape: on all of them it
took a third of the tests' time, and found no more.
"""

import inspect
import sys
from typing import Any, get_args

import jaxtyping
from jaxtyping import AbstractArray

_jaxtyped = jaxtyping.jaxtyped


def states_shape(found: Any, names: dict[str, Any]) -> bool:
    """Whether a shape is in an annotation. `names`: what it may speak of, where it is a string."""
    if isinstance(found, str):
        try:
            found = eval(found, names)
        except Exception:  # names what only type checkers import: jaxtyping takes it for Any
            return False
    if inspect.isclass(found) and issubclass(found, AbstractArray):
        return True
    parts = found if isinstance(found, list) else get_args(found)  # a list: Callable's arguments
    return any(states_shape(part, names) for part in parts)


def jaxtyped_where_stated(thing: Any = None, **options: Any) -> Any:
    """jaxtyping's decorator, for a function or a data class that states a shape."""
    if thing is None:
        return lambda decorated: jaxtyped_where_stated(decorated, **options)
    signed = getattr(thing, "__func__", getattr(thing, "fget", thing))
    names = vars(sys.modules[signed.__module__])
    stated = getattr(signed, "__annotations__", {}).values()
    return _jaxtyped(thing, **options) if any(states_shape(x, names) for x in stated) else thing


# It has overloads that nothing here needs.
jaxtyping.jaxtyped = jaxtyped_where_stated  # type: ignore[assignment]
