"""What probes and interventions have in common: a card, options that are checked, a way to write them in one line."""

import ast
import re
from abc import ABC
from collections.abc import Set
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args

from attnzoo.core.card import NAME, Fidelity, Paper
from attnzoo.core.options import misfit, options_of
from attnzoo.errors import ZooError, did_you_mean

NEEDS = {
    "weights": "attention maps of tokens",
    "heads": "the output of single heads",
    "labels": "the true classes of the inputs",
    "classes": "a model that says a class",
    "image": "images, whose tokens lie on a grid",
    "words": "sequences of words, as numbers of a vocabulary",
}
"""What an instrument may need of a model and its data, and what that is."""


@dataclass(frozen=True)
class InstrumentCard:
    """What a probe or an intervention says about itself.

    Args:
        name: What it is called on the command line.
        summary: One line.
        equation: What is measured or changed, as an equation.
        paper: Source; None for what has none.
        needs: What it needs: keys of `NEEDS`.
        fidelity: `exact`, or `adapted` or `inspired` with notes that say what differs from the paper.
        notes: What a user should know.
    """

    name: str
    summary: str
    equation: str = ""
    paper: Paper | None = None
    needs: Set[str] = frozenset()
    fidelity: Fidelity = "exact"
    notes: str = ""

    def __post_init__(self):
        object.__setattr__(self, "needs", frozenset(self.needs))  # a set literal may be written
        if not NAME.fullmatch(self.name):
            raise ValueError(f"card {self.name!r}: a name is snake_case: a-z, 0-9 and _, a letter first")
        if not self.summary or "\n" in self.summary:
            raise ValueError(f"card {self.name!r}: the summary is one line")
        if self.fidelity not in get_args(Fidelity):
            raise ValueError(f"card {self.name!r}: fidelity is one of {', '.join(get_args(Fidelity))}")
        if self.fidelity != "exact" and not self.notes:
            raise ValueError(
                f"card {self.name!r}: fidelity {self.fidelity!r} needs notes that say what differs"
            )
        if strange := self.needs - NEEDS.keys():
            raise ValueError(f"card {self.name!r}: {sorted(strange)} is nothing that can be needed")


@dataclass(kw_only=True)
class Instrument(ABC):
    """A probe or an intervention: a dataclass whose fields are its options, checked when it is made.

    Raises:
        ZooError: AZ921, for an option that cannot be.
    """

    card: ClassVar[InstrumentCard]
    takes_tensors: ClassVar[bool] = True
    """Whether options may be of classes that no text can say, such as tensors."""

    def __post_init__(self):
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        if wrong := misfit(type(self), given):
            option, why = wrong
            said = given.get(option.partition(".")[0])
            raise ZooError("AZ921", f"`{self.card.name}`: `{option}` cannot be {said!r}", why=why)

    def __str__(self) -> str:
        own = [field for field in fields(self) if field.init and field.repr]
        said = [f"{o.name}={getattr(self, o.name)!r}" for o in own if getattr(self, o.name) != o.default]
        return f"{self.card.name}({', '.join(said)})" if said else self.card.name


def read_call(text: str) -> tuple[str, dict[str, Any]]:
    """A name with options, as it is written in Python: `soft_identity(at="blocks.3", heads=[0, 2])`, or the name alone.

    Values are literals; nothing is run. `plugin/name` is a name too.

    Args:
        text: What was written.

    Raises:
        ZooError: AZ922, when it is no such thing.
    """
    plugin = (re.match(r"[\w.-]+/", text.strip()) or [""])[0]
    call = text.strip().removeprefix(plugin)
    try:
        tree = ast.parse(call, mode="eval").body
        if isinstance(tree, ast.Name):
            return plugin + tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            named = {str(word.arg): ast.literal_eval(word.value) for word in tree.keywords if word.arg}
            if len(named) == len(tree.keywords):
                return plugin + tree.func.id, named
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        pass
    raise ZooError(
        "AZ922",
        f"`{text}` is no name with options",
        help="write NAME or NAME(option=value, ...), values as in Python: 'temperature(at=\"blocks.3\", value=2.0)'",
    )


def made(cls: type[Instrument], options: dict[str, Any]) -> Instrument:
    """An instrument with options that somebody wrote.

    Args:
        cls: A probe or an intervention.
        options: By name.

    Raises:
        ZooError: AZ921, for an option that it does not have, or that cannot be.
    """
    known = options_of(cls).model_fields
    for name in options:
        if name not in known:
            listed = ", ".join(f"`{option}`" for option in known)
            raise ZooError(
                "AZ921",
                f"`{cls.card.name}` has no option `{name}`",
                help=did_you_mean(name, list(known)) or (f"there are {listed}" if listed else "it has none"),
            )
    missing = [name for name, field in known.items() if field.is_required() and name not in options]
    if missing:
        raise ZooError(
            "AZ921",
            f"`{cls.card.name}` needs `{missing[0]}`",
            help=f"write {cls.card.name}({missing[0]}=...)",
        )
    return cls(**options)
