"""Who may attend to whom. True means may attend, everywhere in attnzoo."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from attnzoo.errors import UnsupportedMask

KINDS = ("keys", "pairs", "causal")


@dataclass(frozen=True, eq=False)
class Mask:
    """Who may attend to whom. True means may attend. The parts are conjoined.

    With n queries and m keys, `causal` aligns the last query with the last key, so that the newest token of a
    sequence may be asked alone against all keys so far.

    Args:
        keys: Which keys exist (padding is False), (b m).
        pairs: Which pairs are allowed, (b or 1, h or 1, n, m).
        causal: Whether a query may see only keys at or before its own position.
    """

    keys: Bool[Tensor, "b m"] | None = None
    pairs: Bool[Tensor, "#b #h n m"] | None = None
    causal: bool = False

    def __post_init__(self):
        for name, part, axes in (("keys", self.keys, 2), ("pairs", self.pairs, 4)):
            if isinstance(part, Tensor) and (part.dtype != torch.bool or part.ndim != axes):
                raise UnsupportedMask(
                    "AZ405",
                    f"`{name}` of a mask must be boolean with {axes} axes; this has {part.ndim} and is {part.dtype}",
                    why="True means may attend; numbers could mean anything",
                    help="compare first: Mask(keys=lengths[:, None] > positions)",
                )
        if not isinstance(self.causal, bool):
            raise UnsupportedMask(
                "AZ405",
                f"`causal` of a mask is True or False, not {self.causal!r}",
                help="whole masks are handed as `pairs`: Mask(pairs=...)",
            )

    @property
    def free(self) -> bool:
        """Whether everybody may attend to everybody."""
        return self.keys is None and self.pairs is None and not self.causal

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts that are set."""
        given = {"keys": self.keys is not None, "pairs": self.pairs is not None, "causal": self.causal}
        return tuple(kind for kind in KINDS if given[kind])

    def dense(self, n: int, m: int, device: torch.device | None = None) -> Bool[Tensor, "#b #h #n m"] | None:
        """All parts as one boolean that broadcasts to (b h n m); None when everything is allowed."""
        parts = []
        if self.keys is not None:
            parts.append(self.keys[:, None, None, :])
        if self.pairs is not None:
            parts.append(self.pairs)
        if self.causal:
            parts.append(torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)[None, None])
        if not parts:
            return None
        allowed = parts[0]
        for part in parts[1:]:
            allowed = allowed & part
        return allowed

    def fit(self, b: int, h: int, n: int, m: int) -> None:
        """Refuse a mask that is about other samples, heads, queries or keys.

        Args:
            b, h, n, m: Samples, heads (1 for what is one head whatever the site says), queries, keys.

        Raises:
            UnsupportedMask: AZ405 for another shape; AZ402 for pairs by head where there is one head.
        """
        if self.keys is not None and tuple(self.keys.shape) != (b, m):
            raise UnsupportedMask(
                "AZ405",
                f"`keys` of a mask has shape {tuple(self.keys.shape)}; {b} samples with {m} keys want ({b}, {m})",
                why="a mask that is stretched to fit would speak of other tokens than was meant",
            )
        if self.pairs is None:
            return
        samples, heads, queries, keys = self.pairs.shape
        if samples not in (1, b) or (queries, keys) != (n, m) or heads not in (1, h) and h != 1:
            raise UnsupportedMask(
                "AZ405",
                f"`pairs` of a mask has shape {tuple(self.pairs.shape)}; {b} samples, {h} heads, {n} queries and "
                f"{m} keys want ({b} or 1, {h} or 1, {n}, {m})",
                why="a mask that is stretched to fit would speak of other tokens than was meant",
            )
        if heads not in (1, h):
            raise UnsupportedMask(
                "AZ402",
                f"a mask for {heads} heads was given to a mechanism with one head",
                help="hand a mask of shape (b, 1, n, m)",
            )

    def only(self, *kinds: str, by: str = "") -> "Mask":
        """This mask, once it is certain that no other kind is set.

        Args:
            kinds: What can be honoured, of `keys`, `pairs`, `causal`.
            by: Name of the mechanism, for the error.

        Raises:
            UnsupportedMask: AZ402, when another kind is set.
        """
        beyond = [kind for kind in self.kinds if kind not in kinds]
        if beyond:
            whom = f"`{by}`" if by else "this"
            known = [kind for kind in KINDS if kind in kinds]
            can = f"{whom} honours only {', '.join(known)}" if known else f"{whom} honours no mask"
            raise UnsupportedMask(
                "AZ402",
                f"a mask of kind {' and '.join(f'`{kind}`' for kind in beyond)} was given; {can}",
                why="a mask that is ignored gives wrong results without a word",
                help=f"`attnzoo list mechanisms --mask {beyond[0]}` shows the mechanisms that can",
            )
        return self


NO_MASK = Mask()
"""Everybody may attend to everybody."""
