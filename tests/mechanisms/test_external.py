"""External attention, arXiv:2105.02358, §3.2-3.4, eq. 5-12."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, spread, wrong

from attnzoo.core import Layout, Mask
from attnzoo.functional import merge_heads, rearrange
from attnzoo.mechanisms.latent.external import External
from attnzoo.testing import against


@against(External, examples=40)
def test_oracle(component, options, x, allowed):
    """s = F M_kᵀ; e^{s_ij} / Σ_t e^{s_tj} over the tokens t that i may look at; rows to a sum of 1; times M_v."""
    (b, n, c), expand, heads = x.shape, options["expand"], component.heads
    d = c // heads
    keys = component.key_memory
    values = keys if options["tie"] else component.value_memory
    out = []
    for s in range(b):
        f = x[s] @ component.widen.weight.T
        if component.widen.bias is not None:
            f = f + component.widen.bias
        rows = []
        for i in range(n):
            see, merged = allowed[s, 0, i], []
            for h in range(heads * expand):
                mine = f[:, h * d : (h + 1) * d]
                if not see.any():
                    merged.append(torch.zeros(d).double())
                    continue
                share = torch.exp(mine[i] @ keys.T) / torch.exp(mine[see] @ keys.T).sum(0)
                merged.append(share / share.sum() @ values)
            rows.append(component.proj.weight @ torch.cat(merged))
        row = torch.stack(rows)
        out.append(row if component.proj.bias is None else row + component.proj.bias)
    return torch.stack(out)


def form(self, x, mask, change=None, norm=None, hide=True):
    """The equations, with a fault or without."""
    f = rearrange(self.widen(x), "b n (h d) -> b h n d", h=self.all_heads)
    k = self.key_memory
    v = k if self.value_memory is None else self.value_memory
    if change:
        f, k, v = change(f, k, v)
    scores, n = f @ k.mT, x.shape[1]
    allowed = mask.dense(n, n) if hide else None
    allowed = torch.ones(n, n, dtype=torch.bool) if allowed is None else allowed
    weights = (norm or double)(scores, allowed.expand(x.shape[0], 1, n, n).to(x))
    return self.proj(merge_heads(weights @ v))


def double(scores, allowed):
    """e^s over its sum over tokens, then over its sum over slots."""
    share = scores.exp() / (allowed @ scores.exp()).clamp(min=1e-300)
    share = share * (allowed.sum(-1, keepdim=True) > 0)
    return share / share.sum(-1, keepdim=True).clamp(min=1e-300)


def tokens_only(scores, allowed):
    share = scores.exp() / (allowed @ scores.exp()).clamp(min=1e-300)
    return share * (allowed.sum(-1, keepdim=True) > 0)


def slots_first(scores, allowed):
    weights = scores.softmax(-1)
    return weights / (allowed @ weights).clamp(min=1e-300) * (allowed.sum(-1, keepdim=True) > 0)


def with_fault(**fault):
    """External attention with one fault."""
    return wrong(External, mix=lambda self, x, source, *, mask, layout: form(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "softmax over the slots": with_fault(norm=lambda s, allowed: s.softmax(-1)),
    "no norm over the slots": with_fault(norm=tokens_only),
    "the norms in the other order": with_fault(norm=slots_first),
    "softmax over the batch": with_fault(norm=lambda s, allowed: s.softmax(0)),
    "scores scaled": with_fault(change=lambda f, k, v: (f * f.shape[-1] ** -0.5, k, v)),
    "the memories swapped": with_fault(change=lambda f, k, v: (f, v, k)),
    "M_v tied": with_fault(change=lambda f, k, v: (f, k, k)),
    "heads dealt the other way": with_fault(
        change=lambda f, k, v: (rearrange(f, "b h n d -> b n (h d)").reshape(f.shape), k, v)
    ),
    "the mask ignored": with_fault(hide=False),
    "the mask inverted": with_fault(norm=lambda s, allowed: double(s, 1 - allowed)),
    "causal off by one": with_fault(norm=lambda s, allowed: double(s, allowed * (1 - torch.eye(s.shape[2])))),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def external(dim=8, heads=2, tokens=5, **options) -> External:
    """In float64, with weights of a size that matters."""
    return spread(External(place(dim, heads, tokens), **options), 0.5)


def bare(tokens: int, keys: list, values: list) -> External:
    """One head of two channels without projections: F = x, and A M_v is the output."""
    part = External(place(2, 1, tokens), slots=len(keys), expand=1).double()
    with torch.no_grad():
        for linear in part.widen, part.proj:
            linear.weight.copy_(torch.eye(2))
            linear.bias.zero_()
        part.key_memory.copy_(torch.tensor(keys))
        part.value_memory.copy_(torch.tensor(values))
    return part


EYE = [[1.0, 0], [0, 1]]


# By hand


def test_hand_two_tokens_two_slots():
    """e^s = (1, 1), (3, 1): shares of the columns (1/4, 1/2), (3/4, 1/2), rows brought to 1."""
    part = bare(2, EYE, EYE)
    x = torch.tensor([[[0.0, 0], [math.log(3), 0]]], dtype=torch.float64)
    near(part(x, layout=Layout((2,))), [[[1 / 3, 2 / 3], [3 / 5, 2 / 5]]])


def test_hand_causal_sums_run():
    """The first token sees itself alone: every slot is all its own, so 1/2 each; the second as above."""
    part = bare(2, EYE, EYE)
    x = torch.tensor([[[0.0, 0], [math.log(3), 0]]], dtype=torch.float64)
    near(part(x, mask=Mask(causal=True), layout=Layout((2,))), [[[1 / 2, 1 / 2], [3 / 5, 2 / 5]]])


def test_hand_equal_tokens_read_the_mean_of_the_memory():
    part = bare(3, [[1.0, 2], [0, 1], [3, 1]], [[1.0, 2], [4, 1], [1, 6]])
    x = normal(1, 1, 2).expand(1, 3, 2)
    near(part(x, layout=Layout((3,))), [[[2.0, 3.0]] * 3])


@pytest.mark.parametrize(
    "options,number",
    [
        ({}, 32 * 128 + 128 + 2 * 64 * 8 + 128 * 32 + 32),
        ({"expand": 1, "slots": 3}, 32 * 32 + 32 + 2 * 3 * 8 + 32 * 32 + 32),
        ({"tie": True}, 32 * 128 + 128 + 64 * 8 + 128 * 32 + 32),
    ],
)
def test_hand_parameters(options, number):
    assert count(External(place(32, 4, 5), **options)) == number


def test_starts_from_a_normal_distribution_of_the_right_size():
    part = External(place(256, 1, 4), slots=50)
    assert abs(part.key_memory.std() * 5 - 1) < 0.05
    assert abs(part.value_memory.std() * 128**0.5 - 1) < 0.05


# Identities


def test_identity_outputs_lie_in_the_convex_hull_of_the_memory():
    part = bare(9, normal(5, 2).tolist(), normal(5, 2).tolist())
    out = part(normal(3, 9, 2), layout=Layout((9,)))
    directions = normal(2, 50)
    low, high = (part.value_memory @ directions).aminmax(dim=0)
    along = out @ directions
    assert (along >= low - 1e-12).all() and (along <= high + 1e-12).all()


def test_identity_rows_sum_to_one_over_the_slots():
    weights = seen(external(slots=6), normal(2, 5, 8), layout=Layout((5,)))
    assert weights.shape == (2, 8, 5, 6) and (weights >= 0).all()
    near(weights.sum(-1), torch.ones(2, 8, 5))


def test_identity_what_is_added_to_the_scores_of_a_slot_has_no_say():
    """The norm over tokens cancels it; so a bias of M_k would be dead."""
    part, x = external(slots=6), normal(2, 5, 8)
    handle = part.scores.register_forward_hook(lambda module, args, s: s + torch.arange(6.0).double())
    moved = part(x, layout=Layout((5,)))
    handle.remove()
    near(moved, part(x, layout=Layout((5,))))


def test_identity_tokens_in_another_order_give_the_same_in_that_order():
    part, x, order = external(), normal(2, 5, 8), [3, 0, 4, 1, 2]
    near(part(x[:, order], layout=Layout((5,))), part(x, layout=Layout((5,)))[:, order])


def test_identity_a_causal_row_is_the_last_row_of_the_tokens_so_far():
    part, x = external(), normal(2, 5, 8)
    rows = [part(x[:, : i + 1], layout=Layout((i + 1,)))[:, -1] for i in range(5)]
    near(part(x, mask=Mask(causal=True), layout=Layout((5,))), torch.stack(rows, 1))


def test_identity_padding_is_a_shorter_input():
    part, x = external(), normal(2, 5, 8)
    keys = torch.tensor([[True, False, True, True, False]]).expand(2, 5)
    out = part(x, mask=Mask(keys=keys), layout=Layout((5,)))[:, keys[0]]
    near(out, part(x[:, keys[0]], layout=Layout((3,))))


def test_identity_tied_is_untied_with_equal_memories():
    one, two = external(tie=True), external()
    two.load_state_dict(one.state_dict(), strict=False)
    with torch.no_grad():
        two.value_memory.copy_(one.key_memory)
    x = normal(2, 5, 8)
    near(one(x, layout=Layout((5,))), two(x, layout=Layout((5,))))


def test_memories_are_tied_by_option_only():
    part = External(place(8, 2, 5))
    with torch.no_grad():
        part.key_memory.zero_()
    assert part.value_memory.abs().min() > 0


def test_a_token_that_gets_no_share_still_has_rows_that_sum_to_one():
    """Where e^s would vanish beside others, an ε in the norm would leave rows of zero."""
    part = bare(2, EYE, EYE)
    x = torch.tensor([[[0.0, 0], [900, 900]]], dtype=torch.float64)
    near(part(x, layout=Layout((2,))), [[[0.5, 0.5], [0.5, 0.5]]])


@pytest.mark.parametrize("mask", [Mask(causal=True), Mask()])
def test_where_nobody_exists_the_output_is_the_bias(mask):
    part, x = external(), normal(2, 5, 8).requires_grad_()
    nobody = Mask(keys=torch.zeros(2, 5, dtype=torch.bool), causal=mask.causal)
    out = part(x, mask=nobody, layout=Layout((5,)))
    near(out, part.proj.bias.expand(2, 5, 8))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in part.parameters()) and x.grad.isfinite().all()


def test_narrow_numbers_stay_near():
    narrow(External, [(2, 7, 12)], site=place(12, 3, 7), slots=5, expand=2)
