"""Retention, arXiv:2307.08621, §2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, place, set_all, spread, wrong

from attnzoo.core import KVCache, Layout, Mask
from attnzoo.mechanisms.recurrent import retention
from attnzoo.mechanisms.recurrent.retention import Retention
from attnzoo.testing import against


def angled(t, position):
    """Pairs of channels of all heads (h d) turned by the position; the last of an odd number stays."""
    t, d = t.clone(), t.shape[1] // 2 * 2
    for i in range(0, d, 2):
        angle = position * 10000 ** (-i / d)
        a, b = t[:, i].clone(), t[:, i + 1].clone()
        t[:, i], t[:, i + 1] = (
            a * math.cos(angle) - b * math.sin(angle),
            a * math.sin(angle) + b * math.cos(angle),
        )
    return t


def retained(component, x, there, turn):
    """What one token after the other recalls, (n h e)."""
    h = component.heads
    fade = torch.tensor([1 - 2 ** (-5 - i) for i in range(h)]).double()[:, None, None]
    state, position, out = 0, 0, []
    for token, exists in zip(x, there.tolist(), strict=True):
        q, k = (component.qk.weight @ token).reshape(2, h, -1)
        v = (component.v.weight @ token).reshape(h, -1)
        position += exists  # that of a token that does not exist is the one before
        if turn:
            q, k = angled(q, position), angled(k, position)
        if exists:
            state = fade * state + (k / math.sqrt(k.shape[1]))[:, :, None] * v[:, None]
        out.append(torch.einsum("hd,hde->he", q, state + torch.zeros(h, q.shape[1], v.shape[1]).double()))
    return torch.stack(out)


@against(Retention, examples=18)
def test_oracle(component, options, x, keys):
    """Token by token; each head normalised, gated, projected."""
    out = []
    for sample, there in zip(x, keys, strict=True):
        heads = retained(component, sample, there, options["turn"])
        if options["direction"] == "both":
            heads = heads + retained(component, sample.flip(0), there.flip(0), options["turn"]).flip(0)
        off = heads - heads.mean(-1, keepdim=True)
        normed = off / torch.sqrt((off**2).mean(-1, keepdim=True) + 1e-5)
        gate = sample @ component.gate_by.weight.T
        out.append((gate * torch.sigmoid(gate) * normed.flatten(1)) @ component.proj.weight.T)
    return torch.stack(out)


# Wrong versions


def scanning(change):
    """Retention whose recurrence is another one."""
    true = retention.recurrence
    return patched(
        Retention,
        "recurrence",
        lambda q, k, v, decay, rate, there, *state: change(true, q, k, v, decay, rate, there, *state),
    )


def placing(change):
    """Retention whose queries and keys are placed otherwise."""
    true = retention.placed
    return patched(Retention, "placed", lambda q, k, *where: change(true, q, k, *where))


def not_causal(true, q, k, v, decay, rate, there, *state):
    out, last = true(q, k, v, decay, rate, there, *state)
    return q @ last, last


def padding_fades(true, q, k, v, decay, rate, there, *state):
    if there is not None:
        k, v = (t * there[:, None, :, None] for t in (k, v))
    return true(q, k, v, decay, rate, None, *state)


def read_first(true, q, k, v, decay, rate, there, *state):
    out, last = true(q, k, v, decay, rate, there, *state)
    there = 1 if there is None else there[:, None, :, None]
    return out - (q * k).sum(-1, keepdim=True) * v * there, last


def write_without_gate(self, x, heads):
    return self.proj(torch.layer_norm(heads, (self.width,)).transpose(1, 2).flatten(2))


def write_normed_over_heads(self, x, heads):
    merged = heads.transpose(1, 2).flatten(2)
    return self.proj(torch.nn.functional.silu(self.gate_by(x)) * torch.layer_norm(merged, merged.shape[-1:]))


MUTANTS = {
    "no decay": scanning(lambda true, q, k, v, decay, *rest: true(q, k, v, 0 * decay, *rest)),
    "the heads' decays turned round": scanning(
        lambda true, q, k, v, decay, *rest: true(q, k, v, decay.flip(0), *rest)
    ),
    "the decay twice": scanning(lambda true, q, k, v, decay, *rest: true(q, k, v, 2 * decay, *rest)),
    "not causal": scanning(not_causal),
    "padding fades": scanning(padding_fades),
    "padding enters": scanning(lambda true, q, k, v, g, rate, there, *s: true(q, k, v, g, rate, None, *s)),
    "read before it is written": scanning(read_first),
    "no scale": scanning(lambda true, q, k, *rest: true(q, k * k.shape[-1] ** 0.5, *rest)),
    "queries and keys swapped": scanning(lambda true, q, k, *rest: true(k, q, *rest)),
    "padding turns": placing(lambda true, q, k, there, *rest: true(q, k, None, *rest)),
    "queries not turned": placing(lambda true, q, k, *rest: (q, *true(q, k, *rest)[1:])),
    "no gate": wrong(Retention, write=write_without_gate),
    "one norm for all heads": wrong(Retention, write=write_normed_over_heads),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_what_fades():
    """One head, γ = 31/32, q = k = 1: 1, then 2 + 31/32, then 4 + 2 γ + γ²."""
    part = Retention(place(1, 1, 3), expand=1)
    ones, v = torch.ones(1, 3, 1).double(), torch.tensor([1.0, 2, 4]).double().reshape(1, 3, 1)
    heads, count, state = part.carry((ones, ones, v), None)
    g = 31 / 32
    near(heads, [1, 2 + g, 4 + 2 * g + g * g])
    near(state, 4 + 2 * g + g * g)
    assert count.tolist() == [3]


def test_hand_decays_of_the_heads():
    """1 - 1/32, 1 - 1/64, 1 - 1/128, and so on, exactly in double precision."""
    q = torch.zeros(1, 8, 1, 2).double()
    decay = retention.placed(q, q, None, None, True)[2]
    near(decay.exp(), torch.tensor([[[1 - 2.0 ** (-5 - i)]] for i in range(8)]), 1e-15)


@pytest.mark.parametrize("expand,number", [(1, 5 * 64), (2, 8 * 64)])
def test_hand_parameters(expand, number):
    """Q and K c², V, the gate and the output `expand` c² each: 8 c² in the paper; no biases, and nothing by head."""
    assert count(Retention(place(8, 2), expand=expand)) == number
    assert count(Retention(place(8, 2))) == 8 * 64


def test_hand_an_output_of_constant_heads_is_zero():
    """A norm of equal channels is zero."""
    part = set_all(Retention(place(4, 2, 5)), 0.5)
    near(part(normal(1, 5, 4), layout=Layout((5,))), torch.zeros(5, 4))


# Identities


def heads_of(part, x, mask=None):
    """What is retained, before norms, (b h n e)."""
    return part.carry(part.read(x), mask)[0]


def test_identity_three_forms_agree():
    """Chunked, recurrent by `step`, and quadratic: ((Q Kᵀ) ⊙ D) V."""
    part, x = spread(Retention(place(12, 3, 80))), normal(2, 80, 12)
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in part.read(x))
    i = torch.arange(80).double()
    gamma = (1 - 2.0 ** (-5 - torch.arange(3).double()))[:, None, None]
    theta = 10000 ** (-torch.arange(0, 4, 2).double() / 4)
    q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) for t in (q, k))
    turned = torch.polar(torch.ones(80, 2).double(), i[:, None] * theta)
    scores = torch.einsum("bhnd,bhmd->bhnm", q * turned, (k * turned).conj()).real / 2
    quadratic = (scores * (gamma ** (i[:, None] - i)).tril()) @ v
    near(heads_of(part, x), quadratic, 1e-10)
    cache, out = KVCache(), []
    for j in range(80):
        out.append(part.step(x[:, j : j + 1], cache, mask=Mask(causal=True), layout=Layout((j + 1,))))
    near(torch.cat(out, 1), part(x, layout=Layout((80,))), 1e-10)


def test_identity_the_state_has_one_size():
    part, cache = spread(Retention(place(12, 3))), KVCache()
    for n in (1, 7, 100):
        part.step(normal(2, n, 12), cache, mask=Mask(), layout=Layout((n,)))
        assert [tuple(t.shape) for t in cache.carried] == [(2,), (2, 3, 4, 8)]


def test_identity_padding_is_a_shorter_input_wherever_it_stands():
    part, x, there = spread(Retention(place(12, 3, 20))), normal(1, 20, 12), torch.rand(1, 20) < 0.6
    for direction in ("forward", "both"):
        part.direction = direction
        out = part(x, mask=Mask(keys=there), layout=Layout((20,)))[:, there[0]]
        fewer = x[:, there[0]]
        near(out, part(fewer, layout=Layout((fewer.shape[1],))), 1e-11)


def test_identity_a_causal_mask_changes_nothing():
    part, x = spread(Retention(place(12, 3, 9))), normal(2, 9, 12)
    where = {"layout": Layout((9,))}
    assert torch.equal(part(x, **where), part(x, mask=Mask(causal=True), **where))


def test_identity_both_ways_is_distance():
    """Σ_j γ^|i-j| q_i k_j v_j, the token itself twice, where nothing is turned."""
    part, x = spread(Retention(place(12, 3, 9), turn=False, direction="both")), normal(2, 9, 12)
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in part.read(x))
    i = torch.arange(9).double()
    apart = (i[:, None] - i).abs()
    gamma = (1 - 2.0 ** (-5 - torch.arange(3).double()))[:, None, None]
    retained = (q @ k.mT / 2 * gamma**apart * (1 + (apart == 0).double())) @ v
    near(part(x, layout=Layout((9,))), part.write(x, retained))


def test_identity_scores_depend_on_the_distance():
    """Tokens in front that write nothing move all positions and change nothing."""
    part, x = spread(Retention(place(12, 3, 9))), normal(2, 9, 12)
    later = torch.cat([torch.zeros(2, 40, 12).double(), x], 1)
    near(part(later, layout=Layout((49,)))[:, 40:], part(x, layout=Layout((9,))), 1e-11)


def test_long_sequences_in_single_precision():
    part, x = Retention(place(8, 2, 3000)).eval(), torch.randn(1, 3000, 8).requires_grad_()
    out = part(x, layout=Layout((3000,)))
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def test_narrow_numbers_stay_near():
    narrow(Retention, [(2, 7, 12)], site=place(12, 3, 7))


def test_large_tokens_in_half_precision():
    """Queries, keys and values are multiplied with each other before anything is divided."""
    torch.manual_seed(0)
    part, x = Retention(place(64, 2, 50)).eval(), 64 * torch.randn(1, 50, 64)
    wanted = part(x, layout=Layout((50,))).detach()
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
        found = part.to(dtype)(x.to(dtype), layout=Layout((50,)))
        near(found, wanted, tolerance * float(wanted.abs().max()))
