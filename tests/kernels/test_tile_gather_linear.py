"""The plain form of a block-sparse layer computes what the layer computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.kernels.block_layout import BlockLayout
from graphopt.kernels.block_sparse_linear import BlockSparseLinear

_UNBALANCED = torch.tensor(
    [[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool
)
_BALANCED = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
_ONE_TILE = torch.tensor([[0, 1, 1, 0]], dtype=torch.bool)


def _layer(mask: Tensor, bias: bool, dtype: torch.dtype) -> BlockSparseLinear:
    torch.manual_seed(0)
    return BlockSparseLinear(BlockLayout.from_mask(mask, 6, 8), bias, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [_BALANCED, _UNBALANCED, _ONE_TILE])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32)])
def test_equal_to_the_dense_product_within_rounding(
    shape: tuple[int, ...], mask: Tensor, bias: bool, dtype: torch.dtype
) -> None:
    layer = _layer(mask, bias, dtype)
    x = torch.randn(shape, dtype=dtype)
    found = layer.export_form()(x)
    assert found.dtype == dtype
    weight, wide = layer.weight.detach().double(), x.double()
    constant = torch.zeros(1).double() if layer.bias is None else layer.bias.detach().double()
    exact = wide @ weight.T + constant
    # One rounding for each of 32 products, their sums and the bias, and those of the result.
    roundings = 36 * (torch.finfo(dtype).eps / 2)
    bound = roundings / (1 - roundings) * (wide.abs() @ weight.abs().T + constant.abs())
    assert ((found.double() - exact).abs() <= bound).all()


def test_a_tile_without_blocks_reads_no_input() -> None:
    form = _layer(_UNBALANCED, True, torch.float32).export_form()
    found = form(torch.full((3, 32), float("nan")))
    assert found[:, :6].isnan().all()
    assert not found[:, 6:12].isnan().any()


def test_inputs_need_no_order_in_memory() -> None:
    form = _layer(_BALANCED, True, torch.float32).export_form()
    x = torch.randn(3, 32, 5)
    assert torch.equal(form(x.transpose(1, 2)), form(x.transpose(1, 2).contiguous()))


def test_inputs_of_another_width_are_refused() -> None:
    form = _layer(_BALANCED, True, torch.float32).export_form()
    with pytest.raises(ValueError, match=r"expected an input \[..., 32\], got \[2, 64\]"):
        form(torch.randn(2, 64))


def test_the_form_is_a_copy_that_is_not_trained() -> None:
    layer = _layer(_UNBALANCED, True, torch.float32)
    form = layer.export_form()
    x = torch.randn(3, 32)
    before = form(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(form(x), before)
    assert not list(form.parameters())
    assert isinstance(form, nn.Module)
