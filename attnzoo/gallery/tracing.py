"""What really happens in a component, as a graph: every operation of one forward, then the few that matter."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from attnzoo.core import Tap

Kind = Literal["input", "branch", "learnt", "tap", "operation", "output"]
MOST = 12
"""Boxes of a drawing."""
_MADE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
_MADE |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
"""What makes a tensor of the shape of another, and reads nothing of it."""
_NAMES = {
    "scaled_dot_product_attention": "attention kernel",
    "bmm": "product",
    "matmul": "product",
    "__matmul__": "product",
    "__rmatmul__": "product",
    "baddbmm": "product",
    "einsum": "product",
    "dot": "product",
    "__mul__": "×",
    "__rmul__": "×",
    "mul": "×",
    "__add__": "+",
    "__radd__": "+",
    "add": "+",
    "__sub__": "−",
    "__rsub__": "−",
    "sub": "−",
    "__truediv__": "÷",
    "div": "÷",
    "linear": "product",
    "masked_fill": "fill",
    "cat": "join",
    "stack": "join",
    "avg_pool1d": "local mean",
    "avg_pool2d": "local mean",
    "adaptive_avg_pool2d": "local mean",
    "adaptive_max_pool2d": "local maximum",
    "max_pool2d": "local maximum",
    "amax": "maximum",
    "max": "maximum",
    "maximum": "maximum",
    "amin": "minimum",
    "conv1d": "convolution",
    "conv2d": "convolution",
    "conv3d": "convolution",
    "cumsum": "running sum",
    "logcumsumexp": "running sum",
    "unfold": "windows",
    "topk": "top k",
    "gather": "pick",
    "take_along_dim": "pick",
    "index_select": "pick",
    "rfft": "Fourier transform",
    "fft": "Fourier transform",
    "fft2": "Fourier transform",
    "fftn": "Fourier transform",
    "rfft2": "Fourier transform",
    "ifft": "inverse Fourier transform",
    "irfft": "inverse Fourier transform",
    "irfft2": "inverse Fourier transform",
    "ifft2": "inverse Fourier transform",
    "grid_sample": "sample",
    "interpolate": "resize",
    "solve_triangular": "triangular solve",
    "pinv": "pseudo-inverse",
}
"""Operations in people's words; the others are called as PyTorch calls them."""
_RANKS: Sequence[set[str]] = (
    {"softmax", "log_softmax", "attention kernel", "Fourier transform", "inverse Fourier transform"}
    | {"running sum", "top k", "sort", "argsort", "triangular solve", "pseudo-inverse", "sample"},
    {"product", "convolution", "local mean", "local maximum", "windows"},
    {"sigmoid", "mean", "normalize", "maximum", "tanh", "relu", "elu", "silu", "gelu", "exp", "cos", "sin"}
    | {
        "layer_norm",
        "softplus",
        "resize",
        "cumprod",
        "median",
        "group_norm",
        "batch_norm",
        "log",
        "logsumexp",
    },
    {"×", "÷", "sum", "pick", "norm", "roll", "var", "std", "square"},
    {"+", "−", "join", "fill"},
)
"""Operations that are shown, those that matter most first: the last go first where there are too many boxes."""
_RANK = {name: rank for rank, names in enumerate(_RANKS) for name in names}
_JOINS = {"product", "×", "÷", "+", "−", "join", "maximum", "pick"}
"""Of these only those are shown that bring two flows together."""


@dataclass
class Node:
    """One operation of a forward.

    Args:
        label: What it is called.
        kind: What it is.
        before: Numbers of the nodes whose results it takes.
        shape: Of its result.
        axes: Of its result in the shape letters, where they are known.
        rank: How soon it is left out; 0 last, None is never shown, -1 is always.
        place: From where in the source it was called; loops come from one place.
        module: The part of the component that it belongs to.
        learnt: Names of the parameters that go into it.
    """

    label: str
    kind: Kind
    before: list[int]
    shape: tuple[int, ...] = ()
    axes: str = ""
    rank: int | None = None
    place: tuple = ()
    module: str = ""
    learnt: tuple[str, ...] = ()


@dataclass(frozen=True)
class Box:
    """A box of a drawing.

    Args:
        label: What it is called.
        kind: What it is.
        shape: Of what leaves it, in the shape letters.
        times: How often it happens in one forward.
    """

    label: str
    kind: Kind
    shape: str = ""
    times: int = 1


@dataclass(frozen=True)
class Flow:
    """What goes where in a component.

    Args:
        boxes: In the order in which they happen first.
        arrows: Numbers of two boxes each; one that leads to an earlier box, or to its own, is a loop.
        note: What must be said of it.
    """

    boxes: tuple[Box, ...]
    arrows: frozenset[tuple[int, int]]
    note: str = ""

    def named(self, label: str) -> list[int]:
        """Numbers of the boxes of this name.

        Args:
            label: As drawn, without what stands in brackets.
        """
        return [i for i, box in enumerate(self.boxes) if box.label.partition(" (")[0] == label]

    def leads(self, source: str, target: str) -> bool:
        """Whether an arrow leads from a box of one name to one of another."""
        return any((i, j) in self.arrows for i in self.named(source) for j in self.named(target))


@dataclass
class Recorder(TorchFunctionMode):
    """Notes every call of PyTorch while it is entered, and which results go into which.

    Args:
        root: The component whose parameters and parts are named.
    """

    root: nn.Module
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._of: dict[int, int] = {}  # id of a tensor to the number of its node
        self._kept: list[Tensor] = []  # so that ids stay those of these tensors
        # what no input has a say in, and the parameters that it is made of
        self._fixed: dict[int, tuple[str, ...]] = {
            id(p): (name,) for name, p in self.root.named_parameters(remove_duplicate=False)
        }
        self._whole = 0  # how many parts that are drawn as one box are being called
        self._path: list[str] = []

    def source(self, tensor: Tensor, label: str, axes: str) -> None:
        """What goes into the component.

        Args:
            tensor: It.
            label: Its name.
            axes: In the shape letters.
        """
        self.nodes.append(Node(label, "input", [], tuple(tensor.shape), axes, rank=-1))
        self._is(tensor, len(self.nodes) - 1)

    def result(self, tensor: Tensor, axes: str) -> None:
        """What comes out of it.

        Args:
            tensor: It.
            axes: In the shape letters.
        """
        self.nodes.append(
            Node("output", "output", self._behind([tensor]), tuple(tensor.shape), axes, rank=-1)
        )

    def known(self, tensor: Tensor) -> bool:
        """Whether it was seen how a tensor came about."""
        return id(tensor) in self._of or id(tensor) in self._fixed

    @contextmanager
    def parts(self) -> Iterator[None]:
        """While the block runs, parts of the component that are drawn as one box are noted as such."""
        with ExitStack() as stack:
            for name, part in self.root.named_modules():
                if name:
                    before, after = self._hooks(name, part)
                    stack.callback(part.register_forward_pre_hook(before).remove)
                    stack.callback(part.register_forward_hook(after).remove)
            yield

    def _hooks(self, name: str, part: nn.Module) -> tuple[Callable, Callable]:
        whole = isinstance(part, Tap | Stand) or all(
            type(one).__module__.startswith("torch.nn") for one in part.modules()
        )
        silent = not isinstance(part, Tap) and not any(True for _ in part.parameters())

        def before(_part: nn.Module, _args: tuple) -> None:
            self._path.append(name)
            self._whole += whole

        def after(_part: nn.Module, args: tuple, out: Any) -> Any:
            self._path.pop()
            self._whole -= whole
            if not whole or self._whole:
                return None
            kind: Kind = "tap" if isinstance(part, Tap) else "operation" if silent else "learnt"
            kind = "branch" if isinstance(part, Stand) else kind
            rank = -1 if isinstance(part, Tap | Stand) else 0
            label = name.replace("." if kind != "branch" else "_", " ")
            if kind == "operation":
                label = type(part).__name__.lower()
                label, rank = _NAMES.get(label, label), _RANK.get(_NAMES.get(label, label))  # type: ignore[assignment]
            for tensor in tree_leaves(out):
                if not isinstance(tensor, Tensor):
                    continue
                if any(tensor is one for one in tree_leaves(args)):
                    # what is handed through is a tensor of its own from here on, so that it has a box
                    tensor = out = torch.Tensor.view_as(tensor, tensor)
                axes = part.axes if isinstance(part, Tap) else ""
                self._add(Node(label, kind, self._behind(tree_leaves(args)), tuple(tensor.shape), axes, rank,
                               ("part", name), name.rpartition(".")[0]), [tensor])  # fmt: skip
            return out

        return before, after

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: Sequence = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._whole:
            return result
        name = getattr(func, "__name__", str(func)).removeprefix("fft_")
        inputs = [one for one in tree_leaves((list(args), kwargs)) if isinstance(one, Tensor)]
        if name == "__setitem__":
            self._note(name, inputs, [args[0]])
        elif name == "__get__" and func.__self__.__name__ in ("shape", "device", "dtype", "grad", "_base"):  # type: ignore[attr-defined]
            return result
        else:
            if isinstance(result, Iterator):
                result = list(result)
            outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
            if outputs:
                self._note(name, inputs, outputs)
        return iter(result) if name == "__iter__" else result

    def _note(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        learnt = tuple(dict.fromkeys(p for one in inputs for p in self._fixed.get(id(one), ())))
        conditions = all(one.dtype == torch.bool for one in outputs)  # they choose, and hand nothing on
        before = [] if name in _MADE or conditions else self._behind(inputs)
        if not before:  # made of parameters alone, or of nothing that goes in
            for tensor in outputs:
                self._fixed[id(tensor)] = learnt
                self._kept.append(tensor)
            return
        label = name.strip("_") if not name.startswith("__") and name.endswith("_") else name
        label = _NAMES.get(label, label.strip("_") if label not in _NAMES else label)
        rank = _RANK.get(label)
        if label in _JOINS and len(set(before)) < 2:
            fixed = any(id(one) in self._fixed and one.ndim for one in inputs)
            label, rank = (f"{label} constant", 3) if fixed and label in ("+", "×", "−") else (label, None)
        kind: Kind = "operation"
        if learnt:
            kind, rank = "learnt", 1 if label in ("product", "convolution") else 3
            label = _part(learnt)
        self._add(
            Node(
                label, kind, before, tuple(outputs[0].shape), "", rank, _place(), ".".join(self._path), learnt
            ),
            outputs,
        )

    def _add(self, node: Node, outputs: Iterable[Tensor]) -> None:
        self.nodes.append(node)
        for tensor in outputs:
            self._is(tensor, len(self.nodes) - 1)

    def _is(self, tensor: Tensor, number: int) -> None:
        with torch._C.DisableTorchFunction():
            for one in (tensor, tensor._base):  # what is written into a view is in the whole
                if one is not None and (one is tensor or id(one) in self._of):
                    self._of[id(one)] = number
                    self._kept.append(one)

    def _behind(self, inputs: Iterable[Any]) -> list[int]:
        return [self._of[id(one)] for one in inputs if id(one) in self._of]


class Stand(nn.Module):
    """Stands for a branch of a fusion."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Something of its own, of the same shape."""
        return x * self.weight


def _part(names: Sequence[str]) -> str:
    """What parameters that go in together are called: their part, if they have the same; else the first of them."""
    words = [name.removesuffix(".weight").split(".") for name in names]
    if len(names) == 1:
        return " ".join(words[0])
    shared = [first for first, *others in zip(*words, strict=False) if set(others) <= {first}]
    own = [word for word in shared if not word.isdecimal()]  # of a list each is like the others
    return " ".join(own or words[0])


def _place() -> tuple:
    """From where an operation is called: file and bytecode of every frame below that of the trace."""
    frame, found = sys._getframe(3), []
    while frame is not None and frame.f_code.co_name != "recorded":
        found.append((frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_lasti))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


def boxes_of(nodes: Sequence[Node], letters: dict[int, str], most: int = MOST) -> Flow:
    """The few boxes that matter, and who hands something to whom.

    As long as there are too many, first what a loop repeats becomes one box, then the least operations go, then
    the parts of the component become one box each.

    Args:
        nodes: In the order in which they happened; the output is the last.
        letters: Shape letters by length.
        most: Boxes.
    """
    alive = _alive(nodes)
    plain = max(_RANK.values())
    # least rank shown, whether loops are one box, whether scores are shown, whether parts are one box
    tries = [(plain, False, True, False), *((rank, True, True, False) for rank in range(plain, -1, -1))]
    tries += [
        (0, True, False, False),
        (plain, True, True, True),
        (0, True, True, True),
        (-1, True, False, True),
    ]
    for rank, loops, scores, parts in tries:
        flow = _merged(nodes, alive, letters, rank, loops, scores, parts)
        if len(flow.boxes) <= most:
            return flow
    return (
        replace(flow, note="Only a part of what happens is drawn.") if len(flow.boxes) <= 2 * most else flow
    )


def _alive(nodes: Sequence[Node]) -> set[int]:
    """What the output depends on, and what goes in."""
    waiting = [len(nodes) - 1, *(i for i, node in enumerate(nodes) if node.kind in ("input", "branch"))]
    alive: set[int] = set()
    while waiting:
        number = waiting.pop()
        alive.add(number)
        waiting += [i for i in nodes[number].before if i not in alive]
    return alive


def _merged(
    nodes: Sequence[Node],
    alive: set[int],
    letters: dict[int, str],
    most: int,
    loops: bool,
    scores: bool,
    parts: bool,
) -> Flow:
    """Boxes and arrows with as much left out as is said."""

    def group(i: int) -> tuple | None:
        """Nodes of one box have the same; None for what is not shown."""
        node = nodes[i]
        if node.kind in ("input", "output"):
            return (i,)
        if parts and node.module and node.kind != "tap":
            return ("module", node.module.partition(".")[0])
        if parts and node.kind == "learnt" and node.place[:1] == ("part",):
            return ("module", node.place[1].partition(".")[0])
        hidden = node.rank is None or node.rank > most
        if hidden or (node.kind == "tap" and not scores and node.label.startswith("scores")):
            return None
        if node.place[:1] == ("part",):  # one that is called again; of a list of parts, each like the others
            return ("part", re.sub(r"\.\d+(?=\.|$)", "", node.place[1]) if loops else node.place[1])
        return (node.label, node.place) if loops else (i,)

    behind: list[frozenset[tuple]] = []  # of each node: the boxes that its result comes from
    members: dict[tuple, list[int]] = {}
    arrows: set[tuple[tuple, tuple]] = set()
    for i, node in enumerate(nodes):
        comes = frozenset().union(*(behind[j] for j in node.before))
        own = group(i) if i in alive else None
        if own is not None:
            members.setdefault(own, []).append(i)
            arrows |= {(one, own) for one in comes if one != own or own[0] != "module"}
        behind.append(comes if own is None else frozenset({own}))
    number = {key: at for at, key in enumerate(members)}
    boxes = []
    for key, those in members.items():
        first, last = nodes[those[0]], nodes[those[-1]]
        label = key[1].replace(".", " ") if key[0] == "module" else first.label
        if key[0] == "part" and first.kind == "learnt" and len({nodes[i].place for i in those}) > 1:
            label = key[1].replace(".", " ")
        kind: Kind = (
            "learnt" if key[0] == "module" and any(nodes[i].kind == "learnt" for i in those) else first.kind
        )
        times = 1 if key[0] == "module" else len(those)
        boxes.append(Box(label, kind, last.axes or spelled_out(last.shape, letters), times))
    return Flow(tuple(boxes), frozenset((number[a], number[b]) for a, b in arrows))


def spelled_out(shape: Sequence[int], letters: dict[int, str]) -> str:
    """A shape in the shape letters; what has none stands as a number.

    Args:
        shape: Lengths.
        letters: By length. What comes twice is the next of its kind: n m, y x.
    """
    found: list[str] = []
    for size in shape:
        letter = letters.get(size, str(size))
        found.append({"n": "m", "y": "x"}.get(letter, letter) if letter in found else letter)
    return " ".join(found)
