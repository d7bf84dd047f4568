"""L-SFAN, arXiv:2406.16913."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, spread, wrong
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, MultiHead, OptionError, Site
from attnzoo.functional import masked_softmax, merge_heads, rearrange
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection.spatially_focused import SpatiallyFocused
from attnzoo.testing import against


def trunk(part, tokens, times, joints, circular):
    """ReLU(norm(W ⋆ x)), place by place: a dict of what exists, and so again."""
    for conv, norm in zip(part.filters, part.norms, strict=True):
        kt, kj = conv.kernel_size
        found = {}
        for t, j in tokens:
            total = conv.bias
            for dt in range(-(kt // 2), kt // 2 + 1):
                for dj in range(-(kj // 2), kj // 2 + 1):
                    place = ((t + dt) % times if circular else t + dt, j + dj)
                    if place in tokens:
                        total = total + conv.weight[:, :, dt + kt // 2, dj + kj // 2] @ tokens[place]
            found[t, j] = total
        every = torch.stack(list(found.values())) if found else torch.zeros(1, 1)
        mean = every.mean()
        size = ((every - mean) ** 2).mean().add(1e-5).sqrt()
        tokens = {place: F.relu((u - mean) / size * norm.weight + norm.bias) for place, u in found.items()}
    return tokens


@against(SpatiallyFocused, examples=8)
def test_oracle(component, options, x, layout, keys):
    """Filters place by place, means group by group, attention query by query; what is not there is not listed."""
    (b, _, c), p, (times, joints) = x.shape, layout.prefix, layout.grid
    heads, out = component.heads, x.clone()
    group = {"time": lambda t, j: j, "space": lambda t, j: t, "both": lambda t, j: 0}[options["orientation"]]
    for s in range(b):
        places = {(i // joints, i % joints): x[s, p + i] for i in range(times * joints) if keys[s, p + i]}
        tokens = trunk(component, places, times, joints, options["circular"])
        members = {}
        for t in range(times):
            for j in range(joints):
                members.setdefault(group(t, j), [])
                if (t, j) in tokens:
                    members[group(t, j)].append(tokens[t, j])
        u = {g: torch.stack(m).mean(0) if m else torch.zeros(c).double() for g, m in members.items()}
        there = [g for g, m in members.items() if m]
        given = {}
        for g, query in u.items():
            if options["orientation"] == "both":
                read = component.qkv(query)
            else:
                q, read = component.qkv(query)[:c], []
                for h in range(heads):
                    mine = slice(h * c // heads, (h + 1) * c // heads)
                    if not there:
                        read.append(torch.zeros(c // heads).double())
                        continue
                    every = [component.qkv(u[other]) for other in there]
                    scores = torch.stack([q[mine] @ e[c : 2 * c][mine] for e in every]) / math.sqrt(
                        c // heads
                    )
                    read.append(scores.softmax(0) @ torch.stack([e[2 * c :][mine] for e in every]))
                read = torch.cat(read)
            given[g] = query + component.proj(read)
        for t in range(times):
            for j in range(joints):
                out[s, p + t * joints + j] = given[group(t, j)]
    return out


def one_layer(options):
    return options.get("layers") == 1


test_oracle_of_one_layer = against(SpatiallyFocused, examples=40, options=one_layer)(test_oracle.oracle)


def mixing(
    wrap=lambda part, image: part._wrapped(image),
    weight=lambda w: w,
    zeroed=True,
    counted=True,
    over=(1, 2, 3),
    act=F.relu,
    axes=lambda axes: axes,
    joints=lambda keys: keys,
    scale=lambda d, heads: d**-0.5,
    residual=lambda u, read: u + read,
    turned=False,
    special=lambda t: t,
):
    """The equations, without a fault or with one."""

    def mix(self, x, source, *, mask, layout):
        p = layout.prefix
        keys = torch.ones(x.shape[:2], dtype=torch.bool) if mask.keys is None else mask.keys
        there = layout.to_grid(keys[:, p:, None]).to(x)
        image, seen_ = layout.to_grid(x[:, p:]), there if counted else torch.ones_like(there)
        for conv, norm in zip(self.filters, self.norms, strict=True):
            image = wrap(self, image * there if zeroed else image)
            image = F.conv2d(image, weight(conv.weight), conv.bias, padding=conv.padding)
            number = seen_.expand(image.shape).sum(over, keepdim=True).clamp(min=1)
            image = image - (image * seen_).sum(over, keepdim=True) / number
            image = image * ((image.square() * seen_).sum(over, keepdim=True) / number + 1e-5).rsqrt()
            image = act(image * norm.weight[:, None, None] + norm.bias[:, None, None])
        over_ = axes({"time": (2,), "space": (3,), "both": (2, 3)}[self.orientation])
        number = seen_.sum(over_, keepdim=True)
        mean = (image * seen_).sum(over_, keepdim=True) / number.clamp(min=1)
        u = mean.flatten(2).mT
        out = self.qkv(u)
        if self.parts == 3:
            q, k, v = rearrange(out, "b r (three h d) -> three b h r d", three=3, h=self.heads)
            q, k = (k, q) if turned else (q, k)
            scores = q @ k.mT * scale(q.shape[-1], self.heads)
            allowed = joints((there.sum(over_, keepdim=True) > 0).flatten(1)[:, None, None])
            out = merge_heads(masked_softmax(scores, allowed) @ v)
        out = residual(u, self.proj(out)).mT.reshape(mean.shape)
        return layout.from_grid(special(x[:, :p]), out.expand(image.shape))

    return wrong(SpatiallyFocused, mix=mix)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(mixing(), examples=8).ok


def other_way(part, image):
    """The last joints before the first, where time should go round."""
    if not part.circular or not part.around:
        return image
    return F.pad(image, (0, 0, part.around, part.around))


def other_axis(axes):
    return {(2,): (3,), (3,): (2,)}.get(axes, axes)


MUTANTS = {
    "filters flipped": mixing(weight=lambda w: w.flip(2, 3)),
    "filters flipped in time": mixing(weight=lambda w: w.flip(2)),
    "filters flipped in joints": mixing(weight=lambda w: w.flip(3)),
    "channels of filters swapped": mixing(weight=lambda w: w.transpose(0, 1)),
    "time never goes round": mixing(wrap=other_way),
    "padding in the filters": mixing(zeroed=False),
    "padding in means and norms": mixing(counted=False),
    "each channel normalised by itself": mixing(over=(2, 3)),
    "the norm over samples": mixing(over=(0, 1, 2, 3)),
    "each token normalised by itself": mixing(over=(1,)),
    "no ReLU": mixing(act=lambda t: t),
    "means over the other side": mixing(axes=other_axis),
    "joints that do not exist are keys": mixing(joints=torch.ones_like),
    "never scaled": mixing(scale=lambda d, heads: 1.0),
    "scaled by all channels": mixing(scale=lambda d, heads: (d * heads) ** -0.5),
    "queries and keys swapped": mixing(turned=True),
    "no residual": mixing(residual=lambda u, read: read),
    "special tokens lost": mixing(special=torch.zeros_like),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle_of_one_layer, mutant)


def at(grid, dim=8, heads=2, prefix=0, **fields) -> Site:
    return Site("hand", dim, heads, Layout(grid, prefix), **fields)


def focused(grid=(6, 4), dim=8, heads=2, prefix=0, **options) -> SpatiallyFocused:
    """In float64, with weights of a size that matters."""
    return spread(SpatiallyFocused(at(grid, dim, heads, prefix), **options), 0.4)


# By hand


def test_hand_a_trunk_of_one_number():
    """(1 -1; -1 1) has mean 0 and variance 1; ReLU, mean over times: (1/2, 1/2); attention gives 1/2 again."""
    part = SpatiallyFocused(at((2, 2), 1, 1), layers=1, kernel_time=1, kernel_joints=1).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.fill_(1.0)
        for bias in (part.filters[0].bias, part.norms[0].bias, part.qkv.bias, part.proj.bias):
            bias.zero_()
    x = torch.tensor([1.0, -1, -1, 1]).double().reshape(1, 4, 1)
    near(part(x, layout=Layout((2, 2))), [1 / math.sqrt(1 + 1e-5)] * 4)


def test_hand_means_over_times_and_joints():
    """Of (3 1; 0 2), filters and norm left out: over times (3/2, 3/2), over joints (2, 1), over both 3/2."""
    x = torch.tensor([3.0, 1, 0, 2]).double().reshape(1, 4, 1)
    for orientation, wanted in (("time", [1.5] * 4), ("space", [2, 2, 1, 1]), ("both", [1.5] * 4)):
        part = focused((2, 2), 1, 1, orientation=orientation)
        part.filters, part.norms = nn.ModuleList(), nn.ModuleList()
        with torch.no_grad():
            part.proj.weight.zero_(), part.proj.bias.zero_()
        near(part(x, layout=Layout((2, 2))), wanted)


def test_hand_parameters():
    """3 (5 · 3 c² + c + 2 c) + 4 c² + 4 c; one token needs no queries and keys: 2 c² + 2 c."""
    trunk_ = 3 * (15 * 64 + 3 * 8)
    assert count(SpatiallyFocused(at((6, 4)))) == trunk_ + 4 * 64 + 4 * 8
    assert count(SpatiallyFocused(at((6, 4)), orientation="both")) == trunk_ + 2 * 64 + 2 * 8
    small = SpatiallyFocused(at((6, 4)), layers=2, kernel_time=3, kernel_joints=1)
    assert count(small) == 2 * (3 * 64 + 3 * 8) + 4 * 64 + 4 * 8


@pytest.mark.parametrize("orientation,tokens", [("time", 4), ("space", 6)])
def test_hand_as_many_tokens_as_joints_or_times(orientation, tokens):
    weights = seen(focused(orientation=orientation), normal(3, 24, 8), layout=Layout((6, 4)))
    assert weights.shape == (3, 2, tokens, tokens)


# Identities


def test_identity_when_in_a_circle_has_no_say():
    """Where time goes round, circular shifts in time change nothing; with zeros at the ends they do."""
    x = normal(2, 6, 4, 8)
    for circular in (True, False):
        part = focused(circular=circular)
        out, moved = (part(t.flatten(1, 2), layout=Layout((6, 4))) for t in (x, x.roll(2, 1)))
        assert torch.allclose(out, moved, rtol=0, atol=1e-11) == circular


@pytest.mark.parametrize("times", [1, 2, 7])
def test_identity_what_is_constant_in_time_is_one_time(times):
    part, x = focused(circular=True), normal(2, 1, 4, 8)
    one = part(x.flatten(1, 2), layout=Layout((1, 4)))
    many = part(x.expand(2, times, 4, 8).flatten(1, 2), layout=Layout((times, 4)))
    near(many, one.repeat(1, times, 1), 1e-11)


def test_identity_one_token_attends_to_itself():
    """The softmax of one score is 1: W_O W_V, with `both`, or with one joint."""
    both, time, x = focused((6, 1), orientation="both"), focused((6, 1)), normal(2, 6, 8)
    state = both.state_dict()
    for name in ("weight", "bias"):
        state[f"qkv.{name}"] = torch.cat([normal(16, *state[f"qkv.{name}"].shape[1:]), state[f"qkv.{name}"]])
    time.load_state_dict(state)
    near(both(x, layout=Layout((6, 1))), time(x, layout=Layout((6, 1))), 1e-11)
    u = both._trunk(Layout((6, 1)).to_grid(x), torch.ones(2, 1, 6, 1, dtype=torch.bool)).mean((2, 3))
    near(both(x, layout=Layout((6, 1)))[:, 0], u + both.proj(both.qkv(u)), 1e-11)


@pytest.mark.parametrize("kernel,equivariant", [(1, True), (3, False)])
def test_identity_joints_may_change_places_where_filters_keep_them_apart(kernel, equivariant):
    """And then their mean, which a head reads, does not care for their order."""
    part, x, order = focused(kernel_joints=kernel), normal(2, 6, 4, 8), [2, 0, 3, 1]
    out, moved = (part(t.flatten(1, 2), layout=Layout((6, 4))).reshape(x.shape) for t in (x, x[:, :, order]))
    assert torch.allclose(moved, out[:, :, order], rtol=0, atol=1e-11) == equivariant
    assert torch.allclose(moved.mean((1, 2)), out.mean((1, 2)), rtol=0, atol=1e-11) == equivariant


@pytest.mark.parametrize("orientation,side", [("time", 4), ("space", 6)])
def test_identity_attention_is_multi_head_attention_between_means(orientation, side):
    part, layout = focused(orientation=orientation), Layout((6, 4))
    multi, x = MultiHead(at((side,)), Softmax(at((side,)))).double().eval(), normal(2, 24, 8)
    multi.qkv.load_state_dict(part.qkv.state_dict())
    multi.proj.load_state_dict(part.proj.state_dict())
    image = part._trunk(layout.to_grid(x), torch.ones(2, 1, 6, 4, dtype=torch.bool))
    u = image.mean(2 if orientation == "time" else 3).mT
    wanted = u + multi(u, layout=Layout((side,)))
    out = part(x, layout=layout).reshape(2, 6, 4, 8)
    near(out, (wanted[:, None] if orientation == "time" else wanted[:, :, None]).expand(out.shape), 1e-11)


def test_identity_a_trunk_without_masks_is_pytorchs():
    part, x = focused(), normal(2, 8, 6, 4)
    wanted = x
    for conv, norm in zip(part.filters, part.norms, strict=True):
        wanted = norm(conv(wanted)).relu()
    near(part._trunk(x, torch.ones(2, 1, 6, 4, dtype=torch.bool)), wanted, 1e-11)


@pytest.mark.parametrize("orientation", ["time", "space", "both"])
def test_identity_padding_at_the_ends_is_a_smaller_grid(orientation):
    """Missing last times and joints are the zeros beyond the borders, and no keys."""
    part, x = focused((6, 5), orientation=orientation), normal(2, 6, 5, 8)
    keys = torch.zeros(2, 6, 5, dtype=torch.bool)
    keys[:, :4, :3] = True
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((6, 5))).reshape(x.shape)
    small = part(x[:, :4, :3].flatten(1, 2), layout=Layout((4, 3)))
    near(out[:, :4, :3].flatten(1, 2), small, 1e-11)


def test_special_tokens_neither_change_nor_say_anything():
    part, layout = focused(prefix=2), Layout((6, 4), 2)
    x, other = normal(2, 26, 8), normal(2, 26, 8)
    out, moved = (part(t, layout=layout) for t in (x, torch.cat([other[:, :2], x[:, 2:]], 1)))
    near(out[:, :2], x[:, :2])
    near(moved[:, 2:], out[:, 2:])


@pytest.mark.parametrize("orientation", ["time", "space", "both"])
def test_where_nobody_exists_everything_stays_finite(orientation):
    part, x = focused(orientation=orientation), normal(2, 24, 8).requires_grad_()
    out = part(x, mask=Mask(keys=torch.zeros(2, 24, dtype=torch.bool)), layout=Layout((6, 4)))
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())


@pytest.mark.parametrize("options", [{"kernel_time": 4}, {"kernel_joints": 2}])
def test_filters_without_a_middle_are_refused(options):
    with pytest.raises(OptionError, match="no middle"):
        SpatiallyFocused(at((6, 4)), **options)


@pytest.mark.parametrize("options", [{}, {"orientation": "both"}, {"circular": True}], ids=str)
def test_narrow_numbers_stay_near(options):
    narrow(SpatiallyFocused, [(2, 24, 8)], site=at((6, 4)), layers=2, **options)
