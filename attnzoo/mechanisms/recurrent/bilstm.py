"""Multi-head bidirectional LSTM in the place of attention: each head reads its channels there and back.

Ren et al., "FAR: Function-preserving Attention Replacement for IMC-friendly Inference", 2025, arXiv:2505.21535.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.core import Card, Family, Mechanism, Paper, Site


class Cell(nn.Module):
    """An LSTM or a GRU from the first token to the last, (b n d) -> (b n d), with PyTorch's names and first values.

    PyTorch's own modules stop `torch.compile`; the functions that they call do not.

    Args:
        d: Channels of the tokens, and of what is carried.
        gates: Four for an LSTM, three for a GRU.
    """

    def __init__(self, d: int, gates: int):
        super().__init__()
        self.gates = gates
        self.weight_ih, self.weight_hh = (nn.Parameter(torch.empty(gates * d, d)) for _ in range(2))
        self.bias_ih, self.bias_hh = (nn.Parameter(torch.empty(gates * d)) for _ in range(2))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(d**-0.5), d**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_ih.is_meta:  # nothing to wait for: the same products, all tokens at once
            products = (x @ weight.mT for weight in (self.weight_ih, self.weight_hh))
            return sum(products, start=x.new_zeros(1))[..., : x.shape[-1]]
        weights, zero = tuple(self.parameters()), x.new_zeros(1, x.shape[0], x.shape[2])
        # biases, layers, dropout, gradients, not both ways, batch first
        how = (True, 1, 0.0, True, False, True)
        if self.gates == 4:
            return torch.lstm(x, (zero, zero), weights, *how)[0]
        return torch.gru(x, zero, weights, *how)[0]


class BiLSTM(Mechanism):
    """W_post [s; s̃], sᵢ = LSTM(sᵢ₋₁, W_pre xᵢ) and s̃ᵢ = LSTM(s̃ᵢ₊₁, W_pre xᵢ) in each head by itself, d channels each.

    i, f, o = σ(W x + U s + b) and g = tanh(W x + U s + b) of the s before, c = f ⊙ c + i ⊙ g, s = o ⊙ tanh(c). A GRU
    has r, z = σ(W x + U s + b), g = tanh(W x + b + r ⊙ (U s + b')) and s = z ⊙ s + (1 - z) ⊙ g.

    Args:
        site: Where the mechanism is put.
        variant: `post`, one map (2c → c) of what all heads carry forwards, then backwards; or `head_proj`, the later
            version: each head makes (2d → d) one of both by itself, then an output projection (c → c), which in a graft
            is the donor's.
        cell: What is carried along: `lstm`, or `gru`.
    """

    card = Card(
        name="bilstm",
        family=Family.RECURRENT,
        summary="FAR: a bidirectional LSTM in each head, in the place of attention.",
        equation="W_post [s_i; s̃_i]\ns_i = LSTM(s_{i−1}, W_pre x_i),  s̃_i = LSTM(s̃_{i+1}, W_pre x_i)",
        paper=Paper(
            "FAR: Function-preserving Attention Replacement for IMC-friendly Inference",
            "Ren et al.",
            2025,
            "arXiv:2505.21535",
        ),
        time="n c d + n c c",
        memory="n c",
        params="c**2 + c + 4 * (3 + (cell == 'lstm')) * c * (d + 1) "
        "+ (2 * c**2 + c if variant == 'post' else 2 * c * d + c + c**2 + c)",
        flops="2 * n * c**2 + 8 * (3 + (cell == 'lstm')) * n * c * d "
        "+ (4 * n * c**2 if variant == 'post' else 4 * n * c * d + 2 * n * c**2)",
        masks={"keys"},
        notes="The authors train one LSTM of all channels whose weights between heads are zero at first; here heads "
        "stay apart, as in what they deploy. Tokens that do not exist are stepped over in both directions, and every "
        "head gives zero for them. Tokens are read one after the other, so time is that of n small steps.",
    )

    def __init__(
        self,
        site: Site,
        *,
        variant: Literal["post", "head_proj"] = "post",
        cell: Literal["lstm", "gru"] = "lstm",
    ):
        super().__init__(site)
        c, h, d, gates = site.dim, site.heads, site.head_dim, 3 + (cell == "lstm")
        self.pre = nn.Linear(c, c)
        self.onwards = nn.ModuleList(Cell(d, gates) for _ in range(h))
        self.backwards = nn.ModuleList(Cell(d, gates) for _ in range(h))
        self.variant = variant
        if variant == "post":
            self.post = nn.Linear(2 * c, c)
        else:
            self.head_proj = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(h))
            self.proj = nn.Linear(c, c)

    def mix(self, x, source, *, mask, layout):
        x, there = self.pre(x).unflatten(-1, (self.heads, -1)), mask.keys  # (b n h d)
        onwards = carried(self.onwards, x, there)
        backwards = carried(self.backwards, x.flip(1), None if there is None else there.flip(1)).flip(1)
        if self.variant == "post":
            return self.post(torch.cat([onwards.flatten(2), backwards.flatten(2)], dim=-1))
        both = torch.cat([onwards, backwards], dim=-1)
        return self.proj(torch.cat([one(both[:, :, i]) for i, one in enumerate(self.head_proj)], dim=-1))


def carried(cells: nn.ModuleList, x: Tensor, there: Tensor | None) -> Tensor:
    """What each head carries from the first token to the last, (b n h d); zero where there is no token.

    Args:
        cells: One for each head.
        x: (b n h d).
        there: Which tokens exist, (b n); None when all do.
    """
    if there is None:
        return torch.stack([cell(x[:, :, i]) for i, cell in enumerate(cells)], dim=2)
    # those who exist come first
    order = (~there).byte().argsort(dim=1, stable=True)[:, :, None, None].expand_as(x)
    heads = carried(cells, x.gather(1, order), None)
    return torch.zeros_like(heads).scatter(1, order, heads).masked_fill(~there[:, :, None, None], 0.0)
