"""Values of single samples: cut out of a batch without their padding, and put into another one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def real_part(row: Tensor, dim: int | None, real: Tensor | None) -> Tensor:
    """Return a sample's value [...] with its real tokens only; `dim` counts the batch."""
    if dim is None or real is None:
        return row
    return row.index_select(dim - 1, real.nonzero()[:, 0])


def without_padding(value: Tensor, dim: int, real: Tensor) -> Tensor:
    """Return a batch of values with 0 at padded tokens."""
    shape = [size if i in (0, dim) else 1 for i, size in enumerate(value.shape)]
    return torch.where(real.view(shape), value, torch.zeros_like(value))


def batch_of(
    rows: Sequence[Tensor],
    dtype: torch.dtype,
    dim: int | None,
    real: Tensor | None,
    packed: bool,
) -> Tensor:
    """Return samples as one batch, tokens in their places, 0 at padded ones."""
    if packed:
        assert dim is not None
        return torch.cat(list(rows), dim).to(dtype)
    if dim is None or real is None:
        return torch.stack(list(rows)).to(dtype)
    shape = list(rows[0].shape)
    shape[dim - 1] = real.shape[1]
    batch = torch.zeros((len(rows), *shape), dtype=dtype)
    for target, row, places in zip(batch, rows, real.cpu(), strict=True):
        target.index_copy_(dim - 1, places.nonzero()[:, 0], row.to(dtype))
    return batch


def bytes_of(tensor: Tensor) -> bytes:
    """Return the elements of a tensor on the CPU as they lie in memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
