"""Mask: who may attend to whom; and timm's mask arguments as a Mask."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnzoo.core import NO_MASK, Mask
from attnzoo.errors import UnsupportedMask
from attnzoo.hosts.timm_vit import from_timm

KINDS = ("keys", "pairs", "causal")


def mask_of(kinds, b=2, h=3, n=4, m=5, *, one_sample=False, one_head=False) -> Mask:
    """A random mask of these kinds."""
    return Mask(
        keys=torch.rand(b, m) < 0.6 if "keys" in kinds else None,
        pairs=torch.rand(1 if one_sample else b, 1 if one_head else h, n, m) < 0.6
        if "pairs" in kinds
        else None,
        causal="causal" in kinds,
    )


@pytest.mark.parametrize("kinds", [c for r in range(4) for c in itertools.combinations(KINDS, r)])
@pytest.mark.parametrize("one_sample,one_head", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("n,m", [(4, 5), (5, 4), (4, 4), (1, 6)])
def test_dense_is_the_conjunction(kinds, one_sample, one_head, n, m):
    b, h = 2, 3
    mask = mask_of(kinds, b, h, n, m, one_sample=one_sample, one_head=one_head)
    assert mask.kinds == kinds
    dense = mask.dense(n, m)
    if not kinds:
        assert dense is None
        return
    assert dense.dtype == torch.bool and dense.ndim == 4
    full = dense.expand(b, h, n, m)
    for s, e, i, j in itertools.product(range(b), range(h), range(n), range(m)):
        allowed = True
        if "keys" in kinds:
            allowed &= bool(mask.keys[s, j])
        if "pairs" in kinds:
            allowed &= bool(mask.pairs[0 if one_sample else s, 0 if one_head else e, i, j])
        if "causal" in kinds:
            allowed &= j <= i + (m - n)
        assert bool(full[s, e, i, j]) == allowed


@pytest.mark.parametrize(
    "n,m,rows",
    [
        (3, 3, ["100", "110", "111"]),
        (1, 4, ["1111"]),  # the newest token alone sees all
        (2, 4, ["1110", "1111"]),
        (4, 2, ["00", "00", "10", "11"]),  # the oldest queries see nothing
    ],
)
def test_causal_aligns_the_last_query_with_the_last_key(n, m, rows):
    dense = Mask(causal=True).dense(n, m)[0, 0]
    assert ["".join(str(int(x)) for x in row) for row in dense] == rows


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5))
def test_the_last_rows_of_a_causal_mask_are_those_of_fewer_queries(n, m, drop):
    keep = max(1, n - drop)
    assert torch.equal(Mask(causal=True).dense(n, m)[..., -keep:, :], Mask(causal=True).dense(keep, m))


@pytest.mark.parametrize("kinds", [c for r in range(4) for c in itertools.combinations(KINDS, r)])
@pytest.mark.parametrize("can", [c for r in range(4) for c in itertools.combinations(KINDS, r)])
def test_only_refuses_what_is_beyond(kinds, can):
    mask = mask_of(kinds)
    beyond = [kind for kind in kinds if kind not in can]
    if not beyond:
        assert mask.only(*can) is mask
        return
    with pytest.raises(UnsupportedMask) as caught:
        mask.only(*can)
    text = str(caught.value)
    assert caught.value.code == "AZ402" and all(f"`{kind}`" in text for kind in beyond)
    assert f"attnzoo list mechanisms --mask {beyond[0]}" in text
    assert ("honours no mask" in text) == (not can)


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (Mask(keys=torch.ones(2, 5, dtype=torch.bool)), None),
        (Mask(keys=torch.ones(2, 4, dtype=torch.bool)), "AZ405"),
        (Mask(keys=torch.ones(1, 5, dtype=torch.bool)), "AZ405"),
        (Mask(keys=torch.ones(2, 1, dtype=torch.bool)), "AZ405"),
        (Mask(pairs=torch.ones(2, 3, 4, 5, dtype=torch.bool)), None),
        (Mask(pairs=torch.ones(1, 1, 4, 5, dtype=torch.bool)), None),
        (Mask(pairs=torch.ones(1, 2, 4, 5, dtype=torch.bool)), "AZ405"),
        (Mask(pairs=torch.ones(3, 1, 4, 5, dtype=torch.bool)), "AZ405"),
        (Mask(pairs=torch.ones(2, 1, 1, 5, dtype=torch.bool)), "AZ405"),
        (Mask(pairs=torch.ones(2, 1, 4, 1, dtype=torch.bool)), "AZ405"),
        (Mask(causal=True), None),
    ],
)
def test_a_mask_must_fit(mask, code):
    if code is None:
        mask.fit(2, 3, 4, 5)
    else:
        with pytest.raises(UnsupportedMask, match=code):
            mask.fit(2, 3, 4, 5)


def test_pairs_by_head_for_one_head():
    with pytest.raises(UnsupportedMask, match="AZ402.*3 heads"):
        Mask(pairs=torch.ones(2, 3, 4, 5, dtype=torch.bool)).fit(2, 1, 4, 5)
    Mask(pairs=torch.ones(2, 1, 4, 5, dtype=torch.bool)).fit(2, 1, 4, 5)


@pytest.mark.parametrize(
    "fields",
    [
        {"keys": torch.ones(2, 5)},
        {"keys": torch.ones(2, 5, dtype=torch.long)},
        {"keys": torch.ones(2, 1, 5, dtype=torch.bool)},
        {"pairs": torch.ones(2, 1, 4, 5)},
        {"pairs": torch.ones(4, 5, dtype=torch.bool)},
    ],
)
def test_parts_are_boolean_and_have_their_axes(fields):
    with pytest.raises(UnsupportedMask, match="AZ405.*must be boolean"):
        Mask(**fields)


@pytest.mark.parametrize("causal", ["no", 1, None, torch.tensor(True)])
def test_causal_is_true_or_false(causal):
    with pytest.raises(UnsupportedMask, match="AZ405.*True or False"):
        Mask(causal=causal)


def test_masks_are_compared_by_identity():
    mask = mask_of(KINDS)
    assert mask == mask and mask != mask_of(KINDS)
    assert {mask: 1}[mask] == 1
    assert NO_MASK.kinds == ()


# timm's arguments


def test_no_mask_from_timm():
    assert from_timm(None, False) is NO_MASK
    causal = from_timm(None, True)
    assert causal.kinds == ("causal",)


@pytest.mark.parametrize(
    "shape,wanted", [((4, 5), (1, 1, 4, 5)), ((2, 4, 5), (2, 1, 4, 5)), ((2, 3, 4, 5), (2, 3, 4, 5))]
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_masks_from_timm(shape, wanted, dtype):
    allowed = torch.rand(shape) < 0.5
    given = (
        allowed
        if dtype is torch.bool
        else torch.zeros(shape, dtype=dtype).masked_fill(~allowed, float("-inf"))
    )
    mask = from_timm(given, True)
    assert mask.pairs.shape == wanted and mask.pairs.dtype == torch.bool
    assert torch.equal(mask.pairs, allowed.reshape(wanted))
    assert mask.causal and mask.keys is None


@pytest.mark.parametrize(
    "value", [-1e9, 1.0, 0.5, float("inf"), float("nan"), torch.finfo(torch.float32).min]
)
def test_other_numbers_from_timm_are_refused(value):
    given = torch.zeros(3, 3)
    given[0, 1] = value
    with pytest.raises(UnsupportedMask, match="AZ405.*other than 0 and -inf"):
        from_timm(given, False)


def test_whole_numbers_from_timm_are_refused():
    with pytest.raises(UnsupportedMask, match="AZ405"):
        from_timm(
            torch.zeros(3, 3, dtype=torch.long), False
        )  # 0 means `may` in a float mask, `may not` in a boolean
