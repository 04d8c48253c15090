"""How the dimensions of a tensor lie in memory, and another tensor laid out alike."""

from __future__ import annotations

import torch

from .program import hint


def memory_order(value: torch.Tensor) -> list[int]:
    """Return the dimensions from the outermost inwards; as they are where they have no order."""
    strides = [hint(s) for s in value.stride()] if value.layout is torch.strided else [0]
    if 0 in strides:
        return list(range(value.dim()))
    # Of equal strides a size of 1 is the inner one: one channel that comes last is one of those.
    return sorted(range(value.dim()), key=lambda dim: (-strides[dim], -hint(value.shape[dim])))


def laid_out_like(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a value with its dimensions in memory as another tensor's of as many dimensions.

    So a convolution whose channels come last keeps the kernels that run on them. A tensor that lies
    as its shape says, and one of other dimensions, leaves the value as it is.
    """
    order = memory_order(other)
    if value.dim() != other.dim() or order == sorted(order):
        return value
    back = [order.index(dim) for dim in range(value.dim())]
    # A clone has the strides of its order for sizes of 1 too, by which kernels are chosen.
    return value.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
