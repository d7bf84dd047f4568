"""Grouped-query attention: several query heads share one head of keys and values.

Ainslie et al., "GQA", 2023, arXiv:2305.13245, §2.2; one group is multi-query attention, Shazeer, arXiv:1911.02150.
"""

from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import dot_product_attention, merge_heads, split_heads


class GroupedQuery(Mechanism):
    """Softmax attention in which query head h of H reads keys and values of group ⌊h g / H⌋ of g, counted from 0.

    Args:
        site: Where the mechanism is put.
        groups: Number of key and value heads; must divide the heads. The heads themselves give multi-head attention,
            1 gives multi-query attention.

    Raises:
        OptionError: AZ214, when the groups do not divide the heads.
    """

    card = Card(
        name="grouped_query",
        family=Family.PROJECTION,
        summary="Softmax attention whose query heads share keys and values in groups.",
        equation="W_o [o_0; …; o_{H−1}]\no_h = softmax(q_h k_jᵀ / √d) v_j,  j = ⌊h g / H⌋",
        paper=Paper(
            "GQA: Training Generalized Multi-Query Transformer Models",
            "Ainslie et al.",
            2023,
            "arXiv:2305.13245",
            where="§2.2",
        ),
        time="n m c + n c c",
        memory="h n m",
        params="(c + qkv_bias) * c + 2 * (e + qkv_bias) * groups * d + 4 * qk_norm * d + (c + proj_bias) * c",
        flops="4 * n * c**2 + 4 * m * e * groups * d + 4 * n * m * c",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        honours={"qkv_bias", "proj_bias", "qk_norm"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="Decoding keeps keys and values of the groups, 2 g d numbers of a token. Out of multi-head attention the "
        "paper makes those of a group as the means of its heads'.",
    )

    def __init__(self, site: Site, *, groups: PositiveInt = 1):
        super().__init__(site)
        if site.heads % groups:
            divisors = ", ".join(str(g) for g in range(1, site.heads + 1) if site.heads % g == 0)
            raise OptionError(
                f"`grouped_query`: {groups} groups do not divide {site.heads} heads",
                help=f"choose one of {divisors}",
            )
        self.groups = groups
        self.q = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
        self.kv = nn.Linear(site.context_dim or site.dim, 2 * groups * site.head_dim, bias=site.qkv_bias)
        self.q_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.k_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout):
        k, v = self._read(source)
        return self._merged(x, k, v, mask)

    def step(self, x, cache, context=None, *, mask, layout, context_layout=None):
        source = self.source(x, context)
        own = context is None
        k, v = cache.extend(*self._read(source)) if own else cache.keep(lambda: self._read(source))
        return self.proj_drop(self._merged(x, k, v, mask))

    def _read(self, source):
        """Keys and values of the groups, (b g m d) each."""
        k, v = (split_heads(t, self.groups) for t in self.kv(source).chunk(2, dim=-1))
        return self.k_norm(k), v

    def _merged(self, x, k, v, mask):
        """What tokens (b n c) receive of keys and values of the groups, projected."""
        q = self.q_norm(split_heads(self.q(x), self.heads))
        # contiguous heads share
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        return self.proj(merge_heads(dot_product_attention(self, q, k, v, mask)))
