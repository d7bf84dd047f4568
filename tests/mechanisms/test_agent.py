"""Agent attention, arXiv:2312.08874, §3.3, eq. 3-5."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, MultiHead, Site
from attnzoo.functional import rearrange
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.linear.agent import Agent
from attnzoo.testing import against


def stretched(values, size):
    """A line of numbers resized as images are: linear between the middles of its entries, constant beyond them."""
    out = []
    for i in range(size):
        at = min(max((i + 0.5) * len(values) / size - 0.5, 0), len(values) - 1)
        left = int(at)
        right = min(left + 1, len(values) - 1)
        out.append(values[left] * (1 - (at - left)) + values[right] * (at - left))
    return out


def bias_of(part, layout):
    """What is added to the scores between agents and tokens, (h r n): the special tokens' own, map + row + column."""
    rows, columns = layout.grid
    coarse = torch.stack(stretched(part.coarse.unbind(2), rows), 2)
    coarse = stretched(coarse.unbind(3), columns)  # columns of (h r rows)
    row, column = (
        stretched(part.rows[..., 0].unbind(2), rows),
        stretched(part.columns[..., 0, :].unbind(2), columns),
    )
    grid = [coarse[x][..., y] + row[y] + column[x] for y in range(rows) for x in range(columns)]
    return torch.stack([*(() if part.prefix is None else part.prefix.unbind(2)), *grid], 2)


def bin_of(i, size, side):
    """Where bin i of `side` bins over `size` tokens begins and ends; bins may share tokens."""
    return range(i * size // side, math.ceil((i + 1) * size / side))


@against(Agent, options=lambda options: "agents" in options)  # the default has 49 agents
def test_oracle(component, options, x, layout, keys):
    """Sample by sample, head by head."""
    (b, n, c), p, (rows, columns) = x.shape, layout.prefix, layout.grid
    heads, side, d = component.heads, options["agents"], c // component.heads
    collect, hand_out = bias_of(component.collect_bias, layout), bias_of(component.hand_out_bias, layout)
    out = []
    for s in range(b):
        q, k, v = (component.qkv.weight @ x[s].T + (component.qkv.bias[:, None] if component.qkv.bias is not None else 0)).T.split(c, 1)  # fmt: skip
        there, merged = keys[s].tolist(), torch.zeros(n, c).double()

        def at(y, x, there=there):
            """The token at a place of the grid; None where none exists."""
            i = p + y * columns + x
            return i if 0 <= y < rows and 0 <= x < columns and there[i] else None

        agents = []
        for y, x_ in [(y, x_) for y in range(side) for x_ in range(side)]:
            members = [
                at(row, column) for row in bin_of(y, rows, side) for column in bin_of(x_, columns, side)
            ]
            members = [i for i in members if i is not None]
            agents.append(q[members].mean(0) if members else torch.zeros(c).double())
        for h in range(heads):
            mine = slice(h * d, (h + 1) * d)
            collected, offered = [], []
            for r, agent in enumerate(agents):
                scores = k[:, mine] @ agent[mine] / math.sqrt(d) + collect[h, r]
                see = keys[s]
                collected.append(
                    scores[see].softmax(0) @ v[see, mine] if see.any() else torch.zeros(d).double()
                )
                offered.append(q[:, mine] @ agent[mine] / math.sqrt(d) + hand_out[h, r])
            merged[:, mine] = torch.stack(offered, 1).softmax(1) @ torch.stack(collected)
        around = torch.zeros(n, c).double()
        for y in range(rows):
            for x_ in range(columns):
                total = component.local.bias
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if (i := at(y + dy, x_ + dx)) is not None:
                            total = total + component.local.weight[:, 0, dy + 1, dx + 1] * v[i]
                around[p + y * columns + x_] = total
        proj = component.proj
        out.append((merged + around) @ proj.weight.T + (0 if proj.bias is None else proj.bias))
    return torch.stack(out)


def before(change):
    """Agent attention that is changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return Agent.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Agent, mix=mix)


def scaled(self):
    rows = self.qkv.weight.shape[0] // 3
    self.qkv.weight[:rows] *= 1.5
    if self.qkv.bias is not None:
        self.qkv.bias[:rows] *= 1.5


def swap(self):
    self.collect_bias, self.hand_out_bias = self.hand_out_bias, self.collect_bias


def masked_nowhere(self, x, source, *, mask, layout):
    return Agent.mix(self, x, source, mask=Mask(), layout=layout)


def pooled_with_padding(self, tokens, layout):
    """Means over all places of a bin: padding counts."""
    grid = nn.functional.adaptive_avg_pool2d(layout.to_grid(tokens[:, layout.prefix :]), self.agents)
    pooled = rearrange(grid, "b c y x -> b (y x) c")
    return torch.ones_like(pooled) if tokens.shape[-1] == 1 else pooled


MUTANTS = {
    "a wrong scale": before(scaled),
    "biases swapped": before(swap),
    "no map in the biases": before(lambda self: self.collect_bias.coarse.zero_()),
    "rows of the biases turned": before(
        lambda self: self.hand_out_bias.rows.copy_(self.hand_out_bias.rows.flip(2))
    ),
    "the convolution turned": before(lambda self: self.local.weight.copy_(self.local.weight.mT.clone())),
    "no convolution": before(lambda self: self.local.weight.zero_()),
    "the mask ignored": wrong(Agent, mix=masked_nowhere),
    "padding in the means": wrong(Agent, _pool=pooled_with_padding),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((4, 6), 1)


def agent(side=2, layout=LAYOUT, **fields) -> Agent:
    """Two heads of four channels, in float64, with weights of a size that matters."""
    return spread(Agent(Site("hand", 8, 2, layout, **fields), agents=side), 0.5)


def without_convolution(part: Agent) -> Agent:
    """DWC = 0."""
    nn.init.zeros_(part.local.weight)
    nn.init.zeros_(part.local.bias)
    return part


# By hand


def test_hand_with_weights_of_zero_everybody_gets_the_mean_value():
    part = without_convolution(set_all(agent(), 0.0))
    with torch.no_grad():
        part.qkv.weight[16:].copy_(torch.eye(8))  # v = x
        part.proj.weight.copy_(torch.eye(8))
    x = normal(1, 25, 8)
    near(part(x, layout=LAYOUT), x.mean(1, keepdim=True).expand_as(x))


def test_hand_the_convolution_sees_the_neighbours_of_the_values():
    """Weights of one: a corner adds 4 values of one, an edge 6, the middle 9; special tokens none."""
    layout = Layout((3, 3), 1)
    part = set_all(agent(1, layout), 0.0)
    with torch.no_grad():
        part.qkv.bias[16:].fill_(1.0)  # v = 1
        part.local.weight.fill_(1.0)
        part.proj.weight.copy_(torch.eye(8))
    out = part(normal(1, 10, 8), layout=layout)
    near(out[0, :, 0], [1, 5, 7, 5, 7, 10, 7, 5, 7, 5])  # and 1 from the agents


@pytest.mark.parametrize("prefix", [0, 1])
def test_hand_parameters(prefix):
    c, r, h = 8, 4, 2
    biases = 2 * h * r * (49 + 4 + 6 + prefix)
    wanted = 3 * c * c + 3 * c + c * c + c + 9 * c + c + biases
    assert count(agent(2, Layout((4, 6), prefix))) == wanted


def test_biases_start_small_and_the_host_does_not_touch_them():
    part = Agent(Site("hand", 8, 2, LAYOUT), agents=3)
    assert 0.015 < part.collect_bias.coarse.std() < 0.022 and part.collect_bias.coarse.abs().max() <= 0.04


# Identities


def test_the_whole_map_is_stochastic_and_has_the_rank_of_the_agents():
    part = agent(2)
    x = normal(2, 25, 8)
    one, two = (seen(part, x, layout=LAYOUT, tap=tap) for tap in ("weights_agents", "weights"))
    assert one.shape == (2, 2, 4, 25) and two.shape == (2, 2, 25, 4)
    effective = two @ one
    near(effective.sum(-1), torch.ones(2, 2, 25))
    assert (effective >= 0).all() and torch.linalg.matrix_rank(effective).max() == 4


def test_identity_constant_values_stay_constant():
    part = without_convolution(agent())
    with torch.no_grad():
        part.qkv.weight[16:] = 0
    out = part(normal(2, 25, 8), layout=LAYOUT)
    near(out, (part.qkv.bias[16:] @ part.proj.weight.T + part.proj.bias).expand_as(out))


def test_as_many_agents_as_tokens_are_not_full_attention():
    layout = Layout((2, 2))
    part = without_convolution(agent(2, layout))
    site = Site("hand", 8, 2, layout)
    full = MultiHead(site, Softmax(site)).double()
    full.qkv.load_state_dict(part.qkv.state_dict())
    full.proj.load_state_dict(part.proj.state_dict())
    x = normal(1, 4, 8)
    assert (part(x, layout=layout) - full(x, layout=layout)).abs().max() > 1e-2


def test_identity_agents_are_pooled_queries():
    """With biases of zero, its two maps are softmax attention from and to the pooled queries."""
    part = without_convolution(agent())
    for bias in (*part.collect_bias.parameters(), *part.hand_out_bias.parameters()):
        nn.init.zeros_(bias)
    x = normal(1, 25, 8)
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=2) for t in part.qkv(x).chunk(3, -1))
    grid = q[:, :, 1:].reshape(1, 2, 2, 2, 2, 3, 4)  # two by two bins of 2 × 3 tokens
    a = grid.mean((3, 5)).reshape(1, 2, 4, 4)
    soft = Softmax(Site("hand", 8, 2, LAYOUT))
    collected = soft(a, k, v, layout=LAYOUT)
    handed = soft(q, a, collected, layout=Layout((4,)))
    near(part(x, layout=LAYOUT), part.proj(rearrange(handed, "b h n d -> b n (h d)")))


def test_what_is_padded_does_not_matter():
    part = agent()
    x, edited = normal(2, 1, 25, 8)
    keys = torch.rand(1, 25) < 0.6
    edited = torch.where(keys[..., None], x, edited)
    outs = [part(t, mask=Mask(keys=keys), layout=LAYOUT)[:, keys[0]] for t in (x, edited)]
    near(outs[0], outs[1])


def test_another_grid_resizes_the_biases():
    part, other = agent(), Layout((6, 3), 1)
    out = part(normal(1, 19, 8), layout=other)
    assert out.shape == (1, 19, 8) and out.isfinite().all()


def test_special_tokens_are_not_pooled():
    """Another class token leaves the agents, and so what they hand out from the same keys, as they are."""
    part = without_convolution(agent())
    with torch.no_grad():
        part.collect_bias.prefix.fill_(-1e4)  # nobody collects from it
    x = normal(1, 25, 8)
    other = x.clone()
    other[:, 0] += 3
    near(part(x, layout=LAYOUT)[:, 1:], part(other, layout=LAYOUT)[:, 1:])


def test_narrow_numbers_stay_near():
    narrow(Agent, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))), agents=2)
