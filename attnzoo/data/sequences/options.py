"""Options that follow a task's name: `recall:pairs=8,length=64`."""

import re
from dataclasses import field, fields
from typing import Any, TypeVar

from attnzoo.errors import DataError, did_you_mean

T = TypeVar("T")
MOST_NUMBERS = 2**25
"""Numbers that the inputs of a side may have; they are held in memory, eight bytes each, and so are the targets."""


def option(default: int | float | bool, least: float = 0, most: float = 1) -> Any:
    """A field of a dataclass of options.

    Args:
        default: Says the type too.
        least: Smallest value.
        most: Largest value.
    """
    return field(default=default, metadata={"least": least, "most": most})


def options(kind: type[T], name: str) -> T:
    """Options from a name; what it does not set has its default.

    Args:
        kind: A dataclass of `option`s.
        name: The task, and after a colon `option=value` as often as wanted, separated by commas.

    Raises:
        DataError: AZ715 for an option that is unknown, set twice or not `option=value`, and for a wrong value.
    """
    task, colon, text = name.partition(":")
    known: dict[str, Any] = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    listed = "the options are " + ", ".join(f"`{each}={_text(known[each].default)}`" for each in known)
    found: dict[str, Any] = {}
    for part in text.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise DataError("AZ715", f"`{part}` in `{name}` is not `option=value`", help=listed)
        if key not in known:
            hint = did_you_mean(key, list(known))
            help = f"{hint} {listed}" if hint else listed
            raise DataError("AZ715", f"`{task}` has no option `{key}`", help=help)
        if key in found:
            raise DataError("AZ715", f"`{name}` sets `{key}` twice", help="keep one of them")
        found[key] = _value(task, known[key], value)
    return kind(**found)


def impossible(name: str, message: str, *, help: str, why: str = "") -> DataError:
    """The error for options that do not go together.

    Args:
        name: As the user wrote it.
        message: What does not go together.
        help: What to change.
        why: The rule.
    """
    return DataError("AZ715", f"`{name}`: {message}", why=why, help=help)


def check_size(name: str, count: int, numbers: int) -> None:
    """Refuse what would not fit into memory.

    Args:
        name: As the user wrote it.
        count: Sequences of the larger side.
        numbers: Numbers per sequence.

    Raises:
        DataError: AZ715 beyond `MOST_NUMBERS`.
    """
    if count * numbers > MOST_NUMBERS:
        raise impossible(
            name,
            f"{count:,} sequences of {numbers:,} numbers are too many",
            why=f"they are held in memory, at most {MOST_NUMBERS:,} numbers",
            help=f"ask for at most {MOST_NUMBERS // numbers:,} sequences, or for shorter ones",
        )


def _value(task: str, known: Any, text: str) -> int | float | bool:
    """A value of the type of the default, within its limits."""
    least, most = known.metadata["least"], known.metadata["most"]
    if isinstance(known.default, bool):
        if text in ("true", "false"):
            return text == "true"
        wanted = "`true` or `false`"
    elif isinstance(known.default, int):
        if re.fullmatch(r"[0-9]{1,12}", text) and least <= int(text) <= most:
            return int(text)
        wanted = f"a whole number from {least:,} to {most:,}"
    else:
        if (
            re.fullmatch(r"[0-9]{1,12}(\.[0-9]{0,12})?(e-?[0-9]{1,2})?", text)
            and least <= float(text) <= most
        ):
            return float(text)
        wanted = f"a number from {least:g} to {most:g}"
    return _refuse(task, known, text, wanted)


def _refuse(task: str, known: Any, text: str, wanted: str) -> int:
    raise DataError(
        "AZ715",
        f"`{known.name}` of `{task}` must be {wanted}, not `{text}`",
        help=f"leave it out for `{_text(known.default)}`",
    )


def _text(value: int | float | bool) -> str:
    return str(value).lower()
