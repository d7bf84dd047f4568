"""Grafting: other attention in a trained timm ViT, with its weights; and the way back."""

from attnzoo.grafting.distillation import Distillation, Stage, distil
from attnzoo.grafting.donor import GraftError
from attnzoo.grafting.grafts import Graft, graft, save_graft, ungraft
from attnzoo.grafting.ledger import Donor, Ledger, Row

__all__ = [
    "Distillation",
    "Donor",
    "Graft",
    "GraftError",
    "Ledger",
    "Row",
    "Stage",
    "distil",
    "graft",
    "save_graft",
    "ungraft",
]
