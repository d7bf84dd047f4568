"""Function fitting: a smooth map from sequences of vectors to sequences of vectors, for a single layer to approximate.

Yun et al., "Are Transformers universal approximators of sequence-to-sequence functions?", arXiv:1912.10077: theorem 2
is about maps that commute with permutations of the positions, theorem 3 about any, with positional encodings; both on
a compact domain, here [0, 1]^(dim × length).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.data.chance import Chance, step_seeds
from attnzoo.data.sequences.options import check_size, option, options
from attnzoo.data.sequences.sequence_data import TEST, TRAIN, InMemory, SequenceData

MAP = 2
"""The map's number where the sides have 0 and 1."""
WAVES = 4
"""Waves per output and part."""
FREQUENCY = 3.0
"""Standard deviation of a wave's frequency, radians per unit: about half a wave across the domain."""
CHUNK = 2**20  # numbers worked on at once


@dataclass(frozen=True)
class FittingOptions:
    """Options of `fitting`.

    Args:
        dim: Numbers per vector, of inputs and outputs.
        length: Vectors per sequence.
        positions: Whether the map depends on positions; without, it commutes with permutations.
        train: Sequences to train on.
        test: Sequences to test on.
    """

    dim: int = option(2, 1, 64)
    length: int = option(8, 2, 1024)
    positions: bool = option(True)
    train: int = option(20_000, 1, 1_000_000)
    test: int = option(2_000, 1, 100_000)


def fitting_options(name: str) -> FittingOptions:
    """The options in a name.

    Args:
        name: As for `load_fitting`.

    Raises:
        DataError: AZ715 for options that are wrong or do not go together.
    """
    o = options(FittingOptions, name)
    check_size(name, max(o.train, o.test), o.length * o.dim)
    return o


def load_fitting(name: str, seed: int) -> SequenceData:
    """Draw inputs uniformly from the domain, and a map that both sides share; its value is asked at every position.

    Args:
        name: `fitting`, with options such as `fitting:dim=2,length=8,positions=false`.
        seed: What the map and the inputs are drawn from.

    Raises:
        DataError: AZ715 for options that are wrong.
    """
    o = fitting_options(name)
    made = SmoothMap.drawn(seed, o.dim, o.length, positions=o.positions)
    train, test = (_side(seed, side, count, o, made) for side, count in ((TRAIN, o.train), (TEST, o.test)))
    return SequenceData(name, None, o.dim, o.dim, True, o.length, train, test)


@dataclass(frozen=True)
class SmoothMap:
    """f(X)_i = (own(x_i) + context(x_i, the others) + position(i, x_i)) / √3, each a sum of cosine waves.

    Args:
        own: Frequencies of own, float64 (e o k), for e inputs, o outputs, k waves.
        seen: Frequencies of context in x_i, (e o k).
        met: Frequencies of context in the other vectors, (e o k).
        placed: Frequencies of position, (e o k).
        phases: Of own and context, (2 o k).
        places: Phases of position, (n o k); null when the map does not depend on positions.
    """

    own: Tensor
    seen: Tensor
    met: Tensor
    placed: Tensor
    phases: Tensor
    places: Tensor | None

    @classmethod
    def drawn(cls, seed: int, dim: int, length: int, *, positions: bool) -> "SmoothMap":
        """The map of a seed: normal frequencies, uniform phases.

        Args:
            seed: What it is drawn from.
            dim: Numbers per vector.
            length: Vectors per sequence.
            positions: Whether it depends on positions.
        """
        chance, shape = Chance(step_seeds(seed, MAP, torch.arange(1))), (dim, dim, WAVES)
        waves = [FREQUENCY * chance.normal(dim * dim * WAVES).view(shape).double() for _ in range(4)]
        phases = 2 * torch.pi * chance.uniform((2 + length) * dim * WAVES).view(-1, dim, WAVES).double()
        own, seen, met, placed = waves
        return cls(own, seen, met, placed, phases[:2], phases[2:] if positions else None)

    def __call__(self, x: Tensor) -> Tensor:
        """The value, float64 (b n o).

        Args:
            x: (b n e), from 0 to 1.
        """
        x = x.double()
        value = _waves(_angles(x, self.own) + self.phases[0]) + self.context(x)
        if self.places is not None:
            value = value + _waves(_angles(x, self.placed) + self.places)
        return value / 3**0.5

    def context(self, x: Tensor) -> Tensor:
        """What depends on the other vectors, before the division by √3; float64 (b n o).

        Σ_k cos(a_k·x_i + b_k·x_j + φ_k) is summed over j ≠ i after its mean over a uniform x_j is taken off, and
        divided by √(n - 1). So its mean is 0 whatever x_i is: who sees x_i alone learns nothing of it.

        Args:
            x: (b n e), from 0 to 1.
        """
        x = x.double()
        angles = _angles(x, self.met)
        half = self.met / 2  # E exp(i b·x) over x uniform is the product of exp(i b / 2) sin(b / 2) / (b / 2)
        mean = torch.polar(torch.sinc(half / torch.pi), half).prod(dim=0)  # (o k)
        each = torch.polar(torch.ones_like(angles), angles) - mean  # (b n o k)
        others = each.sum(dim=1, keepdim=True) - each
        turn = _angles(x, self.seen) + self.phases[1]
        wave = (torch.polar(torch.ones_like(turn), turn) * others).real
        return wave.sum(dim=-1) * (2 / WAVES / (x.shape[1] - 1)) ** 0.5


def _angles(x: Tensor, frequencies: Tensor) -> Tensor:
    """(b n o k) from (b n e) and (e o k)."""
    return torch.tensordot(x, frequencies, dims=1)


def _waves(angles: Tensor) -> Tensor:
    """(b n o) from (b n o k); variance about 1."""
    return angles.cos().sum(dim=-1) * (2 / WAVES) ** 0.5


def _side(seed: int, side: int, count: int, o: FittingOptions, made: SmoothMap) -> InMemory:
    chance = Chance(step_seeds(seed, side, torch.arange(count)))
    inputs = chance.uniform(o.length * o.dim).view(count, o.length, o.dim)
    values = [made(chunk).float() for chunk in inputs.split(max(1, CHUNK // (o.length * o.dim)))]
    return InMemory(inputs, torch.cat(values))
