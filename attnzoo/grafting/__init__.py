"""Grafting: other attention in a trained timm ViT, with its weights; and the way back."""

from attnzoo.grafting.graft import Graft, graft, save_graft, ungraft
from attnzoo.grafting.ledger import Donor, Ledger, Row

__all__ = ["Donor", "Graft", "Ledger", "Row", "graft", "save_graft", "ungraft"]
