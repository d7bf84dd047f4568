"""Makes the pictures of the pages of probes, of the first run that each can look at: `python docs/pictures.py RUN...`.

    attnzoo train digits_softmax --data digits --epochs 20 --out runs/digits
    attnzoo train induction --out runs/induction
    python docs/pictures.py runs/digits runs/induction

The pictures are committed, since training takes minutes.
"""

import io
import sys
from pathlib import Path

from PIL import Image

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.subject import Subject
from attnzoo.train import open_run

FOLDER = Path(__file__).parent / "pictures"
OPTIONS = {"retrieval_score": "(needle=2)"}
"""What small models need."""
COLOURS = 64
"""Of a picture: flat areas need few, and files stay small."""


def picture(name: str, subjects: list[Subject]) -> str:
    """Draw what a probe finds in the first subject that has what it needs.

    Args:
        name: Of the probe.
        subjects: In order of preference.

    Returns:
        The name of the subject, or why there is no picture.
    """
    reasons = []
    for subject in subjects:
        try:
            found = attnzoo.probe(subject, name + OPTIONS.get(name, ""))
        except ZooError as error:
            reasons.append(error.diagnostics[0].message)
            continue
        drawn = io.BytesIO()
        found.figure().savefig(drawn, dpi=110, format="png")
        Image.open(drawn).convert("RGB").quantize(COLOURS).save(FOLDER / f"{name}.png", optimize=True)
        return subject.name
    return "; ".join(reasons)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    wanted = [Subject.of_run(open_run(run), count=128) for run in sys.argv[1:]]
    for probe in attnzoo.load_zoo().probes:
        print(f"{probe}: {picture(probe, wanted)}")  # noqa: T201
