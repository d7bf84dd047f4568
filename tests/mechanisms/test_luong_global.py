"""Luong's global attention, arXiv:1508.04025, §3.1, eq. 5-8."""

import math

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, place, seen, set_all, wrong

from attnzoo.core import Layout, Mask
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.mechanisms.additive.additive import Additive
from attnzoo.mechanisms.additive.luong_global import LuongGlobal
from attnzoo.testing import against


@against(LuongGlobal)
def test_oracle(component, options, x, source, allowed):
    """a_t = softmax_s(score(h_t, h̄_s)), c_t = Σ_s a_ts h̄_s, then tanh(W_c [c_t; h_t])."""
    score = {
        "dot": lambda t, s, j: t @ s,
        "general": lambda t, s, j: t @ (component.general.weight @ s),
        "concat": lambda t, s, j: component.score_weight @ torch.tanh(joined() @ torch.cat([t, s])),
        "location": lambda t, s, j: component.location.weight[j] @ t,
    }[options["score"]]

    def joined():
        """W of `concat`, beside each other: for the target, for the source."""
        return torch.cat([component.query.weight, component.key.weight], 1)

    out = []
    for b in range(x.shape[0]):
        for i, t in enumerate(x[b]):
            see = [j for j in range(source.shape[1]) if allowed[b, 0, i, j]]
            c = torch.zeros_like(source[b, 0])
            if see:
                c = torch.stack([score(t, source[b, j], j) for j in see]).softmax(0) @ source[b, see]
            out.append(torch.tanh(component.proj.weight @ torch.cat([c, t])))
    return torch.stack(out).reshape(x.shape)


def scoring(change):
    """The mechanism with its scores (b n m) changed."""
    return wrong(
        LuongGlobal, _scores=lambda self, x, source: change(LuongGlobal._scores(self, x, source), x, source)
    )


def target_first(self, x, source, *, mask, layout):
    """[h; c] in the place of [c; h]."""
    with torch.no_grad():
        self.proj.weight.copy_(self.proj.weight.roll(x.shape[-1], 1))
    return LuongGlobal.mix(self, x, source, mask=mask, layout=layout)


MUTANTS = {
    "scaled": scoring(lambda s, x, source: s / x.shape[-1] ** 0.5),
    "scores turned round": scoring(lambda s, x, source: s.mT if s.shape[1] == s.shape[2] else s),
    "targets first": wrong(LuongGlobal, mix=target_first),
    "no tanh": wrong(
        LuongGlobal,
        mix=lambda self, x, source, *, mask, layout: LuongGlobal.mix(
            self, x, source, mask=mask, layout=layout
        ).clamp(-1 + 1e-12, 1 - 1e-12).atanh(),
    ),
    "the mask ignored": wrong(
        LuongGlobal,
        mix=lambda self, x, source, *, mask, layout: LuongGlobal.mix(self, x, source, mask=Mask(), layout=layout),
    ),
    "positions from the end": scoring(lambda s, x, source: s.flip(2)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_the_context_vector_comes_first():
    part = LuongGlobal(place(1, tokens=1, context_dim=1), score="dot").double()
    with torch.no_grad():
        part.proj.weight.copy_(torch.tensor([[1.0, 0.0]]))
    near(part(line(5), line(2), layout=Layout((1,))), [math.tanh(2)])


@pytest.mark.parametrize(
    "score,number", [("dot", 0), ("general", 16), ("concat", 2 * 4 * 3 + 3), ("location", 4 * 5)]
)
def test_hand_parameters(score, number):
    part = LuongGlobal(place(4, tokens=5), score=score, hidden=3)
    assert count(part) == number + 2 * 4 * 4


def test_outputs_lie_between_minus_one_and_one():
    part = set_all(LuongGlobal(place(4, tokens=5)), 0.7)
    out = part(normal(2, 5, 4), layout=Layout((5,)))
    assert out.abs().max() < 1


# Identities


def test_identity_general_with_the_identity_is_dot():
    general, dot = (
        LuongGlobal(place(4, tokens=5)).double(),
        LuongGlobal(place(4, tokens=5), score="dot").double(),
    )
    general.load_state_dict({"general.weight": torch.eye(4), **dot.state_dict()})
    x = normal(2, 5, 4)
    near(general(x, layout=Layout((5,))), dot(x, layout=Layout((5,))).tolist())


def test_identity_concat_is_bahdanau_with_the_two_halves():
    luong, bahdanau = (
        LuongGlobal(place(4, tokens=5), score="concat", hidden=3).double(),
        Additive(place(4), hidden=3).double(),
    )
    bahdanau.load_state_dict(
        {name: luong.state_dict()[name] for name in ("query.weight", "key.weight", "score_weight")}
    )
    x = normal(2, 5, 4)
    c = bahdanau(x, layout=Layout((5,)))
    near(luong(x, layout=Layout((5,))), torch.tanh(luong.proj(torch.cat([c, x], -1))).tolist())


# Refusals


def test_location_ignores_the_sources_and_refuses_more_than_it_knows():
    part = LuongGlobal(place(3, tokens=4, context_dim=3), score="location").double()
    x, one, two = normal(3, 1, 4, 3)
    near(
        seen(part, x, one, layout=Layout((4,))),
        seen(part, x, two, layout=Layout((4,))).tolist(),
    )
    with pytest.raises(LayoutMismatch, match="AZ403.*at most 4 tokens; it was given 5"):
        part(x, normal(1, 5, 3), layout=Layout((5,)))


def test_dot_refuses_another_width():
    with pytest.raises(RecipeError, match="AZ214"):
        LuongGlobal(place(4, context_dim=3), score="dot")


@pytest.mark.parametrize("score", ["dot", "general", "concat", "location"])
def test_narrow_numbers_stay_near(score):
    narrow(LuongGlobal, [(2, 7, 4)], site=place(4, 1, 7), score=score)
