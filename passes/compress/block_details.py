"""What a plan says about a layer that becomes block-sparse, checked against the program."""

from __future__ import annotations

import torch
from pydantic import Field

from graphopt.kernels import BlockLayout
from graphopt.passes.base import Change
from graphopt.passes.compress.layer_replacement import LayerSizes, replaced_layer
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import PlanError
from graphopt.passes.linear_layers import LinearLayer, linear_layer
from graphopt.passes.program import Program


class BlockSizes(Details):
    """How a weight is cut into blocks, and how many stay, equally many per row tile."""

    block_out: int = Field(ge=1)
    block_in: int = Field(ge=1)
    blocks: int = Field(ge=1)


class Units(Details):
    """Hidden units to be put in order: their group, and all layers that become sparse with it."""

    group: str
    layers: dict[str, BlockSizes]


class Sparsification(BlockSizes, LayerSizes):
    """What `apply` and `restore` need, and for `transfer` the units to put in order first."""

    units: tuple[Units, ...]

    @property
    def sizes(self) -> BlockSizes:
        """The blocks alone."""
        return BlockSizes(block_out=self.block_out, block_in=self.block_in, blocks=self.blocks)


def checked(program: Program, change: Change) -> tuple[Sparsification, LinearLayer]:
    """Return the checked details and the layer of a change.

    Raises:
        PlanError: if they do not fit each other.
    """
    details = read_details(Sparsification, change)
    layer = replaced_layer(program, change, details, "sparse")
    tiles, odd = divmod(details.out_features, details.block_out)
    groups, rest = divmod(details.in_features, details.block_in)
    if odd or rest or details.blocks % tiles or details.blocks >= tiles * groups:
        raise PlanError(
            f"{change.target} cannot keep {details.blocks} blocks of "
            f"{details.block_out}x{details.block_in}: they must divide the layer, be equally many "
            f"in each of its {tiles} row tiles and fewer than its {tiles * groups}"
        )
    return details, layer


def present_layer(program: Program, name: str) -> LinearLayer:
    """Return the linear layer of this name.

    Raises:
        PlanError: if there is none.
    """
    layer = linear_layer(program, name)
    if layer is None:
        raise PlanError(f"{name} is not a linear layer of this program; is this plan for another?")
    return layer


def first_blocks(out_features: int, in_features: int, sizes: BlockSizes) -> BlockLayout:
    """Return a layout of these sizes: the first column groups of every row tile.

    Raises:
        ValueError: if blocks do not divide the weight.
    """
    tile, group = sizes.block_out, sizes.block_in
    if out_features % tile or in_features % group:
        what, size, block = (
            ("output", out_features, tile) if out_features % tile else ("input", in_features, group)
        )
        raise ValueError(f"blocks of {block} do not divide the {what} size {size}")
    mask = torch.zeros(out_features // tile, in_features // group, dtype=torch.bool)
    mask[:, : sizes.blocks // mask.shape[0]] = True
    return BlockLayout.from_mask(mask, tile, group)
