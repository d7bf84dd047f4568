"""Synthetic sequence tasks, made from a seed when they are loaded.

data = load_sequences("recall:pairs=4,length=32")
inputs, targets = data.train.batch(indices)
"""

from attnzoo.data.sequences.load import SEQUENCES, check_sequences, is_sequences, load_sequences
from attnzoo.data.sequences.sequence_data import IGNORE, InMemory, SequenceData, Sequences
from attnzoo.data.sequences.strings import STRINGS, is_strings, load_strings

__all__ = [
    "IGNORE",
    "SEQUENCES",
    "STRINGS",
    "InMemory",
    "SequenceData",
    "Sequences",
    "check_sequences",
    "is_sequences",
    "is_strings",
    "load_sequences",
    "load_strings",
]
