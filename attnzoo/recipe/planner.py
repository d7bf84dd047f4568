"""From what a recipe says of a site to a plan: names become entries of the zoo, options are checked."""

from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import ValidationError

from attnzoo.core import Head, Pool
from attnzoo.core.fused import fused_card
from attnzoo.core.options import options_of
from attnzoo.errors import Diagnostic, Place, RecipeError, did_you_mean
from attnzoo.recipe.faults import faults_of
from attnzoo.recipe.made_with import MadeWith, Plugin
from attnzoo.recipe.plan import Plan, blamed
from attnzoo.recipe.schema import FUSE, MAX_MECHANISMS, Fuse, Spec, Use, spec_tag
from attnzoo.recipe.source import MAX_FAULTS, Loc, Source
from attnzoo.zoo import Entry, Provider, Registry, Zoo
from attnzoo.zoo.contract import claimed


def _mechanisms(spec: Spec) -> int:
    return sum(map(_mechanisms, spec.of)) if isinstance(spec, Fuse) else 1


class Planner:
    """Turns specs into plans and gathers the faults on the way.

    Args:
        zoo: Where names are looked up.
        source: The recipe.
        made_with: What the recipe was made with: a bare name means what it meant there.
    """

    def __init__(self, zoo: Zoo, source: Source, made_with: MadeWith | None = None):
        self.zoo, self.source, self.made_with = zoo, source, made_with
        self.faults: list[Diagnostic] = []
        self.notes: list[Diagnostic] = []

    def whole(self, spec: Spec, loc: Loc) -> Plan | None:
        """The plan of a site, unless it merges more than anybody means to."""
        many = _mechanisms(spec)
        if many <= MAX_MECHANISMS:
            return self.plan(spec, loc)
        message = f"`{'.'.join(map(str, loc))}` merges {many:,} mechanisms; at most {MAX_MECHANISMS} can be"
        self.fault(
            "AZ312", message, self.source.value_place(loc), help="nest fewer fusions, of fewer branches"
        )
        return None

    def plan(self, spec: Spec, loc: Loc) -> Plan | None:
        return self.use(spec, loc) if isinstance(spec, Use) else self.fuse(spec, loc)

    def pool(self, spec: Spec) -> Plan | None:
        """What makes one token of all."""
        if isinstance(spec, Use):
            return self.use(spec, ("pool",))
        place = self.source.value_place(("pool", "fuse"))
        self.fault("AZ318", "pools cannot be fused", place, help="write one: `pool: NAME`")
        return None

    def look(self, spec: Any, loc: Loc) -> None:
        """Names and options of a spec that may be malformed, and of those inside it."""
        spec = {"use": spec} if isinstance(spec, str) else spec
        if not isinstance(spec, dict):
            return
        key: Literal["use", "fuse"] = "fuse" if spec_tag(spec) == FUSE else "use"
        name, given, branches = spec.get(key), spec.get("with", {}), spec.get("of")
        if isinstance(name, str) and name:
            self.component(key, name, given if isinstance(given, dict) else {}, loc)
        for i, inner in enumerate(branches if isinstance(branches, list) else ()):
            self.look(inner, (*loc, "of", i))

    def use(self, spec: Use, loc: Loc) -> Plan | None:
        component = self.component("use", spec.use, spec.with_, loc)
        if component is None:
            return None
        entry, options, place = component
        if loc and issubclass(entry.value, Pool) != (loc == ("pool",)):  # a spec alone may be either
            self.misplaced(entry, place)
            return None
        try:
            with blamed(entry, place):
                card = claimed(entry, options)
        except RecipeError as error:
            self.faults += error.diagnostics
            return None
        return Plan(entry, options, card, issubclass(entry.value, Head), spec.heads, (), place)

    def fuse(self, spec: Fuse, loc: Loc) -> Plan | None:
        component = self.component("fuse", spec.fuse, spec.with_, loc)
        branches = [self.plan(inner, (*loc, "of", i)) for i, inner in enumerate(spec.of)]
        if component is None or any(branch is None for branch in branches):
            return None
        entry, options, place = component
        known = cast(list[Plan], branches)
        on_tokens = [branch for branch in known if not branch.inside_heads]
        merges_inside = entry.value.card.inside_heads
        inside = spec.level == "heads" or (spec.level is None and not on_tokens and merges_inside)
        if inside and not merges_inside:
            message, why = f"`{entry.name}` cannot fuse inside the heads", "it merges on tokens only"
            self.fault("AZ303", message, place, why, "write `level: tokens`")
            return None
        if inside and on_tokens:
            names = ", ".join(f"`{branch.entry.name}`" for branch in on_tokens)
            why, help = "what has projections of its own works on tokens", "write `level: tokens`"
            self.fault("AZ303", f"{names} cannot be fused inside the heads", on_tokens[0].place, why, help)
            return None
        own = [branch for branch in known if branch.heads is not None] if inside else []
        for branch in own:
            message = f"`{branch.entry.name}` cannot have its own number of heads inside the heads"
            help = "write `level: tokens`, or put `heads:` at the fusion"
            self.fault("AZ303", message, branch.place, "the branches share queries, keys and values", help)
        card = fused_card(entry.value.card, [branch.card for branch in known])
        return None if own else Plan(entry, options, card, inside, spec.heads, tuple(known), place)

    def misplaced(self, entry: Entry, place: Place) -> None:
        """A pool where tokens are mixed, or what mixes tokens where one is made of all."""
        if issubclass(entry.value, Pool):
            message = f"`{entry.name}` makes one token of all; attention gives one for each"
            help = f"write `pool: {entry.name}` beside `attention:`"
        else:
            message = f"`{entry.name}` gives a token for each token; a pool makes one of all"
            can = [f"`{name}`" for name, one in self.zoo.mechanisms.items() if issubclass(one.value, Pool)]
            help = f"pools are {', '.join(can)}" if can else "leave `pool:` out: no plugin offers one"
        self.fault("AZ318", message, place, help=help)

    def component(
        self, key: Literal["use", "fuse"], name: str, given: Mapping[str, Any], loc: Loc
    ) -> tuple[Entry, dict[str, Any], Place] | None:
        """A mechanism or fusion with its options and the place of its name, or a fault."""
        if len(self.faults) >= MAX_FAULTS:
            return None
        spot = (*loc, key)
        place = self.source.value_place(spot if spot in self.source.values else loc)
        entry = self.find(key, name, place)
        if entry is None:
            return None
        before, schema = len(self.faults), options_of(entry.value)
        written = self.renamed(entry, given, (*loc, "with"))
        if len(self.faults) > before:
            return None
        options = {written.get(name, name): value for name, value in given.items()}
        try:
            checked = schema.model_validate(options)
        except ValidationError as error:
            old = {new: name for name, new in written.items()}
            self.faults += faults_of(error, self.source, schema, (*loc, "with"), entry.name, old)
            return None
        return entry, {name: getattr(checked, name) for name in options}, place

    def renamed(self, entry: Entry, given: Mapping[str, Any], loc: Loc) -> dict[str, str]:
        """Options that are given by a name of old, with their names of today; each is noted."""
        names: Mapping[str, str] = getattr(entry.value, "renamed", {})
        written = {old: new for old, new in names.items() if old in given}
        for old, new in written.items():
            place = self.source.key_place((*loc, old))
            if new in given:
                message = f"`{entry.name}` is given `{old}` and `{new}`, which are one option"
                self.fault("AZ217", message, place, f"`{old}` is its name of old", f"leave `{old}` out")
            else:
                message = f"the option `{old}` of `{entry.name}` is now called `{new}`"
                self.notes.append(Diagnostic("", message, place, help=f"write `{new}`; `{old}` works still"))
        return {old: new for old, new in written.items() if new not in given}

    def find(self, key: Literal["use", "fuse"], name: str, place: Place) -> Entry | None:
        """The entry, or a fault; names of the other kind and of absent plugins get their own."""
        registry: Registry = self.zoo.mechanisms if key == "use" else self.zoo.fusions
        other: Registry = self.zoo.fusions if key == "use" else self.zoo.mechanisms
        if owner := self.made_with.owner(registry.kind, name) if self.made_with else "":
            name = f"{owner}/{name}"
        try:
            return registry.find(name, place)
        except RecipeError as error:
            plugin, slash, _ = name.partition("/")
            provider = next((provider for provider in self.zoo.providers if provider.name == plugin), None)
            if name in other:
                instead = f"fuse: {name}` with `of: [...]" if key == "use" else f"use: {name}"
                self.fault(
                    "AZ203",
                    f"`{name}` is a {other.kind}, not a {registry.kind}",
                    place,
                    help=f"write `{instead}`",
                )
            elif error.code == "AZ205":
                self.faults += error.diagnostics
            elif slash and (provider is None or not provider.works):
                self.absent(name, plugin, provider, place)
            elif slash and provider and (made := self.made(plugin)):
                self.fault(
                    "AZ830",
                    f"the plugin `{plugin}` offers no {registry.kind} `{name.partition('/')[2]}` any more",
                    place,
                    f"this was made with {made}; here is {provider.dist} {provider.version}",
                    made.how_to_get,
                )
            elif slash:
                names = [entry.full_name for entry in registry.values() if entry.plugin == plugin]
                hint = did_you_mean(name, names) or f"`attnzoo list {registry.kind}s` shows what there is"
                self.fault(error.code, error.diagnostics[0].message, place, help=hint)
            else:
                self.faults += error.diagnostics
            return None

    def absent(self, name: str, plugin: str, provider: Provider | None, place: Place) -> None:
        """A name of a plugin that is not installed, switched off or broken."""
        made, names = self.made(plugin), [provider.name for provider in self.zoo.providers]
        if provider is None:
            what = "which is not installed"
            shown = ", ".join(f"`{name}`" for name in names)
            hint = did_you_mean(plugin, names) or f"`pip install attnzoo-{plugin}`; installed are {shown}"
            help = made.how_to_get if made else hint
        else:
            what = (
                "which is switched off" if provider.status == "switched off" else "which could not be loaded"
            )
            help = "`attnzoo plugins` says why"
        message = f"`{name}` belongs to the plugin `{plugin}`, {what}"
        self.fault("AZ205", message, place, f"this was made with {made}" if made else "", help)

    def made(self, plugin: str) -> Plugin | None:
        """What a plugin was when the recipe was made, if that is known."""
        return self.made_with.plugins.get(plugin) if self.made_with else None

    def fault(self, code: str, message: str, place: Place, why: str = "", help: str = "") -> None:
        self.faults.append(Diagnostic(code, message, place, why, help))
