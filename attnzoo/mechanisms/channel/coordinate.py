"""Coordinate attention: gate the channels by what each row and each column of the grid holds on average.

Hou et al., "Coordinate Attention for Efficient Mobile Network Design", 2021, arXiv:2103.02907, §3.2, eq. 4-9. The
layers are timm's `CoordAttn`.
"""

import torch

from attnzoo.core import Card, Family, Mechanism, Paper, PositiveInt, Site, Tap


class Coordinate(Mechanism):
    """x ⊙ σ(W_y f) ⊙ σ(W_x f), f = hswish(norm(W₁ z)): z holds the means of all rows, then of all columns.

    The gate at row i and column j is the product of that of row i and that of column j.

    Args:
        site: Where the mechanism is put.
        reduction: By how much the bottleneck is narrower than the tokens; it has at least 8 channels.
        bias: Whether the three layers have biases, as the authors' have; timm's have none.
    """

    card = Card(
        name="coordinate",
        family=Family.CHANNEL,
        summary="Channel gates for each row and each column of the grid, from their mean tokens, by timm's layers.",
        equation="x ⊙ σ(W_y f) ⊙ σ(W_x f)\nf = hswish(norm(W₁ z)),  z = [mean_rows(x); mean_columns(x)]",
        paper=Paper(
            "Coordinate Attention for Efficient Mobile Network Design",
            "Hou et al.",
            2021,
            "arXiv:2103.02907",
            where="§3.2, eq. 4-9",
        ),
        time="n c + y c c + x c c",
        memory="n c",
        params="(3 * c + bias + 2) * max(8, c // reduction) + 2 * bias * c",
        flops="4 * sum(sides) * c * max(8, c // reduction)",
        masks={"keys"},
        grid=2,
        taps={"gate_rows": "b c y", "gate_columns": "b c x"},
        fidelity="adapted",
        notes="The paper's batch norm mixes samples; in its place each row and column has a layer norm over its "
        "channels. Special tokens lie in no row: they enter no mean and pass as they are. Rows and columns in which "
        "no token exists have a mean of zero.",
    )

    gate_rows: Tap
    gate_columns: Tap

    def __init__(self, site: Site, *, reduction: PositiveInt = 32, bias: bool = True):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.layers import LayerNorm2d
        from timm.layers.coord_attn import CoordAttn

        width = max(8, site.dim // reduction)
        self.layers = CoordAttn(site.dim, rd_channels=width, bias=bias, norm_layer=LayerNorm2d)

    def mix(self, x, source, *, mask, layout):
        layers, rows = self.layers, layout.grid[0]
        prefix, tokens = layout.split(x)
        grid = layout.to_grid(tokens)  # (b c y x)
        means = self._strips(grid, mask, layout)
        f = layers.act(layers.bn1(layers.conv1(means)))  # (b w y+x 1), w the width of the bottleneck
        gate_rows = self.gate_rows(layers.gate(layers.conv_h(f[:, :, :rows]))[..., 0])
        gate_columns = self.gate_columns(layers.gate(layers.conv_w(f[:, :, rows:]))[..., 0])
        return layout.from_grid(prefix, grid * gate_rows[:, :, :, None] * gate_columns[:, :, None, :])

    def _strips(self, grid, mask, layout):
        """Means of all rows, then of all columns, over the tokens that exist: (b c y+x 1); of nothing they are zero."""
        if mask.keys is None:
            return torch.cat([grid.mean(dim=3), grid.mean(dim=2)], dim=2)[..., None]
        exists = layout.to_grid(mask.keys[:, layout.prefix :, None])  # (b 1 y x)
        grid = grid.masked_fill(~exists, 0.0)
        means = [grid.sum(dim) / exists.sum(dim).clamp(min=1) for dim in (3, 2)]
        return torch.cat(means, dim=2)[..., None]
