"""Maps of windows as maps of the whole grid: against loops, against what timm's blocks do, and in pictures."""

import itertools

import numpy as np
import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from typer.testing import CliRunner

from attnzoo.bench.composition import default_image
from attnzoo.cli.app import app
from attnzoo.errors import ZooError
from attnzoo.lab.heatmap import view
from attnzoo.lab.maps import collect, look
from attnzoo.lab.rollout import rollout
from attnzoo.lab.sites import sites_of
from attnzoo.lab.timm_models import tapped
from attnzoo.lab.windows import Windows

NAMES = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"]
SMALL = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


def made(name: str, **arguments) -> nn.Module:
    """A small Swin in eval mode, with tables and biases that are not 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **SMALL | arguments).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(*size: int) -> torch.Tensor:
    """Two images."""
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def by_loops(weights: torch.Tensor, grid, size, shift) -> torch.Tensor:
    """Window by window and pair by pair: the token at (y, x) of the rolled grid was at (y + shift) mod rows."""
    rows, columns = grid
    across = -(-columns // size[1])
    down = -(-rows // size[0])
    out = torch.zeros(len(weights) // (down * across), weights.shape[1], *grid, *grid, dtype=weights.dtype)
    for image, wy, wx in itertools.product(range(len(out)), range(down), range(across)):
        window = weights[(image * down + wy) * across + wx]
        places = [(wy * size[0] + i, wx * size[1] + j) for i in range(size[0]) for j in range(size[1])]
        for (q, (y, x)), (k, (v, u)) in itertools.product(enumerate(places), repeat=2):
            if max(y, v) < rows and max(x, u) < columns:
                asks = (y + shift[0]) % rows, (x + shift[1]) % columns
                gives = (v + shift[0]) % rows, (u + shift[1]) % columns
                out[image, :, *asks, *gives] = window[:, q, k]
    return out.flatten(4).flatten(2, 3)


@pytest.mark.parametrize(
    ("grid", "size", "shift"),
    [
        ((4, 6), (2, 3), (0, 0)),
        ((4, 6), (2, 3), (1, 1)),
        ((4, 6), (2, 3), (1, 2)),
        ((5, 7), (2, 3), (1, 1)),
        ((3, 3), (4, 4), (2, 0)),
        ((6, 4), (3, 4), (2, 0)),
    ],
)
def test_fold_is_what_loops_give(grid, size, shift):
    windows = Windows(grid, size, shift)
    area = size[0] * size[1]
    weights = torch.rand(2 * windows.count, 3, area, area, dtype=torch.float64)
    folded = windows.fold(weights)
    assert torch.equal(folded, by_loops(weights, grid, size, shift))
    if windows.whole:
        each = weights.sum(dim=-1).view(2, windows.count, 3, area).transpose(1, 2)  # (b h w n)
        expected = torch.empty(2, 3, area * windows.count, dtype=torch.float64)
        expected[:, :, windows.tokens().flatten()] = each.flatten(2)
        torch.testing.assert_close(folded.sum(dim=-1), expected)


def test_hand_four_tokens_shifted_by_one():
    windows = Windows((1, 4), (1, 2), (0, 1))  # windows {1, 2} and {3, 0}
    assert windows.tokens().tolist() == [[1, 2], [3, 0]] and windows.whole
    folded = windows.fold(torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.3, 0.7, 0.4, 0.6]]).view(2, 1, 2, 2))
    assert (
        folded[0, 0].tolist()
        == torch.tensor([[0.6, 0, 0, 0.4], [0, 0.1, 0.9, 0], [0, 0.2, 0.8, 0], [0.7, 0, 0, 0.3]]).tolist()
    )


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_map_is_what_a_block_does(name, size):
    """The map of the grid times the values of the grid is what timm's attention gives, before its projection."""
    model, blocks, values = made(name, img_size=size, qkv_bias=False), {}, {}
    for path, block in model.named_modules():
        if hasattr(block, "shift_size"):
            nn.init.eye_(block.attn.proj.weight)
            nn.init.zeros_(block.attn.proj.bias)
            norm = nn.Identity() if "v2" in name else block.norm1

            def before(block, args, path=path, norm=norm):
                x = norm(args[0])
                c = x.shape[-1]
                v = x.flatten(1, 2) @ block.attn.qkv.weight[2 * c :].mT
                values[path] = v.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)

            block.register_forward_pre_hook(before)
            plain = type(block)._attn

            def attn(x, block=block, path=path, plain=plain):
                blocks[path] = plain(block, x)
                return blocks[path]

            block._attn = attn
    with tapped(model):
        looked = look(model, sites_of(model), (images(*size),))
    assert {(0, 0), (2, 2)} <= {layout.windows.shift for layout in looked.layouts}
    least: dict[bool, float] = {}
    for found, layout in zip(looked.maps, looked.layouts, strict=True):
        folded = layout.windows.fold(found.weights)
        heads = (folded @ values[found.site]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(heads, blocks[found.site].flatten(1, 2), rtol=1e-4, atol=1e-5)
        least[layout.windows.whole] = min(
            least.get(layout.windows.whole, 1.0), float(folded.sum(dim=-1).min())
        )
        assert float(folded.sum(dim=-1).max()) < 1 + 1e-5
    assert least.get(True, 1.0) > 1 - 1e-5
    assert size == (32, 32) or least[False] < 0.99  # what goes to tokens that are none


# Heat maps


@pytest.mark.parametrize("name", NAMES)
def test_maps_lie_on_the_grid_of_their_stage(name):
    model, x = made(name), images(32, 32)
    with torch.no_grad():
        plain = model(x)
    maps = collect(model, x)
    torch.testing.assert_close(maps.logits, plain, rtol=1e-4, atol=1e-5)
    assert maps.reads == "the mean of the grid tokens" and maps.passage.depth == 4
    assert {k: v.grid for k, v in maps.passage.layouts.items()} == {"layers.0": (8, 8), "layers.1": (4, 4)}
    for found, side, heads in zip(maps.maps, (8, 8, 4, 4), (2, 2, 4, 4), strict=True):
        assert found.weights.shape[2:] == (16, 16)  # window by window, until somebody asks
        whole = found.matrix()
        assert whole.shape == (2, heads, side * side, side * side)
        torch.testing.assert_close(whole.sum(dim=-1), torch.ones_like(whole[..., 0]))
        torch.testing.assert_close(maps.on_grid(found), whole.mean(dim=2).unflatten(-1, (side, side)))
    shown = view(maps, "mechanism")
    assert [tuple(panel.shape) for panel in shown.panels[0]] == [(2, 8, 8)] * 2 + [(2, 4, 4)] * 2
    assert view(maps, "model").columns == ("layers.0", "layers.1")
    with pytest.raises(ZooError, match="four tokens become one, and how much"):
        view(maps, "rollout")


@torch.no_grad()
def test_a_position_that_is_planted_is_where_it_is():
    """A table that sends every token to the one at its right, in windows of a shifted block."""
    model = made(NAMES[0])
    attn = model.layers[0].blocks[1].attn
    attn.qkv.weight.zero_(), attn.qkv.bias.zero_(), attn.relative_position_bias_table.zero_()
    offsets = attn.relative_position_index  # (16 16), numbers of offsets
    attn.relative_position_bias_table[offsets[0, 1]] = 30.0
    whole = collect(model, images(32, 32)).maps[1].matrix()
    for y in range(8):
        for x in range(8):
            found = whole[0, 0, 8 * y + x].unflatten(0, (8, 8))
            edge = x % 4 == 1 or x == 7  # at the right of its window, or of the image: its right is hidden
            assert edge or found[y, x + 1] > 0.99


@torch.no_grad()
def test_one_layer_is_folded_when_one_is_asked_for(monkeypatch):
    maps, folded, fold = collect(made(NAMES[0]), images(32, 32)), [], Windows.fold
    monkeypatch.setattr(Windows, "fold", lambda self, weights: folded.append(1) or fold(self, weights))
    view(maps, "heads", layer=1)
    assert len(folded) == 1


@torch.no_grad()
def test_windows_of_one_stage_have_a_rollout():
    maps = collect(made(NAMES[0], depths=(2,), num_heads=(2,)), images(32, 32))
    rolled = rollout(maps)
    torch.testing.assert_close(rolled.sum(dim=-1), torch.ones(2, 64))
    first, second = (found.matrix().mean(dim=1) + torch.eye(64) for found in maps.maps)
    torch.testing.assert_close(rolled, second @ first / 4)


def test_windows_that_nobody_cut_are_refused():
    """A block of another class may cut its grid in another way."""

    class Other(SwinTransformerBlock):
        pass

    model = made(NAMES[0])
    model.layers[0].blocks[1].__class__ = Other
    with pytest.raises(ZooError, match="parts of an image"):
        collect(model, images(32, 32))


def test_a_heat_map_of_swin_is_drawn(tmp_path):
    out = tmp_path / "maps.png"
    said = CliRunner().invoke(
        app,
        [
            "heatmap",
            NAMES[0],
            str(default_image()),
            "--what",
            "heads",
            "--layer",
            "3",
            "--out",
            str(out),
            "--npy",
        ],
    )
    assert said.exit_code == 0, said.output
    assert np.load(tmp_path / "maps.npy").shape == (1, 1, 6, 28, 28)
