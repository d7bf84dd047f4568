"""A bidirectional LSTM in each head, arXiv:2505.21535."""

import math

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, patched, place, set_all, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask
from attnzoo.mechanisms.recurrent import bilstm
from attnzoo.mechanisms.recurrent.bilstm import BiLSTM
from attnzoo.testing import against


def lstm(cell, x, h, c):
    """One step: PyTorch keeps the rows of the gates i, f, g, o below each other."""
    rows = cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ h + cell.bias_hh
    i, f, g, o = rows.chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(cell, x, h, c):
    """One step: r, z, g; r weighs what the state says before the tanh, with its bias."""
    (xr, xz, xg), (hr, hz, hg) = (
        (cell.weight_ih @ x + cell.bias_ih).chunk(3),
        (cell.weight_hh @ h + cell.bias_hh).chunk(3),
    )
    z, g = torch.sigmoid(xz + hz), torch.tanh(xg + torch.sigmoid(xr + hr) * hg)
    return z * h + (1 - z) * g, c


def walked(cell, step, tokens, there):
    """What one head carries to each token that exists, in the order they are given, (n d)."""
    h = c = torch.zeros_like(tokens[0])
    out = []
    for x, exists in zip(tokens, there.tolist(), strict=True):
        if exists:
            h, c = step(cell, x, h, c)
        out.append(h if exists else torch.zeros_like(h))
    return torch.stack(out)


@against(BiLSTM, examples=24)
def test_oracle(component, options, x, keys):
    """Sample by sample, head by head, token by token, there and back."""
    out, step = [], {"lstm": lstm, "gru": gru}[options["cell"]]
    for sample, there in zip(x, keys, strict=True):
        heads = (sample @ component.pre.weight.T + component.pre.bias).chunk(component.heads, dim=-1)
        ahead = [walked(cell, step, t, there) for cell, t in zip(component.onwards, heads, strict=True)]
        back = [
            walked(cell, step, t.flip(0), there.flip(0)).flip(0)
            for cell, t in zip(component.backwards, heads, strict=True)
        ]
        if options["variant"] == "post":
            out.append(torch.cat(ahead + back, dim=-1) @ component.post.weight.T + component.post.bias)
        else:
            joined = [
                torch.cat(both, dim=-1) @ one.weight.T + one.bias
                for one, *both in zip(component.head_proj, ahead, back, strict=True)
            ]
            out.append(torch.cat(joined, dim=-1) @ component.proj.weight.T + component.proj.bias)
    return torch.stack(out)


# Wrong versions


def carrying(change):
    """The mechanism that carries otherwise along the tokens."""
    true = bilstm.carried
    return patched(BiLSTM, "carried", lambda cells, x, there: change(true, cells, x, there))


def only_left_aligned(true, cells, x, there):
    """As if padding always stood at the end."""
    heads = true(cells, x, None)
    return heads if there is None else heads.masked_fill(~there[:, :, None, None], 0.0)


def not_put_back(true, cells, x, there):
    if there is None:
        return true(cells, x, None)
    order = (~there).byte().argsort(dim=1, stable=True)[:, :, None, None].expand_as(x)
    return true(cells, x.gather(1, order), None).masked_fill(~there[:, :, None, None], 0.0)


MUTANTS = {
    "padding is read": carrying(only_left_aligned),
    "padding as zeros": carrying(
        lambda true, cells, x, there: only_left_aligned(
            true, cells, x if there is None else x * there[:, :, None, None], there
        )
    ),
    "gathered and not put back": carrying(not_put_back),
    "padding gives something": carrying(
        lambda true, cells, x, there: (
            true(cells, x, there) + (0 if there is None else ~there[:, :, None, None])
        )
    ),
    "back as onwards": carrying(lambda true, cells, x, there: true(cells, x.flip(1), there).flip(1)),
    "heads in another order": carrying(lambda true, cells, x, there: true(cells, x.flip(2), there)),
    "one cell for all heads": carrying(lambda true, cells, x, there: true([cells[0]] * len(cells), x, there)),
    "a token late": carrying(lambda true, cells, x, there: true(cells, x, there).roll(1, 1)),
    "nothing carried": carrying(
        lambda true, cells, x, there: true(cells, x.flatten(0, 1)[:, None], None).view_as(x)
    ),
    "the way back stays turned": wrong(
        BiLSTM,
        mix=lambda self, x, source, *, mask, layout: BiLSTM.mix(self, x, x, mask=mask, layout=layout).flip(1),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand

WHERE = {"layout": Layout((2,))}


def test_hand_an_lstm_that_halves():
    """No weights but a bias of 1 for g: c₁ = tanh(1)/2, c₂ = 3/2 c₁, h = tanh(c)/2; W_post adds both ways."""
    part = set_all(BiLSTM(place(1)), 0.0)
    for cell in (*part.onwards, *part.backwards):
        cell.bias_ih.data[2] = 1.0
    part.post.weight.data.fill_(1.0)
    first, second = (math.tanh(share * math.tanh(1.0)) / 2 for share in (0.5, 0.75))
    near(part(line(5.0, -7.0), **WHERE), [first + second, second + first])


def test_hand_a_gru_that_halves():
    """No weights but a bias of 1 for g: h₁ = tanh(1)/2, h₂ = h₁/2 + tanh(1)/2; only the way back is asked for."""
    part = set_all(BiLSTM(place(1), cell="gru"), 0.0)
    part.backwards[0].bias_ih.data[2] = 1.0
    part.post.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
    near(part(line(5.0, -7.0), **WHERE), [0.75 * math.tanh(1.0), 0.5 * math.tanh(1.0)])


@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3)])
def test_hand_parameters(cell, gates):
    """12 channels, 3 heads: W_pre 156; two cells in each head, each gate with two 4 × 4 and two biases of 4."""
    cells = 2 * 3 * gates * (2 * 16 + 2 * 4)
    assert count(BiLSTM(place(12, 3), cell=cell)) == 156 + cells + 24 * 12 + 12
    assert count(BiLSTM(place(12, 3), cell=cell, variant="head_proj")) == 156 + cells + 3 * (8 * 4 + 4) + 156


# Identities


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_identity_one_cell_of_all_channels_without_weights_between_heads(cell):
    """What the authors train, at the start: one bidirectional LSTM, its weights times a mask of blocks."""
    part, x, d = spread(BiLSTM(place(12, 3), cell=cell)), normal(2, 7, 12), 4
    whole = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](12, 12, batch_first=True, bidirectional=True).double()
    gates = 4 if cell == "lstm" else 3
    for suffix, cells in (("", part.onwards), ("_reverse", part.backwards)):
        for kind in ("ih", "hh"):
            weight = torch.zeros(gates, 12, 12).double()
            bias = torch.zeros(gates, 12).double()
            for i, one in enumerate(cells):
                at = slice(i * d, (i + 1) * d)
                weight[:, at, at] = getattr(one, f"weight_{kind}").detach().view(gates, d, d)
                bias[:, at] = getattr(one, f"bias_{kind}").detach().view(gates, d)
            getattr(whole, f"weight_{kind}_l0{suffix}").data.copy_(weight.flatten(0, 1))
            getattr(whole, f"bias_{kind}_l0{suffix}").data.copy_(bias.flatten())
    near(part(x, layout=Layout((7,))), part.post(whole(part.pre(x))[0]), 1e-10)


def test_identity_a_map_of_blocks_is_a_map_of_all():
    """`head_proj`, then `proj`, is a `post` of their product."""
    part, x = spread(BiLSTM(place(12, 3), variant="head_proj")), normal(2, 7, 12)
    other = spread(BiLSTM(place(12, 3)))
    for name in ("pre", "onwards", "backwards"):
        getattr(other, name).load_state_dict(getattr(part, name).state_dict())
    halves = [
        torch.block_diag(*(one.weight[:, at] for one in part.head_proj)) for at in (slice(0, 4), slice(4, 8))
    ]
    bias = torch.cat([one.bias for one in part.head_proj])
    other.post.weight.data = part.proj.weight @ torch.cat(halves, dim=1)
    other.post.bias.data = part.proj.weight @ bias + part.proj.bias
    near(part(x, layout=Layout((7,))), other(x, layout=Layout((7,))), 1e-10)


def test_identity_padding_is_a_shorter_input_wherever_it_stands():
    x, there = normal(1, 20, 12), torch.rand(1, 20) < 0.6
    for options in ({}, {"cell": "gru"}, {"variant": "head_proj"}):
        part = spread(BiLSTM(place(12, 3, 20), **options))
        out = part(x, mask=Mask(keys=there), layout=Layout((20,)))
        fewer = x[:, there[0]]
        near(out[:, there[0]], part(fewer, layout=Layout((fewer.shape[1],))), 1e-12)
        changed = torch.where(there[..., None], x, 1e6 * torch.ones_like(x))
        assert torch.equal(out, part(changed, mask=Mask(keys=there), layout=Layout((20,))))


def test_identity_both_ways_change_places_when_tokens_are_turned():
    part, x = spread(BiLSTM(place(12, 3))), normal(2, 7, 12)
    turned = part(x.flip(1), layout=Layout((7,))).flip(1)
    part.onwards, part.backwards = part.backwards, part.onwards
    part.post.weight.data = part.post.weight.roll(12, 1)
    near(turned, part(x, layout=Layout((7,))))


def test_identity_every_token_hears_of_every_other():
    part, x = spread(BiLSTM(place(4, 2))), normal(1, 6, 4).requires_grad_()
    out = part(x, layout=Layout((6,)))
    for i in range(6):
        (grad,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
        assert (grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("options", [{}, {"cell": "gru", "variant": "head_proj"}])
def test_narrow_numbers_stay_near(options):
    narrow(BiLSTM, [(2, 7, 12)], site=place(12, 3, 7), **options)
