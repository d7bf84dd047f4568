"""Training methods of the papers, for any training loop: losses, and modules that belong to a loss."""

from attnzoo.methods.dual_cross import DualCrossTransformer, dual_cross
from attnzoo.methods.focal_region import focal_region_loss
from attnzoo.methods.prior_dictionary import PriorDictionary, Priors
from attnzoo.methods.reliability import ReliabilityBalance

__all__ = [
    "DualCrossTransformer", "PriorDictionary", "Priors", "ReliabilityBalance", "dual_cross", "focal_region_loss",
]  # fmt: skip
