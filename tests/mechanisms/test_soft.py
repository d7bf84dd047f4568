"""HAM's soft attention in its four variants."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, wrong
from torch import nn

from attnzoo.core import Layout, Mask
from attnzoo.fusions.add import Add
from attnzoo.fusions.hadamard import Hadamard
from attnzoo.mechanisms.additive.soft import Soft
from attnzoo.testing import against


def pooled_map(component, h, v, there):
    """u_j = tanh(V_j W + b), α = softmax_j(u_j · w) over the tokens that exist."""
    w, bias, score = component.value_weight[h], component.value_bias[h], component.score_weight[h]
    return torch.stack([score @ torch.tanh(v[j] @ w + bias) for j in there]).softmax(0)


def pair_map(component, h, query, k, there):
    """α = softmax_j(w · tanh(K_j W₁ + Q W₂)) over the tokens that are seen."""
    w1, w2, score = component.key_weight[h], component.query_weight[h], component.score_weight[h]
    return torch.stack([score @ torch.tanh(k[j] @ w1 + query @ w2) for j in there]).softmax(0)


@against(Soft)
def test_oracle(component, options, q, k, v, allowed, keys):
    """Head by head, token by token."""
    variant, out = options["variant"], torch.zeros_like(q)
    for b in range(q.shape[0]):
        there = keys[b].nonzero().flatten().tolist()
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                see = there
                if variant == "bahdanau":
                    see = allowed[b, h, i].nonzero().flatten().tolist()
                if not see:
                    continue
                if variant == "gated":
                    alpha = pooled_map(component, h, v[b, h], see)
                    scale = len(see) if options["gate_scale"] == "tokens" else 1
                    if i in see:
                        out[b, h, i] = scale * alpha[see.index(i)] * v[b, h, i]
                    continue
                if variant == "pooled":
                    alpha = pooled_map(component, h, v[b, h], see)
                else:
                    asks = q[b, h, 0 if variant == "cls_query" else i]
                    alpha = pair_map(component, h, asks, k[b, h], see)
                out[b, h, i] = alpha @ v[b, h, see]
    return out


def attending(change):
    """The head with its inputs changed."""

    def attend(self, q, k, v, *, mask, layout):
        return Soft.attend(self, *change(q, k, v), mask=mask, layout=layout)

    return wrong(Soft, attend=attend)


def over_channels(self, v):
    """A score for each channel rather than each token."""
    return torch.einsum("bhmd,hd->bhm", v, self.value_weight.mean(2)).tanh()


def no_bias(self, v):
    with torch.no_grad():
        self.value_bias.zero_()
    return Soft._value_scores(self, v)


def of_all_tokens(self, q, k, v, *, mask, layout):
    """`gated` times all tokens, padded ones too."""
    out = Soft.attend(self, q, k, v, mask=mask, layout=layout)
    if self.variant != "gated" or mask.keys is None or self.gate_scale == "one":
        return out
    return out / mask.keys.sum(1).clamp(min=1)[:, None, None, None] * v.shape[2]


MUTANTS = {
    "W₁ and W₂ swapped": attending(lambda q, k, v: (k, q, v) if q.shape == k.shape else (2 * q, k, v)),
    "keys for values": attending(lambda q, k, v: (q, k, k)),
    "the last token asks": attending(lambda q, k, v: (q.flip(2), k, v)),
    "the network without its bias": wrong(Soft, _value_scores=no_bias),
    "no network": wrong(Soft, _value_scores=over_channels),
    "the mask ignored": wrong(
        Soft,
        attend=lambda self, q, k, v, *, mask, layout: Soft.attend(self, q, k, v, mask=Mask(), layout=layout),
    ),
    "padding counts as tokens": wrong(Soft, attend=of_all_tokens),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def soft(variant: str, **options) -> Soft:
    """One head of one channel whose scores are e = (0, ln 3) for V = (1, 3)."""
    head = Soft(place(1), variant=variant, **options).double()
    with torch.no_grad():  # u = tanh(V): choose w and b so that e = w tanh(V - 1)
        head.value_weight.fill_(1)
        head.value_bias.fill_(-1)
        head.score_weight.fill_(math.log(3) / math.tanh(2))
    return head


def test_hand_case():
    v, layout = row(1, 3), Layout((2,))
    near(seen(soft("pooled"), v, v, v, layout=layout), [0.25, 0.75])
    near(soft("pooled")(v, v, v, layout=layout), [2.5, 2.5])
    near(soft("gated", gate_scale="one")(v, v, v, layout=layout), [0.25, 2.25])
    near(soft("gated", gate_scale="tokens")(v, v, v, layout=layout), [0.5, 4.5])


@pytest.mark.parametrize("fusion,wanted", [(Hadamard, [5, 7.5]), (Add, [4.5, 5.5])])
def test_hand_in_a_head_of_ham(fusion, wanted):
    v = row(1, 3)
    s = soft("pooled")(v, v, v, layout=Layout((2,)))
    near(fusion(place(1), 2)([row(2, 3), s], v), wanted)


@pytest.mark.parametrize("variant,number", [
    ("pooled", 2 * (9 + 3 + 3)), ("gated", 2 * (9 + 3 + 3)), ("bahdanau", 2 * (9 + 9 + 3)), ("cls_query", 2 * (9 + 9 + 3)),
])  # fmt: skip
def test_hand_parameters(variant, number):
    assert count(Soft(place(6, 2), variant=variant)) == number


def test_weights_start_from_a_normal_distribution_and_biases_at_zero():
    part = Soft(place(64, 2), hidden=40)
    assert 0.018 < part.value_weight.std() < 0.022 and not part.value_bias.any()
    assert part.no_weight_decay() == {"value_bias"}


# Identities


@pytest.mark.parametrize("variant", ["pooled", "bahdanau", "cls_query"])
def test_identity_w_zero_gives_the_mean_of_the_values(variant):
    head = Soft(place(6, 2, 5), variant=variant).double()
    nn.init.zeros_(head.score_weight)
    q, k, v = normal(3, 2, 2, 5, 3)
    near(head(q, k, v, layout=Layout((5,))), v.mean(dim=2, keepdim=True).expand_as(v).tolist())


def test_identity_gated_by_tokens_with_w_zero_gives_the_values_themselves():
    head = Soft(place(8, 2, 5), variant="gated").double()
    nn.init.zeros_(head.score_weight)
    q, k, v = normal(3, 2, 2, 5, 4)
    near(head(q, k, v, layout=Layout((5,))), v)


@pytest.mark.parametrize("variant", ["pooled", "gated", "cls_query"])
def test_it_is_one_map(variant):
    head = Soft(place(6, 2, 5), variant=variant).double()
    q, k, v = normal(3, 2, 2, 5, 3)
    weights = seen(head, q, k, v, layout=Layout((5,)))
    assert weights.shape == (2, 2, 5)
    near(weights.sum(-1), torch.ones(2, 2))


def test_identity_samples_alone_even_when_there_are_as_many_as_tokens():
    head = Soft(place(6, 2, 5), variant="pooled").double()
    q, k, v = normal(3, 5, 2, 5, 3)
    together = head(q, k, v, layout=Layout((5,)))
    alone = torch.cat([head(q[i : i + 1], k[i : i + 1], v[i : i + 1], layout=Layout((5,))) for i in range(5)])
    near(together, alone.tolist())
    assert torch.linalg.matrix_rank(together.flatten(0, 1)).max() == 1


@pytest.mark.parametrize("variant", ["pooled", "gated", "bahdanau", "cls_query"])
def test_no_samples_give_none(variant):
    q, k, v = normal(3, 0, 2, 5, 3)
    assert Soft(place(6, 2, 5), variant=variant).double()(q, k, v, layout=Layout((5,))).shape == (0, 2, 5, 3)


def test_padded_tokens_get_no_share_of_the_pool():
    head = Soft(place(6, 2, 5)).double()
    q, k, v = normal(3, 1, 2, 5, 3)
    keys = torch.tensor([[True, False, True, True, False]])
    weights = seen(head, q, k, v, mask=Mask(keys=keys), layout=Layout((5,)))
    assert torch.equal(weights[..., ~keys[0]], torch.zeros(1, 2, 2, dtype=torch.float64))
    near(head(q, k, v, mask=Mask(keys=keys), layout=Layout((5,))), head(q, k[..., keys[0], :], v[..., keys[0], :], layout=Layout((3,))).tolist())  # fmt: skip


@pytest.mark.parametrize("variant", ["pooled", "gated", "bahdanau", "cls_query"])
def test_narrow_numbers_stay_near(variant):
    narrow(Soft, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7), variant=variant)
