"""Equations of what is put at a site: a mechanism between its projections, fusions and their branches."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from attnzoo.core import Fusion, MultiHead
from attnzoo.core.options import defaults_of, option_texts
from attnzoo.recipe import Plan


def stands_in(text: str, symbol: str) -> bool:
    """Whether a symbol stands in equations, as a letter of its own."""
    if symbol in "⊙γσ∅":
        return symbol in text
    if symbol == "s":
        return ", s)" in text
    return bool(re.search(rf"(?<![A-Za-z^_{{]){symbol}(?![A-Za-z'])", text))


def equations(plan: Plan, left: str, module: Any, notes: list[str], prefix: str = "") -> Iterator[str]:
    """Of a plan, whose first line says what `left` is."""
    if not isinstance(module, MultiHead):
        yield from _inner(plan, left, module, notes, prefix)
        return
    heads, source = module.heads, "x" if module.context_dim is None else "s"
    merged = f"[o of {heads} heads]" if heads > 1 else "o"
    yield f"{left} = W_o {merged if isinstance(module.norm, nn.Identity) else f'norm({merged})'}"
    yield f"q = W_q x,  k = W_k {source},  v = W_v {source},  d = {module.head_dim}"
    if not isinstance(module.q_norm, nn.Identity):
        yield "q ← norm(q),  k ← norm(k)"
    if module.rotary:
        yield "q_i ← turn_i(q_i),  k_j ← turn_j(k_j)"
    if module.sharing > 1:
        notes.append(f"{module.sharing} heads of queries share one of keys and values")
    yield from _inner(plan, "o", module.inner, notes, prefix)


def _inner(plan: Plan, left: str, module: Any, notes: list[str], prefix: str) -> Iterator[str]:
    """Of a mechanism, or of a fusion and what it fuses."""
    equation = plan.entry.value.card.equation
    _note_options(plan, equation, notes)
    if not equation:
        notes.append(f"the card of `{plan.entry.name}` has no equation: {plan.entry.value.card.summary}")
        yield f"{left} = {_word(plan.entry.name)}({_arguments(plan, prefix)})"
    else:
        first, *more = equation.split("\n")
        if plan.branches:
            first, *start = _from_first(first, module.fusion, notes)
            lines = [f"{left} = {first}", *start, *more]
        else:
            lines = [f"{_each(left, first)} = {first}", *more]
        yield from (_named(line, prefix) if plan.branches else line for line in lines)
    branches = list(module.branches.values()) if plan.branches else []
    fed = bool(branches) and type(module.fusion).feed is not Fusion.feed
    for i, (branch, part) in enumerate(zip(plan.branches, branches, strict=True), start=1):
        at = f"{prefix}{i}"
        name = f"a_{{{at}}}" if "," in at else f"a_{at}"
        yield from equations(branch, f"f{name[1:]}(x)" if fed else name, part, notes, f"{at}, ")


def _from_first(first: str, fusion: Fusion, notes: list[str]) -> list[str]:
    """The first line of a fusion that starts as its first branch, and what is in it."""
    if fusion.start != "identity" or fusion.gamma is None:
        return [first]
    notes.append("γ = 0 before training")
    own = {"add": "a_1 + γ ⊙ Σ_{i>1} a_i", "hadamard": "a_1 ⊙ (1 + γ ⊙ Π_{i>1} a_i)"}
    if fusion.card.name in own:
        return [own[fusion.card.name]]
    return ["a_1 + γ ⊙ (M − a_1)", f"M = {first}"]


def _arguments(plan: Plan, prefix: str) -> str:
    if not plan.branches:
        return "q, k, v" if plan.inside_heads else "x"
    return ", ".join(_named(f"a_{i}", prefix) for i in range(1, len(plan.branches) + 1))


def _word(name: str) -> str:
    """A name of a plugin as one of a function."""
    return re.sub(r"[^A-Za-z]", "", name) if len(re.sub(r"[^A-Za-z]", "", name)) > 1 else "f"


def _each(left: str, first: str) -> str:
    """With an index where the equation is that of token i."""
    for i in "ij":
        bound = re.search(rf"[ΣΠ]_{i}|(softmax|max|mean)_{i}", first)
        free = re.search(rf"_{i}(?![A-Za-z])|_{i}[jl](?![A-Za-z])|ρ\({i}\)", first)
        if free and not bound:
            return f"{left}_{i}" if re.fullmatch(r"\w+\(.*\)|o", left) else f"({left})_{i}"
    return left


def _named(line: str, prefix: str) -> str:
    """A line of a fusion inside a fusion, whose branches have more than one number."""
    if not prefix:
        return line
    line = re.sub(r"(?<![A-Za-z_^])a_\{([^}]*)\}", rf"a_{{{prefix}\1}}", line)
    return re.sub(r"(?<![A-Za-z_^])a_(\w+)", rf"a_{{{prefix}\1}}", line)


def _note_options(plan: Plan, equation: str, notes: list[str]) -> None:
    """What options say, where their letters stand in the equation; and which change it."""
    cls = plan.entry.value
    values = {**defaults_of(cls), **plan.options}
    said = []
    for option, text in option_texts(cls).items():
        letter = re.match(r"(\w[′']?)(?= / \w|,)", text)
        if letter and option in values and values[option] is not None and stands_in(equation, letter[1]):
            said.append(f"{letter[1]} = {values[option]}")
    if plan.branches and re.search(r"(?<![A-Za-z])k(?![A-Za-z])", equation):
        said.append(f"k = {len(plan.branches)}")
    if said:
        notes.append(f"{plan.entry.name}: {', '.join(said)}")
    shown = {one.partition(" = ")[2] for one in said}
    changed = {k: v for k, v in plan.options.items() if defaults_of(cls).get(k) != v and k != "start"}
    sizes = [f"{k}={v}" for k, v in changed.items() if type(v) in (int, float) and str(v) not in shown]
    choices = [f"{k}={v}" for k, v in changed.items() if type(v) not in (int, float)]
    if sizes:
        notes.append(f"{plan.entry.name}: {', '.join(sizes)}")
    if choices:
        notes.append(f"{plan.entry.name}: the equation is that of default options; here {', '.join(choices)}")
