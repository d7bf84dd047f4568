"""The layers that sequence models are made of: norms, residuals, MLPs around sites."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Mlp, get_act_layer
from torch import Tensor, nn

from attnzoo.core import KVCache, Layout, Mask, Mechanism, MultiHead
from attnzoo.hosts.info import init_parts


class ScalarNorm(nn.Module):
    """γ (x - μ) / (σ + ε) + β with one γ and one β for all channels and the unbiased σ, as Deep Head's code has it.

    Args:
        dim: Channels; only for the signature that norms have.
        eps: ε.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        spread = x.std(dim=-1, keepdim=True) + self.eps
        return self.weight * (x - x.mean(dim=-1, keepdim=True)) / spread + self.bias


NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "scalar": ScalarNorm}
"""Norms by name."""


@dataclass(frozen=True)
class Body:
    """What all layers of a model share.

    Args:
        dim: Width of the tokens, in channels.
        mlp_dim: Hidden width of the MLPs; 0 for layers without.
        act: Name of the MLPs' activation, as timm knows it.
        dropout: Of what sublayers give and inside the MLPs, a probability.
        norm: Builds a norm for a width.
        norm_first: Whether sublayers see normalised tokens (pre-norm), or their sum with the tokens is normalised.
        bias: Whether Linear layers have biases.
    """

    dim: int
    mlp_dim: int
    act: str
    dropout: float
    norm: Callable[[int], nn.Module]
    norm_first: bool
    bias: bool

    def mlp(self) -> nn.Module | None:
        """An MLP, if layers have one."""
        if not self.mlp_dim:
            return None
        return Mlp(
            self.dim, self.mlp_dim, act_layer=get_act_layer(self.act), bias=self.bias, drop=self.dropout
        )


class Sublayer(nn.Module):
    """x + f(norm(x)), or norm(x + f(x)).

    Args:
        body: What all layers share.
    """

    def __init__(self, body: Body):
        super().__init__()
        self.norm, self.norm_first = body.norm(body.dim), body.norm_first

    def forward(self, x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        return x + inner(self.norm(x)) if self.norm_first else self.norm(x + inner(x))


class Layer(nn.Module):
    """Self-attention, attention to a context if there is one, MLP.

    Args:
        body: What all layers share.
        attn: What is put at the site of self-attention.
        cross: What is put at the site of attention to a context; None for none.
    """

    def __init__(self, body: Body, attn: Mechanism, cross: Mechanism | None = None):
        super().__init__()
        self.attn, self.around_attn = attn, Sublayer(body)
        self.attn_skip: nn.Module = nn.Identity()
        if cross is not None:
            self.cross, self.around_cross = cross, Sublayer(body)
            self.cross_skip: nn.Module = nn.Identity()
        mlp = body.mlp()
        if mlp is not None:
            self.mlp, self.around_mlp = mlp, Sublayer(body)
        self.skip: nn.Module = nn.Identity()

    def forward(
        self,
        x: Tensor,
        mask: Mask,
        layout: Layout,
        context: Tensor | None = None,
        context_mask: Mask | None = None,
        context_layout: Layout | None = None,
        caches: tuple[KVCache, KVCache] | None = None,
    ) -> Tensor:
        """Tokens (b n c) after the layer.

        Args:
            x: All tokens, or with `caches` the newest.
            mask: Of self-attention.
            layout: Of all tokens.
            context: What the cross-attention reads (b m e).
            context_mask: Its mask.
            context_layout: Its layout.
            caches: What self- and cross-attention kept of the tokens before.
        """

        def attend(tokens: Tensor) -> Tensor:
            if caches is None:
                return self.attn_skip(self.attn(tokens, mask=mask, layout=layout))
            return self.attn_skip(self.attn.step(tokens, caches[0], mask=mask, layout=layout))

        def read(tokens: Tensor) -> Tensor:
            where: dict[str, Any] = {"mask": context_mask, "layout": layout, "context_layout": context_layout}
            if caches is None:
                return self.cross_skip(self.cross(tokens, context, **where))
            return self.cross_skip(self.cross.step(tokens, caches[1], context, **where))

        x = self.around_attn(x, attend)
        if context is not None:
            x = self.around_cross(x, read)
        if hasattr(self, "mlp"):
            x = self.around_mlp(x, self.mlp)
        return self.skip(x)


@torch.no_grad()
def init_xavier(model: nn.Module) -> None:
    """Glorot's uniform initialisation of every projection on its own, biases 0, embeddings N(0, 1/c); components after.

    Args:
        model: A model of layers.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    for module in model.modules():
        if isinstance(module, MultiHead):  # queries, keys and values are one Linear, not one matrix
            stacked = module.qkv.weight.chunk(3) if module.context_dim is None else module.kv.weight.chunk(2)
            for matrix in stacked:
                nn.init.xavier_uniform_(matrix)
    init_parts(model)
