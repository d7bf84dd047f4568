"""What timm's vision transformers have in common as hosts: what belongs to one forward, blocks, models."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from timm.models import checkpoint
from torch import Tensor, fx, nn

from attnzoo.core import NO_MASK, Layout, Mask, Mechanism
from attnzoo.core.card import ROLLOUT, Given
from attnzoo.errors import LayoutMismatch, UnsupportedMask
from attnzoo.hosts.given import on_grid, without_unknown
from attnzoo.hosts.info import POOL, undecayed
from attnzoo.hosts.rollout import asks, class_row
from attnzoo.hosts.skip import carried


@dataclass(eq=False)
class ForwardContext:
    """What belongs to one forward. The model makes it and hands it from block to block in the place of timm's mask.

    Args:
        layout: How the tokens are arranged.
        mask: Who may attend to whom.
        given: Maps on the grid by name, (b gy gx) each.
        checkpoint: Whether blocks are computed a second time in the backward pass.
        handed: What each block handed on, by its index.
    """

    layout: Layout
    mask: Mask = NO_MASK
    given: Mapping[str, Tensor] = field(default_factory=dict)
    checkpoint: bool = False
    handed: dict[int, Tensor | None] = field(default_factory=dict)

    def maps(self, component: Any, layer: int) -> Mapping[str, Tensor]:
        """The maps for a component, with the rollout of the layers before where it asks for that.

        Args:
            component: It.
            layer: Index of its block; the number of blocks for what is behind all.
        """
        if not asks(component.card):
            return self.given
        return {**self.given, ROLLOUT: class_row(self.handed.get(layer - 1), self.layout)}


class ZooBlock(nn.Module):
    """A block with a mechanism in the place of its attention; stands in front of a class of timm's.

    Classes that combine the two say in `mix` what the block computes, with `attend` in the place of the attention.
    """

    attn: Mechanism
    layout: Layout
    carries = False
    """Whether something is handed on from the block before, to the next."""

    def seat(self, attn: Mechanism, layer: int, layout: Layout, *, dynamic: bool, drops: bool) -> None:
        """Put a mechanism there.

        Args:
            attn: It.
            layer: Index of the block.
            layout: How tokens are arranged of images of the size for which the model was built.
            dynamic: Whether images may have another size.
            drops: Whether patches are dropped in training.
        """
        self.attn, self.layer, self.layout, self.dynamic, self.drops = attn, layer, layout, dynamic, drops
        self.attn_skip: nn.Module = nn.Identity()
        self.skip: nn.Module = nn.Identity()

    def forward(
        self, x: Tensor, attn_mask: Tensor | ForwardContext | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (b n c) after the block.

        Args:
            x: (b n c).
            attn_mask: What the model hands on; timm's mask where somebody calls a block on its own.
            is_causal: Whether later tokens are hidden.
        """
        x, context = self.enter(x, attn_mask, is_causal)
        return self.run(x, context, context.layout, again=context.checkpoint)

    def enter(
        self, x: Tensor, attn_mask: Tensor | ForwardContext | None, is_causal: bool
    ) -> tuple[Tensor, ForwardContext]:
        """The tokens, and what belongs to their forward; arguments as for `forward`."""
        if isinstance(attn_mask, ForwardContext):
            return x, attn_mask
        x, mask = masked(x, attn_mask, is_causal)
        return x, ForwardContext(layout_alone(self.attn, x, self.layout, self.dynamic), mask)

    def run(self, x: Tensor, context: ForwardContext, layout: Layout, *, again: bool) -> Tensor:
        """Tokens (b n c) after the block, with what blocks hand on.

        Args:
            x: (b n c).
            context: Of this forward.
            layout: How x is arranged, unless patches are dropped.
            again: Whether the block is computed a second time in the backward pass.
        """
        seen = layout, context.mask, context.maps(self.attn, self.layer)
        if not self.carries:
            return checkpoint(self.mix, x, *seen) if again else self.mix(x, *seen)
        step = partial(checkpoint, carried) if again else carried
        # by the index, so that a block that is computed again finds what it found at first
        x, context.handed[self.layer] = step(self.mix, context.handed.get(self.layer - 1), x, *seen)
        return x

    def mix(self, x: Tensor, layout: Layout, mask: Mask, given: Mapping[str, Tensor]) -> Tensor:
        """Attention and MLP with their residuals; all that it depends on are its arguments."""
        raise NotImplementedError

    def attend(self, x: Tensor, layout: Layout, mask: Mask, given: Mapping[str, Tensor]) -> Tensor:
        """What the mechanism gives for tokens (b n c)."""
        if self.drops and not isinstance(x, fx.Proxy) and x.shape[1] != layout.length:
            # some patches were dropped, and the others have no grid
            layout = replace(layout, grid=(x.shape[1] - layout.prefix,))
        return self.attn_skip(self.attn(x, mask=mask, layout=layout, given=given))


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


class ZooModel(nn.Module):
    """A model with mechanisms in its blocks; stands in front of a class of timm's.

    `forward` takes the maps that the mechanisms ask for by name. timm's models are built by timm and become of such a
    class, so it has no constructor. What belongs to one forward is never kept on the model: it may be called by many
    threads at once, with images of several sizes.
    """

    blocks: nn.Sequential | nn.ModuleList
    patch_embed: Any
    num_prefix_tokens: int
    dynamic_img_size: bool
    grad_checkpointing: bool
    fc_norm: nn.Module
    head_drop: nn.Module
    head: nn.Module
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
        return super().pool if component is None else component  # type: ignore[misc]

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
        side = embed.feat_ratio(as_scalar=False)  # rows and columns of a token, in pixels
        covered = tuple(g * p for g, p in zip(layout.grid, side, strict=True))
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
        return super().forward_features(x, context)  # type: ignore[misc]

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
        return super().forward_intermediates(  # type: ignore[misc]
            x,
            indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            attn_mask=context,
            **({"output_dict": True} if output_dict else {}),  # which not all of timm's models take
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
            return super().forward_head(x, pre_logits=pre_logits)  # type: ignore[misc]
        if context is None:
            context = ForwardContext(layout_alone(component, x, self.layout, self.dynamic_img_size))
        maps = context.maps(component, len(self.blocks))
        x = self.head_drop(self.fc_norm(component(x, layout=context.layout, given=maps)))
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
        super().reset_classifier(num_classes, global_pool)  # type: ignore[misc]
        if global_pool is not None:
            self._modules.pop(POOL, None)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another size of images, or of patches."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)  # type: ignore[misc]
        for block in self.blocks:
            cast(ZooBlock, block).layout = self.layout

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser must not decay."""
        return super().no_weight_decay() | undecayed(self)  # type: ignore[misc]
