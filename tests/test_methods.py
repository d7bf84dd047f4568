"""Training methods of the papers, against loops, by hand, and with wrong versions that the loops catch."""

import math

import pytest
import torch
from torch import nn

from attnzoo.errors import MissingMap, OptionError
from attnzoo.methods import PriorDictionary, ReliabilityBalance, focal_region_loss
from attnzoo.methods.reliability import confidence


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Focal region loss


def looped(prediction, target, regions, beta):
    """The loss pixel by pixel."""
    b, c, y, x = prediction.shape
    error = (prediction - target).abs()
    pixels = {}
    for i in range(b):
        for j in range(y):
            for k in range(x):
                pixels.setdefault((i, int(regions[i, j, k])), []).append((j, k))
    mean = {
        (i, r): sum(float(error[i, :, j, k].mean()) for j, k in where) / len(where)
        for (i, r), where in pixels.items()
    }
    worst = max(mean.values())
    total = 0.0
    for (i, r), where in pixels.items():
        for j, k in where:
            total += float(error[i, :, j, k].sum()) * (1 + beta * mean[i, r] / worst)
    return total / (b * c * y * x)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_focal_region_loss_pixel_by_pixel(beta):
    prediction, target = normal(3, 2, 4, 5), normal(3, 2, 4, 5, seed=1)
    regions = torch.randint(0, 4, (3, 4, 5), generator=torch.Generator().manual_seed(2)) * 7
    made = focal_region_loss(prediction, target, regions, beta)
    assert float(made) == pytest.approx(looped(prediction, target, regions, beta), abs=1e-12)


def test_focal_region_loss_by_hand():
    """Rows as regions: w = [3/11, 1], so the loss is (1·14/11 + 2·14/11 + 3·2 + 8·2) / 4."""
    prediction = torch.tensor([[[[1.0, 2.0], [3.0, 8.0]]]])
    regions = torch.tensor([[[0, 0], [1, 1]]])
    made = focal_region_loss(prediction, torch.zeros_like(prediction), regions)
    assert float(made) == pytest.approx((3 * 14 / 11 + 22) / 4, abs=1e-6)


def test_focal_region_loss_weights_get_no_gradient():
    prediction = normal(2, 3, 4, 4).requires_grad_()
    regions = torch.arange(16).reshape(1, 4, 4).expand(2, 4, 4) % 3
    focal_region_loss(prediction, torch.zeros_like(prediction), regions).backward()
    weight = (prediction.grad.abs() * prediction.numel() - 1).detach()  # β w, by pixel
    assert float(weight.min()) > 0 and float(weight.max()) == pytest.approx(1.0)
    assert len(weight[0].unique().round(decimals=9).unique()) == 3


def test_focal_region_loss_without_error_is_zero():
    image = normal(1, 3, 4, 4).requires_grad_()
    loss = focal_region_loss(image, image.detach(), torch.zeros(1, 4, 4, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and bool(image.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_focal_region_loss_in_half_precision(dtype):
    """Sums over thousands of pixels: in half precision they stall, at 256 ones in bfloat16."""
    error = torch.full((1, 1, 64, 64), 0.0625)
    error[:, :, :8], error[:, :, -1] = 2.0, 4.0
    regions = torch.zeros(1, 64, 64, dtype=torch.long)
    regions[:, -1] = 1
    whole = focal_region_loss(error, torch.zeros_like(error), regions, beta=8.0)
    half = focal_region_loss(error.to(dtype), torch.zeros_like(error).to(dtype), regions, beta=8.0)
    assert half.dtype == dtype and float(half) == pytest.approx(float(whole), rel=1e-2)


def test_names_of_regions_have_no_say():
    prediction, target = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)
    regions = torch.randint(0, 3, (2, 3, 3), generator=torch.Generator().manual_seed(2))
    renamed = torch.tensor([40, -5, 1000])[regions]
    one, other = (
        focal_region_loss(prediction, target, regions),
        focal_region_loss(prediction, target, renamed),
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "target, regions",
    [((1, 3, 4, 4), (1, 4, 5)), ((1, 3, 4, 4), (4, 4)), ((1, 1, 4, 4), (1, 4, 4)), ((1, 3, 4, 4), None)],
)
def test_focal_region_loss_refuses_what_does_not_fit(target, regions):
    labels = torch.zeros(1, 4, 4) if regions is None else torch.zeros(regions, dtype=torch.long)
    with pytest.raises(MissingMap, match="AZ409"):
        focal_region_loss(torch.zeros(1, 3, 4, 4), torch.zeros(target), labels)


# Reliability balancing


def spread(balance):
    """In float64, with anchors apart."""
    balance = balance.double()
    with torch.no_grad():
        balance.anchors.copy_(normal(*balance.anchors.shape, seed=9))
    return balance


def looped_balance(balance, features, logits):
    """p̂, g and t sample by sample, as lists of numbers."""
    k, a, _ = balance.anchors.shape
    rows = []
    values = balance.v(features)
    if balance.qk is not None:
        q, key = balance.qk(features).chunk(2, dim=-1)
        values = torch.stack(
            [
                sum(
                    w * v for w, v in zip(((q[i] @ key.T) / math.sqrt(k * a)).softmax(0), values, strict=True)
                )
                for i in range(len(features))
            ]
        )
    for e, z, v in zip(features, logits, values, strict=True):
        far = [
            math.exp(-(e - balance.anchors[c, j]).norm().item() / balance.sharpness)
            for c in range(k)
            for j in range(a)
        ]
        near = [math.exp(s) for s in balance.proj(v).tolist()]
        g, t = ([sum(x[c * a : c * a + a]) / sum(x) for c in range(k)] for x in (far, near))
        exp = [math.exp(s / balance.temperature) for s in z.tolist()]
        p = [x / sum(exp) for x in exp]
        conf = [1 + sum(x * math.log(x) for x in d) / math.log(k) for d in (p, g, t)]
        both = [(x * conf[1] + y * conf[2]) / (conf[1] + conf[2]) for x, y in zip(g, t, strict=True)]
        rows.append(([conf[0] * x + (1 - conf[0]) * y for x, y in zip(p, both, strict=True)], g, t))
    return rows


@pytest.mark.parametrize("attention", ["sample", "batch"])
@pytest.mark.parametrize("anchors", [1, 3])
def test_balance_sample_by_sample(anchors, attention):
    torch.manual_seed(0)
    balance = spread(
        ReliabilityBalance(6, 4, anchors=anchors, temperature=0.7, sharpness=1.3, attention=attention)
    )
    features, logits = normal(5, 6), normal(5, 4, seed=1)
    made = balance(features, logits), balance.by_distance(features), balance.by_attention(features)
    rows = looped_balance(balance, features, logits)
    for i, tensor in enumerate(made):
        assert torch.allclose(tensor, torch.tensor([row[i] for row in rows], dtype=torch.float64), atol=1e-8)
        assert torch.allclose(tensor.sum(dim=-1), torch.ones(5, dtype=torch.float64), atol=1e-12)


def test_images_do_not_attend_to_each_other():
    balance, features, logits = spread(ReliabilityBalance(6, 4)), normal(5, 6), normal(5, 4, seed=1)
    alone = torch.cat([balance(features[i : i + 1], logits[i : i + 1]) for i in range(5)])
    assert torch.allclose(balance(features, logits), alone, atol=1e-12)
    theirs = spread(ReliabilityBalance(6, 4, attention="batch"))
    alone = torch.cat([theirs(features[i : i + 1], logits[i : i + 1]) for i in range(5)])
    assert not torch.allclose(theirs(features, logits), alone, atol=1e-6)


def test_who_is_certain_is_left_alone_and_who_knows_nothing_is_corrected():
    balance, features = spread(ReliabilityBalance(6, 4)), normal(2, 6)
    certain = torch.tensor([[0.0, 800, 0, 0], [800.0, 0, 0, 0]], dtype=torch.float64)
    assert torch.equal(balance(features, certain), certain / 800)
    corrected = balance(features, torch.zeros(2, 4, dtype=torch.float64))
    g, t = balance.by_distance(features), balance.by_attention(features)
    a, b = confidence(g)[:, None], confidence(t)[:, None]
    assert torch.allclose(corrected, (a * g + b * t) / (a + b), atol=1e-6)


def test_a_feature_on_an_anchor_has_its_class():
    balance = spread(ReliabilityBalance(6, 4, anchors=2, sharpness=1e-3))
    g = balance.by_distance(balance.anchors[2, 1][None])
    assert torch.allclose(g, torch.tensor([[0.0, 0, 1, 0]], dtype=torch.float64))


def test_distances_do_not_depend_on_the_batch():
    """Of features close to anchors that lie far out; PyTorch's fast way, from 26 on, would lose their last digits."""
    torch.manual_seed(0)
    balance = ReliabilityBalance(768, 7, anchors=10)
    with torch.no_grad():
        balance.anchors.copy_(torch.randn(768) + torch.randn(7, 10, 768) / 1000)
        features = balance.anchors.flatten(0, 1)[:64] + 1e-3
        many, few = balance.distances(features), balance.distances(features[:3])
        exact = (features[:, None, None].double() - balance.anchors.double()).norm(dim=-1)
        assert torch.equal(many[:3], few) and torch.allclose(many.double(), exact, atol=1e-6)
        half = balance.bfloat16()(features.bfloat16(), torch.zeros(64, 7).bfloat16())
    assert half.dtype == torch.bfloat16 and bool(half.isfinite().all())


def test_confidence_by_hand():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    said = 1 + (0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert confidence(p).tolist() == pytest.approx([0.0, 1.0, said])


def test_losses_of_anchors_by_hand():
    balance = ReliabilityBalance(4, 2).double()
    with torch.no_grad():
        balance.anchors.copy_(torch.tensor([[[1.0, 0, 0, 0]], [[0.0, 2, 0, 0]]]))
    assert float(balance.anchor_loss()) == pytest.approx(-2 * 5 / 2)  # two ordered pairs, √4
    labels, features = torch.tensor([1]), torch.zeros(1, 4, dtype=torch.float64)
    sure = torch.tensor([[0.0, 900]], dtype=torch.float64)
    assert float(balance.centre_loss(features, sure, labels)) == pytest.approx(2 / 2)
    assert float(balance.centre_loss(features, 0 * sure, labels)) == pytest.approx(0, abs=1e-9)


def test_moving_all_anchors_leaves_their_loss():
    balance = spread(ReliabilityBalance(6, 3, anchors=2))
    before = balance.anchor_loss()
    with torch.no_grad():
        balance.anchors.add_(3.0)
    assert torch.allclose(balance.anchor_loss(), before, atol=1e-10)


@pytest.mark.parametrize("attention", ["sample", "batch"])
def test_everything_learns(attention):
    balance = ReliabilityBalance(6, 4, anchors=2, attention=attention)
    features, logits = normal(5, 6).float(), normal(5, 4, seed=1).float()
    loss = nn.functional.nll_loss(balance(features, logits).log(), torch.arange(5) % 4)
    (loss + balance.anchor_loss() + balance.centre_loss(features, logits, torch.arange(5) % 4)).backward()
    for name, parameter in balance.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_certain_probabilities_have_finite_gradients():
    balance = spread(ReliabilityBalance(6, 4))
    logits = torch.tensor([[0.0, 5e3, 0, 0]], dtype=torch.float64, requires_grad=True)
    balance(normal(1, 6), logits).square().sum().backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("wrong", [{"classes": 1}, {"classes": 3, "attention": "all"}])
def test_what_cannot_be_balanced_is_refused(wrong):
    with pytest.raises(OptionError, match="AZ214"):
        ReliabilityBalance(6, **wrong)


# The dictionary of priors


def looked_up(dictionary, features):
    """Priors, loss and entries place by place; the loss by its two terms."""
    b, c, y, x = features.shape
    found, entries, away = torch.zeros_like(features), torch.zeros(b, y, x, dtype=torch.long), 0.0
    for i, j, k in torch.cartesian_prod(torch.arange(b), torch.arange(y), torch.arange(x)).tolist():
        far = [sum((features[i, a, j, k] - e[a]) ** 2 for a in range(c)).item() for e in dictionary.entries]
        entries[i, j, k] = far.index(min(far))
        found[i, :, j, k] = dictionary.entries[entries[i, j, k]].detach()
        away += min(far)
    return found, away / features.numel() * (1 + dictionary.beta), entries


def test_priors_place_by_place():
    torch.manual_seed(0)
    dictionary, features = PriorDictionary(3, 5, beta=0.7).double(), normal(2, 3, 4, 2)
    with torch.no_grad():
        dictionary.entries.copy_(normal(5, 3, seed=1))
    made, wanted = dictionary(features), looked_up(dictionary, features)
    assert torch.allclose(made.features, wanted[0], atol=1e-12) and torch.equal(made.entries, wanted[2])
    assert float(made.loss) == pytest.approx(wanted[1], abs=1e-12) and len(made.entries.unique()) > 2


@pytest.mark.parametrize(
    ("weighed", "of_features", "of_entry"), [("entries", 1.0, 0.25), ("features", 0.25, 1.0)]
)
def test_priors_by_hand(weighed, of_features, of_entry):
    """One channel, entries 0 and 10, features 4 and 9: the loss is (1 + β) (16 + 1) / 2."""
    dictionary = PriorDictionary(1, 2, weighed=weighed)
    with torch.no_grad():
        dictionary.entries.copy_(torch.tensor([[0.0], [10.0]]))
    features = torch.tensor([4.0, 9.0]).reshape(1, 1, 1, 2).requires_grad_()
    made = dictionary(features)
    assert made.entries.tolist() == [[[0, 1]]] and made.features.flatten().tolist() == [0, 10]
    assert float(made.loss.detach()) == pytest.approx(1.25 * 17 / 2)
    (own,) = torch.autograd.grad(made.loss, features, retain_graph=True)
    assert own.flatten().tolist() == pytest.approx([of_features * 4, of_features * -1])  # 2 (z - e) / 2
    (its,) = torch.autograd.grad(made.loss, dictionary.entries)
    assert its.flatten().tolist() == pytest.approx([of_entry * -4, of_entry * 1])


def test_the_gradient_of_priors_passes_to_the_features():
    dictionary, features = PriorDictionary(3, 4).double(), normal(2, 3, 2, 2).requires_grad_()
    weight = normal(2, 3, 2, 2, seed=1)
    grads = torch.autograd.grad((dictionary(features).features * weight).sum(), features)
    assert torch.equal(grads[0], weight)


def test_entries_in_another_order_are_the_same_priors():
    dictionary, features = PriorDictionary(3, 6).double(), normal(1, 3, 4, 4) / 10
    made, order = dictionary(features), torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        dictionary.entries.copy_(dictionary.entries[order])
    again = dictionary(features)
    assert torch.equal(again.features, made.features) and torch.equal(order[again.entries], made.entries)


def test_priors_start_within_one_by_their_number_and_take_half_precision():
    torch.manual_seed(0)
    dictionary = PriorDictionary()
    assert dictionary.entries.shape == (1024, 256)
    assert 0.9 / 1024 < float(dictionary.entries.detach().abs().max()) <= 1 / 1024
    features = dictionary.entries.detach()[:12].T.reshape(1, 256, 3, 4).bfloat16()
    made = dictionary.bfloat16()(features)
    assert made.features.dtype == torch.bfloat16 and made.entries.flatten().tolist() == list(range(12))


@pytest.mark.parametrize("wrong", [{"entries": 0}, {"dim": 0}, {"weighed": "both"}])
def test_a_dictionary_that_cannot_be_is_refused(wrong):
    with pytest.raises(OptionError, match="AZ214"):
        PriorDictionary(**{"dim": 4} | wrong)


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 4, 16)])
def test_features_that_do_not_fit_are_refused(shape):
    with pytest.raises(MissingMap, match="AZ409.*4 channels"):
        PriorDictionary(4)(torch.zeros(shape))
