"""Attention through the whole model.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, arXiv:2005.00928, §3. Discarding and the other
fusions of heads follow Gildenblat's vit-explain, with rows that are normalised as rows.
"""

from collections.abc import Iterator, Sequence
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
        ZooError: AZ903, when the model has no maps, two streams, or stages; AZ924, when tokens of a layer look at
            others than those of the layer before.
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
        n = maps.layout.length
        for found in maps.maps:
            if found.weights.shape[2:] not in ((n, n), (n,)):
                raise ZooError(
                    "AZ924",
                    f"the maps of `{subject.name}` cannot be followed from layer to layer",
                    why=f"at `{found.site}` there are {found.weights.shape[-1]} keys, and {n} tokens came in",
                    help="`attnzoo.core.watch` shows the weights of every site",
                )
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


def roll(layers: Sequence[Float[Tensor, "b n n"]]) -> Float[Tensor, "b n n"]:
    """R = Â_L … Â_1 with Â = (A + I) / 2, rows normalised to sum to 1.

    Args:
        layers: A non-negative map for each layer, first layer first, (b n n).
    """

    def with_residual(a: Tensor) -> Tensor:
        a = a + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return a / a.sum(dim=-1, keepdim=True)

    return reduce(lambda below, a: with_residual(a) @ below, layers[1:], with_residual(layers[0]))


def layer_maps(maps: Maps, fusion: HeadFusion = "mean", ratio: float = 0.0) -> list[Float[Tensor, "b n n"]]:
    """One map per layer: heads fused in each branch, the branches that have maps averaged.

    Signed maps enter by their absolute values. A layer without any map enters as 0, so that only its residual counts.

    Args:
        maps: From `collect`.
        fusion: How the heads of a branch are fused.
        ratio: Share of the smallest entries of each layer that is discarded.

    Raises:
        ZooError: AZ903, when no layer has a map.
    """
    check_some(maps.maps, maps.absent)
    layers = []
    for layer in range(len(maps.sites)):
        here = [fuse_heads(found.matrix().abs(), fusion) for found in maps.maps if found.layer == layer]
        n, like = maps.layout.length, maps.maps[0].weights
        mean = torch.stack(here).mean(dim=0) if here else like.new_zeros(like.shape[0], n, n)
        layers.append(discard(mean, ratio))
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
    check_layer(len(maps.sites), layer)
    layers = layer_maps(maps, fusion, ratio)
    return roll(layers if layer is None else layers[: layer + 1])


def mean_map(maps: Maps, branch: str, layer: int | None = None) -> Float[Tensor, "b y x"]:
    """How much the answer looks at each grid token: the mean over layers and heads of one branch.

    Args:
        maps: From `collect`.
        branch: Name of the branch.
        layer: One layer only, from 0; None for the mean over all that have the branch. NaN where none has it.
    """
    here = [
        maps.on_grid(found)
        for found in maps.maps
        if found.branch == branch and (layer is None or found.layer == layer)
    ]
    if not here:
        return torch.full((len(maps.logits), *maps.layout.grid), torch.nan)
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
