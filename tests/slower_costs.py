"""Times in which every candidate is clearly slower, measured all the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from graphopt.passes.costs import Costs
from graphopt.passes.latency import Comparison


class SlowerCosts(Costs):
    """Measures candidates behind forty layers more: whatever else the machine does, they lose."""

    def compare_modules(
        self,
        dense: nn.Module,
        candidate: nn.Module,
        input_shape: Sequence[int],
        dtype: torch.dtype,
        *,
        training: bool,
    ) -> Comparison:
        """Time a module and its replacement; arguments as in `Costs`."""
        width = input_shape[-1]
        slow = nn.Sequential(*[nn.Linear(width, width) for _ in range(40)], candidate)
        return super().compare_modules(dense, slow, input_shape, dtype, training=training)
