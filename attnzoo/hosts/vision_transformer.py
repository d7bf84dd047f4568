"""timm's ViTs as hosts, by timm's documented seams: `block_fn`, `embed_layer`, `attn_layer`."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.layers import LayerNorm, PatchEmbed
from timm.models import (
    PretrainedCfg,
    VisionTransformer,
    build_model_with_cfg,
    checkpoint,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    named_apply,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, checkpoint_filter_fn, get_init_weights_vit
from torch import Tensor, fx, nn

from attnzoo.core import NO_MASK, Layout, Mask, Mechanism, Site
from attnzoo.core.card import ROLLOUT, Given
from attnzoo.errors import LayoutMismatch, RecipeError, UnsupportedMask, did_you_mean
from attnzoo.hosts.given import NO_MAPS, GivenFeatures, named, on_grid, without_unknown
from attnzoo.hosts.info import (
    POOL,
    BackboneInfo,
    Put,
    PutPool,
    init_normal,
    on_meta,
    undecayed,
    without_weights,
)
from attnzoo.hosts.rollout import asks, class_row
from attnzoo.hosts.rollout import install as install_rollout
from attnzoo.hosts.skip import Skip, carried, install

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
    with on_meta(base, "timm", VisionTransformer, _HINTS):
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
        pools=type(model) is VisionTransformer,
        class_token=model.cls_token is not None,
        makes={ROLLOUT: "scores"},
    )


def _check_host(base: str, model: Any) -> None:
    reason = ""
    if type(model) not in CLASSES:
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


@dataclass(eq=False)
class ForwardContext:
    """What belongs to one forward. The model makes it and hands it from block to block in the place of timm's mask.

    Args:
        layout: How the tokens are arranged.
        mask: Who may attend to whom.
        given: Maps on the grid by name, (b gy gx) each.
        checkpoint: Whether blocks are computed a second time in the backward pass.
        handed: What the last block handed on.
    """

    layout: Layout
    mask: Mask = NO_MASK
    given: Mapping[str, Tensor] = field(default_factory=dict)
    checkpoint: bool = False
    handed: Tensor | None = None

    def maps(self, component: Any) -> Mapping[str, Tensor]:
        """The maps for a component, with the rollout of the layers before where it asks for that."""
        if not asks(component.card):
            return self.given
        return {**self.given, ROLLOUT: class_row(self.handed, self.layout)}


class ZooBlock(Block):
    """timm's block with a mechanism in its attention slot."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        depth: int,
        put: Callable[..., Mechanism],
        layout: Layout,
        dynamic: bool,
        drops: bool,
        **timm_options,
    ):
        super().__init__(dim, num_heads, depth=depth, **timm_options | {"attn_layer": nn.Identity})
        self.attn = put(dim, num_heads, depth, timm_options)
        self.layout, self.dynamic, self.drops = layout, dynamic, drops
        self.attn_skip: nn.Module = nn.Identity()
        self.skip: nn.Module = nn.Identity()
        self.carries = False

    def forward(
        self, x: Tensor, attn_mask: Tensor | ForwardContext | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (b n c) after the block.

        Args:
            x: (b n c).
            attn_mask: What the model hands on; timm's mask where somebody calls a block on its own.
            is_causal: Whether later tokens are hidden.
        """
        context = attn_mask
        if not isinstance(context, ForwardContext):
            x, mask = masked(x, context, is_causal)
            context = ForwardContext(layout_alone(self.attn, x, self.layout, self.dynamic), mask)
        seen = context.layout, context.mask, context.maps(self.attn)
        if not self.carries:
            return checkpoint(self.mix, x, *seen) if context.checkpoint else self.mix(x, *seen)
        step = partial(checkpoint, carried) if context.checkpoint else carried
        x, context.handed = step(self.mix, context.handed, x, *seen)
        return x

    def mix(self, x: Tensor, layout: Layout, mask: Mask, given: Mapping[str, Tensor]) -> Tensor:
        """Attention and MLP with their residuals; all that it depends on are its arguments."""
        if self.drops and not isinstance(x, fx.Proxy) and x.shape[1] != layout.length:
            # some patches were dropped, and the others have no grid
            layout = Layout((x.shape[1] - layout.prefix,), layout.prefix)
        mixed = self.attn_skip(self.attn(self.norm1(x), mask=mask, layout=layout, given=given))
        x = x + self.drop_path1(self.ls1(mixed))
        return self.skip(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


def layout_alone(component: Any, x: Tensor, layout: Layout, dynamic: bool) -> Layout:
    """How tokens are arranged that come without the images they were made of.

    Args:
        component: What reads them.
        x: (b n c).
        layout: That of the size for which the model was built.
        dynamic: Whether images may have another size.

    Raises:
        LayoutMismatch: AZ401, when nobody can know and the component must.
    """
    if not dynamic:
        return layout
    if component.card.grid is not None:
        raise LayoutMismatch(
            "AZ401",
            f"`{component.card.name}` cannot know how these tokens are arranged",
            why="with `dynamic_img_size` the grid is that of the images, which are not here",
            help="call the model, or its `forward_features` or `forward_intermediates`, with the images",
        )
    return Layout((x.shape[1] - layout.prefix,), layout.prefix)


def masked(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Mask]:
    """x itself and timm's mask arguments as a `Mask`; none in symbolic tracing, where the graph refuses them."""
    if isinstance(x, fx.Proxy):
        return unmasked(x, attn_mask, is_causal), NO_MASK
    return x, from_timm(attn_mask, is_causal)


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


class ZooVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` with mechanisms in its blocks; `forward` takes the maps that they ask for by name.

    timm's models are built by timm and become of this class, so it has no constructor. What belongs to one forward is
    never kept on the model: it may be called by many threads at once, with images of several sizes.
    """

    given: Mapping[str, Given]
    """Maps that the components ask for, by name."""

    @property
    def layout(self) -> Layout:
        """How the tokens are arranged of images of the size for which the model was built."""
        return Layout(tuple(self.patch_embed.grid_size), self.num_prefix_tokens)

    @property
    def pool(self) -> Any:
        """What makes one token of all: the component at the site `pool`, or timm's method."""
        component = self._modules.get("pool")
        return partial(VisionTransformer.pool, self) if component is None else component

    def begin(
        self, x: Tensor, attn_mask: Any, is_causal: bool, given: Mapping[str, Tensor]
    ) -> tuple[Tensor, ForwardContext]:
        """What belongs to a forward of these images, with the images.

        Args:
            x: Images (b c y x).
            attn_mask: timm's mask; or what was begun before, which stays.
            is_causal: Whether later tokens are hidden.
            given: Maps by name, (b y x) or (b gy gx) each.

        Raises:
            MissingMap: AZ409, when a map is missing or does not fit.
            TypeError: When there is one too many.
        """
        if isinstance(attn_mask, ForwardContext):
            return x, attn_mask
        x, mask = masked(without_unknown(x, given, self.given), attn_mask, is_causal)
        layout, embed, image = self.layout, self.patch_embed, (x.shape[2], x.shape[3])
        if self.dynamic_img_size:
            layout = Layout(tuple(embed.dynamic_feat_size(image)), layout.prefix)
        covered = tuple(g * p for g, p in zip(layout.grid, embed.patch_size, strict=True))
        maps = {
            name: on_grid(given, name, kind, x.shape[0], image, covered, layout.grid)
            for name, kind in self.given.items()
        }
        return x, ForwardContext(layout, mask, maps, self.grad_checkpointing)

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False, **given: Tensor) -> Tensor:
        """Logits, or features.

        Args:
            x: Images (b c y x).
            attn_mask: Boolean, True = may attend; (n m), (b n m) or (b h n m).
            is_causal: Whether later tokens are hidden.
            given: The maps that the components ask for, by name: (b y x), or on the grid of the tokens.
        """
        x, context = self.begin(x, attn_mask, is_causal, given)
        return self.forward_head(self.forward_features(x, context), context=context)

    def forward_features(
        self, x: Tensor, attn_mask: Any = None, is_causal: bool = False, **given: Tensor
    ) -> Tensor:
        """Normalised tokens (b n c) of images; arguments as for `forward`."""
        x, context = self.begin(x, attn_mask, is_causal, given)
        return super().forward_features(x, context)  # type: ignore[arg-type]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Any = None,
        is_causal: bool = False,
        **given: Tensor,
    ) -> Any:
        """timm's, with maps as `forward` takes them."""
        x, context = self.begin(x, attn_mask, is_causal, given)
        return super().forward_intermediates(
            x,
            indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            output_dict=output_dict,
            attn_mask=context,  # type: ignore[arg-type]
        )

    def forward_head(
        self, x: Tensor, pre_logits: bool = False, context: ForwardContext | None = None
    ) -> Tensor:
        """Logits of tokens, or the pooled token itself.

        Args:
            x: (b n c).
            pre_logits: Whether the classifier is left out.
            context: Of the forward that they come from.
        """
        component = self._modules.get("pool")
        if component is None:
            return super().forward_head(x, pre_logits=pre_logits)
        if context is None:
            context = ForwardContext(layout_alone(component, x, self.layout, self.dynamic_img_size))
        x = self.head_drop(self.fc_norm(component(x, layout=context.layout, given=context.maps(component))))
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes.

        Args:
            num_classes: 0 for features.
            global_pool: One of timm's kinds of pooling, which takes the place of a component at the site `pool`; that
                one stays with `pool`, or when nothing is said.
        """
        if global_pool == POOL and self._modules.get(POOL) is not None:
            global_pool = None
        super().reset_classifier(num_classes, global_pool)
        if global_pool is not None:
            self._modules.pop(POOL, None)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another size of images, or of patches."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for block in self.blocks:
            cast(ZooBlock, block).layout = self.layout

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser must not decay."""
        return super().no_weight_decay() | undecayed(self)


class ZooDistilled(ZooVisionTransformer, VisionTransformerDistilled):
    """The same of timm's DeiT with a distillation token."""


CLASSES: dict[type, type[ZooVisionTransformer]] = {
    VisionTransformer: ZooVisionTransformer,
    VisionTransformerDistilled: ZooDistilled,
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
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=features,
        **timm_arguments(info.arguments),
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
    options: dict[str, Any] = {}

    def put_at(dim: int, heads: int, layer: int, block: dict[str, Any]) -> Mechanism:
        options.update(
            attn_drop=block["attn_drop"],
            proj_drop=block["proj_drop"],
            qkv_bias=block["qkv_bias"],
            proj_bias=block["proj_bias"],
            qk_norm=block["qk_norm"],
            scale_norm=block["scale_attn_norm"],
            norm=block["norm_layer"],
        )
        with where:
            return put(info.site(layer, **options)).to(dtype=dtype)

    model = model_entrypoint(info.base)(
        pretrained_cfg=dict(pretrained_cfg),
        block_fn=partial(
            ZooBlock, put=put_at, layout=info.layout, dynamic=info.dynamic, drops=info.patch_drop > 0
        ),
        device=device,
        dtype=dtype,
        **arguments | ({"global_pool": ""} if pool else {}),
    )
    if type(model) not in CLASSES:
        raise RecipeError(
            "AZ309",
            f"timm built a {type(model).__name__}, not a VisionTransformer",
            help="leave `use_naflex` out",
        )
    model.__class__, model.given = CLASSES[type(model)], dict(given)
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
        named_apply(get_init_weights_vit(model.weight_init_mode, needs_reset=False), component, POOL)
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
