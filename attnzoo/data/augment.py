"""Augmentation of a whole batch at once, on the batch's device; without a seed's help nothing is random."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from attnzoo.core import options_of
from attnzoo.data.chance import Chance
from attnzoo.data.effects import Effect, Normalise, RandAugment, RandomErasing, Resize
from attnzoo.data.geometry import (
    Frame,
    Geometric,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    VerticalFlip,
    View,
)
from attnzoo.data.mixing import Cutmix, Mixer, Mixup, mixed
from attnzoo.errors import DataError, did_you_mean

STEPS: dict[str, type[Geometric] | type[Effect] | type[Mixer]] = {
    "random_crop": RandomCrop,
    "horizontal_flip": HorizontalFlip,
    "vertical_flip": VerticalFlip,
    "random_resized_crop": RandomResizedCrop,
    "resize": Resize,
    "rand_augment": RandAugment,
    "normalise": Normalise,
    "random_erasing": RandomErasing,
    "mixup": Mixup,
    "cutmix": Cutmix,
}
"""The steps by name, in an order in which they may stand."""


class Step(BaseModel):
    """One step, by name. A plain string is short for `{use: ...}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    use: str = Field(description="Name of a step.", min_length=1, max_length=130)
    with_: dict[str, Any] = Field(default_factory=dict, alias="with", description="Its options.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value


PAPER: tuple[Step, ...] = tuple(
    Step.model_validate(step)
    for step in (
        {"use": "random_crop", "with": {"padding": 4}},
        {"use": "horizontal_flip", "with": {"p": 0.5}},
        {"use": "random_resized_crop", "with": {"scale": [0.8, 1.0], "ratio": [0.75, 1.333]}},
        "resize",
        "normalise",
    )
)
"""Table 2 of Martínez-Marín et al., "Transformer Architecture Reconfiguration Using Heterogeneous Attention"."""


class Augment(nn.Module):
    """Steps, one after another, on batches of images.

    Steps on the image come first, then `normalise` (put in where it is missing), then `random_erasing`, then mixing.
    Images that the steps leave in another size are resized to the model's.

    Args:
        steps: What is done, in order.
        image: Channels, rows and columns that the model takes.
        mean: By channel, of 1.
        std: By channel, of 1.
        classes: Number of classes, for mixed targets.

    Raises:
        DataError: AZ705 for an unknown step, AZ706 for a wrong option, AZ707 for a wrong order.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        image: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        classes: int,
    ):
        super().__init__()
        frame = Frame(image, tuple(mean), tuple(std))
        for _, fault in check_steps(steps):
            raise fault
        made = [_made(step, frame) for step in steps]
        if not any(isinstance(step, Normalise) for step in made):
            made.insert(sum(step.rank == 0 for step in made), Normalise(frame))
        self.steps = [step for step in made if not isinstance(step, Mixer)]
        self.mixers = [step for step in made if isinstance(step, Mixer)]
        self.classes = classes

    def forward(self, images: Tensor, labels: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a batch; its images are not changed.

        Args:
            images: uint8 (b c y x).
            labels: int64 (b,).
            seeds: int64 (b,), one per image; the only source of randomness.

        Returns:
            float32 (b c y x), and the labels, or with mixing float32 (b classes), each row of which sums to 1.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images come as uint8, not {images.dtype}")
        seeds = seeds.to(images.device)
        view = View.of(images)
        for stream, step in enumerate(self.steps):
            chance = Chance(seeds, stream)
            if isinstance(step, Geometric):
                view = step(view, chance)
            else:
                view = View.of(step(view.show(), chance))
        done = view.show()
        if not self.mixers:
            return done, labels
        return mixed(done, labels, self.mixers, Chance(seeds, len(self.steps)), self.classes)


def evaluation(
    image: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """What images go through when nothing is random: resized where that is needed, and normalised.

    Args:
        image: Channels, rows and columns that the model takes.
        mean: By channel, of 1.
        std: By channel, of 1.

    Returns:
        A function from uint8 (b c y x) to float32 (b c y x).
    """
    return Normalise(Frame(image, tuple(mean), tuple(std)))


def check_steps(steps: Sequence[Step]) -> Iterator[tuple[tuple[int | str, ...], DataError]]:
    """What is wrong with steps, each fault with the way to its spot: `(2, "with", "padding")`.

    Args:
        steps: By name, in the order in which they shall be done.
    """
    for i, step in enumerate(steps):
        if step.use not in STEPS:
            help = did_you_mean(step.use, list(STEPS)) or f"the steps are {', '.join(STEPS)}"
            yield (i, "use"), DataError("AZ705", f"there is no augmentation step `{step.use}`", help=help)
            continue
        try:
            _options(step)
        except ValidationError as error:
            for fault in error.errors():
                yield (i, "with", str(fault["loc"][0])), _wrong_option(step, fault)
    known = [(i, step) for i, step in enumerate(steps) if step.use in STEPS]
    for (_, first), (i, second) in zip(known, known[1:], strict=False):
        if STEPS[first.use].rank > STEPS[second.use].rank or first.use == second.use == "normalise":
            yield (
                (i, "use"),
                DataError(
                    "AZ707",
                    f"`{second.use}` cannot come after `{first.use}`",
                    why="steps on the image come first, then normalise, then random_erasing, then mixup and cutmix",
                    help=f"put `{second.use}` earlier",
                ),
            )


def _options(step: Step) -> BaseModel:
    return options_of(STEPS[step.use]).model_validate(step.with_)


def _wrong_option(step: Step, fault: Any) -> DataError:
    name, known = str(fault["loc"][0]), list(options_of(STEPS[step.use]).model_fields)
    if fault["type"] == "extra_forbidden":
        text = f"`{step.use}` has no option `{name}`"
        listed = f"its options are {', '.join(known)}" if known else "it has none"
        return DataError("AZ706", text, help=did_you_mean(name, known) or listed)
    said = fault["msg"].replace("Input should", "it must").replace("valid integer", "whole number")
    said = f"{said[0].lower()}{said[1:]}".replace("valid ", "")
    return DataError(
        "AZ706", f"option `{name}` of `{step.use}`: {said}", help=f"see `{step.use}` in docs/data.md"
    )


def _made(step: Step, frame: Frame) -> Geometric | Effect | Mixer:
    checked = _options(step)
    return STEPS[step.use](frame, **{key: getattr(checked, key) for key in step.with_})  # type: ignore[call-arg]
