"""State space duality, arXiv:2405.21060."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, place, seen, spread, wrong
from torch import nn
from torch.nn import functional as F

from attnzoo.core import KVCache, Layout, Mask
from attnzoo.mechanisms.recurrent import state_space
from attnzoo.mechanisms.recurrent.state_space import StateSpace
from attnzoo.testing import against


def silu(x):
    return x / (1 + torch.exp(-x))


def carried(component, x, there, options):
    """y of one token after the other, (n h e)."""
    h, inner, r = component.heads, options["expand"] * x.shape[1], options["state"]
    states, out, window = [torch.zeros(r, inner // h).double()] * h, [], []
    for token, exists in zip(x, there.tolist(), strict=True):
        now = component.xbc.weight @ token
        seen = [*window, now]
        if component.conv is not None:  # the newest of those that exist, and the token itself
            weights = component.conv.flip(1).unbind(1)
            now = component.conv_bias + sum(w * old for w, old in zip(weights, reversed(seen), strict=False))
        if exists:
            window = seen
        now = silu(now)
        u, b, c = now[:inner].reshape(h, -1), now[inner : inner + r], now[inner + r :]
        step = torch.log(1 + torch.exp(component.steps.weight @ token + component.shift))
        a = -torch.exp(component.log_a)
        if exists:
            states = [
                torch.exp(a[i] * step[i]) * s + step[i] * torch.outer(b, u[i]) for i, s in enumerate(states)
            ]
        out.append(torch.stack([c @ s + component.through[i] * u[i] for i, s in enumerate(states)]))
    return torch.stack(out)


@against(StateSpace, examples=14, options=lambda options: "state" in options)
def test_oracle(component, options, x, keys):
    """Token by token; gated, then divided by the root of the mean square of all heads, projected."""
    out = []
    for sample, there in zip(x, keys, strict=True):
        heads = carried(component, sample, there, options)
        if options["direction"] == "both":
            heads = heads + carried(component, sample.flip(0), there.flip(0), options).flip(0)
        y = heads.flatten(1) * silu(sample @ component.gate_by.weight.T)
        normed = y / torch.sqrt((y**2).mean(-1, keepdim=True) + 1e-5) * component.norm.weight
        out.append(normed @ component.proj.weight.T)
    return torch.stack(out)


# Wrong versions


def scanning(change):
    """The mechanism whose recurrence is another one."""
    true = state_space.recurrence
    return patched(
        StateSpace,
        "recurrence",
        lambda q, k, v, fade, rate, there, *state: change(true, q, k, v, fade, rate, there, *state),
    )


def convolved(change):
    """The mechanism whose convolution is another one."""
    true = state_space.short_conv
    return patched(StateSpace, "short_conv", lambda x, weight, *rest: change(true, x, weight, *rest))


def padding_fades(true, q, k, v, fade, rate, there, *state):
    if there is not None:
        k, v = (t * there[:, None, :, None] for t in (k, v))
    return true(q, k, v, fade, rate, None, *state)


def not_causal(true, q, k, v, *rest):
    out, last = true(q, k, v, *rest)
    return q @ last, last


def without_through(self, read, there, past=()):
    xbc, fade, step = read
    heads, *state = StateSpace.carry(self, read, there, past)
    if self.conv is not None:
        xbc = state_space.short_conv(xbc, self.conv, there, None)[0] + self.conv_bias
    u = F.silu(xbc)[..., : self.sizes[0]].unflatten(-1, (self.heads, -1)).transpose(1, 2)
    return heads - self.through[:, None, None] * u, *state


def write_normed_first(self, x, heads):
    return self.proj(self.norm(heads.transpose(1, 2).flatten(2)) * F.silu(self.gate_by(x)))


MUTANTS = {
    "no decay": scanning(lambda true, q, k, v, fade, *rest: true(q, k, v, 0 * fade, *rest)),
    "a step that does not weigh what is written": scanning(
        lambda true, q, k, v, fade, *rest: true(q, k, v / v.norm(dim=-1, keepdim=True), fade, *rest)
    ),
    "what is new fades": scanning(lambda true, q, k, v, fade, *rest: true(q, k, v * fade.exp(), fade, *rest)),
    "decays a token late": scanning(lambda true, q, k, v, f, *rest: true(q, k, v, f.roll(1, 2), *rest)),
    "padding fades": scanning(padding_fades),
    "padding enters": scanning(lambda true, q, k, v, f, rate, there, *s: true(q, k, v, f, rate, None, *s)),
    "not causal": scanning(not_causal),
    "B and C swapped": scanning(lambda true, q, k, *rest: true(k, q, *rest)),
    "scaled": scanning(lambda true, q, *rest: true(q * 0.5, *rest)),
    "the convolution turned round": convolved(lambda true, x, weight, *rest: true(x, weight.flip(1), *rest)),
    "the convolution counts padding": convolved(lambda true, x, w, there, past: true(x, w, None, past)),
    "no way past the state": wrong(StateSpace, carry=without_through),
    "the norm before the gate": wrong(StateSpace, write=write_normed_first),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_three_steps():
    """B = C = x = s, Δ = 1, exp(-A) = 1/2, D = 2: h = s², then h/2 + s²; y = s h + 2 s, s = silu of the projection."""
    part = StateSpace(place(1, 1, 3), expand=1, state=1, conv=0).double()
    nn.init.constant_(part.through, 2.0)
    one = torch.ones(1, 3, 1).double()
    heads, _, last = part.carry((one.expand(1, 3, 3), math.log(0.5) * one, one), None)
    s = 1 / (1 + math.exp(-1))
    near(heads, [s**3 + 2 * s, 1.5 * s**3 + 2 * s, 1.75 * s**3 + 2 * s])
    near(last, 1.75 * s**2)


def test_hand_the_gates():
    """W_Δ = 0: Δ = softplus(a), and -A Δ."""
    part, x = StateSpace(place(8, 2, 3), state=3).double(), normal(1, 3, 8)
    nn.init.zeros_(part.steps.weight)
    step = (1 + part.shift.exp()).log()
    near(seen(part, x, tap="gate_write", layout=Layout((3,))), step.expand(1, 3, 2))
    near(seen(part, x, tap="gate_fade", layout=Layout((3,))), (-part.log_a.exp() * step).expand(1, 3, 2))


def test_hand_where_it_starts():
    """A from 1 to 16, D = 1, and softplus(a) from 0.001 to 0.1."""
    part = StateSpace(place(400, 400), expand=1, conv=0, state=1).double()
    a, step = part.log_a.exp(), (1 + part.shift.exp()).log()
    assert a.min() + 1e-6 >= 1 and a.min() < 1.5 and 15.5 < a.max() < 16.001
    assert step.min() + 1e-8 >= 1e-3 and step.max() <= 0.1 + 1e-6
    near(part.through, torch.ones(400))


@pytest.mark.parametrize("expand,state,conv", [(2, 128, 4), (1, 3, 0), (3, 2, 2)])
def test_hand_parameters(expand, state, conv):
    """x, z and the output `expand` c² each, B and C r c, W_Δ c h, convolutions and their bias, log A, a, D, a norm."""
    mixed = expand * 12 + 2 * state
    number = 3 * expand * 144 + 2 * state * 12 + 12 * 3 + mixed * (conv + 1 if conv else 0) + 9 + expand * 12
    assert count(StateSpace(place(12, 3), expand=expand, state=state, conv=conv)) == number
    if conv == 4:
        assert count(StateSpace(place(12, 3))) == number


# Identities


def inner(part, x):
    """C and B (b 1 n r), x (b h n e), log α and Δ (b h n 1), by PyTorch's convolution."""
    xbc, fade, step = part.read(x)
    if part.conv is not None:
        line = F.pad(xbc.mT, (part.conv.shape[1] - 1, 0))
        xbc = F.conv1d(line, part.conv[:, None], part.conv_bias, groups=xbc.shape[2]).mT
    u, b, c = F.silu(xbc).split(part.sizes, -1)
    u = u.unflatten(-1, (part.heads, -1)).transpose(1, 2)
    return c[:, None], b[:, None], u, fade.mT[..., None], step.mT[..., None]


def test_identity_three_forms_agree():
    """Chunked, recurrent by `step`, and quadratic, the duality: (L ⊙ C Bᵀ) Δ x + D x."""
    part, x = spread(StateSpace(place(12, 3, 80), state=5)), normal(2, 80, 12)
    c, b, u, fade, step = inner(part, x)
    upto = fade.cumsum(2)
    between = (upto - upto.mT).tril().exp().tril()
    quadratic = (c @ b.mT * between) @ (step * u) + part.through[:, None, None] * u
    near(part.carry(part.read(x), None)[0], quadratic, 1e-10)
    cache, out = KVCache(), []
    for j in range(80):
        out.append(part.step(x[:, j : j + 1], cache, mask=Mask(causal=True), layout=Layout((j + 1,))))
        assert [tuple(t.shape) for t in cache.carried] == [(2, 3, 34), (2, 3, 5, 8)]
    near(torch.cat(out, 1), part(x, layout=Layout((80,))), 1e-10)


@pytest.mark.parametrize("conv", [0, 4])
def test_identity_padding_is_a_shorter_input_wherever_it_stands(conv):
    x, there = normal(1, 20, 12), torch.rand(1, 20) < 0.6
    for direction in ("forward", "both"):
        part = spread(StateSpace(place(12, 3, 20), state=5, conv=conv, direction=direction))
        out = part(x, mask=Mask(keys=there), layout=Layout((20,)))[:, there[0]]
        fewer = x[:, there[0]]
        near(out, part(fewer, layout=Layout((fewer.shape[1],))), 1e-10)


def test_identity_steps_of_zero_leave_the_token_alone():
    """Δ = 0: nothing is written and nothing fades; y = D x."""
    part, x = spread(StateSpace(place(12, 3, 9), state=5)), normal(2, 9, 12)
    xbc, fade, step = part.read(x)
    near(part.carry((xbc, 0 * fade, 0 * step), None)[0], part.through[:, None, None] * inner(part, x)[2])


def test_identity_without_fading_it_is_linear_attention():
    """A = 0: Σ_{j ≤ i} (C_i B_j) Δ_j x_j."""
    part, x = spread(StateSpace(place(12, 3, 9), state=5)), normal(2, 9, 12)
    nn.init.constant_(part.log_a, -math.inf), nn.init.zeros_(part.through)
    c, b, u, _, step = inner(part, x)
    near(part.carry(part.read(x), None)[0], (c @ b.mT).tril() @ (step * u))


def test_identity_a_causal_mask_changes_nothing():
    part, x = spread(StateSpace(place(12, 3, 9), state=5)), normal(2, 9, 12)
    where = {"layout": Layout((9,))}
    assert torch.equal(part(x, **where), part(x, mask=Mask(causal=True), **where))


def test_long_sequences_in_single_precision():
    part, x = StateSpace(place(8, 2, 2000), state=8), torch.randn(1, 2000, 8).requires_grad_()
    out = part(x, layout=Layout((2000,)))
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def test_narrow_numbers_stay_near():
    narrow(StateSpace, [(2, 7, 12)], site=place(12, 3, 7), state=5)


def test_large_tokens_in_half_precision():
    """u, B and C are multiplied with each other and with the gate before anything is divided."""
    torch.manual_seed(0)
    part, x = StateSpace(place(64, 2, 50)).eval(), 32 * torch.randn(1, 50, 64)
    wanted = part(x, layout=Layout((50,))).detach()
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
        found = part.to(dtype)(x.to(dtype), layout=Layout((50,)))
        near(found, wanted, tolerance * float(wanted.abs().max()))
