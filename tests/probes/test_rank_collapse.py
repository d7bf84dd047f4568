"""`rank_collapse`: how alike tokens become."""

import numpy as np
import pytest
import torch
from instruments import images, subject, vit
from planted import looking, uniform

import attnzoo
from attnzoo.lab.subject import Subject
from attnzoo.probes import RankCollapse


def by_hand(x: np.ndarray) -> list[float]:
    """Of one sample, (n c)."""
    rest = x - x.mean(axis=0)

    def composite(m):
        return np.sqrt(abs(m).sum(axis=0).max() * abs(m).sum(axis=1).max())

    pairs = [
        x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
        for i in range(len(x))
        for j in range(len(x))
        if i != j
    ]
    scaled = x / np.sqrt((x**2).mean())
    rank = int((np.linalg.svd(scaled, compute_uv=False) > 0.5).sum())
    return [np.linalg.norm(rest) / np.linalg.norm(x), composite(rest) / composite(x), rank, np.mean(pairs)]


def of(found, name: str, column: str = "residual") -> list[float]:
    return [row[column] for row in found.rows() if row["of"] == name]


def test_equals_the_definitions_by_hand():
    x = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[1] += 3
    x[1, 3:] = x[1, :1]
    found = RankCollapse().of_tokens(x)
    assert found.numpy() == pytest.approx(np.array([by_hand(one) for one in x.numpy()]), rel=1e-9)
    keys = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    padded = RankCollapse().of_tokens(x, keys)[0].numpy()
    assert padded == pytest.approx(np.array(by_hand(x[0, :5].numpy())), rel=1e-9)


def test_hand_one_token_repeated_and_what_a_norm_undoes():
    same = torch.ones(1, 6, 4) * torch.tensor([1.0, 2, 3, 5])
    assert RankCollapse().of_tokens(same)[0].tolist() == pytest.approx([0, 0, 1, 1], abs=1e-9)
    sized = same * torch.arange(1, 7)[:, None]
    assert RankCollapse().of_tokens(sized)[0, 0] > 0.3
    assert RankCollapse(norm="layer").of_tokens(sized)[0, 0] < 1e-3
    assert RankCollapse(tolerance=100.0).of_tokens(sized)[0, 2] == 0


def test_it_is_of_what_passes_by():
    model = vit()
    there = subject(model)
    found = attnzoo.probe(there, "rank_collapse")
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    with torch.no_grad():
        model(images())
    handle.remove()
    wanted = np.mean([by_hand(one) for one in seen[0].double().numpy()], axis=0)
    row = next(row for row in found.rows() if (row["site"], row["of"]) == ("blocks.1", "tokens"))
    assert [row[name] for name in ("residual", "composite", "rank", "cosine")] == pytest.approx(
        wanted.tolist(), rel=1e-4
    )
    assert not any(module._forward_hooks for module in there.model.modules())


def test_uniform_attention_leaves_nothing_and_a_skip_keeps_tokens_apart():
    model = vit(depth=3)
    with looking(model, uniform(17)):
        found = attnzoo.probe(subject(model), "rank_collapse")
    assert of(found, "attention") == pytest.approx([0] * 3, abs=1e-5)
    assert of(found, "attention alone") == pytest.approx([0] * 3, abs=1e-5)
    assert of(found, "attention", "cosine") == pytest.approx([1] * 3, abs=1e-5)
    assert of(found, "attention", "rank") == [1] * 3
    assert min(of(found, "tokens")) > 0.3


def test_attention_to_oneself_keeps_the_residual():
    """With A = I, projections that are I and norms that are not there, pure attention changes nothing."""
    model = vit(depth=3)
    with torch.no_grad():
        for block in model.blocks:
            block.norm1 = torch.nn.Identity()
            block.attn.qkv.weight[96:].copy_(torch.eye(48))
            block.attn.proj.weight.copy_(torch.eye(48))
            block.attn.qkv.bias.zero_()
            block.attn.proj.bias.zero_()
    with looking(model, torch.eye(17)):
        found = attnzoo.probe(subject(model), "rank_collapse")
    came_in = found.figures["residual of what came in"]
    assert of(found, "attention alone") == pytest.approx([came_in] * 3, rel=1e-5)
    assert of(found, "attention alone", "rank") == pytest.approx([found.figures["rank of what came in"]] * 3)


def test_pure_attention_loses_rank_and_skips_do_not():
    """Of attention alone the residual falls by factors that fall themselves; with skips it stays."""
    found = attnzoo.probe(subject(vit(depth=4)), "rank_collapse")
    steps = np.diff(np.log(of(found, "attention alone")))
    assert (np.diff(steps) < -0.3).all() and of(found, "attention alone")[-1] < 0.03
    assert min(of(found, "tokens")) > 0.5 and min(of(found, "tokens", "rank")) > 15
    assert of(found, "attention alone", "rank")[-1] < 3


@pytest.mark.parametrize(
    "attention", ["elu_linear", "squeeze_excite", "{fuse: add, of: [softmax, squeeze_excite]}"]
)
def test_every_mechanism_has_tokens(attention):
    found = attnzoo.probe(subject(vit(attention)), "rank_collapse")
    assert len(found) == 6 and all(np.isfinite(found["residual"]))


def test_sequences_and_pairs_leave_out_padding(pairs):
    source = torch.tensor([[1, 5, 6, 7, 0, 0], [1, 5, 6, 7, 8, 2]])
    target = torch.tensor([[1, 5, 6], [1, 7, 6]])
    found = attnzoo.probe(pairs, "rank_collapse", inputs=(source, target), kind="pairs")
    alone = [
        attnzoo.probe(pairs, "rank_collapse", inputs=inputs, kind="pairs")
        for inputs in ((source[:1, :4], target[:1]), (source[1:], target[1:]))
    ]
    means = [sum(values) / 2 for values in zip(*(one["residual"] for one in alone), strict=True)]
    assert found["residual"] == pytest.approx(means, rel=1e-3, abs=1e-6)
    model = attnzoo.compose("task_switching")
    ids = torch.randint(0, 5, (3, 9), generator=torch.Generator().manual_seed(0))
    assert len(attnzoo.probe(Subject.of(model, ids, kind="sequences"), "rank_collapse")) == 6


def test_the_picture():
    figure = attnzoo.probe(subject(vit(depth=3)), "rank_collapse").figure()
    assert [len(axes.lines) for axes in figure.axes] == [3] * 4
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["tokens", "attention", "attention alone"]


def test_two_streams_have_what_attention_gives():
    model = attnzoo.compose("dual_cross_scale").eval()
    found = attnzoo.probe(
        model, "rank_collapse", inputs=torch.randn(1, 3, *model.default_cfg["input_size"][1:])
    )
    assert set(found["of"]) == {"attention"} and "Only what attention gives" in found.notes[0]
