"""Spectral hashing attention (SAH-MSA and SASM), arXiv:2203.04845."""

import itertools
import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, spread, wrong

from attnzoo.core import Layout, Mask, Site
from attnzoo.functional import merge_heads, rearrange, split_heads
from attnzoo.mechanisms.sparse.spectral_hashing import Patches, SpectralHashing
from attnzoo.testing import against


def places(layout, options):
    """The tokens of each patch."""
    (rows, columns), side = layout.grid, options["patch"]
    high, wide = min(side, rows), min(side, columns)
    if options["screening"] and (high, wide) == (rows, columns):
        high, wide = math.ceil(rows / 2), math.ceil(columns / 2)
    down, right = (high // 2, wide // 2) if options["shifted"] else (0, 0)
    for y, x in itertools.product(range(0, rows, high), range(0, columns, wide)):
        yield (
            [
                layout.prefix + (i + down) % rows * columns + (j + right) % columns
                for i in range(y, min(y + high, rows))
                for j in range(x, min(x + wide, columns))
            ],
            high * wide,
        )


@against(
    SpectralHashing, examples=30, options=lambda options: "chunk" in options
)  # the default holds 64 tokens
def test_oracle(component, options, x, layout, keys, sparsity=None):
    """Patch by patch, head by head, round by round: sorted, cut, attended to; rounds weighed by their sums of e^score."""
    (b, n, c), heads = x.shape, component.heads
    d, p = c // heads, layout.prefix
    out = []
    for s in range(b):
        q, k, v = component.qkv(x[s]).split(3 * c, 1)
        merged = [torch.zeros(3 * c).double() for _ in range(n)]
        patches = list(places(layout, options))
        worth = [[sparsity[s].flatten()[i - p] for i in tokens if keys[s, i]] for tokens, _ in patches] if options["screening"] else []  # fmt: skip
        worth = [
            sum(values) / len(values) if values else torch.tensor(-math.inf).double() for values in worth
        ]
        best = sorted(range(len(patches)), key=lambda t, worth=worth: -float(worth[t]) if worth else 0)
        best = best[: max(1, len(best) // 2)] if worth else best
        for h in range(heads):
            mine, wide = slice(h * d, (h + 1) * d), slice(3 * h * d, 3 * (h + 1) * d)
            scale = 1 / math.sqrt(3 * d) if options["scaled"] else 1

            def attended(i, others, wide=wide, scale=scale, q=q, k=k, v=v):
                """Σ e^score and Σ e^score v, over e^the largest score, which is the third."""
                scores = scale * (k[others, wide] @ q[i, wide])
                most = scores.detach().max()
                return (scores - most).exp().sum(), (scores - most).exp() @ v[others, wide], most

            for t in best:
                tokens, full = patches[t]
                tokens = [i for i in tokens if keys[s, i]]
                largest = max((float(x[s, i, mine].detach().square().sum()) for i in tokens), default=0.0)
                found = {i: [] for i in tokens}
                for a in component.directions:
                    hashes = {}
                    for i in tokens:
                        own = x[s, i, mine].detach()
                        rest = math.sqrt(max(0.0, largest - float(own.square().sum())))
                        hashes[i] = float(a[:d] @ own + a[d] * rest)
                    line, size = sorted(tokens, key=hashes.get), min(options["chunk"], full)
                    for start in range(0, len(line), size):
                        chunk = line[start : start + size]
                        for i in chunk:
                            found[i].append(attended(i, chunk))
                for i, rounds in found.items():
                    most = max(m for _, _, m in rounds)
                    shares = [total * (m - most).exp() for total, _, m in rounds]  # e^logsumexp
                    values = [value / total for total, value, _ in rounds]
                    merged[i] = merged[i].clone()
                    value = sum(w * r for w, r in zip(shares, values, strict=True)) / sum(shares)
                    merged[i][wide] = value * worth[t].sigmoid() if worth else value
            everybody = [i for i in range(n) if keys[s, i]]
            for i in range(p):
                if everybody:
                    total, value, _ = attended(i, everybody)
                    merged[i] = merged[i].clone()
                    merged[i][wide] = value / total
        out.append(torch.stack(merged) @ component.proj.weight.T)
    return torch.stack(out)


def before(change):
    """The mechanism with something changed after it was built."""

    def mix(self, x, source, *, mask, layout, sparsity=None):
        with torch.no_grad():
            mask, sparsity = change(self, mask, sparsity) or (mask, sparsity)
        return SpectralHashing.mix(self, x, source, mask=mask, layout=layout, sparsity=sparsity)

    return wrong(SpectralHashing, mix=mix)


def ordered(change):
    """With other hashes."""
    return wrong(
        SpectralHashing, _order=lambda self, x, there: SpectralHashing._order(self, *change(x, there))
    )


def cut(change):
    """With other patches."""
    return wrong(SpectralHashing, _patches=lambda self, at: change(SpectralHashing._patches(self, at), at))


def same_rounds(self, mask, sparsity):
    self.directions.copy_(self.directions[:1].expand_as(self.directions))


def hidden_first(self, x, there):
    order = SpectralHashing._order(self, x, there)
    exist = there[:, :, None].expand(order.shape).gather(-1, order)
    return order.gather(-1, exist.double().argsort(dim=-1, stable=True))


def largest_of_all(self, x, there):
    """M over all heads."""
    wide = x.square().sum(-1).amax(dim=(1, 3), keepdim=True).sqrt()
    extra = torch.cat([x, wide[..., None].expand(*x.shape[:-2], 1, 1).expand(*x.shape[:-1], 1)], -1)
    hashes = torch.einsum("bhtnd,kd->bhktn", extra, self.directions)
    return hashes.masked_fill(~there[:, :, None], math.inf).argsort(-1)


MUTANTS = {
    "scaled or not": before(
        lambda self, m, s: setattr(self, "factor", 1.0 if self.factor != 1 else (3 * self.qkv.in_features // self.heads) ** -0.5)
    ),
    "q and k swapped": before(
        lambda self, m, s: [
            t.copy_(t.unflatten(0, (3, -1))[[1, 0, 2]].flatten(0, 1)) for t in self.qkv.parameters()
        ]
        and None
    ),
    "no lifted channel": ordered(lambda x, there: (x, torch.zeros_like(there))),
    "the largest norm plainly": wrong(SpectralHashing, _order=largest_of_all),
    "hidden tokens sorted first": wrong(SpectralHashing, _order=hidden_first),
    "hidden tokens among the others": ordered(lambda x, there: (x, torch.ones_like(there))),
    "the mask ignored": before(lambda self, mask, sparsity: (Mask(), sparsity)),
    "one round": before(same_rounds),
    "chunks one too long": cut(lambda patches, at: patches._replace(chunk=patches.chunk + 1)),
    "patches turned": cut(lambda patches, at: patches._replace(sides=patches.sides[::-1])),
    "shifted or not": cut(lambda patches, at: patches._replace(roll=not patches.roll)),
    "the worse half": before(lambda self, mask, sparsity: None if sparsity is None else (mask, -sparsity)),
    "the better half only chosen": wrong(
        SpectralHashing,
        _screen=lambda self, *how: (SpectralHashing._screen(self, *how) > 0).double(),
    ),
    "all patches": wrong(
        SpectralHashing,
        _screen=lambda self, patches, sparsity, there: torch.ones(1, 1, 1, 1).double(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def hashing(grid, dim=8, heads=2, prefix=0, std=0.3, **options) -> SpectralHashing:
    """In float64, with weights of a size that matters."""
    layout = Layout(grid, prefix)
    return spread(SpectralHashing(Site("hand", dim, heads, layout), **options), std)


def full_attention(part, x, scale=1.0):
    """softmax(q kᵀ) v of all tokens."""
    q, k, v = rearrange(part.qkv(x), "b n (three h e) -> three b h n e", three=3, h=part.heads)
    return part.proj(merge_heads((q @ k.mT * scale).softmax(-1) @ v))


# By hand


def test_hand_the_order_of_three_tokens():
    """a = (1, 1): of 3, 0 and 4 the lifts are √(16 - 9), 4 and 0, so the hashes 5.65, 4 and 4 and a bit less."""
    part = hashing((1, 3), 1, 1, rounds=1)
    part.directions.copy_(torch.tensor([[1.0, 0.99]]))
    tokens = torch.tensor([3.0, 0, 4]).double().reshape(1, 1, 1, 3, 1)
    there = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    assert part._order(tokens, there).flatten().tolist() == [1, 2, 0]
    there[..., 1] = False  # last, whatever it is
    assert part._order(tokens, there).flatten().tolist() == [2, 0, 1]
    there[..., 1], there[..., 2] = True, False  # now 3 is the largest: 3 and 2.97
    assert part._order(tokens, there).flatten().tolist() == [1, 0, 2]


def test_hand_chunks_of_two():
    """q = 0: each of four tokens receives the mean of its chunk; by a = (1, 0) chunks are the least and the largest."""
    part = hashing((1, 4), 1, 1, rounds=1, chunk=2)
    part.directions.copy_(torch.tensor([[1.0, 0.0]]))
    with torch.no_grad():
        part.qkv.weight.copy_(torch.tensor([[0.0]] * 6 + [[1.0], [0.0], [0.0]]))  # v = (x, 0, 0)
        part.qkv.bias.zero_()
        part.proj.weight.copy_(torch.tensor([[1.0, 0, 0]]))
    x = torch.tensor([7.0, 1, 5, 3]).double().reshape(1, 4, 1)
    near(part(x, layout=Layout((1, 4))), [6, 2, 6, 2])
    near(
        part(x, mask=Mask(keys=torch.tensor([[True, True, False, True]])), layout=Layout((1, 4)))[0, :2],
        [7, 2],
    )


@pytest.mark.parametrize("bias", [False, True])
def test_hand_parameters(bias):
    part = SpectralHashing(Site("hand", 28, 4, Layout((4, 4)), qkv_bias=bias))
    assert count(part) == 12 * 28 * 28 + (9 * 28 if bias else 0)
    assert part.directions.shape == (2, 8) and "directions" in part.state_dict()


def test_directions_are_the_modules_own_and_normal():
    site = Site("hand", 64, 1, Layout((4, 4)))
    one, other = (SpectralHashing(site, rounds=32).directions for _ in range(2))
    assert not torch.equal(one, other) and abs(one.std() - 1) < 0.1 and abs(one.mean()) < 0.1


# Identities


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_identity_a_chunk_of_all_is_full_attention_whatever_the_hash(rounds, scaled):
    part, x = hashing((4, 5), rounds=rounds, chunk=20, scaled=scaled), normal(2, 20, 8)
    wanted = full_attention(part, x, 12**-0.5 if scaled else 1.0)
    for _ in range(2):
        near(part(x, layout=Layout((4, 5))), wanted)
        part.directions.normal_()


def test_identity_equal_rounds_are_one_round():
    part, one = hashing((4, 4), chunk=4, rounds=3), hashing((4, 4), chunk=4, rounds=1)
    part.directions.copy_(part.directions[:1].expand(3, -1))
    one.load_state_dict(part.state_dict() | {"directions": part.directions[:1]})
    x = normal(2, 16, 8)
    near(part(x, layout=Layout((4, 4))), one(x, layout=Layout((4, 4))))
    weights = seen(part, x, layout=Layout((4, 4))).unflatten(-1, (3, 4))
    near(weights.sum(-1), torch.full((2, 2, 16, 3), 1 / 3, dtype=torch.float64))


def test_identity_equal_tokens_receive_their_value():
    part, x = hashing((4, 4), chunk=4), normal(1, 1, 8).expand(2, 16, 8)
    near(
        part(x, layout=Layout((4, 4))),
        part.proj(rearrange(part.qkv(x), "b n (three c) -> three b n c", three=3)[2]),
    )


def test_identity_patches_are_images_of_their_own():
    part, layout, small = hashing((4, 6), patch=2, chunk=3), Layout((4, 6)), Layout((2, 2))
    x = normal(2, 24, 8)
    grid, out = x.unflatten(1, (4, 6)), part(x, layout=layout).unflatten(1, (4, 6))
    for i, j in itertools.product(range(0, 4, 2), range(0, 6, 2)):
        alone = part(grid[:, i : i + 2, j : j + 2].flatten(1, 2), layout=small)
        near(out[:, i : i + 2, j : j + 2].flatten(1, 2), alone)


def test_identity_shifted_patches_are_those_of_a_grid_that_is_rolled():
    part, other = hashing((4, 6), patch=2, chunk=3), hashing((4, 6), patch=2, chunk=3, shifted=True)
    other.load_state_dict(part.state_dict())
    x, layout = normal(2, 4, 6, 8), Layout((4, 6))
    rolled = (
        part(x.roll((-1, -1), (1, 2)).flatten(1, 2), layout=layout).unflatten(1, (4, 6)).roll((1, 1), (1, 2))
    )
    near(other(x.flatten(1, 2), layout=layout), rolled.flatten(1, 2))


def test_identity_permuted_tokens_of_a_patch():
    part, x, order = hashing((4, 4), chunk=5), normal(2, 16, 8), torch.randperm(16)
    near(part(x[:, order], layout=Layout((4, 4))), part(x, layout=Layout((4, 4)))[:, order])


def test_identity_hidden_tokens_might_not_be_there():
    part, x = hashing((1, 9), chunk=4), normal(1, 9, 8)
    keys = torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1, 1]]).bool()
    out = part(x, mask=Mask(keys=keys), layout=Layout((1, 9)))
    near(out[:, keys[0]], part(x[:, keys[0]], layout=Layout((1, 7))))


def test_identity_half_the_scores_at_infinity():
    """Those patches are attended to as ever; the others pass unchanged, bit for bit, beside the skip."""
    part, plain = hashing((4, 6), patch=2, chunk=2, screening=True), hashing((4, 6), patch=2, chunk=2)
    plain.load_state_dict(part.state_dict())
    x, layout = normal(1, 24, 8), Layout((4, 6))
    scores = torch.zeros(1, 4, 6).double()
    scores[:, :2, :4], scores[:, 2:, 4:] = math.inf, math.inf
    out, chosen = part(x, layout=layout, given={"sparsity": scores}), scores.flatten() > 0
    near(out[:, chosen], plain(x, layout=layout)[:, chosen])
    assert torch.equal((x + out)[:, ~chosen], x[:, ~chosen])


def test_the_map_learns_by_what_it_multiplies():
    part, layout = hashing((4, 4), patch=2, screening=True), Layout((4, 4))
    scores = torch.arange(16.0).double().reshape(1, 4, 4).requires_grad_()
    part(normal(1, 16, 8), layout=layout, given={"sparsity": scores}).square().sum().backward()
    learns = scores.grad[0] != 0
    assert learns[2:].all() and not learns[:2].any()  # the better half of four patches


def test_a_grid_of_one_patch_is_cut_into_four_to_be_screened():
    part = hashing((4, 6), screening=True)
    assert part._patches(Layout((4, 6))).sides == (2, 3) and part._patches(Layout((4, 40))).sides == (4, 16)
    assert hashing((4, 6))._patches(Layout((4, 6))).sides == (4, 6)


@pytest.mark.parametrize("roll", [False, True])
def test_what_is_cut_is_joined(roll):
    patches, t = Patches((5, 7), (2, 3), 4, roll), normal(2, 3, 35, 4)
    assert patches.cut(t).shape == (2, 3, 9, 8, 4)
    near(patches.join(patches.cut(t)), t)


def test_a_forward_draws_nothing():
    part, x = hashing((4, 4), chunk=4).train(), normal(2, 16, 8)
    state = torch.get_rng_state()
    first = part(x, layout=Layout((4, 4)))
    assert torch.equal(part(x, layout=Layout((4, 4))), first) and torch.equal(torch.get_rng_state(), state)


def test_special_tokens_read_all_and_are_read_by_each_other():
    part, layout, x = hashing((3, 4), prefix=2, chunk=4), Layout((3, 4), 2), normal(2, 14, 8)
    out, other = part(x, layout=layout), x.clone()
    near(out[:, :2], full_attention(part, x)[:, :2])
    other[:, 1] += 3
    near(part(other, layout=layout)[:, 2:], out[:, 2:])
    assert (split_heads(part(other, layout=layout) - out, 2)[:, :, 0].abs().amax(-1) > 1e-6).all()


def test_no_pairs_are_formed():
    part = hashing((10, 12), patch=5, chunk=4)
    assert seen(part, normal(1, 120, 8), layout=Layout((10, 12))).shape == (1, 2, 120, 2 * 4)


def test_narrow_numbers_stay_near():
    narrow(
        SpectralHashing, [(2, 13, 12)], site=Site("hand", 12, 3, Layout((3, 4), 1)), scaled=True
    )  # one chunk
