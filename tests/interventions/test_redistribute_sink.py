"""`redistribute_sink`: VAR, on rows by hand and on a model with a planted sink."""

import pytest
import torch
from instruments import images, pairs, passing, sentences, subject, vit

import attnzoo
from attnzoo.core import Here, Layout
from attnzoo.errors import ZooError
from attnzoo.interventions import RedistributeSink
from attnzoo.lab.calibration import sink_dims
from attnzoo.lab.subject import Subject

CHANNEL, PATCH = 11, 6
"""Where the planted sink is large, and which token it is (5 patches and the class token are before it)."""


def edited(row: list[float], tokens: torch.Tensor, layout: Layout, **options) -> list[float]:
    """One row of weights, after the edit."""
    weights = torch.tensor(row, dtype=torch.float64)[None, None, None]
    here = Here("blocks.0", 0, 1, "softmax", "softmax", 1, layout=layout, tokens=tokens[None])
    return RedistributeSink(**options).edit_weights(weights, here).flatten().tolist()


def tokens(sinks: list[int], count: int = 5) -> torch.Tensor:
    """Flat tokens of 500 channels, but for sinks, which are large in channel 3."""
    x = torch.ones(count, 500)
    x[sinks, 3] = 1000.0
    return x


@pytest.mark.parametrize("form", ["paper", "code"])
def test_row_of_the_paper_by_hand(form):
    row, targets = [0.1, 0.4, 0.2, 0.1, 0.2], [1, 2, 3]  # the others are text
    found = edited(row, tokens([1]), Layout((4,), prefix=1), targets=targets, ratio=0.4, form=form)
    wanted = [0.1, 0.4, 0.2, 0.1, 0.2] if form == "code" else [0.1, 0.24, 0.46 * 2 / 3, 0.46 / 3, 0.2]
    assert found == pytest.approx(wanted, abs=1e-12)  # r = 0.3 / 0.7 is at least 0.4, and not 0.6


def test_text_sinks_pay_too_and_patches_receive():
    row = [0.3, 0.2, 0.2, 0.2, 0.1]
    found = edited(row, tokens([0, 1]), Layout((3,), prefix=2), keep=0.5, dims=[3])
    assert found == pytest.approx([0.15, 0.1, 0.3, 0.3, 0.15], abs=1e-12)


@pytest.mark.parametrize(
    ("row", "options", "sinks"),
    [
        ([0.1, 0.4, 0.2, 0.1, 0.2], {}, []),  # no sinks
        ([0.1, 0.4, 0.2, 0.1, 0.2], {"dims": [4]}, [1]),  # large in another channel
        ([0.1, 0.4, 0.2, 0.1, 0.2], {"threshold": 30.0}, [1]),  # φ ≤ √500
        ([0.9, 0.02, 0.03, 0.03, 0.02], {}, [1]),  # the image has too little
        ([0.1, 0.8, 0.05, 0.03, 0.02], {}, [1]),  # the sinks have nearly all
        ([0.2, 0.2, 0.2, 0.2, 0.2], {"ratio": 0.0}, [1, 2, 3, 4]),  # nobody to give to
        ([0.1, 0.4, 0.2, 0.1, 0.2], {"queries": "prefix", "prefix": 0}, [1]),  # a row that is not asked
        ([0.1, 0.4, 0.2, 0.1, 0.2], {"skip_last": 1}, [1]),
        ([0.1, 0.4, 0.2, 0.1, 0.2], {"skip_first": 1}, [1]),
    ],
)
def test_rows_that_stay_as_they_are(row, options, sinks):
    layout = Layout((5,), prefix=0) if options.pop("prefix", 1) == 0 else Layout((4,), prefix=1)
    assert edited(row, tokens(sinks), layout, **options) == row
    if not options and sinks:  # with a lower bar it is not so
        assert edited(row, tokens(sinks), layout, ratio=0.0, least=0.0) != row


def test_squares_that_overflow_in_half_precision():
    """1000² is beyond float16; the sink is a sink all the same."""
    row, options = [0.1, 0.4, 0.2, 0.1, 0.2], {"targets": [1, 2, 3], "ratio": 0.4}
    whole = edited(row, tokens([1]), Layout((4,), prefix=1), **options)
    assert edited(row, tokens([1]).half(), Layout((4,), prefix=1), **options) == whole != row


def test_tokens_of_zeros_are_no_sinks():
    row, x = [0.1, 0.4, 0.2, 0.1, 0.2], tokens([])
    x[1] = 0.0
    assert edited(row, x, Layout((4,), prefix=1), ratio=0.0) == row


def test_what_is_freed_goes_to_however_little_there_is():
    """0.4 of the sink's weight over the least number of float16 is beyond it."""
    weights = torch.tensor([0.0, 1.0, 6e-8, 0.0], dtype=torch.float16)[None, None, None]
    here = Here("blocks.0", 0, 1, "softmax", "softmax", 1, layout=Layout((4,)), tokens=tokens([1], 4)[None])
    found = RedistributeSink(ratio=0.0).edit_weights(weights, here).flatten()
    torch.testing.assert_close(found, torch.tensor([0, 0.6, 0.4, 0], dtype=torch.float16))


def planted() -> torch.nn.Module:
    """A ViT in which one patch is large in one channel, and whose blocks add little to the tokens."""
    model = vit()
    with torch.no_grad():
        model.pos_embed[0, PATCH, CHANNEL] = 200.0
        for block in model.blocks:
            block.attn.proj.weight *= 0.1
            block.mlp.fc2.weight *= 0.1
    return model


def test_a_planted_sink_is_found_and_its_mass_goes_where_the_equation_says():
    model = planted()
    channel, _ = sink_dims(subject(model))
    assert channel == CHANNEL
    half = planted().half()
    with torch.no_grad():
        half.pos_embed[0, PATCH, CHANNEL] = 2000.0  # whose square is beyond float16
    assert sink_dims(Subject.of(half, images().half()))[0] == CHANNEL
    rule = RedistributeSink(dims=[channel], threshold=5.0, ratio=0.0, least=0.0, keep=0.25)
    (before, _), _ = passing(model, "weights")
    (after, _), _ = passing(model, "weights", rule)
    sinks = (after < before).any(dim=(0, 1))
    assert sinks.all(dim=0).nonzero().flatten().tolist() == [
        PATCH
    ]  # the sink, and nothing else, loses in every row
    rest = torch.ones(17, dtype=torch.bool)
    rest[[0, PATCH]] = False
    assert torch.allclose(after[..., PATCH], 0.25 * before[..., PATCH], rtol=1e-5)
    assert torch.equal(after[..., 0], before[..., 0])  # the class token is no target
    gained = after[..., rest].sum(-1) - before[..., rest].sum(-1)
    assert torch.allclose(gained, 0.75 * before[..., PATCH], atol=1e-6)
    ratio = after[..., rest] / before[..., rest]
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4)  # in proportion to what they had
    assert torch.allclose(after.sum(-1), before.sum(-1), atol=1e-6)


def test_without_a_sink_no_bit_changes():
    model = vit()
    plain = passing(model, "weights")[0]
    same = passing(model, "weights", RedistributeSink(threshold=5.0, ratio=0.0, least=0.0))[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


def test_cross_attention_asks_what_it_reads():
    """A word whose embedding is large is a sink for those who read it."""
    model = pairs()
    with torch.no_grad():
        model.embed_source.weight[8, 5] = 300.0  # the fourth word of the first sentence
        model.encoder_norm.weight.fill_(1.0)
        for layer in model.encoder:
            layer.attn.proj.weight *= 0.01
            layer.mlp.fc2.weight *= 0.01
    rule = RedistributeSink(at="decoder.*.cross", threshold=4.5, ratio=0.0, least=0.0)
    before, _ = passing(model, "weights", inputs=sentences())
    after, _ = passing(model, "weights", rule, inputs=sentences())
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed[:3] == [False, False, False] and changed[3]
    less = (after[3] < before[3]).all(dim=(1, 2))
    assert less[0].tolist() == [False, False, False, True, False] and not less[1].any()


def test_while_a_sequence_is_continued_it_says_that_it_cannot():
    model, (source, target) = pairs(), sentences()
    with torch.no_grad(), attnzoo.intervene(model, RedistributeSink(at="decoder.*.self", threshold=2.0)):
        state = model.start(model.encode(source))
        model.step(target[:, :1], state)
        with pytest.raises(ZooError, match="AZ924"):
            model.step(target[:, 1:2], state)


def test_channels_that_there_are_not_are_refused():
    model = vit()
    rule = RedistributeSink(dims=[48])
    with torch.no_grad(), attnzoo.intervene(model, rule), pytest.raises(ZooError, match="AZ921"):
        model(images())
