"""The gated delta rule, arXiv:2412.06464, §3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, place, seen, spread, wrong
from torch import nn
from torch.nn import functional as F

from attnzoo.core import KVCache, Layout, Mask
from attnzoo.mechanisms.recurrent import gated_delta
from attnzoo.mechanisms.recurrent.gated_delta import GatedDelta
from attnzoo.testing import against


def silu(x):
    return x / (1 + torch.exp(-x))


def unit(x):
    """Of length 1, but for 10⁻⁶."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def carried(component, x, there, options):
    """What one token after the other recalls, (n h e)."""
    h, c, out, window = component.heads, x.shape[1], [], []
    d, e = c // h, options["expand"] * c // h
    states = [torch.zeros(d, e).double()] * h
    for token, exists in zip(x, there.tolist(), strict=True):
        now = component.qkv.weight @ token
        seen = [*window, now]
        if component.conv is not None:  # the newest of those that exist, and the token itself
            weights = component.conv.flip(1).unbind(1)
            now = sum(w * old for w, old in zip(weights, reversed(seen), strict=False))
        if exists:
            window = seen
        now = silu(now)
        q, k, v = now[:c].reshape(h, d), now[c : 2 * c].reshape(h, d), now[2 * c :].reshape(h, e)
        q, k = unit(q) / math.sqrt(d), unit(k)
        a, b = (component.rate.weight @ token).reshape(2, h)
        alpha = torch.exp(-torch.exp(component.log_a) * torch.log(1 + torch.exp(a + component.shift)))
        beta = torch.sigmoid(b) * (2 if options["negative"] else 1)
        if exists:
            faded = [alpha[i] * s for i, s in enumerate(states)]
            states = [s + beta[i] * torch.outer(k[i], v[i] - s.T @ k[i]) for i, s in enumerate(faded)]
        out.append(torch.stack([s.T @ q[i] for i, s in enumerate(states)]))
    return torch.stack(out)


@against(GatedDelta, examples=14)
def test_oracle(component, options, x, keys):
    """Token by token; each head divided by the root of its mean square, gated, projected."""
    out = []
    for sample, there in zip(x, keys, strict=True):
        heads = carried(component, sample, there, options)
        if options["direction"] == "both":
            heads = heads + carried(component, sample.flip(0), there.flip(0), options).flip(0)
        normed = heads / torch.sqrt((heads**2).mean(-1, keepdim=True) + 1e-5) * component.norm.weight
        gate = silu(sample @ component.gate_by.weight.T)
        out.append((gate * normed.flatten(1)) @ component.proj.weight.T)
    return torch.stack(out)


# Wrong versions


def scanning(change):
    """The mechanism whose recurrence is another one."""
    true = gated_delta.recurrence
    return patched(
        GatedDelta,
        "recurrence",
        lambda q, k, v, fade, rate, there, *state: change(true, q, k, v, fade, rate, there, *state),
    )


def convolved(change):
    """The mechanism whose convolution is another one."""
    true = gated_delta.short_conv
    return patched(
        GatedDelta, "short_conv", lambda x, weight, there, past: change(true, x, weight, there, past)
    )


def padding_enters(true, q, k, v, fade, rate, there, *state):
    return true(q, k, v, fade, rate, None, *state)


def not_causal(true, q, k, v, *rest):
    out, last = true(q, k, v, *rest)
    return q @ last, last


def added(true, q, k, v, fade, rate, there, *state):
    return true(q, k, rate * v, fade, None, there, *state)


def new_fades(true, q, k, v, fade, rate, there, *state):
    """What is new fades with what was there."""
    return true(q, k, v * fade.exp(), fade, rate, there, *state)


def padding_fades(true, q, k, v, fade, rate, there, *state):
    if there is not None:
        k, v = (t * there[:, None, :, None] for t in (k, v))
    return true(q, k, v, fade, rate, None, *state)


def write_without_gate(self, x, heads):
    return self.proj(self.norm(heads).transpose(1, 2).flatten(2))


def write_gated_first(self, x, heads):
    gate = F.silu(self.gate_by(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
    return self.proj(self.norm(heads * gate).transpose(1, 2).flatten(2))


MUTANTS = {
    "no decay": scanning(lambda true, q, k, v, fade, *rest: true(q, k, v, 0 * fade, *rest)),
    "decays a token late": scanning(lambda true, q, k, v, f, *rest: true(q, k, v, f.roll(1, 2), *rest)),
    "what is new fades": scanning(new_fades),
    "padding fades": scanning(padding_fades),
    "no gate": wrong(GatedDelta, write=write_without_gate),
    "gated before the norm": wrong(GatedDelta, write=write_gated_first),
    "added in the place of corrected": scanning(added),
    "no rate": scanning(lambda true, q, k, v, fade, rate, *rest: true(q, k, v, fade, rate**0, *rest)),
    "the rate on what is new alone": scanning(
        lambda true, q, k, v, fade, rate, *rest: true(q, k, rate * v, fade, rate**0, *rest)
    ),
    "padding enters": scanning(padding_enters),
    "not causal": scanning(not_causal),
    "no scale": scanning(lambda true, q, *rest: true(q * q.shape[-1] ** 0.5, *rest)),
    "queries and keys swapped": scanning(lambda true, q, k, *rest: true(k, q, *rest)),
    "keys of any length": patched(GatedDelta, "unit", lambda t: t),
    "lengths over the tokens": patched(GatedDelta, "unit", lambda t: F.normalize(t, dim=2)),
    "the convolution turned round": convolved(lambda true, x, weight, *rest: true(x, weight.flip(1), *rest)),
    "the convolution counts padding": convolved(
        lambda true, x, weight, there, past: true(x, weight, None, past)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def asked(k, values, beta, alpha):
    """What queries recall that are the keys of one head of two channels, of which silu makes nearly 1 or 0."""
    part = spread(GatedDelta(place(2, 1, 3), conv=0, expand=1))
    v = torch.tensor(values).double()[None, :, None].expand(1, -1, 2)
    qkv = torch.cat([40 * k[None], 40 * k[None], 30 * v], -1)
    one = torch.ones(1, len(values), 1).double()
    heads = part.carry((qkv, math.log(alpha) * one, beta * one), None)[0]
    return heads[0, 0, :, 0] * math.sqrt(2) / 30


KEYS = torch.tensor([[1.0, 0], [0, 1], [1, 0]]).double()


def test_hand_a_value_is_overwritten():
    """Keys e1, e2, e1 and values 1, 2, 5, β = 1 and α = 1: the third key recalls 5 alone."""
    near(asked(KEYS, [1.0, 2, 5], 1.0, 1.0), [1, 2, 5], 1e-8)


def test_hand_half_a_rate_and_half_a_decay():
    """1/2; 1; then 1/8 of the first is left, of which the half goes, and half of 5 comes: 2.5625."""
    near(asked(KEYS, [1.0, 2, 5], 0.5, 0.5), [0.5, 1, 2.5625], 1e-8)


@pytest.mark.parametrize("negative,most", [(False, 1.0), (True, 2.0)])
def test_hand_the_gates(negative, most):
    """W = 0: β = 1/2 or 1, and log α = -A softplus(a)."""
    part, x = GatedDelta(place(8, 2, 3), negative=negative).double(), normal(1, 3, 8)
    nn.init.zeros_(part.rate.weight)
    near(seen(part, x, tap="gate_write", layout=Layout((3,))), torch.full((1, 3, 2), most / 2))
    fade = -part.log_a.exp() * (1 + part.shift.exp()).log()
    near(seen(part, x, tap="gate_fade", layout=Layout((3,))), fade.expand(1, 3, 2))


def test_hand_where_it_starts():
    """A from 0 to 16, and softplus(a) from 0.001 to 0.1, evenly in its logarithm."""
    part = GatedDelta(place(400, 400), expand=1, conv=0).double()
    a, step = part.log_a.exp(), (1 + part.shift.exp()).log()
    assert 0 < a.min() < 0.5 and 15.5 < a.max() <= 16 and abs(a.mean() - 8) < 1.5
    assert (
        step.min() + 1e-8 >= 1e-3
        and step.max() <= 0.1 + 1e-6
        and abs(step.log().mean() - math.log(1e-2)) < 0.4
    )


@pytest.mark.parametrize("expand,conv", [(2, 4), (1, 0), (3, 2)])
def test_hand_parameters(expand, conv):
    """Q and K c² each, V, W_G and W_O `expand` c² each, W_α and W_β c h each, log A, a, convolutions, a norm of e."""
    number = (2 + 3 * expand) * 144 + 2 * 12 * 3 + 2 * 3 + (2 + expand) * 12 * conv + 4 * expand
    assert count(GatedDelta(place(12, 3), expand=expand, conv=conv)) == number
    if (expand, conv) == (2, 4):
        assert count(GatedDelta(place(12, 3))) == number


# Identities


def inner(part, x):
    """q, k (b h n d), v (b h n e), log α and β (b h n 1), by PyTorch's convolution."""
    qkv, fade, rate = part.read(x)
    if part.conv is not None:
        line = F.pad(qkv.mT, (part.conv.shape[1] - 1, 0))
        qkv = F.conv1d(line, part.conv[:, None], groups=qkv.shape[2]).mT
    c = x.shape[2]
    parts = F.silu(qkv).split((c, c, qkv.shape[2] - 2 * c), -1)
    q, k, v = (t.unflatten(-1, (part.heads, -1)).transpose(1, 2) for t in parts)
    return unit(q) / math.sqrt(q.shape[-1]), unit(k), v, fade.mT[..., None], rate.mT[..., None]


@pytest.mark.parametrize("negative", [False, True])
def test_identity_three_forms_agree(negative):
    """Chunked, recurrent by `step`, and quadratic: (Q Kᵀ ⊙ D) (I + β tril(K Kᵀ ⊙ D, -1))⁻¹ β V."""
    part, x = spread(GatedDelta(place(12, 3, 80), negative=negative)), normal(2, 80, 12)
    q, k, v, fade, rate = inner(part, x)
    upto = fade.cumsum(2)
    between = (upto - upto.mT).tril().exp().tril()
    system = torch.eye(80).double() + rate * (k @ k.mT * between).tril(-1)
    quadratic = (q @ k.mT * between) @ torch.linalg.solve(system, rate * v)
    near(part.carry(part.read(x), None)[0], quadratic, 1e-10)
    cache, out = KVCache(), []
    for j in range(80):
        out.append(part.step(x[:, j : j + 1], cache, mask=Mask(causal=True), layout=Layout((j + 1,))))
        assert [tuple(t.shape) for t in cache.carried] == [(2, 3, 48), (2, 3, 4, 8)]
    near(torch.cat(out, 1), part(x, layout=Layout((80,))), 1e-10)


@pytest.mark.parametrize("conv", [0, 1, 4])
def test_identity_padding_is_a_shorter_input_wherever_it_stands(conv):
    x, there = normal(1, 20, 12), torch.rand(1, 20) < 0.6
    for direction in ("forward", "both"):
        part = spread(GatedDelta(place(12, 3, 20), conv=conv, direction=direction))
        out = part(x, mask=Mask(keys=there), layout=Layout((20,)))[:, there[0]]
        fewer = x[:, there[0]]
        near(out, part(fewer, layout=Layout((fewer.shape[1],))), 1e-10)


def test_identity_padding_in_steps():
    """Masks token by token give what the whole mask gives."""
    part, x, there = spread(GatedDelta(place(12, 3, 12))), normal(2, 12, 12), torch.rand(2, 12) < 0.6
    cache, out = KVCache(), []
    for start, stop in ((0, 1), (1, 5), (5, 6), (6, 12)):
        mask = Mask(keys=there[:, :stop], causal=True)
        out.append(part.step(x[:, start:stop], cache, mask=mask, layout=Layout((stop,))))
    near(torch.cat(out, 1), part(x, mask=Mask(keys=there, causal=True), layout=Layout((12,))), 1e-10)


def test_identity_without_fading_small_rates_are_linear_attention():
    """α = 1, β → 0: β Σ_{j ≤ i} (q_i k_j) v_j, but for β²."""
    part, x = spread(GatedDelta(place(12, 3, 9), conv=0)), normal(2, 9, 12)
    qkv, fade, rate = part.read(x)
    q, k, v, _, _ = inner(part, x)
    found = part.carry((qkv, 0 * fade, torch.full_like(rate, 1e-6)), None)[0] / 1e-6
    near(found, (q @ k.mT).tril() @ v, 1e-4)


def test_identity_full_fading_remembers_nothing():
    """α = 0: β_i (q_i k_i) v_i."""
    part, x = spread(GatedDelta(place(12, 3, 9), conv=0)), normal(2, 9, 12)
    qkv, fade, rate = part.read(x)
    q, k, v, _, beta = inner(part, x)
    found = part.carry((qkv, torch.full_like(fade, -math.inf), rate), None)[0]
    near(found, beta * (q * k).sum(-1, keepdim=True) * v)


def test_identity_a_rate_of_zero_is_pure_decay():
    """β = 0: a state that is there fades, and nothing is written."""
    part, x = spread(GatedDelta(place(12, 3, 9), conv=0)), normal(2, 9, 12)
    qkv, fade, rate = part.read(x)
    start = normal(2, 3, 4, 8)
    last = part.carry((qkv, fade, 0 * rate), None, (qkv[:, :0], start))[2]
    near(last, fade.sum(1).exp()[..., None, None] * start)


def test_identity_a_causal_mask_changes_nothing():
    part, x = spread(GatedDelta(place(12, 3, 9))), normal(2, 9, 12)
    where = {"layout": Layout((9,))}
    assert torch.equal(part(x, **where), part(x, mask=Mask(causal=True), **where))


def test_tokens_of_zeros_have_finite_gradients():
    """Where a query or key has no length."""
    part, x = spread(GatedDelta(place(12, 3, 9))), torch.zeros(1, 9, 12).double().requires_grad_()
    part(x, layout=Layout((9,))).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 1e6


def test_long_sequences_in_single_precision():
    """Rates of nearly 2 and keys alike turn the state again and again; it stays bounded."""
    part, x = GatedDelta(place(8, 2, 2000), negative=True), torch.randn(1, 1, 8).expand(1, 2000, 8).clone()
    out = part(x.requires_grad_(), layout=Layout((2000,)))
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def test_narrow_numbers_stay_near():
    narrow(GatedDelta, [(2, 7, 12)], site=place(12, 3, 7))
