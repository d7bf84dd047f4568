"""Training methods of the papers, for any training loop: losses, and modules that belong to a loss."""

from attnzoo.methods.focal_region import focal_region_loss
from attnzoo.methods.reliability import ReliabilityBalance

__all__ = ["ReliabilityBalance", "focal_region_loss"]
