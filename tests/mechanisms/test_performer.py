"""Performer (FAVOR+), arXiv:2009.14794, §2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, wrong

from attnzoo.core import Layout, Mask
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.linear.performer import Performer
from attnzoo.testing import against


@against(Performer)
def test_oracle(component, options, q, k, v, allowed):
    """Query by query: features of the query and of the keys that it sees, a weight for each key, their mean of v."""
    (b, h, n, d), m, w = q.shape, k.shape[2], component.projection
    eps = options["eps"] or {"softmax": 1e-6, "relu": 1e-3}[options["kernel"]]
    out = torch.zeros_like(q)

    def inner(x):
        """Of one token: what is exponentiated, or rectified, for each feature."""
        x = x / d**0.25
        return w @ x if options["kernel"] == "relu" else w @ x - x @ x / 2

    def features(of):
        """Of tokens that share a stabiliser, (tokens r)."""
        return (of * (of > 0) if options["kernel"] == "relu" else torch.exp(of - of.max())) + eps

    for s, g in torch.cartesian_prod(torch.arange(b), torch.arange(h)).tolist():
        keys = torch.stack([inner(k[s, g, j]) for j in range(m)])
        for i in range(n):
            see = allowed[s, g, i]
            if see.any():
                weights = features(keys[see]) @ features(inner(q[s, g, i]))
                out[s, g, i] = weights @ v[s, g, see] / weights.sum()
    return out


def attending(change):
    """The head with its inputs changed."""

    def attend(self, q, k, v, *, mask, layout):
        q, k, v, mask = change(q, k, v, mask)
        return Performer.attend(self, q, k, v, mask=mask, layout=layout)

    return wrong(Performer, attend=attend)


def plainly(self, q, k, v, *, mask, layout, square=True, last=True, eps=None, padding=0.0, norm=True):
    """The equations with all pairs, and faults in them."""
    eps = self.eps if eps is None else eps
    if self.kernel == "relu":
        features = [(x * x.shape[-1] ** -0.25 @ self.projection.T).relu() for x in (q, k)]
    else:
        q, k = q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25
        logs = [x @ self.projection.T - square * x.square().sum(-1, keepdim=True) / 2 for x in (q, k)]
        there = torch.ones_like(logs[1], dtype=torch.bool)
        if mask.keys is not None:
            there = there & mask.keys[:, None, :, None]
        most = logs[1].masked_fill(~there, -1e9).amax((-1, -2), keepdim=True)
        features = [(logs[0] - logs[0].amax(-1, keepdim=True)).exp(), (logs[1] - most).exp()]
    allowed = mask.dense(q.shape[2], k.shape[2])
    pairs = (features[0] + eps) @ (features[1] + eps).mT
    if allowed is not None:
        pairs = torch.where(allowed, pairs, padding)
    total = pairs.sum(-1, keepdim=True)
    return pairs @ v / (torch.where(total > 0, total, 1.0) if norm else 1.0)


def with_fault(**fault):
    """The plain form with one fault; its stabiliser is, causal or not, that of all keys."""
    return wrong(
        Performer,
        attend=lambda self, q, k, v, *, mask, layout: plainly(
            self, q, k, v, mask=mask, layout=layout, **fault
        ),
    )


def aligned_first(self, q, k, v, *, mask, layout):
    """The first query with the first key, where lengths differ."""
    n = min(q.shape[2], k.shape[2])
    if not mask.causal or q.shape[2] >= k.shape[2]:
        return Performer.attend(self, q, k, v, mask=mask, layout=layout)
    keys = None if mask.keys is None else mask.keys[:, :n]
    mask = Mask(keys=keys, causal=True)
    return Performer.attend(self, q[:, :, -n:], k[:, :, :n], v[:, :, :n], mask=mask, layout=layout)


def test_the_form_without_a_fault_is_not_caught():
    """Where the stabiliser has no say."""
    assert test_oracle.compare(with_fault(), options=lambda o: o.get("kernel") == "relu", examples=30).ok


MUTANTS = {
    "the stabiliser of later keys": with_fault(),
    "scaled by √d": attending(lambda q, k, v, mask: (q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25, v, mask)),
    "not scaled": attending(lambda q, k, v, mask: (q * q.shape[-1] ** 0.25, k * k.shape[-1] ** 0.25, v, mask)),
    "no square": with_fault(square=False),
    "no ε": with_fault(eps=0.0),
    "not normalised": with_fault(norm=False),
    "padding has the features ε": with_fault(padding=1e-6),
    "keys ignored": attending(lambda q, k, v, mask: (q, k, v, Mask(causal=mask.causal))),
    "not causal": attending(lambda q, k, v, mask: (q, k, v, Mask(keys=mask.keys))),
    "causal by one too few": attending(
        lambda q, k, v, mask: (q, k.roll(1, 2), v.roll(1, 2), mask) if mask.causal else (q, k, v, mask)
    ),
    "values masked, keys not": attending(
        lambda q, k, v, mask: (q, k, v if mask.keys is None else v * mask.keys[:, None, :, None], Mask(causal=mask.causal))
    ),
    "aligned with the first key": wrong(Performer, attend=aligned_first),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def one_feature(value=1.0, **options):
    """One channel, one feature, W = value."""
    part = Performer(place(1), features=1, **options).double()
    part.projection.fill_(value)
    return part


def test_hand_one_feature():
    """k = (0, 1): exponents (0, 1/2); the query has no say, as there is one feature."""
    out = one_feature(eps=1e-300)(row(3, -5), row(0, 1), row(0, 1), layout=Layout((2,)))
    near(out, [math.e**0.5 / (1 + math.e**0.5)] * 2)


def test_hand_eps():
    """φ(k) = (e^-½ + ½, 1 + ½)."""
    out = one_feature(eps=0.5)(row(3, -5), row(0, 1), row(0, 1), layout=Layout((2,)))
    near(out, [1.5 / (2 + math.e**-0.5)] * 2)


def test_hand_relu():
    """φ(k) = (0 + 10⁻³, 2 + 10⁻³)."""
    out = one_feature(kernel="relu")(row(1), row(-1, 2), row(1, 0), layout=Layout((2,)))
    near(out, [0.001 / 2.002])


def test_hand_causal_stabilisers():
    """The first query sees the key 0 alone, the second both: its own greatest exponent, 1/2, scales them."""
    out = one_feature(eps=0.5)(row(0, 0), row(0, 1), row(2, 4), mask=Mask(causal=True), layout=Layout((2,)))
    small, large = math.e**-0.5 + 0.5, 1.5
    near(out, [2, (2 * small + 4 * large) / (small + large)])


@pytest.mark.parametrize("d,features", [(64, 266), (12, 29), (2, 1), (1, 1)])
def test_hand_number_of_features(d, features):
    part = Performer(place(d))
    assert part.projection.shape == (features, d) and count(part) == 0


def estimate(part, x, y):
    """φ(x)ᵀ φ(y) without ε, for tokens that are not scaled, feature by feature."""
    scale = x.shape[-1] ** 0.25
    (one, log), (other, more) = (
        part.features(scale * x[None, None, None]),
        part.features(scale * y[None, None, None]),
    )
    return (one * other * (log + more).exp()).flatten()


def test_hand_of_zeros_the_estimate_is_one():
    zero = torch.zeros(4).double()
    near(estimate(Performer(place(4), features=7).double(), zero, zero), torch.ones(7))


# Identities


def drawn(d, features, **options):
    """W drawn in float64."""
    part = Performer(place(d), features=features, **options).double()
    part.init_weights()
    return part


@pytest.mark.parametrize("norms", ["random", "fixed"])
def test_identity_rows_of_a_block_are_orthogonal(norms):
    w = drawn(5, 13, norms=norms).projection
    for block in w.split(5):
        gram = block @ block.T
        near(gram - gram.diagonal().diag(), torch.zeros_like(gram))
    lengths = w.norm(dim=-1)
    assert (
        (lengths.std() > 0.2)
        if norms == "random"
        else torch.allclose(lengths, torch.tensor(5.0).double().sqrt())
    )


def test_rows_are_as_gaussian_vectors():
    """No direction is preferred, which QR alone would do, and squared norms are d on average."""
    w = drawn(3, 30_000).projection
    near(w.mean(0), torch.zeros(3), 0.03)
    near(w.T @ w / 30_000, torch.eye(3), 0.05)


def test_identity_the_mean_estimate_is_the_exponential_of_the_product():
    torch.manual_seed(0)
    x, y = torch.tensor([0.5, -0.3, 0.2, 0.4]).double(), torch.tensor([0.1, 0.6, -0.5, 0.3]).double()
    found = estimate(drawn(4, 200_000), x, y)
    near(found.mean() / torch.exp(x @ y), 1.0, 0.01)
    fixed = estimate(drawn(4, 200_000, norms="fixed"), x, y)
    assert abs(fixed.mean() / torch.exp(x @ y) - 1) > 0.01  # biased


def test_identity_orthogonal_features_vary_less_than_independent_ones():
    """By 8 features of 4 channels each; independent ones have (e^{2 z²} e^{-z² / 2} - e^{z² / 2}) / 8, z = 2 ‖x‖ = 1."""
    torch.manual_seed(0)
    part, x = drawn(4, 320_000), torch.full((4,), 0.25).double()
    orthogonal = estimate(part, x, x).reshape(-1, 8).mean(1).var()
    part.projection.normal_()
    independent = estimate(part, x, x).reshape(-1, 8).mean(1).var()
    near(independent, (math.exp(1.5) - math.exp(0.5)) / 8, 0.02)
    assert orthogonal < 0.93 * independent


def test_identity_with_many_features_it_is_softmax():
    torch.manual_seed(0)
    site = place(8, 2, 6)
    q, k, v = 0.7 * normal(3, 2, 2, 6, 4)
    wanted, off = Softmax(site)(q, k, v, layout=site.layout), []
    for features in (16, 256, 40_000):
        part = Performer(site, features=features).double()
        off.append(float((part(q, k, v, layout=site.layout) - wanted).abs().mean()))
    assert off[0] > off[1] > off[2] and off[2] < 0.01


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("n,m", [(50, 50), (20, 50), (50, 33), (1, 40), (64, 64)])
def test_identity_causal_prefix_sums_are_a_triangle(kernel, n, m):
    """Over several chunks, with absent keys and exponents that grow: row i is what query i alone gets of its keys."""
    part = Performer(place(8, 2, m), features=6, kernel=kernel, eps=0.01).double()
    q, k, v = (
        normal(1, 2, n, 4),
        normal(1, 2, m, 4) * torch.linspace(4, 0.1, m).double()[:, None],
        normal(1, 2, m, 4),
    )
    keys = torch.rand(1, m) < 0.8
    found = part(q, k, v, mask=Mask(keys=keys, causal=True), layout=Layout((m,)))
    for i in range(n):
        end = i + 1 + m - n
        if end <= 0:
            assert not found[:, :, i].any()
            continue
        mask = Mask(keys=keys[:, :end])
        alone = part(q[:, :, i : i + 1], k[:, :, :end], v[:, :, :end], mask=mask, layout=Layout((end,)))
        near(found[:, :, i], alone[:, :, 0], 1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_implied_weights_are_stochastic(causal):
    part = Performer(place(9, 1, 9)).double()
    q, k = normal(2, 1, 1, 9, 9)
    weights = part(q, k, torch.eye(9).double()[None, None], mask=Mask(causal=causal), layout=Layout((9,)))
    assert (weights >= 0).all() and (not causal or not weights.triu(1).any())
    near(weights.sum(-1), torch.ones(1, 1, 9))


def test_w_travels_in_the_state_dict():
    site = place(8, 2, 5)
    one, two = Performer(site).double(), Performer(site).double()
    q, k, v = normal(3, 1, 2, 5, 4)
    before = two(q, k, v, layout=site.layout)
    two.load_state_dict(one.state_dict())
    wanted = one(q, k, v, layout=site.layout)
    assert torch.equal(two(q, k, v, layout=site.layout), wanted) and not torch.allclose(before, wanted)


def test_narrow_numbers_stay_near():
    narrow(Performer, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
