"""The attention map of every layer and head, whatever mechanism is put there."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import (
    NO_MASK,
    Family,
    Fused,
    FusedHeads,
    Head,
    Law,
    Layout,
    Mask,
    Mechanism,
    MultiHead,
    find_taps,
    watch,
)
from attnzoo.core.component import NOTHING
from attnzoo.errors import ZooError
from attnzoo.hosts.dual import DualTransformer
from attnzoo.hosts.given import stand_ins
from attnzoo.hosts.pyramid import PyramidTransformer

Kind = Literal["weights", "pooled", "gate", "implied"]

_WITHOUT = {
    Family.CHANNEL: "it gates channels: no token looks at another",
    Family.MIXING: "it mixes tokens without weights",
}


@dataclass(frozen=True)
class Map:
    """The map of one branch at one site.

    Args:
        site: Name of the site: `blocks.3`.
        layer: Which site of the model it is, from 0.
        branch: Name of the branch: `softmax`; `gated.softmax` for a fusion inside a fusion.
        mechanism: Name of the mechanism.
        kind: `weights`, seen by a tap or the product of two, (b h n m). `pooled`, seen by a tap, (b h m): every token
            receives the same weighted sum. `gate`, seen by a tap, (b h m): token j receives its own value times its
            weight. `implied`, (b h n m), of a head without weights that is linear in its values.
        weights: (b h n m) or (b h m).
        stochastic: Whether the card claims that rows are non-negative and sum to 1.
        allowed: Who may attend to whom, broadcasts to (b h n m); None when all may.
    """

    site: str
    layer: int
    branch: str
    mechanism: str
    kind: Kind
    weights: Tensor
    stochastic: bool
    allowed: Tensor | None = None

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.weights.shape[1]

    def matrix(self, queries: int | None = None) -> Float[Tensor, "b h n m"]:
        """What token i receives of token j: a pooled map is the same row n times, a gate a diagonal times m.

        Args:
            queries: How many tokens receive, n; as many as there are keys when None.
        """
        m = self.weights.shape[-1]
        if self.kind == "pooled":
            return self.weights[:, :, None].expand(-1, -1, queries or m, -1)
        if self.kind == "gate":
            return torch.diag_embed(self.weights * m)
        return self.weights

    def visible(self) -> Tensor:
        """How many keys each query may see, broadcasts to (b h n)."""
        if self.allowed is None:
            return torch.full((1, 1, 1), self.weights.shape[-1], dtype=torch.float64)
        return self.allowed.double().sum(dim=-1)

    def statistics(self) -> dict[str, float]:
        """Least, most, smallest and largest sum of a row, and mean entropy as a share of log m, without unit."""
        w = self.weights.double()
        sums, share = w.sum(dim=-1), w.clamp(min=0)
        entropy = -torch.xlogy(share, share).sum(dim=-1).mean() / math.log(max(w.shape[-1], 2))
        figures = {"least": w.min(), "most": w.max(), "least_sum": sums.min(), "most_sum": sums.max()}
        return {name: float(value) for name, value in (figures | {"entropy": entropy}).items()}

    def as_dict(self) -> dict[str, Any]:
        """What it is, and its statistics, for `--json`."""
        about = {"site": self.site, "layer": self.layer, "branch": self.branch, "mechanism": self.mechanism}
        return about | {"kind": self.kind, "heads": self.heads} | self.statistics()


@dataclass(frozen=True)
class Absent:
    """A branch without a map.

    Args:
        site: Name of the site.
        layer: Which site of the model it is, from 0.
        branch: Name of the branch.
        mechanism: Name of the mechanism.
        reason: Why there is none.
    """

    site: str
    layer: int
    branch: str
    mechanism: str
    reason: str


@dataclass(frozen=True)
class Maps:
    """All maps of a model on some images.

    Args:
        maps: In the order of layers, then of branches.
        absent: The branches that have none, and why.
        sites: Names of the sites, by layer.
        layout: How the tokens were arranged.
        class_token: Whether the class is read from token 0; otherwise from the mean of the grid tokens.
        logits: What the model answered, (b classes).
    """

    maps: tuple[Map, ...]
    absent: tuple[Absent, ...]
    sites: tuple[str, ...]
    layout: Layout
    class_token: bool
    logits: Tensor

    def branches(self) -> list[str]:
        """Names of the branches that have maps, in order of appearance."""
        return list(dict.fromkeys(found.branch for found in self.maps))

    def asked(self, rows: Float[Tensor, "*b n m"]) -> Float[Tensor, "*b y x"]:
        """How much the answer looks at each grid token.

        Args:
            rows: What token i receives of token j (... n m); the row of the class token is taken, or the mean row of
                the grid tokens where the class is not read from a class token.
        """
        prefix = self.layout.prefix
        row = rows[..., 0, :] if self.class_token else rows[..., prefix:, :].mean(dim=-2)
        return row[..., prefix:].unflatten(-1, self.layout.grid)

    def on_grid(self, found: Map) -> Float[Tensor, "b h y x"]:
        """A map as the answer sees it: its `asked` row, or the one map that there is."""
        if found.weights.ndim == 4:
            return self.asked(found.weights)
        return found.weights[..., self.layout.prefix :].unflatten(-1, self.layout.grid)


@dataclass(frozen=True)
class _Leaf:
    """A mechanism or head that is no wrapper of others, and where it is."""

    site: str
    layer: int
    branch: str
    component: Any

    def where(self) -> dict:
        name = self.component.card.name
        return {"site": self.site, "layer": self.layer, "branch": self.branch, "mechanism": name}


def _branches(component: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The mechanisms inside a component, by the names of the branches that lead there."""
    inner: Any = component.inner if isinstance(component, MultiHead) else component
    if isinstance(inner, Fused | FusedHeads):
        for name, branch in inner.branches.named_children():
            yield from _branches(branch, f"{path}.{name}" if path else name)
    else:
        yield path or inner.card.name, inner


def _sites(model: nn.Module) -> dict[str, nn.Module]:
    """What is put at each site of a model, in their order.

    Raises:
        ZooError: AZ903, when there is none.
    """
    inside: set[nn.Module] = set()
    sites: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, Mechanism) and module not in inside:
            place, _, name = path.rpartition(".")
            if hasattr(model.get_submodule(place), "cross"):  # a layer with two sites
                place = f"{place}.{'cross' if name == 'cross' else 'self'}"
            sites[place or path] = module
            inside |= set(module.modules())
    if not sites:
        raise ZooError(
            "AZ903",
            f"there is no mechanism in this {type(model).__name__}",
            why="maps are seen through the taps of mechanisms",
            help="compose the model from a recipe; `ham_classic` is a plain ViT",
        )
    return sites


def _same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max())


def implied_map(
    head: Head,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    *,
    mask: Mask = NO_MASK,
    layout: Layout,
    given: Mapping[str, Tensor] = NOTHING,
) -> Float[Tensor, "b h n m"]:
    """The map of a head that is linear in its values for fixed q and k: what it makes of one-hot values.

    Exact: the map times v is what the head gives for v. Negative entries are possible, and rows need not sum to 1.

    Args:
        head: Claims `linear_in_values`.
        q: Queries (b h n d).
        k: Keys (b h m d).
        v: Values (b h m d); only their shape matters.
        mask: Who may attend to whom.
        layout: How the key tokens are arranged.
        given: Maps on the grid by name.
    """
    m, d = v.shape[2:]
    maps = head.given_maps(given, q.shape[0], layout)
    one_hot = F.pad(torch.eye(m, dtype=v.dtype, device=v.device), (0, -m % d))  # as many columns as d divides
    columns = [
        head.attend(q, k, values.expand_as(v), mask=mask, layout=layout, **maps)  # not seen by hooks
        for values in one_hot.split(d, 1)
    ]
    return torch.cat(columns, dim=-1)[..., :m]


def _read(
    leaf: _Leaf, tapped: dict[str, list[Tensor]], args: tuple, context: dict, out: Tensor
) -> Map | Absent:
    """What is to be had from one call of a leaf.

    Args:
        leaf: What was called.
        tapped: What its taps called `weights` let through, by name.
        args: What it was called with.
        context: `mask`, `layout` and `given`.
        out: What it gave.
    """
    component, card = leaf.component, leaf.component.card
    taps = find_taps(component, "weights")
    times = sum(len(tapped[name]) for name in taps)
    if taps and times > len(taps):
        return Absent(**leaf.where(), reason=f"it forms weights {times} times: no one map describes it")
    weights = map_of_tokens({name: (tap.axes, tapped[name][0]) for name, tap in taps.items() if tapped[name]})
    if weights is not None:
        kind: Kind = "weights"
        if weights.ndim == 3:
            gates = isinstance(component, Head) and not _same(weights[:, :, None] @ args[2], out)
            kind = "gate" if gates else "pooled"
        stochastic = Law.STOCHASTIC in card.laws
        return Map(
            **leaf.where(),
            kind=kind,
            weights=weights,
            stochastic=stochastic,
            allowed=_allowed(weights, context),
        )
    if isinstance(component, Head) and Law.LINEAR_IN_VALUES in card.laws:
        weights = implied_map(component, *args, **context)
        if _same(weights @ args[2], out):
            allowed = _allowed(weights, context)
            return Map(**leaf.where(), kind="implied", weights=weights, stochastic=False, allowed=allowed)
        return Absent(**leaf.where(), reason="it mixes channels as well as tokens: no one map describes it")
    if taps:
        axes = " and ".join(sorted(tap.axes for tap in taps.values()))
        return Absent(**leaf.where(), reason=f"its weights have the axes {axes}: no map of tokens")
    why = "it forms no weights, and is not linear in the values of its heads"
    return Absent(**leaf.where(), reason=_WITHOUT.get(card.family, why))


def _allowed(weights: Tensor, context: Mapping[str, Any]) -> Tensor | None:
    """Who may attend to whom in this call, broadcasts to (b h n m)."""
    mask = context.get("mask", NO_MASK)
    return mask.dense(weights.shape[-2] if weights.ndim == 4 else 1, weights.shape[-1], weights.device)


def map_of_tokens(tapped: Mapping[str, tuple[str, Tensor]]) -> Tensor | None:
    """What token i receives of token j, (b h n m), or of which every token receives the same, (b h m).

    Where tokens hand over to slots and slots to tokens, `b h r m` and `b h n r`, the map is the product of both.

    Args:
        tapped: Axes of each tap, and what it let through, by name.

    Returns:
        None when the axes do not add up to one map of tokens.
    """
    found: dict[str, Tensor] = {}
    for axes, weights in tapped.values():
        letters = axes.split()
        positions = [axis for axis in "nrm" if axis in letters]
        if set(letters) - {"b", "h", *positions} or "b" not in letters or "".join(positions) in found:
            return None
        if "h" not in letters:
            letters, weights = ["h", *letters], weights[None]
        found["".join(positions)] = weights.permute([letters.index(axis) for axis in ("b", "h", *positions)])
    if found.keys() == {"nr", "rm"}:
        return found["nr"] @ found["rm"]
    return next(iter(found.values())) if found.keys() in ({"nm"}, {"m"}) else None


@dataclass(frozen=True)
class Looked:
    """What one forward let see.

    Args:
        read: What is to be had of each mechanism, in the order of sites, then of branches.
        layouts: How the keys of each were arranged, in the same order.
        output: What the model gave.
    """

    read: tuple[Map | Absent, ...]
    layouts: tuple[Layout, ...]
    output: Tensor

    @property
    def maps(self) -> tuple[Map, ...]:
        """All maps."""
        return tuple(one for one in self.read if isinstance(one, Map))

    @property
    def absent(self) -> tuple[Absent, ...]:
        """The branches without one."""
        return tuple(one for one in self.read if isinstance(one, Absent))


@torch.no_grad()
def look(
    model: nn.Module,
    sites: Mapping[str, nn.Module],
    inputs: tuple[Tensor, ...],
    given: Mapping[str, Tensor] = NOTHING,
) -> Looked:
    """What the mechanisms at these sites do in one forward in eval mode; layers are counted in the order of sites.

    Args:
        model: It is left as it was.
        sites: What is put at each, by name; each is called once in a forward.
        inputs: What the model is called with.
        given: And what by name.
    """
    leaves = [
        _Leaf(site, layer, branch, component)
        for layer, (site, module) in enumerate(sites.items())
        for branch, component in _branches(module)
    ]
    found: dict[_Leaf, tuple[Map | Absent, Layout]] = {}

    def reading(leaf: _Leaf) -> Callable:
        def hook(_part: nn.Module, args: tuple, context: dict, out: Tensor) -> None:
            found[leaf] = _read(leaf, tapped[leaf], args, context, out), context["layout"]

        return hook

    def note(leaf: _Leaf) -> Callable[[str, Tensor], None]:
        return lambda name, weights: tapped[leaf][name].append(weights)

    tapped: dict[_Leaf, dict[str, list[Tensor]]] = {leaf: defaultdict(list) for leaf in leaves}
    with ExitStack() as stack:
        for leaf in leaves:
            stack.enter_context(watch(leaf.component, "weights", note(leaf)))
            stack.callback(leaf.component.register_forward_hook(reading(leaf), with_kwargs=True).remove)
        stack.callback(model.train, model.training)
        output = model.eval()(*inputs, **given)
    read, layouts = zip(*(found[leaf] for leaf in leaves), strict=True)
    return Looked(read, layouts, output)


def collect(
    model: nn.Module, images: Float[Tensor, "b c y x"], given: Mapping[str, Tensor] | None = None
) -> Maps:
    """The maps of every layer, branch and head for some images, from one forward in eval mode.

    Args:
        model: A composed model; it is left as it was.
        images: As the model wants them, (b c y x).
        given: The maps that its components ask for, by name; made of the images (`stand_ins`) when None.

    Raises:
        ZooError: AZ903, when there is no mechanism in the model, when it has two streams or is one in stages.
    """
    if isinstance(model, PyramidTransformer):
        raise ZooError(
            "AZ903",
            "heat maps show tokens of one grid; this model has a grid for each stage",
            why="between stages tokens are merged, so that those of one grid cannot be followed to the next",
            help="`attnzoo.core.watch` shows the weights of every site",
        )
    if isinstance(model, DualTransformer):
        raise ZooError(
            "AZ903",
            "heat maps show one stream of tokens; this model has two",
            why="what a token of one stream receives comes through both",
            help="`attnzoo.core.watch` shows the weights of every site",
        )
    sites = _sites(model)
    if given is None:
        given = stand_ins(images, getattr(model, "given", {}))
    looked = look(model, sites, (images,), given)
    return Maps(
        maps=looked.maps,
        absent=looked.absent,
        sites=tuple(sites),
        layout=looked.layouts[0],
        class_token=getattr(model, "global_pool", "") == "token",
        logits=looked.output,
    )
