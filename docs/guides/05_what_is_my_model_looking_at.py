"""
What is my model looking at?
============================

Attention maps are easily drawn and easily believed. This guide draws them, measures them with probes, and
then asks the question that a picture cannot answer: does the model *use* what it looks at? For that we
change the attention while the model runs, and see what becomes of the answer.

The model is small and learns digits in seconds, so that everything runs here. The same calls work on any
model that attnzoo composes and on timm's own ViTs.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch

import attnzoo
from attnzoo.data import evaluation
from attnzoo.lab.maps import collect
from attnzoo.lab.rollout import mean_map, rollout
from attnzoo.lab.subject import Subject
from attnzoo.train import prepare, train

scratch = tempfile.TemporaryDirectory()
work = Path(scratch.name)

# %%
# A model to look into
# --------------------
# .. code-block:: console
#
#     $ attnzoo train digits_softmax --epochs 12 --out runs/digits

recipe, settings = prepare("digits_softmax", ["train.epochs=12"])
run = train(recipe, settings, work / "digits")
model = run.model()
print(f"{run.evaluate().accuracy:.1%} of {run.evaluate().images} test images")

# %%
# Maps
# ----
# ``collect`` runs the model once and keeps the map of every layer, branch and head; while nobody looks, the
# fused kernels run and no map is ever formed. Each token of an 8 × 8 grid stands for 4 × 4 pixels. Numbers
# below a map are in even shares: 1 is what every token would get if all got the same. *Read them before the
# colours*, because each map has the whole scale to itself.
#
# The mean over layers and heads leaves out how layers follow each other; the rollout (Abnar and Zuidema,
# 2020) multiplies them, with the residual as half of each. Both leave out values, norms and MLPs. They show
# where attention goes, not what is done with it.

data = run.data()
chosen = torch.tensor([3, 40, 77, 120])
images, labels = data.test.batch(chosen)
maps = collect(model, evaluation(data.image, data.mean, data.std)(images))
flow = maps.asked(rollout(maps))

figure, axes = plt.subplots(3, 4, figsize=(8, 6.6), layout="constrained")
for j in range(4):
    axes[0, j].imshow(images[j].permute(1, 2, 0))
    said = maps.logits[j].softmax(dim=-1).max(dim=-1)
    axes[0, j].set_title(f"{data.classes[labels[j]]}: says {data.classes[said.indices]}, {said.values:.0%}")
    axes[0, j].set(xticks=[], yticks=[])
    for ax, heat in ((axes[1, j], mean_map(maps, "softmax")[j]), (axes[2, j], flow[j])):
        attnzoo.plot.attention_map(heat, images[j], ax=ax, unit=1 / maps.layout.length)
for ax, name in zip(axes[:, 0], ("image", "mean map", "rollout"), strict=True):
    ax.set_ylabel(name)

# %%
# The sheet of all heads is one command:
#
# .. code-block:: console
#
#     $ attnzoo heatmap runs/digits --what heads
#
# Probes
# ------
# A probe measures one thing over many images and gives a table, a CSV and a figure. How spread out does
# each head attend?

subject = Subject.of_run(run, count=128)  # the model, 128 test images and their labels
entropy = attnzoo.probe(subject, "entropy")
print(entropy)
entropy_figure = entropy.figure()

# %%
# ``keys`` is the number of tokens among which a head would have to divide its attention evenly to be as
# spread out. ``attnzoo list probes`` names what else can be measured. Two that look at heads from different
# sides: how much the loss grows when a head is taken away, and which labels what a head gives can tell
# apart by itself (clusters of labels, their signal-to-noise ratio).

importance, performance = attnzoo.probe(subject, "head_importance(by='leave_one_out')", "head_performance")
figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.6), layout="constrained")
shown = ((entropy, "entropy", "nats"), (importance, "loss", "loss without it"), (performance, "snr", "SNR"))
for ax, (found, column, label) in zip(axes, shown, strict=True):
    attnzoo.plot.head_matrix(
        found.matrix(column), ax=ax, rows=found.layers(), columns=found.heads(), label=label
    )
    ax.set_title(found.name.replace("_", " "))

# %%
# Does it use what it looks at?
# -----------------------------
# An intervention changes something inside the model for as long as a ``with`` block lasts, and leaves no
# trace. So the map becomes a hypothesis that can fail: if the head that the probe calls most important is
# taken away, the accuracy should fall more than without the one it calls least important.

ranked = importance.sorted("loss")
most, least = ranked[0], ranked[-1]
inputs, targets = subject.batches[0].inputs[0], subject.targets(subject.batches[0])


def accuracy(*changes: str) -> float:
    """Of the first batch, with the model changed for this moment."""
    with attnzoo.intervene(model, *changes), torch.no_grad():
        return (model(inputs).argmax(dim=-1) == targets).float().mean().item()


print(f"as it is:                          {accuracy():.1%}")
for name, row in (("most", most), ("least", least)):
    without = accuracy(f'ablate_heads(at="{row["site"]}", heads=[{row["head"]}])')
    print(f"without the {name:5} important head:    {without:.1%}   ({row['site']}, head {row['head']})")
print(f"all heads look everywhere alike:   {accuracy('uniform()'):.1%}")
print(f"every head a little sharper:       {accuracy('temperature(value=0.8)'):.1%}")
print(f"every query keeps its best 8 keys: {accuracy('keep_top(keys=8)'):.1%}")
print(f"as it was:                         {accuracy():.1%}")

# %%
# ``uniform`` replaces each row of attention by its mean over the keys. What is lost then is what *where the
# model looks* is worth; what is left comes from values, positions and MLPs. The same on the command line:
#
# .. code-block:: console
#
#     $ attnzoo eval runs/digits --with 'uniform()'
#     $ attnzoo probe runs/digits entropy head_importance head_performance
#
# How sure is it?
# ---------------
# 128 images, one model, one seed. ``head_importance`` gives each head an interval and a p-value by paired
# bootstrap of the images; what another training run would have given, they do not know. Heads have no
# names: in another run, head 2 is another head.

for row in ranked[:3]:
    interval = f"{row['low']:.2f} to {row['high']:.2f} (95 %), p = {row['p']:.3f}"
    print(f"{row['site']} head {row['head']}: the loss grows by {row['loss']:.2f}, {interval}")

# %%
# timm's own models
# -----------------
# A model of timm has no taps; it gets some for as long as somebody looks. Weights, state dict and answers
# stay as they are. Here is a ViT without pretrained weights, because there is no network here: its heads
# attend nearly evenly, which is what an untrained model should show. With ``pretrained=True`` it is the
# same call.

torch.manual_seed(0)
plain = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=64).eval()
photo = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    before = plain(photo)
found = attnzoo.probe(plain, "entropy", inputs=photo)
with torch.no_grad():
    print("answers unchanged:", torch.equal(before, plain(photo)))
shares = found.matrix("share")
print(f"shares of the most entropy there can be: {shares.min():.4f} to {shares.max():.4f}")

scratch.cleanup()

# %%
# What to read next
# -----------------
# * :doc:`/docs/probes`: all probes and interventions, and how to write one
# * :doc:`/docs/heatmaps`: what each map is, what is exact about it and what is not
# * :doc:`/docs/evidence`: claims of papers that were asked with five seeds, and what came out
