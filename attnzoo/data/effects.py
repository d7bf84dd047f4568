"""Steps that change pixels: resizing, RandAugment, normalisation, random erasing."""

import math
import random
from abc import ABC, abstractmethod
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from attnzoo.core import Fraction, PositiveFloat, PositiveInt
from attnzoo.data.chance import Chance, integers
from attnzoo.data.geometry import ATTEMPTS, Frame, Share, Size


class Effect(ABC):
    """A step that makes new images of images."""

    rank = 0

    @abstractmethod
    def __call__(self, images: Tensor, chance: Chance) -> Tensor:
        """The images after the step, (b c y x)."""


class Resize(Effect):
    """Bilinear with antialiasing, to a fixed size; nothing where the size is right.

    Args:
        size: Rows and columns; the model's when null.
    """

    def __init__(self, frame: Frame, *, size: Size | None = None):
        self.size = (size, size) if size else frame.image[1:]

    def __call__(self, images: Tensor, chance: Chance) -> Tensor:
        return fitted(images, self.size)


def fitted(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Images of a size in rows and columns: themselves, or float32 by bilinear interpolation with antialiasing."""
    if images.shape[-2:] == size:
        return images
    return torch.nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True)


class RandAugment(Effect):
    """timm's RandAugment with its increasing operations; Cubuk et al., arXiv:1909.13719.

    It works on one image at a time, on the CPU, and is by far the slowest step.

    Args:
        magnitude: Strength of the operations, from 0 to 10.
        num_ops: Operations per image.
        magnitude_std: Standard deviation of the strength.
    """

    def __init__(
        self,
        frame: Frame,
        *,
        magnitude: Annotated[int, Field(ge=0, le=10)] = 9,
        num_ops: PositiveInt = 2,
        magnitude_std: PositiveFloat = 0.5,
    ):
        from timm.data.auto_augment import rand_augment_transform

        grey = tuple(round(255 * mean) for mean in frame.mean)
        options = {"img_mean": grey, "translate_const": int(0.45 * min(frame.image[1:]))}
        self.transform = rand_augment_transform(
            f"rand-m{magnitude}-n{num_ops}-mstd{magnitude_std}-inc1", options
        )

    def __call__(self, images: Tensor, chance: Chance) -> Tensor:
        whole = images if images.dtype == torch.uint8 else images.round().clamp_(0, 255).to(torch.uint8)
        seeds = integers(chance.uniform(2), 2**16).tolist()
        states = random.getstate(), np.random.get_state()
        try:
            done = [self._one(p, s) for p, s in zip(whole.cpu().movedim(1, -1).numpy(), seeds, strict=True)]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        return torch.from_numpy(np.stack(done)).movedim(-1, 1).contiguous().to(images.device)

    def _one(self, image: np.ndarray, seed: list[int]) -> np.ndarray:
        random.seed(seed[0] << 16 | seed[1])
        np.random.seed(seed[0] << 16 | seed[1])
        return np.asarray(self.transform(Image.fromarray(image)))


class Normalise(Effect):
    """(pixel / 255 - mean) / std, in float32, after resizing to the model's size where that is needed."""

    rank = 1

    def __init__(self, frame: Frame):
        self.size = frame.image[1:]
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (frame.mean, frame.std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, images: Tensor, chance: Chance | None = None) -> Tensor:
        images = fitted(images, self.size)
        new = images.float() if images.dtype == torch.uint8 else images.clone()
        return new.mul_(self.scale.to(new.device)).add_(self.shift.to(new.device))


class RandomErasing(Effect):
    """A box is painted over, after normalisation; Zhong et al., arXiv:1708.04896, with timm's options.

    Args:
        p: Probability.
        area: Area of the box, from and to, as a share of the image's.
        aspect: Height over width of the box lies between this and its inverse.
        mode: What is painted: the mean (`const`), one normal colour (`rand`), or normal noise (`pixel`).
    """

    rank = 2

    def __init__(
        self,
        frame: Frame,
        *,
        p: Fraction = 0.25,
        area: Share = (0.02, 1 / 3),
        aspect: Annotated[float, Field(gt=0, le=1)] = 0.3,
        mode: Literal["const", "rand", "pixel"] = "const",
    ):
        self.p, self.area, self.log_aspect, self.mode = p, area, math.log(aspect), mode

    def __call__(self, images: Tensor, chance: Chance) -> Tensor:
        b, c, y, x = images.shape
        draw = chance.uniform(2 * ATTEMPTS + 3)
        area = (self.area[0] + draw[:, :ATTEMPTS] * (self.area[1] - self.area[0])) * (y * x)
        # square root of height over width
        half = ((2 * draw[:, ATTEMPTS:-3] - 1) * self.log_aspect / 2).exp()
        height, width = (area.sqrt() * half).round().long(), (area.sqrt() / half).round().long()
        fits = (height < y) & (width < x)
        first = fits.long().argmax(dim=1, keepdim=True)
        height, width = height.gather(1, first), width.gather(1, first)
        erased = (draw[:, -3:-2] < self.p) & fits.gather(1, first)
        top, left = integers(draw[:, -2:-1], y - height + 1), integers(draw[:, -1:], x - width + 1)
        box = inside(top, height, y)[:, :, None] & inside(left, width, x)[:, None, :] & erased[:, :, None]
        return torch.where(box[:, None], self._paint(images, chance), images)

    def _paint(self, images: Tensor, chance: Chance) -> Tensor:
        b, c, y, x = images.shape
        if self.mode == "const":
            return images.new_zeros(())
        if self.mode == "rand":
            return chance.normal(c).view(b, c, 1, 1)
        return chance.normal(c * y * x).view(b, c, y, x)


def inside(start: Tensor, length: Tensor, pixels: int) -> Tensor:
    """bool (b, pixels), which pixels of an axis lie in a box.

    Args:
        start: int64 (b, 1).
        length: int64 (b, 1).
        pixels: Of the axis.
    """
    at = torch.arange(pixels, device=start.device)
    return (at >= start) & (at < start + length)
