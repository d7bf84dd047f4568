"""Squeeze-and-excitation, arXiv:1709.01507, §3, eq. 2-4."""

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong
from timm.layers import SEModule

from attnzoo.core import Layout, Mask, Site
from attnzoo.mechanisms.channel.squeeze_excite import SqueezeExcite
from attnzoo.testing import against


@against(SqueezeExcite)
def test_oracle(component, x, layout, keys):
    """x ⊙ σ(W₂ relu(W₁ z + b₁) + b₂), z the mean of the grid tokens that exist; of nothing it is zero."""
    one, two = component.se.fc1, component.se.fc2
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        grid = [x[b, i] for i in range(layout.prefix, layout.length) if keys[b, i]]
        z = sum(grid) / len(grid) if grid else torch.zeros(x.shape[-1]).double()
        hidden = one.weight[:, :, 0, 0] @ z + one.bias
        hidden = torch.stack([y if y > 0 else 0 * y for y in hidden])
        gates = 1 / (1 + torch.exp(-(two.weight[:, :, 0, 0] @ hidden + two.bias)))
        for i in range(layout.length):
            out[b, i] = gates * x[b, i]
    return out


def mixing(change):
    """The mechanism with its inputs changed."""

    def mix(self, x, source, *, mask, layout):
        mask, layout = change(mask, layout)
        return SqueezeExcite.mix(self, x, source, mask=mask, layout=layout)

    return wrong(SqueezeExcite, mix=mix)


def gated_twice(self, x, source, *, mask, layout):
    once = SqueezeExcite.mix(self, x, source, mask=mask, layout=layout)
    return once * (once / x)


def of_the_grid_only(self, x, source, *, mask, layout):
    out = SqueezeExcite.mix(self, x, source, mask=mask, layout=layout)
    return torch.cat([x[:, : layout.prefix], out[:, layout.prefix :]], 1)


MUTANTS = {
    "special tokens in the mean": mixing(lambda mask, layout: (mask, Layout((layout.length,)))),
    "the mask ignored": mixing(lambda mask, layout: (Mask(), layout)),
    "the gate twice": wrong(SqueezeExcite, mix=gated_twice),
    "special tokens not gated": wrong(SqueezeExcite, mix=of_the_grid_only),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_zero_weights_halve():
    part = set_all(SqueezeExcite(place(16, tokens=5)), 0.0)
    x = normal(2, 5, 16)
    near(part(x, layout=Layout((5,))), (x / 2).tolist())


def test_hand_parameters():
    part = SqueezeExcite(place(64))
    assert count(part) == 1096
    assert part.se.fc1.out_channels == 8


# Identities


def test_identity_the_gate_is_one_for_all_places_and_blind_to_their_order():
    part = SqueezeExcite(place(16, tokens=5), ratio=0.5).double()
    x = normal(2, 5, 16)
    ratio = part(x, layout=Layout((5,))) / x
    near(ratio, ratio[:, :1].expand_as(ratio).tolist(), 1e-9)
    shuffled = part(x[:, [4, 2, 0, 1, 3]], layout=Layout((5,)))
    near(shuffled, part(x, layout=Layout((5,)))[:, [4, 2, 0, 1, 3]].tolist())


@pytest.mark.parametrize("prefix", [0, 1])
def test_identity_timms_on_the_grid(prefix):
    layout = Layout((3, 4), prefix)
    part = spread(SqueezeExcite(Site("oracle", 32, 2, layout)))
    timms = SEModule(32).double()
    timms.load_state_dict(part.se.state_dict())
    x = normal(2, layout.length, 32)
    found = part(x, layout=layout)
    grid = layout.to_grid(layout.split(x)[1])
    near(layout.to_grid(layout.split(found)[1]), timms(grid).detach(), 1e-12)


def test_where_no_token_exists_the_mean_is_zero():
    part = spread(SqueezeExcite(place(16, tokens=3), ratio=0.5))
    x, nobody = normal(1, 3, 16), Mask(keys=torch.zeros(1, 3, dtype=torch.bool))
    zero = seen(part, torch.zeros(1, 3, 16).double(), tap="gate", layout=Layout((3,)))
    near(part(x, mask=nobody, layout=Layout((3,))), x * zero)


def test_narrow_numbers_stay_near():
    narrow(SqueezeExcite, [(2, 7, 12)], site=place(12, 3, 7), ratio=0.5)
