"""Mechanisms side by side: time and memory of one layer as the number of tokens grows."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnzoo.alone.build import create
from attnzoo.bench.speed import alternate, peak, quartiles
from attnzoo.errors import ZooError
from attnzoo.recipe.reading import is_text
from attnzoo.recipe.resolving import resolve_spec
from attnzoo.recipe.source import parse

if TYPE_CHECKING:
    from attnzoo.plot import Picture

TOKENS = (196, 1024, 4096, 16384)
LARGE = 1024
"""From here on the products with weights no longer decide how a layer grows."""
PATIENCE, ROOM = 30.0, 4096.0
"""Seconds of a forward and backward, and MiB, beyond which a size is left out."""

Spread = tuple[float, float, float]
"""Median, 25th and 75th percentile."""


@dataclass(frozen=True)
class Point:
    """One layer at one number of tokens.

    Args:
        mechanism: Its name, or the spec that was asked for.
        tokens: Number of tokens.
        forward: Milliseconds in eval mode, without autograd.
        step: Milliseconds of a forward and a backward.
        memory: Peak of tensor memory in eval, weights included, in MiB.
        step_memory: The same of a forward and a backward.
    """

    mechanism: str
    tokens: int
    forward: Spread
    step: Spread
    memory: float
    step_memory: float


@dataclass
class Growth:
    """How a mechanism does over all sizes.

    Args:
        points: By the number of tokens.
        left_out: Why a number of tokens is missing.
    """

    points: dict[int, Point] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)

    def slope(self, of: Callable[[Point], float]) -> float | None:
        """The power of n with which a quantity grows from the first to the last size of at least 1024 tokens.

        Args:
            of: The quantity.
        """
        large = [point for n, point in sorted(self.points.items()) if n >= LARGE]
        if len(large) < 2:
            return None
        return math.log(of(large[-1]) / of(large[0])) / math.log(large[-1].tokens / large[0].tokens)

    def faster_from(self, baseline: "Growth", of: Callable[[Point], float]) -> float | None:
        """From how many tokens on it takes less than the baseline; between two sizes by a line in the logarithms.

        Args:
            baseline: What it is held against.
            of: The quantity.

        Returns:
            The smallest size measured when it is always less, None when it is not at the largest.
        """
        both = sorted(self.points.keys() & baseline.points.keys())
        ratios = [math.log(of(self.points[n]) / of(baseline.points[n])) for n in both]
        if not both or ratios[-1] >= 0:
            return None
        last = max((i for i, ratio in enumerate(ratios) if ratio >= 0), default=-1)
        if last < 0:
            return float(both[0])
        low, high = math.log(both[last]), math.log(both[last + 1])
        return math.exp(low + (high - low) * ratios[last] / (ratios[last] - ratios[last + 1]))


def measure(
    mechanisms: Sequence[str],
    *,
    tokens: Sequence[int] = TOKENS,
    dim: int = 384,
    heads: int = 6,
    batch: int = 1,
    rounds: int = 7,
    device: torch.device | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Growth]:
    """Build one layer of each at each size and let them take turns (A B C, C B A, ...) after a warm-up.

    A size at which a mechanism cannot be built, or would take minutes or many GiB if it grew with n² from the sizes
    before, is left out with its reason.

    Args:
        mechanisms: Names, or specs as text; the first is the baseline.
        tokens: Numbers of tokens; for mechanisms on a plane, as near to a square as divides them.
        dim: Channels.
        heads: Number of heads.
        batch: Samples.
        rounds: Turns that are counted.
        device: Where; the CPU when None.
        report: Is told what is measured now.
    """
    where = device or torch.device("cpu")
    found = {name: Growth() for name in mechanisms}
    for n in sorted(tokens):
        layers: dict[str, nn.Module] = {}
        for name, growth in found.items():
            reason = _too_much(growth, n)
            if not reason:
                try:
                    layers[name] = layer_of(name, n, dim, heads, where)
                    with torch.no_grad():
                        layers[name](torch.zeros(1, n, dim, device=where))
                except ZooError as error:
                    layers.pop(name, None)
                    reason = error.diagnostics[0].message
            if reason:
                growth.left_out[n] = reason
        report(f"{n} tokens: {', '.join(layers)}")
        for name, point in points_of(layers, n, dim, batch, rounds, where).items():
            found[name].points[n] = point
    return found


def layer_of(name: str, n: int, dim: int, heads: int, device: torch.device) -> nn.Module:
    """One layer of a mechanism with its projections.

    Args:
        name: Its name, or a spec as text.
        n: Number of tokens; on a plane as near to a square as divides them.
        dim: Channels.
        heads: Number of heads.
        device: Where.
    """
    torch.manual_seed(0)
    spec = name if is_text(name) else f"{{use: {name}}}"
    plane = resolve_spec(parse(spec, "<spec>")).card.grid == 2
    side = max(s for s in range(1, math.isqrt(n) + 1) if n % s == 0)
    return create(name, dim, heads, grid=(n // side, side) if plane else (n,), device=device)


def _too_much(growth: Growth, n: int) -> str:
    """Why a size would take too long or too much, going by the largest so far; empty when it would not."""
    if not growth.points:
        return ""
    largest = growth.points[max(growth.points)]
    more = (n / largest.tokens) ** 2
    seconds, room = largest.step[0] / 1000 * more, largest.step_memory * more
    quadratic = (growth.slope(lambda p: p.step_memory) or 2) > 1.5
    if room > ROOM and quadratic:
        return f"would need {room / 1024:.0f} GiB"
    return f"would take {seconds:.0f} s" if seconds > PATIENCE else ""


def points_of(
    layers: dict[str, nn.Module], n: int, dim: int, batch: int, rounds: int, device: torch.device
) -> dict[str, Point]:
    """Let layers take turns on the same tokens.

    Args:
        layers: From (b n c) to (b n c), by name.
        n: Number of tokens.
        dim: Channels.
        batch: Samples.
        rounds: Turns that are counted.
        device: Where the layers are.
    """
    x = torch.randn(batch, n, dim, device=device, generator=torch.Generator(device).manual_seed(0))

    def forward(layer: nn.Module) -> Callable[[], Any]:
        @torch.inference_mode()
        def work():
            return layer(x)

        return work

    def step(layer: nn.Module) -> Callable[[], Any]:
        def work():
            layer(x).float().square().mean().backward()
            layer.zero_grad(set_to_none=True)

        return work

    for layer in layers.values():
        layer.eval()
    forwards, steps = (
        [forward(layer) for layer in layers.values()],
        [step(layer) for layer in layers.values()],
    )
    times = alternate(forwards, rounds, device)
    memory = [peak(work, layer, device) for work, layer in zip(forwards, layers.values(), strict=True)]
    for layer in layers.values():
        layer.train()
    step_times = alternate(steps, rounds, device)
    step_memory = [peak(work, layer, device) for work, layer in zip(steps, layers.values(), strict=True)]
    return {
        name: Point(name, n, _milliseconds(times[i]), _milliseconds(step_times[i]), memory[i], step_memory[i])
        for i, name in enumerate(layers)
    }


def _milliseconds(seconds: list[float]) -> Spread:
    middle, low, high = quartiles(seconds)
    return 1000 * middle, 1000 * low, 1000 * high


def write_csv(found: dict[str, Growth], file: Path) -> None:
    """One row for each mechanism and size, with quartiles.

    Args:
        found: What `measure` gave.
        file: Where.
    """
    with file.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        heads = [f"{what}_ms{part}" for what in ("forward", "step") for part in ("", "_p25", "_p75")]
        rows.writerow(["mechanism", "tokens", *heads, "memory_mib", "step_memory_mib"])
        for growth in found.values():
            for n, p in sorted(growth.points.items()):
                rows.writerow([p.mechanism, n, *p.forward, *p.step, p.memory, p.step_memory])


def read_csv(file: Path) -> dict[str, Growth]:
    """What `write_csv` wrote; the first is the baseline.

    Args:
        file: Where.
    """
    found: dict[str, Growth] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for name, tokens, *figures in list(csv.reader(lines))[1:]:
            f0, f1, f2, s0, s1, s2, memory, step_memory = map(float, figures)
            point = Point(name, int(tokens), (f0, f1, f2), (s0, s1, s2), memory, step_memory)
            found.setdefault(name, Growth()).points[point.tokens] = point
    return found


def draw(found: dict[str, Growth]) -> "Picture":
    """Time and memory over the number of tokens.

    Args:
        found: What `measure` gave; the first is the baseline.
    """
    from attnzoo.plot import growth_curves

    panels: dict[str, Callable[[Point], float]] = {
        "forward, ms": lambda p: p.forward[0],
        "forward and backward, ms": lambda p: p.step[0],
        "peak memory in training, MiB": lambda p: p.step_memory,
    }
    return growth_curves(
        {
            what: {name: {n: of(p) for n, p in growth.points.items()} for name, growth in found.items()}
            for what, of in panels.items()
        }
    )


def ratio(point: Point, baseline: Growth, of: Callable[[Point], float]) -> float | None:
    """A quantity over the baseline's at the same size; None where the baseline was left out.

    Args:
        point: Of the mechanism.
        baseline: What it is held against.
        of: The quantity.
    """
    other = baseline.points.get(point.tokens)
    return of(point) / of(other) if other else None
