"""The balance loss of routers."""

from torch import Tensor

from attnzoo.functional.greatest import greatest


def balance_loss(shares: Tensor, active: int) -> Tensor:
    """E Σ_e P_e f_e: the least it can be, `active`, where a router treats all E experts alike.

    P_e is the mean of the router's shares for expert e, over all tokens of the batch, and f_e the part of the tokens
    that have e among the `active` best. Gradients reach the router through P. Fedus et al., "Switch Transformers",
    2021, arXiv:2101.03961, eq. 4-6, for the best one; Jin et al., "MoH", 2024, arXiv:2410.11842, for several.

    Args:
        shares: Softmax of the router over the experts, (b n k).
        active: How many experts a token has.
    """
    chosen = greatest(shares, active)
    return shares.shape[-1] * (shares.mean(dim=(0, 1)) * chosen.mean(dim=(0, 1))).sum()
