"""How tokens pass through a model of images: which there are, which sites they meet in turn, where they merge.

Most models have one set of tokens, which meets site after site. Both streams of a `dual` model meet the sites of
self-attention of a layer at once, then those of cross-attention; tokens of a `pyramid` model and of timm's Swin merge
between stages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import Layout
from attnzoo.hosts.dual import DualTransformer
from attnzoo.hosts.pyramid import PyramidTransformer
from attnzoo.lab.windows import InWindows, Windows


@dataclass(frozen=True)
class Step:
    """What happens to all tokens at once: they attend, or some become one.

    Args:
        name: The site, or `*.0.self` where there are several.
        layer: Which layer of the model it belongs to, from 0.
        sites: Names of the sites; none where tokens merge.
        tokens: Names of the sets of tokens behind it, one after the other.
        merge: How much of each token before is in each behind, (n m); rows sum to 1. None where they attend.
    """

    name: str
    layer: int
    sites: tuple[str, ...]
    tokens: tuple[str, ...]
    merge: Float[Tensor, "n m"] | None = None


@dataclass(frozen=True)
class Passage:
    """How tokens pass through a model.

    Args:
        layouts: How the tokens of each set are arranged, by name; there is one without a name in most models.
        looks: Whose tokens ask at a site, and whose are asked: names of two sets, by site.
        steps: In order; tokens come in as those of the first are.
        groups: Sites of one kind, whose maps lie on one grid, by name.
        unread: Sets from which the answer is not read.
        unknown: Why tokens cannot be followed from end to end; empty when they can.
    """

    layouts: Mapping[str, Layout]
    looks: Mapping[str, tuple[str, str]]
    steps: tuple[Step, ...]
    groups: Mapping[str, tuple[str, ...]]
    unread: frozenset[str] = frozenset()
    unknown: str = ""

    @property
    def depth(self) -> int:
        """Number of layers."""
        return 1 + max((step.layer for step in self.steps if step.sites), default=-1)

    def sites(self, layer: int | None = None) -> list[str]:
        """Names of the sites of a layer, in order; of all when None.

        Args:
            layer: From 0.
        """
        return [site for step in self.steps for site in step.sites if layer in (None, step.layer)]

    def places(self, step: Step) -> dict[str, slice]:
        """Where each set is among the tokens behind a step.

        Args:
            step: One of `steps`.
        """
        found, start = {}, 0
        for name in step.tokens:
            found[name] = slice(start, start := start + self.layouts[name].length)
        return found


def one_line(sites: Sequence[str], layout: Layout) -> Passage:
    """One set of tokens, which meets site after site.

    Args:
        sites: Names of the sites.
        layout: How the tokens are arranged.
    """
    steps = tuple(Step(site, layer, (site,), ("",)) for layer, site in enumerate(sites))
    return Passage({"": layout}, dict.fromkeys(sites, ("", "")), steps, {"": tuple(sites)})


def passage_of(model: nn.Module, sites: Sequence[str], layouts: Sequence[Layout]) -> Passage:
    """How tokens pass through a model in eval mode.

    Args:
        model: A model of images.
        sites: Names of its sites that are not left empty.
        layouts: How the keys of each mechanism were arranged; all alike, if it has one set of tokens.
    """
    if isinstance(model, DualTransformer):
        return _of_two_streams(model, sites)
    if isinstance(model, PyramidTransformer):
        return _of_stages(model, sites)
    cut = [layout.windows for layout in layouts if isinstance(layout, InWindows) and layout.windows]
    return _of_windows(sites, cut) if cut else one_line(sites, layouts[0])


def _of_two_streams(model: DualTransformer, sites: Sequence[str]) -> Passage:
    """In each layer both streams attend to themselves, then both to the other."""
    layouts = {"a": model.a.layout} | ({"b": model.b.layout} if model.b is not None else {})
    looks, groups, steps = {}, dict[str, tuple[str, ...]](), []
    for site in sites:
        own, _, kind = site.split(".")
        looks[site] = own, own if kind == "self" else "ab"["ba".index(own)]
        groups[f"{own}.{kind}"] = (*groups.get(f"{own}.{kind}", ()), site)
    for layer in range(len(model.blocks)):
        for kind in ("self", "cross"):
            here = tuple(f"{own}.{layer}.{kind}" for own in "ab" if f"{own}.{layer}.{kind}" in sites)
            if (
                here and looks[here[0]][1] in layouts
            ):  # of images in pairs there is no second one in eval mode
                name = here[0] if len(here) == 1 else f"*.{layer}.{kind}"
                steps.append(Step(name, layer, here, tuple(layouts)))
    layouts.setdefault("b", model.a.layout)
    return Passage(layouts, looks, tuple(steps), groups, frozenset() if model.reads_b else frozenset("b"))


def _of_stages(model: PyramidTransformer, sites: Sequence[str]) -> Passage:
    """Between stages tokens merge, as the convolution there weighs them."""
    layouts = {f"stages.{s}": layout for s, layout in enumerate(model.layouts)}
    looks, groups, steps, layer, unknown = {}, {}, list[Step](), 0, ""
    for s, (stage, stage_module) in enumerate(zip(layouts, model.stages, strict=True)):
        if steps:  # what came before the first site is how tokens come in
            conv = stage_module.merge
            if isinstance(conv, nn.Conv2d):
                merge = merged(conv, model.layouts[s - 1])
                steps.append(Step(f"{stage}.merge", layer, (), (stage,), merge))
            else:
                unknown = "where a deformable merge looks depends on the image"
        here = tuple(site for site in sites if site.startswith(f"{stage}."))
        if here:
            groups[stage] = here
        for site in here:
            looks[site] = stage, stage
            steps.append(Step(site, layer, (site,), (stage,)))
            layer += 1
    return Passage(layouts, looks, tuple(steps), groups, unknown=unknown)


def _of_windows(sites: Sequence[str], cut: Sequence[Windows]) -> Passage:
    """The stages of timm's Swin, each with a grid: `layers.0` of `layers.0.blocks.1`."""
    stages = {site: site.partition(".blocks.")[0] for site in sites}
    layouts = {stage: Layout(windows.grid) for stage, windows in zip(stages.values(), cut, strict=True)}
    groups = {own: tuple(site for site in sites if stages[site] == own) for own in layouts}
    steps = tuple(Step(site, i, (site,), (stages[site],)) for i, site in enumerate(sites))
    looks = {site: (stage, stage) for site, stage in stages.items()}
    merges = "between its stages four tokens become one, and how much each of them counts is not known"
    return Passage(layouts, looks, steps, groups, unknown=merges if len(layouts) > 1 else "")


@torch.no_grad()
def merged(conv: nn.Conv2d, layout: Layout) -> Float[Tensor, "n m"]:
    """How much of each token is in each token behind a convolution: its weights' norm there, ‖W_yx‖, rows divided by
    their sum; what lies outside the image does not count.

    Args:
        conv: Merges the tokens of a grid.
        layout: How they are arranged, without special tokens.
    """
    norms = conv.weight.detach().square().sum(dim=(0, 1)).sqrt()
    one_hot = torch.eye(layout.length, dtype=norms.dtype, device=norms.device).view(-1, 1, *layout.grid)
    rows = F.conv2d(one_hot, norms[None, None], stride=conv.stride, padding=conv.padding).flatten(1).T  # type: ignore[arg-type]
    return rows / rows.sum(dim=-1, keepdim=True)
