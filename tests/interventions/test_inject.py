"""`inject`: IRI, against a forward by hand."""

import pytest
import torch
from instruments import images, pairs, sentences, vit
from torch import Tensor, nn

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.interventions import Inject

DEPTH = 4
ATTENTION = {"blocks.0": 0.5, "blocks.1": 0.9, "blocks.2": 0.7, "blocks.3": 0.1}
MLP = {"blocks.1": 0.4, "blocks.3": 0.2}


def recorded(model: nn.Module, *interventions) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What attention and MLPs give, as it is added to the residual, layer by layer, and the answer."""
    attention, mlps, hooks = [], [], []
    with torch.no_grad(), attnzoo.intervene(model, *interventions):
        for block in model.blocks:
            hooks.append(block.attn.register_forward_hook(lambda _, args, out: attention.append(out)))
            hooks.append(block.mlp.register_forward_hook(lambda _, args, out: mlps.append(out)))
        out = model(images())
        for hook in hooks:
            hook.remove()
    return attention, mlps, out


def by_hand(model: nn.Module, rows: list[int], strengths: tuple[float, float]) -> Tensor:
    """The forward of the ViT written out, with k₁ = 2 and k₂ = 3: of attention S = {1, 2}, T = {1, 2, 0}."""
    x = model._pos_embed(model.patch_embed(images()))
    plain: dict[str, dict[int, Tensor]] = {"attention": {}, "mlp": {}}

    def told(
        part: str, layer: int, a: Tensor, rates: dict[int, float], strength: float, targets: set[int]
    ) -> Tensor:
        plain[part][layer] = a
        new = a.clone()
        if layer in targets:
            for row in rows:
                for k, rate in rates.items():
                    if k < layer:
                        new[:, row] += strength * rate * plain[part][k][:, row]
                new[:, row] *= (a[:, row].norm(dim=-1) / new[:, row].norm(dim=-1))[:, None]
        return new

    for layer, block in enumerate(model.blocks):
        layout = block.layout if hasattr(block, "layout") else attnzoo.Layout((4, 4), prefix=1)
        a = block.attn(block.norm1(x), layout=layout)
        x = x + told("attention", layer, a, {1: 0.9, 2: 0.7}, strengths[0], {0, 1, 2})
        m = block.mlp(block.norm2(x))
        x = x + told("mlp", layer, m, {1: 0.4, 3: 0.2}, strengths[1], {1, 3})
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("strengths", [(0.8, 0.6), (0.8, 0.0), (0.0, 0.6)])
@pytest.mark.parametrize(("tokens", "rows"), [("answer", [0]), ("all", list(range(17)))])
def test_equals_the_forward_by_hand(strengths, tokens, rows):
    model = vit(depth=DEPTH)
    rule = Inject(
        attention=ATTENTION, mlp=MLP, attention_strength=strengths[0], mlp_strength=strengths[1], sources=2,
        targets=3, tokens=tokens,
    )  # fmt: skip
    with torch.no_grad():
        wanted = by_hand(model, rows, strengths)
        with attnzoo.intervene(model, rule):
            out = model(images())
        assert torch.allclose(out, wanted, atol=1e-4)
        assert not torch.allclose(out, model(images()), atol=1e-2)


def test_norms_stay_and_other_tokens_too():
    model = vit(depth=DEPTH)
    plain, _, _ = recorded(model)
    told, _, _ = recorded(model, Inject(attention=ATTENTION, attention_strength=3.0, sources=1, targets=3))
    # sources: blocks.1; the first target after it is blocks.2, whose input is still as it was
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], told[:2], strict=True))
    assert torch.allclose(told[2].norm(dim=-1), plain[2].norm(dim=-1), rtol=1e-6)
    assert torch.equal(told[2][:, 1:], plain[2][:, 1:])
    assert not torch.allclose(told[2][:, 0], plain[2][:, 0], atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": {"blocks.3": 1.0, "blocks.0": 0.2}, "sources": 1},  # the source is after every target
        {"attention": {"blocks.1": 1.0}, "mlp": {"blocks.2": 1.0}},  # each alone
        {},
    ],
)
def test_where_targets_come_before_sources_no_bit_changes(options):
    model = vit(depth=DEPTH)
    assert torch.equal(recorded(model, Inject(**options))[2], recorded(model)[2])


def test_streams_of_other_tokens_are_not_mixed():
    model, rates = pairs(), {"encoder.0": 1.0, "encoder.1": 1.0, "decoder.0.self": 1.0, "decoder.1.self": 0.5}
    with (
        torch.no_grad(),
        attnzoo.intervene(model, Inject(attention=rates)),
        pytest.raises(ZooError, match="AZ924"),
    ):
        model(*sentences())
    own = {site: rate for site, rate in rates.items() if site.startswith("decoder")}
    with torch.no_grad():
        plain = model(*sentences())
        with attnzoo.intervene(model, Inject(attention=own)):
            assert not torch.allclose(model(*sentences()), plain, atol=1e-4)


def test_heads_cannot_be_chosen():
    with pytest.raises(ZooError, match="AZ921"), attnzoo.intervene(vit(), Inject(heads=[0])):
        pass


def test_a_site_that_there_is_not_is_refused():
    with pytest.raises(ZooError, match="AZ923"), attnzoo.intervene(vit(), Inject(mlp={"block.1": 0.5})):
        pass


def test_layers_without_mlps_are_told_by_their_attention_alone():
    text = """
    recipe: 1
    name: small
    extends: task_switching
    host: {mlp_dim: 0}
    """
    model, ids = attnzoo.compose(text).eval(), torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        plain = model(ids)
        with attnzoo.intervene(
            model, Inject(attention={"layers.0": 1.0, "layers.1": 0.5}, attention_strength=2.0)
        ):
            assert not torch.allclose(model(ids), plain, atol=1e-3)
