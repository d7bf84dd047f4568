"""What `attnzoo.create` gives: a component with defaults for everything that a host would hand it."""

from typing import Any

from torch import Tensor, fx, nn

from attnzoo.alone import masks
from attnzoo.core import Layout, Mask, Mechanism, Pool
from attnzoo.errors import LayoutMismatch, UnknownArgument, UnsupportedContext, did_you_mean


def admit(
    formula: str,
    x: Tensor,
    what: str,
    width: int | None,
    axes: int,
    channels: int = -1,
    beside: Tensor | None = None,
) -> None:
    """Refuse what has another number of axes, channels or samples, and whole numbers, which some would round to.

    Args:
        formula: Who takes it.
        x: What was handed over.
        what: What is taken, in words.
        width: Channels; None for any.
        axes: Number of axes.
        channels: Which of them counts channels.
        beside: What has as many samples; None for any number.

    Raises:
        LayoutMismatch: AZ401.
    """
    if isinstance(x, fx.Proxy) or isinstance(beside, fx.Proxy):  # symbolic tracing knows no shapes
        return
    if x.ndim != axes or (width is not None and x.shape[channels] != width):
        raise LayoutMismatch(
            "AZ401",
            f"`{formula}` takes {what}{f' of {width} channels' if width else ''}; this has shape {tuple(x.shape)}",
            help="maps (b c y x) are taken by what is created with form='map'",
        )
    if not x.is_floating_point():
        raise LayoutMismatch(
            "AZ401",
            f"`{formula}` takes {what} in floating point; this is {x.dtype}",
            help="embed what is an index, and turn what is a quantity into a number: x.float()",
        )
    if beside is not None and x.shape[0] != beside.shape[0]:
        raise LayoutMismatch(
            "AZ401",
            f"`{formula}` takes {what} of {beside.shape[0]} samples, as many as ask; this has shape {tuple(x.shape)}",
            why="a sample reads from its own context",
            help="one context for all is context.expand(len(x), -1, -1)" if x.shape[0] == 1 else "",
        )


class Alone(nn.Module):
    """A mechanism or a pool in a network that is not attnzoo's: tokens (b n c) to tokens (b n c), or to (b c).

    Its weights are those of `attn`, as they are of a block of a composed model: `attn.qkv.weight`.

    Args:
        attn: The component.
        formula: What it is, for people.
        dim: Width of the tokens, in channels.
        layout: How x is arranged unless a call says otherwise; None for a line of any length.
        prefix: Number of special tokens in front of a line of any length.
        context_layout: How the context is arranged unless a call says otherwise; None for a line of any length.
    """

    def __init__(
        self,
        attn: Mechanism | Pool,
        formula: str,
        dim: int,
        layout: Layout | None,
        prefix: int = 0,
        context_layout: Layout | None = None,
    ):
        super().__init__()
        self.attn, self.formula, self.dim = attn, formula, dim
        self.layout, self.prefix, self.context_layout = layout, prefix, context_layout

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        causal: bool = False,
        layout: Layout | None = None,
        context_layout: Layout | None = None,
        **given: Tensor,
    ) -> Tensor:
        """Mixed tokens (b n c), or of a pool one token (b c).

        Args:
            x: Tokens (b n c).
            context: Tokens to read from (b m e), if it was created with `context_dim`.
            mask: A `Mask`, or a boolean in which True means may attend: keys (b m), pairs (n m), (b n m), (b h n m).
            causal: Whether later keys are hidden; of n queries and m keys the last ones belong together.
            layout: How x is arranged, instead of as it was created for.
            context_layout: How the context is arranged, likewise.
            given: The maps that its card names, (b *grid) each.

        Raises:
            ZooError: AZ210 an unknown keyword; AZ401, AZ403, AZ408 a layout or length that does not fit; AZ402, AZ405 a
                mask that cannot be honoured or is none; AZ404 a context too many or too few; AZ409 a missing map.
        """
        if isinstance(x, fx.Proxy):
            x, context, mask, causal, layout, context_layout, given = self._traced(
                x, context, mask, causal, layout, context_layout, given
            )
        admit(self.formula, x, "tokens (b n c)", self.dim, 3)
        layout = layout or self.layout or Layout((x.shape[1] - self.prefix,), self.prefix)
        layout.check(x)
        if context is not None:
            width = getattr(self.attn, "context_dim", None)
            admit(self.formula, context, "a context (b m e)", width, 3, beside=x)
            context_layout = context_layout or self.context_layout or Layout((context.shape[1],))
            context_layout.check(context)
        return self._run(x, context, mask, causal, layout, context_layout, given)

    def _run(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | Tensor | None,
        causal: bool,
        layout: Layout,
        context_layout: Layout | None,
        given: dict[str, Tensor],
    ) -> Tensor:
        """The component, given all that a host would hand it."""
        card = self.attn.card
        for name in given.keys() - card.given.keys():
            takes = ["context", "mask", "causal", "layout", "context_layout", *card.given]
            raise UnknownArgument(
                "AZ210",
                f"`{self.formula}` takes no `{name}` when it is called",
                help=f"{did_you_mean(name, takes)} it takes {', '.join(f'`{one}`' for one in takes)}".strip(),
            )
        m = x.shape[1] if context is None else context.shape[1]
        mask = masks.mask_of(mask, causal, card, x.shape[0], x.shape[1], m)
        where: dict[str, Any] = {"mask": mask, "layout": layout, "given": given}
        if isinstance(self.attn, Pool):
            if context is not None:
                raise UnsupportedContext("AZ404", f"`{card.name}` pools tokens; it cannot read a context")
            return self.attn(x, **where)
        return self.attn(x, context, context_layout=context_layout, **where)

    def _traced(self, x, context, mask, causal, layout, context_layout, given):
        """What can be followed while torch.fx traces; what cannot is refused when the graph runs."""
        others = [mask, causal, layout, context_layout, given]
        reads = getattr(self.attn, "context_dim", None) is not None
        if not reads:
            others.append(context)
        if any(isinstance(other, fx.Proxy | Tensor) for other in others):
            x, (mask, causal, layout, context_layout, given) = (
                masks.bare(x, *others),
                (None, False, None, None, {}),
            )
            context = context if reads else None
        return x, context, mask, causal, layout, context_layout, given

    @property
    def takes(self) -> str:
        """What goes in, in words."""
        return f"tokens (b {self.layout.length if self.layout else 'n'} {self.dim})"

    def extra_repr(self) -> str:
        arranged = str(self.layout or f"{self.prefix} + n" if self.layout or self.prefix else "n")
        return f"{self.formula}, dim={self.dim}, heads={self.attn.heads}, tokens={arranged}"


class FeatureMap(Alone):
    """A mechanism or a pool in a convolutional network: maps (b c *grid) to maps (b c *grid), or to (b c).

    Args:
        attn, formula, dim, layout, context_layout: As for `Alone`; without a `layout` the grid is that of each map.
        axes: Number of grid dimensions: 2 for (b c y x).
    """

    def __init__(
        self,
        attn: Mechanism | Pool,
        formula: str,
        dim: int,
        layout: Layout | None,
        axes: int,
        context_layout: Layout | None = None,
    ):
        super().__init__(attn, formula, dim, layout, 0, context_layout)
        self.axes = axes

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        causal: bool = False,
        layout: Layout | None = None,
        context_layout: Layout | None = None,
        **given: Tensor,
    ) -> Tensor:
        """A mixed map (b c *grid), or of a pool one token (b c).

        Args:
            x: A map (b c *grid), contiguous or not.
            context: A map (b e *grid) or tokens (b m e) to read from, if it was created with `context_dim`.
            mask: A `Mask`, or a boolean in which True means may attend: keys (b *grid), or what `Alone` takes.
            causal, given: As for `Alone`.
            layout, context_layout: Only to say what the maps' own grids say.

        Raises:
            ZooError: As for `Alone`.
        """
        if isinstance(x, fx.Proxy):
            x, context, mask, causal, layout, context_layout, given = self._traced(
                x, context, mask, causal, layout, context_layout, given
            )
        admit(self.formula, x, f"maps (b c {' '.join('tyx'[-self.axes :])})", self.dim, self.axes + 2, 1)
        tokens, grid = self._tokens(x, layout or self._fixed(), self.layout)
        read, read_grid = context, context_layout
        if context is not None:
            width = getattr(self.attn, "context_dim", None)
            if isinstance(context, fx.Proxy) or context.ndim == self.axes + 2:
                admit(self.formula, context, "a context (b e *grid)", width, self.axes + 2, 1, x)
                read, read_grid = self._tokens(context, context_layout, self.context_layout)
            else:
                admit(self.formula, context, "a context (b m e) or (b e *grid)", width, 3, beside=x)
                read_grid = context_layout or Layout((context.shape[1],))
                read_grid.check(context)
        keys = grid if read_grid is None else read_grid
        if isinstance(mask, Tensor) and tuple(mask.shape) == (x.shape[0], *keys.grid):
            mask = Mask(keys=mask.flatten(1))
        out = self._run(tokens, read, mask, causal, grid, read_grid, given)
        return out if isinstance(self.attn, Pool) else grid.to_grid(out)

    def _fixed(self) -> Layout | None:
        """The only layout that will do, if its weights belong to positions."""
        return self.layout if self.attn.card.fixed_length else None

    def _tokens(self, x: Tensor, wanted: Layout | None, usual: Layout | None) -> tuple[Tensor, Layout]:
        """A map as tokens (b n c), and how they lie.

        Args:
            x: The map.
            wanted: The only layout that will do; None for any.
            usual: What it is created for, which must do while torch.fx traces.
        """
        if isinstance(x, fx.Proxy):
            grid = tuple(x.shape[2 + axis] for axis in range(self.axes))
            return x.flatten(2).transpose(1, 2), wanted or usual or Layout(grid)
        grid = tuple(x.shape[2:])
        if wanted is not None and (wanted.grid != grid or wanted.prefix):
            raise LayoutMismatch(
                "AZ401",
                f"a map of {' × '.join(map(str, grid))} does not fit {wanted}",
                why="its weights belong to positions" if self.attn.card.fixed_length else "",
                help="create it for this grid: grid=(rows, columns)",
            )
        return x.flatten(2).transpose(1, 2), Layout(grid)

    @property
    def takes(self) -> str:
        grid = self._fixed()
        sides = " ".join(map(str, grid.grid)) if grid else " ".join("tyx"[-self.axes :])
        return f"maps (b {self.dim} {sides})"

    def extra_repr(self) -> str:
        arranged = f"grid={' × '.join(map(str, self.layout.grid))}" if self.layout else f"{self.axes}-D grid"
        return f"{self.formula}, dim={self.dim}, heads={self.attn.heads}, {arranged}"
