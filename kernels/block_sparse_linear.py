"""A linear layer that stores and multiplies only some blocks of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .block_layout import BlockLayout
from .block_presets import block_sizes
from .block_sparse_operator import block_sparse_linear
from .tile_gather_linear import TileGatherLinear

__all__ = ["BlockSparseLinear"]


class BlockSparseLinear(nn.Module):
    """`y = x W^T + b` where only chosen blocks of W exist; a drop-in for `nn.Linear`.

    Parameters, gradients, optimizer state and checkpoints hold the chosen blocks only. Everything
    derived from the block indices is rebuilt when it is needed, never saved.

    Args:
        layout: Which blocks are stored.
        bias: Whether to add a bias.
        device: Where the parameters live.
        dtype: Their type.

    Attributes:
        values: Parameter [blocks, block_out, block_in], in the order of the layout.
        bias: Parameter [out_features] or None.
        rows: Buffer, row tile of every block [blocks], int32.
        columns: Buffer, column group of every block [blocks], int32.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        layout: BlockLayout,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = layout.in_features
        self.out_features = layout.out_features
        self.block_out = layout.block_out
        self.block_in = layout.block_in
        shape = (layout.blocks, layout.block_out, layout.block_in)
        self.values = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        vector = torch.empty(layout.out_features, device=device, dtype=dtype) if bias else None
        self.bias = nn.Parameter(vector) if vector is not None else None
        place = self.values.device
        self.register_buffer("rows", layout.rows.to(place, copy=True))
        self.register_buffer("columns", layout.columns.to(place, copy=True))
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        density: float = 0.5,
        *,
        layout: BlockLayout | None = None,
        block_out: int | None = None,
        block_in: int | None = None,
        training: bool = False,
    ) -> BlockSparseLinear:
        """Return a layer with the chosen blocks of a dense layer's weight, and its bias.

        Args:
            linear: The dense layer; it is not changed.
            density: Share of the blocks to keep, those with the largest norms, equally many in
                every row tile.
            layout: The blocks to keep, instead of choosing them here.
            block_out: Rows of a block; default: what pays on the layer's device.
            block_in: Columns of a block; default: what pays on the layer's device.
            training: Whether the defaults are for training (it matters on CUDA).

        Raises:
            ValueError: The density is outside (0, 1] or would keep everything, or the layer's
                sizes have no such divisor.
        """
        weight = linear.weight.detach()
        if layout is None:
            sizes = (weight.shape[0], weight.shape[1])
            preset = block_sizes(*sizes, weight.device, training=training)
            tile, group = block_out or preset[0], block_in or preset[1]
            everything = BlockLayout.from_mask(
                torch.ones(weight.shape[0] // tile, weight.shape[1] // group, dtype=torch.bool),
                tile,
                group,
            )
            scores = everything.pack(weight).double().square().sum((1, 2))
            grid = scores.view(everything.row_tiles, everything.column_groups)
            layout = BlockLayout.from_scores(grid, density, tile, group)
            if density < 1 and layout.blocks == everything.blocks:
                raise ValueError(
                    f"a density of {density} keeps all of {everything.column_groups} column groups "
                    f"of {group}; name a smaller block_in, or leave the layer dense"
                )
        bias = linear.bias
        sparse = cls(layout, bias is not None, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            sparse.values.copy_(layout.pack(weight))
            if sparse.bias is not None:
                sparse.bias.copy_(bias)
        sparse.values.requires_grad_(linear.weight.requires_grad)
        if sparse.bias is not None:
            sparse.bias.requires_grad_(bias.requires_grad)
        return sparse.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """Return a dense layer with the same outputs: missing blocks are zeros."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        trained = self.values.requires_grad
        linear.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=trained)
        if self.bias is not None:
            trained = self.bias.requires_grad
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=trained)
        return linear.train(self.training)

    def export_form(self) -> TileGatherLinear:
        """Return a copy made of plain gathers and matrix products, for exported files."""
        return TileGatherLinear(self.layout, self.values, self.bias)

    @property
    def layout(self) -> BlockLayout:
        """Which blocks are stored, checked."""
        sizes = (self.out_features, self.in_features, self.block_out, self.block_in)
        return BlockLayout(*sizes, self.rows, self.columns)

    @property
    def density(self) -> float:
        """Stored share of the weight."""
        return self.values.numel() / (self.in_features * self.out_features)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], computed: for code that reads it."""
        return self.layout.unpack(self.values)

    def reset_parameters(self) -> None:
        """Draw the parameters so that the output varies as that of a new `nn.Linear`."""
        bound = (self.in_features * self.density) ** -0.5
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features].

        Raises:
            ValueError: The last dimension of x is another.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected an input [..., {self.in_features}], got {list(x.shape)}")
        operands = (x, self.values, self.bias)
        trained = torch.is_grad_enabled() and any(
            item is not None and item.requires_grad for item in operands
        )
        result = block_sparse_linear(
            x.reshape(-1, self.in_features),
            self.values,
            self.bias,
            self.rows,
            self.columns,
            self.out_features,
            inference=not trained,
        )
        return result.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"blocks={self.values.shape[0]} of {self.block_out}x{self.block_in}, "
            f"density={self.density:.3g}, bias={self.bias is not None}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse indices that are not those of a layout of this layer, before they are used."""
        rows, columns = (state_dict.get(prefix + name) for name in ("rows", "columns"))
        if rows is not None and columns is not None:
            sizes = (self.out_features, self.in_features, self.block_out, self.block_in)
            BlockLayout(*sizes, rows, columns)
        super()._load_from_state_dict(state_dict, prefix, *rest)
