"""What can still be optimized where a model as a whole cannot be captured: its largest parts."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.passes.calls import canonical_arguments, expand_arguments, signature_of
from graphopt.passes.errors import CaptureError, InputError
from graphopt.passes.program import Program, eager_forward
from graphopt.passes.structure import flatten, map_tensors
from graphopt.passes.verifier import preserved

from .capture import capture


@dataclass(frozen=True)
class Part:
    """A submodule that was captured on its own."""

    name: str
    program: Program


def capture_parts(model: nn.Module, arguments: dict[str, Any]) -> list[Part]:
    """Capture the largest submodules that can be captured, each on its own.

    The model runs once in evaluation mode to see what each submodule is called with; a submodule
    that cannot be captured is searched further down, to single layers at last.

    Args:
        model: A model that cannot be captured as a whole.
        arguments: Canonical arguments of its forward.

    Returns:
        The parts, outermost first; none contains another.

    Raises:
        InputError: if the model does not run on the arguments.
    """
    calls = _recorded_calls(model, arguments)
    parts: list[Part] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = prefix + name
            found = _captured(child, calls.get(full))
            if found is not None:
                parts.append(Part(full, found))
            else:
                visit(child, f"{full}.")

    visit(model, "")
    return parts


def _captured(module: nn.Module, call: dict[str, Any] | None) -> Program | None:
    if call is None or next(module.parameters(), None) is None or not flatten(call)[0]:
        return None
    try:
        return capture(module, call)
    except (CaptureError, InputError):
        return None


def _recorded_calls(model: nn.Module, arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for every submodule, the canonical arguments of its first call."""
    calls: dict[str, dict[str, Any]] = {}
    handles = []
    for name, module in model.named_modules():
        if name:

            def record(
                called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                if name not in calls:
                    found = canonical_arguments(signature_of(called), args, kwargs)
                    calls[name] = map_tensors(found, lambda tensor: tensor.detach().clone())

            handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    args, kwargs = expand_arguments(signature_of(model), arguments)
    try:
        with preserved(model), torch.no_grad():
            model.eval()
            eager_forward(model)(*args, **kwargs)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} does not run on the example inputs: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


class PartBatches(Iterable[dict[str, Any]]):
    """A model's calibration batches as one of its parts sees them."""

    def __init__(self, model: nn.Module, name: str, batches: Iterable[Mapping[str, Any]]) -> None:
        """Hold the model, the part's name and the model's batches."""
        self._model = model
        self._name = name
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Run the model on each batch and yield the part's arguments."""
        for batch in self._batches:
            call = _recorded_calls(self._model, dict(batch)).get(self._name)
            if call is not None:
                yield call

    def __length_hint__(self) -> int:
        """Return the number of batches where it is known."""
        return operator.length_hint(self._batches)
