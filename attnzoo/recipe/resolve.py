"""From a recipe to plans: names become entries of the zoo, options are checked, demands meet claims. Nothing is built."""

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from pydantic import ValidationError

from attnzoo.core import Card, Fused, FusedHeads, Fusion, Head, Mechanism, MultiHead, Site, options_of
from attnzoo.core.mechanism import fused_card
from attnzoo.errors import Diagnostic, Place, RecipeError
from attnzoo.hosts.demand import Demand, unmet
from attnzoo.hosts.vision_transformer import Survey, site_of, survey
from attnzoo.recipe.faults import faults_of
from attnzoo.recipe.load import Loaded
from attnzoo.recipe.schema import Fuse, Spec, Use
from attnzoo.recipe.source import Loc, Source
from attnzoo.zoo import Entry, Zoo, load_zoo


@dataclass(frozen=True)
class Plan:
    """What will be put at a site.

    Args:
        entry: Mechanism, head or fusion.
        options: Its options, as given.
        card: What it claims with these options.
        inside_heads: Whether it works between projections that it shares.
        heads: Number of heads, when it differs from the host's.
        branches: For a fusion.
        place: Where its name stands in the recipe.
    """

    entry: Entry
    options: Mapping[str, Any]
    card: Card
    inside_heads: bool
    heads: int | None
    branches: tuple["Plan", ...]
    place: Place

    def __str__(self) -> str:
        """As a formula: `hadamard(softmax, soft[reading=gated])`."""
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        inner = f"({', '.join(map(str, self.branches))})" if self.branches else ""
        return f"{self.entry.name}{f'[{options}]' if options else ''}{inner}"

    def leaves(self) -> list["Plan"]:
        """The mechanisms in it, in order."""
        return [leaf for branch in self.branches for leaf in branch.leaves()] if self.branches else [self]

    def starts_as_softmax(self) -> bool:
        """Whether it equals plain attention before training."""
        if self.branches:
            return self.options.get("start") == "identity" and self.branches[0].starts_as_softmax()
        return self.entry.full_name == "attnzoo/softmax"

    def build(self, site: Site) -> Mechanism:
        """The mechanism for a site.

        Raises:
            RecipeError: what the parts' constructors raise, with the place of the part.
        """
        if self.heads is not None:
            site = replace(site, heads=self.heads)
        if self.inside_heads:
            with _blame(self):
                site.head_dim  # noqa: B018 - raises AZ308 when the heads do not divide the width
            return MultiHead(site, self._head(site))
        if not self.branches:
            with _blame(self):
                return self.entry.value(site, **self.options)
        fusion = partial(_fusion, self)
        return Fused(site, fusion, [partial(_branch, branch) for branch in self.branches])

    def _head(self, site: Site) -> Head:
        if not self.branches:
            with _blame(self):
                return self.entry.value(site, **self.options)
        return FusedHeads(site, partial(_fusion, self), [branch._head for branch in self.branches])


def _branch(plan: Plan, site: Site) -> Mechanism:
    return plan.build(site)


def _fusion(plan: Plan, site: Site, arity: int) -> Fusion:
    with _blame(plan):
        type_ = cast(type[Fusion], plan.entry.value)
        type_.sites(site, arity)
        return type_(site, arity, **plan.options)


@contextmanager
def _blame(plan: Plan) -> Iterator[None]:
    """Faults raised while a part is built get the place of its name; what is no fault of ours becomes one of the part."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError.of([d if d.place else replace(d, place=plan.place) for d in error.diagnostics]) from None
    except Exception as error:
        if plan.entry.plugin == "attnzoo":
            raise
        text = str(error).splitlines()[0] if str(error) else ""
        raise RecipeError(
            "AZ215",
            f"`{plan.entry.full_name}` cannot be built: {type(error).__name__}: {text}",
            place=plan.place,
            help=f"this is a fault of the plugin; `attnzoo check {plan.entry.full_name}` shows more",
        ) from error


@dataclass(frozen=True)
class Composition:
    """A recipe whose every name is known and whose every demand is met.

    Args:
        loaded: The recipe.
        seen: The surveyed base.
        plans: What is put where, by site name.
    """

    loaded: Loaded
    seen: Survey
    plans: Mapping[str, Plan]

    def put(self, site: Site) -> Mechanism:
        """The mechanism for a site."""
        return self.plans[site.name].build(site)

    @property
    def starts_equal(self) -> bool:
        """Whether the composed model equals its base before training, given the base's weights."""
        return all(plan.starts_as_softmax() for plan in self.plans.values())


def resolve(loaded: Loaded, arguments: Mapping[str, Any] | None = None, zoo: Zoo | None = None) -> Composition:
    """Check a recipe against the zoo and its host.

    Args:
        loaded: The recipe.
        arguments: Constructor arguments of the host that hold instead of the recipe's.
        zoo: Where names are looked up; the installed plugins when None.

    Raises:
        RecipeError: AZ2xx, AZ3xx, all of them at once.
    """
    recipe, source = loaded.recipe, loaded.source
    planner = _Planner(zoo or load_zoo(), source)
    main = planner.plan(recipe.attention, ("attention",))
    puts = [planner.plan(override.put, ("overrides", i, "put")) for i, override in enumerate(recipe.overrides)]
    faults = planner.faults
    wanted = {**recipe.host.model.model_dump(exclude_unset=True, exclude_none=True), **(arguments or {})}
    try:
        seen = survey(recipe.host.base, wanted)
    except RecipeError as error:
        loc: Loc = ("host", "base") if error.code in ("AZ301", "AZ310") else ("host", "model")
        place = source.value_place(loc if loc in source.values else ("host",))
        raise RecipeError.of([*faults, *(replace(d, place=place) for d in error.diagnostics)]) from None
    plans = dict.fromkeys(seen.sites(), main)
    for i, override in enumerate(recipe.overrides):
        names = fnmatch.filter(plans, override.at)
        if not names:
            shown = ", ".join(plans) if len(plans) < 5 else f"{seen.sites()[0]} to {seen.sites()[-1]}"
            faults.append(Diagnostic("AZ304", f"`{override.at}` matches no site", source.value_place(("overrides", i, "at")),
                                     help=f"the sites are {shown}; `blocks.*` means all"))  # fmt: skip
        plans |= dict.fromkeys(names, puts[i])
    faults += _misfits(plans, seen)
    if faults:
        unique = {(d.code, d.message, d.place): d for d in faults}
        raise RecipeError.of(unique.values())
    return Composition(loaded, seen, cast(dict[str, Plan], plans))


def _misfits(plans: Mapping[str, Plan | None], seen: Survey) -> list[Diagnostic]:
    """Demands that are not met, and parts that cannot be built where they are put. One fault per plan, not per site."""
    demand = Demand(
        grid=len(seen.layout.grid),
        varying_length="`dynamic_img_size` lets it change" if seen.dynamic else "",
        drops_tokens="`patch_drop_rate` drops some in training" if seen.patch_drop else "",
    )
    faults: list[Diagnostic] = []
    first_sites: dict[int, tuple[str, Plan]] = {}
    for name, plan in plans.items():
        if plan is not None:
            first_sites.setdefault(id(plan), (name, plan))
    for name, plan in first_sites.values():
        for leaf in plan.leaves():
            for why in unmet(leaf.card, demand):
                faults.append(Diagnostic("AZ302", f"`{leaf.entry.name}` cannot be put at {name}", leaf.place, why,
                                         "`attnzoo list mechanisms` shows what each can do"))  # fmt: skip
        try:
            with torch.device("meta"):
                plan.build(site_of(seen, seen.sites().index(name)))
        except RecipeError as error:
            faults += error.diagnostics
    return faults


class _Planner:
    """Turns specs into plans and gathers the faults on the way."""

    def __init__(self, zoo: Zoo, source: Source):
        self.zoo, self.source = zoo, source
        self.faults: list[Diagnostic] = []

    def plan(self, spec: Spec, loc: Loc) -> Plan | None:
        return self.use(spec, loc) if isinstance(spec, Use) else self.fuse(spec, loc)

    def name_place(self, loc: Loc, key: str) -> Place:
        return self.source.value_place((*loc, key) if (*loc, key) in self.source.values else loc)

    def use(self, spec: Use, loc: Loc) -> Plan | None:
        place = self.name_place(loc, "use")
        entry = self.find(self.zoo.mechanisms, spec.use, place, self.zoo.fusions, "`fuse: {}` with `of: [...]`")
        if entry is None:
            return None
        options = self.options(entry, spec.with_, loc)
        if options is None:
            return None
        inside = issubclass(entry.value, Head)
        return Plan(entry, options, entry.value.claims(**options), inside, spec.heads, (), place)

    def fuse(self, spec: Fuse, loc: Loc) -> Plan | None:
        place = self.name_place(loc, "fuse")
        entry = self.find(self.zoo.fusions, spec.fuse, place, self.zoo.mechanisms, "`use: {}`")
        branches = [self.plan(inner, (*loc, "of", i)) for i, inner in enumerate(spec.of)]
        options = self.options(entry, spec.with_, loc) if entry is not None else None
        if entry is None or options is None or any(branch is None for branch in branches):
            return None
        known = cast(list[Plan], branches)
        on_tokens = [branch for branch in known if not branch.inside_heads]
        inside = spec.level == "heads" or (spec.level is None and not on_tokens)
        if inside and on_tokens:
            names = ", ".join(f"`{branch.entry.name}`" for branch in on_tokens)
            self.fault("AZ303", f"{names} cannot be fused inside the heads", on_tokens[0].place,
                       why="it has projections of its own, so it works on tokens", help="write `level: tokens`")  # fmt: skip
            return None
        own = [branch for branch in known if branch.heads is not None] if inside else []
        for branch in own:
            self.fault("AZ303", f"`{branch.entry.name}` cannot have its own number of heads inside the heads", branch.place,
                       why="the branches share queries, keys and values",
                       help="write `level: tokens`, or put `heads:` at the fusion")  # fmt: skip
        card = fused_card(entry.value.card, [branch.card for branch in known])
        return None if own else Plan(entry, options, card, inside, spec.heads, tuple(known), place)

    def find(self, registry, name: str, place: Place, other, instead: str) -> Entry | None:
        """The entry, or a fault; a name of the other kind gets its own hint."""
        try:
            return registry.find(name, place)
        except RecipeError as error:
            if name in other:
                self.fault("AZ203", f"`{name}` is a {other.kind}, not a {registry.kind}", place,
                           help=f"write {instead.format(name)}")  # fmt: skip
            else:
                self.faults += error.diagnostics
            return None

    def options(self, entry: Entry, given: Mapping[str, Any], loc: Loc) -> dict[str, Any] | None:
        try:
            checked = options_of(entry.value).model_validate(dict(given))
        except ValidationError as error:
            faults = faults_of(error, self.source, (*loc, "with"), entry.name)
            self.faults += [self.hinted(fault, entry) for fault in faults]
            return None
        return {name: getattr(checked, name) for name in given}

    def hinted(self, fault: Diagnostic, entry: Entry) -> Diagnostic:
        """For an unknown option: which one was meant."""
        if fault.code != "AZ210":
            return fault
        from attnzoo.errors import did_you_mean

        names = list(options_of(entry.value).model_fields)
        key = fault.message.rsplit("`", 2)[1]
        hint = did_you_mean(key, names) or (f"its options are {', '.join(names)}" if names else "it has none")
        return replace(fault, help=hint)

    def fault(self, code: str, message: str, place: Place, why: str = "", help: str = "") -> None:
        self.faults.append(Diagnostic(code, message, place, why, help))
