"""Interventions, attached to a model for as long as a block runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from attnzoo.core import Intervention
from attnzoo.core.instrument import made, read_call
from attnzoo.core.intervention import Here
from attnzoo.errors import ZooError
from attnzoo.lab.points import Edit, Leaf, attach, chosen, leaves
from attnzoo.lab.timm_models import tapped
from attnzoo.zoo import load_zoo

OF_HEADS = ("scores", "weights", "heads")
"""Kinds of edits of tensors with an axis of heads, the second."""


def intervention(text: str) -> Intervention:
    """An intervention as it is written on the command line: `soft_identity(at="blocks.3", heads=[0, 2])`.

    Args:
        text: A name, with options in brackets.

    Raises:
        ZooError: AZ921, AZ922, what is wrong with it; AZ201, when there is none of this name.
    """
    name, options = read_call(text)
    return made(load_zoo().interventions.find(name).value, options)  # type: ignore[return-value]


@contextmanager
def intervene(model: nn.Module, *interventions: Intervention | str) -> Iterator[nn.Module]:
    """Change what happens inside a model while the block runs. It is as before afterwards, whatever happens.

        with attnzoo.intervene(model, SoftIdentity(at="blocks.3", heads=[0, 2], strength=0.5)):
            model(images)

    Several work in the order in which they are given, and blocks may stand in blocks. What an intervention cannot
    reach (scores, where a mechanism forms none) it leaves alone, as long as there is something that it can.

    Args:
        model: A composed model, or one of timm's.
        interventions: Each made, or written as on the command line.

    Raises:
        ZooError: AZ903, when there is no attention in the model; AZ921, AZ922, what is wrong with an intervention;
            AZ923, when it names what the model does not have; AZ924, when it can reach nothing.
    """
    with ExitStack() as stack:
        if interventions:
            stack.enter_context(tapped(model))
        for given in interventions:
            one = intervention(given) if isinstance(given, str) else given
            reached = reach(model, one)
            if not one.changes_nothing:
                stack.enter_context(attach(model, reached))
        yield model


def reach(model: nn.Module, one: Intervention) -> dict[Leaf, dict[str, Edit]]:
    """What an intervention edits in a model.

    Args:
        model: It.
        one: The intervention.

    Raises:
        ZooError: AZ903, AZ923, AZ924.
    """
    everywhere = leaves(model)
    there = chosen(everywhere, one.at, one.branch)
    for name in one.names():
        chosen(everywhere, name)
    if one.heads is not None and not set(one.points()) & set(OF_HEADS):
        raise ZooError(
            "AZ921",
            f"`{one.card.name}`: `heads` cannot be {one.heads!r}",
            why=f"it edits {' and '.join(one.points())}, where heads are merged",
            help="leave `heads` out",
        )
    if one.heads is not None:
        few = min(there, key=lambda leaf: leaf.heads)
        if strange := [head for head in one.heads if not 0 <= head < few.heads]:
            raise ZooError(
                "AZ923",
                f"`{few.site}` has no head {strange[0]}",
                help=f"it has {few.heads}, which count from 0; name sites with more in `at`",
            )
    reasons = {leaf: _obstacles(one, leaf) for leaf in there}
    if all(reasons.values()):
        raise ZooError(
            "AZ924",
            f"`{one.card.name}` can reach nothing at `{one.at}`",
            why="; ".join(dict.fromkeys(text for found in reasons.values() for text in found)),
            help="`attnzoo show NAME` says what a mechanism lets see",
        )
    once: set[tuple[str, nn.Module]] = set()  # branches of a site share what is around them
    found: dict[Leaf, dict[str, Edit]] = {}
    for leaf in (leaf for leaf, why in reasons.items() if not why):
        found[leaf] = {}
        able = [kind for kind in one.points() if not leaf.lacks(kind)]
        for kind in able[:1] if one.enough == "first" else able:
            around = {"input": leaf.outer, "output": leaf.outer, "mlp": leaf.mlp, "block": leaf.block}.get(
                kind
            )
            if around is not None and (kind, around) in once:
                continue
            if around is not None:
                once.add((kind, around))
            found[leaf][kind] = _of_chosen_heads(one, kind)
    return found


def _obstacles(one: Intervention, leaf: Leaf) -> list[str]:
    """Why an intervention cannot work at a leaf; empty when it can."""
    if one.own_keys and getattr(leaf.outer, "context_dim", None) is not None:
        return ["it speaks of tokens that attend to one another, and cross-attention reads another sequence"]
    if one.mechanisms and leaf.mechanism not in one.mechanisms:
        known = ", ".join(f"`{name}`" for name in sorted(one.mechanisms))
        return [f"it does the maths of {known} itself, and `{leaf.mechanism}` has another"]
    lacking = [text for kind in one.points() if (text := leaf.lacks(kind))]
    return [] if one.enough != "all" and len(lacking) < len(one.points()) else lacking


def _of_chosen_heads(one: Intervention, kind: str) -> Edit:
    """An edit that leaves the other heads as they are."""
    method = getattr(one, f"edit_{kind}")

    def edit(tensor: Tensor, here: Here) -> Tensor:
        changed = method(tensor, here)
        if kind not in OF_HEADS or one.heads is None:
            return changed
        kept = torch.zeros(tensor.shape[1], dtype=torch.bool, device=tensor.device)
        kept[list(one.heads)] = True
        return torch.where(kept[:, None, None], changed, tensor)

    return edit
