"""Weights as small integers with scales: rounding, packing, and the numbers they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dequantize", "largest_integer", "pack_integers", "round_weight", "unpack_integers"]


def largest_integer(bits: int) -> int:
    """Return the largest integer of a symmetric code: 127 for 8 bits, 7 for 4."""
    return (1 << (bits - 1)) - 1


def round_weight(weight: Tensor, bits: int, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """Round every weight to the nearest multiple of its group's scale.

    The scale maps the group's largest absolute value to the largest integer.

    Args:
        weight: [out_features, in_features].
        bits: 8 or 4.
        group_size: Inputs that share a scale; 0 for all of a row.

    Returns:
        Integers [out_features, in_features], int8, and scales [out_features] or
        [out_features, groups], float32.
    """
    groups = weight.detach().float().unflatten(1, (-1, group_size or weight.shape[1]))
    largest = largest_integer(bits)
    scales = groups.abs().amax(2) / largest
    # Rows of zeros, or of numbers too small for a float32 scale, stay zeros.
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
    integers = (groups / scales[..., None]).round_().clamp_(-largest, largest)
    return integers.to(torch.int8).flatten(1), scales if group_size else scales[:, 0]


def dequantize(integers: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers [out_features, in_features] that integers stand for, in scales' type."""
    if scales.dim() == 1:
        return integers * scales[:, None]
    groups: Tensor = integers.unflatten(1, (scales.shape[1], -1)) * scales[..., None]
    return groups.flatten(1)


def pack_integers(integers: Tensor, bits: int) -> Tensor:
    """Return integers as they are stored: int8, or two in a byte.

    Four-bit integers from -8 to 7 are stored plus 8, the one at the even position in the lower
    half of the byte, as the ONNX operator `com.microsoft.MatMulNBits` reads them.

    Args:
        integers: [rows, columns], int8; an even number of columns for 4 bits.
        bits: 8 or 4.
    """
    if bits == 8:
        return integers.contiguous()
    shifted = (integers.contiguous() + 8).to(torch.uint8)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def unpack_integers(codes: Tensor, bits: int) -> Tensor:
    """Return the integers [rows, columns], int8, of codes made by `pack_integers`."""
    if bits == 8:
        return codes
    halves = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
    return halves.to(torch.int8) - 8
