"""timm's vision transformer with mechanisms in its blocks."""

from collections.abc import Callable
from typing import Any

from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from attnzoo.core import Layout, Mechanism, Site


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
        self.attn = put(
            Site(
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
        )

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
