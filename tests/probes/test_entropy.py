"""`entropy`: how spread out each head attends."""

import math

import pytest
import torch
from instruments import images, subject, vit

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.maps import collect
from attnzoo.probes import Entropy


def by_loop(weights: torch.Tensor) -> torch.Tensor:
    """Mean entropy of each head, one number at a time: (b h n m) to (h,)."""
    out = []
    for head in range(weights.shape[1]):
        rows = [row.tolist() for sample in weights[:, head] for row in sample]
        out.append(sum(-sum(a * math.log(a) for a in row if a > 0) for row in rows) / len(rows))
    return torch.tensor(out, dtype=torch.float64)


def test_equals_the_loop():
    model = vit()
    found = attnzoo.probe(subject(model), "entropy")
    maps = collect(model, images()).maps
    wanted = torch.cat([by_loop(one.weights.double()) for one in maps])
    assert torch.allclose(torch.tensor(found["entropy"], dtype=torch.float64), wanted, atol=1e-6)
    assert found["layer"] == [0] * 4 + [1] * 4 and found["head"] == [0, 1, 2, 3] * 2
    assert found["share"] == pytest.approx([value / math.log(17) for value in found["entropy"]], rel=1e-9)


@pytest.mark.parametrize(
    ("attention", "heads"),
    [
        ("{use: mixture_of_attention, with: {experts: 6, active: 6}}", 6),
        ("{use: random_feature_layer, with: {features: 16, weights: softmax}}", 16),
        ("{use: random_feature_layer, with: {qk: frozen}}", 4),
        ("additive", 1),
    ],
)
def test_every_map_is_seen_where_there_are_other_heads_than_the_site_s(attention, heads):
    model = vit(attention)
    found = attnzoo.probe(subject(model), "entropy")
    maps = [one.weights.double() for one in collect(model, images()).maps]
    wanted = torch.cat([by_loop(one / one.sum(dim=-1, keepdim=True)) for one in maps])
    assert found["head"] == list(range(heads)) * 2
    assert torch.allclose(torch.tensor(found["entropy"], dtype=torch.float64), wanted, atol=1e-6)


@pytest.mark.parametrize(("scale", "wanted"), [(0.0, math.log(17)), (1e6, 0.0)])
def test_hand_uniform_and_one_hot(scale, wanted):
    model = vit()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:96] *= scale  # queries and keys
            block.attn.qkv.bias[:96] *= scale
    found = attnzoo.probe(subject(model), Entropy())
    assert found["entropy"] == pytest.approx([wanted] * 8, abs=1e-3)


def test_tokens_are_chosen():
    model, whole = vit(), []
    for tokens, n in (("prefix", 1), ("grid", 16)):
        whole.append(
            [n * value for value in attnzoo.probe(subject(model), Entropy(tokens=tokens))["entropy"]]
        )
    everything = attnzoo.probe(subject(model), Entropy())["entropy"]
    assert [(a + b) / 17 for a, b in zip(*whole, strict=True)] == pytest.approx(everything)


def test_a_causal_row_is_held_to_what_it_sees():
    model = attnzoo.compose("task_switching")
    ids = torch.randint(0, 5, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv" in name or "q_proj" in name or "k_proj" in name:
                parameter.zero_()  # every row is uniform over what it may see
    found = attnzoo.probe(model, "entropy", inputs=ids, kind="sequences")
    assert found["share"] == pytest.approx([1.0] * len(found), abs=1e-6)
    assert max(found["entropy"]) < math.log(9) - 0.1


def test_an_option_that_cannot_be_is_refused():
    with pytest.raises(ZooError, match="AZ921"):
        Entropy(tokens="some")


def test_padding_has_no_say(pairs):
    source = torch.tensor([[1, 5, 6, 7, 0, 0], [1, 5, 6, 7, 8, 2]])
    target = torch.tensor([[1, 5, 6], [1, 7, 6]])
    found = attnzoo.probe(pairs, "entropy", inputs=(source, target), kind="pairs")
    alone = [
        attnzoo.probe(pairs, "entropy", inputs=inputs, kind="pairs")
        for inputs in ((source[:1, :4], target[:1]), (source[1:], target[1:]))
    ]
    for i, site in enumerate(found["site"]):
        sizes = (4, 6) if site.startswith("encoder") else (3, 3)
        wanted = sum(n * one["entropy"][i] for n, one in zip(sizes, alone, strict=True)) / sum(sizes)
        assert found["entropy"][i] == pytest.approx(wanted, rel=1e-5), site
