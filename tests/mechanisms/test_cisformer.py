"""Cisformer, arXiv:2508.04461."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, spread, wrong

from attnzoo.core import Layout, Mask, MultiHead
from attnzoo.errors import LayoutMismatch
from attnzoo.functional import masked_softmax, merge_heads, split_heads
from attnzoo.functional.expressive import expressive_weights
from attnzoo.mechanisms.dot_product.expressive import Expressive
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection.cisformer import Cisformer
from attnzoo.testing import against

KINDS = pytest.mark.parametrize("attention", ["softmax", "expressive", "extensive"])


@against(Cisformer)
def test_oracle(component, options, x, allowed):
    """Token by token, each with the matrices of its place; head by head, key by key."""
    (b, n, c), heads = x.shape, component.heads
    d = c // heads

    def at(i, t, weight, bias):
        return t @ weight[i] + (0 if bias is None else bias[i])

    samples = []
    for s in range(b):
        parts = [at(i, x[s, i], component.qkv, component.qkv_bias) for i in range(n)]
        rows = []
        for i in range(n):
            merged = []
            for h in range(heads):
                mine = slice(h * d, (h + 1) * d)
                see = [j for j in range(n) if allowed[s, h, i, j]]
                z = [(parts[i][:c][mine] * parts[j][c : 2 * c][mine]).sum() for j in see]
                if options["attention"] == "softmax":
                    e = [torch.exp(one / math.sqrt(d) - max(z).detach() / math.sqrt(d)) for one in z]
                else:
                    e = [one**2 / (1 + one**2) for one in z]
                total = 1 if options["attention"] == "extensive" else sum(e)
                mixed = [w / total * parts[j][2 * c :][mine] for w, j in zip(e, see, strict=True)]
                merged.append(sum(mixed, torch.zeros(d).double()))
            rows.append(at(i, torch.cat(merged), component.proj, component.proj_bias))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def mixing(
    place_of=lambda i, n: i, keys_at=lambda i, n: i, shared=False, scale=True, scaled=False, norm=None
):
    """The equations with a fault: of the places whose matrices are taken, or of the scores."""

    def mix(self, x, source, *, mask, layout):
        n, heads = x.shape[1], self.heads

        def by(t, weight, bias, at):
            at = torch.tensor([at(i, len(weight)) % len(weight) for i in range(n)])
            at = torch.zeros_like(at) if shared else at
            out = torch.stack([t[:, i] @ weight[at[i]] for i in range(n)], 1)
            return out if bias is None else out + bias[at]

        q = by(x, self.qkv, self.qkv_bias, place_of).chunk(3, -1)[0]
        k, v = by(x, self.qkv, self.qkv_bias, keys_at).chunk(3, -1)[1:]
        q, k, v = (split_heads(t, heads) for t in (q, k, v))
        allowed = mask.dense(n, n)
        if self.attention == "softmax":
            weights = masked_softmax((q * (q.shape[-1] ** -0.5 if scale else 1)) @ k.mT, allowed)
        else:
            z = (q * (q.shape[-1] ** -0.5 if scaled else 1)) @ k.mT
            weights = expressive_weights(
                z, allowed, norm or {"expressive": "row"}.get(self.attention, "none")
            )
        return by(merge_heads(weights @ v), self.proj, self.proj_bias, place_of)

    return wrong(Cisformer, mix=mix)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(mixing(), examples=20).ok


MUTANTS = {
    "one matrix for all": mixing(shared=True),
    "the place before": mixing(place_of=lambda i, n: i - 1),
    "from the end": mixing(place_of=lambda i, n: n - 1 - i, keys_at=lambda i, n: n - 1 - i),
    "keys of the next place": mixing(keys_at=lambda i, n: i + 1),
    "a softmax without a scale": mixing(scale=False),
    "squares of scaled products": mixing(scaled=True),
    "always divided": mixing(norm="row"),
    "never divided": mixing(norm="none"),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def cisformer(dim=6, heads=2, tokens=5, **options) -> Cisformer:
    """In float64, with weights of a size that matters."""
    return spread(Cisformer(place(dim, heads, tokens), **options))


# By hand


def test_hand_two_places():
    """q = k = x at both, values x and 2x, outputs times 1 and 10: z = 1, 1 at the first, 1, 1 at the second."""
    part = cisformer(1, 1, 2, attention="extensive")
    with torch.no_grad():
        part.qkv.copy_(torch.tensor([[[1.0, 1, 1]], [[1.0, 1, 2]]])), part.qkv_bias.zero_()
        part.proj.copy_(torch.tensor([[[1.0]], [[10.0]]])), part.proj_bias.zero_()
    x = torch.ones(1, 2, 1).double()
    near(part(x, layout=Layout((2,))), [[[0.5 * 1 + 0.5 * 2], [10 * (0.5 * 1 + 0.5 * 2)]]])


def test_hand_parameters():
    """As many times those of multi-head attention as there are positions."""
    site = place(8, 2, 7)
    plain = count(MultiHead(site, Softmax(site)))
    assert plain == 4 * 8 * 8 + 4 * 8 and count(Cisformer(site)) == 7 * plain


def test_hand_where_it_starts():
    part = Cisformer(place(64, 2, 50))
    for matrices in (part.qkv, part.proj):
        assert matrices.abs().max() <= 1 / 8 and abs(matrices.std() - 1 / 8 / 3**0.5) < 2e-3
    assert not part.qkv_bias.any() and not part.proj_bias.any()
    assert part.no_weight_decay() == {"qkv_bias", "proj_bias"}


# Identities


def tied(part, head):
    """The part with the matrices of the first position everywhere, and multi-head attention with the same."""
    plain = MultiHead(place(6, 2, 5), head).double()
    with torch.no_grad():
        for own in (part.qkv, part.proj, part.qkv_bias, part.proj_bias):
            own.copy_(own[:1].clone().expand_as(own))
        plain.qkv.weight.copy_(part.qkv[0].T), plain.qkv.bias.copy_(part.qkv_bias[0])
        plain.proj.weight.copy_(part.proj[0].T), plain.proj.bias.copy_(part.proj_bias[0])
    return plain


@KINDS
def test_identity_of_positions_that_are_tied_it_is_the_transformers(attention):
    norm = {"norm": "none"} if attention == "extensive" else {}
    head = Softmax(place(6, 2, 5)) if attention == "softmax" else Expressive(place(6, 2, 5), **norm)
    part, x = cisformer(attention=attention), normal(2, 5, 6)
    plain = tied(part, head)
    for mask in (
        Mask(),
        Mask(causal=True),
        Mask(keys=torch.tensor([[True, True, False, True, False]]).expand(2, 5)),
    ):
        near(part(x, mask=mask, layout=Layout((5,))), plain(x, mask=mask, layout=Layout((5,))))


@KINDS
def test_identity_a_causal_pass_is_many_short_ones(attention):
    part, x = cisformer(attention=attention), normal(2, 5, 6)
    out = part(x, mask=Mask(causal=True), layout=Layout((5,)))
    for i in range(5):
        near(out[:, i], part(x[:, : i + 1], layout=Layout((i + 1,)))[:, i])


@KINDS
def test_tokens_in_another_order_give_another_output(attention):
    part, x, order = cisformer(attention=attention), normal(1, 5, 6), [4, 2, 0, 1, 3]
    turned = part(x[:, order], layout=Layout((5,)))
    assert (turned - part(x, layout=Layout((5,)))[:, order]).abs().max() > 1e-2


def test_a_place_learns_from_its_own_token_alone():
    part, x = cisformer(), normal(2, 5, 6)
    part(x[:, :3], layout=Layout((3,))).square().sum().backward()
    learnt = part.qkv.grad.abs().amax((1, 2)) > 0
    assert learnt.tolist() == [True, True, True, False, False]


def test_more_tokens_than_it_was_built_for_are_refused():
    with pytest.raises(LayoutMismatch, match="AZ403.*at most 5 tokens; it was given 6"):
        cisformer()(normal(1, 6, 6), layout=Layout((6,)))


def test_norms_of_queries_and_keys_are_those_of_multi_head_attention():
    site = place(6, 2, 5, qk_norm=True)
    part, plain, x = spread(Cisformer(site)), MultiHead(site, Softmax(site)).double(), normal(2, 5, 6)
    plain.load_state_dict(tied(part, Softmax(site)).state_dict(), strict=False)
    (
        plain.q_norm.load_state_dict(part.q_norm.state_dict()),
        plain.k_norm.load_state_dict(part.k_norm.state_dict()),
    )
    near(part(x, layout=Layout((5,))), plain(x, layout=Layout((5,))))


@KINDS
def test_narrow_numbers_stay_near(attention):
    narrow(Cisformer, [(2, 7, 12)], site=place(12, 3, 7), attention=attention)
