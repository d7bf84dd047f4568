"""Dual cross-attention learning: three losses of one ViT, weighed by how uncertain each is, of which two answer.

Zhu et al., "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification", CVPR
2022, §3.4; the weights of the losses after Kendall et al., as in FairMOT.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import MultiHead, Tap
from attnzoo.errors import ZooError
from attnzoo.hosts.vision_transformer import ZooPreNormBlock, ZooVisionTransformer


class DualCrossTransformer(ZooVisionTransformer):
    """A ViT with a classifier behind its blocks of self-attention (SA) and one behind `global_local_cross` (GLCA).

    In training a third pass through the blocks of self-attention is disturbed (PWCA): in every block the tokens of
    another image, as self-attention made them, join the own ones as keys and values. It shares all weights with SA and
    its classifier; its label is that of the own image. The other image is the one before in the batch, so an image that
    is alone in its batch meets itself, which changes nothing.

        loss = model(images, targets=labels).mean()      # ½ Σ_k (e^{-w_k} L_k + w_k), k = SA, GLCA, PWCA
        probabilities = model.eval()(images).exp()       # ½ (p_SA + p_GLCA)

    `dual_cross` makes one of a model, `train: {method: dual_cross}` in a recipe as well. Maps, taps and sites are those
    of the model.
    """

    norm_self: nn.Module
    head_self: nn.Linear
    uncertainty: nn.Parameter
    """w_k, log-variances of SA, GLCA and PWCA, (3,); 0 at first."""

    def forward(  # type: ignore[override]  # what stands behind `*` is no map
        self,
        x: Tensor,
        attn_mask: Any = None,
        is_causal: bool = False,
        *,
        targets: Tensor | None = None,
        label_smoothing: float = 0.0,
        **given: Tensor,
    ) -> Tensor:
        """The logarithm of ½ (p_SA + p_GLCA), (b classes); with targets what is minimised, (b,), in nats.

        Args:
            x: Images (b c y x).
            attn_mask, is_causal: As for any ViT; not with targets.
            targets: Labels (b,), or shares of the classes (b classes).
            label_smoothing: Share of a target that goes to all classes.
            given: The maps that the components ask for, by name.

        Raises:
            ZooError: AZ326, for targets with a mask.
        """
        if targets is not None and (attn_mask is not None or is_causal):
            raise ZooError("AZ326", "dual cross-attention learning has no masks", help="leave the mask out")
        x, context = self.begin(x, attn_mask, is_causal, given)
        stream = [self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))]
        *blocks, last = (cast(ZooPreNormBlock, block) for block in self.blocks)
        for block in blocks:
            stream.append(block(stream[-1], context))
        by_self = self.logits_self(stream[-1])
        by_local = self.forward_head(self.norm(last(stream[-1], context)), context=context)
        if targets is None:
            both = torch.stack([by_self, by_local]).log_softmax(dim=-1)
            return both.logsumexp(dim=0) - math.log(2)
        disturbed = stream[0]
        for block, tokens in zip(blocks, stream, strict=False):
            disturbed = paired(block, disturbed, tokens.roll(1, 0))
        at_least = torch.promote_types(by_self.dtype, torch.float32)
        logits = by_self, by_local, self.logits_self(disturbed)
        how: Any = {"reduction": "none", "label_smoothing": label_smoothing}
        return self.balanced([F.cross_entropy(each.to(at_least), targets, **how) for each in logits])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes, for both classifiers.

        Args:
            num_classes: 1 or more.
            global_pool: `token`, or None.

        Raises:
            ValueError: When there shall be no classes, or tokens are to be pooled.
        """
        if num_classes < 1 or global_pool not in (None, "token"):
            raise ValueError("both classifiers read class tokens, and have one class or more")
        super().reset_classifier(num_classes, global_pool)
        self.head_self = self._head()

    def _head(self) -> nn.Linear:
        """A classifier like that of the model, with weights of its own."""
        head = cast(nn.Linear, self.head)
        own = nn.Linear(head.in_features, head.out_features).to(head.weight)
        trunc_normal_(own.weight, std=0.02)
        nn.init.zeros_(own.bias)
        return own

    def logits_self(self, tokens: Tensor) -> Tensor:
        """Logits (b classes) of the tokens (b n c) behind the blocks of self-attention."""
        return self.head_self(self.head_drop(self.norm_self(tokens)[:, 0]))

    def balanced(self, losses: Sequence[Tensor]) -> Tensor:
        """½ Σ_k (e^{-w_k} L_k + w_k) of the losses of SA, GLCA and PWCA, each of the same shape."""
        weighed = [torch.exp(-w) * loss + w for w, loss in zip(self.uncertainty, losses, strict=True)]
        return torch.stack(weighed).sum(dim=0) / 2


def paired(block: ZooPreNormBlock, own: Tensor, other: Tensor) -> Tensor:
    """Tokens (b n c) after a block in which those of another image join the own ones as keys and values.

    softmax(q₁ [k₁; k₂]ᵀ / √d) [v₁; v₂], as `pairwise_cross`, by the block's own projections.

    Args:
        block: With `softmax` at its site.
        own: (b n c).
        other: Of the other image, (b m c).
    """
    attn = cast(MultiHead, block.attn)
    q, k, v = attn.project(block.norm1(own))
    _, k2, v2 = attn.project(block.norm1(other))
    drop = cast(Tap, attn.inner.weights).dropout if block.training else 0.0
    heads = F.scaled_dot_product_attention(q, torch.cat([k, k2], 2), torch.cat([v, v2], 2), dropout_p=drop)
    own = own + block.drop_path1(block.ls1(attn.proj_drop(attn.merge(heads))))
    return own + block.drop_path2(block.ls2(block.mlp(block.norm2(own))))


def dual_cross(model: nn.Module) -> DualCrossTransformer:
    """The model as one of dual cross-attention learning: itself, with a second classifier and three weights more.

    Args:
        model: A composed ViT whose class is read from the class token, with `softmax` in all blocks but the last, and
            `global_local_cross` there.

    Raises:
        ZooError: AZ326, when it is another.
    """
    if reason := _other(model):
        raise ZooError(
            "AZ326",
            "dual cross-attention learning does not fit this model",
            why=reason,
            help="take a ViT with a class token, `softmax` in all blocks but the last and `global_local_cross` there: "
            "`attnzoo show dcal`",
        )
    learner = cast(DualCrossTransformer, model)
    learner.__class__ = DualCrossTransformer
    learner.norm_self, learner.head_self = deepcopy(learner.norm), learner._head()
    learner.uncertainty = nn.Parameter(cast(nn.Linear, learner.head).weight.new_zeros(3))
    return learner


def _other(model: Any) -> str:
    """Why a model cannot learn so; empty when it can."""
    if type(model) is not ZooVisionTransformer or not all(type(b) is ZooPreNormBlock for b in model.blocks):
        return f"it is a {type(model).__name__}, and no composed ViT with plain blocks"
    blocks: list[Any] = list(model.blocks)
    *first, last = (block.attn.card.name for block in blocks)
    if last != "global_local_cross" or set(first) != {"softmax"}:
        return f"its blocks hold {', '.join([*first, last])}"
    skips = [skip for block in blocks for skip in (block.skip, block.attn_skip)]
    skips += [block.attn.skip for block in blocks[:-1]]
    if any(type(skip) is not nn.Identity for skip in skips):
        return "its layers have skips between them"
    if model.global_pool != "token" or not isinstance(model.head, nn.Linear):
        return "its classes are not read from the class token"
    return ""
