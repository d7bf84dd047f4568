"""Weights from a file: what is understood, and what is refused with one error that helps."""

import argparse
import os
import pickle
import socket
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from attnzoo import compose
from attnzoo.cli.app import app
from attnzoo.errors import RecipeError
from attnzoo.recipe.weights import init_model

RECIPE = """
recipe: 1
name: tiny
host:
  kind: vit
  base: vit_tiny_patch16_224
  model: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, num_classes: 4}
attention: softmax
"""


@cache
def source() -> nn.Module:
    torch.manual_seed(7)
    return compose(RECIPE)


def weights() -> dict[str, torch.Tensor]:
    """A state dict that fits."""
    return {name: tensor.clone() for name, tensor in source().state_dict().items()}


def refused(path: Path) -> str:
    """What is said of a file; the model stays as it was."""
    model = compose(RECIPE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecipeError) as caught:
        init_model(model, path)
    assert [fault.code for fault in caught.value.diagnostics] == ["AZ606"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    text = str(caught.value)
    assert "weights_only" not in text and "add_safe_globals" not in text and str(path) in text
    return text


def changed(name: str, tensor: object) -> dict:
    return weights() | {name: tensor}


GOOD = {
    "plain": lambda: weights(),
    "ordered": lambda: OrderedDict(weights()),
    "parameters": lambda: dict(source().named_parameters()),
    "state_dict": lambda: {"state_dict": weights(), "epoch": 3},
    "model": lambda: {"model": weights(), "optimizer": {"state": {}, "param_groups": []}},
    "average": lambda: {"state_dict": {"x": torch.ones(1)}, "state_dict_ema": weights()},
    "no average": lambda: {"state_dict": weights(), "state_dict_ema": None},
    "wrapped": lambda: {"state_dict": {f"module.{name}": tensor for name, tensor in weights().items()}},
    "compiled": lambda: {f"_orig_mod.{name}": tensor for name, tensor in weights().items()},
    "timm's script": lambda: {"state_dict": weights(), "args": argparse.Namespace(lr=0.1), "metric": 71.5},
    "half": lambda: {name: tensor.half() for name, tensor in weights().items()},
}


@pytest.mark.parametrize("name", GOOD)
def test_understood(name, tmp_path):
    torch.save(GOOD[name](), tmp_path / "w.pth")
    model = compose(RECIPE)
    ledger = init_model(model, tmp_path / "w.pth")
    assert ledger == {"copied": len(weights()), "new": []}
    for key, tensor in model.state_dict().items():
        assert torch.allclose(tensor, weights()[key], atol=1e-3 if name == "half" else 0), key


BAD = {
    "list": (lambda: [torch.ones(2)], "it holds a list"),
    "tensor": (lambda: torch.ones(2), "it holds a tensor"),
    "number": (lambda: 3, "it holds an int"),
    "none": (lambda: None, "it holds a NoneType"),
    "empty": (dict, "it is empty"),
    "empty inside": (lambda: {"state_dict": {}}, "it is empty"),
    "int keys": (lambda: {0: torch.ones(2)}, "`0` is an int, not a name"),
    "string": (lambda: {"head.weight": "abc"}, "`head.weight` is a str"),
    "numbers": (lambda: changed("epoch", 3), "`epoch` is an int"),
    "deeper": (lambda: {"a": {"b": {"c": torch.ones(2)}}}, "`a` is a dict"),
    "twice": (lambda: {"state_dict": {"model": weights()}}, "`model` is a dict"),
    "sparse": (lambda: changed("head.weight", torch.ones(4, 16).to_sparse()), "`head.weight` is a sparse"),
    "csr": (lambda: changed("head.weight", torch.ones(4, 16).to_sparse_csr()), "`head.weight` is a sparse"),
    "meta": (lambda: changed("head.weight", torch.ones(4, 16, device="meta")), "`head.weight` is a tensor without data"),
    "quantized": (lambda: changed("head.weight", torch.quantize_per_tensor(torch.ones(4, 16), 0.1, 0, torch.qint8)),
                  "`head.weight` is a quantized"),
    "complex": (lambda: changed("head.weight", torch.ones(4, 16, dtype=torch.complex64)), "complex64"),
    "bool": (lambda: changed("head.weight", torch.ones(4, 16, dtype=torch.bool)), "bool (4, 16)"),
    "int": (lambda: changed("head.weight", torch.ones(4, 16, dtype=torch.int64)), "int64 (4, 16)"),
    "shape": (lambda: changed("head.weight", torch.ones(5, 16)), "(5, 16), the model wants float32 (4, 16)"),
    "flat positions": (lambda: changed("pos_embed", torch.ones(3)), "do not fit"),
    "no positions": (lambda: changed("pos_embed", torch.ones(1, 0, 16)), "do not fit"),
    "complex positions": (lambda: changed("pos_embed", torch.ones(1, 10, 16, dtype=torch.complex64)), "do not fit"),
    "strange": (lambda: changed("neck.weight", torch.ones(5)), "the model has no `neck.weight`"),
    "model": (lambda: nn.Linear(2, 2), "objects are never unpickled"),
    "one object": (lambda: {"state_dict": weights(), "path": Path("x")}, "objects are never unpickled"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore")
def test_refused(name, tmp_path):
    make, said = BAD[name]
    torch.save(make(), tmp_path / "w.pth")
    text = refused(tmp_path / "w.pth")
    assert said in text and "help:" in text


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.complex64])
def test_safetensors_of_another_kind(dtype, tmp_path):
    save_file(changed("head.weight", torch.ones(4, 16).to(dtype)), tmp_path / "w.safetensors")
    assert "the model wants float32 (4, 16)" in refused(tmp_path / "w.safetensors")
    save_file({}, tmp_path / "e.safetensors")
    assert "it is empty" in refused(tmp_path / "e.safetensors")


class Evil:
    """Would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_runs(protocol, tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Evil(trace), protocol))
    torch.save(
        {"state_dict": weights(), "x": Evil(trace)}, tmp_path / "b.pth", pickle_protocol=max(2, protocol)
    )
    torch.save({"x": Evil(trace)}, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    for name in "abc":
        refused(tmp_path / f"{name}.pth")
    assert not trace.exists()


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"x" * 100, b"\0" * 100, b"\xff" * 100, b"\x80\x02}q\0."]
)
def test_bytes_that_are_none(ending, data, tmp_path):
    (tmp_path / f"w.{ending}").write_bytes(data)
    refused(tmp_path / f"w.{ending}")


def test_a_truncated_file_at_every_length(tmp_path):
    for name, write in (("w.pth", torch.save), ("w.safetensors", save_file)):
        write(weights(), tmp_path / name)
        data = (tmp_path / name).read_bytes()
        for length in range(0, len(data), len(data) // 20):
            (tmp_path / name).write_bytes(data[:length])
            refused(tmp_path / name)


def test_what_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    (tmp_path / "folder.pth").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.pth")
        for name, said in {"pipe.pth": "named pipe", "zero.safetensors": "a device", "loop.pth": "symbolic links",
                           "folder.pth": "a folder", "socket.pth": "a socket", "no.pth": "no such file",
                           "a\0b.pth": "cannot be the name"}.items():  # fmt: skip
            if "\0" in name:
                with pytest.raises(RecipeError, match=said):
                    init_model(compose(RECIPE), tmp_path / name)
            else:
                assert said in refused(tmp_path / name)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_of_a_terabyte(ending, tmp_path):
    with open(tmp_path / f"w.{ending}", "wb") as file:
        file.truncate(2**40)
    assert "1,099,511,627,776 bytes" in refused(tmp_path / f"w.{ending}")


def test_a_zip_that_grows(tmp_path):
    torch.save(weights(), tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as good,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for name in good.namelist():
            bad.writestr(name, good.read(name))
        bad.writestr("archive/data/99", bytes(2**27))
    assert (tmp_path / "b.pth").stat().st_size < 2**20
    assert "unpacks to more than" in refused(tmp_path / "b.pth")


@pytest.mark.parametrize("verb", ["compose", "heatmap"])
def test_on_the_command_line(verb, tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    torch.save([1], tmp_path / "w.pth")
    result = CliRunner().invoke(
        app, [verb, str(tmp_path / "tiny.yaml"), "--init-from", str(tmp_path / "w.pth")]
    )
    assert result.exit_code == 2 and "AZ606" in result.output and "Traceback" not in result.output
