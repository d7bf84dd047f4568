"""Claims about gradients: everything learns, and as finite differences say."""

from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor
from torch.func import functional_call

from attnzoo.core import Fusion, Head, Law, MultiHead, auxiliary_losses, find_taps
from attnzoo.core.auxiliary import wanted_by
from attnzoo.testing.claim import DRAWS, claim, requires
from attnzoo.testing.influence import hard, partial
from attnzoo.testing.strategies import Checkable, Scene

LEARNS = 1e-9
"""Least gradient, relative to the largest one of the same tensor, that is more than rounding."""
TOGETHER = (1.0, 3.0, 10.0)
"""How far all tokens are moved together, in turn: the mean of many that are not is near 0, and a rectifier behind it
stays closed or open, whatever is drawn."""


def _gradients(
    scene: Scene, component: torch.nn.Module, stream: int, together: float = 0.0
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Of some loss: with respect to the inputs, and to the parameters by name; zeros where there is none.

    Args:
        scene: Where.
        component: It.
        stream: Which of several independent inputs.
        together: How far all tokens of an input are moved by the same random vector.
    """
    inputs = scene.inputs(stream)
    if together:
        random = scene.generator(800 + stream)
        inputs = [x + together * torch.randn(x[..., :1, :].shape, generator=random).to(x) for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    names = [name for name, _ in component.named_parameters()]
    out = scene.run(component, inputs)
    wanted = [*inputs, *component.parameters()]
    loss = (out * scene.random(*out.shape, stream=5 + stream)).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs], {
            n: torch.zeros_like(p) for n, p in component.named_parameters()
        }
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    whole = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return whole[: len(inputs)], dict(zip(names, whole[len(inputs) :], strict=True))


def _own(scene: Scene, name: str) -> bool:
    """Whether a parameter or input is the component's own: of a head not the projections, nor x beside a context."""
    if not issubclass(scene.component, Head):
        return True
    return name.startswith("inner.") or name == ("x" if scene.site.context_dim is None else "context")


@requires("mechanism", "pool", "fusion", wide=True, where=lambda card: Law.SILENT not in card.laws, share=0.4)
def check_gradients(cls: Checkable, scene: Scene) -> None:
    """Every parameter, x, a context and every branch receives a finite gradient, not always zero.

    Projections around a head learn where the head asks for what they give: a pooled query may not be asked for.
    """
    scene = scene.roomy()
    fusion = issubclass(cls, Fusion)
    names = [f"branch {i + 1}" for i in range(scene.arity)] if fusion else ["x", "context"]
    free = set(names) if fusion and scene.card.hard_routing else set()
    waiting: set[str] = set()
    for stream in range(DRAWS):
        inputs, parameters = _gradients(scene, scene.build(stream=stream), stream)
        found = dict(chain(zip(names, inputs, strict=False), parameters.items()))
        for name, gradient in found.items():
            claim(bool(gradient.isfinite().all()), "gradients are finite", f"that of `{name}` is not")
        silent = {name for name, gradient in found.items() if not gradient.any() and _own(scene, name)}
        waiting = silent - free if stream == 0 else waiting & silent
        if not waiting:
            return
    listed = ", ".join(sorted(f"`{name}`" for name in waiting))
    claim(not waiting, "everything learns", f"{listed} got no gradient")


@requires("mechanism", "pool", "fusion", wide=True, share=0.2)
def check_every_entry_learns(cls: Checkable, scene: Scene) -> None:
    """Every entry of every parameter learns, beyond rounding, at one place at least; of a bias some entry does.

    A bias of keys moves all scores of a row alike, which a softmax cannot see; it often is one parameter with others.
    What is silent is asked again with all tokens of an input moved by one vector, short or long.
    """
    # of 10 rows a window of 7 that is shifted by 3 has all
    grid = not issubclass(cls, Fusion) and cls.card.grid is not None
    scene = scene.roomy(6 if not grid else 10 if Law.LOCAL in scene.card.laws else 8)
    largest: dict[str, Tensor] = {}
    for stream in range(2 * DRAWS):
        together = TOGETHER[stream % len(TOGETHER)] if stream >= DRAWS else 0.0
        for name, gradient in _gradients(scene, scene.build(stream=stream), stream, together)[1].items():
            share = gradient.abs() / max(float(gradient.abs().max()), 1e-30)
            if _own(scene, name):
                largest[name] = share if name not in largest else torch.maximum(largest[name], share)
        dead = {name: int((share <= LEARNS).sum()) for name, share in largest.items()}
        for name, share in largest.items():  # of a bias one entry is enough
            if name.endswith("bias") and share.ndim == 1 and dead[name] < share.numel():
                dead[name] = 0
        if not any(dead.values()):
            return
    name = max(dead, key=lambda name: dead[name])
    happened = f"{dead[name]} of {largest[name].numel()} entries of `{name}` get no gradient"
    claim(False, "every entry of every parameter learns", happened)


@requires("mechanism", "pool", "fusion", wide=True, where=lambda card: Law.SILENT not in card.laws, share=0.4)
def check_every_input_counts(cls: Checkable, scene: Scene) -> None:
    """Every channel of every token that is given, of a context and of the branches too, has influence."""
    scene = scene.roomy()
    if hard(scene):
        return
    whole = not partial(scene, scene.build(), scene.inputs()) if scene.site.context_dim is not None else True
    largest: dict[str, Tensor] = {}
    for stream in range(DRAWS):
        inputs = _gradients(scene, scene.build(stream=stream), stream)[0]
        for name, gradient in _counting(scene, inputs, whole).items():
            largest[name] = torch.maximum(largest.get(name, gradient.abs()), gradient.abs())
        dead = {name: (g <= LEARNS * max(float(g.max()), 1e-30)).nonzero() for name, g in largest.items()}
        if not any(len(where) for where in dead.values()):
            return
    for name, where in dead.items():
        at = where[0].tolist() if len(where) else []
        claim(not len(where), f"every entry of `{name}` has influence", f"the one at {at} has none")


def _counting(scene: Scene, inputs: list[Tensor], whole: bool) -> dict[str, Tensor]:
    """Of what belongs to each input, in its shape, the part that must count, by name.

    Args:
        scene: Where.
        inputs: What belongs to x, a context, branches.
        whole: Whether all of a context is read.
    """
    if issubclass(scene.component, Fusion):  # x is there for those who ask
        return {f"branch {i + 1}": branch for i, branch in enumerate(inputs[:-1])}
    found = dict(zip(("x", "context"), inputs, strict=False))
    # who needs geometry may have no place for special tokens
    if scene.card.grid is not None:
        found["x"] = found["x"][:, scene.layout.prefix :]
    if scene.card.context_grid is not None:
        found["context"] = found["context"][:, scene.head_layout().prefix :]
    elif not whole:  # it may be longer than windows reach
        del found["context"]
    return {name: tensor for name, tensor in found.items() if _own(scene, name)}


@requires("head", wide=True, share=0.4)
def check_every_channel_counts(cls: Checkable, scene: Scene) -> None:
    """Of queries, keys and values every channel of every head has influence, where any has: of odd numbers, too."""
    scene = scene.roomy()
    if scene.site.head_dim % 2 == 0:
        scene = scene.at(replace(scene.site, dim=3 * scene.site.heads), 4)
    largest: list[Tensor] = []
    for stream in range(4):
        head, tensors = (
            scene.build(bare=True, stream=stream),
            [t.requires_grad_() for t in scene.heads(stream)],
        )
        out = head(*tensors, layout=scene.head_layout(), given=scene.given)
        loss = (out * scene.random(*out.shape, stream=5)).sum()
        found = torch.autograd.grad(loss, tensors, allow_unused=True)
        channels = [torch.zeros(1) if g is None else g.abs().amax(dim=(0, 2)) for g in found]
        largest = (
            channels if not largest else [torch.maximum(a, b) for a, b in zip(largest, channels, strict=True)]
        )
        if all(bool((g > LEARNS * g.max()).all()) for g in largest):
            return
    for name, gradient in zip(("queries", "keys", "values"), largest, strict=True):
        dead = (gradient <= LEARNS * gradient.max()).nonzero().tolist()
        fine = not dead or not gradient.any()
        where = " and ".join(f"{c} of head {h}" for h, c in dead[:2]) if not fine else ""
        claim(fine, f"every channel of the {name} has influence, as others have", f"channel {where} has none")


@requires("mechanism", "pool", "fusion", where=lambda card: bool(card.auxiliary), wide=True, share=0.4)
def check_auxiliary(cls: Checkable, scene: Scene) -> None:
    """The loss that it adds in training is made of its own taps, one finite number, and some parameter learns of it.

    Under the defaults, with four heads or more, and two branches: fewer, and other options, may leave nothing to do.
    """
    heads = max(4, scene.site.heads)
    site = replace(scene.site, heads=heads, dim=heads * scene.site.head_dim)
    scene = scene.at(site).crowded().roomy()
    component, inputs = scene.build().train(), scene.inputs()
    own = component.inner if isinstance(component, MultiHead) else component
    unknown = set(wanted_by(own)) - set(find_taps(own))
    claim(not unknown, "`auxiliary` is made of what taps show", f"{sorted(unknown)} are no taps of it")
    with auxiliary_losses(component) as extra:
        scene.run(component, inputs)
    found = list(extra.by_component().values())
    if scene.options and not found:
        return
    claim(len(found) == 1, f"it adds a loss in training: {scene.card.auxiliary}", "it adds none")
    (loss,) = found
    claim(loss.ndim == 0, "`auxiliary` gives one number", f"its shape is {tuple(loss.shape)}")
    claim(bool(loss.isfinite()), "`auxiliary` is finite", f"it is {loss.item()}")
    if scene.options:
        return
    learns = loss.requires_grad and any(
        gradient is not None and bool(gradient.any())
        for gradient in torch.autograd.grad(loss, list(component.parameters()), allow_unused=True)
    )
    claim(learns, "parameters learn from `auxiliary`", "none gets a gradient")


class _Run(torch.nn.Module):
    """A component in its scene, as a module of its inputs."""

    def __init__(self, scene: Scene):
        super().__init__()
        self.scene, self.component = scene, scene.build()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.scene.run(self.component, inputs)


@requires("mechanism", "pool", "fusion", share=0.2)
def check_gradcheck(cls: Checkable, scene: Scene) -> None:
    """Gradients with respect to inputs and parameters equal finite differences, in float64."""
    whole, inputs = _Run(scene), [x.requires_grad_() for x in scene.inputs()]
    names, values = [name for name, _ in whole.named_parameters()], list(whole.parameters())

    def run(*tensors: Tensor) -> Tensor:
        parameters = dict(zip(names, tensors[len(inputs) :], strict=True))
        return functional_call(whole, parameters, tensors[: len(inputs)])

    try:
        torch.autograd.gradcheck(run, (*inputs, *values), fast_mode=True, atol=1e-4)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise AssertionError(f"claimed: gradients equal finite differences; but {text}") from error
