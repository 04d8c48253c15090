"""Any model as a `Program`: one graph for training and evaluation, checked against the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from graphopt.passes.calls import (
    canonical_arguments,
    example_arguments,
    expand_arguments,
    signature_of,
)
from graphopt.passes.errors import CaptureError
from graphopt.passes.program import Mode, Program, eager_forward
from graphopt.passes.structure import flatten, map_tensors
from graphopt.passes.verifier import preserved

from .inputs import infer_inputs
from .lifting import lift
from .tracing import Trace, trace

_MODES: tuple[Mode, ...] = ((True, True), (False, True), (False, False))


def capture(model: nn.Module, example_inputs: Any = None) -> Program:
    """Capture a call of a model as a flat graph over the model's own modules.

    Batch and sequence dimensions become dynamic where the model allows it; `program.notes` says
    which stay static. The graph is traced in training mode and follows `module.training`. It is
    compared with the eager forward in training mode (same random numbers), in evaluation mode
    and without gradients; where it is not equal to the last bit, the program runs the eager
    forward in that mode and says so in `program.notes`.

    Args:
        model: The model; its parameters may be on the meta device (then nothing is compared).
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword
            arguments; None infers them from the model.

    Returns:
        A callable `Program` that prints as readable code.

    Raises:
        InputError: if the inputs do not fit or cannot be inferred.
        CaptureError: if the model cannot be traced, with the reason.
    """
    arguments = call_arguments(model, example_inputs)
    with preserved(model):
        program = _trace_program(model, _with_two_rows(arguments))
        if not any(p.is_meta for p in model.parameters()):
            _compare_with_eager(program)
    return program


def call_arguments(model: nn.Module, example_inputs: Any = None) -> dict[str, Any]:
    """Return canonical arguments for example inputs, inferred where there are none.

    Raises:
        InputError: if the inputs do not fit or cannot be inferred.
    """
    if example_inputs is None:
        return canonical_arguments(signature_of(model), (), infer_inputs(model))
    return example_arguments(model, example_inputs)


def _trace_program(model: nn.Module, arguments: dict[str, Any]) -> Program:
    result, notes = _trace(model, arguments)
    return Program(
        model,
        lift(result, model),
        inputs=flatten(arguments)[1],
        outputs=result.outputs,
        example=arguments,
        notes=(*notes, *result.static),
        ranges=result.ranges,
    )


def _trace(model: nn.Module, arguments: dict[str, Any]) -> tuple[Trace, list[str]]:
    """Trace in training mode, else in evaluation mode, else what `symbolic_trace` sees."""
    model.train()
    try:
        return trace(model, arguments), []
    except CaptureError as error:
        reason = error
    model.eval()
    try:
        return trace(model, arguments), [
            f"traced in evaluation mode, because in training mode {reason}"
        ]
    except CaptureError:
        model.train()
    try:
        symbolic = fx.symbolic_trace(model)
        return trace(symbolic, arguments), [f"traced symbolically first, because {reason}"]
    except Exception:  # noqa: BLE001 - symbolic_trace raises any type; the first reason counts
        raise reason from reason.__cause__


def _with_two_rows(arguments: dict[str, Any]) -> dict[str, Any]:
    """Repeat a batch of one row: the exporter takes a size of 1 for a constant."""
    tensors, _ = flatten(arguments)
    sizes = [tensor.shape[0] for tensor in tensors if tensor.dim()]
    if not sizes or max(sizes) != 1:
        return arguments
    return map_tensors(
        arguments, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor
    )


def _compare_with_eager(program: Program) -> None:
    equal: set[Mode] = set()
    notes = list(program.notes)
    for mode in _MODES:
        training, grad = mode
        program.model.train(training)
        with torch.set_grad_enabled(grad):
            difference = _difference(program)
        if difference is None:
            equal.add(mode)
        else:
            where = "training" if training else "evaluation" + ("" if grad else " without gradients")
            notes.append(f"in {where} mode the eager forward runs: the graph {difference}")
    program.modes = frozenset(equal)
    program.notes = tuple(notes)


def _difference(program: Program) -> str | None:
    """Say how the graph's result differs from the eager one, or None where it does not."""
    tensors = program.few_rows()
    args, kwargs = expand_arguments(program.signature, program.inputs.rebuild(tensors))
    with preserved(program.model):
        expected, structure = flatten(eager_forward(program.model)(*args, **kwargs))
    with preserved(program.model):
        try:
            actual = program.run(*tensors)
        except Exception as error:  # noqa: BLE001 - any failure of the graph means: do not use it
            return f"fails: {type(error).__name__}: {str(error).splitlines()[0]}"
    if structure != program.outputs:
        return "returns another structure"
    for value, reference in zip(actual, expected, strict=True):
        if value.shape != reference.shape or value.dtype != reference.dtype:
            return f"returns {list(value.shape)} instead of {list(reference.shape)}"
        if not torch.equal(torch.nan_to_num(value), torch.nan_to_num(reference)):
            largest = (value.double() - reference.double()).abs().max().item()
            return f"differs by up to {largest:.1e}"
    return None
