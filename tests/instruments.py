"""What tests of probes and interventions share: small models, and subjects of them."""

import copy
from functools import cache

import torch
from torch import Tensor, nn

from attnzoo.core import watch
from attnzoo.lab.intervening import intervene
from attnzoo.lab.subject import Subject
from attnzoo.recipe import compose

VIT = """
recipe: 1
name: small
extends: ham_classic
host: {{model: {{depth: {depth}, img_size: 16, num_classes: 5}}}}
attention: {attention}
"""

PAIRS = """
recipe: 1
name: small_pairs
extends: transformer
host: {{dim: 32, mlp_dim: 64, layers: 2, vocab: 20, max_length: 16}}
heads: 4
attention: {attention}
"""


def pairs(attention: str = "softmax", seed: int = 0) -> nn.Module:
    """A small encoder and decoder: 2 + 2 layers, 4 heads of 8 channels, 20 words, 16 tokens."""
    generator, model = torch.Generator().manual_seed(seed), compose(PAIRS.format(attention=attention)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def sentences() -> tuple[Tensor, Tensor]:
    """A source (2 5) and a target (2 4), with padding, which is 0."""
    return torch.tensor([[5, 6, 7, 8, 2], [9, 6, 2, 0, 0]]), torch.tensor([[1, 11, 12, 13], [1, 14, 15, 0]])


def vit(attention: str = "softmax", depth: int = 2, seed: int = 0) -> nn.Module:
    """A small ViT with lively weights: 16 × 16 images, 16 + 1 tokens, 4 heads of 12 channels, 5 classes."""
    return copy.deepcopy(_built(attention, depth, seed))


@cache
def _built(attention: str, depth: int, seed: int) -> nn.Module:
    """What `vit` gives copies of."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
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


def passing(
    model: nn.Module, kind: str, *interventions, inputs: tuple[Tensor, ...] | None = None
) -> tuple[list[Tensor], Tensor]:
    """What the taps of a kind let through while these interventions are attached, and what the model answers."""
    seen: list[Tensor] = []
    with torch.no_grad(), intervene(model, *interventions), watch(model, kind, lambda _, x: seen.append(x)):
        out = model(*(inputs or (images(),)))
    return seen, out
