"""Our mechanisms beside the same ones in other packages and in timm: one layer each, in turns."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from attnzoo.bench.mechanisms import Point, layer_of, points_of

TOKENS = (1024, 4096)


@dataclass(frozen=True)
class Rival:
    """A layer of somebody else's, and ours with the same options.

    Args:
        name: What it is called.
        ours: Our mechanism, by name or as a spec.
        make: Builds it for tokens (b n c), from n, channels and heads.
        package: What must be installed, as pip calls it; empty where timm has it.
    """

    name: str
    ours: str
    make: Callable[[int, int, int], nn.Module]
    package: str = ""


class OnPlane(nn.Module):
    """A layer of feature maps (b c y x) or (b y x c) for tokens (b n c).

    Args:
        layer: It.
        side: Rows and columns of the plane.
        channels_last: Which of the two it takes.
    """

    def __init__(self, layer: Callable[[Tensor], Tensor], side: int, channels_last: bool = False):
        super().__init__()
        self.layer, self.side, self.channels_last = layer, side, channels_last

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b n c) after the layer."""
        plane = x.unflatten(1, (self.side, self.side))
        if self.channels_last:
            return self.layer(plane).flatten(1, 2)
        return self.layer(plane.permute(0, 3, 1, 2)).flatten(2).mT


class Windows(nn.Module):
    """timm's attention inside windows of Swin, with its partition into windows, for (b y x c).

    Args:
        dim: Channels.
        heads: Number of heads.
        window: Side of a window.
    """

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.window, self.attn = (window, window), WindowAttention(dim, heads, window_size=window)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (b y x c) after the layer."""
        y, width, c = x.shape[1:]
        windows = window_partition(x, self.window).view(-1, self.window[0] * self.window[1], c)
        return window_reverse(self.attn(windows).view(-1, *self.window, c), self.window, y, width)


def _from(module: str, name: str) -> Callable[..., nn.Module]:
    """A class of a package, imported when it is called."""
    return lambda **options: getattr(importlib.import_module(module), name)(**options)


_performer = _from("performer_pytorch", "SelfAttention")
_linformer = _from("linformer", "LinformerSelfAttention")
_nystrom = _from("nystrom_attention", "NystromAttention")
_halonet = _from("halonet_pytorch", "HaloAttention")
_reformer = _from("reformer_pytorch", "LSHSelfAttention")

RIVALS = (
    Rival(
        "performer-pytorch",
        "performer",
        lambda n, c, h: _performer(dim=c, heads=h, dim_head=c // h),
        "performer-pytorch",
    ),
    Rival(
        "linformer", "linformer", lambda n, c, h: _linformer(dim=c, seq_len=n, heads=h, k=256), "linformer"
    ),
    Rival(
        "nystrom-attention",
        "nystrom",
        lambda n, c, h: _nystrom(dim=c, heads=h, dim_head=c // h, num_landmarks=64),
        "nystrom-attention",
    ),
    Rival(
        "halonet-pytorch",
        "{use: halo, with: {block: 8}}",
        lambda n, c, h: OnPlane(
            _halonet(dim=c, heads=h, dim_head=c // h, block_size=8, halo_size=3), math.isqrt(n)
        ),
        "halonet-pytorch",
    ),
    Rival(
        "timm's HaloAttn",
        "{use: halo, with: {block: 8}}",
        lambda n, c, h: OnPlane(HaloAttn(c, num_heads=h, block_size=8, halo_size=3), math.isqrt(n)),
    ),
    Rival(
        "timm's WindowAttention",
        "{use: window, with: {window: 8}}",
        lambda n, c, h: OnPlane(Windows(c, h, 8), math.isqrt(n), channels_last=True),
    ),
    Rival(
        "reformer-pytorch",
        "lsh",
        lambda n, c, h: _reformer(dim=c, heads=h, bucket_size=64, n_hashes=4),
        "reformer-pytorch",
    ),
)
"""Layers that do what ours do, with the options that ours have by default or are given here."""


@dataclass(frozen=True)
class Duel:
    """What came of one number of tokens.

    Args:
        rival: The other layer.
        tokens: Number of tokens.
        ours, theirs: Times and memory; None where the package is not installed.
    """

    rival: Rival
    tokens: int
    ours: Point | None
    theirs: Point | None

    def over(self, of: Callable[[Point], float]) -> float | None:
        """A quantity of ours over theirs; None where there is nothing to hold it against.

        Args:
            of: The quantity.
        """
        return None if self.ours is None or self.theirs is None else of(self.ours) / of(self.theirs)


def measure(
    tokens: tuple[int, ...] = TOKENS, *, dim: int = 384, heads: int = 6, rounds: int = 7,
    report: Callable[[str], None] = lambda text: None,
) -> list[Duel]:  # fmt: skip
    """Let each pair take turns, on the CPU, in float32.

    Args:
        tokens: Numbers of tokens: squares of multiples of 8.
        dim: Channels.
        heads: Number of heads.
        rounds: Turns that are counted.
        report: Is told what is measured now.
    """
    found, where = [], torch.device("cpu")
    for rival in RIVALS:
        for n in tokens:
            torch.manual_seed(0)
            try:
                theirs = rival.make(n, dim, heads)
            except ImportError:
                found.append(Duel(rival, n, None, None))
                continue
            report(f"{rival.name}, {n} tokens")
            layers: dict[str, Any] = {"ours": layer_of(rival.ours, n, dim, heads, where), "theirs": theirs}
            points = points_of(layers, n, dim, 1, rounds, where)
            found.append(Duel(rival, n, points["ours"], points["theirs"]))
    return found
