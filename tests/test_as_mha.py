"""`attnzoo.as_mha`: a mechanism with the arguments, the masks and the results of `nn.MultiheadAttention`."""

import copy
import inspect
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.core import Layout, Mask
from attnzoo.errors import LayoutMismatch, UnsupportedArgument, UnsupportedMask, ZooError

C, H, B, N, M = 24, 4, 3, 7, 5
CLOSE = {"rtol": 0, "atol": 1e-12}
SQUARE = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)
PADDING = torch.arange(N) >= torch.tensor([7, 5, 3])[:, None]
PADDED = torch.zeros(B, N, dtype=torch.float64).masked_fill(PADDING, float("-inf"))


def twins(cross=False, bias=True, **options):
    """PyTorch's module and ours with its weights."""
    theirs = nn.MultiheadAttention(C, H, bias=bias, dtype=torch.float64, **options)
    ours = attnzoo.as_mha("softmax", C, H, bias=bias, dtype=torch.float64, cross=cross, **options)
    copy_weights(theirs, ours)
    return theirs, ours


@torch.no_grad()
def copy_weights(theirs, ours):
    if theirs.in_proj_bias is not None:  # zero at first: what is not copied would not be seen
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
    weight = theirs.in_proj_weight
    if weight is None:
        weight = [theirs.q_proj_weight, torch.cat([theirs.k_proj_weight, theirs.v_proj_weight])]
    else:
        weight = weight.split([C, 2 * C])
    attn = ours.attn
    parts = [attn.q, attn.kv] if attn.context_dim is not None else None
    if parts is None:
        attn.qkv.weight.copy_(torch.cat(list(weight)))
        if theirs.in_proj_bias is not None:
            attn.qkv.bias.copy_(theirs.in_proj_bias)
    else:
        for i, part in enumerate(parts):
            part.weight.copy_(weight[i])
            if theirs.in_proj_bias is not None:
                part.bias.copy_(theirs.in_proj_bias.split([C, 2 * C])[i])
    attn.proj.load_state_dict(theirs.out_proj.state_dict())


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"cross": True}, {"kdim": 16, "vdim": 16, "cross": True}], ids=str
)
def test_weights_of_pytorchs_module_are_loaded(options):
    theirs, expected = twins(**options)
    ours = attnzoo.as_mha("softmax", C, H, dtype=torch.float64, **options)
    assert not ours.load_state_dict(theirs.state_dict()).missing_keys
    assert ours.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(mine, expected.state_dict()[name]) for name, mine in ours.state_dict().items())
    ours.load_state_dict(expected.state_dict())  # its own names are good as ever


def test_weights_of_pytorchs_encoder_are_loaded_as_a_whole():
    layer = nn.TransformerEncoderLayer(C, H, 32, 0.0, batch_first=True, dtype=torch.float64)
    mine = copy.deepcopy(layer)
    mine.self_attn = attnzoo.as_mha("softmax", C, H, batch_first=True, dtype=torch.float64)
    given = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).state_dict()
    stack = nn.TransformerEncoder(mine, 2, enable_nested_tensor=False)
    before = dict(given)
    stack.load_state_dict(given)
    assert given.keys() == before.keys()  # the caller's state dict is his own
    x = tokens(B, N, C)
    torch.testing.assert_close(stack.layers[0](x), layer(x), **CLOSE)


def test_weights_that_a_mechanism_has_no_place_for_are_named():
    theirs = nn.MultiheadAttention(C, H)
    with pytest.raises(RuntimeError, match='Unexpected key.*"in_proj_weight", "in_proj_bias"'):
        attnzoo.as_mha("additive", C, H).load_state_dict(theirs.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for attn\.kv\.weight"):
        attnzoo.as_mha("grouped_query", C, H).load_state_dict(theirs.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*score_weight"):
        attnzoo.as_mha("soft", C, H).load_state_dict(theirs.state_dict())


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def same(theirs, ours, *args, **options):
    out, weights = ours(*args, **options)
    expected, expected_weights = theirs(*args, **options)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, **CLOSE)


def hidden(n, m):
    """Pairs that are hidden, by sample and head, never a whole row."""
    mask = torch.rand(B * H, n, m) > 0.6
    mask[..., 0] = False
    return mask


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "padding_float": {"key_padding_mask": PADDED},
    "pairs": {"attn_mask": hidden(N, N)[0]},
    "pairs_float": {"attn_mask": torch.zeros(N, N).double().masked_fill(hidden(N, N)[0], float("-inf"))},
    "pairs_by_head": {"attn_mask": hidden(N, N)},
    "pairs_by_head_padding": {"attn_mask": hidden(N, N), "key_padding_mask": PADDING & (torch.arange(N) > 0)},
    "causal": {"attn_mask": SQUARE},
    "causal_hint": {"attn_mask": SQUARE, "is_causal": True},
    "causal_hint_padding": {"attn_mask": SQUARE, "is_causal": True, "key_padding_mask": PADDED},
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention_equals_pytorchs(mask, batch_first, weights, train):
    theirs, ours = twins(batch_first=batch_first)
    theirs.train(train), ours.train(train)
    x = tokens(B, N, C) if batch_first else tokens(N, B, C)
    with torch.set_grad_enabled(train):  # without gradients PyTorch takes its fast path
        same(theirs, ours, x, x, x, **MASKS[mask], **weights)


@pytest.mark.parametrize("options", [{}, {"kdim": 16, "vdim": 16}, {"bias": False}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_equals_pytorchs(options, batch_first):
    theirs, ours = twins(cross=True, batch_first=batch_first, **options)
    width = options.get("kdim", C)
    x, context = (
        (tokens(B, N, C), tokens(B, M, width)) if batch_first else (tokens(N, B, C), tokens(M, B, width))
    )
    padding = torch.arange(M) >= torch.tensor([5, 4, 1])[:, None]
    for masks in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": hidden(N, M)[0]},
        {"attn_mask": hidden(N, M)},
    ):
        same(theirs, ours, x, context, context, **masks)
    if width == C:
        same(theirs, ours, x, x, x)
        same(theirs, ours, x, x, x, attn_mask=SQUARE, is_causal=True, need_weights=False)


def test_unbatched_tokens_equal_pytorchs():
    for batch_first in (True, False):
        theirs, ours = twins(batch_first=batch_first)
        x = tokens(N, C)
        for options in ({}, {"average_attn_weights": False}, {"need_weights": False}, {"key_padding_mask": PADDING[1]},
                        {"attn_mask": hidden(N, N)[:H]}, {"attn_mask": SQUARE}):  # fmt: skip
            same(theirs, ours, x, x, x, **options)
            assert ours(x, x, x, **options)[0].shape == (N, C)


def test_gradients_equal_pytorchs():
    theirs, ours = twins(batch_first=True)
    x, y = tokens(B, N, C).requires_grad_(), None
    y = x.detach().clone().requires_grad_()
    for module, at in ((theirs, x), (ours, y)):
        module(at, at, at, key_padding_mask=PADDING)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-11)
    torch.testing.assert_close(theirs.in_proj_weight.grad, ours.attn.qkv.weight.grad, rtol=0, atol=1e-10)


def test_dropout_is_of_weights_and_in_training_only():
    ours = attnzoo.as_mha("softmax", C, H, dropout=0.5, batch_first=True)
    x = torch.randn(B, N, C)
    assert not torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    assert torch.equal(*(ours(x, x, x)[1] for _ in range(2)))  # weights are those before dropout
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


def test_a_row_with_nothing_to_attend_to_is_zero():
    ours = attnzoo.as_mha("softmax", C, H, bias=False, batch_first=True)
    x = torch.randn(B, N, C)
    out = ours(x, x, x, key_padding_mask=torch.ones(B, N, dtype=torch.bool), need_weights=False)[0]
    assert torch.equal(out, torch.zeros_like(out))


def test_two_threads_see_their_own_weights():
    ours = attnzoo.as_mha("softmax", C, H, batch_first=True).eval()
    inputs = [torch.randn(B, 3 + i % 4, C) for i in range(48)]
    alone = [ours(x, x, x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda x: ours(x, x, x), inputs))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)
    assert not any(tap.watched for tap in attnzoo.find_taps(ours).values())


def test_the_signatures_are_pytorchs():
    for theirs, ours in (
        (nn.MultiheadAttention, attnzoo.as_mha),
        (nn.MultiheadAttention.forward, as_mha_forward()),
    ):
        wanted = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
        found = [
            (p.name, p.default)
            for p in inspect.signature(ours).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert [one for one in found if one[0] != "mechanism"] == wanted


def as_mha_forward():
    return type(attnzoo.as_mha("softmax", C, H)).forward


# --- inside PyTorch's layers


def encoder(layers=2, **options):
    layer = nn.TransformerEncoderLayer(
        C, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack = nn.TransformerEncoder(layer, layers)
    for one in stack.layers:
        for p in one.parameters():
            nn.init.normal_(p, std=0.3)
    return stack


def replaced(stack, which=(0, 1)):
    other = copy.deepcopy(stack)
    for i in which:
        ours = attnzoo.as_mha("softmax", C, H, batch_first=True, dtype=torch.float64)
        copy_weights_plain(other.layers[i].self_attn, ours)
        other.layers[i].self_attn = ours
    return other


@torch.no_grad()
def copy_weights_plain(theirs, ours):
    ours.attn.qkv.weight.copy_(theirs.in_proj_weight)
    ours.attn.qkv.bias.copy_(theirs.in_proj_bias)
    ours.attn.proj.load_state_dict(theirs.out_proj.state_dict())


ENCODER_MASKS = [
    {}, {"src_key_padding_mask": PADDING}, {"mask": SQUARE}, {"mask": SQUARE, "is_causal": True},
    {"mask": SQUARE.isinf()}, {"mask": SQUARE.isinf(), "src_key_padding_mask": PADDING},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)], ids=str)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masks", ENCODER_MASKS, ids=lambda masks: "+".join(masks) or "none")
def test_encoder_layers_work_with_it(masks, grad, train, which):
    """In eval mode without gradients PyTorch would go round the module, or hand it nested tensors."""
    theirs = encoder()
    ours = replaced(theirs, which)
    theirs.train(train), ours.train(train)
    x = tokens(B, N, C)
    exists = ~PADDING if "src_key_padding_mask" in masks else torch.ones_like(PADDING)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x, **masks)[exists], theirs(x, **masks)[exists], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_fast_path_does_not_go_round_it():
    class Halved(nn.Module):
        def forward(self, x):
            return x / 2

    for which in ((0,), (1,), (0, 1)):
        theirs = encoder().eval()
        ours = replaced(theirs, which).eval()
        x = tokens(B, N, C)
        with torch.no_grad():
            for masks in ({}, {"src_key_padding_mask": PADDING}):
                before = ours(x, **masks)
                for i in which:
                    ours.layers[i].self_attn.attn.proj_drop = Halved()
                assert not torch.allclose(ours(x, **masks), before)
                for i in which:
                    ours.layers[i].self_attn.attn.proj_drop = nn.Identity()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stack_made_of_layers_with_it():
    layer = nn.TransformerEncoderLayer(C, H, 32, batch_first=True)
    layer.self_attn = attnzoo.as_mha("elu_linear", C, H, batch_first=True)
    stack = nn.TransformerEncoder(layer, 3).eval()
    x = torch.randn(B, N, C)
    cut = x.clone()
    cut[:, 5:] = 0
    with torch.no_grad():
        for masks in (
            {"mask": SQUARE.float()},
            {"mask": SQUARE.isinf()},
            {"mask": SQUARE.float(), "is_causal": True},
        ):
            torch.testing.assert_close(stack(x, **masks)[:, :5], stack(cut, **masks)[:, :5])
        torch.testing.assert_close(
            layer.eval()(x, src_mask=SQUARE.float())[:, :5], layer(cut, src_mask=SQUARE.float())[:, :5]
        )
        assert stack(x, src_key_padding_mask=PADDING).isfinite().all()
    again = pickle.loads(pickle.dumps(stack))  # noqa: S301 - our own bytes
    assert torch.equal(again(x), stack(x))


def test_decoder_layers_work_with_it():
    theirs = nn.TransformerDecoderLayer(C, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    ours.self_attn = attnzoo.as_mha("softmax", C, H, batch_first=True, dtype=torch.float64)
    ours.multihead_attn = attnzoo.as_mha("softmax", C, H, batch_first=True, dtype=torch.float64, cross=True)
    copy_weights(theirs.self_attn, ours.self_attn)
    copy_weights(theirs.multihead_attn, ours.multihead_attn)
    x, memory = tokens(B, N, C), tokens(B, M, C)
    padding = torch.arange(M) >= torch.tensor([5, 4, 1])[:, None]
    for train in (True, False):
        theirs.train(train), ours.train(train)
        for masks in ({}, {"tgt_mask": SQUARE, "tgt_is_causal": True}, {"memory_key_padding_mask": padding},
                      {"memory_mask": hidden(N, M)[0]}):  # fmt: skip
            torch.testing.assert_close(ours(x, memory, **masks), theirs(x, memory, **masks), **CLOSE)
    stack = nn.TransformerDecoder(ours, 2)
    assert stack(x, memory, tgt_mask=SQUARE).shape == x.shape


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_whole_transformer():
    model = nn.Transformer(C, H, 2, 2, 32, batch_first=True)
    for layer in model.encoder.layers:
        layer.self_attn = attnzoo.as_mha("squeeze_excite", C, H, batch_first=True)
    for layer in model.decoder.layers:
        layer.self_attn = attnzoo.as_mha("elu_linear", C, H, batch_first=True)
        layer.multihead_attn = attnzoo.as_mha("additive", C, H, batch_first=True, cross=True)
    x = torch.randn(B, N, C)
    out = model(x, x, tgt_mask=SQUARE.float(), tgt_is_causal=True, src_key_padding_mask=PADDING)
    out.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_compile_with_masks():
    layer = encoder(1).layers[0]
    layer.self_attn = attnzoo.as_mha("softmax", C, H, batch_first=True, dtype=torch.float64)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = tokens(B, N, C)
    for masks in ({}, {"src_mask": SQUARE}, {"src_mask": SQUARE, "src_key_padding_mask": PADDED}):
        torch.testing.assert_close(fast(x, **masks), layer(x, **masks))
    with pytest.raises(RuntimeError, match="other than 0 and -inf"):
        fast(x, src_mask=torch.full((N, N), 0.5, dtype=torch.float64))
    alone = torch.compile(layer.self_attn, backend="aot_eager")
    torch.testing.assert_close(alone(x, x, x), layer.self_attn(x, x, x))


def test_fx_traces_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = attnzoo.as_mha("softmax", C, H)

        def forward(self, x):
            return self.mix(x, x, x, need_weights=False)[0]

    class Causal(Net):
        def forward(self, x):
            return self.mix(x, x, x, need_weights=False, is_causal=True)[0]

    net, x = Net(), torch.randn(N, B, C)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))
    with pytest.raises(UnsupportedMask, match="traced"):  # and not without its mask
        torch.fx.symbolic_trace(Causal())(x)


# --- other mechanisms


@pytest.mark.parametrize("name", ["softmax", "soft", "elu_linear", "additive", "grouped_query", "squeeze_excite",
                                  "fourier", "luong_global", "luong_local", "neighborhood", "talking_heads"])  # fmt: skip
def test_every_mechanism_has_its_clothes(name):
    ours = attnzoo.as_mha(name, C, H, batch_first=True).eval()
    x = torch.randn(B, N, C)
    out, weights = ours(x, x, x, need_weights=False)
    assert weights is None and torch.equal(out, ours.attn(x, layout=Layout((N,))))
    other = attnzoo.as_mha(name, C, H).eval()
    other.load_state_dict(ours.state_dict())
    y = x.transpose(0, 1)
    assert torch.equal(other(y, y, y, need_weights=False)[0].transpose(0, 1), out)
    if "keys" in ours.attn.card.masks:
        masked = ours(x, x, x, key_padding_mask=PADDING, need_weights=False)[0]
        assert torch.equal(masked, ours.attn(x, mask=Mask(keys=~PADDING), layout=Layout((N,))))


def test_grids_options_and_specs():
    ours = attnzoo.as_mha("agent", C, H, batch_first=True, grid=(3, 4), prefix=1, agents=2)
    x = torch.randn(B, 13, C)
    assert ours(x, x, x, need_weights=False)[0].shape == x.shape
    short = x[:, 1:]
    with pytest.raises(LayoutMismatch):
        ours(short, short, short, need_weights=False)
    both = attnzoo.as_mha({"fuse": "add", "of": ["softmax", "soft"]}, C, H, start="identity", qk_norm=True)
    assert both.formula == "add[start=identity](softmax, soft)" and isinstance(both.attn.q_norm, nn.LayerNorm)
    assert "softmax, embed_dim=24, num_heads=4" in repr(attnzoo.as_mha("softmax", C, H))


# --- what cannot be honoured


def refused(*args, **options):
    with pytest.raises(ZooError) as caught:
        attnzoo.as_mha(*args, **options)
    return caught.value


def test_arguments_that_cannot_be_honoured_are_refused():
    for options in (
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 16},
        {"vdim": 16},
        {"kdim": 16, "vdim": 8},
    ):
        assert refused("softmax", C, H, **options).code == "AZ411"
    assert refused("softmax", C, 5).code == "AZ308"
    assert refused("softmax", C, H, windw=1).code == "AZ210"
    assert refused("elu_linear", C, H, dropout=0.1).code == "AZ317"
    assert refused("fourier", C, H, bias=False).code == "AZ317"
    assert refused("fourier", C, H, cross=True).code == "AZ404"
    assert refused("region", C, H).code == "AZ411"


def test_calls_that_cannot_be_honoured_are_refused():
    ours = attnzoo.as_mha("softmax", C, H, batch_first=True)
    cross = attnzoo.as_mha("softmax", C, H, batch_first=True, cross=True)
    linear = attnzoo.as_mha("elu_linear", C, H, batch_first=True)
    x, other = torch.randn(B, N, C), torch.randn(B, M, C)
    bias = torch.full((N, N), 0.5)
    for call, kind, code in (
        (lambda: ours(x, other, other), UnsupportedArgument, "AZ411"),
        (lambda: ours(x, x, x + 1), UnsupportedArgument, "AZ411"),
        (lambda: cross(x, other, other + 1), UnsupportedArgument, "AZ411"),
        (lambda: linear(x, x, x), UnsupportedArgument, "AZ411"),
        (lambda: attnzoo.as_mha("soft", C, H)(x, x, x), UnsupportedArgument, "AZ411"),
        (
            lambda: attnzoo.as_mha({"fuse": "add", "of": ["softmax", "additive"]}, C, H)(x, x, x),
            UnsupportedArgument,
            "AZ411",
        ),
        (lambda: ours(x, x, x, attn_mask=bias), UnsupportedMask, "AZ405"),
        (lambda: ours(x, x, x, key_padding_mask=torch.full((B, N), -1e9)), UnsupportedMask, "AZ405"),
        (lambda: ours(x, x, x, attn_mask=torch.ones(N, N, dtype=torch.uint8)), UnsupportedMask, "AZ405"),
        (lambda: ours(x, x, x, attn_mask=torch.zeros(B, N, N, dtype=torch.bool)), UnsupportedMask, "AZ405"),
        (lambda: ours(x, x, x, attn_mask=torch.zeros(N, M, dtype=torch.bool)), UnsupportedMask, "AZ405"),
        (lambda: ours(x, x, x, attn_mask=torch.zeros(N, dtype=torch.bool)), UnsupportedMask, "AZ405"),
        (lambda: ours(x, x, x, key_padding_mask=PADDING.T), UnsupportedMask, "AZ405"),
        (lambda: cross(x, other, other, is_causal=True), UnsupportedMask, "AZ405"),
        (lambda: linear(x, x, x, attn_mask=hidden(N, N)[0], need_weights=False), UnsupportedMask, "AZ402"),
        (lambda: linear(x, x, x, attn_mask=hidden(N, N), need_weights=False), UnsupportedMask, "AZ402"),
        (lambda: ours(x[..., :5], x, x), UnsupportedArgument, "AZ411"),
        (lambda: (y := torch.randn(B, N, 5), ours(y, y, y)), LayoutMismatch, "AZ401"),
        (lambda: (y := torch.randn(2, B, N, C), ours(y, y, y)), LayoutMismatch, "AZ401"),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.code == code, caught.value


def test_a_causal_promise_without_a_mask_is_kept():
    ours = attnzoo.as_mha("softmax", C, H, batch_first=True)
    x = torch.randn(B, N, C)
    torch.testing.assert_close(ours(x, x, x, is_causal=True), ours(x, x, x, attn_mask=SQUARE.float()))
