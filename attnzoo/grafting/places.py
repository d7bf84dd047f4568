"""Where in a graft the donor's tensors go: to the place where the same thing lives."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnzoo.core import Fused, Fusion
from attnzoo.grafting.ledger import Row

_ATTENTION = re.compile(r"(blocks\.\d+\.attn)\.(.+)")
_THIRDS = {name: name for name in ("q", "k", "v", "qk", "kv", "qkv")} | {f"{one}_proj": one for one in "qkv"}
"""What projections are called in the zoo and in timm: of queries, keys and values, side by side in this order."""


@dataclass(frozen=True)
class Origin:
    """What the donor has for a tensor of the graft.

    Args:
        names: Of the donor's tensors that it is made of.
        tensor: It.
    """

    names: tuple[str, ...]
    tensor: Tensor


def matched(donor: Mapping[str, Tensor], graft: nn.Module, pools: Mapping[str, str]) -> dict[str, Origin]:
    """What the donor has for tensors of the graft, by their names there.

    Equal names mean the same thing, since a host's tensors are called as timm calls them. Inside an attention:

    * Heads, fused or not, share the projections that timm's attention has, under timm's names.
    * What is fused on tokens has projections for each branch. All of them get the donor's: the branches beside the
      first enter through a γ that is 0, or as equals, and in both cases queries, keys and values of the donor say more
      than random ones. A branch that works on what another gives, as in a series, was never what the donor projected
      for: it gets none.
    * A mechanism with projections of its own gets those of the donor's rows that it has a place for. What it keeps in
      buffers was drawn by it, and stays.

    Args:
        donor: Its tensors.
        graft: The model, as it was built.
        pools: Beginnings of names in the graft, each with that of the donor's pool of the same class.
    """
    found = dict[str, Origin]()
    for name, own in graft.state_dict().items():
        for origin in _candidates(name, donor, graft, pools):
            if _squeezed(origin.tensor) == _squeezed(own):
                found[name] = origin
                break
    return found


def rows(
    donor: Mapping[str, Tensor], graft: Mapping[str, Tensor], found: Mapping[str, Origin]
) -> tuple[Row, ...]:
    """What became of every tensor: the donor's in their order, then the new ones.

    Args:
        donor: Its tensors.
        graft: Those of the graft.
        found: From `matched`.
    """
    ways: dict[str, list[Row]] = {name: [] for name in donor}
    for name, origin in found.items():
        for source in origin.names:
            alike = donor[source].shape == graft[name].shape and len(origin.names) == 1
            ways[source].append(
                Row(
                    kind="copied" if alike else "reshaped",
                    donor=source,
                    donor_shape=tuple(donor[source].shape),
                    graft=name,
                    graft_shape=tuple(graft[name].shape),
                )
            )
    for name, way in ways.items():
        if not way:
            way.append(Row(kind="dropped", donor=name, donor_shape=tuple(donor[name].shape)))
    new = [
        Row(kind="new", graft=name, graft_shape=tuple(own.shape))
        for name, own in graft.items()
        if name not in found
    ]
    return (*(row for way in ways.values() for row in way), *new)


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    """The shape without the axes of one entry at its end, which a convolution by single pixels has."""
    shape = list(tensor.shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _candidates(
    name: str, donor: Mapping[str, Tensor], graft: nn.Module, pools: Mapping[str, str]
) -> Iterator[Origin]:
    """What the donor may have for a tensor of the graft, the likeliest first."""
    if name in donor:
        yield Origin((name,), donor[name])
    for mine, theirs in pools.items():
        if name.startswith(mine) and (other := theirs + name.removeprefix(mine)) in donor:
            yield Origin((other,), donor[other])
    place = _ATTENTION.fullmatch(name)
    inner = place and _in_its_branch(graft.get_submodule(place[1]), place[2])
    if place is None or inner is None:
        return
    path = place[1]
    if (other := f"{path}.{inner}") in donor:
        yield Origin((other,), donor[other])
    layer, _, kind = inner.partition(".")
    if layer in _THIRDS and kind in ("weight", "bias"):
        thirds = [_third(donor, path, one, kind) for one in _THIRDS[layer]]
        if all(thirds):
            parts = cast(list[Origin], thirds)
            if names := tuple(dict.fromkeys(name for part in parts for name in part.names)):
                yield Origin(names, torch.cat([part.tensor for part in parts]))


def _in_its_branch(module: Any, name: str) -> str | None:
    """A tensor's name in the branch of fusions on tokens that it belongs to; None where it belongs to no branch, or to
    one that works on what another gives."""
    while isinstance(module, Fused):
        if not name.startswith("branches."):
            return None
        _, branch, name = name.split(".", 2)
        if type(cast(Fusion, module.fusion)).feed is not Fusion.feed and branch != next(
            iter(module.branches)
        ):
            return None
        module = module.branches[branch]
    return name


def _third(donor: Mapping[str, Tensor], path: str, one: str, kind: str) -> Origin | None:
    """The donor's weight or bias of the queries, keys or values alone."""
    fused = f"{path}.qkv.{kind}"
    if fused in donor and donor[fused].shape[0] % 3 == 0:
        return Origin((fused,), donor[fused].chunk(3)["qkv".index(one)])
    if (beside := f"{path}.q_bias") in donor and one == "k" and kind == "bias":
        return Origin((), torch.zeros_like(donor[beside]))  # biases of queries and values, and none of keys
    alone = f"{path}.{one}_proj.{kind}", f"{path}.{one}_{kind}"
    return next((Origin((name,), donor[name]) for name in alone if name in donor), None)
