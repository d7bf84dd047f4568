"""The learning curve as files of a run: losses and test accuracy by epoch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnzoo.train.checkpoint import replace


def draw_curve(log: Sequence[dict[str, Any]], folder: Path, kinds: Sequence[str] = ("svg",)) -> list[Path]:
    """Write the curve as `curve.svg` and the like, each as a whole or not at all.

    Args:
        log: Rows of `Run.log()`; without any, nothing is drawn.
        folder: Of the run, whose name stands above.
        kinds: Of `png`, `svg` and `pdf`.

    Returns:
        What was written.

    Raises:
        RunError: AZ804.
    """
    from attnzoo.plot import encoded, learning_curves

    if not log:
        return []
    picture = learning_curves(log, folder.name)
    for kind in kinds:
        replace(folder / f"curve.{kind}", encoded(picture, kind))
    return [folder / f"curve.{kind}" for kind in kinds]
