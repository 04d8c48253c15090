"""A linear layer as two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LowRankLinear", "low_rank_linear_reference"]


def low_rank_linear_reference(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """Return the dense product that `LowRankLinear` stands for: `x (up down)^T + bias`."""
    return functional.linear(x, up @ down, bias)


class LowRankLinear(nn.Module):
    """`y = up (down x) + bias`: two matrix products and nothing else, also when exported.

    Pays where `rank < in_features * out_features / (in_features + out_features)`.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Size between the two products.
        bias: Whether to add a bias.
        device: Where the parameters live.
        dtype: Their type.

    Attributes:
        down: [rank, in_features].
        up: [out_features, rank].
        bias: [out_features] or None.

    Raises:
        ValueError: The rank is not between 1 and the smaller of the two sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"expected a rank from 1 to {min(in_features, out_features)}, got {rank}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        values = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = nn.Parameter(values) if values is not None else None
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], computed: for code that reads it."""
        return self.up @ self.down

    def reset_parameters(self) -> None:
        """Draw both factors so that the output varies as that of a new `nn.Linear`."""
        nn.init.normal_(self.down, std=self.in_features**-0.5)
        nn.init.normal_(self.up, std=(3 * self.rank) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return functional.linear(functional.linear(x, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
