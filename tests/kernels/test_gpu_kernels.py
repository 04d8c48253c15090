"""The operators on a real CUDA device."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from graphopt.kernels import BlockSparseLinear
from graphopt.kernels.block_sparse_operator import ACTIVATIONS
from graphopt.kernels.gpu import dispatch
from graphopt.kernels.gpu.accuracy import PRODUCTS, Problem
from graphopt.kernels.gpu.tiles import architecture, find_tile, precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MASK = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(128, 128), (64, 64), (128, 32), (32, 32), (256, 64)])
@pytest.mark.parametrize("tokens", [3, 40, 300, 4100])
def test_products(dtype: torch.dtype, block: tuple[int, int], tokens: int) -> None:
    from graphopt.kernels.gpu.self_test import run

    name, kind = architecture(torch.device("cuda", 0)), precision(dtype)
    assert name is not None
    assert kind is not None
    problem = Problem.random(MASK, block, tokens, dtype, "cuda")
    for product in PRODUCTS:
        operation = "weight_gradient" if product == "weight_gradient" else "multiply"
        side = block[1] if product == "input_gradient" else block[0]
        tile = find_tile(operation, kind, name, side, tokens)
        first, second = (run(problem, product, tile) for _ in range(2))
        assert problem.excess(product, first) <= 1
        assert torch.equal(first, second)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    problem = Problem.random(MASK, (64, 64), 70, torch.bfloat16, "cuda")
    rows, columns = problem.layout.rows, problem.layout.columns
    found = dispatch.block_sparse_linear(
        problem.x, problem.values, problem.bias, rows, columns, 192, activation, True
    )
    assert problem.excess("forward", found, activation=activation) <= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_token(activation: str) -> None:
    problem = Problem.random(MASK, (64, 64), 70, torch.bfloat16, "cuda")
    problem.x[3] = float("nan")
    rows, columns = problem.layout.rows, problem.layout.columns
    found = dispatch.block_sparse_linear(
        problem.x, problem.values, problem.bias, rows, columns, 192, activation, True
    )
    assert found.isnan().any(1).nonzero().flatten().tolist() == [3]


def test_a_layer_trains_and_compiles() -> None:
    layer = BlockSparseLinear.from_dense(nn.Linear(512, 512), 0.25, block_out=128, block_in=128)
    layer = layer.to("cuda", torch.bfloat16)
    x = torch.randn(200, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().square().mean().backward()
    # W and its products in float32; the layer rounds the output and its gradient to bfloat16.
    weight = layer.weight.detach().float().requires_grad_()
    a = x.detach().float().requires_grad_()
    wanted = nn.functional.linear(a, weight, layer.bias.detach().float())  # type: ignore[union-attr]
    wanted.square().mean().backward()
    assert x.grad is not None
    assert a.grad is not None
    assert weight.grad is not None
    assert layer.values.grad is not None
    for found, exact in (
        (y, wanted),
        (x.grad, a.grad),
        (layer.values.grad, layer.layout.pack(weight.grad)),
    ):
        difference = (found.float() - exact).norm() / exact.norm()
        assert difference < 3 * torch.finfo(torch.bfloat16).eps
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
