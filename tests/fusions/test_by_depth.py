"""A mixture of the branches whose shares depend on the layer; arXiv:2304.06446, §3."""

import math

import pytest
import torch
from by_hand import caught, count, from_first, line, merging, near, normal, place, wrong

from attnzoo.core import OptionError
from attnzoo.fusions.by_depth import ByDepth
from attnzoo.fusions.mean import Mean
from attnzoo.testing import against


def shares(component, options, k):
    """The shares of k branches in the component's layer, read off a walk along the branches."""
    layer, depth = component.layer, component.depth
    if options["shape"] == "learned":
        powers = [torch.exp(logit) for logit in component.logits]
        return [power / sum(powers) for power in powers]
    if options["shape"] == "step":
        each = options["alpha"] or math.ceil(depth / k)
        owners = [i for i in range(k) for _ in range(each)] + [k - 1] * depth
        return [float(i == owners[layer]) for i in range(k)]
    way = (k - 1) * layer / (depth - 1)
    before = int(way)
    return [1 - (way - before) if i == before else (way - before) * (i == before + 1) for i in range(k)]


@against(ByDepth)
def test_oracle(component, options, branches):
    """Σ wᵢ sᵢ."""
    found = shares(component, options, len(branches))
    merged = sum(share * branch for share, branch in zip(found, branches, strict=True))
    if options["shape"] != "learned" and found[0] == 1:
        return branches[0]
    return from_first(component, options, branches, merged)


def weighed(change):
    """Other shares, from those of the layer."""

    def merge(self, branches, x):
        shares = torch.tensor(self.start_shares).double() if self.logits is None else self.logits.softmax(0)
        return sum(share * branch for share, branch in zip(change(self, shares), branches, strict=True))

    return wrong(ByDepth, merge=merge)


MUTANTS = {
    "the wrong way round": weighed(lambda self, w: w.flip(0)),
    "the nearest alone": weighed(lambda self, w: (w == w.max()).double() / (w == w.max()).sum()),
    "equal shares": weighed(lambda self, w: torch.full_like(w, 1 / len(w))),
    "squared": weighed(lambda self, w: w**2),
    "what is learned is ignored": weighed(lambda self, w: torch.tensor(self.start_shares).double()),
    "a sum": merging(ByDepth, lambda self, branches, x: sum(branches)),
    "gamma ignored": wrong(ByDepth, merge_from_first=lambda self, b, x: self.merge(b, x)),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def mixed(layer, depth, *branches, **options):
    """Of branches of one token and channel each."""
    fusion = ByDepth(place(1, layer=layer, depth=depth), len(branches), **options).double()
    return fusion([line(branch) for branch in branches], line(0))


@pytest.mark.parametrize("layer,wanted", [(0, 8), (1, 6), (2, 4), (3, 2), (4, 0)])
def test_hand_two_branches_linear(layer, wanted):
    """Of 8 and 0 in 5 layers: a quarter more of the second in each."""
    near(mixed(layer, 5, 8.0, 0.0), [wanted])


@pytest.mark.parametrize("layer,wanted", [(0, 12), (1, 6), (2, 0), (3, 3), (4, 6)])
def test_hand_three_branches_linear(layer, wanted):
    """The second alone in the middle, 12 → 0 → 6."""
    near(mixed(layer, 5, 12.0, 0.0, 6.0), [wanted])


def test_hand_steps():
    """SpectFormer: α = 4 layers of 12 one mechanism, eight the other; three branches of two layers and the rest."""
    assert [mixed(i, 12, 1.0, 2.0, shape="step", alpha=4).item() for i in range(12)] == [1] * 4 + [2] * 8
    assert [mixed(i, 7, 1.0, 2.0, 3.0, shape="step", alpha=2).item() for i in range(7)] == [
        1,
        1,
        2,
        2,
        3,
        3,
        3,
    ]
    assert [mixed(i, 5, 1.0, 2.0, shape="step").item() for i in range(5)] == [1, 1, 1, 2, 2]


def test_hand_a_model_of_one_layer_has_the_first_branch():
    assert mixed(0, 1, 3.0, 5.0).item() == 3 and mixed(0, 1, 3.0, 5.0, shape="step").item() == 3


def test_hand_parameters():
    assert count(ByDepth(place(6, layer=1, depth=3), 2)) == 0
    learned = ByDepth(place(6, layer=1, depth=3), 2, shape="learned", start="identity")
    assert count(learned) == 2 + 6 and learned.no_weight_decay() == {"logits", "gamma"}
    assert ByDepth(place(6, layer=0, depth=3), 2, start="identity").gamma is None


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_identity_what_is_learned_starts_at_linear(layer):
    """But for the ends, where no softmax is: there within 1/100."""
    end = layer in (0, 4)
    near(mixed(layer, 5, 8.0, 0.0, shape="learned"), mixed(layer, 5, 8.0, 0.0), 0.08 if end else 1e-6)


def test_identity_halfway_it_is_the_mean():
    branches = list(normal(2, 2, 4, 6))
    near(
        ByDepth(place(6, layer=2, depth=5), 2)(branches, branches[0]),
        Mean(place(6), 2)(branches, branches[0]),
    )


@pytest.mark.parametrize("shape", ["linear", "step"])
def test_identity_the_ends_are_a_branch_bit_for_bit(shape):
    """Whatever the others hold: they have no share."""
    one, three = normal(2, 2, 4, 6)
    lost = torch.full_like(one, float("nan"))
    for layer, wanted in ((0, one), (5, three)):
        fusion = ByDepth(place(6, layer=layer, depth=6), 3, shape=shape)
        first, last = (one, lost) if layer == 0 else (lost, three)
        assert torch.equal(fusion([first, lost, last], one), wanted)


@pytest.mark.parametrize("shape", ["linear", "learned", "step"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit(layer, shape):
    branches = normal(3, 2, 4, 6)
    fusion = ByDepth(place(6, layer=layer, depth=3), 3, shape=shape, start="identity").double()
    assert torch.equal(fusion(list(branches), branches[0]), branches[0])


@pytest.mark.parametrize("shape", ["linear", "learned"])
def test_an_alpha_without_steps_is_refused(shape):
    with pytest.raises(OptionError, match=f"AZ214.*`alpha` has no say in `shape: {shape}`"):
        ByDepth(place(4), 2, shape=shape, alpha=3)
