"""One trace for models that are the same: `torch.export` is most of the time the tests take."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphopt.passes.structure import flatten
from graphopt.tracing import Trace

Tracer = Callable[[nn.Module, dict[str, Any]], Trace]


def shared(trace: Tracer) -> Tracer:
    """Return a tracer that keeps what it traced, for models and calls that cannot differ in it.

    Every `capture` still makes a program of its own from the trace and compares that with the
    eager forward of its own model. What cannot be written, and what fails, is traced every time.
    """
    traces: dict[str, Trace] = {}

    def trace_once(model: nn.Module, arguments: dict[str, Any]) -> Trace:
        key = _content(model, arguments)
        if key is None:
            return trace(model, arguments)
        if key not in traces:
            traces[key] = trace(model, arguments)
        return traces[key]

    return trace_once


def _content(model: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Return a digest of what decides a trace: all that the model holds, and the types it gets."""
    tensors, structure = flatten(arguments)
    types = [(value.dtype, value.device, value.shape) for value in tensors]
    content = io.BytesIO()
    try:
        _Writer(content).dump((model, structure, types, torch.is_grad_enabled()))
    except Exception:  # a model may refuse in any way; a class made inside a test always does
        return None
    return hashlib.sha256(content.getvalue()).hexdigest()


class _Writer(pickle.Pickler):
    """Writes equal bytes for equal models; values of parameters, which decide no trace, are not."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        number = self.numbers.setdefault(id(value), len(self.numbers))  # a tied weight is one
        form = (value.dtype, value.device, value.shape, value.stride(), value.requires_grad)
        constant = not (isinstance(value, nn.Parameter) or value.is_meta)
        return number, str(form), value.detach().numpy().tobytes() if constant else b""
