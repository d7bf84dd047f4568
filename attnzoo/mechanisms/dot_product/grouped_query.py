"""Grouped-query attention: several query heads share one head of keys and values.

Ainslie et al., "GQA", 2023, arXiv:2305.13245, §2.2; one group is multi-query attention, Shazeer, arXiv:1911.02150.
"""

from jaxtyping import Float
from torch import Tensor, nn

from attnzoo.core import NO_MASK, Card, Family, Law, Layout, Mask, Mechanism, Paper, PositiveInt, Site, Tap
from attnzoo.errors import RecipeError
from attnzoo.functional import dot_product_attention, merge_heads, split_heads


class GroupedQuery(Mechanism):
    """Softmax attention in which query head h reads keys and values of group ⌊h g / heads⌋.

    Args:
        site: Where the mechanism is put.
        groups: Number of key and value heads; must divide the heads. The heads themselves give multi-head attention,
            1 gives multi-query attention.

    Raises:
        RecipeError: AZ214, when the groups do not divide the heads.
    """

    card = Card(
        name="grouped_query",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention whose query heads share keys and values in groups.",
        paper=Paper("GQA: Training Generalized Multi-Query Transformer Models", "Ainslie et al.", 2023,
                    "arXiv:2305.13245", where="§2.2"),
        time="n m c",
        memory="h n m",
        masks={"keys", "causal", "pairs"},
        context=True,
        weights="b h n m",
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
    )  # fmt: skip

    def __init__(self, site: Site, *, groups: PositiveInt = 1):
        super().__init__(site)
        if site.heads % groups:
            raise RecipeError(
                "AZ214",
                f"`grouped_query`: {groups} groups do not divide {site.heads} heads",
                help=f"choose one of {', '.join(str(g) for g in range(1, site.heads + 1) if site.heads % g == 0)}",
            )
        self.heads, self.groups, self.attn_drop = site.heads, groups, site.attn_drop
        self.q = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
        self.kv = nn.Linear(site.context_dim or site.dim, 2 * groups * site.head_dim, bias=site.qkv_bias)
        self.q_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.k_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.scores, self.weights = Tap("b h n m"), Tap("b h n m")
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)
        self.proj_drop = nn.Dropout(site.proj_drop)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b n c"]:
        k, v = self.kv(self.source(x, context)).chunk(2, dim=-1)
        q, k, v = split_heads(self.q(x), self.heads), split_heads(k, self.groups), split_heads(v, self.groups)
        q, k = self.q_norm(q), self.k_norm(k)
        k, v = (
            t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v)
        )  # contiguous heads share
        dropout = self.attn_drop if self.training else 0.0
        out = dot_product_attention(q, k, v, mask, self.scores, self.weights, dropout)
        return self.proj_drop(self.proj(merge_heads(out)))
