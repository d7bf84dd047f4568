"""Who influences whom: |∂ output_i / ∂ token_j| of one component, at initialisation and trained on digits."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from torch import Tensor

from attnzoo.core import Fusion
from attnzoo.gallery.network import BRANCHES, DIM, DigitNetwork, digits, network_for, steps_for, train
from attnzoo.plot.letters import length
from attnzoo.plot.palette import GAP, HEAT, INK, MARGIN, MISSING, PALE, RULE, SMALL, TEXT
from attnzoo.plot.picture import Picture
from attnzoo.zoo import Entry

QUERIES = ((3, 3), (4, 8), (7, 7), (11, 9))
"""Rows and columns of the tokens that are asked about."""
SHOWN = 3
"""Which test image is drawn."""
RANGE = 1000.0
"""The least colour is that of the most influence divided by this; a token without any is grey."""
PANEL, WIDE = 68, 118
LEGEND = 42
"""How high the strip at the bottom is that says what colours mean."""
"""Side of a map in pixels, with several queries and with one."""


@dataclass(frozen=True)
class Influence:
    """The influence of every token on what a component gives to a few, before and after training.

    Args:
        name: Of the component.
        queries: Whose outputs: rows and columns on the grid, or a word, such as `class token`.
        first: ‖∂ output_i / ∂ token_j‖ (Frobenius) at initialisation, (q y x).
        trained: The same after training; None where it was not trained.
        image: The digit, 0 to 255, (y x).
        accuracy: Share of test images that the trained network names rightly.
        tested: Number of test images.
        steps: Steps of training.
        params: Number of parameters of the component, at 32 channels and 4 heads.
        reads: Whether tokens are those of a context.
        pools: Whether there is one output for all tokens.
        note: What must be said of it.
    """

    name: str
    queries: tuple[tuple[int, int] | str, ...]
    first: Float[Tensor, "q y x"]
    trained: Float[Tensor, "q y x"] | None
    image: Tensor
    accuracy: float | None
    tested: int
    steps: int
    params: int
    reads: bool
    pools: bool
    note: str = ""


def influence(entry: Entry, steps: int | None = None) -> tuple[Influence, DigitNetwork]:
    """Measure it in a network of one block, train that, measure it again.

    Args:
        entry: A mechanism, pool or fusion of the zoo.
        steps: Of training; 0 for none, None for as many as `steps_for` says.

    Returns:
        What was found, and the network as it is then.

    Raises:
        ZooError: What cannot be put into the network.
    """
    network = network_for(entry)
    steps = steps_for(network) if steps is None else steps
    test = digits(network.side)[1]
    shown = test.images[SHOWN : SHOWN + 1]
    queries: tuple[tuple[int, int] | str, ...] = QUERIES
    if network.pools:
        queries = ("all",)
    elif network.prefix:
        queries = ("class token", *QUERIES[1:])
    first = measured(network, shown, queries)
    accuracy = train(network, steps) if steps else None
    note = f"A fusion of {' and '.join(BRANCHES)}." if issubclass(entry.value, Fusion) else ""
    if network.reads:
        note = "The tokens are those of the context, the digit; the component's own are blank."
    spread = shown[0, 0] - shown.min()
    return Influence(
        name=entry.name,
        queries=queries,
        first=first,
        trained=measured(network, shown, queries) if steps else None,
        image=(255 * spread / spread.max()).byte(),
        accuracy=accuracy,
        tested=len(test),
        steps=steps,
        params=sum(p.numel() for p in network.component.parameters()),
        reads=network.reads,
        pools=network.pools,
        note=note,
    ), network


def measured(
    network: DigitNetwork, image: Tensor, queries: tuple[tuple[int, int] | str, ...]
) -> Float[Tensor, "q y x"]:
    """‖∂ output_i / ∂ token_j‖ of the component for one image; of a context, where there is one.

    Each of c copies of the image asks for one channel of the output, so one backward gives the whole Jacobian.

    Args:
        network: It; is left in eval mode.
        image: (1 1 y x).
        queries: Whose outputs.
    """
    network.eval()
    copies = image.expand(DIM, -1, -1, -1)
    with torch.no_grad():
        tokens, maps = network.takes(copies)
    *own, asked = (one.detach() for one in tokens)
    asked.requires_grad_(True)
    out = network.component(*own, asked, **maps)
    found = []
    for query in queries:
        row = out if network.pools else out[:, _index(network, query)]  # (c c)
        total = row.diagonal().sum()
        (slope,) = (
            torch.autograd.grad(total, asked, retain_graph=True)
            if total.requires_grad
            else (torch.zeros_like(asked),)
        )
        grid = slope[:, slope.shape[1] - network.side**2 :]
        found.append(grid.square().sum(dim=(0, 2)).sqrt().unflatten(0, (network.side, network.side)))
    return torch.stack(found)


def _index(network: DigitNetwork, query: tuple[int, int] | str) -> int:
    """Which token a query is."""
    if isinstance(query, str):
        return 0
    row, column = query
    return network.prefix + row * network.side + column


def draw(found: Influence) -> Picture:
    """The digit, and a map for each query: at initialisation above, trained below.

    Args:
        found: What was measured.
    """
    side = PANEL if len(found.queries) > 1 else WIDE
    blocks = [("at initialisation", found.first)]
    if found.trained is not None:
        said = f"trained: names {found.accuracy:.0%} of {found.tested} digits rightly"
        blocks.append((said, found.trained))
    columns = len(found.queries)
    together = columns == 1
    panels = 1 + (len(blocks) if together else columns)
    width = max(
        2 * MARGIN + panels * side + (panels - 1) * GAP, 2 * MARGIN + int(length(blocks[-1][0], TEXT)) + 4
    )
    rows = 1 if together else len(blocks)
    picture = Picture(width, MARGIN + rows * (side + 26) + 16 + LEGEND)
    for r, (said, maps) in enumerate(blocks):
        top = MARGIN + 20 + (0 if together else r * (side + 26))
        if not together or not r:
            words = "trained: " + said.partition(": ")[2] if together else said
            picture.write(MARGIN, top - 12, blocks[-1][0] if together else words, TEXT)
        if not r:
            axes = picture.panel(MARGIN, top, side, side)
            axes.imshow(found.image.numpy(), cmap="gray_r", interpolation="nearest")
            _frame(axes)
        for k, heat in enumerate(maps):
            left = MARGIN + (1 + (r if together else k)) * (side + GAP)
            query = found.queries[k]
            _map(picture.panel(left, top, side, side), heat, query)
    bottom = MARGIN + rows * (side + 26) + 4
    if together and len(blocks) > 1:
        picture.write(MARGIN + side + GAP, bottom + 2, "at initialisation", SMALL, PALE)
        picture.write(MARGIN + 2 * (side + GAP), bottom + 2, "trained", SMALL, PALE)
    _legend(picture, bottom + 24)
    return picture


def _frame(axes) -> None:
    axes.spines[:].set(visible=True, color=RULE, linewidth=0.6)


def _map(axes, heat: Tensor, query: tuple[int, int] | str | None) -> None:
    values = np.ma.masked_less_equal(heat.double().numpy(), 0.0)
    colours = colormaps[HEAT].with_extremes(bad=MISSING)
    most = float(values.max()) if values.count() else 1.0
    axes.imshow(values, cmap=colours, norm=LogNorm(most / RANGE, most, clip=True), interpolation="nearest")
    if isinstance(query, tuple):
        row, column = query
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#22d3ee", linewidth=1.2)
        )
    _frame(axes)


def _legend(picture: Picture, top: float) -> None:
    """The colours, and what grey says."""
    left = MARGIN + int(length("1/1000", SMALL)) + GAP
    picture.write(MARGIN, top, "1/1000", SMALL, INK)
    axes = picture.panel(left, top - 6, 90, 12)
    axes.imshow(np.linspace(0, 1, 128)[None], cmap=HEAT, aspect="auto")
    picture.write(left + 90 + GAP, top, "most of each map", SMALL, INK)
    after = left + 90 + 2 * GAP + int(length("most of each map", SMALL)) + GAP
    box = picture.panel(after, top - 6, 12, 12)
    box.set_facecolor(MISSING)
    _frame(box)
    picture.write(after + 12 + 6, top, "none", SMALL, INK)
