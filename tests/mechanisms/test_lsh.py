"""LSH attention, arXiv:2001.04451, §2."""

import math
from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, seen, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import UnsupportedMask
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.sparse import lsh as module
from attnzoo.mechanisms.sparse.lsh import Lsh
from attnzoo.testing import against


def linear(layer, x):
    """x Wᵀ + b."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


@against(Lsh, examples=12)
def test_oracle(component, options, x, keys):
    """Round by round: buckets, the sorted tokens, chunks; then query by query over the scores of all rounds."""
    (b, n, c), heads, size = x.shape, component.heads, options["chunk"]
    d, out = c // heads, torch.zeros_like(x)
    q, v = linear(component.q, x), linear(component.v, x)
    for s in range(b):
        for h in range(heads):
            mine = slice(h * d, (h + 1) * d)
            reads = [[] for _ in range(n)]
            for directions in component.directions:
                turned = q[s, :, mine].detach() @ directions
                bucket = torch.cat([turned, -turned], 1).argmax(1).tolist()
                line = sorted(range(n), key=lambda i: (bucket[i] if keys[s, i] else n + 99, i))  # noqa: B023
                chunks = [line[i : i + size] for i in range(0, n, size)]
                for r, chunk in enumerate(chunks):
                    for i in chunk:
                        before = chunks[r - 1] if len(chunks) > 1 else []
                        reads[i] += [j for j in [*before, *chunk] if keys[s, j]]
            for i, js in enumerate(reads):
                js = js if options["duplicates"] == "counted" else sorted(set(js))
                others = [j for j in js if j != i]
                if others:
                    k = q[s, others, mine] / q[s, others, mine].norm(dim=1, keepdim=True)
                    out[s, i, mine] = (k @ q[s, i, mine] / math.sqrt(d)).softmax(0) @ v[s, others, mine]
                elif js:
                    out[s, i, mine] = v[s, i, mine]
    return linear(component.proj, out)


def before(change):
    """Changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return Lsh.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Lsh, mix=mix)


def masked(change):
    """Under another mask."""

    def mix(self, x, source, *, mask, layout):
        return Lsh.mix(self, x, source, mask=change(mask), layout=layout)

    return wrong(Lsh, mix=mix)


ORDER, MEETINGS = module.hashed_order, module.meetings
MUTANTS = {
    "a token reads itself": patched(Lsh, "ITSELF", 0.0),
    "keys as long as they are": wrong(
        Lsh,
        mix=lambda self, x, source, **where: unnormalised(self, x, source, where),
    ),
    "buckets of positive directions alone": patched(
        Lsh, "hashed_order", lambda q, directions, *more: ORDER(q, directions[..., :1].expand_as(directions), *more)
    ),
    "not sorted": patched(
        Lsh, "hashed_order", lambda q, directions, mask, more: torch.arange(q.shape[2] + more).expand(*q.shape[:2], len(directions), -1)
    ),
    "hidden tokens are sorted in": patched(
        Lsh, "hashed_order", lambda q, directions, mask, more: ORDER(q, directions, Mask(), more)
    ),
    "the first round alone": patched(
        Lsh, "hashed_order", lambda q, directions, *more: ORDER(q, directions[:1].expand_as(directions), *more)
    ),
    "the mask ignored": masked(lambda mask: Mask()),
    "the mask inverted": masked(lambda mask: replace(mask, keys=None if mask.keys is None else ~mask.keys)),
    "duplicates as the other option says": before(lambda self: setattr(self, "once", not self.once)),
    "all pairs meet once": patched(
        Lsh, "meetings", lambda order, at, near: MEETINGS(order, at, near).clamp(max=1)
    ),
    "chunks one larger": before(lambda self: setattr(self, "chunk", self.chunk + 1)),
    "values of queries": before(lambda self: self.v.weight.copy_(self.q.weight)),
    "a softmax over samples": patched(
        Lsh, "masked_softmax", lambda scores, allowed: masked_softmax(scores, allowed).roll(1, 0)
    ),
}  # fmt: skip


def unnormalised(self, x, source, where):
    own, F.normalize = F.normalize, lambda t, dim: t
    try:
        return Lsh.mix(self, x, source, **where)
    finally:
        F.normalize = own


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def lsh(n, dim=8, heads=2, **options) -> Lsh:
    """In float64, with parameters of a size that matters."""
    return spread(Lsh(Site("hand", dim, heads, Layout((n,))), **options))


def full(part, x, keys=None, pairs=True):
    """Shared-QK attention of all tokens, or of these pairs (b h n n), without themselves."""
    q, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (part.q(x), part.v(x)))
    scores = q @ (q / q.norm(dim=-1, keepdim=True)).mT / 2
    allowed = pairs & ~torch.eye(x.shape[1], dtype=torch.bool)
    if keys is not None:
        allowed = allowed & keys[:, None, None]
    return part.proj((masked_softmax(scores, allowed) @ v).transpose(1, 2).flatten(2))


# By hand


def test_hand_order_by_bucket_then_position():
    """One direction: positive queries are in bucket 0, negative ones in 1; hidden and filled-up places come last."""
    q = torch.tensor([-1.0, 2, -3, 4, 5]).reshape(1, 1, 5, 1)
    directions = torch.ones(1, 1, 1)
    assert module.hashed_order(q, directions, Mask(), 1).flatten().tolist() == [1, 3, 4, 0, 2, 5]
    keys = torch.tensor([[True, False, True, True, True]])
    assert module.hashed_order(q, directions, Mask(keys=keys), 1).flatten().tolist() == [3, 4, 0, 2, 1, 5]


def test_hand_a_token_alone_reads_itself_and_two_read_each_other():
    part, x = lsh(1), normal(1, 1, 8)
    near(part(x, layout=Layout((1,))), part.proj(part.v(x)))
    part, x = lsh(2), normal(1, 2, 8)
    near(part(x, layout=Layout((2,))), part.proj(part.v(x).flip(1)))


def test_hand_parameters():
    part = Lsh(Site("hand", 16, 2, Layout((9,))), rounds=3, directions=5)
    assert count(part) == 3 * (16 * 16 + 16) and part.directions.shape == (3, 8, 5)


def test_hand_a_causal_mask_is_refused_for_later_tokens_have_a_say():
    """Another last token moves others to other chunks."""
    with pytest.raises(UnsupportedMask, match="AZ402"):
        lsh(4)(normal(1, 4, 8), mask=Mask(causal=True), layout=Layout((4,)))
    q = torch.tensor([1.0, -1, 1, 1]).reshape(1, 1, 4, 1)
    other = torch.tensor([1.0, -1, 1, -1]).reshape(1, 1, 4, 1)
    orders = [module.hashed_order(t, torch.ones(1, 1, 1), Mask(), 0).flatten().tolist() for t in (q, other)]
    assert orders == [[0, 2, 3, 1], [0, 2, 1, 3]]  # with chunks of one, 1 follows 3 or 2


# Identities


@pytest.mark.parametrize("n", [3, 8, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_identity_two_chunks_and_one_round_are_full_shared_attention(n, masked):
    x, keys = normal(2, n, 8), torch.rand(2, n) < 0.7 if masked else None
    keys = keys if keys is None else keys | (torch.arange(n) < 2)
    part = lsh(n, chunk=-(-n // 2), rounds=1)
    found, wanted = part(x, mask=Mask(keys=keys), layout=Layout((n,))), full(part, x, keys)
    exist = 1.0 if keys is None else keys[..., None]
    near(found * exist, wanted * exist)


def test_identity_two_chunks_in_many_rounds_are_full_shared_attention_too():
    """Rounds do not look into each other, unlike the authors' code."""
    part, x = lsh(8, chunk=4, rounds=3), normal(2, 8, 8)
    near(part(x, layout=Layout((8,))), full(part, x))


def test_hand_in_how_many_rounds_tokens_meet():
    """Chunks of one, in the orders 0 1 2 3 and 0 2 1 3: only 0 reads another, 3, in both rounds, and each itself."""
    order = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3]])[None, None]
    at = order[..., None]  # (b h k r c)
    number = module.meetings(order, at, torch.cat([at.roll(1, 3), at], 4))
    assert number[0, 0, :, :, 0].tolist() == [[[2, 2], [1, 2], [1, 2], [1, 2]]] * 2


@pytest.mark.parametrize("n", [7, 24])
def test_identity_where_pairs_count_once_it_is_a_softmax_over_all_that_are_read(n):
    part, x = lsh(n, chunk=3, rounds=3, duplicates="once"), normal(1, n, 8)
    q = part.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
    read = torch.zeros(1, 2, n, n, dtype=torch.bool)
    for head, orders in enumerate(module.hashed_order(q, part.directions, Mask(), -n % 3)[0].tolist()):
        for order in orders:
            chunks = [[i for i in order[at : at + 3] if i < n] for at in range(0, len(order), 3)]
            for here, chunk in enumerate(chunks):
                for i in chunk:
                    read[0, head, i, [*chunks[here - 1], *chunk]] = True
    near(part(x, layout=Layout((n,))), full(part, x, pairs=read))


def test_identity_directions_are_a_buffer_and_nothing_is_drawn_in_a_forward():
    part, x = lsh(40, chunk=4), normal(1, 40, 8)
    state = torch.random.get_rng_state()
    first = part(x, layout=Layout((40,)))
    assert torch.equal(state, torch.random.get_rng_state())
    near(part(x, layout=Layout((40,))), first)
    other = lsh(40, chunk=4)
    other.load_state_dict(part.state_dict())
    near(other(x, layout=Layout((40,))), first)


def test_no_pairs_are_formed():
    part, x = lsh(40, chunk=4, rounds=2), normal(1, 40, 8)
    weights = seen(part, x, layout=Layout((40,)))
    assert weights.shape == (1, 2, 40, 2 * 2 * 4)
    near(weights.sum(-1), torch.ones(1, 2, 40))


def test_narrow_numbers_stay_near():
    narrow(Lsh, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((12,))), chunk=6)
