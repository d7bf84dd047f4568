"""Scenes: small settings in which a component is built and run. They shrink to one head, one token, no prefix."""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from attnzoo.core import NO_MASK, Card, Fusion, FusionCard, Head, Layout, Mask, Mechanism, MultiHead, Site
from attnzoo.core.fusion import inside_heads

Component = type[Mechanism] | type[Head] | type[Fusion]

SMALL = (2, 3, 1)
"""What a whole-number option is tried with besides its default; 1 last: it often switches something off."""
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
        component: The mechanism, head or fusion.
        site: Where it is put; the layout of its tokens is `site.layout`.
        options: Options of the component that differ from their defaults.
        batch: Number of samples.
        seed: Seeds construction and inputs.
        arity: Of a fusion: number of branches.
        inside: Of a fusion: whether it merges inside the heads, (b h n d), rather than tokens, (b n c).
    """

    component: Component
    site: Site
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    seed: int = 0
    arity: int = 1
    inside: bool = False

    @property
    def layout(self) -> Layout:
        """How the tokens are arranged."""
        return self.site.layout

    @property
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
        return replace(self, site=replace(self.site, layout=layout))

    def line(self) -> "Scene":
        """The same tokens as a 1-D grid."""
        return self.with_layout((math.prod(self.layout.grid),))

    def roomy(self) -> "Scene":
        """Enough tokens and branches for every parameter to matter: 4 or more a side, 2 or more branches."""
        wide = self.with_layout([max(side, 4) for side in self.layout.grid])
        if not issubclass(self.component, Fusion) or self.arity > 1 or self.component.card.arity[1] == 1:
            return wide
        site = replace(wide.site, dim=2 * wide.site.dim, heads=2 * wide.site.heads)
        return replace(wide, site=site, arity=2)

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
                return self.component(self.site, **self.options)
            self.component.sites(self.site, self.arity)  # a fusion that divides its site may refuse this one
            site = inside_heads(self.site) if self.inside else self.site
            fusion = self.component(site, self.arity, **self.options)
            fusion.head_axis = 1 if self.inside else -1
            return fusion

    def build(self, dtype: torch.dtype = torch.float64, *, jitter: float = JITTER, bare: bool = False) -> Any:
        """The component ready to run, in eval mode; a head has its projections around it.

        Args:
            dtype: Of its parameters.
            jitter: Standard deviation of what is added to its parameters; 0 leaves them as initialised.
            bare: Whether a head is left without projections.
        """
        component = self.construct()
        if isinstance(component, Head) and not bare:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed + 1)
                component = MultiHead(self.site, component)
        component = component.to(dtype).eval()
        if jitter:
            random = self.generator(99)
            with torch.no_grad():
                for parameter in component.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=random, dtype=dtype), alpha=jitter)
        return component

    def random(self, *shape: int, stream: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """A tensor of standard normal numbers that depend on the seed and the stream only."""
        return torch.randn(shape, generator=self.generator(stream), dtype=torch.float64).to(dtype)

    def inputs(self, stream: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """What `run` takes: [x] with x (b n c); for a fusion the branches, then x, each (b n c) or (b h n d).

        Args:
            stream: Which of several independent inputs.
            dtype: Of the inputs.
        """
        n, site = self.layout.length, self.site
        if not issubclass(self.component, Fusion):
            return [self.random(self.batch, n, site.dim, stream=stream, dtype=dtype)]
        sites = [*self.component.sites(site, self.arity), site]
        shapes = [
            (self.batch, s.heads, n, s.head_dim) if self.inside else (self.batch, n, s.dim) for s in sites
        ]
        return [self.random(*shape, stream=stream * 10 + i, dtype=dtype) for i, shape in enumerate(shapes)]

    def heads(self, stream: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values for a bare head, (b h n d) each."""
        shape = (self.batch, self.site.heads, self.layout.length, self.site.head_dim)
        q, k, v = (self.random(*shape, stream=stream * 10 + i) for i in range(3))
        return q, k, v

    def run(self, component: nn.Module, tensors: Sequence[Tensor], mask: Mask = NO_MASK) -> Tensor:
        """The component's output for the tensors of `inputs`.

        Args:
            component: What `build` returned.
            tensors: What `inputs` returned.
            mask: For a mechanism: who may attend to whom.
        """
        if isinstance(component, Fusion):
            return component(list(tensors[:-1]), tensors[-1])
        return component(tensors[0], mask=mask, layout=self.layout)

    def __repr__(self) -> str:
        site, extra = self.site, ""
        for name, default in (("layer", 0), ("context_dim", None), ("qkv_bias", True), ("proj_bias", True)):
            if getattr(site, name) != default:
                extra += f", {name}={getattr(site, name)!r}"
        layout = f"Layout({site.layout.grid}, prefix={site.layout.prefix})"
        place = f"Site({site.name!r}, dim={site.dim}, heads={site.heads}, layout={layout}{extra})"
        text = f"Scene({self.component.__name__}, {place}"
        for name, usual in (("options", {}), ("batch", 1), ("seed", 0), ("arity", 1), ("inside", False)):
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
                f"from attnzoo.testing import Scene, checks, laws  # {check}",
                f"from {self.component.__module__} import {self.component.__name__}",
                f"scene = {self!r}",
                f"(vars(checks) | vars(laws))[{check!r}]({self.component.__name__}, scene)",
            ]
        )


def card_of(cls: Component, options: dict[str, Any]) -> Card | FusionCard:
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
        return SMALL if get_args(annotation)[0] is int else ()
    return {bool: (False, True), int: SMALL}.get(annotation, ())


@cache
def settings_of(cls: Component) -> tuple[dict[str, Any], ...]:
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


def scenes(
    cls: Component, keep: Callable[[Any, dict[str, Any]], bool] | None = None
) -> st.SearchStrategy[Scene]:
    """Scenes in which a component is tried.

    Args:
        cls: A mechanism, head or fusion.
        keep: Which option settings to draw, asked with the card under them and the options; None draws all.
    """
    kept = [s for s in settings_of(cls) if keep is None or keep(card_of(cls, s), s)]
    fusion = issubclass(cls, Fusion)
    card: Any = cls.card
    grid = None if fusion else card.grid
    grids = {1: LINES, 2: PLANES, 3: CUBES}[grid] if isinstance(grid, int) else LINES * 4 + PLANES
    fewest, most = card.arity if fusion else (1, 1)
    arities = range(fewest, 1 + (max(fewest, 4) if most is None else min(most, max(fewest, 4))))
    places = PLACES if not fusion else [place for place in PLACES if place[2] < 3 and place[4]]
    levels = [(arity, inside) for arity in arities for inside in ((False, True) if fusion else (False,))]

    def scene(drawn: tuple) -> Scene:
        options, (prefix, batch, heads, head_dim, bias), (arity, inside), grid, seed = drawn
        heads = arity * heads  # so that a fusion can deal them out
        site = Site("check", heads * head_dim, heads, Layout(grid, prefix), qkv_bias=bias, proj_bias=bias)
        return Scene(cls, site, options, batch, seed, arity, inside)

    # few draws from tables, simplest first: a draw costs as much as a small forward
    return st.tuples(
        st.sampled_from(kept), st.sampled_from(places), st.sampled_from(levels), st.sampled_from(grids),
        st.integers(0, 2**16),
    ).map(scene)  # fmt: skip
