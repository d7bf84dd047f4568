"""What tests of probes and interventions share: small models, and subjects of them."""

import torch
from torch import Tensor, nn

from attnzoo.lab.subject import Subject
from attnzoo.recipe import compose

VIT = """
recipe: 1
name: small
extends: ham_classic
host: {{model: {{depth: {depth}, img_size: 16, num_classes: 5}}}}
attention: {attention}
"""


def vit(attention: str = "softmax", depth: int = 2, seed: int = 0) -> nn.Module:
    """A small ViT with lively weights: 16 × 16 images, 16 + 1 tokens, 4 heads of 12 channels, 5 classes."""
    model = compose(VIT.format(attention=attention, depth=depth)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def images(count: int = 6, seed: int = 1) -> Tensor:
    """(b 3 16 16)."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def subject(model: nn.Module, count: int = 6, **more) -> Subject:
    """Random images in two batches, with classes by turns."""
    return Subject.of(model, images(count), torch.arange(count) % 5, batch_size=-(-count // 2), **more)
