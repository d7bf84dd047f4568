"""Efficient additive attention of SwiftFormer, arXiv:2303.15446, §3.1."""

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong
from timm.models.swiftformer import EfficientAdditiveAttention
from torch.nn import functional as F

from attnzoo.core import Layout, Mask
from attnzoo.mechanisms.additive.efficient_additive import EfficientAdditive
from attnzoo.testing import against


def unit(t):
    """A vector by its length."""
    length = torch.sqrt((t * t).sum())
    return t / length if length > 0 else t


@against(EfficientAdditive, examples=20)
def test_oracle(component, x, keys):
    """α_j = (q̂_j·w) / √c, all of them by their length; g = Σ α_j q̂_j of the tokens that exist; then token by token."""
    layers, out, c = component.layers, [], x.shape[2]
    for s in range(x.shape[0]):
        q = [unit(layers.to_query.weight @ token + layers.to_query.bias) for token in x[s]]
        k = [unit(layers.to_key.weight @ token + layers.to_key.bias) for token in x[s]]
        there = [i for i in range(len(q)) if keys[s, i]]
        g = torch.zeros(c).double()
        if there:
            alpha = unit(torch.stack([q[i] @ layers.w_g[:, 0] / c**0.5 for i in there]))
            g = sum(a * q[i] for a, i in zip(alpha, there, strict=True))
        rows = []
        for query, key in zip(q, k, strict=True):
            inner = layers.proj.weight @ (g * key) + layers.proj.bias + query
            rows.append(layers.final.weight @ inner + layers.final.bias)
        out.append(torch.stack(rows))
    return torch.stack(out)


def form(
    self, x, mask, axis=1, unit_q=True, unit_k=True, softmax=False, skip=True, swap=False, hide=True, by="sum"
):
    """The equations, with a fault or without."""
    layers = self.layers
    q, k = layers.to_query(x), layers.to_key(x)
    q, k = F.normalize(q, dim=-1) if unit_q else q, F.normalize(k, dim=-1) if unit_k else k
    q, k = (k, q) if swap else (q, k)
    alpha, there = q @ layers.w_g * x.shape[2] ** -0.5, 1
    if mask.keys is not None and hide:
        there = mask.keys[..., None]
        alpha = alpha * there
    alpha = alpha.softmax(1) * there if softmax else F.normalize(alpha, dim=axis)
    g = getattr(alpha * q, by)(1, keepdim=True)
    return layers.final(layers.proj(g * k) + (q if skip else 0))


def with_fault(**fault):
    """The mechanism with one fault."""
    return wrong(EfficientAdditive, mix=lambda self, x, source, *, mask, layout: form(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "α by its length over the batch": with_fault(axis=0),
    "a softmax for α": with_fault(softmax=True),
    "queries of any length": with_fault(unit_q=False),
    "keys of any length": with_fault(unit_k=False),
    "queries and keys swapped": with_fault(swap=True),
    "no skip of the queries": with_fault(skip=False),
    "a mean for the sum": with_fault(by="mean"),
    "padding is summed": with_fault(hide=False),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((5,))


def part_of(dim=6) -> EfficientAdditive:
    """In float64, with weights of a size that matters."""
    return spread(EfficientAdditive(place(dim, 2, 5)))


# By hand


def test_hand_two_tokens():
    """Queries (3, 4) / 5 and (1, 0), w = (0, 1) and (1, 0): scores (4/5, 0), and with the other (3/5, 1) / √2."""
    part = set_all(EfficientAdditive(place(2)), 0.0)
    layers, x = part.layers, torch.tensor([[[3.0, 4], [1, 0]]]).double()
    with torch.no_grad():
        for layer in (layers.to_query, layers.to_key, layers.proj, layers.final):
            layer.weight.copy_(torch.eye(2))
        layers.w_g[1] = 1.0
    near(seen(part, x, layout=Layout((2,)), tap="scores"), [[0.8 / 2**0.5, 0]])
    near(seen(part, x, layout=Layout((2,))), [[1, 0]])  # g = (3/5, 4/5)
    near(part(x, layout=Layout((2,))), [[[0.36 + 0.6, 0.64 + 0.8], [0.6 + 1, 0]]])


def test_hand_parameters():
    c = 64
    assert count(EfficientAdditive(place(c))) == 4 * c * (c + 1) + c


# Identities


def test_identity_timms():
    layout = Layout((3, 4))
    part, x = part_of(8), normal(2, 12, 8)
    timms = EfficientAdditiveAttention(8, 8).double()
    timms.load_state_dict(part.layers.state_dict())
    near(layout.to_grid(part(x, layout=layout)), timms(layout.to_grid(x)))


def test_identity_the_length_of_w_has_no_say_and_its_sign_turns_g():
    part, x = part_of(), normal(2, 5, 6)
    out, weights = part(x, layout=LAYOUT), seen(part, x, layout=LAYOUT)
    with torch.no_grad():
        part.layers.w_g.mul_(7)
    near(part(x, layout=LAYOUT), out)
    with torch.no_grad():
        part.layers.w_g.neg_()
    near(seen(part, x, layout=LAYOUT), -weights)


def test_identity_weights_have_length_one():
    near(seen(part_of(), normal(2, 5, 6), layout=LAYOUT).square().sum(-1), [1, 1])


def test_identity_one_token_reads_itself():
    """α = ±1: the output is W (T (± q̂ ⊙ k̂) + q̂)."""
    part, x = part_of(), normal(2, 1, 6)
    layers = part.layers
    q, k = F.normalize(layers.to_query(x), dim=-1), F.normalize(layers.to_key(x), dim=-1)
    sign = (q @ layers.w_g).sign()
    near(part(x, layout=Layout((1,))), layers.final(layers.proj(sign * q * k) + q))


def test_identity_permuted_tokens_are_permuted():
    part, x, order = part_of(), normal(2, 5, 6), torch.tensor([3, 0, 4, 1, 2])
    near(part(x[:, order], layout=LAYOUT), part(x, layout=LAYOUT)[:, order])


def test_identity_padding_is_a_shorter_line():
    part, x = part_of(), normal(2, 5, 6)
    mask = Mask(keys=(torch.arange(5) < 3).expand(2, 5))
    near(part(x, mask=mask, layout=LAYOUT)[:, :3], part(x[:, :3], layout=Layout((3,))))


def test_where_nobody_exists_only_the_queries_are_left():
    part, x = part_of(), normal(1, 5, 6).requires_grad_()
    out = part(x, mask=Mask(keys=torch.zeros(1, 5, dtype=torch.bool)), layout=LAYOUT)
    q = F.normalize(part.layers.to_query(x), dim=-1)
    near(out, part.layers.final(part.layers.proj.bias + q))
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_narrow_numbers_stay_near():
    narrow(EfficientAdditive, [(2, 7, 12)], site=place(12, 3, 7))
