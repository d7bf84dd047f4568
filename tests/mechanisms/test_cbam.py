"""CBAM, arXiv:1807.06521, §3.1, eq. 1-3."""

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong
from timm.layers.cbam import CbamModule
from torch import nn

from attnzoo.core import Layout, Mask, OptionError, Site
from attnzoo.mechanisms.channel.cbam import Cbam
from attnzoo.testing import against


def sigmoid(t):
    return 1 / (1 + torch.exp(-t))


def mlp(layers, t):
    """W₂ relu(W₁ t), of one vector."""
    bias = [0 if layer.bias is None else layer.bias for layer in (layers.fc1, layers.fc2)]
    hidden = layers.fc1.weight[:, :, 0, 0] @ t + bias[0]
    return layers.fc2.weight[:, :, 0, 0] @ torch.where(hidden > 0, hidden, 0.0) + bias[1]


@against(Cbam, examples=40)
def test_oracle(component, x, layout, keys):
    """Channel gates from the mean and the largest of the grid tokens that exist; then a gate for each place."""
    (rows, columns), p, out = layout.grid, layout.prefix, []
    kernel = component.spatial.conv.conv.weight[0]
    half = kernel.shape[-1] // 2
    for s in range(x.shape[0]):
        there = [x[s, i] for i in range(p, layout.length) if keys[s, i]]
        pooled = [torch.zeros(x.shape[-1]).double()] * 2
        if there:
            pooled = [sum(there) / len(there), torch.stack(there).max(0).values]
        gated = x[s] * sigmoid(mlp(component.channel, pooled[0]) + mlp(component.channel, pooled[1]))
        held = {}  # by place, of tokens that exist
        for i in range(rows):
            for j in range(columns):
                at = p + i * columns + j
                if keys[s, at]:
                    held[i, j] = torch.stack([gated[at].mean(), gated[at].max()])
        sample = list(gated[:p])
        for i in range(rows):
            for j in range(columns):
                logit = torch.zeros(()).double()
                for (y, x_), pair in held.items():
                    if abs(y - i) <= half and abs(x_ - j) <= half:
                        logit = logit + kernel[:, y - i + half, x_ - j + half] @ pair
                sample.append(gated[p + i * columns + j] * sigmoid(logit))
        out.append(torch.stack(sample))
    return torch.stack(out)


def form(self, x, mask, layout, both=torch.add, held=("mean", "amax"), kernel=None, order=None, prefix=True):
    """The equations, with a fault or without."""
    p = layout.prefix
    keys = torch.ones(x.shape[:2], dtype=torch.bool) if mask.keys is None else mask.keys
    there = keys[:, p:, None]
    most = x[:, p:].masked_fill(~there, -torch.inf).amax(1).masked_fill(~there.any(1), 0.0)
    mean = (x[:, p:] * there).sum(1) / there.sum(1).clamp(min=1)
    one, two = (
        self.channel.fc2(self.channel.fc1(t[..., None, None]).relu())[..., 0, 0] for t in (mean, most)
    )
    gate = both(one, two).sigmoid()
    u = x if order == "places first" else x * gate[:, None]
    if not prefix:
        u = torch.cat([x[:, :p], u[:, p:]], 1)
    grid = layout.to_grid(u[:, p:] * there)
    pair = torch.cat([getattr(grid, how)(dim=1, keepdim=True) for how in held], 1)
    weight = self.spatial.conv.conv.weight
    places = nn.functional.conv2d(
        pair, weight if kernel is None else kernel(weight), padding=weight.shape[-1] // 2
    ).sigmoid()
    out = torch.cat([u[:, :p], u[:, p:] * places.flatten(1)[..., None]], 1)
    return out * gate[:, None] if order == "places first" else out


def with_fault(**fault):
    """CBAM with one fault."""
    return wrong(Cbam, mix=lambda self, x, source, *, mask, layout: form(self, x, mask, layout, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


def mixing(change):
    """CBAM with its inputs changed."""

    def mix(self, x, source, *, mask, layout):
        mask, layout = change(mask, layout)
        return Cbam.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Cbam, mix=mix)


MUTANTS = {
    "no mean token": with_fault(both=lambda one, two: two),
    "no largest token": with_fault(both=lambda one, two: one),
    "largest and mean swapped for the convolution": with_fault(held=("amax", "mean")),
    "the smallest channel": with_fault(held=("mean", "amin")),
    "the kernel turned": with_fault(kernel=lambda weight: weight.mT),
    "places before channels": with_fault(order="places first"),
    "special tokens not gated": with_fault(prefix=False),
    "the mask ignored": mixing(lambda mask, layout: (Mask(), layout)),
    "rows for columns": mixing(lambda mask, layout: (mask, Layout(layout.grid[::-1], layout.prefix))),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((3, 4), 1)


def cbam(layout=LAYOUT, dim=6, **options) -> Cbam:
    """In float64, with weights of a size that matters."""
    return spread(Cbam(Site("hand", dim, 2, layout), **{"ratio": 0.5, **options}), 0.5)


# By hand


def test_hand_zero_weights_leave_a_quarter():
    """σ(0) twice; special tokens, which lie at no place, are halved once."""
    part = set_all(cbam(), 0.0)
    x = normal(2, 13, 6)
    near(part(x, layout=LAYOUT), torch.cat([x[:, :1] / 2, x[:, 1:] / 4], 1))


def test_hand_two_tokens_of_one_channel():
    """x = (0, 2), mean 1, largest 2: σ(0.5 (1 + 2) ln 3 / 1.5) = 3/4, so u = (0, 3/2); the kernel looks one to the right:
    gates σ(ln 3 (3/2 + 3/2) / 3) = 3/4 and σ(0) = 1/2."""
    layout, ln3 = Layout((1, 2)), torch.log(torch.tensor(3.0, dtype=torch.float64))
    part = set_all(cbam(layout, 1, kernel=3), 0.0)
    with torch.no_grad():
        part.channel.fc1.weight.fill_(1.0)
        part.channel.fc2.weight.fill_(float(ln3) / 3)
        part.spatial.conv.conv.weight[0, :, 1, 2] = ln3 / 3
    x = torch.tensor([[[0.0], [2.0]]], dtype=torch.float64)
    near(part(x, layout=layout), [[[0.0], [0.75]]])
    near(seen(part, x, layout=layout, tap="gate_channels"), [[0.75]])
    near(seen(part, x, layout=layout, tap="gate_places"), [[[0.75, 0.5]]])


def test_hand_parameters():
    """timm's module of 64 channels has 612: two are its batch norm's."""
    site = Site("hand", 64, 2, LAYOUT)
    assert count(CbamModule(64)) == 612 and count(Cbam(site)) == 610
    assert count(Cbam(site, mlp_bias=True)) == 610 + 4 + 64
    assert count(Cbam(site, kernel=3)) == 512 + 18


def test_a_kernel_without_a_middle_is_refused():
    with pytest.raises(OptionError, match="kernel of 4 has no middle"):
        Cbam(place(8), kernel=4)


# Identities


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", [0, 1])
def test_identity_timms_on_the_grid(prefix, bias):
    """With its batch norm, in eval mode, as it starts: that divides by √(1 + ε) only."""
    layout = Layout((3, 4), prefix)
    part = cbam(layout, 32, mlp_bias=bias)
    timms = CbamModule(32, rd_ratio=0.5, mlp_bias=bias).double().eval()
    timms.load_state_dict(part.state_dict(), strict=False)
    timms.spatial.conv.bn.eps = 0.0
    x = normal(2, layout.length, 32)
    found = layout.split(part(x, layout=layout))[1]
    near(layout.to_grid(found), timms(layout.to_grid(layout.split(x)[1])))


def test_identity_the_gate_of_a_place_is_shared_by_its_channels():
    part, x = cbam(), normal(2, 13, 6)
    ratio = (part(x, layout=LAYOUT) / x)[:, 1:]
    ratio = ratio / seen(part, x, layout=LAYOUT, tap="gate_channels")[:, None]
    near(ratio, ratio[..., :1].expand_as(ratio), 1e-9)
    near(ratio[..., 0], seen(part, x, layout=LAYOUT, tap="gate_places").flatten(1), 1e-9)


def test_identity_the_gate_of_the_channels_is_blind_to_the_order_of_tokens():
    part, x = cbam(), normal(2, 13, 6)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(12)])
    one, two = (seen(part, t, layout=LAYOUT, tap="gate_channels") for t in (x, x[:, order]))
    near(one, two)


def test_identity_a_turned_grid_gives_a_turned_output_when_the_kernel_is_turned():
    one, two = cbam(Layout((3, 4))), cbam(Layout((4, 3)))
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        two.spatial.conv.conv.weight.copy_(one.spatial.conv.conv.weight.mT)
    x = normal(2, 3, 4, 6)
    turned = two(x.transpose(1, 2).reshape(2, 12, 6), layout=Layout((4, 3))).reshape(2, 4, 3, 6)
    near(turned.transpose(1, 2), one(x.reshape(2, 12, 6), layout=Layout((3, 4))).reshape(2, 3, 4, 6))


def test_identity_padded_columns_are_a_narrower_image():
    part, x = cbam(Layout((3, 4))), normal(2, 3, 4, 6)
    keys = (torch.arange(12) % 4 < 3).expand(2, 12)
    padded = part(x.reshape(2, 12, 6), mask=Mask(keys=keys), layout=Layout((3, 4))).reshape(2, 3, 4, 6)
    narrower = part(x[:, :, :3].reshape(2, 9, 6), layout=Layout((3, 3))).reshape(2, 3, 3, 6)
    near(padded[:, :, :3], narrower)


def test_identity_one_token_has_its_mean_for_its_largest():
    """The MLP counts twice."""
    part, x = cbam(Layout((1, 1))), normal(2, 1, 6)
    layers = part.channel
    once = layers.fc2(layers.fc1(x[:, 0, :, None, None]).relu())[..., 0, 0]
    near(seen(part, x, layout=Layout((1, 1)), tap="gate_channels"), (2 * once).sigmoid())


def test_narrow_numbers_stay_near():
    narrow(Cbam, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))), ratio=0.5)
