"""Equations of what a model did: of steps that were written down, block by block."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnzoo.catalogue.recording import Step
from attnzoo.core import Mechanism, Pool

_NORMS = {"Layer": "LN", "RMS": "RMS", "Group": "GN", "Batch": "BN"}
"""What norms are called, by the beginning of their class."""


@dataclass
class Section:
    """What happens in one block.

    Args:
        path: Of the block; empty outside of any.
        lines: Equations of what happens.
        inside: Equations of the MLPs in it.
        called: Steps of mechanisms and pools, by the name that they have in the equations.
        shown: Sizes, for the title.
    """

    path: str
    lines: list[str]
    inside: list[str]
    called: dict[str, Step]
    shown: str


class Narrator:
    """Makes equations of steps.

    Args:
        steps: Of a forward.
        model: Whose.
    """

    def __init__(self, steps: list[Step], model: nn.Module):
        self.model = model
        live = _needed(steps)
        self.steps = [step for step in steps if step in live and step.kind != "input"]
        self.last_use = {of: i for i, step in enumerate(self.steps) for of in step.of}
        self.names: dict[Step, str] = {}
        inputs = [step for step in steps if step.kind == "input"]
        words = (
            ["image"] if len(inputs[0].shape) == 3 else ["source", "target"] if len(inputs) > 1 else ["input"]
        )
        for i, step in enumerate(inputs):
            self.names[step] = (
                step.name.replace("_", "") if not step.name.isdigit() else words[min(i, len(words) - 1)]
            )

    def section(self, path: str, steps: list[Step]) -> Section:
        """What is said of steps that follow each other."""
        inside, lines = set(steps), []
        called: dict[str, Step] = {}
        uses: dict[Step, int] = {}
        for step in self.steps:
            for of in step.of:
                if of in inside:
                    outside = step not in inside
                    uses[of] = uses.get(of, 0) + (2 if outside else 1)
        for step in steps:
            if uses.get(step, 2) < 2:  # what is used once stands where it is used
                continue
            text = self._text(step, called, top=True)
            final = step is self.steps[-1]
            old = None if final else self._replaced(step)
            name = "output" if final else old or self._fresh(step)
            lines.append(f"{name} {'←' if old else '='} {text}")
            self.names[step] = name
        shape = steps[-1].shape
        shown = (
            f"   {shape[0]} tokens of {shape[1]} channels" if len(shape) == 2 and steps[-1].section else ""
        )
        inner = [_mlp(step) for step in steps if step.name.endswith("mlp") and step.kind == "module"]
        return Section(path, lines, list(dict.fromkeys(filter(None, inner))), called, shown)

    def _replaced(self, step: Step) -> str | None:
        """The name of what a step makes anew: a value that it is made of, of the same shape, and used no more."""
        index = self.steps.index(step)
        stack = list(step.of)
        while stack:
            of = stack.pop(0)
            if of in self.names and of.kind != "input":
                if (
                    min(len(of.shape), len(step.shape)) > 1
                    and self.last_use[of] <= index
                    and not self._taken_up(of, step)
                ):
                    return self.names[of]
            elif of.kind not in ("parameter", "number"):
                stack.extend(of.of)
        return None

    def _taken_up(self, of: Step, step: Step) -> bool:
        """Whether another value of this name came later."""
        name = self.names[of]
        return any(
            self.names.get(later) == name
            for later in self.steps[self.steps.index(of) + 1 : self.steps.index(step)]
        )

    def _fresh(self, step: Step) -> str:
        """A letter that nothing has that is still needed."""
        index = self.steps.index(step)
        busy = {name for value, name in self.names.items() if self.last_use.get(value, -1) > index}
        own = [part for part in step.name.split(".") if part in ("a", "b")] if step.kind == "module" else []
        return next(
            name for name in (*own[-1:], *"xyuvzw", *(f"x_{i}" for i in range(99))) if name not in busy
        )

    def _text(self, step: Step, called: dict[str, Step], top: bool = False) -> str:
        """A value as it is written where it is used."""
        if step in self.names:
            return self.names[step]
        if step.kind == "parameter":
            return self._parameter(step)
        if step.kind == "number":
            return _number(float(step.name))
        if step.kind == "take":
            return self._taken(step, called)
        function = step.kind in ("concat", "function") or (
            step.kind == "module" and not (isinstance(step.module, nn.Linear) or _scales(step.module))
        )
        parts = [self._text(of, called, top=function) for of in step.of]
        if step.kind in ("sum", "difference"):
            text = (" + " if step.kind == "sum" else " − ").join(parts)
            return text if top else f"({text})"
        if step.kind == "product":
            if "number" in [of.kind for of in step.of]:
                return " ".join(sorted(parts, key=lambda part: part[0] not in "√0123456789"))
            return " ⊙ ".join(parts)
        if step.kind == "quotient":
            return " / ".join(parts)
        if step.kind == "concat":
            return f"[{'; '.join(parts)}]" if len(parts) > 1 else parts[0]
        if step.kind == "function":
            return f"{re.sub(r'[^a-zA-Z]', '', step.name) or 'f'}({', '.join(parts)})"
        return self._module(step, parts, called)

    def _taken(self, step: Step, called: dict[str, Step]) -> str:
        """One of the tokens, or those from one on."""
        of, first = step.of[0], 0
        while of.kind == "take" and of not in self.names:  # some of some
            first, of = first + int(of.name.partition(":")[0]), of.of[0]
        base = self._text(of, called)
        base = base if re.fullmatch(r"\w", base) else f"({base})"
        start, colon, end = step.name.partition(":")
        if colon and start == end:
            return "∅"
        last = f" {first + int(end) - 1}" if end else ""
        return (
            f"{base}_{{{first + int(start)}, …{f',{last}' if last else ''}}}"
            if colon
            else f"{base}_{first + int(start)}"
        )

    def _parameter(self, step: Step) -> str:
        name = step.name.rpartition(".")[2]
        number = re.search(r"\d+$", name)
        letter = "γ" if "gamma" in name else "p" if "pos" in name else "t" if "token" in name else "W"
        return f"{letter}_{number[0]}" if number else letter

    def _module(self, step: Step, parts: list[str], called: dict[str, Step]) -> str:
        """What a module gives."""
        module, path = step.module, step.name.split(".")
        inside = ", ".join(parts)
        if _scales(module):
            number = re.search(r"\d+$", path[-1])
            return f"γ{f'_{number[0]}' if number else ''} ⊙ {parts[0]}"
        if isinstance(module, Mechanism | Pool):
            base = "pool" if isinstance(module, Pool) else {"attn": "attention"}.get(path[-1], path[-1])
            stream = next((part for part in path[:-1] if part in ("a", "b")), "")
            name = f"{base}_{stream}" if stream else base
            called[name] = step
            return f"{name}({inside})"
        kind = type(module).__name__
        if norm := re.search(r"([A-Z][a-z]*|RMS)Norm(\d?d)?$", kind):
            return f"{_NORMS.get(norm[1], 'norm')}({inside})"
        if isinstance(module, nn.Linear):
            return f"W_{re.sub(r'[^A-Za-z]', '', path[-1]) or 'l'} {parts[0]}"
        if path[-1].startswith("act"):
            return f"{kind.lower()}({inside})"
        if path[-1] == "mlp":
            return f"MLP({inside})"
        if isinstance(module, nn.Embedding):
            return f"embed({inside})"
        name = re.sub(r"[^A-Za-z]", "", path[-1] if "_" not in path[-1] and not path[-1].isdigit() else kind)
        return f"{name if len(name) > 1 else kind}({inside})"


def _scales(module: nn.Module | None) -> bool:
    """Whether this is a layer scale, of which there are several classes."""
    return type(module).__name__.startswith("LayerScale")


def _number(value: float) -> str:
    """A number; a root of a whole one as such."""
    square = value * value
    if value != round(value) and value > 1 and abs(square - round(square)) < 1e-2:
        return f"√{round(square)}"
    return f"{value:g}"


def _mlp(step: Step) -> str:
    """The equation of an MLP, where it is timm's or a stack of layers."""
    # here, so that a list of mechanisms does not wait for timm
    from timm.layers import Mlp

    module: Any = step.module
    if type(module) is Mlp and isinstance(module.norm, nn.Identity):
        act = type(module.act).__name__.lower()
        width = f"{module.fc1.in_features} → {module.fc1.out_features} → {module.fc2.out_features}"
        return f"MLP(x) = W_2 {act}(W_1 x),  {width} channels"
    if isinstance(module, nn.Sequential):
        kinds = [type(one).__name__ for one in module if not isinstance(one, nn.Dropout)]
        return f"MLP = {' → '.join(kinds)}"
    return f"MLP = {type(module).__name__}"


def _needed(steps: Sequence[Step]) -> set[Step]:
    """What the last step is made of."""
    found, stack = set(), [steps[-1]]
    while stack:
        step = stack.pop()
        if step not in found:
            found.add(step)
            stack.extend(step.of)
    return found
