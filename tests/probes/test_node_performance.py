"""`node_performance`: which labels a single channel recognises by itself; what it shares is in test_head_performance."""

import numpy as np
from instruments import subject, vit

import attnzoo
from attnzoo.probes import NodePerformance
from probes.test_head_performance import planted


def test_heads_add_up_from_their_nodes():
    of = subject(vit(), 20)
    heads, nodes = attnzoo.probe(of, "head_performance", "node_performance")
    one, many = heads.arrays["fields blocks.1"], nodes.arrays["fields blocks.1"]
    assert np.allclose(one, many.reshape(4, 12, 5, 5).sum(axis=1))
    assert nodes["head"][:24] == [0] * 12 + [1] * 12 and nodes["node"][:48] == list(range(48))
    assert len(heads) == 8 and len(nodes) == 96


def test_the_planted_channels_are_found_and_no_others():
    groups = [[0, 1], [2, 3], [4], []]
    found = attnzoo.probe(planted(groups), NodePerformance(pool="mean", at="blocks.1"))
    members = found.arrays["clusters blocks.1"]
    for head, group in enumerate(groups[:3]):
        assert np.flatnonzero(members[12 * head] >= 0).tolist() == group
    fields = np.abs(found.arrays["fields blocks.1"]).max(axis=(1, 2)).reshape(4, 12)
    assert fields[:3, 0].min() > 10 * fields[:, 1:].max() and fields[3, 0] < 0.1 * fields[:3, 0].min()
