"""Images to train on, and what is done to them: data sets, and augmentation by the batch.

data = load_images("digits")
augment = Augment(PAPER, image=data.image, mean=data.mean, std=data.std, classes=len(data.classes))
images, labels = data.train.batch(indices)
x, targets = augment(images, labels, step_seeds(seed, epoch, indices))
"""

from attnzoo.data.augment import PAPER, STEPS, Augment, Step, check_steps, evaluation
from attnzoo.data.chance import step_seeds
from attnzoo.data.images import ImageData, Images, Split
from attnzoo.data.load import DATASETS, check_images, load_images

__all__ = [
    "DATASETS",
    "PAPER",
    "STEPS",
    "Augment",
    "ImageData",
    "Images",
    "Split",
    "Step",
    "check_images",
    "check_steps",
    "evaluation",
    "load_images",
    "step_seeds",
]
