"""Synthesizer, arXiv:2005.00743, §3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, spread, wrong

from attnzoo.core import Layout, Mask, MultiHead, options_of
from attnzoo.errors import LayoutMismatch
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.mixing.synthesizer import Synthesizer, factors
from attnzoo.testing import against


def linear(layer, x):
    """W x + b of each row."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def small(net, h, x):
    """W₂ relu(W₁ x + b₁) + b₂ of head h."""
    hidden = x @ net.first[h] + net.first_bias[h]
    return torch.where(hidden > 0, hidden, 0.0) @ net.second[h] + net.second_bias[h]


@against(Synthesizer, examples=25)
def test_oracle(component, options, x, allowed):
    """Head by head and column by column, from the query's token or a table; softmax over what may be seen."""
    (b, n, c), heads, out = x.shape, component.heads, []
    d, kinds = c // heads, options["scores"].split("+")
    gamma = [1.0] if len(kinds) == 1 else component.shares.exp() / component.shares.exp().sum()
    for s in range(b):
        v, merged = linear(component.v, x[s]), []
        for h in range(heads):
            mine = slice(h * d, (h + 1) * d)
            see, scores = x[s] if options["sees"] == "full" else x[s][:, mine], torch.zeros(n, n).double()
            for share, kind in zip(gamma, kinds, strict=True):
                if kind == "dense":
                    made = small(component.nets[0], h, see)[:, :n]
                elif kind == "random":
                    made = component.table[h, :n, :n]
                elif kind == "factorised_random":
                    first, second = component.table[:, h]
                    made = torch.stack([first[:n] @ second[j] for j in range(n)], 1)
                elif kind == "factorised_dense":
                    f, g = (small(net, h, see) for net in component.nets)
                    made = torch.stack([f[:, j // g.shape[1]] * g[:, j % g.shape[1]] for j in range(n)], 1)
                else:
                    q, k = (t[:, mine] for t in linear(component.qk, x[s]).split(c, 1))
                    made = torch.stack([q @ k[j] / math.sqrt(d) for j in range(n)], 1)
                scores = scores + share * made
            for i in range(n):
                e = torch.exp(scores[i] - scores[i].max().detach()) * allowed[s, h, i]
                merged.append((e / e.sum() if e.any() else e) @ v[:, mine])
        out.append(
            linear(component.proj, torch.stack(merged).unflatten(0, (heads, n)).transpose(0, 1).flatten(1))
        )
    return torch.stack(out)


def mixing(change):
    """The mechanism with its scores, and the mask, changed."""

    def mix(self, x, source, *, mask, layout):
        (b, n, _), heads = x.shape, self.heads
        made = [self._scores(name, x, n).expand(b, -1, -1, -1) for name in self.sources]
        gamma = [1.0] if self.shares is None else list(self.shares.softmax(0))
        v = self.v(x).unflatten(2, (heads, -1)).transpose(1, 2)
        allowed = mask.dense(n, n)
        allowed = torch.ones(1, 1, n, n, dtype=torch.bool) if allowed is None else allowed
        made, gamma, allowed, over = change(self, made, gamma, allowed)
        scores = sum(g * m for g, m in zip(gamma, made, strict=True))
        weights = scores.masked_fill(~allowed, -1e30).softmax(over).masked_fill(~allowed, 0.0)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))

    return wrong(Synthesizer, mix=mix)


def tiled(self, f, g, n):
    """Both factors tiled: only lcm(α, β) different products."""
    length = f.shape[-1] * g.shape[-1]
    return (f.repeat(1, 1, 1, length // f.shape[-1]) * g.repeat(1, 1, 1, length // g.shape[-1]))[..., :n]


class Tiled(Synthesizer):
    def _scores(self, name, x, n):
        if name != "factorised_dense":
            return super()._scores(name, x, n)
        b, _, c = x.shape
        own = x[:, None] if self.full else x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return tiled(self, *(net(own) for net in self.nets), n)


class Turned(Synthesizer):
    def _scores(self, name, x, n):
        made = super()._scores(name, x, n)
        return made if name == "dot" else made.mT


class Last(Synthesizer):
    def _scores(self, name, x, n):
        return (
            super()._scores(name, x, self.length)[..., -n:, -n:]
            if name == "random"
            else super()._scores(name, x, n)
        )


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(mixing(lambda self, *same: (*same, -1)), examples=10).ok


MUTANTS = {
    "divided by √d": mixing(lambda self, m, g, a: ([t * (self.v.out_features // self.heads) ** -0.5 for t in m], g, a, -1)),
    "softmax over the queries": mixing(lambda self, m, g, a: (m, g, a, -2)),
    "softmax over the batch": mixing(lambda self, m, g, a: (m, g, a, 0)),
    "sums without shares": mixing(lambda self, m, g, a: (m, [1.0] * len(m), a, -1)),
    "equal shares": mixing(lambda self, m, g, a: (m, [1 / len(m)] * len(m), a, -1)),
    "the mask ignored": mixing(lambda self, m, g, a: (m, g, a | True, -1)),
    "the mask inverted": mixing(lambda self, m, g, a: (m, g, ~a, -1)),
    "both factors tiled": Tiled,
    "keys ask": Turned,
    "the last rows and columns": Last,
    "heads exchanged": mixing(lambda self, m, g, a: ([t.flip(1) for t in m], g, a, -1)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


ALL = [
    "dense", "random", "factorised_dense", "factorised_random",
    "random+dense", "random+dot", "dense+dot", "random+dense+dot",
]  # fmt: skip
FORMS = pytest.mark.parametrize("scores", ALL)


def synthesizer(dim=6, heads=2, tokens=5, **options) -> Synthesizer:
    """In float64, with weights of a size that matters."""
    return spread(Synthesizer(place(dim, heads, tokens), **options))


# By hand


def test_hand_random_scores():
    """R = (0, ln 3; ln 3, 0): weights (1/4, 3/4) and (3/4, 1/4) on the values 4 and 8, whatever x is besides."""
    part = synthesizer(1, 1, 2, scores="random")
    with torch.no_grad():
        part.table.copy_(torch.tensor([[[0, math.log(3)], [math.log(3), 0]]], dtype=torch.float64))
        for layer in (part.v, part.proj):
            layer.weight.fill_(1), layer.bias.zero_()
    near(part(torch.tensor([[[4.0], [8.0]]]).double(), layout=Layout((2,))), [[[7], [5]]])


def test_hand_dense_scores():
    """relu(x) and W₂ = (0, ln 3): a token of -1 looks at both alike, one of 1 at the second with 3/4."""
    part = synthesizer(1, 1, 2)
    with torch.no_grad():
        part.nets[0].first.fill_(1), part.nets[0].first_bias.zero_(), part.nets[0].second_bias.zero_()
        part.nets[0].second.copy_(torch.tensor([[[0, math.log(3)]]], dtype=torch.float64))
    near(
        seen(part, torch.tensor([[[-1.0], [1.0]]]).double(), layout=Layout((2,))),
        [[[[0.5, 0.5], [0.25, 0.75]]]],
    )


def test_hand_factors():
    """α β = N, each as near √N as may be; of primes a little more."""
    assert [factors(n) for n in (1, 2, 4, 24, 64, 65, 100)] == [
        (1, 1),
        (1, 2),
        (2, 2),
        (4, 6),
        (8, 8),
        (5, 13),
        (10, 10),
    ]
    assert [factors(n) for n in (5, 17, 197, 257)] == [(2, 3), (4, 5), (14, 15), (16, 17)]
    assert all(0 <= a * b - n <= n**0.5 for n in range(1, 400) for a, b in [factors(n)])


def test_hand_all_products_are_different():
    """Of 4 × 6 = 24 columns none is another; tiling both factors would leave 12."""
    part, x = synthesizer(tokens=24, scores="factorised_dense"), normal(1, 24, 6)
    scores = seen(part, x, tap="scores", layout=Layout((24,)))[0, 0, 0]
    assert len(torch.unique(scores.round(decimals=10))) == 24
    own = x.unflatten(2, (2, 3)).transpose(1, 2)
    wrongly = tiled(part, *(net(own) for net in part.nets), 24)[0, 0, 0]
    assert len(torch.unique(wrongly.round(decimals=10))) == 12


def test_hand_parameters():
    c, h, d, n, k = 8, 2, 4, 12, 3
    outer = 2 * (c * c + c)  # v and proj
    net = lambda width, out: h * (width * d + d + d * out + out)  # noqa: E731

    def of(**options):
        return count(Synthesizer(place(c, h, n), **options)) - outer

    assert of() == net(d, n) and of(sees="full") == net(c, n)
    assert of(scores="random") == h * n * n and of(scores="random", frozen=True) == 0
    assert (
        of(scores="factorised_random") == h * 2 * n * 8
        and of(scores="factorised_random", rank=k) == h * 2 * n * k
    )
    assert of(scores="factorised_dense") == net(d, 3) + net(d, 4)
    assert of(scores="random+dense+dot") == h * n * n + net(d, n) + 2 * (c * c + c) + 3


def test_hand_the_start():
    """Random scores of variance 1, of factors too; drawn again by a host's second start; shares are equal."""
    part = Synthesizer(place(8, 4, 100), scores="random+dense", frozen=True)
    before = part.table.clone()
    part.init_weights()
    assert not torch.equal(part.table, before) and abs(part.table.std() - 1) < 0.05
    assert not part.shares.any() and part.shares.requires_grad
    part = Synthesizer(place(8, 4, 100), scores="factorised_random", rank=5)
    product = (part.table[0] @ part.table[1].mT).detach()
    assert abs(product.std() - 1) < 0.1


def test_defaults():
    given = {"scores": "dense", "sees": "head", "frozen": False, "rank": 8}
    assert options_of(Synthesizer)().model_dump() == given


# Identities


@pytest.mark.parametrize("scores", ["random", "factorised_random"])
def test_identity_random_weights_do_not_know_the_tokens(scores):
    """All samples have the same weights, and the output is linear in x."""
    part, x, other = synthesizer(scores=scores), normal(3, 5, 6), normal(3, 5, 6)
    one, two = (seen(part, t, layout=Layout((5,))) for t in (x, other))
    near(one, two), near(one, one[:1].expand_as(one))

    def out(t):
        return part(t, layout=Layout((5,))) - part(torch.zeros_like(t), layout=Layout((5,)))

    near(out(2 * x - 3 * other), 2 * out(x) - 3 * out(other), 1e-11)


@pytest.mark.parametrize("scores", ["dense", "factorised_dense"])
def test_identity_a_token_has_a_say_in_its_own_row_of_weights_alone(scores):
    part, x = synthesizer(scores=scores), normal(1, 5, 6)
    other = x.clone()
    other[:, 3] += 1
    moved = (
        (seen(part, x, layout=Layout((5,))) - seen(part, other, layout=Layout((5,)))).abs().amax((0, 1, 3))
    )
    assert (moved > 0).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("scores", ["random+dense", "random+dot", "dense+dot", "random+dense+dot"])
def test_identity_one_share_alone_is_that_source(scores):
    part, x = synthesizer(scores=scores), normal(2, 5, 6)
    for i, name in enumerate(part.sources):
        with torch.no_grad():
            part.shares.fill_(-torch.inf)
            part.shares[i] = 0
        if name == "dot":
            plain = MultiHead(place(6, 2, 5), Softmax(place(6, 2, 5))).double()
            with torch.no_grad():
                plain.qkv.weight.copy_(torch.cat([part.qk.weight, part.v.weight]))
                plain.qkv.bias.copy_(torch.cat([part.qk.bias, part.v.bias]))
        else:
            plain = synthesizer(scores=name)
            plain.v.load_state_dict(part.v.state_dict())
            own = plain.state_dict()
            plain.load_state_dict(own | {k: t for k, t in part.state_dict().items() if k in own})
        plain.proj.load_state_dict(part.proj.state_dict())
        for mask in (Mask(), Mask(causal=True)):
            near(part(x, mask=mask, layout=Layout((5,))), plain(x, mask=mask, layout=Layout((5,))))


def test_identity_factors_of_full_rank_are_random():
    part, whole, x = (
        synthesizer(scores="factorised_random", rank=5),
        synthesizer(scores="random"),
        normal(2, 5, 6),
    )
    with torch.no_grad():
        whole.table.copy_(part.table[0])
        part.table[1].copy_(torch.eye(5).expand(2, 5, 5))
    for layer in ("v", "proj"):
        getattr(whole, layer).load_state_dict(getattr(part, layer).state_dict())
    near(part(x, layout=Layout((5,))), whole(x, layout=Layout((5,))))


@FORMS
def test_identity_fewer_tokens_are_padding_behind(scores):
    part, x = synthesizer(scores=scores), normal(2, 5, 6)
    keys = torch.tensor([[True, True, True, False, False]]).expand(2, 5)
    near(part(x, mask=Mask(keys=keys), layout=Layout((5,)))[:, :3], part(x[:, :3], layout=Layout((3,))))


@FORMS
def test_identity_a_causal_pass_is_many_short_ones(scores):
    part, x = synthesizer(scores=scores), normal(2, 5, 6)
    out = part(x, mask=Mask(causal=True), layout=Layout((5,)))
    for i in range(5):
        near(out[:, i], part(x[:, : i + 1], layout=Layout((i + 1,)))[:, i])


def test_tokens_in_another_order_give_another_output():
    part, x, order = synthesizer(scores="random"), normal(1, 5, 6), [4, 2, 0, 1, 3]
    turned = part(x[:, order], layout=Layout((5,)))
    assert (turned - part(x, layout=Layout((5,)))[:, order]).abs().max() > 1e-2


def test_more_tokens_than_it_was_built_for_are_refused():
    with pytest.raises(LayoutMismatch, match="AZ403.*at most 5 tokens; it was given 6"):
        synthesizer()(normal(1, 6, 6), layout=Layout((6,)))


@FORMS
def test_narrow_numbers_stay_near(scores):
    narrow(Synthesizer, [(2, 7, 12)], site=place(12, 3, 7), scores=scores)
