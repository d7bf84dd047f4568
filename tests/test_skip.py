"""The skip between layers: every variant against its equation in plain PyTorch, in every host, and what is refused."""

import copy
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import nn

from attnzoo.bench.composition import describe
from attnzoo.core import Layout, Mask, find_taps, watch
from attnzoo.errors import RecipeError, ZooError
from attnzoo.hosts.skip import VARIANTS, AddNorm, PairMean, carried
from attnzoo.recipe import compose, compose_file

F64 = torch.float64
SEQ = "recipe: 1\nhost: {kind: seq2seq, dim: 16, mlp_dim: 24, layers: 4, vocab: 13, max_length: 12, dropout: 0%s}\n"
STACK = "recipe: 1\nhost: {kind: sequence, dim: 16, mlp_dim: 24, layers: 4, vocab: 13, max_length: 12%s}\n"
VIT = (
    "recipe: 1\nhost: {kind: vit, base: vit_tiny_patch16_224, model: {img_size: 16, patch_size: 4, depth: 4, "
    "embed_dim: 16, num_heads: 4, num_classes: 3%s}}\n"
)
CCT = "recipe: 1\nhost: {kind: cct, base: cct_2_3x2, model: {img_size: 16, embed_dim: 16, depth: 2, num_heads: 4}}\n"
HEADS = "heads: [8, 4, 4, 1]\n"
READ = [use for use in VARIANTS if use not in ("none", "cross")]
"""What can be put anywhere; `encoder_stack` of two encoders."""


def rough(recipe: str) -> nn.Module:
    """A model in float64, in eval mode, with norms and biases that are not 1 and 0."""
    model = compose(recipe).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) / 5)
    return model


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three sources and targets of different lengths."""
    source, target = torch.randint(4, 13, (3, 9)), torch.randint(4, 13, (3, 7))
    source[1, 5:], source[2, 7:], target[0, 4:], target[2, 6:] = 0, 0, 0, 0
    return source, target


# -------------------------------------------------------------------------------------------------------- the oracle


def ln(x, norm):
    """γ (x - μ) / √(σ² + ε) + β."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def pool(maps, heads):
    """Each of fewer heads gets the mean of the adjacent ones that it stands for."""
    each = maps.shape[1] // heads
    return torch.stack([sum(maps[:, i * each + j] for j in range(each)) / each for i in range(heads)], dim=1)


def attention(part, x, context, allowed, use, before, norm):
    """One attention with the skip: what it gives, and what it hands on. `before` is None in the first layer."""
    b, n, c = x.shape
    h, d = part.heads, c // part.heads
    if context is None:
        q, k, v = F.linear(x, part.qkv.weight, part.qkv.bias).chunk(3, dim=-1)
    else:
        q = F.linear(x, part.q.weight, part.q.bias)
        k, v = F.linear(context, part.kv.weight, part.kv.bias).chunk(2, dim=-1)
    q, k, v = (t.reshape(b, -1, h, d).permute(0, 2, 1, 3) for t in (q, k, v))
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / d**0.5
    if use == "logits_pairmean" and before is not None:
        logits = logits + pool(before, h)
    odds = logits.exp() * allowed
    probs = odds / odds.sum(-1, keepdim=True)
    if use == "probs_pairmean" and before is not None:
        probs = 0.5 * (probs + pool(before, h))
    merged = torch.einsum("bhnm,bhmd->bnhd", probs, v).reshape(b, n, c)
    joined = merged
    if use in ("merged", "merged_raw", "cross") and before is not None:
        joined = ln(merged + before, norm)
    out = F.linear(joined, part.proj.weight, part.proj.bias)
    if use == "merged_post" and before is not None:
        out = ln(out + before, norm)
    handed = {
        "merged": joined, "cross": joined, "merged_raw": merged, "merged_post": out, "probs_pairmean": probs,
        "logits_pairmean": logits,
    }  # fmt: skip
    return out, handed.get(use)


def around(x, norm, norm_first, inner):
    """Pre-norm or post-norm residual."""
    return x + inner(ln(x, norm)) if norm_first else ln(x + inner(x), norm)


def mlp(part, act):
    """The MLP of a layer."""
    return lambda x: F.linear(
        act(F.linear(x, part.fc1.weight, part.fc1.bias)), part.fc2.weight, part.fc2.bias
    )


def stack(x, layers, norms, use, allowed, act, memory=None, at="self", own=None, norm_first=True, encoders=2):
    """Layers one after the other.

    Args:
        x: (b n c).
        layers: (norm, attention, norm, mlp) of each, or with two more before the mlp's for what reads the memory.
        norms: LN_l of each layer, None for the first; of each encoder for `encoder_stack`.
        use: The variant.
        allowed: Boolean (b 1 n m), who may attend to whom; to the memory for the cross-attention.
        act: Activation.
        memory: What the cross-attention reads.
        at: Which attention takes part, `self` or `cross`.
        own: Boolean for self-attention, when there is a memory.
        norm_first: Where norms stand.
        encoders: How many, for `encoder_stack`.
    """
    before = None
    for i, layer in enumerate(layers):
        kept = []

        def attend(z, part, context, mask, takes_part, i=i, kept=kept, before=before):
            out, handed = attention(part, z, context, mask, use if takes_part else "none", before, norms[i] if use != "encoder_stack" else None)  # fmt: skip
            if takes_part:
                kept.append(handed)
            return out

        norm1, self_part, *cross, norm2, mlp_part = layer
        mask = allowed if memory is None else own
        x = around(x, norm1, norm_first, lambda z: attend(z, self_part, None, mask, at == "self"))  # noqa: B023
        if cross:
            norm, part = cross
            x = around(x, norm, norm_first, lambda z: attend(z, part, memory, allowed, at == "cross"))  # noqa: B023
        x = around(x, norm2, norm_first, mlp(mlp_part, act))
        per = len(layers) // encoders
        if use != "encoder_stack":
            before = kept[0]
        elif i % per == per - 1:
            if before is not None:
                x = ln(x + before, norms[i // per])
            before = x
    return x


def skip_norms(model):
    """LN of each layer that takes part, None for the first; None beyond."""
    return [m.norm for m in model.modules() if isinstance(m, AddNorm)] + [None] * 4


def encoded(model, source, use, norm_first=True):
    """What the encoder of a seq2seq model should give."""
    x = model.embed_source.weight[source] * 4.0 + model.positions.table[: source.shape[1]]
    layers = [(one.around_attn.norm, one.attn, one.around_mlp.norm, one.mlp) for one in model.encoder]
    x = stack(x, layers, skip_norms(model), use, (source != 0)[:, None, None], F.relu, norm_first=norm_first)
    return ln(x, model.encoder_norm) if norm_first else x


def decoded(model, target, memory, keys, use, at):
    """What a seq2seq model should answer, with the skip in its decoder."""
    m = target.shape[1]
    x = model.embed_target.weight[target] * 4.0 + model.positions.table[:m]
    layers = [
        (one.around_attn.norm, one.attn, one.around_cross.norm, one.cross, one.around_mlp.norm, one.mlp)
        for one in model.decoder
    ]
    own = (target != 0)[:, None, None] & torch.ones(m, m).tril().bool()
    x = stack(x, layers, skip_norms(model), use, keys[:, None, None], F.relu, memory, at, own)
    return F.linear(ln(x, model.decoder_norm), model.head.weight, model.head.bias)


def seen_by_vit(model, image, use):
    """What a ViT should answer."""
    x = model._pos_embed(model.patch_embed(image))
    layers = [(one.norm1, one.attn, one.norm2, one.mlp) for one in model.blocks]
    x = stack(x, layers, skip_norms(model), use, torch.ones(1, 1, 1, 1).bool(), F.gelu)
    return model.head(ln(x, model.norm)[:, 0])


def guessed(model, tokens, use, causal):
    """What a stack of layers should answer."""
    n = tokens.shape[1]
    x = model.embed.weight[tokens] + model.positions.table[:n]
    layers = [(one.around_attn.norm, one.attn, one.around_mlp.norm, one.mlp) for one in model.layers]
    allowed = torch.ones(n, n).bool().tril() if causal else torch.ones(1, 1).bool()
    x = stack(x, layers, skip_norms(model), use, allowed[None, None], F.gelu)
    return F.linear(ln(x, model.norm), model.head.weight, model.head.bias)


def near(one, other) -> bool:
    """Whether two results are the same."""
    return torch.allclose(one, other, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------ variants against equations


@pytest.mark.parametrize("norm_first", ["true", "false"])
@pytest.mark.parametrize("use", ["none", *READ])
@pytest.mark.sample(3)
def test_in_an_encoder(use, norm_first):
    model = rough(SEQ % f", norm_first: {norm_first}" + HEADS + f"attention: softmax\nskip: {use}\n")
    source, _ = padded()
    expected = encoded(model, source, use, norm_first == "true")
    assert near(model.encode(source).tokens, expected)
    if use != "none":
        assert not near(expected, encoded(model, source, "none", norm_first == "true"))


def test_the_oracle_tells_readings_apart():
    source, _ = padded()
    with_norms = {"merged", "merged_raw", "merged_post"}
    for use in with_norms:
        model = rough(SEQ % "" + HEADS + f"attention: softmax\nskip: {use}\n")
        others = (with_norms | {"none"}) - {use}
        assert not any(near(model.encode(source).tokens, encoded(model, source, other)) for other in others)


@pytest.mark.parametrize("encoders", [2, 4])
def test_a_stack_of_encoders(encoders):
    model = rough(
        SEQ % "" + f"heads: 4\nattention: softmax\nskip: {{use: encoder_stack, encoders: {encoders}}}\n"
    )
    source, _ = padded()
    x = model.embed_source.weight[source] * 4.0 + model.positions.table[:9]
    layers = [(one.around_attn.norm, one.attn, one.around_mlp.norm, one.mlp) for one in model.encoder]
    keys = (source != 0)[:, None, None]
    x = stack(x, layers, skip_norms(model), "encoder_stack", keys, F.relu, encoders=encoders)
    assert near(model.encode(source).tokens, ln(x, model.encoder_norm))
    assert len([m for m in model.modules() if isinstance(m, AddNorm)]) == encoders


@pytest.mark.parametrize(
    ("use", "at", "where"),
    [("cross", "", "cross"), *((use, ", at: decoder.*.cross", "cross") for use in READ if use != "encoder_stack"),
     *((use, ", at: decoder.*.self", "self") for use in READ)],
)  # fmt: skip
def test_in_a_decoder(use, at, where):
    model = rough(SEQ % "" + f"heads: 4\nattention: softmax\nskip: {{use: {use}{at}}}\n")
    source, target = padded()
    memory = model.encode(source)
    assert near(memory.tokens, encoded(model, source, "none"))
    assert near(model(source, target), decoded(model, target, memory.tokens, memory.keys, use, where))


@pytest.mark.parametrize("use", ["none", *READ])
def test_in_a_vit(use):
    model = rough(VIT % "" + HEADS + f"attention: softmax\nskip: {use}\n")
    image = torch.randn(2, 3, 16, 16, dtype=F64)
    assert near(model(image), seen_by_vit(model, image, use))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("use", ["none", *READ])
def test_in_a_stack_of_layers(use, causal):
    model = rough(STACK % f", causal: {str(causal).lower()}" + HEADS + f"attention: softmax\nskip: {use}\n")
    tokens = torch.randint(0, 13, (3, 9))
    assert near(model(tokens), guessed(model, tokens, use, causal))
    if causal:
        changed = tokens.clone()
        changed[:, 5:] = (changed[:, 5:] + 1) % 13
        assert torch.equal(model(changed)[:, :5], model(tokens)[:, :5])


def test_some_layers_only():
    model = rough(SEQ % "" + "heads: 4\nattention: softmax\nskip: {use: merged, at: 'encoder.[13]'}\n")
    kinds = [type(layer.attn.skip) for layer in model.encoder]
    assert kinds == [nn.Identity, AddNorm, nn.Identity, AddNorm]
    assert not any(isinstance(m, AddNorm) for m in model.decoder.modules())


@pytest.mark.parametrize(
    ("host", "use"), [(SEQ, "merged"), (STACK, "merged"), (VIT, "merged"), (SEQ, "merged_post")]
)
def test_parameters(host, use):
    """An LN for each layer but the first, and nothing else."""
    plain, skipping = (
        compose(host % "" + f"heads: 4\nattention: softmax\nskip: {one}\n") for one in ("none", use)
    )
    extra = sum(p.numel() for p in skipping.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 3 * 2 * 16
    for name, tensor in plain.state_dict().items():
        assert skipping.state_dict()[name].shape == tensor.shape


@pytest.mark.parametrize("use", ["probs_pairmean", "logits_pairmean"])
def test_pair_means_have_no_parameters(use):
    plain, skipping = (
        compose(SEQ % "" + f"heads: 4\nattention: softmax\nskip: {one}\n") for one in ("none", use)
    )
    assert plain.state_dict().keys() == skipping.state_dict().keys()


def test_scalar_norms_of_deep_head_are_in_the_skip_too():
    model = compose(SEQ % ", norm: scalar" + "heads: 4\nattention: softmax\nskip: merged\n")
    assert {type(m.norm).__name__ for m in model.modules() if isinstance(m, AddNorm)} == {
        "NoneType",
        "ScalarNorm",
    }


# ----------------------------------------------------------------------------------------------------- small truths


def joined(model, call) -> list[torch.Tensor]:
    """What each layer's skip gives in a forward, in order."""
    found: list[torch.Tensor] = []
    handles = [
        m.register_forward_hook(lambda _m, args, out: found.append((args[0], out)))
        for m in model.modules()
        if isinstance(m, AddNorm)
    ]
    call()
    for handle in handles:
        handle.remove()
    return found


def in_turn(layers, x) -> None:
    """The attention of each layer, of the same tokens."""
    handed = None
    for layer in layers:
        _, handed = carried(layer.attn, handed, x, layout=Layout((x.shape[1],)))


def fresh(use: str) -> nn.Module:
    """A seq2seq model as it is initialised, in float64."""
    return compose(SEQ % "" + f"{HEADS}attention: softmax\nskip: {use}\n").double().eval()


def test_without_a_first_map_the_second_is_normalised_alone():
    model = fresh("merged")
    with torch.no_grad():
        model.encoder[0].attn.qkv.weight[32:] = 0  # values
        model.encoder[0].attn.qkv.bias[32:] = 0
    (m1, r1), (m2, r2), *_ = joined(model, lambda: model.encode(padded()[0]))
    assert not m1.any() and not r1.any()
    assert bool(m2.any()) and near(r2, F.layer_norm(m2, (16,)))


@pytest.mark.parametrize("use", ["merged", "merged_raw", "merged_post"])
def test_what_is_handed_on_is_normalised_per_token(use):
    model = fresh(use)
    first, *others = joined(model, lambda: model.encode(padded()[0]))
    assert torch.equal(*first)
    for _, out in others:
        assert out.mean(-1).abs().max() < 1e-10
        assert (out.var(-1, unbiased=False) - 1).abs().max() < 0.05
        assert out.shape == (3, 9, 16)


def test_raw_differs_from_the_third_layer_on():
    merged, raw = fresh("merged"), fresh("merged_raw")
    raw.load_state_dict(merged.state_dict())
    source, _ = padded()
    x = merged.embed(merged.embed_source, source)
    outs = []
    for model in (merged, raw):  # the same tokens into every layer, so that only the skip differs
        seen = joined(model, lambda model=model: in_turn(model.encoder, x))
        outs.append([out for _, out in seen])
    same = [torch.equal(one, other) for one, other in zip(*outs, strict=True)]
    assert same == [True, True, False, False]


def test_rows_of_averaged_weights_sum_to_one():
    model = rough(SEQ % "" + f"{HEADS}attention: softmax\nskip: probs_pairmean\n")
    source, _ = padded()
    seen: dict[str, torch.Tensor] = {}
    with watch(model, "weights", lambda name, t: seen.update({name: t})) as taps:
        model.encode(source)
    assert sum(isinstance(tap, PairMean) for tap in taps.values()) == 4
    assert [t.shape for t in seen.values()] == [(3, h, 9, 9) for h in (8, 4, 4, 1)]
    for weights in seen.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, weights.shape[1], 9, dtype=F64))
        assert not weights[1, :, :, 5:].any()


def test_taps_see_the_average():
    """The second layer's tapped weights are the mean of its own and the pooled ones of the first."""
    model = rough(SEQ % "" + f"{HEADS}attention: softmax\nskip: probs_pairmean\n")
    plain = rough(SEQ % "" + f"{HEADS}attention: softmax\n")
    plain.load_state_dict(model.state_dict())
    source, _ = padded()

    def maps(one, x):
        seen: list[torch.Tensor] = []
        with watch(one.encoder, "weights", lambda _name, t: seen.append(t)):
            in_turn(one.encoder, x)
        return seen

    x = model.embed(model.embed_source, source)
    own, averaged = maps(plain, x), maps(model, x)
    running = own[0]
    assert near(averaged[0], running)
    for mine, mean in zip(own[1:], averaged[1:], strict=True):
        running = (mine + pool(running, mine.shape[1])) / 2
        assert near(mean, running)


def test_a_tap_can_still_reach_in():
    model = rough(SEQ % "" + "heads: 4\nattention: softmax\nskip: probs_pairmean\n")
    source, target = padded()
    before = model(source, target)
    with watch(model.encoder, "weights", lambda _name, t: torch.full_like(t, 1 / t.shape[-1])):
        changed = model(source, target)
    assert not near(before, changed) and near(model(source, target), before)


# ------------------------------------------------------------------------------------- nothing lies on the shared model


def cases() -> list:
    """A model of each kind for each variant, and what it takes."""
    source, target = padded()
    takes = {SEQ: (source, target), STACK: (source,), VIT: (torch.randn(3, 3, 16, 16, dtype=F64),)}
    uses = [(host, use) for host in takes for use in READ] + [(SEQ, "cross")]
    return [
        pytest.param(
            host % "" + f"heads: 4\nattention: softmax\nskip: {use}\n", takes[host], id=f"{kind}-{use}"
        )
        for host, use in uses
        for kind in [host.split("kind: ")[1].split(",")[0]]
    ]


def handing(model) -> list[nn.Module]:
    """What takes up what was handed on, in order; the first has nothing to take up."""
    return [m for m in model.modules() if isinstance(m, AddNorm | PairMean)]


def broken_off(model, args) -> None:
    """A forward that raises half way."""

    def fail(*_):
        raise RuntimeError("half way")

    handle = handing(model)[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        model(*args)
    handle.remove()


@pytest.mark.parametrize(("recipe", "args"), cases())
def test_nothing_is_left(recipe, args):
    """A forward that was broken off, and one of another size, leave no trace."""
    model = rough(recipe)
    says = model(*args)
    broken_off(model, args)
    assert near(model(*(t[:1] for t in args)), says[:1])
    broken_off(model, args)
    assert torch.equal(model(*args), says)


@pytest.mark.parametrize("use", ["merged", "probs_pairmean", "merged_post"])
def test_nothing_is_left_for_a_decoder_alone(use):
    """Also where a memory is decoded again, at once or step by step."""
    model = rough(SEQ % "" + f"heads: 4\nattention: softmax\nskip: {{use: {use}, at: decoder.*.self}}\n")
    source, target = padded()
    memory = model.encode(source)
    says = model.decode(target, memory)
    for again in (
        lambda: model.decode(target, memory),
        lambda: model.step(target[:, :1], model.start(memory)),
    ):
        broken_off(model, (source, target))
        logits = again()
        assert near(logits, says[:, : logits.shape[1]])


@pytest.mark.parametrize("use", [use for use in READ if use != "encoder_stack"])
@pytest.mark.parametrize("host", [SEQ, VIT])
def test_a_layer_on_its_own_is_refused(host, use):
    """Without the layer before there is nothing to take up; one that was called on its own hands on to nobody."""
    model = rough(host % "" + f"heads: 4\nattention: softmax\nskip: {use}\n")
    x = torch.randn(2, 17 if host is VIT else 9, 16, dtype=F64)
    first, second = (model.blocks if host is VIT else model.encoder)[:2]
    more = () if host is VIT else (Mask(), Layout((9,)))
    x = first(x, *more)
    with pytest.raises(ZooError) as caught:
        second(x, *more)
    assert caught.value.code == "AZ410"


def mixed_sizes(recipe: str) -> list[tuple[torch.Tensor, ...]]:
    """Inputs of several sizes and batches for a model."""
    made: list[tuple[torch.Tensor, ...]] = []
    for i in range(6):
        if "vit" in recipe:
            made.append((torch.randn(1 + i % 3, 3, 8 + 4 * (i % 4), 8 + 8 * (i % 3)),))
            continue
        source, target = torch.randint(4, 13, (1 + i % 3, 5 + i)), torch.randint(4, 13, (1 + i % 3, 4 + i))
        source[0, 4:], target[0, 3:] = 0, 0
        made.append((source, target) if "seq2seq" in recipe else (source,))
    return made


@pytest.mark.parametrize(("recipe", "_args"), cases())
@pytest.mark.sample(3)
def test_many_threads(recipe, _args):
    """One model, eight threads, inputs of several sizes: bit for bit what a thread alone gets."""
    model = compose(recipe.replace("num_classes: 3", "num_classes: 3, dynamic_img_size: true")).eval()
    inputs = mixed_sizes(recipe)
    with torch.no_grad():
        alone = [model(*args) for args in inputs]

    def call(i: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(*inputs[i % len(inputs)]), alone[i % len(inputs)])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns within a layer
    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(call, range(64)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(("recipe", "args"), cases())
@pytest.mark.sample(3)
def test_samples_do_not_see_each_other(recipe, args):
    model = rough(recipe)
    says = model(*args)
    for i in range(3):
        assert near(model(*(t[i : i + 1] for t in args)), says[i : i + 1])


@pytest.mark.parametrize(("recipe", "args"), cases())
@pytest.mark.sample(3)
def test_copies_and_files(recipe, args):
    model = rough(recipe)
    says = model(*args)
    broken_off(model.train(), args)  # what was left has a gradient, and cannot be copied
    model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(*args), says)
        broken_off(other, args)
    assert torch.equal(model(*args), says)


@pytest.mark.parametrize(("recipe", "args"), cases())
@pytest.mark.sample(3)
def test_all_parameters_get_finite_gradients(recipe, args):
    model = compose(recipe).double().train()
    for _ in range(2):  # no graph of the last step is reached again
        model(*args).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    "use", ["merged", "cross", "probs_pairmean", "logits_pairmean", "merged_post", "encoder_stack"]
)
@pytest.mark.parametrize("at", ["decoder.*.self", "decoder.*.cross"])
@pytest.mark.sample(3)
def test_steps_hand_on_too(use, at):
    if use == "cross":
        at = "decoder.*.cross"
    model = rough(SEQ % "" + f"heads: 4\nattention: softmax\nskip: {{use: {use}, at: {at}}}\n")
    source, target = padded()
    target = target.clamp(min=4)
    state = model.start(model.encode(source))
    steps = torch.cat([model.step(part, state) for part in target.split([1, 3, 1, 2], dim=1)], dim=1)
    assert near(steps, model(source, target))


@pytest.mark.parametrize("use", ["probs_pairmean", "logits_pairmean"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("grouped_query", "multi_head_latent"),
        ("multi_head_latent", "softmax"),
        ("softmax", "grouped_query"),
    ],
)
def test_steps_of_mechanisms_with_caches_of_their_own_hand_on_too(use, first, second):
    """Each hands on the maps of the newest tokens alone, as the others do."""
    recipe = SEQ % "" + f"heads: 4\nattention: {second}\nskip: {{use: {use}, at: decoder.*.self}}\n"
    model = rough(
        recipe + f"overrides: [{{at: decoder.0.self, put: {first}}}, {{at: encoder.*, put: softmax}}, "
        "{at: decoder.*.cross, put: softmax}]\n"
    )
    source, target = padded()
    target = target.clamp(min=4)
    state = model.start(model.encode(source))
    steps = torch.cat([model.step(part, state) for part in target.split([1, 3, 1, 2], dim=1)], dim=1)
    assert near(steps, model(source, target))


@pytest.mark.parametrize("use", ["probs_pairmean", "logits_pairmean"])
def test_maps_of_experts_and_features_are_counted_as_they_are(use):
    """Eight experts hand on to four heads; four heads hand on to no eight experts, nor to 16 features."""
    recipe = SEQ % "" + f"heads: 4\nattention: softmax\nskip: {{use: {use}, at: encoder.*}}\n"
    experts = rough(recipe + "overrides: [{at: encoder.0, put: mixture_of_attention}]\n")
    seen: list[int] = []
    with watch(experts.encoder, "weights", lambda _name, t: seen.append(t.shape[1])):
        experts.encode(padded()[0])
    assert seen == [8, 4, 4, 4]
    for put in ("mixture_of_attention", "random_feature_layer"):
        with pytest.raises(RecipeError, match="AZ314.*cannot be averaged into the"):
            compose(recipe + f"overrides: [{{at: encoder.2, put: {put}}}]\n")


# ------------------------------------------------------------------------------------------------- tools of PyTorch


@pytest.mark.parametrize("use", ["none", *READ])
def test_checkpointing_changes_nothing(use):
    """Two forwards of different sizes before the backward of both: each block finds what it found at first."""
    recipe = VIT % ", dynamic_img_size: true" + f"heads: 4\nattention: softmax\nskip: {use}\n"
    model = compose(recipe).double().train()
    images = torch.randn(2, 3, 16, 16, dtype=F64), torch.randn(1, 3, 8, 20, dtype=F64)
    grads = []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        model.zero_grad()
        one, other = (model(image).square().sum() for image in images)
        (one + 2 * other).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    calls = []
    handle = model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model(images[0]).sum().backward()
    handle.remove()
    assert len(calls) == 2  # it is computed again indeed


def test_feature_maps_of_the_first_blocks_only():
    model = compose(VIT % "" + "attention: softmax\nskip: merged\n")
    features = compose(
        VIT % "" + "attention: softmax\nskip: merged\n", features_only=True, out_indices=(0, 1)
    ).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(2, 3, 16, 16)
    whole = model.eval().forward_intermediates(image, [0, 1], intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(features(image), whole, strict=True))


def test_weights_of_the_skip_travel(tmp_path):
    model = compose(VIT % "" + "attention: softmax\nskip: merged\n").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 5)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(image), model(image))


def test_a_forward_that_stops_early_does_no_harm():
    model = rough(VIT % "" + "attention: softmax\nskip: merged\n")
    image = torch.randn(2, 3, 16, 16, dtype=F64)
    says = model(image)
    all_features = model.forward_intermediates(image, indices=[0, 1, 2, 3], intermediates_only=True)
    early = model.forward_intermediates(image, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(early, all_features, strict=False))
    assert torch.equal(model(image), says)
    copy.deepcopy(model)


@pytest.mark.parametrize("host", [SEQ, VIT, STACK])
@pytest.mark.sample(3)
def test_compiles_without_a_break(host):
    torch._dynamo.reset()
    model = rough((host % "").replace("layers: 4", "layers: 2").replace("depth: 4", "depth: 2") + "attention: softmax\nheads: 4\nskip: merged\n")  # fmt: skip
    source, target = padded()
    args = {SEQ: (source, target), STACK: (source,), VIT: (torch.randn(2, 3, 16, 16, dtype=F64),)}[host]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert near(compiled(*args), model(*args))
    broken_off(model, args)
    assert near(compiled(*args), model(*args))


@pytest.mark.parametrize("use", ["merged", "probs_pairmean"])
def test_a_vit_with_a_skip_can_be_exported(use):
    model = rough(VIT % "" + f"attention: softmax\nskip: {use}\n")
    image = torch.randn(2, 3, 16, 16, dtype=F64)
    exported = torch.export.export(model, (image,)).module()
    other = torch.randn(2, 3, 16, 16, dtype=F64)
    assert near(exported(other), model(other))


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(recipe: str) -> list[tuple[str, int, int, str]]:
    """What is wrong with a recipe: code, line, column, and all that is said."""
    with pytest.raises(RecipeError) as caught:
        compose_file(recipe)
    return [
        (d.code, d.place.line, d.place.column, f"{d.message} | {d.why} | {d.help}") for d in caught.value.diagnostics
    ]  # fmt: skip


A = "attention: softmax\n"
REFUSED = {
    "glob_of_nothing": (SEQ % "" + A + "skip: {use: merged, at: blocks.*}\n", "AZ304", 4, 25, "`blocks.*` matches no site"),
    "glob_of_nothing_vit": (VIT % "" + A + "skip: {use: merged, at: encoder.*}\n", "AZ304", 4, 25, "the sites are blocks.0"),
    "several_kinds": (SEQ % "" + A + "skip: {use: merged, at: '*'}\n", "AZ314", 4, 25, "write one of decoder.*.cross, decoder.*.self, encoder.*"),
    "self_and_cross": (SEQ % "" + A + "skip: {use: merged, at: decoder.*}\n", "AZ314", 4, 25, "several kinds"),
    "one_site": (SEQ % "" + A + "skip: {use: merged, at: encoder.0}\n", "AZ314", 4, 25, "nobody to hand on to"),
    "cct": (CCT + A + "skip: merged\n", "AZ314", 4, 7, "a CCT has no place for a skip"),
    "cross_on_a_vit": (VIT % "" + A + "skip: cross\n", "AZ314", 4, 7, "only a seq2seq model has cross-attention"),
    "cross_on_a_stack": (STACK % "" + A + "skip: {use: cross}\n", "AZ314", 4, 7, "only a seq2seq model has cross-attention"),
    "cross_in_the_encoder": (SEQ % "" + A + "skip: {use: cross, at: encoder.*}\n", "AZ314", 4, 24, "goes between sites decoder.*.cross"),
    "stack_of_three": (SEQ % "" + A + "skip: {use: encoder_stack, encoders: 3}\n", "AZ314", 4, 13, "4 layers cannot form 3 encoders"),
    "encoders_without_a_stack": (SEQ % "" + A + "skip: {use: merged, encoders: 3}\n", "AZ314", 4, 31, "leave `encoders` out"),
    "merged_additive": (SEQ % "" + "attention: additive\nskip: merged\n", "AZ314", 4, 7, "`additive` at encoder.0 has none"),
    "raw_of_grouped": (VIT % "" + "attention: grouped_query\nskip: merged_raw\n", "AZ314", 4, 7, "`grouped_query` at blocks.0 has none"),
    "merged_one_of_them": (
        SEQ % "" + A + "overrides: [{at: encoder.2, put: additive}]\nskip: merged\n", "AZ314", 5, 7, "`additive` at encoder.2 has none",
    ),
    "cross_of_luong": (SEQ % "" + "attention: luong_global\nskip: cross\n", "AZ314", 4, 7, "`luong_global` at decoder.0.cross has none"),
    "probs_of_a_fusion": (
        VIT % "" + "attention: {fuse: add, of: [softmax, soft]}\nskip: probs_pairmean\n", "AZ314", 4, 7, "`add` at blocks.0 forms none, or several",
    ),
    "probs_of_half_a_fusion": (
        SEQ % "" + "attention: {fuse: add, of: [softmax, elu_linear]}\nskip: probs_pairmean\n", "AZ314", 4, 7, "`add` at encoder.0 forms none",
    ),
    "probs_of_split_heads": (
        SEQ % "" + "attention: {fuse: head_split, of: [softmax, elu_linear]}\nskip: logits_pairmean\n", "AZ314", 4, 7, "forms none",
    ),
    "probs_of_fused_tokens": (
        SEQ % "" + "attention: {fuse: mean, level: tokens, of: [softmax, elu_linear]}\nskip: probs_pairmean\n", "AZ314", 4, 7, "`mean` at encoder.0",
    ),
    "probs_of_linear": (SEQ % "" + "attention: elu_linear\nskip: probs_pairmean\n", "AZ314", 4, 7, "`elu_linear` at encoder.0 forms none"),
    "probs_of_one_map_for_all": (SEQ % "" + "attention: softmax\noverrides: [{at: 'encoder.*', put: soft}]\nskip: probs_pairmean\n", "AZ314", 5, 7, "`soft` at encoder.0"),
    "heads_that_grow": (SEQ % "" + A + "heads: {encoder: [2, 4, 4, 4]}\nskip: probs_pairmean\n", "AZ314", 5, 7, "the 2 heads at encoder.0 cannot be averaged into the 4 at encoder.1"),
    "heads_that_do_not_divide": (
        (VIT % "").replace("embed_dim: 16, num_heads: 4", "embed_dim: 12, num_heads: 4") + A + "heads: [6, 4, 4, 4]\nskip: logits_pairmean\n",
        "AZ314", 5, 7, "the 6 heads at blocks.0 cannot be averaged into the 4 at blocks.1",
    ),
    "heads_of_grouped_queries": (SEQ % "" + A + "heads: {encoder: [2, 4, 4, 4]}\noverrides: [{at: 'encoder.*', put: grouped_query}]\nskip: probs_pairmean\n", "AZ314", 6, 7, "the 2 heads at encoder.0"),
    "one_head_into_many": (SEQ % "" + A + "overrides: [{at: encoder.1, put: additive}]\nskip: logits_pairmean\n", "AZ314", 5, 7, "the 1 heads at encoder.1 cannot be averaged into the 8 at encoder.2"),
    "some_compute_anew": (
        SEQ % "" + A + "overrides: [{at: decoder.2.cross, put: soft}]\nskip: cross\n", "AZ314", 5, 7, "`soft` at decoder.2.cross computes all tokens anew",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "code", "line", "column", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(recipe, code, line, column, words):
    ((*found, said),) = refused(recipe)
    assert found == [code, line, column], said
    assert words in said


ALLOWED = {
    "merged_of_a_fusion": SEQ % "" + "attention: {fuse: add, of: [softmax, elu_linear]}\nskip: merged\n",
    "merged_of_ham": VIT % "" + "attention: {fuse: hadamard, of: [softmax, soft]}\nheads: [8, 4, 4, 2]\nskip: merged_raw\n",
    "post_of_additive": SEQ % "" + "attention: additive\nskip: merged_post\n",
    "post_of_fourier": VIT % "" + "attention: fourier\nskip: merged_post\n",
    "stack_of_anything": VIT % "" + "attention: squeeze_excite\nskip: encoder_stack\n",
    "probs_of_additive": SEQ % "" + "attention: additive\nskip: probs_pairmean\n",
    "probs_of_grouped": SEQ % "" + "attention: grouped_query\nheads: {encoder: [4, 2, 2, 1]}\nskip: probs_pairmean\n",
    "probs_of_softmax_and_luong": SEQ % "" + "attention: softmax\noverrides: [{at: encoder.3, put: luong_global}]\nskip: logits_pairmean\n",
    "all_compute_anew": SEQ % "" + "attention: softmax\noverrides: [{at: 'decoder.*.cross', put: soft}]\nskip: cross\n",
    "mixed_in_an_encoder": SEQ % "" + "attention: softmax\noverrides: [{at: encoder.2, put: soft}]\nskip: merged\n",
}  # fmt: skip


@pytest.mark.parametrize("recipe", ALLOWED.values(), ids=ALLOWED)
def test_other_mechanisms_hand_on_too(recipe):
    model = rough(recipe)
    source, target = padded()
    args = (torch.randn(3, 3, 16, 16, dtype=F64),) if "vit" in recipe else (source, target.clamp(min=4))
    says = model(*args)
    assert near(model(*(t[:1] for t in args)), says[:1])
    if "vit" not in recipe:
        state = model.start(model.encode(source))
        steps = [model.step(part, state) for part in args[1].split(1, dim=1)]
        assert near(torch.cat(steps, dim=1), says)


# ------------------------------------------------------------------------------------- head counts in other hosts


@pytest.mark.parametrize(
    ("heads", "counts"),
    [("2", [2] * 4), ("[8, 1, 4, 2]", [8, 1, 4, 2]), ("{schedule: halving, first: 8, last: 2}", [8, 4, 2, 2]),
     ("{schedule: halving, first: 8}", [8, 4, 2, 1]), ("{schedule: constant, first: 8}", [8] * 4)],
)  # fmt: skip
def test_heads_of_a_vit(heads, counts):
    plain, other = compose(VIT % "" + A), compose(VIT % "" + A + f"heads: {heads}\n")
    assert [block.attn.heads for block in other.blocks] == counts
    other.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 16, 16)
    assert not torch.allclose(other(image), plain(image), atol=1e-4)
    assert compose(VIT % "" + A + "heads: 4\n").blocks[0].attn.heads == 4


def test_heads_of_a_vit_are_the_same_function_as_the_host_s():
    plain = compose((VIT % "").replace("num_heads: 4", "num_heads: 2") + A)
    other = compose(VIT % "" + A + "heads: 2\n")
    other.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(other(image), plain(image))


@pytest.mark.parametrize(
    ("heads", "counts"), [("8", [8, 8]), ("[8, 2]", [8, 2]), ("{schedule: halving, first: 4}", [4, 2])]
)
def test_heads_of_a_cct(heads, counts):
    model = compose(CCT + A + f"heads: {heads}\n")
    assert [block.attn.heads for block in model.blocks] == counts
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 100)
    report = compose_file(CCT + A + f"heads: {heads}\n").info
    assert [site.heads for site in report.sites().values()] == counts


def test_a_spec_s_own_heads_win():
    model = compose(SEQ % "" + "heads: [8, 4, 4, 1]\nattention: {use: softmax, heads: 2}\n")
    assert [layer.attn.heads for layer in model.encoder] == [2] * 4
    report = describe(compose_file(SEQ % "" + "heads: 4\nattention: {use: softmax, heads: 2}\n"))
    assert report.heads == {"encoder": (2,) * 4, "decoder": (2,) * 4}


def test_no_tap_is_lost():
    """PairMean stands in the tap's place, and is found under its name."""
    plain = compose(SEQ % "" + "heads: 4\n" + A)
    for use in ("probs_pairmean", "logits_pairmean"):
        model = compose(SEQ % "" + f"heads: 4\n{A}skip: {use}\n")
        assert find_taps(model).keys() == find_taps(plain).keys()
        assert {tap.axes for tap in find_taps(model, "scores").values()} == {"b h n m"}
