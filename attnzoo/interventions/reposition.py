"""Subjects brought to the same place before they attend.

He et al., "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition
Attention", 2024, arXiv:2411.19261.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import Here, InstrumentCard, Intervention, Paper
from attnzoo.errors import ZooError

Box = tuple[int, int, int, int]
"""Top, left, bottom, right, in tokens; the last two are just outside."""


@dataclass(kw_only=True, eq=False)
class Reposition(Intervention):
    """out = T⁻¹(attention(T(x))): T moves the subject of each sample into one common box, T⁻¹ moves it back.

    Tokens of a box are cut out of the grid, resized bilinearly to the largest box of the batch and put in its place,
    (b n c); what attention gives there is resized back and put into the box it came from. So attention that follows
    positions meets subjects of several samples at the same place; with `multi_reference` a target meets its
    references. What the common box covers in a sample gets what attention gives at that place.

    Args:
        boxes: Where the subject of each sample of the batch is: top, left, bottom, right, in tokens of the grid, the
            last two just outside. None leaves everything as it is.
    """

    card = InstrumentCard(
        "reposition",
        "Bring the subjects of a batch to the same place and size while they attend (reposition attention).",
        equation="out = T⁻¹(attention(T(x)))",
        paper=Paper(
            "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition "
            "Attention",
            "He et al.",
            2024,
            "arXiv:2411.19261",
            "reposition attention",
        ),
        fidelity="adapted",
        notes="Written after a summary of the paper: bilinear resizing, and the box of the largest area as the common "
        "one, are ours.",
    )
    neutral = {"boxes": None}
    own_keys = True
    boxes: Sequence[Sequence[int]] | None = None

    def edit_input(self, x: Tensor, here: Here) -> Tensor:
        boxes = self._boxes(x, here)
        common = max(boxes, key=_area)
        return self._moved(x, here, [(box, common) for box in boxes])

    def edit_output(self, out: Tensor, here: Here) -> Tensor:
        boxes = self._boxes(out, here)
        common = max(boxes, key=_area)
        return self._moved(out, here, [(common, box) for box in boxes])

    def _boxes(self, x: Tensor, here: Here) -> list[Box]:
        """The boxes, once it is certain that they fit."""
        boxes = self.boxes or ((0, 0, 1, 1),) * len(x)
        grid = here.layout.grid
        if len(grid) != 2 or len(boxes) != len(x):
            raise ZooError(
                "AZ921",
                f"`{self.card.name}`: {len(boxes)} boxes do not fit {len(x)} samples of {here.layout} tokens",
                why="each sample has one box, of tokens that lie on a grid of two axes",
            )
        for box in boxes:
            if len(box) != 4 or not (0 <= box[0] < box[2] <= grid[0] and 0 <= box[1] < box[3] <= grid[1]):
                raise ZooError(
                    "AZ921",
                    f"`{self.card.name}`: a box cannot be {list(box)!r}",
                    why=f"top, left, bottom, right lie on the grid of {grid[0]} × {grid[1]} tokens",
                )
        return [(box[0], box[1], box[2], box[3]) for box in boxes]

    def _moved(self, x: Tensor, here: Here, ways: list[tuple[Box, Box]]) -> Tensor:
        """Tokens (b n c) with each sample's box resized and put elsewhere; the same object where nothing moves."""
        if all(start == end for start, end in ways):
            return x
        prefix, grid = here.layout.split(x)
        image = here.layout.to_grid(grid).clone()  # (b c y x)
        for i, ((y0, x0, y1, x1), end) in enumerate(ways):
            if (y0, x0, y1, x1) != end:
                top, left, bottom, right = end
                cut, size = image[i, None, :, y0:y1, x0:x1].clone(), (bottom - top, right - left)
                image[i, :, top:bottom, left:right] = F.interpolate(cut, size=size, mode="bilinear")[0]
        return here.layout.from_grid(prefix, image)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
