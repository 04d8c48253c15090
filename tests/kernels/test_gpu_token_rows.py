"""The operators over rows on a real CUDA device."""

import pytest
import torch
from torch import Tensor

from graphopt.kernels import combine_rows, gather_rows, scatter_rows
from graphopt.kernels.gpu import row_dispatch
from graphopt.kernels.token_rows import (
    combine_rows_reference,
    gather_rows_reference,
    scatter_rows_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]
SHAPES = [(19,), (300, 1), (1000, 64), (1000, 384), (257, 3, 5), (130, 4100)]


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").mul(100).to(dtype)
    return x, torch.randperm(shape[0], device="cuda")[: shape[0] // 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_arrive_as_torch_moves_them(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, index = operands(shape, dtype)
    row_dispatch.works.cache_clear()
    torch.use_deterministic_algorithms(True)  # New memory is NaN.
    try:
        rows = gather_rows(x, index)
        over = combine_rows(x, index, rows.flip(0))
        back = scatter_rows(rows, index, len(x))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(rows, gather_rows_reference(x, index))
    assert torch.equal(over, combine_rows_reference(x, index, rows.flip(0)))
    assert torch.equal(back, torch.zeros_like(x).index_copy(0, index, rows))
    # The self-test passed: a warning would have been an error, and the kernels ran.
    assert row_dispatch.works.cache_info().currsize == 1


def test_gradients_and_compilation() -> None:
    x, index = operands((64, 96), torch.float32)
    x.requires_grad_()

    def through(gather: object, combine: object, scatter: object) -> Tensor:
        assert callable(gather)
        assert callable(combine)
        assert callable(scatter)
        rows = gather(x, index)
        y: Tensor = combine(x, index, rows.sin()) + scatter(rows.cos(), index, 64)
        return y

    found = through(gather_rows, combine_rows, scatter_rows)
    wanted = through(gather_rows_reference, combine_rows_reference, scatter_rows_reference)
    assert torch.equal(found, wanted)
    (a,) = torch.autograd.grad(found.square().sum(), x)
    (b,) = torch.autograd.grad(wanted.square().sum(), x)
    torch.testing.assert_close(a, b, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-4)
    compiled = torch.compile(through, fullgraph=True)
    torch.testing.assert_close(
        compiled(gather_rows, combine_rows, scatter_rows), wanted, rtol=1e-5, atol=1e-5
    )


def test_cuda_graphs() -> None:
    x, index = operands((64, 96), torch.bfloat16)
    gather_rows(x, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = combine_rows(x, index, gather_rows(x, index) * 2)
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(y, combine_rows_reference(x, index, gather_rows_reference(x, index) * 2))


def test_nan_stays_in_its_row() -> None:
    x, index = operands((64, 96), torch.bfloat16)
    x[5] = float("nan")
    index = index[index != 5]
    assert not gather_rows(x, index).isnan().any()
    index = torch.cat([index, index.new_tensor([5])])
    assert not combine_rows(x, index, torch.zeros_like(x[index])).isnan().any()
