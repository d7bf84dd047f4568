"""Claims: what a mechanism or a fusion says about itself, and is held to."""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NoReturn, get_args

from attnzoo.core.fact_sheet import fact_sheet
from attnzoo.core.formula import check_formula
from attnzoo.core.tap import KINDS, kind_of

NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Family(StrEnum):
    """What a mechanism changes relative to softmax attention."""

    DOT_PRODUCT = "dot_product"
    PROJECTION = "projection"
    ROUTING = "routing"
    LOCAL = "local"
    SPARSE = "sparse"
    LINEAR = "linear"
    RECURRENT = "recurrent"
    LATENT = "latent"
    CHANNEL = "channel"
    ADDITIVE = "additive"
    MIXING = "mixing"
    CROSS = "cross"

    @property
    def question(self) -> str:
        """The question that members of this family answer in their own way."""
        return _QUESTIONS[self]


_QUESTIONS = {
    Family.DOT_PRODUCT: "how are queries and keys compared and normalised?",
    Family.PROJECTION: "how are queries, keys and values made?",
    Family.ROUTING: "which heads, for which token?",
    Family.LOCAL: "which neighbours on the grid?",
    Family.SPARSE: "which few pairs, by content or pattern?",
    Family.LINEAR: "how to avoid n × m?",
    Family.RECURRENT: "what state is carried along the sequence?",
    Family.LATENT: "what do tokens attend to instead of tokens?",
    Family.CHANNEL: "which channels, rather than which tokens?",
    Family.ADDITIVE: "scores by a small network",
    Family.MIXING: "what if mixing ignores content?",
    Family.CROSS: "what does another stream say?",
}


class Law(StrEnum):
    """An algebraic claim that a check can falsify. The first group is for mechanisms, the second for fusions."""

    STOCHASTIC = "stochastic"
    SUBSTOCHASTIC = "substochastic"
    PERMUTATION_EQUIVARIANT = "permutation_equivariant"
    SHIFT_EQUIVARIANT = "shift_equivariant"
    LINEAR_IN_VALUES = "linear_in_values"
    LOCAL = "local"
    BOUNDED = "bounded"
    SILENT = "silent"
    HEADS_APART = "heads_apart"

    SINGLE = "single"
    AGREE = "agree"
    CONVEX = "convex"
    SYMMETRIC = "symmetric"
    ADDITIVE = "additive"
    NEUTRAL_ZERO = "neutral_zero"
    FAIR_START = "fair_start"
    IDENTITY_START = "identity_start"
    TOKEN_LOCAL = "token_local"

    @property
    def meaning(self) -> str:
        """What the law says."""
        return _MEANINGS[self]


_MEANINGS = {
    Law.STOCHASTIC: "tapped weights are non-negative and sum to 1 over the axis they are normalised over",
    Law.SUBSTOCHASTIC: "tapped weights are non-negative and sum to at most 1 over the axis they are normalised over",
    Law.PERMUTATION_EQUIVARIANT: "permuting grid tokens permutes the output",
    Law.SHIFT_EQUIVARIANT: "on a 1-D grid, away from the ends, shifting tokens shifts the output",
    Law.LINEAR_IN_VALUES: "for fixed queries and keys the head is linear in the values",
    Law.LOCAL: "nothing beyond `reach()` grid steps has influence",
    Law.BOUNDED: "the output of a head lies in the convex hull of the values",
    Law.SILENT: "the output is zero, whatever is asked",
    Law.HEADS_APART: "heads do not know of each other: some of them alone give what they give among all",
    Law.SINGLE: "one branch gives that branch",
    Law.AGREE: "equal branches give that value",
    Law.CONVEX: "elementwise between the branches' minimum and maximum",
    Law.SYMMETRIC: "permuting branches changes nothing",
    Law.ADDITIVE: "linear in the branches for fixed x",
    Law.NEUTRAL_ZERO: "an extra zero branch changes nothing",
    Law.FAIR_START: "at initialisation the mean of the branches",
    Law.IDENTITY_START: "with `start: identity`, bit for bit the first branch at initialisation",
    Law.TOKEN_LOCAL: "token i of the output depends on token i of the inputs only",
}


MECHANISM_LAWS = frozenset(list(Law)[: list(Law).index(Law.SINGLE)])
FUSION_LAWS = frozenset(Law) - MECHANISM_LAWS
MASK_KINDS = frozenset({"keys", "pairs", "causal"})
WISHES = frozenset({"qkv_bias", "proj_bias", "qk_norm", "scale_norm", "rotary"})
"""What a site may ask of projections; `MultiHead` honours all, a mechanism with projections of its own says which."""
AXES = frozenset("bnmchdkprwyx")
"""The shape letters of docs/architecture.md."""
Given = Literal["labels", "scores"]
"""A map that the caller hands over: whole numbers that name a region, or real numbers."""
ROLLOUT = "rollout"
"""Name of a map of scores that a ViT makes itself: how much its class token looks at each patch so far."""
Fidelity = Literal["exact", "adapted", "inspired"]


class Frozen(dict):
    """A mapping that stays as it is, so that a card can be compared, hashed and pickled."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a card does not change: use dataclasses.replace(card, ...)")

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    update = setdefault = pop = popitem = clear = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple:
        return type(self), (dict(self),)


@dataclass(frozen=True)
class Paper:
    """Where a mechanism comes from.

    Args:
        title: Title of the paper.
        authors: First author "et al.", or all.
        year: Year of publication; None when we do not know it.
        ref: `arXiv:...`, a DOI or a venue.
        where: Section and equations.
    """

    title: str
    authors: str
    year: int | None = None
    ref: str = ""
    where: str = ""

    def __str__(self) -> str:
        return ", ".join(
            component
            for component in (self.authors, self.title, str(self.year or ""), self.ref, self.where)
            if component
        )


def _listed(names: Set[str]) -> str:
    return ", ".join(sorted(names))


def _spelled_out(laws: Set[Law]) -> str:
    """Laws in the order in which they stand above, with what they say."""
    return "; ".join(f"{law}: {law.meaning}" for law in Law if law in laws)


def _power(term: str) -> int:
    """How many times a product of shape letters counts tokens."""
    powers = {"n": 1, "m": 1, "n²": 2, "m²": 2}
    return sum(powers.get(letter, 0) for letter in term.split())


def _coherent(card: "Card | FusionCard", laws: frozenset[Law]) -> None:
    if not NAME.fullmatch(card.name):
        raise ValueError(
            f"card {card.name!r}: a name is snake_case: a-z, 0-9 and _, at most 64, a letter first"
        )
    if not card.summary or "\n" in card.summary:
        raise ValueError(f"card {card.name!r}: the summary is one line")
    if card.fidelity not in get_args(Fidelity):
        raise ValueError(
            f"card {card.name!r}: fidelity is one of {', '.join(get_args(Fidelity))}, not {card.fidelity!r}"
        )
    if card.fidelity != "exact" and not card.notes:
        raise ValueError(f"card {card.name!r}: fidelity {card.fidelity!r} needs notes that say what differs")
    if card.laws - laws:
        raise ValueError(
            f"card {card.name!r}: {', '.join(sorted(card.laws - laws))} is no law of this kind of component"
        )


@dataclass(frozen=True)
class Card:
    """What a mechanism claims. The checks hold it to every claim; the composer reads it before building.

    Args:
        name: The name recipes use.
        family: What it changes relative to softmax attention.
        summary: One line.
        paper: Source; None for what has none.
        time: Operations in the shape letters, as implemented: `n m c`. How they grow with tokens, channels and heads is
            measured, with many tokens beside channels; factors are not, and what calls an unknown kernel is not.
        memory: What a forward holds at its peak, in the shape letters, as implemented, taps watched; measured likewise.
        params: Number of parameters, as a formula (`attnzoo.core.evaluate` says what it may name): `2 * rank * n`. Of a
            head without the projections around it. Counted, where it is given.
        flops: FLOPs of a forward of one sample without a mask, two per multiply-add, as a formula: of matrix products,
            convolutions and attention kernels, as PyTorch counts them. Counted, where it is given.
        masks: Which kinds of `Mask` are honoured, of keys, pairs, causal; the base class refuses the others.
        one_head: Whether it is one head whatever the site says: pairs that differ by head are refused.
        context: Whether it can read from a context (cross-attention); `beside` when it reads its own tokens too, so
            that the context, of their width, may have no tokens.
        context_grid: Number of grid dimensions that its context must have, or `any`; None when it needs no geometry.
        grid: Number of grid dimensions it needs, `any` when every number will do, None when it needs no geometry.
        hard_routing: Whether a small change may choose other keys or experts: influence comes and goes in steps.
        fixed_length: Whether it only reads from as many tokens as it was built for; `most` when from fewer too.
        incremental: Whether the newest query alone, against all keys so far under a causal mask, gives the last row
            of the full pass; a mechanism with projections of its own has a `step` then that asks it alone.
        given: Maps on the grid that the caller hands over, by name: `labels` or `scores`.
        honours: Of a mechanism with projections of its own: which of the site's wishes it follows.
        taps: Axes of each tap in the shape letters, by name: `{"weights": "b h n m"}`. A name is a kind of tap, or
            begins with one: `weights_agents`. The base class makes them.
        laws: Algebraic claims.
        auxiliary: The loss that it adds in training, as an equation; its method `auxiliary` makes it of what taps show.
        equation: What it computes with default options, in lines of Unicode text: `softmax(q kᵀ / √d) v`. The first
            says what the tokens receive, or token i; those after it say what is in that. x are the tokens, s is what
            is read, a context or x itself, W a learned map of each token; its docstring says the rest.
        fidelity: `exact`, or `adapted` or `inspired` with notes that say what differs from the paper.
        notes: What a user should know.
        extra: Import names beyond attnzoo's own requirements.
    """

    name: str
    family: Family
    summary: str
    paper: Paper | None = None
    time: str = "n m c"
    memory: str = "h n m"
    params: str = ""
    flops: str = ""
    masks: Set[str] = frozenset()
    one_head: bool = False
    context: bool | Literal["beside"] = False
    context_grid: int | Literal["any"] | None = None
    grid: int | Literal["any"] | None = None
    hard_routing: bool = False
    fixed_length: bool | Literal["most"] = False
    incremental: bool = False
    given: Mapping[str, Given] = field(default_factory=dict)
    honours: Set[str] = frozenset()
    taps: Mapping[str, str] = field(default_factory=dict)
    laws: Set[Law] = frozenset()
    auxiliary: str = ""
    equation: str = ""
    fidelity: Fidelity = "exact"
    notes: str = ""
    extra: Set[str] = frozenset()

    def __post_init__(self):
        for name in ("masks", "honours", "laws", "extra"):  # a set literal may be written; it is kept frozen
            object.__setattr__(self, name, frozenset(getattr(self, name)))
        for name in ("given", "taps"):
            object.__setattr__(self, name, Frozen(getattr(self, name)))
        _coherent(self, MECHANISM_LAWS)
        if not isinstance(self.family, Family):
            families = ", ".join(Family)
            raise ValueError(f"card {self.name!r}: {self.family!r} is no family; there are {families}")
        for strange, what in (
            (self.masks - MASK_KINDS, "kind of mask"),
            (self.honours - WISHES, "wish of a site"),
        ):
            if strange:
                raise ValueError(f"card {self.name!r}: {sorted(strange)} is no {what}")
        if self.grid not in (None, "any") and not isinstance(self.grid, int):
            raise ValueError(
                f"card {self.name!r}: grid is a number of dimensions, 'any' or None, not {self.grid!r}"
            )
        for formula in (self.params, self.flops):
            check_formula(formula or "0")
        for name, axes in self.taps.items():
            if kind_of(name) not in KINDS:
                raise ValueError(f"card {self.name!r}: the tap {name!r} is none of {', '.join(KINDS)}")
            if set(axes.split()) - AXES or len(set(axes.split())) != len(axes.split()):
                raise ValueError(f"card {self.name!r}: the axes {axes!r} are not shape letters, each once")
        for name, kind in self.given.items():
            if kind not in get_args(Given) or not name.isidentifier():
                raise ValueError(
                    f"card {self.name!r}: given is a name with `labels` or `scores`, not {kind!r}"
                )
        if self.given and self.grid is None:
            raise ValueError(f"card {self.name!r}: a given map lies on the grid, so `grid` must be claimed")
        if self.incremental and "causal" not in self.masks:
            raise ValueError(f"card {self.name!r}: incremental needs a causal mask")
        if self.context not in (True, False, "beside"):
            raise ValueError(f"card {self.name!r}: context is True, False or 'beside', not {self.context!r}")
        if self.context_grid is not None and not self.context:
            raise ValueError(f"card {self.name!r}: context_grid needs `context`")
        if self.laws & {Law.STOCHASTIC, Law.SUBSTOCHASTIC} and not self.tapped("weights"):
            raise ValueError(f"card {self.name!r}: a law about weights needs a tap called `weights`")

    def tapped(self, kind: str) -> dict[str, str]:
        """Axes of the taps of a kind, by name; empty when there are none."""
        return {name: axes for name, axes in self.taps.items() if kind_of(name) == kind}

    @property
    def growth(self) -> int:
        """The power of the number of tokens in `time`; n and m both count tokens."""
        return max(_power(term) for term in self.time.split("+"))

    @property
    def grows(self) -> str:
        """How `time` grows with the number of tokens, for people: `O(n²)`."""
        power = ("", "n", "n²", "n³", "n⁴")[self.growth]
        leading = [term for term in self.time.split("+") if _power(term) == self.growth]
        return f"O({power} log n)" if any("log(n)" in term for term in leading) else f"O({power or 1})"

    def _repr_html_(self) -> str:
        honoured = f"of its own; honours {_listed(self.honours)}" if self.honours else ""
        return fact_sheet(
            self.name,
            self.summary,
            {
                "equation": self.equation,
                "family": f"{self.family}: {self.family.question}",
                "paper": str(self.paper or ""),
                "fidelity": self.fidelity,
                "time": f"{self.time}, {self.grows}",
                "memory": self.memory,
                "parameters": self.params,
                "FLOPs": self.flops,
                "masks": _listed(self.masks) or "none",
                "heads": "one" if self.one_head else "",
                "context": "yes" if self.context is True else self.context or "",
                "grid": "" if self.grid is None else str(self.grid),
                "given": ", ".join(f"{name} ({kind})" for name, kind in self.given.items()),
                "projections": honoured,
                "taps": ", ".join(f"{name} ({axes})" for name, axes in self.taps.items()),
                "auxiliary": self.auxiliary,
                "laws": _spelled_out(self.laws),
                "notes": self.notes,
                "needs": _listed(self.extra),
            },
        )


@dataclass(frozen=True)
class FusionCard:
    """What a fusion claims.

    Args:
        name: The name recipes use.
        summary: One line, with the equation.
        paper: Source; None for what has none.
        laws: Algebraic claims.
        arity: Fewest and most branches; None for no bound.
        hard_routing: Whether some branches may get no gradient.
        masks: Which kinds of `Mask` hold for what is merged where they hold in every branch. A fusion of tokens by
            themselves (the law `TOKEN_LOCAL`) leaves it out where all do; one that mixes tokens is handed the mask.
        inside_heads: Whether it merges inside the heads too; otherwise on tokens only.
        auxiliary: The loss that it adds in training, as an equation; its method `auxiliary` makes it of what taps show.
        equation: What it makes of branches a_1, …, a_k with default options, as on a `Card`: `Σ_i a_i`.
        fidelity: `exact`, or `adapted` or `inspired` with notes.
        notes: What a user should know.
    """

    name: str
    summary: str
    paper: Paper | None = None
    laws: Set[Law] = frozenset()
    arity: tuple[int, int | None] = (1, None)
    hard_routing: bool = False
    masks: Set[str] = frozenset()
    inside_heads: bool = True
    auxiliary: str = ""
    equation: str = ""
    fidelity: Fidelity = "exact"
    notes: str = ""

    def __post_init__(self):
        object.__setattr__(self, "laws", frozenset(self.laws))
        every = frozenset() if self.mixes_tokens else MASK_KINDS
        object.__setattr__(self, "masks", frozenset(self.masks) or every)
        _coherent(self, FUSION_LAWS)
        if self.masks - MASK_KINDS:
            raise ValueError(f"card {self.name!r}: {sorted(self.masks - MASK_KINDS)} is no kind of mask")
        if self.arity[0] < 1 or (self.arity[1] is not None and self.arity[1] < self.arity[0]):
            raise ValueError(f"card {self.name!r}: an arity of {self.arity} holds for no number of branches")

    def _repr_html_(self) -> str:
        least, most = self.arity
        return fact_sheet(
            self.name,
            self.summary,
            {
                "equation": self.equation,
                "paper": str(self.paper or ""),
                "fidelity": self.fidelity,
                "branches": f"{least} or more" if most is None else f"{least} to {most}",
                "level": "inside the heads too" if self.inside_heads else "on tokens only",
                "masks": _listed(self.masks) or "none",
                "auxiliary": self.auxiliary,
                "laws": _spelled_out(self.laws),
                "notes": self.notes,
            },
        )

    @property
    def mixes_tokens(self) -> bool:
        """Whether a token of the output may depend on other tokens of the branches."""
        return Law.TOKEN_LOCAL not in self.laws
