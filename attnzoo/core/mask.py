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

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts that are set."""
        given = {"keys": self.keys is not None, "pairs": self.pairs is not None, "causal": self.causal}
        return tuple(kind for kind in KINDS if given[kind])

    def dense(self, n: int, m: int, device: torch.device | None = None) -> Bool[Tensor, "#b #h #n m"] | None:
        """All parts as one boolean that broadcasts to (b h n m); None when everything is allowed.

        Raises:
            UnsupportedMask: AZ405, when `keys` is not about m keys.
        """
        if self.keys is not None and self.keys.shape[1] != m:
            raise UnsupportedMask(
                "AZ405", f"`keys` of a mask speaks of {self.keys.shape[1]} keys; there are {m}"
            )
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

    def for_one_head(self) -> "Mask":
        """This mask, once it is certain that it does not differ by head.

        Raises:
            UnsupportedMask: AZ402, when there are pairs for several heads.
        """
        if self.pairs is not None and self.pairs.shape[1] != 1:
            raise UnsupportedMask(
                "AZ402",
                f"a mask for {self.pairs.shape[1]} heads was given to a mechanism with one head",
                help="hand a mask of shape (b, 1, n, m)",
            )
        return self

    def only(self, *kinds: str) -> "Mask":
        """This mask, once it is certain that no other kind is set.

        Args:
            kinds: What the caller can honour, of `keys`, `pairs`, `causal`.

        Raises:
            UnsupportedMask: AZ402, when another kind is set.
        """
        beyond = [kind for kind in self.kinds if kind not in kinds]
        if beyond:
            can = f"only {', '.join(kinds)} can be honoured" if kinds else "no mask can be honoured"
            raise UnsupportedMask(
                "AZ402",
                f"a mask of kind {' and '.join(f'`{kind}`' for kind in beyond)} was given, but {can} here",
                why="a mask that is ignored gives wrong results without a word",
                help=f"`attnzoo list mechanisms --mask {beyond[0]}` shows the mechanisms that can",
            )
        return self


NO_MASK = Mask()
"""Everybody may attend to everybody."""
