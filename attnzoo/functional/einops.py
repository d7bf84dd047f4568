"""einops' notation, in a form that torch.fx can follow: `rearrange`, `reduce`, `repeat`, `einsum`.

einops looks at shapes, which symbolic tracing does not know; here a traced call becomes one node of the graph. Eager,
compiled and exported code call einops itself.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import einops
from torch import Tensor, fx


def _followed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, as one node in a graph that is being traced."""

    @wraps(function)
    def call(*args: Any, **sizes: Any) -> Any:
        traced = next((one for one in _flat((*args, *sizes.values())) if isinstance(one, fx.Proxy)), None)
        if traced is None:
            return function(*args, **sizes)
        return traced.tracer.create_proxy("call_function", call, args, sizes)

    call.__module__ = __name__  # where a pickled graph looks for it
    return call


def _flat(args: Iterable[Any]) -> Iterable[Any]:
    for one in args:
        if isinstance(one, list | tuple):
            yield from one
        else:
            yield one


rearrange = _followed(einops.rearrange)
reduce = _followed(einops.reduce)
repeat = _followed(einops.repeat)
einsum = _followed(einops.einsum)
