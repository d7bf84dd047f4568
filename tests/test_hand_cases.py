"""Numbers that can be checked by hand, from the papers and from a page of arithmetic."""

import math

import pytest
import torch
from oracles.neighborhood import window_of
from torch import nn
from torch.nn import functional as F

from attnzoo.core import NO_MASK, Fused, Layout, Mask, MultiHead, Site, watch
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.functional import split_heads
from attnzoo.fusions.add import Add
from attnzoo.fusions.difference import Difference
from attnzoo.fusions.hadamard import Hadamard
from attnzoo.fusions.low_rank import LowRank
from attnzoo.mechanisms.additive.additive import Additive
from attnzoo.mechanisms.additive.luong_global import LuongGlobal
from attnzoo.mechanisms.additive.luong_local import LuongLocal
from attnzoo.mechanisms.additive.soft import Soft
from attnzoo.mechanisms.channel.squeeze_excite import SqueezeExcite
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.linear.elu_linear import EluLinear
from attnzoo.mechanisms.local.neighborhood import Neighborhood, windows
from attnzoo.mechanisms.mixing.fourier import Fourier
from attnzoo.mechanisms.projection.grouped_query import GroupedQuery


def place(dim: int, heads: int = 1, tokens: int = 2, **fields) -> Site:
    """A site for a line of tokens."""
    return Site("hand", dim, heads, Layout((tokens,)), **fields)


def row(*values: float) -> torch.Tensor:
    """One sample, one head, one channel, these tokens: (1 1 n 1)."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1, 1)


def line(*values: float) -> torch.Tensor:
    """One sample, one channel, these tokens: (1 n 1)."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1)


def near(found, wanted, tolerance: float = 1e-12) -> None:
    """Equal to a number that was worked out by hand."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double().reshape(wanted.shape), wanted, rtol=0, atol=tolerance)


def set_all(module: nn.Module, value: float) -> nn.Module:
    """Every parameter to one number, in float64."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def seen_weights(module: nn.Module, *inputs, **arguments) -> torch.Tensor:
    """The weights that the only tap of that name sees."""
    found = []
    with watch(module, "weights", lambda _, w: found.append(w.detach())):
        module(*inputs, **arguments)
    (weights,) = found
    return weights


# Scaled dot-product attention


def test_softmax_of_a_unit_query_on_unit_keys():
    q = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    keys = torch.eye(2, dtype=torch.float64)[None, None]
    out = Softmax(place(2))(q, keys, keys, layout=Layout((2,)))
    e = math.exp(1 / math.sqrt(2))
    near(out, [e / (e + 1), 1 / (e + 1)])
    near(out, [0.6698, 0.3302], 5e-5)


def test_a_zero_query_gives_the_mean_of_the_values():
    k, v = torch.randn(2, 1, 1, 5, 3, dtype=torch.float64)
    out = Softmax(place(3, tokens=5))(torch.zeros(1, 1, 1, 3, dtype=torch.float64), k, v, layout=Layout((5,)))
    near(out, v.mean(dim=2).reshape(-1).tolist())


def test_the_same_vector_added_to_every_key_changes_nothing():
    q, k, v = torch.randn(3, 2, 2, 4, 3, dtype=torch.float64)
    head, layout = Softmax(place(6, 2, 4)), Layout((4,))
    shift = torch.randn(3, dtype=torch.float64)
    near(head(q, k + shift, v, layout=layout), head(q, k, v, layout=layout))
    assert (head(q, k * 2, v, layout=layout) - head(q, k, v, layout=layout)).abs().max() > 1e-3


def test_the_key_bias_has_no_gradient():
    site = place(6, 2, 4)
    part = MultiHead(site, Softmax(site)).double()
    part(torch.randn(2, 4, 6, dtype=torch.float64), layout=site.layout).square().sum().backward()
    gradient = part.qkv.bias.grad
    assert gradient[6:12].abs().max() < 1e-14  # of the keys
    assert gradient[:6].abs().max() > 1e-6 and gradient[12:].abs().max() > 1e-6


def test_one_number_added_to_all_scores_changes_nothing():
    q, k, v = torch.randn(3, 1, 1, 4, 3, dtype=torch.float64)
    head = Softmax(place(3, tokens=4))
    plain = head(q, k, v, layout=Layout((4,)))
    with watch(head, "scores", lambda _, s: s + 7.0):
        near(head(q, k, v, layout=Layout((4,))), plain)


@pytest.mark.parametrize("bias,count", [(True, 4 * 48 * 48 + 4 * 48), (False, 4 * 48 * 48)])
def test_multi_head_attention_has_4_c_squared_parameters(bias, count):
    site = place(48, 4, qkv_bias=bias, proj_bias=bias)
    assert sum(p.numel() for p in MultiHead(site, Softmax(site)).parameters()) == count


def test_later_tokens_are_hidden_and_padded_ones_too():
    site = place(6, 2, 5)
    part = MultiHead(site, Softmax(site)).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    edited = x.clone()
    edited[:, 3] += 1
    causal = [part(t, mask=Mask(causal=True), layout=site.layout)[:, :3] for t in (x, edited)]
    near(causal[0] - causal[1], torch.zeros(1, 3, 6))
    keys = torch.tensor([[True, True, True, False, True]])
    padded = [part(t, mask=Mask(keys=keys), layout=site.layout)[:, [0, 1, 2, 4]] for t in (x, edited)]
    near(padded[0] - padded[1], torch.zeros(1, 4, 6))
    free = [part(t, layout=site.layout) for t in (x, edited)]
    assert (free[0] - free[1])[:, :3].abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_a_thousand_stay_finite_in_half_precision(dtype):
    q = torch.full((1, 1, 3, 4), 22.0, dtype=dtype)
    k = torch.stack([torch.full((4,), s, dtype=dtype) for s in (22.0, -22.0, 0.0)])[None, None]
    mask = Mask(keys=torch.tensor([[True, True, False]]))
    out = Softmax(place(4, tokens=3))(
        q, k, torch.ones(1, 1, 3, 4, dtype=dtype), mask=mask, layout=Layout((3,))
    )
    assert torch.equal(out, torch.ones_like(out))


# Bahdanau


def test_additive_scalar_case():
    part = set_all(Additive(place(1, context_dim=1)), 1.0)
    out = part(line(0), line(0, 1), layout=Layout((2,)))
    t = math.exp(math.tanh(1))
    near(out, [t / (1 + t)])
    near(seen_weights(part, line(0), line(0, 1), layout=Layout((2,))), [0.3183, 0.6817], 5e-5)


def test_additive_with_v_zero_is_the_mean_of_the_annotations():
    part = Additive(place(4, tokens=6)).double()
    nn.init.zeros_(part.score_weight)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    near(part(x, layout=Layout((6,))), x.mean(dim=1, keepdim=True).expand(-1, 6, -1).tolist())
    near(seen_weights(part, x, layout=Layout((6,))), torch.full((2, 1, 6, 6), 1 / 6, dtype=torch.float64))


def test_additive_minus_v_turns_the_ranking_round_and_weights_are_bounded():
    part = Additive(place(4, tokens=6), hidden=3).double()
    nn.init.normal_(part.score_weight)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    weights = seen_weights(part, x, layout=Layout((6,)))
    bound = math.exp(2 * float(part.score_weight.detach().abs().sum()))
    assert (weights.amax(-1) / weights.amin(-1)).max() <= bound
    with torch.no_grad():
        part.score_weight.neg_()
    turned = seen_weights(part, x, layout=Layout((6,)))
    assert torch.equal(weights.argsort(-1), turned.argsort(-1).flip(-1))


def test_additive_parameters():
    assert sum(p.numel() for p in Additive(place(4), hidden=3).parameters()) == 3 * 4 + 3 * 4 + 3
    assert (
        sum(p.numel() for p in Additive(place(4, context_dim=5), hidden=3).parameters())
        == 3 * 4 + 3 * 5 + 3 + 24
    )


# Luong


def test_luong_general_with_the_identity_is_dot():
    general, dot = (
        LuongGlobal(place(4, tokens=5)).double(),
        LuongGlobal(place(4, tokens=5), score="dot").double(),
    )
    general.load_state_dict({"general.weight": torch.eye(4), **dot.state_dict()})
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    near(general(x, layout=Layout((5,))), dot(x, layout=Layout((5,))).tolist())


def test_luong_concat_is_bahdanau_with_the_two_halves():
    luong, bahdanau = (
        LuongGlobal(place(4, tokens=5), score="concat", hidden=3).double(),
        Additive(place(4), hidden=3).double(),
    )
    bahdanau.load_state_dict(
        {name: luong.state_dict()[name] for name in ("query.weight", "key.weight", "score_weight")}
    )
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    c = bahdanau(x, layout=Layout((5,)))
    near(luong(x, layout=Layout((5,))), torch.tanh(luong.proj(torch.cat([c, x], -1))).tolist())


@pytest.mark.parametrize(
    "score,count", [("dot", 0), ("general", 16), ("concat", 2 * 4 * 3 + 3), ("location", 4 * 5)]
)
def test_luong_parameters(score, count):
    part = LuongGlobal(place(4, tokens=5), score=score, hidden=3)
    assert sum(p.numel() for p in part.parameters()) == count + 2 * 4 * 4


def test_luong_outputs_lie_between_minus_one_and_one():
    part = set_all(LuongGlobal(place(4, tokens=5)), 0.7)
    out = part(torch.randn(2, 5, 4, dtype=torch.float64), layout=Layout((5,)))
    assert out.abs().max() < 1


def test_luong_puts_the_context_vector_first():
    part = LuongGlobal(place(1, tokens=1, context_dim=1), score="dot").double()
    with torch.no_grad():
        part.proj.weight.copy_(torch.tensor([[1.0, 0.0]]))
    near(part(line(5), line(2), layout=Layout((1,))), [math.tanh(2)])


def test_luong_location_ignores_the_sources_and_refuses_more_than_it_knows():
    part = LuongGlobal(place(3, tokens=4, context_dim=3), score="location").double()
    x, one, two = torch.randn(3, 1, 4, 3, dtype=torch.float64)
    near(
        seen_weights(part, x, one, layout=Layout((4,))),
        seen_weights(part, x, two, layout=Layout((4,))).tolist(),
    )
    with pytest.raises(LayoutMismatch, match="AZ403.*5 tokens are more than the 4"):
        part(x, torch.randn(1, 5, 3, dtype=torch.float64), layout=Layout((5,)))


def test_luong_dot_refuses_another_width():
    with pytest.raises(RecipeError, match="AZ214"):
        LuongGlobal(place(4, context_dim=3), score="dot")


@pytest.mark.parametrize("window", [4, 5, 60])
def test_luong_local_with_a_wide_window_is_global(window):
    local, everywhere = (
        LuongLocal(place(4, tokens=5), window=window).double(),
        LuongGlobal(place(4, tokens=5)).double(),
    )
    local.load_state_dict(everywhere.state_dict())
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    near(local(x, layout=Layout((5,))), everywhere(x, layout=Layout((5,))).tolist())


def predictive(tokens: int, window: int) -> LuongLocal:
    """local-p with p = S / 2 (its network is zero) and equal scores."""
    return set_all(LuongLocal(place(1, tokens=tokens), alignment="predictive", window=window), 0.0)


def test_luong_predictive_factors():
    weights = seen_weights(predictive(4, 2), line(1, 1, 1, 1), layout=Layout((4,)))[0, 0, 0]  # p = 2
    near(weights * 4, [math.exp(-2), math.exp(-0.5), 1, math.exp(-0.5)])  # |s - p| = 2, 1, 0, 1
    near(weights * 4, [0.1353, 0.6065, 1, 0.6065], 5e-5)


def test_luong_predictive_six_positions():
    part = LuongLocal(place(1, tokens=6), alignment="predictive", window=2).double()
    with torch.no_grad():  # p = 6 σ(v tanh(1)) = 2.5
        part.general.weight.zero_()
        part.position.weight.fill_(1)
        part.position_weight.fill_(math.log(2.5 / 3.5) / math.tanh(1))
    weights = seen_weights(part, line(1, 1, 1, 1, 1, 1), layout=Layout((6,)))[0, 0, 0]
    near(weights, [0, 0.0812, 0.2206, 0.2206, 0.0812, 0], 5e-5)
    near(weights.sum(), 0.6036, 7e-5)


def test_luong_predictive_counts_the_positions_that_exist():
    keys = torch.tensor([[True, True, False, False]])
    weights = seen_weights(predictive(4, 2), line(1, 1, 1, 1), mask=Mask(keys=keys), layout=Layout((4,)))[
        0, 0, 0
    ]
    near(weights * 2, [math.exp(-0.5), 1, 0, 0])  # p = 2 / 2


def test_luong_predictive_gradient_reaches_the_position():
    part = LuongLocal(place(4, tokens=5), alignment="predictive", window=3).double()
    part(torch.randn(1, 5, 4, dtype=torch.float64), layout=Layout((5,))).sum().backward()
    assert part.position.weight.grad.abs().max() > 0 and part.position_weight.grad.abs().max() > 0


# Linear attention


def test_elu_linear_one_third():
    out = EluLinear(place(1), eps=1e-12)(row(0), row(0, 1), row(1, 0), layout=Layout((2,)))
    near(out, [1 / 3], 1e-11)


def test_elu_feature_of_minus_one():
    out = EluLinear(place(1), eps=1e-12)(row(0), row(-1, 0), row(1, 0), layout=Layout((2,)))
    near(out, [math.exp(-1) / (math.exp(-1) + 1)], 1e-11)
    near(out / (1 - out), [0.3679], 5e-5)


def test_elu_linear_rows_sum_to_a_little_less_than_one():
    out = EluLinear(place(1), eps=0.5)(row(0), row(0, 1), row(1, 1), layout=Layout((2,)))
    near(out, [3 / 3.5])


def test_elu_linear_depends_on_the_size_of_the_query():
    q, k, v = torch.randn(3, 1, 1, 4, 3, dtype=torch.float64)
    head = EluLinear(place(3, tokens=4))
    assert (head(2 * q, k, v, layout=Layout((4,))) - head(q, k, v, layout=Layout((4,)))).abs().max() > 1e-3


# FNet


def test_fourier_two_by_two():
    out = Fourier(place(2))(torch.tensor([[[1.0, 2], [3, 4]]], dtype=torch.float64), layout=Layout((2,)))
    near(out, [[10, -2], [-4, 0]])


def test_fourier_of_a_delta_and_of_ones():
    part, layout = Fourier(place(4, tokens=3)), Layout((3,))
    delta = torch.zeros(1, 3, 4, dtype=torch.float64)
    delta[0, 0, 0] = 1
    near(part(delta, layout=layout), torch.ones(1, 3, 4))
    near(part(torch.ones(1, 3, 4, dtype=torch.float64), layout=layout), 12 * delta)


def test_fourier_is_cosines_minus_sines_symmetric_and_nearly_its_own_inverse():
    n, c = 5, 6
    x = torch.randn(1, n, c, dtype=torch.float64)
    part, layout = Fourier(place(c, tokens=n)), Layout((n,))
    out = part(x, layout=layout)
    angles = [2 * math.pi * torch.outer(torch.arange(k), torch.arange(k)).double() / k for k in (n, c)]
    near(out, angles[0].cos() @ x[0] @ angles[1].cos() - angles[0].sin() @ x[0] @ angles[1].sin())
    back = out.flip(1, 2).roll((1, 1), (1, 2))  # (-n, -c)
    near(out, back.tolist())
    near(part(out, layout=layout), n * c * (x + x.flip(1, 2).roll((1, 1), (1, 2))) / 2, 1e-11)
    ortho = Fourier(place(c, tokens=n), norm="ortho")(x, layout=layout)
    near(ortho * math.sqrt(n * c), out.tolist())


# Neighborhood attention


WINDOWS = [
    (8, {"window": 3}, "03 03 14 25 36 47 58 58"),
    (8, {"window": 4}, "04 04 04 15 26 37 48 48"),
    (8, {"window": 4, "stride": 2}, "04 04 15 15 37 37 48 48"),
    (8, {"window": 4, "stride": 4}, "04 04 04 04 48 48 48 48"),
    (8, {"window": 4, "stride": 2, "causal": True}, "01 02 03 04 25 26 47 48"),
]
"""Length, options, and start and end of each token's window."""


def keys_of(
    length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> list[list[int]]:
    """The keys that each token sees."""
    return [line.nonzero().flatten().tolist() for line in windows(length, window, stride, dilation, causal)]


@pytest.mark.parametrize("length,options,table", WINDOWS)
def test_neighborhood_windows(length, options, table):
    wanted = [list(range(int(pair[0]), int(pair[1]))) for pair in table.split()]
    assert keys_of(length, **options) == wanted
    assert [window_of(i, length, **options) for i in range(length)] == wanted


def test_neighborhood_dilated():
    keys = keys_of(7, 3, dilation=2)
    assert keys[0] == [0, 2, 4] and keys[6] == [2, 4, 6] and keys[5] == [1, 3, 5]


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_neighborhood_limits(length):
    assert windows(length, length, 1, 1, False).all()
    assert torch.equal(windows(length, length, 1, 1, True), torch.ones(length, length).tril().bool())
    for window in range(1, length + 1):
        for stride in range(1, window + 1):
            seen = windows(length, window, stride, 1, False)
            assert (seen.sum(dim=1) == window).all()
            assert torch.equal(seen[:-1:stride], seen[: length - 1 : stride])
            assert all(
                torch.equal(seen[i], seen[i - i % stride]) for i in range(length)
            )  # one stride, one window


def test_neighborhood_counts_on_a_plane_and_prefix_tokens():
    layout = Layout((4, 5), prefix=2)
    head = Neighborhood(Site("hand", 2, 1, layout), window=3)
    seen = head.neighbours(layout, torch.device("cpu"))[0, 0]
    assert seen[:2].all() and seen[:, :2].all()
    assert (seen[2:, 2:].sum(dim=1) == 9).all()
    assert seen[2, 2:].nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]


def test_neighborhood_with_the_whole_window_is_softmax():
    q, k, v = torch.randn(3, 1, 2, 13, 3, dtype=torch.float64)
    layout = Layout((3, 4), 1)
    site = Site("hand", 6, 2, layout)
    near(Neighborhood(site, window=4)(q, k, v, layout=layout), Softmax(site)(q, k, v, layout=layout).tolist())
    causal = Neighborhood(Site("hand", 6, 2, Layout((13,))), window=13, causal=True)
    wanted = Softmax(site)(q, k, v, mask=Mask(causal=True), layout=Layout((13,)))
    near(causal(q, k, v, layout=Layout((13,))), wanted.tolist())


def test_neighborhood_refuses_a_stride_longer_than_its_window():
    with pytest.raises(RecipeError, match="AZ214.*stride of 4.*window of 3"):
        Neighborhood(place(2), window=3, stride=4)


# Grouped queries


def groups(count: int, heads: int = 4, dim: int = 8) -> GroupedQuery:
    """Grouped-query attention in float64."""
    return GroupedQuery(place(dim, heads, 5), groups=count).double()


def test_as_many_groups_as_heads_is_multi_head_attention():
    site = place(8, 4, 5)
    part, multi = groups(4), MultiHead(site, Softmax(site)).double()
    with torch.no_grad():
        multi.qkv.weight.copy_(torch.cat([part.q.weight, part.kv.weight]))
        multi.qkv.bias.copy_(torch.cat([part.q.bias, part.kv.bias]))
        multi.proj.load_state_dict(part.proj.state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    near(part(x, layout=site.layout), multi(x, layout=site.layout).tolist())


@pytest.mark.parametrize("count", [1, 2])
def test_groups_are_multi_head_attention_with_repeated_weights(count):
    part, wide = groups(count), groups(4)
    wide.q.load_state_dict(part.q.state_dict())
    wide.proj.load_state_dict(part.proj.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            narrow = getattr(part.kv, name).unflatten(0, (2, count, 2))
            getattr(wide.kv, name).copy_(narrow.repeat_interleave(4 // count, dim=1).flatten(0, 2))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    near(part(x, layout=Layout((5,))), wide(x, layout=Layout((5,))).tolist())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_grouped_query_parameters(count):
    part = GroupedQuery(place(8, 4, qkv_bias=False, proj_bias=False), groups=count)
    assert sum(p.numel() for p in part.parameters()) == 8 * 8 * (2 + 2 * count / 4)


def test_grouped_query_deals_groups_to_neighbouring_heads():
    part = groups(2)
    with torch.no_grad():
        part.kv.weight.zero_()
        part.kv.bias.copy_(
            torch.tensor([0.0] * 4 + [1.0, 1, 2, 2])
        )  # values of group 0 are 1, of group 1 are 2
        part.proj.weight.copy_(torch.eye(8))
        part.proj.bias.zero_()
    out = part(torch.randn(1, 5, 8, dtype=torch.float64), layout=Layout((5,)))
    near(out[0, 0], [1, 1, 1, 1, 2, 2, 2, 2])  # heads 0, 0, 1, 1, 2, 2, 3, 3


def test_grouped_query_refuses_groups_that_do_not_divide():
    with pytest.raises(RecipeError, match="AZ214.*3 groups do not divide 4 heads"):
        groups(3)


# Squeeze-and-excitation


def test_squeeze_excite_with_zero_weights_halves():
    part = set_all(SqueezeExcite(place(16, tokens=5)), 0.0)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    near(part(x, layout=Layout((5,))), (x / 2).tolist())


def test_squeeze_excite_has_timms_parameters():
    part = SqueezeExcite(place(64))
    assert sum(p.numel() for p in part.parameters()) == 1096
    assert part.se.fc1.out_channels == 8


def test_squeeze_excite_gate_is_one_for_all_places_and_blind_to_their_order():
    part = SqueezeExcite(place(16, tokens=5), ratio=0.5).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    ratio = part(x, layout=Layout((5,))) / x
    near(ratio, ratio[:, :1].expand_as(ratio).tolist(), 1e-9)
    shuffled = part(x[:, [4, 2, 0, 1, 3]], layout=Layout((5,)))
    near(shuffled, part(x, layout=Layout((5,)))[:, [4, 2, 0, 1, 3]].tolist())


# Low-rank bilinear pooling


def bilinear(rank: int | None, activation: str, c: int = 3) -> LowRank:
    """The fusion with no biases."""
    fusion = LowRank(place(c), 2, rank=rank, activation=activation).double()
    for layer in (*fusion.down, fusion.up):
        nn.init.zeros_(layer.bias)
    return fusion


def test_low_rank_is_bilinear_without_activation():
    fusion = bilinear(2, "none")
    x, y = torch.randn(2, 3, dtype=torch.float64)
    u, v = (down.weight.T for down in fusion.down)  # (c r)
    for i, p in enumerate(fusion.up.weight):
        form = u @ torch.diag(p) @ v.T
        near(fusion([x, y], x)[i], (x @ form @ y).detach())
        assert torch.linalg.matrix_rank(form) <= 2


def test_low_rank_with_identities_is_a_dot_product():
    fusion = bilinear(None, "none")
    with torch.no_grad():
        for down in fusion.down:
            down.weight.copy_(torch.eye(3))
        fusion.up.weight.fill_(1)
    x, y = torch.randn(2, 3, dtype=torch.float64)
    near(fusion([x, y], x), [float(x @ y)] * 3)


@pytest.mark.parametrize("activation", ["tanh", "none"])
def test_low_rank_swaps_and_zeros(activation):
    fusion, swapped = bilinear(4, activation), bilinear(4, activation)
    swapped.load_state_dict(fusion.state_dict())
    swapped.down[0], swapped.down[1] = swapped.down[1], swapped.down[0]
    x, y = torch.randn(2, 3, dtype=torch.float64)
    near(swapped([y, x], x), fusion([x, y], x).tolist())
    near(fusion([x, torch.zeros(3, dtype=torch.float64)], x), [0, 0, 0])


def test_low_rank_parameters():
    fusion = LowRank(place(6), 2, rank=4)
    weights = sum(p.numel() for name, p in fusion.named_parameters() if name.endswith("weight"))
    assert weights == 4 * (6 + 6 + 6)
    assert sum(p.numel() for p in fusion.parameters()) == weights + 4 + 4 + 6


@pytest.mark.parametrize("layer,share", [(0, 0.2), (1, 0.3555), (2, 0.4707), (11, 0.7779)])
def test_difference_starts_where_the_paper_says(layer, share):
    near(Difference(place(4, layer=layer), 2).share, [share] * 4, 5e-5)


# HAM's soft attention


def soft(variant: str, **options) -> Soft:
    """One head of one channel whose scores are e = (0, ln 3) for V = (1, 3)."""
    head = Soft(place(1), variant=variant, **options).double()
    with torch.no_grad():  # u = tanh(V): choose w and b so that e = w tanh(V - 1)
        head.value_weight.fill_(1)
        head.value_bias.fill_(-1)
        head.score_weight.fill_(math.log(3) / math.tanh(2))
    return head


def test_soft_hand_case():
    v, layout = row(1, 3), Layout((2,))
    near(seen_weights(soft("pooled"), v, v, v, layout=layout), [0.25, 0.75])
    near(soft("pooled")(v, v, v, layout=layout), [2.5, 2.5])
    near(soft("gated", gate_scale="one")(v, v, v, layout=layout), [0.25, 2.25])
    near(soft("gated", gate_scale="tokens")(v, v, v, layout=layout), [0.5, 4.5])


@pytest.mark.parametrize("fusion,wanted", [(Hadamard, [5, 7.5]), (Add, [4.5, 5.5])])
def test_ham_hand_case(fusion, wanted):
    v = row(1, 3)
    s = soft("pooled")(v, v, v, layout=Layout((2,)))
    near(fusion(place(1), 2)([row(2, 3), s], v), wanted)


@pytest.mark.parametrize("variant", ["pooled", "bahdanau", "cls_query"])
def test_soft_with_w_zero_is_the_mean_of_the_values(variant):
    head = Soft(place(6, 2, 5), variant=variant).double()
    nn.init.zeros_(head.score_weight)
    q, k, v = torch.randn(3, 2, 2, 5, 3, dtype=torch.float64)
    near(head(q, k, v, layout=Layout((5,))), v.mean(dim=2, keepdim=True).expand_as(v).tolist())


@pytest.mark.parametrize("variant", ["pooled", "gated", "cls_query"])
def test_soft_is_one_map(variant):
    head = Soft(place(6, 2, 5), variant=variant).double()
    q, k, v = torch.randn(3, 2, 2, 5, 3, dtype=torch.float64)
    weights = seen_weights(head, q, k, v, layout=Layout((5,)))
    assert weights.shape == (2, 2, 5)
    near(weights.sum(-1), torch.ones(2, 2))


def test_soft_pooled_broadcasts_over_tokens_even_when_there_are_as_many_samples():
    head = Soft(place(6, 2, 5), variant="pooled").double()
    q, k, v = torch.randn(3, 5, 2, 5, 3, dtype=torch.float64)
    together = head(q, k, v, layout=Layout((5,)))
    alone = torch.cat([head(q[i : i + 1], k[i : i + 1], v[i : i + 1], layout=Layout((5,))) for i in range(5)])
    near(together, alone.tolist())
    assert torch.linalg.matrix_rank(together.flatten(0, 1)).max() == 1


def test_padded_tokens_get_no_share_of_the_pool():
    head = Soft(place(6, 2, 5)).double()
    q, k, v = torch.randn(3, 1, 2, 5, 3, dtype=torch.float64)
    keys = torch.tensor([[True, False, True, True, False]])
    weights = seen_weights(head, q, k, v, mask=Mask(keys=keys), layout=Layout((5,)))
    assert torch.equal(weights[..., ~keys[0]], torch.zeros(1, 2, 2, dtype=torch.float64))
    near(head(q, k, v, mask=Mask(keys=keys), layout=Layout((5,))), head(q, k[..., keys[0], :], v[..., keys[0], :], layout=Layout((3,))).tolist())  # fmt: skip


def test_ham_b_on_tokens_is_the_sum_of_two_mechanisms():
    site = place(6, 2, 5)
    fused = Fused(site, Add, [lambda s: MultiHead(s, Softmax(s)), lambda s: MultiHead(s, Soft(s))]).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    parts = [branch(x, mask=NO_MASK, layout=site.layout) for branch in fused.branches.values()]
    near(fused(x, layout=site.layout), (parts[0] + parts[1]).tolist())


def test_fused_kernel_and_explicit_form_agree():
    site = place(24, 3, 17)
    part = MultiHead(site, Softmax(site)).double()
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    fast = part(x, layout=site.layout)
    with watch(part, None, lambda *_: None):
        near(part(x, layout=site.layout), fast.tolist())
    q, k, v = (split_heads(t, 3) for t in part.qkv(x).chunk(3, dim=-1))
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    near(part.proj(wanted), fast.tolist())
