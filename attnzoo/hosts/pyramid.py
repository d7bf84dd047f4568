"""A backbone in stages: from one to the next the grid of tokens has half the sides, and the tokens more channels.

One host for the hierarchical models of many papers, put together from a few parts (`stages.py`): PVT v2, VAN, HAT-Net,
LIT, SpectFormer-H, SHViT, FMViT, HaloNet. Sites are `stages.s.i`, block i of stage s. What a recipe leaves empty is not
there: no norm, no parameters; the block is its MLP alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models import PretrainedCfg, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from attnzoo.core import Component, Layout, Pool, Site
from attnzoo.core.card import Given
from attnzoo.errors import RecipeError
from attnzoo.hosts.backbone import (
    Backbone,
    base_arguments,
    build_backbone,
    check_format,
    init_linear,
    with_heads,
)
from attnzoo.hosts.given import NO_MAPS, without_unknown
from attnzoo.hosts.info import (
    POOL,
    BackboneInfo,
    Put,
    PutPool,
    init_parts,
    on_meta,
    plain_attention,
    unallocated,
    without_weights,
)
from attnzoo.hosts.requirements import Requirements
from attnzoo.hosts.stages import (
    NORMS,
    Block,
    Bottleneck,
    DeformableMerge,
    FrequencyBlock,
    Stage,
    make_merge,
    make_mlp,
    make_stem,
)

default_cfgs: dict[str, Any] = {}
"""timm looks here for the configurations of the models that are registered from this module."""

BASES: dict[str, dict[str, Any]] = {
    "pyramid_tiny_patch2_32": {
        "img_size": 32, "patch_size": 2, "dims": (32, 64, 128), "depths": (1, 1, 2), "num_heads": (1, 2, 4),
        "mlp_ratios": (4.0, 4.0, 4.0), "num_classes": 10,
    },
    "pyramid_small_patch4_224": {
        "img_size": 224, "patch_size": 4, "dims": (64, 128, 320, 512), "depths": (2, 2, 6, 2),
        "num_heads": (1, 2, 5, 8), "mlp_ratios": (8.0, 8.0, 4.0, 4.0), "num_classes": 1000,
    },
}  # fmt: skip
"""Sizes, `pyramid_<width>_patch<side>_<image>`."""


class PyramidTransformer(Backbone):
    """A backbone in stages.

    Args:
        img_size: Side of the image, or rows and columns; the product of `patch_size` and 2 for each further stage
            divides it.
        patch_size: Side of the patches of which the first stage's tokens are made, in pixels.
        in_chans: Channels of the image.
        num_classes: 0 for features.
        global_pool: `avg` for the mean of the last tokens, `pool` for the component that `pool` builds, or nothing for
            all tokens.
        dims: Width of the tokens of each stage, in channels.
        depths: Number of blocks of each.
        num_heads: Heads of each.
        mlp_ratios: Width of the MLPs of each, in widths of the tokens; 0 for none.
        stem: How images become tokens: `patch`, `overlap`, `conv`; see `stages.make_stem`.
        stem_dim: Channels between the convolutions of the stem `conv`.
        merge: How the grid is halved: `patch`, `overlap`, `deformable`; see `stages.make_merge`.
        norm: `layer`, `group` (of each image, all tokens and channels) or `batch`: the norms after the stem and after
            each halving.
        block_norm: The norms before attention and MLP; as `norm` if None. `none` for what normalises on its own; then
            the stem ends without a norm, too.
        end_norm: Whether the `last` stage ends with a LayerNorm, `every` one, or `none`.
        block: `transformer` for residuals around attention and MLP; `bottleneck` for those of residual networks, with
            attention to a quarter of the channels and no MLP; `frequency` for FMViT's, with attention to three quarters
            of them and convolutions to one.
        mlp: `plain`, `depthwise`, `inverted`, `multi_group`; see `stages.make_mlp`.
        depthwise: Whether each block begins with x + norm(depthwise 3 × 3 convolution of x).
        shared: Whether the blocks of a stage share all their weights; then the stage has one site.
        pos_embed: `learn` for positions in every stage, or `none`.
        qkv_bias: Whether queries, keys and values have a bias.
        init_values: What the scales of the sublayers start with; None for no scales.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and inside MLPs.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Share of images that skip the last block in training; it grows linearly from 0 in the first.
        put: Builds what is put at a site; plain attention if None.
        left_out: Names of the sites where there is nothing.
        pool: Builds what is put at the site `pool`.

    Raises:
        RecipeError: AZ320 for an image that cannot be halved so often, AZ323 for a block with nothing in it.
        ValueError: For lists of other lengths than `dims`, and for a stem that cannot be.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        stem: str = "overlap",
        stem_dim: int = 16,
        merge: str = "overlap",
        norm: str = "layer",
        block_norm: str | None = None,
        end_norm: str = "last",
        block: str = "transformer",
        mlp: str = "plain",
        depthwise: bool = False,
        shared: bool = False,
        pos_embed: str = "none",
        qkv_bias: bool = True,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        put: Put = plain_attention,
        left_out: frozenset[str] = frozenset(),
        pool: PutPool | None = None,
    ):
        super().__init__()
        rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.in_chans, self.num_classes = (rows, columns), in_chans, num_classes
        for name, given in (("depths", depths), ("num_heads", num_heads), ("mlp_ratios", mlp_ratios)):
            if len(given) != len(dims):
                raise ValueError(
                    f"`{name}` has {len(given)} entries, and `dims` says that there are {len(dims)} stages"
                )
        if block != "transformer" and (depthwise or init_values is not None):
            raise ValueError(
                f"`depthwise` and `init_values` belong to `block: transformer`, not to `{block}`"
            )
        coarsest = patch_size * 2 ** (len(dims) - 1)
        if rows % coarsest or columns % coarsest:
            raise RecipeError(
                "AZ320",
                f"an image of {rows} × {columns} pixels cannot be halved into {len(dims)} stages",
                why=f"a token of the last stage stands for {coarsest} × {coarsest} pixels",
                help=f"let both sides be multiples of {coarsest}, or change `patch_size` or the number of stages",
            )
        sides = [patch_size * 2**stage for stage in range(len(dims))]
        layouts = [Layout((rows // side, columns // side)) for side in sides]
        inner = {"transformer": 1.0, "bottleneck": 0.25, "frequency": 0.75}[block]
        sited = [1 if shared else depth for depth in depths]  # blocks with weights of their own
        every = [(stage, i) for stage, count in enumerate(sited) for i in range(count)]
        self.sites = {
            f"stages.{stage}.{i}": Site(
                name=f"stages.{stage}.{i}",
                dim=int(dims[stage] * inner),
                heads=num_heads[stage],
                layout=layouts[stage],
                layer=layer,
                depth=len(every),
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                qkv_bias=qkv_bias,
            )
            for layer, (stage, i) in enumerate(every)
        }
        norms = NORMS[block_norm or norm]

        def one(stage: int, i: int, layer: int) -> nn.Module:
            site = self.sites[f"stages.{stage}.{i}"]
            attn = None if site.name in left_out else put(site)
            dim, layout, drop_path = (
                dims[stage],
                layouts[stage],
                drop_path_rate * layer / max(len(every) - 1, 1),
            )
            if block == "bottleneck":
                return Bottleneck(dim, site.dim, layout, attn, drop_path)
            hidden = int(dim * mlp_ratios[stage])
            thinks = make_mlp(mlp, dim, hidden, layout, proj_drop_rate) if hidden else None
            if block == "frequency":
                return FrequencyBlock(dim, site.dim, layout, attn, thinks, norms, drop_path)
            if attn is None and thinks is None and not depthwise:
                raise RecipeError(
                    "AZ323",
                    f"{site.name} cannot be left empty",
                    why="nothing would be in the block: it has no MLP",
                    help="name what is put there, or give the stage an MLP (`mlp_ratios`)",
                )
            return Block(dim, layout, attn, depthwise, thinks, norms, init_values, drop_path)

        blocks = {
            name: one(*spot, layer) for layer, (name, spot) in enumerate(zip(self.sites, every, strict=True))
        }
        self.stages = nn.ModuleList(
            Stage(
                make_merge(merge, dims[s - 1], dim) if s else make_stem(stem, in_chans, dim, patch_size, stem_dim),
                # a deformable merge has a norm of its own
                NORMS["none" if (s and merge == "deformable") or (not s and block_norm == "none") else norm](dim),
                layouts[s],
                pos_embed == "learn",
                dim,
                [blocks[f"stages.{s}.{i}"] for i in range(sited[s])],
                depths[s] if shared else 1,
                NORMS["layer" if end_norm == "every" and s < len(dims) - 1 else "none"](dim),
            )
            for s, dim in enumerate(dims)
        )  # fmt: skip
        self.norm = NORMS["none" if end_norm == "none" else "layer"](dims[-1])
        self.feature_info = [
            {"module": f"stages.{s}", "num_chs": dim, "reduction": sides[s]} for s, dim in enumerate(dims)
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        self.layouts = tuple(layouts)
        last = list(self.sites.values())[-1]
        self.pool: nn.Module | None = (
            pool(replace(last, name=POOL, dim=dims[-1])) if pool and global_pool == POOL else None
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool: str = global_pool
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear layers and positions from a truncated N(0, 0.02²), convolutions from N(0, 2 / fan out)."""
        init_linear(self)
        inside = {
            part for module in self.modules() if isinstance(module, Component) for part in module.modules()
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in inside:
                taps = math.prod(module.kernel_size)
                std = math.sqrt(2 * module.groups / (taps * module.out_channels))
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Stage) and hasattr(module, "pos_embed"):
                trunc_normal_(module.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, DeformableMerge):
                module.init_weights()
        init_parts(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for learning rates by layer."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        rest = (
            []
            if coarse
            else [(r"^stages\.(\d+)\.(?:merge|norm|pos_embed)", (0,)), (r"^stages\.(\d+)\.end", (99999,))]
        )
        return {
            "stem": r"^stages\.0\.(?:merge|norm|pos_embed)",
            "blocks": [(blocks, None), *rest, (r"^norm|pool", (99999,))],
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes.

        Args:
            num_classes: 0 for features.
            global_pool: `avg`, or the empty string for all tokens; as before if None. `pool` is the component at the
                site `pool`, which stays if it is there.
        """
        if global_pool not in (None, "", "avg") and not (global_pool == POOL and isinstance(self.pool, Pool)):
            raise ValueError(f"tokens are pooled by `avg`, or not at all, but not by `{global_pool}`")
        like = next(self.parameters())
        self.global_pool = self.global_pool if global_pool is None else global_pool
        if self.global_pool != POOL:
            self.pool = None
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
        self.head.train(self.training)

    def through(self, stage: nn.Module, x: Tensor) -> Tensor:
        """Tokens (b n c) after the blocks of a stage, of the map before, (b c y x)."""
        assert isinstance(stage, Stage)
        x = stage.embed(x)
        for _ in range(stage.repeats):
            for block in stage.blocks:
                x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return stage.end(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's tokens (b n c).

        Args:
            x: Images (b c y x).
        """
        x = without_unknown(x, {}, {})
        torch._assert(x.shape[2] == self.img_size[0], "the image has another number of rows")
        torch._assert(x.shape[3] == self.img_size[1], "the image has another number of columns")
        for stage, layout in zip(self.stages[:-1], self.layouts, strict=False):
            x = layout.to_grid(self.through(stage, x))
        return self.norm(self.through(self.stages[-1], x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of tokens, or the pooled token itself.

        Args:
            x: (b n c).
            pre_logits: Whether the classifier is left out.
        """
        if isinstance(self.pool, Pool):
            x = self.pool(x, layout=self.layouts[-1])
        elif self.global_pool:
            x = x.mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or features, of images (b c y x)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What `forward_features` gives, and what the stages give on the way.

        Args:
            x: Images (b c y x).
            indices: Which stages; the last n when a number, all when None.
            norm: Whether the norm at the end is applied to what the last stage gives.
            stop_early: Whether stages after the last of them are left out.
            output_fmt: `NCHW` for maps (b c y x), `NLC` for tokens (b n c).
            intermediates_only: Whether only what the stages give is returned.
        """
        check_format(output_fmt)
        wanted, last = feature_take_indices(len(self.stages), indices)
        tokens, inner = x, []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            tokens = self.through(stage, x)
            x = self.layouts[i].to_grid(tokens)
            if i in wanted:
                seen = self.norm(tokens) if norm and i == len(self.stages) - 1 else tokens
                inner.append(self.layouts[i].to_grid(seen) if output_fmt == "NCHW" else seen)
        return inner if intermediates_only else (self.norm(tokens), inner)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what these intermediates do not need.

        Args:
            indices: Which stages are wanted.
            prune_norm: Whether the norm at the end goes too.
            prune_head: Whether pooling and the classifier go too.

        Returns:
            The stages that are wanted, counted from 0.
        """
        wanted, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted


def checkpoint_filter_fn(state: dict[str, Tensor], model: PyramidTransformer) -> dict[str, Tensor]:
    """A state dict whose positions fit the model's grids."""
    fitted = dict(state)
    for s, stage in enumerate(model.stages):
        assert isinstance(stage, Stage)
        key = f"stages.{s}.pos_embed"
        positions, own = state.get(key), getattr(stage, "pos_embed", None)
        if positions is not None and own is not None and positions.shape != own.shape:
            fitted[key] = resample_abs_pos_embed(positions, list(stage.layout.grid), num_prefix_tokens=0)
    return fitted


@dataclass(frozen=True)
class StageInfo:
    """What a stage looks like.

    Args:
        grid: Rows and columns of its tokens.
        channels: Their width.
        depth: How many blocks they go through.
        conv: Where a block has a convolution: `before` attention, `after` it, `instead` of one that is left out; empty
            for none.
        mlp: Whether blocks have one.
    """

    grid: tuple[int, ...]
    channels: int
    depth: int
    conv: str
    mlp: bool


@dataclass(frozen=True)
class PyramidInfo(BackboneInfo):
    """What is known of a backbone in stages before it is built.

    Args:
        left_out: Names of the sites where there is nothing.
    """

    left_out: frozenset[str] = frozenset()

    @property
    def tokens(self) -> int:
        return self.model.layouts[0].length  # type: ignore[union-attr,index]

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(site.dim for site in self.model.sites.values())  # type: ignore[union-attr,operator]

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        """What each stage looks like."""
        said = {**BASES[self.base], **self.arguments}
        return tuple(
            StageInfo(
                grid=layout.grid,
                channels=info["num_chs"],
                depth=depth,
                conv={"frequency": "after", "bottleneck": "instead"}.get(said.get("block", ""), "")
                or ("before" if said.get("depthwise") else ""),
                mlp=ratio > 0 and said.get("block") != "bottleneck",
            )
            for layout, info, depth, ratio in zip(
                self.model.layouts,  # type: ignore[arg-type]
                self.model.feature_info,  # type: ignore[arg-type]
                said["depths"],
                said["mlp_ratios"],
                strict=True,
            )
        )

    def sites(self) -> dict[str, Site]:
        return {
            name: replace(site, heads=self.heads[site.layer])
            for name, site in self.model.sites.items()  # type: ignore[union-attr,operator]
            if name not in self.left_out
        }

    def pool_site(self, **options) -> Site | None:
        *_, last = self.model.sites.values()  # type: ignore[union-attr,operator]
        return replace(last, name=POOL, dim=self.dim, heads=self.heads[-1], **options)

    def requirements(self, site: str) -> Requirements:
        return Requirements(grid=2, no_maps="a model of kind pyramid hands none on to its sites")

    def module_path(self, site: str) -> str:
        if site == POOL:
            return POOL
        _, stage, block = site.split(".")
        return f"stages.{stage}.blocks.{block}.attn"

    def filled(self, empty: frozenset[str], beside: frozenset[str]) -> "PyramidInfo":
        if not empty:
            return self
        with unallocated():
            model = PyramidTransformer(**{**BASES[self.base], **self.arguments}, left_out=empty)
        return replace(self, model=model, left_out=empty, params=sum(p.numel() for p in model.parameters()))


def host_info(base: str, arguments: Mapping[str, Any]) -> PyramidInfo:
    """Build the base on the meta device and look at it.

    Args:
        base: Key of `BASES`.
        arguments: Constructor arguments that differ from the base's.

    Raises:
        RecipeError: AZ301 no such base, AZ308 heads that do not divide a stage's channels, AZ309 the arguments do not
            fit, AZ320 an image that cannot be halved so often.
    """
    wanted = base_arguments(BASES, base, "backbone in stages", arguments)
    with on_meta(base, "attnzoo", PyramidTransformer):
        model = PyramidTransformer(**wanted)
    sites = list(model.sites.values())
    return PyramidInfo(
        family="pyramid",
        base=base,
        arguments=arguments,
        dim=model.num_features,
        heads=tuple(site.heads for site in sites),
        depth=len(sites),
        layout=sites[0].layout,
        image=(model.in_chans, *model.img_size),
        classes=model.num_classes,
        params=sum(p.numel() for p in model.parameters()),
        model=model,
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
    """The base with mechanisms at its sites; arguments as for `kinds.ImageHost.build`."""
    assert isinstance(info, PyramidInfo)
    components = {"pool": with_heads(info, pool), "global_pool": POOL} if pool else {}
    how.setdefault("out_indices", tuple(range(len(info.stages))))
    return build_backbone(
        partial(PyramidTransformer, put=with_heads(info, put), left_out=info.left_out),
        {**BASES[info.base], **info.arguments, **components},
        info,
        filter_fn=checkpoint_filter_fn,
        named_inputs=False,
        **how,
    )


def model_cfg(
    name: str, base: str, arguments: Mapping[str, Any], mean: list[float] | None, std: list[float] | None
) -> dict[str, Any]:
    """timm's configuration of a composed model, with the statistics of ImageNet when none are said."""
    side = BASES[base]["img_size"]
    cfg = PretrainedCfg(
        input_size=(3, side, side),
        num_classes=BASES[base]["num_classes"],
        interpolation="bicubic",
        crop_pct=1.0,
        first_conv="stages.0.merge.0" if arguments.get("stem") == "conv" else "stages.0.merge",
        classifier="head",
    )
    return without_weights(cfg, name, arguments, mean, std)
