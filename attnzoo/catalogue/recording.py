"""What a model does with its tokens around its mechanisms: one forward, written down while it runs.

Nothing here knows a host. The model runs once on the meta device; a module that contains mechanisms is looked into,
any other is a function, and what happens to tensors between them (sums, cuts, concatenations) is written down too. So
a norm stands where the code has it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnzoo.core import Mechanism, Pool

_SAME = {
    "chunk", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "float", "masked_fill", "movedim",
    "permute", "reshape", "repeat", "roll", "squeeze", "to", "transpose", "type_as", "unflatten", "unsqueeze", "view",
    "view_as", "dropout",
}  # fmt: skip
"""Functions of which an equation says nothing: they arrange, and do not compute."""
_OPERATORS = {
    **dict.fromkeys(["add", "iadd", "radd"], "sum"),
    "sub": "difference",
    **dict.fromkeys(["mul", "imul", "rmul"], "product"),
    **dict.fromkeys(["div", "truediv"], "quotient"),
}


@dataclass(eq=False)
class Step:
    """A value, and what made it.

    Args:
        kind: `input`, `parameter`, `number`, `sum`, `difference`, `product`, `quotient`, `concat`, `take`, `module` or
            `function`.
        name: Path of a module or parameter, name of an input or function, digits of a number, place that was taken.
        of: The values that it is made of.
        module: What made it, if a module did.
        section: Path of the block in which it was made; empty outside of any.
        shape: Of one sample.
    """

    kind: str
    name: str
    of: tuple["Step", ...]
    module: nn.Module | None
    section: str
    shape: tuple[int, ...]


def record(
    model: nn.Module, inputs: Sequence[Tensor], named: Mapping[str, Tensor], run: bool = False
) -> list[Step]:
    """The steps of one forward, in their order; what no tokens go through is left out.

    Args:
        model: On the meta device, in evaluation mode.
        inputs: What it takes, on any device; only shapes count.
        named: What it takes by name.
        run: Whether mechanisms are run, which some models ask for that look at their weights; otherwise tokens come out
            as they went in, so that code of plugins that looks at numbers has a say in nothing.
    """
    inputs = [t.to("meta") for t in inputs]
    extra = {name: t.to("meta") for name, t in named.items()}
    recorder = _Recorder(model, run)
    for i, t in enumerate(inputs):
        recorder.keep(t, "input", str(i), ())
    for name, t in extra.items():
        recorder.keep(t, "input", name, ())
    with ExitStack() as stack, torch.no_grad():
        for path, module in model.named_modules():
            stack.enter_context(recorder.watching(path, module))
        with recorder:
            model(*inputs, **extra)
    return recorder.steps


@dataclass
class _Watch:
    """Hooks of a module that go when it is left."""

    handles: list[Any] = field(default_factory=list)
    module: nn.Module | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        if self.module is not None:
            del self.module.forward  # type: ignore[attr-defined]


class _Recorder(TorchFunctionMode):
    """Writes steps down while a model runs.

    Args:
        model: That will run.
        run: Whether mechanisms do.
    """

    def __init__(self, model: nn.Module, run: bool):
        super().__init__()
        self.run = run
        self.steps: list[Step] = []
        self._known: dict[int, Step] = {}
        self._alive: list[Tensor] = []  # as long as they live nobody else has their id
        self._depth = 0  # of modules that are functions
        self._sections: list[str] = []
        found = [path for path, module in model.named_modules() if isinstance(module, Mechanism | Pool)]
        self.outermost = [path for path in found if not any(path.startswith(f"{one}.") for one in found)]
        self._within = {
            path.rsplit(".", i)[0] for path in self.outermost for i in range(1, path.count(".") + 1)
        } | {""}
        lists = {path.rpartition(".")[0] for path in self._within if path.rpartition(".")[2].isdigit()}
        modules = dict(model.named_modules())
        self._blocks = {
            f"{path}.{name}".removeprefix(".")
            for path in lists
            for name, child in modules[path].named_children()
            if isinstance(child, nn.Module) and name.isdigit()
        }
        for path, parameter in model.named_parameters():
            self.keep(parameter, "parameter", path, ())

    def keep(
        self, value: Tensor, kind: str, name: str, of: tuple[Step, ...], module: nn.Module | None = None
    ) -> None:
        """Write down what made a value."""
        section = self._sections[-1] if self._sections else ""
        step = Step(kind, name, of, module, section, tuple(value.shape[1:]))
        self._known[id(value)] = step
        self._alive.append(value)
        if kind != "parameter":
            self.steps.append(step)

    def watching(self, path: str, module: nn.Module) -> _Watch:
        """Notes what a module takes and gives, for as long as the context lasts."""
        watch = _Watch()
        inside = path in self._within or path in self._blocks

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if path in self._blocks and not self._depth:
                self._sections.append(path)
            # what is handed a function calls it, so it is looked into
            if not inside and not any(callable(a) and not isinstance(a, Tensor) for a in args):
                self._depth += 1

        def leave(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            if not inside and not any(callable(a) and not isinstance(a, Tensor) for a in args):
                self._depth -= 1
                if not self._depth:
                    self._module(path, module, (*args, *kwargs.values()), out)
            if path in self._blocks and not self._depth:
                self._sections.pop()

        watch.handles = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]
        if path in self.outermost and not self.run:
            one = isinstance(module, Pool)
            module.forward = lambda x, *_, **__: (x[:, 0] if one else x).clone()  # type: ignore[method-assign]
            watch.module = module
        return watch

    def _module(self, path: str, module: nn.Module, args: Sequence[Any], out: Any) -> None:
        of = tuple(self._of(args))
        if not of or not isinstance(out, Tensor):
            return
        if isinstance(module, nn.Identity) or re.fullmatch(r"Drop(out|Path)\w*", type(module).__name__):
            self._known[id(out)] = of[0]
            self._alive.append(out)
            return
        self.keep(out, "module", path, of, module)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self._depth:
            self._function(getattr(func, "__name__", "").strip("_"), args, kwargs or {}, out)
        return out

    def _function(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        of = tuple(self._of((*args, *kwargs.values())))
        made = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        if not of or not made or all(step.kind == "parameter" for step in of) and name in ("size", "shape"):
            return
        if name == "get" and args:  # a property, such as .T
            name = "view"
        for one in made:
            if name in _SAME:
                self._known[id(one)] = of[0]
                self._alive.append(one)
            elif name in _OPERATORS:
                self.keep(one, _OPERATORS[name], name, tuple(self._of(args, numbers=True)))
            elif name in ("cat", "stack"):
                self.keep(one, "concat", name, of)
            elif name == "getitem":
                self._taken(one, args[1], of[0])
            elif one.is_floating_point():
                self.keep(one, "function", name, of)

    def _taken(self, out: Tensor, index: Any, of: Step) -> None:
        """Some of the tokens, or all of them arranged anew."""
        parts = index if isinstance(index, tuple) else (index,)
        at = parts[1] if len(parts) > 1 else None
        if isinstance(at, int) and len(parts) == 2:
            self.keep(out, "take", str(at), (of,))
        elif (
            isinstance(at, slice)
            and (at.start or at.stop is not None)
            and at.step is None
            and len(parts) == 2
        ):
            self.keep(out, "take", f"{at.start or 0}:{'' if at.stop is None else at.stop}", (of,))
        else:
            self._known[id(out)] = of
            self._alive.append(out)

    def _of(self, args: Sequence[Any], numbers: bool = False) -> Iterator[Step]:
        """The values that are known among arguments."""
        for arg in args:
            if numbers and isinstance(arg, int | float):
                yield Step("number", repr(float(arg)), (), None, "", ())
            if isinstance(arg, Tensor):
                if id(arg) in self._known:
                    yield self._known[id(arg)]
            elif isinstance(arg, list | tuple):
                yield from self._of(arg)
