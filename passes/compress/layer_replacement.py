"""A linear layer and what takes its place: its sizes in a plan, both times, and the way back."""

from __future__ import annotations

from typing import TypeVar

from pydantic import Field
from torch import nn

from graphopt.kernels import BlockSparseLinear, LowRankLinear, QuantizedLinear
from graphopt.passes.base import Candidate, Change
from graphopt.passes.costs import Costs
from graphopt.passes.details import Details
from graphopt.passes.errors import PlanError
from graphopt.passes.linear_layers import LinearLayer, linear_layer
from graphopt.passes.program import Program, shape_of

Replacement = TypeVar("Replacement", BlockSparseLinear, LowRankLinear, QuantizedLinear)


class LayerSizes(Details):
    """Sizes of a linear layer that is replaced, by which it is known again."""

    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    bias: bool


def replaced_layer(program: Program, change: Change, sizes: LayerSizes, kind: str) -> LinearLayer:
    """Return the dense layer that a change is about.

    Args:
        program: The program, before the change.
        change: Its target is the layer.
        sizes: What the plan says of it.
        kind: What the layer is to be, in a word: "sparse".

    Raises:
        PlanError: if there is no linear layer of these sizes.
    """
    layer = linear_layer(program, change.target)
    if layer is None or (sizes.in_features, sizes.out_features, sizes.bias) != (
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
    ):
        raise PlanError(
            f"{change.target} must be a linear layer {sizes.in_features} -> "
            f"{sizes.out_features} to be {kind}, it is {program.module(change.target)}; "
            "is this plan for another model?"
        )
    return layer


def replacement(
    model: nn.Module, change: Change, sizes: LayerSizes, module_class: type[Replacement], kind: str
) -> Replacement:
    """Return what took the place of a dense layer.

    Args:
        model: The model, after the change.
        change: Its target was the layer.
        sizes: What the plan says of it.
        module_class: What it became.
        kind: The same in a word: "sparse".

    Raises:
        PlanError: if it is something else, or of other sizes.
    """
    module = model.get_submodule(change.target)
    if not isinstance(module, module_class) or (module.in_features, module.out_features) != (
        sizes.in_features,
        sizes.out_features,
    ):
        raise PlanError(f"{change.target} is not the {kind} layer that the plan describes")
    return module


def timed(
    program: Program,
    candidate: Candidate,
    layer: LinearLayer,
    cheaper: nn.Module,
    costs: Costs,
    *,
    training: bool,
) -> tuple[Candidate, float]:
    """Return a candidate with its times on the layer's input, and how many times faster it is.

    Args:
        program: The program, before the change.
        candidate: Its target is the layer.
        layer: The layer.
        cheaper: What would take its place; may be on the meta device.
        costs: Measures both.
        training: Whether a training step is timed.
    """
    source = program.calls(candidate.change.target)[0].all_input_nodes[0]
    times = costs.compare_modules(
        layer.module, cheaper, shape_of(source), source.meta["val"].dtype, training=training
    )
    return candidate.timed(times), times.ratio
