"""LAMA, arXiv:1912.00835, §3."""

import math

import pytest
import torch
from by_hand import caught, count, near, normal, place, seen, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask
from attnzoo.errors import RecipeError
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.latent.lama import Lama
from attnzoo.testing import against


def linear(layer, x):
    """W x + b."""
    return layer.weight @ x + (0 if layer.bias is None else layer.bias)


@against(Lama, examples=30)
def test_oracle(component, options, x, keys):
    """Token by token, map by map: f = tanh(1ᵀ(P_iᵀ g ∘ Q_iᵀ u)) over their norm; softmax over tokens; W of all maps."""
    (b, n, c), maps, rank, out = x.shape, options["maps"], options["rank"], []
    for s in range(b):
        there = [x[s, t] for t in range(n) if keys[s, t]]
        if options["context"] == "learned":
            g = component.vector
        else:
            g = sum(there) / len(there) if there else None
        scores = []
        for token in there:
            u = torch.tanh(linear(component.hidden, token)) if options["mlp"] else token
            f = []
            for i in range(maps):
                mine = slice(i * rank, (i + 1) * rank)
                left, right = component.left.weight[mine], component.right.weight[mine]
                f.append(torch.tanh(sum((left[j] @ g) * (right[j] @ u) for j in range(rank))))
            length = torch.sqrt(sum(v**2 for v in f))
            scores.append([v / length for v in f])
        pooled = []
        for i in range(maps):
            weights = torch.stack([f[i] for f in scores]).softmax(0) if there else []
            pooled.append(
                sum((w * token for w, token in zip(weights, there, strict=True)), torch.zeros(c).double())
            )
        out.append(linear(component.proj, torch.cat(pooled)))
    return torch.stack(out)


def pooled(
    part, x, mask, over=-1, norm=1, tanh=torch.tanh, hidden=torch.tanh, values=False, merge=False, all_=False
):
    """The equations with a fault."""
    keys = torch.ones_like(x[..., 0], dtype=torch.bool) if mask.keys is None else mask.keys
    g = part.vector
    if g is None:
        mean = x.mean(1, keepdim=True)
        g = (
            mean
            if all_
            else (x * keys[..., None]).sum(1, keepdim=True) / keys.sum(1).clamp(min=1)[:, None, None]
        )
    u = x if part.hidden is None else hidden(part.hidden(x))
    f = (part.left(g) * part.right(u)).unflatten(2, (part.maps, -1)).sum(-1)
    f = tanh(f)
    if norm is not None:
        f = f / f.norm(dim=2 if norm == 1 else 1, keepdim=True).clamp(min=1e-12)
    weights = masked_softmax(f.mT, keys[:, None])
    if over != -1:
        weights = f.mT.softmax(over).masked_fill(~keys[:, None], 0.0)
    read = weights @ (u if values else x)
    return part.proj(read.mT.flatten(1) if merge else read.flatten(1))


def with_fault(**fault):
    """LAMA with one fault."""
    return wrong(Lama, pool=lambda self, x, *, mask, layout: pooled(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=20).ok


MUTANTS = {
    "softmax over the maps": with_fault(over=1),
    "softmax over the batch": with_fault(over=0),
    "no norm": with_fault(norm=None),
    "a norm over the tokens": with_fault(norm=2),
    "scores without tanh": with_fault(tanh=lambda t: t),
    "hidden tokens without tanh": with_fault(hidden=lambda t: t),
    "hidden tokens pooled": with_fault(values=True),
    "maps and channels interleaved": with_fault(merge=True),
    "padding in the mean": with_fault(all_=True),
    "the mask ignored": wrong(Lama, pool=lambda self, x, *, mask, layout: pooled(self, x, Mask())),
    "special tokens left out": wrong(
        Lama,
        pool=lambda self, x, *, mask, layout: pooled(
            self, x[:, (p := layout.prefix) :], Mask(keys=None if mask.keys is None else mask.keys[:, p:])
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


FORMS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"context": "mean"},
        {"rank": 3},
        {"mlp": False},
        {"maps": 2, "context": "mean", "rank": 2, "mlp": False},
    ],
    ids=str,
)


def lama(dim=8, tokens=5, **options) -> Lama:
    """In float64, with weights of a size that matters."""
    return spread(Lama(place(dim, 2, tokens), **options), 0.5)


# By hand


def test_hand_two_maps_two_tokens():
    """Scores tanh(± a) of equal size: f = ± 1/√2, and the weights of both maps are σ(√2) and 1 - σ(√2)."""
    part = lama(1, 2, maps=2, mlp=False)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.fill_(1)
        part.right.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        part.proj.weight.copy_(torch.tensor([[1.0, 10.0]]))
        part.proj.bias.zero_()
    x = torch.tensor([[[0.5], [-0.5]]]).double()
    high = 1 / (1 + math.exp(-math.sqrt(2)))
    near(seen(part, x, layout=Layout((2,))), [[[high, 1 - high], [1 - high, high]]])
    near(part(x, layout=Layout((2,))), [(high - 0.5) - 10 * (high - 0.5)])


def test_hand_parameters():
    """2 c r rank, c for the learned vector, c² + c for the MLP, and the projection r c² + c."""
    c, r = 12, 8
    base = 2 * c * r + r * c * c + c
    assert count(Lama(place(c, 3))) == base + c + c * c + c
    assert count(Lama(place(c, 3), context="mean", mlp=False)) == base
    assert count(Lama(place(c, 3), rank=3, mlp=False)) == base + 2 * 2 * c * r + c
    assert count(Lama(place(c, 3, proj_bias=False), maps=2)) == 2 * c * 2 + c + c * c + c + 2 * c * c


def test_hand_the_start():
    """P and Q are uniform within 1 / √c, whatever the host does to linear layers; the vector is of variance 1."""
    part = Lama(place(400, 2), maps=64)
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
    part.init_weights()
    for layer in (part.left, part.right):
        assert 0.0495 < layer.weight.detach().abs().max() <= 0.05
        assert abs(layer.weight.detach().std() * 20 * math.sqrt(3) - 1) < 0.02
    assert 0.85 < part.vector.detach().std() < 1.15


def test_hand_one_map_is_refused():
    """f / |f| is ± 1: only the sign is left, and no gradient."""
    with pytest.raises(RecipeError, match="AZ214.*one map"):
        Lama(place(8, 1), maps=1)


# Identities


@FORMS
def test_identity_no_weight_is_more_than_e_squared_times_another(options):
    """|f| ≤ 1, and the f of a token have length 1; large tokens come near the bound and stay below it."""
    part, x = lama(**options), 100 * normal(2, 5, 8)
    f, weights = (seen(part, x, layout=Layout((5,)), tap=tap) for tap in ("scores", "weights"))
    near(f.square().sum(1), torch.ones(2, 5))
    near(weights.sum(-1), torch.ones(2, part.maps))
    assert (weights.amax(-1) / weights.amin(-1)).max() <= math.e**2 + 1e-9


@pytest.mark.parametrize("rank", [1, 3])
def test_identity_scores_are_bilinear_forms_of_low_rank(rank):
    """Before tanh and norm, the score of map i is gᵀ (P_i Q_iᵀ) u, whose matrix has that rank: ratios of f show it."""
    part, x = lama(rank=rank, maps=3), normal(1, 5, 8)
    u, matrices = torch.tanh(part.hidden(x[0])), []
    for i in range(3):
        mine = slice(i * rank, (i + 1) * rank)
        matrices.append(part.left.weight[mine].T @ part.right.weight[mine])
        assert torch.linalg.matrix_rank(matrices[i]) == rank
    raw = torch.stack([torch.tanh(u @ (part.vector @ m)) for m in matrices])  # (r m)
    near(seen(part, x, tap="scores", layout=Layout((5,)))[0], raw / raw.norm(dim=0))


@FORMS
def test_identity_tokens_in_another_order_give_the_same(options):
    part, x = lama(**options), normal(2, 5, 8)
    near(part(x[:, [3, 0, 4, 1, 2]], layout=Layout((5,))), part(x, layout=Layout((5,))))


@FORMS
def test_identity_constant_tokens_are_read_alike(options):
    part, x = lama(**options), normal(2, 1, 8)
    near(
        seen(part, x.expand(2, 5, 8), layout=Layout((5,))),
        torch.full((2, part.maps, 5), 0.2, dtype=torch.float64),
    )
    near(part(x.expand(2, 5, 8), layout=Layout((5,))), part.proj(x[:, 0].repeat(1, part.maps)))


@FORMS
def test_identity_padding_is_a_shorter_input(options):
    part, x = lama(**options), normal(2, 5, 8)
    keys = torch.tensor([[True, False, True, True, False]]).expand(2, 5)
    wanted = part(x[:, keys[0]], layout=Layout((3,)))
    near(part(x.masked_fill(~keys[..., None], math.nan), mask=Mask(keys=keys), layout=Layout((5,))), wanted)


def test_identity_the_values_are_the_tokens():
    """Weights are functions of u, and what is pooled is x: with a projection of the first map alone, a mean of x."""
    part, x = lama(maps=2), normal(2, 5, 8)
    with torch.no_grad():
        part.proj.weight.copy_(torch.eye(8, 16))
        part.proj.bias.zero_()
    near(part(x, layout=Layout((5,))), (seen(part, x, layout=Layout((5,)))[:, 0, None] @ x)[:, 0])


@FORMS
def test_tokens_of_zero_are_no_nan(options):
    """Of u = 0 all scores are 0, and the norm of nothing is kept from dividing."""
    part, x = lama(**options), torch.zeros(2, 5, 8).double().requires_grad_()
    if part.hidden is not None:
        nn.init.zeros_(part.hidden.bias)
    out = part(x, layout=Layout((5,)))
    near(seen(part, x, layout=Layout((5,))), torch.full((2, part.maps, 5), 0.2, dtype=torch.float64))
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *part.parameters()))


def test_where_no_token_exists_the_bias_is_left():
    for options in ({}, {"context": "mean"}):
        part, nobody = lama(**options), Mask(keys=torch.zeros(1, 5, dtype=torch.bool))
        near(part(normal(1, 5, 8), mask=nobody, layout=Layout((5,)))[0], part.proj.bias)


@FORMS
def test_narrow_numbers_stay_near(options):
    keys = torch.arange(7) < torch.tensor([[7], [4], [1]])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        part, x = (
            spread(Lama(place(8, 2, 7), **options), 0.3).to(dtype).double(),
            normal(3, 7, 8).to(dtype).double(),
        )
        for mask in (Mask(), Mask(keys=keys)):
            wanted = part.double()(x, mask=mask, layout=Layout((7,))).detach()
            found = part.to(dtype)(x.to(dtype), mask=mask, layout=Layout((7,)))
            assert found.dtype == dtype
            near(found, wanted, tolerance * max(1.0, float(wanted.abs().max())))
