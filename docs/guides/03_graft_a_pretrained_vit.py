"""
Graft a pretrained ViT
======================

You have a trained ViT and want other attention in it, without training from nothing. :func:`attnzoo.graft`
puts a recipe into the model: every weight goes where the same thing lives, a ledger says of every tensor
what became of it, and :func:`attnzoo.ungraft` gives the donor back.

This page is built without a network, so the donor is no ``vit_base_patch16_224`` but a ViT of two blocks
that we train on scikit-learn's digits right here. Everything else is as it would be:

.. code-block:: console

    $ attnzoo graft vit_base_patch16_224 --pretrained --recipe ham_b --out vit_ham_b
    $ attnzoo ungraft vit_ham_b --out vit
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch

import attnzoo
from attnzoo.data import evaluation, load_images
from attnzoo.train import prepare, train

scratch = tempfile.TemporaryDirectory()
work = Path(scratch.name)

# %%
# The donor
# ---------
# A plain timm model. Its weights come from a short run of the recipe ``digits_softmax``, whose state dict
# has timm's own keys. timm keeps with a model how its images are normalised, and whoever trains it later
# goes by that, so a donor of your own should say it.

recipe, settings = prepare("digits_softmax", ["train.epochs=10"])
run = train(recipe, settings, work / "donor")

small = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
data = load_images("digits")
donor = timm.create_model(
    "vit_tiny_patch16_224",
    class_token=False,
    global_pool="avg",
    pretrained_cfg_overlay={"mean": data.mean, "std": data.std},
    **small,
).eval()
print(donor.load_state_dict(run.model("last").state_dict()))

images, labels = data.test.batch(torch.arange(len(data.test)))
images = evaluation(data.image, data.mean, data.std)(images)


def accuracy(model: torch.nn.Module) -> float:
    """On the 355 test images."""
    with torch.no_grad():
        return (model.eval()(images).argmax(dim=-1) == labels).float().mean().item()


print(f"{type(donor).__module__}, accuracy {accuracy(donor):.1%}")

# %%
# A graft that starts as its donor
# --------------------------------
# ``ham_b`` adds soft attention to softmax inside every head. With ``start: identity``, which a graft sets
# where it can, the second branch enters through a factor γ that is zero at first. So nothing is lost on the
# first step, and what is said about it is measured, not inferred: ``ledger.difference`` is the largest
# difference of the logits.

graft, ledger = attnzoo.graft(donor, "ham_b")
print(ledger.counts())
for group in ledger.groups():
    print(f"{group.where:24} {group.kind:8} {group.tensors:3} tensors  {', '.join(group.names[:4])}, ...")
print("difference of the first logits:", ledger.difference)

with torch.no_grad():
    print("bit for bit on the test images:", torch.equal(graft.eval()(images), donor(images)))

# %%
# And back. The donor was never touched; what ``ungraft`` gives is built from the graft alone.

again = attnzoo.ungraft(graft)
pairs = zip(again.state_dict().items(), donor.state_dict().items(), strict=True)
print("the donor again, bit for bit:", all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs))

# %%
# A graft that must learn
# -----------------------
# Linear attention is another function, and no weights make it the same. ``elu_linear`` gets the donor's
# projections, and loses most of what the donor knew:

linear, ledger = attnzoo.graft(donor, "digits_elu_linear")
print(f"difference of the first logits: {ledger.difference:.2f}")
print(f"accuracy: donor {accuracy(donor):.1%}, graft {accuracy(linear):.1%}")

# %%
# It can learn to give what the donor's blocks give. ``attnzoo.distil`` does that in two stages: block by
# block, without a label, with everything frozen but the new attention (FAR, `arXiv:2505.21535
# <https://arxiv.org/abs/2505.21535>`_); then all of it on the labels, with a tenth of the learning rate.
# Ten epochs each is the default; here it is three and three.
#
# .. code-block:: console
#
#     $ attnzoo graft runs/teacher --recipe digits_elu_linear --distil digits --out elu

from attnzoo.grafting.distillation import FAR
from attnzoo.train import Settings

outcome = attnzoo.distil(linear, Settings(data="digits", **{**FAR, "epochs": 3}), finetune=3)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for stage in outcome.stages:
    left.plot(range(len(stage.cosines)), stage.cosines, marker="o", label=stage.name)
    print(f"{stage.name:12} accuracy {stage.accuracy:.1%}, cosines {[round(c, 3) for c in stage.cosines]}")
print(f"{outcome.recovered:.1%} of the donor's accuracy")
left.set(xlabel="block", ylabel="cosine with the donor's output", xticks=range(len(stage.cosines)))
left.legend()
right.bar([stage.name for stage in outcome.stages], [stage.accuracy for stage in outcome.stages])
right.axhline(outcome.donor, color="black", linestyle="--", label="donor")
right.legend(loc="lower right")
_ = right.set(ylabel="test accuracy", ylim=(0, 1))

scratch.cleanup()

# %%
# What this shows, and what not: a graft keeps what it can and says what it could not; after distillation
# most of the accuracy is back. That it is the distillation that brings it back is *not* shown, since
# fine-tuning alone does as much where all labels are at hand and data are this small (:doc:`/docs/graft`
# has those figures). One donor, one seed, 355 images: a per cent is three or four of them.
#
# What to read next
# -----------------
# * :doc:`/docs/graft`: donors, the ledger, distillation, frozen queries and keys, mixtures of heads
# * :doc:`05_what_is_my_model_looking_at`: look into donor and graft
# * :doc:`/docs/recipes`: what can be put in
