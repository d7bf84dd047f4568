"""Two models side by side in one run: throughput, training step, peak tensor memory. Ratios travel, seconds do not."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from attnzoo.inference import PackedLinear


@dataclass(frozen=True)
class Figure:
    """One quantity of both models.

    Args:
        what: `eval`, `training step`, `memory in eval`, `memory in training`.
        unit: `images/s`, `ms`, `MiB`.
        candidate: Median, 25th and 75th percentile; a memory stands three times.
        baseline: The same of the other model.
        ratio: Median of the candidate over median of the baseline.
        better: Whether more or less is better.
    """

    what: str
    unit: str
    candidate: tuple[float, float, float]
    baseline: tuple[float, float, float]
    ratio: float
    better: str

    def as_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on.

    Args:
        device: `cpu` or the name of the GPU.
        threads: Threads of torch.
        torch: Version of torch.
        timm: Version of timm.
        gemm: GFLOP/s of a float32 matrix product, 1024 cubed.
        tanh: Gelem/s of a float32 tanh over 2²⁰ elements.
    """

    device: str
    threads: int
    torch: str
    timm: str
    gemm: float
    tanh: float


def machine(device: torch.device) -> Machine:
    """Measure the machine's own rates, which flatter or punish whatever leans on them."""
    a = torch.randn(1024, 1024, device=device)
    flat = torch.randn(2**20, device=device)
    gemm = statistics.median(_timed(lambda: a @ a, device) for _ in range(15))
    tanh = statistics.median(_timed(flat.tanh, device) for _ in range(15))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} cpu"
    return Machine(
        name,
        torch.get_num_threads(),
        torch.__version__,
        timm.__version__,
        2 * 1024**3 / gemm / 1e9,
        2**20 / tanh / 1e9,
    )


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def compare(
    candidate: nn.Module,
    baseline: nn.Module,
    *,
    image: tuple[int, int, int],
    batch: int = 8,
    train_batch: int = 4,
    rounds: int = 20,
    device: torch.device,
    training: bool = True,
) -> list[Figure]:
    """Alternate the two models (A B, B A, ...) after a warm-up and compare medians.

    Args:
        candidate: The model in question.
        baseline: The model it is held against.
        image: Channels, rows, columns, in pixels.
        batch: Images per forward in eval mode.
        train_batch: Images per training step.
        rounds: Pairs that are counted.
        device: Where both run.
        training: Whether a training step is measured too.
    """
    models = [candidate.to(device), baseline.to(device)]
    x = torch.randn(batch, *image, device=device)
    x_train = torch.randn(train_batch, *image, device=device)

    def forward(model: nn.Module) -> Callable[[], Any]:
        @torch.inference_mode()
        def work():
            return model(x)

        return work

    def step(model: nn.Module) -> Callable[[], Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def work():
            optimizer.zero_grad(set_to_none=True)
            model(x_train).float().logsumexp(dim=-1).mean().backward()
            optimizer.step()

        return work

    figures = []
    for model in models:
        model.eval()
    times = alternate([forward(model) for model in models], rounds, device)
    rates = [[batch / t for t in each] for each in times]
    figures.append(_figure("eval", "images/s", rates[0], rates[1], "more"))
    memory = [[peak(forward(model), model, device)] for model in models]
    figures.append(_figure("memory in eval", "MiB", memory[0], memory[1], "less"))
    if not training:
        return figures
    for model in models:
        model.train()
    times = alternate([step(model) for model in models], rounds, device)
    rates = [[train_batch / t for t in each] for each in times]
    figures.append(_figure("training step", "images/s", rates[0], rates[1], "more"))
    memory = [[peak(_backward(model, x_train), model, device)] for model in models]
    figures.append(_figure("memory in training", "MiB", memory[0], memory[1], "less"))
    return figures


def _backward(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    def work():
        model.zero_grad(set_to_none=True)
        model(x).float().logsumexp(dim=-1).mean().backward()
        model.zero_grad(set_to_none=True)

    return work


def alternate(works: list[Callable[[], Any]], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds that each takes, in turns (A B, B A, ...) after two warm-ups.

    Args:
        works: What is timed.
        rounds: Turns that are counted.
        device: Where they run.
    """
    times: list[list[float]] = [[] for _ in works]
    for work in works:  # warm-up
        work()
        work()
    for turn in range(rounds):
        order = range(len(works)) if turn % 2 == 0 else reversed(range(len(works)))
        for index in order:
            times[index].append(_timed(works[index], device))
    return times


def _figure(what: str, unit: str, candidate: list[float], baseline: list[float], better: str) -> Figure:
    a, b = quartiles(candidate), quartiles(baseline)
    return Figure(what, unit, a, b, a[0] / b[0], better)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 25th and 75th percentile.

    Args:
        values: At least one.
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def peak(work: Callable[[], Any], model: nn.Module, device: torch.device) -> float:
    """Most bytes alive at once during the work, weights included, in MiB.

    Args:
        work: What runs, twice.
        model: Whose weights are counted.
        device: Where.
    """
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    weights += sum(m.weight.nbytes for m in model.modules() if isinstance(m, PackedLinear))  # a second time
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return (weights + most) / 2**20
