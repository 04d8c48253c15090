"""Block sizes that pay, by device and use."""

from __future__ import annotations

import torch

_CPU_ROWS = 256
_CPU_COLUMNS = 32
_FEWEST_GROUPS = 4
"""Fewer column groups than this leave densities little choice."""

_CUDA_TRAINING = ((128, 128), (128, 64), (64, 64))
_CUDA_INFERENCE = ((256, 32), (128, 32), (128, 64), (64, 64))


def block_sizes(
    out_features: int, in_features: int, device: torch.device, *, training: bool
) -> tuple[int, int]:
    """Return rows and columns of a block for a weight [out_features, in_features].

    On CUDA it is the first preset that divides the weight: 128x128, 128x64, 64x64 for training,
    256x32, 128x32, 128x64, 64x64 for inference. On a CPU a row tile has the fewest rows from 256
    on that divide the outputs (all of them where there are fewer), and a column group the divisor
    of the inputs nearest to 32, from 8 to 128, that makes four groups if one does.

    Raises:
        ValueError: No such blocks divide the weight.
    """
    if device.type == "cuda":
        for block in _CUDA_TRAINING if training else _CUDA_INFERENCE:
            if out_features % block[0] == 0 and in_features % block[1] == 0:
                return block
    else:
        groups = [n for n in range(_CPU_COLUMNS // 4, _CPU_COLUMNS * 4 + 1) if not in_features % n]
        if groups:
            tiles = range(min(_CPU_ROWS, out_features), out_features + 1)
            tile = next(n for n in tiles if out_features % n == 0)
            return tile, min(
                groups, key=lambda n: (in_features // n < _FEWEST_GROUPS, abs(n - _CPU_COLUMNS))
            )
    raise ValueError(
        f"expected a weight that blocks of this device divide, got {out_features} outputs and "
        f"{in_features} inputs; name block sizes yourself, or leave the layer dense"
    )
