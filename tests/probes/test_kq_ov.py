"""`kq_ov`: the two circuits of each head, from its weights."""

import math

import numpy as np
import pytest
import torch
from instruments import VIT, images, subject, vit

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.subject import Subject
from attnzoo.probes.kq_ov import projections


def by_slices(model, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """W_KQ and W_OV of a head, from rows and columns of the parameters."""
    attn = model.blocks[layer].attn
    qkv, proj = (p.detach().double().numpy() for p in (attn.qkv.weight, attn.proj.weight))
    at = slice(12 * head, 12 * head + 12)
    q, k, v = qkv[:48][at].T, qkv[48:96][at].T, qkv[96:][at].T  # (c d)
    return k @ q.T / math.sqrt(12), v @ proj[:, at].T


def of_matrix(m: np.ndarray) -> dict[str, float]:
    diagonal, norm = np.diag(m), np.linalg.norm(m)
    alpha = np.trace(m) / len(m)
    return {
        "diagonality": (diagonal**2).sum() / norm**2,
        "homogeneity": 1 - diagonal.std() / abs(diagonal.mean()),
        "alpha": alpha,
        "residual": np.linalg.norm(m - alpha * np.eye(len(m))) / norm,
    }


def test_equals_the_matrices_by_hand():
    model = vit()
    found = attnzoo.probe(subject(model), "kq_ov")
    for row in found.rows():
        kq, ov = by_slices(model, row["layer"], row["head"])
        wanted = {f"kq_{name}": value for name, value in of_matrix(kq).items()}
        wanted |= {f"ov_{name}": value for name, value in of_matrix(ov).items()}
        values = np.linalg.eigvals(ov)
        wanted["ov_copying"] = values.sum().real / np.abs(values).sum()
        wanted["ov_last"] = abs(ov[-1, -1]) / np.linalg.norm(ov)
        last = [by_slices(model, row["layer"], head)[1][-1, -1] for head in range(4)]
        wanted["zero_sum"] = abs(sum(last)) / sum(map(abs, last))
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def test_compositions_equal_the_products():
    model = vit()
    found = attnzoo.probe(subject(model), "kq_ov").arrays
    norm = np.linalg.norm
    for a in range(4):
        for b in range(4):
            ov, (kq, later) = by_slices(model, 0, a)[1], by_slices(model, 1, b)
            read = {"k_composition": kq, "q_composition": kq.T, "v_composition": later}
            for name, m in read.items():
                assert found[name][a, 4 + b] == pytest.approx(norm(ov @ m) / norm(ov) / norm(m), rel=1e-5)
    for scores in found.values():
        assert scores.shape == (8, 8) and np.isnan(scores).sum() == 64 - 16


def test_the_matrices_say_what_the_head_does():
    """Scores are x_j W_KQ x_iᵀ, and the output is the sum over heads of A x W_OV, biases apart."""
    attn = vit().blocks[0].attn.double()
    with torch.no_grad():
        for layer in (attn.qkv, attn.proj):
            layer.bias.zero_()
    x = torch.randn(1, 17, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = {}
    with torch.no_grad(), attnzoo.core.watch(attn, None, lambda name, t: seen.__setitem__(name, t)):
        out = attn(x, layout=attnzoo.core.Layout((4, 4), 1))
    q, k, v, o = projections(attn)
    scores = torch.einsum("jc,hcd,hed,ie->hij", x[0], k, q, x[0]) / math.sqrt(12)
    assert torch.allclose(seen["inner.scores"][0], scores, atol=1e-9)
    assert torch.allclose(
        out[0], torch.einsum("hij,jc,hcd,hde->ie", seen["inner.weights"][0], x[0], v, o), atol=1e-9
    )


def planted(head_gain: list[float]) -> torch.nn.Module:
    """One layer whose four heads of 48 channels each have W_OV = gain · I and W_KQ = I / √48."""
    recipe = VIT.format(attention="softmax", depth=1).replace(
        "num_classes: 5", "num_classes: 5, num_heads: 1"
    )
    model = attnzoo.compose(recipe).eval()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.copy_(torch.eye(48).repeat(3, 1))
        model.blocks[0].attn.proj.weight.copy_(head_gain[0] * torch.eye(48))
    return model


@pytest.mark.parametrize("gain", [0.5, -2.0])
def test_hand_a_head_that_copies_and_one_that_cancels(gain):
    found = attnzoo.probe(subject(planted([gain])), "kq_ov")
    (row,) = found.rows()
    assert row["ov_diagonality"] == pytest.approx(1) and row["ov_copying"] == pytest.approx(
        math.copysign(1, gain)
    )
    assert row["ov_alpha"] == pytest.approx(gain) and row["ov_residual"] == pytest.approx(0, abs=1e-9)
    assert row["ov_homogeneity"] == pytest.approx(1) and row["zero_sum"] == pytest.approx(1)
    assert row["kq_alpha"] == pytest.approx(1 / math.sqrt(48)) and row["ov_last"] == pytest.approx(
        1 / math.sqrt(48)
    )


def test_random_weights_show_nothing():
    found = attnzoo.probe(subject(vit(depth=4)), "kq_ov")
    assert 0.5 / 48 < np.mean(found["ov_diagonality"]) < 2 / 48
    assert 0.5 / 48 < np.mean(found["kq_diagonality"]) < 2 / 48
    assert abs(np.mean(found["ov_copying"])) < 0.15


def test_two_heads_that_cancel_have_no_sum():
    model = vit()
    attn = model.blocks[0].attn
    with torch.no_grad():
        attn.qkv.weight[96 + 12 : 96 + 24] = attn.qkv.weight[96:108]
        attn.proj.weight[:, 12:24] = -attn.proj.weight[:, :12]
        attn.proj.weight[:, 24:] = 0
    found = attnzoo.probe(subject(model), "kq_ov")
    assert found["zero_sum"][:4] == pytest.approx([0] * 4, abs=1e-6) and min(found["zero_sum"][4:]) > 1e-3


def test_a_planted_chain_is_found_by_its_composition():
    """Head 1 of layer 0 writes where the keys of head 2 of layer 1 read, and nobody else does."""
    model = vit()
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.qkv, block.attn.proj):
                layer.weight.copy_(
                    torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3))
                )
        model.blocks[0].attn.proj.weight[:, 12:24] = torch.eye(48)[:, :12]
        model.blocks[1].attn.qkv.weight[48 + 24 : 48 + 36] = torch.eye(48)[:12]
    scores = attnzoo.probe(subject(model), "kq_ov").arrays["k_composition"][:4, 4:]
    assert np.unravel_index(scores.argmax(), scores.shape) == (1, 2)
    assert scores[1, 2] > 1.5 * np.partition(scores.ravel(), -2)[-2]


def test_every_way_of_laying_out_projections(pairs):
    """Of contexts, of separate projections with fewer heads of keys, of branches with shared and own projections."""
    inputs = torch.ones(1, 5).long(), torch.ones(1, 4).long()
    found = attnzoo.probe(pairs, "kq_ov", inputs=inputs, kind="pairs")
    assert all(math.isfinite(value) for value in found["kq_diagonality"])
    inside = attnzoo.probe(subject(vit("{fuse: add, of: [softmax, elu_linear]}")), "kq_ov")
    assert set(inside["branch"]) == {"softmax+elu_linear"} and len(inside) == 8
    with pytest.raises(ZooError, match="AZ924"):
        attnzoo.probe(subject(vit("squeeze_excite")), "kq_ov")
    mixed = attnzoo.probe(subject(vit("{fuse: add, of: [softmax, squeeze_excite]}")), "kq_ov")
    assert set(mixed["branch"]) == {"softmax"} and "squeeze_excite" in mixed.notes[0]


def test_it_needs_no_data_and_draws():
    found = attnzoo.probe(Subject(vit(depth=3), []), "kq_ov")
    heads, *composed, bar = found.figure().axes
    assert len(found) == 12 and len(heads.lines) == 4 and heads.get_xlabel() == "layer"
    assert [axes.get_title() for axes in composed] == ["k composition", "q composition", "v composition"]
    assert attnzoo.probe(Subject.of(vit(depth=1), images(1)), "kq_ov").figure().axes
