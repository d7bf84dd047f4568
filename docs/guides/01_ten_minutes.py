"""
Ten minutes
===========

attnzoo has about a hundred attention mechanisms, each in one file, each with a *card* of claims (masks,
symmetries, cost, paper) to which a test suite holds it. A *recipe* puts them into a backbone, and what
comes out is a timm model like any other.

Here we find a mechanism, use it in a network of our own, compose a model, train it on real data that need
no download, look at what it attends to, and hold a mechanism to its card. It takes ten minutes to read and
about half a minute to run.

.. code-block:: console

    $ pip install torch torchvision attnzoo
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import attnzoo

command = [sys.executable, "-m", "attnzoo"]  # the command `attnzoo`, of this Python
scratch = tempfile.TemporaryDirectory()
work = Path(scratch.name)

# %%
# Find
# ----
# Which mechanisms of linear cost could stand in a decoder, that is, honour a causal mask?

print(attnzoo.list_mechanisms(family="linear", mask="causal"))

# %%
# ``show`` prints the page of one of them. What stands there is not prose: *masks*, *laws*, *time*,
# *parameters* and *FLOPs* are claims, and the suite measures them.

print(attnzoo.show("elu_linear"))

# %%
# Use one
# -------
# Every mechanism is a module for any network, with its projections where the paper has them. Masks are
# boolean and **True may attend**, as in :func:`torch.nn.functional.scaled_dot_product_attention`. What a
# mechanism cannot honour it refuses; nothing is ever silently ignored.

torch.manual_seed(0)
mix = attnzoo.create("elu_linear", dim=64, heads=4).eval()
x = torch.randn(2, 50, 64)  # (batch, tokens, channels)
keys = torch.ones(2, 50, dtype=torch.bool)
keys[1, 30:] = False  # the second sample has 30 tokens and 20 of padding

changed = x.clone()
changed[1, 30:] = 0.0  # other padding, same answer
same = torch.equal(mix(x, mask=keys)[1, :30], mix(changed, mask=keys)[1, :30])
print(f"output {tuple(mix(x, mask=keys).shape)}; padding has no say: {same}")

try:
    mix(x, mask=torch.rand(2, 1, 50, 50) < 0.5)  # pairs of tokens: linear attention never forms them
except attnzoo.ZooError as error:
    print(error)

# %%
# Compose a model
# ---------------
# A recipe is data: names, numbers, no code. This one inherits the host, a small ViT for scikit-learn's
# handwritten digits, from a recipe that comes along, and puts two mechanisms into every head: softmax, and
# beside it HAM's soft attention.

(work / "mine.yaml").write_text("""\
recipe: 1
name: mine
extends: digits_softmax
attention:
  fuse: add                     # inside the heads, because both branches are heads
  with: {start: identity}       # before training it equals its first branch, bit for bit
  of: [softmax, soft]
""")
model = attnzoo.compose(work / "mine.yaml")
print(attnzoo.describe(model))

# %%
# On the command line ``attnzoo compose`` says what it costs, what the model supports, and tries a forward
# and a backward pass:
#
# .. code-block:: console
#
#     $ attnzoo compose mine.yaml

compose = subprocess.run(
    [*command, "compose", "mine.yaml"], cwd=work, check=True, capture_output=True, text=True
)
print(compose.stdout)

# %%
# Train
# -----
# A run is one folder. It survives Ctrl-C and ``kill -9``: the same command goes on, and on a CPU ends with
# the same bits.
#
# .. code-block:: console
#
#     $ attnzoo train mine.yaml --epochs 8 --out run
#
# The same in Python:

from attnzoo.train import prepare, train

recipe, settings = prepare(work / "mine.yaml", ["train.epochs=8"])
run = train(recipe, settings, work / "run")
tested = run.evaluate("last")
low, high = tested.interval
print(f"test accuracy {tested.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}, {tested.images} images)")

# %%
# The interval is that of 355 test images, and it is wide; another seed would move the figure as well. One
# run shows that a model learns, never that it is better than another.

curves = attnzoo.plot.learning_curves(run.log(), "mine")

# %%
# Look
# ----
# Any model that attnzoo composes, and timm's own ViTs, can be looked into without being changed. Here is
# where the two branches look, on average over layers and heads, for four test images. The number below a
# map is in even shares: 1 is what each token would get if all got the same.

from attnzoo.data import evaluation
from attnzoo.lab.maps import collect
from attnzoo.lab.rollout import mean_map

data = run.data()
images, labels = data.test.batch(torch.arange(4))
maps = collect(run.model(), evaluation(data.image, data.mean, data.std)(images))

# sphinx_gallery_thumbnail_number = 2
figure, axes = plt.subplots(2, 4, figsize=(8, 4.4), layout="constrained")
for row, branch in zip(axes, maps.branches(), strict=True):
    for ax, heat, image in zip(row, mean_map(maps, branch), images, strict=True):
        attnzoo.plot.attention_map(heat, image, ax=ax, unit=1 / maps.layout.length)
    row[0].set_ylabel(branch)

# %%
# Trust
# -----
# What can you rely on? On what the card says, as far as tests can tell. ``attnzoo check`` draws scenes
# (sizes, masks, options, dtypes) and tries to falsify every claim; it does so for your mechanisms as for
# ours.

from attnzoo.testing import check

results = check(attnzoo.load_zoo().mechanisms.find("elu_linear").value, examples=5)
print(f"{sum(result.ok for result in results)} of {len(results)} checks hold")
for result in results[:8]:
    print(" ", result.check)

scratch.cleanup()

# %%
# What to read next
# -----------------
# * :doc:`02_a_mechanism_in_one_file`: your own mechanism, checked like the built-in ones
# * :doc:`04_which_attention_for_my_data`: a comparison that can be wrong, and says so
# * :doc:`/docs/recipes`: everything a recipe can say
# * :doc:`/docs/training`: settings, resuming, several processes
