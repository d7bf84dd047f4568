"""Cross-scale token attention, ACT, arXiv:2203.07682."""

import math

import pytest
import torch
from by_hand import caught, count, near, normal, seen, spread, wrong
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.functional import rearrange
from attnzoo.mechanisms.cross.cross_scale import CrossScale
from attnzoo.testing import against


def linear(layer, token):
    """W t + b."""
    return layer.weight @ token + (0 if layer.bias is None else layer.bias)


def normed(norm, token):
    """One token with mean 0 and variance 1."""
    off = token - token.mean()
    return off / ((off**2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def network(mlp, token):
    """LN, Linear, GELU, Linear."""
    hidden = linear(mlp[1], normed(mlp[0], token))
    return linear(mlp[3], hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def corners(layout):
    """Of each large token, which small ones it is made of."""
    y, x = layout.grid
    return [
        [layout.prefix + (i + di) * x + j + dj for di in (0, 1) for dj in (0, 1)]
        for i in range(y - 1)
        for j in range(x - 1)
    ]


def joined(mlp, tokens, members, there):
    """The large token that four small ones make: their first channels, their second ones, and so on."""
    held = [tokens[t] if there[t] else torch.zeros_like(tokens[t]) for t in members]
    return network(mlp, torch.stack([t[channel] for channel in range(len(held[0])) for t in held]))


def asked(part, asking, source, allowed):
    """What tokens receive: softmax attention, pre-normed, head by head; `allowed` (h n m)."""
    c, out = asking.shape[-1], []
    d = c // part.heads
    keys, values = torch.stack([linear(part.kv, normed(part.kv_norm, t)) for t in source]).split(c, 1)
    for i, token in enumerate(asking):
        q, merged = linear(part.q, normed(part.q_norm, token)), []
        for h in range(part.heads):
            mine, see = slice(h * d, (h + 1) * d), [j for j in range(len(source)) if allowed[h][i][j]]
            got = torch.zeros(d).double()
            if see:
                weights = (keys[see][:, mine] @ q[mine] / math.sqrt(d)).softmax(0)
                got = weights @ values[see][:, mine]
            merged.append(got)
        out.append(linear(part.proj, torch.cat(merged)))
    return torch.stack(out)


@against(CrossScale)
def test_oracle(component, options, x, source, layout, context_layout, allowed, keys):
    """Sample by sample: large tokens, attention, and back to small ones where large tokens ask."""
    (b, n, c), large, out = x.shape, options["large"], []
    heads, everyone = component.heads, [True] * n
    for s in range(b):
        if large == "given":
            out.append(asked(component, x[s], source[s], allowed[s].expand(heads, -1, -1)))
        elif large == "context":
            there, groups = keys[s].tolist(), corners(context_layout)
            tokens = [joined(component.enlarge, source[s], members, there) for members in groups]
            open_ = [any(there[t] for t in members) for members in groups]
            out.append(asked(component, x[s], torch.stack(tokens), [[open_] * n] * heads))
        else:
            groups = corners(layout)
            if not groups:
                out.append(torch.zeros(n, c).double())
                continue
            u = torch.stack([joined(component.enlarge, x[s], members, everyone) for members in groups])
            u = u + asked(component, u, source[s], [[keys[s].tolist()] * len(u)] * heads)
            rows = [torch.zeros(c).double() for _ in range(n)]
            for token, members in zip(u, groups, strict=True):
                pieces = network(component.shrink, token)  # channel by channel, of four places each
                for place, t in enumerate(members):
                    rows[t] = rows[t] + pieces[place::4]
            out.append(torch.stack(rows))
    return torch.stack(out)


test_oracle_of_large_contexts = against(
    CrossScale, options=lambda options: options.get("large") == "context", examples=30
)(test_oracle.oracle)


def mixing(change):
    """The mechanism with its inputs or parameters changed."""

    def mix(self, x, source, *, mask, layout, context_layout=None):
        with torch.no_grad():
            x, source, mask = change(self, x, source, mask)
        return CrossScale.mix(self, x, source, mask=mask, layout=layout, context_layout=context_layout)

    return wrong(CrossScale, mix=mix)


def scaled(self, x, source, mask):
    self.q.weight.mul_(1.5)
    if self.q.bias is not None:
        self.q.bias.mul_(1.5)
    return x, source, mask


def keys_and_values(self, x, source, mask):
    self.kv.weight.copy_(self.kv.weight.roll(x.shape[-1], 0))
    return x, source, mask


def norms_swapped(self, x, source, mask):
    if x.shape[-1] == source.shape[-1]:
        self.q_norm, self.kv_norm = self.kv_norm, self.q_norm
    return x, source, mask


def averaged(self, tokens, mask, layout):
    """Each large token shrunk so that overlaps would average."""
    u, mask = CrossScale._joined(self, tokens, mask, layout)
    return u / 4, mask


def all_or_none(self, tokens, mask, layout):
    """A neighbourhood exists when all of its tokens do."""
    u, _ = CrossScale._joined(self, tokens, mask, layout)
    if mask.keys is None:
        return u, mask
    there = layout.to_grid(mask.keys[:, layout.prefix :, None]).double()
    return u, Mask(keys=-F.max_pool2d(-there, 2, 1).flatten(1) > 0)


def padding_joins(self, tokens, mask, layout):
    """Hidden tokens are part of their neighbourhoods."""
    _, mask = CrossScale._joined(self, tokens, mask, layout)
    return CrossScale._joined(self, tokens, Mask(), layout)[0], mask


def turned(self, tokens, mask, layout):
    """Neighbourhoods with rows and columns exchanged."""
    prefix, image = layout.split(tokens)[0], layout.to_grid(layout.split(tokens)[1])
    return CrossScale._joined(self, layout.from_grid(prefix, image.flip(2)), mask, layout)


MUTANTS = {
    "a wrong scale": mixing(scaled),
    "keys for values": mixing(keys_and_values),
    "the norms swapped": mixing(norms_swapped),
    "the grid upside down": wrong(CrossScale, _joined=turned),
    "the mask ignored": mixing(lambda self, x, source, mask: (x, source, Mask())),
    "not causal": mixing(lambda self, x, source, mask: (x, source, Mask(keys=mask.keys, pairs=mask.pairs))),
    "the first sample's context for all": mixing(
        lambda self, x, source, mask: (x, source[:1].expand_as(source), mask)
    ),
}
OF_CONTEXTS = {
    "large tokens averaged": averaged,
    "a neighbourhood exists when all do": all_or_none,
    "hidden tokens in a neighbourhood": padding_joins,
}


@pytest.mark.parametrize("joined", OF_CONTEXTS.values(), ids=OF_CONTEXTS)
def test_mutants_of_large_contexts(joined):
    caught(test_oracle_of_large_contexts, wrong(CrossScale, _joined=joined))


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


SMALL, LARGE = Layout((4, 6)), Layout((2, 3))


def scale(large="given", layout=SMALL, context=LARGE, dim=8, **fields) -> CrossScale:
    """Two heads."""
    site = Site("hand", dim, 2, layout, context_dim=dim, context_layout=context, **fields)
    return spread(CrossScale(site, large=large), 0.3)


def run(part, x, source, layout=SMALL, context=LARGE, **arguments):
    """Its output."""
    return part(x, source, layout=layout, context_layout=context, **arguments)


# By hand


def test_hand_parameters():
    """4 (D/2)² + D/2 without biases in q, k and v; beside it two norms, and the MLPs D/2·4 → D/2 → D/2 and back."""
    c = 8
    attention, norms = 4 * c * c + c, 4 * c
    joins = 8 * c + 4 * c * c + c + c * c + c
    back = 2 * c + c * c + c + 4 * c * c + 4 * c
    assert count(scale(qkv_bias=False)) == attention + norms
    assert count(scale("context", qkv_bias=False)) == attention + norms + joins
    assert count(scale("tokens", qkv_bias=False)) == attention + norms + joins + back


def test_hand_overlaps_add():
    """A token belongs to one, two or four neighbourhoods: in a corner, at an edge, inside."""
    part = scale("tokens", Layout((4, 4), 1))
    with torch.no_grad():
        part.shrink[3].weight.zero_()
        part.shrink[3].bias.fill_(1.0)  # every large token hands out ones
    out = run(part, normal(1, 17, 8), normal(1, 6, 8), Layout((4, 4), 1))
    near(out[0, :, 0], [0, 1, 2, 2, 1, 2, 4, 4, 2, 2, 4, 4, 2, 1, 2, 2, 1])


def test_hand_projections_of_zero_give_nothing():
    part = scale()
    nn.init.zeros_(part.proj.weight)
    nn.init.zeros_(part.proj.bias)
    assert not run(part, normal(2, 24, 8), normal(2, 6, 8)).any()


def test_hand_one_large_token_gives_a_constant():
    """A context of 2 × 2 tokens is one large token: everybody receives its value."""
    part, one = scale("context"), Layout((2, 2))
    x, source = normal(2, 24, 8), normal(2, 4, 8)
    token = part.enlarge(source.mT.flatten(1))[:, None]
    value = part.proj(part.kv(part.kv_norm(token))[..., 8:])
    near(run(part, x, source, context=one), value.expand(-1, 24, -1))


def test_hand_number_of_large_tokens():
    """n' = (H/t − 1) (W/t − 1)."""
    for large, shape in ("context", (1, 2, 24, 2)), ("tokens", (1, 2, 15, 6)):
        part = scale(large)
        assert (
            seen(part, normal(1, 24, 8), normal(1, 6, 8), layout=SMALL, context_layout=LARGE).shape == shape
        )


# Identities


def test_identity_large_tokens_are_patches_of_twice_the_size():
    """Tokens that are patches of t × t pixels, folded to their map, unfold to patches of 2t, t apart: with t = 3."""
    t, grid = 3, Layout((4, 5))
    picture = normal(1, 2, 12, 15)
    small = F.unfold(picture, t, stride=t)  # (b 2·9 n)
    assert torch.equal(F.fold(small, (12, 15), t, stride=t), picture)
    patches = F.unfold(picture, 2 * t, stride=t).mT  # (b n' 2·36)
    mine = F.unfold(grid.to_grid(small.mT), 2).mT
    order = rearrange(torch.arange(72), "(c i y j x) -> (c y x i j)", c=2, i=2, y=3, j=2)
    assert torch.equal(mine, patches[..., order])


def test_identity_folding_what_was_unfolded_is_multiplicity_times_the_map():
    image = normal(1, 3, 4, 6)
    times = torch.ones(4, 6).double()
    times[1:-1] *= 2
    times[:, 1:-1] *= 2
    near(F.fold(F.unfold(image, 2), (4, 6), 2), image * times)


def test_identity_the_paper_is_two_of_them_on_halves_of_the_channels():
    """x_a' = x_a + a(x_a, J(x_b)) and x_b' = fold(MLP(J + a(J, x_a))): both from what was there before."""
    grid = Layout((3, 4))
    one, two = scale("context", grid, grid), scale("tokens", grid, grid)
    two.enlarge.load_state_dict(one.enlarge.state_dict())
    a, b = normal(1, 12, 16).chunk(2, -1)
    large = one.enlarge(F.unfold(grid.to_grid(b), 2).mT)
    plain = Layout((2, 3))
    small = scale("given", grid, plain)
    small.load_state_dict(one.state_dict(), strict=False)
    near(run(one, a, b, grid, grid), run(small, a, large, grid, plain))
    big = scale("given", plain, grid)
    big.load_state_dict(two.state_dict(), strict=False)
    back = two.shrink(large + run(big, large, a, plain, grid))
    near(run(two, b, a, grid, grid), F.fold(back.mT, (3, 4), 2).flatten(2).mT)


def test_identity_torchs_attention_of_normed_streams():
    part = scale()
    x, source = normal(2, 24, 8), normal(2, 6, 8)
    mha = nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.cat([part.q.weight, part.kv.weight]))
        mha.in_proj_bias.copy_(torch.cat([part.q.bias, part.kv.bias]))
    mha.out_proj.load_state_dict(part.proj.state_dict())
    near(run(part, x, source), mha(part.q_norm(x), part.kv_norm(source), part.kv_norm(source))[0])


def test_a_neighbourhood_nobody_of_which_exists_is_not_read():
    part, grid = scale("context", context=Layout((2, 4), 1)), Layout((2, 4), 1)
    x, source = normal(1, 24, 8), normal(1, 9, 8)
    keys = torch.tensor([[True, True, True, False, False, True, True, False, False]])
    out = run(part, x, source, context=grid, mask=Mask(keys=keys))
    source[:, [0, 3, 4, 7, 8]] += 5.0  # the special token, and the right half
    assert torch.equal(run(part, x, source, context=grid, mask=Mask(keys=keys)), out)
    weights = seen(part, x, source, layout=SMALL, context_layout=grid, mask=Mask(keys=keys))
    assert not weights[..., 2].any() and weights[..., :2].all()


def test_special_tokens_that_lie_in_no_neighbourhood_receive_nothing():
    grid = Layout((4, 6), 2)
    out = run(scale("tokens"), normal(1, 26, 8), normal(1, 6, 8), grid)
    assert not out[:, :2].any() and out[:, 2:].all()


# Refusals


def test_grids_without_neighbourhoods_are_refused():
    with pytest.raises(LayoutMismatch, match="AZ401.*no 2 × 2"):
        run(scale("context"), normal(1, 24, 8), normal(1, 3, 8), SMALL, Layout((1, 3)))
    assert not run(scale("tokens"), normal(1, 6, 8), normal(1, 6, 8), Layout((6, 1))).any()
    for large, layout, context in ("tokens", (1, 4), (2, 2)), ("context", (4, 4), (2, 2)):
        with pytest.raises(RecipeError, match="AZ214.*too few"):
            scale(large, Layout(layout), Layout(context))


def test_a_site_without_a_second_stream_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*no second stream"):
        CrossScale(Site("hand", 8, 2, SMALL))
