"""The random-feature attention layer, arXiv:2307.11353."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, MultiHead, OptionError
from attnzoo.functional import masked_softmax, merge_heads, split_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection.random_feature_layer import RandomFeatureLayer
from attnzoo.testing import against

ROOT = math.sqrt(2)


def extended(row, scaled):
    """x̃ of one token."""
    row = torch.cat([row, torch.ones(1).double()])
    return row * ROOT / row.square().sum().sqrt() if scaled else row


def shares(scores, relu):
    """a of the scores of the keys that may be attended to."""
    return scores.relu() / len(scores) if relu else scores.exp() / scores.exp().sum()


@against(RandomFeatureLayer, examples=6)
def test_oracle(component, options, x, source, allowed):
    """Query by query and key by key: ⟨W_h, x̃_i s̃_jᵀ⟩ is a sum of products; or head by head."""
    frozen = options["qk"] == "frozen"
    relu = (options["weights"] or ("softmax" if frozen else "relu")) == "relu"
    b, n, c = x.shape
    out = torch.zeros(b, n, c).double()
    for s in range(b):
        for i in range(n):
            if frozen:
                d, merged = c // component.heads, []
                values = component.v(source[s])
                for h in range(component.heads):
                    mine, see = slice(h * d, (h + 1) * d), allowed[s, h, i]
                    keys = source[s, see] @ component.k[mine].T
                    scores = keys @ (component.q[mine] @ x[s, i]) / math.sqrt(d)
                    merged.append(shares(scores, relu) @ values[see, mine])
                out[s, i] = component.proj(torch.cat(merged))
                continue
            query = extended(x[s, i], options["scaled"])
            keys = [extended(source[s, j], options["scaled"]) for j in allowed[s, 0, i].nonzero().flatten()]
            if not keys:
                continue
            scores = [(component.kernel * torch.outer(query, key)).sum((1, 2)) for key in keys]
            a = torch.stack([shares(one, relu) for one in torch.stack(scores, 1)])  # (features keys)
            v = component.proj.weight.unflatten(1, (len(a), -1))  # (c features e+1)
            out[s, i] = sum(torch.einsum("h,che,e->c", a[:, j], v, key) for j, key in enumerate(keys))
    return out


def of_kind(qk):
    """The oracle, asked about one form."""
    keep = lambda options: options.get("qk", "random") == qk  # noqa: E731
    return against(RandomFeatureLayer, examples=10, options=keep)(test_oracle.oracle)


test_oracle_of_random, test_oracle_of_biased, test_oracle_of_frozen = map(
    of_kind, ("random", "biased", "frozen")
)


def mean(scores, allowed):
    """The mean over the keys that may be attended to."""
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool) if allowed is None else allowed
    return (scores.relu() * allowed) / allowed.sum(-1, keepdim=True).clamp(min=1)


def mixing(
    extend=lambda part, x: part._extended(x),
    kernel=lambda w: w,
    weigh=None,
    mask=lambda mask: mask,
    value=lambda s: s,
    turned=False,
    scale=lambda part, d: d**-0.5,
):
    """The equations, without a fault or with one."""

    def mix(self, x, source, *, mask, layout, change=mask):
        allowed = change(mask).dense(x.shape[1], source.shape[1])
        form = weigh or (masked_softmax if self.softmax else mean)
        if self.qk == "frozen":
            q, k = (self.k, self.q) if turned and self.q.shape == self.k.shape else (self.q, self.k)
            q, k, v = (split_heads(t, self.heads) for t in (x @ q.T, source @ k.T, self.v(source)))
            return self.proj(merge_heads(form(q @ k.mT * scale(self, q.shape[-1]), allowed) @ v))
        x, s = extend(self, x), extend(self, source)
        scores = torch.einsum("bnc,hce,bme->bhnm", x, kernel(self.kernel), s)
        read = form(scores, allowed) @ value(s)[:, None]
        return self.proj(read.transpose(1, 2).flatten(2))

    return wrong(RandomFeatureLayer, mix=mix)


ORACLES = [test_oracle_of_random, test_oracle_of_biased, test_oracle_of_frozen]


@pytest.mark.parametrize("oracle", ORACLES, ids=("random", "biased", "frozen"))
def test_the_form_without_a_fault_is_not_caught(oracle):
    assert oracle.compare(mixing(), examples=6).ok


def without_one(part, x):
    return torch.cat([part._extended(x)[..., :-1], torch.zeros(*x.shape[:2], 1).double()], -1)


def unit(part, x):
    """x to length 1, and then x̃: the same for tokens of length 1 alone."""
    x = F.normalize(x, dim=-1) if part.scaled else x
    return F.pad(x, (0, 1), value=1.0)


def causal_off_by_one(mask):
    if not mask.causal or mask.pairs is not None:
        return mask
    return Mask(mask.keys, pairs=torch.ones(1, 1, 64, 64).tril(-1).bool())


def shifted(mask):
    """Causal, but a token does not see itself."""
    changed = causal_off_by_one(mask)

    class Cut:
        def dense(self, n, m):
            pairs = None if changed.pairs is None else changed.pairs[..., :n, :m]
            return Mask(changed.keys, pairs if changed is not mask else mask.pairs, changed.causal).dense(
                n, m
            )

    return Cut()


MUTANTS = {
    "no constant in x̃": (test_oracle_of_random, mixing(without_one)),
    "x brought to length 1, not x̃": (test_oracle_of_random, mixing(unit)),
    "never scaled": (test_oracle_of_biased, mixing(lambda part, x: F.pad(x, (0, 1), value=1.0))),
    "length 1, not √2": (
        test_oracle_of_random,
        mixing(lambda part, x: part._extended(x) / (ROOT if part.scaled else 1)),
    ),
    "W transposed": (test_oracle_of_biased, mixing(kernel=lambda w: w.mT)),
    "features in another order": (test_oracle_of_random, mixing(kernel=lambda w: w.roll(1, 0))),
    "one feature for all": (test_oracle_of_random, mixing(kernel=lambda w: w[:1].expand_as(w))),
    "diag(I, 0) left out": (
        test_oracle_of_biased,
        mixing(kernel=lambda w: w - torch.diag(torch.tensor([1.0] * (w.shape[1] - 1) + [0])).double()),
    ),
    "the sum, not the mean": (
        test_oracle_of_random,
        mixing(weigh=lambda s, allowed: s.relu() * (1 if allowed is None else allowed)),
    ),
    "the mean over padding too": (
        test_oracle_of_random,
        mixing(weigh=lambda s, allowed: s.relu() * (1 if allowed is None else allowed) / s.shape[-1]),
    ),
    "no ReLU": (test_oracle_of_random, mixing(weigh=lambda s, allowed: mean(s, allowed) - mean(-s, allowed))),
    "softmax over the queries": (test_oracle_of_frozen, mixing(weigh=lambda s, allowed: s.softmax(-2))),
    "softmax over the samples": (test_oracle_of_frozen, mixing(weigh=lambda s, allowed: s.softmax(0))),
    "never divided by √d": (test_oracle_of_frozen, mixing(scale=lambda part, d: 1.0)),
    "divided by √c": (test_oracle_of_frozen, mixing(scale=lambda part, d: (d * part.heads) ** -0.5)),
    "queries and keys swapped": (test_oracle_of_frozen, mixing(turned=True)),
    "the mask ignored": (test_oracle_of_random, mixing(mask=lambda mask: Mask())),
    "the mask ignored, in heads": (test_oracle_of_frozen, mixing(mask=lambda mask: Mask())),
    "causality ignored": (test_oracle_of_biased, mixing(mask=lambda mask: Mask(mask.keys, mask.pairs))),
    "causal off by one": (test_oracle_of_random, mixing(mask=shifted)),
}


@pytest.mark.parametrize("oracle,mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(oracle, mutant):
    caught(oracle, mutant)


def layer(dim=6, heads=1, tokens=5, context_dim=None, **options) -> RandomFeatureLayer:
    """In float64, with weights of a size that matters."""
    return spread(RandomFeatureLayer(place(dim, heads, tokens, context_dim=context_dim), **options))


def one_channel(value, kernel=((1.0, 0), (0, 0)), **options) -> RandomFeatureLayer:
    """One feature that compares one channel by its product, for a query and keys: v = (value)."""
    part = layer(1, features=1, weights="relu", scaled=False, **options)
    with torch.no_grad():
        part.kernel.copy_(torch.tensor([kernel]))
        part.proj.weight.copy_(torch.tensor([value]))
    return part


# By hand


@pytest.mark.parametrize("value,wanted", [((1.0, 0.0), 10 / 3), ((0.0, 1.0), 2), ((3.0, -1.0), 8)])
def test_hand_a_query_and_three_keys(value, wanted):
    """Query 2, keys 1, -3, 2: ReLU 2, 0, 4; v = (1, 0): (2 · 1 + 4 · 2) / 3; v = (0, 1): (2 + 4) / 3."""
    part = one_channel(value)
    tokens = torch.tensor([[[2.0], [1], [-3], [2]]]).double()
    mask = Mask(keys=torch.tensor([[False, True, True, True]]))
    near(part(tokens, mask=mask, layout=Layout((4,)))[0, 0], [wanted])


def test_hand_the_constants_have_their_places():
    """W = [[0, 2], [3, 5]]: x̃ᵀ W s̃ = 2 x + 3 s + 5; queries and keys 1, 4."""
    part = one_channel((1.0, 0.0), ((0, 2.0), (3, 5)))
    scores = seen(part, torch.tensor([[[1.0], [4]]]).double(), layout=Layout((2,)), tap="scores")
    near(scores, [[10, 19], [16, 25]])


def test_hand_scaled_to_a_length_of_the_root_of_two():
    """x = 0: x̃ = (0, √2); x = √3: x̃ = (√6, √2) / 2; x = 1 as it is."""
    part = layer(1, features=16)
    x = part._extended(torch.tensor([[[0.0], [math.sqrt(3)], [1]]], dtype=torch.float64))
    near(x, [[[0, ROOT], [math.sqrt(6) / 2, ROOT / 2], [1, 1]]])


def test_hand_biased_compares_by_the_inner_product():
    """Without the noise ⟨diag(I, 0), x̃ s̃ᵀ⟩ = x · s."""
    part = layer(3, qk="biased", features=2, scaled=False)
    part.kernel.zero_()
    part.kernel[:, range(3), range(3)] = 1
    x = normal(2, 5, 3)
    scores = seen(part, x, layout=Layout((5,)), tap="scores")
    near(scores, (x @ x.mT)[:, None].expand(2, 2, 5, 5))


@pytest.mark.parametrize("options,learned,frozen", [
    ({}, 16 * 8 * 9, 16 * 81), ({"features": 1000}, 1000 * 8 * 9, 1000 * 81),
    ({"qk": "biased", "features": 3}, 3 * 8 * 9, 3 * 81), ({"qk": "frozen"}, 2 * 64 + 2 * 8, 2 * 64),
])  # fmt: skip
def test_hand_parameters(options, learned, frozen):
    """M c (c + 1) numbers are learned, c of the paper's v; M (c + 1)² are frozen; of MHA half is frozen."""
    part = RandomFeatureLayer(place(8, 4), **options)
    assert count(part) == learned and sum(b.numel() for b in part.buffers()) == frozen


def test_what_is_frozen_is_drawn_as_the_paper_says():
    random = RandomFeatureLayer(place(40), features=40).kernel
    assert abs(random.var() - 0.25) < 0.01 and abs(random.mean()) < 0.01
    biased = RandomFeatureLayer(place(40), features=40, qk="biased").kernel
    near(biased.mean(0) - torch.diag(torch.tensor([1.0] * 40 + [0])), torch.zeros(41, 41), 0.5)
    assert (
        abs(biased.diagonal(dim1=1, dim2=2)[:, :-1].mean() - 1) < 0.06 and abs(biased[:, -1, -1].mean()) < 0.3
    )
    heads = RandomFeatureLayer(place(64, 4), qk="frozen")
    assert all(abs(matrix.var() * 64 - 1) < 0.1 for matrix in (heads.q, heads.k))
    assert not torch.equal(heads.q, heads.k)


# Identities


def test_identity_scores_are_standard_normal_where_the_papers_inputs_lie():
    """‖x̃ s̃ᵀ‖² = 4 and the entries of W have variance 1/4; there `scaled` changes nothing."""
    x = F.normalize(normal(1, 4, 16), dim=-1)
    part = layer(16, features=2000)
    scores = seen(part, x, layout=Layout((4,)), tap="scores")
    assert (scores.mean((0, 1)).abs() < 0.1).all() and ((scores.var(1) - 1).abs() < 0.15).all()
    plain = layer(16, features=2000, scaled=False)
    plain.load_state_dict(part.state_dict())
    near(plain(x, layout=Layout((4,))), part(x, layout=Layout((4,))), 1e-11)


@pytest.mark.parametrize("qk", ["random", "biased"])
def test_identity_the_order_of_the_keys_has_no_say(qk):
    part, x, context = layer(context_dim=6, qk=qk), normal(2, 3, 6), normal(2, 7, 6)
    out = part(x, context, layout=Layout((3,)))
    near(part(x, context[:, torch.randperm(7)], layout=Layout((3,))), out, 1e-11)


def test_identity_it_is_linear_in_what_is_learned():
    part, x = layer(), normal(2, 5, 6)
    state, other = part.proj.weight.detach().clone(), normal(*part.proj.weight.shape)
    outs = []
    for weight in (state, other, 2 * state - 3 * other):
        with torch.no_grad():
            part.proj.weight.copy_(weight)
        outs.append(part(x, layout=Layout((5,))))
    near(outs[2], 2 * outs[0] - 3 * outs[1], 1e-11)


def features_of(part, x, context):
    """Φ_h = Σ_j a_hj s̃_j of every query, side by side: (b n h*(e+1))."""
    weights = seen(part, x, context, layout=Layout((x.shape[1],)))
    return (weights @ part._extended(context)[:, None]).transpose(1, 2).flatten(2)


def ridge(phi, y, strength):
    return torch.linalg.solve(phi.T @ phi + strength * torch.eye(phi.shape[1]).double(), phi.T @ y)


def test_identity_training_is_ridge_regression():
    """Gradient descent on ‖f − y‖² + λ ‖v‖² ends in (ΦᵀΦ + λ I)⁻¹ Φᵀ y, and what is frozen stays."""
    part = layer(2, context_dim=2)
    x, context, y, before = normal(60, 1, 2), normal(60, 4, 2), normal(60, 1, 2), part.kernel.clone()
    wanted = ridge(features_of(part, x, context).flatten(0, 1), y.flatten(0, 1), 5.0)
    steps = torch.optim.LBFGS(
        part.parameters(),
        max_iter=100,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss():
        steps.zero_grad()
        out = (part(x, context, layout=Layout((1,))) - y).square().sum()
        out = out + 5.0 * part.proj.weight.square().sum()
        out.backward()
        return out

    steps.step(loss)
    near(part.proj.weight.T, wanted, 1e-7)
    assert torch.equal(part.kernel, before)


def test_identity_a_mean_that_is_not_zero_helps_with_correlations():
    """The target Σ_j ⟨x, s_j⟩ ⟨β, s_j⟩ / m is learned better from 200 samples with diag(I, 0) in the mean of W."""
    x, context = (F.normalize(normal(500, n, 8), dim=-1) for n in (1, 4))
    y, errors = (x @ context.mT @ context @ F.normalize(normal(8), dim=0))[:, 0] / 4, {}
    for qk in ("random", "biased"):
        phi = features_of(layer(8, context_dim=8, qk=qk, features=100), x, context)[:, 0]
        fits = (ridge(phi[:200], y[:200], strength) for strength in (0.1, 1.0, 10.0, 100.0))
        errors[qk] = min((phi[200:] @ fit - y[200:]).square().mean() for fit in fits)
    assert errors["biased"] < 0.9 * errors["random"], errors


@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=True), Mask(keys=torch.tensor([[1, 0, 1, 1, 0]] * 2).bool())]
)
def test_identity_frozen_is_multi_head_attention_that_does_not_learn_whom_to_look_at(mask):
    site = place(6, 3, 5)
    part, multi = layer(6, 3, qk="frozen"), spread(MultiHead(site, Softmax(site)))
    with torch.no_grad():
        multi.qkv.weight.copy_(torch.cat([part.q, part.k, part.v.weight]))
        multi.qkv.bias.copy_(torch.cat([torch.zeros(12).double(), part.v.bias]))
        multi.proj.load_state_dict(part.proj.state_dict())
    x = normal(2, 5, 6)
    near(part(x, mask=mask, layout=site.layout), multi(x, mask=mask, layout=site.layout), 1e-11)


@pytest.mark.parametrize("weights", ["relu", "softmax"])
def test_identity_heads_are_features(weights):
    """W_h = W_Q W_Kᵀ / √d of a head, with nothing about the constants, and V_h = W_O W_V, with its bias."""
    heads = layer(6, 3, qk="frozen", weights=weights)
    many = layer(6, 3, features=3, weights=weights, scaled=False)
    with torch.no_grad():
        many.kernel.zero_()
        for h in range(3):
            mine = slice(2 * h, 2 * h + 2)
            many.kernel[h, :6, :6] = heads.q[mine].T @ heads.k[mine] / ROOT
            value = torch.cat([heads.v.weight[mine], heads.v.bias[mine, None]], 1)
            many.proj.weight[:, 7 * h : 7 * h + 7] = heads.proj.weight[:, mine] @ value
    x = normal(2, 5, 6)
    near(many(x, layout=Layout((5,))) + heads.proj.bias, heads(x, layout=Layout((5,))), 1e-11)


@pytest.mark.parametrize("options", [{}, {"qk": "biased", "weights": "softmax"}, {"qk": "frozen"}], ids=str)
def test_identity_padding_is_a_shorter_input_and_a_causal_row_the_last_of_those_so_far(options):
    part, x = layer(6, 2, **options), normal(2, 5, 6)
    keys = torch.tensor([[True, False, True, True, False]]).expand(2, 5)
    out = part(x, mask=Mask(keys=keys), layout=Layout((5,)))[:, keys[0]]
    near(out, part(x[:, keys[0]], layout=Layout((3,))), 1e-11)
    rows = [part(x[:, : i + 1], layout=Layout((i + 1,)))[:, -1] for i in range(5)]
    near(part(x, mask=Mask(causal=True), layout=Layout((5,))), torch.stack(rows, 1), 1e-11)


@pytest.mark.parametrize("options", [{}, {"weights": "softmax"}, {"qk": "frozen"}], ids=str)
def test_where_nobody_may_be_attended_to_there_is_nothing_but_a_bias(options):
    part, x = layer(6, 2, **options), normal(2, 5, 6).requires_grad_()
    out = part(x, mask=Mask(keys=torch.zeros(2, 5, dtype=torch.bool)), layout=Layout((5,)))
    near(out, torch.zeros(2, 5, 6) if part.proj.bias is None else part.proj.bias.expand(2, 5, 6))
    out.sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in part.parameters())


@pytest.mark.parametrize("options", [{}, {"qk": "frozen"}], ids=str)
def test_what_is_frozen_is_saved_and_gets_no_gradient(options):
    part, other = layer(6, 2, **options), layer(6, 2, **options)
    assert dict(part.named_buffers()).keys() <= part.state_dict().keys()
    assert not any(b.requires_grad for b in part.buffers())
    other.load_state_dict(part.state_dict())
    x = normal(2, 5, 6)
    near(other(x, layout=Layout((5,))), part(x, layout=Layout((5,))))


def test_a_context_and_pairs_where_somebody_is_sure_to_hear():
    """A ReLU may be silent for all features, the fewer the likelier; a softmax never is."""
    for options, sure in (
        ({}, True), ({"features": 1000}, True), ({"features": 3}, False), ({"features": 3, "weights": "softmax"}, True),
        ({"qk": "frozen"}, True), ({"qk": "frozen", "weights": "relu"}, False),
    ):  # fmt: skip
        card = RandomFeatureLayer.card_for(**options)
        assert card.context == ("pairs" in card.masks) == sure and {"keys", "causal"} <= card.masks
        assert card.one_head == (options.get("qk") != "frozen")


@pytest.mark.parametrize(
    "options,fields",
    [
        ({"qk": "frozen", "features": 4}, {}),
        ({"qk": "frozen", "scaled": False}, {}),
        ({"qk": "biased"}, {"context_dim": 5}),
    ],
)
def test_refused(options, fields):
    with pytest.raises(OptionError):
        RandomFeatureLayer(place(6, 2, **fields), **options)


@pytest.mark.parametrize("options", [{}, {"qk": "biased", "weights": "softmax"}, {"qk": "frozen"}], ids=str)
def test_narrow_numbers_stay_near(options):
    narrow(RandomFeatureLayer, [(2, 7, 12)], site=place(12, 3, 7), **options)
