"""Slot attention as a pool, arXiv:2006.15055, §2.1, alg. 1."""

import math

import pytest
import torch
from by_hand import caught, count, near, normal, place, seen, spread, wrong

from attnzoo.core import Layout, Mask, options_of
from attnzoo.mechanisms.latent.slot import Slot
from attnzoo.testing import against


def normed(layer, y):
    """Layer normalisation of each row, written out."""
    centred = y - y.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + layer.eps) * layer.weight + layer.bias


def sigmoid(y):
    return 1 / (1 + torch.exp(-y))


@against(Slot, examples=12, options=lambda options: {"slots", "hidden"} <= set(options))
def test_oracle(component, options, x, keys):
    """Token by token: its shares are softmax over the slots; slot by slot: the weighted mean, and a GRU of it."""
    (b, n, c), out, gru, mlp = x.shape, [], component.gru, component.mlp
    for s in range(b):
        tokens = normed(component.norm_tokens, x[s])
        there = [j for j in range(n) if keys[s, j]]
        k, v = tokens @ component.k.weight.T, tokens @ component.v.weight.T
        if options["start"] == "learned":
            slots = list(component.mean)
        else:
            slots = [component.mean[0] + torch.exp(component.log_std[0]) * e for e in component.noise]
        for _ in range(options["rounds"]):
            q = [component.q.weight @ normed(component.norm_slots, slot) for slot in slots]
            shares = {}
            for j in there:
                e = torch.stack([torch.exp(k[j] @ one / math.sqrt(c)) for one in q])
                shares[j] = e / e.sum() + 1e-8
            for i, slot in enumerate(slots):
                total = sum(shares[j][i] for j in there)
                u = sum((shares[j][i] / total * v[j] for j in there), torch.zeros(c).double())
                new, old = gru.weight_ih @ u + gru.bias_ih, gru.weight_hh @ slot + gru.bias_hh
                reset, update = sigmoid(new[:c] + old[:c]), sigmoid(new[c : 2 * c] + old[c : 2 * c])
                candidate = torch.tanh(new[2 * c :] + reset * old[2 * c :])
                slot = (1 - update) * candidate + update * slot
                hidden = mlp[0].weight @ normed(component.norm, slot) + mlp[0].bias
                slots[i] = slot + mlp[2].weight @ torch.where(hidden > 0, hidden, 0.0) + mlp[2].bias
        out.append(sum(slots) / len(slots))
    return torch.stack(out)


def pooled(
    part, x, mask, over=1, scale=-0.5, mean=True, mlp=True, residual=True, state=False, gru=True, std=torch.exp,
    rounds=0, late_mask=False, early_mask=False,
):  # fmt: skip
    """The equations with a fault."""
    keys = torch.ones_like(x[..., 0], dtype=torch.bool) if mask.keys is None else mask.keys
    keys, tokens = keys[:, None], part.norm_tokens(x)
    k, v = part.k(tokens), part.v(tokens)
    s = part.mean if part.log_std is None else part.mean + std(part.log_std) * part.noise
    s = s.expand(len(x), part.slots, -1)
    for _ in range(part.rounds + rounds):
        normal_ = part.norm_slots(s)
        scores = part.q(normal_) @ k.mT * k.shape[-1] ** scale
        shares = scores.softmax(over) + 1e-8
        if not late_mask:
            shares = shares * keys
        if mean:
            shares = shares / shares.sum(2, keepdim=True).clamp(min=1e-30)
        u = (shares * keys) @ v
        before = normal_ if state else s
        s = part.gru(u.flatten(0, 1), before.flatten(0, 1)).reshape(s.shape) if gru else s + u
        if mlp:
            s = (s if residual else 0) + part.mlp(part.norm(s))
    return s.mean(1)


def with_fault(**fault):
    """The pool with one fault."""
    return wrong(Slot, pool=lambda self, x, *, mask, layout: pooled(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=8).ok


MUTANTS = {
    "softmax over the tokens": with_fault(over=2),
    "softmax over the batch": with_fault(over=0),
    "no scale": with_fault(scale=0.0),
    "sums, not means": with_fault(mean=False),
    "no MLP": with_fault(mlp=False),
    "no residual around the MLP": with_fault(residual=False),
    "the state of the GRU is normalised": with_fault(state=True),
    "a sum for the GRU": with_fault(gru=False),
    "σ for e^{log σ}": with_fault(std=lambda t: t),
    "a round more": with_fault(rounds=1),
    "padding has its share of a mean": with_fault(late_mask=True),
    "the mask ignored": wrong(Slot, pool=lambda self, x, *, mask, layout: pooled(self, x, Mask())),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


FORMS = pytest.mark.parametrize("options", [{}, {"start": "learned"}, {"rounds": 1, "slots": 2}], ids=str)


def slot(dim=8, tokens=5, **options) -> Slot:
    """In float64, with weights of a size that matters."""
    return spread(Slot(place(dim, 2, tokens), **{"slots": 3, "hidden": 5} | options), 0.5)


# By hand


def test_hand_equal_scores():
    """Two slots and three tokens: a token's shares are 1/2 each, and so are its weights 1/3 in both slots."""
    part, x = slot(slots=2), normal(1, 3, 8)
    with torch.no_grad():
        part.q.weight.zero_()
    for i in (1, 2, 3):
        near(
            seen(part, x, tap=f"weights_{i}", layout=Layout((3,))),
            torch.full((1, 2, 3), 1 / 3, dtype=torch.float64),
        )


def test_hand_one_round_of_one_slot():
    """One slot has all of every token: u is the mean of the values, whatever the scores are."""
    part, x = slot(slots=1, rounds=1), normal(2, 5, 8)
    start = (part.mean + part.log_std.exp() * part.noise).expand(2, 8)
    s = part.gru(part.v(part.norm_tokens(x)).mean(1), start)
    near(part(x, layout=Layout((5,))), s + part.mlp(part.norm(s)))


def test_hand_shares_of_two_slots():
    """c = 1 makes norms constant: q = ±ln 3 by the slots, k = 1 for both tokens, so shares are 3/4 and 1/4, weights 1/2."""
    part = slot(1, slots=2, rounds=1, start="learned")
    with torch.no_grad():
        for norm in (part.norm_tokens, part.norm_slots):
            norm.weight.zero_(), norm.bias.fill_(1)
        part.q.weight.fill_(math.log(3)), part.k.weight.fill_(1)
    x = torch.tensor([[[2.0], [5.0]]]).double()
    near(
        seen(part, x, tap="scores_1", layout=Layout((2,))), torch.full((1, 2, 2), math.log(3)).double(), 1e-7
    )
    near(seen(part, x, tap="weights_1", layout=Layout((2,))), torch.full((1, 2, 2), 0.5))


def test_hand_parameters():
    c, r, hidden = 8, 3, 5
    rest = 3 * 2 * c + 3 * c * c + 6 * (c * c + c) + (c * hidden + hidden) + (hidden * c + c)
    assert count(slot()) == rest + 2 * c
    assert count(slot(start="learned")) == rest + r * c


def test_hand_the_start():
    """μ and log σ are one for all slots, and ε is kept with the weights."""
    part = Slot(place(400, 2), slots=16)
    bound = math.sqrt(6 / 401)
    for vector in (part.mean, part.log_std):
        assert vector.shape == (1, 400) and 0.9 * bound < vector.detach().abs().max() <= bound
    assert abs(part.noise.std() - 1) < 0.05 and "noise" in part.state_dict()
    before = part.noise.clone()
    part.init_weights()
    assert not torch.equal(part.noise, before)
    assert abs(Slot(place(400, 2), start="learned").mean.detach().std() - 1) < 0.05


def test_defaults():
    assert options_of(Slot)().model_dump() == {"slots": 7, "rounds": 3, "hidden": 128, "start": "noise"}


# Identities


@FORMS
def test_identity_tokens_in_another_order_give_the_same(options):
    part, x = slot(**options), normal(2, 5, 8)
    near(part(x[:, [3, 0, 4, 1, 2]], layout=Layout((5,))), part(x, layout=Layout((5,))))


def test_identity_slots_in_another_order_take_their_maps_along():
    part, x = slot(start="learned"), normal(2, 5, 8)
    maps = [seen(part, x, tap=f"weights_{i}", layout=Layout((5,))) for i in (1, 2, 3)]
    out = part(x, layout=Layout((5,))).detach()
    with torch.no_grad():
        part.mean.copy_(part.mean[[2, 0, 1]])
    near(part(x, layout=Layout((5,))), out)
    for i in (1, 2, 3):
        near(seen(part, x, tap=f"weights_{i}", layout=Layout((5,))), maps[i - 1][:, [2, 0, 1]])


def test_identity_identical_slots_stay_identical():
    part, x = slot(), normal(2, 5, 8)
    part.noise[1:] = part.noise[0]
    one = slot(slots=1)
    one.load_state_dict(part.state_dict() | {"noise": part.noise[:1]})
    near(part(x, layout=Layout((5,))), one(x, layout=Layout((5,))))  # a third of each token is a mean, too
    last = seen(part, x, tap="weights_3", layout=Layout((5,)))
    near(last[:, 1:], last[:, :1].expand(2, 2, 5))


@FORMS
def test_identity_shares_sum_to_one_by_token_and_weights_by_slot(options):
    part, x = slot(**options), normal(2, 5, 8)
    for i in range(1, part.rounds + 1):
        near(seen(part, x, tap=f"scores_{i}", layout=Layout((5,))).softmax(1).sum(1), torch.ones(2, 5))
        near(seen(part, x, tap=f"weights_{i}", layout=Layout((5,))).sum(2), torch.ones(2, part.slots))


def test_identity_the_gru_is_pytorchs():
    part, u, s = slot(), normal(2, 3, 8), normal(2, 3, 8)
    near(part._updated(u, s).flatten(0, 1), part.gru(u.flatten(0, 1), s.flatten(0, 1)))


@FORMS
def test_identity_padding_is_a_shorter_input(options):
    part, x = slot(**options), normal(2, 5, 8)
    keys = torch.tensor([[True, False, True, True, False]]).expand(2, 5)
    near(part(x, mask=Mask(keys=keys), layout=Layout((5,))), part(x[:, keys[0]], layout=Layout((3,))))


def test_it_is_no_game_of_chance():
    part, x = Slot(place(8, 2, 5)).train(), torch.randn(2, 5, 8)
    state = torch.get_rng_state()
    assert torch.equal(part(x, layout=Layout((5,))), part(x, layout=Layout((5,))))
    assert torch.equal(torch.get_rng_state(), state)


def test_where_no_token_exists_nothing_is_nan():
    part, nobody = slot(), Mask(keys=torch.zeros(2, 5, dtype=torch.bool))
    x = normal(2, 5, 8).requires_grad_()
    out = part(x, mask=nobody, layout=Layout((5,)))
    out.sum().backward()
    assert out.isfinite().all() and not x.grad.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())


@FORMS
def test_narrow_numbers_stay_near(options):
    keys = torch.arange(7) < torch.tensor([[7], [4], [1]])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        part = spread(Slot(place(8, 2, 7), hidden=9, **options), 0.3).to(dtype).double()
        x = normal(3, 7, 8).to(dtype).double()
        for mask in (Mask(), Mask(keys=keys)):
            wanted = part.double()(x, mask=mask, layout=Layout((7,))).detach()
            found = part.to(dtype)(x.to(dtype), mask=mask, layout=Layout((7,)))
            assert found.dtype == dtype
            near(found, wanted, tolerance * max(1.0, float(wanted.abs().max())))
