"""Hebbian memory: keys are associated with values by a local rule, and queries recall them.

Qiao, "Understanding Transformers through the Lens of Pavlovian Conditioning", 2025, arXiv:2508.08289, abstract.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Fraction, Head, Law, OptionError, Paper, PositiveFloat, Site
from attnzoo.functional.associative import recalled


class Hebbian(Head):
    """S q of a memory S that each token changes, λ S + η v kᵀ: the last S or, under a causal mask, the one so far.

    Args:
        site: Where the head is put.
        rule: `hebb`, the above; `delta`, λ S + η (v - λ S k) kᵀ, which corrects what is recalled (Rescorla, Wagner); or
            `oja`, λ S + η v (k - λ Sᵀ v)ᵀ, which bounds it. Queries and keys of `delta`, values of `oja` have length 1.
        features: `none`, or `elu` for `hebb`: φ(q) and φ(k), φ = elu + 1, and weights that sum to 1.
        decay: λ, what a token leaves of the memory; above 0.
        rate: η; below 2 for `delta` and `oja`, which diverge beyond.
        learn_rate: Whether η is learned, a number for each head that starts at `rate`.

    Raises:
        OptionError: AZ214, for a decay of 0, a rate that diverges, features that mean nothing or hide a learned rate.
    """

    card = Card(
        name="hebbian",
        family=Family.LINEAR,
        summary="Unnormalised linear attention as an associative memory, by the rule of Hebb, Rescorla-Wagner or Oja.",
        equation="S_m q_i\nS_j = λ S_{j−1} + η v_j k_jᵀ",
        paper=Paper(
            "Understanding Transformers through the Lens of Pavlovian Conditioning",
            "Qiao",
            2025,
            "arXiv:2508.08289",
        ),
        time="n c d + m c d",
        memory="h n d + h d²",
        params="h if learn_rate else 0",
        flops="2 * (n + m) * c * (d + (features == 'elu')) if rule == 'hebb' else"
        " 2 * n * c * d + ceil(m / 32) * 32 * (2 * 32 * c + 4 * c * d)",
        masks={"keys", "causal"},
        context=True,
        incremental=True,
        laws={Law.LINEAR_IN_VALUES, Law.PERMUTATION_EQUIVARIANT, Law.HEADS_APART},
        fidelity="inspired",
        notes="Our reading: the abstract has the correspondence with conditioning, the rules are the textbook's. "
        "Tokens that do not exist leave the memory as it is. Only `features: elu` scales products. What depends on an "
        "order reads no context and goes by chunks of 32 tokens. ONNX cannot solve the systems of `delta` and `oja`.",
    )

    @classmethod
    def claims(cls, *, rule: str, decay: float, **options) -> Card:
        if rule == "hebb" and decay == 1:
            return cls.card
        gone = {Law.PERMUTATION_EQUIVARIANT} | ({Law.LINEAR_IN_VALUES} if rule == "oja" else set())
        return replace(cls.card, context=False, laws=cls.card.laws - gone)

    def __init__(
        self,
        site: Site,
        *,
        rule: Literal["hebb", "delta", "oja"] = "hebb",
        features: Literal["none", "elu"] = "none",
        decay: Fraction = 1.0,
        rate: PositiveFloat = 1.0,
        learn_rate: bool = False,
    ):
        super().__init__(site)
        faults = {
            "a decay of 0 leaves no memory": decay == 0,
            f"`features: elu` are for the rule `hebb`, not `{rule}`": features == "elu" and rule != "hebb",
            "a learned rate cancels in the weights of `features: elu`": features == "elu" and learn_rate,
            f"the rule `{rule}` diverges with a rate of {rate}": rule != "hebb" and rate >= 2,
        }
        for fault in (text for text, found in faults.items() if found):
            raise OptionError(f"`hebbian`: {fault}", help="change one of these options")
        self.rule, self.elu, self.decay, self.rate = rule, features == "elu", decay, rate
        self.eta = nn.Parameter(torch.empty(site.heads)) if learn_rate else None
        self.init_weights()

    def init_weights(self) -> None:
        """η as it was asked for."""
        if self.eta is not None:
            nn.init.constant_(self.eta, self.rate)

    def attend(self, q, k, v, *, mask, layout):
        dtype = v.dtype
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()  # sums over all keys overflow and lose digits
        if self.elu:
            q, k, v = F.elu(q) + 1, F.elu(k) + 1, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        if self.rule == "delta":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.rule == "oja":
            v = F.normalize(v, dim=-1)
        there = torch.ones_like(k[:, :1, :, 0])  # (b 1 m)
        if mask.keys is not None:
            absent, there = ~mask.keys[:, None, :, None], mask.keys[:, None].to(k.dtype)
            k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
        eta = self.rate if self.eta is None else self.eta[:, None, None].to(v.dtype)
        causal = mask.causal and q.shape[2] != 1  # the newest query alone reads the last memory
        if self.rule == "hebb" and not causal:
            left = there.flip(-1).cumsum(dim=-1).flip(-1) - there  # how many tokens come after
            out = q @ ((k * self.decay ** left[..., None]).mT @ (eta * v))
        else:
            out = recalled(q, k, v, there, eta, self.decay, self.rule, causal)
        if self.elu:
            out, norm = out[..., :-1], out[..., -1:]
            out = out / torch.where(norm > 0, norm, 1.0)
        return out.to(dtype)
