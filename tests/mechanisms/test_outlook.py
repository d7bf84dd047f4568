"""Outlook attention, arXiv:2106.13112, §3.1."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, patched, seen, set_all, spread, wrong
from timm.models.volo import OutlookAttention

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.local import outlook as module
from attnzoo.mechanisms.local.outlook import Outlook
from attnzoo.testing import against


def linear(layer, x):
    """x Wᵀ + b."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


@against(Outlook, examples=8)
def test_oracle(component, options, x, layout, keys, mask):
    """Window by window, place by place: what its own token says of the places that exist."""
    (b, _, c), p, (rows, columns) = x.shape, layout.prefix, layout.grid
    heads, layers = component.heads, component.layers
    side, step, d = options["window"], options["stride"], c // heads
    v, received = linear(layers.v, x), []
    out = [[torch.zeros(c).double() for _ in sample] for sample in x]
    offsets = list(itertools.product(range(-((side - 1) // 2), side // 2 + 1), repeat=2))
    for s, y, x_ in itertools.product(range(b), range(0, rows, step), range(0, columns, step)):
        own = [
            p + i * columns + j
            for i in range(y, min(y + step, rows))
            for j in range(x_, min(x_ + step, columns))
            if keys[s, p + i * columns + j]
        ]
        if not own:
            continue
        logits = linear(layers.attn, x[s, own].mean(0)).reshape(heads, side**2, side**2) / math.sqrt(d)
        at = [
            p + (y + i) * columns + x_ + j if 0 <= y + i < rows and 0 <= x_ + j < columns else None
            for i, j in offsets
        ]
        for a, i in enumerate(at):
            if i is None or (mask.causal and own[0] > i):
                continue
            see = [
                e
                for e, j in enumerate(at)
                if (j is None and options["padding"] == "zeros")
                or (j is not None and keys[s, j] and not (mask.causal and j > i))
            ]
            if not see:
                continue
            weights, tokens = (
                logits[:, a, see].softmax(-1),
                [e for e, _ in enumerate(see) if at[see[e]] is not None],
            )
            values = v[s, [at[see[e]] for e in tokens]].reshape(-1, heads, d)
            received.append((s, i, torch.einsum("he,ehd->hd", weights[:, tokens], values).flatten()))
    for s, i, value in received:
        out[s][i] = out[s][i] + value
    out = torch.stack([torch.stack(rows_) for rows_ in out])
    return linear(layers.proj, torch.cat([v[:, :p], out[:, p:]], 1))


test_oracle_of_single_steps = against(
    Outlook,
    examples=8,
    options=lambda options: options.get("stride", 1) == 1 and options.get("window", 3) > 1,
)(test_oracle.oracle)


test_oracle_of_means = against(Outlook, examples=10, options=lambda options: options.get("stride") == 2)(
    test_oracle.oracle
)


def masked(change):
    """Outlook attention under another mask."""

    def mix(self, x, source, *, mask, layout):
        return Outlook.mix(self, x, source, mask=change(mask), layout=layout)

    return wrong(Outlook, mix=mix)


def before(change):
    """Outlook attention that is changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return Outlook.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Outlook, mix=mix)


def transposed(self):
    for name, size in (
        ("weight", (-1, self.window**2, self.window**2, self.layers.attn.in_features)),
        ("bias", (-1, self.window**2, self.window**2)),
    ):
        t = getattr(self.layers.attn, name)
        t.copy_(t.reshape(size).transpose(1, 2).reshape(t.shape).clone())


def own_windows_stay(x, layout, mask, side, stride, hidden):
    """Windows of tokens that do not exist are used."""
    allowed = VISIBLE(x, layout, Mask(), side, stride, hidden)
    at = module.at_places(x, layout.grid, side, stride)
    if mask.keys is None:
        return VISIBLE(x, layout, mask, side, stride, hidden)
    there = mask.keys[:, layout.prefix :][:, (at - 1).clamp(min=0)] | (at == 0)
    return there[:, None, :, None] if allowed is None else allowed & there[:, None, :, None]


VISIBLE, CENTRES = module.visible, module.centres
MUTANTS = {
    "no scale": before(lambda self: setattr(self.layers, "scale", 1.0)),
    "places asked for and read swapped": before(transposed),
    "the mask ignored": masked(lambda mask: Mask()),
    "not causal": masked(lambda mask: replace(mask, causal=False)),
    "the mask inverted": masked(lambda mask: replace(mask, keys=None if mask.keys is None else ~mask.keys)),
    "windows of padding": patched(Outlook, "visible", own_windows_stay),
    "the border the other way": before(lambda self: setattr(self, "hidden", not self.hidden)),
    "padding in the means": patched(
        Outlook, "centres", lambda tokens, there, *more: CENTRES(tokens, None, *more)
    ),
    "columns first": wrong(
        Outlook,
        mix=lambda self, x, source, *, mask, layout: Outlook.mix(
            self, x, source, mask=mask, layout=Layout(layout.grid[::-1], layout.prefix)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    caught(test_oracle_of_means if "means" in name else test_oracle_of_single_steps, MUTANTS[name])


def outlook(layout, dim=8, heads=2, **options) -> Outlook:
    """In float64, with parameters of a size that matters."""
    return spread(Outlook(Site("hand", dim, heads, layout), **options), 0.5)


# By hand


@pytest.mark.parametrize(
    "padding,wanted",
    # windows -1-0-1, 0-1-2, 1-2-3: means 1.5 2 2.5, or thirds 1 2 5/3 of a row; zeros add rows above and below
    [("hidden", [1.5 + 2, 1.5 + 2 + 2.5, 2 + 2.5]), ("zeros", [1, 2, 5 / 3])],
)
def test_hand_equal_weights_in_a_row_of_three(padding, wanted):
    """W_a = 0, v = x: each window gives its mean to all its places, and where windows overlap they add."""
    layout, part = Layout((1, 3)), set_all(Outlook(Site("hand", 1, 1, Layout((1, 3))), padding=padding), 0.0)
    with torch.no_grad():
        part.layers.v.weight.fill_(1.0), part.layers.proj.weight.fill_(1.0)
    if padding == "zeros":  # of nine places six are beyond the border
        wanted = [(3 + 6) / 9, (3 + 6 + 5) / 9, (6 + 5) / 9]
    near(part(line(1, 2, 3), layout=layout), wanted)


def test_hand_parameters():
    """W_v, W_a (K⁴ h from c, with a bias), W_o."""
    part = Outlook(Site("hand", 16, 2, Layout((4, 4)), qkv_bias=False))
    assert count(part) == 16 * 16 + (16 * 81 * 2 + 81 * 2) + 16 * 16 + 16
    assert count(part) == count(OutlookAttention(16, 2))


def test_hand_windows_of_one_give_each_its_value():
    layout, x = Layout((3, 4), 1), normal(2, 13, 8)
    part = outlook(layout, window=1)
    near(part(x, layout=layout), part.layers.proj(part.layers.v(x)))


@pytest.mark.parametrize("window,stride", [(3, 3), (2, 3), (1, 2), (4, 4)])
def test_strides_that_leave_tokens_out_are_refused(window, stride):
    with pytest.raises(RecipeError, match="AZ214.*some tokens lie in no window"):
        Outlook(Site("hand", 2, 1, Layout((4, 4))), window=window, stride=stride)


@pytest.mark.parametrize("window", [2, 3])
def test_hand_what_a_token_reads(window):
    """Five rows around the middle of seven for K = 3: windows that hold it reach K - 1 away."""
    layout, x = Layout((7, 7)), normal(1, 49, 8).requires_grad_()
    part = outlook(layout, window=window)
    part(x, layout=layout)[:, 24].sum().backward()
    felt = x.grad.abs().sum((0, 2)).reshape(7, 7).sum(1) > 0
    assert felt.nonzero().flatten().tolist() == list(range(3 - part.reach(), 4 + part.reach()))


# Identities


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (3, 2)])
@pytest.mark.parametrize("window,stride", [(3, 1), (3, 2), (5, 2), (5, 3)])
def test_identity_timms(grid, window, stride):
    layout, x = Layout(grid), normal(2, math.prod(grid), 8)
    part = outlook(layout, window=window, stride=stride, padding="zeros")
    timms = OutlookAttention(8, 2, window, window // 2, stride, qkv_bias=True).double().eval()
    timms.load_state_dict(part.layers.state_dict())
    near(part(x, layout=layout).unflatten(1, grid), timms(x.unflatten(1, grid)))


def test_identity_a_map_of_constants_counts_its_windows():
    """Hidden borders: all weights of a window sum to one, so a constant value comes out once for each window."""
    layout, part = Layout((4, 5)), outlook(Layout((4, 5)))
    with torch.no_grad():
        part.layers.v.weight.zero_()
    per_side = [torch.tensor([2.0, *[3.0] * (side - 2), 2.0]).double() for side in (4, 5)]
    number = torch.outer(*per_side).flatten()[:, None]
    near(
        part(normal(2, 20, 8), layout=layout), part.layers.proj(number * part.layers.v.bias).expand(2, 20, 8)
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_identity_what_does_not_exist_is_as_the_border(stride):
    small, large, x = Layout((3, 5)), Layout((4, 6)), normal(2, 4, 6, 8)
    part, keys = outlook(small, stride=stride), torch.zeros(4, 6, dtype=torch.bool)
    keys[:3, :5] = True
    whole = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten().expand(2, -1)), layout=large)
    near(part(x[:, :3, :5].flatten(1, 2), layout=small), whole.unflatten(1, (4, 6))[:, :3, :5].flatten(1, 2))


def test_identity_a_shift_shifts_what_the_border_is_far_from():
    layout, x = Layout((7, 8)), normal(1, 7, 8, 8)
    part = outlook(layout)
    one, two = (
        part(t.flatten(1, 2), layout=layout).unflatten(1, (7, 8)) for t in (x, x.roll((1, 1), (1, 2)))
    )
    near(two[:, 3:5, 3:6], one[:, 2:4, 2:5])


def test_taps_show_the_places_on_the_grid():
    layout, x = Layout((2, 3), 1), normal(1, 7, 8)
    weights = seen(outlook(layout), x, layout=layout)
    assert weights.shape == (1, 2, 4 * 4 + 2 * 6, 9)  # corners have four places on the grid, the others six
    near(weights.sum(-1), torch.ones(1, 2, 28))


def test_narrow_numbers_stay_near():
    narrow(Outlook, [(2, 13, 12)], site=Site("hand", 12, 3, Layout((3, 4), 1)))
