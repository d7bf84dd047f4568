"""MEDUSA: one guide map, made once from the whole image, opens gates at every place of every layer.

Aboutalebi et al., "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical
Image Analysis", 2022, arXiv:2110.06063; one of its heads. The body that makes the map is the host's second stream.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Mechanism, OptionError, Paper, PositiveInt, Site

TITLE = "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image Analysis"


class Medusa(Mechanism):
    """x ⊙ A, A = σ(conv₁(relu(conv₃([G ; W_r x])))): G is the context, resized bilinearly to the grid of the tokens.

    Args:
        site: Where the mechanism is put.
        mode: `gate` scales tokens by A, `residual` by 1 + A.
        gates: Whether A has a gate per `channel` or one per `place`.
        local: Whether the gate sees the tokens too, and not the guide alone.
        hidden: Width of W_r x, and of what conv₃ gives.

    Raises:
        OptionError: AZ214, at a site without a context.
    """

    card = Card(
        name="medusa",
        family=Family.CROSS,
        summary="Gates from one guide map of the whole image and from the tokens around each place.",
        equation="x ⊙ A\nA = σ(conv₁(relu(conv₃([G; W_r x])))),  G = resize(s)",
        paper=Paper(TITLE, "Aboutalebi et al.", 2022, "arXiv:2110.06063"),
        time="n c + m c",
        memory="n c + m c",
        params="(c * hidden if local else 0) + (9 * (e + (hidden if local else 0)) + 1) * hidden "
        "+ (hidden + 1) * (c if gates == 'channel' else 1)",
        flops="2 * (n - p) * hidden * ((c if local else 0) + 9 * (e + (hidden if local else 0)) "
        "+ (c if gates == 'channel' else 1))",
        masks={"keys"},
        context=True,
        grid=2,
        context_grid=2,
        taps={"gate": "b n c"},
        fidelity="inspired",
        notes="The paper gives no operators: these are ours. There is no batch norm, which mixes samples. Places of "
        "the guide that do not exist are zero. Special tokens lie at no place: their gate is the mean of all places'; "
        "those of the guide are not read. A place has influence on its neighbours only.",
    )

    @classmethod
    def claims(cls, *, gates: str, **options) -> Card:
        return cls.card if gates == "channel" else replace(cls.card, taps={"gate": "b n"})

    def __init__(
        self,
        site: Site,
        *,
        mode: Literal["gate", "residual"] = "gate",
        gates: Literal["channel", "place"] = "channel",
        local: bool = True,
        hidden: PositiveInt = 16,
    ):
        super().__init__(site)
        if site.context_dim is None:
            raise OptionError(
                f"`medusa` at `{site.name}` has no guide map",
                help="put it where a second stream on a grid is read",
            )
        self.mode, self.gates = mode, gates
        self.reduce = nn.Linear(site.dim, hidden, bias=False) if local else None  # W_r
        self.near = nn.Conv2d(site.context_dim + hidden * local, hidden, 3, padding=1)
        self.to_gate = nn.Conv2d(hidden, site.dim if gates == "channel" else 1, 1)

    def mix(self, x, source, *, mask, layout, context_layout=None):
        p = context_layout.prefix
        guide = source if mask.keys is None else source.masked_fill(~mask.keys[..., None], 0.0)
        guide = F.interpolate(context_layout.to_grid(guide[:, p:]), layout.grid, mode="bilinear")
        if self.reduce is not None:
            guide = torch.cat([guide, layout.to_grid(self.reduce(x[:, layout.prefix :]))], dim=1)
        gate = self.to_gate(self.near(guide).relu()).sigmoid().flatten(2).mT  # (b y·x c)
        everywhere = gate.mean(dim=1, keepdim=True).expand(-1, layout.prefix, -1)
        gate = torch.cat([everywhere, gate], dim=1)
        gate = self.gate(gate) if self.gates == "channel" else self.gate(gate[..., 0])[..., None]
        return x * gate if self.mode == "gate" else x * (1 + gate)
