"""What is kept of the tokens before, when a sequence is continued token by token."""

from collections.abc import Callable

from torch import Tensor


class KVCache:
    """What one mechanism keeps between steps: tensors that grow along the tokens, or a state of constant size, tensors
    that stay, and its branches'.

    Buffers double when they are full, so a step copies what is new and not what is old. It is written in place: no
    gradient flows through it.
    """

    def __init__(self) -> None:
        self.length = 0
        self.carried: tuple[Tensor, ...] = ()
        self._growing: list[Tensor] = []
        self._kept: tuple[Tensor, ...] | None = None
        self._branches: dict[str, KVCache] = {}

    def extend(self, *new: Tensor) -> list[Tensor]:
        """Append, and return all so far, (... n c) each.

        Args:
            new: What the newest tokens add, (... k c) each, always in the same order.
        """
        start, stop = self.length, self.length + new[0].shape[-2]
        if not self._growing or stop > self._growing[0].shape[-2]:
            room = [t.new_empty(*t.shape[:-2], max(16, 2 * stop), t.shape[-1]) for t in new]
            for old, wider in zip(self._growing, room, strict=False):
                wider[..., :start, :] = old[..., :start, :]
            self._growing = room
        for buffer, t in zip(self._growing, new, strict=True):
            buffer[..., start:stop, :] = t
        self.length = stop
        return [buffer[..., :stop, :] for buffer in self._growing]

    def carry(self, count: int, *state: Tensor) -> None:
        """Go on from another state, of constant size: `carried`, which is empty before the first step.

        Args:
            count: How many tokens are new.
            state: What is carried on, (b ...) each; without its gradient, which would hold all that was before.
        """
        self.length += count
        self.carried = tuple(t.detach() for t in state)

    def keep(self, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What is the same in every step, made in the first: keys and values of a context."""
        if self._kept is None:
            self._kept = tuple(t.contiguous() for t in make())  # read in every step
        return self._kept

    def branch(self, name: str) -> "KVCache":
        """What a branch keeps for itself."""
        return self._branches.setdefault(name, KVCache())

    def select(self, rows: Tensor, kept: bool = True) -> None:
        """Go on with these rows of the batch, in this order; a row may be named again.

        Args:
            rows: Indices, (b,).
            kept: Whether what stays is selected too; not needed when every row is replaced by one of the same context.
        """
        self._growing = [buffer.index_select(0, rows) for buffer in self._growing]
        self.carried = tuple(t.index_select(0, rows) for t in self.carried)
        if kept and self._kept is not None:
            self._kept = tuple(t.index_select(0, rows) for t in self._kept)
        for branch in self._branches.values():
            branch.select(rows, kept)
