"""Gated linear attention, arXiv:2312.06635, §4."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, place, seen, spread, wrong
from torch import nn

from attnzoo.core import KVCache, Layout, Mask
from attnzoo.mechanisms.recurrent import gated_linear
from attnzoo.mechanisms.recurrent.gated_linear import GatedLinear
from attnzoo.testing import against


def carried(component, x, there, temperature):
    """What one token after the other recalls, (n h d)."""
    h, out, states = component.heads, [], None
    first, second = component.fade
    for token, exists in zip(x, there.tolist(), strict=True):
        q, k = (component.qk.weight @ token).reshape(2, h, -1)
        v = (component.v.weight @ token).reshape(h, -1)
        alpha = torch.sigmoid(second.weight @ (first.weight @ token) + second.bias) ** (1 / temperature)
        if states is None:
            states = [torch.zeros(k.shape[1], v.shape[1]).double()] * h
        if exists:
            alpha = alpha.reshape(h, -1)
            states = [alpha[i][:, None] * s + torch.outer(k[i], v[i]) for i, s in enumerate(states)]
        out.append(torch.stack([q[i] @ s / math.sqrt(k.shape[1]) for i, s in enumerate(states)]))
    return torch.stack(out)


@against(GatedLinear, examples=18)
def test_oracle(component, options, x, keys):
    """Token by token; each head normalised, gated, projected."""
    out, norm = [], component.norm
    for sample, there in zip(x, keys, strict=True):
        heads = carried(component, sample, there, options["temperature"])
        if options["direction"] == "both":
            heads = heads + carried(component, sample.flip(0), there.flip(0), options["temperature"]).flip(0)
        off = heads - heads.mean(-1, keepdim=True)
        normed = off / torch.sqrt((off**2).mean(-1, keepdim=True) + 1e-5) * norm.weight + norm.bias
        gate = sample @ component.gate_by.weight.T + component.gate_by.bias
        out.append((gate * torch.sigmoid(gate) * normed.flatten(1)) @ component.proj.weight.T)
    return torch.stack(out)


# Wrong versions


def scanning(change):
    """The mechanism whose recurrence is another one."""
    true = gated_linear.recurrence
    return patched(
        GatedLinear,
        "recurrence",
        lambda q, k, v, fade, rate, there, *state: change(true, q, k, v, fade, rate, there, *state),
    )


def one_decay(true, q, k, v, fade, *rest):
    return true(q, k, v, fade.mean(-1, keepdim=True), *rest)


def padding_fades(true, q, k, v, fade, rate, there, *state):
    if there is not None:
        k, v = (t * there[:, None, :, None] for t in (k, v))
    return true(q, k, v, fade, rate, None, *state)


def fades_what_is_new(true, q, k, v, fade, *rest):
    return true(q, k * fade.exp(), v, fade, *rest)


def not_causal(true, q, k, v, fade, *rest):
    out, last = true(q, k, v, fade, *rest)
    return q @ last, last


MUTANTS = {
    "no decay": scanning(lambda true, q, k, v, fade, *rest: true(q, k, v, 0 * fade, *rest)),
    "one decay for all channels": scanning(one_decay),
    "no temperature": scanning(lambda true, q, k, v, fade, *rest: true(q, k, v, 16 * fade, *rest)),
    "decays a token late": scanning(
        lambda true, q, k, v, fade, *rest: true(q, k, v, fade.roll(1, 2), *rest)
    ),
    "what is new fades": scanning(fades_what_is_new),
    "padding fades": scanning(padding_fades),
    "padding enters": scanning(lambda true, q, k, v, f, rate, there, *s: true(q, k, v, f, rate, None, *s)),
    "not causal": scanning(not_causal),
    "no scale": scanning(lambda true, q, *rest: true(q * q.shape[-1] ** 0.5, *rest)),
    "queries and keys swapped": scanning(lambda true, q, k, *rest: true(k, q, *rest)),
    "no gate": wrong(GatedLinear, write=lambda self, x, heads: self.proj(self.norm(heads).transpose(1, 2).flatten(2))),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_two_channels_that_fade_apart():
    """α = (1/2, 1) and keys (1, 1): 1 + 1, then (2 + 1/2) + (2 + 1), by 1 / √2."""
    part = GatedLinear(place(2, 1, 2), keys=1.0)
    ones = torch.ones(1, 2, 1, 2).double()
    v = torch.tensor([1.0, 2]).double().reshape(1, 2, 1, 1)
    fade = torch.tensor([0.5, 1]).double().log().expand(1, 2, 1, 2)
    heads, state = part.carry((ones * part.scale, ones, v, fade), None)
    near(heads, [2 / math.sqrt(2), 5.5 / math.sqrt(2)])
    near(state, [2.5, 3])


def test_hand_a_bias_of_zero_keeps_most():
    """σ(0)^(1/16) = 0.9576."""
    part = GatedLinear(place(8, 2, 3)).double()
    nn.init.zeros_(part.fade[1].weight), nn.init.zeros_(part.fade[1].bias)
    fade = seen(part, normal(1, 3, 8), tap="gate", layout=Layout((3,)))
    near(fade.exp(), torch.full((1, 3, 2, 2), 0.5 ** (1 / 16)).double(), 1e-7)
    assert round(float(fade.exp()[0, 0, 0, 0]), 4) == 0.9576


@pytest.mark.parametrize("keys,narrow_", [(0.5, 4), (1.0, 8), (0.0, 1), (0.3, 2)])
def test_hand_parameters(keys, narrow_):
    """Q and K c h d_k each, V, W_r (with a bias) and W_O c² each, W₁ 16 c, W₂ 16 h d_k with a bias, a norm of 2 d."""
    c, wide = 16, 2 * narrow_
    number = 2 * c * wide + 3 * c * c + c + 16 * c + 17 * wide + 2 * 8
    assert count(GatedLinear(place(c, 2), keys=keys)) == number


# Identities


def read_heads(part, x):
    """Queries, keys, values and log α, (b h n ...)."""
    return (t.transpose(1, 2) for t in part.read(x))


def test_identity_three_forms_agree():
    """Chunked, recurrent by `step`, and quadratic: ((Q ⊙ b) (K / b)ᵀ ⊙ M) V, eq. 4."""
    part, x = spread(GatedLinear(place(12, 3, 80))), normal(2, 80, 12)
    q, k, v, fade = read_heads(part, x)
    b = fade.cumsum(2).exp()
    quadratic = ((q * b) @ (k / b).mT).tril() @ v
    near(part.carry(part.read(x), None)[0], quadratic, 1e-10 * float(quadratic.detach().abs().max()))
    cache, out = KVCache(), []
    for j in range(80):
        out.append(part.step(x[:, j : j + 1], cache, mask=Mask(causal=True), layout=Layout((j + 1,))))
        assert [tuple(t.shape) for t in cache.carried] == [(2, 3, 2, 4)]
    near(torch.cat(out, 1), part(x, layout=Layout((80,))), 1e-10)


def test_identity_padding_is_a_shorter_input_wherever_it_stands():
    x, there = normal(1, 20, 12), torch.rand(1, 20) < 0.6
    for direction in ("forward", "both"):
        part = spread(GatedLinear(place(12, 3, 20), direction=direction))
        out = part(x, mask=Mask(keys=there), layout=Layout((20,)))[:, there[0]]
        fewer = x[:, there[0]]
        near(out, part(fewer, layout=Layout((fewer.shape[1],))), 1e-11)


def test_identity_without_fading_it_is_linear_attention():
    """α = 1: Σ_{j ≤ i} (q_i k_j) v_j."""
    part, x = spread(GatedLinear(place(12, 3, 9))), normal(2, 9, 12)
    nn.init.zeros_(part.fade[1].weight), nn.init.constant_(part.fade[1].bias, 60.0)
    q, k, v, _ = read_heads(part, x)
    near(part.carry(part.read(x), None)[0], (q @ k.mT).tril() @ v)


def test_identity_with_full_fading_it_remembers_nothing():
    """α = 0: (q_i k_i) v_i."""
    part, x = spread(GatedLinear(place(12, 3, 9))), normal(2, 9, 12)
    nn.init.zeros_(part.fade[1].weight), nn.init.constant_(part.fade[1].bias, -1e6)
    q, k, v, _ = read_heads(part, x)
    near(part.carry(part.read(x), None)[0], (q * k).sum(-1, keepdim=True) * v)


def test_identity_a_causal_mask_changes_nothing():
    part, x = spread(GatedLinear(place(12, 3, 9))), normal(2, 9, 12)
    where = {"layout": Layout((9,))}
    assert torch.equal(part(x, **where), part(x, mask=Mask(causal=True), **where))


def test_identity_the_last_token_is_the_first_of_the_way_back():
    part, x = spread(GatedLinear(place(12, 3, 9), direction="both")), normal(2, 9, 12)
    where = {"layout": Layout((9,))}
    near(part(x.flip(1), **where).flip(1), part(x, **where))


def test_long_sequences_in_single_precision():
    """Where b underflows, K / b does not exist."""
    part, x = spread(GatedLinear(place(8, 2, 2000), temperature=0.5)).float(), torch.randn(1, 2000, 8)
    out = part(x.requires_grad_(), layout=Layout((2000,)))
    out.square().sum().backward()
    exact = part.double()(x.detach().double(), layout=Layout((2000,)))
    assert x.grad.isfinite().all()
    near(out, exact, 1e-4 * float(exact.detach().abs().max()))


def test_narrow_numbers_stay_near():
    narrow(GatedLinear, [(2, 7, 12)], site=place(12, 3, 7))


def test_large_tokens_in_half_precision():
    """Queries, keys and values are multiplied with each other before anything is divided."""
    torch.manual_seed(0)
    part, x = GatedLinear(place(64, 2, 50)).eval(), 64 * torch.randn(1, 50, 64)
    wanted = part(x, layout=Layout((50,))).detach()
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
        found = part.to(dtype)(x.to(dtype), layout=Layout((50,)))
        near(found, wanted, tolerance * float(wanted.abs().max()))
