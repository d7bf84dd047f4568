"""The attention map of every layer and head, whatever mechanism is put there."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from timm.layers import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
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
    MultiHead,
    find_taps,
    watch,
)
from attnzoo.core.component import NOTHING
from attnzoo.errors import ZooError
from attnzoo.hosts.given import stand_ins, taken
from attnzoo.lab.passage import Passage, one_line, passage_of
from attnzoo.lab.sites import sites_of
from attnzoo.lab.timm_models import is_timms, pool_weights, side_by_side, tapped
from attnzoo.lab.windows import InWindows, Windows

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
        weights: (b h n m) or (b h m); where attention looks at windows of a grid, those of each window, (b·w h n n).
        stochastic: Whether the card claims that rows are non-negative and sum to 1.
        allowed: Who may attend to whom, broadcasts to (b h n m); None when all may.
        windows: How the grid is cut into them; None where tokens are not.
    """

    site: str
    layer: int
    branch: str
    mechanism: str
    kind: Kind
    weights: Tensor
    stochastic: bool
    allowed: Tensor | None = None
    windows: Windows | None = None

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.weights.shape[1]

    def matrix(self, queries: int | None = None) -> Float[Tensor, "b h n m"]:
        """What token i receives of token j: a pooled map is the same row n times, a gate a diagonal times m.

        Windows are blocks in the map of their grid, which is made when it is asked for and not kept.

        Args:
            queries: How many tokens receive, n; as many as there are keys when None.
        """
        m = self.weights.shape[-1]
        if self.windows is not None:
            return self.windows.fold(self.weights)
        if self.kind == "pooled":
            return self.weights[:, :, None].expand(-1, -1, queries or m, -1)
        if self.kind == "gate":
            return torch.diag_embed(self.weights * m)
        return self.weights

    def rows(self) -> Float[Tensor, "b h n m"]:
        """`matrix` with rows that are shares: what is negative counts as 0, and each row is divided by its sum, in
        double precision; a row without anything stays 0."""
        positive = self.matrix().double().clamp(min=0)
        return positive / positive.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(positive.dtype).tiny)

    def real(self) -> Bool[Tensor, "b n"]:
        """Which tokens are no padding: those that somebody may see, where tokens look at themselves."""
        b, m = self.weights.shape[0], self.weights.shape[-1]
        if self.allowed is None:
            return torch.ones(b, m, dtype=torch.bool, device=self.weights.device)
        return self.allowed.any(dim=(1, 2)).expand(b, m)

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
class Readout:
    """How the answer is read off the tokens, where it is neither from the class token nor from the mean of the grid.

    Args:
        name: What reads: `the attention pool`.
        shares: How it weighs the tokens, (b n); they sum to 1.
    """

    name: str
    shares: Tensor


@dataclass(frozen=True)
class Maps:
    """All maps of a model on some images.

    Args:
        maps: In the order of layers, then of branches.
        absent: The branches that have none, and why.
        sites: Names of the sites, by layer.
        layout: How the tokens of the image were arranged.
        class_token: Whether the class is read from token 0, where there is a special one; otherwise from the mean of
            the grid tokens.
        logits: What the model answered, (b classes).
        readout: What else the answer is read from; None for the two usual ways.
        course: How tokens pass through the model; None for one set of them, which meets site after site.
    """

    maps: tuple[Map, ...]
    absent: tuple[Absent, ...]
    sites: tuple[str, ...]
    layout: Layout
    class_token: bool
    logits: Tensor
    readout: Readout | None = None
    course: Passage | None = None

    @property
    def passage(self) -> Passage:
        """How tokens pass through the model."""
        return self.course or one_line(self.sites, self.layout)

    @property
    def reads(self) -> str:
        """From what the answer is read, in words."""
        if self.readout is not None:
            return self.readout.name
        passage = self.passage
        names = passage.steps[-1].tokens if passage.steps else ("",)
        read = [passage.layouts[name] for name in names if name not in passage.unread]
        special = [self.class_token and bool(layout.prefix) for layout in read]
        token, mean = "the class token", "the mean of the grid tokens"
        if len(read) == 1:
            return token if special[0] else mean
        each = [f"{token if own else mean} of {name}" for own, name in zip(special, names, strict=True)]
        return " and ".join(each)

    def branches(self) -> list[str]:
        """Names of the branches that have maps, in order of appearance."""
        return list(dict.fromkeys(found.branch for found in self.maps))

    def shares(self, step: int = -1) -> Float[Tensor, "#b n"]:
        """How the answer reads the tokens behind a step; rows sum to 1, and streams it reads from count alike.

        Args:
            step: Number of the step; the last one counts for the answer itself.
        """
        if self.readout is not None:
            return self.readout.shares
        passage = self.passage
        tokens = passage.steps[step].tokens if passage.steps else ("",)
        read = [name not in passage.unread for name in tokens]
        rows = [self._row(passage.layouts[name]) * here for name, here in zip(tokens, read, strict=True)]
        return torch.cat(rows)[None] / sum(read)

    def _row(self, layout: Layout) -> Float[Tensor, "n"]:
        """How a class is read from one set of tokens: from its class token, or from the mean of its grid."""
        row = torch.zeros(layout.length)
        if self.class_token and layout.prefix:
            row[0] = 1.0
        else:
            row[layout.prefix :] = 1 / (layout.length - layout.prefix)
        return row

    def asked(
        self, rows: Float[Tensor, "b *l n m"], step: int = -1, of: str | None = None
    ) -> Float[Tensor, "b ..."]:
        """How much the answer looks at each grid token that came in.

        Args:
            rows: What token i behind a step receives of token j that came in. The row of the class token is taken, or
                the mean row of the grid tokens where the class is not read from a class token; of two streams that are
                read the mean of both. With a `readout` the mean by its shares.
            step: Number of the step.
            of: Name of a set of tokens that came in; the first when None.
        """
        passage = self.passage
        row = self.read(rows, self.shares(step))
        places = passage.places(passage.steps[0]) if passage.steps else {"": slice(None)}
        name = next(iter(places)) if of is None else of
        return _on_grid(row[..., places[name]], passage.layouts[name])

    def read(self, rows: Float[Tensor, "b ..."], shares: Float[Tensor, "#b n"]) -> Float[Tensor, "b ..."]:
        """The mean of rows (b ... n m), by the shares of each."""
        return torch.einsum("bn,b...nm->b...m", shares.to(rows).expand(rows.shape[0], -1), rows)

    def on_grid(self, found: Map) -> Float[Tensor, "b h *grid"]:
        """A map as the answer sees it: the row of the class token, or the mean row of the grid tokens, of those that
        ask; or the one map that there is.

        Args:
            found: One of the maps.
        """
        asks, reads = (self.passage.layouts[name] for name in self.passage.looks[found.site])
        weights = found.weights if found.windows is None else found.matrix()
        if weights.ndim == 4:
            shares = self._row(asks)[None] if self.readout is None else self.readout.shares
            weights = self.read(weights, shares)
        return _on_grid(weights, reads)


def _on_grid(row: Float[Tensor, "*b m"], layout: Layout) -> Float[Tensor, "..."]:
    return row[..., layout.prefix :].unflatten(-1, layout.grid)


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
        sites: What is put at each, by name; what is called never or several times has no map.
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
            again = Absent(
                **leaf.where(), reason="it is called several times in a forward, with one map each"
            )
            read = again if leaf in found else _read(leaf, weights[leaf], args, context, out)
            found[leaf] = read, context["layout"]

        return hook

    def note(leaf: _Leaf) -> Callable[[str, Tensor], None]:
        return lambda name, seen: weights[leaf][name].append(seen)

    weights: dict[_Leaf, dict[str, list[Tensor]]] = {leaf: defaultdict(list) for leaf in leaves}
    with ExitStack() as stack:
        for leaf in leaves:
            stack.enter_context(watch(leaf.component, "weights", note(leaf)))
            stack.callback(leaf.component.register_forward_hook(reading(leaf), with_kwargs=True).remove)
        for part in model.modules():
            stack.callback(setattr, part, "training", part.training)
        output = model.eval()(*inputs, **given)
    for leaf in leaves:
        if leaf not in found:
            reason = "nothing calls it in eval mode"
            found[leaf] = Absent(**leaf.where(), reason=reason), Layout((0,))
    read, layouts = zip(*(found[leaf] for leaf in leaves), strict=True)
    return Looked(read, layouts, output)


def collect(
    model: nn.Module, images: Float[Tensor, "b c y x"], given: Mapping[str, Tensor] | None = None
) -> Maps:
    """The maps of every layer, branch and head for some images, from one forward in eval mode.

    Args:
        model: A composed model, or one of timm's; it is left as it was.
        images: As the model wants them, (b c y x).
        given: The maps that its components ask for, by name; made of the images (`stand_ins`) when None.

    Raises:
        ZooError: AZ903, when there is no mechanism in the model and no taps can be put in, or when it is one of timm's
            in stages that are not Swin's.
    """
    with tapped(model):
        sites = sites_of(model)
        if given is None:
            given = stand_ins(images, taken(model))
        with _pooled(model) as pooled:
            looked = look(model, sites, (images,), given)
        cut = [layout.windows if isinstance(layout, InWindows) else None for layout in looked.layouts]
        if any(is_timms(mechanism) for mechanism in sites.values()) and None in cut:
            _check_one_grid(model, looked, len(images))
    course = passage_of(model, list(sites), looked.layouts)
    output = looked.output
    layout = course.layouts[course.steps[0].tokens[0] if course.steps else next(iter(course.layouts))]
    return Maps(
        maps=tuple(replace(one, windows=cut[one.layer]) for one in looked.maps) if any(cut) else looked.maps,
        absent=looked.absent,
        sites=tuple(sites),
        layout=layout,
        class_token=getattr(model, "global_pool", "") == "token",
        # a model without a classifier answers with features, which are no classes
        logits=output if getattr(model, "num_classes", None) != 0 else output.new_zeros(len(images), 0),
        readout=_readout(model, layout, len(images), pooled),
        course=course,
    )


@contextmanager
def _pooled(model: nn.Module) -> Iterator[list[Tensor]]:
    """How the attention pool at the end of a model of timm's weighs the tokens it is given, (b n), mean over heads."""
    seen: list[Tensor] = []

    def hook(pool: Any, args: tuple) -> None:
        seen.append(pool_weights(pool, args[0]).mean(dim=(1, 2)))

    pool = getattr(model, "attn_pool", None)
    handle = pool.register_forward_pre_hook(hook) if isinstance(pool, AttentionPoolLatent) else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def _readout(model: Any, layout: Layout, batch: int, pooled: list[Tensor]) -> Readout | None:
    """What the answer of one of timm's models is read from, where it is no class token and no mean of the grid."""
    if pooled:
        left = layout.length - pooled[0].shape[1]  # special tokens that the pool is not given
        return Readout("the attention pool", F.pad(pooled[0], (left, 0)))
    shares = torch.zeros(batch, layout.length)
    if isinstance(model, VisionTransformerDistilled):
        shares[:, :2] = 1 / 2
        return Readout("the mean of class and distillation token", shares)
    if getattr(model, "pool_include_prefix", False) and model.global_pool == "avg":
        return Readout("the mean of all tokens", shares + 1 / layout.length)
    return None


def _check_one_grid(model: nn.Module, looked: Looked, batch: int) -> None:
    """Refuse a model of timm's whose layers do not all look at the same tokens of whole images.

    Raises:
        ZooError: AZ903.
    """
    layouts = dict.fromkeys(str(layout) for layout in looked.layouts)
    reason = ""
    if any(len(one.weights) != batch for one in looked.maps):
        reason = "its layers look at parts of an image, such as windows, each by itself"
    elif len(layouts) > 1:
        reason = f"between layers tokens are merged: {', '.join(layouts)}"
    elif len(looked.layouts[0].grid) != 2:
        reason = "how its tokens lie on the image is not known"
    elif side_by_side(model):
        reason = "its blocks have several attentions side by side, so that a map is not that of a layer"
    if reason:
        raise ZooError(
            "AZ903",
            f"heat maps show layers that look at the tokens of one grid; those of this {type(model).__name__} do not",
            why=reason,
            help="inside `attnzoo.lab.timm_models.tapped(model)`, `attnzoo.core.watch` shows the weights of every site",
        )
