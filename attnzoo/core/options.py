"""Options: the keyword-only parameters of a constructor, as something that can be validated and shown."""

import inspect
import re
import textwrap
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

PositiveInt = Annotated[int, Field(ge=1, le=65536)]
"""A whole number from 1 to 65536."""
NonNegativeInt = Annotated[int, Field(ge=0, le=65536)]
"""A whole number from 0 to 65536."""
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A number above 0."""
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A number from 0."""


@cache
def options_of(cls: type) -> type[BaseModel]:
    """The keyword-only parameters of `cls.__init__` as a pydantic model: strict, frozen, unknown names refused.

    Args:
        cls: A mechanism, head or fusion.
    """
    texts = option_texts(cls)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (parameter.annotation, Field(default, description=texts.get(name, "")))
    config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        protected_namespaces=(),
        arbitrary_types_allowed=getattr(cls, "takes_tensors", False),
    )
    return create_model(f"{cls.__name__}Options", __config__=config, **fields)


def misfit(cls: type, options: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first option that cannot be, and why; None when all can.

    Args:
        cls: What they are options of.
        options: By name.
    """
    try:
        options_of(cls).model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return str(first["loc"][0]), first["msg"].replace("Input should", "it should")
    return None


@cache
def defaults_of(cls: type) -> Mapping[str, Any]:
    """The default of every option that has one.

    Args:
        cls: A mechanism, head or fusion.
    """
    parameters = inspect.signature(cls.__init__).parameters.values()
    found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    return MappingProxyType(found)


def option_texts(cls: type) -> dict[str, str]:
    """What the `Args:` section of the class docstring, or of the class it inherits its options from, says of each."""
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        found = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(owner.__doc__ or ""), re.M | re.S)
        if not found:
            continue
        for entry in re.split(r"\n(?=\S)", textwrap.dedent(found.group(1)).strip()):
            name, colon, text = entry.partition(":")
            if colon and name.isidentifier():
                texts[name] = " ".join(text.split())
    return texts
