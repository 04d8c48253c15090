"""Which form of an inference product is fastest on a CPU, by sizes: a measured table.

The rows are what `benchmarks/kernels_cpu.py --routes` measured
(`benchmarks/results/kernels_cpu_routes.csv`). All forms give the same result.
"""

from __future__ import annotations

from typing import Literal

import torch

Route = Literal["tiles", "direct", "batched", "dense"]
"""A packed product per row tile, copied to its outputs; a plain one written there; one batched
product; the unpacked weight."""

DENSE_FROM = 0.9
"""Density from which the dense product is faster than any sparse one."""

_MANY_TILES = 8
_FEW_TOKENS = {"float32": 8, "float32 fast": 32, "bfloat16": 128}
"""Up to how many tokens one batched product beats many products of a row tile each."""

_MANY_TOKENS = {"float32 fast": 256, "bfloat16": 256}
"""From how many tokens a product written to its place beats a packed one copied there."""


def choose_route(
    dtype: torch.dtype, tokens: int, row_tiles: int, density: float, *, balanced: bool
) -> Route:
    """Return the fastest form for a product.

    Args:
        dtype: Of the operands.
        tokens: Rows of the input.
        row_tiles: Row tiles of the weight.
        density: Stored share of the weight.
        balanced: Whether every row tile stores equally many blocks.
    """
    if density >= DENSE_FROM:
        return "dense"
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        name = "float32 fast"
    if balanced and row_tiles >= _MANY_TILES and tokens <= _FEW_TOKENS.get(name, 32):
        return "batched"
    return "direct" if tokens >= _MANY_TOKENS.get(name, tokens + 1) else "tiles"
