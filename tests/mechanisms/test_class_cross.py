"""Class token cross-attention of CrossViT, arXiv:2103.14899, §3.3: timm's layers, with a key mask and taps."""

import math

import pytest
import torch
from by_hand import caught, count, near, normal, seen, spread, wrong
from timm.models.crossvit import CrossAttentionBlock
from torch import nn

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.mechanisms.cross.class_cross import ClassCross
from attnzoo.testing import against


def normed(layer, y):
    """Layer normalisation of each row, written out."""
    centred = y - y.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + layer.eps) * layer.weight + layer.bias


def linear(layer, y):
    """W y + b of each row."""
    return y @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def brought(layers, y):
    """Norm, gelu, linear."""
    y = normed(layers[0], y)
    return linear(layers[2], y * (1 + torch.erf(y / math.sqrt(2))) / 2)


@against(ClassCross, examples=40)
def test_oracle(component, x, source, layout, context_layout, keys):
    """Sample by sample, head by head: the class token, at the other width, asks itself and the patches that exist."""
    heads, block, out = component.heads, component.block, []
    d = source.shape[2] // heads
    for s in range(x.shape[0]):
        exist = [j for j in range(context_layout.prefix, source.shape[1]) if keys[s, j]]
        token, merged = brought(component.enter, x[s, 0]), []
        both = normed(block.norm1, torch.stack([token, *source[s][exist]]))
        q, k, v = linear(block.attn.wq, both[0]), linear(block.attn.wk, both), linear(block.attn.wv, both)
        for h in range(heads):
            mine = slice(h * d, (h + 1) * d)
            e = torch.exp(k[:, mine] @ q[mine] / math.sqrt(d))
            merged.append(e / e.sum() @ v[:, mine])
        token = token + linear(block.attn.proj, torch.cat(merged))
        out.append(torch.cat([brought(component.leave, token)[None], x[s, 1:]]))
    return torch.stack(out)


def crossed(
    self, x, source, mask, layout, context, enter=True, leave=True, norm=True, own=True, scale=None, residual=1.0,
    special=False, swap=False, over=-1, outer=0.0, keep=1.0, hide=lambda k: k, all_=False,
):  # fmt: skip
    """The equations with a fault."""
    attn, keys = (
        self.block.attn,
        torch.ones(source.shape[:2], dtype=torch.bool) if mask.keys is None else hide(mask.keys),
    )
    there = keys & (torch.arange(source.shape[1]) >= (0 if special else context.prefix))
    there = torch.cat([torch.full_like(there[:, :1], own), there], 1)[:, None, None]
    token = self.enter(x[:, :1]) if enter else self.enter[2](x[:, :1])
    both = torch.cat([token, source], 1)
    both = self.block.norm1(both) if norm else both
    q, k, v = (w(both).unflatten(2, (self.heads, -1)).transpose(1, 2) for w in (attn.wq, attn.wk, attn.wv))
    q, k = (k, q) if swap else (q, k)
    scores = q[:, :, :1] @ k.mT * (attn.scale if scale is None else scale)
    weights = scores.masked_fill(~there, -1e30).softmax(over).masked_fill(~there, 0.0)
    token = residual * token + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    token = self.leave(token) if leave else self.leave[2](token)
    token = token + outer * x[:, :1]
    many = layout.prefix if all_ else 1
    return torch.cat([token.expand(-1, many, -1), keep * x[:, many:]], 1)


def with_fault(**fault):
    """The mechanism with one fault."""

    def mix(self, x, source, *, mask, layout, context_layout=None):
        return crossed(self, x, source, mask, layout, context_layout, **fault)

    return wrong(ClassCross, mix=mix)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=12).ok


MUTANTS = {
    "no norm and gelu on the way there": with_fault(enter=False),
    "no norm and gelu on the way back": with_fault(leave=False),
    "what attends is not normalised": with_fault(norm=False),
    "the class token does not read itself": with_fault(own=False),
    "no scale": with_fault(scale=1.0),
    "no residual at the other width": with_fault(residual=0.0),
    "a residual at its own width": with_fault(outer=1.0),
    "the other class token is read": with_fault(special=True),
    "q and k swapped": with_fault(swap=True),
    "softmax over the heads": with_fault(over=1),
    "softmax over the batch": with_fault(over=0),
    "patches are left out": with_fault(keep=0.0),
    "all special tokens receive it": with_fault(all_=True),
    "the mask ignored": with_fault(hide=torch.ones_like),
    "the mask inverted": with_fault(hide=torch.logical_not),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT, CONTEXT = Layout((2, 3), 1), Layout((2, 2), 1)


def at(dim=8, width=6, layout=LAYOUT, **wishes) -> Site:
    """A site with a second stream."""
    return Site("hand", dim, 2, layout, context_dim=width, context_layout=CONTEXT, **wishes)


def cross(dim=8, width=6, layout=LAYOUT) -> ClassCross:
    """In float64, with weights of a size that matters."""
    return spread(ClassCross(at(dim, width, layout)), 0.5)


def run(part, x, source, layout=LAYOUT, context=CONTEXT, **more):
    return part(x, source, layout=layout, context_layout=context, **more)


# By hand


def test_hand_a_query_of_zero_reads_the_mean():
    """Of itself and the four patches, a fifth each."""
    part, x, source = cross(), normal(2, 7, 8), normal(2, 5, 6)
    with torch.no_grad():
        part.block.attn.wq.weight.zero_(), part.block.attn.wq.bias.zero_()
    token = part.enter(x[:, :1])
    v = part.block.attn.wv(part.block.norm1(torch.cat([token, source[:, 1:]], 1)))
    near(run(part, x, source)[:, :1], part.leave(token + part.block.attn.proj(v.mean(1, keepdim=True))))
    near(
        seen(part, x, source, layout=LAYOUT, context_layout=CONTEXT)[:, :, 0, 1:],
        torch.full((2, 2, 4), 0.2, dtype=torch.float64),
    )


def test_hand_parameters():
    """There and back two norms and c e + e, e c + c; between a norm, q, v and the projection with biases, k without."""
    c, e = 8, 6
    wanted = (2 * c + c * e + e) + (2 * e + e * c + c) + 2 * e + 4 * e * e + 3 * e
    assert count(ClassCross(at(c, e))) == wanted
    assert count(CrossAttentionBlock(e, 2, qkv_bias=True)) == 2 * e + 4 * e * e + 4 * e
    assert count(ClassCross(at(c, e, qkv_bias=False, proj_bias=False))) == wanted - 3 * e


# Identities


@pytest.mark.parametrize("width", [6, 8])
def test_identity_timms_block(width):
    """Between the two ways, for the projected class token before the other's patches; the bias of keys has no say."""
    part, theirs = (
        cross(width=width),
        spread(CrossAttentionBlock(width, 2, qkv_bias=True, norm_layer=nn.LayerNorm)),
    )
    part.block.load_state_dict({k: t for k, t in theirs.state_dict().items() if k != "attn.wk.bias"})
    x, source = normal(3, 7, 8), normal(3, 5, width)
    token = theirs(torch.cat([part.enter(x[:, :1]), source[:, 1:]], 1))
    near(run(part, x, source), torch.cat([part.leave(token), x[:, 1:]], 1))


def test_identity_patches_come_out_as_they_went_in():
    part, x, source = cross(layout=Layout((2, 3), 2)), normal(2, 8, 8), normal(2, 5, 6)
    out = run(part, x, source, Layout((2, 3), 2))
    assert torch.equal(out[:, 1:], x[:, 1:])
    x[:, 1:] += 1
    near(run(part, x, source, Layout((2, 3), 2))[:, :1], out[:, :1])


def test_identity_the_order_of_the_others_patches_has_no_say():
    part, x, source = cross(), normal(2, 7, 8), normal(2, 5, 6)
    near(run(part, x, source[:, [0, 3, 1, 4, 2]]), run(part, x, source))


def test_identity_the_others_class_token_is_not_read():
    part, x, source = cross(), normal(2, 7, 8), normal(2, 5, 6)
    out = run(part, x, source)
    near(run(part, x, source[:, 1:], context=Layout((2, 2))), out)
    source[:, 0] += 1
    near(run(part, x, source), out)


def test_identity_padding_is_a_shorter_context():
    part, x, source = cross(), normal(2, 7, 8), normal(2, 5, 6)
    keys = torch.tensor([[True, True, False, True, False]]).expand(2, 5)
    wanted = run(part, x, source[:, [0, 1, 3]], context=Layout((2,), 1))
    near(run(part, x, source, mask=Mask(keys=keys)), wanted)


def test_the_shares_of_token_and_patches_sum_to_one():
    part, x, source = cross(), normal(2, 7, 8), normal(2, 5, 6)
    keys = torch.tensor([[True] * 5, [True, False, True, False, False]])
    where = {"mask": Mask(keys=keys), "layout": LAYOUT, "context_layout": CONTEXT}
    weights, own = (seen(part, x, source, tap=name, **where) for name in ("weights", "weights_own"))
    assert weights.shape == (2, 2, 1, 5) and own.shape == (2, 2, 1, 1)
    near(weights.sum(-1) + own.sum(-1), torch.ones(2, 2, 1))
    assert not weights[..., 0].any() and not weights[1][..., ~keys[1]].any()


def test_where_no_patch_exists_it_reads_itself():
    part, x, source = cross(), normal(2, 7, 8), normal(2, 5, 6).requires_grad_()
    out = run(part, x, source, mask=Mask(keys=torch.zeros(2, 5, dtype=torch.bool)))
    token = part.enter(x[:, :1])
    attn = part.block.attn
    near(out[:, :1], part.leave(token + attn.proj(attn.wv(part.block.norm1(token)))))
    out.sum().backward()
    assert not source.grad.any() and all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())


# Refusals


@pytest.mark.parametrize("site,says", [
    (Site("hand", 8, 2, LAYOUT), "needs a second stream"),
    (at(layout=Layout((2, 3))), "needs a class token"),
    (at(width=5), "2 heads, which do not divide 5 channels"),
])  # fmt: skip
def test_a_site_that_does_not_fit_is_refused(site, says):
    with pytest.raises(RecipeError, match=f"AZ214.*{says}"):
        ClassCross(site)


def test_tokens_without_a_class_token_are_refused():
    with pytest.raises(LayoutMismatch, match="AZ401.*needs a class token"):
        run(cross(), normal(1, 6, 8), normal(1, 5, 6), Layout((2, 3)))


def test_narrow_numbers_stay_near():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        part = spread(ClassCross(at()), 0.3).to(dtype).double()
        x, source = (t.to(dtype).double() for t in (normal(2, 7, 8), normal(2, 5, 6)))
        for mask in (Mask(), Mask(keys=torch.rand(2, 5) < 0.6)):
            wanted = run(part.double(), x, source, mask=mask).detach()
            found = run(part.to(dtype), x.to(dtype), source.to(dtype), mask=mask)
            assert found.dtype == dtype
            near(found, wanted, tolerance * max(1.0, float(wanted.abs().max())))
