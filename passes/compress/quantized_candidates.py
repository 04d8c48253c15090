"""What a linear layer costs as it is and in integers: counted, and measured."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from graphopt.kernels import QuantizedLinear
from graphopt.kernels.quantized_linear import GROUP_SIZES, check_scheme
from graphopt.passes.base import Candidate, Change, Cost
from graphopt.passes.compress.layer_replacement import LayerSizes, replaced_layer, timed
from graphopt.passes.costs import Costs
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import PlanError
from graphopt.passes.linear_layers import LinearLayer
from graphopt.passes.program import Program


class Scheme(Details):
    """How a layer is quantized; see `kernels.QuantizedLinear`."""

    bits: int
    group_size: int
    activations: str

    def __str__(self) -> str:
        """Return the scheme in a few words."""
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        inputs = "" if self.activations == "none" else f", {self.activations} inputs"
        return f"{self.bits} bits{groups}{inputs}"

    def fitting(self, in_features: int) -> Scheme:
        """Return the scheme, or the next coarser one that fits a number of inputs.

        Smaller groups, then 8 bits without groups.
        """
        sizes = [size for size in reversed(GROUP_SIZES) if size <= self.group_size]
        group_size = next((size for size in sizes if in_features % size == 0), 0)
        lost = (self.group_size and not group_size) or (self.bits == 4 and in_features % 2)
        return self.model_copy(
            update={"bits": 8 if lost else self.bits, "group_size": 0 if lost else group_size}
        )


class Quantization(Scheme, LayerSizes):
    """What `apply` and `restore` need.

    Attributes:
        error_growth: How much larger the output's expected error is than what rounding the weight
            alone makes, for the rounding of inputs.
    """

    error_growth: float = Field(ge=1.0)


def scheme_of(change: Change) -> Scheme:
    """Return the scheme of a change."""
    details = read_details(Quantization, change)
    return Scheme(**{key: getattr(details, key) for key in Scheme.model_fields})


def candidate_of(
    pass_name: str, name: str, layer: LinearLayer, before: Cost, scheme: Scheme
) -> Candidate:
    """Return the change of one layer with its costs: operations stay as many, bytes do not.

    Args:
        pass_name: The pass that makes it.
        name: The layer's name.
        layer: The layer.
        before: Its cost now.
        scheme: How it is quantized.
    """
    scheme = scheme.fitting(layer.in_features)
    details = Quantization(
        **scheme.model_dump(),
        in_features=layer.in_features,
        out_features=layer.out_features,
        bias=layer.bias is not None,
        error_growth=1.0,
    )
    stored = sum(buffer.nbytes for buffer in new_layer(details, layer).buffers())
    return Candidate(
        change=Change(
            pass_name=pass_name,
            target=name,
            summary=f"{layer.in_features} -> {layer.out_features} in {scheme}",
            details=details.model_dump(mode="json"),
        ),
        before=before,
        after=replace(before, size_bytes=before.size_bytes - layer.weight.nbytes + stored),
        exclusive=frozenset({f"{name}.{layer.weight_name} format"}),
    )


def measured(program: Program, candidate: Candidate, costs: Costs) -> tuple[Candidate, float]:
    """Return the candidate with its times in inference, and how many times faster it is."""
    details, layer = checked(program, candidate.change)
    return timed(program, candidate, layer, new_layer(details, layer), costs, training=False)


def new_layer(details: Quantization, layer: LinearLayer) -> QuantizedLinear:
    """Return a quantized layer of these sizes on the meta device, in the mode of the dense one."""
    quantized = QuantizedLinear(
        details.in_features,
        details.out_features,
        details.bias,
        bits=details.bits,
        group_size=details.group_size,
        activations=details.activations,
        device="meta",
        dtype=layer.weight.dtype,
    )
    if quantized.bias is not None and layer.bias is not None:
        quantized.bias.requires_grad_(layer.bias.requires_grad)
    return quantized.train(layer.module.training)


def checked(program: Program, change: Change) -> tuple[Quantization, LinearLayer]:
    """Return the checked details and the layer of a change.

    Raises:
        PlanError: if they do not fit each other.
    """
    details = read_details(Quantization, change)
    layer = replaced_layer(program, change, details, "quantized")
    try:
        check_scheme(layer.in_features, details.bits, details.group_size, details.activations)
    except ValueError as error:
        raise PlanError(f"{change.target} cannot be quantized as planned: {error}") from error
    return details, layer
