"""Projections around a head."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core.head import Head
from attnzoo.core.kv_cache import KVCache
from attnzoo.core.layout import Layout
from attnzoo.core.mask import Mask
from attnzoo.core.mechanism import Mechanism
from attnzoo.core.site import Site


@final
class MultiHead(Mechanism):
    """Projections around a head: qkv -> attend -> merge -> proj, with as many heads as these are wide.

    With a `softmax` head its state-dict keys are timm's (`qkv.*`, `proj.*`, ...) and so is its arithmetic, so that
    timm's checkpoints load and give timm's numbers.

    Args:
        site: Where it is put.
        head: What happens inside the heads, built for the same site.
    """

    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(self, site: Site, head: Head):
        self.card = head.card
        super().__init__(site)
        self.head_dim, self.dim = site.head_dim, site.dim
        self.qkv_fused, self.sharing = site.qkv_fused, 1  # heads of queries for each of keys and values
        self.register_parameter("q_bias", None)
        self.register_parameter("v_bias", None)
        if site.context_dim is not None:
            self.q = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
            self.kv = nn.Linear(site.context_dim, 2 * site.dim, bias=site.qkv_bias)
        elif site.qkv_fused:
            self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias and site.k_bias)
            if site.qkv_bias and not site.k_bias:
                self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(site.dim)) for _ in range(2))
        else:
            self.sharing = site.heads // site.key_heads(site.kv_heads or site.heads)
            width = site.dim // self.sharing
            self.q_proj = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
            self.k_proj = nn.Linear(site.dim, width, bias=site.qkv_bias and site.k_bias)
            self.v_proj = nn.Linear(site.dim, width, bias=site.qkv_bias)
        self.q_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.k_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.inner = head
        self.norm = site.norm(site.dim) if site.scale_norm else nn.Identity()
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)
        self.rotary, self.rotation = site.rotary, site.rotation
        self.skip: nn.Module = nn.Identity()  # hosts put here what joins the merged heads of two layers

    def queries(self, x: Tensor) -> Tensor:
        """Queries for a context, (b h n d)."""
        return self.q_norm(self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2))

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context, (b h m d) each."""
        k, v = self.kv(context).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
        return self.k_norm(k.transpose(1, 2)), v.transpose(1, 2)

    def project(
        self, x: Tensor, first: int = 0, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens themselves, (b h n d) each.

        Args:
            x: (b n c).
            first: Position of the first token.
            layout: How x is arranged, where positions turn; a line when None.
        """
        q, k, v = self._fused(x) if self.qkv_fused else self._separate(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            turn = (layout or Layout((x.shape[1],))).turn
            q, k = turn(q, first).type_as(v), turn(k, first).type_as(v)
        if self.sharing > 1:
            k, v = (t.repeat_interleave(self.sharing, dim=1) for t in (k, v))
        return q, k, v

    def _fused(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values by one projection."""
        if self.q_bias is None or self.v_bias is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            # in one step, as timm does, which rounds otherwise; what somebody put there adds its own
            plain = type(self.qkv) is nn.Linear
            qkv = F.linear(x, self.qkv.weight, bias) if plain else self.qkv(x) + bias
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(2)  # backward, one copy to where they lay
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _separate(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values by a projection of each; the last two may have fewer heads."""
        projections = self.q_proj, self.k_proj, self.v_proj
        return tuple(layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in projections)

    def merge(self, heads: Tensor) -> Tensor:
        """Heads (b h n d) as tokens (b n c), projected."""
        return self.proj(self.norm(self.skip(heads.transpose(1, 2).flatten(2))))

    def mix(self, x, source, *, mask: Mask, layout: Layout, context_layout: Layout | None = None, **given):
        if self.context_dim is None:
            q, k, v = self.project(x, layout=layout)
        else:
            q, (k, v) = self.queries(x), self.read(source)
            layout = self._of_context(source, context_layout)
        return self.merge(self.inner(q, k, v, mask=mask, layout=layout, given=given))

    def _of_context(self, source: Tensor, layout: Layout | None) -> Layout:
        """What heads are told of how a context (b m e) lies: a line, unless their card asks for its grid."""
        asked = layout if self.card.context_grid is not None else None
        return asked or Layout((source.shape[1],))

    def step(
        self,
        x: Float[Tensor, "b n c"],
        cache: KVCache,
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask,
        layout: Layout,
        context_layout: Layout | None = None,
    ) -> Float[Tensor, "b n c"]:
        if not self.inner.card.incremental:
            return super().step(x, cache, context, mask=mask, layout=layout, context_layout=context_layout)
        source = self.source(x, context)
        if context is None:
            q, k, v = self.project(x, cache.length, layout)
            k, v = cache.extend(k, v)
        else:
            q = self.queries(x)
            k, v = cache.keep(lambda: self.read(source))
            layout = self._of_context(source, context_layout)
        return self.proj_drop(self.merge(self.inner(q, k, v, mask=mask, layout=layout)))
