"""The inputs of a row tile, side by side."""

from __future__ import annotations

from torch import Tensor, index_select


class GatheredInputs:
    """Gathers column groups of x [tokens, in_features] into one buffer that it keeps."""

    def __init__(self, x: Tensor, block_in: int, *, ones: bool) -> None:
        self._groups = x.contiguous().unflatten(1, (-1, block_in))
        self._ones = int(ones)
        self._buffer = x.new_empty(0, 0)

    def __call__(self, columns: Tensor) -> Tensor:
        """Return [tokens, groups * block_in (+ 1)], valid until the next call."""
        tokens, _, block_in = self._groups.shape
        count = columns.numel()
        width = count * block_in
        if self._buffer.shape != (tokens, width + self._ones):
            self._buffer = self._groups.new_empty(tokens, width + self._ones)
            self._buffer[:, width:] = 1
        gathered = self._buffer[:, :width].view(tokens, count, block_in)
        index_select(self._groups, 1, columns, out=gathered)
        return self._buffer
