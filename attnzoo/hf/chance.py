"""Random numbers for heads that draw some when they are built, away from everybody else's."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """What the block builds lies on the CPU, draws from this seed, and can be trained through later.

    The random state outside is left as it was. One block runs at a time.

    Args:
        seed: A whole number of 64 bits.
    """
    with _LOCK, torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
        torch.default_generator.manual_seed(seed)
        yield
