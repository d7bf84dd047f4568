"""Tap and watch: looking into mechanisms, and reaching in."""

import copy

import pytest
import torch
from torch import nn

from attnzoo.core import Layout, MultiHead, Site, Tap, find_taps, watch
from attnzoo.core.tap import NAMES
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
    assert seen == {"head.scores": (1, 2, 4, 4), "head.weights": (1, 2, 4, 4)}
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
        assert list(taps) == ["head.scores"]
        assert part.head.scores.watched and not part.head.weights.watched
        part(tokens(), layout=LAYOUT)
    assert names == ["head.scores"]


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
        assert part.head.weights.watched  # the outer one still looks
        part(tokens(), layout=LAYOUT)
    assert order == ["outer", "inner", "outer"]


def test_taps_are_found_by_their_last_name():
    model = nn.ModuleDict({"one": attention(), "weights": attention()})
    assert set(find_taps(model)) == {
        f"{k}.head.{t}" for k in ("one", "weights") for t in ("scores", "weights")
    }
    assert set(find_taps(model, "scores")) == {"one.head.scores", "weights.head.scores"}
    assert find_taps(model, "gate") == {} and find_taps(nn.Linear(2, 2)) == {}
    assert set(find_taps(Tap("b"), None)) == {""}


def test_a_copy_has_taps_of_its_own():
    part = attention()
    other = copy.deepcopy(part)
    with watch(part, None, lambda *_: None):
        assert not any(tap.watched for tap in find_taps(other).values())
        assert part.head.weights is not other.head.weights and part.head.weights.watched


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
    assert NAMES == ("scores", "weights", "gate", "shares", "state")
    zoo, checked = load_zoo(), 0
    site = Site("tap", 8, 2, LAYOUT)
    for entry in (*zoo.mechanisms.values(), *zoo.fusions.values()):
        if entry.plugin == "attnzoo":
            part = entry.value(site) if entry in zoo.mechanisms.values() else entry.value(site, 2)
            for name, tap in find_taps(part).items():
                assert name.rpartition(".")[2] in NAMES, (entry.name, name)
                assert tap.axes
                checked += 1
    assert checked > 10
