"""From what a recipe says of its host to what is info of it: sizes, sites, heads by layer, the skip."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from attnzoo.core import Layout, Site
from attnzoo.errors import Diagnostic, Place, RecipeError, UnknownArgument, did_you_mean
from attnzoo.hosts import seq2seq, sequence
from attnzoo.hosts.dual import DualInfo
from attnzoo.hosts.info import BackboneInfo, HostInfo
from attnzoo.hosts.kinds import HOSTS
from attnzoo.hosts.seq2seq import Seq2SeqInfo
from attnzoo.hosts.skip import Skip
from attnzoo.recipe.faults import faults_of
from attnzoo.recipe.schema import HeadSchedule, ImageHost, Recipe, Seq2SeqHost, SequenceHost, SideHeads
from attnzoo.recipe.source import Loc, Source, from_data


def host_info(recipe: Recipe, arguments: Mapping[str, Any], source: Source) -> HostInfo:
    """What a recipe's host looks like.

    Args:
        recipe: What it says.
        arguments: Constructor arguments of the host that hold instead of the recipe's.
        source: For places.

    Raises:
        RecipeError: AZ301, AZ309, AZ310, AZ320, AZ322 for a backbone; AZ112 and AZ113 for arguments; AZ321 for
            statistics; AZ308, AZ313 and AZ316 for heads; AZ311, without a place, for what is too large.
    """
    host = recipe.host
    if isinstance(host, Seq2SeqHost | SequenceHost):
        said = _told(host, arguments).model_dump(exclude={"kind"})
        return sequence_info(host.kind, said, recipe.heads, source)
    places = {("host", "model", name): Place("<arguments>", keys=name) for name in arguments}
    source = replace(source, values=source.values | places)
    wanted = {
        **host.arguments,
        **_checked_arguments(host, arguments),
    }
    if recipe.pool and wanted.get("class_token") is False:  # timm's own pooling would look for the token
        wanted.setdefault("global_pool", "")
    info = backbone_info(host.kind, host.base, wanted, source)
    _check_statistics(host, info, arguments, source)
    if recipe.heads is None:
        return info
    if isinstance(recipe.heads, SideHeads):
        raise RecipeError(
            "AZ313",
            "`heads` for `encoder` and `decoder` belongs to a host of kind seq2seq",
            place=source.value_place(("heads",)),
            help="write a number, a list or a schedule",
        )
    heads = by_layer(recipe.heads, info.depth, ("heads",), source)
    rotation = info.attention[0].get("rotation") if info.attention else None
    _check_heads(heads, info.dims, ("heads",), source, rotation=rotation)
    return replace(info, heads=heads)


def _checked_arguments(host: ImageHost, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a backbone, those that a recipe could set held to what a recipe may say.

    Classes and functions, as timm takes them for norms and activations, are left to timm.

    Raises:
        RecipeError: AZ112, AZ113.
    """
    schema = type(host.model)
    plain = {
        name: value
        for name, value in arguments.items()
        if name in schema.model_fields and not callable(value)
    }
    source = from_data(plain, "<arguments>")
    try:
        schema.model_validate(source.tree)
    except ValidationError as error:
        source.faults += faults_of(error, source, schema)
    if source.faults:
        raise RecipeError.of(source.faults)
    return {**arguments, **source.tree}


def _check_statistics(
    host: ImageHost, info: BackboneInfo, arguments: Mapping[str, Any], source: Source
) -> None:
    """Hold the recipe's mean and standard deviation to the number of channels that the recipe says.

    Raises:
        RecipeError: AZ321.
    """
    channels = info.image[0]
    faults = [
        Diagnostic(
            "AZ321",
            f"the length of `host.{name}` is {len(values)}, the number of channels {channels}",
            source.value_place(("host", name)),
            help="write one number for each channel",
        )
        for name, values in (("mean", host.mean), ("std", host.std))
        if values is not None and len(values) != channels and "in_chans" not in arguments
    ]
    if faults:
        raise RecipeError.of(faults)


def _told(host: Seq2SeqHost | SequenceHost, arguments: Mapping[str, Any]) -> Seq2SeqHost | SequenceHost:
    """What a recipe says of a model of sequences, with the arguments in its place.

    Raises:
        RecipeError: AZ309, when an argument does not fit.
        UnknownArgument: AZ309, when nothing takes it.
    """
    try:
        return type(host).model_validate(host.model_dump() | dict(arguments))
    except ValidationError as error:
        name = next((str(item["loc"][0]) for item in error.errors() if item["loc"]), ", ".join(arguments))
        help = "`attnzoo schema` shows what `host:` takes"
        fields = list(type(host).model_fields)
        if name not in fields:
            raise UnknownArgument(
                "AZ309",
                f"a model of kind {host.kind} takes no argument `{name}`",
                place=Place("<arguments>", keys=name),
                help=did_you_mean(name, fields) or help,
            ) from None
        message = f"a model of kind {host.kind} cannot be built with this `{name}`: {arguments.get(name)!r}"
        raise RecipeError("AZ309", message, help=help) from None


def sequence_info(kind: str, said: Mapping[str, Any], heads: Any, source: Source) -> HostInfo:
    """What a model of sequences looks like.

    Args:
        kind: `seq2seq` or `sequence`.
        said: What the recipe says of the host, but for its kind.
        heads: Of the recipe; 8, or for a stack 4, when None.
        source: For places.

    Raises:
        RecipeError: AZ308, AZ313 and AZ316 for heads; AZ309 when two vocabularies are tied.
    """
    fields: dict[str, Any] = dict(said)
    if kind == "sequence":
        form = sequence.Form(**fields)
        if isinstance(heads, SideHeads):
            raise RecipeError(
                "AZ313",
                "a stack of layers has no `encoder` and `decoder`",
                place=source.value_place(("heads",)),
                help="write a number, a list or a schedule",
            )
        counts = _checked(4 if heads is None else heads, form.layers, ("heads",), form, source)
        return sequence.host_info(form, counts)
    for key, sides in (("layers", ("encoder", "decoder")), ("vocab", ("source", "target"))):
        both = fields.pop(key)
        fields |= dict.fromkeys(sides, both) if isinstance(both, int) else dict(both)
    pair = seq2seq.Form(**fields)
    if pair.tie == "all" and pair.source != pair.target:
        raise RecipeError(
            "AZ309",
            f"`tie: all` has one embedding for both sides; the source has {pair.source} ids, the target {pair.target}",
            place=_place(("host", "tie"), source),
            help="write `tie: target`, or give both sides one vocabulary",
        )
    if isinstance(heads, SideHeads):
        encoder = _checked(heads.encoder, pair.encoder, ("heads", "encoder"), pair, source)
        decoder = _checked(heads.decoder, pair.decoder, ("heads", "decoder"), pair, source)
    else:
        both = 8 if heads is None else heads
        encoder = _checked(both, pair.encoder, ("heads",), pair, source)
        decoder = _checked(both, pair.decoder, ("heads",), pair, source)
    return seq2seq.host_info(pair, encoder, decoder)


def _checked(
    said: Any, layers: int, loc: Loc, form: seq2seq.Form | sequence.Form, source: Source
) -> tuple[int, ...]:
    counts = by_layer(said, layers, loc, source)
    _check_heads(counts, (form.dim,) * layers, loc, source, rotary=form.positions == "rotary")
    return counts


def by_layer(said: Any, layers: int, loc: Loc, source: Source) -> tuple[int, ...]:
    """Heads of each layer.

    Args:
        said: A number, a list or a schedule.
        layers: How many there are.
        loc: Where it stands in the recipe.
        source: For places.

    Raises:
        RecipeError: AZ313, when it does not fit the number of layers, or cannot be halved.
    """
    if isinstance(said, int):
        return (said,) * layers
    if isinstance(said, HeadSchedule):
        return _scheduled(said, layers, _place(loc, source))
    if len(said) != layers:
        raise RecipeError(
            "AZ313",
            f"{len(said)} head counts were given for {layers} layers",
            place=_place(loc, source),
            help="write one number for each layer, or a schedule",
        )
    return tuple(said)


def _scheduled(said: HeadSchedule, layers: int, place: Place | None) -> tuple[int, ...]:
    first, last = said.first, said.last
    if said.schedule == "constant":
        if last not in (None, first):
            raise RecipeError(
                "AZ313",
                f"a constant schedule cannot begin with {first} heads and end with {last}",
                place=place,
                help="leave `last` out, or write `schedule: halving`",
            )
        return (first,) * layers
    counts = [first]
    while len(counts) < layers:
        here = counts[-1]
        if here == last:
            counts.append(here)
        elif here % 2:
            raise RecipeError(
                "AZ313",
                f"half of {here} is no number of heads for layer {len(counts) + 1} of {layers}",
                place=place,
                help=f"stop with `last: {here}`, or begin with more heads",
            )
        else:
            counts.append(here // 2)
    if last is not None and counts[-1] != last:
        raise RecipeError(
            "AZ313",
            f"{layers} layers that begin with {first} heads and halve them end with {counts[-1]}, not with {last}",
            place=place,
            help="change `first`, `last` or the number of layers",
        )
    return tuple(counts)


def _check_heads(
    counts: Sequence[int],
    dims: Sequence[int],
    loc: Loc,
    source: Source,
    rotary: bool = False,
    rotation: tuple[int, int] | None = None,
) -> None:
    for layer, (heads, dim) in enumerate(zip(counts, dims, strict=True)):
        try:
            site = Site(f"layer {layer}", dim, heads, Layout((1,)), rotary=rotary, rotation=rotation)
            site.head_dim  # noqa: B018 - raises AZ308, AZ316
        except RecipeError as error:
            raise RecipeError.of([replace(d, place=_place(loc, source)) for d in error.diagnostics]) from None


def _place(loc: Loc, source: Source) -> Place:
    """The innermost spot of a path that stands in the recipe."""
    while loc and loc not in source.values:
        loc = loc[:-1]
    return source.value_place(loc) if loc else source.key_place(("host",))


_ABOUT = {
    "AZ308": ("num_heads", "embed_dim"),
    "AZ316": ("num_heads", "embed_dim"),
    "AZ322": ("b",),
    "AZ323": ("mlp_ratios",),
    "AZ320": ("img_size", "patch_size", "dynamic_img_size", "dynamic_img_pad"),
}
"""Arguments of the model that a fault is about, the likeliest first."""


def backbone_info(kind: str, base: str, arguments: Mapping[str, Any], source: Source) -> BackboneInfo:
    """What a backbone for images looks like.

    Args:
        kind: Of host.
        base: The backbone's name.
        arguments: Constructor arguments that differ from the base's.
        source: For places.

    Raises:
        RecipeError: AZ301, AZ308, AZ309, AZ310, AZ311, AZ316, AZ320, AZ322.
    """
    look = HOSTS[kind].host_info
    try:
        try:
            return look(base, arguments)
        except RecipeError as error:
            if error.code == "AZ309" and arguments:
                # what is no host at all takes other arguments: say the first, not the second
                plain = look(base, {})
                dim, heads = arguments.get("embed_dim", plain.dim), arguments.get("num_heads", plain.heads[0])
                if isinstance(heads, int):
                    Site("blocks.0", dim, heads, plain.layout).head_dim  # noqa: B018 - AZ308 has both numbers
            raise
    except RecipeError as error:
        loc: Loc = ("host", "base") if error.code in ("AZ301", "AZ310") else ("host", "model")
        keys = _ABOUT.get(error.code, ())
        loc = next((spot for key in keys if (spot := (*loc, key)) in source.values), loc)
        place = source.value_place(loc) if loc in source.values else source.key_place(("host",))
        raise type(error).of([replace(d, place=d.place or place) for d in error.diagnostics]) from None


def check_pool(recipe: Recipe, info: HostInfo, source: Source) -> None:
    """Whether the host has a place where a component makes one token of all.

    Args:
        recipe: Says `pool:`.
        info: Its host.
        source: For places.

    Raises:
        RecipeError: AZ318, when it has none, or says itself how tokens are pooled.
    """
    if info.pool_site() is None:
        raise RecipeError(
            "AZ318",
            f"{f'`{info.base}`' if isinstance(info, BackboneInfo) else 'a seq2seq model'} has no place for a pool",
            place=source.key_place(("pool",)),
            why=_no_pool(info),
            help="leave `pool:` out, or choose another host",
        )
    loc = ("host", "model", "global_pool")
    if loc in source.values:
        raise RecipeError(
            "AZ318",
            "`global_pool` and `pool:` both say how tokens are pooled",
            place=source.value_place(loc),
            help="leave one of the two out",
        )


def _no_pool(info: HostInfo) -> str:
    """Why a host has no place for a pool."""
    if isinstance(info, DualInfo):
        return "its classifier reads both streams, and a pool makes one token of one grid"
    return "its head reads two tokens" if isinstance(info, BackboneInfo) else "it answers token by token"


_NO_SKIP = {"cct": "CCT", "pyramid": "model in stages", "dual": "dual model"}
"""Kinds of host whose layers hand nothing on, in words."""
_HANDS_NOTHING = {
    "pyramid": "from stage to stage tokens merge, and what one hands on is not of the next one's tokens",
    "dual": "a layer has up to four sites, and between them tokens alone go on",
}
"""Why, where it is not that nobody asked for it."""


def skip_of(recipe: Recipe, info: HostInfo, source: Source) -> Skip:
    """The skip with the names of its sites.

    Args:
        recipe: What it says.
        info: Its host.
        source: For places.

    Raises:
        RecipeError: AZ304 when a glob matches no site, AZ314 when the skip cannot be there.
    """
    said = recipe.skip
    if said is None or said.use == "none":
        return Skip()
    names = list(info.sites())
    kind = recipe.host.kind
    if kind in _NO_SKIP or (said.use == "cross" and not isinstance(info, Seq2SeqInfo)):
        what = (
            f"a {_NO_SKIP[kind]} has no place for a skip"
            if kind in _NO_SKIP
            else "only a seq2seq model has cross-attention"
        )
        raise RecipeError(
            "AZ314",
            f"`skip: {said.use}` cannot be put here: {what}",
            place=_place(("skip",), source),
            why=_HANDS_NOTHING.get(kind, ""),
            help="leave `skip:` out, or choose a host of kind vit or seq2seq"
            if kind in _NO_SKIP
            else "use `merged`, or another kind of host",
        )
    glob = said.at or info.skip_default(said.use)
    at = tuple(fnmatch.filter(names, glob))
    place = _place(("skip", "at"), source)
    if not at:
        raise RecipeError(
            "AZ304",
            f"`{glob}` matches no site",
            place=place,
            help=f"the sites are {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}",
        )
    kinds = {(name.split(".")[0], name.rpartition(".")[2] if name.count(".") == 2 else "") for name in at}
    if len(kinds) > 1:
        shown = ", ".join(".".join(filter(None, (side, "*", kind))) for side, kind in sorted(kinds))
        raise RecipeError(
            "AZ314",
            f"`{glob}` matches sites of several kinds: {shown}",
            place=place,
            why="a layer hands on to the next of its kind",
            help=f"write one of {shown}",
        )
    if said.use == "cross" and not all(name.endswith(".cross") for name in at):
        raise RecipeError(
            "AZ314",
            f"`skip: cross` goes between sites decoder.*.cross; `{glob}` matches others",
            place=place,
            help="leave `at` out, or use `merged` there",
        )
    if "encoders" in said.model_fields_set and said.use != "encoder_stack":
        raise RecipeError(
            "AZ314",
            f"`skip: {said.use}` forms no encoders",
            place=_place(("skip", "encoders"), source),
            help="leave `encoders` out, or write `use: encoder_stack`",
        )
    if len(at) < 2:
        raise RecipeError(
            "AZ314",
            f"`{glob}` matches one site, and there is nobody to hand on to",
            place=place,
            help="let it match two or more",
        )
    return Skip(said.use, at, said.encoders)
