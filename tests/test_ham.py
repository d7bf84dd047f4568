"""The HAM paper's three models: ViT Classic, HAM A (product) and HAM B (sum), and the variants of the soft branch.

The independent model below writes the equations of the ViT that the paper starts from, with a module of its own for
each head and its own layer norm and activation, as the paper puts the second branch inside the head.
"""

import math

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.core import FusedHeads, Layout, MultiHead, Site, find_taps, watch
from attnzoo.functional import split_heads
from attnzoo.fusions.add import Add
from attnzoo.fusions.hadamard import Hadamard
from attnzoo.mechanisms.additive.soft import Soft
from attnzoo.mechanisms.dot_product.softmax import Softmax

RECIPES = {"ham_classic": 119_098, "ham_a": 121_786, "ham_b": 121_786}
VARIANT = "attention.of.1.with.variant="


def model(recipe: str, variant: str | None = None, *, spread: float = 0.0) -> nn.Module:
    """A composed model in float64 and eval mode.

    Args:
        recipe: Its name.
        variant: Of the soft branch, where it is not the recipe's.
        spread: Standard deviation of what is added to all parameters, so that nothing is hidden by small weights.
    """
    edits = [VARIANT + variant] if variant else []
    built = attnzoo.compose(recipe, edits=edits).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return built


def images(count: int = 2) -> torch.Tensor:
    """Random images of CIFAR's size."""
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)


def soft_heads(built: nn.Module) -> list[Soft]:
    """The soft branch of each block."""
    return [module for module in built.modules() if isinstance(module, Soft)]


def copied(source: nn.Module, target: nn.Module, missing: str) -> nn.Module:
    """The target with the source's weights; only keys that contain `missing` may be left over, on either side."""
    left = target.load_state_dict(source.state_dict(), strict=False)
    assert all(missing in key for key in (*left.missing_keys, *left.unexpected_keys)), left
    return target


def forced(built: nn.Module, value: float) -> nn.Module:
    """The model with the output of every soft branch replaced by one number."""
    assert len(soft_heads(built)) == 4
    for head in soft_heads(built):
        head.register_forward_hook(lambda _module, _args, out: torch.full_like(out, value))
    return built


# Size and shape


@pytest.mark.parametrize("recipe,count", RECIPES.items())
def test_parameters(recipe, count):
    built = attnzoo.compose(recipe)
    assert sum(p.numel() for p in built.parameters()) == count
    assert built(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_parameters_of_the_other_readings():
    def count(variant):
        return sum(p.numel() for p in attnzoo.compose("ham_b", edits=[VARIANT + variant]).parameters())

    assert count("pooled") - 119_098 == 16 * (12 * 12 + 12 + 12)
    assert count("gated") == count("pooled")
    assert count("bahdanau") - 119_098 == 16 * (2 * 144 + 12) == 4800
    assert count("cls_query") == count("bahdanau")


def test_parameters_part_by_part():
    built = attnzoo.compose("ham_classic")
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in built.named_children()}
    assert size["patch_embed"] == 2352 and built.cls_token.numel() == 48 and built.pos_embed.numel() == 3120
    assert size["blocks"] == 4 * 28272 and size["head"] == 490


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_paper_s_design(recipe):
    built = attnzoo.compose(recipe)
    assert isinstance(built.norm, nn.Identity) and isinstance(built.fc_norm, nn.Identity)  # no final norm
    assert len(built.blocks) == 4 and built.pos_embed.shape == (1, 65, 48)
    for block in built.blocks:
        assert block.norm1.eps == block.norm2.eps == 1e-5
        assert block.attn.heads == 4 and block.attn.head_dim == 12 and block.attn.qkv.bias is not None
        x = torch.linspace(-3, 3, 31, dtype=torch.float64)
        wanted = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        torch.testing.assert_close(block.mlp.act(x), wanted, rtol=0, atol=1e-12)
    drops = [m for m in built.modules() if isinstance(m, nn.Dropout)]
    assert drops and all(m.p == 0 for m in drops)


@pytest.mark.parametrize("recipe", RECIPES)
def test_init_is_normal(recipe):
    built = attnzoo.compose(recipe)
    for name, parameter in built.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 500:
            assert abs(parameter.std() / 0.02 - 1) < 0.15 and abs(parameter.mean()) < 0.003, name
            assert parameter.abs().max() > 0.045, name  # a normal distribution has tails
        else:
            assert 0 < parameter.std() < 0.04, name


# Reductions


def test_ham_b_without_its_soft_branch_is_classic():
    classic = model("ham_classic", spread=0.1)
    x = images()
    b = copied(classic, model("ham_b"), "branches.soft.")
    assert not torch.equal(b(x), classic(x))
    assert torch.equal(forced(b, 0.0)(x), classic(x))


def test_ham_a_with_its_soft_branch_at_one_is_classic():
    classic = model("ham_classic", spread=0.1)
    x = images()
    a = copied(classic, model("ham_a"), "branches.soft.")
    assert not torch.equal(a(x), classic(x))
    assert torch.equal(forced(a, 1.0)(x), classic(x))


@pytest.mark.parametrize("recipe", ["ham_a", "ham_b"])
def test_readings_coincide_when_w_is_zero(recipe):
    pooled = model(recipe, spread=0.1)
    others = [
        copied(pooled, model(recipe, variant), "branches.soft.") for variant in ("bahdanau", "cls_query")
    ]
    x = images()
    before = pooled(x)
    for built in (pooled, *others):
        assert len(soft_heads(built)) == 4
        for head in soft_heads(built):
            nn.init.zeros_(head.score_weight)
    wanted = pooled(x)
    assert (wanted - before).abs().max() > 1e-6  # w mattered
    for built in others:
        torch.testing.assert_close(built(x), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("recipe", ["ham_a", "ham_b"])
def test_gated_runs(recipe):
    assert model(recipe, "gated")(images(1)).isfinite().all()


# One layer


def layer(fusion) -> tuple[MultiHead, Site]:
    """softmax and soft inside the heads, w = 0, projections that let everything be seen."""
    site = Site("ham", 12, 3, Layout((6,), prefix=1))
    part = MultiHead(site, FusedHeads(site, fusion, [Softmax, Soft])).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    nn.init.zeros_(part.inner.branches["soft"].score_weight)
    return part, site


@pytest.mark.parametrize("fusion,factor", [(Hadamard, 4), (Add, 2)])
def test_doubling_the_values_scales_the_branch(fusion, factor):
    part, site = layer(fusion)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    merged = []
    part.proj.register_forward_pre_hook(lambda _module, args: merged.append(args[0]))
    part(x, layout=site.layout)
    with torch.no_grad():
        part.qkv.weight[24:] *= 2
        part.qkv.bias[24:] *= 2
    part(x, layout=site.layout)
    torch.testing.assert_close(merged[1], factor * merged[0], rtol=1e-10, atol=1e-10)


def test_a_pooled_channel_of_zero_silences_that_channel_of_ham_a():
    part, site = layer(Hadamard)
    with torch.no_grad():
        part.qkv.weight[24 + 5] = 0  # value channel 1 of head 1
        part.qkv.bias[24 + 5] = 0
    merged = []
    part.proj.register_forward_pre_hook(lambda _module, args: merged.append(args[0]))
    part(torch.randn(2, 7, 12, dtype=torch.float64), layout=site.layout)
    zero = merged[0].abs().amax(dim=(0, 1)) == 0
    assert zero.nonzero().flatten().tolist() == [5]


def test_the_pooled_branch_has_rank_one_over_tokens():
    part, site = layer(Add)
    out = []
    part.inner.branches["soft"].register_forward_hook(lambda _module, _args, found: out.append(found))
    part(torch.randn(2, 7, 12, dtype=torch.float64), layout=site.layout)
    assert out[0].shape == (2, 3, 7, 4)
    assert torch.linalg.matrix_rank(out[0]).max() == 1


# The whole model, looked into


@pytest.mark.parametrize("recipe", RECIPES)
def test_maps(recipe):
    built, seen = model(recipe, spread=0.1), {}
    with watch(built, "weights", lambda name, weights: seen.update({name: weights})) as taps:
        built(images(3))
    assert set(seen) == set(taps) and len(seen) == (4 if recipe == "ham_classic" else 8)
    for name, weights in seen.items():
        assert weights.shape == ((3, 4, 65) if ".soft." in name else (3, 4, 65, 65)), name
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-12)
        assert (weights >= 0).all()
    assert not any(tap.watched for tap in find_taps(built).values())


@pytest.mark.parametrize("recipe", ["ham_a", "ham_b"])
def test_bahdanau_s_map_is_token_to_token(recipe):
    built, shapes = model(recipe, "bahdanau"), set()
    with watch(built, "weights", lambda name, weights: shapes.add((".soft." in name, tuple(weights.shape)))):
        built(images(2))
    assert shapes == {(True, (2, 4, 65, 65)), (False, (2, 4, 65, 65))}


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_do_not_depend_on_the_order_of_the_patches(recipe):
    built, x = model(recipe, spread=0.1), images()
    wanted = built(x)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(64)])
    handle = built.blocks[0].register_forward_pre_hook(lambda _module, args: (args[0][:, order], *args[1:]))
    torch.testing.assert_close(built(x), wanted, rtol=0, atol=1e-10)
    handle.remove()
    without_cls = built.blocks[0].register_forward_pre_hook(
        lambda _module, args: (args[0].roll(1, 1), *args[1:])
    )
    assert (built(x) - wanted).abs().max() > 1e-3  # another token in the place of the class token
    without_cls.remove()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_receives_a_gradient(recipe):
    built = model(recipe, spread=0.1)
    built(images()).square().sum().backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


# An independent model, head by head


class Norm(nn.Module):
    """Layer norm, written out."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        """(b n c)."""
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class OneHead(nn.Module):
    """Self-attention of one head, and HAM's second branch within the head."""

    def __init__(self, width: int, size: int, kind: str):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, size) for _ in range(3))
        self.kind, self.size = kind, size
        if kind != "classic":
            self.hidden, self.score = nn.Linear(size, size), nn.Linear(size, 1, bias=False)

    def forward(self, x):
        """(b n c) -> (b n d)."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        o = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(self.size), dim=-1) @ v
        if self.kind == "classic":
            return o
        alpha = torch.softmax(self.score(torch.tanh(self.hidden(v))), dim=1)  # (b n 1), over tokens
        s = (alpha * v).sum(dim=1, keepdim=True)  # (b 1 d)
        return o * s if self.kind == "a" else o + s


class Heads(nn.Module):
    """A list of heads, put side by side and projected."""

    def __init__(self, width: int, heads: int, kind: str):
        super().__init__()
        self.heads = nn.ModuleList(OneHead(width, width // heads, kind) for _ in range(heads))
        self.output = nn.Linear(width, width)

    def forward(self, x):
        """(b n c)."""
        return self.output(torch.cat([head(x) for head in self.heads], dim=-1))


class Layer(nn.Module):
    """A pre-norm block."""

    def __init__(self, kind: str):
        super().__init__()
        self.norm1, self.norm2, self.attention = Norm(48), Norm(48), Heads(48, 4, kind)
        self.dense1, self.dense2 = nn.Linear(48, 192), nn.Linear(192, 48)

    def forward(self, x):
        """(b n c)."""
        x = x + self.attention(self.norm1(x))
        h = self.dense1(self.norm2(x))
        return x + self.dense2(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))


class PlainHam(nn.Module):
    """The whole model: patches of 4 × 4, a class token, learned positions, four blocks, a classifier."""

    def __init__(self, kind: str):
        super().__init__()
        self.patch = nn.Linear(3 * 4 * 4, 48)
        self.cls, self.position = nn.Parameter(torch.zeros(1, 1, 48)), nn.Parameter(torch.zeros(1, 65, 48))
        self.layers = nn.ModuleList(Layer(kind) for _ in range(4))
        self.classifier = nn.Linear(48, 10)

    def forward(self, images):
        """(b 3 32 32) -> (b 10)."""
        b = images.shape[0]
        patches = images.reshape(b, 3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3, 5).reshape(b, 64, 48)
        x = torch.cat([self.cls.expand(b, -1, -1), self.patch(patches)], dim=1) + self.position
        for block in self.layers:
            x = block(x)
        return self.classifier(x[:, 0])


@torch.no_grad()
def take_over(plain: PlainHam, composed: nn.Module) -> None:
    """Copy a composed model's weights into the plain one, head by head."""
    state = composed.state_dict()
    used = set()

    def take(name):
        used.add(name)
        return state[name]

    def linear(layer, name):
        layer.weight.copy_(take(f"{name}.weight"))
        layer.bias.copy_(take(f"{name}.bias"))

    plain.patch.weight.copy_(take("patch_embed.proj.weight").flatten(1))
    plain.patch.bias.copy_(take("patch_embed.proj.bias"))
    plain.cls.copy_(take("cls_token"))
    plain.position.copy_(take("pos_embed"))
    linear(plain.classifier, "head")
    for i, block in enumerate(plain.layers):
        at = f"blocks.{i}"
        for norm in ("norm1", "norm2"):
            linear(getattr(block, norm), f"{at}.{norm}")
        linear(block.dense1, f"{at}.mlp.fc1")
        linear(block.dense2, f"{at}.mlp.fc2")
        linear(block.attention.output, f"{at}.attn.proj")
        weight, bias = take(f"{at}.attn.qkv.weight"), take(f"{at}.attn.qkv.bias")
        for h, head in enumerate(block.attention.heads):
            for part, layer in enumerate((head.query, head.key, head.value)):
                rows = slice(part * 48 + h * 12, part * 48 + h * 12 + 12)
                layer.weight.copy_(weight[rows])
                layer.bias.copy_(bias[rows])
            if head.kind != "classic":
                soft = f"{at}.attn.inner.branches.soft"
                head.hidden.weight.copy_(take(f"{soft}.value_weight")[h].T)
                head.hidden.bias.copy_(take(f"{soft}.value_bias")[h])
                head.score.weight.copy_(take(f"{soft}.score_weight")[h : h + 1])
    assert used == set(state)


@pytest.mark.parametrize("recipe,kind", [("ham_classic", "classic"), ("ham_a", "a"), ("ham_b", "b")])
def test_equal_to_the_model_written_head_by_head(recipe, kind):
    composed, plain = model(recipe, spread=0.15), PlainHam(kind).double()
    assert sum(p.numel() for p in plain.parameters()) == RECIPES[recipe]
    take_over(plain, composed)
    x = images(3)
    wanted = plain(x)
    assert wanted.std() > 0.01
    torch.testing.assert_close(
        composed(x), wanted, rtol=0, atol=1e-10 * max(1.0, float(wanted.detach().abs().max()))
    )
    with watch(composed, None, lambda *_: None):  # the explicit form too
        torch.testing.assert_close(
            composed(x), wanted, rtol=0, atol=1e-10 * max(1.0, float(wanted.detach().abs().max()))
        )


def test_heads_are_cut_head_by_head():
    x = torch.arange(12.0).reshape(1, 1, 12)
    assert split_heads(x, 3)[0, :, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
