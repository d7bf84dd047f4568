"""`head_divergence`: how much of what a head gives comes from the image, the source or the context."""

import math

import pytest
import torch
from instruments import images, subject, vit

import attnzoo
from attnzoo.core import find_taps
from attnzoo.errors import ZooError
from attnzoo.lab.subject import Subject
from attnzoo.probes import HeadDivergence


def heads_of(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What the heads of each layer give, (b h n d)."""
    seen: list[torch.Tensor] = []
    handles = [b.attn.inner.register_forward_hook(lambda _m, _a, out: seen.append(out)) for b in model.blocks]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("without", ["zero", "mean"])
def test_equals_two_forwards(without):
    model, x = vit(), images()
    found = attnzoo.probe(subject(model), HeadDivergence(without=without, outliers="kept"))
    plain = heads_of(model, x)
    other = {"zero": torch.zeros_like, "mean": lambda out: out.mean(dim=1, keepdim=True).expand_as(out)}[
        without
    ]
    handle = model.patch_embed.register_forward_hook(lambda _m, _a, out: other(out))
    emptied = heads_of(model, x)
    handle.remove()
    wanted = [(a - b)[:, :, 0].norm(dim=-1).mean(dim=0) for a, b in zip(plain, emptied, strict=True)]
    assert found["divergence"] == pytest.approx(torch.cat(wanted).tolist(), rel=1e-4)
    assert found["kept"] == found["divergence"]
    everything = attnzoo.probe(subject(model), HeadDivergence(without=without, tokens="all"))["divergence"]
    wanted = [(a - b).norm(dim=-1).mean(dim=(0, 2)) for a, b in zip(plain, emptied, strict=True)]
    assert everything == pytest.approx(torch.cat(wanted).tolist(), rel=1e-4)


def test_a_head_that_does_not_look_is_found():
    """One sees the class token alone, one gives nothing: neither depends on the patches, all others do."""
    model = vit()

    def to_itself(_module, _args, weights):
        weights = weights.clone()
        weights[:, 2] = 0
        weights[:, 2, :, 0] = 1
        return weights

    for tap in find_taps(model.blocks[0].attn, "weights").values():
        tap.register_forward_hook(to_itself)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[2 * 48 : 2 * 48 + 12] = 0  # the values of head 0
        model.blocks[1].attn.qkv.bias[2 * 48 : 2 * 48 + 12] = 0
    found = attnzoo.probe(subject(model), "head_divergence").matrix("divergence")
    blind = {(0, 2), (1, 0)}
    for layer in range(2):
        for head in range(4):
            assert (found[layer, head] == 0) if (layer, head) in blind else (found[layer, head] > 0.1)


def test_an_image_of_one_colour_is_its_mean():
    model = vit()
    flat = torch.full((2, 3, 16, 16), 0.7)
    found = attnzoo.probe(model, HeadDivergence(without="mean"), inputs=flat)
    assert max(found["divergence"]) < 1e-4
    assert min(attnzoo.probe(model, HeadDivergence(), inputs=flat)["divergence"]) > 1e-2


def test_hand_outliers():
    """Zero where both are far above their layer; the standard deviation divides by the number of heads."""
    far, near = [0.0, 0.1, 0.9, 1.0], [1.0, 1.0, 1.0, 1.0]
    kept = HeadDivergence()._kept(torch.tensor([far, far]), torch.tensor([far, near]))
    assert kept.tolist() == torch.tensor([[0, 0.1, 0.9, 0], far]).tolist()  # 0.5 + 0.4528 < 1 < 0.5 + 0.5228
    assert (
        HeadDivergence(outliers="kept")._kept(torch.tensor([far]), torch.tensor([far])).tolist()
        == torch.tensor([far]).tolist()
    )


def test_the_sum_grows_with_k_and_half_is_selected():
    model = vit(depth=3)
    found = [attnzoo.probe(subject(model), HeadDivergence(k=k)) for k in (1, 2, 3, 4, 9)]
    totals = [one.figures["t_vhd"] for one in found]
    assert totals == sorted(totals) and totals[3] == totals[4] == pytest.approx(
        sum(found[0]["kept"]), rel=1e-9
    )
    assert (found[0].matrix("selected").sum(axis=1) <= 2).all() and max(found[0]["selected"]) > 0


def test_sequences_and_pairs():
    ids = torch.randint(3, 12, (4, 9), generator=torch.Generator().manual_seed(0))
    of = Subject.of(attnzoo.compose("task_switching").eval(), ids, kind="sequences")
    found = attnzoo.probe(of, "head_divergence")
    assert len(found) == 8 and min(found["divergence"]) > 0
    alone = Subject.of(of.model, ids[:, :1], kind="sequences")  # nothing comes before the last
    assert attnzoo.probe(alone, "head_divergence")["divergence"] == [0.0] * 8
    edits = ["host.dim=16", "host.mlp_dim=16", "host.layers=2", "heads=2", "host.vocab=20"]
    target = ids.clone()
    target[0, 6:] = 0
    pairs = attnzoo.compose("transformer", edits=edits).eval()
    found = attnzoo.probe(Subject.of(pairs, (ids, target), kind="pairs"), "head_divergence")
    assert {site.partition(".")[0] for site in found["site"]} == {"decoder"}
    assert all(map(math.isfinite, found["divergence"])) and max(found["divergence"]) > 0
    short, long = (
        attnzoo.probe(Subject.of(pairs, (ids[:1], target[:1, :n]), kind="pairs"), "head_divergence")[
            "divergence"
        ]
        for n in (6, 9)
    )
    assert short == pytest.approx(long, abs=1e-5)  # padding is not the last token


def test_branches_and_models_without_a_class_token():
    model = vit("{fuse: hadamard, of: [softmax, elu_linear]}")
    found = attnzoo.probe(subject(model), "head_divergence")
    assert len(found) == 16 and sum(found["selected"][:8]) <= 4
    edits = ["host.model.depth=1", "host.model.embed_dim=16", "host.model.img_size=16"]
    found = attnzoo.probe(attnzoo.compose("cct_7_3x1", edits=edits), "head_divergence", inputs=images())
    assert len(found) == 4 and min(found["divergence"]) > 0


def test_what_cannot_be_is_refused_and_nothing_is_left_behind():
    model = vit()
    attnzoo.probe(subject(model), "head_divergence")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ZooError, match="AZ921"):
        HeadDivergence(without="noise")
    with pytest.raises(ZooError, match="AZ924.*make its tokens"):
        attnzoo.probe(torch.nn.Sequential(vit()), "head_divergence", inputs=images())
