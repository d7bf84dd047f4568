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

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
