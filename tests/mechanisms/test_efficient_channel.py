"""Efficient channel attention, arXiv:1910.03151, §3.3, eq. 5-12."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong
from timm.layers import CecaModule, EcaModule

from attnzoo.core import Layout, Mask, OptionError, Site
from attnzoo.mechanisms.channel.efficient_channel import EfficientChannel
from attnzoo.testing import against


@against(EfficientChannel, examples=40)
def test_oracle(component, options, x, layout, keys):
    """Channel j's gate is σ(Σ_o w_o z_{j+o}), z the mean of the grid tokens that exist; of nothing it is zero."""
    kernel, c = component.eca.conv.weight[0, 0], x.shape[-1]
    half = len(kernel) // 2
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        there = [x[b, i] for i in range(layout.prefix, layout.length) if keys[b, i]]
        z = sum(there) / len(there) if there else torch.zeros(c).double()
        for j in range(c):
            logit = torch.zeros(()).double()
            for o in range(-half, half + 1):
                if options["circular"]:
                    logit = logit + kernel[o + half] * z[(j + o) % c]
                elif 0 <= j + o < c:
                    logit = logit + kernel[o + half] * z[j + o]
            out[b, :, j] = x[b, :, j] / (1 + torch.exp(-logit))
    return out


def mixing(change):
    """The mechanism with its inputs changed."""

    def mix(self, x, source, *, mask, layout):
        mask, layout = change(mask, layout)
        return EfficientChannel.mix(self, x, source, mask=mask, layout=layout)

    return wrong(EfficientChannel, mix=mix)


def before(change):
    """The mechanism that is changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return EfficientChannel.mix(self, x, source, mask=mask, layout=layout)

    return wrong(EfficientChannel, mix=mix)


def ungated(self, x, source, *, mask, layout):
    """The gate alone."""
    return EfficientChannel.mix(self, x, source, mask=mask, layout=layout) / x


def over_the_batch(self, x, source, *, mask, layout):
    gates = EfficientChannel.mix(self, x, source, mask=mask, layout=layout) / x
    return x * gates.mean(0, keepdim=True)


def not_wrapped(self):
    self.eca.conv.padding, self.wrap = (self.eca.conv.kernel_size[0] // 2,), 0


MUTANTS = {
    "special tokens in the mean": mixing(lambda mask, layout: (mask, Layout((layout.length,)))),
    "the mask ignored": mixing(lambda mask, layout: (Mask(), layout)),
    "the kernel turned": before(lambda self: self.eca.conv.weight.copy_(self.eca.conv.weight.flip(-1))),
    "no circle": before(not_wrapped),
    "the gate alone": wrong(EfficientChannel, mix=ungated),
    "one gate for the batch": wrong(EfficientChannel, mix=over_the_batch),
    "no sigmoid": before(lambda self: setattr(self.eca, "gate", torch.nn.Identity())),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand

LAYOUT = Layout((2,), 1)


@pytest.mark.parametrize("circular,first", [(False, 1 / 2), (True, 1 / (1 + math.exp(-2)))])
def test_hand_each_channel_is_gated_by_the_one_before_it(circular, first):
    """w = (1, 0, 0), means (0, ln 3, 2): gates σ(0) or, in a circle, σ(2); then σ(0) and σ(ln 3) = 3/4."""
    part = set_all(EfficientChannel(Site("hand", 3, 1, LAYOUT), circular=circular), 0.0)
    with torch.no_grad():
        part.eca.conv.weight[0, 0, 0] = 1.0
    x = torch.tensor([[[8.0, 8, 8], [1, 2 * math.log(3), 1], [-1, 0, 3]]], dtype=torch.float64)
    near(part(x, layout=LAYOUT), x * torch.tensor([first, 0.5, 0.75], dtype=torch.float64))


def test_hand_zero_weights_halve():
    part = set_all(EfficientChannel(place(16, tokens=5)), 0.0)
    x = normal(2, 5, 16)
    near(part(x, layout=Layout((5,))), x / 2)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("dim,kernel", [(2, 3), (16, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5)])
def test_hand_the_kernel_has_k_parameters(dim, kernel, circular):
    assert count(EfficientChannel(place(dim), circular=circular)) == kernel


def test_hand_gamma_and_beta():
    """(log₂ 32 + 1) / 1 = 6 is even: 7; (5 + 4) / 1 = 9."""
    assert count(EfficientChannel(place(32), gamma=1.0)) == 7
    assert count(EfficientChannel(place(32), gamma=1.0, beta=4.0)) == 9


def test_a_kernel_beyond_all_channels_is_refused():
    with pytest.raises(OptionError, match="kernel of 11; 4 channels have a use for 7"):
        EfficientChannel(place(4), gamma=0.3)


# Identities


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("circular", [False, True])
def test_identity_timms_on_the_grid(prefix, circular):
    layout = Layout((3, 4), prefix)
    part = spread(EfficientChannel(Site("hand", 32, 2, layout), circular=circular, gamma=1.0))
    timms = (CecaModule if circular else EcaModule)(32, gamma=1.0).double()
    timms.load_state_dict(part.eca.state_dict())
    x = normal(2, layout.length, 32)
    near(layout.to_grid(layout.split(part(x, layout=layout))[1]), timms(layout.to_grid(layout.split(x)[1])))


def test_identity_in_a_circle_rolled_channels_give_a_rolled_output_and_otherwise_not():
    x, layout = normal(2, 5, 6), Layout((5,))
    off = []
    for circular in (True, False):
        part = spread(EfficientChannel(place(6, tokens=5), circular=circular))
        off.append((part(x.roll(1, -1), layout=layout) - part(x, layout=layout).roll(1, -1)).abs().max())
    assert off[0] < 1e-12 and off[1] > 1e-3


def test_identity_the_gate_is_one_for_all_places_and_blind_to_their_order():
    part, x, order = spread(EfficientChannel(place(16, tokens=5))), normal(2, 5, 16), [4, 2, 0, 1, 3]
    out = part(x, layout=Layout((5,)))
    near(out / x, (out / x)[:, :1].expand_as(x), 1e-9)
    near(part(x[:, order], layout=Layout((5,))), out[:, order])


def test_identity_padding_is_a_shorter_input():
    part, x = spread(EfficientChannel(place(6, tokens=5))), normal(2, 5, 6)
    keys = torch.tensor([[True, False, True, True, False]]).expand(2, 5)
    out = part(x, mask=Mask(keys=keys), layout=Layout((5,)))[:, keys[0]]
    near(out, part(x[:, keys[0]], layout=Layout((3,))))


def test_the_gate_shows_what_is_applied():
    part, x = spread(EfficientChannel(place(6, tokens=5))), normal(2, 5, 6)
    gate = seen(part, x, layout=Layout((5,)), tap="gate")
    near(part(x, layout=Layout((5,))), x * gate[:, None])


def test_narrow_numbers_stay_near():
    narrow(EfficientChannel, [(2, 7, 12)], site=place(12, 3, 7))
