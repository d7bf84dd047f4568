"""The dictionary of RestoreFormer++: what good features look like, learnt by looking up the nearest entry.

Wang et al., "RestoreFormer++: Towards Real-World Blind Face Restoration from Undegraded Key-Value Pairs", 2023, TPAMI,
arXiv:2308.07228, the reconstruction-oriented dictionary; the quantisation is that of VQ-VAE, arXiv:1711.00937.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.errors import MissingMap, OptionError


class Priors(NamedTuple):
    """What a dictionary has for a feature map.

    Args:
        features: The nearest entry at each place, (b c y x); the gradient passes to the features that were looked up.
        loss: What brings features and entries together, a scalar.
        entries: Which entry it is, whole numbers (b y x); of equally near ones the first.
    """

    features: Tensor
    loss: Tensor
    entries: Tensor


class PriorDictionary(nn.Module):
    """e_k(p) at each place p, k(p) = argmin_k ‖z_p − e_k‖: the entries of a dictionary that are nearest to features z.

    The loss is mean(‖sg(e_k(p)) − z_p‖²) + β mean(‖e_k(p) − sg(z_p)‖²), sg without gradient: means over all numbers.
    `prior_cross` then lets degraded features ask the priors.

    Args:
        dim: Channels of the features.
        entries: How many entries there are.
        beta: β.
        weighed: What β weighs: `entries`, how fast they follow the features, as in the authors' code; or `features`,
            how much they commit themselves, as in VQ-VAE.

    Raises:
        OptionError: AZ214, without channels or entries, or for a `weighed` that there is not.
    """

    def __init__(
        self,
        dim: int = 256,
        entries: int = 1024,
        *,
        beta: float = 0.25,
        weighed: Literal["entries", "features"] = "entries",
    ):
        super().__init__()
        if dim < 1 or entries < 1 or weighed not in ("entries", "features"):
            raise OptionError(
                f"a dictionary of {entries} entries of {dim} channels, and β that weighs `{weighed}`",
                help="it takes one entry and one channel or more, and β weighs `entries` or `features`",
            )
        self.beta, self.weighed = beta, weighed
        self.entries = nn.Parameter(torch.empty(entries, dim))
        self.init_weights()

    def init_weights(self) -> None:
        """Uniform between −1 and 1 by the number of entries, as the authors' code."""
        nn.init.uniform_(self.entries, -1 / len(self.entries), 1 / len(self.entries))

    def forward(self, features: Tensor) -> Priors:
        """The priors of features.

        Args:
            features: z, (b c y x).

        Raises:
            MissingMap: AZ409, for a map of other axes or channels.
        """
        dim = self.entries.shape[1]
        if features.ndim != 4 or features.shape[1] != dim:
            raise MissingMap(
                "AZ409",
                f"features {tuple(features.shape)} cannot be looked up among entries of {dim} channels",
                help=f"hand over a feature map (b {dim} y x)",
            )
        z = features.movedim(1, -1)  # (b y x c)
        wide = torch.promote_types(z.dtype, torch.float32)  # neighbours are not told apart in half precision
        apart = torch.cdist(
            z.detach().to(wide).flatten(0, 2), self.entries.detach().to(wide),
            compute_mode="donot_use_mm_for_euclid_dist",
        )  # fmt: skip
        nearest = apart.argmin(dim=-1).unflatten(0, z.shape[:-1])
        found = F.embedding(nearest, self.entries)
        to_entries, to_features = F.mse_loss(z, found.detach()), F.mse_loss(found, z.detach())
        one, other = (1.0, self.beta) if self.weighed == "entries" else (self.beta, 1.0)
        passed = z + (found - z).detach()
        return Priors(passed.movedim(-1, 1), one * to_entries + other * to_features, nearest)
