"""cosFormer, arXiv:2202.08791, §3.3, eq. 10-12."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, wrong

from attnzoo.core import Layout, Mask, options_of
from attnzoo.errors import LayoutMismatch, UnsupportedMask
from attnzoo.mechanisms.linear.cosformer import Cosformer, causal_sums
from attnzoo.testing import against


@against(Cosformer, examples=50)
def test_oracle(component, options, q, k, v, allowed, keys):
    """Σ_j s_ij v_j / max(Σ_j s_ij, ε), query by query, over the keys that are seen; places from 1."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        see, there = allowed[b, h, i].nonzero()[:, 0].tolist(), keys[b].nonzero()[:, 0].tolist()
        length, place = component.length, i
        if options["length"] == "input" and there:
            length = max(there) - min(there) + 1
            place = min(max(i, min(there)), max(there) + 1)  # of padding
        away = [math.cos(math.pi / 2 * ((place + 1) - (j + 1)) / length) for j in see]
        asks, kept = (torch.where(t > 0, t, 0.0) for t in (q[b, h, i], k[b, h, see]))
        weights = kept @ asks * torch.tensor(away, dtype=torch.float64)
        out[b, h, i] = weights @ v[b, h, see] / (weights.sum() if weights.sum() > 1e-6 else 1e-6)
    return out


def pairwise(
    self, q, k, v, mask, form=torch.relu, away=None, hide=lambda a: a, dim=-1, norm=lambda t: t.clamp(min=1e-6)
):  # fmt: skip
    """By explicit pairs, with a fault."""
    n = q.shape[2]
    at, first, length = (
        torch.arange(n).double().expand(len(q), n),
        torch.zeros(len(q), 1),
        torch.full((len(q), 1), float(self.reaches or n)),
    )
    if not self.reaches and mask.keys is not None:
        first = mask.keys.int().argmax(-1, keepdim=True)
        length = (n - mask.keys.flip(-1).int().argmax(-1, keepdim=True) - first).clamp(min=1)
    at = torch.minimum(torch.maximum(at, first), first + length)
    steps, length = (at[:, :, None] - at[:, None])[:, None], length[:, :, None, None].double()
    turn = (math.pi / 2 * steps / length).cos() if away is None else away(steps, length)
    weights = form(q) @ form(k).mT * turn
    allowed = mask.dense(n, n)
    weights = weights if allowed is None else weights.masked_fill(~hide(allowed), 0.0)
    return weights / norm(weights.sum(dim, keepdim=True)) @ v


def with_fault(turn=lambda q, k: (q, k), **fault):
    """cosFormer with one fault."""

    def attend(self, q, k, v, *, mask, layout):
        return pairwise(self, *turn(q, k), v, mask, **fault)

    return wrong(Cosformer, attend=attend)


def test_identity_the_linear_form_is_the_explicit_one():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "M with padding": with_fault(away=lambda steps, length: (math.pi / 2 * steps / steps.shape[-1]).cos()),
    "no relu": with_fault(form=lambda t: t),
    "elu + 1": with_fault(form=lambda t: torch.nn.functional.elu(t) + 1),
    "no cosine": with_fault(away=lambda steps, length: torch.ones(steps.shape).double()),
    "a cosine of twice the angle": with_fault(away=lambda steps, length: (math.pi * steps / length).cos()),
    "a sine": with_fault(away=lambda steps, length: (math.pi / 2 * steps / length).sin()),
    "M one too large": with_fault(away=lambda steps, length: (math.pi / 2 * steps / (length + 1)).cos()),
    "scaled by a sum over the queries": with_fault(dim=-2),
    "not normalised": with_fault(norm=lambda total: 1.0),
    "ε added": with_fault(norm=lambda total: total + 1e-6),
    "q and k swapped": with_fault(turn=lambda q, k: (k, q) if q.shape == k.shape else (q, k)),
    "the mask inverted": with_fault(hide=torch.logical_not),
    "the mask ignored": with_fault(hide=torch.ones_like),
    "causal by one too few": with_fault(hide=lambda a: a & torch.ones(a.shape[-2:], dtype=torch.bool).tril(a.shape[-1] - a.shape[-2] - 1)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_two_tokens():
    """q = k = 1, v = (1, 0): the first gets 1 / (1 + cos 45°) = .5858, the second what is left."""
    out = Cosformer(place(1))(row(1, 1), row(1, 1), row(1, 0), layout=Layout((2,)))
    near(out, [1 / (1 + math.sqrt(0.5)), 1 - 1 / (1 + math.sqrt(0.5))])
    near(out[0, 0, 0], 0.5858, 5e-5)


def test_hand_the_smallest_factor_of_eight():
    """cos(7π/16) = .195, of the first query for the last key: what its value is worth beside its own."""
    head, one = Cosformer(place(1, tokens=8)), torch.ones(1, 1, 8, 1).double()
    ends = torch.zeros_like(one)
    ends[:, :, 7] = 1
    total = sum(math.cos(math.pi * j / 16) for j in range(8))
    out = head(one, one, ends, layout=Layout((8,)))[0, 0, 0] * total
    near(out, [math.cos(7 * math.pi / 16)])
    near(out, [0.195], 5e-4)


def test_hand_a_query_below_zero_gets_zeros():
    """Not the mean of the values."""
    out = Cosformer(place(1))(row(-1, 2), row(1, 1), row(3, 3), layout=Layout((2,)))
    near(out, [0, 3])


def test_hand_what_is_divided_by_has_a_floor():
    """A sum of 1/4 and a floor of 1, both in millionths."""
    out = Cosformer(place(1))(row(0.25e-6, 1), row(1, -1), row(3, 5), layout=Layout((2,)))
    near(out, [0.75, 3])


def test_hand_parameters():
    assert count(Cosformer(place(12, 3))) == 0
    assert options_of(Cosformer)().model_dump() == {"length": "input"}


# Identities


@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
@pytest.mark.parametrize("n,m", [(9, 9), (2, 9), (1, 9), (9, 4)])
def test_identity_chunks_change_nothing(chunk, n, m):
    q, k, v = normal(2, 3, n, 5), normal(2, 3, m, 5), normal(2, 3, m, 4)
    near(causal_sums(q, k, v, chunk), (q @ k.mT).tril(m - n) @ v)


def test_identity_constant_values_stay_constant():
    q, k = normal(2, 2, 3, 5, 4).abs()
    out = Cosformer(place(12, 3, 5))(q, k, torch.full_like(q, 3.0), layout=Layout((5,)))
    near(out, torch.full_like(q, 3.0))


def test_identity_the_size_of_a_query_has_no_say():
    q, k, v = normal(3, 2, 3, 5, 4)
    head = Cosformer(place(12, 3, 5))
    near(head(7 * q, k, v, layout=Layout((5,))), head(q, k, v, layout=Layout((5,))), 1e-10)


def test_identity_a_row_of_a_causal_pass_does_not_know_how_many_follow():
    """With one M for all; with that of the input it would, and causal masks are refused."""
    head, (q, k, v) = Cosformer(place(12, 3, 9), length="site"), normal(3, 2, 3, 9, 4)
    whole = head(q, k, v, mask=Mask(causal=True), layout=Layout((9,)))[:, :, :5]
    near(head(q[:, :, :5], k[:, :, :5], v[:, :, :5], mask=Mask(causal=True), layout=Layout((5,))), whole)
    with pytest.raises(UnsupportedMask, match="AZ402"):
        Cosformer(place(12, 3, 9))(q, k, v, mask=Mask(causal=True), layout=Layout((9,)))


@pytest.mark.parametrize("length", ["input", "site"])
@pytest.mark.parametrize("first", [0, 2])
def test_identity_padding_is_a_shorter_input(length, first):
    """On either side: M is that of the tokens, and the places of all may be moved."""
    head, (q, k, v) = Cosformer(place(12, 3, 7), length=length), normal(3, 2, 3, 7, 4)
    own = slice(first, first + 4)
    at = torch.arange(7).expand(2, 7)
    padded = head(q, k, v, mask=Mask(keys=(at >= first) & (at < first + 4)), layout=Layout((7,)))
    near(padded[:, :, own], head(q[:, :, own], k[:, :, own], v[:, :, own], layout=Layout((4,))))


def test_identity_the_newest_query_alone():
    head, (q, k, v) = Cosformer(place(12, 3, 9), length="site"), normal(3, 2, 3, 7, 4)
    whole = head(q, k, v, mask=Mask(causal=True), layout=Layout((7,)))
    near(head(q[:, :, -1:], k, v, mask=Mask(causal=True), layout=Layout((7,))), whole[:, :, -1:])
    assert head.card.incremental and not Cosformer(place(12, 3, 9)).card.incremental


def test_longer_inputs_than_m_are_refused():
    with pytest.raises(LayoutMismatch, match="AZ403.*at most 5 tokens; it was given 6"):
        Cosformer(place(12, 3, 5), length="site")(*normal(3, 1, 3, 6, 4), layout=Layout((6,)))


def test_places_matter():
    q, k, v = normal(3, 1, 1, 5, 4)
    head, order = Cosformer(place(4, 1, 5)), [4, 2, 0, 1, 3]
    turned = head(q[:, :, order], k[:, :, order], v[:, :, order], layout=Layout((5,)))
    assert (turned - head(q, k, v, layout=Layout((5,)))[:, :, order]).abs().max() > 1e-3


def test_hidden_keys_have_no_say_and_no_gradient():
    q, k, v = (t.requires_grad_() for t in normal(3, 2, 3, 5, 4))
    keys = torch.tensor([[True, False, True, True, False], [False] * 5])
    head = Cosformer(place(12, 3, 5))
    out = head(q, k, v, mask=Mask(keys=keys), layout=Layout((5,)))
    out.sum().backward()
    assert not out[1].any()
    for tensor in (k, v):
        assert tensor.grad.isfinite().all() and not tensor.grad.transpose(1, 2)[~keys].any()


@pytest.mark.parametrize("length", ["input", "site"])
def test_narrow_numbers_stay_near(length):
    narrow(Cosformer, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7), length=length)
