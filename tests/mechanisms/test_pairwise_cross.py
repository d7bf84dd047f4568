"""Pair-wise cross-attention of DCAL, CVPR 2022, §3.3."""

import math

import pytest
import torch
from by_hand import caught, line, near, normal, place, seen, set_all, spread, wrong
from torch.nn import functional as F

import attnzoo
from attnzoo.core import Layout, Site
from attnzoo.errors import RecipeError
from attnzoo.hosts.dual import DualBlock
from attnzoo.mechanisms.cross.pairwise_cross import PairwiseCross
from attnzoo.recipe import compose_file
from attnzoo.testing import against


@against(PairwiseCross)
def test_oracle(component, x, source):
    """Token by token: the own keys, then those of the context, all from one matrix."""
    (b, n, c), heads = x.shape, component.heads
    d, weight, bias = c // heads, component.qkv.weight, component.qkv.bias
    bias = torch.zeros(3 * c).to(x) if bias is None else bias
    out = []
    for s in range(b):
        others = [] if component.context_dim is None else list(source[s])
        made = [weight @ token + bias for token in [*x[s], *others]]
        for i in range(n):
            merged = []
            for h in range(heads):
                q, k, v = (slice(part * c + h * d, part * c + (h + 1) * d) for part in range(3))
                weights = torch.stack([made[i][q] @ one[k] / math.sqrt(d) for one in made]).softmax(0)
                merged.append(sum(w * one[v] for w, one in zip(weights, made, strict=True)))
            out.append(F.linear(torch.cat(merged), component.proj.weight, component.proj.bias))
    return torch.stack(out).reshape(b, n, c)


def mixing(change):
    """The mechanism with another source, or other parameters."""

    def mix(self, x, source, *, mask, layout):
        return PairwiseCross.mix(self, *change(self, x, source), mask=mask, layout=layout)

    return wrong(PairwiseCross, mix=mix)


MUTANTS = {
    "itself": mixing(lambda self, x, source: (x, x)),
    "one too few": mixing(lambda self, x, source: (x, source[:, :-1])),
    "of another sample": mixing(lambda self, x, source: (x, source.roll(1, 0))),
    "itself twice": mixing(lambda self, x, source: (x, torch.cat([source, x], dim=1))),
    "shifted": mixing(lambda self, x, source: (x + 1, source)),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_two_keys():
    """One channel, W = 1: own token ln 2 with score ln² 2, the other image's 0 with score 0."""
    component = PairwiseCross(place(1, context_dim=1, context_layout=Layout((1,))))
    set_all(component, 1.0)
    for linear in (component.qkv, component.proj):
        linear.bias.data.zero_()
    a = math.log(2)
    share = math.exp(a * a) / (math.exp(a * a) + 1)
    near(component(line(a), line(0.0), layout=Layout((1,))), [[[share * a]]])
    weights = seen(component, line(a), line(0.0), layout=Layout((1,)))
    near(weights, [[[[share, 1 - share]]]])


def pair(n: int = 5, m: int = 5, **site) -> tuple[PairwiseCross, torch.Tensor, torch.Tensor, Layout]:
    """The mechanism with all parameters off their start, own tokens, those of another image, a layout."""
    layout = Layout((n,))
    component = spread(
        PairwiseCross(Site("here", 8, 2, layout, context_dim=8, context_layout=Layout((m,)), **site))
    )
    return component.double(), normal(2, n, 8), normal(2, m, 8), layout


def test_identity_the_same_image_is_no_disturbance():
    """Keys that are there twice share the mass between them."""
    component, x, _, layout = pair()
    near(component(x, x, layout=layout), component(x, x[:, :0], layout=layout))


def test_identity_an_empty_context_is_self_attention_bit_for_bit():
    component, x, other, layout = pair()
    alone = PairwiseCross(Site("here", 8, 2, layout)).double()
    alone.load_state_dict(component.state_dict())
    assert torch.equal(component(x, x[:, :0], layout=layout), alone(x, layout=layout))
    softmax = attnzoo.create("softmax", dim=8, heads=2).attn.double()
    softmax.load_state_dict(component.state_dict())
    assert torch.equal(softmax(x, layout=layout), alone(x, layout=layout))
    assert not torch.allclose(component(x, other, layout=layout), alone(x, layout=layout), atol=1e-3)


def test_weights_are_shared_by_all_keys():
    component, x, other, layout = pair(m=3)
    weights = seen(component, x, other, layout=layout)
    assert weights.shape == (2, 2, 5, 8)
    near(weights.sum(-1), torch.ones(2, 2, 5).double())


def test_one_width():
    with pytest.raises(RecipeError, match="12 channels are not 8") as error:
        PairwiseCross(Site("here", 8, 2, Layout((5,)), context_dim=12, context_layout=Layout((5,))))
    assert error.value.code == "AZ214"


# ---------------------------------------------------------------------------------------------------------- in the host

RECIPE = """
recipe: 1
host: {kind: dual, base: dual_tiny_patch4_32, model: {depth: 2, embed_dim: 16, num_heads: 2, b: {stream: pair}}}
attention: %s
overrides: [{at: "a.*.cross", put: null}]
"""


def made() -> torch.nn.Module:
    """A model of double precision, its parameters off their start."""
    torch.manual_seed(0)
    return spread(attnzoo.compose(RECIPE % "pairwise_cross"), 0.2).double()


def test_it_is_absent_in_eval():
    """Bit for bit a ViT of the same weights with self-attention; in training an image reads the one before it."""
    model = made().eval()
    x = torch.randn(4, 3, 32, 32).double()
    tokens = model.a(x, {})
    for block in model.blocks:
        part = block.a
        qkv = part.attn.qkv(part.norm1(tokens)).reshape(4, 65, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(4, 65, 16)
        tokens = tokens + part.attn.proj(mixed)
        tokens = tokens + part.mlp(part.norm2(tokens))
    with torch.no_grad():
        assert torch.equal(model(x), model.head(model.norm(tokens)[:, 0]))
    x.requires_grad_()
    for training, readers in ((False, [2]), (True, [1, 2])):
        (gradient,) = torch.autograd.grad(model.train(training)(x)[2].square().sum(), x)
        assert gradient.flatten(1).any(1).nonzero().flatten().tolist() == readers
    with torch.no_grad():
        assert torch.equal(model(x[:1]), model.eval()(x[:1]))


def by_hand(model, x) -> torch.Tensor:
    """f = softmax(Q₁ [K₁; K₂]ᵀ/√d) [V₁; V₂], where 2 goes through plain self-attention."""

    def attend(part, own, keys):
        q, k, v = part.attn.qkv.weight.chunk(3)
        bq, bk, bv = part.attn.qkv.bias.chunk(3)
        heads = [(own @ q.T + bq, keys @ k.T + bk, keys @ v.T + bv)]
        out = [
            torch.softmax(q[..., s] @ k[..., s].mT / 8**0.5, -1) @ v[..., s]
            for q, k, v in heads
            for s in (slice(8), slice(8, 16))
        ]
        return part.attn.proj(torch.cat(out, -1))

    out = []
    for i in range(len(x)):
        one, two = model.a(x[[i]], {}), model.a(x[[i - 1]], {})
        for block in model.blocks:
            part = block.a
            u, v = part.norm1(one), part.norm1(two)
            one, two = one + attend(part, u, torch.cat([u, v], 1)), two + attend(part, v, v)
            one, two = one + part.mlp(part.norm2(one)), two + part.mlp(part.norm2(two))
        out.append(model.head(model.norm(one)[:, 0]))
    return torch.cat(out)


def test_in_training_it_is_the_equation():
    model, x = made().train(), torch.randn(3, 3, 32, 32).double()
    near(model(x), by_hand(model, x))


def updated(self, a, b):
    """The partner is read after its own self-attention."""
    if b is None:
        return self.a.think(self.a.attend(a)), None
    b = self.a.attend(b)
    return self.a.think(self.a.attend(a, b)), self.a.think(b)


def mutual(self, a, b):
    """The partner reads too."""
    if b is None:
        return self.a.think(self.a.attend(a)), None
    a, b = self.a.attend(a, b), self.a.attend(b, a)
    return self.a.think(a), self.a.think(b)


@pytest.mark.parametrize("forward", [updated, mutual])
def test_a_wrong_layer_is_seen(forward, monkeypatch):
    monkeypatch.setattr(DualBlock, "forward", forward)
    model, x = made().train(), torch.randn(3, 3, 32, 32).double()
    with torch.no_grad():
        assert (model(x) - by_hand(model, x)).abs().max() > 1e-6


def test_where_it_can_be_put():
    """Where a partner may join; not in a stack with one stream, nor beside a stream that is no pair."""
    info = compose_file(RECIPE % "pairwise_cross").info
    assert {site.context_dim for site in info.sites().values()} == {16}
    fused = RECIPE % "{fuse: add, of: [softmax, pairwise_cross]}"
    for text in (
        fused,
        (RECIPE % "pairwise_cross").replace("pair}", "tokens, count: 3}").replace("null", "softmax"),
        "recipe: 1\nhost: {kind: vit}\nattention: pairwise_cross\n",
    ):
        with pytest.raises(
            RecipeError, match="`pairwise_cross` reads from a second stream; the site has none"
        ) as error:
            compose_file(text)
        assert "AZ302" in [fault.code for fault in error.value.diagnostics]
    both = attnzoo.compose(RECIPE % "{fuse: mean, of: [pairwise_cross, pairwise_cross]}").train()
    assert both(torch.randn(2, 3, 32, 32)).shape == (2, 10)
