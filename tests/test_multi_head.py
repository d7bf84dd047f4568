"""`MultiHead`: what it hands the heads of a context."""

import pytest
import torch

from attnzoo.core import Card, Family, Head, KVCache, Layout, Mask, MultiHead, Site

CONTEXT, LINE = Layout((2, 3), 1), Layout((7,))


class Noted(Head):
    """Keeps the layout that it is given."""

    card = Card(
        "noted",
        Family.DOT_PRODUCT,
        "a mean",
        masks={"causal"},
        context=True,
        context_grid="any",
        incremental=True,
    )
    told: Layout | None = None

    def attend(self, q, k, v, *, mask, layout):
        self.told = layout
        return v.mean(dim=2, keepdim=True).expand_as(q)


class NotedInALine(Noted):
    """Asks for no grid."""

    card = Card("in_a_line", Family.DOT_PRODUCT, "a mean", masks={"causal"}, context=True, incremental=True)


@pytest.mark.parametrize(
    ("heads", "layout", "told"),
    [
        (Noted, CONTEXT, CONTEXT),
        (Noted, None, LINE),
        (NotedInALine, CONTEXT, LINE),
        (NotedInALine, None, LINE),
    ],
    ids=["grid", "line", "grid-not-asked", "line-not-asked"],
)
@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
def test_heads_are_told_how_the_context_lies(heads, layout, told, step):
    site = Site("cross", 8, 2, Layout((5,)), context_dim=6)
    attn = MultiHead(site, heads(site))
    where = {"layout": site.layout, "context_layout": layout}
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    if step:
        attn.step(x, KVCache(), context, mask=Mask(), **where)
    else:
        attn(x, context, **where)
    assert attn.inner.told == told
