"""
A plugin from nothing to PyPI
=============================

A mechanism becomes useful when others can write its name into their recipes. In attnzoo that is a *plugin*:
an ordinary Python distribution with an entry point. Whoever installs it has the mechanism in every host,
every check, every probe, and its recipes in ``timm.create_model``. This guide goes all the way from an
empty folder to a wheel; only the upload is left to you.

The mechanism is the L2 attention of :doc:`02_a_mechanism_in_one_file`. What you need besides attnzoo: ``pip
install hatchling build twine``.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

command = [sys.executable, "-m", "attnzoo"]  # the command `attnzoo`, of this Python
scratch = tempfile.TemporaryDirectory()
work = Path(scratch.name)
how = {"cwd": work, "check": True, "text": True, "stdout": subprocess.PIPE}

# %%
# A distribution
# --------------
# .. code-block:: console
#
#     $ attnzoo new plugin l2

print(subprocess.run([*command, "new", "plugin", "l2"], **how).stdout)
plugin = work / "attnzoo-l2"
print((plugin / "pyproject.toml").read_text())

# %%
# What is written is complete: it installs, passes all checks and composes before you have changed a line.
# The entry point in the group ``attnzoo`` is how the plugin is found.
#
# The one file to edit
# --------------------
# ``src/attnzoo_l2/__init__.py`` gets the class, and two hooks say what the plugin offers. Hooks return
# lists, so that a plugin may have several mechanisms, fusions, probes, interventions and recipes.

(plugin / "src" / "attnzoo_l2" / "__init__.py").write_text(
    '''\
"""L2 attention (Kim et al., 2021), for attnzoo."""

from pathlib import Path

from attnzoo import hookimpl
from attnzoo.core import Card, Family, Head, Law, Paper
from attnzoo.functional import attention_from_scores

ATTNZOO_API = 2


class L2(Head):
    """softmax(-‖q - k‖² / √d) v, as softmax((2 q kᵀ - ‖k‖²) / √d) v, which is the same.

    Args:
        site: Where the head is put.
    """

    card = Card(
        name="l2",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention whose scores are negative squared distances of queries and keys.",
        paper=Paper("The Lipschitz Constant of Self-Attention", "Kim et al.", 2021, "arXiv:2006.04710", "§3.2"),
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
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.BOUNDED, Law.HEADS_APART},
    )

    def attend(self, q, k, v, *, mask, layout):
        scores = (2 * q @ k.mT - k.square().sum(dim=-1)[..., None, :]) / q.shape[-1] ** 0.5
        return attention_from_scores(self, scores, v, mask.dense(q.shape[2], k.shape[2], q.device))


@hookimpl
def attnzoo_mechanisms():
    """The mechanisms of this plugin."""
    return [L2]


@hookimpl
def attnzoo_recipes():
    """The recipes of this plugin."""
    return [Path(__file__).parent / "recipes"]
''',
    encoding="utf-8",
)
print((plugin / "src" / "attnzoo_l2" / "recipes" / "l2_vit.yaml").read_text())

# %%
# Install and check
# -----------------
# While you work, install it in place and run the checks after each change:
#
# .. code-block:: console
#
#     $ pip install -e attnzoo-l2
#     $ attnzoo check --plugin attnzoo-l2
#
# This page must leave nothing behind in the environment that builds it, so it installs into a folder of its
# own. First the wheel, as it will go to PyPI (``python -m build`` makes a source distribution as well):

pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
wheel_only = ["--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
subprocess.run([*pip, "wheel", "./attnzoo-l2", *wheel_only], **how)
(wheel,) = (work / "dist").glob("*.whl")
subprocess.run([*pip, "install", "--no-index", "--no-deps", "--target", "site", str(wheel)], **how)
paths = [str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
how["env"] = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

print(subprocess.run([*command, "check", "--plugin", "attnzoo-l2", "--examples", "3"], **how).stdout)

# %%
# ``tests/test_conformance.py`` has the same checks for pytest, one test each. Add a reference of your own
# beside them, as in :doc:`02_a_mechanism_in_one_file`: the checks do not know your paper.
#
# Use it by name
# --------------
# In any recipe, by name. Here a short training on digits, with one setting changed:
#
# .. code-block:: console
#
#     $ attnzoo train digits_softmax --set attention=l2 --epochs 3 --out run

shown = subprocess.run(
    [*command, "train", "digits_softmax", "--set", "attention=l2", "--epochs", "3", "--out", "run"], **how
)
print(shown.stdout)

# %%
# And since ``l2_vit.yaml`` says ``registers:``, timm knows the model, in either import order:

script = "import timm, attnzoo; print(attnzoo.describe(timm.create_model('l2_vit_tiny')))"
print(subprocess.run([sys.executable, "-c", script], **how).stdout)

# %%
# What goes to PyPI
# -----------------
# Look into the wheel before anybody else does: are the recipes in it, does the entry point name the module,
# do the metadata say what they should?

with zipfile.ZipFile(wheel) as archive:
    print(*archive.namelist(), sep="\n")
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    print("\n" + archive.read(entry).decode())
    about = Parser().parsestr(archive.read(entry.replace("entry_points.txt", "METADATA")).decode())
for field in ("Name", "Version", "Summary", "Requires-Python", "Requires-Dist", "License-Expression"):
    print(f"{field}: {about[field]}")

# %%
# One is missing: a licence. Without one, nobody may use what you publish. Put ``license = "Apache-2.0"``
# (or what you choose) under ``[project]``, and ``authors``, say in the README which paper it is, and raise
# ``version``, since no version can be uploaded twice.

text = (plugin / "pyproject.toml").read_text()
licensed = text.replace('requires-python = ">=3.11"', 'requires-python = ">=3.11"\nlicense = "Apache-2.0"')
(plugin / "pyproject.toml").write_text(licensed)
subprocess.run([*pip, "wheel", "./attnzoo-l2", *wheel_only], **how)
with zipfile.ZipFile(wheel) as archive:
    about = Parser().parsestr(archive.read(entry.replace("entry_points.txt", "METADATA")).decode())
print("License-Expression:", about["License-Expression"])

if importlib.util.find_spec("twine"):
    print(subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel)], **how).stdout)

scratch.cleanup()

# %%
# From here on the network is needed, and an account on PyPI. These are the commands; the index for trying
# comes first.
#
# .. code-block:: console
#
#     $ cd attnzoo-l2
#     $ python -m build
#     $ python -m twine check --strict dist/*
#     $ python -m twine upload --repository testpypi dist/*
#     $ python -m twine upload dist/*
#
# Whoever types ``pip install attnzoo-l2`` now has ``use: l2`` in recipes. If two plugins offer the same
# name, recipes write ``use: l2/l2``, plugin and name; names of built-in mechanisms cannot be taken. A
# plugin that breaks never stops attnzoo: ``attnzoo doctor`` says what is wrong with it, and the rest works
# on.
#
# What to read next
# -----------------
# * :doc:`/docs/writing-a-plugin`: the card, laws, masks, fusions, pools, what each check means
# * :doc:`/docs/probes`: probes and interventions as plugins
# * :doc:`/docs/recipes`: what your recipes can say
