"""A linear layer whose weight, and mostly its inputs, are small integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .quantized_export import QuantizedLinearForm, quantized_linear_form
from .quantized_inputs import ACTIVATIONS, range_code
from .quantized_operator import quantized_linear
from .quantized_weights import dequantize, pack_integers, round_weight, unpack_integers

__all__ = ["QuantizedLinear"]

GROUP_SIZES = (16, 32, 64, 128, 256)
"""Sizes of groups that runtimes have."""


class QuantizedLinear(nn.Module):
    """`y = x W^T + b` with W as 8- or 4-bit integers: for inference, in place of `nn.Linear`.

    Inputs are rounded to 8 bits too, unless `activations` is "none", and then the product is one
    of integers where the device has that; elsewhere the numbers are the same and the speed is not.
    Gradients reach the input and the bias (see `quantized_operator`). Packed forms of the weight
    are derived when they are needed and never saved.

    Static inputs have one scale for all channels, as integer products need it. Channels much larger
    than others are multiplied by less before they are rounded, and the weight by more.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether to add a bias.
        bits: Of a weight: 8 or 4.
        group_size: Inputs that share a scale; 0 for one scale per output.
        activations: How inputs are rounded: "dynamic" (a scale per token, and per group),
            "dynamic-tensor" (one scale and zero point per call), "static" (calibrated) or "none".
        device: Where the tensors live.
        dtype: Type of the bias; scales are float32.

    Attributes:
        codes: Buffer, the integers: int8 [out_features, in_features], or uint8
            [out_features, in_features / 2] with two in a byte.
        scales: Buffer [out_features] or [out_features, in_features / group_size], float32.
        input_scale: Buffer [], float32, None unless inputs are static.
        input_zero_point: Buffer [], uint8, None unless inputs are static.
        input_multipliers: Buffer [in_features], float32, None unless inputs are static: what
            inputs are multiplied by before they are rounded.
        bias: Parameter [out_features] or None.

    Raises:
        ValueError: The options do not fit each other or the sizes.
    """

    codes: Tensor
    scales: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_multipliers: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        group_size: int = 0,
        activations: str = "dynamic",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_scheme(in_features, bits, group_size, activations)
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.activations = activations
        groups = (in_features // group_size,) if group_size else ()
        width, kind = (in_features, torch.int8) if bits == 8 else (in_features // 2, torch.uint8)
        codes = torch.empty(out_features, width, device=device, dtype=kind)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", codes.new_empty(out_features, *groups, dtype=torch.float32))
        static = activations == "static"
        scale = codes.new_empty((), dtype=torch.float32) if static else None
        self.register_buffer("input_scale", scale)
        zero_point = codes.new_empty((), dtype=torch.uint8) if static else None
        self.register_buffer("input_zero_point", zero_point)
        ones = torch.ones(in_features, device=device, dtype=torch.float32) if static else None
        self.register_buffer("input_multipliers", ones)
        values = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = nn.Parameter(values) if values is not None else None
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        bits: int = 8,
        group_size: int = 0,
        activations: str = "dynamic",
        input_range: tuple[float, float] | None = None,
    ) -> QuantizedLinear:
        """Return a layer with a dense layer's weight, rounded to the nearest, and its bias.

        Args:
            linear: The dense layer; it is not changed.
            bits: As for the class.
            group_size: As for the class.
            activations: As for the class.
            input_range: Smallest and largest input, for "static".

        Raises:
            ValueError: The options do not fit the layer, or a range is missing.
        """
        if (activations == "static") != (input_range is not None):
            raise ValueError(
                f"expected an input range for static activations only, got {input_range} for "
                f"{activations!r}"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            bits=bits,
            group_size=group_size,
            activations=activations,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.requantize(linear.weight, linear.bias)
        if input_range is not None:
            layer.set_input_range(*input_range)
        return layer.train(linear.training)

    @property
    def integers(self) -> Tensor:
        """The weight's integers [out_features, in_features], int8."""
        return unpack_integers(self.codes, self.bits)

    @property
    def weight(self) -> Tensor:
        """The dense weight that the integers stand for [out_features, in_features], float32."""
        weight = dequantize(self.integers, self.scales)
        return weight if self.input_multipliers is None else weight * self.input_multipliers

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """Return what integers stand for where they are those of a dense weight, of its shape."""
        return weight if self.input_multipliers is None else weight / self.input_multipliers

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding the largest input, 0 where inputs are not rounded."""
        return 0.0 if self.activations == "none" else 2.0**-8

    @torch.no_grad()
    def requantize(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take another dense weight, rounded to the nearest in the same scheme, in place.

        Args:
            weight: [out_features, in_features].
            bias: [out_features]; None keeps the present one.

        Raises:
            ValueError: The sizes are others, or there is no bias to set.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"expected a weight [{self.out_features}, {self.in_features}], "
                f"got {list(weight.shape)}"
            )
        weight = self.rounded_weight(weight)
        self.set_integers(*round_weight(weight, self.bits, self.group_size))
        if bias is not None:
            if self.bias is None:
                raise ValueError("expected no bias: this layer has none")
            self.bias.copy_(bias)

    @torch.no_grad()
    def set_integers(self, integers: Tensor, scales: Tensor) -> None:
        """Take rounded weights [out_features, in_features] and their scales, in place."""
        self.codes.copy_(pack_integers(integers, self.bits))
        self.scales.copy_(scales)

    @torch.no_grad()
    def set_input_range(self, low: float, high: float) -> None:
        """Cover this range of multiplied inputs, and zero.

        Raises:
            ValueError: Inputs are not static.
        """
        if self.input_scale is None or self.input_zero_point is None:
            raise ValueError(f"expected a layer with static inputs, they are {self.activations!r}")
        scale, zero_point = range_code(torch.tensor(low), torch.tensor(high))
        self.input_scale.copy_(scale)
        self.input_zero_point.copy_(zero_point)

    def reset_parameters(self) -> None:
        """Draw the weight as that of a new `nn.Linear`; static inputs are from -1 to 1."""
        if self.codes.is_meta:
            return
        bound = self.in_features**-0.5
        weight = torch.empty(self.out_features, self.in_features, device=self.codes.device)
        self.requantize(nn.init.uniform_(weight, -bound, bound))
        if self.activations == "static":
            self.set_input_range(-1.0, 1.0)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def weight_counts(self) -> dict[str, int]:
        """Return how many weights each buffer holds; scales hold none."""
        return {"codes": self.in_features * self.out_features, "scales": 0}

    def export_form(self) -> QuantizedLinearForm:
        """Return the layer as operators that runtimes are fast at."""
        return quantized_linear_form(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features].

        Raises:
            ValueError: The last dimension of x is another.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected an input [..., {self.in_features}], got {list(x.shape)}")
        multiplied = x if self.input_multipliers is None else x * self.input_multipliers
        result = quantized_linear(
            multiplied.reshape(-1, self.in_features),
            self.codes,
            self.scales,
            self.bias,
            self.input_scale,
            self.input_zero_point,
            self.bits,
            self.activations,
        )
        return result.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the sizes and the scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group_size={self.group_size}, "
            f"activations={self.activations!r}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move the layer; scales stay float32, whatever type the rest becomes."""
        names = ("scales", "input_scale", "input_multipliers")
        scales = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in scales.items():
            after = getattr(self, name)
            if after is not None and after.dtype is not torch.float32:
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse integers of another scheme, before they are read as numbers."""
        codes = state_dict.get(prefix + "codes")
        if codes is not None and codes.dtype is not self.codes.dtype:
            raise ValueError(
                f"expected {prefix}codes as {self.codes.dtype} for {self.bits} bits, "
                f"got {codes.dtype}"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_scheme(in_features: int, bits: int, group_size: int, activations: str) -> None:
    """Refuse options of a `QuantizedLinear` that do not fit each other or its inputs.

    Raises:
        ValueError: with what was expected and what came.
    """
    if bits not in (4, 8) or activations not in ACTIVATIONS:
        raise ValueError(
            f"expected bits 4 or 8 and activations {', '.join(ACTIVATIONS)}, "
            f"got {bits!r} and {activations!r}"
        )
    if group_size and (group_size not in GROUP_SIZES or in_features % group_size):
        raise ValueError(
            f"expected a group size of {', '.join(map(str, GROUP_SIZES))} that divides "
            f"{in_features} inputs, or 0, got {group_size}"
        )
    if group_size and activations in ("static", "dynamic-tensor"):
        raise ValueError(f"weights with groups cannot have {activations} inputs; use 'dynamic'")
    if bits == 4 and in_features % 2:
        raise ValueError(f"4-bit weights need an even number of inputs, got {in_features}")
