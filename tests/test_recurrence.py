"""A state that is carried along a sequence: three forms of one, padding, long sequences, and what is kept between steps."""

import math

import pytest
import torch
from by_hand import near, normal
from torch.nn import functional as F

from attnzoo.core import KVCache
from attnzoo.functional.recurrence import CHUNK, recurrence, short_conv


def one_by_one(q, k, v, decay, rate=None, there=None, state=None):
    """The recurrent form: one token after the other."""
    state = torch.zeros(*v.shape[:2], q.shape[3], v.shape[3], dtype=v.dtype) if state is None else state
    out = []
    for i in range(v.shape[2]):
        faded = decay[:, :, i, :, None].exp() * state
        new = v[:, :, i]
        if rate is not None:
            new = rate[:, :, i] * (
                new - torch.einsum("bhde,bhd->bhe", faded, k[:, :, i].expand(*faded.shape[:3]))
            )
        next_ = faded + k[:, :, i, :, None] * new[:, :, None]
        state = next_ if there is None else torch.where(there[:, i, None, None, None], next_, state)
        out.append((q[:, :, i, :, None] * state).sum(2))
    return torch.stack(out, 2), state


def at_once(q, k, v, decay, rate=None):
    """The quadratic form: (q kᵀ ⊙ D) u, u the solution of (I + β tril(k kᵀ ⊙ D, -1)) u = β v."""
    n = v.shape[2]
    upto = decay.cumsum(2)
    between = (upto[:, :, :, None] - upto[:, :, None]).exp().expand(-1, -1, n, n, q.shape[-1])

    def products(a, c):
        return (a[:, :, :, None] * c[:, :, None] * between).sum(-1).tril()

    if rate is None:
        return products(q, k) @ v
    system = torch.eye(n).double() + rate * products(k, k).tril(-1)
    return products(q, k) @ torch.linalg.solve(system, rate * v)


def drawn(n, channels=1, delta=False, heads=3):
    """q, k, v, log α and β of two samples."""
    q, k = normal(2, heads, n, 4), F.normalize(normal(2, heads, n, 4), dim=-1)
    decay = -torch.rand(2, 3, n, channels).double()
    return q, k, normal(2, 3, n, 5), decay, torch.rand(2, 3, n, 1).double() * 2 if delta else None


KINDS = [(1, False), (4, False), (1, True), (4, True)]


@pytest.mark.parametrize("n", [1, 2, 5, CHUNK, CHUNK + 1, 150])
@pytest.mark.parametrize("channels,delta", KINDS)
def test_three_forms_agree(n, channels, delta):
    q, k, v, decay, rate = drawn(n, channels, delta)
    out, state = recurrence(q, k, v, decay, rate)
    wanted, last = one_by_one(q, k, v, decay, rate)
    near(out, wanted, 1e-10)
    near(state, last, 1e-10)
    near(out, at_once(q, k, v, decay, rate), 1e-10)


@pytest.mark.parametrize("channels,delta", KINDS)
def test_gradients_agree(channels, delta):
    leaves = [None if t is None else t.requires_grad_() for t in drawn(70, channels, delta)]
    there, start = torch.rand(2, 70) < 0.7, normal(2, 3, 4, 5).requires_grad_()
    wanted = [t for t in (*leaves, start) if t is not None]
    weight = normal(2, 3, 70, 5)
    found = [
        torch.autograd.grad((run(*leaves, there, start)[0] * weight).sum(), wanted)
        for run in (recurrence, one_by_one)
    ]
    for one, other in zip(*found, strict=True):
        near(one, other, 1e-10)


@pytest.mark.parametrize("channels,delta", KINDS)
def test_in_pieces_it_goes_on_from_its_state(channels, delta):
    q, k, v, decay, rate = drawn(90, channels, delta)
    whole, last = recurrence(q, k, v, decay, rate)
    state, rows, done = None, [], 0
    for size in (1, 1, 3, 70, 15):
        piece = [None if t is None else t[:, :, done : done + size] for t in (q, k, v, decay, rate)]
        out, state = recurrence(*piece, None, state)
        rows.append(out)
        done += size
    near(torch.cat(rows, 2), whole, 1e-10)
    near(state, last, 1e-10)


@pytest.mark.parametrize("channels,delta", KINDS)
def test_tokens_that_do_not_exist_are_as_if_they_were_not_there(channels, delta):
    """Wherever they stand, whatever they hold: also what is no number."""
    tensors = drawn(75, channels, delta)
    there = torch.rand(75) < 0.6
    for t in tensors[1:]:
        if t is not None:
            t[:, :, ~there] = math.nan
    out, state = recurrence(*tensors, there.expand(2, 75))
    fewer, last = recurrence(*(None if t is None else t[:, :, there] for t in tensors))
    near(out[:, :, there], fewer, 1e-10)
    near(state, last, 1e-10)


def test_one_head_of_queries_and_keys_serves_all():
    q, k, v, decay, _ = drawn(70, heads=1)
    near(recurrence(q, k, v, decay)[0], one_by_one(q, k, v, decay)[0], 1e-10)


@pytest.mark.parametrize("channels,delta", KINDS)
def test_a_decay_of_minus_infinity_forgets_all(channels, delta):
    """o_t = (q_t k_t) u_t, u_t = v_t or β_t v_t; and gradients are finite."""
    q, k, v, _, rate = drawn(70, channels, delta)
    decay = torch.full((2, 3, 70, channels), -math.inf).double()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = recurrence(q, k, v, decay, rate)[0]
    near(out, (q * k).sum(-1, keepdim=True) * v * (1 if rate is None else rate), 1e-10)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("channels,delta", KINDS)
@pytest.mark.parametrize("strength", [1e-6, 1.0, 300.0])
def test_long_sequences_in_single_precision(channels, delta, strength):
    """4000 tokens: nothing overflows, nothing is NaN, gradients neither; and digits are those of single precision."""
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 2, 4000, 4)
    q, k, v = F.normalize(q, dim=-1), F.normalize(k, dim=-1), torch.randn(1, 2, 4000, 3)
    decay = (-strength * torch.rand(1, 2, 4000, channels)).requires_grad_()
    rate = torch.rand(1, 2, 4000, 1) if delta else None
    out, _ = recurrence(q, k, v, decay, rate)
    exact, _ = recurrence(*(None if t is None else t.double() for t in (q, k, v, decay, rate)))
    assert (out - exact).abs().max() < 1e-5 * exact.abs().max()
    (gradient,) = torch.autograd.grad(out.square().sum(), decay)
    assert gradient.isfinite().all()


def test_a_strong_decay_takes_no_digits_from_what_comes_after_it():
    """One token forgets all, e^-1e6, and the next ones fade by 1e-3: the sums of logarithms never meet."""
    for channels in (1, 4):
        q, k, v = torch.ones(3, 1, 1, 60, 4)
        decay = torch.full((1, 1, 60, channels), -1e-3)
        decay[:, :, 20] = -1e6
        out = recurrence(q, k, v, decay)[0][0, 0, 40, 0]
        near(out, 4 * sum(math.exp(-1e-3 * i) for i in range(21)), 1e-4)


def test_equal_keys_do_not_blow_up_the_delta_rule():
    """With the same key, β = 2 and no decay each token turns what is recalled: I + L has an inverse of small numbers."""
    k = torch.full((1, 1, 200, 4), 0.5).double()
    v = normal(1, 1, 200, 3)
    rate = torch.full((1, 1, 200, 1), 2.0).double()
    args = k, k, v, torch.zeros(1, 1, 200, 1).double(), rate
    near(recurrence(*args)[0], one_by_one(*args)[0], 1e-9)


def test_half_precision_is_computed_in_single():
    for channels, delta in KINDS:
        tensors = [None if t is None else t.bfloat16() for t in drawn(90, channels, delta)]
        out, state = recurrence(*tensors)
        exact, _ = recurrence(*(None if t is None else t.double() for t in tensors))
        assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
        near(out, exact, 1e-2 * float(exact.abs().max()))


def test_hand_the_delta_rule_overwrites():
    """Unit keys e1, e2, e1 and values 1, 2, 5; with β = 1/2 and α = 1/2 half of it."""
    k = torch.tensor([[1.0, 0], [0, 1], [1, 0]]).double().reshape(1, 1, 3, 2)
    v = torch.tensor([1.0, 2, 5]).double().reshape(1, 1, 3, 1)
    zero, one = torch.zeros(1, 1, 3, 1).double(), torch.ones(1, 1, 3, 1).double()
    out, state = recurrence(k, k, v, zero, one)
    near(out, [1, 2, 5])
    near(state, [5, 2])
    near(recurrence(k, k, v, zero + math.log(0.5), one / 2)[0], [0.5, 1, 2.5625])


# Convolutions over the last few tokens


def test_conv_by_hand():
    x = torch.tensor([1.0, 2, 4, 8]).double().reshape(1, 4, 1)
    weight = torch.tensor([[100.0, 10, 1]]).double()
    out, past = short_conv(x, weight)
    near(out, [1, 12, 124, 248])
    near(past, [4, 8])
    near(short_conv(x, weight[:, 2:])[0], x)  # one token alone
    there = torch.tensor([[True, False, True, True]])
    out, past = short_conv(x, weight, there)
    near(out[:, there[0]], [1, 14, 148])
    near(past, [4, 8])
    near(short_conv(x, weight, torch.tensor([[True, True, False, False]]))[1], [1, 2])
    near(
        short_conv(x, weight, torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[[3.0], [5]]]).double())[1],
        [3, 5],
    )


@pytest.mark.parametrize("width", [1, 2, 4])
def test_conv_of_tokens_that_do_not_exist(width):
    """As if they were not there, in pieces too; what is kept is of one size."""
    x, weight, there = normal(3, 12, 4), normal(4, width), torch.rand(3, 12) < 0.5
    whole, last = short_conv(x, weight, there)
    for i in range(3):
        fewer, kept = short_conv(x[i : i + 1, there[i]], weight)
        near(whole[i, there[i]], fewer[0])
        near(last[i], kept[0])
    past, rows = None, []
    for piece, exists in zip(x.split((1, 4, 1, 6), 1), there.split((1, 4, 1, 6), 1), strict=True):
        out, past = short_conv(piece, weight, exists, past)
        assert past.shape == (3, width - 1, 4)
        rows.append(out)
    near(torch.cat(rows, 1), whole)
    near(past, last)


# What is kept between steps


def test_a_cache_carries_a_state_of_constant_size():
    cache, one = KVCache(), torch.randn(2, 3, requires_grad=True)
    assert cache.carried == ()
    cache.carry(4, one * 2, torch.arange(2))
    assert cache.length == 4 and len(cache.carried) == 2 and not cache.carried[0].requires_grad
    cache.branch("b").carry(1, one)
    cache.select(torch.tensor([1, 1, 0]), kept=False)
    torch.testing.assert_close(cache.carried[0], one.detach()[[1, 1, 0]] * 2)
    assert cache.carried[1].tolist() == [1, 1, 0] and cache.branch("b").carried[0].shape == (3, 3)
    cache.carry(1, one)
    assert cache.length == 5 and len(cache.carried) == 1
