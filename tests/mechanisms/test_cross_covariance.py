"""Cross-covariance attention of XCiT, arXiv:2106.09681, §3.2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong
from timm.models.xcit import XCA
from torch.nn import functional as F

from attnzoo.core import Layout, Mask
from attnzoo.mechanisms.channel.cross_covariance import CrossCovariance
from attnzoo.testing import against


def unit(t):
    """A vector by its length."""
    length = torch.sqrt((t * t).sum())
    return t / length if length > 0 else t


@against(CrossCovariance, examples=20)
def test_oracle(component, x, keys):
    """Channel by channel: q_a and k_b over the tokens that exist, by their lengths; then a softmax over b."""
    (b, _, c), heads, layers, out = x.shape, component.heads, component.layers, []
    d = c // heads
    for s in range(b):
        qkv = x[s] @ layers.qkv.weight.T + (0 if layers.qkv.bias is None else layers.qkv.bias)
        q, k, v = qkv.split(c, 1)
        columns = []
        for h in range(heads):
            mine = range(h * d, (h + 1) * d)
            units = [[unit(t[keys[s], a]) for a in mine] for t in (q, k)]
            for a in units[0]:
                scores = torch.stack([layers.temperature[h, 0, 0] * (a @ e) for e in units[1]])
                columns.append(v[:, mine] @ scores.softmax(0))
        out.append(torch.stack(columns, 1) @ layers.proj.weight.T + layers.proj.bias)
    return torch.stack(out)


def form(self, x, mask, lengths=-1, axis=-1, swap=False, temperature=True, hide=True, heads=True):
    """The equation, with a fault or without."""
    b, n, c = x.shape
    qkv = self.layers.qkv(x).reshape(b, n, 3, *((self.heads, -1) if heads else (-1, self.heads)))
    q, k, v = (qkv if heads else qkv.mT).permute(2, 0, 3, 4, 1)  # (b h d n)
    q, k = (k, q) if swap else (q, k)
    if mask.keys is not None and hide:
        q, k = q * mask.keys[:, None, None], k * mask.keys[:, None, None]
    if lengths:
        q, k = F.normalize(q, dim=lengths), F.normalize(k, dim=lengths)
    scores = q @ k.mT * (self.layers.temperature if temperature else 1)
    out = (scores.softmax(axis) @ v).permute(0, 3, 1, 2)
    return self.layers.proj((out if heads else out.mT).reshape(b, n, c))


def with_fault(**fault):
    """The mechanism with one fault."""
    return wrong(CrossCovariance, mix=lambda self, x, source, *, mask, layout: form(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "lengths along the channels": with_fault(lengths=-2),
    "no lengths": with_fault(lengths=0),
    "softmax over the other axis": with_fault(axis=-2),
    "softmax over the batch": with_fault(axis=0),
    "queries and keys swapped": with_fault(swap=True),
    "no temperature": with_fault(temperature=False),
    "padding is summed": with_fault(hide=False),
    "channels dealt to heads in turn": with_fault(heads=False),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((5,))


def part_of(dim=6, heads=2) -> CrossCovariance:
    """In float64, with weights of a size that matters."""
    return spread(CrossCovariance(place(dim, heads, 5)))


# By hand


def test_hand_two_channels_of_two_tokens():
    """q = k = v = x, channels (3, 4) and (4, 3): cosines 1 and 24/25; τ = 25 ln 3 makes the weights 3/4 and 1/4."""
    part = set_all(CrossCovariance(place(2)), 0.0)
    with torch.no_grad():
        part.layers.qkv.weight.copy_(torch.eye(2).repeat(3, 1))
        part.layers.proj.weight.copy_(torch.eye(2))
        part.layers.temperature.fill_(25 * math.log(3))
    x = torch.tensor([[[3.0, 4], [4, 3]]]).double()
    near(seen(part, x, layout=Layout((2,))), [[[[0.75, 0.25], [0.25, 0.75]]]])
    near(part(x, layout=Layout((2,))), [[[3.25, 3.75], [3.75, 3.25]]])


def test_hand_parameters_and_start():
    part = CrossCovariance(place(64, 4))
    assert count(part) == 3 * 64 * 65 + 64 * 65 + 4
    assert count(CrossCovariance(place(64, 4, qkv_bias=False))) == 4 * 64 * 64 + 64 + 4
    assert (
        part.layers.temperature.tolist() == [[[1.0]]] * 4 and "layers.temperature" in part.no_weight_decay()
    )


# Identities


def test_identity_timms():
    part, x = part_of(), normal(2, 5, 6)
    timms = XCA(6, 2, qkv_bias=True).double()
    timms.load_state_dict(part.layers.state_dict())
    near(part(x, layout=LAYOUT), timms(x))


def test_identity_heads_of_one_channel_read_themselves():
    """h = c: A = 1, and the output is proj(v)."""
    part, x = part_of(6, 6), normal(2, 5, 6)
    near(part(x, layout=LAYOUT), part.layers.proj(part.layers.qkv(x)[..., 12:]))


def test_identity_permuted_tokens_are_permuted():
    part, x, order = part_of(), normal(2, 5, 6), torch.tensor([3, 0, 4, 1, 2])
    near(part(x[:, order], layout=LAYOUT), part(x, layout=LAYOUT)[:, order])


def test_identity_scores_are_cosines():
    """Of queries and keys of any size: between -τ and τ; the same tokens twice give the same."""
    part, x = part_of(), normal(2, 5, 6)
    scores = seen(part, 100 * x, layout=LAYOUT, tap="scores") / part.layers.temperature
    assert scores.shape == (2, 2, 3, 3) and scores.abs().max() <= 1 + 1e-12
    near(part(x.repeat(1, 2, 1), layout=Layout((10,)))[:, :5], part(x, layout=LAYOUT))


def test_identity_padding_is_a_shorter_line():
    part, x = part_of(), normal(2, 5, 6)
    mask = Mask(keys=(torch.arange(5) < 3).expand(2, 5))
    near(part(x, mask=mask, layout=LAYOUT)[:, :3], part(x[:, :3], layout=Layout((3,))))


def test_where_nobody_exists_weights_are_uniform_and_gradients_finite():
    part, x = part_of(), normal(1, 5, 6).requires_grad_()
    nobody = Mask(keys=torch.zeros(1, 5, dtype=torch.bool))
    near(seen(part, x, mask=nobody, layout=LAYOUT), torch.full((1, 2, 3, 3), 1 / 3, dtype=torch.float64))
    part(x, mask=nobody, layout=LAYOUT).sum().backward()
    assert x.grad.isfinite().all()


def test_narrow_numbers_stay_near():
    narrow(CrossCovariance, [(2, 7, 12)], site=place(12, 3, 7))
