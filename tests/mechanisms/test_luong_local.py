"""Luong's local attention, arXiv:1508.04025, §3.2, eq. 9-10."""

import math

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, place, seen, set_all, wrong
from torch import nn

from attnzoo.core import Layout, Mask
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.additive.luong_global import LuongGlobal
from attnzoo.mechanisms.additive.luong_local import LuongLocal
from attnzoo.testing import against


@against(LuongLocal)
def test_oracle(component, options, x, source, allowed, keys):
    """Softmax over the seen positions of [p − D, p + D], times the Gaussian of σ = D/2 where p is predicted."""
    width, predicted = options["window"], options["alignment"] == "predictive"
    out = []
    for b in range(x.shape[0]):
        at = range(source.shape[1])
        if predicted:  # counted are those that exist
            at = [int(keys[b, :j].sum()) + options["one_based"] for j in at]
        for i, t in enumerate(x[b]):
            p = i
            if predicted:
                inner = torch.tanh(component.position.weight @ t)
                p = int(keys[b].sum()) / (1 + torch.exp(-(component.position_weight @ inner)))
            see = [
                j for j in range(source.shape[1]) if allowed[b, 0, i, j] and p - width <= at[j] <= p + width
            ]
            c = torch.zeros_like(source[b, 0])
            if see:
                w = 1 if options["score"] == "dot" else component.general.weight
                rated = torch.stack(
                    [t @ (source[b, j] if options["score"] == "dot" else w @ source[b, j]) for j in see]
                )
                for j, weight in zip(see, rated.softmax(0), strict=True):
                    factor = torch.exp(-((at[j] - p) ** 2) / (2 * (width / 2) ** 2)) if predicted else 1
                    c = c + weight * factor * source[b, j]
            out.append(torch.tanh(component.proj.weight @ torch.cat([c, t])))
    return torch.stack(out).reshape(x.shape)


def widened(by):
    """A window that is wider by some positions; the Gaussian too."""

    def mix(self, x, source, *, mask, layout):
        self.window += by
        return LuongLocal.mix(self, x, source, mask=mask, layout=layout)

    return wrong(LuongLocal, mix=mix)


def aligned(change):
    """Another position p, from x, m, the mask and the right one."""

    def _aligned(self, x, m, mask):
        return change(LuongLocal._aligned(self, x, m, mask), self, x, m, mask)

    return wrong(LuongLocal, _aligned=_aligned)


def of_all(p, self, x, m, mask):
    """Counts the padded positions too."""
    return LuongLocal._aligned(self, x, m, Mask())


MUTANTS = {
    "a window too wide": widened(1),
    "a window too narrow": widened(-1),
    "positions from 1": aligned(lambda p, self, x, m, mask: p + 1),
    "padding counts": aligned(of_all),
    "padding has places": wrong(
        LuongLocal,
        _places=lambda self, m, mask, device: LuongLocal._places(self, m, Mask(), device),
    ),
    "from the other end": wrong(
        LuongLocal,
        _places=lambda self, m, mask, device: LuongLocal._places(self, m, mask, device) + 1 - 2 * self.first,
    ),
    "no gradient to the position": aligned(lambda p, self, x, m, mask: p.detach()),
    "the mask ignored": wrong(
        LuongLocal,
        mix=lambda self, x, source, *, mask, layout: LuongLocal.mix(
            self, x, source, mask=Mask(), layout=layout
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def predictive(tokens: int, window: int) -> LuongLocal:
    """local-p with p = S / 2 (its network is zero) and equal scores."""
    return set_all(LuongLocal(place(1, tokens=tokens), alignment="predictive", window=window), 0.0)


def test_hand_factors_of_the_gaussian():
    weights = seen(predictive(4, 2), line(1, 1, 1, 1), layout=Layout((4,)))[0, 0, 0]  # p = 2
    near(weights * 4, [math.exp(-2), math.exp(-0.5), 1, math.exp(-0.5)])  # |s - p| = 2, 1, 0, 1
    near(weights * 4, [0.1353, 0.6065, 1, 0.6065], 5e-5)


def test_hand_six_positions():
    part = LuongLocal(place(1, tokens=6), alignment="predictive", window=2).double()
    with torch.no_grad():  # p = 6 σ(v tanh(1)) = 2.5
        part.general.weight.zero_()
        part.position.weight.fill_(1)
        part.position_weight.fill_(math.log(2.5 / 3.5) / math.tanh(1))
    weights = seen(part, line(1, 1, 1, 1, 1, 1), layout=Layout((6,)))[0, 0, 0]
    near(weights, [0, 0.0812, 0.2206, 0.2206, 0.0812, 0], 5e-5)
    near(weights.sum(), 0.6036, 7e-5)


def test_hand_the_positions_that_exist_are_counted():
    keys = torch.tensor([[True, True, False, False]])
    weights = seen(predictive(4, 2), line(1, 1, 1, 1), mask=Mask(keys=keys), layout=Layout((4,)))[0, 0, 0]
    near(weights * 2, [math.exp(-0.5), 1, 0, 0])  # p = 2 / 2


def test_hand_positions_from_one():
    """p = 4 / 2 is the second of four positions, 1, 2, 3, 4."""
    part = LuongLocal(place(1, tokens=4), alignment="predictive", window=2, one_based=True)
    weights = seen(set_all(part, 0.0), line(1, 1, 1, 1), layout=Layout((4,)))[0, 0, 0]
    near(weights * 4, [math.exp(-0.5), 1, math.exp(-0.5), math.exp(-2)])


def test_one_based_is_refused_where_nothing_is_predicted():
    with pytest.raises(RecipeError, match="AZ214.*one_based"):
        LuongLocal(place(4), one_based=True)


def test_hand_parameters():
    assert count(LuongLocal(place(4))) == 4 * 4 + 2 * 4 * 4
    assert count(LuongLocal(place(4), score="dot", alignment="predictive")) == 4 * 4 + 4 + 2 * 4 * 4


# Identities


@pytest.mark.parametrize("window", [4, 5, 60])
def test_identity_a_wide_window_is_global(window):
    local, everywhere = (
        LuongLocal(place(4, tokens=5), window=window).double(),
        LuongGlobal(place(4, tokens=5)).double(),
    )
    local.load_state_dict(everywhere.state_dict())
    x = normal(2, 5, 4)
    near(local(x, layout=Layout((5,))), everywhere(x, layout=Layout((5,))).tolist())


@pytest.mark.parametrize("there", [[2, 3, 4], [0, 1, 2], [0, 2, 4], [4]])
def test_identity_padding_anywhere_is_a_shorter_sequence(there):
    """Before the tokens, behind them and in between."""
    part = LuongLocal(place(4, tokens=5), alignment="predictive", window=2).double()
    nn.init.normal_(part.position_weight)
    x, keys = normal(1, 5, 4), torch.zeros(1, 5, dtype=torch.bool)
    keys[0, there] = True
    wanted = part(x[:, there], layout=Layout((len(there),)))
    near(part(x, mask=Mask(keys=keys), layout=Layout((5,)))[:, there], wanted)


def test_the_gradient_reaches_the_position():
    part = LuongLocal(place(4, tokens=5), alignment="predictive", window=3).double()
    part(normal(1, 5, 4), layout=Layout((5,))).sum().backward()
    assert part.position.weight.grad.abs().max() > 0 and part.position_weight.grad.abs().max() > 0


def test_dot_refuses_another_width():
    with pytest.raises(RecipeError, match="AZ214"):
        LuongLocal(place(4, context_dim=3), score="dot")


@pytest.mark.parametrize("score", ["dot", "general"])
def test_narrow_numbers_stay_near(score):
    """`predictive` is left out: its window has hard edges at a real number."""
    narrow(LuongLocal, [(2, 7, 4)], site=place(4, 1, 7), score=score, window=2)
