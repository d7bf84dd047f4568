"""ALiBi, arXiv:2108.12409, §3."""

import math
from unittest.mock import patch

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, wrong

from attnzoo.core import KVCache, Layout, Mask, MultiHead, Site
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product import alibi
from attnzoo.mechanisms.dot_product.alibi import Alibi, slopes
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


def slope(h: int, heads: int) -> float:
    """The h-th of `heads`, from 0, as the paper's footnote says."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    if h < power:
        return 2 ** (-8 / power * (h + 1))
    return 2 ** (-8 / (2 * power) * (2 * (h - power) + 1))


def apart(i: int, j: int, layout: Layout, form: str) -> float:
    """The distance of two tokens."""
    if form == "sequence":
        return abs(i - j)
    if i < layout.prefix or j < layout.prefix:
        return 0
    places = []
    for token in (i, j):
        place, rest = [], token - layout.prefix
        for side in reversed(layout.grid):
            place.insert(0, rest % side)
            rest //= side
        places.append(place)
    steps = [abs(a - b) for a, b in zip(*places, strict=True)]
    return sum(steps) if form == "l1" else math.sqrt(sum(step**2 for step in steps))


@against(Alibi, examples=50)
def test_oracle(options, q, k, v, allowed, layout):
    """exp(q_i·k_j / √d - m_h |i - j|) over its sum, times v, over the keys that are seen."""
    out, later = torch.zeros_like(q), k.shape[2] - q.shape[2]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        see = allowed[b, h, i].nonzero()[:, 0].tolist()
        if see:
            far = [apart(i + later, j, layout, options["distance"]) for j in see]
            scores = k[b, h, see] @ q[b, h, i] / math.sqrt(q.shape[3])
            weights = (scores - slope(h, q.shape[1]) * torch.tensor(far, dtype=torch.float64)).softmax(0)
            out[b, h, i] = weights @ v[b, h, see]
    return out


def with_fault(
    turn=lambda q, k: (q, k), slope=lambda m: m, far=lambda f: f, hide=lambda a: a, inside=1.0, dim=-1
):  # fmt: skip
    """ALiBi with one fault."""

    def attend(self, q, k, v, *, mask, layout):
        q, k = turn(q, k)
        f = far(alibi.distances(q, k, layout, self.distance))
        bias = -slope(self.slopes)[:, None, None] * f
        scores = q @ k.mT * q.shape[-1] ** -0.5 + bias * (inside if inside == 1 else q.shape[-1] ** -0.5)
        allowed = mask.dense(q.shape[2], k.shape[2])
        if dim != -1:
            return scores.softmax(dim) @ v
        return masked_softmax(scores, None if allowed is None else hide(allowed)) @ v

    return wrong(Alibi, attend=attend)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "the bias is divided by √d": with_fault(inside=0),
    "the bias with the other sign": with_fault(slope=lambda m: -m),
    "no bias": with_fault(slope=lambda m: 0 * m),
    "slopes in another order": with_fault(slope=lambda m: m.flip(0) if len(m) > 1 else 2 * m),
    "slopes of one head": with_fault(slope=lambda m: m[:1].expand_as(m)),
    "squared distances": with_fault(far=lambda f: f**2),
    "distances of a line": with_fault(far=lambda f: (torch.arange(f.shape[0])[:, None] - torch.arange(f.shape[1]) + f.shape[1] - f.shape[0]).abs().double()),
    "no scale": wrong(Alibi, attend=lambda self, q, k, v, *, mask, layout: Alibi.attend(self, q * q.shape[-1] ** 0.5, k, v, mask=mask, layout=layout)),
    "q and k swapped": with_fault(turn=lambda q, k: (k, q) if q.shape == k.shape else (q, k)),
    "softmax over the batch": with_fault(dim=0),
    "the mask inverted": with_fault(hide=torch.logical_not),
    "the mask ignored": with_fault(hide=torch.ones_like),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


@pytest.mark.parametrize(
    "heads,wanted",
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (8, [2.0**-i for i in range(1, 9)]),
        (6, [0.25, 0.0625, 2**-6, 2**-8, 0.5, 0.125]),
        (3, [2**-4, 2**-8, 2**-2]),
        (16, [2 ** (-i / 2) for i in range(1, 17)]),
    ],
)
def test_hand_slopes(heads, wanted):
    near(torch.tensor(slopes(heads), dtype=torch.float64), wanted)


def test_hand_slopes_of_twelve_heads():
    """Those of 8, then .7071, .3536, .1768, .0884."""
    near(torch.tensor(slopes(12)[:8]).double(), [2.0**-i for i in range(1, 9)], 1e-7)
    near(torch.tensor(slopes(12)[8:]).double(), [0.7071, 0.3536, 0.1768, 0.0884], 5e-5)


def test_hand_scores_of_zero():
    """Slope 1/2, causal: the third query weighs its keys .1863, .3072, .5065."""
    head, zero = Alibi(place(1, tokens=3)).double(), row(0, 0, 0)
    head.slopes.fill_(0.5)
    weights = seen(head, zero, zero, zero, mask=Mask(causal=True), layout=Layout((3,)))
    near(weights[0, 0, 2], [0.1863, 0.3072, 0.5065], 5e-5)
    near(weights[0, 0, 0], [1, 0, 0])


@pytest.mark.parametrize(
    "form,wanted",
    [("sequence", [1, 0, 1, 2, 3]), ("l1", [0, 0, 1, 1, 2]), ("l2", [0, 0, 1, 1, math.sqrt(2)])],
)
def test_hand_a_square_and_a_special_token(form, wanted):
    """Of the first token of a 2 × 2 grid, behind a special token, with a slope of 1."""
    layout = Layout((2, 2), 1)
    head, zero = Alibi(Site("hand", 1, 1, layout), distance=form).double(), torch.zeros(1, 1, 5, 1).double()
    head.slopes.fill_(1.0)
    near(-seen(head, zero, zero, zero, layout=layout, tap="scores")[0, 0, 1], wanted)


def test_hand_parameters():
    """Slopes are not learned, but kept: a buffer, which follows the module."""
    head = Alibi(place(12, 3))
    assert count(head) == 0 and list(head.state_dict()) == ["slopes"]
    with torch.device("meta"):
        made = Alibi(place(12, 3))
    made.to_empty(device="cpu").init_weights()
    assert made.slopes.tolist() == head.slopes.tolist() == [2**-4, 2**-8, 2**-2]


# Identities


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.6)])
def test_identity_slopes_of_zero_are_softmax(mask):
    head, (q, k, v) = Alibi(place(12, 3, 5)).double(), normal(3, 2, 3, 5, 4)
    head.slopes.zero_()
    near(
        head(q, k, v, mask=mask, layout=Layout((5,))),
        Softmax(place(12, 3, 5))(q, k, v, mask=mask, layout=Layout((5,))),
    )


def test_identity_under_a_causal_mask_it_is_the_authors():
    """+ m j for key j, whatever the query: a row may be shifted. Without the mask that is another thing."""
    head, (q, k, v) = Alibi(place(12, 3, 6)).double(), normal(3, 2, 3, 6, 4)
    scores = q @ k.mT / 2 + head.slopes[:, None, None] * torch.arange(6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    near(head(q, k, v, mask=Mask(causal=True), layout=Layout((6,))), masked_softmax(scores, causal) @ v)
    assert (head(q, k, v, layout=Layout((6,))) - scores.softmax(-1) @ v).abs().max() > 1e-2


def test_identity_it_does_not_know_how_many_follow():
    head, (q, k, v) = Alibi(place(12, 3, 4)).double(), normal(3, 2, 3, 9, 4)
    whole = head(q, k, v, mask=Mask(causal=True), layout=Layout((9,)))
    near(
        head(q[:, :, :4], k[:, :, :4], v[:, :, :4], mask=Mask(causal=True), layout=Layout((4,))),
        whole[:, :, :4],
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n,m", [(1, 6), (2, 6), (6, 6)])
def test_identity_the_last_queries_alone(n, m, causal):
    """Asked alone against all keys, they get what they get among all queries."""
    head, (q, k, v) = Alibi(place(12, 3, m)).double(), normal(3, 2, 3, m, 4)
    whole = head(q, k, v, mask=Mask(causal=causal), layout=Layout((m,)))
    near(head(q[:, :, -n:], k, v, mask=Mask(causal=causal), layout=Layout((m,))), whole[:, :, -n:])


@pytest.mark.parametrize("causal", [True, False])
def test_more_queries_than_keys(causal):
    """The first two of five queries stand before the first of three keys: they see none, or from afar."""
    head, q, (k, v) = Alibi(place(12, 3, 3)).double(), normal(2, 3, 5, 4), normal(2, 2, 3, 3, 4)
    bias = -head.slopes[:, None, None] * torch.tensor([[2, 3, 4], [1, 2, 3], [0, 1, 2], [1, 0, 1], [2, 1, 0]])
    allowed = torch.ones(5, 3, dtype=torch.bool).tril(-2) if causal else None
    out = head(q, k, v, mask=Mask(causal=causal), layout=Layout((3,)))
    near(out, masked_softmax(q @ k.mT / 2 + bias, allowed) @ v)
    assert not causal or not out[:, :, :2].any()


@pytest.mark.parametrize("form", ["sequence", "l1", "l2"])
def test_identity_on_a_line_all_distances_are_one(form):
    head, (q, k, v) = Alibi(place(12, 3, 5), distance=form).double(), normal(3, 2, 3, 5, 4)
    near(head(q, k, v, layout=Layout((5,))), Alibi(place(12, 3, 5)).double()(q, k, v, layout=Layout((5,))))


@pytest.mark.parametrize("form", ["l1", "l2"])
def test_identity_a_grid_turned_round_gives_the_same_turned_round(form):
    layout, turned = Layout((2, 3)), Layout((3, 2))
    q, k, v = normal(3, 2, 3, 6, 4)
    order = [0, 3, 1, 4, 2, 5]  # columns before rows
    head = Alibi(Site("hand", 12, 3, layout), distance=form).double()
    out = head(q[:, :, order], k[:, :, order], v[:, :, order], layout=turned)
    near(out, head(q, k, v, layout=layout)[:, :, order])
    mirrored = [2, 1, 0, 5, 4, 3]
    out = head(q[:, :, mirrored], k[:, :, mirrored], v[:, :, mirrored], layout=layout)
    near(out, head(q, k, v, layout=layout)[:, :, mirrored])


@pytest.mark.parametrize("form", ["sequence", "l1"])
def test_identity_token_by_token(form):
    site = place(12, 3, 6)
    part, x, cache = MultiHead(site, Alibi(site, distance=form)).double(), normal(2, 6, 12), KVCache()
    rows = [
        part.step(x[:, i : i + 1], cache, mask=Mask(causal=True), layout=Layout((i + 1,))) for i in range(6)
    ]
    near(torch.cat(rows, 1), part(x, mask=Mask(causal=True), layout=site.layout))


def test_half_precision_knows_large_distances():
    """Slopes and distances are multiplied in the precision of the slopes, then rounded once."""
    head, zero = Alibi(place(8, 8, 600)), torch.zeros(1, 8, 600, 1, dtype=torch.bfloat16)
    scores = seen(head, zero, zero, zero, layout=Layout((600,)), tap="scores")
    exact = -torch.tensor(slopes(8))[:, None, None] * (torch.arange(600)[:, None] - torch.arange(600)).abs()
    assert ((scores.float() - exact).abs() <= exact.abs() * 2**-8).all()


def test_kernels_that_give_nan_for_a_row_of_nobody_are_never_asked():
    head, (q, k, v) = Alibi(place(12, 3, 4)).double(), normal(3, 2, 3, 4, 4)
    keys = torch.tensor([[True] * 4, [False] * 4])
    with patch.object(
        alibi.F, "scaled_dot_product_attention", wraps=alibi.F.scaled_dot_product_attention
    ) as kernel:
        out = head(q, k, v, mask=Mask(keys=keys), layout=Layout((4,)))
    bias = kernel.call_args.kwargs["attn_mask"]
    assert not out[1].any() and (bias > -torch.inf).any(-1).all()


def test_narrow_numbers_stay_near():
    narrow(Alibi, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
