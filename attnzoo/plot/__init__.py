"""Pictures, drawn by matplotlib: panels on any `Axes`, and sheets.

What draws one panel takes `ax=` and gives the `Axes`; without one it makes a `Picture`, which is `axes.figure`. What
draws a sheet gives a `Picture`, a `matplotlib.figure.Figure` that notebooks show. Nothing touches pyplot or rcParams:
any number of threads may draw, and the styles of whoever calls hold.

    import attnzoo, matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2)
    attnzoo.plot.attention_map(heat, image, ax=left)          heat (y x), image (c y x)
    attnzoo.plot.head_matrix(entropy, ax=right, label="nats") entropy (layers heads)
    attnzoo.plot.save(attnzoo.plot.learning_curves(run.log()), "curve.pdf")

matplotlib is imported with the first of these names.
"""

from importlib import import_module

_LAZY = {
    **dict.fromkeys(["Block", "Panel", "Row", "text_sheet", "token_map"], "attnzoo.plot.tokens"),
    **dict.fromkeys(["Shown", "attention_map", "heat_sheet"], "attnzoo.plot.heat"),
    **dict.fromkeys(
        ["comparison_curves", "growth_curves", "learning_curves", "lines"], "attnzoo.plot.curves"
    ),
    "head_matrix": "attnzoo.plot.matrix",
    **dict.fromkeys(["Picture", "check_file", "encoded", "save", "svg"], "attnzoo.plot.picture"),
}

__all__ = sorted(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'attnzoo.plot' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
