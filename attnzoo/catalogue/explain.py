"""The equations of a recipe: what each layer does with the tokens, and what is put there."""

import html
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from attnzoo.catalogue.composed import equations, stands_in
from attnzoo.catalogue.equations import latex
from attnzoo.catalogue.narrating import Narrator, Section
from attnzoo.catalogue.recording import Step, record
from attnzoo.core import MultiHead
from attnzoo.errors import ZooError
from attnzoo.hosts.given import stand_ins
from attnzoo.hosts.skip import VARIANTS
from attnzoo.recipe import Composition, Plan, load, resolve

WIDTH = 78
"""Characters to a line."""
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
    parts = list(_parts(composition, Narrator(steps, model), papers))
    hosts = " ".join(equation for part in parts if not part.defines for equation in part.equations)
    every = " ".join(equation for part in parts for equation in part.equations)
    used = {
        symbol: words
        for symbol, words in _WORDS.items()
        if stands_in(every if symbol in "sWdσ⊙" else hosts, symbol)
    }
    loaded = composition.loaded
    return Explanation(loaded.name, loaded.recipe.summary, tuple(parts), used, tuple(papers))


def _parts(composition: Composition, narrator: Narrator, papers: list[str]) -> Iterator[Part]:
    """What happens, with what is put there after the first time that it is met."""
    told: set[tuple] = set()
    sections = [
        section
        for path, steps in groupby(narrator.steps, key=lambda step: step.section)
        if (section := narrator.section(path, list(steps))).lines
    ]
    for _, run in groupby(sections, key=lambda section: _like(composition, section)):
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


def _alike(composition: Composition, section: Section) -> list[tuple[Plan, list[str]]]:
    """Names of what is called in a section, by plan; those of one plan, kind and number of heads together."""
    found: dict[tuple, list[str]] = {}
    plans: dict[tuple, Plan] = {}
    for name, step in section.called.items():
        plan = _plan(composition, step)
        key = (str(plan), name.split("_")[0], getattr(step.module, "heads", 0))
        plans.setdefault(key, plan)
        found.setdefault(key, []).append(name)
    return [(plans[key], names) for key, names in found.items()]


def _like(composition: Composition, section: Section) -> tuple:
    """Equal for blocks that are told together."""
    if not section.path:
        return (id(section),)
    plans = tuple(str(_plan(composition, step)) for step in section.called.values())
    return re.sub(r"\d+$", "", section.path), (*section.lines, *section.inside), plans, section.shown


def _plan(composition: Composition, step: Step) -> Plan:
    """What the recipe put where a mechanism or pool stands."""
    site = vars(step.module)["_placed"].site if "_placed" in vars(step.module) else ""
    if site in composition.plans:
        return composition.plans[site]
    assert composition.pool is not None
    return composition.pool


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
    lines = list(equations(plan, f"{name}(x, s)" if context else f"{name}(x)", module, notes))
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
