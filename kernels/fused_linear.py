"""Linear layers over the same input that share one weight and, called together, one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FusedLinear", "FusedPart", "fused_linear_reference"]


def fused_linear_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    """Return the outputs of separate layers side by side [..., sum of their outputs]."""
    pairs = zip(weights, biases, strict=True)
    return torch.cat([functional.linear(x, weight, bias) for weight, bias in pairs], dim=-1)


class FusedLinear(nn.Module):
    """The first of several linear layers; it owns the stacked parameters of all of them.

    Called like the layer it replaces it computes that layer alone, so code that calls the layers
    one by one keeps working; with `part=None` it computes all of them in one product.

    Args:
        in_features: Size of the last dimension of the input.
        sizes: Output size of every part, in order.
        bias: Whether the parts have biases.
        device: Where the parameters live.
        dtype: Their type.

    Attributes:
        sizes: Output size of every part.
        fused_weight: Stacked weights [sum of sizes, in_features].
        fused_bias: Stacked biases [sum of sizes] or None.

    Raises:
        ValueError: A size is not positive.
    """

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise ValueError(f"expected positive output sizes, got {list(sizes)}")
        self.in_features = in_features
        self.sizes = tuple(sizes)
        total = sum(sizes)
        self.fused_weight = nn.Parameter(
            torch.empty(total, in_features, device=device, dtype=dtype)
        )
        values = torch.empty(total, device=device, dtype=dtype) if bias else None
        self.fused_bias = nn.Parameter(values) if values is not None else None
        self.reset_parameters()

    @property
    def out_features(self) -> int:
        """Output size of the first part."""
        return self.sizes[0]

    @property
    def weight(self) -> Tensor:
        """Weight of the first part [out_features, in_features], a view."""
        return self.part_weight(0)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the first part [out_features], a view, or None."""
        return self.part_bias(0)

    def part_weight(self, part: int) -> Tensor:
        """Return the weight of a part [size, in_features], a view of the stacked one."""
        return self.fused_weight.narrow(0, sum(self.sizes[:part]), self.sizes[part])

    def part_bias(self, part: int) -> Tensor | None:
        """Return the bias of a part [size], a view of the stacked one, or None."""
        if self.fused_bias is None:
            return None
        return self.fused_bias.narrow(0, sum(self.sizes[:part]), self.sizes[part])

    def reset_parameters(self) -> None:
        """Draw the parameters as new `nn.Linear` layers would."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.fused_weight, -bound, bound)
        if self.fused_bias is not None:
            nn.init.uniform_(self.fused_bias, -bound, bound)

    def forward(self, x: Tensor, *, part: int | None = 0) -> Tensor:
        """Map [..., in_features] to the outputs of one part, or of all parts side by side.

        Args:
            x: Input [..., in_features].
            part: Index of the part; None computes all [..., sum of sizes].
        """
        if part is None:
            return functional.linear(x, self.fused_weight, self.fused_bias)
        return functional.linear(x, self.part_weight(part), self.part_bias(part))

    def extra_repr(self) -> str:
        """Return the sizes."""
        return (
            f"in_features={self.in_features}, sizes={self.sizes}, "
            f"bias={self.fused_bias is not None}"
        )


class FusedPart(nn.Module):
    """One of the other layers of a `FusedLinear`: it has no parameters, the owner has them.

    The owner is not a submodule, so a state dict holds the parameters once; copying a model that
    contains both copies their relation.

    Args:
        owner: The layer that holds the parameters.
        part: Index of this part, from 1.
    """

    def __init__(self, owner: FusedLinear, part: int) -> None:
        super().__init__()
        if not 1 <= part < len(owner.sizes):
            raise ValueError(f"expected a part from 1 to {len(owner.sizes) - 1}, got {part}")
        # In a tuple, so that nn.Module does not register it.
        self._owner = (owner,)
        self.part = part

    @property
    def owner(self) -> FusedLinear:
        """The layer that holds the parameters."""
        return self._owner[0]

    @property
    def in_features(self) -> int:
        """Input size."""
        return self.owner.in_features

    @property
    def out_features(self) -> int:
        """Output size of this part."""
        return self.owner.sizes[self.part]

    @property
    def weight(self) -> Tensor:
        """Weight of this part [out_features, in_features], a view of the owner's."""
        return self.owner.part_weight(self.part)

    @property
    def bias(self) -> Tensor | None:
        """Bias of this part [out_features], a view of the owner's, or None."""
        return self.owner.part_bias(self.part)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, part={self.part}"
