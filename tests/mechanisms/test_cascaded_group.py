"""Cascaded group attention of EfficientViT, arXiv:2305.07027, §3.1."""

import copy
import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, set_all, spread, wrong
from timm.models.efficientvit_msra import CascadedGroupAttention
from torch import nn

from attnzoo.core import Layout, Mask, OptionError, Site, options_of
from attnzoo.mechanisms.projection.cascaded_group import CascadedGroup
from attnzoo.testing import against


def affine(layer, t):
    """γ ⊙ (W t) + β."""
    out = layer.scales[0] * (t @ layer.blocks[0][0].T)
    return out if layer.bias is None else out + layer.bias


@against(CascadedGroup, examples=12, options=lambda options: "qk" in options)  # the default has 16 channels
def test_oracle(component, options, x, layout, keys):
    """Head after head; queries are convolved place by place, and pairs of tokens look b up."""
    (b, n, c), heads, p, (rows, columns), out = x.shape, component.heads, layout.prefix, layout.grid, []
    d, half, w = options["qk"], options["kernel"] // 2, c // component.heads
    at = {divmod(i, columns): p + i for i in range(rows * columns)}
    place = {i: yx for yx, i in at.items()}

    def b_of(table):
        """What is learned for two tokens, by name; in between, where it was built for a longer grid."""
        step = (len(table) - 1) / (rows - 1) if rows > 1 else 0
        read = {}
        for down in range(rows):
            low = min(int(down * step + 1e-9), len(table) - 1)
            high, part = min(low + 1, len(table) - 1), down * step - low
            for right in range(columns):
                read[down, right] = table[low, right] * (1 - part) + table[high, right] * part
        zero = torch.zeros(()).double()
        return lambda i, j: (
            zero
            if min(i, j) < p
            else read[tuple(abs(a - e) for a, e in zip(place[i], place[j], strict=True))]
        )

    apart = [b_of(table) for table in component.apart]
    for s in range(b):
        there, before, found = keys[s], 0, []
        for h in range(heads):
            qkv = affine(component.qkv[h], x[s, :, h * w : (h + 1) * w] + before)
            q, k, v = qkv.split([d, d, w], 1)
            conv, convolved = component.convs[h], []
            for i in range(n):
                total = torch.zeros(d).double() if conv.bias is None else conv.bias
                steps = (
                    [(0, 0)]
                    if i < p
                    else [(y, z) for y in range(-half, half + 1) for z in range(-half, half + 1)]
                )
                for dy, dx in steps:
                    j = i if i < p else at.get((place[i][0] + dy, place[i][1] + dx))
                    if j is not None and there[j]:
                        total = total + conv.weight[:, 0, dy + half, dx + half] * q[j]
                convolved.append(total)
            before, see = [], [j for j in range(n) if there[j]]
            for i in range(n):
                scores = (
                    k[see] @ convolved[i] / math.sqrt(d)
                    + torch.stack([apart[h](i, j) for j in see or [i]])[: len(see)]
                )
                before.append(scores.softmax(0) @ v[see])
            before = torch.stack(before)
            found.append(before)
        merged = torch.cat(found, 1)
        out.append(affine(component.proj, torch.where(merged > 0, merged, 0.0)))
    return torch.stack(out)


def before(change):
    """The mechanism, changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return CascadedGroup.mix(self, x, source, mask=mask, layout=layout)

    return wrong(CascadedGroup, mix=mix)


def mixing(change):
    """The mechanism with its inputs changed."""

    def mix(self, x, source, *, mask, layout):
        mask, layout = change(mask, layout)
        return CascadedGroup.mix(self, x, source, mask=mask, layout=layout)

    return wrong(CascadedGroup, mix=mix)


def not_cascaded(self, x, source, *, mask, layout):
    """No head gets what the one before it found: heads one by one, each as if it were the first."""
    found, proj, w = [], self.proj, x.shape[-1] // self.heads
    for h in range(self.heads):
        alone = copy.deepcopy(self)
        alone.heads, alone.proj = 1, nn.Identity()
        alone.qkv, alone.convs = self.qkv[h : h + 1], self.convs[h : h + 1]
        alone.apart = nn.Parameter(self.apart[h : h + 1])
        found.append(CascadedGroup.mix(alone, x[..., h * w : (h + 1) * w], None, mask=mask, layout=layout))
    return proj(torch.cat(found, -1))


def signed(self, layout, device):
    """Ways up and to the left are counted from the other end."""
    at = layout.coords(device)
    return ((at[:, None] - at) % torch.tensor(layout.grid)).unbind(-1)


MUTANTS = {
    "a wrong scale": before(lambda self: [conv.weight.mul_(1.5) for conv in self.convs]),
    "keys and queries swapped": before(lambda self: [part.blocks[0][0, : 2 * self.qk].copy_(part.blocks[0][0, : 2 * self.qk].roll(self.qk, 0)) for part in self.qkv]),
    "no b": before(lambda self: self.apart.zero_()),
    "b of other ways": wrong(CascadedGroup, _ways=signed),
    "rows for columns in b": wrong(CascadedGroup, _ways=lambda self, layout, device: CascadedGroup._ways(self, layout, device)[::-1] if layout.grid[0] == layout.grid[1] else CascadedGroup._ways(self, layout, device)),
    "no cascade": wrong(CascadedGroup, mix=not_cascaded),
    "heads in another order": before(lambda self: self.apart.copy_(self.apart.flip(0))),
    "kernels turned": before(lambda self: [conv.weight.copy_(conv.weight.mT.clone()) for conv in self.convs]),
    "γ left out": before(lambda self: self.proj.scales[0].fill_(1.0)),
    "no relu": patched(CascadedGroup, "torch", type("T", (), {"cat": staticmethod(lambda t, dim: type("R", (), {"relu": lambda self: torch.cat(t, dim)})()), "empty": torch.empty})),
    "the mask ignored": mixing(lambda mask, layout: (Mask(), layout)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def at(grid, prefix=0, dim=8, heads=2, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, heads, Layout(grid, prefix), **wishes)


def part_of(grid=(4, 4), prefix=0, **options) -> CascadedGroup:
    """In float64, with parameters of a size that matters."""
    return spread(CascadedGroup(at(grid, prefix), **{"qk": 3} | options), 0.5)


# By hand


def test_hand_two_heads_of_one_channel_and_one_token():
    """The only value: o_1 = 2 · 5, o_2 = 2 (7 + 10); P = 1 sums them."""
    part = set_all(CascadedGroup(at((1, 1), 0, 2, 2, qkv_bias=False, proj_bias=False), qk=1), 1.0)
    with torch.no_grad():
        for qkv in part.qkv:
            qkv.blocks[0][0, 2] = 2.0
    near(part(torch.tensor([[[5.0, 7]]]).double(), layout=Layout((1, 1))), [44, 44])
    near(part(torch.tensor([[[5.0, -70]]]).double(), layout=Layout((1, 1))), [10, 10])  # relu


def test_hand_weights_of_zero_but_for_b():
    """b = ln 3 for a token itself: weights 3/4 and 1/4 of two tokens, whose values are 8 and 4."""
    part = set_all(CascadedGroup(at((1, 2), 0, 1, 1, qkv_bias=False, proj_bias=False), qk=1), 0.0)
    with torch.no_grad():
        part.qkv[0].blocks[0][0, 2] = part.qkv[0].scales[0][2] = 1.0
        part.proj.blocks[0][0, 0] = part.proj.scales[0][0] = 1.0
        part.apart[0, 0, 0] = math.log(3)
    near(part(torch.tensor([[[8.0], [4]]]).double(), layout=Layout((1, 2))), [7, 5])


def test_hand_it_starts_at_zero():
    x = normal(2, 16, 8).float()
    assert not CascadedGroup(at((4, 4), proj_bias=False))(x, layout=Layout((4, 4))).any()
    assert CascadedGroup(at((4, 4)), start="one")(x, layout=Layout((4, 4))).abs().max() > 1e-2


def test_hand_parameters():
    """Of each head (2 d + w) w + 2 (2 d + w), d k² + d, n; c² + 2 c of P."""
    assert count(CascadedGroup(at((4, 5)))) == 2 * (36 * 4 + 2 * 36 + 16 * 25 + 16 + 20) + 64 + 16
    wanted = 2 * (10 * 4 + 10 + 3 * 9 + 20) + 64 + 8
    site = at((4, 5), qkv_bias=False, proj_bias=False)
    assert count(CascadedGroup(site, qk=3, kernel=3)) == wanted


def test_defaults_and_refusals():
    assert options_of(CascadedGroup)().model_dump() == {"qk": 16, "kernel": 5, "start": "zero"}
    with pytest.raises(OptionError, match="kernel of 4 has no middle"):
        part_of(kernel=4)


# Identities


def test_identity_timms():
    """Whose batch norms, in eval mode, are γ and β; those after the convolutions go into their kernels."""
    layout, x = Layout((4, 4)), normal(2, 16, 8)
    part = part_of(qk=4)
    timms = CascadedGroupAttention(8, 4, 2, attn_ratio=1, resolution=4, kernels=(5, 5)).double()
    timms.eval()
    with torch.no_grad():
        for module in timms.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
                module.bias.normal_()
        timms.attention_biases.normal_()

        def folded(pair):
            factor = pair.bn.weight / torch.sqrt(pair.bn.running_var + pair.bn.eps)
            return pair.conv.weight, factor, pair.bn.bias - factor * pair.bn.running_mean

        for mine, theirs in zip([*part.qkv, part.proj], [*timms.qkvs, timms.proj[1]], strict=True):
            weight, factor, bias = folded(theirs)
            mine.blocks[0].copy_(weight[None, :, :, 0, 0])
            mine.scales[0].copy_(factor)
            mine.bias.copy_(bias)
        for mine, theirs in zip(part.convs, timms.dws, strict=True):
            weight, factor, bias = folded(theirs)
            mine.weight.copy_(factor[:, None, None, None] * weight)
            mine.bias.copy_(bias)
        part.apart.copy_(timms.attention_biases.reshape(2, 4, 4))
    near(layout.to_grid(part(x, layout=layout)), timms(layout.to_grid(x)))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_identity_folded_it_is_the_same(dtype, tolerance):
    part, x = part_of((4, 5), 1).to(dtype), normal(2, 21, 8).to(dtype)
    mask = Mask(keys=torch.rand(2, 21) < 0.7)
    wanted = [part(x, mask=m, layout=Layout((4, 5), 1)).detach() for m in (Mask(), mask)]
    folded = part.fold()
    assert folded is part and type(part.proj) is nn.Linear and all(type(p) is nn.Linear for p in part.qkv)
    for m, out in zip((Mask(), mask), wanted, strict=True):
        near(part(x, mask=m, layout=Layout((4, 5), 1)), out, tolerance)
    part.init_weights()


def test_identity_later_heads_do_not_reach_back():
    """Another second half of the channels changes what the first head finds not at all, and the second's."""
    part, x = part_of(), normal(2, 16, 8)
    part.proj = nn.Identity()
    other = x.clone()
    other[..., 4:] += 1
    one, two = (part(t, layout=Layout((4, 4))) for t in (x, other))
    near(two[..., :4], one[..., :4])
    assert (two[..., 4:] - one[..., 4:]).abs().max() > 1e-2


def test_identity_a_turned_grid_gives_a_turned_output_when_the_parameters_are_turned():
    one, two = part_of((3, 4)), part_of((4, 3))
    state = {
        k: t.mT if k == "apart" or k.startswith("convs") and t.ndim == 4 else t
        for k, t in one.state_dict().items()
    }
    two.load_state_dict(state)
    x = normal(2, 3, 4, 8)
    turned = two(x.transpose(1, 2).reshape(2, 12, 8), layout=Layout((4, 3))).reshape(2, 4, 3, 8)
    near(turned.transpose(1, 2), one(x.reshape(2, 12, 8), layout=Layout((3, 4))).reshape(2, 3, 4, 8))


def test_identity_padding_is_a_smaller_picture():
    part, small = part_of((6, 7)), part_of((3, 5))
    state = part.state_dict()
    small.load_state_dict(state | {"apart": state["apart"][:, :3, :5]})
    x, keys = normal(2, 6, 7, 8), torch.zeros(2, 6, 7, dtype=torch.bool)
    keys[:, :3, :5] = True
    x[~keys] *= 100
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((6, 7))).reshape(x.shape)
    near(out[:, :3, :5].flatten(1, 2), small(x[:, :3, :5].flatten(1, 2), layout=Layout((3, 5))))


def test_identity_on_a_finer_grid_b_keeps_its_ends():
    part = part_of((3, 3))
    table = part._tables(Layout((5, 5)))
    near(table[:, ::2, ::2], part.apart)
    near(table[:, 1, 0], (part.apart[:, 0, 0] + part.apart[:, 1, 0]) / 2)


def test_narrow_numbers_stay_near():
    narrow(CascadedGroup, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))), qk=4)
