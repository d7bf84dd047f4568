"""Gaussian adaptive attention, arXiv:2401.11143."""

import math
from functools import partial

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, place, seen, spread, wrong
from torch import nn

from attnzoo.core import Law, Layout, Mask, OptionError
from attnzoo.mechanisms.channel.gaussian_adaptive import GaussianAdaptive
from attnzoo.testing import against


def chunks_of(length, number):
    """Where the chunks of a line begin and end: equal ones, the last with the rest."""
    size = length // number
    return [range(h * size, (h + 1) * size if h < number - 1 else length) for h in range(number)]


def weights_of(component, options, lines, h, power=1.0, correction=1, centre=lambda lines: lines.mean(0)):
    """w of one chunk of all lines, (l lines); with faults: another exponent, a biased variance, another centre."""
    if not len(lines):
        return lines
    mean, found = centre(lines), []
    square = ((lines - lines.mean(0)) ** 2).sum(0) / max(1, len(lines) - correction)
    for k in range(options["gaussians"]):
        c = torch.exp(component.log_scale[h, k])
        y = (lines - mean - component.offset[h, k]) / torch.sqrt(square + 1e-8)
        log = -(y**2) / (2 * c**2) * power
        if options["combine"] == "prod":
            log = log - torch.log(math.sqrt(2 * math.pi) * c)
        elif component.share is not None:
            log = log + component.share[h].log_softmax(0)[k]
        found.append(log)
    found = torch.stack(found)
    found = found.sum(0) if options["combine"] == "prod" else found.logsumexp(0)
    if options["clamp"]:
        return found.exp() / found.exp().sum(0).clamp(min=1e-8)
    return found.softmax(0)


def slow(component, options, x, keys, rule=weights_of, deal=chunks_of):
    """Chunk by chunk, of the numbers that exist; what does not exist gets zero along the tokens."""
    out = []
    along = options["axis"] == "tokens"
    for s in range(x.shape[0]):
        lines = x[s] if along else x[s].T  # a line is a column
        there = keys[s] if along else torch.ones(len(lines), dtype=torch.bool)
        weights = []
        for h, chunk in enumerate(deal(len(lines), options["chunks"])):
            see = [i for i in chunk if there[i]]
            w = dict(zip(see, rule(component, options, lines[see], h), strict=True))
            weights += [w.get(i, torch.zeros_like(lines[0])) for i in chunk]
        weighted = lines * torch.stack(weights)
        out.append(weighted if along else weighted.T)
    return torch.stack(out)


@against(GaussianAdaptive, examples=60)
def test_oracle(component, options, x, keys):
    """w_i = g_i / Σ g of a chunk, g the product, or the sum, of Gaussians of y_k = (x − μ − δ_k) / s."""
    return slow(component, options, x, keys)


def with_fault(rule=weights_of, deal=chunks_of, hide=lambda keys: keys, **options):
    """The slow form with a fault, or under other options."""

    def mix(self, x, source, *, mask, layout):
        keys = torch.ones(x.shape[:2], dtype=torch.bool) if mask.keys is None else mask.keys
        chunks, gaussians = self.offset.shape
        own = {"axis": self.axis, "chunks": chunks, "gaussians": gaussians}
        own |= {"combine": self.combine, "clamp": self.clamp}
        return slow(self, own | options, x, hide(keys), rule, deal)

    return wrong(GaussianAdaptive, mix=mix)


def before(change):
    """The mechanism that is changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return GaussianAdaptive.mix(self, x, source, mask=mask, layout=layout)

    return wrong(GaussianAdaptive, mix=mix)


def padding_counted(component, options, lines, h):
    return weights_of(component, options, torch.cat([lines, torch.zeros_like(lines[:1])]), h)[:-1]


def rest_first(length, number):
    """The first chunk takes the rest."""
    size = length // number
    return [range(length - (number - 1) * size)] + [
        range(length - (number - h) * size, length - (number - h - 1) * size) for h in range(1, number)
    ]


MUTANTS = {
    "no half in the exponent": with_fault(rule=partial(weights_of, power=2.0)),
    "a biased variance": with_fault(rule=partial(weights_of, correction=0)),
    "no mean": with_fault(rule=partial(weights_of, centre=lambda lines: 0.0)),
    "the median": with_fault(rule=partial(weights_of, centre=lambda lines: lines.median(0).values)),
    "padding as zeros": with_fault(rule=padding_counted),
    "the mask ignored": with_fault(hide=torch.ones_like),
    "the mask inverted": with_fault(hide=torch.logical_not),
    "the first chunk takes the rest": with_fault(deal=rest_first),
    "a sum for the product": with_fault(combine="sum"),
    "never clamped": with_fault(clamp=False),
    "always clamped": with_fault(clamp=True),
    "offsets of the other sign": before(lambda self: self.offset.neg_()),
    "offsets in deviations": before(lambda self: self.offset.mul_(2)),
    "chunks in another order": before(lambda self: self.offset.copy_(self.offset.flip(0))),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=10).ok


def gaam(dim=4, tokens=6, offset=True, **options) -> GaussianAdaptive:
    """In float64, with weights of a size that matters; offsets of zero where they shall have no say."""
    part = spread(GaussianAdaptive(place(dim, 1, tokens), **options))
    if not offset:
        nn.init.zeros_(part.offset)
    return part


def plain(**options) -> GaussianAdaptive:
    """One Gaussian with c = 1 and δ = 0."""
    part = GaussianAdaptive(place(1, 1, 3), gaussians=1, **options).double()
    nn.init.zeros_(part.log_scale)
    return part


# By hand


@pytest.mark.parametrize("combine", ["prod", "sum"])
def test_hand_three_numbers(combine):
    """(-1, 0, 1) has a variance of 1: e^{-1/2}, 1, e^{-1/2} over their sum."""
    part, e = plain(combine=combine), math.exp(-0.5)
    near(seen(part, line(-1, 0, 1), layout=Layout((3,))).flatten(), [e / (1 + 2 * e), 1 / (1 + 2 * e), e / (1 + 2 * e)], 1e-8)  # fmt: skip
    near(seen(part, line(-1, 0, 1), layout=Layout((3,))).flatten(), [0.2741, 0.4519, 0.2741], 5e-5)
    near(part(line(-1, 0, 1), layout=Layout((3,))), [-0.2741, 0, 0.2741], 5e-5)


def test_hand_along_the_channels():
    part = GaussianAdaptive(place(3), axis="channels", gaussians=1).double()
    nn.init.zeros_(part.log_scale)
    x = torch.tensor([[[-1.0, 0, 1], [5, 5, 5]]], dtype=torch.float64)
    gate = seen(part, x, layout=Layout((2,)), tap="gate")
    near(gate, [[[0.2741, 0.4519, 0.2741], [1 / 3] * 3]], 5e-5)


@pytest.mark.parametrize(
    "options,number",
    [
        ({}, 2 * 5),
        ({"chunks": 4}, 2 * 4 * 5),
        ({"chunks": 4, "combine": "sum"}, 3 * 4 * 5),
        ({"gaussians": 1, "combine": "sum"}, 2),
    ],
)
def test_hand_parameters(options, number):
    assert count(GaussianAdaptive(place(4, 1, 9), **options)) == number


def test_hand_a_product_of_wide_gaussians_vanishes_only_when_clamped():
    """12 of c = 30: each is 1/(30 √2π) at most, all 5e-23, and three over 1e-8 about 1e-14 where the sum should be 1."""
    sums = []
    for clamp in (False, True):
        part = GaussianAdaptive(place(1, 1, 3), gaussians=12, clamp=clamp).double()
        nn.init.constant_(part.log_scale, math.log(30))
        sums.append(seen(part, line(-1, 0, 1), layout=Layout((3,))).sum())
    near(sums[0], 1.0)
    peak = (30 * math.sqrt(2 * math.pi)) ** -12
    near(sums[1] * 1e-8 / peak, 1 + 2 * math.exp(-12 / 1800), 1e-6)
    assert sums[1] < 1e-13


def test_hand_one_narrow_gaussian_vanishes_when_clamped():
    """±1 are y = ±1/√2 of their deviation, and exp(-25) under c = 1/10: over 1e-8, less than their share of 1."""
    part = GaussianAdaptive(place(1, 1, 2), gaussians=1, combine="sum", clamp=True).double()
    nn.init.constant_(part.log_scale, math.log(0.1))
    w = seen(part, line(-1, 1), layout=Layout((2,)))
    near(w.sum() * 1e-8 / (2 * math.exp(-25)), 1, 1e-6)


def test_as_it_starts():
    part = GaussianAdaptive(place(4, 1, 400), gaussians=50, chunks=40)
    assert not part.offset.any() and abs(part.log_scale.std() - 1) < 0.05 and abs(part.log_scale.mean()) < 0.1
    near(GaussianAdaptive(place(4), combine="sum").log_scale.exp(), torch.full((1, 5), 2.0), 1e-6)


@pytest.mark.parametrize("axis", ["tokens", "channels"])
def test_chunks_of_one_are_refused(axis):
    with pytest.raises(OptionError, match=f"5 {axis} make no 3 chunks of two or more"):
        GaussianAdaptive(place(5, 1, 5), axis=axis, chunks=3)


def test_claims():
    laws = {
        (1, False): {Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        (1, True): {Law.SUBSTOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        (2, False): set(),
    }
    for (chunks, clamp), wanted in laws.items():
        assert GaussianAdaptive.card_for(chunks=chunks, clamp=clamp).laws == wanted


# Identities


def test_identity_each_chunk_sums_to_one():
    weights = seen(gaam(tokens=7, chunks=3), normal(2, 7, 4), layout=Layout((7,)))
    near(torch.stack([weights[:, chunk].sum(1) for chunk in chunks_of(7, 3)]), torch.ones(3, 2, 4))


@pytest.mark.parametrize("combine", ["prod", "sum"])
def test_identity_the_order_of_the_gaussians_has_no_say(combine):
    part, x = gaam(combine=combine, gaussians=3), normal(2, 6, 4)
    wanted = part(x, layout=Layout((6,)))
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(parameter[:, [2, 0, 1]].clone())
    near(part(x, layout=Layout((6,))), wanted)


def test_identity_a_product_of_gaussians_is_one():
    """1 / c² = Σ 1 / c_k², δ their mean with these as weights."""
    many, one, x = gaam(gaussians=4), gaam(gaussians=1), normal(2, 6, 4)
    with torch.no_grad():
        precision = torch.exp(-2 * many.log_scale)
        one.log_scale.copy_(-0.5 * precision.sum(1, keepdim=True).log())
        one.offset.copy_((precision * many.offset).sum(1, keepdim=True) / precision.sum(1, keepdim=True))
    near(many(x, layout=Layout((6,))), one(x, layout=Layout((6,))))


def test_identity_without_offsets_level_and_scale_have_no_say():
    part, x = gaam(offset=False), normal(2, 6, 4)
    one, two = (seen(part, t, layout=Layout((6,))) for t in (x, -3 * x + 5))
    near(one, two, 1e-6)  # but for the 1e-8 beside the variance
    assert (
        seen(gaam(), x, layout=Layout((6,))) - seen(gaam(), 3 * x, layout=Layout((6,)))
    ).abs().max() > 1e-3


def test_identity_tokens_in_another_order_inside_a_chunk_but_not_across():
    part, x = gaam(chunks=2), normal(2, 6, 4)
    off = []
    for order in ([2, 0, 1, 4, 5, 3], [3, 1, 2, 0, 4, 5]):
        off.append(
            (part(x[:, order], layout=Layout((6,))) - part(x, layout=Layout((6,)))[:, order]).abs().max()
        )
    assert off[0] < 1e-12 and off[1] > 1e-3


@pytest.mark.parametrize("combine", ["prod", "sum"])
def test_identity_wide_gaussians_weigh_alike(combine):
    part, x = gaam(combine=combine), normal(2, 6, 4)
    nn.init.constant_(part.log_scale, 20.0)
    near(part(x, layout=Layout((6,))), x / 6)


def test_identity_along_the_channels_it_is_itself_on_the_turned_input():
    one, two, x = gaam(6, 4, axis="channels"), gaam(4, 6), normal(2, 6, 4)
    two.load_state_dict(one.state_dict())
    near(one(x.mT, layout=Layout((4,))), two(x, layout=Layout((6,))).mT)


def test_identity_padding_is_a_shorter_input_and_gets_zero():
    part, x = gaam(), normal(2, 6, 4)
    keys = torch.tensor([[True, False, True, True, False, True]]).expand(2, 6)
    out = part(x, mask=Mask(keys=keys), layout=Layout((6,)))
    near(out[:, keys[0]], part(x[:, keys[0]], layout=Layout((4,))))
    assert (out[:, ~keys[0]] == 0).all()


def test_one_token_passes_as_it_is():
    x = normal(2, 1, 4)
    near(gaam(tokens=1)(x, layout=Layout((1,))), x)


@pytest.mark.parametrize(
    "options", [{}, {"axis": "channels", "chunks": 2}, {"combine": "sum"}, {"clamp": True}]
)
def test_narrow_numbers_stay_near(options):
    narrow(GaussianAdaptive, [(2, 7, 12)], site=place(12, 3, 7), **options)


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_fewer_tokens_than_it_was_built_for_leave_chunks_empty_or_with_one(tokens):
    part, x = gaam(tokens=9, chunks=4), normal(2, tokens, 4).requires_grad_()
    weights = seen(part, x, layout=Layout((tokens,)))
    near(weights.sum(1), torch.full((2, 4), 4.0 if tokens > 4 else 1.0))
    part(x, layout=Layout((tokens,))).sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in part.parameters())
