"""The probes: one file each. Dropping a file in is all it takes.

A class can be had from here by its name: `from attnzoo.probes import Entropy`.
"""

import re
from importlib import import_module


def __getattr__(name: str):
    module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    try:
        return getattr(import_module(f"attnzoo.probes.{module}"), name)
    except ImportError:
        raise AttributeError(f"there is no probe class called {name!r}") from None
