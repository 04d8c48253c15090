"""Python values as JSON and back, for what cannot be written as such: tuples, types, functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from graphopt.passes.errors import CheckpointError

_FUNCTIONS: dict[str, Any] = {
    name: getattr(functional, name)
    for name in ("relu", "gelu", "silu", "elu", "selu", "mish", "leaky_relu", "tanh", "sigmoid")
}


def encode(value: Any, tensor: Callable[[torch.Tensor], Any] | None = None) -> Any:
    """Return a JSON value; containers that JSON lacks become an object with one `$` key.

    Args:
        value: Numbers, texts, None, tuples, lists, dicts with text keys, dtypes, devices,
            slices, activation functions of torch, and, with `tensor`, tensors.
        tensor: Makes the JSON value of a tensor.

    Raises:
        CheckpointError: for anything else.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, torch.Tensor) and tensor is not None:
        return {"$tensor": tensor(value)}
    if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
        return {"$tuple": [encode(item, tensor) for item in value]}
    if type(value) is list:
        return [encode(item, tensor) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"$dict": {key: encode(item, tensor) for key, item in value.items()}}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    for name, function in _FUNCTIONS.items():
        if value is function or value is getattr(torch, name, None):
            return {"$function": name}
    raise CheckpointError(f"a {type(value).__name__} cannot be written as plain data")


def decode(data: Any, tensor: Callable[[Any], Any] | None = None) -> Any:
    """Return the value that `encode` was given; nothing in `data` is executed.

    Raises:
        CheckpointError: if `data` is not what `encode` makes.
    """
    if isinstance(data, list):
        return [decode(item, tensor) for item in data]
    if not isinstance(data, dict):
        return data
    kind, item = next(iter(data.items())) if len(data) == 1 else ("", None)
    if kind == "$float" and item in ("inf", "-inf", "nan"):
        return float(item)
    if kind == "$tensor" and tensor is not None:
        return tensor(item)
    if kind == "$tuple" and isinstance(item, list):
        return tuple(decode(part, tensor) for part in item)
    if kind == "$dict" and isinstance(item, dict):
        return {key: decode(part, tensor) for key, part in item.items()}
    if kind == "$dtype":
        return named_dtype(item)
    if kind == "$function" and item in _FUNCTIONS:
        return _FUNCTIONS[item]
    raise CheckpointError(f"{str(data)[:60]!r} is not a value that graphopt writes")


def named_dtype(name: Any) -> torch.dtype:
    """Return a dtype by its name in torch.

    Raises:
        CheckpointError: if there is none.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{name!r} is not a dtype")
    return found
