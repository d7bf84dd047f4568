"""Guidance by a perturbed forward, and the search for the heads whose perturbation guides best.

Ahn et al., "Fine-Grained Perturbation Guidance via Attention Head Selection", 2025, arXiv:2506.10978.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.core import Intervention
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding
from attnzoo.lab.intervening import intervene, intervention, reach
from attnzoo.lab.points import Leaf, chosen
from attnzoo.lab.subject import Batch, Subject

Objective = Callable[[Tensor, Batch], Tensor]
"""How good each answer to a batch is, (b,); more is better."""


def guided(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    *interventions: Intervention | str,
    weight: float = 1.0,
) -> Tensor:
    """What a model answers, moved away from what it answers when perturbed: z = (1 + w) z_orig − w z_pert.

        guided(model, images, SoftIdentity(at="blocks.3", heads=[0, 2]), weight=2.0)

    Args:
        model: A composed model, or one of timm's.
        inputs: What it is called with.
        interventions: The perturbation, as `intervene` takes it.
        weight: w; with 0 the answer is the model's own, bit for bit.

    Raises:
        ZooError: As `intervene`.
    """
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    plain = model(*inputs)
    with intervene(model, *interventions):
        return _guided(plain, model(*inputs) if weight else plain, weight)


def _guided(plain: Tensor, perturbed: Tensor, weight: float) -> Tensor:
    return (1 + weight) * plain - weight * perturbed if weight else plain


@dataclass(frozen=True, eq=False)
class Hunt:
    """What the search found.

    Args:
        finding: A row for each head and round: `score`, the mean objective with this head and those chosen before, and
            `chosen`. `figures` has the mean objective of the model as it is, and after each round.
        interventions: The perturbation of all chosen heads, for `intervene` and `guided`.
    """

    finding: Finding
    interventions: tuple[Intervention, ...]


@torch.no_grad()
def head_hunter(
    subject: Subject,
    objective: Objective,
    *,
    by: Intervention | str = "soft_identity",
    rounds: int = 1,
    top: int = 3,
    weight: float | None = 1.0,
) -> Hunt:
    """Greedy search for the heads whose perturbation helps most (HeadHunter).

    Each round scores every remaining head by the mean objective over all samples, with it and all heads chosen so far
    perturbed, and adds the best. That is a forward for each head, batch and round, and one of the model as it is.

        hunt = head_hunter(subject, lambda logits, batch: -logits.logsumexp(-1), rounds=5, top=3)
        guided(model, images, *hunt.interventions)

    Args:
        subject: The model, and the samples (in the paper pairs of a prompt and a seed, 20 of them).
        objective: How good each answer is.
        by: The perturbation; its `at`, `heads` and `branch` say which heads take part.
        rounds: R; 1 for quality in the paper, 5 for style.
        top: k, how many heads a round adds; 24 for quality in the paper, 3 for style.
        weight: w of the guidance, whose answer is judged; None judges the answer of the perturbed model itself.

    Returns:
        What was found.

    Raises:
        ZooError: AZ921, when rounds or heads are too many or none; AZ923, AZ924, as `intervene`.
    """
    one = intervention(by) if isinstance(by, str) else by
    heads = _heads(subject, one)
    if rounds < 1 or top < 1 or rounds * top > len(heads):
        raise ZooError(
            "AZ921",
            f"{rounds} rounds of {top} heads cannot be chosen from {len(heads)}",
            help="at least one round and one head, and no more than there are",
        )
    plain = [subject.call(batch) for batch in subject.batches]

    def score(perturbed: Iterable[tuple[Leaf, int]]) -> float:
        values = []
        with intervene(subject.model, *_perturbation(subject, one, perturbed)):
            for batch, own in zip(subject.batches, plain, strict=True):
                out = subject.call(batch)
                values.append(objective(out if weight is None else _guided(own, out, weight), batch).double())
        return float(torch.cat(values).mean())

    rows: list[dict[str, Any]] = []
    figures = {"as it is": score(())}
    taken: list[tuple[Leaf, int]] = []
    for turn in range(1, rounds + 1):
        scores = {head: score([*taken, head]) for head in heads if head not in taken}
        best = sorted(scores, key=lambda head: -scores[head])[:top]
        taken += best
        rows += [
            subject.about(*head) | {"round": turn, "score": value, "chosen": head in best}
            for head, value in scores.items()
        ]
        figures[f"after round {turn}"] = score(taken)
    finding = Finding.of(rows, shows="score", figures=figures)
    return Hunt(finding, tuple(_perturbation(subject, one, taken)))


def _heads(subject: Subject, one: Intervention) -> list[tuple[Leaf, int]]:
    """The heads that a perturbation can reach one by one."""
    names = {(leaf.site, leaf.branch) for leaf in reach(subject.model, one)}
    able = [leaf for leaf in chosen(subject.leaves, one.at, one.branch) if (leaf.site, leaf.branch) in names]
    return [
        (leaf, head)
        for leaf in able
        for head in range(leaf.heads)
        if head in (one.heads or range(leaf.heads))
    ]


def _perturbation(
    subject: Subject, one: Intervention, heads: Iterable[tuple[Leaf, int]]
) -> list[Intervention]:
    """An intervention for each site and branch, in the order of layers."""
    by_leaf: dict[Leaf, list[int]] = defaultdict(list)
    for leaf, head in heads:
        by_leaf[leaf].append(head)
    return [
        replace(one, at=leaf.site, branch=subject.about(leaf)["branch"] or None, heads=sorted(by_leaf[leaf]))
        for leaf in subject.leaves
        if leaf in by_leaf
    ]
