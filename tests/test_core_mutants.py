"""Faults that the core or any mechanism could have are put into every mechanism and pool, and somebody must notice.

Ten faults, made without knowing the mechanism: while its one method of maths runs, certain calls of torch do something
else, or its arguments are others. A fault applies where it changes what comes out in some drawn scene. Then a check of
the conformance suite must fail (`law`), or else the mechanism's own oracle (`oracle`). Printed as a table, with `-s` or by

    python tests/test_core_mutants.py [NAME ...]
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any
from unittest.mock import patch

import pytest
import torch
from by_hand import wrong
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnzoo import load_zoo
from attnzoo.core import Component, Head, KVCache, Layout, Mask, Mechanism, Pool, watch
from attnzoo.errors import ZooError
from attnzoo.testing import CHECKS
from attnzoo.testing.oracle import Case, cases
from attnzoo.testing.runner import checks_for, run_check
from attnzoo.testing.strategies import settings_of

COMPONENTS = {e.name: e.value for e in load_zoo().mechanisms.values() if e.plugin == "attnzoo"}
QUICK = ("softmax", "linformer", "additive", "large_kernel")
"""Those of the default tier: a fused kernel, slots, a small network, no weights at all."""
SCENES = 40
"""In how many it is looked for whether a fault changes anything."""
Change = Callable[[str, Callable, tuple, dict], Tensor | None]
"""What a call of torch gives instead, from its name, the function and its arguments; None where it stays as it is."""


class Changed(TorchFunctionMode):
    """While it is entered, calls of torch are changed."""

    def __init__(self, change: Change):
        super().__init__()
        self.change = change

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self.change(getattr(func, "__name__", "").strip("_"), func, args, kwargs)
        return func(*args, **kwargs) if out is None else out


def maths(cls: type) -> str:
    """The name of the one method of maths."""
    return next(n for base, n in ((Head, "attend"), (Mechanism, "mix"), (Pool, "pool")) if issubclass(cls, base))


def around(cls: type, fault: Callable[..., Any]) -> type:
    """The class whose maths is `fault(right, self, args, mask, where)`, right being the bound method."""
    right = getattr(cls, maths(cls))

    @wraps(right)
    def method(self, *args, mask, **where):
        return fault(lambda *a, **w: right(self, *a, **w), self, args, mask, where)

    return wrong(cls, **{maths(cls): method})


def calling(cls: type, change: Change, when: Callable[[Mask], bool] = lambda mask: True) -> list[type]:
    """The class in whose maths calls of torch are changed."""

    def fault(right, self, args, mask, where):
        with Changed(change) if when(mask) else nullcontext():
            return right(*args, mask=mask, **where)

    return [around(cls, fault)]


# Calls that are changed

NORMALISES = ("softmax", "log_softmax", "cumsum", "logcumsumexp", "normalize")
REDUCES = ("sum", "mean", "logsumexp")
POOLS = ("avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
TIMES = ("mul", "rmul", "imul", "div", "truediv", "itruediv")


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, dim=-1):
    """PyTorch's fused kernel in the open, with a softmax over any axis."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    allowed = torch.ones_like(scores, dtype=torch.bool).tril() if is_causal else attn_mask
    scores = scores if allowed is None else scores.masked_fill(~allowed, -1e9)
    return F.dropout(scores.softmax(dim), dropout_p) @ v


def unscaled(name, func, args, kwargs):
    """Nothing is multiplied by or divided by a real number."""
    if name == "scaled_dot_product_attention":
        return func(*args, **kwargs, scale=1.0)
    return args[0] if name in TIMES and isinstance(args[1], float) else None


def axis_of(args, kwargs):
    """Over what a call goes; None where it does not say so."""
    return kwargs.get("dim", args[1] if len(args) > 1 else None)


def over(func, args, kwargs, dim):
    """The call over another axis."""
    return func(args[0], *args[2:], **kwargs | {"dim": dim})


def other_axis(name, func, args, kwargs):
    """The neighbour of the axis, which is not the batch; a sum only where as many are added up."""
    if name == "scaled_dot_product_attention":
        return attention(*args, **kwargs, dim=-2)
    dim = axis_of(args, kwargs)
    if name not in NORMALISES + REDUCES or not isinstance(dim, int) or args[0].ndim < 3:
        return None
    dim %= args[0].ndim
    other = dim - 1 if dim > 1 else 2
    if name in NORMALISES or args[0].shape[dim] == args[0].shape[other]:
        return over(func, args, kwargs, other)
    return None


def over_batch(name, func, args, kwargs):
    """The samples are normalised or averaged with the rest."""
    if name == "scaled_dot_product_attention":
        return attention(*args, **kwargs, dim=0)
    if name in NORMALISES:
        return over(func, args, kwargs, 0)
    if name in REDUCES + POOLS:
        out = func(*args, **kwargs)
        if out.ndim and out.is_floating_point() and out.shape[0] == args[0].shape[0]:
            return out.mean(dim=0, keepdim=True).expand_as(out)
    return None


def one_later(name, func, args, kwargs):
    """What is about the past sees one token more; for what is done under a causal mask."""
    if name == "scaled_dot_product_attention" and kwargs.get("is_causal"):
        q, k, v = args
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
        return func(q, k, v, attn_mask=seen, dropout_p=kwargs["dropout_p"])
    if name in ("tril", "triu"):
        return func(args[0], axis_of(args, {"dim": kwargs["diagonal"]} if kwargs else {}) + 1)
    if name in ("cumsum", "logcumsumexp"):
        dim, size = axis_of(args, kwargs), args[0].shape[axis_of(args, kwargs)]
        return func(*args, **kwargs).index_select(dim, torch.arange(1, size + 1).clamp(max=size - 1))
    if name in ("le", "lt") and all(isinstance(t, Tensor) and t.dtype == torch.int64 for t in args):
        return func(args[0], args[1] + 1)
    return None


def undropped(name, func, args, kwargs):
    """No dropout."""
    if name == "scaled_dot_product_attention":
        return func(*args, **kwargs | {"dropout_p": 0.0})
    return args[0] if name == "dropout" else None


# Mutants: of a class, its wrong versions, all of which must be noticed


def swapped(cls: type) -> list[type]:
    """Queries and keys exchanged: as arguments, as rows of one projection, as projections, or where they are compared."""

    def fault(right, self, args, mask, where):
        if isinstance(self, Head):
            q, k, v = args
            return right(*((k, q, v) if q.shape == k.shape else args), mask=mask, **where)
        own = dict(self.named_parameters())
        threes = [p for name, p in own.items() if name.endswith("qkv.weight")]
        pairs = [(own.get(f"{a}.weight"), own.get(f"{b}.weight")) for a, b in (("q", "k"), ("query", "key"))]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None and a.shape == b.shape]

        def change(name, func, args, kwargs):
            if threes or pairs:
                if name not in ("linear", "conv1d", "conv2d"):
                    return None
                if any(args[1] is three for three in threes):
                    axis = -1 if name == "linear" else 1
                    first, second, *rest = func(*args, **kwargs).chunk(3, dim=axis)
                    return torch.cat([second, first, *rest], dim=axis)
                instead = [b for a, b in [*pairs, *(p[::-1] for p in pairs)] if args[1] is a]
                return func(args[0], *instead, *args[2:], **kwargs) if instead else None
            if name == "scaled_dot_product_attention" and args[0].shape == args[1].shape:
                return func(args[1], args[0], *args[2:], **kwargs)
            if name == "einsum" and len(args) == 3 and args[1].shape == args[2].shape:
                return func(args[0], args[2], args[1])
            if name == "matmul" and args[0].shape == args[1].mT.shape and args[1].stride(-1) != 1:
                return args[1].mT @ args[0].mT
            return None

        with Changed(change):
            return right(*args, mask=mask, **where)

    return [around(cls, fault)]


def inverted(cls: type) -> list[type]:
    """Who may attend may not, and the other way round; `causal` has a fault of its own."""

    def fault(right, self, args, mask, where):
        keys, pairs = (None if part is None else ~part for part in (mask.keys, mask.pairs))
        return right(*args, mask=Mask(keys, pairs, mask.causal), **where)

    return [around(cls, fault)]


def without_dropout(cls: type) -> list[type]:
    """Weights are not dropped; what comes out is not."""
    right = cls.__init__

    @wraps(right)
    def init(self, *args, **options):
        right(self, *args, **options)
        self.proj_drop = nn.Identity()

    of_weights = calling(cls, undropped)
    return of_weights if issubclass(cls, Head) else [*of_weights, wrong(cls, __init__=init)]


def only_shown(cls: type) -> list[type]:
    """A tap shows its tensor, and what a hook gives back is forgotten; one after the other."""
    taps = dict.fromkeys(tap for options in settings_of(cls) for tap in cls.card_for(**options).taps)

    def ignoring(name: str) -> type:
        def fault(right, self, args, mask, where):
            tap = getattr(self, name, None)
            if tap is None or not tap.watched:
                return right(*args, mask=mask, **where)
            last = tap.register_forward_hook(lambda module, shown, out: shown[0])
            try:
                return right(*args, mask=mask, **where)
            finally:
                last.remove()

        return around(cls, fault)

    return [ignoring(name) for name in taps]


def unregistered(cls: type) -> list[type]:
    """The last parameter is a plain attribute."""
    right = cls.__init__

    @wraps(right)
    def init(self, *args, **options):
        right(self, *args, **options)
        for name, parameter in list(self.named_parameters())[-1:]:
            path, _, own = name.rpartition(".")
            module = self.get_submodule(path)
            del module._parameters[own]
            vars(module)[own] = parameter.detach().requires_grad_()

    return [wrong(cls, __init__=init)]


extend, select = KVCache.extend, KVCache.select


def once_more(self, *new):
    """A cache that is one step behind: what the step before gave, again."""
    stale = vars(self).setdefault("stale", new)
    self.stale = new
    fits = [t.shape for t in stale] == [t.shape for t in new]
    return extend(self, *(stale if fits else new))


def in_order(self, rows, kept=True):
    """A cache whose samples stay where they are."""
    select(self, torch.arange(len(rows)) % (int(rows.max()) + 1), kept)


# What is looked at to see whether a fault changes anything


def output(case: Case) -> Tensor:
    """What comes out, under masks, with a context, watched or not, as it was drawn."""
    return case._found(case.build(), case.tensors(), case.mask())


def trained(case: Case) -> Tensor:
    """What comes out in training mode, with dropout."""
    case = replace(case, scene=replace(case.scene, site=replace(case.scene.site, attn_drop=0.5, proj_drop=0.5)))
    component = case.build().train()
    torch.manual_seed(case.scene.seed)
    return case._found(component, case.tensors(), case.mask())


def reached_into(case: Case) -> Tensor:
    """What comes out where taps are given other numbers."""
    component, random = case.build(), case.scene.generator(80)
    with watch(component, None, lambda name, seen: seen + torch.rand(seen.shape, generator=random)):
        return case._found(component, case.tensors(), case.mask())


def stepped(case: Case) -> Tensor:
    """What token by token comes out, with samples exchanged on the way, where the card says that this can be."""
    card, scene = case.scene.card, replace(case.scene, batch=2)
    line = card.grid in (None, "any", 1) and card.context_grid is None and not card.fixed_length
    scene = scene.with_layout((4,), 0).across() if card.context and line else scene.with_layout((4,), 0)
    if not line or card.given or not (card.context or "causal" in card.masks) or not issubclass(scene.component, Head | Mechanism):
        return torch.zeros(0)
    component, cache, rows = scene.build(), KVCache(), []
    (x, *context), order = scene.inputs(), torch.arange(2)
    for i in range(4):
        mask = Mask(causal="causal" in card.masks and not context)
        where = {"context_layout": scene.site.context_layout} if context else {}
        rows.append(component.step(x[order, i : i + 1], cache, *(c[order] for c in context), mask=mask, layout=Layout((i + 1,)), **where))
        if i == 1:
            order = order.flip(0)
            cache.select(order)
    return torch.cat(rows, dim=1)


def names(case: Case) -> list[str]:
    """What the state dict holds."""
    return list(case.build().state_dict())


@dataclass(frozen=True)
class Mutant:
    """A fault of the core.

    Args:
        versions: Of a class, the wrong versions of it.
        looks: What is looked at to see whether the fault changes anything.
        checks: Those that are likely to notice, without `check_`.
        patches: What is wrong outside the class meanwhile, one after the other.
        against: Whether the oracle is asked; it knows nothing of training, taps, caches and state dicts.
    """

    versions: Callable[[type], list[type]]
    looks: Callable[[Case], Any] = output
    checks: tuple[str, ...] = ()
    patches: tuple[Callable[[], AbstractContextManager], ...] = (nullcontext,)
    against: bool = True


MUTANTS = {
    "no scale": Mutant(lambda cls: calling(cls, unscaled)),
    "q for k": Mutant(swapped),
    "axis": Mutant(lambda cls: calling(cls, other_axis), checks=("stochastic",)),
    "batch": Mutant(lambda cls: calling(cls, over_batch), checks=("batch_independent",)),
    "mask": Mutant(inverted, checks=("padding_invisible", "full_keys_change_nothing", "forbidden_pairs")),
    "causal": Mutant(
        lambda cls: calling(cls, one_later, lambda mask: mask.causal), checks=("causality",)
    ),
    "dropout": Mutant(without_dropout, trained, ("attn_drop", "proj_drop"), against=False),
    "tap": Mutant(only_shown, reached_into, ("taps_live", "every_weight_is_used"), against=False),
    "cache": Mutant(
        lambda cls: [cls],
        stepped,
        ("incremental", "step_with_context", "cache_selected"),
        (lambda: patch.object(KVCache, "extend", once_more), lambda: patch.object(KVCache, "select", in_order)),
        against=False,
    ),
    "state": Mutant(unregistered, names, ("tensors_registered",), against=False),
}  # fmt: skip


@cache
def drawn(cls: type) -> list[Case]:
    """Cases in which a fault is looked for."""
    found: list[Case] = []

    @settings(max_examples=SCENES, phases=[Phase.generate], derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(cases(cls))
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


def differ(a: Any, b: Any) -> bool:
    """Whether two things that were looked at are not the same, beyond rounding."""
    if not isinstance(a, Tensor):
        return a != b
    return a.shape != b.shape or not torch.allclose(a, b, rtol=1e-6, atol=1e-8, equal_nan=True)


def applies(cls: type, version: type, mutant: Mutant, patched: Callable[[], AbstractContextManager]) -> bool:
    """Whether the fault changes what is looked at, in some case."""
    for case in drawn(cls):
        try:
            with torch.no_grad():
                right = mutant.looks(case)
        except ZooError:  # options and sites that do not go together
            continue
        with torch.no_grad(), patched():
            if differ(mutant.looks(replace(case, scene=replace(case.scene, component=version))), right):
                return True
    return False


def oracle_of(name: str) -> Any:
    """The test of a mechanism's own file that compares it with its oracle."""
    home = importlib.import_module(f"mechanisms.test_{name}")
    (found,) = (f for f in vars(home).values() if inspect.isfunction(f) and hasattr(f, "oracle"))
    return found


def killer(name: str, version: type, mutant: Mutant) -> str:
    """Who notices: `law`, `oracle`, or nobody. What fails must say so in the words of a claim, not by an exception."""
    applicable = checks_for(version)
    for check in mutant.checks:
        if CHECKS[f"check_{check}"] in applicable:
            result = run_check(version, CHECKS[f"check_{check}"], shrink=False)
            if result.status == "failed" and result.reason.startswith("claimed: "):
                return "law"
            if result.status == "failed":
                print("CRASH", name, check, result.reason)
    if mutant.against:
        result = oracle_of(name).compare(version, shrink=False)
        if result.status == "failed" and result.reason.startswith("claimed: "):
            return "oracle"
        if result.status == "failed":
            print("CRASH", name, "oracle", result.reason)
    return "SURVIVED"


def row(name: str) -> dict[str, str]:
    """Who notices each mutant of a mechanism; a dash where it changes nothing."""
    cls, cells = COMPONENTS[name], {}
    for title, mutant in MUTANTS.items():
        killers = []
        for version in mutant.versions(cls):
            for patched in mutant.patches:
                if applies(cls, version, mutant, patched):
                    with patched():
                        killers.append(killer(name, version, mutant))
        cells[title] = " ".join(sorted(set(killers), reverse=True)) or "–"
    return cells


def table(rows: dict[str, dict[str, str]]) -> str:
    """Mechanisms down, mutants across."""
    lines = [f"{'':22}" + "".join(f"{title:9}" for title in MUTANTS)]
    lines += [f"{name:22}" + "".join(f"{cell:9}" for cell in cells.values()) for name, cells in rows.items()]
    return "\n".join(lines)


ROWS: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def printed() -> Iterator[None]:
    """The table of all that were tried."""
    yield
    print(f"\n{table(ROWS)}")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in COMPONENTS]
)
def test_faults_of_the_core_are_noticed(name):
    ROWS[name] = row(name)
    assert "SURVIVED" not in " ".join(ROWS[name].values()), ROWS[name]


if __name__ == "__main__":
    import time
    torch.set_num_threads(1)
    for name in sys.argv[1:] or COMPONENTS:
        t = time.time()
        ROWS[name] = row(name)
        print(table({name: ROWS[name]}).splitlines()[1], round(time.time() - t, 1), flush=True)
    print(table(ROWS))
