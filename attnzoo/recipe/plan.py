"""What will be put at a site: a component with its options, or a fusion of several."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from attnzoo.core import Card, Fused, FusedHeads, Fusion, Head, Mechanism, MultiHead, Pool, Site
from attnzoo.errors import Place, RecipeError, ZooError
from attnzoo.zoo import Entry
from attnzoo.zoo.blame import OURS, blame, short
from attnzoo.zoo.contract import Breach, built, sites_of


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
        """As a formula: `hadamard(softmax, soft[variant=gated])`."""
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        inner = f"({', '.join(map(str, self.branches))})" if self.branches else ""
        return f"{self.entry.name}{f'[{options}]' if options else ''}{inner}"

    def leaves(self) -> list["Plan"]:
        """The mechanisms in it, in order."""
        return [leaf for branch in self.branches for leaf in branch.leaves()] if self.branches else [self]

    def fusions(self) -> list["Plan"]:
        """The fusions in it, outermost first."""
        return (
            [self, *(inner for branch in self.branches for inner in branch.fusions())]
            if self.branches
            else []
        )

    def starts_as_softmax(self) -> bool:
        """Whether it equals plain attention before training."""
        if self.branches:
            return self.options.get("start") == "identity" and self.branches[0].starts_as_softmax()
        return self.entry.full_name == "attnzoo/softmax"

    def build(self, site: Site) -> Mechanism:
        """The mechanism for a site.

        Raises:
            RecipeError: what the components' constructors raise, with the place of the component.
        """
        if self.heads is not None:
            site = replace(site, heads=self.heads)
        if self.inside_heads:
            with blamed(self.entry, self.place):
                site.head_dim  # noqa: B018 - raises AZ308 when the heads do not divide the width
            return MultiHead(site, self.head(site))
        if not self.branches:
            with blamed(self.entry, self.place):
                if issubclass(self.entry.value, Pool):
                    site.head_dim  # noqa: B018 - raises AZ308
                return built(self.entry, site, **self.options)
        fusion = partial(_fusion, self)
        return Fused(site, fusion, [partial(_branch, branch) for branch in self.branches])

    def head(self, site: Site) -> Head:
        """What happens inside the heads, for a site, without projections; only where `inside_heads`.

        Raises:
            RecipeError: what the components' constructors raise, with the place of the component.
        """
        if not self.branches:
            with blamed(self.entry, self.place):
                return built(self.entry, site, **self.options)
        return FusedHeads(site, partial(_fusion, self), [branch.head for branch in self.branches])


def _branch(plan: Plan, site: Site) -> Mechanism:
    return plan.build(site)


def _fusion(plan: Plan, site: Site, arity: int) -> Fusion:
    with blamed(plan.entry, plan.place):
        sites_of(plan.entry, site, arity)
        return built(plan.entry, site, arity, **plan.options)


def plugin_fault(error: BaseException, entry: Entry, place: Place, code: str, what: str) -> RecipeError:
    """What a plugin's component did, as a fault of the recipe that names it.

    Args:
        error: What it raised.
        entry: The component.
        place: Where its name stands.
        code: `AZnnn`.
        what: In words that follow its name.
    """
    found = blame(error, [entry])
    return RecipeError(
        code,
        f"`{entry.full_name}` {what}",
        place=place,
        why=f"raised at {found.where}" if found and found.where else "",
        help=f"this is a fault of the plugin; `attnzoo check {entry.full_name}` shows more",
    )


@contextmanager
def blamed(entry: Entry, place: Place) -> Iterator[None]:
    """Faults of a component get the place of its name; what else a plugin raises becomes a fault of the plugin.

    Raises:
        RecipeError: AZ215, AZ011 and AZ014 for a plugin at fault.
    """
    try:
        yield
    except ZooError as error:
        raise RecipeError.of([d if d.place else replace(d, place=place) for d in error.diagnostics]) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plugin may not end the program
        if entry.plugin == OURS:
            raise
        breach = error if isinstance(error, Breach) else Breach("AZ215", f"cannot be built: {short(error)}")
        raise plugin_fault(error, entry, place, breach.code, breach.reason) from error


@dataclass(frozen=True)
class Placed:
    """What a component that was built from a plan remembers of it, for `attnzoo.describe`.

    Args:
        site: Name of its site; empty where it stands alone.
        formula: The plan as a formula.
    """

    site: str
    formula: str


def put(plan: Plan, site: Site) -> Mechanism:
    """The component of a plan for a site; it remembers both."""
    component = plan.build(site)
    vars(component)["_placed"] = Placed(site.name, str(plan))
    return component
