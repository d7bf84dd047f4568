"""Perceiver as a pool, arXiv:2103.03206, §3."""

import math

import pytest
import torch
from by_hand import caught, count, near, normal, place, seen, spread, wrong
from timm.models.vision_transformer import Block

from attnzoo.core import Layout, Mask, MultiHead, options_of
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.latent.perceiver import Perceiver
from attnzoo.testing import against


def normed(layer, y):
    """Layer normalisation of each row, written out."""
    centred = y - y.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + layer.eps) * layer.weight + layer.bias


def linear(layer, y):
    """W y + b of each row."""
    return y @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def fed(mlp, y):
    """W₂ gelu(W₁ y)."""
    hidden = linear(mlp.fc1, y)
    return linear(mlp.fc2, hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def asked(q, k, v, heads):
    """What each query receives, head by head; nothing of nobody."""
    merged, d = [], q.shape[1] // heads
    for h in range(heads):
        mine = slice(h * d, (h + 1) * d)
        rows = [torch.exp(k[:, mine] @ one[mine] / math.sqrt(d)) for one in q]
        merged.append(
            torch.stack([row / row.sum() @ v[:, mine] if len(k) else 0 * q[0, mine] for row in rows])
        )
    return torch.cat(merged, dim=1)


@against(Perceiver, examples=8, options=lambda options: "latents" in options)  # the default has 16
def test_oracle(component, options, x, keys):
    """Sample by sample: latents read the tokens that exist, pass an MLP, and ask each other, layer by layer."""
    c, out, stages = x.shape[2], [], list(component.stages)
    for tokens, exist in zip(x, keys, strict=True):
        z = component.latents
        for i in range(options["repeats"]):
            stage = stages[0] if i == 0 else stages[1] if options["share"] else stages[i]
            kv = linear(stage.kv, normed(stage.norm_tokens, tokens[exist]))
            q = linear(stage.q, normed(stage.norm_latents, z))
            read = asked(q, kv[:, :c], kv[:, c:], options["cross_heads"])
            z = z + linear(stage.proj, read)
            z = z + fed(stage.mlp, normed(stage.norm, z))
            for block in stage.tower:
                q, k, v = linear(block.attn.qkv, normed(block.norm1, z)).split(c, dim=1)
                z = z + linear(block.attn.proj, asked(q, k, v, component.heads))
                z = z + fed(block.mlp, normed(block.norm2, z))
        out.append(sum(z) / len(z))
    return torch.stack(out)


def pooled(
    part, x, mask, scale=-0.5, over=-1, residual=1.0, mlp=True, tower=True, latent_norm=True, token_norm=True,
    swap=False, first=False, turn=None,
):  # fmt: skip
    """The equations with a fault."""
    keys = torch.ones_like(x[..., 0], dtype=torch.bool) if mask.keys is None else mask.keys
    there, z, heads = keys[:, None, None], part.latents.expand(len(x), -1, -1), part.cross_heads
    for i in part.turns:
        stage = part.stages[i if turn is None else turn]
        q = stage.q(stage.norm_latents(z) if latent_norm else z).unflatten(2, (heads, -1)).transpose(1, 2)
        kv = stage.kv(stage.norm_tokens(x) if token_norm else x)
        k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in kv.chunk(2, -1))
        k, v = (v, k) if swap else (k, v)
        weights = (q @ k.mT * q.shape[-1] ** scale).masked_fill(~there, -1e9).softmax(over)
        z = residual * z + stage.proj((weights.masked_fill(~there, 0.0) @ v).transpose(1, 2).flatten(2))
        z = z + stage.mlp(stage.norm(z)) if mlp else z
        z = stage.tower(z) if tower else z
    return z[:, 0] if first else z.mean(1)


def with_fault(**fault):
    """The pool with one fault."""
    return wrong(Perceiver, pool=lambda self, x, *, mask, layout: pooled(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=8).ok


MUTANTS = {
    "no scale": with_fault(scale=0.0),
    "softmax over the latents": with_fault(over=-2),
    "softmax over the batch": with_fault(over=0),
    "no residual": with_fault(residual=0.0),
    "no MLP after the reading": with_fault(mlp=False),
    "latents do not ask each other": with_fault(tower=False),
    "latents are not normalised": with_fault(latent_norm=False),
    "tokens are not normalised": with_fault(token_norm=False),
    "keys and values swapped": with_fault(swap=True),
    "the first latent for the mean": with_fault(first=True),
    "the first reading's weights for all": with_fault(turn=0),
    "the mask ignored": wrong(Perceiver, pool=lambda self, x, *, mask, layout: pooled(self, x, Mask())),
    "special tokens left out": wrong(
        Perceiver,
        pool=lambda self, x, *, mask, layout: pooled(
            self, x[:, (p := layout.prefix) :], Mask(keys=None if mask.keys is None else mask.keys[:, p:])
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


FORMS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"repeats": 3, "depth": 0},
        {"repeats": 2, "depth": 2, "cross_heads": 4},
        {"repeats": 3, "share": False},
    ],
    ids=str,
)


def perceiver(dim=8, tokens=5, latents=3, **options) -> Perceiver:
    """In float64, with weights of a size that matters."""
    return spread(Perceiver(place(dim, 2, tokens), latents=latents, **options), 0.5)


# By hand


def test_hand_a_query_of_zero_reads_the_mean():
    """And without MLP and tower each latent is itself and that: the pool is the mean latent and W mean(v)."""
    part, x = perceiver(depth=0), normal(2, 5, 8)
    (stage,) = part.stages
    with torch.no_grad():
        for parameter in (*stage.q.parameters(), *stage.mlp.fc2.parameters()):
            parameter.zero_()
    v = stage.kv(stage.norm_tokens(x))[..., 8:]
    near(part(x, layout=Layout((5,))), part.latents.mean(0) + stage.proj(v.mean(1)))
    near(
        seen(part, x, tap="weights_1", layout=Layout((5,))),
        torch.full((2, 1, 3, 5), 0.2, dtype=torch.float64),
    )


def test_hand_parameters():
    """q, kv, proj and an MLP of width c, with three norms, for a reading; a layer of self-attention has two norms."""
    c, r = 8, 3
    mlp = 2 * (c * c + c)
    reading, layer = 4 * (c * c + c) + mlp + 3 * 2 * c, 4 * (c * c + c) + mlp + 2 * 2 * c
    assert count(perceiver()) == r * c + reading + layer
    assert count(perceiver(depth=0)) == r * c + reading
    assert count(perceiver(repeats=2)) == count(perceiver(repeats=7)) == r * c + 2 * (reading + layer)
    assert count(perceiver(repeats=7, share=False)) == r * c + 7 * (reading + layer)


def test_hand_the_start():
    part = Perceiver(place(64, 2, 4), latents=32)
    part.init_weights()
    assert abs(part.latents.detach().std() / 0.02 - 1) < 0.1


def test_defaults():
    given = {"latents": 16, "depth": 1, "repeats": 1, "share": True, "cross_heads": 1}
    assert options_of(Perceiver)().model_dump() == given


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(RecipeError, match="AZ308.*3 heads"):
        Perceiver(place(8, 2), cross_heads=3)


# Identities


@FORMS
def test_identity_tokens_in_another_order_give_the_same(options):
    part, x = perceiver(**options), normal(2, 5, 8)
    near(part(x[:, [3, 0, 4, 1, 2]], layout=Layout((5,))), part(x, layout=Layout((5,))))


def test_identity_latents_in_another_order_give_the_same():
    part, x = perceiver(), normal(2, 5, 8)
    wanted = part(x, layout=Layout((5,))).detach()
    with torch.no_grad():
        part.latents.copy_(part.latents[[2, 0, 1]])
    near(part(x, layout=Layout((5,))), wanted)


def test_identity_latents_that_are_the_tokens_are_a_layer_of_cross_attention():
    """M = N, Z = X and norms alike: with the weights of multi-head attention it gives x + MHA(norm(x))."""
    part, x, site = perceiver(latents=5, depth=0, cross_heads=2), normal(1, 5, 8), place(8, 2, 5)
    (stage,), plain = part.stages, MultiHead(site, Softmax(site)).double()
    with torch.no_grad():
        part.latents.copy_(x[0])
        plain.qkv.weight.copy_(torch.cat([stage.q.weight, stage.kv.weight]))
        plain.qkv.bias.copy_(torch.cat([stage.q.bias, stage.kv.bias]))
        stage.mlp.fc2.weight.zero_(), stage.mlp.fc2.bias.zero_()
    plain.proj.load_state_dict(stage.proj.state_dict())
    stage.norm_tokens.load_state_dict(stage.norm_latents.state_dict())
    near(part(x, layout=Layout((5,))), (x + plain(stage.norm_latents(x), layout=Layout((5,)))).mean(1))


def test_identity_the_tower_is_timms():
    """Where nothing is read, the pool is the mean of timm's blocks over the latents."""
    part, x = perceiver(depth=2), normal(2, 5, 8)
    (stage,) = part.stages
    with torch.no_grad():
        stage.proj.weight.zero_(), stage.proj.bias.zero_()
    z = part.latents[None] + stage.mlp(stage.norm(part.latents[None]))
    for own in stage.tower:
        block = Block(8, 2, mlp_ratio=1.0, qkv_bias=True).double().eval()
        block.load_state_dict(own.state_dict())
        block.norm1.eps = block.norm2.eps = own.norm1.eps
        z = block(z)
    near(part(x, layout=Layout((5,))), z.mean(1).expand(2, 8))


@FORMS
def test_identity_padding_is_a_shorter_input(options):
    part, x = perceiver(**options), normal(2, 5, 8)
    keys = torch.tensor([[True, False, True, True, False]]).expand(2, 5)
    near(part(x, mask=Mask(keys=keys), layout=Layout((5,))), part(x[:, keys[0]], layout=Layout((3,))))


def test_identity_shared_weights_are_equal_weights():
    one, two = perceiver(repeats=3), perceiver(repeats=3, share=False)
    state = one.state_dict()
    two.load_state_dict(
        state | {k.replace("stages.1", "stages.2"): t for k, t in state.items() if "stages.1" in k}
    )
    x = normal(2, 5, 8)
    near(two(x, layout=Layout((5,))), one(x, layout=Layout((5,))))


def test_there_is_a_map_for_each_reading():
    part, x = perceiver(repeats=3, cross_heads=4), normal(2, 5, 8)
    maps = [seen(part, x, tap=f"weights_{i}", layout=Layout((5,))) for i in (1, 2, 3)]
    for one in maps:
        assert one.shape == (2, 4, 3, 5)
        near(one.sum(-1), torch.ones(2, 4, 3))
    assert (maps[1] - maps[2]).abs().max() > 1e-3  # the latents have changed meanwhile


def test_where_no_token_exists_nothing_is_nan():
    part, nobody = perceiver(repeats=2), Mask(keys=torch.zeros(2, 5, dtype=torch.bool))
    x = normal(2, 5, 8).requires_grad_()
    out = part(x, mask=nobody, layout=Layout((5,)))
    out.sum().backward()
    assert out.isfinite().all() and not x.grad.any()


def test_narrow_numbers_stay_near():
    keys = torch.arange(7) < torch.tensor([[7], [4], [1]])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        part = spread(Perceiver(place(8, 2, 7), latents=3), 0.3).to(dtype).double()
        x = normal(3, 7, 8).to(dtype).double()
        for mask in (Mask(), Mask(keys=keys)):
            wanted = part.double()(x, mask=mask, layout=Layout((7,))).detach()
            found = part.to(dtype)(x.to(dtype), mask=mask, layout=Layout((7,)))
            assert found.dtype == dtype
            near(found, wanted, tolerance * max(1.0, float(wanted.abs().max())))
