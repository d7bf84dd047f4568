"""What interventions must know of a model before they are attached, found on data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import Intervention, Layout
from attnzoo.core.intervention import Here
from attnzoo.errors import ZooError
from attnzoo.functional.tokens import Tokens, chosen_tokens
from attnzoo.hosts.seq2seq import PAD
from attnzoo.lab.intervening import intervene
from attnzoo.lab.maps import Map, collect
from attnzoo.lab.points import Leaf, chosen
from attnzoo.lab.rollout import check_layer
from attnzoo.lab.subject import Batch, Subject
from attnzoo.zoo import load_zoo

STEMS = ("patch_embed", "tokenizer")
"""What hosts call the module that makes tokens of images, before positions are added."""


@torch.no_grad()
def sink_dims(subject: Subject, count: int = 2, at: str = "*") -> list[int]:
    """The channels in which single tokens are largest: those with the greatest |x_d| / RMS(x) of what enters a layer.

    For `redistribute_sink`: Kang et al., 2025, arXiv:2503.03321, §4, whose D_sink are two channels of each model.

    Args:
        subject: The model, and data to look at.
        count: How many channels.
        at: Names of sites, with `*`.

    Returns:
        The channels, the one with the greatest share first.

    Raises:
        ZooError: AZ923, when there is no such site; AZ924, when layers are not equally wide.
    """
    most: dict[Leaf, Tensor] = {}

    def note(leaf: Leaf, _out: Tensor, here: Here) -> None:
        x = here.context if here.tokens is None else here.tokens
        if x is not None and x.ndim == 3:
            # squares of what is large overflow in half precision
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            shares = (x.abs() / x.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)).amax(
                dim=(0, 1)
            )
            most[leaf] = torch.maximum(shares, most.get(leaf, shares))

    with subject.editing("output", note, chosen(subject.leaves, at)):
        for batch in subject.batches:
            subject.call(batch)
    if len({len(shares) for shares in most.values()}) != 1:
        raise ZooError(
            "AZ924",
            f"the layers of `{subject.name}` share no channels",
            why="they are not equally wide, or work on no tokens",
            help="name those of one width in `at`",
        )
    return torch.stack(list(most.values())).amax(dim=0).topk(count).indices.tolist()


def salient_tokens(
    model: nn.Module,
    images: Float[Tensor, "b c y x"],
    *,
    share: float = 0.25,
    spatial: float = 0.0,
    first: int = 0,
    last: int = -2,
) -> tuple[Bool[Tensor, "b m"], Bool[Tensor, "b m"]]:
    """The patches that an early layer looks at, and those that stand out in a late one, for `rebalance`.

        top, bottom = salient_tokens(model, images)
        with attnzoo.intervene(model, Rebalance(top=top, bottom=bottom)):
            model(images)

    Arif et al., 2025, arXiv:2501.12206, §3. The score of a patch is what the class token pays it, summed over heads
    (without a class token: the mean over all patches). `bottom` are the outliers of the late layer, with a score above
    Q3 + 1.5 (Q3 − Q1); `top` the greatest scores of the early layer that are none of them.

    Args:
        model: Of images on one grid.
        images: (b c y x).
        share: How many of the patches are `top`, from 0 to 1.
        spatial: How many join them for what all patches together pay them, mean over heads; 0 in the authors' code.
        first: The early layer, from 0.
        last: The late one, from 0, or from -1 backwards.

    Returns:
        `top` and `bottom`, over all tokens.

    Raises:
        ZooError: AZ903, when the model has no grid or no attention; AZ904, when there is no such layer; AZ924, when no
            map is formed in these layers.
    """
    maps = collect(model, images)
    if len(maps.passage.layouts) > 1:
        raise ZooError(
            "AZ903",
            "tokens of an early layer are told from those of a late one by their place on one grid",
            why=f"this model has several: {', '.join(f'{k} {v}' for k, v in maps.passage.layouts.items())}",
            help="take a model with one stream of tokens and no stages",
        )
    prefix, patches = maps.layout.prefix, maps.layout.length - maps.layout.prefix

    def of_layer(layer: int) -> Map:
        place = layer + len(maps.sites) if layer < 0 else layer
        check_layer(len(maps.sites), place)
        for one in maps.maps:
            if one.layer == place:
                return one
        raise ZooError(
            "AZ924",
            f"`{maps.sites[place]}` has no attention map",
            why="; ".join(one.reason for one in maps.absent if one.layer == place),
            help="name another layer",
        )

    def largest(scores: Tensor, part: float) -> Tensor:
        count = int(part * patches)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(
            -1, scores.topk(count, dim=-1).indices, True
        )

    early, late = of_layer(first), of_layer(last)
    grids, matrix = (maps.on_grid(early), maps.on_grid(late)), early.matrix(maps.layout.length)
    wide = torch.promote_types(matrix.dtype, torch.float32)  # there are no quantiles of half precision
    scores, outstanding = (grid.to(wide).sum(dim=1).flatten(1) for grid in grids)  # (b patches)
    received = matrix.to(wide).mean(dim=1)[:, prefix:, prefix:].sum(dim=1)
    quarters = outstanding.quantile(outstanding.new_tensor([0.25, 0.75]), dim=-1)
    bottom = outstanding > (quarters[1] + 1.5 * (quarters[1] - quarters[0]))[:, None]
    top = (largest(scores, share) | largest(received, spatial)) & ~bottom
    return F.pad(top, (prefix, 0)), F.pad(bottom, (prefix, 0))


@torch.no_grad()
def reinforced_heads(
    subject: Subject,
    *,
    at: str = "*",
    strength: float = 2.0,
    without: Literal["zero", "mean"] | Callable[[Batch], Batch] = "zero",
    queries: Tokens = "answer",
    outliers: bool = True,
) -> list[Intervention]:
    """The heads that look at the image, or at the source, layer by layer: those to be reinforced (VHR).

        chosen = reinforced_heads(subject)
        with attnzoo.intervene(model, *chosen): ...

    He et al., 2025, arXiv:2412.13949, §3 and §4: VHD_h = ‖o_h(with) − o_h(without)‖₂ over what a query receives,
    here the mean over queries and samples; those above the median of their layer are chosen. The heads of the layers
    before are reinforced already when a layer is looked at, in both runs.

    Args:
        subject: The model, and data to look at.
        at: Names of sites, with `*`.
        strength: α of the interventions.
        without: What stands for inputs without an image: patch embeddings that are `zero`, or their `mean` over the
            patches of each image, with the same positions; of pairs of sequences the source is padding alone. Or what
            makes such a batch of a batch.
        queries: Whose outputs count; the last token in the paper.
        outliers: Whether heads with VHD and ‖o_h(without)‖² above μ + σ of their layer (σ of all its heads) count as 0.

    Returns:
        A `reinforce_heads` for each layer and branch in which heads were chosen.

    Raises:
        ZooError: AZ923, when there is no such site; AZ924, when no mechanism works inside heads; AZ927, for sequences
            without a word on what is left of them.
    """
    reinforce: Any = load_zoo().interventions.find("reinforce_heads").value
    found: list[Intervention] = []
    able = subject.able("heads")
    for leaf in (leaf for leaf in chosen(subject.leaves, at) if leaf in able):
        with intervene(subject.model, *found):
            divergence, energy = _divergence(subject, leaf, without, queries)
        if outliers:
            strange = (divergence > _above(divergence)) & (energy > _above(energy))
            divergence = divergence.masked_fill(strange, 0.0)
        heads = (divergence > divergence.quantile(0.5)).nonzero().flatten().tolist()
        if heads:
            branch = subject.about(leaf)["branch"] or None
            found.append(reinforce(at=leaf.site, heads=heads, branch=branch, strength=strength))
    return found


def _above(values: Tensor) -> Tensor:
    """μ + σ."""
    return values.mean() + values.std(unbiased=False)


def _divergence(
    subject: Subject, leaf: Leaf, without: str | Callable[[Batch], Batch], queries: Tokens
) -> tuple[Tensor, Tensor]:
    """VHD of each head of a leaf, and ‖o_h(without)‖², (h,) each."""
    seen: list[Tensor] = []

    def note(_leaf: Leaf, out: Tensor, here: Here) -> None:
        n = out.shape[2]
        layout = here.layout if here.context is None else Layout((n,))
        seen.append(out[:, :, chosen_tokens(queries, layout, n, out.device)].double())

    with subject.editing("heads", note, [leaf]):
        for batch in subject.batches:
            subject.call(batch)
            if callable(without):
                subject.call(without(batch))
            else:
                with _blind(subject, without):
                    subject.call(_unread(subject, batch))
    pairs = list(zip(seen[::2], seen[1::2], strict=True))  # (b h n d) each
    norms = [(a - b).norm(dim=-1).movedim(1, -1).flatten(0, 1) for a, b in pairs]
    energies = [b.square().sum(dim=-1).movedim(1, -1).flatten(0, 1) for _, b in pairs]
    return torch.cat(norms).mean(dim=0), torch.cat(energies).mean(dim=0)


def _unread(subject: Subject, batch: Batch) -> Batch:
    """Pairs whose source is padding alone; images as they are."""
    if subject.kind == "images":
        return batch
    if subject.kind == "sequences":
        raise ZooError(
            "AZ927",
            "what a sequence is without the tokens in question is not known",
            help="hand over `without`, which makes such a batch of a batch",
        )
    source, *rest = batch.inputs
    return Batch((torch.full_like(source, PAD), *rest), batch.targets)


@contextmanager
def _blind(subject: Subject, fill: str) -> Iterator[None]:
    """Patch embeddings that say nothing, while the block runs."""
    stems = [part for name in STEMS if isinstance(part := getattr(subject.model, name, None), nn.Module)]
    if subject.kind != "images":
        yield
        return
    if not stems:
        raise ZooError(
            "AZ924",
            f"`{subject.name}` has no patch embedding that could be left out",
            help="hand over `without`, which makes a batch without the image of a batch",
        )

    def hook(_module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        if fill == "zero":
            return torch.zeros_like(out)
        return out.mean(dim=tuple(range(1, out.ndim - 1)), keepdim=True).expand_as(out)  # over (n) or (y x)

    handle = stems[0].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
