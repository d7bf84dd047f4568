"""Spatial gating of gMLP and aMLP, arXiv:2105.08050."""

import math

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, place, seen, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, options_of
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.mixing.spatial_gating import SpatialGating
from attnzoo.testing import against


def linear(layer, x):
    """W x + b of each row."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


@against(
    SpatialGating, examples=30, options=lambda options: "head_dim" in options or "attention" not in options
)
def test_oracle(component, x, allowed):
    """Token by token: gelu(U x) in two halves; the second, normalised, is summed with W over who may be seen."""
    (b, n, _), out = x.shape, []
    for s in range(b):
        hidden = linear(component.enter, x[s])
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        half = hidden.shape[1] // 2
        z, other = hidden[:, :half], hidden[:, half:]
        other = other - other.mean(1, keepdim=True)
        other = other / torch.sqrt((other**2).mean(1, keepdim=True) + component.norm.eps)
        other = other * component.norm.weight + component.norm.bias
        for i in range(n):
            see = [j for j in range(n) if allowed[s, 0, i, j]]
            gate = component.bias[i] + sum(component.weight[i, j] * other[j] for j in see)
            if component.qkv is not None:
                q, k, v = linear(component.qkv, x[s]).chunk(3, 1)
                shares = [torch.exp(q[i] @ k[j] / math.sqrt(len(q[i]))) for j in see]
                read = sum(
                    (e / sum(shares) * v[j] for e, j in zip(shares, see, strict=True)), torch.zeros_like(v[i])
                )
                gate = gate + linear(component.attended, read)
            out.append(linear(component.proj, z[i] * gate))
    return torch.stack(out).reshape(x.shape)


def mixed(
    self, x, mask, swap=False, norm=True, transpose=False, bias=True, gate=True, act=F.gelu, hide=lambda a: a,
    late=False, attention=True, outside=False, scale=-0.5, product=True, over=-1,
):  # fmt: skip
    """The equations with a fault."""
    n = x.shape[1]
    z, other = act(self.enter(x)).chunk(2, -1)
    z, other = (other, z) if swap else (z, other)
    other = self.norm(other) if norm else other
    allowed = mask.dense(n, n)
    allowed = torch.ones(1, n, n, dtype=torch.bool) if allowed is None else hide(allowed[:, 0])
    weight = self.weight[-n:, -n:] if late else self.weight[:n, :n]
    weight = (weight.T if transpose else weight) * allowed
    gate = weight @ other + (self.bias[:n, None] if bias else 0)
    if self.qkv is not None and attention:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT * q.shape[-1] ** scale
        weights = masked_softmax(scores, allowed) if over == -1 else scores.softmax(over) * allowed
        more = self.attended(weights @ v)
        if outside:
            return self.proj(z * gate + more)
        gate = gate + more
    return self.proj(z * gate if product else z + gate)


def with_fault(**fault):
    """The mechanism with one fault."""
    return wrong(SpatialGating, mix=lambda self, x, source, *, mask, layout: mixed(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=8).ok


MUTANTS = {
    "the first half gates": with_fault(swap=True),
    "no norm": with_fault(norm=False),
    "W transposed": with_fault(transpose=True),
    "no b": with_fault(bias=False),
    "no gelu": with_fault(act=lambda t: t),
    "relu": with_fault(act=F.relu),
    "the last rows and columns of W": with_fault(late=True),
    "a sum for the product": with_fault(product=False),
    "the mask ignored": with_fault(hide=lambda a: torch.ones_like(a)),
    "the mask inverted": with_fault(hide=lambda a: ~a),
    "no head": with_fault(attention=False),
    "the head after the product": with_fault(outside=True),
    "no scale of the head": with_fault(scale=0.0),
    "softmax over queries": with_fault(over=-2),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


FORMS = pytest.mark.parametrize("attention", [False, True])


def gating(dim=6, tokens=5, **options) -> SpatialGating:
    """In float64, with weights of a size that matters."""
    return spread(SpatialGating(place(dim, 2, tokens), **options))


# By hand


def test_hand_two_tokens():
    """Halves of two channels, of which a norm leaves its bias 2: with W = (1, 2; 3, 4), b = (0, 10) gates are 6 and 24."""
    part = gating(1, 2, ratio=2.0)
    with torch.no_grad():
        part.weight.copy_(torch.tensor([[1.0, 2], [3, 4]])), part.bias.copy_(torch.tensor([0.0, 10]))
        part.norm.weight.zero_(), part.norm.bias.fill_(2)
        part.enter.weight.fill_(1), part.enter.bias.zero_()
        part.proj.weight.fill_(1), part.proj.bias.zero_()
    x = line(1, -0.5)
    z = F.gelu(x)[0, :, 0]
    near(seen(part, x, tap="gate", layout=Layout((2,))), [[[6, 6], [24, 24]]])
    near(part(x, layout=Layout((2,))), [[[12 * z[0]], [48 * z[1]]]])


@pytest.mark.parametrize("ratio,half", [(6.0, 18), (4.0, 12), (0.5, 2), (0.1, 2)])
def test_hand_parameters(ratio, half):
    """2 half (c + 1) for U, two for each channel of the norm, n² + n along the tokens, c (half + 1) for V."""
    c, n = 6, 5
    plain = 2 * half * (c + 1) + 2 * half + n * n + n + c * (half + 1)
    assert count(gating(ratio=ratio)) == plain
    assert count(gating(ratio=ratio, attention=True)) == plain + 3 * 64 * (c + 1) + half * 65
    assert count(gating(ratio=ratio, attention=True, head_dim=3)) == plain + 9 * (c + 1) + half * 4


def test_hand_the_start():
    """b is 1 and W within 1e-3 / n, also after a host's own start."""
    part = SpatialGating(place(6, 2, 50))
    with torch.no_grad():
        part.weight.fill_(3), part.bias.fill_(3)
    part.init_weights()
    assert 0.9e-3 / 50 < part.weight.detach().abs().max() <= 1.001e-3 / 50
    near(part.bias, torch.ones(50))
    part = SpatialGating(place(6, 2, 50), bound=0.5)
    assert 0.9 * 0.5 / 50 < part.weight.detach().abs().max() <= 1.001 * 0.5 / 50


def test_defaults():
    given = {"ratio": 6.0, "attention": False, "head_dim": None, "bound": 1e-3}
    assert options_of(SpatialGating)().model_dump() == given
    with pytest.raises(RecipeError, match="AZ214.*without `attention`"):
        gating(head_dim=8)


# Identities


def test_identity_without_w_it_is_a_feed_forward_layer_of_half_the_width():
    part, x = gating(), normal(2, 5, 6)
    with torch.no_grad():
        part.weight.zero_(), part.bias.fill_(1)
    half = part.proj.in_features
    hidden = F.gelu(F.linear(x, part.enter.weight[:half], part.enter.bias[:half]))
    near(part(x, layout=Layout((5,))), part.proj(hidden))


def test_identity_without_the_head_amlp_is_gmlp():
    one, two, x = gating(attention=True), gating(), normal(2, 5, 6)
    own = two.state_dict()
    two.load_state_dict({k: t for k, t in one.state_dict().items() if k in own})
    with torch.no_grad():
        one.attended.weight.zero_(), one.attended.bias.zero_()
    near(one(x, layout=Layout((5,))), two(x, layout=Layout((5,))))


@FORMS
def test_identity_a_causal_pass_is_many_short_ones(attention):
    part, x = gating(attention=attention), normal(2, 5, 6)
    out = part(x, mask=Mask(causal=True), layout=Layout((5,)))
    for i in range(5):
        near(out[:, i], part(x[:, : i + 1], layout=Layout((i + 1,)))[:, i])


@FORMS
def test_identity_fewer_tokens_are_padding_behind(attention):
    part, x = gating(attention=attention), normal(2, 5, 6)
    keys = torch.tensor([[True, True, True, False, False]]).expand(2, 5)
    near(part(x, mask=Mask(keys=keys), layout=Layout((5,)))[:, :3], part(x[:, :3], layout=Layout((3,))))


@FORMS
def test_identity_masks_of_any_kind_are_pairs(attention):
    part, x = gating(attention=attention), normal(2, 5, 6)
    keys, pairs = torch.rand(2, 5) < 0.7, torch.rand(2, 1, 5, 5) < 0.7
    mask = Mask(keys=keys, pairs=pairs, causal=True)
    wanted = part(x, mask=Mask(pairs=mask.dense(5, 5)), layout=Layout((5,)))
    near(part(x, mask=mask, layout=Layout((5,))), wanted)


def test_identity_the_gate_is_linear_in_what_is_mixed():
    """Twice W and twice b are twice the output: z₁ is not touched."""
    part, x = gating(), normal(2, 5, 6)
    out = part(x, layout=Layout((5,))) - part.proj.bias
    with torch.no_grad():
        part.weight.mul_(2), part.bias.mul_(2)
    near(part(x, layout=Layout((5,))) - part.proj.bias, 2 * out)


def test_tokens_in_another_order_give_another_output():
    part, x, order = gating(), normal(1, 5, 6), [4, 2, 0, 1, 3]
    turned = part(x[:, order], layout=Layout((5,)))
    assert (turned - part(x, layout=Layout((5,)))[:, order]).abs().max() > 1e-2


def test_more_tokens_than_it_was_built_for_are_refused():
    with pytest.raises(LayoutMismatch, match="AZ403.*at most 5 tokens; it was given 6"):
        gating()(normal(1, 6, 6), layout=Layout((6,)))


@FORMS
def test_narrow_numbers_stay_near(attention):
    narrow(SpatialGating, [(2, 7, 12)], site=place(12, 3, 7), attention=attention)
