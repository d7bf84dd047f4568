"""The equations of a recipe: what each layer does with the tokens, and what is put there."""

import html
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from timm.layers import LayerScale, Mlp
from torch import nn

from attnzoo.catalogue.equations import latex
from attnzoo.catalogue.recording import Step, record
from attnzoo.core import Fusion, Mechanism, MultiHead, Pool
from attnzoo.core.options import defaults_of, option_texts
from attnzoo.errors import ZooError
from attnzoo.hosts.given import stand_ins
from attnzoo.hosts.skip import VARIANTS
from attnzoo.recipe import Composition, Plan, load, resolve

WIDTH = 78
"""Characters to a line."""
_NORMS = {"Layer": "LN", "RMS": "RMS", "Group": "GN", "Batch": "BN"}
_WORDS = {
    "x": "the tokens; `x ← ...` is what they are from there on",
    "a": "the tokens of the first stream",
    "b": "those of the second",
    "s": "the tokens that are read",
    "∅": "no tokens",
    "LN": "each token is brought to mean 0 and variance 1 over its channels, then scaled and shifted, as learned",
    "RMS": "each token is divided by the root of its mean square, then scaled, as learned",
    "GN": "groups of channels are normalised over all tokens, then scaled and shifted, as learned",
    "BN": "channels are normalised by the statistics of the training set, then scaled and shifted, as learned",
    "norm": "each token is normalised, scaled and shifted, as learned",
    "W": "learned maps of each token, each with a bias where the site asks for one",
    "γ": "learned scales of the channels",
    "p": "learned vectors, of positions",
    "t": "learned tokens in front of the others",
    "σ": "the sigmoid",
    "⊙": "products of numbers at the same place",
    "d": "channels of a head",
}
"""What symbols of hosts mean."""
_MERGED = {
    "merged": "R_l = LN(M_l + R_{l−1}),  R_1 = M_1",
    "merged_raw": "R_l = LN(M_l + M_{l−1}),  R_1 = M_1",
    "cross": "R_l = LN(M_l + R_{l−1}),  R_1 = M_1",
}
"""Skips between the merged heads M of layers, before their projection."""
_SKIPS = {
    "merged_post": "AddNorm(M_l) = R_l = LN(M_l + R_{l−1}),  R_1 = M_1",
    "probs_pairmean": "A_l ← (A_l + pairmean(A_{l−1})) / 2",
    "logits_pairmean": "S_l ← S_l + pairmean(S_{l−1})",
    "encoder_stack": "AddNorm(E_k) = R_k = LN(E_k + R_{k−1}),  R_1 = E_1",
}
"""The others: after the projection, of weights A or scores S, after stacks of layers E."""


@dataclass(frozen=True)
class Part:
    """Some equations.

    Args:
        title: What they are of.
        equations: One to a line, in the notation of cards.
        notes: What they do not say.
        defines: Names, in the equations before, of what they are of: `attention`; none for what happens to the tokens.
    """

    title: str
    equations: tuple[str, ...]
    notes: tuple[str, ...] = ()
    defines: tuple[str, ...] = ()

    @property
    def latex(self) -> str:
        """The equations as LaTeX; of one that cannot be read, of a plugin, its text."""
        try:
            return latex("\n".join(self.equations))
        except ZooError:
            body = r" \\ ".join(f"& {_typeset(equation)}" for equation in self.equations)
            return rf"\begin{{split}} {body} \end{{split}}"


def _typeset(equation: str) -> str:
    """LaTeX of one equation, or its letters where it cannot be read."""
    try:
        return latex(equation)
    except ZooError:
        plain = re.sub(r"[^ -~]|[\\{}$&#^_%~]", "?", equation)
        return rf"\text{{{plain}}}"


@dataclass(frozen=True)
class Explanation:
    """The equations of a recipe.

    Args:
        name: Of the recipe.
        summary: Its line.
        parts: In the order of a forward: what happens to the tokens, each time followed by what is put there.
        symbols: What the symbols of the host mean.
        papers: By number, from 1.
    """

    name: str
    summary: str
    parts: tuple[Part, ...]
    symbols: Mapping[str, str]
    papers: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        return asdict(self) | {"parts": [asdict(part) | {"latex": part.latex} for part in self.parts]}

    def __str__(self) -> str:
        lines = [self.name, *_wrapped(self.summary)]
        for part in self.parts:
            lines += ["", *_wrapped(part.title, hang=2)]
            lines += [f"  {line}" for one in part.equations for line in _folded(one)]
            lines += [line for note in part.notes for line in _wrapped(f"({note})", 2, 3)]
        lines += [
            "",
            *(line for one, text in self.symbols.items() for line in _wrapped(f"{one:6}{text}", hang=6)),
        ]
        papers = (_wrapped(f"[{i}] {paper}", hang=4) for i, paper in enumerate(self.papers, start=1))
        return "\n".join([*lines, "", *(line for paper in papers for line in paper)]).rstrip()

    __repr__ = __str__

    def latex(self) -> str:
        """All equations as LaTeX, a display for each part, with its title in front."""
        shown = (f"% {part.title}\n\\[\n{part.latex}\n\\]" for part in self.parts if part.equations)
        return "\n\n".join(shown)

    def _repr_markdown_(self) -> str:
        blocks = [f"**{self.name}** {self.summary}"]
        for part in self.parts:
            blocks.append(f"*{part.title}*" + "".join(f"\n\n{note}" for note in part.notes))
            if part.equations:
                blocks.append(f"$$\n{part.latex}\n$$")
        blocks.append("\n".join(f"- `{symbol}`: {text}" for symbol, text in self.symbols.items()))
        blocks.append("\n".join(f"{i}. {paper}" for i, paper in enumerate(self.papers, start=1)))
        return "\n\n".join(filter(None, blocks))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def explain(recipe: Any, edits: Sequence[str] = ()) -> Explanation:
    """The equations of a recipe: what happens to the tokens, layer by layer, and what is put there.

        print(attnzoo.explain("nested"))

    The model runs once on the meta device, and what it does is written down: norms, residuals and streams are its own.
    The equations of what is put there are those of the cards.

    Args:
        recipe: Name, file, text, a dict of what the text would say, or an `attnzoo.recipe.Composition`.
        edits: Changes such as `attention.with.start=identity`.

    Raises:
        RecipeError: what is wrong with the recipe.
    """
    composition = recipe if isinstance(recipe, Composition) else resolve(load(recipe, edits))
    with torch.device("meta"):
        model = composition.build(composition.model_cfg()).eval()
    sample = composition.info.sample()
    wanted = {**composition.given, **getattr(composition.info, "inputs", {})}
    given = stand_ins(sample[0], wanted) if wanted else {}
    # what the model makes of its weights for itself takes mechanisms that run
    own = any(name in composition.info.makes for plan in composition.everything for name in plan.card.given)
    steps = record(model, sample, given, run=own)
    papers: list[str] = []
    parts = list(_parts(composition, _Narrator(steps, model), papers))
    hosts = " ".join(equation for part in parts if not part.defines for equation in part.equations)
    every = " ".join(equation for part in parts for equation in part.equations)
    used = {
        symbol: words
        for symbol, words in _WORDS.items()
        if _has(every if symbol in "sWdσ⊙" else hosts, symbol)
    }
    loaded = composition.loaded
    return Explanation(loaded.name, loaded.recipe.summary, tuple(parts), used, tuple(papers))


def _has(text: str, symbol: str) -> bool:
    if symbol in "⊙γσ∅":
        return symbol in text
    if symbol == "s":
        return ", s)" in text
    return bool(re.search(rf"(?<![A-Za-z^_{{]){symbol}(?![A-Za-z'])", text))


def _parts(composition: Composition, narrator: "_Narrator", papers: list[str]) -> Iterator[Part]:
    """What happens, with what is put there after the first time that it is met."""
    told: set[tuple] = set()
    sections = [
        section
        for path, steps in groupby(narrator.steps, key=lambda step: step.section)
        if (section := narrator.section(path, list(steps))).lines
    ]
    for _, run in groupby(sections, key=lambda section: section.like(composition)):
        same = list(run)
        first, last = same[0], same[-1]
        if first.path:
            where = first.path if len(same) == 1 else f"{first.path} … {last.path} ({len(same)})"
        else:
            where = "first" if first is sections[0] else "last" if first is sections[-1] else "then"
        yield Part(f"{where}{first.shown}", (*first.lines, *first.inside))
        for plan, names in _alike(composition, first):
            modules = [section.called[names[0]].module for section in same]
            one = _placed(plan, modules, names, composition, papers)
            if (key := (one.title, one.equations, one.notes)) not in told:
                told.add(key)
                yield one
    skip = composition.skip
    if skip and skip.use not in _MERGED:
        words = f"skip `{skip.use}`, from {skip.at[0]} to {skip.at[-1]}: {VARIANTS[skip.use]}"
        yield Part(words, (_SKIPS[skip.use],))


def _alike(composition: Composition, section: "_Section") -> list[tuple[Plan, list[str]]]:
    """Names of what is called in a section, by plan; those of one plan, kind and number of heads together."""
    found: dict[tuple, list[str]] = {}
    plans: dict[tuple, Plan] = {}
    for name, step in section.called.items():
        plan = _plan(composition, step)
        key = (str(plan), name.split("_")[0], getattr(step.module, "heads", 0))
        plans.setdefault(key, plan)
        found.setdefault(key, []).append(name)
    return [(plans[key], names) for key, names in found.items()]


def _plan(composition: Composition, step: Step) -> Plan:
    """What the recipe put where a mechanism or pool stands."""
    site = vars(step.module)["_placed"].site if "_placed" in vars(step.module) else ""
    if site in composition.plans:
        return composition.plans[site]
    assert composition.pool is not None
    return composition.pool


@dataclass
class _Section:
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

    def like(self, composition: Composition) -> tuple:
        """Equal for blocks that are told together."""
        if not self.path:
            return (id(self),)
        plans = tuple(str(_plan(composition, step)) for step in self.called.values())
        return re.sub(r"\d+$", "", self.path), (*self.lines, *self.inside), plans, self.shown


class _Narrator:
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

    def section(self, path: str, steps: list[Step]) -> _Section:
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
        return _Section(path, lines, list(dict.fromkeys(filter(None, inner))), called, shown)

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
            step.kind == "module" and not isinstance(step.module, LayerScale | nn.Linear)
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
        if isinstance(module, LayerScale):
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


def _number(value: float) -> str:
    """A number; a root of a whole one as such."""
    square = value * value
    if value != round(value) and value > 1 and abs(square - round(square)) < 1e-2:
        return f"√{round(square)}"
    return f"{value:g}"


def _mlp(step: Step) -> str:
    """The equation of an MLP, where it is timm's or a stack of layers."""
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


# what is put there


def _placed(
    plan: Plan, modules: Sequence[Any], names: Sequence[str], composition: Composition, papers: list[str]
) -> Part:
    """The equations of what is put at a site.

    Args:
        plan: What is put there.
        modules: It, in the layers that are told together.
        names: What it is called in their equations.
        composition: Has the skip.
        papers: Those cited so far; new ones are added.
    """
    module, name = modules[0], names[0] if len(names) == 1 else names[0].split("_")[0]
    context = getattr(module, "context_dim", None) is not None
    notes: list[str] = []
    lines = list(_equations(plan, f"{name}(x, s)" if context else f"{name}(x)", module, notes))
    site = vars(module)["_placed"].site if "_placed" in vars(module) else ""
    if site in composition.plans and "causal" in composition.info.requirements(site).masks:
        notes.append("no token sees those after it")
    heads = [one.heads for one in modules]
    if len(set(heads)) > 1:
        notes.append(f"heads, layer by layer: {', '.join(map(str, heads))}")
        lines = [
            re.sub(rf"of {heads[0]} heads\]", "of all heads]", re.sub(r",  d = \d+$", "", line))
            for line in lines
        ]
    elif not isinstance(module, MultiHead) and not plan.branches and heads[0] > 1 and not plan.card.one_head:
        notes.append(f"{heads[0]} heads")
    if composition.skip.use in _MERGED and not isinstance(
        getattr(module, "skip", nn.Identity()), nn.Identity
    ):
        left, merged = lines[0].split(" = W_o ", 1)
        lines[:1] = [f"{left} = W_o R_l,  M_l = {merged}", _MERGED[composition.skip.use]]
    numbers = []
    for part in (*plan.fusions(), *plan.leaves()):
        card = part.entry.value.card
        if card.paper:
            papers += [str(card.paper)] if str(card.paper) not in papers else []
            numbers.append(papers.index(str(card.paper)) + 1)
    cited = "".join(f" [{number}]" for number in dict.fromkeys(numbers))
    return Part(f"{', '.join(names)}: {plan}{cited}", tuple(lines), tuple(dict.fromkeys(notes)), tuple(names))


def _equations(plan: Plan, left: str, module: Any, notes: list[str], prefix: str = "") -> Iterator[str]:
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
        yield from _equations(branch, f"f{name[1:]}(x)" if fed else name, part, notes, f"{at}, ")


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
        if letter and option in values and values[option] is not None and _has(equation, letter[1]):
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


def _wrapped(text: str, indent: int = 0, hang: int = 0) -> list[str]:
    """A paragraph, broken between words."""
    spaces = " " * indent, " " * hang
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=spaces[0],
        subsequent_indent=spaces[1],
        break_on_hyphens=False,
        break_long_words=False,
    )


def _folded(line: str) -> list[str]:
    """An equation, of which what is too long is broken after a comma with two spaces, and then after its `=`."""
    out: list[str] = []
    for piece in line.split(",  "):
        if out and len(out[-1]) + len(piece) + 6 <= WIDTH:
            out[-1] += f",  {piece}"
            continue
        if out:
            out[-1] += ","
        left, sign, right = piece.partition(" = ")
        out += [piece] if len(piece) + 3 <= WIDTH else [f"{left} =", f"  {right}"]
    return out
