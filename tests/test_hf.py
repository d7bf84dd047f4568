"""Mechanisms as attention implementations of transformers: models of random weights, in double precision."""

import copy
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    StaticCache,
    T5Config,
    ViTConfig,
)
from transformers.masking_utils import (
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

import attnzoo
from attnzoo import hf
from attnzoo.errors import ZooError
from attnzoo.hf.masks import make_mask, read_mask

NAMES = [name.removeprefix("attnzoo:") for name in attnzoo.register_with_transformers()]
SUPPORTED = hf.supported()
CAUSAL = [name for name in NAMES if SUPPORTED[name].causal]
CACHED = [name for name in CAUSAL if SUPPORTED[name].cache]
CROSS = [name for name in CAUSAL if SUPPORTED[name].cross]

SMALL = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2)
BERT = BertConfig(**SMALL)
VIT = ViTConfig(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
)
BART = BartConfig(
    vocab_size=31,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    forced_eos_token_id=None,
    decoder_start_token_id=2,
)  # fmt: skip


def model_of(config, name, kind=AutoModelForCausalLM, dtype=torch.float64):
    """A model of random weights, the same for every attention implementation."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    model = kind.from_config(
        config, attn_implementation=name if name in ("eager", "sdpa") else f"attnzoo:{name}"
    )
    for parameter in (p for p in model.parameters() if p.ndim > 1):
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def tokens(b=2, n=7, seed=0):
    """Tokens, none of which is the padding."""
    return torch.randint(3, 31, (b, n), generator=torch.Generator().manual_seed(seed))


def same(one, other, within=1e-10):
    """Equal, and not because nothing is there."""
    assert torch.isfinite(one).all() and one.abs().max() > 1e-3
    torch.testing.assert_close(one, other, atol=within, rtol=within)


def refused(code, call, *said):
    """A refusal with this code that says all this."""
    with pytest.raises(ZooError) as caught:
        call()
    assert caught.value.code == code
    for text in said:
        assert text in str(caught.value), str(caught.value)


# ------------------------------------------------------------------------------------------------ softmax is theirs


@pytest.mark.parametrize(
    "theirs,dtype,within",
    # their `eager` takes the softmax in single precision, whatever it is given
    [("sdpa", torch.float64, 1e-10), ("sdpa", torch.float32, 1e-5), ("eager", torch.float32, 1e-5)],
)
def test_softmax_is_their_attention(theirs, dtype, within):
    ours, ids = "softmax", tokens()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    rows = mask.bool()
    one, other = (
        model_of(LLAMA, name, dtype=dtype)(ids, attention_mask=mask).logits for name in (ours, theirs)
    )
    same(one[rows], other[rows], within)
    one, other = (
        model_of(BERT, name, AutoModel, dtype)(ids, attention_mask=mask).last_hidden_state
        for name in (ours, theirs)
    )
    same(one[rows], other[rows], within)
    image = torch.randn(2, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    one, other = (model_of(VIT, name, AutoModel, dtype)(image).last_hidden_state for name in (ours, theirs))
    same(one, other, within)
    one, other = (
        model_of(BART, name, AutoModelForSeq2SeqLM, dtype)(
            ids, attention_mask=mask, decoder_input_ids=tokens(n=5)
        ).logits
        for name in (ours, theirs)
    )
    same(one, other, within)


# ------------------------------------------------------------------------------------------------ causality, caches


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.sample(3)
def test_later_tokens_are_not_seen(name):
    for config, kind in ((LLAMA, AutoModelForCausalLM), (BART, AutoModelForSeq2SeqLM)):
        if kind is AutoModelForSeq2SeqLM and name not in CROSS:
            continue
        model, ids = model_of(config, name, kind), tokens(n=9)
        other = ids.clone()
        other[:, 6:] = (ids[:, 6:] - 2) % 28 + 3  # another one everywhere
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        for attention_mask in (None, mask):
            if kind is AutoModelForCausalLM:
                one, two = (model(x, attention_mask=attention_mask).logits for x in (ids, other))
            else:
                one, two = (
                    model(tokens(), decoder_input_ids=x, decoder_attention_mask=attention_mask).logits
                    for x in (ids, other)
                )
            assert torch.isfinite(one).all() and torch.equal(one[:, :6], two[:, :6])
            assert (one[:, 6:] - two[:, 6:]).abs().amax(dim=-1).min() > 1e-3


def written(model, ids, **options):
    """Tokens and logits of a greedy generation."""
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    } | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(ids, **options)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.sample(3)
def test_a_cache_changes_nothing(name):
    """Left-padded, with caches that grow and of a fixed size, and with a prompt that is read in two parts."""
    model, ids = model_of(LLAMA, name), tokens(n=6)
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    plain = written(model, ids, attention_mask=mask, use_cache=False)
    for cache in ({}, {"cache_implementation": "static"}):
        grown = written(model, ids, attention_mask=mask, **cache)
        assert torch.equal(grown[0], plain[0])
        same(grown[1], plain[1], 1e-8)
    ids = tokens(n=12)
    whole = model(ids).logits
    for cache in (None, StaticCache(model.config, max_cache_len=20)):
        first = model(ids[:, :5], past_key_values=cache, use_cache=True)
        second = model(ids[:, 5:9], past_key_values=first.past_key_values)
        third = model(ids[:, 9:], past_key_values=second.past_key_values)
        same(torch.cat([first.logits, second.logits, third.logits], dim=1), whole, 1e-8)


@pytest.mark.parametrize("name", CROSS)
@pytest.mark.sample(3)
def test_a_translator_writes_the_same_with_a_cache(name):
    if name not in CACHED:
        return
    model, ids = model_of(BART, name, AutoModelForSeq2SeqLM), tokens(n=6)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    plain, grown = (written(model, ids, attention_mask=mask, use_cache=use) for use in (False, True))
    assert torch.equal(grown[0], plain[0])
    same(grown[1], plain[1], 1e-8)


# ------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(3)
def test_padding_changes_nothing(name, side):
    """In a decoder, an encoder, and what a decoder reads of an encoder; what stands in the padding has no say."""
    ids = tokens(b=1, n=6)
    for noise in (5, 9):
        pad = torch.full((1, 3), noise)
        padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
        mask = torch.ones_like(padded)
        mask[:, slice(0, 3) if side == "left" else slice(6, None)] = 0
        # beside it a sample without padding
        padded, mask = (
            torch.cat([padded, tokens(1, 9, 2)]),
            torch.cat([mask, torch.ones(1, 9, dtype=torch.long)]),
        )
        rows = mask[0].bool()
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        if name in CAUSAL:
            model = model_of(LLAMA, name)
            out = model(padded, attention_mask=mask, position_ids=places).logits
            assert torch.isfinite(out).all()
            same(out[:1, rows], model(ids).logits, 1e-9)
        model = model_of(BERT, name, AutoModel)
        out = model(padded, attention_mask=mask, position_ids=places).last_hidden_state
        assert torch.isfinite(out).all()
        same(out[:1, rows], model(ids).last_hidden_state, 1e-9)
        if name in CROSS and side == "right":
            model, start = model_of(BART, name, AutoModelForSeq2SeqLM), tokens(2, 4, 3)
            out = model(padded, attention_mask=mask, decoder_input_ids=start).logits
            same(out[:1], model(ids, decoder_input_ids=start[:1]).logits, 1e-9)


# ------------------------------------------------------------------------------------------------ masks

CASES = [
    (create, config, offset, n, padding)
    for create, config in (
        (create_causal_mask, LLAMA),
        (create_bidirectional_mask, BERT),
        (create_sliding_window_causal_mask, MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3)),
        (create_sliding_window_causal_mask, MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=64)),
    )
    for offset, n in ((0, 4), (0, 6), (0, 1), (5, 1), (4, 3))
    for padding in ("none", "left", "right")
]


@pytest.mark.parametrize("create,config,offset,n,padding", CASES)
@pytest.mark.sample(3)
def test_masks_say_what_those_of_transformers_say(create, config, offset, n, padding):
    """Which pairs are allowed, as `eager` has them."""
    m = offset + n
    given = torch.ones(2, m, dtype=torch.long)
    if padding != "none":
        given[0, slice(0, 1) if padding == "left" else slice(m - 1, m)] = 0

    def made(implementation):
        torch.manual_seed(0)
        own = copy.deepcopy(config)
        own._attn_implementation = implementation
        cache = (
            AutoModelForCausalLM.from_config(config).eval()(tokens(2, offset)).past_key_values
            if offset
            else None
        )
        return create(own, torch.zeros(2, n, 32), given, past_key_values=cache)

    if create is create_bidirectional_mask and offset:
        return
    theirs = made("eager")
    ours = made("attnzoo:softmax")
    m = m if theirs is None else theirs.shape[-1]
    allowed = torch.ones(2, 1, n, m, dtype=torch.bool) if theirs is None else theirs == 0
    read = read_mask(ours, False, 2, n, m)
    dense = read.dense(n, m)
    assert torch.equal(torch.ones_like(allowed) if dense is None else dense.expand_as(allowed), allowed)
    if create is create_causal_mask:
        assert read.causal and read.pairs is None and (m == 1 or (read.keys is None) == (padding == "none"))


def test_masks_at_the_edges():
    """A window one token too short, one row of keys for all samples, and no mask in a module that says nothing."""
    window = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3)
    window._attn_implementation = "attnzoo:softmax"
    embeds = torch.zeros(1, 4, 32)
    assert create_sliding_window_causal_mask(window, embeds[:, :3], None, None).ndim == 3
    assert not create_sliding_window_causal_mask(window, embeds, None, None)[0, 0, 3, 0]
    call, module = AttentionInterface()["attnzoo:elu_linear"], torch.nn.Module()
    q, k, v = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    keys = torch.tensor([[True, True, False, True, True]])
    same(call(module, q, k, v, keys)[0], call(module, q, k, v, keys.expand(2, 5))[0])
    same(call(module, q, k, v, None)[0], call(module, q, k, v, torch.ones(1, 1, 1, dtype=torch.bool))[0])


def test_padding_of_keys_that_a_cache_has_dropped():
    """The padding is that of all tokens so far, the keys are the last three."""
    given = torch.tensor([[True, True, True, False, True]])
    made = make_mask(
        batch_size=1, q_length=1, kv_length=3, q_offset=4, kv_offset=2,
        mask_function=causal_mask_function, attention_mask=given,
    )  # fmt: skip
    assert read_mask(made, False, 1, 1, 3).keys.tolist() == [[True, False, True]]


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.sample(3)
def test_sliding_windows(name):
    config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4)
    model, ids = model_of(config, name), tokens(n=9)
    if not SUPPORTED[name].pairs:
        refused("AZ952", lambda: model(ids), "sliding window", "`softmax`")
        short = model_of(LLAMA, name)
        short.load_state_dict(model.state_dict())
        same(model(ids[:, :4]).logits, short(ids[:, :4]).logits)  # no longer than the window
        return
    other = ids.clone()
    other[:, 0] = (ids[:, 0] - 2) % 28 + 3
    one, two = model(ids).logits, model(other).logits
    assert torch.equal(one[:, 7:], two[:, 7:])  # two layers see six tokens back
    assert (one[:, 6] - two[:, 6]).abs().max() > 1e-6
    if name == "softmax":
        same(one, model_of(config, "sdpa")(ids).logits)
    plain, grown = (written(model, ids, use_cache=use) for use in (False, True))
    assert torch.equal(plain[0], grown[0])
    same(grown[1], plain[1], 1e-8)


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_sequences_do_not_see_each_other(name):
    model, one, two = model_of(LLAMA, name), tokens(1, 4), tokens(1, 5, 1)
    packed = torch.cat([one, two], dim=1)
    places = torch.cat([torch.arange(4), torch.arange(5)])[None]
    if not SUPPORTED[name].pairs:
        refused("AZ952", lambda: model(packed, position_ids=places, use_cache=False), "packed sequences")
        return
    out = model(packed, position_ids=places, use_cache=False).logits
    same(out, torch.cat([model(one).logits, model(two).logits], dim=1), 1e-9)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.sample(3)
def test_a_mask_that_is_handed_over(name):
    """Boolean, or added with -inf, the least number or -10000: what hides later tokens and the first of one sample."""
    model, ids = model_of(LLAMA, name), tokens(n=6)
    keys = torch.ones(2, 6, dtype=torch.long)
    keys[0, 0] = 0
    expected = model(ids, attention_mask=keys, position_ids=torch.arange(6)[None]).logits
    allowed = (keys.bool()[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()).expand(2, 1, 6, 6)
    for low in (None, float("-inf"), torch.finfo(torch.float64).min, -1e4):
        mask = (
            allowed
            if low is None
            else torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~allowed, low)
        )
        same(model(ids, attention_mask=mask).logits, expected, 1e-9)
    free = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    out = model(ids, attention_mask=free).logits  # the mask is all there is: no order beside it
    assert (out - expected).abs().amax(dim=-1).min() > 1e-4
    refused("AZ405", lambda: model(ids, attention_mask=allowed[..., :5]), "6 queries and 6 keys")
    refused("AZ405", lambda: model(ids, attention_mask=allowed[:, :, :3]), "6 queries and 6 keys")
    refused("AZ953", lambda: model(ids, attention_mask=allowed.long()), "boolean")
    refused("AZ953", lambda: model(ids, attention_mask=torch.full((2, 1, 6, 6), 0.5)), "a bias")
    if not SUPPORTED[name].pairs:
        odd = allowed.clone()
        odd[:, :, 3, 1] = False
        refused("AZ952", lambda: model(ids, attention_mask=odd), "handed over")


def test_pairs_by_head_and_rows_of_nobody():
    model, ids = model_of(LLAMA, "softmax"), tokens(n=6)
    mask = (torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5).requires_grad_(False)
    mask[..., 0] = True
    same(model(ids, attention_mask=mask).logits, model_of(LLAMA, "sdpa")(ids, attention_mask=mask).logits)
    for name in NAMES:
        if name not in CAUSAL:
            continue
        model = model_of(LLAMA, name)
        keys = torch.ones(2, 6, dtype=torch.long)
        keys[0, :3], keys[1] = 0, 0  # a sample of padding alone
        out = model(ids, attention_mask=keys).logits
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None), name


def test_a_decoder_that_sees_both_sides():
    """`is_causal=False` in the configuration; the modules still say that they are causal."""
    config = copy.deepcopy(LLAMA)
    config.is_causal = False
    ids, mask = tokens(n=5), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    for attention_mask in (None, mask):
        one = model_of(config, "softmax")(ids, attention_mask=attention_mask).logits
        same(
            one,
            model_of(config, "eager", dtype=torch.float64)(ids, attention_mask=attention_mask).logits,
            1e-5,
        )
    refused("AZ953", lambda: model_of(LLAMA, "softmax")(ids, attention_mask=mask[..., None]), "shape")


# ------------------------------------------------------------------------------------------------ what models ask for


def test_scaling_and_grouped_queries_of_other_models():
    config = Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=2,
                          attn_logit_softcapping=None, sliding_window=4)  # fmt: skip
    one, two = (model_of(config, name, dtype=torch.float32)(tokens()).logits for name in ("softmax", "eager"))
    same(one, two, 1e-5)
    config.attn_logit_softcapping = 20.0
    refused("AZ953", lambda: model_of(config, "softmax")(tokens()), "`softcap` caps the scores")


def test_sinks_and_biases_are_refused():
    config = GptOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    refused("AZ953", lambda: model_of(config, "softmax")(tokens()), "`s_aux` adds a sink")
    config = T5Config(
        vocab_size=31, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = model_of(config, "softmax", AutoModelForSeq2SeqLM)
    refused("AZ953", lambda: model(tokens(), decoder_input_ids=tokens()), "`position_bias` adds a bias")


def test_dropout_of_weights():
    config = copy.deepcopy(LLAMA)
    config.attention_dropout = 0.5
    ids = tokens()
    for name in ("softmax", "alibi", "sigmoid", "efficient"):
        kind, own = (
            (AutoModelForCausalLM, config) if name != "efficient" else (AutoModel, copy.deepcopy(BERT))
        )
        own.attention_probs_dropout_prob, own.hidden_dropout_prob = 0.5, 0.0
        model = model_of(own, name, kind)
        quiet = model(ids)[0]
        assert torch.equal(model(ids)[0], quiet)
        model.train()
        one, two = model(ids)[0], model(ids)[0]
        assert (one - two).abs().max() > 1e-3 and (one - quiet).abs().max() > 1e-3
        assert torch.equal(model.eval()(ids)[0], quiet)
    model = model_of(config, "elu_linear")
    model(ids)
    refused("AZ953", lambda: model.train()(ids), "dropped", "set the dropout of attention to 0")


def test_half_of_the_weights_are_dropped():
    """Of one key each the weight is lost, or doubled."""
    call, module = AttentionInterface()["attnzoo:softmax"], torch.nn.Module().train()
    module.is_causal = False
    q = k = v = torch.ones(4000, 1, 1, 4)
    torch.manual_seed(0)
    dropped = call(module, q, k, v, None, dropout=0.5)[0][:, 0, 0, 0]
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and 0.45 < (dropped == 0).float().mean() < 0.55


def test_weights_that_are_asked_for():
    ids, mask = tokens(), torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    model = model_of(LLAMA, "softmax", dtype=torch.float32)
    shown = model(ids, attention_mask=mask, output_attentions=True)
    theirs = model_of(LLAMA, "eager", dtype=torch.float32)(ids, attention_mask=mask, output_attentions=True)
    assert len(shown.attentions) == 2
    for one, other in zip(shown.attentions, theirs.attentions, strict=True):
        same(one, other, 1e-5)
    alibi, cache = model_of(LLAMA, "alibi"), StaticCache(LLAMA, max_cache_len=9)  # two places stay empty
    held = alibi(ids, past_key_values=cache, output_attentions=True).attentions[0]
    same(held[..., :7], alibi(ids, output_attentions=True).attentions[0])
    assert held.shape[-1] == 9 and not held[..., 7:].any()
    assert not any(type(part).__name__ == "Tap" for part in model.modules())
    refused(
        "AZ953", lambda: model_of(LLAMA, "elu_linear")(ids, output_attentions=True), "forms none of queries"
    )


def test_what_cannot_is_refused_with_the_reason():
    ids = tokens()
    refused("AZ951", lambda: model_of(LLAMA, "cosine")(ids), "learns `log_scale`", "`softmax`")
    refused("AZ951", lambda: model_of(VIT, "window", AutoModel)(torch.randn(1, 3, 16, 16).double()), "grid")
    refused("AZ951", lambda: hf.register("attnzoo:mine", "agent"), "works on tokens")
    refused("AZ951", lambda: hf.register("attnzoo:mine", "sigmoid", count="site"), "number of tokens")
    refused("AZ952", lambda: model_of(LLAMA, "cosformer")(ids), "no causal form", "`elu_linear`")
    refused("AZ952", lambda: model_of(LLAMA, "efficient")(ids[:, :1]), "no causal form")
    twicing = model_of(LLAMA, "twicing")
    refused("AZ952", lambda: written(twicing, ids), "cache", "use_cache=False")
    assert written(twicing, ids, use_cache=False)[0].shape == (2, 13)
    for name in ("alibi", "twicing", "longformer"):  # as many tokens on both sides tell nothing
        bart = model_of(BART, name, AutoModelForSeq2SeqLM)
        refused("AZ952", lambda model=bart: model(ids, decoder_input_ids=ids), "cross-attention", "`softmax`")


def test_values_of_another_width_are_refused():
    call = AttentionInterface()["attnzoo:softmax"]
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 4)
    refused("AZ953", lambda: call(torch.nn.Module(), q, k, v, None), "8 channels, values 4")


# ------------------------------------------------------------------------------------------------ registering


def test_names():
    assert hf.register("attnzoo:test_few", "performer", features=8) == "attnzoo:test_few"
    assert hf.register("attnzoo:test_few", "performer", features=8)
    refused(
        "AZ954", lambda: hf.register("attnzoo:test_few", "performer", features=9), "stands for", "features=8"
    )
    refused("AZ954", lambda: hf.register("attnzoo:test_few", "performer", features=8, seed=1))
    for name in ("softmax", "attnzoo:", "attnzoo:Mine", "attnzoo:my_flash", "attnzoo:sdpa", 3):
        refused("AZ954", lambda name=name: hf.register(name, "softmax"))
    refused("AZ954", lambda: hf.register("attnzoo:mine", "softmax", seed=-1))
    refused("AZ201", lambda: hf.register("attnzoo:mine", "sofmax"), "softmax")
    refused("AZ210", lambda: hf.register("attnzoo:mine", "performer", feature=8), "features")
    refused("AZ211", lambda: hf.register("attnzoo:mine", "performer", features="8"))
    assert attnzoo.register_with_transformers() == tuple(f"attnzoo:{name}" for name in NAMES)


def test_options_seeds_and_fusions():
    ids = tokens()
    hf.register("attnzoo:test_many", "performer", features=4096)
    hf.register("attnzoo:test_other", "performer", features=4096, seed=1)
    hf.register("attnzoo:test_both", {"fuse": "mean", "of": ["softmax", "elu_linear"]})
    config = LlamaConfig(**{**SMALL, "num_hidden_layers": 1}, num_key_value_heads=2)
    exact, many, other, few = (
        model_of(config, n)(ids).logits for n in ("softmax", "test_many", "test_other", "performer")
    )
    assert (many - exact).abs().mean() < (few - exact).abs().mean() / 2  # more features are nearer to softmax
    assert not torch.equal(many, other)
    linear, both = (
        model_of(config, n).model(ids, output_hidden_states=True) for n in ("elu_linear", "test_both")
    )
    assert torch.isfinite(both[0]).all() and not torch.equal(both[0], linear[0])


def test_what_is_drawn_is_a_function_of_the_layer(tmp_path):
    """Not of the random state, the order of calls or the mode of the first forward; and drawing leaves the state."""
    ids = tokens()
    hf.register("attnzoo:test_fresh", "performer", features=16)
    model = model_of(LLAMA, "test_fresh", dtype=torch.float32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with torch.inference_mode():
        first = model(ids).logits.clone()
    assert torch.equal(torch.get_rng_state(), before)
    model.train()(ids).logits.sum().backward()  # what was built in inference mode can be trained through
    assert torch.equal(copy.deepcopy(model).eval()(ids).logits, first)
    hf.register("attnzoo:test_again", "performer", features=16)
    torch.manual_seed(2)
    assert torch.equal(model_of(LLAMA, "test_again", dtype=torch.float32)(ids).logits, first)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="attnzoo:test_fresh")
    assert again.state_dict().keys() == model_of(LLAMA, "sdpa").state_dict().keys()
    assert torch.equal(again.eval()(ids).logits, first)
    swapped = copy.deepcopy(model).eval()
    swapped.model.layers[0].self_attn.layer_idx, swapped.model.layers[1].self_attn.layer_idx = 1, 0
    assert not torch.equal(swapped(ids, use_cache=False).logits, first)  # layers have features of their own


def test_threads_and_watchers_share_heads():
    model, wrong = model_of(LLAMA, "softmax"), []

    def run(seed):
        ids = tokens(seed=seed)
        for _ in range(8):
            out = model(ids, output_attentions=True)
            if not all(torch.equal(*pair) for pair in zip(out.attentions, expected[seed], strict=True)):
                wrong.append(seed)

    expected = [model(tokens(seed=seed), output_attentions=True).attentions for seed in range(4)]
    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_trainer_trains_saves_and_loads(tmp_path):
    from transformers import Trainer, TrainingArguments

    config = copy.deepcopy(LLAMA)
    model = model_of(config, "elu_linear", dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 6)]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=0.01,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert not all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if "q_proj" in name)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="attnzoo:elu_linear")
    assert torch.equal(again.eval()(tokens()).logits, model.eval()(tokens()).logits)


def test_vision_transformers_take_all():
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in NAMES:
        found[name] = model_of(VIT, name, AutoModel)(image).last_hidden_state
        assert torch.isfinite(found[name]).all()
    same(found["top_k"], found["softmax"])  # 64 keys of 17 are all
    assert all(
        (out - found["softmax"]).abs().max() > 1e-3
        for name, out in found.items()
        if name not in ("top_k", "softmax", "longformer")
    )


def test_supported_says_the_reason():
    assert SUPPORTED.keys() == set(attnzoo.load_zoo().mechanisms)
    assert str(SUPPORTED["softmax"]) == "causal, cache, cross, pairs, dropout, weights"
    assert str(SUPPORTED["cosine"]).startswith("no: it learns `log_scale`") and not SUPPORTED["cosine"]
    assert "grid" in SUPPORTED["window"].refused and "`regions`" in SUPPORTED["region"].refused
    assert (
        "one token" in SUPPORTED["perceiver"].refused and "number of tokens" in SUPPORTED["linformer"].refused
    )
    assert {"softmax", "performer", "elu_linear", "alibi", "top_k", "cosformer"} <= set(NAMES)


def test_the_page_shows_what_is_printed(capsys):
    """docs/transformers.md, block by block."""
    text = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) == text.count("```python") == 4
    scope: dict = {}
    for code, printed in blocks:
        exec(code, scope)
        assert capsys.readouterr().out == printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "performer"])
def test_a_graph_without_breaks(name):
    """Once a forward has built the heads; with and without padding.

    Without any mask and cache transformers' graphs take every text for a packed one.
    """
    model, ids = model_of(LLAMA, name), tokens()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for attention_mask in (torch.ones_like(mask), mask):
        with torch.no_grad():
            expected = model(ids, attention_mask=attention_mask, use_cache=False).logits
            same(compiled(ids, attention_mask=attention_mask, use_cache=False).logits, expected)
