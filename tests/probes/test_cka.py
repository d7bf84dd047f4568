"""`cka`: how alike heads and layers are."""

import math

import numpy as np
import pytest
import torch
from instruments import images, subject, vit
from matplotlib.figure import Figure

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.maps import collect
from attnzoo.lab.subject import Subject
from attnzoo.probes import Cka
from attnzoo.probes.cka import hsic

PAIRS = """
recipe: 1
name: pairs
host: {kind: seq2seq, vocab: 20, max_length: 16, dim: 16, mlp_dim: 0, layers: 1}
heads: 2
attention: {use: softmax}
"""


def gaussians(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """(count *shape), float64."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka(xs: list[torch.Tensor], estimator: str) -> torch.Tensor:
    """Of every pair, in one batch."""
    shared = hsic(torch.stack([x @ x.T for x in xs]), estimator)
    return shared / (shared.diagonal()[:, None] * shared.diagonal()).sqrt()


def by_features(x: torch.Tensor, y: torch.Tensor) -> float:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def unbiased_by_loop(x: torch.Tensor, y: torch.Tensor) -> float:
    """The U-statistic: the mean over all quadruples of different samples."""
    ks, ls, b = (x @ x.T).tolist(), (y @ y.T).tolist(), len(x)
    sums, count = 0.0, 0
    for i in range(b):
        for j in range(b):
            for q in range(b):
                for r in range(b):
                    if len({i, j, q, r}) == 4:
                        sums += ks[i][j] * (ls[i][j] + ls[q][r] - 2 * ls[i][q])
                        count += 1
    return sums / count


def test_biased_is_the_formula_of_features():
    x, y = gaussians(12, 5), gaussians(12, 7, seed=1)
    assert float(cka([x, y], "biased")[0, 1]) == pytest.approx(by_features(x, y))


def test_unbiased_is_the_mean_over_quadruples():
    x, y = gaussians(7, 3) + 1, gaussians(7, 2, seed=1) + gaussians(7, 2)
    found = hsic(torch.stack([x @ x.T, y @ y.T]), "unbiased")
    assert float(found[0, 1]) == pytest.approx(unbiased_by_loop(x, y))
    assert float(found[0, 0]) == pytest.approx(unbiased_by_loop(x, x))


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_what_changes_it_and_what_does_not(estimator):
    x = gaussians(40, 6)
    turned = torch.linalg.qr(gaussians(6, 6, seed=1)).Q
    stretched = x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 0.1], dtype=torch.float64))
    found = cka([x, x @ turned, 3 * x + 5, stretched], estimator)[0].tolist()
    assert found[:3] == pytest.approx([1, 1, 1]) and found[3] < 0.9


def test_unrelated_gaussians_are_alike_only_by_bias():
    xs = [gaussians(20, 30, seed=seed) for seed in range(8)]
    others = ~torch.eye(8, dtype=torch.bool)
    assert float(cka(xs, "unbiased")[others].mean().abs()) < 0.03
    assert float(cka(xs, "biased")[others].min()) > 0.4


def test_the_planted_copy_is_found():
    model = vit()
    turned = torch.linalg.qr(gaussians(12, 12, seed=1)).Q.float()
    with torch.no_grad():
        for part in range(2):  # head 3 of the second layer looks as head 1 does
            weight, bias = (
                model.blocks[1].attn.qkv.weight[48 * part :],
                model.blocks[1].attn.qkv.bias[48 * part :],
            )
            weight[36:48], bias[36:48] = weight[12:24].clone(), bias[12:24].clone()
        weight, bias = model.blocks[1].attn.qkv.weight[96:], model.blocks[1].attn.qkv.bias[96:]
        weight[36:48], bias[36:48] = 2 * turned @ weight[12:24], 2 * turned @ bias[12:24]
    for tokens in ("pooled", "flat"):
        found = attnzoo.probe(subject(model, 24), Cka(tokens=tokens))
        assert found.arrays["cka"][5, 7] == pytest.approx(1, abs=1e-4)
        rows = list(found.rows())
        assert rows[7]["most_like"] == "blocks.1 1" and rows[5]["most_like"] == "blocks.1 3"
        assert max(row["most"] for i, row in enumerate(rows) if i not in (5, 7)) < 0.99
    maps = attnzoo.probe(subject(model, 24), Cka(of="maps"))
    assert maps.arrays["cka"][5, 7] == pytest.approx(1, abs=1e-6)


def test_equals_the_formula_on_heads_maps_and_blocks():
    model = vit()
    of = Subject.of(model, images(8))
    seen, out = next((seen, out) for _, seen, out in of.recorded("heads", "block"))
    assert out.shape == (8, 5)
    heads = [seen["heads", leaf][:, h].double() for leaf in of.leaves for h in range(4)]
    maps = [one.weights[:, h].double() for one in collect(model, images(8)).maps for h in range(4)]
    blocks = [seen["block", leaf].double() for leaf in of.leaves]
    for options, xs in (
        ({}, [x.mean(dim=1) for x in heads]),
        ({"tokens": "flat"}, heads),
        ({"of": "maps"}, maps),
        ({"of": "blocks"}, [x.mean(dim=1) for x in blocks]),
    ):
        found = attnzoo.probe(of, Cka(estimator="biased", **options))
        wanted = [[by_features(x.flatten(1), y.flatten(1)) for y in xs] for x in xs]
        assert np.allclose(found.arrays["cka"], wanted, atol=1e-5), options
        assert len(found) == len(xs)


def test_batches_are_averaged_before_the_ratio():
    model = vit()
    parts = [Subject.of(model, images(4, seed=seed)) for seed in (1, 2)]
    both = Subject(model, [batch for part in parts for batch in part.batches])
    sums = 0
    for part in parts:
        _, seen, _ = next(iter(part.recorded("heads")))
        xs = [seen["heads", leaf][:, h].double().mean(dim=1) for leaf in part.leaves for h in range(4)]
        sums = sums + hsic(torch.stack([x @ x.T for x in xs]), "biased")
    wanted = sums / (sums.diagonal()[:, None] * sums.diagonal()).sqrt()
    assert np.allclose(attnzoo.probe(both, Cka(estimator="biased")).arrays["cka"], wanted, atol=1e-5)


def test_a_dead_head_is_like_nothing():
    model = vit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[96 + 12 : 96 + 24] = 0  # values
        model.blocks[0].attn.qkv.bias[96 + 12 : 96 + 24] = 0
    found = attnzoo.probe(subject(model, 10), "cka")
    assert math.isnan(found["others"][1]) and found["most_like"][1] is None
    assert not any(math.isnan(value) for i, value in enumerate(found["others"]) if i != 1)
    assert "–" in str(found)


def test_padding_changes_nothing():
    model = attnzoo.compose(PAIRS).eval()
    ids = torch.randint(3, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(ids, (0, 5))
    for options in ({}, {"tokens": "flat"}, {"of": "maps"}, {"of": "blocks"}):
        one, two = (attnzoo.probe(model, Cka(**options), inputs=(x, x), kind="pairs") for x in (ids, padded))
        assert np.allclose(one.arrays["cka"], two.arrays["cka"], atol=1e-4), options
    assert two["site"] == ["encoder.0", "decoder.0.self"]  # the decoder's block once


def test_small_batches_are_left_out_or_refused():
    found = attnzoo.probe(Subject.of(vit(), images(11), batch_size=8), "cka")
    assert found.notes == ["3 samples in batches that are too small are left out."]
    with pytest.raises(ZooError, match="AZ926"):
        attnzoo.probe(Subject.of(vit(), images(3)), "cka")
    with pytest.raises(ZooError, match="AZ921"):
        Cka(of="tokens")


def test_fused_branches_and_what_has_no_heads():
    found = attnzoo.probe(subject(vit("{fuse: mean, of: [softmax, cosine]}"), 8), "cka")
    assert len(found) == 16 and found.arrays["cka"].shape == (16, 16)
    with pytest.raises(ZooError, match="AZ924"):
        attnzoo.probe(subject(vit("fourier"), 8), "cka")
    assert len(attnzoo.probe(subject(vit("fourier"), 8), Cka(of="blocks"))) == 2


def test_it_draws_the_matrix():
    found = attnzoo.probe(subject(vit(), 10), "cka")
    figure = found.figure()
    assert isinstance(figure, Figure)
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()][:2] == ["blocks.0 0", "blocks.0 1"]
    assert np.array_equal(axes.images[0].get_array(), found.arrays["cka"]) and bar.get_ylabel() == "CKA"
    many = attnzoo.probe(subject(vit(depth=9), 8), "cka").figure().axes[0]
    assert [text.get_text() for text in many.get_yticklabels()] == [f"blocks.{i}" for i in range(9)]
