"""`rollout`: where what the answer is read from comes from."""

import copy
import math

import pytest
import torch
from instruments import VIT, images, subject, vit
from planted import looking, shifted, sink, uniform

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.maps import collect
from attnzoo.lab.rollout import graded, roll, rollout
from attnzoo.lab.subject import Batch, Subject
from attnzoo.probes import Rollout

F64 = torch.float64


def by_hand(maps) -> torch.Tensor:
    """Â_L … Â_1 entry by entry, heads by their mean, (b n n)."""
    out = torch.eye(maps.layout.length, dtype=F64).repeat(len(maps.logits), 1, 1)
    for found in maps.maps:
        mean = found.weights.double().mean(dim=1)
        for sample, layer in enumerate(mean):
            added = layer + torch.eye(len(layer), dtype=F64)
            out[sample] = (added / added.sum(dim=1)[:, None]) @ out[sample]
    return out


def test_equals_the_product_by_hand():
    model = vit(depth=3)
    found = attnzoo.probe(subject(model), "rollout")
    wanted = by_hand(collect(model, images()))
    assert found.arrays["maps"].shape == (6, 4, 4) and found.arrays["by_layer"].shape == (3, 6, 4, 4)
    assert torch.allclose(torch.from_numpy(found.arrays["maps"]).flatten(1), wanted[:, 0, 1:], atol=1e-6)
    assert found["own"][-1] == pytest.approx(float(wanted.diagonal(dim1=1, dim2=2).mean()), rel=1e-5)
    assert found["prefix"][-1] == pytest.approx(float(wanted[:, 0, 0].mean()), rel=1e-5)
    entropy = -(wanted[:, 0] * wanted[:, 0].log()).sum(dim=1).mean() / math.log(17)
    assert found["spread"][-1] == pytest.approx(float(entropy), rel=1e-5)
    assert found["site"] == ["blocks.0", "blocks.1", "blocks.2"]


def test_hand_identity_uniform_and_a_sink():
    """Heads that look at themselves leave all as it is; one uniform layer is (A + I) / 2."""
    model = vit()
    with looking(model, torch.eye(17)):
        alone = attnzoo.probe(subject(model), "rollout")
    assert alone["own"] == pytest.approx([1, 1]) and alone["spread"] == pytest.approx([0, 0], abs=1e-6)
    one = vit(depth=1)
    with looking(one, uniform(17)):
        found = attnzoo.probe(subject(one), "rollout")
    assert found.arrays["maps"] == pytest.approx(0.5 / 17, rel=1e-5)
    assert found["prefix"] == pytest.approx([0.5 + 0.5 / 17], rel=1e-5)
    with looking(model, sink(17, at=5)):
        found = attnzoo.probe(subject(model), "rollout")
    planted = found.arrays["maps"].reshape(6, 16)
    assert (planted.argmax(axis=1) == 4).all() and planted[:, 4] == pytest.approx(0.75)


def test_rows_are_normalised_as_rows():
    """What vit-explain gives there is .2632: its columns are divided by the sums of rows."""
    assert float(roll([torch.tensor([[[0.5, 0.5], [0.0, 0.9]]])])[0, 0, 1]) == pytest.approx(0.25)


def test_every_sample_is_discarded_by_itself():
    model, both = vit(), images(2)
    many = attnzoo.probe(Subject.of(model, both), Rollout(discard=0.9, fusion="max")).arrays["maps"]
    each = [attnzoo.probe(Subject.of(model, x[None]), Rollout(discard=0.9, fusion="max")) for x in both]
    assert torch.allclose(
        torch.from_numpy(many), torch.cat([torch.from_numpy(one.arrays["maps"]) for one in each]), atol=1e-6
    )
    wanted = rollout(collect(model, both), "max", 0.9)[:, 0, 1:]
    assert torch.from_numpy(many).flatten(1) == pytest.approx(wanted, abs=1e-6)
    assert (
        abs(many - attnzoo.probe(Subject.of(model, both), Rollout(fusion="max")).arrays["maps"]).max() > 1e-3
    )


@pytest.mark.parametrize("to", ["predicted", "true"])
def test_gradients_against_finite_differences(to):
    """∂y/∂A of a head by moving one entry of A: (relu(mean_h A ⊙ ∂y/∂A)) of the last layer."""
    model = vit().double()
    there = Subject.of(model, images(1).double(), torch.tensor([3]))
    maps = collect(model, images(1).double())
    found = graded(there, there.batches[0], maps, to).maps[-1].weights[0, 0]
    a, step = maps.maps[-1].weights, 1e-5
    chosen = 3 if to == "true" else int(maps.logits.argmax())
    for i, j in [(0, 0), (0, 7), (4, 2)]:
        total = 0.0
        for head in range(4):
            moved = []
            for sign in (1, -1):
                there_a = a.clone()
                there_a[0, head, i, j] += sign * step
                with torch.no_grad(), looking(model, *there_a[0], at="blocks.1"):
                    moved.append(float(model(images(1).double())[0, chosen]))
            total += float(a[0, head, i, j]) * (moved[0] - moved[1]) / (2 * step)
        assert float(found[i, j]) == pytest.approx(max(total / 4, 0), abs=1e-8)


def test_gradients_of_a_frozen_model_that_is_left_as_it_was():
    model = vit().train()
    before = copy.deepcopy(model.state_dict())
    plain = attnzoo.probe(subject(model), Rollout(gradient=True))
    frozen = attnzoo.probe(subject(model.requires_grad_(False)), Rollout(gradient=True))
    assert (plain.arrays["maps"] == frozen.arrays["maps"]).all() and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    other = attnzoo.probe(subject(model), Rollout(gradient=True, to="true")).arrays["maps"]
    assert abs(other - plain.arrays["maps"]).max() > 1e-6


def test_sequences_are_followed_token_by_token():
    model = attnzoo.compose("task_switching")
    ids = [torch.randint(0, 5, (2, n), generator=torch.Generator().manual_seed(n)) for n in (9, 6)]
    with looking(model, shifted(6, 1), at="layers.*"):
        found = attnzoo.probe(Subject.of(model, ids[1], kind="sequences"), "rollout")
    half = (torch.eye(6, dtype=F64) + shifted(6, 1).double()) / 2
    assert torch.allclose(torch.from_numpy(found.arrays["rollout"][0]), half @ half, atol=1e-6)
    there = Subject(model, [Batch((one,)) for one in ids], "sequences")
    long = attnzoo.probe(there, "rollout").arrays["rollout"]
    assert long.shape == (4, 9, 9) and torch.from_numpy(long[3]).isnan().sum() == 81 - 36


def test_the_encoder_of_a_pair_without_its_padding(pairs):
    source = torch.tensor([[1, 5, 6, 7, 0, 0, 0], [1, 5, 6, 7, 8, 9, 2]])
    found = attnzoo.probe(pairs, "rollout", inputs=(source, torch.ones(2, 4).long()), kind="pairs")
    assert all(site.startswith("encoder") for site in found["site"]) and "encoder" in found.notes[0]
    r = torch.from_numpy(found.arrays["rollout"])
    assert (r[0, :4, 4:] == 0).all()
    own = [r[0].diag()[:4].mean(), r[1].diag().mean()]
    assert found["own"][-1] == pytest.approx(float(sum(own)) / 2)
    entropy = torch.special.entr(r).sum(dim=2)
    spread = [entropy[0, :4].mean() / math.log(4), entropy[1].mean() / math.log(7)]
    assert found["spread"][-1] == pytest.approx(float(sum(spread)) / 2)


def test_branches_and_what_has_no_gradient():
    model = vit("{fuse: add, of: [softmax, elu_linear]}")
    found = attnzoo.probe(subject(model), "rollout")
    assert torch.allclose(
        torch.from_numpy(found.arrays["maps"]).float(),
        rollout(collect(model, images()))[:, 0, 1:].view(-1, 4, 4),
        atol=1e-5,
    )
    found = attnzoo.probe(subject(vit("elu_linear")), "rollout")
    assert found["own"][0] < 1
    with pytest.raises(ZooError, match="AZ924"):
        attnzoo.probe(subject(vit("elu_linear")), Rollout(gradient=True))


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(ZooError, match="AZ903"):
        attnzoo.probe(subject(vit("squeeze_excite")), "rollout")
    with pytest.raises(ZooError, match="AZ926"):
        attnzoo.probe(Subject.of(vit(), images()), Rollout(gradient=True, to="true"))
    model = attnzoo.compose("task_switching")
    with pytest.raises(ZooError, match="AZ927"):
        attnzoo.probe(model, Rollout(gradient=True), inputs=torch.zeros(2, 5).long(), kind="sequences")


def test_the_pictures():
    figure = attnzoo.probe(subject(vit(depth=3)), "rollout").figure()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:4] == ["image", "blocks.0", "blocks.1", "blocks.2"] and len(figure.axes) == 3 * 4
    model = attnzoo.compose(VIT.format(attention="softmax", depth=1)).eval()
    assert attnzoo.probe(Subject.of(model, images(1)), "rollout").figure().axes[1].images
    model = attnzoo.compose("task_switching")
    found = attnzoo.probe(model, "rollout", inputs=torch.zeros(2, 5).long(), kind="sequences")
    assert len(found.figure().axes) == 2
