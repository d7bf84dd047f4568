"""Sentences and their translations, from files in the usual formats or from OPUS.

data = load_pairs("tsv:sentences.tsv", tokens=Tokens(), max_length=64)
source, target = data.train.batch(indices)
"""

from attnzoo.data.parallel.corpus import Corpus, Line, Tokens, clean, prepared, split
from attnzoo.data.parallel.load import PAIRS, check_pairs, is_pairs, load_pairs, read_corpus

__all__ = [
    "PAIRS",
    "Corpus",
    "Line",
    "Tokens",
    "check_pairs",
    "clean",
    "is_pairs",
    "load_pairs",
    "prepared",
    "read_corpus",
    "split",
]
