"""Which tile each kernel computes with, and where a kernel is expected to pay: tables, as data.

Nothing is tuned at run time: equal calls give equal bits and nobody waits for a search. Every row
is compiled ahead of time for its architectures, and what the compiler made of it is checked
(benchmarks/kernels_ahead_of_time.py): no spills, the shared memory of the architecture, tensor-core
instructions. The expected efficiencies are estimates from arithmetic intensity. No number here was
measured on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

__all__ = [
    "ARCHITECTURES",
    "Tile",
    "architecture",
    "expected_efficiency",
    "find_tile",
    "precision",
    "takes_blocks",
    "tiles",
]

# Shared memory one program may use, in bytes.
ARCHITECTURES = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448}


@dataclass(frozen=True)
class Tile:
    """One row: how one kernel cuts its product on one architecture.

    Attributes:
        operation: "multiply", "multiply_few_tokens" or "weight_gradient".
        precision: "half" (float16, bfloat16), "tf32" or "ieee" (float32).
        architecture: One of `ARCHITECTURES`.
        width: Largest part of a block that is one side of the tile: of its output side, for
            weight gradients of its rows. A wider block is several tiles.
        span: The tile's other side: tokens; for weight gradients columns of blocks.
        step: Elements of the summed side in one step (at most a block of them); for weight
            gradients tokens.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        from_tokens: Fewest tokens this row is for.
    """

    operation: str
    precision: str
    architecture: str
    width: int
    span: int
    step: int
    warps: int
    stages: int
    from_tokens: int = 0

    @property
    def takes_activations(self) -> bool:
        """Whether the tile leaves registers for an activation."""
        return self.width * self.span <= 128 * 128


# (operation, precision, width, span, step, from_tokens), then (warps, stages) on sm_80, sm_86,
# sm_90, sm_100; None where the row is not used: 256 tokens spill on sm_80 and sm_86.
_ROWS: tuple[
    tuple[tuple[str, str, int, int, int, int], tuple[tuple[int, int] | None, ...]], ...
] = (
    (("multiply", "half", 128, 256, 64, 4096), (None, None, (8, 3), (8, 3))),
    (("multiply", "half", 128, 128, 64, 0), ((8, 4), (8, 3), (8, 4), (8, 4))),
    (("multiply", "half", 64, 128, 64, 0), ((4, 4), (4, 3), (4, 4), (4, 4))),
    (("multiply", "half", 32, 128, 64, 0), ((4, 4), (4, 4), (4, 4), (4, 4))),
    (("multiply", "tf32", 128, 128, 32, 0), ((8, 3), (8, 3), (8, 3), (8, 3))),
    (("multiply", "tf32", 64, 128, 32, 0), ((4, 3), (4, 3), (4, 3), (4, 3))),
    (("multiply", "ieee", 64, 64, 16, 0), ((8, 3), (8, 3), (8, 3), (8, 3))),
    (("multiply_few_tokens", "half", 128, 64, 64, 17), ((4, 4), (4, 4), (4, 4), (4, 4))),
    (("multiply_few_tokens", "half", 64, 64, 64, 17), ((4, 4), (4, 3), (4, 4), (4, 4))),
    (("multiply_few_tokens", "half", 128, 16, 64, 0), ((4, 5), (4, 5), (4, 5), (4, 5))),
    (("multiply_few_tokens", "half", 64, 16, 64, 0), ((4, 5), (4, 5), (4, 5), (4, 5))),
    (("multiply_few_tokens", "half", 32, 16, 64, 0), ((4, 5), (4, 5), (4, 5), (4, 5))),
    (("multiply_few_tokens", "ieee", 64, 16, 32, 0), ((4, 4), (4, 4), (4, 4), (4, 4))),
    (("weight_gradient", "half", 128, 128, 64, 0), ((8, 4), (8, 3), (8, 4), (8, 4))),
    (("weight_gradient", "half", 64, 128, 64, 0), ((4, 4), (4, 3), (4, 4), (4, 4))),
    (("weight_gradient", "half", 32, 128, 64, 0), ((4, 4), (4, 4), (4, 4), (4, 4))),
    (("weight_gradient", "tf32", 128, 128, 32, 0), ((8, 3), (8, 3), (8, 3), (8, 3))),
    (("weight_gradient", "tf32", 64, 128, 32, 0), ((4, 3), (4, 3), (4, 3), (4, 3))),
    (("weight_gradient", "ieee", 64, 64, 16, 0), ((8, 3), (8, 3), (8, 3), (8, 3))),
)

# Expected density * T_dense / T_sparse by the block's side in the output of the product, widest
# first: estimates, not measured.
_EFFICIENCY = {
    ("half", "sm_80"): {128: 0.80, 64: 0.60, 16: 0.35},
    ("half", "sm_86"): {128: 0.80, 64: 0.60, 16: 0.35},
    ("half", "sm_90"): {128: 0.60, 64: 0.38, 16: 0.18},
    ("half", "sm_100"): {128: 0.50, 64: 0.30, 16: 0.15},
    ("tf32", "sm_80"): {128: 0.60, 64: 0.45, 16: 0.25},
    ("tf32", "sm_86"): {128: 0.60, 64: 0.45, 16: 0.25},
    ("tf32", "sm_90"): {128: 0.35, 64: 0.25, 16: 0.12},
    ("tf32", "sm_100"): {128: 0.30, 64: 0.20, 16: 0.10},
}
_EFFICIENCY_IEEE = 0.5
# A product with few tokens waits for the values: it costs what reading them costs.
_EFFICIENCY_FEW_TOKENS = 0.7


def tiles() -> Iterator[Tile]:
    """Yield every row of the table, for every architecture that uses it."""
    for (operation, kind, width, span, step, from_tokens), configurations in _ROWS:
        for name, configuration in zip(ARCHITECTURES, configurations, strict=True):
            if configuration is not None:
                yield Tile(operation, kind, name, width, span, step, *configuration, from_tokens)


@cache
def find_tile(
    operation: str, kind: str, name: str, side: int, tokens: int, activation: str = "none"
) -> Tile:
    """Return the row for a block with this output side: the narrowest that holds it.

    Args:
        operation: "multiply" or "weight_gradient"; few tokens get their own kernel.
        kind: A precision.
        name: An architecture.
        side: Block size along the product's output; for weight gradients the block's rows.
        tokens: Rows of the dense operand.
        activation: What the kernel applies to the result.
    """
    rows = [row for row in tiles() if row.architecture == name and tokens >= row.from_tokens]
    # With few tokens memory is the limit: float32 is multiplied as such.
    few_kind = "ieee" if kind == "tf32" else kind
    few = [
        row
        for row in rows
        if (row.operation, row.precision) == (f"{operation}_few_tokens", few_kind)
        and tokens <= row.span
    ]
    found = few or [
        row
        for row in rows
        if (row.operation, row.precision) == (operation, kind)
        and (activation == "none" or row.takes_activations)
    ]
    widest = max(row.width for row in found)
    width = min((row.width for row in found if row.width >= side), default=widest)
    return max((row for row in found if row.width == width), key=lambda row: row.from_tokens)


def expected_efficiency(tile: Tile, side: int) -> float:
    """Return the expected density * T_dense / T_sparse; a kernel pays below this density."""
    if tile.operation == "multiply_few_tokens":
        return _EFFICIENCY_FEW_TOKENS
    if tile.precision == "ieee":
        return _EFFICIENCY_IEEE
    by_side = _EFFICIENCY[tile.precision, tile.architecture]
    return next(value for least, value in by_side.items() if side >= least)


def takes_blocks(block_out: int, block_in: int) -> bool:
    """Return whether the kernels take such blocks: both sides powers of two from 16 on."""
    return all(side >= 16 and side & (side - 1) == 0 for side in (block_out, block_in))


def precision(dtype: torch.dtype) -> str | None:
    """Return how tensors of this type are multiplied now, or None if no kernel does it.

    float32 is multiplied as such unless torch may use TensorFloat-32 on this device.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return None


@cache
def architecture(device: torch.device) -> str | None:
    """Return whose rows fit a device, or None if none do.

    Later consumer GPUs (8.9, 12.x) take the rows of sm_86: they have as much shared memory and the
    same matrix instructions. The CPU takes those of sm_80 where Triton interprets.
    """
    if device.type == "cpu":
        return "sm_80" if os.environ.get("TRITON_INTERPRET") == "1" else None
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100", 12: "sm_86"}.get(major)
