"""timm's `Eva` as a host: EVA-02, DINOv3, PE and their like, whose rotary positions turn queries and keys.

timm makes the sines and cosines of a forward and hands them to every block; the block puts them into the layout, and
who projects queries and keys turns them (`Layout.turn`). `Eva` has no `block_fn`: timm builds its blocks, and they
become of classes of ours.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm, checkpoint_filter_fn
from torch import Tensor, nn

from attnzoo.core import Layout, Mask, Mechanism, Rotation
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.hosts.info import init_parts
from attnzoo.hosts.timm_vit import ForwardContext, ZooBlock, ZooModel

__all__ = [
    "BLOCKS",
    "ZooEva",
    "attention_of",
    "check_heads",
    "checkpoint_filter_fn",
    "put_into",
    "translated",
]

_WORDS = {
    "reg_tokens": "num_reg_tokens",
    "pre_norm": "use_pre_transformer_norm",
    "final_norm": "use_post_transformer_norm",
    "fc_norm": "use_fc_norm",
}
"""What `VisionTransformer` calls its arguments, and what `Eva` does."""


FOUR = "choose `embed_dim` and `num_heads` so that heads have a multiple of 4 channels"
"""What to do about heads of other sizes."""


def translated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `VisionTransformer`, as recipes say them, in the words of `Eva`."""
    out = {_WORDS.get(name, name): value for name, value in arguments.items()}
    if "pos_embed" in out:
        out["use_abs_pos_emb"] = out.pop("pos_embed") != "none"
    return out


def check_heads(base: str, model: Eva) -> None:
    """Refuse heads that timm's rotary positions cannot turn by rows and by columns.

    Args:
        base: Name of the model.
        model: As timm built it.

    Raises:
        RecipeError: AZ316.
    """
    attn = cast(Any, model.blocks[0]).attn
    size = attn.head_dim
    if model.embed_dim % attn.num_heads:
        return  # AZ308 says so
    if model.rope is not None and size % (2 if hasattr(model.rope, "mrope_section") else 4):
        raise RecipeError(
            "AZ316",
            f"the rotary positions of `{base}` turn pairs of channels by rows and by columns; its heads have {size}",
            help=FOUR,
        )


def attention_of(model: Eva) -> tuple[dict[str, Any], ...]:
    """What the attention of each block is asked for, as a `Site` says it.

    Args:
        model: As timm built it.
    """
    return tuple(_asked(model, cast(Any, block)) for block in model.blocks)


def _asked(model: Eva, block: Any) -> dict[str, Any]:
    attn, norm = block.attn, block.norm1
    fused = attn.qkv is not None
    first = attn.qkv if fused else attn.q_proj
    beside = getattr(attn, "q_bias", None) is not None  # biases of queries and values, and none of keys
    last = attn.qkv if fused else attn.k_proj
    asked: dict[str, Any] = {
        "attn_drop": attn.attn_drop.p,
        "proj_drop": attn.proj_drop.p,
        "qkv_bias": beside or first.bias is not None,
        "k_bias": last.bias is not None or not (beside or first.bias is not None),
        "qkv_fused": fused,
        "kv_heads": getattr(attn, "num_kv_heads", None) if not fused else None,
        "proj_bias": attn.proj.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "scale_norm": not isinstance(attn.norm, nn.Identity),
        "norm": partial(type(norm), eps=norm.eps),
    }
    if model.rope is not None:
        heads = attn.num_heads if model.rope_mixed else 1
        asked |= {"rotary": True, "rotation": (heads, attn.head_dim)}
    return asked


class ZooEvaBlock(ZooBlock, EvaBlock):
    """timm's block with norms before, as `ZooBlock`; takes sines and cosines as timm's does."""

    turns: bool
    halves: bool

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | ForwardContext | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Tokens (b n c) after the block.

        Args:
            x: (b n c).
            rope: Sines and cosines of the grid tokens, (... n 2d).
            attn_mask: What the model hands on; timm's mask where somebody calls a block on its own.
            is_causal: Whether later tokens are hidden.

        Raises:
            LayoutMismatch: AZ401, when positions turn queries and keys, and `rope` is not there.
        """
        if self.turns and rope is None:
            raise LayoutMismatch(
                "AZ401",
                "this block turns queries and keys by their positions, and they were not given",
                help="call the model, or hand the block `rope=model.rope.get_embed(shape=...)`",
            )
        x, context = self.enter(x, attn_mask, is_causal)
        layout = context.layout
        if rope is not None:
            layout = replace(layout, rotation=Rotation(rope, self.halves))
        return self.run(x, context, layout, again=False)  # timm's loop computes blocks again

    def mix(self, x: Tensor, layout: Layout, mask: Mask, given: Mapping[str, Tensor]) -> Tensor:
        mixed = self.attend(self.norm1(x), layout, mask, given)
        x = x + self.drop_path1(mixed if self.gamma_1 is None else self.gamma_1 * mixed)
        out = self.mlp(self.norm2(x))
        return self.skip(x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out))


class ZooEvaBlockPostNorm(ZooEvaBlock, EvaBlockPostNorm):
    """The same of timm's block with norms after."""

    def mix(self, x: Tensor, layout: Layout, mask: Mask, given: Mapping[str, Tensor]) -> Tensor:
        x = x + self.drop_path1(self.norm1(self.attend(x, layout, mask, given)))
        return self.skip(x + self.drop_path2(self.norm2(self.mlp(x))))


BLOCKS: dict[type, type[ZooEvaBlock]] = {EvaBlock: ZooEvaBlock, EvaBlockPostNorm: ZooEvaBlockPostNorm}
"""What timm's blocks become."""


class ZooEva(ZooModel, Eva):
    """timm's `Eva` with mechanisms in its blocks."""

    def init_weights(self, needs_reset: bool = True) -> None:
        """timm's initialisation, then that of components."""
        super().init_weights(needs_reset=needs_reset)
        init_parts(self)

    @torch.no_grad()
    def fix_init_weight(self) -> None:
        """Scale the last layers of each block by its depth, where a mechanism has one called `proj`."""
        for layer, block in enumerate(self.blocks):
            last = getattr(block.attn, "proj", None), cast(Any, block.mlp).fc2
            for linear in last:
                if isinstance(linear, nn.Linear):
                    linear.weight.div_(math.sqrt(2 * (layer + 1)))


def put_into(
    model: Eva, put: Callable[[int], Mechanism], layout: Layout, *, dynamic: bool, drops: bool
) -> None:
    """Let a model become of our class, with mechanisms in its blocks.

    Args:
        model: As timm built it.
        put: Builds the mechanism of a block, by its index.
        layout: How tokens are arranged of images of the size for which it was built.
        dynamic: Whether images may have another size.
        drops: Whether patches are dropped in training.
    """
    for layer, timms in enumerate(model.blocks):
        block, halves = cast(Any, timms), cast(Any, timms).attn.rotate_half
        block.__class__ = BLOCKS[type(block)]
        block.turns, block.halves = model.rope is not None, halves
        block.seat(put(layer), layer, layout, dynamic=dynamic, drops=drops)
    model.__class__ = ZooEva
    model.init_weights(needs_reset=False)
