"""Times predicted where none can be measured: from operations, bytes and a device's two rates.

The roofline model (Williams, Waterman and Patterson, 2009): a workload takes as long as its
operations take at the rate of a large matrix product, or as its bytes take at the rate of a large
copy, whichever is longer. It knows neither overheads nor how well a shape fits the hardware.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .structure import flatten
from .workload import Workload

PRODUCT_SIZE = 1024
"""Rows and columns of the matrices whose product gives the rate of operations."""
COPIED_BYTES = 2**26
"""Bytes of the copy that gives the rate of bytes; larger than the caches."""
_STEP_PASSES = 3
"""A training step moves the bytes of a forward pass about three times."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a millisecond, at best."""

    flops_per_ms: float
    bytes_per_ms: float


def product_workload(dtype: torch.dtype) -> Workload:
    """Return a large square matrix product."""
    layer = nn.Linear(PRODUCT_SIZE, PRODUCT_SIZE, bias=False, device="meta", dtype=dtype)
    return Workload.of_shape(layer, (PRODUCT_SIZE, PRODUCT_SIZE), dtype)


def rates_from(product_ms: float, copy_ms: float) -> Rates:
    """Return the rates behind the times of the product and of the copy."""
    return Rates(
        flops_per_ms=2 * PRODUCT_SIZE**3 / product_ms,
        bytes_per_ms=2 * COPIED_BYTES / copy_ms,  # read and written
    )


def roofline_ms(flops: int, size_bytes: int, rates: Rates, *, training: bool) -> float:
    """Return the time of an operation.

    Args:
        flops: Operations, in training those of the backward pass as well.
        size_bytes: What a forward pass reads and writes.
        rates: Of the device.
        training: Whether a backward pass follows.
    """
    passes = _STEP_PASSES if training else 1
    return max(flops / rates.flops_per_ms, passes * size_bytes / rates.bytes_per_ms)


def predicted_ms(work: Workload, rates: Rates, *, training: bool) -> float:
    """Return the time of a workload by the roofline model; runs it on shapes only."""
    shapes = work.on(torch.device("meta"), training=training)
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        outputs = flatten(shapes.module(*shapes.inputs))[0]
        reached = [value for value in outputs if value.requires_grad]
        torch.autograd.backward(reached, [torch.ones_like(value) for value in reached])
    tensors = (*shapes.module.parameters(), *shapes.module.buffers(), *shapes.inputs, *outputs)
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return roofline_ms(counter.get_total_flops(), size_bytes, rates, training=training)
