"""The training loop: Accelerate's devices and processes, timm's optimisers and schedules, exact resume.

What a step does follows from the seed, its position and the weights alone (`sampler.py`), and a checkpoint holds
weights, the optimiser's tensors and the position. So a run that was stopped anywhere ends with the bits of one that
never was, as long as machine, versions, threads and processes are the same, and deterministic algorithms are used.
"""

import csv
import hashlib
import io
import json
import logging
import math
import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice, starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from attnzoo.core import auxiliary_losses
from attnzoo.errors import RunError
from attnzoo.recipe import Loaded, build, load, resolve
from attnzoo.recipe.made_with import made_with
from attnzoo.train import checkpoint, sampler
from attnzoo.train.checkpoint import Checkpoint
from attnzoo.train.curve import draw_curve
from attnzoo.train.kinds import task_of
from attnzoo.train.lock import held
from attnzoo.train.methods import with_method
from attnzoo.train.optimizer import make_optimizer
from attnzoo.train.record import FIRST, Record, record_of
from attnzoo.train.run import Run, newest, reading, usable
from attnzoo.train.settings import Settings, kind_of
from attnzoo.train.state import Progress
from attnzoo.train.task import Inputs

Report = Callable[[dict[str, Any]], None]
"""Told what happens: `event` is `step`, `epoch` (with the row of the log, and the SHA-256 of the `weights` after a
whole one) or `note` (with a `text`)."""

REDRAW = 20.0
"""Seconds between two drawings of the learning curve, at least; the last one is drawn when training ends."""
VERSIONS = ("attnzoo", "torch", "timm", "accelerate", "numpy", "safetensors")
"""Distributions that the bits of a run may depend on."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by Ctrl-C or SIGTERM; all that it did is saved.

    Args:
        run: To be continued.
    """

    def __init__(self, run: Run):
        super().__init__()
        self.run = run


class NotFinite(RunError):
    """A loss or gradient is not finite (AZ803). The weights before the step are saved if they are finite."""

    exit_code = 1


class Microbatch(NamedTuple):
    """What a process computes at once.

    Args:
        inputs: What the model is given.
        targets: What it shall answer.
        indices: Of the examples, (b,); when there are none, `inputs` holds one that does not count.
    """

    inputs: Inputs
    targets: Tensor
    indices: Tensor


class Batch(NamedTuple):
    """A step's examples.

    Args:
        epoch: From 0.
        step: Within the epoch, from 0.
        indices: Of all examples, of all processes.
        units: What the sum of their losses is divided by.
        microbatches: What this process computes, one after the other.
    """

    epoch: int
    step: int
    indices: Tensor
    units: int
    microbatches: list[Microbatch]


def train(
    recipe: str | Path | Loaded,
    settings: Settings,
    folder: str | Path,
    *,
    report: Report | None = None,
    until: int | None = None,
) -> Run:
    """Train a model, or go on where a run of the same recipe and settings stopped.

    The random states of Python, NumPy and torch are set anew in every step.

    Args:
        recipe: Name, file, text or loaded recipe; the settings count, not its own `train:`.
        settings: How to train.
        folder: Of the run.
        report: Told what happens.
        until: End after this step, as if the run were stopped there: it is saved, and can be gone on with.

    Raises:
        RecipeError: what is wrong with the recipe.
        DataError: AZ7xx, what is wrong with the data.
        RunError: AZ802 the folder holds something else, AZ803 a loss is not finite, AZ804 the disk refuses, AZ805 no
            checkpoint is sound, AZ806 settings that cannot be met here, AZ808 another process trains there, AZ814 the
            recipe is for other data.
        Stopped: after Ctrl-C or SIGTERM, when the step is done and saved.
    """
    loaded = recipe if isinstance(recipe, Loaded) else load(recipe)
    folder = Path(folder)
    if folder.exists() and not any(checkpoint.steps(folder)):
        _refuse_what_is_no_run(folder)
    accelerator = _accelerator(settings)
    with held(folder) if accelerator.process_index == 0 else nullcontext():
        training = _Training(loaded, settings, folder, report or (lambda event: None), accelerator)
        with _deterministic(settings, training.device), _stop_signals() as stopping:
            training.run(stopping, until)
    return training.as_run()


class _Training:
    """Everything a run has in memory."""

    def __init__(
        self, loaded: Loaded, settings: Settings, folder: Path, report: Report, accelerator: Accelerator
    ):
        self.settings, self.folder, self.accelerator = settings, folder, accelerator
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.report: Report = report if self.rank == 0 else lambda event: None
        if settings.batch_size < self.world * settings.accumulate:
            examples = kind_of(loaded, settings)
            raise RunError(
                "AZ806",
                f"{settings.batch_size} {examples} cannot be shared by {self.world} processes "
                f"with {settings.accumulate} microbatches each",
                help="use larger batches",
            )
        self.task = task_of(loaded, settings)
        self.loaded, self.steps = self.task.loaded, self.task.steps
        found = _existing(folder, self.loaded, settings, self.report)
        self.progress, self.log, self.saved = Progress(), list[dict[str, Any]](), -1
        self.best: dict[str, Tensor] | None = None
        for note in () if found else self.task.notes:
            self._note(note)
        self._prepare_model()
        self.record: Record | None = None
        if found:
            self._restore(found)
        elif self.rank == 0:
            self.record = record_of(self.task, self.composition, self.net, self._environment())

    def _prepare_model(self) -> None:
        settings = self.settings
        sampler.reseed(settings.seed)
        self.composition = resolve(self.loaded)
        self.net = with_method(build(self.composition, {}), self.loaded, settings)
        self.plugins = made_with(self.composition.entries).plugins
        self.ema = ModelEmaV3(self.net, decay=settings.ema).to(self.device) if settings.ema else None
        self.raw_optimizer = make_optimizer(self.net, settings.optimizer)
        self.scheduler = make_scheduler(self.raw_optimizer, settings, self.steps)
        self.model, self.optimizer = self.accelerator.prepare(self.net, self.raw_optimizer)

    @property
    def taken(self) -> int:
        """Optimiser steps since the start."""
        return self.progress.epoch * self.steps + self.progress.step

    @property
    def out_of_time(self) -> bool:
        """Whether the minutes are over."""
        return self.settings.minutes is not None and self.progress.seconds >= 60 * self.settings.minutes

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.progress.epoch >= self.settings.epochs or self.out_of_time

    def as_run(self) -> Run:
        """The run as others see it."""
        return Run(self.folder, self.loaded, self.settings)

    def run(self, stopping: threading.Event, until: int | None = None) -> None:
        """All steps that are left, or those up to one."""
        if self.rank == 0:
            checkpoint.sweep(self.folder)
        if self.finished:
            return
        if self.taken == 0:
            self._save()
        if until is not None and self.taken >= until:
            return
        self._write_log()
        self.clock = self.drawn = time.perf_counter()
        try:
            self._take_steps(stopping, until)
        finally:
            if until is None:
                self._draw_curve()

    def _take_steps(self, stopping: threading.Event, until: int | None) -> None:
        every = self.settings.checkpoint_every
        for batch in self._batches():
            loss, stop, over = self._step(batch, stopping)
            self._advance(loss, batch)
            ended = self.progress.step == self.steps or over
            if ended:
                self._close_epoch()
            reached = self.taken == until
            if stop or reached or (self.taken % every == 0 if every else ended) or self.finished:
                self._save()
            if over or reached:
                return
            if stop and not self.finished:
                raise Stopped(self.as_run())

    def _batches(self) -> Iterator[Batch]:
        """The batches from here to the end, prepared ahead by `workers` threads."""
        epochs, steps, workers = self.settings.epochs, self.steps, self.settings.workers
        positions = (divmod(position, steps) for position in range(self.taken, epochs * steps))
        if not workers:
            yield from starmap(self._batch, positions)
            return
        with ThreadPoolExecutor(workers) as pool:
            ahead = deque(pool.submit(self._batch, *where) for where in islice(positions, 2 * workers))
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(self._batch, *where) for where in islice(positions, 1))

    def _batch(self, epoch: int, step: int) -> Batch:
        indices = self.task.batch(epoch, step)
        shares = sampler.share(
            indices, rank=self.rank, world=self.world, microbatches=self.settings.accumulate
        )
        microbatches = [
            Microbatch(*self.task.prepare(epoch, own if len(own) else indices[:1]), own) for own in shares
        ]
        return Batch(epoch, step, indices, self.task.units(indices), microbatches)

    def _step(self, batch: Batch, stopping: threading.Event) -> tuple[float, bool, bool]:
        """One optimiser step.

        Returns:
            Sum of the losses of all units, whether to stop, whether time is over; the same in all processes.
        """
        losses = torch.zeros(2, dtype=torch.float64)  # as logged; as minimised
        self.model.train()
        for number in range(len(batch.microbatches)):
            last = number == len(batch.microbatches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, objective = self._losses(self.model, batch, number)
                self.accelerator.backward(objective * self.world / batch.units)
            losses += torch.stack([loss.detach(), objective.detach()]).cpu().double()
        flags = torch.tensor([stopping.is_set(), self.out_of_time], dtype=torch.float64)
        loss, objective, stop, over = self._summed(torch.cat([losses, flags])).tolist()
        if not math.isfinite(objective) or not self._finite_gradient():
            raise self._not_finite(batch)
        if self.settings.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.scheduler.step_update(self.taken)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.net, step=self.taken + 1)
        return loss, bool(stop), bool(over)

    def _finite_gradient(self) -> bool:
        """Whether the gradient is finite; with fp16 the scaler sees to it."""
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        return self.accelerator.scaler is not None or bool(get_total_norm(gradients).isfinite())

    def _losses(self, model: nn.Module, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
        """Sums over the units of a microbatch: the task's loss, and that with what mechanisms add to it."""
        microbatch = batch.microbatches[number]
        sampler.reseed(self.settings.seed, batch.epoch, batch.step, number, self.rank)
        inputs = tuple(tensor.to(self.device, non_blocking=True) for tensor in microbatch.inputs)
        targets = microbatch.targets.to(self.device, non_blocking=True)
        with auxiliary_losses(self.net) as extra:
            losses = self.task.losses(model, inputs, targets)
        loss = losses[: len(microbatch.indices)].sum()
        weight = self.settings.auxiliary * self.task.units(microbatch.indices)
        return loss, loss + weight * extra.mean() if weight else loss

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        return values if self.world == 1 else self.accelerator.reduce(values.to(self.device)).cpu()

    def _lap(self) -> float:
        """Seconds since the last lap; they count as the run's."""
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        self.progress.seconds += elapsed
        return elapsed

    def _advance(self, loss: float, batch: Batch) -> None:
        at, elapsed = self.progress, self._lap()
        at.step += 1
        at.loss += loss
        at.units += batch.units
        at.images += len(batch.indices)
        at.busy += elapsed
        if self.record and len(self.record.losses) == self.taken - 1 < FIRST:
            self.record.losses.append(at.loss / at.units)
        total = self.settings.epochs * self.steps
        left = (total - self.taken) * at.seconds / self.taken
        if self.settings.minutes is not None:
            left = min(left, max(0.0, 60 * self.settings.minutes - at.seconds))
        self.report(
            {
                "event": "step",
                "epoch": at.epoch + 1,
                "step": self.taken,
                "steps": total,
                "epoch_step": at.step,
                "epoch_steps": self.steps,
                "train_loss": at.loss / at.units,
                "images_per_second": at.images / at.busy,
                "examples": self.task.kind,
                "test_accuracy": self.log[-1]["test_accuracy"] if self.log else None,
                "seconds": at.seconds,
                "left": left,
            }
        )

    def _close_epoch(self) -> None:
        """Evaluate, and write the row of an epoch, or of what time allowed of it."""
        at = self.progress
        net = self.ema.module if self.ema else self.net
        sums = self.task.tally(net, device=self.device, rank=self.rank, world=self.world)
        figures = self.task.figures(self._summed(sums))
        self._lap()
        row = {
            "epoch": at.epoch + 1,
            "train_loss": at.loss / at.units,
            **figures,
            "images_per_second": at.images / at.busy,
            "lr": self.raw_optimizer.param_groups[0]["lr"],
            "seconds": at.seconds - at.since,
        }
        self.log = [other for other in self.log if other["epoch"] != row["epoch"]] + [row]
        if at.best is None or figures["test_accuracy"] > at.best:
            at.best = figures["test_accuracy"]
            self.best = {name: t.detach().cpu().clone() for name, t in net.state_dict().items()}
        digest = None
        if at.step == self.steps:
            if self.record and self.rank == 0:
                digest = checkpoint.fingerprint(self.net.state_dict())
                self.record.epochs.append(digest)
            self.progress = Progress(at.epoch + 1, seconds=at.seconds, since=at.seconds, best=at.best)
        self._write_log()
        if time.perf_counter() - self.drawn > REDRAW:
            self._draw_curve()
            self._lap()  # the next epoch does not wait for it
        self.report({"event": "epoch", **row, "weights": digest})

    def _write_log(self) -> None:
        if self.rank or not self.log:
            return
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.log[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.log)
        checkpoint.replace(self.folder / "log.csv", table.getvalue())
        checkpoint.replace(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.log))

    def _draw_curve(self) -> None:
        if self.rank == 0:
            draw_curve(self.log, self.folder)
        self.drawn = time.perf_counter()

    def _save(self) -> None:
        if self.saved == self.taken:
            return
        if self.rank == 0:
            checkpoint.save(self.folder, self.taken, self._tensors(), self._state(), keep=self.settings.keep)
        self.saved = self.taken
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        state = self.raw_optimizer.state_dict()["state"]
        moments = {f"{i}/{k}": v for i, own in state.items() for k, v in own.items() if isinstance(v, Tensor)}
        files = {"model": self.net.state_dict(), "optimizer": moments}
        if self.ema:
            files["ema"] = self.ema.module.state_dict()
        return files | ({"best": self.best} if self.best else {})

    def _state(self) -> dict[str, Any]:
        state = self.raw_optimizer.state_dict()["state"]
        scaler = self.accelerator.scaler
        return {
            "step": self.taken,
            "recipe": self.loaded.text,
            "recipe_sha256": hashlib.sha256(self.loaded.text.encode()).hexdigest(),
            "settings": self.settings.model_dump(mode="json", by_alias=True),
            "progress": asdict(self.progress),
            "finished": self.finished,
            **self.task.facts(),
            "params": sum(p.numel() for p in self.net.parameters()),
            "log": self.log,
            "optimizer": {
                i: {k: v for k, v in own.items() if not isinstance(v, Tensor)} for i, own in state.items()
            },
            "scaler": scaler.state_dict() if scaler else None,
            "environment": self._environment(),
            "record": self.record.model_dump(mode="json") if self.record else None,
        }

    def _environment(self) -> dict[str, str | int]:
        """What bits depend on beside the settings."""
        plugins = {made.distribution or name: made.version for name, made in self.plugins.items()}
        gpu = {"gpu": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else {}
        return (
            {name: version(name) for name in VERSIONS}
            | plugins
            | gpu
            | {
                "python": platform.python_version(),
                "machine": platform.machine(),
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "device": self.device.type,
                "threads": torch.get_num_threads(),
                "processes": self.world,
            }
        )

    def _restore(self, found: Checkpoint) -> None:
        state = found.state()
        if others := [key for key, fact in self.task.facts().items() if state.get(key) != fact]:
            raise RunError(
                "AZ802",
                f"`{self.folder}` holds a run on other data",
                why=f"their {', '.join(others)} differ",
                help="bring the data back as they were, or name another folder with --out",
            )
        with reading(found):
            self.net.load_state_dict(found.tensors("model"))
            moments: dict[int, dict[str, Any]] = {int(i): dict(own) for i, own in state["optimizer"].items()}
            for path, tensor in found.tensors("optimizer").items():
                index, _, name = path.partition("/")
                moments[int(index)][name] = tensor
            self.raw_optimizer.load_state_dict(self.raw_optimizer.state_dict() | {"state": moments})
            if self.ema:
                self.ema.module.load_state_dict(found.tensors("ema"))
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.best = found.tensors("best") if found.has("best") else None
            progress = {"units": state["progress"].get("images", 0)} | state[
                "progress"
            ]  # once all were images
            self.progress, self.log, self.saved = Progress(**progress), state["log"], found.step
            self.record = Record.model_validate(state["record"]) if state.get("record") else None
            if self.taken != found.step:
                raise ValueError(f"its progress says step {self.taken}")
        before, now = state["environment"], self._environment()
        changed = [f"{key} {now[key]}, was {was}" for key, was in before.items() if now.get(key) != was]
        if changed:
            self._note(f"not the same as before, so the bits may differ: {'; '.join(changed)}")
        self._note(f"goes on after step {found.step} of {self.settings.epochs * self.steps}")

    def _note(self, text: str) -> None:
        self.report({"event": "note", "text": text})

    def _not_finite(self, batch: Batch) -> NotFinite:
        """The fault, after replaying the step to see where it begins; the weights before it are saved."""
        culprit = next(filter(None, gather_object([self._culprit(batch)])), "the loss itself")
        if all(bool(p.isfinite().all()) for p in self.net.parameters()):
            self._save()
        kept = (
            "the weights before it are saved" if self.saved == self.taken else f"step {self.saved} is saved"
        )
        file = self.folder / "not_finite.json"
        where = {"epoch": batch.epoch + 1, "step": self.taken + 1, "first": culprit}
        if self.rank == 0:
            checkpoint.replace(file, json.dumps(where | {"indices": batch.indices.tolist()}) + "\n")
        return NotFinite(
            "AZ803",
            f"step {self.taken + 1}, in epoch {batch.epoch + 1}, is not finite",
            why=f"it begins with {culprit}",
            help=f"{kept}, its {len(batch.indices)} {self.task.kind} are named in {file}; "
            "try a lower --lr or --set train.clip_grad=1",
        )

    def _culprit(self, batch: Batch) -> str:
        """The first module whose output is not finite, else the parameter nearest to the loss whose gradient is not."""
        found: list[str] = []

        def look(name: str, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            if not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
                found.append(f"the output of `{name or type(self.net).__name__}`")

        hooks = [
            module.register_forward_hook(lambda module, inputs, output, name=name: look(name, output))
            for name, module in self.net.named_modules()
        ]
        with torch.no_grad():
            for number in range(len(batch.microbatches)):
                self._losses(self.net, batch, number)
        for hook in hooks:
            hook.remove()
        for name, parameter in reversed(list(self.net.named_parameters())):
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                found.append(f"the gradient of `{name}`")
        return found[0] if found else ""


def _accelerator(settings: Settings) -> Accelerator:
    AcceleratorState._reset_state()  # a run in the same process may have had another precision
    precision = "no" if settings.precision == "fp32" else settings.precision
    accelerator = Accelerator(mixed_precision=precision, cpu=settings.device == "cpu")
    if precision == "fp16" and accelerator.scaler is None:
        raise RunError(
            "AZ806",
            f"there is no fp16 on the {accelerator.device.type}",
            why="small gradients would be 0",
            help="use --set train.precision=bf16 or fp32",
        )
    return accelerator


def make_scheduler(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> Scheduler:
    """timm's schedule by steps; what it says depends on the step alone."""
    chosen, total = settings.schedule, settings.epochs * steps
    warmup = min(round(chosen.warmup * steps), total - 1)
    rise: Any = {
        "warmup_t": warmup,
        "warmup_lr_init": chosen.start,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if chosen.use == "cosine":
        with _unsaid("timm.scheduler.cosine_lr", "Cosine annealing scheduler will have no effect"):
            return CosineLRScheduler(optimizer, t_initial=total - warmup, lr_min=chosen.end, **rise)
    if chosen.use == "inverse_sqrt":
        return InverseSquareRoot(optimizer, warmup, chosen.start)
    return StepLRScheduler(optimizer, decay_t=total, decay_rate=1.0, **rise)


@contextmanager
def _unsaid(logger: str, beginning: str) -> Iterator[None]:
    """What a library logs here with this beginning is not shown: nobody can do anything about it."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logging.getLogger(logger).addFilter(other)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(other)


class InverseSquareRoot(Scheduler):
    """A linear rise, then lr √(w / t) after w steps of rise: continuous, and a function of the step t alone.

    Vaswani et al., arXiv:1706.03762, eq. 3, with the peak lr in the place of √(1 / (d w)).

    Args:
        optimizer: Its rates are the peak.
        warmup: Steps of the rise, w; without them the rate falls from the first step, as if w were 1.
        start: Rate the rise begins at.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int, start: float):
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self.warmup, self.start = warmup, start

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup:
            return [self.start + (peak - self.start) * t / self.warmup for peak in self.base_values]
        w = max(1, self.warmup)
        return [peak * math.sqrt(w / max(t, w)) for peak in self.base_values]


def _refuse_what_is_no_run(folder: Path) -> None:
    """A folder without checkpoints must be empty, but for hidden files.

    Raises:
        RunError: AZ802.
    """
    if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RunError(
            "AZ802", f"`{folder}` is not empty and holds no run", help="name another folder with --out"
        )


def _existing(folder: Path, loaded: Loaded, settings: Settings, report: Report) -> Checkpoint | None:
    """The checkpoint to go on from; None for a new run.

    Raises:
        RunError: AZ802 when the folder holds another run, AZ805 when no checkpoint is sound.
    """
    found, notes = usable(folder)
    for note in notes if found else ():
        report({"event": "note", "text": note})
    if found is None:
        if notes:
            newest(folder)
        return None
    state = found.state()
    before = Settings.model_validate(state["settings"]).decisive()
    differing = [
        f"`{key}` is {before[key]} there and {now} here"
        for key, now in settings.decisive().items()
        if before[key] != now
    ]
    if state["recipe"] != loaded.text and not differing:
        differing = ["the recipe is another"]
    if differing:
        raise RunError(
            "AZ802",
            f"`{folder}` holds a run with other settings",
            why="; ".join(differing)[:400],
            help=f"name another folder with --out, or go on with it: attnzoo resume {folder}",
        )
    return found


@contextmanager
def _deterministic(settings: Settings, device: torch.device) -> Iterator[None]:
    """Same bits in every run, if wanted."""
    wanted = device.type == "cpu" if settings.deterministic is None else settings.deterministic
    if not wanted:
        yield
        return
    memory: Any = torch.utils.deterministic  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # it would only cost time
    try:
        with nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM sets the event, the second interrupts at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def ask(number: int, frame: Any) -> None:
        stopping.set()
        for each in before:
            signal.signal(each, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
