"""What the stages of a `pyramid` model are made of: norms, the halving of the grid, MLPs, blocks."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from timm.layers import ConvNormAct, DropPath, LayerScale, Mlp
from timm.models.fastvit import MobileOneBlock
from torch import Tensor, fx, nn
from torchvision.ops import deform_conv2d

from attnzoo.core import Layout
from attnzoo.core.multi_group import MultiGroup


class BatchNorm(nn.Module):
    """Batch norm of tokens (b n c): of each channel, over all tokens of all images.

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).unflatten(0, (-1, x.shape[1]))


class GroupNorm(nn.Module):
    """Group norm of tokens (b n c): of each image, over all tokens and channels.

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": lambda dim: nn.LayerNorm(dim, eps=1e-6),
    "group": GroupNorm,
    "batch": BatchNorm,
    "none": lambda dim: nn.Identity(),
}
"""Norms of tokens by name: of each token; of each image, all tokens and channels; of each channel, over the batch."""


class OnGrid(nn.Sequential):
    """Layers for maps (b c y x), one after the other, between tokens (b n c).

    Args:
        layout: How the tokens are arranged.
        layers: What they go through.
    """

    def __init__(self, layout: Layout, *layers: nn.Module):
        super().__init__(*layers)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.layout.to_grid(x)).flatten(2).transpose(1, 2)


def deformed(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torchvision's deformable convolution with stride 2, a leaf for symbolic tracing; its kernels take no bfloat16."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_, offset, weight, bias = (t.to(wide) for t in (x, offset, weight, bias))
    autocasts = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocasts else nullcontext():
        return deform_conv2d(x_, offset, weight, bias, stride=(2, 2)).to(x.dtype)


fx.wrap("deformed")


class DeformableMerge(nn.Module):
    """A 2 × 2 convolution with stride 2 that looks where a second one tells it to; batch norm, GELU.

    Pan et al., "Less is More: Pay Less Attention in Vision Transformers", 2022, arXiv:2105.14217, §3.3. At first the
    offsets are 0. What lies outside the image is 0.

    Args:
        dim: Channels before.
        out: Channels after.
    """

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 2, 2)
        self.offset = nn.Conv2d(dim, 2 * 4, 2, 2)
        self.norm, self.act = nn.BatchNorm2d(out), nn.GELU()

    def init_weights(self) -> None:
        """Offsets of 0."""
        nn.init.zeros_(self.offset.weight)
        if self.offset.bias is not None:
            nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b o y/2 x/2) of maps (b c y x)."""
        conv = self.conv
        assert conv.bias is not None
        return self.act(self.norm(deformed(x, self.offset(x), conv.weight, conv.bias)))


def make_stem(kind: str, in_chans: int, dim: int, patch: int, hidden: int) -> nn.Module:
    """What makes the first map of images: (b c y x) -> (b dim y/patch x/patch).

    Args:
        kind: `patch` for patches that do not overlap; `overlap` for those of 2 · patch - 1 pixels; `conv` for 3 × 3
            convolutions that halve the sides until they are those of the patches.
        in_chans: Channels of the images.
        dim: Channels of the map.
        patch: Side of the patches, in pixels; a power of two for `conv`.
        hidden: Channels between the convolutions of `conv`.

    Raises:
        ValueError: When `patch` is no power of two from 2 on for `conv`.
    """
    if kind == "patch":
        return nn.Conv2d(in_chans, dim, patch, patch)
    if kind == "overlap":
        return nn.Conv2d(in_chans, dim, 2 * patch - 1, patch, patch - 1)
    if patch < 2 or patch.bit_count() > 1:
        raise ValueError(f"convolutions that halve the image make no patches of {patch} × {patch} pixels")
    layers: list[nn.Module] = []
    for _ in range(patch.bit_length() - 2):
        layers += [nn.Conv2d(in_chans, hidden, 3, 2, 1), nn.GroupNorm(1, hidden, eps=1e-6), nn.SiLU()]
        in_chans = hidden
    return nn.Sequential(*layers, nn.Conv2d(in_chans, dim, 3, 2, 1))


def make_merge(kind: str, dim: int, out: int) -> nn.Module:
    """What halves the sides of a map between stages: (b dim y x) -> (b out y/2 x/2).

    Args:
        kind: `patch` for a 2 × 2 convolution, `overlap` for a 3 × 3 one, `deformable`.
        dim: Channels before.
        out: Channels after.
    """
    if kind == "deformable":
        return DeformableMerge(dim, out)
    return nn.Conv2d(dim, out, 2, 2) if kind == "patch" else nn.Conv2d(dim, out, 3, 2, 1)


def make_mlp(kind: str, dim: int, hidden: int, layout: Layout, drop: float) -> nn.Module:
    """The MLP of a block, of tokens (b n c).

    Args:
        kind: `plain`; `depthwise`, with a 3 × 3 convolution of each channel before the GELU, as PVT v2 and VAN;
            `inverted`, with one between two SiLUs and its own norms at both ends, as HAT-Net; `multi_group`, whose
            layers are sums of grouped ones and fold into one, as FMViT.
        dim: Channels.
        hidden: Channels between.
        layout: How the tokens are arranged.
        drop: Dropout.
    """
    if kind == "plain":
        return Mlp(dim, hidden, drop=drop)
    if kind == "multi_group":
        most = math.gcd(4, dim, hidden)
        first, last = (MultiGroup(i, o, most, i == o, True) for i, o in ((dim, hidden), (hidden, dim)))
        return nn.Sequential(first, nn.GELU(), nn.Dropout(drop), last, nn.Dropout(drop))
    if kind == "depthwise":
        return OnGrid(
            layout,
            nn.Conv2d(dim, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.GELU(),
            nn.Dropout(drop),
            nn.Conv2d(hidden, dim, 1),
            nn.Dropout(drop),
        )
    return OnGrid(
        layout,
        nn.GroupNorm(1, dim, eps=1e-6),
        nn.Conv2d(dim, hidden, 1, bias=False),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
        nn.SiLU(),
        nn.Dropout(drop),
        nn.Conv2d(hidden, dim, 1, bias=False),
        nn.GroupNorm(1, dim, eps=1e-6),
        nn.Dropout(drop),
    )


def conv_fusion(dim: int) -> nn.Module:
    """FMViT's CFB: a grouped 3 × 3 convolution that folds with its 1 × 1 and identity branches, ReLU, 1 × 1.

    Tan et al., "FMViT: A multiple-frequency mixing Vision Transformer", 2023, arXiv:2311.05707. timm's
    `reparameterize_model` folds it.

    Args:
        dim: Channels.
    """
    conv = MobileOneBlock(dim, dim, 3, group_size=math.gcd(32, dim), act_layer=nn.ReLU)
    return nn.Sequential(conv, nn.Conv2d(dim, dim, 1))


class Block(nn.Module):
    """Sublayers with a norm and a residual each: a depthwise convolution, attention, an MLP, as far as there are any.

    Args:
        dim: Channels.
        layout: How the tokens are arranged.
        attn: What is put at the site; None where it is left empty.
        conv: Whether there is a depthwise 3 × 3 convolution, as in SHViT.
        mlp: The MLP; None for none.
        norm: Builds the norms before attention and MLP.
        init_values: What the scales of these two start with; None for no scales.
        drop_path: Share of images that skip them in training.
    """

    def __init__(
        self,
        dim: int,
        layout: Layout,
        attn: nn.Module | None,
        conv: bool,
        mlp: nn.Module | None,
        norm: Callable[[int], nn.Module],
        init_values: float | None,
        drop_path: float,
    ):
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if init_values is None else LayerScale(dim, init_values)

        self.layout = layout
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.attn, self.mlp = attn, mlp
        if conv:
            self.conv = OnGrid(layout, ConvNormAct(dim, dim, 3, groups=dim, apply_act=False))
        if attn is not None:
            self.norm1, self.ls1 = norm(dim), scale()
        if mlp is not None:
            self.norm2, self.ls2 = norm(dim), scale()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b n c) after the block."""
        if hasattr(self, "conv"):
            x = x + self.conv(x)
        if self.attn is not None:
            x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), layout=self.layout)))
        if self.mlp is not None:
            x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x


class Bottleneck(nn.Module):
    """ReLU(x + up(ReLU(norm(attention(down(x)))))): a residual block of convolutions with attention as its middle.

    Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", 2021, arXiv:2103.12731,
    §2.3, after He et al. Norms are over the batch. Where the site is left empty, its middle is a 3 × 3 convolution.

    Args:
        dim: Channels.
        inner: Channels of the middle.
        layout: How the tokens are arranged.
        attn: What is put at the site, of the inner channels; None where it is left empty.
        drop_path: Share of images that skip it in training.
    """

    def __init__(self, dim: int, inner: int, layout: Layout, attn: nn.Module | None, drop_path: float):
        super().__init__()
        self.layout, self.attn = layout, attn
        if attn is None:
            self.conv = OnGrid(layout, nn.Conv2d(inner, inner, 3, padding=1, bias=False))
        self.down = OnGrid(layout, ConvNormAct(dim, inner, 1))
        self.norm = NORMS["batch"](inner)
        self.up = OnGrid(layout, ConvNormAct(inner, dim, 1, apply_act=False))
        self.act, self.drop_path = nn.ReLU(), DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b n c) after the block."""
        middle = self.down(x)
        middle = self.conv(middle) if self.attn is None else self.attn(middle, layout=self.layout)
        return self.act(x + self.drop_path(self.up(self.act(self.norm(middle)))))


class FrequencyBlock(nn.Module):
    """FMViT's FMB: attention makes the low frequencies, a share of the channels, convolutions of these the high ones.

        a = P x;  a ← a + attention(norm a);  b = Q a;  b ← b + CFB(b);  y = [a; b];  y ← y + MLP(norm y)

    Tan et al., "FMViT: A multiple-frequency mixing Vision Transformer", 2023, arXiv:2311.05707. Where the site is left
    empty, all channels are of the second kind: x ← x + CFB(x), then the MLP.

    Args:
        dim: Channels.
        inner: Channels of the low frequencies.
        layout: How the tokens are arranged.
        attn: What is put at the site, of the inner channels; None where it is left empty.
        mlp: The MLP; None for none.
        norm: Builds the norms before attention and MLP.
        drop_path: Share of images that skip attention, convolutions and MLP in training.
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        layout: Layout,
        attn: nn.Module | None,
        mlp: nn.Module | None,
        norm: Callable[[int], nn.Module],
        drop_path: float,
    ):
        super().__init__()
        high = dim if attn is None else dim - inner
        self.layout, self.attn, self.mlp = layout, attn, mlp
        if attn is not None:
            self.low, self.high, self.norm1 = nn.Linear(dim, inner), nn.Linear(inner, high), norm(inner)
        self.fusion = OnGrid(layout, conv_fusion(high))
        if mlp is not None:
            self.norm2 = norm(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b n c) after the block."""
        if self.attn is None:
            x = x + self.drop_path(self.fusion(x))
        else:
            a = self.low(x)
            a = a + self.drop_path(self.attn(self.norm1(a), layout=self.layout))
            b = self.high(a)
            x = torch.cat([a, b + self.drop_path(self.fusion(b))], dim=-1)
        return x if self.mlp is None else x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A map of one size: what makes it of the one before, then blocks.

    Args:
        merge: Makes the map (b c y x).
        norm: Of its tokens.
        layout: How they are arranged.
        positions: Whether each place has a learnt vector of its own, which is added.
        dim: Channels.
        blocks: What the tokens go through.
        repeats: How often they go through all of them.
        end: The norm after the blocks.
    """

    def __init__(
        self,
        merge: nn.Module,
        norm: nn.Module,
        layout: Layout,
        positions: bool,
        dim: int,
        blocks: list[nn.Module],
        repeats: int,
        end: nn.Module,
    ):
        super().__init__()
        self.layout, self.repeats = layout, repeats
        self.merge, self.norm = merge, norm
        if positions:
            self.pos_embed = nn.Parameter(torch.empty(1, layout.length, dim))
        self.blocks, self.end = nn.Sequential(*blocks), end

    def no_weight_decay(self) -> set[str]:
        """Positions, as with timm's models."""
        return {"pos_embed"} if hasattr(self, "pos_embed") else set()

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (b n c) of the map before, or of images, (b c y x)."""
        x = self.norm(self.merge(x).flatten(2).transpose(1, 2))
        return x + self.pos_embed if hasattr(self, "pos_embed") else x
