"""Gated attention, arXiv:2505.06708, §2.2, eq. 5."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong

from attnzoo.core import Layout, Mask, MultiHead, Site, options_of, rotate
from attnzoo.errors import RecipeError
from attnzoo.functional import split_heads
from attnzoo.mechanisms.dot_product.gated_attention import GatedAttention
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against

FORMS = [
    {},
    {"by": "head"},
    {"at": "values"},
    {"by": "head", "at": "values"},
    {"at": "projected"},
]


def linear(layer, x):
    """W x + b for every token."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def projected(part, x, source):
    """Queries, keys and values."""
    if part.context_dim is None:
        return linear(part.qkv, x).chunk(3, -1)
    return linear(part.q, x), *linear(part.kv, source).chunk(2, -1)


@against(GatedAttention, examples=40)
def test_oracle(component, options, x, source, allowed):
    """Head by head and query by query; channel a of head h is gated by its own number or by its head's."""
    (b, n, c), heads, at = x.shape, component.heads, options["at"]
    d = c // heads
    q, k, v = projected(component, x, source)
    asks = source if at == "values" else x
    gate = torch.stack([asks @ component.gate_proj.weight[a if options["by"] == "channel" else a // d] for a in range(c)], -1)  # fmt: skip
    gate = 1 / (1 + torch.exp(-gate))
    merged = torch.zeros_like(x)
    for s in range(b):
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            for i in range(n):
                see = allowed[s, h, i]
                if see.any():
                    weights = (k[s, see, own] @ q[s, i, own] / math.sqrt(d)).softmax(0)
                    values = v[s, see, own] * (gate[s, see, own] if at == "values" else 1)
                    merged[s, i, own] = weights @ values * (gate[s, i, own] if at == "merged" else 1)
    out = linear(component.proj, merged)
    return out * gate if at == "projected" else out


def with_fault(
    gate=lambda z: z.sigmoid(), asks=lambda x, source, at: source if at == "values" else x, change=lambda q, k, v: (q, k, v),
    hide=lambda mask: mask, share=lambda g, d: g.repeat_interleave(d, -1), scale=1.0, at=lambda at: at,
):  # fmt: skip
    """Gated attention with one fault."""

    def mix(self, x, source, *, mask, layout):
        q, k, v = change(*projected(self, x, source))
        where = at(self.at)
        g = gate(self.gate_proj(asks(x, source, self.at)))
        g = share(g, self.each) if self.each > 1 else g
        v = v * g if where == "values" else v
        q, k, v = (split_heads(t, self.heads) for t in (q * scale, k, v))
        out = Softmax.attend(self, q, k, v, mask=hide(mask), layout=layout).transpose(1, 2).flatten(2)
        out = self.proj(out * g if where == "merged" else out)
        return out * g if where == "projected" else out

    return wrong(GatedAttention, mix=mix)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


def elsewhere(at):
    """The gate behind the projection instead of before it."""
    return {"merged": "projected", "projected": "merged"}.get(at, at)


MUTANTS = {
    "no gate": with_fault(gate=torch.ones_like),
    "no sigmoid": with_fault(gate=lambda z: z),
    "a softmax": with_fault(gate=lambda z: z.softmax(-1)),
    "1 - the gate": with_fault(gate=lambda z: (-z).sigmoid()),
    "twice the gate": with_fault(gate=lambda z: 2 * z.sigmoid()),
    "the gate of another token": with_fault(gate=lambda z: z.sigmoid().roll(1, 1)),
    "the gate of another sample": with_fault(gate=lambda z: z.sigmoid().roll(1, 0)),
    "one gate for all tokens": with_fault(gate=lambda z: z.sigmoid().mean(1, keepdim=True).expand_as(z)),
    "heads dealt in turn": with_fault(share=lambda g, d: g.repeat(1, 1, d)),
    "behind the projection": with_fault(at=elsewhere),
    "no scale": with_fault(scale=1.7),
    "q and k swapped": with_fault(change=lambda q, k, v: (k, q, v) if q.shape == k.shape else (q, k, v)),
    "k and v swapped": with_fault(change=lambda q, k, v: (q, v, k)),
    "the mask ignored": with_fault(hide=lambda mask: Mask()),
    "the mask inverted": with_fault(hide=lambda mask: mask if mask.keys is None else Mask(~mask.keys, mask.pairs, mask.causal)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def gated(site=None, **options) -> GatedAttention:
    """In float64, with parameters of a size that matters."""
    return spread(GatedAttention(site or place(12, 3, 5), **options))


def plain(part, site) -> MultiHead:
    """Multi-head attention with its projections."""
    other = MultiHead(site, Softmax(site)).double()
    other.load_state_dict({k: v for k, v in part.state_dict().items() if not k.startswith("gate_proj")})
    return other


# By hand


@pytest.mark.parametrize("options", FORMS)
def test_hand_parameters(options):
    """W_g is c × c, or c × h, without a bias; the rest is multi-head attention's."""
    wanted = 12 * 12 if options.get("by") != "head" else 12 * 3
    assert count(GatedAttention(place(12, 3), **options)) == 4 * 12 * 12 + 4 * 12 + wanted
    crossed = GatedAttention(place(12, 3, context_dim=20, qkv_bias=False, proj_bias=False), **options)
    reads = 20 if options.get("at") == "values" else 12
    assert count(crossed) == 2 * 12 * 12 + 2 * 12 * 20 + wanted // 12 * reads


def test_hand_one_token():
    """x = ln 3, all weights 1: v σ(x) = ln 3 · 3/4."""
    part = set_all(GatedAttention(place(1, tokens=1, qkv_bias=False, proj_bias=False)), 1.0)
    x = torch.full((1, 1, 1), math.log(3), dtype=torch.float64)
    near(part(x, layout=Layout((1,))), [0.75 * math.log(3)])


def test_hand_gates_go_to_neighbouring_channels():
    """Head 0 is open, head 1 shut."""
    part = set_all(GatedAttention(place(4, 2, 1, proj_bias=False), by="head"), 0.0)
    with torch.no_grad():
        part.qkv.bias[8:].copy_(torch.arange(1.0, 5))
        part.proj.weight.copy_(torch.eye(4))
        part.gate_proj.weight.copy_(torch.tensor([[50.0], [-50]]).expand(2, 4))
    near(part(torch.ones(1, 1, 4).double(), layout=Layout((1,))), [1, 2, 0, 0])


def test_defaults():
    assert options_of(GatedAttention)().model_dump() == {"by": "channel", "at": "merged"}
    part = GatedAttention(place(192, 3))  # starts as other Linears do
    assert abs(part.gate_proj.weight.std() / part.qkv.weight.std() - 1) < 0.05


# Identities


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.7)])
def test_identity_a_gate_of_zeros_is_half_of_multi_head_attention(options, mask):
    """Exactly ½, before the bias of W_o."""
    site = place(12, 3, 5, proj_bias=False)
    part, x = gated(site, **options), normal(2, 5, 12)
    with torch.no_grad():
        part.gate_proj.weight.zero_()
    near(part(x, mask=mask, layout=site.layout), plain(part, site)(x, mask=mask, layout=site.layout) / 2)


@pytest.mark.parametrize("at", ["merged", "values"])
def test_identity_by_head_is_by_channel_with_equal_columns(at):
    heads, channels = gated(by="head", at=at), gated(at=at)
    state = heads.state_dict()
    state["gate_proj.weight"] = state["gate_proj.weight"].repeat_interleave(4, 0)
    channels.load_state_dict(state)
    x = normal(2, 5, 12)
    near(heads(x, layout=Layout((5,))), channels(x, layout=Layout((5,))))


@pytest.mark.parametrize("options", FORMS)
def test_identity_a_gate_only_makes_smaller(options):
    """It lies between 0 and 1; with W_o the identity what comes out is at most what attention gives."""
    site = place(12, 3, 5, proj_bias=False)
    part, x = gated(site, **options), normal(2, 5, 12)
    with torch.no_grad():
        part.proj.weight.copy_(torch.eye(12))
        part.qkv.weight[24:].abs_()  # values of one sign, so that gated values cannot add up to more
    x = x.abs()
    gate = seen(part, x, layout=site.layout, tap="gate")
    assert ((gate > 0) & (gate < 1)).all()
    whole = plain(part, site)(x, layout=site.layout) if options.get("at") != "values" else None
    if whole is not None:
        assert (part(x, layout=site.layout).abs() <= whole.abs()).all()


def test_identity_an_open_gate_is_multi_head_attention():
    """With timm's state-dict keys."""
    site = place(12, 3, 5)
    part, x = gated(site), normal(2, 5, 12)
    x[..., 0] = 1.0
    with torch.no_grad():
        part.gate_proj.weight.zero_()
        part.gate_proj.weight[:, 0] = 60.0
    near(part(x, layout=site.layout), plain(part, site)(x, layout=site.layout))


def test_identity_the_gate_is_the_tokens_own():
    """What another token says reaches a query by its values alone: of uniform values nothing changes."""
    part, x = gated(), normal(1, 5, 12)
    with torch.no_grad():
        part.qkv.weight[24:].zero_()
    other = x.clone()
    other[:, 3] += 1
    near(part(other, layout=Layout((5,)))[:, :3], part(x, layout=Layout((5,)))[:, :3])


def test_identity_values_are_gated_by_the_context():
    """A gate of the tokens that are read from does not know who asks."""
    site = place(12, 3, 5, context_dim=7)
    part, context = gated(site, at="values"), normal(1, 4, 7)
    gates = [seen(part, normal(1, 5, 12), context, layout=site.layout, tap="gate") for _ in range(2)]
    assert gates[0].shape == (1, 4, 12) and torch.equal(*gates)


def test_identity_wishes_of_the_site():
    """Norms of queries and keys, then rotary positions: by hand."""
    site = Site("hand", 12, 3, Layout((5,)), qk_norm=True, rotary=True)
    part, x = gated(site), normal(2, 5, 12)
    q, k, v = (split_heads(t, 3) for t in part.qkv(x).chunk(3, -1))
    weights = (rotate(part.q_norm(q)) @ rotate(part.k_norm(k)).mT / 2).softmax(-1)
    merged = (weights @ v).transpose(1, 2).flatten(2)
    near(part(x, layout=site.layout), part.proj(merged * (x @ part.gate_proj.weight.T).sigmoid()))


def test_a_gate_by_head_of_what_is_projected_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*what is projected has no heads"):
        GatedAttention(place(12, 3), by="head", at="projected")


@pytest.mark.parametrize("options", FORMS)
def test_narrow_numbers_stay_near(options):
    narrow(GatedAttention, [(2, 7, 12)], site=place(12, 3, 7), **options)
