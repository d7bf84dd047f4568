"""`head_performance` and `node_performance`: which labels a head, or a channel, recognises by itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from instruments import images, subject, vit

import attnzoo
from attnzoo.data import evaluation, load_images
from attnzoo.errors import ZooError
from attnzoo.lab.subject import Subject
from attnzoo.probes import HeadPerformance, NodePerformance
from attnzoo.probes.head_performance import (
    Counts,
    Readout,
    Seen,
    clusters_of,
    field_of,
    field_snr,
    logistic_regression,
    normalised,
    signal_to_noise,
)

LABELS = 5


def planted(groups: list[list[int]], count: int = 40) -> Subject:
    """A ViT whose last layer's head i gives a 1 in its first channel for the labels of its group, beside a little noise."""
    model = vit()
    labels, now = torch.arange(count) % LABELS, {}
    coded = images(count) * 0.1 + labels[:, None, None, None]
    member = torch.tensor([[float(label in group) for label in range(LABELS)] for group in groups])

    def note(_module, args):
        now["labels"] = args[0].mean(dim=(1, 2, 3)).round().long()

    def say(_module, _args, out):  # (b h n d)
        said = 0.001 * torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
        said[..., 0] += member[:, now["labels"]].T[..., None]
        return said

    model.register_forward_pre_hook(note)
    model.blocks[-1].attn.inner.register_forward_hook(say)
    return Subject.of(model, coded, labels, batch_size=16)


def blocks_of(sizes: list[int], extra: int, seed: int = 0) -> tuple[np.ndarray, list[list[int]]]:
    """A Boolean field with blocks of these sizes under shuffled labels, and that many ones outside, never in pairs."""
    generator = np.random.default_rng(seed)
    k = sum(sizes)
    labels, boolean, groups = generator.permutation(k), np.zeros((k, k), dtype=bool), []
    for size, end in zip(sizes, np.cumsum(sizes), strict=True):
        group = sorted(labels[end - size : end].tolist())
        boolean[np.ix_(group, group)] = True
        groups.append(group)
    free = [(a, b) for a in range(k) for b in range(a) if not boolean[a, b]]
    for i in generator.permutation(len(free))[:extra]:
        boolean[free[i]] = True
    return boolean, sorted(groups, key=lambda one: (-len(one), one))


@pytest.mark.parametrize("sizes", [[1] * 10, [2] * 5, [5, 3, 2], [10], [4, 4, 1, 1]])
@pytest.mark.parametrize("extra", [0, 7])
def test_known_clusters_are_found(sizes, extra):
    extra = min(extra, sum(sizes) * (sum(sizes) - 1) // 2 - sum(size * (size - 1) // 2 for size in sizes))
    boolean, groups = blocks_of(sizes, extra)
    found = clusters_of(boolean)
    assert found == groups
    assert Counts.of(found, boolean) == (len(sizes), 10, extra)


def test_labels_that_are_not_recognised_are_in_no_cluster():
    boolean = np.zeros((4, 4), dtype=bool)
    boolean[0, 0] = boolean[2, 3] = boolean[3, 2] = True
    assert clusters_of(boolean) == [[0]] and Counts.of([[0]], boolean) == (1, 1, 2)
    assert clusters_of(np.zeros((4, 4), dtype=bool)) == []


def test_hand_ratios():
    identity, everything = np.eye(10, dtype=bool), np.ones((10, 10), dtype=bool)
    assert Counts.of(clusters_of(identity), identity) == (10, 10, 0)
    assert signal_to_noise([Counts(10, 10, 0)], 10) == math.inf
    assert Counts.of(clusters_of(everything), everything) == (1, 10, 0)
    assert signal_to_noise([Counts(1, 10, 0)], 10) == pytest.approx(1)  # says nothing of any label
    # two heads: 5 clusters of 2 and 4 ones outside; 1 cluster of 4: signal 1.4, noise (10 + 4 + 12) / 90
    assert signal_to_noise([Counts(5, 10, 4), Counts(1, 4, 0)], 10) == pytest.approx(1.4 / (26 / 90))
    assert math.isnan(signal_to_noise([Counts(0, 0, 0)], 10))
    total = np.array([[3.0, 0.5, 0], [0, 2, 0.5], [0, 0, 1]])
    assert field_snr(total) == pytest.approx(2 / (1 / 6))
    assert field_snr(np.eye(3)) == math.inf and math.isnan(field_snr(np.zeros((3, 3))))


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("kind", [HeadPerformance, NodePerformance])
def test_fields_and_bias_are_the_mean_logits(kind, centre):
    """Against logits of the whole read-out, on features that are collected here."""
    model = vit()
    of = subject(model, 20)
    found = attnzoo.probe(of, kind(centre=centre, pool="mean"))
    for leaf in of.leaves:
        z = torch.cat(
            [
                heads["heads", leaf].transpose(1, 2).flatten(2)[:, 1:].double().mean(dim=1)
                for _, heads, _ in of.recorded("heads")
            ]
        )
        name = leaf.name
        weight, bias = found.arrays[f"weights {name}"], found.arrays[f"bias {name}"]
        seen = Seen(z, torch.arange(20) % 5, 5)
        plain_weight, plain_bias = logistic_regression(seen, 0.001)
        assert np.allclose(weight, plain_weight, rtol=1e-9)
        logits = z @ plain_weight.T + plain_bias
        means = torch.stack([logits[seen.labels == label].mean(dim=0) for label in range(5)])
        fields = found.arrays[f"fields {name}"]
        assert fields.shape == (4 if kind is HeadPerformance else 48, 5, 5)
        assert np.abs(fields.sum(axis=0) + bias - means.numpy()).max() < 1e-10
        accuracy = (logits.argmax(dim=1) == seen.labels).double().mean()
        assert found.figures[f"accuracy {name}"] == pytest.approx(float(accuracy))


@pytest.mark.parametrize("pool", ["model", "mean"])
def test_planted_clusters_are_found(pool):
    groups = [[0, 1], [2, 3], [4], []]
    found = attnzoo.probe(planted(groups), HeadPerformance(pool=pool, at="blocks.1"))
    members = found.arrays["clusters blocks.1"]
    for head, group in enumerate(groups[:3]):
        assert np.flatnonzero(members[head] >= 0).tolist() == group and set(members[head][group]) == {0}
    assert (
        found["clusters"][:3] == [1, 1, 1]
        and found["size"][:3] == [2, 2, 1]
        and found["noise"][:3] == [0, 0, 0]
    )
    assert found["snr"][:2] == pytest.approx([(2 / 5) / (2 / 20)] * 2) and found["snr"][2] == math.inf


def test_a_head_without_a_say_has_no_ratio():
    found = attnzoo.probe(
        planted([[0, 1], [2, 3], [4], []]), HeadPerformance(at="blocks.1", normalise="layer")
    )
    assert found["clusters"][3] == found["noise"][3] == 0 and math.isnan(found["snr"][3])


def test_what_is_trained_on_wrong_labels_shows_nothing():
    """A read-out that learnt labels that were handed round raises no label more than another."""
    true = planted([[0, 1], [2, 3], [0, 2], [4]], count=80)
    wrong = [
        replace(batch, targets=batch.targets[torch.randperm(16, generator=torch.Generator().manual_seed(i))])
        for i, batch in enumerate(true.batches)
    ]
    good = attnzoo.probe(true, HeadPerformance(at="blocks.1"))
    true.training = wrong
    bad = attnzoo.probe(true, HeadPerformance(at="blocks.1"))
    assert good.figures["snr blocks.1"] > 4 and good.figures["accuracy blocks.1"] > 0.95
    assert bad.figures["snr blocks.1"] < 2.5 and bad.figures["accuracy blocks.1"] < 0.5
    assert any("same samples" in note for note in good.notes) and not any(
        "same" in note for note in bad.notes
    )


def test_other_names_of_labels_are_other_rows():
    model, order = vit(), torch.tensor([3, 0, 4, 1, 2])
    labels = torch.arange(30) % 5
    one, other = (
        attnzoo.probe(model, HeadPerformance(at="blocks.1"), inputs=images(30), targets=targets).arrays[
            "fields blocks.1"
        ]
        for targets in (labels, order[labels])
    )
    assert np.allclose(one, other[:, order][:, :, order], atol=1e-3 * np.abs(one).max())


def test_one_head_is_the_whole_readout():
    """By hand: features, weights and bias of two labels, of which the second channel is silenced."""
    z = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 4.0]], dtype=torch.float64)
    seen = Seen(z, torch.tensor([0, 0, 1]), 2)
    readout = Readout(
        torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64), torch.zeros(2), torch.zeros(2)
    )
    means = torch.tensor([[2.0, 1.0], [0.0, 4.0]], dtype=torch.float64)
    assert field_of(means, readout, slice(0, 2)).tolist() == [[1, 3], [-4, 8]]
    assert field_of(means, readout, slice(0, 1)).tolist() == [[2, 1], [0, 0]]
    assert normalised(field_of(means, readout, slice(0, 1))).tolist() == [[1, 0.5], [0, 0]]
    assert normalised(np.full((2, 2), -1.0)).tolist() == [[0, 0], [0, 0]]
    weight, bias = logistic_regression(seen, 0.001)
    assert ((z @ weight.T + bias).argmax(dim=1) == seen.labels).all()


def test_sequence_pooling_is_the_models_own():
    edits = [
        "host.model.depth=1",
        "host.model.embed_dim=16",
        "host.model.img_size=16",
        "host.model.num_classes=5",
    ]
    model = attnzoo.compose("cct_7_3x1", edits=edits).eval()
    with torch.no_grad():
        model.pool.score.weight.mul_(200)  # far from a mean
    of = subject(model, 10)
    found = attnzoo.probe(of, HeadPerformance())
    with torch.no_grad():
        w = model.pool.weights(model.forward_features(images(10)))
        heads = torch.cat([seen["heads", of.leaves[0]] for _, seen, _ in of.recorded("heads")])
        z = (w * heads.transpose(1, 2).flatten(2)).sum(dim=1).double()
    means = torch.stack([z[torch.arange(10) % 5 == label].mean(dim=0) for label in range(5)])
    assert np.allclose(found.arrays["means blocks.0"], means, atol=1e-6)
    assert not model.pool._forward_pre_hooks


def test_block_features_and_missing_classes():
    of = Subject.of(vit(), images(6), torch.tensor([0, 0, 1, 1, 3, 3]), classes=list("abcde"))
    found = attnzoo.probe(of, HeadPerformance(tap="block"))
    assert np.isnan(found.arrays["fields blocks.0"][:, [2, 4]]).all()
    assert np.isfinite(found.arrays["fields blocks.0"][:, [0, 1, 3]]).all()
    assert any(note.startswith("2 of 5 classes have no sample") for note in found.notes)
    assert (found.arrays["clusters blocks.0"][:, [2, 4]] == -1).all()


def test_it_is_drawn():
    found = attnzoo.probe(planted([[0, 1], [2, 3], [4], []]), HeadPerformance(normalise="layer"))
    figure = found.figure()
    fields, ratios = figure.axes[:-1], figure.axes[-1]
    assert len(fields) == 4 and [len(axes.patches) for axes in fields[:2]] == [1, 1]
    assert fields[0].get_title() == "head 2"  # the clearest first
    assert ratios.get_xlabel() == "signal-to-noise ratio" and len(ratios.patches) == 2


def test_what_cannot_be_is_refused():
    with pytest.raises(ZooError, match="AZ923"):
        attnzoo.probe(subject(vit()), HeadPerformance(at="blocks.7"))
    with pytest.raises(ZooError, match="AZ927"):
        ids = torch.zeros(2, 5, dtype=torch.long)
        attnzoo.probe(
            attnzoo.compose("task_switching"), "head_performance", inputs=ids, targets=ids, kind="sequences"
        )
    with pytest.raises(ZooError, match="AZ921"):
        HeadPerformance(threshold=1.5)


RECIPE = """
recipe: 1
name: small
host:
  kind: cct
  base: cct_2_3x2
  model: {img_size: 8, embed_dim: 32, depth: 3, num_heads: 8, num_classes: 10, n_conv_layers: 1}
attention: softmax
"""
"""A CCT with many small heads: four channels each."""


def trained(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int = 20) -> None:
    """Train a model, in the order of a generator of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(64):
            loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@pytest.mark.slow
def test_a_cct_that_learnt_digits_shows_clusters_above_the_noise():
    """Signal-to-noise ratio grows with depth, and is that of chance where labels are handed round."""
    torch.manual_seed(0)
    model, data = attnzoo.compose(RECIPE), load_images("digits", size=8)
    ready = evaluation(data.image, data.mean, data.std)
    (seen, known), (images, labels) = (
        side.batch(torch.arange(len(side))) for side in (data.train, data.test)
    )
    trained(model, ready(seen), known)
    training = Subject.of(model, ready(seen), known).batches
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    found, chance = (
        attnzoo.probe(Subject.of(model, ready(images), given, training=training), HeadPerformance())
        for given in (labels, shuffled)
    )
    layers = [f"blocks.{layer}" for layer in range(3)]
    ratios = [found.figures[f"snr {name}"] for name in layers]
    assert found.figures["accuracy blocks.2"] > 0.9
    assert min(ratios) > 3 and ratios[2] > ratios[0]  # 4.8, 5.3, 5.7
    assert max(chance.figures[f"snr {name}"] for name in layers) < 2  # 1.2, 1.0, 1.4
    assert (
        min(found["clusters"]) >= 1 and sum(size > 1 for size in found["size"]) > 12
    )  # pairs of labels and more
    assert (
        max(found["accuracy"]) < 0.7 < found.figures["accuracy blocks.0"]
    )  # no head knows all of them alone
