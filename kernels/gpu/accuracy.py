"""How far a kernel's result may be from the exact one: float64 and a rounding bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.kernels.block_layout import BlockLayout
from graphopt.kernels.block_sparse_operator import block_sparse_linear_reference

__all__ = ["PRODUCTS", "Problem"]

PRODUCTS = ("forward", "input_gradient", "weight_gradient")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The operands of the three products of one layer.

    Attributes:
        layout: Which blocks are stored, with the indices on the operands' device.
        x: [tokens, in_features].
        gradient: [tokens, out_features].
        values: [blocks, block_out, block_in].
        bias: [out_features].
    """

    layout: BlockLayout
    x: Tensor
    gradient: Tensor
    values: Tensor
    bias: Tensor

    @classmethod
    def random(
        cls,
        mask: Tensor,
        block: tuple[int, int],
        tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Problem:
        """Return standard normal operands for the blocks of a mask, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        layout = BlockLayout.from_mask(mask.to(device), *block)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        return cls(
            layout=layout,
            x=normal(tokens, layout.in_features),
            gradient=normal(tokens, layout.out_features),
            values=normal(layout.blocks, *block),
            bias=normal(layout.out_features),
        )

    def excess(
        self, product: str, found: Tensor, *, activation: str = "none", tf32: bool = False
    ) -> float:
        """Return the largest error of a result over its rounding bound; at most 1 is right.

        Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: a float32 sum of n
        products differs by at most n eps times the sum of their magnitudes, in whatever order;
        storing it adds eps of the stored type, rounded or truncated.

        Args:
            product: One of `PRODUCTS`.
            found: The result; anything but a finite number is infinitely wrong.
            activation: What the forward product ends with, one of `ACTIVATIONS`.
            tf32: Whether factors were rounded to TensorFloat-32, which keeps 10 bits.
        """
        exact, magnitude, terms = self._exact(product, activation)
        relative = terms * torch.finfo(torch.float32).eps + (2 * 2.0**-10 if tf32 else 0.0)
        if activation != "none":
            # No activation is steeper than 1.13; what it computes in float32 is within the rest.
            relative *= 1.2
        stored = exact.abs() * torch.finfo(found.dtype).eps
        bound = magnitude * relative + stored + torch.finfo(found.dtype).tiny
        ratio = (found.double() - exact).abs() / bound
        return float(ratio.nan_to_num(nan=float("inf")).max())

    def _exact(self, product: str, activation: str) -> tuple[Tensor, Tensor, int]:
        """Return the result in float64, the same sum over magnitudes, and its number of terms."""
        layout, x, gradient = self.layout, self.x.double(), self.gradient.double()
        weight = layout.unpack(self.values.double())
        if product == "forward":
            bias = self.bias.double()
            exact = block_sparse_linear_reference(x, self.values.double(), bias, layout, activation)
            return exact, x.abs() @ weight.abs().t() + bias.abs(), layout.in_features + 1
        if product == "input_gradient":
            return gradient @ weight, gradient.abs() @ weight.abs(), layout.out_features
        exact = layout.pack(gradient.t() @ x)
        return exact, layout.pack(gradient.abs().t() @ x.abs()), x.shape[0]
