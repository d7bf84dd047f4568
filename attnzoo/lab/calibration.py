"""What interventions must know of a model before they are attached, found on data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.core import Intervention, Layout
from attnzoo.core.intervention import Here
from attnzoo.errors import ZooError
from attnzoo.functional.tokens import Tokens, chosen_tokens
from attnzoo.hosts.seq2seq import PAD
from attnzoo.lab.intervening import intervene
from attnzoo.lab.points import Leaf, chosen
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
    reinforce = load_zoo().interventions.find("reinforce_heads").value
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
