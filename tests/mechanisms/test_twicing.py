"""Twicing attention, arXiv:2503.00687."""

import itertools
import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, wrong

from attnzoo.core import Layout, Mask, MultiHead, watch
from attnzoo.errors import UnsupportedMask
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.dot_product.twicing import Twicing
from attnzoo.testing import against


@against(Twicing, examples=40)
def test_oracle(q, k, v, allowed):
    """s_i = Σ_j a_ij v_j, then y_i = s_i + Σ_j a_ij (v_j - s_j), query by query."""
    b, h, n, d = q.shape
    out = torch.zeros_like(q)
    for s, g in itertools.product(range(b), range(h)):
        see = allowed[s, g]
        a = [(k[s, g, see[i]] @ q[s, g, i] / math.sqrt(d)).softmax(0) for i in range(n)]
        smooth = torch.stack([a[i] @ v[s, g, see[i]] for i in range(n)])
        for i in range(n):
            out[s, g, i] = smooth[i] + a[i] @ (v[s, g, see[i]] - smooth[see[i]])
    return out


def attending(change, scale=-0.5):
    """Twicing attention, given A and v, with a fault."""

    def attend(self, q, k, v, *, mask, layout):
        scores = (q * q.shape[-1] ** scale) @ k.mT
        return change(masked_softmax(scores, mask.dense(q.shape[2], k.shape[2])), v, scores, mask)

    return wrong(Twicing, attend=attend)


def right(a, v, scores, mask):
    """The equation."""
    return (2 * a - a @ a) @ v


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(attending(right)).ok


MUTANTS = {
    "softmax attention": attending(lambda a, v, scores, mask: a @ v),
    "no scale": attending(right, scale=0),
    "A twice, nothing left over": attending(lambda a, v, scores, mask: a @ (a @ v)),
    "A v - A (v - A v)": attending(lambda a, v, scores, mask: (a @ a) @ v),
    "v + A (v - A v)": attending(lambda a, v, scores, mask: v + a @ (v - a @ v)),
    "A Aᵀ for A²": attending(lambda a, v, scores, mask: (2 * a - a @ a.mT) @ v),
    "squares of the entries": attending(lambda a, v, scores, mask: (2 * a - a * a) @ v),
    "softmax over the queries": attending(lambda a, v, scores, mask: right(scores.softmax(-2), v, scores, mask)),
    "softmax over the samples": attending(lambda a, v, scores, mask: right(scores.softmax(0), v, scores, mask)),
    "the second A unmasked": attending(lambda a, v, scores, mask: (2 * a - scores.softmax(-1) @ a) @ v),
    "the mask ignored": attending(lambda a, v, scores, mask: right(scores.softmax(-1), v, scores, mask)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def effective(part, q, k, mask=Mask()):  # noqa: B008 - it does not change
    """2A - A², by values that are unit vectors; nobody watches."""
    n = q.shape[2]
    return part(q, k, torch.eye(n).double().expand(*q.shape[:2], n, n), mask=mask, layout=Layout((n,)))


def attention(q, k, mask=Mask()):  # noqa: B008 - it does not change
    """A."""
    return effective(Softmax(place(q.shape[-1], tokens=q.shape[2])), q, k, mask)


def giving(*rows):
    """Queries and keys of which A has these rows: q = ln A √n, k = I."""
    a = torch.tensor(rows, dtype=torch.float64)
    n = len(a)
    return (math.sqrt(n) * a.log()).reshape(1, 1, n, n), torch.eye(n).double().reshape(1, 1, n, n)


FORMS = pytest.mark.parametrize("form_matrix", [False, True])
WATCHED = pytest.mark.parametrize("watched", [False, True])


def looked_at(part, watched, run):
    """What is run, while somebody looks or nobody does."""
    if not watched:
        return run()
    with watch(part, None, lambda name, shown: None):
        return run()


# By hand


@FORMS
@WATCHED
def test_hand_two_tokens(form_matrix, watched):
    part = Twicing(place(2), form_matrix=form_matrix).double()
    q, k = giving((0.9, 0.1), (0.2, 0.8))
    near(looked_at(part, watched, lambda: effective(part, q, k)), [[0.97, 0.03], [0.06, 0.94]])


@FORMS
@WATCHED
def test_hand_a_swap_has_negative_entries(form_matrix, watched):
    """A = [[0, 1], [1, 0]], A² = I."""
    part = Twicing(place(2), form_matrix=form_matrix).double()
    q, k = torch.tensor([[[[0.0, 1e4], [1e4, 0]]]]).double(), torch.eye(2).double()[None, None]
    near(looked_at(part, watched, lambda: effective(part, q, k)), [[-1, 2], [2, -1]])


def test_hand_values():
    """A has rows (1/4, 3/4), (1/2, 1/2); A v = (7, 6), A A v = (6.25, 6.5)."""
    q, k = giving((0.25, 0.75), (0.5, 0.5))
    v = row(4, 8)
    near(Twicing(place(2)).double()(q, k, v, layout=Layout((2,))), [2 * 7 - 6.25, 2 * 6 - 6.5])


def test_hand_no_parameters():
    assert count(Twicing(place(12, 3))) == 0


def test_default_shows_a():
    q, k = giving((0.9, 0.1), (0.2, 0.8))
    part = Twicing(place(2)).double()
    near(seen(part, q, k, k, layout=Layout((2,))), [[0.9, 0.1], [0.2, 0.8]])


def test_hand_form_matrix_shows_what_is_applied():
    q, k = giving((0.9, 0.1), (0.2, 0.8))
    part = Twicing(place(2), form_matrix=True).double()
    near(seen(part, q, k, k, layout=Layout((2,))), [[0.97, 0.03], [0.06, 0.94]])


# Identities


@FORMS
def test_identity_idempotent_maps_are_unchanged(form_matrix):
    """A = I, A = 1 1ᵀ / n, and a map of two blocks: A² = A."""
    part = Twicing(place(4, tokens=4), form_matrix=form_matrix).double()
    blocks = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]])
    for a in (torch.eye(4), torch.full((4, 4), 0.25), blocks):
        q, k = 1e4 * (a[None, None] > 0).double(), torch.eye(4).double()[None, None]
        near(effective(part, q, k), a[None, None])


def test_identity_rows_sum_to_one():
    q, k = normal(2, 2, 3, 6, 4)
    part = Twicing(place(12, 3, 6)).double()
    for mask in (Mask(), Mask(causal=True), Mask(keys=torch.tensor([[1, 0, 1, 1, 0, 1]] * 2).bool())):
        near(effective(part, q, k, mask).sum(-1), torch.ones(2, 3, 6))


def test_identity_eigenvalues():
    """λ becomes 1 - (1 - λ)²."""
    q, k = normal(2, 1, 1, 5, 4)
    before = torch.linalg.eigvals(attention(q, k)[0, 0])
    after = torch.linalg.eigvals(effective(Twicing(place(4, tokens=5)).double(), q, k)[0, 0])
    wanted = 1 - (1 - before) ** 2
    for one in wanted:
        assert (after - one).abs().min() < 1e-10


def test_identity_softmax_and_its_residual():
    site = place(12, 3, 6)
    q, k, v = normal(3, 2, 3, 6, 4)
    soft = Softmax(site)
    once = soft(q, k, v, layout=site.layout)
    near(Twicing(site)(q, k, v, layout=site.layout), once + soft(q, k, v - once, layout=site.layout))


def test_identity_causal_stays_causal():
    q, k = normal(2, 1, 2, 6, 4)
    map_ = effective(Twicing(place(8, 2, 6)).double(), q, k, Mask(causal=True))
    near(map_.triu(1), torch.zeros_like(map_))
    near(map_[:, :, 0, 0], torch.ones(1, 2))


@FORMS
def test_identity_padding_is_a_shorter_input(form_matrix):
    """Rows of padded queries are valid, and nobody reads through them."""
    part = Twicing(place(8, 2, 6), form_matrix=form_matrix).double()
    q, k, v = normal(3, 1, 2, 6, 4)
    keys = torch.tensor([[True] * 4 + [False] * 2])
    for watched in (False, True):
        padded = looked_at(part, watched, lambda: part(q, k, v, mask=Mask(keys=keys), layout=Layout((6,))))
        assert padded.isfinite().all()
        near(padded[:, :, :4], part(*(t[:, :, :4] for t in (q, k, v)), layout=Layout((4,))))


# Dropout


def dropped(part):
    """2A - A² under dropout, two tokens: A, and what came out of 60 calls in training mode."""
    q, k = giving((0.9, 0.1), (0.2, 0.8))
    part = part.double().train()
    outs = [effective(part, q, k)[0, 0] for _ in range(60)]
    return torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64), outs


def keeps(p=0.5):
    """All ways of dropping entries of a 2 × 2 map, with what is kept scaled."""
    for kept in itertools.product((0.0, 1 / (1 - p)), repeat=4):
        yield torch.tensor(kept).double().reshape(2, 2)


@WATCHED
def test_residual_drops_the_same_entries_of_a_both_times(watched):
    part = Twicing(place(2, attn_drop=0.5))
    a, outs = looked_at(part, watched, lambda: dropped(part))
    possible = torch.stack([2 * a * kept - (a * kept) @ (a * kept) for kept in keeps()])
    which = [(possible - out).abs().amax((1, 2)).min(0) for out in outs]
    assert all(off.values < 1e-12 for off in which)
    assert len({int(off.indices) for off in which}) > 5


@WATCHED
def test_matrix_drops_entries_of_what_is_applied(watched):
    part = Twicing(place(2, attn_drop=0.5), form_matrix=True)
    a, outs = looked_at(part, watched, lambda: dropped(part))
    possible = torch.stack([(2 * a - a @ a) * kept for kept in keeps()])
    which = [(possible - out).abs().amax((1, 2)).min(0) for out in outs]
    assert all(off.values < 1e-12 for off in which)
    assert len({int(off.indices) for off in which}) > 5


# Refusals


def test_pairs_are_refused():
    """Token 0 may see 1 and 1 may see 2, but 0 may not see 2: A² would."""
    q, k, v = normal(3, 1, 1, 3, 2)
    with pytest.raises(UnsupportedMask, match="AZ402"):
        Twicing(place(2, tokens=3))(
            q, k, v, mask=Mask(pairs=torch.ones(1, 1, 3, 3).bool()), layout=Layout((3,))
        )


@WATCHED
def test_other_keys_than_queries_are_refused(watched):
    """A is square; nothing is stretched."""
    part = Twicing(place(2)).double()
    q, (k, v) = normal(1, 1, 1, 2), normal(2, 1, 1, 5, 2)
    with pytest.raises(RuntimeError):
        looked_at(part, watched, lambda: part(q, k, v, layout=Layout((5,))))


def test_between_projections():
    site = place(8, 2, 5)
    part, soft = (MultiHead(site, head(site)).double() for head in (Twicing, Softmax))
    soft.load_state_dict(part.state_dict())  # neither has parameters inside
    x = normal(2, 5, 8)
    assert (part(x, layout=site.layout) - soft(x, layout=site.layout)).abs().max() > 1e-3


def test_narrow_numbers_stay_near():
    narrow(Twicing, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
