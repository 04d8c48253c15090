"""What the CUDA key of the operators runs, on CPU tensors and interpreted kernels."""

import warnings

import pytest
import torch
from torch import nn

from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.kernels.gpu import dense, launch, self_test
from graphopt.kernels.gpu.accuracy import Problem
from graphopt.kernels.gpu.dispatch import (
    block_sparse_linear,
    block_sparse_linear_input_gradient,
    block_sparse_linear_weight_gradient,
)

MASK = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0]]).bool()
HALF = (torch.float16, torch.bfloat16)


def indices(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return problem.layout.rows, problem.layout.columns


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the kernels that were called, in order."""
    calls: list[str] = []
    for name in ("forward", "input_gradient", "weight_gradient"):
        original = getattr(launch, name)

        def noting(*args: object, name: str = name, original: object = original) -> object:
            calls.append(name)
            assert callable(original)
            return original(*args)

        monkeypatch.setattr(launch, name, noting)
    return calls


@pytest.mark.parametrize("dtype", HALF)
def test_operators(dtype: torch.dtype, launched: list[str]) -> None:
    problem = Problem.random(MASK, (64, 64), 70, dtype)
    x, gradient, values = problem.x, problem.gradient, problem.values
    y = block_sparse_linear(x, values, problem.bias, *indices(problem), 128)
    fused = block_sparse_linear(x, values, problem.bias, *indices(problem), 128, "silu", True)
    assert problem.excess("forward", y) <= 1
    assert problem.excess("forward", fused, activation="silu") <= 1
    dx = block_sparse_linear_input_gradient(gradient, values, *indices(problem), 256)
    assert problem.excess("input_gradient", dx) <= 1
    dw = block_sparse_linear_weight_gradient(gradient, x, *indices(problem), 64, 64)
    assert problem.excess("weight_gradient", dw) <= 1
    assert {"forward", "input_gradient", "weight_gradient"} == set(launched)


def test_operands_as_they_come() -> None:
    """Columns of a wider matrix, an odd address, an expanded gradient, transposed values."""
    problem = Problem.random(MASK, (64, 64), 70, torch.float16)
    wide = torch.randn(70, 256 + 48).half()
    wide[:, 16:272] = problem.x
    odd = torch.empty(70 * 256 + 1, dtype=torch.float16)[1:].view(70, 256).copy_(problem.x)
    uneven = torch.empty(70, 261, dtype=torch.float16)[:, :256].copy_(problem.x)
    turned = problem.x.t().contiguous().t()
    values = problem.values.transpose(1, 2).contiguous().transpose(1, 2)
    assert not values.is_contiguous()
    for x in (wide[:, 16:272], odd, uneven, turned):
        y = block_sparse_linear(x, values, problem.bias, *indices(problem), 128)
        assert problem.excess("forward", y) <= 1
    expanded = Problem(
        layout=problem.layout,
        x=problem.x,
        gradient=problem.gradient[:1, :1].expand(70, 128),
        values=problem.values,
        bias=problem.bias,
    )
    g = expanded.gradient
    dx = block_sparse_linear_input_gradient(g, values, *indices(problem), 256)
    assert expanded.excess("input_gradient", dx) <= 1
    dw = block_sparse_linear_weight_gradient(g, problem.x, *indices(problem), 64, 64)
    assert expanded.excess("weight_gradient", dw) <= 1


def test_tables_follow_the_indices_of_a_layer(launched: list[str]) -> None:
    """After load_state_dict and after an update in place; state_dict holds no table."""
    first = BlockLayout.from_mask(MASK, 64, 64)
    second = BlockLayout.from_mask(MASK.roll(1, 1), 64, 64)
    layer = BlockSparseLinear(first, dtype=torch.float16)
    other = BlockSparseLinear(second, dtype=torch.float16)
    x = torch.randn(70, 256).half()
    assert set(layer.state_dict()) == {"values", "bias", "rows", "columns"}

    def matches() -> bool:
        parts = (layer.values.detach(), layer.bias, layer.rows, layer.columns)
        with torch.no_grad():
            y = block_sparse_linear(x, *parts, 128, "none", True)
            wanted = nn.functional.linear(x.double(), layer.weight.double(), parts[1].double())  # type: ignore[union-attr]
        # One rounding to float16 of a float32 sum.
        return bool(torch.allclose(y.double(), wanted, rtol=2**-10, atol=1e-5))

    assert matches()
    layer.load_state_dict(other.state_dict())
    assert matches()
    layer.columns.copy_(first.columns)
    assert matches()
    assert launched.count("forward") >= 3


@pytest.mark.parametrize(
    ("block", "mask", "dtype"),
    [
        ((48, 48), MASK, torch.float16),  # not powers of two
        ((8, 64), MASK, torch.float16),  # too small for a matrix instruction
        ((64, 64), ~MASK, torch.float16),  # too dense to pay
        ((64, 64), MASK, torch.float64),  # no kernel
    ],
)
def test_the_dense_form_runs_where_no_kernel_does_or_pays(
    block: tuple[int, int], mask: torch.Tensor, dtype: torch.dtype, launched: list[str]
) -> None:
    problem = Problem.random(mask, block, 40, dtype)
    layout = problem.layout
    sizes = (layout.out_features, layout.in_features)
    x, gradient, values = problem.x, problem.gradient, problem.values
    y = block_sparse_linear(x, values, problem.bias, *indices(problem), sizes[0], "gelu", True)
    dx = block_sparse_linear_input_gradient(gradient, values, *indices(problem), sizes[1])
    dw = block_sparse_linear_weight_gradient(gradient, x, *indices(problem), *block)
    # torch multiplies halves on the CPU in float32 and rounds before the activation too.
    eps = torch.finfo(dtype).eps
    exact = problem._exact("forward", "gelu")[0], problem._exact("input_gradient", "none")[0]
    for found, wanted in zip((y, dx), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=4 * eps, atol=16 * eps)
    assert problem.excess("weight_gradient", dw) <= 1
    assert launched == []


def test_no_tokens(launched: list[str]) -> None:
    problem = Problem.random(MASK, (64, 64), 0, torch.float16)
    x, gradient, values = problem.x, problem.gradient, problem.values
    y = block_sparse_linear(x, values, problem.bias, *indices(problem), 128)
    dx = block_sparse_linear_input_gradient(gradient, values, *indices(problem), 256)
    dw = block_sparse_linear_weight_gradient(gradient, x, *indices(problem), 64, 64)
    assert (y.shape, dx.shape) == ((0, 128), (0, 256))
    assert dw.shape == values.shape
    assert not dw.any()
    # A grid of no programs is an error on a device.
    assert launched == []


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.random(MASK, (32, 32), 70, torch.float16)
    right = launch.forward
    monkeypatch.setattr(launch, "forward", lambda *args: right(*args) * 1.01)
    arguments = (problem.x, problem.values, problem.bias, *indices(problem), 64)
    with pytest.warns(RuntimeWarning, match=r"failed its self-test on cpu.*times what rounding"):
        y = block_sparse_linear(*arguments)
    assert torch.equal(y, dense.forward(*arguments, "none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block_sparse_linear(*arguments)
    self_test.works.cache_clear()


def test_a_kernel_that_raises_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no compiler for the launcher")

    problem = Problem.random(MASK, (32, 32), 70, torch.float16)
    monkeypatch.setattr(launch, "input_gradient", refuse)
    with pytest.warns(RuntimeWarning, match="OSError: no compiler for the launcher"):
        block_sparse_linear_input_gradient(
            problem.gradient, problem.values, *indices(problem), problem.x.shape[1]
        )
    self_test.works.cache_clear()


def test_operands_that_do_not_fit_are_refused() -> None:
    problem = Problem.random(MASK, (64, 64), 4, torch.float16)
    with pytest.raises(ValueError, match="expected x, values and bias of one dtype"):
        block_sparse_linear(problem.x.float(), problem.values, None, *indices(problem), 128)
