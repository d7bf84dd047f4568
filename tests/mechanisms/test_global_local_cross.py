"""Global-local cross-attention of DCAL, CVPR 2022, §3.2. What a ViT makes of it is in tests/test_rollout_host.py."""

import math
from decimal import Decimal

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, place, seen, set_all, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, MultiHead, Site
from attnzoo.errors import MissingMap
from attnzoo.mechanisms.cross.global_local_cross import GlobalLocalCross
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


def askers(looks, there, p, share):
    """Which tokens ask: the special ones, then of the patches that exist the ⌈share N⌉ with the largest scores."""
    ranked = sorted((i for i, exists in enumerate(there) if exists), key=lambda i: -looks[i])  # stable
    most = max(1, math.ceil(Decimal(str(share)) * len(ranked)))
    return [*range(p), *(p + i for i in ranked[:most])]


@against(GlobalLocalCross)
def test_oracle(component, options, x, layout, allowed, keys, rollout):
    """Sample by sample, asking token by asking token, head by head."""
    (b, _, c), p, heads = x.shape, layout.prefix, component.heads
    weight, bias, d = component.qkv.weight, component.qkv.bias, c // heads
    made = x @ weight.T + (0 if bias is None else bias)
    out = torch.zeros_like(x)
    for s in range(b):
        q, k, v = made[s].split(c, dim=1)
        for i in askers(rollout[s].flatten().tolist(), keys[s, p:].tolist(), p, options["share"]):
            merged = []
            for h in range(heads):
                mine, see = slice(h * d, (h + 1) * d), allowed[s, h, i]
                scores = torch.stack([q[i, mine] @ key / math.sqrt(d) for key in k[:, mine]])[see]
                weights = scores.exp() / scores.exp().sum()
                merged.append((weights[:, None] * v[see, mine]).sum(0))
            out[s, i] = F.linear(torch.cat(merged), component.proj.weight, component.proj.bias)
    return out


def mixing(change=None, after=None):
    """The mechanism by other masks or maps, or with another result."""

    def mix(self, x, source, *, mask, layout, rollout=None):
        mask, rollout = change(mask, rollout) if change else (mask, rollout)
        out = GlobalLocalCross.mix(self, x, source, mask=mask, layout=layout, rollout=rollout)
        return after(out, x, layout) if after else out

    return wrong(GlobalLocalCross, mix=mix)


def before(change):
    """The mechanism whose parameters are changed first."""

    def mix(self, x, source, *, mask, layout, rollout=None):
        with torch.no_grad():
            change(self.qkv.weight, x.shape[-1])
        return GlobalLocalCross.mix(self, x, source, mask=mask, layout=layout, rollout=rollout)

    return wrong(GlobalLocalCross, mix=mix)


def choosing(change):
    """The mechanism that chooses otherwise: from its own choice, the number of special tokens, the mask of keys."""

    def chosen(self, scores, keys, layout):
        return change(*GlobalLocalCross._chosen(self, scores, keys, layout), layout.prefix, keys)

    return wrong(GlobalLocalCross, _chosen=chosen)


def swapped(weight, c):
    weight.copy_(torch.cat([weight[c : 2 * c], weight[:c], weight[2 * c :]]))


def in_the_order_of_places(rows, asks, p, keys):
    """The same tokens ask, in another order."""
    order = rows.argsort(dim=1)
    return rows.gather(1, order), asks.gather(1, order)


def padding_asks(self, scores, keys, layout):
    return GlobalLocalCross._chosen(self, scores, None, layout)


def among_themselves(self, x, source, *, mask, layout, rollout=None):
    """Keys and values of the chosen tokens alone."""
    rows, asks = self._chosen(rollout, mask.keys, layout)
    asking = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, rows, asks)
    keys = asking if mask.keys is None else asking & mask.keys
    inner = Mask(keys=keys, pairs=mask.pairs, causal=mask.causal)
    return _with_rows(self, x, inner, layout, rows, asks)


def _with_rows(self, x, mask, layout, rows, asks):
    """The maths with a choice that was made before."""
    own = self._chosen
    self._chosen = lambda *_: (rows, asks)
    try:
        return GlobalLocalCross.mix(self, x, x, mask=mask, layout=layout)
    finally:
        self._chosen = own


def rows_of_the_mask_not_chosen(self, x, source, *, mask, layout, rollout=None):
    """The first rows of the mask, whichever tokens ask."""
    rows, asks = self._chosen(rollout, mask.keys, layout)
    n = x.shape[1]
    dense = mask.dense(n, n)
    if dense is not None:
        pairs = dense.expand(x.shape[0], -1, n, n)
        first = pairs[:, :, : rows.shape[1]]
        at = rows[:, None, :, None].expand(-1, pairs.shape[1], -1, n)
        mask = Mask(pairs=pairs.clone().scatter(2, at, first))
    return _with_rows(self, x, mask, layout, rows, asks)


def rounded_down(self, n):
    part = n * self.share.numerator // self.share.denominator
    return max(1, part) if isinstance(part, int) else part


MUTANTS = {
    "no scale": before(lambda weight, c: weight[:c].mul_(1.5)),
    "queries and keys swapped": before(swapped),
    "the smallest scores": mixing(lambda mask, r: (mask, -r)),
    "the first sample's scores": mixing(lambda mask, r: (mask, r[:1].expand_as(r))),
    "the mask ignored": mixing(lambda mask, r: (Mask(keys=mask.keys), r)),
    "keys ignored": mixing(lambda mask, r: (Mask(pairs=mask.pairs, causal=mask.causal), r)),
    "those that do not ask keep themselves": mixing(
        after=lambda out, x, _: torch.where(out.any(-1, keepdim=True), out, x)
    ),
    "special tokens do not ask": mixing(
        after=lambda out, _, layout: F.pad(out[:, layout.prefix :], (0, 0, layout.prefix, 0))
    ),
    "one fewer": choosing(lambda rows, asks, p, keys: (rows[:, : max(p + 1, rows.shape[1] - 1)], asks[:, : max(p + 1, rows.shape[1] - 1)])),
    "all ask": choosing(lambda rows, asks, p, keys: (rows, torch.ones_like(asks))),
    "padding asks": wrong(GlobalLocalCross, _chosen=padding_asks),
    "among themselves": wrong(GlobalLocalCross, mix=among_themselves),
    "the first rows of the mask": wrong(GlobalLocalCross, mix=rows_of_the_mask_not_chosen),
    "rounded down": wrong(GlobalLocalCross, _part=rounded_down),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_the_order_of_the_chosen_has_no_say():
    assert test_oracle.compare(choosing(in_the_order_of_places)).ok


LAYOUT = Layout((3, 4), 2)


def glca(layout: Layout = LAYOUT, share: float = 0.25, **site) -> GlobalLocalCross:
    """Two heads of four channels, in float64, with weights of a size that matters."""
    return spread(GlobalLocalCross(Site("hand", 8, 2, layout, **site), share=share))


def asked(part, x, looks, layout=LAYOUT, mask=None):
    """Its output for these scores."""
    return part(x, layout=layout, mask=mask or Mask(), given={"rollout": looks})


def who(out) -> list[list[int]]:
    """The tokens of each sample that received something."""
    return [row.nonzero().flatten().tolist() for row in out.abs().sum(-1)]


# By hand


def test_hand_two_of_four():
    """One channel, W = 1, tokens (0, a, 0, 0), a² = ln 3: token 1 has weights (1, 3, 1, 1) / 6, token 2 all 1/4."""
    a = math.sqrt(math.log(3))
    part = set_all(GlobalLocalCross(place(1, tokens=4, qkv_bias=False, proj_bias=False), share=0.5), 1.0)
    x, looks = line(0, a, 0, 0), torch.tensor([[0.1, 0.3, 0.4, 0.2]])
    near(asked(part, x, looks, Layout((4,))), [[[0], [a / 2], [a / 4], [0]]])
    weights = seen(part, x, layout=Layout((4,)), given={"rollout": looks})
    near(weights, [[[[1 / 4] * 4, [1 / 6, 3 / 6, 1 / 6, 1 / 6]]]])  # the largest score first


@pytest.mark.parametrize(
    ("share", "tokens", "ask"),
    [(0.1, 64, 7), (0.1, 196, 20), (0.3, 196, 59), (0.1, 10, 1), (0.7, 10, 7), (0.07, 100, 7), (0.3, 10, 3),
     (1 / 3, 9, 3), (0.0, 5, 1), (1e-9, 5, 1), (0.5, 1, 1), (1.0, 9, 9)],
)  # fmt: skip
def test_hand_how_many_ask(share, tokens, ask):
    """⌈share N⌉, at least one, of the number that was written: 0.7 · 10 is 7, though in floating point it is more."""
    layout = Layout((tokens,), 1)
    out = asked(glca(layout, share), normal(1, tokens + 1, 8), torch.rand(1, tokens), layout)
    assert len(who(out)[0]) == 1 + ask


def test_hand_equal_scores_go_by_place():
    looks = torch.tensor([[[1, 2, 2, 1], [2, 0, 2, 2], [1, 1, 1, 1]]]).float()
    x = normal(1, 14, 8)
    assert who(asked(glca(), x, looks)) == [[0, 1, 3, 4, 6]]
    assert who(asked(glca(), x, torch.zeros(1, 3, 4))) == [[0, 1, 2, 3, 4]]
    assert who(asked(glca(share=0.5), x, looks)) == [[0, 1, 2, 3, 4, 6, 8, 9]]


def test_hand_parameters_are_those_of_self_attention():
    part = GlobalLocalCross(Site("hand", 8, 2, LAYOUT))
    assert count(part) == 4 * 8 * 8 + 4 * 8
    assert {k: v.shape for k, v in part.state_dict().items()} == {
        k: v.shape for k, v in self_attention().state_dict().items()
    }
    assert count(GlobalLocalCross(Site("hand", 8, 2, LAYOUT, qkv_bias=False, proj_bias=False))) == 4 * 8 * 8


# Identities


def self_attention(**site) -> MultiHead:
    """Multi-head self-attention of the same size."""
    where = Site("hand", 8, 2, LAYOUT, **site)
    return MultiHead(where, Softmax(where)).double().eval()


@pytest.mark.parametrize("site", [{}, {"qk_norm": True}, {"qkv_bias": False, "proj_bias": False}], ids=str)
@pytest.mark.parametrize(
    "mask",
    [Mask(), Mask(causal=True), Mask(pairs=torch.rand(2, 2, 14, 14) < 0.6), Mask(torch.rand(2, 14) < 2)],
    ids=["none", "causal", "pairs", "keys"],
)
def test_identity_share_1_is_self_attention(site, mask):
    part, plain = glca(share=1.0, **site), self_attention(**site)
    plain.load_state_dict(part.state_dict())
    x = normal(2, 14, 8)
    near(asked(part, x, torch.randn(2, 3, 4), mask=mask), plain(x, layout=LAYOUT, mask=mask))


def test_identity_those_that_ask_receive_what_self_attention_gives():
    part, plain, x = glca(), self_attention(), normal(2, 14, 8)
    plain.load_state_dict(part.state_dict())
    looks = torch.rand(2, 3, 4)
    out, whole = asked(part, x, looks), plain(x, layout=LAYOUT)
    for sample in range(2):
        best = looks[sample].flatten().topk(3).indices
        rows = sorted([0, 1, *(2 + best).tolist()])
        assert who(out)[sample] == rows
        near(out[sample, rows], whole[sample, rows])


@pytest.mark.parametrize("factor", [3.7, 1e-20, 2.0**100])
def test_identity_a_positive_factor_of_the_scores_changes_nothing(factor):
    part, x = glca(), normal(2, 14, 8)
    looks = torch.rand(2, 3, 4, dtype=torch.float64)
    assert torch.equal(asked(part, x, looks), asked(part, x, factor * looks))


def test_identity_other_numbers_in_the_same_order_change_nothing():
    part, x, looks = glca(), normal(2, 14, 8), torch.randn(2, 3, 4)
    ranks = looks.flatten(1).argsort(1).argsort(1).reshape(2, 3, 4)
    assert torch.equal(asked(part, x, looks), asked(part, x, ranks.float()))


def test_identity_padding_is_as_if_it_were_not_there():
    """Who asks, how many, and what they receive: as in a picture of the rows that exist, whatever lies in the others."""
    x, looks = normal(1, 14, 8), torch.rand(1, 3, 4)
    small = Layout((2, 4), 2)
    keys = torch.arange(14)[None] < 10
    for share in (0.1, 0.25, 0.5, 0.9, 1.0):
        part = glca(share=share)
        alone = asked(part, x[:, :10], looks[:, :2], small)
        for more in (0.0, 5.0):
            padded, scored = x.clone(), looks.clone()
            padded[:, 10:] += more
            scored[:, 2] += more
            out = asked(part, padded, scored, mask=Mask(keys=keys))
            near(out[:, :10], alone)
            assert not out[:, 10:].any()


def test_where_no_patch_exists_special_tokens_ask():
    part, x = glca(), normal(1, 14, 8).requires_grad_()
    out = asked(part, x, torch.rand(1, 3, 4), mask=Mask(keys=torch.arange(14)[None] < 2))
    assert who(out) == [[0, 1]]
    out.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad[:, :2].any() and not x.grad[:, 2:].any()


def test_a_score_of_minus_infinity_goes_before_padding():
    looks = torch.full((1, 3, 4), -math.inf)
    keys = torch.ones(1, 14, dtype=torch.bool)
    keys[:, 2:7] = False
    out = asked(glca(share=0.3), normal(1, 14, 8), looks, mask=Mask(keys=keys))
    assert who(out) == [[0, 1, 7, 8, 9]]


# What it is for


def test_all_tokens_are_read_and_the_choice_has_no_gradient():
    part, x, looks = glca(), normal(2, 14, 8).requires_grad_(), torch.rand(2, 3, 4).requires_grad_()
    out = asked(part, x, looks)
    assert who(out) != [list(range(14))] * 2
    out.square().sum().backward()
    assert x.grad.abs().sum(-1).gt(0).all() and looks.grad is None


def test_taps_show_those_that_ask():
    """Rows are the special tokens, then the patches from the largest score on; where fewer exist the last are empty."""
    part, x = glca(share=0.5), normal(1, 14, 8)
    looks, keys = torch.rand(1, 3, 4), torch.arange(14)[None] < 6
    weights = seen(part, x, layout=LAYOUT, given={"rollout": looks})
    assert weights.shape == (1, 2, 8, 14)
    near(weights.sum(-1), torch.ones(1, 2, 8))
    fewer = seen(part, x, layout=LAYOUT, mask=Mask(keys=keys), given={"rollout": looks})
    assert fewer.shape == weights.shape and not fewer[..., 6:].any()
    near(fewer.sum(-1), torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]).expand(1, 2, 8))


def test_one_map_for_all_is_refused_where_it_is_missing():
    with pytest.raises(MissingMap, match="AZ409.*`global_local_cross` needs the map `rollout`"):
        glca()(normal(1, 14, 8), layout=LAYOUT)
    with pytest.raises(MissingMap, match="AZ409.*shape"):
        asked(glca(), normal(1, 14, 8), torch.rand(1, 4, 3))


def test_narrow_numbers_stay_near():
    looks = torch.rand(2, 7)
    narrow(GlobalLocalCross, [(2, 7, 12)], site=place(12, 3, 7), given={"rollout": looks}, share=0.5)
