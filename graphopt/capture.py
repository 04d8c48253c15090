"""Any model as a `Program`: one graph for training and evaluation, checked against the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphopt.passes.axis_flow import tensors_of
from graphopt.passes.calls import (
    canonical_arguments,
    example_arguments,
    expand_arguments,
    signature_of,
)
from graphopt.passes.errors import CaptureError
from graphopt.passes.program import Mode, Program, eager_forward
from graphopt.passes.propagation import remember
from graphopt.passes.structure import Structure, flatten, map_tensors
from graphopt.passes.verifier import preserved, relative_error, rounding_bound

from .inputs import infer_inputs
from .lifting import lift
from .tracing import Trace, trace

_MODES: tuple[Mode, ...] = ((True, True), (False, True), (False, False))
_PART = 2**20
"""Values compared at once."""


def capture(model: nn.Module, example_inputs: Any = None) -> Program:
    """Capture a call of a model as a flat graph over the model's own modules.

    Batch and sequence dimensions become dynamic where the model allows it; `program.notes` says
    which stay static. The graph is traced in training mode and follows `module.training`. It is
    compared with the eager forward in training mode (same random numbers; gradients too), in
    evaluation mode and without gradients; where it is not equal to the last bit, the program runs
    the eager forward in that mode and says so in `program.notes`.

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
        program = _trace_rows(model, arguments)
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


def _trace_rows(model: nn.Module, arguments: dict[str, Any]) -> Program:
    """Trace with two rows where the example has one, unless the model takes one row only."""
    rows = _with_two_rows(arguments)
    try:
        return _trace_program(model, rows)
    except CaptureError:
        if rows is arguments:
            raise
    return _trace_program(model, arguments)


def _trace_program(model: nn.Module, arguments: dict[str, Any]) -> Program:
    result, notes = _trace(model, arguments)
    graph = lift(result, model)
    _refuse_sizes_from_values(graph)
    remember(graph, model)
    return Program(
        model,
        graph,
        inputs=flatten(arguments)[1],
        outputs=result.outputs,
        example=arguments,
        notes=(*notes, *result.static),
        ranges=result.ranges,
    )


def _refuse_sizes_from_values(graph: fx.Graph) -> None:
    """Refuse what no analysis can count: sizes known only when the values are.

    Raises:
        CaptureError: naming the operation.
    """
    for node in graph.nodes:
        for value in tensors_of(node.meta.get("val")):
            if any(isinstance(s, torch.SymInt) and s.node.hint is None for s in value.shape):
                raise CaptureError(
                    f"the shape of {node.name} depends on the values of the inputs, not on their "
                    "shapes alone"
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
    except Exception:  # symbolic_trace raises any type; the first reason counts
        raise reason from reason.__cause__


def _with_two_rows(arguments: dict[str, Any]) -> dict[str, Any]:
    """Repeat a batch of one row: the exporter takes a size of 1 for a constant."""
    tensors, _ = flatten(arguments)
    sizes = [tensor.shape[0] for tensor in tensors if tensor.dim()]
    if not sizes or max(sizes) != 1:
        return arguments
    rows: dict[str, Any] = map_tensors(
        arguments, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor
    )
    return rows


def _compare_with_eager(program: Program) -> None:
    equal: set[Mode] = set()
    rounding: set[Mode] = set()
    notes = list(program.notes)
    bound = rounding_bound(program)
    for mode in _MODES:
        training, grad = mode
        program.model.train(training)
        with torch.set_grad_enabled(grad):
            difference = _difference(program)
        if difference is None:
            equal.add(mode)
            rounding.add(mode)
            continue
        if difference.relative <= bound:
            rounding.add(mode)
        where = "training" if training else "evaluation"
        without = "" if grad else " without gradients"
        notes.append(
            f"in {where} mode{without} the eager forward runs: the graph {difference.text}"
        )
    program.modes = frozenset(equal)
    program.rounding_modes = frozenset(rounding)
    program.notes = tuple(notes)


@dataclass(frozen=True)
class _Difference:
    """How the graph differs from the eager forward; `relative` is infinite where it has no size."""

    text: str
    relative: float = float("inf")


def _difference(program: Program) -> _Difference | None:
    """Return how the graph differs from the eager forward in the model's mode, None if it does not.

    In training mode gradients are compared too. What the eager forward itself does not reproduce
    is not held against the graph.
    """
    tensors = program.few_rows()
    args, kwargs = expand_arguments(program.signature, program.inputs.rebuild(tensors))
    expected = _observed(program.model, lambda: eager_forward(program.model)(*args, **kwargs))
    try:
        actual = _observed(program.model, lambda: program.outputs.rebuild(program.run(*tensors)))
    except Exception as error:  # any failure of the graph means: do not use it
        text = str(error).splitlines()[0] if str(error) else ""
        return _Difference(f"fails: {type(error).__name__}: {text}")
    difference = _compare(actual, expected)
    if difference is not None:
        again = _observed(program.model, lambda: eager_forward(program.model)(*args, **kwargs))
        if _compare(again, expected) is not None:
            return None
    return difference


@dataclass(frozen=True)
class _Observed:
    outputs: list[torch.Tensor]
    structure: Structure
    gradients: dict[str, torch.Tensor | None]


def _observed(model: nn.Module, call: Callable[[], Any]) -> _Observed:
    with preserved(model):
        outputs, structure = flatten(call())
        differentiable = [v for v in outputs if v.requires_grad] if model.training else []
        gradients: dict[str, torch.Tensor | None] = {}
        if differentiable:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            loss = torch.stack([v.float().square().mean() for v in differentiable]).sum()
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            gradients = dict(zip(trained, found, strict=True))
    return _Observed([value.detach() for value in outputs], structure, gradients)


def _compare(actual: _Observed, expected: _Observed) -> _Difference | None:
    if actual.structure != expected.structure:
        return _Difference("returns another structure")
    for value, reference in zip(actual.outputs, expected.outputs, strict=True):
        if value.shape != reference.shape or value.dtype != reference.dtype:
            return _Difference(f"returns {list(value.shape)} instead of {list(reference.shape)}")
        if not _is_equal(value, reference):
            relative = relative_error(value, reference)
            return _Difference(f"differs by {relative:.1e} of an output's norm", relative)
    for name, gradient in expected.gradients.items():
        found = actual.gradients[name]
        if found is None or gradient is None:
            if found is not gradient:
                return _Difference(f"has no gradient of {name}, or an extra one")
        elif not _is_equal(found, gradient):
            relative = relative_error(found, gradient)
            return _Difference(f"has a gradient of {name} that differs by {relative:.1e}", relative)
    return None


def _is_equal(value: torch.Tensor, reference: torch.Tensor) -> bool:
    # Copies of small parts only: gradients of a whole model are compared here.
    parts = (tensor.flatten().split(_PART) for tensor in (value, reference))
    return all(torch.equal(*map(torch.nan_to_num, pair)) for pair in zip(*parts, strict=True))
