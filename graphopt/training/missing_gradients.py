"""The gradient of the blocks that a layer does not store, for one training step."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels import BlockLayout, BlockSparseLinear


class MissingGradients:
    """Adds up the weight gradient of a layer's missing blocks while it is trained.

    Forward hooks keep the layer's input; hooks on its output multiply it with the gradient as soon
    as that arrives: the weight gradient of the block-sparse operator, over the complement of the
    stored blocks.

    Cost: `2 * tokens * missing values` FLOPs, counted by `FlopCounterMode`, and 4 bytes for every
    missing value (8 in float64) from the first backward until the object is dropped; also the
    layer's input, which autograd keeps anyway except under activation checkpointing.

    Attributes:
        layer: The layer.
        total: Sum over the calls [missing blocks, block_out, block_in], float32 or float64; None
            before any gradient passed.
    """

    def __init__(self, layer: BlockSparseLinear) -> None:
        self.layer = layer
        self.total: Tensor | None = None
        # Where a compiler does see the hook, it must call it as it is.
        watch = torch.compiler.disable(self._watch)
        self._handle = layer.register_forward_hook(watch, with_kwargs=True)

    def stop(self) -> None:
        """Watch no further calls."""
        self._handle.remove()

    def sum(self) -> Tensor:
        """Return the sum so far: zeros if no gradient passed."""
        if self.total is not None:
            return self.total
        values = self.layer.values
        shape = (self._missing.blocks, self.layer.block_out, self.layer.block_in)
        dtype = torch.promote_types(values.dtype, torch.float32)
        return torch.zeros(shape, dtype=dtype, device=self.layer.rows.device)

    def grid(self, norms: Tensor) -> Tensor:
        """Lay a number per missing block out as [row tiles, column groups]; 0 where stored."""
        grid = norms.new_zeros(self._missing.row_tiles, self._missing.column_groups)
        grid[self._missing.rows.long(), self._missing.columns.long()] = norms
        return grid

    @cached_property
    def _missing(self) -> BlockLayout:
        """Return the blocks not stored, as of the first call: a checkpoint may come before it."""
        layer = self.layer
        return BlockLayout.from_mask(~layer.layout.mask(), layer.block_out, layer.block_in)

    def _watch(
        self, layer: BlockSparseLinear, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> None:
        if out.requires_grad:
            x = (args[0] if args else kwargs["x"]).detach()
            out.register_hook(lambda gradient: self._add(x, gradient))

    @torch.no_grad()
    def _add(self, x: Tensor, gradient: Tensor) -> None:
        layer = self.layer
        part = torch.ops.graphopt.block_sparse_linear_weight_gradient(
            gradient.reshape(-1, layer.out_features),
            x.reshape(-1, layer.in_features).to(gradient.dtype),
            self._missing.rows,
            self._missing.columns,
            layer.block_out,
            layer.block_in,
        )
        self.total = self.sum().add_(part)
