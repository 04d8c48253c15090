"""Quantized layers as ONNX operators, emitted while a model is traced.

What each form becomes, and why this one (ONNX Runtime 1.31, x86 with VNNI):

* dynamic: inputs normalised per token, QuantizeLinear to *unsigned* integers, MatMulInteger.
  Signed inputs are 13 times slower.
* dynamic-tensor: DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime fuses with bias and
  scales into one operator.
* static: QuantizeLinear and DequantizeLinear around a MatMul, which both ONNX Runtime and OpenVINO
  turn into one integer product.
* none: a product with multiplied integers, which ONNX Runtime folds when it loads the file. Not
  DequantizeLinear: ONNX Runtime makes MatMulNBits of it, with inputs rounded to 8 bits.
* groups of 4-bit weights, and groups with dynamic inputs: MatMulNBits.

Without VNNI ONNX Runtime sums pairs of unsigned times signed products in 16 bits, where they
saturate, unless the session's entry `session.x64quantprecision` is "1".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .quantized_inputs import TINIEST
from .quantized_weights import dequantize

if TYPE_CHECKING:
    from .quantized_linear import QuantizedLinear

__all__ = ["QuantizedLinearForm", "quantized_linear_form"]

_CENTER = 128


def quantized_linear_form(layer: QuantizedLinear) -> QuantizedLinearForm:
    """Return a quantized layer as ONNX operators; it computes in float32, by tracing only."""
    if layer.group_size and (layer.bits == 4 or layer.activations == "dynamic"):
        return _Blocks(layer)
    return _FORMS[layer.activations](layer)


class QuantizedLinearForm(nn.Module, ABC):
    """What all forms share: constants as the runtimes read them, and the input's type."""

    bias: Tensor | None
    scales: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        bias = None if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("bias", bias)
        self.register_buffer("scales", layer.scales)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features].

        Raises:
            ValueError: The input has another width; a trace learns from this that it is fixed.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected an input [..., {self.in_features}], got {list(map(int, x.shape))}"
            )
        result = self.product(x.float())
        return (result if self.bias is None else self.biased(result, self.bias)).to(x.dtype)

    def biased(self, product: Tensor, bias: Tensor) -> Tensor:
        """Return the product with the bias added."""
        return product + bias

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Return `x W^T` [..., out_features] in float32."""

    def output_shape(self, x: Tensor) -> list[int | torch.SymInt]:
        """Return the shape of the result."""
        return [*x.shape[:-1], self.out_features]


class _Integers(QuantizedLinearForm):
    """Weights as int8 [in_features, out_features]."""

    integers: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        self.register_buffer("integers", layer.integers.t().contiguous())

    def integer_product(self, integers: Tensor, zero_point: Tensor) -> Tensor:
        """Return the product of unsigned inputs and the weight's integers, as float32."""
        inputs = (integers, self.integers, zero_point)
        product = _operator("MatMulInteger", inputs, torch.int32, self.output_shape(integers))
        return product.float()


class _Tokens(_Integers):
    zero_point: Tensor
    one: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(_CENTER, dtype=torch.uint8))
        # In one constant with the scales: one multiplication less of the whole result.
        self.register_buffer("scales", layer.scales / 127)

    def product(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp_min(TINIEST)
        inputs = (x * (127 / largest), self.one, self.zero_point)
        integers = _operator("QuantizeLinear", inputs, torch.uint8, x.shape)
        return self.integer_product(integers, self.zero_point) * self.scales * largest


class _WholeTensor(_Integers):
    def product(self, x: Tensor) -> Tensor:
        kinds = (torch.uint8, torch.float32, torch.uint8)
        integers, scale, zero_point = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear", (x,), dtypes=kinds, shapes=(x.shape, (), ())
        )
        return self.integer_product(integers, zero_point) * (scale * self.scales)


class _Static(_Integers):
    centers: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    multipliers: Tensor | None

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        factors = layer.input_multipliers
        needed = factors is not None and bool((factors != 1).any())
        self.register_buffer("multipliers", factors if needed else None)
        self.register_buffer("input_scale", layer.input_scale)
        self.register_buffer("input_zero_point", layer.input_zero_point)
        self.register_buffer("centers", torch.zeros_like(self.scales, dtype=torch.int8))

    def product(self, x: Tensor) -> Tensor:
        x = x if self.multipliers is None else x * self.multipliers
        code = (self.input_scale, self.input_zero_point)
        integers = _operator("QuantizeLinear", (x, *code), torch.uint8, x.shape)
        rounded = _operator("DequantizeLinear", (integers, *code), torch.float32, x.shape)
        inputs = (self.integers, self.scales, self.centers)
        shape = self.integers.shape
        weight = _operator("DequantizeLinear", inputs, torch.float32, shape, {"axis": 1})
        return rounded @ weight

    def biased(self, product: Tensor, bias: Tensor) -> Tensor:
        # Of MatMul and Add, where all sizes are fixed, ONNX Runtime makes a Gemm of floats.
        return _operator("Sum", (product, bias), torch.float32, product.shape)


class _Dequantized(QuantizedLinearForm):
    integers: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        self.register_buffer("integers", layer.integers)

    def product(self, x: Tensor) -> Tensor:
        return x @ dequantize(self.integers.float(), self.scales).t()


class _Blocks(QuantizedLinearForm):
    """MatMulNBits; inputs that are rounded per token and group are its accuracy level 4."""

    blocks: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        codes = layer.codes
        if layer.bits == 8:
            codes = (codes.int() + _CENTER).to(torch.uint8)
        groups = layer.in_features // layer.group_size
        self.register_buffer("blocks", codes.unflatten(1, (groups, -1)).contiguous())
        self.attributes = {
            "K": layer.in_features,
            "N": layer.out_features,
            "bits": layer.bits,
            "block_size": layer.group_size,
            "accuracy_level": 4 if layer.activations == "dynamic" else 0,
        }

    def product(self, x: Tensor) -> Tensor:
        return _operator(
            "com.microsoft::MatMulNBits",
            (x, self.blocks, self.scales),
            torch.float32,
            self.output_shape(x),
            attrs=self.attributes,
        )


_FORMS: Mapping[str, Callable[[QuantizedLinear], QuantizedLinearForm]] = {
    "dynamic": _Tokens,
    "dynamic-tensor": _WholeTensor,
    "static": _Static,
    "none": _Dequantized,
}


def _operator(
    name: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
    attrs: dict[str, Any] | None = None,
) -> Tensor:
    """Return what a traced graph records as one ONNX operator."""
    return torch.onnx.ops.symbolic(name, inputs, attrs, dtype=dtype, shape=shape)
