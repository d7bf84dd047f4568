"""The paper's augmentation of a CIFAR-sized data set: by the batch, and by torchvision image by image."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnzoo.data import PAPER, Augment, Images, step_seeds

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
BATCH = 256


def measure(n: int = 10_000, threads: int = 2, rounds: int = 3) -> dict[str, Any]:
    """Time one epoch of the input pipeline both ways, alternately, after a warm-up.

    torchvision runs its per-image transforms under a DataLoader without workers, from PIL images (its first
    version of transforms) and from tensors (its second); the faster of the two is the baseline.

    Args:
        n: Images of 3 by 32 by 32.
        threads: Threads of torch while it runs.
        rounds: Epochs of each that are counted.

    Returns:
        Medians in ms (`batched`, `pil`, `tensor`), `baseline` (the faster of the latter two) and `ratio` (how many
        times faster `batched` is), with `n`, `threads` and `rounds`.
    """
    images = torch.randint(
        0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(n) % 10
    loaders = per_image(images, labels)
    works = {
        "batched": _batched(images, labels),
        **{name: _emptied(loader) for name, loader in loaders.items()},
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(rounds + 1):
            for name in works if turn % 2 else reversed(works):
                began = time.perf_counter()
                works[name]()
                times[name].append((time.perf_counter() - began) * 1e3)
    finally:
        torch.set_num_threads(before)
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    baseline = min(("pil", "tensor"), key=medians.__getitem__)
    return {
        **medians,
        "baseline": baseline,
        "ratio": medians[baseline] / medians["batched"],
        "n": n,
        "threads": threads,
        "rounds": rounds,
    }


def _batched(images: Tensor, labels: Tensor) -> Callable[[], None]:
    augment = Augment(PAPER, image=(3, 32, 32), mean=MEAN, std=STD, classes=10)
    split = Images(labels, images)

    def work() -> None:
        for indices in torch.randperm(len(split)).split(BATCH):
            augment(*split.batch(indices), step_seeds(0, 0, indices))

    return work


def per_image(images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The paper's Table 2 as torchvision's users write it: DataLoaders over `pil` and `tensor` images, no workers.

    Args:
        images: uint8 (n 3 32 32).
        labels: (n).
    """
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    class OneByOne(Dataset):
        def __init__(self, source: Any, transform: Callable[[Any], Tensor]):
            self.source, self.transform = source, transform

        def __len__(self) -> int:
            return len(self.source)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.transform(self.source[index]), int(labels[index])

    def chain(of: Any, first: list[Any], last: list[Any]) -> Callable[[Any], Tensor]:
        steps = [
            of.RandomCrop(32, padding=4),
            of.RandomHorizontalFlip(),
            of.RandomResizedCrop(32, scale=(0.8, 1.0), ratio=(0.75, 1.333)),
            of.Resize((32, 32)),
        ]
        return of.Compose([*first, *steps, *last, of.Normalize(MEAN, STD)])

    arrays = images.permute(0, 2, 3, 1).numpy()
    sources = {
        "pil": OneByOne(arrays, chain(v1, [Image.fromarray], [v1.ToTensor()])),
        "tensor": OneByOne(images, chain(v2, [], [v2.ToDtype(torch.float32, scale=True)])),
    }
    return {name: DataLoader(source, batch_size=BATCH, shuffle=True) for name, source in sources.items()}


def _emptied(loader: Any) -> Callable[[], None]:
    def work() -> None:
        for _ in loader:
            pass

    return work
