"""Entmax attention, arXiv:1905.05702, §3; sparsemax, arXiv:1602.02068."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, wrong

from attnzoo.core import Layout, Mask, options_of
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product.entmax import Entmax, masked_entmax
from attnzoo.testing import against


def bisected(z: list[float], power: int) -> float:
    """τ with Σ [z - τ]₊^power = 1, which lies within 1 of the largest z: by halving."""
    low, high = max(z) - 1, max(z)
    for _ in range(54):
        middle = (low + high) / 2
        if sum((one - middle) ** power for one in z if one > middle) > 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def weigh(scores: torch.Tensor, power: int) -> torch.Tensor:
    """Halving says who takes part, an equation of the first or second degree what τ then is."""
    z = scores / power
    middle = bisected(z.tolist(), power)
    part = z > middle
    some, k = z[part], int(part.sum())
    if power == 1:
        tau = (some.sum() - 1) / k
    else:  # k τ² - 2 τ Σz + Σz² - 1 = 0
        tau = (some.sum() - torch.sqrt((some.sum() ** 2 - k * ((some**2).sum() - 1)).clamp(min=1e-300))) / k
    return torch.where(part, (z - tau) ** power, 0.0)


@against(Entmax, examples=30)
def test_oracle(options, q, k, v, allowed):
    """Query by query, over the keys that are seen."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        see = allowed[b, h, i]
        if see.any():
            scores = k[b, h, see] @ q[b, h, i] / math.sqrt(q.shape[3])
            out[b, h, i] = weigh(scores, {"1.5": 2, "2": 1}[options["alpha"]]) @ v[b, h, see]
    return out


def with_fault(
    turn=lambda q, k: (q, k), hide=lambda a: a, scale=lambda d: d**-0.5, form=masked_entmax, axis=-1
):
    """Entmax attention with one fault."""

    def attend(self, q, k, v, *, mask, layout):
        q, k = turn(q, k)
        allowed = mask.dense(q.shape[2], k.shape[2])
        scores = q @ k.mT * scale(q.shape[-1])
        if axis != -1:
            return form(scores.movedim(axis, -1), None, self.power).movedim(-1, axis) @ v
        return form(scores, None if allowed is None else hide(allowed), self.power) @ v

    return wrong(Entmax, attend=attend)


def detached(scores, allowed, power):
    """τ has no gradient."""
    p = masked_entmax(scores, allowed, power)
    z = scores / power if allowed is None else (scores / power).masked_fill(~allowed, -1e30)
    tau = (torch.where(p > 0, z, torch.inf) - p.pow(1 / power)).amin(-1, keepdim=True).detach()
    return (z - tau).clamp(min=0).pow(power)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "softmax": with_fault(form=lambda s, a, power: masked_softmax(s, a)),
    "the other α": with_fault(form=lambda s, a, power: masked_entmax(s, a, 3 - power)),
    "scores are not halved": with_fault(form=lambda s, a, power: masked_entmax(s * power, a, power)),
    "τ of the mask's hidden keys too": with_fault(form=lambda s, a, power: masked_entmax(s, None, power) if a is None else masked_entmax(s, None, power) * a),
    "no gradient of τ": with_fault(form=detached),
    "no scale": with_fault(scale=lambda d: 1.0),
    "q and k swapped": with_fault(turn=lambda q, k: (k, q) if q.shape == k.shape else (q, k)),
    "over the batch": with_fault(axis=0),
    "over the queries": with_fault(axis=-2),
    "the mask inverted": with_fault(hide=torch.logical_not),
    "the mask ignored": with_fault(hide=torch.ones_like),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def weights(*scores: float, alpha="1.5") -> torch.Tensor:
    """The weights of these scores."""
    head = Entmax(place(1), alpha=alpha)
    return seen(head, row(1), row(*scores), row(*scores), layout=Layout((len(scores),)))


# By hand


@pytest.mark.parametrize("alpha", ["1.5", "2"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_hand_equal_scores_weigh_alike(alpha, n):
    near(weights(*[-3.0] * n, alpha=alpha), [1 / n] * n)


@pytest.mark.parametrize("delta", [0.0, 0.3, 1.0, 1.9])
def test_hand_two_scores(delta):
    """p₁ = ((δ + √(2 - δ²)) / 2)², δ half the difference; .8307 for a difference of 1."""
    half = delta / 2
    first = ((half + math.sqrt(2 - half**2)) / 2) ** 2
    near(weights(5 + delta, 5), [first, 1 - first])
    if delta == 1:
        assert round(first, 4) == 0.8307


@pytest.mark.parametrize("delta", [2.0, 2.5, 1e4])
def test_hand_two_scores_far_apart(delta):
    near(weights(delta, 0), [1, 0])
    assert float(weights(delta + 0.01, 0)[..., 1]) == 0


@pytest.mark.parametrize("delta,wanted", [(1, (1, 0)), (0.5, (0.75, 0.25)), (3, (1, 0)), (0, (0.5, 0.5))])
def test_hand_sparsemax(delta, wanted):
    near(weights(delta, 0, alpha="2"), wanted)


def test_hand_three_scores_of_sparsemax():
    """(.6, .4, -.9): τ = 0 of the first two, and the third is zero."""
    near(weights(0.6, 0.4, -0.9, alpha="2"), [0.6, 0.4, 0])


def test_hand_parameters():
    assert count(Entmax(place(12, 3))) == 0 and options_of(Entmax)().model_dump() == {"alpha": "1.5"}


@pytest.mark.parametrize("alpha,power", [("1.5", 0.5), ("2", 0.0)])
def test_hand_the_gradient_of_the_paper(alpha, power):
    """dz = s ⊙ (g - s·g / Σ s), s = p^{2 - α}, zero where p is."""
    scores, g = normal(4, 9).mul(2).requires_grad_(), normal(4, 9)
    p = masked_entmax(scores, None, {"1.5": 2, "2": 1}[alpha])
    s = torch.where(p > 0, p.detach() ** power, 0.0)
    wanted = s * (g - (s * g).sum(-1, keepdim=True) / s.sum(-1, keepdim=True))
    near(torch.autograd.grad(p, scores, g)[0], wanted)
    assert (p == 0).any()


# Identities


@pytest.mark.parametrize("alpha", ["1.5", "2"])
def test_identity_a_number_added_to_all_scores_changes_nothing(alpha):
    scores = [0.3, -0.2, 0.9, -1.5]
    near(weights(*(s + 1000 for s in scores), alpha=alpha), weights(*scores, alpha=alpha), 1e-10)


@pytest.mark.parametrize("alpha", ["1.5", "2"])
def test_identity_rows_sum_to_one_and_the_order_stays(alpha):
    scores = 3 * normal(50, 33)
    p = masked_entmax(scores, None, {"1.5": 2, "2": 1}[alpha])
    near(p.sum(-1), torch.ones(50))
    order = scores.argsort(-1)
    assert (p >= 0).all() and (p.gather(-1, order).diff(dim=-1) >= 0).all()
    assert (p == 0).double().mean() > 0.3


def test_identity_sparsemax_is_the_nearest_point_of_the_simplex():
    """No point of the simplex is nearer to the scores: tried with corners, and with points beside it."""
    scores = normal(20, 6)
    p = masked_entmax(scores, None, 1)
    corners = torch.eye(6).double()
    for other in [p + 0.01 * (corner - p) for corner in corners]:
        assert ((scores - p).norm(dim=-1) <= (scores - other).norm(dim=-1) + 1e-12).all()


def test_identity_sparser_with_a_larger_alpha():
    scores = 2 * normal(50, 20)
    some, few = ((masked_entmax(scores, None, power) > 0).sum(-1) for power in (2, 1))
    assert (few <= some).all() and (few < some).any()


@pytest.mark.parametrize("alpha", ["1.5", "2"])
def test_identity_a_hidden_key_is_not_there(alpha):
    head, (q, k, v) = Entmax(place(12, 3, 5), alpha=alpha), normal(3, 2, 3, 5, 4)
    keys = torch.tensor([True, True, True, False, False]).expand(2, 5)
    padded = head(q, k, v, mask=Mask(keys=keys), layout=Layout((5,)))
    near(padded, head(q, k[:, :, :3], v[:, :, :3], layout=Layout((3,))))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_and_numbers_of_any_size_are_finite(power, dtype):
    """Ties at the edge of the support, rows of nobody, and the largest numbers there are."""
    largest = torch.finfo(dtype).max
    scores = torch.tensor([[0, -power, -power, -power], [largest, 0, -largest, 1], [1, 1, 1, 1]], dtype=dtype)
    p = masked_entmax(scores.requires_grad_(), torch.ones(3, 4, dtype=torch.bool).tril(0), power)
    near(p[1], [1, 0, 0, 0])
    none = masked_entmax(scores, torch.zeros(3, 4, dtype=torch.bool), power)
    assert not none.any()
    (p.sum() + none.sum()).backward()
    assert scores.grad.isfinite().all()


def test_finite_differences():
    """Gradients are checked by differences where nobody is at the edge."""
    scores = torch.tensor([[0.3, -0.2, 0.1, -9.0]], dtype=torch.float64, requires_grad=True)
    for power in (1, 2):
        assert torch.autograd.gradcheck(lambda s, p=power: masked_entmax(s, None, p), scores)


def test_narrow_numbers_stay_near():
    narrow(Entmax, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
