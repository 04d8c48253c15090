"""The operator `graphopt::quantized_linear`: schema, shapes, gradients, FLOPs.

The specification is `quantized_linear_reference`, which also runs on devices without a fast form;
the CPU form is `cpu.quantized`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from .cpu import quantized
from .quantized_inputs import round_inputs
from .quantized_weights import dequantize, unpack_integers

__all__ = ["quantized_linear", "quantized_linear_reference"]

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")
_LIBRARY.define(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, Tensor? input_scale, "
    "Tensor? input_zero_point, int bits, str activations) -> Tensor"
)
_OPERATOR = torch.ops.graphopt.quantized_linear.default


def quantized_linear_reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bits: int,
    activations: str,
) -> Tensor:
    """Return the dense product of the numbers that the integers stand for."""
    kind = torch.float64 if x.dtype is torch.float64 else torch.float32
    groups = 1 if scales.dim() == 1 else scales.shape[1]
    rounded = round_inputs(x.to(kind), activations, groups, input_scale, input_zero_point)
    weight = dequantize(unpack_integers(codes, bits), scales.to(kind))
    return functional.linear(rounded, weight, None if bias is None else bias.to(kind)).to(x.dtype)


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bits: int,
    activations: str,
) -> Tensor:
    """Return `x W^T + bias` [tokens, out_features] with W, and mostly x, rounded to integers.

    Numerics: integer products accumulate in int32, exactly; inputs of another floating-point type
    than float32 or float64 are widened to float32 first. Gradients reach x, as if it were not
    rounded (straight-through, arXiv 1308.3432), and the bias.
    Cost: `2 * tokens * in_features * out_features` operations, as the dense product.

    Args:
        x: [tokens, in_features].
        codes: W's integers as `pack_integers` stores them.
        scales: [out_features] or [out_features, groups].
        bias: [out_features] or None.
        input_scale: Scale [] of static inputs, else None.
        input_zero_point: Zero point [] of static inputs, else None.
        bits: Of a weight, 8 or 4.
        activations: One of `quantized_inputs.ACTIVATIONS`.
    """
    result: Tensor = _OPERATOR(
        x, codes, scales, bias, input_scale, input_zero_point, bits, activations
    )
    return result


def _on_cpu(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    if quantized.runs(x, scales, *rest):
        return quantized.quantized_linear(x, codes, scales, bias, *rest)
    return quantized_linear_reference(x, codes, scales, bias, *rest)


def _shape(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, bias, _, _, bits, _ = inputs
    ctx.save_for_backward(codes, scales)
    ctx.bits, ctx.has_bias = bits, bias is not None


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales = ctx.saved_tensors
    for_x = for_bias = None
    if ctx.needs_input_grad[0]:
        kind = torch.float64 if gradient.dtype is torch.float64 else torch.float32
        weight = dequantize(unpack_integers(codes, ctx.bits), scales.to(kind))
        for_x = gradient @ weight.to(gradient.dtype)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        for_bias = gradient.sum(0)
    return for_x, None, None, for_bias, None, None, None, None


def _flops(x_shape: Any, codes_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * int(x_shape[0]) * int(x_shape[1]) * int(codes_shape[0])


torch.library.register_fake("graphopt::quantized_linear", _shape, lib=_LIBRARY)
_LIBRARY.impl("quantized_linear", quantized_linear_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("quantized_linear", _on_cpu, "CPU")
torch.library.register_autograd(
    "graphopt::quantized_linear", _backward, setup_context=_setup_context, lib=_LIBRARY
)
register_flop_formula(torch.ops.graphopt.quantized_linear)(_flops)
