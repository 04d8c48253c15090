"""What a linear layer costs as it is and in blocks: counted, and measured."""

from __future__ import annotations

import torch

from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.passes.base import Candidate, Change, Cost
from graphopt.passes.compress.block_details import BlockSizes, Sparsification, checked
from graphopt.passes.compress.layer_replacement import timed
from graphopt.passes.costs import Costs
from graphopt.passes.linear_layers import LinearLayer
from graphopt.passes.program import Program


def candidate_of(
    pass_name: str, name: str, layer: LinearLayer, before: Cost, sizes: BlockSizes
) -> Candidate:
    """Return the change of one layer with its costs, no units to put in order yet.

    Args:
        pass_name: The pass that makes it.
        name: The layer's name.
        layer: The layer.
        before: Its cost now.
        sizes: Its blocks.
    """
    tile, group = sizes.block_out, sizes.block_in
    every = layer.weight.numel() // (tile * group)
    details = Sparsification(
        in_features=layer.in_features,
        out_features=layer.out_features,
        bias=layer.bias is not None,
        units=(),
        **sizes.model_dump(),
    )
    removed = layer.weight.numel() - sizes.blocks * tile * group
    return Candidate(
        change=Change(
            pass_name=pass_name,
            target=name,
            summary=f"{layer.in_features} -> {layer.out_features} in {sizes.blocks} of {every} "
            f"blocks of {tile}x{group}",
            details=details.model_dump(mode="json"),
        ),
        before=before,
        after=Cost(
            flops=before.flops * sizes.blocks // every,
            size_bytes=before.size_bytes - removed * layer.weight.element_size(),
            parameters=before.parameters - removed,
        ),
        exclusive=frozenset(
            f"{name}.{layer.weight_name} {claim}" for claim in ("structure", "format")
        ),
    )


def measured(
    program: Program, candidate: Candidate, costs: Costs, *, training: bool
) -> tuple[Candidate, float]:
    """Return the candidate with its times, and how many times faster it is.

    The sparse layer has scattered blocks, as chosen ones are, on the device of the measurements.
    """
    details, layer = checked(program, candidate.change)
    sparse = _random_layer(details, layer)
    return timed(program, candidate, layer, sparse, costs, training=training)


def _random_layer(details: Sparsification, layer: LinearLayer) -> BlockSparseLinear:
    """Return a sparse layer of these sizes with scattered blocks, to be timed."""
    tile, group = details.block_out, details.block_in
    generator = torch.Generator().manual_seed(0)
    shape = (details.out_features // tile, details.in_features // group)
    density = details.blocks / (shape[0] * shape[1])
    with torch.random.fork_rng(devices=()):
        layout = BlockLayout.from_scores(
            torch.rand(shape, generator=generator), density, tile, group
        )
        sparse = BlockSparseLinear(layout, details.bias, dtype=layer.weight.dtype)
    return train_like(sparse, layer)


def train_like(sparse: BlockSparseLinear, layer: LinearLayer) -> BlockSparseLinear:
    """Give a sparse layer the mode of a dense one, and train what is trained there."""
    sparse.values.requires_grad_(layer.weight.requires_grad)
    if sparse.bias is not None and layer.bias is not None:
        sparse.bias.requires_grad_(layer.bias.requires_grad)
    return sparse.train(layer.module.training)
