"""Nyström attention, arXiv:2102.03902, §3.2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, OptionError, options_of
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.linear.nystrom import Nystrom, pseudo_inverse, segments
from attnzoo.testing import against


def iterated(a, steps):
    """Z of one matrix, step by step, with the identity written out."""
    eye = torch.eye(len(a)).double()
    z = a.T / (max(a[:, j].sum() for j in range(len(a))) * max(line.sum() for line in a))
    for _ in range(steps):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


@against(Nystrom, examples=25)
def test_oracle(component, options, q, k, v, keys):
    """Landmark by landmark, then query by query; landmarks of nobody are left out of everything."""
    (b, heads, n, d), out = q.shape, torch.zeros_like(v)
    r = min(options["landmarks"], n)
    for s in range(b):
        there = [j for j in range(n) if keys[s, j]]
        members = [[j for j in range(i * n // r, (i + 1) * n // r) if keys[s, j]] for i in range(r)]
        members = [m for m in members if m]
        for h in range(heads):
            if members:
                q_mean = torch.stack([sum(q[s, h, j] for j in m) / len(m) for m in members])
                k_mean = torch.stack([sum(k[s, h, j] for j in m) / len(m) for m in members])
                middle = torch.stack([(k_mean @ one / math.sqrt(d)).softmax(0) for one in q_mean])
                z = iterated(middle, options["iterations"])
                received = torch.stack(
                    [(k[s, h, there] @ one / math.sqrt(d)).softmax(0) @ v[s, h, there] for one in q_mean]
                )
                for i in range(n):
                    out[s, h, i] = (k_mean @ q[s, h, i] / math.sqrt(d)).softmax(0) @ (z @ received)
            if component.local is None:
                continue
            taps = component.local[h]
            for i in range(n):
                for t, tap in enumerate(taps):
                    j = i + t - len(taps) // 2
                    if j in there:
                        out[s, h, i] = out[s, h, i] + tap * v[s, h, j]
    return out


def form(
    self, q, k, v, mask, share=None, scale=-0.5, invert=pseudo_inverse, flip=False, empty=True, pad=True
):
    """The equations, with a fault or without."""
    cut = (share or segments)(k, self.landmarks)
    keys = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if mask.keys is None else mask.keys
    cut = cut & keys[:, None, None]
    part = cut.double() / cut.sum(-1, keepdim=True).clamp(min=1)
    there = cut.any(-1)[..., None, :] if empty else None
    q_mean, k_mean, by = part @ q, part @ k, q.shape[-1] ** scale
    middle = masked_softmax(q_mean @ k_mean.mT * by, there)
    if empty:
        middle = middle * there.mT
    left = masked_softmax(q @ k_mean.mT * by, there)
    right = masked_softmax(q_mean @ k.mT * by, keys[:, None, None])
    out = left @ invert(middle, self.iterations) @ (right @ v)
    if self.local is None:
        return out
    taps = self.local.flip(1) if flip else self.local
    held = v * keys[:, None, :, None] if pad else v
    return out + nn.functional.conv2d(held, taps[:, None, :, None], padding=(taps.shape[1] // 2, 0), groups=q.shape[1])  # fmt: skip


def with_fault(**fault):
    """Nyström attention with one fault."""
    return wrong(Nystrom, attend=lambda self, q, k, v, *, mask, layout: form(self, q, k, v, mask, **fault))


def of_the_batch(a, steps):
    """The norms of the largest matrix of all, as the authors' code."""
    size = a.sum(-2).amax() * a.sum(-1).amax()
    z = a.mT / size.clamp(min=1e-9)
    for _ in range(steps):
        az = a @ z
        z = (13 * z - z @ (15 * az - az @ (7 * az - az @ az))) / 4
    return z


def strided(t, most):
    """Every r-th token to one landmark."""
    n = t.shape[2]
    r = min(most, n)
    return torch.arange(n) % r == torch.arange(r)[:, None]


def attending(change):
    """Nyström attention whose inputs are changed."""

    def attend(self, q, k, v, *, mask, layout):
        q, k, v, mask = change(q, k, v, mask)
        return Nystrom.attend(self, q, k, v, mask=mask, layout=layout)

    return wrong(Nystrom, attend=attend)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "no scale": with_fault(scale=0.0),
    "half of the scale": with_fault(scale=-0.25),
    "queries and keys swapped": attending(lambda q, k, v, mask: (k, q, v, mask)),
    "norms of the whole batch": with_fault(invert=of_the_batch),
    "a step less": with_fault(invert=lambda a, steps: pseudo_inverse(a, steps - 1)),
    "the inverse transposed": with_fault(invert=lambda a, steps: pseudo_inverse(a, steps).mT),
    "no inverse": with_fault(invert=lambda a, steps: a),
    "strided landmarks": with_fault(share=strided),
    "landmarks of nobody count": with_fault(empty=False),
    "the convolution turned": with_fault(flip=True),
    "padding is convolved": with_fault(pad=False),
    "the mask ignored": attending(lambda q, k, v, mask: (q, k, v, Mask())),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def part_of(tokens=6, heads=2, dim=6, **options) -> Nystrom:
    """In float64, with a convolution of a size that matters."""
    return spread(Nystrom(place(dim, heads, tokens), **options))


# By hand


def test_hand_segments():
    """Seven tokens and three landmarks: 2, 2 and 3; never more landmarks than tokens."""
    assert segments(normal(1, 1, 7, 1), 3).int().tolist() == [[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]]  # fmt: skip
    assert torch.equal(segments(normal(1, 1, 3, 1), 64), torch.eye(3, dtype=torch.bool))


def test_hand_a_step_towards_an_inverse():
    """A = 1/2: Z₀ = (1/2) / (1/4) = 2, which is the inverse, and stays it; A = diag(1, 1/2): Z₀ = A, z₁ of 1/2 is
    1/8 (13 - 15/4 + 7/16 - 1/64) = 619/512."""
    near(pseudo_inverse(torch.full((1, 1), 0.5).double(), 3), [[2.0]])
    near(pseudo_inverse(torch.tensor([[1.0, 0], [0, 0.5]]).double(), 1), [[1, 0], [0, 619 / 512]])
    near(pseudo_inverse(torch.zeros(2, 3, 3).double(), 6), torch.zeros(2, 3, 3))


def test_hand_the_iteration_converges():
    """On maps of 8 × 8: some per mille after 6 steps at the worst, rounding after 14."""
    maps = normal(20, 8, 8).softmax(-1)
    wanted = torch.linalg.inv(maps)
    kind = torch.linalg.cond(maps) < 50
    off = [float((maps @ pseudo_inverse(maps, t) @ maps - maps)[kind].abs().max()) for t in (2, 6, 14)]
    assert off[0] > 1e-2 > off[1] and off[2] < 1e-12
    near(pseudo_inverse(maps, 20)[kind], wanted[kind], 1e-8)


def test_hand_one_landmark_gives_all_what_the_mean_query_gets():
    """q = (0, 2 ln 3), so q̄ = ln 3; k = (0, 1): weights (1/4, 3/4) on values (8, 4)."""
    part = Nystrom(place(1), landmarks=1, kernel=0).double()
    near(part(row(0, 2 * math.log(3)), row(0, 1), row(8, 4), layout=Layout((2,))), [5, 5])


def test_hand_the_convolution_is_along_the_tokens():
    """Values (1, 0, 0) and taps (a, b, c): what comes before, itself, what comes after."""
    part = Nystrom(place(1, tokens=3), landmarks=1, kernel=3).double()
    with torch.no_grad():
        part.local.copy_(torch.tensor([[0.5, 2.0, 7.0]]))
    zero = row(0, 0, 0)
    near(part(zero, zero, row(3, 0, 0), layout=Layout((3,))), [1 + 6, 1 + 1.5, 1])


@pytest.mark.parametrize("tokens,options,wanted", [(400, {}, 2 * 33), (5, {}, 2 * 9), (5, {"kernel": 35}, 70), (5, {"kernel": 0}, 0)])  # fmt: skip
def test_hand_parameters(tokens, options, wanted):
    assert count(Nystrom(place(8, 2, tokens), **options)) == wanted


def test_defaults_and_refusals():
    assert options_of(Nystrom)().model_dump() == {"landmarks": 64, "iterations": 6, "kernel": None}
    with pytest.raises(OptionError, match="kernel of 4 has no middle"):
        Nystrom(place(8), kernel=4)


# Identities


@pytest.mark.parametrize("masked", [False, True])
def test_identity_as_many_landmarks_as_tokens_are_softmax(masked):
    """A A⁺ A = A, once the iteration has come to an end."""
    site = place(6, 2, 5)
    part = Nystrom(site, iterations=40, kernel=0).double()
    q, k, v = normal(3, 2, 2, 5, 3)
    mask = Mask(keys=torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()) if masked else Mask()
    near(part(q, k, v, mask=mask, layout=site.layout), Softmax(site)(q, k, v, mask=mask, layout=site.layout), 1e-8)  # fmt: skip


def test_identity_one_landmark_is_the_mean_querys():
    part, (q, k, v) = part_of(landmarks=1, kernel=0), normal(3, 2, 2, 6, 3)
    soft = Softmax(place(6, 2, 6))(q.mean(2, keepdim=True), k, v, layout=Layout((6,)))
    near(part(q, k, v, layout=Layout((6,))), soft.expand(2, 2, 6, 3))


def test_identity_rows_of_the_whole_map_sum_to_one_and_may_be_negative():
    part, layout = part_of(12, landmarks=4, iterations=60, kernel=0), Layout((12,))
    negative = False
    for _ in range(8):
        q, k, v = normal(3, 2, 2, 12, 3)
        one, two = (seen(part, q, k, v, layout=layout, tap=tap) for tap in ("weights", "weights_landmarks"))
        assert one.shape == (2, 2, 12, 4) and two.shape == (2, 2, 4, 12)
        near((one @ two).sum(-1), torch.ones(2, 2, 12), 1e-6)
        near(part(q, k, v, layout=layout), one @ two @ v)
        negative |= bool((one @ two < -0.1).any())
    assert negative


def test_identity_constant_values_stay_constant():
    part, (q, k) = part_of(12, landmarks=4, iterations=60, kernel=0), normal(2, 2, 2, 12, 3)
    v = normal(2, 2, 1, 3).expand(2, 2, 12, 3)
    near(part(q, k, v, layout=Layout((12,))), v, 1e-6)


def test_identity_samples_and_heads_do_not_share_norms():
    """Another sample and another head, however large, change nothing."""
    part, (q, k, v) = part_of(landmarks=3), normal(3, 2, 2, 6, 3)
    other = q.clone()
    other[1] *= 30
    other[0, 1] *= 30
    near(part(other, k, v, layout=Layout((6,)))[0, 0], part(q, k, v, layout=Layout((6,)))[0, 0])


def test_identity_whole_stretches_of_padding_are_a_shorter_line():
    """Six tokens of nine exist, in two of three stretches."""
    part, (q, k, v) = part_of(9, landmarks=3), normal(3, 2, 2, 9, 3)
    mask = Mask(keys=(torch.arange(9) < 6).expand(2, 9))
    short = part_of(9, landmarks=2)
    short.load_state_dict(part.state_dict())
    wanted = short(*(t[:, :, :6] for t in (q, k, v)), layout=Layout((6,)))
    near(part(q, k, v, mask=mask, layout=Layout((9,)))[:, :, :6], wanted)


def test_where_nobody_exists_there_are_zeros_and_gradients_are_finite():
    part, (q, k, v) = part_of(landmarks=3), (t.requires_grad_() for t in normal(3, 1, 2, 6, 3))
    out = part(q, k, v, mask=Mask(keys=torch.zeros(1, 6, dtype=torch.bool)), layout=Layout((6,)))
    near(out, torch.zeros_like(out))
    assert all(g.isfinite().all() and not g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_narrow_numbers_stay_near():
    narrow(Nystrom, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7), landmarks=3)
