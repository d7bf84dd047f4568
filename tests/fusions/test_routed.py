"""A router sends each token to a few of the branches, arXiv:1701.06538, §2, and arXiv:2101.03961, eq. 1-6."""

import math

import pytest
import torch
from by_hand import caught, count, from_first, line, near, normal, place, seen, spread, wrong
from torch.nn import functional as F

from attnzoo.core import FusedHeads, Layout, MultiHead, OptionError, auxiliary_losses, watch
from attnzoo.fusions.gated import Gated
from attnzoo.fusions.routed import Routed
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


def probabilities(weight, token):
    """softmax(W x) of one token, as a list."""
    powers = [torch.exp(row @ token) for row in weight]
    return [power / sum(powers) for power in powers]


@against(Routed)
def test_oracle(component, options, branches, x):
    """Σ gᵢ sᵢ over the best few, token by token."""
    width = x.shape[-1]
    rows, out = [branch.reshape(-1, width) for branch in branches], []
    for i, token in enumerate(x.reshape(-1, width)):
        p = probabilities(component.router.weight, token)
        best = sorted(range(len(p)), key=lambda e: -p[e].item())[: options["active"]]
        whole = sum(p[e] for e in best) if options["renormalise"] else 1
        out.append(sum(p[e] / whole * rows[e][i] for e in best))
    return from_first(component, options, branches, torch.stack(out).reshape(x.shape))


def gating(change):
    """Other gates, from the fusion and p."""

    def merge(self, branches, x):
        gate = change(self, self.router(x).softmax(-1))
        return sum(gate[..., i : i + 1] * branch for i, branch in enumerate(branches))

    return wrong(Routed, merge=merge)


def best(self, p, how=None):
    """The gates as they are, of other probabilities or with other ones chosen."""
    chosen = (p if how is None else how).topk(self.active, dim=-1).indices
    gate = torch.zeros_like(p).scatter(-1, chosen, 1.0) * p
    return gate / gate.sum(-1, keepdim=True) if self.renormalise else gate


MUTANTS = {
    "all": gating(lambda self, p: p),
    "the worst": gating(lambda self, p: best(self, p, -p)),
    "over the tokens": wrong(Routed, merge=lambda self, b, x: sum(
        g[..., None] * s for g, s in zip(best(self, self.router(x).softmax(-2)).unbind(-1), b, strict=True))),
    "always renormalised": gating(lambda self, p: F.normalize(best(self, p), p=1, dim=-1)),
    "never renormalised": gating(lambda self, p: torch.where(best(self, p) > 0, p, 0.0)),
    "the gate is 1": gating(lambda self, p: (best(self, p) > 0).double()),
    "one more is active": gating(lambda self, p: torch.where(p >= p.sort(-1, descending=True).values[..., min(self.active, self.arity - 1)][..., None], p, 0.0)),
    "the router learns nothing": gating(lambda self, p: best(self, p.detach())),
    "the first token routes all": wrong(Routed, merge=lambda self, b, x: Routed.merge(self, b, x[..., :1, :].expand_as(x))),
    "gamma ignored": wrong(Routed, merge_from_first=lambda self, b, x: self.merge(b, x)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def router(*weights, **options):
    """Of one channel, with a weight for each branch."""
    fusion = Routed(place(1), len(weights), **options).double()
    with torch.no_grad():
        fusion.router.weight.copy_(torch.tensor(weights, dtype=torch.float64)[:, None])
    return fusion


def test_hand_numbers():
    """Logits x (0, ln 2, ln 5): at x = 1 p is (1, 2, 5) / 8, at x = −1 (10, 5, 2) / 17."""
    weights, branches = (0.0, math.log(2), math.log(5)), [line(17, 17), line(34, 34), line(8, 8)]
    x = line(1, -1)
    near(router(*weights)(branches, x), [5, 10])
    near(router(*weights, active=2)(branches, x), [34 / 4 + 5, 20])
    near(router(*weights, active=2, renormalise=True)(branches, x), [(2 * 34 + 5 * 8) / 7, (2 * 17 + 34) / 3])


def test_hand_who_goes_where_is_seen():
    fusion = router(0.0, math.log(2), math.log(5), active=2)
    branches, x = [line(1, 1)] * 3, line(1, -1)
    near(
        seen(fusion, branches, x, tap="scores"),
        [[[0, math.log(2), math.log(5)], [0, -math.log(2), -math.log(5)]]],
    )
    near(seen(fusion, branches, x, tap="shares"), [[[1 / 8, 2 / 8, 5 / 8], [10 / 17, 5 / 17, 2 / 17]]])
    near(seen(fusion, branches, x, tap="gate"), [[[0, 2 / 8, 5 / 8], [10 / 17, 5 / 17, 0]]])


def test_hand_parameters():
    assert (
        count(Routed(place(6), 3)) == 3 * 6 and count(Routed(place(6), 3, active=2, start="identity")) == 24
    )


@pytest.mark.parametrize("active,f", [(1, [0.5, 0, 0.5]), (2, [0.5, 1, 0.5])])
def test_hand_balance(active, f):
    """k Σ P f of the two tokens above, with the best one or the best two."""
    fusion, x = router(0.0, math.log(2), math.log(5), active=active), line(1, -1)
    with auxiliary_losses(fusion) as extra:
        fusion([x] * 3, x)
    p = torch.tensor([[1 / 8, 2 / 8, 5 / 8], [10 / 17, 5 / 17, 2 / 17]], dtype=torch.float64)
    near(extra.mean(), 3 * sum(a * b for a, b in zip(p.mean(0).tolist(), f, strict=True)))


# Identities


@pytest.mark.parametrize("renormalise", [False, True])
def test_identity_with_all_active_it_is_the_gated_mixture(renormalise):
    branches = list(normal(3, 2, 4, 6))
    fusion, gated = (
        spread(Routed(place(6), 3, active=3, renormalise=renormalise)),
        Gated(place(6), 3).double(),
    )
    with torch.no_grad():
        gated.gate.weight.copy_(fusion.router.weight)
    near(fusion(branches, branches[1]), gated(branches, branches[1]))


def test_identity_a_token_alone_goes_where_it_goes_among_others():
    branches, x = list(normal(3, 2, 5, 6)), normal(2, 5, 6)
    fusion = spread(Routed(place(6), 3, active=2))
    whole = fusion(branches, x)
    for i in range(5):
        near(fusion([b[:, i : i + 1] for b in branches], x[:, i : i + 1]), whole[:, i : i + 1])


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    fusion = Routed(place(6), 3, start="identity").double()
    assert torch.equal(fusion(list(branches), branches[0]), branches[0])


# The loss, noise, and what it refuses


def test_where_all_are_active_there_is_nothing_to_balance():
    fusion, x = Routed(place(6), 2, active=2), torch.randn(2, 4, 6)
    with auxiliary_losses(fusion) as extra:
        fusion([x, x], x)
    assert extra.by_component() == {} and extra.mean() == 0


@pytest.mark.parametrize("inside", [False, True])
def test_the_loss_teaches_the_router_to_treat_branches_alike(inside):
    """A step along its gradient makes it less; inside the heads the tokens of all heads count."""
    torch.manual_seed(0)
    fusion = spread(Routed(place(6), 4))
    x = normal(2, 3, 20, 6) if inside else normal(2, 20, 6)
    losses = []
    for _ in range(30):
        with auxiliary_losses(fusion) as extra:
            fusion([x] * 4, x)
        losses.append(extra.mean())
        (gradient,) = torch.autograd.grad(extra.mean(), fusion.router.weight)
        with torch.no_grad():
            fusion.router.weight -= 0.3 * gradient
    assert losses[0] > losses[-1] and 0.9 < losses[-1] < 1.2


def test_a_model_offers_its_loss_under_its_name():
    site = place(8, 2, 5)
    part = MultiHead(site, FusedHeads(site, Routed, [Softmax, Softmax]))
    with auxiliary_losses(part) as extra:
        part(torch.randn(3, 5, 8), layout=Layout((5,)))
    assert list(extra.by_component()) == ["inner.fusion"] and extra.mean().requires_grad


def test_noise_comes_through_the_tap_or_not_at_all():
    """In training mode too, nothing is drawn; a hook on the scores sends tokens elsewhere."""
    fusion, x = spread(Routed(place(6), 3)).train(), normal(2, 5, 6)
    branches, state = list(normal(3, 2, 5, 6)), torch.get_rng_state()
    assert torch.equal(fusion(branches, x), fusion(branches, x)) and torch.equal(state, torch.get_rng_state())
    with watch(fusion, "scores", lambda name, scores: -scores):
        other = fusion(branches, x)
    assert not torch.allclose(other, fusion(branches, x))


@pytest.mark.parametrize("options,words", [({"active": 3}, "3 active of 2 branches"), ({"renormalise": True}, "one active branch, renormalised")])  # fmt: skip
def test_contradictions_are_refused(options, words):
    with pytest.raises(OptionError, match=f"AZ214.*{words}"):
        Routed(place(4), 2, **options)
