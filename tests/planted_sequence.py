"""A sequence model made by hand whose heads do what is known: one of each kind, exact up to a sharp softmax."""

import torch
from torch import Tensor, nn

from attnzoo.recipe import compose

WORDS, LENGTH = 12, 24
WIDTH = 36  # of each head
SHARP = 60.0

RECIPE = f"""
recipe: 1
name: by_hand
host: {{kind: sequence, vocab: {WORDS}, outputs: {WORDS}, max_length: {LENGTH}, dim: {2 * WIDTH}, mlp_dim: 0, layers: 2,
       positions: learned}}
heads: 2
attention: {{use: softmax}}
"""
PREVIOUS, DUPLICATE, NOTHING, INDUCTION = (0, 0), (0, 1), (1, 0), (1, 1)
"""Layer and head of each."""


def sequence(seed: int = 0) -> nn.Module:
    """A small sequence model, untrained, of two layers without MLPs: 12 words, 24 tokens, 2 × 2 heads of 36 channels.

    Args:
        seed: Of lively weights.
    """
    generator = torch.Generator().manual_seed(seed)
    model = compose(RECIPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    return model


def planted() -> nn.Module:
    """The same with an induction circuit.

    Channels 0–11 of a token say its word, 12–23 the word before (written by the head `PREVIOUS`), 24–47 its position.
    `DUPLICATE` looks at the same word elsewhere and writes nothing, `NOTHING` looks everywhere alike, `INDUCTION` looks
    where the word before is its own, and writes the word it finds there, which the output layer reads.
    """
    model = sequence()
    word, before, place = torch.eye(2 * WIDTH).split([WORDS, WORDS, 2 * WIDTH - 2 * WORDS])
    place, next_place = place[:LENGTH], place[:LENGTH].roll(1, 0)
    next_place[0] = 0
    first = place[:1].expand(WORDS, -1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.weight.copy_(word)
        model.positions.table.copy_(place)
        for norm in (model.norm, *(layer.around_attn.norm for layer in model.layers)):
            norm.weight.fill_(1.0)
        _fill(
            model.layers[0].attn, 0, place, next_place, word / 6, before
        )  # the norm made it 6 times as large
        same = torch.cat([word, place])
        _fill(model.layers[0].attn, 1, same, torch.cat([word, -2 * place]), word, 0 * word)
        # the first token has no word before it: attending to itself, the head below has written its own
        _fill(model.layers[1].attn, 1, word, before - 2 * first, word, word)
        model.head.weight.copy_(10 * word)
    return model


def _fill(attn: nn.Module, head: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Give one head its matrices, each by the rows of what it reads, or writes, in the tokens."""
    at = slice(WIDTH * head, WIDTH * (head + 1))
    q, k, v = (attn.qkv.weight[2 * WIDTH * part :][at] for part in range(3))
    q[: len(query)], k[: len(key)], v[: len(value)] = SHARP * query, key, value
    attn.proj.weight[:, at][:, : len(out)] = out.T


def twice(count: int = 8, seed: int = 0) -> Tensor:
    """Sequences of the twelve words in random order, each standing there twice, (b 24)."""
    generator = torch.Generator().manual_seed(seed)
    once = torch.rand(count, WORDS, generator=generator).argsort(dim=1)
    return once.repeat(1, 2)
