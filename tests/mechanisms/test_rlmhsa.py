"""RLMHSA of FMViT, arXiv:2311.05707; pooled keys of Next-ViT, arXiv:2207.05501."""

import copy
import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from timm.models.nextvit import EfficientAttention
from torch import nn

from attnzoo.core import Law, Layout, Mask, MultiHead, Site, options_of
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection.rlmhsa import Rlmhsa
from attnzoo.testing import against


def at(grid, prefix=0, dim=8, heads=2, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, heads, Layout(grid, prefix), **wishes)


def summed(layer, x):
    """Branch by branch and block by block: γ_g times the block of x's channels that make a channel."""
    out = 0 if layer.own is None else layer.own * x
    for blocks, scale in zip(layer.blocks, layer.scales, strict=True):
        parts = x.split(blocks.shape[2], -1)
        out = out + scale * torch.cat([t @ block.T for t, block in zip(parts, blocks, strict=True)], -1)
    return out if layer.bias is None else out + layer.bias


@against(Rlmhsa, examples=30)
def test_oracle(component, options, x, layout, allowed, keys):
    """Tokens are gathered in dicts by square, one by one; then softmax attention head by head."""
    (b, n, c), p, columns = x.shape, layout.prefix, layout.grid[1]
    ratio, heads, out = options["ratio"], component.heads, []
    for s in range(b):
        slots = {}
        for i in range(n):
            y, x_ = divmod(i - p, columns)
            square = (i - p) // ratio**2 if options["pool"] == "raster" else (y // ratio, x_ // ratio)
            slots.setdefault(i if i < p or ratio == 1 else ("square", square), []).append(i)
        kept = {name: [i for i in members if keys[s, i]] for name, members in slots.items()}
        kept = {name: members for name, members in kept.items() if members}
        merged = torch.zeros(n, c).double()
        if kept:
            pooled = torch.stack([sum(x[s, i] for i in members) / len(members) for members in kept.values()])
            if ratio > 1:
                pooled = pooled * component.pool_scale + component.pool_bias
            q, k, v = summed(component.q, x[s]), summed(component.k, pooled), summed(component.v, pooled)
            d, e = q.shape[1] // heads, c // heads
            rows = []
            for i in range(n):
                parts = []
                for h in range(heads):
                    # without pooling any pair may be hidden
                    see = [j for j, name in enumerate(kept) if ratio > 1 or allowed[s, h, i, name]]
                    own = slice(h * d, (h + 1) * d)
                    weights = (k[see, own] @ q[i, own] / math.sqrt(d)).softmax(0)
                    parts.append(weights @ v[see, h * e : (h + 1) * e])
                rows.append(torch.cat(parts))
            merged = torch.stack(rows)
        out.append(summed(component.proj, merged))
    return torch.stack(out)


test_oracle_of_small_ratios = against(Rlmhsa, options=lambda options: options.get("ratio") != 1)(
    test_oracle.oracle
)


def before(change):
    """The mechanism, changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return Rlmhsa.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Rlmhsa, mix=mix)


def on(*names):
    """A change of these projections."""

    def decorate(change):
        def apply(self):
            for name in names:
                change(getattr(self, name))

        return before(apply)

    return decorate


def transposed(layer):
    """Blocks with inputs and outputs exchanged."""
    for blocks in layer.blocks:
        if blocks.shape[1] == blocks.shape[2]:
            blocks.copy_(blocks.mT.clone())


def columns_first(self, t, grid):
    """Squares one column after the other."""
    return Rlmhsa._squares(self, t.unflatten(1, grid).transpose(1, 2).flatten(1, 2), grid[::-1])


def padding_counts(self, x, keys, layout):
    """Means over all tokens of a square."""
    slots, _ = Rlmhsa._pooled(self, x, None, layout)
    return slots, Rlmhsa._pooled(self, x, keys, layout)[1]


def special_left_out(self, x, keys, layout):
    """Nobody asks the special tokens."""
    slots, mask = Rlmhsa._pooled(self, x, keys, layout)
    p = layout.prefix
    return slots[:, p:], mask if mask.keys is None else Mask(keys=mask.keys[:, p:])


MUTANTS = {
    "only the first branch": on("q", "k", "v", "proj")(lambda layer: [scale.zero_() for scale in list(layer.scales)[1:]]),
    "γ left out": on("v")(lambda layer: [scale.fill_(1) for scale in layer.scales]),
    "blocks in another order": on("v")(lambda layer: [blocks.copy_(blocks.flip(0)) for blocks in layer.blocks]),
    "blocks transposed": on("v", "proj")(transposed),
    "a wrong scale": on("q")(lambda layer: [scale.mul_(1.5) for scale in layer.scales]),
    "no β": on("q", "v", "proj")(lambda layer: layer.bias is None or layer.bias.zero_()),
    "no norm of what is pooled": before(lambda self: self.ratio > 1 and self.pool_scale.fill_(1)),
    "no β of what is pooled": before(lambda self: self.ratio > 1 and self.pool_bias.zero_()),
    "squares for a raster": before(lambda self: setattr(self, "raster", False)),
    "a raster for squares": before(lambda self: setattr(self, "raster", True)),
    "columns first": wrong(Rlmhsa, _squares=columns_first),
    "padding in the means": wrong(Rlmhsa, _pooled=padding_counts),
    "special tokens are not asked": wrong(Rlmhsa, _pooled=special_left_out),
    "the mask ignored": wrong(Rlmhsa, mix=lambda self, x, source, *, mask, layout: Rlmhsa.mix(self, x, source, mask=Mask(), layout=layout)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle_of_small_ratios, mutant)


def rlmhsa(grid=(4, 4), prefix=0, dim=8, heads=2, **options) -> Rlmhsa:
    """In float64, with parameters of a size that matters."""
    return spread(Rlmhsa(at(grid, prefix, dim, heads), **options))


# By hand


@pytest.mark.parametrize("pool", ["square", "raster"])
def test_hand_what_is_pooled(pool):
    """1 to 15 in rows of five, by 2 × 2: of a remainder the mean of what there is; 16 is a special token, not pooled."""
    part = Rlmhsa(at((3, 5), 1, 1, 1), pool=pool)
    x = torch.tensor([16.0, *range(1, 16)]).reshape(1, 16, 1)
    slots, mask = part._pooled(x, None, Layout((3, 5), 1))
    wanted = [16, 4, 6, 7.5, 11.5, 13.5, 15] if pool == "square" else [16, 2.5, 6.5, 10.5, 14]
    near(slots, wanted)
    keys = torch.ones(1, 16).bool()
    keys[:, [0, 1, 2]] = False  # the special token, 1 and 2
    slots, mask = part._pooled(x, keys, Layout((3, 5), 1))
    near(slots[0, 1], [6.5 if pool == "square" else 3.5])
    assert mask.keys.tolist() == [[False] + [True] * (len(wanted) - 1)]


def test_hand_values_of_one_square():
    """Everything attends to the only slot: P_o P_v of the mean."""
    part, x = rlmhsa(ratio=4), normal(2, 16, 8)
    mean = x.mean(1, keepdim=True) * part.pool_scale + part.pool_bias
    near(part(x, layout=Layout((4, 4))), summed(part.proj, summed(part.v, mean)).expand_as(x))


@pytest.mark.parametrize("options,wanted", [
    ({"groups": 1, "ratio": 1}, 4 * 64 + 4 * 8 + 3 * 8),
    ({"ratio": 1}, 4 * (64 + 32 + 16) + 4 * 3 * 8 + 3 * 8),
    ({}, 4 * (64 + 32 + 16) + 4 * 3 * 8 + 3 * 8 + 2 * 8),
    ({"identity": True}, 4 * (64 + 32 + 16) + 4 * 4 * 8 + 3 * 8 + 2 * 8),
    ({"reduction": 2}, 3 * (64 + 32 + 16) + (2 * 3 * 4 + 2 * 3 * 8) + (4 + 8 + 8) + 2 * 8),
])  # fmt: skip
def test_hand_parameters(options, wanted):
    """Of branches of 1, 2, 4 blocks c², c² / 2, c² / 4, a γ each; β of all but the keys; γ and β of what is pooled."""
    assert count(Rlmhsa(at((4, 4)), **options)) == wanted


def test_defaults():
    wanted = {"ratio": 2, "pool": "square", "reduction": 1, "groups": None, "identity": False}
    assert options_of(Rlmhsa)().model_dump() == wanted


# Identities


def test_identity_one_branch_without_pooling_is_multi_head_attention():
    site, x = at((3, 4), 1), normal(2, 13, 8)
    part, full = rlmhsa((3, 4), 1, ratio=1, groups=1), MultiHead(at((3, 4), 1), Softmax(site)).double()
    with torch.no_grad():
        folded = copy.deepcopy(part).fold()
        full.qkv.weight.copy_(torch.cat([folded.q.weight, folded.k.weight, folded.v.weight]))
        full.qkv.bias.copy_(torch.cat([folded.q.bias, torch.zeros(8), folded.v.bias]))
    full.proj.load_state_dict(folded.proj.state_dict())
    for mask in (
        Mask(),
        Mask(causal=True),
        Mask(keys=torch.rand(2, 13) < 0.6, pairs=torch.rand(2, 2, 13, 13) < 0.6),
    ):
        near(part(x, mask=mask, layout=site.layout), full(x, mask=mask, layout=site.layout))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [{}, {"identity": True}, {"reduction": 2, "groups": 2}, {"ratio": 1}])
@pytest.mark.parametrize("bias", [True, False])
def test_identity_folded_it_is_the_same(options, dtype, tolerance, bias):
    site = at((4, 5), 1, qkv_bias=bias, proj_bias=bias)
    part, x = spread(Rlmhsa(site, **options), 0.3).to(dtype), normal(2, 21, 8).to(dtype)
    mask = Mask(keys=torch.rand(2, 21) < 0.7)
    wanted = [part(x, mask=m, layout=site.layout).detach() for m in (Mask(), mask)]
    folded = part.fold()
    assert folded is part and all(type(getattr(part, name)) is nn.Linear for name in ("q", "k", "v", "proj"))
    assert (
        count(part) < count(Rlmhsa(site, **options)) and part.fold() is part
    )  # a second time changes nothing
    for m, out in zip((Mask(), mask), wanted, strict=True):
        near(part(x, mask=m, layout=site.layout), out, tolerance)
    assert copy.deepcopy(part).state_dict().keys() == part.state_dict().keys() and not part.training


def test_identity_equal_tokens_are_weighed_alike():
    part = rlmhsa((4, 4))
    weights = seen(part, normal(2, 1, 8).expand(2, 16, 8), layout=Layout((4, 4)))
    near(weights, torch.full((2, 2, 16, 4), 0.25))


def test_identity_next_vits_attention():
    """timm's, which pools four tokens one after the other; its batch norm is γ and β in eval mode."""
    theirs = spread(EfficientAttention(8, head_dim=4, sr_ratio=2))
    theirs.norm.running_mean.normal_()
    theirs.norm.running_var.uniform_(0.5, 2)
    part, x = rlmhsa((4, 6), pool="raster", groups=1), normal(2, 24, 8)
    with torch.no_grad():
        for name in ("q", "k", "v", "proj"):
            mine, linear = getattr(part, name), getattr(theirs, name)
            mine.blocks[0].copy_(linear.weight[None])
            mine.scales[0].fill_(1)
            if mine.bias is not None:  # of keys a softmax would not see it
                mine.bias.copy_(linear.bias)
        part.pool_scale.copy_(theirs.norm.weight / torch.sqrt(theirs.norm.running_var + theirs.norm.eps))
        part.pool_bias.copy_(theirs.norm.bias - theirs.norm.running_mean * part.pool_scale)
    near(part(x, layout=Layout((4, 6))), theirs(x))
    part.raster = False
    assert (part(x, layout=Layout((4, 6))) - theirs(x)).abs().max() > 1e-3


def test_identity_padding_is_a_smaller_picture():
    part, x = rlmhsa((6, 7)), normal(2, 6, 7, 8)
    keys = torch.zeros(2, 6, 7, dtype=torch.bool)
    keys[:, :3, :5] = True
    x[~keys] *= 100
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((6, 7))).reshape(x.shape)
    near(out[:, :3, :5].flatten(1, 2), part(x[:, :3, :5].flatten(1, 2), layout=Layout((3, 5))))


def test_training_with_branches_then_without():
    """A folded one learns on, as one matrix each."""
    part = set_all(Rlmhsa(at((4, 4))), 0.1).train().fold()
    part(normal(1, 16, 8), layout=Layout((4, 4))).square().sum().backward()
    assert part.training and all(p.grad is not None for p in part.parameters())


# Claims and refusals


def test_claims():
    assert Rlmhsa.card_for().masks == {"keys"} and Rlmhsa.card_for(ratio=1).masks == {
        "keys",
        "causal",
        "pairs",
    }
    assert Law.PERMUTATION_EQUIVARIANT in Rlmhsa.card_for(ratio=1).laws


@pytest.mark.parametrize(
    "options", [{"groups": 3}, {"groups": 16}, {"reduction": 3}, {"groups": 8, "reduction": 2}]
)
def test_what_does_not_divide_is_refused(options):
    with pytest.raises(RecipeError, match="AZ214"):
        Rlmhsa(at((4, 4)), **options)


def test_narrow_numbers_stay_near():
    narrow(Rlmhsa, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))))
