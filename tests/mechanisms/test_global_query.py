"""Global query attention of GC-ViT, arXiv:2206.09959: timm's layers, with taps and special tokens."""

import math

import pytest
import torch
from by_hand import caught, count, near, normal, seen, spread, wrong
from timm.models.gcvit import FeatureBlock, GlobalContextVitBlock, WindowAttentionGlobal
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Layout, Site
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.functional import unwindows, windows
from attnzoo.mechanisms.cross.global_query import GlobalQuery
from attnzoo.testing import against


def gelu(y):
    return y * (1 + torch.erf(y / math.sqrt(2))) / 2


def convolved(weight, image):
    """A 3 × 3 convolution by channel of an image (i j c), place by place."""
    rows, columns, out = *image.shape[:2], []
    for i in range(rows):
        for j in range(columns):
            near_ = [
                (y, z)
                for y in (i - 1, i, i + 1)
                for z in (j - 1, j, j + 1)
                if 0 <= y < rows and 0 <= z < columns
            ]
            out.append(sum(weight[:, 0, y - i + 1, z - j + 1] * image[y, z] for y, z in near_))
    return torch.stack(out).reshape(image.shape)


def pooled(image):
    """The largest around every second place."""
    rows, columns = image.shape[:2]
    return torch.stack([
        torch.stack([
            image[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].flatten(0, 1).amax(0) for j in range(0, columns, 2)
        ])
        for i in range(0, rows, 2)
    ])  # fmt: skip


@against(GlobalQuery, examples=14)
def test_oracle(component, options, x, source, layout, context_layout):
    """F of the context, place by place; then window by window: token (i, j) of the map asks the tokens of the window."""
    (b, _, c), (rows, columns), heads, p = x.shape, layout.grid, component.heads, layout.prefix
    d, attn, out = c // heads, component.attn, []
    for s in range(b):
        image = source[s, context_layout.prefix :].reshape(*context_layout.grid, c)
        for name, part in component.features.blocks.named_children():
            if name.startswith("pool"):
                image = pooled(image)
                continue
            hidden = gelu(convolved(part.conv_dw.weight, image))
            squeezed = part.se.fc1.weight[:, :, 0, 0] @ hidden.flatten(0, 1).mean(0)
            gate = torch.sigmoid(part.se.fc2.weight[:, :, 0, 0] @ gelu(squeezed))
            image = image + (hidden * gate) @ part.conv_pw.weight[:, :, 0, 0].T
        high, wide = image.shape[:2]
        inside = [(i, j) for i in range(high) for j in range(wide)]
        tokens = [torch.zeros(c).double()] * p + [None] * (rows * columns)
        table = attn.rel_pos.relative_position_bias_table
        for top in range(0, rows, high):
            for left in range(0, columns, wide):
                where = [p + (top + i) * columns + left + j for i, j in inside]
                kv = x[s][where] @ attn.qkv.weight.T + (0 if attn.qkv.bias is None else attn.qkv.bias)
                for (i, j), at in zip(inside, where, strict=True):
                    merged = []
                    for h in range(heads):
                        mine = slice(h * d, (h + 1) * d)
                        scores = kv[:, :c][:, mine] @ image[i, j, mine] / math.sqrt(d)
                        ways = [(i - y + high - 1) * (2 * wide - 1) + j - z + wide - 1 for y, z in inside]
                        merged.append((scores + table[ways, h]).softmax(0) @ kv[:, c:][:, mine])
                    tokens[at] = F.linear(torch.cat(merged), attn.proj.weight, attn.proj.bias)
        out.append(torch.stack(tokens))
    return torch.stack(out)


def asked(
    self, x, source, layout, context, features=True, scale=None, bias=True, over=-1, turned=False, swap=False, mixed=False,
    own=False, prefix=False, proj=True, flip=False,
):  # fmt: skip
    """The equations with a fault."""
    image = context.to_grid(source[:, context.prefix :])
    image = self.features(image) if features else F.interpolate(image, self.window)
    q = (image.mT if turned else image).flatten(2).mT
    q = q.roll(1, 0) if mixed else q
    q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)[:, None]
    tokens = windows(x[:, layout.prefix :], layout.grid, self.window)
    k, v = self.attn.qkv(tokens).unflatten(3, (2, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
    k, v = (v, k) if swap else (k, v)
    q = k if own else q
    table = self.attn.rel_pos.get_bias()
    scores = q @ k.mT * (self.attn.scale if scale is None else scale) + (table.mT if flip else table) * bias
    out = (scores.softmax(over) @ v).transpose(2, 3).flatten(3)
    out = unwindows(self.attn.proj(out) if proj else out, layout.grid, self.window)
    return torch.cat([x[:, : layout.prefix] * prefix, out], 1)


def with_fault(**fault):
    """The mechanism with one fault."""

    def mix(self, x, source, *, mask, layout, context_layout=None):
        # refuses what it refuses
        GlobalQuery.mix(self, x, source, mask=mask, layout=layout, context_layout=context_layout)
        return asked(self, x, source, layout, context_layout, **fault)

    return wrong(GlobalQuery, mix=mix)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=6).ok


MUTANTS = {
    "the context as it comes": with_fault(features=False),
    "no scale": with_fault(scale=1.0),
    "no bias": with_fault(bias=False),
    "the ways turned round": with_fault(flip=True),
    "softmax over the queries": with_fault(over=-2),
    "softmax over the windows": with_fault(over=1),
    "softmax over the batch": with_fault(over=0),
    "keys and values swapped": with_fault(swap=True),
    "queries of the window itself": with_fault(own=True),
    "queries of another sample": with_fault(mixed=True),
    "special tokens are kept": with_fault(prefix=True),
    "no projection": with_fault(proj=False),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((4, 6), 1)


def at(context=(4, 6), dim=8, layout=LAYOUT, **wishes) -> Site:
    """A site with a second stream."""
    return Site("hand", dim, 2, layout, context_dim=dim, context_layout=Layout(context), **wishes)


def query(context=(4, 6), layout=LAYOUT, **options) -> GlobalQuery:
    """In float64, with weights of a size that matters."""
    return spread(GlobalQuery(at(context, layout=layout), **options), 0.5)


def run(part, x, source, layout=LAYOUT, context=(4, 6)):
    return part(x, source, layout=layout, context_layout=Layout(context))


# By hand


def test_hand_without_convolutions_the_context_asks_as_it_comes():
    """F is x + (...), whose last convolution is zero here; queries of ln 3 for keys of 0 and 1 give 1/4 and 3/4."""
    site = Site("hand", 1, 1, Layout((1, 2)), context_dim=1, context_layout=Layout((1, 2)))
    part = GlobalQuery(site).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
        part.attn.qkv.weight.fill_(1), part.attn.proj.weight.fill_(1)
    x, source = (
        torch.tensor([[[0.0], [1.0]]]).double(),
        torch.full((1, 2, 1), math.log(3), dtype=torch.float64),
    )
    near(run(part, x, source, Layout((1, 2)), (1, 2)), [[[0.75], [0.75]]])
    near(run(part, x, -source, Layout((1, 2)), (1, 2)), [[[0.25], [0.25]]])


@pytest.mark.parametrize("levels,window", [(0, (4, 6)), (1, (2, 3)), (2, (1, 2))])
def test_hand_parameters(levels, window):
    """kv and a projection, a table of (2 i - 1)(2 j - 1) ways by head; F has 9 c + 2 · 8 c + c² for each convolution."""
    c, (i, j) = 8, window
    part = GlobalQuery(at(), levels=levels)
    assert part.window == window
    wanted = 2 * c * (c + 1) + c * (c + 1) + 2 * (2 * i - 1) * (2 * j - 1)
    assert count(part) == wanted + max(1, levels) * (9 * c + 16 * c + c * c)
    assert count(GlobalQuery(at(qkv_bias=False, proj_bias=False), levels=levels)) == count(part) - 3 * c


# Identities


@pytest.mark.parametrize("levels,window", [(0, (4, 6)), (1, (2, 3))])
def test_identity_timms_block(levels, window):
    """timm's block without norms and MLP, less the tokens that it adds."""
    part = query(levels=levels, layout=Layout((4, 6)))
    theirs = GlobalContextVitBlock(8, (4, 6), 2, window_size=window).double().eval()
    theirs.norm1 = nn.Identity()
    theirs.attn.load_state_dict(part.attn.state_dict())
    features = FeatureBlock(8, levels=levels).double().eval()
    features.load_state_dict(part.features.state_dict())
    x, source = normal(3, 24, 8), normal(3, 24, 8)
    q = features(source.mT.unflatten(2, (4, 6))).flatten(2).mT
    wanted = theirs._window_attn(x.unflatten(1, (4, 6)), q).flatten(1, 2)
    near(run(part, x, source, Layout((4, 6))), wanted)


def test_identity_samples_do_not_mix():
    """The fault of an older timm: with several windows, those of one picture were asked by another's query."""
    part, x, source = query(levels=1), normal(3, 25, 8), normal(3, 24, 8)
    out = run(part, x, source)
    for s in range(3):
        near(out[s : s + 1], run(part, x[s : s + 1], source[s : s + 1]))


def test_identity_one_window_is_timms_attention():
    part, x, source = query(layout=Layout((4, 6))), normal(2, 24, 8), normal(2, 24, 8)
    theirs = WindowAttentionGlobal(8, 2, (4, 6)).double()
    theirs.load_state_dict(part.attn.state_dict())
    q = part.features(source.mT.unflatten(2, (4, 6))).flatten(2).mT
    near(run(part, x, source, Layout((4, 6))), theirs(x, q))


def test_identity_windows_do_not_see_each_other():
    part, x, source = query(levels=1), normal(1, 25, 8), normal(1, 24, 8)
    other = x.clone()
    other[:, 1] += 1  # place (0, 0)
    moved = (run(part, x, source) - run(part, other, source))[0, 1:].abs().amax(-1).reshape(4, 6) > 0
    wanted = torch.zeros(4, 6, dtype=torch.bool)
    wanted[:2, :3] = True
    assert torch.equal(moved, wanted)


def test_identity_equal_windows_receive_the_same():
    part, source = query(levels=1), normal(1, 24, 8)
    x = torch.cat([normal(1, 1, 8), normal(1, 2, 3, 8).repeat(1, 2, 2, 1).flatten(1, 2)], 1)
    out = run(part, x, source)[:, 1:].unflatten(1, (4, 6))
    near(out, out[:, :2, :3].repeat(1, 2, 2, 1))


def test_special_tokens_give_and_receive_nothing():
    part, x, source = query(levels=1), normal(2, 25, 8), normal(2, 24, 8)
    out = run(part, x, source)
    assert not out[:, 0].any()
    x[:, 0] += 1
    near(run(part, x, source), out)


def test_the_map_is_stochastic_in_each_window():
    weights = seen(
        query(levels=1), normal(2, 25, 8), normal(2, 24, 8), layout=LAYOUT, context_layout=Layout((4, 6))
    )
    assert weights.shape == (2, 4, 2, 6, 6)
    near(weights.sum(-1), torch.ones(2, 4, 2, 6))


# Refusals


@pytest.mark.parametrize("levels,says", [(3, "windows of 1 × 1"), (40, "windows of 1 × 1")])
def test_windows_that_are_left_must_tile(levels, says):
    with pytest.raises(RecipeError, match=f"AZ214.*{says}"):
        GlobalQuery(at(), levels=levels)
    with pytest.raises(RecipeError, match="AZ214.*windows of 2 × 2 for a grid of \\(5, 5\\)"):
        GlobalQuery(at((4, 4), layout=Layout((5, 5))), levels=1)


def test_a_site_without_a_fitting_context_is_refused():
    for fields in ({}, {"context_dim": 8}, {"context_dim": 7, "context_layout": Layout((2, 2))}):
        with pytest.raises(RecipeError, match="AZ214.*needs a context on a grid, of 8 channels"):
            GlobalQuery(Site("hand", 8, 2, Layout((4, 4)), **fields))


def test_another_grid_is_refused():
    part = query(levels=1)
    with pytest.raises(LayoutMismatch, match="AZ401"):
        run(part, normal(1, 20, 8), normal(1, 24, 8), Layout((4, 5)))
    with pytest.raises(LayoutMismatch, match="AZ401"):
        run(part, normal(1, 25, 8), normal(1, 24, 8), context=(6, 4))


def test_narrow_numbers_stay_near():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        part = spread(GlobalQuery(at(), levels=1), 0.3).to(dtype).double()
        x, source = (t.to(dtype).double() for t in (normal(2, 25, 8), normal(2, 24, 8)))
        wanted = run(part, x, source).detach()
        found = run(part.to(dtype), x.to(dtype), source.to(dtype))
        assert found.dtype == dtype
        near(found, wanted, tolerance * max(1.0, float(wanted.abs().max())))
