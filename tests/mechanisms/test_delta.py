"""The delta rule, arXiv:2406.06484 and arXiv:2102.11174."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, place, seen, spread, wrong
from torch import nn
from torch.nn import functional as F

from attnzoo.core import KVCache, Layout, Mask
from attnzoo.mechanisms.recurrent import delta
from attnzoo.mechanisms.recurrent.delta import Delta
from attnzoo.testing import against


def silu(x):
    return x / (1 + torch.exp(-x))


def unit(x):
    """Of length 1, but for 10⁻⁶."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def carried(component, x, there, negative):
    """What one token after the other recalls, (n h d)."""
    h, d, out, window = component.heads, x.shape[1] // component.heads, [], []
    states = torch.zeros(h, d, d).double()
    for token, exists in zip(x, there.tolist(), strict=True):
        now = component.qkv.weight @ token
        seen = [*window, now]
        if component.conv is not None:  # the newest of those that exist, and the token itself
            weights = component.conv.flip(1).unbind(1)
            now = sum(w * old for w, old in zip(weights, reversed(seen), strict=False))
        if exists:
            window = seen
        q, k, v = silu(now).reshape(3, h, d)
        q, k = unit(q) / math.sqrt(d), unit(k)
        beta = torch.sigmoid(component.rate.weight @ token) * (2 if negative else 1)
        if exists:
            states = torch.stack(
                [s + beta[i] * torch.outer(k[i], v[i] - s.T @ k[i]) for i, s in enumerate(states)]
            )
        out.append(torch.stack([s.T @ q[i] for i, s in enumerate(states)]))
    return torch.stack(out)


@against(Delta, examples=14)
def test_oracle(component, options, x, keys):
    """Token by token; each head divided by the root of its mean square, projected."""
    out = []
    for sample, there in zip(x, keys, strict=True):
        heads = carried(component, sample, there, options["negative"])
        if options["direction"] == "both":
            heads = heads + carried(component, sample.flip(0), there.flip(0), options["negative"]).flip(0)
        normed = heads / torch.sqrt((heads**2).mean(-1, keepdim=True) + 1e-5) * component.norm.weight
        out.append(normed.flatten(1) @ component.proj.weight.T)
    return torch.stack(out)


# Wrong versions


def scanning(change):
    """The mechanism whose recurrence is another one."""
    true = delta.recurrence
    return patched(
        Delta,
        "recurrence",
        lambda q, k, v, fade, rate, there, *state: change(true, q, k, v, fade, rate, there, *state),
    )


def convolved(change):
    """The mechanism whose convolution is another one."""
    true = delta.short_conv
    return patched(Delta, "short_conv", lambda x, weight, there, past: change(true, x, weight, there, past))


def padding_enters(true, q, k, v, fade, rate, there, *state):
    return true(q, k, v, fade, rate, None, *state)


def not_causal(true, q, k, v, *rest):
    out, last = true(q, k, v, *rest)
    return q @ last, last


def added(true, q, k, v, fade, rate, there, *state):
    return true(q, k, rate * v, fade, None, there, *state)


MUTANTS = {
    "added in the place of corrected": scanning(added),
    "no rate": scanning(lambda true, q, k, v, fade, rate, *rest: true(q, k, v, fade, rate**0, *rest)),
    "the rate on what is new alone": scanning(
        lambda true, q, k, v, fade, rate, *rest: true(q, k, rate * v, fade, rate**0, *rest)
    ),
    "padding enters": scanning(padding_enters),
    "not causal": scanning(not_causal),
    "no scale": scanning(lambda true, q, *rest: true(q * q.shape[-1] ** 0.5, *rest)),
    "queries and keys swapped": scanning(lambda true, q, k, *rest: true(k, q, *rest)),
    "keys of any length": patched(Delta, "unit", lambda t: t),
    "lengths over the tokens": patched(Delta, "unit", lambda t: F.normalize(t, dim=2)),
    "the convolution turned round": convolved(lambda true, x, weight, *rest: true(x, weight.flip(1), *rest)),
    "the convolution counts padding": convolved(
        lambda true, x, weight, there, past: true(x, weight, None, past)
    ),
    "no norm": wrong(Delta, write=lambda self, x, heads: self.proj(heads.transpose(1, 2).flatten(2))),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def plain(**options) -> Delta:
    """One head of two channels without a convolution."""
    return spread(Delta(place(2, 1, 3), conv=0, **options))


def asked(part, k, v, beta):
    """What queries recall that are the keys, before scales: keys and values before silu are large."""
    big = 40.0  # silu(40 x) = 40 x for x in 0, 1
    qkv = torch.cat([big * k, big * k, v], -1)
    return part.carry((qkv, beta), None)[0] * math.sqrt(2)


def test_hand_a_value_is_overwritten():
    """Keys e1, e2, e1 and values 1, 2, 5, β = 1: the third key recalls 5 alone, not 1 + 5."""
    k = torch.tensor([[1.0, 0], [0, 1], [1, 0]]).double()[None]
    v = torch.tensor([30.0, 60, 150]).double()[None, :, None].expand(1, 3, 2)
    near(asked(plain(), k, v, torch.ones(1, 3, 1).double())[0, 0, :, 0] / 30, [1, 2, 5], 1e-8)


def test_hand_half_a_rate():
    """β = 1/2: 1/2, then 1/2 + (5 - 1/2) / 2."""
    k = torch.tensor([[1.0, 0], [1, 0]]).double()[None]
    v = torch.tensor([30.0, 150]).double()[None, :, None].expand(1, 2, 2)
    near(asked(plain(), k, v, torch.full((1, 2, 1), 0.5).double())[0, 0, :, 0] / 30, [0.5, 2.75], 1e-8)


@pytest.mark.parametrize("negative,most", [(False, 1.0), (True, 2.0)])
def test_hand_rates_reach_to_one_or_two(negative, most):
    part, x = plain(negative=negative), torch.ones(1, 3, 2).double()
    nn.init.zeros_(part.rate.weight)
    near(seen(part, x, tap="gate", layout=Layout((3,))), torch.full((1, 3, 1), most / 2))


@pytest.mark.parametrize("conv", [0, 1, 4])
def test_hand_parameters(conv):
    """Q, K, V and W_O c² each, W_β c h, a convolution over each of 3 c channels, a norm of d."""
    assert count(Delta(place(12, 3), conv=conv)) == 4 * 144 + 12 * 3 + 36 * conv + 4
    assert count(Delta(place(12, 3))) == 4 * 144 + 12 * 3 + 36 * 4 + 4


# Identities


def inner(part, x):
    """q, k, v (b h n d) and β (b h n 1), by PyTorch's convolution."""
    qkv, rate = part.read(x)
    if part.conv is not None:
        line = F.pad(qkv.mT, (part.conv.shape[1] - 1, 0))
        qkv = F.conv1d(line, part.conv[:, None], groups=qkv.shape[2]).mT
    q, k, v = (t.unflatten(-1, (part.heads, -1)).transpose(1, 2) for t in F.silu(qkv).chunk(3, -1))
    return unit(q) / math.sqrt(q.shape[-1]), unit(k), v, rate.mT[..., None]


@pytest.mark.parametrize("negative", [False, True])
def test_identity_three_forms_agree(negative):
    """Chunked, recurrent by `step`, and quadratic: tril(Q Kᵀ) (I + β tril(K Kᵀ, -1))⁻¹ β V."""
    part, x = spread(Delta(place(12, 3, 80), negative=negative)), normal(2, 80, 12)
    q, k, v, rate = inner(part, x)
    system = torch.eye(80).double() + rate * (k @ k.mT).tril(-1)
    near(part.carry(part.read(x), None)[0], (q @ k.mT).tril() @ torch.linalg.solve(system, rate * v), 1e-10)
    cache, out = KVCache(), []
    for j in range(80):
        out.append(part.step(x[:, j : j + 1], cache, mask=Mask(causal=True), layout=Layout((j + 1,))))
        assert [tuple(t.shape) for t in cache.carried] == [(2, 3, 36), (2, 3, 4, 4)]
    near(torch.cat(out, 1), part(x, layout=Layout((80,))), 1e-10)


@pytest.mark.parametrize("conv", [0, 1, 4])
def test_identity_padding_is_a_shorter_input_wherever_it_stands(conv):
    x, there = normal(1, 20, 12), torch.rand(1, 20) < 0.6
    for direction in ("forward", "both"):
        part = spread(Delta(place(12, 3, 20), conv=conv, direction=direction))
        out = part(x, mask=Mask(keys=there), layout=Layout((20,)))[:, there[0]]
        fewer = x[:, there[0]]
        near(out, part(fewer, layout=Layout((fewer.shape[1],))), 1e-10)


def test_identity_padding_in_steps():
    """Masks token by token give what the whole mask gives."""
    part, x, there = spread(Delta(place(12, 3, 12))), normal(2, 12, 12), torch.rand(2, 12) < 0.6
    cache, out = KVCache(), []
    for start, stop in ((0, 1), (1, 5), (5, 6), (6, 12)):
        mask = Mask(keys=there[:, :stop], causal=True)
        out.append(part.step(x[:, start:stop], cache, mask=mask, layout=Layout((stop,))))
    near(torch.cat(out, 1), part(x, mask=Mask(keys=there, causal=True), layout=Layout((12,))), 1e-10)


def test_identity_of_small_rates_is_linear_attention():
    """β → 0: β Σ_{j ≤ i} (q_i k_j) v_j, but for β²."""
    part, x = spread(Delta(place(12, 3, 9), conv=0)), normal(2, 9, 12)
    qkv, rate = part.read(x)
    small = torch.full_like(rate, 1e-6)
    q, k, v, _ = inner(part, x)
    near(part.carry((qkv, small), None)[0] / 1e-6, (q @ k.mT).tril() @ v, 1e-4)


def test_identity_a_rate_of_zero_writes_nothing():
    part, x = spread(Delta(place(12, 3, 9))), normal(2, 9, 12)
    qkv, rate = part.read(x)
    near(part.carry((qkv, 0 * rate), None)[0], torch.zeros(2, 3, 9, 4))


def test_identity_a_causal_mask_changes_nothing():
    part, x = spread(Delta(place(12, 3, 9))), normal(2, 9, 12)
    where = {"layout": Layout((9,))}
    assert torch.equal(part(x, **where), part(x, mask=Mask(causal=True), **where))


def test_tokens_of_zeros_have_finite_gradients():
    """Where a query or key has no length."""
    part, x = spread(Delta(place(12, 3, 9))), torch.zeros(1, 9, 12).double().requires_grad_()
    part(x, layout=Layout((9,))).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 1e6


def test_long_sequences_in_single_precision():
    """Rates of nearly 2 and keys alike turn the state again and again; it stays bounded."""
    part, x = Delta(place(8, 2, 2000), negative=True), torch.randn(1, 1, 8).expand(1, 2000, 8).clone()
    out = part(x.requires_grad_(), layout=Layout((2000,)))
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def test_narrow_numbers_stay_near():
    narrow(Delta, [(2, 7, 12)], site=place(12, 3, 7))


def test_convolutions_start_as_pytorchs():
    """Uniform within ± 1 / √w."""
    for w in (4, 9):
        conv = Delta(place(64, 4, 5), conv=w).conv.detach()
        assert float(conv.abs().max()) <= w**-0.5 and float(conv.min()) < 0 < float(conv.max())
        assert abs(float(conv.std()) * 3**0.5 * w**0.5 - 1) < 0.1
