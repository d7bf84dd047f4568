"""Equal budgets: how wide MLPs or tokens must be for as many parameters or FLOPs, or as much time, as another has."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from attnzoo.bench.cost import flops
from attnzoo.errors import RecipeError
from attnzoo.hosts.given import stand_ins, taken
from attnzoo.hosts.info import BackboneInfo, unallocated
from attnzoo.recipe import Loaded, build, resolve
from attnzoo.recipe.origin import stages
from attnzoo.recipe.schema import PyramidHost, Seq2SeqHost, SequenceHost

Budget = Literal["params", "flops", "time"]
Knob = Literal["mlp", "width"]
"""What is made wider or narrower: MLPs alone, or tokens first and then MLPs."""
NEAR = {"params": 0.01, "flops": 0.01, "time": 0.05}
"""How far from the budget a match may end, as a share; time is measured, and noisy."""
WIDEST = 16
"""MLPs are at most so many times as wide as the tokens."""


@dataclass(frozen=True)
class Cost:
    """What a recipe costs.

    Args:
        params: Parameters.
        flops: FLOPs of one forward on one sample, two per multiply-add.
        seconds: Of a forward on eight samples, median; None when it was not measured.
    """

    params: int
    flops: int
    seconds: float | None = None

    def of(self, budget: Budget) -> float:
        """The quantity that a budget is about."""
        found = {"params": self.params, "flops": self.flops, "time": self.seconds}[budget]
        assert found is not None
        return float(found)


@dataclass(frozen=True)
class Match:
    """What must be changed for a recipe to meet a budget.

    Args:
        edits: As for `--set`; empty when it meets the budget as it is.
        before: Its cost without them.
        after: Its cost with them; None when there is no way.
        reason: Why there is no way; empty when there is.
    """

    edits: tuple[str, ...]
    before: Cost
    after: Cost | None
    reason: str = ""


def cost(loaded: Loaded, timed: bool = False) -> Cost:
    """Parameters and FLOPs, counted without allocating anything, and perhaps time.

    Args:
        loaded: The recipe.
        timed: Whether forwards on this machine are timed.
    """
    info = resolve(loaded).info
    with unallocated():
        model = build(loaded)
        sample = info.sample()
        maps = stand_ins(sample[0], taken(model)) if isinstance(info, BackboneInfo) else {}
    counted = flops(model, sample, maps)[""]
    params = sum(p.numel() for p in model.parameters())
    return Cost(params, counted, _seconds(loaded) if timed else None)


def _seconds(loaded: Loaded, rounds: int = 9) -> float:
    info, model = resolve(loaded).info, build(loaded).eval()
    sample = [torch.cat([t] * 8) for t in info.sample()]
    maps = stand_ins(sample[0], taken(model)) if isinstance(info, BackboneInfo) else {}
    times = []
    with torch.inference_mode():
        for _ in range(rounds + 2):
            began = time.perf_counter()
            model(*sample, **maps)
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def match(target: Cost, budget: Budget, recipe: Callable[[Sequence[str]], Loaded]) -> Match:
    """Make MLPs wider or narrower, in whole channels, until a recipe meets a budget.

    Parameters and FLOPs are linear in the width of the MLPs, so two counts give the width; of time the same is taken to
    hold, and measured again.

    Args:
        target: What is to be met.
        budget: Which of its quantities.
        recipe: The recipe with further edits.
    """
    timed = budget == "time"
    plain = recipe(())
    before = cost(plain, timed)
    wanted, near = target.of(budget), NEAR[budget]
    if abs(before.of(budget) / wanted - 1) <= (0 if budget != "time" else near):
        return Match((), before, before)
    dims = _dims(plain)
    if not any(dims):
        return Match((), before, None, "it has no MLPs that could be made wider")
    one, two = (cost(recipe(_edits(plain, dims, factor)), timed).of(budget) for factor in (1.0, 2.0))
    if two <= one:
        return Match((), before, None, f"wider MLPs do not change its {_words(budget)}")
    factor = 1 + (wanted - one) / (two - one)
    if not 1 / max(dims) <= factor <= WIDEST:
        least = (
            "without MLPs it has" if factor < 1 else f"with MLPs {WIDEST} times as wide as the tokens it has"
        )
        reach = 2 * one - two if factor < 1 else one + (WIDEST - 1) * (two - one)
        return Match((), before, None, f"{least} {_figure(reach, budget)}")
    edits = _edits(plain, dims, factor)
    after = cost(recipe(edits), timed)
    if abs(after.of(budget) / wanted - 1) > near:
        share = after.of(budget) / wanted - 1
        return Match((), before, None, f"the nearest width is {share:+.1%} from it")
    return Match(edits, before, after) if after != before else Match((), before, before)


def match_width(target: Cost, budget: Budget, recipe: Callable[[Sequence[str]], Loaded]) -> Match:
    """Make tokens wider or narrower, heads kept, until a recipe nearly meets a budget; MLPs do the rest.

    Args:
        target: What is to be met.
        budget: Which of its quantities.
        recipe: The recipe with further edits.
    """
    timed, wanted = budget == "time", target.of(budget)
    plain = recipe(())
    before, widths = cost(plain, timed), _widths(plain)
    dim, step = widths[0]

    @cache
    def at(k: int) -> float:
        return cost(recipe(_width_edits(plain, widths, k)), timed).of(budget)

    try:
        low, high = 1, max(2, WIDEST * dim // step)
        while low < high:  # the widest that costs no more
            middle = (low + high + 1) // 2
            low, high = (middle, high) if at(middle) <= wanted else (low, middle - 1)
        for k in sorted((low, low + 1), key=lambda k: abs(at(k) / wanted - 1)):
            edits = _width_edits(plain, widths, k)
            met = match(target, budget, lambda more, edits=edits: recipe((*edits, *more)))
            near = abs(at(k) / wanted - 1) <= NEAR[budget]
            if met.after is not None or near:
                more = met.edits if met.after is not None else ()
                return Match((*edits, *more), before, met.after or met.before)
    except RecipeError as error:
        return Match((), before, None, error.diagnostics[0].message)
    return Match(
        (), before, None, f"{met.reason}, with tokens of {low * step} channels and of {low * step + step}"
    )


def _widths(loaded: Loaded) -> list[tuple[int, int]]:
    """Channels of the tokens, by stage, and by what steps they change: heads and pairs of channels stay whole."""
    steps: dict[int, int] = {}
    for site in resolve(loaded).info.sites().values():
        steps[site.dim] = math.lcm(steps.get(site.dim, 4), 2 * site.heads)
    return [(dim, steps.get(dim, 4)) for dim in _channels(loaded)]


def _channels(loaded: Loaded) -> list[int]:
    info = resolve(loaded).info
    return [stage.channels for stage in stages(info)] or [info.dim]


def _width_edits(loaded: Loaded, widths: Sequence[tuple[int, int]], k: int) -> tuple[str, ...]:
    """Edits that make the tokens k steps wide, and those of other stages in proportion."""
    factor = k * widths[0][1] / widths[0][0]
    dims = [max(1, round(factor * dim / step)) * step for dim, step in widths]
    host = loaded.recipe.host
    if isinstance(host, Seq2SeqHost | SequenceHost):
        return (f"host.dim={dims[0]}", f"host.mlp_dim={max(1, round(factor * host.mlp_dim))}")
    if isinstance(host, PyramidHost):
        return (f"host.model.dims={dims}",)
    return (f"host.model.embed_dim={dims[0]}",)


def _words(budget: Budget) -> str:
    return {"params": "parameters", "flops": "FLOPs", "time": "seconds"}[budget]


def _figure(value: float, budget: Budget) -> str:
    return f"{value:.3g} seconds" if budget == "time" else f"{value:,.0f}"


def _dims(loaded: Loaded) -> list[int]:
    """Widths of the tokens, by stage; 0 for a stage without MLPs."""
    info: Any = resolve(loaded).info
    found = stages(info)
    return [stage.channels * stage.mlp for stage in found] if found else [info.dim]


def _edits(loaded: Loaded, dims: Sequence[int], factor: float) -> tuple[str, ...]:
    """Edits that make MLPs so many times as wide as the tokens, in whole channels."""
    host = loaded.recipe.host
    if isinstance(host, Seq2SeqHost | SequenceHost):
        return (f"host.mlp_dim={max(1, round(factor * dims[0]))}",)
    # what hosts make of a ratio is int(dim * ratio): rounded up a little, it is the channels that are meant
    ratios = [dim and math.ceil(max(1, round(factor * dim)) / dim * 1e6) / 1e6 for dim in dims]
    if isinstance(host, PyramidHost):
        return (f"host.model.mlp_ratios=[{', '.join(map(str, ratios))}]",)
    return (f"host.model.mlp_ratio={ratios[0]}",)


def matched(
    recipes: Sequence[str],
    budget: Budget,
    load: Callable[[str, Sequence[str]], Loaded],
    by: Knob = "mlp",
) -> dict[str, Match]:
    """What must be changed for all recipes to meet the budget of the first.

    Args:
        recipes: Names or files; the first stays as it is.
        budget: The quantity.
        load: A recipe with further edits.
        by: What is changed.

    Raises:
        RecipeError: AZ325, with all recipes that cannot be matched and why.
    """
    first, *others = recipes
    target = cost(load(first, ()), budget == "time")
    found = {first: Match((), target, target)}
    for name in others:
        solve = match if by == "mlp" else match_width
        found[name] = solve(target, budget, lambda edits, name=name: load(name, edits))
    faults = [
        RecipeError(
            "AZ325",
            f"`{name}` cannot have as many {_words(budget)} as `{first}`, "
            f"{_figure(target.of(budget), budget)}: {one.reason}",
            help="--by width changes its tokens too"
            if by == "mlp"
            else "compare it with a smaller or larger recipe",
        ).diagnostics[0]
        for name, one in found.items()
        if one.after is None
    ]
    if faults:
        raise RecipeError.of(faults)
    return found
