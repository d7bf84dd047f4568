"""`head_importance`: what a model loses with a head."""

import math

import pytest
import torch
from instruments import images, subject, vit
from matplotlib.figure import Figure

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.interventions import AblateHeads
from attnzoo.lab.subject import Subject
from attnzoo.probes import HeadImportance
from attnzoo.probes.head_importance import paired_bootstrap

WAYS = ("gradient", "leave_one_out", "keep_one", "pruning")


def only(layer: int, head: int, depth: int = 2) -> torch.nn.Module:
    """A ViT of which one head alone reaches the residual stream."""
    model = vit(depth=depth)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            kept = slice(12 * head, 12 * (head + 1)) if i == layer else slice(0)
            weight = torch.zeros_like(block.attn.proj.weight)
            weight[:, kept] = 3 * block.attn.proj.weight[:, kept]
            block.attn.proj.weight.copy_(weight)
    return model


def losses(model: torch.nn.Module, *cuts: AblateHeads) -> torch.Tensor:
    of = subject(model)
    return torch.cat([of.losses(*pair) for pair in zip(of.outputs(*cuts), of.batches, strict=True)]).double()


def test_gradients_equal_the_inner_product_of_each_sample():
    model = vit()
    found = attnzoo.probe(subject(model), "head_importance")
    sums = torch.zeros(2, 4, dtype=torch.float64)
    for i in range(6):
        one, outs = Subject.of(model, images()[i : i + 1], torch.tensor([i % 5])), []

        def keep(leaf, out, here, outs=outs):
            outs.append(out)
            out.retain_grad()

        with one.editing("heads", keep):
            one.losses(one.call(one.batches[0]), one.batches[0]).sum().backward()
        for layer, out in enumerate(outs):
            sums[layer] += (out * out.grad).sum(dim=(0, 2, 3)).abs().double()
    raw = sums / 6
    assert found["raw"] == pytest.approx(raw.flatten().tolist(), rel=1e-4)
    normalised = raw / raw.norm(dim=1, keepdim=True)
    assert found["importance"] == pytest.approx(normalised.flatten().tolist(), rel=1e-4)


@pytest.mark.parametrize("by", WAYS)
def test_the_one_head_that_matters_is_found(by):
    found = attnzoo.probe(subject(only(1, 2)), HeadImportance(by=by))
    importance = abs(found.matrix())
    assert importance[0].max() < 1e-9  # nothing of this layer reaches anything
    if by == "keep_one":  # it alone keeps everything, every other alone loses it
        assert importance[1, 2] < 1e-9 < 1e-5 < importance[1, [0, 1, 3]].min()
    else:
        assert importance[1, [0, 1, 3]].max() < 1e-9 < 1e-5 < importance[1, 2]
    plain = attnzoo.probe(subject(vit()), HeadImportance(by=by)).matrix()
    assert (abs(plain) > 1e-5).all()


def test_leaving_out_and_keeping_equal_the_intervention():
    model = vit()
    full = losses(model)
    left = attnzoo.probe(subject(model), HeadImportance(by="leave_one_out"))
    kept = attnzoo.probe(subject(model), HeadImportance(by="keep_one"))
    for row, (layer, head) in enumerate((layer, head) for layer in range(2) for head in range(4)):
        rest = [h for h in range(4) if h != head]
        without = losses(model, AblateHeads(at=f"blocks.{layer}", heads=[head])) - full
        alone = losses(model, AblateHeads(at=f"blocks.{layer}", heads=rest)) - full
        assert [left["loss"][row], left["importance"][row]] == pytest.approx(
            [float(without.mean())] * 2, abs=1e-6
        )
        assert [kept["loss"][row], -kept["importance"][row]] == pytest.approx(
            [float(alone.mean())] * 2, abs=1e-6
        )


def test_what_happens_to_the_answer_by_hand():
    model = vit()
    of = subject(model)
    found = attnzoo.probe(subject(model), HeadImportance(by="pruning"))
    p = torch.cat(of.outputs()).double().softmax(dim=1)
    q = torch.cat(of.outputs(AblateHeads(at="blocks.0", heads=[1]))).double().softmax(dim=1)
    wanted = {"p_true": [], "kl": [], "js": []}
    for i in range(6):
        a, b = p[i].tolist(), q[i].tolist()
        mid = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        kl = [
            sum(x * math.log(x / y) for x, y in zip(*pair, strict=True))
            for pair in ((a, b), (a, mid), (b, mid))
        ]
        wanted["p_true"].append(a[i % 5] - b[i % 5])
        wanted["kl"].append(kl[0])
        wanted["js"].append((kl[1] + kl[2]) / 2)
    for name, values in wanted.items():
        assert found[name][1] == pytest.approx(sum(values) / 6, rel=1e-3), name
    assert found["importance"] == pytest.approx(found["p_true"], rel=1e-12) and max(found["js"]) <= math.log(
        2
    )
    assert found.arrays["by_sample"][1] == pytest.approx(wanted["p_true"], abs=1e-5)
    assert found.arrays["by_class"].shape == (8, 5)
    assert found.arrays["by_class"][1, 0] == pytest.approx(
        (wanted["p_true"][0] + wanted["p_true"][5]) / 2, abs=1e-5
    )


def test_features_turn_where_the_class_token_changes():
    model = vit()
    found = attnzoo.probe(subject(model), HeadImportance(by="pruning"))
    features = model.forward_head(model.forward_features(images()), pre_logits=True)
    with attnzoo.intervene(model, AblateHeads(at="blocks.1", heads=[3])):
        after = model.forward_head(model.forward_features(images()), pre_logits=True)
    turned = 1 - torch.cosine_similarity(features, after, dim=1).detach()
    assert found["cosine"][7] == pytest.approx(float(turned.mean()), abs=1e-5)


@pytest.mark.parametrize("by", ["gradient", "leave_one_out"])
def test_parts_of_a_head(by):
    """The class is read from the class token, so what the last layer gives to the grid changes nothing."""
    model = vit()
    grid = attnzoo.probe(subject(model), HeadImportance(by=by, tokens="grid")).matrix()
    prefix = attnzoo.probe(subject(model), HeadImportance(by=by, tokens="prefix")).matrix()
    both = attnzoo.probe(subject(model), HeadImportance(by=by)).matrix()
    assert (grid[1] == 0).all() and (grid[0] != 0).all()
    assert prefix[1] == pytest.approx(both[1], abs=1e-6) and abs(prefix[0] - both[0]).max() > 1e-4


def test_the_prefix_is_the_class_token_alone():
    model = vit()
    of = subject(model)

    def without_the_first_row(leaf, out, here):
        out = out.clone()
        out[:, 1, 0] = 0
        return out

    with torch.no_grad(), of.editing("heads", without_the_first_row, among=of.leaves[:1]):
        logits = [of.call(batch) for batch in of.batches]
    after = torch.cat([of.losses(*pair) for pair in zip(logits, of.batches, strict=True)]).double()
    found = attnzoo.probe(of, HeadImportance(by="leave_one_out", tokens="prefix"))
    assert found["loss"][1] == pytest.approx(float((after - losses(model)).mean()), abs=1e-6)


def test_a_curve_of_pruning():
    model = vit()
    found = attnzoo.probe(subject(model), HeadImportance(curve=0.25))
    removed, left = found.arrays["removed"], found.arrays["loss_left"]
    assert removed.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert left[0] == pytest.approx(float(losses(model).mean()), abs=1e-6)
    assert left[-1] == pytest.approx(float(losses(model, AblateHeads()).mean()), abs=1e-6)
    low = sorted(zip(found["importance"], found["layer"], found["head"], strict=True))[:2]
    cuts = [AblateHeads(at=f"blocks.{layer}", heads=[head]) for _, layer, head in low]
    assert left[1] == pytest.approx(float(losses(model, *cuts).mean()), abs=1e-6)
    figure = found.figure()
    assert isinstance(figure, Figure) and figure.axes[0].get_xlabel() == "heads removed, %"
    assert len(figure.axes[0].lines[0].get_xdata()) == 5


def test_a_bootstrap_bounds_what_it_should():
    generator = torch.Generator().manual_seed(0)
    certain, none = torch.full((50,), 0.3, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    noisy = 0.4 + torch.randn(400, generator=generator, dtype=torch.float64)
    low, high, p = paired_bootstrap(torch.stack([certain, none], dim=1), resamples=999)
    assert low.tolist() == pytest.approx([0.3, 0]) and high.tolist() == pytest.approx([0.3, 0])
    assert p.tolist() == [2 / 1000, 1]
    low, high, p = (float(x) for x in paired_bootstrap(noisy[:, None]))
    standard = float(noisy.std() / 20)
    assert low == pytest.approx(float(noisy.mean()) - 1.96 * standard, abs=0.2 * standard)
    assert high == pytest.approx(float(noisy.mean()) + 1.96 * standard, abs=0.2 * standard) and p < 0.01
    assert torch.equal(paired_bootstrap(noisy[:, None], 50, 1)[0], paired_bootstrap(noisy[:, None], 50, 1)[0])


def test_branches_share_a_site():
    model = vit("{fuse: hadamard, of: [softmax, elu_linear]}")
    found = attnzoo.probe(subject(model), HeadImportance())
    assert found["branch"] == ["softmax"] * 4 + ["elu_linear"] * 4 + ["softmax"] * 4 + ["elu_linear"] * 4
    assert sum(value**2 for value in found["importance"][:8]) == pytest.approx(1)


def test_sequences_and_pairs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 12, (4, 9), generator=generator)
    targets = torch.where(torch.arange(9) < 4, -100, ids)
    of = Subject.of(attnzoo.compose("task_switching"), ids, targets, kind="sequences")
    for by in WAYS:
        found = attnzoo.probe(of, HeadImportance(by=by, resamples=20))
        assert len(found) == 8 and all(map(math.isfinite, found["importance"]))
        assert len(set(found["importance"])) == 8
    pairs = attnzoo.compose(
        "transformer", edits=["host.dim=16", "host.mlp_dim=16", "host.layers=1", "heads=2", "host.vocab=20"]
    )
    of = Subject.of(pairs, (ids, ids), ids, kind="pairs")
    found = attnzoo.probe(of, "head_importance")
    assert {site.partition(".")[0] for site in found["site"]} == {"encoder", "decoder"}
    assert all(value > 0 for value in found["raw"])


def test_nothing_is_left_behind():
    model = vit()
    state = torch.get_rng_state()
    with torch.no_grad():
        attnzoo.probe(
            subject(model), HeadImportance(by="gradient"), HeadImportance(by="pruning", resamples=5)
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_is_refused():
    with pytest.raises(ZooError, match="AZ926"):
        attnzoo.probe(vit(), "head_importance", inputs=images())
    with pytest.raises(ZooError, match="AZ924"):
        attnzoo.probe(subject(vit("pooling")), "head_importance")
    with pytest.raises(ZooError, match="AZ927.*not classes"):
        attnzoo.probe(vit(), "head_importance", inputs=images(), targets=torch.rand(6))
    small = attnzoo.compose(
        "cct_7_3x1", edits=["host.model.depth=1", "host.model.embed_dim=16", "host.model.img_size=16"]
    )
    with pytest.raises(ZooError, match="AZ924.*before the grid"):
        attnzoo.probe(subject(small), HeadImportance(tokens="prefix"))
    with pytest.raises(ZooError, match="AZ921"):
        HeadImportance(by="loss")
    with pytest.raises(ZooError, match="AZ921"):
        HeadImportance(curve=2.0)
