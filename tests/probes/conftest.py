"""What tests of probes share: a small model of pairs, built once."""

import pytest

from attnzoo.recipe import compose

PAIRS = """
recipe: 1
name: pairs
extends: transformer
host: {dim: 16, mlp_dim: 32, layers: 2, vocab: 20, max_length: 12}
heads: 2
"""


@pytest.fixture(scope="session")
def pairs():
    """An encoder and decoder of two layers; it is not changed."""
    return compose(PAIRS).eval()
