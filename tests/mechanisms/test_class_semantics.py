"""Class-semantics-based attention, arXiv:2109.02613."""

from itertools import product

import pytest
import torch
from by_hand import caught, count, line, near, normal, seen, set_all, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.mechanisms.cross.class_semantics import ClassSemantics
from attnzoo.testing import against


def sigmoid(t):
    """1 / (1 + e^-t)."""
    return 1 / (1 + (-t).exp())


def convolved(conv, held):
    """What a convolution gives at every place; nothing lies beyond the ends. By place, as `held`."""
    half = conv.weight.shape[-1] // 2
    out = {}
    for place in held:
        total = conv.bias
        for step in product(range(-half, half + 1), repeat=len(place)):
            there = tuple(a + b for a, b in zip(place, step, strict=True))
            if there in held:
                total = (
                    total + conv.weight[(slice(None), slice(None), *(s + half for s in step))] @ held[there]
                )
        out[place] = total
    return out


def stretched(values, size):
    """A line of numbers resized: linear between the middles of its entries, constant beyond them."""
    out = []
    for i in range(size):
        at = min(max((i + 0.5) * len(values) / size - 0.5, 0), len(values) - 1)
        left = int(at)
        right = min(left + 1, len(values) - 1)
        out.append(values[left] * (1 - (at - left)) + values[right] * (at - left))
    return out


def resized(gates, old, new):
    """Gates by place brought to another line or plane, in row-major order."""
    if len(old) == 1:
        return stretched([gates[(i,)] for i in range(old[0])], new[0])
    rows = [torch.stack(stretched([gates[i, j] for j in range(old[1])], new[1])) for i in range(old[0])]
    return [gate for row in stretched(rows, new[0]) for gate in row]


@against(ClassSemantics)
def test_oracle(component, options, x, source, layout, context_layout, keys):
    """Sample by sample, place by place. What does not exist is as if it lay beyond the ends."""
    p, where, out = context_layout.prefix, list(product(*map(range, context_layout.grid))), []
    for s in range(x.shape[0]):
        exists = [w for i, w in enumerate(where) if keys[s, p + i]]
        held = {w: source[s, p + where.index(w)] for w in exists}
        parts = []
        if options["axes"] != "places":
            kept = list(convolved(component.channel_conv, held).values())
            width = component.channel_conv.bias.shape[0]
            kept = torch.stack(kept) if kept else torch.zeros(1, width).double()
            pooled = kept.sum(0) / len(kept) if options["pool"] == "mean" else kept.max(0).values
            one, _, two = component.channel_mlp
            c = sigmoid(two.weight @ (one.weight @ pooled + one.bias).clamp(min=0) + two.bias)
            parts.append([token * c for token in x[s]])
        if options["axes"] != "channels":
            inner = {w: t.clamp(min=0) for w, t in convolved(component.place_conv, held).items()}
            found = {w: sigmoid(t)[0] for w, t in convolved(component.place_gate, inner).items()}
            nothing = torch.zeros(()).double()
            mean = sum(found.values(), nothing) / max(1, len(found))
            gates = [mean] * layout.prefix
            gates += resized({w: found.get(w, nothing) for w in where}, context_layout.grid, layout.grid)
            parts.append([token * t for token, t in zip(x[s], gates, strict=True)])
        if len(parts) == 2:
            a, b = (torch.stack(part) for part in parts)
            fused = {
                "mean": (a + b) / 2,
                "sum": a + b,
                "max": torch.where(a > b, a, b),
                "concat": None,
            }[options["fuse"]]
            if fused is None:
                w = component.join.weight
                fused = torch.stack([w @ torch.cat([i, j]) for i, j in zip(a, b, strict=True)])
            parts = [list(fused)]
        out.append(torch.stack(parts[0]))
    return torch.stack(out)


def mixing(change):
    """The mechanism with its inputs or parameters changed."""

    def mix(self, x, source, *, mask, layout, context_layout=None):
        with torch.no_grad():
            x, source, mask = change(self, x, source, mask)
        return ClassSemantics.mix(self, x, source, mask=mask, layout=layout, context_layout=context_layout)

    return wrong(ClassSemantics, mix=mix)


def turned(self, x, source, mask):
    for name, parameter in self.named_parameters():
        if "conv" in name and parameter.ndim > 2:
            parameter.copy_(parameter.flip(2))
    return x, source, mask


def pooled_with_padding(self, r, there):
    """The mean over all places, those that do not exist too."""
    held = self.channel_conv(r).flatten(2)
    return held.mean(2) if self.pool == "mean" else ClassSemantics._pooled(self, r, there)


def pooled_first(self, r, there):
    """Pool, then convolve the mean."""
    mean = r.flatten(2).mean(2)[(..., *[None] * self.dims)].expand(r.shape)
    return self.channel_conv(mean).flatten(2).mean(2)


def bias_at_padding(self, r, there, layout):
    """Padding that, after the first convolution, holds its bias."""
    return ClassSemantics._place_gates(self, r, torch.ones_like(there), layout)


def nearest(self, r, there, layout):
    """Gates resized by repeating places."""
    here = Layout(tuple(r.shape[2:]))
    gates = ClassSemantics._place_gates(self, r, there, here)[:, None].unflatten(2, here.grid)
    mean = ClassSemantics._place_gates(self, r, there, layout)[:, : layout.prefix]
    gates = nn.functional.interpolate(gates, layout.grid, mode="nearest").flatten(1)
    return torch.cat([mean, gates], dim=1)


def special_tokens_shut(self, r, there, layout):
    gates = ClassSemantics._place_gates(self, r, there, layout)
    return torch.cat([torch.ones_like(gates[:, : layout.prefix]), gates[:, layout.prefix :]], dim=1)


MUTANTS = {
    "convolutions turned": mixing(turned),
    "the mask ignored": mixing(lambda self, x, source, mask: (x, source, Mask())),
    "the first sample's semantics for all": mixing(
        lambda self, x, source, mask: (x, source[:1].expand_as(source), mask)
    ),
    "padding in the pool": wrong(ClassSemantics, _pooled=pooled_with_padding),
    "pooled before the convolution": wrong(ClassSemantics, _pooled=pooled_first),
    "the bias at padded places": wrong(ClassSemantics, _place_gates=bias_at_padding),
    "the nearest place": wrong(ClassSemantics, _place_gates=nearest),
    "special tokens not gated": wrong(ClassSemantics, _place_gates=special_tokens_shut),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


FEATURES, CLASSES = Layout((6,), 1), Layout((6,))


def semantics(layout=FEATURES, context=CLASSES, dim=8, width=5, **options) -> ClassSemantics:
    """For semantics of five classes."""
    site = Site("hand", dim, 2, layout, context_dim=width, context_layout=context)
    return spread(ClassSemantics(site, **options), 0.4)


def run(part, x, r, layout=FEATURES, context=CLASSES, **arguments):
    """Its output."""
    return part(x, r, layout=layout, context_layout=context, **arguments)


def shut(part, bias):
    """Last layers without weights: every gate is σ(bias)."""
    for layer in part.channel_mlp[2], part.place_gate:
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, bias)
    return part


# By hand


def test_hand_gates_without_weights_are_a_half():
    x, r = normal(2, 7, 8), normal(2, 6, 5)
    near(run(shut(semantics(), 0.0), x, r), x / 2)
    near(run(shut(semantics(fuse="sum"), 0.0), x, r), x)


@pytest.mark.parametrize("fuse", ["mean", "max"])
def test_hand_saturated_gates_leave_features_as_they_are(fuse):
    x, r = normal(2, 7, 8), normal(2, 6, 5)
    near(run(shut(semantics(fuse=fuse), 20.0), x, r), x, 1e-7)


def test_hand_scalar_case():
    """All weights 1, biases 0, R = (0, 1, 0): conv gives (1, 1, 1), eight times; the pool 1, so c = σ(64); the places'
    last convolution adds 16, 24, 16: σ of these."""
    site = Site("hand", 1, 1, Layout((3,)), context_dim=1, context_layout=Layout((3,)))
    for axes, logits in ("channels", [64.0] * 3), ("places", [16.0, 24.0, 16.0]):
        part = set_all(ClassSemantics(site, axes=axes), 1.0)
        for name, parameter in part.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        out = run(part, line(1, 1, 1), line(0, 1, 0), Layout((3,)), Layout((3,)))
        near(out, torch.tensor(logits).double().sigmoid())


def test_hand_gates_of_half_as_many_places():
    """t = (t₁, t₂) over four places: t₁, (3 t₁ + t₂) / 4, (t₁ + 3 t₂) / 4, t₂; a special token: their mean."""
    layout, context = Layout((4,), 1), Layout((2,))
    part = semantics(layout, context, axes="places")
    r, where = normal(1, 2, 5), {"layout": layout, "context_layout": context}
    here = seen(part, normal(1, 2, 8), r, tap="gate_places", layout=context, context_layout=context)[0]
    one, two = here.tolist()
    found = seen(part, normal(1, 5, 8), r, tap="gate_places", **where)
    near(found, [(one + two) / 2, one, (3 * one + two) / 4, (one + 3 * two) / 4, two])


def test_hand_parameters():
    conv, mlp, gate = 5 * 3 * 8 + 8, 8 * 8 + 8 + 8 * 8 + 8, 8 * 3 + 1
    assert count(semantics()) == 2 * conv + mlp + gate
    assert count(semantics(axes="channels")) == conv + mlp
    assert count(semantics(axes="places")) == conv + gate
    assert count(semantics(fuse="concat")) == 2 * conv + mlp + gate + 16 * 8
    assert semantics(dim=160).place_conv.bias.shape == (10,)  # 160 / 16


# Identities


@pytest.mark.parametrize("fuse", ["mean", "sum", "concat"])
def test_identity_linear_in_the_features(fuse):
    part, r = semantics(fuse=fuse), normal(2, 6, 5)
    x, y = normal(2, 2, 7, 8)
    near(run(part, 2 * x - 3 * y, r), 2 * run(part, x, r) - 3 * run(part, y, r))
    assert not run(part, torch.zeros_like(x), r).any()


def test_identity_both_gates_are_the_mean_of_each():
    both, one, two = semantics(), semantics(axes="channels"), semantics(axes="places")
    for part in one, two:
        part.load_state_dict({k: v for k, v in both.state_dict().items() if k in part.state_dict()})
    x, r = normal(2, 7, 8), normal(2, 6, 5)
    near(run(both, x, r), (run(one, x, r) + run(two, x, r)) / 2)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_identity_the_order_of_time_has_no_say_in_the_channels_with_a_kernel_of_one(pool):
    x, r, order = normal(1, 7, 8), normal(1, 6, 5), torch.tensor([3, 0, 5, 1, 4, 2])
    part = semantics(axes="channels", pool=pool, kernel=1)
    near(run(part, x, r[:, order]), run(part, x, r))
    part = semantics(axes="channels", pool=pool)
    assert (run(part, x, r[:, order]) - run(part, x, r)).abs().max() > 1e-6


def test_identity_features_as_their_own_semantics_are_squeeze_and_excitation():
    part = semantics(axes="channels", kernel=1, width=8)
    with torch.no_grad():
        part.channel_conv.weight.copy_(torch.eye(8)[..., None])
        part.channel_conv.bias.zero_()
    x = normal(2, 7, 8)
    gate = part.channel_mlp(x[:, 1:].mean(1)).sigmoid()  # arXiv:1709.01507, eq. 2 and 3
    near(run(part, x, x[:, 1:]), x * gate[:, None])


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_identity_padding_is_as_good_as_cut_off(pool):
    part, x, r, short = semantics(pool=pool), normal(2, 7, 8), normal(2, 6, 5), Layout((4,), 1)
    keys = torch.tensor([[True] * 4 + [False] * 2] * 2)
    whole = run(part, x, r, mask=Mask(keys=keys))
    near(whole[:, :5], run(part, x[:, :5], r[:, :4], short, Layout((4,))))


def test_identity_a_plane_that_is_constant_across_is_a_line_away_from_the_borders():
    """A 2-D kernel whose middle column is a 1-D kernel, and zero elsewhere."""
    plane, line_ = Layout((5, 3)), Layout((5,))
    two, one = semantics(plane, plane), semantics(line_, line_)
    state = {
        k: nn.functional.pad(v[..., None], (1, 1)) if v.ndim == 3 else v for k, v in one.state_dict().items()
    }
    two.load_state_dict(state)
    x, r = normal(1, 15, 8), normal(1, 5, 5)
    wide = r.repeat_interleave(3, dim=1)
    out = plane.to_grid(run(two, x, wide, plane, plane))
    for column in range(3):
        mine = plane.to_grid(x)[..., column].mT
        near(out[..., column].mT, run(one, mine, r, line_, line_))


def test_channels_alone_leave_the_tokens_free_to_lie_elsewhere():
    """A line of class tokens gates the channels of an image."""
    image, classes = Layout((3, 4), 1), Layout((10,))
    part = semantics(image, classes, axes="channels")
    assert run(part, normal(2, 13, 8), normal(2, 10, 5), image, classes).shape == (2, 13, 8)


# Refusals


def test_streams_of_other_dimensions_are_refused():
    image, classes = Layout((2, 3)), Layout((6,))
    with pytest.raises(LayoutMismatch, match="AZ401.*1-D"):
        run(semantics(image, classes), normal(1, 6, 8), normal(1, 6, 5), image, classes)
    with pytest.raises(LayoutMismatch, match="AZ401.*1-D"):
        run(semantics(), normal(1, 7, 8), normal(1, 6, 5), FEATURES, image)


@pytest.mark.parametrize("options", [
    {"kernel": 2}, {"axes": "channels", "fuse": "max"}, {"axes": "places", "pool": "max"},
])  # fmt: skip
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(RecipeError, match="AZ214"):
        semantics(**options)


def test_a_site_without_semantics_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*second stream"):
        ClassSemantics(Site("hand", 8, 2, FEATURES))
