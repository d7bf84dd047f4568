"""
Which attention for my data?
============================

There are about a hundred mechanisms, and a table of accuracies from somebody else's data will not tell
which one to take. This guide goes the way that does: ask what your task *requires* (cards answer that in a
second), measure what is left at *your* size, and train the few that remain under one budget with several
seeds, beside a control that has no attention at all.

The data are scikit-learn's digits, small enough to train nine models here. Put your own in their place by
``--data folder:PATH``, or ``tsv:FILE`` for translation.
"""

import tempfile
from pathlib import Path

import attnzoo

scratch = tempfile.TemporaryDirectory()
work = Path(scratch.name)

# %%
# What does the task require?
# ---------------------------
# Say the images have different sizes, and some batches are padded. Then nothing of fixed length will do,
# and masks of keys must hold. Cards are data, and can be asked:

cards = {entry.name: entry.value.card for entry in attnzoo.load_zoo().mechanisms.values()}
fit = [name for name, card in cards.items() if "keys" in card.masks and not card.fixed_length]
linear = [name for name in fit if cards[name].growth == 1]
print(
    f"{len(fit)} of {len(cards)} mechanisms honour padding at any length, {len(linear)} of them grow with n:"
)
print(", ".join(linear))

# %%
# The common questions have a verb:
#
# .. code-block:: console
#
#     $ attnzoo list mechanisms --mask causal --family linear
#     $ attnzoo list mechanisms --law permutation_equivariant
#
# What does it cost at my size?
# -----------------------------
# Orders of growth are about many tokens. At 64 tokens a linear mechanism may well be slower than softmax,
# whose kernel is the best that PyTorch has. So measure, at the sizes that you have; layers take turns, and
# what is shown are medians.

from attnzoo.bench.mechanisms import measure

sizes = (64, 256, 1024)
names = ["softmax", "elu_linear", "neighborhood"]
growth = measure(names, tokens=sizes, dim=128, heads=4, rounds=3)
for name, grown in growth.items():
    print(f"{name:14}", *(f"{n:5} tokens {grown.points[n].forward[0]:7.2f} ms" for n in sizes))

curves = {name: {n: grown.points[n].forward[0] for n in sizes} for name, grown in growth.items()}
memory = {name: {n: grown.points[n].memory for n in sizes} for name, grown in growth.items()}
figure = attnzoo.plot.growth_curves({"forward, ms": curves, "peak memory, MiB": memory})

# %%
# The figures are those of this machine, on one thread.
#
# Which one learns better?
# ------------------------
# A comparison is fair when all have the same budget, and worth something when seeds are varied. ``--match
# params`` widens MLPs until all have as many parameters; the first recipe is what the others are held
# against; ``digits_nothing`` is the control, a ViT whose attention gives zeros, so that a token never hears
# of another before the pooling at the end.
#
# .. code-block:: console
#
#     $ attnzoo compare digits_softmax digits_elu_linear digits_nothing --match params --seeds 3 --epochs 5
#
# In Python, where every part can be changed:

from attnzoo.bench.budget import matched
from attnzoo.train import prepare
from attnzoo.train.compare import compare, trials

recipes = ["digits_softmax", "digits_elu_linear", "digits_nothing"]
edits = [
    "host.model.patch_size=8",  # 16 tokens, so that nine models are trained in half a minute
    "train.epochs=5",
    "train.optimizer.lr=0.01",
    "train.schedule={use: cosine, warmup: 1}",
]
found = matched(recipes, "params", lambda name, more: prepare(name, [*edits, *more])[0])
for name, match in found.items():
    print(f"{name}: {' '.join(match.edits) or 'as it is'}")

ready = [(name, *prepare(name, [*edits, *found[name].edits])) for name in recipes]
outcome = compare(trials(ready, seeds=3, folder=work))
for row in outcome.rows:
    print(f"{row.recipe:20} last {row.last:.1%} ± {row.last_spread:.1%}, {row.params:,} parameters")
for sentence in outcome.sentences():
    print(sentence)

# %%
# The verdict of each difference rests on two intervals, by Student's t and by bootstrap, of the differences
# seed by seed. *Noise* does not mean that two mechanisms are equal. It means that these seeds cannot tell:
# with three of them the interval is 4.3 standard errors to each side, with five 2.8. A gap of ten points
# may be real and still not be shown.

page = attnzoo.plot.comparison_curves(outcome.logs)

scratch.cleanup()

# %%
# What can be said, and what not
# ------------------------------
# * Five epochs are early. Who learns faster is not who ends higher; ``--reach 60`` asks in which epoch each
#   gets to 60 %.
# * The best epoch is chosen on the test side, which flatters every recipe alike; compare the last.
# * The control says what attention is worth on these data. Digits of 8 × 8 pixels are an easy case: a bag
#   of local strokes goes a long way. If the control is as good on yours, the choice of attention does not
#   matter there.
# * Three seeds give wide intervals. Five take longer and say more; :doc:`/docs/evidence` has some that were
#   asked so.
# * More than a handful of candidates? ``attnzoo sweep digits_softmax --count 20`` draws recipes at random
#   under one budget and ranks them. Of one seed a ranking is a start: give the best to ``compare``.
#
# What to read next
# -----------------
# * :doc:`/docs/training`: comparing, sweeping, equal budgets
# * :doc:`/docs/benchmarks`: speed, memory, and how they were measured
# * :doc:`05_what_is_my_model_looking_at`: what the winner does differently
