"""Claims about cross-attention: what is read from is the context, all of it, and only where there is one."""

from dataclasses import replace
from itertools import chain

import torch

from attnzoo.core import Layout
from attnzoo.testing.claim import DRAWS, claim, refused, requires, same
from attnzoo.testing.influence import ANY, hard, influence, partial, random_mask, tokens_of
from attnzoo.testing.strategies import Checkable, Scene


def _across(scene: Scene) -> Scene:
    """The scene with a context; on a grid, of more than one token: between one and another there is a choice."""
    across = scene.across()
    return across if scene.card.context_grid is None else across.roomy()


@requires("mechanism", context=True)
def check_context(cls: Checkable, scene: Scene) -> None:
    """It reads from a context of another length, width and arrangement, and the context matters."""
    scene = _across(scene)
    for stream in range(DRAWS):  # of few channels a ReLU may close all
        component, (x, context) = scene.build(stream=stream), scene.inputs(stream)
        out = scene.run(component, [x, context.requires_grad_()])
        claim(
            out.shape == x.shape,
            f"with a context the output is {tuple(x.shape)}, as x",
            f"it is {tuple(out.shape)}",
        )
        claim(bool(out.isfinite().all()), "with a context the output is finite", "it holds NaN or infinity")
        (out * scene.random(*out.shape, stream=5)).sum().backward()
        for name, tensor in chain([("context", context)], component.named_parameters()):
            finite = tensor.grad is None or bool(tensor.grad.isfinite().all())
            claim(finite, "gradients are finite", f"that of `{name}` is not")
        if context.grad is not None and bool(context.grad.any()):
            return
    claim(False, "context: True, so the context matters", "its gradient is zero")


@requires("mechanism", context=True, share=0.4)
def check_context_counts(cls: Checkable, scene: Scene) -> None:
    """Every token of a context has influence on some output, and every output token is under some influence."""
    scene = _across(scene)
    component, inputs = scene.build(), scene.inputs()
    if hard(scene) or partial(scene, component, inputs):
        return
    felt = influence(scene, component, inputs)
    for stream in range(1, DRAWS):  # of few channels a ReLU may close all
        if (felt > ANY).all():
            break
        felt = torch.maximum(felt, influence(scene, scene.build(stream=stream), scene.inputs(stream)))
    if scene.card.context_grid is not None:  # special tokens may have no place in it
        every = bool((felt.amax(dim=(1, 2)) > ANY).all())
        claim(every, "the context matters in every sample", "it does not")
        return
    claim(bool((felt.amax(dim=1) > ANY).all()), "every token of a context matters", "one has no influence")
    claim(bool((felt.amax(dim=2) > ANY).all()), "every token reads from the context", "one does not")


@requires("mechanism", context=True, mask="keys")
def check_context_padding_invisible(cls: Checkable, scene: Scene) -> None:
    """What masked keys of a context hold changes nothing, in any sample."""
    scene = scene.crowded().across()
    mask = random_mask(scene, {"keys"})
    assert mask.keys is not None
    felt = influence(scene, scene.build(), scene.inputs(), mask)
    hidden = ~mask.keys[:, tokens_of(scene)]
    worst = float((felt.amax(dim=1) * hidden).max())
    claim(
        worst <= scene.tolerance,
        "masks: keys, so padding of the context is invisible",
        f"it moves by {worst:.2e}",
    )


@requires("mechanism", context=False, share=0.4)
def check_context_refused(cls: Checkable, scene: Scene) -> None:
    """A mechanism that does not claim cross-attention refuses a context with AZ404."""
    component, (x,) = scene.build(), scene.inputs()
    for context in (scene.random(*x.shape, stream=1), x):
        refused("AZ404", "context: False, so a context", scene.run, component, [x, context])


@requires("mechanism", context=True, share=0.4)
def check_context_as_site_says(cls: Checkable, scene: Scene) -> None:
    """A context at a site without one, and none at a site with one, are refused with AZ404."""
    across = scene.across()
    component, (x, context) = across.build(), across.inputs()
    refused("AZ404", "no context at a site with one", component, x, layout=scene.layout)
    if scene.card.context_grid is None:
        alone = scene.alone()
        component = alone.build()
        for given in (context[..., : x.shape[-1]], x, x.clone()):
            refused("AZ404", "a context at a site without one", alone.run, component, [x, given])


@requires("mechanism", context=True, where=lambda card: card.context_grid is None, share=0.4)
def check_context_like_tokens(cls: Checkable, scene: Scene) -> None:
    """A context of the tokens' own shape is a context: it is read, and may be the very same tensor."""
    scene = scene.alone()
    layout = Layout((scene.layout.length,))
    scene = replace(scene, site=replace(scene.site, context_dim=scene.site.dim, context_layout=layout))
    for stream in range(DRAWS):  # of few channels a ReLU may close all
        component, (x, context) = scene.build(stream=stream), scene.inputs(stream)
        itself = scene.run(component, [x, x])
        same(scene.run(component, [x, x.clone()]), itself, "a context may be the very tensor of the tokens")
        if not torch.allclose(scene.run(component, [x, context]), itself, rtol=0, atol=1e-9):
            return
    claim(False, "a context of the tokens' own shape is read", "another one of that shape changes nothing")


@requires("mechanism", context=True, where=lambda card: card.context == "beside")
def check_context_may_be_empty(cls: Checkable, scene: Scene) -> None:
    """What reads a context beside its own tokens is, with an empty one, what it is at a site without."""
    across, alone = scene.across(), scene.alone()
    component, own, (x,) = across.build(), alone.build(), alone.inputs()
    state = own.state_dict()
    claim(
        {name: t.shape for name, t in component.state_dict().items()}
        == {name: t.shape for name, t in state.items()},
        "context: beside, so its parameters are those of a site without a context",
        "they are others",
    )
    component.load_state_dict(state)
    empty = component(x, x[:, :0], layout=scene.layout)
    same(empty, alone.run(own, [x]), "context: beside, so an empty context changes nothing")
