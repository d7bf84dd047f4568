"""What tools can do with a composed ViT, tried out: one function for each word that `attnzoo compose` prints."""

import contextlib
import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import attnzoo
from attnzoo.hosts.given import stand_ins
from attnzoo.recipe import compose_file

SIDE, PATCH = 32, 8
POOLS = attnzoo.list_mechanisms(form="pool")
BEHIND_OTHERS = ("global_local_cross",)
"""They ask where the layers before them looked."""
SIZES = (24, 32), (40, 48)
"""Of other images, in pixels: fewer tokens, and more."""


def recipe(attention: str | dict, **model) -> dict:
    """A ViT of two small blocks, as a mapping."""
    small = {
        "img_size": SIDE,
        "patch_size": PATCH,
        "embed_dim": 32,
        "num_heads": 4,
        "depth": 2,
        "num_classes": 5,
    }
    host = {"kind": "vit", "base": "vit_tiny_patch16_224", "model": small | model}
    if attention in BEHIND_OTHERS:
        last = {"at": f"blocks.{host['model']['depth'] - 1}", "put": attention}
        return {"recipe": 1, "host": host, "attention": "softmax", "overrides": [last]}
    if attention in POOLS:
        return {"recipe": 1, "host": host, "pool": attention, "attention": "softmax"}
    return {"recipe": 1, "host": host, "attention": attention}


def images(batch: int, rows: int = SIDE, columns: int = SIDE) -> Tensor:
    return torch.randn(batch, 3, rows, columns, generator=torch.Generator().manual_seed(0))


def made(attention: str | dict, **arguments):
    """A model in eval mode with the same weights for the same arguments."""
    torch.manual_seed(0)
    return attnzoo.compose(recipe(attention), **arguments).eval()


def maps(attention: str, x: Tensor) -> dict[str, Tensor]:
    """What the mechanism asks for besides the images."""
    return stand_ins(x, compose_file(recipe(attention)).given)


def features_only(attention: str) -> None:
    x = images(2)
    out = made(attention, features_only=True, out_indices=(0, 1))(x, **maps(attention, x))
    assert [tuple(t.shape) for t in out] == [(2, 32, 4, 4)] * 2


def forward_intermediates(attention: str) -> None:
    x, model = images(2), made(attention)
    given = maps(attention, x)
    last, inner = model.forward_intermediates(x, **given)
    assert [tuple(t.shape) for t in inner] == [(2, 32, 4, 4)] * 2
    assert torch.equal(last, model.forward_features(x, **given))


def checkpointing(attention: str) -> None:
    x, gradients = images(2), []
    for enable in False, True:
        model = made(attention).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(x, **maps(attention, x)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients, strict=True))


def compiled(attention: str) -> None:
    x, model = images(2), made(attention)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(run(x, **maps(attention, x)), model(x, **maps(attention, x)), atol=1e-5)


def _exported(attention: str):
    x, model = images(2), made(attention)
    given, batch = maps(attention, x), torch.export.Dim("batch", min=1, max=64)
    shapes = {name: {0: batch} for name in ("x", *given)}
    with torch.no_grad():
        return model, torch.export.export(model, (x,), given, dynamic_shapes=shapes)


def exported(attention: str) -> None:
    model, program = _exported(attention)
    x = images(3)
    with torch.no_grad():
        out = program.module()(x, **maps(attention, x))
        assert torch.allclose(out, model(x, **maps(attention, x)), atol=1e-5)


def onnx(attention: str) -> None:
    import onnxruntime

    model, program = _exported(attention)
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        proto = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = images(3)
    fed = [x, *maps(attention, x).values()]
    (out,) = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), fed, strict=True)})
    with torch.no_grad():
        assert np.allclose(out, model(x, **maps(attention, x)).numpy(), atol=1e-4)


def dynamic_img_size(attention: str) -> None:
    model = made(attention, dynamic_img_size=True)
    with torch.no_grad():
        for size in SIZES:
            x = images(2, *size)
            assert model(x, **maps(attention, x)).shape == (2, 5)
        x = images(2)
        assert torch.allclose(
            model(x, **maps(attention, x)), made(attention)(x, **maps(attention, x)), atol=1e-5
        )


def set_input_size(attention: str) -> None:
    model = made(attention)
    for size in SIZES:
        model.set_input_size(size)
        x = images(2, *size)
        assert model(x, **maps(attention, x)).shape == (2, 5)


TRIALS: dict[str, Callable[[str], None]] = {
    "features_only": features_only,
    "forward_intermediates": forward_intermediates,
    "checkpointing": checkpointing,
    "torch.compile": compiled,
    "torch.export": exported,
    "ONNX": onnx,
    "dynamic_img_size": dynamic_img_size,
    "set_input_size": set_input_size,
    "TorchScript": lambda attention: torch.jit.script(made(attention)),
}
"""The printed word, and what fails where it does not hold."""
