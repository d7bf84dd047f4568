"""Expressive attention, arXiv:2407.18601."""

import itertools
from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, wrong

from attnzoo.core import Law, Layout, Mask, options_of
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.dot_product.expressive import Expressive
from attnzoo.testing import against


@against(Expressive)
def test_oracle(options, q, k, v, allowed):
    """Query by query: e = z² / (1 + z²) of what it may see; then what the options say it is divided by."""
    b, h, n, _ = q.shape
    out = torch.zeros_like(q)
    for s, g, i in itertools.product(range(b), range(h), range(n)):
        see = allowed[s, g, i]
        if see.any():
            z = k[s, g, see] @ q[s, g, i]
            e = z * z / (1 + z * z)
            by = {"row": e.sum() + (options["eps"] or 0), "none": 1, "mean": len(e)}[options["norm"]]
            out[s, g, i] = e @ v[s, g, see] / by
    return out


def expressed(z):
    """z² / (1 + z²)."""
    return z**2 / (1 + z**2)


def attending(
    scores=lambda q, k: q @ k.mT, e=expressed, mask=lambda mask: mask, over=-1, hidden=0.0, by=None
):
    """Expressive attention with a fault."""

    def attend(self, q, k, v, *, mask, layout, change=mask):
        n, m = q.shape[2], k.shape[2]
        allowed = change(mask).dense(n, m)
        allowed = torch.ones(1, 1, n, m).bool() if allowed is None else allowed
        weights = e(scores(q, k).masked_fill(~allowed, hidden))
        total = weights.sum(over, keepdim=True) + (self.eps or 0)
        number = allowed.expand(weights.shape).sum(-1, keepdim=True).clamp(min=1)
        by_ = {"row": torch.where(total > 0, total, 1), "none": 1, "mean": number}
        return (weights / (by_ | (by or {}))[self.norm]) @ v

    return wrong(Expressive, attend=attend)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(attending()).ok


MUTANTS = {
    "divided by √d": attending(lambda q, k: (q * q.shape[-1] ** -0.5) @ k.mT),
    "z² without a bound": attending(e=torch.square),
    "|z| for z²": attending(e=lambda z: z.abs() / (1 + z.abs())),
    "softmax's exponentials": attending(e=torch.exp),
    "only what is parallel": attending(e=lambda z: expressed(z.relu())),
    "hidden keys at a large z, e = 1": attending(hidden=-1e20),
    "the mask ignored": attending(mask=lambda mask: Mask()),
    "pairs ignored": attending(mask=lambda mask: replace(mask, pairs=None)),
    "causality ignored": attending(mask=lambda mask: replace(mask, causal=False)),
    "normalised over the queries": attending(over=-2),
    "normalised over the samples": attending(over=0),
    "never normalised": attending(by={"row": 1}),
    "the mean over hidden keys too": attending(by={"mean": 7}),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def asked(z, **options):
    """The weights of one query with these z: q = 1, k = z, and values that are unit vectors."""
    part, m = Expressive(place(1, tokens=len(z)), **options).double(), len(z)
    return part(row(1), row(*z), torch.eye(m).double()[None, None], layout=Layout((m,)))


# By hand


def test_hand_four_keys():
    """z = (1, 0, -1, 3): e = (1/2, 0, 1/2, 9/10), which sum to 19/10."""
    near(asked((1, 0, -1, 3)), [5 / 19, 0, 5 / 19, 9 / 19])
    near(asked((1, 0, -1, 3), norm="none"), [0.5, 0, 0.5, 0.9])
    near(asked((1, 0, -1, 3), norm="mean"), [0.125, 0, 0.125, 0.225])
    near(asked((1, 0, -1, 3), eps=0.1), [0.25, 0, 0.25, 0.45])


def test_hand_what_is_hidden_gets_nothing():
    """Of z = (1, 0, -1, 3) the last is hidden, also from the mean."""
    where = {"mask": Mask(keys=torch.tensor([[True, True, True, False]])), "layout": Layout((4,))}
    v = torch.eye(4).double()[None, None]
    for norm, wanted in (
        ("row", [0.5, 0, 0.5, 0]),
        ("none", [0.5, 0, 0.5, 0]),
        ("mean", [1 / 6, 0, 1 / 6, 0]),
    ):
        part = Expressive(place(1, tokens=4), norm=norm).double()
        near(part(row(1), row(1, 0, -1, 3), v, **where), wanted)


@pytest.mark.parametrize(
    "options,wanted", [({}, 0.5), ({"eps": 1e-9}, 0), ({"norm": "none"}, 0), ({"norm": "mean"}, 0)]
)
def test_hand_orthogonal_to_all(options, wanted):
    near(asked((0, 0), **options), [wanted, wanted])


def test_hand_no_parameters():
    assert count(Expressive(place(12, 3))) == 0


def test_defaults():
    assert options_of(Expressive)().model_dump() == {"norm": "row", "eps": None}


# Identities


def test_identity_the_sign_of_a_query_or_key_has_no_say():
    part = Expressive(place(12, 3, 5)).double()
    q, k, v = normal(3, 2, 3, 5, 4)
    wanted = part(q, k, v, layout=Layout((5,)))
    near(part(-q, k, v, layout=Layout((5,))), wanted)
    sign = torch.tensor([1, -1, 1, -1, -1])[:, None]
    near(part(q, sign * k, v, layout=Layout((5,))), wanted)


def test_identity_rows_sum_to_one():
    part = Expressive(place(12, 3, 5)).double()
    q, k, v = normal(3, 2, 3, 5, 4)
    near(seen(part, q, k, v, layout=Layout((5,))).sum(-1), torch.ones(2, 3, 5))


def test_identity_orthogonal_keys_get_nothing_whatever_their_length():
    q, k = row(1, 0).reshape(1, 1, 1, 2), torch.tensor([[0.0, 50], [0.1, 0]]).double()[None, None]
    near(Expressive(place(2))(q, k, torch.eye(2).double()[None, None], layout=Layout((2,))), [0, 1])


def test_identity_the_ratio_of_weights_is_bounded():
    """A_i / A_j < 1 + 1 / z_j², where softmax knows no bound."""
    z = torch.tensor([1.0, -2, 0.5, 1e3])
    weights = asked(z.tolist())[0, 0, 0]
    assert (weights[:, None] / weights <= (1 + z.double() ** -2) * (1 + 1e-12)).all()
    near(asked((1e9, 1))[0, 0, 0], [2 / 3, 1 / 3], 1e-9)


def test_identity_mean_is_none_over_the_number_of_keys():
    q, k, v = normal(3, 2, 3, 5, 4)
    none, mean = (Expressive(place(12, 3, 5), norm=norm) for norm in ("none", "mean"))
    near(none(q, k, v, layout=Layout((5,))) / 5, mean(q, k, v, layout=Layout((5,))))


def test_identity_extensive_grows_with_the_keys():
    """Every key twice: twice as much without a normalisation, the same with one."""
    q, k, v = normal(3, 1, 3, 5, 4)
    twice = [torch.cat([t, t], 2) for t in (k, v)]
    for norm, factor in (("none", 2), ("mean", 1), ("row", 1)):
        part = Expressive(place(12, 3, 5), norm=norm)
        near(part(q, *twice, layout=Layout((10,))), factor * part(q, k, v, layout=Layout((5,))))


# Large and small numbers


@pytest.mark.parametrize("dtype,large,tolerance", [
    (torch.float16, 6e4, 1e-3), (torch.bfloat16, 1e37, 4e-3), (torch.float32, 1e30, 1e-6), (torch.float64, 1e300, 1e-12),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"norm": "none"}, {"norm": "mean"}, {"eps": 1e-15}])
def test_squares_that_overflow(dtype, large, tolerance, options):
    part = Expressive(place(1, tokens=3), **options)
    q, k = torch.ones(1, 1, 1, 1, dtype=dtype), row(large, -large, 1).to(dtype).requires_grad_()
    v = torch.eye(3, dtype=dtype)[None, None]
    out = part(q, k, v, layout=Layout((3,)))
    by = {"none": 1, "mean": 3}.get(options.get("norm"), 2.5)
    near(out, row(1, 1, 0.5) / by, tolerance)
    (gradient,) = torch.autograd.grad((out * torch.tensor([1, 2, 3]).to(dtype)).sum(), k)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype,small,tolerance", [
    (torch.float16, 1e-4, 2e-2), (torch.float32, 1e-25, 1e-6), (torch.float64, 1e-200, 1e-12),
])  # fmt: skip
def test_squares_that_vanish(dtype, small, tolerance):
    """z = (s, 2s): weights (1/5, 4/5), though s² is zero."""
    part = Expressive(place(1))
    k = row(small, 2 * small).to(dtype)
    out = part(
        torch.ones(1, 1, 1, 1, dtype=dtype), k, torch.eye(2, dtype=dtype)[None, None], layout=Layout((2,))
    )
    near(out, [0.2, 0.8], tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"norm": "none"}, {"norm": "mean"}, {"eps": 1e-9}])
def test_zeros_give_finite_gradients(dtype, options):
    q, k, v = (torch.zeros(1, 1, 3, 2, dtype=dtype, requires_grad=True) for _ in range(3))
    out = Expressive(place(2, tokens=3), **options)(q, k, v, layout=Layout((3,)))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


# Claims and refusals


def test_claims():
    card = Expressive.card_for
    assert Law.STOCHASTIC in card().laws and Law.BOUNDED in card().laws
    assert Law.SUBSTOCHASTIC in card(norm="mean").laws and Law.SUBSTOCHASTIC in card(eps=0.1).laws
    assert not card(norm="none").laws & {Law.STOCHASTIC, Law.SUBSTOCHASTIC, Law.BOUNDED}
    assert [card(norm=norm).fidelity for norm in ("row", "none", "mean")] == ["exact", "inspired", "inspired"]


def test_eps_without_a_sum_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*`norm: mean` there is no sum"):
        Expressive(place(4), norm="mean", eps=0.1)


def test_narrow_numbers_stay_near():
    narrow(Expressive, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
