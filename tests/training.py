"""A tiny run for the tests of training: 40 images of 8 by 8, a block of width 16."""

import hashlib
from pathlib import Path

import torch

from attnzoo.data import ImageData, Images
from attnzoo.train import Run, Settings, train

RECIPE = """
recipe: 1
name: tiny
host:
  kind: vit
  base: vit_tiny_patch16_224
  model: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, num_classes: 4, proj_drop_rate: 0.1}
attention: {fuse: add, of: [softmax, soft]}
"""
AUGMENT = [{"use": "random_crop", "with": {"padding": 1}}, {"use": "mixup", "with": {"alpha": 0.2}}]
TINY = {"data": "synthetic", "epochs": 3, "batch_size": 12, "augment": AUGMENT, "device": "cpu"}
STEPS = 4
"""Per epoch; the last sees four images."""


def images(name: str = "synthetic", *, root=None, download=True, size=None, seed=0) -> ImageData:
    """Stands in for `load_images`: four classes that differ in brightness."""
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for count in (40, 20):
        labels = torch.arange(count) % 4
        noise = torch.randint(0, 50, (count, 3, 8, 8), generator=generator)
        splits.append(Images(labels, (noise + 50 * labels[:, None, None, None]).to(torch.uint8)))
    return ImageData(name, ("a", "b", "c", "d"), (0.4,) * 3, (0.25,) * 3, (3, 8, 8), *splits)


def settings(**changes) -> Settings:
    """Those of the tiny run, changed."""
    return Settings.model_validate(TINY | changes)


def tiny(folder: Path, report=None, **changes) -> Run:
    """Train it."""
    return train(RECIPE, settings(**changes), folder, report=report)


def last(folder: Path) -> Path:
    """Its newest checkpoint."""
    return max(folder.glob("step_*"))


def digest(folder: Path) -> str:
    """SHA-256 of the weights of the newest checkpoint."""
    return hashlib.sha256((last(folder) / "model.safetensors").read_bytes()).hexdigest()
