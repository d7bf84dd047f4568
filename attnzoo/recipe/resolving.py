"""From a recipe to a composition: what is put where, with every requirement of the host met."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from attnzoo.core import Head, Mechanism, Pool, Site
from attnzoo.core.card import ROLLOUT, Given
from attnzoo.core.fact_sheet import fact_sheet
from attnzoo.errors import Diagnostic, Place, RecipeError
from attnzoo.hosts import seq2seq, sequence
from attnzoo.hosts.info import POOL, BackboneInfo, HostInfo, unallocated
from attnzoo.hosts.kinds import HOSTS, TAKEN
from attnzoo.hosts.requirements import Requirements, unmet, unmet_by_fusion
from attnzoo.hosts.rollout import asks, one_map
from attnzoo.hosts.seq2seq import Seq2SeqInfo
from attnzoo.hosts.sequence import SequenceInfo
from attnzoo.hosts.skip import Skip
from attnzoo.hosts.skip import check as check_skip
from attnzoo.recipe.faults import faults_of
from attnzoo.recipe.host import backbone_info, check_pool, host_info, sequence_info, skip_of
from attnzoo.recipe.plan import Plan, put
from attnzoo.recipe.planner import Planner
from attnzoo.recipe.reading import Loaded
from attnzoo.recipe.schema import TAGGED, ImageHost, Spec, host_tag
from attnzoo.recipe.source import MAX_FAULTS, Loc, Source
from attnzoo.recipe.trial import try_out
from attnzoo.zoo import Entry, Zoo, load_zoo
from attnzoo.zoo.blame import OURS, blaming
from attnzoo.zoo.contract import watching

registered: dict[str, str] = {}
"""The models that are known to timm through us: model name to recipe name; no name for those of `anonymous`."""


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
        pool: What makes one token of all; None for the host's own way.
    """

    loaded: Loaded
    info: HostInfo
    plans: Mapping[str, Plan]
    skip: Skip = Skip()
    notes: tuple[Diagnostic, ...] = ()
    pool: Plan | None = None

    def _repr_html_(self) -> str:
        kinds: dict[str, list[str]] = {}
        for site, plan in self.plans.items():
            kinds.setdefault(str(plan), []).append(site)
        facts = {", ".join(sites): formula for formula, sites in kinds.items()}
        facts |= {"pool": str(self.pool) if self.pool else ""}
        facts |= {"to know": "; ".join(note.message for note in self.notes)}
        return fact_sheet(self.loaded.name, self.loaded.recipe.summary, facts)

    def put(self, site: Site) -> Mechanism:
        """The mechanism for a site."""
        return put(self.plans[site.name], site)

    @property
    def everything(self) -> list[Plan]:
        """What is put at the sites, and the pool if there is one."""
        return [*self.plans.values(), *([self.pool] if self.pool else [])]

    @property
    def entries(self) -> list[Entry]:
        """The mechanisms and fusions in it."""
        parts = (part for plan in self.everything for part in (*plan.leaves(), *plan.fusions()))
        return list({id(part.entry): part.entry for part in parts}.values())

    @property
    def given(self) -> dict[str, Given]:
        """Maps that the components ask for and the model does not make itself, by name."""
        asked = (item for plan in self.everything for item in plan.card.given.items())
        return {name: kind for name, kind in asked if name not in self.info.makes}

    @property
    def image(self) -> tuple[ImageHost, BackboneInfo] | None:
        """What a recipe says of a backbone for images, and its host info; None for a model of sequences."""
        host = self.loaded.recipe.host
        return (
            (host, self.info) if isinstance(host, ImageHost) and isinstance(self.info, BackboneInfo) else None
        )

    def model_cfg(self) -> dict[str, Any]:
        """timm's configuration of the recipe's own model, whatever was asked for besides; empty for sequences."""
        if self.image is None:
            return {}
        host, _ = self.image
        own = load_zoo().recipes.get(registered.get(host.registers or "", ""))
        # elsewhere timm knows the names of recipes that ship with attnzoo, and no others
        travels = own is not None and own.plugin == OURS
        name = host.registers if host.registers and travels else anonymous(host.kind)
        return HOSTS[host.kind].model_cfg(name, host.base, host.arguments, host.mean, host.std)

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
        pool: Any = self.pool.build if self.pool else None
        with blaming(self.entries):
            if isinstance(self.info, Seq2SeqInfo):
                return _placed(
                    lambda: seq2seq.build(cast(Seq2SeqInfo, self.info), self.put, self.skip), **timm_options
                )
            if isinstance(self.info, SequenceInfo):
                return _placed(
                    lambda: sequence.build(cast(SequenceInfo, self.info), self.put, self.skip, pool),
                    **timm_options,
                )
            assert self.image is not None
            host, info = self.image
            return HOSTS[host.kind].build(
                info,
                self.put,
                pool=pool,
                given=self.given,
                pretrained=pretrained,
                pretrained_cfg=pretrained_cfg or self.model_cfg(),
                init=host.init,
                skip=self.skip,
                **timm_options,
            )

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hold the components of plugins to what they must give back, while a model runs.

        Args:
            model: What `build` gave.

        Raises:
            PluginError: AZ013 a component of a plugin raises, AZ014 it gives back something else.
        """
        with blaming(self.entries), watching(model, self.entries):
            yield

    @property
    def starts_equal(self) -> bool:
        """Whether the composed model equals its base before training, given the base's weights."""
        return (
            not self.skip
            and self.pool is None
            and self.info.softmax
            and all(plan.starts_as_softmax() for plan in self.plans.values())
        )


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
    planner = Planner(zoo or load_zoo(), source, loaded.made_with)
    main = planner.whole(recipe.attention, ("attention",))
    puts = [
        planner.whole(override.put, ("overrides", i, "put")) if override.put else None
        for i, override in enumerate(recipe.overrides)
    ]
    pool = planner.pool(recipe.pool) if recipe.pool else None
    faults = planner.faults
    arguments = dict(arguments or {})
    if arguments.get("global_pool") == POOL and recipe.pool:
        del arguments["global_pool"]
    elif "global_pool" in arguments:  # as with timm's own: another pooling takes its place
        pool = None
    try:
        info = host_info(recipe, arguments, source)
        if recipe.pool:
            check_pool(recipe, info, source)
    except RecipeError as error:
        raise type(error).of([*faults, *_at_host(error.diagnostics, source)]) from None
    try:
        skip = skip_of(recipe, info, source)
    except RecipeError as error:
        faults += error.diagnostics
        skip = Skip()
    plans, empty = dict.fromkeys(info.sites(), main), dict[str, int]()
    for i, override in enumerate(recipe.overrides):
        names = fnmatch.filter(plans, override.at)
        if not names:
            sites = list(plans)
            shown = ", ".join(sites) if len(sites) < 5 else f"{sites[0]} to {sites[-1]}"
            place = source.value_place(("overrides", i, "at"))
            streams = {site.partition(".")[0] for site in sites}
            help = f"the sites are {shown}; `{streams.pop() + '.' if len(streams) == 1 else ''}*` means all"
            planner.fault("AZ304", f"`{override.at}` matches no site", place, help=help)
        plans |= dict.fromkeys(names, puts[i])
        empty = {name: at for name, at in empty.items() if name not in names}
        empty |= dict.fromkeys(names, i) if override.put is None else {}
    plans = {name: plan for name, plan in plans.items() if name not in empty}
    try:
        info = _filled(info, plans, empty, source)
    except RecipeError as error:
        faults += error.diagnostics
    misfits, params = _misfits(plans | {POOL: pool}, info, planner.zoo)
    faults += misfits
    if skip and not faults:
        faults += _skip_misfits(skip, cast(dict[str, Plan], plans), info, source)
    if not faults and ROLLOUT in info.makes:
        faults += _rollout_misfits(cast(dict[str, Plan], plans), pool, info, skip, source)
    if not faults:
        try:
            info.check_memory(params)
        except RecipeError as error:
            faults += _at_host(error.diagnostics, source)
    if faults:
        unique = {(d.code, d.message, d.place): d for d in faults}
        raise RecipeError.of(list(unique.values())[:MAX_FAULTS])
    return Composition(loaded, info, cast(dict[str, Plan], plans), skip, tuple(planner.notes), pool)


def _filled(
    info: HostInfo, plans: Mapping[str, Plan | None], empty: Mapping[str, int], source: Source
) -> HostInfo:
    """The host once it is known what its sites hold.

    Args:
        info: The host.
        plans: What is put where; None where a fault has been found.
        empty: Names of the sites that are left empty, each with the number of the override that says so.
        source: For places.

    Raises:
        RecipeError: AZ322, AZ323.
    """
    beside = frozenset(name for name, plan in plans.items() if plan and plan.card.context == "beside")
    try:
        filled = info.filled(frozenset(empty), beside)
    except RecipeError as error:
        b: Loc = ("host", "model", "b")
        if error.code == "AZ323":
            b = ("overrides", min(empty.values()), "put")
        place = source.value_place(b if b in source.values else ("host",))
        raise RecipeError.of([replace(d, place=place) for d in error.diagnostics]) from None
    if filled is not None:
        return filled
    raise RecipeError(
        "AZ323",
        f"{next(iter(empty))} cannot be left empty",
        place=source.value_place(("overrides", min(empty.values()), "put")),
        why="only the sites of a host of kind dual or pyramid can",
        help="name what is put there, or leave the entry out",
    )


_SPEC: TypeAdapter[Spec] = TypeAdapter(Spec)


def resolve_spec(source: Source, zoo: Zoo | None = None) -> Plan:
    """The plan of a spec that stands alone, without a recipe.

    Args:
        source: What says `use`, or `fuse` and `of`; or a name.
        zoo: Where names are looked up; the installed plugins when None.

    Raises:
        RecipeError: AZ1xx, AZ2xx, AZ303, all of them at once.
    """
    planner = Planner(zoo or load_zoo(), source)
    plan, faults = None, list(source.faults)
    try:
        plan = planner.whole(_SPEC.validate_python(source.tree), ())
    except ValidationError as error:
        faults += faults_of(error, source, cast(Any, Spec))
        planner.look(source.tree, ())
    told = {fault.place for fault in faults}
    faults += [fault for fault in planner.faults if fault.place not in told]
    if faults or plan is None:
        raise RecipeError.of(faults[:MAX_FAULTS])
    return plan


def other_faults(source: Source, zoo: Zoo | None = None) -> list[Diagnostic]:
    """What else is wrong in a tree that does not fit the schema: unknown names, bad options, no such base.

    Only what is sound on its own is judged, so that one mistake is not reported twice.

    Args:
        source: The recipe.
        zoo: Where names are looked up; the installed plugins when None.
    """
    planner = Planner(zoo or load_zoo(), source)
    tree = source.tree if isinstance(source.tree, dict) else {}
    planner.look(tree.get("attention"), ("attention",))
    planner.look(tree.get("pool"), ("pool",))
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
            wanted = host.arguments if host else {}
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
    sites, params, pool_site = info.sites(), info.params, info.pool_site()
    if pool_site:
        sites[POOL] = pool_site
    kinds: dict[tuple[int, Requirements, int], tuple[Plan, list[str]]] = {}
    for name, plan in plans.items():
        if plan is not None:
            kind = (id(plan), info.requirements(name), sites[name].heads)
            kinds.setdefault(kind, (plan, []))[1].append(name)
    told: set[tuple[Place, Requirements]] = set()
    for (_, required, _), (plan, names) in kinds.items():
        name = names[0]
        met = True
        for leaf in plan.leaves():
            whys = unmet(leaf.card, required)
            if required.rotary and not (leaf.inside_heads or "rotary" in leaf.card.honours):
                whys.append(
                    f"rotary positions are turned inside the heads; `{leaf.entry.name}` has projections of its own"
                )
            met = met and not whys
            if (leaf.place, required) in told:
                continue
            for why in whys:
                message = f"`{leaf.entry.name}` cannot be put at {name}"
                faults.append(
                    Diagnostic("AZ302", message, leaf.place, why, _who_can(required, zoo, leaf.entry))
                )
                told.add((leaf.place, required))
        for fusion in plan.fusions():
            for why in unmet_by_fusion(fusion.entry.value.card, required)[:1]:
                message = f"`{fusion.entry.name}` cannot fuse at {name}"
                cards = {one: entry.value.card for one, entry in zoo.fusions.items()}
                can = [one for one, card in cards.items() if not unmet_by_fusion(card, required)]
                help = f"who can: {', '.join(f'`{one}`' for one in can)}"
                faults.append(Diagnostic("AZ302", message, fusion.place, why, help))
                met = False
        if not met:  # what is built there may rely on what it requires
            continue
        try:
            with unallocated():
                size = _size(plan.build(sites[name]))
            try_out(plan, sites[name], required)
        except RecipeError as error:
            known = {(fault.code, fault.place) for fault in faults}
            found = [replace(d, place=d.place or plan.place) for d in error.diagnostics]
            faults += [fault for fault in found if (fault.code, fault.place) not in known]
        else:
            params += sum(size - _plain_size(info, one) for one in names)
    wanted: dict[str, tuple[str, str]] = {}
    for leaf in {id(leaf): leaf for plan in plans.values() if plan for leaf in plan.leaves()}.values():
        for name, given in leaf.card.given.items():
            if name in TAKEN:
                message = f"`{leaf.entry.name}` asks for a map called `{name}`"
                why = "the models' forward has an argument of that name"
                faults.append(Diagnostic("AZ302", message, leaf.place, why, "rename it on the card"))
            if info.makes.get(name, given) != given:
                message = f"`{leaf.entry.name}` asks for the map `{name}` as {given}"
                why = f"the model makes one of that name, of {info.makes[name]}"
                faults.append(Diagnostic("AZ302", message, leaf.place, why, "rename it on the card"))
            other, earlier = wanted.setdefault(name, (leaf.entry.name, given))
            if earlier != given:
                message = f"`{leaf.entry.name}` takes the map `{name}` as {given}, `{other}` as {earlier}"
                faults.append(Diagnostic("AZ302", message, leaf.place, help="leave one of the two out"))
    return faults, params


def _plain_size(info: HostInfo, site: str) -> int:
    """How many parameters the plain model has there; none where a method of its own is."""
    try:
        return _size(info.model.get_submodule(info.module_path(site)))
    except AttributeError:
        return 0


def _who_can(required: Requirements, zoo: Zoo, refused: Entry) -> str:
    """The components of the same form that meet requirements with their defaults, in words."""
    can = [
        name
        for name, entry in zoo.mechanisms.items()
        if name != refused.name
        and issubclass(entry.value, Pool) == issubclass(refused.value, Pool)
        and not unmet(entry.value.card, required)
        and (not required.rotary or issubclass(entry.value, Head) or "rotary" in entry.value.card.honours)
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


def _rollout_misfits(
    plans: Mapping[str, Plan], pool: Plan | None, info: HostInfo, skip: Skip, source: Source
) -> list[Diagnostic]:
    """What stands against a rollout where a component asks for that of the layers before it."""
    everything = {**plans, **({POOL: pool} if pool else {})}
    asking = [name for name, plan in everything.items() if asks(plan.card)]
    if not asking:
        return []
    names, last = list(everything), asking[-1]
    leaf = next(leaf for leaf in everything[last].leaves() if asks(leaf.card))
    who = f"`{leaf.entry.name}` at {last}"
    if asking[0] == names[0]:
        first = next(leaf for leaf in everything[names[0]].leaves() if asks(leaf.card))
        message = f"`{first.entry.name}` at {names[0]} asks for the rollout of the layers before, and there are none"
        help = f"put it at a later site: overrides: [{{at: {list(plans)[-1]}, put: {first.entry.name}}}]"
        return [Diagnostic("AZ324", message, first.place, help=help)]
    if not (isinstance(info, BackboneInfo) and info.class_token):
        message = f"{who} asks where the class token looked, and there is none"
        return [Diagnostic("AZ324", message, leaf.place, help="leave `class_token: false` out")]
    if skip:
        message = (
            f"{who} asks for the rollout, and `skip: {skip.use}` hands on something else from layer to layer"
        )
        return [Diagnostic("AZ324", message, leaf.place, help="leave one of the two out")]
    faults: dict[Place, Diagnostic] = {}
    for name in names[: names.index(last)]:
        if not one_map(plans[name].card):
            message = f"`{plans[name].entry.name}` at {name} forms no map of tokens for each head, or several"
            why, help = f"{who} asks for the rollout of the layers before", "put `softmax` there"
            faults.setdefault(plans[name].place, Diagnostic("AZ324", message, plans[name].place, why, help))
    return list(faults.values())
