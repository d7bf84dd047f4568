"""Attention through the whole model.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, arXiv:2005.00928, §3. Discarding and the other
fusions of heads follow Gildenblat's vit-explain, with rows that are normalised as rows.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attnzoo.core.intervention import Here
from attnzoo.errors import ZooError
from attnzoo.lab.maps import Absent, Map, Maps, collect, look
from attnzoo.lab.points import Leaf
from attnzoo.lab.subject import Batch, Subject

HeadFusion = Literal["mean", "max", "min"]


def streams(subject: Subject) -> Iterator[tuple[Batch, Maps]]:
    """Every batch with the maps of the layers that its tokens pass through, one after the other. Of an encoder and
    decoder these are the encoder's.

    Args:
        subject: A model and its data.

    Raises:
        ZooError: AZ903, when the model has no maps; AZ924, when tokens of a layer look at others than those of the
            layer before, or merge in a way that is not known.
    """
    encoder = {name: module for name, module in subject.sites.items() if name.startswith("encoder.")}
    for batch in subject.batches:
        if subject.kind == "images":
            maps = collect(subject.model, batch.inputs[0], subject.given(batch))
        else:
            sites = encoder or subject.sites
            looked = look(subject.model, sites, batch.inputs)
            about = looked.maps, looked.absent, tuple(sites), looked.layouts[0], False, looked.output
            maps = Maps(*about)
        check_some(maps.maps, maps.absent)
        check_followed(f"`{subject.name}`", maps)
        yield batch, maps


def fuse_heads(weights: Float[Tensor, "b h n m"], fusion: HeadFusion = "mean") -> Float[Tensor, "b n m"]:
    """One map from those of all heads.

    Args:
        weights: (b h n m).
        fusion: Element-wise `mean`, `max` or `min` over heads.
    """
    if fusion == "mean":
        return weights.mean(dim=1)
    return weights.amax(dim=1) if fusion == "max" else weights.amin(dim=1)


def discard(weights: Float[Tensor, "b n m"], ratio: float) -> Float[Tensor, "b n m"]:
    """The smallest entries of each image's map set to 0; that of token 0 about itself is always kept.

    Args:
        weights: (b n m).
        ratio: Share of the entries to discard, from 0 to 1.
    """
    flat = weights.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * ratio), dim=1, largest=False).indices
    kept = flat.scatter(1, smallest, 0.0)
    return torch.cat([flat[:, :1], kept[:, 1:]], dim=1).view_as(weights)


def roll(layers: Sequence[Float[Tensor, "b n m"]]) -> Float[Tensor, "b n m"]:
    """R = Â_L … Â_1 with Â = (A + I) / 2, rows normalised to sum to 1; where tokens merge Â is A.

    Args:
        layers: A non-negative map for each layer, first layer first, (b n n); one that is not square merges tokens.
    """

    def hat(a: Tensor) -> Tensor:
        if a.shape[-2] != a.shape[-1]:
            return a
        a = a + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return a / a.sum(dim=-1, keepdim=True)

    return reduce(lambda below, a: hat(a) @ below, layers[1:], hat(layers[0]))


def layer_maps(maps: Maps, fusion: HeadFusion = "mean", ratio: float = 0.0) -> list[Float[Tensor, "b n m"]]:
    """One map for each step of the passage: heads fused in each branch, the branches that have maps averaged.

    Signed maps enter by their absolute values. A layer without any map enters as 0, so that only its residual counts.
    Where both streams attend at once, n counts the tokens of the one, then those of the other, and each site's map has
    its place among them. Where tokens merge it is how.

    Args:
        maps: From `collect`.
        fusion: How the heads of a branch are fused.
        ratio: Share of the smallest entries of each layer that is discarded; nothing of what merges tokens is.

    Raises:
        ZooError: AZ903, when no layer has a map.
    """
    check_some(maps.maps, maps.absent)
    passage, like, layers, b = maps.passage, maps.maps[0].weights, [], len(maps.logits)
    for step in passage.steps:
        if step.merge is not None:
            layers.append(step.merge.to(like).expand(b, -1, -1))
            continue
        places = passage.places(step)
        n = sum(passage.layouts[name].length for name in places)
        joint = like.new_zeros(b, n, n)
        for site in step.sites:
            asks, reads = passage.looks[site]
            here = [
                fuse_heads(found.matrix(passage.layouts[asks].length).abs(), fusion)
                for found in maps.maps
                if found.site == site
            ]
            if here:
                joint[:, places[asks], places[reads]] = torch.stack(here).mean(dim=0)
        layers.append(discard(joint, ratio))
    return layers


def graded(
    subject: Subject, batch: Batch, maps: Maps, to: Literal["predicted", "true"] = "predicted"
) -> Maps:
    """The maps with relu(mean_h(A ⊙ ∂y_c/∂A)) of each branch instead, (b 1 n n); y_c is the logit of a class.

    Maps that are implied, or products of several, have no gradient and are left out.

    Args:
        subject: A model that says classes.
        batch: What it is shown.
        maps: Its maps of this batch.
        to: Which class: what the model says, or what is true.

    Raises:
        ZooError: AZ924, when no map has a gradient; AZ926, when true classes are asked for and not known.
    """
    seen: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def edit(leaf: Leaf, weights: Tensor, here: Here) -> Tensor:
        added = torch.zeros_like(weights, requires_grad=True)  # so that frozen models have gradients too
        seen[leaf.site, leaf.branch] = weights.detach(), added
        return weights + added

    able = [leaf for leaf in subject.able("weights") if len(leaf.taps("weights")) == 1]
    with torch.enable_grad(), subject.editing("weights", edit, able):
        logits = subject.call(batch)
        classes = subject.targets(batch) if to == "true" else logits.argmax(dim=-1)
        answer = logits.gather(-1, classes[:, None]).sum()
        grads = torch.autograd.grad(answer, [added for _, added in seen.values()])
    found = {
        name: (weights * grad).mean(dim=1, keepdim=True).relu()
        for (name, (weights, _)), grad in zip(seen.items(), grads, strict=True)
    }
    kept = [one for one in maps.maps if (one.site, one.branch) in found]
    left = [one for one in maps.maps if (one.site, one.branch) not in found]
    return replace(
        maps,
        maps=tuple(replace(one, kind="weights", weights=found[one.site, one.branch]) for one in kept),
        absent=maps.absent
        + tuple(
            Absent(one.site, one.layer, one.branch, one.mechanism, "its map has no gradient") for one in left
        ),
    )


def rollout(
    maps: Maps, fusion: HeadFusion = "mean", ratio: float = 0.0, layer: int | None = None
) -> Float[Tensor, "b n n"]:
    """Attention rollout up to a layer; every row sums to 1.

    Args:
        maps: From `collect`.
        fusion: How the heads of a branch are fused.
        ratio: Share of the smallest entries of each layer that is discarded.
        layer: The last layer that counts, from 0; None for the whole model.

    Raises:
        ZooError: AZ903, when no layer has a map; AZ904, when there is no such layer.
    """
    check_layer(maps.passage.depth, layer)
    layers = layer_maps(maps, fusion, ratio)
    steps = zip(maps.passage.steps, layers, strict=True)
    return roll([each for step, each in steps if layer is None or step.layer <= layer])


def mean_map(
    maps: Maps, branch: str, layer: int | None = None, group: str | None = None
) -> Float[Tensor, "b *grid"]:
    """How much the answer looks at each grid token: the mean over layers and heads of one branch.

    Args:
        maps: From `collect`.
        branch: Name of the branch.
        layer: One layer only, from 0; None for the mean over all that have the branch. NaN where none has it.
        group: Which group of sites, whose maps lie on one grid; the first when None.
    """
    group = next(iter(maps.passage.groups)) if group is None else group
    return mean_at(maps, branch, set(maps.passage.groups[group]) & set(maps.passage.sites(layer)))


def mean_at(maps: Maps, branch: str, sites: Collection[str]) -> Float[Tensor, "b *grid"]:
    """How much the answer looks at each grid token at some sites whose maps lie on one grid; NaN where there is none.

    Args:
        maps: From `collect`.
        branch: Name of the branch.
        sites: Names of the sites.
    """
    here = [maps.on_grid(found) for found in maps.maps if found.branch == branch and found.site in sites]
    if not here:
        reads = maps.passage.looks[next(iter(sites))][1] if sites else next(iter(maps.passage.layouts))
        return torch.full((len(maps.logits), *maps.passage.layouts[reads].grid), torch.nan)
    return torch.cat(here, dim=1).mean(dim=1)


def check_some(maps: Sequence[Map], absent: Sequence[Absent]) -> None:
    """Refuse a model without any map.

    Args:
        maps: What there is.
        absent: The branches that have none, and why.

    Raises:
        ZooError: AZ903.
    """
    if not maps:
        reasons = dict.fromkeys(f"`{one.mechanism}`: {one.reason}" for one in absent)
        raise ZooError(
            "AZ903",
            "no mechanism of this model has an attention map",
            why="; ".join(reasons),
            help="`attnzoo show NAME` says whether a mechanism forms weights",
        )


def check_followed(name: str, maps: Maps) -> None:
    """Refuse maps that cannot be followed from layer to layer.

    Args:
        name: What the model is called in the message.
        maps: From `collect`.

    Raises:
        ZooError: AZ924, when tokens merge in a way that is not known, or a map is not of the tokens there are.
    """
    passage, why = maps.passage, maps.passage.unknown
    for found in maps.maps:
        asks, reads = (passage.layouts[tokens].length for tokens in passage.looks[found.site])
        if found.windows is None and found.weights.shape[2:] not in ((asks, reads), (reads,)):
            why = f"at `{found.site}` there are {found.weights.shape[-1]} keys, and {reads} tokens came in"
    if why:
        raise ZooError(
            "AZ924",
            f"the maps of {name} cannot be followed from layer to layer",
            why=why,
            help="`attnzoo heatmap --what mechanism` shows the map of each site",
        )


def check_layer(depth: int, layer: int | None) -> None:
    """Refuse a layer that does not exist.

    Args:
        depth: How many there are.
        layer: From 0; None is always right.

    Raises:
        ZooError: AZ904.
    """
    if layer is not None and not 0 <= layer < depth:
        raise ZooError(
            "AZ904", f"there is no layer {layer}; the model has {depth}", help=f"choose from 0 to {depth - 1}"
        )
