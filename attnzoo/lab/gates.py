"""Gates of heads: what each gives, multiplied by a number."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from attnzoo.core import Here

if TYPE_CHECKING:
    from attnzoo.lab.points import Leaf
    from attnzoo.lab.subject import Subject


@contextmanager
def gated(subject: "Subject", leaves: "Sequence[Leaf]", gates: Tensor) -> Iterator[None]:
    """Multiply what each head gives by its gate while the block runs.

    Args:
        subject: The model.
        leaves: Whose heads.
        gates: One for each head of these leaves, (h,).
    """
    parts = dict(zip(leaves, gates.split([leaf.heads for leaf in leaves]), strict=True))

    def multiply(leaf: "Leaf", out: Tensor, here: Here) -> Tensor:
        return out * parts[leaf].to(out)[:, None, None]  # (b h n d)

    with subject.editing("heads", multiply, leaves):
        yield
