"""Vectors of the last few tokens, from a table that is indexed by their hash."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NgramEmbeddings"]

_MULTIPLIER = 36313
_PRIME = 2**31 - 1
"""Keys stay below it, so a key times the multiplier stays far below 2**63."""


class NgramEmbeddings(nn.Module):
    """Adds up one vector for each n-gram that ends at a token; all vectors start at zero.

    ids [batch, token] -> [batch, token, width]. The n-gram of order n is the token and the n - 1
    before it; before the first one stands nothing, which counts as a token of its own. N-grams that
    share a row of the table by chance share a vector. Tokens after a token are never looked at.
    Cost: a lookup per order and token, no matrix product; an optimizer step over the whole table.
    Source: hash n-gram embeddings (Byte Latent Transformer, arXiv 2412.09871, section 3.2.1).

    Attributes:
        weight: The vectors [order * row, width].
        orders: Lengths of the n-grams, ascending, from 2.
        rows: Rows for each order.
        eager_refusal: Why the model's own forward must not run.
    """

    eager_refusal: ClassVar[str] = (
        "n-gram embeddings look at the tokens before each one, so the model cannot decode with a "
        "cache; pass the whole sequence with use_cache=False"
    )

    def __init__(
        self,
        width: int,
        *,
        orders: tuple[int, ...] = (2, 3),
        rows: int = 16384,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.orders = orders
        self.rows = rows
        self.weight = nn.Parameter(
            torch.zeros(len(orders) * rows, width, device=device, dtype=dtype)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Return the sum of the vectors."""
        result = None
        for number, place in enumerate(self.places(ids)):
            found = F.embedding(place + number * self.rows, self.weight)
            result = found if result is None else result + found
        assert result is not None
        return result

    def places(self, ids: Tensor) -> list[Tensor]:
        """Return the row of every token's n-gram [batch, token], for each order."""
        tokens = ids.long() + 1  # 0 is what stands before the first token
        key, places = tokens, []
        for length in range(2, self.orders[-1] + 1):
            earlier = F.pad(tokens, (length - 1, 0))[:, : ids.shape[1]]
            key = (key * _MULTIPLIER + earlier) % _PRIME
            if length in self.orders:
                places.append(key % self.rows)
        return places

    def extra_repr(self) -> str:
        """Return orders and sizes."""
        return f"{self.weight.shape[1]}, orders={self.orders}, rows={self.rows}"
