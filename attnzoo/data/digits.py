"""scikit-learn's handwritten digits: 1797 grey images of 8 by 8 that come with the library."""

import torch

from attnzoo.data.images import ImageData, Images, held_out, resized, statistics
from attnzoo.errors import DataError

SPLIT_SEED = 0


def load_digits(size: int | None = None) -> ImageData:
    """Read them, in three equal channels; a fifth of every class, always the same, is tested on.

    Args:
        size: Rows and columns; 32 when null.

    Raises:
        DataError: AZ708 when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise DataError(
            "AZ708",
            "`digits` comes with scikit-learn, which is not installed",
            help="pip install scikit-learn",
        ) from error
    grey, target = bundled(return_X_y=True)  # (1797, 64), whole numbers from 0 to 16
    images = (torch.from_numpy(grey) * (255 / 16)).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    images = resized(images.expand(-1, 3, -1, -1), size or 32)
    labels = torch.from_numpy(target).long()
    test = held_out(labels, SPLIT_SEED)
    return ImageData(
        "digits",
        tuple("0123456789"),
        *statistics(images[~test]),
        (3, *images.shape[-2:]),
        Images(labels[~test], images[~test]),
        Images(labels[test], images[test]),
    )
