"""Images and their classes."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.core.card import Given
from attnzoo.data import Augment, ImageData, Step, evaluation, step_seeds
from attnzoo.hosts.dual import DualInfo
from attnzoo.hosts.given import stand_ins
from attnzoo.hosts.info import BackboneInfo
from attnzoo.recipe import Loaded, resolve
from attnzoo.recipe.schema import ImageHost
from attnzoo.train.metrics import Evaluation, tally
from attnzoo.train.settings import Settings, completed
from attnzoo.train.task import Inputs, Task


class ImageTask(Task):
    """Classification of images: cross-entropy per image, accuracy is the share that is recognised.

    Args:
        loaded: The recipe.
        settings: How to train.
        data: The images.

    Raises:
        DataError: AZ705, AZ706, what is wrong with the augmentation.
    """

    kind = "images"
    data: ImageData

    def __init__(self, loaded: Loaded, settings: Settings, data: ImageData):
        super().__init__(loaded, settings, data)
        host = cast(ImageHost, self.loaded.recipe.host)
        mean, std = host.mean or list(data.mean), host.std or list(data.std)
        steps = [Step.model_validate(step.model_dump(by_alias=True)) for step in settings.augment]
        self.augment = Augment(steps, image=data.image, mean=mean, std=std, classes=len(data.classes))
        self.evaluation = evaluation(data.image, mean, std)
        composition = resolve(self.loaded)
        streams = composition.info.inputs if isinstance(composition.info, DualInfo) else {}
        self.inputs: Mapping[str, Sequence[int] | Given] = {**streams, **composition.given}

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"the data hand over no `{name}`: "
            + (
                f"the brightness of the images{', in four steps,' if wanted == 'labels' else ''} stands for it"
                if isinstance(wanted, str)
                else f"the images themselves, averaged to {' × '.join(map(str, wanted))}, stand for it"
            )
            for name, wanted in self.inputs.items()
        )

    def fit(self, loaded: Loaded) -> Loaded:
        """The recipe with image size, classes and statistics of the data."""
        return fit(loaded, self.settings, self.data)

    def facts(self) -> dict[str, Any]:
        """`classes`: their names."""
        return {"classes": list(self.data.classes)}

    def prepare(self, epoch: int, indices: Tensor) -> tuple[Inputs, Tensor]:
        """Augmented images (b c y x); labels (b,) or shares of the classes (b classes)."""
        seeds = step_seeds(self.settings.seed, epoch, indices)
        images, targets = self.augment(*self.data.train.batch(indices), seeds)
        return (images,), targets

    def losses(self, model: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        """Cross-entropy of each image, (b,), in nats; with a method, what that minimises."""
        given, smoothing = stand_ins(inputs[0], self.inputs), self.settings.label_smoothing
        if self.settings.method is not None:
            return model(*inputs, targets=targets, label_smoothing=smoothing, **given)
        logits = model(*inputs, **given).float()
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)

    def tally(
        self, model: nn.Module, *, device: torch.device | str = "cpu", rank: int = 0, world: int = 1
    ) -> Tensor:
        """Images, hits and summed loss of each class, (classes 3)."""
        return tally(
            model,
            self.data.test,
            self.evaluation,
            len(self.data.classes),
            self.inputs,
            device=device,
            rank=rank,
            world=world,
        )

    def figures(self, tally: Tensor) -> dict[str, float]:
        """Mean cross-entropy, in nats, and accuracy."""
        found = Evaluation.of(tally, self.data.classes)
        return {"test_loss": found.loss, "test_accuracy": found.accuracy}


def fit(loaded: Loaded, settings: Settings, images: ImageData) -> Loaded:
    """The recipe with image size, classes and statistics of the data; what agrees already is left as it is.

    Args:
        loaded: The recipe.
        settings: Its statistics hold when these name the same data.
        images: What it is trained on.

    Returns:
        A recipe whose `train:` names the data alone, since the settings say the rest.
    """
    info, host = cast(BackboneInfo, resolve(loaded).info), cast(ImageHost, loaded.recipe.host)
    channels, rows, columns = images.image
    same = settings.data == loaded.recipe.train.data
    edits = []
    if info.image[1:] != (rows, columns):
        edits.append(f"host.model.img_size={rows if rows == columns else [rows, columns]}")
    if info.image[0] != channels:
        edits.append(f"host.model.in_chans={channels}")
    if info.classes != len(images.classes):
        edits.append(f"host.model.num_classes={len(images.classes)}")
    if host.mean is None or not same:
        edits.append(f"host.mean={list(images.mean)}")
    if host.std is None or not same:
        edits.append(f"host.std={list(images.std)}")
    return completed(loaded, settings, edits)
