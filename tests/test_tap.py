"""Tap and watch: looking into mechanisms, and reaching in."""

import copy
import pickle
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.core import Layout, MultiHead, Site, Tap, find_taps, watch
from attnzoo.core.tap import KINDS, kind_of
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.zoo import load_zoo

LAYOUT = Layout((4,))


def attention() -> MultiHead:
    """Two heads of three channels."""
    site = Site("tap", 6, 2, LAYOUT)
    return MultiHead(site, Softmax(site)).double()


def tokens() -> torch.Tensor:
    """(1 4 6)."""
    return torch.randn(1, 4, 6, dtype=torch.float64)


def test_an_idle_tap_is_nothing():
    tap, x = Tap("b n"), torch.randn(2, 3)
    assert tap(x) is x
    assert not tap.watched and not list(tap.parameters()) and not tap.state_dict()
    assert repr(tap) == "Tap(b n)"


def test_watching_sees_and_changes_nothing():
    part, x, seen = attention(), tokens(), {}
    plain = part(x, layout=LAYOUT)
    with watch(part, None, lambda name, t: seen.update({name: t.shape})):
        watched = part(x, layout=LAYOUT)
    assert seen == {"inner.scores": (1, 2, 4, 4), "inner.weights": (1, 2, 4, 4)}
    torch.testing.assert_close(watched, plain, rtol=0, atol=1e-12)


def test_watching_replaces():
    part, x = attention(), tokens()
    with watch(part, "weights", lambda _, w: torch.eye(4, dtype=w.dtype).expand_as(w)):
        found = part(x, layout=LAYOUT)
    values = part.qkv(x)[..., 12:]
    torch.testing.assert_close(found, part.proj(values), rtol=0, atol=1e-12)


def test_only_the_named_taps_are_watched():
    part, names = attention(), []
    with watch(part, "scores", lambda name, _: names.append(name)) as taps:
        assert list(taps) == ["inner.scores"]
        assert part.inner.scores.watched and not part.inner.weights.watched
        part(tokens(), layout=LAYOUT)
    assert names == ["inner.scores"]


def test_hooks_are_removed_even_when_the_block_fails():
    part = attention()
    with pytest.raises(ZeroDivisionError), watch(part, None, lambda *_: None) as taps:
        assert all(tap.watched for tap in taps.values()) and len(taps) == 2
        raise ZeroDivisionError
    assert not any(tap.watched for tap in find_taps(part).values())


def test_hooks_are_removed_when_seeing_fails():
    part = attention()

    def see(name, tensor):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watch(part, None, see):
        part(tokens(), layout=LAYOUT)
    assert not any(tap.watched for tap in find_taps(part).values())
    assert part(tokens(), layout=LAYOUT).isfinite().all()


def test_watching_nests():
    part, order = attention(), []
    with watch(part, "weights", lambda *_: order.append("outer")):
        with watch(part, "weights", lambda *_: order.append("inner")):
            part(tokens(), layout=LAYOUT)
        assert part.inner.weights.watched  # the outer one still looks
        part(tokens(), layout=LAYOUT)
    assert order == ["outer", "inner", "outer"]


def test_taps_are_found_by_their_last_name():
    model = nn.ModuleDict({"one": attention(), "weights": attention()})
    assert set(find_taps(model)) == {
        f"{k}.inner.{t}" for k in ("one", "weights") for t in ("scores", "weights")
    }
    assert set(find_taps(model, "scores")) == {"one.inner.scores", "weights.inner.scores"}
    assert find_taps(model, "gate") == {} and find_taps(nn.Linear(2, 2)) == {}
    assert set(find_taps(Tap("b"), None)) == {""}


def test_a_copy_has_taps_of_its_own():
    part = attention()
    other = copy.deepcopy(part)
    with watch(part, None, lambda *_: None):
        assert not any(tap.watched for tap in find_taps(other).values())
        assert part.inner.weights is not other.inner.weights and part.inner.weights.watched


def test_a_copy_made_while_watching_is_watched_by_nobody():
    part, names = attention(), []
    with watch(part, None, lambda name, _: names.append(name)):
        copies = copy.deepcopy(part), pickle.loads(pickle.dumps(part))  # noqa: S301 - what was pickled on this line
        for other in copies:
            assert not any(tap.watched for tap in find_taps(other).values())
            other(tokens(), layout=LAYOUT)
        assert names == []
        part(tokens(), layout=LAYOUT)
    assert names == ["inner.scores", "inner.weights"]


def test_a_copy_keeps_hooks_that_others_registered():
    part, seen = attention(), []
    part.inner.weights.register_forward_hook(_note(seen))
    copy.deepcopy(part)(tokens(), layout=LAYOUT)
    assert len(seen) == 1


def _note(seen):
    return lambda *_: seen.append(1)


def test_weights_are_dropped_after_they_are_seen():
    tap, seen = Tap("b n m", dropout=0.5), []
    weights = torch.ones(1, 50, 50)
    with watch(tap, None, lambda _, t: seen.append(t)):
        dropped = tap(weights)
    assert torch.equal(seen[0], weights)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and abs(dropped.mean() - 1) < 0.1
    assert tap.eval()(weights) is weights


@pytest.mark.parametrize(
    ("axes", "over"), [("b h n m", 3), ("b h m", 2), ("b n m h", 2), ("b h n r", 3), ("b c", -1)]
)
def test_weights_are_normalised_over_the_last_axis_that_counts_positions(axes, over):
    assert Tap(axes).over == over


def test_a_kind_of_tap_may_have_several():
    part = nn.Module()
    for name in ("weights", "weights_agents", "scores"):
        part.add_module(name, Tap("b h n m"))
    assert list(find_taps(part, "weights")) == ["weights", "weights_agents"]


def test_the_fused_kernel_is_used_only_while_nobody_watches(monkeypatch):
    part, calls = attention(), []
    fused = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    with watch(part, "weights", lambda *_: None):
        part(tokens(), layout=LAYOUT)
    assert not calls
    part(tokens(), layout=LAYOUT)
    assert calls == [1]


def test_the_names_are_a_closed_list():
    assert KINDS == ("scores", "weights", "gate", "shares", "state")
    zoo, checked = load_zoo(), 0
    site = Site("tap", 8, 2, LAYOUT)
    site = replace(site, layout=Layout((2, 2)))
    for entry in (*zoo.mechanisms.values(), *zoo.fusions.values()):
        if entry.plugin == "attnzoo" and getattr(entry.value.card, "context_grid", None) is None:
            part = entry.value(site) if entry in zoo.mechanisms.values() else entry.value(site, 2)
            for name, tap in find_taps(part).items():
                assert kind_of(name.rpartition(".")[2]) in KINDS, (entry.name, name)
                assert tap.axes
                checked += 1
    assert checked > 10


@pytest.mark.parametrize("name", attnzoo.list_mechanisms(plugin="attnzoo"))
def test_whoever_watches_in_half_precision_disturbs_nothing(name):
    """What is written out while somebody watches mixes no precisions, and says what the fused kernel says."""
    torch.manual_seed(0)
    streams = 1
    try:
        module = attnzoo.create(name, dim=32, heads=4, grid=(6, 6))
    except RecipeError:
        streams = 2
        where = {"context_dim": 32, "context_grid": (6, 6), "prefix": int(name == "class_cross")}
        module = attnzoo.create(name, dim=32, heads=4, grid=(6, 6), **where)
    module, card = module.to(torch.bfloat16).eval(), module.attn.card
    lengths = module.layout.length, 36
    tokens = [torch.randn(2, length, 32, dtype=torch.bfloat16) for length in lengths]
    inputs = dict(zip(("x", "context"), tokens[:streams], strict=False))
    shapes = {
        "labels": (torch.zeros, (2, 6, 6), torch.long),
        "scores": (torch.rand, (2, 6, 6), torch.bfloat16),
    }
    for given, what in card.given.items():
        make, shape, dtype = shapes[what]
        inputs[given] = make(shape, dtype=dtype)
    with torch.no_grad():
        plain = module(**inputs)
        with ExitStack() as watching:
            for kind in {kind_of(tap) for tap in card.taps}:
                watching.enter_context(watch(module, kind, lambda tap, seen: None))
            watched = module(**inputs)
    assert watched.dtype == torch.bfloat16
    torch.testing.assert_close(watched, plain, rtol=0.05, atol=0.05 * float(plain.abs().max()))
