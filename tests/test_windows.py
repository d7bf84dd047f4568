"""Maps of windows as maps of the whole grid: against loops, against what timm's blocks do, and in pictures."""

import itertools

import pytest
import timm
import torch
from torch import nn

from attnzoo.lab.maps import look
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
