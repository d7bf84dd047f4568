"""Ten faults are put into every mechanism and pool, without knowing it, and somebody must notice.

While the one method of maths runs, certain calls of torch do something else, or its arguments are others; or the class, or
the cache, is wrong. A fault applies where it changes what is seen in some drawn case; otherwise there is a dash. It must be
noticed by a check of the conformance suite (`law`) or else by the oracle of the mechanism's test file (`oracle`), in as many
scenes as in the default tier, and in the words of a claim: what merely crashes was not noticed. Where a fault has several
versions all must be (`both`: some by a law, the others by the oracle). The table is printed under `pytest -s`, and by

    PYTHONPATH=. python tests/test_core_mutants.py [NAME ...]
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any
from unittest.mock import patch

import pytest
import torch
from by_hand import wrong
from hypothesis import HealthCheck, Phase, given, reject, settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnzoo import load_zoo
from attnzoo.core import Head, KVCache, Layout, Mask, Mechanism, Pool, watch
from attnzoo.errors import RecipeError
from attnzoo.testing import CHECKS
from attnzoo.testing.oracle import Case, cases
from attnzoo.testing.runner import checks_for, requirement, run_check
from attnzoo.testing.strategies import settings_of

COMPONENTS = {e.name: e.value for e in load_zoo().mechanisms.values() if e.plugin == "attnzoo"}
QUICK = ("softmax", "linformer", "additive", "large_kernel")
"""Those of the default tier: a fused kernel, slots, scores by a network, no weights at all."""
SCENES = 100
"""In how many cases a fault may show that it changes something."""
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


def around(cls: type, fault: Callable[..., Any]) -> type:
    """The class whose maths is `fault(right, self, args, mask)`, where `right(*args, mask=mask)` is what it should be."""
    maths = next(
        n for base, n in ((Head, "attend"), (Mechanism, "mix"), (Pool, "pool")) if issubclass(cls, base)
    )
    method = getattr(cls, maths)

    @wraps(method)
    def changed(self, *args, mask, **where):
        return fault(lambda *args, mask: method(self, *args, mask=mask, **where), self, args, mask)

    return wrong(cls, **{maths: changed})


def calling(*changes: Change) -> Callable[[type], list[type]]:
    """Makes of a class those in whose maths calls of torch are changed: one for each change."""

    def version(cls: type, change: Change) -> type:
        def fault(right, self, args, mask):
            with Changed(change):
                return right(*args, mask=mask)

        return around(cls, fault)

    return lambda cls: [version(cls, change) for change in changes]


def building(cls: type, change: Callable[[Any], None]) -> type:
    """The class whose instances are changed once they are built."""
    method = cls.__init__

    @wraps(method)
    def init(self, *args, **options):
        method(self, *args, **options)
        change(self)

    return wrong(cls, __init__=init)


# Calls that are changed

FUSED = "scaled_dot_product_attention"
TIMES = ("mul", "rmul", "imul", "div", "truediv", "itruediv")
NORMALISES = ("softmax", "log_softmax", "cumsum", "logcumsumexp", "normalize", FUSED)
SUMS = ("sum", "mean", "logsumexp")
POOLS = ("avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
MIXES = (*POOLS, "conv1d", "conv2d", "conv3d", "fft_fft2", "fft_irfft2")


def unscaled(name, func, args, kwargs):
    """Nothing is multiplied by or divided by a real number."""
    if name == FUSED:
        return func(*args, **kwargs, scale=1.0)
    return args[0] if name in TIMES and isinstance(args[1], float) else None


def attention(dim, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """PyTorch's fused kernel in the open, with a softmax over any axis."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    allowed = torch.ones_like(scores, dtype=torch.bool).tril() if is_causal else attn_mask
    if allowed is not None and allowed.dtype != torch.bool:  # a bias, which hides by -∞
        scores, allowed = scores + allowed.clamp(min=-1e9), None
    scores = scores if allowed is None else scores.masked_fill(~allowed, -1e9)
    return F.dropout(scores.softmax(dim), dropout_p) @ v


def second(args, kwargs, name, default=None):
    """An argument that is the second, or has a name."""
    return kwargs.get(name, args[1] if len(args) > 1 else default)


def over(dim, func, args, kwargs):
    """The call over another axis."""
    return func(args[0], *args[2:], **kwargs | {"dim": dim})


def other_axis(*which: str) -> Change:
    """Over a neighbour of the axis, never the batch; a sum then tells its numbers again or drops some, to fit."""

    def change(name, func, args, kwargs):
        if name not in which:
            return None
        if name == FUSED:
            return attention(-2, *args, **kwargs)
        if name == "conv2d":  # rows for columns
            square = args[1].shape[-1] == args[1].shape[-2]
            return func(args[0], args[1].mT, *args[2:], **kwargs) if square else None
        dim, ndim = second(args, kwargs, "dim"), args[0].ndim
        if not isinstance(dim, int) or ndim < 3:
            return None
        dim %= ndim
        out = over(dim - 1 if dim > 1 else 2, func, args, kwargs)
        for axis, size in enumerate(func(*args, **kwargs).shape):
            out = out.index_select(axis, torch.arange(size) % out.shape[axis])
        return out

    return change


def over_batch(*which: str) -> Change:
    """Samples are normalised over the batch, or what they are added up to is the mean of all."""

    def change(name, func, args, kwargs):
        if name not in which:
            return None
        if name in NORMALISES:
            return attention(0, *args, **kwargs) if name == FUSED else over(0, func, args, kwargs)
        out = func(*args, **kwargs)
        if out.ndim and out.shape[0] == args[0].shape[0] and (out.is_floating_point() or out.is_complex()):
            return out.mean(dim=0, keepdim=True).expand_as(out).clone()
        return None

    return change


def one_later(name, func, args, kwargs):
    """What is about tokens so far sees one more."""
    if name == FUSED and kwargs.get("is_causal"):
        seen = torch.ones(args[0].shape[2], args[1].shape[2], dtype=torch.bool).tril(1)
        return func(*args, attn_mask=seen, dropout_p=kwargs["dropout_p"])
    if name in ("tril", "triu"):
        return func(args[0], second(args, kwargs, "diagonal", 0) + 1)
    if name in ("cumsum", "logcumsumexp"):
        dim, out = second(args, kwargs, "dim"), func(*args, **kwargs)
        return out.index_select(dim, torch.arange(1, out.shape[dim] + 1).clamp(max=out.shape[dim] - 1))
    if name in ("le", "lt") and all(isinstance(t, Tensor) and t.dtype == torch.int64 for t in args):
        return func(args[0], args[1] + 1)
    return None


def undropped(name, func, args, kwargs):
    """No dropout."""
    if name == FUSED:
        return func(*args, **kwargs | {"dropout_p": 0.0})
    return args[0] if name == "dropout" else None


# Versions of a class


def swapped(cls: type) -> list[type]:
    """Queries and keys exchanged: arguments of a head, parts of one projection, two projections, or sides of a product."""

    def fault(right, self, args, mask):
        if isinstance(self, Head):
            q, k, v = args
            return right(*((k, q, v) if q.shape == k.shape else args), mask=mask)
        own = dict(self.named_parameters())
        threes = [id(p) for name, p in own.items() if name.endswith("qkv.weight")]
        two = [(own.get(f"{q}.weight"), own.get(f"{k}.weight")) for q, k in (("q", "k"), ("query", "key"))]
        two = [(q, k) for q, k in two if q is not None and k is not None and q.shape == k.shape]
        instead = {id(a): b for q, k in two for a, b in ((q, k), (k, q))}

        def change(name, func, args, kwargs):
            if name in ("linear", "conv2d") and id(args[1]) in threes:
                dim = -1 if name == "linear" else 1
                q, k, *rest = func(*args, **kwargs).chunk(3, dim=dim)
                return torch.cat([k, q, *rest], dim=dim)
            if name in ("linear", "conv2d") and id(args[1]) in instead:
                return func(args[0], instead[id(args[1])], *args[2:], **kwargs)
            if threes or instead:
                return None
            if name == FUSED and args[0].shape == args[1].shape:
                return func(args[1], args[0], *args[2:], **kwargs)
            if name == "matmul" and args[1].ndim > 1 and args[1].stride(-1) != 1:  # by what was transposed
                return args[1].mT @ args[0].mT if args[0].shape == args[1].mT.shape else None
            return None

        with Changed(change):
            return right(*args, mask=mask)

    return [around(cls, fault)]


def inverted(cls: type) -> list[type]:
    """Who may attend may not, and the other way round; `causal` has a fault of its own."""

    def fault(right, self, args, mask):
        keys, pairs = (None if part is None else ~part for part in (mask.keys, mask.pairs))
        return right(*args, mask=Mask(keys, pairs, mask.causal))

    return [around(cls, fault)]


def late(cls: type) -> list[type]:
    """Under a causal mask everybody sees one token of the future."""

    def fault(right, self, args, mask):
        with Changed(one_later) if mask.causal else nullcontext():
            return right(*args, mask=mask)

    return [around(cls, fault)]


def without_dropout(cls: type) -> list[type]:
    """Weights are not dropped; what comes out is not, which for a head is not its own affair."""
    kept = building(cls, lambda self: setattr(self, "proj_drop", nn.Identity()))
    return calling(undropped)(cls) + ([] if issubclass(cls, Head) else [kept])


def only_shown(cls: type) -> list[type]:
    """A tap shows its tensor, and what a hook gives back is forgotten: one version for each tap."""

    def ignoring(name: str) -> type:
        def fault(right, self, args, mask):
            tap = getattr(self, name, None)
            if tap is None or not tap.watched:
                return right(*args, mask=mask)
            last = tap.register_forward_hook(lambda module, shown, out: shown[0])
            try:
                return right(*args, mask=mask)
            finally:
                last.remove()

        return around(cls, fault)

    return [ignoring(name) for name in {tap: 0 for o in settings_of(cls) for tap in cls.card_for(**o).taps}]


def unregistered(cls: type) -> list[type]:
    """The last parameter is a plain attribute."""

    def forget(self):
        for name, parameter in list(self.named_parameters())[-1:]:
            path, _, own = name.rpartition(".")
            module = self.get_submodule(path)
            del module._parameters[own]
            vars(module)[own] = parameter.detach().requires_grad_()

    return [building(cls, forget)]


# Wrong caches

extend, select = KVCache.extend, KVCache.select


def once_more(self, *new):
    """It is a step behind: what it got the last time is appended again."""
    before, self.before = getattr(self, "before", new), new
    return extend(self, *(before if [t.shape for t in before] == [t.shape for t in new] else new))


def in_order(self, rows, kept=True):
    """Its samples stay where they are."""
    select(self, torch.arange(len(rows)) % (int(rows.max()) + 1), kept)


# What a fault may change


def output(case: Case) -> Tensor:
    """What comes out: under masks, with a context, watched or not, as it was drawn."""
    return case._found(case.build(), case.tensors(), case.mask())


def trained(case: Case) -> Tensor:
    """What comes out in training mode, with dropout."""
    site = replace(case.scene.site, attn_drop=0.5, proj_drop=0.5)
    component = replace(case, scene=replace(case.scene, site=site)).build().train()
    torch.manual_seed(case.scene.seed)
    return case._found(component, case.tensors(), case.mask())


def reached_into(case: Case) -> Tensor:
    """What comes out where taps are given other numbers."""
    component, random = case.build(), case.scene.generator(80)
    with watch(component, None, lambda name, seen: seen + torch.rand(seen.shape, generator=random)):
        return case._found(component, case.tensors(), case.mask())


def stepped(case: Case) -> Tensor:
    """What comes out token by token, with samples exchanged on the way, where the card says that this can be."""
    scene = replace(case.scene, batch=2).with_layout((4,), 0)
    checks = [CHECKS[f"check_{name}"] for name in ("incremental", "step_with_context")]
    causal, across = (requirement(check).fits(scene.card, scene.options) for check in checks)
    if issubclass(scene.component, Pool) or not (causal or across):
        return torch.zeros(0)
    try:
        scene = scene if causal else scene.across()
        component = scene.build()
    except RecipeError:  # these widths do not go together
        return torch.zeros(0)
    cache, rows, order, (x, *context) = KVCache(), [], torch.arange(2), scene.inputs()
    for i in range(4):
        piece, read = x[order, i : i + 1], [c[order] for c in context]
        rows.append(component.step(piece, cache, *read, mask=Mask(causal=causal), layout=Layout((i + 1,))))
        if i == 1:
            order = order.flip(0)
            cache.select(order)
    return torch.cat(rows, dim=1)


def names(case: Case) -> list[str]:
    """What the state dict holds."""
    return list(case.build().state_dict())


# The table


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Args:
        versions: Of a class, the wrong ones.
        checks: Those of the suite that are likely to notice, without `check_`.
        seen: What it may change.
        patches: What else is wrong meanwhile, one after the other.
        oracle: Whether the oracle is asked; it knows nothing of training, taps, caches and state dicts.
    """

    versions: Callable[[type], list[type]]
    checks: tuple[str, ...] = ()
    seen: Callable[[Case], Any] = output
    patches: tuple[Callable[[], AbstractContextManager], ...] = (nullcontext,)
    oracle: bool = True


STALE = [
    lambda: patch.object(KVCache, "extend", once_more),
    lambda: patch.object(KVCache, "select", in_order),
]
MUTANTS = {
    "scale": Mutant(calling(unscaled)),
    "q for k": Mutant(swapped),
    "axis": Mutant(calling(other_axis(*NORMALISES), other_axis(*SUMS), other_axis("conv2d")), ("stochastic",)),
    "batch": Mutant(calling(*(over_batch(*one) for one in (NORMALISES, SUMS, MIXES))), ("batch_independent",)),
    "mask": Mutant(inverted, ("padding_invisible", "full_keys_change_nothing", "forbidden_pairs")),
    "causal": Mutant(late, ("causality",)),
    "dropout": Mutant(without_dropout, ("attn_drop", "proj_drop"), trained, oracle=False),
    "tap": Mutant(only_shown, ("taps_live", "every_weight_is_used"), reached_into, oracle=False),
    "cache": Mutant(lambda cls: [cls], ("incremental", "step_with_context", "cache_selected"), stepped, tuple(STALE), False),
    "state": Mutant(unregistered, ("tensors_registered",), names, oracle=False),
}  # fmt: skip


@cache
def drawn(cls: type) -> list[Case]:
    """The cases in which a fault may show that it changes something."""
    found: list[Case] = []

    @settings(max_examples=SCENES, phases=[Phase.generate], derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(cases(cls))
    def draw(case: Case) -> None:
        try:
            case.build()
        except RecipeError:  # options and sites that do not go together
            reject()
        found.append(case)

    draw()
    return found


@cache
def expected(cls: type, seen: Callable[[Case], Any], i: int) -> Any:
    """What is seen in the i-th case where nothing is wrong."""
    return seen(drawn(cls)[i])


def differ(a: Any, b: Any) -> bool:
    """Whether two things that were seen are not the same, beyond rounding."""
    if not isinstance(a, Tensor):
        return a != b
    return a.shape != b.shape or not torch.allclose(a, b, rtol=1e-6, atol=1e-8, equal_nan=True)


@torch.no_grad()
def applies(cls: type, version: type, mutant: Mutant, patched: Callable[[], AbstractContextManager]) -> bool:
    """Whether the fault changes anything in some case."""
    for i, case in enumerate(drawn(cls)):
        right = expected(cls, mutant.seen, i)
        with patched():
            if differ(mutant.seen(replace(case, scene=replace(case.scene, component=version))), right):
                return True
    return False


def noticed_by(name: str, version: type, mutant: Mutant) -> str:
    """`law`, `oracle`, or `SURVIVED`."""
    checks = [CHECKS[f"check_{check}"] for check in mutant.checks]
    for check in [check for check in checks if check in checks_for(version)]:
        if run_check(version, check, shrink=False).reason.startswith("claimed: "):
            return "law"
    if mutant.oracle:
        tests = vars(importlib.import_module(f"mechanisms.test_{name}")).values()
        for test in [t for t in tests if getattr(t, "component", None) is COMPONENTS[name]]:
            if test.compare(version, shrink=False).reason.startswith("claimed: "):
                return "oracle"
    return "SURVIVED"


def row(name: str) -> list[str]:
    """Who notices each fault of a mechanism; a dash where it changes nothing."""
    cls, cells = COMPONENTS[name], []
    for mutant in MUTANTS.values():
        by = set()
        for version in mutant.versions(cls):
            for patched in mutant.patches:
                if applies(cls, version, mutant, patched):
                    with patched():
                        by.add(noticed_by(name, version, mutant))
        cells.append("SURVIVED" if "SURVIVED" in by else "both" if len(by) > 1 else "".join(by) or "–")
    return cells


def line(name: str, cells: list[str]) -> str:
    """A line of the table: mechanisms down, faults across."""
    return f"{name:22}" + "".join(f"{cell:9}" for cell in cells).rstrip()


ROWS: dict[str, list[str]] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Printed when all that were asked for have been tried."""
    yield
    print("", line("", list(MUTANTS)), *(line(*one) for one in ROWS.items()), sep="\n")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in COMPONENTS]
)
@pytest.mark.sample(2)
def test_somebody_notices(name):
    ROWS[name] = row(name)
    assert "SURVIVED" not in ROWS[name], f"\n{line('', list(MUTANTS))}\n{line(name, ROWS[name])}"


def test_a_fault_that_changes_nothing_does_not_apply():
    (version,) = calling(lambda name, func, args, kwargs: None)(COMPONENTS["linformer"])
    assert not applies(COMPONENTS["linformer"], version, Mutant(swapped), nullcontext)


def test_a_fault_that_nobody_looks_for_survives():
    fault = Mutant(calling(unscaled), ("causality",), oracle=False)  # no law sees a scale
    (version,) = fault.versions(COMPONENTS["softmax"])
    assert applies(COMPONENTS["softmax"], version, fault, nullcontext)
    assert noticed_by("softmax", version, fault) == "SURVIVED"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(line("", list(MUTANTS)))
    for name in sys.argv[1:] or COMPONENTS:
        print(line(name, row(name)), flush=True)
