"""timm's ViTs as hosts, by timm's documented seams, `block_fn` and `attn_layer`; and its `Eva`, which has none."""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.layers import Attention, AttentionRope, HybridEmbed, LayerNorm, PatchEmbed, get_norm_layer
from timm.models import (
    Eva,
    PretrainedCfg,
    VisionTransformer,
    build_model_with_cfg,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    named_apply,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    checkpoint_filter_fn,
    get_init_weights_vit,
)
from torch import Tensor, nn

from attnzoo.core import Layout, Mask, Mechanism, Site
from attnzoo.core.card import ROLLOUT, Given
from attnzoo.errors import RecipeError, did_you_mean
from attnzoo.hosts import eva
from attnzoo.hosts.given import NO_MAPS, GivenFeatures, named
from attnzoo.hosts.info import POOL, BackboneInfo, Put, PutPool, init_normal, on_meta, without_weights
from attnzoo.hosts.rollout import install as install_rollout
from attnzoo.hosts.skip import Skip, install
from attnzoo.hosts.timm_vit import ZooBlock, ZooModel

__all__ = [
    "CLASSES",
    "ZooVisionTransformer",
    "build",
    "checkpoint_filter_fn",
    "default_cfgs",
    "host_info",
    "model_cfg",
]

default_cfgs: dict[str, Any] = {}
"""timm looks here for the configurations of the models that are registered from this module."""


_HINTS = {
    "needs the class token": "write `global_pool: avg`, or leave `class_token: false` out",
    "num_kv_heads sequence": "leave `depth` as the base has it, or hand over `num_kv_heads`, one number for each block",
    "must match the size of tensor": eva.FOUR,
    "head_dim must be divisible by 4": eva.FOUR,
    "AssertionError": "let both sides of `img_size` be multiples of the pixels that a token of the base stands for",
}
"""What to do about a complaint of timm's, by a part of its text."""


def timm_arguments(base: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a recipe or of `timm.create_model` as the base takes them.

    Args:
        base: Name of a timm model.
        arguments: In the words of `VisionTransformer`.

    Raises:
        RecipeError: AZ309, when `norm_eps` and a norm that has none are both said.
    """
    out: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    eps = out.pop("norm_eps", None)
    if eps is not None:
        if out.get("norm_layer", "layernorm") != "layernorm":
            raise RecipeError(
                "AZ309", "`norm_eps` belongs to `norm_layer: layernorm`", help="leave one of the two out"
            )
        out["norm_layer"] = partial(LayerNorm, eps=eps)
    if not _is_eva(base):
        return out
    if isinstance(out.get("norm_layer"), str):
        out["norm_layer"] = get_norm_layer(out["norm_layer"])
    return eva.translated(out)


def _is_eva(base: str) -> bool:
    """Whether timm builds a model of that name as an `Eva`, unless it is told otherwise."""
    return model_entrypoint(base).__module__ == Eva.__module__


def host_info(base: str, arguments: Mapping[str, Any]) -> BackboneInfo:
    """Build the base on the meta device and look at it.

    Args:
        base: Name of a timm model.
        arguments: Constructor arguments that differ from the base's.

    Raises:
        RecipeError: AZ301 no such model, AZ309 timm refuses the arguments, AZ310 not a model that can be a host,
            AZ311 too many parameters for this machine, AZ316 heads that rotary positions cannot turn, AZ320 an
            image that cannot be cut into patches.
    """
    if not is_model(base):
        names = timm.list_models()
        hint = did_you_mean(base, names)
        raise RecipeError(
            "AZ301",
            f"timm has no model called `{base}`",
            help=f"{hint} timm.list_models('vit*') shows them".strip(),
        )
    with on_meta(base, "timm", Eva if _is_eva(base) else VisionTransformer, _HINTS):
        model = model_entrypoint(base)(pretrained=False, **timm_arguments(base, arguments))
    _check_host(base, model)
    _check_image(model)
    if isinstance(model, Eva):
        eva.check_heads(base, model)
    first = model.blocks[0]
    grid = tuple(model.patch_embed.grid_size)
    return BackboneInfo(
        family="ViT",
        base=base,
        arguments=arguments,
        dim=model.embed_dim,
        heads=(first.attn.num_heads,) * len(model.blocks),
        depth=len(model.blocks),
        layout=Layout(grid, model.num_prefix_tokens),
        image=(model.in_chans, *model.patch_embed.img_size),
        classes=model.num_classes,
        params=sum(p.numel() for p in model.parameters()),
        model=model,
        dynamic=model.dynamic_img_size,
        patch_drop=getattr(model.patch_drop, "prob", 0.0),
        pools=type(model) is not VisionTransformerDistilled,
        class_token=model.cls_token is not None,
        makes={ROLLOUT: "scores"},
        softmax=all(_is_softmax(block.attn) for block in model.blocks),
        attention=eva.attention_of(model) if isinstance(model, Eva) else (),
    )


def _is_softmax(attn: nn.Module) -> bool:
    """Whether timm's attention is what `softmax` is; timm's of old have no gate."""
    return type(attn) in (Attention, AttentionRope, EvaAttention) and getattr(attn, "gate", None) is None


def _check_host(base: str, model: Any) -> None:
    reason = ""
    if type(model) not in CLASSES:
        reason = f"it is a {type(model).__name__}, not a VisionTransformer or Eva"
    elif type(model.patch_embed) not in (PatchEmbed, HybridEmbed):
        reason = (
            f"its patches are made by {type(model.patch_embed).__name__}, not by PatchEmbed or HybridEmbed"
        )
    elif strange := {type(block) for block in model.blocks} - BLOCKS.keys() - eva.BLOCKS.keys():
        reasons = (f"{kind.__name__}, {_NO_SITE.get(kind, _NO_PLACE)}" for kind in strange)
        reason = f"its blocks are {'; '.join(sorted(reasons))}"
    if reason:
        raise RecipeError(
            "AZ310",
            f"`{base}` cannot be a host",
            why=reason,
            help="choose a model whose blocks have one attention each, such as vit_base_patch16_224 or "
            "vit_base_patch16_dinov3",
        )


def _check_image(model: Any) -> None:
    """Refuse images that cannot be cut into patches."""
    embed = model.patch_embed
    (rows, columns), patch = embed.img_size, embed.feat_ratio(as_scalar=False)
    image, piece = f"{rows} × {columns} pixels", f"{patch[0]} × {patch[1]}"
    if 0 in embed.grid_size:
        raise RecipeError(
            "AZ320",
            f"an image of {image} holds no patch of {piece}",
            help=f"let `img_size` be {max(patch)} or more, or make `patch_size` smaller",
        )
    if (rows % patch[0] or columns % patch[1]) and embed.dynamic_img_pad != model.dynamic_img_size:
        alone = "dynamic_img_pad" if embed.dynamic_img_pad else "dynamic_img_size"
        other = "dynamic_img_size" if embed.dynamic_img_pad else "dynamic_img_pad"
        raise RecipeError(
            "AZ320",
            f"an image of {image} cannot be cut into patches of {piece} with `{alone}` alone",
            help=f"let `img_size` be a multiple of `patch_size`, or write `{other}: true` too",
        )


class ZooPreNormBlock(ZooBlock, Block):
    """timm's plain block, as `ZooBlock`."""

    def mix(self, x: Tensor, layout: Layout, mask: Mask, given: Mapping[str, Tensor]) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attend(self.norm1(x), layout, mask, given)))
        return self.skip(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


class ZooResPostBlock(ZooBlock, ResPostBlock):
    """The same of timm's block with norms after attention and MLP."""

    def mix(self, x: Tensor, layout: Layout, mask: Mask, given: Mapping[str, Tensor]) -> Tensor:
        x = x + self.drop_path1(self.norm1(self.attend(x, layout, mask, given)))
        return self.skip(x + self.drop_path2(self.norm2(self.mlp(x))))


BLOCKS: dict[type, type[ZooBlock]] = {Block: ZooPreNormBlock, ResPostBlock: ZooResPostBlock}
"""What timm's blocks become."""
_FUSED = "which project for attention and MLP at once, so that no attention is there to be replaced"
_NO_SITE: dict[type, str] = {
    ParallelScalingBlock: _FUSED,
    DiffParallelScalingBlock: _FUSED,
    ParallelThingsBlock: "which have several attentions side by side, and a site is one for each block",
}
"""What stands against a mechanism in timm's other blocks."""
_NO_PLACE = "which have no place for another mechanism"


class ZooVisionTransformer(ZooModel, VisionTransformer):
    """timm's `VisionTransformer` with mechanisms in its blocks."""


class ZooDistilled(ZooVisionTransformer, VisionTransformerDistilled):
    """The same of timm's DeiT with a distillation token."""


CLASSES: dict[type, type[ZooModel]] = {
    VisionTransformer: ZooVisionTransformer,
    VisionTransformerDistilled: ZooDistilled,
    Eva: eva.ZooEva,
}
"""What timm's classes become."""


def build(
    info: BackboneInfo,
    put: Put,
    *,
    pool: PutPool | None = None,
    given: Mapping[str, Given] = NO_MAPS,
    pretrained: bool = False,
    pretrained_cfg: Mapping[str, Any],
    init: str = "timm",
    skip: Skip = Skip(),  # noqa: B008 - frozen
    **timm_options,
) -> nn.Module:
    """The base with mechanisms in its blocks; arguments as for `kinds.ImageHost.build`."""
    features = {
        "out_indices": timm_options.pop("out_indices", 3),
        "feature_cls": GivenFeatures if given else "getter",
    }
    return build_model_with_cfg(
        partial(_zoo_vit, info, put, pool, given, pretrained_cfg, init, skip),
        info.base,
        pretrained,
        pretrained_cfg=dict(pretrained_cfg),
        # by timm's custom it stands beside the function that builds the base
        pretrained_filter_fn=sys.modules[model_entrypoint(info.base).__module__].checkpoint_filter_fn,
        feature_cfg=features,
        **timm_arguments(info.base, info.arguments),
        **timm_options,
    )


def _zoo_vit(
    info: BackboneInfo,
    put: Put,
    pool: PutPool | None,
    given: Mapping[str, Given],
    pretrained_cfg: Mapping[str, Any],
    init: str,
    skip: Skip,
    device: Any = None,
    dtype: torch.dtype | None = None,
    **arguments,
) -> nn.Module:
    """The whole model before its weights are loaded or blocks are dropped."""
    where = torch.device(device) if device is not None else nullcontext()
    seated = {"dynamic": info.dynamic, "drops": info.patch_drop > 0}
    options: dict[str, Any] = dict(info.attention[-1]) if info.attention else {}

    def put_at(layer: int, **options: Any) -> Mechanism:
        with where:
            return put(info.site(layer, **options)).to(dtype=dtype)

    def block_fn(*, dim: int, num_heads: int, depth: int, **said: Any) -> nn.Module:
        options.update(
            attn_drop=said["attn_drop"],
            proj_drop=said["proj_drop"],
            qkv_bias=said["qkv_bias"],
            proj_bias=said["proj_bias"],
            qk_norm=said["qk_norm"],
            scale_norm=said["scale_attn_norm"],
            norm=said["norm_layer"],
        )
        kind: Any = BLOCKS[type(info.model.get_submodule(f"blocks.{depth}"))]
        block = kind(dim, num_heads, depth=depth, **said | {"attn_layer": nn.Identity})
        block.seat(put_at(depth, **options), depth, info.layout, **seated)
        return block

    model: Any = model_entrypoint(info.base)(
        pretrained_cfg=dict(pretrained_cfg),
        device=device,
        dtype=dtype,
        **arguments
        | ({"global_pool": ""} if pool else {})
        | ({} if info.attention else {"block_fn": block_fn}),
    )
    if type(model) not in CLASSES:
        raise RecipeError(
            "AZ309",
            f"timm built a {type(model).__name__}, not a VisionTransformer or Eva",
            help="leave `use_naflex` out",
        )
    if isinstance(model, Eva):
        eva.put_into(model, put_at, info.layout, **seated)
    else:
        model.__class__ = CLASSES[type(model)]
    model.given = dict(given)
    named(model, given)
    if skip:
        blocks: list[Any] = [model.get_submodule(name) for name in skip.at]
        norm = partial(options["norm"], device=device, dtype=dtype)
        install(skip, [block.attn for block in blocks], blocks, info.dim, norm)
        for block in model.blocks:
            block.carries = True
    if pool:
        with where:
            component = pool(cast(Site, info.pool_site(**options)))
        mode = getattr(model, "weight_init_mode", "")
        named_apply(get_init_weights_vit(mode, needs_reset=False), component, POOL)
        model.pool, model.global_pool = component.to(dtype=dtype), POOL
    count = install_rollout([block.attn for block in model.blocks], [model.pool] if pool else [])
    for block in model.blocks[:count]:
        block.carries = True
    if init == "normal":
        init_normal(model)
    return model


def model_cfg(
    name: str, base: str, arguments: Mapping[str, Any], mean: list[float] | None, std: list[float] | None
) -> dict[str, Any]:
    """timm's configuration of a composed model: the base's, without its weights.

    Args:
        name: The model's own name.
        base: The base's name.
        arguments: Constructor arguments that differ from the base's.
        mean: Mean of the images by channel; the base's when None.
        std: Standard deviation of the images by channel; the base's when None.
    """
    return without_weights(get_pretrained_cfg(base) or PretrainedCfg(), name, arguments, mean, std)
