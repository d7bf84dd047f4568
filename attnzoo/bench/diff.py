"""What two recipes differ in: sites, options, arguments, parameters, FLOPs, masks and laws."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from attnzoo.bench.composition import Report, describe
from attnzoo.core import Law
from attnzoo.core.card import MASK_KINDS
from attnzoo.recipe import Composition, Plan, load, resolve

NOWHERE = "–"
"""What stands where one of two recipes has no such site, or leaves a value to its base."""
KEEPS = {
    Law.PERMUTATION_EQUIVARIANT: Law.TOKEN_LOCAL,
    Law.LINEAR_IN_VALUES: Law.ADDITIVE,
    Law.BOUNDED: Law.CONVEX,
    Law.HEADS_APART: Law.TOKEN_LOCAL,
}
"""Laws that what is made of several keeps where all branches claim them, and the fusion claims the other."""


@dataclass(frozen=True)
class Change:
    """One difference.

    Args:
        about: `sites`, `heads`, `host`, `model`, `skip`, `pool`, `train`, `masks` or `laws`.
        where: Sites, or the way to a value: `blocks.0 to blocks.3`, `img_size`.
        first: What the first recipe has.
        second: What the second has.
    """

    about: str
    where: str
    first: str
    second: str


@dataclass(frozen=True)
class Difference:
    """What two recipes differ in.

    Args:
        names: Of the recipes.
        changes: One by one; empty when they compose the same model and train it in the same way.
        params: Parameters of each.
        flops: FLOPs of a forward on one sample, of each.
    """

    names: tuple[str, str]
    changes: tuple[Change, ...]
    params: tuple[int, int]
    flops: tuple[int, int]

    def as_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        return asdict(self)


def diff(first: Any, second: Any) -> Difference:
    """What two recipes differ in, semantically: how they are written plays no part.

        attnzoo.diff("ham_a", "ham_b")

    Args:
        first: What the other is held against: a recipe's name, file, text or mapping, or a composition.
        second: The other.

    Raises:
        RecipeError: AZ1xx to AZ3xx, what is wrong with one of them.
    """
    first, second = (one if isinstance(one, Composition) else resolve(load(one)) for one in (first, second))
    reports = describe(first), describe(second)
    changes = [
        *_values(
            "host",
            {"kind": reports[0].family, "base": reports[0].base},
            {"kind": reports[1].family, "base": reports[1].base},
        ),
        *_values("model", _arguments(first), _arguments(second)),
        *_sites(first, second),
        *_values("heads", _heads(reports[0]), _heads(reports[1])),
        *_values("skip", {"skip": reports[0].skip}, {"skip": reports[1].skip}),
        *_values("pool", {"pool": _formula(first.pool)}, {"pool": _formula(second.pool)}),
        *_values("train", _flat(_train(first)), _flat(_train(second))),
        *_claims("masks", masks(first), masks(second)),
        *_claims("laws", laws(first), laws(second)),
    ]
    names = first.loaded.name, second.loaded.name
    return Difference(
        names, tuple(changes), (reports[0].params, reports[1].params), (reports[0].flops, reports[1].flops)
    )


def masks(composition: Composition) -> set[str]:
    """Kinds of mask that hold at every site."""
    return set(MASK_KINDS).intersection(*(plan.card.masks for plan in composition.plans.values()))


def laws(composition: Composition) -> set[str]:
    """Laws of mechanisms that hold at every site.

    What is made of several keeps a law that all its branches claim, if its fusion claims the one that carries it over:
    a fusion of tokens by themselves keeps equivariance, an additive one linearity, a convex one bounds.
    """
    return {str(law) for law in set(Law).intersection(*(_laws(plan) for plan in composition.plans.values()))}


def _laws(plan: Plan) -> set[Law]:
    if not plan.branches:
        return set(plan.card.laws)
    common = set(KEEPS).intersection(*(_laws(branch) for branch in plan.branches))
    return {law for law in common if KEEPS[law] in plan.entry.value.card.laws}


def _claims(about: str, first: set[str], second: set[str]) -> Iterator[Change]:
    """What the second lost, and what it won."""
    for name in sorted(first - second):
        yield Change(about, name, "everywhere", "lost")
    for name in sorted(second - first):
        yield Change(about, name, "not everywhere", "won")


def _sites(first: Composition, second: Composition) -> Iterator[Change]:
    """Runs of neighbouring sites at which the same became the same."""
    names = list(dict.fromkeys([*first.plans, *second.plans]))
    pairs = [(name, _formula(first.plans.get(name)), _formula(second.plans.get(name))) for name in names]
    different = [pair for pair in pairs if pair[1] != pair[2]]
    for (one, other), run in groupby(different, key=lambda pair: pair[1:]):
        where = [name for name, *_ in run]
        yield Change("sites", where[0] if len(where) == 1 else f"{where[0]} to {where[-1]}", one, other)


def _formula(plan: Plan | None) -> str:
    return NOWHERE if plan is None else str(plan)


def _heads(report: Report) -> dict[str, str]:
    return {kind: " ".join(map(str, counts)) for kind, counts in report.heads.items()}


def _arguments(composition: Composition) -> dict[str, Any]:
    """What a model is built with beside its base."""
    host = composition.loaded.recipe.host.model_dump()
    given = _flat({k: v for k, v in host.items() if k not in ("kind", "base", "registers")})
    return given | {
        "image": getattr(composition.info, "image", None),
        "classes": getattr(composition.info, "classes", None),
    }


def _train(composition: Composition) -> dict[str, Any]:
    return composition.loaded.recipe.train.model_dump(mode="json")


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by the way to each."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        found |= _flat(value, here) if isinstance(value, Mapping) else {here: value}
    return found


def _values(about: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys([*first, *second]):
        one, other = first.get(key), second.get(key)
        if one != other:
            yield Change(about, key, _shown(one), _shown(other))


def _shown(value: Any) -> str:
    if value is None or value in ("", []):
        return NOWHERE
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        return ", ".join(f"{one['use']}{_options(one.get('with_', {}))}" for one in value)
    return " × ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _options(options: Mapping[str, Any]) -> str:
    return f"[{', '.join(f'{name}={value}' for name, value in options.items())}]" if options else ""
