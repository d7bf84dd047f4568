# The public names and where they come from: type checkers read this file, and what it names is imported on demand.

from .curves import comparison_curves, growth_curves, learning_curves, lines
from .heat import Shown, attention_map, heat_sheet
from .matrix import head_matrix
from .picture import Picture, check_file, encoded, save, svg
from .tokens import Block, Panel, Row, text_sheet, token_map

__all__ = [
    "Block",
    "Panel",
    "Picture",
    "Row",
    "Shown",
    "attention_map",
    "check_file",
    "comparison_curves",
    "encoded",
    "growth_curves",
    "head_matrix",
    "heat_sheet",
    "learning_curves",
    "lines",
    "save",
    "svg",
    "text_sheet",
    "token_map",
]
