"""timm's vision transformer with mechanisms in its blocks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.models import named_apply
from timm.models.deit import VisionTransformerDistilled  # noqa: F401 - of which `SitedModel` is for such a base
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer, get_init_weights_vit
from torch import Tensor, nn

from attnzoo.core import Layout, Mechanism, Pool, Site
from attnzoo.hosts.eva import put_into
from attnzoo.hosts.given import NO_MAPS
from attnzoo.hosts.info import undecayed
from attnzoo.hosts.rollout import install as install_rollout
from attnzoo.hosts.skip import Skip, install
from attnzoo.hosts.vision_transformer import (
    ZooDistilled,
    ZooPreNormBlock,
    ZooResPostBlock,
    ZooVisionTransformer,
)


def site_of(
    layout: Layout, layers: int, dim: int, num_heads: int, depth: int, said: Mapping[str, Any]
) -> Site:
    """The site in a block, as timm describes the block.

    Args:
        layout: How the tokens are arranged.
        layers: Number of blocks of the model.
        dim: Width of the tokens, in channels.
        num_heads: Number of heads.
        depth: Index of the block, from 0, as timm calls it.
        said: What else timm says of the block.
    """
    return Site(
        name=f"blocks.{depth}",
        dim=dim,
        heads=num_heads,
        layout=layout,
        layer=depth,
        depth=layers,
        attn_drop=said["attn_drop"],
        proj_drop=said["proj_drop"],
        qkv_bias=said["qkv_bias"],
        proj_bias=said["proj_bias"],
        qk_norm=said["qk_norm"],
        scale_norm=said["scale_attn_norm"],
        norm=said["norm_layer"],
    )


class SitedBlock(Block):
    """timm's block with a mechanism in the place of its attention.

    Args:
        put: Builds what is put at a site.
        layout: How the tokens are arranged.
        layers: Number of blocks of the model.
        dim: Width of the tokens, in channels.
        num_heads: Number of heads.
        depth: Index of the block, from 0, as timm calls it.
        said: What else timm says of the block.
    """

    def __init__(
        self,
        put: Callable[[Site], Mechanism],
        layout: Layout,
        layers: int,
        *,
        dim: int,
        num_heads: int,
        depth: int,
        **said: Any,
    ):
        super().__init__(dim, num_heads, depth=depth, **said | {"attn_layer": nn.Identity})
        self.layout = layout
        self.attn = put(site_of(layout, layers, dim, num_heads, depth, said))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("images have no masks here")
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), layout=self.layout)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SitedResPostBlock(SitedBlock, ResPostBlock):
    """The same of timm's block with norms after attention and MLP."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("images have no masks here")
        x = x + self.drop_path1(self.norm1(self.attn(x, layout=self.layout)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class SitedModel(VisionTransformer):
    """timm's model with mechanisms, whose parameters may be such that an optimiser must not decay them."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser must not decay."""
        return super().no_weight_decay() | undecayed(self)


OTHERS = (ZooDistilled, ZooResPostBlock)
"""Stand in the place of timm's usual model, and of its usual block, where a base has them."""


def composed(
    base: str,
    put: Callable[[Site], Mechanism],
    layout: Layout,
    layers: int,
    arguments: Mapping[str, Any],
    *,
    pool: Callable[[Site], Pool] | None = None,
    given: Mapping[str, str] = NO_MAPS,
    skip: Skip = Skip(),  # noqa: B008 - frozen
    dynamic: bool = False,
    drops: bool = False,
) -> nn.Module:
    """timm's model with mechanisms in its blocks, between which something may be handed on.

    Args:
        base: Name of timm's model.
        put: Builds what is put at a site.
        layout: How the tokens are arranged.
        layers: Number of blocks.
        arguments: Of timm's model.
        pool: Builds what makes one token of all.
        given: Maps that `forward` takes by name, of `labels` or `scores`.
        skip: What blocks hand on.
        dynamic: Whether images may have another size.
        drops: Whether patches are dropped in training.
    """
    sites: list[Site] = []

    def block_fn(*, dim: int, num_heads: int, depth: int, **said: Any) -> nn.Module:
        sites.append(site_of(layout, layers, dim, num_heads, depth, said))
        block = ZooPreNormBlock(dim, num_heads, depth=depth, **said | {"attn_layer": nn.Identity})
        block.seat(put(sites[-1]), depth, layout, dynamic=dynamic, drops=drops)
        return block

    if pool:
        arguments = {**arguments, "global_pool": ""}
    model: Any = timm.create_model(base, block_fn=block_fn, **arguments)
    model.__class__ = ZooVisionTransformer
    model.given = dict(given)
    if skip:
        blocks = [model.get_submodule(name) for name in skip.at]
        install(skip, [block.attn for block in blocks], blocks, model.embed_dim, sites[-1].norm)
        for block in model.blocks:
            block.carries = True
    if pool:
        component = pool(replace(sites[-1], name="pool"))
        mode = getattr(model, "weight_init_mode", "")
        named_apply(get_init_weights_vit(mode, needs_reset=False), component, "pool")
        model.pool, model.global_pool = component, "pool"
    return rolling(model)


def rolling(model: Any) -> nn.Module:
    """The model, whose blocks hand on the rollout where a component asks for it.

    Args:
        model: timm's, with mechanisms in its blocks.
    """
    count = install_rollout(
        [block.attn for block in model.blocks], [model.pool] if "pool" in model._modules else []
    )
    for block in model.blocks[:count]:
        block.carries = True
    return model


def composed_eva(
    base: str,
    put: Callable[[Site], Mechanism],
    layout: Layout,
    attention: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    *,
    pool: Callable[[Site], Pool] | None = None,
    given: Mapping[str, str] = NO_MAPS,
    skip: Skip = Skip(),  # noqa: B008 - frozen
    dynamic: bool = False,
    drops: bool = False,
) -> nn.Module:
    """timm's `Eva` with mechanisms in its blocks.

    Args:
        base: Name of timm's model.
        put: Builds what is put at a site.
        layout: How the tokens are arranged.
        attention: What the attention of each block is asked for, as `Site` says it.
        arguments: Of timm's model.
        pool: Builds what makes one token of all.
        given: Maps that `forward` takes by name, of `labels` or `scores`.
        skip: What blocks hand on.
        dynamic: Whether images may have another size.
        drops: Whether patches are dropped in training.
    """
    if pool:
        arguments = {**arguments, "global_pool": ""}
    model: Any = timm.create_model(base, **arguments)
    dim, heads = model.embed_dim, model.blocks[0].attn.num_heads
    sites = [
        Site(f"blocks.{layer}", dim, heads, layout, layer=layer, depth=len(attention), **asked)
        for layer, asked in enumerate(attention)
    ]
    put_into(model, lambda layer: put(sites[layer]), layout, dynamic=dynamic, drops=drops)
    model.given = dict(given)
    if skip:
        blocks = [model.get_submodule(name) for name in skip.at]
        install(skip, [block.attn for block in blocks], blocks, dim, sites[-1].norm)
        for block in model.blocks:
            block.carries = True
    if pool:
        component = pool(replace(sites[-1], name="pool", rotary=False, rotation=None))
        named_apply(get_init_weights_vit("", needs_reset=False), component, "pool")
        model.pool, model.global_pool = component, "pool"
    return rolling(model)
