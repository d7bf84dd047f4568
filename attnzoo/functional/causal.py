"""Linear attention under a causal mask, by chunks: no sum is kept for each token."""

from torch import Tensor, fx
from torch.nn import functional as F


def causal_sums(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Σ_{j ≤ i} q_i·k_j v_j for each query i, the last query being where the last key is.

    Pairs are formed within chunks; t chunks hand on states (r e), so memory is n r e / w instead of the n r e of all
    prefix sums, and linear in the tokens.

    Args:
        q: (b h n r).
        k: (b h m r).
        v: (b h m e).
        chunk: w, in tokens; with w = r the states are as large as the tokens.
    """
    n, m = q.shape[2], k.shape[2]
    length = -(-max(n, m) // chunk) * chunk
    # (b h t w ·); what is too few stands in front, as zeros
    q, k, v = (F.pad(x, (0, 0, length - x.shape[2], 0)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    states = F.pad((k.mT @ v).cumsum(dim=2), (0, 0, 0, 0, 1, -1))  # of the chunks before
    return ((q @ k.mT).tril() @ v + q @ states).flatten(2, 3)[:, :, length - n :]


fx.wrap("causal_sums")  # symbolic tracing knows no lengths
