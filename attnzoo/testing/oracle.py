"""Oracles: slow references of anybody's making, compared with a component in drawn scenes.

What no law can see, such as a missing scale or a wrong exponent, is seen by a loop written from the paper's equation.
"""

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from torch import Tensor

from attnzoo.core import Fusion, Head, Layout, Mask, Mechanism, watch
from attnzoo.core.mask import KINDS
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.testing.report import CheckResult
from attnzoo.testing.strategies import Scene, outputs, scenes

Oracle = Callable[..., Any]
"""What a component must give: a function of some of the arguments that `against` lists, by name."""

EXAMPLES = 60
TOLERANCE = 1e-10
"""How far numbers may be off, in shares of the largest."""
MOST_ROWS = 100
"""Samples × heads × queries of a scene: a loop over them takes some milliseconds."""


@dataclass(frozen=True)
class Case:
    """A scene, and what else an oracle is asked about. Printed, it is code that makes it again.

    Args:
        scene: Where the component is put.
        masks: Which kinds of mask are given.
        context: How the context lies; None without one.
        context_dim: Width of the context, in channels.
        spare: How many tokens longer, along the first side, is what the component was built for.
        watched: Whether somebody looks through the taps, so that the explicit form runs.
    """

    scene: Scene
    masks: tuple[str, ...] = ()
    context: Layout | None = None
    context_dim: int | None = None
    spare: int = 0
    watched: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """All options of the component, those that are left at their defaults too."""
        parameters = inspect.signature(self.scene.component.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return defaults | self.scene.options

    def build(self) -> Any:
        """The component in float64 and eval mode; a head bare."""
        card, site = self.scene.card, self.scene.site
        context = self.context
        if context is not None and card.context_grid is None:
            context = _longer(context, self.spare)
        site = replace(
            site,
            layout=_longer(site.layout, self.spare),
            context_layout=context,
            context_dim=self.context_dim,
        )
        return replace(self.scene, site=site).build(bare=True)

    def tensors(self) -> dict[str, Any]:
        """Inputs by the names that an oracle knows them by."""
        scene, site, layout = self.scene, self.scene.site, self.scene.layout
        b, n = scene.batch, layout.length
        m = n if self.context is None else self.context.length
        if issubclass(scene.component, Fusion):
            sites = [*scene.component.sites(site, scene.arity), site]
            shapes = [(b, s.heads, n, s.head_dim) if scene.inside else (b, n, s.dim) for s in sites]
            *branches, x = (scene.random(*shape, stream=i) for i, shape in enumerate(shapes))
            return {"branches": branches, "x": x}
        if issubclass(scene.component, Head):
            shapes = [(b, site.heads, length, site.head_dim) for length in (n, m, m)]
            q, k, v = (scene.random(*shape, stream=i) for i, shape in enumerate(shapes))
            return {"q": q, "k": k, "v": v}
        x = scene.random(b, n, site.dim)
        if not issubclass(scene.component, Mechanism):
            return {"x": x}
        return {
            "x": x,
            "source": x
            if self.context is None
            else scene.random(b, m, self.context_dim or site.dim, stream=1),
        }

    def mask(self) -> Mask:
        """A mask of the kinds that are given, different for samples and heads; some rows may be empty."""
        scene = self.scene
        b, n = scene.batch, scene.layout.length
        m = n if self.context is None else self.context.length
        heads = 1 if getattr(scene.card, "one_head", False) else scene.site.heads
        random = scene.generator(50)
        keys, pairs = (
            torch.rand(b, m, generator=random) < 0.7,
            torch.rand(b, heads, n, m, generator=random) < 0.7,
        )
        return Mask(
            keys=keys if "keys" in self.masks else None,
            pairs=pairs if "pairs" in self.masks else None,
            causal="causal" in self.masks,
        )

    def maps(self, where: Layout) -> dict[str, Tensor]:
        """The maps that the card names, (b *grid) each."""
        shape, found = (self.scene.batch, *where.grid), {}
        for i, (name, kind) in enumerate(getattr(self.scene.card, "given", {}).items()):
            random = self.scene.generator(60 + i)
            if kind == "labels":
                found[name] = torch.randint(0, 3, shape, generator=random)
            else:
                found[name] = torch.randn(shape, generator=random, dtype=torch.float64)
        return found

    def compare(self, oracle: Oracle, tolerance: float = TOLERANCE, no_gradient: str = "") -> None:
        """Refuse outputs and gradients of the component that are not the oracle's.

        Args:
            oracle: What it must give.
            tolerance: How far numbers may be off, in shares of the largest.
            no_gradient: Why gradients are not compared; empty when they are.

        Raises:
            AssertionError: When they differ.
            TypeError: When the oracle asks for an argument that there is not.
        """
        oracle = getattr(oracle, "oracle", oracle)
        component, named, mask = self.build(), self.tensors(), self.mask()
        inputs = _leaves(named)
        for _, tensor in inputs:
            tensor.requires_grad_()
        found = self._found(component, named, mask)
        wanted = _tensor(self._wanted(oracle, self.build(), named, mask))  # a forward may change its own
        if found.shape != wanted.shape:
            raise AssertionError(
                f"{_CLAIM}; but its shape is {tuple(found.shape)}, not {tuple(wanted.shape)}"
            )
        _near("the output", found, wanted, tolerance)
        if no_gradient:
            return
        upstream = self.scene.random(*found.shape, stream=7)
        pairs = zip(
            inputs, _gradients(found, upstream, inputs), _gradients(wanted, upstream, inputs), strict=True
        )
        for (name, _), own, theirs in pairs:
            hint = (
                ""
                if wanted.requires_grad
                else " (an oracle of plain numbers has none: say why in `no_gradient`)"
            )
            _near(f"the gradient with respect to `{name}`", own, theirs, tolerance, hint)

    def _found(self, component: Any, named: dict[str, Any], mask: Mask) -> Tensor:
        layout = self.scene.layout
        if isinstance(component, Fusion):
            return component(outputs(component, [*named["branches"], named["x"]]), named["x"], mask=mask)
        tensors = list(named.values())
        where: dict[str, Any] = {"mask": mask, "layout": layout}
        if isinstance(component, Head):
            where["layout"] = self.context or layout
        elif isinstance(component, Mechanism):
            tensors = [named["x"], None if self.context is None else named["source"]]
            where["context_layout"] = self.context
        where["given"] = self.maps(where["layout"])
        if not self.watched:
            return component(*tensors, **where)
        with watch(component, None, lambda *_: None):
            return component(*tensors, **where)

    def _wanted(self, oracle: Oracle, component: Any, named: dict[str, Any], mask: Mask) -> Any:
        known = {"component": component, "options": self.options, **named}
        layout, reads = self.scene.layout, self.context or self.scene.layout
        b, h, n, m = self.scene.batch, self.scene.site.heads, layout.length, reads.length
        known |= {"mask": mask, "allowed": _allowed(mask, b, h, n, m)}
        known["keys"] = torch.ones(b, m, dtype=torch.bool) if mask.keys is None else mask.keys
        if not isinstance(component, Fusion):
            where = reads if isinstance(component, Head) else layout
            known |= {"layout": where, "context_layout": self.context, **self.maps(where)}
        parameters = inspect.signature(oracle).parameters.values()
        missing = [p.name for p in parameters if p.name not in known and p.default is p.empty]
        if missing:
            raise TypeError(f"an oracle of this kind is given {', '.join(known)}; there is no `{missing[0]}`")
        return oracle(**{p.name: known[p.name] for p in parameters if p.name in known})

    def code(self, oracle: Oracle) -> str:
        """Code that repeats the comparison.

        Args:
            oracle: What is compared with.
        """
        component = self.scene.component
        oracle = getattr(oracle, "oracle", oracle)
        name = oracle.__qualname__
        given = (
            f"from {oracle.__module__} import {name} as oracle"
            if name.isidentifier()
            else f"oracle = ...  # {name}"
        )
        return "\n".join(
            [
                "from attnzoo.core import Layout, Site",
                "from attnzoo.testing import Scene",
                "from attnzoo.testing.oracle import Case",
                f"from {component.__module__} import {component.__name__}",
                given,
                f"case = {self!r}",
                "case.compare(oracle)",
            ]
        )


_CLAIM = "claimed: equals its oracle"


def _longer(layout: Layout, spare: int) -> Layout:
    """The layout with a longer first side."""
    return replace(layout, grid=(layout.grid[0] + spare, *layout.grid[1:]))


def _leaves(named: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The input tensors and their names, each once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in named.items():
        if isinstance(value, Tensor):
            found.setdefault(id(value), (name, value))
        else:
            found |= {id(tensor): (f"{name}[{i}]", tensor) for i, tensor in enumerate(value)}
    return list(found.values())


def _allowed(mask: Mask, b: int, h: int, n: int, m: int) -> Tensor:
    """Who may attend to whom, (b h n m), entry by entry."""
    allowed = torch.ones(b, h, n, m, dtype=torch.bool)
    if mask.keys is not None:
        allowed &= mask.keys[:, None, None, :]
    if mask.pairs is not None:
        allowed &= mask.pairs
    if mask.causal:
        for i in range(n):
            allowed[:, :, i, max(0, m - n + i + 1) :] = False  # the last query is the last key's
    return allowed


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)


def _gradients(out: Tensor, upstream: Tensor, inputs: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """The gradient of every input; zeros for one that has no say."""
    tensors = [tensor for _, tensor in inputs]
    if not out.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    found = torch.autograd.grad(out, tensors, upstream, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def _near(what: str, found: Tensor, wanted: Tensor, tolerance: float, hint: str = "") -> None:
    found, wanted = found.detach().double(), wanted.detach().double()
    if not found.numel():
        return
    off, most = float((found - wanted).abs().max()), max(1.0, float(wanted.abs().max()))
    if not off <= tolerance * most:  # NaN is off
        raise AssertionError(
            f"{_CLAIM}; but {what} is off by {off:.2e}, where the largest number is {most:.2e}{hint}"
        )


def cases(cls: type, options: Callable[[dict[str, Any]], bool] | None = None) -> st.SearchStrategy[Case]:
    """Cases in which a component is compared: all settings of its options, masks of every combination of claimed kinds.

    Args:
        cls: A mechanism, head, pool or fusion.
        options: Which settings to draw, asked with the options; None draws all.
    """

    def case(drawn: tuple) -> Case:
        scene, more, chosen, crossed, length, sides, (spare, watched) = drawn
        scene = replace(scene, site=replace(scene.site, context_dim=None, context_layout=None))
        if more == "heads":  # enough to form groups
            heads = 2 * scene.site.heads
            scene = replace(scene, site=replace(scene.site, heads=heads, dim=heads * scene.site.head_dim))
        if more == "tokens":  # than a window or a chunk holds
            grid = scene.layout.grid
            scene = replace(scene.with_layout((grid[0] + 11, *(min(side, 2) for side in grid[1:]))), batch=1)
        rows = scene.site.heads * scene.layout.length
        scene = replace(scene, batch=max(1, min(scene.batch, MOST_ROWS // rows)))
        card = scene.card
        claimed = [kind for kind in KINDS if kind in card.masks]
        together = [kinds for size in range(len(claimed), -1, -1) for kinds in combinations(claimed, size)]
        if issubclass(cls, Fusion):
            return Case(scene, together[chosen % len(together)] if card.mixes_tokens else ())
        found = Case(
            scene,
            together[chosen % len(together)],
            spare=0 if card.fixed_length is True else spare,
            watched=watched and bool(card.taps),
        )
        if card.context_grid is None:
            if not (card.context and crossed):
                return found
            layout = Layout((length,))
        else:  # a second stream, on a grid that divides that of the tokens
            grid = scene.layout.grid
            dims = len(grid) if card.context_grid == "any" else card.context_grid
            divisors = [[d for d in range(1, side + 1) if side % d == 0] for side in grid[:dims]]
            layout = Layout(tuple(d[i % len(d)] for d, i in zip(divisors, sides, strict=False)), length % 2)
        width = scene.site.dim if issubclass(cls, Head) or crossed != 2 else scene.site.dim + 1
        return replace(found, context=layout, context_dim=width, spare=found.spare)

    keep = None if options is None else (lambda _card, chosen: options(chosen))
    return st.tuples(
        scenes(cls, keep),
        st.sampled_from(["", "", "", "", "", "heads", "heads", "tokens"]),
        st.integers(0, 7),  # which kinds of mask together
        st.sampled_from([0, 1, 2]),  # without a context, with one, with one of another width
        st.integers(1, 7),
        st.tuples(*[st.integers(0, 5)] * 3),
        st.sampled_from([(0, False), (0, True), (1, False), (2, True)]),
    ).map(case)


def compare(
    cls: type,
    oracle: Oracle,
    *,
    examples: int = EXAMPLES,
    tolerance: float = TOLERANCE,
    no_gradient: str = "",
    options: Callable[[dict[str, Any]], bool] | None = None,
    shrink: bool = True,
) -> CheckResult:
    """Compare a component with its oracle in drawn scenes, in float64: outputs, and gradients of all inputs.

    Args:
        cls: A mechanism, head, pool or fusion.
        oracle: What it must give; see `against`.
        examples: Number of scenes.
        tolerance: How far numbers may be off, in shares of the largest.
        no_gradient: Why gradients are not compared, such as `hard window edges`; empty when they are.
        options: Which settings of the options to draw, asked with those that are not the default; None draws all.
        shrink: Whether a failing scene is made small, which takes a second or two.
    """
    name = f"against {getattr(oracle, '__name__', 'oracle')}"
    last: list[Case] = []

    @settings(
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(cls, options))
    def run(case: Case) -> None:
        last[:] = [case]
        try:
            case.compare(oracle, tolerance, no_gradient)
        except RecipeError:
            reject()  # options and sites that do not go together, and are refused as they should be
        except LayoutMismatch:
            if not case.spare:
                raise
            reject()  # other tokens than it was built for, which a component may refuse

    card: Any = cls.card  # type: ignore[attr-defined]
    try:
        run()
    except HypothesisException as error:
        return CheckResult(
            card.name, name, "failed", f"no scene could be tried: {type(error).__name__}: {error}"
        )
    except AssertionError as error:
        return CheckResult(card.name, name, "failed", str(error), last[0].code(oracle))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"it raised {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return CheckResult(card.name, name, "failed", text, last[0].code(oracle))
    return CheckResult(card.name, name, "passed")


def against(cls: type, **how: Any) -> Callable[[Oracle], Callable[[], None]]:
    """Makes a test of an oracle: a slow, obvious function that says what a component must give.

        @against(Mine)
        def test_mine(component, q, k, v, allowed):
            ...
            return out

    An oracle takes, by name, what it needs of these; PyTorch follows its gradients, or it returns nested lists.

    - all: `component`, in float64 and eval mode, for its parameters, and `options`, all of them by name;
    - a head: `q` (b h n d), `k` and `v` (b h m d), and `layout`, of the keys;
    - a mechanism: `x` (b n c), `source` (b m e), which is the context or x itself, `layout` of x, `context_layout`;
    - a pool: `x` (b n c) and `layout`;
    - a fusion: `branches`, k tensors (... n c), and `x` (... n c); where a fusion feeds branches with what others
      gave, branch i gives branches[i] + (what it is fed − x);
    - all: `mask`; `allowed`, the whole mask as one boolean (b h n m); `keys`, which tokens that are read from exist
      (b m);
    - all but a fusion: the maps that the card names.

    Args:
        cls: A mechanism, head, pool or fusion.
        how: As for `compare`.

    Returns:
        A decorator. The test that it makes keeps the function as `.oracle` and its class as `.component`;
        `.compare(cls, **how)` compares another class, such as a wrong version that must be caught.
    """

    def decorate(oracle: Oracle) -> Callable[[], None]:
        def run(other: type = cls, **changed: Any) -> CheckResult:
            return compare(other, oracle, **how | changed)

        def test() -> None:
            __tracebackhide__ = True
            result = run()
            if not result.ok:
                raise AssertionError(str(result))

        test.__name__, test.__qualname__, test.__doc__ = oracle.__name__, oracle.__qualname__, oracle.__doc__
        test.__module__ = oracle.__module__
        test.component, test.oracle, test.compare = cls, oracle, run  # type: ignore[attr-defined]
        return test

    return decorate
