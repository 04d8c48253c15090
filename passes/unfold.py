"""The rows that a convolution's weight sees."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F


class Unfold:
    """The rows that a convolution's weight sees: one per output position."""

    def __init__(self, key: str, settings: Mapping[str, Any]) -> None:
        """Hold kernel_size, stride, padding and dilation of a 2-d convolution."""
        self.key = key
        self.window = prod(settings["kernel_size"])
        self._settings = dict(settings)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Turn [batch, channels, height, width] into [batch, positions, channels * window]."""
        return F.unfold(value, **self._settings).transpose(1, 2)
