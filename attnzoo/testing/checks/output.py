"""Claims about the output: its shape, dtype, and finite numbers, however the input lies in memory."""

import torch

from attnzoo.testing.claim import claim, requires, same
from attnzoo.testing.influence import hard
from attnzoo.testing.strategies import Checkable, Scene

AUTOCAST = 0.1
"""How far bfloat16 may be off, relative to the norm of the output; its steps are 1/128."""


@requires("mechanism", "pool", "fusion", share=0.4)
def check_output(cls: Checkable, scene: Scene) -> None:
    """The output has the shape and dtype that it must, in float32, float64 and bfloat16, and is finite."""
    component = scene.build()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        component, inputs = component.to(dtype), scene.inputs(dtype=dtype)
        out, shape = scene.run(component, inputs), scene.shape(component)
        claim(tuple(out.shape) == shape, f"the output is {shape}", f"it is {tuple(out.shape)}")
        claim(out.dtype == dtype, f"tokens in {dtype} give an output in {dtype}", f"it is in {out.dtype}")
        claim(bool(out.isfinite().all()), "the output is finite", f"it is not, in {dtype}")


@requires("fusion")
def check_half(cls: Checkable, scene: Scene) -> None:
    """In float16 the output is what it is in float32, but for rounding; a router may send a few tokens elsewhere."""
    inputs = [x.tanh() for x in scene.inputs(dtype=torch.float16)]
    out = scene.run(scene.build(torch.float16), inputs)
    claim(
        out.dtype == torch.float16, "branches in float16 give an output in float16", f"it is in {out.dtype}"
    )
    exact = scene.run(scene.build(torch.float32), [x.float() for x in inputs])
    out = out.float()
    if hard(scene):
        off = (out - exact).abs().amax(dim=-1)
        most = off <= off.median()
        out, exact = out[most], exact[most]
    same(out, exact, "float16 gives what float32 gives, but for rounding", 0.03)


@requires("mechanism", "pool", "fusion", share=0.4)
def check_large_inputs(cls: Checkable, scene: Scene) -> None:
    """The output is finite for |x| up to 1000, in float32."""
    inputs = [(1e3 * x.sign() if scene.seed % 2 else 1e3 * x.tanh()).float() for x in scene.inputs()]
    out = scene.run(scene.build(torch.float32), inputs)
    claim(bool(out.isfinite().all()), "the output is finite for |x| up to 1000", "it holds NaN or infinity")


@requires("mechanism", "pool", "fusion", share=0.4)
def check_autocast(cls: Checkable, scene: Scene) -> None:
    """Forward and backward run inside `torch.autocast`; the output is close to that of float32.

    A norm of two channels, or a position that is rounded, may make much of a rounding: of three draws two are close.
    """
    off = _off(scene, 0)
    if off <= AUTOCAST or hard(scene):
        return
    off = sorted([off, _off(scene, 1), _off(scene, 2)])[1]
    claim(off <= AUTOCAST, "autocast gives what float32 gives, but for rounding", f"it is {off:.0%} off")


def _off(scene: Scene, stream: int) -> float:
    """How far autocast takes the output of a draw, relative to its norm; forward and backward must run there."""
    component, inputs = scene.build(torch.float32, stream=stream), scene.inputs(stream, torch.float32)
    exact = scene.run(component, inputs).detach()
    claimed = "forward and backward run inside torch.autocast (bfloat16)"
    for x in inputs:
        x.requires_grad_()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = scene.run(component.train(), inputs)
            loss = (out.float() * scene.random(*out.shape, stream=5, dtype=torch.float32)).sum()
        loss.backward()
    except RuntimeError as error:
        raise AssertionError(f"claimed: {claimed}; but {str(error).splitlines()[0]}") from error
    known = (torch.float32, torch.bfloat16)
    claim(out.dtype in known, f"{claimed} and give float32 or bfloat16", f"the output is in {out.dtype}")
    for name, tensor in [
        *((f"input {i + 1}", x) for i, x in enumerate(inputs)),
        *component.named_parameters(),
    ]:
        finite = tensor.grad is None or bool(tensor.grad.isfinite().all())
        claim(finite, f"{claimed} with finite gradients", f"that of `{name}` holds NaN or infinity")
    return float((out.float() - exact).detach().norm() / (1e-3 + exact.norm()))


@requires("mechanism", "pool", "fusion", share=0.4)
def check_memory_format(cls: Checkable, scene: Scene) -> None:
    """Inputs that lie otherwise in memory give the same: transposed, strided, and one sample that is expanded."""
    component, inputs = scene.build(), scene.inputs()
    expected = scene.run(component, inputs)
    claimed = "how inputs lie in memory has no say"
    transposed = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs]
    strided = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in inputs]
    try:
        same(scene.run(component, transposed), expected, f"{claimed} (transposed)")
        same(scene.run(component, strided), expected, f"{claimed} (strided)")
        expanded = [x[:1].expand(x.shape) for x in inputs]
        whole = [x.contiguous() for x in expanded]
        same(scene.run(component, expanded), scene.run(component, whole), f"{claimed} (expanded)")
    except RuntimeError as error:
        raise AssertionError(f"claimed: {claimed}; but {str(error).splitlines()[0]}") from error


@requires(
    "mechanism", "pool", where=lambda card: not card.fixed_length and card.context_grid is None, share=0.4
)
def check_other_lengths(cls: Checkable, scene: Scene) -> None:
    """Without `fixed_length` it works on other grids than its site has."""
    component = scene.build()
    for more in (1, 3):
        sides = [side + more * (i == 0 or scene.seed % 2) for i, side in enumerate(scene.layout.grid)]
        other = scene.with_layout(sides)
        claimed = f"fixed_length: False, so built for {scene.layout} it works on {other.layout}"
        try:
            out = other.run(component, other.inputs())
        except RuntimeError as error:
            raise AssertionError(f"claimed: {claimed}; but {str(error).splitlines()[0]}") from error
        shape = other.shape(component)
        claim(
            tuple(out.shape) == shape and bool(out.isfinite().all()),
            claimed,
            "the output is not as it must be",
        )
