"""The public names and their signatures are those of `api_surface.json`: no change goes unnoticed.

After a change that is meant: python tests/test_api_surface.py
"""

import dataclasses
import enum
import importlib
import inspect
import json
import typing
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).with_name("api_surface.json")
MODULES = (
    "attnzoo",
    "attnzoo.core",
    "attnzoo.functional",
    "attnzoo.gallery",
    "attnzoo.hf",
    "attnzoo.methods",
    "attnzoo.parallel",
    "attnzoo.plot",
    "attnzoo.testing",
    "attnzoo.recipe",
    "attnzoo.zoo",
    "attnzoo.zoo.hookspecs",
)


def signature(call: Any) -> str:
    """Parameters with their kinds and simple defaults; annotations are left to mypy, because their text varies."""
    try:
        own = inspect.signature(call)
    except (TypeError, ValueError):
        return "(...)"
    shown = []
    for parameter in own.parameters.values():
        default = parameter.default
        if default is not inspect.Parameter.empty and not isinstance(
            default, (type(None), bool, int, float, str, tuple)
        ):
            default = ...
        if isinstance(default, str) and isinstance(default, enum.Enum):
            default = default.value
        shown.append(parameter.replace(annotation=inspect.Parameter.empty, default=default))
    return str(inspect.Signature(shown)).replace("Ellipsis", "...")


def describe(value: Any) -> Any:
    """A public thing as JSON: the signature of a function; of a class its bases, signature and own public members."""
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return {"members": [member.value for member in value]}
    if inspect.isclass(value):
        members = {}
        for name, member in sorted(vars(value).items()):
            member = (
                inspect.unwrap(member.__func__) if isinstance(member, (classmethod, staticmethod)) else member
            )
            if name.startswith("_") or dataclasses.is_dataclass(value) and name in value.__dataclass_fields__:
                continue
            if inspect.isfunction(member):
                members[name] = signature(member)
            elif isinstance(member, property):
                members[name] = "property"
        bases = [base.__name__ for base in value.__bases__ if base is not object]
        return {"bases": bases, "signature": signature(value), "members": members}
    if typing.get_origin(value) is not None or getattr(value, "__module__", "") == "typing":
        return "type"
    return signature(value) if inspect.isroutine(value) else type(value).__name__


def public(module: Any) -> list[str]:
    """`__all__`, or what a module defines itself."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed)
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", module.__name__) == module.__name__]
    return sorted(n for n in own if not n.startswith("_") and not inspect.ismodule(getattr(module, n)))


def surface() -> dict[str, dict[str, Any]]:
    """Module -> name -> description."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    return {name: {key: describe(getattr(m, key)) for key in public(m)} for name, m in modules.items()}


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_as_recorded(module):
    recorded, found = json.loads(FILE.read_text(encoding="utf-8")), surface()
    assert set(recorded) == set(MODULES)
    assert sorted(found[module]) == sorted(recorded[module])
    changed = {name: value for name, value in found[module].items() if recorded[module][name] != value}
    assert not changed, f"{changed}; if it is meant: python tests/test_api_surface.py"


def test_the_record_would_notice_a_change():
    def before(x, *, width=3):
        """A function."""

    def after(x, *, width=4):
        """A function."""

    class Small:
        """A class."""

        def one(self, a, b=None):
            """A method."""

        @classmethod
        def two(cls):
            """A class method."""

        @property
        def three(self):
            """A property."""

    assert describe(before) == "(x, *, width=3)" != describe(after)
    assert describe(Small) == {
        "bases": [],
        "signature": "()",
        "members": {"one": "(self, a, b=None)", "three": "property", "two": "(cls)"},
    }


def test_every_public_thing_is_documented():
    for name in MODULES:
        module = importlib.import_module(name)
        for key in public(module):
            value = getattr(module, key)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), f"{name}.{key}"


def test_an_unknown_name_is_an_attribute_error():
    for name in ("attnzoo", "attnzoo.zoo", "attnzoo.testing"):
        module = importlib.import_module(name)
        assert not hasattr(module, "no_such_name")
    assert set(dir(importlib.import_module("attnzoo"))) >= {"compose", "Card", "hookimpl"}


if __name__ == "__main__":
    FILE.write_text(json.dumps(surface(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
