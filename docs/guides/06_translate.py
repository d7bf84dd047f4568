"""
Translate
=========

The first attention was made for translation, and an alignment is still the picture in which it is best
understood. Here a small encoder-decoder learns to translate numbers, *two hundred forty seven* to *zwei
hundert sieben und vierzig*: a real task of two real languages in which words change places, since German
says the units before the tens. There are 999 pairs, made below, so nothing is downloaded.

Real corpora go the same way: ``--data tsv:pairs.tsv``, a zip in Moses format, gettext catalogues, or
``opus_books:en-es``, which is downloaded. Scores and tokenizers need ``pip install "attnzoo[text]"``.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import attnzoo
from attnzoo.train import prepare, train

command = [sys.executable, "-m", "attnzoo"]  # the command `attnzoo`, of this Python
scratch = tempfile.TemporaryDirectory()
work = Path(scratch.name)

# %%
# Pairs
# -----
# A line for each pair: source, tab, target.

ENGLISH = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
ENGLISH += ["seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
GERMAN = [
    "ein",
    "zwei",
    "drei",
    "vier",
    "fünf",
    "sechs",
    "sieben",
    "acht",
    "neun",
    "zehn",
    "elf",
    "zwölf",
    "dreizehn",
    "vierzehn",
    "fünfzehn",
    "sechzehn",
]
GERMAN += ["siebzehn", "achtzehn", "neunzehn"]
ZIG = ["zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]


def english(n: int) -> str:
    """247: two hundred forty seven."""
    if n >= 100:
        return f"{ENGLISH[n // 100 - 1]} hundred {english(n % 100)}".strip()
    if n >= 20:
        return f"{TENS[n // 10 - 2]} {english(n % 10)}".strip()
    return ENGLISH[n - 1] if n else ""


def german(n: int) -> str:
    """247: zwei hundert sieben und vierzig."""
    if n >= 100:
        return f"{GERMAN[n // 100 - 1]} hundert {german(n % 100)}".strip()
    if n >= 20:
        return f"{GERMAN[n % 10 - 1]} und {ZIG[n // 10 - 2]}" if n % 10 else ZIG[n // 10 - 2]
    return GERMAN[n - 1] if n else ""


lines = [f"{english(n)}\t{german(n)}" for n in range(1, 1000)]
(work / "numbers.tsv").write_text("\n".join(lines), encoding="utf-8")
print(lines[246], lines[999 - 1 - 28], sep="\n")

# %%
# The model
# ---------
# Encoder, decoder and cross-attention are sites like any other. Each takes any mechanism that meets what
# the site requires, and a decoder requires causal masks: that is compared with the cards before anything is
# built.

(work / "numbers.yaml").write_text(
    f"""\
recipe: 1
name: numbers
host: {{kind: seq2seq, dim: 64, mlp_dim: 128, layers: 2, vocab: 100, max_length: 16, dropout: 0.0}}
heads: 4
attention: softmax
train:
  data: tsv:{work / "numbers.tsv"}
  tokens: {{use: word, min_frequency: 1, shared: false}}
  optimizer: {{use: adamw, lr: 0.002, weight_decay: 0.01}}
  schedule: {{use: cosine, warmup: 1}}
  batch_size: 32
  epochs: 8
""",
    encoding="utf-8",
)
print(attnzoo.describe(attnzoo.compose(work / "numbers.yaml")))

try:
    attnzoo.compose(
        {
            "recipe": 1,
            "host": {"kind": "seq2seq", "dim": 64, "layers": 2},
            "attention": "softmax",
            "overrides": [{"at": "decoder.*.self", "put": "linformer"}],
        }
    )
except attnzoo.ZooError as error:
    print(error)

# %%
# Train
# -----
# .. code-block:: console
#
#     $ attnzoo train numbers.yaml --out run
#
# A twentieth of the pairs is kept for testing; none of its texts, source or target, is trained on.

recipe, settings = prepare(work / "numbers.yaml")
run = train(recipe, settings, work / "run")
print(f"token accuracy {run.summary()['last_accuracy']:.1%} after epoch {run.summary()['last_epoch']}")
curves = attnzoo.plot.learning_curves(run.log(), "numbers")

# %%
# Translate
# ---------
# Token accuracy is measured with the true words before each one. What counts is the whole translation, made
# by the model alone. Beam search keeps the keys and values of earlier words, where the cards say
# ``incremental``.

from attnzoo.eval.translation import translate

data, model = run.data(), run.model()
said = translate(model, run.vocabularies(), data.test.source_texts, beams=4).texts
for source, target, truth in list(zip(data.test.source_texts, said, data.test.target_texts, strict=True))[:5]:
    print(f"{source} → {target}{'' if target == truth else f'   (should be: {truth})'}")
right = sum(target == truth for target, truth in zip(said, data.test.target_texts, strict=True))
print(f"{right} of {len(said)} numbers of the test side are right to the last word")

# %%
# The command does the same for texts, a file or standard input, and ``attnzoo eval`` gives BLEU, chrF and
# error rates, each with an interval over sentences:
#
# .. code-block:: console
#
#     $ attnzoo translate run "nine hundred eighty seven"

shown = subprocess.run(
    [*command, "translate", "run", "nine hundred eighty seven"],
    cwd=work,
    check=True,
    capture_output=True,
    text=True,
)
print(shown.stdout)

# %%
# Where does the decoder look?
# ----------------------------
# One panel for each layer of cross-attention, mean over heads. A row is named *given › next*: the word that
# the decoder is given, and the one that it is asked for. If there is an alignment, the row that asks for
# *sieben* looks at *seven*, and the one that asks for *vierzig* looks back at *forty*: the crossing of the
# last two words.

from attnzoo.lab.text_maps import collect_text, translated_example
from attnzoo.lab.text_sheet import text_notes, text_sheet, text_view

example = translated_example(model, run.vocabularies(), "two hundred forty seven", name="numbers")
maps = collect_text(model, *example.inputs).only("cross")
blocks = text_view(maps, example, "mechanism")
# sphinx_gallery_thumbnail_number = 2
sheet = text_sheet(blocks, "mechanism", "numbers", example.lines, text_notes(maps, blocks, "mechanism"))

# %%
# The mean over heads may hide that each does something else; ``attnzoo heatmap run --text "..."`` shows
# every head.
#
# Another mechanism, one line
# ---------------------------
# ``--set`` changes a recipe without a new file. Bahdanau's additive attention, where translation by
# attention began, at every cross-attention:

recipe, settings = prepare(work / "numbers.yaml", ["overrides=[{at: 'decoder.*.cross', put: additive}]"])
other = train(recipe, settings, work / "additive")
for name, one in (("softmax", run), ("additive", other)):
    print(
        f"{name:9}",
        *(f"epoch {row['epoch']}: {row['test_accuracy']:.1%}" for row in one.log()[1::2]),
        sep="  ",
    )

scratch.cleanup()

# %%
# That is one seed and fifty sentences, of a language of forty words and of a rule that can be written down
# in six lines: it shows that both learn, and says nothing about which is better, here or in a language that
# people speak. ``attnzoo compare`` is for that, with seeds, and :doc:`/docs/evidence` says what has been
# asked of translation so far.
#
# What to read next
# -----------------
# * :doc:`/docs/text`: hosts, data, tokenizers, decoding, scores
# * :doc:`/docs/deep-head`: numbers of heads that change by layer, and layers that hand them on
# * :doc:`/docs/sequences`: small tasks that show what a mechanism can, and with a proof what it cannot
