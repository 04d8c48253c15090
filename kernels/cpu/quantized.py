"""Integer products on the CPU, by oneDNN.

One operator serves every kind of input: unsigned 8-bit inputs with one scale and zero point times
signed 8-bit weights with a scale per output. Inputs with a scale per token go in normalised, and
their scales multiply the result. Signed inputs would be 300 times slower (oneDNN has no kernel for
them on processors without AVX10.2).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from graphopt.kernels.derived import derived
from graphopt.kernels.quantized_inputs import TINIEST, range_code
from graphopt.kernels.quantized_weights import unpack_integers

_CENTER = 128
"""The unsigned integer that stands for 0 where inputs are symmetric."""


def runs(
    x: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bits: int,
    activations: str,
) -> bool:
    """Say whether `quantized_linear` computes this here."""
    return (
        activations != "none"
        and scales.dim() == 1
        and x.dtype is not torch.float64
        and x.numel() > 0
        and _exact()
    )


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bits: int,
    activations: str,
) -> Tensor:
    """Compute `quantized_operator.quantized_linear` where `runs` says so."""
    rows = x.detach().float().contiguous()
    bias = None if bias is None else bias.detach().float()
    packed = derived(
        "packed for integer products",
        (codes, scales),
        lambda: torch.ops.onednn.qlinear_prepack(unpack_integers(codes, bits).contiguous(), None),
    )
    if activations == "dynamic":
        largest = rows.abs().amax(1, keepdim=True).clamp_min_(TINIEST)
        integers = _rounded(rows * (127 / largest), _CENTER)
        result = _product(integers, 1 / 127, _CENTER, packed, scales, None).mul_(largest)
        result = result if bias is None else result.add_(bias)
        return result.to(x.dtype)
    if activations == "dynamic-tensor":
        input_scale, input_zero_point = range_code(*torch.aminmax(rows))
    assert input_scale is not None
    assert input_zero_point is not None
    scale, zero_point = input_scale.item(), int(input_zero_point.item())
    integers = _rounded(rows / scale, zero_point)
    return _product(integers, scale, zero_point, packed, scales, bias).to(x.dtype)


def _rounded(multiples: Tensor, zero_point: int) -> Tensor:
    """Return numbers, in units of their scale, as unsigned integers; the numbers are overwritten.

    Through int8: the conversion to uint8 is nine times slower.
    """
    signed = multiples.round_().add_(zero_point - _CENTER).clamp_(-128, 127).to(torch.int8)
    return signed.view(torch.uint8).bitwise_xor_(_CENTER)


def _product(
    integers: Tensor,
    scale: float,
    zero_point: int,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    centers = torch.zeros(scales.shape, dtype=torch.int32)
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(integers, scale, zero_point, packed, scales, centers, bias),
        *(1.0, 0, torch.float32, "none", [], ""),  # of the result: scale, zero point, type, ...
    )
    return result


@cache
def _exact() -> bool:
    """Say whether integer products exist here and do not saturate on the way.

    Without VNNI instructions, pairs of products are summed in 16 bits.
    """
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 256, (8, 64), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (16, 64), generator=generator, dtype=torch.int8)
    integers[0], weight[0] = 255, 127
    expected = (integers.double() - _CENTER) @ weight.double().t()
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        found = _product(integers, 1.0, _CENTER, packed, torch.ones(16), None)
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(found.double(), expected)
