"""The Compact Convolutional Transformer: convolutions make the tokens, attention mixes them, a learnt mean pools them.

Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers", 2021, arXiv:2104.05704, §3. Where the text
is silent (no bias in the projections to queries, keys and values; the residual of the MLP taken after its norm; all
rates), the authors' code is followed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, ConvNormAct, DropPath, Mlp, resample_abs_pos_embed, trunc_normal_
from timm.models import PretrainedCfg, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from attnzoo.core import Layout, Pool, Site
from attnzoo.core.card import Given
from attnzoo.core.component import NOTHING
from attnzoo.hosts.backbone import (
    Backbone,
    base_arguments,
    build_backbone,
    check_format,
    init_linear,
    with_heads,
)
from attnzoo.hosts.given import NO_MAPS, named, on_grid, without_unknown
from attnzoo.hosts.info import (
    POOL,
    BackboneInfo,
    Put,
    PutPool,
    init_parts,
    on_meta,
    without_weights,
)

default_cfgs: dict[str, Any] = {}
"""timm looks here for the configurations of the models that are registered from this module."""

BASES: dict[str, dict[str, Any]] = {
    "cct_2_3x2": {"depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128, "n_conv_layers": 2},
    "cct_4_3x2": {"depth": 4, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128, "n_conv_layers": 2},
    "cct_6_3x1": {"depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256, "n_conv_layers": 1},
    "cct_7_3x1": {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256, "n_conv_layers": 1},
}
"""The authors' sizes for small images, `cct_<blocks>_<kernel>x<convolutions>`."""


class ConvTokenizer(nn.Sequential):
    """n × [convolution, ReLU, max pooling]; the cells of the last map are the tokens.

    Args:
        img_size: Rows and columns of the image.
        in_chans: Channels of the image.
        dim: Width of the tokens, in channels.
        n_conv_layers: How many convolutions.
        kernel_size: Their side; strides and padding follow from it.
        hidden: Channels between the convolutions.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        in_chans: int,
        dim: int,
        n_conv_layers: int = 1,
        kernel_size: int = 3,
        hidden: int = 64,
    ):
        super().__init__()
        stride, padding = max(1, kernel_size // 2 - 1), max(1, kernel_size // 2)
        widths = [in_chans, *[hidden] * (n_conv_layers - 1), dim]
        grid = img_size
        for i in range(n_conv_layers):
            conv = nn.Conv2d(widths[i], widths[i + 1], kernel_size, stride, padding, bias=False)
            self.append(nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3, 2, 1)))
            rows, columns = ((side + 2 * padding - kernel_size) // stride + 1 for side in grid)
            grid = ((rows - 1) // 2 + 1, (columns - 1) // 2 + 1)
        self.img_size, self.grid = img_size, grid
        self.reduction = (2 * stride) ** n_conv_layers

    def init_weights(self) -> None:
        """He initialisation."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[2] == self.img_size[0], "the image has another number of rows")
        torch._assert(x.shape[3] == self.img_size[1], "the image has another number of columns")
        return super().forward(x).flatten(2).transpose(1, 2)


class PlainAttention(Attention):
    """timm's attention, called as a mechanism is."""

    def forward(self, x: Tensor, *, layout: Layout, given: Mapping[str, Tensor] = NOTHING) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def put_plain(site: Site) -> nn.Module:
    """Attention as it was before any zoo."""
    return PlainAttention(
        site.dim, site.heads, qkv_bias=site.qkv_bias, attn_drop=site.attn_drop, proj_drop=site.proj_drop
    )


class CompactBlock(nn.Module):
    """Attention and MLP. The second residual is that of the *normalised* tokens.

    Args:
        site: Where the attention is.
        attn: What is put there.
        mlp_ratio: Width of the MLP, in widths of the tokens.
        drop_path: Share of images that skip a branch in training.
    """

    def __init__(self, site: Site, attn: nn.Module, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.layout = site.layout
        self.norm1 = nn.LayerNorm(site.dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(site.dim)
        self.mlp = Mlp(site.dim, int(site.dim * mlp_ratio), drop=site.proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, given: Mapping[str, Tensor] = NOTHING) -> Tensor:
        """Tokens (b n c) after the block.

        Args:
            x: (b n c).
            given: Maps on the grid by name, (b gy gx) each.
        """
        x = self.norm2(x + self.drop_path(self.attn(self.norm1(x), layout=self.layout, given=given)))
        return x + self.drop_path(self.mlp(x))


class ConvBlock(nn.Module):
    """x + ReLU(BatchNorm(Conv3x3(x))) on the token grid, in the place of a block with attention.

    Args:
        dim: Width of the tokens, in channels.
        layout: Their grid.
    """

    def __init__(self, dim: int, layout: Layout):
        super().__init__()
        self.layout = layout
        self.conv = ConvNormAct(dim, dim, 3)

    def init_weights(self) -> None:
        """He initialisation."""
        nn.init.kaiming_normal_(self.conv.conv.weight)

    def forward(self, x: Tensor, given: Mapping[str, Tensor] = NOTHING) -> Tensor:
        return x + self.conv(self.layout.to_grid(x)).flatten(2).transpose(1, 2)


class SequencePool(nn.Module):
    """Σ wₙ xₙ with w = softmax over the tokens of a score of each.

    Args:
        dim: Width of the tokens, in channels.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def weights(self, x: Tensor) -> Tensor:
        """What each token counts, (b n 1)."""
        return self.score(x).softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weights(x) * x).sum(dim=1)


def sine_positions(length: int, dim: int) -> Tensor:
    """Fixed positions (1 n c): sines in the even channels, cosines in the odd ones, wavelengths up to 10 000 · 2π."""
    channel = torch.arange(dim)
    angles = torch.arange(length)[:, None] / 10_000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos())[None]


class CompactTransformer(Backbone):
    """A Compact Convolutional Transformer, CCT-7/3×1 for CIFAR-100 if nothing else is said.

    Args:
        img_size: Side of the image, or rows and columns.
        in_chans: Channels of the image.
        num_classes: 0 for features.
        global_pool: `seq`, `pool` for the component that `pool` builds, or nothing for all tokens.
        embed_dim: Width of the tokens, in channels.
        depth: Number of blocks.
        num_heads: Heads of each.
        mlp_ratio: Width of their MLPs, in widths of the tokens.
        n_conv_layers: Convolutions that make the tokens.
        kernel_size: Their side.
        n_conv_blocks: How many blocks, from the first, are convolutions in the place of attention.
        pos_embed: `learn` or `sine`.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the positions are added.
        proj_drop_rate: Dropout after attention and inside MLPs.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Share of images that skip the last block in training; it grows linearly from 0 in the first.
        put: Builds what is put at a site; plain attention if None.
        pool: Builds what is put at the site `pool`.
        given: Maps that the components ask for, by name.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 32,
        in_chans: int = 3,
        num_classes: int = 100,
        global_pool: str = "seq",
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        n_conv_layers: int = 1,
        kernel_size: int = 3,
        n_conv_blocks: int = 0,
        pos_embed: str = "learn",
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
        put: Put | None = None,
        pool: PutPool | None = None,
        given: Mapping[str, Given] = NO_MAPS,
    ):
        super().__init__()
        if not 0 <= n_conv_blocks < depth:
            raise ValueError(
                f"{n_conv_blocks} of {depth} blocks cannot be convolutions: one or more must attend"
            )
        if pos_embed not in ("learn", "sine"):
            raise ValueError(f"positions are `learn` or `sine`, not `{pos_embed}`")
        rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.tokenizer = ConvTokenizer((rows, columns), in_chans, embed_dim, n_conv_layers, kernel_size)
        self.layout = Layout(self.tokenizer.grid)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        if pos_embed == "learn":
            self.pos_embed = nn.Parameter(torch.empty(1, self.layout.length, embed_dim))
        else:
            self.register_buffer("pos_embed", sine_positions(self.layout.length, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        def site(layer: int) -> Site:
            return Site(
                name=f"blocks.{layer}",
                dim=embed_dim,
                heads=num_heads,
                layout=self.layout,
                layer=layer,
                depth=depth,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                qkv_bias=qkv_bias,
            )

        def block(layer: int) -> nn.Module:
            if layer < n_conv_blocks:
                return ConvBlock(embed_dim, self.layout)
            drop_path = drop_path_rate * layer / max(depth - 1, 1)
            return CompactBlock(site(layer), (put or put_plain)(site(layer)), mlp_ratio, drop_path)

        self.blocks = nn.Sequential(*map(block, range(depth)))
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": self.tokenizer.reduction}
            for i in range(depth)
        ]
        self.norm: nn.Module = nn.LayerNorm(embed_dim)
        self.pool: nn.Module = (
            pool(replace(site(depth - 1), name=POOL))
            if pool and global_pool == POOL
            else SequencePool(embed_dim)
        )
        self.given = dict(given)
        named(self, given)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear layers from a truncated N(0, 0.02²), learnt positions from N(0, 0.2²), convolutions after He."""
        init_linear(self)
        for module in self.modules():
            if isinstance(module, ConvTokenizer | ConvBlock):
                module.init_weights()
        if isinstance(self.pos_embed, nn.Parameter):
            trunc_normal_(self.pos_embed, std=0.2)
        init_parts(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser must not decay."""
        return {"pos_embed"} | super().no_weight_decay()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for learning rates by layer."""
        return {
            "stem": r"^tokenizer|pos_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|pool", (99999,))],
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes.

        Args:
            num_classes: 0 for features.
            global_pool: `seq`, or the empty string for all tokens; as before if None. `pool` is the component at the
                site `pool`, which stays if it is there.
        """
        if global_pool not in (None, "", "seq") and not (global_pool == POOL and isinstance(self.pool, Pool)):
            raise ValueError(f"tokens are pooled by `seq`, or not at all, but not by `{global_pool}`")
        like = next(self.parameters())
        if global_pool == "":
            self.pool = nn.Identity()
        elif global_pool == "seq" and not isinstance(self.pool, SequencePool):
            self.pool = SequencePool(self.embed_dim).to(like)
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes).to(like) if num_classes else nn.Identity()
        self.head.train(self.training)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens with their positions, (b n c)."""
        return self.pos_drop(self.tokenizer(x) + self.pos_embed)

    def maps(self, x: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The maps on the grid of the tokens, (b gy gx) each, with the images that they belong to.

        Args:
            x: Images (b c y x).
            given: By name, (b y x) or (b gy gx) each.

        Raises:
            MissingMap: AZ409, when one is missing or does not fit.
            TypeError: When there is one too many.
        """
        x = without_unknown(x, given, self.given)
        image, grid = self.tokenizer.img_size, self.layout.grid
        return x, {
            name: on_grid(given, name, kind, x.shape[0], image, image, grid)
            for name, kind in self.given.items()
        }

    def forward_features(self, x: Tensor, **given: Tensor) -> Tensor:
        """Normalised tokens (b n c).

        Args:
            x: Images (b c y x).
            given: The maps that the components ask for, by name: (b y x), or on the grid of the tokens.
        """
        return self.encode(*self.maps(x, given))

    def encode(self, x: Tensor, maps: Mapping[str, Tensor]) -> Tensor:
        """`forward_features` of images (b c y x) with maps on the grid (b gy gx)."""
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, maps) if self.grad_checkpointing else block(x, maps)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False, **given: Tensor) -> Tensor:
        """Logits of tokens, or the pooled token itself.

        Args:
            x: (b n c).
            pre_logits: Whether the classifier is left out.
            given: Maps on the grid, for a component that makes one token of all.
        """
        if isinstance(self.pool, Pool):
            x = self.pool(x, layout=self.layout, given=given)
        else:
            x = self.pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        """Logits, or features; arguments as for `forward_features`."""
        x, maps = self.maps(x, given)
        return self.forward_head(self.encode(x, maps), False, **maps)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **given: Tensor,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What `forward_features` gives, and what the blocks give on the way.

        Args:
            x: Images (b c y x).
            indices: Which blocks; the last n when a number, all when None.
            norm: Whether the final norm is applied to what the blocks give.
            stop_early: Whether blocks after the last of them are left out.
            output_fmt: `NCHW` for maps (b c y x), `NLC` for tokens (b n c).
            intermediates_only: Whether only what the blocks give is returned.
            given: As for `forward_features`.
        """
        check_format(output_fmt)
        wanted, last = feature_take_indices(len(self.blocks), indices)
        x, maps = self.maps(x, given)
        x, inner = self.embed(x), []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, maps) if self.grad_checkpointing else block(x, maps)
            if i in wanted:
                inner.append(self.norm(x) if norm else x)
        if output_fmt == "NCHW":
            inner = [self.layout.to_grid(tokens) for tokens in inner]
        return inner if intermediates_only else (self.norm(x), inner)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what these intermediates do not need.

        Args:
            indices: Which blocks are wanted.
            prune_norm: Whether the final norm goes too.
            prune_head: Whether pooling and the classifier go too.

        Returns:
            The blocks that are wanted, counted from 0.
        """
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.pool = self.head = nn.Identity()
            self.num_classes, self.global_pool = 0, ""
        return wanted


def checkpoint_filter_fn(state: dict[str, Tensor], model: CompactTransformer) -> dict[str, Tensor]:
    """A state dict whose positions fit the model's grid."""
    positions = state.get("pos_embed")
    if positions is None or positions.shape == model.pos_embed.shape:
        return state
    grid = list(model.layout.grid)
    return state | {"pos_embed": resample_abs_pos_embed(positions, grid, num_prefix_tokens=0)}


def host_info(base: str, arguments: Mapping[str, Any]) -> BackboneInfo:
    """Build the base on the meta device and look at it.

    Args:
        base: Key of `BASES`.
        arguments: Constructor arguments that differ from the base's.

    Raises:
        RecipeError: AZ301 no such base, AZ309 the arguments do not fit.
    """
    wanted = base_arguments(BASES, base, "CCT", arguments)
    with on_meta(base, "attnzoo", CompactTransformer):
        model = CompactTransformer(**wanted)
    return BackboneInfo(
        family="CCT",
        base=base,
        arguments=arguments,
        dim=model.embed_dim,
        heads=(wanted["num_heads"],) * len(model.blocks),
        depth=len(model.blocks),
        layout=model.layout,
        image=(model.in_chans, *model.tokenizer.img_size),
        classes=model.num_classes,
        params=sum(p.numel() for p in model.parameters()),
        model=model,
        first=arguments.get("n_conv_blocks", 0),
        resizes=False,
    )


def build(
    info: BackboneInfo,
    put: Put,
    *,
    pool: PutPool | None = None,
    given: Mapping[str, Given] = NO_MAPS,
    **how: Any,
) -> nn.Module:
    """The base with mechanisms in its blocks; arguments as for `kinds.ImageHost.build`."""
    components = {"pool": with_heads(info, pool), "global_pool": POOL} if pool else {}
    return build_backbone(
        partial(CompactTransformer, put=with_heads(info, put), given=given),
        {**BASES[info.base], **info.arguments, **components},
        info,
        filter_fn=checkpoint_filter_fn,
        named_inputs=bool(given),
        **how,
    )


def model_cfg(
    name: str, base: str, arguments: Mapping[str, Any], mean: list[float] | None, std: list[float] | None
) -> dict[str, Any]:
    """timm's configuration of a composed model, with the statistics of CIFAR-100 when none are said."""
    cfg = PretrainedCfg(
        input_size=(3, 32, 32),
        num_classes=100,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        interpolation="bicubic",
        crop_pct=1.0,
        first_conv="tokenizer.0.0",
        classifier="head",
    )
    return without_weights(cfg, name, arguments, mean, std)
