"""Run any model with float64 arithmetic, one operation at a time.

The distance of an ordinary run from this one is the rounding error of that run. Nothing is copied
as a whole: every operation widens its own operands, so a model that fixes float32 in its code
needs no change and the peak memory grows by one operation, not by the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})


class Float64Arithmetic(TorchFunctionMode):
    """Context in which every torch function computes in float64 and returns float64.

    A function without a float64 kernel runs in float32, and its result is widened.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function on widened operands."""
        operands = (args, kwargs or {})
        try:
            wide_args, wide_kwargs = pytree.tree_map(widen, operands)
            result = func(*wide_args, **wide_kwargs)
        except RuntimeError:
            narrow_args, narrow_kwargs = pytree.tree_map(_narrow, operands)
            result = func(*narrow_args, **narrow_kwargs)
        return pytree.tree_map(widen, result)


def widen(value: Any) -> Any:
    """Return a floating-point tensor or type in float64, and anything else unchanged."""
    if isinstance(value, torch.Tensor) and value.dtype in _NARROW:
        return value.to(torch.float64)
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _narrow(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype is torch.float64:
        return value.to(torch.float32)
    return torch.float32 if value is torch.float64 else value
