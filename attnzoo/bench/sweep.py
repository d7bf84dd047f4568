"""Random recipes under one budget, trained briefly, ranked: what is worth a closer look?"""

import copy
import csv
import fnmatch
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnzoo.bench.budget import Budget, Cost, cost, match
from attnzoo.errors import RunError, ZooError
from attnzoo.recipe import Loaded, load, resolve
from attnzoo.testing.recipes import random_attention
from attnzoo.testing.strategies import settings_of
from attnzoo.train.checkpoint import replace
from attnzoo.train.loop import train
from attnzoo.train.run import open_run
from attnzoo.train.settings import settings_of as settings_for
from attnzoo.workers import in_processes

PATIENCE = 50
"""So many draws may be refused for each recipe that is wanted."""


@dataclass(frozen=True)
class Candidate:
    """A random recipe that composes and meets the budget.

    Args:
        name: Of the recipe and of its file.
        text: What it puts where, in a line.
        loaded: The recipe.
        cost: What it costs.
        folder: Of its run.
    """

    name: str
    text: str
    loaded: Loaded
    cost: Cost
    folder: Path

    @property
    def file(self) -> Path:
        """Where a drawn recipe is written."""
        return self.folder.parent.parent / "recipes" / f"{self.name}.yaml"


@dataclass(frozen=True)
class Ranked:
    """What came of a candidate.

    Args:
        candidate: Which.
        best, last: Accuracy on the test side, of the best epoch and after the last, shares of 1; None when the training
            failed.
        failure: Why it failed; empty when it did not.
    """

    candidate: Candidate
    best: float | None
    last: float | None
    failure: str = ""


@dataclass(frozen=True)
class Draw:
    """What was drawn.

    Args:
        candidates: Recipes that hold; the first is the one that the sweep is about.
        refused: How many draws were refused, by the code of the first fault; `budget` for those that cannot meet it,
            `given` for those that ask for maps that data sets lack, `same` for those that were there already.
    """

    candidates: tuple[Candidate, ...]
    refused: Counter[str]


def draw(
    base: Loaded,
    count: int,
    folder: Path,
    *,
    seed: int = 0,
    budget: Budget | None = "params",
    mechanisms: Sequence[str] | None = None,
) -> Draw:
    """Random recipes with the host and the training of another one, the same for the same seed.

    Args:
        base: The recipe whose host, budget and training they have.
        count: How many besides itself.
        folder: Each is written to `recipes/` below it.
        seed: Of the draws.
        budget: What all spend as much of as the base, by the width of their MLPs; None for no budget.
        mechanisms: Names of what is put at the sites; all of the zoo when None.

    Raises:
        RunError: AZ815, when hardly any draw holds.
    """
    said = {
        key: value for key, value in base.source.tree.items() if key in ("recipe", "host", "heads", "train")
    }
    said["host"] = {key: value for key, value in said["host"].items() if key != "registers"}
    sites = list(resolve(base).info.sites())
    globs = [*sites, f"{sites[0].partition('.')[0]}.*"]
    target, source, refused = cost(base, budget == "time"), random.Random(seed), Counter[str]()
    found = [Candidate(base.name, _words(base), base, target, folder / "runs" / base.name)]
    seen = {found[0].text}
    while len(found) <= count:
        if refused.total() > PATIENCE * (count + 1):
            raise RunError(
                "AZ815",
                f"of {refused.total() + len(found) - 1:,} random recipes {len(found) - 1} hold",
                why=", ".join(f"{code} {times}" for code, times in refused.most_common(4)),
                help="ask for fewer, for other mechanisms, or say --match none",
            )
        name = f"sweep_{len(found):02}"
        drawn = _tidy(random_attention(source, base.recipe.host.kind, globs, mechanisms, _settings), sites)
        try:
            candidate = _candidate(name, copy.deepcopy(said) | drawn, target, budget, folder)
        except ZooError as error:
            refused[error.code] += 1
            continue
        if isinstance(candidate, str):
            refused[candidate] += 1
        elif candidate.text in seen:
            refused["same"] += 1
        else:
            seen.add(candidate.text)
            found.append(candidate)
            _write(candidate)
    return Draw(tuple(found), refused)


def _tidy(drawn: dict[str, Any], sites: Sequence[str]) -> dict[str, Any]:
    """The same with what most sites hold as `attention`, and an override for each of the others."""
    holds = dict.fromkeys(sites, drawn["attention"])
    for override in drawn.pop("overrides", ()):
        holds |= dict.fromkeys(fnmatch.filter(sites, override["at"]), override["put"])
    said = [json.dumps(spec) for spec in holds.values() if spec is not None]
    drawn["attention"] = json.loads(Counter(said).most_common(1)[0][0]) if said else drawn["attention"]
    others = [{"at": site, "put": spec} for site, spec in holds.items() if spec != drawn["attention"]]
    return drawn | ({"overrides": others} if others else {})


def _settings(cls: Any) -> Sequence[dict[str, Any]]:
    """Options without numbers, which the zoo's checks draw too small to be of use."""
    every = settings_of(cls)
    return [one for one in every if not any(type(v) in (int, float) for v in one.values())] or every[:1]


def _candidate(
    name: str, said: dict[str, Any], target: Cost, budget: Budget | None, folder: Path
) -> Candidate | str:
    """A drawn recipe as a candidate, or why it is none."""
    tree = {"recipe": 1, "name": name} | said

    def edited(edits: Sequence[str]) -> Loaded:
        return load(tree, edits)

    loaded = edited(())
    if resolve(loaded).given:
        return "given"
    spent = cost(loaded) if budget is None else None
    if budget is not None:
        met = match(target, budget, edited)
        if met.after is None:
            return "budget"
        loaded, spent = edited(met.edits), met.after
    assert spent is not None
    return Candidate(name, _words(loaded), loaded, spent, folder / "runs" / name)


def _words(loaded: Loaded) -> str:
    """What is put where: `mean(softmax, soft); blocks.1: fourier; skip: merged`."""
    composition = resolve(loaded)
    plans = {site: str(plan) for site, plan in composition.plans.items()}
    usual = Counter(plans.values()).most_common(1)[0][0]
    others = [f"{site}: {text}" for site, text in plans.items() if text != usual]
    skip = [f"skip: {composition.skip.use}"] if composition.skip else []
    pool = [f"pool: {composition.pool}"] if composition.pool else []
    return "; ".join([usual, *others, *skip, *pool])


def _write(candidate: Candidate) -> None:
    """The recipe as a file, so that every verb takes it."""
    import yaml

    candidate.file.parent.mkdir(parents=True, exist_ok=True)
    tree = json.loads(candidate.loaded.text)  # of plain types
    replace(candidate.file, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100))


def _run(candidate: Candidate) -> tuple[str, str]:
    """One run, on one thread; its name, and why it failed."""
    torch.set_num_threads(1)
    try:
        train(candidate.loaded, settings_for(candidate.loaded), candidate.folder)
    except RunError as error:
        return candidate.name, error.diagnostics[0].message
    return candidate.name, ""


def _finished(candidate: Candidate) -> bool:
    try:
        run = open_run(candidate.folder)
    except RunError:
        return False
    same = run.settings.decisive() == settings_for(candidate.loaded).decisive()
    return same and bool(run.summary()["finished"])


def rank(
    candidates: Sequence[Candidate],
    *,
    workers: int = 1,
    report: Callable[[str, int, int], None] | None = None,
) -> list[Ranked]:
    """Train what has not been trained yet, and put the best first. Interrupted runs go on.

    Args:
        candidates: From `draw`.
        workers: Processes side by side, one thread each.
        report: Told the name, the number of runs done and of all runs.
    """
    waiting = [candidate for candidate in candidates if not _finished(candidate)]
    engine: Iterator[tuple[str, str]] = (
        in_processes(_run, waiting, workers=workers) if workers > 1 and waiting else map(_run, waiting)
    )
    failures, done = {}, len(candidates) - len(waiting)
    for name, failure in engine:
        done += 1
        failures[name] = failure
        if report:
            report(name, done, len(candidates))
    ranked = [_ranked(candidate, failures.get(candidate.name, "")) for candidate in candidates]
    return sorted(ranked, key=lambda one: -1.0 if one.last is None else one.last, reverse=True)


def _ranked(candidate: Candidate, failure: str) -> Ranked:
    if failure:
        return Ranked(candidate, None, None, failure)
    summary = open_run(candidate.folder).summary()
    return Ranked(candidate, summary["best_accuracy"], summary["last_accuracy"])


def write_table(ranked: Sequence[Ranked], file: Path) -> None:
    """The ranking as a CSV.

    Args:
        ranked: Best first.
        file: Where.
    """
    with file.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(
            ["rank", "recipe", "last_accuracy", "best_accuracy", "params", "flops", "text", "failure"]
        )
        for place, one in enumerate(ranked, 1):
            spent = one.candidate.cost
            rows.writerow(
                [
                    place,
                    one.candidate.name,
                    one.last,
                    one.best,
                    spent.params,
                    spent.flops,
                    one.candidate.text,
                    one.failure,
                ]
            )
