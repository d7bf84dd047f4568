"""From a name or a spec to a component at a site of its own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from attnzoo.alone.modules import Alone, FeatureMap
from attnzoo.core import (
    Fraction,
    Layout,
    Mechanism,
    NonNegativeInt,
    OptionError,
    Pool,
    PositiveInt,
    Site,
    options_of,
)
from attnzoo.core.card import WISHES
from attnzoo.errors import (
    Diagnostic,
    LayoutMismatch,
    Place,
    RecipeError,
    UnknownArgument,
    UnsupportedContext,
    ZooError,
    did_you_mean,
)
from attnzoo.recipe.faults import faults_of
from attnzoo.recipe.plan import Plan, put
from attnzoo.recipe.reading import is_text
from attnzoo.recipe.resolving import resolve_spec
from attnzoo.recipe.source import Source, from_data, parse
from attnzoo.zoo import Registry, load_zoo

_Grid = Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)]


class _Place(BaseModel):
    """What is said of the place; the texts are for faults."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    dim: PositiveInt
    heads: PositiveInt | None = None
    grid: Annotated[_Grid | None, "a side or sides of 1 to 65536 tokens: 196, (14, 14)"] = None
    prefix: NonNegativeInt | None = None
    context_dim: PositiveInt | None = None
    context_grid: Annotated[_Grid | None, "a side or sides of 1 to 65536 tokens: 196, (14, 14)"] = None
    form: Literal["tokens", "map"] | None = None
    attn_drop: Fraction | None = None
    proj_drop: Fraction | None = None
    qkv_bias: bool | None = None
    proj_bias: bool | None = None
    qk_norm: bool | None = None
    scale_norm: bool | None = None
    rotary: bool | None = None
    norm_layer: Any = None
    layer: NonNegativeInt | None = None
    depth: PositiveInt | None = None


KEYWORDS = (*_Place.model_fields, "device", "dtype")
"""What `create` takes beside a component's own options."""
_SITE = (
    "layer",
    "depth",
    "attn_drop",
    "proj_drop",
    "qkv_bias",
    "proj_bias",
    "qk_norm",
    "scale_norm",
    "rotary",
)


def create(
    mechanism: str | Mapping[str, Any],
    dim: int,
    heads: int | None = None,
    *,
    grid: int | Sequence[int] | None = None,
    prefix: int | None = None,
    context_dim: int | None = None,
    context_grid: int | Sequence[int] | None = None,
    form: Literal["tokens", "map"] | None = None,
    attn_drop: float | None = None,
    proj_drop: float | None = None,
    qkv_bias: bool | None = None,
    proj_bias: bool | None = None,
    qk_norm: bool | None = None,
    scale_norm: bool | None = None,
    rotary: bool | None = None,
    norm_layer: Callable[[int], nn.Module] | None = None,
    layer: int | None = None,
    depth: int | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Alone:
    """One mechanism, pool or fusion as a module for any network.

        m = attnzoo.create("softmax", dim=384, heads=6, grid=(14, 14))
        m(x)                                    # (b 196 384) -> (b 196 384)

    Weights start as PyTorch's layers do, and as the component's paper says where it says so. They are those of
    `m.attn`: `m.attn.load_state_dict(model.blocks[0].attn.state_dict())`.

    Args:
        mechanism: A name (`softmax`, `plugin/name`), or what recipes write under `attention:`, as a mapping or as text:
            `{"fuse": "add", "of": ["softmax", "soft"]}`.
        dim: Width of the tokens, in channels.
        heads: Number of heads; 1 unless said.
        grid: Tokens along each dimension, without special tokens; unless said, each call's tokens are a line.
        prefix: Number of special tokens in front of the grid; none unless said.
        context_dim: Width of the context, for cross-attention: `m(x, context)`.
        context_grid: Tokens of the context along each dimension.
        form: `tokens`: (b n c) to (b n c); `map`: (b c y x) to (b c y x), with the grid of each map.
        attn_drop: Dropout of attention weights, a probability; 0 unless said.
        proj_drop: Dropout of the result, a probability; 0 unless said.
        qkv_bias, proj_bias: Whether projections have biases; they have unless said.
        qk_norm: Whether queries and keys are normalised per head.
        scale_norm: Whether the merged heads are normalised before the output projection.
        rotary: Whether queries and keys are turned by their positions.
        norm_layer: Builds a norm for a width; `nn.LayerNorm` unless said.
        layer, depth: Index of the layer and number of layers, for what depends on them.
        device: Where weights are made; `meta` too.
        dtype: Of the weights.
        options: The component's own, as `attnzoo.show(name)` lists them.

    Raises:
        RecipeError: AZ201 to AZ205 a name; AZ210 (a `TypeError` too) to AZ214 options; AZ303, AZ308, AZ312, AZ316,
            AZ317 what cannot be built so.
        LayoutMismatch: AZ401, when it needs another grid, or any.
        UnsupportedContext: AZ404, when it cannot read a context.
    """
    said = {
        name: value for name, value in locals().items() if name in _Place.model_fields and value is not None
    }
    part = component_for(mechanism, options, said, device=device, dtype=dtype)
    if said.get("form") == "map":
        return FeatureMap(part.component, part.formula, dim, part.layout, part.axes, part.context_layout)
    return Alone(part.component, part.formula, dim, part.layout, part.prefix, part.context_layout)


@dataclass(frozen=True)
class Part:
    """A component and what is known of its place.

    Args:
        component: It.
        formula: What it is, for people.
        layout: How tokens lie; None for a line of any length, or the grid of each map.
        prefix: Number of special tokens.
        axes: Number of grid dimensions.
        context_layout: How the context lies; None for a line of any length.
    """

    component: Mechanism | Pool
    formula: str
    layout: Layout | None
    prefix: int
    axes: int
    context_layout: Layout | None


def component_for(
    mechanism: str | Mapping[str, Any],
    options: Mapping[str, Any],
    said: Mapping[str, Any],
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Part:
    """The component of a spec at a site of its own.

    Args:
        mechanism: Name, mapping or text.
        options: Of the outermost component.
        said: What `create` was told of the place, by keyword; what was not said is not in it.
        device: Where weights are made.
        dtype: Of the weights.

    Raises:
        ZooError: As for `create`.
    """
    place = _place(said)
    options = {name: [*value] if isinstance(value, tuple) else value for name, value in options.items()}
    plan = planned(mechanism, options, said)
    if place.form == "map" and place.prefix:
        raise OptionError(
            "a map has no special tokens: `form='map'` and `prefix` contradict each other",
            help="leave `prefix` out",
        )
    if place.context_dim is not None and not plan.card.context:
        raise UnsupportedContext(
            "AZ404",
            f"`{plan}` cannot read a context, and `context_dim` was given",
            help="leave it out; attnzoo.list_mechanisms(context=True) has those that can",
        )
    _unheard(plan, said)
    prefix, wanted = place.prefix or 0, plan.card.grid
    axes = (
        len(place.grid)
        if place.grid
        else wanted
        if isinstance(wanted, int)
        else 2
        if place.form == "map"
        else 1
    )
    if isinstance(wanted, int) and axes != wanted:
        raise LayoutMismatch(
            "AZ401",
            f"`{plan}` needs a {wanted}-D grid; this one has {axes} dimensions",
            help=f"say grid=({', '.join(['14'] * wanted)})",
        )
    layout = Layout(place.grid, prefix) if place.grid else None
    context_layout = Layout(place.context_grid) if place.context_grid else None
    site = Site(
        "attn",
        place.dim,
        place.heads or 1,
        layout or Layout((8,) * axes, prefix),
        context_dim=place.context_dim,
        context_layout=context_layout,
        norm=place.norm_layer or nn.LayerNorm,
        **{name: getattr(place, name) for name in _SITE if getattr(place, name) is not None},
    )
    try:
        with torch.device(device) if device is not None else nullcontext():
            component = put(plan, site)
    except RecipeError as error:
        raise (_nowhere(error.diagnostics) if _is_name(mechanism) else error) from None
    if layout is None and _fitted(plan, site):
        raise LayoutMismatch(
            "AZ401",
            f"some weights of `{plan}` belong to positions, and no grid was given",
            help=f"say how many tokens there are: grid=({', '.join(['14'] * axes)}{',' * (axes == 1)})",
        )
    return Part(component.to(dtype=dtype), str(plan), layout, prefix, axes, context_layout)


def _place(said: Mapping[str, Any]) -> _Place:
    """What was said of the place, of the right types.

    Raises:
        RecipeError: AZ211, AZ212.
    """
    told = {
        name: _sides(value) if name in ("grid", "context_grid") else value for name, value in said.items()
    }
    try:
        place = _Place.model_validate(told)
    except ValidationError as error:
        raise _nowhere(faults_of(error, _arguments(told), _Place, (), "create")) from None
    if place.norm_layer is not None and not callable(place.norm_layer):
        raise RecipeError(
            "AZ211",
            f"`norm_layer` builds a norm for a width; this is {place.norm_layer!r}",
            help="hand a class, such as nn.LayerNorm",
        )
    return place


def _sides(grid: Any) -> Any:
    """The sides of a grid as a tuple; one side is a line."""
    if isinstance(grid, int) and not isinstance(grid, bool):
        return (grid,)
    return tuple(grid) if isinstance(grid, list) else grid


def planned(mechanism: Any, options: Mapping[str, Any], said: Mapping[str, Any]) -> Plan:
    """The plan of a spec with options for its outermost component.

    Args:
        mechanism: Name, mapping or text.
        options: Of the outermost component.
        said: What was told of the place, by keyword, which no option may be called; empty where there is none.

    Raises:
        RecipeError: AZ112, AZ201 to AZ205, AZ210 to AZ214, and what else specs are refused for.
    """
    zoo = load_zoo()
    named = _is_name(mechanism)
    source = _source(mechanism, named)
    # YAML text may be a name alone
    tree = {"use": source.tree} if isinstance(source.tree, str) else source.tree
    if isinstance(tree, dict):
        fuses = "fuse" in tree or "of" in tree
        registry: Registry = zoo.fusions if fuses else zoo.mechanisms
        name = tree.get("fuse" if fuses else "use")
        if isinstance(name, str) and name in registry:
            _check(name, registry[name].value, options, said if named else {}, KEYWORDS if said else ())
            own = tree.get("with")
            twice = sorted(options.keys() & own.keys()) if isinstance(own, dict) else []
            if twice:
                raise OptionError(
                    f"`{twice[0]}` stands in the spec's `with` and among the arguments", help="say it once"
                )
            if options:
                tree = {**tree, "with": {**(own if isinstance(own, dict) else {}), **options}}
        source.tree = tree
    try:
        return resolve_spec(source, zoo)
    except ZooError as error:
        raise (_nowhere(error.diagnostics) if named else error) from None


def _is_name(mechanism: Any) -> bool:
    return isinstance(mechanism, str) and not is_text(mechanism) and ":" not in mechanism


def _source(mechanism: Any, named: bool) -> Source:
    if named:
        return _arguments({"use": mechanism})
    if isinstance(mechanism, Mapping):
        return from_data(mechanism, "<spec>")
    if isinstance(mechanism, str):
        return parse(mechanism, "<spec>")
    raise RecipeError(
        "AZ112",
        f"a mechanism is a name, a mapping or a text, not a {type(mechanism).__name__}",
        help="attnzoo.list_mechanisms() has the names",
    )


def _check(
    name: str, cls: type, options: Mapping[str, Any], said: Mapping[str, Any], keywords: Sequence[str]
) -> None:
    """Hold options to those of a component.

    Raises:
        UnknownArgument: AZ210.
        RecipeError: AZ211 to AZ213.
        OptionError: AZ214, for a keyword that is the component's option as well as the place's.
    """
    schema = options_of(cls)
    own = list(schema.model_fields)
    for unknown in options.keys() - schema.model_fields.keys():
        its = f"its options are {', '.join(f'`{one}`' for one in own)}" if own else "it has no options"
        place = ", ".join(f"`{one}`" for one in keywords)
        raise UnknownArgument(
            "AZ210",
            f"`{name}` has no option `{unknown}`",
            help=f"{did_you_mean(unknown, [*own, *keywords])} {its}".strip()
            + (f"; of its place one may say {place}" if place else ""),
        )
    for both in said.keys() & schema.model_fields.keys() - {"dim"}:
        raise OptionError(
            f"`{both}` is an option of `{name}`, and what `create` calls something of its place",
            help=f"for the option write {{'use': '{name}', 'with': {{'{both}': ...}}}}; beside it `{both}=` means the "
            "place",
        )
    if options:
        try:
            schema.model_validate(dict(options))
        except ValidationError as error:
            raise _nowhere(faults_of(error, _arguments(options), schema, (), name)) from None


def _arguments(told: Mapping[str, Any]) -> Source:
    """Keyword arguments, as a text would be read."""
    return Source("", dict(told), values={(name,): Place("") for name in told})


def _nowhere(faults: Sequence[Diagnostic]) -> RecipeError:
    """Faults of arguments, which have no place in a text."""
    return RecipeError.of([replace(fault, place=None) for fault in faults])


def _unheard(plan: Plan, said: Mapping[str, Any]) -> None:
    """Refuse what was said of projections or weights and would change nothing.

    Raises:
        RecipeError: AZ317.
    """
    leaves = plan.leaves()
    for wish in sorted(said.keys() & WISHES):
        for leaf in leaves:
            if not leaf.inside_heads and wish not in leaf.card.honours and said[wish] is not None:
                raise _wish(leaf, wish, "it has projections of its own, or none")
    if said.get("attn_drop") and not any(leaf.card.tapped("weights") for leaf in leaves):
        raise _wish(plan, "attn_drop", "it forms no attention weights that could be dropped")


def _wish(plan: Plan, wish: str, why: str) -> RecipeError:
    return RecipeError(
        "AZ317",
        f"`{plan}` cannot honour `{wish}`",
        why=f"{why}, and a wish that is ignored changes the model silently",
        help="leave it out",
    )


def _fitted(plan: Plan, site: Site) -> bool:
    """Whether weights have the shape of the grid, so that the grid must be known."""

    def shapes(layout: Layout) -> list[torch.Size]:
        with torch.device("meta"):
            return [t.shape for t in plan.build(replace(site, layout=layout)).state_dict().values()]

    if plan.card.fixed_length:
        return True
    sides = tuple(side + 1 for side in site.layout.grid)
    try:
        return shapes(site.layout) != shapes(Layout(sides, site.layout.prefix))
    except ZooError:  # it fits one grid and not the other
        return True
