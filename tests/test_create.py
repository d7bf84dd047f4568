"""`attnzoo.create`: one mechanism, pool or fusion as a module in anybody's network."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import timm
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

import attnzoo
from attnzoo.alone.masks import mask_of
from attnzoo.core import Card, Family, Head, Layout, Mask, Mechanism, PositiveInt, Site
from attnzoo.errors import (
    LayoutMismatch,
    MissingMap,
    OptionError,
    RecipeError,
    UnsupportedContext,
    UnsupportedMask,
    ZooError,
)
from attnzoo.zoo import Entry, Zoo, load_zoo
from attnzoo.zoo.registry import Registry

DIM, HEADS, GRID = 24, 3, (4, 5)
N = 20


@pytest.fixture
def x():
    return torch.randn(2, N, DIM)


class Clash(Head):
    """Plain attention with options whose names a place has too.

    Args:
        site: Where it is put.
        grid: An option.
        attn_drop: Another.
    """

    card = Card(
        "clash", Family.DOT_PRODUCT, "Options that a place has too.", masks={"keys", "pairs", "causal"}
    )

    def __init__(self, site: Site, *, grid: PositiveInt = 3, attn_drop: float = 0.5):
        super().__init__(site)
        self.options = grid, attn_drop

    def attend(self, q, k, v, *, mask, layout):
        return v


@pytest.fixture
def more(monkeypatch):
    """The zoo with a pool and a mechanism whose options clash."""
    zoo, mechanisms = load_zoo(), Registry("mechanism")
    entries = {entry.full_name: entry for entry in zoo.mechanisms.values()}
    for cls in (Clash,):
        entries[f"attnzoo/{cls.card.name}"] = Entry(
            cls.card.name, cls, "attnzoo", "", __file__, card=cls.card
        )
    for entry in entries.values():
        mechanisms.add(entry)
    wider = replace(zoo, mechanisms=mechanisms)
    monkeypatch.setattr("attnzoo.alone.build.load_zoo", lambda: wider)


# --- what comes out


def forms():
    """Every mechanism with what it needs."""
    for name, entry in sorted(load_zoo().mechanisms.items()):
        card = entry.value.card
        if card.family != Family.CROSS:
            yield name, card


@pytest.mark.parametrize(("name", "card"), forms(), ids=[name for name, _ in forms()])
def test_every_mechanism_stands_alone(name, card):
    m = attnzoo.create(name, dim=DIM, heads=HEADS, grid=GRID, prefix=1)
    given = {key: torch.ones(2, *GRID, dtype=torch.long) for key in card.given}
    x = torch.randn(2, N + 1, DIM, requires_grad=True)
    out = m(x, **given)
    due = x[:, 0] if name in attnzoo.list_mechanisms(form="pool") else x
    assert out.shape == due.shape and type(m.attn).__name__ in (entry_class(name), "MultiHead")
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    again = pickle.loads(pickle.dumps(m.eval()))  # noqa: S301 - our own bytes
    assert torch.equal(again(x, **given), m(x, **given)) and torch.equal(
        copy.deepcopy(m)(x, **given), m(x, **given)
    )


def entry_class(name):
    return load_zoo().mechanisms[name].value.__name__


def test_it_computes_what_a_block_computes(x):
    vit = attnzoo.compose("ham_a").eval()
    block = vit.blocks[1]
    spec = {"fuse": "hadamard", "of": ["softmax", {"use": "soft", "with": {"variant": "pooled"}}]}
    m = attnzoo.create(spec, dim=48, heads=4, grid=(8, 8), prefix=1).eval()
    assert set(m.state_dict()) == {f"attn.{key}" for key in block.attn.state_dict()}
    m.load_state_dict(
        {
            key.removeprefix("blocks.1."): t
            for key, t in vit.state_dict().items()
            if key.startswith("blocks.1.attn.")
        }
    )
    tokens = torch.randn(2, 65, 48)
    assert torch.equal(m(tokens), block.attn(tokens, layout=Layout((8, 8), 1)))


def test_specs_as_text_are_specs_as_mappings(x):
    specs = [
        {"fuse": "add", "of": ["softmax", "soft"], "with": {"start": "identity"}},
        "fuse: add\nof: [softmax, soft]\nwith: {start: identity}\n",
        "{fuse: add, of: [softmax, soft], with: {start: identity}}",
    ]
    made = []
    for spec in specs:
        torch.manual_seed(1)
        made.append(attnzoo.create(spec, dim=DIM, heads=HEADS))
    torch.manual_seed(1)
    made.append(attnzoo.create({"fuse": "add", "of": ["softmax", "soft"]}, DIM, HEADS, start="identity"))
    assert len({repr(m) for m in made}) == 1
    assert len({m(x).sum().item() for m in made}) == 1
    assert (
        attnzoo.create("use: softmax", DIM).formula
        == attnzoo.create({"use": "attnzoo/softmax"}, DIM).formula
        == "softmax"
    )
    assert attnzoo.create({"use": "softmax", "heads": 4}, DIM).attn.heads == 4


def test_weights_start_as_pytorchs_layers_do():
    torch.manual_seed(3)
    m = attnzoo.create("softmax", 64, 4)
    torch.manual_seed(3)
    qkv, proj = nn.Linear(64, 192), nn.Linear(64, 64)
    assert torch.equal(m.attn.qkv.weight, qkv.weight) and torch.equal(m.attn.qkv.bias, qkv.bias)
    assert torch.equal(m.attn.proj.weight, proj.weight)
    score = attnzoo.create("additive", 64).attn.score_weight
    assert 0.01 < score.std() < 0.03


def test_the_repr_says_it_in_a_line():
    lines = repr(
        attnzoo.create({"fuse": "add", "of": ["softmax", "soft"]}, dim=24, heads=3, grid=(4, 5), prefix=1)
    )
    assert "add(softmax, soft), dim=24, heads=3, tokens=1 + 4 × 5 = 21\n" in lines
    assert "softmax, dim=24, heads=3, 2-D grid\n" in repr(attnzoo.create("softmax", 24, 3, form="map"))


# --- layouts


def test_the_layout_is_a_default_that_a_call_may_replace():
    torch.manual_seed(0)
    m = attnzoo.create("neighborhood", DIM, HEADS, grid=GRID, window=3).eval()
    line = attnzoo.create("neighborhood", DIM, HEADS, window=3).eval()
    line.load_state_dict(m.state_dict())
    x = torch.randn(2, N, DIM)
    assert torch.equal(m(x), line(x, layout=Layout(GRID))) and torch.equal(line(x), m(x, layout=Layout((N,))))
    assert not torch.allclose(m(x), line(x))
    assert line(torch.randn(1, 7, DIM)).shape == (1, 7, DIM)
    assert m(torch.randn(1, 9, DIM), layout=Layout((3, 3))).shape == (1, 9, DIM)
    for wrong in (torch.randn(2, N + 1, DIM), torch.randn(2, N - 1, DIM)):
        with pytest.raises(LayoutMismatch, match="4 × 5 = 20"):
            m(wrong)
        with pytest.raises(LayoutMismatch, match="4 × 5 = 20"):
            attnzoo.create("softmax", DIM, HEADS, grid=GRID)(wrong)  # though softmax would not mind
    with pytest.raises(LayoutMismatch):
        m(x, layout=Layout((4, 4)))


def test_special_tokens_stand_in_front():
    m = attnzoo.create("neighborhood", DIM, HEADS, grid=4, prefix=2, window=1).eval()
    free = attnzoo.create("neighborhood", DIM, HEADS, prefix=2, window=1).eval()
    free.load_state_dict(m.state_dict())
    x = torch.randn(1, 6, DIM)
    assert torch.equal(m(x), free(x))
    far = x.clone()
    far[:, 5] = 0
    assert torch.equal(m(x)[:, 3], m(far)[:, 3]) and not torch.equal(m(x)[:, 1], m(far)[:, 1])


@pytest.mark.parametrize("shape", [(N, DIM), (2, DIM, N), (2, N, DIM + 1), (2, 2, N, DIM), (2, DIM, 4, 5)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(LayoutMismatch) as caught:
        attnzoo.create("fourier", DIM)(torch.randn(shape))  # which would take any
    assert caught.value.code == "AZ401" and str(shape) in str(caught.value)


@pytest.mark.parametrize("name", ["softmax", "soft", "additive", "fourier", "gaussian_adaptive"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_floating_point_is_refused(name, dtype):
    """Fourier transforms and weights below 1 would be rounded to whole numbers without a word."""
    with pytest.raises(LayoutMismatch, match="AZ401.*in floating point"):
        attnzoo.create(name, DIM, HEADS, grid=N)(torch.ones(2, N, DIM, dtype=dtype))


@pytest.mark.parametrize("name", ["softmax", "soft", "additive", "linformer", "grouped_query"])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_context_of_other_samples_is_refused(name, samples):
    m = attnzoo.create(name, DIM, HEADS, context_dim=16, grid=N)
    with pytest.raises(LayoutMismatch, match="AZ401.*of 2 samples"):
        m(torch.randn(2, N, DIM), torch.randn(samples, N, 16))
    image = attnzoo.create("softmax", DIM, HEADS, context_dim=16, form="map")
    for context in (torch.randn(samples, 16, 2, 3), torch.randn(samples, 6, 16)):
        with pytest.raises(LayoutMismatch, match="AZ401.*of 2 samples"):
            image(torch.randn(2, DIM, *GRID), context)
    other = attnzoo.as_mha("softmax", DIM, HEADS, kdim=16, vdim=16, batch_first=True)
    keys = torch.randn(samples, N, 16)
    with pytest.raises(LayoutMismatch, match="AZ401.*of 2 samples"):
        other(torch.randn(2, N, DIM), keys, keys)


def test_what_belongs_to_positions_needs_a_grid():
    for name, options in (("linformer", {}), ("agent", {}), ("luong_global", {"score": "location"})):
        with pytest.raises(LayoutMismatch, match="no grid was given"):
            attnzoo.create(name, DIM, form="map" if name == "agent" else None, **options)
    with pytest.raises(LayoutMismatch, match="2-D grid"):
        attnzoo.create("agent", DIM, grid=N)
    assert attnzoo.create("luong_global", DIM, score="dot")(torch.randn(2, N, DIM)).shape == (2, N, DIM)


# --- contexts


def test_a_context_is_read():
    m = attnzoo.create("softmax", DIM, HEADS, grid=GRID, context_dim=16, context_grid=(2, 3)).eval()
    x, context = torch.randn(2, N, DIM), torch.randn(2, 6, 16)
    out = m(x, context)
    assert out.shape == (2, N, DIM) and not torch.equal(out, m(x, context.flip(1) * 2))
    mechanism = m.attn(x, context, layout=Layout(GRID), context_layout=Layout((2, 3)))
    assert torch.equal(out, mechanism)
    with pytest.raises(LayoutMismatch):
        m(x, torch.randn(2, 7, 16))
    assert m(x, torch.randn(2, 7, 16), context_layout=Layout((7,))).shape == (2, N, DIM)
    with pytest.raises(LayoutMismatch, match="16 channels"):
        m(x, torch.randn(2, 6, 17))
    with pytest.raises(UnsupportedContext):
        m(x)
    with pytest.raises(UnsupportedContext):
        attnzoo.create("softmax", DIM, HEADS)(x, x)
    assert m(x, context[:1].expand(2, -1, -1)).shape == (2, N, DIM)
    with pytest.raises(UnsupportedContext, match="cannot read a context"):
        attnzoo.create("fourier", DIM, context_dim=16)


def test_a_second_stream_on_a_grid():
    m = attnzoo.create("window_cross", DIM, HEADS, grid=(4, 6), context_dim=DIM, context_grid=(2, 3))
    assert m(torch.randn(2, 24, DIM), torch.randn(2, 6, DIM)).shape == (2, 24, DIM)
    both = attnzoo.create("window_cross", DIM, HEADS, form="map", context_dim=DIM, context_grid=(2, 3))
    assert both(torch.randn(2, DIM, 4, 6), torch.randn(2, DIM, 2, 3)).shape == (2, DIM, 4, 6)


def test_maps_are_handed_over_by_name():
    m = attnzoo.create("region", DIM, HEADS, grid=GRID).eval()
    x, regions = torch.randn(1, N, DIM), torch.zeros(1, *GRID, dtype=torch.long)
    regions[:, 2:] = 1
    changed = x.clone()
    changed[:, 10:] = 0
    assert torch.equal(m(x, regions=regions)[:, :10], m(changed, regions=regions)[:, :10])
    with pytest.raises(MissingMap):
        m(x)
    with pytest.raises(ZooError, match="did you mean `regions`") as caught:
        m(x, region=regions)
    assert isinstance(caught.value, TypeError) and caught.value.code == "AZ210"
    grid = attnzoo.create("region", DIM, HEADS, form="map").eval()
    grid.load_state_dict(m.state_dict())
    image = x.transpose(1, 2).unflatten(2, GRID)
    torch.testing.assert_close(grid(image, regions=regions).flatten(2).transpose(1, 2), m(x, regions=regions))


# --- masks


def test_a_boolean_is_the_mask_that_its_shape_says(x):
    m = attnzoo.create("softmax", DIM, HEADS).double().eval()
    x = x.double()
    keys = torch.rand(2, N) > 0.3
    pairs = torch.rand(2, HEADS, N, N) > 0.3
    pairs[..., 0] = True
    for boolean, mask in (
        (keys, Mask(keys=keys)),
        (pairs[0, 0], Mask(pairs=pairs[:1, :1])),
        (pairs[:, 0], Mask(pairs=pairs[:, :1])),
        (pairs[:1, 0], Mask(pairs=pairs[:1, :1])),
        (pairs, Mask(pairs=pairs)),
        (pairs[:1], Mask(pairs=pairs[:1])),
        (pairs[:, :1], Mask(pairs=pairs[:, :1])),
    ):
        expected = m.attn(x, mask=mask, layout=Layout((N,)))
        assert torch.equal(m(x, mask=boolean), expected) and torch.equal(m(x, mask=mask), expected)
        late = m.attn(x, mask=replace(mask, causal=True), layout=Layout((N,)))
        assert torch.equal(m(x, mask=boolean, causal=True), late) and torch.equal(
            m(x, mask=mask, causal=True), late
        )
    assert torch.equal(m(x, causal=True), m.attn(x, mask=Mask(causal=True), layout=Layout((N,))))
    assert torch.equal(m(x, causal=True), m(x, mask=torch.ones(N, N, dtype=torch.bool).tril()))


def test_true_may_attend(x):
    m = attnzoo.create("softmax", DIM, HEADS).eval()
    keys = torch.ones(2, N, dtype=torch.bool)
    keys[1, 7:] = False
    short = m(x[1:, :7])
    torch.testing.assert_close(m(x, mask=keys)[1:, :7], short)


def test_a_mask_for_a_context_is_about_its_keys():
    m = attnzoo.create("softmax", DIM, HEADS, context_dim=16).eval()
    x, context = torch.randn(2, 5, DIM), torch.randn(2, 9, 16)
    keys = torch.arange(9) < torch.tensor([[9], [4]])
    torch.testing.assert_close(m(x, context, mask=keys)[1:], m(x[1:], context[1:, :4]))
    assert torch.equal(
        m(x, context, mask=torch.ones(5, 9, dtype=torch.bool)),
        m(x, context, mask=Mask(pairs=torch.ones(1, 1, 5, 9, dtype=torch.bool))),
    )


def refused(mask, b=2, n=N, **options):
    m = attnzoo.create(options.pop("name", "softmax"), DIM, HEADS, **options)
    with pytest.raises(UnsupportedMask) as caught:
        m(torch.randn(b, n, DIM), mask=mask)
    return caught.value


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, N), torch.ones(2, N, dtype=torch.long), torch.zeros(N, N), [[True] * N] * 2, True,
        torch.ones(N, dtype=torch.bool), torch.ones(3, N, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool),
        torch.ones(2, N - 1, dtype=torch.bool), torch.ones(HEADS, N, N, dtype=torch.bool),
        torch.ones(2, 1, N, dtype=torch.bool), torch.ones(2, 2, N, N, dtype=torch.bool),
        torch.ones(2, 1, 1, N, dtype=torch.bool), torch.ones(1, 2, HEADS, N, N, dtype=torch.bool),
        Mask(keys=torch.ones(2, 1, dtype=torch.bool)),
    ],
    ids=lambda m: f"{getattr(m, 'dtype', type(m).__name__)}-{tuple(getattr(m, 'shape', ()))}",
)  # fmt: skip
def test_what_is_no_mask_is_refused(mask):
    assert refused(mask).code == "AZ405"


def test_a_mask_that_could_be_two_things_is_refused():
    both = torch.rand(4, 4) > 0.5
    both[:, 0] = True
    error = refused(both, b=4, n=4)
    assert error.code == "AZ405" and "Mask(keys=mask)" in str(error)
    x = torch.randn(4, 4, DIM)
    m = attnzoo.create("softmax", DIM, HEADS)
    assert not torch.allclose(m(x, mask=Mask(keys=both)), m(x, mask=Mask(pairs=both[None, None])))
    assert torch.equal(m(x, mask=both[None]), m(x, mask=Mask(pairs=both[None, None])))
    keys_only = attnzoo.create("squeeze_excite", DIM)  # which honours no pairs, so that nothing is in doubt
    assert torch.equal(keys_only(x, mask=both), keys_only(x, mask=Mask(keys=both)))
    card = replace(keys_only.attn.card, masks={"pairs"})
    assert mask_of(both, False, card, 4, 4, 4).kinds == ("pairs",)


def test_what_cannot_be_honoured_is_refused():
    assert refused(torch.ones(2, N, N, dtype=torch.bool), name="elu_linear").code == "AZ402"
    assert refused(Mask(causal=True), name="soft").code == "AZ402"
    with pytest.raises(UnsupportedMask):
        attnzoo.create("fourier", DIM)(torch.randn(2, N, DIM), causal=True)
    with pytest.raises(UnsupportedMask):
        attnzoo.create("softmax", DIM)(torch.randn(2, N, DIM), causal=torch.ones(N, N))


# --- arguments


def said(*args, **options):
    with pytest.raises(ZooError) as caught:
        attnzoo.create(*args, **options)
    error = caught.value
    assert all(fault.place is None or fault.place.file == "<spec>" for fault in error.diagnostics)
    return error


def test_an_unknown_argument_is_a_type_error_with_a_hint():
    error = said("neighborhood", DIM, HEADS, windw=3)
    assert isinstance(error, TypeError) and error.code == "AZ210"
    assert "did you mean `window`" in str(error) and "`stride`" in str(error) and "`qkv_bias`" in str(error)
    assert "did you mean `attn_drop`" in str(said("softmax", DIM, atn_drop=0.1))
    assert isinstance(said({"fuse": "add", "of": ["softmax"]}, DIM, strat="identity"), TypeError)
    assert said({"use": "softmax", "with": {"windw": 3}}, DIM).code == "AZ210"
    with pytest.raises(TypeError):
        attnzoo.create("softmax")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ({"mechanism": "softmx"}, "AZ201", "did you mean `softmax`"),
        ({"mechanism": "add"}, "AZ203", "is a fusion"),
        ({"mechanism": "nobody/softmax"}, "AZ205", "not installed"),
        ({"mechanism": ""}, "AZ113", "empty"),
        ({"mechanism": None}, "AZ112", "NoneType"),
        ({"mechanism": {"use": Head}}, "AZ112", "cannot hold a value"),
        ({"mechanism": {"fuse": "add", "of": ["softmax", "sft"]}}, "AZ201", "did you mean `soft`"),
        ({"mechanism": {"fuse": "head_split", "of": ["softmax", "soft"]}, "heads": 3}, "AZ312", "heads"),
        ({"mechanism": {"fuse": "add", "of": []}}, "AZ113", "`of`"),
        ({"mechanism": {"ues": "softmax"}}, "AZ110", "did you mean `use`"),
        ({"mechanism": {}}, "AZ114", "a spec must say"),
        ({"mechanism": "fuse: [add"}, "AZ105", "closing"),
        ({"mechanism": "softmax", "heads": 5}, "AZ308", "5 heads do not divide a width of 24"),
        ({"mechanism": "softmax", "heads": 0}, "AZ212", "`heads` must be"),
        ({"mechanism": "softmax", "heads": True}, "AZ211", "`heads` must be"),
        ({"mechanism": "softmax", "dim": "24"}, "AZ211", "`dim` must be"),
        ({"mechanism": "softmax", "dim": -1}, "AZ212", "`dim` must be"),
        ({"mechanism": "softmax", "grid": (4, 0)}, "AZ212", "`grid` must be"),
        ({"mechanism": "softmax", "grid": ()}, "AZ212", "`grid` must be"),
        ({"mechanism": "softmax", "grid": 4.5}, "AZ211", "`grid` must be"),
        ({"mechanism": "softmax", "prefix": -1}, "AZ212", "`prefix` must be"),
        ({"mechanism": "softmax", "attn_drop": 1.5}, "AZ212", "`attn_drop` must be"),
        ({"mechanism": "softmax", "form": "maps"}, "AZ212", "did you mean `map`"),
        ({"mechanism": "softmax", "norm_layer": "rms"}, "AZ211", "`norm_layer`"),
        ({"mechanism": "softmax", "form": "map", "prefix": 1}, "AZ214", "special tokens"),
        ({"mechanism": "neighborhood", "window": 0}, "AZ212", "`window` must be"),
        ({"mechanism": "neighborhood", "window": "3"}, "AZ211", "`window` must be"),
        ({"mechanism": "neighborhood", "window": torch.ones(2)}, "AZ211", "`window` must be"),
        ({"mechanism": "neighborhood", "window": 3, "stride": 4}, "AZ214", "stride"),
        ({"mechanism": {"use": "neighborhood", "with": {"window": 3}}, "window": 5}, "AZ214", "say it once"),
        ({"mechanism": "grouped_query", "rotary": True}, "AZ317", "rotary"),
        ({"mechanism": "additive", "qkv_bias": False}, "AZ317", "qkv_bias"),
        ({"mechanism": "fourier", "proj_bias": True}, "AZ317", "proj_bias"),
        ({"mechanism": "elu_linear", "attn_drop": 0.1}, "AZ317", "attn_drop"),
        ({"mechanism": {"fuse": "add", "of": ["softmax", "fourier"]}, "qk_norm": True}, "AZ317", "qk_norm"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_are_said(arguments, code, text):
    error = said(**{"dim": DIM, "heads": HEADS} | arguments)
    assert error.code == code and text in str(error)


def test_a_name_that_could_mean_two_things_is_refused(more):
    assert attnzoo.create("clash", DIM).attn.inner.options == (3, 0.5)
    for argument in ({"grid": N}, {"attn_drop": 0.1}):
        with pytest.raises(OptionError, match="'with'"):
            attnzoo.create("clash", DIM, **argument)
    m = attnzoo.create({"use": "clash", "with": {"attn_drop": 0.25}}, DIM, grid=N)
    assert m.attn.inner.options == (3, 0.25) and m.layout == Layout((N,))


def test_wishes_reach_the_component():
    m = attnzoo.create("softmax", DIM, HEADS, attn_drop=0.1, proj_drop=0.2, qkv_bias=False, proj_bias=False, qk_norm=True,
                       scale_norm=True, rotary=True, norm_layer=nn.RMSNorm)  # fmt: skip
    assert m.attn.qkv.bias is None and m.attn.proj.bias is None and m.attn.rotary
    assert isinstance(m.attn.q_norm, nn.RMSNorm) and isinstance(m.attn.norm, nn.RMSNorm)
    assert m.attn.inner.attn_drop == 0.1 and m.attn.proj_drop.p == 0.2
    x = torch.randn(1, N, DIM)
    assert not torch.equal(m(x), m(x)) and torch.equal(m.eval()(x), m(x))
    plain = attnzoo.create("softmax", DIM, HEADS)
    assert plain.attn.qkv.bias is not None and plain.attn.proj_drop.p == 0 and not plain.attn.rotary


# --- maps


def test_a_map_is_its_tokens():
    m = attnzoo.create("neighborhood", DIM, HEADS, form="map", window=3).eval()
    tokens = attnzoo.create("neighborhood", DIM, HEADS, grid=GRID, window=3).eval()
    tokens.load_state_dict(m.state_dict())
    image = torch.randn(2, DIM, *GRID)
    expected = tokens(image.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(image.shape)
    wide = torch.randn(2, DIM, 8, 5)
    wide[:, :, ::2] = image
    for same in (image, image.to(memory_format=torch.channels_last), wide[:, :, ::2]):
        assert torch.equal(same, image)
        torch.testing.assert_close(m(same), expected)
    assert m(torch.randn(1, DIM, 7, 3)).shape == (1, DIM, 7, 3)
    assert attnzoo.create("softmax", DIM, grid=(2, 3, 4), form="map")(torch.randn(1, DIM, 3, 3, 4)).shape == (
        1,
        DIM,
        3,
        3,
        4,
    )
    assert attnzoo.create("softmax", DIM, grid=9, form="map")(torch.randn(1, DIM, 5)).shape == (1, DIM, 5)


def test_masks_and_contexts_of_maps():
    m = attnzoo.create("softmax", DIM, HEADS, form="map").eval()
    image = torch.randn(2, DIM, *GRID)
    keys = torch.rand(2, *GRID) > 0.4
    assert torch.equal(m(image, mask=keys), m(image, mask=Mask(keys=keys.flatten(1))))
    assert torch.equal(m(image, mask=keys), m(image, mask=keys.flatten(1)))
    assert not torch.allclose(m(image, mask=keys), m(image))
    cross = attnzoo.create("softmax", DIM, HEADS, form="map", context_dim=16).eval()
    other = torch.randn(2, 16, 2, 3)
    as_tokens = other.flatten(2).transpose(1, 2)
    assert (
        torch.equal(cross(image, other), cross(image, as_tokens)) and cross(image, other).shape == image.shape
    )
    seen = torch.rand(2, 2, 3) > 0.3
    assert torch.equal(cross(image, other, mask=seen), cross(image, as_tokens, mask=seen.flatten(1)))


@pytest.mark.parametrize("shape", [(DIM, 4, 5), (2, 4, 5, DIM), (2, N, DIM), (2, DIM, 2, 2, 5)])
def test_what_is_no_map_is_refused(shape):
    with pytest.raises(LayoutMismatch) as caught:
        attnzoo.create("fourier", DIM, form="map")(torch.randn(shape))
    assert caught.value.code == "AZ401"


def test_a_map_of_another_grid_than_its_weights_is_refused():
    m = attnzoo.create("linformer", DIM, HEADS, form="map", grid=GRID, rank=4)
    assert m(torch.randn(2, DIM, *GRID)).shape == (2, DIM, *GRID)
    with pytest.raises(LayoutMismatch, match="belong to positions"):
        m(torch.randn(2, DIM, 5, 4))  # as many tokens, in another order


def test_a_stage_of_a_resnet_learns_with_it():
    net = timm.create_model("resnet18", pretrained=False, num_classes=5)
    stage = net.layer4[0]
    stage.conv2 = nn.Sequential(
        stage.conv2, attnzoo.create("neighborhood", dim=512, heads=8, form="map", window=3)
    )
    shallow = timm.create_model("resnet26", pretrained=False, num_classes=5)
    shallow.layer3[1].conv2 = attnzoo.create(
        "softmax", dim=256, heads=4, form="map"
    )  # in the place of a convolution
    for model in (net, shallow):
        model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        images, labels = (
            torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last),
            torch.tensor([0, 1, 2, 3]),
        )
        before = [p.clone() for p in model.parameters()]
        losses = []
        for _ in range(4):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        still = [
            name
            for (name, p), old in zip(model.named_parameters(), before, strict=True)
            if torch.equal(p, old)
        ]
        assert set(still) <= {
            "layer4.0.conv2.1.attn.proj.bias"
        }  # a batch norm right behind it takes every bias away
        assert model.eval()(torch.randn(1, 3, 96, 64)).shape == (1, 5)


def test_it_takes_the_place_of_timms_attention_slot():
    """timm's networks build their attention modules as `attn_layer(channels)`."""
    net = timm.create_model("resnet26", pretrained=False, num_classes=3, block_args={
        "attn_layer": lambda channels, **_: attnzoo.create("squeeze_excite", channels, form="map")})  # fmt: skip
    assert sum(type(m).__name__ == "FeatureMap" for m in net.modules()) == 8
    net(torch.randn(2, 3, 64, 64)).sum().backward()


# --- pools


def test_a_pool_gives_one_token(more, x):
    m = attnzoo.create("map_pool", DIM, HEADS, grid=GRID).eval()
    keys = torch.rand(2, N) > 0.3
    assert m(x).shape == (2, DIM)
    assert torch.equal(m(x, mask=keys), m.attn(x, mask=Mask(keys=keys), layout=Layout(GRID)))
    image = attnzoo.create("map_pool", DIM, HEADS, form="map").eval()
    image.load_state_dict(m.state_dict())
    torch.testing.assert_close(image(x.transpose(1, 2).unflatten(2, GRID)), m(x))
    with pytest.raises(UnsupportedContext):
        m(x, x)
    with pytest.raises(UnsupportedMask):
        m(x, causal=True)


# --- a citizen of PyTorch


def test_meta_device_and_dtype():
    m = attnzoo.create("agent", DIM, HEADS, grid=GRID, device="meta")
    assert {p.device.type for p in m.parameters()} == {"meta"}
    half = attnzoo.create("softmax", DIM, HEADS, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(torch.randn(1, N, DIM, dtype=torch.bfloat16)).dtype == torch.bfloat16
    m = m.to_empty(device="cpu")
    for part in m.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
        elif hasattr(part, "init_weights"):
            part.init_weights()
    assert m(torch.randn(1, N, DIM)).isfinite().all()


def test_making_it_draws_no_more_random_numbers_than_its_weights_need():
    torch.manual_seed(0)
    attnzoo.create("softmax", DIM, HEADS)
    after = torch.rand(1)
    torch.manual_seed(0)
    nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("softmax", "tokens"),
        pytest.param("softmax", "map", marks=pytest.mark.slow),
        ("agent", "map"),
        pytest.param("elu_linear", "tokens", marks=pytest.mark.slow),
    ],
)
@pytest.mark.sample(3)
def test_compile_in_one_graph(name, form):
    m = attnzoo.create(name, DIM, HEADS, grid=GRID, form=form).eval()
    x = torch.randn(2, N, DIM) if form == "tokens" else torch.randn(2, DIM, *GRID)
    fast = torch.compile(m, fullgraph=True, backend="aot_eager")
    keys = torch.rand(2, N) > 0.3
    torch.testing.assert_close(fast(x), m(x))
    torch.testing.assert_close(fast(x, mask=keys), m(x, mask=keys))


@pytest.mark.parametrize("name", ["softmax", "agent", "linformer", "squeeze_excite"])
@pytest.mark.sample(3)
def test_export_with_any_batch(name):
    m = attnzoo.create(name, DIM, HEADS, grid=GRID).eval()
    b = torch.export.Dim("b")
    mask = {} if name == "softmax" else {"mask": torch.ones(2, N, dtype=torch.bool)}
    program = torch.export.export(
        m, (torch.randn(2, N, DIM),), mask, dynamic_shapes={"x": {0: b}, **dict.fromkeys(mask, {0: b})}
    )
    x = torch.randn(5, N, DIM)
    more = {key: torch.ones(5, N, dtype=torch.bool) for key in mask}
    torch.testing.assert_close(program.module()(x, **more), m(x, **more))


class Told(nn.Module):
    """A network that tells its module more than the tokens."""

    def __init__(self, told, **options):
        super().__init__()
        self.mix, self.told = attnzoo.create("softmax", DIM, HEADS, **options), told

    def forward(self, x):
        return self.mix(x, **self.told)


def test_what_is_told_is_not_lost_in_tracing():
    x = torch.randn(2, N, DIM)
    net = Told({"layout": Layout((2, 10))}, grid=GRID)
    assert torch.equal(fx.symbolic_trace(net)(x), net(x))
    for told in ({"causal": True}, {"mask": Mask(causal=True)}):
        net = Told(told)
        try:
            traced = fx.symbolic_trace(net)
        except fx.proxy.TraceError:  # a causal softmax asks for lengths: refused is as good
            continue
        assert torch.equal(traced(x), net(x))

    class Shaped(Told):
        def forward(self, x):
            return self.mix(x, mask=x.sum(dim=2) > 0)

    with pytest.raises(UnsupportedMask, match="traced"):
        fx.symbolic_trace(Shaped({}))(x)
    cross = Told({}, form="map", grid=GRID, context_dim=16, context_grid=(2, 3)).mix
    image, context = torch.randn(2, DIM, *GRID), torch.randn(2, 16, 2, 3)
    assert torch.equal(fx.symbolic_trace(cross)(image, context), cross(image, context))


class Net(nn.Module):
    """A network that does not know of us."""

    def __init__(self, **options):
        super().__init__()
        self.mix = attnzoo.create("softmax", DIM, HEADS, **options)

    def forward(self, x):
        return torch.relu(self.mix(x))


def test_fx_traces_it_alone_and_inside():
    image = torch.randn(2, DIM, *GRID)
    for net, x in (
        (Net(grid=GRID), torch.randn(2, N, DIM)),
        (Net(), torch.randn(3, 7, DIM)),
        (Net(form="map"), image),
    ):
        for module in (net, net.mix):
            traced = pickle.loads(pickle.dumps(fx.symbolic_trace(module)))  # noqa: S301 - our own bytes
            assert torch.equal(traced(x), module(x))
    traced = fx.symbolic_trace(Net().mix)
    with pytest.raises(UnsupportedMask, match="traced"):
        traced(torch.randn(2, N, DIM), mask=torch.ones(2, N, dtype=torch.bool))
    cross = attnzoo.create("softmax", DIM, HEADS, context_dim=16)
    x, context = torch.randn(2, N, DIM), torch.randn(2, 3, 16)
    assert torch.equal(fx.symbolic_trace(cross)(x, context), cross(x, context))


def test_state_dicts_parametrizations_and_data_parallel(x):
    m, other = attnzoo.create("softmax", DIM, HEADS), attnzoo.create("softmax", DIM, HEADS)
    assert list(m.state_dict()) == ["attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
    other.load_state_dict(m.state_dict())
    assert torch.equal(m(x), other(x)) and torch.equal(nn.DataParallel(m)(x), m(x))
    torch.testing.assert_close(torch.func.functional_call(other, dict(m.named_parameters()), (x,)), m(x))
    nn.utils.parametrizations.weight_norm(other.attn.proj)
    assert parametrize.is_parametrized(other.attn.proj) and other(x).shape == x.shape


def test_threads_share_a_module():
    m = attnzoo.create("neighborhood", DIM, HEADS, window=3).eval()
    jobs = []
    for i in range(64):
        n = 4 + i % 7
        jobs.append((torch.randn(2, n, DIM), torch.rand(2, n, n) > 0.5))
    alone = [m(x, mask=mask) for x, mask in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: m(job[0], mask=job[1]), jobs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_plugins_mechanism_stands_alone():
    zoo = load_zoo()
    assert isinstance(zoo, Zoo)
    for name in ("attnzoo/softmax", "softmax"):
        assert isinstance(attnzoo.create(name, DIM, HEADS).attn, Mechanism)


def test_import_stays_light():
    code = "import attnzoo, sys; dir(attnzoo); print({'torch', 'timm', 'pydantic'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == "set()"


def test_recipes_are_mappings_too():
    said = {
        "recipe": 1,
        "host": {"kind": "sequence", "layers": 1},
        "attention": {"use": "softmax"},
        "heads": 2,
    }
    assert attnzoo.compose(said).layers[0].attn.heads == 2
    with pytest.raises(RecipeError) as caught:
        attnzoo.compose(said | {"attention": "softmx"})
    assert caught.value.code == "AZ201" and caught.value.diagnostics[0].place.line > 1
    for strange in (said | {"host": object()}, said | {"heads": float("nan")}):
        with pytest.raises(RecipeError) as caught:
            attnzoo.compose(strange)
        assert caught.value.code in ("AZ112", "AZ113")
