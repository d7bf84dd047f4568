"""
A mechanism in one file
=======================

You have read a paper with another attention, and want it in your experiments by tonight. In attnzoo that is
one class: a card that says what you claim, and one method with the maths. Projections, masks, dropout,
taps, decoding caches and the ViT around it are there already; and because the card is a list of claims, a
test suite can try to prove you wrong.

The example is L2 attention of Kim, Papamakarios and Mnih, "The Lipschitz Constant of Self-Attention", 2021
(`arXiv:2006.04710 <https://arxiv.org/abs/2006.04710>`_), which compares queries and keys by their distance:

.. math:: o_i = \\sum_j A_{ij} v_j, \\qquad
          A_{ij} = \\operatorname{softmax}_j\\left(-\\|q_i - k_j\\|^2 / \\sqrt d\\right)
"""

import math
import os
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt
import torch

import attnzoo
from attnzoo.core import Card, Family, Head, Law, Layout, Mask, MultiHead, Paper, Site
from attnzoo.functional import attention_from_scores
from attnzoo.testing import against, check

command = [sys.executable, "-m", "attnzoo"]  # the command `attnzoo`, of this Python
scratch = tempfile.TemporaryDirectory()
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = scratch.name  # of hypothesis, which makes failures small

# %%
# The class
# ---------
# The paper keeps the usual projections and changes what happens between them, so this is a ``Head``: it is
# handed queries, keys and values, ``(b, h, n, d)`` and ``(b, h, m, d)``, and gives ``(b, h, n, d)``. (A
# paper with projections of its own would be a ``Mechanism`` and work on tokens ``(b, n, c)``.)
#
# The card claims that all three kinds of mask hold. Here is a first version whose author forgot them.


class Hasty(Head):
    """softmax(-‖q - k‖² / √d) v.

    Args:
        site: Where the head is put.
    """

    card = Card(
        name="hasty",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention whose scores are negative squared distances of queries and keys.",
        masks={"keys", "causal", "pairs"},
        context=True,
        taps={"weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES},
    )

    def attend(self, q, k, v, *, mask, layout):
        scores = -torch.cdist(q, k).square() / math.sqrt(q.shape[-1])
        return self.weights(scores.softmax(dim=-1)) @ v


results = check(Hasty, examples=3)
failed = [result for result in results if not result.ok]
print(f"{len(failed)} of {len(results)} checks fail: {', '.join(result.check for result in failed)}\n")
for name in ("check_causality", "check_output"):
    print(next(result for result in failed if result.check == name))

# %%
# A failure names the claim, what happened instead, and the smallest scene that was found, as code to paste.
# Masks we had expected. That PyTorch has no ``cdist`` in bfloat16, and that training in mixed precision
# would have ended with an exception, we had not.
#
# Here it is with masks and without ``cdist``. ‖q - k‖² is ‖q‖² - 2 q·k + ‖k‖², of which the first term is
# the same for a whole row and cancels in the softmax: so this costs what dot-product attention costs, and
# we can claim its FLOPs, which the suite counts. ``attention_from_scores`` does what heads with a softmax
# do: it honours the mask (True may attend; a row with nothing to attend to gives zeros), shows scores and
# weights to whoever watches, and drops weights in training.


class L2(Head):
    """softmax(-‖q - k‖² / √d) v, as softmax((2 q kᵀ - ‖k‖²) / √d) v, which is the same.

    Kim, Papamakarios and Mnih, "The Lipschitz Constant of Self-Attention", 2021, arXiv:2006.04710, §3.2.

    Args:
        site: Where the head is put.
    """

    card = Card(
        name="l2",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention whose scores are negative squared distances of queries and keys.",
        paper=Paper(
            "The Lipschitz Constant of Self-Attention", "Kim et al.", 2021, "arXiv:2006.04710", "§3.2"
        ),
        fidelity="adapted",
        notes="The paper ties queries and keys and rescales the values; here projections are the site's.",
        time="n m c",
        memory="h n m",
        params="0",
        flops="4 * n * m * c",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={
            Law.STOCHASTIC,
            Law.PERMUTATION_EQUIVARIANT,
            Law.LINEAR_IN_VALUES,
            Law.BOUNDED,
            Law.HEADS_APART,
        },
    )

    def attend(self, q, k, v, *, mask, layout):
        lengths = k.square().sum(dim=-1)[..., None, :]  # b h 1 m
        scores = (2 * q @ k.mT - lengths) / math.sqrt(q.shape[-1])
        return attention_from_scores(self, scores, v, mask.dense(q.shape[2], k.shape[2], q.device))


results = check(L2, examples=3)
assert all(result.ok for result in results)
print(f"{len(results)} checks hold")

# %%
# The paper, as plainly as you can
# --------------------------------
# Laws cannot see everything. With another scale, attention is still stochastic, still honours masks, still
# costs the same. So write the equation once more, slowly, with loops and without sharing a line with the
# mechanism. ``against`` holds the two together in float64 over drawn scenes: outputs and all gradients must
# agree.


@against(L2)
def reference(q, k, v, allowed):
    """softmax(-‖q - k‖² / √d) v, query by query."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                see = allowed[b, h, i]  # which keys this query may attend to
                distances = (q[b, h, i] - k[b, h, see]).square().sum(dim=-1)
                out[b, h, i] = (-distances / math.sqrt(q.shape[3])).softmax(dim=-1) @ v[b, h, see]
    return out


reference()  # raises where they differ


class Unscaled(L2):
    """A likely mistake: the root is forgotten."""

    def attend(self, q, k, v, *, mask, layout):
        return super().attend(q * q.shape[-1] ** 0.25, k * k.shape[-1] ** 0.25, v, mask=mask, layout=layout)


print("the checks accept the mistake:", all(result.ok for result in check(Unscaled, examples=3)))
print("the reference accepts it:     ", reference.compare(Unscaled).ok)

# %%
# What is different about it?
# ---------------------------
# Put six keys into the plane, and colour every query by the key that it attends to most. By dot products, a
# query asks who lies furthest in its direction: keys inside the hull of the others never win. By distances,
# it asks who is nearest.

site = Site("here", dim=6, heads=1, layout=Layout(grid=(6,)))
six = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
axis = torch.linspace(-3, 3, 120)  # without 0, where all scores are equal
plane = torch.cartesian_prod(axis, axis)  # (n, 2)
pad = torch.nn.functional.pad  # to six channels, so that one-hot values make the output the weights
q, k, v = pad(plane, (0, 4))[None, None], pad(six, (0, 4))[None, None], torch.eye(6)[None, None]

figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
for ax, cls in zip(axes, (attnzoo.load_zoo().mechanisms.find("softmax").value, L2), strict=True):
    weights = cls(site)(q, k, v, layout=site.layout)[0, 0]  # (n, 6)
    winner = weights.argmax(dim=-1).reshape(120, 120).T
    ax.imshow(winner, origin="lower", extent=(-3, 3, -3, 3), cmap="Set2", vmin=0, vmax=7)
    ax.scatter(*six.T, color="black")
    ax.set_title(f"{cls.card.name}: {len(winner.unique())} of 6 keys ever win")

# %%
# In a network
# ------------
# ``MultiHead`` puts projections around a head. What comes out is a module; with a
# :class:`attnzoo.core.Mask` it works as encoder, decoder and cross-attention, and since the card says
# ``incremental``, it decodes token by token with a cache.

torch.manual_seed(0)
layout = Layout(grid=(10,))
site = Site("here", dim=64, heads=4, layout=layout)
attention = MultiHead(site, L2(site)).eval()
x = torch.randn(2, 10, 64)
whole = attention(x, mask=Mask(causal=True), layout=layout)
shorter = attention(x[:, :5], mask=Mask(causal=True), layout=Layout(grid=(5,)))
print("later tokens have no influence:", torch.allclose(whole[:, :5], shorter, atol=1e-6))

# %%
# From the command line
# ---------------------
# ``attnzoo new mechanism`` writes a first version of such a file, complete and passing, and ``attnzoo
# check`` takes a file:
#
# .. code-block:: console
#
#     $ attnzoo new mechanism tempered --family dot_product
#     $ attnzoo check tempered.py

new = ["new", "mechanism", "tempered", "--family", "dot_product"]
for words in (new, ["check", "tempered.py", "--examples", "3"]):
    done = subprocess.run([*command, *words], cwd=scratch.name, check=True, capture_output=True, text=True)
    print(done.stdout)

scratch.cleanup()

# %%
# What to read next
# -----------------
# * :doc:`07_a_plugin_from_nothing_to_pypi`: so that recipes know it by name
# * :doc:`/docs/writing-a-plugin`: heads, mechanisms, pools and fusions; the card line by line; what each
#   check means
# * :doc:`/docs/mission`: which paper is which mechanism; yours may be there
