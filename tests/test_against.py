"""Comparing a component with an oracle: what is right passes, what is wrong is shown in the smallest scene."""

from collections import Counter

import pytest
import torch
from by_hand import wrong
from hypothesis import given, settings

from attnzoo.core import Mask
from attnzoo.fusions.add import Add
from attnzoo.mechanisms.additive.luong_local import LuongLocal
from attnzoo.mechanisms.cross.window_cross import WindowCross
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.latent.map_pool import MapPool
from attnzoo.mechanisms.projection.grouped_query import GroupedQuery
from attnzoo.testing import against, compare
from attnzoo.testing.oracle import cases


def softmax(q, k, v, allowed):
    """Softmax attention."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def unscaled(q, k, v, allowed):
    """Softmax attention without its scale."""
    return softmax(q * q.shape[-1] ** 0.5, k, v, allowed)


def numbers(q, k, v, allowed):
    """Softmax attention as nested lists."""
    return softmax(q, k, v, allowed).tolist()


def drawn(cls, number=60):
    """That many cases."""
    found = []

    @settings(max_examples=number, derandomize=True, database=None)
    @given(cases(cls))
    def keep(case):
        found.append(case)

    keep()
    return found


def test_what_is_equal_passes():
    result = compare(Softmax, softmax)
    assert result.ok and result.check == "against softmax" and not result.reproduction


def test_a_missing_scale_is_seen_and_shrunk_to_code_that_can_be_pasted():
    result = compare(Softmax, unscaled)
    assert result.status == "failed"
    assert result.reason.startswith("claimed: equals its oracle; but the output is off by")
    assert "batch=" not in result.reproduction and "heads=1" in result.reproduction
    with pytest.raises(AssertionError) as caught:
        exec(result.reproduction, {})
    assert str(caught.value) == result.reason


def test_a_wrong_gradient_is_seen():
    def attend(self, q, k, v, *, mask, layout):
        return Softmax.attend(self, q, k.detach(), v, mask=mask, layout=layout)

    result = compare(wrong(Softmax, attend=attend), softmax, shrink=False)
    assert "but the gradient with respect to `k` is off by" in result.reason


def test_an_oracle_without_gradients_must_say_so():
    assert "say why in `no_gradient`" in compare(Softmax, numbers, shrink=False).reason
    assert compare(Softmax, numbers, no_gradient="plain numbers").ok


def test_another_shape_nan_and_exceptions_are_told():
    assert "its shape is" in compare(Softmax, lambda q, k, v: v[..., :1, :1].expand(9, 1, 1, 1)).reason
    assert "off by nan" in compare(Softmax, lambda q: q * float("nan"), shrink=False).reason
    assert "it raised ZeroDivisionError" in compare(Softmax, lambda q: q * (1 / 0), shrink=False).reason


def test_what_a_forward_does_to_its_parameters_does_not_reach_the_oracle():
    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            self.proj.weight.zero_()
        return self.proj(x)

    def oracle(component, x):
        return x @ component.proj.weight.T + (0 if component.proj.bias is None else component.proj.bias)

    result = compare(wrong(GroupedQuery, mix=mix), oracle, options=lambda options: not options, shrink=False)
    assert "the output is off" in result.reason


def test_an_argument_that_there_is_not_is_named():
    reason = compare(Softmax, lambda queries: queries, shrink=False).reason
    assert "there is no `queries`" in reason and "is given component, options, q, k, v, mask" in reason


def test_a_decorator_makes_a_test():
    @against(Softmax, examples=3)
    def test_mine(q, k, v, allowed):
        return softmax(q, k, v, allowed)

    test_mine()
    assert test_mine.component is Softmax and test_mine.__name__ == "test_mine"
    with pytest.raises(AssertionError, match="softmax: against bad: failed\n  claimed: equals its oracle"):
        against(Softmax, examples=3)(unscaled_as("bad"))()


def unscaled_as(name):
    """`unscaled` by another name."""

    def oracle(q, k, v, allowed):
        return unscaled(q, k, v, allowed)

    oracle.__name__ = name
    return oracle


def test_scenes_hold_what_must_be_told_apart():
    found = drawn(Softmax, 150)
    kinds = Counter(case.masks for case in found)
    assert len(kinds) == 8  # every combination of three kinds
    assert any(case.context is None for case in found)
    across = [case for case in found if case.context is not None]
    assert {case.context.length > case.scene.layout.length for case in across} == {True, False}
    assert any(case.watched for case in found) and any(case.spare for case in found)
    assert any(case.scene.layout.prefix for case in found)
    assert max(case.scene.layout.length for case in found) > 10
    pairs = [case.mask().pairs for case in found if "pairs" in case.masks and case.scene.site.heads > 1]
    assert any(not torch.equal(p[:, 0], p[:, 1]) for p in pairs)
    masks = [case.mask().dense(case.scene.layout.length, _read(case).length) for case in found if case.masks]
    assert any(not allowed.any(-1).all() for allowed in masks)


def _read(case):
    """How what is read from lies."""
    return case.context or case.scene.layout


def test_scenes_follow_the_card():
    assert all(set(case.masks) <= case.scene.card.masks for case in drawn(LuongLocal))
    assert all(case.mask().pairs is None or case.mask().pairs.shape[1] == 1 for case in drawn(LuongLocal))
    assert all(case.context is None and set(case.masks) <= {"keys"} for case in drawn(MapPool))
    for case in drawn(WindowCross):
        sides = zip(case.scene.layout.grid, case.context.grid, strict=True)
        assert all(side % window == 0 for side, window in sides)
    assert all(not case.masks and case.context is None for case in drawn(Add))


def test_the_whole_mask_is_made_without_the_mask():
    """`allowed` and `Mask.dense` agree, entry by entry."""
    from attnzoo.testing.oracle import _allowed

    for n, m in ((3, 3), (2, 5), (5, 2), (1, 4)):
        mask = Mask(keys=torch.rand(2, m) < 0.6, pairs=torch.rand(2, 3, n, m) < 0.6, causal=True)
        found = _allowed(mask, 2, 3, n, m)
        for b, h, i, j in torch.cartesian_prod(*map(torch.arange, (2, 3, n, m))).tolist():
            wanted = bool(mask.keys[b, j] and mask.pairs[b, h, i, j]) and m - 1 - j >= n - 1 - i
            assert bool(found[b, h, i, j]) == wanted
        assert torch.equal(found, mask.dense(n, m))
