"""Scenes: small settings in which a component is built and run. They shrink to one head, one token, no prefix."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import chain
from random import Random
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from attnzoo.core import (
    NO_MASK,
    Card,
    Component,
    Fusion,
    FusionCard,
    Head,
    Layout,
    Mask,
    MultiHead,
    Pool,
    Site,
)
from attnzoo.core.fusion import inside_heads

Checkable = type[Component] | type[Fusion]
"""What can be checked: a class of mechanisms, heads, pools or fusions."""

SMALL = (2, 3, 1)
"""What a whole-number option is tried with besides its default; 1 last: it often switches something off."""
HALF = 0.5
"""What a real option is tried with: a fraction, and positive."""
MOST_SETTINGS = 256
JITTER = 0.3
"""Standard deviation of what is added to parameters, so that a gate that starts at zero hides nothing."""
LINES = tuple((side,) for side in range(1, 6))
PLANES = tuple(sorted(itertools.product(range(1, 6), repeat=2), key=math.prod))
CUBES = tuple(sorted(itertools.product(range(1, 4), repeat=3), key=math.prod))
PLACES = tuple(
    sorted(
        itertools.product(range(3), range(1, 4), range(1, 4), range(2, 5), (True, False)),
        key=lambda p: sum(p[:4]),
    )
)
"""Prefix tokens, samples, heads, channels per head, and whether there are biases; simplest first."""


@dataclass(frozen=True)
class Scene:
    """Where and how a component is built and run. Printed, it is code that builds it again.

    Args:
        component: The mechanism, head, pool or fusion.
        site: Where it is put; the layout of its tokens is `site.layout`. Where it has a `context_dim`, the component
            reads from a context, which lies as `site.context_layout` says.
        options: Options of the component that differ from their defaults.
        batch: Number of samples.
        seed: Seeds construction and inputs.
        arity: Of a fusion: number of branches.
        inside: Of a fusion: whether it merges inside the heads, (b h n d), rather than tokens, (b n c).
        scale: What the standard normal inputs are multiplied by.
    """

    component: Checkable
    site: Site
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    seed: int = 0
    arity: int = 1
    inside: bool = False
    scale: float = 1.0

    @property
    def layout(self) -> Layout:
        """How the tokens are arranged."""
        return self.site.layout

    @cached_property
    def card(self) -> Any:
        """What the component claims under these options: a `Card` or a `FusionCard`."""
        return card_of(self.component, self.options)

    def with_layout(self, grid: Sequence[int], prefix: int | None = None) -> "Scene":
        """The same scene with other tokens.

        Args:
            grid: Number of tokens along each dimension.
            prefix: Number of special tokens; as many as now when None.
        """
        layout = Layout(tuple(grid), self.layout.prefix if prefix is None else prefix)
        return self.at(replace(self.site, layout=layout))

    def at(self, site: Site, least: int = 1) -> "Scene":
        """The same scene at another site; a context keeps in step with the tokens.

        Args:
            site: The other site.
            least: Fewest tokens of a context that lies on no grid.
        """
        if site.context_dim is not None:
            site = _with_context(site, self.card, self.seed, least)
        return replace(self, site=site)

    @property
    def reads(self) -> int:
        """Number of tokens that are read from: of the context, where there is one."""
        return (self.site.context_layout or self.layout).length

    @property
    def tolerance(self) -> float:
        """How far laws may be off: rounding grows with the inputs."""
        return 1e-10 * max(1.0, self.scale)

    def line(self) -> "Scene":
        """The same tokens as a 1-D grid."""
        return self.with_layout((math.prod(self.layout.grid),))

    def alone(self) -> "Scene":
        """The same scene without a context, unless the component is about two streams."""
        if isinstance(self.card, FusionCard) or self.card.context_grid is not None:
            return self
        return replace(self, site=replace(self.site, context_dim=None, context_layout=None))

    def across(self) -> "Scene":
        """The same scene with a context, of another length, width and grid where the component allows."""
        return replace(self, site=_with_context(self.site, self.card, self.seed))

    def crowded(self) -> "Scene":
        """Two or more samples and heads, three or more tokens: enough for masks that differ between them."""
        heads = max(2, self.site.heads)
        site = replace(self.site, heads=heads, dim=heads * (self.site.dim // self.site.heads))
        if site.layout.length < 3:
            site = replace(site, layout=Layout((3, *site.layout.grid[1:]), site.layout.prefix))
        return replace(self.at(site, 3), batch=max(2, self.batch))

    def roomy(self, side: int = 4) -> "Scene":
        """Enough tokens, channels and branches for every parameter to matter.

        Args:
            side: Fewest tokens along a dimension of the grid.
        """
        site = replace(
            self.site, layout=Layout(tuple(max(s, side) for s in self.layout.grid), self.layout.prefix)
        )
        if site.dim // site.heads < 2:
            site = replace(site, dim=2 * site.heads)
        if issubclass(self.component, Fusion) and self.arity == 1 and self.component.card.arity[1] != 1:
            return replace(self, site=replace(site, dim=2 * site.dim, heads=2 * site.heads), arity=2)
        return self.at(site, side)

    def generator(self, stream: int = 0) -> torch.Generator:
        """Random numbers of this scene alone.

        Args:
            stream: Which of several independent sequences.
        """
        return torch.Generator().manual_seed(self.seed * 1000 + stream)

    def construct(self) -> Any:
        """The component as its constructor leaves it: a head bare, in float32, in training mode."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            if not issubclass(self.component, Fusion):
                return self.component(self.site, **self.options)  # type: ignore[call-arg]
            self.component.sites(self.site, self.arity)  # a fusion that divides its site may refuse this one
            site = inside_heads(self.site) if self.inside else self.site
            fusion = self.component(site, self.arity, **self.options)
            fusion.head_axis = 1 if self.inside else -1
            return fusion

    def construct_whole(self) -> Any:
        """As `construct`, with its projections around a head."""
        component = self.construct()
        if isinstance(component, Head):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed + 1)
                component = MultiHead(self.site, component)
        return component

    def build(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        jitter: float = JITTER,
        bare: bool = False,
        stream: int = 0,
    ) -> Any:
        """The component ready to run, in eval mode; a head has its projections around it.

        Args:
            dtype: Of its parameters.
            jitter: Standard deviation of what is added to its parameters; 0 leaves them as initialised.
            bare: Whether a head is left without projections.
            stream: Which of several independent values that are added.
        """
        component = (self.construct() if bare else self.construct_whole()).to(dtype).eval()
        if jitter:
            random = self.generator(900 + stream)
            with torch.no_grad():
                for parameter in component.parameters():
                    more = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
                    parameter.add_(more.to(dtype), alpha=jitter)
        return component

    def random(self, *shape: int, stream: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """A tensor of standard normal numbers that depend on the seed and the stream only."""
        return torch.randn(shape, generator=self.generator(stream), dtype=torch.float64).to(dtype)

    def inputs(self, stream: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """What `run` takes. The last is what is read from.

        For a mechanism or a pool [x], x (b n c); at a site with a context [x, context], context (b m e). For a fusion
        the branches, then x, each (b n c) or (b h n d).

        Args:
            stream: Which of several independent inputs.
            dtype: Of the inputs.
        """
        n, site = self.layout.length, self.site
        if issubclass(self.component, Fusion):
            sites = [*self.component.sites(site, self.arity), site]
            shapes: list[tuple[int, ...]] = [
                (self.batch, s.heads, n, s.head_dim) if self.inside else (self.batch, n, s.dim) for s in sites
            ]
        else:
            shapes = [(self.batch, n, site.dim)]
            if site.context_dim is not None:
                shapes.append((self.batch, self.reads, site.context_dim))
        numbers = [self.random(*shape, stream=stream * 10 + i) for i, shape in enumerate(shapes)]
        return [(self.scale * x).to(dtype) for x in numbers]

    def heads(self, stream: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b h n d), keys and values (b h m d) for a bare head."""
        b, h, d = self.batch, self.site.heads, self.site.head_dim
        lengths = (self.layout.length, self.reads, self.reads)
        q, k, v = (
            self.scale * self.random(b, h, n, d, stream=stream * 10 + i) for i, n in enumerate(lengths)
        )
        return q, k, v

    @property
    def given(self) -> dict[str, Tensor]:
        """The maps that the card names, (b *grid) each."""
        maps = {}
        for i, (name, kind) in enumerate(
            () if isinstance(self.card, FusionCard) else self.card.given.items()
        ):
            shape, random = (self.batch, *self.layout.grid), self.generator(70 + i)
            labels, scores = (
                torch.randint(0, 3, shape, generator=random),
                torch.randn(shape, generator=random),
            )
            maps[name] = labels if kind == "labels" else scores
        return maps

    def shape(self, component: nn.Module) -> tuple[int, ...]:
        """What the output's shape must be: that of the tokens, without their axis for a pool."""
        n, site = self.layout.length, self.site
        if isinstance(component, Pool):
            return self.batch, site.dim
        return (self.batch, site.heads, n, site.head_dim) if self.inside else (self.batch, n, site.dim)

    def run(
        self,
        component: nn.Module,
        tensors: Sequence[Tensor],
        mask: Mask = NO_MASK,
        given: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The component's output for the tensors of `inputs`.

        Args:
            component: What `build` returned.
            tensors: What `inputs` returned; several times as many samples, too.
            mask: Who may attend to whom.
            given: Maps; those of the scene when None.
        """
        if isinstance(component, Fusion):
            return component(outputs(component, tensors), tensors[-1], mask=mask)
        where: dict[str, Any] = {"mask": mask, "layout": self.layout}
        maps = self.given if given is None else given
        if maps:
            copies = tensors[0].shape[0] // self.batch if given is None else 1
            dtype = tensors[0].dtype
            maps = {k: m.to(dtype) if m.is_floating_point() else m for k, m in maps.items()}
            where["given"] = {k: m.repeat(copies, *[1] * (m.ndim - 1)) for k, m in maps.items()}
        if self.site.context_dim is not None:
            where["context_layout"] = self.site.context_layout
        return component(*tensors, **where)

    def ways(self) -> list[Callable[..., Tensor]]:
        """How the component can be called, as functions of a scene (its layout), a mask and maps: a head bare, too."""
        whole, inputs = self.build(), self.inputs()

        def run(scene: Scene, mask: Mask = NO_MASK, given: dict[str, Tensor] | None = None) -> Tensor:
            return scene.run(whole, inputs, mask, given)

        if not issubclass(self.component, Head):
            return [run]
        head, heads = self.build(bare=True), self.heads()

        def attend(scene: Scene, mask: Mask = NO_MASK, given: dict[str, Tensor] | None = None) -> Tensor:
            maps = scene.given if given is None else given
            return head(*heads, mask=mask, layout=scene.head_layout(), given=maps)

        return [run, attend]

    def head_layout(self) -> Layout:
        """How a bare head's keys lie."""
        return self.site.context_layout or self.layout

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        text = f"Scene({self.component.__name__}, {_site_text(self.site)}"
        for name, usual in (
            ("options", {}),
            ("batch", 1),
            ("seed", 0),
            ("arity", 1),
            ("inside", False),
            ("scale", 1.0),
        ):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)!r}"
        return f"{text})"

    def code(self, check: str) -> str:
        """Code that repeats a check in this scene.

        Args:
            check: Its name.
        """
        return "\n".join(
            [
                "from attnzoo.core import Layout, Site",
                f"from attnzoo.testing import CHECKS, Scene  # {check}",
                f"from {self.component.__module__} import {self.component.__name__}",
                f"scene = {self!r}",
                f"CHECKS[{check!r}]({self.component.__name__}, scene)",
            ]
        )


def outputs(fusion: Fusion, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What branches give that pass on what they are fed: b_i + (what is fed − what would be without `feed`).

    Args:
        fusion: Which feeds them.
        tensors: b_1, ..., b_k, and x.
    """
    *branches, x = tensors
    if type(fusion).feed is Fusion.feed:
        return branches
    given: list[Tensor] = []
    for branch, part in zip(branches, fusion.split(x, fusion.head_axis), strict=True):
        fed = fusion.feed(part, given)
        given.append(branch if fed is part else branch + (fed - part))
    return given


def _site_text(site: Site) -> str:
    """Code that makes the site."""
    usual = Site(site.name, site.dim, site.heads, site.layout)
    text = f"Site({site.name!r}, dim={site.dim}, heads={site.heads}, layout={_layout_text(site.layout)}"
    for field_ in fields(Site)[4:]:
        value = getattr(site, field_.name)
        if value != getattr(usual, field_.name):
            text += f", {field_.name}={_layout_text(value) if isinstance(value, Layout) else repr(value)}"
    return f"{text})"


def _layout_text(layout: Layout) -> str:
    return f"Layout({layout.grid}, prefix={layout.prefix})"


def _with_context(site: Site, card: Card, seed: int, least: int = 1) -> Site:
    """The site with a context: mostly of another length and width, on a grid where the card wants one."""
    n, grid = site.layout.length, site.layout.grid
    if card.context_grid is None:
        m = (n + 1, max(1, n - 1), 2 * n + 1, n, 1)[seed % 5]
        width = site.dim + (seed % 7 != 6 and card.context != "beside")
        return replace(site, context_dim=width, context_layout=Layout((max(m, least),)))
    if card.context_grid not in ("any", len(grid)):
        grid = (2,) * int(card.context_grid)
    elif seed % 2:
        grid = tuple(side // 2 if side % 2 == 0 else side for side in grid)
    width = site.dim + (seed % 3 == 2)
    return replace(site, context_dim=width, context_layout=Layout(grid, seed // 2 % 2))


def card_of(cls: Checkable, options: dict[str, Any]) -> Card | FusionCard:
    """What a class claims under these options.

    Args:
        cls: A mechanism, head or fusion.
        options: Its options.
    """
    return cls.card if issubclass(cls, Fusion) else cls.card_for(**options)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """What an option with this annotation is tried with, besides its default."""
    origin = get_origin(annotation)
    if origin is Literal:
        return get_args(annotation)
    if origin in (Union, UnionType):
        return tuple(
            value
            for component in get_args(annotation)
            if component is not NoneType
            for value in _choices(component)
        )
    if origin is Annotated:
        annotation = get_args(annotation)[0]
    return {bool: (False, True), int: SMALL, float: (HALF,)}.get(annotation, ())


@cache
def settings_of(cls: Checkable) -> tuple[dict[str, Any], ...]:
    """The settings a class is tried with, the default first: every `Literal`, both booleans, small numbers.

    Args:
        cls: A mechanism, head or fusion.

    Returns:
        Of each setting the options that differ from their defaults.
    """
    options = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    choices: list[list[dict[str, Any]]] = []
    for option in options:
        left_out: list[dict[str, Any]] = [] if option.default is option.empty else [{}]
        values = [value for value in _choices(option.annotation) if repr(value) != repr(option.default)]
        choices.append(left_out + [{option.name: value} for value in values])
    found = [dict(chain.from_iterable(o.items() for o in setting)) for setting in itertools.product(*choices)]
    return tuple(sorted(found, key=len)[:MOST_SETTINGS])


@cache
def claims_of(cls: Checkable) -> tuple[tuple[Card | FusionCard, dict[str, Any]], ...]:
    """What a class claims under each of its settings, and the setting.

    Args:
        cls: A mechanism, head or fusion.
    """
    return tuple((card_of(cls, options), options) for options in settings_of(cls))


Keep = Callable[[Any, dict[str, Any]], bool]
"""Whether to draw an option setting, asked with the card under it and the options."""
SEEDS = 2**16


def _tables(cls: Checkable, keep: Keep | None) -> tuple[Sequence[Any], ...]:
    """What a scene is drawn from, beside its seed, each table with the simplest first: few draws, for a draw costs."""
    kept = [options for card, options in claims_of(cls) if keep is None or keep(card, options)]
    fusion = issubclass(cls, Fusion)
    card: Any = cls.card
    grid = None if fusion else card.grid
    grids = {1: LINES, 2: PLANES, 3: CUBES}[grid] if isinstance(grid, int) else LINES * 4 + PLANES
    fewest, most = card.arity if fusion else (1, 1)
    arities = range(fewest, 1 + (max(fewest, 4) if most is None else min(most, max(fewest, 4))))
    places = PLACES if not fusion else [place for place in PLACES if place[2] < 3 and place[4]]
    insides = (False, True) if fusion and card.inside_heads else (False,)
    levels = [(arity, inside) for arity in arities for inside in insides]
    # two in three without a context, where there may be one
    across = (False,) if fusion else (True,) if card.context_grid is not None else (False, False, True)

    return kept, places, levels, across, grids


def _scene(cls: Checkable, drawn: Sequence[Any], seed: int) -> Scene:
    """The scene of an entry of each table."""
    options, (prefix, batch, heads, head_dim, bias), (arity, inside), across, grid = drawn
    heads = arity * heads  # so that a fusion can deal them out
    site = Site("check", heads * head_dim, heads, Layout(grid, prefix), qkv_bias=bias, proj_bias=bias)
    if issubclass(cls, Fusion):  # which may know how deep it is
        site = replace(site, layer=seed % 4, depth=4)
    scene = Scene(cls, site, options, batch, seed, arity, inside)
    return scene.across() if across and scene.card.context else scene


def scenes(cls: Checkable, keep: Keep | None = None) -> st.SearchStrategy[Scene]:
    """Scenes in which a component is tried; they shrink to the simplest.

    Args:
        cls: A mechanism, head, pool or fusion.
        keep: Which option settings to draw; None draws all.
    """
    drawn = st.tuples(*(st.sampled_from(table) for table in _tables(cls, keep)))
    return st.builds(lambda entries, seed: _scene(cls, entries, seed), drawn, st.integers(0, SEEDS))


def random_scenes(cls: Checkable, keep: Keep | None, random: Random) -> Iterator[Scene]:
    """The simplest scene, then others without end; without hypothesis, whose draws take as long as a small forward.

    Args:
        cls: A mechanism, head, pool or fusion.
        keep: Which option settings to draw; None draws all.
        random: Where they come from.
    """
    tables = _tables(cls, keep)
    yield _scene(cls, [table[0] for table in tables], 0)
    while True:
        yield _scene(cls, [random.choice(table) for table in tables], random.randrange(SEEDS))


def edges(cls: Checkable, options: dict[str, Any], large: bool) -> list[Scene]:
    """Scenes that are tried besides the drawn ones: everything once, and more tokens than a chunk may hold.

    Args:
        cls: A mechanism, head, pool or fusion.
        options: Its options.
        large: Whether to add one with inputs of up to 1000.
    """
    card: Any = card_of(cls, options)
    fusion = issubclass(cls, Fusion)
    dims = card.grid if not fusion and isinstance(card.grid, int) else 1
    arity = max(2, card.arity[0]) if fusion else 1
    if fusion and card.arity[1] is not None:
        arity = min(arity, card.arity[1])

    def scene(grid: tuple[int, ...], prefix: int, batch: int, heads: int, head_dim: int, seed: int) -> Scene:
        heads = arity * heads
        site = Site("check", heads * head_dim, heads, Layout(grid, prefix))
        made = Scene(cls, site, options, batch, seed, arity)
        return made.across() if not fusion and card.context_grid is not None else made

    long, longer = {1: ((37,), (70,)), 2: ((5, 8), (7, 10)), 3: ((3, 3, 4), (4, 3, 6))}[dims]
    found = [scene((1,) * dims, 0, 1, 1, 1, 1), scene(long, 0, 2, 2, 3, 4), scene(longer, 1, 1, 2, 2, 5)]
    return [*found, replace(scene(LINES[4] if dims == 1 else (4,) * dims, 1, 2, 2, 3, 6), scale=1e3)][
        : 3 + large
    ]
