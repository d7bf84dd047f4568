"""Hebbian memory: attention as Pavlovian conditioning; the rules of Hebb, Rescorla and Wagner, and Oja."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, OptionError
from attnzoo.mechanisms.linear.elu_linear import EluLinear
from attnzoo.mechanisms.linear.hebbian import Hebbian
from attnzoo.testing import against


def unit(x):
    """Of length 1."""
    return x / torch.sqrt(x @ x)


def phi(x):
    """elu(x) + 1, entry by entry."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


@against(Hebbian)
def test_oracle(component, options, q, k, v, keys, mask):
    """One token after the other writes into S (e d); a query reads the S of its time, or the last one."""
    (b, h, n, d), m, rule, decay = q.shape, k.shape[2], options["rule"], options["decay"]
    out = torch.zeros_like(q)
    for s, g in torch.cartesian_prod(torch.arange(b), torch.arange(h)).tolist():
        rate = component.eta[g] if options["learn_rate"] else options["rate"]
        memory, norm = torch.zeros(d, d).double(), torch.zeros(d).double()
        times = [(memory, norm)]  # what there is after 0, 1, ... tokens
        for j in range(m):
            if keys[s, j]:
                key, value = k[s, g, j], v[s, g, j]
                memory, norm = decay * memory, decay * norm
                if rule == "delta":
                    key = unit(key)
                    memory = memory + rate * torch.outer(value - memory @ key, key)
                elif rule == "oja":
                    value = unit(value)
                    memory = memory + rate * torch.outer(value, key - memory.T @ value)
                else:
                    key = phi(key) if options["features"] == "elu" else key
                    memory, norm = memory + rate * torch.outer(value, key), norm + rate * key
            times.append((memory, norm))
        for i in range(n):
            memory, norm = times[max(0, i + 1 + m - n) if mask.causal else m]
            ask = q[s, g, i]
            if options["features"] == "elu":
                ask = phi(ask)
                out[s, g, i] = memory @ ask / (norm @ ask) if norm.any() else 0 * ask
            else:
                out[s, g, i] = memory @ (unit(ask) if rule == "delta" else ask)
    return out


def with_fault(
    decays=True, rates=True, early=False, unit_k=True, unit_q=True, corrects=True, before=False, causal=True, keys=True,
    absent=False, norm=True, scale=1.0, turned=False,
):  # fmt: skip
    """The rules token by token for all samples and heads, with a fault; without one they are not caught."""

    def attend(self, q, k, v, *, mask, layout):
        n, m = q.shape[2], k.shape[2]
        there = torch.ones(k.shape[0], m, dtype=torch.bool) if mask.keys is None or not keys else mask.keys
        if self.elu:
            q, k, v = phi(q), phi(k), torch.cat([v, torch.ones_like(v[..., :1])], -1)
        if self.rule == "delta":
            q, k = F.normalize(q, dim=-1) if unit_q else q, F.normalize(k, dim=-1) if unit_k else k
        if self.rule == "oja" and unit_k:
            v = F.normalize(v, dim=-1)
        rate = (self.rate if self.eta is None else self.eta[:, None, None]) if rates else 1.0
        memory = torch.zeros(*k.shape[:2], v.shape[3], k.shape[3]).double()
        times = [memory]
        for j in range(m):
            key, value = k[:, :, j, :, None], v[:, :, j, :, None]
            faded = self.decay * memory if decays else memory
            base = memory if before else faded
            if self.rule == "hebb" or not corrects:
                change = value @ key.mT
            elif self.rule == "delta":
                change = (value - base @ key) @ key.mT
            else:
                change = value @ (key - base.mT @ value).mT
            now = there[:, j, None, None, None]
            memory = torch.where(now, faded + rate * change, faded if absent else memory)
            times.append(memory)
        late = mask.causal and causal
        read = [times[max(0, i + m - n + (not early)) if late else m] for i in range(n)]
        if turned and self.decay < 1:
            read = [t.mT if t.shape[-1] == t.shape[-2] else t for t in read]
        out = torch.stack([(t @ q[:, :, i, :, None])[..., 0] for i, t in enumerate(read)], 2) * scale
        if self.elu:
            total = out[..., -1:]
            out = out[..., :-1] / (torch.where(total > 0, total, 1.0) if norm else 1.0)
        return out

    return wrong(Hebbian, attend=attend)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=30).ok


MUTANTS = {
    "no decay": with_fault(decays=False),
    "no rate": with_fault(rates=False),
    "read before it is written": with_fault(early=True),
    "raw keys": with_fault(unit_k=False),
    "raw queries": with_fault(unit_q=False),
    "nothing corrected": with_fault(corrects=False),
    "corrected before the decay": with_fault(before=True),
    "not causal": with_fault(causal=False),
    "keys ignored": with_fault(keys=False),
    "padding decays": with_fault(absent=True),
    "not normalised": with_fault(norm=False),
    "scaled": with_fault(scale=0.5),
    "the memory turned": with_fault(turned=True),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_sum_of_products():
    """S = 1 · 2 + 3 · 5 = 17, read with 1 and -2."""
    out = Hebbian(place(1))(row(1, -2), row(2, 5), row(1, 3), layout=Layout((2,)))
    near(out, [17, -34])


def test_hand_decay_and_rate():
    """η = 2, λ = ½: 2 · 2, then half of that and 2 · 15."""
    head = Hebbian(place(1), decay=0.5, rate=2.0)
    near(head(row(1, 1), row(2, 5), row(1, 3), mask=Mask(causal=True), layout=Layout((2,))), [4, 32])
    near(head(row(1, 1), row(2, 5), row(1, 3), layout=Layout((2,))), [32, 32])


def conditioned(rule, rate, decay):
    """Keys e₁, e₂, e₁ with values 1, 2, 5 (in the first channel), asked for as they come, then e₁ and e₂ of the last."""
    key = torch.eye(2).double()[[0, 1, 0]][None, None]
    value = torch.tensor([[1.0, 0], [2, 0], [5, 0]]).double()[None, None]
    head = Hebbian(place(2, tokens=3), rule=rule, rate=rate, decay=decay)
    late = head(key, key, value, mask=Mask(causal=True), layout=Layout((3,)))
    last = head(torch.eye(2).double()[None, None], key, value, layout=Layout((3,)))
    return late[0, 0, :, 0].tolist(), last[0, 0, :, 0].tolist()


@pytest.mark.parametrize(
    "rule,rate,decay,late,last",
    [
        ("delta", 1.0, 1.0, [1, 2, 5], [5, 2]),  # the last value of a repeated key wins
        ("delta", 0.5, 0.5, [0.5, 1, 2.5625], [2.5625, 0.5]),
        ("hebb", 1.0, 1.0, [1, 2, 6], [6, 2]),  # they add up
    ],
)
def test_hand_repeated_keys(rule, rate, decay, late, last):
    found = conditioned(rule, rate, decay)
    near(torch.tensor(found[0]), late)
    near(torch.tensor(found[1]), last)


def test_hand_oja_is_bounded():
    """Values are e₁ throughout: S' = S + e₁ (k - Sᵀ e₁)ᵀ holds the last key, where Hebb's rule adds all."""
    key = torch.tensor([[3.0, 1], [0, 2], [4, 5]]).double()[None, None]
    value = torch.tensor([[7.0, 0]]).double().expand(1, 1, 3, 2)
    out = Hebbian(place(2, tokens=3), rule="oja")(
        torch.eye(2).double()[None, None], key, value, layout=Layout((3,))
    )
    near(out, [[4, 0], [5, 0]])


def test_hand_elu_weights():
    """φ(0) = 1 and φ(1) = 2: a third and two thirds of 1 and 4."""
    near(Hebbian(place(1), features="elu")(row(5), row(0, 1), row(1, 4), layout=Layout((2,))), [3])


def test_hand_parameters():
    assert count(Hebbian(place(12, 3))) == 0
    part = Hebbian(place(12, 3), learn_rate=True, rate=0.3)
    assert count(part) == 3
    near(part.eta, [0.3] * 3, 1e-7)


# Identities


@pytest.mark.parametrize("rule", ["hebb", "delta"])
def test_identity_orthonormal_keys_recall_exactly(rule):
    keys = torch.linalg.qr(normal(6, 6))[0][None, None, :5]
    values = normal(1, 1, 5, 6)
    near(Hebbian(place(6, tokens=5), rule=rule)(keys, keys, values, layout=Layout((5,))), values)


@pytest.mark.parametrize("tokens,error", [(8, 0.109), (32, 0.484), (64, 0.984), (128, 1.984)])
def test_identity_capacity(tokens, error):
    """E ‖S k - v‖² = (n - 1) / d for random keys and values of length 1; heads that share the work divide it."""
    torch.manual_seed(0)
    keys, values = (
        F.normalize(normal(*shape), dim=-1) for shape in ((40, 4, tokens, 64), (40, 1, tokens, 64))
    )
    head = Hebbian(place(256, 4, tokens))
    recalled = head(keys, keys, values.expand(keys.shape), layout=Layout((tokens,)))
    near((recalled - values).square().sum(-1).mean(), error, 0.05 * error)
    near((recalled.mean(1, keepdim=True) - values).square().sum(-1).mean(), error / 4, 0.1 * error / 4)


def test_identity_elu_features_are_elu_linear():
    q, k, v = normal(3, 2, 3, 50, 4)
    for mask in (Mask(), Mask(causal=True), Mask(causal=True, keys=torch.rand(2, 50) < 0.7)):
        wanted = EluLinear(place(12, 3, 50), eps=1e-300)(q, k, v, mask=mask, layout=Layout((50,)))
        near(Hebbian(place(12, 3, 50), features="elu")(q, k, v, mask=mask, layout=Layout((50,))), wanted)


@pytest.mark.parametrize(
    "options", [{}, {"decay": 0.9}, {"rule": "delta", "decay": 0.9}, {"rule": "oja"}], ids=str
)
@pytest.mark.parametrize("n,m", [(80, 80), (40, 70), (70, 40)])
def test_identity_chunks_are_token_by_token(options, n, m):
    """Row i of a causal pass is what query i alone reads when all of its keys are written."""
    head, keys = Hebbian(place(6, 2, m), **options), torch.rand(1, m) < 0.8
    q, (k, v) = normal(1, 2, n, 3), normal(2, 1, 2, m, 3)
    found = head(q, k, v, mask=Mask(keys=keys, causal=True), layout=Layout((m,)))
    for i in range(0, n, 7):
        end = max(0, i + 1 + m - n)
        if end == 0:
            assert not found[:, :, i].any()
            continue
        one = token_by_token(head, q[:, :, i : i + 1], k[:, :, :end], v[:, :, :end], keys[:, :end])
        near(found[:, :, i], one[:, :, 0], 1e-10)


def token_by_token(head, q, k, v, keys):
    """The rules token by token."""
    attend = with_fault().attend
    return attend(head, q, k, v, mask=Mask(keys=keys), layout=Layout((k.shape[2],)))


def test_identity_padding_is_a_shorter_input():
    q, k, v = normal(3, 2, 2, 6, 3)
    there = [0, 2, 3]
    keys = torch.zeros(2, 6, dtype=torch.bool)
    keys[:, there] = True
    head = Hebbian(place(6, 2, 6), decay=0.5)
    near(
        head(q, k, v, mask=Mask(keys=keys), layout=Layout((6,))),
        head(q, k[:, :, there], v[:, :, there], layout=Layout((3,))),
    )


# Refusals


@pytest.mark.parametrize(
    "options,text",
    [
        ({"decay": 0.0}, "a decay of 0"),
        ({"features": "elu", "rule": "delta"}, "not `delta`"),
        ({"features": "elu", "learn_rate": True}, "cancels"),
        ({"rule": "oja", "rate": 2.0}, "diverges with a rate of 2.0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, text):
    with pytest.raises(OptionError, match=text):
        Hebbian(place(2), **options)


@pytest.mark.parametrize(
    "options", [{}, {"features": "elu"}, {"rule": "delta"}, {"rule": "oja", "decay": 0.9}], ids=str
)
def test_narrow_numbers_stay_near(options):
    narrow(Hebbian, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7), **options)


def test_what_is_learned_scales_what_is_read():
    one, two = Hebbian(place(6, 2)), Hebbian(place(6, 2), learn_rate=True).double()
    with torch.no_grad():
        two.eta.copy_(torch.tensor([2.0, math.pi]))
    q, k, v = normal(3, 1, 2, 5, 3)
    scaled = one(q, k, v, layout=Layout((5,))) * two.eta[:, None, None]
    near(two(q, k, v, layout=Layout((5,))), scaled)
