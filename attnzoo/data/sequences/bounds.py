"""What a model that sees only the last tokens can reach at best: floors and ceilings to hold a result against.

A model's window is its receptive field: w when its answer at a position depends on that position's number and the w
inputs up to and at it, and on nothing else. One layer of local attention of width r has w = r; each further one adds
r - 1.
"""

import torch
from torch import Tensor

from attnzoo.data.sequences.regression import solve
from attnzoo.data.sequences.sequence_data import IGNORE


def recall_accuracy(inputs: Tensor, targets: Tensor, window: int, vocab: int, passes: int = 1) -> float:
    """The highest accuracy in `recall` that a model can expect on these sequences, over the draw of the values.

    A query whose value stands in the window may be answered. The value of any other is, given all that the window
    shows, uniform among the V/2 values without the c that it does show, so no answer is right more often than
    1 / (V/2 - c). For odd w this is reached. For even w the first token in sight may be a value whose key is not, and
    the ceiling is a little too high.

    Args:
        inputs: int64 (b L).
        targets: int64 (b L).
        window: Tokens that the model sees, w.
        vocab: V.
        passes: How often keys and values stand there; the last time counts.
    """
    asked = targets != IGNORE
    pairs = int(asked[0].sum())
    last = 2 * pairs * (passes - 1)  # where they stand there last
    row, at = asked.nonzero(as_tuple=True)
    begin = (at - window + 1).clamp(min=0)  # first position in sight
    values = inputs[row, 1 : 2 * pairs : 2]  # (queries n), at positions 1, 3, …
    value_at = last + 2 * (values == targets[row, at, None]).long().argmax(dim=1) + 1
    shown = (pairs * passes - begin // 2).clamp(min=0, max=pairs)  # values at an odd position from `begin` on
    chance = 1 / (vocab - vocab // 2 - shown).double()
    return float(torch.where(value_at >= begin, 1, chance).mean())


def counted(inputs: Tensor, targets: Tensor, window: int) -> tuple[float, float]:
    """The highest accuracy and the lowest log-loss on these very token sequences, of any function of place and window.

    Questions with the same place and window get the same answer. So the best answer is the commonest target among them,
    and the best distribution is their shares. This holds for every data set without assumptions; it says little
    where most windows occur once.

    Args:
        inputs: int64 (b n).
        targets: int64 (b n), -100 where nothing is asked.
        window: Tokens that the model sees, w.

    Returns:
        Share of questions, and nats per question.
    """
    row, at = (targets != IGNORE).nonzero(as_tuple=True)
    labels, group = targets[row, at], at
    for lag in range(window):
        token = torch.where(at >= lag, inputs[row, (at - lag).clamp(min=0)], -1) + 1
        group = torch.unique(group * (int(inputs.max()) + 2) + token, return_inverse=True)[1]
    classes = int(labels.max()) + 1
    cells, counts = torch.unique(group * classes + labels, return_counts=True)
    group, counts = cells // classes, counts.double()
    groups = int(group.max()) + 1
    total = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, counts)
    best = torch.zeros(groups, dtype=torch.float64).scatter_reduce_(0, group, counts, "amax")
    loss = -(counts * (counts / total[group]).log()).sum() / counts.sum()
    return float(best.sum() / counts.sum()), float(loss)


def regression_error(inputs: Tensor, window: int, noise: float) -> float:
    """The lowest mean squared error in `regression` that a model can expect on these sequences, over the draw of w.

    With k = w - 1 examples in sight the posterior of w has the covariance I - (XᵀX + σ² I)⁻¹ XᵀX; the variance of the
    answer is x_qᵀ of that x_q, plus σ². Without noise its mean over x_q is exactly d - k for k < d.

    Args:
        inputs: float (b n e).
        window: Tokens that the model sees, the query among them; at least 1.
        noise: σ.
    """
    x, query = inputs[:, :-1, :-1].double(), inputs[:, -1:, :-1].double()
    x = x[:, max(0, x.shape[1] - (window - 1)) :]
    left = query - query @ solve(x, noise) @ x if x.shape[1] else query
    return float((left @ query.mT).mean()) + noise**2
