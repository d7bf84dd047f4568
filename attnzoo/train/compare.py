"""Several recipes under one budget and several seeds: who is better, by how much, and whether that is noise."""

import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from attnzoo.errors import RunError
from attnzoo.recipe import Loaded
from attnzoo.train.loop import train
from attnzoo.train.run import Run, open_run
from attnzoo.train.settings import Settings
from attnzoo.workers import in_processes

Budget = Literal["epochs", "flops", "seconds"]
"""What every run gets the same of: passes over the data, arithmetic of the first recipe's run, or time."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Args:
        recipe: Name of the recipe.
        seed: Of weights, order and augmentation; runs of one seed see the same examples in the same order.
        loaded: The recipe.
        settings: How it is trained.
        folder: Where the run is kept.
    """

    recipe: str
    seed: int
    loaded: Loaded
    settings: Settings
    folder: Path


@dataclass(frozen=True)
class Row:
    """One recipe's figures over its seeds; accuracies are shares of 1, spreads sample standard deviations.

    Args:
        recipe: Its name.
        seeds: How many runs.
        best, best_spread: Accuracy of each run's best epoch on the test side, which flatters every recipe alike.
        best_epoch: Mean number of that epoch.
        last, last_spread: Accuracy after the last epoch.
        params: Parameters.
        images_per_second: Training throughput, mean over runs; side by side with other runs.
        epochs: Passes over the data, mean over runs.
        reached: Of each run, in the order of the seeds, the first epoch with the accuracy `Comparison.reach`; None for
            a run that never had it. Empty when none was asked for.
    """

    recipe: str
    seeds: int
    best: float
    best_spread: float
    best_epoch: float
    last: float
    last_spread: float
    params: int
    images_per_second: float
    epochs: float
    reached: tuple[int | None, ...] = ()

    def epochs_to_reach(self) -> str:
        """Mean and sample standard deviation of the epochs in `reached`; how many runs, where not all got there."""
        there = [epoch for epoch in self.reached if epoch is not None]
        if not there:
            return "never"
        spread = f" ± {statistics.stdev(there):.1f}" if len(there) > 1 else ""
        runs = "" if len(there) == self.seeds else f" ({len(there)} of {self.seeds} runs)"
        return f"{statistics.fmean(there):.1f}{spread}{runs}"


@dataclass(frozen=True)
class Difference:
    """A recipe against the first one, seed by seed.

    Args:
        recipe: Which.
        against: The first recipe.
        what: `best` or `last` accuracy.
        mean: Mean of the differences, a share of 1.
        low, high: A 95 % interval of that mean: Student's t over the seeds; None for one seed, which has none.
        bootstrap_low, bootstrap_high: The same by resampling seeds 10,000 times; too narrow for few seeds.
        verdict: `better`, `worse`, or `noise` when an interval holds 0, or there is none.
    """

    recipe: str
    against: str
    what: str
    mean: float
    low: float | None
    high: float | None
    bootstrap_low: float | None
    bootstrap_high: float | None
    verdict: str

    @property
    def interval(self) -> str:
        """Student's, in points; empty for one seed."""
        return _points(self.low, self.high)

    @property
    def bootstrap_interval(self) -> str:
        """That by resampling, in points; empty for one seed."""
        return _points(self.bootstrap_low, self.bootstrap_high)


def _points(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{100 * low:+.2f} to {100 * high:+.2f}"


@dataclass(frozen=True)
class Comparison:
    """The outcome.

    Args:
        data: Name of the data set.
        budget: What was the same for all.
        rows: A row per recipe, in the order that was asked for.
        differences: Against the first recipe.
        logs: Per recipe the epoch logs of its runs, in the order of the seeds.
        reach: A test accuracy, a share of 1, whose first epoch is told; None when none was asked for.
    """

    data: str
    budget: str
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    logs: dict[str, list[list[dict[str, Any]]]]
    reach: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """What the figures say, in words."""
        out = []
        for d in self.differences:
            by = f"{100 * d.mean:+.2f} points of {d.what} accuracy"
            if not d.interval:
                out.append(f"{d.recipe} against {d.against}: {by}; of one seed nobody can tell it from noise")
                continue
            judged = {
                "better": f"{d.recipe} is better than {d.against}",
                "worse": f"{d.recipe} is worse than {d.against}",
                "noise": f"no difference between {d.recipe} and {d.against} that these seeds can tell from noise",
            }[d.verdict]
            out.append(f"{judged}: {by} (95 % interval {d.interval})")
        return out

    def speed(self) -> str | None:
        """How many epochs each recipe took to `reach`, in words; None when that was not asked for."""
        if self.reach is None:
            return None
        each = ", ".join(f"{row.recipe} {row.epochs_to_reach()}" for row in self.rows)
        return f"epochs to {100 * self.reach:g} % test accuracy: {each}"


def trials(
    recipes: Sequence[tuple[str, Loaded, Settings]],
    seeds: int,
    folder: Path,
    epochs: Sequence[int] | None = None,
) -> list[Trial]:
    """All runs of a comparison, seed by seed, so that an early stop leaves whole pairs.

    Args:
        recipes: Names, recipes and settings.
        seeds: How many, counted from the settings' own.
        folder: Each run gets one below it.
        epochs: Passes over the data by recipe; the settings' own when None.
    """
    out = []
    for k in range(seeds):
        for i, (name, loaded, settings) in enumerate(recipes):
            seed = settings.seed + k
            changed: dict[str, Any] = {"seed": seed} | ({"epochs": epochs[i]} if epochs else {})
            own = settings.model_copy(update=changed)
            out.append(Trial(name, seed, loaded, own, folder / f"{name}-seed{seed}"))
    return out


def equal_flops(counts: Sequence[int], epochs: int) -> list[int]:
    """Epochs with which each recipe does the arithmetic of `epochs` epochs of the first; at least one.

    Args:
        counts: FLOPs of a forward on one image, by recipe.
        epochs: Of the first.
    """
    return [max(1, round(epochs * counts[0] / count)) for count in counts]


def _run(trial: Trial) -> tuple[str, int]:
    """One run in a process of its own, on one thread, so that neighbours change nothing but the time."""
    torch.set_num_threads(1)
    train(trial.loaded, trial.settings, trial.folder)
    return trial.recipe, trial.seed


def compare(
    all_trials: Sequence[Trial],
    *,
    budget: Budget = "epochs",
    workers: int = 1,
    ray: str | None = None,
    reach: float | None = None,
    report: Callable[[str, int, int, int], None] | None = None,
) -> Comparison:
    """Run what has not run yet, and weigh the outcome. Finished runs are read, interrupted ones go on.

    Args:
        all_trials: From `trials`.
        budget: For the record; the settings hold it.
        workers: Processes side by side, one thread each.
        ray: Address of a Ray cluster (`local` for this machine) that runs them instead.
        reach: A test accuracy, a share of 1: in which epoch does each run first have it?
        report: Told recipe, seed, number of runs done and of all runs.

    Raises:
        RunError: AZ809 a worker ended before its run was done, AZ810 there is no Ray, AZ811 no cluster answers; what
            `train` raises.
    """
    waiting = [trial for trial in all_trials if not _finished(trial)]
    done = len(all_trials) - len(waiting)
    engine: Iterator[tuple[str, int]]
    if ray:
        engine = _on_ray(waiting, ray)
    elif workers > 1 and waiting:
        engine = in_processes(_run, waiting, workers=workers)
    else:
        engine = map(_run, waiting)
    for recipe, seed in engine:
        done += 1
        if report:
            report(recipe, seed, done, len(all_trials))
    return weigh([(trial, open_run(trial.folder)) for trial in all_trials], budget, reach)


def _finished(trial: Trial) -> bool:
    if not trial.folder.exists():
        return False
    try:
        run = open_run(trial.folder)
    except RunError:
        return False
    same = run.settings.decisive() == trial.settings.decisive()
    return same and bool(run.summary()["finished"])


def _on_ray(waiting: Sequence[Trial], address: str) -> Iterator[tuple[str, int]]:
    try:
        import ray
    except ImportError:
        raise RunError("AZ810", "`--ray` needs Ray", help='pip install "attnzoo[ray]"') from None
    try:
        # when this process is killed, so are the tasks; what else Ray started here ends within a minute or so
        ray.init(
            address=None if address == "local" else address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(
            "AZ811",
            f"no Ray cluster answers at `{address}`: {str(error).splitlines()[0]}",
            help="`ray start --head` starts one; --ray local uses this machine",
        ) from None
    remote = ray.remote(num_cpus=1)(_run)
    left = [remote.remote(trial) for trial in waiting]
    try:
        while left:
            ready, left = ray.wait(left, num_returns=1)
            yield ray.get(ready[0])
    finally:
        ray.shutdown()


def weigh(runs: Sequence[tuple[Trial, Run]], budget: str, reach: float | None = None) -> Comparison:
    """Rows and differences of finished runs.

    Args:
        runs: Trials and their runs.
        budget: What was the same for all.
        reach: A test accuracy whose first epoch is told, a share of 1.
    """
    names = list(dict.fromkeys(trial.recipe for trial, _ in runs))
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    logs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    for trial, run in runs:
        found[trial.recipe][trial.seed] = run.summary()
        logs[trial.recipe].append(run.log())
    first = {name: () if reach is None else tuple(_first(log, reach) for log in logs[name]) for name in names}
    rows = tuple(_row(name, list(found[name].values()), first[name]) for name in names)
    differences = tuple(
        difference(
            name,
            names[0],
            what,
            [
                found[name][seed][f"{what}_accuracy"] - found[names[0]][seed][f"{what}_accuracy"]
                for seed in found[name]
            ],
        )
        for name in names[1:]
        for what in ("best", "last")
    )
    return Comparison(runs[0][0].settings.data, budget, rows, differences, logs, reach)


def _first(log: Sequence[dict[str, Any]], accuracy: float) -> int | None:
    """The first epoch of a run with at least this test accuracy, but for the rounding of percents."""
    return next((row["epoch"] for row in log if row["test_accuracy"] > accuracy - 1e-9), None)


def _row(name: str, summaries: Sequence[dict[str, Any]], reached: tuple[int | None, ...]) -> Row:
    def mean(key: str) -> float:
        return statistics.fmean(summary[key] for summary in summaries)

    def spread(key: str) -> float:
        return statistics.stdev(summary[key] for summary in summaries) if len(summaries) > 1 else 0.0

    return Row(
        recipe=name,
        seeds=len(summaries),
        best=mean("best_accuracy"),
        best_spread=spread("best_accuracy"),
        best_epoch=mean("best_epoch"),
        last=mean("last_accuracy"),
        last_spread=spread("last_accuracy"),
        params=summaries[0]["params"],
        images_per_second=mean("images_per_second"),
        epochs=mean("last_epoch"),
        reached=reached,
    )


T95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; 1.96 beyond."""


def difference(recipe: str, against: str, what: str, values: Sequence[float]) -> Difference:
    """Paired differences with their intervals, which one seed has not.

    Args:
        recipe: Which recipe.
        against: The first recipe.
        what: `best` or `last`.
        values: Differences, seed by seed.
    """
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Difference(recipe, against, what, mean, None, None, None, None, "noise")
    t = T95[n - 2] if n - 2 < len(T95) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(n)
    low, high = mean - half, mean + half
    rng = random.Random(0)  # noqa: S311 - the same interval each time
    means = sorted(statistics.fmean(rng.choices(values, k=n)) for _ in range(RESAMPLES))
    boot_low, boot_high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    clear = min(low, boot_low) > 0 or max(high, boot_high) < 0
    verdict = ("better" if mean > 0 else "worse") if clear else "noise"
    return Difference(recipe, against, what, mean, low, high, boot_low, boot_high, verdict)
