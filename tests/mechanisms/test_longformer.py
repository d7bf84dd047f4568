"""Longformer, arXiv:2004.05150, §3.1."""

import math
from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, spread, wrong

from attnzoo.core import Layout, Mask, Site
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local.longformer import Longformer
from attnzoo.testing import against


@against(Longformer)
def test_oracle(component, options, q, k, v, layout, allowed):
    """Query by query: a special token all tokens, by its own projections; others their window and special tokens."""
    (b, h, n, d), p, step = q.shape, layout.prefix, options["dilation"]
    window = [r * step for r in range(-options["window"], options["window"] + 1)]
    out = torch.zeros_like(q)
    for s, g, i in torch.cartesian_prod(*map(torch.arange, (b, h, n))).tolist():
        ask, keys, values = q[s, g, i], k[s, g], v[s, g]
        if i < p:
            sees = list(range(n))
            if component.special is not None:
                of_q, of_k, of_v = component.special[g]
                ask, keys, values = of_q.T @ ask, (of_k.T @ keys.T).T, (of_v.T @ values.T).T
        else:
            sees = [*range(p), *(i + r for r in window if p <= i + r < n)]
        sees = [j for j in sees if allowed[s, g, i, j]]
        if sees:
            weights = torch.stack([keys[j] @ ask / math.sqrt(d) for j in sees]).softmax(0)
            out[s, g, i] = sum(a * values[j] for a, j in zip(weights, sees, strict=True))
    return out


def with_fault(
    scale=True,
    step=None,
    wide=0,
    edge=0,
    hear=True,
    see=True,
    twice=False,
    maps="qkv",
    far_keys=False,
    kinds=None,
):
    """The equations over all pairs, with a fault; without one they are not caught."""

    def attend(self, q, k, v, *, mask, layout):
        n, p, delta = q.shape[2], layout.prefix, self.dilation if step is None else step
        i = torch.arange(n)
        gap = i[:, None] - i
        reach = (self.window + wide) * delta
        allowed = (gap <= reach) & (gap >= -reach - edge) & (gap % delta == 0)
        special = torch.zeros(n, n, dtype=torch.bool)
        special[:, :p], special[:p] = hear, see
        allowed = torch.where((i < p)[:, None] | (i < p), special, allowed)
        if kinds is not None:
            mask = replace(mask, **{kind: Mask.__dataclass_fields__[kind].default for kind in kinds})
        dense = mask.dense(n, n)
        whole = allowed if dense is None else allowed & dense
        triple = {"q": q, "k": k, "v": v}
        own = dict(triple)
        if self.special is not None:
            for at, name in enumerate("qkv"):
                if name in maps:
                    own[name] = torch.einsum("bhnd,hde->bhne", triple[name], self.special[:, at])
        if far_keys:
            k = torch.cat([own["k"][:, :, :p], k[:, :, p:]], 2)
        factor = q.shape[-1] ** -0.5 if scale else 1.0
        local, far = q @ k.mT * factor, own["q"] @ own["k"].mT * factor
        if twice:
            local[..., :p] += math.log(2)
        rows = masked_softmax(local, whole) @ v
        return torch.cat([(masked_softmax(far, whole) @ own["v"])[:, :, :p], rows[:, :, p:]], 2)

    return wrong(Longformer, attend=attend)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=30).ok


MUTANTS = {
    "no scale": with_fault(scale=False),
    "no dilation": with_fault(step=1),
    "a window too wide": with_fault(wide=1),
    "a window too wide to one side": with_fault(edge=1),
    "special tokens are not seen": with_fault(hear=False),
    "special tokens see nobody": with_fault(see=False),
    "special tokens counted twice": with_fault(twice=True),
    "no queries of their own": with_fault(maps="kv"),
    "no values of their own": with_fault(maps="qk"),
    "their keys are seen by all": with_fault(far_keys=True),
    "keys ignored": with_fault(kinds=["keys"]),
    "pairs ignored": with_fault(kinds=["pairs"]),
    "not causal": with_fault(kinds=["causal"]),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def head(tokens: int, prefix: int = 0, dim: int = 6, heads: int = 2, **options) -> Longformer:
    """In float64, with matrices of a size that matters."""
    return spread(Longformer(Site("hand", dim, heads, Layout((tokens,), prefix)), **options))


def test_hand_a_window_of_one():
    """Equal scores: each token gets the mean of its neighbours and itself."""
    out = Longformer(place(1), window=1)(
        row(0, 0, 0, 0), row(0, 0, 0, 0), row(1, 2, 6, 10), layout=Layout((4,))
    )
    near(out, [1.5, 3, 6, 8])


def test_hand_dilated():
    out = Longformer(place(1), window=1, dilation=2)(
        row(*[0] * 5), row(*[0] * 5), row(1, 2, 5, 8, 9), layout=Layout((5,))
    )
    near(out, [3, 5, 5, 5, 7])


def test_hand_a_special_token_sees_all_and_is_seen_once():
    """Token 0 is special: it gets the mean of all, the others that of it and of their window."""
    out = Longformer(place(1), window=0)(row(0, 0, 0), row(0, 0, 0), row(3, 6, 9), layout=Layout((2,), 1))
    near(out, [6, 4.5, 6])


def test_hand_causal():
    out = Longformer(place(1), window=1)(
        row(0, 0, 0), row(0, 0, 0), row(1, 3, 7), mask=Mask(causal=True), layout=Layout((3,))
    )
    near(out, [1, 2, 5])


def test_hand_parameters():
    assert count(head(5)) == count(head(5, 1, special="shared")) == 0
    assert count(head(5, 1)) == 2 * 3 * 3 * 3  # heads, of q k v, d × d


# Identities


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 40) < 0.6)])
@pytest.mark.parametrize("window", [39, 40, 500])
def test_identity_the_whole_window_is_softmax(window, mask):
    part, (q, k, v) = head(40, window=window), normal(3, 2, 2, 40, 3)
    near(
        part(q, k, v, mask=mask, layout=Layout((40,))),
        Softmax(place(6, 2))(q, k, v, mask=mask, layout=Layout((40,))),
    )


def test_identity_a_window_of_none_gives_the_values():
    q, k, v = normal(3, 2, 2, 40, 3)
    near(head(40, window=0)(q, k, v, layout=Layout((40,))), v)


def test_identity_of_special_tokens_alone_it_is_softmax_with_their_projections():
    part, layout = head(0, 5, window=1), Layout((0,), 5)
    q, k, v = normal(3, 2, 2, 5, 3)
    mapped = [torch.einsum("bhnd,hde->bhne", t, part.special[:, i]) for i, t in enumerate((q, k, v))]
    near(part(q, k, v, layout=layout), Softmax(place(6, 2))(*mapped, layout=layout))


def test_identity_it_starts_with_the_local_projections():
    site = Site("hand", 6, 2, Layout((20,), 2))
    q, k, v = normal(3, 2, 2, 22, 3)
    own, shared = (Longformer(site, window=3, special=kind).double() for kind in ("own", "shared"))
    near(own(q, k, v, layout=site.layout), shared(q, k, v, layout=site.layout))


@pytest.mark.parametrize("window,dilation", [(2, 1), (20, 1), (3, 4), (17, 3)])
def test_identity_a_mask_of_the_window_over_all_pairs(window, dilation):
    """Over many chunks and interleaved sequences, special tokens with rows of their own left out."""
    part = head(90, 2, window=window, dilation=dilation, special="shared")
    i = torch.arange(92)
    gap = i[:, None] - i
    pairs = (gap.abs() <= window * dilation) & (gap % dilation == 0) | (i < 2) | (i < 2)[:, None]
    assert torch.equal(pairs, pairs.T)
    q, k, v = normal(3, 1, 2, 92, 3)
    mask = Mask(keys=torch.rand(1, 92) < 0.7, causal=True)
    wanted = Softmax(place(6, 2))(
        q, k, v, mask=replace(mask, pairs=pairs[None, None]), layout=Layout((90,), 2)
    )
    near(part(q, k, v, mask=mask, layout=Layout((90,), 2)), wanted)


@pytest.mark.parametrize("asked", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("prefix", [0, 3])
def test_identity_the_newest_queries_get_the_last_rows(asked, prefix):
    part, layout, mask = (
        head(30 - prefix, prefix, window=2, dilation=3),
        Layout((30 - prefix,), prefix),
        Mask(causal=True),
    )
    q, k, v = normal(3, 1, 2, 30, 3)
    whole = part(q, k, v, mask=mask, layout=layout)
    near(part(q[:, :, -asked:], k, v, mask=mask, layout=layout), whole[:, :, -asked:])


def test_the_tap_shows_each_row_of_the_grid_over_special_tokens_and_a_window():
    part, layout = head(40, 2, window=4), Layout((40,), 2)
    weights = seen(part, *normal(3, 1, 2, 42, 3), layout=layout)
    assert weights.shape == (1, 2, 40, 2 + 16 + 2 * 4)
    near(weights.sum(-1), torch.ones(1, 2, 40))
    assert ((weights > 0).sum(-1) <= 2 + 9).all() and ((weights > 0).sum(-1) == 2 + 9).any()


def test_what_is_formed_grows_with_the_tokens_and_not_their_square():
    q, k, v = normal(3, 1, 2, 2000, 3)
    assert seen(head(2000, window=8), q, k, v, layout=Layout((2000,))).numel() == 2 * 2000 * (16 + 16)


def test_special_rows_drop_weights_too():
    site = Site("hand", 6, 2, Layout((5,), 2), attn_drop=0.5)
    part, (q, k, v) = Longformer(site, window=1).double().train(), normal(3, 1, 2, 7, 3)
    one, two = (part(q, k, v, layout=site.layout) for _ in range(2))
    assert (one[:, :, :2] != two[:, :, :2]).any() and (one[:, :, 2:] != two[:, :, 2:]).any()


@pytest.mark.parametrize("prefix", [0, 2])
def test_narrow_numbers_stay_near(prefix):
    narrow(Longformer, [(2, 3, 7, 4)] * 3, site=Site("hand", 12, 3, Layout((7 - prefix,), prefix)), window=2)
