"""Attention maps of every mechanism, and rollout through the model."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from attnzoo.core import Card, Family, Head, Law, Layout, Mask, MultiHead, Site, find_taps
from attnzoo.errors import RecipeError, ZooError
from attnzoo.lab.maps import Maps, collect, implied_map
from attnzoo.lab.rollout import discard, fuse_heads, layer_maps, mean_map, roll, rollout
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.linear.elu_linear import EluLinear
from attnzoo.recipe import compose
from attnzoo.zoo import load_zoo

SMALL = """
recipe: 1
name: small
extends: ham_classic
host: {{model: {{depth: {depth}}}}}
attention: {attention}
"""
NESTED = "{fuse: add, of: [{fuse: gated, of: [softmax, {use: neighborhood, with: {window: 3}}, elu_linear]}, squeeze_excite]}"
HAM = "{fuse: hadamard, of: [softmax, soft]}"


def model(attention: str, depth: int = 2, **arguments) -> nn.Module:
    """A small ViT: 32 x 32 images, 64 + 1 tokens, 4 heads of 12 channels."""
    return compose(SMALL.format(attention=attention, depth=depth), **arguments).eval()


def images(count: int = 2) -> torch.Tensor:
    """(b 3 32 32)."""
    return torch.randn(count, 3, 32, 32)


def lively(part: nn.Module) -> nn.Module:
    """The same with parameters large enough for maps that are far from flat."""
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return part


class One(nn.Module):
    """A host of one head: images (b 1 y x) are tokens of x channels."""

    def __init__(self, head: type[Head], tokens: int = 5, channels: int = 6, **options):
        super().__init__()
        site = Site("one", channels, 2, Layout((tokens,)))
        self.layout = site.layout
        self.mix = MultiHead(site, head(site, **options))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.mix(images[:, 0], layout=self.layout)


def card(**claims) -> Card:
    """Of a head that is made up here."""
    return Card(name="made_up", family=Family.LINEAR, summary="For this test.", **claims)


@pytest.mark.parametrize("attention", [HAM, NESTED, "{use: grouped_query, with: {groups: 2}}"])
def test_looking_changes_nothing(attention):
    part, x = lively(model(attention)), images()
    part.train()
    found = collect(part, x)
    assert part.training and not any(tap.watched for tap in find_taps(part).values())
    with torch.no_grad():
        plain = part.eval()(x)
    assert (found.logits - plain).abs().max() <= 1e-6 * plain.abs().max()
    assert not any(leaf._forward_hooks for leaf in part.modules())


def test_maps_have_names_and_shapes():
    found = collect(model(NESTED), images())
    assert found.sites == ("blocks.0", "blocks.1") and found.class_token and found.layout.length == 65
    assert found.branches() == ["gated.softmax", "gated.neighborhood", "gated.elu_linear"]
    assert [(one.layer, one.site, one.branch, one.kind) for one in found.maps[:4]] == [
        (0, "blocks.0", "gated.softmax", "weights"),
        (0, "blocks.0", "gated.neighborhood", "weights"),
        (0, "blocks.0", "gated.elu_linear", "implied"),
        (1, "blocks.1", "gated.softmax", "weights"),
    ]
    assert all(one.weights.shape == (2, 4, 65, 65) and one.heads == 4 for one in found.maps)
    assert [one.branch for one in found.absent] == ["squeeze_excite"] * 2
    assert "channels" in found.absent[0].reason


def test_a_branch_that_comes_twice_has_two_names():
    found = collect(model("{fuse: add, of: [softmax, softmax]}", depth=1), images(1))
    assert found.branches() == ["softmax", "softmax_2"]


def test_the_map_is_that_of_the_block():
    part, x = lively(model("softmax")), images()
    found = collect(part, x)
    tokens: list[torch.Tensor] = []
    part.blocks[1].attn.register_forward_hook(lambda _part, args, _out: tokens.append(args[0]))
    with torch.no_grad():
        part(x)
        q, k, _ = part.blocks[1].attn.project(tokens[0])
    torch.testing.assert_close(
        found.maps[1].weights, (q @ k.mT / 12**0.5).softmax(dim=-1), rtol=1e-4, atol=1e-6
    )


def test_every_mechanism_has_a_map_or_a_reason():
    x, seen = images(1), {"weights": 0, "pooled": 0, "implied": 0, "absent": 0}
    for entry in load_zoo().mechanisms.values():
        if entry.plugin != "attnzoo" or getattr(
            entry.value.card, "given", None
        ):  # these maps are handed over
            continue
        try:
            part = lively(model(entry.name, depth=1))
        except RecipeError:  # it cannot be put into a ViT, or needs options
            continue
        found = collect(part, x)
        assert len(found.maps) + len(found.absent) == 1
        for one in found.absent:
            assert one.mechanism == entry.name and len(one.reason) > 20
            seen["absent"] += 1
        for one in found.maps:
            seen[one.kind] += 1
            figures = one.statistics()
            assert one.weights.shape[-1] == 65 and figures["least"] < figures["most"]
            claimed = Law.STOCHASTIC in part.blocks[0].attn.card.laws and one.kind != "implied"
            assert one.stochastic == claimed
            if one.stochastic:
                assert figures["least"] >= 0 and 0 < figures["entropy"] <= 1 + 1e-6
                assert figures["least_sum"] == pytest.approx(1, abs=1e-5) == figures["most_sum"]
    assert all(seen.values()), seen


@pytest.mark.parametrize(
    ("variant", "kind", "axes"),
    [("pooled", "pooled", 3), ("cls_query", "pooled", 3), ("gated", "gate", 3), ("bahdanau", "weights", 4)],
)
def test_variants_of_soft(variant, kind, axes):
    part = lively(model(f"{{use: soft, with: {{variant: {variant}}}}}", depth=1))
    (one,) = collect(part, images()).maps
    assert one.kind == kind and one.weights.ndim == axes
    matrix = one.matrix()
    assert matrix.shape == (2, 4, 65, 65)
    if kind == "pooled":
        assert torch.equal(matrix[:, :, 3], one.weights) and torch.equal(matrix[:, :, 0], one.weights)
    if kind == "gate":
        assert torch.equal(matrix.diagonal(dim1=2, dim2=3), 65 * one.weights) and matrix[0, 0, 1, 2] == 0


def test_a_flat_soft_map():
    part = model("soft", depth=1)
    nn.init.zeros_(part.blocks[0].attn.inner.score_weight)
    (one,) = collect(part, images()).maps
    torch.testing.assert_close(one.weights, torch.full((2, 4, 65), 1 / 65))
    assert one.statistics()["entropy"] == pytest.approx(1)


MASKS = {
    "free": Mask(),
    "causal": Mask(causal=True),
    "keys": Mask(keys=torch.arange(11)[None] < torch.tensor([[11], [4]])),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [11, 3])
@pytest.mark.parametrize("channels", [4, 5, 16])
def test_the_implied_map_is_exact(mask, queries, channels):
    """11 keys are no multiple of any width, so that the last one-hot values are padded."""
    q = torch.randn(2, 3, queries, channels, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, 11, channels, dtype=torch.float64)
    site = Site("here", 3 * channels, 3, Layout((11,)))
    for head in (EluLinear(site), Softmax(site)):
        context = {"mask": MASKS[mask], "layout": site.layout}
        found = implied_map(head, q, k, v, **context)
        assert found.shape == (2, 3, queries, 11)
        torch.testing.assert_close(found @ v, head(q, k, v, **context), rtol=0, atol=1e-10)
        if mask == "keys":
            assert (found[1, :, :, 4:] == 0).all() and (found[0, :, :, 4:] > 0).all()


class Swapping(Head):
    """Linear in the values, and swaps channels."""

    card = card(laws={Law.LINEAR_IN_VALUES})

    def attend(self, q, k, v, *, mask, layout):
        return v.mean(dim=2, keepdim=True).flip(-1).expand_as(q)


class Cubing(Swapping):
    """Not linear in the values."""

    card = card()


class Slotted(Head):
    """Weights over slots, not tokens; `twice` looks through its tap again."""

    card = card(taps={"weights": "b h n r"})

    @classmethod
    def claims(cls, *, axes, **options):
        return replace(cls.card, taps={"weights": axes})

    def __init__(self, site, *, axes="b h n r", twice=False):
        super().__init__(site)
        self.twice = twice

    def attend(self, q, k, v, *, mask, layout):
        weights = self.weights((q @ k.mT).softmax(dim=-1))
        return (self.weights(weights) if self.twice else weights) @ v


class Collected(Head):
    """Two slots collect from the tokens, and tokens from the slots; axes in an order of their own."""

    card = card(taps={"weights_in": "b h m r", "weights": "h b n r"}, laws={Law.STOCHASTIC})

    def attend(self, q, k, v, *, mask, layout):
        inward = self.weights_in((q[:, :, :2] @ k.mT).softmax(dim=-1).mT).mT
        outward = self.weights((q @ q[:, :, :2].mT).softmax(dim=-1).transpose(0, 1)).transpose(0, 1)
        return outward @ (inward @ v)


def test_slots_are_multiplied_away():
    part = One(Collected)
    images = torch.randn(2, 1, 5, 6)
    (found,) = collect(part, images).maps
    assert found.kind == "weights" and found.weights.shape == (2, 2, 5, 5)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 2, 5))
    v = part.mix.project(images[:, 0])[2]
    expected = part.mix.merge(found.weights @ v)
    torch.testing.assert_close(expected, part(images))


@pytest.mark.parametrize(
    ("head", "options", "said"),
    [
        (Swapping, {}, "mixes channels as well"),
        (Cubing, {}, "not linear in the values"),
        (Slotted, {}, "axes b h n r"),
        (Slotted, {"axes": "b h n m", "twice": True}, "2 times"),
    ],
)
def test_reasons(head, options, said):
    found = collect(One(head, **options), torch.randn(1, 1, 5, 6))
    assert not found.maps and said in found.absent[0].reason, found.absent[0].reason
    with pytest.raises(ZooError, match=said) as caught:
        rollout(found)
    assert caught.value.code == "AZ903"


def test_a_model_without_mechanisms():
    with pytest.raises(ZooError) as caught:
        collect(nn.Linear(3, 3), torch.randn(1, 3))
    assert caught.value.code == "AZ903" and "Linear" in str(caught.value)


def test_hooks_go_when_the_model_fails():
    part = One(Softmax).train()
    with pytest.raises(Exception):  # noqa: B017 - whatever it is, nothing is left behind
        collect(part, torch.randn(1, 1, 5, 7))
    assert part.training and not part.mix.inner._forward_hooks and not part.mix.inner.weights.watched


def test_head_split_gives_each_branch_its_own_heads():
    found = collect(model("{fuse: head_split, of: [softmax, elu_linear]}", depth=1), images(1))
    assert [one.heads for one in found.maps] == [2, 2]


def test_what_the_answer_asks():
    rows = torch.arange(25.0).view(1, 5, 5)
    some = {"maps": (), "absent": (), "sites": (), "logits": torch.zeros(1, 2), "layout": Layout((2, 2), 1)}
    by_token, by_mean = Maps(**some, class_token=True), Maps(**some, class_token=False)
    assert by_token.asked(rows).tolist() == [[[1, 2], [3, 4]]]
    assert by_mean.asked(rows).tolist() == [[[13.5, 14.5], [15.5, 16.5]]]


def test_global_pooling_is_noticed():
    found = collect(model("softmax", depth=1, global_pool="avg"), images(1))
    assert not found.class_token
    torch.testing.assert_close(
        found.on_grid(found.maps[0]), found.maps[0].weights[:, :, 1:, 1:].mean(dim=2).view(1, 4, 8, 8)
    )


def test_the_mean_map_of_the_paper():
    """HAM, figures 5 to 7: the class token's row, mean over all layers and heads, eight by eight."""
    found = collect(lively(model(HAM)), images())
    softmax = torch.cat([one.weights[:, :, 0, 1:] for one in found.maps if one.branch == "softmax"], dim=1)
    soft = torch.cat([one.weights[:, :, 1:] for one in found.maps if one.branch == "soft"], dim=1)
    torch.testing.assert_close(mean_map(found, "softmax"), softmax.mean(dim=1).view(2, 8, 8))
    torch.testing.assert_close(mean_map(found, "soft"), soft.mean(dim=1).view(2, 8, 8))
    torch.testing.assert_close(mean_map(found, "soft", layer=1), soft[:, 4:].mean(dim=1).view(2, 8, 8))
    assert mean_map(found, "elsewhere").isnan().all()


def test_rollout_of_identities_is_the_identity():
    eye = torch.eye(4, dtype=torch.float64)[None]
    assert torch.equal(roll([eye] * 3), eye)


def test_rollout_of_even_maps():
    even = torch.full((1, 4, 4), 0.25, dtype=torch.float64)
    wanted = torch.eye(4, dtype=torch.float64) / 8 + (1 - 1 / 8) * even
    torch.testing.assert_close(roll([even] * 3), wanted, rtol=0, atol=1e-15)


def test_rollout_divides_rows_by_their_own_sums():
    """After discarding, rows do not sum to 1; dividing columns instead gives 0.2632."""
    a = torch.tensor([[[0.5, 0.5], [0.0, 0.9]]], dtype=torch.float64)
    torch.testing.assert_close(roll([a]), torch.tensor([[[0.75, 0.25], [0.0, 1.0]]], dtype=torch.float64))


def test_one_layer_of_rollout_is_half_residual():
    a = torch.rand(2, 3, 3, dtype=torch.float64).softmax(dim=-1)
    torch.testing.assert_close(roll([a]), (a + torch.eye(3)) / 2)


def test_later_layers_come_from_the_left():
    first = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # all look at token 0
    second = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])  # all look at token 1
    wanted = torch.tensor([[0.5, 0.5], [0.0, 1.0]]) @ torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(roll([first, second])[0], wanted)


def test_heads_are_fused_elementwise():
    heads = torch.tensor([[[[0.2, 0.8]], [[0.6, 0.4]]]])
    for fusion, wanted in (("mean", [0.4, 0.6]), ("max", [0.6, 0.8]), ("min", [0.2, 0.4])):
        torch.testing.assert_close(fuse_heads(heads, fusion), torch.tensor([[wanted]]))


def test_every_image_is_discarded_from_and_token_0_keeps_itself():
    first = torch.tensor([[0.1, 0.9], [0.2, 0.8]])
    both = discard(torch.stack([first, first.flip(1)]), 0.5)
    assert torch.equal(both[0], torch.tensor([[0.1, 0.9], [0.0, 0.8]]))
    assert torch.equal(both[1], torch.tensor([[0.9, 0.0], [0.8, 0.0]]))
    assert torch.equal(discard(first[None], 0.0)[0], first)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("ratio", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("attention", [HAM, NESTED])
def test_rows_of_a_rollout_sum_to_1(fusion, ratio, attention):
    rolled = rollout(collect(lively(model(attention)), images()), fusion, ratio)
    torch.testing.assert_close(rolled.sum(dim=-1), torch.ones(2, 65))
    assert (rolled >= 0).all() and (rolled[:, range(65), range(65)] > 0).all()


def test_branches_are_averaged_after_their_heads():
    found = collect(lively(model(HAM)), images())
    self_map, soft_map = (one.matrix() for one in found.maps if one.layer == 0)
    wanted = (self_map.amax(dim=1) + soft_map.amax(dim=1)) / 2
    torch.testing.assert_close(layer_maps(found, "max")[0], wanted)
    torch.testing.assert_close(rollout(found, layer=0), roll([layer_maps(found)[0]]))


class Contrast(Swapping):
    """What a token receives is the mean minus twice its own value: a signed map."""

    def attend(self, q, k, v, *, mask=None, layout):
        return v.mean(dim=2, keepdim=True) - 2 * v


def test_signed_maps_enter_by_their_absolute_value():
    found = collect(One(Contrast), torch.randn(1, 1, 5, 6))
    signed = 0.2 - 2 * torch.eye(5)
    torch.testing.assert_close(found.maps[0].weights[0, 1], signed)
    torch.testing.assert_close(layer_maps(found)[0][0], signed.abs())


def test_a_gate_moves_nothing():
    found = collect(lively(model("{use: soft, with: {variant: gated}}")), images(1))
    torch.testing.assert_close(rollout(found)[0], torch.eye(65))


def test_a_layer_without_a_map_is_its_residual():
    text = SMALL.format(attention="softmax", depth=2) + 'overrides: [{at: "blocks.1", put: fourier}]\n'
    found = collect(compose(text), images())
    assert [one.site for one in found.absent] == ["blocks.1"] and "without weights" in found.absent[0].reason
    torch.testing.assert_close(rollout(found), rollout(found, layer=0))


@pytest.mark.parametrize("layer", [-1, 2])
def test_no_such_layer(layer):
    with pytest.raises(ZooError) as caught:
        rollout(collect(model("softmax"), images(1)), layer=layer)
    assert caught.value.code == "AZ904" and "the model has 2" in str(caught.value)
