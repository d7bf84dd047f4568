"""Training: one loop, one checkpoint format, exact resume."""

from attnzoo.train.loop import Stopped, train
from attnzoo.train.metrics import Evaluation, evaluate
from attnzoo.train.run import Run, open_run
from attnzoo.train.settings import Settings, prepare

__all__ = ["Evaluation", "Run", "Settings", "Stopped", "evaluate", "open_run", "prepare", "train"]
