"""Makes the pictures of the pages of probes and interventions: `python docs/pictures.py RUN...`.

A probe looks at the first run that it can look at; interventions change the first, which is of images.

    attnzoo train digits_softmax --data digits --epochs 20 --out runs/digits
    attnzoo train induction --out runs/induction
    python docs/pictures.py runs/digits runs/induction

The pictures are committed, since training takes minutes.
"""

import io
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import attnzoo
from attnzoo import plot
from attnzoo.errors import ZooError
from attnzoo.lab.maps import collect
from attnzoo.lab.rollout import mean_map
from attnzoo.lab.subject import Subject
from attnzoo.train import open_run

FOLDER = Path(__file__).parent / "pictures"
HALVES = [[1, 1, 1, 1, 2, 2, 2, 2]] * 8
OPTIONS = {
    "retrieval_score": "(needle=2)",
    "isolate": f"(regions={HALVES})",
    "inject": "(attention={'blocks.0': 1.0, 'blocks.1': 0.5}, attention_strength=1.0)",
    "multi_reference": "(references=[1])",
    "redistribute_sink": "(threshold=2.5, keep=0.2)",
    "reinforce_heads": "(heads=[0, 1])",
    "reposition": "(boxes=[[0, 0, 4, 4], [4, 4, 8, 8]])",
    "temperature": "(value=0.25)",
    "ablate_heads": "(heads=[0, 1])",
    "keep_top": "(keys=3)",
}
"""What small models need, and what shows."""
COLOURS = 128
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
        written(found.figure(), name)
        return subject.name
    return "; ".join(reasons)


def change(name: str, subject: Subject) -> None:
    """Draw what a model looks at, and what it answers, without an intervention and with it.

    Args:
        name: Of the intervention.
        subject: Of images.
    """
    images = subject.batches[0].inputs[0][:2]
    bytes_of = (images[0] - images[0].min()) / (images[0].max() - images[0].min()) * 255
    figure, text = Figure(figsize=(7.2, 2.5), layout="constrained"), name + OPTIONS.get(name, "")
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.2])
    axes[0].imshow(bytes_of.byte().permute(1, 2, 0).numpy())
    axes[0].set_axis_off()
    for i, (title, changes) in enumerate((("as it is", []), (name.replace("_", " "), [text]))):
        with attnzoo.intervene(subject.model, *changes):
            maps = collect(subject.model, images)
        heat = mean_map(maps, maps.branches()[0])[0]
        plot.attention_map(heat, bytes_of.byte(), axes[1 + i], unit=1 / maps.layout.length)
        axes[1 + i].set_title(title)
        shares = maps.logits[0].softmax(dim=-1).tolist()
        axes[3].barh([k + 0.4 * i for k in range(len(shares))], shares, height=0.4, label=title)
    axes[3].set(xlim=(0, 1), xlabel="probability", ylabel="class", yticks=range(len(shares)))
    axes[3].legend(fontsize=7)
    written(figure, name)


def written(figure: Figure, name: str) -> None:
    """Write a picture with few colours."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    wanted = [Subject.of_run(open_run(run), count=128) for run in sys.argv[1:]]
    for probe in attnzoo.load_zoo().probes:
        print(f"{probe}: {picture(probe, wanted)}")  # noqa: T201
    for intervention in attnzoo.load_zoo().interventions:
        change(intervention, wanted[0])
