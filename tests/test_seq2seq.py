"""The encoder and decoder: against PyTorch's own, and against what the released Deep Head code got wrong."""

import copy
import io
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from attnzoo.bench.composition import describe
from attnzoo.cli.app import app
from attnzoo.core import Card, Family, Head, Layout, Mask, Mechanism, MultiHead, Site
from attnzoo.core.rotary import rotate
from attnzoo.errors import LayoutMismatch
from attnzoo.hosts import seq2seq
from attnzoo.hosts.info import plain_attention
from attnzoo.hosts.layers import ScalarNorm
from attnzoo.hosts.positions import Learned, NoPositions, Sinusoidal
from attnzoo.recipe import compose, compose_file

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

DIM, MLP, VOCAB, LENGTH = 16, 24, 13, 12
F64 = torch.float64


@contextmanager
def exact():
    """Everything that is built inside is float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SIZES = {"dim": DIM, "mlp_dim": MLP, "layers": 2, "vocab": VOCAB, "max_length": LENGTH}


def text(host: str = "", rest: str = "attention: softmax\nheads: 4\n") -> str:
    """A tiny recipe, with other keys of the host."""
    given = {key.split(":")[0].strip() for key in host.split(",")}
    sizes = [f"{key}: {value}" for key, value in SIZES.items() if key not in given]
    return f"recipe: 1\nhost: {{kind: seq2seq, {', '.join([*sizes, *filter(None, [host])])}}}\n{rest}"


def tiny(host: str = "dropout: 0", rest: str = "attention: softmax\nheads: 4\n") -> seq2seq.Seq2Seq:
    """The tiny recipe's model in float64, in eval mode, with norms and biases that are not 1 and 0."""
    with exact():
        model = compose(text(host, rest)).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1:
                    p.add_(torch.randn_like(p) / 5)
    return model


def ids(b: int = 3, n: int = 7) -> torch.Tensor:
    """Random ids without special ones."""
    return torch.randint(4, VOCAB, (b, n))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three sources and targets of different lengths."""
    source, target = ids(3, 9), ids(3, 7)
    source[1, 5:], source[2, 7:], target[0, 4:], target[2, 6:] = 0, 0, 0, 0
    return source, target


# ------------------------------------------------------------------------------------------ against torch.nn.Transformer


def reference(model: seq2seq.Seq2Seq, heads: int, norm_first: bool, act: str) -> nn.Transformer:
    """PyTorch's transformer with the weights of ours."""
    layers = (len(model.encoder), len(model.decoder))
    theirs = nn.Transformer(
        model.dim, heads, *layers, MLP, 0.0, act, batch_first=True, norm_first=norm_first, dtype=F64
    ).eval()
    theirs.encoder.use_nested_tensor = False
    if norm_first:
        theirs.encoder.norm.load_state_dict(model.encoder_norm.state_dict())
        theirs.decoder.norm.load_state_dict(model.decoder_norm.state_dict())
    else:  # PyTorch normalises once more after a post-norm layer; the paper does not
        theirs.encoder.norm = theirs.decoder.norm = None
    with torch.no_grad():
        for ours, their in [*zip(model.encoder, theirs.encoder.layers), *zip(model.decoder, theirs.decoder.layers)]:  # fmt: skip # noqa: B905
            attentions = [(ours.attn, their.self_attn)]
            norms = [ours.around_attn.norm]
            if hasattr(ours, "cross"):
                attentions.append((ours.cross, their.multihead_attn))
                norms.append(ours.around_cross.norm)
            norms.append(ours.around_mlp.norm)
            for i, norm in enumerate(norms, 1):
                getattr(their, f"norm{i}").load_state_dict(norm.state_dict())
            for mine, other in attentions:
                stacks = [mine.qkv] if hasattr(mine, "qkv") else [mine.q, mine.kv]
                other.in_proj_weight.copy_(torch.cat([part.weight for part in stacks]))
                other.in_proj_bias.copy_(torch.cat([part.bias for part in stacks]))
                other.out_proj.load_state_dict(mine.proj.state_dict())
            their.linear1.load_state_dict(ours.mlp.fc1.state_dict())
            their.linear2.load_state_dict(ours.mlp.fc2.state_dict())
    return theirs


def sines(n: int, dim: int) -> torch.Tensor:
    """Vaswani et al., §3.5, entry by entry."""
    table = torch.zeros(n, dim, dtype=F64)
    for p in range(n):
        for i in range(dim):
            angle = p / 10_000 ** ((i - i % 2) / dim)
            table[p, i] = math.cos(angle) if i % 2 else math.sin(angle)
    return table


def theirs_says(model, theirs, source, target):
    """Logits by PyTorch's transformer, with embeddings and positions made by hand."""
    x = model.embed_source.weight[source] * model.dim**0.5 + sines(source.shape[1], model.dim)
    y = model.embed_target.weight[target] * model.dim**0.5 + sines(target.shape[1], model.dim)
    later = torch.ones(target.shape[1], target.shape[1]).triu(1).bool()
    out = theirs(
        x, y, tgt_mask=later, src_key_padding_mask=source == 0, tgt_key_padding_mask=target == 0,
        memory_key_padding_mask=source == 0,
    )  # fmt: skip
    return model.head(out)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_equals_torch(norm_first, act, heads):
    model = tiny(
        f"dropout: 0, norm_first: {str(norm_first).lower()}, act: {act}",
        f"attention: softmax\nheads: {heads}\n",
    )
    source, target = padded()
    theirs = reference(model, heads, norm_first, act)
    torch.testing.assert_close(
        model(source, target), theirs_says(model, theirs, source, target), rtol=0, atol=1e-10
    )


def test_comparison_with_torch_can_fail():
    """A head count, an activation or the place of a norm that differs is seen."""
    model = tiny()
    source, target = padded()
    for wrong in ({"heads": 2}, {"act": "gelu"}, {"norm_first": False}):
        theirs = reference(model, **{"heads": 4, "act": "relu", "norm_first": True} | wrong)
        assert (model(source, target) - theirs_says(model, theirs, source, target)).abs().max() > 1e-4


def test_heads_that_are_all_equal_are_the_plain_transformer():
    plain = tiny()
    listed = compose(text("dropout: 0", "attention: softmax\nheads: {encoder: [4, 4], decoder: {schedule: constant, first: 4}}\nskip: none\n"))  # fmt: skip
    listed = listed.double().eval()
    listed.load_state_dict(plain.state_dict())
    listed.positions = plain.positions  # the float64 table
    source, target = padded()
    assert torch.equal(listed(source, target), plain(source, target))


# ---------------------------------------------------------------------------------------- padding, other samples, future


def pads_matter(model) -> bool:
    """Whether more padding changes a logit."""
    source, target = padded()
    more = torch.zeros(3, 3, dtype=torch.long)
    wide = model(torch.cat([source, more], 1), torch.cat([target, more], 1))
    return not torch.allclose(wide[:, : target.shape[1]], model(source, target), rtol=0, atol=1e-10)


def neighbours_matter(model) -> bool:
    """Whether the other samples of a batch change a logit."""
    source, target = padded()
    whole = model(source, target)
    others = torch.cat([source[:1], ids(2, 9)]), torch.cat([target[:1], ids(2, 7)])
    return not torch.allclose(model(*others)[0], whole[0], rtol=0, atol=1e-10)


def future_leaks(model) -> bool:
    """Whether changing later target tokens changes any bit of an earlier logit."""
    source, target = ids(2, 6), ids(2, 8)
    before = model(source, target)
    for t in range(1, 8):
        changed = target.clone()
        changed[:, t:] = 4 + (changed[:, t:] - 3) % (VOCAB - 4)
        if not torch.equal(model(source, changed)[:, :t], before[:, :t]):
            return True
    return False


HOSTS = ["dropout: 0", "dropout: 0, norm_first: false", "dropout: 0, positions: rotary, norm: scalar, tie: all",
         "dropout: 0, positions: learned, mlp_dim: 0, bias: false", "dropout: 0, positions: none"]  # fmt: skip
RESTS = [
    "attention: softmax\nheads: {encoder: [8, 2], decoder: 4}\n",
    "attention: additive\nheads: 4\n",
    "attention: luong_global\nheads: 4\n",
    "attention: elu_linear\nheads: 4\n",
    "attention: {fuse: gated, of: [softmax, elu_linear]}\nheads: 4\n",
    "attention: softmax\nheads: 4\nskip: merged\n",
]
PAIRS = [
    (host, rest)
    for host in HOSTS
    for rest in RESTS
    if "rotary" not in host
    or not ("additive" in rest or "luong" in rest)  # refused: test_sequence_recipes.py
]


@pytest.mark.parametrize(("host", "rest"), PAIRS)
@pytest.mark.sample(3)
def test_padding_neighbours_and_future_change_nothing(host, rest):
    model = tiny(host, rest)
    assert not pads_matter(model)
    assert not neighbours_matter(model)
    assert not future_leaks(model)


def test_a_decoder_without_a_causal_mask_is_caught(monkeypatch):
    model = tiny()
    monkeypatch.setattr(seq2seq, "Mask", lambda keys=None, causal=False: Mask(keys=keys))
    assert future_leaks(model)


def test_a_padding_mask_that_is_forgotten_is_caught(monkeypatch):
    model = tiny()
    monkeypatch.setattr(seq2seq, "Mask", lambda keys=None, causal=False: Mask(causal=causal))
    assert pads_matter(model) and not future_leaks(model)


def test_a_norm_over_the_batch_is_caught():
    class BatchNorm(nn.Module):
        def forward(self, x):
            return (x - x.mean(0)) / (x.std(0) + 1e-6)

    model = tiny()
    model.encoder[0].around_attn.norm = BatchNorm()
    assert neighbours_matter(model)


class MinusOne(Head):
    """Softmax attention whose mask writes -1 ** 9, which is -1, as the released Deep Head code does."""

    card = Card("minus_one", Family.DOT_PRODUCT, "What is hidden keeps a logit of -1.",
                masks={"keys", "causal"}, context=True)  # fmt: skip

    def attend(self, q, k, v, *, mask, layout):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        allowed = mask.dense(q.shape[2], k.shape[2])
        return (scores if allowed is None else scores.masked_fill(~allowed, -(1**9))).softmax(-1) @ v


def built(form: seq2seq.Form, put=plain_attention, heads: int = 4) -> seq2seq.Seq2Seq:
    """A model that is built without a recipe."""
    seen = seq2seq.host_info(form, (heads,) * form.encoder, (heads,) * form.decoder)
    with exact():
        return seq2seq.build(seen, put)


FORM = seq2seq.Form(DIM, MLP, 2, 2, VOCAB, VOCAB, LENGTH, dropout=0.0)


def test_the_mask_of_the_released_code_is_caught():
    """-1 ** 9 is -1: two hidden among three equal logits keep 21 % each."""
    one = MinusOne(Site("alone", 1, 1, Layout((3,))))
    one_query, three_keys = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 3, 1)
    weights = one(one_query, three_keys, torch.eye(3)[None, None], mask=Mask(keys=torch.tensor([[True, False, False]])), layout=Layout((3,)))  # fmt: skip
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.5761, 0.2119, 0.2119]), rtol=0, atol=1e-4)
    bad = built(FORM, lambda site: MultiHead(site, MinusOne(site)))
    assert future_leaks(bad) and pads_matter(bad)
    good = built(FORM)
    assert not future_leaks(good) and not pads_matter(good)


# ------------------------------------------------------------------------------------------------- what is counted


def closed_form(form: seq2seq.Form) -> int:
    """Parameters of the model, by arithmetic."""
    c, b = form.dim, int(form.bias)
    attention = 4 * (c * c + b * c)
    mlp = 2 * c * form.mlp_dim + b * (form.mlp_dim + c) if form.mlp_dim else 0
    norm = {"layer": 2 * c, "scalar": 2}[form.norm]
    subs = 1 + bool(form.mlp_dim)
    encoder = attention + mlp + subs * norm
    decoder = 2 * attention + mlp + (subs + 1) * norm
    final = 2 * norm * form.norm_first
    embeddings = {
        "none": form.source + 2 * form.target,
        "target": form.source + form.target,
        "all": form.target,
    }
    table = form.max_length * c * (form.positions == "learned")
    return (
        form.encoder * encoder
        + form.decoder * decoder
        + final
        + embeddings[form.tie] * c
        + b * form.target
        + table
    )


@pytest.mark.parametrize("tie", ["none", "target", "all"])
@pytest.mark.parametrize(
    "host", ["", "norm: scalar, norm_first: false", "bias: false, mlp_dim: 0", "positions: learned"]
)
def test_parameters_by_closed_form(host, tie):
    composition = compose_file(text(f"{host}{host and ', '}tie: {tie}"))
    model = composition.build()
    assert (
        sum(p.numel() for p in model.parameters())
        == closed_form(composition.info.form)
        == composition.info.params
    )


def parameters(recipe: str, *edits: str) -> int:
    """Of a shipped recipe, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in compose_file(recipe, edits).build().parameters())


def test_deep_head_has_as_many_parameters_as_the_transformer():
    plain = parameters("transformer")
    form = compose_file("transformer").info.form
    assert (form.dim, form.mlp_dim, form.encoder, form.decoder) == (512, 2048, 6, 6)
    assert parameters("deep_head", "skip=none") == plain == closed_form(form)
    assert parameters("deep_head") == plain + 5 * 2 * 512  # a LayerNorm for each layer but the first
    assert parameters("deep_head", "host.norm=scalar", "skip=none") == parameters(
        "transformer", "host.norm=scalar"
    )
    assert parameters("deep_head", "host.dim=256") != parameters("transformer")


def test_heads_of_deep_head():
    composition = compose_file("deep_head")
    heads = [site.heads for name, site in composition.info.sites().items() if name.startswith("encoder")]
    assert heads == [64, 32, 16, 8, 4, 2] and sum(heads) == 126
    assert (
        sum(s.heads for n, s in compose_file("transformer").info.sites().items() if n.startswith("encoder"))
        == 48
    )
    widths = [site.head_dim for name, site in composition.info.sites().items() if name.startswith("encoder")]
    assert widths == [8, 16, 32, 64, 128, 256] and {h * d for h, d in zip(heads, widths, strict=True)} == {
        512
    }
    decoder = {site.heads for name, site in composition.info.sites().items() if name.startswith("decoder")}
    assert decoder == {8}
    report = describe(composition)
    assert report.heads["encoder"] == (64, 32, 16, 8, 4, 2) and report.heads["decoder"] == (8,) * 6
    assert report.params == parameters("deep_head") and report.base_params == parameters("transformer")
    with torch.device("meta"):
        model = composition.build()
    assert [(layer.attn.heads, layer.attn.head_dim) for layer in model.encoder] == list(
        zip(heads, widths, strict=True)
    )


def test_compose_prints_the_heads():
    small = [f"--set=host.{edit}" for edit in ("vocab=64", "mlp_dim=16", "max_length=16")]
    result = CliRunner().invoke(app, ["compose", "deep_head", *small], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "heads of encoder: 64, 32, 16, 8, 4, 2" in result.output
    assert "heads of decoder: 8, 8, 8, 8, 8, 8" in result.output
    assert "skip merged, encoder.0 to encoder.5" in result.output


def through_a_file(model):
    """The model, pickled and read again."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def unregister(model: seq2seq.Seq2Seq) -> None:
    """Keep the layers in plain lists, as the released Deep Head code does."""
    for side in ("encoder", "decoder"):
        layers = list(model._modules.pop(side))
        object.__setattr__(model, side, layers)


def test_layers_in_plain_lists_are_caught():
    """The released code: 8 registered tensors of 174 204 values with vocabularies of 100 and 120, of 44.1 million."""
    form = seq2seq.Form(source=100, target=120, norm="scalar")
    seen = seq2seq.host_info(form, (8,) * 6, (8,) * 6)
    with torch.device("meta"):
        model = seq2seq.build(seen, plain_attention)
    assert sum(p.numel() for p in model.parameters()) == closed_form(form) == 174_204 + 44_107_836
    unregister(model)
    assert len(list(model.parameters())) == 8
    assert sum(p.numel() for p in model.parameters()) == 174_204 != closed_form(form)


def test_all_of_the_model_is_trained_saved_and_switched():
    """What the released code's plain lists break: state_dict, eval() and the optimiser reach every layer."""

    def complete(model) -> list[bool]:
        source, target = padded()
        saved = {name.split(".")[0] for name in model.state_dict()}
        model.eval()
        same = torch.equal(model(source, target), model(source, target))
        before = model.encoder[0].attn.qkv.weight.clone()
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(source, target).square().mean().backward()
        optimizer.step()
        return [
            {"encoder", "decoder"} <= saved,
            same,
            not torch.equal(before, model.encoder[0].attn.qkv.weight),
        ]

    with_dropout = seq2seq.Form(DIM, MLP, 2, 2, VOCAB, VOCAB, LENGTH, dropout=0.5)
    assert all(complete(built(with_dropout)))
    mutant = built(with_dropout)
    unregister(mutant)
    assert not any(complete(mutant))


# ---------------------------------------------------------------------------------------------------- ties and norms


def test_ties():
    none, target, both = tiny("tie: none"), tiny("tie: target"), tiny("tie: all")
    assert none.head.weight is not none.embed_target.weight and none.embed_source is not none.embed_target
    assert target.head.weight is target.embed_target.weight is not target.embed_source.weight
    assert both.head.weight is both.embed_target.weight is both.embed_source.weight


@pytest.mark.parametrize("tie", ["target", "all"])
def test_ties_survive_copies_and_files(tie):
    model = tiny(f"dropout: 0, tie: {tie}")
    source, target = padded()
    says = model(source, target)
    for other in (copy.deepcopy(model), through_a_file(model)):
        assert other.head.weight is other.embed_target.weight
        assert torch.equal(other(source, target), says)
        assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_tied_head_scores_by_the_embedding():
    model = tiny("dropout: 0, tie: target")
    source, target = padded()
    memory = model.encode(source)
    inner: list = []
    handle = model.decoder_norm.register_forward_hook(lambda *call: inner.append(call[-1]))
    logits = model.decode(target, memory)
    handle.remove()
    expected = inner[0] @ model.embed_target.weight.T + model.head.bias
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_scalar_norm_is_its_formula():
    """γ (x - μ) / (σ + ε) + β, with the unbiased σ."""
    norm = ScalarNorm(5).double()
    with torch.no_grad():
        norm.weight.fill_(1.5), norm.bias.fill_(-0.25)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=F64)
    sigma = math.sqrt(10 / 4)
    expected = torch.tensor([[1.5 * d / (sigma + 1e-6) - 0.25 for d in (-2, -1, 0, 1, 2)]], dtype=F64)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in norm.parameters()) == 2
    model = tiny("norm: scalar")
    assert {type(m) for n, m in model.named_modules() if n.endswith("norm") and "around" in n} == {ScalarNorm}


# --------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("dim", [8, 7])
def test_sinusoidal_positions(dim):
    with exact():
        table = Sinusoidal(20, dim)
    x = torch.randn(2, 5, dim, dtype=F64)
    torch.testing.assert_close(table(x), x + sines(5, dim), rtol=0, atol=1e-12)
    torch.testing.assert_close(table(x, 7), x + sines(12, dim)[7:], rtol=0, atol=1e-12)
    assert not table.state_dict()


def test_learned_positions():
    learned = Learned(9, 4)
    x = torch.randn(2, 5, 4)
    assert torch.equal(learned(x), x + learned.table[:5]) and torch.equal(
        learned(x, 4), x + learned.table[4:]
    )
    assert learned.table.std() < 0.04
    assert "positions.table" in tiny("positions: learned").no_weight_decay()


def test_positions_by_name():
    kinds = {"sinusoidal": Sinusoidal, "learned": Learned, "rotary": NoPositions, "none": NoPositions}
    for name, kind in kinds.items():
        assert type(tiny(f"positions: {name}").positions) is kind


def test_rotary_is_inside_self_attention_only():
    model = tiny("positions: rotary")
    assert all(layer.attn.rotary for layer in (*model.encoder, *model.decoder))
    assert not any(layer.cross.rotary for layer in model.decoder)
    attention, x = model.encoder[0].attn, torch.randn(2, 5, DIM, dtype=F64)
    q, k, v = attention.qkv(x).reshape(2, 5, 3, 4, DIM // 4).permute(2, 0, 3, 1, 4)
    scores = rotate(q) @ rotate(k).mT / (DIM // 4) ** 0.5
    expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, DIM))
    torch.testing.assert_close(attention(x, layout=None), expected, rtol=0, atol=1e-12)


def test_rotary_positions_are_relative_in_the_encoder():
    """Bits of the same source, shifted behind padding at the front, would need positions; distances are enough."""
    model = tiny("dropout: 0, positions: rotary")
    source = ids(2, 5)
    shifted = torch.cat([torch.zeros(2, 4, dtype=torch.long), source], dim=1)
    torch.testing.assert_close(
        model.encode(shifted).tokens[:, 4:], model.encode(source).tokens, rtol=0, atol=1e-10
    )
    other = tiny("dropout: 0, positions: sinusoidal")
    assert not torch.allclose(other.encode(shifted).tokens[:, 4:], other.encode(source).tokens, atol=1e-3)


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "learned", "none"])
def test_a_step_knows_its_position(positions):
    model = tiny(f"dropout: 0, positions: {positions}")
    source, target = padded()[0], ids(3, 7)
    whole = model(source, target)
    state = model.start(model.encode(source))
    parts = torch.cat([model.step(part, state) for part in target.split([1, 1, 3, 2], dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_without_positions_the_encoder_is_permutation_equivariant():
    order = torch.randperm(7)
    source = ids(2, 7)
    for positions, equal in (("none", True), ("sinusoidal", False), ("learned", False), ("rotary", False)):
        model = tiny(f"dropout: 0, positions: {positions}")
        permuted, plain = model.encode(source[:, order]).tokens, model.encode(source).tokens[:, order]
        assert torch.allclose(permuted, plain, rtol=0, atol=1e-10) is equal, positions


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "none"])
def test_too_long(positions):
    model = tiny(f"positions: {positions}")
    model(ids(1, LENGTH), ids(1, LENGTH))
    long, short = ids(1, LENGTH + 1), ids(1, 3)
    for call in (lambda: model(long, short), lambda: model(short, long)):
        with pytest.raises(LayoutMismatch) as caught:
            call()
        assert caught.value.code == "AZ407"
        assert f"{LENGTH + 1} tokens" in str(caught.value) and f"the {LENGTH} that" in str(caught.value)
    state = model.start(model.encode(short))
    model.step(ids(1, LENGTH), state)
    with pytest.raises(LayoutMismatch):
        model.step(ids(1, 1), state)


# ------------------------------------------------------------------------------------------- training and initialisation


@pytest.mark.parametrize(("host", "rest"), PAIRS)
def test_all_parameters_get_finite_gradients(host, rest):
    model = compose(text(host, rest)).train()
    source, target = padded()
    nn.functional.cross_entropy(model(source, target).transpose(1, 2), target, ignore_index=0).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), name


def glorot(matrix: torch.Tensor) -> bool:
    """Whether a matrix is as U(-a, a) with a = √(6 / (fan in + fan out)) would be."""
    rows, columns = matrix.shape
    bound = (6 / (rows + columns)) ** 0.5
    ratio = matrix.var() / (bound**2 / 3)
    return bool(abs(ratio - 1) < 0.07 and 0.95 < matrix.abs().max() / bound <= 1)


def test_initialisation():
    c = 64
    model = compose(text(f"dim: {c}, mlp_dim: 96, norm_first: false"))
    for layer in (*model.encoder, *model.decoder):
        assert all(map(glorot, layer.attn.qkv.weight.chunk(3)))
        assert not glorot(layer.attn.qkv.weight)  # what one call for the stack would give
        assert all(map(glorot, (layer.attn.proj.weight, layer.mlp.fc1.weight, layer.mlp.fc2.weight)))
        if hasattr(layer, "cross"):
            assert glorot(layer.cross.q.weight) and all(map(glorot, layer.cross.kv.weight.chunk(2)))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".norm." in name or name.endswith("norm.weight"):
            assert bool((p == 1).all()), name
    for embedding in (model.embed_source, model.embed_target):
        assert abs(embedding.weight.std() * c**0.5 - 1) < 0.1
    for tie in ("target", "all"):  # as an embedding, not as a Linear of 300 rows
        tied = compose(text(f"vocab: 300, tie: {tie}"))
        assert abs(tied.head.weight.std() * DIM**0.5 - 1) < 0.1


def test_initialisation_is_a_function_of_the_seed():
    torch.manual_seed(3)
    one = compose(text()).state_dict()
    torch.manual_seed(3)
    other = compose(text()).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(4)
    assert any(not torch.equal(one[name], p) for name, p in compose(text()).state_dict().items())


class Still(Mechanism):
    """Starts as nothing: the weights of its Linear are 0, as it says in `init_weights`."""

    card = Card("still", Family.MIXING, "A Linear that starts at 0.", masks={"keys", "causal"}, context=True)

    def __init__(self, site):
        super().__init__(site)
        self.linear = nn.Linear(site.dim, site.dim)
        self.init_weights()

    def init_weights(self):
        nn.init.zeros_(self.linear.weight)

    def mix(self, x, source, *, mask, layout):
        return self.linear(x)


def test_parts_are_initialised_after_the_host():
    """What a mechanism says of its own weights holds, whatever the host does to Linears."""
    model = built(FORM, Still)
    assert not any(layer.attn.linear.weight.any() for layer in (*model.encoder, *model.decoder))
    assert bool(model.encoder[0].mlp.fc1.weight.any())
    gated = compose(
        text("", "attention: {fuse: add, with: {start: identity}, of: [softmax, elu_linear]}\nheads: 4\n")
    )
    assert not gated.encoder[0].attn.inner.fusion.gamma.any()


def test_dropout_is_where_it_should_be():
    model = compose(text("dropout: 0.25"))
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert rates["drop"] == 0.25 and set(rates.values()) == {0.25}
    assert {layer.attn.inner.attn_drop for layer in (*model.encoder, *model.decoder)} == {0.25}
    source, target = padded()
    assert not torch.equal(model(source, target), model(source, target))


def test_scale_of_the_embeddings():
    model = tiny("dropout: 0, positions: none, scale_embedding: false")
    source = ids(1, 4)
    assert torch.equal(model.embed(model.embed_source, source), model.embed_source.weight[source])
    scaled = tiny("dropout: 0, positions: none")
    torch.testing.assert_close(
        scaled.embed(scaled.embed_source, source), scaled.embed_source.weight[source] * 4.0
    )


# ------------------------------------------------------------------------------------------------- tools of PyTorch


@pytest.mark.parametrize(
    "rest", ["attention: softmax\nheads: 4\n", "attention: softmax\nheads: 4\nskip: merged\n"]
)
def test_copies_and_files(rest, tmp_path):
    model = tiny("dropout: 0, positions: learned", rest)
    source, target = padded()
    says = model(source, target)
    assert torch.equal(copy.deepcopy(model)(source, target), says)
    assert torch.equal(through_a_file(model)(source, target), says)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    other = tiny("dropout: 0, positions: learned", rest)
    assert not torch.equal(other(source, target), says)
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(other(source, target), says)


def test_on_the_meta_device():
    composition = compose_file("deep_head")
    model = composition.build(device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    tokens = torch.zeros(2, 9, dtype=torch.long, device="meta")
    assert model(tokens, tokens[:, :5]).shape == (2, 5, 8000)


def test_another_type_of_number():
    model = compose_file(text("dropout: 0, positions: rotary")).build(dtype=torch.bfloat16).eval()
    source, target = padded()
    assert model(source, target).dtype == torch.bfloat16 and bool(model(source, target).isfinite().all())


@pytest.mark.parametrize(
    ("backend", "host"), [("eager", "norm: scalar"), ("aot_eager", "positions: rotary, norm_first: false")]
)
@pytest.mark.sample(2)
def test_compiles_without_a_break(backend, host):
    torch._dynamo.reset()
    model = tiny(f"dropout: 0, layers: 1, {host}")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    source, target = padded()
    says = compiled(source, target)
    torch.testing.assert_close(says, model(source, target), rtol=0, atol=1e-10)
    says.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
