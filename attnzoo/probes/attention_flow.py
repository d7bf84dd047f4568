"""How much can flow from each first token to what the answer is read from, attention weights being pipes.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, arXiv:2005.00928, §3.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnzoo.core import InstrumentCard, Paper, Probe
from attnzoo.core.options import NonNegativeInt, PositiveInt
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding

UNITS = 10**9
"""Into so many units the weight 1 is cut, so that flows are whole numbers and exact; those of 32 bits hold 2."""


@dataclass(kw_only=True, eq=False)
class AttentionFlow(Probe):
    """The maximum flow from the answer's node to each first token, in a graph with a layer of nodes above each layer.

    The edge from token i behind layer l to token j before it has the capacity Â_ij, Â = rownorm(F + I) as in
    `rollout`, F being the mean of the heads. Flows to different tokens are asked one by one, so they need not sum to
    1, and each is at least the rollout: what rolls out does flow. The answer's node is the class token, or one more
    node above the grid tokens, with an edge 1/n to each, where the answer is read from their mean; of a sequence the
    last token.

    A row of the table for each token; the array `flow`, (b n), is NaN behind shorter sequences.

    Args:
        token: Flow into this token behind the last layer instead, from 0.
        samples: How many samples are asked, the first ones.
        limit: Most tokens that are taken on: the time grows with about the cube of their number.
    """

    card = InstrumentCard(
        "attention_flow",
        "How much can flow from each first token to what the answer is read from, weights being pipes.",
        equation="max-flow(answer → token j), capacities Â_l = rownorm(F_l + I)",
        paper=Paper(
            "Quantifying Attention Flow in Transformers", "Abnar, Zuidema", 2020, "arXiv:2005.00928", "§3"
        ),
        needs={"weights"},
        notes="Capacities are rounded to 1e-9. Signed maps count by their absolute values.",
    )
    token: NonNegativeInt | None = None
    samples: PositiveInt = 4
    limit: PositiveInt = 65

    def measure(self, subject) -> Finding:
        from attnzoo.lab.rollout import layer_maps, roll, streams

        flows: list[np.ndarray] = []
        rolled: list[np.ndarray] = []
        for _, maps in streams(subject):
            passage, real = maps.passage, maps.maps[0].real()
            places = passage.places(passage.steps[0])
            n, behind = (sum(passage.layouts[x].length for x in passage.steps[i].tokens) for i in (0, -1))
            if n > self.limit:
                raise ZooError(
                    "AZ924",
                    f"{n} tokens are too many for `attention_flow`, which takes on {self.limit}",
                    why="a maximum flow is found for each token, in a graph of all pairs of all layers",
                    help=f"ask with limit={n}, if you have the time, or take `rollout`",
                )
            if self.token is not None and self.token >= behind:
                raise ZooError(
                    "AZ921", f"`attention_flow`: there is no token {self.token}", why=f"there are {behind}"
                )
            layers = [roll([layer.double()]) for layer in layer_maps(maps)]  # Â, (b n m) each
            for sample in range(min(len(maps.logits), self.samples - len(flows))):
                hats = [layer[sample].cpu().numpy() for layer in layers]
                top = np.zeros(behind)
                if self.token is not None or subject.kind != "images":
                    top[int(real[sample].nonzero().max()) if self.token is None else self.token] = 1
                else:
                    shares = maps.shares().double().cpu()
                    top = shares[sample % len(shares)].numpy()
                flows.append(max_flows(hats, top))
                rolled.append(top @ np.linalg.multi_dot([np.eye(behind), *reversed(hats)]))
            if len(flows) == self.samples:
                break
        flow, through = (_wide(rows) for rows in (flows, rolled))
        spatial = subject.kind == "images"
        table = [
            {"token": j, "place": _place(j, passage, places) if spatial else ""}
            | {"flow": float(np.nanmean(flow[:, j])), "rollout": float(np.nanmean(through[:, j]))}
            for j in range(flow.shape[1])
        ]
        arrays = {"flow": flow, "rollout": through}
        if spatial:
            name, place = next(iter(places.items()))
            layout = passage.layouts[name]
            arrays["maps"] = flow[:, place][:, layout.prefix :].reshape(-1, *layout.grid)
        alike = np.mean([_rank_correlation(*pair) for pair in zip(flows, rolled, strict=True)])
        figures = {"samples": len(flows), "rank correlation with rollout": float(alike)}
        return Finding.of(table, shows="flow", arrays=arrays, figures=figures)

    def draw(self, finding: Finding, figure: Any) -> None:
        if "maps" in finding.arrays:
            maps = finding.arrays["maps"]
            figure.set_size_inches(2.2 * len(maps) + 1, 2.6)
            panels = figure.subplots(1, len(maps), squeeze=False)[0]
            for sample, (axes, one) in enumerate(zip(panels, maps, strict=True)):
                picture = axes.imshow(one, vmin=0, vmax=maps.max())
                axes.set(xticks=[], yticks=[], title=f"sample {sample}")
            figure.colorbar(picture, ax=panels, label="flow")
        else:
            figure.set_size_inches(6.4, 3.4)
            axes = figure.subplots()
            axes.plot(finding["token"], finding["flow"], ".-", label="flow")
            axes.plot(finding["token"], finding["rollout"], ".-", label="rollout")
            axes.set(xlabel="token", ylim=(0, None))
            axes.legend()
        figure.suptitle("attention flow")


def max_flows(hats: list[np.ndarray], top: np.ndarray) -> np.ndarray:
    """The maximum flow from one node above all layers to each first token, (m).

    Args:
        hats: Capacities of each layer, first layer first, (n m): row i is token i behind the layer.
        top: Capacities from the node above to the tokens behind the last layer, (n).
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    # node 0 above; then the tokens behind each layer, the last layer first; then the first tokens
    edges, start = [(np.zeros(len(top), int), 1 + np.arange(len(top)), top)], 1
    for hat in reversed(hats):
        above, under = np.indices(hat.shape).reshape(2, -1)
        edges.append((start + above, start + len(hat) + under, hat.ravel()))
        start += len(hat)
    tails, heads, capacities = map(np.concatenate, zip(*edges, strict=True))
    units = np.round(capacities * UNITS).astype(np.int32)
    used = units > 0
    n = hats[0].shape[1]
    size = start + n
    graph = coo_array((units[used], (tails[used], heads[used])), shape=(size, size)).tocsr()
    return np.array([maximum_flow(graph, 0, start + j).flow_value for j in range(n)]) / UNITS


def _wide(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of several lengths as one array, NaN behind the shorter ones."""
    found = np.full((len(rows), max(map(len, rows))), np.nan)
    for line, row in zip(found, rows, strict=True):
        line[: len(row)] = row
    return found


def _place(token: int, passage: Any, places: dict[str, slice]) -> str:
    """Where a token is: row and column of an image, behind the name of its stream where there are two."""
    name = next(name for name, place in places.items() if place.start <= token < place.stop)
    layout, at = passage.layouts[name], token - places[name].start - passage.layouts[name].prefix
    there = ", ".join(map(str, np.unravel_index(at, layout.grid))) if at >= 0 else "prefix"
    return f"{name} {there}" if len(places) > 1 else there


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, as in the paper's tables."""
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)
