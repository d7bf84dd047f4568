"""From a recipe to plans: names become entries of the zoo, options are checked, requirements meet claims."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError
from torch import nn

from attnzoo.core import Card, Fused, FusedHeads, Fusion, Head, Law, Mechanism, MultiHead, Site, options_of
from attnzoo.core.mechanism import fused_card
from attnzoo.errors import Diagnostic, Place, RecipeError, did_you_mean
from attnzoo.hosts import seq2seq, sequence
from attnzoo.hosts.info import BackboneInfo, HostInfo, unallocated
from attnzoo.hosts.kinds import HOSTS
from attnzoo.hosts.requirements import Requirements, unmet
from attnzoo.hosts.seq2seq import Seq2SeqInfo
from attnzoo.hosts.sequence import SequenceInfo
from attnzoo.hosts.skip import Skip
from attnzoo.hosts.skip import check as check_skip
from attnzoo.recipe.faults import faults_of
from attnzoo.recipe.host import backbone_info, host_info, sequence_info, skip_of
from attnzoo.recipe.load import Loaded
from attnzoo.recipe.schema import FUSE, MAX_MECHANISMS, TAGGED, Fuse, ImageHost, Spec, Use, host_tag, spec_tag
from attnzoo.recipe.source import MAX_FAULTS, Loc, Source
from attnzoo.zoo import Entry, Provider, Registry, Zoo, load_zoo


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
            with _blame(self.entry, self.place):
                site.head_dim  # noqa: B018 - raises AZ308 when the heads do not divide the width
            return MultiHead(site, self._head(site))
        if not self.branches:
            with _blame(self.entry, self.place):
                return self.entry.value(site, **self.options)
        fusion = partial(_fusion, self)
        return Fused(site, fusion, [partial(_branch, branch) for branch in self.branches])

    def _head(self, site: Site) -> Head:
        if not self.branches:
            with _blame(self.entry, self.place):
                return self.entry.value(site, **self.options)
        return FusedHeads(site, partial(_fusion, self), [branch._head for branch in self.branches])


def _branch(plan: Plan, site: Site) -> Mechanism:
    return plan.build(site)


def _fusion(plan: Plan, site: Site, arity: int) -> Fusion:
    with _blame(plan.entry, plan.place):
        type_ = cast(type[Fusion], plan.entry.value)
        type_.sites(site, arity)
        return type_(site, arity, **plan.options)


@contextmanager
def _blame(entry: Entry, place: Place) -> Iterator[None]:
    """Faults of a component get the place of its name; what else a plugin raises becomes a fault of the plugin."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError.of([d if d.place else replace(d, place=place) for d in error.diagnostics]) from None
    except Exception as error:
        if entry.plugin == "attnzoo":
            raise
        text = str(error).splitlines()[0] if str(error) else ""
        raise RecipeError(
            "AZ215",
            f"`{entry.full_name}` cannot be built: {type(error).__name__}: {text}",
            place=place,
            help=f"this is a fault of the plugin; `attnzoo check {entry.full_name}` shows more",
        ) from error


def anonymous(kind: str) -> str:
    """timm's name for a composed model that no recipe registers; its recipe travels as an argument."""
    return f"attnzoo_{kind}"


@dataclass(frozen=True)
class Composition:
    """A recipe whose every name is known and whose every requirement is met.

    Args:
        loaded: The recipe.
        info: Its host.
        plans: What is put where, by site name.
        skip: What layers hand on.
        notes: What a person should know of the recipe, though it holds.
    """

    loaded: Loaded
    info: HostInfo
    plans: Mapping[str, Plan]
    skip: Skip = Skip()
    notes: tuple[Diagnostic, ...] = ()

    def put(self, site: Site) -> Mechanism:
        """The mechanism for a site."""
        return self.plans[site.name].build(site)

    @property
    def image(self) -> tuple[ImageHost, BackboneInfo] | None:
        """What a recipe says of a backbone for images, and what is info of it; None for a model of sequences."""
        host = self.loaded.recipe.host
        return (
            (host, self.info) if isinstance(host, ImageHost) and isinstance(self.info, BackboneInfo) else None
        )

    def model_cfg(self) -> dict[str, Any]:
        """timm's configuration of the model; empty for a model of sequences."""
        if self.image is None:
            return {}
        host, info = self.image
        name = host.registers or anonymous(host.kind)
        return HOSTS[host.kind].model_cfg(name, host.base, info.arguments, host.mean, host.std)

    def build(
        self, pretrained_cfg: Mapping[str, Any] | None = None, pretrained: bool = False, **timm_options
    ) -> nn.Module:
        """The model; a backbone as timm builds it.

        Args:
            pretrained_cfg: timm's configuration.
            pretrained: Whether timm shall load the weights that it names.
            timm_options: What goes to timm's builder and not to the model; a model of sequences takes `device` and
                `dtype` only.
        """
        if isinstance(self.info, Seq2SeqInfo):
            return _placed(
                lambda: seq2seq.build(cast(Seq2SeqInfo, self.info), self.put, self.skip), **timm_options
            )
        if isinstance(self.info, SequenceInfo):
            return _placed(
                lambda: sequence.build(cast(SequenceInfo, self.info), self.put, self.skip), **timm_options
            )
        assert self.image is not None
        host, info = self.image
        return HOSTS[host.kind].build(
            info,
            self.put,
            pretrained=pretrained,
            pretrained_cfg=pretrained_cfg or self.model_cfg(),
            init=host.init,
            skip=self.skip,
            **timm_options,
        )

    @property
    def starts_equal(self) -> bool:
        """Whether the composed model equals its base before training, given the base's weights."""
        return not self.skip and all(plan.starts_as_softmax() for plan in self.plans.values())


def _placed(
    build: Callable[[], nn.Module], device: Any = None, dtype: torch.dtype | None = None
) -> nn.Module:
    with torch.device(device) if device is not None else nullcontext():
        return build().to(dtype=dtype)


def resolve(
    loaded: Loaded, arguments: Mapping[str, Any] | None = None, zoo: Zoo | None = None
) -> Composition:
    """Check a recipe against the zoo and its host.

    Args:
        loaded: The recipe.
        arguments: Constructor arguments of the host that hold instead of the recipe's.
        zoo: Where names are looked up; the installed plugins when None.

    Raises:
        RecipeError: AZ2xx, AZ3xx, all of them at once; AZ311 only when nothing else is wrong.
    """
    recipe, source = loaded.recipe, loaded.source
    planner = _Planner(zoo or load_zoo(), source)
    main = planner.whole(recipe.attention, ("attention",))
    puts = [
        planner.whole(override.put, ("overrides", i, "put")) for i, override in enumerate(recipe.overrides)
    ]
    faults = planner.faults
    try:
        info = host_info(recipe, arguments or {}, source)
    except RecipeError as error:
        raise RecipeError.of([*faults, *_at_host(error.diagnostics, source)]) from None
    try:
        skip = skip_of(recipe, info, source)
    except RecipeError as error:
        faults += error.diagnostics
        skip = Skip()
    plans = dict.fromkeys(info.sites(), main)
    for i, override in enumerate(recipe.overrides):
        names = fnmatch.filter(plans, override.at)
        if not names:
            sites = list(plans)
            shown = ", ".join(sites) if len(sites) < 5 else f"{sites[0]} to {sites[-1]}"
            place = source.value_place(("overrides", i, "at"))
            help = f"the sites are {shown}; `{sites[0].partition('.')[0]}.*` means all"
            planner.fault("AZ304", f"`{override.at}` matches no site", place, help=help)
        plans |= dict.fromkeys(names, puts[i])
    misfits, params = _misfits(plans, info, planner.zoo)
    faults += misfits
    if skip and not faults:
        faults += _skip_misfits(skip, cast(dict[str, Plan], plans), info, source)
    if not faults:
        try:
            info.check_memory(params)
        except RecipeError as error:
            faults += _at_host(error.diagnostics, source)
    if faults:
        unique = {(d.code, d.message, d.place): d for d in faults}
        raise RecipeError.of(list(unique.values())[:MAX_FAULTS])
    return Composition(loaded, info, cast(dict[str, Plan], plans), skip, tuple(planner.notes))


def other_faults(source: Source, zoo: Zoo | None = None) -> list[Diagnostic]:
    """What else is wrong in a tree that does not fit the schema: unknown names, bad options, no such base.

    Only what is sound on its own is judged, so that one mistake is not reported twice.

    Args:
        source: The recipe.
        zoo: Where names are looked up; the installed plugins when None.
    """
    planner = _Planner(zoo or load_zoo(), source)
    tree = source.tree if isinstance(source.tree, dict) else {}
    planner.look(tree.get("attention"), ("attention",))
    overrides = tree.get("overrides")
    for i, override in enumerate(overrides if isinstance(overrides, list) else ()):
        if isinstance(override, dict):
            planner.look(override.get("put"), ("overrides", i, "put"))
    said: Any = tree.get("host")
    kind = TAGGED[host_tag(said)]
    try:
        host = kind.model_validate(said)
    except ValidationError as error:
        spots = {item["loc"][:1] for item in error.errors(include_url=False)}
        if spots & {(), ("base",)} or not issubclass(kind, ImageHost):
            return planner.faults
        host = None
    try:
        if not issubclass(kind, ImageHost):
            if "heads" not in tree:
                sequence_info(host.kind, host.model_dump(exclude={"kind"}), None, source)
        else:
            wanted = host.model.model_dump(exclude_unset=True, exclude_none=True) if host else {}
            base = said.get("base", kind.model_fields["base"].default)
            backbone_info(host_tag(said).strip("()"), base, wanted, source)
    except RecipeError as error:
        planner.faults += _at_host(error.diagnostics, source)
    return planner.faults


def _at_host(faults: Iterable[Diagnostic], source: Source) -> list[Diagnostic]:
    """Faults of the whole model get the place of what says most of it."""
    place = source.value_place(("host", "model") if ("host", "model") in source.values else ("host",))
    return [fault if fault.place else replace(fault, place=place) for fault in faults]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _misfits(plans: Mapping[str, Plan | None], info: HostInfo, zoo: Zoo) -> tuple[list[Diagnostic], int]:
    """Requirements not met and components that cannot be built at their sites; each plan once per kind of site.

    Returns:
        The faults; the number of parameters of the composed model, if there are none.
    """
    faults: list[Diagnostic] = []
    sites, params = info.sites(), info.params
    kinds: dict[tuple[int, Requirements, int], tuple[Plan, list[str]]] = {}
    for name, plan in plans.items():
        if plan is not None:
            kind = (id(plan), info.requirements(name), sites[name].heads)
            kinds.setdefault(kind, (plan, []))[1].append(name)
    told: set[tuple[Place, Requirements]] = set()
    for (_, required, _), (plan, names) in kinds.items():
        name = names[0]
        for leaf in plan.leaves():
            whys = unmet(leaf.card, required)
            if required.rotary and not leaf.inside_heads:
                whys.append(
                    f"rotary positions are turned inside the heads; `{leaf.entry.name}` has projections of its own"
                )
            if (leaf.place, required) in told:
                continue
            for why in whys:
                message = f"`{leaf.entry.name}` cannot be put at {name}"
                faults.append(
                    Diagnostic("AZ302", message, leaf.place, why, _who_can(required, zoo, leaf.entry.name))
                )
                told.add((leaf.place, required))
        for fusion in plan.fusions() if required.token_local else ():
            if Law.TOKEN_LOCAL not in fusion.entry.value.card.laws:
                message = f"`{fusion.entry.name}` cannot fuse at {name}"
                why = "later tokens are hidden there, and this fusion mixes tokens"
                can = [
                    name for name, entry in zoo.fusions.items() if Law.TOKEN_LOCAL in entry.value.card.laws
                ]
                help = f"who can: {', '.join(f'`{one}`' for one in can)}"
                faults.append(Diagnostic("AZ302", message, fusion.place, why, help))
        try:
            with unallocated():
                size = _size(plan.build(sites[name]))
        except RecipeError as error:
            known = {(fault.code, fault.place) for fault in faults}
            found = [replace(d, place=d.place or plan.place) for d in error.diagnostics]
            faults += [fault for fault in found if (fault.code, fault.place) not in known]
        else:
            params += sum(size - _size(info.model.get_submodule(info.module_path(one))) for one in names)
    return faults, params


def _who_can(required: Requirements, zoo: Zoo, refused: str) -> str:
    """The mechanisms that meet requirements with their defaults, in words."""
    can = [
        name
        for name, entry in zoo.mechanisms.items()
        if name != refused
        and not unmet(entry.value.card, required)
        and (issubclass(entry.value, Head) or not required.rotary)
    ]
    return f"who can: {', '.join(f'`{name}`' for name in can)}" if can else "no mechanism of the zoo can"


def _skip_misfits(skip: Skip, plans: Mapping[str, Plan], info: HostInfo, source: Source) -> list[Diagnostic]:
    """What stands against handing something on between these sites."""
    sites = info.sites()
    try:
        with unallocated():
            check_skip(skip, [(sites[name], plans[name].build(sites[name])) for name in skip.at])
    except RecipeError as error:
        loc: Loc = ("skip", "use") if ("skip", "use") in source.values else ("skip",)
        place = source.value_place(loc) if loc in source.values else source.key_place(("host",))
        return [replace(d, place=d.place or place) for d in error.diagnostics]
    return []


def _mechanisms(spec: Spec) -> int:
    return sum(map(_mechanisms, spec.of)) if isinstance(spec, Fuse) else 1


class _Planner:
    """Turns specs into plans and gathers the faults on the way."""

    def __init__(self, zoo: Zoo, source: Source):
        self.zoo, self.source = zoo, source
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
        try:
            with _blame(entry, place):
                card = entry.value.claims(**options)
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
        inside = spec.level == "heads" or (spec.level is None and not on_tokens)
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
            elif slash and (provider is None or provider.status != "loaded"):
                self.absent(name, plugin, provider, place)
            elif slash:
                names = [entry.full_name for entry in registry.values() if entry.plugin == plugin]
                hint = did_you_mean(name, names) or f"`attnzoo list {registry.kind}s` shows what there is"
                self.fault(error.code, error.diagnostics[0].message, place, help=hint)
            else:
                self.faults += error.diagnostics
            return None

    def absent(self, name: str, plugin: str, provider: Provider | None, place: Place) -> None:
        """A name of a plugin that is not installed, switched off or broken."""
        names = [provider.name for provider in self.zoo.providers]
        if provider is None:
            what = "which is not installed"
            shown = ", ".join(f"`{name}`" for name in names)
            help = did_you_mean(plugin, names) or f"`pip install attnzoo-{plugin}`; installed are {shown}"
        else:
            what = (
                "which is switched off" if provider.status == "switched off" else "which could not be loaded"
            )
            help = "`attnzoo plugins` says why"
        self.fault("AZ205", f"`{name}` belongs to the plugin `{plugin}`, {what}", place, help=help)

    def fault(self, code: str, message: str, place: Place, why: str = "", help: str = "") -> None:
        self.faults.append(Diagnostic(code, message, place, why, help))
