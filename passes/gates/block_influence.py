"""How much residual blocks matter: by how much each turns the stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.passes.base import Context
from graphopt.passes.calibration import bind, evaluation_mode
from graphopt.passes.padding import real_tokens
from graphopt.passes.program import Program, compile_values

from .residual_blocks import ResidualBlock


def block_influences(
    program: Program, context: Context, blocks: Sequence[ResidualBlock]
) -> list[float]:
    """Return 1 - cosine between entry and result of every region, averaged over real tokens."""
    nodes = [node for block in blocks for node in (block.region.entry, block.region.add)]
    run = compile_values(program, nodes)
    totals = [0.0] * len(blocks)
    count = [0.0] * len(blocks)
    calibration = context.calibration
    batches: Iterator[Mapping[str, Any]] = (
        iter([program.example]) if calibration is None else calibration.batches()
    )
    with evaluation_mode(program.model), torch.no_grad():
        for batch in batches:
            values = run(program.model, *bind(program, batch))
            real = real_tokens(program, batch)
            for index, block in enumerate(blocks):
                before, after = values[2 * index : 2 * index + 2]
                cosine = functional.cosine_similarity(
                    before.double(), after.double(), dim=block.width_dim
                )
                weight = _row_weights(cosine, real)
                totals[index] += float(((1 - cosine) * weight).sum())
                count[index] += float(weight.sum())
    return [total / max(rows, 1.0) for total, rows in zip(totals, count, strict=True)]


def _row_weights(rows: Tensor, real: Tensor | None) -> Tensor:
    """Return 1 for rows that count: real tokens where the rows are those of the batch's tokens."""
    if real is None or real.shape != rows.shape[:2]:
        return torch.ones_like(rows)
    extra = (1,) * (rows.dim() - 2)
    return real.to(rows.device, rows.dtype).view(*real.shape, *extra).expand_as(rows)
