"""The components nearest to one, and what each claims that the other does not: read off the cards."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attnzoo.catalogue.lists import form_of
from attnzoo.core import Card, FusionCard, Law
from attnzoo.core.instrument import NEEDS
from attnzoo.core.mask import KINDS
from attnzoo.zoo import Entry, Zoo

FEW = 4
"""How many a page names; of mechanisms softmax comes on top."""
STANDARD = "softmax"
"""What every mechanism is held against."""
FAMILY, FORM, NAMED, WORD = 4, 3, -6, -0.5
"""What weighs beside a claim that differs: another family, another form, that a text names the other, a common word."""
MANY = 3
"""More laws than these are counted, not named."""


@dataclass(frozen=True)
class Relative:
    """A component near to another.

    Args:
        entry: It.
        sentence: How it differs from the other: `It costs O(n²) instead of O(n) and honours causal masks too.`
    """

    entry: Entry
    sentence: str


def relatives(entry: Entry, zoo: Zoo) -> list[Relative]:
    """The nearest few of the same kind, nearest first; of a mechanism `softmax` is the first.

    Args:
        entry: A mechanism, pool, fusion, probe or intervention.
        zoo: Where to look.
    """
    registry = next(one for one in zoo.registries if entry.full_name in one)
    others = [other for other in registry.values() if other.full_name != entry.full_name]
    near = sorted(others, key=lambda other: (_distance(entry, other), other.name))[:FEW]
    standard = [other for other in others if other.full_name == f"attnzoo/{STANDARD}"]
    if form_of(entry.value) in ("head", "mechanism"):
        near = [*standard, *(other for other in near if other not in standard)]
    return [Relative(other, _sentence(differences(entry, other))) for other in near]


def differences(entry: Entry, other: Entry) -> list[str]:
    """What the other claims and the entry does not, and the other way round, as ends of a sentence about the other.

    Args:
        entry: What is held against.
        other: What the sentence is about; of the same kind.
    """
    mine, its = entry.value.card, other.value.card
    if not isinstance(its, Card | FusionCard):
        needs = _between_sets(its.needs, mine.needs, "needs {}", "does not need {}", NEEDS.__getitem__)
        return needs + _between_sets(_edits(other), _edits(entry), "changes {}", "does not change {}", _code)
    found = []
    if (form := form_of(other.value)) != form_of(entry.value):
        found.append(_FORMS[form])
    if isinstance(its, Card):
        found += _of_mechanisms(mine, its)
    else:
        found += _of_fusions(mine, its)
    found += _between_sets(
        its.masks, mine.masks, "honours {} masks{too}", "honours no {} masks", order=KINDS, too=mine.masks
    )
    if bool(its.auxiliary) != bool(mine.auxiliary):
        found.append("adds a loss in training" if its.auxiliary else "adds no loss in training")
    return found + _between_sets(its.laws, mine.laws, "wins {law}", "loses {law}", _code, list(Law))


def _of_mechanisms(mine: Card, its: Card) -> list[str]:
    found = []
    if its.family is not mine.family:
        found.append(f"is of the family `{its.family}`")
    if its.grows != mine.grows:
        found.append(f"costs {its.grows} instead of {mine.grows}")
    if bool(its.context) != bool(mine.context):
        found.append("reads from a context" if its.context else "reads from no context")
    if its.grid != mine.grid:
        kind = "no grid" if its.grid is None else "a grid" if its.grid == "any" else f"a {its.grid}-D grid"
        found.append(f"needs {kind}")
    if bool(its.fixed_length) != bool(mine.fixed_length):
        found.append(f"takes {'a fixed' if its.fixed_length else 'any'} number of tokens")
    if its.incremental != mine.incremental:
        found.append("decodes token by token" if its.incremental else "does not decode token by token")
    if its.one_head != mine.one_head:
        found.append("has one head" if its.one_head else "has as many heads as one likes")
    if its.hard_routing != mine.hard_routing:
        found.append("makes hard choices" if its.hard_routing else "makes no hard choices")
    maps = [f"a map of {kind}" for kind in sorted(set(its.given.values()) - set(mine.given.values()))]
    if maps or (mine.given and not its.given):
        found.append(f"asks for {_listed(maps)}" if maps else "asks for no map")
    if bool(its.tapped("weights")) != bool(mine.tapped("weights")):
        found.append("shows its weights" if its.tapped("weights") else "has no weights to show")
    return found


def _of_fusions(mine: FusionCard, its: FusionCard) -> list[str]:
    found = []
    if its.arity != mine.arity:
        least, most = its.arity
        words = "or more" if most is None else f"to {most}"
        found.append(f"merges {least if least == most else f'{least} {words}'} branches")
    if its.inside_heads != mine.inside_heads:
        found.append("works inside the heads too" if its.inside_heads else "works on tokens only")
    if its.hard_routing != mine.hard_routing:
        found.append("makes hard choices" if its.hard_routing else "makes no hard choices")
    return found


_FORMS = {
    "head": "works inside the heads",
    "mechanism": "works on tokens",
    "pool": "makes one token of all",
    "fusion": "merges branches",
}


def _between_sets(
    its: Iterable[str],
    mine: Iterable[str],
    wins: str,
    loses: str,
    shown: Any = str,
    order: Sequence[str] = (),
    too: Iterable[str] = (),
) -> list[str]:
    """Two ends of a sentence: what one set has beyond the other, and what it lacks."""
    its, mine, found = set(its), set(mine), []
    for sign, names in ((wins, its - mine), (loses, mine - its)):
        if names:
            ordered = sorted(names, key=lambda name: order.index(name) if order else name)
            words = _listed(list(map(shown, ordered)), "or" if " no " in sign else "and")
            law = (
                f"the law{'s' if len(names) > 1 else ''} {words}"
                if len(names) <= MANY
                else f"{len(names)} laws"
            )
            found.append(sign.format(words, law=law, too=" too" if set(too) else ""))
    return found


def _code(word: str) -> str:
    return f"`{word}`"


def _distance(entry: Entry, other: Entry) -> float:
    """How many claims differ, a family and a form counted several times; less where one's text names the other."""
    mine, its = entry.value.card, other.value.card
    apart = len(_claims(mine) ^ _claims(its)) + len(_edits(entry) ^ _edits(other))
    if isinstance(its, Card):
        apart += FAMILY * (its.family is not mine.family) + abs(its.growth - mine.growth)
    apart += FORM * (form_of(entry.value) != form_of(other.value))
    akin = _names(entry, other) or _names(other, entry) or _same_paper(mine, its)
    return apart + NAMED * akin + WORD * min(len(_words(entry) & _words(other)), 4)


def _claims(card: Any) -> set[Any]:
    """What a card claims, one by one."""
    names = (
        "context",
        "grid",
        "fixed_length",
        "incremental",
        "one_head",
        "hard_routing",
        "arity",
        "inside_heads",
    )
    single = {(name, getattr(card, name)) for name in names if getattr(card, name, None)}
    sets = ("masks", "laws", "needs", "given")
    many = {(name, one) for name in sets for one in getattr(card, name, ())}
    return single | many


def _edits(entry: Entry) -> set[str]:
    """Where an intervention edits; nowhere for all else."""
    return set(entry.value.points()) if form_of(entry.value) == "intervention" else set()


def _names(entry: Entry, other: Entry) -> bool:
    """Whether the text of one names the other."""
    card = entry.value.card
    return f"`{other.name}`" in f"{card.summary} {card.notes} {entry.value.__doc__}"


def _words(entry: Entry) -> set[str]:
    """The longer words of the summary and of the paper's title."""
    card = entry.value.card
    text = f"{card.summary} {card.paper.title if card.paper else ''}".lower()
    return set(re.findall(r"[^\W\d_]{5,}", text)) - _EVERYWHERE


_EVERYWHERE = {
    "attention",
    "attentions",
    "token",
    "tokens",
    "transformer",
    "transformers",
    "heads",
    "branches",
}


def _same_paper(mine: Any, its: Any) -> bool:
    return bool(mine.paper and its.paper and mine.paper.title == its.paper.title)


def _sentence(ends: Sequence[str]) -> str:
    return f"It {_listed(ends)}." if ends else "Its claims are the same."


def _listed(words: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)
