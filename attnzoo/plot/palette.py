"""Colours and sizes that all pictures share."""

HEAT = "inferno"
"""matplotlib's name of the scale of attention maps: its brightness only grows."""
INK, PALE, RULE, PAPER = "#1c1c1e", "#76767c", "#d6d6dc", "#ffffff"
GREEN, RED = "#107c36", "#c41e28"
"""What is right and what is wrong."""
MISSING, FORBIDDEN = "#eeeef0", "#e2e4ea"
"""Where there is no value, and where none may be: tokens to come."""
SERIES = ("#555555", "#1d4ed8", "#c2410c", "#047857", "#7c3aed", "#b91c1c", "#0e7490", "#a16207")
"""Of lines, in their order."""
TITLE, TEXT, SMALL = 18, 13, 11
"""Sizes of letters in pixels."""
DPI = 100
"""Pixels of an inch."""
MARGIN, GAP, LINE, NOTE = 16, 8, 18, 16
"""Of a sheet, in pixels: its edge, between panels, from one line of text to the next, likewise of small text."""
Line = tuple[str, str | None]
"""A line of text and its colour; None for the usual ink."""


def points(pixels: float) -> float:
    """A size of letters, as matplotlib counts it."""
    return pixels * 72 / DPI
