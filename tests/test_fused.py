"""MultiHead, FusedHeads and Fused: mechanisms of one head, of several heads, of several mechanisms."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.layers import Attention
from torch import nn

from attnzoo.core import NO_MASK, Fused, FusedHeads, KVCache, Law, Layout, Mask, MultiHead, Site, watch
from attnzoo.core.fused import fused_card
from attnzoo.errors import RecipeError, UnsupportedContext, UnsupportedMask
from attnzoo.fusions.add import Add
from attnzoo.fusions.concat import Concat
from attnzoo.fusions.difference import Difference
from attnzoo.fusions.gated import Gated
from attnzoo.fusions.hadamard import Hadamard
from attnzoo.fusions.head_split import HeadSplit
from attnzoo.fusions.mean import Mean
from attnzoo.mechanisms.additive.additive import Additive
from attnzoo.mechanisms.additive.soft import Soft
from attnzoo.mechanisms.channel.squeeze_excite import SqueezeExcite
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.dot_product.talking_heads import TalkingHeads
from attnzoo.mechanisms.latent.memory import Memory
from attnzoo.mechanisms.linear.elu_linear import EluLinear
from attnzoo.mechanisms.linear.linformer import Linformer
from attnzoo.mechanisms.local.neighborhood import Neighborhood
from attnzoo.mechanisms.mixing.fourier import Fourier
from attnzoo.mechanisms.projection.grouped_query import GroupedQuery

LAYOUT = Layout((2, 3), prefix=1)
N, C, H, D = 7, 24, 4, 6


def site(**fields) -> Site:
    """A place of 4 heads of 6 channels."""
    return Site(**{"name": "fused", "dim": C, "heads": H, "layout": LAYOUT} | fields)


def tokens(*, context: int | None = None) -> torch.Tensor:
    """(2 7 24), or a context (2 5 width)."""
    return (
        torch.randn(2, 5, context, dtype=torch.float64)
        if context
        else torch.randn(2, N, C, dtype=torch.float64)
    )


def multi(head, place: Site | None = None) -> MultiHead:
    """Projections around a head, in float64."""
    place = place or site()
    return MultiHead(place, head(place)).double().eval()


def inside(*heads, fusion=Add):
    """Builds heads and a fusion inside the heads."""
    return partial(FusedHeads, fusion=fusion, branches=list(heads))


def jitter(module: nn.Module) -> nn.Module:
    """Parameters that hide nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def close(found, wanted, tolerance: float = 1e-12) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


# Against timm


NORMED = [
    ({}, {}),
    ({"qk_norm": True}, {"qk_norm": True, "norm_layer": nn.LayerNorm}),
    ({"scale_norm": True}, {"scale_norm": True, "norm_layer": nn.LayerNorm}),
    ({"qk_norm": True, "scale_norm": True, "qkv_bias": False}, {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm, "qkv_bias": False}),
    ({"proj_bias": False}, {"proj_bias": False}),
]  # fmt: skip


@pytest.mark.parametrize("ours,timms", NORMED)
@pytest.mark.parametrize("masked", ["free", "causal", "pairs"])
def test_multi_head_is_timms_attention_bit_for_bit(ours, timms, masked):
    attention = jitter(Attention(C, H, **{"qkv_bias": True} | timms)).eval()
    place = site(**ours)
    part = MultiHead(place, Softmax(place)).eval()
    assert list(part.state_dict()) == list(attention.state_dict())
    part.load_state_dict(attention.state_dict())
    x = torch.randn(2, N, C)
    allowed = torch.rand(2, 1, N, N) < 0.7
    allowed |= torch.eye(N, dtype=torch.bool)
    mask = {"free": NO_MASK, "causal": Mask(causal=True), "pairs": Mask(pairs=allowed)}[masked]
    wanted = attention(x, attn_mask=allowed if masked == "pairs" else None, is_causal=masked == "causal")
    assert torch.equal(part(x, mask=mask, layout=LAYOUT), wanted)


def test_state_dict_keys_are_timms():
    assert list(multi(Softmax).state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert set(multi(Softmax, site(qk_norm=True, scale_norm=True)).state_dict()) >= {"q_norm.weight", "k_norm.bias", "norm.weight"}  # fmt: skip
    assert "inner.branches.soft.score_weight" in multi(inside(Softmax, Soft)).state_dict()


def test_dropout_is_timms_too():
    attention = Attention(C, H, qkv_bias=True, attn_drop=0.5, proj_drop=0.5)
    place = site(attn_drop=0.5, proj_drop=0.5)
    part = MultiHead(place, Softmax(place))
    part.load_state_dict(attention.state_dict())
    x = torch.randn(2, N, C)
    torch.manual_seed(3)
    wanted = attention(x)
    torch.manual_seed(3)
    assert torch.equal(part(x, layout=LAYOUT), wanted)
    assert not torch.equal(part(x, layout=LAYOUT), wanted)


# Cross-attention


def test_cross_attention_reads_from_the_context():
    place = site(context_dim=10)
    part = jitter(multi(Softmax, place))
    assert set(part.state_dict()) >= {"q.weight", "kv.weight"} and part.kv.weight.shape == (2 * C, 10)
    x, context = tokens(), tokens(context=10)
    q = part.q(x).reshape(2, N, H, D).transpose(1, 2)
    k, v = (part.kv(context)[..., i * C : (i + 1) * C].reshape(2, 5, H, D).transpose(1, 2) for i in (0, 1))
    weights = (q @ k.mT / D**0.5).softmax(-1)
    wanted = part.proj((weights @ v).transpose(1, 2).reshape(2, N, C))
    close(part(x, context, layout=Layout((5,))), wanted)
    keys = torch.tensor([[True, True, False, True, False], [True] * 5])
    edited = context.clone()
    edited[0, [2, 4]] += 1
    padded = [part(x, t, mask=Mask(keys=keys), layout=Layout((5,))) for t in (context, edited)]
    close(padded[0], padded[1])


@pytest.mark.parametrize(
    "place,context,text",
    [(site(), torch.zeros(2, 5, C), "its site has none"), (site(context_dim=C), None, "none was given")],
)
def test_a_context_where_there_is_none(place, context, text):
    with pytest.raises(UnsupportedContext, match=f"AZ404.*{text}"):
        multi(Softmax, place)(tokens(), None if context is None else context.double(), layout=LAYOUT)


@pytest.mark.parametrize("cls", [Fourier, SqueezeExcite])
def test_mechanisms_without_a_context_refuse_one(cls):
    with pytest.raises(UnsupportedContext, match="AZ404"):
        cls(site()).double()(tokens(), tokens(), layout=LAYOUT)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(RecipeError, match="AZ308.*5 heads do not divide a width of 24"):
        multi(Softmax, site(heads=5))


# Nesting


def test_inside_the_heads_branches_share_projections():
    part = jitter(multi(inside(Softmax, EluLinear, fusion=Add)))
    alone = [multi(head) for head in (Softmax, EluLinear)]
    for other in alone:
        other.load_state_dict(part.state_dict(), strict=False)
        nn.init.zeros_(other.proj.bias)
    x = tokens()
    close(part(x, layout=LAYOUT), alone[0](x, layout=LAYOUT) + alone[1](x, layout=LAYOUT) + part.proj.bias)


def test_fusions_nest_inside_the_heads():
    part = jitter(multi(inside(Softmax, inside(EluLinear, Soft, fusion=Hadamard), fusion=Mean)))
    assert list(part.inner.branches) == ["softmax", "hadamard"]
    q, k, v = (torch.randn(2, H, N, D, dtype=torch.float64) for _ in range(3))
    inner = part.inner.branches["hadamard"]
    one, two, three = (
        branch(q, k, v, mask=NO_MASK, layout=LAYOUT)
        for branch in (part.inner.branches["softmax"], inner.branches["elu_linear"], inner.branches["soft"])
    )
    close(part.inner(q, k, v, layout=LAYOUT), (one + two * three) / 2)


def test_fusions_nest_on_tokens():
    fused = Fused(
        site(),
        Add,
        [
            Fourier,
            lambda s: Fused(s, Mean, [SqueezeExcite, GroupedQuery]),
            lambda s: MultiHead(s, FusedHeads(s, Hadamard, [Softmax, Soft])),
        ],
    ).double()
    assert list(fused.branches) == ["fourier", "mean", "hadamard"]
    x = tokens()
    one, two, three = (branch(x, mask=NO_MASK, layout=LAYOUT) for branch in fused.branches.values())
    close(fused(x, layout=LAYOUT), one + two + three)
    mean = fused.branches["mean"].branches
    close(two, (mean["squeeze_excite"](x, layout=LAYOUT) + mean["grouped_query"](x, layout=LAYOUT)) / 2)


def test_branches_of_one_name_are_numbered():
    part = FusedHeads(site(), Add, [Softmax, Softmax, Soft, Softmax])
    assert list(part.branches) == ["softmax", "softmax_2", "soft", "softmax_3"]


def test_parameters_inside_the_heads_are_per_channel_of_a_head():
    assert FusedHeads(site(), Concat, [Softmax, Soft]).fusion.merge_proj.weight.shape == (D, 2 * D)
    assert FusedHeads(site(), Difference, [Softmax, Soft]).fusion.share.shape == (D,)
    assert Fused(site(), Concat, [Fourier, GroupedQuery]).fusion.merge_proj.weight.shape == (C, 2 * C)


@pytest.mark.parametrize("fusion", [Add, Hadamard, Mean, Gated, Concat])
@pytest.mark.parametrize("heads", [True, False])
def test_identity_start_is_the_first_branch_and_still_learns(fusion, heads):
    start = partial(fusion, start="identity")
    if heads:
        part = multi(lambda s: FusedHeads(s, start, [Softmax, Soft]))
        plain = multi(Softmax)
        plain.load_state_dict(part.state_dict(), strict=False)
    else:
        part = Fused(site(), start, [GroupedQuery, Fourier]).double()
        plain = part.branches["grouped_query"]
    x = tokens()
    out = part(x, layout=LAYOUT)
    assert torch.equal(out, plain(x, layout=LAYOUT))
    out.square().sum().backward()
    gamma = (part.inner if heads else part).fusion.gamma
    assert gamma.grad.abs().max() > 0


# Masks


def test_the_mask_reaches_every_branch():
    part = jitter(multi(inside(Softmax, partial(Soft, variant="bahdanau"))))
    x = tokens()
    edited = x.clone()
    edited[:, 4] += 1
    out = [part(t, mask=Mask(causal=True), layout=LAYOUT) for t in (x, edited)]
    close(out[0][:, :4], out[1][:, :4])
    with pytest.raises(UnsupportedMask, match="AZ402"):
        multi(inside(Softmax, Soft))(x, mask=Mask(causal=True), layout=LAYOUT)


def test_head_split_gives_each_branch_its_own_heads():
    part = jitter(multi(inside(Softmax, EluLinear, fusion=HeadSplit)))
    q, k, v = (torch.randn(2, H, N, D, dtype=torch.float64) for _ in range(3))
    found = part.inner(q, k, v, layout=LAYOUT)
    close(found[:, :2], Softmax(site())(q[:, :2], k[:, :2], v[:, :2], layout=LAYOUT))
    close(found[:, 2:], EluLinear(site())(q[:, 2:], k[:, 2:], v[:, 2:], layout=LAYOUT))


@pytest.mark.parametrize("samples", [1, 2])
def test_head_split_deals_out_pairs_with_the_heads(samples):
    pairs = torch.rand(samples, H, N, N) < 0.6
    q, k, v = (torch.randn(2, H, N, D, dtype=torch.float64) for _ in range(3))
    split = FusedHeads(site(), HeadSplit, [Softmax, Softmax])
    wanted = Softmax(site())(q, k, v, mask=Mask(pairs=pairs), layout=LAYOUT)
    close(split(q, k, v, mask=Mask(pairs=pairs), layout=LAYOUT), wanted)
    shared = Mask(pairs=pairs[:, :1], keys=torch.rand(2, N) < 0.8, causal=True)
    close(split(q, k, v, mask=shared, layout=LAYOUT), Softmax(site())(q, k, v, mask=shared, layout=LAYOUT))


def test_head_split_on_tokens_deals_out_channels():
    fused = Fused(site(), HeadSplit, [Fourier, GroupedQuery]).double()
    x = tokens()
    found = fused(x, layout=LAYOUT)
    assert fused.branches["grouped_query"].heads == 2
    close(found[..., :12], fused.branches["fourier"](x[..., :12], layout=LAYOUT))
    close(found[..., 12:], fused.branches["grouped_query"](x[..., 12:], layout=LAYOUT))


def test_head_split_refuses_what_it_cannot_deal():
    for build in (
        lambda: FusedHeads(site(), HeadSplit, [Softmax] * 3),
        lambda: Fused(site(), HeadSplit, [Fourier] * 3),
    ):
        with pytest.raises(RecipeError, match="AZ312.*4 heads to 3 branches"):
            build()


@pytest.mark.parametrize("count", [0, 1])
def test_a_difference_needs_two_branches(count):
    with pytest.raises(RecipeError, match=f"AZ312.*2 or more branches; it was given {count}"):
        FusedHeads(site(), Difference, [Softmax] * count)


class OneOrTwo(Add):
    card = replace(Add.card, arity=(1, 2))


def test_a_fusion_may_have_a_most():
    assert OneOrTwo(site(), 2).arity == 2
    with pytest.raises(RecipeError, match="AZ312.*1 to 2 branches; it was given 3"):
        OneOrTwo(site(), 3)


# Derived cards


def test_a_fused_card_claims_what_all_can():
    card = FusedHeads(site(), Add, [Softmax, Soft]).card
    assert card.name == "add" and card.masks == {"keys"} and card.context and not card.incremental
    assert card.time == "n m c + n c d" and card.growth == 2 and not card.taps
    assert FusedHeads(site(), Add, [Softmax, Softmax]).card.time == "n m c"
    both = FusedHeads(site(), Add, [Softmax, EluLinear]).card
    assert both.incremental and both.masks == {"keys", "causal"}


def test_heads_stay_apart_in_a_fusion_of_such_heads_unless_it_deals_them_out():
    def laws(*heads, fusion=Add):
        return FusedHeads(site(), fusion, list(heads)).card.laws

    assert laws(Softmax, Soft) == {Law.HEADS_APART} == laws(Softmax, inside(Softmax, EluLinear))
    assert laws(Softmax, TalkingHeads) == laws(inside(TalkingHeads), Softmax) == set()
    assert laws(Softmax, Softmax, fusion=HeadSplit) == set()
    head = FusedHeads(site(), Gated, [Softmax, inside(Memory, partial(Linformer, rank=4), fusion=Gated)])
    own = {name for name in head.state_dict() if name not in head.shared()}
    assert own == {"branches.gated.branches.memory.key_slots", "branches.gated.branches.memory.value_slots"}


def test_a_fused_card_has_the_needs_of_each():
    assert FusedHeads(site(), Add, [Softmax, Neighborhood]).card.grid == "any"
    assert FusedHeads(site(), Add, [Softmax, Neighborhood]).card.context is False
    assert FusedHeads(site(), Add, [Softmax, Soft]).card.grid is None
    card = Fused(site(), Add, [Additive, Fourier]).card
    assert card.masks == frozenset() and not card.context and not card.incremental


def test_a_nested_card_is_derived_from_derived_cards():
    card = FusedHeads(site(), Mean, [Softmax, inside(EluLinear, Softmax, fusion=Add)]).card
    assert card.masks == {"keys", "causal"} and card.incremental
    assert multi(inside(Softmax, Soft)).card.name == "add"


@pytest.mark.parametrize("grids,wanted", [((None, None), None), ((None, 2), 2), (("any", 2), 2), ((2, "any"), 2), (("any", None), "any")])  # fmt: skip
def test_the_grid_of_a_fused_card(grids, wanted):
    cards = [
        replace(Softmax.card, grid=grid, fixed_length=grid == 2, extra={"x"} if grid else set())
        for grid in grids
    ]
    card = fused_card(Add.card, cards)
    assert (
        card.grid == wanted
        and card.fixed_length == (2 in grids)
        and card.extra == ({"x"} if any(grids) else set())
    )


# Step by step


class OneTooFew(Add):
    """Hands nothing to its last branch."""

    def split(self, x, axis):
        return super().split(x, axis)[:-1]


def test_a_fusion_that_forgets_a_branch_is_noticed():
    """Heads, tokens and steps of tokens: what is split is held to the number of branches."""
    heads = multi(inside(Softmax, Softmax, fusion=OneTooFew))
    whole = Fused(site(), OneTooFew, [GroupedQuery, GroupedQuery]).double()
    x = tokens()
    for call in (
        lambda: heads(x, layout=LAYOUT),
        lambda: whole(x, layout=LAYOUT),
        lambda: whole.step(x, KVCache(), mask=Mask(causal=True), layout=LAYOUT),
    ):
        with pytest.raises(ValueError, match="argument"):
            call()


@pytest.mark.parametrize(
    "head", [Softmax, EluLinear, partial(Soft, variant="bahdanau"), inside(Softmax, EluLinear)]
)
def test_steps_give_the_full_pass(head):
    place = site(layout=Layout((N,)))
    part = jitter(multi(head, place))
    assert part.card.incremental
    x, keys = tokens(), torch.ones(2, N, dtype=torch.bool)
    keys[1, 0] = False
    wanted = part(x, mask=Mask(keys=keys, causal=True), layout=Layout((N,)))
    cache, rows, done = KVCache(), [], 0
    for size in (1, 1, 3, 2):
        done += size
        mask = Mask(keys=keys[:, :done], causal=True)
        rows.append(part.step(x[:, done - size : done], cache, mask=mask, layout=Layout((done,))))
    close(torch.cat(rows, dim=1), wanted, 1e-10)
    assert cache.length == N


def test_taps_inside_fused_heads_have_full_names():
    part, names = multi(inside(Softmax, Soft)), []
    with watch(part, "weights", lambda name, _: names.append(name)):
        part(tokens(), layout=LAYOUT)
    assert names == ["inner.branches.softmax.weights", "inner.branches.soft.weights"]
