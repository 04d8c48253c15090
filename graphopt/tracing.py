"""One call of a model as a flat ATen graph, through `torch.export`.

The call is traced through a small wrapper whose inputs and outputs are flat tensors, so that
arguments and results of any structure work (`graphopt.passes.structure`).
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.passes.calls import expand_arguments, signature_of
from graphopt.passes.errors import CaptureError
from graphopt.passes.structure import Structure, flatten, tensor_names

_WRAPPED = "model"


@dataclass
class Trace:
    """What one trace gave.

    Attributes:
        exported: The flat ATen program; parameter names start with the wrapper's prefix.
        outputs: Structure of the result.
        names: One name per input tensor.
        leaf_calls: For each leaf module, in call order: was it called with exactly one tensor
            and did it return exactly one?
        static: Dimensions that were tried dynamic and are not, one sentence each.
        ranges: Limits that the model's own code puts on a dynamic size, by symbol.
    """

    exported: ExportedProgram
    outputs: Structure
    names: list[str]
    leaf_calls: dict[str, list[bool]]
    static: list[str] = field(default_factory=list)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)

    @staticmethod
    def original_name(name: str) -> str:
        """Return a name inside the wrapper as a name in the model."""
        return name.removeprefix(_WRAPPED).removeprefix(".")


class _FlatCall(nn.Module):
    """The model's call on flat tensors; appends the structure of each result to a list.

    The list is not an attribute: the exporter resets what a forward assigns to attributes.
    """

    def __init__(
        self,
        model: nn.Module,
        signature: inspect.Signature,
        inputs: Structure,
        outputs: list[Structure],
    ) -> None:
        super().__init__()
        self.add_module(_WRAPPED, model)

        def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args, kwargs = expand_arguments(signature, inputs.rebuild(tensors))
            result, structure = flatten(model(*args, **kwargs))
            outputs.append(structure)
            return tuple(result)

        self._call = call

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._call(*tensors)


def trace(model: nn.Module, arguments: dict[str, Any]) -> Trace:
    """Trace a call with every batch-like and sequence-like dimension dynamic if it can be.

    Dimensions are tried together; when that fails, each group (the batch, each sequence length)
    is left out in turn, and last all of them. Each attempt first takes the model's eager paths,
    then those it reserves for export.

    Args:
        model: The model, in the mode (train or eval) to trace.
        arguments: Canonical arguments of the call.

    Raises:
        CaptureError: if no combination can be exported, with the exporter's reason.
    """
    tensors, inputs = flatten(arguments)
    names = tensor_names(inputs)
    groups = dynamic_groups(tensors)
    attempts = [set(groups)]
    if len(groups) > 1:
        attempts.extend(set(groups) - {group} for group in groups)
    if groups:
        attempts.append(set())
    reason: Exception | None = None
    contexts: tuple[Callable[[], AbstractContextManager[None]], ...] = (_as_in_eager, nullcontext)
    for attempt, paths in product(attempts, contexts):
        outputs: list[Structure] = []
        wrapper = _FlatCall(model, signature_of(model), inputs, outputs)
        shapes = _dynamic_shapes(tensors, {group: groups[group] for group in attempt})
        try:
            # A mode of the caller's, such as one that counts operations, must not see the tracer's.
            with (
                _quiet(),
                paths(),
                _disable_current_modes(),
                _recorded_calls(model) as leaf_calls,
            ):
                exported = torch.export.export(
                    wrapper, tuple(tensors), dynamic_shapes=(shapes,), strict=False
                )
        except Exception as error:  # the exporter raises any type of error
            reason = reason or error
            continue
        result = Trace(exported, outputs[-1], names, leaf_calls)
        result.static = _static_dimensions(exported, names, tensors, groups)
        result.ranges = _ranges(exported)
        return result
    text = str(reason).strip().splitlines()[0] if str(reason).strip() else repr(reason)
    raise CaptureError(
        f"torch.export cannot trace {type(model).__name__}: {type(reason).__name__}: {text}"
    ) from reason


def dynamic_groups(tensors: list[torch.Tensor]) -> dict[str, list[tuple[int, int]]]:
    """Find the dimensions that should vary: group name -> (tensor index, dimension) pairs.

    The batch is the first dimension. A sequence length is the second dimension of token ids
    [batch, length] or features [batch, length, width], and every later dimension of its size in
    a tensor that is not an image.
    """
    groups: dict[str, list[tuple[int, int]]] = defaultdict(list)
    batch_sizes = Counter(tensor.shape[0] for tensor in tensors if tensor.dim())
    batch = batch_sizes.most_common(1)[0][0] if batch_sizes else 0
    lengths = {
        tensor.shape[1]
        for tensor in tensors
        if (tensor.dim() == 2 and not tensor.is_floating_point()) or tensor.dim() == 3
    }
    for index, tensor in enumerate(tensors):
        for dimension, size in enumerate(tensor.shape):
            if dimension == 0 and (size == batch or size > 1):
                groups["batch" if size == batch else f"first {size}"].append((index, 0))
            elif dimension > 0 and size in lengths:
                groups[f"length {size}"].append((index, dimension))
    return dict(groups)


def _dynamic_shapes(
    tensors: list[torch.Tensor], groups: dict[str, list[tuple[int, int]]]
) -> tuple[dict[int, Any], ...]:
    shapes: tuple[dict[int, Any], ...] = tuple({} for _ in tensors)
    for members in groups.values():
        for index, dimension in members:
            shapes[index][dimension] = Dim.AUTO
    return shapes


def _static_dimensions(
    exported: ExportedProgram,
    names: list[str],
    tensors: list[torch.Tensor],
    groups: dict[str, list[tuple[int, int]]],
) -> list[str]:
    user_inputs = set(exported.graph_signature.user_inputs)
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in user_inputs]
    wanted = sorted(member for members in groups.values() for member in members)
    return [
        f"dimension {dimension} of {names[index]} is static at {tensors[index].shape[dimension]}"
        for index, dimension in wanted
        if is_concrete_int(nodes[index].meta["val"].shape[dimension])
        and not (dimension == 2 and tensors[index].dim() == 3)
    ]


def _ranges(exported: ExportedProgram) -> dict[str, tuple[int, int]]:
    """Return the limits of dynamic sizes; a lower one of 2 is only the exporter's assumption."""
    ranges: dict[str, tuple[int, int]] = {}
    for symbol, limits in exported.range_constraints.items():
        smallest = int(limits.lower) if limits.lower > 2 else 0
        largest = int(limits.upper) if limits.upper < 2**62 else 2**63 - 1
        ranges[str(symbol)] = (smallest, largest)
    return ranges


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[dict[str, list[bool]]]:
    """Record how each leaf module is called while the exporter runs the model's Python."""
    calls: dict[str, list[bool]] = defaultdict(list)
    handles = []
    for name, module in model.named_modules(remove_duplicate=True):
        if not name or next(module.children(), None) is not None:
            continue

        def record(
            _module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
            name: str = name,
        ) -> None:
            simple = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
            calls[name].append(simple and isinstance(output, torch.Tensor))

        handles.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _as_in_eager() -> Iterator[None]:
    """Let the model's Python take the paths it takes in eager mode.

    Models ask `is_exporting` to replace, for instance, causal attention by attention with an
    explicit mask: equal outputs, but gradients that are not equal to the last bit.
    """
    with mock.patch.object(torch.compiler, "is_exporting", return_value=False):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own warnings and log lines from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # A failing export prints the whole graph; the error carries what matters.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
