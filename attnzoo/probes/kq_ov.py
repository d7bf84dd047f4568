"""The two circuits of each head, from its weights alone.

Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021; identity fits and zero sums after He et al.,
"In-Context Linear Regression Demystified", 2025, arXiv:2503.12734.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.core import InstrumentCard, MultiHead, Paper, Probe
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding

Circuit = tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor, Tensor]]
"""What is said of projections around heads, with their W_Q, W_K, W_V (h c d) and W_O (h d c)."""


@dataclass(kw_only=True, eq=False)
class KqOv(Probe):
    """W_KQ = W_K W_Qᵀ / √d and W_OV = W_V W_O of each head, (c c), for tokens that are rows: q = x W_Q, o = A x W_V
    W_O.

    So the score of query i and key j is x_j W_KQ x_iᵀ. Columns, for M = W_KQ (`kq_`) and M = W_OV (`ov_`), which are
    NaN where M is not square because a context has another width:

    `diagonality` ‖diag M‖² / ‖M‖²; `homogeneity` 1 − std(diag M) / |mean(diag M)|; `alpha` tr M / c, the α of the
    closest αI; `residual` ‖M − αI‖ / ‖M‖. Of W_OV also `last` = |M_cc| / ‖M‖ and `copying` = Σ λ / Σ |λ| over its
    eigenvalues. `zero_sum` is |Σ_h μ_h| / Σ_h |μ_h| over the heads of a layer, μ_h being the last entry of W_OV: 0
    where heads cancel each other. M = αI has diagonality 1 and copying sign(α); a random M about 1/c and 0.

    The arrays `k_composition`, `q_composition`, `v_composition` hold ‖W_OV^a W_KQ^b‖ / (‖W_OV^a‖ ‖W_KQ^b‖), the same
    with (W_KQ^b)ᵀ, and with W_OV^b, for head a of an earlier site than head b, NaN elsewhere; rows are a, columns b,
    in the order of the table. All norms are Frobenius'.
    """

    card = InstrumentCard(
        "kq_ov",
        "What each head's query-key and output-value weights are: diagonal, copying, composed.",
        equation="W_KQ = W_K W_Qᵀ / √d,  W_OV = W_V W_O",
        paper=Paper(
            "A Mathematical Framework for Transformer Circuits",
            "Elhage et al.",
            2021,
            "transformer-circuits.pub/2021/framework",
        ),
        fidelity="adapted",
        notes="Weights alone: biases, norms before and inside the projections, turned positions and what "
        "the mechanism makes of scores are left out. Nothing is run.",
    )

    def measure(self, subject) -> Finding:
        circuits, left = _circuits(subject)
        table = []
        for about, w in circuits:
            (q, k, v, o), (c, d) = w, w[0].shape[-2:]  # (h c d) each; o is (h d c)
            kq, ov = k @ q.mT / d**0.5, v @ o  # (h c c)
            same = kq.shape[-2] == c
            alone = _of_matrix(kq if same else None, "kq_", len(q)) | _of_matrix(
                ov if same else None, "ov_", len(q)
            )
            nowhere = torch.full((len(q),), torch.nan)
            last = ov[:, -1, -1]
            alone["ov_last"] = last.abs() / _norm(ov) if same else nowhere
            values = torch.linalg.eigvals(o @ v) if same else nowhere  # those of v @ o that are not 0, (h d)
            alone["ov_copying"] = (
                values.sum(-1).real / values.abs().sum(-1).clamp(min=_TINY) if same else nowhere
            )
            zero_sum = last.sum().abs() / last.abs().sum().clamp(min=_TINY)
            alone["zero_sum"] = zero_sum.expand(len(q)) if same else nowhere
            for head in range(len(q)):
                numbers = {name: float(column[head]) for name, column in alone.items()}
                table.append(about | {"head": head} | numbers)
        notes = [f"{', '.join(left)}: no projections around the heads."] if left else []
        return Finding.of(table, shows="ov_copying", notes=notes, arrays=_compositions(circuits))

    def draw(self, finding: Finding, figure: Any) -> None:
        figure.set_size_inches(11, 3.4)
        heads, *composed = figure.subplots(1, 4, width_ratios=(1.3, 1, 1, 1))
        layers = np.array(finding["layer"])
        for name in ("kq_diagonality", "ov_diagonality", "ov_copying"):
            heads.plot(layers, finding[name], "o", markersize=4, alpha=0.7, label=name.replace("_", " ", 1))
        heads.axhline(0, color="0.8", linewidth=1, zorder=0)
        heads.set(xlabel="layer", xticks=sorted(set(finding["layer"])), title="heads")
        heads.legend(fontsize="small")
        most = max((np.nanmax(a) for a in finding.arrays.values() if not np.isnan(a).all()), default=1)
        for axes, (name, scores) in zip(composed, finding.arrays.items(), strict=True):
            picture = axes.imshow(scores, vmin=0, vmax=most)
            axes.set(xlabel="later head", title=name.replace("_composition", " composition"))
        composed[0].set_ylabel("earlier head")
        figure.colorbar(picture, ax=composed, shrink=0.8)


_TINY = torch.finfo(torch.float64).tiny


def _circuits(subject: Any) -> tuple[list[Circuit], list[str]]:
    """What is said of each MultiHead of the model, with its W_Q, W_K, W_V (h c d) and W_O (h d c); and who has
    none."""
    found: list[Circuit] = []
    left: list[str] = []
    seen: set[MultiHead] = set()
    for leaf in subject.leaves:
        around = [
            m for m in leaf.outer.modules() if isinstance(m, MultiHead) and leaf.component in m.modules()
        ]
        if not around:
            left.append(leaf.name)
        elif around[0] not in seen:
            seen.add(around[0])
            about = subject.about(leaf)
            within = [one for one in subject.leaves if one.component in around[0].modules()]
            about["branch"] = "+".join(subject.about(one)["branch"] for one in within)
            found.append((about, projections(around[0])))
    if not found:
        raise ZooError(
            "AZ924",
            f"no mechanism of `{subject.name}` has projections around its heads",
            why="circuits are products of the projections of queries, keys, values and output",
            help="`attnzoo show NAME` says how a mechanism is made",
        )
    return found, left


@torch.no_grad()
def projections(outer: MultiHead) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K, W_V, (h c d) each, and W_O, (h d c), of projections around a head, in double precision.

    They are what the layers make of one-hot tokens, less what they make of none: with everything that somebody added.

    Args:
        outer: It.
    """
    d = outer.head_dim
    if outer.context_dim is not None:
        (q,), (k, v) = _heads(outer.q, d, 1), _heads(outer.kv, d, 2)
    elif outer.qkv_fused:
        q, k, v = _heads(outer.qkv, d, 3)
    else:
        (q,), (k,), (v,) = (_heads(layer, d, 1) for layer in (outer.q_proj, outer.k_proj, outer.v_proj))
        k, v = (t.repeat_interleave(outer.sharing, dim=0) for t in (k, v))
    return q, k, v, _matrix(outer.proj).unflatten(0, (-1, d))


def _heads(layer: nn.Module, d: int, parts: int) -> Tensor:
    """(parts h c d)."""
    return _matrix(layer).unflatten(1, (parts, -1, d)).permute(1, 2, 0, 3)


def _matrix(layer: nn.Module) -> Tensor:
    """(c in, c out): a row for each one-hot token."""
    weight = next(layer.parameters())
    one_hot = torch.eye(layer.in_features, dtype=weight.dtype, device=weight.device)  # type: ignore[call-overload]
    return (layer(one_hot).double() - layer(torch.zeros_like(one_hot[:1])).double()).cpu()


def _norm(m: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(m).clamp(min=_TINY)


def _of_matrix(m: Tensor | None, prefix: str, heads: int) -> dict[str, Tensor]:
    """Diagonality, homogeneity, alpha and residual of each head, (h); NaN of what is not square."""
    if m is None:
        nan = torch.full((heads,), torch.nan)
        return {f"{prefix}{name}": nan for name in ("diagonality", "homogeneity", "alpha", "residual")}
    diagonal = m.diagonal(dim1=-2, dim2=-1)
    alpha = diagonal.mean(dim=-1)
    rest = m - alpha[:, None, None] * torch.eye(m.shape[-1]).to(m)
    return {
        f"{prefix}diagonality": diagonal.square().sum(-1) / _norm(m).square(),
        f"{prefix}homogeneity": 1 - diagonal.std(dim=-1, correction=0) / alpha.abs().clamp(min=_TINY),
        f"{prefix}alpha": alpha,
        f"{prefix}residual": _norm(rest) / _norm(m),
    }


def _compositions(circuits: list[Circuit]) -> dict[str, np.ndarray]:
    """How much the heads of later sites read of what those of earlier ones write, (heads heads) for keys, queries
    and values."""
    starts = np.cumsum([0, *(len(w[0]) for _, w in circuits)])
    names = "k_composition", "q_composition", "v_composition"
    found = {name: np.full((starts[-1], starts[-1]), np.nan) for name in names}
    for i, (first, (_, _, v, o)) in enumerate(circuits):
        for j, (second, (q, k, later_v, later_o)) in enumerate(circuits):
            if first["layer"] >= second["layer"]:
                continue
            for name, (read, back) in zip(names, ((k, q.mT), (q, k.mT), (later_v, later_o)), strict=True):
                if o.shape[-1] != read.shape[-2]:
                    continue
                # ‖V (O R) B‖ is the norm of small triangles around O R: orthogonal factors of V and B change no norm
                left, right = torch.linalg.qr(v).R, torch.linalg.qr(back.mT).R
                middle = o[:, None] @ read  # (a b d d)
                composed = torch.linalg.matrix_norm(left[:, None] @ middle @ right.mT)
                both = _norm(left @ o)[:, None] * _norm(read @ right.mT)
                here = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
                found[name][here] = (composed / both).numpy()
    return found
