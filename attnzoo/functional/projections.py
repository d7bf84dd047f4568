"""Queries, keys and values as `MultiHead` makes them, for mechanisms that do something with them before the heads."""

from torch import Tensor, nn

from attnzoo.core import Mechanism, Site


class Projected(Mechanism):
    """What mechanisms with the projections of `MultiHead` have in common; the state-dict keys are the same.

    One layer, `qkv`, makes all of the tokens themselves; at a site with a context `q` makes queries of the tokens, and
    `kv` keys and values of the context.
    """

    def add_projections(self, site: Site) -> None:
        """The layers, and `q_norm` and `k_norm` for the heads; to be called in `__init__`.

        Args:
            site: Where the mechanism is put.
        """
        if site.context_dim is None:
            self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias)
        else:
            self.q = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
            self.kv = nn.Linear(site.context_dim, 2 * site.dim, bias=site.qkv_bias)
        self.q_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.k_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()

    def projected(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b n c), keys and values (b m c), before heads and norms.

        Args:
            x: Tokens (b n c).
            source: What is read from: the context (b m e), or x itself.
        """
        if self.context_dim is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, (k, v) = self.q(x), self.kv(source).chunk(2, dim=-1)
        return q, k, v
