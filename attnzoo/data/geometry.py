"""Steps that say where pixels come from. They only move a window over the image; pixels are fetched once, at the end.

A window is, per axis and per image, `length` source pixels from `start`, perhaps mirrored, shown on `out` pixels. A
crop and a flip of a window are windows, and so is a resized crop of them: CIFAR's crop, flip and resized crop cost one
`grid_sample`, crop and flip alone one `gather`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import AfterValidator, Field, Strict
from torch import Tensor

from attnzoo.core import Fraction, NonNegativeInt, PositiveFloat
from attnzoo.data.chance import Chance, integers
from attnzoo.errors import DataError

ATTEMPTS = 10
WHOLE, MIRRORED, CROPPED, RESAMPLED = range(4)


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the first number must not be above the second")
    return pair


Size = Annotated[int, Field(ge=1, le=4096)]
"""Rows and columns, in pixels."""
Share = Annotated[tuple[Fraction, Fraction], Strict(False), AfterValidator(_ordered)]
"""From and to, shares of an area."""
Ratio = Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False), AfterValidator(_ordered)]
"""From and to, width over height."""


@dataclass(frozen=True)
class Frame:
    """What the model expects.

    Args:
        image: Channels, rows, columns.
        mean: By channel, of 1.
        std: By channel, of 1.
    """

    image: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Span:
    """A window along one axis, per image.

    Args:
        start: int64 (b,), first source pixel; pixels outside of the image are 0.
        length: int64 (b,), source pixels.
        mirrored: bool (b,), whether they are shown backwards.
        out: Pixels that they are shown on.
    """

    start: Tensor
    length: Tensor
    mirrored: Tensor
    out: int

    @classmethod
    def whole(cls, pixels: int, like: Tensor) -> "Span":
        """All pixels of an axis, for as many images as `like` has rows."""
        start = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        return cls(start, start + pixels, start.bool(), pixels)

    def mirror(self, where: Tensor) -> "Span":
        """Shown the other way round for some images, bool (b,)."""
        return replace(self, mirrored=self.mirrored ^ where)

    def part(self, offset: Tensor, length: Tensor, out: int) -> "Span":
        """Of what is shown, `length` pixels from `offset`, shown on `out`; for windows that are not resampled."""
        start = self.start + torch.where(self.mirrored, self.length - offset - length, offset)
        return replace(self, start=start, length=length, out=out)

    def pixels(self) -> Tensor:
        """int64 (b, out), the source pixel of each shown one; for windows that are not resampled."""
        k = torch.arange(self.out, device=self.start.device)
        return self.start[:, None] + torch.where(self.mirrored[:, None], self.out - 1 - k, k)

    def positions(self, pixels: int) -> Tensor:
        """float32 (b, out), where each shown pixel lies: -1 and 1 are the edges of the source's `pixels`.

        Positions stop half a pixel before the window's edges, where an image that was cut out would end.
        """
        length = self.length[:, None].float()
        k = (torch.arange(self.out, device=self.start.device) + 0.5) * (length / self.out)
        k = torch.minimum(k.clamp_(min=0.5), length - 0.5)
        k = torch.where(self.mirrored[:, None], length - k, k)
        return (self.start[:, None] + k) * (2 / pixels) - 1


@dataclass(frozen=True)
class View:
    """Images, and a window over each.

    Args:
        images: uint8 or float32 (b c y x).
        rows: The window's rows.
        columns: The window's columns.
        state: The most that was done: WHOLE, MIRRORED, CROPPED, RESAMPLED.
    """

    images: Tensor
    rows: Span
    columns: Span
    state: int = WHOLE

    @classmethod
    def of(cls, images: Tensor) -> "View":
        """All of each image."""
        return cls(images, Span.whole(images.shape[2], images), Span.whole(images.shape[3], images))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that are shown."""
        return self.rows.out, self.columns.out

    def show(self) -> Tensor:
        """Fetch the pixels: exact copies, or float32 by bilinear interpolation where a window is resampled."""
        b, c, y, x = self.images.shape
        if self.state == WHOLE:
            return self.images
        if self.state == RESAMPLED:
            rows, columns = self.rows.positions(y)[:, :, None], self.columns.positions(x)[:, None, :]
            grid = torch.stack(torch.broadcast_tensors(columns, rows), dim=-1)
            return torch.nn.functional.grid_sample(self.images.float(), grid, align_corners=False)
        rows, columns = self.rows.pixels()[:, :, None], self.columns.pixels()[:, None, :]
        source = (rows.clamp(0, y - 1) * x + columns.clamp(0, x - 1)).view(b, 1, -1).expand(-1, c, -1)
        inside = (rows >= 0) & (rows < y) & (columns >= 0) & (columns < x)
        return self.images.flatten(2).gather(2, source).view(b, c, *self.shape) * inside[:, None]


class Geometric(ABC):
    """A step that moves the window.

    `accepts` is the most that may have been done to a window before it; pixels are fetched first where more was.
    """

    rank = 0
    accepts: int

    def __call__(self, view: View, chance: Chance) -> View:
        return self.move(view if view.state <= self.accepts else View.of(view.show()), chance)

    @abstractmethod
    def move(self, view: View, chance: Chance) -> View:
        """The view after the step."""


class HorizontalFlip(Geometric):
    """Left and right change places.

    Args:
        p: Probability.
    """

    accepts = RESAMPLED

    def __init__(self, frame: Frame, *, p: Fraction = 0.5):
        self.p = p

    def move(self, view: View, chance: Chance) -> View:
        columns = view.columns.mirror(chance.happens(self.p))
        return replace(view, columns=columns, state=max(view.state, MIRRORED))


class VerticalFlip(Geometric):
    """Top and bottom change places.

    Args:
        p: Probability.
    """

    accepts = RESAMPLED

    def __init__(self, frame: Frame, *, p: Fraction = 0.5):
        self.p = p

    def move(self, view: View, chance: Chance) -> View:
        rows = view.rows.mirror(chance.happens(self.p))
        return replace(view, rows=rows, state=max(view.state, MIRRORED))


class RandomCrop(Geometric):
    """A square out of the image, framed in black first.

    Args:
        padding: Width of the black frame, in pixels.
        size: Rows and columns of the square; the model's when null.
    """

    accepts = MIRRORED

    def __init__(self, frame: Frame, *, padding: NonNegativeInt = 4, size: Size | None = None):
        self.padding, self.size = padding, (size, size) if size else frame.image[1:]

    def move(self, view: View, chance: Chance) -> View:
        draw, spans = chance.uniform(2), []
        for axis, span in enumerate((view.rows, view.columns)):
            room = span.out + 2 * self.padding - self.size[axis]
            if room < 0:
                text = (
                    f"images of {view.shape[0]}x{view.shape[1]} with {self.padding} pixels around them are "
                )
                text += f"smaller than the {self.size[0]}x{self.size[1]} that `random_crop` cuts out"
                raise DataError(
                    "AZ706", text, help="give more `padding` or a smaller `size`, or `resize` first"
                )
            offset = integers(draw[:, axis], room + 1) - self.padding
            spans.append(span.part(offset, torch.full_like(offset, self.size[axis]), self.size[axis]))
        return replace(view, rows=spans[0], columns=spans[1], state=CROPPED)


class RandomResizedCrop(Geometric):
    """A box of random area and shape, resized by bilinear interpolation without antialiasing.

    As in Szegedy et al., arXiv:1409.4842, and torchvision: ten attempts, then the middle.

    Args:
        scale: Area of the box, from and to, as a share of the image's.
        ratio: Width over height of the box, from and to.
        size: Rows and columns that the box is resized to; the model's when null.
    """

    accepts = CROPPED

    def __init__(
        self,
        frame: Frame,
        *,
        scale: Share = (0.08, 1.0),
        ratio: Ratio = (3 / 4, 4 / 3),
        size: Size | None = None,
    ):
        self.scale, self.ratio, self.size = scale, ratio, (size, size) if size else frame.image[1:]

    def move(self, view: View, chance: Chance) -> View:
        draw = chance.uniform(2 * ATTEMPTS + 2)
        height, width = self.box(view.shape, draw[:, :ATTEMPTS], draw[:, ATTEMPTS:-2])
        y, x = view.shape
        fallback_y, fallback_x = self.middle(view.shape)
        found = height > 0
        top = torch.where(found, integers(draw[:, -2], y - height + 1), (y - fallback_y) // 2)
        left = torch.where(found, integers(draw[:, -1], x - width + 1), (x - fallback_x) // 2)
        height, width = height.where(found, fallback_y), width.where(found, fallback_x)
        rows = view.rows.part(top, height, self.size[0])
        columns = view.columns.part(left, width, self.size[1])
        return replace(view, rows=rows, columns=columns, state=RESAMPLED)

    def box(self, shape: tuple[int, int], area: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width, int64 (b,), of the first attempt that fits; 0 where none does.

        Args:
            shape: Rows and columns of the image.
            area: Uniform numbers (b, attempts).
            ratio: Uniform numbers (b, attempts).
        """
        low, high = (math.log(edge) for edge in self.ratio)
        pixels = (self.scale[0] + area * (self.scale[1] - self.scale[0])) * (shape[0] * shape[1])
        half = ((low + ratio * (high - low)) / 2).exp()  # square root of width over height
        side = pixels.sqrt()
        height, width = (side / half).round().long(), (side * half).round().long()
        fits = (height > 0) & (height <= shape[0]) & (width > 0) & (width <= shape[1])
        first = fits.long().argmax(dim=1, keepdim=True)
        return (height * fits).gather(1, first)[:, 0], (width * fits).gather(1, first)[:, 0]

    def middle(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the largest box of an allowed shape."""
        y, x = shape
        if x / y < self.ratio[0]:
            return round(x / self.ratio[0]), x
        if x / y > self.ratio[1]:
            return y, round(y * self.ratio[1])
        return y, x
