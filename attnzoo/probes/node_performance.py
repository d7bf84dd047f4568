"""Which labels each single channel recognises by itself; see `head_performance`."""

from dataclasses import dataclass, replace

from attnzoo.probes.head_performance import HeadPerformance


@dataclass(kw_only=True, eq=False)
class NodePerformance(HeadPerformance):
    """F^i_ab = mean over samples of label a of W_bi z_i, the field that channel i alone raises for output b, (k k).

    All else, and all options, are those of `head_performance`, with a channel in the place of a head.
    """

    card = replace(
        HeadPerformance.card,
        name="node_performance",
        summary="Which labels each single channel recognises by itself: clusters, noise, signal-to-noise ratio.",
        equation=HeadPerformance.card.equation.replace("W_b,h · z_h", "W_bi z_i").replace("Σ_h", "Σ_i"),
    )
    part = "node"

    def parts(self, heads: int, channels: int) -> list[slice]:
        return [slice(channel, channel + 1) for channel in range(channels)]
