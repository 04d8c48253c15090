"""Calls of the Triton kernels: which constants a tile gives them, how many programs run.

Whether to call them at all is decided in `dispatch`.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from . import block_sparse
from .step_tables import (
    block_layout,
    forward_steps,
    gradient_slots,
    transposed_steps,
)
from .tiles import Tile

__all__ = [
    "INTERPRETED",
    "forward",
    "input_gradient",
    "multiply_constants",
    "weight_gradient",
    "weight_gradient_constants",
]

INTERPRETED: bool = triton.knobs.runtime.interpret
_SUM_TILE = 256
_L2_GROUP = 8


def multiply_constants(
    tile: Tile, block: tuple[int, int], *, transposed: bool, upcast: bool = False
) -> dict[str, Any]:
    """Return the constants of both products for blocks [block_out, block_in]."""
    block_out, block_in = block
    outer, inner = (block_in, block_out) if transposed else (block_out, block_in)
    return {
        "TOKEN_TILE": tile.span,
        "WIDTH": min(outer, tile.width),
        "STEP": min(inner, tile.step),
        "K_STRIDE": block_in if transposed else 1,
        "N_STRIDE": 1 if transposed else block_in,
        "PRECISION": _input_precision(tile),
        "UPCAST": upcast,
    }


def weight_gradient_constants(
    tile: Tile, block: tuple[int, int], *, upcast: bool = False
) -> dict[str, Any]:
    """Return the constants of the weight gradient for blocks [block_out, block_in]."""
    block_out, block_in = block
    rows, slot = min(block_out, tile.width), min(block_in, tile.span)
    return {
        "ROWS": rows,
        "SLOT": slot,
        "SLOTS": tile.span // slot,
        "STEP": tile.step,
        "BLOCK_IN": block_in,
        # Hopper's matrix instruction takes 64 rows or more.
        "SWAP": rows < 64,
        "PRECISION": _input_precision(tile),
        "UPCAST": upcast,
    }


def forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    out_features: int,
    activation: str,
    tile: Tile,
) -> Tensor:
    """Return `activation(x W^T + bias)` [tokens, out_features]; operands as `dispatch` aligns."""
    block = (values.shape[1], values.shape[2])
    layout = block_layout(rows, columns, out_features, x.shape[1], block)
    constants = multiply_constants(tile, block, transposed=False, upcast=_upcast(x))
    steps = forward_steps(rows, columns, layout, constants["WIDTH"], constants["STEP"])
    return _multiply(x, values, bias, steps, out_features, activation, tile, constants)


def input_gradient(
    gradient: Tensor, values: Tensor, rows: Tensor, columns: Tensor, in_features: int, tile: Tile
) -> Tensor:
    """Return `gradient W` [tokens, in_features]; operands as `dispatch` aligns them."""
    block = (values.shape[1], values.shape[2])
    layout = block_layout(rows, columns, gradient.shape[1], in_features, block)
    constants = multiply_constants(tile, block, transposed=True, upcast=_upcast(gradient))
    steps = transposed_steps(rows, columns, layout, constants["WIDTH"], constants["STEP"])
    return _multiply(gradient, values, None, steps, in_features, "none", tile, constants)


def weight_gradient(
    gradient: Tensor, x: Tensor, rows: Tensor, columns: Tensor, block: tuple[int, int], tile: Tile
) -> Tensor:
    """Return the stored blocks of `gradient^T x` [blocks, block_out, block_in].

    Where there are few blocks, the tokens are shared out: shares are summed in float32, in order.
    """
    layout = block_layout(rows, columns, gradient.shape[1], x.shape[1], block)
    constants = weight_gradient_constants(tile, block, upcast=_upcast(x))
    slots = gradient_slots(rows, columns, layout, constants["ROWS"], tile.span)
    groups, tokens = slots.gradient_columns.numel(), x.shape[0]
    shares = _shares(x.device, groups, triton.cdiv(tokens, tile.step))
    dtype = x.dtype if shares == 1 else torch.float32
    result = x.new_empty(shares, layout.blocks, *block, dtype=dtype)
    with _current(x.device):
        block_sparse.weight_gradient[(groups, shares)](
            gradient,
            x,
            slots.gradient_columns,
            slots.x_columns,
            slots.places,
            result,
            tokens,
            result[0].numel(),
            gradient.stride(0),
            x.stride(0),
            **constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return result[0] if shares == 1 else result.sum(0).to(x.dtype)


def _multiply(
    dense: Tensor,
    values: Tensor,
    bias: Tensor | None,
    steps: Any,
    width: int,
    activation: str,
    tile: Tile,
    constants: dict[str, Any],
) -> Tensor:
    tokens = dense.shape[0]
    result = dense.new_empty(tokens, width)
    # Without a bias any pointer will do: it is never read.
    vector = result if bias is None else bias
    epilogue = {"HAS_BIAS": bias is not None, "ACTIVATION": activation}
    run = {"num_warps": tile.warps, "num_stages": tile.stages}
    with _current(dense.device):
        if tile.operation == "multiply":
            programs = triton.cdiv(tokens, tile.span) * steps.tiles
            block_sparse.multiply[(programs,)](
                dense,
                values,
                steps.starts,
                steps.order,
                steps.dense,
                steps.values,
                vector,
                result,
                tokens,
                steps.tiles,
                dense.stride(0),
                result.stride(0),
                GROUP=_L2_GROUP,
                **constants,
                **epilogue,
                **run,
            )
            return result
        shares = _shares(dense.device, steps.tiles, steps.longest)
        partial_sums = dense.new_empty(shares, tokens, width, dtype=torch.float32)
        block_sparse.multiply_few_tokens[(steps.tiles, shares)](
            dense,
            values,
            steps.starts,
            steps.dense,
            steps.values,
            partial_sums,
            tokens,
            dense.stride(0),
            **constants,
            **run,
        )
        block_sparse.add_partial_sums[(triton.cdiv(width, _SUM_TILE), tokens)](
            partial_sums, vector, result, tokens, shares, width, TILE=_SUM_TILE, **epilogue
        )
    return result


def _shares(device: torch.device, programs: int, steps: int) -> int:
    """Return among how many programs to share a sum: two for every processor, 4 steps each."""
    wanted: int = triton.cdiv(2 * _processors(device), programs)
    return max(1, min(wanted, steps // 4))


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _input_precision(tile: Tile) -> str:
    return "tf32" if tile.precision == "tf32" else "ieee"


def _upcast(operand: Tensor) -> bool:
    return INTERPRETED and operand.dtype == torch.bfloat16


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the operands' device current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
