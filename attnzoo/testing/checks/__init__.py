"""Checks: plain functions, one claim each. A failure says what was claimed and what happened.

A check takes a class and a scene; `requires` says to which cards it applies. One file for each thing that is claimed.
"""

from attnzoo.testing.checks import (
    construction,
    context,
    cost,
    decoding,
    fusions,
    geometry,
    gradients,
    laws,
    masks,
    output,
    site,
    state,
    taps,
)
from attnzoo.testing.claim import Check

CHECKS: dict[str, Check] = {
    name: value
    for module in (construction, output, masks, gradients, state, site, geometry, context, taps, decoding, cost,
                   laws, fusions)
    for name, value in vars(module).items()
    if name.startswith("check_")
}  # fmt: skip
"""All checks by name."""
