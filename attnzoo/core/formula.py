"""Formulas on cards: parameters and FLOPs, in the shape letters and the names of options."""

import math
from collections.abc import Mapping
from typing import Any

from attnzoo.core.site import Site

FUNCTIONS = {
    "ceil": math.ceil,
    # an option of each dimension of the grid
    "each": lambda value, axes: value if isinstance(value, list) else [value] * axes,
    "len": len,
    "log": math.log,
    "max": max,
    "min": min,
    "prod": math.prod,
    "range": range,
    "round": round,
    "sum": sum,
}
"""What a formula may call."""


def check_formula(text: str) -> None:
    """Refuse what is no formula.

    Args:
        text: An expression of Python: `2 * rank * n if share == "headwise" else rank * n`.

    Raises:
        ValueError: When it is none.
    """
    try:
        compile(text, "<formula>", "eval")
    except SyntaxError as error:
        raise ValueError(f"`{text}` is no formula: {error.msg}") from None


def evaluate(text: str, site: Site, options: Mapping[str, Any]) -> int:
    """The number that a formula gives at a site.

    Known to it are `n` and `m`, tokens and tokens that are read from; `c`, `h`, `d`, `p` as in the docs; `e`, channels
    of what is read from; `context`, 1 where that is another stream, else 0; `sides`, tokens along each dimension
    of the grid, and `context_sides`; `layer`; the site's wishes `qkv_bias`, `proj_bias`, `qk_norm`, `scale_norm` and
    `rotary`, each 0 or 1; every option by its name.

    Args:
        text: The formula, of `Card.params` or `Card.flops`.
        site: Where the component is put.
        options: All its options.

    Raises:
        ValueError: When it names what is not known, or gives no whole number.
    """
    source = site.context_layout or site.layout
    names = {
        "n": site.layout.length,
        "m": source.length,
        "c": site.dim,
        "e": site.context_dim or site.dim,
        "context": int(site.context_dim is not None),
        "h": site.heads,
        "d": site.dim // site.heads,
        "p": site.layout.prefix,
        "sides": site.layout.grid,
        "context_sides": source.grid,
        "layer": site.layer,
        **{w: int(getattr(site, w)) for w in ("qkv_bias", "proj_bias", "qk_norm", "scale_norm", "rotary")},
    }
    try:
        # A card is code of whoever wrote the component; what it can call is kept short for the reader's sake.
        number = eval(text, {"__builtins__": {}, **FUNCTIONS, **names, **options})  # noqa: S307
    except (ArithmeticError, LookupError, NameError, TypeError, ValueError) as error:
        known = ", ".join([*names, *options])
        raise ValueError(f"the formula `{text}` cannot be computed: {error}; known are {known}") from error
    if number != int(number):
        raise ValueError(f"the formula `{text}` gives {number}, which is no whole number")
    return int(number)
