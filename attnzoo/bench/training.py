"""Training the paper's ViT: our loop, the same model behind torchvision's per-image pipeline, and a bare loop."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.bench.augment import per_image
from attnzoo.data import PAPER, Augment, load_images, step_seeds
from attnzoo.recipe import build
from attnzoo.train import prepare, train

EDITS = ("train.data=synthetic", "train.epochs=1", "train.batch_size=256", "train.augment=[random_crop]")


def measure(recipe: str = "ham_classic", threads: int = 2, rounds: int = 9) -> dict[str, Any]:
    """Time one epoch of 5,000 images of 3 by 32 by 32 three ways, alternately, after a warm-up.

    `ours`: `attnzoo train` with the paper's Table 2 and batches of 256, without evaluation and checkpoints.
    `torchvision`: the same model and optimiser, fed by torchvision's per-image transforms on PIL images, DataLoader
    without workers. `bare`: the same model and optimiser over tensors that are augmented already.

    Args:
        recipe: Name of the recipe.
        threads: Threads of torch while it runs.
        rounds: Epochs of each that are counted.

    Returns:
        Medians in images/s (`ours`, `torchvision`, `bare`), the ratios `over_torchvision` and `of_bare`.
    """
    images = load_images("synthetic")
    pixels, labels = images.train.batch(torch.arange(len(images.train)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        works = {
            "ours": lambda: _ours(recipe),
            "torchvision": _epoch(recipe, lambda: per_image(pixels, labels)["pil"]),
            "bare": _epoch(recipe, _augmented(pixels, labels)),
        }
        rates: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(rounds + 1):
            for name in works if turn % 2 else reversed(works):
                rates[name].append(works[name]())
    finally:
        torch.set_num_threads(before)
    medians = {name: statistics.median(each[1:]) for name, each in rates.items()}
    return {
        **medians,
        "over_torchvision": medians["ours"] / medians["torchvision"],
        "of_bare": medians["ours"] / medians["bare"],
        "recipe": recipe,
        "threads": threads,
        "rounds": rounds,
    }


def _edits() -> list[str]:
    steps = ", ".join(step.model_dump_json(by_alias=True, exclude_defaults=True) for step in PAPER)
    return [*EDITS[:-1], f"train.augment=[{steps}]"]


def _ours(recipe: str) -> float:
    loaded, settings = prepare(recipe, _edits())
    with tempfile.TemporaryDirectory() as folder:
        return train(loaded, settings, Path(folder) / "run").log()[0]["images_per_second"]


def _epoch(recipe: str, batches: Callable[[], Any]) -> Callable[[], float]:
    """A plain loop over batches: forward, loss, backward, step."""
    loaded, settings = prepare(recipe, _edits())
    options = settings.optimizer

    def work() -> float:
        model = build(loaded, {}).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True
        )
        seen, began = 0, time.perf_counter()
        for x, y in batches():
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            loss.item()
            seen += len(y)
        return seen / (time.perf_counter() - began)

    return work


def _augmented(images: Tensor, labels: Tensor) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    augment = Augment(PAPER, image=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, classes=10)
    ready = [augment(images[i], labels[i], step_seeds(0, 0, i)) for i in torch.arange(len(labels)).split(256)]
    return lambda: ready
