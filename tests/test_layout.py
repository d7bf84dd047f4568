"""Layout: how tokens are arranged."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnzoo.core import Layout, Site
from attnzoo.errors import LayoutMismatch, RecipeError

GRIDS = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@given(GRIDS, st.integers(0, 3))
def test_to_grid_and_from_grid_are_inverses(grid, prefix):
    layout = Layout(grid, prefix)
    x = torch.randn(2, layout.length, 3)
    special, tokens = layout.split(x)
    assert special.shape == (2, prefix, 3) and tokens.shape[1] == layout.length - prefix
    image = layout.to_grid(tokens)
    assert image.shape == (2, 3, *grid)
    assert torch.equal(layout.from_grid(special, image), x)
    again = layout.to_grid(layout.split(layout.from_grid(special, image))[1])
    assert torch.equal(again, image)


@given(GRIDS, st.integers(0, 2))
def test_coords_say_where_tokens_are(grid, prefix):
    layout = Layout(grid, prefix)
    coords = layout.coords()
    assert coords.dtype == torch.long
    assert [tuple(place) for place in coords.tolist()] == list(itertools.product(*map(range, grid)))
    x = torch.arange(layout.length).float().reshape(1, -1, 1)
    image = layout.to_grid(layout.split(x)[1])[0, 0]
    for i, place in enumerate(coords.tolist()):
        assert image[tuple(place)] == prefix + i


def test_rows_come_before_columns():
    tokens = torch.arange(6.0).reshape(1, 6, 1)
    assert Layout((2, 3)).to_grid(tokens)[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert Layout((2, 3)).coords().tolist()[1] == [0, 1]


def test_length_and_text():
    assert Layout((7,)).length == 7 and str(Layout((7,))) == "0 + 7 = 7"
    assert Layout((2, 3, 4), 2).length == 26 and str(Layout((2, 3, 4), 2)) == "2 + 2 × 3 × 4 = 26"
    assert Layout((2, 3)) == Layout((2, 3), 0) and hash(Layout((2, 3))) == hash(Layout((2, 3), 0))
    assert Layout((2, 3)) != Layout((3, 2))


def test_tokens_that_do_not_fit():
    layout = Layout((13, 15), 1)
    layout.check(torch.zeros(1, 196, 2))
    for what in (layout.check, layout.split):
        with pytest.raises(LayoutMismatch) as caught:
            what(torch.zeros(1, 197, 2))
        assert caught.value.code == "AZ401"
        assert "197 tokens do not fit 1 + 13 × 15 = 196" in str(caught.value)
        assert "= help: " in str(caught.value)


def test_symbolic_tracing_passes_the_check():
    def shorten(x):
        return Layout((3,), 1).split(x)[1]

    traced = torch.fx.symbolic_trace(shorten)
    x = torch.randn(1, 4, 2)
    assert torch.equal(traced(x), x[:, 1:])


@pytest.mark.parametrize(("rotation", "allowed"), [(None, True), ((1, 4), True), ((4, 4), False)])
def test_keys_may_have_fewer_heads_unless_each_is_turned_in_a_way_of_its_own(rotation, allowed):
    site = Site("here", 16, 4, Layout((4,)), rotary=rotation is not None, rotation=rotation)
    assert site.key_heads(4) == 4
    if allowed:
        assert site.key_heads(2) == 2
    else:
        with pytest.raises(RecipeError, match="each of 4 heads in its own way; there are 2 heads"):
            site.key_heads(2)
