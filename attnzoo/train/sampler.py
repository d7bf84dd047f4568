"""Which examples a step sees, and with which random numbers: functions of the seed and the position, without a state.

So a run can be resumed anywhere, by any number of processes, and goes on as if it had never stopped.
"""

import random
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

POOL = 50
"""Batches that are sorted by length together: more would pad less and mix less."""


def derive(*numbers: int) -> int:
    """A seed made from several numbers; other numbers give an unrelated one.

    Args:
        numbers: None negative.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def reseed(*numbers: int) -> None:
    """Set the random states of Python, NumPy and torch.

    Args:
        numbers: As for `derive`.
    """
    seed = derive(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Steps in which every example is seen once; one of them may see fewer than the others."""
    return -(-examples // batch_size)


@lru_cache(maxsize=2)
def order(examples: int, seed: int, epoch: int) -> Tensor:
    """The order of the examples in an epoch, (examples,)."""
    return torch.randperm(examples, generator=torch.Generator().manual_seed(derive(seed, epoch)))


def batch(examples: int, batch_size: int, *, seed: int, epoch: int, step: int) -> Tensor:
    """The examples of a step, over all processes, (b,).

    Args:
        examples: How many there are.
        batch_size: How many a step sees.
        seed: Of the run.
        epoch: From 0.
        step: Within the epoch, from 0.
    """
    return order(examples, seed, epoch)[step * batch_size : (step + 1) * batch_size]


def bucketed(lengths: Tensor, batch_size: int, *, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The batches of an epoch, each of examples that are about as long, so that little is padded.

    Examples are shuffled and cut into pools of `POOL` batches; a pool is sorted by length and cut into batches; batches
    are shuffled. The sort is stable, so examples of one length meet others in every epoch.

    Args:
        lengths: Of the examples, (n,).
        batch_size: How many examples a batch has; one batch has fewer when they do not divide evenly.
        seed: Of the run.
        epoch: From 0.

    Returns:
        The examples of each step, (b,) each; as many as `steps_per_epoch` says.
    """
    generator = torch.Generator().manual_seed(derive(seed, epoch))
    pools = torch.randperm(len(lengths), generator=generator).split(POOL * batch_size)
    batches = [b for pool in pools for b in pool[lengths[pool].argsort(stable=True)].split(batch_size)]
    return tuple(batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def share(batch: Tensor, *, rank: int, world: int, microbatches: int) -> list[Tensor]:
    """What one process sees of a batch, in microbatches; some are empty when a batch is smaller than their number.

    Args:
        batch: Indices, (b,).
        rank: The process, from 0.
        world: How many processes there are.
        microbatches: How many microbatches each computes one after the other.
    """
    return list(batch[rank::world].tensor_split(microbatches))
