"""In-context linear regression: pairs (x, y) of a new linear function in every sequence, then an x alone.

He, Pan, Chen, Yang, arXiv:2503.12734; Garg et al., arXiv:2208.01066. The best predictor is known: `ridge`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.data.chance import Chance, step_seeds
from attnzoo.data.sequences.options import check_size, option, options
from attnzoo.data.sequences.sequence_data import TEST, TRAIN, InMemory, SequenceData


@dataclass(frozen=True)
class RegressionOptions:
    """Options of `regression`.

    Args:
        dim: Numbers in x, d.
        examples: Pairs per sequence, L.
        noise: Standard deviation σ of what is added to y.
        condition: Greatest variance of the numbers in x over the least, κ; 1 makes them alike.
        train: Sequences to train on.
        test: Sequences to test on.
    """

    dim: int = option(5, 1, 256)
    examples: int = option(20, 1, 2048)
    noise: float = option(0.0, 0, 100)
    condition: float = option(1.0, 1, 1_000_000)
    train: int = option(20_000, 1, 1_000_000)
    test: int = option(2_000, 1, 100_000)


def regression_options(name: str) -> RegressionOptions:
    """The options in a name.

    Args:
        name: As for `load_regression`.

    Raises:
        DataError: AZ715 for options that are wrong or do not go together.
    """
    o = options(RegressionOptions, name)
    check_size(name, max(o.train, o.test), (o.examples + 1) * (o.dim + 1))
    return o


def load_regression(name: str, seed: int) -> SequenceData:
    """Draw them: w from N(0, I), all x from N(0, Σ), y = wᵀx + σ ε with ε from N(0, 1).

    Σ is diagonal, its entries fall from √κ to 1 / √κ by equal factors; it is I for κ = 1, and where x is one number.
    Tokens are the vectors (x; y) and, last, (x; 0), where its y is asked. Its y has noise too, as the others have.

    Args:
        name: `regression`, with options such as `regression:dim=5,examples=20,noise=0.1`.
        seed: What they are drawn from.

    Raises:
        DataError: AZ715 for options that are wrong.
    """
    o = regression_options(name)
    train, test = (_side(seed, side, count, o) for side, count in ((TRAIN, o.train), (TEST, o.test)))
    return SequenceData(name, None, o.dim + 1, 1, True, o.examples + 1, train, test)


def ridge(inputs: Tensor, noise: float) -> Tensor:
    """The answer of one who knows how sequences are drawn: ŷ = x_qᵀ (XᵀX + σ² I)⁻¹ Xᵀ y, the posterior's mean.

    Without noise it is least squares, of the smallest norm where examples are too few. No predictor has a smaller
    expected squared error.

    Args:
        inputs: float (b n e), as `load_regression` makes them.
        noise: σ.

    Returns:
        float64 (b,).
    """
    x, y, query = inputs[:, :-1, :-1].double(), inputs[:, :-1, -1:].double(), inputs[:, -1:, :-1].double()
    return (query @ solve(x, noise) @ y)[:, 0, 0]


def gradient_step(inputs: Tensor, debiased: bool = False) -> Tensor:
    """The answer after one step of gradient descent from w = 0, of size 1, on the mean of (y - wᵀx)² / 2 over examples.

    ŷ = (1/L) Σ_l y_l x_l · x_q; debiased (1/L) Σ_l y_l (x_l - x̄) · x_q, which two softmax heads of opposite signs come
    to: (1/2γ) Σ_l y_l [softmax_l(γ x_l · x_q) - softmax_l(-γ x_l · x_q)] as γ → 0 (He et al., arXiv:2503.12734).

    Args:
        inputs: float (b n e), as `load_regression` makes them.
        debiased: Whether the mean x̄ of the examples is taken off.

    Returns:
        float64 (b,).
    """
    x, y, query = inputs[:, :-1, :-1].double(), inputs[:, :-1, -1:].double(), inputs[:, -1:, :-1].double()
    x = x - x.mean(dim=1, keepdim=True) if debiased else x
    return (query @ x.mT @ y)[:, 0, 0] / x.shape[1]


def solve(x: Tensor, noise: float) -> Tensor:
    """(b d k): the matrix that makes the posterior mean of w of the y to these x; without noise, of least norm.

    Args:
        x: Examples (b k d).
        noise: σ.
    """
    if noise == 0:
        return torch.linalg.pinv(x)
    return torch.linalg.solve(x.mT @ x + noise**2 * torch.eye(x.shape[-1]).to(x), x.mT)


def _side(seed: int, side: int, count: int, o: RegressionOptions) -> InMemory:
    chance, tokens = Chance(step_seeds(seed, side, torch.arange(count))), o.examples + 1
    w = chance.normal(o.dim).view(count, o.dim, 1)
    x = chance.normal(tokens * o.dim).view(count, tokens, o.dim)
    if o.condition > 1 and o.dim > 1:
        x = x * o.condition ** torch.linspace(0.25, -0.25, o.dim)  # roots of the variances
    y = x @ w  # (count, L + 1, 1)
    if o.noise:
        y = y + o.noise * chance.normal(tokens)[..., None]
    inputs, targets = torch.cat((x, y), dim=-1), torch.full_like(y, torch.nan)
    targets[:, -1], inputs[:, -1, -1] = y[:, -1], 0
    return InMemory(inputs, targets)
