"""Where a component looks on a digit, head by head."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnzoo.gallery.network import DigitNetwork
from attnzoo.lab.maps import look
from attnzoo.plot.heat import attention_map
from attnzoo.plot.letters import cut
from attnzoo.plot.palette import GAP, MARGIN, PALE, SMALL, TEXT
from attnzoo.plot.picture import Picture

MOST_HEADS, PANEL = 4, 114
"""Heads that are drawn of each branch; side of a panel in pixels."""


@dataclass(frozen=True)
class Looks:
    """Heat maps of one component on one image.

    Args:
        image: The digit, 0 to 255, (1 y x).
        heads: Of each branch by its name: how much the tokens look at each token, the mean over those that look,
            (h y x).
        absent: Why branches have none, by name.
    """

    image: Tensor
    heads: dict[str, Float[Tensor, "h y x"]]
    absent: dict[str, str]


def maps(network: DigitNetwork, image: Float[Tensor, "1 1 y x"]) -> Looks:
    """What the heads look at, as `attnzoo.lab` reads it off taps.

    Args:
        network: With the component.
        image: A digit, standardised.
    """
    side = network.side
    looked = look(network, {"block": network.component.attn}, (image,))
    heads = {}
    for found in looked.maps:
        rows = (
            found.weights[0] if found.weights.ndim == 3 else found.weights[0, :, network.prefix :].mean(dim=1)
        )
        if network.prefix and found.weights.ndim == 4:
            rows = found.weights[0, :, 0]
        if rows.shape[-1] >= side**2:
            heads[found.branch] = rows[..., rows.shape[-1] - side**2 :].unflatten(-1, (side, side))
    spread = image[0] - image.min()
    absent = {one.branch: one.reason for one in looked.absent}
    return Looks((255 * spread / spread.max()).byte(), heads, absent)


def draw(found: Looks) -> Picture:
    """The digit and a map for each head, three panels in a row.

    Args:
        found: Has at least one branch with maps.
    """
    panels = [
        (f"{branch} {k}" if len(found.heads) > 1 else f"head {k}" if len(heads) > 1 else "all heads", heat)
        for branch, heads in found.heads.items()
        for k, heat in enumerate(heads[:MOST_HEADS])
    ]
    rows = -(-(len(panels) + 1) // 3)
    step = PANEL + 40
    picture = Picture(2 * MARGIN + 3 * PANEL + 2 * GAP, MARGIN + 18 + rows * step + 22)
    paper = 255 - found.image  # dark on white, as it is written
    for i, (title, heat) in enumerate([("the digit", None), *panels]):
        left, top = MARGIN + i % 3 * (PANEL + GAP), MARGIN + 18 + i // 3 * step
        axes = picture.panel(left, top, PANEL, PANEL)
        if heat is None:
            axes.imshow(paper[0].numpy(), cmap="gray", interpolation="nearest")
        else:
            attention_map(heat.float(), paper, axes, unit=1 / heat.numel())
        picture.write(left, top - 10, cut(title, PANEL, TEXT), TEXT)
    picture.write(
        MARGIN,
        picture.pixels[1] - 16,
        "below each: least to most, in even shares (1 = all alike)",
        SMALL,
        PALE,
    )
    return picture


def shown(network: DigitNetwork, image: Tensor) -> Looks:
    """`maps`, with the random state as it was, since some components draw.

    Args:
        network: With the component.
        image: A digit, standardised, (1 1 y x).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return maps(network, image)
