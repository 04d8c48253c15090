"""Which form of an inference product is fastest on a CPU, by sizes: a measured table.

The rows are what `benchmarks/kernels_cpu.py --routes` measured
(`benchmarks/results/kernels_cpu_routes.csv`). All forms give the same result.
"""

from __future__ import annotations

from typing import Literal

import torch

Route = Literal["tiles", "batched", "dense"]
"""One packed product per row tile; one batched product; the unpacked weight."""

DENSE_FROM = 0.9
"""Density from which the dense product is faster than any sparse one."""

_LARGE_TILE_ROWS = 384
_BATCHED_UP_TO = {
    # (dtype, tiles of at least `_LARGE_TILE_ROWS` rows): tokens
    ("float32 fast", False): 256,
    ("float32 fast", True): 256,
    ("float32", False): 64,
    ("float32", True): 4,
    ("bfloat16", False): 256,
    ("bfloat16", True): 4,
}


def choose_route(
    dtype: torch.dtype, tokens: int, block_out: int, density: float, *, balanced: bool
) -> Route:
    """Return the fastest form for a product.

    Args:
        dtype: Of the operands.
        tokens: Rows of the input.
        block_out: Rows of a tile.
        density: Stored share of the weight.
        balanced: Whether every row tile stores equally many blocks.
    """
    if density >= DENSE_FROM:
        return "dense"
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        name = "float32 fast"
    limit = _BATCHED_UP_TO.get((name, block_out >= _LARGE_TILE_ROWS), 64)
    return "batched" if balanced and tokens <= limit else "tiles"
