"""timm's ViTs as hosts, by timm's documented seams: `block_fn`, `embed_layer`, `attn_layer`."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import LayerNorm, PatchEmbed
from timm.models import PretrainedCfg, VisionTransformer, get_pretrained_cfg, is_model, model_entrypoint
from timm.models.vision_transformer import Block
from torch import Tensor, fx, nn

from attnzoo.core import NO_MASK, Layout, Mask, Mechanism
from attnzoo.errors import RecipeError, UnsupportedMask, did_you_mean
from attnzoo.hosts.info import BackboneInfo, Put, init_normal, on_meta, undecayed, without_weights
from attnzoo.hosts.skip import Skip, SkipState, install

default_cfgs: dict[str, Any] = {}
"""timm looks here for the configurations of the models that are registered from this module."""


_HINTS = {"needs the class token": "write `global_pool: avg`, or leave `class_token: false` out"}


def timm_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a recipe or of `timm.create_model` as `VisionTransformer` takes them."""
    out: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    eps = out.pop("norm_eps", None)
    if eps is not None:
        if out.get("norm_layer", "layernorm") != "layernorm":
            raise RecipeError(
                "AZ309", "`norm_eps` belongs to `norm_layer: layernorm`", help="leave one of the two out"
            )
        out["norm_layer"] = partial(LayerNorm, eps=eps)
    return out


def host_info(base: str, arguments: Mapping[str, Any]) -> BackboneInfo:
    """Build the base on the meta device and look at it.

    Args:
        base: Name of a timm model.
        arguments: Constructor arguments that differ from the base's.

    Raises:
        RecipeError: AZ301 no such model, AZ309 timm refuses the arguments, AZ310 not a model that can be a host,
            AZ311 too many parameters for this machine, AZ320 an image that cannot be cut into patches.
    """
    if not is_model(base):
        names = timm.list_models()
        hint = did_you_mean(base, names)
        raise RecipeError(
            "AZ301",
            f"timm has no model called `{base}`",
            help=f"{hint} timm.list_models('vit*') shows them".strip(),
        )
    with on_meta(base, "timm", _HINTS):
        model = model_entrypoint(base)(pretrained=False, **timm_arguments(arguments))
    _check_host(base, model)
    _check_image(model)
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
    )


def _check_host(base: str, model: nn.Module) -> None:
    reason = ""
    if not isinstance(model, VisionTransformer):
        reason = f"it is a {type(model).__name__}, not a VisionTransformer"
    elif type(model.patch_embed) is not PatchEmbed:
        reason = f"its patches are made by {type(model.patch_embed).__name__}, not by PatchEmbed"
    elif strange := {type(block).__name__ for block in model.blocks if type(block) is not Block}:
        reason = f"its blocks are {', '.join(sorted(strange))}, which have no place for another mechanism"
    if reason:
        raise RecipeError(
            "AZ310",
            f"`{base}` cannot be a host",
            why=reason,
            help="choose a model with plain blocks, such as vit_base_patch16_224 or deit_small_patch16_224",
        )


def _check_image(model: VisionTransformer) -> None:
    """Refuse images that cannot be cut into patches."""
    embed = model.patch_embed
    (rows, columns), patch = embed.img_size, embed.patch_size
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


class ForwardContext:
    """What belongs to one forward: the layout of its tokens and what layers hand on; begun by the patch embedding.

    Args:
        layout: Prefix tokens and grid.
        drops: Whether patches are dropped in training.
    """

    def __init__(self, layout: Layout, drops: bool):
        self.layout, self.drops, self.state = layout, drops, SkipState()

    def layout_of(self, x: Tensor) -> Layout:
        """The layout of these tokens (b n c): where some were dropped, the others have no grid."""
        layout = self.layout
        if self.drops and not isinstance(x, fx.Proxy) and x.shape[1] != layout.length:
            return Layout((x.shape[1] - layout.prefix,), layout.prefix)
        return layout


class ZooPatchEmbed(PatchEmbed):
    """timm's patch embedding, which also tells the blocks how the patches are arranged."""

    def __init__(self, *args, prefix: int, context: ForwardContext, **timm_options):
        super().__init__(*args, **timm_options)
        self.prefix, self.context = prefix, context

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.context.layout = Layout(tuple(self.grid_size), self.prefix)

    def forward(self, x: Tensor) -> Tensor:
        self.context.state.clear()
        if not self.strict_img_size:  # a fixed size needs no writing, and symbolic tracing knows no sizes
            self.context.layout = Layout(self.dynamic_feat_size((x.shape[2], x.shape[3])), self.prefix)
        return super().forward(x)


class ZooBlock(Block):
    """timm's block with a mechanism in its attention slot."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        depth: int,
        put: Callable[..., Mechanism],
        context: ForwardContext,
        **timm_options,
    ):
        super().__init__(dim, num_heads, depth=depth, **timm_options | {"attn_layer": nn.Identity})
        self.attn = put(dim, num_heads, depth, timm_options)
        self.context = context
        self.attn_skip: nn.Module = nn.Identity()
        self.skip: nn.Module = nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if isinstance(attn_mask, fx.Proxy) or isinstance(is_causal, fx.Proxy):
            x, mask = unmasked(x, attn_mask, is_causal), NO_MASK
        else:
            mask = from_timm(attn_mask, is_causal)
        layout = self.context.layout_of(x)
        mixed = self.attn_skip(self.attn(self.norm1(x), mask=mask, layout=layout))
        x = x + self.drop_path1(self.ls1(mixed))
        return self.skip(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


def unmasked(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """x itself, in a graph made by symbolic tracing, which cannot follow masks: a graph refuses them when it runs.

    Raises:
        UnsupportedMask: AZ402, when there is a mask.
    """
    if attn_mask is not None or is_causal:
        raise UnsupportedMask(
            "AZ402", "a model traced by torch.fx takes no masks", help="use torch.export with the mask"
        )
    return x


fx.wrap("unmasked")


def from_timm(attn_mask: Tensor | None, is_causal: bool) -> Mask:
    """timm's mask arguments as a `Mask`.

    Args:
        attn_mask: Boolean, True = may attend, or float with 0 and -inf; (n m), (b n m) or (b h n m).
        is_causal: Whether later tokens are hidden.

    Raises:
        UnsupportedMask: AZ405, when a float mask holds anything but 0 and -inf.
    """
    if attn_mask is None:
        return Mask(causal=True) if is_causal else NO_MASK
    if attn_mask.dtype != torch.bool:
        allowed = attn_mask == 0
        if not attn_mask.is_floating_point() or not bool((allowed | (attn_mask == float("-inf"))).all()):
            raise UnsupportedMask(
                "AZ405",
                "a mask with values other than 0 and -inf was given",
                why="a bias on the scores is part of a mechanism, not of a mask",
                help="hand a boolean mask in which True means may attend",
            )
        attn_mask = allowed
    pairs = attn_mask.reshape(1, 1, *attn_mask.shape) if attn_mask.ndim == 2 else attn_mask
    return Mask(pairs=pairs[:, None] if pairs.ndim == 3 else pairs, causal=is_causal)


class NoWeightDecay:
    """What timm asks a model for: names of the parameters that an optimiser must not decay."""

    def __init__(self, names: frozenset[str]):
        self.names = names

    def __call__(self) -> set[str]:
        return set(self.names)


def build(
    info: BackboneInfo,
    put: Put,
    *,
    pretrained: bool = False,
    pretrained_cfg: Mapping[str, Any],
    init: str = "timm",
    skip: Skip = Skip(),  # noqa: B008 - frozen
    **timm_options,
) -> nn.Module:
    """The base with mechanisms in its blocks.

    Args:
        info: The inspected base.
        put: Builds what is put at a site.
        pretrained: Whether timm shall load the weights that `pretrained_cfg` names.
        pretrained_cfg: timm's configuration of the model.
        init: `timm`, or `normal` for N(0, 0.02²) everywhere.
        skip: What blocks hand on.
        timm_options: What goes to timm's builder and not to the model: `features_only`, `out_indices`, `device`, ...
    """
    context = ForwardContext(info.layout, drops=info.patch_drop > 0)
    norms: list[Callable[[int], nn.Module]] = []

    def put_at(dim: int, heads: int, layer: int, block: dict[str, Any]) -> Mechanism:
        norms.append(partial(block["norm_layer"], device=block["device"], dtype=block["dtype"]))
        site = info.site(
            layer,
            attn_drop=block["attn_drop"],
            proj_drop=block["proj_drop"],
            qkv_bias=block["qkv_bias"],
            proj_bias=block["proj_bias"],
            qk_norm=block["qk_norm"],
            scale_norm=block["scale_attn_norm"],
            norm=block["norm_layer"],
        )
        with torch.device(block["device"]) if block["device"] is not None else nullcontext():
            return put(site).to(dtype=block["dtype"])

    model = model_entrypoint(info.base)(
        pretrained=pretrained,
        pretrained_cfg=dict(pretrained_cfg),
        block_fn=partial(ZooBlock, put=put_at, context=context),
        embed_layer=partial(ZooPatchEmbed, prefix=info.layout.prefix, context=context),
        **timm_arguments(info.arguments),
        **timm_options,
    )
    vit = model if isinstance(model, VisionTransformer) else model.model  # features_only wraps it
    if skip:
        blocks: list[Any] = [vit.get_submodule(name) for name in skip.at]
        context.state = install(skip, [block.attn for block in blocks], blocks, info.dim, norms[0])
        vit.set_grad_checkpointing = RefuseCheckpointing()  # type: ignore[method-assign]
    vit.no_weight_decay = NoWeightDecay(frozenset(vit.no_weight_decay() | undecayed(vit)))  # type: ignore[method-assign]
    if init == "normal" and not pretrained:
        init_normal(vit)
    return model


class RefuseCheckpointing:
    """In the place of `set_grad_checkpointing`: a block that is computed again would find what later ones handed on."""

    def __call__(self, enable: bool = True) -> None:
        if enable:
            raise RecipeError(
                "AZ315",
                "a model whose blocks hand something on cannot compute blocks again in the backward pass",
                why="`skip:` carries a value from block to block beside the tokens",
                help="leave gradient checkpointing off, or compose with `skip: none`",
            )


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
