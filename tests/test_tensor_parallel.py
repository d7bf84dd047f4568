"""Heads over devices: two and four processes give what one gives, and so do the gradients and the steps."""

import copy
import os
import re
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from timm.layers import Mlp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import attnzoo
from attnzoo import parallel
from attnzoo.core import FusedHeads, Head, KVCache, Law, Layout, Mask, MultiHead, Site, watch
from attnzoo.errors import ZooError
from attnzoo.hosts.rollout import Rolling
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.parallel import gathered, tensor_parallel
from attnzoo.zoo import load_zoo

ROOT = Path(__file__).parent.parent
EXACT = 1e-10
"""Of float64, relative to the largest number."""


# Processes


def spread(ranks: int, *jobs: Callable[[], object]) -> None:
    """Run functions of this file in several processes that form a group; fail with what the first failing one says."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    code += (
        f"import test_tensor_parallel as t; t.fork({ranks}, {', '.join(f't.{job.__name__}' for job in jobs)})"
    )
    done = processes.run("-c", code, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def fork(ranks: int, *jobs: Callable[[], object]) -> None:
    """Run them in forks of this process, which has had no backward pass yet."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                os._exit(_rank(jobs, rank, ranks, f"file://{folder}/meet"))
            children.append(child)
        failed = [os.waitpid(child, 0)[1] != 0 for child in children]
        sys.exit(any(failed))


def _rank(jobs: Sequence[Callable[[], object]], rank: int, ranks: int, meet: str) -> int:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
        for job in jobs:
            torch.manual_seed(0)
            job()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def line() -> DeviceMesh:
    """All processes in a line."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


# Comparing


def off(found: Tensor, due: Tensor | None) -> float:
    """The largest difference, relative to the largest number; no gradient is one of zeros."""
    due = torch.zeros_like(found) if due is None else due
    assert found.shape == due.shape
    return float((found - due).detach().abs().max() / (1 + due.detach().abs().max()))


def jittered(module: nn.Module) -> nn.Module:
    """In float64, with parameters that hide nothing."""
    module.double()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def gradients(model: nn.Module, gather=gathered) -> dict[str, Tensor]:
    """Those of the whole model by name; zeros where there is none."""
    held = copy.deepcopy(model)
    for own, parameter in zip(held.parameters(), model.parameters(), strict=True):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert gradient.placements == parameter.placements
        own.data.copy_(gradient)
    return {name: t for name, t in gather(held).items() if name in dict(model.named_parameters())}


def compare(one: nn.Module, many: nn.Module, *inputs: Tensor, tolerance: float = EXACT, **call) -> None:
    """Fail unless outputs, gradients of inputs and of all parameters agree."""
    bad = {name: value for name, value in apart(one, many, *inputs, **call).items() if not value <= tolerance}
    assert not bad, bad


def apart(one: nn.Module, many: nn.Module, *inputs: Tensor, gather=gathered, **call) -> dict[str, float]:
    """How far they are apart; every process goes through all of it, whatever it finds, for the others wait for it."""
    ours, theirs = ([x.clone().requires_grad_(x.is_floating_point()) for x in inputs] for _ in range(2))
    due, found = one(*ours, **call), many(*theirs, **call)
    far = {"output": off(found, due)}
    weight = torch.randn_like(due)
    one.zero_grad(), many.zero_grad()
    (due * weight).sum().backward(), (found * weight).sum().backward()
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        if x.requires_grad:
            far[f"input {i}"] = off(torch.zeros_like(y) if y.grad is None else y.grad, x.grad)
    names = dict(one.named_parameters())
    assert names.keys() == dict(many.named_parameters()).keys()
    return far | {name: off(gradient, names[name].grad) for name, gradient in gradients(many, gather).items()}


def halves(build: Callable[[], nn.Module], **options) -> tuple[nn.Module, nn.Module]:
    """A model and a divided copy of it."""
    one = jittered(build()).eval()
    return one, tensor_parallel(copy.deepcopy(one), line(), **options)


# Every head


def heads(**fields) -> Iterator[tuple[str, Site, Callable[[Site], Head]]]:
    """Built-in heads that claim the law, each with options under which it has all its parameters."""
    options = {
        "soft": [{}, {"variant": "bahdanau"}, {"variant": "gated"}, {"variant": "cls_query"}],
        "memory": [{"slots": 3}, {"slots": 3, "start": "identity"}],
        "hebbian": [{"learn_rate": True}, {"rule": "delta"}, {"rule": "oja"}, {"features": "elu"}],
        "linformer": [{"rank": 4}, {"rank": 8, "share": "kv"}],  # as many slots as heads, too
        "longformer": [{"window": 2}, {"window": 1, "special": "shared"}],
        "neighborhood": [{"window": 3}],
        "region": [{}, {"scale": "heads"}],
    }
    for name, entry in load_zoo().mechanisms.items():
        if entry.plugin == "attnzoo" and issubclass(entry.value, Head):
            for chosen in options.get(name, [{}]):
                if Law.HEADS_APART in entry.value.card_for(**chosen).laws:
                    site = Site("x", 32, 8, Layout((2, 3), 1), **fields)
                    yield f"{name} {chosen or ''}", site, partial(entry.value, **chosen)


def fusions() -> Iterator[tuple[str, Site, Callable[[Site], Head]]]:
    """Fusions of two heads inside the heads, with parameters of every kind; one fusion in another."""
    zoo = load_zoo()
    found = {name: entry.value for name, entry in zoo.mechanisms.items()}
    branches = [found["softmax"], partial(found["memory"], slots=2)]
    site = Site("x", 32, 8, Layout((2, 3), 1))
    for name, entry in zoo.fusions.items():
        card = entry.value.card
        if entry.plugin == "attnzoo" and name != "head_split" and card.inside_heads and not card.auxiliary:
            yield name, site, partial(FusedHeads, fusion=entry.value, branches=branches)
    inner = partial(
        FusedHeads, fusion=zoo.fusions["gated"].value, branches=[found["soft"], found["linformer"]]
    )
    yield "nested", site, partial(FusedHeads, fusion=zoo.fusions["concat"].value, branches=[*branches, inner])


def masks(card, m: int) -> Iterator[Mask]:
    """One of each kind that the card claims, pairs that differ by head, and all together."""
    keys, pairs = torch.rand(2, m) < 0.7, torch.rand(2, 8, 7, m) < 0.7
    kinds = {"keys": keys, "pairs": pairs, "causal": True}
    claimed = {kind: kinds[kind] for kind in sorted(card.masks)}
    yield Mask()
    yield from (Mask(**{kind: part}) for kind, part in claimed.items())
    if len(claimed) > 1:
        yield Mask(**claimed)


def alike(name: str, site: Site, build: Callable[[Site], Head], every_mask: bool) -> None:
    """A head under masks of all kinds, in turn or only none and all together."""
    one, many = halves(lambda: MultiHead(site, build(site)))
    given = {"regions": torch.randint(0, 3, (2, 2, 3))} if one.card.given else {}
    x, made = torch.randn(2, 7, 32, dtype=torch.float64), list(masks(one.card, 7))
    for mask in made if every_mask else {0: made[0], len(made): made[-1]}.values():
        try:
            compare(one, many, x, mask=mask, layout=site.layout, given=given)
        except AssertionError as error:
            raise AssertionError(f"{name}, masks: {mask.kinds}") from error


def each_head() -> None:
    """Every head with one setting of its options, and a few fusions."""
    firsts = {name.split()[0]: (name, site, build) for name, site, build in [*heads()][::-1]}
    for name, site, build in (*firsts.values(), *[*fusions()][-3:]):
        alike(name, site, build, every_mask=False)


def every_head() -> None:
    """Every head with every setting, and every fusion, under every mask."""
    for name, site, build in (*heads(), *fusions(), *heads(qk_norm=True, qkv_bias=False, proj_bias=False)):
        alike(name, site, build, every_mask=True)


def test_the_heads_are_those_that_claim_it():
    names = {name.split()[0] for name, _, _ in heads()}
    assert names == {
        "alibi", "cosformer", "cosine", "efficient", "entmax", "nystrom", "sigmoid", "softmax_one", "top_k", "window",
        "elu_linear", "expressive", "hebbian", "linformer", "longformer", "memory", "neighborhood", "performer", "region",
        "soft", "softmax", "twicing",
    }  # fmt: skip


# Contexts, caches, dropout, other tensors


def contexts() -> None:
    """A context of another width and length; the newest tokens with a cache, masked by head."""
    for _name, site, build in heads(context_dim=20, context_layout=Layout((5,))):
        if not build(site).card.context:
            continue
        one, many = halves(lambda site=site, build=build: MultiHead(site, build(site)))
        x, context = torch.randn(2, 7, 32, dtype=torch.float64), torch.randn(2, 5, 20, dtype=torch.float64)
        for mask in masks(one.card, 5):
            compare(one, many, x, context, mask=mask, layout=site.layout)
    for name in ("softmax", "memory", "elu_linear", "twicing"):
        site = Site("x", 32, 8, Layout((7,)), rotary=True)
        one, many = halves(
            lambda site=site, name=name: MultiHead(site, load_zoo().mechanisms[name].value(site))
        )
        x, (a, b) = torch.randn(2, 7, 32, dtype=torch.float64), (KVCache(), KVCache())
        with torch.no_grad():
            for i in range(0, 7, 2):
                pairs = torch.rand(2, 8, min(7, i + 2) - i, min(7, i + 2)) < 0.8
                mask = Mask(pairs=pairs if name in ("softmax", "memory") else None, causal=True)
                where = {"mask": mask, "layout": Layout((min(7, i + 2),))}
                due, found = one.step(x[:, i : i + 2], a, **where), many.step(x[:, i : i + 2], b, **where)
                assert off(found, due) <= EXACT


class Between(nn.Sequential):
    """A norm before some attentions, called as an attention."""

    def __init__(self, *attentions: MultiHead):
        super().__init__(nn.LayerNorm(attentions[0].dim), *attentions)

    def forward(self, x, **call):
        for part in self:
            x = part(x, **call) if isinstance(part, MultiHead) else part(x)
        return x


class Both(nn.Sequential):
    """An attention and an MLP, called as an attention."""

    def forward(self, x, **call):
        return self[1](self[0](x, **call))


def chance() -> None:
    """Devices drop weights and hidden channels each in its own way, and what is added up all in the same."""
    site, dropped, dropout = Site("x", 32, 8, Layout((64,)), attn_drop=0.5, proj_drop=0.5), [], F.dropout
    attention = MultiHead(site, load_zoo().mechanisms["softmax"].value(site))
    model = tensor_parallel(Both(attention, Mlp(32, 32 * dist.get_world_size(), drop=0.5)).double(), line())
    F.dropout = lambda x, p, *rest: dropped.append(dropout(torch.ones_like(x), p, *rest)) or dropped[-1] * x
    try:
        with watch(model, "weights", lambda *_: None):
            model(torch.randn(2, 64, 32, dtype=torch.float64), layout=site.layout)
    finally:
        F.dropout = dropout
    for mask, alike in zip(
        dropped, (False, True, False, True), strict=True
    ):  # weights, output, hidden, output
        masks = everybody(mask)
        assert 0.45 < float((mask == 0).double().mean()) < 0.55
        assert all(torch.equal(masks[0], other) == alike for other in masks[1:])
    states = everybody(torch.get_rng_state())
    assert all(torch.equal(states[0], other) for other in states)
    drops = HAM.replace("depth: 2", "depth: 2, attn_drop_rate: 0.5, proj_drop_rate: 0.5")
    model = tensor_parallel(attnzoo.compose(drops).double(), line())
    images, found = torch.randn(2, 3, 8, 8, dtype=torch.float64), []
    for again in (False, True):  # what is computed again drops the same
        torch.manual_seed(3)
        model.zero_grad()
        model.set_grad_checkpointing(again)
        model(images).square().sum().backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def everybody(t: Tensor) -> list[Tensor]:
    """That of each process."""
    all_ = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(all_, t.detach().contiguous())
    return all_


class Offsets(Head):
    """Softmax attention with a buffer for each head, a frozen parameter, and one that all heads share."""

    card = Softmax.card

    def __init__(self, site: Site):
        super().__init__(site)
        self.register_buffer("offset", torch.randn(site.heads, 1, 1))
        self.register_buffer("common", torch.randn(site.head_dim))
        self.turn = nn.Parameter(torch.eye(site.head_dim))
        self.scale = nn.Parameter(torch.ones(site.heads), requires_grad=False)

    def shared(self):
        return {"turn", "common"}

    def attend(self, q, k, v, *, mask, layout):
        scores = self.scores(q @ self.turn @ k.mT * self.scale[:, None, None])
        return self.weights(scores.softmax(-1)) @ (v + self.common) + self.offset


def tensors() -> None:
    """Weights come from the first process, are cut, stay frozen, and come back bit for bit, into a file's names."""
    site, size = Site("x", 32, 8, Layout((7,))), dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    one = jittered(MultiHead(site, Offsets(site))).eval()
    many = tensor_parallel(copy.deepcopy(one), line())
    for t in (*one.parameters(), *one.buffers()):
        dist.broadcast(t.data, 0)  # what is compared with; `many` has taken them by itself
    back = gathered(many)
    assert list(back) == list(one.state_dict())
    assert all(torch.equal(back[name], t) for name, t in one.state_dict().items())
    assert all(isinstance(t, DTensor) for t in many.parameters())
    held = {name: tuple(t.to_local().shape) for name, t in many.named_parameters()}
    assert held["qkv.weight"] == (96 // size, 32) and held["qkv.bias"] == (96 // size,)
    assert held["proj.weight"] == (32, 32 // size) and held["proj.bias"] == (32,)
    assert held["inner.scale"] == (8 // size,) and held["inner.turn"] == (4, 4)
    assert many.inner.offset.shape == (8 // size, 1, 1) and many.inner.common.shape == (4,)
    assert {n: p.requires_grad for n, p in many.named_parameters()} == {
        n: p.requires_grad for n, p in one.named_parameters()
    }
    torch.manual_seed(1)
    compare(one, many, torch.randn(2, 7, 32, dtype=torch.float64), layout=site.layout)
    other = jittered(MultiHead(site, Offsets(site)))
    other.load_state_dict(back)
    compare(
        one,
        tensor_parallel(other.eval(), line()),
        torch.randn(2, 7, 32, dtype=torch.float64),
        layout=site.layout,
    )
    compare(one, copy.deepcopy(many), torch.randn(2, 7, 32, dtype=torch.float64), layout=site.layout)
    first, second, third = (MultiHead(site, Offsets(site)) for _ in range(3))
    second.inner, second.proj, third.qkv = first.inner, first.proj, first.qkv
    one, many = halves(lambda: Between(*(first, second, third, first)))
    compare(one, many, torch.randn(2, 7, 32, dtype=torch.float64), layout=site.layout)
    assert all(torch.equal(t, one.state_dict()[name]) for name, t in gathered(many).items())
    many = other
    seen: dict[str, Tensor] = {}
    with watch(many, "weights", seen.__setitem__):
        many(torch.randn(2, 7, 32, dtype=torch.float64), layout=site.layout)
    assert seen["inner.weights"].shape == (2, 8 // size, 7, 7)


# Whole models


VIT = """
recipe: 1
host:
  kind: vit
  base: vit_tiny_patch16_224
  model: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 4, num_classes: 4}
attention: %s
"""
HAM = VIT % "{fuse: hadamard, of: [softmax, {use: soft, with: {variant: pooled}}]}"


def reads(more: str) -> None:
    """An encoder and a decoder."""
    sizes = "kind: seq2seq, dim: 16, mlp_dim: 24, layers: 2, vocab: 13, max_length: 12, dropout: 0"
    text = f"recipe: 1\nheads: 4\nattention: softmax\nhost: {{{sizes}, {more}"
    source, target = torch.randint(4, 13, (3, 7)), torch.randint(4, 13, (3, 5))
    source[1, 4:] = 0
    compare(*halves(partial(attnzoo.compose, text)), source, target)


def models() -> None:
    """A ViT, and an encoder and decoder that have one matrix in three places."""
    one, many = halves(partial(attnzoo.compose, HAM))
    many.set_grad_checkpointing()
    compare(one, many, torch.randn(4, 3, 8, 8, dtype=torch.float64))
    reads("tie: all, positions: rotary}")


def other_models() -> None:
    """What is whole on every device beside what is not; another skip between layers; float32."""
    for text in ("{fuse: head_split, of: [linformer, squeeze_excite]}", "talking_heads"):
        one, many = halves(partial(attnzoo.compose, VIT % text), rest="replicate")
        compare(one, many, torch.randn(4, 3, 8, 8, dtype=torch.float64))
    reads("positions: none}\nskip: probs_pairmean")
    one = attnzoo.compose(HAM).eval()
    compare(one, tensor_parallel(copy.deepcopy(one), line()), torch.randn(4, 3, 8, 8), tolerance=1e-6)


def refusals() -> None:
    """What cannot be divided is refused before anything is changed, all of it at once; on request it stays whole."""
    zoo, mesh = load_zoo(), line()
    layout = Layout((2, 3), 1)
    found = {name: entry.value for name, entry in zoo.mechanisms.items()}

    def multi(head, **fields) -> MultiHead:
        site = Site("x", 24, fields.pop("heads", 4), layout, **fields)
        return MultiHead(site, head(site))

    class Teaches(Offsets):
        card = replace(Offsets.card, auxiliary="the mean of all scores")

    fused = partial(FusedHeads, fusion=zoo.fusions["add"].value, branches=[found["softmax"], Teaches])

    split = partial(FusedHeads, fusion=zoo.fusions["head_split"].value, branches=[found["softmax"]] * 2)
    skipping = multi(found["softmax"])
    skipping.skip = nn.LayerNorm(24)
    rolling = multi(found["softmax"])
    rolling.inner.weights = Rolling(True, 0.0)
    wrapped = multi(found["softmax"])
    wrapped.qkv = type("Wrapped", (nn.Linear,), {})(24, 72)
    named = {
        name: found[name](Site("x", 24, 4, layout)) for name in ("mixture_of_heads", "agent", "grouped_query")
    }
    for model, said in (
        (multi(found["talking_heads"]), "`talking_heads` does not claim the law `heads_apart`"),
        (multi(split), "`head_split` does not claim the law `heads_apart`"),
        (multi(Teaches), "adds to the loss what all heads show"),
        (multi(fused), "adds to the loss what all heads show"),
        (multi(found["softmax"], heads=3), "3 heads are no multiple of 2"),
        (multi(found["softmax"], scale_norm=True), "`scale_norm` is that of all heads"),
        (skipping, "the skip between layers has a norm of all heads"),
        (rolling, "the rollout is a mean over all heads"),
        (wrapped, "its projections are no plain `nn.Linear`"),
        *((part, f"`{name}` has projections of its own") for name, part in named.items()),
        (Mlp(4, 7), "7 hidden channels are no multiple of 2"),
        (Mlp(4, 8, norm_layer=nn.LayerNorm), "its norm is that of all hidden channels"),
    ):
        whole = nn.ModuleDict({"good": multi(found["softmax"]), "bad": model, "worse": copy.deepcopy(model)})
        before = copy.deepcopy(whole.state_dict())
        with pytest.raises(ZooError) as caught:
            tensor_parallel(whole, mesh)
        assert [fault.code for fault in caught.value.diagnostics] == ["AZ412"] * 2
        for name, fault in zip(("bad", "worse"), caught.value.diagnostics, strict=True):
            assert (
                fault.message.startswith(f"`{name}` cannot be divided among 2 devices: ")
                and said in fault.message
            )
            assert "rest='replicate'" in fault.help
        assert all(torch.equal(t, before[name]) for name, t in whole.state_dict().items())
        assert not any(isinstance(t, DTensor) for t in whole.parameters())
        tensor_parallel(whole, mesh, rest="replicate")
        placed = {name: t.placements[0].is_replicate() for name, t in whole.named_parameters()}
        assert all(placed[name] for name in placed if not name.startswith("good."))
        assert not placed["good.qkv.weight"]
        back = gathered(whole)
        dist.broadcast(before["good.qkv.weight"], 0)
        assert torch.equal(back["good.qkv.weight"], before["good.qkv.weight"])
        for rest in ("refuse", "replicate"):
            with pytest.raises(ZooError, match="AZ412.*divided already"):
                tensor_parallel(whole, mesh, rest=rest)
    with pytest.raises(ZooError, match="AZ412.*no `MultiHead`"):
        tensor_parallel(nn.Sequential(nn.Linear(4, 4)), mesh)
    with pytest.raises(ZooError, match="AZ412.*this mesh has 2"):
        tensor_parallel(multi(found["softmax"]), init_device_mesh("cpu", (1, 2)))


def by_hand() -> None:
    step_for_step(shard=False)


def step_for_step(shard: bool = True) -> None:
    """Data and tensor parallel together, 2 x 2, five steps of AdamW with clipped gradients: as one process on all data."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    one = jittered(attnzoo.compose(HAM))
    ours = copy.deepcopy(one)
    many = tensor_parallel(copy.deepcopy(one), mesh["tensor"])
    if shard:
        fully_shard(many, mesh=mesh["data"])
    steps = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (ours, many)]
    own = slice(4 * mesh["data"].get_local_rank(), 4 * mesh["data"].get_local_rank() + 4)
    losses = []
    for _ in range(5):
        images, labels = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.randint(4, (8,))
        due = F.cross_entropy(ours(images), labels)
        found = F.cross_entropy(many(images[own]), labels[own])
        due.backward(), found.backward()
        for parameter in () if shard else many.parameters():
            gradient = parameter.grad.to_local()
            dist.all_reduce(gradient, group=mesh.get_group("data"))
            gradient /= 2
        mean = found.detach().clone()
        dist.all_reduce(mean, group=mesh.get_group("data"))
        norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.5) for model in (ours, many)]
        assert abs(float(norms[0]) - float(norms[1].full_tensor())) < 1e-9 < float(norms[0]) - 0.5
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
        losses.append((due.item(), mean.item() / 2))
    assert all(abs(a - b) < 1e-8 for a, b in losses), losses
    assert losses[0][0] != losses[-1][0]
    back = gathered(many)
    assert max(off(back[name], t) for name, t in ours.state_dict().items()) < 1e-6


# Faults that must be seen


class Unsummed(parallel.ColwiseParallel):
    """By columns, without the sum of the inputs' gradients."""

    def _apply(self, module, device_mesh):
        module = super()._apply(module, device_mesh)
        module._forward_pre_hooks.clear(), module._forward_hooks.clear()
        module.forward = lambda x: F.linear(x, module.weight.to_local(), module.bias.to_local())
        return module


class EachItsBias(parallel.RowwiseParallel):
    """By rows, with a bias for each device."""

    def _apply(self, module, device_mesh):
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(lambda m, x, out: out + (device_mesh.size() - 1) * m.bias.to_local())
        return module


MUTANTS: dict[str, tuple[str, str, set[str]]] = {
    "none": ("", "", set()),
    "bias on every device": (
        "part.proj, mesh, RowwiseParallel()",
        "part.proj, mesh, EachItsBias()",
        {"output"},
    ),
    "input's gradient": (
        "linear, mesh, ColwiseParallel()",
        "linear, mesh, Unsummed()",
        {"input 0", "0.weight"},
    ),
    "contiguous rows": (
        "tensor.data = tensor.data.unflatten(0, (kinds, -1, d)).transpose(0, 1).flatten(0, 2)",
        "pass",
        {"output"},
    ),
    "rows not put back": (
        "return out.unflatten(-1, (-1, kinds, d)).transpose(-3, -2).flatten(-3)",
        "return out",
        {"output"},
    ),
    "shared parameters": (
        "if not summed:",
        "if True:",
        {"1.inner.fusion.merge_proj.weight", "1.q_norm.weight"},
    ),
    "norms of q and k": ("in (part.q_norm, part.k_norm):", "in ():", {"1.q_norm.weight", "1.k_norm.bias"}),
    "pairs of other heads": (
        "self.mesh.get_local_rank()]\n            mask",
        "0]\n            mask",
        {"output"},
    ),
    "the rest": ("set(), summed=False", "set(), summed=True", {"0.weight", "0.bias"}),
}
"""A piece of the source, what takes its place, and some of what must then be another; `none` changes nothing."""


def mutants() -> None:
    """Each is seen in what it spoils."""
    source, zoo = Path(parallel.__file__).read_text(encoding="utf-8"), load_zoo()
    site = Site("x", 32, 8, Layout((7,)), qk_norm=True)
    branches = [partial(zoo.mechanisms["memory"].value, slots=2), zoo.mechanisms["softmax"].value]
    one = jittered(Between(MultiHead(site, FusedHeads(site, zoo.fusions["concat"].value, branches))))
    x, mask = torch.randn(2, 7, 32, dtype=torch.float64), Mask(pairs=torch.rand(2, 8, 7, 7) < 0.7)
    for name, (old, new, spoilt) in MUTANTS.items():
        assert not old or source.count(old) == 1, name
        mutant = {"__name__": "mutant", "Unsummed": Unsummed, "EachItsBias": EachItsBias}
        exec(compile(source.replace(old, new) if old else source, "mutant", "exec"), mutant)
        many = mutant["tensor_parallel"](copy.deepcopy(one), line())
        far = apart(one, many, x, gather=mutant["gathered"], mask=mask, layout=site.layout)
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, {key for key, value in far.items() if not value <= EXACT})
        assert spoilt <= set().union(*everywhere), (name, everywhere)
        assert bool(spoilt) == any(everywhere), (name, everywhere)


def script() -> None:
    """That of docs/training.md, as torchrun starts it."""
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = (
        text for text in re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S) if "tensor_parallel" in text
    )
    rank, ranks, port = dist.get_rank(), dist.get_world_size(), torch.zeros((), dtype=torch.long)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port.fill_(free.getsockname()[1])
    dist.broadcast(port, 0)
    dist.destroy_process_group()
    place = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port.item()}
    os.environ |= {name: str(value) for name, value in place.items()}
    names: dict = {}
    exec(compile(code, "guide", "exec"), names)
    assert all(isinstance(t, DTensor) for t in names["model"].parameters())
    whole = attnzoo.compose("ham_b")
    assert names["state"].keys() == whole.state_dict().keys()
    whole.load_state_dict(names["state"])
    assert torch.isfinite(names["loss"])


# Launches


def test_on_two_devices():
    spread(2, each_head, refusals, mutants)


@pytest.mark.slow
def test_on_four_devices():
    spread(4, each_head, step_for_step)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_every_head(devices):
    spread(devices, every_head)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_all_else(devices):
    spread(devices, contexts, chance, tensors, models, other_models)


@pytest.mark.slow
def test_data_parallel_by_hand():
    spread(4, by_hand)


@pytest.mark.slow
def test_the_script_of_the_guide_runs():
    spread(4, script)


if __name__ == "__main__":
    fork(int(sys.argv[1]), *(globals()[name] for name in sys.argv[2:]))
