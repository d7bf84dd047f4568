"""Focal region loss: errors count for more in regions that are restored worse.

Yang et al., "Region Attention Transformer for Medical Image Restoration", MICCAI 2024.
"""

import torch
from torch import Tensor

from attnzoo.errors import MissingMap


def focal_region_loss(prediction: Tensor, target: Tensor, regions: Tensor, beta: float = 1.0) -> Tensor:
    """mean(e (1 + β w)), e = |prediction - target| and w the mean e of a pixel's region over the greatest of the batch.

    w is a weight and gets no gradient. Images without any error give 0.

    Args:
        prediction: Restored images (b c y x).
        target: What they should be, (b c y x).
        regions: Which region each pixel belongs to, whole numbers (b y x); a number means a region of its own in
            each image.
        beta: β, how much more the worst region counts.

    Raises:
        MissingMap: AZ409, when shapes do not agree or regions are not whole numbers.
    """
    b, _, y, x = prediction.shape
    if target.shape != prediction.shape or tuple(regions.shape) != (b, y, x) or regions.is_floating_point():
        raise MissingMap(
            "AZ409",
            f"a prediction {tuple(prediction.shape)}, a target {tuple(target.shape)} and regions "
            f"{tuple(regions.shape)} of {regions.dtype} do not go together",
            help=f"hand over a target of the prediction's shape and regions ({b}, {y}, {x}) of whole numbers",
        )
    error = (prediction - target).abs()
    wide = torch.promote_types(error.dtype, torch.float32)  # sums over a region stall in half precision
    of_pixel = error.detach().to(wide).mean(dim=1).flatten()  # (b y x), over the channels
    image = torch.arange(b, device=regions.device).repeat_interleave(y * x)
    _, region = torch.unique(torch.stack([image, regions.flatten()]), dim=1, return_inverse=True)
    count = torch.zeros_like(of_pixel).index_add(0, region, torch.ones_like(of_pixel)).clamp(min=1)
    mean = torch.zeros_like(of_pixel).index_add(0, region, of_pixel) / count
    worst = mean.max()
    weight = (mean / torch.where(worst > 0, worst, 1.0))[region].reshape(b, 1, y, x).to(error)
    return (error * (1 + beta * weight)).mean()
