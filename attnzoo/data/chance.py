"""Random numbers by counting: each is a hash of a sample's seed, a stream and a counter, and of nothing else.

So an image is augmented alike in whatever batch, order, process or device it comes along. The hash is splitmix64
(Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014); int64 arithmetic wraps as it needs.
"""

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


GOLDEN = _signed(0x9E3779B97F4A7C15)
FIRST, SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
STREAM = 2**20
"""Numbers that a stream may give per sample before it would meet the next one."""
ROUNDS = 8
"""Proposals for a Gamma variate; each is accepted with probability above 0.95."""


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, a bijection of 64 bits.

    Args:
        x: int64, any shape.
    """
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def step_seeds(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """A seed per sample: a function of run, epoch and the sample's index alone.

    Args:
        seed: The run's.
        epoch: From 0.
        indices: int64 (b,), positions in the data set.

    Returns:
        int64 (b,), on the device of the indices.
    """
    run = mix(torch.tensor(_signed(seed), dtype=torch.int64) + GOLDEN)
    run = mix(run + GOLDEN * torch.tensor(epoch + 1)).to(indices.device)
    return mix(run + GOLDEN * (indices.long() + 1))


class Chance:
    """The random numbers of a batch; every call draws fresh ones.

    Args:
        seeds: int64 (b,), one per sample.
        stream: Different streams of a seed are independent.
    """

    def __init__(self, seeds: Tensor, stream: int = 0):
        self.seeds, self.next = seeds, stream * STREAM + 1

    def uniform(self, count: int) -> Tensor:
        """float32 (b, count) in [0, 1), multiples of 2⁻²⁴."""
        counter = torch.arange(self.next, self.next + count, device=self.seeds.device)
        self.next += count
        return _shifted(mix(self.seeds[:, None] + GOLDEN * counter), 40).float() * 2.0**-24

    def happens(self, p: float) -> Tensor:
        """bool (b,), true with probability p."""
        return self.uniform(1)[:, 0] < p

    def normal(self, count: int) -> Tensor:
        """float32 (b, count), standard normal, by Box and Muller."""
        radius = (-2 * torch.log1p(-self.uniform(count))).sqrt()
        return radius * torch.cos(2 * math.pi * self.uniform(count))

    def beta(self, alpha: float) -> Tensor:
        """float32 (b,), Beta(alpha, alpha): one Gamma variate's share of two, from their logarithms."""
        return torch.sigmoid(self._log_gamma_variate(alpha) - self._log_gamma_variate(alpha))

    def _log_gamma_variate(self, alpha: float) -> Tensor:
        """Marsaglia and Tsang, 2000, for alpha + 1, then log(Γ_α) = log(Γ_{α+1}) + log(U) / α."""
        d = alpha + 1 - 1 / 3
        normal, uniform = self.normal(ROUNDS), self.uniform(ROUNDS)
        v = (1 + normal / math.sqrt(9 * d)).clamp(min=1e-6) ** 3
        accepted = torch.log1p(-uniform) < normal**2 / 2 + d - d * v + d * v.log()
        first = accepted.long().argmax(dim=1, keepdim=True)
        return math.log(d) + v.gather(1, first)[:, 0].log() + torch.log1p(-self.uniform(1)[:, 0]) / alpha


def integers(uniform: Tensor, count: int | Tensor) -> Tensor:
    """Uniform whole numbers from 0 to count - 1 out of uniform numbers in [0, 1).

    Args:
        uniform: float32, any shape.
        count: At most 2¹⁶; a number, or a tensor of the same shape.
    """
    return (uniform * count).long()


def drawn(total: int, count: int, seed: int) -> list[int]:
    """At most `count` of the numbers below `total`, at random, in increasing order."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist())
